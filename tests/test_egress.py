"""Fetching by URL: what must not be reached is not touched, and no host can hold us up or fill us."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import logging
import socket
import ssl
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import httpcore2
import httpx2
import pytest
from hypothesis import given
from hypothesis import strategies as st
from serving import run, until

from lcm_rt import egress as egress_module
from lcm_rt.egress import MAX_URL, REFUSED, Egress, is_public
from lcm_rt.errors import DownloadError, Unavailable, from_wire, to_wire

PUBLIC = "93.184.216.34"
ALSO_PUBLIC = "2606:2800:220:1:248:1893:25c8:1946"

# Of pictures.example and huggingface.co, by themselves, from 2020 to 2120.
KEY = """-----BEGIN PRIVATE KEY-----
MIGHAgEAMBMGByqGSM49AgEGCCqGSM49AwEHBG0wawIBAQQgmhCB5F+QBp9JGHLu
ZiE+OgdgQ72LvTO50LbodUhiAUqhRANCAATpxpDUEqD9lLIBEmi4dG8gSnpLRVYl
aJYw8ROjPwB+O4puPU8ynKW3zh+CCC+Cv7Tts5qUhNdVg/AyE9J3GD5n
-----END PRIVATE KEY-----
"""
CERTIFICATE = """-----BEGIN CERTIFICATE-----
MIIBfjCCASSgAwIBAgIBATAKBggqhkjOPQQDAjAXMRUwEwYDVQQDDAxsY20tcnQg
dGVzdHMwIBcNMjAwMTAxMDAwMDAwWhgPMjEyMDAxMDEwMDAwMDBaMBcxFTATBgNV
BAMMDGxjbS1ydCB0ZXN0czBZMBMGByqGSM49AgEGCCqGSM49AwEHA0IABOnGkNQS
oP2UsgESaLh0byBKektFViVoljDxE6M/AH47im49TzKcpbfOH4IIL4K/tO2zmpSE
11WD8DIT0ncYPmejXzBdMCsGA1UdEQQkMCKCEHBpY3R1cmVzLmV4YW1wbGWCDmh1
Z2dpbmdmYWNlLmNvMA8GA1UdEwEB/wQFMAMBAf8wHQYDVR0OBBYEFP1doexwDyvp
VLLjS9/qzeXycaoDMAoGCCqGSM49BAMCA0gAMEUCIAJ+rSJfbM01NUV9OMDGcnrB
xoHZelwVxlInm+rcWExbAiEAkEkR/aOtPL0eUmn2+ta5kycyqF5SVcXoX8XLE1fU
N8Y=
-----END CERTIFICATE-----
"""

Serve = Callable[["Host", str, asyncio.StreamWriter], Awaitable[None]]


class Host:
    """A web server that does what ``serve`` does for a path; counts connections, keeps requests and the newest body."""

    def __init__(self, serve: Serve) -> None:
        self.serve = serve
        self.connections = 0
        self.requests: list[str] = []
        self.body = b""
        self.port = 0

    async def accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        try:
            head = (await reader.readuntil(b"\r\n\r\n")).decode()
            self.requests.append(head)
            if length := self.header("content-length"):
                self.body = await reader.readexactly(int(length))
            await self.serve(self, head.split()[1], writer)
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        finally:
            writer.transport.abort() if writer.transport.is_closing() else writer.close()

    def header(self, name: str) -> str | None:
        """What the newest request says of ``name``."""
        lines = (line.partition(": ") for line in self.requests[-1].splitlines()[1:])
        return next((value for key, _, value in lines if key.lower() == name), None)


@contextlib.asynccontextmanager
async def hosting(serve: Serve, tls: ssl.SSLContext | None = None) -> AsyncIterator[Host]:
    """A host at 127.0.0.1 until the block ends."""
    host = Host(serve)
    server = await asyncio.start_server(host.accept, "127.0.0.1", 0, ssl=tls)
    host.port = server.sockets[0].getsockname()[1]
    try:
        yield host
    finally:
        server.close()


async def answer(writer: asyncio.StreamWriter, body: bytes, status: str = "200 OK", *headers: str) -> None:
    lines = [f"HTTP/1.1 {status}", f"Content-Length: {len(body)}", *headers, "", ""]
    writer.write("\r\n".join(lines).encode() + body)
    await writer.drain()


async def redirect(writer: asyncio.StreamWriter, location: str) -> None:
    await answer(writer, b"", "302 Found", f"Location: {location}")


async def hello(host: Host, path: str, writer: asyncio.StreamWriter) -> None:
    await answer(writer, b"hello")


class Names:
    """A name server: each name has answers, used up one after the other; the last one stays.

    Numbers are read as the C library reads them, octal and all.
    """

    def __init__(self, **names: list[list[str]]) -> None:
        self.names = {name.replace("_", "."): answers for name, answers in names.items()}
        self.asked: list[str] = []

    async def __call__(self, host: str) -> list[str]:
        self.asked.append(host)
        if answers := self.names.get(host):
            return answers.pop(0) if len(answers) > 1 else answers[0]
        if ":" in host:
            return [socket.inet_ntop(socket.AF_INET6, socket.inet_pton(socket.AF_INET6, host))]
        return [socket.inet_ntoa(socket.inet_aton(host))]


class Dialer(httpcore2.AnyIOBackend):
    """The internet: every address leads to a port of this machine; keeps what was dialled. ``dead`` ones refuse."""

    def __init__(self, port: int, dead: tuple[str, ...] = ()) -> None:
        self.port = port
        self.dead = dead
        self.dialled: list[str] = []

    async def connect_tcp(self, host: str, port: int, *rest: Any, **more: Any) -> httpcore2.AsyncNetworkStream:
        self.dialled.append(host)
        if host in self.dead:
            raise httpcore2.ConnectError("refused")
        return await super().connect_tcp("127.0.0.1", self.port, *rest, **more)


def trust() -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.load_verify_locations(cadata=CERTIFICATE)
    return context


def identity(folder: Path) -> ssl.SSLContext:
    """What a host of pictures.example or huggingface.co shows."""
    (folder / "identity.pem").write_text(KEY + CERTIFICATE)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(folder / "identity.pem")
    return context


def make(host: Host, *, names: Names | None = None, **options: Any) -> tuple[Egress, Dialer]:
    """A client in a world where pictures.example is public, and any address is ``host``."""
    dialer = Dialer(host.port, options.pop("dead", ()))
    names = names or Names(pictures_example=[[PUBLIC]])
    return Egress(resolve=names, network=dialer, ssl_context=trust(), **options), dialer


async def fetch(client: Egress, url: str, **limits: Any) -> bytes:
    return await client.fetch("image_url", url, **{"limit_bytes": 1000, "timeout_s": 20, **limits})


CLIENT = make(Host(hello))[0]

TARGETS = [
    # loopback, in all its spellings
    "http://127.0.0.1/",
    "http://127.0.0.1:80/",
    "https://127.0.0.1:443/",
    "http://127.1/",
    "http://127.0.1/",
    "http://127.255.255.254/",
    "http://2130706433/",
    "http://0x7f000001/",
    "http://0x7f.1/",
    "http://0x7F.0x0.0x0.0x1/",
    "http://0177.0.0.1/",
    "http://017700000001/",
    "http://00000177.0.0.1/",
    "http://0/",
    "http://0.0.0.0/",
    "http://localhost/",
    "http://LOCALHOST/",
    "http://localhost./",
    "http://localtest.me/",
    "http://[::1]/",
    "http://[0:0:0:0:0:0:0:1]/",
    "http://[::]/",
    "http://[::127.0.0.1]/",
    "http://[::ffff:127.0.0.1]/",
    "http://[::ffff:7f00:1]/",
    "http://[::ffff:0:127.0.0.1]/",
    # private networks, link-local, clouds' metadata
    "http://10.0.0.1/",
    "http://172.16.0.1/",
    "http://172.31.255.255/",
    "http://192.168.1.1/",
    "http://100.64.0.1/",
    "http://100.100.100.200/",
    "http://169.254.169.254/latest/meta-data/",
    "http://2852039166/",
    "http://0xa9fea9fe/",
    "http://0251.0376.0251.0376/",
    "http://[::ffff:169.254.169.254]/",
    "http://[fd00:ec2::254]/",
    "http://[fe80::1]/",
    "http://[fc00::1]/",
    "http://[fec0::1]/",
    "http://metadata.google.internal/",
    "http://168.63.129.16.internal/",
    # roads to v4 in v6 clothes
    "http://[64:ff9b::a9fe:a9fe]/",
    "http://[64:ff9b:1::7f00:1]/",
    "http://[2002:7f00:1::]/",
    "http://[2001:0:7f00:1::]/",
    "http://[2001:db8::1]/",
    "http://[3fff::1]/",
    "http://[100::1]/",
    # no single host
    "http://224.0.0.1/",
    "http://239.255.255.250/",
    "http://255.255.255.255/",
    "http://240.0.0.1/",
    "http://192.0.0.9/",
    "http://192.0.2.1/",
    "http://192.88.99.1/",
    "http://198.18.0.1/",
    "http://198.51.100.1/",
    "http://203.0.113.1/",
    "http://[ff02::1]/",
    "http://[ff0e::1]/",
    # a name with mixed answers, a name without any
    "http://mixed.example/",
    "http://mixed6.example/",
    "http://nobody.example/",
]

SPELLINGS = [
    "http://user@pictures.example/",
    "http://user:word@pictures.example/",
    "http://pictures.example@127.0.0.1/",
    "http://pictures.example\\@127.0.0.1/",
    "http://127.0.0.1\\@pictures.example/",
    "http://pictures.example#@127.0.0.1/",
    "http://pictures.example%40127.0.0.1/",
    "http://pictures.example%2f@127.0.0.1/",
    "http:\\\\127.0.0.1/",
    "http://pictures.example/\\..",
    "http:/127.0.0.1/",
    "http:127.0.0.1",
    "http:///127.0.0.1/",
    "http://pictures.example\t/",
    "http://pictures.example/\r\nX: y",
    "http://pictures.example/a b",
    "http://pictures.example/\x00",
    "\thttp://pictures.example/",
    " http://pictures.example/",
    "http://pictures.example/\x7f",
    "http://①②⑦.⓪.⓪.①/",
    "http://127。0。0。1/",
    "http://127.0.0.1/",
    "http://١٢٧.0.0.1/",
    "http://loc\u00adalhost/",
    "http://pictures.example:22/",
    "http://pictures.example:6379/",
    "http://pictures.example:8080/",
    "http://pictures.example:99999/",
    "http://pictures.example:８０/",
    "http://pictures.example:-80/",
    "http://pictures.example:/",
    "http://pictures.example:80:80/",
    "http://[::1/",
    "http://[::1%25lo]/",
    "http://[fe80::1%eth0]/",
    "http://[v1.x]/",
    "http://1.2.3.4.5.6.7.8:/",
    "http://256.256.256.256/",
    "http:///",
    "http://",
    "https:",
    "",
    "//pictures.example/",
    "/etc/passwd",
    "file:///etc/passwd",
    "file://pictures.example/etc/passwd",
    "gopher://pictures.example/",
    "ftp://pictures.example/",
    "ws://pictures.example/",
    "dict://pictures.example:80/",
    "javascript:alert(1)",
    "http+unix://pictures.example/",
    "http://pictures.example/\ud800",
    "http://pictures.example/" + "a" * MAX_URL,
]


def odd_names() -> Names:
    names = Names(
        localhost=[["127.0.0.1"]],
        localtest_me=[["127.0.0.1"]],
        metadata_google_internal=[["169.254.169.254"]],
        pictures_example=[[PUBLIC]],
        mixed_example=[[PUBLIC, "10.0.0.1"]],
        mixed6_example=[[ALSO_PUBLIC, "::1"]],
    )
    names.names["localhost."] = names.names["localhost"]
    return names


@run
async def test_no_private_target_is_touched_and_all_refusals_look_alike() -> None:
    assert len(TARGETS) + len(SPELLINGS) > 60
    names = odd_names()
    async with hosting(hello) as host:
        client, dialer = make(host, names=names)
        for url in TARGETS + SPELLINGS:
            names.asked.clear()
            with pytest.raises(DownloadError) as caught:
                await fetch(client, url)
            assert url in TARGETS or not names.asked, url  # what is no proper URL is not even looked up
            assert (caught.value.field, caught.value.message) == ("image_url", REFUSED), url
            assert (dialer.dialled, host.connections) == ([], 0), url
        assert await fetch(client, "http://pictures.example/") == b"hello"
        assert dialer.dialled == [PUBLIC]


def test_a_refusal_survives_the_road_between_the_processes() -> None:
    error = from_wire(to_wire(DownloadError("mask_url", REFUSED)))
    assert isinstance(error, DownloadError)
    assert (error.field, error.message, error.status, error.code) == ("mask_url", REFUSED, 422, "file_download_error")
    assert error.detail()[0]["type"] == "file_download_error"


@given(st.text(st.sampled_from("htps:/\\\\@#?[]%.:80 a1\t\x00é①") | st.characters(), max_size=40), st.booleans())
def test_any_text_is_a_url_or_refused(text: str, prefixed: bool) -> None:
    url = "http://" + text if prefixed else text
    try:
        admitted = CLIENT._admit("image_url", url)
    except DownloadError:
        return
    assert admitted.raw_host and not admitted.userinfo
    assert httpx2.URL(str(admitted)) == admitted
    host = url[len(admitted.scheme) + 3 :].lower().lstrip("[")
    assert host.startswith(admitted.raw_host.decode("ascii"))  # what is dialled is what stands there


@pytest.mark.parametrize("address", [PUBLIC, ALSO_PUBLIC, "1.1.1.1", "::ffff:8.8.8.8", "172.32.0.1", "100.128.0.1"])
def test_public_addresses_are_public(address: str) -> None:
    assert is_public(address)


@run
async def test_the_address_that_was_judged_is_the_one_that_is_dialled() -> None:
    names = Names(rebind_example=[[PUBLIC], ["127.0.0.1"]])
    async with hosting(hello) as host:
        client, dialer = make(host, names=names)
        assert await fetch(client, "http://rebind.example/") == b"hello"
        assert (dialer.dialled, names.asked) == ([PUBLIC], ["rebind.example"])
        for _ in range(50):  # and no connection is kept for a second request, which is judged by its own answer
            with pytest.raises(DownloadError):
                await fetch(client, "http://rebind.example/")
        assert (dialer.dialled, host.connections) == ([PUBLIC], 1)


@pytest.mark.parametrize(
    "location",
    [
        "http://127.0.0.1/",
        "//10.0.0.1/",
        "http://inside.example/",
        "http://pictures.example:22/",
        "http://user@pictures.example/",
        "http://pictures.example\\@127.0.0.1/",
        "/\\127.0.0.1/",
        "\\\\127.0.0.1",
        "file:///etc/passwd",
        "gopher://pictures.example/",
        "data:,x",
        "http://①②⑦.⓪.⓪.①/",
    ],
)
def test_a_redirect_is_judged_like_any_url(location: str) -> None:
    @run
    async def walk() -> None:
        async def serve(host: Host, path: str, writer: asyncio.StreamWriter) -> None:
            await redirect(writer, location)

        names = Names(pictures_example=[[PUBLIC]], inside_example=[["192.168.0.1"]])
        async with hosting(serve) as host:
            client, dialer = make(host, names=names)
            with pytest.raises(DownloadError, match=REFUSED):
                await fetch(client, "http://pictures.example/")
            assert (dialer.dialled, host.connections) == ([PUBLIC], 1)

    walk()


@run
async def test_three_redirects_are_followed_and_no_more() -> None:
    async def serve(host: Host, path: str, writer: asyncio.StreamWriter) -> None:
        left = int(path.rsplit("/", 1)[1])
        await (redirect(writer, f"../a/{left - 1}?x=%2F") if left else answer(writer, b"here"))

    async def serve_query(host: Host, path: str, writer: asyncio.StreamWriter) -> None:
        await serve(host, path.partition("?")[0], writer)

    async with hosting(serve_query) as host:
        client, _ = make(host)
        assert await fetch(client, "http://pictures.example/a/3") == b"here"
        assert host.requests[-1].startswith("GET /a/0?x=%2F HTTP/1.1")
        with pytest.raises(DownloadError, match="redirected more than 3 times"):
            await fetch(client, "http://pictures.example/a/4")
        assert host.connections == 8


@run
async def test_tls_is_for_the_name_while_the_connection_is_to_the_address(tmp_path: Path) -> None:
    async def serve(host: Host, path: str, writer: asyncio.StreamWriter) -> None:
        if path == "/down":
            return await redirect(writer, "http://pictures.example/")
        await answer(writer, b"secret")

    names = Names(pictures_example=[[PUBLIC]], other_example=[[PUBLIC]])
    async with hosting(serve, await asyncio.to_thread(identity, tmp_path)) as host:
        client, dialer = make(host, names=names)
        assert await fetch(client, "https://pictures.example/x?y=ü#z") == b"secret"
        assert host.requests[-1].startswith("GET /x?y=%C3%BC HTTP/1.1")
        assert host.header("host") == "pictures.example"
        assert host.header("accept-encoding") == "identity"
        assert host.header("cookie") is None
        asked = len(host.requests)
        with pytest.raises(DownloadError, match="broke off"):  # a certificate of another name
            await fetch(client, "https://other.example/")
        with pytest.raises(DownloadError, match="broke off"):
            await fetch(client, f"https://{PUBLIC}/")
        assert len(host.requests) == asked
        with pytest.raises(DownloadError, match=REFUSED):  # no way down from https
            await fetch(client, "https://pictures.example/down")
        assert len(host.requests) == asked + 1
        assert set(dialer.dialled) == {PUBLIC}


@run
async def test_the_next_address_is_tried_where_one_is_dead() -> None:
    async with hosting(hello) as host:
        client, dialer = make(host, names=Names(pictures_example=[[ALSO_PUBLIC, PUBLIC]]), dead=(ALSO_PUBLIC,))
        assert await fetch(client, "http://pictures.example/") == b"hello"
        assert dialer.dialled == [ALSO_PUBLIC, PUBLIC]
        client, _ = make(host, dead=(PUBLIC,))
        with pytest.raises(DownloadError, match="broke off"):
            await fetch(client, "http://pictures.example/")


async def drip(host: Host, path: str, writer: asyncio.StreamWriter) -> None:
    writer.write(b"HTTP/1.1 200 OK\r\n\r\n")
    while True:
        writer.write(b"x")
        await writer.drain()
        await asyncio.sleep(0.02)


async def drip_headers(host: Host, path: str, writer: asyncio.StreamWriter) -> None:
    writer.write(b"HTTP/1.1 200 OK\r\n")
    while True:
        writer.write(b"X: y\r\n")
        await writer.drain()
        await asyncio.sleep(0.02)


async def silence(host: Host, path: str, writer: asyncio.StreamWriter) -> None:
    await asyncio.sleep(60)


async def endless(host: Host, path: str, writer: asyncio.StreamWriter) -> None:
    writer.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
    while True:
        writer.write(b"400\r\n" + b"x" * 1024 + b"\r\n")
        await writer.drain()


async def endless_headers(host: Host, path: str, writer: asyncio.StreamWriter) -> None:
    writer.write(b"HTTP/1.1 200 OK\r\n")
    while True:
        writer.write(b"X: " + b"y" * 1024 + b"\r\n")
        await writer.drain()


async def boast(host: Host, path: str, writer: asyncio.StreamWriter) -> None:
    writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 9999999999\r\n\r\n")
    await asyncio.sleep(60)


async def too_short(host: Host, path: str, writer: asyncio.StreamWriter) -> None:
    writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\nhello")
    writer.write_eof()


async def garbage(host: Host, path: str, writer: asyncio.StreamWriter) -> None:
    writer.write(b"\x00\xffSSH-2.0-OpenSSH\r\n\r\n")


async def two_lengths(host: Host, path: str, writer: asyncio.StreamWriter) -> None:
    writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\nhello!")


async def odd_length(host: Host, path: str, writer: asyncio.StreamWriter) -> None:
    writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: -5\r\n\r\nhello")


async def slam(host: Host, path: str, writer: asyncio.StreamWriter) -> None:
    writer.transport.abort()


async def upgrade(host: Host, path: str, writer: asyncio.StreamWriter) -> None:
    writer.write(b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: x\r\nConnection: upgrade\r\n\r\nhello")


async def missing(host: Host, path: str, writer: asyncio.StreamWriter) -> None:
    await answer(writer, b"no", "404 Not Found")


async def partial(host: Host, path: str, writer: asyncio.StreamWriter) -> None:
    await answer(writer, b"he", "206 Partial Content")


@pytest.mark.parametrize(
    ("serve", "text"),
    [
        (drip, "too long"),
        (drip_headers, "too long"),
        (silence, "too long"),
        (endless, "larger than 1,000 bytes"),
        (endless_headers, "broke off"),
        (boast, "larger than 1,000 bytes"),
        (too_short, "broke off"),
        (garbage, "broke off"),
        (two_lengths, "broke off"),
        (odd_length, "broke off"),
        (slam, "broke off"),
        (upgrade, "broke off"),
        (missing, "answered 404"),
        (partial, "answered 206"),
    ],
)
def test_no_host_holds_us_up_or_fills_us(serve: Serve, text: str, tmp_path: Path) -> None:
    @run
    async def walk() -> None:
        async with hosting(serve) as host:
            client, _ = make(host, fetch_private=True)
            timeout_s = 0.3 if text == "too long" else 30  # a busy machine is no slow host
            with pytest.raises(DownloadError, match=text):
                await fetch(client, "http://pictures.example/", timeout_s=timeout_s)
            with pytest.raises(DownloadError, match=text):
                await client.download(
                    "lora_url", "http://pictures.example/", tmp_path / "x", limit_bytes=1000, timeout_s=timeout_s
                )
            assert not await asyncio.to_thread(lambda: list(tmp_path.iterdir()))
            assert not client._pool.connections

    walk()


@run
async def test_the_deadline_covers_names_and_silence_has_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    async def resolve(host: str) -> list[str]:
        await asyncio.sleep(60)
        return [PUBLIC]

    client = Egress(resolve=resolve, ssl_context=trust())
    with pytest.raises(DownloadError, match="too long"):
        await fetch(client, "http://pictures.example/", timeout_s=0.05)
    monkeypatch.setattr(egress_module, "_SILENCE_S", 0.05)
    async with hosting(silence) as host:
        client, _ = make(host)
        with pytest.raises(DownloadError, match="too long"):
            await fetch(client, "http://pictures.example/")


@run
async def test_compressed_bytes_are_not_blown_up() -> None:
    async def serve(host: Host, path: str, writer: asyncio.StreamWriter) -> None:
        await answer(writer, b"\x1f\x8bbomb", "200 OK", "Content-Encoding: gzip")

    async with hosting(serve) as host:
        client, _ = make(host)
        assert await fetch(client, "http://pictures.example/") == b"\x1f\x8bbomb"


@run
async def test_proxies_of_the_environment_are_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    async with hosting(hello) as proxy, hosting(hello) as host:
        for name in ("http_proxy", "HTTP_PROXY", "https_proxy", "ALL_PROXY"):
            monkeypatch.setenv(name, f"http://127.0.0.1:{proxy.port}")
        client, _ = make(host)
        assert await fetch(client, "http://pictures.example/") == b"hello"
        assert proxy.connections == 0


@run
async def test_a_hundred_at_once() -> None:
    async def serve(host: Host, path: str, writer: asyncio.StreamWriter) -> None:
        await answer(writer, path.encode())

    async with hosting(serve) as host:
        client, _ = make(host)
        got = await asyncio.gather(*(fetch(client, f"http://pictures.example/{n}") for n in range(100)))
        assert got == [f"/{n}".encode() for n in range(100)]
        assert not client._pool.connections


@run
async def test_an_operator_may_open_the_own_network() -> None:
    async with hosting(hello) as host:
        url = f"http://localhost:{host.port}/"
        open_client = await asyncio.to_thread(lambda: Egress(fetch_private=True))
        assert await fetch(open_client, url) == b"hello"
        assert host.header("host") == f"localhost:{host.port}"
        for bad in SPELLINGS[:20]:  # what is no URL is none for anyone
            with pytest.raises(DownloadError, match=REFUSED):
                await fetch(open_client, bad)
        strict = await asyncio.to_thread(Egress)
        for url in ("http://localhost/", "http://127.1/", "http://" + "a" * 70 + ".example/"):
            with pytest.raises(DownloadError, match=REFUSED):
                await fetch(strict, url)
        assert host.connections == 1


@run
async def test_a_refused_host_is_in_the_log(caplog: pytest.LogCaptureFixture) -> None:
    async with hosting(hello) as host:
        client, _ = make(host)
        with caplog.at_level(logging.INFO, "lcm_rt.egress"), pytest.raises(DownloadError):
            await fetch(client, "http://192.168.1.1/token")
    assert "192.168.1.1" in caplog.text
    assert "token" not in caplog.text


BIG = bytes(range(256)) * 12_000


@run
async def test_a_download_is_the_file_and_its_hash(tmp_path: Path) -> None:
    async def serve(host: Host, path: str, writer: asyncio.StreamWriter) -> None:
        await answer(writer, b"" if path == "/empty" else BIG)

    limits = {"limit_bytes": len(BIG), "timeout_s": 20}
    async with hosting(serve, await asyncio.to_thread(identity, tmp_path)) as host:
        client, dialer = make(host)
        path = tmp_path / "big"
        sha256 = await client.download("lora_url", "https://pictures.example/", path, **limits)
        assert sha256 == hashlib.sha256(BIG).hexdigest()
        assert await asyncio.to_thread(path.read_bytes) == BIG
        assert (
            await client.download("lora_url", "https://pictures.example/empty", tmp_path / "empty", **limits)
            == hashlib.sha256().hexdigest()
        )
        dialled = len(dialer.dialled)
        with pytest.raises(DownloadError, match=f"lora_url: {REFUSED}"):  # what is kept must be its host's
            await client.download("lora_url", "http://pictures.example/", tmp_path / "x", **limits)
        assert len(dialer.dialled) == dialled
        with pytest.raises(Unavailable):
            await client.download("lora_url", "https://pictures.example/", tmp_path / "no" / "x", **limits)
        with pytest.raises(Unavailable):  # a file that is there is not touched
            await client.download("lora_url", "https://pictures.example/", path, **limits)
        assert await asyncio.to_thread(path.read_bytes) == BIG


@pytest.mark.parametrize("how", ["cancel", "break", "deadline", "limit"])
def test_nothing_is_left_of_half_a_download(how: str, tmp_path: Path) -> None:
    @run
    async def walk() -> None:
        async def serve(host: Host, path: str, writer: asyncio.StreamWriter) -> None:
            writer.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n%x\r\n" % len(BIG) + BIG + b"\r\n")
            await until(path_there)
            if how == "limit":
                writer.write(b"%x\r\n" % len(BIG) + BIG + b"\r\n")
            if how != "break":
                await asyncio.sleep(60)

        path = tmp_path / "half"

        def path_there() -> bool:
            return path.exists()

        async with hosting(serve) as host:
            client, _ = make(host, fetch_private=True)
            limits = {"limit_bytes": len(BIG) + 1, "timeout_s": 0.5 if how == "deadline" else 20}
            task = asyncio.create_task(client.download("lora_url", "http://pictures.example/", path, **limits))
            await until(path_there)
            if how == "cancel":
                task.cancel()
            with pytest.raises(asyncio.CancelledError if how == "cancel" else DownloadError):
                await task
            assert not path.exists()

    walk()


async def post(client: Egress, url: str, body: bytes = b"{}", **options: Any) -> tuple[int, dict[str, str]]:
    headers = options.pop("headers", {"content-type": "application/json"})
    return await client.post("fal_webhook", url, body, headers, **{"limit_bytes": 1000, "timeout_s": 20, **options})


@run
async def test_a_post_carries_its_body_and_headers_and_tells_the_answer() -> None:
    async def serve(host: Host, path: str, writer: asyncio.StreamWriter) -> None:
        await answer(writer, b"later", "429 Too Many", "Retry-After: 7")

    body = bytes(range(256)) * 4000
    async with hosting(serve) as host:
        client, dialer = make(host)
        status, headers = await post(client, "http://pictures.example/hook?x=1", body, headers={"X-Mine": "yes"})
        assert (status, headers["retry-after"], host.body == body, dialer.dialled) == (429, "7", True, [PUBLIC])
        first, *lines = host.requests[0].split("\r\n")
        assert first == "POST /hook?x=1 HTTP/1.1"
        names = {line.partition(":")[0].lower() for line in lines if line}
        assert names == {"host", "accept", "accept-encoding", "user-agent", "content-length", "x-mine"}
        assert not client._pool.connections


@run
async def test_no_post_goes_to_a_private_target_by_whatever_road() -> None:
    async def serve(host: Host, path: str, writer: asyncio.StreamWriter) -> None:
        await redirect(writer, "http://127.0.0.1/")

    names = odd_names()
    async with hosting(serve) as host:
        client, dialer = make(host, names=names)
        for url in TARGETS + SPELLINGS:
            with pytest.raises(DownloadError) as caught:
                await post(client, url)
            assert (caught.value.field, caught.value.message) == ("fal_webhook", REFUSED), url
        assert (dialer.dialled, host.connections) == ([], 0)
        assert (await post(client, "http://pictures.example/"))[0] == 302  # and the redirect is not followed
        assert (dialer.dialled, host.connections) == ([PUBLIC], 1)


def test_a_check_asks_nobody() -> None:
    names = odd_names()
    client = Egress(resolve=names, ssl_context=trust())
    by_name = {"localtest.me", "metadata.google.internal", "168.63.129.16.internal", "nobody.example"}
    passed = set()
    for url in TARGETS + SPELLINGS:
        with contextlib.suppress(DownloadError):
            client.check("fal_webhook", url)
            passed.add(url.split("/")[2])
    assert passed == by_name | {"mixed.example", "mixed6.example"}  # which are judged once they have an address
    for url in ("https://pictures.example/x?y=%20", "http://93.184.216.34/", f"https://[{ALSO_PUBLIC}]:443/"):
        client.check("fal_webhook", url)
    assert not names.asked
    open_client = Egress(resolve=names, ssl_context=trust(), fetch_private=True)
    open_client.check("fal_webhook", "http://localhost:8080/")
    with pytest.raises(DownloadError, match=f"fal_webhook: {REFUSED}"):
        open_client.check("fal_webhook", "file:///etc/passwd")


@given(st.text(st.sampled_from("htps:/\\@#?[]%.:80 a1x\t\x00é①-") | st.characters(), max_size=40))
def test_any_text_is_checked(text: str) -> None:
    for url in (text, "http://" + text):
        with contextlib.suppress(DownloadError):
            CLIENT.check("fal_webhook", url)


@pytest.mark.parametrize(
    ("serve", "expected"),
    [
        (drip, "too long"),
        (drip_headers, "too long"),
        (silence, "too long"),
        (endless, 200),  # cut at the limit
        (endless_headers, "broke off"),
        (boast, "too long"),
        (too_short, "broke off"),
        (garbage, "broke off"),
        (two_lengths, "broke off"),
        (odd_length, "broke off"),
        (slam, "broke off"),
        (missing, 404),
    ],
)
def test_no_host_holds_a_post_up(serve: Serve, expected: str | int) -> None:
    @run
    async def walk() -> None:
        async with hosting(serve) as host:
            client, _ = make(host)
            try:
                timeout_s = 0.3 if expected == "too long" else 30  # a busy machine is no slow host
                assert (await post(client, "http://pictures.example/", bytes(2**20), timeout_s=timeout_s))[
                    0
                ] == expected
            except DownloadError as error:
                assert isinstance(expected, str) and expected in error.message
            assert not client._pool.connections

    walk()


@run
async def test_a_name_that_is_being_looked_up_is_not_looked_up_again(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    may_answer = threading.Event()

    def look_up(host: str, *rest: Any, **more: Any) -> list[Any]:
        asked.append(host)
        if host == "dead.example":
            may_answer.wait(20)
            raise socket.gaierror("no answer")
        return [(0, 0, 0, "", (PUBLIC, 0))]

    monkeypatch.setattr(egress_module.socket, "getaddrinfo", look_up)
    async with hosting(hello) as host:
        dialer = Dialer(host.port)
        client = Egress(network=dialer, ssl_context=trust())
        for _ in range(100):  # more than there are threads
            with pytest.raises(DownloadError, match="too long"):
                await fetch(client, "http://dead.example/", timeout_s=0.001)
        assert await fetch(client, "http://pictures.example/") == b"hello"
        may_answer.set()
        with pytest.raises(DownloadError, match=REFUSED):
            await fetch(client, "http://dead.example/")
        assert await fetch(client, "http://pictures.example/") == b"hello"
    assert asked.count("pictures.example") == 2  # an answer is not kept
    assert asked.count("dead.example") <= 2

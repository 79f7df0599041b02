"""Uploads and files over HTTP, as the platform's clients speak it."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from datetime import datetime, timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import urlsplit

import fal_client
import fal_client.client as fal_module
import httpx2 as httpx
import pytest
import uvicorn
from serving import run, until
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.routing import Route
from test_files import TITLES, Filing, filing, storage  # noqa: F401

from lcm_rt.auth import MAX_TRIES, Auth
from lcm_rt.errors import LcmError
from lcm_rt.objects import BLOCK
from lcm_rt.server import app, replies
from lcm_rt.server import storage as handlers
from lcm_rt.server.addressing import Addressing
from lcm_rt.server.guard import guarded
from lcm_rt.server.serve import listen

ROUTES = [entry for entry in app.ROUTES if entry.handler.__module__ == handlers.__name__]
SVG = b'<svg xmlns="http://www.w3.org/2000/svg"><script>alert(1)</script></svg>'


class Place(Filing):
    """Files behind a server, and a client of it."""

    auth: Auth
    http: httpx.AsyncClient
    port: int

    async def key(self, owner: str) -> dict[str, str]:
        return {"authorization": f"Key {await self.auth.create_key(owner)}"}

    async def initiate(self, told: Any, *, multipart: bool = False, **headers: str) -> tuple[str, str]:
        path = "/rest/storage/upload/initiate" + ("-multipart" if multipart else "")
        answer = await self.http.post(path, json=told, headers=headers)
        assert answer.status_code == 200, answer.text
        return answer.json()["upload_url"], answer.json()["file_url"]

    async def put(self, data: bytes, name: str = "a.bin", content_type: str = "video/mp4", **headers: str) -> str:
        """Upload as the JavaScript clients do; the file's URL."""
        to, url = await self.initiate({"content_type": content_type, "file_name": name}, **headers)
        answer = await self.http.put(to, content=data)
        assert answer.status_code == 200, answer.text
        return url


@asynccontextmanager
async def serving_files(folder: Path, *, is_open: bool = True, **options: Any) -> AsyncIterator[Place]:
    async with filing(folder, **options) as it:
        it.__class__ = Place
        assert isinstance(it, Place)
        it.auth = Auth(it.store, is_open=is_open, clock=it.clock)
        await it.auth.start()
        server_app = Starlette(
            routes=[
                Route(entry.path, guarded(entry.handler, entry.need), methods=entry.methods.split()) for entry in ROUTES
            ],
            middleware=[Middleware(Addressing)],
            exception_handlers={
                LcmError: replies.on_error,
                HTTPException: replies.on_refusal,
                Exception: replies.on_crash,
            },
        )
        state = server_app.state
        state.service, state.files, state.auth = SimpleNamespace(metrics=it.metrics), it.files, it.auth
        state.bodies = replies.Bodies()
        end = await asyncio.to_thread(listen, "127.0.0.1", 0)
        server = uvicorn.Server(uvicorn.Config(server_app, log_config=None, lifespan="off"))
        running = asyncio.create_task(server._serve([end]))
        await until(lambda: server.started)
        it.port = end.getsockname()[1]
        try:
            async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{it.port}", verify=False, timeout=30) as it.http:
                yield it
        finally:
            server.should_exit = True
            await running
            end.close()


def refused(answer: httpx.Response, status: int, code: str) -> None:
    """Every error is JSON that all the clients understand."""
    assert (answer.status_code, answer.headers["x-fal-error-type"]) == (status, code), answer.text
    assert answer.json()["detail"] and answer.json()["message"]


# ---- the JavaScript clients' way -------------------------------------------------------------------------------------


@pytest.mark.points(59)
@pytest.mark.parametrize("query", ["", "?storage_type=fal-cdn-v3", "?storage_type=gcs"])
def test_a_file_is_put_where_initiate_says(tmp_path: Path, storage: str, query: str) -> None:  # noqa: F811
    @run
    async def walk() -> None:
        async with serving_files(tmp_path, storage=storage) as it:
            told = {"content_type": "image/png", "file_name": "a b.png"}
            answer = await it.http.post(f"/rest/storage/upload/initiate{query}", json=told)
            to, url = answer.json()["upload_url"], answer.json()["file_url"]
            assert (await it.http.get(url)).status_code == 404
            sent = await it.http.put(
                to, content=b"png", headers={"content-type": "image/png", "authorization": "Key x:y"}
            )
            assert sent.status_code == 200
            got = await it.http.get(url)
            assert (got.content, got.headers["content-type"]) == (b"png", "image/png")
            assert got.headers["content-disposition"] == "inline; filename*=UTF-8''a%20b.png"
            assert url.startswith(f"http://127.0.0.1:{it.port}/files/") and url.endswith(".png")
            assert (await it.http.get(url.replace("/files/", "/cdn/files/"))).content == b"png"
            assert await it.files.read("image_url", url) == b"png"

    walk()


@pytest.mark.points(59, 62)
@run
async def test_urls_lie_where_the_client_reached_us(tmp_path: Path) -> None:
    async with serving_files(tmp_path) as it:
        told = {"content_type": "image/png", "file_name": "x.png"}
        at_home = await it.http.post("/storage/upload/initiate", json=told, headers={"host": "rest.alpha.fal.ai"})
        to, url = at_home.json()["upload_url"], at_home.json()["file_url"]
        assert to.startswith("http://v3.fal.media/upload/") and url.startswith("http://v3.fal.media/files/")
        path = to.removeprefix("http://v3.fal.media")
        assert (await it.http.put(path, content=b"x", headers={"host": "v3.fal.media"})).status_code == 200
        got = await it.http.get(urlsplit(url).path, headers={"host": "v3.fal.media"})
        assert got.content == b"x"
        assert await it.files.read("image_url", url) == b"x"
        proxied = await it.http.post(
            "/api/fal/proxy",
            json=told,
            headers={"x-fal-target-url": "https://rest.fal.ai/storage/upload/initiate?storage_type=fal-cdn-v3"},
        )
        assert proxied.json()["upload_url"].startswith(f"http://127.0.0.1:{it.port}/upload/")


@pytest.mark.points(60)
@run
async def test_parts_are_put_below_the_upload_url(tmp_path: Path, storage: str) -> None:  # noqa: F811
    async with serving_files(tmp_path, storage=storage) as it:
        told = {"content_type": "video/mp4", "file_name": "a b.mp4"}
        to, url = await it.initiate(told, multipart=True)
        base, _, search = to.partition("?")
        parts = []
        for number, data in enumerate((b"a" * BLOCK, b"b" * (BLOCK + 1), b"c"), 1):
            answer = await it.http.put(f"{base}/{number}?{search}", content=data)
            assert answer.headers["content-type"] == "application/json"
            assert answer.json() == {"partNumber": number, "etag": answer.headers["etag"]}
            parts.append(answer.json())
        for _ in range(2):
            answer = await it.http.post(f"{base}/complete?{search}", json={"parts": parts})
            assert answer.status_code == 200, answer.text
        got = await it.http.get(url)
        assert got.content == b"a" * BLOCK + b"b" * (BLOCK + 1) + b"c"
        assert got.headers["content-type"] == "video/mp4"
        refused(await it.http.put(f"{base}/1?{search}", content=b"late"), 400, "bad_request")
        refused(await it.http.put(to, content=b"late"), 400, "bad_request")


@run
async def test_ten_thousand_parts_can_be_listed(tmp_path: Path) -> None:
    async with serving_files(tmp_path) as it:
        to, _ = await it.initiate({}, multipart=True)
        listed = [{"partNumber": n, "etag": '"' + "a" * 32 + '"'} for n in range(1, 10_001)]
        answer = await it.http.post(to.replace("?", "/complete?"), json={"parts": listed})
        refused(answer, 422, "invalid_input")
        assert "part 1 is not here" in answer.text


@run
async def test_what_is_malformed_is_a_typed_error(tmp_path: Path) -> None:
    async with serving_files(tmp_path) as it:
        for junk in (b"", b"{", b"[]", b"7", b"null", b"[" * 5000, b"\xff"):
            refused(await it.http.post("/rest/storage/upload/initiate", content=junk), 422, "invalid_input")
        refused(await it.http.post("/rest/storage/upload/initiate", content=b" " * 70_000), 422, "invalid_input")
        for odd in ({}, {"content_type": None, "file_name": 7}, {"content_type": ["a"], "file_name": {}, "x": 1}):
            await it.initiate(odd)
        to, url = await it.initiate({})
        complete = to.replace("?", "/complete?")
        for junk in (
            *(b"", b"{", b"[]", b"{}", b"null", b'{"parts": null}', b'{"parts": []}', b'{"parts": [7]}', b"[" * 5000),
            *(b'{"parts": [{}]}', b'{"parts": {"partNumber": 1}}', b'{"parts": [{"partNumber": "1", "etag": "x"}]}'),
            *(b'{"parts": [{"partNumber": 1.5, "etag": "x"}]}', b'{"parts": [{"partNumber": 1, "etag": null}]}'),
            *(b'{"parts": [{"partNumber": 1, "etag": "\\u0000"}]}', b'{"parts": "' + b"x" * 2**21 + b'"}'),
            b'{"parts": [{"partNumber": 99999999999999999999999, "etag": "a"}]}',
        ):
            refused(await it.http.post(complete, content=junk), 422, "invalid_input")
        for number in ("0", "10001", "999999999"):
            refused(await it.http.put(to.replace("?", f"/{number}?"), content=b"x"), 422, "invalid_input")
        for number in ("x", "-1", "1e3", "9" * 5000, "%00", "١", "1.5"):
            assert (await it.http.put(to.replace("?", f"/{number}?"), content=b"x")).status_code == 404
        path = urlsplit(to).path
        for query in (
            "",
            "?signature=",
            "?signature=" + "a" * 22,
            "?signature=%00",
            "?signature=" + "a" * 9999,
            "?x=1",
        ):
            refused(await it.http.put(path + query, content=b"x"), 404, "not_found")
            refused(await it.http.put(f"{path}/1{query}", content=b"x"), 404, "not_found")
            refused(await it.http.post(f"{path}/complete{query}", json={"parts": []}), 404, "not_found")
        assert (await it.http.get(url)).status_code == 404
        for name in ("x", "%00", "%2e%2e%2frows.db", "..%5crows.db", "a" * 300, "%ff", "'--", f"{'a' * 22}.png%00"):
            assert (await it.http.get(f"/files/{name}")).status_code == 404
            assert (await it.http.put(f"/upload/{name}?signature={'a' * 22}", content=b"x")).status_code == 404


async def raw(port: int, head: str, body: bytes, *, finish: bool = False) -> bytes:
    """Send a request by hand and hang up, or hear what comes back."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(head.replace("\n", "\r\n").encode() + b"\r\n\r\n" + body)
    await writer.drain()
    answer = await reader.read() if finish else b""
    writer.close()
    await writer.wait_closed()
    return answer


@run
async def test_a_client_that_lies_about_its_body_leaves_nothing(tmp_path: Path) -> None:
    async with serving_files(tmp_path) as it:
        to, url = await it.initiate({})
        target = urlsplit(to).path + "?" + urlsplit(to).query
        head = f"PUT {target} HTTP/1.1\nhost: x\nconnection: close\n"
        before = len(asyncio.all_tasks())
        await raw(it.port, head + "content-length: 9000000", b"x" * 2_000_000)
        await raw(it.port, head + "transfer-encoding: chunked", b"f4240\r\n" + b"x" * 1_000_000 + b"\r\n")
        await raw(it.port, head + "content-length: 10", b"x")
        await until(lambda: len(asyncio.all_tasks()) <= before)
        assert (await it.http.get(url)).status_code == 404
        assert await it.objects() == []
        answer = await raw(it.port, head + "content-length: 99999999999", b"", finish=True)
        assert b" 413 " in answer.splitlines()[0] and b"file_too_large" in answer
        answer = await raw(it.port, head + "content-length: 3", b"abcdef", finish=True)
        assert b" 200 " in answer.splitlines()[0]
        assert (await it.http.get(url)).content == b"abc"


@run
async def test_a_body_that_stops_is_not_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(handlers, "BODY_TIMEOUT_S", 0.05)
    async with serving_files(tmp_path) as it:
        to, _ = await it.initiate({})
        head = f"PUT {urlsplit(to).path}?{urlsplit(to).query} HTTP/1.1\nhost: x\nconnection: close\ncontent-length: 10"
        answer = await raw(it.port, head, b"x", finish=True)
        assert b" 408 " in answer.splitlines()[0] and b"body_timeout" in answer
        assert await it.objects() == []


@run
async def test_limits_are_told(tmp_path: Path) -> None:
    async with serving_files(tmp_path, upload_limit_bytes=BLOCK, upload_quota_bytes=3 * BLOCK) as it:
        to, _ = await it.initiate({})
        refused(await it.http.put(to, content=b"x" * (BLOCK + 1)), 413, "file_too_large")

        async def unknown() -> AsyncIterator[bytes]:
            for _ in range(5):
                yield b"x" * (BLOCK // 2)

        refused(await it.http.put(to, content=unknown()), 413, "file_too_large")
        refused(await it.http.put(to.replace("?", "/1?"), content=b"x" * (BLOCK + 1)), 413, "file_too_large")
        assert await it.objects() == []
        for _ in range(2):
            await it.put(b"x" * BLOCK)
        refused(await it.http.post("/cdn/files/upload", content=b"x" * BLOCK), 413, "file_too_large")


# ---- the Python client's way -----------------------------------------------------------------------------------------


@pytest.fixture
def fal(monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], fal_client.AsyncClient]:
    """The platform's own client, of a server."""

    def of(base: str, key: str) -> fal_client.AsyncClient:
        monkeypatch.setattr(fal_module, "REST_URL", f"{base}/rest")
        monkeypatch.setattr(fal_module, "CDN_URL", f"{base}/cdn")
        monkeypatch.setattr(fal_module, "MULTIPART_THRESHOLD", 1000)
        monkeypatch.setattr(fal_module, "MULTIPART_CHUNK_SIZE", 300)
        return fal_client.AsyncClient(key=key)

    return of


@pytest.mark.points(61, 62)
@pytest.mark.parametrize("is_open", [True, False])
def test_the_python_client_uploads_whole_and_in_parts(
    tmp_path: Path,
    storage: str,  # noqa: F811
    is_open: bool,
    fal: Callable[[str, str], fal_client.AsyncClient],
) -> None:
    @run
    async def walk() -> None:
        async with serving_files(tmp_path, storage=storage, is_open=is_open) as it:
            client = fal(str(it.http.base_url).rstrip("/"), await it.auth.create_key("alice"))
            url = await client.upload(b"whole", "text/plain", "hallo.txt")
            got = await it.http.get(url)
            assert (got.content, got.headers["content-type"]) == (b"whole", "text/plain")
            assert got.headers["content-disposition"] == "attachment; filename*=UTF-8''hallo.txt"
            large = bytes(range(256)) * 20
            url = await client.upload(large, "image/webp", "large.webp")
            got = await it.http.get(url)
            assert (got.content, got.headers["content-type"]) == (large, "image/webp")
            assert await it.files.read("image_url", url) == large
            fallback = await client.upload(b"old", "image/png", "x.png", repository="fal")
            assert (await it.http.get(fallback)).content == b"old"
            acl = fal_client.StorageACL(default="hide")
            private = fal_client.StorageSettings(expires_in=3600, initial_acl=acl)
            for data in (b"mine", large):
                url = await client.upload(data, "text/plain", "x.txt", lifecycle=private)
                assert (await it.http.get(url)).status_code == 404
                assert (await it.http.get(url, headers={"authorization": f"Key {client.key}"})).content == data
                it.clock.now += 3599
                assert (await it.http.get(url, headers={"authorization": f"Key {client.key}"})).status_code == 200
                it.clock.now += 1
                assert (await it.http.get(url, headers={"authorization": f"Key {client.key}"})).status_code == 404
            await (await client._client).aclose()  # which it does not do itself

    walk()


@pytest.mark.points(61)
@run
async def test_a_token_says_when_it_ends_in_the_oldest_pythons_words(tmp_path: Path) -> None:
    async with serving_files(tmp_path) as it:
        for path in ("/rest/storage/auth/token?storage_type=fal-cdn-v3", "/rest/storage/auth/token"):
            told = (await it.http.post(path, json={})).json()
            assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00", told["expires_at"])
            ends = datetime.fromisoformat(told["expires_at"])
            assert timedelta(minutes=50) < ends - datetime.now(ends.tzinfo) <= timedelta(hours=1)
            assert (told["token_type"], told["base_url"]) == ("Bearer", str(it.http.base_url).rstrip("/"))
            bearer = {"authorization": f"Bearer {told['token']}", "x-fal-file-name": "a.txt"}
            url = (await it.http.post("/files/upload", content=b"x", headers=bearer)).json()["access_url"]
            assert (await it.http.get(url)).content == b"x"


@run
async def test_nobody_writes_to_the_file_server_without_a_key(tmp_path: Path) -> None:
    async with serving_files(tmp_path, is_open=False) as it:
        alice, bob = await it.key("alice"), await it.key("bob")
        token = (await it.http.post("/rest/storage/auth/token", headers=alice)).json()["token"]
        bearer = {"authorization": f"Bearer {token}"}
        admin = {"authorization": f"Key {await it.auth.create_key('root', ['admin'])}"}
        wrong = {"authorization": "Key " + "0" * 16 + ":x"}
        for path in (
            "/rest/storage/upload/initiate",
            "/rest/storage/auth/token",
            "/files/upload",
            "/files/upload/multipart",
        ):
            for nobody in ({}, wrong, {"authorization": "Bearer x"}, {"authorization": "Bearer " + token[:-2]}):
                refused(await it.http.post(path, json={}, headers=nobody), 401, "unauthorized")
            refused(await it.http.post(path, json={}, headers=admin), 403, "forbidden")
            assert (await it.http.post(path, json={}, headers=alice)).status_code == 200
        refused(await it.http.post("/rest/storage/upload/initiate", json={}, headers=bearer), 401, "unauthorized")
        begun = (await it.http.post("/cdn/files/upload/multipart", headers=bearer)).json()
        to = f"{begun['access_url']}/multipart/{begun['uploadId']}"
        for headers, status, code in (
            ({}, 401, "unauthorized"),
            (wrong, 401, "unauthorized"),
            (admin, 403, "forbidden"),
            (bob, 404, "not_found"),
        ):
            it.clock.now += 60
            refused(await it.http.put(f"{to}/1", content=b"x", headers=headers), status, code)
            refused(await it.http.post(f"{to}/complete", json={"parts": []}, headers=headers), status, code)
        refused(await it.http.put(f"{to[:-3]}aaa/1", content=b"x", headers=alice), 404, "not_found")
        etag = (await it.http.put(f"{to}/1", content=b"x", headers=bearer)).headers["etag"]
        listed = {"parts": [{"partNumber": 1, "etag": etag}]}
        assert (await it.http.post(f"{to}/complete", json=listed, headers=alice)).status_code == 200
        assert (await it.http.get(begun["access_url"])).content == b"x"
        await it.auth.revoke_key(alice["authorization"][4:20])
        refused(await it.http.post("/files/upload", content=b"x", headers=bearer), 401, "unauthorized")


@run
async def test_private_files_are_for_whom_their_owner_says(tmp_path: Path) -> None:
    async with serving_files(tmp_path, is_open=False) as it:
        alice, bob, eve = [await it.key(owner) for owner in ("alice", "bob", "eve")]
        for default, status in (("hide", 404), ("forbid", 403), ("allow", 200), ("nonsense", 200)):
            wish = '{"initial_acl": {"default": "%s", "rules": [{"user": "bob", "decision": "allow"}]}}' % default  # noqa: UP031
            url = await it.put(b"mine", **{"x-fal-object-lifecycle": wish}, **alice)
            for reader, expected in (
                (alice, 200),
                (bob, 200),
                (eve, status),
                ({}, status),
                ({"authorization": "Key x"}, status),
            ):
                assert (await it.http.get(url, headers=reader)).status_code == expected, (default, reader)
                assert (await it.http.head(url, headers=reader)).status_code == expected


# ---- reading ---------------------------------------------------------------------------------------------------------


@run
async def test_ranges(tmp_path: Path, storage: str) -> None:  # noqa: F811
    async with serving_files(tmp_path, storage=storage) as it:
        data = bytes(range(256)) * 8192 + b"tail"
        size = len(data)
        url = await it.put(data)
        for header, start, end in (
            ("bytes=0-0", 0, 1),
            ("bytes=0-", 0, size),
            (f"bytes=1-{size - 1}", 1, size),
            (f"bytes=5-{10**17}", 5, size),
            (f"bytes={size - 1}-", size - 1, size),
            ("bytes=-4", size - 4, size),
            (f"bytes=-{10**17}", 0, size),
            (f"bytes={BLOCK - 1}-{BLOCK}", BLOCK - 1, BLOCK + 1),
        ):
            got = await it.http.get(url, headers={"range": header})
            assert (got.status_code, got.content == data[start:end]) == (206, True), header
            assert got.headers["content-range"] == f"bytes {start}-{end - 1}/{size}"
            assert got.headers["content-length"] == str(end - start)
            head = await it.http.head(url, headers={"range": header})
            assert (head.status_code, head.headers["content-length"], head.content) == (206, str(end - start), b"")
        for header in (f"bytes={size}-", f"bytes={10**17}-", "bytes=-0"):
            got = await it.http.get(url, headers={"range": header})
            assert (got.status_code, got.headers["content-range"]) == (416, f"bytes */{size}")
            assert got.json()["detail"] and got.json()["message"]
        for header in (
            *("", "bytes", "bytes=", "bytes=-", "bytes=a-b", "bytes=5-1", "bytes=--5", "bytes=1-2-3", "lines=0-1"),
            *("bytes 0-1", "bytes=0-1,3-4", "bytes=" + "0-," * 5000, "bytes=" + "9" * 5000 + "-", "bytes=0 - 1"),
            "bytes=٠-١".encode(),
        ):
            got = await it.http.get(url, headers={"range": header})
            assert (got.status_code, got.content == data) == (200, True), header
        etag = (await it.http.head(url)).headers["etag"]
        for condition, status in ((etag, 206), ('"other"', 200), ("Wed, 21 Oct 2015 07:28:00 GMT", 200)):
            got = await it.http.get(url, headers={"range": "bytes=0-1", "if-range": condition})
            assert got.status_code == status
        assert (await it.http.get(url, headers={"if-none-match": f'"x", {etag}'})).status_code == 304
        empty = await it.put(b"")
        assert (await it.http.get(empty)).headers["content-length"] == "0"
        assert (await it.http.get(empty, headers={"range": "bytes=0-"})).status_code == 416


@run
async def test_nothing_that_was_uploaded_runs_in_our_origin(tmp_path: Path) -> None:
    async with serving_files(tmp_path) as it:
        for content_type, kind in (
            ("text/html", "attachment"),
            ("image/svg+xml", "attachment"),
            ("IMAGE/SVG+XML; charset=utf-8", "attachment"),
            ("application/xhtml+xml", "attachment"),
            ("text/javascript", "attachment"),
            ("application/pdf", "attachment"),
            ("image/png\r\nx: y", "attachment"),
            ("image/png", "inline"),
            ("image/jpeg; q=1", "inline"),
        ):
            for got in [
                await getattr(it.http, method)(await it.put(SVG, "x.svg", content_type)) for method in ("get", "head")
            ]:
                assert got.headers["content-disposition"].startswith(f"{kind}; filename*=UTF-8''x.svg")
                assert got.headers["x-content-type-options"] == "nosniff"
                assert got.headers["content-security-policy"] == "default-src 'none'; sandbox"
                assert "x" not in got.headers


@pytest.mark.points(63)
@run
async def test_names_are_shown_and_do_no_harm(tmp_path: Path) -> None:
    async with serving_files(tmp_path, upload_quota_bytes=2**30) as it:
        for title in TITLES:
            if "\ud800" in title:  # no JSON
                continue
            title = title[:40_000]
            got = await it.http.get(await it.put(b"x", title))
            assert re.fullmatch(
                r"attachment; filename\*=UTF-8''[\w.~%-]+", got.headers["content-disposition"], re.ASCII
            )
            spelt = title.encode().replace(b"\r", b"").replace(b"\n", b"").replace(b"\0", b"")[:9000]
            headers = [(b"x-fal-file-name", spelt.strip())]
            url = (await it.http.post("/cdn/files/upload", content=b"x", headers=headers)).json()["access_url"]
            assert (await it.http.get(url)).content == b"x"
        got = await it.http.get(await it.put(b"x", "snow 雪.png", "image/png"))
        assert got.headers["content-disposition"] == "inline; filename*=UTF-8''snow%20%E9%9B%AA.png"


@run
async def test_keys_are_not_guessed_where_files_are_read(tmp_path: Path) -> None:
    async with serving_files(tmp_path, is_open=False) as it:
        key = await it.key("alice")
        url = await it.put(b"x", **key)
        wrong = {"authorization": "Key " + "0" * 16 + ":wrong"}
        for _ in range(MAX_TRIES):
            assert (await it.http.get(url, headers=wrong)).content == b"x"
        refused(await it.http.get(url, headers=wrong), 429, "overloaded")
        for right in (key, {}):
            assert (await it.http.get(url, headers=right)).content == b"x"


@run
async def test_a_download_outlives_its_file(tmp_path: Path) -> None:
    async with serving_files(tmp_path, upload_limit_bytes=2**25, upload_quota_bytes=2**26) as it:
        data = b"x" * 20 * 2**20
        url = await it.put(data)
        async with it.http.stream("GET", url) as answer:
            got = [await anext(blocks := answer.aiter_bytes(2**16))]
            it.clock.now += 1000
            await it.files.sweep()
            assert (await it.http.get(url)).status_code == 404
            got += [block async for block in blocks]
        assert b"".join(got) == data
        await until(lambda: not it.files._leaving)
        assert await it.objects() == []


@pytest.mark.points(62)
@run
async def test_no_lifecycle_header_is_an_error(tmp_path: Path) -> None:
    async with serving_files(tmp_path) as it:
        for wish in ("{", "null", "[]", '{"expiration_duration_seconds": "soon"}', "[" * 3000, "\xff", ""):
            for name in ("x-fal-object-lifecycle", "x-fal-object-lifecycle-preference"):
                headers = {name: wish.encode("latin-1")}
                answer = await it.http.post("/rest/storage/upload/initiate", json={}, headers=headers)
                assert answer.status_code == 200
        short = '{"expiration_duration_seconds": 10}'
        for name in ("x-fal-object-lifecycle", "x-fal-object-lifecycle-preference"):
            url = await it.put(b"x", **{name: short})
            assert (await it.http.get(url)).status_code == 200
            it.clock.now += 10
            assert (await it.http.get(url)).status_code == 404


@run
async def test_a_reader_that_leaves_leaves_nothing_behind(tmp_path: Path) -> None:
    async with serving_files(tmp_path) as it:
        url = await it.put(b"x" * 3 * 2**20)
        before = len(asyncio.all_tasks())
        for _ in range(5):
            await raw(it.port, f"GET {urlsplit(url).path} HTTP/1.1\nhost: x", b"")
        await until(lambda: len(asyncio.all_tasks()) <= before)
        assert len((await it.http.get(url)).content) == 3 * 2**20

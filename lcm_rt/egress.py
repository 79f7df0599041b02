"""Fetch what a client's URL means, or post to it, on public hosts only: the one way out of this server.

A URL is admitted by a strict grammar, its name is resolved once per connection, every answer is judged, and the
connection goes to an address that was judged: neither a second DNS answer nor a redirect leads to another place. A
refused target is never touched, and all refusals have one text, so nobody learns from them what is behind this server.
"""

from __future__ import annotations

import asyncio
import hashlib
import ipaddress
import logging
import re
import socket
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing, asynccontextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

import httpcore2
import httpx2

import lcm_rt
from lcm_rt.errors import DownloadError, Unavailable

logger = logging.getLogger(__name__)

MAX_URL = 8192
"""Characters that a URL may have."""

REFUSED = "cannot be fetched; it must be an https URL of a public host, on the usual port"

Resolve = Callable[[str], Awaitable[list[str]]]
"""All addresses of a host name, as texts. Raises: OSError, ValueError: it has none."""

_URL = re.compile(
    r"https?://(?:[a-z0-9._-]+|\[[0-9a-f:.]+\])(?::[0-9]{1,5})?(?:[/?][^\x00-\x20\x7f\\]*)?", re.ASCII | re.IGNORECASE
)
_PORTS = (None, 80, 443)  # None: the scheme's own
_REDIRECTS = (301, 302, 303, 307, 308)
_MAX_REDIRECTS = 3
_MAX_CONNECTIONS = 64
_MAX_ADDRESSES = 4  # tried one after the other, of those that a name has
_CONNECT_S = 3.0
_SILENCE_S = 10.0
_BLOCK = 2**20  # bytes that a download writes in one go
_RESOLVERS = 32  # threads of their own: a slow name server must not hold up those who wait for a disk

# What is_global calls public, though it is not, or leads on to what is not.
_NOT_PUBLIC_V4 = [ipaddress.IPv4Network(net) for net in ("192.0.0.0/24", "192.88.99.0/24")]
_PUBLIC_V6 = ipaddress.IPv6Network("2000::/3")
_NOT_PUBLIC_V6 = [ipaddress.IPv6Network(net) for net in ("2001::/23", "2001:db8::/32", "2002::/16", "3fff::/20")]


def is_public(address: str) -> bool:
    """Whether ``address`` (an IP address as text) is one of the open internet's. Raises: ValueError: it is none."""
    ip = ipaddress.ip_address(address)
    if isinstance(ip, ipaddress.IPv6Address):
        if ip.ipv4_mapped is None:
            return ip in _PUBLIC_V6 and not any(ip in net for net in _NOT_PUBLIC_V6)
        ip = ip.ipv4_mapped
    return ip.is_global and not ip.is_multicast and not any(ip in net for net in _NOT_PUBLIC_V4)


def _host_is_public(host: str) -> bool:
    """Whether ``host`` may be public, as far as that can be told without asking a name server."""
    if ":" in host:
        return is_public(host)
    with suppress(OSError):
        return is_public(socket.inet_ntoa(socket.inet_aton(host)))  # octal and all: as the machine would read it
    return "." in host.rstrip(".")


class Egress:
    """The client for all that goes out. It keeps no connection, no cookie and no cache, and heeds no proxy variable.

    Building one reads the machine's certificates, which blocks for some 40 ms.

    Args:
        fetch_private: let everything through that has an address: private ones, any port, plain http.
        resolve: how names become addresses; by default as the machine does it.
        network: how a judged address is connected to. ssl_context: whose certificates are believed.
    """

    def __init__(
        self,
        *,
        fetch_private: bool = False,
        resolve: Resolve | None = None,
        network: httpcore2.AsyncNetworkBackend | None = None,
        ssl_context: ssl.SSLContext | None = None,
    ) -> None:
        self.fetch_private = fetch_private
        # One thread for all files, so that no write that was cancelled comes after its file was discarded.
        self._writer = ThreadPoolExecutor(1, "egress")
        self._pool = httpcore2.AsyncConnectionPool(
            ssl_context=ssl_context or httpcore2.default_ssl_context(),
            max_connections=_MAX_CONNECTIONS,
            max_keepalive_connections=0,
            network_backend=_Guard(resolve or _Resolver(), network or httpcore2.AnyIOBackend(), fetch_private),
        )

    async def fetch(self, field: str, url: str, *, limit_bytes: int, timeout_s: float) -> bytes:
        """The bytes at ``url``, which may be http.

        Args:
            field: what errors name. limit_bytes: longer answers are refused.
            timeout_s: for everything together: names, connections, redirects, bytes.

        Raises: DownloadError.
        """
        parts: list[bytes] = []

        async def take(part: bytes) -> None:
            parts.append(part)

        await self._get(field, self._admit(field, url), take, limit_bytes, timeout_s)
        return b"".join(parts)

    def check(self, field: str, url: str) -> None:
        """Look at ``url`` without asking anybody: its grammar, its port, and its host where that is an address.

        Raises: DownloadError.
        """
        target = self._admit(field, url)
        try:
            is_public_host = self.fetch_private or _host_is_public(target.raw_host.decode("ascii"))
        except ValueError:
            is_public_host = False
        if not is_public_host:
            raise DownloadError(field, REFUSED)

    async def post(
        self, field: str, url: str, body: bytes, headers: dict[str, str], *, limit_bytes: int, timeout_s: float
    ) -> tuple[int, dict[str, str]]:
        """Send ``body`` to ``url``, which may be http, once; a redirect is not followed.

        Args:
            field: what errors name. headers: ASCII; beside them go only those that HTTP needs, and who we are.
            limit_bytes: of the answer's body; the connection is cut there.
            timeout_s: for everything together: names, connections, both bodies.

        Returns: the answer's status and headers, those with lower-case names.

        Raises: DownloadError: no whole answer came in time, or the host must not be reached.
        """
        target = self._admit(field, url)
        sent = [*_own_headers(target), *((name.encode(), value.encode()) for name, value in headers.items())]
        async with self._deadline(field, timeout_s):
            stream = self._pool.stream(
                "POST", _wire_url(target), headers=sent, content=body, extensions={"timeout": {"connect": _CONNECT_S}}
            )
            async with stream as response, aclosing(response.aiter_stream()) as parts:
                total = 0
                async for part in parts:
                    total += len(part)
                    if total > limit_bytes:
                        break
                return response.status, {
                    name.decode("latin-1").lower(): value.decode("latin-1") for name, value in response.headers
                }

    async def download(self, field: str, url: str, path: Path, *, limit_bytes: int, timeout_s: float) -> str:
        """Write the bytes at ``url``, which must be https, to the new file ``path``; otherwise like ``fetch``.

        Returns: their SHA-256 in hex.

        Raises:
            DownloadError: nothing is left at ``path`` then, nor when this is cancelled.
            Unavailable: they cannot be written.
        """
        target = self._admit(field, url)
        if target.scheme != "https" and not self.fetch_private:
            raise DownloadError(field, REFUSED)
        try:
            file = _Download(path, self._writer)
            try:
                await self._get(field, target, file.take, limit_bytes, timeout_s)
                return await file.finish()
            except BaseException:
                await file.discard()
                raise
        except OSError as error:
            logger.exception("a download could not be written")
            raise Unavailable("what was fetched could not be stored here") from error

    def _admit(self, field: str, url: str) -> httpx2.URL:
        try:
            return self._parse(url)
        except _Refused:
            raise DownloadError(field, REFUSED) from None

    def _parse(self, url: str) -> httpx2.URL:
        """Raises: _Refused: not a URL that may be fetched, as far as its words tell."""
        if len(url) > MAX_URL or not _URL.fullmatch(url):
            raise _Refused
        try:
            parsed = httpx2.URL(url)
        except (httpx2.InvalidURL, UnicodeError):
            raise _Refused from None
        if parsed.port not in _PORTS and not self.fetch_private:
            raise _Refused
        return parsed

    def _redirect(self, base: httpx2.URL, location: bytes) -> httpx2.URL:
        try:
            target = self._parse(str(base.join(location.decode("ascii"))))
        except (UnicodeError, httpx2.InvalidURL):
            raise _Refused from None
        if base.scheme == "https" and target.scheme != "https":
            raise _Refused
        return target

    async def _get(
        self, field: str, url: httpx2.URL, take: Callable[[bytes], Awaitable[None]], limit_bytes: int, timeout_s: float
    ) -> None:
        """Hand the bytes at ``url`` to ``take``, part by part. Raises: DownloadError."""
        async with self._deadline(field, timeout_s):
            for _ in range(_MAX_REDIRECTS + 1):
                location = await self._hop(url, take, limit_bytes)
                if location is None:
                    return
                url = self._redirect(url, location)
            raise _Failed(f"was redirected more than {_MAX_REDIRECTS} times")

    @asynccontextmanager
    async def _deadline(self, field: str, timeout_s: float) -> AsyncIterator[None]:
        """Whatever goes wrong inside, and that it takes too long, as DownloadError."""
        try:
            async with asyncio.timeout(timeout_s):
                yield
        except _Refused:
            raise DownloadError(field, REFUSED) from None
        except _Failed as error:
            raise DownloadError(field, str(error)) from None
        except (TimeoutError, httpcore2.TimeoutException):
            raise DownloadError(field, "could not be fetched: its host took too long") from None
        except (httpcore2.NetworkError, httpcore2.ProtocolError):
            raise DownloadError(field, "could not be fetched: its host broke off, or speaks no HTTP") from None

    async def _hop(self, url: httpx2.URL, take: Callable[[bytes], Awaitable[None]], limit_bytes: int) -> bytes | None:
        """One request; returns where its answer redirects to, or None once the body was taken."""
        silence = {"timeout": {"read": _SILENCE_S, "write": _SILENCE_S, "connect": _CONNECT_S}}
        async with self._pool.stream("GET", _wire_url(url), headers=_own_headers(url), extensions=silence) as response:
            answered = {name.lower(): value for name, value in response.headers}
            if response.status in _REDIRECTS and b"location" in answered:
                return answered[b"location"]
            if response.status != 200:
                raise _Failed(f"could not be fetched: its host answered {response.status}")
            total = int(answered.get(b"content-length", 0))
            if total <= limit_bytes:
                total = 0
                async with aclosing(response.aiter_stream()) as parts:
                    async for part in parts:
                        total += len(part)
                        if total > limit_bytes:
                            break
                        await take(part)
            if total > limit_bytes:
                raise _Failed(f"is larger than {limit_bytes:,} bytes")
            return None


def _wire_url(url: httpx2.URL) -> httpcore2.URL:
    return httpcore2.URL(scheme=url.raw_scheme, host=url.raw_host, port=url.port, target=url.raw_path)


def _own_headers(url: httpx2.URL) -> list[tuple[bytes, bytes]]:
    return [
        (b"Host", url.netloc),
        (b"Accept", b"*/*"),
        (b"Accept-Encoding", b"identity"),
        (b"User-Agent", f"lcm-rt/{lcm_rt.__version__}".encode()),
    ]


class _Refused(Exception):
    """The target is not one to be fetched from."""


class _Failed(Exception):
    """Its host was asked, and did not give what it should; the text says how."""


class _Guard(httpcore2.AsyncNetworkBackend):
    """Judges where a connection goes, once its name is an address and before anything is sent there."""

    def __init__(self, resolve: Resolve, network: httpcore2.AsyncNetworkBackend, fetch_private: bool) -> None:
        self._resolve = resolve
        self._network = network
        self._fetch_private = fetch_private

    async def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,  # noqa: ASYNC109
        local_address: str | None = None,
        socket_options: Iterable[httpcore2.SOCKET_OPTION] | None = None,
    ) -> httpcore2.AsyncNetworkStream:
        try:
            addresses = await self._resolve(host)
        except (OSError, ValueError):  # ValueError: a label of more than 63 characters
            addresses = []
        # One private answer spoils the others: who mixes them means the private one.
        if not addresses or not (self._fetch_private or all(map(is_public, addresses))):
            logger.info("not fetched from %s: it has no address, or one that is not public", host)
            raise _Refused
        for address in addresses[:_MAX_ADDRESSES]:
            try:
                return await self._network.connect_tcp(address, port, timeout, local_address, socket_options)
            except (httpcore2.ConnectError, httpcore2.ConnectTimeout) as error:
                failure = error
        raise failure


class _Resolver:
    """Names to addresses as the machine does it. A thread that waits for a dead name server cannot be stopped, so who
    asks for a name that is being looked up waits for that answer: however many ask, it holds one thread.
    """

    def __init__(self) -> None:
        self._threads = ThreadPoolExecutor(_RESOLVERS, "resolver")
        self._asked: dict[str, asyncio.Future[list[Any]]] = {}

    async def __call__(self, host: str) -> list[str]:
        asked = self._asked.get(host)
        if asked is None:
            asked = asyncio.get_running_loop().run_in_executor(
                self._threads, lambda: socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
            )
            self._asked[host] = asked
            asked.add_done_callback(lambda done: self._forget(host, done))
        return [str(answer[4][0]) for answer in await asyncio.shield(asked)]

    def _forget(self, host: str, done: asyncio.Future[list[Any]]) -> None:
        del self._asked[host]
        if not done.cancelled():
            done.exception()  # which nobody may be waiting for any more


class _Download:
    """A file that is being written by the one thread of ``writer``, and the hash of what it has."""

    def __init__(self, path: Path, writer: ThreadPoolExecutor) -> None:
        self._path = path
        self._writer = writer
        self._file: BinaryIO | None = None
        self._hash = hashlib.sha256()
        self._block = bytearray()

    async def _in_thread(self, work: Callable[[], None]) -> None:
        await asyncio.shield(asyncio.get_running_loop().run_in_executor(self._writer, work))

    async def take(self, part: bytes) -> None:
        self._block += part
        if len(self._block) >= _BLOCK:
            await self._in_thread(self._write)

    def _write(self) -> None:
        if self._file is None:
            self._file = self._path.open("xb")
        self._hash.update(self._block)
        self._file.write(self._block)
        self._block.clear()

    async def finish(self) -> str:
        await self._in_thread(self._finish)
        return self._hash.hexdigest()

    def _finish(self) -> None:
        self._write()
        assert self._file
        self._file.close()

    async def discard(self) -> None:
        await self._in_thread(self._discard)

    def _discard(self) -> None:
        if self._file is not None:
            with suppress(OSError):  # closing writes what is buffered, and fails where the disk is full
                self._file.close()
            with suppress(OSError):
                self._path.unlink()

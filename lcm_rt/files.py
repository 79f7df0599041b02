"""Bytes by URL: data URIs, pictures this server answered, kept in a folder for a bounded time, and those of others.

Blocking calls run in threads: a slow disk delays the request that asked, nobody else.
"""

from __future__ import annotations

import asyncio
import logging
import re
import secrets
import time
from pathlib import Path
from urllib.parse import urlsplit

from lcm_rt.egress import MAX_URL, Egress
from lcm_rt.errors import DownloadError, ImageError, InputError, NotFound
from lcm_rt.metrics import Metrics
from lcm_rt.wire import read_data_uri

logger = logging.getLogger(__name__)

SUFFIXES = {"image/jpeg": ".jpg", "image/png": ".png", "image/webp": ".webp"}
CONTENT_TYPES = {suffix: content_type for content_type, suffix in SUFFIXES.items()}
SWEEP_S = 30.0
MAX_FETCH_BYTES = 12 * 2**20
FETCH_S = 10.0

_NAME = re.compile(r"[A-Za-z0-9_-]{22}\.(?:jpg|png|webp)")
_PATH = re.compile(r"/files/([^/?#]+)")
_HTTP = re.compile(r"https?:", re.IGNORECASE)
_GONE = "there is no such file here, or it has expired"


def _name_in(url: str) -> str:
    """The name in a URL that may be of ours, or nothing."""
    try:
        match = _PATH.fullmatch(urlsplit(url).path) if len(url) <= MAX_URL else None
    except ValueError:
        match = None
    return match[1] if match else ""


async def data_of(field: str, url: str) -> bytes:
    """The bytes of a data URI; others run meanwhile. Raises: ImageError: malformed; names ``field``."""
    parts = []
    for part in read_data_uri(field, url):
        parts.append(part)
        await asyncio.sleep(0)
    return b"".join(parts)


class Files:
    """A folder of answered pictures under unguessable names.

    Args:
        folder: made when missing; files there that are not ours are left alone.
        ttl_s: how long a file is kept. limit_bytes: how much all may take; the oldest go first.
        egress: how other hosts' files are fetched; by default from public hosts only.
    """

    def __init__(
        self, folder: Path, *, ttl_s: float, limit_bytes: int, metrics: Metrics, egress: Egress | None = None
    ) -> None:
        self._folder = folder
        self._ttl_s = ttl_s
        self._limit_bytes = limit_bytes
        self._metrics = metrics
        self._egress = egress or Egress()

    async def put(self, data: bytes, content_type: str) -> str:
        """Keep ``data``; returns its name, to be served under ``/files/``."""
        name = secrets.token_urlsafe(16) + SUFFIXES[content_type]
        await asyncio.to_thread(self._write, name, data)
        return name

    def _write(self, name: str, data: bytes) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        temporary = self._folder / f".{name}"
        temporary.write_bytes(data)
        temporary.rename(self._folder / name)  # so that nobody ever reads half of it

    async def find(self, name: str) -> Path:
        """Where the file ``name`` lies. Raises: NotFound, also once it has expired."""
        path = self._folder / name
        if not _NAME.fullmatch(name) or not await asyncio.to_thread(self._is_fresh, path):
            raise NotFound("there is no such file, or it has expired")
        return path

    def _is_fresh(self, path: Path) -> bool:
        try:
            return path.stat().st_mtime + self._ttl_s > time.time()
        except OSError:
            return False

    async def path_of(self, url: str) -> Path | None:
        """The file of ours that ``url`` means, or None: gone, or not ours.

        Only its path is looked at, as a server does not know under which names it is reached: the names of our files
        cannot be guessed, so that one is known here says that it is ours.
        """
        try:
            return await self.find(_name_in(url))
        except NotFound:
            return None

    async def read(self, field: str, url: str) -> bytes:
        """The bytes that a client's URL means: a data URI, a file of ours, or an http or https URL of another host.

        Other hosts may take ``FETCH_S`` seconds and ``MAX_FETCH_BYTES`` bytes.

        Raises:
            ImageError: a malformed data URI, or a file of ours that is gone; names ``field``.
            DownloadError: another host's that cannot be fetched.
            InputError: some other address.
        """
        if url[:5].lower() == "data:":
            return await data_of(field, url)
        if path := await self.path_of(url):
            try:
                return await asyncio.to_thread(path.read_bytes)
            except OSError:
                raise ImageError(field, _GONE) from None
        name = _name_in(url)
        if _HTTP.match(url):
            try:
                return await self._egress.fetch(field, url, limit_bytes=MAX_FETCH_BYTES, timeout_s=FETCH_S)
            except DownloadError:
                if not _NAME.fullmatch(name):
                    raise
        elif not name:
            raise InputError(
                field, "must be an http:, https: or data: URL, or one of this server's /files/", "url_scheme"
            )
        raise ImageError(field, _GONE)

    async def run(self) -> None:
        """Remove expired files until cancelled."""
        while True:
            try:
                await asyncio.to_thread(self.sweep, time.time())
            except OSError:
                logger.exception("expired files could not be removed")
            await asyncio.sleep(SWEEP_S)

    def sweep(self, now: float) -> None:
        """Remove what has expired by ``now`` (epoch seconds), then the oldest beyond the limit."""
        if not self._folder.is_dir():
            return
        ours = [path for path in self._folder.iterdir() if _NAME.fullmatch(path.name.removeprefix("."))]
        found = [((status := path.stat()).st_mtime, status.st_size, path) for path in ours]
        total = 0
        for modified_at, size, path in sorted(found, reverse=True):
            total += size
            if modified_at + self._ttl_s <= now or total > self._limit_bytes:
                path.unlink(missing_ok=True)
                total -= size
        self._metrics.file_bytes.set(total)

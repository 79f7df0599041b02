"""LoRAs by URL: fetched once, looked at without being loaded, kept in a folder under the hash of their bytes."""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
import re
import secrets
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import quote

from lcm_rt.auth import LOCAL
from lcm_rt.egress import MAX_URL, Egress
from lcm_rt.errors import DownloadError, ImageError, InputError, NotFound, Overloaded, Unavailable
from lcm_rt.files import File, Files, data_of, name_in

logger = logging.getLogger(__name__)

MAX_BYTES = 2 * 2**30
MAX_TENSORS = 4000
TTL_S = 600.0
"""How long a URL is taken to mean the bytes that it meant."""
GRACE_S = 300.0
"""How long after its last use no file is removed: an engine may still be about to read it."""

_FETCH_S = 120.0
_MAX_FETCHES = 8  # from other hosts
_MAX_FETCHES_PER_OWNER = 2
_MAX_COPIES = 4  # of what is here already
_MAX_KNOWN = 1000
_MAX_HEADER = 4 * 2**20
_MAX_MARKS = 200_000  # each may become an object of a hundred bytes; training notes have some thousands
_DTYPES = ("F32", "F16", "BF16")
_NOT_ONE = "is not a safetensors file"
_GONE = "there is no such file here, or it has expired"

_NAME = re.compile(r"[0-9a-f]{64}\.safetensors")
_PART = re.compile(r"[0-9a-f]{16}\.part")
_HUB_URL = re.compile(r"hf:([\w.-]+/[\w.-]+)/([^@\x00-\x1f\\]+\.safetensors)(?:@([\w./-]+))?", re.ASCII)

T = TypeVar("T")


@dataclass(slots=True)
class _Known:
    """What a URL meant, and when (monotonic seconds)."""

    path: Path
    fetched_at: float
    used_at: float


@dataclass(slots=True)
class _Flight:
    """A LoRA on its way in."""

    task: asyncio.Task[Path]
    owner: str | None
    """Who asked first, where another host is asked; None: it is here already."""
    waiting: int
    """Those who would miss it."""


class Loras:
    """A folder of LoRA files, made when missing. Building one looks at it, which blocks.

    Args:
        limit_bytes: how much all may take, beside some that are on their way in; those unused for longest
            go first. hub: where ``hf:`` URLs lead; None forbids them.
    """

    def __init__(self, folder: Path, *, files: Files, egress: Egress, limit_bytes: int, hub: str | None) -> None:
        self._folder = folder
        self._files = files
        self._egress = egress
        self._limit_bytes = limit_bytes
        self._hub = hub
        self._known: dict[str, _Known] = {}  # the last used at the end
        self._flights: dict[str, _Flight] = {}
        self._copies = asyncio.Semaphore(_MAX_COPIES)
        # One thread does all that changes the folder, so that no file is removed while it is found in use.
        self._keeper = ThreadPoolExecutor(1, "loras")
        folder.mkdir(parents=True, exist_ok=True)
        for path in folder.iterdir():
            if _PART.fullmatch(path.name):  # of a process that was killed
                path.unlink()
        self._make_room(0)

    async def find(self, field: str, url: str, *, owner: str = LOCAL) -> Path:
        """The local file of the LoRA that a URL of ``owner`` means; safe to be opened within ``GRACE_S`` seconds.

        Its name is the SHA-256 of its bytes in hex, with ``.safetensors``. ``url`` is an ``https:`` or ``data:`` URL, a
        file of this server, or ``hf:OWNER/NAME/PATH.safetensors``, with ``@REVISION`` if wanted, of a public
        repository on the hub. While a LoRA is in constant use it is fetched anew behind the back of those who use it,
        so that nobody's pictures stop for it; otherwise whoever asks after ``TTL_S`` gets what its host has now.

        Raises:
            DownloadError: it cannot be had, is larger than 2 GiB, or is no safetensors file of float tensors.
            InputError: ``url`` is none of these.
            Overloaded: many are on their way in already, or two for ``owner``, or the folder is full of those in use.
            Unavailable: it cannot be stored.
        """
        url, key = await self._resolve(field, url, owner)
        known = self._known.get(key)
        if known is not None and await self._in_keeper(lambda: _touch(known.path)):
            now = time.monotonic()
            stale = now - known.fetched_at >= TTL_S and not _is_data(url)
            if not stale or now - known.used_at < TTL_S:
                known.used_at = now
                self._known[key] = self._known.pop(key, known)
                if stale and key not in self._flights:
                    with suppress(Overloaded):  # then it is fetched later
                        (await self._fly(field, url, key, owner)).waiting += 1  # whoever comes next
                return known.path
        flight = await self._fly(field, url, key, owner)
        flight.waiting += 1
        try:
            return await asyncio.shield(flight.task)
        except DownloadError as error:  # it may name the field of someone else, who asked first
            raise DownloadError(field, error.message) from None
        finally:
            flight.waiting -= 1
            if not flight.waiting and not flight.task.done():
                del self._flights[key]  # before it has ended: whoever comes now needs another
                flight.task.cancel()

    async def _resolve(self, field: str, url: str, owner: str) -> tuple[str, str]:
        """``url`` in the form that is fetched, and what it is known by. Raises: InputError."""
        if name_in(url):  # what one owner may have, another may not
            return url, f"{owner} {url}"
        if _is_data(url):
            return url, "data:" + (await asyncio.to_thread(hashlib.sha256, url.encode())).hexdigest()
        if url.startswith("hf:"):
            match = _HUB_URL.fullmatch(url) if len(url) <= MAX_URL else None
            if self._hub is None:
                raise InputError(field, "LoRAs of the hub are not allowed here", "url_scheme")
            if not match or ".." in url:
                raise InputError(field, "must be like hf:OWNER/NAME/FILE.safetensors or ...@REVISION", "url_parsing")
            repository, path, revision = match.groups("main")
            url = f"{self._hub}/{repository}/resolve/{quote(revision, safe='')}/{quote(path)}"
        elif not url[:6].lower().startswith(("https:", "http:")):
            raise InputError(
                field, "must be an https:, hf: or data: URL, or one of this server's /files/", "url_scheme"
            )
        return url, url

    async def _fly(self, field: str, url: str, key: str, owner: str) -> _Flight:
        """The flight that brings ``url``, one for all who ask, until the last of them leaves. Raises: Overloaded."""
        if key in self._flights:
            return self._flights[key]
        file = await self._files.own(url, owner=owner) if name_in(url) else None
        if key in self._flights:
            return self._flights[key]
        remote = not file and not _is_data(url) and not url.startswith("/")
        if remote:
            asked = [flight.owner for flight in self._flights.values() if flight.owner is not None]
            # Who runs an open server shares it with nobody.
            if len(asked) >= _MAX_FETCHES or (owner != LOCAL and asked.count(owner) >= _MAX_FETCHES_PER_OWNER):
                raise Overloaded("many LoRAs are being fetched now; try again soon")
        task = asyncio.create_task(self._fetch(field, url, file, remote=remote))
        flight = self._flights[key] = _Flight(task, owner if remote else None, 0)
        task.add_done_callback(lambda _: self._landed(key, flight))
        return flight

    def _landed(self, key: str, flight: _Flight) -> None:
        if self._flights.get(key) is flight:
            del self._flights[key]
        task = flight.task
        if task.cancelled():
            return
        now = time.monotonic()
        known = self._known.pop(key, None)
        if error := task.exception():
            if known is not None:  # its host is out of order, which is no reason to stop those who use what we have
                self._known[key] = known
                known.fetched_at = now
                logger.warning("a LoRA could not be fetched again: %s", error)
            return
        self._known[key] = _Known(task.result(), now, now)
        if len(self._known) > _MAX_KNOWN:
            del self._known[next(iter(self._known))]

    async def _fetch(self, field: str, url: str, file: File | None, *, remote: bool) -> Path:
        part = self._folder / f"{secrets.token_hex(8)}.part"
        limit = min(MAX_BYTES, self._limit_bytes)
        try:
            if remote:
                sha256 = await self._egress.download(field, url, part, limit_bytes=limit, timeout_s=_FETCH_S)
                return await self._in_keeper(lambda: self._keep(field, part, sha256))
            async with self._copies:
                sha256 = await self._take(field, url, file, part, limit)
                return await self._in_keeper(lambda: self._keep(field, part, sha256))
        except OSError as error:
            logger.exception("a LoRA could not be stored")
            raise Unavailable("the LoRA could not be stored here") from error
        finally:
            await self._in_keeper(lambda: part.unlink(missing_ok=True))

    async def _take(self, field: str, url: str, file: File | None, part: Path, limit: int) -> str:
        """Copy what is here already: a file of ours, or what the URL itself holds. Its SHA-256."""
        if file:
            if file.size > limit:
                raise DownloadError(field, f"is larger than {limit:,} bytes")
            return await self._copy(field, file, part)
        if not _is_data(url):
            raise DownloadError(field, _GONE)
        try:
            data = await data_of(field, url)
        except ImageError as error:
            raise DownloadError(field, error.message) from None
        return await self._in_keeper(lambda: _write(part, data))

    async def _copy(self, field: str, file: File, part: Path) -> str:
        digest = hashlib.sha256()
        try:
            async for block in self._files.stream(file):
                await self._in_keeper(partial(_append, part, block))
                digest.update(block)
        except NotFound:
            raise DownloadError(field, _GONE) from None
        return digest.hexdigest()

    async def _in_keeper(self, work: Callable[[], T]) -> T:
        return await asyncio.shield(asyncio.get_running_loop().run_in_executor(self._keeper, work))

    def _keep(self, field: str, part: Path, sha256: str) -> Path:
        _check(field, part)
        size = part.stat().st_size
        if size > self._limit_bytes:
            raise DownloadError(field, f"is larger than {self._limit_bytes:,} bytes")
        path = self._folder / f"{sha256}.safetensors"
        if not _touch(path):
            self._make_room(size)
        return part.rename(path)

    def _make_room(self, size: int) -> None:
        """Remove files, those unused for longest first, until ``size`` more bytes are within the limit.

        Raises: Overloaded: all that are left were in use within ``GRACE_S``.
        """
        found = []
        for path in self._folder.iterdir():
            if _NAME.fullmatch(path.name):
                status = path.stat()
                found.append((status.st_mtime, status.st_size, path))
        total = size + sum(entry[1] for entry in found)
        for used_at, length, path in sorted(found):
            if total <= self._limit_bytes or used_at > time.time() - GRACE_S:
                break
            path.unlink()
            total -= length
        if size and total > self._limit_bytes:
            raise Overloaded("the LoRAs in use leave no room for another; try again in some minutes")


def _is_data(url: str) -> bool:
    return url[:5].lower() == "data:"


def _touch(path: Path) -> bool:
    """Note that ``path`` is used now; False: it is gone."""
    if not path.exists():
        return False
    path.touch()
    return True


def _write(part: Path, data: bytes) -> str:
    part.write_bytes(data)
    return hashlib.sha256(data).hexdigest()


def _append(part: Path, block: bytes) -> None:
    with part.open("ab") as file:
        file.write(block)


def _check(field: str, path: Path) -> None:
    """See that ``path`` is what it should be, by its header alone. Raises: DownloadError."""
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if not 2 <= length <= min(_MAX_HEADER, size - 8):
            raise DownloadError(field, _NOT_ONE)
        header = file.read(length)
    if sum(map(header.count, (b",", b"[", b"{"))) > _MAX_MARKS:
        raise DownloadError(field, _NOT_ONE)
    try:
        tensors = json.loads(header)
    except (ValueError, RecursionError):
        raise DownloadError(field, _NOT_ONE) from None
    if not isinstance(tensors, dict):
        raise DownloadError(field, _NOT_ONE)
    tensors.pop("__metadata__", None)
    if not 1 <= len(tensors) <= MAX_TENSORS:
        raise DownloadError(field, f"has {len(tensors)} tensors, where 1 to {MAX_TENSORS} are possible")
    if any(not isinstance(tensor, dict) for tensor in tensors.values()):
        raise DownloadError(field, _NOT_ONE)
    if not all(tensor.get("dtype") in _DTYPES for tensor in tensors.values()):
        raise DownloadError(field, "has tensors that are neither F32 nor F16 nor BF16")
    # No byte outside a tensor: what comes after or between may be another file, such as a zip.
    end = 0
    for begin, until in sorted(map(_span, tensors.values())):
        if begin != end or until < begin:
            raise DownloadError(field, _NOT_ONE)
        end = until
    if end != size - 8 - length:
        raise DownloadError(field, _NOT_ONE)


def _span(tensor: dict[str, Any]) -> tuple[int, int]:
    """Where its bytes are, counted from the header's end; (-1, -1) if it does not say."""
    match tensor.get("data_offsets"):
        case [int(begin), int(end)]:
            return begin, end
    return -1, -1

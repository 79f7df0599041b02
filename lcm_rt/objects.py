"""Bytes under names in one folder, of this machine or of any storage that fsspec knows; knows no row and no owner.

An object is written once, under a name that nobody knows before it is whole, and never changed: so nothing is locked,
moved or read by halves, and that is all a storage need be able to do. Blocking calls run in threads: a slow storage
delays who asked for its bytes, nobody else.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import fsspec.core  # type: ignore[import-untyped]
from fsspec.implementations.local import LocalFileSystem  # type: ignore[import-untyped]

from lcm_rt.errors import LcmError, NotFound, Unavailable

logger = logging.getLogger(__name__)

BLOCK = 2**20
"""Bytes that are read, or written, in one go."""

_LANES = 16

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Written:
    """What became of an object's bytes; ``md5`` is in hex."""

    size: int
    md5: str


class Objects:
    """A folder of objects, made with the first of them.

    Args:
        folder: a local path, or a URL as fsspec spells it.

    Raises: LcmError: there is no such kind of storage here.
    """

    def __init__(self, folder: str | Path) -> None:
        if isinstance(folder, Path):
            self._fs, self._root = LocalFileSystem(), str(folder)
        else:
            try:
                self._fs, self._root = fsspec.core.url_to_fs(folder)
            except (ValueError, ImportError) as error:
                raise LcmError(f"files cannot be kept there: {error}") from error
        # Calls for one object run in one thread, in their order: no write of a cancelled task comes after its removal.
        self._lanes = [ThreadPoolExecutor(1, "objects") for _ in range(_LANES)]

    async def put(self, name: str, data: bytes) -> None:
        """Keep ``data``. Raises: Unavailable: it cannot be stored, and nothing of it is left."""
        await self._in_lane(name, partial(_put, _Writing(self._fs, self._path(name)), data))

    async def write(self, name: str, parts: AsyncIterator[bytes]) -> Written:
        """Keep what ``parts`` gives, of which no more than ``BLOCK`` bytes and a part are held in memory.

        Raises: Unavailable: it cannot be stored; whatever ``parts`` raises. Nothing is left then, nor when cancelled.
        """
        writing = _Writing(self._fs, self._path(name))
        block = bytearray()
        try:
            async for part in parts:
                block += part
                if len(block) >= BLOCK:
                    await self._in_lane(name, partial(writing.write, bytes(block)))
                    block.clear()
            return await self._in_lane(name, partial(writing.finish, bytes(block)))
        except BaseException:
            await self._in_lane(name, writing.drop)
            raise

    async def read(self, name: str, start: int = 0, end: int | None = None) -> bytes:
        """The bytes from ``start`` to before ``end``. Raises: NotFound: there is no such object; Unavailable."""
        data: bytes = await self._in_lane(name, partial(self._fs.cat_file, self._path(name), start, end))
        return data

    async def stream(self, name: str, start: int, end: int) -> AsyncGenerator[bytes, None]:
        """As ``read``, block by block. Raises: NotFound: it is gone, or shorter than ``end``; Unavailable."""
        while start < end:
            block = await self.read(name, start, min(start + BLOCK, end))
            if not block:
                raise NotFound("the file has lost its end")
            yield block
            start += len(block)

    async def remove(self, names: Iterable[str]) -> None:
        """Remove those that are there; what cannot be removed now is logged, and still among ``names``."""
        for name in names:
            with suppress(NotFound, Unavailable):
                await self._in_lane(name, partial(self._fs.rm_file, self._path(name)))

    async def names(self) -> list[str]:
        """All objects, in no order; none where the storage cannot list them."""
        try:
            return await self._in_lane("", self._list)
        except (NotFound, Unavailable):
            return []

    def _list(self) -> list[str]:
        self._fs.invalidate_cache()  # other servers may write there too
        try:
            return [path.rstrip("/").rpartition("/")[2] for path in self._fs.ls(self._root, detail=False)]
        finally:
            self._fs.invalidate_cache()

    async def modified_at(self, name: str) -> float | None:
        """When it was written, in seconds since the epoch; None where the storage does not know."""
        try:
            modified = await self._in_lane(name, partial(self._fs.modified, self._path(name)))
        except (NotFound, Unavailable):
            return None
        return float(modified.timestamp())

    def _path(self, name: str) -> str:
        return f"{self._root}/{name}"

    async def _in_lane(self, name: str, work: Callable[[], T]) -> T:
        lane = self._lanes[hash(name) % _LANES]
        try:
            return await asyncio.shield(asyncio.get_running_loop().run_in_executor(lane, work))
        except FileNotFoundError:
            raise NotFound("there is no such file, or it has expired") from None
        except Exception as error:  # each storage has errors of its own
            logger.exception("the storage of files failed")
            raise Unavailable("the file's storage cannot be used now; try again soon") from error


class _Writing:
    """An object on its way in; blocks, and is for one thread at a time."""

    def __init__(self, fs: Any, path: str) -> None:
        self._fs = fs
        self._path = path
        self._file: Any = None
        self._size = 0
        self._md5 = hashlib.md5(usedforsecurity=False)

    def write(self, block: bytes) -> None:
        if self._file is None:
            self._file = self._open()
        self._file.write(block)
        self._size += len(block)
        self._md5.update(block)

    def _open(self) -> Any:
        try:
            return self._fs.open(self._path, "wb")
        except FileNotFoundError:
            self._fs.makedirs(self._path.rpartition("/")[0], exist_ok=True)
            return self._fs.open(self._path, "wb")

    def finish(self, block: bytes) -> Written:
        self.write(block)
        self._file.close()
        return Written(self._size, self._md5.hexdigest())

    def drop(self) -> None:
        if self._file is not None:
            with suppress(Exception):  # closing writes what is buffered, and fails where the disk is full
                self._file.close()
            with suppress(Exception):
                self._fs.rm_file(self._path)


def _put(writing: _Writing, data: bytes) -> None:
    try:
        writing.finish(data)
    except Exception:
        writing.drop()
        raise

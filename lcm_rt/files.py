"""Bytes by URL: what clients uploaded, pictures this server answered, data URIs, and what lies on other hosts.

A file is a row of the store, which says whose it is and until when, and an object, which has its bytes. The row comes
last and goes first: whatever is read is whole, and a crash leaves at worst an object without a row, to be swept later.
Names cannot be guessed, so that a file's name is the right to read it, unless its owner said otherwise. Objects' names
begin with the installation's own, as others may share the storage.
"""

from __future__ import annotations

import asyncio
import heapq
import logging
import re
import secrets
import time
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterable
from contextlib import aclosing, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeVar
from urllib.parse import urlsplit

from sqlalchemy import ColumnElement, Connection, delete, func, insert, select, update
from sqlalchemy.exc import IntegrityError

from lcm_rt.auth import LOCAL
from lcm_rt.egress import MAX_URL, Egress
from lcm_rt.errors import (
    BadRequest,
    DownloadError,
    Forbidden,
    ImageError,
    InputError,
    LcmError,
    NotFound,
    Overloaded,
    TooLarge,
)
from lcm_rt.metrics import Metrics
from lcm_rt.objects import Objects, Written
from lcm_rt.store import Store, files, parts
from lcm_rt.store import secrets as secret_rows
from lcm_rt.wire import decode_json, read_data_uri

logger = logging.getLogger(__name__)

SWEEP_S = 30.0
LIST_S = 3600.0
"""How often the storage is searched for bytes that no row knows."""
UNFINISHED_S = 3600.0
"""How long an upload may take, from the begin of its last part on."""
STRAY_S = 86400.0
"""How old bytes without a row become; longer than any upload takes to get its row."""
MOST_UNFINISHED = 1024
"""Uploads of one owner that are not complete yet."""
MOST_ROWS = 30_000
"""Uploads and parts of one owner: all of them are summed up at each change, while the store does nothing else."""
LONGEST_S = 365 * 86400.0
"""The longest that a file is kept, whatever its owner wishes."""
MAX_FETCH_BYTES = 12 * 2**20
FETCH_S = 10.0
MAX_PARTS = 10_000
_PAUSE_S = 1.0  # between two sweeps at least

_SUFFIXES = {"image/jpeg": ".jpg", "image/png": ".png", "image/webp": ".webp", "image/gif": ".gif"}
_LEAST = 4096  # bytes that any upload or part counts for: their number is bounded too
_MAX_TITLE = 200
_MAX_WISH = 8192
_MAX_RULES = 100
_AT_ONCE = 500  # rows that are removed in one transaction

_TOKEN = re.compile(r"[A-Za-z0-9_-]{22}")
_NAME = re.compile(r"[A-Za-z0-9_-]{22}(?:\.[a-z0-9]{1,11})?")
_PATH = re.compile(r"(?:/cdn)?/files/([^/?#]+)")
_HTTP = re.compile(r"https?:", re.IGNORECASE)
_SUFFIX = re.compile(r"\.[a-z0-9]{1,11}\Z")
_CONTENT_TYPE = re.compile(r"[\w.+-]{1,60}/[\w.+-]{1,60}(?: ?; ?[\w-]{1,20}=[\w.+-]{1,40})?", re.ASCII)
_GONE = "there is no such file here, or it has expired"
_COMPLETE = "this upload is complete already"

T = TypeVar("T")

Decision = Literal["allow", "hide", "forbid"]


@dataclass(frozen=True, slots=True)
class Access:
    """Who beside its owner may read a file: ``hide`` denies that it is there, ``forbid`` denies it openly."""

    default: Decision = "allow"
    rules: tuple[tuple[str, Decision], ...] = ()
    """Other owners, and what holds for them instead."""


@dataclass(frozen=True, slots=True)
class Lifecycle:
    """What a client wishes for its file; ``ttl_s`` in seconds, None is the server's default."""

    ttl_s: float | None = None
    access: Access = Access()


@dataclass(frozen=True, slots=True)
class File:
    """One that is here, whole, and that whoever asked may have; ``size`` in bytes, ``place`` is its object."""

    name: str
    place: str
    content_type: str
    title: str | None
    size: int


@dataclass(frozen=True, slots=True)
class Upload:
    """The name that a file will have, and the secret that is the right to fill it; ``owner``'s alone, where given."""

    name: str
    secret: str
    owner: str | None = None


def lifecycle_of(header: str | None) -> Lifecycle:
    """The wish in a lifecycle header (JSON): ``{"expiration_duration_seconds": N, "initial_acl": {"default": "hide",
    "rules": [{"user": OWNER, "decision": "allow"}]}}``; 0 and null are for ever. What is malformed says nothing.
    """
    try:
        said = decode_json(header) if header and len(header) <= _MAX_WISH else None
    except InputError:
        said = None
    if not isinstance(said, dict):
        return Lifecycle()
    return Lifecycle(_ttl(said.get("expiration_duration_seconds", -1)), _access(said.get("initial_acl")))


def _ttl(seconds: Any) -> float | None:
    if seconds is None:
        return LONGEST_S
    if isinstance(seconds, bool) or not isinstance(seconds, int | float) or seconds < 0:
        return None
    return min(seconds or LONGEST_S, LONGEST_S)


def _access(acl: Any) -> Access:
    if not isinstance(acl, dict):
        return Access()
    listed = acl.get("rules")
    rules = []
    for rule in listed[:_MAX_RULES] if isinstance(listed, list) else ():
        match rule:
            case {"user": str(user), "decision": "allow" | "hide" | "forbid" as decision}:
                rules.append((user, decision))
    default = acl.get("default")
    return Access(default if default in ("allow", "hide", "forbid") else "allow", tuple(rules))


def name_in(url: str) -> str:
    """The name in a URL that may be of ours, by its path; or nothing."""
    try:
        parsed = urlsplit(url if len(url) <= MAX_URL else "")
    except ValueError:
        return ""
    match = _PATH.fullmatch(parsed.path)
    return match[1] if match and parsed.scheme in (("http", "https") if parsed.netloc else ("",)) else ""


async def data_of(field: str, url: str) -> bytes:
    """The bytes of a data URI; others run meanwhile. Raises: ImageError: malformed; names ``field``."""
    blocks = []
    for block in read_data_uri(field, url):
        blocks.append(block)
        await asyncio.sleep(0)
    return b"".join(blocks)


class Files:
    """The files of all servers that share ``store`` and ``storage``.

    Args:
        storage: where their bytes lie, a folder or a URL as fsspec spells it; what is there and not ours is left alone.
        ttl_s: how long an answered picture is kept. limit_bytes: what all of those may take; the oldest go first.
        upload_ttl_s: how long an upload is kept whose owner does not say. upload_limit_bytes: the largest.
        upload_quota_bytes: what the uploads of one owner may take.
        egress: how other hosts' files are fetched; by default from public hosts only.
        clock: seconds since the epoch.

    Raises: LcmError: there is no such kind of storage here.
    """

    def __init__(
        self,
        store: Store,
        storage: str | Path,
        *,
        ttl_s: float,
        limit_bytes: int,
        upload_ttl_s: float,
        upload_limit_bytes: int,
        upload_quota_bytes: int,
        metrics: Metrics,
        egress: Egress | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._store = store
        self._objects = Objects(storage)
        self._ttl_s = ttl_s
        self._limit_bytes = limit_bytes
        self._upload_ttl_s = upload_ttl_s
        self._upload_limit_bytes = upload_limit_bytes
        self._upload_quota_bytes = upload_quota_bytes
        self._metrics = metrics
        self._egress = egress or Egress()
        self._clock = clock
        self._arriving: Counter[str] = Counter()  # bytes of each owner that no row counts yet
        self._joins: dict[str, asyncio.Task[None]] = {}  # by the secrets of their uploads
        self._reading: Counter[str] = Counter()  # by object, how many read it now
        self._leaving: set[str] = set()  # objects without a row that somebody still reads
        self._kept = 0  # bytes of answered pictures, as far as this server knows
        self._is_full = asyncio.Event()
        self._installation = ""
        self._listed_at = -LIST_S

    async def _place(self, name: str) -> str:
        """The object for a file or part of that name."""
        return f"{self._installation or await self._name_installation()}-{name}"

    async def _name_installation(self) -> str:
        now = self._clock()

        def work(connection: Connection) -> bytes:
            found = select(secret_rows.c.value).where(secret_rows.c.kind == "storage", secret_rows.c.id == "prefix")
            if (value := connection.scalar(found)) is None:
                value = secrets.token_hex(8).encode()
                row = {"kind": "storage", "id": "prefix", "value": value, "created_at": now}
                with suppress(IntegrityError), connection.begin_nested():  # another server was faster
                    connection.execute(insert(secret_rows).values(row))
                value = connection.execute(found).scalar_one()
            return bytes(value)

        self._installation = (await self._store.do(work)).decode()
        return self._installation

    # ---- answered pictures ----------------------------------------------------------------------------------------

    async def put(
        self,
        data: bytes,
        content_type: str,
        *,
        owner: str = LOCAL,
        ttl_s: float | None = None,
        access: Access | None = None,
    ) -> str:
        """Keep an answered picture; its name. Its row is on its way, before all that is asked of the store later.

        Args:
            ttl_s: how long, a year at most; by default the server's choice.

        Raises: Unavailable: it cannot be stored.
        """
        name = _token() + _SUFFIXES.get(content_type, "")
        place = await self._place(name)
        await self._objects.put(place, data)
        now = self._clock()
        row = {
            "name": name,
            "owner": owner,
            "place": place,
            "content_type": content_type,
            "size": len(data),
            "access": _packed(access or Access()),
            "created_at": now,
            "expires_at": now + min(self._ttl_s if ttl_s is None else ttl_s, LONGEST_S),
        }
        self._store.post(lambda connection: connection.execute(insert(files).values(row)))
        self._kept += len(data)
        if self._kept > self._limit_bytes:
            self._is_full.set()
        return name

    # ---- reading --------------------------------------------------------------------------------------------------

    async def open(self, name: str, reader: str | None) -> File:
        """The file ``name``, for the owner ``reader``; None is whoever has no key.

        Raises: NotFound: there is none, it has expired, or it is hidden; Forbidden: it is another's; Unavailable.
        """
        row = await self._row(name)
        decision = "hide" if row is None else _decide(row, reader)
        if decision == "hide":
            raise NotFound("there is no such file, or it has expired")
        if decision == "forbid":
            raise Forbidden("only its owner may read this file")
        return File(row.name, row.place, row.content_type, row.title, row.size)

    async def _row(self, name: str) -> Any:
        if not _NAME.fullmatch(name):
            return None
        now = self._clock()
        wanted = select(files).where(files.c.name == name, files.c.size.is_not(None), files.c.expires_at > now)
        return await self._store.do(lambda connection: connection.execute(wanted).first())

    async def stream(self, file: File, start: int = 0, end: int | None = None) -> AsyncGenerator[bytes, None]:
        """Its bytes from ``start`` to before ``end``, block by block; once begun, also if it expires meanwhile.

        Raises: NotFound: they are gone; Unavailable.
        """
        place = file.place
        self._reading[place] += 1
        try:
            async with aclosing(self._objects.stream(place, start, file.size if end is None else end)) as blocks:
                async for block in blocks:
                    yield block
        finally:
            self._reading[place] -= 1
            if not self._reading[place]:
                del self._reading[place]
                if place in self._leaving:
                    self._leaving.discard(place)
                    await self._objects.remove([place])

    async def own(self, url: str, *, owner: str = LOCAL) -> File | None:
        """The file of ours that ``url`` means, or None: gone, not for ``owner``, or not ours.

        Only its path is looked at, as a server does not know under which names it is reached: the names of our files
        cannot be guessed, so that one is known here says that it is ours.
        """
        try:
            return await self.open(name, owner) if (name := name_in(url)) else None
        except (NotFound, Forbidden):
            return None

    async def read(self, field: str, url: str, *, owner: str = LOCAL) -> bytes:
        """The bytes that a URL of ``owner`` means: a data URI, a file of ours, or an http or https URL of another host.

        They may be ``MAX_FETCH_BYTES``, and other hosts may take ``FETCH_S`` seconds.

        Raises:
            ImageError: a malformed data URI, or a file of ours that is gone, another's, or too large; names ``field``.
            DownloadError: another host's that cannot be fetched.
            InputError: some other address.
            Unavailable: our storage fails.
        """
        if url[:5].lower() == "data:":
            return await data_of(field, url)
        if file := await self.own(url, owner=owner):
            if file.size > MAX_FETCH_BYTES:
                raise ImageError(field, f"is larger than {MAX_FETCH_BYTES:,} bytes")
            try:
                return await self._objects.read(file.place)
            except NotFound:
                raise ImageError(field, _GONE) from None
        name = name_in(url)
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

    # ---- uploads --------------------------------------------------------------------------------------------------

    async def begin(
        self, content_type: Any, title: Any, *, owner: str = LOCAL, lifecycle: Lifecycle | None = None
    ) -> Upload:
        """A place for an upload, to be filled by ``write``, or by ``write_part`` and ``complete``.

        ``UNFINISHED_S`` seconds are left for each step.

        Args:
            content_type, title: as the client says, whatever that is; ``title`` is its own name for the file.

        Raises: TooLarge: the owner's uploads take all that they may; Overloaded: ``MOST_UNFINISHED`` of them are not
            complete; Unavailable.
        """
        wish = lifecycle or Lifecycle()
        kind = content_type if isinstance(content_type, str) and _CONTENT_TYPE.fullmatch(content_type) else None
        shown = _title(title) if isinstance(title, str) else ""
        upload = Upload(_token() + _suffix(shown, kind or ""), _token())
        now = self._clock()
        row = {
            "name": upload.name,
            "owner": owner,
            "upload": upload.secret,
            "content_type": kind or "application/octet-stream",
            "title": shown or None,
            "ttl_s": min(wish.ttl_s or self._upload_ttl_s, LONGEST_S),
            "access": _packed(wish.access),
            "created_at": now,
            "expires_at": now + UNFINISHED_S,
        }

        unfinished = select(func.count()).select_from(files).where(*_uploads(owner), files.c.size.is_(None))

        def work(connection: Connection) -> None:
            if int(connection.scalar(unfinished) or 0) >= MOST_UNFINISHED:
                raise Overloaded(f"{MOST_UNFINISHED} of your uploads are not complete; try again when some are")
            connection.execute(insert(files).values(row))
            self._check_quota(_used(connection, owner))

        await self._store.do(work)
        return upload

    async def write(self, upload: Upload, body: AsyncIterator[bytes], *, length: int | None = None) -> None:
        """Fill an upload with all of ``body``; it can be read once this returns.

        Args:
            length: bytes that ``body`` is said to have, where that is known.

        Raises:
            NotFound: there is no such upload, or it has expired; BadRequest: it is complete, or ``body`` is not as long
            as was said; TooLarge: over the limit of one file, or of its owner; Unavailable; whatever ``body`` raises.
            Nothing of it is kept then.
        """

        def look(connection: Connection) -> tuple[str, int]:
            row = self._going_on(connection, upload)
            return row.owner, _used(connection, row.owner)

        place = await self._place(_token())
        owner, used = await self._do(upload, look)
        written = await self._take(owner, place, body, length, self._upload_limit_bytes, used)

        def finish(connection: Connection) -> list[str]:
            return self._finish(connection, self._unfinished(connection, upload), place, written)

        await self._objects.remove(await self._settle(place, finish))

    async def write_part(
        self, upload: Upload, number: int, body: AsyncIterator[bytes], *, length: int | None = None
    ) -> str:
        """Keep part ``number`` (1 to ``MAX_PARTS``, in any order) of an upload, in place of an earlier one.

        Returns: its MD5 in hex.

        Raises: InputError: names ``partNumber``; otherwise as ``write``.
        """
        if not 1 <= number <= MAX_PARTS:
            raise InputError("partNumber", f"must be 1 to {MAX_PARTS}", "out_of_range")

        def others(connection: Connection) -> int:
            sizes = select(func.sum(parts.c.size)).where(parts.c.upload == upload.secret, parts.c.number != number)
            return int(connection.scalar(sizes) or 0)

        def look(connection: Connection) -> tuple[str, int, int]:
            row = self._going_on(connection, upload)
            return row.owner, _used(connection, row.owner), others(connection)

        place = await self._place(_token())
        owner, used, before = await self._do(upload, look)
        written = await self._take(owner, place, body, length, self._upload_limit_bytes - before, used)

        def keep(connection: Connection) -> list[str]:
            self._going_on(connection, upload)
            is_this = parts.c.upload == upload.secret, parts.c.number == number
            replaced = connection.scalars(delete(parts).where(*is_this).returning(parts.c.place)).all()
            part = {"place": place, "md5": written.md5, "size": written.size}
            connection.execute(insert(parts).values(upload=upload.secret, number=number, **part))
            if others(connection) + written.size > self._upload_limit_bytes:
                raise self._too_large()
            self._check_quota(_used(connection, owner))
            return list(replaced)

        await self._objects.remove(await self._settle(place, keep))
        return written.md5

    async def complete(self, upload: Upload, listed: Iterable[tuple[int, str]]) -> None:
        """Make one file of its parts, joined by their numbers; once more is harmless. Parts not listed are forgotten.

        Args:
            listed: numbers and MD5s, in any order.

        Raises:
            InputError: names ``parts``: a part is not here, is another than was listed, or is listed twice; otherwise
            as ``write``.
        """

        def look(connection: Connection) -> tuple[Any, list[Any], int] | None:
            row = self._upload(connection, upload)
            if row.size is not None:
                return None
            self._going_on(connection, upload)
            here = list(connection.execute(select(parts).where(parts.c.upload == upload.secret)).all())
            return row, here, _used(connection, row.owner)

        found = await self._do(upload, look)
        if found is None:
            return
        row, here, used = found
        chosen = _chosen(here, listed)
        size = sum(part.size for part in chosen)
        if size > self._upload_limit_bytes:
            raise self._too_large()
        if upload.secret not in self._joins:
            self._check_quota(used + self._arriving[row.owner])
            # Beside its parts it counts only for what comes later: who has room for one of them can have it joined.
            self._arriving[row.owner] += size
            join = self._joins[upload.secret] = asyncio.create_task(self._join(upload, chosen))
            join.add_done_callback(lambda done: self._on_joined(upload, row.owner, size, done))
        await asyncio.shield(self._joins[upload.secret])

    def _on_joined(self, upload: Upload, owner: str, size: int, join: asyncio.Task[None]) -> None:
        del self._joins[upload.secret]
        self._arrived(owner, size)
        if not join.cancelled():
            join.exception()  # known to whoever waits, and there may be nobody left

    async def _join(self, upload: Upload, chosen: list[Any]) -> None:
        """Make one file of its parts, for all who complete the upload."""

        def look(connection: Connection) -> bool:
            return self._upload(connection, upload).size is not None

        def finish(connection: Connection) -> list[str]:
            row = self._upload(connection, upload)
            return self._finish(connection, row, place, written) if row.size is None else [place]

        place = await self._place(_token())
        try:
            written = await self._objects.write(place, self._joined(chosen))
        except NotFound:
            if await self._do(upload, look):  # another server was quicker
                return
            raise BadRequest("its parts were changed while they were joined") from None
        await self._objects.remove(await self._settle(place, finish))

    async def _joined(self, chosen: list[Any]) -> AsyncIterator[bytes]:
        for part in chosen:
            async for block in self._objects.stream(part.place, 0, part.size):
                yield block

    async def _take(
        self, owner: str, place: str, body: AsyncIterator[bytes], length: int | None, limit: int, used: int
    ) -> Written:
        """Store ``body``. Raises: as ``write``."""
        if length is not None:
            if length > limit:
                raise self._too_large()
            self._check_quota(used + self._arriving[owner] + length)
        async with aclosing(self._counted(owner, body, length, limit, used)) as counted:
            return await self._objects.write(place, counted)

    async def _counted(
        self, owner: str, body: AsyncIterator[bytes], length: int | None, limit: int, used: int
    ) -> AsyncGenerator[bytes, None]:
        total = 0
        try:
            async for part in body:
                total += len(part)
                self._arriving[owner] += len(part)
                if total > limit:
                    raise self._too_large()
                self._check_quota(used + self._arriving[owner])
                yield part
            if length is not None and total != length:
                raise BadRequest(f"the body has {total} bytes, not {length} as it said")
        finally:
            self._arrived(owner, total)

    def _arrived(self, owner: str, size: int) -> None:
        self._arriving[owner] -= size
        self._arriving += Counter()  # without those that are at nought

    async def _do(self, upload: Upload, work: Callable[[Connection], T]) -> T:
        if not _NAME.fullmatch(upload.name) or not _TOKEN.fullmatch(upload.secret):
            raise _no_upload()
        return await self._store.do(work)

    async def _settle(self, place: str, work: Callable[[Connection], list[str]]) -> list[str]:
        """Write the row of a new object; what may be removed now. An object that got no row is removed at once."""
        try:
            return await self._store.do(work)
        except (NotFound, BadRequest, TooLarge):  # otherwise it is not known, and a row without bytes would be worse
            await self._objects.remove([place])
            raise

    def _upload(self, connection: Connection, upload: Upload) -> Any:
        is_this = files.c.name == upload.name, files.c.upload == upload.secret, files.c.expires_at > self._clock()
        row = connection.execute(select(files).where(*is_this).with_for_update()).first()
        if row is None or upload.owner not in (None, row.owner):
            raise _no_upload()
        return row

    def _unfinished(self, connection: Connection, upload: Upload) -> Any:
        row = self._upload(connection, upload)
        if row.size is not None:
            raise BadRequest(_COMPLETE)
        return row

    def _going_on(self, connection: Connection, upload: Upload) -> Any:
        """As ``_unfinished``; it is kept for a while from now on."""
        row = self._unfinished(connection, upload)
        until = self._clock() + UNFINISHED_S
        connection.execute(update(files).where(files.c.name == row.name).values(expires_at=until))
        return row

    def _finish(self, connection: Connection, row: Any, place: str, written: Written) -> list[str]:
        """Let ``row`` be read from now on; the objects that nobody needs any more."""
        until = self._clock() + row.ttl_s
        done = update(files).where(files.c.name == row.name)
        connection.execute(done.values(place=place, size=written.size, expires_at=until))
        joined = connection.scalars(delete(parts).where(parts.c.upload == row.upload).returning(parts.c.place)).all()
        self._check_quota(_used(connection, row.owner))
        return list(joined)

    def _check_quota(self, used: int) -> None:
        if used > self._upload_quota_bytes:
            raise TooLarge(f"your uploads take all of {self._upload_quota_bytes >> 20} MiB; try again when some expire")

    def _too_large(self) -> TooLarge:
        return TooLarge(f"it is larger than {self._upload_limit_bytes >> 20} MiB")

    # ---- sweeping -------------------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Remove what has expired, and what is too much as soon as it is, until cancelled."""
        while True:
            self._is_full.clear()
            try:
                await self.sweep()
            except LcmError:
                logger.exception("expired files could not be removed")
            await asyncio.sleep(_PAUSE_S)
            with suppress(TimeoutError):
                await asyncio.wait_for(self._is_full.wait(), SWEEP_S)

    async def sweep(self) -> None:
        """Remove what has expired, answered pictures beyond their limit, and bytes of ours that no row knows.

        Raises: Unavailable.
        """
        now = self._clock()
        expired = select(files.c.name).where(files.c.expires_at <= now).limit(_AT_ONCE)
        while await self._sweep_rows(lambda connection: connection.scalars(expired).all()):
            pass
        while await self._sweep_rows(self._beyond):
            pass
        if now - self._listed_at >= LIST_S:
            self._listed_at = now
            await self._remove_strays(now - STRAY_S)

    async def _sweep_rows(self, names: Callable[[Connection], Iterable[str]]) -> bool:
        def work(connection: Connection) -> list[tuple[str | None, str | None]]:
            gone = delete(files).where(files.c.name.in_(names(connection))).returning(files.c.place, files.c.upload)
            rows = [(place, upload) for place, upload in connection.execute(gone)]
            uploads = [upload for _, upload in rows if upload]
            lost = delete(parts).where(parts.c.upload.in_(uploads)).returning(parts.c.place)
            return rows + [(place, None) for place in connection.scalars(lost)]

        rows = await self._store.do(work)
        places = {place for place, _ in rows if place}
        self._leaving |= places & self._reading.keys()
        await self._objects.remove(places - self._leaving)
        return bool(rows)

    def _beyond(self, connection: Connection) -> list[str]:
        """Answered pictures, some hundreds at most, without which the others are within the limit: always the oldest
        of the owner who has most."""
        answered = files.c.upload.is_(None)
        sums = select(files.c.owner, func.sum(files.c.size)).where(answered).group_by(files.c.owner)
        heap = [(-int(size), owner) for owner, size in connection.execute(sums)]
        heapq.heapify(heap)
        total = -sum(size for size, _ in heap)
        self._metrics.file_bytes.set(total)
        self._kept = total
        oldest: dict[str, list[Any]] = {}  # of an owner, the oldest at the end
        names: list[str] = []
        while total > self._limit_bytes and len(names) < _AT_ONCE:
            size, owner = heap[0]
            if owner not in oldest:
                wanted = select(files.c.name, files.c.size).where(answered, files.c.owner == owner)
                found = connection.execute(wanted.order_by(files.c.created_at).limit(_AT_ONCE)).all()
                oldest[owner] = list(reversed(found))
            victim = oldest[owner].pop()
            names.append(victim.name)
            total -= victim.size
            heapq.heapreplace(heap, (size + victim.size, owner))
        return names

    async def _remove_strays(self, before: float) -> None:
        """Remove what looks like ours, has no row, and was written ``before`` (seconds since the epoch)."""
        start_of_ours = await self._place("")
        found = [
            name
            for name in await self._objects.names()
            if name.startswith(start_of_ours) and _NAME.fullmatch(name.removeprefix(start_of_ours))
        ]
        for start in range(0, len(found), _AT_ONCE):
            some = found[start : start + _AT_ONCE]
            known = await self._store.do(partial(_known, places=some))
            for name in set(some) - known - self._leaving:
                modified_at = await self._objects.modified_at(name)
                if modified_at is not None and modified_at < before:
                    await self._objects.remove([name])


def _token() -> str:
    return secrets.token_urlsafe(16)


def _no_upload() -> NotFound:
    return NotFound("there is no such upload, or it has expired")


def _title(name: str) -> str:
    """A client's file name, without its folders and all that is not to be seen, such as line ends; its last letters."""
    last = re.split(r"[/\\]", name)[-1]
    return "".join(letter for letter in last[-2 * _MAX_TITLE :] if letter.isprintable())[-_MAX_TITLE:].strip()


def _suffix(title: str, content_type: str) -> str:
    if match := _SUFFIX.search(title.lower()):
        return match[0]
    return _SUFFIXES.get(content_type.partition(";")[0].strip().lower(), "")


def _packed(access: Access) -> dict[str, Any] | None:
    return None if access == Access() else {"default": access.default, "rules": dict(access.rules)}


def _decide(row: Any, reader: str | None) -> str:
    if not row.access or reader == row.owner:
        return "allow"
    return str(row.access["rules"].get(reader, row.access["default"]))


def _uploads(owner: str) -> tuple[ColumnElement[bool], ...]:
    return files.c.owner == owner, files.c.upload.is_not(None)


def _used(connection: Connection, owner: str) -> int:
    """Bytes that the uploads of ``owner`` take, finished or not. Raises: TooLarge: there are too many."""
    finished = select(func.sum(files.c.size), func.count()).where(*_uploads(owner))
    of_unfinished = parts.join(files, parts.c.upload == files.c.upload)
    half = select(func.sum(parts.c.size), func.count()).select_from(of_unfinished)
    bytes_ = count = 0
    for rows in (finished, half.where(*_uploads(owner), files.c.size.is_(None))):
        size, number = connection.execute(rows).one()
        bytes_ += int(size or 0)
        count += int(number)
    if count > MOST_ROWS:
        raise TooLarge(f"your uploads are more than {MOST_ROWS:,} files and parts; try again when some expire")
    return bytes_ + _LEAST * count


def _known(connection: Connection, places: list[str]) -> set[str]:
    in_files = connection.scalars(select(files.c.place).where(files.c.place.in_(places)))
    in_parts = connection.scalars(select(parts.c.place).where(parts.c.place.in_(places)))
    return {*filter(None, in_files), *in_parts}


def _chosen(here: list[Any], listed: Iterable[tuple[int, str]]) -> list[Any]:
    """The parts that are ``listed``, by their numbers. Raises: InputError: names ``parts``."""
    found = {part.number: part for part in here}
    chosen: dict[int, Any] = {}
    for number, md5 in listed:
        part = found.get(number)
        if part is None:
            raise InputError("parts", f"part {number} is not here", "missing")
        if part.md5 != md5.lower():
            raise InputError("parts", f"part {number} is another: its etag is {part.md5}", "etag_mismatch")
        if number in chosen:
            raise InputError("parts", f"part {number} is listed twice", "duplicate")
        chosen[number] = part
    if not chosen:
        raise InputError("parts", "must list at least one part", "missing")
    return [chosen[number] for number in sorted(chosen)]

"""Rows that outlive the process: jobs, keys, secrets, files, deliveries. SQLite in the data folder, PostgreSQL by URL.

One thread owns the one connection, and callers send it functions of that connection. What arrives while a transaction
runs is done in the next one together (group commit), each in a savepoint of its own: a commit costs an fsync, and fifty
callers share it. *Accepted means committed*: ``do`` returns once its rows are on the disk.

This module holds the schema and the one way to it; what the rows mean is known to ``jobs``, ``auth``, ``files`` and
``webhooks``. Times are seconds since the epoch. What it logs and raises never has a row's values in it, nor the URL's
password.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import logging
import queue
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self, TypeVar

from sqlalchemy import (
    JSON,
    BigInteger,
    Boolean,
    Column,
    Connection,
    Engine,
    Float,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    String,
    Table,
    UniqueConstraint,
    create_engine,
    event,
    func,
    insert,
    inspect,
    make_url,
    select,
    text,
    update,
)
from sqlalchemy.exc import (
    ArgumentError,
    DataError,
    DBAPIError,
    IntegrityError,
    NotSupportedError,
    ProgrammingError,
    SQLAlchemyError,
)

from lcm_rt.errors import BadRequest, LcmError, Unavailable

logger = logging.getLogger(__name__)

VERSION = 1
"""Of the schema; a store of another version is refused."""

_MOST_AT_ONCE = 64  # functions in one transaction; PostgreSQL slows down beyond 64 savepoints
_MOST_OWED = 1000  # functions that are kept for when the store can be used again
_PATIENCE_S = 2  # with whoever else has locked what we need

# A server that is gone without a word is noticed, instead of being waited for; psycopg's names.
_POSTGRESQL = {
    "connect_timeout": 5,
    "keepalives_idle": 5,
    "keepalives_interval": 5,
    "keepalives_count": 2,
    "tcp_user_timeout": 10_000,
}

T = TypeVar("T")

metadata = MetaData()
_Large = BigInteger().with_variant(Integer, "sqlite")  # SQLite's are of 64 bits, and only they count up by themselves


def _where(rows: str) -> dict[str, Any]:
    """Options of an index of these rows alone."""
    return {f"{kind}_where": text(rows) for kind in ("sqlite", "postgresql")}


versions = Table("versions", metadata, Column("version", Integer, primary_key=True))

keys = Table(
    "keys",
    metadata,
    Column("id", String, primary_key=True),
    Column("hash", LargeBinary, nullable=False),  # SHA-256 of the secret, which is random and long
    Column("owner", String, nullable=False),
    Column("scopes", JSON, nullable=False),
    Column("created_at", Float, nullable=False),
    Column("expires_at", Float),
    Column("revoked_at", Float),
)

secrets = Table(
    "secrets",
    metadata,
    Column("kind", String, primary_key=True),
    Column("id", String, primary_key=True),
    Column("value", LargeBinary, nullable=False),
    Column("created_at", Float, nullable=False),
    Column("retired_at", Float),
)

jobs = Table(
    "jobs",
    metadata,
    Column("number", _Large, primary_key=True, autoincrement=True),  # their order
    Column("id", String, nullable=False, unique=True),
    Column("owner", String, nullable=False),
    Column("app", String, nullable=False),
    Column("base", String, nullable=False),  # where its client reached the server: answered pictures lie there
    Column("state", String, nullable=False),  # queued, running, done
    Column("low", Boolean, nullable=False),  # priority
    Column("idempotency_key", String),
    Column("webhook", String),
    Column("retries", Boolean, nullable=False),
    Column("lifecycle", String),  # of its answered pictures, as its client said it
    Column("created_at", Float, nullable=False),
    Column("start_before", Float),  # None once done
    Column("begun_at", Float),  # by an engine; None while it waits
    Column("done_at", Float),
    Column("expires_at", Float),
    Column("server", String),  # who runs it
    Column("lease_until", Float),
    Column("epoch", Integer, nullable=False),  # rises with each lease: only the last one's result is written
    Column("deaths", Integer, nullable=False),  # of engine processes under it
    Column("cancelled", Boolean, nullable=False),
    Column("status", Integer),  # HTTP status of the result
    Column("error", String),
    Column("error_type", String),
    Column("logs", JSON, nullable=False),
    Column("metrics", JSON),
    # Last, so that SQLite does not walk through their pages on its way to the others.
    Column("input", LargeBinary),  # JSON; forgotten once done
    Column("result", LargeBinary),  # JSON body
    UniqueConstraint("owner", "idempotency_key"),
    Index("jobs_by_turn", "state", "low", "number"),
    Index("jobs_by_deadline", "start_before"),
    Index("jobs_by_age", "expires_at"),
)

deliveries = Table(
    "deliveries",
    metadata,
    Column("id", String, primary_key=True),  # the event's, the same in every try
    Column("job", String, nullable=False),
    Column("owner", String, nullable=False),
    Column("url", String, nullable=False),
    Column("host", String, nullable=False),  # ... of the URL, with its port
    Column("body", LargeBinary, nullable=False),  # forgotten once done
    Column("tries", Integer, nullable=False),  # that have ended
    Column("created_at", Float, nullable=False),
    Column("due_at", Float, nullable=False),
    Column("lease_until", Float),
    Column("done_at", Float),
    Column("outcome", String),  # delivered, gone, given up
    Index("deliveries_by_turn", "done_at", "due_at"),
)

files = Table(
    "files",
    metadata,
    Column("name", String, primary_key=True),
    Column("owner", String, nullable=False),
    Column("upload", String),  # the secret that fills it; None: a picture that was answered
    Column("place", String),  # the object that holds its bytes
    Column("content_type", String, nullable=False),
    Column("title", String),  # the name its owner gave it
    Column("size", BigInteger),  # None until all of it is here
    Column("ttl_s", Float),  # how long it is kept from then on
    Column("access", JSON),  # who may read it, where that is not everybody who knows its name
    Column("created_at", Float, nullable=False),
    Column("expires_at", Float, nullable=False),
    Index("files_by_age", "expires_at"),
    # What an owner's uploads and pictures take is summed up from these alone.
    Index("uploads_by_owner", "owner", "size", "upload", **_where("upload IS NOT NULL")),
    Index("pictures_by_owner", "owner", "created_at", "size", "upload", **_where("upload IS NULL")),
    Index("files_by_place", "place"),
)

parts = Table(
    "parts",
    metadata,
    Column("upload", String, primary_key=True),
    Column("number", Integer, primary_key=True),
    Column("place", String, nullable=False, unique=True),
    Column("md5", String, nullable=False),
    Column("size", BigInteger, nullable=False),
    Index("parts_by_upload", "upload", "size", "number"),
)


class _Work:
    """A function that waits for its turn, and where its outcome goes; ``posted``: nobody waits for that."""

    __slots__ = ("call", "done", "error", "posted", "value")

    def __init__(
        self, call: Callable[[Connection], Any], done: Callable[[_Work], None], *, posted: bool = False
    ) -> None:
        self.call = call
        self.done = done
        self.posted = posted
        self.value: Any = None
        self.error: Exception | None = None


class Store:
    """A database, to be used as an async context, from one event loop.

    Args:
        url: as SQLAlchemy spells it; ``sqlite:////absolute/path`` or ``postgresql+psycopg://...``.

    Raises: LcmError: it is no such URL.
    """

    def __init__(self, url: str) -> None:
        try:
            self._url = make_url(url)
        except (ArgumentError, ValueError):
            raise LcmError("the store's URL is like sqlite:////folder/file or postgresql://user@host/name") from None
        self.is_sqlite = self._url.get_backend_name() == "sqlite"
        self._name = self._url.set(query={}).render_as_string()  # a password may be in the query, too
        self._queue: queue.SimpleQueue[_Work | None] = queue.SimpleQueue()
        self._is_open = False
        self._thread = threading.Thread(target=self._run, name="store")
        self._opened: Future[None] = Future()
        self._engine: Engine | None = None
        self._files = contextlib.ExitStack()
        self._lock: IO[bytes] | None = None
        self._turns: IO[bytes] | None = None

    async def __aenter__(self) -> Self:
        """Raises: LcmError: it cannot be opened, is damaged, or is of another version."""
        self._thread.start()
        try:
            await asyncio.shield(asyncio.wrap_future(self._opened))
        except BaseException:
            self._queue.put(None)
            raise
        self._is_open = True
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """What was handed over is done first."""
        self._is_open = False
        self._queue.put(None)
        await asyncio.to_thread(self._thread.join)

    async def do(self, work: Callable[[Connection], T]) -> T:
        """Run ``work`` in a transaction; its value, once that is committed. To be cancelled here undoes nothing.

        ``work`` shares its transaction with others, so it neither commits nor rolls back; an error that it means to
        survive, it catches around a ``connection.begin_nested()`` of its own.

        Raises: whatever ``work`` raises, and then nothing of it was done; BadRequest: a value that no column can hold,
            such as text with a NUL; Unavailable: the store cannot be used now, or is closed.
        """
        loop = asyncio.get_running_loop()
        future: asyncio.Future[T] = loop.create_future()

        def settle(done: _Work) -> None:
            if future.done():
                return
            if done.error:
                future.set_exception(done.error)
            else:
                future.set_result(done.value)

        def tell(done: _Work) -> None:
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
                loop.call_soon_threadsafe(settle, done)

        self._hand_over(_Work(work, tell))
        return await future

    def post(self, work: Callable[[Connection], Any]) -> None:
        """As ``do``, for what nobody waits for: it is done before all that is handed over later, also where that has to
        wait until the store can be used again.

        Raises: Unavailable: it is closed. What ``work`` raises is only logged.
        """

        def tell(done: _Work) -> None:
            if done.error:
                logger.error("a row could not be written", exc_info=done.error)

        self._hand_over(_Work(work, tell, posted=True))

    def _hand_over(self, work: _Work) -> None:
        if not self._is_open:
            raise Unavailable("the server is not storing anything now")
        self._queue.put(work)

    def _run(self) -> None:
        """The thread: it opens, works, and closes."""
        try:
            self._open()
        except Exception as error:  # noqa: BLE001
            self._close()
            self._opened.set_exception(error)
            return
        self._opened.set_result(None)
        ended = False
        owed: list[_Work] = []  # posted, in transactions that failed
        while not ended:
            batch = [self._queue.get()]
            with contextlib.suppress(queue.Empty):
                while len(batch) < _MOST_AT_ONCE:
                    batch.append(self._queue.get_nowait())
            ended = None in batch
            works = [*owed, *(work for work in batch if work)]
            failed = bool(works) and not self._transact(works)
            owed = [work for work in works if work.posted][-_MOST_OWED:] if failed and not ended else []
            for work in works:
                if work not in owed:
                    work.done(work)
        self._close()

    def _open(self) -> None:
        try:
            if self.is_sqlite:
                self._open_sqlite()
            elif self._url.get_backend_name() == "postgresql":
                self._open_postgresql()
            else:
                raise LcmError("it is neither SQLite nor PostgreSQL")
            assert self._engine
            alone = self._is_alone()
            with self._turn(), self._engine.begin() as connection:
                if alone:
                    _check(connection)
                elif not self.is_sqlite:
                    connection.execute(select(func.pg_advisory_xact_lock(zlib.crc32(b"lcm-rt"))))  # two begin at once
                _prepare(connection)
                if alone:
                    _end_leases(connection)
            if self._lock:
                fcntl.flock(self._lock, fcntl.LOCK_SH)
        except (LcmError, SQLAlchemyError, OSError, ImportError) as error:
            # Without the cause: a traceback of it tells nothing more, and might tell the password.
            raise LcmError(f"the store {self._name} cannot be opened: {_reason(error)}") from None

    def _open_sqlite(self) -> None:
        if not self._url.database or self._url.database == ":memory:":
            raise LcmError("it has no file")
        path = Path(self._url.database)
        path.parent.mkdir(parents=True, exist_ok=True)
        self._lock = self._files.enter_context(path.with_name(f"{path.name}.lock").open("wb"))
        self._turns = self._files.enter_context(path.with_name(f"{path.name}.turn").open("wb"))
        if not path.exists():
            path.touch(mode=0o600)  # there are secrets in it; the files that SQLite makes beside it are as this one
        self._engine = create_engine(
            self._url, pool_size=1, max_overflow=0, connect_args={"timeout": _PATIENCE_S}, hide_parameters=True
        )
        event.listen(self._engine, "connect", _on_connect_sqlite)
        event.listen(self._engine, "begin", _on_begin_sqlite)

    def _open_postgresql(self) -> None:
        chosen = {name: value for name, value in _POSTGRESQL.items() if name not in self._url.query}
        # Looked at before each use: a database may be started again under us.
        self._engine = create_engine(
            self._url, pool_size=1, max_overflow=0, pool_pre_ping=True, connect_args=chosen, hide_parameters=True
        )
        event.listen(self._engine, "connect", _on_connect_postgresql)

    def _is_alone(self) -> bool:
        """Nobody else has the file open, and nobody will until the lock is a shared one."""
        if not self._lock:
            return False
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            fcntl.flock(self._lock, fcntl.LOCK_SH)  # whoever is alone now is opening it
            return False
        return True

    @contextlib.contextmanager
    def _turn(self) -> Iterator[None]:
        """Keep other processes from this SQLite file, whose own locks do not suffice.

        Before 3.51.3 it loses rows if one connection copies the log into the database, as it does after a commit, while
        another commits and begins the log anew. Raises: TimeoutError.
        """
        if not self._turns:
            yield
            return
        end = time.monotonic() + _PATIENCE_S
        while True:
            try:
                fcntl.flock(self._turns, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > end:
                    raise TimeoutError("another process keeps it") from None
                time.sleep(0.002)
        try:
            yield
        finally:
            fcntl.flock(self._turns, fcntl.LOCK_UN)

    def _close(self) -> None:
        with self._files:
            if self._engine:
                with contextlib.suppress(TimeoutError), self._turn():
                    self._engine.dispose()

    def _transact(self, works: list[_Work]) -> bool:
        """Run functions, each into its ``value`` or ``error``; False: none of them is done, for no fault of theirs."""
        assert self._engine
        try:
            with self._turn(), self._engine.begin() as connection:
                for work in works:
                    work.error = None
                    savepoint = connection.begin_nested()
                    try:
                        work.value = work.call(connection)
                        savepoint.commit()
                    except Exception as error:  # noqa: BLE001
                        work.error = _told(error)
                        savepoint.rollback()  # fails if the error has ended the transaction, as a full disk does
        except Exception as error:  # noqa: BLE001
            # The connection is lost, or the disk is full, or another process keeps it: nothing of it was done.
            logger.error("the store cannot be used: %s", _reason(error))
            for work in works:
                work.error = _unavailable(error)
            return False
        return True


def _check(connection: Connection) -> None:
    told = connection.exec_driver_sql("PRAGMA quick_check(1)").scalar()
    if told != "ok":
        raise LcmError(f"it is damaged ({told}); move it away to begin with an empty one")


def _prepare(connection: Connection) -> None:
    """Make the tables, or see that they are ours. Raises: LcmError."""
    present = metadata.tables.keys() & set(inspect(connection).get_table_names())
    if not present:
        metadata.create_all(connection)
        connection.execute(insert(versions).values(version=VERSION))
    elif versions.name not in present:
        raise LcmError(f"another program has its {', '.join(sorted(present))} there")
    elif (found := connection.scalar(select(versions.c.version))) != VERSION:
        raise LcmError(f"it is of version {found}, not {VERSION}")


def _end_leases(connection: Connection) -> None:
    """Nobody else is there, so whoever held a lease was killed: its work need not wait for the end of it."""
    for table in (jobs, deliveries):
        connection.execute(update(table).where(table.c.lease_until.is_not(None)).values(lease_until=0.0))


def _told(error: Exception) -> Exception:
    """What the one who sent a function that raised ``error`` hears."""
    if isinstance(error, DataError | OverflowError | UnicodeEncodeError):
        logger.warning("a value does not fit: %s", _reason(error))
        return BadRequest("there is a value in this request that cannot be stored")
    if isinstance(error, IntegrityError | ProgrammingError | NotSupportedError):
        return type(error)(None, None, _Bare(_reason(error))).with_traceback(error.__traceback__)
    if isinstance(error, DBAPIError):
        logger.error("the store refused: %s", _reason(error))
        return _unavailable(error)
    if isinstance(error, StopIteration):  # which a future cannot hold
        return RuntimeError("a function for the store raised StopIteration").with_traceback(error.__traceback__)
    return error


class _Bare(Exception):
    """In the place of a driver's exception, which may tell the row."""


def _unavailable(error: Exception) -> Unavailable:
    return Unavailable("the server cannot store this now; try again soon").with_traceback(error.__traceback__)


def _reason(error: Exception) -> str:
    """In words; PostgreSQL shows rows from the second line on, and in the first where they do not fit a column."""
    driver = getattr(error, "orig", None) or error
    words = str(driver)
    if getattr(driver, "sqlstate", None):
        words = words.partition("\n")[0]
    if isinstance(error, DataError | UnicodeEncodeError):
        words = type(driver).__name__
    return " ".join(words.split())


def _on_connect_sqlite(connection: Any, record: Any) -> None:
    """Durable before told; and transactions are begun by us, or sqlite3 would commit in the middle of savepoints."""
    connection.isolation_level = None
    for pragma in ("journal_mode=WAL", "synchronous=FULL", "foreign_keys=ON", "trusted_schema=OFF"):
        connection.execute(f"PRAGMA {pragma}")


def _on_begin_sqlite(connection: Connection) -> None:
    connection.exec_driver_sql("BEGIN IMMEDIATE")


def _on_connect_postgresql(connection: Any, record: Any) -> None:
    connection.execute(f"SET lock_timeout = '{_PATIENCE_S}s'")
    connection.commit()

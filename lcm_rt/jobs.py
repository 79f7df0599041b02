"""The queue's rows and their rules: who is next, whose result counts, what is over; knows no engine and no HTTP.

A job is ``queued``, ``running`` or ``done``. Whoever *claims* it has a lease, to be *renewed*, and an epoch: when the
lease lapses, the job is queued again in its old place, and what the former holder says about it no longer counts. So a
job is run at least once, and its outcome is written once and never changed. A *begun* job is one that an engine works
on: until then its clients see it waiting, whoever holds it.

What a job comes to and the event for its webhook are one transaction.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Literal, Protocol

import orjson
from sqlalchemy import ColumnElement, Connection, and_, delete, func, insert, not_, null, or_, select, update
from sqlalchemy.exc import IntegrityError

from lcm_rt import webhooks, wire
from lcm_rt.errors import BadRequest, LcmError, NotFound, Overloaded
from lcm_rt.store import Store, jobs

SAME_JOB_S = 86400.0
"""How long the same idempotency key means the same job."""

MAX_DEATHS = 2
"""Of engine processes under one job: then it is taken for the cause, and failed."""

MAX_WAITING_BYTES = 2 * 2**30
"""Of the inputs of all jobs that wait."""

Log = dict[str, str]
"""One line: ``message``, ``level``, ``source`` and ``timestamp``."""


@dataclass(frozen=True, slots=True)
class Job:
    """A row, without its result. ``position`` says how many will begin before it, None once it has begun."""

    number: int
    id: str
    owner: str
    app: str
    base: str
    state: Literal["queued", "running", "done"]
    low: bool
    retries: bool
    lifecycle: str | None
    created_at: float
    start_before: float | None
    begun_at: float | None
    done_at: float | None
    epoch: int
    deaths: int
    cancelled: bool
    status: int | None
    error: str | None
    error_type: str | None
    logs: list[Log]
    metrics: dict[str, float] | None
    position: int | None = None
    input: bytes | None = field(default=None, repr=False)  # only for who claims it


_COLUMNS = [jobs.c[f.name] for f in fields(Job) if f.name in jobs.c and f.name != "input"]


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a job comes to: the HTTP status and JSON body of its result, and why it failed, if it did."""

    status: int
    body: bytes = field(repr=False)
    error: str | None = None
    error_type: str | None = None

    @classmethod
    def of(cls, error: LcmError) -> Outcome:
        return cls(error.status, wire.error_body(error), str(error), error.code)


def _refusal(status: int, kind: str, message: str) -> Outcome:
    """A failure of the queue's own, under the platform's name for it."""
    body = orjson.dumps({"detail": message, "message": message, "error_type": kind})
    return Outcome(status, body, message, kind)


TIMED_OUT = _refusal(504, "request_timeout", "Request timed out: it did not begin in the time that it was given")
CANCELLED = _refusal(499, "client_cancelled", "Request cancelled by the client.")
KILLER = _refusal(500, "runner_server_error", "The engine process ended under this request.")


@dataclass(frozen=True, slots=True)
class Swept:
    """``ended``: the ids of jobs that are done now. ``due``: when there is something to sweep again, if ever."""

    ended: list[str]
    due: float | None


class Deliver(Protocol):
    """Has a webhook's event delivered, once the transaction of ``connection`` is committed."""

    def __call__(self, connection: Connection, *, job_id: str, owner: str, url: str, body: bytes) -> None: ...


class Jobs:
    """The ``jobs`` table. Every method is one transaction, and may raise Unavailable, with nothing done.

    Args:
        deliver: takes the events for webhooks.
        clock: seconds since the epoch.
        max_jobs, max_jobs_per_owner, max_bytes: of what waits.
        result_ttl_s: how long a done job is kept.
    """

    def __init__(
        self,
        store: Store,
        *,
        deliver: Deliver,
        clock: Callable[[], float] = time.time,
        max_jobs: int,
        max_jobs_per_owner: int,
        result_ttl_s: float,
        max_bytes: int = MAX_WAITING_BYTES,
    ) -> None:
        self._store = store
        self._deliver = deliver
        self._clock = clock
        self._max_jobs = max_jobs
        self._max_jobs_per_owner = max_jobs_per_owner
        self._max_bytes = max_bytes
        self._result_ttl_s = result_ttl_s

    @property
    def is_shared(self) -> bool:
        """Other servers may work on the same rows."""
        return not self._store.is_sqlite

    async def accept(
        self,
        *,
        owner: str,
        app: str,
        base: str,
        input: bytes,
        low: bool = False,
        start_within_s: float | None = None,
        retries: bool = True,
        webhook: str | None = None,
        lifecycle: str | None = None,
        idempotency_key: str | None = None,
    ) -> Job:
        """A new job, committed; or the one that the owner gave the same key to within a day, whatever it has come to.

        Args:
            app: its id, without a path. base: where its client reaches files. input: JSON.
            retries: it may be run again after an engine process died under it.

        Raises: Overloaded.
        """

        def work(connection: Connection) -> Job:
            now = self._clock()
            if idempotency_key is not None:
                same = and_(jobs.c.owner == owner, jobs.c.idempotency_key == idempotency_key)
                if found := self._find(connection, and_(same, jobs.c.created_at > now - SAME_JOB_S)):
                    return found
                late = jobs.c.created_at <= now - SAME_JOB_S  # looked at again: another server may have been faster
                connection.execute(update(jobs).where(same, late).values(idempotency_key=None))
            self._require_room(connection, owner, len(input))
            row = {
                "id": str(uuid.uuid4()),
                "owner": owner,
                "app": app,
                "base": base,
                "state": "queued",
                "low": low,
                "input": input,
                "idempotency_key": idempotency_key,
                "webhook": webhook,
                "retries": retries,
                "lifecycle": lifecycle,
                "created_at": now,
                "start_before": None if start_within_s is None else now + start_within_s,
                "epoch": 0,
                "deaths": 0,
                "cancelled": False,
                "logs": [],
            }
            mine = jobs.c.id == row["id"]
            try:
                with connection.begin_nested():
                    connection.execute(insert(jobs).values(row))
            except IntegrityError:
                if idempotency_key is None:
                    raise
                mine = same  # another server was faster with the same key
            job = self._find(connection, mine)
            assert job
            return job

        return await self._store.do(work)

    def _require_room(self, connection: Connection, owner: str, size: int) -> None:
        waiting, owned, waiting_bytes = connection.execute(
            select(
                func.count(),
                func.count().filter(jobs.c.owner == owner),
                func.coalesce(func.sum(func.length(jobs.c.input)), 0),
            ).where(jobs.c.state == "queued")
        ).one()
        if owned >= self._max_jobs_per_owner:
            raise Overloaded(f"{owned} of your jobs are waiting already; try again later")
        if waiting >= self._max_jobs or waiting_bytes + size > self._max_bytes:
            raise Overloaded(f"{waiting} jobs are waiting already; try again later")

    async def look(self, id: str, *, owner: str | None = None, app: str | None = None) -> Job:
        """How far a job is. With ``owner`` and ``app``, only if it is theirs. Raises: NotFound."""
        return await self._store.do(lambda connection: self._require(connection, id, owner, app))

    async def result(self, id: str, *, owner: str | None = None, app: str | None = None) -> Outcome:
        """What a job came to. Raises: NotFound: there is none such, or it has expired; BadRequest: it is not done."""

        def work(connection: Connection) -> Outcome:
            job = self._require(connection, id, owner, app)
            if job.state != "done":
                raise BadRequest("the request is still in progress")
            fresh = and_(jobs.c.number == job.number, jobs.c.expires_at > self._clock())
            body = connection.scalar(select(jobs.c.result).where(fresh))
            if body is None:
                raise NotFound("the result of this request has expired")
            assert job.status
            return Outcome(job.status, body, job.error, job.error_type)

        return await self._store.do(work)

    def _require(self, connection: Connection, id: str, owner: str | None, app: str | None) -> Job:
        job = self._find(connection, jobs.c.id == id)
        if job is None or owner not in (None, job.owner) or app not in (None, job.app):
            raise NotFound("there is no such request here")
        return job

    def _find(self, connection: Connection, which: ColumnElement[bool]) -> Job | None:
        row = connection.execute(select(*_COLUMNS).where(which)).first()
        if row is None:
            return None
        return Job(**row._mapping, position=self._position(connection, row))

    def _position(self, connection: Connection, job: Any) -> int | None:
        """How many begin before ``job``; what is claimed does so before what is queued."""
        if job.state == "done" or job.begun_at is not None:
            return None
        earlier = jobs.c.number < job.number
        turn = or_(not_(jobs.c.low), earlier) if job.low else and_(not_(jobs.c.low), earlier)
        claimed = and_(jobs.c.state == "running", jobs.c.begun_at.is_(None))
        before = and_(jobs.c.state == job.state, turn)
        which = before if job.state == "queued" else and_(before, claimed)
        count = select(func.count()).select_from(jobs)
        held = 0 if job.state == "running" else connection.scalar(count.where(claimed))
        return int(held or 0) + int(connection.scalar(count.where(which)) or 0)

    async def claim(
        self, server: str, *, lease_s: float, busy: bool = False, crowded: Collection[str] = ()
    ) -> Job | None:
        """Take the next job to run, with its input: normal before low, oldest first. None if there is none.

        Args:
            busy: the server runs other jobs. One that an engine process died under may not run beside them, so that
                a second death tells who is the cause; while it is next, nobody is.
            crowded: owners whose jobs have to wait, because they have many places already.
        """

        def work(connection: Connection) -> Job | None:
            now = self._clock()
            row = connection.execute(
                select(*_COLUMNS, jobs.c.input)
                .where(jobs.c.state == "queued", or_(jobs.c.start_before.is_(None), jobs.c.start_before > now))
                .where(jobs.c.owner.not_in(crowded))
                .order_by(jobs.c.low, jobs.c.number)
                .limit(1)
                .with_for_update(skip_locked=True)
            ).first()
            if row is None or (busy and row.deaths):
                return None
            lease: dict[str, Any] = {"state": "running", "epoch": row.epoch + 1}
            connection.execute(
                update(jobs)
                .where(jobs.c.number == row.number)
                .values(**lease, server=server, lease_until=now + lease_s)
            )
            return Job(**{**row._mapping, **lease})

        return await self._store.do(work)

    async def renew(self, held: Mapping[str, int], *, lease_s: float) -> set[str]:
        """Lengthen the leases of jobs, given by id and epoch.

        Returns: those to stop, because their cancellation was asked, or they are done or somebody else's by now.
        """

        def work(connection: Connection) -> set[str]:
            until = self._clock() + lease_s
            stop = set()
            for id, epoch in held.items():
                mine = _held(id, epoch)
                cancelled = connection.scalar(
                    update(jobs).where(mine).values(lease_until=until).returning(jobs.c.cancelled)
                )
                if cancelled is not False:
                    stop.add(id)
            return stop

        return await self._store.do(work)

    async def begin(self, id: str, epoch: int, logs: list[Log]) -> bool:
        """An engine works on a job. False: it is not to be run any more."""
        begun = update(jobs).where(_held(id, epoch)).values(begun_at=self._clock(), logs=logs)
        return await self._store.do(lambda connection: connection.execute(begun).rowcount == 1)

    async def finish(
        self, id: str, epoch: int, outcome: Outcome, *, logs: list[Log], metrics: dict[str, float] | None = None
    ) -> bool:
        """Write what a job came to. False: it is done already, or somebody else's by now, and nothing is written."""

        def work(connection: Connection) -> bool:
            return bool(self._end(connection, _held(id, epoch), outcome, logs=logs, metrics=metrics or null()))

        return await self._store.do(work)

    async def release(self, id: str, epoch: int, *, logs: list[Log], died: bool = False) -> bool:
        """Give a job back: it is queued again in its old place, unless its cancellation was asked.

        Args:
            died: the engine process did, under this job. Twice, and it is failed; once, if it has no retries.

        Returns: whether it was still the caller's.
        """

        def work(connection: Connection) -> bool:
            mine = _held(id, epoch)
            row = connection.execute(
                update(jobs)
                .where(mine)
                .values(deaths=jobs.c.deaths + int(died), logs=logs)
                .returning(jobs.c.deaths, jobs.c.retries, jobs.c.cancelled)
            ).first()
            if row is None:
                return False
            if died and not row.cancelled and (row.deaths >= MAX_DEATHS or not row.retries):
                self._end(connection, mine, KILLER)
            else:
                self._give_back(connection, mine)
            return True

        return await self._store.do(work)

    async def leave(self, server: str) -> None:
        """Give back all that a server runs, as ``release`` does."""
        mine = and_(jobs.c.state == "running", jobs.c.server == server)
        await self._store.do(lambda connection: self._give_back(connection, mine))

    async def cancel(self, id: str, *, owner: str | None = None, app: str | None = None) -> bool:
        """A job that has not begun never will; of one that has, whoever runs it is asked to stop.

        Returns: False if it is done already. Raises: NotFound.
        """

        def work(connection: Connection) -> bool:
            job = self._require(connection, id, owner, app)
            mine = and_(jobs.c.number == job.number, jobs.c.state != "done")
            if self._end(connection, and_(mine, jobs.c.begun_at.is_(None)), CANCELLED, cancelled=True):
                return True
            return connection.execute(update(jobs).where(mine).values(cancelled=True)).rowcount == 1

        return await self._store.do(work)

    async def sweep(self) -> Swept:
        """See to what time brings: leases that lapsed, jobs too late to begin or to begin again, old results."""

        def work(connection: Connection) -> Swept:
            now = self._clock()
            ended = self._give_back(connection, and_(jobs.c.state == "running", jobs.c.lease_until <= now))
            ended += self._end(connection, and_(jobs.c.start_before <= now, jobs.c.begun_at.is_(None)), TIMED_OUT)
            self._expire(connection, now)
            dues = connection.execute(
                select(
                    select(func.min(jobs.c.lease_until)).where(jobs.c.state == "running").scalar_subquery(),
                    select(func.min(jobs.c.start_before)).where(jobs.c.begun_at.is_(None)).scalar_subquery(),
                    select(func.min(jobs.c.expires_at)).scalar_subquery(),
                )
            ).one()
            return Swept(ended, min((due for due in dues if due is not None), default=None))

        return await self._store.do(work)

    def _expire(self, connection: Connection, now: float) -> None:
        """Forget what is too old; of a job whose idempotency key still counts, only the result."""
        old = jobs.c.expires_at <= now
        named = and_(jobs.c.idempotency_key.is_not(None), jobs.c.created_at > now - SAME_JOB_S)
        connection.execute(
            update(jobs).where(old, named).values(result=None, expires_at=jobs.c.created_at + SAME_JOB_S)
        )
        connection.execute(delete(jobs).where(old, not_(named)))

    def _give_back(self, connection: Connection, which: ColumnElement[bool]) -> list[str]:
        """Queue running jobs again; those whose cancellation was asked are done, and their ids are returned."""
        ended = self._end(connection, and_(which, jobs.c.cancelled), CANCELLED)
        connection.execute(
            update(jobs).where(which).values(state="queued", server=None, lease_until=None, begun_at=None)
        )
        return ended

    def _end(self, connection: Connection, which: ColumnElement[bool], outcome: Outcome, **more: Any) -> list[str]:
        """Write what jobs came to, tell their webhooks, forget their inputs; their ids."""
        now = self._clock()
        rows: Iterable[Any] = connection.execute(
            update(jobs)
            .where(which)
            .values(
                state="done",
                input=None,
                server=None,
                lease_until=None,
                start_before=None,
                done_at=now,
                expires_at=now + self._result_ttl_s,
                status=outcome.status,
                result=outcome.body,
                error=outcome.error,
                error_type=outcome.error_type,
                **more,
            )
            .returning(jobs.c.id, jobs.c.owner, jobs.c.webhook)
        ).all()
        for row in rows:
            if row.webhook is not None:
                body = webhooks.body(row.id, outcome.status, outcome.body)
                self._deliver(connection, job_id=row.id, owner=row.owner, url=row.webhook, body=body)
        return [row.id for row in rows]


def _held(id: str, epoch: int) -> ColumnElement[bool]:
    return and_(jobs.c.id == id, jobs.c.state == "running", jobs.c.epoch == epoch)

"""Runs the queue's jobs, a few at a time, through the same road as all other work; knows no SQL and no HTTP.

Whatever holds a job up that is not its own fault is waited for: a model that loads, an engine that is full or being
started again. An engine process that dies under jobs makes each of them a suspect, which from then on runs alone, so
that only the culprit is under a second one. A server that stops gives back what it runs, for the next to run at once.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
import weakref
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from typing import TypeVar

import orjson

from lcm_rt import wire
from lcm_rt.auth import LOCAL
from lcm_rt.errors import EngineLost, LcmError, Overloaded, Unavailable
from lcm_rt.files import lifecycle_of
from lcm_rt.jobs import CANCELLED, Job, Jobs, Log, Outcome
from lcm_rt.service import Service
from lcm_rt.types import GenerateInput, GenerateOutput
from lcm_rt.webhooks import Webhooks

logger = logging.getLogger(__name__)

SHARED_POLL_S = 1.0
"""How often jobs are looked for that another server accepted."""

POLL_S = 30.0
LOOK_S = 0.5
"""How often a status stream looks for what happened at another server."""
LOOK_ALONE_S = 5.0
"""... where there can hardly be one."""
WAITING_PER_SLOT = 8
"""How many jobs may be claimed for each that runs, the others waiting for their models."""
MOST_LEASES = 10
"""After so many, an engine's death is blamed on the job, whoever else was there."""

T = TypeVar("T")

_FIRST_PAUSE_S = 0.1
_LAST_PAUSE_S = 2.0
_STORE_PAUSE_S = 1.0
_MOST_TRIES = 150  # some five minutes


@dataclass(eq=False, slots=True)
class _Run:
    """A claimed job, from its claim until its outcome is written."""

    job: Job
    logs: list[Log]
    task: asyncio.Task[None] | None = None
    begun: asyncio.Event = field(default_factory=asyncio.Event)
    begun_at: float = 0.0  # of time.perf_counter
    started: bool = False  # its task has taken its first step; one that is cancelled before never takes any
    stopped: bool = False  # by its client, or because it is not ours any more
    waiting: bool = False  # for its model

    def begin(self) -> None:
        if not self.begun.is_set():
            self.begun_at = time.perf_counter()
            self.begun.set()


class Queue:
    """A server's share of the queue.

    Args:
        webhooks: woken when a job is done.
        server: a name that no other server has.
        running_jobs: how many jobs are run at a time.
        lease_s: how long after this server's death others take its jobs.
    """

    def __init__(
        self,
        jobs: Jobs,
        service: Service,
        webhooks: Webhooks,
        *,
        server: str,
        running_jobs: int,
        lease_s: float = 15.0,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._jobs = jobs
        self._service = service
        self._webhooks = webhooks
        self._server = server
        self._running_jobs = running_jobs
        self._lease_s = lease_s
        self._clock = clock
        self._running: dict[str, _Run] = {}
        self._renew_at = 0.0
        self._stopping = False
        self._news = asyncio.Event()
        self._watched: weakref.WeakValueDictionary[str, asyncio.Event] = weakref.WeakValueDictionary()

    async def run(self) -> None:
        """Run jobs until cancelled; then give back those under way."""
        self._stopping = False
        try:
            async with asyncio.TaskGroup() as tasks:
                try:
                    while True:
                        self._news.clear()
                        due = await self._turn(tasks)
                        with contextlib.suppress(TimeoutError):
                            async with asyncio.timeout(max(due - self._clock(), 0)):
                                await self._news.wait()
                finally:
                    self._stopping = True
        finally:
            with contextlib.suppress(Unavailable):  # then their leases lapse
                await self._jobs.leave(self._server)

    def wake(self) -> None:
        """A job was accepted: there may be room for it."""
        self._news.set()

    async def _turn(self, tasks: asyncio.TaskGroup) -> float:
        """Renew leases, see to what time brings, claim what there is room for; when to do so again."""
        now = self._clock()
        due = now + (SHARED_POLL_S if self._jobs.is_shared else POLL_S)
        try:
            if self._running and now >= self._renew_at:
                held = {id: run.job.epoch for id, run in self._running.items()}
                for id in await self._jobs.renew(held, lease_s=self._lease_s):
                    self._stop(id)
                self._renew_at = now + self._lease_s / 3
            swept = await self._jobs.sweep()
            for id in swept.ended:
                self._stop(id)
                self._tell(id)
            while job := await self._claim():
                if not self._running:
                    self._renew_at = now + self._lease_s / 3
                self._running[job.id] = run = _Run(job, list(job.logs))
                run.task = tasks.create_task(self._work(run))
                run.task.add_done_callback(partial(self._ended, run))
                self._tell_all()  # who waits behind it has moved on
        except Unavailable as error:
            logger.warning("the queue has to wait: %s", error)
            return now + _STORE_PAUSE_S
        dues = [due, *([self._renew_at] if self._running else []), *([] if swept.due is None else [swept.due])]
        return min(dues)

    async def _claim(self) -> Job | None:
        """The next job, if there is room for it beside those that run."""
        runs = self._running.values()
        active = [run for run in runs if not run.waiting]
        full = len(active) >= self._running_jobs or len(runs) >= self._running_jobs * WAITING_PER_SLOT
        if self._service.workers.failure or full or any(run.job.deaths for run in runs):
            return None
        # One place is kept free of each owner: pictures that take long to fetch hold up their own jobs only.
        owners = Counter(run.job.owner for run in active if run.job.owner != LOCAL)
        crowded = [owner for owner, count in owners.items() if count >= max(self._running_jobs - 1, 1)]
        return await self._jobs.claim(self._server, lease_s=self._lease_s, busy=bool(runs), crowded=crowded)

    async def _work(self, run: _Run) -> None:
        run.started = True
        try:
            if not run.stopped:
                await self._settle(run)
        except asyncio.CancelledError:
            if not run.stopped:
                raise
        except Exception:
            logger.exception("what a job came to could not be written; it is run again once its lease lapses")
        if run.stopped:  # nobody wants it, or it is not ours any more, and then this changes nothing
            with contextlib.suppress(Unavailable):
                await self._jobs.finish(run.job.id, run.job.epoch, CANCELLED, logs=run.logs)

    def _ended(self, run: _Run, task: asyncio.Task[None]) -> None:
        if self._running.get(run.job.id) is run:
            del self._running[run.job.id]
        self._tell(run.job.id)
        self.wake()

    async def _settle(self, run: _Run) -> None:
        """Run a job, and write what it comes to."""
        job = run.job
        metrics = None
        try:
            outcome, metrics = await self._outcome(run)
        except EngineLost as error:
            self._log(run, str(error), "ERROR")
            # A second death tells of this job only where nothing else was at the engine, a client's message say.
            tells = error.alone or not job.deaths or job.epoch >= MOST_LEASES
            died = not self._stopping and tells
            await self._stored(lambda: self._jobs.release(job.id, job.epoch, logs=run.logs, died=died))
            return
        except LcmError as error:
            if self._service.workers.failure:  # nothing can be made here, but perhaps elsewhere, or after a restart
                await self._stored(lambda: self._jobs.release(job.id, job.epoch, logs=run.logs))
                return
            self._service.metrics.errors.labels(error.code).inc()
            self._log(run, str(error), "ERROR")
            outcome = Outcome.of(error)
        except Exception:
            logger.exception("a job failed in an unforeseen way")
            outcome = Outcome.of(LcmError("the server failed on this request"))
        await self._stored(lambda: self._jobs.finish(job.id, job.epoch, outcome, logs=run.logs, metrics=metrics))

    async def _outcome(self, run: _Run) -> tuple[Outcome, dict[str, float]]:
        """The answer to a job. Raises: LcmError; EngineLost: the engine process died, perhaps of this job."""
        job, service = run.job, self._service
        assert job.input is not None
        wanted = wire.parse_input(wire.decode_json(job.input))
        app_model = service.model_of_app(job.app)
        model = service.model_of(wanted, app_model)
        beginning = asyncio.create_task(self._begin(run, model))
        try:
            output = await self._generate(run, wanted, app_model, model)
            seconds = time.perf_counter() - run.begun_at
            await beginning
        finally:
            beginning.cancel()
        first = output.results[0]
        self._log(run, f"finished in {seconds:.3f} s: seed {first.seed}, {first.num_inference_steps} steps")
        answer = await self._stored(
            lambda: service.answer(
                output,
                wanted,
                address=lambda name: f"{job.base}/files/{name}",
                owner=job.owner,
                lifecycle=lifecycle_of(job.lifecycle),
            )
        )
        return Outcome(200, orjson.dumps(answer)), {"inference_time": round(seconds, 5)}

    async def _generate(self, run: _Run, wanted: GenerateInput, app_model: str, model: str) -> GenerateOutput:
        """Wait until an engine takes it, and for its pictures."""
        pause, workers = _FIRST_PAUSE_S, self._service.workers
        for left in reversed(range(_MOST_TRIES)):
            if workers.models[model].state != "ready":
                run.waiting = True
                self.wake()  # others, whose model is here, need not wait with it
                await workers.wait_model(model)
                run.waiting = False
            try:
                return await self._service.run(
                    wanted, app_model=app_model, priority="queue", owner=run.job.owner, on_begun=run.begin
                )
            except (Overloaded, Unavailable) as error:  # no room, a model on its way, a store that is away
                if isinstance(error, EngineLost) or workers.failure or workers.models[model].failure or not left:
                    raise
                await asyncio.sleep(pause)
                pause = min(pause * 2, _LAST_PAUSE_S)
        raise AssertionError("the last try returns or raises")

    async def _begin(self, run: _Run, model: str) -> None:
        """Tell that an engine has begun a job, once it has."""
        await run.begun.wait()
        self._log(run, f"started with {model}")
        logs = list(run.logs)
        if not await self._stored(lambda: self._jobs.begin(run.job.id, run.job.epoch, logs)):
            self._stop(run.job.id)
        self._tell(run.job.id)

    async def _stored(self, write: Callable[[], Awaitable[T]]) -> T:
        """What ``write`` returns, once it can be stored."""
        while True:
            try:
                return await write()
            except Unavailable:
                await asyncio.sleep(_STORE_PAUSE_S)

    def _log(self, run: _Run, message: str, level: str = "INFO") -> None:
        at = datetime.fromtimestamp(self._clock(), UTC).isoformat()
        run.logs.append({"message": message, "level": level, "source": "USER", "timestamp": at})

    async def cancel(self, id: str, *, owner: str, app: str) -> bool:
        """Cancel a job, wherever it is. False: it is done already. Raises: NotFound; Unavailable."""
        asked = await self._jobs.cancel(id, owner=owner, app=app)
        if asked:
            self._stop(id)
            self._tell(id)
            self.wake()
        return asked

    def _stop(self, id: str) -> None:
        """End a job that this server runs, if it does."""
        run = self._running.get(id)
        if run and run.task:
            run.stopped = True
            if run.started:
                run.task.cancel()

    async def wait(self, seen: Job) -> Job:
        """A job as it is as soon as that looks different from ``seen`` to its client. Raises: NotFound."""
        while True:
            changed = self._watched.setdefault(seen.id, asyncio.Event())
            with contextlib.suppress(Unavailable):
                job = await self._jobs.look(seen.id)
                if _shown(job) != _shown(seen):
                    return job
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(LOOK_S if self._jobs.is_shared else LOOK_ALONE_S):
                    await changed.wait()

    def _tell_all(self) -> None:
        """Wake everybody who watches a job."""
        for id in list(self._watched):
            self._tell(id)

    def _tell(self, id: str) -> None:
        """Wake those who watch a job, and the webhooks."""
        if changed := self._watched.pop(id, None):
            changed.set()
        self._webhooks.wake()


def _shown(job: Job) -> tuple[str, int | None, int]:
    return job.state, job.position, len(job.logs)

"""The rules of the queue's rows, on both databases."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import orjson
import pytest
from serving import run
from sqlalchemy import Connection, insert, select

from lcm_rt.errors import BadRequest, InputError, NotFound, Overloaded
from lcm_rt.jobs import MAX_DEATHS, SAME_JOB_S, Job, Jobs, Outcome
from lcm_rt.store import Store, jobs, secrets

LEASE_S = 15.0
DONE = Outcome(200, b'{"seed":1}')


class Clock:
    def __init__(self) -> None:
        self.now = 1_000_000.0

    def __call__(self) -> float:
        return self.now


class Queue(Jobs):
    """Rows with a clock of their own, and the events that their webhooks would get."""

    def __init__(self, store: Store, clock: Clock, **options: Any) -> None:
        limits = {"max_jobs": 100, "max_jobs_per_owner": 50, "result_ttl_s": 3600.0}
        super().__init__(store, deliver=self._keep, clock=clock, **(limits | options))
        self.store = store
        self.time = clock
        self.events: list[dict[str, Any]] = []

    def _keep(self, connection: Connection, *, job_id: str, owner: str, url: str, body: bytes) -> None:
        # A row of the same transaction, as a webhook's would be.
        connection.execute(insert(secrets).values(kind=url, id=job_id, value=body, created_at=0.0))
        self.events.append(orjson.loads(body))

    async def add(self, input: bytes = b"{}", **fields: Any) -> Job:
        return await self.accept(**{"owner": "me", "app": "fal-ai/lcm", "base": "http://x", "input": input, **fields})

    async def take(self, server: str = "a", busy: bool = False) -> Job:
        job = await self.claim(server, lease_s=LEASE_S, busy=busy)
        assert job
        return job

    async def nothing(self, server: str = "a", busy: bool = False) -> bool:
        return await self.claim(server, lease_s=LEASE_S, busy=busy) is None

    async def taken_inputs(self) -> list[bytes]:
        taken = []
        while job := await self.claim("a", lease_s=LEASE_S):
            assert job.input
            taken.append(job.input)
        return taken

    async def end(self, job: Job, outcome: Outcome = DONE) -> bool:
        return await self.finish(job.id, job.epoch, outcome, logs=[])

    async def ended(self, id: str) -> tuple[int | None, str | None]:
        job = await self.look(id)
        assert job.state == "done"
        return job.status, job.error_type


@asynccontextmanager
async def opened(url: str, **options: Any) -> AsyncIterator[Queue]:
    async with Store(url) as store:
        yield Queue(store, Clock(), **options)


@run
async def test_a_job_from_end_to_end(database_url: str) -> None:
    async with opened(database_url) as queue:
        made = await queue.add(b'{"prompt":"x"}', lifecycle="{}")
        assert (made.state, made.position, made.input, made.lifecycle) == ("queued", 0, None, "{}")
        with pytest.raises(BadRequest):
            await queue.result(made.id)
        job = await queue.take()
        assert (job.id, job.input, job.state, job.epoch) == (made.id, b'{"prompt":"x"}', "running", 1)
        seen = await queue.look(job.id)
        assert (seen.state, seen.begun_at, seen.position) == ("running", None, 0), "claimed is not begun"
        queue.time.now += 1
        line = {"message": "started", "level": "INFO", "source": "USER", "timestamp": "t"}
        assert await queue.begin(job.id, job.epoch, [line])
        seen = await queue.look(job.id)
        assert (seen.begun_at, seen.position, seen.logs) == (queue.time.now, None, [line])
        assert await queue.finish(job.id, job.epoch, DONE, logs=[line, line], metrics={"inference_time": 0.5})
        seen = await queue.look(job.id)
        assert (seen.state, seen.status, seen.error, seen.metrics) == ("done", 200, None, {"inference_time": 0.5})
        assert len(seen.logs) == 2
        assert await queue.result(job.id) == DONE == await queue.result(job.id), "it may be read again"
        assert await queue.nothing()
        kept = await queue.store.do(lambda connection: connection.scalar(select(jobs.c.input)))
        assert kept is None, "what a client sent is forgotten once it is done"


@run
async def test_a_job_is_only_its_owners_and_its_apps(database_url: str) -> None:
    async with opened(database_url) as queue:
        job = await queue.add()
        for theirs in ({"owner": "you"}, {"app": "fal-ai/other"}, {"owner": "you", "app": "fal-ai/lcm"}):
            for ask in (queue.look, queue.result, queue.cancel):
                with pytest.raises(NotFound):
                    await ask(job.id, **theirs)
        with pytest.raises(NotFound):
            await queue.look("junk")
        assert (await queue.look(job.id, owner="me", app="fal-ai/lcm")).state == "queued"


@pytest.mark.points(51)
@run
async def test_normal_before_low_and_oldest_first(database_url: str) -> None:
    async with opened(database_url) as queue:
        for name, low in (("l1", True), ("n1", False), ("l2", True), ("n2", False)):
            await queue.add(name.encode(), low=low)
        assert await queue.taken_inputs() == [b"n1", b"n2", b"l1", b"l2"]


@pytest.mark.points(44)
@run
async def test_positions_tell_how_many_begin_before(database_url: str) -> None:
    async with opened(database_url) as queue:
        names = ["l1", "n1", "l2", "n2", "n3"]
        made = {name: await queue.add(name.encode(), low=name[0] == "l") for name in names}

        async def positions() -> dict[str, int | None]:
            return {name: (await queue.look(job.id)).position for name, job in made.items()}

        assert await positions() == {"n1": 0, "n2": 1, "n3": 2, "l1": 3, "l2": 4}
        n1, n2 = await queue.take(), await queue.take()
        assert await positions() == {"n1": 0, "n2": 1, "n3": 2, "l1": 3, "l2": 4}, "a claim alone begins nothing"
        assert await queue.begin(n1.id, n1.epoch, [])
        assert await positions() == {"n1": None, "n2": 0, "n3": 1, "l1": 2, "l2": 3}
        await queue.cancel(made["n3"].id)
        assert await positions() == {"n1": None, "n2": 0, "n3": None, "l1": 1, "l2": 2}
        await queue.end(n1)
        await queue.release(n2.id, n2.epoch, logs=[])
        assert await positions() == {"n1": None, "n2": 0, "n3": None, "l1": 1, "l2": 2}


@pytest.mark.parametrize("state", ["queued", "claimed", "begun", "done"])
@pytest.mark.points(49)
@run
async def test_cancel(database_url: str, state: str) -> None:
    async with opened(database_url) as queue:
        job = await queue.add()
        if state != "queued":
            job = await queue.take()
        if state == "begun":
            assert await queue.begin(job.id, job.epoch, [])
        if state == "done":
            assert await queue.end(job)
        assert await queue.cancel(job.id) is (state != "done")
        if state == "begun":
            assert (await queue.look(job.id)).state == "running", "whoever runs it ends it"
            assert await queue.renew({job.id: job.epoch}, lease_s=LEASE_S) == {job.id}
            assert await queue.cancel(job.id), "to ask twice is no error"
            assert await queue.release(job.id, job.epoch, logs=[])
        assert await queue.nothing()
        assert not await queue.begin(job.id, job.epoch, []), "nobody may begin it now"
        assert not await queue.end(job), "nobody may change what it came to"
        assert await queue.ended(job.id) == ((200, None) if state == "done" else (499, "client_cancelled"))
        assert not await queue.cancel(job.id)


@run
async def test_what_was_done_before_it_heard_of_its_cancellation_counts(database_url: str) -> None:
    async with opened(database_url) as queue:
        await queue.add()
        job = await queue.take()
        assert await queue.begin(job.id, job.epoch, [])
        assert await queue.cancel(job.id)
        assert await queue.end(job)
        assert await queue.result(job.id) == DONE


@pytest.mark.points(50)
@run
async def test_too_late_to_begin(database_url: str) -> None:
    async with opened(database_url) as queue:
        for _ in range(3):
            late = await queue.add(start_within_s=10.0)
        patient = await queue.add()
        held, begun = await queue.take(), await queue.take()
        assert await queue.begin(begun.id, begun.epoch, [])
        assert await queue.sweep() == await queue.sweep()
        assert (await queue.sweep()).due == queue.time.now + 10
        queue.time.now += 10
        assert (await queue.take()).id == patient.id, "the late one may not begin, swept or not"
        assert set((await queue.sweep()).ended) == {late.id, held.id}
        for id in (late.id, held.id):
            assert await queue.ended(id) == (504, "request_timeout")
        assert await queue.renew({held.id: held.epoch, begun.id: begun.epoch}, lease_s=LEASE_S) == {held.id}
        assert not await queue.begin(held.id, held.epoch, [])
        assert await queue.end(begun), "it began in time"


@run
async def test_a_lapsed_lease_gives_the_job_to_the_next_in_its_old_place(database_url: str) -> None:
    async with opened(database_url) as queue:
        await queue.add(b"first")
        await queue.add(b"second")
        job = await queue.take("a")
        assert await queue.begin(job.id, job.epoch, [])
        queue.time.now += LEASE_S - 1
        assert await queue.renew({job.id: job.epoch}, lease_s=LEASE_S) == set()
        queue.time.now += 1
        assert await queue.sweep() == (await queue.sweep())
        assert (await queue.look(job.id)).state == "running"
        queue.time.now = (await queue.sweep()).due or 0.0
        await queue.sweep()
        seen = await queue.look(job.id)
        assert (seen.state, seen.begun_at, seen.position, seen.deaths) == ("queued", None, 0, 0)
        again = await queue.take("b")
        assert (again.id, again.input, again.epoch) == (job.id, b"first", 2)
        # The former holder is late with everything.
        assert not await queue.begin(job.id, job.epoch, [])
        assert await queue.renew({job.id: job.epoch}, lease_s=LEASE_S) == {job.id}
        assert not await queue.release(job.id, job.epoch, logs=[], died=True)
        assert not await queue.end(job, Outcome(200, b'"stale"'))
        assert await queue.end(again)
        assert not await queue.end(again, Outcome(200, b'"twice"')), "an outcome is written once"
        assert await queue.result(job.id) == DONE


@run
async def test_a_cancelled_job_whose_server_is_gone_is_not_run_again(database_url: str) -> None:
    async with opened(database_url) as queue:
        await queue.add()
        job = await queue.take()
        assert await queue.begin(job.id, job.epoch, [])
        assert await queue.cancel(job.id)
        queue.time.now += LEASE_S
        assert (await queue.sweep()).ended == [job.id]
        assert await queue.ended(job.id) == (499, "client_cancelled")


@run
async def test_a_server_that_leaves_gives_back_what_it_runs(database_url: str) -> None:
    async with opened(database_url) as queue:
        for name in (b"1", b"2", b"3", b"4"):
            await queue.add(name)
        mine, cancelled, done = [await queue.take("a") for _ in range(3)]
        other = await queue.take("b")
        assert await queue.begin(cancelled.id, cancelled.epoch, [])
        assert await queue.cancel(cancelled.id)
        assert await queue.end(done)
        await queue.leave("a")
        assert await queue.ended(cancelled.id) == (499, "client_cancelled")
        assert await queue.result(done.id) == DONE
        assert (await queue.take("b")).id == mine.id
        assert await queue.nothing("b")
        assert await queue.end(other)


@run
async def test_a_killer_is_convicted_alone(database_url: str) -> None:
    async with opened(database_url) as queue:
        await queue.add(b"killer")
        await queue.add(b"innocent")
        killer, innocent = await queue.take(), await queue.take()
        await queue.add(b"newcomer")
        for job in (killer, innocent):
            assert await queue.release(job.id, job.epoch, logs=[], died=True)
            assert (await queue.look(job.id)).state == "queued"
        assert await queue.nothing(busy=True), "a suspect waits until it is alone"
        killer = await queue.take()
        assert (killer.input, killer.deaths) == (b"killer", 1)
        assert await queue.release(killer.id, killer.epoch, logs=[], died=True)
        assert await queue.ended(killer.id) == (500, "runner_server_error")
        innocent = await queue.take()
        assert await queue.end(innocent)
        assert (await queue.take(busy=True)).input == b"newcomer"


@run
async def test_without_retries_the_first_death_is_the_end(database_url: str) -> None:
    async with opened(database_url) as queue:
        await queue.add(retries=False)
        job = await queue.take()
        assert await queue.release(job.id, job.epoch, logs=[])
        job = await queue.take()
        assert job.deaths == 0, "nobody died: the server only stopped"
        assert await queue.release(job.id, job.epoch, logs=[], died=True)
        assert await queue.ended(job.id) == (500, "runner_server_error")


@pytest.mark.points(57)
@run
async def test_the_same_key_is_the_same_job_for_a_day(database_url: str) -> None:
    async with opened(database_url, max_jobs=1) as queue:
        job, twin = await asyncio.gather(*(queue.add(idempotency_key="k") for _ in range(2)))
        assert job == twin
        with pytest.raises(Overloaded):
            await queue.add(owner="you", idempotency_key="k")
        assert (await queue.add(idempotency_key="k")).id == job.id, "a full queue is no reason against it"
        await queue.take()
        other = await queue.add(owner="you", idempotency_key="k")
        assert other.id != job.id
        await queue.cancel(other.id)
        assert await queue.end(await queue.look(job.id))
        queue.time.now += 3601
        await queue.sweep()
        assert (await queue.add(idempotency_key="k")).id == job.id, "it is not run again, though its result is gone"
        with pytest.raises(NotFound, match="expired"):
            await queue.result(job.id)
        queue.time.now += SAME_JOB_S - 3601
        assert (await queue.add(idempotency_key="k")).id != job.id
        await queue.sweep()
        with pytest.raises(NotFound):
            await queue.look(job.id)


@run
async def test_two_servers_with_the_same_key(database_url: str) -> None:
    """Each has a connection of its own; whoever inserts second finds the first one's job."""
    async with opened(database_url) as one, Store(database_url) as second:
        two = Queue(second, one.time)
        made = await asyncio.gather(*(queue.add(idempotency_key=str(n)) for n in range(30) for queue in (one, two)))
        assert len({job.id for job in made}) == 30


@run
async def test_two_servers_never_claim_the_same_job(database_url: str) -> None:
    async with opened(database_url) as one, Store(database_url) as second:
        two = Queue(second, one.time)
        for n in range(40):
            await one.add(str(n).encode())
        taken = await asyncio.gather(*(queue.take() for _ in range(20) for queue in (one, two)))
        assert len({job.id for job in taken}) == 40
        assert await two.nothing()


@run
async def test_limits(database_url: str) -> None:
    async with opened(database_url, max_jobs=3, max_jobs_per_owner=2, max_bytes=100) as queue:
        await queue.add(b"x" * 40)
        await queue.add(b"x" * 40)
        with pytest.raises(Overloaded, match="your jobs"):
            await queue.add()
        with pytest.raises(Overloaded, match="2 jobs"):
            await queue.add(b"x" * 21, owner="you")
        await queue.add(b"x" * 20, owner="you")
        with pytest.raises(Overloaded, match="3 jobs"):
            await queue.add(owner="they")
        await queue.take()
        await queue.add(owner="they")


@run
async def test_results_expire(database_url: str) -> None:
    async with opened(database_url, result_ttl_s=60.0) as queue:
        await queue.add()
        job = await queue.take()
        assert await queue.end(job)
        waiting = await queue.add()
        assert (await queue.sweep()).due == queue.time.now + 60
        queue.time.now += 60
        with pytest.raises(NotFound, match="expired"):  # to the second, not to the next sweep
            await queue.result(job.id)
        assert await queue.sweep() == await queue.sweep()
        with pytest.raises(NotFound):
            await queue.look(job.id)
        assert (await queue.look(waiting.id)).state == "queued", "what waits is kept, however long"
        assert (await queue.sweep()).due is None


@pytest.mark.points(58)
@run
async def test_each_end_tells_the_webhook_once(database_url: str) -> None:
    async with opened(database_url) as queue:
        made = {name: await queue.add(name.encode(), webhook=f"http://hook/{name}") for name in "abcd"}
        late = await queue.add(b"late", webhook="http://hook/late", start_within_s=1.0)
        silent = await queue.add()
        a, b, c, _ = [await queue.take() for _ in range(4)]
        assert await queue.end(a)
        assert not await queue.end(a)
        assert await queue.end(b, Outcome.of(InputError("prompt", "is bad")))
        for _ in range(MAX_DEATHS):
            assert await queue.release(c.id, c.epoch, logs=[], died=True)
            c = await queue.take() if (await queue.look(c.id)).state == "queued" else c
        await queue.cancel(made["d"].id)
        await queue.cancel(silent.id)
        queue.time.now += 1
        await queue.sweep()
        events = {event["request_id"]: event for event in queue.events}
        assert len(events) == len(queue.events) == 5
        assert events[a.id] == {
            "request_id": a.id,
            "gateway_request_id": a.id,
            "status": "OK",
            "error": None,
            "payload": {"seed": 1},
        }
        bad = events[b.id]
        assert (bad["status"], bad["error"]) == ("ERROR", "Invalid status code: 422")
        assert bad["payload"]["detail"][0]["loc"] == ["body", "prompt"]
        assert events[c.id]["payload"]["error_type"] == "runner_server_error"
        assert events[made["d"].id]["error"] == "Invalid status code: 499"
        assert events[late.id]["payload"]["error_type"] == "request_timeout"


@run
async def test_an_event_that_cannot_be_stored_undoes_the_end(database_url: str) -> None:
    """Either both are there, or neither."""
    async with opened(database_url) as queue:
        await queue.add(webhook="http://hook/")
        job = await queue.take()

        def refuse(connection: Connection, **fields: Any) -> None:
            raise RuntimeError("no room")

        queue._deliver = refuse
        with pytest.raises(RuntimeError):
            await queue.end(job)
        assert (await queue.look(job.id)).state == "running"


@pytest.mark.parametrize("seed", range(3))
@run
async def test_any_story_ends_well(seed: int, database_url: str) -> None:
    """Whatever servers, clients and time do, no job is lost, outcomes never change, and the order is kept."""
    dice = random.Random(seed)
    async with opened(database_url) as queue:
        held: list[Job] = []
        outcomes: dict[str, Outcome] = {}
        made: dict[str, Job] = {}

        def every(connection: Connection) -> list[Job]:
            return [queue._require(connection, id, None, None) for id in made]

        for n in range(120):
            match dice.choice("accept claim begin finish die stop cancel pass sweep".split()):
                case "accept":
                    job = await queue.add(b"x", low=dice.random() < 0.5, start_within_s=dice.choice([None, 5.0]))
                    made[job.id] = job
                case "claim":
                    if taken := await queue.claim("a", lease_s=LEASE_S):
                        held.append(taken)
                case "begin" if held:
                    job = dice.choice(held)
                    await queue.begin(job.id, job.epoch, [])
                case "finish" if held:
                    await queue.end(held.pop(dice.randrange(len(held))), Outcome(200, str(n).encode()))
                case "die" | "stop" as how if held:
                    job = held.pop(dice.randrange(len(held)))
                    await queue.release(job.id, job.epoch, logs=[], died=how == "die")
                case "cancel" if made:
                    await queue.cancel(dice.choice(list(made)))
                case "pass":
                    queue.time.now += dice.choice([1.0, 6.0, LEASE_S])
                case "sweep":
                    await queue.sweep()
            waiting = []
            for job in await queue.store.do(every):
                assert (job.position is None) == (job.state == "done" or job.begun_at is not None)
                if job.state == "done":
                    outcome = await queue.result(job.id) if job.id not in outcomes else outcomes[job.id]
                    assert outcomes.setdefault(job.id, outcome).status == job.status
                elif job.begun_at is None:
                    waiting.append(job)
            waiting.sort(key=lambda job: (job.state == "queued", job.low, job.number))
            assert [job.position for job in waiting] == list(range(len(waiting)))
        queue.time.now += LEASE_S
        await queue.sweep()
        while taken := await queue.claim("z", lease_s=LEASE_S):
            assert await queue.end(taken)
        for id in made:
            result = await queue.result(id)
            assert outcomes.get(id, result) == result

"""Servers are killed, at named points and at random, and started again: no accepted job is lost, no result changes, and
no job is run again once it is done.

What clients were told, what the server began, and what lay in the database after each death go into one history, which
a checker reads: it knows nothing of how the server works.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx2 as httpx
import orjson
import pytest
from crash_server import POINTS, Life
from databases import PostgreSQL
from serving import SIDE, model_folder, run
from sqlalchemy import NullPool, create_engine, inspect, make_url, select

from lcm_rt.server.serve import listen
from lcm_rt.store import jobs

SEED = int(os.environ.get("CRASH_SEED", "1"))
"""Of all choices here: another one tries other moments."""

AT_ONCE = 4  # jobs under way
SMALL = {"image_size": {"width": SIDE, "height": SIDE}, "format": "png", "num_inference_steps": 1}

Event = dict[str, Any]


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]


def violations(history: Iterable[Event]) -> list[str]:
    """What must not have happened; each event has the name ``event``, and is in the order in which it happened.

    submitted   tag, id: a client was told that its job was accepted
    cancelled   id: a client was told that its cancellation was
    result      id, status, digest: a client read it
    picture     id, status, digest: a client read the file that the result names
    delivery    id, event_id, digest, payload: a webhook came
    up          a server began to live
    start       tag: it is about to run a job
    dead        done: {id: [status, digest]}, what lay in the database then; cancelled: [id]
    end         all that was accepted had time to be done; wanted: [id], whose webhooks were wanted
    """
    history = list(history)
    # Known from the beginning: a job may run before its client hears that it is accepted.
    accepted = [(event["tag"], event["id"]) for event in history if event["event"] == "submitted"]
    ids = dict(accepted)
    said = [f"{tag} is two jobs" for tag, id in accepted if ids[tag] != id]
    done: set[str] = set()
    results: dict[str, tuple[int, str]] = {}
    pictures: dict[str, str] = {}
    delivered: dict[str, tuple[str, str, str]] = {}
    cancelled: set[str] = set()
    started: set[str] = set()  # in this life

    def see_result(id: str, status: int, digest: str) -> None:
        if results.setdefault(id, (status, digest)) != (status, digest):
            said.append(f"the result of {id} changed: {results[id]} became {(status, digest)}")
        if status != 200 and (status, id in cancelled) != (499, True):
            said.append(f"{id} came to {status}")
        done.add(id)

    for event in history:
        match event:
            case {"event": "cancelled", "id": id}:
                cancelled.add(id)
            case {"event": "result", "id": id, "status": status, "digest": digest}:
                see_result(id, status, digest)
            case {"event": "picture", "id": id, "status": status, "digest": digest}:
                if status != 200 or pictures.setdefault(id, digest) != digest:
                    said.append(f"the picture of {id} is gone or another: {status}")
            case {"event": "delivery", "id": id, "event_id": event_id, "digest": digest, "payload": payload}:
                if delivered.setdefault(id, (event_id, digest, payload)) != (event_id, digest, payload):
                    said.append(f"the webhook of {id} changed")
                done.add(id)
            case {"event": "up"}:
                started.clear()
            case {"event": "start", "tag": tag}:
                id = ids.get(tag, "")
                if tag in started:
                    said.append(f"{tag} was run twice in one life")
                if id in done:
                    said.append(f"{tag} was run after it was done")
                if id in cancelled:
                    said.append(f"{tag} was run after it was cancelled")
                started.add(tag)
            case {"event": "dead", "done": found, "cancelled": asked}:
                cancelled.update(asked)
                for id, (status, digest) in found.items():
                    see_result(id, status, digest)
                said += [f"{id} was done, and is not" for id in results.keys() - found.keys()]
            case {"event": "end", "wanted": wanted}:
                said += [f"{tag} was lost" for tag, id in ids.items() if id not in results]
                said += [f"the webhook of {id} was lost" for id in wanted if id not in delivered]
                for id, (_, _, payload) in delivered.items():
                    if results.get(id, (0, ""))[1] != payload:
                        said.append(f"the webhook of {id} tells another result")
    return said


class History:
    """A file of events, of this process and of the servers."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def tell(self, **event: Any) -> None:
        os.write(self._file, json.dumps({**event, "at": time.time()}).encode() + b"\n")

    def events(self) -> list[Event]:
        return [json.loads(line) for line in self.path.read_text().splitlines()]

    def count(self, event: str) -> int:
        return self.path.read_bytes().count(b'{"event": "%s"' % event.encode())

    def close(self) -> None:
        os.close(self._file)


class Forge:
    """Starts servers, one at a time, on one socket, by forking a process that has imported all they need."""

    def __init__(self) -> None:
        self.end = listen("127.0.0.1", 0)
        self.address = f"http://127.0.0.1:{self.end.getsockname()[1]}"
        self._process = subprocess.Popen(
            [sys.executable, Path(__file__).parent / "crash_server.py"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            pass_fds=[self.end.fileno()],
        )
        self._pid = 0
        self._groups: set[int] = set()
        self._ending: asyncio.Future[bytes] | None = None

    def close(self) -> None:
        self._process.communicate(timeout=30)
        self.end.close()

    @property
    def is_busy(self) -> bool:
        """A server lives."""
        return self._ending is not None

    async def start(self, life: Life) -> None:
        self._pid = int(await asyncio.to_thread(self._ask, json.dumps(dataclasses.asdict(life))))
        self._groups.add(self._pid)
        assert self._process.stdout
        self._ending = asyncio.ensure_future(asyncio.to_thread(self._process.stdout.readline))

    def _ask(self, line: str) -> bytes:
        assert self._process.stdin and self._process.stdout
        self._process.stdin.write(line.encode() + b"\n")
        self._process.stdin.flush()
        return self._process.stdout.readline()

    def kill(self, number: int = signal.SIGKILL) -> None:
        os.kill(self._pid, number)

    async def ended(self) -> int:
        assert self._ending
        status = int(await asyncio.shield(self._ending))
        self._ending = None
        return status

    async def clear(self) -> None:
        """Nothing lives any more: an engine sees that its server is gone."""
        if self._ending:
            if not self._ending.done():
                self.kill()
            await self.ended()
        groups, self._groups = self._groups, set()
        try:
            async with asyncio.timeout(10):
                while groups := {group for group in groups if _is_there(group)}:  # noqa: ASYNC110
                    await asyncio.sleep(0.02)
        except TimeoutError:
            for group in groups:
                os.killpg(group, signal.SIGKILL)
            pytest.fail(f"{len(groups)} engines outlived their servers")


def _is_there(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.fixture(scope="module")
def forge() -> Iterator[Forge]:
    forge = Forge()
    yield forge
    forge.close()


class Clients:
    """Some who submit jobs, cancel a few, and read results; a dead server makes them ask again."""

    def __init__(self, http: httpx.AsyncClient, history: History, rng: random.Random, hook: str) -> None:
        self._http = http
        self._history = history
        self._rng = rng
        self._hook = hook
        self._count = 0
        self._stopped = False
        self._tasks: list[asyncio.Task[None]] = []
        self.told: dict[str, str] = {}  # url of each job's result, by id
        self.wanted: set[str] = set()  # ids whose webhooks are

    def start(self) -> None:
        self._stopped = False
        self._tasks = [asyncio.create_task(self._client()) for _ in range(AT_ONCE)]

    async def stop(self) -> None:
        """Once the jobs under way are done."""
        self._stopped = True
        await asyncio.gather(*self._tasks)

    async def cancel(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _ask(self, method: str, url: str, **more: Any) -> httpx.Response:
        while True:
            with contextlib.suppress(httpx.TransportError):
                answer = await self._http.request(method, url, **more)
                if answer.status_code != 503:
                    return answer
            await asyncio.sleep(0.02)

    async def _client(self) -> None:
        while not self._stopped:
            self._count += 1
            await self._job(self._count)

    async def _job(self, number: int) -> None:
        tag = f"job {number}"
        has_hook, is_cancelled = number % 3 == 0, number % 4 == 0
        pause = self._rng.uniform(0, 0.03)
        answer = await self._ask(
            "POST",
            "/queue/fal-ai/lcm",
            params={"fal_webhook": self._hook} if has_hook else {},
            headers={"idempotency-key": tag},
            json={"prompt": tag, **SMALL},
        )
        assert answer.status_code == 200, answer.text
        job = answer.json()
        id: str = job["request_id"]
        self._history.tell(event="submitted", tag=tag, id=id)
        self.told[id] = job["response_url"]
        if has_hook:
            self.wanted.add(id)
        if is_cancelled:
            await asyncio.sleep(pause)
            answer = await self._ask("PUT", job["cancel_url"])
            assert answer.status_code in (202, 400), answer.text
            if answer.status_code == 202:
                self._history.tell(event="cancelled", id=id)
        while (answer := await self._ask("GET", job["status_url"])).status_code != 200:
            assert answer.status_code == 202, answer.text
            await asyncio.sleep(0.1)
        await self.read(id)

    async def read(self, id: str) -> None:
        """A result, and its picture."""
        answer = await self._ask("GET", self.told[id])
        self._history.tell(event="result", id=id, status=answer.status_code, digest=digest(answer.content))
        if answer.status_code == 200:
            picture = await self._ask("GET", answer.json()["images"][0]["url"])
            self._history.tell(event="picture", id=id, status=picture.status_code, digest=digest(picture.content))


class Trial:
    """A queue under load whose server dies again and again."""

    def __init__(self, forge: Forge, life: Life, clients: Clients, history: History, url: str, folder: Path) -> None:
        self._forge = forge
        self._life = life
        self._clients = clients
        self._history = history
        self._url = url
        self._folder = folder

    async def live(self) -> None:
        await self._forge.start(self._life)

    async def see(self, event: str, count: int) -> None:
        """Wait until an event has happened so many times more."""
        goal = self._history.count(event) + count
        async with asyncio.timeout(30):
            while self._history.count(event) < goal:  # noqa: ASYNC110
                await asyncio.sleep(0.005)

    async def die_at(self, point: str, count: int) -> None:
        """Live until ``point`` is passed for the ``count``-th time."""
        await self._forge.start(dataclasses.replace(self._life, point=point, count=count))
        async with asyncio.timeout(30):
            assert await self._forge.ended() == -signal.SIGKILL
        await asyncio.to_thread(self._look)

    async def die_by_chance(self, rng: random.Random) -> None:
        """Be killed from outside, at any time: while it starts, or when it has run a few jobs."""
        await self.live()
        if rng.random() < 0.3:
            await asyncio.sleep(rng.uniform(0, 0.5))
        else:
            await self.see("start", rng.randint(1, 8))
            await asyncio.sleep(rng.uniform(0, 0.05))
        self._forge.kill()
        assert await self._forge.ended() == -signal.SIGKILL
        await asyncio.to_thread(self._look)

    async def end(self) -> None:
        """Live until all is done, and stop as one should."""
        if not self._forge.is_busy:
            await self.live()
        async with asyncio.timeout(60):
            await self._clients.stop()
            for id in self._clients.told:
                await self._clients.read(id)
            while not self._clients.wanted <= self._delivered():  # noqa: ASYNC110
                await asyncio.sleep(0.05)
        self._forge.kill(signal.SIGTERM)
        assert await self._forge.ended() == 0
        await asyncio.to_thread(self._look)
        self._history.tell(event="end", wanted=sorted(self._clients.wanted))

    def _delivered(self) -> set[str]:
        return {event["id"] for event in self._history.events() if event["event"] == "delivery"}

    def _look(self) -> None:
        """What is in the database, read from a copy: nothing is mended but by the server."""
        url = make_url(self._url)
        if url.database and url.get_backend_name() == "sqlite":
            copy = self._folder / "copy"
            shutil.rmtree(copy, ignore_errors=True)
            copy.mkdir()
            for path in Path(url.database).parent.glob(f"{Path(url.database).name}*"):
                shutil.copy(path, copy)
            url = url.set(database=str(copy / Path(url.database).name))
        engine = create_engine(url, poolclass=NullPool)
        with engine.connect() as connection:
            if not inspect(connection).has_table(jobs.name):
                return  # it died too early
            rows = connection.execute(select(jobs.c.id, jobs.c.state, jobs.c.status, jobs.c.result, jobs.c.cancelled))
            found = rows.all()
        self._history.tell(
            event="dead",
            done={row.id: (row.status, digest(row.result)) for row in found if row.state == "done"},
            cancelled=[row.id for row in found if row.cancelled],
        )


@asynccontextmanager
async def receiving(history: History) -> AsyncIterator[str]:
    """The URL of a webhook receiver."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
            head = (await reader.readuntil(b"\r\n\r\n")).decode().lower().splitlines()
            headers = dict(line.split(": ", 1) for line in head[1:] if line)
            body = await reader.readexactly(int(headers["content-length"]))
            event = orjson.loads(body)
            history.tell(
                event="delivery",
                id=event["request_id"],
                event_id=headers["webhook-id"],
                digest=digest(body),
                payload=digest(orjson.dumps(event["payload"])),
            )
            writer.write(b"HTTP/1.1 200 OK\r\nconnection: close\r\ncontent-length: 0\r\n\r\n")
            await writer.drain()
        writer.close()

    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    async with server:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/hook"


@asynccontextmanager
async def trying(forge: Forge, folder: Path, url: str, seed: int) -> AsyncIterator[Trial]:
    """A trial under load; what it comes to is checked at the end of the block."""
    history = History(folder / "history.jsonl")
    settings = {
        "models": [await asyncio.to_thread(model_folder, folder / "model")],
        "data_dir": str(folder / "data"),
        "database_url": url,
        "webhook_private": True,
    }
    life = Life(settings, forge.end.fileno(), str(history.path), str(folder / "log"))
    try:
        async with (
            receiving(history) as hook,
            # Made without certificates, because loading them blocks: but this is plain HTTP to ourselves.
            httpx.AsyncClient(base_url=forge.address, verify=False, timeout=20) as http,
        ):
            clients = Clients(http, history, random.Random(seed), hook)
            trial = Trial(forge, life, clients, history, url, folder)
            clients.start()
            try:
                yield trial
                await trial.end()
            finally:
                await clients.cancel()
        found = violations(history.events())
        assert not found, "\n".join(found[:20])
    except BaseException as error:
        error.add_note(f"CRASH_SEED={SEED}; {history.path}; {folder}/log")
        raise
    finally:
        await forge.clear()
        history.close()


SUBMITTED = {"event": "submitted", "tag": "job 1", "id": "a"}
START = {"event": "start", "tag": "job 1"}
UP = {"event": "up"}
RESULT = {"event": "result", "id": "a", "status": 200, "digest": "x"}
PICTURE = {"event": "picture", "id": "a", "status": 200, "digest": "p"}
CANCELLED = {"event": "cancelled", "id": "a"}
DELIVERY = {"event": "delivery", "id": "a", "event_id": "e", "digest": "b", "payload": "x"}
DEAD = {"event": "dead", "done": {"a": (200, "x")}, "cancelled": []}
END = {"event": "end", "wanted": ["a"]}


@pytest.mark.parametrize(
    "history, said",
    [
        ([UP, SUBMITTED, START, DEAD, UP, RESULT, PICTURE, DELIVERY, DELIVERY, RESULT, PICTURE, DEAD, END], None),
        ([UP, START, {**DEAD, "done": {}}, UP, START, SUBMITTED, RESULT, DELIVERY, END], None),
        ([UP, SUBMITTED, CANCELLED, {**RESULT, "status": 499}, DELIVERY, END], None),
        ([UP, SUBMITTED, END], "job 1 was lost"),
        ([UP, SUBMITTED, RESULT, END], "webhook of a was lost"),
        ([UP, SUBMITTED, {**SUBMITTED, "id": "b"}], "two jobs"),
        ([UP, SUBMITTED, START, START], "twice in one life"),
        ([UP, SUBMITTED, START, RESULT, UP, START], "run after it was done"),
        ([UP, SUBMITTED, START, DEAD, UP, START], "run after it was done"),
        ([UP, SUBMITTED, CANCELLED, START], "run after it was cancelled"),
        ([UP, SUBMITTED, {**DEAD, "done": {}, "cancelled": ["a"]}, UP, START], "run after it was cancelled"),
        ([UP, SUBMITTED, RESULT, {**RESULT, "digest": "y"}], "changed"),
        ([UP, SUBMITTED, DEAD, {**RESULT, "digest": "y"}], "changed"),
        ([UP, SUBMITTED, RESULT, {**DEAD, "done": {}}], "was done, and is not"),
        ([UP, SUBMITTED, {**RESULT, "status": 499}], "came to 499"),
        ([UP, SUBMITTED, {**RESULT, "status": 404}], "came to 404"),
        ([UP, SUBMITTED, RESULT, {**PICTURE, "status": 404}], "picture of a is gone"),
        ([UP, SUBMITTED, PICTURE, {**PICTURE, "digest": "q"}], "picture of a is gone or another"),
        ([UP, SUBMITTED, DELIVERY, {**DELIVERY, "event_id": "f"}], "webhook of a changed"),
        ([UP, SUBMITTED, {**DELIVERY, "payload": "y"}, RESULT, END], "another result"),
        ([UP, SUBMITTED, DELIVERY, END], "another result"),
        ([UP, START, DEAD, UP, START, SUBMITTED], "run after it was done"),
    ],
)
def test_the_checker_sees(history: list[Event], said: str | None) -> None:
    found = violations(history)
    assert not found if said is None else any(said in line for line in found)


@pytest.mark.parametrize("point", POINTS)
@run
async def test_death_at_a_point(forge: Forge, tmp_path: Path, point: str) -> None:
    seed = SEED + list(POINTS).index(point)
    rng = random.Random(seed)
    async with trying(forge, tmp_path, f"sqlite:///{tmp_path}/store.db", seed) as trial:
        for _ in range(3):
            await trial.die_at(point, rng.randint(1, 4))


@run
async def test_death_at_random(forge: Forge, tmp_path: Path, database_url: str) -> None:
    rng = random.Random(SEED)
    async with trying(forge, tmp_path, database_url, SEED) as trial:
        for _ in range(10 if database_url.startswith("sqlite") else 4):
            await trial.die_by_chance(rng)


@run
async def test_death_of_the_database(forge: Forge, tmp_path: Path, postgresql: PostgreSQL) -> None:
    rng = random.Random(SEED)
    url = postgresql.create()
    async with trying(forge, tmp_path, url, SEED) as trial:
        await trial.live()
        for _ in range(3):
            await trial.see("start", rng.randint(1, 8))
            postgresql.stop()
            postgresql.start()
    postgresql.drop(url)


@pytest.mark.slow
@pytest.mark.parametrize("number", range(4))
@run
async def test_hundred_deaths_at_random(forge: Forge, tmp_path: Path, database_url: str, number: int) -> None:
    rng = random.Random(SEED + number)
    async with trying(forge, tmp_path, database_url, SEED + number) as trial:
        for _ in range(25):
            await trial.die_by_chance(rng)

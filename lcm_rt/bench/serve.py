"""What people at a real-time image server feel: delays, freshness and fairness, measured from outside.

``run`` is ``lcm-rt bench serve``. The core is a library, for any server that some dialect speaks to::

    from lcm_rt.bench.dialects import HttpPost, WebSocket
    from lcm_rt.bench.serve import Load, measure

    load = Load(traces=("typing",), sessions=8, seconds=30, image_side=256, fields={"strength": 0.8})
    measured = await measure(WebSocket("ws://127.0.0.1:8000/fal-ai/lcm/realtime"), load)
    measured = await measure(WebSocket("ws://127.0.0.1:9000/ws", throttled=True), load)   # one message at a time
    measured = await measure(HttpPost("http://127.0.0.1:9001/predict"), load)             # JSON there, JPEG back
    report = measured.report()      # JSON-able; report["all"]["input_to_frame_ms"]["p95"], report["fairness"], ...

The server must be ready: ``measure`` makes ``warm_up`` pictures per client before its clock starts, and waits for no
model. Answers need neither ``request_id`` (they are then taken in order) nor ``timings``. Another wire is a class with
``throttled`` and ``connect`` in the manner of ``lcm_rt.bench.dialects``.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import time
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import orjson

from lcm_rt.bench import figures, terminal, traces
from lcm_rt.bench import plots as plotting
from lcm_rt.bench.dialects import Answer, Closed, Dialect, HttpPost, Line, Message, WebSocket
from lcm_rt.bench.figures import Log, Progress
from lcm_rt.bench.observers import Counters, Observer, Processes, Server
from lcm_rt.bench.surroundings import surroundings
from lcm_rt.bench.traces import Key, Trace
from lcm_rt.errors import InputError, LcmError, Unavailable

READY_S = 600.0
"""How long the server may take to load its models."""
DRAIN_S = 15.0
"""How long the answers to the last messages are waited for."""
TICK_S = 0.25


class Refused(LcmError):
    """The server did not answer one of the first messages, before the clock starts, with a picture."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """What the clients do.

    Args:
        traces: names, as ``traces.find`` has them; clients take them in turns.
        sessions: how many clients. seconds: of the trace.
        warm_up: pictures of each client before the clock starts. seed: of the traces.
        image_side: in px, of the sketch that goes with each message; None sends text only.
        fields: what else each message says, such as ``num_inference_steps``.
    """

    traces: Sequence[str] = ("typing",)
    sessions: int = 1
    seconds: float = 30.0
    warm_up: int = 3
    seed: int = 1
    image_side: int | None = None
    fields: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.traces:
            raise InputError("traces", "should have one name at least")
        for name, least in (("sessions", 1), ("warm_up", 0)):
            if getattr(self, name) < least:
                raise InputError(name, f"should be at least {least}")
        if not self.seconds > 0:
            raise InputError("seconds", "should be more than 0")


class Client:
    """One connection that follows its trace.

    Args:
        name: unlike any other's, of this run and of those before it.
        pictures: sketches to go with the messages, or none.
        throttled: it sends nothing while an answer is outstanding, and then its newest message.
    """

    def __init__(
        self,
        name: str,
        line: Line,
        trace: Trace,
        pictures: Sequence[bytes],
        fields: Mapping[str, Any],
        *,
        throttled: bool,
    ) -> None:
        self.log = Log(trace.name)
        self._name = name
        self._line = line
        self._trace = trace
        self._pictures = pictures
        self._fields = fields
        self._throttled = throttled
        self._newest: tuple[int, Key] | None = None  # throttled only: what goes next
        self._posted = asyncio.Event()

    async def receive(self) -> None:
        """Take in answers until the line ends; nothing is done with a picture but to weigh it."""
        try:
            while True:
                self._take(await self._line.receive(), time.perf_counter())
                self.log.progressed.set()
        except Closed as closed:
            self.log.errors[str(closed)] += 1
        finally:
            self.log.is_open = False
            self.log.progressed.set()

    def _take(self, answer: Answer, now: float) -> None:
        log = self.log
        log.bytes_received += answer.size
        if answer.kind == "error":
            log.errors[answer.error] += 1
            log.reason = answer.reason
        if answer.kind == "notice" or answer.number is None:
            log.notices += answer.kind != "error"
            return
        if answer.kind == "error":
            log.failed += answer.number >= 0
        elif answer.number < 0:
            log.warmed += 1
            log.picture = dict(answer.about)
        else:
            log.frames.append((now, answer.number))
            log.timings.append(answer.timings)
        log.settled = max(log.settled, answer.number)

    async def _until(self, done: Callable[[], bool]) -> None:
        while not done() and self.log.is_open:
            self.log.progressed.clear()
            await self.log.progressed.wait()

    async def _settle(self, number: int) -> None:
        """Wait until message ``number``, or a newer one, is answered."""
        await self._until(lambda: self.log.settled >= number)

    async def _send(self, number: int, key: Key) -> None:
        turn, image = number if self._trace.redraws else 0, None
        if self._pictures:
            image = traces.marked(self._pictures[turn % len(self._pictures)], f"{self._name}/{turn}")
        self.log.bytes_sent += await self._line.send(number, Message(key.prompt, key.seed, image, self._fields))

    async def warm_up(self, count: int) -> None:
        """The first pictures fill the server's caches; they are in no figure but the size of a picture.

        Raises: Refused.
        """
        log = self.log
        with contextlib.suppress(Closed):
            for number in range(count):
                await self._send(-1 - number, Key(0.0, traces.PROMPT, number))
                await self._until(lambda number=number: log.warmed > number or bool(log.errors))  # type: ignore[misc]
                if log.errors:
                    break
        if log.warmed < count:
            raise Refused(f"the server refused a message of the warm-up: {log.reason or dict(log.errors)}")
        log.settled = -1
        log.bytes_sent = log.bytes_received = log.notices = 0

    async def follow(self, begun_at: float, seconds: float, rng: random.Random) -> None:
        """Play the trace, and wait for the answers to its last messages."""
        keys = self._trace.keys(seconds, rng)
        if self._trace.closed:
            return await self._take_turns(keys, begun_at + seconds)
        pump = asyncio.create_task(self._pump()) if self._throttled else None
        try:
            with contextlib.suppress(Closed):
                await self._play(keys, begun_at)
            with contextlib.suppress(TimeoutError):  # then it is counted as never shown
                async with asyncio.timeout(DRAIN_S):
                    await self._settle(len(self.log.sent_at) - 1)
        finally:
            if pump:
                pump.cancel()
                await asyncio.wait([pump])

    async def _play(self, keys: Iterable[Key], begun_at: float) -> None:
        """Open loop: each message at its time, whatever has become of those before it."""
        for number, key in enumerate(keys):
            due = begun_at + key.at
            await asyncio.sleep(due - time.perf_counter())
            if not self.log.is_open:
                return
            # From when it was due, not from when we managed: else a stall would hide itself (coordinated omission).
            self.log.sent_at.append(due)
            self.log.late.append(time.perf_counter() - due)
            if self._throttled:
                self._newest = (number, key)
                self._posted.set()
            else:
                await self._send(number, key)

    async def _pump(self) -> None:
        with contextlib.suppress(Closed):
            while True:
                await self._posted.wait()
                self._posted.clear()
                assert self._newest
                number, key = self._newest
                await self._send(number, key)
                await self._settle(number)

    async def _take_turns(self, keys: Iterable[Key], end_at: float) -> None:
        """Closed loop: the next message when the picture has come."""
        with contextlib.suppress(Closed):
            for number, key in enumerate(keys):
                if time.perf_counter() >= end_at or not self.log.is_open:
                    return
                self.log.sent_at.append(time.perf_counter())
                await self._send(number, key)
                await self._settle(number)


@dataclass(frozen=True, slots=True)
class Measured:
    """What clients saw: ``logs`` in the order of the sessions, and what else was looked at."""

    load: Load
    throttled: bool
    logs: Sequence[Log]
    begun_at: float
    generator: Mapping[str, Any]
    observed: Mapping[str, Any]

    def report(self) -> dict[str, Any]:
        """Every figure, as JSON has it; ``benchmarks/README.md`` defines them."""
        begun_at, seconds, logs = self.begun_at, self.load.seconds, self.logs
        names = list(dict.fromkeys(log.trace for log in logs))
        by_trace = {
            name: figures.describe([log for log in logs if log.trace == name], begun_at, seconds) for name in names
        }
        report: dict[str, Any] = {
            "trace": "+".join(names),
            "seconds": seconds,
            "sessions": len(logs),
            "throttled": self.throttled,
            "picture": logs[0].picture,
            "generator": self.generator,
            **self.observed,
            "all": figures.describe(logs, begun_at, seconds),
            # A camera sends more than anyone can see: only clients of one trace compare.
            "fairness": min((group["fairness"] for group in by_trace.values() if group["fairness"]), default=None),
            "traces": by_trace,
            "clients": [{"trace": log.trace, **figures.describe([log], begun_at, seconds)} for log in logs],
        }
        if names == ["single"]:
            report["single"] = figures.describe_turns(logs)
        return report


async def measure(
    dialect: Dialect, load: Load, *, observers: Sequence[Observer] = (), progress: Progress | None = None
) -> Measured:
    """Let all clients of ``load`` loose at once on a server that is ready.

    Raises: Unavailable: nobody answers. Refused: a message of the warm-up had no picture. InputError: of the load.
    """
    chosen, pictures = await asyncio.to_thread(_prepare, load)
    run_name = uuid.uuid4().hex
    async with contextlib.AsyncExitStack() as stack:
        clients = []
        for n in range(load.sessions):
            line = await dialect.connect()
            stack.push_async_callback(line.close)
            trace = chosen[n % len(chosen)]
            name = f"{run_name}/{n}"
            clients.append(Client(name, line, trace, pictures, load.fields, throttled=dialect.throttled))
        logs = [client.log for client in clients]
        readers = [asyncio.create_task(client.receive()) for client in clients]
        stack.push_async_callback(_end, readers)
        await asyncio.gather(*(client.warm_up(load.warm_up) for client in clients))
        for observer in observers:
            await observer.begin()
        begun_at, cpu_s = time.perf_counter(), time.process_time()
        if progress:
            stack.push_async_callback(_end, [asyncio.create_task(_tick(progress, logs, begun_at))])
        await asyncio.gather(
            *(
                client.follow(begun_at, load.seconds, random.Random(f"{load.seed}/{n}"))
                for n, client in enumerate(clients)
            ),
        )
        await asyncio.sleep(begun_at + load.seconds - time.perf_counter())
        generator = {
            "cpu_percent": round(100 * (time.process_time() - cpu_s) / (time.perf_counter() - begun_at), 1),
            "late_ms": figures.spread(late for log in logs for late in log.late),
        }
        observed = {observer.name: await observer.end(logs) for observer in observers}
    return Measured(load, dialect.throttled, logs, begun_at, generator, observed)


def _prepare(load: Load) -> tuple[list[Trace], tuple[bytes, ...]]:
    """The traces, and the sketches that go with them."""
    return [traces.find(name) for name in load.traces], traces.sketches(load.image_side) if load.image_side else ()


async def _end(tasks: Sequence[asyncio.Task[None]]) -> None:
    """Cancel, and raise what they ended with: a reader that failed would look like a server that is silent."""
    for task in tasks:
        task.cancel()
    await asyncio.wait(tasks)
    for task in tasks:
        if not task.cancelled():
            task.result()


async def _tick(progress: Progress, logs: Sequence[Log], begun_at: float) -> None:
    while True:
        progress(time.perf_counter() - begun_at, logs)
        await asyncio.sleep(TICK_S)


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """The server that is measured.

    Args:
        url: of an lcm-rt server; with another ``dialect`` the whole address that it answers at.
        app: the application's id, or a model's name. max_buffering: messages that may wait in a session.
        throttled: as ``WebSocket`` has it.
    """

    url: str
    dialect: Literal["lcm-rt", "websocket", "http"] = "lcm-rt"
    app: str = "fal-ai/lcm"
    max_buffering: int | None = None
    throttled: bool = False


def run(target: Target, load: Load, *, image: bool, pid: int | None, output: Path | None, plots: Path | None) -> None:
    """Measure, show, and write down: ``lcm-rt bench serve``.

    Args:
        image: send a sketch in the size of the model's pictures. pid: of the server, to watch its processes.
        output: a file for the report. plots: a folder for pictures of it.

    Raises: LcmError: as ``measure``. InputError: a package is missing that is needed. OSError.
    """
    if plots:
        plotting.require()  # before minutes of work
    report = surroundings()
    about, measured = asyncio.run(_run(target, load, image, [] if pid is None else [Processes(pid)]))
    report |= {"server": about, **measured.report()}
    terminal.show(report)
    if output:
        output.write_bytes(orjson.dumps(report, option=orjson.OPT_INDENT_2))
    if plots:
        terminal.say(f"plots: {', '.join(map(str, plotting.draw(measured, plots)))}")


async def _run(target: Target, load: Load, image: bool, observers: list[Observer]) -> tuple[dict[str, Any], Measured]:
    dialect: Dialect
    if target.dialect == "lcm-rt":
        server = Server(target.url, os.environ.get("LCM_RT_KEY"))
        with terminal.status("asking the server") as status:
            await wait_ready(server, lambda words: status.update(words))
        about = await server.model(target.app)
        observers = [*observers, Counters(server)]
        query = "" if target.max_buffering is None else f"?max_buffering={target.max_buffering}"
        url = f"{target.url.rstrip('/').replace('http', 'ws', 1)}/{target.app}/realtime{query}"
        dialect = WebSocket(url, headers=server.headers, throttled=target.throttled)
    else:
        about = {"url": target.url}
        dialect = (
            HttpPost(target.url) if target.dialect == "http" else WebSocket(target.url, throttled=target.throttled)
        )
    if image:
        side = load.fields.get("image_size", {}).get("width")
        load = replace(load, image_side=side or about.get("size", traces.SIDE))
    with terminal.progress(load.seconds) as progress:
        return about, await measure(dialect, load, observers=observers, progress=progress)


async def wait_ready(server: Server, report: Callable[[str], object]) -> None:
    """Wait for the models, saying how far they are. Raises: Unavailable: it takes too long, or it has failed."""
    end_at = time.monotonic() + READY_S
    while (stage := await server.loading()) is not None:
        if time.monotonic() > end_at:
            raise Unavailable(f"the server is not ready after {READY_S:.0f} s: {stage}")
        report(f"loading: {stage}")
        await asyncio.sleep(TICK_S)

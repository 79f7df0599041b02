"""How long people would wait for their pictures, by policy and load: a simulation with the server's own scheduler.

    python benchmarks/simulate.py                                       # the embedded model on two cores, typists
    python benchmarks/simulate.py --preset h200-estimate --sessions 16,32,64
    python benchmarks/simulate.py --table steps.json --trace camera     # measured: see lcm_rt/steptable.py
    python benchmarks/simulate.py --sessions 1 --cameras 4              # one typist beside four cameras

Events are simulated; ``lcm_rt.scheduler.Scheduler`` and ``lcm_rt.session.Session`` are the real ones, and the scheduler
learns its table from the forwards it sees, as in the server. ``benchmarks/README.md`` defines each figure. Not in it:
prompts, decoding of pictures, the way between the processes.
"""

from __future__ import annotations

import argparse
import heapq
import itertools
import random
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import orjson
from rich.console import Console
from rich.progress import track
from rich.table import Table

from lcm_rt.bench.figures import Log, describe, fairness
from lcm_rt.bench.surroundings import surroundings
from lcm_rt.bench.traces import find
from lcm_rt.errors import InputError
from lcm_rt.scheduler import Scheduler
from lcm_rt.session import Message, Session
from lcm_rt.steptable import StepTable
from lcm_rt.types import GenerateRequest, Priority

ANSWER_S = 0.001
"""From a picture's pixels to its client: JPEG and two processes, beside the loop."""

UNBOUNDED = 10**9


@dataclass(frozen=True, slots=True)
class Device:
    """What a forward costs.

    Attributes:
        table: the times of each bucket.
        max_rows: as the server's setting.
        sizes: numbers of rows that forwards are made for; one of another number is filled up. Empty: any.
    """

    table: StepTable
    max_rows: int = 8
    sizes: tuple[int, ...] = ()

    def step(self, bucket: Hashable, rows: int) -> tuple[float, int]:
        """Seconds of a forward, and the rows it has with those that only fill it up."""
        filled = next((size for size in self.sizes if size >= rows), rows)
        return self.table.step(bucket, filled) or 0.0, filled


def _device(step: dict[str, float], finish: float, max_rows: int, sizes: tuple[int, ...] = ()) -> Device:
    """A device with one bucket, "", from milliseconds; pictures are made one by one."""
    finishes = {rows: rows * finish / 1e3 for rows in (1, max_rows)}
    steps = {rows: milliseconds / 1e3 for rows, milliseconds in step.items()}
    return Device(StepTable.given([{"bucket": "", "step": steps, "finish": finishes}]), max_rows, sizes)


GRAPHS = (1, 2, 3, 4, 6, 8, 12, 16)

PRESETS = {
    # The embedded model at 256x256 by OpenVINO in bfloat16, two cores; measured.
    "cpu-embedded": _device({"1": 6.1, "2": 10, "4": 17, "8": 31}, 6.8, 8),
    # SD 1.5 at 512x512 with a tiny VAE; estimated from published figures.
    "h200-estimate": _device({"1": 5.5, "2": 6.5, "4": 9.5, "8": 16.5, "16": 30}, 0.4, 16, GRAPHS),
    # SDXL at 1024x1024 with a tiny VAE, which one picture fills; estimated.
    "h200-sdxl-estimate": _device({"1": 16, "2": 31.4, "4": 62.5, "8": 125}, 0.9, 8, GRAPHS),
}


@dataclass(frozen=True, slots=True)
class Policy:
    """How a server shares its device; the defaults are ours.

    Attributes:
        max_rows: how many pictures it works on at a time, if not the device's.
        buffering: how many messages of a session may wait; with 1, the latest wins.
        learns: the scheduler has a table of step times.
        whole: a batch begins together, and the next one when all of it is done.
        wait_s: how long the first picture of such a batch waits for others.
    """

    name: str
    max_rows: int | None = None
    buffering: int = 1
    learns: bool = True
    whole: bool = False
    wait_s: float = 0.0


OURS = Policy("ours")
# Serial servers; batches as general model servers make them; batches of steps that all join who fit.
POLICIES = (
    Policy("every message", 1, UNBOUNDED, learns=False),
    Policy("latest wins", 1, learns=False),
    Policy("whole batches", learns=False, whole=True, wait_s=0.005),
    Policy("step batches", learns=False),
    OURS,
)


@dataclass(frozen=True, slots=True)
class Client:
    """Somebody who sends messages at these seconds.

    One whose ``priority`` is not realtime has no session: each message is a picture of its own.
    """

    sends_at: Sequence[float]
    bucket: Hashable = ""
    area: int = 1
    steps: int = 4
    priority: Priority = "realtime"


@dataclass(slots=True)
class Picture:
    """A message past the mailbox: the scheduler's ticket, and then its row."""

    key: int
    client: int
    number: int
    message: Message[int] | None
    request: GenerateRequest
    received_at: float
    bucket: Hashable
    area: int
    steps_left: int

    @property
    def done(self) -> bool:
        return self.steps_left == 0


@dataclass(slots=True)
class Outcome:
    """What came of a simulation: a log for each client, and what the device did, filling included."""

    logs: list[Log]
    forwards: int = 0
    row_steps: int = 0
    filling: int = 0
    largest: int = 0


class Simulation:
    """One run of some clients on one device under one policy."""

    def __init__(self, device: Device, policy: Policy, clients: Sequence[Client]) -> None:
        self._device = device
        self._policy = policy
        self._clients = clients
        self._learnt = StepTable() if policy.learns else None
        self._scheduler: Scheduler[Picture, Picture] = Scheduler(policy.max_rows or device.max_rows, table=self._learnt)
        self._sessions = [Session[int](policy.buffering) for _ in clients]
        self._taken: dict[int, Picture] = {}  # by identity of its message
        self._events: list[tuple[float, int, int, int, Picture | None]] = []
        self._order = itertools.count()
        self._keys = itertools.count()
        self._outcome = Outcome([Log(sent_at=list(client.sends_at)) for client in clients])
        for number, client in enumerate(clients):
            for sent, at in enumerate(client.sends_at):
                self._push(at, number, sent)

    def _push(self, at: float, client: int, sent: int, picture: Picture | None = None) -> None:
        heapq.heappush(self._events, (at, next(self._order), client, sent, picture))

    def run(self) -> Outcome:
        """All of it, until the last message is answered; this is the worker's loop, but for the clock."""
        scheduler, now = self._scheduler, 0.0
        while True:
            self._happen(now)
            if self._policy.whole and not scheduler.running and not scheduler.idle:
                now += self._policy.wait_s
                self._happen(now)
            if not (self._policy.whole and scheduler.running):
                for picture in scheduler.admit(now):
                    if picture.message:
                        self._sessions[picture.client].begun(picture.message)
                    scheduler.start(picture)
            if batch := scheduler.schedule():
                now = self._step(batch, now)
                now = self._finish(scheduler.retire(batch), now)
            elif self._events:
                now = self._events[0][0]
            else:
                return self._outcome

    def _step(self, batch: Sequence[Picture], now: float) -> float:
        seconds, filled = self._device.step(batch[0].bucket, len(batch))
        for picture in batch:
            picture.steps_left -= 1
        outcome = self._outcome
        outcome.forwards += 1
        outcome.row_steps += filled
        outcome.filling += filled - len(batch)
        outcome.largest = max(outcome.largest, len(batch))
        if self._learnt:
            self._learnt.observe_step(batch[0].bucket, len(batch), seconds)
        return now + seconds

    def _finish(self, done: Sequence[Picture], now: float) -> float:
        if not done:
            return now
        seconds = self._device.table.finish(done[0].bucket, len(done)) or 0.0
        if self._learnt:
            self._learnt.observe_finish(done[0].bucket, len(done), seconds)
        for picture in done:
            self._push(now + seconds + ANSWER_S, picture.client, picture.number, picture)
        return now + seconds

    def _happen(self, now: float) -> None:
        """Messages and answers up to now, in order of time."""
        while self._events and self._events[0][0] <= now:
            at, _, client, number, picture = heapq.heappop(self._events)
            if picture:
                self._answer(picture, at)
            elif self._clients[client].priority == "realtime":
                self._receive(client, number)
            else:
                self._scheduler.add(self._picture(client, number, at, None))
            while message := self._sessions[client].take():
                self._taken[id(message)] = taken = self._picture(client, int(message.frame), at, message)
                self._scheduler.add(taken)

    def _picture(self, number: int, sent: int, at: float, message: Message[int] | None) -> Picture:
        client = self._clients[number]
        session = f"session-{number}" if message else None
        request = GenerateRequest("", "", 0, priority=client.priority, session=session, owner="" if message else "jobs")
        key = next(self._keys)
        return Picture(key, number, sent, message, request, at, client.bucket, client.area, client.steps)

    def _receive(self, client: int, number: int) -> None:
        session = self._sessions[client]
        for victim in session.receive(str(number)):
            if self._scheduler.drop(self._taken[id(victim)].key):
                del self._taken[id(victim)]
                session.answer(victim)

    def _answer(self, picture: Picture, at: float) -> None:
        log = self._outcome.logs[picture.client]
        if picture.message is None:
            log.frames.append((at, picture.number))
            return
        session = self._sessions[picture.client]
        del self._taken[id(picture.message)]
        for number in session.answer(picture.message, picture.number):
            session.sent()
            log.frames.append((at, number))


def simulate(device: Device, policy: Policy, clients: Sequence[Client]) -> Outcome:
    """What those clients would get from a server with that policy on that device."""
    return Simulation(device, policy, clients).run()


def figures(outcome: Outcome, seconds: float, watched: int) -> dict[str, Any]:
    """Of the first ``watched`` clients, and of the device."""
    logs = outcome.logs[:watched]
    wanted = ("sent", "frames", "superseded", "overtaken", "frames_per_s", "input_to_frame_ms", "staleness_ms")
    described = describe(logs, 0.0, seconds)
    return {name: described[name] for name in wanted} | {
        "fairness": fairness(logs),
        "all_frames_per_s": describe(outcome.logs, 0.0, seconds)["frames_per_s"],
        "wasted_row_steps": round(outcome.filling / max(outcome.row_steps, 1), 4),
        "mean_batch": round((outcome.row_steps - outcome.filling) / max(outcome.forwards, 1), 2),
        "largest_batch": outcome.largest,
    }


def crowd(options: argparse.Namespace, sessions: int) -> list[Client]:
    """The clients of a run: those who are watched, then who is beside them. No two have the same trace."""
    names = [options.trace] * sessions + ["camera"] * options.cameras
    traces = [
        [key.at for key in find(name).keys(options.seconds, random.Random(f"{options.seed}/{number}"))]
        for number, name in enumerate(names)
    ]
    clients = [Client(trace, options.bucket, steps=options.steps) for trace in traces]
    return [*clients, Client([0.0] * options.jobs, options.bucket, steps=options.steps, priority="queue")]


def read_table(path: Path, max_rows: int) -> tuple[Device, Hashable]:
    """A device and its first bucket, from a file that holds what ``StepTable.export`` gave. Raises: InputError."""
    try:
        table = StepTable.given(orjson.loads(path.read_bytes()))
    except OSError as error:
        raise InputError("table", f"{path}: {error.strerror}") from None
    except orjson.JSONDecodeError as error:
        raise InputError("table", f"{path}: {error}") from None
    known = [entry["bucket"] for entry in table.export() if entry["step"]]
    if not known:
        raise InputError("table", f"{path}: there are no steps in it")
    return Device(table, max_rows), tuple(known[0]) if isinstance(known[0], list) else known[0]


def show(console: Console, runs: Sequence[dict[str, Any]], title: str) -> None:
    table = Table(
        title=title,
        padding=(0, 0, 0, 1),
        caption="milliseconds from input to frame; benchmarks/README.md defines the columns",
    )
    table.add_column("n", justify="right")
    table.add_column("policy", no_wrap=True)
    for name in ("p50", "p95", "p99", "stale", "fps", "late", "waste", "rows", "Jain"):
        table.add_column(name, justify="right")
    for before, run in itertools.pairwise([None, *runs]):
        assert run is not None
        if before and before["sessions"] != run["sessions"]:
            table.add_section()
        nothing = dict.fromkeys(("p50", "p95", "p99"), 0.0)
        delay, stale = run["input_to_frame_ms"] or nothing, run["staleness_ms"] or nothing
        table.add_row(
            str(run["sessions"]),
            run["policy"],
            *(f"{value:.0f}" for value in (delay["p50"], delay["p95"], delay["p99"], stale["p95"])),
            f"{run['all_frames_per_s']:.0f}",
            f"{run['overtaken'] or 0:.0%}",
            f"{run['wasted_row_steps']:.0%}",
            f"{run['mean_batch']:.1f}",
            f"{run['fairness'] or 0:.3f}",
        )
    console.print(table)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    assert __doc__ is not None
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    device = parser.add_mutually_exclusive_group()
    device.add_argument("--preset", choices=PRESETS, default="cpu-embedded", help="a device")
    device.add_argument("--table", type=Path, help="a device as measured: JSON as StepTable.export gives it")
    parser.add_argument("--max-rows", type=int, help="as the server's setting; else the preset's, or 8")
    parser.add_argument("--trace", default="typing", help="typing, camera, flood, recorded or a .jsonl file")
    parser.add_argument("--sessions", default="1,4,8,16,32", help="numbers of them")
    parser.add_argument("--cameras", type=int, default=0, help="beside them; the delays are those of the others")
    parser.add_argument("--jobs", type=int, default=0, help="of the queue that are there from the start")
    parser.add_argument("--steps", type=int, default=4, help="of each picture")
    parser.add_argument("--seconds", type=float, default=60.0, help="of the trace")
    parser.add_argument("--seed", type=int, default=1, help="of the traces")
    parser.add_argument("--output", type=Path, help="a file for the report, as JSON")
    options = parser.parse_args(arguments)
    try:
        options.sessions = [int(number) for number in options.sessions.split(",")]
        if find(options.trace).closed:
            raise InputError("trace", "should send at times of its own")
        options.device, options.bucket = PRESETS[options.preset], ""
        if options.table:
            options.device, options.bucket = read_table(options.table, options.max_rows or 8)
        elif options.max_rows:
            options.device = replace(options.device, max_rows=options.max_rows)
    except (InputError, ValueError) as error:
        parser.error(str(error))
    if (
        min(*options.sessions, options.steps, options.seconds, options.device.max_rows) < 1
        or min(options.cameras, options.jobs) < 0
    ):
        parser.error("sessions, steps, seconds and rows are at least 1")
    return options


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    console = Console()
    report = surroundings() | {
        "device": str(options.table or options.preset),
        "table": options.device.table.export(),
        "max_rows": options.device.max_rows,
        "sizes": list(options.device.sizes),
        "trace": options.trace,
        "cameras": options.cameras,
        "jobs": options.jobs,
        "steps": options.steps,
        "seconds": options.seconds,
        "seed": options.seed,
        "runs": [],
    }
    todo = list(itertools.product(options.sessions, POLICIES))
    for sessions, policy in track(todo, "simulating", console=console, transient=True):
        outcome = simulate(options.device, policy, crowd(options, sessions))
        run = {"sessions": sessions, "policy": policy.name} | figures(outcome, options.seconds, sessions)
        report["runs"].append(run)
    others = [f"{count} {name}" for count, name in ((options.cameras, "cameras"), (options.jobs, "jobs")) if count]
    beside = f" beside {' and '.join(others)}" if others else ""
    show(console, report["runs"], f"{report['device']}: {options.trace}{beside}; simulated")
    if options.output:
        options.output.write_bytes(orjson.dumps(report, option=orjson.OPT_INDENT_2))


if __name__ == "__main__":
    main()

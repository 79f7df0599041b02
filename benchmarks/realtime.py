"""What people at a real-time image server feel: delays, freshness and fairness, against a server that runs already.

    python benchmarks/realtime.py --url http://localhost:8000 --sessions 8 --seconds 30 --output typing.json
    python benchmarks/realtime.py --trace single --image
    python benchmarks/realtime.py --idle --sessions 16 --pid "$(pgrep -of 'lcm-rt serve')"

``benchmarks/README.md`` defines each figure. Knows the wire, and nothing of the server's inside.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import datetime
import importlib.metadata
import io
import itertools
import os
import platform
import random
import shlex
import subprocess
import sys
import time
import urllib.request
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgpack
import orjson
from PIL import Image, ImageDraw
from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed

KEYS_PER_S = 6.0
BURST_S = (3.0, 7.0)
DUTY = 0.6
CAMERA_HZ = 30.0
READY_S = 600.0
"""How long the server may take to load its models."""
DRAIN_S = 15.0
"""How long the answers to the last messages are waited for."""

WARM_UP = "warm-up"
PROMPT = "sunset over a lake with mountains"

console = Console()


# The traces: when a client sends, and what.


@dataclass(frozen=True, slots=True)
class Key:
    """One message to be sent ``at`` seconds after the start."""

    at: float
    prompt: str
    seed: int


def prompts(rng: random.Random) -> Iterator[str]:
    """What one person has in the field after each keystroke; no two people type the same."""
    while True:
        text = " ".join(
            (
                rng.choice(("a", "the", "one", "some")),
                rng.choice(("quiet", "bright", "stormy", "old", "wide", "golden", "misty", "frozen")),
                rng.choice(("lake", "forest", "meadow", "desert", "house", "sea", "valley", "coast")),
                rng.choice(("under", "below", "before", "against")),
                rng.choice(("mountains", "hills", "clouds", "stars", "the moon", "the sun")),
                rng.choice(("at sunset", "at night", "at dawn", "in the morning", "at noon", "in winter")),
            )
        )
        yield from (text[:end] for end in range(1, len(text) + 1))


def typing_trace(seconds: float, rng: random.Random) -> list[Key]:
    """Bursts of keystrokes with pauses between them, entered at a random point."""
    texts = prompts(rng)
    keys: list[Key] = []
    burst = rng.uniform(*BURST_S)
    now = -rng.uniform(0, burst / DUTY)
    while now < seconds:
        end = now + burst
        while now < end:
            if 0 <= now < seconds:
                keys.append(Key(now, next(texts), 42))
            now += rng.gammavariate(4, 1 / (4 * KEYS_PER_S))
        now = end + burst * (1 / DUTY - 1)
        burst = rng.uniform(*BURST_S)
    return keys


def camera_trace(seconds: float, rng: random.Random) -> list[Key]:
    """A message at every tick of a camera; clients are out of step with each other."""
    phase = rng.random()
    return [Key((n + phase) / CAMERA_HZ, PROMPT, n) for n in range(int(seconds * CAMERA_HZ))]


TRACES = {"typing": typing_trace, "camera": camera_trace}


def sketch(side: int, turn: float) -> bytes:
    """A JPEG as a drawing pad or a camera would send it; ``turn``, 0 to 1, moves its sun."""
    picture = Image.new("RGB", (side, side), "#f4b183")
    draw = ImageDraw.Draw(picture)
    x, y, r = side * turn, side * (0.25 + 0.2 * abs(turn - 0.5)), side * 0.08
    draw.ellipse((x - r, y - r, x + r, y + r), fill="#ffe699")
    draw.polygon([(0, side * 0.6), (side * 0.3, side * 0.3), (side * 0.6, side * 0.6)], fill="#7f6000")
    draw.rectangle((0, side * 0.6, side, side), fill="#2e75b6")
    draw.line([(0, side * 0.6), (side, side * 0.6)], fill="#1f4e79", width=max(2, side // 64))
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=70)
    return file.getvalue()


# One client.


@dataclass(slots=True)
class Client:
    """What one connection sent and got; times are seconds of the performance counter."""

    sent_at: list[float] = field(default_factory=list)  # by message number; when it was due, if it came late
    frames: list[tuple[float, int]] = field(default_factory=list)  # arrival, message number
    timings: list[dict[str, float]] = field(default_factory=list)  # the server's own, of each frame
    late: list[float] = field(default_factory=list)  # how far this program itself lagged behind the trace
    errors: Counter[str] = field(default_factory=Counter)
    warmed: int = 0
    notices: int = 0
    failed: int = 0
    bytes_sent: int = 0
    bytes_received: int = 0
    picture: dict[str, Any] = field(default_factory=dict)
    settled: int = -1  # newest message number that was answered, with a picture or an error
    progressed: asyncio.Event = field(default_factory=asyncio.Event)
    is_open: bool = True
    reason: str = ""  # of the latest error


class Load:
    """The messages that all clients send: what the trace says, and what the command line adds."""

    def __init__(self, options: argparse.Namespace, side: int) -> None:
        self.pictures = [sketch(side, turn / 16) for turn in range(16)] if options.image else []
        # Someone who types does not redraw: the sketch stays. Otherwise each message has another one.
        self._moves = options.trace != "typing"
        self._fixed: dict[str, Any] = {}
        if options.steps is not None:
            self._fixed["num_inference_steps"] = options.steps
        if options.size is not None:
            self._fixed["image_size"] = {"width": options.size, "height": options.size}
        if options.image:
            self._fixed["strength"] = options.strength

    def message(self, number: int | str, key: Key) -> bytes:
        fields = {"prompt": key.prompt, "seed": key.seed, "request_id": number, **self._fixed}
        if self.pictures:
            turn = number if self._moves and isinstance(number, int) else 0
            fields["image_bytes"] = self.pictures[turn % len(self.pictures)]
        return bytes(msgpack.packb(fields))


async def receive(socket: ClientConnection, client: Client) -> None:
    """Take in answers until the connection ends; nothing is done with a picture but to weigh it."""
    try:
        while True:
            frame = await socket.recv()
            now = time.perf_counter()
            client.bytes_received += len(frame)
            if isinstance(frame, bytes):
                answer = msgpack.unpackb(frame)
                number = answer["request_id"]
                if number == WARM_UP:
                    client.warmed += 1
                    client.picture = {name: answer["images"][0][name] for name in ("width", "height", "content_type")}
                    client.picture |= {"bytes": len(answer["images"][0]["content"])}
                    client.picture |= {name: answer[name] for name in ("model", "num_inference_steps")}
                else:
                    client.frames.append((now, number))
                    client.timings.append(answer["timings"])
                    client.settled = max(client.settled, number)
            else:
                control = orjson.loads(frame)
                if control["type"] == "x-fal-message":
                    client.notices += 1
                    continue
                client.errors[control["error"]] += 1
                client.reason = control["reason"]
                if isinstance(number := control.get("request_id"), int):
                    client.failed += 1
                    client.settled = max(client.settled, number)
            client.progressed.set()
    except ConnectionClosed as closed:
        if closed.sent is None or closed.rcvd_then_sent:  # not our own farewell
            client.errors[f"closed_{closed.rcvd.code if closed.rcvd else 1006}"] += 1
        client.is_open = False
        client.progressed.set()


async def settle(client: Client, number: int) -> None:
    """Wait until message ``number``, or a newer one, is answered."""
    while client.settled < number and client.is_open:
        client.progressed.clear()
        await client.progressed.wait()


async def warm_up(socket: ClientConnection, client: Client, load: Load, count: int) -> None:
    """The first pictures fill the server's caches; they are in no figure but the size of a picture."""
    with contextlib.suppress(ConnectionClosed):
        for number in range(count):
            await socket.send(load.message(WARM_UP, Key(0, PROMPT, number)))
            while client.warmed <= number and not client.errors:
                client.progressed.clear()
                await client.progressed.wait()
    if client.warmed < count:
        raise SystemExit(f"the server refused a warm-up message: {client.reason or dict(client.errors)}")


async def follow(socket: ClientConnection, client: Client, load: Load, keys: list[Key], begun_at: float) -> None:
    """Open loop: each message at its time, whatever has become of those before it."""
    try:
        for number, key in enumerate(keys):
            due = begun_at + key.at
            await asyncio.sleep(due - time.perf_counter())
            message = load.message(number, key)
            # From when it was due, not from when we managed: else a stall would hide itself (coordinated omission).
            client.sent_at.append(due)
            client.late.append(time.perf_counter() - due)
            await socket.send(message)
            client.bytes_sent += len(message)
    except ConnectionClosed:
        client.is_open = False
    with contextlib.suppress(TimeoutError):  # then it is counted as never shown
        async with asyncio.timeout(DRAIN_S):
            await settle(client, len(client.sent_at) - 1)


async def take_turns(socket: ClientConnection, client: Client, load: Load, end_at: float) -> None:
    """Closed loop: the next message when the picture has come."""
    for number in itertools.count():
        if time.perf_counter() >= end_at or not client.is_open:
            return
        message = load.message(number, Key(0, PROMPT, number))
        client.sent_at.append(time.perf_counter())
        await socket.send(message)
        client.bytes_sent += len(message)
        await settle(client, number)


# The whole.


async def measure(options: argparse.Namespace, side: int, progress: Progress) -> tuple[list[Client], dict[str, Any]]:
    """All clients at once; returns them, and the figures of this program and of the server's processes."""
    load, clients = Load(options, side), [Client() for _ in range(options.sessions)]
    uri = options.url.rstrip("/").replace("http", "ws", 1) + f"/{options.app}/realtime"
    if options.max_buffering is not None:
        uri += f"?max_buffering={options.max_buffering}"
    sockets = await asyncio.gather(*(connect(uri, compression=None, max_size=None) for _ in clients))
    task = progress.add_task("warm-up", total=None)
    readers = [asyncio.create_task(receive(s, c)) for s, c in zip(sockets, clients, strict=True)]
    try:
        if not options.idle:
            await asyncio.gather(*(warm_up(s, c, load, options.warm_up) for s, c in zip(sockets, clients, strict=True)))
        for client in clients:
            client.bytes_sent = client.bytes_received = 0
        watch = Watch(options.pid)
        begun_at, cpu_s = time.perf_counter(), time.process_time()
        end_at = begun_at + options.seconds
        ticking = asyncio.create_task(_tick(progress, task, clients, begun_at, options.seconds))
        if options.idle:
            await asyncio.sleep(options.seconds)
        elif options.trace == "single":
            await take_turns(sockets[0], clients[0], load, end_at)
        else:
            traces = [
                TRACES[options.trace](options.seconds, random.Random(f"{options.seed}/{n}"))
                for n in range(options.sessions)
            ]
            await asyncio.gather(
                *(follow(s, c, load, t, begun_at) for s, c, t in zip(sockets, clients, traces, strict=True))
            )
        ticking.cancel()
        wall_s = time.perf_counter() - begun_at
        figures: dict[str, Any] = {
            "begun_at": begun_at,
            "generator": {
                "cpu_percent": round(100 * (time.process_time() - cpu_s) / wall_s, 1),
                "late_ms": spread([late for client in clients for late in client.late]),
            },
        }
        if options.pid is not None:
            figures["server"] = watch.figures()
    finally:
        await asyncio.gather(*(socket.close() for socket in sockets))
        await asyncio.gather(*readers)
    return clients, figures


async def _tick(progress: Progress, task: TaskID, clients: list[Client], begun_at: float, seconds: float) -> None:
    progress.reset(task, total=seconds)
    while True:
        elapsed = time.perf_counter() - begun_at
        frames, errors = sum(len(c.frames) for c in clients), sum(c.errors.total() for c in clients)
        words = f"{frames} frames" + (f", [red]{errors} errors[/]" if errors else "")
        progress.update(task, completed=min(elapsed, seconds), description=words)
        await asyncio.sleep(0.25)


class Watch:
    """Processor time of a process and of all below it, out of /proc."""

    def __init__(self, pid: int | None) -> None:
        self._pid = pid
        self._begun_at = time.perf_counter()
        self._before = self._read() if pid is not None else {}

    def _read(self) -> dict[int, tuple[str, float]]:
        """By process id: what it is, and the seconds it has used."""
        children: dict[int, list[int]] = {}
        used: dict[int, float] = {}
        for stat in Path("/proc").glob("[0-9]*/stat"):
            try:
                # proc_pid_stat(5): the name in brackets may hold anything; the state is the first field after it.
                fields = stat.read_text().rpartition(")")[2].split()
            except OSError:
                continue  # gone meanwhile
            pid = int(stat.parent.name)
            children.setdefault(int(fields[1]), []).append(pid)
            used[pid] = (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
        assert self._pid is not None
        if self._pid not in used:
            raise SystemExit(f"there is no process {self._pid}")
        found, todo = {}, [self._pid]
        while todo:
            pid = todo.pop()
            todo += children.get(pid, [])
            command = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            found[pid] = (
                "engine" if "lcm_rt.worker" in command else "front" if pid == self._pid else "other",
                used[pid],
            )
        return found

    def figures(self) -> dict[str, Any]:
        """CPU in percent of one core since the start, and resident memory now; by role."""
        seconds, roles = time.perf_counter() - self._begun_at, {}
        for pid, (role, used) in self._read().items():
            before = self._before.get(pid, (role, 0.0))[1]
            pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
            roles[role] = {
                "pid": pid,
                "cpu_percent": round(100 * (used - before) / seconds, 2),
                "rss_mb": round(pages * os.sysconf("SC_PAGE_SIZE") / 2**20),
            }
        return roles


# The figures.


def percentile(values: list[float], percent: float) -> float:
    """Nearest rank, of sorted values."""
    return values[min(len(values) - 1, int(len(values) * percent / 100))]


def spread(seconds: list[float]) -> dict[str, float] | None:
    """p50, p95, p99 and the largest, in milliseconds."""
    if not seconds:
        return None
    ordered = sorted(seconds)
    figures = {f"p{percent}": percentile(ordered, percent) for percent in (50, 95, 99)} | {"max": ordered[-1]}
    return {name: round(1e3 * value, 2) for name, value in figures.items()}


def delays(client: Client) -> list[float]:
    """For each message, from its sending to the first frame that shows it or a newer one."""
    found: list[float] = []
    for arrived_at, number in client.frames:
        # Frames come in order, so that whatever is not yet shown is shown by this one.
        found += [arrived_at - sent_at for sent_at in client.sent_at[len(found) : number + 1]]
    return found


def staleness(client: Client) -> list[float]:
    """For each frame, the age of the message that it shows."""
    return [arrived_at - client.sent_at[number] for arrived_at, number in client.frames]


def gaps(client: Client) -> list[float]:
    return [after[0] - before[0] for before, after in itertools.pairwise(client.frames)]


def jain(shares: list[float]) -> float | None:
    """Jain's fairness index (Jain, Chiu and Hawe 1984): 1 is equal shares, 1/n all for one of n."""
    squares = sum(share * share for share in shares)
    return round(sum(shares) ** 2 / (len(shares) * squares), 4) if squares else None


def describe(clients: list[Client], begun_at: float, seconds: float) -> dict[str, Any]:
    """The figures of some clients together."""
    end_at = begun_at + seconds
    in_time = sum(arrived_at <= end_at for client in clients for arrived_at, _ in client.frames)
    sent = sum(len(client.sent_at) for client in clients)
    frames = sum(len(client.frames) for client in clients)
    failed = sum(client.failed for client in clients)
    shown = [delay for client in clients for delay in delays(client)]
    return {
        "sent": sent,
        "frames": frames,
        "superseded": sent - frames - failed,
        "unshown": sent - len(shown),
        "errors": dict(sum((client.errors for client in clients), Counter[str]())),
        "frames_per_s": round(in_time / seconds, 2),
        "input_to_frame_ms": spread(shown),
        "staleness_ms": spread([age for client in clients for age in staleness(client)]),
        "frame_gap_ms": spread([gap for client in clients for gap in gaps(client)]),
        "bytes_sent": sum(client.bytes_sent for client in clients),
        "bytes_received": sum(client.bytes_received for client in clients),
    }


def describe_turns(client: Client) -> dict[str, Any]:
    """Closed loop only: where the round trip goes."""
    trips = staleness(client)
    totals = [timings["total"] for timings in client.timings]
    engine = [timings["total"] - timings.get("queue", 0.0) for timings in client.timings]
    stages = sorted({name for timings in client.timings for name in timings} - {"total"})
    return {
        "round_trip_ms": spread(trips),
        "engine_ms": spread(engine),
        "overhead_ms": spread([trip - total for trip, total in zip(trips, totals, strict=True)]),
        "stages_ms": {name: spread([timings.get(name, 0.0) for timings in client.timings]) for name in stages},
    }


# Where and with what.


def ask(url: str, path: str) -> Any:
    try:
        with urllib.request.urlopen(url.rstrip("/") + path, timeout=10) as answer:
            return orjson.loads(answer.read())
    except OSError as error:
        raise SystemExit(f"no answer from {url}: {error}") from None


def wait_ready(url: str) -> None:
    """Wait for the models, saying how far they are."""
    with console.status("asking the server") as status:
        end_at = time.monotonic() + READY_S
        while (health := ask(url, "/health"))["status"] != "ready":
            if health["status"] == "failed" or time.monotonic() > end_at:
                raise SystemExit(f"the server is not ready: {health}")
            status.update(f"loading: {health['stage']}")
            time.sleep(0.5)


def processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(": ")[2] for line in lines if line.startswith("model name")), platform.machine())


def revision() -> str | None:
    """The checkout's commit, with a mark when files differ from it; None outside of one."""

    def git(*words: str) -> str:
        return subprocess.run(
            ["git", *words], cwd=Path(__file__).parent, capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("+changes" if git("status", "--porcelain") else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def surroundings(models: dict[str, Any]) -> dict[str, Any]:
    versions: dict[str, str] = {"python": platform.python_version()}
    for name in ("lcm-rt", "websockets", "msgpack", "uvicorn", "starlette", "torch", "diffusers"):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": shlex.join(["python", *sys.orig_argv[1:]]),
        "revision": revision(),
        "machine": {
            "processor": processor(),
            "cores": os.cpu_count(),
            "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
            "system": platform.platform(),
            "load_before": round(os.getloadavg()[0], 2),
        },
        "server": models,
        "versions": versions,
    }


# The terminal.


def show(report: dict[str, Any]) -> None:
    table = Table("", "p50", "p95", "p99", "max", title=f"{report['trace']}, {len(report['clients'])} session(s)")
    if report["trace"] == "single":  # here a round trip is the delay, the staleness and the gap in one
        turns = report["single"]
        spreads = {
            "round trip": turns["round_trip_ms"],
            "  engine": turns["engine_ms"],
            "  overhead": turns["overhead_ms"],
        }
    else:
        spreads = {
            "input to frame": report["all"]["input_to_frame_ms"],
            "staleness": report["all"]["staleness_ms"],
            "frame gap": report["all"]["frame_gap_ms"],
            "generator late": report["generator"]["late_ms"],
        }
    for name, figures in spreads.items():
        if figures:
            table.add_row(f"{name}, ms", *(f"{figures[column]:.1f}" for column in ("p50", "p95", "p99", "max")))
    console.print(table)
    if len(report["clients"]) > 1:
        table = Table("client", "sent", "frames", "superseded", "frames/s", "to frame p50", "p95", "errors")
        for number, client in enumerate(report["clients"], 1):
            shown = client["input_to_frame_ms"] or {"p50": float("nan"), "p95": float("nan")}
            table.add_row(
                *(str(value) for value in (number, client["sent"], client["frames"], client["superseded"])),
                *(f"{value:.1f}" for value in (client["frames_per_s"], shown["p50"], shown["p95"])),
                str(client["errors"] or ""),
            )
        console.print(table)
    everyone = report["all"]
    up, down = (everyone[name] / report["seconds"] / 1e3 for name in ("bytes_sent", "bytes_received"))
    console.print(
        f"{everyone['sent']} sent, {everyone['frames']} frames ({everyone['frames_per_s']}/s), "
        f"{everyone['superseded']} superseded, {everyone['unshown']} never shown, "
        f"errors {everyone['errors'] or 'none'}, fairness {report['fairness']}, {up:.0f} kB/s up, {down:.0f} kB/s down",
        soft_wrap=True,
    )
    if report["generator"]["cpu_percent"] > 80:
        console.print("[red]this program itself was busy all the time: its figures say little about the server[/]")


def show_server(report: dict[str, Any]) -> None:
    for role, process in report.get("server_processes", {}).items():
        console.print(
            f"{role} (pid {process['pid']}): {process['cpu_percent']} % of a core, {process['rss_mb']} MB resident"
        )


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    assert __doc__ is not None
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--url", default="http://localhost:8000")
    parser.add_argument("--app", default="fal-ai/lcm", help="the application's id, or a model's name")
    parser.add_argument("--trace", choices=(*TRACES, "single"), default="typing")
    parser.add_argument("--idle", action="store_true", help="connect, say nothing, and watch the server's processes")
    parser.add_argument("--sessions", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=30.0)
    parser.add_argument("--image", action="store_true", help="send a sketch with each message, else text only")
    parser.add_argument("--strength", type=float, default=0.8, help="of the change to the sketch")
    parser.add_argument("--steps", type=int, help="denoising steps, else the server's default")
    parser.add_argument("--size", type=int, help="side of the pictures in pixels, else the model's")
    parser.add_argument("--max-buffering", type=int, help="messages that may wait, 1 to 60; else the server's default")
    parser.add_argument("--warm-up", type=int, default=3, help="pictures per session before the clock starts")
    parser.add_argument("--seed", type=int, default=1, help="of the traces")
    parser.add_argument("--pid", type=int, help="the server's process id, to measure its CPU (Linux)")
    parser.add_argument("--output", type=Path, help="a file for the report, as JSON")
    options = parser.parse_args(arguments)
    if options.trace == "single" and options.sessions != 1 and not options.idle:
        parser.error("--trace single is one client; leave --sessions at 1")
    if options.idle and options.pid is None:
        parser.error("--idle needs --pid")
    if options.warm_up < 1 or options.sessions < 1:
        parser.error("--warm-up and --sessions are at least 1")
    return options


def main() -> None:
    options = parse()
    wait_ready(options.url)
    models = ask(options.url, "/models")
    default = next(model for model in models["models"] if model["default"])
    model = next((model for model in models["models"] if model["name"] == options.app), default)
    report = surroundings({"device": models["device"], "model": model["name"]})
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        clients, figures = asyncio.run(measure(options, options.size or model["size"], progress))
    begun_at = figures.pop("begun_at")
    report |= {
        "trace": "idle" if options.idle else options.trace,
        "seconds": options.seconds,
        "sessions": options.sessions,
        "picture": clients[0].picture,
        "server_processes": figures.pop("server", {}),
        **figures,
    }
    if not options.idle:
        report["all"] = describe(clients, begun_at, options.seconds)
        # Shares of what each one sent: people who typed more get more frames without being favoured.
        report["fairness"] = jain([len(c.frames) / len(c.sent_at) for c in clients if c.sent_at])
        if options.trace == "single":
            report["single"] = describe_turns(clients[0])
        report["clients"] = [describe([client], begun_at, options.seconds) for client in clients]
        show(report)
    show_server(report)
    if options.output:
        options.output.write_bytes(orjson.dumps(report, option=orjson.OPT_INDENT_2))


if __name__ == "__main__":
    main()

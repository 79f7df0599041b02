"""What the front process costs: CPU time per frame, the latency that it adds, and what it takes while idle.

    python benchmarks/front.py [--output front.json]
    python benchmarks/front.py --frame-kb 1000 --sketch-kb 1000 --seconds 3

The real server runs in a process of its own. Its engine process answers every request at once with the same picture,
so that whatever is left is the front's: WebSocket in, validation, the way to the engine and back, WebSocket out.

* **Saturation**: each session sends its next message when the picture has come. The figure is the front's CPU time
  (user and system, all threads, from /proc) per frame, which a busy machine hardly changes; its inverse is how many
  frames one core could do.
* **Latency**: an open loop at a fixed rate over many sessions, from when a message was due to the last byte of its
  picture. Nothing is subtracted: it holds the engine's turn-around, which is measured by itself too.
* **Idle**: connections that say nothing.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import itertools
import multiprocessing
import os
import random
import select
import socket
import struct
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import msgpack
import orjson
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from lcm_rt.bench.figures import spread
from lcm_rt.bench.surroundings import surroundings

PROMPT = "sunset over a lake with mountains"
PATH = "/fal-ai/lcm/realtime"
READY_S = 60.0
WARM_UP_S = 0.5
SPIN_S = 0.0002
"""Before a message is due the generator stops sleeping: a timer of the kernel may come this late."""

console = Console()


# The engine.


def engine_command(frame_bytes: int) -> tuple[str, ...]:
    return sys.executable, __file__, "--engine", str(frame_bytes)


def answer(end: socket.socket, frame_bytes: int) -> None:
    """Be an engine process that has every picture ready, until the front is gone."""
    picture = random.Random(0).randbytes(frame_bytes)
    unpacker = msgpack.Unpacker(max_buffer_size=2**29)

    def send(**message: Any) -> None:
        end.sendall(msgpack.packb(message))

    while data := end.recv(2**20):
        received_at = time.perf_counter()
        unpacker.feed(data)
        for message in unpacker:
            match message:
                case {"op": "submit", "keys": keys, "request": request}:
                    for seed, key in enumerate(keys, request["seed"]):
                        send(op="begun", key=key)
                        result = {
                            "image": picture,
                            "content_type": "image/jpeg",
                            "width": 512,
                            "height": 512,
                            "seed": seed,
                            "model": request["model"],
                            "num_inference_steps": request["num_inference_steps"],
                            # The stages of a real one: the front counts each.
                            "timings": dict.fromkeys(("decode", "queue", "text", "unet", "vae", "encode_image"), 0.0)
                            | {"total": time.perf_counter() - received_at},
                        }
                        send(op="result", key=key, result=result)
                case {"op": "ping"}:
                    send(op="pong", turns=time.monotonic_ns())
                case {"models": models}:
                    for model in models:
                        traits = {"size": 512, "steps": 4, "safety": False, "controlnet": False}
                        send(op="loaded", model=model["name"], seconds=0.0, traits=traits, memory=0)
                    send(op="ready")


# The server.


def serve(ready: Connection, folder: str, max_sessions: int, frame_bytes: int) -> None:
    """Be the front process: the server as ``lcm-rt serve`` runs it, but for its engine."""
    from lcm_rt.server.app import create_app
    from lcm_rt.server.serve import Server, listen, uvicorn_config
    from lcm_rt.settings import Settings

    app = create_app(Settings(data_dir=Path(folder), max_sessions=max_sessions))
    app.state.service.workers.command = engine_command(frame_bytes)
    end = listen("127.0.0.1", 0)
    ready.send(end.getsockname()[1])
    asyncio.run(Server(uvicorn_config(app)).serve([end]))


class Front(NamedTuple):
    """A running front process."""

    pid: int
    port: int


@contextmanager
def running(frame_bytes: int, max_sessions: int = 256) -> Iterator[Front]:
    """A server that answers, until the block ends."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    with tempfile.TemporaryDirectory() as folder:
        process = context.Process(target=serve, args=(theirs, folder, max_sessions, frame_bytes), daemon=True)
        process.start()
        theirs.close()
        try:
            port = ours.recv()
            end_at = time.monotonic() + READY_S
            while not _is_ready(port):
                if time.monotonic() > end_at:
                    raise SystemExit("the server does not become ready")
                time.sleep(0.02)
            assert process.pid is not None
            yield Front(process.pid, port)
        finally:
            process.terminate()
            process.join()


def _is_ready(port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/health/ready", timeout=5):
            return True
    except (urllib.error.URLError, ConnectionError):
        return False


def cpu_seconds(pid: int) -> float:
    """What all threads of a process have run so far; of those that have ended too, but then in ticks of 10 ms."""
    with suppress(OSError):
        threads = Path(f"/proc/{pid}/task").glob("*/schedstat")
        return sum(int(thread.read_text().split()[0]) for thread in threads) / 1e9
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


# The load.


class Client:
    """A WebSocket client that costs little, so that it is not what is measured: it masks with zeros."""

    def __init__(self, port: int) -> None:
        self.socket = socket.create_connection(("127.0.0.1", port))
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._buffer = bytearray()
        lines = (
            f"GET {PATH} HTTP/1.1",
            f"Host: 127.0.0.1:{port}",
            "Connection: Upgrade",
            "Upgrade: websocket",
            "Sec-WebSocket-Version: 13",
            f"Sec-WebSocket-Key: {base64.b64encode(bytes(16)).decode()}",
        )
        self.socket.sendall("".join(f"{line}\r\n" for line in (*lines, "")).encode())
        while b"\r\n\r\n" not in self._buffer:
            self._buffer += self.socket.recv(4096)
        head, _, rest = self._buffer.partition(b"\r\n\r\n")
        if b" 101 " not in head.partition(b"\r\n")[0]:
            raise ConnectionError(f"the handshake failed: {bytes(head)!r}")
        self._buffer = rest

    def fileno(self) -> int:
        return self.socket.fileno()

    def send(self, message: bytes | str) -> None:
        """One frame; text for a str."""
        payload = message.encode() if isinstance(message, str) else message
        self._send(0x1 if isinstance(message, str) else 0x2, payload)

    def _send(self, opcode: int, payload: bytes) -> None:
        size = len(payload)
        if size < 126:
            head = struct.pack("!BB", 0x80 | opcode, 0x80 | size)
        elif size < 2**16:
            head = struct.pack("!BBH", 0x80 | opcode, 0x80 | 126, size)
        else:
            head = struct.pack("!BBQ", 0x80 | opcode, 0x80 | 127, size)
        self.socket.sendall(head + bytes(4) + payload)

    def receive(self) -> list[bytes | str]:
        """The messages that what can be read now completes. Raises: ConnectionError: the server hung up."""
        data = self.socket.recv(2**18)
        if not data:
            raise ConnectionError("the server has closed the connection")
        self._buffer += data
        return list(self._messages())

    def _messages(self) -> Iterator[bytes | str]:
        while len(self._buffer) >= 2:
            first, size = self._buffer[:2]
            start = {126: 4, 127: 10}.get(size, 2)
            if len(self._buffer) < start:
                return
            if start > 2:
                size = int.from_bytes(self._buffer[2:start])
            if len(self._buffer) < start + size:
                return
            payload = bytes(memoryview(self._buffer)[start : start + size])
            del self._buffer[: start + size]
            match first:
                case 0x81:
                    yield payload.decode()
                case 0x82:
                    yield payload
                case 0x89:
                    self._send(0xA, payload)
                case _:
                    raise ConnectionError(f"a frame with first byte {first:#x}")

    def close(self) -> None:
        self.socket.close()


class Kind(NamedTuple):
    """What clients send: in which codec, and with which picture."""

    codec: str
    sketch: bytes | None

    @property
    def name(self) -> str:
        return self.codec if self.sketch is None else f"{self.codec}, sketch of {len(self.sketch) / 1000:g} kB"

    def messages(self) -> Callable[[int], bytes | str]:
        """Message ``n``; each has another seed, as the server keeps what it made, and its answer says whose it is."""
        fields: dict[str, Any] = {"prompt": PROMPT}
        if self.codec == "msgpack":
            if self.sketch is not None:
                fields["image_bytes"] = self.sketch
            return lambda number: bytes(msgpack.packb({**fields, "seed": number, "request_id": number}))
        if self.sketch is not None:
            fields["image_url"] = f"data:image/jpeg;base64,{base64.b64encode(self.sketch).decode()}"
        return lambda number: orjson.dumps({**fields, "seed": number, "request_id": number}).decode()


def number_of(frame: bytes | str) -> int:
    """Which message a frame answers. Raises: SystemExit: it is an error, or without its picture."""
    reply = orjson.loads(frame) if isinstance(frame, str) else msgpack.unpackb(frame)
    if "images" not in reply:
        raise SystemExit(f"the server answered {reply}")
    assert reply["images"][0].get("content") or reply["images"][0]["url"]
    return int(reply["request_id"])


class Load:
    """Sessions that send messages of one kind and take the answers; times are of the performance counter."""

    def __init__(self, port: int, sessions: int, kind: Kind) -> None:
        self.clients = [Client(port) for _ in range(sessions)]
        self._message = kind.messages()
        self._numbers = itertools.count()
        self._due: dict[int, float] = {}
        self.trips: list[float] = []
        self.late: list[float] = []

    def send(self, client: Client, due: float | None = None) -> None:
        number = next(self._numbers)
        message = self._message(number)
        now = time.perf_counter()
        self._due[number] = now if due is None else due
        self.late.append(now - self._due[number])
        client.send(message)

    def receive(self, timeout_s: float) -> list[Client]:
        """Take what arrives within a time; the clients whose answers came."""
        readable, _, _ = select.select(self.clients, (), (), max(0.0, timeout_s))
        answered = []
        for client in readable:
            for frame in client.receive():
                self.trips.append(time.perf_counter() - self._due.pop(number_of(frame)))
                answered.append(client)
        return answered

    def saturate(self, seconds: float) -> None:
        """Closed loop: every session's next message when its picture has come; some are under way at the end."""
        if not self._due:
            for client in self.clients:
                self.send(client)
        end_at = time.perf_counter() + seconds
        while time.perf_counter() < end_at:
            for client in self.receive(1.0):
                self.send(client)

    def pace(self, rate: float, seconds: float) -> None:
        """Open loop: sessions take turns, at even distances, whatever has become of what they sent before."""
        begun_at = time.perf_counter()
        for number, client in zip(range(int(rate * seconds)), itertools.cycle(self.clients), strict=False):
            due = begun_at + number / rate
            while (left := due - time.perf_counter()) > 0:
                self.receive(left - SPIN_S)
            self.send(client, due)

    def listen(self, seconds: float) -> None:
        """Say nothing."""
        end_at = time.perf_counter() + seconds
        while (left_s := end_at - time.perf_counter()) > 0:
            self.receive(left_s)

    def drain(self) -> None:
        """Wait for what is under way."""
        end_at = time.perf_counter() + 5
        while self._due and time.perf_counter() < end_at:
            self.receive(0.1)

    def close(self) -> None:
        for client in self.clients:
            client.close()


# The figures.


def per_frame(frames: int, cpu_s: float, wall_s: float) -> dict[str, float]:
    """What ``frames`` cost that took ``cpu_s`` of CPU and ``wall_s`` of time."""
    return {
        "frames": frames,
        "cpu_us_per_frame": round(1e6 * cpu_s / frames, 1),
        "frames_per_core_s": round(frames / cpu_s),
        "frames_per_s": round(frames / wall_s),
        "core_percent": round(100 * cpu_s / wall_s, 1),
    }


def measure(front: Front, load: Load, work: Callable[[], None]) -> dict[str, Any]:
    """Do ``work`` and say what the front took for it."""
    load.trips.clear()
    load.late.clear()
    cpu_s, own_s, begun_at = cpu_seconds(front.pid), time.process_time(), time.perf_counter()
    work()
    wall_s = time.perf_counter() - begun_at
    cpu_s, own_s = cpu_seconds(front.pid) - cpu_s, time.process_time() - own_s
    if not load.trips:
        raise SystemExit("the server has answered nothing")
    return per_frame(len(load.trips), cpu_s, wall_s) | {
        "generator_core_percent": round(100 * own_s / wall_s, 1),
        "round_trip_ms": spread(load.trips),
        "late_ms": spread(load.late),
    }


def saturation(front: Front, sessions: int, kind: Kind, seconds: float) -> dict[str, Any]:
    load = Load(front.port, sessions, kind)
    load.saturate(WARM_UP_S)
    figures = measure(front, load, lambda: load.saturate(seconds))
    load.drain()
    load.close()
    return {"kind": kind.name, "sessions": sessions, **figures}


def latency(front: Front, sessions: int, kind: Kind, rate: float, seconds: float) -> dict[str, Any]:
    load = Load(front.port, sessions, kind)
    load.pace(rate, WARM_UP_S)
    load.drain()

    def work() -> None:
        load.pace(rate, seconds)
        load.drain()

    figures = measure(front, load, work)
    load.close()
    return {"kind": kind.name, "sessions": sessions, "rate": rate, "sent": int(rate * seconds), **figures}


def idle(front: Front, connections: int, seconds: float) -> dict[str, Any]:
    """Connections that say nothing but answer the server's pings; one of each comes in 20 s."""
    load = Load(front.port, connections, Kind("msgpack", None))
    load.listen(1)
    cpu_s = cpu_seconds(front.pid)
    load.listen(seconds)
    cpu_s = cpu_seconds(front.pid) - cpu_s
    load.close()
    return {"connections": connections, "core_percent": round(100 * cpu_s / seconds, 3)}


def turn_around(frame_bytes: int, rate: float, seconds: float) -> dict[str, float] | None:
    """The engine by itself, asked over a socket pair as the front asks it."""
    ours, theirs = socket.socketpair()
    process = subprocess.Popen([*engine_command(frame_bytes), str(theirs.fileno())], pass_fds=(theirs.fileno(),))
    theirs.close()
    unpacker = msgpack.Unpacker(max_buffer_size=2**29)

    def ask(message: dict[str, Any], last: str) -> float:
        begun_at = time.perf_counter()
        ours.sendall(msgpack.packb(message))
        while True:
            unpacker.feed(ours.recv(2**18))
            if any(heard["op"] == last for heard in unpacker):
                return time.perf_counter() - begun_at

    ask({"models": []}, "ready")
    submit = {"op": "submit", "keys": [1], "request": {"seed": 1, "model": "m", "num_inference_steps": 4}}
    trips = []
    for _ in range(int(rate * seconds)):
        trips.append(ask(submit, "result"))
        time.sleep(1 / rate)
    ours.close()
    process.wait()
    return spread(trips)


# The terminal.


def show(report: dict[str, Any]) -> None:
    table = Table("saturation", "sessions", "CPU µs/frame", "frames/s of a core", "frames/s now", "front's CPU")
    for row in report["saturation"]:
        table.add_row(
            *(str(row[name]) for name in ("kind", "sessions", "cpu_us_per_frame", "frames_per_core_s", "frames_per_s")),
            f"{row['core_percent']} %",
        )
    console.print(table)
    table = Table("latency, ms", "p50", "p95", "p99", "max", "CPU µs/frame", "frames")
    for row in report["latency"]:
        table.add_row(
            f"{row['kind']}: {row['sessions']} sessions, {row['rate']:g}/s",
            *(f"{row['round_trip_ms'][name]:.2f}" for name in ("p50", "p95", "p99", "max")),
            f"{row['cpu_us_per_frame']}",
            f"{row['frames']} of {row['sent']}",
        )
        table.add_row("  generator late", *(f"{row['late_ms'][name]:.2f}" for name in ("p50", "p95", "p99", "max")))
    engine = report["engine_turn_around_ms"]
    table.add_row("the engine by itself", *(f"{engine[name]:.2f}" for name in ("p50", "p95", "p99", "max")))
    console.print(table)
    table = Table("idle connections", "CPU, % of a core")
    for row in report["idle"]:
        table.add_row(str(row["connections"]), f"{row['core_percent']:.3f}")
    console.print(table)


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    assert __doc__ is not None
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--seconds", type=float, default=3.0, help="of each saturation; latency takes twice as long")
    parser.add_argument("--frame-kb", type=float, default=50.0, help="size of the engine's picture")
    parser.add_argument("--sketch-kb", type=float, default=30.0, help="size of a client's picture")
    parser.add_argument("--sessions", type=int, nargs="+", default=[8, 64], help="of the saturation")
    parser.add_argument("--rate", type=float, default=200.0, help="messages/s of the latency, over most --sessions")
    parser.add_argument("--idle", type=int, nargs="*", default=[0, 16, 256], help="idle connections")
    parser.add_argument("--idle-seconds", type=float, default=20.0, help="of each; a ping comes in 20 s")
    parser.add_argument("--output", type=Path, help="a file for the report, as JSON")
    parser.add_argument("--engine", type=int, nargs=2, help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Every measurement, one after the other."""
    frame_bytes, sketch = int(options.frame_kb * 1000), random.Random(1).randbytes(int(options.sketch_kb * 1000))
    kinds = [Kind(codec, picture) for codec in ("msgpack", "json") for picture in (None, sketch)]
    most, seconds = max(options.sessions), options.seconds
    report: dict[str, Any] = {"engine_turn_around_ms": turn_around(frame_bytes, options.rate, seconds)}
    with running(frame_bytes, max(256, most, *options.idle)) as front:
        plan: dict[str, list[Callable[[], dict[str, Any]]]] = {
            "idle": [partial(idle, front, count, options.idle_seconds) for count in options.idle],
            "saturation": [
                partial(saturation, front, sessions, kind, seconds) for kind in kinds for sessions in options.sessions
            ],
            "latency": [partial(latency, front, most, kind, options.rate, 2 * seconds) for kind in kinds],
        }
        columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
        with Progress(*columns, console=console, transient=True) as progress:
            for name, steps in plan.items():
                report[name] = [step() for step in progress.track(steps, description=name)]
    return report


def main() -> None:
    options = parse()
    if options.engine:
        frame_bytes, end = options.engine
        answer(socket.socket(fileno=end), frame_bytes)
        return
    report = surroundings() | {"frame_kb": options.frame_kb, "sketch_kb": options.sketch_kb, "seconds": options.seconds}
    report |= run(options)
    show(report)
    if options.output:
        options.output.write_bytes(orjson.dumps(report, option=orjson.OPT_INDENT_2))


if __name__ == "__main__":
    main()

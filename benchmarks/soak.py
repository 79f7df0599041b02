"""Half an hour of everything that clients do: does memory stay flat, and do delays stay what they were?

    python benchmarks/soak.py [--minutes 30] [--output FILE]          # with a server of its own
    python benchmarks/soak.py --url http://localhost:8000 --pid PID   # with one that runs

People type, with and without a sketch; a camera sends; HTTP calls and jobs make pictures of many sizes, with a LoRA and
with masks; clients come and go, in good order and not; others talk nonsense. The exit status is 1 if, after the warm-up
of a fifth of the time, memory grew by more than 1 %, the p99 delay of realtime messages by more than 10 %, descriptors
or threads piled up, a process started anew, or something was answered that should not have been.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import functools
import io
import itertools
import os
import random
import re
import statistics
import sys
import tempfile
import time
from array import array
from collections import Counter, deque
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import httpx2
import orjson
from PIL import Image
from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table
from websockets.asyncio.client import connect
from websockets.exceptions import ConnectionClosed

from lcm_rt.bench import figures, traces
from lcm_rt.bench.dialects import WebSocket
from lcm_rt.bench.observers import Processes, Server
from lcm_rt.bench.serve import Load, measure, wait_ready
from lcm_rt.bench.surroundings import surroundings
from lcm_rt.client import AsyncClient
from lcm_rt.client.values import Size
from lcm_rt.embedded import LORA_DIR
from lcm_rt.errors import InputError, LcmError

SAMPLE_S = 5.0
WARM_UP = 0.2
"""Of the time: caches fill, and the allocators find their size."""
MAX_GROWTH_PERCENT = 1.0
MAX_DRIFT_PERCENT = 10.0
MAX_MORE = 3
"""Descriptors and threads that may be more at the end: which connections are open is chance."""
SIZES = ((256, 256), (128, 128), (192, 256), (256, 320))
"""Width and height: few enough that each was seen in the warm-up, as every size has networks of its own."""
FILL_S = 180.0
REPEAT_MB = 4
"""Of finished pictures that our own server keeps: at its usual 64, that cache would still be growing at the end."""
LORA = LORA_DIR / "ink.safetensors"

console = Console()


@dataclass(slots=True)
class Diary:
    """What was seen; times are seconds since the start."""

    begun_at: float = field(default_factory=time.perf_counter)
    samples: list[dict[str, Any]] = field(default_factory=list)
    shown_at: array[float] = field(default_factory=lambda: array("d"))  # of each realtime message that was shown
    delays: array[float] = field(default_factory=lambda: array("d"))  # s, of the same
    done: Counter[str] = field(default_factory=Counter)  # by what was done
    wrong: Counter[str] = field(default_factory=Counter)  # answers that should not have been

    @property
    def now(self) -> float:
        return time.perf_counter() - self.begun_at


# What clients do. Each plays its part once; ``repeat`` does it again and again.

Part = Callable[["Stage", random.Random], Awaitable[float]]
"""Gives the seconds to rest before it is played again."""


@dataclass(frozen=True, slots=True)
class Stage:
    """A server, and ways to talk to it."""

    url: str
    socket: str
    client: AsyncClient
    http: httpx2.AsyncClient
    diary: Diary
    side: int


def realtime(name: str, trace: str, *, image: bool = False, rest_s: float = 4.0) -> Part:
    """A session of some seconds, and a rest of ``rest_s`` on average before the next."""

    async def play(stage: Stage, rng: random.Random) -> float:
        load = Load(
            traces=(trace,),
            seconds=rng.uniform(8, 20),
            warm_up=0,
            seed=rng.randrange(2**31),
            image_side=stage.side if image else None,
            fields={"strength": 0.8, "previews": rng.random() < 0.1},
        )
        diary = stage.diary
        (log,) = (await measure(WebSocket(stage.socket), load)).logs
        # They come in the order in which they were shown; when does not matter to the second.
        for delay, sent_at in zip(figures.delays(log), log.sent_at, strict=False):
            diary.shown_at.append(sent_at + delay - diary.begun_at)
            diary.delays.append(delay)
        diary.done["frames"] += len(log.frames)
        for code, count in log.errors.items():
            diary.wrong[f"{name}: {code} {log.reason}"] += count
        return rng.uniform(0, 2 * rest_s)

    return play


def text(rng: random.Random) -> str:
    return next(itertools.islice(traces.prompts(rng), rng.randrange(3, 20), None))


def size(rng: random.Random) -> Size:
    width, height = rng.choice(SIZES)
    return {"width": width, "height": height}


async def run(stage: Stage, rng: random.Random) -> float:
    """Pictures by HTTP, of many sizes and kinds of file."""
    made = await stage.client.generate(
        text(rng),
        image_size=size(rng),
        seed=rng.randrange(2**31),
        num_images=rng.choice((1, 1, 2)),
        format=rng.choice(("jpeg", "png", "webp")),
        sync_mode=rng.random() < 0.5,
    )
    assert made.images
    return rng.uniform(1, 4)


async def queue(stage: Stage, rng: random.Random) -> float:
    """A job; now and then one that is not wanted after all."""
    job = await stage.client.submit(text(rng), seed=rng.randrange(2**31))
    if rng.random() < 0.2:
        await job.cancel()
    else:
        await job.result()
    return rng.uniform(1, 4)


async def paint(stage: Stage, rng: random.Random) -> float:
    """Part of a picture anew, or all of it in ink."""
    pictures = traces.sketches(stage.side)
    if rng.random() < 0.5:
        await stage.client.generate(text(rng), lora=LORA, lora_scale=rng.uniform(0.5, 1.0), image=rng.choice(pictures))
    else:
        await stage.client.generate(
            text(rng), image=rng.choice(pictures), mask=mask(stage.side), inpaint_mask_only=rng.random() < 0.5
        )
    return rng.uniform(3, 8)


@functools.cache
def mask(side: int) -> bytes:
    """A grey PNG, white in the middle."""
    picture = Image.new("L", (side, side))
    picture.paste(255, (side // 4, side // 4, 3 * side // 4, 3 * side // 4))
    file = io.BytesIO()
    picture.save(file, "PNG")
    return file.getvalue()


async def visit(stage: Stage, rng: random.Random) -> float:
    """Connections that end at any point, in good order or not."""
    async with connect(stage.socket, compression=None, max_size=None) as socket:
        for _ in range(rng.randrange(4)):
            await socket.send(orjson.dumps({"prompt": text(rng)}).decode())
            await asyncio.sleep(rng.uniform(0, 0.1))
        if rng.random() < 0.5:
            socket.transport.abort()
    return rng.uniform(0.2, 1.0)


NONSENSE: Sequence[bytes | str] = (
    b"\xc1",
    b"\x93\x01\x02",
    "{",
    "[]",
    '{"prompt": 5}',
    '{"prompt": "a", "num_inference_steps": 1000}',
    '{"prompt": "a", "image_size": {"width": 1000000, "height": 8}}',
    '{"prompt": "a", "image_url": "data:image/png;base64,AAAA"}',
    '{"prompt": "a", "mask_url": "data:image/png;base64,AAAA"}',
    '{"prompt": "a", "lora_url": "data:;base64,AAAA"}',
    "x" * 100_000,
)


async def babble(stage: Stage, rng: random.Random) -> float:
    """Messages and requests that make no sense: each gets an error, and the connection stays."""
    async with asyncio.timeout(60), connect(stage.socket, compression=None, max_size=None) as socket:
        for nonsense in rng.sample(NONSENSE, 4):
            await socket.send(nonsense)
            while (answer := orjson.loads(await socket.recv())).get("type") == "x-fal-message":
                pass
            if "error" not in answer:
                stage.diary.wrong[f"babble: {nonsense[:60]!r} was taken"] += 1
                continue
            if answer["error"] == "internal_error":
                stage.diary.wrong[f"babble: {nonsense[:60]!r} is an internal error"] += 1
    said = await stage.http.post(f"{stage.url}/fal-ai/lcm", content=rng.choice((b"", b"{", b"[]", b'{"prompt": []}')))
    if not 400 <= said.status_code < 500:
        stage.diary.wrong[f"babble: HTTP {said.status_code}"] += 1
    said = await stage.http.get(f"{stage.url}/queue/fal-ai/lcm/requests/nobody/status")
    if said.status_code != 404:
        stage.diary.wrong[f"babble: HTTP {said.status_code} for an unknown job"] += 1
    return rng.uniform(0.5, 1.5)


PARTS: dict[str, Part] = {
    "typing": realtime("typing", "typing"),
    "recorded": realtime("recorded", "recorded"),
    "sketch": realtime("sketch", "typing", image=True, rest_s=8.0),
    "camera": realtime("camera", "camera", image=True, rest_s=20.0),
    "run": run,
    "queue": queue,
    "paint": paint,
    "visit": visit,
    "babble": babble,
}


async def repeat(name: str, part: Part, stage: Stage, seed: int) -> None:
    """Play one part until the end; what goes wrong is written down, and does not end the play."""
    rng = random.Random(f"{seed}/{name}")
    while True:
        try:
            rest_s = await part(stage, rng)
            stage.diary.done[name] += 1
        except (LcmError, httpx2.RequestError, ConnectionClosed, OSError, TimeoutError) as error:
            stage.diary.wrong[f"{name}: {type(error).__name__} {error}"[:200]] += 1
            rest_s = 1.0
        await asyncio.sleep(rest_s)


# What is looked at.


async def watch(stage: Stage, server: Server, processes: Processes, diary: Diary) -> None:
    """A sample of every process, of this one, and of what the server counts."""
    for number in itertools.count(1):
        counted = await server.samples() or {}
        gauges = {name: counted.get((f"lcm_rt_{name}", ())) for name in ("sessions", "pending")}
        diary.samples.append(
            {
                "at": round(diary.now, 2),
                **await asyncio.to_thread(_weigh, processes),
                **gauges,
                "restarts": counted.get(("lcm_rt_engine_restarts_total", ())),
            }
        )
        await asyncio.sleep(diary.begun_at + number * SAMPLE_S - time.perf_counter())


def _weigh(processes: Processes) -> dict[str, Any]:
    """By role: memory, descriptors and threads; ``generator`` is this process."""
    found: dict[str, Any] = {}
    for role, process in processes.all():
        if about := processes.memory(process.pid):
            found[role] = about | {"pid": process.pid}
    return found | {"generator": processes.memory(os.getpid())}


# The verdict.


def trend(times: Sequence[float], values: Sequence[float]) -> float:
    """By how much a straight line through ``values`` rises from its first time to its last."""
    return statistics.linear_regression(times, values).slope * (times[-1] - times[0])


def drift(shown_at: Sequence[float], delays: Sequence[float], begin: float, end: float) -> dict[str, Any]:
    """p99 delay, in ms, of the first and the last third between two times, and by how many percent it rose."""
    third = (end - begin) / 3
    p99 = []
    for left, right in ((begin, begin + third), (end - third, end)):
        part = sorted(delay for at, delay in zip(shown_at, delays, strict=True) if left <= at < right)
        p99.append(round(1e3 * figures.percentile(part, 99), 2) if part else None)
    percent = round(100 * (p99[1] / p99[0] - 1), 2) if p99[0] and p99[1] else None
    return {"first_p99_ms": p99[0], "last_p99_ms": p99[1], "percent": percent}


def windows(diary: Diary, seconds: float, width: float = 60.0) -> list[dict[str, Any]]:
    """The delays of each minute."""
    found: list[list[float]] = [[] for _ in range(int(seconds // width) + 1)]
    for at, delay in zip(diary.shown_at, diary.delays, strict=True):
        if 0 <= at < seconds:
            found[int(at // width)].append(delay)
    return [{"at": n * width, "shown": len(part), "delay_ms": figures.spread(part)} for n, part in enumerate(found)]


def judge(diary: Diary, seconds: float) -> dict[str, Any]:
    """The figures after the warm-up, and ``faults``: what is not as it should be, in words."""
    begin = WARM_UP * seconds
    samples = [sample for sample in diary.samples if sample["at"] >= begin]
    faults: list[str] = []
    processes: dict[str, Any] = {}
    for role in ("front", "engine"):
        series = [(sample["at"], sample[role]) for sample in samples if sample.get(role)]
        if len(series) < 10:
            faults.append(f"{role}: too few samples to tell")
            continue
        times, fifth = [at for at, _ in series], max(1, len(series) // 5)
        told: dict[str, Any] = {}
        for kind in ("rss_mb", "pss_mb", "private_mb", "fds", "threads"):
            values = [about[kind] for _, about in series]
            told[kind] = {
                "first": statistics.median(values[:fifth]),
                "last": statistics.median(values[-fifth:]),
                "rise": round(trend(times, values), 2),
            }
        # Pages of files come and go with whoever else has them open, so growth is of what is its own.
        told["growth_percent"] = round(100 * told["private_mb"]["rise"] / told["rss_mb"]["first"], 2)
        if told["growth_percent"] > MAX_GROWTH_PERCENT:
            faults.append(f"{role}: memory grew by {told['growth_percent']} %")
        more = {kind: told[kind]["last"] - told[kind]["first"] for kind in ("fds", "threads")}
        faults += [f"{role}: {count:g} more {kind} at the end" for kind, count in more.items() if count > MAX_MORE]
        if len({about["pid"] for _, about in series}) > 1:
            faults.append(f"{role}: another process at the end")
        processes[role] = told
    delays = drift(diary.shown_at, diary.delays, begin, seconds)
    if delays["percent"] is None or delays["percent"] > MAX_DRIFT_PERCENT:
        faults.append(f"p99 delay drifted by {delays['percent']} %")
    faults += [f"{count} times {what}" for what, count in diary.wrong.items()]
    return {"processes": processes, "delays": delays, "faults": faults}


# The whole.


@contextlib.asynccontextmanager
async def serving(folder: Path, words: Sequence[str]) -> AsyncIterator[tuple[str, int]]:
    """A server of our own, and its process id; its last words are shown if it ends by itself."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "lcm_rt", "serve", "--port", "0", "--data-dir", str(folder), *words),
        stderr=asyncio.subprocess.PIPE,
        env={"LCM_RT_REPEAT_MB": str(REPEAT_MB), **os.environ, "COLUMNS": "200"},
    )
    assert process.stderr
    stderr, said = process.stderr, deque[str](maxlen=50)

    async def listen() -> None:
        async for line in stderr:
            said.append(line.decode(errors="replace"))

    said.append((await stderr.readline()).decode(errors="replace"))
    listening = asyncio.create_task(listen())
    try:
        if not (match := re.search(r"(http://\S+?)/?\s", said[0])):
            await listening
            raise SystemExit("the server does not start:\n" + "".join(said))
        yield match[1], process.pid
        if process.returncode is not None:
            console.print("the server ended:\n" + "".join(said), markup=False, style="red")
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.terminate()
        await process.wait()
        await listening


async def fill(socket: str, side: int, count: int) -> None:
    """Ask for so many prompts, and send so many pictures: a cache that is filling looks like a leak."""
    small = {"image_size": {"width": 64, "height": 64}}
    prompts = Load(traces=("flood",), sessions=8, seconds=2.0, warm_up=0, fields={"num_inference_steps": 1, **small})
    pictures = replace(prompts, traces=("camera",), image_side=side, fields={"num_inference_steps": 1})
    with console.status("") as status:
        for what, load in {"prompts": prompts, "pictures": pictures}.items():
            made, end_at = 0, time.perf_counter() + FILL_S
            for seed in itertools.count():
                status.update(f"filling the caches: {made} of {count} {what}")
                if made >= count or time.perf_counter() > end_at:
                    break
                measured = await measure(WebSocket(socket), replace(load, seed=-1 - seed))
                made += sum(len(log.frames) for log in measured.logs)


async def soak(url: str, pid: int, minutes: float, seed: int, filling: int) -> tuple[Diary, float]:
    """Play all parts against the server at ``url`` for so many minutes. Raises: LcmError: it is not ready."""
    seconds = 60 * minutes
    server = Server(url, os.environ.get("LCM_RT_KEY"))
    with console.status("asking the server") as status:
        await wait_ready(server, lambda words: status.update(words))
    model = await server.model("fal-ai/lcm")
    processes = await asyncio.to_thread(Processes, pid)
    await asyncio.to_thread(traces.sketches, model["size"])
    socket = f"{url.replace('http', 'ws', 1)}/fal-ai/lcm/realtime"
    await fill(socket, model["size"], filling)
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    async with AsyncClient(url) as client, httpx2.AsyncClient(headers=server.headers, timeout=60) as http:
        diary = Diary()
        stage = Stage(url, socket, client, http, diary, model["size"])
        playing = [asyncio.create_task(repeat(name, part, stage, seed)) for name, part in PARTS.items()]
        playing.append(asyncio.create_task(watch(stage, server, processes, diary)))
        try:
            with Progress(*columns, console=console, transient=True) as progress:
                task = progress.add_task("", total=seconds)
                while diary.now < seconds:
                    await asyncio.wait(playing, timeout=1, return_when=asyncio.FIRST_EXCEPTION)
                    for ended in playing:
                        if ended.done():
                            ended.result()  # none of them ends by itself
                    words = f"{len(diary.delays)} messages shown, {diary.wrong.total()} wrong answers"
                    progress.update(task, completed=min(diary.now, seconds), description=words)
        finally:
            for one in playing:
                one.cancel()
            await asyncio.wait(playing)
    return diary, seconds


def show(verdict: dict[str, Any]) -> None:
    columns = ("resident, MB", "own, MB", "growth, %", "fds", "threads")
    table = Table("", *columns, title="After the warm-up: first and last fifth")
    for role, told in verdict["processes"].items():
        spans = {
            kind: f"{told[kind]['first']:.0f} - {told[kind]['last']:.0f}"
            for kind in ("rss_mb", "private_mb", "fds", "threads")
        }
        growth = f"{told['growth_percent']:.2f}"
        table.add_row(role, spans["rss_mb"], spans["private_mb"], growth, spans["fds"], spans["threads"])
    console.print(table)
    delays = verdict["delays"]
    console.print(f"p99 delay {delays['first_p99_ms']} -> {delays['last_p99_ms']} ms ({delays['percent']} %)")
    for fault in verdict["faults"]:
        console.print(fault, style="red", markup=False)


async def whole(options: argparse.Namespace) -> tuple[Diary, float]:
    if options.url:
        return await soak(options.url.rstrip("/"), options.pid, options.minutes, options.seed, options.fill)
    with tempfile.TemporaryDirectory() as folder:
        async with serving(Path(folder), options.serve) as (url, pid):
            return await soak(url, pid, options.minutes, options.seed, options.fill)


def main() -> None:
    assert __doc__ is not None
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--url", help="a server that runs, in place of one of our own; needs --pid")
    parser.add_argument("--pid", type=int, help="of its front process")
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--fill", type=int, default=3000, help="prompts, and pictures, that fill the caches beforehand")
    parser.add_argument("--output", type=Path, help="a file for the report, as JSON")
    parser.add_argument("serve", nargs="*", metavar="-- WORDS", help="more words for lcm-rt serve")
    options = parser.parse_args()
    if bool(options.url) != bool(options.pid):
        parser.error("--url and --pid belong together")
    report = surroundings()
    try:
        diary, seconds = asyncio.run(whole(options))
    except (LcmError, InputError) as error:
        raise SystemExit(str(error)) from None
    verdict = judge(diary, seconds)
    report |= {
        "minutes": options.minutes,
        "verdict": verdict,
        "done": diary.done,
        "wrong": diary.wrong,
        "windows": windows(diary, seconds),
        "samples": diary.samples,
    }
    show(verdict)
    if options.output:
        options.output.write_bytes(orjson.dumps(report, option=orjson.OPT_INDENT_2))
    sys.exit(bool(verdict["faults"]))


if __name__ == "__main__":
    main()

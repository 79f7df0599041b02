"""What the engine takes for a step and for a picture, with no server around it: ``lcm-rt bench engine``.

The core is a library, which drives the engine by its verbs alone::

    subject = Subject("embedded")
    engine = open_engine(subject)
    asked = {rows: ask(engine, subject, rows) for rows in (1, 4)}    # before ``tune``: what is compiled is not seen
    engine.tune(subject.name)
    lines = [compare(measure(engine, subject, rows), asked[rows], peak) for rows in (1, 4)]

Figures are of warm networks, with the prompt in the cache; a batch begins together, steps together and is finished
together, one batch after the other. ``python -m lcm_rt.bench.engine`` is the fresh process of ``time_starts``.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from rich import box
from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from lcm_rt.bench import figures, roofline
from lcm_rt.bench import random_weights as weights
from lcm_rt.bench.roofline import Peak, Work
from lcm_rt.bench.surroundings import surroundings
from lcm_rt.catalog import Choice, ModelSpec, resolve
from lcm_rt.engine.engine import Engine
from lcm_rt.engine.trajectory import Trajectory
from lcm_rt.errors import GenerationFailed, LcmError
from lcm_rt.images import GRID, Canvas
from lcm_rt.types import GenerateRequest

Backend = Literal["auto", "eager", "inductor", "openvino"]

PROMPT = "a quiet lake under mountains at sunset"

WARM_STEPS = {"cpu": 4, "cuda": 32}
SAMPLES = {"cpu": 12, "cuda": 60}
"""Steps of a bucket before those that are timed, and those: a GPU's clocks and allocator need a while."""

LAUNCH_GAP_US = 5.0
"""Kernels of one CUDA graph follow each other within 1 to 3 microseconds; longer gaps are the host's."""

PROFILED_STEPS = 8

CHILD_S = 1800.0
"""How long one start may take: XL, compiled for the first time."""

console = Console()


@dataclass(frozen=True, slots=True)
class Subject:
    """What is measured: a model, its pictures, and how the engine runs it.

    Args:
        model: as ``lcm-rt serve --model`` takes it.
        size: side of the pictures in pixels; the model's own, if None. steps: of each picture, likewise.
        vae: as ``lcm-rt serve --vae`` takes it.
    """

    model: str = "embedded"
    size: int | None = None
    steps: int | None = None
    device: str = "auto"
    backend: Backend = "auto"
    vae: Literal["tiny", "full"] | None = None

    @property
    def spec(self) -> ModelSpec:
        """Raises: NotFound, InputError."""
        return resolve(self.model)

    @property
    def name(self) -> str:
        return self.model.partition("=")[0]

    @property
    def torch_device(self) -> torch.device:
        return _torch_device(self.device)

    @property
    def latents(self) -> tuple[int, int] | None:
        """Height and width of its latents, for ``Engine.tune``."""
        return None if self.size is None else (self.size // GRID, self.size // GRID)


def _torch_device(name: str) -> torch.device:
    return torch.device(name if name != "auto" else "cuda" if torch.cuda.is_available() else "cpu")


def open_engine(
    subject: Subject, *, cache_dir: Path | None = None, report: Callable[[str, float], None] = lambda *_: None
) -> Engine:
    """An engine that has ``subject`` loaded, but not tuned. Raises: LcmError."""
    choice = Choice(vae=subject.vae, safety=False, controlnet=False)
    engine = Engine(device=subject.device, backend=subject.backend, choice=choice, cache_dir=cache_dir)
    spec = subject.spec
    parts, _ = engine.locate(spec, report)
    engine.load(spec, parts, report)
    return engine


def begin(engine: Engine, subject: Subject, rows: int, steps: int | None = None) -> list[Trajectory]:
    """So many pictures of one prompt, of seeds 0, 1 and so on."""
    traits = engine.traits(subject.name)
    side = subject.size or traits.size
    steps = steps or subject.steps or traits.steps
    return [
        engine.begin(seed, GenerateRequest(subject.name, PROMPT, seed, num_inference_steps=steps), Canvas(side, side))
        for seed in range(rows)
    ]


def _finish(engine: Engine, rows: Sequence[Trajectory]) -> None:
    for picture in engine.finish(rows):
        if isinstance(picture, LcmError):
            raise picture


def ask(engine: Engine, subject: Subject, rows: int) -> dict[str, Work]:
    """What a "step" and a "finish" of so many rows ask of the device; to be asked before ``tune``."""
    batch = begin(engine, subject, rows, steps=2)
    engine.step(batch)  # what the first step sets up, others do not
    return {
        "step": roofline.count(lambda: engine.step(batch)),
        "finish": roofline.count(lambda: _finish(engine, batch)),
    }


def measure(
    engine: Engine, subject: Subject, rows: int, *, warm_steps: int | None = None, samples: int | None = None
) -> dict[str, Any]:
    """A line of figures for batches of so many rows, as JSON has it.

    ``step_ms`` is from one step's end to the next one's, on a GPU by its own clock; ``begin_ms``, ``finish_ms`` (from
    latents to pixels on the host) and ``batch_ms`` (all of it) are the host's. ``ways`` says how the steps were run.
    """
    device = subject.torch_device
    warm_steps = WARM_STEPS[device.type] if warm_steps is None else warm_steps
    samples = SAMPLES[device.type] if samples is None else samples
    done = 0
    while done < warm_steps:
        done += len(_run(engine, subject, rows, device, between=engine.improve).steps)
    engine.counts()
    runs: list[_Run] = []
    while sum(len(run.steps) for run in runs) < samples:
        runs.append(_run(engine, subject, rows, device))
    ways = {key[1]: count for key, count in engine.counts().items() if key[0] == "forward" and count}
    return {
        "bucket": runs[0].bucket,
        "rows": rows,
        "steps": len(runs[0].steps),
        "ways": ways,
        "step_ms": figures.spread(step for run in runs for step in run.steps),
        "begin_ms": figures.spread(run.begin for run in runs),
        "finish_ms": figures.spread(run.finish for run in runs),
        "batch_ms": figures.spread(run.total for run in runs),
        "pictures_per_s": round(rows * len(runs) / sum(run.total for run in runs), 2),
    }


def step_table(lines: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """What the scheduler is told of the buckets of ``lines``: ``lcm_rt.steptable.StepTable.given`` takes it."""
    table: dict[tuple[Any, ...], dict[str, Any]] = {}
    for line in lines:
        entry = table.setdefault(tuple(line["bucket"]), {"bucket": line["bucket"], "step": {}, "finish": {}})
        for name in ("step", "finish"):
            entry[name][str(line["rows"])] = line[f"{name}_ms"]["p50"] / 1e3
    return list(table.values())


@dataclass(frozen=True, slots=True)
class _Run:
    """Seconds of one batch."""

    bucket: list[str | int]
    begin: float
    steps: list[float]
    finish: float
    total: float


def _run(
    engine: Engine,
    subject: Subject,
    rows: int,
    device: torch.device,
    between: Callable[[], None] = lambda: None,
) -> _Run:
    begun_at = time.perf_counter()
    batch = begin(engine, subject, rows)
    stepping_at = time.perf_counter()
    marks = [_mark(device)]
    while not batch[0].done:
        engine.step(batch)
        marks.append(_mark(device))
        between()
    if device.type == "cuda":
        torch.cuda.synchronize(device)  # the finish's time is to be its own
    finishing_at = time.perf_counter()
    _finish(engine, batch)
    ended_at = time.perf_counter()
    steps = [_seconds(before, after) for before, after in zip(marks, marks[1:], strict=False)]
    return _Run(list(batch[0].bucket), stepping_at - begun_at, steps, ended_at - finishing_at, ended_at - begun_at)


def _mark(device: torch.device) -> float | torch.cuda.Event:
    if device.type != "cuda":
        return time.perf_counter()
    with torch.cuda.device(device):
        event = roofline.event()
        event.record()
    return event


def _seconds(before: float | torch.cuda.Event, after: float | torch.cuda.Event) -> float:
    if isinstance(before, float) or isinstance(after, float):
        return float(after) - float(before)  # type: ignore[arg-type]
    return float(before.elapsed_time(after)) / 1e3


def compare(line: Mapping[str, Any], asked: Mapping[str, Work], peak: Peak) -> dict[str, Any]:
    """``line`` and, under "step" and "finish", what was asked of the device, the least time for it, and its share."""
    compared = dict(line)
    for name, work in asked.items():
        floor_ms = work.floor_s(peak) * 1e3
        compared[name] = {
            "gflop": round(work.flops / 1e9, 3),
            "mb": round(work.bytes / 1e6, 3),
            "launches": work.launches,
            "syncs": dict(work.syncs),
            "floor_ms": round(floor_ms, 4),
            "share": round(floor_ms / line[f"{name}_ms"]["p50"], 4) if line[f"{name}_ms"]["p50"] else None,
        }
    return compared


def precision_of(line: Mapping[str, Any], work: Work) -> torch.dtype:
    """In which a step's arithmetic is done. OpenVINO takes bfloat16, whatever its inputs are."""
    return torch.bfloat16 if "openvino" in line["ways"] else work.dtype


def profile(engine: Engine, subject: Subject, rows: int) -> dict[str, Any]:
    """On a GPU, of warm steps, what there is of each: kernels, time that they run, gaps between them, syncs.

    ``syncs`` are the times that torch says the host waited (``torch.cuda.set_sync_debug_mode``).
    """
    device = subject.torch_device
    batch = begin(engine, subject, rows, steps=2 * PROFILED_STEPS)
    for _ in range(PROFILED_STEPS):
        engine.step(batch)
        engine.improve()
    torch.cuda.synchronize(device)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        syncs = _syncs_of(lambda: [engine.step(batch) for _ in range(PROFILED_STEPS)])
        torch.cuda.synchronize(device)
    events = profiler.events() or []
    on_gpu = [e for e in events if e.device_type.name == "CUDA" and not e.is_user_annotation]
    spans = [(e.time_range.start, e.time_range.end) for e in on_gpu]
    calls = Counter(e.name for e in events if e.device_type.name == "CPU" and e.name.startswith("cuda"))
    if not spans:
        raise GenerationFailed("the profiler saw nothing that ran on the GPU")
    return {
        "rows": rows,
        **idle(spans, PROFILED_STEPS),
        "syncs": round(syncs / PROFILED_STEPS, 3),
        "calls": {name: round(count / PROFILED_STEPS, 3) for name, count in calls.most_common(12)},
    }


def idle(spans: Iterable[tuple[float, float]], steps: int) -> dict[str, float]:
    """Of what ran on a GPU, as (begin, end) in microseconds: what there is per step, between the first and the last.

    ``launch_gap_us`` is the part of ``idle_us`` that is too long for kernels that were launched together.
    """
    ordered = sorted(spans)
    busy = gaps = launch_gaps = 0.0
    until = ordered[0][0]
    for begin, end in ordered:
        gap = max(0.0, begin - until)
        gaps += gap
        launch_gaps += gap if gap > LAUNCH_GAP_US else 0.0
        busy += max(0.0, end - max(begin, until))
        until = max(until, end)
    return {
        "kernels": round(len(ordered) / steps, 1),
        "busy_ms": round(busy / steps / 1e3, 4),
        "idle_us": round(gaps / steps, 1),
        "launch_gap_us": round(launch_gaps / steps, 1),
    }


def _syncs_of(call: Callable[[], object]) -> int:
    """How often the host waited for the GPU in ``call``, as far as torch knows."""
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            call()
        finally:
            torch.cuda.set_sync_debug_mode(before)
    return sum("synchronizing CUDA operation" in str(warning.message) for warning in caught)


# The first picture of a fresh process.

STAGES = ("imported", "weights", "first_picture", "tuned", "first_fast_picture")
"""What ``time_starts`` times, in this order: seconds from the start of the process to each."""


def time_starts(subject: Subject, cache_dir: Path | None = None) -> dict[str, Any]:
    """Two starts, with a cache folder that is empty and with what the first one left in it.

    The files of the weights are in the system's memory both times, if they were read just before. ``warm_share`` is the
    second start's time to be tuned over the first one's. A ``cache_dir`` that is given is kept; it should be empty.

    Raises: GenerationFailed.
    """
    with tempfile.TemporaryDirectory() as spare:
        folder = cache_dir or Path(spare)
        cold, warm = (start(subject, folder) for _ in range(2))
    return {"cold_s": cold, "warm_s": warm, "warm_share": round(warm["tuned"] / cold["tuned"], 3)}


def start(subject: Subject, cache_dir: Path) -> dict[str, float]:
    """Seconds from the start of a fresh process to each of ``STAGES``. Raises: GenerationFailed."""
    kept = ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR")  # another cache than the one in question
    environment = {name: value for name, value in os.environ.items() if name not in kept}
    options = json.dumps({**asdict(subject), "cache_dir": str(cache_dir), "spawned_at": time.time()})
    try:
        done = subprocess.run(
            [sys.executable, "-m", "lcm_rt.bench.engine", options],
            env=environment,
            capture_output=True,
            text=True,
            timeout=CHILD_S,
        )
    except subprocess.TimeoutExpired:
        raise GenerationFailed(f"{subject.name} was not tuned within {CHILD_S:.0f} s") from None
    if done.returncode:
        last = done.stderr.strip().splitlines()[-1:] or [f"it ended with {done.returncode}"]
        raise GenerationFailed(f"a fresh process could not make pictures: {last[0]}")
    times: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return times


def _start(options: dict[str, Any]) -> dict[str, float]:
    """What the fresh process does."""
    spawned_at, cache_dir = options.pop("spawned_at"), Path(options.pop("cache_dir"))
    subject = Subject(**options)
    times = {}

    def stamp(stage: str) -> None:
        times[stage] = round(time.time() - spawned_at, 3)

    def report(stage: str, fraction: float) -> None:
        if stage == "weights" and fraction == 1.0:
            stamp("weights")

    stamp("imported")
    engine = open_engine(subject, cache_dir=cache_dir, report=report)
    for stage in ("first_picture", "tuned", "first_fast_picture"):
        if stage == "tuned":
            engine.tune(subject.name, subject.latents)
        else:
            _run(engine, subject, 1, subject.torch_device)
        stamp(stage)
    return times


# The command.


def run(
    *,
    model: str = "embedded",
    random_weights: weights.Family | None = None,
    size: int | None = None,
    steps: int | None = None,
    rows: Sequence[int] = (1, 2, 4, 8),
    device: str = "auto",
    backend: Backend = "auto",
    cold_start: bool = False,
    output: Path | None = None,
) -> dict[str, Any]:
    """Measure, show tables, write the report to ``output`` as JSON, and return it.

    Raises: LcmError: the model is not there or cannot be run so.
    """
    about = surroundings()
    if random_weights is not None:
        with console.status(f"writing random weights to {weights.ROOT}"):
            weights.write(weights.ROOT, random_weights, device=_torch_device(device).type)
        model = f"{random_weights}={weights.taesd_of(weights.ROOT, random_weights)}"
    subject = Subject(model, size, steps, device, backend)
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task(f"loading {subject.name}", total=2 * len(rows) + 2 + 2 * cold_start)

        def say(words: str) -> None:
            progress.update(task, advance=1, description=words)

        engine = open_engine(subject)
        asked = {}
        for number in rows:
            say(f"counting what {number} rows ask for")
            asked[number] = ask(engine, subject, number)
        say(f"tuning ({engine.backend})")
        engine.tune(subject.name, subject.latents)
        engine.tune(subject.name, subject.latents)  # and what a size in demand gets
        lines = []
        for number in rows:
            say(f"measuring {number} rows")
            lines.append(measure(engine, subject, number))
        peak = roofline.peak_of(subject.torch_device, precision_of(lines[0], asked[rows[0]]["step"]))
        report = about | {
            "device": engine.device_name,
            "backend": engine.backend,
            "subject": asdict(subject),
            "peak": asdict(peak),
            "lines": [compare(line, asked[line["rows"]], peak) for line in lines],
            "step_table": step_table(lines),
        }
        if subject.torch_device.type == "cuda":
            report["profile"] = [profile(engine, subject, number) for number in rows]
        if cold_start:
            say("starting twice")
            report["cold_start"] = time_starts(subject)
    show(report)
    if output:
        output.write_text(json.dumps(report, indent=1) + "\n")
    return report


def show(report: Mapping[str, Any]) -> None:
    """The tables of a report of ``run``."""
    subject, peak = report["subject"], report["peak"]
    console.print(f"{subject['model']} by {report['backend']} on {report['device']}", soft_wrap=True)
    console.print(
        f"peak {peak['flops'] / 1e12:.2f} TFLOP/s, {peak['bytes'] / 1e9:.0f} GB/s ({peak['source']})", soft_wrap=True
    )
    table = Table(title="one step, and the finish of its batch, in ms", box=box.SIMPLE, pad_edge=False)
    for name in ("rows", "way", "step", "p95", "floor", "share", "finish", "floor", "images/s"):
        table.add_column(name, justify="right", no_wrap=True)
    for line in report["lines"]:
        step, finish = line["step"], line["finish"]
        table.add_row(
            str(line["rows"]),
            "+".join(line["ways"]),
            *(f"{ms:.2f}" for ms in (line["step_ms"]["p50"], line["step_ms"]["p95"], step["floor_ms"])),
            "" if step["share"] is None else f"{step['share']:.0%}",
            *(f"{ms:.2f}" for ms in (line["finish_ms"]["p50"], finish["floor_ms"])),
            f"{line['pictures_per_s']:.1f}",
        )
    console.print(table)
    step = report["lines"][0]["step"]
    syncs = ", ".join(f"{count} {name}" for name, count in step["syncs"].items()) or "no sync"
    console.print(f"The floor is the roofline. An eager step is {step['launches']} launches and {syncs}.")
    if "profile" in report:
        table = Table("rows", "kernels", "busy, ms", "idle, us", "of that launches, us", "syncs", title="one step")
        for line in report["profile"]:
            table.add_row(
                *(str(line[name]) for name in ("rows", "kernels", "busy_ms", "idle_us", "launch_gap_us", "syncs"))
            )
        console.print(table)
    if "cold_start" in report:
        starts = report["cold_start"]
        table = Table(
            "seconds from a process's start to", "cold", "warm", title=f"tuned: warm / cold {starts['warm_share']:.0%}"
        )
        for stage in STAGES:
            table.add_row(stage.replace("_", " "), *(f"{starts[name][stage]:.1f}" for name in ("cold_s", "warm_s")))
        console.print(table)


if __name__ == "__main__":
    print(json.dumps(_start(json.loads(sys.argv[1]))))  # noqa: T201  the parent reads it

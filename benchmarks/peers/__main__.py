"""Everybody who takes part, side by side, on the same machine and the same weights.

    python -m benchmarks.peers --install               # once: LitServe, Ray Serve and OpenVINO, in a venv of their own
    python -m benchmarks.peers --output peers.json     # some 13 minutes
    python -m benchmarks.peers --quick                 # a minute: whether it runs, not how fast
    python -m benchmarks.peers --only ours,diffusers,serial --model FOLDER

``benchmarks/peers/README.md`` says who they are, what is measured and what is fair.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import orjson
from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from benchmarks.peers import report, servers
from benchmarks.peers.contestant import Absent, Contestant
from benchmarks.peers.work import PAINTERS, Work, job
from lcm_rt.bench.dialects import Message
from lcm_rt.bench.figures import percentile
from lcm_rt.bench.serve import Load, measure
from lcm_rt.bench.surroundings import surroundings
from lcm_rt.embedded import MODEL_DIR
from lcm_rt.errors import LcmError

VENV = Path(__file__).with_name(".venv")
PACKAGES = ("litserve==0.2.19", "ray[serve]==2.60.0", "openvino==2026.4.1")
BATCHED = ("diffusers", "diffusers bf16", "ours eager", "ours")
BATCH = 8
PEER_PACKAGES = ("openvino",)
"""Those of the opponents in one process that the peers' interpreter is for."""

console = Console()


def install() -> None:
    """A venv with the peers' packages over those of this interpreter: torch and diffusers are the same ones."""
    subprocess.run([sys.executable, "-m", "venv", VENV], check=True)
    (site,) = VENV.glob("lib/python*/site-packages")
    own = next(path for path in sys.path if Path(path).name == "site-packages")
    (site / "project.pth").write_text(f"{own}\n")
    subprocess.run([VENV / "bin" / "python", "-m", "pip", "install", *PACKAGES], check=True)


def peer_versions(python: str) -> dict[str, str]:
    """What of the peers' packages an interpreter has."""
    ask = (
        "import importlib.metadata as metadata, json;"
        "print(json.dumps({found.name: found.version for found in metadata.distributions()}))"
    )
    said = subprocess.run([python, "-c", ask], capture_output=True, text=True, check=True).stdout
    names = {package.partition("==")[0].partition("[")[0] for package in PACKAGES}
    return {name: version for name, version in sorted(orjson.loads(said).items()) if name in names}


class Run:
    """One run: the options, the opponents that are there, and what has been found so far."""

    def __init__(self, options: argparse.Namespace, tell: Callable[[str], None]) -> None:
        self.options = options
        self.work = Work(options.model, options.size, options.steps, options.threads, options.device)
        self.pictures: dict[str, dict[str, Any]] = {}
        self.serving: dict[str, dict[str, Any]] = {}
        self.round_trip: dict[str, Any] = {}
        self.flood: dict[str, Any] = {}
        self.dtype = options.dtype
        self._tell = tell
        self._contestants: dict[str, Contestant] = {}
        self._rounds: dict[str, list[report.Round]] = {}

    def wanted(self, names: Sequence[str]) -> list[str]:
        return [name for name in names if not self.options.only or name in self.options.only]

    # One process, no server.

    def enter(self) -> None:
        """Start everybody who paints without a server; one at a time, for starting is work."""
        for name in self.wanted(list(PAINTERS)):
            if name == "openvino" and self.work.device != "cpu":
                self.pictures[name] = {"absent": "is for CPUs here"}
                continue
            self._tell(f"starting {name}")
            python = self.options.peer_python if name in PEER_PACKAGES else sys.executable
            self._contestants[name] = contestant = Contestant(name, self.work, python)
            self._rounds[name] = []
            with self._unless_absent(name):
                contestant.ready()
                contestant.warm_up([1, BATCH] if name in BATCHED else [1])

    @contextmanager
    def _unless_absent(self, name: str) -> Iterator[None]:
        """Who ends in the block takes no part any more."""
        try:
            yield
        except Absent as absent:
            self.pictures[name] = {"absent": str(absent)}
            del self._rounds[name]
            self._contestants.pop(name).close()

    def compare_pictures(self, folder: Path) -> dict[str, list[float]]:
        """PSNR of everybody's pictures against those of diffusers, in dB."""
        self._tell("comparing pictures")
        painted = {}
        for name, contestant in list(self._contestants.items()):
            with self._unless_absent(name):
                painted[name] = contestant.check(folder / "pictures.npy")
        if "diffusers" not in painted:
            return {}
        return {name: report.psnr(pictures, painted["diffusers"]) for name, pictures in painted.items()}

    def paint(self) -> None:
        """All rounds without a server; who begins is another one in each."""
        names = list(self._contestants)
        for number in range(self.options.picture_rounds):
            turn = number % max(1, len(names))
            for name in names[turn:] + names[:turn]:
                if name not in self._contestants:
                    continue
                self._tell(f"round {number + 1} of {self.options.picture_rounds}: {name}")
                contestant, first = self._contestants[name], 10_000 * (number + 1)
                time.sleep(self.options.pause)
                with self._unless_absent(name):
                    said = contestant.measure(self.options.picture_seconds, first)
                    batches = None
                    if name in BATCHED:
                        batches = contestant.measure_batches(BATCH, self.options.picture_seconds, first + 5_000)
                    self._rounds[name].append(report.picture_round(said, batches))

    def sum_up_pictures(self, alike: dict[str, list[float]]) -> None:
        for name, rounds in self._rounds.items():
            contestant = self._contestants[name]
            self.pictures[name] = {
                **report.summary(rounds),
                "psnr_db": report.median(alike.get(name, [])),
                "psnr_each_db": alike.get(name, []),
                "start_s": contestant.start_s,
                "size": contestant.size,
            }
        if self.dtype == "fastest":
            # The peers' servers are given the type in which their pipeline paints more pictures.
            default, other = (
                self.pictures.get(name, {}).get("batch_per_s") or 0.0 for name in ("diffusers", "diffusers bf16")
            )
            self.dtype = "bfloat16" if other > default else "float32"

    # Servers.

    def serve(self, cache: Path) -> None:
        """All rounds of the servers; who begins is another one in each."""
        names = self.wanted(servers.NAMES)
        found: dict[str, dict[int, list[report.Round]]] = {}
        starts: dict[str, list[float]] = {}
        trips: list[report.Round] = []
        floods: list[report.Round] = []
        for number in range(self.options.rounds):
            turn = number % max(1, len(names))
            for name in names[turn:] + names[:turn]:
                if "absent" in self.serving.get(name, {}):
                    continue
                where = f"round {number + 1} of {self.options.rounds}: {name}"
                self._tell(f"{where}, starting")
                try:
                    with servers.running(
                        name, self.work, dtype=self.dtype, python=self.options.peer_python, cache=cache
                    ) as server:
                        starts.setdefault(name, []).append(server.start_s)
                        for clients in self.options.clients:
                            self._tell(f"{where}, {clients} people type")
                            time.sleep(self.options.pause)
                            said = self._load(server, self.options.trace, clients, number)
                            found.setdefault(name, {}).setdefault(clients, []).append(report.serving_round(said))
                        if name == "ours":
                            self._tell(f"{where}, one after the other")
                            trips.append(self._trip(server, number))
                            self._tell(f"{where}, a flood of keystrokes")
                            floods.append(report.serving_round(self._load(server, "flood", 1, number)))
                except (Absent, LcmError) as error:
                    self.serving[name] = {"absent": str(error)}
                    found.pop(name, None)
        for name in names:
            if name in found:
                clients_of = {str(clients): report.summary(rounds) for clients, rounds in found[name].items()}
                self.serving[name] = {"clients": clients_of, "start_s": report.median(starts[name])}
        self.serving = {name: self.serving[name] for name in names}
        self.round_trip = report.summary(trips)
        self.flood = report.summary(floods)
        times = [
            flood["staleness_p95_ms"] / trip["round_trip_p50_ms"]
            for flood, trip in zip(floods, trips, strict=True)
            if flood["staleness_p95_ms"] is not None
        ]
        self.flood["picture_times"] = report.median(times)

    def _load(self, server: servers.Server, trace: str, clients: int, number: int) -> dict[str, Any]:
        load = Load(
            traces=(trace,),
            sessions=clients,
            seconds=self.options.seconds if trace != "flood" else min(5.0, self.options.seconds),
            warm_up=2,
            seed=1000 * clients + number,  # the same for every server of a round
            fields=server.fields,
        )
        return asyncio.run(measure(server.dialect, load)).report()

    def _trip(self, server: servers.Server, number: int) -> report.Round:
        """From the WebSocket to the JPEG, and the bare engine in between; both never see a prompt twice."""
        engine = self._contestants.get("ours")
        trips: list[float] = []
        paints: list[float] = []
        blocks = 3
        seconds = self.options.picture_seconds / blocks
        for block in range(blocks):
            first = 100_000 * (number + 1) + 10_000 * block
            trips += asyncio.run(take_turns(server, seconds, first))
            if engine:
                paints += engine.measure(seconds, first)["paint_ms"]
        return {
            "round_trip_p50_ms": round(percentile(sorted(trips), 50), 3),
            "round_trip_p95_ms": round(percentile(sorted(trips), 95), 3),
            "engine_p50_ms": percentile(sorted(paints), 50) if paints else None,
        }

    def close(self) -> None:
        for contestant in self._contestants.values():
            contestant.close()


async def take_turns(server: servers.Server, seconds: float, first: int) -> list[float]:
    """Milliseconds from each message to its picture, one after the other; the first ones do not count."""
    line = await server.dialect.connect()
    try:
        trips: list[float] = []
        number, end_at = 0, float("inf")
        while (begun_at := time.perf_counter()) < end_at:
            prompt, seed = job(first + number)
            await line.send(number, Message(prompt, seed, fields=server.fields))
            while (answer := await line.receive()).kind == "notice":
                pass
            if answer.kind == "error":
                raise Absent(f"{server.name}: {answer.reason or answer.error}")
            trips.append(1e3 * (time.perf_counter() - begun_at))
            number += 1
            if number == 3:
                trips, end_at = [], time.perf_counter() + seconds
        return trips
    finally:
        await line.close()


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    assert __doc__ is not None
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.peers",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    parser.add_argument("--install", action="store_true", help="install the peers, and do nothing else")
    parser.add_argument("--peer-python", help="an interpreter that has them, with torch and diffusers")
    parser.add_argument("--model", type=Path, default=MODEL_DIR, help="a folder in diffusers format")
    parser.add_argument("--size", type=int, help="side of the pictures in px, else the model's")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=cores, help="of everybody's arithmetic")
    parser.add_argument(
        "--dtype",
        choices=("fastest", "float32", "bfloat16"),
        default="fastest",
        help="of the peers' pipelines in their servers; by default the one that paints more without a server",
    )
    parser.add_argument("--trace", default="typing", help="what the clients do, as lcm-rt bench serve has it")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 8, 16])
    parser.add_argument("--seconds", type=float, default=7.0, help="of a trace")
    parser.add_argument("--rounds", type=int, default=3, help="of the servers")
    parser.add_argument("--picture-seconds", type=float, default=1.5, help="of one turn without a server")
    parser.add_argument("--picture-rounds", type=int, default=4, help="without a server")
    parser.add_argument("--pause", type=float, default=0.5, help="seconds of rest before each turn")
    parser.add_argument("--only", help=f"some of {', '.join(dict.fromkeys((*PAINTERS, *servers.NAMES)))}")
    parser.add_argument("--quick", action="store_true", help="one short round of everything, nothing compiled")
    parser.add_argument("--output", type=Path, help="a file for the results, as JSON")
    options = parser.parse_args(arguments)
    known = (*PAINTERS, *servers.NAMES)
    options.only = [name.strip() for name in options.only.split(",")] if options.only else []
    if unknown := [name for name in options.only if name not in known]:
        parser.error(f"--only: nobody is called {', '.join(unknown)}")
    if options.quick:
        options.rounds = options.picture_rounds = 1
        options.seconds, options.picture_seconds, options.pause = 3.0, 0.5, 0.1
        options.clients = [clients for clients in options.clients if clients <= 8]
        options.only = options.only or [name for name in known if "compiled" not in name and name != "ray serve"]
    if options.peer_python is None:
        options.peer_python = str(VENV / "bin" / "python") if VENV.is_dir() else sys.executable
    options.model = options.model.resolve()
    return options


def run(options: argparse.Namespace, tell: Callable[[str], None]) -> dict[str, Any]:
    """Everything that the options say; the results as JSON has them."""
    results: dict[str, Any] = surroundings()
    began_at = time.perf_counter()
    whole = Run(options, tell)
    with tempfile.TemporaryDirectory() as folder:
        try:
            whole.enter()
            alike = whole.compare_pictures(Path(folder))
            whole.paint()
            whole.sum_up_pictures(alike)
            whole.serve(Path(folder) / "cache")
        finally:
            whole.close()
    results |= {
        "command": shlex.join(["python", "-m", "benchmarks.peers", *sys.argv[1:]]),
        "peer_versions": peer_versions(options.peer_python),
        "options": {name: str(value) if isinstance(value, Path) else value for name, value in vars(options).items()},
        "peer_dtype": whole.dtype,
        "minutes": round((time.perf_counter() - began_at) / 60, 1),
        "pictures": whole.pictures,
        "serving": whole.serving,
        "round_trip": whole.round_trip,
        "flood": whole.flood,
    }
    results["claims"] = report.claims(results)
    return results


def main() -> None:
    options = parse()
    if options.install:
        return install()
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("", total=None)
        results = run(options, lambda words: progress.update(task, description=words))
    report.show(results, console)
    if options.output:
        options.output.write_bytes(orjson.dumps(results, option=orjson.OPT_INDENT_2))


if __name__ == "__main__":
    main()

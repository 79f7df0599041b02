"""All goals for one GPU in one go, 20 minutes at most on an H200 with 16 cores: ``make bench-gpu``.

    python benchmarks/gpu.py [--output FILE] [--minutes 20] [--only sd,serving] [--fresh] [--tiny]

Each section runs in a process of its own, within its own time; what fails, or is cut, costs no other. Every figure goes
to the state file as soon as it is there, and a second run goes on with what is missing. Models have random weights of
the real sizes and are written once. With ``--tiny`` they have some kilobytes, and it all runs without a GPU, within two
minutes: that shows that this program works, and no figure of it means anything.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import multiprocessing.connection
import os
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import gpu_goals
from gpu_goals import Results
from rich.console import Console

from lcm_rt.bench.surroundings import surroundings

STOP_S = 25.0
"""How long a section may take to end what it has started, when its time is over."""

LEAST_S = 15.0
"""A section is not begun with less time than this."""

SECTIONS = {
    # In order of value, with their limits in seconds; the first starts fill the cache for all that follow.
    "machine": 120,
    "starts": 330,
    "serving": 240,
    "sd": 300,
    "diffusers": 300,
    "one by one": 120,
    "simulation": 60,
    "sdxl": 330,
    "choices": 240,
}

IMPORTED = ["lcm_rt.bench.engine", "lcm_rt.bench.serve", "torch.nn.attention"]
"""What takes seconds to import, once for all sections: their processes are forked from one that uses none of it."""

console = Console(width=None if sys.stdout.isatty() else 120)


class State:
    """What is known so far, in a file that is always whole."""

    def __init__(self, file: Path, about: dict[str, Any], *, tiny: bool) -> None:
        self._file = file
        machine, versions = about["machine"], about["versions"]
        # Figures of different machines or libraries are no one run's; those of two commits may be.
        same = {
            "tiny": tiny,
            "gpus": machine["gpus"],
            "processor": machine["processor"],
            "torch": versions.get("torch"),
        }
        known: dict[str, Any] = {}
        with contextlib.suppress(OSError, ValueError):
            known = json.loads(file.read_text())
        if known.get("same") != same:
            known = {}
        self.data: dict[str, Any] = {**about, "same": same, "sections": known.get("sections", {})}

    def section(self, name: str) -> dict[str, Any]:
        """Its ``state``, ``parts``, ``skipped`` and ``errors``; what is done of it is kept."""
        found: dict[str, Any] = self.data["sections"].setdefault(name, {})
        for key in ("parts", "skipped", "errors", "took"):
            found.setdefault(key, {})
        return found

    def save(self) -> None:
        self._file.parent.mkdir(parents=True, exist_ok=True)
        new = self._file.with_suffix(".new")
        new.write_text(json.dumps(self.data, indent=1) + "\n")
        new.replace(self._file)


def work(name: str, folder: Path, tiny: bool, sections: dict[str, Any], pipe: Any) -> None:
    """In a process of its own: measure the parts of a section that are not there yet, and send what comes of each."""
    os.setsid()  # what it starts ends with it
    import gpu_sections

    box = gpu_sections.Box(folder, tiny)
    known = sections[name]["parts"] | sections[name]["skipped"]
    for part, call in gpu_sections.SECTIONS[name](box, Results(sections)):
        if part in known:
            continue
        pipe.send(("begun", part, None))
        begun_at = time.perf_counter()
        try:
            found = call()
        except gpu_sections.Skipped as why:
            pipe.send(("skipped", part, str(why)))
        except Exception as error:  # noqa: BLE001  whatever it is, the next part may do
            pipe.send(("errors", part, f"{type(error).__name__}: {error}"[:2000]))
        else:
            pipe.send(("parts", part, found))
        pipe.send(("took", part, round(time.perf_counter() - begun_at, 1)))


def run_section(context: Any, state: State, name: str, folder: Path, limit_s: float, *, tiny: bool) -> None:
    """One section, to its end or to that of its time."""
    section = state.section(name)
    section["errors"] = {}
    section["revision"] = state.data["revision"]
    ours, theirs = context.Pipe()
    process = context.Process(target=work, args=(name, folder, tiny, state.data["sections"], theirs))
    begun_at = time.monotonic()
    process.start()
    theirs.close()
    part, ended = "start", False
    try:
        while (left := begun_at + limit_s - time.monotonic()) > 0 and not ended:
            multiprocessing.connection.wait([ours], left)
            while ours.poll():
                try:
                    kind, part, value = ours.recv()
                except EOFError:
                    ended = True
                    break
                if kind in ("parts", "skipped", "errors"):
                    section[kind][part] = value
                    colour = {"parts": "green", "skipped": "yellow", "errors": "red"}[kind]
                    said = "" if kind == "parts" else str(value).partition("\n")[0]
                    console.print(f"  [{colour}]{part}[/]", said, highlight=False, soft_wrap=True)
                    state.save()
                elif kind == "took":
                    section["took"][part] = value
    finally:
        section["seconds"] = round(time.monotonic() - begun_at, 1)
        _end(process, ended=ended)
    if not ended:
        section["errors"][part] = f"cut after {limit_s:.0f} s"
    elif process.exitcode:
        section["errors"][part] = f"the process ended with {process.exitcode}"
    section["state"] = "partly" if section["errors"] else "done"
    for line in section["errors"].items():
        console.print("  [red]" + ": ".join(line).partition("\n")[0] + "[/]", highlight=False, soft_wrap=True)
    state.save()


def _end(process: Any, *, ended: bool) -> None:
    """End a section's process, and all that it has started."""
    process.join(STOP_S if ended else 0.0)
    for number in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, number)
        process.join(STOP_S)
    process.join()


def main() -> None:
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="a file for the report, as JSON")
    parser.add_argument(
        "--minutes", type=float, default=20.0, help="in all; sections without time wait for another run"
    )
    parser.add_argument("--only", help="names of sections, separated by commas")
    parser.add_argument("--fresh", action="store_true", help="begin anew, whatever was measured before")
    parser.add_argument("--tiny", action="store_true", help="tiny models and few repeats, on whatever there is")
    folder = Path(tempfile.gettempdir()) / "lcm-rt-bench-gpu"
    parser.add_argument("--work", type=Path, default=folder, help="for weights (10 GB), caches and the state")
    options = parser.parse_args()
    folder = options.work / ("tiny" if options.tiny else "full")

    about = surroundings()
    # Else a look for GPUs while torch's users are imported would keep the sections' processes from using them.
    os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(IMPORTED)
    names = list(SECTIONS) if options.only is None else options.only.split(",")
    if unknown := set(names) - set(SECTIONS):
        parser.error(f"--only: there is no section {', '.join(sorted(unknown))}; there is {', '.join(SECTIONS)}")
    file = folder / "state.json"
    if options.fresh:
        file.unlink(missing_ok=True)
    state = State(file, about, tiny=options.tiny)
    end_at = time.monotonic() + 60 * options.minutes
    for name in names:
        left = end_at - time.monotonic()
        if state.section(name).get("state") == "done":
            console.print(f"[bold]{name}[/]: kept from before")
        elif left < LEAST_S:
            console.print(f"[bold]{name}[/]: no time left; run again to go on", style="yellow")
        else:
            console.print(f"[bold]{name}[/]")
            run_section(context, state, name, folder, min(left, SECTIONS[name]), tiny=options.tiny)
    results = Results(state.data["sections"])
    report = state.data | {
        "goals": gpu_goals.verdicts(results),
        "gaps": gpu_goals.gaps(results),
        "picture": gpu_goals.picture(results),
    }
    if options.tiny:
        console.print("Tiny models: no figure means anything.", style="bold yellow")
    gpu_goals.show(console, results)
    if options.output:
        options.output.write_text(json.dumps(report, indent=1) + "\n")
    if any(section["errors"] for section in state.data["sections"].values()):
        sys.exit("not all was measured; run again to go on")


if __name__ == "__main__":
    main()

"""What ``lcm-rt bench serve`` shows: a bar while it measures, tables when it has."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bars
from rich.status import Status
from rich.table import Table

from lcm_rt.bench.figures import Log, Progress

BUSY_PERCENT = 80.0
"""Of a core: from here on the generator's own slowness is in the figures."""

console = Console()


def say(words: str) -> None:
    console.print(words, soft_wrap=True, markup=False)


def status(words: str) -> Status:
    """A line that turns until the block ends."""
    return console.status(words)


@contextmanager
def progress(seconds: float) -> Iterator[Progress]:
    """A bar of so many seconds, with the frames and errors so far."""
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Bars(*columns, console=console, transient=True) as bars:
        task = bars.add_task("warm-up", total=None)

        def update(elapsed: float, logs: Sequence[Log]) -> None:
            frames, errors = sum(len(log.frames) for log in logs), sum(log.errors.total() for log in logs)
            words = f"{frames} frames" + (f", [red]{errors} errors[/]" if errors else "")
            bars.update(task, total=seconds, completed=min(elapsed, seconds), description=words)

        yield update


def show(report: Mapping[str, Any]) -> None:
    """The tables of a report of ``serve.Measured``."""
    if report["trace"] != "idle":
        console.print(_delays(report))
        if len(report["clients"]) > 1:
            console.print(_clients(report["clients"]))
        _show_sums(report)
    if report["generator"]["cpu_percent"] > BUSY_PERCENT:
        console.print("[red]the generator itself was busy all the time: its figures say little about the server[/]")
    for process in report.get("server_processes", ()):
        words = f"{process['role']} (pid {process['pid']}): {process['cpu_percent']} % of a core"
        say(words + (f", {process['rss_mb']:.0f} MB resident" if "rss_mb" in process else ""))


def _delays(report: Mapping[str, Any]) -> Table:
    table = Table("ms", "p50", "p95", "p99", "max", title=f"{report['trace']}, {report['sessions']} session(s)")
    groups = report["traces"] if len(report["traces"]) > 1 else {"": report["all"]}
    if report["trace"] == "single":  # here a round trip is the delay, the staleness and the gap in one
        turns = report["single"] or {"round_trip_ms": report["all"]["staleness_ms"]}
        names = {"round trip": "round_trip_ms", "  engine": "engine_ms", "  overhead": "overhead_ms"}
        spreads = {name: turns.get(key) for name, key in names.items()}
    else:
        names = {"input to frame": "input_to_frame_ms", "staleness": "staleness_ms", "frame gap": "frame_gap_ms"}
        spreads = {
            f"{trace} {name}".strip(): figures[key] for trace, figures in groups.items() for name, key in names.items()
        }
        spreads["generator late"] = report["generator"]["late_ms"]
    for name, figures in spreads.items():
        if figures:
            table.add_row(name, *(f"{figures[column]:.1f}" for column in ("p50", "p95", "p99", "max")))
    return table


def _clients(clients: Sequence[Mapping[str, Any]]) -> Table:
    table = Table("client", "sent", "frames", "superseded", "frames/s", "p50 ms", "p95 ms", "errors")
    for number, client in enumerate(clients, 1):
        shown = client["input_to_frame_ms"] or {"p50": float("nan"), "p95": float("nan")}
        table.add_row(
            f"{number} {client['trace']}",
            *(str(client[name]) for name in ("sent", "frames", "superseded")),
            *(f"{value:.1f}" for value in (client["frames_per_s"], shown["p50"], shown["p95"])),
            str(client["errors"] or ""),
        )
    return table


def _show_sums(report: Mapping[str, Any]) -> None:
    everyone, work = report["all"], report.get("work")
    up, down = (everyone[name] / report["seconds"] / 1e3 for name in ("bytes_sent", "bytes_received"))
    say(
        f"{everyone['sent']} sent, {everyone['frames']} frames ({everyone['frames_per_s']}/s), "
        f"{everyone['superseded']} superseded, {everyone['unshown']} never shown, "
        f"errors {everyone['errors'] or 'none'}, fairness {report['fairness']}, {up:.0f} kB/s up, {down:.0f} kB/s down"
    )
    if everyone["overtaken"] is not None:
        say(f"{100 * everyone['overtaken']:.0f} % of the frames came when something newer was wanted already")
    if work:
        said = f"the server made {work['pictures']} pictures"
        if work["wasted"] is not None:
            said += f", {100 * work['wasted']:.1f} % of them for nobody"
        if work["rows_together"]:
            said += f", in batches of {work['rows_together']} rows"
        if found := {name: looked.get("hit", 0) / sum(looked.values()) for name, looked in work["caches"].items()}:
            said += "; found in caches: " + ", ".join(f"{name} {share:.0%}" for name, share in found.items())
        say(said)

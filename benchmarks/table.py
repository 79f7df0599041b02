"""The table of README's section "How fast", made from ``benchmarks/results``: nobody types a figure.

    python benchmarks/table.py            # writes README.md
    python benchmarks/table.py --check    # fails if that would change it

It stands between two marks, ``<!-- benchmarks -->`` and ``<!-- /benchmarks -->``. What has no results yet is owed, and
the table says so. It reads ``peers.json``, ``front.json``, ``start*.json`` (``lcm-rt bench engine``, one for each
backend), ``soak.json`` and ``gpu.json``.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
RESULTS = ROOT / "benchmarks" / "results"
BEGIN, END = "<!-- benchmarks -->", "<!-- /benchmarks -->"
OWED = "**owed**"

Results = Mapping[str, Mapping[str, Any]]
"""The contents of the files, by their names without suffix."""

PEERS = {
    "diffusers": "diffusers",
    "diffusers bf16": "diffusers in bf16",
    "diffusers compiled": "diffusers compiled",
    "diffusers compiled bf16": "diffusers compiled, in bf16",
    "openvino": "a loop in OpenVINO",
    "stream batch": "stream batch (newest input)",
    "serial": "a serial server",
    "litserve": "LitServe",
    "ray serve": "Ray Serve",
}
"""What peers are called in the table."""


class Row(NamedTuple):
    """``ours`` is None where it is owed."""

    what: str
    ours: str | None
    others: str = ""


def read_results(folder: Path = RESULTS) -> dict[str, Any]:
    return {file.stem: json.loads(file.read_text()) for file in sorted(folder.glob("*.json"))}


def figure(value: float) -> str:
    """Three digits, or all those before the point."""
    digits = 0 if abs(value) >= 100 else 1 if abs(value) >= 10 else 2
    return f"{value:,.{digits}f}"


def rows(results: Results) -> Iterator[Row]:
    """The table's lines, in order."""
    yield from peer_rows(results.get("peers", {}))
    yield from front_rows(results.get("front", {}))
    yield from start_rows(results)
    yield soak_row(results.get("soak", {}))
    yield from gpu_rows(results.get("gpu", {}))


def peer_rows(peers: Mapping[str, Any]) -> Iterator[Row]:
    pictures, serving = peers.get("pictures", {}), peers.get("serving", {})
    painted = {name: found["p50_ms"] for name, found in pictures.items() if found.get("p50_ms")}
    yield _compared("one picture, without a server, p50", painted)
    for clients in ("8", "16"):
        shown = {
            name: found["clients"][clients]["p95_ms"]
            for name, found in serving.items()
            if found.get("clients", {}).get(clients, {}).get("p95_ms")
        }
        yield _compared(f"{clients} people type: keystroke to picture, p95", shown)
    trip, flood = peers.get("round_trip", {}), peers.get("flood", {})
    yield Row(
        "WebSocket in to JPEG out, p50",
        None if not trip.get("round_trip_p50_ms") else f"{figure(trip['round_trip_p50_ms'])} ms",
        "" if not trip.get("engine_p50_ms") else f"the bare engine: {figure(trip['engine_p50_ms'])} ms",
    )
    yield Row(
        "flood of keystrokes: age of what is shown, p95",
        None if not flood.get("picture_times") else f"{figure(flood['picture_times'])} picture times",
    )


def _compared(what: str, milliseconds: Mapping[str, float]) -> Row:
    ours = milliseconds.get("ours")
    if ours is None:
        return Row(what, None)
    others = (
        f"{said} {figure(milliseconds[name])} ms ({figure(milliseconds[name] / ours)}x)"
        for name, said in PEERS.items()
        if name in milliseconds
    )
    return Row(what, f"{figure(ours)} ms", ", ".join(others))


def front_rows(front: Mapping[str, Any]) -> Iterator[Row]:
    saturation, latency, idle = (front.get(name, []) for name in ("saturation", "latency", "idle"))
    least = min((row["frames_per_core_s"] for row in saturation), default=None)
    yield Row("the front alone: frames/s of one core", None if least is None else f"{figure(least)} or more")
    worst = max((row["round_trip_ms"] for row in latency), key=lambda trip: trip["p50"], default=None)
    rate = f" at {figure(latency[0]['rate'])} frames/s" if latency else ""
    yield Row(
        f"the front alone: latency{rate}, p50 / p99",
        None if worst is None else f"{figure(worst['p50'])} / {figure(worst['p99'])} ms",
    )
    busiest = max(idle, key=lambda row: row["connections"], default=None)
    yield Row(
        "idle: CPU of the front" + (f", {busiest['connections']} connections" if busiest else ""),
        None if busiest is None else f"{figure(busiest['core_percent'])} % of a core",
    )


def start_rows(results: Results) -> Iterator[Row]:
    found = {
        report["backend"]: report["cold_start"]
        for name, report in results.items()
        if name.startswith("start") and "cold_start" in report
    }
    for backend, starts in sorted(found.items()):
        cold, warm = starts["cold_s"]["tuned"], starts["warm_s"]["tuned"]
        share = f"{100 * warm / cold:.0f} % of the first start's {figure(cold)} s"
        yield Row(f"second start until all is fast, {backend}", f"{figure(warm)} s", share)
    if not found:
        yield Row("second start until all is fast", None)


def soak_row(soak: Mapping[str, Any]) -> Row:
    if not soak:
        return Row("half an hour of mixed load: growth of memory, drift of p99", None)
    verdict = soak["verdict"]
    growth = max(process["growth_percent"] for process in verdict["processes"].values())
    drift = verdict["delays"]["percent"]
    return Row(
        f"{soak['minutes']:g} minutes of mixed load: growth of memory, drift of p99",
        f"{figure(growth)} %, {'unknown' if drift is None else f'{figure(drift)} %'}",
        "; ".join(verdict["faults"]),
    )


def gpu_rows(gpu: Mapping[str, Any]) -> Iterator[Row]:
    """A line for each goal on a GPU; figures of tiny models are none."""
    if not gpu or gpu["same"]["tiny"]:
        yield Row("on a GPU: all figures", None, "`make bench-gpu` measures them")
        return
    for goal in gpu["goals"]:
        value = None if goal["value"] is None else f"{figure(goal['value'])} {goal['unit']}"
        yield Row(f"{goal['name']}, on a GPU: {goal['what']}", value, f"goal {goal['goal']:g} {goal['unit']}")


def about(results: Results) -> str:
    """Where and of what the figures are."""
    peers = results.get("peers", {})
    words = "The embedded model, 4 steps, in text to image; each peer paints the same pictures from the same weights."
    if peers:
        machine, (side, _) = peers["machine"], peers["pictures"]["ours"]["size"]
        words = f"{machine['processor']}, {machine['cores']} cores; {side}x{side} px. {words}"
    if results.get("gpu") and not results["gpu"]["same"]["tiny"]:
        words += f" GPU: {'; '.join(results['gpu']['same']['gpus'])}."
    return words


def section(results: Results) -> str:
    """The lines between the marks."""
    lines = [about(results), "", "| | ours | others |", "|---|---|---|"]
    lines += [f"| {row.what} | {row.ours or OWED} | {row.others} |" for row in rows(results)]
    return "\n".join(lines)


def rewrite(readme: str, lines: str) -> str:
    """README with other lines between its marks. Raises: ValueError: it has no marks."""
    before, begin, rest = readme.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"README.md has no {BEGIN} and {END}")
    return f"{before}{BEGIN}\n{lines}\n{END}{after}"


def main() -> None:
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; fail if README is not what it should be")
    options = parser.parse_args()
    old = README.read_text()
    new = rewrite(old, section(read_results()))
    if options.check and new != old:
        raise SystemExit("README.md is not made from benchmarks/results: run python benchmarks/table.py")
    if not options.check:
        README.write_text(new)


if __name__ == "__main__":
    main()

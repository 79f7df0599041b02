"""From rounds to figures: medians, ratios, and whether what is claimed holds.

A round has every opponent once, one after the other. A ratio is taken within each round, of two opponents that met the
same machine at nearly the same time; what is reported is the median of the rounds' ratios.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from lcm_rt.bench.figures import percentile

SAME_DB = 30.0
"""PSNR from which two pictures pass for the same."""

Round = Mapping[str, Any]


def median(values: Sequence[float | None]) -> float | None:
    """Of the rounds in which there was a value."""
    known = [value for value in values if value is not None]
    return round(statistics.median(known), 3) if known else None


def psnr(first: Any, second: Any) -> list[float]:
    """Peak signal-to-noise ratio in dB of pictures (n, H, W, 3) uint8, pair by pair; at most 100, of equal ones."""
    import numpy as np

    errors = ((first.astype(np.float64) - second.astype(np.float64)) ** 2).mean(axis=(1, 2, 3))
    return [round(float(10 * np.log10(255**2 / max(error, 255**2 / 1e10))), 1) for error in errors]


def picture_round(said: Mapping[str, Any], batches: Mapping[str, Any] | None) -> dict[str, float | None]:
    """What one opponent did in one round, from what its process said."""
    latency, paint = sorted(said["latency_ms"]), sorted(said["paint_ms"])
    return {
        "p50_ms": percentile(latency, 50),
        "p95_ms": percentile(latency, 95),
        "paint_p50_ms": percentile(paint, 50),
        "per_s": round(said["pictures"] / said["seconds"], 3),
        "batch_per_s": None if batches is None else round(batches["pictures"] / batches["seconds"], 3),
    }


def serving_round(said: Mapping[str, Any]) -> dict[str, Any]:
    """What the clients of one server saw in one round, from the report of ``lcm_rt.bench.serve``."""
    figures = said["all"]
    delays, ages = figures["input_to_frame_ms"] or {}, figures["staleness_ms"] or {}
    return {
        "p50_ms": delays.get("p50"),
        "p95_ms": delays.get("p95"),
        "staleness_p95_ms": ages.get("p95"),
        "staleness_max_ms": ages.get("max"),
        "frames_per_s": figures["frames_per_s"],
        "unshown": figures["unshown"],
        "errors": sum(figures["errors"].values()),
        "fairness": said["fairness"],
        "generator_late_p95_ms": (said["generator"]["late_ms"] or {}).get("p95"),
    }


def summary(rounds: Sequence[Round]) -> dict[str, Any]:
    """The median of each figure, and the rounds."""
    names = rounds[0] if rounds else {}
    return {**{name: median([one[name] for one in rounds]) for name in names}, "rounds": list(rounds)}


def ratio(above: Sequence[Round], below: Sequence[Round], name: str) -> float | None:
    """Median over the rounds of a figure of one opponent over that of another."""
    pairs = [(a.get(name), b.get(name)) for a, b in zip(above, below, strict=False)]
    return median([a / b for a, b in pairs if a is not None and b])


def claims(results: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What this comparison must show, with the figure that was found. ``holds`` is None where one is missing."""
    pictures, serving = results["pictures"], results["serving"]

    def rounds_of(name: str) -> list[Round]:
        return list(pictures.get(name, {}).get("rounds", []))

    def served(name: str, clients: int) -> list[Round]:
        return list(serving.get(name, {}).get("clients", {}).get(str(clients), {}).get("rounds", []))

    def claim(text: str, value: float | None, bound: float, *, at_most: bool = False) -> dict[str, Any]:
        holds = None if value is None else (value <= bound if at_most else value >= bound)
        return {"claim": text, "value": value, "bound": f"{'≤' if at_most else '≥'} {bound:g}", "holds": holds}

    alike = pictures.get("ours", {}).get("psnr_each_db") or []
    found = [
        claim("our pictures are those of diffusers: least PSNR, dB", min(alike, default=None), SAME_DB),
        claim("one picture: diffusers / ours", ratio(rounds_of("diffusers"), rounds_of("ours"), "p50_ms"), 2.0),
    ]
    trips = results.get("round_trip") or {}
    excess = [
        trip["round_trip_p50_ms"] - 1.1 * trip["engine_p50_ms"]
        for trip in trips.get("rounds", [])
        if trip["engine_p50_ms"] is not None
    ]
    found.append(
        claim("one picture: WebSocket to JPEG, less 1.1 x the bare engine, ms", median(excess), 3.0, at_most=True)
    )
    for clients in (8, 16):
        for peer, bound in (("serial", 8.0), ("litserve", 1.4)):
            value = ratio(served(peer, clients), served("ours", clients), "p95_ms")
            found.append(claim(f"{clients} people type, keystroke to frame, p95: {peer} / ours", value, bound))
    flood = results.get("flood") or {}
    found.append(
        claim("flood of keystrokes: p95 of staleness in picture times", flood.get("picture_times"), 2.0, at_most=True)
    )
    return found


# The terminal.


def _text(value: float | None, digits: int = 1) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def show(results: Mapping[str, Any], console: Console) -> None:
    pictures, serving = results["pictures"], results["serving"]
    if pictures:
        table = Table(
            "no server", "p50 ms", "p95 ms", "p50 / ours", "pictures/s", "by eights", "PSNR dB", "least", "start s"
        )
        ours = pictures.get("ours", {}).get("rounds", [])
        for name, found in pictures.items():
            if "absent" in found:
                continue
            table.add_row(
                name,
                *(_text(found[figure]) for figure in ("p50_ms", "p95_ms")),
                _text(ratio(found["rounds"], ours, "p50_ms"), 2),
                *(_text(found[figure]) for figure in ("per_s", "batch_per_s", "psnr_db")),
                _text(min(found["psnr_each_db"], default=None)),
                _text(found["start_s"]),
            )
        console.print(table)
    if serving:
        table = Table("people type", "", "to frame p50 ms", "p95 ms", "p95 / ours", "frames/s", "fairness", "errors")
        there = {name: found["clients"] for name, found in serving.items() if "clients" in found}
        for clients in map(str, results["options"]["clients"]):
            for name, found in there.items():
                one, ours = found[clients], there.get("ours", {}).get(clients, {}).get("rounds", [])
                table.add_row(
                    clients,
                    name,
                    *(_text(one[figure]) for figure in ("p50_ms", "p95_ms")),
                    _text(ratio(one["rounds"], ours, "p95_ms"), 2),
                    *(_text(one[figure], 2) for figure in ("frames_per_s", "fairness")),
                    _text(one["errors"], 0),
                )
        console.print(table)
    for name, found in (*pictures.items(), *serving.items()):
        if "absent" in found:
            console.print(f"[yellow]{name} did not take part:[/] {found['absent']}", soft_wrap=True)
    table = Table("must show", "found", "wanted", "")
    for claim in results["claims"]:
        verdict = {True: "[green]holds[/]", False: "[red]does not hold[/]", None: "[yellow]not measured[/]"}
        table.add_row(claim["claim"], _text(claim["value"], 2), claim["bound"], verdict[claim["holds"]])
    console.print(table)

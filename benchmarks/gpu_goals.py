"""The goals for one GPU, and how far results are from them and from the hardware; knows files of results only."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table


class Results:
    """What was measured, by section and part; whatever is missing is None."""

    def __init__(self, sections: Mapping[str, Any]) -> None:
        self._sections = sections

    def part(self, section: str, part: str) -> Any:
        return self._sections.get(section, {}).get("parts", {}).get(part)

    def parts(self, section: str) -> dict[str, Any]:
        return dict(self._sections.get(section, {}).get("parts", {}))

    def number(self, section: str, part: str, *path: str) -> float | None:
        found = self.part(section, part)
        for name in path:
            found = found.get(name) if isinstance(found, Mapping) else None
        return found if isinstance(found, int | float) else None


Value = Callable[[Results], float | None]


@dataclass(frozen=True, slots=True)
class Goal:
    """One line of the table: three bounds, from what is owed to what is hoped for; ``most``: they are upper ones."""

    name: str
    what: str
    unit: str
    bounds: tuple[float, float, float]
    value: Value
    most: bool = True

    def mark(self, results: Results) -> tuple[float | None, str]:
        """The value, and "stretch", "goal", "minimum", "missed" or "not measured"."""
        value = self.value(results)
        if value is None or math.isnan(value):
            return None, "not measured"
        for word, bound in reversed(list(zip(("minimum", "goal", "stretch"), self.bounds, strict=True))):
            if value <= bound if self.most else value >= bound:
                return value, word
        return value, "missed"


def number(section: str, part: str, *path: str) -> Value:
    return lambda results: results.number(section, part, *path)


def ratio(above: Value, below: Value) -> Value:
    def value(results: Results) -> float | None:
        a, b = above(results), below(results)
        return None if a is None or not b else a / b

    return value


def product(one: Value, other: Value) -> Value:
    def value(results: Results) -> float | None:
        a, b = one(results), other(results)
        return None if a is None or b is None else a * b

    return value


def total(*values: Value) -> Value:
    def value(results: Results) -> float | None:
        found = [each(results) for each in values]
        return None if None in found else sum(each for each in found if each is not None)

    return value


def scaled(factor: float, value: Value) -> Value:
    return lambda results: None if (found := value(results)) is None else factor * found


_TRIP = number("serving", "single", "single", "round_trip_ms", "p50")
_EAGER = number("diffusers", "eager taesd", "p50")
# What the way over the WebSocket costs does not depend on the VAE.
_KL_TRIP = total(
    number("sd", "kl tuned 1", "batch_ms", "p50"), _TRIP, scaled(-1, number("sd", "taesd tuned 1", "batch_ms", "p50"))
)
_CAMERAS = number("serving", "camera 16", "all", "frames_per_s")


def _host_gap(results: Results) -> float | None:
    """Microseconds per step; a step with a sync has none that counts."""
    if results.number("sd", "taesd profile 1", "syncs"):
        return math.inf
    return results.number("sd", "taesd profile 1", "launch_gap_us")


GOALS = (
    Goal("G1", "SD1.5 512 4 steps TAESD, WebSocket in to JPEG out, p50", "ms", (35, 25, 18), _TRIP),
    Goal("G2", "diffusers, eager, over G1 (TAESD)", "x", (2.5, 4, 5), ratio(_EAGER, _TRIP), most=False),
    Goal(
        "G2",
        "the same with the KL VAE on both sides",
        "x",
        (2.5, 4, 5),
        ratio(number("diffusers", "eager kl", "p50"), _KL_TRIP),
        most=False,
    ),
    Goal(
        "G3",
        "diffusers, torch.compile max-autotune, over G1",
        "x",
        (1.15, 1.4, 1.6),
        ratio(number("diffusers", "compiled taesd", "p50"), _TRIP),
        most=False,
    ),
    Goal("G4", "1 step, batch 1, pictures", "/s", (110, 160, 200), number("sd", "throughput 1 step 1", "per_s"), False),
    Goal(
        "G5", "1 step, batch 16, pictures", "/s", (250, 400, 500), number("sd", "throughput 1 step 16", "per_s"), False
    ),
    Goal(
        "G6", "4 steps, batch 16, pictures", "/s", (90, 110, 140), number("sd", "throughput 4 steps 16", "per_s"), False
    ),
    Goal("G7", "SDXL 1024 4 steps TAESDXL", "ms", (110, 75, 60), number("sdxl", "taesd tuned 1", "batch_ms", "p50")),
    Goal("G7", "SDXL 1024 4 steps KL", "ms", (110, 100, 85), number("sdxl", "kl tuned 1", "batch_ms", "p50")),
    Goal(
        "G8",
        "16 people typing: key to frame p95 over p50 of one",
        "x",
        (3, 2.6, 2),
        ratio(number("serving", "typing 16", "all", "input_to_frame_ms", "p95"), _TRIP),
    ),
    Goal(
        "G9",
        "16 cameras: frames/s over one by one, diffusers eager",
        "x",
        (5, 10, 12),
        product(scaled(1e-3, _CAMERAS), _EAGER),
        most=False,
    ),
    Goal(
        "G9",
        "16 cameras: frames/s over our own one by one",
        "x",
        (2, 2.5, 3),
        ratio(_CAMERAS, number("one by one", "camera 16", "all", "frames_per_s")),
        most=False,
    ),
    Goal(
        "G10",
        "flood of keys: staleness at most, over p50 of one",
        "x",
        (3, 2, 1.5),
        ratio(number("serving", "flood", "all", "staleness_ms", "max"), _TRIP),
    ),
    Goal(
        "G11",
        "16 people typing: pictures for nobody, and filling (simulated)",
        "%",
        (15, 5, 2),
        scaled(
            100,
            total(
                number("serving", "typing 16", "work", "wasted"),
                number("simulation", "typing 16", "simulated", "wasted_row_steps"),
            ),
        ),
    ),
    Goal("G12", "GPU waits for the host, per step; none with syncs", "us", (300, 100, 50), _host_gap),
    Goal(
        "G13",
        "not the GPU's, per frame: round trip less denoise and VAE",
        "ms",
        (2.5, 1.5, 1),
        total(
            _TRIP,
            scaled(-1, number("serving", "single", "single", "stages_ms", "denoise", "p50")),
            scaled(-1, number("serving", "single", "single", "stages_ms", "vae", "p50")),
        ),
    ),
    Goal("G14", "process to first picture, warm cache", "s", (30, 12, 6), number("starts", "warm", "first_picture")),
    Goal(
        "G15",
        "a picture in a batch of 16 and alone, PSNR",
        "dB",
        (40, 50, 60),
        number("sd", "batch invariance", "psnr_db"),
        False,
    ),
)


def gaps(results: Results) -> list[dict[str, Any]]:
    """For each line of the step tables, what keeps a step from its floor: milliseconds of the host, and of kernels."""
    found = []
    for section in ("sd", "sdxl"):
        parts = results.parts(section)
        for name, line in parts.items():
            if not isinstance(line, Mapping) or "step_ms" not in line:
                continue
            step, floor = line["step_ms"]["p50"], line["step"]["floor_ms"]
            vae, way, rows = name.split()
            profile = parts.get(f"{vae} profile {rows}") if way == "tuned" else None
            gap = {
                "line": f"{section} {name}",
                "way": "+".join(line["ways"]),
                "step_ms": step,
                "floor_ms": floor,
                "share": line["step"]["share"],
                "finish_ms": line["finish_ms"]["p50"],
                "finish_floor_ms": line["finish"]["floor_ms"],
                "begin_ms": line["begin_ms"]["p50"],
                "launch_gaps_ms": None,
                "kernel_tails_ms": None,
                "kernels_ms": None,
            }
            if profile:
                launch, idle = profile["launch_gap_us"] / 1e3, profile["idle_us"] / 1e3
                gap |= {
                    "launch_gaps_ms": round(launch, 3),
                    "kernel_tails_ms": round(idle - launch, 3),
                    "kernels_ms": round(profile["busy_ms"] - floor, 3),
                }
            found.append(gap)
    return found


def picture(results: Results) -> dict[str, float] | None:
    """Where the milliseconds of one picture go, from the WebSocket and back to it: G1, as medians."""
    served, line = results.part("serving", "single"), results.part("sd", "taesd tuned 1")
    if not served or not line or not served.get("single"):
        return None
    stages = {name: took["p50"] for name, took in served["single"]["stages_ms"].items()}
    steps, trip = line["steps"], served["single"]["round_trip_ms"]["p50"]
    denoise_floor, vae_floor = steps * line["step"]["floor_ms"], line["finish"]["floor_ms"]
    denoise, vae, jpeg = (stages.get(name, 0.0) for name in ("denoise", "vae", "encode_image"))
    profile = results.part("sd", "taesd profile 1") or {}
    gaps_ms = steps * profile["idle_us"] / 1e3 if profile else 0.0
    found = {
        "round trip": trip,
        "floor of the steps": denoise_floor,
        "gaps between kernels": gaps_ms,
        "kernels below the peak": denoise - denoise_floor - gaps_ms,
        "floor of the VAE": vae_floor,
        "VAE over its floor": vae - vae_floor,
        "JPEG": jpeg,
        "the rest of the host": trip - denoise - vae - jpeg,
    }
    return {name: round(milliseconds, 3) for name, milliseconds in found.items()}


def show(console: Console, results: Results) -> None:
    """The goals with their marks, then the way to the roofline."""
    table = Table(title="goals", box=box.SIMPLE, pad_edge=False)
    for column in ("", "what", "measured", "minimum", "goal", "stretch", ""):
        table.add_column(column, justify="left" if column in ("", "what") else "right")
    colours = {"stretch": "bold green", "goal": "green", "minimum": "yellow", "missed": "red", "not measured": "dim"}
    for goal in GOALS:
        value, mark = goal.mark(results)
        sign = "<=" if goal.most else ">="
        table.add_row(
            goal.name,
            goal.what,
            "" if value is None else f"{value:.4g} {goal.unit}",
            *(f"{sign}{bound:g}" for bound in goal.bounds),
            f"[{colours[mark]}]{mark}[/]",
        )
    console.print(table)
    if whole := picture(results):
        console.print("one picture, in ms: " + ", ".join(f"{name} {took:.2f}" for name, took in whole.items()))
    if found := gaps(results):
        table = Table(title="what keeps a step from the roofline, in ms", box=box.SIMPLE, pad_edge=False)
        for column in ("line", "way"):
            table.add_column(column, no_wrap=True)
        for column in ("step", "floor", "share", "launches", "tails", "kernels", "finish", "floor", "begin"):
            table.add_column(column, justify="right")
        for gap in found:
            columns = ("launch_gaps_ms", "kernel_tails_ms", "kernels_ms", "finish_ms", "finish_floor_ms", "begin_ms")
            table.add_row(
                gap["line"],
                gap["way"],
                f"{gap['step_ms']:.2f}",
                f"{gap['floor_ms']:.2f}",
                "" if gap["share"] is None else f"{gap['share']:.0%}",
                *("" if gap[name] is None else f"{gap[name]:.2f}" for name in columns),
            )
        console.print(table)
        console.print(
            "step - floor = launches (the GPU waits for the host) + tails (between kernels of a graph) + kernels (they"
            " run below the peak). finish is the VAE with the way to the host, begin is prompt, noise and host work."
        )


def verdicts(results: Results) -> list[dict[str, Any]]:
    """The goals as JSON has them."""
    found = []
    for goal in GOALS:
        value, mark = goal.mark(results)
        shown = None if value is None or math.isinf(value) else round(value, 4)
        bounds = dict(zip(("minimum", "goal", "stretch"), goal.bounds, strict=True))
        found.append({"name": goal.name, "what": goal.what, "unit": goal.unit, "value": shown, "mark": mark, **bounds})
    return found

"""``benchmarks/table.py``: README says what the results say, and what is owed."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import table

PEERS = {
    "machine": {"processor": "A processor", "cores": 2},
    "pictures": {
        "diffusers": {"p50_ms": 137.4, "size": [256, 256]},
        "openvino": {"absent": "openvino is not installed"},
        "ours": {"p50_ms": 30.0, "size": [256, 256]},
    },
    "serving": {
        "ours": {"clients": {"8": {"p95_ms": 100.0}, "16": {"p95_ms": None}}},
        "serial": {"clients": {"8": {"p95_ms": 1234.5}, "16": {"p95_ms": 3000.0}}},
        "ray serve": {"absent": "ray is not installed"},
    },
    "round_trip": {"round_trip_p50_ms": 33.04, "engine_p50_ms": 31.0},
    "flood": {"picture_times": 1.625},
}
FRONT = {
    "saturation": [{"frames_per_core_s": 5200}, {"frames_per_core_s": 2350}],
    "latency": [
        {"rate": 200.0, "round_trip_ms": {"p50": 0.61, "p99": 2.2}},
        {"rate": 200.0, "round_trip_ms": {"p50": 0.92, "p99": 1.9}},
    ],
    "idle": [{"connections": 0, "core_percent": 0.1}, {"connections": 256, "core_percent": 0.4}],
}
START = {"backend": "inductor", "cold_start": {"cold_s": {"tuned": 60.0}, "warm_s": {"tuned": 15.0}}}
SOAK = {
    "minutes": 30.0,
    "verdict": {
        "processes": {"front": {"growth_percent": 0.1}, "engine": {"growth_percent": 0.42}},
        "delays": {"percent": None},
        "faults": ["p99 delay drifted by None %"],
    },
}
GPU = {
    "same": {"tiny": False, "gpus": ["A GPU"]},
    "goals": [
        {"name": "G1", "what": "a picture", "unit": "ms", "value": 21.23, "goal": 25},
        {"name": "G4", "what": "pictures", "unit": "/s", "value": None, "goal": 160},
    ],
}
ALL = {"peers": PEERS, "front": FRONT, "start-inductor": START, "soak": SOAK, "gpu": GPU}


def lines(results):
    return [line for line in table.section(results).splitlines() if line.startswith("| ")][1:]


def test_each_figure_stands_beside_its_peers():
    assert lines(ALL) == [
        "| one picture, without a server, p50 | 30.0 ms | diffusers 137 ms (4.58x) |",
        "| 8 people type: keystroke to picture, p95 | 100 ms | a serial server 1,234 ms (12.3x) |",
        "| 16 people type: keystroke to picture, p95 | **owed** |  |",
        "| WebSocket in to JPEG out, p50 | 33.0 ms | the bare engine: 31.0 ms |",
        "| flood of keystrokes: age of what is shown, p95 | 1.62 picture times |  |",
        "| the front alone: frames/s of one core | 2,350 or more |  |",
        "| the front alone: latency at 200 frames/s, p50 / p99 | 0.92 / 1.90 ms |  |",
        "| idle: CPU of the front, 256 connections | 0.40 % of a core |  |",
        "| second start until all is fast, inductor | 15.0 s | 25 % of the first start's 60.0 s |",
        "| 30 minutes of mixed load: growth of memory, drift of p99 | 0.42 %, unknown | p99 delay drifted by None % |",
        "| G1, on a GPU: a picture | 21.2 ms | goal 25 ms |",
        "| G4, on a GPU: pictures | **owed** | goal 160 /s |",
    ]
    assert table.section(ALL).startswith("A processor, 2 cores; 256x256 px.")
    assert "GPU: A GPU." in table.section(ALL)


def test_what_was_not_measured_is_owed():
    found = lines({})
    assert len(found) == 11
    assert all("| **owed** |" in line for line in found)


def test_figures_of_tiny_models_are_none():
    tiny = {**GPU, "same": {"tiny": True, "gpus": []}}
    assert lines({"gpu": tiny})[-1] == lines({})[-1]


@pytest.mark.parametrize(
    ("value", "words"), [(0.0, "0.00"), (1.625, "1.62"), (31.04, "31.0"), (99.96, "100.0"), (12345.6, "12,346")]
)
def test_figures_have_three_digits(value, words):
    assert table.figure(value) == words


def test_only_what_is_between_the_marks_changes():
    readme = f"# A\n{table.BEGIN}\nold\n{table.END}\n## B\n"
    once = table.rewrite(readme, "new\nlines")
    assert once == f"# A\n{table.BEGIN}\nnew\nlines\n{table.END}\n## B\n"
    assert table.rewrite(once, "new\nlines") == once
    with pytest.raises(ValueError, match="has no"):
        table.rewrite("# A\n", "new")


def test_readme_is_made_from_the_results():
    readme = table.README.read_text()
    assert table.rewrite(readme, table.section(table.read_results())) == readme

"""``benchmarks/soak.py``: its verdict on known series, and a few seconds of it."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
from serving import serving_aside

SCRIPT = Path(__file__).parents[1] / "benchmarks/soak.py"


@pytest.fixture(scope="module")
def soak() -> ModuleType:
    spec = importlib.util.spec_from_file_location("soak", SCRIPT)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules["soak"] = module  # dataclasses look themselves up there
    spec.loader.exec_module(module)
    return module


def diary_of(soak: ModuleType, *, growth_mb=0.0, growth_fds=0, slower=1.0, pid=lambda at: 1):
    """A quarter of an hour with a front of 100 MB and an engine of 400, and one message shown each second."""
    diary = soak.Diary()
    for at in range(0, 900, 5):
        part = at / 900
        front = {"rss_mb": 100 + growth_mb * part, "pss_mb": 80, "private_mb": 60 + growth_mb * part, "threads": 9}
        engine = {"rss_mb": 400, "pss_mb": 390, "private_mb": 350, "fds": 12, "threads": 5, "pid": pid(at)}
        diary.samples.append(
            {"at": float(at), "front": front | {"fds": 20 + int(growth_fds * part), "pid": 7}, "engine": engine}
        )
    for at in range(900):
        diary.shown_at.append(float(at))
        diary.delays.append(0.1 * (slower if at > 600 else 1.0))
    return diary


def test_a_quiet_quarter_of_an_hour_has_no_faults(soak: ModuleType):
    verdict = soak.judge(diary_of(soak, growth_mb=0.9, growth_fds=2, slower=1.05), 900.0)
    assert verdict["faults"] == []
    assert verdict["processes"]["front"]["growth_percent"] == pytest.approx(
        0.72, abs=0.02
    )  # in four fifths of the time
    assert verdict["delays"] == {"first_p99_ms": 100.0, "last_p99_ms": 105.0, "percent": 5.0}


@pytest.mark.parametrize(
    ("what", "fault"),
    [
        ({"growth_mb": 2.0}, "front: memory grew by 1."),
        ({"growth_fds": 20}, "front: 1[0-9] more fds at the end"),
        ({"slower": 1.2}, "p99 delay drifted by 20.0 %"),
        ({"pid": lambda at: 1 if at < 500 else 2}, "engine: another process at the end"),
    ],
)
def test_each_fault_is_found(soak: ModuleType, what: dict, fault: str):
    (found,) = soak.judge(diary_of(soak, **what), 900.0)["faults"]
    assert re.match(fault, found)


def test_what_happened_in_the_warm_up_does_not_count(soak: ModuleType):
    diary = diary_of(soak)
    for sample in diary.samples:
        if sample["at"] < 180:
            sample["front"]["private_mb"] -= 50
            sample["front"]["threads"] = 1
    assert soak.judge(diary, 900.0)["faults"] == []


def test_wrong_answers_and_too_short_runs_are_faults(soak: ModuleType):
    diary = diary_of(soak)
    diary.wrong["run: Unavailable"] += 3
    assert soak.judge(diary, 900.0)["faults"] == ["3 times run: Unavailable"]
    assert any("too few samples" in fault for fault in soak.judge(soak.Diary(), 10.0)["faults"])


def test_delays_are_told_by_the_minute(soak: ModuleType):
    first, *others = soak.windows(diary_of(soak, slower=2.0), 900.0)
    assert (first["shown"], first["delay_ms"]["p99"], others[-2]["delay_ms"]["p99"]) == (60, 100.0, 200.0)


def test_a_few_seconds_of_everything(tmp_path: Path):
    with serving_aside(tmp_path) as server:
        words = ["--url", server.http, "--pid", str(os.getpid()), "--minutes", "0.06", "--fill", "20"]
        done = subprocess.run(
            [sys.executable, SCRIPT, *words, "--output", tmp_path / "report.json"],
            capture_output=True,
            text=True,
            timeout=100,
        )
    assert done.returncode == 1 and "too few samples" in done.stdout, done.stdout + done.stderr
    report = json.loads((tmp_path / "report.json").read_bytes())
    assert {"queue", "run", "visit"} <= {name for name, count in report["done"].items() if count}
    assert report["samples"][0]["front"]["private_mb"] > 1 and report["samples"][0]["sessions"] is not None
    # The fake engine reads no LoRA, so it does not see that one is none.
    assert all("lora_url" in what for what in report["wrong"])

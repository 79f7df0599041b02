"""The simulation of typists and cameras, and what it shows of the scheduler."""

from __future__ import annotations

import itertools
import json
import random
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))

import simulate
from simulate import ANSWER_S, OURS, POLICIES, PRESETS, Client, Device, Outcome, Policy, figures

from lcm_rt.bench.traces import TRACES
from lcm_rt.steptable import StepTable

SECONDS = 15.0
CPU, GPU = PRESETS["cpu-embedded"], PRESETS["h200-estimate"]
EVERY_MESSAGE, LATEST_WINS, WHOLE_BATCHES, STEP_BATCHES, _ = POLICIES


def device(steps: dict[str, dict[str, float]], finish: float = 0.001, max_rows: int = 8) -> Device:
    """By bucket: seconds of a forward by its number of rows. Pictures take ``finish`` seconds each."""
    times = {"1": finish, "8": 8 * finish}
    return Device(StepTable.given([{"bucket": b, "step": s, "finish": times} for b, s in steps.items()]), max_rows)


def clients(name: str, count: int, seconds: float = SECONDS, **others: Any) -> list[Client]:
    traces = (TRACES[name].keys(seconds, random.Random(f"{name}/{n}")) for n in range(count))
    return [Client([key.at for key in trace], **others) for trace in traces]


def run(device: Device, policy: Policy, *crowd: Client) -> Outcome:
    return simulate.simulate(device, policy, crowd)


def delay(device: Device, policy: Policy, crowd: Sequence[Client], watched: int | None = None) -> dict[str, float]:
    """Input to frame in ms, of the first clients or of all."""
    found = figures(run(device, policy, *crowd), SECONDS, watched or len(crowd))["input_to_frame_ms"]
    assert isinstance(found, dict)
    return found


def test_one_picture_takes_its_steps_and_its_vae() -> None:
    log = run(CPU, OURS, Client([1.0])).logs[0]
    assert log.frames == [(pytest.approx(1 + 4 * 0.0061 + 0.0068 + ANSWER_S), 0)]


def test_a_newcomer_joins_the_next_forward() -> None:
    outcome = run(device({"": {"1": 1.0, "2": 1.5}}, 0.25), OURS, Client([0.0]), Client([0.5]))
    first, second = (log.frames[0][0] - ANSWER_S for log in outcome.logs)
    assert first == pytest.approx(1 + 3 * 1.5 + 0.25)
    assert second == pytest.approx(first + 1 + 0.25)
    assert (outcome.forwards, outcome.row_steps, outcome.largest) == (5, 8, 2)


def test_whole_batches_wait_for_company_and_for_their_end() -> None:
    policy = Policy("whole", learns=False, whole=True, wait_s=0.5)
    outcome = run(device({"": {"1": 1.0, "2": 1.5}}, 0.25), policy, Client([0.0]), Client([0.4]), Client([0.6]))
    ends = [log.frames[0][0] - ANSWER_S for log in outcome.logs]
    assert ends == pytest.approx([0.5 + 6 + 0.5, 0.5 + 6 + 0.5, 7 + 0.5 + 4 + 0.25])


def test_the_latest_message_wins() -> None:
    burst = [0.0, *(0.01 + n / 1000 for n in range(10))]
    slow = device({"": {"1": 1.0}})
    assert [number for _, number in run(slow, OURS, Client(burst)).logs[0].frames] == [0, 10]
    assert [number for _, number in run(slow, EVERY_MESSAGE, Client(burst)).logs[0].frames] == list(range(11))


def test_forwards_are_filled_up_to_the_sizes_there_are() -> None:
    made = Device(StepTable.given([{"bucket": "", "step": {"1": 1.0, "4": 4.0}}]), 8, (1, 4))
    outcome = run(made, Policy("all", learns=False), *[Client([0.0], steps=2)] * 3)
    assert (outcome.row_steps, outcome.filling) == (8, 2)
    found = figures(outcome, 10.0, 3)
    assert (found["wasted_row_steps"], found["mean_batch"]) == (0.25, 3.0)


@pytest.mark.parametrize("policy", POLICIES, ids=lambda policy: policy.name)
def test_every_last_message_is_shown(policy: Policy) -> None:
    outcome = run(GPU, policy, *clients("typing", 12), *clients("camera", 4))
    assert all(log.frames[-1][1] == len(log.sent_at) - 1 for log in outcome.logs)
    for log in outcome.logs:
        assert log.frames == sorted(log.frames), "in order"


def test_it_is_the_same_every_time() -> None:
    crowd = clients("typing", 8)
    assert run(CPU, OURS, *crowd).logs[3].frames == run(CPU, OURS, *crowd).logs[3].frames


def test_step_batches_beat_serial_servers_at_16() -> None:
    for made in (CPU, GPU):
        crowd = clients("typing", 16)
        ours, latest, every = (delay(made, policy, crowd) for policy in (OURS, LATEST_WINS, EVERY_MESSAGE))
        assert ours["p50"] < 0.75 * latest["p50"] < 0.1 * every["p50"]
        assert ours["p95"] < 0.8 * latest["p95"] < 0.2 * every["p95"]


def test_step_batches_beat_whole_ones() -> None:
    for count in (1, 8, 16):
        ours, whole = (delay(GPU, policy, clients("typing", count)) for policy in (OURS, WHOLE_BATCHES))
        assert ours["p50"] < 0.9 * whole["p50"] and ours["p95"] < 0.9 * whole["p95"]


def test_alone_nobody_waits() -> None:
    for policy in (OURS, STEP_BATCHES):
        found = delay(CPU, policy, clients("typing", 1))
        assert found["p50"] == found["p95"] == pytest.approx(1e3 * (4 * 0.0061 + 0.0068 + ANSWER_S))


def test_a_table_costs_no_throughput_where_batches_pay() -> None:
    for made, count in ((CPU, 8), (CPU, 16), (GPU, 16), (GPU, 32)):
        ours, all_join = (
            figures(run(made, policy, *clients("camera", count)), SECONDS, count)["frames_per_s"]
            for policy in (OURS, STEP_BATCHES)
        )
        assert ours > 0.97 * all_join


def test_where_batches_do_not_pay_there_are_none() -> None:
    made = device({"": {"1": 0.01, "8": 0.08}})
    crowd = clients("typing", 6)
    assert figures(run(made, OURS, *crowd), SECONDS, 6)["mean_batch"] < 1.05
    assert delay(made, OURS, crowd)["p50"] < 0.85 * delay(made, STEP_BATCHES, crowd)["p50"]


def test_filled_forwards_are_avoided() -> None:
    crowd = clients("typing", 32)
    ours, all_join = (figures(run(GPU, policy, *crowd), SECONDS, 32) for policy in (OURS, STEP_BATCHES))
    assert ours["wasted_row_steps"] < 0.5 * all_join["wasted_row_steps"]
    assert ours["input_to_frame_ms"]["p50"] < 0.95 * all_join["input_to_frame_ms"]["p50"]


def test_a_typist_beside_four_cameras_waits_twice_as_long_as_alone() -> None:
    made = device({"": {"1": 0.004, "8": 0.032}})
    typist, *cameras = [*clients("typing", 1, seconds=60.0), *clients("camera", 4, seconds=60.0)]
    alone = delay(made, OURS, [typist])["p95"]
    assert delay(made, OURS, [typist, *cameras], 1)["p95"] < 2.2 * alone
    assert delay(made, STEP_BATCHES, [typist, *cameras], 1)["p95"] > 5 * alone


def test_cameras_are_equal_and_nobody_is_frozen_when_others_come() -> None:
    for there, coming in ((1, 7), (2, 6)):
        crowd = clients("camera", there + coming)
        late = [Client([at for at in client.sends_at if at > SECONDS / 2]) for client in crowd[there:]]
        outcome = run(device({"": {"1": 0.01, "8": 0.08}}), OURS, *crowd[:there], *late)
        frames = [[at for at, _ in log.frames] for log in outcome.logs]
        gap = max(after - before for shown in frames[:there] for before, after in itertools.pairwise(shown))
        assert gap < 3 * 8 * 0.041, "no more than three rounds of all eight"
        last = [sum(at > SECONDS * 0.75 for at in shown) for shown in frames]
        assert max(last) - min(last) <= 3


def test_jobs_of_the_queue_do_not_hold_up_a_typist_and_are_done() -> None:
    crowd = [*clients("typing", 1), Client([0.0] * 200, priority="queue")]
    ours, all_join = (delay(CPU, policy, crowd, 1) for policy in (OURS, STEP_BATCHES))
    assert ours["p95"] < 0.5 * all_join["p95"]
    jobs = run(CPU, OURS, *crowd).logs[1]
    assert sorted(number for _, number in jobs.frames) == list(range(200))
    assert max(at for at, _ in jobs.frames) < SECONDS, "beside a typist they have most of the device"


def test_large_pictures_do_not_hold_up_small_ones() -> None:
    made = device({"small": {"1": 0.006, "8": 0.03}, "large": {"1": 0.1, "8": 0.8}})
    crowd = [*clients("typing", 2, bucket="small"), *clients("camera", 2, bucket="large", area=16)]
    ours, in_turns = (delay(made, policy, crowd, 2) for policy in (OURS, STEP_BATCHES))
    assert ours["p50"] < 0.2 * in_turns["p50"]
    large = [log.frames for log in run(made, OURS, *crowd).logs[2:]]
    assert all(len(frames) > 8 for frames in large), "of 16 or so, were they alone"


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    steps, report = tmp_path / "steps.json", tmp_path / "report.json"
    steps.write_text(json.dumps([{"bucket": ["m", 32, 32], "step": {"1": 0.01, "4": 0.02}, "finish": {"1": 0.001}}]))
    simulate.main(
        ["--table", str(steps), "--sessions", "1,2", "--seconds", "5", "--cameras", "1", "--jobs", "2"]
        + ["--max-rows", "4", "--output", str(report)]
    )
    assert "typing beside 1 cameras and 2 jobs" in " ".join(capsys.readouterr().out.split())
    said = json.loads(report.read_text())
    assert [(run["sessions"], run["policy"]) for run in said["runs"]] == [
        (sessions, policy.name) for sessions in (1, 2) for policy in POLICIES
    ]
    assert said["table"] == json.loads(steps.read_text()) and said["max_rows"] == 4
    assert said["machine"]["cores"] and said["versions"]["python"]
    assert all(run["largest_batch"] <= 4 and run["frames"] for run in said["runs"])


@pytest.mark.parametrize(
    "words",
    [
        ["--trace", "single"],
        ["--trace", "nothing"],
        ["--table", "/nowhere.json"],
        ["--table", __file__],
        ["--sessions", "0"],
        ["--sessions", "many"],
        ["--cameras", "-1"],
        ["--steps", "0"],
        ["--max-rows", "-3"],
    ],
)
def test_wrong_words_are_refused(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        simulate.parse(words)
    assert caught.value.code == 2
    assert "error:" in capsys.readouterr().err

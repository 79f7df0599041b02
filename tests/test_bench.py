"""``lcm-rt bench serve``: the arithmetic of its figures, its traces, and runs against servers of each wire."""

from __future__ import annotations

import asyncio
import io
import itertools
import json
import os
import random
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import msgpack
import orjson
import pytest
import typer
from PIL import Image
from serving import run, serving, serving_aside
from typer.testing import CliRunner
from websockets.asyncio.server import ServerConnection, serve

from lcm_rt.bench import figures, traces
from lcm_rt.bench import serve as bench_serve
from lcm_rt.bench.commands import bench
from lcm_rt.bench.dialects import HttpPost, Message, WebSocket
from lcm_rt.bench.figures import Log
from lcm_rt.bench.observers import Counters, Processes, Server
from lcm_rt.bench.serve import Load, Refused, Target, measure, wait_ready
from lcm_rt.bench.surroundings import surroundings
from lcm_rt.errors import InputError, Unavailable

ROOT = Path(__file__).parents[1]


# Figures.


def log_of(sent_at: list[float], frames: list[tuple[float, int]], **others) -> Log:
    return Log("typing", sent_at=sent_at, frames=frames, **others)


def test_a_message_waits_for_the_first_frame_that_shows_it_or_a_newer_one():
    log = log_of([0.0, 1.0, 2.0, 3.0], [(0.5, 0), (2.5, 2)])
    assert figures.delays(log) == [0.5, 1.5, 0.5]  # the fourth was never shown
    assert figures.staleness(log) == [0.5, 0.5]
    assert figures.gaps(log) == [2.0]


def test_a_frame_is_overtaken_when_something_newer_was_due_before_it_came():
    log = log_of([0.0, 1.0, 2.0], [(0.5, 0), (2.2, 1), (2.6, 2)])
    assert figures.overtaken(log) == 1


def test_percentiles_are_of_the_nearest_rank():
    values = [number / 1000 for number in range(100)]
    assert figures.spread(reversed(values)) == {"p50": 50.0, "p95": 95.0, "p99": 99.0, "max": 99.0}
    assert figures.spread([0.25]) == {"p50": 250.0, "p95": 250.0, "p99": 250.0, "max": 250.0}
    assert figures.spread([]) is None


def test_fairness_is_of_what_each_got_for_what_it_sent():
    assert figures.jain([1, 1, 1, 1]) == 1.0
    assert figures.jain([1, 0, 0, 0]) == 0.25
    assert figures.jain([]) is None
    even = [log_of([0.0] * 4, [(1.0, 0)] * 2), log_of([0.0] * 8, [(1.0, 0)] * 4), log_of([], [])]
    assert figures.fairness(even) == 1.0


def test_a_group_of_clients_is_described_together():
    one = log_of([0.0, 1.0, 2.0], [(0.5, 0), (2.5, 2)], bytes_sent=10, bytes_received=100)
    two = log_of([0.0, 1.0], [(11.0, 0)], failed=1, bytes_sent=1, bytes_received=1)
    two.errors["overloaded"] += 1
    told = figures.describe([one, two], 0.0, 10.0)
    assert (told["sent"], told["frames"], told["superseded"], told["unshown"]) == (5, 3, 1, 1)
    assert told["frames_per_s"] == 0.2  # the third came after the end
    assert told["errors"] == {"overloaded": 1}
    assert (told["bytes_sent"], told["bytes_received"]) == (11, 101)
    assert told["input_to_frame_ms"]["max"] == 11000.0


def test_nothing_sent_is_described_too():
    told = figures.describe([Log("idle")], 0.0, 1.0)
    assert told["frames"] == 0 and told["overtaken"] is None and told["fairness"] is None


def test_a_round_trip_is_divided_by_the_servers_own_timings():
    timings = [{"total": 0.2, "queue": 0.05, "unet": 0.1}, {"total": 0.3, "unet": 0.2}]
    turns = figures.describe_turns([log_of([0.0, 1.0], [(0.25, 0), (1.35, 1)], timings=timings)])
    assert turns
    assert turns["round_trip_ms"]["max"] == 350.0
    assert (turns["engine_ms"]["p50"], turns["overhead_ms"]["max"]) == (300.0, 50.0)
    assert turns["stages_ms"]["queue"] == {"p50": 50.0, "p95": 50.0, "p99": 50.0, "max": 50.0}
    assert figures.describe_turns([log_of([0.0], [(0.25, 0)], timings=[{}])]) is None


METRICS = """
# TYPE lcm_rt_messages counter
lcm_rt_messages_total {messages}
# TYPE lcm_rt_superseded counter
lcm_rt_superseded_total 4
# TYPE lcm_rt_pictures counter
lcm_rt_pictures_total{{model="a",priority="realtime"}} {pictures}
lcm_rt_pictures_total{{model="b",priority="run"}} 1
# TYPE lcm_rt_batch_rows histogram
lcm_rt_batch_rows_bucket{{le="+Inf"}} {pictures}
lcm_rt_batch_rows_count {pictures}
lcm_rt_batch_rows_sum {rows}
# TYPE lcm_rt_errors counter
lcm_rt_errors_total{{code="out_of_memory"}} {errors}
lcm_rt_errors_total{{code="superseded"}} 3
# TYPE lcm_rt_cache_lookups counter
lcm_rt_cache_lookups_total{{cache="prompt",outcome="hit"}} {messages}
lcm_rt_cache_lookups_total{{cache="prompt",outcome="miss"}} {pictures}
# TYPE lcm_rt_forwards counter
lcm_rt_forwards_total{{way="graph"}} {rows}
"""


def test_wasted_work_is_pictures_that_nobody_got():
    before = figures.samples(METRICS.format(messages=10, pictures=8, rows=10, errors=0))
    after = figures.samples(METRICS.format(messages=40, pictures=28, rows=50, errors=2))
    told = figures.work(before, after, frames=15)
    assert (told["messages"], told["superseded"], told["pictures"]) == (30, 0, 20)
    assert (told["undelivered"], told["wasted"], told["rows_together"]) == (5, 0.25, 2.0)
    assert told["errors"] == {"out_of_memory": 2} and told["restarts"] == 0
    assert told["caches"] == {"prompt": {"hit": 30, "miss": 20}} and told["forwards"] == {"graph": 40}
    assert figures.work(after, after, frames=0)["wasted"] is None


# Traces.


@pytest.mark.parametrize("name", ["typing", "camera", "flood", "recorded"])
def test_a_trace_is_the_same_for_the_same_seed_and_in_order(name: str):
    trace = traces.find(name)
    keys = list(trace.keys(30.0, random.Random("1/0")))
    assert keys == list(trace.keys(30.0, random.Random("1/0"))) != list(trace.keys(30.0, random.Random("1/1")))
    times = [key.at for key in keys]
    assert times == sorted(times) and 0 <= times[0] and times[-1] < 30
    assert all(key.prompt and 0 <= key.seed < 2**31 + 10_000 for key in keys)


def test_people_type_at_their_pace_and_cameras_at_theirs():
    rng = random.Random(3)
    rate = len(list(traces.typing(2000.0, rng))) / 2000
    assert rate == pytest.approx(traces.KEYS_PER_S * traces.DUTY, rel=0.1)
    assert len(traces.camera(10.0, rng)) == 300
    assert len(traces.flood(2.0, rng)) == 200
    assert traces.idle(10.0, rng) == []


def test_a_recording_is_played_in_a_circle_from_a_random_point():
    recording = traces.Recording(10.0, (traces.Key(1.0, "a", 0), traces.Key(9.0, "b", 1)), "")
    starts = set()
    for seed in range(8):
        keys = recording(25.0, random.Random(seed))
        assert len(keys) in (4, 5, 6)
        assert {key.prompt for key in keys[::2]} == {keys[0].prompt} != {key.prompt for key in keys[1::2]}
        gaps = {round(after.at - before.at, 6) for before, after in zip(keys, keys[1:], strict=False)}
        assert gaps == {8.0, 2.0} and 0 <= keys[0].at <= 8 and 17 <= keys[-1].at < 25
        starts.add(keys[0].at)
    assert len(starts) == 8


def test_the_recording_that_ships_is_what_its_generator_writes():
    made = subprocess.check_output([sys.executable, str(ROOT / "benchmarks/typist.py")])
    assert made == traces.RECORDING.read_bytes()
    recording = traces.read(traces.RECORDING)
    assert recording.seconds == 120 and "synthetic" in recording.about
    texts = [key.prompt for key in recording.keys]
    assert any(len(after) < len(before) for before, after in zip(texts, texts[1:], strict=False))  # slips taken back


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "there are no messages"),
        ("nonsense", "line 1: "),
        ("[]", "line 1: should be an object"),
        ('{"seconds": 0}', "line 1: seconds should be a number"),
        ('{"seconds": true}', "line 1: seconds should be a number"),
        ('{"seconds": 5}\n{"at": 6, "prompt": "a"}', "line 2: at should be a number from 0 to 5"),
        ('{"seconds": 5}\n{"at": 3, "prompt": "a"}\n{"at": 2, "prompt": "a"}', "line 3: at should be a number from 3"),
        ('{"seconds": 5}\n{"at": 1}', "line 2: prompt should be text"),
        ('{"seconds": 5}\n{"at": 1, "prompt": "a", "seed": -1}', "line 2: seed should be"),
    ],
)
def test_a_faulty_recording_is_refused_by_its_line(tmp_path: Path, text: str, message: str):
    path = tmp_path / "trace.jsonl"
    path.write_text(text)
    with pytest.raises(InputError, match=message):
        traces.find(str(path))


def test_unknown_traces_and_files_are_named():
    with pytest.raises(InputError, match=r"recorded or a \.jsonl file, not 'walking'"):
        traces.find("walking")
    with pytest.raises(InputError, match=r"none\.jsonl: No such file"):
        traces.find("none.jsonl")


def test_no_two_pictures_are_the_same_file():
    sketch, other = traces.sketches(64)[:2]
    files = {sketch, other, traces.marked(sketch, "run/0/1"), traces.marked(sketch, "run/0/2")}
    assert len(files) == 4
    pixels = {Image.open(io.BytesIO(file)).tobytes() for file in files}
    assert len(pixels) == 2


@pytest.mark.parametrize("wrong", [{"sessions": 0}, {"seconds": 0.0}, {"seconds": float("nan")}, {"traces": ()}])
def test_a_load_that_makes_no_sense_is_refused(wrong: dict):
    with pytest.raises(InputError, match=next(iter(wrong))):
        Load(**wrong)


# Servers.


@run
async def test_a_second_of_people_and_cameras(tmp_path: Path):
    async with serving(tmp_path) as server:
        front = Server(server.http, None)
        await wait_ready(front, lambda words: None)
        assert (await front.model("fal-ai/lcm"))["size"] == 512
        heard: list[float] = []
        load = Load(traces=("flood", "camera"), sessions=4, seconds=0.6, warm_up=1, image_side=64)
        measured = await measure(
            WebSocket(f"ws://{server.host}/fal-ai/lcm/realtime"),
            load,
            observers=[await asyncio.to_thread(Processes, os.getpid()), Counters(front)],
            progress=lambda elapsed, logs: heard.append(elapsed),
        )
    report = measured.report()
    everyone, work = report["all"], report["work"]
    assert [client["trace"] for client in report["clients"]] == ["flood", "camera"] * 2
    assert (report["clients"][0]["sent"], report["clients"][1]["sent"]) == (60, 18)
    assert everyone["sent"] == 156 == everyone["frames"] + everyone["superseded"]
    assert everyone["errors"] == {} and everyone["unshown"] == 0
    assert work["messages"] == 156 and work["superseded"] == everyone["superseded"]
    assert work["pictures"] == everyone["frames"] and work["wasted"] == 0
    assert 0 < report["fairness"] <= 1 and set(report["traces"]) == {"flood", "camera"}
    assert report["picture"]["width"] == 64 and report["picture"]["content_type"] == "image/jpeg"
    assert len(report["server_processes"]) > 1 and report["server_processes"][0]["role"] == "front"
    assert all(process["rss_mb"] > 1 and process["fds"] for process in report["server_processes"])
    assert report["generator"]["late_ms"] and heard
    assert orjson.dumps(report)


@run
async def test_taking_turns_has_one_message_under_way(tmp_path: Path):
    async with serving(tmp_path) as server:
        url = f"ws://{server.host}/fal-ai/lcm/realtime"
        load = Load(traces=("single",), seconds=0.3, image_side=64)
        report = (await measure(WebSocket(url), load, observers=[Counters(Server(server.http, None))])).report()
        # Counted some moments later than its picture is told.
        assert report["work"]["caches"].get("canvas", {}).keys() <= {"miss"}
        assert report["all"]["sent"] == report["all"]["frames"] > 1
        assert report["single"]["overhead_ms"]["p50"] < report["single"]["round_trip_ms"]["p50"]
        silent = (await measure(WebSocket(url), Load(traces=("idle",), seconds=0.01, warm_up=0))).report()
        assert silent["all"]["sent"] == 0 and silent["fairness"] is None


@run
async def test_a_throttled_client_sends_its_newest_when_it_has_its_answer(tmp_path: Path):
    async with serving(tmp_path) as server:
        for dialect in (
            WebSocket(f"ws://{server.host}/fal-ai/lcm/realtime", throttled=True),
            WebSocket(f"ws://{server.host}/fal-ai/lcm/realtime", throttled=True, codec="json"),
            HttpPost(f"{server.http}/fal-ai/lcm"),
        ):
            before = server.metric("lcm_rt_superseded_total")
            report = (await measure(dialect, Load(traces=("flood",), seconds=0.3, image_side=64))).report()
            assert report["throttled"] and report["all"]["unshown"] == 0 and report["all"]["errors"] == {}
            assert report["all"]["frames"] + report["all"]["superseded"] == report["all"]["sent"] == 30
            assert server.metric("lcm_rt_superseded_total") == before


@asynccontextmanager
async def answering(handle: Callable[[ServerConnection], Awaitable[None]]) -> AsyncIterator[str]:
    """A WebSocket server of another kind."""
    async with serve(handle, "127.0.0.1", 0) as server:
        yield f"ws://127.0.0.1:{server.sockets[0].getsockname()[1]}/"


def saying(*answers: bytes | str | None) -> Callable[[ServerConnection], Awaitable[None]]:
    """Answers each message with the next of these, whatever it is; the last again and again, None by hanging up."""

    async def handle(socket: ServerConnection) -> None:
        left = itertools.chain(answers, itertools.repeat(answers[-1]))
        async for _ in socket:
            if (reply := next(left)) is None:
                return
            await socket.send(reply)

    return handle


PICTURE = msgpack.packb({"images": [{"content": b"jpeg"}]})


@run
async def test_answers_without_a_name_are_in_order():
    async with answering(saying(PICTURE, PICTURE, '{"error": "busy", "reason": "later"}', PICTURE)) as url:
        measured = await measure(WebSocket(url), Load(traces=("flood",), seconds=0.1, warm_up=1))
    (log,) = measured.logs
    assert [number for _, number in log.frames] == [0, *range(2, 10)]
    assert log.failed == 1 and log.errors == {"busy": 1} and log.reason == "later"
    assert log.picture == {"bytes": 4}


@run
async def test_answers_that_come_late_are_in_order_too():
    waiting: list[bytes] = []

    async def handle(socket: ServerConnection) -> None:
        async for frame in socket:
            waiting.append(frame)
            if len(waiting) == 5:
                for _ in waiting:
                    await socket.send(PICTURE)
                waiting.clear()

    async with answering(handle) as url:
        measured = await measure(WebSocket(url), Load(traces=("flood",), seconds=0.1, warm_up=0))
    (log,) = measured.logs
    assert [number for _, number in log.frames] == [*range(10)]
    due = [measured.begun_at + key.at for key in traces.flood(0.1, random.Random("1/0"))]
    assert log.sent_at == due  # whenever they were really sent


@run
async def test_a_throttled_client_waits_for_a_slow_server():
    async def handle(socket: ServerConnection) -> None:
        async for _ in socket:
            await asyncio.sleep(0.05)
            await socket.send(PICTURE)

    async with answering(handle) as url:
        measured = await measure(WebSocket(url, throttled=True), Load(traces=("flood",), seconds=0.3, warm_up=0))
    numbers = [number for _, number in measured.logs[0].frames]
    assert numbers == sorted(numbers) and len(numbers) < 30 and numbers[-1] == 29
    assert measured.report()["all"]["superseded"] == 30 - len(numbers)


@run
async def test_what_is_no_answer_is_an_error_and_no_hang():
    async with answering(saying(PICTURE, b"\xc1", b"\x93", msgpack.packb([1]), PICTURE)) as url:
        measured = await measure(WebSocket(url), Load(traces=("flood",), seconds=0.1, warm_up=1))
    assert measured.logs[0].errors == {"malformed": 3} and len(measured.logs[0].frames) == 7


@run
async def test_a_line_that_ends_is_counted():
    async with answering(saying(PICTURE, PICTURE, PICTURE, None)) as url:
        (log,) = (await measure(WebSocket(url), Load(traces=("flood",), seconds=0.2, warm_up=1))).logs
    assert log.errors == {"closed_1000": 1} and len(log.frames) == 2


@run
async def test_a_refused_warm_up_is_told():
    async with answering(saying('{"type": "x-fal-error", "error": "no", "reason": "not today"}')) as url:
        with pytest.raises(Refused, match="not today"):
            await measure(WebSocket(url), Load())


@run
async def test_a_server_that_is_not_there_is_told():
    for dialect in (WebSocket("ws://127.0.0.1:9/"), HttpPost("http://127.0.0.1:9/")):
        with pytest.raises((Unavailable, Refused)):
            await measure(dialect, Load())
    with pytest.raises(Unavailable, match="no answer from"):
        await Server("http://127.0.0.1:9", None).loading()


@run
async def test_counters_that_may_not_be_read_are_left_out(tmp_path: Path):
    async with serving(tmp_path, keys=True) as server:
        url = f"ws://{server.host}/fal-ai/lcm/realtime"
        observer = Counters(Server(server.http, await server.key()))  # no admin
        headers = {"authorization": f"Key {await server.key()}"}
        measured = await measure(
            WebSocket(url, headers=headers), Load(traces=("single",), seconds=0.1), observers=[observer]
        )
        assert measured.report()["work"] is None and measured.logs[0].frames


def test_messages_say_what_they_are_told_to():
    assert HttpPost("http://x/", body=lambda message: {"text": message.prompt})._body(Message("a", 1)) == {"text": "a"}


# The command.


def invoke(*words: str):
    app = typer.Typer()
    app.add_typer(bench, name="bench")
    return CliRunner().invoke(app, ["bench", *words])


def test_the_command_writes_a_report_and_plots(tmp_path: Path):
    pytest.importorskip("matplotlib")
    with serving_aside(tmp_path) as server:
        told = invoke(
            *("serve", server.http, "--trace", "flood", "--trace", "typing", "--sessions", "2", "--seconds", "0.5"),
            *("--image", "--steps", "2", "--size", "64", "--output", str(tmp_path / "report.json")),
            *("--plots", str(tmp_path / "plots")),
        )
    assert told.exit_code == 0, told.output
    assert "flood input to frame" in told.output and "the server made" in told.output
    report = json.loads((tmp_path / "report.json").read_bytes())
    assert report["server"]["device"] == "fake" and report["picture"]["num_inference_steps"] == 2
    assert {"date", "command", "revision", "machine", "versions"} <= set(report)
    for name in ("delays", "over-time", "clients"):
        assert (tmp_path / "plots" / f"{name}.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["serve", "http://127.0.0.1:9"], "no answer from http://127.0.0.1:9"),
        (["serve", "--sessions", "0"], "sessions: should be at least 1"),
        (["serve", "--pid", "99999999"], "pid: there is no process 99999999"),
        (["engine", "--rows", "1,x"], "is not a list of numbers"),
        (["engine", "--rows", "0"], "is not a list of numbers"),
    ],
)
def test_what_is_wrong_is_told_in_a_line(words: list[str], message: str):
    told = invoke(*words)
    assert told.exit_code == 1 and message in told.output and "Traceback" not in told.output


def test_what_is_missing_is_told_before_the_work(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(InputError, match=r"pip install 'lcm-rt\[bench\]'"):
        bench_serve.run(Target(url="http://127.0.0.1:9"), Load(), image=False, pid=None, output=None, plots=tmp_path)


def test_the_command_line_loads_nothing_heavy():
    code = "import sys, lcm_rt.bench.commands; print({'torch', 'numpy', 'rich', 'httpx2', 'asyncio'} & {*sys.modules})"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "set()"


def test_surroundings_say_where_a_figure_is_from():
    told = surroundings()
    assert told["machine"]["cores"] >= 1 and told["versions"]["python"].startswith("3.")
    assert orjson.dumps(told)

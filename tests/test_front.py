"""``benchmarks/front.py``: its engine, its client, its arithmetic, and a moment of the whole."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import msgpack
import orjson
import pytest

from lcm_rt.channel import Channel
from lcm_rt.wire import decode_frame, parse_input

SCRIPT = Path(__file__).parents[1] / "benchmarks/front.py"
sys.path.insert(0, str(SCRIPT.parent))

import front  # noqa: E402


def test_the_engine_answers_every_picture_at_once() -> None:
    ours, theirs = socket.socketpair()
    answering = threading.Thread(target=front.answer, args=(theirs, 1000))
    answering.start()
    channel = Channel(ours)
    channel.send({"models": [{"name": "m"}], "load": ["m"]})
    channel.send({"op": "ping"})
    channel.send({"op": "submit", "keys": [7, 8], "request": {"seed": 5, "model": "m", "num_inference_steps": 3}})
    messages = channel.receive()
    heard: list[dict[str, Any]] = [next(messages) for _ in range(7)]
    assert [message["op"] for message in heard] == ["loaded", "ready", "pong", "begun", "result", "begun", "result"]
    assert [message["key"] for message in heard[3:]] == [7, 7, 8, 8]
    assert [message["result"]["seed"] for message in heard[4::2]] == [5, 6]
    assert len(heard[4]["result"]["image"]) == 1000
    channel.close()
    ours.shutdown(socket.SHUT_RDWR)
    answering.join()
    ours.close()
    theirs.close()


@pytest.mark.parametrize("codec", ["msgpack", "json"])
def test_messages_are_what_the_server_takes_and_no_two_are_the_same(codec: str) -> None:
    sketch = bytes(range(200))
    message = front.Kind(codec, sketch).messages()
    first, second = (parse_input(decode_frame(message(number))) for number in (1, 2))
    assert (first.request_id, second.request_id) == (1, 2)
    assert first.seed != second.seed
    assert first.image_bytes == sketch if codec == "msgpack" else first.image_url is not None
    assert isinstance(message(1), str) == (codec == "json")


def test_an_answer_says_what_it_answers_and_an_error_ends_the_run() -> None:
    assert front.number_of(msgpack.packb({"images": [{"content": b"x"}], "request_id": 3})) == 3
    assert front.number_of(orjson.dumps({"images": [{"url": "data:,x"}], "request_id": 4}).decode()) == 4
    with pytest.raises(SystemExit, match="overloaded"):
        front.number_of('{"type": "x-fal-error", "error": "overloaded"}')


class Host:
    """Accepts one WebSocket without looking, and sends what it is told to."""

    def __init__(self) -> None:
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.port = self._listening.getsockname()[1]
        self._accepting = threading.Thread(target=self._accept)
        self._accepting.start()

    def _accept(self) -> None:
        self.socket, _ = self._listening.accept()
        while b"\r\n\r\n" not in self.socket.recv(4096):
            pass
        self.socket.sendall(b"HTTP/1.1 101 Switching Protocols\r\n\r\n")

    def close(self) -> None:
        self.socket.close()
        self._listening.close()

    def accepted(self) -> None:
        self._accepting.join()


def test_the_client_puts_frames_together_and_answers_pings() -> None:
    host = Host()
    client = front.Client(host.port)
    host.accepted()
    large = b"\x82\x7f" + (70_000).to_bytes(8) + bytes(70_000)
    frames = b"\x81\x02hi" + b"\x89\x01p" + b"\x82\x7e\x01\x00" + b"m" * 256 + large
    heard: list[bytes | str] = []
    for start, end in ((0, 1), (1, 3), (3, 10), (10, len(frames) - 1), (len(frames) - 1, len(frames))):
        host.socket.sendall(frames[start:end])
        heard += client.receive()
    while len(heard) < 3:
        heard += client.receive()
    assert heard == ["hi", b"m" * 256, bytes(70_000)]
    assert host.socket.recv(7) == b"\x8a\x81\0\0\0\0p"
    host.socket.sendall(b"\x88\x00")
    with pytest.raises(ConnectionError, match="0x88"):
        client.receive()
    host.close()
    client.close()


def test_figures_of_a_frame() -> None:
    figures = front.per_frame(frames=500, cpu_s=0.1, wall_s=0.5)
    assert figures == {
        "frames": 500,
        "cpu_us_per_frame": 200.0,
        "frames_per_core_s": 5000,
        "frames_per_s": 1000,
        "core_percent": 20.0,
    }


def test_processor_time_is_that_of_all_threads() -> None:
    def work() -> None:
        begun_at = time.thread_time()
        while time.thread_time() < begun_at + 0.1:
            pass

    before = front.cpu_seconds(os.getpid())
    worker = threading.Thread(target=lambda: (work(), done.set(), leave.wait()))
    done, leave = threading.Event(), threading.Event()
    worker.start()
    done.wait()
    used = front.cpu_seconds(os.getpid()) - before
    leave.set()
    worker.join()
    assert used >= 0.08  # it may be counted in ticks of 10 ms


def test_a_moment_of_everything(tmp_path: Path) -> None:
    report = tmp_path / "front.json"
    small = "--seconds 0.1 --frame-kb 200 --sketch-kb 1 --sessions 1 2 --rate 20 --idle 1 --idle-seconds 0.1".split()
    subprocess.run([sys.executable, SCRIPT, *small, "--output", report], check=True, stdout=subprocess.DEVNULL)
    figures = json.loads(report.read_bytes())
    assert [row["connections"] for row in figures["idle"]] == [1]
    assert len({row["kind"] for row in figures["saturation"]}) == 4
    assert [row["sessions"] for row in figures["saturation"]] == [1, 2] * 4
    for row in figures["saturation"] + figures["latency"]:
        assert row["frames"] > 0
        assert row["cpu_us_per_frame"] > 0
        assert row["round_trip_ms"]["p50"] <= row["round_trip_ms"]["max"]
    assert all(row["frames"] == row["sent"] == 4 for row in figures["latency"])
    assert figures["engine_turn_around_ms"]["p50"] > 0
    assert figures["machine"] and figures["command"]

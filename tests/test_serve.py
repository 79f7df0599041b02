"""The server as a process: signals, exit status, idleness."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from websockets.sync.client import connect

from lcm_rt.server.serve import listen


@contextmanager
def server(folder: Path, *words: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A server process and its address, as soon as it listens; the model may still be loading."""
    command = [sys.executable, "-m", "lcm_rt", "serve", "--port", "0", "--data-dir", str(folder), *words]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env={**os.environ, "COLUMNS": "200"}) as process:
        assert process.stderr
        try:
            line = process.stderr.readline()
            match = re.search(r"(http://\S+)/", line)
            assert match, line
            yield process, match[1]
        finally:
            process.kill()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_it_in_good_order_even_while_loading(tmp_path: Path, number: signal.Signals) -> None:
    with server(tmp_path) as (process, url):
        with urllib.request.urlopen(f"{url}/health/live") as answer:
            assert answer.status == 200
        with connect(url.replace("http", "ws") + "/fal-ai/lcm/realtime") as client:
            process.send_signal(number)
            assert process.wait(20) == 0
            assert client.protocol.close_rcvd is None or client.protocol.close_rcvd.code in (1000, 1001, 1012)


def test_a_model_that_cannot_be_loaded_ends_it(tmp_path: Path) -> None:
    (tmp_path / "model_index.json").write_text("{}")
    with server(tmp_path, "--model", f"broken={tmp_path}") as (process, _):
        assert process.stderr
        assert "holds no whole set of .safetensors weights" in process.stderr.read()
        assert process.wait(20) == 1


def test_small_answers_leave_at_once() -> None:
    with listen("127.0.0.1", 0) as end:
        assert end.proto == socket.IPPROTO_TCP  # what asyncio asks before it sets TCP_NODELAY

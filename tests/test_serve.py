"""The server as a process: signals, exit status, idleness."""

from __future__ import annotations

import asyncio
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
import uvicorn
from serving import run, until
from starlette.applications import Starlette
from starlette.routing import WebSocketRoute
from starlette.websockets import WebSocket
from websockets.asyncio.client import connect as aconnect
from websockets.sync.client import connect

from lcm_rt.server.serve import listen, uvicorn_config


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


@pytest.mark.parametrize(("size", "most"), [(1000, 200), (100_000, 8), (300_000, 1)])
@run
async def test_what_an_application_does_not_take_is_not_read(size: int, most: int) -> None:
    waiting: list[int] = []
    reading: list[bool] = []
    taken = asyncio.Event()

    async def hold(websocket: WebSocket) -> None:
        await websocket.accept()
        protocol = websocket._receive.__self__  # type: ignore[attr-defined]
        await until(lambda: protocol.read_paused)
        waiting.append(protocol.queue.qsize())
        reading.append(protocol.transport.is_reading())
        for number in range(40):
            assert len(await websocket.receive_bytes()) == size + number, "whole, and in order"
        taken.set()

    config = uvicorn_config(Starlette(routes=[WebSocketRoute("/", hold)]))
    with listen("127.0.0.1", 0) as end:
        host = uvicorn.Server(config)
        serving = asyncio.create_task(host._serve([end]))
        await until(lambda: host.started)
        async with aconnect(f"ws://127.0.0.1:{end.getsockname()[1]}/", compression=None) as client:
            for number in range(40):
                await client.send(bytes(size + number))
            await taken.wait()
        assert 1 <= waiting[0] <= most
        assert reading == [False]
        host.should_exit = True
        await serving

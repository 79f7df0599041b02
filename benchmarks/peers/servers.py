"""The servers that take part: how each is started, and how its clients talk to it.

Each runs alone while it is measured, for some of them are busy when nobody asks anything.
"""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx2

from benchmarks.peers.contestant import ROOT, Absent, environment
from benchmarks.peers.dialect import MotionJpeg
from benchmarks.peers.work import Work
from lcm_rt.bench.dialects import Closed, Dialect, HttpPost, Message, WebSocket
from lcm_rt.errors import Unavailable

READY_S = 300.0
STOP_S = 15.0

SERVERS: dict[str, tuple[str, Callable[[str], Dialect]]] = {
    "serial": ("benchmarks.peers.serial_server", MotionJpeg),
    "litserve": ("benchmarks.peers.litserve_server", lambda url: HttpPost(f"{url}/predict")),
    "ray serve": ("benchmarks.peers.ray_server", lambda url: HttpPost(f"{url}/")),
}
"""The peers: their module, and the dialect of their clients."""

NAMES = ("ours", *SERVERS)


@dataclass(frozen=True, slots=True)
class Server:
    """A server that is ready."""

    name: str
    dialect: Dialect
    start_s: float
    fields: Mapping[str, Any] = field(default_factory=dict)  # what its clients say beside prompt and seed


@contextmanager
def running(name: str, work: Work, *, dtype: str, python: str, cache: Path) -> Iterator[Server]:
    """Start ``name``, wait until it paints as fast as it will, and stop it at the end of the block.

    Args:
        dtype: of the peers' pipelines, as torch names it.
        python: the interpreter of the peers.
        cache: a folder that outlives the block, where ours keeps what it has compiled.

    Raises: Absent: it does not start; says why.
    """
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryFile("w+") as log:
        port = free_port()
        url = f"http://127.0.0.1:{port}"
        variables: dict[str, str] = {}
        if name == "ours":
            command = [sys.executable, "-m", "lcm_rt", "serve", "--port", str(port), "--device", work.device]
            command += ["--model", _model(work), "--no-safety", "--no-controlnet"]
            # People who type come back to the same first letters; to remember those pictures is not to paint faster.
            variables = {"LCM_RT_DATA_DIR": folder, "LCM_RT_CACHE_DIR": str(cache), "LCM_RT_REPEAT_MB": "0"}
            dialect: Dialect = WebSocket(f"ws://127.0.0.1:{port}/fal-ai/lcm/realtime")
            fields: dict[str, Any] = {"num_inference_steps": work.steps}
            if work.side:
                fields["image_size"] = {"width": work.side, "height": work.side}
        else:
            module, speak = SERVERS[name]
            command = [python, "-m", module, str(port), work.to_json(), dtype]
            dialect, fields = speak(url), {}
        began_at = time.perf_counter()
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env={**environment(work.threads), **variables},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
        try:
            while not (_is_tuned(url) if name == "ours" else asyncio.run(_paints(dialect))):
                if process.poll() is not None or time.perf_counter() - began_at > READY_S:
                    log.seek(0)
                    raise Absent(_why(log.read()))
                time.sleep(0.25)
            yield Server(name, dialect, round(time.perf_counter() - began_at, 1), fields)
        finally:
            stop(process)


def _model(work: Work) -> str:
    from lcm_rt.catalog import CATALOG

    return next((n for n, spec in CATALOG.items() if spec.source == str(work.folder)), f"peer={work.folder}")


def _is_tuned(url: str) -> bool:
    """Whether ours is loaded, and its networks run the way that they will from now on."""
    with suppress(httpx2.RequestError):
        models = httpx2.get(f"{url}/models", trust_env=False).json()["models"]
        return all(model["state"] == "ready" and model["tune_seconds"] is not None for model in models)
    return False


async def _paints(dialect: Dialect) -> bool:
    """Whether a server answers one message with a picture."""
    with suppress(Unavailable, Closed):
        line = await dialect.connect()
        try:
            await line.send(0, Message("a lake", 0))
            return (await line.receive()).kind == "picture"
        finally:
            await line.close()
    return False


def _why(log: str) -> str:
    """What a process that did not start said last, if that was not that a package is missing."""
    lines = [line.strip() for line in log.splitlines() if line.strip()] or ["it said nothing"]
    missing = [line.rpartition(" ")[2].strip("'") for line in lines if line.startswith("ModuleNotFoundError")]
    return f"{missing[-1]} is not installed" if missing else f"it did not start: {lines[-1][:300]}"


def free_port() -> int:
    with socket.socket() as end:
        end.bind(("127.0.0.1", 0))
        port: int = end.getsockname()[1]
        return port


def stop(process: subprocess.Popen[Any]) -> None:
    """End a process that leads a session of its own, and what it started."""
    with suppress(ProcessLookupError):
        process.terminate()
    try:
        process.wait(STOP_S)
    except subprocess.TimeoutExpired:
        pass
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()

"""What is looked at beside the clients while a server is measured: its counters, and its processes."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Protocol

import httpx2
import orjson

from lcm_rt.bench import figures
from lcm_rt.bench.dialects import verify
from lcm_rt.errors import InputError, LcmError, Unavailable

if TYPE_CHECKING:
    import psutil


class Observer(Protocol):
    """Called when the clock starts, and when every answer is there."""

    name: str
    """Of its part of the report."""

    async def begin(self) -> None: ...

    async def end(self, logs: list[figures.Log]) -> Any:
        """Its part of the report, as JSON has it."""
        ...


class Server:
    """An lcm-rt server, asked over HTTP.

    Args:
        url: where it is. key: an API key, if it asks for one; one with the scope ``admin`` may read its counters.
    """

    def __init__(self, url: str, key: str | None) -> None:
        self._url = url.rstrip("/")
        self._verify = verify(url)
        self.headers = {"authorization": f"Key {key}"} if key else {}

    async def _get(self, path: str) -> httpx2.Response:
        try:
            async with httpx2.AsyncClient(headers=self.headers, verify=self._verify, timeout=30) as client:
                return await client.get(self._url + path)
        except (httpx2.RequestError, httpx2.InvalidURL) as error:
            raise Unavailable(f"no answer from {self._url}: {str(error) or type(error).__name__}") from None

    async def _ask(self, path: str) -> Any:
        response = await self._get(path)
        try:
            return orjson.loads(response.content)
        except orjson.JSONDecodeError:
            raise Unavailable(f"{self._url} is no lcm-rt server: it has no {path}") from None

    async def loading(self) -> str | None:
        """What it is about while it is not ready, else None. Raises: Unavailable: no server, or it has failed."""
        health = await self._ask("/health")
        match health:
            case {"status": "ready"}:
                return None
            case {"status": "loading", "stage": stage}:
                return str(stage)
        raise Unavailable(f"{self._url} is not ready: {health}")

    async def model(self, app: str) -> dict[str, Any]:
        """What answers ``app``: ``name``, ``size`` in px, ``device``. Raises: Unavailable."""
        told = await self._ask("/models")
        try:
            models = {model["name"]: model for model in told["models"]}
            chosen = models.get(app) or next(model for model in models.values() if model["default"])
            return {"name": chosen["name"], "size": chosen["size"], "device": told["device"]}
        except (LookupError, TypeError, StopIteration):
            raise Unavailable(f"{self._url} is no lcm-rt server: it has no list of models") from None

    async def samples(self) -> figures.Samples | None:
        """What it has counted; None where it does not say, or not to us."""
        try:
            response = await self._get("/metrics")
        except LcmError:
            return None
        return figures.samples(response.text) if response.status_code == 200 else None


class Counters:
    """What an lcm-rt server did meanwhile, by ``/metrics``: nobody else may use it."""

    name = "work"

    def __init__(self, server: Server) -> None:
        self._server = server
        self._before: figures.Samples | None = None

    async def begin(self) -> None:
        self._before = await self._server.samples()

    async def end(self, logs: list[figures.Log]) -> dict[str, Any] | None:
        after = await self._server.samples()
        if self._before is None or after is None:
            return None
        return figures.work(self._before, after, sum(len(log.frames) for log in logs))


class Processes:
    """Processor time and memory of a process and of all below it.

    Args:
        pid: of an lcm-rt server's front, or of any other.

    Raises: InputError: there is no such process, or psutil is not installed.
    """

    name = "server_processes"

    def __init__(self, pid: int) -> None:
        try:
            import psutil
        except ImportError:
            raise InputError("pid", "needs psutil: pip install 'lcm-rt[bench]'") from None
        self._psutil = psutil
        try:
            self._front = psutil.Process(pid)
        except psutil.NoSuchProcess:
            raise InputError("pid", f"there is no process {pid}") from None
        self._begun_at = 0.0
        self._before: Mapping[int, float] = {}

    def all(self) -> list[tuple[str, psutil.Process]]:
        """Those that live, each with its role: front, engine or other."""
        found = [("front", self._front)]
        for process in self._front.children(recursive=True):
            try:
                is_engine = "lcm_rt.worker" in process.cmdline()
            except self._psutil.Error:
                continue  # gone meanwhile
            found.append(("engine" if is_engine else "other", process))
        return found

    def _used(self) -> dict[int, float]:
        """Seconds of processor time by process id."""
        used = {}
        for _, process in self.all():
            try:
                times = process.cpu_times()
            except self._psutil.Error:
                continue
            used[process.pid] = times.user + times.system
        return used

    async def begin(self) -> None:
        self._begun_at, self._before = time.perf_counter(), await asyncio.to_thread(self._used)

    async def end(self, logs: list[figures.Log]) -> list[dict[str, Any]]:
        """Of each process its role, CPU in percent of one core since the start, and resident memory now."""
        return await asyncio.to_thread(self._describe)

    def _describe(self) -> list[dict[str, Any]]:
        seconds = time.perf_counter() - self._begun_at
        roles, used = {process.pid: role for role, process in self.all()}, self._used()
        return [
            {
                "role": roles.get(pid, "other"),
                "pid": pid,
                "cpu_percent": round(100 * (time_s - self._before.get(pid, 0.0)) / seconds, 2),
                **self.memory(pid),
            }
            for pid, time_s in used.items()
        ]

    def memory(self, pid: int) -> dict[str, Any]:
        """What it takes now; empty if it is gone.

        ``rss_mb`` is resident; ``pss_mb`` counts shared pages by their share, ``private_mb`` no files at all, so that
        nobody else's coming and going is in it (both on Linux only, elsewhere RSS). ``fds``, ``threads``.
        """
        try:
            process = self._psutil.Process(pid)
            with process.oneshot():
                memory = process.memory_full_info()
                return {
                    "rss_mb": round(memory.rss / 2**20, 2),
                    "pss_mb": round(getattr(memory, "pss", memory.rss) / 2**20, 2),
                    "private_mb": round((memory.rss - getattr(memory, "shared", 0)) / 2**20, 2),
                    "fds": process.num_fds() if os.name == "posix" else process.num_handles(),
                    "threads": process.num_threads(),
                }
        except self._psutil.Error:
            return {}

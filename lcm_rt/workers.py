"""The engine processes seen from the front: spawn, watch, restart, submit, drop; knows no torch and no HTTP."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import itertools
import logging
import socket
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from lcm_rt import catalog
from lcm_rt.channel import AsyncChannel, Message
from lcm_rt.errors import EngineLost, LcmError, ModelLoading, Overloaded, Unavailable, from_wire, renewed
from lcm_rt.metrics import Metrics
from lcm_rt.types import GenerateRequest, GenerateResult, Preview

logger = logging.getLogger(__name__)

FIRST_RESTART_S = 0.1
LAST_RESTART_S = 10.0
PING_S = 5.0
MAX_DEATHS = 2  # of engine processes in a row while they load the same model
MAX_PENDING_BYTES = 512 * 2**20  # of pictures in requests that are not realtime
STOP_S = 5.0

_REQUEST = [field.name for field in dataclasses.fields(GenerateRequest)]  # dataclasses.asdict would copy pictures

State = Literal["loading", "ready", "unloading", "unloaded", "failed"]


@dataclass(slots=True)
class ModelState:
    """How far a model is; ``progress`` is 0 to 1 within ``stage``, ``failure`` says why it cannot be loaded."""

    spec: catalog.ModelSpec
    size: int  # px of a picture whose size nobody gave
    steps: int  # when nobody gave a number
    safety: bool | None = None  # has a safety checker; not known before it is loaded
    controlnet: bool | None = None  # has an inpainting ControlNet
    state: State = "loading"
    stage: str = "start"
    progress: float = 0.0
    load_seconds: float | None = None
    loads: int = 0  # how often it has become ready: what a model of this name paints may change from one to the next
    backend: str = "eager"  # how its networks run by now
    tune_seconds: float | None = None  # until they ran so
    failure: LcmError | None = None
    deaths: int = 0  # of engine processes while they loaded it
    then: Literal["load", "unload"] | None = None  # what was asked for while it could not be done

    def become(self, state: State) -> None:
        self.state, self.stage, self.failure = state, "start" if state == "loading" else state, None
        self.progress = 1.0 if state == "ready" else 0.0


@dataclass(eq=False, slots=True)
class Generation:
    """One request at the engine. ``result`` is a future of a ``GenerateResult``, or of an ``LcmError``."""

    key: int
    request: GenerateRequest = field(repr=False)
    result: asyncio.Future[GenerateResult]
    on_begun: Callable[[], None] | None
    on_preview: Callable[[Preview], None] | None
    begun: bool
    _drop: Callable[[int, bool], None] = field(repr=False)

    def supersede(self) -> None:
        """Drop it unless it has begun; then ``result`` raises Superseded."""
        self._drop(self.key, False)

    def cancel(self) -> None:
        """Drop it wherever it is: nobody waits for it."""
        self._drop(self.key, True)


class Workers:
    """The engine process of one device, kept alive.

    Args:
        models: rows to load, in order; the first is the default.
        choice: which companions of the models are wanted.
        memory_mb: what the models may take of the device's memory, None for most of it.
        hang_timeout_s: an engine that has work but makes no progress for so long is killed.
    """

    def __init__(
        self,
        models: list[catalog.ModelSpec],
        *,
        device: str,
        backend: str,
        cache_dir: Path,
        threads: int | None,
        choice: catalog.Choice,
        memory_mb: int | None,
        max_rows: int,
        max_pending: int,
        hang_timeout_s: float,
        metrics: Metrics,
    ) -> None:
        self.models = {spec.name: ModelState(spec, spec.size, spec.steps) for spec in models}
        self.device_name: str | None = None
        self.failure: LcmError | None = None
        self.pid: int | None = None
        self.changes = 0  # of a model's state, or of how far it is
        self._changed = asyncio.Event()
        self._start: Message = {
            "models": [dataclasses.asdict(spec) for spec in models],
            "engine": {
                "device": device,
                "backend": backend,
                "cache_dir": str(cache_dir),
                "threads": threads,
                "choice": dataclasses.asdict(choice),
                "memory_bytes": None if memory_mb is None else memory_mb * 2**20,
            },
            "max_rows": max_rows,
        }
        self._max_pending = max_pending
        self._hang_timeout_s = hang_timeout_s
        self._metrics = metrics
        self.command: tuple[str, ...] = (sys.executable, "-m", "lcm_rt.worker")
        self._channel: AsyncChannel | None = None
        self._ready = asyncio.Event()
        self._readied = 0  # how often an engine process has become ready
        self._pending: dict[int, Generation] = {}
        metrics.pending.set_function(lambda: len(self._pending))
        self._keys = itertools.count(1)
        self._turns = 0

    @property
    def is_ready(self) -> bool:
        """The engine has loaded every model that is to be there from the start, and run each once."""
        return self._ready.is_set() and self.failure is None

    async def wait_ready(self) -> None:
        """Wait until requests are answered. Raises: LcmError if the engine cannot ever start."""
        await self._ready.wait()
        if self.failure:
            raise renewed(self.failure)

    async def wait_change(self, seen: int) -> None:
        """Wait until ``changes`` is not ``seen`` any more."""
        while self.changes == seen:
            await self._changed.wait()

    async def wait_model(self, name: str) -> None:
        """Wait until a model answers, which loads it if need be. Raises: LcmError: it cannot be loaded."""
        model = self.models[name]
        while model.state != "ready":
            if model.failure:
                raise renewed(model.failure)
            self.load(name)
            await self.wait_change(self.changes)

    def load(self, name: str) -> None:
        """Have a model loaded, unless it is or is on its way; the ones longest unused make room.

        Raises: LcmError: there can be no engine.
        """
        if self.failure:
            raise renewed(self.failure)
        model = self.models[name]
        model.then = "load" if model.state == "unloading" else None
        if model.state in ("unloaded", "failed"):
            model.become("loading")
            if self._channel:
                self._channel.send({"op": "load", "model": name})
            self._change()

    def require(self, name: str) -> AsyncChannel:
        """The way to a model that answers; one that is not loaded is loaded from here on.

        Raises:
            ModelLoading: the model is not ready yet. LcmError: it cannot be loaded, unless ``load`` tries it again.
        """
        model = self.models[name]
        if model.failure:
            raise renewed(model.failure)
        if self.failure or model.state != "ready" or self._channel is None:
            self.load(name)
            raise ModelLoading(f"the model is loading ({name}: {model.stage} {model.progress:.0%})")
        return self._channel

    def unload(self, name: str) -> None:
        """Have a model unloaded once its pictures under way are done; a request for it loads it again."""
        model = self.models[name]
        model.then = "unload" if model.state == "loading" else None
        if model.state == "ready" and self._channel:
            model.become("unloading")
            self._channel.send({"op": "unload", "model": name})
            self._change()

    def submit(
        self,
        request: GenerateRequest,
        on_begun: Callable[[], None] | None = None,
        on_preview: Callable[[Preview], None] | None = None,
        *,
        count: int = 1,
    ) -> list[Generation]:
        """Hand a request to the engine process, for ``count`` pictures with the seeds that follow.

        Raises: as ``require``; Overloaded: too many are pending.
        """
        channel = self.require(request.model)
        # Realtime is bounded by its sessions; a flood of other requests must not cost a typist the newest message.
        if request.priority != "realtime":
            size = len(request.image or b"") + len(request.mask or b"")
            if len(self._pending) >= self._max_pending or self._pending_bytes + size > MAX_PENDING_BYTES:
                raise Overloaded(f"{len(self._pending)} requests are waiting already; try again soon")
        fields = {name: getattr(request, name) for name in _REQUEST}
        loop = asyncio.get_running_loop()
        made = [
            Generation(next(self._keys), request, loop.create_future(), on_begun, on_preview, False, self._drop)
            for _ in range(count)
        ]
        self._pending |= {generation.key: generation for generation in made}
        channel.send({"op": "submit", "keys": [generation.key for generation in made], "request": fields})
        return made

    @property
    def _pending_bytes(self) -> int:
        """Of the pictures that wait; those of one request are the same bytes."""
        requests = {id(generation.request): generation.request for generation in self._pending.values()}
        return sum(len(request.image or b"") + len(request.mask or b"") for request in requests.values())

    @property
    def stage(self) -> str:
        """The load stage of the first model that is on its way, in words."""
        for name, model in self.models.items():
            if model.state == "loading":
                return f"{name}: {model.stage} {model.progress:.0%}"
        return "ready"

    async def run(self) -> None:
        """Keep the engine process alive until cancelled; then end it."""
        pause = FIRST_RESTART_S
        while True:
            begun_at, readied = time.monotonic(), self._readied
            status: int | None = None
            try:
                status = await self._live_once()
            except Exception:
                logger.exception("no engine process can be had")
            if self.failure:
                return
            lived = time.monotonic() - begun_at
            if self._readied > readied:  # it could be loaded; only one that cannot is tried ever more slowly
                pause = FIRST_RESTART_S
            logger.error("the engine process ended with status %s after %.1f s; again in %.1f s", status, lived, pause)
            self._metrics.restarts.inc()
            await asyncio.sleep(pause)
            pause = min(pause * 2, LAST_RESTART_S)

    async def _live_once(self) -> int | None:
        """Spawn one engine process and serve its messages until it is gone."""
        ours, theirs = socket.socketpair()
        with theirs:
            process = await asyncio.create_subprocess_exec(
                *self.command, str(theirs.fileno()), pass_fds=(theirs.fileno(),)
            )
        self.pid = process.pid
        try:
            async with asyncio.TaskGroup() as tasks:
                self._channel = channel = await AsyncChannel.open(ours, self._handle)
                wanted = [name for name, model in self.models.items() if model.state == "loading"]
                channel.send(self._start | {"load": wanted, "strict": not self._readied})
                watch = tasks.create_task(self._watch(process, channel))
                await channel.wait_closed()
                watch.cancel()
        finally:
            if self._channel:
                self._channel.close()
            self._lose()
            await _end(process)
        return process.returncode

    def _lose(self) -> None:
        """The engine is gone: every pending request ends in a retryable error."""
        self._channel = None
        self.pid = None
        if not self.failure:
            self._ready.clear()
        self._metrics.ready.set(0)
        for model in self.models.values():
            if model.state == "loading" and model.stage in ("weights", "compile", "warm-up"):
                model.deaths += 1
            if model.deaths >= MAX_DEATHS and len(self.models) > 1:  # the others shall not die with it for ever
                model.become("failed")
                model.failure = Unavailable(f"{model.spec.name}: the engine process ended each time it was loaded")
            elif model.state in ("ready", "loading"):
                model.become("loading")
            elif model.state == "unloading":
                model.become("unloaded")
        pending, self._pending = self._pending, {}
        alone = len({id(generation.request) for generation in pending.values()}) == 1
        for generation in pending.values():
            if not generation.result.done():
                error = EngineLost("the engine process ended; it is being started again")
                error.alone = alone
                generation.result.set_exception(error)
        self._change()

    def _change(self) -> None:
        self.changes += 1
        self._changed.set()
        self._changed = asyncio.Event()

    async def _watch(self, process: asyncio.subprocess.Process, channel: AsyncChannel) -> None:
        """Kill an engine that has work but makes no progress."""
        turns, moved_at = -1, time.monotonic()
        while True:
            await asyncio.sleep(PING_S)
            if not self._pending:
                turns, moved_at = -1, time.monotonic()
                continue
            channel.send({"op": "ping"})
            if self._turns != turns:
                turns, moved_at = self._turns, time.monotonic()
            elif time.monotonic() - moved_at > self._hang_timeout_s:
                logger.error("the engine made no progress for %.0f s: killing it", self._hang_timeout_s)
                process.kill()
                return

    def _drop(self, key: int, running: bool) -> None:
        if self._channel and key in self._pending:
            self._channel.send({"op": "drop", "key": key, "running": running})

    def _handle(self, message: Message) -> None:
        match message["op"]:
            case "begun":
                if generation := self._pending.get(message["key"]):
                    generation.begun = True
                    if generation.on_begun:
                        generation.on_begun()
            case "preview":
                generation = self._pending.get(message["key"])
                if generation and generation.on_preview:
                    generation.on_preview(Preview(**message["preview"]))
            case "result":
                self._settle(message["key"], GenerateResult(**message["result"]))
            case "error":
                self._settle(message["key"], from_wire(message["error"]))
            case "pong":
                self._turns = message["turns"]
            case "counted":
                self._metrics.add(message["counts"])
            case _:
                self._handle_load(message)
                self._change()

    def _settle(self, key: int, outcome: GenerateResult | LcmError) -> None:
        generation = self._pending.pop(key, None)
        if generation is None or generation.result.done():
            return
        if isinstance(outcome, LcmError):
            generation.result.set_exception(outcome)
        else:
            generation.result.set_result(outcome)

    def _handle_load(self, message: Message) -> None:
        match message["op"]:
            case "device":
                self.device_name = message["name"]
            case "stage":
                model = self.models[message["model"]]
                model.stage, model.progress = message["stage"], message["progress"]
            case "loaded":
                model = self.models[message["model"]]
                model.become("ready")
                model.loads += 1
                model.deaths = 0
                model.load_seconds, model.tune_seconds = message["seconds"], None
                model.backend = "eager"
                for name, value in message["traits"].items():
                    setattr(model, name, value)
                self._metrics.model_bytes.set(message["memory"])
                if model.then == "unload":
                    self.unload(message["model"])
            case "tuned":
                model = self.models[message["model"]]
                model.backend, model.tune_seconds = message["backend"], message["seconds"]
            case "leaving":
                self.models[message["model"]].become("unloading")
            case "unloaded":
                model = self.models[message["model"]]
                model.become("unloaded")
                self._metrics.model_bytes.set(message["memory"])
                if model.then == "load":
                    self.load(message["model"])
            case "failed":
                model = self.models[message["model"]]
                model.become("failed")
                model.failure = from_wire(message["error"])
                logger.error("%s cannot be loaded: %s", message["model"], model.failure)
            case "ready":
                self._readied += 1
                self._ready.set()
                self._metrics.ready.set(1)
            case "broken" if self._readied:
                # It worked before: perhaps the memory of the process that died is not free yet. Its exit restarts it.
                logger.error("the engine could not come back: %s", from_wire(message["error"]))
            case "broken":
                self.failure = Unavailable(str(from_wire(message["error"])))
                logger.error("the engine cannot start: %s", self.failure)
                for model in self.models.values():
                    if model.state != "ready":
                        model.become("failed")
                self._ready.set()

    def describe(self) -> list[dict[str, Any]]:
        """The models with their state, as plain data."""
        default = next(iter(self.models))
        return [
            {
                "name": name,
                "state": model.state,
                "stage": model.stage,
                "progress": model.progress,
                "size": model.size,
                "steps": model.steps,
                "safety": model.safety,
                "controlnet": model.controlnet,
                "licence": model.spec.licence,
                "default": name == default,
                "load_seconds": model.load_seconds,
                "backend": model.backend,
                "tune_seconds": model.tune_seconds,
                "error": None if model.failure is None else str(model.failure),
            }
            for name, model in self.models.items()
        ]


async def _end(process: asyncio.subprocess.Process) -> None:
    """Wait for a process whose channel is closed, which ends it; one that hangs is killed."""
    try:
        async with asyncio.timeout(STOP_S):
            await process.wait()
    except TimeoutError:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.wait()

"""The engine process: one loop over decoded requests, with pools for decoding, encoding and loading beside it.

Knows the engine's verbs and the scheduler's, but no HTTP, no client and no session. Started by ``workers`` as
``python -m lcm_rt.worker FD``, where FD is its end of a socket pair; it lives as long as the other end is open.
"""

from __future__ import annotations

import logging
import os
import queue
import signal
import socket
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, NoReturn

from lcm_rt.cache import Counts, Gains
from lcm_rt.catalog import Choice, ModelSpec
from lcm_rt.channel import Channel, Message
from lcm_rt.errors import (
    Cancelled,
    GenerationFailed,
    LcmError,
    ModelLoading,
    OutOfMemory,
    Superseded,
    Unavailable,
    to_wire,
)
from lcm_rt.images import Canvas, Canvases, encode_picture
from lcm_rt.scheduler import Scheduler
from lcm_rt.steptable import StepTable
from lcm_rt.types import GenerateRequest

if TYPE_CHECKING:
    from lcm_rt.engine.adapters import Adapter
    from lcm_rt.engine.engine import Engine, Picture
    from lcm_rt.engine.trajectory import Bucket, Trajectory
    from lcm_rt.hub import Parts

logger = logging.getLogger(__name__)

EXIT_STICKY = 70
"""Exit status after a CUDA error that poisons every later call of the process (CUDA runtime API, error handling)."""

ENVIRONMENT = {"GOMP_SPINCOUNT": "300"}
"""Of an engine process, read when torch is imported. Threads of OpenMP spin while they wait for each other. For long,
they take the cores from the front, from the pools and from each other, and a step takes seconds on a busy machine; not
at all, and it takes half as long again on a quiet one. docs/architecture.md has the figures."""

_STICKY = (
    "illegal memory access",
    "device-side assert",
    "launch failure",
    "misaligned address",
    "ECC error",
    "hardware stack error",
    "invalid program counter",
)


@dataclass(slots=True)
class Ticket:
    """A decoded request on its way from the decode pool to the engine."""

    key: int
    request: GenerateRequest
    bucket: Bucket
    canvas: Canvas
    adapter: Adapter | None
    received_at: float
    timings: dict[str, float] = field(default_factory=dict)
    batch: int = 0
    shown: Future[None] | None = None  # its last preview, which leaves before its result

    @property
    def area(self) -> int:
        return self.bucket.area


@dataclass(slots=True)
class Undecoded:
    """A request whose pictures or LoRA could not be read."""

    key: int
    error: Exception


@dataclass(slots=True)
class Room:
    """The loader needs ``size`` bytes of the device's memory, and waits until ``made``."""

    size: int
    made: threading.Event = field(default_factory=threading.Event)


Pictures = Callable[[], "list[Picture | LcmError]"]
"""Waits until they are made; may be asked by several."""

STAY_S = 3.0
"""How long a model that was loaded stays, however many others want its room: else nobody would get a picture."""


def _file(ticket: Ticket, picture: Picture) -> dict[str, Any]:
    """The picture as its client gets it: pasted into what was to be kept, unless it was flagged."""
    request, pixels = ticket.request, picture.pixels
    if ticket.canvas.overlay and not picture.flagged:
        pixels = ticket.canvas.overlay.paste(pixels)
    image, content_type = encode_picture(pixels, request.format, request.quality)
    height, width = pixels.shape[:2]
    return {"image": image, "content_type": content_type, "width": width, "height": height, "seed": request.seed}


class Worker:
    """The loop. Only its own thread steps the engine and touches the scheduler; pools hand results to the inbox."""

    def __init__(self, engine: Engine, channel: Channel, specs: list[ModelSpec], max_rows: int) -> None:
        self.turns = 0
        self._engine = engine
        self._channel = channel
        self._specs = {spec.name: spec for spec in specs}
        self._table = StepTable()
        counts: Counts = Counter()
        self._gains = Gains(counts)
        self._canvases = Canvases(counts)
        self._scheduler: Scheduler[Ticket, Trajectory] = Scheduler(max_rows, engine.max_area, self._table)
        self._inbox: queue.SimpleQueue[Message | Ticket | Undecoded | Room] = queue.SimpleQueue()
        self._decoding: set[int] = set()
        self._tickets: dict[int, Ticket] = {}
        self._rooms: list[Room] = []
        self._leaving: set[str] = set()  # models that begin nothing any more
        self._loaded_at: dict[str, float] = {}
        self._decoders = ThreadPoolExecutor(2, "decode")
        self._readers = ThreadPoolExecutor(1, "lora")  # they may be large, and pictures shall not wait for them
        self._encoders = ThreadPoolExecutor(2, "encode")
        self._finders = ThreadPoolExecutor(2, "find")  # they may download for hours, and other models shall not wait
        self._loader = ThreadPoolExecutor(1, "load")
        self._tuner = ThreadPoolExecutor(1, "tune")  # it may take minutes, and other models shall not wait
        self._tuning: set[tuple[str, tuple[int, int] | None]] = set()

    def post(self, message: Message) -> None:
        """Hand a message of the front to the loop, from any thread."""
        self._inbox.put(message)

    def run(self) -> None:
        """Serve for as long as the process lives."""
        scheduler, engine = self._scheduler, self._engine
        while True:
            engine.wait_turn()
            self._drain()
            self.turns += 1
            self._make_room()
            for ticket in scheduler.admit(time.perf_counter()):
                if row := self._begin(ticket):
                    scheduler.start(row)
            batch = scheduler.schedule()
            if not batch:
                continue
            stepped = self._step(batch)
            if done := scheduler.retire(stepped):
                self._deliver(done, engine.begin_finish(done))
            if shown := [row for row in stepped if self._wants_preview(row)]:
                self._show(shown, engine.preview(shown))
            self._improve()

    def _drain(self) -> None:
        """Take in what has come; wait for it only when there is nothing else to do."""
        block = self._scheduler.idle and not self._leaving
        timeout = STAY_S / 10 if self._rooms else None  # then a model may go by and by, and nobody will say so
        while True:
            try:
                message = self._inbox.get(block, timeout)
            except queue.Empty:
                return
            block = False
            if isinstance(message, Ticket | Undecoded):
                if message.key not in self._decoding:
                    continue  # dropped meanwhile
                self._decoding.remove(message.key)
                if isinstance(message, Ticket):
                    self._scheduler.add(message)
                else:
                    self._fail(message.key, message.error)
            elif isinstance(message, Room):
                self._rooms.append(message)
            elif message["op"] == "submit":
                self._submit(message["keys"], message["request"])
            elif message["op"] == "drop":
                self._drop(message["key"], running=message["running"])
            elif message["op"] == "load":
                self._finders.submit(self._load, self._specs[message["model"]])
            elif message["op"] == "unload":
                self._leave(message["model"])

    def _submit(self, keys: Sequence[int], fields: dict[str, Any]) -> None:
        """Take in one request for as many pictures as there are keys, with the seeds that follow."""
        self._decoding.update(keys)
        received_at = time.perf_counter()
        if fields["lora"] is not None:
            self._readers.submit(self._decode, keys, fields, received_at)
        elif fields["image"] is not None or fields["mask"] is not None:
            self._decoders.submit(self._decode, keys, fields, received_at)
        else:
            self._decode(keys, fields, received_at)

    def _decode(self, keys: Sequence[int], fields: dict[str, Any], received_at: float) -> None:
        if self._decoding.isdisjoint(keys):
            return  # dropped while it waited for its turn: a fast client must not pile up work that nobody wants
        try:
            size = fields.pop("size")
            request = GenerateRequest(**fields, size=tuple(size) if size else None)
            begun_at = time.perf_counter()
            canvas = self._canvases.read(request, self._engine.traits(request.model).size)
            bucket = self._engine.bucket(request, canvas)
            adapter = self._engine.adapter(request)
            seconds = time.perf_counter() - begun_at
        except Exception as error:  # noqa: BLE001  a hostile picture must not end the loop
            for key in keys:
                self._inbox.put(Undecoded(key, error))
            return
        request = replace(request, image=None, mask=None)  # their bytes are not needed any more
        for number, key in enumerate(keys):
            session = None if request.session is None else f"{request.session}.{number}"
            one = replace(request, seed=request.seed + number, session=session)
            self._inbox.put(Ticket(key, one, bucket, canvas, adapter, received_at, {"decode": seconds}))

    def _drop(self, key: int, *, running: bool) -> None:
        """A newer message came (then only what has not begun goes), or the client left."""
        if key in self._decoding or self._scheduler.drop(key, running=running):
            self._decoding.discard(key)
            self._tickets.pop(key, None)
            self._fail(key, Cancelled("the client left") if running else Superseded("a newer message came"))

    def _begin(self, ticket: Ticket) -> Trajectory | None:
        ticket.timings["queue"] = time.perf_counter() - ticket.received_at - ticket.timings["decode"]
        self._channel.send({"op": "begun", "key": ticket.key})
        try:
            if ticket.request.model in self._leaving:
                raise ModelLoading(f"model {ticket.request.model!r} is being unloaded")
            row = self._engine.begin(ticket.key, ticket.request, ticket.canvas, ticket.adapter)
        except Exception as error:  # noqa: BLE001  one request's failure is its own
            self._fail(ticket.key, error)
            return None
        self._tickets[ticket.key] = ticket
        return row

    def _step(self, batch: list[Trajectory]) -> list[Trajectory]:
        """One forward. If the batch fails, each of its rows is tried alone, so that only the culprit is lost."""
        before = [row.index for row in batch]
        try:
            self._engine.step(batch)
        except Exception as error:  # noqa: BLE001
            if len(batch) == 1:
                self._scheduler.drop(batch[0].key, running=True)
                self._fail(batch[0].key, error)
                return []
            logger.warning("a batch of %d failed (%s); trying its rows alone", len(batch), error)
        else:
            for row in batch:
                ticket = self._tickets[row.key]
                ticket.batch = max(ticket.batch, len(batch))
            return batch
        # Out of the except block: a live exception would keep the failed batch's tensors in memory.
        stepped = [row.index > index for row, index in zip(batch, before, strict=True)]  # some may have had it
        return [row for one, had in zip(batch, stepped, strict=True) for row in ([one] if had else self._step([one]))]

    def _improve(self) -> None:
        """Learn from what the device has done; make faster what is in demand."""
        for kind, bucket, rows, seconds in self._engine.measured():
            observe = self._table.observe_step if kind == "step" else self._table.observe_finish
            observe(bucket, rows, seconds)
        self._engine.improve()
        if wanted := self._engine.wanted():
            self._tune(*wanted)

    def _deliver(self, rows: list[Trajectory], wait: Pictures) -> None:
        """Hand the rows to the pool, each with the way to its picture; a GPU may be at work on it still."""
        for place, row in enumerate(rows):
            self._encoders.submit(self._encode, self._tickets.pop(row.key), row, wait, place)
        if counted := self._gains() + self._engine.counts():
            self._channel.send({"op": "counted", "counts": [[*words, times] for words, times in counted.items()]})

    def _encode(self, ticket: Ticket, row: Trajectory, wait: Pictures, place: int) -> None:
        if ticket.shown:
            ticket.shown.result()  # it came to the pool before this one, so it is done or being done
        try:
            picture = wait()[place]
            if isinstance(picture, LcmError):
                raise picture
            begun_at = time.perf_counter()
            file = _file(ticket, picture)
        except Exception as error:  # noqa: BLE001
            self._fail(row.key, error)
            return
        ended_at = time.perf_counter()
        timings = ticket.timings | row.timings
        timings |= {"encode_image": ended_at - begun_at, "total": ended_at - ticket.received_at}
        result = file | {
            "model": ticket.request.model,
            "num_inference_steps": row.steps,
            "timings": timings,
            "batch": ticket.batch,
            "flagged": picture.flagged,
        }
        self._channel.send({"op": "result", "key": row.key, "result": result})

    def _wants_preview(self, row: Trajectory) -> bool:
        """Not while its last one waits to be encoded: none is made in vain, and nobody's result waits behind many."""
        if not row.request.previews or row.done:
            return False
        shown = self._tickets[row.key].shown
        return shown is None or shown.done()

    def _show(self, rows: list[Trajectory], wait: Pictures) -> None:
        for place, row in enumerate(rows):
            ticket = self._tickets[row.key]
            ticket.shown = self._encoders.submit(self._encode_preview, ticket, row.steps, row.index, wait, place)

    def _encode_preview(self, ticket: Ticket, steps: int, step: int, wait: Pictures, place: int) -> None:
        try:
            picture = wait()[place]
            if isinstance(picture, LcmError) or picture.flagged:
                return  # its end will tell
            preview = _file(ticket, picture) | {"step": step, "num_inference_steps": steps}
        except Exception:
            logger.exception("a preview of request %d failed", ticket.key)
            return
        self._channel.send({"op": "preview", "key": ticket.key, "preview": preview})

    def load_all(self, names: list[str], *, strict: bool) -> None:
        """Load models in order, from another thread than the loop's; those that find no room are left out.

        Raises: if ``strict``, what the first one that cannot be loaded raises.
        """
        for name in names:
            spec = self._specs[name]
            try:
                parts, size = self._engine.locate(spec, self._reporter(spec))
                self._loader.submit(self._load_if_it_fits, spec, parts, size).result()
            except Exception as error:
                if strict:
                    raise
                self._send_failed(spec, error)

    def _load_if_it_fits(self, spec: ModelSpec, parts: Parts, size: int) -> None:
        taken, limit = self._engine.memory
        if taken and taken + size > limit:
            logger.warning("there is no room for %s; it is loaded when it is asked for", spec.name)
            self._send_unloaded(spec.name)
        else:
            self._load_parts(spec, parts)

    def _load(self, spec: ModelSpec) -> None:
        """Load one model that was asked for, once the ones longest unused have made room."""
        try:
            parts, size = self._engine.locate(spec, self._reporter(spec))
            if size > self._engine.memory[1]:
                raise OutOfMemory(f"{spec.name} is larger than what the models may take")
            self._loader.submit(self._load_into_room, spec, parts, size).result()
        except Exception as error:  # noqa: BLE001
            self._send_failed(spec, error)

    def _load_into_room(self, spec: ModelSpec, parts: Parts, size: int) -> None:
        room = Room(size)
        self._inbox.put(room)
        room.made.wait()
        self._load_parts(spec, parts)

    def _send_failed(self, spec: ModelSpec, error: Exception) -> None:
        if not isinstance(error, LcmError):
            logger.error("%s cannot be loaded", spec.name, exc_info=error)
            error = Unavailable(f"{spec.name} cannot be loaded; the server's log says why")
        self._channel.send({"op": "failed", "model": spec.name, "error": to_wire(error)})

    def _load_parts(self, spec: ModelSpec, parts: Parts) -> None:
        begun_at = time.perf_counter()
        self._engine.load(spec, parts, self._reporter(spec))
        self._loaded_at[spec.name] = time.perf_counter()
        self._channel.send(
            {
                "op": "loaded",
                "model": spec.name,
                "seconds": time.perf_counter() - begun_at,
                "traits": self._engine.traits(spec.name)._asdict(),
                "memory": self._engine.memory[0],
            }
        )
        self._tune(spec.name)

    def _tune(self, name: str, size: tuple[int, int] | None = None) -> None:
        """Make a model fast while it answers, for its own size or another one; only once at a time."""
        if (name, size) not in self._tuning:
            self._tuning.add((name, size))
            self._tuner.submit(self._tune_now, name, size)

    def _tune_now(self, name: str, size: tuple[int, int] | None) -> None:
        begun_at = time.perf_counter()
        try:
            self._engine.tune(name, size)
        except ModelLoading:
            logger.info("%s was unloaded before it was made fast", name)
        except Exception:
            logger.exception("%s stays as slow as it is (%s)", name, size or "its own size")
        else:
            seconds = time.perf_counter() - begun_at
            logger.info("%s is fast (%s, %s) after %.1f s", name, self._engine.backend, size or "its own size", seconds)
            if size is None:
                self._channel.send({"op": "tuned", "model": name, "backend": self._engine.backend, "seconds": seconds})
        finally:
            self._tuning.discard((name, size))

    def _reporter(self, spec: ModelSpec) -> Callable[[str, float], None]:
        return lambda stage, progress: self._channel.send(
            {"op": "stage", "model": spec.name, "stage": stage, "progress": progress}
        )

    def _leave(self, name: str) -> None:
        """Begin nothing of a model any more; it goes when its rows under way are done."""
        if name in self._engine.loaded and name not in self._leaving:
            self._leaving.add(name)
            self._channel.send({"op": "leaving", "model": name})

    def _send_unloaded(self, name: str) -> None:
        self._channel.send({"op": "unloaded", "model": name, "memory": self._engine.memory[0]})

    def _make_room(self) -> None:
        """Unload what is to go and has no row under way; tell the loader when there is room."""
        if not self._rooms and not self._leaving:
            return
        in_use = {row.request.model for row in self._scheduler.running}
        while True:
            for name in self._leaving - in_use:
                self._leaving.discard(name)
                self._engine.unload(name)
                self._send_unloaded(name)
            if not self._rooms or self._leaving:
                return
            taken, limit = self._engine.memory
            if not taken or taken + self._rooms[0].size <= limit:
                self._rooms.pop(0).made.set()
                continue
            unused = self._engine.loaded[0]
            if self._loaded_at[unused] > time.perf_counter() - STAY_S:
                return
            self._leave(unused)

    def _fail(self, key: int, error: Exception) -> None:
        self._tickets.pop(key, None)
        if any(words in str(error) for words in _STICKY):
            logger.critical("the device is lost: %s", error)
            os._exit(EXIT_STICKY)
        if type(error).__name__ == "OutOfMemoryError" or isinstance(error, MemoryError):
            error = OutOfMemory("the device has no room for this picture; try a smaller size or fewer at a time")
        elif not isinstance(error, LcmError):
            logger.error("request %d failed", key, exc_info=error)
            error = GenerationFailed("the engine could not make this picture")
        self._channel.send({"op": "error", "key": key, "error": to_wire(error)})


def _listen(messages: Iterator[Message], channel: Channel, worker: Worker) -> None:
    """Hand the front's messages to the loop; end the process when the front is gone."""
    for message in messages:
        if message["op"] == "ping":
            channel.send({"op": "pong", "turns": worker.turns})
        else:
            worker.post(message)
    os._exit(0)


def _load_first(worker: Worker, channel: Channel, names: list[str], strict: bool) -> None:
    """Load what is to be there from the start; if ``strict``, an engine without all of it is of no use."""
    try:
        worker.load_all(names, strict=strict)
    except Exception as error:  # noqa: BLE001
        _give_up(channel, error)
    else:
        channel.send({"op": "ready"})


def _give_up(channel: Channel, error: Exception) -> NoReturn:
    if not isinstance(error, LcmError):
        logger.error("the engine cannot be loaded", exc_info=error)
        error = Unavailable("the engine cannot be loaded; its log says why")
    channel.send({"op": "broken", "error": to_wire(error)})
    channel.close()
    os._exit(1)


def serve(end: socket.socket, create_engine: Callable[..., Engine]) -> None:
    """Load the models that the first message names, and answer meanwhile and then, until the front is gone."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s engine: %(message)s")
    for number in (signal.SIGINT, signal.SIGTERM):
        # They reach the whole terminal or service group; the front decides when this process ends.
        signal.signal(number, signal.SIG_IGN)
    channel = Channel(end)
    messages = channel.receive()
    start = next(messages)
    try:
        specs = [ModelSpec(**fields) for fields in start["models"]]
        engine = create_engine(**start["engine"] | {"choice": Choice(**start["engine"]["choice"])})
    except Exception as error:  # noqa: BLE001
        _give_up(channel, error)
    channel.send({"op": "device", "name": engine.device_name})
    worker = Worker(engine, channel, specs, start["max_rows"])
    for name, target, args in (
        ("listen", _listen, (messages, channel, worker)),
        ("load-first", _load_first, (worker, channel, list(start["load"]), start["strict"])),
    ):
        threading.Thread(target=target, args=args, name=name, daemon=True).start()
    try:
        worker.run()
    except Exception:
        logger.critical("the loop has ended", exc_info=True)
        os._exit(EXIT_STICKY)  # its threads would keep the process, and it would answer nobody


def main() -> None:
    """Serve on the socket whose file descriptor is the only argument."""
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    from lcm_rt.engine.engine import Engine

    serve(socket.socket(fileno=int(sys.argv[1])), Engine)


if __name__ == "__main__":
    main()

"""The engine process: one loop over decoded requests, with pools for decoding and encoding beside it.

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
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lcm_rt.catalog import ModelSpec
from lcm_rt.channel import Channel, Message
from lcm_rt.errors import Cancelled, GenerationFailed, LcmError, OutOfMemory, Superseded, Unavailable, to_wire
from lcm_rt.images import Canvas, encode_picture, read_canvas
from lcm_rt.scheduler import Scheduler
from lcm_rt.types import GenerateRequest

if TYPE_CHECKING:
    from lcm_rt.engine.engine import Engine
    from lcm_rt.engine.trajectory import Trajectory

logger = logging.getLogger(__name__)

EXIT_STICKY = 70
"""Exit status after a CUDA error that poisons every later call of the process (CUDA runtime API, error handling)."""

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
    canvas: Canvas
    received_at: float
    timings: dict[str, float] = field(default_factory=dict)
    batch: int = 0


@dataclass(slots=True)
class Undecoded:
    """A request whose pictures could not be read."""

    key: int
    error: Exception


class Worker:
    """The loop. Only its own thread touches the engine and the scheduler; pools hand results to the inbox."""

    def __init__(self, engine: Engine, channel: Channel, sides: dict[str, int], max_rows: int) -> None:
        self.turns = 0
        self._engine = engine
        self._channel = channel
        self._sides = sides
        self._scheduler: Scheduler[Ticket, Trajectory] = Scheduler(max_rows)
        self._inbox: queue.SimpleQueue[Message | Ticket | Undecoded] = queue.SimpleQueue()
        self._decoding: set[int] = set()
        self._tickets: dict[int, Ticket] = {}
        self._decoders = ThreadPoolExecutor(2, "decode")
        self._encoders = ThreadPoolExecutor(2, "encode")

    def post(self, message: Message) -> None:
        """Hand a message of the front to the loop, from any thread."""
        self._inbox.put(message)

    def run(self) -> None:
        """Serve for as long as the process lives."""
        scheduler, engine = self._scheduler, self._engine
        while True:
            self._drain()
            self.turns += 1
            for ticket in scheduler.admit():
                if row := self._begin(ticket):
                    scheduler.start(row)
            batch = scheduler.schedule()
            if batch and (done := scheduler.retire(self._step(batch))):
                self._deliver(done, engine.finish(done))

    def _drain(self) -> None:
        """Take in what has come; wait for it only when there is nothing to step."""
        block = self._scheduler.idle
        while True:
            try:
                message = self._inbox.get(block=block)
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
            elif message["op"] == "submit":
                self._decoding.add(message["key"])
                self._decoders.submit(self._decode, message["key"], message["request"], time.perf_counter())
            elif message["op"] == "drop":
                self._drop(message["key"], running=message["running"])

    def _decode(self, key: int, fields: dict[str, Any], received_at: float) -> None:
        if key not in self._decoding:
            return  # dropped while it waited for its turn: a fast client must not pile up work that nobody wants
        try:
            size = fields.pop("size")
            request = GenerateRequest(**fields, size=tuple(size) if size else None)
            begun_at = time.perf_counter()
            canvas = read_canvas(request, self._sides[request.model])
            ticket = Ticket(key, request, canvas, received_at, {"decode": time.perf_counter() - begun_at})
        except Exception as error:  # noqa: BLE001  a hostile picture must not end the loop
            self._inbox.put(Undecoded(key, error))
        else:
            self._inbox.put(ticket)

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
            row = self._engine.begin(ticket.key, ticket.request, ticket.canvas)
        except Exception as error:  # noqa: BLE001  one request's failure is its own
            self._fail(ticket.key, error)
            return None
        self._tickets[ticket.key] = ticket
        return row

    def _step(self, batch: list[Trajectory]) -> list[Trajectory]:
        """One forward. If the batch fails, each of its rows is tried alone, so that only the culprit is lost."""
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
        return [row for alone in batch for row in self._step([alone])]

    def _deliver(self, rows: list[Trajectory], pictures: list[np.ndarray[Any, Any] | LcmError]) -> None:
        for row, picture in zip(rows, pictures, strict=True):
            if isinstance(picture, LcmError):
                self._fail(row.key, picture)
            else:
                self._encoders.submit(self._encode, self._tickets.pop(row.key), row, picture)

    def _encode(self, ticket: Ticket, row: Trajectory, pixels: np.ndarray[Any, Any]) -> None:
        request, begun_at = ticket.request, time.perf_counter()
        try:
            image, content_type = encode_picture(pixels, request.format, request.quality)
        except Exception as error:  # noqa: BLE001
            self._fail(row.key, error)
            return
        ended_at = time.perf_counter()
        timings = ticket.timings | row.timings
        timings |= {"encode_image": ended_at - begun_at, "total": ended_at - ticket.received_at}
        height, width = pixels.shape[:2]
        result = {
            "image": image,
            "content_type": content_type,
            "width": width,
            "height": height,
            "seed": request.seed,
            "model": request.model,
            "num_inference_steps": row.steps,
            "timings": timings,
            "batch": ticket.batch,
        }
        self._channel.send({"op": "result", "key": row.key, "result": result})

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


def _load(engine: Engine, spec: ModelSpec, channel: Channel) -> None:
    begun_at = time.perf_counter()

    def report(stage: str, progress: float) -> None:
        channel.send({"op": "stage", "model": spec.name, "stage": stage, "progress": progress})

    engine.load(spec, report)
    channel.send({"op": "loaded", "model": spec.name, "seconds": time.perf_counter() - begun_at})


def serve(end: socket.socket, create_engine: Callable[..., Engine]) -> None:
    """Load the models that the first message names, then answer until the front is gone."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s engine: %(message)s")
    for name in (signal.SIGINT, signal.SIGTERM):
        # They reach the whole terminal or service group; the front decides when this process ends.
        signal.signal(name, signal.SIG_IGN)
    channel = Channel(end)
    messages = channel.receive()
    start = next(messages)
    try:
        specs = [ModelSpec(**fields | {"path": Path(fields["path"])}) for fields in start["models"]]
        engine = create_engine(device=start["device"], compile=start["compile"], threads=start["threads"])
        worker = Worker(engine, channel, {spec.name: spec.size for spec in specs}, start["max_rows"])
        threading.Thread(target=_listen, args=(messages, channel, worker), name="listen", daemon=True).start()
        channel.send({"op": "device", "name": engine.device_name})
        for spec in specs:
            _load(engine, spec, channel)
    except Exception as error:
        if not isinstance(error, LcmError):
            logger.exception("the engine cannot be loaded")
            error = Unavailable("the engine cannot be loaded; its log says why")
        channel.send({"op": "broken", "error": to_wire(error)})
        channel.close()
        return
    channel.send({"op": "ready"})
    worker.run()


def main() -> None:
    """Serve on the socket whose file descriptor is the only argument."""
    # Read when torch is imported. Threads of OpenMP spin while they wait for each other. For long, they take the cores
    # from the front, from the pools and from each other, and a step takes seconds on a busy machine; not at all, and it
    # takes half as long again on a quiet one. docs/architecture.md has the figures.
    os.environ.setdefault("GOMP_SPINCOUNT", "300")
    from lcm_rt.engine.engine import Engine

    serve(socket.socket(fileno=int(sys.argv[1])), Engine)


if __name__ == "__main__":
    main()

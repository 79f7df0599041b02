"""An engine process without torch: it paints a flat colour for each prompt, and misbehaves on request.

Run as a worker process by the tests of everything above the engine. Words in the prompt steer it:

``hold=PATH``   the step waits until the FIFO at PATH is written to
``nsfw``        the picture is flagged, unless its request has no safety checks
``raise``       the step fails, with any batch it is in
``crash``       the process dies in the step
``nan``         the picture comes out broken
``slow-load``   as a model's name: loading waits until the FIFO ``slow-load`` beside the model folder is written to
``die-load``    as a model's name: the process dies while it loads it
``bad-load``    as a model's name: it cannot be loaded
``bad-tune``    as a model's name: it stays slow

Every model weighs 10 MB.
"""

from __future__ import annotations

import os
import re
import socket
import sys
import time
import zlib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np

from lcm_rt import worker
from lcm_rt.catalog import Choice, ModelSpec
from lcm_rt.errors import GenerationFailed, LcmError, ModelLoading
from lcm_rt.images import Canvas
from lcm_rt.types import GenerateRequest
from lcm_rt.worker import serve


def colour(prompt: str, seed: int) -> tuple[int, int, int]:
    """The colour that the fake paints for a prompt and a seed."""
    value = zlib.crc32(f"{prompt}/{seed}".encode())
    return value & 255, value >> 8 & 255, value >> 16 & 255


WEIGHT = 10 * 2**20


@dataclass(slots=True)
class FakePicture:
    pixels: np.ndarray
    flagged: bool


class Traits(NamedTuple):
    size: int = 512
    steps: int = 4
    safety: bool = True
    controlnet: bool = False


class FakeBucket(NamedTuple):
    model: str
    width: int
    height: int
    area: int = 1


@dataclass(slots=True)
class FakeRow:
    key: int
    request: GenerateRequest
    size: tuple[int, int]
    steps: int
    index: int = 0
    timings: dict[str, float] = field(default_factory=dict)

    @property
    def bucket(self) -> FakeBucket:
        return FakeBucket(self.request.model, *self.size)

    @property
    def area(self) -> int:
        return 1

    @property
    def done(self) -> bool:
        return self.index == self.steps


class FakeEngine:
    device_name = "fake"
    backend = "fake"
    max_area = 100

    def __init__(
        self,
        *,
        device: str,
        backend: str,
        cache_dir: str,
        threads: int | None,
        choice: Choice,
        memory_bytes: int | None,
    ) -> None:
        if device == "none":
            raise LcmError("there is no such device")
        self.loaded: list[str] = []
        self._memory_bytes = memory_bytes or 2**30

    @property
    def memory(self) -> tuple[int, int]:
        return len(self.loaded) * WEIGHT, self._memory_bytes

    def locate(self, spec: ModelSpec, report: Callable[[str, float], None]) -> tuple[None, int]:
        report("files", 0.0)
        return None, WEIGHT

    def load(self, spec: ModelSpec, parts: None, report: Callable[[str, float], None]) -> None:
        report("weights", 0.5)
        if spec.name == "slow-load":
            (Path(spec.source).parent / "slow-load").read_bytes()
        if spec.name == "die-load":
            time.sleep(0.05)  # its stage reaches the front
            os._exit(9)
        if spec.name == "bad-load":
            raise LcmError("this model is no good")
        self.loaded.append(spec.name)

    def traits(self, name: str) -> Traits:
        return Traits()

    def unload(self, name: str) -> None:
        self.loaded.remove(name)

    def bucket(self, request: GenerateRequest, canvas: Canvas) -> FakeBucket:
        return FakeBucket(request.model, canvas.width, canvas.height)

    def adapter(self, request: GenerateRequest) -> None:
        return None

    def begin(self, key: int, request: GenerateRequest, canvas: Canvas, adapter: None) -> FakeRow:
        if request.model not in self.loaded:
            raise ModelLoading(f"{request.model} is not loaded")
        self.loaded.append(self.loaded.pop(self.loaded.index(request.model)))
        return FakeRow(key, request, (canvas.width, canvas.height), request.num_inference_steps)

    def step(self, batch: Sequence[FakeRow]) -> None:
        for row in batch:
            if "raise" in row.request.prompt:
                raise RuntimeError("secret internals")
            if "crash" in row.request.prompt:
                os._exit(9)
            if match := re.search(r"hold=(\S+)", row.request.prompt):
                Path(match[1]).read_bytes()
        for row in batch:
            row.index += 1

    def finish(self, rows: Sequence[FakeRow]) -> list[FakePicture | LcmError]:
        return [
            GenerationFailed("this picture came out broken") if "nan" in row.request.prompt else self._paint(row)
            for row in rows
        ]

    def begin_finish(self, rows: Sequence[FakeRow]) -> Callable[[], list[FakePicture | LcmError]]:
        pictures = self.finish(rows)
        return lambda: pictures

    preview = begin_finish

    def tune(self, name: str, size: tuple[int, int] | None = None) -> None:
        if "bad-tune" in name:
            raise RuntimeError("no compiler")

    def wait_turn(self) -> None:
        pass

    def improve(self) -> None:
        pass

    def wanted(self) -> None:
        return None

    def measured(self) -> list[tuple[str, object, int, float]]:
        return []

    def counts(self) -> Counter[tuple[str, ...]]:
        return Counter({("forward", "fake"): 1})

    def _paint(self, row: FakeRow) -> FakePicture:
        flagged = "nsfw" in row.request.prompt and row.request.safety
        paint = (0, 0, 0) if flagged else colour(row.request.prompt, row.request.seed)
        return FakePicture(np.full((row.size[1], row.size[0], 3), paint, np.uint8), flagged)


if __name__ == "__main__":
    worker.STAY_S = 0.1
    serve(socket.socket(fileno=int(sys.argv[1])), FakeEngine)

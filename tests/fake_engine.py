"""An engine process without torch: it paints a flat colour for each prompt, and misbehaves on request.

Run as a worker process by the tests of everything above the engine. Words in the prompt steer it:

``hold=PATH``   the step waits until the FIFO at PATH is written to
``raise``       the step fails, with any batch it is in
``crash``       the process dies in the step
``nan``         the picture comes out broken
``slow-load``   as a model's name: loading waits until the FIFO ``slow-load`` beside the model folder is written to
"""

from __future__ import annotations

import os
import re
import socket
import sys
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from lcm_rt.catalog import ModelSpec
from lcm_rt.errors import GenerationFailed, LcmError
from lcm_rt.images import Canvas
from lcm_rt.types import GenerateRequest
from lcm_rt.worker import serve


def colour(prompt: str, seed: int) -> tuple[int, int, int]:
    """The colour that the fake paints for a prompt and a seed."""
    value = zlib.crc32(f"{prompt}/{seed}".encode())
    return value & 255, value >> 8 & 255, value >> 16 & 255


@dataclass(slots=True)
class FakeRow:
    key: int
    request: GenerateRequest
    size: tuple[int, int]
    steps: int
    index: int = 0
    timings: dict[str, float] = field(default_factory=dict)

    @property
    def bucket(self) -> tuple[str, int, int]:
        return (self.request.model, *self.size)

    @property
    def done(self) -> bool:
        return self.index == self.steps


class FakeEngine:
    device_name = "fake"

    def __init__(self, *, device: str, compile: bool, threads: int | None) -> None:
        if device == "none":
            raise LcmError("there is no such device")

    def load(self, spec: ModelSpec, report: Callable[[str, float], None]) -> None:
        report("weights", 0.5)
        if spec.name == "slow-load":
            (spec.path.parent / "slow-load").read_bytes()

    def begin(self, key: int, request: GenerateRequest, canvas: Canvas) -> FakeRow:
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

    def finish(self, rows: Sequence[FakeRow]) -> list[np.ndarray | LcmError]:
        return [
            GenerationFailed("this picture came out broken")
            if "nan" in row.request.prompt
            else np.full((row.size[1], row.size[0], 3), colour(row.request.prompt, row.request.seed), np.uint8)
            for row in rows
        ]


if __name__ == "__main__":
    serve(socket.socket(fileno=int(sys.argv[1])), FakeEngine)

"""Compiling a model's forward passes with torch.compile; a size is compiled once, before anybody gets its results.

Two programs are made for each thing that is batched: for one, and for any larger number (the batch dimension is marked
dynamic; one is special to the compiler). What is not compiled runs eagerly, so no client waits for a compiler.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lcm_rt.engine.models import Model
from lcm_rt.engine.networks import Distribution, Eager
from lcm_rt.engine.slots import Advance, Slots, State

Step = Callable[[State, Tensor], None]


def keep_programs_in(folder: Path) -> None:
    """Where compiled code is kept, so that the next start need not make it again; for the whole process.

    The folder serves better than torch's portable artifacts, which leave out the compiled C++ of a CPU.
    """
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(folder))


class Inductor:
    """``Networks`` of ``model``; ``compile`` makes the fast ones for a size, the others stay eager."""

    def __init__(self, model: Model, advance: Advance) -> None:
        self._model = model
        self._eager = Eager(model)
        # No CUDA graphs of its own: ours have static places, and know when they are to be captured. No freezing of
        # weights: on a CPU it gains a twentieth, compiles twice as long, and what it makes is not kept on disk.
        options: Any = {"triton.cudagraphs": False}
        self.advance: Step = torch.compile(advance.__call__, options=options)
        self._decode = torch.compile(self._eager.decode, options=options)
        self._encode = torch.compile(self._eager.encode, options=options)
        self._read = torch.compile(self._eager.read, options=options)
        self._compiled: set[tuple[int, int]] = set()

    def compile(self, slots: Slots, height: int, width: int, report: Callable[[float], None]) -> None:
        """Compile for latents of one size; takes a minute or more where it was never done before."""
        model = self._model
        latents = torch.zeros(1, model.latent_channels, height, width, dtype=torch.float32, device=model.device)
        pixels = latents.new_zeros(1, 3, height * model.pixels_per_latent, width * model.pixels_per_latent)
        ids = torch.zeros(1, model.max_tokens, dtype=torch.int64, device=model.device)
        jobs: list[Callable[[], object]] = [
            lambda: self.advance(slots.state, slots.nowhere(1)),
            lambda: self.advance(slots.state, any_number(slots.nowhere(2), 1)),
            lambda: self._decode(latents),
            lambda: self._encode(pixels),
        ]
        if model.device.type != "cpu":
            jobs.append(lambda: self._decode(any_number(latents.repeat(2, 1, 1, 1), 0)))
        if not self._compiled:
            jobs += [partial(self._read, number, ids) for number in range(len(model.readers))]
        for done, job in enumerate(jobs, 1):
            job()
            report(done / len(jobs))
        self._compiled.add((height, width))

    def takes(self, height: int, width: int) -> bool:
        return (height, width) in self._compiled

    def predict(
        self,
        x: Tensor,
        timesteps: Tensor,
        context: Tensor,
        embedding: Tensor | None,
        pooled: Tensor | None,
        size_ids: Tensor | None,
    ) -> Tensor:
        return self._eager.predict(x, timesteps, context, embedding, pooled, size_ids)

    def decode(self, latents: Tensor) -> Tensor:
        if not self.takes(*latents.shape[2:]):
            return self._eager.decode(latents)
        return self._decode(latents)

    def encode(self, pictures: Tensor) -> Distribution:
        height, width = (side // self._model.pixels_per_latent for side in pictures.shape[2:])
        encode = self._encode if self.takes(height, width) and len(pictures) == 1 else self._eager.encode
        return Distribution(*encode(pictures))

    def read(self, number: int, ids: Tensor) -> tuple[Tensor, Tensor | None]:
        return self._read(number, ids) if self._compiled else self._eager.read(number, ids)


def any_number(tensor: Tensor, dimension: int) -> Tensor:
    """Tell the compiler that ``dimension``, of two here, is of any length from two on."""
    torch._dynamo.mark_dynamic(tensor, dimension)
    return tensor

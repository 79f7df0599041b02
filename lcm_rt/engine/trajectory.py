"""One picture on its way through the steps; knows no network and no other picture.

The name is the consistency papers': a picture's path along the probability-flow ODE, from noise to pixels.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

from torch import Tensor

from lcm_rt.types import GenerateRequest


class Bucket(NamedTuple):
    """What rows must share to be in one forward; ``guided`` rows pass the network with and without the prompt."""

    model: str
    height: int
    width: int
    guided: bool


@dataclass(slots=True)
class Known:
    """The picture that inpainting keeps: clean latents, the noise they are kept at, and where (mask = 0, (1, H, W))."""

    latents: Tensor
    noise: Tensor
    mask: Tensor


@dataclass(slots=True, eq=False)
class Trajectory:
    """All state of one request inside the engine, and its only mutable noun.

    All randomness is drawn when it begins, from a generator of its own: what else is in a batch cannot change a
    picture, and a step needs no host work. ``noises`` has a row per step; the last one is not used (nought).
    """

    key: int
    request: GenerateRequest
    bucket: Bucket
    latents: Tensor  # (C, H, W), float32
    timesteps: Tensor  # (steps,)
    coefficients: Tensor  # (steps, 6), see sampling.coefficients
    noises: Tensor  # (steps, C, H, W)
    context: Tensor  # (tokens, width), or (2, tokens, width) when guided: without the prompt, then with it
    guidance: Tensor  # the scale; () float32
    guidance_embedding: Tensor | None  # (time_cond_proj_dim,)
    known: Known | None
    steps: int
    index: int = 0
    timings: dict[str, float] = field(default_factory=dict)

    @property
    def done(self) -> bool:
        return self.index >= self.steps

    def advance(self, latents: Tensor, seconds: float) -> None:
        """Take the latents that a step of ``seconds`` made."""
        self.latents = latents
        self.index += 1
        self.timings["denoise"] = self.timings.get("denoise", 0.0) + seconds

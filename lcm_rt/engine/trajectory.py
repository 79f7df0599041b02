"""One picture on its way through the steps; knows no network and no other picture.

The name is the consistency papers': a picture's path along the probability-flow ODE, from noise to pixels.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

from torch import Tensor

from lcm_rt.engine.clock import Mark
from lcm_rt.types import GenerateRequest

if TYPE_CHECKING:
    from lcm_rt.engine.adapters import Adapter


class Bucket(NamedTuple):
    """What rows must share to be in one forward."""

    model: str
    height: int
    width: int

    @property
    def area(self) -> int:
        """Latents of one channel: what a row's step costs."""
        return self.height * self.width


class Prompt(NamedTuple):
    """A text as the UNet reads it: (tokens, width), and for SDXL the whole of it in one vector (width,)."""

    context: Tensor
    pooled: Tensor | None = None


@dataclass(slots=True)
class Known:
    """The picture that inpainting keeps: clean latents, the noise they are kept at, and where (mask = 0, (1, H, W))."""

    latents: Tensor
    noise: Tensor
    mask: Tensor


class Slot(NamedTuple):
    """A place among static tensors, and whose place that is."""

    home: object
    number: int


@dataclass(slots=True, eq=False, weakref_slot=True)
class Trajectory:
    """All state of one request inside the engine, and its only mutable noun.

    All randomness is drawn when it begins, from a generator of its own: what else is in a batch cannot change a
    picture, and a step needs no host work. ``noises`` has a row per step; the last one is not used (nought).
    """

    key: int
    request: GenerateRequest
    bucket: Bucket
    latents: Tensor  # (C, H, W), float32; with a slot, they are there
    timesteps: Tensor  # (steps,)
    coefficients: Tensor  # (steps, 8), see sampling.coefficients
    noises: Tensor  # (steps, C, H, W)
    prompt: Prompt
    negative: Prompt | None  # with classifier-free guidance: what to be pushed away from, a second row of each forward
    guidance: Tensor  # the scale; () float32
    guidance_embedding: Tensor | None  # (time_cond_proj_dim,)
    size_ids: Tensor | None  # SDXL's size conditioning, (6,)
    known: Known | None
    surroundings: Tensor | None  # mask and masked picture for a UNet that takes them, (1 + C, H, W)
    control: Tensor | None  # the ControlNet's picture, (3, height, width) in pixels
    adapter: Adapter | None  # the LoRA
    adapter_scale: Tensor  # () float32
    steps: int
    index: int = 0
    slot: Slot | None = None
    denoised: Tensor | None = None  # the clean latents that the last step found, (C, H, W)
    steps_took: list[tuple[Mark, Mark]] = field(default_factory=list)  # begin and end of each
    timings: dict[str, float] = field(default_factory=dict)

    @property
    def done(self) -> bool:
        return self.index >= self.steps

    @property
    def area(self) -> int:
        return self.bucket.area

    def advance(self, latents: Tensor, denoised: Tensor) -> None:
        """Take what a step made."""
        self.latents = latents
        self.denoised = denoised
        self.index += 1

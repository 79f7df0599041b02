"""What a caller gives and gets, as plain values."""

from __future__ import annotations

import os
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, Protocol, TypedDict


class Savable(Protocol):
    """A picture of Pillow, or whatever else writes itself into a file as that does."""

    def save(self, fp: Any, format: str | None = None, **params: Any) -> None: ...


class Size(TypedDict):
    """A size in pixels; both sides are multiples of 8."""

    width: int
    height: int


class Fields(TypedDict, total=False):
    """What may be said beside prompt, picture, mask and LoRA; ``docs/api.md`` has ranges and defaults."""

    negative_prompt: str | None
    model: str | None
    model_name: str | None
    mask_alpha: bool | None
    inpaint_mask_only: bool | None
    controlnet_inpaint: bool | None
    strength: float | None
    seed: int | None
    guidance_scale: float | None
    num_inference_steps: int | None
    image_size: str | Size | None
    num_images: int | None
    lora_scale: float | None
    enable_safety_checks: bool | None
    sync_mode: bool | None
    previews: bool | None
    format: Literal["jpeg", "png", "webp"] | None
    quality: int | None
    request_id: str | int | float | None


@dataclass(frozen=True, slots=True)
class Image:
    """A picture that was made: the bytes of its file, and where the server keeps it, if it does."""

    content: bytes = field(repr=False)
    content_type: str
    width: int
    height: int
    url: str | None = None

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the file as it is; its format is ``content_type``, whatever the name says. Raises: OSError."""
        path = Path(path)
        path.write_bytes(self.content)
        return path


Picture = bytes | bytearray | memoryview | str | os.PathLike[str] | Savable | Image
"""A picture to start from: the bytes of a file, a ``Path``, one of Pillow's, an answered one, or, as text, a URL."""

Lora = bytes | str | os.PathLike[str]
"""A LoRA: the bytes of a file, a ``Path``, or, as text, an address such as ``hf:OWNER/NAME/FILE.safetensors``."""


@dataclass(frozen=True, slots=True)
class Output:
    """The answer to one prompt.

    ``seed`` is the first picture's, the n-th has ``seed + n - 1``. ``timings`` are seconds per stage. ``flagged`` says
    for each picture whether the safety checker took it for unsafe, and it is black.
    """

    images: list[Image]
    seed: int
    model: str
    prompt: str
    num_inference_steps: int
    timings: dict[str, float]
    flagged: list[bool]
    request_id: Any = None

    @property
    def image(self) -> Image:
        """The first picture."""
        return self.images[0]


@dataclass(frozen=True, slots=True)
class Preview:
    """What the picture would be if ``step`` of ``num_inference_steps`` had been the last."""

    image: Image
    step: int
    num_inference_steps: int
    seed: int
    request_id: Any = None


@dataclass(frozen=True, slots=True)
class Log:
    """A line that a job wrote; ``timestamp`` is ISO 8601."""

    message: str
    level: str
    timestamp: str


@dataclass(frozen=True, slots=True)
class Status:
    """How far a job is.

    ``position`` is how many jobs are before it, while it waits. ``logs`` are those that were not in an earlier status
    of the same iteration. A job that failed is ``COMPLETED`` with an ``error``.
    """

    state: Literal["IN_QUEUE", "IN_PROGRESS", "COMPLETED"]
    position: int | None
    logs: list[Log]
    error: str | None
    metrics: dict[str, float]

    @property
    def done(self) -> bool:
        return self.state == "COMPLETED"


@dataclass(frozen=True, slots=True)
class Model:
    """A model that is served: what ``GET /models`` says of it."""

    name: str
    state: str
    stage: str
    progress: float
    size: int | None
    steps: int
    safety: bool | None
    controlnet: bool | None
    licence: str
    default: bool
    load_seconds: float | None
    error: str | None

    @classmethod
    def of(cls, data: dict[str, Any]) -> Model:
        values: dict[str, Any] = {known.name: data.get(known.name) for known in fields(cls)}
        return cls(**values)


@dataclass(frozen=True, slots=True)
class Health:
    """``status`` is ``ready``, ``loading`` or ``failed``; ``stage`` says how far the models are."""

    status: str
    stage: str

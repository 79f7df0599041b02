"""What everybody paints, and who takes part; knows no torch."""

from __future__ import annotations

import io
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from PIL import Image

QUALITY = 80
"""Of everybody's JPEGs."""


class Job(NamedTuple):
    """One picture to paint."""

    prompt: str
    seed: int


CHECKED = (
    Job("sunset over a lake with mountains", 1),
    Job("a snowy forest at night with a moon", 2),
    Job("a house by the sea at day", 3),
    Job("desert with hills at sunset", 4),
    Job("mountains and a lake in the morning", 5),
    Job("the moon over a frozen sea", 6),
    Job("hills with snow at day", 7),
    Job("a quiet meadow under clouds", 8),
)
"""What everybody paints first, to be compared."""


def job(number: int) -> Job:
    """Job ``number`` of a run: a prompt that nobody saw before, and a seed."""
    sights = ("a lake", "a forest", "the sea", "a desert", "a house", "mountains", "hills with snow")
    times = ("at sunset", "at night", "at day")
    return Job(f"{sights[number % 7]} {times[number % 3]}, number {number}", number)


@dataclass(frozen=True, slots=True)
class Work:
    """The model and its use: ``side`` px is None for the model's own, ``threads`` are those of the CPU's arithmetic."""

    folder: Path
    side: int | None = None
    steps: int = 4
    threads: int = 2
    device: str = "cpu"

    def to_json(self) -> str:
        """As it goes to another process."""
        return json.dumps({**asdict(self), "folder": str(self.folder)})

    @classmethod
    def from_json(cls, text: str) -> Work:
        fields = json.loads(text)
        return cls(**{**fields, "folder": Path(fields["folder"])})


PAINTERS: dict[str, tuple[str, dict[str, Any]]] = {
    "diffusers": ("Diffusers", {}),
    "diffusers bf16": ("Diffusers", {"dtype": "bfloat16"}),
    "diffusers compiled": ("Diffusers", {"compiled": True}),
    "diffusers compiled bf16": ("Diffusers", {"compiled": True, "dtype": "bfloat16"}),
    "openvino": ("OpenVino", {}),
    "stream batch": ("StreamBatch", {}),
    "ours eager": ("Ours", {"backend": "eager"}),
    "ours": ("Ours", {}),
}
"""Who paints without a server: a class of ``painters`` and its arguments.

Those with ``bf16`` are an opponent once more, in the type that may suit it better than its default.
"""


def jpeg(image: Image.Image) -> bytes:
    """As all opponents encode that paint in one process: Pillow's baseline."""
    file = io.BytesIO()
    image.save(file, "JPEG", quality=QUALITY)
    return file.getvalue()

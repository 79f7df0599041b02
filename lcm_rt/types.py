"""The nouns of one generation; knows no socket, no tensor, no picture.

``GenerateInput`` is what a client says, in the platform's field names and with its defaults. ``GenerateRequest`` is the
same, resolved: nothing is left to guess. ``GenerateResult`` is one finished picture.
"""

from __future__ import annotations

import binascii
import math
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    AliasChoices,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    WithJsonSchema,
    model_validator,
)

MAX_SEED = 2**32 - 1  # torch's CPU generator takes 32 bits: 2**32 would be seed 0 again.
MAX_SIDE = 1024  # px; larger input pictures are scaled down to it.
LARGEST_SIDE = 4096  # px; no server may be set to paint larger pictures.
MAX_IMAGES = 8
MAX_STEPS = 50  # the length of the schedule that LCMs are distilled on

Format = Literal["jpeg", "png", "webp"]
Priority = Literal["realtime", "run", "queue"]

SIZES = {
    "square_hd": (1024, 1024),
    "square": (512, 512),
    "portrait_4_3": (768, 1024),
    "portrait_16_9": (576, 1024),
    "landscape_4_3": (1024, 768),
    "landscape_16_9": (1024, 576),
}
"""Named values of ``image_size``: (width, height) in pixels."""

SizeName = Annotated[str, WithJsonSchema({"type": "string", "enum": [*SIZES]})]

Side = Annotated[int, Field(ge=64, le=LARGEST_SIDE, multiple_of=8)]


class ImageSize(BaseModel):
    """A size in pixels; both sides are multiples of 8, and none is over the server's ``max_side``."""

    width: Side
    height: Side


def _size_by_name(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    if value not in SIZES:
        raise ValueError(f"should be {{width, height}} or one of {', '.join(SIZES)}")
    width, height = SIZES[value]
    return {"width": width, "height": height}


def _bytes_by_text(value: Any) -> Any:
    """JSON has no bytes: there, a file is base64 text."""
    if not isinstance(value, str):
        return value
    try:
        return binascii.a2b_base64(value, strict_mode=True)  # several times as fast as base64.b64decode
    except ValueError:
        raise ValueError("should be bytes, or base64 text") from None


File = Annotated[
    bytes,
    BeforeValidator(_bytes_by_text),
    WithJsonSchema({"type": "string", "contentEncoding": "base64", "description": "A picture file, in base64."}),
]


def is_request_id(value: Any) -> bool:
    """Whether ``value`` may name a request: a finite number, or text of at most 1000 characters."""
    return (isinstance(value, int | float) and abs(value) < math.inf) or (isinstance(value, str) and len(value) <= 1000)


def _request_id(value: Any) -> Any:
    if value is not None and not is_request_id(value):
        raise ValueError("should be a number, or text of at most 1000 characters")
    return value


class GenerateInput(BaseModel):
    """One message of a client. Unknown keys are ignored; ``null`` means the default."""

    model_config = ConfigDict(
        extra="ignore",
        allow_inf_nan=False,
        protected_namespaces=(),
        json_schema_extra={"examples": [{"prompt": "sunset over a lake"}]},
    )

    prompt: str = Field(max_length=10_000)
    negative_prompt: str = Field(
        "",
        max_length=10_000,
        description="Needs guidance_scale above 1, and a model that is not distilled for guidance.",
    )
    model: str | None = Field(None, max_length=200)
    model_name: str | None = Field(None, max_length=200, description="A hub repository; a hint, unlike `model`.")
    image_url: str | None = None
    image_bytes: File | None = None
    image: File | None = Field(None, description="The older name of `image_bytes`.")
    mask_url: str | None = Field(None, description="White is painted anew, black is kept; of the image's size.")
    mask_bytes: File | None = None
    mask_alpha: bool = Field(False, description="The mask's transparent parts are painted anew, whatever its colours.")
    inpaint_mask_only: bool = Field(
        False, description="Paint the mask's surroundings at full size, and paste them: the rest is untouched."
    )
    controlnet_inpaint: bool = Field(False, description="Let a ControlNet see what surrounds the mask.")
    strength: float = Field(0.8, gt=0, le=1)
    seed: int | None = Field(None, ge=0, le=2**53 - MAX_IMAGES)
    guidance_scale: float = Field(1.0, ge=0, le=20)
    num_inference_steps: int = Field(4, ge=1, le=MAX_STEPS)
    image_size: (
        Annotated[ImageSize, BeforeValidator(_size_by_name, json_schema_input_type=ImageSize | SizeName)] | None
    ) = None
    num_images: int = Field(1, ge=1, le=MAX_IMAGES)
    lora_url: str | None = Field(None, description="https:, data: or /files/ address of a LoRA, or hf:OWNER/NAME/FILE.")
    lora_scale: float = Field(1.0, ge=-10, le=10)
    enable_safety_checks: bool = Field(
        True,
        validation_alias=AliasChoices("enable_safety_checks", "enable_safety_checker"),
        description="A picture that the model's safety checker flags is black.",
    )
    sync_mode: bool = Field(False, description="Pictures come as data URIs.")
    previews: bool = Field(False, description="Realtime: a frame after each step that is not the last.")
    format: Format = "jpeg"
    quality: int = Field(80, ge=1, le=100)
    request_id: Annotated[Any, AfterValidator(_request_id), WithJsonSchema({"type": ["string", "number", "null"]})] = (
        Field(None, description="Text or a number, echoed.")
    )

    @model_validator(mode="before")
    @classmethod
    def _null_is_default(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        # A JavaScript ArrayBuffer arrives as an empty map when its msgpack encoder does not know the type.
        given = {key: value for key, value in data.items() if value is not None and value != {}}
        return {key: value for key, value in given.items() if value != "" or not str(key).endswith("_url")}


@dataclass(frozen=True, slots=True)
class GenerateRequest:
    """One picture to make, with nothing left to guess; this crosses to the engine process.

    ``image`` and ``mask`` are the bytes of picture files; where the mask is white (``mask_alpha``: transparent), it is
    painted anew. ``size`` is (width, height), or None for the input picture's own size (text-to-image: the model's).
    ``lora`` is the path of a file whose name is its content's hash. ``session`` is shared by the messages of one
    realtime connection, of which only one at a time is stepped; ``owner`` by all that one client asked for, so that
    nobody has all rows. Without ``size``, no side of the result is over ``max_side``.
    """

    model: str
    prompt: str
    seed: int
    negative_prompt: str = ""
    image: bytes | None = None
    mask: bytes | None = None
    mask_alpha: bool = False
    inpaint_mask_only: bool = False
    controlnet_inpaint: bool = False
    strength: float = 0.8
    guidance_scale: float = 1.0
    num_inference_steps: int = 4
    size: tuple[int, int] | None = None
    lora: str | None = None
    lora_scale: float = 1.0
    safety: bool = True
    previews: bool = False
    format: Format = "jpeg"
    quality: int = 80
    priority: Priority = "run"
    session: str | None = None
    owner: str = ""
    max_side: int = MAX_SIDE


@dataclass(frozen=True, slots=True)
class GenerateResult:
    """One finished picture, as the bytes of a file.

    ``timings`` are seconds per stage; ``batch`` is the largest number of rows that a forward of it had, 0 for a repeat,
    which had none. ``flagged``: the safety checker took it for unsafe, and it is black.
    """

    image: bytes
    content_type: str
    width: int
    height: int
    seed: int
    model: str
    num_inference_steps: int
    timings: dict[str, float] = field(default_factory=dict)
    batch: int = 1
    flagged: bool = False


@dataclass(frozen=True, slots=True)
class Preview:
    """What a picture would be if its last step had been the end: ``step`` of ``num_inference_steps``."""

    image: bytes
    content_type: str
    width: int
    height: int
    seed: int
    step: int
    num_inference_steps: int


@dataclass(frozen=True, slots=True)
class GenerateOutput:
    """The answer to one ``GenerateInput``: ``num_images`` pictures, and what the client needs to tell them apart."""

    results: list[GenerateResult]
    prompt: str
    request_id: Any

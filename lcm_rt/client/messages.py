"""A caller's words as the server's fields, and the server's answers as values and errors; knows no socket."""

from __future__ import annotations

import base64
import difflib
import io
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgpack
import orjson

from lcm_rt import wire
from lcm_rt.client.values import Image, Log, Lora, Output, Picture, Preview, Status
from lcm_rt.errors import (
    BadRequest,
    BodyTimeout,
    Forbidden,
    ImageError,
    InputError,
    LcmError,
    NotFound,
    Overloaded,
    TooLarge,
    Unauthorized,
    Unavailable,
    from_wire,
)
from lcm_rt.types import GenerateInput

FIELDS = {*GenerateInput.model_fields, "enable_safety_checker"}

_OURS = (BadRequest, Unauthorized, Forbidden, NotFound, BodyTimeout, TooLarge, InputError, Overloaded, Unavailable)
_CODES = {kind.status: kind.code for kind in _OURS} | {502: Unavailable.code, 504: Unavailable.code}
"""What a status means where a body does not say it: that is then another server's, between us and ours."""


def compose(
    prompt: str, image: Picture | None, mask: Picture | None, lora: Lora | None, fields: Mapping[str, Any]
) -> dict[str, Any]:
    """One message, its pictures not yet read; what is None is left out.

    Raises: InputError: a field that does not exist, with the one that may have been meant.
    """
    for name in fields:
        if name not in FIELDS:
            near = difflib.get_close_matches(name, [*FIELDS, "lora"], 1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise InputError(name, f"there is no such field{hint}", "unknown_field")
    message = {"prompt": prompt, "image": image, "mask": mask, "lora": lora, **fields}
    return {name: value for name, value in message.items() if value is not None}


def prepare(message: Mapping[str, Any]) -> dict[str, Any]:
    """``message`` in the server's fields, its pictures read: it blocks.

    Raises: InputError, ImageError: a picture that is none, or cannot be read.
    """
    ready = dict(message)
    for name in ("image", "mask"):
        if (picture := ready.pop(name, None)) is None:
            continue
        if isinstance(picture, str):
            ready[f"{name}_url"] = picture
        else:
            ready[f"{name}_bytes"] = _read(name, picture)
    if (lora := ready.pop("lora", None)) is not None:
        if not isinstance(lora, str):
            raise InputError("lora", "is a file here: upload it first, and send its address")
        ready["lora_url"] = lora
    return ready


def _read(name: str, picture: Picture) -> bytes:
    if isinstance(picture, bytes | bytearray | memoryview):
        return bytes(picture)
    if isinstance(picture, Image):
        return picture.content
    try:
        if isinstance(picture, os.PathLike):
            return Path(picture).read_bytes()
        if hasattr(picture, "save"):
            file = io.BytesIO()
            picture.save(file, format="PNG", compress_level=1)  # without loss, and fast before small
            return file.getvalue()
    except Exception as error:  # of whatever library the picture is
        raise ImageError(name, f"cannot be read: {error}") from error
    raise InputError(name, f"must be bytes, a path, a picture or a URL, not {type(picture).__name__}")


def to_json(data: Any) -> bytes:
    """JSON, in which bytes are base64 text. Raises: InputError: it holds something else that JSON has not."""
    try:
        return orjson.dumps(data, default=_text)
    except TypeError as error:
        raise InputError("body", str(error)) from None


def _text(value: Any) -> str:
    if isinstance(value, bytes | bytearray | memoryview):
        return base64.b64encode(value).decode()
    raise TypeError


def to_frame(data: Any) -> bytes:
    """A realtime frame. Raises: InputError: it holds what msgpack has not; TooLarge: no server takes it."""
    try:
        frame = bytes(msgpack.packb(data))
    except (TypeError, ValueError, OverflowError) as error:
        raise InputError("body", str(error)) from None
    if len(frame) > wire.MAX_MESSAGE_BYTES:
        raise TooLarge(f"a message may have {wire.MAX_MESSAGE_BYTES >> 20} MiB, and this one has more")
    return frame


@contextmanager
def understood() -> Iterator[None]:
    """What is read in this block came from a server, or from something that only answers in its place."""
    try:
        yield
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise LcmError(f"this is no answer of an lcm-rt server: {error!r}") from error


def from_json(text: bytes | str) -> Any:
    """JSON of a server. Raises: LcmError: it is none."""
    with understood():
        return orjson.loads(text)


def from_frame(frame: bytes | str) -> dict[str, Any]:
    """What a server's frame holds. Raises: LcmError: it is none."""
    with understood():
        data = orjson.loads(frame) if isinstance(frame, str) else msgpack.unpackb(frame)
        if not isinstance(data, dict):
            raise TypeError("a frame must be a map")
        return data


def address_of(entry: Mapping[str, Any]) -> str | None:
    """Where a picture of an answer lies, if it is not in the answer."""
    url = entry.get("url")
    return url if url and not url.startswith("data:") else None


def _image_of(entry: Mapping[str, Any], fetched: Mapping[str, bytes]) -> Image:
    content: Any = entry.get("content")
    if url := address_of(entry):
        content = fetched[url]
    elif content is None:
        content = b"".join(wire.read_data_uri("images", entry["url"]))
    return Image(content, entry["content_type"], entry["width"], entry["height"], url)


def output_of(data: Mapping[str, Any], fetched: Mapping[str, bytes]) -> Output:
    """An answer; ``fetched`` has the pictures that are not in it, by address. Raises: LcmError: it is none."""
    with understood():
        return Output(
            images=[_image_of(entry, fetched) for entry in data["images"]],
            seed=data["seed"],
            model=data["model"],
            prompt=data["prompt"],
            num_inference_steps=data["num_inference_steps"],
            timings=data["timings"],
            flagged=data["nsfw_content_detected"],
            request_id=data.get("request_id"),
        )


def preview_of(data: Mapping[str, Any]) -> Preview:
    """A picture on its way. Raises: LcmError: it is none."""
    with understood():
        (entry,) = data["images"]
        return Preview(
            image=_image_of(entry, {}),
            step=data["step"],
            num_inference_steps=data["num_inference_steps"],
            seed=data["seed"],
            request_id=data.get("request_id"),
        )


def status_of(data: Mapping[str, Any]) -> Status:
    """How far a job is. Raises: LcmError: it does not say so."""
    with understood():
        return Status(
            state=data["status"],
            position=data.get("queue_position"),
            logs=[Log(line["message"], line["level"], line["timestamp"]) for line in data.get("logs") or ()],
            error=data.get("error"),
            metrics=data.get("metrics") or {},
        )


def error_of(data: Any, *, code: str | None = None, status: int = 500) -> LcmError:
    """The error that a body or a control frame tells of.

    Args:
        code: its kind; where that is unknown, what ``status`` means.
    """
    data = data if isinstance(data, dict) else {}
    detail = data.get("detail")
    message = data.get("message") or data.get("reason") or detail
    if not isinstance(message, str):
        message = f"the server answered with status {status}"
    said, others = {"message": message, "field": "body", "kind": "value_error"}, []
    if isinstance(detail, list) and detail:
        with understood():
            first, *others = detail
            field = ".".join(map(str, first["loc"][1:]))
            said = {"message": first["msg"], "field": field or "body", "kind": first["type"]}
    for known in (code, _CODES.get(status)):
        error = from_wire({**said, "code": known})
        if isinstance(error, InputError):
            error.others = others
        if type(error) is not LcmError:
            return error
    error = LcmError(said["message"])
    error.code, error.status = code or LcmError.code, status
    return error

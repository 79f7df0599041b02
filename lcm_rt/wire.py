"""Frames and bodies to types and back: the only place with the platform's message shapes; knows no socket.

A binary frame is msgpack, a text frame is JSON, decided per frame; an answer is in the codec of its question. Control
frames are always JSON text, because the platform's older clients hand every binary frame to the application.
"""

from __future__ import annotations

import binascii
from collections.abc import Iterator
from typing import Any, TypeVar
from urllib.parse import unquote_to_bytes

import msgpack
import orjson
import pybase64
from pydantic import BaseModel, ValidationError

from lcm_rt.errors import ImageError, InputError, LcmError
from lcm_rt.types import GenerateInput, GenerateOutput, GenerateResult, Preview, is_request_id

Model = TypeVar("Model", bound=BaseModel)

MAX_MESSAGE_BYTES = 32 * 2**20

MAX_ELEMENTS = 20_000
_MAX_CONTAINERS = 256  # a megabyte of nested empty arrays would be seventy of objects
_MAX_PERCENT_BYTES = 2**16  # percent-encoding is for short texts, and slow
_SLICE = 2**22  # base64 characters decoded in one go, less than a millisecond's work; a multiple of 4


def decode_frame(frame: bytes | str) -> dict[str, Any]:
    """The map that a client's frame holds.

    Raises:
        InputError: not msgpack (bytes) or JSON (text), too deep, too many elements, or not a map.
    """
    data = decode_json(frame) if isinstance(frame, str) else _decode_msgpack(frame)
    if not isinstance(data, dict):
        raise InputError("body", "a message must be a map of field names to values", "dict_type")
    return data


def decode_json(text: bytes | str) -> Any:
    """JSON of any shape. Raises: InputError: malformed, too deep or too many elements."""
    if _has_many(text):
        raise InputError("body", f"has more than {MAX_ELEMENTS} elements", "too_long")
    try:
        return orjson.loads(text)
    except orjson.JSONDecodeError as error:
        raise InputError("body", "is not valid JSON", "json_invalid") from error


def _has_many(text: bytes | str) -> bool:
    """More than ``MAX_ELEMENTS`` of what may each become an object of a hundred bytes."""
    marks: tuple[Any, ...] = (",", "[", "{") if isinstance(text, str) else (b",", b"[", b"{")
    if len(text) <= MAX_ELEMENTS:
        return False
    # A message has a few dozen, and pictures have none. To skip those is many times as fast as to count in them.
    few = 100
    for mark in marks:
        at = text.find(mark)
        while at >= 0:
            few -= 1
            if not few:
                return sum(map(text.count, marks)) > MAX_ELEMENTS
            at = text.find(mark, at + 1)
    return False


def _decode_msgpack(frame: bytes) -> Any:
    containers = 0

    def count(container: Any) -> Any:
        nonlocal containers
        containers += 1
        if containers > _MAX_CONTAINERS:
            raise ValueError("too many containers")
        return container

    try:
        return msgpack.unpackb(
            frame,
            strict_map_key=True,
            max_str_len=MAX_MESSAGE_BYTES,
            max_bin_len=MAX_MESSAGE_BYTES,
            max_array_len=_MAX_CONTAINERS,
            max_map_len=_MAX_CONTAINERS,
            max_ext_len=16,
            list_hook=count,
            object_hook=count,
        )
    except (ValueError, RecursionError, msgpack.UnpackException) as error:
        raise InputError("body", "is not valid msgpack, or has too many elements", "msgpack_invalid") from error


def parse_input(data: Any) -> GenerateInput:
    """Validate a client's map. Raises: InputError, as ``parse``."""
    return parse(GenerateInput, data)


def parse(kind: type[Model], data: Any) -> Model:
    """Validate what a client says as a ``kind``.

    Raises:
        InputError: names the first field that is wrong; ``detail()`` has one entry for each.
    """
    try:
        return kind.model_validate(data)
    except ValidationError as error:
        first, *others = error.errors(include_url=False, include_context=False, include_input=False)
        raise InputError(
            ".".join(map(str, first["loc"])) or "body",
            first["msg"],
            first["type"],
            [{"loc": ["body", *other["loc"]], "msg": other["msg"], "type": other["type"]} for other in others],
        ) from None


def read_data_uri(field: str, uri: str) -> Iterator[bytes]:
    """The bytes that a ``data:`` URI holds (RFC 2397), in parts: let others run between them.

    Raises:
        ImageError: malformed; names ``field``.
    """
    head, comma, data = uri.partition(",")
    if not comma:
        raise ImageError(field, "this data URI has no comma before its data")
    if not head.lower().endswith(";base64"):
        if len(data) > _MAX_PERCENT_BYTES:
            raise ImageError(field, "this data URI is long, and not base64")
        yield unquote_to_bytes(data)
        return
    data = data.strip()
    try:
        for start in range(0, len(data), _SLICE):
            yield pybase64.b64decode(data[start : start + _SLICE], validate=True)
    except (binascii.Error, ValueError):
        raise ImageError(field, "this data URI is not valid base64") from None


def data_uri(picture: GenerateResult | Preview) -> str:
    return f"data:{picture.content_type};base64,{pybase64.b64encode_as_string(picture.image)}"


def output_fields(output: GenerateOutput) -> dict[str, Any]:
    """What every answer says beside its pictures."""
    first = output.results[0]
    fields: dict[str, Any] = {
        "timings": {name: round(seconds, 5) for name, seconds in first.timings.items()},
        "seed": first.seed,
        "num_inference_steps": first.num_inference_steps,
        "nsfw_content_detected": [result.flagged for result in output.results],
        "prompt": output.prompt,
        "model": first.model,
    }
    if output.request_id is not None:
        fields["request_id"] = output.request_id
    return fields


def image_entry(picture: GenerateResult | Preview, url: str) -> dict[str, Any]:
    """One of ``images``, by reference."""
    return {"url": url, **_about(picture)}


def _content_entry(picture: GenerateResult | Preview) -> dict[str, Any]:
    return {"content": picture.image, **_about(picture)}


def _about(picture: GenerateResult | Preview) -> dict[str, Any]:
    return {"width": picture.width, "height": picture.height, "content_type": picture.content_type}


def _wants_uri(wanted: GenerateInput) -> bool:
    """Applications that send their own picture as a URL put ``images[0].url`` into an ``<img>``."""
    return wanted.sync_mode or wanted.image_url is not None


def _pack(data: dict[str, Any], frame: bytes | str) -> bytes | str:
    return orjson.dumps(data).decode() if isinstance(frame, str) else bytes(msgpack.packb(data))


def encode_output(output: GenerateOutput, wanted: GenerateInput, frame: bytes | str) -> bytes | str:
    """The answer to ``wanted``, which came as ``frame``, in that frame's codec.

    JSON text carries data URIs. Msgpack carries bytes, unless the client asked for ``sync_mode`` or sent its own
    picture as a URL.
    """
    fields = output_fields(output)
    if isinstance(frame, str) or _wants_uri(wanted):
        return _pack({"images": [image_entry(r, data_uri(r)) for r in output.results], **fields}, frame)
    if wanted.image is not None:
        fields["image"] = output.results[0].image  # the first camera demos read it here
    return _pack({"images": [_content_entry(r) for r in output.results], **fields}, frame)


def preview_fields(preview: Preview, wanted: GenerateInput) -> dict[str, Any]:
    """A picture on its way to the answer to ``wanted``, as JSON has it: with a data URI."""
    return {"images": [image_entry(preview, data_uri(preview))], **_about_preview(preview, wanted)}


def _about_preview(preview: Preview, wanted: GenerateInput) -> dict[str, Any]:
    fields: dict[str, Any] = {
        "preview": True,
        "step": preview.step,
        "num_inference_steps": preview.num_inference_steps,
        "seed": preview.seed,
    }
    if wanted.request_id is not None:
        fields["request_id"] = wanted.request_id
    return fields


def encode_preview(preview: Preview, wanted: GenerateInput, frame: bytes | str) -> bytes | str:
    """A picture on its way to the answer to ``wanted``, in the form that the answer will have.

    It says ``preview: true``, how many steps it has behind it, and its seed.
    """
    if isinstance(frame, str) or _wants_uri(wanted):
        return _pack(preview_fields(preview, wanted), frame)
    return _pack({"images": [_content_entry(preview)], **_about_preview(preview, wanted)}, frame)


def encode_error(error: LcmError, request_id: Any = None) -> str:
    """A control frame: the message failed, the socket stays usable.

    The keys beside ``type``, ``error`` and ``reason`` are ours; the platform's clients hand them on untouched.
    """
    frame: dict[str, Any] = {
        "type": "x-fal-error",
        "error": error.code,
        "reason": str(error),
        "retryable": error.retryable,
    }
    if isinstance(error, InputError):
        frame["detail"] = error.detail()
    if request_id is not None:
        frame["request_id"] = request_id
    return orjson.dumps(frame, default=str).decode()


def encode_notice(action: str, **fields: Any) -> str:
    """A control frame that the platform's clients skip and our page reads."""
    return orjson.dumps({"type": "x-fal-message", "action": action, **fields}).decode()


def encode_unauthorized() -> str:
    """The control frame before a connection without a good key or token is closed; the clients get a fresh one."""
    return orjson.dumps({"status": "error", "error": "Unauthorized"}).decode()


def encode_idle_timeout() -> str:
    """The control frame before an idle connection is closed; the platform's clients take it for a normal end."""
    return orjson.dumps(
        {"type": "x-fal-error", "error": "TIMEOUT", "reason": "no inputs, reconnect when needed!"}
    ).decode()


def request_id_of(data: Any) -> Any:
    """The request id in a map that may be invalid otherwise."""
    value = data.get("request_id") if isinstance(data, dict) else None
    return value if is_request_id(value) else None


def error_body(error: LcmError) -> bytes:
    """An error as a JSON body: ``detail`` for the Python clients, ``message`` for the JavaScript ones."""
    detail: Any = error.detail() if isinstance(error, InputError) else str(error)
    return orjson.dumps({"detail": detail, "message": str(error), "error_type": error.code})

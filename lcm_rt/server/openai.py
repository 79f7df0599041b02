"""The images API of OpenAI's clients: their fields, answers, events and errors, over the one road of ``service``.

docs/openai.md says what each field means here. What we have and OpenAI has not may be said beside it (``EXTENSIONS``).
"""

from __future__ import annotations

import asyncio
import base64
import re
import secrets
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, Literal

import orjson
from pydantic import BaseModel, ConfigDict, Field, model_validator
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import Field as TextPart
from python_multipart.multipart import File as FilePart
from python_multipart.multipart import FormParser, parse_options_header
from sse_starlette import EventSourceResponse, ServerSentEvent
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from lcm_rt import wire
from lcm_rt.auth import Principal
from lcm_rt.errors import InputError, LcmError, NotFound, Overloaded, Unauthorized
from lcm_rt.server.addressing import address_of
from lcm_rt.server.replies import error_headers, json_response, read_body
from lcm_rt.server.run import file_lifecycle_of, while_here
from lcm_rt.service import Service
from lcm_rt.types import MAX_IMAGES, Format, GenerateInput, GenerateOutput, GenerateResult, Preview

PREFIX = "/v1/"

MAX_PARTIAL_IMAGES = 3
MAX_PARTS = 64  # of a form
MAX_FIELD_BYTES = 64 * 2**10
_SLICE = 2**16  # bytes of a form that are parsed in one go

EXTENSIONS = (
    "negative_prompt",
    "seed",
    "num_inference_steps",
    "guidance_scale",
    "strength",
    "image_url",
    "mask_url",
    "mask_alpha",
    "inpaint_mask_only",
    "controlnet_inpaint",
    "lora_url",
    "lora_scale",
    "enable_safety_checks",
    "enable_safety_checker",
)
"""Fields of our own input that are taken beside OpenAI's."""

_THEIR_MODELS = re.compile(r"dall-e-[23]|(?:chatgpt|gpt)-image(?:-.*)?")
_THEIR_FIELDS = {"image_bytes": "image", "mask_bytes": "mask", "image_size": "size"}
_THEIR_CODES: dict[type[LcmError], str] = {
    Unauthorized: "invalid_api_key",
    NotFound: "model_not_found",
    Overloaded: "rate_limit_exceeded",
}
_NO_USAGE = {
    "input_tokens": 0,
    "input_tokens_details": {"image_tokens": 0, "text_tokens": 0},
    "output_tokens": 0,
    "total_tokens": 0,
}

Handler = Callable[[Request, Exception], Awaitable[Response]]


class ImagesInput(BaseModel):
    """What OpenAI's clients say of a picture. Unknown keys are ignored; ``null`` means the default."""

    model_config = ConfigDict(extra="ignore", json_schema_extra={"examples": [{"prompt": "sunset over a lake"}]})

    prompt: str
    model: str | None = Field(
        None, max_length=200, description="A served model's name. OpenAI's own names mean the server's default."
    )
    n: int = Field(1, ge=1, le=MAX_IMAGES)
    size: str = Field(
        "auto",
        pattern=r"^(auto|[0-9]{1,4}x[0-9]{1,4})$",
        description="`auto`, or width x height in multiples of 8, such as 512x512.",
    )
    response_format: Literal["url", "b64_json"] | None = Field(
        None, description="By default b64_json for the names of OpenAI's GPT models, else url."
    )
    output_format: Format = "png"
    output_compression: int = Field(100, ge=0, le=100, description="Quality of JPEG and WebP.")
    quality: Literal["auto", "low", "medium", "high", "xhigh", "max", "standard", "hd"] = Field(
        "auto", description="Changes nothing: num_inference_steps does."
    )
    background: Literal["auto", "opaque"] = "auto"
    moderation: Literal["auto", "low"] = Field("auto", description="Changes nothing: enable_safety_checks does.")
    style: Literal["vivid", "natural"] = Field("vivid", description="Changes nothing.")
    stream: bool = False
    partial_images: int = Field(0, ge=0, le=MAX_PARTIAL_IMAGES, description="Pictures on the way, with `stream`.")

    @model_validator(mode="before")
    @classmethod
    def _null_is_default(cls, data: Any) -> Any:
        return {key: value for key, value in data.items() if value is not None} if isinstance(data, dict) else data

    @property
    def is_inline(self) -> bool:
        """Pictures come as base64."""
        if self.response_format is None:
            return "gpt-image" in (self.model or "")
        return self.response_format == "b64_json"

    def sends(self, preview: Preview, sent: int) -> bool:
        """Whether the client gets ``preview``, after ``sent`` others: they lie evenly between beginning and end."""
        parts = self.partial_images + 1
        return sent < self.partial_images and preview.step * parts >= (sent + 1) * preview.num_inference_steps


async def generations(request: Request) -> Response:
    """``POST /v1/images/generations``: pictures of a prompt."""
    _name(request)
    fields = wire.decode_json(await read_body(request))
    return await _paint(request, "image_generation", fields, {})


async def edits(request: Request) -> Response:
    """``POST /v1/images/edits``: a form with a picture, perhaps a mask whose transparent parts are painted anew."""
    _name(request)
    form = await _read_form(request)
    files: dict[str, Any] = {"image_bytes": form.file("image", "image[]"), "mask_alpha": True}
    if files["image_bytes"] is None:
        raise InputError("image", "there is no picture to edit", "missing")
    if (mask := form.file("mask")) is not None:
        # What is transparent is gone, says OpenAI, so nothing of it shall shine through.
        files |= {"mask_bytes": mask, "strength": 1.0}
    fields = {name: text for name, text in form.texts.items() if text or name == "prompt"}
    return await _paint(request, "image_edit", fields, files)


async def models(request: Request) -> Response:
    """``GET /v1/models``: what is served here."""
    served = request.app.state.service.workers.models
    return json_response({"object": "list", "data": [_model(name) for name in served]})


async def model(request: Request) -> Response:
    """``GET /v1/models/{name}``: one of them."""
    service, name = request.app.state.service, request.path_params["name"]
    if name not in service.workers.models:
        raise _no_model(name, service)
    return json_response(_model(name))


def in_dialect(otherwise: Handler) -> Handler:
    """An exception handler that answers as OpenAI does below ``/v1/``, and as ``otherwise`` elsewhere."""

    async def answer(request: Request, error: Exception) -> Response:
        if not request.scope["path"].startswith(PREFIX):
            return await otherwise(request, error)
        headers = getattr(request.state, "headers", {})
        if isinstance(error, HTTPException):
            refusal = _error_body(error.detail, error.status_code)
            return json_response(refusal, error.status_code, {**(error.headers or {}), **headers})
        if isinstance(error, LcmError):
            request.app.state.service.metrics.errors.labels(error.code).inc()
        else:
            error = LcmError("the server failed on this request")
        return json_response(_told(error), status_of(type(error)), {**error_headers(error), **headers})

    return answer


def status_of(kind: type[LcmError]) -> int:
    """The HTTP status that such an error has in this dialect."""
    return 400 if issubclass(kind, InputError) else kind.status


def code_of(kind: type[LcmError]) -> str:
    """Its ``code`` in this dialect."""
    return _THEIR_CODES.get(kind, kind.code)


def _told(error: LcmError) -> dict[str, Any]:
    code = code_of(type(error))
    if not isinstance(error, InputError):
        return _error_body(str(error), error.status, code=code)
    name = error.field.partition(".")[0]
    name = _THEIR_FIELDS.get(name, name)
    return _error_body(f"{name}: {error.message}", 400, param=None if name == "body" else name, code=code)


def _error_body(message: str, status: int, *, param: str | None = None, code: str | None = None) -> dict[str, Any]:
    kind = "server_error" if status >= 500 else "rate_limit_error" if status == 429 else "invalid_request_error"
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def _name(request: Request) -> None:
    """Give the request its id, whatever becomes of it."""
    id = secrets.token_hex(16)
    request.state.headers = {"x-request-id": id, "x-fal-request-id": id}


def _model(name: str) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": 0, "owned_by": "lcm-rt"}  # when it was made is not known


def _no_model(name: str, service: Service) -> NotFound:
    return NotFound(f"the model {name!r} is not served here; there is {', '.join(service.workers.models)}")


# ---- forms -----------------------------------------------------------------------------------------------------------


class _Form:
    """What a form says: the last text, and all files, of each name."""

    def __init__(self) -> None:
        self.texts: dict[str, str] = {}
        self.is_whole = False
        self._files: dict[str, list[bytes]] = defaultdict(list)
        self._parts = 0

    def add_text(self, part: TextPart) -> None:
        """Raises: InputError: it is one too many, or too long."""
        name, value = self._name(part.field_name), part.value or b""
        if len(value) > MAX_FIELD_BYTES:
            raise InputError(name, f"is larger than {MAX_FIELD_BYTES >> 10} KiB", "too_long")
        self.texts[name] = value.decode(errors="replace")

    def add_file(self, part: FilePart) -> None:
        """Raises: InputError: it is one too many."""
        part.file_object.seek(0)
        self._files[self._name(part.field_name)].append(part.file_object.read())

    def _name(self, name: bytes | None) -> str:
        self._parts += 1
        if self._parts > MAX_PARTS:
            raise InputError("body", f"has more than {MAX_PARTS} parts", "too_long")
        return (name or b"").decode(errors="replace")

    def end(self) -> None:
        self.is_whole = True

    def file(self, *names: str) -> bytes | None:
        """The one file under any of ``names``. Raises: InputError: it is text, or several."""
        if not self.texts.keys().isdisjoint(names):
            raise InputError(names[0], "must be a file, with a file name")
        given = [file for name in names for file in self._files.get(name, ())]
        if len(given) > 1:
            raise InputError(names[0], f"must be one file, not {len(given)}", "too_long")
        return given[0] if given else None


async def _read_form(request: Request) -> _Form:
    """A multipart body, kept in memory. Raises: InputError: too large, or not multipart; BodyTimeout; ClientDisconnect.

    Not starlette's, which writes files to disk, as many and as large as they come.
    """
    kind, options = parse_options_header(request.headers.get("content-type", ""))
    boundary = options.get(b"boundary")
    if kind != b"multipart/form-data" or not boundary:
        raise InputError("body", "must be multipart/form-data, with a boundary")
    body, form = await read_body(request), _Form()
    config = {"MAX_MEMORY_FILE_SIZE": len(body) + 1}
    try:
        parser = FormParser(kind.decode(), form.add_text, form.add_file, form.end, boundary=boundary, config=config)
        for start in range(0, len(body), _SLICE):
            parser.write(body[start : start + _SLICE])
            await asyncio.sleep(0)  # hostile bytes are parsed slowly, and the others shall not wait for it
    except FormParserError:
        raise InputError("body", "is not a form as its content type says") from None
    if not form.is_whole:
        raise InputError("body", "ends in the middle of the form")
    return form


# ---- pictures --------------------------------------------------------------------------------------------------------


async def _paint(request: Request, kind: str, fields: Any, files: dict[str, Any]) -> Response:
    """Answer ``fields`` of a client; ``files`` are fields of our own input that it cannot say otherwise."""
    service: Service = request.app.state.service
    said = wire.parse(ImagesInput, fields)
    ours = files | {name: fields[name] for name in EXTENSIONS if fields.get(name) is not None}
    ours |= {
        "prompt": said.prompt,
        "model": _served(said.model, service),
        "num_images": said.n,
        "format": said.output_format,
        "quality": max(1, said.output_compression),
        "previews": said.partial_images > 0,
    }
    if said.size != "auto":
        ours["image_size"] = dict(zip(("width", "height"), map(int, said.size.split("x")), strict=True))
    wanted = wire.parse_input(ours)
    if said.stream:
        return await _stream(request, kind, said, wanted)
    if said.partial_images:
        raise InputError("partial_images", "needs stream")
    answer = await while_here(request, _answer(request, said, wanted))
    return Response(status_code=499) if answer is None else json_response(answer, headers=request.state.headers)


def _served(name: str | None, service: Service) -> str | None:
    """The model that ``name`` means, or None for the default. Raises: NotFound."""
    if name is None or name in service.workers.models:
        return name
    if _THEIR_MODELS.fullmatch(name):
        return None
    raise _no_model(name, service)


async def _answer(request: Request, said: ImagesInput, wanted: GenerateInput) -> dict[str, Any]:
    service: Service = request.app.state.service
    principal: Principal = request.state.principal
    output = await service.run(wanted, app_model=service.default_model, priority="run", owner=principal.owner)
    address, life = address_of(request), file_lifecycle_of(request)
    entries: list[dict[str, Any]] = []
    for result in output.results:
        if said.is_inline:
            entry = {"b64_json": _base64(result)}
        else:
            name = await service.files.put(
                result.image, result.content_type, owner=principal.owner, ttl_s=life.ttl_s, access=life.access
            )
            entry = {"url": address.file(name)}
        entries.append({**entry, "seed": result.seed, "nsfw_content_detected": result.flagged})
    first = output.results[0]
    return {
        "created": int(time.time()),
        "data": entries,
        "background": "opaque",
        "output_format": said.output_format,
        "size": f"{first.width}x{first.height}",
        "usage": _NO_USAGE,
        "model": first.model,
    }


async def _stream(request: Request, kind: str, said: ImagesInput, wanted: GenerateInput) -> Response:
    """The picture, and before it some on the way, as server-sent events; an error before them is an ordinary one."""
    service: Service = request.app.state.service
    principal: Principal = request.state.principal
    if said.n != 1:
        raise InputError("n", "must be 1 with stream")
    shown: asyncio.Queue[Preview | None] = asyncio.Queue()
    ongoing = await service.start(
        wanted,
        app_model=service.default_model,
        priority="run",
        owner=principal.owner,
        on_preview=shown.put_nowait,
    )

    async def events() -> AsyncIterator[ServerSentEvent]:
        finishing = asyncio.ensure_future(ongoing.output())
        finishing.add_done_callback(lambda _: shown.put_nowait(None))
        sent = 0
        try:
            while preview := await shown.get():
                if said.sends(preview, sent):
                    yield _event(f"{kind}.partial_image", said, preview, partial_image_index=sent)
                    sent += 1
            output: GenerateOutput = finishing.result()
        except LcmError as error:
            service.metrics.errors.labels(error.code).inc()
            yield ServerSentEvent(orjson.dumps(_told(error)).decode(), event="error")
        else:
            service.count(output, "run")
            (result,) = output.results
            yield _event(
                f"{kind}.completed",
                said,
                result,
                usage=_NO_USAGE,
                model=result.model,
                nsfw_content_detected=result.flagged,
            )
        finally:
            finishing.cancel()

    return EventSourceResponse(events(), headers=request.state.headers)


def _event(kind: str, said: ImagesInput, picture: GenerateResult | Preview, **more: Any) -> ServerSentEvent:
    data = {
        "type": kind,
        "b64_json": _base64(picture),
        "background": "opaque",
        "created_at": int(time.time()),
        "output_format": said.output_format,
        "quality": "auto",
        "size": f"{picture.width}x{picture.height}",
        "seed": picture.seed,
        **more,
    }
    return ServerSentEvent(orjson.dumps(data).decode(), event=kind)


def _base64(picture: GenerateResult | Preview) -> str:
    return base64.b64encode(picture.image).decode()

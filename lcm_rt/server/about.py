"""What is to be said of each route and of each socket: what it takes, what it answers, and what may go wrong."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, NamedTuple

from pydantic import BaseModel, Field, create_model

from lcm_rt.errors import (
    BadRequest,
    BodyTimeout,
    DownloadError,
    EngineLost,
    Forbidden,
    GenerationFailed,
    ImageError,
    InputError,
    LcmError,
    ModelLoading,
    NotFound,
    OutOfMemory,
    Overloaded,
    RequestTimeout,
    TooLarge,
    Unauthorized,
    Unavailable,
)
from lcm_rt.server import docs, health, jwks, kit, models, openai, queue, run, shapes, storage, tokens
from lcm_rt.server.guard import Handler
from lcm_rt.types import GenerateInput

EVENTS = "text/event-stream"

Said = type[BaseModel] | str | None
"""The model of a JSON body, or the media type of another one, or no body."""


class About(NamedTuple):
    """
    Args:
        answers: by status; several bodies where the client chooses.
        events: what comes as server-sent events, as JSON.
        raises: beside what the door of the route does.
        parameters: names in ``PARAMETERS``.
        security: names of schemes, where the handler itself looks at them; an empty one is none.
    """

    tag: str
    summary: str
    answers: dict[int, Said | Sequence[Said]]
    body: Said = None
    media_type: str = "application/json"
    events: Sequence[type[BaseModel]] = ()
    raises: Sequence[type[LcmError]] = ()
    parameters: Sequence[str] = ()
    security: Sequence[str] = ()


_OURS: dict[str, Any] = {
    name: (field.annotation, field) for name, field in GenerateInput.model_fields.items() if name in openai.EXTENSIONS
}
_FILE = {"type": "string", "format": "binary", "contentMediaType": "application/octet-stream"}
_File = Annotated[bytes, Field(json_schema_extra=_FILE)]
OpenAIGeneration = create_model("OpenAIGeneration", __base__=openai.ImagesInput, **_OURS)
OpenAIEdit = create_model("OpenAIEdit", __base__=openai.ImagesInput, image=(_File, ...), mask=(_File, None), **_OURS)

_OPENAI_EVENTS = (shapes.OpenAIPartialImage, shapes.OpenAICompleted, shapes.OpenAIError)

_BODY = (InputError, BodyTimeout)
_PICTURE = (
    *_BODY,
    NotFound,
    ImageError,
    DownloadError,
    Overloaded,
    Unavailable,
    ModelLoading,
    EngineLost,
    OutOfMemory,
    GenerationFailed,
    RequestTimeout,
)
_UPLOAD = (BadRequest, NotFound, TooLarge, Unavailable, BodyTimeout, InputError)
DOOR = (Unauthorized, Forbidden, Overloaded, Unavailable)
_TIMES = ("x-fal-request-timeout", "x-fal-object-lifecycle-preference")
_WISH = ("x-fal-object-lifecycle", "x-fal-object-lifecycle-preference")
_CDN = ("storage", "key", "bearer")

ABOUT: dict[Handler, About] = {
    run.run: About(
        "run",
        "Paint pictures, and wait for them",
        {200: shapes.Pictures},
        body=GenerateInput,
        raises=_PICTURE,
        parameters=_TIMES,
    ),
    run.stream: About(
        "run",
        "Paint pictures, and see them on their way",
        {200: EVENTS},
        body=GenerateInput,
        events=(shapes.PreviewEvent, shapes.Pictures, shapes.StreamError),
        raises=_PICTURE,
        parameters=_TIMES,
    ),
    queue.submit: About(
        "queue",
        "Have pictures painted later",
        {200: shapes.JobStatus},
        body=GenerateInput,
        raises=(*_BODY, NotFound, BadRequest, DownloadError, Overloaded, Unavailable),
        parameters=("fal_webhook", "x-fal-queue-priority", *_TIMES, "x-fal-no-retry", "idempotency-key"),
    ),
    queue.status: About(
        "queue",
        "How far a job is: 202 until it is done",
        {200: shapes.JobStatus, 202: shapes.JobStatus},
        raises=(NotFound,),
        parameters=("logs",),
    ),
    queue.status_stream: About(
        "queue",
        "How far a job is, until it is done",
        {200: EVENTS},
        events=(shapes.JobStatus,),
        raises=(NotFound,),
        parameters=("logs",),
    ),
    queue.result: About(
        "queue",
        "What a job came to: the answer, or the error, that a run would have had",
        {200: shapes.Pictures, 499: shapes.Error},
        raises=(*_PICTURE, BadRequest),
    ),
    queue.cancel: About(
        "queue",
        "Cancel a job",
        {202: shapes.Cancelling, 400: shapes.NotCancelled, 404: shapes.NotCancelled},
        raises=(BadRequest, NotFound),
    ),
    tokens.create_token: About(
        "tokens",
        "A token for sockets and event streams of a page, which must not hold a key",
        {200: shapes.Token},
        body=tokens.TokenInput,
        raises=_BODY,
    ),
    jwks.jwks: About("webhooks", "The public keys of the platform's signatures", {200: shapes.PublicKeys}),
    jwks.secret: About("webhooks", "Your secret for the signatures of Standard Webhooks", {200: shapes.Secret}),
    storage.initiate: About(
        "storage",
        "A URL to put a file to, whole or in parts",
        {200: shapes.UploadPlace},
        body=shapes.UploadInput,
        raises=(*_BODY, TooLarge),
        parameters=_WISH,
    ),
    storage.put: About(
        "storage",
        "Put a whole file",
        {200: None},
        body="application/octet-stream",
        raises=_UPLOAD,
        security=("signature",),
    ),
    storage.put_part: About(
        "storage",
        "Put a part of a file",
        {200: shapes.UploadedPart},
        body="application/octet-stream",
        raises=_UPLOAD,
        security=("signature",),
    ),
    storage.complete: About(
        "storage",
        "Join the parts of a file",
        {200: shapes.UploadedFile},
        body=shapes.PartsInput,
        raises=_UPLOAD,
        security=("signature",),
    ),
    storage.create_token: About("storage", "A token for uploads", {200: shapes.StorageToken}),
    storage.upload: About(
        "storage",
        "Upload a whole file",
        {200: shapes.UploadedFile},
        body="application/octet-stream",
        raises=(*_UPLOAD, *DOOR),
        parameters=("x-fal-file-name", *_WISH),
        security=_CDN,
    ),
    storage.upload_parts: About(
        "storage",
        "Begin an upload in parts",
        {200: shapes.MultipartUpload},
        raises=(*_UPLOAD, *DOOR),
        parameters=("x-fal-file-name", *_WISH),
        security=_CDN,
    ),
    storage.upload_part: About(
        "storage",
        "Upload a part of a file",
        {200: shapes.UploadedPart},
        body="application/octet-stream",
        raises=(*_UPLOAD, *DOOR),
        security=_CDN,
    ),
    storage.upload_complete: About(
        "storage",
        "Join the uploaded parts of a file",
        {200: shapes.UploadedFile},
        body=shapes.PartsInput,
        raises=(*_UPLOAD, *DOOR),
        security=_CDN,
    ),
    storage.read: About(
        "storage",
        "A file: an answered picture, or an upload",
        {200: "*/*", 206: "*/*", 304: None, 416: shapes.Error},
        raises=(NotFound, Forbidden, Overloaded, Unavailable),
        parameters=("range", "if-range", "if-none-match"),
        security=("", *_CDN),
    ),
    models.models: About("models", "What is served, and how far it is loaded", {200: shapes.Models}),
    models.model_events: About(
        "models",
        "The same whenever it changes, as events named `models`, without end",
        {200: EVENTS},
        events=(shapes.ModelList,),
    ),
    models.load_model: About(
        "models",
        "Have a model loaded: 202 until it is",
        {200: shapes.Model, 202: shapes.Model},
        raises=(NotFound, Unavailable),
    ),
    models.unload_model: About(
        "models",
        "Have a model unloaded: 202 until it is",
        {200: shapes.Model, 202: shapes.Model},
        raises=(NotFound,),
    ),
    openai.generations: About(
        "openai",
        "Pictures of a prompt",
        {200: (shapes.OpenAIImages, EVENTS)},
        body=OpenAIGeneration,
        events=_OPENAI_EVENTS,
        raises=_PICTURE,
    ),
    openai.edits: About(
        "openai",
        "A picture, painted anew where its mask is transparent",
        {200: (shapes.OpenAIImages, EVENTS)},
        body=OpenAIEdit,
        media_type="multipart/form-data",
        events=_OPENAI_EVENTS,
        raises=_PICTURE,
    ),
    openai.models: About("openai", "What is served", {200: shapes.OpenAIModels}),
    openai.model: About("openai", "One of the models", {200: shapes.OpenAIModel}, raises=(NotFound,)),
    health.health: About("health", "Whether the server lives, and how the engine is", {200: shapes.Health}),
    health.ready: About(
        "health", "Whether every model is ready", {200: shapes.Alive}, raises=(Unavailable, ModelLoading)
    ),
    health.live: About("health", "Whether the server lives", {200: shapes.Alive}),
    health.metrics: About("health", "Counters, for Prometheus", {200: "text/plain"}),
    kit.file: About("kit", "What points the platform's clients here", {200: ("text/javascript", "text/x-python")}),
    docs.openapi_json: About("description", "This description", {200: "application/json"}),
    docs.asyncapi_json: About("description", "The description of the sockets, in AsyncAPI", {200: "application/json"}),
    docs.docs: About("description", "A page that shows this description", {200: "text/html"}, raises=(NotFound,)),
}

PATH_PARAMETERS: dict[str, tuple[str, dict[str, Any]]] = {
    "app": (
        "An application id such as `fal-ai/lcm`, slashes and all, or a served model's name.",
        {"type": "string", "example": "fal-ai/lcm"},
    ),
    "id": ("Of the job.", {"type": "string", "format": "uuid"}),
    "name": ("Of the model, or of the file.", {"type": "string"}),
    "number": ("Of the part, from 1 on.", {"type": "integer", "minimum": 1, "maximum": 10_000}),
    "upload": ("`uploadId` of the upload.", {"type": "string"}),
}
TEXT = {"type": "string"}
PARAMETERS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "fal_webhook": ("query", "What is told when it is done.", {"type": "string", "format": "uri"}),
    "logs": ("query", "Whether to tell the log.", {"enum": ["0", "1", "false", "true"]}),
    "x-fal-request-timeout": ("header", "Seconds in which it has to begin.", {"type": "number", "exclusiveMinimum": 0}),
    "x-fal-object-lifecycle": ("header", 'Such as `{"expiration_duration_seconds": 3600}`.', TEXT),
    "x-fal-object-lifecycle-preference": ("header", 'Such as `{"expiration_duration_seconds": 3600}`.', TEXT),
    "x-fal-queue-priority": ("header", "Low waits for all others.", {"enum": ["normal", "low"]}),
    "x-fal-no-retry": ("header", "`1`: not again after an engine died under it.", {"enum": ["0", "1"]}),
    "x-fal-file-name": ("header", "Your own name for the file.", TEXT),
    "idempotency-key": ("header", "The same key within a day is the same job.", {**TEXT, "maxLength": queue.MAX_KEY}),
    "range": ("header", "One run of bytes, such as `bytes=0-99`.", TEXT),
    "if-range": ("header", "The range counts only for this `ETag`.", TEXT),
    "if-none-match": ("header", "304 for this `ETag`.", TEXT),
}
"""By name: where it is, what it says, and its schema."""

SECURITY = {
    "key": {"type": "apiKey", "in": "header", "name": "Authorization", "description": "`Key ID:SECRET`"},
    "bearer": {"type": "http", "scheme": "bearer", "description": "The same key, `ID:SECRET`."},
    "storage": {"type": "http", "scheme": "bearer", "description": "A token of `/rest/storage/auth/token`."},
    "token": {"type": "apiKey", "in": "query", "name": "fal_jwt_token", "description": "A token of `/rest/tokens/`."},
    "signature": {"type": "apiKey", "in": "query", "name": "signature", "description": "As in `upload_url`."},
}


class Channel(NamedTuple):
    """A kind of socket: where it is, what it is for, what clients send, and what they get."""

    address: str
    summary: str
    sent: Sequence[type[BaseModel]]
    got: Sequence[type[BaseModel]]
    query: dict[str, Any]


_TOKEN = {"fal_jwt_token": {"type": "string", "description": "A token of `/rest/tokens/`."}}
_BUFFERING = {
    "type": "integer",
    "minimum": 1,
    "maximum": 60,
    "default": 1,
    "description": "How many messages may wait; beyond, the oldest is dropped.",
}

CHANNELS = {
    "realtime": Channel(
        "/{app}/realtime",
        "Latest wins: of messages that come faster than pictures are painted, the newest is answered, in order.",
        sent=(GenerateInput,),
        got=(
            shapes.RealtimePictures,
            shapes.RealtimePreview,
            shapes.RealtimeError,
            shapes.RealtimeNotice,
            shapes.RealtimeUnauthorized,
        ),
        query={**_TOKEN, "max_buffering": _BUFFERING},
    ),
    "oneshot": Channel(
        "/ws/{app}",
        "HTTP over a socket: each message is the body of a run; its answer is `start`, the body as JSON, `end`.",
        sent=(GenerateInput,),
        got=(shapes.OneshotStart, shapes.Pictures, shapes.Error, shapes.OneshotEnd),
        query=_TOKEN,
    ),
}

INPUTS = (GenerateInput, OpenAIGeneration, OpenAIEdit, tokens.TokenInput, shapes.UploadInput, shapes.PartsInput)
"""Models of what clients say; the others are of answers."""

"""What the answers and events look like, as pydantic models: their schemas are the description of this server.

Handlers write plain maps; ``tests/test_description.py`` holds these models against what they answer.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, RootModel


class Shape(BaseModel):
    """A map with exactly these keys."""

    model_config = ConfigDict(extra="forbid")


class FieldError(Shape):
    """One field that is wrong."""

    loc: list[str | int] = Field(description="`body`, then the way to the field.")
    msg: str
    type: str


class Error(Shape):
    """Whatever went wrong."""

    detail: str | list[FieldError] = Field(description="With status 422, the fields that are wrong; else as `message`.")
    message: str
    error_type: str | None = Field(None, description="As in the header `X-Fal-Error-Type`.")


# ---- pictures --------------------------------------------------------------------------------------------------------


class Picture(Shape):
    url: str = Field(description="A `/files/` address, or a `data:` URI.")
    width: int
    height: int
    content_type: str


class Pictures(Shape):
    """Finished pictures."""

    images: list[Picture]
    timings: dict[str, float] = Field(description="Seconds, by stage, of the first picture.")
    seed: int = Field(description="Of the first picture; the n-th one's is `seed + n - 1`.")
    num_inference_steps: int
    nsfw_content_detected: list[bool]
    prompt: str
    model: str
    request_id: str | float | None = None


class PreviewEvent(Shape):
    """A picture on its way."""

    preview: Literal[True]
    images: list[Picture]
    step: int
    num_inference_steps: int
    seed: int
    request_id: str | float | None = None


class StreamError(Error):
    """What went wrong after the stream had begun."""

    error: str


# ---- the queue -------------------------------------------------------------------------------------------------------


class LogLine(Shape):
    message: str
    level: str
    source: str
    timestamp: str


class JobStatus(Shape):
    """How far a job is. One that failed is completed too: then it has an `error`, and its result an HTTP status."""

    status: Literal["IN_QUEUE", "IN_PROGRESS", "COMPLETED"]
    request_id: str
    gateway_request_id: str
    response_url: str
    status_url: str
    cancel_url: str
    logs: list[LogLine] | None
    queue_position: int | None = Field(None, description="How many begin before it.")
    metrics: dict[str, float] | None = None
    error: str | None = None
    error_type: str | None = None


class Cancelling(Shape):
    status: Literal["CANCELLATION_REQUESTED"]


class NotCancelled(Error):
    status: Literal["ALREADY_COMPLETED", "NOT_FOUND"] | None = None


class JobEvent(Shape):
    """What a webhook is told: the body of the result, and whether it is one."""

    request_id: str
    gateway_request_id: str
    status: Literal["OK", "ERROR"]
    error: str | None
    payload: Any
    payload_error: str | None = None


# ---- keys ------------------------------------------------------------------------------------------------------------


class Token(RootModel[str]):
    """A token, and nothing else."""


class PublicKey(Shape):
    kty: Literal["OKP"]
    crv: Literal["Ed25519"]
    use: Literal["sig"]
    alg: Literal["EdDSA"]
    kid: str
    x: str


class PublicKeys(Shape):
    keys: list[PublicKey]


class Secret(Shape):
    secret: str = Field(description="`whsec_...`, as Standard Webhooks spells it.")


# ---- storage ---------------------------------------------------------------------------------------------------------


class UploadInput(BaseModel):
    """What is going to be uploaded."""

    content_type: str | None = None
    file_name: str | None = None


class UploadPlace(Shape):
    """Where to put a file, and where it will be."""

    upload_url: str
    file_url: str


class StorageToken(Shape):
    token: str
    token_type: Literal["Bearer"]
    base_url: str
    expires_at: str


class UploadedFile(Shape):
    access_url: str


class MultipartUpload(Shape):
    access_url: str
    uploadId: str


class UploadedPart(Shape):
    partNumber: int
    etag: str


class PartsInput(BaseModel):
    """The parts that make the file, in any order."""

    parts: list[UploadedPart] = Field(min_length=1)


# ---- models and health -----------------------------------------------------------------------------------------------


class Model(Shape):
    """A model, and how far it is."""

    name: str
    state: Literal["loading", "ready", "unloading", "unloaded", "failed"]
    stage: str
    progress: float = Field(ge=0, le=1)
    size: int = Field(description="Pixels a side, when nobody says.")
    steps: int = Field(description="When nobody says.")
    safety: bool | None
    controlnet: bool | None
    licence: str
    default: bool
    load_seconds: float | None
    backend: str = Field(description="How its networks run by now: eager, and later what the setting says.")
    tune_seconds: float | None = Field(description="After it was loaded, until they ran so.")
    error: str | None


class Models(Shape):
    models: list[Model]
    device: str | None


class ModelList(RootModel[list[Model]]):
    """An event: all models, as they are now."""


class Alive(Shape):
    status: Literal["ok"]


class Health(Shape):
    status: Literal["ready", "loading", "failed"]
    stage: str


# ---- the OpenAI dialect ----------------------------------------------------------------------------------------------


class OpenAIErrorBody(Shape):
    message: str
    type: Literal["invalid_request_error", "rate_limit_error", "server_error"]
    param: str | None
    code: str | None


class OpenAIError(Shape):
    """Whatever went wrong, in OpenAI's words."""

    error: OpenAIErrorBody


class TokenDetails(Shape):
    image_tokens: int
    text_tokens: int


class Usage(Shape):
    """Nothing is counted here."""

    input_tokens: int
    input_tokens_details: TokenDetails
    output_tokens: int
    total_tokens: int


class OpenAIImage(Shape):
    """Either `url` or `b64_json`."""

    url: str | None = None
    b64_json: str | None = None
    seed: int
    nsfw_content_detected: bool


class OpenAIImages(Shape):
    created: int
    data: list[OpenAIImage]
    background: Literal["opaque"]
    output_format: Literal["png", "jpeg", "webp"]
    size: str
    usage: Usage
    model: str


class OpenAIPicture(Shape):
    b64_json: str
    background: Literal["opaque"]
    created_at: int
    output_format: Literal["png", "jpeg", "webp"]
    quality: Literal["auto"]
    size: str
    seed: int


class OpenAIPartialImage(OpenAIPicture):
    """An event: a picture on its way."""

    type: Literal["image_generation.partial_image", "image_edit.partial_image"]
    partial_image_index: int


class OpenAICompleted(OpenAIPicture):
    """An event: the picture."""

    type: Literal["image_generation.completed", "image_edit.completed"]
    usage: Usage
    model: str
    nsfw_content_detected: bool


class OpenAIModel(Shape):
    id: str
    object: Literal["model"]
    created: int
    owned_by: str


class OpenAIModels(Shape):
    object: Literal["list"]
    data: list[OpenAIModel]


# ---- sockets ---------------------------------------------------------------------------------------------------------


class RawPicture(Shape):
    """As JSON it has a `url`; as msgpack it has `content`, the bytes of the file, where no URL was asked for."""

    content: Annotated[str | None, Field(json_schema_extra={"contentEncoding": "binary"})] = None
    url: str | None = None
    width: int
    height: int
    content_type: str


class RealtimePictures(Pictures):
    """The answer to one message, in its codec."""

    images: list[RawPicture]  # type: ignore[assignment]
    image: Annotated[str | None, Field(description="The first picture's bytes, for messages with `image`.")] = None


class RealtimePreview(PreviewEvent):
    """A picture on its way to an answer, in the message's codec."""

    images: list[RawPicture]  # type: ignore[assignment]


class RealtimeError(Shape):
    """A message failed, and the socket stays usable; or `TIMEOUT`, and it is closed."""

    type: Literal["x-fal-error"]
    error: str
    reason: str
    retryable: bool | None = None
    detail: list[FieldError] | None = None
    request_id: str | float | None = None


class RealtimeNotice(Shape):
    """The model that a message needs is still on its way."""

    type: Literal["x-fal-message"]
    action: Literal["loading"]
    stage: str


class RealtimeUnauthorized(Shape):
    """No good key or token; the socket is closed."""

    status: Literal["error"]
    error: Literal["Unauthorized"]


class OneshotStart(Shape):
    type: Literal["start"]
    request_id: str
    status: int
    headers: dict[str, str]


class OneshotEnd(Shape):
    type: Literal["end"]
    request_id: str
    status: int

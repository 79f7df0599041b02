"""Everything that can go wrong, as one tree; knows no HTTP library, no socket, no tensor.

    LcmError
    ├── InputError          the client's words are wrong (422)
    │   ├── ImageError      ... and it is a picture that cannot be used
    │   └── DownloadError   ... and it is a URL whose bytes cannot be had
    ├── BadRequest          not now, or not in this way (400)
    ├── Unauthorized        no key, or one that does not open this (401)
    ├── Forbidden           a key that is known, and may not do this (403)
    ├── NotFound            no such app, model, job or file (404)
    ├── BodyTimeout         the client took too long to say what it wants (408)
    ├── TooLarge            more bytes than are taken (413)
    ├── Overloaded          more work than the server takes on (429)
    ├── RequestTimeout      it could not begin in the time that the client gave it (504)
    ├── Unavailable         no engine can answer now (503)
    │   ├── ModelLoading    ... because the model is still on its way in
    │   └── EngineLost      ... because the engine process died under the request
    ├── OutOfMemory         the device has no room for this request (507)
    ├── GenerationFailed    the engine could not make this one picture (500)
    ├── Superseded          dropped before it began: a newer message of the session came
    └── Cancelled           the client asked for it, or left

``code`` goes to clients in realtime frames and in the ``X-Fal-Error-Type`` header, ``status`` is the HTTP status, and
``retryable`` says whether the same request may succeed later. Only the text of these errors is shown to clients; any
other exception is logged and reported as ``internal_error``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


class LcmError(Exception):
    """Root of the tree; ``str(error)`` is fit for a client's eyes."""

    code = "internal_error"
    status = 500
    retryable = False


class InputError(LcmError):
    """A field of the input is missing, malformed or out of range.

    Args:
        field: name of the field, as the client spelt it.
        message: what is wrong with it.
        kind: machine-readable type, in pydantic's manner.
        others: entries of ``detail`` for further fields that are wrong.
    """

    code = "invalid_input"
    status = 422

    def __init__(
        self, field: str, message: str, kind: str = "value_error", others: Sequence[dict[str, Any]] = ()
    ) -> None:
        super().__init__(f"{field}: {message}")
        self.field = field
        self.message = message
        self.kind = kind
        self.others = others

    def detail(self) -> list[dict[str, Any]]:
        """The platform's 422 body: pydantic's list of errors."""
        path = [] if self.field == "body" else self.field.split(".")
        first = {"loc": ["body", *path], "msg": self.message, "type": self.kind}
        return [first, *self.others]


class ImageError(InputError):
    """A picture that cannot be decoded, or does not fit its mask."""

    code = "image_load_error"

    def __init__(self, field: str, message: str) -> None:
        super().__init__(field, message, kind=self.code)


class DownloadError(InputError):
    """A URL that is not fetched, or whose host does not give what it should."""

    code = "file_download_error"

    def __init__(self, field: str, message: str) -> None:
        super().__init__(field, message, kind=self.code)


class BadRequest(LcmError):
    code = "bad_request"
    status = 400


class Unauthorized(LcmError):
    code = "unauthorized"
    status = 401


class Forbidden(LcmError):
    code = "forbidden"
    status = 403


class NotFound(LcmError):
    code = "not_found"
    status = 404


class BodyTimeout(LcmError):
    code = "body_timeout"
    status = 408


class TooLarge(LcmError):
    code = "file_too_large"
    status = 413


class RequestTimeout(LcmError):
    code = "request_timeout"
    status = 504


class Overloaded(LcmError):
    code = "overloaded"
    status = 429
    retryable = True


class Unavailable(LcmError):
    code = "unavailable"
    status = 503
    retryable = True


class ModelLoading(Unavailable):
    code = "model_loading"


class EngineLost(Unavailable):
    code = "engine_lost"
    alone = False
    """It was the only request at the engine."""


class OutOfMemory(LcmError):
    code = "out_of_memory"
    status = 507
    retryable = True


class GenerationFailed(LcmError):
    code = "generation_failed"


class Superseded(LcmError):
    code = "superseded"
    status = 409


class Cancelled(LcmError):
    code = "cancelled"
    status = 499


def _leaves(kind: type[LcmError]) -> dict[str, type[LcmError]]:
    found: dict[str, type[LcmError]] = {}
    for child in kind.__subclasses__():
        found |= _leaves(child)
    return found | {kind.code: kind}


def to_wire(error: LcmError) -> dict[str, Any]:
    """``error`` as plain data, for the road between the processes."""
    if isinstance(error, InputError):
        return {"code": error.code, "field": error.field, "message": error.message, "kind": error.kind}
    return {"code": error.code, "message": str(error)}


def from_wire(data: dict[str, Any]) -> LcmError:
    """The error that ``to_wire`` described; an unknown code is an internal error."""
    kind = _leaves(LcmError).get(data["code"], LcmError)
    if issubclass(kind, ImageError | DownloadError):
        return kind(data["field"], data["message"])
    if issubclass(kind, InputError):
        return kind(data["field"], data["message"], data["kind"])
    return kind(data["message"])


def renewed(error: LcmError) -> LcmError:
    """The same error, to be raised again: an exception keeps all the frames that it ever went through."""
    return from_wire(to_wire(error))

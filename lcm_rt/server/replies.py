"""Bodies in, JSON out, and the one place where errors become HTTP."""

from __future__ import annotations

import asyncio
from typing import Any

import orjson
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from lcm_rt import wire
from lcm_rt.errors import BodyTimeout, InputError, LcmError, RequestTimeout

RETRY_AFTER_S = "2"
BODY_TIMEOUT_S = 60.0


def json_response(data: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    return Response(orjson.dumps(data), status, headers, "application/json")


def error_response(error: LcmError, headers: dict[str, str] | None = None) -> Response:
    """Any error as the platform's JSON: ``detail``, ``message``, and headers with its type."""
    return Response(
        wire.error_body(error), error.status, {**error_headers(error), **(headers or {})}, "application/json"
    )


def error_headers(error: LcmError) -> dict[str, str]:
    """What the platform's clients read of an error: they never retry a deadline that they set themselves."""
    headers = {"x-fal-error-type": error.code}
    if isinstance(error, RequestTimeout):
        headers["x-fal-request-timeout-type"] = "user"
    if error.retryable:
        headers["retry-after"] = RETRY_AFTER_S
    if error.status == 401:
        headers["www-authenticate"] = "Key"
    return headers


async def on_error(request: Request, error: Exception) -> Response:
    """An error of ours."""
    assert isinstance(error, LcmError)
    request.app.state.service.metrics.errors.labels(error.code).inc()
    return error_response(error, getattr(request.state, "headers", None))


async def on_refusal(request: Request, error: Exception) -> Response:
    """No such path or method: as JSON too, because the JavaScript clients drop any other body."""
    assert isinstance(error, HTTPException)
    data = {"detail": error.detail, "message": error.detail}
    return json_response(data, error.status_code, dict(error.headers or {}))


async def on_crash(request: Request, error: Exception) -> Response:
    """An error nobody foresaw; the log has its traceback, the client only its code."""
    return error_response(LcmError("the server failed on this request"), getattr(request.state, "headers", None))


async def read_body(request: Request, limit: int = wire.MAX_MESSAGE_BYTES) -> bytes:
    """A request's whole body. Raises: InputError: over ``limit`` bytes; BodyTimeout; starlette's ClientDisconnect."""
    body = bytearray()
    try:
        async with asyncio.timeout(BODY_TIMEOUT_S):
            async for chunk in request.stream():
                body += chunk
                if len(body) > limit:
                    raise InputError("body", f"is larger than {limit >> 10} KiB", "too_long")
    except TimeoutError:
        raise BodyTimeout(f"the body took longer than {BODY_TIMEOUT_S:.0f} s to arrive") from None
    return bytes(body)

"""Bodies in, JSON out, and the one place where errors become HTTP."""

from __future__ import annotations

import asyncio
from collections import Counter
from typing import Any

import orjson
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from lcm_rt import wire
from lcm_rt.auth import LOCAL, Principal
from lcm_rt.errors import BodyTimeout, InputError, LcmError, Overloaded, RequestTimeout, Unavailable
from lcm_rt.types import GenerateInput

RETRY_AFTER_S = "2"
BODY_TIMEOUT_S = 60.0
LARGE_BODY = 2**18  # bytes that are parsed in a thread
MAX_BODIES = 512 * 2**20
MAX_BODIES_OF_ONE = 128 * 2**20


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


async def on_leave(request: Request, error: Exception) -> Response:
    """The client left before it had said what it wants: nobody is there to read the answer."""
    return Response(status_code=499)


def stopping() -> Unavailable:
    return Unavailable("the server stops; try again soon, it may be back")


def refuse_while_stopping(request: Request) -> None:
    """Raises: Unavailable: no new work is begun."""
    if request.app.state.realtime.draining.is_set():
        raise stopping()


class Bodies:
    """How many bytes of bodies are being read: an owner's slow ones must not take the memory of all."""

    def __init__(self, most: int = MAX_BODIES, most_of_one: int = MAX_BODIES_OF_ONE) -> None:
        self._most = most
        self._most_of_one = most_of_one
        self._of: Counter[str] = Counter()

    def take(self, party: str, size: int) -> None:
        """Raises: Overloaded."""
        if self._of.total() + size > self._most or self._of[party] + size > self._most_of_one:
            raise Overloaded("many large bodies are arriving already; try again soon")
        self._of[party] += size

    def give(self, party: str, size: int) -> None:
        """They are read, or given up."""
        self._of[party] -= size
        if not self._of[party]:
            del self._of[party]


def _party(request: Request) -> str:
    principal: Principal | None = getattr(request.state, "principal", None)
    if principal and principal.owner != LOCAL:
        return principal.owner
    return request.client.host if request.client else ""


async def parse_body(body: bytes) -> GenerateInput:
    """The input in a JSON body; a large one holds up nobody else. Raises: InputError."""
    if len(body) <= LARGE_BODY:
        return wire.parse_input(wire.decode_json(body))
    return await asyncio.to_thread(lambda: wire.parse_input(wire.decode_json(body)))


async def read_body(request: Request, limit: int = wire.MAX_MESSAGE_BYTES) -> bytes:
    """A request's whole body.

    Raises: InputError: over ``limit`` bytes; BodyTimeout; Overloaded; starlette's ClientDisconnect.
    """
    body = bytearray()
    bodies: Bodies = request.app.state.bodies
    party = _party(request)
    taken = 0
    try:
        async with asyncio.timeout(BODY_TIMEOUT_S):
            async for chunk in request.stream():
                bodies.take(party, len(chunk))
                taken += len(chunk)
                body += chunk
                if len(body) > limit:
                    raise InputError("body", f"is larger than {limit >> 10} KiB", "too_long")
    except TimeoutError:
        raise BodyTimeout(f"the body took longer than {BODY_TIMEOUT_S:.0f} s to arrive") from None
    finally:
        bodies.give(party, taken)
    return bytes(body)

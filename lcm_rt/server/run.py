"""One picture by one HTTP request: run by POST and GET, and stream with what comes on the way."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncIterator, Coroutine
from typing import Any, TypeVar, cast

import orjson
from sse_starlette import EventSourceResponse, ServerSentEvent
from starlette.requests import Request
from starlette.responses import Response

from lcm_rt import wire
from lcm_rt.auth import Principal
from lcm_rt.errors import LcmError
from lcm_rt.files import Lifecycle, lifecycle_of
from lcm_rt.server.addressing import address_of
from lcm_rt.server.replies import json_response, parse_body, read_body, refuse_while_stopping, stopping
from lcm_rt.service import Service
from lcm_rt.types import GenerateInput, Preview

STREAM_LINGER_S = 0.1
"""How long a stream stays open after its last event: an older client forgets what is buffered at its end."""

LONGEST_START_S = 86400.0
LIFECYCLE = "x-fal-object-lifecycle-preference"

_MAX_PREVIEWS = 4  # for a client that does not read, more are not kept

T = TypeVar("T")


async def run(request: Request) -> Response:
    """``POST /run/fal-ai/lcm``: one picture, by URL or inline (``sync_mode``). GET has the input in its query."""
    request.state.headers = headers = {"x-fal-request-id": secrets.token_hex(16)}
    wanted = await _wanted(request)
    answer = await while_here(request, _generate(request, wanted))
    return Response(status_code=499) if answer is None else json_response(answer, headers=headers)


async def _wanted(request: Request) -> GenerateInput:
    refuse_while_stopping(request)
    if request.method in ("GET", "HEAD"):
        return wire.parse_input(query_fields(request))
    return await parse_body(await read_body(request))


def query_fields(request: Request) -> dict[str, Any]:
    """The input that a query spells: every value is text, which the fields' own types read; a size may be JSON."""
    fields: dict[str, Any] = {name: value for name, value in request.query_params.items() if name != "fal_jwt_token"}
    if fields.get("image_size", "").startswith("{"):
        fields["image_size"] = wire.decode_json(fields["image_size"])
    return fields


async def _generate(request: Request, wanted: GenerateInput) -> dict[str, Any]:
    service: Service = request.app.state.service
    principal: Principal = request.state.principal
    app_model = service.model_of_app(request.path_params["app"])
    output = await service.run(
        wanted,
        app_model=app_model,
        priority="run",
        owner=principal.owner,
        start_within_s=start_timeout_of(request),
    )
    address, lifecycle = address_of(request), file_lifecycle_of(request)
    return await service.answer(output, wanted, address=address.file, owner=principal.owner, lifecycle=lifecycle)


def start_timeout_of(request: Request) -> float | None:
    """Seconds that the client gives its request to begin; None where it says nothing that can be understood."""
    headers = request.headers
    value = headers.get("x-fal-request-start-timeout") or headers.get("x-fal-request-timeout") or ""
    try:
        seconds = float(value)
    except ValueError:
        return None
    return min(seconds, LONGEST_START_S) if seconds > 0 else None


def file_lifecycle_of(request: Request) -> Lifecycle:
    """What the client wishes for its answered pictures: how long they are kept, and who may read them."""
    return lifecycle_of(request.headers.get(LIFECYCLE))


async def while_here(request: Request, work: Coroutine[Any, Any, T]) -> T | None:
    """What ``work`` gives, or None once the client has hung up, and then the work is cancelled.

    Raises: Unavailable: the server ends, and cannot wait for it.
    """
    working: asyncio.Future[Any] = asyncio.ensure_future(work)
    leaving: asyncio.Future[Any] = asyncio.ensure_future(_left(request))
    ending: asyncio.Future[Any] = asyncio.ensure_future(request.app.state.ending.wait())
    try:
        await asyncio.wait({working, leaving, ending}, return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return cast(T, working.result())
        if ending.done():
            raise stopping()
        return None
    finally:
        for task in (working, leaving, ending):
            task.cancel()


async def _left(request: Request) -> None:
    """Wait until the client hangs up."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def stream(request: Request) -> Response:
    """``POST /run/fal-ai/lcm/stream``: server-sent events, each a JSON map: previews, then the answer.

    A preview says ``preview: true``, and its picture is a data URI. What is wrong with the input is an ordinary error;
    what goes wrong later is an event with ``error``, ``message`` and ``detail``.
    """
    request.state.headers = headers = {"x-fal-request-id": secrets.token_hex(16)}
    service: Service = request.app.state.service
    wanted = await _wanted(request)
    if "previews" not in wanted.model_fields_set:
        wanted.previews = True
    app_model = service.model_of_app(request.path_params["app"])
    previews: asyncio.Queue[Preview] = asyncio.Queue(_MAX_PREVIEWS)
    principal: Principal = request.state.principal
    ongoing = await service.start(
        wanted,
        app_model=app_model,
        priority="run",
        owner=principal.owner,
        apps=principal.apps,
        on_preview=lambda preview: None if previews.full() else previews.put_nowait(preview),
    )

    async def events() -> AsyncIterator[ServerSentEvent]:
        finishing = asyncio.ensure_future(ongoing.output())
        try:
            while not finishing.done():
                showing = asyncio.ensure_future(previews.get())
                try:
                    await asyncio.wait({showing, finishing}, return_when=asyncio.FIRST_COMPLETED)
                    if showing.done():
                        yield _event(wire.preview_fields(showing.result(), wanted))
                finally:
                    showing.cancel()
            try:
                output = finishing.result()
                service.count(output, "run")
                yield _event(
                    await service.answer(
                        output,
                        wanted,
                        address=address_of(request).file,
                        owner=principal.owner,
                        lifecycle=file_lifecycle_of(request),
                    )
                )
            except LcmError as error:
                service.metrics.errors.labels(error.code).inc()
                yield _event({"error": error.code, **orjson.loads(wire.error_body(error))})
            await asyncio.sleep(STREAM_LINGER_S)
        finally:
            finishing.cancel()

    return EventSourceResponse(events(), headers=headers)


def _event(data: dict[str, Any]) -> ServerSentEvent:
    return ServerSentEvent(orjson.dumps(data).decode())

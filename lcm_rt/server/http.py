"""Plain HTTP: one picture per request, health, models, metrics and answered files."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncIterator
from typing import Any

import orjson
from sse_starlette import EventSourceResponse, ServerSentEvent
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import FileResponse, Response

from lcm_rt import wire
from lcm_rt.errors import InputError, LcmError, ModelLoading, NotFound, RequestTimeout
from lcm_rt.files import CONTENT_TYPES
from lcm_rt.metrics import CONTENT_TYPE as METRICS_CONTENT_TYPE
from lcm_rt.service import Service
from lcm_rt.workers import Workers

RETRY_AFTER_S = "2"
BODY_TIMEOUT_S = 60.0


def json_response(data: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    return Response(orjson.dumps(data), status, headers, "application/json")


def error_response(error: LcmError, headers: dict[str, str] | None = None) -> Response:
    """Any error as the platform's JSON: ``detail``, ``message``, and a header with its type."""
    headers = {"x-fal-error-type": error.code, **(headers or {})}
    if error.retryable:
        headers["retry-after"] = RETRY_AFTER_S
    return Response(wire.error_body(error), error.status, headers, "application/json")


async def on_error(request: Request, error: Exception) -> Response:
    """The one place where errors become HTTP."""
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


async def run(request: Request) -> Response:
    """``POST /run/fal-ai/lcm``: one picture, as JSON with a URL, or inline with ``sync_mode``."""
    service: Service = request.app.state.service
    request.state.headers = headers = {"x-fal-request-id": secrets.token_hex(16)}
    app_model = service.model_of_app(request.path_params["app"])
    try:
        wanted = wire.parse_input(wire.decode_json(await _body(request)))
    except ClientDisconnect:
        return Response(status_code=499)  # nobody is there to read it
    generating = asyncio.ensure_future(service.run(wanted, app_model=app_model, priority="run"))
    leaving = asyncio.ensure_future(_left(request))
    try:
        await asyncio.wait({generating, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not generating.done():
            return Response(status_code=499)
        output = generating.result()
    finally:
        generating.cancel()
        leaving.cancel()
    images = []
    for result in output.results:
        if wanted.sync_mode:
            url = wire.data_uri(result)
        else:
            url = str(request.url_for("file", name=await service.files.put(result.image, result.content_type)))
        images.append(wire.image_entry(result, url))
    return json_response({"images": images, **wire.output_fields(output)}, headers=headers)


async def _left(request: Request) -> None:
    """Wait until the client hangs up."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _body(request: Request) -> bytes:
    body = bytearray()
    try:
        async with asyncio.timeout(BODY_TIMEOUT_S):
            async for chunk in request.stream():
                body += chunk
                if len(body) > wire.MAX_MESSAGE_BYTES:
                    raise InputError("body", f"is larger than {wire.MAX_MESSAGE_BYTES >> 20} MiB", "too_long")
    except TimeoutError:
        raise RequestTimeout(f"the body took longer than {BODY_TIMEOUT_S:.0f} s to arrive") from None
    return bytes(body)


async def file(request: Request) -> Response:
    """``GET /files/{name}``: a picture that was answered by URL, until it expires."""
    path = await request.app.state.service.files.find(request.path_params["name"])
    return FileResponse(path, media_type=CONTENT_TYPES[path.suffix])


async def models(request: Request) -> Response:
    """``GET /models``: what is served here, and how far it is loaded."""
    workers = request.app.state.service.workers
    return json_response({"models": workers.describe(), "device": workers.device_name})


async def load_model(request: Request) -> Response:
    """``POST /models/{name}/load``: have it loaded; 202 with its state, 200 if it is ready already."""
    workers, name = _served(request)
    workers.load(name)
    return _state(workers, name, "ready")


async def unload_model(request: Request) -> Response:
    """``POST /models/{name}/unload``: free its memory once its pictures are done; 202 as above, 200 if it is gone."""
    workers, name = _served(request)
    workers.unload(name)
    return _state(workers, name, "unloaded")


def _served(request: Request) -> tuple[Workers, str]:
    workers, name = request.app.state.service.workers, request.path_params["name"]
    if name not in workers.models:
        raise NotFound(f"model {name!r} is not served here; there is {', '.join(workers.models)}")
    return workers, name


def _state(workers: Workers, name: str, wanted: str) -> Response:
    (model,) = (model for model in workers.describe() if model["name"] == name)
    return json_response(model, 200 if model["state"] == wanted else 202)


async def model_events(request: Request) -> Response:
    """``GET /models/events``: server-sent events named ``models``, at once and whenever a model's state changes."""
    workers: Workers = request.app.state.service.workers

    async def events() -> AsyncIterator[ServerSentEvent]:
        while True:
            seen = workers.changes
            yield ServerSentEvent(orjson.dumps(workers.describe()).decode(), event="models")
            await workers.wait_change(seen)

    return EventSourceResponse(events())


async def live(request: Request) -> Response:
    """``GET /health/live``: the front's loop turns."""
    return json_response({"status": "ok"})


async def health(request: Request) -> Response:
    """``GET /health``: 200 while the front lives, with the state of the engine in words."""
    workers = request.app.state.service.workers
    status = "failed" if workers.failure else "ready" if workers.is_ready else "loading"
    return json_response({"status": status, "stage": workers.stage})


async def ready(request: Request) -> Response:
    """``GET /health/ready``: 200 once every model has made a picture, else 503 with the reason."""
    workers = request.app.state.service.workers
    if workers.failure:
        return error_response(workers.failure)
    if not workers.is_ready:
        return error_response(ModelLoading(f"the model is loading ({workers.stage})"))
    return json_response({"status": "ok"})


async def metrics(request: Request) -> Response:
    """``GET /metrics``: Prometheus text."""
    return Response(request.app.state.service.metrics.render(), media_type=METRICS_CONTENT_TYPE)

"""The models over HTTP: what is served, how far it is loaded, and having it loaded or unloaded."""

from __future__ import annotations

from collections.abc import AsyncIterator

import orjson
from sse_starlette import EventSourceResponse, ServerSentEvent
from starlette.requests import Request
from starlette.responses import Response

from lcm_rt.errors import NotFound
from lcm_rt.server.replies import json_response
from lcm_rt.workers import Workers


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

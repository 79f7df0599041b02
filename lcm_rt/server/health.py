"""Whether the server lives, whether it is ready, and its counters."""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import Response

from lcm_rt.errors import ModelLoading, Unavailable
from lcm_rt.metrics import CONTENT_TYPE
from lcm_rt.server.replies import error_response, json_response, refuse_while_stopping


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
    if workers.failure and request.app.state.auth.is_open:
        return error_response(workers.failure)
    if workers.failure:  # anybody may ask, and it may name folders of this machine
        return error_response(Unavailable("a model could not be loaded; the server's log says why"))
    refuse_while_stopping(request)
    if not workers.is_ready:
        return error_response(ModelLoading(f"the model is loading ({workers.stage})"))
    return json_response({"status": "ok"})


async def metrics(request: Request) -> Response:
    """``GET /metrics``: Prometheus text."""
    return Response(request.app.state.service.metrics.render(), media_type=CONTENT_TYPE)

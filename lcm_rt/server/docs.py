"""The description of this server, for machines and for people; ``description`` makes it."""

from __future__ import annotations

from pathlib import Path

from starlette.requests import Request
from starlette.responses import FileResponse, Response

from lcm_rt.errors import NotFound
from lcm_rt.server.replies import json_response

_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self' 'unsafe-inline'; img-src 'self' data: blob:; "
    "connect-src 'self'; font-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


async def openapi_json(request: Request) -> Response:
    """``GET /openapi.json``: OpenAPI 3.1 of every HTTP route."""
    return json_response(request.app.state.description.openapi)


async def asyncapi_json(request: Request) -> Response:
    """``GET /asyncapi.json``: AsyncAPI 3.0 of the sockets."""
    return json_response(request.app.state.description.asyncapi)


async def docs(request: Request) -> Response:
    """``GET /docs``: a page that shows the first of them, and tries it out."""
    web: Path | None = request.app.state.web
    if web is None:
        raise NotFound("this server has no pages")
    return FileResponse(web / "docs.html", headers={"content-security-policy": _POLICY})

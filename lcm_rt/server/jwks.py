"""How receivers of webhooks verify that an event is ours: public keys for everybody, a secret for each owner."""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import Response

from lcm_rt.server.replies import json_response

_CACHED_S = 3600  # a new key is published for longer than a day before it signs: some receivers heed no header


async def jwks(request: Request) -> Response:
    """``GET /.well-known/jwks.json``: the keys of the platform's signatures."""
    return json_response(request.app.state.webhooks.jwks(), headers={"cache-control": f"public, max-age={_CACHED_S}"})


async def secret(request: Request) -> Response:
    """``GET /webhooks/secret``: the asking owner's, for the signatures of Standard Webhooks."""
    owner = request.state.principal.owner
    return json_response({"secret": request.app.state.webhooks.secret_of(owner)}, headers={"cache-control": "no-store"})

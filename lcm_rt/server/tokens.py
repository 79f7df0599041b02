"""Tokens: what a page connects with, because it must not hold a key."""

from __future__ import annotations

from pydantic import BaseModel, Field
from starlette.requests import Request
from starlette.responses import Response

from lcm_rt import wire
from lcm_rt.auth import Auth
from lcm_rt.server.replies import json_response, read_body

_MAX_BODY = 2**16


class TokenInput(BaseModel):
    """What a token is asked for."""

    allowed_apps: list[str] | None = Field(
        None, max_length=100, description="Aliases of the apps that it is for, such as `lcm`; without them, every app."
    )
    token_expiration: float = Field(
        120, gt=0, allow_inf_nan=False, strict=True, description="Seconds until it ends; a day at most."
    )


async def create_token(request: Request) -> Response:
    """``POST /tokens/``: a token for realtime connections and event streams, as a JSON string and nothing else."""
    body = await read_body(request, _MAX_BODY)
    wish = wire.parse(TokenInput, wire.decode_json(body) if body.strip() else {})
    auth: Auth = request.app.state.auth
    token = auth.mint(request.state.principal, "realtime", lifetime_s=wish.token_expiration, apps=wish.allowed_apps)
    return json_response(token)

"""The door of every route: who asks, and whether they may."""

from __future__ import annotations

import functools
from collections.abc import Awaitable, Callable
from typing import Literal, get_args

from starlette.requests import HTTPConnection, Request
from starlette.responses import Response
from starlette.websockets import WebSocket

from lcm_rt.auth import Auth, Principal
from lcm_rt.errors import Forbidden, Unauthorized

Need = Literal["open", "generate", "admin", "signed"]
"""``open``: nothing; ``generate``, ``admin``: a key with that scope; ``signed``: the handler checks the URL's own
signature, or a bearer token."""

Handler = Callable[[Request], Awaitable[Response]]

_TOKEN = "fal_jwt_token"


def guarded(handler: Handler, need: Need, *, by_token: bool = False, private: bool = False) -> Handler:
    """``handler`` behind its ``need``; it finds who asks in ``request.state.principal``, unless that need not be known.

    Args:
        by_token: a token in the query does as well as a key, for the app that the path parameter ``app`` names. For
            event streams: a page must not hold a key.
        private: in open mode, where nobody shows a key, no page of another origin may do it; nor what needs ``admin``.

    The handler raises besides its own: Unauthorized, Forbidden, Overloaded, Unavailable.
    """
    if need not in get_args(Need):
        raise ValueError(f"{need!r} is no need of a route")
    if need in ("open", "signed"):
        return handler

    @functools.wraps(handler)
    async def checked(request: Request) -> Response:
        principal = await _principal_of(request, request.path_params.get("app", "") if by_token else None)
        if need not in principal.scopes:
            raise Forbidden(f"this key lacks the scope {need!r}")
        if principal.key is None and (need == "admin" or private) and _is_foreign(request):
            raise Forbidden("a page of another origin may not do this without a key")
        request.state.principal = principal
        return await handler(request)

    return checked


def _is_foreign(request: Request) -> bool:
    """It comes from a page that is not of this server."""
    origin = request.headers.get("origin")
    return origin is not None and origin.partition("://")[2] != request.headers.get("host")


async def principal_of_socket(websocket: WebSocket, app: str) -> Principal:
    """Who opens a socket for ``app``, by the token in its query or by its ``Authorization`` header.

    A token may have expired within a day: older clients connect again with the one that they had.

    Raises: Unauthorized: nobody who may generate with ``app``; Overloaded: too many wrong keys; Unavailable.
    """
    principal = await _principal_of(websocket, app, lenient=True)
    if "generate" not in principal.scopes:
        raise Unauthorized("this key lacks the scope 'generate'")
    return principal


async def _principal_of(connection: HTTPConnection, app: str | None, *, lenient: bool = False) -> Principal:
    """Who asks; a token counts where ``app`` is given, and then goes before a header, which may be a proxy's."""
    auth: Auth = connection.app.state.auth
    if app is not None and (token := connection.query_params.get(_TOKEN)):
        return await auth.principal_of_token(token, "realtime", app=app, lenient=lenient)
    address = connection.client.host if connection.client else ""
    return await auth.principal_of(connection.headers.get("authorization"), address=address)

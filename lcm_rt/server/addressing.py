"""Which service a request is for: by host name, by prefix, or by the proxy's header; and the addresses in its answers.

The platform has one host per service, and run and queue have the same paths. Here every service has a prefix as well
(``/run /queue /rest /cdn /ws``), and ``Addressing`` turns each way into that one before anything is routed. An answer's
absolute URLs lie where its client reached us.
"""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass
from urllib.parse import unquote, urlsplit

from starlette.datastructures import Headers
from starlette.requests import HTTPConnection
from starlette.types import ASGIApp, Receive, Scope, Send

from lcm_rt.errors import BadRequest
from lcm_rt.server.replies import error_response

PROXY_PATH = "/api/fal/proxy"
_TARGET = "x-fal-target-url"
_MAX_TARGET = 16_384

_HOSTS = {
    "fal.run": "/run",
    "falrun.com": "/run",
    "queue.fal.run": "/queue",
    "queue.falrun.com": "/queue",
    "ws.fal.run": "/ws",
    "rest.fal.ai": "/rest",
    "rest.alpha.fal.ai": "/rest",
    "v3.fal.media": "/cdn",
    "fal.media": "/cdn",
}
_NETLOC = re.compile(r"(?:[A-Za-z0-9_.-]{1,253}|\[[0-9A-Fa-f:.]{2,45}\])(?::[0-9]{0,5})?", re.ASCII)
_GATEWAY = re.compile(r"([a-z0-9-]+)\.gateway\.alpha\.fal\.ai")  # the oldest clients: an application is a host
_GATEWAY_JOB = re.compile(r"/fal/queue/requests/([^/]+)/(status|response|cancel)(/?)")


def internal_path(host: str, path: str) -> str | None:
    """Our path for what the platform has at ``path`` of ``host``; None where the host is none of the platform's."""
    if prefix := _HOSTS.get(host):
        return prefix + path
    if not (match := _GATEWAY.fullmatch(host)):
        return None
    app = match[1]
    if job := _GATEWAY_JOB.fullmatch(path):
        return f"/queue/{app}/requests/{job[1]}" + ("" if job[2] == "response" else f"/{job[2]}")
    if path.startswith("/fal/queue/submit"):
        return f"/queue/{app}{path.removeprefix('/fal/queue/submit')}"
    return f"/run/{app}{path}"


def host_of(netloc: str) -> str:
    """A ``Host`` header's name, without its port."""
    return re.sub(r":[0-9]*\Z", "", netloc).lower()


def _is_local(host: str) -> bool:
    """An address, or this machine's own name for itself: no name that somebody else could have point here."""
    if host == "localhost" or host.endswith(".localhost"):
        return True
    try:
        return bool(ipaddress.ip_address(host.strip("[]")))
    except ValueError:
        return False


@dataclass(frozen=True, slots=True)
class Address:
    """Where the client that asks reaches our services; no slash at the end of any."""

    queue: str
    cdn: str

    def file(self, name: str) -> str:
        return f"{self.cdn}/files/{name}"

    def job(self, app: str, id: str) -> str:
        """Where a queued job's result will be; ``app`` is its owner and alias, without a path below."""
        return f"{self.queue}/{app}/requests/{id}"


def address_of(connection: HTTPConnection) -> Address:
    """Where the client of this request, or of this socket, reaches us."""
    scheme = "https" if connection.scope["scheme"] in ("https", "wss") else "http"
    host = connection.headers.get("host", "localhost")
    if connection.scope.get("state", {}).get("platform_host"):
        port = f":{host.rpartition(':')[2]}" if ":" in host else ""
        return Address(f"{scheme}://queue.fal.run{port}", f"{scheme}://v3.fal.media{port}")
    origin = f"{scheme}://{host}"
    return Address(f"{origin}/queue", origin)


class Addressing:
    """ASGI middleware that gives every request the path it has here.

    Args:
        known: names by which this server may be called beside the platform's, localhost and addresses; None is any.
    """

    def __init__(self, app: ASGIApp, known: frozenset[str] | None = None) -> None:
        self._app = app
        self._known = known

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] in ("http", "websocket"):
            headers = Headers(scope=scope)
            try:
                scope = self._addressed(scope, headers)
            except BadRequest as error:
                await error_response(error)(scope, receive, send)
                return
        await self._app(scope, receive, send)

    def _addressed(self, scope: Scope, headers: Headers) -> Scope:
        path = scope["path"]
        netloc = headers.get("host", "")
        if not _NETLOC.fullmatch(netloc):
            raise BadRequest("the Host header is malformed")
        host = host_of(netloc)
        if self._known is not None and not (_is_local(host) or internal_path(host, "/") or host in self._known):
            raise BadRequest(f"this server does not go by the name {host}; the setting hosts lets it")
        if scope["type"] == "http" and path.rstrip("/") == PROXY_PATH and scope["method"] != "OPTIONS":
            return _retargeted(scope, headers.get(_TARGET))
        inside = internal_path(host, path)
        if inside is None:
            return scope
        return {**scope, "path": inside, "raw_path": None, "state": {**scope.get("state", {}), "platform_host": True}}


def _retargeted(scope: Scope, target: str | None) -> Scope:
    """The request that the proxy's client means. Raises: BadRequest: it names none of the platform's addresses."""
    if not target or len(target) > _MAX_TARGET:
        raise BadRequest(f"the {_TARGET} header must hold the address that is meant")
    try:
        parts = urlsplit(target)
        host = parts.hostname or ""
    except ValueError:
        host = ""
    path = internal_path(host, unquote(parts.path)) if host and parts.scheme in ("http", "https") else None
    if path is None:
        raise BadRequest(f"{_TARGET} is none of the platform's addresses")
    return {**scope, "path": path, "raw_path": None, "query_string": parts.query.encode("latin-1", "replace")}

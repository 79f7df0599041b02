"""Who may do what, route by route, on a server that asks for keys. A route that the table does not have fails."""

from __future__ import annotations

import asyncio
import http.client
import json
import logging
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, NamedTuple

import httpx2 as httpx
import pytest
from serving import SIDE, Server, model_folder, run, serving_aside
from starlette.routing import Match, Mount, Route, WebSocketRoute
from websockets.asyncio.client import connect
from websockets.exceptions import ConnectionClosed

PICTURE = {"prompt": "lake", "image_size": {"width": SIDE, "height": SIDE}, "num_inference_steps": 1}
FILE = b"these bytes"

IN = 0  # past the door: the route answered, if only that it cannot be done
REFUSALS = (401, 403, 404, 429)


class Row(NamedTuple):
    """A request that a route answers, and what each caller gets.

    Args:
        method: or ``SOCKET``.
        path: the route's, as the route table has it.
        url: in braces are things that alice has; they are made anew for each caller, by ``Site``.
        none: without a key.
        wrong: with a key that is none.
        other: with bob's key, which has the scope ``generate``.
        right: with alice's, which has every scope.
        token: with alice's token for the app in the query, and no key.
        cdn: with alice's token for the file server as a bearer.
    """

    method: str
    path: str
    url: str
    none: int
    wrong: int
    other: int
    right: int
    token: int
    cdn: int
    body: Any = None


def everybody(method: str, path: str, url: str = "", body: Any = None) -> Row:
    return Row(method, path, url or path, IN, IN, IN, IN, IN, IN, body)


def with_a_key(method: str, path: str, url: str = "", body: Any = None, *, token: int = 401, cdn: int = 401) -> Row:
    return Row(method, path, url or path, 401, 401, IN, IN, token, cdn, body)


def keepers(method: str, path: str, url: str = "") -> Row:
    return Row(method, path, url or path, 401, 401, 403, IN, 401, 401)


def the_owner(method: str, path: str, url: str, body: Any = None, *, token: int = 401, cdn: int = 401) -> Row:
    """To others, what is alice's does not exist."""
    return Row(method, path, url, 401, 401, 404, IN, token, cdn, body)


def nobody(method: str, path: str, url: str, body: Any = None) -> Row:
    return Row(method, path, url, 404, 404, 404, 404, 404, 404, body)


def uploads(prefix: str) -> list[Row]:
    """Whoever knows an upload's signature may write it, and no key will do instead."""
    at = f"{prefix}/upload/{{name}}"
    by_name, parts = f"{prefix}/files/{{name}}", f"{prefix}/files/{{name}}/multipart/{{upload}}"
    done = {"parts": []}
    return [
        everybody("PUT", at, at + "?signature={signature}", FILE),
        nobody("PUT", at, at, FILE),
        nobody("PUT", at, at + "?signature={another_signature}", FILE),
        everybody("PUT", at + "/{number}", at + "/1?signature={signature}", FILE),
        nobody("PUT", at + "/{number}", at + "/1", FILE),
        nobody("PUT", at + "/{number}", at + "/1?signature={another_signature}", FILE),
        everybody("POST", at + "/complete", at + "/complete?signature={signature}", done),
        nobody("POST", at + "/complete", at + "/complete", done),
        nobody("POST", at + "/complete", at + "/complete?signature={another_signature}", done),
        with_a_key("POST", prefix + "/files/upload", body=FILE, cdn=IN),
        with_a_key("POST", prefix + "/files/upload/multipart", cdn=IN),
        the_owner("PUT", parts + "/{number}", parts + "/1", FILE, cdn=IN),
        the_owner("POST", parts + "/complete", parts + "/complete", done, cdn=IN),
        everybody("GET", by_name, prefix + "/files/{public}"),
        nobody("GET", by_name, prefix + "/files/{unfinished}"),
        Row("GET", by_name, prefix + "/files/{forbidden}", 403, 403, 403, IN, 403, IN),
        Row("GET", by_name, prefix + "/files/{hidden}", 404, 404, 404, IN, 404, IN),
    ]


def jobs(slash: str) -> list[Row]:
    at, url = "/queue/{app:path}/requests/{id}", "/queue/fal-ai/lcm/requests/{job}"
    return [
        the_owner("GET", f"{at}/status/stream{slash}", f"{url}/status/stream{slash}", token=IN),
        the_owner("GET", f"{at}/status{slash}", f"{url}/status{slash}"),
        the_owner("PUT", f"{at}/cancel{slash}", f"{url}/cancel{slash}"),
        the_owner("POST", f"{at}/cancel{slash}", f"{url}/cancel{slash}"),
        the_owner("GET", f"{at}{slash}", f"{url}{slash}"),
    ]


TABLE = [
    everybody("GET", "/health"),
    everybody("GET", "/health/ready"),
    everybody("GET", "/health/live"),
    keepers("GET", "/metrics"),
    everybody("GET", "/models"),
    everybody("GET", "/models/events"),
    keepers("POST", "/models/{name}/load", "/models/spare/load"),
    keepers("POST", "/models/{name}/unload", "/models/spare/unload"),
    everybody("GET", "/openapi.json"),
    everybody("GET", "/asyncapi.json"),
    everybody("GET", "/docs"),
    everybody("GET", "/fal-local.js"),
    everybody("GET", "/fal-local.cjs"),
    everybody("GET", "/fal_local.py"),
    *(with_a_key("POST", path) for path in ("/tokens", "/tokens/", "/rest/tokens", "/rest/tokens/")),
    everybody("GET", "/.well-known/jwks.json"),
    everybody("GET", "/rest/.well-known/jwks.json"),
    with_a_key("GET", "/webhooks/secret"),
    with_a_key("POST", "/rest/storage/upload/initiate", body={}),
    with_a_key("POST", "/rest/storage/upload/initiate-multipart", body={}),
    with_a_key("POST", "/rest/storage/auth/token"),
    *uploads(""),
    *uploads("/cdn"),
    *jobs(""),
    *jobs("/"),
    with_a_key("POST", "/queue/{app:path}", "/queue/fal-ai/lcm", PICTURE),
    with_a_key("POST", "/v1/images/generations", body=PICTURE),
    with_a_key("POST", "/v1/images/edits", body={}),
    with_a_key("GET", "/v1/models"),
    with_a_key("GET", "/v1/models/{name}", "/v1/models/fake"),
    with_a_key("POST", "/run/{app:path}/stream", "/run/fal-ai/lcm/stream", PICTURE, token=IN),
    with_a_key("GET", "/run/{app:path}", "/run/fal-ai/lcm?prompt=lake&num_inference_steps=1"),
    with_a_key("POST", "/run/{app:path}", "/run/fal-ai/lcm", PICTURE),
    with_a_key("GET", "/fal-ai/{app:path}", "/fal-ai/lcm?prompt=lake&num_inference_steps=1"),
    with_a_key("POST", "/{app:path}/stream", "/fal-ai/lcm/stream", PICTURE, token=IN),
    with_a_key("POST", "/{app:path}", "/fal-ai/lcm", PICTURE),
    with_a_key("SOCKET", "/ws/{app:path}", "/ws/fal-ai/lcm", PICTURE, token=IN),
    with_a_key("SOCKET", "/{path:path}", "/fal-ai/lcm/realtime", PICTURE, token=IN),
    everybody("GET", "/{file of the page}", "/"),
]

CALLERS = ("none", "wrong", "other", "right", "token", "cdn")


@dataclass
class Site:
    """A server in closed mode, whose callers are told apart by what they show."""

    server: Server
    headers: dict[str, dict[str, str]]
    token: str
    lasting: dict[str, str]

    async def filled(self, url: str) -> str:
        """``url`` with new things of alice's in it."""
        things = dict(self.lasting)
        if "{signature}" in url or "{another_signature}" in url or "/upload/{name}" in url:
            told = await self.as_alice("/rest/storage/upload/initiate", {"content_type": "text/plain"})
            path, _, things["signature"] = told["upload_url"].partition("?signature=")
            things["name"] = path.rpartition("/")[2]
            more = await self.as_alice("/rest/storage/upload/initiate", {"content_type": "text/plain"})
            things["another_signature"] = more["upload_url"].partition("?signature=")[2]
            things["unfinished"] = things["name"]
        if "{upload}" in url or "{unfinished}" in url:
            told = await self.as_alice("/files/upload/multipart")
            things["name"] = things["unfinished"] = told["access_url"].rpartition("/")[2]
            things["upload"] = told["uploadId"]
        return url.format(**things)

    async def as_alice(self, url: str, body: Any = None, **headers: str) -> Any:
        async with self.client() as client:
            content = {"content": body} if isinstance(body, bytes) else {"json": body}
            answer = await client.post(url, headers=self.headers["right"] | headers, **content)
            assert answer.status_code == 200, answer.text
            return answer.json()

    def client(self, source: str = "127.0.0.1") -> httpx.AsyncClient:
        transport = httpx.AsyncHTTPTransport(local_address=source, verify=False)
        return httpx.AsyncClient(base_url=self.server.http, transport=transport, timeout=30)


async def prepared(server: Server) -> Site:
    alice, bob = await server.key("alice", "generate", "admin"), await server.key("bob", "generate")
    auth = server.app.state.auth
    principal = await auth.principal_of(f"Key {alice}")
    headers = {
        "none": {},
        "wrong": {"authorization": "Key 0123456789abcdef:0123456789abcdef"},
        "other": {"authorization": f"Key {bob}"},
        "right": {"authorization": f"Key {alice}"},
        "token": {},
        "cdn": {"authorization": f"Bearer {auth.mint(principal, 'cdn', lifetime_s=3600)}"},
    }
    token = auth.mint(principal, "realtime", lifetime_s=3600, apps=["lcm"])
    site = Site(server, headers, token, {})
    for name, access in (("public", None), ("hidden", "hide"), ("forbidden", "forbid")):
        lifecycle = {"initial_acl": {"default": access}} if access else {}
        told = await site.as_alice("/files/upload", FILE, **{"x-fal-object-lifecycle": json.dumps(lifecycle)})
        site.lasting[name] = told["access_url"].rpartition("/")[2]
    job = await site.as_alice("/queue/fal-ai/lcm", PICTURE)
    site.lasting["job"] = job["request_id"]
    async with site.client() as client:
        await client.get(f"{job['status_url']}/stream", headers=headers["right"])  # until it is done
    return site


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    folder = tmp_path_factory.mktemp("site")
    models = [model_folder(folder / name, name) for name in ("fake", "spare")]
    with serving_aside(folder, keys=True, models=models) as server:
        yield asyncio.run(prepared(server))


def entries(site: Site) -> dict[tuple[str, str], Route | WebSocketRoute | Mount]:
    """The server's routes by method and path."""
    found: dict[tuple[str, str], Route | WebSocketRoute | Mount] = {}
    for route in site.server.app.routes:
        if isinstance(route, Route):
            found |= {(method, route.path): route for method in (route.methods or set()) - {"HEAD"}}
        elif isinstance(route, WebSocketRoute):
            found["SOCKET", route.path] = route
        else:
            assert isinstance(route, Mount)
            found["GET", f"{route.path}/{{file of the page}}"] = route
    return found


def test_every_route_has_a_row_and_every_row_a_route(site: Site) -> None:
    assert set(entries(site)) == {(row.method, row.path) for row in TABLE}


@pytest.mark.points(35)
@pytest.mark.parametrize("number", range(len(TABLE)), ids=[f"{row.method} {row.url}" for row in TABLE])
def test_each_caller_gets_what_the_table_says(site: Site, number: int) -> None:
    row = TABLE[number]
    source = f"127.0.2.{number + 1}"  # wrong keys are counted by address, and each row has one of this machine's

    @run
    async def walk() -> None:
        got = {}
        for caller in CALLERS:
            url = await site.filled(row.url)
            check_route(site, row, url)
            if caller == "token":
                url += f"{'&' if '?' in url else '?'}fal_jwt_token={site.token}"
            got[caller] = await ask(site, row, url, site.headers[caller], source)
        assert got == {caller: getattr(row, caller) for caller in CALLERS}

    walk()


def check_route(site: Site, row: Row, url: str) -> None:
    """What answers ``url`` is the row's own route, and no other before it."""
    kind = {"type": "websocket"} if row.method == "SOCKET" else {"type": "http", "method": row.method}
    scope = {**kind, "path": url.partition("?")[0], "headers": []}
    first = next(route for route in site.server.app.routes if route.matches(scope)[0] is Match.FULL)
    assert first is entries(site)[row.method, row.path]


async def ask(site: Site, row: Row, url: str, headers: dict[str, str], source: str) -> int:
    """The refusal, or IN."""
    if row.method == "SOCKET":
        return await ask_socket(site, row, url, headers, source)
    content = {"content": row.body} if isinstance(row.body, bytes) else {"json": row.body}
    async with (
        site.client(source) as client,
        client.stream(row.method, url, headers=headers, **content) as answer,  # whose body may have no end
    ):
        status = int(answer.status_code)
        assert status < 500
        if status >= 400:
            told = json.loads(await answer.aread())
            assert told.get("error") or (told["detail"] and told["message"]), "it does not say why"
        return status if status in REFUSALS else IN


async def ask_socket(site: Site, row: Row, url: str, headers: dict[str, str], source: str) -> int:
    """As its frames tell: the handshake itself succeeds always."""
    address = f"ws://{site.server.host}{url}"
    async with connect(address, additional_headers=headers, local_addr=(source, 0), compression=None) as client:
        with suppress(ConnectionClosed):  # who is refused is refused unheard
            await client.send(json.dumps(row.body))
        told = json.loads(await client.recv())
        if told.get("type") == "start":
            return int(told["status"]) if told["status"] in REFUSALS else IN
        if told.get("images"):
            return IN
        assert told == {"status": "error", "error": "Unauthorized"}
        await client.wait_closed()
        assert client.close_code == 1000
        return 401


@run
async def test_the_server_logs_no_secret(site: Site, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    for row in TABLE:
        if row.token == IN or row.path in ("/tokens/", "/files/upload", "/webhooks/secret"):
            for caller, query in (("right", ""), ("token", f"?fal_jwt_token={site.token}")):
                url = await site.filled(row.url) + query
                await ask(site, row, url, site.headers[caller], "127.0.3.1")
    ours = [record for record in caplog.records if not record.name.startswith(("httpx", "httpcore", "websockets"))]
    assert any(record.name.startswith("lcm_rt") for record in ours)
    said = "".join(f"{record.getMessage()} {record.exc_info}" for record in ours)
    for hidden in (site.token, site.headers["right"]["authorization"].rpartition(":")[2]):
        assert hidden not in said


@pytest.mark.parametrize(
    "target, headers",
    [
        ("/metrics", {}),
        ("/metrics/", {}),
        ("//metrics", {}),
        ("/./metrics", {}),
        ("/health/../metrics", {}),
        ("/health/%2e%2e/metrics", {}),
        ("/health/..%2fmetrics", {}),
        ("/%6detrics", {}),
        ("/metrics;x=1", {}),
        ("/metrics%00", {}),
        ("/metrics%3f/health", {}),
        ("/METRICS", {}),
        ("http://fal.run/metrics", {}),
        ("http://rest.fal.ai/metrics", {}),
        ("/metrics", {"Host": "a/health?x="}),
        ("/metrics", {"Host": "127.0.0.1/health#"}),
        ("/metrics", {"Host": "rest.fal.ai"}),
        ("/metrics", {"X-Original-URL": "/health", "X-Rewrite-URL": "/health"}),
        ("/metrics", {"X-Forwarded-Prefix": "/health", "X-Forwarded-Host": "127.0.0.1"}),
        ("/metrics", {"X-Forwarded-For": "127.0.0.1", "Forwarded": "for=127.0.0.1"}),
        ("/health", {"X-Original-URL": "/metrics", "X-Rewrite-URL": "/metrics"}),
        ("/health", {"x-fal-target-url": "https://fal.run/metrics"}),
        ("/api/fal/proxy", {"x-fal-target-url": "https://fal.run/../metrics"}),
        ("/api/fal/proxy", {"x-fal-target-url": "https://fal.run//metrics"}),
        ("/api/fal/proxy", {"x-fal-target-url": "/metrics"}),
        ("/metrics", {"Authorization": ""}),
        ("/metrics", {"Authorization": "Key"}),
        ("/metrics", {"Cookie": "authorization=x; fal_jwt_token=x"}),
    ],
)
def test_no_spelling_goes_around_the_door(site: Site, target: str, headers: dict[str, str]) -> None:
    """Asked without a key, in requests that no client library would send."""
    connection = http.client.HTTPConnection(*site.server.host.split(":"), timeout=30)
    connection.putrequest("GET", target, skip_host="Host" in headers, skip_accept_encoding=True)
    for name, value in headers.items():
        connection.putheader(name, value)
    connection.endheaders()
    answer = connection.getresponse()
    said = answer.read()
    connection.close()
    assert b"lcm_rt_" not in said
    assert answer.status < 500

"""The door of the routes, and the tokens that pages are given."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx2 as httpx
import pytest
from serving import run
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.websockets import WebSocket
from test_auth import Clock

from lcm_rt.auth import MAX_TRIES, SCOPES, Auth
from lcm_rt.errors import LcmError, Overloaded, Unauthorized
from lcm_rt.metrics import Metrics
from lcm_rt.server import replies, tokens
from lcm_rt.server.guard import guarded, principal_of_socket
from lcm_rt.store import Store


class Counting:
    """What the error handler asks of a service."""

    metrics = Metrics()


async def who(request: Request) -> Response:
    principal = getattr(request.state, "principal", None)
    return replies.json_response(principal and [principal.owner, sorted(principal.scopes)])


class Door:
    """An application with one route of each need, and what is behind it."""

    def __init__(self, auth: Auth, clock: Clock) -> None:
        self.auth = auth
        self.clock = clock
        self.app = Starlette(
            routes=[
                Route("/open", guarded(who, "open")),
                Route("/generate", guarded(who, "generate")),
                Route("/admin", guarded(who, "admin")),
                Route("/signed", guarded(who, "signed")),
                Route("/{app:path}/stream", guarded(who, "generate", by_token=True)),
                Route("/nothing/by/app", guarded(who, "generate", by_token=True)),
                *(
                    Route(path, guarded(tokens.create_token, "generate"), methods=["POST"])
                    for path in ("/tokens", "/tokens/")
                ),
            ],
            exception_handlers={LcmError: replies.on_error},
        )
        self.app.state.auth = auth
        self.app.state.bodies = replies.Bodies()
        self.app.state.service = Counting()

    def client(self, key: str | None = None, *, address: str = "127.0.0.1") -> httpx.AsyncClient:
        headers = {"authorization": f"Key {key}"} if key else {}
        transport = httpx.ASGITransport(self.app, client=(address, 1))
        return httpx.AsyncClient(transport=transport, base_url="http://door", headers=headers)

    async def owner_of_socket(self, app: str, query: str = "", header: str | None = None) -> str:
        async def nothing(*_: Any) -> Any:
            raise AssertionError("the door says nothing itself")

        scope = {
            "type": "websocket",
            "app": self.app,
            "path": "/",
            "query_string": query.encode(),
            "headers": [(b"authorization", header.encode())] if header else [],
            "client": ("127.0.0.1", 1),
        }
        return (await principal_of_socket(WebSocket(scope, nothing, nothing), app)).owner


@asynccontextmanager
async def door(folder: Path, *, is_open: bool = False) -> AsyncIterator[Door]:
    clock = Clock()
    async with Store(f"sqlite:///{folder}/store.db") as store:
        auth = Auth(store, is_open=is_open, clock=clock)
        await auth.start()
        yield Door(auth, clock)


async def token_of(http: httpx.AsyncClient, *apps: str, seconds: float = 120) -> str:
    answer = await http.post("/tokens/", json={"allowed_apps": apps, "token_expiration": seconds})
    assert answer.status_code == 200, answer.text
    return str(answer.json())


@pytest.mark.points(35)
@run
async def test_each_need(tmp_path: Path) -> None:
    async with door(tmp_path) as at:
        ann = await at.auth.create_key("ann", ["generate"])
        root = await at.auth.create_key("root", SCOPES)
        keeper = await at.auth.create_key("keeper", ["admin"])
        ended = await at.auth.create_key("ended", SCOPES)
        await at.auth.revoke_key(ended[:16])
        for key, statuses in (
            (None, (200, 401, 401, 200)),
            ("id:secret", (200, 401, 401, 200)),
            (ended, (200, 401, 401, 200)),
            (ann, (200, 200, 403, 200)),
            (keeper, (200, 403, 200, 200)),
            (root, (200, 200, 200, 200)),
        ):
            async with at.client(key) as http:
                answers = [await http.get(f"/{need}") for need in ("open", "generate", "admin", "signed")]
            assert tuple(answer.status_code for answer in answers) == statuses
            for answer in answers:
                if answer.status_code in (401, 403):
                    assert answer.headers["content-type"] == "application/json"
                    told = answer.json()
                    assert told["detail"] == told["message"] and told["message"]
                    assert told["error_type"] == {401: "unauthorized", 403: "forbidden"}[answer.status_code]
                    assert ("www-authenticate" in answer.headers) == (answer.status_code == 401)
        async with at.client(ann) as http:
            assert (await http.get("/generate")).json() == ["ann", ["generate"]]
            assert (await http.get("/open")).json() is None, "nobody was asked"
        async with at.client() as http:  # the header alone counts: neither another one, nor the query, nor the body
            for answer in (
                await http.get("/generate", params={"key": ann, "authorization": f"Key {ann}"}),
                await http.get("/generate", headers={"x-api-key": ann, "cookie": f"authorization=Key {ann}"}),
                await http.get("/generate", headers={"host": "open", "x-original-url": "/open"}),
                await http.post("/tokens", json={"key": ann}),
            ):
                assert answer.status_code == 401


@run
async def test_open_mode_lets_everybody_in(tmp_path: Path) -> None:
    async with door(tmp_path, is_open=True) as at:
        for key in (None, "id:secret", "single"):
            async with at.client(key) as http:
                for need in ("generate", "admin"):
                    assert (await http.get(f"/{need}")).json() == ["local", ["admin", "generate"]]
                token = await token_of(http, "lcm")
                assert (await http.get("/lcm/stream", params={"fal_jwt_token": token})).status_code == 200
        assert await at.owner_of_socket("lcm") == "local"
        assert await at.owner_of_socket("lcm", "fal_jwt_token=x") == "local"
        assert await at.owner_of_socket("lcm", header=f"Key {await at.auth.create_key('ann')}") == "ann"


def test_a_route_without_a_need_is_none() -> None:
    with pytest.raises(ValueError, match="need"):
        guarded(who, "everybody")  # type: ignore[arg-type]


@run
async def test_wrong_keys_meet_429(tmp_path: Path) -> None:
    async with door(tmp_path) as at, at.client("id:secret", address="9.9.9.9") as http:
        statuses = [(await http.get("/generate")).status_code for _ in range(MAX_TRIES)]
        assert statuses == [401] * MAX_TRIES
        answer = await http.get("/generate")
        assert (answer.status_code, answer.json()["error_type"]) == (429, "overloaded")
        assert answer.headers["retry-after"]
        async with at.client("id:secret", address="9.9.9.8") as elsewhere:
            assert (await elsewhere.get("/generate")).status_code == 401


@pytest.mark.points(33, 34)
@run
async def test_a_token_is_a_bare_string(tmp_path: Path) -> None:
    async with door(tmp_path) as at, at.client(await at.auth.create_key("ann")) as http:
        for path in ("/tokens", "/tokens/"):
            for body, apps, lifetime_s in (
                (b"", None, 120),
                (b" ", None, 120),
                (b"{}", None, 120),
                (b'{"allowed_apps": null}', None, 120),
                (b'{"allowed_apps": [], "token_expiration": 1}', [], 1),
                (b'{"allowed_apps": ["lcm"], "token_expiration": 300, "what": {"else": 1}}', ["lcm"], 300),
                (b'{"allowed_apps": ["fal-ai/lcm", "lcm"], "token_expiration": 0.25}', ["lcm"], 1),
                (b'{"allowed_apps": ["lcm"], "token_expiration": 1e308}', ["lcm"], 86400),
            ):
                answer = await http.post(path, content=body)
                assert (answer.status_code, answer.headers["content-type"]) == (200, "application/json")
                assert answer.text == f'"{answer.json()}"'
                claims = at.auth.claims_of_token(answer.json(), "realtime")
                assert (claims["sub"], claims["apps"]) == ("ann", apps)
                assert claims["exp"] - claims["iat"] == lifetime_s


@pytest.mark.parametrize(
    "body, field",
    [
        (b"{", "body"),
        (b"[]", "body"),
        (b"null", "body"),
        (b'"lcm"', "body"),
        (b"\xff", "body"),
        (b" " * 70_000 + b"{}", "body"),
        (b'{"allowed_apps": "lcm"}', "allowed_apps"),
        (b'{"allowed_apps": {"lcm": 1}}', "allowed_apps"),
        (b'{"allowed_apps": [1]}', "allowed_apps.0"),
        (b'{"allowed_apps": [null]}', "allowed_apps.0"),
        (b'{"allowed_apps": [' + b",".join([b'"x"'] * 101) + b"]}", "allowed_apps"),
        (b'{"allowed_apps": ["' + b"x" * 5000 + b'"]}', "allowed_apps"),
        (b'{"token_expiration": 0}', "token_expiration"),
        (b'{"token_expiration": -5}', "token_expiration"),
        (b'{"token_expiration": "120"}', "token_expiration"),
        (b'{"token_expiration": true}', "token_expiration"),
        (b'{"token_expiration": null}', "token_expiration"),
        (b'{"token_expiration": [1]}', "token_expiration"),
    ],
)
def test_wishes_that_are_refused(tmp_path: Path, body: bytes, field: str) -> None:
    @run
    async def walk() -> None:
        async with door(tmp_path, is_open=True) as at, at.client() as http:
            answer = await http.post("/tokens/", content=body)
            assert answer.status_code == 422, answer.text
            first = answer.json()["detail"][0]
            assert [str(part) for part in first["loc"]] == ["body", *([] if field == "body" else field.split("."))]

    walk()


@run
async def test_a_token_opens_the_streams_of_its_apps(tmp_path: Path) -> None:
    async with door(tmp_path) as at, at.client() as http:
        key = await at.auth.create_key("ann", SCOPES)
        async with at.client(key) as mine:
            token = await token_of(mine, "lcm")
            anything = (await mine.post("/tokens/")).json()
        cdn = at.auth.mint(await at.auth.principal_of(f"Key {key}"), "cdn", lifetime_s=60)

        async def status(path: str, token: str = token, **headers: str) -> int:
            return (await http.get(path, params={"fal_jwt_token": token}, headers=headers)).status_code

        assert (await http.get("/fal-ai/lcm/stream", params={"fal_jwt_token": token})).json() == ["ann", ["generate"]]
        assert await status("/fal-ai/lcm/stream", authorization="Basic eDp5") == 200  # a proxy's own
        assert await status("/fal-ai/other/stream") == 401
        assert await status("/fal-ai/other/stream", anything) == 200
        assert await status("/fal-ai/lcm/stream", cdn) == 401
        assert await status("/fal-ai/lcm/stream", "") == 401
        assert await status("/nothing/by/app") == 401, "a token for one app opens no route without an app"
        assert await status("/nothing/by/app", anything) == 200
        assert await status("/generate", anything) == 401, "elsewhere a key is wanted"
        assert await status("/admin", anything) == 401
        answer = await http.post("/tokens/", params={"fal_jwt_token": anything})
        assert answer.status_code == 401, "a token makes no tokens"
        answer = await http.post("/tokens/", headers={"authorization": f"Bearer {anything}"})
        assert answer.status_code == 401
        at.clock.now += 151
        assert await status("/fal-ai/lcm/stream") == 401


@pytest.mark.points(6, 7)
@run
async def test_who_opens_a_socket(tmp_path: Path) -> None:
    async with door(tmp_path) as at:
        key = await at.auth.create_key("ann")
        keeper = await at.auth.create_key("keeper", ["admin"])
        async with at.client(key) as http:
            token = await token_of(http, "lcm-sd15-i2i")
        owner = at.owner_of_socket
        query = f"fal_jwt_token={token}"
        for app in ("110602490-lcm-sd15-i2i", "110602490/lcm-sd15-i2i", "fal-ai/lcm-sd15-i2i", "lcm-sd15-i2i"):
            assert await owner(app, query) == "ann"
        assert await owner("fal-ai/x", header=f"Key {key}") == "ann"
        assert await owner("fal-ai/x", "fal_jwt_token=", f"Key {key}") == "ann"
        assert await owner("lcm-sd15-i2i", f"max_buffering=3&{query}", "Basic eDp5") == "ann"
        for words in (
            ("fal-ai/x", query),
            ("", query),
            ("lcm", ""),
            ("lcm", "fal_jwt_token=x"),
            ("lcm", f"fal_jwt_token={'x' * 2**20}"),
            ("lcm", "", "Key id:secret"),
            ("lcm", "", f"Key {keeper}"),
            ("lcm", f"fal_jwt_token={key}"),
        ):
            with pytest.raises(Unauthorized):
                await owner(*words)
        at.clock.now += 86400
        assert await owner("lcm-sd15-i2i", query) == "ann", "an old one is taken for a day"
        at.clock.now += 151
        with pytest.raises(Unauthorized):
            await owner("lcm-sd15-i2i", query)
        with pytest.raises(Overloaded):
            for _ in range(MAX_TRIES + 1):
                with pytest.raises(Unauthorized):
                    await owner("lcm", "", "Key id:secret")


@run
async def test_no_record_of_a_refusal_has_a_secret(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    async with door(tmp_path) as at:
        key = await at.auth.create_key("ann")
        async with at.client(key) as http:
            token = await token_of(http, "lcm")
            refusal = await http.get("/admin")
        async with at.client(f"{key}x") as http:
            answers = [refusal, await http.get("/generate")]
        with pytest.raises(Unauthorized) as told:
            await at.owner_of_socket("other", f"fal_jwt_token={token}")
        said = [record.getMessage() for record in caplog.records if not record.name.startswith(("httpx", "httpcore"))]
        for words in (*said, str(told.value), *(answer.text for answer in answers)):
            assert key.partition(":")[2] not in words
            assert token.rpartition(".")[2] not in words

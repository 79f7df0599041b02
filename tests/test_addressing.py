"""Which service a request is for, by host, prefix and proxy."""

from __future__ import annotations

from typing import Any

import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.testclient import TestClient

from lcm_rt.apps import parse_app
from lcm_rt.server.addressing import Addressing, address_of, internal_path


@pytest.mark.parametrize(
    ("text", "namespace", "owner", "alias", "path", "id"),
    [
        ("fal-ai/lcm", "", "fal-ai", "lcm", "", "fal-ai/lcm"),
        ("110602490-lcm-sd15-i2i", "", "110602490", "lcm-sd15-i2i", "", "110602490/lcm-sd15-i2i"),
        ("110602490/lcm-sd15-i2i/x/y", "", "110602490", "lcm-sd15-i2i", "x/y", "110602490/lcm-sd15-i2i"),
        ("/workflows/me/flow/sub/", "workflows", "me", "flow", "sub", "workflows/me/flow"),
        ("comfy/me/flow", "comfy", "me", "flow", "", "comfy/me/flow"),
        ("embedded", "", "", "embedded", "", "embedded"),
        ("12-", "", "", "12-", "", "12-"),
        ("", "", "", "", "", ""),
    ],
)
def test_application_ids(text: str, namespace: str, owner: str, alias: str, path: str, id: str) -> None:
    app = parse_app(text)
    assert app == (namespace, owner, alias, path)
    assert app.id == id


@pytest.mark.points(1, 42)
@pytest.mark.parametrize(
    ("host", "path", "inside"),
    [
        ("fal.run", "/fal-ai/lcm", "/run/fal-ai/lcm"),
        ("falrun.com", "/fal-ai/lcm", "/run/fal-ai/lcm"),
        ("queue.fal.run", "/fal-ai/lcm", "/queue/fal-ai/lcm"),
        ("ws.fal.run", "/fal-ai/lcm", "/ws/fal-ai/lcm"),
        ("rest.alpha.fal.ai", "/tokens/", "/rest/tokens/"),
        ("rest.fal.ai", "/storage/upload/initiate", "/rest/storage/upload/initiate"),
        ("v3.fal.media", "/files/upload", "/cdn/files/upload"),
        ("110602490-lcm-sd15-i2i.gateway.alpha.fal.ai", "/ws", "/run/110602490-lcm-sd15-i2i/ws"),
        ("1-x.gateway.alpha.fal.ai", "/", "/run/1-x/"),
        ("1-x.gateway.alpha.fal.ai", "/fal/queue/submit/a", "/queue/1-x/a"),
        ("1-x.gateway.alpha.fal.ai", "/fal/queue/requests/R/status/", "/queue/1-x/requests/R/status"),
        ("1-x.gateway.alpha.fal.ai", "/fal/queue/requests/R/response", "/queue/1-x/requests/R"),
        ("localhost", "/fal-ai/lcm", None),
        ("evil.fal.run.example.org", "/", None),
        ("", "/", None),
    ],
)
def test_hosts(host: str, path: str, inside: str | None) -> None:
    assert internal_path(host, path) == inside


def told(request: Request) -> Response:
    address = address_of(request)
    return JSONResponse(
        {
            "path": request.url.path,
            "query": request.url.query,
            "method": request.method,
            "file": address.file("f"),
            "job": address.job("a/b", "R"),
        }
    )


@pytest.fixture
def client() -> TestClient:
    app = Starlette(routes=[Route("/{path:path}", told, methods=["GET", "POST", "PUT"])])
    return TestClient(Addressing(app), base_url="http://localhost:8000")


def ask(client: TestClient, method: str, path: str, **headers: str) -> dict[str, Any]:
    answer = client.request(method, path, headers=headers)
    assert answer.status_code == 200, answer.text
    return answer.json()


@pytest.mark.points(41, 42)
def test_answers_point_where_the_client_is(client: TestClient) -> None:
    plain = ask(client, "GET", "/queue/a/b")
    assert plain["path"] == "/queue/a/b"
    assert plain["job"] == "http://localhost:8000/queue/a/b/requests/R"
    assert plain["file"] == "http://localhost:8000/files/f"
    hosted = ask(client, "GET", "/a/b", host="queue.fal.run")
    assert hosted["path"] == "/queue/a/b"
    assert hosted["job"] == "http://queue.fal.run/a/b/requests/R"
    assert hosted["file"] == "http://v3.fal.media/files/f"
    assert ask(client, "GET", "/a/b", host="FAL.run:8766")["file"] == "http://v3.fal.media:8766/files/f"


@pytest.mark.points(36)
def test_the_proxy_goes_where_its_header_says(client: TestClient) -> None:
    target = "https://queue.fal.run/fal-ai/lcm/requests/R%2F1/status?logs=1&x=%C3%A4"
    for method in ("GET", "POST", "PUT"):
        answer = ask(client, method, "/api/fal/proxy", **{"x-fal-target-url": target})
        assert (answer["path"], answer["query"]) == ("/queue/fal-ai/lcm/requests/R/1/status", "logs=1&x=%C3%A4")
        assert answer["method"] == method
        assert answer["job"] == "http://localhost:8000/queue/a/b/requests/R"


@pytest.mark.points(36)
@pytest.mark.parametrize(
    "target",
    [
        None,
        "",
        "https://example.org/x",
        "ftp://fal.run/x",
        "//fal.run/x",
        "https://[::1/",
        "x" * 20_000,
        "https://fal.run.evil/",
    ],
)
def test_the_proxy_goes_nowhere_else(client: TestClient, target: str | None) -> None:
    headers = {} if target is None else {"x-fal-target-url": target}
    answer = client.post("/api/fal/proxy", headers=headers)
    assert answer.status_code == 400
    assert answer.json()["message"] and answer.json()["detail"]


@pytest.mark.points(37)
def test_elsewhere_its_header_means_nothing(client: TestClient) -> None:
    answer = ask(client, "GET", "/run/a/b", **{"x-fal-target-url": "https://queue.fal.run/other"})
    assert answer["path"] == "/run/a/b"

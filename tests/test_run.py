"""Plain HTTP: run, files, health, models, metrics, errors."""

from __future__ import annotations

import asyncio
import base64
import json
import os
from pathlib import Path
from typing import Any

import httpx2 as httpx
import pytest
from fake_engine import colour
from serving import SIDE, Server, hear, model_folder, run, say, serving, until
from test_realtime import Hold, pixels

SMALL = {"image_size": {"width": SIDE, "height": SIDE}, "format": "png", "num_inference_steps": 1}


def client(server: Server) -> httpx.AsyncClient:
    # Made beforehand, because loading certificates blocks: but this is plain HTTP to ourselves.
    return httpx.AsyncClient(base_url=server.http, verify=False, timeout=30)


@pytest.mark.points(39)
@run
async def test_a_picture_by_url_and_inline(tmp_path: Path) -> None:
    async with serving(tmp_path) as server, client(server) as http:
        for path in ("/run/fal-ai/lcm", "/fal-ai/lcm", "/run/fake", "/run/110602490-lcm-sd15-i2i"):
            answer = await http.post(path, json={"prompt": "lake", "seed": 5, **SMALL})
            assert answer.status_code == 200, answer.text
            assert answer.headers["x-fal-request-id"]
            (image,) = answer.json()["images"]
            assert image["url"].startswith(f"{server.http}/files/")
            file = await http.get(image["url"])
            assert file.headers["content-type"] == "image/png"
            assert tuple(pixels(file.content)[0, 0]) == colour("lake", 5)
        inline = await http.post("/run/fal-ai/lcm", json={"prompt": "lake", "seed": 5, "sync_mode": True, **SMALL})
        assert inline.json()["images"][0]["url"].startswith("data:image/png;base64,")
        # The answered picture is itself an input, without a network trip.
        again = await http.post("/run/fal-ai/lcm", json={"prompt": "sea", "image_url": image["url"]})
        assert (again.json()["images"][0]["width"], again.json()["images"][0]["height"]) == (SIDE, SIDE)


@run
async def test_several_pictures_have_consecutive_seeds(tmp_path: Path) -> None:
    async with serving(tmp_path) as server, client(server) as http:
        answer = (await http.post("/run/fal-ai/lcm", json={"prompt": "x", "seed": 9, "num_images": 3, **SMALL})).json()
        assert answer["seed"] == 9
        files = [(await http.get(image["url"])).content for image in answer["images"]]
        assert [tuple(pixels(file)[0, 0]) for file in files] == [colour("x", seed) for seed in (9, 10, 11)]


@pytest.mark.points(56)
@run
async def test_errors_are_typed_json(tmp_path: Path) -> None:
    async with serving(tmp_path) as server, client(server) as http:
        for path, body, status, code in (
            ("/run/fal-ai/lcm", b"{", 422, "invalid_input"),
            ("/run/fal-ai/lcm", b"[]", 422, "invalid_input"),
            ("/run/fal-ai/lcm", b'{"prompt": "x", "strength": 2}', 422, "invalid_input"),
            ("/run/fal-ai/nope", b'{"prompt": "x"}', 404, "not_found"),
            ("/run/fal-ai/lcm", b'{"prompt": "raise"}', 500, "generation_failed"),
            ("/run/fal-ai/lcm", b'{"prompt": "crash"}', 503, "engine_lost"),
        ):
            answer = await http.post(path, content=body)
            assert answer.status_code == status, answer.text
            assert answer.headers["x-fal-error-type"] == code
            assert answer.headers["x-fal-request-id"]
            assert answer.json()["message"]
            assert answer.json()["detail"]
            assert "secret" not in answer.text
        for answer in (await http.get("/nope"), await http.post("/fal-ai/lcm/requests/x/cancel", json={"prompt": "x"})):
            assert (answer.status_code, answer.headers["content-type"]) == (404, "application/json")
            assert answer.json()["message"]
        assert (await http.get("/files/%2e%2e%2f%2e%2e%2fmodel%2fmodel_index.json")).status_code == 404
        assert server.metric("lcm_rt_errors_total", code="invalid_input") == 3
        assert (await http.get("/files/AAAAAAAAAAAAAAAAAAAAAA.png")).json()["error_type"] == "not_found"


@pytest.mark.points(65)
@run
async def test_health_tells_loading_from_ready_from_broken(tmp_path: Path) -> None:
    loading = tmp_path / "slow-load"
    os.mkfifo(loading)
    model = model_folder(tmp_path / "model", "slow-load")
    async with serving(tmp_path, ready=False, models=[model]) as server, client(server) as http:
        await until(lambda: server.service.workers.models["slow-load"].stage == "weights")
        assert (await http.get("/health/live")).status_code == 200
        assert (await http.get("/health")).json()["status"] == "loading"
        ready = await http.get("/health/ready")
        assert (ready.status_code, ready.json()["error_type"]) == (503, "model_loading")
        (entry,) = (await http.get("/models")).json()["models"]
        assert (entry["state"], entry["stage"], entry["progress"]) == ("loading", "weights", 0.5)
        refused = await http.post("/run/fal-ai/lcm", json={"prompt": "x"})
        assert (refused.status_code, refused.json()["error_type"]) == (503, "model_loading")
        assert refused.headers["retry-after"]
        await asyncio.to_thread(loading.write_bytes, b"go")
        await server.service.workers.wait_ready()
        assert (await http.get("/health/ready")).status_code == 200
        assert (await http.get("/models")).json()["models"][0]["state"] == "ready"
    async with serving(tmp_path, ready=False, device="none") as server, client(server) as http:
        await until(lambda: server.service.workers.failure is not None)
        assert (await http.get("/health/ready")).json()["message"] == "there is no such device"
        assert (await http.post("/run/fal-ai/lcm", json={"prompt": "x"})).status_code == 503


@run
async def test_a_caller_that_hangs_up_frees_its_work(tmp_path: Path) -> None:
    hold = Hold(tmp_path)
    async with serving(tmp_path) as server, client(server) as http:
        gone = asyncio.create_task(http.post("/run/fal-ai/lcm", json={"prompt": hold.prompt, **SMALL}))
        await hold.entered()
        gone.cancel()
        await asyncio.wait([gone])
        hold.release()
        await until(lambda: not server.metric("lcm_rt_pending"))
        assert not server.metric("lcm_rt_pictures_total", model="fake", priority="run")


@run
async def test_more_than_the_limit_is_refused(tmp_path: Path) -> None:
    hold = Hold(tmp_path)
    async with serving(tmp_path, max_pending=1) as server, client(server) as http:
        first = asyncio.create_task(http.post("/run/fal-ai/lcm", json={"prompt": hold.prompt, **SMALL}))
        await hold.entered()
        refused = await http.post("/run/fal-ai/lcm", json={"prompt": "x"})
        assert (refused.status_code, refused.json()["error_type"]) == (429, "overloaded")
        hold.release()
        assert (await first).status_code == 200


@run
async def test_metrics_count(tmp_path: Path) -> None:
    async with serving(tmp_path) as server, client(server) as http:
        await http.post("/run/fal-ai/lcm", json={"prompt": "x", **SMALL})
        text = (await http.get("/metrics")).text
        assert 'lcm_rt_pictures_total{model="fake",priority="run"} 1.0' in text
        assert "lcm_rt_ready 1.0" in text
        assert 'lcm_rt_stage_seconds_count{stage="total"} 1.0' in text


@run
async def test_any_page_may_call(tmp_path: Path) -> None:
    async with serving(tmp_path) as server, client(server) as http:
        asked = await http.options(
            "/run/fal-ai/lcm",
            headers={
                "origin": "https://example.com",
                "access-control-request-method": "POST",
                "access-control-request-headers": "x-fal-runner-hint,authorization,content-type",
            },
        )
        assert asked.status_code == 200
        assert asked.headers["access-control-allow-origin"] == "*"
        assert (await http.get("/")).headers["content-type"].startswith("text/html")


@pytest.mark.points(38)
@run
async def test_what_clients_read_is_exposed_to_pages(tmp_path: Path) -> None:
    async with serving(tmp_path) as server, client(server) as http:
        for path in ("/run/fal-ai/lcm", "/queue/fal-ai/lcm", "/rest/tokens/", "/api/fal/proxy", "/upload/x"):
            for method in ("GET", "POST", "PUT"):
                asked = await http.options(
                    path,
                    headers={
                        "origin": "https://example.com",
                        "access-control-request-method": method,
                        "access-control-request-headers": "x-fal-target-url,x-fal-anything,authorization,content-type",
                    },
                )
                assert asked.status_code == 200, path
                assert "x-fal-anything" in asked.headers["access-control-allow-headers"]
        answer = await http.post(
            "/run/fal-ai/lcm", json={"prompt": "x", **SMALL}, headers={"origin": "https://a.example"}
        )
        exposed = answer.headers["access-control-expose-headers"]
        assert {"x-fal-request-id", "x-fal-error-type", "x-fal-request-timeout-type"} <= set(exposed.split(", "))


@pytest.mark.points(39, 40)
@run
async def test_the_input_may_be_in_the_query(tmp_path: Path) -> None:
    query = {
        "prompt": "lake",
        "seed": "5",
        "format": "png",
        "num_inference_steps": "1",
        "sync_mode": "true",
        "image_size": '{"width": 64, "height": 64}',
    }
    async with serving(tmp_path) as server, client(server) as http:
        for path in ("/run/fal-ai/lcm", "/fal-ai/lcm"):
            answer = await http.get(path, params=query)
            assert answer.status_code == 200, answer.text
            assert answer.headers["content-type"] == "application/json"
            assert answer.headers["x-fal-request-id"]
            data = base64.b64decode(answer.json()["images"][0]["url"].partition(",")[2])
            assert tuple(pixels(data)[0, 0]) == colour("lake", 5)
        hosted = await http.get("/fal-ai/lcm", params=query, headers={"host": "fal.run"})
        assert hosted.status_code == 200
        wrong = await http.get("/run/fal-ai/lcm", params={**query, "seed": "x", "image_size": "{"})
        assert wrong.status_code == 422


def events_of(text: str) -> list[dict[str, Any]]:
    return [json.loads(line.removeprefix("data: ")) for line in text.splitlines() if line.startswith("data: ")]


@pytest.mark.points(52, 54)
@run
async def test_a_stream_shows_what_comes_on_the_way(tmp_path: Path) -> None:
    wish = {"prompt": "lake", "seed": 5, **SMALL, "num_inference_steps": 4}
    async with serving(tmp_path) as server, client(server) as http:
        for path in ("/run/fal-ai/lcm/stream", "/fal-ai/lcm/stream"):
            answer = await http.post(path, json=wish, headers={"accept": "application/json, text/event-stream"})
            assert answer.headers["content-type"].startswith("text/event-stream")
            assert answer.headers["x-fal-request-id"]
            *previews, last = events_of(answer.text)
            assert [preview["preview"] for preview in previews] == [True] * len(previews)
            assert previews and len(previews) <= 3
            assert last["seed"] == 5 and last["images"][0]["url"].startswith(f"{server.http}/files/")
        plain = await http.post("/run/fal-ai/lcm", json=wish, headers={"accept": "text/event-stream"})
        assert plain.json()["images"]
        for body, status in ((b"{", 422), (b'{"prompt": "x", "strength": 7}', 422)):
            wrong = await http.post("/run/fal-ai/lcm/stream", content=body)
            assert (wrong.status_code, wrong.headers["content-type"]) == (status, "application/json")
        (late,) = events_of((await http.post("/run/fal-ai/lcm/stream", json={**SMALL, "prompt": "raise"})).text)
        assert (late["error"], late["error_type"]) == ("generation_failed", "generation_failed")


@pytest.mark.points(50, 56)
@run
async def test_a_run_begins_in_the_time_that_its_client_gives(tmp_path: Path) -> None:
    hold = Hold(tmp_path)
    async with serving(tmp_path, max_rows=1) as server, client(server) as http:
        first = asyncio.create_task(http.post("/run/fal-ai/lcm", json={"prompt": hold.prompt, **SMALL}))
        await hold.entered()
        late = await http.post(
            "/run/fal-ai/lcm", json={"prompt": "lake", **SMALL}, headers={"x-fal-request-timeout": "0.05"}
        )
        assert (late.status_code, late.json()["error_type"]) == (504, "request_timeout")
        assert late.headers["x-fal-request-timeout-type"] == "user"
        assert late.headers["x-fal-error-type"] == "request_timeout"
        assert late.headers["x-fal-request-id"]
        hold.release()
        assert (await first).status_code == 200
        in_time = await http.post(
            "/run/fal-ai/lcm", json={"prompt": "lake", **SMALL}, headers={"x-fal-request-timeout": "60"}
        )
        assert in_time.status_code == 200


@pytest.mark.points(36)
@run
async def test_a_stream_through_the_proxy(tmp_path: Path) -> None:
    async with serving(tmp_path) as server, client(server) as http:
        hold = Hold(tmp_path)
        headers = {"x-fal-target-url": "https://fal.run/fal-ai/lcm/stream"}
        wish = {"prompt": hold.prompt, **SMALL, "num_inference_steps": 2}
        async with http.stream("POST", "/api/fal/proxy", json=wish, headers=headers) as answer:
            await hold.entered()
            hold.release()
            lines = answer.aiter_lines()
            while not (line := await anext(lines)).startswith("data: "):
                pass
            assert json.loads(line[6:])["preview"]  # while the last step is still held
            await hold.entered()
            hold.release()
            assert [line async for line in lines]


@run
async def test_a_token_opens_no_other_model_by_the_message(tmp_path: Path) -> None:
    models = [model_folder(tmp_path / "one"), model_folder(tmp_path / "two", "other")]
    async with serving(tmp_path, models=models, keys=True) as server, client(server) as http:
        key = {"authorization": f"Key {await server.key()}"}
        token = (await http.post("/tokens/", json={"allowed_apps": ["fake"]}, headers=key)).json()
        wish = {"prompt": "lake", **SMALL}
        path = f"/run/x/fake/stream?fal_jwt_token={token}"
        assert (await http.post(path, json=wish)).status_code == 200
        refused = await http.post(path, json={**wish, "model": "other"})
        assert (refused.status_code, refused.json()["detail"][0]["type"]) == (422, "model_forbidden")
        (*_, hinted) = events_of((await http.post(path, json={**wish, "model_name": "other"})).text)
        assert hinted["model"] == "fake"
        async with server.connect(f"/x/fake/realtime?fal_jwt_token={token}") as socket:
            await say(socket, model="other", **wish)
            assert (await hear(socket))["detail"][0]["type"] == "model_forbidden"
        assert (await http.post("/run/x/fake", json={**wish, "model": "other"}, headers=key)).json()["model"] == "other"


@run
async def test_pictures_are_kept_from_others_where_their_owner_says_so(tmp_path: Path) -> None:
    hidden = {"x-fal-object-lifecycle-preference": '{"initial_acl": {"default": "hide"}}'}
    async with serving(tmp_path, keys=True) as server, client(server) as http:
        alice = {"authorization": f"Key {await server.key('alice')}"}
        bob = {"authorization": f"Key {await server.key('bob')}"}
        answers = [
            (await http.post("/run/fal-ai/lcm", json={"prompt": "x", **SMALL}, headers=alice | hidden)).json()[
                "images"
            ],
            (await http.post("/v1/images/generations", json={"prompt": "x"}, headers=alice | hidden)).json()["data"],
        ]
        job = (await http.post("/queue/fal-ai/lcm", json={"prompt": "x", **SMALL}, headers=alice | hidden)).json()
        while (await http.get(job["status_url"], headers=alice)).status_code == 202:
            pass
        answers.append((await http.get(job["response_url"], headers=alice)).json()["images"])
        for (image,) in answers:
            statuses = [(await http.get(image["url"], headers=who)).status_code for who in ({}, bob, alice)]
            assert statuses == [404, 404, 200]


@run
async def test_no_page_of_another_origin_reaches_what_is_private(tmp_path: Path) -> None:
    async with serving(tmp_path) as server, client(server) as http:
        for method, path in (
            ("GET", "/webhooks/secret"),
            ("GET", "/metrics"),
            ("POST", "/models/fake/unload"),
        ):
            foreign = await http.request(method, path, headers={"origin": "https://evil.example"})
            assert (foreign.status_code, foreign.json()["error_type"]) == (403, "forbidden")
            own = await http.request(method, path, headers={"origin": server.http})
            assert own.status_code < 300
        for host in ("evil.example", "localhost.evil.example", "a/?x=", 'x";alert(1)//', "[::1", ""):
            answer = await http.get("/models", headers={"host": host})
            assert answer.status_code == 400, host
        for host in ("localhost:1", "127.0.0.1", "[::1]:8000", "my.localhost", "queue.fal.run"):
            assert (await http.get("/health", headers={"host": host})).status_code in (200, 404), host
    async with serving(tmp_path, hosts=["pictures.example"]) as server, client(server) as http:
        assert (await http.get("/models", headers={"host": "pictures.example"})).status_code == 200


@run
async def test_bodies_of_one_client_do_not_take_all_memory(tmp_path: Path) -> None:
    async with serving(tmp_path) as server, client(server) as http:
        bodies = server.app.state.bodies
        bodies.take("127.0.0.1", 128 * 2**20 - 10)
        answer = await http.post("/run/fal-ai/lcm", json={"prompt": "x", **SMALL})
        assert (answer.status_code, answer.json()["error_type"]) == (429, "overloaded")
        bodies.give("127.0.0.1", 128 * 2**20 - 10)
        assert (await http.post("/run/fal-ai/lcm", json={"prompt": "x", **SMALL})).status_code == 200
        assert not bodies._of


@run
async def test_a_client_that_leaves_in_the_middle_is_no_crash(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    async with serving(tmp_path) as server:
        host, _, port = server.host.partition(":")
        for path in ("/run/fal-ai/lcm", "/run/fal-ai/lcm/stream", "/tokens/", "/rest/storage/upload/initiate"):
            _, writer = await asyncio.open_connection(host, int(port))
            writer.write(f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100\r\n\r\n{{".encode())
            await writer.drain()
            await until(lambda: bool(server.app.state.bodies._of))
            writer.close()
            await until(lambda: not server.app.state.bodies._of)
    assert not [record for record in caplog.records if record.levelname == "ERROR"]

"""Plain HTTP: run, files, health, models, metrics, errors."""

from __future__ import annotations

import asyncio
import os
import time
from pathlib import Path

import httpx2 as httpx
from fake_engine import colour
from serving import SIDE, Server, model_folder, run, serving, until
from test_realtime import Hold, picture, pixels

SMALL = {"image_size": {"width": SIDE, "height": SIDE}, "format": "png", "num_inference_steps": 1}


def client(server: Server) -> httpx.AsyncClient:
    # Made beforehand, because loading certificates blocks: but this is plain HTTP to ourselves.
    return httpx.AsyncClient(base_url=server.http, verify=False, timeout=30)


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


def test_expired_and_surplus_files_go(tmp_path: Path) -> None:
    @run
    async def walk() -> None:
        async with serving(tmp_path, file_ttl_s=100, file_limit_mb=1) as server:
            files = server.service.files
            old = await files.put(picture(), "image/png")
            kept = [await files.put(b"x" * 400_000, "image/jpeg") for _ in range(3)]
            folder = tmp_path / "data" / "files"
            now = time.time()
            for age, name in enumerate([*kept, old]):
                os.utime(folder / name, (now - age * 50, now - age * 50))
            await asyncio.to_thread(files.sweep, now)
            assert sorted(path.name for path in folder.iterdir()) == sorted(kept[:2])

    walk()

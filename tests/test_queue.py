"""The queue as clients see it, over HTTP, with a real engine process that is fake."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import sqlite3
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import aclosing, asynccontextmanager, closing
from datetime import datetime
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx2 as httpx
import orjson
import pytest
from databases import PostgreSQL
from fake_engine import colour
from serving import SIDE, Server, hear, model_folder, run, say, serving, until
from sqlalchemy import select
from test_realtime import Hold, pixels

from lcm_rt.errors import Unavailable
from lcm_rt.files import LONGEST_S, lifecycle_of
from lcm_rt.jobs import Jobs
from lcm_rt.queue import Queue
from lcm_rt.server import serve
from lcm_rt.store import deliveries

SMALL = {"image_size": {"width": SIDE, "height": SIDE}, "format": "png", "num_inference_steps": 1}
APP = "/queue/fal-ai/lcm"


class Client:
    """One who queues, with the platform's words."""

    def __init__(self, http: httpx.AsyncClient, server: Server) -> None:
        self.http = http
        self.server = server
        self.states: set[str] = set()

    async def submit(self, prompt: str = "lake", path: str = APP, headers: Any = None, **fields: Any) -> Any:
        answer = await self.http.post(path, json={"prompt": prompt, **SMALL, **fields}, headers=headers)
        assert answer.status_code == 200, answer.text
        return answer.json()

    async def status(self, job: Any, query: str = "") -> Any:
        answer = await self.http.get(job["status_url"] + query)
        body = answer.json()
        assert answer.status_code == (200 if body["status"] == "COMPLETED" else 202)
        assert "logs" in body
        self.states.add(body["status"])
        return body

    async def until(self, job: Any, state: str) -> Any:
        while (body := await self.status(job))["status"] != state:  # noqa: ASYNC110
            await asyncio.sleep(0.005)
        return body

    async def result(self, job: Any) -> httpx.Response:
        await self.until(job, "COMPLETED")
        return await self.http.get(job["response_url"])

    async def cancel(self, job: Any) -> httpx.Response:
        return await self.http.put(job["cancel_url"])

    async def events(self, job: Any, query: str = "?logs=1") -> AsyncGenerator[Any]:
        async with self.http.stream("GET", job["status_url"] + "/stream" + query) as answer:
            assert answer.headers["content-type"].startswith("text/event-stream")
            async for line in answer.aiter_lines():
                if line.startswith("data:"):
                    yield orjson.loads(line.removeprefix("data:"))
                else:
                    assert not line or line.startswith(":"), "the clients know no named events"


@asynccontextmanager
async def queueing(folder: Path, **settings: Any) -> AsyncIterator[Client]:
    async with (
        serving(folder, **settings) as server,
        # Made without certificates, because loading them blocks: but this is plain HTTP to ourselves.
        httpx.AsyncClient(base_url=server.http, verify=False, timeout=30) as http,
    ):
        client = Client(http, server)
        yield client
        assert client.states <= {"IN_QUEUE", "IN_PROGRESS", "COMPLETED"}


async def kill_the_engine(client: Client) -> None:
    workers = client.server.service.workers
    dead = workers.pid
    assert dead
    os.kill(dead, signal.SIGKILL)
    await until(lambda: workers.pid not in (None, dead))


@pytest.mark.points(41, 44, 45)
@run
async def test_a_job_from_end_to_end(tmp_path: Path) -> None:
    async with queueing(tmp_path) as client:
        hold = Hold(tmp_path)
        job = await client.submit(hold.prompt, seed=5)
        url = f"{client.server.http}{APP}/requests/{job['request_id']}"
        assert (job["status"], job["queue_position"]) == ("IN_QUEUE", 0)
        assert (job["response_url"], job["status_url"]) == (url, f"{url}/status")
        assert job["cancel_url"] == f"{url}/cancel"
        await hold.entered()
        body = await client.until(job, "IN_PROGRESS")
        assert body["logs"] is None and "queue_position" not in body
        assert body["response_url"] == url
        early = await client.http.get(url)
        assert early.status_code == 400
        assert early.json()["message"] and early.json()["detail"]
        hold.release()
        body = await client.until(job, "COMPLETED")
        assert body["metrics"]["inference_time"] > 0
        assert "error" not in body
        answer = await client.result(job)
        assert answer.status_code == 200
        assert answer.headers["x-fal-request-id"] == job["request_id"]
        (image,) = answer.json()["images"]
        assert image["url"].startswith(f"{client.server.http}/files/")
        file = await client.http.get(image["url"])
        assert tuple(pixels(file.content)[0, 0]) == colour(hold.prompt, 5)
        assert (await client.result(job)).json() == answer.json(), "it may be read again"
        assert client.states == {"IN_PROGRESS", "COMPLETED"} | client.states


@pytest.mark.points(44, 48)
@run
async def test_logs_come_when_asked_for(tmp_path: Path) -> None:
    async with queueing(tmp_path) as client:
        job = await client.submit(seed=7)
        await client.until(job, "COMPLETED")
        for query in ("?logs=1", "?logs=true"):
            started, finished = (await client.status(job, query))["logs"]
        assert "fake" in started["message"]
        assert "seed 7" in finished["message"] and "1 steps" in finished["message"]
        for line in (started, finished):
            assert (line["level"], line["source"]) == ("INFO", "USER")
            assert datetime.fromisoformat(line["timestamp"]).tzinfo and line["timestamp"].endswith("+00:00")
        for query in ("?logs=0", "?logs=false", ""):
            assert (await client.status(job, query))["logs"] is None


ADDRESSES = [
    ("fal-ai/lcm", "fal-ai/lcm"),
    ("fal-ai/lcm/", "fal-ai/lcm"),
    ("fal-ai/lcm/image-to-image", "fal-ai/lcm"),
    ("fal-ai/lcm/deep/er", "fal-ai/lcm"),
    ("workflows/me/lcm/x", "workflows/me/lcm"),
    ("comfy/me/lcm", "comfy/me/lcm"),
    ("110602490-lcm-sd15-i2i", "110602490/lcm-sd15-i2i"),
    ("fake", "fake"),
]


@pytest.mark.points(41, 43)
@run
async def test_a_job_lies_at_owner_and_alias(tmp_path: Path) -> None:
    async with queueing(tmp_path) as client:
        for submitted, id in ADDRESSES:
            job = await client.submit(path=f"/queue/{submitted}")
            url = f"{client.server.http}/queue/{id}/requests/{job['request_id']}"
            assert job["response_url"] == url
            await client.until(job, "COMPLETED")
            for end in ("", "/", "/status", "/status/", "/status/stream", "/status/stream/"):
                answer = await client.http.get(url + end)
                assert answer.status_code == 200, (url, end, answer.text)
            for end in ("", "/"):
                assert (await client.http.put(f"{url}/cancel{end}")).json()["status"] == "ALREADY_COMPLETED"
            legacy = f"/queue/110602490-lcm-sd15-i2i/requests/{job['request_id']}"
            found = (await client.http.get(legacy)).status_code
            assert found == (200 if id.startswith("110") else 404), "another app's job does not exist"


@pytest.mark.points(46, 47, 55, 56)
@run
async def test_what_is_wrong_at_once(tmp_path: Path) -> None:
    async with queueing(tmp_path, max_side=512) as client:
        nobody = "00000000-0000-4000-8000-000000000000"
        for method, path, body, status in (
            ("POST", APP, b"{", 422),
            ("POST", APP, b"[]", 422),
            ("POST", APP, b'{"strength": 2}', 422),
            ("POST", APP, b'{"prompt": "x", "model": "nope"}', 422),
            ("POST", f"{APP}?fal_webhook=ftp://x/", b'{"prompt": "x"}', 422),
            ("POST", f"{APP}?fal_webhook=http://127.0.0.1/", b'{"prompt": "x"}', 422),
            ("POST", "/queue/fal-ai/nope", b'{"prompt": "x"}', 404),
            ("POST", "/queue/a%00b/lcm", b'{"prompt": "x"}', 404),
            ("POST", f"{APP}/requests/{nobody}", b'{"prompt": "x"}', 404),
            ("GET", f"{APP}/requests/{nobody}", b"", 404),
            ("GET", f"{APP}/requests/junk%00", b"", 404),
            ("GET", f"{APP}/requests/{nobody}/status", b"", 404),
            ("GET", f"{APP}/requests/{nobody}/status/stream", b"", 404),
        ):
            answer = await client.http.request(method, path, content=body)
            assert answer.status_code == status, (path, answer.text)
            assert answer.headers["content-type"] == "application/json"
            assert answer.json()["message"] and answer.json()["detail"]
            assert answer.headers["x-fal-request-id"]
        for method in ("PUT", "POST"):
            answer = await client.http.request(method, f"{APP}/requests/{nobody}/cancel")
            assert (answer.status_code, answer.json()["status"]) == (404, "NOT_FOUND")
            assert answer.json()["message"]
        long = {"idempotency-key": "k" * 256}
        assert (await client.http.post(APP, json={"prompt": "x"}, headers=long)).status_code == 400
        two = (await client.http.post(APP, json={"strength": 2})).json()["detail"]
        assert sorted(entry["loc"][-1] for entry in two) == ["prompt", "strength"]


FAILURES: list[tuple[dict[str, Any], int, str]] = [
    ({"prompt": "raise"}, 500, "generation_failed"),
    ({"prompt": "nan"}, 500, "generation_failed"),
    ({"prompt": "x", "image_url": "data:image/png;base64,anVuaw=="}, 422, "image_load_error"),
    ({"prompt": "x", "num_images": 2, "image_url": "http://127.0.0.1:1/x.png"}, 422, "file_download_error"),
]


@pytest.mark.points(46, 56)
@run
async def test_a_failed_job_is_completed(tmp_path: Path) -> None:
    async with queueing(tmp_path) as client:
        for fields, status, kind in FAILURES:
            job = await client.submit(**fields)
            body = await client.until(job, "COMPLETED")
            assert body["error_type"] == kind and body["error"]
            answer = await client.result(job)
            assert answer.status_code == status
            assert answer.headers["content-type"] == "application/json"
            assert answer.headers["x-fal-error-type"] == kind
            assert answer.headers["x-fal-request-id"] == job["request_id"]
            assert answer.json()["message"] and answer.json()["detail"]
            assert "secret" not in answer.text
            assert (await client.status(job, "?logs=1"))["logs"][-1]["level"] == "ERROR"
            assert client.server.metric("lcm_rt_errors_total", code=kind) > 0


@pytest.mark.points(44, 51)
@run
async def test_low_never_overtakes_normal(tmp_path: Path) -> None:
    async with queueing(tmp_path, running_jobs=1) as client:
        hold = Hold(tmp_path)
        blocker = await client.submit(hold.prompt)
        await hold.entered()
        await client.until(blocker, "IN_PROGRESS")
        low = await client.submit("low", headers={"x-fal-queue-priority": "low", "x-fal-runner-hint": "lora:a"})
        normal = await client.submit("normal", headers={"X-Fal-Queue-Priority": "normal"})
        other = await client.submit("other", headers={"x-fal-queue-priority": "urgent", "x-fal-unknown": "1"})
        places = [(await client.status(job))["queue_position"] for job in (normal, other, low)]
        assert places == [0, 1, 2]
        hold.release()
        for job in (low, normal, other):
            await client.until(job, "COMPLETED")
        began = [(await client.status(job, "?logs=1"))["logs"][0]["timestamp"] for job in (normal, other, low)]
        assert began == sorted(began)


@pytest.mark.points(49)
@run
async def test_cancel(tmp_path: Path) -> None:
    async with queueing(tmp_path, running_jobs=1) as client:
        hold = Hold(tmp_path)
        running = await client.submit(hold.prompt, num_inference_steps=50)
        await hold.entered()
        await client.until(running, "IN_PROGRESS")
        queued = await client.submit("crash")  # it would be noticed if it ran
        for job in (queued, running):
            answer = await client.cancel(job)
            assert (answer.status_code, answer.json()) == (202, {"status": "CANCELLATION_REQUESTED"})
        for job in (queued, running):
            async with asyncio.timeout(10):  # not when a lease has lapsed
                body = await client.until(job, "COMPLETED")
            assert body["error_type"] == "client_cancelled"
            again = await client.cancel(job)
            assert (again.status_code, again.json()["status"]) == (400, "ALREADY_COMPLETED")
            assert again.json()["message"]
            answer = await client.result(job)
            assert (answer.status_code, answer.headers["x-fal-error-type"]) == (499, "client_cancelled")
        assert "metrics" in body
        hold.release()
        assert (await client.result(await client.submit())).status_code == 200
        assert client.server.metric("lcm_rt_engine_restarts_total") == 0
        # The step that was under way was the cancelled one's last: its pictures were given up.
        assert client.server.metric("lcm_rt_pictures_total", model="fake", priority="queue") == 1


@pytest.mark.points(49)
@run
async def test_cancel_while_the_model_loads(tmp_path: Path) -> None:
    """The job is claimed, but nothing has begun: it never will."""
    loading = tmp_path / "slow-load"
    os.mkfifo(loading)
    models = [model_folder(tmp_path / "model"), model_folder(tmp_path / "slow", "slow-load")]
    async with queueing(tmp_path, models=models, ready=False) as client:
        job = await client.submit("crash", path="/queue/fal-ai/slow-load")
        kept = await client.submit("lake", path="/queue/fal-ai/slow-load")
        queue: Queue = client.server.app.state.queue
        await until(lambda: len(queue._running) == 2)
        assert (await client.status(job))["queue_position"] == 0
        assert (await client.status(kept))["queue_position"] == 1
        assert (await client.cancel(job)).status_code == 202
        assert (await client.status(job))["status"] == "COMPLETED"
        assert (await client.status(kept))["queue_position"] == 0
        await asyncio.to_thread(loading.write_bytes, b"")
        assert (await client.result(kept)).status_code == 200
        assert client.server.metric("lcm_rt_engine_restarts_total") == 0


@pytest.mark.points(50)
@run
async def test_too_late_to_begin(tmp_path: Path) -> None:
    async with queueing(tmp_path, running_jobs=1) as client:
        hold = Hold(tmp_path)
        blocker = await client.submit(hold.prompt, headers={"x-fal-request-timeout": "0.2"})
        await hold.entered()
        for headers in (
            {"x-fal-request-timeout": "0.2"},
            {"X-Fal-Request-Start-Timeout": "0.2", "x-fal-request-timeout": "99"},
        ):
            late = await client.submit("crash", headers=headers)
            body = await client.until(late, "COMPLETED")
            assert body["error_type"] == "request_timeout"
            answer = await client.result(late)
            assert answer.status_code == 504
            assert answer.headers["x-fal-request-timeout-type"] == "user"
            assert answer.headers["x-fal-error-type"] == "request_timeout"
            assert answer.headers["x-fal-request-id"] == late["request_id"]
        hold.release()
        assert (await client.result(blocker)).status_code == 200, "it began in time, and takes as long as it takes"
        assert client.server.metric("lcm_rt_engine_restarts_total") == 0


@pytest.mark.points(50)
@run
async def test_too_late_while_the_model_loads(tmp_path: Path) -> None:
    loading = tmp_path / "slow-load"
    os.mkfifo(loading)
    models = [model_folder(tmp_path / "slow", "slow-load")]
    async with queueing(tmp_path, models=models, ready=False) as client:
        late = await client.submit("crash", headers={"x-fal-request-timeout": "0.1"})
        patient = await client.submit()
        assert (await client.result(late)).status_code == 504
        await asyncio.to_thread(loading.write_bytes, b"")
        assert (await client.result(patient)).status_code == 200
        assert client.server.metric("lcm_rt_engine_restarts_total") == 0


@pytest.mark.points(48, 53)
@run
async def test_a_status_stream(tmp_path: Path) -> None:
    async with queueing(tmp_path, running_jobs=1) as client:
        hold = Hold(tmp_path)
        blocker = await client.submit(hold.prompt)
        await hold.entered()
        await client.until(blocker, "IN_PROGRESS")
        job = await client.submit("lake")
        seen = []
        async for event in client.events(job):
            seen.append(event)
            if len(seen) == 1:
                hold.release()
            last_at = time.monotonic()
        assert time.monotonic() - last_at >= 0.05, "an older client forgets what is buffered at the end"
        assert seen[0]["status"] == "IN_QUEUE" and seen[0]["queue_position"] == 0
        assert seen[-1]["status"] == "COMPLETED" and seen[-1]["metrics"]
        lines = [line["message"] for event in seen for line in event["logs"]]
        assert len(lines) == len(set(lines)) == 2, "each line is told once"
        assert {event["status_url"] for event in seen} == {job["status_url"]}
        (only,) = [event async for event in client.events(job, "?logs=0")]
        assert (only["status"], only["logs"]) == ("COMPLETED", None)
        (only,) = [event async for event in client.events(job, "?logs=true")]
        assert len(only["logs"]) == 2


@run
async def test_a_status_stream_tells_of_what_another_server_does(tmp_path: Path) -> None:
    async with queueing(tmp_path, running_jobs=1) as client:
        hold = Hold(tmp_path)
        await client.submit(hold.prompt)
        await hold.entered()
        job, last = await client.submit("a"), await client.submit("b")
        jobs: Jobs = client.server.app.state.jobs
        places = []
        async for event in client.events(last):
            places.append(event.get("queue_position"))
            if len(places) == 1:
                await jobs.cancel(job["request_id"])  # not by way of the queue, as another process does
            elif len(places) == 2:
                hold.release()
        assert places[:2] == [1, 0] and places[-1] is None


@pytest.mark.points(57)
@run
async def test_a_duplicate_submit_is_harmless(tmp_path: Path) -> None:
    async with queueing(tmp_path) as client:
        for name in ("idempotency-key", "x-fal-idempotency-key"):
            twins = await asyncio.gather(*(client.submit("lake", headers={name: name}) for _ in range(3)))
            assert len({job["request_id"] for job in twins}) == 1
            await client.until(twins[0], "COMPLETED")
            late = await client.submit("lake", headers={name: name})
            assert (late["status"], late["request_id"]) == ("COMPLETED", twins[0]["request_id"])
        made = client.server.metric("lcm_rt_pictures_total", model="fake", priority="queue")
        assert made == 2
        # Without a key, each is a job of its own, and both are answered.
        one, two = await asyncio.gather(client.submit("lake"), client.submit("lake"))
        assert one["request_id"] != two["request_id"]
        for job in (one, two):
            assert (await client.result(job)).status_code == 200


@pytest.mark.points(56)
@run
async def test_overload_is_429(tmp_path: Path) -> None:
    async with queueing(tmp_path, running_jobs=1, max_jobs=2) as client:
        hold = Hold(tmp_path)
        await client.submit(hold.prompt)
        await hold.entered()
        waiting = [await client.submit() for _ in range(2)]
        answer = await client.http.post(APP, json={"prompt": "x"})
        assert answer.status_code == 429
        assert answer.headers["retry-after"] and answer.headers["x-fal-error-type"] == "overloaded"
        assert answer.json()["message"]
        await client.cancel(waiting[0])
        await client.submit()
        hold.release()


@run
async def test_a_job_that_kills_the_engine_is_failed_and_its_neighbours_are_not(tmp_path: Path) -> None:
    async with queueing(tmp_path, running_jobs=3) as client:
        hold = Hold(tmp_path)
        held = await client.submit(hold.prompt, num_inference_steps=1)
        await hold.entered()  # the next forward has all others in it
        killer, *innocents = [await client.submit(prompt) for prompt in ("crash", "a", "b", "c")]
        await until(lambda: client.server.metric("lcm_rt_pending") == 3)
        hold.path.unlink()
        hold.path.touch()  # nothing holds it the next time
        hold.release()
        results = [await client.result(job) for job in (held, killer, *innocents)]
        assert [result.status_code for result in results] == [200, 500, 200, 200, 200]
        assert results[1].headers["x-fal-error-type"] == "runner_server_error"
        assert client.server.metric("lcm_rt_engine_restarts_total") == 2
        logs = (await client.status(killer, "?logs=1"))["logs"]
        assert [line["level"] for line in logs if "ended" in line["message"]] == ["ERROR", "ERROR"]


@run
async def test_a_suspect_runs_alone(tmp_path: Path) -> None:
    async with queueing(tmp_path) as client:
        queue: Queue = client.server.app.state.queue
        hold = Hold(tmp_path)
        suspect = await client.submit(hold.prompt)
        await hold.entered()
        await kill_the_engine(client)
        hold.release()
        await hold.entered()
        newcomer = await client.submit()
        assert await queue._claim() is None
        assert (await client.status(newcomer))["queue_position"] == 0
        hold.release()
        for job in (suspect, newcomer):
            assert (await client.result(job)).status_code == 200


@run
async def test_an_engine_that_ends_with_the_server_accuses_nobody(tmp_path: Path) -> None:
    async with queueing(tmp_path) as client:
        queue: Queue = client.server.app.state.queue
        hold = Hold(tmp_path)
        job = await client.submit(hold.prompt)
        await hold.entered()
        queue._stopping = True
        await kill_the_engine(client)
        hold.release()
        await hold.entered()
        hold.release()
        assert (await client.result(job)).status_code == 200
        assert (await client.server.app.state.jobs.look(job["request_id"])).deaths == 0


@run
async def test_without_retries_one_death_is_enough(tmp_path: Path) -> None:
    async with queueing(tmp_path) as client:
        job = await client.submit("crash", headers={"X-Fal-No-Retry": "1"})
        assert (await client.result(job)).status_code == 500
        assert client.server.metric("lcm_rt_engine_restarts_total") == 1


@run
async def test_a_full_engine_is_waited_for(tmp_path: Path) -> None:
    async with queueing(tmp_path, max_pending=1) as client:
        hold = Hold(tmp_path)
        running = asyncio.create_task(client.http.post("/run/fal-ai/lcm", json={"prompt": hold.prompt, **SMALL}))
        await hold.entered()
        job = await client.submit()
        queue: Queue = client.server.app.state.queue
        await until(lambda: len(queue._running) == 1)
        assert (await client.status(job))["status"] == "IN_QUEUE"
        hold.release()
        assert (await client.result(job)).status_code == 200
        assert (await running).status_code == 200


@run
async def test_a_model_that_cannot_be_loaded_fails_its_jobs(tmp_path: Path) -> None:
    models = [model_folder(tmp_path / "model"), model_folder(tmp_path / "bad", "die-load")]
    async with queueing(tmp_path, models=models, ready=False) as client:
        job = await client.submit(path="/queue/me/die-load")
        answer = await client.result(job)
        assert answer.status_code == 503 and "each time it was loaded" in answer.text
        assert (await client.result(await client.submit())).status_code == 200


@run
async def test_an_engine_that_cannot_start_costs_no_job(tmp_path: Path) -> None:
    async with queueing(tmp_path, models=[model_folder(tmp_path / "model", "bad-load")], ready=False) as client:
        await until(lambda: client.server.service.workers.failure is not None)
        job = await client.submit()
        queue: Queue = client.server.app.state.queue
        assert await queue._claim() is None
        assert (await client.status(job))["status"] == "IN_QUEUE"
        assert (await client.cancel(job)).status_code == 202


@run
async def test_realtime_goes_before_the_queue(tmp_path: Path) -> None:
    """A message waits for the step under way, and at most for a job that was admitted before it arrived."""
    holds = []
    for name in "abc":
        (tmp_path / name).mkdir()
        holds.append(Hold(tmp_path / name))
    async with queueing(tmp_path, max_rows=1) as client, client.server.connect() as socket:
        jobs = [await client.submit(holds[0].prompt)]
        await holds[0].entered()
        jobs += [await client.submit(hold.prompt) for hold in holds[1:]]
        await until(lambda: client.server.metric("lcm_rt_pending") == 3)
        await say(socket, prompt="now", **SMALL)
        await until(lambda: client.server.metric("lcm_rt_pending") == 4)
        holds[0].release()
        await holds[1].entered()
        holds[1].release()
        await hear(socket)
        await holds[2].entered()
        holds[2].release()
        for job in jobs:
            await client.until(job, "COMPLETED")


@run
async def test_a_stop_gives_jobs_back_and_the_next_start_runs_them(tmp_path: Path) -> None:
    async with queueing(tmp_path, running_jobs=1) as client:
        hold = Hold(tmp_path)
        running = await client.submit(hold.prompt)
        await hold.entered()
        await client.until(running, "IN_PROGRESS")
        queued = await client.submit("lake", seed=1)
        running, queued = running["request_id"], queued["request_id"]
        queue: Queue = client.server.app.state.queue

        async def let_the_engine_end() -> None:
            await until(lambda: not queue._running)
            hold.release()

        ending = asyncio.create_task(let_the_engine_end())
    await ending
    with closing(sqlite3.connect(tmp_path / "data" / "lcm-rt.db")) as database:
        assert database.execute("SELECT state, lease_until FROM jobs").fetchall() == [("queued", None)] * 2
    hold.path.unlink()
    again = Hold(tmp_path)
    async with queueing(tmp_path) as client:
        jobs: Jobs = client.server.app.state.jobs
        await again.entered()  # at once, not when a lease has lapsed
        again.release()
        for id in (running, queued):
            while (job := await jobs.look(id)).state != "done":  # noqa: ASYNC110
                await asyncio.sleep(0.005)
            assert (job.status, job.deaths) == (200, 0)
            assert (await client.http.get(f"{APP}/requests/{id}")).status_code == 200


@run
async def test_a_lost_lease_stops_the_work(tmp_path: Path) -> None:
    """Another server took the job over: what we make of it does not count, and it is not made any longer."""
    async with queueing(tmp_path) as client:
        hold = Hold(tmp_path)
        job = await client.submit(hold.prompt, num_inference_steps=50)
        await hold.entered()
        await client.until(job, "IN_PROGRESS")
        queue: Queue = client.server.app.state.queue
        jobs: Jobs = client.server.app.state.jobs
        queue._running[job["request_id"]].job = await jobs.look(job["request_id"])
        assert await jobs.release(job["request_id"], 1, logs=[])
        taken = await jobs.claim("other", lease_s=60)
        assert taken and taken.epoch == 2
        queue._renew_at = 0.0
        queue.wake()
        await until(lambda: not queue._running)
        hold.release()
        assert (await client.status(job))["status"] == "IN_QUEUE"
        assert client.server.metric("lcm_rt_pictures_total", model="fake", priority="queue") == 0


@run
async def test_a_result_waits_for_a_store_that_cannot_be_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lcm_rt.queue._STORE_PAUSE_S", 0.01)

    def flaky(call: Callable[..., Any]) -> Callable[..., Any]:
        refusals = iter(range(3))

        async def wrapped(*args: Any, **fields: Any) -> Any:
            for _ in refusals:
                raise Unavailable("the disk is full")
            return await call(*args, **fields)

        return wrapped

    async with queueing(tmp_path) as client:
        jobs: Jobs = client.server.app.state.jobs
        for owner, name in (
            (jobs, "claim"),
            (jobs, "begin"),
            (jobs, "finish"),
            (jobs, "sweep"),
            (client.server.service.files, "put"),
        ):
            monkeypatch.setattr(owner, name, flaky(getattr(owner, name)))
            job = await client.submit()
            assert (await client.result(job)).status_code == 200, name


@run
async def test_what_nobody_foresaw_costs_one_job_at_most(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with queueing(tmp_path) as client:
        jobs: Jobs = client.server.app.state.jobs
        queue: Queue = client.server.app.state.queue

        async def broken(*args: Any, **fields: Any) -> Any:
            raise RuntimeError("secret internals")

        with monkeypatch.context() as patch:
            patch.setattr(client.server.service, "answer", broken)
            answer = await client.result(await client.submit())
            assert answer.status_code == 500 and "secret" not in answer.text
        with monkeypatch.context() as patch:
            patch.setattr(jobs, "finish", broken)
            job = await client.submit()
            await client.until(job, "IN_PROGRESS")
            await until(lambda: not queue._running)
        assert (await client.status(job))["status"] == "IN_PROGRESS", "until its lease lapses"
        assert (await client.result(await client.submit())).status_code == 200


@run
async def test_two_servers_share_a_queue(tmp_path: Path, postgresql: PostgreSQL) -> None:
    url = postgresql.create()
    folders = [tmp_path / name for name in "ab"]
    for folder in folders:
        folder.mkdir()
    shared = {"database_url": url, "running_jobs": 1, "storage_url": str(tmp_path / "files")}
    async with queueing(folders[0], **shared) as one:
        holds = [Hold(folder) for folder in folders]
        here = await one.submit(holds[0].prompt)
        await holds[0].entered()
        there = await one.submit(holds[1].prompt, num_inference_steps=50)

        async def begun() -> Any:
            async with aclosing(one.events(there)) as events:
                async for event in events:
                    if event["status"] != "IN_QUEUE":
                        return event

        watching = asyncio.create_task(begun())
        async with queueing(folders[1], **shared) as two:
            queue: Queue = two.server.app.state.queue
            await holds[1].entered()
            assert (await watching)["status"] == "IN_PROGRESS", "its client need not know where it runs"
            assert (await one.cancel(there)).status_code == 202
            queue._renew_at = 0.0  # which is when it hears of it
            await until(lambda: not queue._running)
            holds[1].release()
            assert (await one.result(there)).status_code == 499
            seen = await one.submit("lake", seed=3)
            async with asyncio.timeout(8):
                assert (await one.result(seen)).status_code == 200, "by the other server, while this one is busy"
            file = await one.http.get((await one.result(seen)).json()["images"][0]["url"])
            assert tuple(pixels(file.content)[0, 0]) == colour("lake", 3)
        holds[0].release()
        assert (await one.result(here)).status_code == 200
    postgresql.drop(url)


@pytest.mark.points(58)
@run
async def test_the_webhook_gets_its_event(tmp_path: Path) -> None:
    async with queueing(tmp_path, webhook_private=True) as client:
        job = await client.submit(path=f"{APP}?fal_webhook=http%3A%2F%2F127.0.0.1%3A9%2Fhook%3Fx%3D1")
        answer = await client.result(job)
        rows = await client.server.app.state.store.do(
            lambda connection: connection.execute(select(deliveries.c.job, deliveries.c.url, deliveries.c.body)).all()
        )
        ((id, url, body),) = rows
        assert (id, url) == (job["request_id"], "http://127.0.0.1:9/hook?x=1")
        assert orjson.loads(body)["payload"] == answer.json()


@run
async def test_lifecycle_headers_are_never_an_error(tmp_path: Path) -> None:
    async with queueing(tmp_path) as client:
        jobs: Jobs = client.server.app.state.jobs
        for wish, ttl_s in (
            ('{"expiration_duration_seconds": 60}', 60.0),
            ('{"expiration_duration_seconds": null}', LONGEST_S),
            ('{"expiration_duration_seconds": "x"}', None),
            ("{", None),
            ("[]", None),
            ("[" * 9000, None),
        ):
            job = await client.submit(headers={"x-fal-object-lifecycle-preference": wish})
            assert lifecycle_of((await jobs.look(job["request_id"])).lifecycle).ttl_s == ttl_s


@run
async def test_another_owners_job_does_not_exist(tmp_path: Path) -> None:
    async with queueing(tmp_path, keys=True) as client:
        keys = {owner: {"authorization": f"Key {await client.server.key(owner)}"} for owner in ("alice", "bob")}
        job = await client.submit(headers=keys["alice"])
        for method, url in (
            ("GET", job["response_url"]),
            ("GET", job["status_url"]),
            ("GET", f"{job['status_url']}/stream"),
            ("PUT", job["cancel_url"]),
        ):
            assert (await client.http.request(method, url)).status_code == 401
            assert (await client.http.request(method, url, headers=keys["bob"])).status_code == 404
            assert (await client.http.request(method, url, headers=keys["alice"])).status_code in (200, 202, 400)


@pytest.mark.points(42)
@run
async def test_by_host_or_by_prefix(tmp_path: Path) -> None:
    async with queueing(tmp_path) as client:
        body = {"prompt": "lake", **SMALL}
        ran = await client.http.post("/fal-ai/lcm", json=body, headers={"host": "fal.run"})
        assert ran.json()["images"]
        answer = await client.http.post("/fal-ai/lcm", json=body, headers={"host": "queue.fal.run"})
        job = answer.json()
        assert job["status_url"] == f"http://queue.fal.run/fal-ai/lcm/requests/{job['request_id']}/status"
        path = urlsplit(job["response_url"]).path
        for _ in range(2000):
            answer = await client.http.get(f"{path}/status", headers={"host": "queue.fal.run"})
            if answer.status_code == 200:
                break
        done = await client.http.get(path, headers={"host": "queue.fal.run"})
        assert re.match(r"http://v3\.fal\.media/files/", done.json()["images"][0]["url"])


@pytest.mark.points(49)
@run
async def test_jobs_cancelled_at_every_moment_leave_their_places(tmp_path: Path) -> None:
    async with queueing(tmp_path, running_jobs=2) as client:
        for number in range(40):
            job = await client.submit()
            for _ in range(number % 8):
                await asyncio.sleep(0)
            await client.http.put(job["cancel_url"])
        assert (await client.result(await client.submit())).status_code == 200
        await until(lambda: not client.server.app.state.queue._running)


@run
async def test_a_clients_message_that_kills_the_engine_convicts_no_job(tmp_path: Path) -> None:
    hold = Hold(tmp_path)
    async with queueing(tmp_path) as client:
        job = await client.submit(prompt=hold.prompt, num_inference_steps=30)
        await hold.entered()
        async with client.server.connect() as socket:
            await say(socket, prompt="crash", image_size={"width": 64, "height": 64})
            await until(lambda: client.server.metric("lcm_rt_pending") >= 2)
            hold.path.unlink()
            hold.path.write_bytes(b"")  # no later step waits
            hold.release()
            while (await hear(socket)).get("type") != "x-fal-error":
                pass
        assert (await client.result(job)).status_code == 200


@run
async def test_nobody_waits_behind_a_model_that_loads(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "slow-load")
    models = [model_folder(tmp_path / "model"), model_folder(tmp_path / "model2", "slow-load")]
    async with queueing(tmp_path, ready=False, running_jobs=1, models=models) as client:
        await until(lambda: client.server.service.workers.models["fake"].state == "ready")
        waiting = await client.submit(model="slow-load")
        assert (await client.result(await client.submit())).status_code == 200
        await asyncio.to_thread((tmp_path / "slow-load").write_bytes, b"go")
        assert (await client.result(waiting)).status_code == 200


@run
async def test_what_is_wrong_is_told_at_submit(tmp_path: Path) -> None:
    async with queueing(tmp_path) as client:
        for fields in (
            {"mask_url": "data:,x"},
            {"inpaint_mask_only": True},
            {"image_size": {"width": 4096, "height": 64}},
        ):
            answer = await client.http.post(APP, json={"prompt": "x", **fields})
            assert answer.status_code == 422, fields


@run
async def test_a_stop_refuses_new_work_and_tells_what_it_cuts_off(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(serve, "DRAIN_S", 1.2)
    hold = Hold(tmp_path)
    async with queueing(tmp_path) as client, client.server.connect() as socket:
        await say(socket, prompt=hold.prompt, image_size={"width": 64, "height": 64}, num_inference_steps=1)
        await hold.entered()
        running = asyncio.create_task(client.http.post("/run/fal-ai/lcm", json={"prompt": "x"}))
        await until(lambda: client.server.metric("lcm_rt_pending") >= 2)
        client.server.stop()
        await until(lambda: client.server.app.state.realtime.draining.is_set())
        for answer in (await client.http.get("/health/ready"), await client.http.post(APP, json={"prompt": "x"})):
            assert (answer.status_code, answer.json()["error_type"]) == (503, "unavailable")
        cut = await running
        assert (cut.status_code, cut.json()["error_type"]) == (503, "unavailable")
        assert cut.headers["x-fal-request-id"]
        hold.release()

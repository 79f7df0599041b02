"""Exact repeats of finished requests: answered at once, and by nothing that could tell one from the first."""

from __future__ import annotations

import dataclasses
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx2 as httpx
import pytest
from fake_engine import colour
from serving import SIDE, Server, hear, run, say, serving, until
from test_realtime import Hold, picture, pixels

from lcm_rt import repeats, wire
from lcm_rt.errors import GenerationFailed
from lcm_rt.metrics import Metrics
from lcm_rt.repeats import Repeats
from lcm_rt.types import GenerateOutput, GenerateRequest, GenerateResult, Preview

SMALL = {"image_size": {"width": SIDE, "height": SIDE}, "format": "png", "num_inference_steps": 1}


@asynccontextmanager
async def repeating(folder: Path, **settings: Any) -> AsyncIterator[Server]:
    """A server that has just begun to keep what it makes."""
    async with serving(folder, **settings) as server:
        server.service._repeats = Repeats(2**20, server.service.metrics)
        yield server


def lookups(server: Server) -> tuple[float, float]:
    """How many were found, and how many were not."""
    found, missed = (
        server.metric("lcm_rt_cache_lookups_total", cache="repeat", outcome=outcome) for outcome in ("hit", "miss")
    )
    return found, missed


def painted(server: Server) -> float:
    """How many pictures the engine made."""
    return server.metric("lcm_rt_batch_rows_count")


async def paint(server: Server, owner: str = "local", **fields: Any) -> GenerateOutput:
    wanted = wire.parse_input({"prompt": "lake", "seed": 7, **SMALL, **fields})
    return await server.service.run(wanted, app_model="fake", priority="run", owner=owner)


@run
async def test_a_repeat_is_the_same_picture_at_once(tmp_path: Path) -> None:
    async with repeating(tmp_path) as server, server.connect() as one, server.connect() as two:
        answers = []
        for number, socket in enumerate((one, two, one)):
            await say(socket, prompt="lake", seed=7, num_images=2, request_id=number, previews=number == 1, **SMALL)
            answers.append(await hear(socket))
        assert lookups(server) == (2, 1)
        assert painted(server) == 2
        assert server.metric("lcm_rt_pictures_total", model="fake", priority="realtime") == 6
        assert server.metric("lcm_rt_stage_seconds_count", stage="denoise") == 0
    first, *others = answers
    assert "queue" in first["timings"]
    for number, again in enumerate(others, 1):
        timings = again.pop("timings")
        assert timings.keys() == {"repeat", "total"}
        assert 0 <= timings["repeat"] == timings["total"] < first["timings"]["total"]
        assert again.pop("request_id") == number
        assert again == {key: value for key, value in first.items() if key not in ("timings", "request_id")}
    assert [tuple(pixels(image["content"])[0, 0]) for image in first["images"]] == [colour("lake", s) for s in (7, 8)]


@run
async def test_only_the_same_seed_is_a_repeat_and_only_one_that_was_given(tmp_path: Path) -> None:
    async with repeating(tmp_path) as server:
        for _ in range(2):
            drawn = await paint(server, seed=None)
        assert lookups(server) == (0, 0)
        (result,) = drawn.results
        given = [await paint(server, seed=seed) for seed in (result.seed, result.seed, result.seed + 1)]
        assert given[0].results[0].image == given[1].results[0].image == result.image != given[2].results[0].image
        assert lookups(server) == (1, 2)
        assert painted(server) == 4


OTHERWISE: list[dict[str, Any]] = [
    {"prompt": "Lake"},
    {"num_images": 2},
    {"num_inference_steps": 2},
    {"image_size": {"width": SIDE, "height": 2 * SIDE}},
    {"format": "jpeg"},
    {"quality": 81},
    {"negative_prompt": "boat"},
    {"guidance_scale": 1.5},
    {"enable_safety_checks": False},
    {"image_bytes": picture()},
    {"image_bytes": picture(2 * SIDE)},
    {"image_bytes": picture(), "strength": 0.7},
    {"image_bytes": picture(), "mask_bytes": picture()},
    {"image_bytes": picture(), "mask_bytes": picture(), "inpaint_mask_only": True},
]


@run
async def test_whatever_differs_is_made_anew(tmp_path: Path) -> None:
    async with repeating(tmp_path) as server:
        for number, fields in enumerate([{}, *OTHERWISE]):
            await paint(server, **fields)
            assert lookups(server) == (0, number + 1), fields
        for number, fields in enumerate([{}, *OTHERWISE]):
            await paint(server, **fields)
            assert lookups(server) == (number + 1, 1 + len(OTHERWISE)), fields


REQUEST = GenerateRequest("fake", "lake", 7, image=b"ab", mask=b"c")

CHANGES: dict[str, Any] = {
    "model": "other",
    "prompt": "Lake",
    "seed": 8,
    "negative_prompt": "boat",
    "image": b"a",
    "mask": b"bc",
    "mask_alpha": True,
    "inpaint_mask_only": True,
    "controlnet_inpaint": True,
    "strength": 0.7,
    "guidance_scale": 2.0,
    "num_inference_steps": 5,
    "size": (64, 64),
    "lora": "/data/loras/1234.safetensors",
    "lora_scale": 0.5,
    "safety": False,
    "format": "png",
    "quality": 81,
    "max_side": 512,
}
ASIDE: dict[str, Any] = {"previews": True, "priority": "realtime", "session": "session-1", "owner": "run-5"}


def key(request: GenerateRequest = REQUEST, count: int = 1, owner: str = "alice", load: int = 1) -> bytes | None:
    return Repeats(2**20, Metrics()).key(request, count=count, owner=owner, load=load)


def test_every_field_that_decides_a_picture_is_in_its_key() -> None:
    assert CHANGES.keys() | ASIDE.keys() == {field.name for field in dataclasses.fields(GenerateRequest)}
    others = [dataclasses.replace(REQUEST, **{name: value}) for name, value in CHANGES.items()]
    moved = dataclasses.replace(REQUEST, image=b"a", mask=b"bc")
    keys = [key(), *map(key, [*others, moved]), key(count=2), key(owner="bob"), key(load=2)]
    assert None not in keys
    assert len({*keys}) == len(keys)
    assert key(dataclasses.replace(REQUEST, **ASIDE)) == key()


def test_large_files_are_not_hashed() -> None:
    half = bytes(repeats.MAX_FILE_BYTES // 2)
    assert key(dataclasses.replace(REQUEST, image=half, mask=half)) is not None
    assert key(dataclasses.replace(REQUEST, image=half, mask=half + b"x")) is None
    assert key(dataclasses.replace(REQUEST, image=2 * half + b"x", mask=None)) is None


def result(image: bytes) -> GenerateResult:
    return GenerateResult(image, "image/png", SIDE, SIDE, 7, "fake", 1)


def test_repeats_are_bounded_by_bytes() -> None:
    kept = Repeats(100_000, Metrics())
    for number in range(100):
        kept.keep(b"%d" % number, [result(bytes(9_000)), result(bytes(9_000))])
    assert [number for number in range(100) if kept.find(b"%d" % number)] == [95, 96, 97, 98, 99]


@run
async def test_owners_do_not_hear_of_each_other(tmp_path: Path) -> None:
    async with repeating(tmp_path) as server:
        outputs = [await paint(server, owner) for owner in ("alice", "bob", "alice", "bob")]
        assert lookups(server) == (2, 2)
        assert len({output.results[0].image for output in outputs}) == 1


@run
async def test_a_model_that_was_loaded_again_paints_anew(tmp_path: Path) -> None:
    async with repeating(tmp_path) as server:
        workers = server.service.workers
        await paint(server)
        workers.unload("fake")
        await until(lambda: workers.models["fake"].state == "unloaded")
        await workers.wait_model("fake")
        await paint(server)
        assert (lookups(server), painted(server)) == ((0, 2), 2)
        # As it does in an engine process that was started again.
        async with server.connect() as socket:
            await say(socket, prompt="crash", **SMALL)
            while (answer := await hear(socket)).get("error") != "engine_lost":
                assert answer["type"] == "x-fal-message"
        await workers.wait_model("fake")
        await paint(server)
        await paint(server)
        assert (lookups(server), painted(server)) == ((1, 3), 3)


@run
async def test_a_picture_that_was_flagged_stays_so(tmp_path: Path) -> None:
    async with repeating(tmp_path) as server:
        outputs = [await paint(server, prompt="nsfw") for _ in range(2)]
        assert [output.results[0].flagged for output in outputs] == [True, True]
        assert lookups(server) == (1, 1)
        assert server.metric("lcm_rt_flagged_total") == 2
        open_eyed = await paint(server, prompt="nsfw", enable_safety_checks=False)
        assert not open_eyed.results[0].flagged


@run
async def test_what_failed_or_was_left_is_tried_again(tmp_path: Path) -> None:
    hold = Hold(tmp_path)
    async with repeating(tmp_path) as server:
        for _ in range(2):
            with pytest.raises(GenerationFailed):
                await paint(server, prompt="nan")
        wanted = wire.parse_input({"prompt": hold.prompt, "seed": 7, **SMALL})
        ongoing = await server.service.start(wanted, app_model="fake", priority="run")
        await hold.entered()
        ongoing.cancel()
        hold.release()
        again = await server.service.start(wanted, app_model="fake", priority="run")
        await hold.entered()
        hold.release()
        await again.output()
        assert lookups(server) == (0, 4)


@run
async def test_a_repeat_begins_and_cannot_be_dropped(tmp_path: Path) -> None:
    async with repeating(tmp_path) as server:
        await paint(server)
        begun: list[str] = []
        shown: list[Preview] = []
        wanted = wire.parse_input({"prompt": "lake", "seed": 7, "request_id": "r", "previews": True, **SMALL})
        ongoing = await server.service.start(
            wanted, app_model="fake", priority="run", on_begun=lambda: begun.append("begun"), on_preview=shown.append
        )
        assert begun == ["begun"]
        ongoing.supersede()
        output = await ongoing.output()
        assert (output.request_id, output.prompt, output.results[0].batch) == ("r", "lake", 0)
        ongoing.cancel()
        assert not shown


@run
async def test_a_repeat_keeps_its_place_among_its_sessions_messages(tmp_path: Path) -> None:
    hold = Hold(tmp_path)
    async with repeating(tmp_path) as server, server.connect("/fal-ai/lcm/realtime?max_buffering=3") as socket:
        await paint(server)
        await say(socket, prompt=hold.prompt, request_id=1, **SMALL)
        await hold.entered()
        await say(socket, prompt="lake", seed=7, request_id=2, **SMALL)
        await until(lambda: lookups(server) == (1, 1))
        for number in (3, 4, 5):
            await say(socket, prompt=f"lake {number}", seed=7, request_id=number, **SMALL)
        await until(lambda: server.metric("lcm_rt_messages_total") == 5)
        assert painted(server) == 1  # none of them is past the window, in which the repeat has a place
        hold.release()
        answers = [await hear(socket) for _ in range(5)]
    assert [answer["request_id"] for answer in answers] == [1, 2, 3, 4, 5]
    assert [tuple(answer["timings"]) == ("repeat", "total") for answer in answers] == [False, True, False, False, False]


@run
async def test_repeats_by_http_and_by_the_queue(tmp_path: Path) -> None:
    async with (
        repeating(tmp_path) as server,
        httpx.AsyncClient(base_url=server.http, verify=False, timeout=30) as http,
    ):
        body = {"prompt": "lake", "seed": 7, **SMALL}
        answers = [(await http.post("/run/fal-ai/lcm", json=body)).json() for _ in range(2)]
        job = (await http.post("/queue/fal-ai/lcm", json=body)).json()
        while (status := (await http.get(job["status_url"] + "?logs=1")).json())["status"] != "COMPLETED":
            pass
        answers.append((await http.get(job["response_url"])).json())
        assert (lookups(server), painted(server)) == ((2, 1), 1)
        assert [log["message"].split()[0] for log in status["logs"]][-2:] == ["started", "finished"]
        # Each has a file of its own, which its owner may delete.
        urls = [answer["images"][0]["url"] for answer in answers]
        assert len({*urls}) == 3
        assert len({(await http.get(url)).content for url in urls}) == 1


@run
async def test_a_server_may_keep_nothing(tmp_path: Path) -> None:
    async with serving(tmp_path) as server:
        server.service._repeats = Repeats(0, server.service.metrics)
        for _ in range(2):
            await paint(server)
        assert (lookups(server), painted(server)) == ((0, 0), 2)

"""The engine process from the front's side: death, hanging, back-off, memory."""

from __future__ import annotations

import asyncio
import dataclasses
import gc
import os
import resource
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from serving import FAKE_ENGINE, SIDE, model_folder, run, until
from test_realtime import Hold

from lcm_rt import catalog, workers
from lcm_rt.errors import (
    EngineLost,
    GenerationFailed,
    ImageError,
    LcmError,
    ModelLoading,
    Overloaded,
    Superseded,
    Unavailable,
)
from lcm_rt.metrics import Metrics
from lcm_rt.types import GenerateRequest, Preview
from lcm_rt.workers import Generation, Workers


@asynccontextmanager
async def working(
    folder: Path,
    command: tuple[str, ...] = FAKE_ENGINE,
    hang_timeout_s: float = 60,
    device: str = "auto",
    models: Sequence[str] = ("fake",),
    memory_mb: int | None = None,
) -> AsyncIterator[Workers]:
    specs = await asyncio.to_thread(lambda: [catalog.resolve(model_folder(folder / "model", name)) for name in models])
    it = Workers(
        specs,
        device=device,
        backend="eager",
        cache_dir=Path("cache"),
        threads=None,
        choice=catalog.Choice(),
        memory_mb=memory_mb,
        max_rows=4,
        max_pending=8,
        hang_timeout_s=hang_timeout_s,
        metrics=Metrics(),
    )
    it.command = command
    task = asyncio.create_task(it.run())
    try:
        yield it
    finally:
        task.cancel()
        await asyncio.wait([task])
    assert it.pid is None


def ask(it: Workers, request: GenerateRequest, *callbacks: Any, **options: Any) -> Generation:
    """Submit a request for one picture."""
    (generation,) = it.submit(request, *callbacks, **options)
    return generation


def request(prompt: str, session: str | None = None) -> GenerateRequest:
    return GenerateRequest("fake", prompt, 0, size=(SIDE, SIDE), num_inference_steps=1, session=session)


@run
async def test_a_result_and_its_begin(tmp_path: Path) -> None:
    async with working(tmp_path) as it:
        await it.wait_ready()
        begun = asyncio.Event()
        result = await ask(it, request("lake"), begun.set).result
        assert begun.is_set()
        assert (result.width, result.height, result.batch) == (SIDE, SIDE, 1)
        assert it.device_name == "fake"


@run
async def test_only_what_waits_is_superseded(tmp_path: Path) -> None:
    hold = Hold(tmp_path)
    async with working(tmp_path) as it:
        await it.wait_ready()
        stepping = ask(it, request(hold.prompt, "s"))
        await hold.entered()
        waiting = ask(it, request("lake", "s"))
        stepping.supersede()
        waiting.supersede()
        hold.release()
        with pytest.raises(Superseded):
            await waiting.result
        assert (await stepping.result).width == SIDE


@run
async def test_company_in_a_batch_is_counted(tmp_path: Path) -> None:
    hold = Hold(tmp_path)
    async with working(tmp_path) as it:
        await it.wait_ready()
        ask(it, dataclasses.replace(request(hold.prompt), num_inference_steps=50))
        await hold.entered()
        # From here on the held row is in every forward, so nobody else is ever alone.
        others = [ask(it, request("lake")).result for _ in "abc"]
        while not all(other.done() for other in others):
            hold.release()
            await hold.entered()
        assert all(other.result().batch >= 2 for other in others)
        hold.release()


@run
async def test_errors_keep_their_type(tmp_path: Path) -> None:
    async with working(tmp_path) as it:
        await it.wait_ready()
        with pytest.raises(GenerationFailed, match="could not make this picture"):
            await ask(it, request("raise")).result
        with pytest.raises(ImageError):
            await ask(it, GenerateRequest("fake", "x", 0, image=b"junk")).result


@run
async def test_twenty_kills_cost_twenty_retryable_errors_and_no_memory(tmp_path: Path) -> None:
    hold = Hold(tmp_path)
    async with working(tmp_path) as it:
        await it.wait_ready()
        files = after_two = 0
        for kill in range(20):
            pid = it.pid
            assert pid
            lost = ask(it, request(hold.prompt))
            await hold.entered()
            os.kill(pid, 9)
            with pytest.raises(EngineLost) as error:
                await lost.result
            hold.release()
            assert error.value.retryable
            assert not it.is_ready
            await it.wait_ready()
            assert (await ask(it, request("lake")).result).width == SIDE
            if kill == 2:
                gc.collect()
                files, after_two = _open_files(), _resident_kb()
        gc.collect()
        assert _open_files() == files
        assert _resident_kb() - after_two < 4096, "memory grew over the kills"


def _open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


def _resident_kb() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() // 1024


@run
async def test_an_engine_that_hangs_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "PING_S", 0.02)
    monkeypatch.setattr(workers, "STOP_S", 0.1)
    hold = Hold(tmp_path)
    async with working(tmp_path, hang_timeout_s=0.2) as it:
        await it.wait_ready()
        hangs = ask(it, request(hold.prompt))
        await hold.entered()
        with pytest.raises(EngineLost):
            await hangs.result
        hold.release()
        await it.wait_ready()
        assert (await ask(it, request("lake")).result).width == SIDE


@run
async def test_an_engine_that_cannot_start_is_not_started_again(tmp_path: Path) -> None:
    async with working(tmp_path, device="none") as it:
        with pytest.raises(Unavailable, match="there is no such device"):
            await it.wait_ready()
        with pytest.raises(Unavailable):
            ask(it, request("lake"))
        assert it.describe()[0]["state"] == "failed"


@run
async def test_an_engine_that_dies_at_once_is_tried_with_growing_pauses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(workers, "FIRST_RESTART_S", 0.01)
    async with working(tmp_path, (sys.executable, "-c", "raise SystemExit(3)")) as it:
        await until(lambda: it._metrics.value("lcm_rt_engine_restarts_total") >= 3)
        assert not it.is_ready


@run
async def test_models_come_and_go(tmp_path: Path) -> None:
    async with working(tmp_path, models=("fake", "other")) as it:
        await it.wait_ready()
        assert [model["state"] for model in it.describe()] == ["ready", "ready"]
        seen = it.changes
        it.unload("other")
        assert it.models["other"].state == "unloading"
        await it.wait_change(seen)
        await until(lambda: it.models["other"].state == "unloaded")
        assert it._metrics.value("lcm_rt_model_bytes") == 10 * 2**20
        with pytest.raises(ModelLoading):
            ask(it, GenerateRequest("other", "lake", 0))  # and it is on its way again
        await it.wait_model("other")
        assert (await ask(it, GenerateRequest("other", "lake", 0, size=(SIDE, SIDE))).result).model == "other"
        assert it.is_ready


@run
async def test_a_model_goes_when_its_pictures_are_done(tmp_path: Path) -> None:
    hold = Hold(tmp_path)
    async with working(tmp_path, models=("fake", "other")) as it:
        await it.wait_ready()
        going = ask(it, request(hold.prompt))
        await hold.entered()
        it.unload("fake")
        hold.release()
        assert (await going.result).model == "fake"
        await until(lambda: it.models["fake"].state == "unloaded")


@run
async def test_the_models_longest_unused_make_room(tmp_path: Path) -> None:
    async with working(tmp_path, models=("a", "b", "c"), memory_mb=25) as it:
        await it.wait_ready()
        # The third one found no room, and nobody has asked for it yet.
        assert [model.state for model in it.models.values()] == ["ready", "ready", "unloaded"]
        await ask(it, GenerateRequest("a", "lake", 0, size=(SIDE, SIDE))).result
        await it.wait_model("c")
        assert [model.state for model in it.models.values()] == ["ready", "unloaded", "ready"]
        await it.wait_model("b")
        assert [model.state for model in it.models.values()] == ["unloaded", "ready", "ready"]


@run
async def test_a_model_that_cannot_be_loaded_later_is_told_and_harms_no_other(tmp_path: Path) -> None:
    async with working(tmp_path, models=("a", "b", "bad-load"), memory_mb=25) as it:
        await it.wait_ready()
        with pytest.raises(LcmError, match="no good"):
            await it.wait_model("bad-load")
        assert it.describe()[2]["state"] == "failed"
        assert (await ask(it, GenerateRequest("b", "lake", 0, size=(SIDE, SIDE))).result).model == "b"
        with pytest.raises(LcmError, match="no good"):
            ask(it, GenerateRequest("bad-load", "lake", 0))  # nobody's message tries it again
        it.load("bad-load")
        assert it.models["bad-load"].state == "loading"
        with pytest.raises(LcmError, match="no good"):
            await it.wait_model("bad-load")


@run
async def test_an_engine_that_comes_back_loads_what_was_there(tmp_path: Path) -> None:
    async with working(tmp_path, models=("fake", "other")) as it:
        await it.wait_ready()
        it.unload("fake")
        await until(lambda: it.models["fake"].state == "unloaded")
        pid = it.pid
        assert pid
        os.kill(pid, 9)
        await until(lambda: it.models["other"].state == "loading")
        await it.wait_ready()
        assert [model.state for model in it.models.values()] == ["unloaded", "ready"]


@run
async def test_previews_come_before_the_result(tmp_path: Path) -> None:
    async with working(tmp_path) as it:
        await it.wait_ready()
        seen: list[Preview] = []
        wanted = dataclasses.replace(request("lake"), num_inference_steps=4, previews=True)
        result = await ask(it, wanted, on_preview=seen.append).result
        # One is left out while the last one is not encoded yet.
        assert [(preview.step, preview.num_inference_steps) for preview in seen] in (
            [(1, 4), *[(step, 4) for step in more]] for more in ([], [2], [3], [2, 3])
        )
        assert all((preview.width, preview.height) == (SIDE, SIDE) for preview in seen)
        assert result.num_inference_steps == 4


@run
async def test_a_flagged_picture_says_so(tmp_path: Path) -> None:
    async with working(tmp_path) as it:
        await it.wait_ready()
        assert (await ask(it, request("nsfw")).result).flagged
        assert not (await ask(it, dataclasses.replace(request("nsfw"), safety=False)).result).flagged


@run
async def test_two_models_that_want_the_same_room_both_get_pictures(tmp_path: Path) -> None:
    async with working(tmp_path, models=("a", "b"), memory_mb=15) as it:
        await it.wait_ready()
        made = dict.fromkeys("ab", 0)

        async def paint(name: str) -> None:
            while min(made.values()) < 3:
                try:
                    await ask(it, GenerateRequest(name, "lake", 0, size=(SIDE, SIDE), num_inference_steps=1)).result
                    made[name] += 1
                except ModelLoading:
                    await it.wait_model(name)

        await asyncio.gather(*map(paint, "ab"))


@run
async def test_a_model_that_ends_the_process_does_not_take_the_others_with_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(workers, "FIRST_RESTART_S", 0.01)
    async with working(tmp_path, models=("a", "b", "die-load"), memory_mb=25) as it:
        await it.wait_ready()
        with pytest.raises(Unavailable, match="ended each time"):
            await it.wait_model("die-load")
        await it.wait_model("a")
        assert (await ask(it, GenerateRequest("a", "lake", 0, size=(SIDE, SIDE))).result).model == "a"


@run
async def test_what_was_asked_for_meanwhile_is_done_afterwards(tmp_path: Path) -> None:
    hold = Hold(tmp_path)
    async with working(tmp_path, models=("fake", "other")) as it:
        await it.wait_ready()
        going = ask(it, request(hold.prompt))
        await hold.entered()
        it.unload("fake")
        it.load("fake")
        hold.release()
        await going.result
        await it.wait_model("fake")
        it.unload("other")
        await until(lambda: it.models["other"].state == "unloaded")
        it.load("other")
        it.unload("other")
        await until(lambda: it.models["other"].state == "unloaded")


@run
async def test_several_pictures_are_one_request(tmp_path: Path) -> None:
    async with working(tmp_path) as it:
        await it.wait_ready()
        made = it.submit(dataclasses.replace(request("lake"), seed=7), count=3)
        assert [(await one.result).seed for one in made] == [7, 8, 9]


@run
async def test_the_bytes_of_waiting_pictures_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "MAX_PENDING_BYTES", 100)
    async with working(tmp_path) as it:
        await it.wait_ready()
        picture = dataclasses.replace(request("lake"), image=bytes(60))
        first = it.submit(picture, count=2)
        with pytest.raises(Overloaded):
            it.submit(picture)
        for one in first:
            with pytest.raises(ImageError):
                await one.result
        it.submit(picture)

"""The engine process from the front's side: death, hanging, back-off, memory."""

from __future__ import annotations

import asyncio
import dataclasses
import gc
import os
import resource
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from serving import FAKE_ENGINE, SIDE, model_folder, run, until
from test_realtime import Hold

from lcm_rt import catalog, workers
from lcm_rt.errors import EngineLost, GenerationFailed, ImageError, Superseded, Unavailable
from lcm_rt.metrics import Metrics
from lcm_rt.types import GenerateRequest
from lcm_rt.workers import Workers


@asynccontextmanager
async def working(
    folder: Path, command: tuple[str, ...] = FAKE_ENGINE, hang_timeout_s: float = 60, device: str = "auto"
) -> AsyncIterator[Workers]:
    spec = await asyncio.to_thread(lambda: catalog.resolve(model_folder(folder / "model")))
    it = Workers(
        [spec],
        device=device,
        compile=False,
        threads=None,
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


def request(prompt: str, session: str | None = None) -> GenerateRequest:
    return GenerateRequest("fake", prompt, 0, size=(SIDE, SIDE), num_inference_steps=1, session=session)


@run
async def test_a_result_and_its_begin(tmp_path: Path) -> None:
    async with working(tmp_path) as it:
        await it.wait_ready()
        begun = asyncio.Event()
        result = await it.submit(request("lake"), begun.set).result
        assert begun.is_set()
        assert (result.width, result.height, result.batch) == (SIDE, SIDE, 1)
        assert it.device_name == "fake"


@run
async def test_only_what_waits_is_superseded(tmp_path: Path) -> None:
    hold = Hold(tmp_path)
    async with working(tmp_path) as it:
        await it.wait_ready()
        stepping = it.submit(request(hold.prompt, "s"))
        await hold.entered()
        waiting = it.submit(request("lake", "s"))
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
        it.submit(dataclasses.replace(request(hold.prompt), num_inference_steps=50))
        await hold.entered()
        # From here on the held row is in every forward, so nobody else is ever alone.
        others = [it.submit(request("lake")).result for _ in "abc"]
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
            await it.submit(request("raise")).result
        with pytest.raises(ImageError):
            await it.submit(GenerateRequest("fake", "x", 0, image=b"junk")).result


@run
async def test_twenty_kills_cost_twenty_retryable_errors_and_no_memory(tmp_path: Path) -> None:
    hold = Hold(tmp_path)
    async with working(tmp_path) as it:
        await it.wait_ready()
        files = after_two = 0
        for kill in range(20):
            pid = it.pid
            assert pid
            lost = it.submit(request(hold.prompt))
            await hold.entered()
            os.kill(pid, 9)
            with pytest.raises(EngineLost) as error:
                await lost.result
            hold.release()
            assert error.value.retryable
            assert not it.is_ready
            await it.wait_ready()
            assert (await it.submit(request("lake")).result).width == SIDE
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
        hangs = it.submit(request(hold.prompt))
        await hold.entered()
        with pytest.raises(EngineLost):
            await hangs.result
        hold.release()
        await it.wait_ready()
        assert (await it.submit(request("lake")).result).width == SIDE


@run
async def test_an_engine_that_cannot_start_is_not_started_again(tmp_path: Path) -> None:
    async with working(tmp_path, device="none") as it:
        with pytest.raises(Unavailable, match="there is no such device"):
            await it.wait_ready()
        with pytest.raises(Unavailable):
            it.submit(request("lake"))
        assert it.describe()[0]["state"] == "failed"


@run
async def test_an_engine_that_dies_at_once_is_tried_with_growing_pauses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(workers, "FIRST_RESTART_S", 0.01)
    async with working(tmp_path, (sys.executable, "-c", "raise SystemExit(3)")) as it:
        await until(lambda: it._metrics.value("lcm_rt_engine_restarts_total") >= 3)
        assert not it.is_ready

"""A server answers eagerly at once, becomes fast while it does, and starts fast the next time."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
from serving import REAL_ENGINE, hear, run, say, serving

from lcm_rt.catalog import ModelSpec
from lcm_rt.engine.openvino import is_installed


@pytest.mark.skipif(not is_installed(), reason="needs the extra openvino")
@run
async def test_a_server_becomes_fast_while_it_answers(
    specs: dict[str, ModelSpec], converted: Path, tmp_path: Path
) -> None:
    source = specs["lcm-tiny"].source
    options = {"backend": "openvino", "cache_dir": converted, "models": [f"lcm-tiny={source}"], "threads": 1}
    made: list[list[int]] = []
    seeds = itertools.count()
    for _ in range(2):
        async with serving(tmp_path, command=REAL_ENGINE, **options) as server, server.connect() as client:
            model = server.service.workers.models["lcm-tiny"]
            fast = 0  # pictures since
            while fast < 2:
                fast += model.backend == "openvino"
                await say(client, prompt="a red cat", seed=next(seeds), image_size={"width": 64, "height": 64})
                answer = await hear(client)
                assert answer["images"][0]["width"] == 64
            assert model.tune_seconds is not None
            assert server.metric("lcm_rt_forwards_total", way="openvino") > 0
            assert server.metric("lcm_rt_cache_lookups_total", cache="prompt", outcome="hit") > 0
        kept = sorted((converted / "openvino").glob("lcm-tiny-*/*.xml"))
        assert len(kept) == 4  # a UNet, a VAE's two halves, a text encoder
        made.append([file.stat().st_mtime_ns for file in kept])
    assert made[0] == made[1]  # the second start converts nothing


@run
async def test_a_model_that_cannot_be_made_fast_goes_on_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "model_index.json").write_text("{}")
    async with serving(tmp_path, models=[f"bad-tune={tmp_path / 'model'}"]) as server, server.connect() as client:
        await say(client, prompt="a red cat")
        assert (await hear(client))["images"]
        assert server.service.workers.models["bad-tune"].backend == "eager"

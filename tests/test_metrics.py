"""What engine processes count, in the server's metrics."""

from __future__ import annotations

from pathlib import Path

from serving import run
from test_workers import working

from lcm_rt.metrics import Metrics

COUNTS = [["cache", "prompt", "hit", 3], ["cache", "prompt", "miss", 1], ["forward", "eager", 12]]


def test_counts_add_up() -> None:
    metrics = Metrics()
    metrics.add(COUNTS)
    metrics.add(COUNTS[:1])
    assert metrics.value("lcm_rt_cache_lookups_total", cache="prompt", outcome="hit") == 6
    lines = metrics.render().decode().splitlines()
    assert 'lcm_rt_cache_lookups_total{cache="prompt",outcome="miss"} 1.0' in lines
    assert 'lcm_rt_forwards_total{way="eager"} 12.0' in lines


@run
async def test_what_the_engine_counts_changes_no_model(tmp_path: Path) -> None:
    async with working(tmp_path) as it:
        await it.wait_ready()
        changes = it.changes
        it._handle({"op": "counted", "counts": COUNTS})
        assert it.changes == changes
        assert it._metrics.value("lcm_rt_forwards_total", way="eager") == 12

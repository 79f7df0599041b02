"""What is known of the device's times."""

from __future__ import annotations

import json
import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lcm_rt.errors import InputError
from lcm_rt.steptable import KEPT, MAX_BUCKETS, TRUSTED, UNSEEN, StepTable

FILLED = {1: 5.5, 2: 6.5, 3: 8.0, 4: 9.5, 5: 13.0, 6: 13.0, 7: 16.5, 8: 16.5}
"""As of a device with forwards of 1, 2, 3, 4, 6 and 8 rows."""

GPU = {1: 5.5, 2: 6.5, 4: 9.5, 8: 16.5, 16: 30.0}


def table(steps: dict[int, float]) -> StepTable:
    return StepTable.given([{"bucket": "a", "step": steps}])


def observe(found: StepTable, rows: int, *seconds: float) -> StepTable:
    for one in seconds:
        found.observe_step("a", rows, one)
    return found


def test_nothing_is_known_at_first() -> None:
    found = StepTable()
    assert found.step("a", 1) is None and found.finish("a", 1) is None
    assert found.enough("a", 8) == 8
    assert observe(found, 1, *[5.0] * (TRUSTED - 1)).step("a", 1) is None, "one may have been the first, and slow"
    assert observe(found, 1, 5.0).step("a", 1) == 5.0
    assert found.finish("a", 1) is None and found.step("b", 1) is None


def test_steps_and_pictures_are_apart() -> None:
    found = observe(StepTable(), 1, 5.0, 5.0, 5.0)
    for _ in range(TRUSTED):
        found.observe_finish("a", 1, 0.4)
    assert (found.step("a", 1), found.finish("a", 1)) == (5.0, 0.4)


def test_between_and_beyond_what_was_measured() -> None:
    found = table(GPU)
    assert [found.step("a", rows) for rows in (1, 3, 6, 12, 16)] == [5.5, 8.0, 13.0, 23.25, 30.0]
    assert found.step("a", 18) == pytest.approx(33.375), "along the last line"
    assert table({4: 17.0, 8: 31.0}).step("a", 1) == pytest.approx(6.5), "and along the first"


def test_beyond_it_is_careful() -> None:
    assert [table({2: 6.0}).step("a", rows) for rows in (1, 4)] == [3.0, 12.0], "one point makes no line"
    falling = table({4: 10.0, 8: 9.0})
    assert falling.step("a", 16) == 9.0, "more rows are not quicker"
    assert falling.step("a", 2) == 10.0, "fewer are not slower"
    steep = table({4: 10.0, 8: 40.0})
    assert steep.step("a", 16) == 80.0, "nor slower than apart"
    assert steep.step("a", 2) == 5.0


def test_stalls_do_no_harm() -> None:
    rng = random.Random(1)
    found = observe(StepTable(), 1, 300.0, *(rng.uniform(5, 6) for _ in range(4)))
    for _ in range(50):
        observe(found, 1, *(rng.uniform(5, 6) for _ in range(5)), 100.0, 4000.0)
        assert 5 <= (found.step("a", 1) or 0) <= 6


def test_it_follows_when_the_server_becomes_faster() -> None:
    found = observe(observe(StepTable(), 1, *[22.0] * 20), 8, *[110.0] * 20)
    observe(found, 1, *[6.0] * (KEPT // 2 + 1))
    assert found.step("a", 1) == 6.0
    assert found.step("a", 8) == 48.0, "what 8 rows took before says nothing any more: in proportion"
    assert found.enough("a", 8) == 2, "so larger batches are tried again"
    for rows in range(2, 9):
        assert found.enough("a", 8) >= rows
        observe(found, rows, *[rows * 3.5 + 2.5] * TRUSTED)
    assert (found.step("a", 8), found.enough("a", 8)) == (30.5, 7)


def test_noise_is_no_change() -> None:
    found = observe(table(GPU), 1, *[5.9, 5.2, 5.6, 6.3, 4.9] * 10)
    assert found.step("a", 16) == 30.0


def test_a_mistake_heals() -> None:
    """Batches of two that were slow once would never be tried, and so never be measured, again."""
    found = observe(observe(StepTable(), 1, *[5.0] * TRUSTED), 2, *[50.0] * TRUSTED)
    assert found.enough("a", 2) == 1
    observe(found, 1, *[5.0] * (UNSEEN + 1))
    assert found.enough("a", 2) == 2
    assert observe(found, 2, *[6.0] * TRUSTED).step("a", 2) == 6.0


@pytest.mark.parametrize(
    ("steps", "most", "enough"),
    [
        ({1: 10.0, 2: 20.0}, 8, 1),
        ({1: 10.0, 2: 19.7, 8: 78.8}, 8, 1),  # hardly worth it
        ({1: 10.0, 2: 12.0, 3: 16.0, 4: 20.0, 5: 30.0, 6: 36.0, 7: 42.0, 8: 48.0}, 8, 4),
        ({1: 10.0, 2: 12.0, 3: 15.0}, 3, 3),
        (FILLED, 5, 4),
        (FILLED, 6, 6),
        (FILLED, 8, 8),
        (GPU | {15: 28.2}, 16, 14),
        ({1: 10.0}, 8, 2),  # who knows
        ({1: 10.0, 3: 30.0}, 8, 2),
        ({8: 100.0}, 8, 2),  # perhaps a few are as good
        ({rows: FILLED[rows] for rows in range(1, 6)}, 8, 6),  # perhaps more are better than 4
        ({rows: FILLED[rows] for rows in (1, 2, 3, 4)} | {9: 23.25}, 9, 5),  # 9 are filled up, and say nothing of 8
    ],
)
def test_how_many_rows_are_enough(steps: dict[int, float], most: int, enough: int) -> None:
    assert table(steps).enough("a", most) == enough


@given(st.dictionaries(st.integers(1, 64), st.floats(1e-6, 1e6), max_size=8), st.integers(1, 64))
def test_whatever_was_measured_the_answers_are_in_range(steps: dict[int, float], rows: int) -> None:
    found = table(steps)
    assert 1 <= found.enough("a", rows) <= rows
    seconds = found.step("a", rows)
    assert (seconds is None) == (not steps)
    if seconds is not None:
        assert 0 < seconds < math.inf
        assert seconds >= min(steps.values()) * min(1, rows / max(steps)) * 0.999


def test_what_cannot_be_a_time_is_passed_over() -> None:
    found = observe(StepTable(), 1, math.nan, -1.0, math.inf, 0.0, 5.0, 5.0)
    assert found.step("a", 1) is None
    assert observe(found, 1, 5.0).step("a", 1) == 5.0


def test_buckets_are_bounded() -> None:
    found = observe(StepTable(), 1, *[1.0] * TRUSTED)
    for bucket in range(MAX_BUCKETS):
        for _ in range(TRUSTED):
            found.observe_step(("m", 64, bucket), 1, 1.0)
        observe(found, 1, 1.0)
    assert len(found.export()) == MAX_BUCKETS
    assert found.step(("m", 64, 0), 1) is None, "the one longest unmeasured"
    assert found.step("a", 1) == 1.0


def test_it_travels_as_json() -> None:
    found = StepTable()
    for _ in range(TRUSTED):
        found.observe_step(("m", 64, 64), 2, 0.25)
        found.observe_finish(("m", 64, 64), 1, 0.5)
        found.observe_finish("other", 1, 0.125)
    exported = found.export()
    assert exported == [
        {"bucket": ["m", 64, 64], "step": {"2": 0.25}, "finish": {"1": 0.5}},
        {"bucket": "other", "step": {}, "finish": {"1": 0.125}},
    ]
    back = StepTable.given(json.loads(json.dumps(exported)))
    assert back.step(("m", 64, 64), 2) == 0.25 and back.finish("other", 1) == 0.125
    assert back.export() == exported


@pytest.mark.parametrize(
    ("entries", "field"),
    [
        (None, "table"),
        ({"bucket": "a"}, "table"),
        (["a"], "table"),
        ([{"bucket": {"a": 1}}], "bucket"),
        ([{"bucket": ["a", ["b"]]}], "bucket"),
        ([{"bucket": "a", "step": [1.0]}], "step"),
        ([{"bucket": "a", "step": {"0": 1.0}}], "step"),
        ([{"bucket": "a", "step": {"1.5": 1.0}}], "step"),
        ([{"bucket": "a", "step": {"1": -1.0}}], "step"),
        ([{"bucket": "a", "step": {"1": math.nan}}], "step"),
        ([{"bucket": "a", "finish": {"1": True}}], "finish"),
        ([{"bucket": "a", "finish": {"9" * 30: 1.0}}], "finish"),
        ([{"bucket": "a", "finish": {"²": 1.0}}], "finish"),
        ([{"bucket": "a", "finish": {1: "1.0"}}], "finish"),
        ([{"bucket": "a", "finish": {"9" * 5000: 1.0}}], "finish"),
    ],
)
def test_what_is_no_table_is_refused(entries: object, field: str) -> None:
    with pytest.raises(InputError) as caught:
        StepTable.given(entries)
    assert caught.value.field == field

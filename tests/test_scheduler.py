"""Who runs next."""

from __future__ import annotations

from dataclasses import dataclass

from hypothesis import given
from hypothesis import strategies as st

from lcm_rt.scheduler import PATIENCE, Scheduler
from lcm_rt.types import GenerateRequest, Priority


@dataclass
class Row:
    """A ticket and, once begun, a row."""

    key: int
    request: GenerateRequest
    bucket: str = "small"
    steps_left: int = 4
    area: int = 1

    @property
    def done(self) -> bool:
        return self.steps_left == 0


def row(
    key: int, *, session: str | None = None, priority: Priority = "run", bucket: str = "small", steps: int = 4
) -> Row:
    return Row(key, GenerateRequest("m", "p", 0, session=session, priority=priority), bucket, steps)


def owned(key: int, owner: str) -> Row:
    return Row(key, GenerateRequest("m", "p", 0, session=f"{owner}.{key}", owner=owner, priority="realtime"))


def keys(rows: list[Row]) -> list[int]:
    return [r.key for r in rows]


def begin(scheduler: Scheduler[Row, Row]) -> list[int]:
    admitted = scheduler.admit()
    for ticket in admitted:
        scheduler.start(ticket)
    return keys(admitted)


def test_newcomers_join_the_next_forward() -> None:
    scheduler: Scheduler[Row, Row] = Scheduler(8)
    scheduler.add(row(1))
    begin(scheduler)
    assert keys(scheduler.schedule()) == [1]
    scheduler.add(row(2))
    begin(scheduler)
    assert keys(scheduler.schedule()) == [1, 2]


def test_a_session_has_one_row_at_a_time() -> None:
    scheduler: Scheduler[Row, Row] = Scheduler(8)
    for key, session in ((1, "a"), (2, "a"), (3, "b"), (4, None), (5, None)):
        scheduler.add(row(key, session=session))
    assert begin(scheduler) == [1, 3, 4, 5]
    batch = scheduler.schedule()
    batch[0].steps_left = 0
    assert keys(scheduler.retire(batch)) == [1]
    assert begin(scheduler) == [2]


def test_realtime_before_run_before_queue_then_oldest() -> None:
    scheduler: Scheduler[Row, Row] = Scheduler(3)
    order: list[Priority] = ["queue", "run", "run", "realtime", "run"]
    for key, priority in enumerate(order):
        scheduler.add(row(key, priority=priority))
    assert begin(scheduler) == [3, 1, 2]
    assert scheduler.depth == (2, 3)


def test_long_runs_leave_a_row_for_realtime() -> None:
    scheduler: Scheduler[Row, Row] = Scheduler(3)
    for key in range(4):
        scheduler.add(row(key, steps=50))
    assert begin(scheduler) == [0, 1]
    scheduler.add(row(4, priority="realtime"))
    assert begin(scheduler) == [4]


def test_cameras_do_not_starve_a_run() -> None:
    scheduler: Scheduler[Row, Row] = Scheduler(4)
    scheduler.add(row(0))
    key = 0
    for _ in range(2 * PATIENCE):
        for camera in "abcd":
            key += 1
            scheduler.add(row(key, session=camera, priority="realtime", steps=1))
        if 0 in begin(scheduler):
            return
        batch = scheduler.schedule()
        for r in batch:
            r.steps_left = 0
        scheduler.retire(batch)
        for waiting in range(key - 3, key + 1):
            scheduler.drop(waiting)
    raise AssertionError("the run never began")


def test_a_replacement_has_the_seat_of_what_it_replaces() -> None:
    scheduler: Scheduler[Row, Row] = Scheduler(1)
    scheduler.add(row(1, session="fast", priority="realtime"))
    scheduler.add(row(2, session="slow", priority="realtime"))
    assert scheduler.drop(1)
    scheduler.add(row(3, session="fast", priority="realtime"))
    assert begin(scheduler) == [3]
    scheduler.retire([])
    assert scheduler.drop(3, running=True)
    assert scheduler.drop(2, running=True)
    scheduler.add(row(4, session="other", priority="realtime"))
    scheduler.add(row(5, session="slow", priority="realtime"))
    assert begin(scheduler) == [4], "a session that left has no seat"


def test_a_batch_is_of_one_bucket_and_buckets_take_turns() -> None:
    scheduler: Scheduler[Row, Row] = Scheduler(8)
    for key, bucket in enumerate(["small", "large", "small", "large"]):
        scheduler.add(row(key, bucket=bucket))
    begin(scheduler)
    assert [keys(scheduler.schedule()) for _ in range(4)] == [[0, 2], [1, 3], [0, 2], [1, 3]]


def test_a_less_urgent_bucket_is_never_starved() -> None:
    scheduler: Scheduler[Row, Row] = Scheduler(8)
    scheduler.add(row(1, priority="queue", bucket="large"))
    scheduler.add(row(2, priority="realtime"))
    begin(scheduler)
    turns = [keys(scheduler.schedule()) for _ in range(2 * (PATIENCE + 1))]
    assert turns.count([1]) == 2
    assert turns.count([2]) == 2 * PATIENCE


def test_only_what_waits_is_dropped_for_a_newer_message() -> None:
    scheduler: Scheduler[Row, Row] = Scheduler(1)
    scheduler.add(row(1))
    scheduler.add(row(2))
    begin(scheduler)
    assert scheduler.drop(2)
    assert not scheduler.drop(1)
    assert scheduler.drop(1, running=True)
    assert not scheduler.drop(1, running=True)
    assert scheduler.idle


@given(
    st.lists(
        st.tuples(
            st.sampled_from(["realtime", "run", "queue"]),
            st.sampled_from("ab"),
            st.sampled_from([None, "s", "t"]),
            st.integers(1, 5),
        ),
        max_size=30,
    ),
    st.integers(1, 6),
)
def test_everything_is_stepped_exactly_its_steps(work: list[tuple[Priority, str, str | None, int]], size: int) -> None:
    scheduler: Scheduler[Row, Row] = Scheduler(size)
    for key, (priority, bucket, session, steps) in enumerate(work):
        scheduler.add(row(key, priority=priority, bucket=bucket, session=session, steps=steps))
    finished: list[int] = []
    while not scheduler.idle:
        begin(scheduler)
        batch = scheduler.schedule()
        assert batch and len(batch) <= size
        assert len({r.bucket for r in batch}) == 1
        for r in batch:
            r.steps_left -= 1
            assert r.steps_left >= 0
        finished += keys(scheduler.retire(batch))
    assert sorted(finished) == list(range(len(work)))


def test_nobody_has_every_row() -> None:
    scheduler: Scheduler[Row, Row] = Scheduler(4)
    for key in range(8):
        scheduler.add(owned(key, "greedy"))
    assert begin(scheduler) == [0, 1, 2]
    scheduler.add(owned(8, "other"))
    assert begin(scheduler) == [8]


def test_who_has_fewest_rows_goes_first() -> None:
    scheduler: Scheduler[Row, Row] = Scheduler(4)
    for key, owner in enumerate("aaaabb"):
        scheduler.add(owned(key, owner))
    assert begin(scheduler) == [0, 4, 1, 5]


def test_a_forward_is_no_larger_than_it_may_be_and_all_rows_take_turns() -> None:
    scheduler: Scheduler[Row, Row] = Scheduler(8, max_area=20)
    for key in range(5):
        scheduler.add(Row(key, GenerateRequest("m", "p", 0), area=8))
    begin(scheduler)
    seen = [keys(scheduler.schedule()) for _ in range(50)]
    assert all(len(batch) == 2 for batch in seen)
    for start in range(48):  # whoever was stepped waits for two forwards at most
        assert {key for batch in seen[start : start + 3] for key in batch} == set(range(5))


def test_a_row_that_is_too_large_for_any_forward_goes_alone() -> None:
    scheduler: Scheduler[Row, Row] = Scheduler(8, max_area=20)
    for key in range(2):
        scheduler.add(Row(key, GenerateRequest("m", "p", 0), area=50))
    begin(scheduler)
    assert [keys(scheduler.schedule()) for _ in range(4)] == [[0], [1], [0], [1]]

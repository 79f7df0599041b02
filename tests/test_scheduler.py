"""Who runs next."""

from __future__ import annotations

from dataclasses import dataclass

from hypothesis import given
from hypothesis import strategies as st

from lcm_rt.scheduler import MEMORY_S, PATIENCE, STRETCH, Scheduler
from lcm_rt.steptable import StepTable
from lcm_rt.types import GenerateRequest, Priority


@dataclass
class Row:
    """A ticket and, once begun, a row."""

    key: int
    request: GenerateRequest
    bucket: str = "small"
    steps_left: int = 4
    area: int = 1
    received_at: float = 0.0

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


def begin(scheduler: Scheduler[Row, Row], now: float = 0.0) -> list[int]:
    admitted = scheduler.admit(now)
    for ticket in admitted:
        scheduler.start(ticket)
    return keys(admitted)


def table(**steps: dict[int, float]) -> StepTable:
    """By bucket: seconds of a forward by its number of rows."""
    return StepTable.given([{"bucket": bucket, "step": times} for bucket, times in steps.items()])


PAYS = {1: 6.1, 2: 10.0, 4: 17.0, 8: 31.0}  # s; more rows are cheaper per row
DOES_NOT_PAY = {1: 10.0, 2: 20.0, 8: 80.0}


def turn(scheduler: Scheduler[Row, Row], now: float = 0.0) -> list[int]:
    """One turn of the loop around the scheduler."""
    begin(scheduler, now)
    batch = scheduler.schedule()
    for r in batch:
        r.steps_left -= 1
    scheduler.retire(batch)
    return keys(batch)


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
    st.dictionaries(st.integers(1, 8), st.floats(1e-6, 1e3), max_size=4),
    st.integers(1, 4),
)
def test_everything_is_stepped_exactly_its_steps(
    work: list[tuple[Priority, str, str | None, int]], size: int, times: dict[int, float], max_area: int
) -> None:
    """With any table, or none, something runs whenever something waits, and all of it ends."""
    scheduler: Scheduler[Row, Row] = Scheduler(size, max_area, table(a=times))
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


def test_a_backlog_rises_one_at_a_time() -> None:
    scheduler: Scheduler[Row, Row] = Scheduler(2)
    for key in range(100):
        scheduler.add(row(key, priority="run", steps=1))
    begun: list[int] = []
    for key in range(1000, 1000 + 2 * (PATIENCE + 1)):
        scheduler.add(row(key, session=f"s{key}", priority="realtime", steps=1))
        scheduler.add(row(key + 500, session=f"t{key}", priority="realtime", steps=1))
        begun += turn(scheduler)
    jobs = [key for key in begun if key < 1000]
    assert jobs == [0, 1, 2, 3], "however many wait, and however long: one for every eight others"


def test_a_forward_grows_while_that_pays() -> None:
    for times, size in ((PAYS, 7), (DOES_NOT_PAY, 1), (PAYS | {rows: 10.0 * rows for rows in range(5, 9)}, 4)):
        scheduler: Scheduler[Row, Row] = Scheduler(8, table=table(small=times))
        for key in range(12):
            scheduler.add(row(key))
        assert len(begin(scheduler)) == size
        assert len(scheduler.schedule()) == size


def test_what_nobody_measured_may_grow() -> None:
    scheduler: Scheduler[Row, Row] = Scheduler(8, table=table(large=DOES_NOT_PAY))
    for key in range(4):
        scheduler.add(row(key))
    assert begin(scheduler) == [0, 1, 2, 3]


def test_another_bucket_begins_at_once() -> None:
    scheduler: Scheduler[Row, Row] = Scheduler(8, table=table(small=DOES_NOT_PAY, large=DOES_NOT_PAY))
    for key, bucket in enumerate(["small", "small", "large", "large"]):
        scheduler.add(row(key, bucket=bucket))
    assert begin(scheduler) == [0, 2]


def test_no_more_begin_than_a_forward_may_have() -> None:
    scheduler: Scheduler[Row, Row] = Scheduler(8, 20, table(small=PAYS))
    for key in range(5):
        scheduler.add(Row(key, GenerateRequest("m", "p", 0), area=8))
    assert begin(scheduler) == [0, 1]


def test_a_picture_that_is_too_large_for_any_forward_begins_alone() -> None:
    scheduler: Scheduler[Row, Row] = Scheduler(8, 20, table(small=PAYS))
    for key in range(2):
        scheduler.add(Row(key, GenerateRequest("m", "p", 0), area=50))
    assert begin(scheduler) == [0]


def test_a_session_that_left_before_its_next_message_has_no_seat() -> None:
    scheduler: Scheduler[Row, Row] = Scheduler(1)
    scheduler.add(row(1, session="gone"))
    assert scheduler.drop(1), "for a newer message that never came"
    scheduler.add(row(2, session="other"))
    scheduler.add(row(3, session="gone"))
    assert begin(scheduler) == [2]


def test_realtime_does_not_wait_for_rows_below_it() -> None:
    scheduler: Scheduler[Row, Row] = Scheduler(8, table=table(small=DOES_NOT_PAY))
    scheduler.add(row(1, priority="queue"))
    assert begin(scheduler) == [1]
    scheduler.add(row(2, priority="queue"))
    scheduler.add(row(3, priority="realtime"))
    assert begin(scheduler) == [3]


def test_rows_of_lower_priority_hold_nobody_up_and_do_not_starve() -> None:
    scheduler: Scheduler[Row, Row] = Scheduler(8, table=table(small=PAYS))
    for key in range(4):
        scheduler.add(row(key, priority="queue", steps=1000))
    begin(scheduler)
    scheduler.add(row(9, priority="realtime", steps=1000))
    begin(scheduler)
    batches = [keys(scheduler.schedule()) for _ in range(3 * (PATIENCE + 1))]
    assert all(9 in batch for batch in batches)
    assert PAYS[2] > STRETCH * PAYS[1], "so that none of the jobs may come along"
    assert [batch for batch in batches if batch != [9]] == [[0, 1, 2, 3, 9]] * 3


def test_rows_of_lower_priority_come_along_where_they_cost_little() -> None:
    scheduler: Scheduler[Row, Row] = Scheduler(8, table=table(small={1: 5.0, 2: 6.0, 3: 7.4, 4: 9.0, 8: 16.0}))
    for key in range(4):
        scheduler.add(row(key, priority="queue", steps=1000))
    scheduler.add(row(9, priority="realtime", steps=1000))
    begin(scheduler)
    batches = [keys(scheduler.schedule()) for _ in range(20)]
    assert all(9 in batch and len(batch) == 3 for batch in batches), "7.4 s are less than half as much again"
    assert {key for batch in batches[:2] for key in batch} == {0, 1, 2, 3, 9}, "they take turns"


def test_who_had_least_of_late_begins_first() -> None:
    scheduler: Scheduler[Row, Row] = Scheduler(1, table=table(small={1: 0.02}))
    typed = {number: 10_000 + number for number in range(100, 1000, 50)}
    waits: list[int] = []
    for number in range(1000):  # one step of 20 ms each; a picture of a camera has four
        now = number / 50
        for camera in range(2):
            scheduler.drop(2 * number + camera - 2)
            scheduler.add(Row(2 * number + camera, request(f"camera {camera}"), received_at=now))
        if number in typed:
            scheduler.add(Row(typed[number], request("typist"), steps_left=1, received_at=now))
        if (key := turn(scheduler, now)[0]) > 10_000:
            waits.append(number + 10_000 - key)
    assert len(waits) == len(typed)
    assert max(waits) <= 3, "as soon as the row under way is done, though a camera has waited for longer"


def request(session: str) -> GenerateRequest:
    return GenerateRequest("m", "p", 0, session=session, priority="realtime")


def test_what_nobody_else_wanted_is_not_held_against_anyone() -> None:
    scheduler: Scheduler[Row, Row] = Scheduler(1, table=table(small={1: 1.0}))
    scheduler.add(Row(0, request("early"), steps_left=1))
    for number in range(1, 20):
        scheduler.add(Row(number, request("early"), steps_left=1, received_at=float(number)))
        turn(scheduler, float(number))
    scheduler.add(Row(100, request("late"), received_at=20.0))
    assert begin(scheduler, 20.0) == [19]


def test_service_is_forgotten() -> None:
    for pause, first in ((0.1, "b"), (20 * MEMORY_S, "a")):
        scheduler: Scheduler[Row, Row] = Scheduler(2, table=table(small={1: 1.0, 2: 2.0}, large={1: 1.0}))
        scheduler.add(Row(0, request("c"), bucket="large", steps_left=10**6))
        scheduler.add(Row(1, request("a"), steps_left=1))
        while 1 in keys(scheduler.running) or scheduler.depth[0]:
            turn(scheduler, 0.0)
        scheduler.add(Row(2, request("a"), received_at=pause))
        scheduler.add(Row(3, request("b"), received_at=pause + 0.1))
        assert begin(scheduler, pause + 0.1) == [{"a": 2, "b": 3}[first]]


def test_small_pictures_do_not_wait_for_large_ones() -> None:
    scheduler: Scheduler[Row, Row] = Scheduler(4, table=table(small={1: 1.0}, large={1: 16.0}))
    scheduler.add(Row(0, request("a"), bucket="large", steps_left=1000))
    scheduler.add(Row(1, request("b"), steps_left=1000))
    begin(scheduler)
    turns = [keys(scheduler.schedule()) for _ in range(90)]
    assert turns.count([0]) == 90 // (PATIENCE + 1)


def test_who_came_first_goes_first_without_a_table() -> None:
    scheduler: Scheduler[Row, Row] = Scheduler(1)
    scheduler.add(Row(0, request("a"), steps_left=1))
    turn(scheduler)
    scheduler.add(Row(1, request("a"), received_at=1.0))
    scheduler.add(Row(2, request("b"), received_at=1.1))
    assert begin(scheduler, 1.2) == [1]

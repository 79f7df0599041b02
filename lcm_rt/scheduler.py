"""Who runs next: pure policy; knows no torch, no clock, no picture, no process.

A *ticket* is a decoded request that waits; a *row* is a ticket that the engine has begun. One forward takes rows of one
bucket. The order is realtime before run before queue, then by turn: who came first, but each second of the device that
somebody took from others of late counts like a second of coming later. So a camera with 30 pictures a second does not
keep a typist waiting, and large pictures do not keep small ones. A forward grows as long as that pays by the table of
step times, and rows of lower priority do not hold up those above.

``benchmarks/simulate.py`` runs this class over traces of typists and cameras. What it found (input to frame, p50 / p95
in ms), unless said otherwise on a CPU of 6, 10, 17, 31 ms for 1, 2, 4, 8 rows and 7 ms of VAE per picture:

* Where more rows are cheaper per row, all that want to may join: 16 typists get 307 / 512, and one by one 477 / 801.
  Waiting messages are replaced by newer ones, so a busy server is a closed loop, and its delay is the number of
  sessions by its pictures per second. To let rows wait so that those under way meet a deadline gains nothing, whether
  it is 1.5 or 4 times what they take alone; nor do forwards of half the size.
* Where they are not (10 ms per row, as with large pictures), a row that joins only makes others late. Below full load
  one by one is quicker: 6 typists get 114 / 355, and 148 / 348 together; above, it is all the same. So a forward stops
  growing at the fewest rows whose time per row is the best within 2 %.
* A GPU that fills 5 rows up to 6 had better take 4 or 6: 32 typists get 119 / 244 instead of 145 / 248.
* Turns by service alone, as in fair queueing, cost 16 typists half of their p95 again, as who typed much waits for all
  others; as lateness, service costs 4 %. A typist beside four cameras, with two rows in all, gets 75 / 127 by it
  instead of 167 / 265. Where a forward has room for everybody, the order does not matter.
* Two typists beside two cameras with pictures of 16 times the area get 88 / 145 where the bucket goes next that had
  least, and 1287 / 1676 where buckets take turns.
* Four typists beside 2000 jobs of the queue get 75 / 139, and 260 / 350 where jobs are in every forward; of the jobs,
  four fifths as many are done.
"""

from __future__ import annotations

import functools
import math
from collections import Counter
from collections.abc import Hashable, Sequence
from typing import Generic, Protocol, TypeVar

from lcm_rt.steptable import StepTable
from lcm_rt.types import GenerateRequest, Priority

RANK: dict[Priority, int] = {"realtime": 0, "run": 1, "queue": 2}

PATIENCE = 8
"""Nothing starves: a bucket that was passed over this many times goes first, whatever its priority; so does a row that
missed this many forwards; and while one of a priority waits, it rises a rank for every so many others that begin."""

MEMORY_S = 2.0
"""What somebody had of the device fades to a third in this time: nobody saves up turns, or lacks them for long."""

STRETCH = 1.5
"""Rows of lower priority may make a forward this many times as long as it is for those of the highest in it."""


class Work(Protocol):
    """What the scheduler reads of any request: ``area`` is the size of its row in a forward."""

    @property
    def key(self) -> int: ...
    @property
    def request(self) -> GenerateRequest: ...
    @property
    def bucket(self) -> Hashable: ...
    @property
    def area(self) -> int: ...


class Ticket(Work, Protocol):
    """A waiting request; ``received_at`` is in seconds of the clock of ``Scheduler.admit``."""

    @property
    def received_at(self) -> float: ...


class Row(Work, Protocol):
    """A begun request; ``done`` turns true after its last step."""

    @property
    def done(self) -> bool: ...


T = TypeVar("T", bound=Ticket)
R = TypeVar("R", bound=Row)


class Scheduler(Generic[T, R]):
    """Waiting tickets and running rows.

    Args:
        max_rows: how many rows run at a time, over all buckets; also the largest batch.
        max_area: how large the rows of one forward may be together, but for a single one.
        table: how long forwards take. The caller tells it what it measures; without one, every forward is as large as
            it may be, and who came first goes first.
    """

    def __init__(self, max_rows: int, max_area: float = math.inf, table: StepTable | None = None) -> None:
        self.max_rows = max_rows
        self._max_area = max_area
        self._table = table or StepTable()
        self._waiting: dict[int, T] = {}
        self._running: dict[int, R] = {}
        self._passed_over: dict[Hashable, int] = {}
        self._stepped: dict[int, int] = {}  # by row: the number of the last forward that it was in, or was begun after
        self._forwards = 0
        self._waited: dict[Priority, int] = {}  # by priority: how many others began since one of it did
        self._seats: dict[str, tuple[float, int]] = {}  # by session: when its present wait began, with which key
        self._service: dict[str, float] = {}  # by session or owner: seconds of the device, of late, taken from others
        self._faded_at = -math.inf

    def add(self, ticket: T) -> None:
        """Let a decoded request wait for its turn. A message that replaces another of its session has its seat."""
        if self.idle:
            self._seats.clear()  # of sessions that left while nothing of theirs was here
            self._service.clear()
        self._waiting[ticket.key] = ticket
        if ticket.request.session is not None:
            self._seats.setdefault(ticket.request.session, (ticket.received_at, ticket.key))

    def admit(self, now: float) -> list[T]:
        """The tickets to begin at ``now`` (seconds); each of them is either started or forgotten by the caller.

        A session has one running row at a time: its next message waits, and may still be replaced by a newer one. One
        row is kept free for realtime, so that long runs cannot keep it waiting, and one for other owners.
        """
        self._fade(now)
        admitted: list[T] = []
        while self._waiting and len(self._running) + len(admitted) < self.max_rows:
            begun: list[Work] = [*self._running.values(), *admitted]
            owned = Counter(work.request.owner for work in begun)
            if not (able := self._able(begun, owned)):
                break
            admitted.append(chosen := min(able, key=lambda ticket: self._turn(ticket, owned)))
            self._forget(chosen)
            others = {ticket.request.priority for ticket in self._waiting.values()} - {chosen.request.priority}
            self._waited = {priority: self._waited.get(priority, 0) + 1 for priority in others}
        return admitted

    def _fade(self, now: float) -> None:
        kept = math.exp((self._faded_at - now) / MEMORY_S)
        self._faded_at = now
        self._service = {name: left for name, had in self._service.items() if (left := had * kept) > 1e-3}

    def _able(self, begun: Sequence[Work], owned: Counter[str]) -> list[T]:
        """The tickets that may begin beside what has begun."""
        busy = {work.request.session for work in begun} - {None}
        share = max(self.max_rows - 1, 1)
        others = sum(work.request.priority != "realtime" for work in begun)
        able = [
            ticket
            for ticket in self._waiting.values()
            if (request := ticket.request).session not in busy
            and not (request.owner and owned[request.owner] >= share)
            and (request.priority == "realtime" or others < share)
        ]
        company = Counter((work.bucket, RANK[work.request.priority]) for work in begun)
        wanted = Counter(ticket.bucket for ticket in able)

        @functools.cache
        def pays(bucket: Hashable, rank: int, area: int) -> bool:
            """Whether a forward with one more row is better; rows of lower rank are in nobody's way."""
            if self._table.step(bucket, 1) is None:
                return True
            rows = sum(company[bucket, above] for above in range(rank + 1))
            most = min(rows + wanted[bucket], self.max_rows, max(1, self._max_area / area))
            return rows < self._table.enough(bucket, int(most))

        return [ticket for ticket in able if pays(ticket.bucket, self._rank(ticket), ticket.area)]

    def _rank(self, ticket: T) -> int:
        priority = ticket.request.priority
        return max(0, RANK[priority] - self._waited.get(priority, 0) // PATIENCE)

    def _turn(self, ticket: T, owned: Counter[str]) -> tuple[int, int, float, int]:
        """Whose turn it is, lower first: by rank, then who has fewest rows, then who came first and had least."""
        since, key = self._seats.get(ticket.request.session or "", (ticket.received_at, ticket.key))
        return self._rank(ticket), owned[ticket.request.owner], since + self._had(ticket), key

    def _had(self, work: Work) -> float:
        return self._service.get(_name(work), 0.0)

    def _forget(self, ticket: T) -> None:
        del self._waiting[ticket.key]
        if ticket.request.session is not None:
            self._seats.pop(ticket.request.session, None)

    def start(self, row: R) -> None:
        """An admitted ticket has become a row; it joins the next forward of its bucket."""
        self._running[row.key] = row
        self._stepped[row.key] = self._forwards

    def schedule(self) -> list[R]:
        """The rows of the next forward, all of one bucket; empty if none runs."""
        buckets: dict[Hashable, list[R]] = {}
        for row in self._running.values():
            buckets.setdefault(row.bucket, []).append(row)
        if not buckets:
            return []

        def urgency(bucket: Hashable) -> tuple[bool, int, float, int, int]:
            passed_over = self._passed_over.get(bucket, 0)
            rank, oldest = min(map(_order, buckets[bucket]))
            had = min(map(self._had, buckets[bucket]))
            return passed_over < PATIENCE, rank, had, -passed_over, oldest

        chosen = min(buckets, key=urgency)
        self._passed_over = {b: self._passed_over.get(b, 0) + 1 for b in buckets if b != chosen}
        batch = self._together(buckets[chosen])
        if sum(row.area for row in batch) > self._max_area:
            batch.sort(key=lambda row: (self._stepped[row.key], _order(row)))
            batch = batch[: max(1, int(self._max_area // batch[0].area))]  # rows of a bucket are of one size
        self._forwards += 1
        self._stepped |= dict.fromkeys((row.key for row in batch), self._forwards)
        self._charge(batch, self._table.step(chosen, len(batch)))
        return batch

    def _together(self, rows: list[R]) -> list[R]:
        """Those of the highest rank, whoever has missed too many forwards, and others who do not hold these up."""
        highest = min(_order(row)[0] for row in rows)
        lower = [row for row in rows if _order(row)[0] > highest]
        alone = self._table.step(rows[0].bucket, len(rows) - len(lower))
        if alone is None:
            return rows
        late = [row for row in lower if self._forwards - self._stepped[row.key] < PATIENCE]
        late.sort(key=lambda row: (self._stepped[row.key], _order(row)))
        while late and (self._table.step(late[0].bucket, len(rows) - len(late) + 1) or 0.0) <= STRETCH * alone:
            late.pop(0)
        left_out = {row.key for row in late}
        return [row for row in rows if row.key not in left_out]

    def _charge(self, batch: Sequence[R], seconds: float | None) -> None:
        """Share out what a batch takes; where n want the device, 1/n of it is one's own, and taken from nobody."""
        names = [_name(row) for row in batch]
        wanting = {_name(work) for works in (self._running, self._waiting) for work in works.values()}.union(names)
        for name in filter(None, names):
            taken = (seconds or 0.0) / len(batch) * (1 - 1 / len(wanting))
            self._service[name] = self._service.get(name, 0.0) + taken

    def retire(self, batch: Sequence[R]) -> list[R]:
        """Remove and return the rows of ``batch`` that have no step left; their sessions may begin the next."""
        done = [row for row in batch if row.done]
        if done:
            self._charge(done, self._table.finish(done[0].bucket, len(done)))
        for row in done:
            self._running.pop(row.key, None)
            self._stepped.pop(row.key, None)
        return done

    def drop(self, key: int, *, running: bool = False) -> bool:
        """Forget a request that waits or, if ``running``, also one that has begun. Returns whether it was there.

        With ``running`` nobody waits for it any more; without, a newer message of its session takes its seat.
        """
        if ticket := self._waiting.get(key):
            seat = self._seats.get(ticket.request.session or "")
            self._forget(ticket)
            if seat is not None and ticket.request.session and not running:
                self._seats[ticket.request.session] = seat
            return True
        if not running or key not in self._running:
            return False
        del self._running[key], self._stepped[key]
        return True

    @property
    def running(self) -> list[R]:
        """The rows under way."""
        return list(self._running.values())

    @property
    def idle(self) -> bool:
        """Nothing to begin and nothing to step."""
        return not self._waiting and not self._running

    @property
    def depth(self) -> tuple[int, int]:
        """How many wait, how many run."""
        return len(self._waiting), len(self._running)


def _order(work: Work) -> tuple[int, int]:
    return RANK[work.request.priority], work.key


def _name(work: Work) -> str:
    return work.request.session or work.request.owner

"""Who runs next: pure policy; knows no torch, no clock, no picture, no process.

A *ticket* is a decoded request that waits; a *row* is a ticket that the engine has begun. One forward takes rows of one
bucket. The order is realtime before run before queue, oldest first, and buckets take turns.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Hashable, Sequence
from typing import Generic, Protocol, TypeVar

from lcm_rt.types import GenerateRequest, Priority

RANK: dict[Priority, int] = {"realtime": 0, "run": 1, "queue": 2}

PATIENCE = 8
"""Nothing starves: a bucket that was passed over this many times goes first, whatever its priority, and a ticket rises
by one rank whenever this many others were admitted before it."""


class Ticket(Protocol):
    """What the scheduler reads of a waiting request."""

    @property
    def key(self) -> int: ...
    @property
    def request(self) -> GenerateRequest: ...


class Row(Ticket, Protocol):
    """What the scheduler reads of a begun request: ``done`` turns true after its last step, ``area`` is its size."""

    @property
    def bucket(self) -> Hashable: ...
    @property
    def area(self) -> int: ...
    @property
    def done(self) -> bool: ...


T = TypeVar("T", bound=Ticket)
R = TypeVar("R", bound=Row)


class Scheduler(Generic[T, R]):
    """Waiting tickets and running rows.

    Args:
        max_rows: how many rows run at a time, over all buckets; also the largest batch.
        max_area: how large the rows of one forward may be together, but for a single one.
    """

    def __init__(self, max_rows: int, max_area: float = math.inf) -> None:
        self.max_rows = max_rows
        self._max_area = max_area
        self._waiting: dict[int, T] = {}
        self._running: dict[int, R] = {}
        self._passed_over: dict[Hashable, int] = {}
        self._stepped: dict[int, int] = {}  # by row: the number of the last forward that it was in
        self._forwards = 0
        self._admitted = 0
        self._admitted_before: dict[int, int] = {}  # by ticket: how many had been admitted when it came
        self._seats: dict[str, int] = {}  # by session: the key of the first message of its present wait

    def add(self, ticket: T) -> None:
        """Let a decoded request wait for its turn. A message that replaces another of its session has its seat."""
        if self.idle:
            self._seats.clear()  # of sessions that left while nothing of theirs was here
        self._waiting[ticket.key] = ticket
        self._admitted_before[ticket.key] = self._admitted
        if ticket.request.session is not None:
            self._seats.setdefault(ticket.request.session, ticket.key)

    def admit(self) -> list[T]:
        """The tickets to begin now; each of them is either started or forgotten by the caller.

        A session has one running row at a time: its next message waits, and may still be replaced by a newer one. One
        row is kept free for realtime, so that long runs cannot keep it waiting, and one for other owners.
        """
        if not self._waiting:
            return []
        running = [row.request for row in self._running.values()]
        busy = {request.session for request in running}
        owned = Counter(request.owner for request in running)
        others = sum(request.priority != "realtime" for request in running)
        share = max(self.max_rows - 1, 1)
        admitted: list[T] = []
        waiting = list(self._waiting.values())
        while waiting and len(running) + len(admitted) < self.max_rows:
            ticket = min(waiting, key=lambda ticket: self._turn(ticket, owned))
            waiting.remove(ticket)
            request = ticket.request
            if request.session is not None and request.session in busy:
                continue
            if request.owner and owned[request.owner] >= share:
                continue
            if request.priority != "realtime" and others >= share:
                continue
            others += request.priority != "realtime"
            owned[request.owner] += bool(request.owner)
            busy.add(request.session)
            admitted.append(ticket)
        for ticket in admitted:
            self._forget(ticket)
        self._admitted += len(admitted)
        return admitted

    def _turn(self, ticket: T, owned: Counter[str]) -> tuple[int, int, int]:
        """Whose turn it is, lower first: by rank, then who has fewest rows, then who came first."""
        passed_over = self._admitted - self._admitted_before[ticket.key]
        rank = max(0, RANK[ticket.request.priority] - passed_over // PATIENCE)
        seat = self._seats.get(ticket.request.session or "", ticket.key)
        return rank, owned[ticket.request.owner], seat

    def _forget(self, ticket: T) -> None:
        del self._waiting[ticket.key], self._admitted_before[ticket.key]
        if ticket.request.session is not None:
            self._seats.pop(ticket.request.session, None)

    def start(self, row: R) -> None:
        """An admitted ticket has become a row; it joins the next forward of its bucket."""
        self._running[row.key] = row

    def schedule(self) -> list[R]:
        """The rows of the next forward: all of one bucket, or those that waited longest for one; empty if none runs."""
        buckets: dict[Hashable, list[R]] = {}
        for row in self._running.values():
            buckets.setdefault(row.bucket, []).append(row)
        if not buckets:
            return []

        def urgency(bucket: Hashable) -> tuple[bool, int, int, int]:
            passed_over = self._passed_over.get(bucket, 0)
            rank, oldest = min(map(_order, buckets[bucket]))
            return passed_over < PATIENCE, rank, -passed_over, oldest

        chosen = min(buckets, key=urgency)
        self._passed_over = {b: self._passed_over.get(b, 0) + 1 for b in buckets if b != chosen}
        batch = buckets[chosen]
        if sum(row.area for row in batch) > self._max_area:
            batch.sort(key=lambda row: (self._stepped.get(row.key, 0), _order(row)))
            batch = batch[: max(1, int(self._max_area // batch[0].area))]  # rows of a bucket are of one size
        self._forwards += 1
        self._stepped |= dict.fromkeys((row.key for row in batch), self._forwards)
        return batch

    def retire(self, batch: Sequence[R]) -> list[R]:
        """Remove and return the rows of ``batch`` that have no step left; their sessions may begin the next."""
        done = [row for row in batch if row.done]
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
        self._stepped.pop(key, None)
        return running and self._running.pop(key, None) is not None

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


def _order(ticket: Ticket) -> tuple[int, int]:
    return RANK[ticket.request.priority], ticket.key

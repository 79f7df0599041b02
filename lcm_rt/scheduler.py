"""Who runs next: pure policy; knows no torch, no clock, no picture, no process.

A *ticket* is a decoded request that waits; a *row* is a ticket that the engine has begun. One forward takes rows of one
bucket. The order is realtime before run before queue, oldest first, and buckets take turns.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Generic, Protocol, TypeVar

from lcm_rt.types import GenerateRequest, Priority

RANK: dict[Priority, int] = {"realtime": 0, "run": 1, "queue": 2}

PATIENCE = 8
"""A bucket that was passed over this many times in a row goes first, whatever its priority, so that none starves."""


class Ticket(Protocol):
    """What the scheduler reads of a waiting request."""

    @property
    def key(self) -> int: ...
    @property
    def request(self) -> GenerateRequest: ...


class Row(Ticket, Protocol):
    """What the scheduler reads of a begun request; ``done`` turns true after its last step."""

    @property
    def bucket(self) -> Hashable: ...
    @property
    def done(self) -> bool: ...


T = TypeVar("T", bound=Ticket)
R = TypeVar("R", bound=Row)


class Scheduler(Generic[T, R]):
    """Waiting tickets and running rows.

    Args:
        max_rows: how many rows run at a time, over all buckets; also the largest batch.
    """

    def __init__(self, max_rows: int) -> None:
        self.max_rows = max_rows
        self._waiting: dict[int, T] = {}
        self._running: dict[int, R] = {}
        self._passed_over: dict[Hashable, int] = {}

    def add(self, ticket: T) -> None:
        """Let a decoded request wait for its turn."""
        self._waiting[ticket.key] = ticket

    def admit(self) -> list[T]:
        """The tickets to begin now; each of them is either started or forgotten by the caller.

        A session has one running row at a time: its next message waits, and may still be replaced by a newer one.
        """
        busy = {row.request.session for row in self._running.values()}
        admitted: list[T] = []
        for ticket in sorted(self._waiting.values(), key=_order):
            if len(self._running) + len(admitted) >= self.max_rows:
                break
            session = ticket.request.session
            if session is not None:
                if session in busy:
                    continue
                busy.add(session)
            admitted.append(ticket)
            del self._waiting[ticket.key]
        return admitted

    def start(self, row: R) -> None:
        """An admitted ticket has become a row; it joins the next forward of its bucket."""
        self._running[row.key] = row

    def schedule(self) -> list[R]:
        """The rows of the next forward: all of one bucket; empty when nothing runs."""
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
        return buckets[chosen]

    def retire(self, batch: Sequence[R]) -> list[R]:
        """Remove and return the rows of ``batch`` that have no step left; their sessions may begin the next."""
        done = [row for row in batch if row.done]
        for row in done:
            self._running.pop(row.key, None)
        return done

    def drop(self, key: int, *, running: bool = False) -> bool:
        """Forget a request that waits or, if ``running``, also one that has begun. Returns whether it was there."""
        if self._waiting.pop(key, None):
            return True
        return running and self._running.pop(key, None) is not None

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

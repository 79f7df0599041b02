"""How long a forward takes by its number of rows, as measured while serving; knows no clock and no device.

It learns from whatever it is told, so it has to bear a first call that compiles, a machine that stalls, and a server
that becomes three times as fast when its networks are compiled.
"""

from __future__ import annotations

import bisect
import math
import re
from collections import deque
from collections.abc import Hashable, Mapping
from statistics import median
from typing import Any

from lcm_rt.errors import InputError

TRUSTED = 3
"""Measurements before a number of rows is known: one may have been the first, or fallen into a stall."""

KEPT = 7
"""The estimate is the median of so many: up to three stalls among them do no harm, and four make the new normal."""

SHIFT = 1.5
"""If an estimate moves by this factor, the server has changed, and what is known of other numbers of rows is void."""

UNSEEN = 10_000
"""What was not measured for so many forwards of its bucket is forgotten, so that a mistake heals."""

PAYS = 1.02
"""A batch that is within this factor of the best time per row is as good as the best."""

MAX_BUCKETS = 64

_ROWS = re.compile(r"[1-9][0-9]{0,3}", re.ASCII)


class _Times:
    """Seconds by number of rows, of one kind of work in one bucket."""

    def __init__(self) -> None:
        self._measured: dict[int, deque[float]] = {}
        self._seen: dict[int, int] = {}  # by number of rows: when it was last measured
        self._count = 0
        self.known: dict[int, float] = {}  # by number of rows, in order

    def observe(self, rows: int, seconds: float) -> None:
        self._count += 1
        self._seen[rows] = self._count
        measured = self._measured.setdefault(rows, deque(maxlen=KEPT))
        measured.append(seconds)
        if len(measured) < TRUSTED:
            return
        before, now = self.known.get(rows), median(measured)
        if before is not None and not before / SHIFT <= now <= before * SHIFT:
            self._measured, self._seen, self.known = {rows: measured}, {rows: self._count}, {}
        for unseen in [n for n, when in self._seen.items() if self._count - when > UNSEEN]:
            del self._measured[unseen], self._seen[unseen]
            self.known.pop(unseen, None)
        self.known = dict(sorted((self.known | {rows: now}).items()))

    def seconds(self, rows: int) -> float | None:
        """On a straight line through known numbers of rows; beyond them between the same and in proportion."""
        if not self.known or rows in self.known:
            return self.known.get(rows)
        numbers = list(self.known)
        if len(numbers) == 1:
            return self.known[numbers[0]] * rows / numbers[0]
        place = min(max(bisect.bisect(numbers, rows), 1), len(numbers) - 1)
        low, high = numbers[place - 1 : place + 1]
        line = self.known[low] + (self.known[high] - self.known[low]) * (rows - low) / (high - low)
        if low < rows < high:
            return line
        same = self.known[low if rows < low else high]
        in_proportion = same * rows / (low if rows < low else high)
        return sorted((same, line, in_proportion))[1]

    def enough(self, most: int) -> int:
        if not self.known:
            return most
        each = [(self.seconds(rows) or 0.0) / rows for rows in range(1, most + 1)]
        best = min(each)
        enough = next(rows for rows, seconds in enumerate(each, 1) if seconds <= PAYS * best)
        # Some numbers of rows are slower than larger ones, for they are filled up: those up to twice as many are tried.
        untried = (rows for rows in range(enough + 1, min(2 * enough, most) + 1) if rows not in self.known)
        return next(untried, enough)


class StepTable:
    """Seconds of a forward, and of making pictures of rows that are done (VAE), by bucket and number of rows.

    Of more than 64 buckets, those longest unmeasured are forgotten.
    """

    def __init__(self) -> None:
        self._steps: dict[Hashable, _Times] = {}  # longest unmeasured first
        self._finishes: dict[Hashable, _Times] = {}

    def observe_step(self, bucket: Hashable, rows: int, seconds: float) -> None:
        """A forward of ``rows`` rows, 1 or more, took so long. What cannot be a time is passed over."""
        _observe(self._steps, bucket, rows, seconds)

    def observe_finish(self, bucket: Hashable, rows: int, seconds: float) -> None:
        """Pictures of ``rows`` rows took so long to make. What cannot be a time is passed over."""
        _observe(self._finishes, bucket, rows, seconds)

    def step(self, bucket: Hashable, rows: int) -> float | None:
        """What a forward of ``rows`` rows, 1 or more, will take in seconds; None if nothing is known of the bucket."""
        times = self._steps.get(bucket)
        return times.seconds(rows) if times else None

    def finish(self, bucket: Hashable, rows: int) -> float | None:
        """What it will take in seconds to make pictures of ``rows`` rows; None if nothing is known of the bucket."""
        times = self._finishes.get(bucket)
        return times.seconds(rows) if times else None

    def enough(self, bucket: Hashable, most: int) -> int:
        """How many rows of up to ``most`` make a forward as good as any: with more, the time per row hardly falls.

        What was not tried yet is tried: then it is one or a few more, and ``most`` as long as nothing is known.
        """
        times = self._steps.get(bucket)
        return times.enough(most) if times else most

    def export(self) -> list[dict[str, Any]]:
        """What is known, as plain data: for each bucket ``{"bucket": ..., "step": {"1": 0.006}, "finish": {...}}``."""
        buckets = self._steps | self._finishes
        return [
            {
                "bucket": list(bucket) if isinstance(bucket, tuple) else bucket,
                **{
                    name: {str(rows): seconds for rows, seconds in times[bucket].known.items()}
                    if bucket in times
                    else {}
                    for name, times in (("step", self._steps), ("finish", self._finishes))
                },
            }
            for bucket in buckets
        ]

    @classmethod
    def given(cls, entries: object) -> StepTable:
        """A table of what ``export`` gave, or of what was measured elsewhere; a bucket's list becomes a tuple.

        Raises: InputError: it is not in that form.
        """
        table = cls()
        if not isinstance(entries, list) or not all(isinstance(entry, Mapping) for entry in entries):
            raise InputError("table", "should be a list of {bucket, step, finish}")
        for entry in entries:
            bucket = _bucket(entry.get("bucket"))
            for name, times in (("step", table._steps), ("finish", table._finishes)):
                given = entry.get(name, {})
                if not isinstance(given, Mapping):
                    raise InputError(name, "should be seconds by number of rows")
                for rows, seconds in given.items():
                    if not _ROWS.fullmatch(str(rows)) or not _is_time(seconds):
                        raise InputError(name, f"should be seconds by number of rows, not {rows!r}: {seconds!r}")
                    for _ in range(TRUSTED):
                        _observe(times, bucket, int(rows), seconds)
        return table


def _bucket(value: object) -> Hashable:
    bucket = tuple(value) if isinstance(value, list) else value
    try:
        hash(bucket)
    except TypeError:
        raise InputError("bucket", "should be a name, or a list of names and numbers") from None
    return bucket


def _is_time(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < math.inf


def _observe(times: dict[Hashable, _Times], bucket: Hashable, rows: int, seconds: float) -> None:
    if not _is_time(seconds):
        return  # a clock was set, or a device's events are lost
    times[bucket] = found = times.pop(bucket, None) or _Times()
    if len(times) > MAX_BUCKETS:
        del times[next(iter(times))]
    found.observe(rows, seconds)

"""From what clients saw to figures: delays, freshness, fairness, waste. ``benchmarks/README.md`` defines each.

A ``Log`` is what one client sent and got; the rest is arithmetic.
"""

from __future__ import annotations

import asyncio
import bisect
import itertools
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass(slots=True)
class Log:
    """What one client sent and got; times are seconds of the performance counter."""

    trace: str = ""
    sent_at: list[float] = field(default_factory=list)  # by message number: when it was due, if it went out late
    frames: list[tuple[float, int]] = field(default_factory=list)  # arrival, message number
    timings: list[Mapping[str, float]] = field(default_factory=list)  # the server's own, of each frame
    late: list[float] = field(default_factory=list)  # how far the generator itself lagged behind the trace
    errors: Counter[str] = field(default_factory=Counter)
    warmed: int = 0
    notices: int = 0
    failed: int = 0  # messages that were answered with an error
    bytes_sent: int = 0
    bytes_received: int = 0
    picture: dict[str, Any] = field(default_factory=dict)
    settled: int = -1  # newest message number that was answered, with a picture or an error
    progressed: asyncio.Event = field(default_factory=asyncio.Event)
    is_open: bool = True
    reason: str = ""  # of the latest error


Progress = Callable[[float, Sequence[Log]], None]
"""Is told now and then how many seconds of the trace are over, and what was seen so far."""


def percentile(ordered: Sequence[float], percent: float) -> float:
    """Nearest rank, of sorted values; there is at least one."""
    return ordered[min(len(ordered) - 1, int(len(ordered) * percent / 100))]


def spread(seconds: Iterable[float]) -> dict[str, float] | None:
    """p50, p95, p99 and the largest, in milliseconds; None of nothing."""
    ordered = sorted(seconds)
    if not ordered:
        return None
    figures = {f"p{percent}": percentile(ordered, percent) for percent in (50, 95, 99)} | {"max": ordered[-1]}
    return {name: round(1e3 * value, 2) for name, value in figures.items()}


def delays(log: Log) -> list[float]:
    """For each message that was shown, seconds from when it was due to the first frame that shows it or a newer one."""
    found: list[float] = []
    for arrived_at, number in log.frames:
        # Frames come in order, so that whatever is not yet shown is shown by this one.
        found += [arrived_at - sent_at for sent_at in log.sent_at[len(found) : number + 1]]
    return found


def staleness(log: Log) -> list[float]:
    """For each frame, the age in seconds of the message that it shows."""
    return [arrived_at - log.sent_at[number] for arrived_at, number in log.frames]


def gaps(log: Log) -> list[float]:
    """Seconds between a client's consecutive frames."""
    return [after[0] - before[0] for before, after in itertools.pairwise(log.frames)]


def overtaken(log: Log) -> int:
    """Frames that showed what was no longer wanted: when they came, a newer message was due already."""
    return sum(bisect.bisect_right(log.sent_at, arrived_at) > number + 1 for arrived_at, number in log.frames)


def jain(shares: Sequence[float]) -> float | None:
    """Jain's fairness index (Jain, Chiu and Hawe 1984): 1 is equal shares, 1/n all for one of n; None without any."""
    squares = sum(share * share for share in shares)
    return round(sum(shares) ** 2 / (len(shares) * squares), 4) if squares else None


def fairness(logs: Iterable[Log]) -> float | None:
    """Jain's index of each client's frames per message: who typed more gets more frames without being favoured."""
    return jain([len(log.frames) / len(log.sent_at) for log in logs if log.sent_at])


def describe(logs: Sequence[Log], begun_at: float, seconds: float) -> dict[str, Any]:
    """The figures of some clients together, in a trace of so many seconds that began at ``begun_at``."""
    end_at = begun_at + seconds
    in_time = sum(arrived_at <= end_at for log in logs for arrived_at, _ in log.frames)
    sent = sum(len(log.sent_at) for log in logs)
    frames = sum(len(log.frames) for log in logs)
    shown = [delay for log in logs for delay in delays(log)]
    stale = sum(map(overtaken, logs))
    return {
        "sent": sent,
        "frames": frames,
        "superseded": sent - frames - sum(log.failed for log in logs),
        "unshown": sent - len(shown),
        "overtaken": round(stale / frames, 4) if frames else None,
        "errors": dict(sum((log.errors for log in logs), Counter[str]())),
        "frames_per_s": round(in_time / seconds, 2),
        "input_to_frame_ms": spread(shown),
        "staleness_ms": spread(age for log in logs for age in staleness(log)),
        "frame_gap_ms": spread(gap for log in logs for gap in gaps(log)),
        "fairness": fairness(logs),
        "bytes_sent": sum(log.bytes_sent for log in logs),
        "bytes_received": sum(log.bytes_received for log in logs),
    }


def describe_turns(logs: Sequence[Log]) -> dict[str, Any] | None:
    """Closed loop only: where the round trip goes. None where the server tells no timings."""
    timings = [timings for log in logs for timings in log.timings]
    if not timings or not all("total" in stages for stages in timings):
        return None
    trips = [trip for log in logs for trip in staleness(log)]
    names = sorted({name for stages in timings for name in stages} - {"total"})
    return {
        "round_trip_ms": spread(trips),
        "engine_ms": spread(stages["total"] - stages.get("queue", 0.0) for stages in timings),
        "overhead_ms": spread(trip - stages["total"] for trip, stages in zip(trips, timings, strict=True)),
        "stages_ms": {name: spread(stages.get(name, 0.0) for stages in timings) for name in names},
    }


Samples = Mapping[tuple[str, tuple[tuple[str, str], ...]], float]
"""Prometheus samples: by name and sorted labels."""


def samples(text: str) -> Samples:
    """What a server counts, out of its ``/metrics``."""
    from prometheus_client.parser import text_string_to_metric_families

    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def work(before: Samples, after: Samples, frames: int) -> dict[str, Any]:
    """What the server did meanwhile, by its own counters; ``frames`` came to the clients.

    A picture that was made and that nobody got is wasted work. Nothing else may have used the server.
    """

    def grown(name: str, *by: str) -> Counter[tuple[str, ...]]:
        """By how much a counter grew, by some of its labels."""
        found = Counter[tuple[str, ...]]()
        for (sample, labels), value in after.items():
            if sample == name:
                labelled = dict(labels)
                found[tuple(labelled.get(label, "") for label in by)] += round(value - before.get((sample, labels), 0))
        return +found

    pictures, drawn = grown("lcm_rt_pictures_total").total(), grown("lcm_rt_batch_rows_count").total()
    undelivered = max(0, pictures - frames)
    caches: dict[str, dict[str, int]] = {}
    for (cache, outcome), count in sorted(grown("lcm_rt_cache_lookups_total", "cache", "outcome").items()):
        caches.setdefault(cache, {})[outcome] = count
    return {
        "messages": grown("lcm_rt_messages_total").total(),
        "superseded": grown("lcm_rt_superseded_total").total(),
        "pictures": pictures,
        "drawn": drawn,  # the others were made before
        "undelivered": undelivered,
        "wasted": round(undelivered / pictures, 4) if pictures else None,
        "rows_together": round(grown("lcm_rt_batch_rows_sum").total() / drawn, 2) if drawn else None,
        "forwards": {way: count for (way,), count in sorted(grown("lcm_rt_forwards_total", "way").items())},
        "caches": caches,
        "errors": {code: count for (code,), count in sorted(grown("lcm_rt_errors_total", "code").items())},
        "restarts": grown("lcm_rt_engine_restarts_total").total(),
    }

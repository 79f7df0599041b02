"""What the server counts, as Prometheus metrics on an instance; there is no global registry."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

_SECONDS = (0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1, 2.5, 5, 10, 30)


class Metrics:
    """One server's counters; each attribute is a metric."""

    def __init__(self) -> None:
        self._registry = r = CollectorRegistry()
        self.sessions = Gauge("lcm_rt_sessions", "Realtime connections now open", registry=r)
        self.messages = Counter("lcm_rt_messages", "Realtime messages received", registry=r)
        self.superseded = Counter(
            "lcm_rt_superseded", "Realtime messages dropped for a newer one, by their sessions", registry=r
        )
        self.pictures = Counter("lcm_rt_pictures", "Pictures made", ["model", "priority"], registry=r)
        self.errors = Counter("lcm_rt_errors", "Requests that ended in an error", ["code"], registry=r)
        self.seconds = Histogram(
            "lcm_rt_stage_seconds", "Seconds per picture and stage", ["stage"], buckets=_SECONDS, registry=r
        )
        self.batch = Histogram(
            "lcm_rt_batch_rows",
            "Most rows that a forward of a picture had",
            buckets=(1, 2, 3, 4, 6, 8, 12, 16),
            registry=r,
        )
        self.pending = Gauge("lcm_rt_pending", "Requests at the engine", registry=r)
        self.restarts = Counter("lcm_rt_engine_restarts", "Engine processes started again", registry=r)
        self.ready = Gauge("lcm_rt_ready", "1 while an engine can answer", registry=r)
        self.model_bytes = Gauge("lcm_rt_model_bytes", "Bytes that the weights of the loaded models take", registry=r)
        self.flagged = Counter("lcm_rt_flagged", "Pictures that the safety checker blacked out", registry=r)
        self.webhooks = Counter("lcm_rt_webhooks", "Tries to deliver webhooks", ["outcome"], registry=r)
        self.file_bytes = Gauge("lcm_rt_file_bytes", "Bytes of answered pictures on disk", registry=r)
        self.cache_lookups = Counter(
            "lcm_rt_cache_lookups", "Look-ups of what was made before", ["cache", "outcome"], registry=r
        )
        self.forwards = Counter("lcm_rt_forwards", "Forwards of the UNets, by the way they ran", ["way"], registry=r)

    def add(self, counts: Iterable[Sequence[Any]]) -> None:
        """Add what an engine process counted: rows of "cache", its name, "hit" or "miss", and a number, or of
        "forward", its way, and a number."""
        for kind, *labels, number in counts:
            {"cache": self.cache_lookups, "forward": self.forwards}[kind].labels(*labels).inc(number)

    def value(self, name: str, **labels: str) -> float:
        """The present value of one sample, such as ``lcm_rt_messages_total``; 0 if nothing was counted."""
        return self._registry.get_sample_value(name, labels) or 0.0

    def render(self) -> bytes:
        """The text exposition format."""
        return generate_latest(self._registry)

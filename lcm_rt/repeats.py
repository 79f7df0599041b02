"""Finished pictures, for those who ask for exactly the same again; knows no client, and no way to make a picture.

A picture is decided by its request and its model's weights alone, so one that was made need not be made twice. What is
kept is kept for its owner: how fast an answer comes would tell others what somebody has asked for.
"""

from __future__ import annotations

import dataclasses

from lcm_rt.cache import Cache, content_key
from lcm_rt.metrics import Metrics
from lcm_rt.types import GenerateRequest, GenerateResult

MAX_FILE_BYTES = 128 * 2**10
"""Of a request's picture and mask. They are hashed in the event loop: 0.1 to 0.3 ms, which everybody waits for."""

_BESIDE = {"image", "mask", "previews", "priority", "session", "owner"}
_DECIDING = [field.name for field in dataclasses.fields(GenerateRequest) if field.name not in _BESIDE]


class Repeats:
    """The results of the requests that came last.

    Args:
        max_bytes: of their pictures' files; 0 keeps none, and costs nothing.
    """

    def __init__(self, max_bytes: int, metrics: Metrics) -> None:
        self._is_on = max_bytes > 0
        counters = {outcome: metrics.cache_lookups.labels("repeat", outcome) for outcome in ("hit", "miss")}
        self._kept: Cache[list[GenerateResult]] = Cache(
            max_bytes,
            lambda results: sum(len(result.image) for result in results),
            lambda outcome: counters[outcome].inc(),
        )

    def key(self, request: GenerateRequest, *, count: int, owner: str, load: int) -> bytes | None:
        """What the results of ``request`` are kept under, or None where they are not.

        Args:
            count: how many pictures, with the seeds that follow.
            owner: whose it is; that of ``request`` is for fairness alone.
            load: which of its model's loads paints it; another may have found other weights.
        """
        if not self._is_on or len(request.image or b"") + len(request.mask or b"") > MAX_FILE_BYTES:
            return None
        facts = [getattr(request, name) for name in _DECIDING]
        return content_key((owner, load, count, facts), request.image, request.mask)

    def find(self, key: bytes) -> list[GenerateResult] | None:
        """The results under ``key``, as they were made."""
        return self._kept.get(key)

    def keep(self, key: bytes, results: list[GenerateResult]) -> None:
        """Put results under ``key``."""
        self._kept.put(key, results)

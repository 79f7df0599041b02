"""Values that are dear to make, kept while there is room; knows nothing of what they are."""

from __future__ import annotations

import hashlib
import threading
from collections import Counter, OrderedDict
from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

ENTRY_BYTES = 1024  # of an entry beside its value: the key, and Python's objects around both

Value = TypeVar("Value")

Counts = Counter[tuple[str, ...]]
"""How often things happened since the process began, such as ("cache", "prompt", "hit")."""


def content_key(facts: object, *files: bytes | None) -> bytes:
    """A key (16 bytes) of all that decides a value: ``facts``, plain data told apart by ``repr``, and whole files."""
    # The lengths keep the end of one file apart from the beginning of the next.
    lengths = [None if file is None else len(file) for file in files]
    # Of a processor that has instructions for it, SHA-256 takes half of BLAKE2's time: 30 us for a sketch of 30 kB.
    key = hashlib.sha256(repr((facts, lengths)).encode())
    for file in files:
        key.update(file or b"")
    return key.digest()[:16]


class Gains:
    """What ``counts`` gained since the last call. Nothing is written to it: other threads go on counting."""

    def __init__(self, counts: Counts) -> None:
        self._counts = counts
        self._told: Counts = Counter()

    def __call__(self) -> Counts:
        now = Counter(self._counts)
        gained, self._told = now - self._told, now
        return gained


def tally(counts: Counts, name: str) -> Callable[[str], None]:
    """What counts the look-ups of the cache ``name`` in ``counts``."""

    def count(outcome: str) -> None:
        counts["cache", name, outcome] += 1

    return count


class Cache(Generic[Value]):
    """The values that were used last, bounded by bytes; any thread may ask. Whoever gets one must not change it.

    Args:
        max_bytes: what all values may take, with ``ENTRY_BYTES`` for each. A larger one is not kept.
        size: the bytes of a value.
        count: is told of each look-up, "hit" or "miss", by one thread at a time.
    """

    def __init__(self, max_bytes: int, size: Callable[[Value], int], count: Callable[[str], None]) -> None:
        self._max_bytes = max_bytes
        self._size = size
        self._count = count
        self._lock = threading.Lock()
        self._kept: OrderedDict[Hashable, tuple[Value, int]] = OrderedDict()
        self.bytes = 0

    def get(self, key: Hashable) -> Value | None:
        """The value that is kept under ``key``."""
        with self._lock:
            entry = self._kept.get(key)
            self._count("miss" if entry is None else "hit")
            if entry is None:
                return None
            self._kept.move_to_end(key)
            return entry[0]

    def put(self, key: Hashable, value: Value) -> None:
        """Keep ``value``; those longest unused make room."""
        size = self._size(value) + ENTRY_BYTES
        if size > self._max_bytes:
            return
        with self._lock:
            if key in self._kept:
                self.bytes -= self._kept.pop(key)[1]
            self._kept[key] = (value, size)
            self.bytes += size
            while self.bytes > self._max_bytes:
                self.bytes -= self._kept.popitem(last=False)[1][1]

    def get_or_make(self, key: Hashable, make: Callable[[], Value]) -> Value:
        """The value under ``key``; where there is none, what ``make`` gives, which is kept.

        Threads that miss it at the same time all make it: they never wait for each other.
        """
        value = self.get(key)
        if value is None:
            value = make()
            self.put(key, value)
        return value

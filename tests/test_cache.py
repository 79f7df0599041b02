"""The one cache behind prompts, pictures, canvases and repeats."""

from __future__ import annotations

import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lcm_rt.cache import ENTRY_BYTES, Cache, content_key, tally


def cache_of(entries: int, size: int = 100) -> tuple[Cache[bytes], Counter]:
    """A cache with room for so many values of ``size`` bytes."""
    counts: Counter = Counter()
    return Cache(entries * (size + ENTRY_BYTES), len, tally(counts, "it")), counts


def test_a_value_is_made_once_and_counted() -> None:
    cache, counts = cache_of(2)
    made = [cache.get_or_make("a", lambda number=number: b"%d" % number) for number in range(3)]
    assert made == [b"0", b"0", b"0"]
    assert counts == {("cache", "it", "miss"): 1, ("cache", "it", "hit"): 2}


def test_the_longest_unused_go_when_there_is_no_room() -> None:
    cache, _ = cache_of(2)
    cache.put("a", bytes(100))
    cache.put("b", bytes(100))
    assert cache.get("a")
    cache.put("c", bytes(100))
    assert [key for key in "abc" if cache.get(key)] == ["a", "c"]
    cache.put("d", bytes(200))  # one large value takes the room of two
    assert [key for key in "acd" if cache.get(key)] == ["d"]


def test_a_value_that_is_larger_than_all_pushes_nothing_out() -> None:
    cache, _ = cache_of(1)
    cache.put("a", bytes(100))
    assert cache.get_or_make("b", lambda: bytes(101)) == bytes(101)
    assert cache.get("a") and not cache.get("b")


def test_a_cache_without_room_keeps_nothing() -> None:
    cache, counts = cache_of(0)
    assert [cache.get_or_make("a", lambda: b"x") for _ in range(2)] == [b"x", b"x"]
    assert counts == {("cache", "it", "miss"): 2}


def test_what_cannot_be_made_is_not_kept() -> None:
    cache, counts = cache_of(1)
    with pytest.raises(ZeroDivisionError):
        cache.get_or_make("a", lambda: bytes(1 // 0))
    assert cache.get_or_make("a", lambda: b"x") == b"x"
    assert counts["cache", "it", "miss"] == 2


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 300))))
def test_it_never_takes_more_than_it_may(puts: list[tuple[int, int]]) -> None:
    cache, _ = cache_of(3)
    for key, size in puts:
        cache.put(key, bytes(size))
        held = {key: value for key in range(6) if (value := cache.get(key)) is not None}
        assert cache.bytes == sum(len(value) + ENTRY_BYTES for value in held.values()) <= 3 * (100 + ENTRY_BYTES)
        assert len(held.get(key, bytes(size))) == size


def test_threads_that_miss_do_not_wait_for_each_other() -> None:
    cache, counts = cache_of(2)
    both = threading.Barrier(2, timeout=20)

    def make() -> bytes:
        both.wait()  # would time out if the second one waited for the first
        return b"x"

    with ThreadPoolExecutor(2) as pool:
        assert [*pool.map(lambda _: cache.get_or_make("a", make), range(2))] == [b"x", b"x"]
    assert cache.bytes == 1 + ENTRY_BYTES
    assert counts == {("cache", "it", "miss"): 2}


def test_keys_of_contents() -> None:
    keys = [
        content_key(""),
        content_key(("",)),
        content_key("a"),
        content_key("\ud800"),  # half a character, as text from a client may hold
        content_key("", b""),
        content_key("", None),
        content_key("", b"a"),
        content_key("", None, b"a"),
        content_key("", b"a", None),
        content_key("", b"ab", b"c"),
        content_key("", b"a", b"bc"),
        content_key((1, 1.0)),
        content_key((1.0, 1)),
    ]
    assert len({*keys}) == len(keys)
    assert {len(key) for key in keys} == {16}
    assert content_key((1, "a"), b"x") == content_key((1, "a"), b"x")

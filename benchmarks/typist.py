"""Writes the recorded trace that ships with the package: two minutes of one person who types prompts.

    python benchmarks/typist.py > lcm_rt/bench/recorded.jsonl

Nobody was recorded: the times and slips are drawn from what is known of people who type. The gaps between keys are
log-normal, longer before a word and when a key is pressed twice; now and then a neighbouring key is hit,
noticed a little later and taken back with quick backspaces; there are pauses to think within a sentence and longer ones
to look at the picture; and the end of a prompt is changed more often than all of it.
"""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Iterator

SECONDS = 120.0
KEY_S = 0.135
"""Median between two keys within a word: some 50 words a minute with the pauses between them."""
WORD_S = 0.22
REPEAT_S = 0.19
BACKSPACE_S = 0.085
NOTICE_S = 0.35
THINK_S = (0.6, 1.8)
LOOK_S = (2.0, 5.5)
SLIP = 0.035
"""How often a key misses."""

ROWS = ("qwertyuiop", "asdfghjkl", "zxcvbnm")

PROMPTS = (
    ("a quiet lake under mountains", " at sunset", " in the first snow", " with a small wooden boat"),
    ("old lighthouse on a cliff", ", stormy sea", ", calm sea at dawn"),
    ("forest path in autumn", " with fog between the trees", " after the rain"),
    ("a golden field of wheat", " below dark clouds", " and a single tree"),
    ("desert dunes at night", ", a sky full of stars", ", the moon just rising"),
)


def gap(rng: random.Random, median: float, spread: float = 0.35) -> float:
    return rng.lognormvariate(0, spread) * median


def neighbour(rng: random.Random, key: str) -> str:
    """What is hit when ``key`` is missed; itself if it is no letter."""
    row = next((row for row in ROWS if key in row), "")
    at = row.find(key)
    around = row[max(0, at - 1) : at] + row[at + 1 : at + 2]
    return rng.choice(around) if around else key


def write(rng: random.Random, text: str, more: str) -> Iterator[tuple[float, str]]:
    """Add ``more`` to ``text``: how long each key takes, and what is in the field after it."""
    for at, key in enumerate(more):
        before = (text + more[:at])[-1:]
        if before == " " and rng.random() < 0.08:
            yield rng.uniform(*THINK_S), ""
        wait = gap(rng, WORD_S if before == " " else REPEAT_S if before == key else KEY_S)
        wrong = neighbour(rng, key)
        if wrong != key and rng.random() < SLIP:
            # Some go on for a key or two before they see it.
            hit = wrong + more[at + 1 : at + 1 + rng.choice((0, 0, 1, 2))]
            for end in range(1, len(hit) + 1):
                yield wait, text + more[:at] + hit[:end]
                wait = gap(rng, KEY_S)
            yield gap(rng, NOTICE_S), ""
            yield from erase(rng, text + more[:at] + hit, len(hit))
            wait = gap(rng, KEY_S)
        yield wait, text + more[: at + 1]


def erase(rng: random.Random, text: str, count: int) -> Iterator[tuple[float, str]]:
    """Take back the last ``count`` letters of ``text``."""
    for left in range(len(text) - 1, len(text) - count - 1, -1):
        yield gap(rng, BACKSPACE_S, 0.15), text[:left]


def sit(rng: random.Random) -> Iterator[tuple[float, str]]:
    """Somebody at a keyboard: how long after the last one each message is, and its text; without text, a pause."""
    while True:
        beginning, *ends = rng.choice(PROMPTS)
        yield from write(rng, "", beginning)
        rng.shuffle(ends)
        for number, end in enumerate(ends):
            yield from write(rng, beginning, end)
            yield rng.uniform(*LOOK_S), ""
            if number + 1 < len(ends):
                yield from erase(rng, beginning + end, len(end))
        # All of it is marked and typed over.


def record(seed: int) -> list[dict[str, float | str]]:
    """The messages of ``SECONDS`` seconds."""
    rng, now, messages = random.Random(seed), 0.0, list[dict[str, float | str]]()
    for wait, text in sit(rng):
        now += wait
        if now >= SECONDS:
            break
        if text:
            messages.append({"at": round(now, 3), "prompt": text})
    return messages


def main() -> None:
    about = "synthetic: made by benchmarks/typist.py, nobody was recorded"
    for line in ({"seconds": SECONDS, "about": about}, *record(seed=7)):
        sys.stdout.write(json.dumps(line) + "\n")


if __name__ == "__main__":
    main()

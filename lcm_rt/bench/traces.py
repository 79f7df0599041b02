"""When a client sends, and what: keystrokes, a camera, a recording of either."""

from __future__ import annotations

import functools
import io
import itertools
import math
import random
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson

from lcm_rt.errors import InputError

KEYS_PER_S = 6.0
BURST_S = (3.0, 7.0)
DUTY = 0.6
CAMERA_HZ = 30.0
FLOOD_HZ = 100.0

PROMPT = "sunset over a lake with mountains"

SIDE = 512
"""Of sketches, in px, where nobody says what size the pictures have."""

RECORDING = Path(__file__).with_name("recorded.jsonl")
"""Two minutes of somebody typing, made by ``benchmarks/typist.py``; its first line says how."""


@dataclass(frozen=True, slots=True)
class Key:
    """One message to be sent ``at`` seconds after the start."""

    at: float
    prompt: str
    seed: int


@dataclass(frozen=True, slots=True)
class Trace:
    """What one client does.

    Attributes:
        keys: its messages in the first so many seconds, in order of time; random numbers come from what it is given.
        redraws: with pictures, each message has another one. Someone who types does not redraw: the sketch stays.
        closed: the next message goes when the last is answered, whatever their times are.
    """

    name: str
    keys: Callable[[float, random.Random], Iterable[Key]]
    redraws: bool = True
    closed: bool = False


def prompts(rng: random.Random) -> Iterator[str]:
    """What one person has in the field after each keystroke; no two people type the same."""
    while True:
        text = " ".join(
            (
                rng.choice(("a", "the", "one", "some")),
                rng.choice(("quiet", "bright", "stormy", "old", "wide", "golden", "misty", "frozen")),
                rng.choice(("lake", "forest", "meadow", "desert", "house", "sea", "valley", "coast")),
                rng.choice(("under", "below", "before", "against")),
                rng.choice(("mountains", "hills", "clouds", "stars", "the moon", "the sun")),
                rng.choice(("at sunset", "at night", "at dawn", "in the morning", "at noon", "in winter")),
            )
        )
        yield from (text[:end] for end in range(1, len(text) + 1))


def seed_of(rng: random.Random) -> int:
    """A seed of one's own: two people who type the same word do not share the picture of it."""
    return rng.randrange(2**31)


def typing(seconds: float, rng: random.Random) -> list[Key]:
    """Bursts of keystrokes with pauses between them, entered at a random point."""
    texts, seed = prompts(rng), seed_of(rng)
    keys: list[Key] = []
    burst = rng.uniform(*BURST_S)
    now = -rng.uniform(0, burst / DUTY)
    while now < seconds:
        end = now + burst
        while now < end:
            if 0 <= now < seconds:
                keys.append(Key(now, next(texts), seed))
            now += rng.gammavariate(4, 1 / (4 * KEYS_PER_S))
        now = end + burst * (1 / DUTY - 1)
        burst = rng.uniform(*BURST_S)
    return keys


def flood(seconds: float, rng: random.Random) -> list[Key]:
    """Keystrokes without a pause, faster than any server draws."""
    texts, seed, phase = prompts(rng), seed_of(rng), rng.random()
    return [Key((n + phase) / FLOOD_HZ, next(texts), seed) for n in range(int(seconds * FLOOD_HZ))]


def camera(seconds: float, rng: random.Random) -> list[Key]:
    """A message at every tick of a camera; clients are out of step with each other."""
    phase, seed = rng.random(), seed_of(rng)
    return [Key((n + phase) / CAMERA_HZ, PROMPT, seed + n) for n in range(int(seconds * CAMERA_HZ))]


def single(seconds: float, rng: random.Random) -> Iterator[Key]:
    """Another seed with each message, without end: when it is sent, and how many are, is up to the answers."""
    seed = seed_of(rng)
    return (Key(0.0, PROMPT, seed + n) for n in itertools.count())


def idle(seconds: float, rng: random.Random) -> list[Key]:
    """Nothing."""
    return []


@dataclass(frozen=True, slots=True)
class Recording:
    """A recorded trace, played in a circle; every client enters it at a random point.

    The file is JSON lines. The first is ``{"seconds": 120.0, "about": "..."}``: how long it is, and whose it is. Each
    other one is a message, ``{"at": 0.31, "prompt": "a l"}``, in order of time, with a ``seed`` where that matters.
    """

    seconds: float
    keys: tuple[Key, ...]
    about: str

    def __call__(self, seconds: float, rng: random.Random) -> list[Key]:
        start, seed = rng.uniform(0, self.seconds), seed_of(rng)
        played = (
            Key(lap * self.seconds + key.at - start, key.prompt, (seed + key.seed) % 2**31)
            for lap in range(math.ceil(seconds / self.seconds) + 1)
            for key in self.keys
        )
        return [key for key in played if 0 <= key.at < seconds]


def read(path: Path) -> Recording:
    """A recorded trace. Raises: InputError: the file is not there, or is not one."""

    def wrong(number: int, message: str) -> InputError:
        return InputError("trace", f"{path}, line {number}: {message}")

    def number_of(line: int, fields: dict[str, Any], name: str, least: float, most: float) -> float:
        value = fields.get(name)
        if isinstance(value, bool) or not isinstance(value, int | float) or not least <= value <= most:
            raise wrong(line, f"{name} should be a number from {least:g} to {most:g}")
        return float(value)

    try:
        lines = path.read_bytes().splitlines()
    except OSError as error:
        raise InputError("trace", f"{path}: {error.strerror}") from None
    seconds, about, keys = 0.0, "", list[Key]()
    for number, line in enumerate(lines, 1):
        try:
            fields = orjson.loads(line)
        except orjson.JSONDecodeError as error:
            raise wrong(number, str(error)) from None
        if not isinstance(fields, dict):
            raise wrong(number, "should be an object")
        if number == 1:
            seconds, about = number_of(1, fields, "seconds", 0.001, 86400), str(fields.get("about", ""))
            continue
        at = number_of(number, fields, "at", keys[-1].at if keys else 0.0, seconds)
        prompt, seed = fields.get("prompt"), fields.get("seed", 0)
        if not isinstance(prompt, str):
            raise wrong(number, "prompt should be text")
        if not isinstance(seed, int) or not 0 <= seed < 2**31:
            raise wrong(number, "seed should be a whole number from 0 to 2147483647")
        keys.append(Key(at, prompt, seed))
    if not keys:
        raise InputError("trace", f"{path}: there are no messages in it")
    return Recording(seconds, tuple(keys), about)


TRACES = {
    trace.name: trace
    for trace in (
        Trace("typing", typing, redraws=False),
        Trace("flood", flood, redraws=False),
        Trace("camera", camera),
        Trace("single", single, closed=True),
        Trace("idle", idle),
    )
}


def find(name: str) -> Trace:
    """A trace by its name, ``recorded``, or the file that holds one. Raises: InputError."""
    if name in TRACES:
        return TRACES[name]
    if name == "recorded" or Path(name).suffix == ".jsonl":
        return Trace(name, read(RECORDING if name == "recorded" else Path(name)), redraws=False)
    raise InputError("trace", f"is {', '.join(TRACES)}, recorded or a .jsonl file, not {name!r}")


@functools.cache
def sketches(side: int, count: int = 16) -> tuple[bytes, ...]:
    """JPEGs as a drawing pad or a camera would send them, ``side`` px wide and high: a sun moves over a landscape.

    Raises: InputError: Pillow is not installed.
    """
    try:
        from PIL import Image, ImageDraw
    except ImportError:
        raise InputError("image", "needs Pillow: pip install 'lcm-rt[bench]'") from None

    def draw_one(turn: float) -> bytes:
        picture = Image.new("RGB", (side, side), "#f4b183")
        draw = ImageDraw.Draw(picture)
        x, y, r = side * turn, side * (0.25 + 0.2 * abs(turn - 0.5)), side * 0.08
        draw.ellipse((x - r, y - r, x + r, y + r), fill="#ffe699")
        draw.polygon([(0, side * 0.6), (side * 0.3, side * 0.3), (side * 0.6, side * 0.6)], fill="#7f6000")
        draw.rectangle((0, side * 0.6, side, side), fill="#2e75b6")
        draw.line([(0, side * 0.6), (side, side * 0.6)], fill="#1f4e79", width=max(2, side // 64))
        file = io.BytesIO()
        picture.save(file, "JPEG", quality=70)
        return file.getvalue()

    return tuple(draw_one(turn / count) for turn in range(count))


def marked(jpeg: bytes, words: str) -> bytes:
    """The same picture as a file that is like no other: no camera sends one twice, so no cache may know it."""
    comment = words.encode()
    return jpeg[:2] + b"\xff\xfe" + (len(comment) + 2).to_bytes(2, "big") + comment + jpeg[2:]

"""Landscapes drawn by code: attributes, captions, pictures, and the noise that belongs to each picture.

Knows nothing of networks. A *scene* is a row of attribute indices and a layout ``z``, a (4, 8, 8) grid of
N(0, 1) numbers. ``z`` is also a set of projections of the diffusion noise (block means of a 32x32 latent), so
that noise and caption together determine the picture: this designed coupling is what makes one regression
enough for sharp pictures, with no averaging over layouts and no teacher.
"""

from __future__ import annotations

import math
import random
import string
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

GRID = 8  # layout cells along a side
BLOCK = 4  # latent pixels along a side of a cell, at the native 32x32
LATENT = GRID * BLOCK
SIZE = 256

# Index 0 means "not spoken of" in captions and "absent" (or the plain kind) in drawings.
ATTRIBUTES: dict[str, tuple[str, ...]] = {
    "time": ("", "day", "sunset", "night", "dawn"),
    "body": ("", "sun", "moon"),
    "stars": ("", "stars"),
    "clouds": ("", "clouds"),
    "back": ("", "mountains", "snowy mountains"),
    "hills": ("", "hills"),
    "land": ("", "meadow", "desert", "snow"),
    "forest": ("", "forest"),
    "water": ("", "lake", "sea"),
    "house": ("", "house"),
}
NAMES = tuple(ATTRIBUTES)
COLUMN = {name: i for i, name in enumerate(NAMES)}
DAY, SUNSET, NIGHT, DAWN = 1, 2, 3, 4
SUN, MOON = 1, 2
MEADOW, DESERT, SNOW = 1, 2, 3
LAKE, SEA = 1, 2


def _split(phrases: str) -> tuple[str, ...]:
    return tuple(phrases.split(", "))


PHRASES: dict[str, dict[str, tuple[str, ...]]] = {
    "time": {
        "day": _split("day, in daylight, at noon, on a bright day, midday, daytime, during the day, blue sky"),
        "sunset": _split("sunset, at sunset, at dusk, in the evening, dusk, golden hour, twilight, sundown"),
        "night": _split("night, at night, by night, at midnight, in the night, nighttime, in the dark"),
        "dawn": _split("dawn, at dawn, at sunrise, sunrise, early morning, at daybreak, in the morning"),
    },
    "body": {
        "sun": _split("sun, the sun, a big sun, a yellow sun, a bright sun, sunny, sunshine"),
        "moon": _split("moon, the moon, a full moon, moonlight, a bright moon, a white moon"),
    },
    "stars": {
        "stars": _split("stars, a starry sky, many stars, bright stars, starry, starlight"),
    },
    "clouds": {
        "clouds": _split("clouds, a cloudy sky, white clouds, cloudy, many clouds, overcast"),
    },
    "back": {
        "mountains": _split("mountains, a mountain, mountain, a mountain range, peaks, rocky mountains, alps"),
        "snowy mountains": _split(
            "snowy mountains, snow-capped mountains, snowy peaks, a snowy mountain, white mountains, snow "
            "capped peaks, snow-covered mountains"
        ),
    },
    "hills": {
        "hills": _split("hills, rolling hills, hill, a hill, gentle hills, hilly"),
    },
    "land": {
        "meadow": _split("meadow, a meadow, grass, green fields, a field, countryside, a valley, a plain"),
        "desert": _split("desert, a desert, sand dunes, dunes, sand, the sahara, sandy desert"),
        "snow": _split("snow, winter, a snowy field, snowy ground, in winter, a snowy landscape, ice, snowfield"),
    },
    "forest": {
        "forest": _split("forest, a forest, trees, pine trees, woods, pines, tree, a dark forest"),
    },
    "water": {
        "lake": _split("lake, a lake, a pond, water, a river, the lake, a quiet lake, a calm lake"),
        "sea": _split("sea, the sea, ocean, the ocean, a beach, seaside, waves, the coast, beach"),
    },
    "house": {
        "house": _split("house, a house, a cabin, a cottage, a small house, hut, a red house, home"),
    },
}
OPENINGS = _split(
    "a painting of, a beautiful painting of, a photo of, a picture of, an illustration of, a drawing of, "
    "landscape with, a landscape of, view of, a view of, a scene with, oil painting of, watercolor of, "
    "there is, concept art of, show me"
)
CLOSINGS = _split(
    "highly detailed, masterpiece, best quality, 4k, 8k, trending on artstation, digital art, oil "
    "painting, watercolor, beautiful, cinematic, calm, peaceful, dramatic, soft light, wide angle, "
    "landscape, photorealistic, nature, vivid colors, in the style of van gogh, by monet, hd, sharp "
    "focus, anime"
)
UNKNOWN = _split(
    "cat, dog, portrait, woman, man, robot, car, city, dragon, castle, boat, bird, flower, red, blue, "
    "small, old, magic, dream, music, love, green, purple, huge, tiny, far, street, horse, bridge, girl, "
    "boy, cyberpunk, steam, glass, book, coffee, really, very"
)
JOINTS = (", ", " and ", " with ", ", ", " by ", " under ", " near ", " in ", ", with ", " over ", " ")


class Picture(NamedTuple):
    """A drawn batch."""

    image: Tensor  # (B, 3, S, S) float32 in [-1, 1]
    focus: Tensor  # (B, 1, 32, 32) float32 in [0, 1]: where the small things (sun, moon, house) are
    body: Tensor  # (B, 3) float32: x, y and radius of the sun or moon in picture units; no body, radius 0


# Captions


def speak(rng: random.Random) -> list[int]:
    """Choose what a caption mentions, free of contradictions: an index per attribute, 0 where it is silent."""
    if rng.random() < 0.03:
        return [0] * len(NAMES)
    if rng.random() < 0.12:  # bare captions: one or two words
        said = dict.fromkeys(NAMES, 0)
        for name in rng.sample(NAMES, rng.choice((1, 1, 2))):
            said[name] = rng.randrange(1, len(ATTRIBUTES[name]))
    else:
        said = {
            "time": rng.choices((0, DAY, SUNSET, NIGHT, DAWN), (14, 20, 24, 28, 14))[0],
            "body": rng.choices((0, SUN, MOON), (50, 30, 20))[0],
            "stars": int(rng.random() < 0.2),
            "clouds": int(rng.random() < 0.18),
            "back": rng.choices((0, 1, 2), (54, 26, 20))[0],
            "hills": int(rng.random() < 0.22),
            "land": rng.choices((0, MEADOW, DESERT, SNOW), (48, 14, 18, 20))[0],
            "forest": int(rng.random() < 0.26),
            "water": rng.choices((0, LAKE, SEA), (64, 20, 16))[0],
            "house": int(rng.random() < 0.25),
        }
    if said["time"] in (DAY, DAWN) or said["body"] == SUN:
        said["stars"] = 0
    if said["time"] == NIGHT and said["body"] == SUN:
        said["body"] = MOON
    if said["time"] in (DAY, DAWN) and said["body"] == MOON:
        said["body"] = SUN
    if said["stars"] and said["time"] == SUNSET:
        said["stars"] = 0
    if said["land"] == DESERT:
        said["forest"] = 0
        said["water"] = 0 if said["water"] == LAKE else said["water"]
    return [said[name] for name in NAMES]


def caption(said: list[int], rng: random.Random) -> str:
    """Words for what is said: synonyms, any order, fillers, sometimes words that mean nothing here."""
    phrases = [
        rng.choice(PHRASES[name][ATTRIBUTES[name][value]]) for name, value in zip(NAMES, said, strict=True) if value
    ]
    if not phrases:
        return "" if rng.random() < 0.6 else rng.choice((*OPENINGS, *CLOSINGS, *UNKNOWN))
    rng.shuffle(phrases)
    if rng.random() < 0.15:
        noise = "".join(rng.choices(string.ascii_lowercase, k=rng.randrange(2, 9)))
        phrases.insert(rng.randrange(len(phrases) + 1), rng.choice((*UNKNOWN, noise, noise, noise)))
    text = phrases[0]
    for phrase in phrases[1:]:
        text += rng.choice(JOINTS) + phrase
    if rng.random() < 0.4:
        text = f"{rng.choice(OPENINGS)} {text}"
    for _ in range(rng.choice((0, 0, 0, 1, 2))):
        text += ", " + rng.choice(CLOSINGS)
    return text.capitalize() if rng.random() < 0.2 else text


# Noise and layout


def project(noise: Tensor) -> Tensor:
    """Layout (B, 4, 8, 8) of noise (B, 4, 32, 32): sums over 4x4 blocks over 4, an orthonormal projection."""
    return F.avg_pool2d(noise, BLOCK) * BLOCK


def couple(noise: Tensor, z: Tensor) -> Tensor:
    """Give ``noise`` the layout ``z``: e - B B'e + B z, exactly Gaussian when both are."""
    return noise + F.interpolate((z - project(noise)) / BLOCK, scale_factor=BLOCK, mode="nearest")


def rows(z: Tensor, channel: int, first: int, stop: int) -> Tensor:
    """One N(0, 1) number per column, (B, 8), from the layout rows ``first`` to ``stop``."""
    return z[:, channel, first:stop].sum(1) / math.sqrt(stop - first)


def resolve(said: Tensor, z: Tensor) -> Tensor:
    """What is drawn, (B, attributes) int64, given what is said; layout and good sense fill the silence."""
    said, drawn = said.clone(), said.clone()
    names = ("time", "body", "stars", "back", "land", "water")
    time, body, stars, back, land, water = (COLUMN[name] for name in names)
    mood, relief, wet = (z[:, c, :2].mean((1, 2)) * 4 for c in (0, 1, 3))
    nightly = (said[:, body] == MOON) | (said[:, stars] == 1)
    guess = torch.where(nightly, NIGHT, torch.where(mood > -0.4, DAY, SUNSET))
    drawn[:, time] = torch.where(said[:, time] == 0, guess, said[:, time])
    low = (drawn[:, time] == SUNSET) | (drawn[:, time] == DAWN)
    drawn[:, body] = torch.where((said[:, body] == 0) & low, SUN, said[:, body])
    drawn[:, stars] = torch.where(drawn[:, time] == NIGHT, 1, said[:, stars])
    bare = said[:, [back, COLUMN["hills"], land, COLUMN["forest"], water, COLUMN["house"]]].sum(1) == 0
    drawn[:, water] = torch.where(bare & (wet > 0.5), LAKE, said[:, water])
    open_land = (said[:, water] != SEA) & (said[:, land] != DESERT)
    drawn[:, back] = torch.where((said[:, back] == 0) & open_land & (relief > 0.5), 1, said[:, back])
    plain = torch.where(said[:, water] == SEA, DESERT, MEADOW)
    drawn[:, land] = torch.where(said[:, land] == 0, plain, said[:, land])
    return drawn


# Colours, in [0, 1]; rows are day, sunset, night, dawn


def _rgb(*hexes: str) -> Tensor:
    return torch.tensor([[int(h[i : i + 2], 16) / 255 for i in (0, 2, 4)] for h in hexes])


# Two skies per time; the layout blends between them.
SKY_TOP = _rgb("3f86d6", "5b3a78", "070b22", "7d8fc4"), _rgb("62a9e6", "7a3b63", "0d1436", "93a0d8")
SKY_LOW = _rgb("cfe6f5", "ff9a4a", "253463", "ffd3b0"), _rgb("e3f0f3", "ff7a45", "2b4275", "ffc4c4")
LIGHT = _rgb("ffffff", "d98a72", "39466e", "d9c0c8")
CLOUD = _rgb("ffffff", "f5a08a", "3a4668", "f7d6d8")
WATER = _rgb("2f6f9f", "8a4a63", "101c3f", "7f97bd")
SUN_DISC = _rgb("fff3a0", "ffe07a", "fff3a0", "fff0c0")
SUN_GLOW = _rgb("fff6d0", "ffb45a", "fff6d0", "ffe6b8")
MOON_DISC = _rgb("f4f4e6")
MOUNTAIN = _rgb("7b8494")
SNOW_CAP = _rgb("ffffff")
LAND = _rgb("6fae4a", "dfb56c", "f2f6fb")  # meadow, desert, snow
TREE = _rgb("2f6b3a", "2f6b3a", "44695c")  # the tree's green on each land
WALL, ROOF, DOOR = _rgb("e8d3b0"), _rgb("b5483a"), _rgb("6a4430")
WINDOW_DAY, WINDOW_LIT = _rgb("7fb0d0"), _rgb("ffd45a")
# What a child's hand takes from the box, whatever the time of day.
CRAYON_SKY, CRAYON_SUN = _rgb("8fd0ff", "ffb070", "203060", "ffd8c8", "f8f8f8"), _rgb("ffdf20")


def _c(colour: Tensor) -> Tensor:
    return colour[..., None, None]


def _curve(values: Tensor, size: int) -> Tensor:
    """A smooth line (B, 1, 1, size) through column values (B, n)."""
    return F.interpolate(values[:, None, None], size=(1, size), mode="bicubic", align_corners=False)


def _polyline(values: Tensor, size: int) -> Tensor:
    return F.interpolate(values[:, None], size=size, mode="linear", align_corners=False)[:, :, None]


def _blur(values: Tensor) -> Tensor:
    """Neighbouring columns averaged, the variance kept near one."""
    padded = F.pad(values[:, None], (1, 1), mode="replicate")[:, 0]
    return (0.5 * padded[:, :-2] + padded[:, 1:-1] + 0.5 * padded[:, 2:]) / math.sqrt(1.5)


def _step(x: Tensor, low: float, high: float) -> Tensor:
    t = ((x - low) / (high - low)).clamp(0, 1)
    return t * t * (3 - 2 * t)


def _winner(field: Tensor, side: Tensor, spread: float) -> tuple[Tensor, Tensor]:
    """The inner column with the largest value, and a place near its centre, moved by ``side`` (B, 8)."""
    column = field[:, 1:-1].argmax(1) + 1
    offset = side.gather(1, column[:, None])[:, 0].tanh() * spread
    return column, (column + 0.5) / GRID + offset


def place_body(drawn: Tensor, z: Tensor) -> Tensor:
    """Where the sun or moon stands, (B, 3): x, y, radius; radius 0 when there is none."""
    column, x = _winner(rows(z, 2, 0, 3), z[:, 0, 0], 0.05)
    rise = z[:, 3, 1].gather(1, column[:, None])[:, 0].tanh()
    time, ridge = drawn[:, COLUMN["time"]], drawn[:, COLUMN["back"]] > 0
    low = (time == SUNSET) | (time == DAWN)
    y = torch.where(low, torch.where(ridge, 0.25, 0.43) + 0.04 * rise, 0.17 + 0.05 * rise)
    radius = torch.where(low, 0.075, 0.065) * (drawn[:, COLUMN["body"]] > 0)
    return torch.stack((x, y, radius), 1)


def draw(
    drawn: Tensor,
    z: Tensor,
    *,
    size: int = SIZE,
    body: Tensor | None = None,
    sketch: torch.Generator | None = None,
) -> Picture:
    """Paint scenes.

    ``body`` (B, 3) overrides where the sun or moon stands. With ``sketch`` the same scene is drawn by a
    wobbly hand in a few flat colours, whose tints and wobbles come from that generator.
    """
    b, flat = len(drawn), sketch is not None
    at = {name: drawn[:, i] for i, name in enumerate(NAMES)}
    has = {name: (value > 0).float()[:, None, None, None] for name, value in at.items()}
    grid = (torch.arange(size, dtype=torch.float32) + 0.5) / size
    X, Y = grid.view(1, 1, 1, -1), grid.view(1, 1, -1, 1)
    time = at["time"] - 1
    night = (time == NIGHT - 1).float()[:, None, None, None]
    low_sun = ((time == SUNSET - 1) | (time == DAWN - 1)).float()[:, None, None, None]
    sea = (at["water"] == SEA).float()[:, None, None, None]
    lake = (at["water"] == LAKE).float()[:, None, None, None]
    desert = (at["land"] == DESERT).float()[:, None, None, None]
    light = _c(LIGHT[time])
    if sketch is not None:
        X, Y, light = _wobble(X, Y, light, sketch, b)
    place = place_body(drawn, z) if body is None else body
    sx, sy, radius = (_c(place[:, i, None]) for i in range(3))

    def below(line: Tensor) -> Tensor:
        return ((Y - line) * size + 0.5).clamp(0, 1)

    def over(canvas: Tensor, colour: Tensor, mask: Tensor) -> Tensor:
        return torch.lerp(canvas, colour.expand_as(canvas), mask.expand_as(canvas))

    # Sky.
    tone = _c(torch.sigmoid(3 * z[:, 1, :2, :4].mean((1, 2), keepdim=False) * 2)[:, None])
    top, low = (_c(s[0][time]) * (1 - tone) + _c(s[1][time]) * tone for s in (SKY_TOP, SKY_LOW))
    if flat:
        crayon = (torch.rand(b, 1, 1, 1, generator=sketch) < 0.5).float()
        any_time = torch.rand(b, generator=sketch)
        box = CRAYON_SKY[torch.where(any_time < 0.4, 0, torch.where(any_time < 0.5, 4, time))]
        sky = torch.lerp((top + low) / 2, _c(box), crayon)
        low = top = sky
        canvas = sky.expand(b, 3, size, size).contiguous()
    else:
        canvas = torch.lerp(top.expand(b, 3, size, size), low.expand(b, 3, size, size), _step(Y, 0.0, 0.62))

    # Stars: one per cell at most, so each pixel looks at its own cell only.
    cells = torch.stack((z[:, 0].tanh(), z[:, 2].tanh(), _step(z[:, 1], -0.2, 0.6)), 1)[:, :, :5]
    cells = cells.repeat_interleave(size // GRID, 2).repeat_interleave(size // GRID, 3)
    centre = (torch.arange(size) // (size // GRID) + 0.5) / GRID
    h = cells.shape[2]
    dx = X[..., :h, :] - centre.view(1, 1, 1, -1) - 0.04 * cells[:, :1]
    dy = Y[..., :h, :] - centre.view(1, 1, -1, 1)[..., :h, :] - 0.04 * cells[:, 1:2]
    star = (-(dx * dx + dy * dy) * (1 / 0.009**2)).exp() * cells[:, 2:] * 1.3
    star = F.pad(star.clamp(0, 1), (0, 0, 0, size - h)) * has["stars"]
    canvas = over(canvas, _c(_rgb("fffbe8")), star if not flat else star.round())

    # Sun or moon, its glow first.
    distance = ((X - sx) ** 2 + (Y - sy) ** 2).sqrt()
    sun = (at["body"] == SUN).float()[:, None, None, None]
    disc = torch.lerp(_c(MOON_DISC), _c(SUN_DISC[time]), sun)
    if flat:
        disc = torch.lerp(disc, _c(CRAYON_SUN), sun * crayon)
    else:
        glow = torch.lerp(_c(_rgb("8fa0d0")), _c(SUN_GLOW[time]), sun)
        halo = (-(distance - radius).clamp(min=0) / (0.09 + 0.10 * low_sun)).exp() * (0.45 + 0.25 * low_sun)
        canvas = over(canvas, glow, halo * has["body"])
    disc_mask = ((radius - distance) * size + 0.5).clamp(0, 1) * has["body"]
    canvas = over(canvas, disc, disc_mask)

    # Clouds: where a smooth field made of the layout is high.
    soft = _blur(z[:, 3, :5].reshape(-1, GRID)).view(b, 1, 5, GRID)
    field = F.interpolate(F.pad(soft, (0, 0, 0, 3)), size=(size, size), mode="bicubic", align_corners=False)
    field = field - (1.25 - 1.1 * has["clouds"]) - _step(Y, 0.34, 0.5) * 2
    field = field - (1 - _step(Y, 0.0, 0.12)) * 0.6
    cloud = _step(field, 0.0, 0.55) * (0.85 if not flat else has["clouds"])
    shade = 0.0 if flat else (field - field.roll(-size // 32, 2)).clamp(-0.5, 0.5) * 0.35
    canvas = over(canvas, _c(CLOUD[time]) * (0.95 - shade), cloud.round() if flat else cloud)
    if flat:
        low = sky

    # Mountains: a polyline whose slopes are lit from the left, softer with depth.
    peaks, sides = rows(z, 0, 1, 5), rows(z, 1, 1, 5)
    following = torch.cat((peaks[:, 1:], peaks[:, -1:]), 1)
    ridge = torch.stack((peaks, 0.5 * (peaks + following) + 0.45 * sides), 2).flatten(1)
    line = 0.385 - 0.16 * (_polyline(ridge, size) * 0.55).tanh()
    mask = below(line) * has["back"]
    rock = _c(MOUNTAIN) * light
    cap = (at["back"] == 2).float()[:, None, None, None]
    depth = Y - line
    zigzag = 0.075 + 0.03 * ((X * 13) % 1 * 2 - 1).abs() - 0.02 * _polyline(sides, size)
    snow_here = cap * ((zigzag - depth) * size * 0.5 + 0.5).clamp(0, 1)
    if flat:
        rock = torch.lerp(rock, _c(SNOW_CAP) * light.clamp(min=0.5), snow_here.round())
    else:
        slope = F.avg_pool2d(_slope(line), (1, 13), 1, (0, 6))
        lit = _shear(_step(slope, -0.7, 0.7), X + 0.35 * depth)
        rock = torch.lerp(rock, _c(SNOW_CAP) * (light * 1.1 + 0.05), snow_here * 0.95) * (1.12 - 0.42 * lit)
        rock = torch.lerp(rock, low, _step(depth, 0.0, 0.34) * 0.65)
    canvas = over(canvas, rock, mask)

    # Far land, or the far sea's horizon.
    land = _c(LAND[at["land"] - 1]) * light
    horizon = 0.56
    far = 0.575 - (0.018 + 0.035 * has["hills"]) * _curve(_blur(rows(z, 1, 3, 6)), size)
    haze = land if flat else torch.lerp(land, low, 0.5)
    canvas = over(canvas, haze, below(far) * (1 - sea))

    # Far forest: the highest of 24 conifers at each column.
    heights = 0.062 + 0.018 * z[:, 2, 4:7].transpose(1, 2).flatten(1)
    tops = (torch.arange(24) + 0.5) / 24
    reach = 1 - (X[..., :1, :] - tops.view(1, -1, 1, 1)).abs() / 0.03
    trees = (heights[:, :, None, None] * reach).amax(1, keepdim=True)
    green = _c(TREE[at["land"] - 1]) * light
    bank = 0.63 - (0.012 + 0.03 * has["hills"]) * _curve(_blur(rows(z, 0, 4, 7)), size)
    far_green = green if flat else torch.lerp(green, low, 0.28)
    canvas = over(canvas, far_green, below(bank - trees) * has["forest"])

    # Middle land, lit on the slopes facing left; dunes strongly so.
    def ground(canvas: Tensor, line: Tensor, colour: Tensor, mask: Tensor | float) -> Tensor:
        if not flat:
            slope = F.avg_pool2d(_slope(line), (1, 33), 1, (0, 16))
            lit = _shear(_step(slope, -0.3, 0.3), X + (Y - line))
            fade = _step(Y - line, 0.0, 0.22)
            amount = 0.10 + 0.16 * has["hills"] + 0.22 * desert
            colour = colour * (1.0 + amount * (0.4 - lit) * (1 - 0.6 * fade) - 0.14 * fade)
        return over(canvas, colour, below(line) * mask)

    middle = land if flat else torch.lerp(land, low, 0.2)
    canvas = ground(canvas, bank, middle, 1 - sea)

    # Water, with the mountains and the light in it.
    shore = torch.lerp(torch.tensor(0.645), torch.tensor(horizon), sea)
    water = _c(WATER[time])
    if not flat:
        ripple = torch.sin((Y - 0.5).clamp(min=0).sqrt() * 260) * _step(Y, 0.55, 0.9) * 0.04
        deep = _step(Y, 0.55, 1.0)
        surface = torch.lerp(torch.lerp(low, water, 0.35), water, deep) * (1 + ripple)
        mirrored = ((shore - line) * 0.7 - (Y - shore)) * 40
        mirrored = mirrored.clamp(0, 1) * 0.3 * has["back"]
        surface = torch.lerp(surface, rock.mean((2, 3), keepdim=True), mirrored)
        width = 0.035 + 0.10 * (Y - shore).clamp(min=0)
        glitter = (-(((X - sx) / width) ** 2)).exp() * (0.6 + 0.4 * torch.sin(Y * 230)) * has["body"]
        surface = over(surface, torch.lerp(glow, disc, 0.5), glitter * (0.35 + 0.35 * low_sun + 0.2 * night))
        water = surface
    canvas = over(canvas, water, below(shore.expand(b, 1, 1, size)) * (lake + sea))

    # Near land; by the sea a strip of beach.
    near = torch.lerp(torch.tensor(0.755), torch.tensor(0.86), (lake + sea).clamp(0, 1))
    near = near - (0.014 + 0.035 * has["hills"] + 0.02 * desert) * _curve(_blur(rows(z, 1, 6, 8)), size)
    front = land
    if not flat:
        patches = F.interpolate(z[:, 2:3, 5:], size=(size // 2, size), mode="bicubic", align_corners=False)
        patches = F.pad(patches, (0, 0, size - size // 2, 0))
        front = land * (1.0 + 0.035 * patches.clamp(-2, 2) * (1 - 0.6 * has["water"]))
    canvas = ground(canvas, near, front, 1.0)

    # House: the ground column with the strongest channel 3.
    column, hx = _winner(rows(z, 3, 5, 8), z[:, 1, 5], 0.03)
    hx = _c(hx[:, None])
    foot = torch.lerp(torch.tensor(0.80), torch.tensor(0.885), (lake + sea).clamp(0, 1))
    house, canvas = _house(canvas, X - hx, Y - foot, size, light, night, flat, has["house"], over)

    # Near trees, one per column at most, not in front of the house.
    size_of = 0.16 + 0.05 * z[:, 2, 7]
    beside = ((torch.arange(GRID) - column[:, None]).abs() <= 1) & (at["house"] > 0)[:, None]
    size_of = torch.where((z[:, 2, 7] < -0.2) | beside, -1.0, size_of)
    stems = (torch.arange(GRID) + 0.5) / GRID + 0.03 * z[:, 3, 7].tanh()
    reach = 1 - (X[..., :1, :] - stems[:, :, None, None]).abs() / 0.05
    conifers = torch.where(reach > 0, size_of[:, :, None, None] * reach, -1.0).amax(1, keepdim=True)
    base = near + 0.05
    mask = below(base - conifers) * (1 - below(base)) * (conifers > 0) * has["forest"]
    bark = green * 0.8 if flat else green * (0.62 + 0.25 * _step(base - Y, 0.0, 0.2))
    canvas = over(canvas, bark, mask)

    small = torch.maximum(disc_mask * (1 - below(bank)), house).expand(b, 1, size, size)
    focus = F.avg_pool2d(small, size // LATENT)
    return Picture(canvas.clamp(0, 1) * 2 - 1, focus, place)


# Holes and styles


def hole(focus: Tensor, rng: random.Random, *, size: int = SIZE) -> Tensor:
    """A mask for inpainting, (1, size, size) float32: 1 where the picture is to be painted anew, 0 where it is kept.

    Blobs, boxes, halves, all but a box, everything, or the small things of the picture with some air around
    them, which are where ``focus`` (1, 32, 32) says.
    """
    kind = rng.choices(("blob", "box", "half", "thing", "frame", "all"), (30, 24, 16, 22, 5, 3))[0]
    if kind == "thing" and focus.max() > 0.2:
        air = rng.choice((3, 5, 7, 9))
        wide = F.max_pool2d(focus[None], air, 1, air // 2)
        return (F.interpolate(wide, size=(size, size), mode="bilinear")[0] > 0.3).float()
    if kind == "blob":
        cells = rng.choice((3, 4, 6))
        field = torch.tensor([rng.gauss(0, 1) for _ in range(cells * cells)]).view(1, 1, cells, cells)
        field = F.interpolate(field, size=(size, size), mode="bicubic", align_corners=False)[0]
        return (field > field.flatten()[::97].quantile(rng.uniform(0.35, 0.9))).float()
    mask = torch.zeros(1, size, size)
    if kind == "half":
        cut = int(size * rng.uniform(0.25, 0.75))
        mask[:, :cut] = 1
        for _ in range(rng.randrange(4)):
            mask = mask.rot90(1, (1, 2))
        return mask.contiguous()
    width, height = (int(size * rng.uniform(0.2, 0.75)) for _ in range(2))
    left, top = rng.randrange(size - width + 1), rng.randrange(size - height + 1)
    mask[:, top : top + height, left : left + width] = 1
    if kind == "all":
        return torch.ones_like(mask)
    return 1 - mask if kind == "frame" else mask


INK, PAPER = np.array((0.10, 0.11, 0.20), np.float32), np.array((0.97, 0.94, 0.86), np.float32)
LIGHTNESS = np.array((0.3, 0.59, 0.11), np.float32)


def restyle(pixels: npt.NDArray[np.uint8], style: str) -> npt.NDArray[np.uint8]:
    """The same pictures in another style.

    Args:
        pixels: (..., H, W, 3) uint8 sRGB.
        style: ``"ink"``: washes of ink in a few tones on cream paper, a trace of the colours, and a line wherever
            they change; by night the lines are white.

    Raises:
        KeyError: there is no such style.
    """
    colour = (pixels / 255).astype(np.float32)
    styled: npt.NDArray[np.uint8] = np.rint(STYLES[style](colour).clip(0, 1) * 255).astype(np.uint8)
    return styled


def _ink(colour: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    down, right = np.gradient(_soften(colour), axis=(-3, -2))
    change = np.sqrt((down**2 + right**2).sum(-1, keepdims=True)) * (colour.shape[-2] / SIZE)
    line = (30 * change - 0.5).clip(0, 1)
    light = (colour @ LIGHTNESS)[..., None]
    night = (6 - 20 * light.mean((-3, -2), keepdims=True)).clip(0, 1)
    tones = 3.5 * light
    wash = (np.floor(tones) + (tones % 1 * 3 - 1).clip(0, 1)) / 3.5
    canvas = INK + (PAPER - INK) * (0.2 + 0.85 * wash - 0.12 * night).clip(0, 1) + 0.22 * (colour - light)
    pen = INK + (PAPER - INK) * 0.85 * night
    drawn: npt.NDArray[np.float32] = canvas + (pen - canvas) * 0.92 * line
    return drawn


def _soften(colour: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """A blur of 7x7 pixels with binomial weights."""
    for axis in (-3, -2):
        rim = [(0, 0)] * colour.ndim
        rim[axis] = (3, 3)
        padded, n = np.pad(colour, rim, mode="edge"), colour.shape[axis]
        colour = np.zeros_like(colour)
        for i, weight in enumerate((1, 6, 15, 20, 15, 6, 1)):
            colour += np.take(padded, range(i, i + n), axis) * np.float32(weight / 64)
    return colour


STYLES = {"ink": _ink}


def _slope(line: Tensor) -> Tensor:
    """Slope of a line (B, 1, 1, S), downhill to the right positive, in picture heights per width."""
    step = (line[..., 2:] - line[..., :-2]) * (line.shape[-1] / 2)
    return F.pad(step, (1, 1, 0, 0), mode="replicate")


def _shear(row: Tensor, x: Tensor) -> Tensor:
    """Read a row (B, 1, 1, S) at the places ``x`` (B, 1, S, S), so that light falls aslant."""
    size = row.shape[-1]
    index = (x * size).long().clamp(0, size - 1)
    return row.expand(-1, -1, index.shape[2], -1).gather(3, index)


def _house(
    canvas: Tensor,
    x: Tensor,
    y: Tensor,
    size: int,
    light: Tensor,
    night: Tensor,
    flat: bool,
    there: Tensor,
    over: Callable[[Tensor, Tensor, Tensor], Tensor],
) -> tuple[Tensor, Tensor]:
    """A house whose foot is at the origin; returns its mask and the canvas."""

    def box(left: float, right: float, top: float, bottom: float) -> Tensor:
        edge = torch.minimum(torch.minimum(x - left, right - x), torch.minimum(y - top, bottom - y))
        return (edge * size + 0.5).clamp(0, 1) * there

    def gable(half: float, top: float, bottom: float) -> Tensor:
        edge = torch.minimum((y - top) * half / (bottom - top) - x.abs(), bottom - y)
        return (edge * size + 0.5).clamp(0, 1) * there

    wall, roof = box(-0.085, 0.085, -0.105, 0.0), gable(0.115, -0.195, -0.10)
    canvas = over(canvas, _c(WALL) * light, wall)
    canvas = over(canvas, _c(ROOF) * light, roof)
    if not flat:
        lit = torch.lerp(_c(WINDOW_DAY) * light, _c(WINDOW_LIT), night)
        canvas = over(canvas, _c(DOOR) * light, box(-0.018, 0.018, -0.06, 0.0))
        canvas = over(canvas, lit, box(-0.065, -0.032, -0.078, -0.04))
        canvas = over(canvas, lit, box(0.032, 0.065, -0.078, -0.04))
    return torch.maximum(wall, roof), canvas


def _wobble(X: Tensor, Y: Tensor, light: Tensor, generator: torch.Generator, b: int) -> tuple[Tensor, Tensor, Tensor]:
    """An unsteady hand: the plane bent by a smooth random field, and crayons of slightly wrong colours."""
    bend = torch.randn(b, 2, 12, 12, generator=generator) * 0.006
    bend = F.interpolate(bend, size=(Y.shape[2], X.shape[3]), mode="bicubic", align_corners=False)
    tint = 1 + 0.12 * torch.randn(b, 3, 1, 1, generator=generator)
    plain = torch.rand(b, 1, 1, 1, generator=generator)  # how little of the light of day the crayons know
    return X + bend[:, :1], Y + bend[:, 1:], torch.lerp(light, torch.ones_like(light), plain * 0.8) * tint

"""What the embedded model's pictures mean, at 4 steps: through the engine, as a client would get them."""

from __future__ import annotations

import io
import math
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image, ImageDraw

from lcm_rt import catalog
from lcm_rt.engine.engine import Engine
from lcm_rt.images import read_canvas
from lcm_rt.types import GenerateRequest

SEEDS = range(4)
Pixels = npt.NDArray[np.float64]


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    it = Engine(device="cpu")
    spec = catalog.resolve("embedded")
    parts, _ = it.locate(spec, lambda stage, fraction: None)
    it.load(spec, parts, lambda stage, fraction: None)
    yield it


def paint(engine: Engine, prompt: str, **fields: object) -> Pixels:
    """Pictures of four seeds, (4, 256, 256, 3) in 0..255, from one batch."""
    rows = []
    for seed in SEEDS:
        request = GenerateRequest("embedded", prompt, seed, **fields)  # type: ignore[arg-type]
        rows.append(engine.begin(seed, request, read_canvas(request, 256)))
    while not rows[0].done:
        engine.step(rows)
    return np.array([picture.pixels for picture in engine.finish(rows)], float)  # type: ignore[union-attr]


def png(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "png")
    return file.getvalue()


def redness(pictures: Pixels) -> Pixels:
    """Red over blue, of the upper half, where the sky is."""
    sky = pictures[:, :128].mean((1, 2))
    return np.asarray(sky[:, 0] - sky[:, 2])


def test_night_is_darker_than_day(engine: Engine) -> None:
    day = paint(engine, "a mountain lake at day").mean((1, 2, 3))
    night = paint(engine, "a mountain lake at night").mean((1, 2, 3))
    assert (night < 0.6 * day).all(), (day, night)


def test_sunset_is_redder_than_snow(engine: Engine) -> None:
    sunset, snow = redness(paint(engine, "sunset over hills")), redness(paint(engine, "snowy mountains at day"))
    assert (sunset > snow + 30).all(), (sunset, snow)


def test_seeds_differ_and_repeat(engine: Engine) -> None:
    once, again = paint(engine, "hills at day"), paint(engine, "hills at day")
    assert np.array_equal(once, again)
    assert all(np.abs(once[0] - other).mean() > 4 for other in once[1:])


def scribble(sun: tuple[int, int]) -> bytes:
    image = Image.new("RGB", (256, 256), (240, 150, 90))
    draw = ImageDraw.Draw(image)
    draw.rectangle((0, 170, 256, 256), fill=(70, 80, 120))
    x, y = sun
    draw.ellipse((x - 24, y - 24, x + 24, y + 24), fill=(255, 235, 140))
    return png(image)


def brightest(picture: Pixels, side: int = 15) -> tuple[int, int]:
    """Where the brightest square of the sky is: its middle, (x, y)."""
    sums = np.pad(picture[:160].mean(2), ((1, 0), (1, 0))).cumsum(0).cumsum(1)
    squares = sums[side:, side:] - sums[:-side, side:] - sums[side:, :-side] + sums[:-side, :-side]
    y, x = np.unravel_index(squares.argmax(), squares.shape)
    return int(x) + side // 2, int(y) + side // 2


@pytest.mark.parametrize("sun", [(60, 70), (190, 90)])
@pytest.mark.parametrize("strength, drift", [(0.4, 24), (0.5, 40)])
def test_a_drawn_sun_stays_where_it_was_drawn(
    engine: Engine, sun: tuple[int, int], strength: float, drift: int
) -> None:
    pictures = paint(engine, "sunset over the sea with a sun", image=scribble(sun), strength=strength)
    found = [brightest(picture) for picture in pictures]
    assert all(math.dist(sun, where) <= drift for where in found), found


def test_inpainting_changes_the_masked_part_only(engine: Engine) -> None:
    before = paint(engine, "a desert at day")[0]
    mask = Image.new("L", (256, 256), 0)
    ImageDraw.Draw(mask).rectangle((96, 8, 248, 104), fill=255)
    after = paint(
        engine, "a dark night sky", image=png(Image.fromarray(before.astype(np.uint8))), mask=png(mask), strength=1.0
    )
    change = np.abs(after - before).mean((0, 3))
    assert change[128:].mean() < 12, "what was kept is kept, but for the autoencoder's own loss"
    assert change[24:88, 112:232].mean() > 2 * change[128:].mean()

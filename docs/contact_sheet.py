"""Make docs/contact-sheet.png: what the embedded model paints, by ``lcm-rt generate`` at 4 steps.

    python docs/contact_sheet.py [--seed 1]

Twelve prompts, four sketches with what becomes of them, two inpaintings. Seeds are not picked: all are ``--seed``.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont, ImageOps

SIDE, GAP, TEXT = 160, 8, 18
COLUMNS = 6

PROMPTS = [
    "a mountain lake at day",
    "sunset over the sea",
    "snowy mountains at night, a moon",
    "a desert at sunset with a sun",
    "hills and a forest at day",
    "a house on a hill at day",
    "a snowy forest at night with a moon",
    "a lake at sunset with mountains",
    "the sea at day with a sun",
    "a desert at night with stars",
    "a house by a lake at sunset",
    "snow, mountains and a forest at day",
]

SKY, DUSK, DARK = (135, 190, 235), (240, 140, 80), (18, 24, 52)
Cell = tuple[str, Image.Image]  # a caption and a picture
Shape = tuple[str, list[tuple[int, int]] | tuple[int, int, int, int], tuple[int, int, int]]

# A flat sketch as a child would draw it, at 256 px: sky colour, then shapes.
SKETCHES: list[tuple[str, tuple[int, int, int], list[Shape]]] = [
    (
        "mountains at day with a sun",
        SKY,
        [
            ("polygon", [(0, 150), (70, 70), (130, 140), (190, 60), (256, 150), (256, 256), (0, 256)], (120, 120, 130)),
            ("rectangle", (0, 190, 256, 256), (90, 150, 70)),
            ("ellipse", (30, 20, 66, 56), (255, 235, 120)),
        ],
    ),
    (
        "sunset over the sea with a sun",
        DUSK,
        [("rectangle", (0, 150, 256, 256), (60, 70, 120)), ("ellipse", (165, 90, 211, 136), (255, 220, 110))],
    ),
    (
        "a house on hills at day",
        SKY,
        [
            ("ellipse", (-80, 130, 200, 340), (100, 160, 80)),
            ("ellipse", (100, 150, 360, 340), (80, 140, 70)),
            ("rectangle", (150, 130, 196, 172), (200, 120, 90)),
            ("polygon", [(144, 132), (173, 104), (202, 132)], (120, 50, 40)),
        ],
    ),
    (
        "a snowy forest at night with a moon",
        DARK,
        [
            ("rectangle", (0, 170, 256, 256), (200, 210, 225)),
            *[
                ("polygon", [(x, 185), (x + 16, 110 + 9 * (x % 3)), (x + 32, 185)], (25, 50, 45))
                for x in range(0, 250, 36)
            ],
            ("ellipse", (190, 24, 222, 56), (240, 240, 220)),
        ],
    ),
]  # fmt: skip

INPAINTINGS = [("a desert at night with a moon", (16, 8, 240, 120)), ("a house at day", (96, 120, 190, 210))]
"""A prompt, and the box that is painted anew: of the tenth and of the fifth picture."""


def draw_sketch(sky: tuple[int, int, int], shapes: list[Shape]) -> Image.Image:
    sketch = Image.new("RGB", (256, 256), sky)
    draw = ImageDraw.Draw(sketch)
    for kind, where, colour in shapes:
        getattr(draw, kind)(where, fill=colour)
    return sketch


def generate(output: Path, prompt: str, seed: int, *more: str) -> Image.Image:
    command = [sys.executable, "-m", "lcm_rt", "generate", prompt, "-o", str(output), "--seed", str(seed), *more]
    print(subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip())
    return Image.open(output).convert("RGB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=1)
    seed = parser.parse_args().seed
    cells: list[Cell] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        pictures = [generate(folder / f"{n}.png", prompt, seed) for n, prompt in enumerate(PROMPTS)]
        cells += zip(PROMPTS, pictures, strict=True)
        for prompt, sky, shapes in SKETCHES:
            sketch = draw_sketch(sky, shapes)
            sketch.save(folder / "sketch.png")
            painted = generate(
                folder / "painted.png", prompt, seed, "-i", str(folder / "sketch.png"), "--strength", "0.5"
            )
            cells += [("sketch", sketch), (f"= {prompt}", painted)]
        for (prompt, box), before in zip(INPAINTINGS, (pictures[9], pictures[4]), strict=True):
            mask = Image.new("L", before.size, 0)
            ImageDraw.Draw(mask).rectangle(box, fill=255)
            mask.save(folder / "mask.png")
            before.save(folder / "before.png")
            marked = before.copy()
            ImageDraw.Draw(marked).rectangle(box, outline=(255, 60, 60), width=3)
            after = generate(
                folder / "after.png", prompt, seed + 1,
                "-i", str(folder / "before.png"), "-m", str(folder / "mask.png"), "--strength", "0.9",
            )  # fmt: skip
            cells += [("mask", marked), (f"= {prompt}", after)]
    save(cells, "contact-sheet.png")


def save(cells: Sequence[Cell], name: str) -> None:
    """Write pictures with their captions, six in a line, to the file ``name`` beside this one."""
    rows = -(-len(cells) // COLUMNS)
    sheet = Image.new("RGB", (COLUMNS * (SIDE + GAP) + GAP, rows * (SIDE + GAP + TEXT) + GAP), "white")
    draw = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(9)
    for number, (caption, image) in enumerate(cells):
        x = GAP + number % COLUMNS * (SIDE + GAP)
        y = GAP + number // COLUMNS * (SIDE + GAP + TEXT)
        shown = ImageOps.contain(image, (SIDE, SIDE), Image.Resampling.LANCZOS)
        sheet.paste(shown, (x, y + (SIDE - shown.height) // 2))
        draw.text((x, y + SIDE + 2), caption, fill="black", font=font)
    path = Path(__file__).with_name(name)
    sheet.point(lambda level: level & 0xFC | level >> 6).save(path, optimize=True)  # 6 bits a colour: half the size
    print(f"{path}: {path.stat().st_size >> 10} kB")


if __name__ == "__main__":
    main()

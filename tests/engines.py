"""What the tests of the engine share: tiny models of every kind, and short words for one picture's way."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from checkpoints import write_checkpoint, write_controlnet

from lcm_rt.catalog import ModelSpec
from lcm_rt.engine.engine import Engine
from lcm_rt.engine.runner import Runner
from lcm_rt.images import Canvas
from lcm_rt.types import GenerateRequest

TOLERANCE = 1e-5

KINDS: dict[str, dict[str, Any]] = {
    "lcm": {},
    "lcm-tiny": {"tiny_vae": True},
    "lcm-v": {"prediction": "v_prediction"},
    "plain": {"distilled": False},
    "plain-tiny": {"distilled": False, "tiny_vae": True},
    "nine": {"distilled": False, "inpainting": True},
    "xl-lcm": {"family": "sdxl"},
    "xl-plain": {"family": "sdxl", "distilled": False},
    "xl-nine": {"family": "sdxl", "distilled": False, "inpainting": True},
}
CONTROLLED = ("lcm", "plain", "xl-lcm", "xl-plain")


def write_models(root: Path) -> dict[str, ModelSpec]:
    """One folder of each kind; those that are ``CONTROLLED`` have an inpainting ControlNet inside."""
    specs = {name: write_checkpoint(root / name, **kind, seed=i) for i, (name, kind) in enumerate(KINDS.items())}
    for name in CONTROLLED:
        write_controlnet(root / name / "controlnet", family="sdxl" if name.startswith("xl") else "sd", seed=5)
    return specs


def load(engine: Engine, spec: ModelSpec) -> None:
    parts, _ = engine.locate(spec, lambda stage, fraction: None)
    engine.load(spec, parts, lambda stage, fraction: None)


def engine_of(*specs: ModelSpec, **options: Any) -> Engine:
    # One thread: on a busy machine, two of OpenMP's spend their time waiting for each other.
    engine = Engine(device="cpu", threads=1, **options)
    for spec in specs:
        load(engine, spec)
    return engine


@cache
def picture(width: int = 64, height: int = 64, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def half(width: int = 64, height: int = 64) -> np.ndarray:
    """A mask of the left half."""
    mask = np.zeros((height, width), dtype=bool)
    mask[:, : width // 2] = True
    return mask


def request(model: str = "lcm", prompt: str = "a red cat", seed: int = 7, **kwargs: Any) -> GenerateRequest:
    return GenerateRequest(model, prompt, seed, **kwargs)


def begin(engine: Engine, request: GenerateRequest, *, image=None, mask=None, size=(64, 64), key=0):
    return engine.begin(key, request, Canvas(*size, image, mask), engine.adapter(request))


def run(engine: Engine, row):
    while not row.done:
        engine.step([row])
    return row


def drain(engine: Engine, waiting) -> None:
    """A new row joins before each step; rows leave when they are done: they meet at all stages of their ways."""
    waiting, going = list(waiting), []
    while waiting or going:
        if waiting:
            going.append(waiting.pop(0))
        engine.step(going)
        going = [row for row in going if not row.done]


def floats(engine: Engine, row) -> np.ndarray:
    """The picture before it is rounded to bytes: (H, W, 3) in 0..1."""
    runner: Runner = engine._served[row.bucket.model].runner
    with torch.inference_mode():
        return runner.networks.decode(row.latents[None])[0].permute(1, 2, 0).numpy()


def seeded(seed: int = 7) -> torch.Generator:
    return torch.Generator().manual_seed(seed)

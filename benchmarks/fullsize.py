"""Every mode on models of the real sizes, with random weights: do they run, how long, in how much memory?

The checkpoints (``lcm_rt.bench.random_weights``) are written once, in half precision, to a folder (SD1.5 with its
companions 4 GB, SDXL 10 GB), and are loaded as a served model would be. Their pictures mean nothing; their times do.

    python benchmarks/fullsize.py sd [--size 512] [--steps 4] [--folder DIR] [--output FILE]
    python benchmarks/fullsize.py sdxl --size 1024
"""

from __future__ import annotations

import argparse
import json
import resource
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lcm_rt.bench import random_weights
from lcm_rt.bench.surroundings import surroundings
from lcm_rt.engine.engine import Engine
from lcm_rt.errors import LcmError
from lcm_rt.images import Canvas
from lcm_rt.types import GenerateRequest


def peak_gb() -> float:
    """The most that the device has held, or without one the process."""
    held = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0
    return round((held or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024) / 1e9, 2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("family", choices=random_weights.FAMILIES)
    parser.add_argument("--size", type=int, help="side of the pictures in pixels, else the model's")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--repeat", type=int, default=2, help="the least time of so many counts")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--vae", choices=["tiny", "full"], default="tiny")
    parser.add_argument("--folder", type=Path, default=random_weights.ROOT)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()

    about = surroundings()
    folder, family, tiny_vae = options.folder, options.family, options.vae == "tiny"
    random_weights.write(folder, family)
    *_, lora = random_weights.write_companions(folder, family)
    spec = random_weights.spec_of(folder, family, tiny_vae=tiny_vae, companions=True)
    engine = Engine(device=options.device)
    begun_at = time.perf_counter()
    parts, size = engine.locate(spec, lambda stage, fraction: None)
    engine.load(spec, parts, lambda stage, fraction: None)
    loaded = time.perf_counter() - begun_at
    print(f"{options.family} on {engine.device_name}: {size / 1e9:.1f} GB of weights, loaded in {loaded:.1f} s")

    side = options.size or spec.size
    picture = np.random.default_rng(0).integers(0, 256, (side, side, 3), dtype=np.uint8)
    mask = np.zeros((side, side), dtype=bool)
    mask[side // 4 : side // 2, side // 4 : side // 2] = True
    modes: dict[str, tuple[Canvas, dict[str, Any]]] = {
        "text to image": (Canvas(side, side), {}),
        "image to image": (Canvas(side, side, picture), {"strength": 0.6}),
        "inpainting": (Canvas(side, side, picture, mask), {"strength": 1.0}),
        "ControlNet inpainting": (Canvas(side, side, picture, mask), {"strength": 1.0, "controlnet_inpaint": True}),
        "LoRA": (Canvas(side, side), {"lora": str(lora)}),
    }
    results: dict[str, Any] = {}

    def run(name: str, wanted: list[tuple[Canvas, dict[str, Any]]]) -> None:
        best: dict[str, float] = {}
        for _ in range(options.repeat):
            begun_at = time.perf_counter()
            rows = []
            for seed, (canvas, fields) in enumerate(wanted):
                request = GenerateRequest(
                    options.family, "a red cat", seed, num_inference_steps=options.steps, **fields
                )
                rows.append(engine.begin(seed, request, canvas, engine.adapter(request)))
            while not rows[0].done:
                engine.step(rows)
            for done in engine.finish(rows):
                if isinstance(done, LcmError):
                    raise done
                assert done.pixels.shape == (side, side, 3)
            total = time.perf_counter() - begun_at
            if not best or total < best["total"]:
                best = {**rows[0].timings, "total": total}
        results[name] = {stage: round(seconds, 4) for stage, seconds in best.items()} | {"peak_gb": peak_gb()}
        print(f"{name:24}", "  ".join(f"{k} {v:.3f}" for k, v in results[name].items()), flush=True)

    for name, one in modes.items():
        run(name, [one])
    run("all of them in one batch", list(modes.values()))

    if options.output:
        about |= {
            "device": engine.device_name,
            "threads": torch.get_num_threads(),
            "weights_gb": size / 1e9,
            "load_seconds": loaded,
            "results": results,
        }
        options.output.write_text(json.dumps(about, indent=1) + "\n")


if __name__ == "__main__":
    main()

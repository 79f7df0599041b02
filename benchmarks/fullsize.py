"""Every mode on models of the real sizes, with random weights: do they run, how long, in how much memory?

The checkpoints are written once, in half precision, to a folder (SD1.5 with its companions 6 GB, SDXL 10 GB), and are
loaded as a served model would be. Their pictures mean nothing; their times do.

    python benchmarks/fullsize.py sd [--size 512] [--steps 4] [--folder DIR] [--output FILE]
    python benchmarks/fullsize.py sdxl --size 1024
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import platform
import resource
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL, AutoencoderTiny, ControlNetModel, LCMScheduler, UNet2DConditionModel
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
from safetensors.torch import save_file
from tokenizers.pre_tokenizers import ByteLevel
from transformers import CLIPConfig, CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from lcm_rt.catalog import Choice, ModelSpec
from lcm_rt.engine.engine import Engine
from lcm_rt.errors import LcmError
from lcm_rt.images import Canvas
from lcm_rt.types import GenerateRequest

UNETS: dict[str, dict[str, Any]] = {
    "sd": {
        "sample_size": 64,
        "block_out_channels": (320, 640, 1280, 1280),
        "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
        "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
        "attention_head_dim": 8,
        "cross_attention_dim": 768,
    },
    "sdxl": {
        "sample_size": 128,
        "block_out_channels": (320, 640, 1280),
        "down_block_types": ("DownBlock2D",) + ("CrossAttnDownBlock2D",) * 2,
        "up_block_types": ("CrossAttnUpBlock2D",) * 2 + ("UpBlock2D",),
        "attention_head_dim": [5, 10, 20],
        "transformer_layers_per_block": [1, 2, 10],
        "cross_attention_dim": 2048,
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
    },
}
VAE = {
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "block_out_channels": (128, 256, 512, 512),
    "layers_per_block": 2,
}
CLIP_L = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
CLIP_G = {"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 20}
VISION_L = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "patch_size": 14,
}


def write(folder: Path, family: str) -> None:
    """A whole model folder with random weights, its ControlNet and its safety checker."""
    config = UNETS[family]

    def save(build: Any, name: str, *args: Any, **kwargs: Any) -> None:
        if not (folder / name / "config.json").is_file():
            network = build(*args, **kwargs).to(torch.float16)
            network.save_pretrained(folder / name)

    torch.manual_seed(0)
    save(UNet2DConditionModel, "unet", **config, time_cond_proj_dim=256)
    shared = {key: value for key, value in config.items() if key not in ("sample_size", "up_block_types")}
    save(ControlNetModel, "controlnet", **shared)
    save(AutoencoderKL, "vae", **VAE, scaling_factor=0.18215 if family == "sd" else 0.13025)
    save(AutoencoderTiny, "../tiny_vae")
    save(StableDiffusionSafetyChecker, "safety_checker", CLIPConfig(vision_config=VISION_L, projection_dim=768))
    ends = {"bos_token_id": 49406, "eos_token_id": 49407, "pad_token_id": 49407}
    save(CLIPTextModel, "text_encoder", CLIPTextConfig(**CLIP_L, projection_dim=768, **ends))
    parts = {
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
        "scheduler": ["diffusers", "LCMScheduler"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
    }
    tokenizers = ["tokenizer"]
    if family == "sdxl":
        big = CLIPTextConfig(**CLIP_G, projection_dim=1280, **ends)
        save(CLIPTextModelWithProjection, "text_encoder_2", big)
        parts |= {
            "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"],
            "tokenizer_2": ["transformers", "CLIPTokenizer"],
        }
        tokenizers.append("tokenizer_2")
    for name in tokenizers:
        write_tokenizer(folder / name)
    scheduler = LCMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1)
    scheduler.save_pretrained(folder / "scheduler")
    (folder / "model_index.json").write_text(json.dumps(parts))


def write_tokenizer(folder: Path) -> None:
    """Bytes as tokens: what a text means is nothing to random weights."""
    folder.mkdir(parents=True, exist_ok=True)
    letters = sorted(ByteLevel.alphabet())
    vocabulary = {word: i for i, word in enumerate(letters + [f"{letter}</w>" for letter in letters])}
    vocabulary |= {"<|startoftext|>": 49406, "<|endoftext|>": 49407}
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    special = {"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>"}
    config = {"tokenizer_class": "CLIPTokenizer", "model_max_length": 77, "unk_token": "<|endoftext|>", **special}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def write_lora(file: Path, unet: Path) -> None:
    """Rank 16 on every attention layer of ``unet``, in peft's format."""
    torch.manual_seed(1)
    with torch.device("meta"):
        network = UNet2DConditionModel.from_config(UNet2DConditionModel.load_config(unet))
    tensors = {}
    for name, module in network.named_modules():
        if isinstance(module, torch.nn.Linear) and ".attn" in name:
            tensors[f"unet.{name}.lora_A.weight"] = torch.randn(16, module.in_features).half() * 0.01
            tensors[f"unet.{name}.lora_B.weight"] = torch.randn(module.out_features, 16).half() * 0.01
    save_file(tensors, file)


def peak_gb() -> float:
    """The most that the device has held, or without one the process."""
    held = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0
    return round((held or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024) / 1e9, 2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("family", choices=UNETS)
    parser.add_argument("--size", type=int, default=512)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--repeat", type=int, default=2, help="the least time of so many counts")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--vae", choices=["tiny", "full"], default="tiny")
    parser.add_argument("--folder", type=Path, default=Path("/tmp/lcm-rt-fullsize"))
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()

    folder = options.folder / options.family
    write(folder, options.family)
    lora = options.folder / f"{options.family}-lora.safetensors"
    write_lora(lora, folder / "unet")
    spec = ModelSpec(
        name=options.family,
        source=str(folder),
        licence="none",
        size=options.size,
        tiny_vae=str(options.folder / "tiny_vae"),
        controlnet=str(folder / "controlnet"),
        safety=str(folder / "safety_checker"),
    )
    engine = Engine(device=options.device, choice=Choice(vae=options.vae))
    begun_at = time.perf_counter()
    parts, size = engine.locate(spec, lambda stage, fraction: None)
    engine.load(spec, parts, lambda stage, fraction: None)
    loaded = time.perf_counter() - begun_at
    print(f"{options.family} on {engine.device_name}: {size / 1e9:.1f} GB of weights, loaded in {loaded:.1f} s")

    side = options.size
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
        versions = {name: importlib.metadata.version(name) for name in ("torch", "diffusers", "transformers")}
        about = {
            "command": " ".join(["python", *sys.argv]),
            "device": engine.device_name,
            "machine": platform.platform(),
            "python": platform.python_version(),
            "threads": torch.get_num_threads(),
            **versions,
            "date": time.strftime("%Y-%m-%d", time.gmtime()),
            "weights_gb": size / 1e9,
            "load_seconds": loaded,
            "results": results,
        }
        options.output.write_text(json.dumps(about, indent=1) + "\n")


if __name__ == "__main__":
    main()

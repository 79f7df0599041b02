"""Models of the real sizes with random weights, in the real formats: pictures without meaning, times that count.

Weights are normal and never nought, for a GPU multiplies noughts faster. Each folder is written once, beside its place,
and moved there when it is whole, so that one whose writing was cut is written anew::

    ROOT/sd           the model, with its own VAE (AutoencoderKL)
    ROOT/sd-taesd     the same networks, with the tiny VAE in its place
    ROOT/sd-controlnet, ROOT/sd-safety, ROOT/sd-lora.safetensors
"""

from __future__ import annotations

import json
import math
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, get_args

import torch
import transformers
from diffusers import AutoencoderKL, AutoencoderTiny, ControlNetModel, LCMScheduler, UNet2DConditionModel
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
from safetensors.torch import save_file
from tokenizers.pre_tokenizers import ByteLevel
from torch import nn
from transformers import CLIPConfig, CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from lcm_rt.catalog import ModelSpec

Family = Literal["sd", "sdxl", "tiny"]

FAMILIES: tuple[Family, ...] = get_args(Family)

ROOT = Path(tempfile.gettempdir()) / "lcm-rt-random-weights"
"""Where they lie when nobody says: SD1.5 takes 2.2 GB and XL 7 GB, companions 1.4 and 3.2 GB more."""

SIDES: dict[Family, int] = {"sd": 512, "sdxl": 1024, "tiny": 64}
"""Pixels of a side of each family's pictures."""

_CROSS_DOWN, _CROSS_UP = "CrossAttnDownBlock2D", "CrossAttnUpBlock2D"

_UNETS: dict[Family, dict[str, Any]] = {
    "sd": {
        "sample_size": 64,
        "block_out_channels": (320, 640, 1280, 1280),
        "down_block_types": (_CROSS_DOWN,) * 3 + ("DownBlock2D",),
        "up_block_types": ("UpBlock2D",) + (_CROSS_UP,) * 3,
        "attention_head_dim": 8,
        "cross_attention_dim": 768,
    },
    "sdxl": {
        "sample_size": 128,
        "block_out_channels": (320, 640, 1280),
        "down_block_types": ("DownBlock2D",) + (_CROSS_DOWN,) * 2,
        "up_block_types": (_CROSS_UP,) * 2 + ("UpBlock2D",),
        "attention_head_dim": [5, 10, 20],
        "transformer_layers_per_block": [1, 2, 10],
        "cross_attention_dim": 2048,
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
    },
    "tiny": {
        "sample_size": 8,
        "block_out_channels": (32, 64),
        "layers_per_block": 1,
        "down_block_types": (_CROSS_DOWN, "DownBlock2D"),
        "up_block_types": ("UpBlock2D", _CROSS_UP),
        "attention_head_dim": 2,
        "norm_num_groups": 8,
        "cross_attention_dim": 32,
    },
}

_CLIP_L = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
_CLIP_G = {"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 20}
_CLIP_TINY = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
_VISION_L = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}


def write(root: Path, family: Family, *, device: str = "cpu") -> Path:
    """The model folder of ``family``, with its own VAE; ``device`` draws the numbers, a GPU in a fraction of the time.

    Beside it, ``taesd_of`` is the same model with the tiny VAE.
    """
    folder = _once(root / family, lambda new: _write_model(new, family, device))

    def with_tiny_vae(new: Path) -> None:
        for part in folder.iterdir():
            if part.is_dir() and part.name != "vae":
                (new / part.name).symlink_to(Path("..") / family / part.name)
        index = json.loads((folder / "model_index.json").read_text())
        (new / "model_index.json").write_text(json.dumps(index | {"vae": ["diffusers", "AutoencoderTiny"]}))
        _save(AutoencoderTiny, new / "vae", device, **_tiny_vae(family))

    _once(taesd_of(root, family), with_tiny_vae)
    return folder


def taesd_of(root: Path, family: Family) -> Path:
    """Where ``write`` leaves the model with the tiny VAE."""
    return root / f"{family}-taesd"


def write_companions(root: Path, family: Family, *, device: str = "cpu") -> tuple[Path, Path, Path]:
    """Folders of a ControlNet and of a safety checker that flags nothing, and the file of a LoRA of rank 16."""
    config = {key: value for key, value in _UNETS[family].items() if key not in ("sample_size", "up_block_types")}
    vision = {**_VISION_L, "patch_size": 14} if family != "tiny" else {**_CLIP_TINY, "image_size": 32, "patch_size": 8}
    checker = CLIPConfig(vision_config=vision, projection_dim=768 if family != "tiny" else 16)
    lora = root / f"{family}-lora.safetensors"
    if not lora.is_file():
        _write_lora(lora, write(root, family, device=device) / "unet")
    return (
        _once(root / f"{family}-controlnet", lambda new: _save(ControlNetModel, new, device, **config)),
        _once(root / f"{family}-safety", lambda new: _save(StableDiffusionSafetyChecker, new, device, checker)),
        lora,
    )


def spec_of(root: Path, family: Family, *, tiny_vae: bool = True, companions: bool = False) -> ModelSpec:
    """The row of the catalogue that means what ``write``, and with ``companions`` ``write_companions``, wrote."""
    return ModelSpec(
        name=family,
        source=str(taesd_of(root, family) if tiny_vae else root / family),
        licence="none",
        size=SIDES[family],
        controlnet=str(root / f"{family}-controlnet") if companions else None,
        safety=str(root / f"{family}-safety") if companions else None,
    )


def _write_model(folder: Path, family: Family, device: str) -> None:
    ends = {"bos_token_id": 49406, "eos_token_id": 49407, "pad_token_id": 49407}
    clip = _CLIP_TINY if family == "tiny" else _CLIP_L
    _save(UNet2DConditionModel, folder / "unet", device, **_UNETS[family], time_cond_proj_dim=256)
    _save(AutoencoderKL, folder / "vae", device, **_vae(family))
    _save(CLIPTextModel, folder / "text_encoder", device, CLIPTextConfig(**clip, projection_dim=768, **ends))
    parts = {
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
        "scheduler": ["diffusers", "LCMScheduler"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
    }
    tokenizers = ["tokenizer"]
    if family == "sdxl":
        big = CLIPTextConfig(**_CLIP_G, projection_dim=1280, **ends)
        _save(CLIPTextModelWithProjection, folder / "text_encoder_2", device, big)
        parts |= {
            "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"],
            "tokenizer_2": ["transformers", "CLIPTokenizer"],
        }
        tokenizers.append("tokenizer_2")
    for name in tokenizers:
        _write_tokenizer(folder / name)
    scheduler = LCMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1)
    scheduler.save_pretrained(folder / "scheduler")
    (folder / "model_index.json").write_text(json.dumps(parts))


def _vae(family: Family) -> dict[str, Any]:
    tiny = family == "tiny"
    return {
        "down_block_types": ("DownEncoderBlock2D",) * 4,
        "up_block_types": ("UpDecoderBlock2D",) * 4,
        "block_out_channels": (16, 16, 16, 16) if tiny else (128, 256, 512, 512),
        "layers_per_block": 1 if tiny else 2,
        "norm_num_groups": 8 if tiny else 32,
        "sample_size": SIDES[family],
        "scaling_factor": 0.13025 if family == "sdxl" else 0.18215,
    }


def _tiny_vae(family: Family) -> dict[str, Any]:
    if family != "tiny":
        return {}
    return {
        "encoder_block_out_channels": (16,) * 4,
        "decoder_block_out_channels": (16,) * 4,
        "num_encoder_blocks": (1, 1, 1, 1),
        "num_decoder_blocks": (1, 1, 1, 1),
    }


def _once(folder: Path, write: Callable[[Path], None]) -> Path:
    """``folder``, written by ``write`` unless it is there."""
    if not folder.is_dir():
        folder.parent.mkdir(parents=True, exist_ok=True)
        # Another process may write the same; whoever is first to move it there has written it.
        new = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
        try:
            write(new)
            new.chmod(0o755)
            new.rename(folder)
        except OSError:
            if not folder.is_dir():
                raise
        finally:
            shutil.rmtree(new, ignore_errors=True)
    return folder


def _save(build: Any, folder: Path, device: str, *args: Any, **config: Any) -> None:
    """A network in half precision, its weights drawn anew: a layer's output is about as large as its input."""
    with torch.device("meta"):
        network: nn.Module = build(*args, **config)
    # Not the method of diffusers' own, which warns of what ``from_pretrained`` would do better.
    network = nn.Module.to(network, torch.float16).to_empty(device=device)
    random = torch.Generator(device).manual_seed(0)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            parameter.normal_(generator=random)
            if parameter.dim() > 1:
                parameter.div_(math.sqrt(parameter[0].numel()))
            elif name.endswith("bias"):
                parameter.mul_(0.02)
            else:  # scales of norms, and the safety checker's thresholds, which no cosine reaches
                parameter.abs_().mul_(0.02).add_(1.0)
    transformers.utils.logging.disable_progress_bar()
    network.save_pretrained(folder)  # type: ignore[operator]


def _write_tokenizer(folder: Path) -> None:
    """Bytes as tokens: what a text means is nothing to random weights."""
    folder.mkdir()
    letters = sorted(ByteLevel.alphabet())
    vocabulary = {word: i for i, word in enumerate(letters + [f"{letter}</w>" for letter in letters])}
    vocabulary |= {"<|startoftext|>": 49406, "<|endoftext|>": 49407}
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    special = {"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>"}
    config = {"tokenizer_class": "CLIPTokenizer", "model_max_length": 77, "unk_token": "<|endoftext|>", **special}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def _write_lora(file: Path, unet: Path) -> None:
    """Every attention layer of ``unet``, in peft's format."""
    random = torch.Generator().manual_seed(1)
    with torch.device("meta"):
        network = UNet2DConditionModel.from_config(UNet2DConditionModel.load_config(unet))
    tensors = {}
    for name, module in network.named_modules():
        if isinstance(module, nn.Linear) and ".attn" in name:
            for side, shape in (("A", (16, module.in_features)), ("B", (module.out_features, 16))):
                tensors[f"unet.{name}.lora_{side}.weight"] = torch.randn(shape, generator=random).half() * 0.01
    new = file.with_suffix(f".{os.getpid()}")
    save_file(tensors, new)
    new.rename(file)

"""Tiny LoRA files with random weights, in the formats that trainers write, for the folders of ``checkpoints``."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import safe_open
from safetensors.torch import save_file

Format = Literal["kohya", "peft", "diffusers"]

ATTENTION = re.compile(
    r".*\.(to_[qkv]|to_out\.0|proj_in|proj_out|ff\.net\.0\.proj|ff\.net\.2)|.*self_attn\.\w+_proj|.*\.fc[12]"
)
CONVOLUTIONS = re.compile(r"conv_(in|out)|.*\.(conv\d?|conv_shortcut|time_emb_proj)|(time|add)_embedding\.linear_\d")

# What trainers call the text encoders of a model with one, and of a model with two.
KOHYA = {
    "sd": {"unet": "lora_unet", "text_encoder": "lora_te"},
    "sdxl": {"unet": "lora_unet", "text_encoder": "lora_te1", "text_encoder_2": "lora_te2"},
}


def write_lora(
    path: Path,
    folder: Path,
    *,
    format: Format = "kohya",
    rank: int = 4,
    alpha: float | None = None,
    text_encoder: bool = True,
    conv: bool = False,
    sgm: bool = False,
    scale: float = 0.1,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
) -> None:
    """A LoRA for the model in ``folder``, as the file ``path``.

    Args:
        format: ``kohya`` (``lora_unet_..._to_q.lora_down.weight``), ``peft`` (``unet...to_q.lora_A.weight``), or
            ``diffusers``, the old one (``unet...processor.to_q_lora.down.weight``). The weights of a seed are the same
            in all three.
        rank: of every layer.
        alpha: the file's factor is alpha / rank; None writes none, which means 1. The old format has none.
        text_encoder: also layers of the text encoders.
        conv: also the convolutions and embeddings of the UNet.
        sgm: name the blocks of the UNet as SDXL's first code did, and its trainers still do; only for ``kohya``.
        scale: standard deviation of the weights.
        seed: of the weights.
        dtype: of the weights.
    """
    generator = torch.Generator().manual_seed(seed)
    tensors: dict[str, torch.Tensor] = {}
    # What trainers that name blocks as diffusers does leave out, and its reader does not know.
    left_out = "add_embedding" if format == "kohya" and not sgm else "-"
    parts = [part for part in ("unet", "text_encoder", "text_encoder_2") if (folder / part).is_dir()]
    family = "sdxl" if len(parts) == 3 else "sd"
    for part in parts if text_encoder else parts[:1]:
        for name, (outputs, *inputs) in _layers(folder / part, conv):
            if name.startswith(left_out):
                continue
            down = torch.randn(rank, *inputs, generator=generator) * scale
            up = torch.randn(outputs, rank, *(1 for _ in inputs[1:]), generator=generator) * scale
            if format == "kohya":
                spelt = _sgm(name, folder) if sgm and part == "unet" else name
                prefix = f"{KOHYA[family][part]}_{spelt.replace('.', '_')}"
                tensors |= {f"{prefix}.lora_down.weight": down, f"{prefix}.lora_up.weight": up}
                if alpha is not None:
                    tensors[f"{prefix}.alpha"] = torch.tensor(float(alpha))
            else:
                ends = (".lora_A", ".lora_B") if format == "peft" else _old_ends(name)
                stem = name if format == "peft" else _old_stem(name)
                tensors |= {f"{part}.{stem}{ends[0]}.weight": down, f"{part}.{stem}{ends[1]}.weight": up}
    metadata = None
    if format == "peft" and alpha is not None:
        settings: dict[str, Any] = {}
        for part in parts:
            own = [key.split(".")[1:-2] for key in tensors if key.startswith(f"{part}.")]
            settings |= {f"{part}.r": rank, f"{part}.lora_alpha": alpha}
            settings[f"{part}.target_modules"] = sorted({".".join(name[-2:]) for name in own})
        metadata = {"format": "pt", "lora_adapter_metadata": json.dumps(settings)}
    save_file({key: tensor.to(dtype).contiguous() for key, tensor in tensors.items()}, path, metadata)


def _layers(folder: Path, conv: bool) -> list[tuple[str, list[int]]]:
    """Names and weight shapes of the layers that a LoRA addresses; the text encoder's in the names of its files."""
    (file,) = folder.glob("*.safetensors")
    with safe_open(file, framework="pt") as weights:
        shapes = {key.removesuffix(".weight"): weights.get_slice(key).get_shape() for key in sorted(weights.keys())}
    unet = folder.name == "unet"
    names = {name if unet else f"text_model.{name.removeprefix('text_model.')}": name for name in shapes}
    return [
        (name, shapes[origin])
        for name, origin in names.items()
        if not name.endswith(".bias")
        and (ATTENTION.fullmatch(name) or (unet and conv and CONVOLUTIONS.fullmatch(name)))
    ]


def _old_stem(name: str) -> str:
    if ".attn" in name and name.rpartition("attn")[2][2:].startswith("to_"):
        return re.sub(r"\.to_\w+(\.0)?$", ".processor", name)
    return re.sub(r"\.[qkv]_proj$|\.out_proj$", "", name)


def _old_ends(name: str) -> tuple[str, str]:
    if match := re.search(r"\.(?:to_(q|k|v|out)(?:\.0)?|(q|k|v|out)_proj)$", name):
        stem = f".to_{match[1] or match[2]}_lora"
    else:
        stem = ".lora_linear_layer" if "text_model" in name else ".lora"
    return f"{stem}.down", f"{stem}.up"


def _sgm(name: str, folder: Path) -> str:
    """The name of a UNet's module in the block naming of SDXL's first code."""
    outer = {
        "conv_in": "input_blocks.0.0",
        "conv_out": "out.2",
        "time_embedding.linear_1": "time_embed.0",
        "time_embedding.linear_2": "time_embed.2",
        "add_embedding.linear_1": "label_emb.0.0",
        "add_embedding.linear_2": "label_emb.0.2",
    }
    if name in outer:
        return outer[name]
    inner = {
        "conv1": "in_layers.2",
        "conv2": "out_layers.3",
        "time_emb_proj": "emb_layers.1",
        "conv_shortcut": "skip_connection",
    }
    layers = json.loads((folder / "unet" / "config.json").read_text())["layers_per_block"]
    side, *rest = name.split(".")
    if side == "mid_block":
        kind, number, *rest = rest
        return ".".join(("middle_block", str(1 if kind == "attentions" else 2 * int(number)), *map(_of(inner), rest)))
    block, kind, number, *rest = rest
    place = int(block) * (layers + 1) + (1 if side == "down_blocks" else 0)
    if kind == "downsamplers":
        return f"input_blocks.{place + layers}.0.op"
    if kind == "upsamplers":
        return f"output_blocks.{place + layers}.2.conv"
    blocks = "input_blocks" if side == "down_blocks" else "output_blocks"
    return ".".join((blocks, str(place + int(number)), "01"[kind == "attentions"], *map(_of(inner), rest)))


def _of(names: dict[str, str]):
    return lambda name: names.get(name, name)

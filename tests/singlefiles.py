"""Checkpoints in the original format, one file each, written from the tiny folders of ``checkpoints``.

The names are those of the original code, spelt out here and not taken from diffusers' tables, so that a test compares
two accounts of the format.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

Weights = dict[str, Tensor]

RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
UNET_ENDS = {
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
VAE_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
OPEN_CLIP = {
    "embeddings.token_embedding.weight": "token_embedding.weight",
    "embeddings.position_embedding.weight": "positional_embedding",
    "final_layer_norm.weight": "ln_final.weight",
    "final_layer_norm.bias": "ln_final.bias",
}
OPEN_CLIP_LAYER = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "self_attn.out_proj": "attn.out_proj",
}


def write_single_file(
    path: Path, folder: Path, *, dtype: torch.dtype | None = None, keep: Callable[[str], bool] = lambda name: True
) -> None:
    """Write the networks of ``folder`` ("sd" or "sdxl") to ``path``, with the odds and ends of published files.

    Args:
        dtype: of the floating-point weights; None leaves it as it is in the folder.
        keep: which of the original names to write.
    """
    weights = {f"model.diffusion_model.{name}": w for name, w in _unet(folder / "unet")}
    weights |= {f"first_stage_model.{name}": w for name, w in _vae(folder / "vae")}
    weights |= {"alphas_cumprod": torch.ones(1000), "model_ema.decay": torch.tensor(0.9999)}
    first = "conditioner.embedders.0" if (folder / "text_encoder_2").exists() else "cond_stage_model"
    weights |= {f"{first}.transformer.text_model.{name}": w for name, w in _clip(folder / "text_encoder").items()}
    weights[f"{first}.transformer.text_model.embeddings.position_ids"] = torch.arange(77)[None]
    weights[f"{first}.logit_scale"] = torch.tensor(4.6)
    if (folder / "text_encoder_2").exists():
        second = "conditioner.embedders.1.model"
        weights |= {f"{second}.{name}": w for name, w in _open_clip(folder / "text_encoder_2")}
        weights[f"{second}.logit_scale"] = torch.tensor(4.6)
    save_file(
        {
            name: (weight.to(dtype) if weight.is_floating_point() else weight).contiguous()
            for name, weight in weights.items()
            if keep(name)
        },
        path,
        {"format": "pt"},
    )


def _load(folder: Path) -> Weights:
    (file,) = folder.glob("*.safetensors")
    return load_file(file)


def _renamed(name: str, table: dict[str, str]) -> str:
    for ours, theirs in table.items():
        if name.startswith(f"{ours}."):
            return theirs + name.removeprefix(ours)
    return name


def _unet(folder: Path) -> Iterator[tuple[str, Tensor]]:
    weights = _load(folder)
    rows = json.loads((folder / "config.json").read_text())["layers_per_block"] + 1  # a sampler counts as a row
    for name, weight in weights.items():
        where, *_ = name.split(".", 1)
        if where not in ("down_blocks", "mid_block", "up_blocks"):
            yield _renamed(name, UNET_ENDS), weight
            continue
        found = re.fullmatch(r"(?:down_blocks|mid_block|up_blocks)\.(?:(\d+)\.)?(\w+)\.(\d+)\.(.+)", name)
        assert found
        block, kind, number, rest = int(found[1] or 0), found[2], int(found[3]), found[4]
        if kind == "resnets":
            rest = _renamed(rest, RESNET)
        if where == "mid_block":
            yield f"middle_block.{2 * number if kind == 'resnets' else 1}.{rest}", weight
        elif kind == "downsamplers":
            yield f"input_blocks.{(block + 1) * rows}.0.{rest.replace('conv', 'op')}", weight
        elif kind == "upsamplers":
            attends = any(other.startswith(f"up_blocks.{block}.attentions.") for other in weights)
            yield f"output_blocks.{(block + 1) * rows - 1}.{2 if attends else 1}.{rest}", weight
        else:
            side, first = ("input", 1) if where == "down_blocks" else ("output", 0)
            yield f"{side}_blocks.{first + block * rows + number}.{int(kind == 'attentions')}.{rest}", weight


def _vae(folder: Path) -> Iterator[tuple[str, Tensor]]:
    weights = _load(folder)
    last = len(json.loads((folder / "config.json").read_text())["up_block_types"]) - 1
    for name, weight in weights.items():
        name = name.replace("conv_norm_out", "norm_out").replace("conv_shortcut", "nin_shortcut")
        name = re.sub(r"down_blocks\.(\d+)\.resnets\.(\d+)", r"down.\1.block.\2", name)
        name = re.sub(r"down_blocks\.(\d+)\.downsamplers\.0", r"down.\1.downsample", name)
        name = re.sub(r"up_blocks\.(\d+)\.resnets\.(\d+)", lambda m: f"up.{last - int(m[1])}.block.{m[2]}", name)
        name = re.sub(r"up_blocks\.(\d+)\.upsamplers\.0", lambda m: f"up.{last - int(m[1])}.upsample", name)
        name = re.sub(r"mid_block\.resnets\.(\d+)", lambda m: f"mid.block_{int(m[1]) + 1}", name)
        side, attention, rest = name.partition(".mid_block.attentions.0.")
        if attention:
            name = f"{side}.mid.attn_1.{_renamed(rest, VAE_ATTENTION)}"
            if weight.dim() == 2:
                weight = weight[:, :, None, None]  # a convolution there
        yield name, weight


def _clip(folder: Path) -> Weights:
    return {name.removeprefix("text_model."): weight for name, weight in _load(folder).items()}


def _open_clip(folder: Path) -> Iterator[tuple[str, Tensor]]:
    weights = _clip(folder)
    yield "text_projection", weights.pop("text_projection.weight").T
    for ours, theirs in OPEN_CLIP.items():
        yield theirs, weights.pop(ours)
    for name, weight in weights.items():
        layer, rest = re.fullmatch(r"encoder\.layers\.(\d+)\.(.+)", name).groups()
        fused = re.fullmatch(r"self_attn\.q_proj\.(weight|bias)", rest)
        if fused:
            parts = [weights[name.replace("q_proj", f"{letter}_proj")] for letter in "qkv"]
            yield f"transformer.resblocks.{layer}.attn.in_proj_{fused[1]}", torch.cat(parts)
        elif not re.match(r"self_attn\.[kv]_proj", rest):
            yield f"transformer.resblocks.{layer}.{_renamed(rest, OPEN_CLIP_LAYER)}", weight

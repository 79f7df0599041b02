"""The networks of one ``.safetensors`` checkpoint in the original format; knows no hub and no pipeline.

The format is the one of the first Stable Diffusion code (LDM, and SGM for XL): all networks in one file, under other
names than in diffusers. diffusers' converters rename them; sizes come from a folder in diffusers format, of which only
the ``config.json`` of each part is read. It is checked here that no weight is missing: diffusers would leave it empty.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from lcm_rt.errors import InputError, NotFound

# What the names of a part's weights begin with.
PREFIXES = {
    "unet": ("model.diffusion_model.",),
    "vae": ("first_stage_model.", "vae."),
    "text_encoder": ("cond_stage_model.", "conditioner.embedders.0."),
    "text_encoder_2": ("conditioner.embedders.1.",),
}
# The guidance embedding of a distilled UNet came after the format: converters to it keep diffusers' name or make one
# up, and diffusers' converter from it drops both.
GUIDANCE = (
    "model.diffusion_model.time_embedding.cond_proj.weight",
    "model.diffusion_model.time_embed.cond_proj.weight",
)


def load_network(kind: Any, part: str, file: Path, config: Path, dtype: torch.dtype) -> nn.Module:
    """One network of ``file``, in ``dtype`` and evaluation mode, on the CPU.

    Args:
        kind: its class: diffusers' UNet2DConditionModel or AutoencoderKL, transformers' CLIPTextModel or
            CLIPTextModelWithProjection.
        part: "unet", "vae", "text_encoder" or "text_encoder_2".
        file: the checkpoint; weights of any floating-point type.
        config: a folder in diffusers format; no weights of it are read.

    Raises:
        NotFound: the file is missing, or has no such part, or the folder has no configuration of it.
        InputError: the file is not a safetensors file or not such a checkpoint, or its weights are not those that the
            configuration asks for.
    """
    if not (config / part / "config.json").is_file():
        # diffusers would take the path for the name of a repository, and look into the cache of the hub.
        raise NotFound(f"{config.name} has no configuration of the {part}")
    weights = _read(file, part)
    try:
        build = _build_network if part in ("unet", "vae") else _build_text_encoder
        network: nn.Module = build(kind, part, weights, config, dtype)
    except Exception as error:
        raise InputError("model", f"the {part} of {file.name} does not fit the configuration {config.name}") from error
    missing = [name for name, weight in (*network.named_parameters(), *network.named_buffers()) if weight.is_meta]
    if missing:
        raise InputError("model", f"the {part} of {file.name} lacks weights, such as {missing[0]}")
    return network.eval()


def _read(file: Path, part: str) -> dict[str, Tensor]:
    """The weights of ``part`` under the names that they have in ``file``; no others are read."""
    if not file.is_file():
        raise NotFound(f"{file.name} is missing")
    try:
        with safe_open(file, framework="pt") as opened:
            names = list(opened.keys())
            weights = {name: opened.get_tensor(name) for name in names if name.startswith(PREFIXES[part])}
    except (OSError, SafetensorError) as error:
        # A pickle runs code of its author when it is opened.
        raise InputError(
            "model", f"{file.name} is not a safetensors file; pickled checkpoints (.ckpt, .bin) are never opened"
        ) from error
    if weights:
        return weights
    if any(name.startswith(prefixes) for prefixes in PREFIXES.values() for name in names):
        raise NotFound(f"{file.name} holds no {part}")
    raise InputError(
        "model", f"{file.name} is no checkpoint in the original format: it holds no {part}; is it a LoRA, or one part?"
    )


def _build_network(kind: Any, part: str, weights: dict[str, Tensor], config: Path, dtype: torch.dtype) -> Any:
    """A UNet or a VAE; weights that it lacks are left on the meta device.

    ``from_single_file`` uses the same converters, but it drops what the network has no place for, and fails over
    missing weights without naming one.
    """
    from diffusers.loaders import single_file_utils

    convert = getattr(single_file_utils, f"convert_ldm_{part}_checkpoint")
    settings = kind.load_config(config / part, local_files_only=True)
    converted = convert(weights, config=settings)
    for name in GUIDANCE:
        if name in weights:
            converted["time_embedding.cond_proj.weight"] = weights[name]
    with torch.device("meta"):
        network = kind.from_config(settings)
    converted = {name: weight.to(dtype) for name, weight in converted.items()}
    homeless = network.load_state_dict(converted, strict=False, assign=True).unexpected_keys
    if homeless:
        # A network without a part of itself would paint mud. Most of all a distilled UNet without its guidance.
        raise ValueError(f"no place for {homeless[0]}")
    return network


def _build_text_encoder(kind: Any, part: str, weights: dict[str, Tensor], config: Path, dtype: torch.dtype) -> Any:
    """A text encoder; weights that it lacks are left on the meta device, what it has no place for is dropped.

    Published files have such odds and ends: the numbers of the positions, the scale of CLIP's training.
    """
    from diffusers.loaders.single_file_utils import create_diffusers_clip_model_from_ldm

    return create_diffusers_clip_model_from_ldm(
        kind, weights, subfolder=part, config=str(config), torch_dtype=dtype, local_files_only=True
    )

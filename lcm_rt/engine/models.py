"""A model folder in diffusers format, loaded; knows no request and no batch.

Only the networks and their loaders come from diffusers and transformers. Its pipelines and schedulers keep the state of
a call and one schedule for a whole batch, so ``engine`` and ``sampling`` take their place. What a model is (sizes,
noise rule, how it takes guidance) is read from its configuration files: a new model is a new folder, never new code.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lcm_rt.catalog import ModelSpec
from lcm_rt.engine.sampling import Schedule
from lcm_rt.errors import InputError, NotFound


@dataclass(frozen=True, slots=True, eq=False)
class Model:
    """The networks of one model and the figures that the rest of the engine needs of them."""

    name: str
    side: int
    tokenizer: Any
    text_encoder: Any
    unet: Any
    vae: Any
    schedule: Schedule
    device: torch.device
    dtype: torch.dtype
    max_tokens: int
    latent_channels: int
    pixels_per_latent: int
    guidance_dim: int | None  # width of the guidance embedding that the UNet was distilled with, if it was


def load_model(spec: ModelSpec, device: torch.device, dtype: torch.dtype) -> Model:
    """Load the folder of ``spec`` on ``device``.

    Raises:
        NotFound: a part is missing, or has its weights in another form than safetensors.
        InputError: the folder holds a kind of model that is not served here.
    """
    import diffusers
    import transformers

    # A server's log is no place for progress bars, nor for remarks about keys that diffusers itself wrote.
    diffusers.utils.logging.disable_progress_bar()
    diffusers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()

    index = _read_json(spec.path / "model_index.json")
    parts = {name: entry[1] for name, entry in index.items() if isinstance(entry, list)}
    if parts.get("unet") != "UNet2DConditionModel" or "text_encoder_2" in parts:
        raise InputError("model", f"{spec.name} is not a model of the Stable Diffusion 1 family")
    vae_class = parts.get("vae")
    if vae_class not in ("AutoencoderKL", "AutoencoderTiny"):
        raise InputError("model", f"{spec.name} has a VAE of unknown class {vae_class!r}")

    schedule = Schedule.from_config(_read_json(spec.path / "scheduler" / "scheduler_config.json"))
    unet = _load_network(diffusers.UNet2DConditionModel, spec.path / "unet", device, torch_dtype=dtype)
    vae = _load_network(getattr(diffusers, vae_class), spec.path / "vae", device, torch_dtype=dtype)
    text_encoder = _load_network(transformers.CLIPTextModel, spec.path / "text_encoder", device, dtype=dtype)
    if unet.config.in_channels != vae.config.latent_channels:
        raise InputError(
            "model", f"the UNet of {spec.name} takes {unet.config.in_channels} channels: an inpainting UNet"
        )
    blocks = vae.config.encoder_block_out_channels if vae_class == "AutoencoderTiny" else vae.config.block_out_channels
    return Model(
        name=spec.name,
        side=spec.size,
        tokenizer=_load_tokenizer(transformers.CLIPTokenizer, spec.path / "tokenizer"),
        text_encoder=text_encoder,
        unet=unet,
        vae=vae,
        schedule=schedule,
        device=device,
        dtype=dtype,
        # The tokenizer's own limit is 1e30 where its tokenizer_config.json is missing.
        max_tokens=text_encoder.config.max_position_embeddings,
        latent_channels=vae.config.latent_channels,
        pixels_per_latent=2 ** (len(blocks) - 1),
        guidance_dim=unet.config.time_cond_proj_dim,
    )


def _read_json(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise NotFound(f"{path} is missing or is not JSON") from error
    if not isinstance(data, dict):
        raise NotFound(f"{path} is not a JSON object")
    return data


def _load_network(kind: Any, folder: Path, device: torch.device, **kwargs: Any) -> Any:
    """One network, in evaluation mode and without gradients."""
    found = sorted(folder.glob("*.safetensors"))
    if not found:
        # A pickle runs code of its author when it is opened.
        raise NotFound(f"{folder} holds no .safetensors weights; pickled weights (.bin, .ckpt) are never opened")
    variant = None if any(".fp16." not in file.name for file in found) else "fp16"
    loaded = _from_folder(kind, folder, use_safetensors=True, variant=variant, **kwargs)
    # Channels last is how the convolutions of both devices work inside: a third off the VAE decoder's time on a CPU.
    return loaded.to(device, memory_format=torch.channels_last).eval().requires_grad_(False)


def _load_tokenizer(kind: Any, folder: Path) -> Any:
    if not any((folder / name).is_file() for name in ("tokenizer.json", "vocab.json")):
        raise NotFound(f"{folder} holds no tokenizer.json or vocab.json")  # without one, it would know no word
    return _from_folder(kind, folder)


def _from_folder(kind: Any, folder: Path, **kwargs: Any) -> Any:
    try:
        return kind.from_pretrained(folder, local_files_only=True, **kwargs)
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise NotFound(f"{folder} cannot be loaded as {kind.__name__}") from error

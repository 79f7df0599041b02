"""The networks of one model, loaded; knows no request and no batch.

Only the networks and their loaders come from diffusers and transformers. Its pipelines and schedulers keep the state of
a call and one schedule for a whole batch, so ``engine`` and ``sampling`` take their place. What a model is (family,
sizes, noise rule, how it takes guidance) is read from its configuration files: a new model is a new folder, never new
code.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lcm_rt.catalog import ModelSpec
from lcm_rt.engine import singlefile
from lcm_rt.engine.adapters import fuse, read_adapter
from lcm_rt.engine.folders import variant_of
from lcm_rt.engine.safety import SafetyChecker
from lcm_rt.engine.sampling import Schedule
from lcm_rt.errors import InputError, NotFound
from lcm_rt.hub import Parts, read_header, read_json
from lcm_rt.types import MAX_SIDE

CONTROL_SCALE = {"sd": 0.5, "sdxl": 1.0}
"""Dose of the inpainting ControlNet's residuals: the default of diffusers' pipeline for each family."""


@dataclass(frozen=True, slots=True, eq=False)
class Model:
    """The networks of one model and the figures that the rest of the engine needs of them."""

    name: str
    side: int  # px of a picture whose size nobody gave
    steps: int  # when nobody gave a number
    readers: list[tuple[Any, Any]]  # (tokenizer, text encoder): one for Stable Diffusion, two for XL
    unet: Any
    vae: Any
    controlnet: Any | None
    safety: SafetyChecker | None
    schedule: Schedule
    device: torch.device
    dtype: torch.dtype
    max_tokens: int
    context_width: int  # of a token, as the UNet reads it
    pooled_width: int | None  # of a whole prompt, for XL
    zero_negative: bool  # an empty negative prompt is all noughts, not the encoder's idea of an empty text
    latent_channels: int
    pixels_per_latent: int
    guidance_dim: int | None  # width of the guidance embedding that the UNet was distilled with, if it was
    control_scale: float

    @property
    def takes_mask(self) -> bool:
        """An inpainting UNet, which reads the mask and the masked picture beside the latents."""
        return bool(self.unet.config.in_channels > self.latent_channels)

    @property
    def networks(self) -> dict[str, nn.Module]:
        """Those that a LoRA may address, by the name that it has for them."""
        named = {"unet": self.unet, "text_encoder": self.readers[0][1]}
        return named if len(self.readers) == 1 else named | {"text_encoder_2": self.readers[1][1]}

    @property
    def bytes(self) -> int:
        """Memory of all weights."""
        networks = [*self.networks.values(), self.vae, *([self.controlnet] if self.controlnet else [])]
        own = sum(p.nbytes for network in networks for p in network.parameters())
        return int(own + (self.safety.bytes if self.safety else 0))


def load_model(spec: ModelSpec, parts: Parts, device: torch.device, dtype: torch.dtype) -> Model:
    """Load what lies at ``parts`` on ``device``.

    Raises:
        NotFound: a part is missing, or has its weights in another form than safetensors.
        InputError: this is a kind of model that is not served here.
    """
    try:
        return _load(spec, parts, device, dtype)
    finally:
        # The loaders set the default of the whole process, and leave it so when they fail.
        torch.set_default_dtype(torch.float32)


def _load(spec: ModelSpec, parts: Parts, device: torch.device, dtype: torch.dtype) -> Model:
    import diffusers
    import transformers

    # A server's log is no place for progress bars, nor for remarks about keys that diffusers itself wrote.
    diffusers.utils.logging.disable_progress_bar()
    diffusers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()

    folder = parts.config or parts.base
    index = read_json(folder / "model_index.json")
    classes = {name: entry[1] for name, entry in index.items() if isinstance(entry, list)}
    family = "sdxl" if classes.get("text_encoder_2") else "sd"
    if classes.get("unet") != "UNet2DConditionModel" or classes.get("text_encoder") != "CLIPTextModel":
        raise InputError("model", f"{spec.name} is of neither the Stable Diffusion 1 family nor the XL one")
    vae_class = "AutoencoderTiny" if parts.tiny_vae else classes.get("vae")
    if vae_class not in ("AutoencoderKL", "AutoencoderTiny"):
        raise InputError("model", f"{spec.name} has a VAE of unknown class {vae_class!r}")

    # What a LoRA is merged into is rounded once, after it.
    precision = torch.float32 if parts.lcm_lora else dtype

    def load(kind: Any, part: str, elsewhere: Path | None = None) -> Any:
        if elsewhere is None and parts.base.is_file():
            return singlefile.load_network(kind, part, parts.base, folder, precision)
        return _load_folder(kind, elsewhere or parts.base / part, precision)

    schedule = Schedule.from_config(
        read_json(folder / "scheduler" / "scheduler_config.json"), turbo=parts.distillation == "turbo"
    )
    unet = load(diffusers.UNet2DConditionModel, "unet", parts.unet)
    vae = load(getattr(diffusers, vae_class), "vae", parts.tiny_vae)
    text_encoder = load(transformers.CLIPTextModel, "text_encoder")
    readers = [(_load_tokenizer(transformers.CLIPTokenizer, folder / "tokenizer"), text_encoder)]
    pooled_width = None
    if family == "sdxl":
        second = load(transformers.CLIPTextModelWithProjection, "text_encoder_2")
        readers.append((_load_tokenizer(transformers.CLIPTokenizer, folder / "tokenizer_2"), second))
        pooled_width = second.config.projection_dim
    latent_channels = vae.config.latent_channels
    if unet.config.in_channels not in (latent_channels, 2 * latent_channels + 1):
        raise InputError("model", f"the UNet of {spec.name} takes {unet.config.in_channels} channels")
    context_width = sum(encoder.config.hidden_size for _, encoder in readers)
    if unet.config.cross_attention_dim != context_width:
        raise InputError("model", f"the UNet of {spec.name} does not read what its text encoders write")
    blocks = vae.config.encoder_block_out_channels if vae_class == "AutoencoderTiny" else vae.config.block_out_channels
    pixels_per_latent = 2 ** (len(blocks) - 1)
    side, steps = spec.size, spec.steps
    if not spec.complete:  # what its maker says; 512 is everybody's guess
        side = min(MAX_SIDE, (unet.config.sample_size or 64) * pixels_per_latent)
        steps = 1 if parts.distillation == "turbo" else steps
    model = Model(
        name=spec.name,
        side=side,
        steps=steps,
        readers=readers,
        unet=unet,
        vae=vae,
        controlnet=load(diffusers.ControlNetModel, "controlnet", parts.controlnet) if parts.controlnet else None,
        safety=SafetyChecker(parts.safety, device, dtype) if parts.safety else None,
        schedule=schedule,
        device=device,
        dtype=dtype,
        # The tokenizer's own limit is 1e30 where its tokenizer_config.json is missing.
        max_tokens=text_encoder.config.max_position_embeddings,
        context_width=context_width,
        pooled_width=pooled_width,
        zero_negative=bool(index.get("force_zeros_for_empty_prompt", family == "sdxl")),
        latent_channels=latent_channels,
        pixels_per_latent=pixels_per_latent,
        guidance_dim=unet.config.time_cond_proj_dim,
        control_scale=CONTROL_SCALE[family],
    )
    if parts.lcm_lora:
        adapter = read_adapter(parts.lcm_lora, model.networks, "cpu", torch.float32, "lcm-lora")
        for part, network in model.networks.items():
            fuse(network, part, adapter)
    for network in (*model.networks.values(), model.vae, model.controlnet):
        if network is not None:
            # Channels last is how the convolutions of both devices work inside: a third off the VAE's time on a CPU.
            network.to(device=device, dtype=dtype, memory_format=torch.channels_last).eval().requires_grad_(False)
    return model


def weigh(parts: Parts, dtype: torch.dtype) -> int:
    """Bytes of memory that ``load_model`` will take for weights, from the files' headers alone."""
    return sum(map(_elements, _weights(parts))) * dtype.itemsize


def fingerprint(parts: Parts) -> str:
    """What changes whenever other weights would be loaded: names, sizes and dates of the files."""
    files = [*_weights(parts), *([parts.lcm_lora] if parts.lcm_lora else [])]
    facts = [(str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    return repr((parts.distillation, facts))


def _weights(parts: Parts) -> Iterator[Path]:
    """The files that will be read, one for each tensor: of a folder with two variants, one of them."""
    folders = [parts.unet, parts.tiny_vae, parts.controlnet, parts.safety]
    if parts.base.is_file():
        yield parts.base
    else:
        replaced = {"unet": parts.unet, "vae": parts.tiny_vae}
        names = ("unet", "vae", "text_encoder", "text_encoder_2")
        folders += [parts.base / name for name in names if not replaced.get(name)]
    for folder in filter(None, folders):
        found = sorted(folder.glob("*.safetensors"))
        variant = [file for file in found if ".fp16." in file.name]
        yield from variant or found


def _elements(file: Path) -> int:
    """Numbers in a safetensors file."""
    tensors = (entry for name, entry in read_header(file).items() if name != "__metadata__")
    return sum(torch.Size(entry["shape"]).numel() for entry in tensors)


def _load_folder(kind: Any, folder: Path, dtype: torch.dtype) -> Any:
    return _from_pretrained(kind, folder, use_safetensors=True, variant=variant_of(folder), dtype=dtype)


def _load_tokenizer(kind: Any, folder: Path) -> Any:
    if not any((folder / name).is_file() for name in ("tokenizer.json", "vocab.json")):
        raise NotFound(f"{folder} holds no tokenizer.json or vocab.json")  # without one, it would know no word
    return _from_pretrained(kind, folder)


def _from_pretrained(kind: Any, folder: Path, **kwargs: Any) -> Any:
    if "diffusers" in kind.__module__ and "dtype" in kwargs:
        kwargs["torch_dtype"] = kwargs.pop("dtype")
    try:
        return kind.from_pretrained(folder, local_files_only=True, **kwargs)
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise NotFound(f"{folder} cannot be loaded as {kind.__name__}") from error

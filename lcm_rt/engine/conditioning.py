"""What a client gave (prompt, guidance, picture, mask) as tensors; knows no step and no batch."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from lcm_rt.engine.adapters import Adapter, applied
from lcm_rt.engine.models import Model
from lcm_rt.engine.trajectory import Prompt

CACHED_PROMPTS = 256  # 60 MB for Stable Diffusion's text encoder in float32


class Prompts:
    """Prompts as ``model`` reads them, the newest remembered: realtime clients send one with each new sketch."""

    def __init__(self, model: Model, size: int = CACHED_PROMPTS) -> None:
        self._model = model
        self._size = size
        self._kept: OrderedDict[tuple[str, str | None, float], Prompt] = OrderedDict()

    def read(self, text: str, adapter: Adapter | None = None, scale: float = 0.0) -> Prompt:
        """``text`` through the text encoders, with a LoRA at ``scale``; words past the model's limit are cut off."""
        key = (text, adapter.id if adapter else None, scale if adapter else 0.0)
        if key in self._kept:
            self._kept.move_to_end(key)
            return self._kept[key]
        prompt = self._read(text, adapter, scale)
        self._kept[key] = prompt
        while len(self._kept) > self._size:
            self._kept.popitem(last=False)
        return prompt

    def nothing(self, prompt: Prompt) -> Prompt:
        """The empty negative prompt of a model that was trained with noughts for it."""
        pooled = None if prompt.pooled is None else torch.zeros_like(prompt.pooled)
        return Prompt(torch.zeros_like(prompt.context), pooled)

    def _read(self, text: str, adapter: Adapter | None, scale: float) -> Prompt:
        model, read = self._model, []
        scales = torch.tensor([scale], dtype=torch.float32, device=model.device)
        for number, (tokenizer, encoder) in enumerate(model.readers):
            ids = tokenizer(
                text, padding="max_length", max_length=model.max_tokens, truncation=True, return_tensors="pt"
            ).input_ids.to(model.device)
            with applied(encoder, "text_encoder_2" if number else "text_encoder", [adapter], scales):
                read.append(encoder(ids, output_hidden_states=model.pooled_width is not None))
        if model.pooled_width is None:
            return Prompt(read[0][0][0].to(model.dtype))
        # XL reads the last layer but one of both encoders, and the second one's idea of the whole.
        context = torch.cat([output.hidden_states[-2][0] for output in read], dim=-1)
        return Prompt(context.to(model.dtype), read[-1][0][0].to(model.dtype))


@dataclass(frozen=True, slots=True)
class Randomness:
    """The random numbers of one picture, drawn on the CPU: the same picture on every device and in every batch."""

    generator: torch.Generator
    device: torch.device

    @classmethod
    def of(cls, seed: int, device: torch.device) -> Randomness:
        return cls(torch.Generator("cpu").manual_seed(seed), device)

    def normal(self, shape: tuple[int, ...]) -> Tensor:
        # NOTE: one draw of (1, ...) each, as diffusers' randn_tensor does it. A draw of (n, ...) gives other numbers
        # when a row's size is no multiple of 16.
        return torch.randn((1, *shape), generator=self.generator, dtype=torch.float32)[0].to(self.device)


def as_tensor(image: npt.NDArray[np.uint8], device: torch.device) -> Tensor:
    """A picture (H, W, 3) as floats in 0..1, (3, H, W)."""
    return torch.from_numpy(image).to(device).permute(2, 0, 1).float() / 255.0


def encode_picture(model: Model, picture: Tensor, random: Randomness) -> Tensor:
    """Latents (C, H, W) of a picture in -1..1; a Kullback-Leibler VAE draws them from the distribution it finds."""
    encoded = model.vae.encode(picture[None].contiguous().to(model.dtype))
    if hasattr(encoded, "latents"):
        latents = encoded.latents[0].float()
    else:
        mean, std = encoded.latent_dist.mean[0].float(), encoded.latent_dist.std[0].float()
        latents = mean + std * random.normal(tuple(mean.shape))
    # The convolutions may leave channels-last strides, which change the last bit of every sum that follows.
    scaled: Tensor = (model.vae.config.scaling_factor * latents).contiguous()
    return scaled


def skip_masked_picture(model: Model, shape: tuple[int, ...], random: Randomness) -> None:
    """Draw what diffusers' inpainting pipeline draws here: it encodes the masked picture too, for 9-channel UNets.

    For a plain UNet it throws the result away, but the numbers after it in the stream are those of the steps.
    """
    if hasattr(model.vae, "quant_conv"):  # only the Kullback-Leibler VAE draws
        random.normal(shape)


def latent_mask(mask: npt.NDArray[np.bool_], pixels_per_latent: int, device: torch.device) -> Tensor:
    """Where to paint, in latents: (1, H, W) of 0 and 1, the nearest pixel's value."""
    full = torch.from_numpy(mask.astype(np.float32))[None, None]
    size = (mask.shape[0] // pixels_per_latent, mask.shape[1] // pixels_per_latent)
    return torch.nn.functional.interpolate(full, size=size)[0].to(device)


def control_picture(picture: Tensor, mask: npt.NDArray[np.bool_]) -> Tensor:
    """What ControlNet v1.1's inpainting model was trained on: the picture (3, H, W) in 0..1, -1 where to paint."""
    return picture.masked_fill(torch.from_numpy(mask).to(picture.device), -1.0)

"""What a client gave (prompt, guidance, picture, mask) as tensors; knows no step and no batch."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from lcm_rt.engine.models import Model

CACHED_PROMPTS = 256  # 60 MB for Stable Diffusion's text encoder in float32


class Prompts:
    """Prompt embeddings, the newest ones remembered: realtime clients send the same prompt with each new sketch."""

    def __init__(self, size: int = CACHED_PROMPTS) -> None:
        self._size = size
        self._kept: OrderedDict[tuple[str, str], Tensor] = OrderedDict()

    def embed(self, model: Model, prompt: str) -> Tensor:
        """Embeddings of ``prompt``, (tokens, width); words past the model's limit are cut off."""
        key = (model.name, prompt)
        if key in self._kept:
            self._kept.move_to_end(key)
            return self._kept[key]
        embedding = _embed(model, prompt)
        self._kept[key] = embedding
        while len(self._kept) > self._size:
            self._kept.popitem(last=False)
        return embedding

    def forget(self, model: str) -> None:
        """Drop what was made by an earlier load of ``model``."""
        for key in [key for key in self._kept if key[0] == model]:
            del self._kept[key]


def _embed(model: Model, prompt: str) -> Tensor:
    ids = model.tokenizer(
        prompt, padding="max_length", max_length=model.max_tokens, truncation=True, return_tensors="pt"
    ).input_ids
    embedding: Tensor = model.text_encoder(ids.to(model.device))[0][0]
    return embedding.to(model.dtype)


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
        return torch.randn((1, *shape), generator=self.generator)[0].to(self.device)


def encode_picture(model: Model, image: npt.NDArray[np.uint8], random: Randomness) -> Tensor:
    """Latents of a picture (C, H, W); a Kullback-Leibler VAE draws them from the distribution that it finds."""
    # The same arithmetic, in the same order, as diffusers' image processor: the latents are equal to the bit.
    pixels = torch.from_numpy(image).to(model.device).permute(2, 0, 1)[None].float() / 255.0
    encoded = model.vae.encode((2.0 * pixels - 1.0).contiguous().to(model.dtype))
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

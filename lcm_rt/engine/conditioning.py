"""What a client gave (prompt, guidance, picture, mask) as tensors; knows no step and no batch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from lcm_rt.cache import Cache, Counts, content_key, tally
from lcm_rt.engine.adapters import Adapter, applied
from lcm_rt.engine.models import Model
from lcm_rt.engine.networks import Distribution, Eager, Networks
from lcm_rt.engine.trajectory import Prompt

PROMPT_BYTES = 64 * 2**20
"""Of each model's prompts, on its device: 270 of Stable Diffusion in float32, 210 of XL in half precision."""

PICTURE_BYTES = 64 * 2**20
"""Of each model's encoded pictures: 500 of 512x512, so that a camera takes long to push out somebody's sketch."""


class Prompts:
    """Prompts as ``model`` reads them, the newest remembered: who types goes back and forth, and draws meanwhile.

    ``networks`` tells by what they are run by now.
    """

    def __init__(
        self, model: Model, networks: Callable[[], Networks], counts: Counts, max_bytes: int = PROMPT_BYTES
    ) -> None:
        self._model = model
        self._networks = networks
        self._eager = Eager(model)
        self._kept: Cache[Prompt] = Cache(max_bytes, _size, tally(counts, "prompt"))

    def read(self, text: str, adapter: Adapter | None = None, scale: float = 0.0) -> Prompt:
        """``text`` through the text encoders, with a LoRA at ``scale``; words past the model's limit are cut off."""
        key = content_key((text, adapter.id, scale) if adapter else text)
        return self._kept.get_or_make(key, lambda: self._read(text, adapter, scale))

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
            if adapter is None:
                read.append(self._networks().read(number, ids))
                continue
            with applied(encoder, "text_encoder_2" if number else "text_encoder", [adapter], scales):
                read.append(self._eager.read(number, ids))  # the modules themselves have to run
        context = torch.cat([words[0] for words, _ in read], dim=-1)
        _, pooled = read[-1]
        return Prompt(context.to(model.dtype), None if pooled is None else pooled[0].to(model.dtype, copy=True))


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


class Pictures:
    """Pictures as the VAE of ``model`` encodes them, the newest remembered: a sketch stays while its prompt changes.

    The randomness of a Kullback-Leibler VAE is drawn anew each time. So latents, and what is drawn after them, are the
    same to the bit whether or not a picture is remembered. ``networks`` is as for ``Prompts``.
    """

    def __init__(
        self, model: Model, networks: Callable[[], Networks], counts: Counts, max_bytes: int = PICTURE_BYTES
    ) -> None:
        self._model = model
        self._networks = networks
        self._kept: Cache[Distribution] = Cache(max_bytes, _size, tally(counts, "picture"))

    def encode(self, picture: Tensor, random: Randomness, digest: bytes | None) -> Tensor:
        """Latents (C, H, W), float32, of a picture (3, height, width) in -1..1.

        Args:
            digest: the same for no other picture; None is not remembered.
        """
        return self._latents(digest, lambda: self._encode(picture), random)

    def encode_masked(
        self, picture: Tensor | None, mask: npt.NDArray[np.bool_], random: Randomness, digest: bytes | None
    ) -> Tensor:
        """As ``encode``, with grey (0) where ``mask`` (height, width) is True; without a picture all is grey."""
        if picture is None:
            picture = torch.zeros(3, *mask.shape, dtype=torch.float32, device=self._model.device)
            digest = b""
        if digest is not None:
            digest = content_key((digest, mask.shape), np.packbits(mask).tobytes())
        where = as_mask(mask, picture.device)
        return self._latents(digest, lambda: self._encode(picture.masked_fill(where, 0.0)), random)

    def _latents(self, key: bytes | None, make: Callable[[], Distribution], random: Randomness) -> Tensor:
        encoded = make() if key is None else self._kept.get_or_make(key, make)
        latents = encoded.mean[0]
        if encoded.deviation is not None:
            latents = latents + encoded.deviation[0] * random.normal(tuple(latents.shape))
        # The convolutions may leave channels-last strides, which change the last bit of every sum that follows.
        scaled: Tensor = (self._model.vae.config.scaling_factor * latents).contiguous()
        return scaled

    def _encode(self, picture: Tensor) -> Distribution:
        mean, deviation = self._networks().encode(picture[None].contiguous())
        # Copies: what is kept must not keep all of the encoder's output with it.
        return Distribution(mean.clone(), None if deviation is None else deviation.clone())


def _size(tensors: Prompt | Distribution) -> int:
    return sum(tensor.nbytes for tensor in tensors if tensor is not None)


def as_tensor(image: npt.NDArray[np.uint8], device: torch.device) -> Tensor:
    """A picture (H, W, 3) as floats in 0..1, (3, H, W)."""
    # A copy, because torch takes no array that it may not write to.
    return torch.from_numpy(image.copy()).to(device).permute(2, 0, 1).float() / 255.0


def as_mask(mask: npt.NDArray[np.bool_], device: torch.device) -> Tensor:
    """A mask (H, W) as a tensor, bool."""
    return torch.from_numpy(mask.copy()).to(device)


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
    return picture.masked_fill(as_mask(mask, picture.device), -1.0)

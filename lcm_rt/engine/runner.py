"""The heavy forward passes of one model, as fast as the device allows; knows no trajectory and no schedule.

``compile=False`` is the reference. With ``compile=True`` the networks are compiled in ``warm_up`` for pictures of the
model's own size, as two graphs each: a single row, and any larger number of rows (batch dimension marked dynamic).
Pictures of any other size take the eager path, so that no client ever waits for a compiler.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from lcm_rt.engine.models import Model


class Runner:
    """UNet and VAE decoder of ``model``; every call is one batched forward pass."""

    def __init__(self, model: Model, *, compile: bool = False) -> None:
        self._model = model
        self._compiled_at: tuple[int, ...] | None = None
        self._fast_unet: Callable[..., Tensor] = torch.compile(self._unet) if compile else self._unet
        self._fast_decode: Callable[..., Tensor] = torch.compile(self._decode) if compile else self._decode
        self._compile = compile

    def predict(self, x: Tensor, timesteps: Tensor, context: Tensor, guidance_embedding: Tensor | None) -> Tensor:
        """The UNet's output in float32, for rows (B, C, H, W) at ``timesteps`` (B,)."""
        unet = self._fast_unet if x.shape[2:] == self._compiled_at else self._unet
        return unet(x.to(self._model.dtype), timesteps, context, guidance_embedding).float()

    def decode(self, latents: Tensor) -> Tensor:
        """Pictures (B, 3, H, W), float32 in 0..1, of clean latents."""
        decode = self._fast_decode if latents.shape[2:] == self._compiled_at else self._decode
        return decode((latents / self._model.vae.config.scaling_factor).to(self._model.dtype)).float()

    def warm_up(self, side: int, report: Callable[[float], None]) -> None:
        """Run every path once, at latents of ``side`` by ``side``; this is where compilation happens."""
        model = self._model
        for done, rows in enumerate((1, 2), start=1):
            x = torch.zeros(rows, model.latent_channels, side, side, dtype=model.dtype, device=model.device)
            t = torch.zeros(rows, dtype=torch.int64, device=model.device)
            context = x.new_zeros(rows, model.max_tokens, model.text_encoder.config.hidden_size)
            embedding = None if model.guidance_dim is None else x.new_zeros(rows, model.guidance_dim)
            if self._compile and rows > 1:
                for tensor in (x, t, context, embedding):
                    if tensor is not None:
                        torch._dynamo.mark_dynamic(tensor, 0)
            self._fast_unet(x, t, context, embedding)
            self._fast_decode(x)
            report(done / 2)
        if self._compile:
            self._compiled_at = (side, side)

    def _unet(self, x: Tensor, timesteps: Tensor, context: Tensor, guidance_embedding: Tensor | None) -> Tensor:
        output: Tensor = self._model.unet(
            x, timesteps, encoder_hidden_states=context, timestep_cond=guidance_embedding, return_dict=False
        )[0]
        return output

    def _decode(self, latents: Tensor) -> Tensor:
        pixels: Tensor = self._model.vae.decode(latents, return_dict=False)[0]
        return (pixels * 0.5 + 0.5).clamp(0, 1)

"""The heavy forward passes of one model, as fast as the device allows; knows no trajectory and no schedule.

``compile=False`` is the reference. With ``compile=True`` the networks are compiled in ``warm_up`` for pictures of the
model's own size, as two graphs each: a single row, and any larger number of rows (batch dimension marked dynamic).
Pictures of any other size, and forwards with LoRAs or a ControlNet, take the eager path, so that no client ever waits
for a compiler.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lcm_rt.engine.adapters import Adapter, applied
from lcm_rt.engine.models import Model


@dataclass(frozen=True, slots=True)
class Batch:
    """What one forward of the UNet takes; every tensor has a row for each of B."""

    x: Tensor  # (B, C, H, W)
    timesteps: Tensor  # (B,)
    context: Tensor  # (B, tokens, width)
    guidance_embedding: Tensor | None = None  # (B, time_cond_proj_dim)
    pooled: Tensor | None = None  # (B, width)
    size_ids: Tensor | None = None  # (B, 6)
    surroundings: Tensor | None = None  # (B, 1 + C, H, W)
    controls: Sequence[Tensor | None] = ()  # for each row, a picture (3, height, width) for the ControlNet
    adapters: Sequence[Adapter | None] = ()  # for each row, its LoRA
    adapter_scales: Tensor | None = None  # (B,)


class Runner:
    """UNet and VAE decoder of ``model``; every call is one batched forward pass."""

    def __init__(self, model: Model, *, compile: bool = False) -> None:
        self._model = model
        self._compiled_at: tuple[int, ...] | None = None
        # None, and not the plain methods: kept in here they would be a cycle, and an unloaded model would stay.
        self._compiled_unet: Callable[..., Tensor] | None = torch.compile(self._unet) if compile else None
        self._compiled_decode: Callable[..., Tensor] | None = torch.compile(self._decode) if compile else None

    def predict(self, batch: Batch) -> Tensor:
        """The UNet's output (B, C, H, W) in float32."""
        x = batch.x.to(self._model.dtype)
        inputs = (batch.timesteps, batch.context, batch.guidance_embedding, batch.pooled, batch.size_ids)
        controlled = [i for i, picture in enumerate(batch.controls) if picture is not None]
        residuals = self._control(batch, x, controlled) if controlled else None
        if batch.surroundings is not None:
            x = torch.cat([x, batch.surroundings], dim=1)
        if any(batch.adapters):
            assert batch.adapter_scales is not None
            with applied(self._model.unet, "unet", batch.adapters, batch.adapter_scales):
                return self._unet(x, *inputs, residuals).float()
        if self._compiled_unet and residuals is None and x.shape[2:] == self._compiled_at:
            return self._compiled_unet(x, *inputs).float()
        return self._unet(x, *inputs, residuals).float()

    def decode(self, latents: Tensor) -> Tensor:
        """Pictures (B, 3, H, W), float32 in 0..1, of clean latents."""
        fast = self._compiled_decode if latents.shape[2:] == self._compiled_at else None
        decode = fast or self._decode
        return decode((latents / self._model.vae.config.scaling_factor).to(self._model.dtype)).float()

    def warm_up(self, side: int, report: Callable[[float], None]) -> None:
        """Run every path once, at latents of ``side`` by ``side``; this is where compilation happens."""
        model = self._model
        for done, rows in enumerate((1, 2), start=1):
            latents = torch.zeros(rows, model.latent_channels, side, side, dtype=model.dtype, device=model.device)
            t = torch.zeros(rows, dtype=torch.int64, device=model.device)
            x = latents.new_zeros(rows, model.unet.config.in_channels, side, side)
            context = x.new_zeros(rows, model.max_tokens, model.context_width)
            embedding = None if model.guidance_dim is None else x.new_zeros(rows, model.guidance_dim)
            pooled = None if model.pooled_width is None else x.new_zeros(rows, model.pooled_width)
            sizes = None if model.pooled_width is None else x.new_zeros(rows, 6)
            if self._compiled_unet and rows > 1:
                for tensor in (latents, x, t, context, embedding, pooled, sizes):
                    if tensor is not None:
                        torch._dynamo.mark_dynamic(tensor, 0)
            (self._compiled_unet or self._unet)(x, t, context, embedding, pooled, sizes)
            (self._compiled_decode or self._decode)(latents)
            report(done / 2)
        if self._compiled_unet:
            self._compiled_at = (side, side)

    def _control(self, batch: Batch, x: Tensor, rows: list[int]) -> list[Tensor]:
        """The ControlNet's residuals for the UNet, nought for the rows that have no picture; the middle's last."""
        controlnet = self._model.controlnet
        assert controlnet is not None, "no row has a picture for it without one"
        # It is no consistency model: it takes no guidance embedding, whatever its UNet does.
        down, middle = controlnet(
            torch.stack([x[i] for i in rows]),
            torch.stack([batch.timesteps[i] for i in rows]),
            encoder_hidden_states=torch.stack([batch.context[i] for i in rows]),
            controlnet_cond=torch.stack([picture for picture in batch.controls if picture is not None]),
            conditioning_scale=self._model.control_scale,
            added_cond_kwargs=_added(
                None if batch.pooled is None else torch.stack([batch.pooled[i] for i in rows]),
                None if batch.size_ids is None else torch.stack([batch.size_ids[i] for i in rows]),
            ),
            return_dict=False,
        )
        if len(rows) == len(x):
            return [*down, middle]
        spread = [residual.new_zeros(len(x), *residual.shape[1:]) for residual in (*down, middle)]
        for whole, residual in zip(spread, (*down, middle), strict=True):
            for i, row in enumerate(rows):
                whole[row] = residual[i]
        return spread

    def _unet(
        self,
        x: Tensor,
        timesteps: Tensor,
        context: Tensor,
        guidance_embedding: Tensor | None,
        pooled: Tensor | None,
        size_ids: Tensor | None,
        residuals: list[Tensor] | None = None,
    ) -> Tensor:
        output: Tensor = self._model.unet(
            x,
            timesteps,
            encoder_hidden_states=context,
            timestep_cond=guidance_embedding,
            added_cond_kwargs=_added(pooled, size_ids),
            down_block_additional_residuals=residuals[:-1] if residuals else None,
            mid_block_additional_residual=residuals[-1] if residuals else None,
            return_dict=False,
        )[0]
        return output

    def _decode(self, latents: Tensor) -> Tensor:
        pixels: Tensor = self._model.vae.decode(latents, return_dict=False)[0]
        return (pixels * 0.5 + 0.5).clamp(0, 1)


def _added(pooled: Tensor | None, size_ids: Tensor | None) -> dict[str, Tensor] | None:
    return None if pooled is None or size_ids is None else {"text_embeds": pooled, "time_ids": size_ids}

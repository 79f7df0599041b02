"""The forward passes of one model, in plain tensors; knows no trajectory, no schedule and no LoRA.

``Eager`` runs the modules as they were loaded. Other ways to run the same networks have the same four methods
(``engine.openvino``), and are tested against this one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

from torch import Tensor

from lcm_rt.engine.models import Model


class Distribution(NamedTuple):
    """Where in latent space a picture lies, each (B, C, H, W), float32; without a deviation it is a point."""

    mean: Tensor
    deviation: Tensor | None


class Networks(Protocol):
    """What can be run of a model; a result is good until the same method is called again."""

    def takes(self, height: int, width: int) -> bool:
        """Whether latents of this size can be run."""
        ...

    def predict(
        self,
        x: Tensor,
        timesteps: Tensor,
        context: Tensor,
        embedding: Tensor | None,
        pooled: Tensor | None,
        size_ids: Tensor | None,
    ) -> Tensor:
        """The UNet's output (B, C, H, W), float32.

        Args:
            x: (B, in_channels, H, W) in the model's dtype.
            timesteps: (B,) int64.
            context: (B, tokens, width). embedding: of the guidance, (B, time_cond_proj_dim).
            pooled, size_ids: of XL, (B, width) and (B, 6).
        """
        ...

    def decode(self, latents: Tensor) -> Tensor:
        """Pictures (B, 3, height, width), float32 in 0..1, of clean latents."""
        ...

    def encode(self, pictures: Tensor) -> Distribution:
        """Where pictures (B, 3, height, width) in -1..1 lie, before the VAE's scaling factor."""
        ...

    def read(self, number: int, ids: Tensor) -> tuple[Tensor, Tensor | None]:
        """Tokens (1, n) through text encoder ``number``: (1, n, width), and for XL's second the whole, (1, width)."""
        ...


class Eager:
    """The networks as torch runs them, module by module."""

    def __init__(self, model: Model) -> None:
        self._model = model

    def takes(self, height: int, width: int) -> bool:
        return True

    def predict(
        self,
        x: Tensor,
        timesteps: Tensor,
        context: Tensor,
        embedding: Tensor | None,
        pooled: Tensor | None,
        size_ids: Tensor | None,
        residuals: Sequence[Tensor] | None = None,
    ) -> Tensor:
        """As ``Networks.predict``; ``residuals`` are a ControlNet's, the middle's last."""
        output: Tensor = self._model.unet(
            x,
            timesteps,
            encoder_hidden_states=context,
            timestep_cond=embedding,
            added_cond_kwargs=added_conditions(pooled, size_ids),
            down_block_additional_residuals=residuals[:-1] if residuals else None,
            mid_block_additional_residual=residuals[-1] if residuals else None,
            return_dict=False,
        )[0]
        return output.float()

    def decode(self, latents: Tensor) -> Tensor:
        vae = self._model.vae
        pixels: Tensor = vae.decode((latents / vae.config.scaling_factor).to(self._model.dtype), return_dict=False)[0]
        return (pixels * 0.5 + 0.5).clamp(0, 1).float()

    def encode(self, pictures: Tensor) -> Distribution:
        encoded = self._model.vae.encode(pictures.to(self._model.dtype))
        if hasattr(encoded, "latents"):
            return Distribution(encoded.latents.float(), None)
        return Distribution(encoded.latent_dist.mean.float(), encoded.latent_dist.std.float())

    def read(self, number: int, ids: Tensor) -> tuple[Tensor, Tensor | None]:
        _, encoder = self._model.readers[number]
        if self._model.pooled_width is None:
            return encoder(ids)[0], None
        # XL reads the last layer but one of both encoders, and the second one's idea of the whole.
        output = encoder(ids, output_hidden_states=True)
        return output.hidden_states[-2], output[0]


def added_conditions(pooled: Tensor | None, size_ids: Tensor | None) -> dict[str, Tensor] | None:
    """XL's further inputs as diffusers' networks take them."""
    return None if pooled is None or size_ids is None else {"text_embeds": pooled, "time_ids": size_ids}

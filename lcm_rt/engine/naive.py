"""One step of rows in the plainest way: everything is stacked anew, and the modules run one by one.

It is what every faster way is tested against, and the way of rows that no other takes: those with a LoRA, which hooks
on the modules add, or with a ControlNet.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from lcm_rt.engine import sampling
from lcm_rt.engine.adapters import applied
from lcm_rt.engine.models import Model
from lcm_rt.engine.networks import Eager, added_conditions
from lcm_rt.engine.trajectory import Trajectory


def step(model: Model, networks: Eager, rows: Sequence[Trajectory]) -> list[tuple[Tensor, Tensor]]:
    """For each row its latents after a step and the clean ones that it found, (C, H, W); no row has changed."""
    x = torch.stack([row.latents for row in rows])
    c = torch.stack([row.coefficients[row.index] for row in rows])
    noise = torch.stack([row.noises[row.index] for row in rows])
    denoised = sampling.denoise(x, _predict(model, networks, rows, x), c, model.schedule)
    after = sampling.renoise(x, denoised, c, noise, model.schedule)
    return [(_keep_known(row, *pair), clean) for row, clean, *pair in zip(rows, denoised, after, c, strict=True)]


def _predict(model: Model, networks: Eager, rows: Sequence[Trajectory], x: Tensor) -> Tensor:
    """The network's opinion on each row; guided rows are asked twice, in the same forward."""
    guided = [i for i, row in enumerate(rows) if row.negative is not None]
    inputs = [*rows, *(rows[i] for i in guided)]
    prompts = [row.prompt for row in rows] + [row.negative for row in rows if row.negative is not None]
    x = torch.cat([x, *(x[i : i + 1] for i in guided)]).to(model.dtype)
    timesteps = torch.stack([row.timesteps[row.index] for row in inputs])
    context = torch.stack([prompt.context for prompt in prompts])
    pooled = _stack(prompt.pooled for prompt in prompts)
    size_ids = _stack(row.size_ids for row in inputs)
    residuals = _control(model, inputs, x, timesteps, context, pooled, size_ids)
    surroundings = _stack(row.surroundings for row in inputs)
    if surroundings is not None:
        x = torch.cat([x, surroundings], dim=1)
    scales = torch.stack([row.adapter_scale for row in inputs])
    with applied(model.unet, "unet", [row.adapter for row in inputs], scales):
        output = networks.predict(
            x, timesteps, context, _stack(row.guidance_embedding for row in inputs), pooled, size_ids, residuals
        )
    if not guided:
        return output
    opinions = list(output[: len(rows)])
    for i, without in zip(guided, output[len(rows) :], strict=True):
        opinions[i] = sampling.guide(opinions[i], without, rows[i].guidance)
    return torch.stack(opinions)


def _control(
    model: Model,
    inputs: Sequence[Trajectory],
    x: Tensor,
    timesteps: Tensor,
    context: Tensor,
    pooled: Tensor | None,
    size_ids: Tensor | None,
) -> list[Tensor] | None:
    """The ControlNet's residuals for the UNet, nought for the rows that have no picture; the middle's last."""
    having = [i for i, row in enumerate(inputs) if row.control is not None]
    if not having:
        return None
    assert model.controlnet is not None, "no row has a picture for it without one"

    def of_those(tensor: Tensor) -> Tensor:
        return torch.stack([tensor[i] for i in having])  # an index would have to be brought to the device first

    # It is no consistency model: it takes no guidance embedding, whatever its UNet does.
    down, middle = model.controlnet(
        of_those(x),
        of_those(timesteps),
        encoder_hidden_states=of_those(context),
        controlnet_cond=torch.stack([row.control for row in inputs if row.control is not None]),
        conditioning_scale=model.control_scale,
        added_cond_kwargs=None
        if pooled is None or size_ids is None
        else added_conditions(of_those(pooled), of_those(size_ids)),
        return_dict=False,
    )
    if len(having) == len(inputs):
        return [*down, middle]
    spread = [residual.new_zeros(len(inputs), *residual.shape[1:]) for residual in (*down, middle)]
    for whole, residual in zip(spread, (*down, middle), strict=True):
        for i, place in enumerate(having):
            whole[place] = residual[i]
    return spread


def _stack(tensors: Iterable[Tensor | None]) -> Tensor | None:
    """One tensor for all rows; they have it all, or none has it, as their model is."""
    found = [tensor for tensor in tensors if tensor is not None]
    return torch.stack(found) if found else None


def _keep_known(row: Trajectory, latents: Tensor, c: Tensor) -> Tensor:
    if row.known is None:
        return latents
    return sampling.keep_outside(latents, row.known.mask, row.known.latents, row.known.noise, c)

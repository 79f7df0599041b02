"""The consistency-model maths, as pure functions of tensors; knows no network, no prompt, no request.

Latent Consistency Models (Luo et al. 2023, arXiv 2310.04378) take a handful of the timesteps that they were distilled
on, jump at each from the noisy ``x`` to the clean end of the trajectory, and go back to a lower noise level with fresh
noise (multistep consistency sampling, Song et al. 2023, arXiv 2303.01469, algorithm 1). Turbo models (adversarial
diffusion distillation, Sauer et al. 2023, arXiv 2311.17042) jump in the same way, without the consistency function's
boundary, and go back along the noise that they found, as Euler's method does, or with a share of fresh noise. Every
function works on a batch whose rows sit at different timesteps: what depends on the timestep is a row of
``coefficients``, never a scalar.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from lcm_rt.errors import InputError

Prediction = Literal["epsilon", "v_prediction", "sample"]
Rule = Literal["lcm", "euler", "euler_ancestral"]

SIGMA_DATA = 0.5  # of the boundary condition, section 4 of Luo et al.


@dataclass(frozen=True, slots=True)
class Schedule:
    """The noise rule that a model was trained with, from the ``scheduler_config.json`` beside its weights.

    ``alphas_cumprod`` is float32 on the CPU: ``coefficients`` takes from it what a picture needs, once. ``rule`` is how
    a step goes on from the clean latents that it found: the last two are those of turbo models.
    """

    alphas_cumprod: Tensor
    rule: Rule = "lcm"
    prediction: Prediction = "epsilon"
    original_steps: int = 50
    timestep_scaling: float = 10.0
    clip: float | None = None

    @classmethod
    def from_config(cls, config: Mapping[str, Any], *, turbo: bool = False) -> Schedule:
        """Read a scheduler's configuration, of whichever class: the names of the fields are the same in all.

        ``turbo`` takes Euler's rule in place of the consistency model's, the ancestral one where the class says so.

        Raises:
            InputError: the model was trained with a rule that is not known here.
        """
        prediction = config.get("prediction_type", "epsilon")
        if prediction not in get_args(Prediction):
            raise InputError("model", f"its prediction_type is {prediction!r}, not one of {get_args(Prediction)}")
        if config.get("thresholding"):
            raise InputError("model", "its scheduler wants dynamic thresholding, which latents must not have")
        euler: Rule = "euler_ancestral" if "Ancestral" in config.get("_class_name", "") else "euler"
        return cls(
            alphas_cumprod=alphas_cumprod(config),
            rule=euler if turbo else "lcm",
            prediction=prediction,
            original_steps=config.get("original_inference_steps", 50),
            timestep_scaling=config.get("timestep_scaling", 10.0),
            clip=config.get("clip_sample_range", 1.0) if config.get("clip_sample") else None,
        )


def alphas_cumprod(config: Mapping[str, Any]) -> Tensor:
    """The share of the picture's variance that is left at each training timestep, from a scheduler's betas."""
    length = config.get("num_train_timesteps", 1000)
    start, end = config.get("beta_start", 0.00085), config.get("beta_end", 0.012)
    kind = config.get("beta_schedule", "scaled_linear")
    if config.get("trained_betas") is not None:
        betas = torch.tensor(config["trained_betas"], dtype=torch.float32)
    elif kind == "linear":
        betas = torch.linspace(start, end, length, dtype=torch.float32)
    elif kind == "scaled_linear":
        betas = torch.linspace(start**0.5, end**0.5, length, dtype=torch.float32) ** 2
    elif kind == "squaredcos_cap_v2":
        # Nichol and Dhariwal 2021 (arXiv 2102.09672), equation 17.
        bar = [math.cos((i / length + 0.008) / 1.008 * math.pi / 2) ** 2 for i in range(length + 1)]
        betas = torch.tensor([min(1 - bar[i + 1] / bar[i], 0.999) for i in range(length)], dtype=torch.float32)
    else:
        raise InputError("model", f"its beta_schedule {kind!r} is not known")
    if config.get("rescale_betas_zero_snr"):
        betas = _zero_terminal_snr(betas)
    return torch.cumprod(1.0 - betas, dim=0)


def _zero_terminal_snr(betas: Tensor) -> Tensor:
    """Shift the betas so that the last timestep is pure noise (Lin et al. 2023, arXiv 2305.08891, algorithm 1)."""
    root = torch.cumprod(1.0 - betas, dim=0).sqrt()
    root = (root - root[-1]) * (root[0] / (root[0] - root[-1]))
    bar = root**2
    return 1 - torch.cat([bar[:1], bar[1:] / bar[:-1]])


def timesteps(schedule: Schedule, steps: int, strength: float = 1.0) -> list[int]:
    """The timesteps that a picture visits, noisiest first: ``steps`` of them, evenly spread.

    They are taken from the share ``strength`` of the distilled schedule that is least noisy. At a very low strength it
    may hold fewer timesteps than ``steps``; then all of them are visited, and at least one.
    """
    train_steps = len(schedule.alphas_cumprod)
    if schedule.rule != "lcm":
        available = max(1, round(train_steps * strength))
        steps = min(steps, available)
        return [round(available - i * (available / steps)) - 1 for i in range(steps)]
    available = max(1, int(schedule.original_steps * strength))
    steps = min(steps, available)
    skip = train_steps // schedule.original_steps
    # Rank r of the schedule is timestep r * skip - 1. NOTE: in floating point, as diffusers does it, so that even the
    # schedules where its rounding shows (22 steps at strength 0.6) are the same.
    return [(available - math.floor(i * (available / steps))) * skip - 1 for i in range(steps)]


def boundary(t: Tensor, timestep_scaling: float) -> tuple[Tensor, Tensor]:
    """``c_skip`` and ``c_out``: the consistency function is the identity at t = 0 (Luo et al., section 4)."""
    scaled = t.float() * timestep_scaling
    norm = scaled**2 + SIGMA_DATA**2
    return SIGMA_DATA**2 / norm, scaled / norm**0.5


def coefficients(schedule: Schedule, visited: list[int]) -> Tensor:
    """One row of eight per visited timestep.

    √ᾱ, √(1-ᾱ), c_skip, c_out; √ᾱ and √(1-ᾱ) of the next timestep; and the latter's two parts: how much of the noise
    that the network found stays, and how much is fresh.

    There is no noise after the last timestep, so its next values are 1 and 0: the same formula ends the trajectory, and
    no caller has to ask whether a step is the last.
    """
    t = torch.tensor(visited)
    now = schedule.alphas_cumprod[t]
    after = torch.cat([now[1:], now.new_ones(1)])
    alpha, sigma, alpha_next, sigma_next = now.sqrt(), (1 - now).sqrt(), after.sqrt(), (1 - after).sqrt()
    c_skip, c_out = boundary(t, schedule.timestep_scaling)
    stays, fresh = torch.zeros_like(sigma), sigma_next
    if schedule.rule != "lcm":
        c_skip, c_out = torch.zeros_like(c_skip), torch.ones_like(c_out)
        stays, fresh = sigma_next, torch.zeros_like(sigma)
    if schedule.rule == "euler_ancestral":
        # k-diffusion's split of the next noise level into what stays and what is fresh, in units of noise per signal.
        level, level_next = sigma / alpha, sigma_next / alpha_next
        up = level_next * (level**2 - level_next**2).clamp(min=0).sqrt() / level
        stays, fresh = alpha_next * (level_next**2 - up**2).clamp(min=0).sqrt(), alpha_next * up
    return torch.stack([alpha, sigma, c_skip, c_out, alpha_next, sigma_next, stays, fresh], dim=1)


def _columns(c: Tensor) -> tuple[Tensor, ...]:
    return c[..., None, None, None].unbind(-4)


def add_noise(x0: Tensor, noise: Tensor, c: Tensor) -> Tensor:
    """Bring clean latents to the noise level of the timestep that ``c`` is of (DDPM's forward process)."""
    alpha, sigma, *_ = _columns(c)
    return alpha * x0 + sigma * noise


def pure_noise(schedule: Schedule, noise: Tensor, c: Tensor) -> Tensor:
    """Where a picture without a beginning begins: LCMs take the noise as it is, Euler's rule at its level."""
    return noise if schedule.rule == "lcm" else _columns(c)[1] * noise


def predict_x0(x: Tensor, output: Tensor, c: Tensor, prediction: Prediction) -> Tensor:
    """What the network's ``output`` says the clean latents are."""
    alpha, sigma, *_ = _columns(c)
    if prediction == "epsilon":
        return (x - sigma * output) / alpha
    if prediction == "v_prediction":
        return alpha * x - sigma * output
    return output


def denoise(x: Tensor, output: Tensor, c: Tensor, schedule: Schedule) -> Tensor:
    """The clean latents that a step finds: the consistency function of ``x`` (B, C, H, W).

    Args:
        output: what the network made of ``x``.
        c: a row of ``coefficients`` for each row, (B, 8).
    """
    _, _, c_skip, c_out, *_ = _columns(c)
    x0 = predict_x0(x, output, c, schedule.prediction)
    if schedule.clip is not None:
        x0 = x0.clamp(-schedule.clip, schedule.clip)
    return c_out * x0 + c_skip * x


def renoise(x: Tensor, denoised: Tensor, c: Tensor, noise: Tensor, schedule: Schedule) -> Tensor:
    """From the clean latents that a step found to the next noise level, or to the end.

    ``noise`` is fresh noise for each row; it is multiplied by nought at a row's last step, so it must be finite.
    """
    alpha, sigma, _, _, alpha_next, _, stays, fresh = _columns(c)
    after = alpha_next * denoised + fresh * noise
    if schedule.rule != "lcm":
        after = after + stays * (x - alpha * denoised) / sigma
    return after


def keep_outside(x: Tensor, mask: Tensor, x0: Tensor, noise: Tensor, c: Tensor) -> Tensor:
    """After a step: put the known picture back where ``mask`` is 0, at the noise level that ``x`` has now.

    The inpainting of RePaint (Lugmayr et al. 2022, arXiv 2201.09865, equation 8) for networks without mask channels;
    ``noise`` is the picture's own at every step, so that the known part stays on one trajectory.
    """
    _, _, _, _, alpha_next, sigma_next, *_ = _columns(c)
    return (1 - mask) * (alpha_next * x0 + sigma_next * noise) + mask * x


def guidance_embedding(w: Tensor, dim: int) -> Tensor:
    """Sinusoids of the guidance scale, for networks that were distilled with it (``time_cond_proj_dim``).

    ``w`` follows diffusers: guidance scale minus one, as in Imagen's formula ``eps + w (eps - eps_uncond)``.
    """
    half = dim // 2
    frequencies = torch.exp(torch.arange(half, dtype=torch.float32) * -(math.log(10000.0) / (half - 1)))
    angles = w[:, None] * 1000.0 * frequencies.to(w.device)
    embedding = torch.cat([angles.sin(), angles.cos()], dim=1)
    return torch.nn.functional.pad(embedding, (0, dim % 2))


def guide(output: Tensor, unconditional: Tensor, scale: Tensor) -> Tensor:
    """Classifier-free guidance (Ho and Salimans 2022, arXiv 2207.12598)."""
    return unconditional + scale * (output - unconditional)

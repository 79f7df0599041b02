from __future__ import annotations

import numpy as np
import pytest
import torch
from diffusers import (
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    LatentConsistencyModelPipeline,
    LCMScheduler,
)

from lcm_rt.engine import sampling
from lcm_rt.engine.sampling import Schedule
from lcm_rt.errors import InputError

STRENGTHS = [0.1, 0.29, 0.3, 0.58, 0.6, 0.8, 1.0]
CONFIG = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}

LCM = Schedule.from_config(CONFIG)


def step(x, output, c, noise, schedule):
    """One whole update, for the end of which the engine has two halves."""
    return sampling.renoise(x, sampling.denoise(x, output, c, schedule), c, noise, schedule)


def reference(**config) -> LCMScheduler:
    return LCMScheduler(**(CONFIG | config))


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("strength", STRENGTHS)
def test_timesteps_are_those_of_diffusers(strength):
    for steps in range(1, int(50 * strength) + 1):
        scheduler = reference()
        scheduler.set_timesteps(steps, strength=strength)
        assert sampling.timesteps(LCM, steps, strength) == scheduler.timesteps.tolist(), steps


def test_four_steps_are_the_ones_everybody_knows():
    assert sampling.timesteps(LCM, 4) == [999, 759, 499, 259]


def test_a_strength_too_low_for_the_steps_visits_what_there_is():
    assert sampling.timesteps(LCM, 4, strength=0.05) == [39, 19]
    assert sampling.timesteps(LCM, 4, strength=0.001) == [19]
    assert sampling.timesteps(LCM, 60) == list(range(999, 0, -20))


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"beta_schedule": "linear"},
        {"beta_schedule": "squaredcos_cap_v2"},
        {"trained_betas": [0.1, 0.2, 0.3]},
        {"rescale_betas_zero_snr": True},
    ],
)
def test_alphas_are_those_of_diffusers(config):
    assert torch.equal(sampling.alphas_cumprod(CONFIG | config), reference(**config).alphas_cumprod)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("clip", [False, True])
def test_step_equals_diffusers_bit_for_bit(prediction, clip):
    for strength in STRENGTHS:
        for steps in range(1, min(8, int(50 * strength)) + 1):
            scheduler = reference(prediction_type=prediction, clip_sample=clip)
            scheduler.set_timesteps(steps, strength=strength)
            schedule = Schedule.from_config(scheduler.config)
            rows = sampling.coefficients(schedule, scheduler.timesteps.tolist())
            x = randn(1, 4, 8, 8)
            generator = torch.Generator().manual_seed(5)
            for i, t in enumerate(scheduler.timesteps):
                output = randn(1, 4, 8, 8, seed=i + 1)
                expected = scheduler.step(output, t, x, generator=generator.clone_state(), return_dict=False)[0]
                noise = torch.randn(x.shape, generator=generator) if i < steps - 1 else torch.zeros_like(x)
                ours = step(x, output, rows[i : i + 1], noise, schedule)
                assert torch.equal(ours, expected), (strength, steps, i)
                x = expected


# diffusers' own conversion of a tensor to numpy.
@pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy keyword:DeprecationWarning")
@pytest.mark.parametrize("kind", [EulerDiscreteScheduler, EulerAncestralDiscreteScheduler])
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_turbo_steps_equal_those_of_diffusers(kind, prediction):
    for steps in (1, 2, 3, 4, 8):
        scheduler = kind(**(CONFIG | {"timestep_spacing": "trailing", "prediction_type": prediction}))
        scheduler.set_timesteps(steps)
        schedule = Schedule.from_config(scheduler.config | {"_class_name": kind.__name__}, turbo=True)
        visited = sampling.timesteps(schedule, steps)
        assert visited == [int(t) for t in scheduler.timesteps]
        rows = sampling.coefficients(schedule, visited)
        noise = randn(1, 4, 8, 8)
        theirs, x = noise * scheduler.init_noise_sigma, sampling.pure_noise(schedule, noise, rows[:1])
        generator = torch.Generator().manual_seed(5)
        for i, t in enumerate(scheduler.timesteps):
            np.testing.assert_allclose(x, scheduler.scale_model_input(theirs, t), rtol=1e-4, atol=1e-5)
            output = randn(1, 4, 8, 8, seed=i + 1)
            theirs = scheduler.step(output, t, theirs, generator=generator.clone_state(), return_dict=False)[0]
            x = step(x, output, rows[i : i + 1], torch.randn(x.shape, generator=generator), schedule)
        np.testing.assert_allclose(x, theirs, rtol=1e-4, atol=1e-4)  # it ends without noise, where both scales are one


def test_turbo_begins_where_the_strength_says():
    turbo = Schedule.from_config(CONFIG | {"_class_name": "EulerDiscreteScheduler"}, turbo=True)
    assert sampling.timesteps(turbo, 1) == [999]
    assert sampling.timesteps(turbo, 1, strength=0.5) == [499]
    assert sampling.timesteps(turbo, 2, strength=0.5) == [499, 249]
    assert sampling.timesteps(turbo, 4, strength=0.002) == [1, 0]


def test_rows_at_different_timesteps_do_not_mix():
    c = torch.cat([sampling.coefficients(LCM, sampling.timesteps(LCM, n)) for n in (1, 2, 4)])
    x, output, noise = (randn(7, 4, 8, 8, seed=seed) for seed in range(3))
    together = step(x, output, c, noise, LCM)
    for i in range(7):
        alone = step(*(rows[i : i + 1] for rows in (x, output, c, noise)), LCM)
        assert torch.equal(together[i : i + 1], alone)


def test_add_noise_equals_diffusers():
    c = sampling.coefficients(LCM, [999, 499, 19])
    x0, noise = randn(3, 4, 8, 8), randn(3, 4, 8, 8, seed=1)
    assert torch.equal(sampling.add_noise(x0, noise, c), reference().add_noise(x0, noise, torch.tensor([999, 499, 19])))


@pytest.mark.parametrize("dim", [16, 256, 17])
def test_guidance_embedding_equals_diffusers(dim):
    w = torch.tensor([0.0, 0.5, 7.0])
    expected = LatentConsistencyModelPipeline.get_guidance_scale_embedding(None, w, embedding_dim=dim)
    assert torch.equal(sampling.guidance_embedding(w, dim), expected)


def test_the_boundary_condition_is_the_identity_at_zero():
    c_skip, c_out = sampling.boundary(torch.tensor([0, 999]), 10.0)
    np.testing.assert_allclose(c_skip, [1, 0], atol=1e-6)
    np.testing.assert_allclose(c_out, [0, 1], atol=1e-6)


def test_inpainting_keeps_what_the_mask_leaves_out():
    c = sampling.coefficients(LCM, [499])[0]
    x, x0, noise = (randn(4, 8, 8, seed=seed) for seed in range(3))
    mask = torch.zeros(1, 8, 8)
    mask[:, :4] = 1
    kept = sampling.keep_outside(x, mask, x0, noise, c)
    assert torch.equal(kept[:, :4], x[:, :4])
    assert torch.equal(kept[:, 4:], x0[:, 4:])


@pytest.mark.parametrize("config", [{"prediction_type": "flow"}, {"thresholding": True}, {"beta_schedule": "cosine"}])
def test_a_noise_rule_that_is_not_known_is_refused(config):
    with pytest.raises(InputError):
        Schedule.from_config(CONFIG | config)

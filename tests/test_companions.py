"""The embedded model's companions: what they are shown in training, and what those that ship have learnt."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import ControlNetModel, UNet2DConditionModel
from safetensors.torch import load_file
from torch import Tensor

from lcm_rt.embedded import LORA_DIR, MODEL_DIR, companion, controlnet, lora, scenes
from lcm_rt.embedded.companion import PAGE, Course, Page, Pool, teach
from lcm_rt.embedded.networks import Finished, new_scheduler, tokenize
from lcm_rt.embedded.plan import Plan, scene_batch

LORA = LORA_DIR / "ink.safetensors"


@pytest.fixture(autouse=True)
def _flush_denormal() -> Iterator[None]:
    torch.set_flush_denormal(True)
    yield
    torch.set_flush_denormal(False)


@pytest.fixture(scope="module")
def finished() -> Finished:
    return Finished.load(MODEL_DIR, torch.device("cpu"))


@pytest.fixture
def plan(tmp_path: Path) -> Plan:
    return Plan(
        out=tmp_path / "model",
        work=tmp_path,
        steps=0,
        seed=0,
        device=torch.device("cpu"),
        batch=16,
        autoencoder_steps=0,
        text_steps=0,
        decoder_steps=0,
        controlnet_steps=0,
        lora_steps=0,
        pictures=0,
    )


class FlatScenes(Pool):
    """Scenes of one number each, their number, under a hole on the left; 1000 more is stale, minus that is known."""

    STALE = 600

    def draw(self) -> Page:
        number = torch.arange(PAGE) + float(self.turns * PAGE)
        latent = number[:, None, None, None].expand(PAGE, 4, 32, 32)
        mask = torch.zeros(PAGE, 1, 32, 32)
        mask[..., :16] = 1
        said, z, _ = scene_batch(self.seed, self.turns * PAGE, PAGE)
        return {
            "z": z,
            "said": said,
            "focus": torch.zeros(PAGE, 1, 32, 32),
            "mask": mask,
            "latent": latent,
            "stale": latent + 1000,
            "known": -latent,
        }

    def words(self, page: Page) -> list[str]:
        return [""] * len(page["z"])


def test_a_pool_is_a_ring(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(companion, "POOL", 4 * PAGE)
    pool = FlatScenes(0)
    for _ in range(4 + 3):
        pool.turn()
    assert sorted(pool.pages["latent"][:, 0, 0, 0].tolist()) == list(range(3 * PAGE, 7 * PAGE))
    pool.begin(7)
    pool.turn()
    assert pool.pages["latent"][:, 0, 0, 0].tolist() == list(range(7 * PAGE, 8 * PAGE))


def test_the_first_noise_holds_the_layout_of_what_is_painted_anew_only() -> None:
    pool = FlatScenes(0)
    pool.turn()
    course = Course(pool, seed=0, batch=32)
    x, t, page = course.next()
    layout, same = scenes.project(x[: course.first]), page["z"][: course.first]
    assert (t[: course.first] == 999).all()
    assert torch.allclose(layout[..., :4], same[..., :4], atol=1e-4)
    assert (layout[..., 4:] - same[..., 4:]).abs().mean() > 0.5


def test_a_chain_walks_on_its_own_predictions_with_the_known_put_back() -> None:
    pool = FlatScenes(0)
    pool.turn()
    course = Course(pool, seed=0, batch=32)
    mine = slice(course.first, course.first + course.chain)
    x, t, page = course.next()
    assert (t[mine] == 999).all()
    number = page["latent"][mine, :, 0, 0].mean(1)
    own, times, seen_own = torch.full_like(x, 500.0), t[mine], False
    for _ in range(12):
        course.learn(own)
        x, t, page = course.next()
        going = t[mine] < times
        a = course.alphas[t[mine]][:, None, None, None]
        clean = x[mine] / a.sqrt()  # the noise is small beside these numbers
        inside, outside = clean[..., :16].mean((1, 2, 3)), clean[..., 16:].mean((1, 2, 3))
        tolerance = 4 * ((1 - a) / a).sqrt().flatten()
        walked = going & (inside - 500 < tolerance) & (500 - inside < tolerance)
        seen_own |= bool(walked.any())
        assert ((outside - -number).abs() < tolerance)[walked].all(), "the known latents, not the predicted ones"
        assert torch.equal(page["latent"][mine, :, 0, 0].mean(1)[going], number[going]), "always the same scene"
        number, times = page["latent"][mine, :, 0, 0].mean(1), t[mine]
    assert seen_own


def test_stale_pictures_come_only_where_there_is_noise_enough() -> None:
    pool = FlatScenes(0)
    pool.turn()
    course = Course(pool, seed=0, batch=64)
    found = {True: 0, False: 0}
    for _ in range(10):
        x, t, page = course.next()
        a = course.alphas[t[-course.free :]]
        clean = x[-course.free :].mean((1, 2, 3)) / a.sqrt()
        for stale, noisy in zip((clean > 500).tolist(), (t[-course.free :] > pool.STALE).tolist(), strict=True):
            assert noisy or not stale
            found[stale] += 1
    assert found[True] > 10 < found[False]


class Gain(torch.nn.Module):
    """The smallest companion: one matrix that has to become a multiple of one."""

    def __init__(self) -> None:
        super().__init__()
        self.matrix = torch.nn.Parameter(torch.eye(4) * 0.5)


def test_training_resumes_where_it_stopped_and_learns(plan: Plan, finished: Finished) -> None:
    class Zeros(FlatScenes):
        def draw(self) -> Page:
            page = super().draw()
            return page | {"latent": page["latent"] * 0, "stale": page["latent"] * 0, "known": page["latent"] * 0}

    steps = []

    def run(upto: int) -> Gain:
        model = Gain()

        def forward(x: Tensor, t: Tensor, context: Tensor, page: Page, amount: float) -> Tensor:
            assert context.shape == (16, 77, 128)
            steps.append(len(x)) if amount == 1 else None
            a = new_scheduler().alphas_cumprod[t][:, None, None, None]
            return torch.einsum("oi,bihw->bohw", model.matrix, x) * a.sqrt() / (1 - a).sqrt()

        teach(plan, "gain", upto, 0.6, model, forward, Zeros(0), finished)
        return model

    run(3)
    assert steps == [16] * 3
    run(12)
    assert steps == [16] * 12, "nine more"
    before = (Gain().matrix - torch.eye(4)).norm()
    model = run(12)
    assert steps == [16] * 12, "done is done"
    assert (model.matrix - torch.eye(4)).norm() < 0.7 * before, "for a picture of noughts the velocity is a share of x"


def test_masked_pixels_are_minus_one_in_the_control_picture() -> None:
    image = torch.tensor([-1.0, 0.0, 1.0, 1.2]).view(1, 1, 1, 4).expand(1, 3, 2, 4)
    hole = torch.tensor([[0.0, 0, 0, 0], [1, 1, 0.4, 0.6]]).view(1, 1, 2, 4)
    control = controlnet.control_picture(image, hole)
    expected = torch.tensor([[0, 0.5, 1, 1], [-1, -1, 1, -1]])
    assert torch.equal(control, expected.expand(1, 3, 2, 4))


def test_the_eyes_begin_by_telling_colour_from_hole(finished: Finished) -> None:
    model = controlnet.new_controlnet(finished.unet)
    seen: list[Tensor] = []
    model.controlnet_cond_embedding.conv_out.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    control = torch.zeros(1, 3, 64, 64)
    control[:, 0, :, :16] = 1
    control[..., 32:] = -1
    model.controlnet_cond_embedding(control)
    red, green, blue, hole = seen[0][0, :4, 4].detach()
    assert red[0] > 2 > 0.1 > red[2:].abs().max()
    assert green.abs().max() < 0.1 > blue.abs().max()
    assert hole[-1] > 2 > 0.1 > hole[2]


def test_a_beginning_controlnet_changes_nothing(finished: Finished) -> None:
    model = controlnet.new_controlnet(finished.unet)
    x, context = torch.randn(1, 4, 32, 32), torch.randn(1, 77, 128)
    down, middle = model(x, 500, context, torch.rand(1, 3, 256, 256), return_dict=False)
    assert not any(part.any() for part in (*down, middle))


def test_what_the_rest_of_the_picture_tells_depends_on_the_hole() -> None:
    focus, mask = torch.zeros(4, 1, 32, 32), torch.zeros(4, 1, 32, 32)
    focus[:, :, 26:28, 4:6] = 1
    mask[1, :, 16:] = 1
    mask[2, :, 24:30, 2:8] = 1
    mask[3] = 1
    told = controlnet.told_by_the_rest(focus, mask)
    names = [{name for name, tells in zip(scenes.NAMES, row, strict=True) if tells} for row in told.tolist()]
    assert names[0] == set(scenes.NAMES)
    assert names[1] == {"time", "stars", "clouds", "back"}
    assert names[2] == set(scenes.NAMES) - {"house", "body"}
    assert names[3] == set()


def test_prompts_leave_out_only_what_is_told() -> None:
    said = [1] * len(scenes.NAMES)
    told = [name == "house" for name in scenes.NAMES]
    houses = 0
    for seed in range(200):
        text = controlnet.prompt(said, told, random.Random(seed)).lower()
        houses += any(word in text for word in scenes.PHRASES["house"]["house"])
        assert any(word in text for word in scenes.PHRASES["time"]["day"])
    assert 70 < houses < 160


def test_holed_scenes_show_the_picture_around_and_want_what_belongs_into_the_hole(finished: Finished) -> None:
    pool = controlnet.HoledScenes(3, finished)
    pool.begin(7)
    pool.turn()
    page = pool.pick(16)
    assert page["control"].shape == (16, 3, 256, 256)
    hole = page["control"][:, :1] == -1
    assert torch.equal(hole[..., ::8, ::8].float(), page["mask"])
    outside = page["mask"].expand(-1, 4, -1, -1) == 0
    assert torch.equal(page["latent"][outside], page["known"][outside])
    assert page["contrary"].any(), "every eighth turn asks for another time of day"
    held = page["contrary"] & (page["mask"].mean((1, 2, 3)) > 0.1)
    differs = ((page["latent"] - page["known"]).abs() * page["mask"]).mean((1, 2, 3)) > 0.02
    assert differs[held].float().mean() > 0.8
    assert not differs[~page["contrary"]].any()
    for _ in range(5):
        for said, contrary, text in zip(page["said"], page["contrary"], pool.words(page), strict=True):
            phrases = scenes.PHRASES["time"][scenes.ATTRIBUTES["time"][said[controlnet.TIME]]] if contrary else [""]
            assert any(phrase in text.lower() for phrase in phrases), "contrary words are always spoken"


def test_styled_scenes_want_the_style_and_start_from_plain_ones_too(finished: Finished) -> None:
    pool = lora.StyledScenes(3, finished)
    pool.turn()
    page = pool.pages
    assert page["mask"].all()
    said, z, _ = scene_batch(3, 0, PAGE)
    plain = finished.encode(scenes.draw(scenes.resolve(said, z), z).image)
    assert torch.equal(page["stale"], plain)
    assert chroma(finished.decode(page["latent"])) < 0.5 * chroma(finished.decode(plain))


# What ships


def chroma(images: Tensor) -> float:
    """How far the colours (B, 3, H, W) are from grey, on average."""
    return (images - images.mean(1, keepdim=True)).abs().mean().item()


@pytest.fixture(scope="module")
def held_out(finished: Finished) -> dict[str, Any]:
    """Scenes that no training has seen."""
    said, z, captions = scene_batch(990_001, 0, 12)
    image = scenes.draw(scenes.resolve(said, z), z).image
    return {"image": image, "latent": finished.encode(image), "captions": captions}


@torch.no_grad()
def sample(
    finished: Finished, prompts: list[str], held_out: dict[str, Any] | None = None, eyes: Any = None, hole: Any = None
) -> Tensor:
    """Four LCM steps; where ``hole`` (B, 1, 256, 256) is 0 the known latents are put back after each."""
    scheduler = new_scheduler()
    scheduler.set_timesteps(4)
    generator = torch.Generator().manual_seed(1)
    noise = x = torch.randn(len(prompts), 4, 32, 32, generator=generator)
    context = finished.text(tokenize(finished.tokenizer, prompts)).last_hidden_state
    after = [*scheduler.timesteps[1:], None]
    for t, following in zip(scheduler.timesteps, after, strict=True):
        more = {}
        if eyes is not None and held_out is not None:
            control = controlnet.control_picture(held_out["image"], hole)
            down, middle = eyes(x, t, context, control, conditioning_scale=controlnet.DOSE, return_dict=False)
            more = {"down_block_additional_residuals": down, "mid_block_additional_residual": middle}
        output = finished.unet(x, t, context, **more).sample
        x = scheduler.step(output, t, x, generator=generator, return_dict=False)[0]
        if held_out is not None:
            known = held_out["latent"]
            if following is not None:
                known = scheduler.add_noise(known, noise, following[None])
            x = torch.lerp(known, x, hole[..., ::8, ::8])
    return finished.decode(x)


def box(top: int, bottom: int, left: int, right: int) -> Tensor:
    hole = torch.zeros(1, 1, 256, 256)
    hole[..., top:bottom, left:right] = 1
    return hole


@pytest.mark.parametrize(
    "hole", [box(0, 256, 0, 128), box(0, 104, 64, 256), box(64, 192, 64, 192)], ids=["left half", "sky", "middle"]
)
def test_the_controlnet_continues_the_picture_around_a_hole(
    finished: Finished, held_out: dict[str, Any], hole: Tensor
) -> None:
    """Without any words the colours under the hole come nearer to the truth than by putting back alone."""
    eyes = ControlNetModel.from_pretrained(MODEL_DIR / "controlnet", torch_dtype=torch.float32).eval()
    truth = finished.decode(held_out["latent"])

    def error(painted: Tensor) -> float:
        coarse = torch.nn.functional.avg_pool2d((painted - truth) * hole, 32)
        return coarse.abs().mean().item()

    nothing = [""] * len(truth)
    plain = error(sample(finished, nothing, held_out, hole=hole))
    guided = error(sample(finished, nothing, held_out, eyes, hole))
    assert guided < 0.8 * plain, (guided, plain)


def styled_unet(amount: float) -> UNet2DConditionModel:
    """The UNet with the LoRA in it, as diffusers loads it."""
    unet = UNet2DConditionModel.from_pretrained(MODEL_DIR / "unet", torch_dtype=torch.float32)
    unet.load_lora_adapter(load_file(LORA), prefix="unet", adapter_name="ink")
    unet.set_adapters(["ink"], [amount])
    return unet.eval().requires_grad_(False)


def test_the_lora_draws_in_ink_and_half_of_it_draws_half(finished: Finished) -> None:
    prompts = ["sunset over mountains", "a lake at day", "dawn, hills", "a house in a meadow, day"] * 2
    plain = sample(finished, prompts)
    half, whole = (sample(replace(finished, unet=styled_unet(amount)), prompts) for amount in (0.5, 1.0))
    assert chroma(whole) < 0.45 * chroma(plain)
    assert chroma(whole) < chroma(half) < chroma(plain)
    again = sample(replace(finished, unet=styled_unet(0.0)), prompts)
    assert torch.allclose(again, plain, atol=0.02), "of none, nothing"


def test_the_files_are_small_halves(finished: Finished) -> None:
    weights = load_file(LORA)
    assert LORA.stat().st_size < 400_000
    layers = {key.removeprefix("unet.").rpartition(".lora_")[0] for key in weights}
    assert layers == set(lora.add_low_rank(UNet2DConditionModel.from_config(finished.unet.config)))
    eyes = load_file(MODEL_DIR / "controlnet" / "diffusion_pytorch_model.safetensors")
    assert sum(weight.numel() for weight in eyes.values()) < 2_500_000
    for weight in itertools.chain(weights.values(), eyes.values()):
        assert weight.dtype == torch.float16
        assert weight.isfinite().all()

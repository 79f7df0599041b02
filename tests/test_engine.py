"""The engine against diffusers' own pipelines, on the same weights and the same noise."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from checkpoints import write_checkpoint
from diffusers import (
    AutoencoderKL,
    AutoencoderTiny,
    LatentConsistencyModelImg2ImgPipeline,
    LatentConsistencyModelPipeline,
    LCMScheduler,
    StableDiffusionInpaintPipeline,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import CLIPTextModel, CLIPTokenizer

from lcm_rt.engine.engine import Engine
from lcm_rt.engine.runner import Runner
from lcm_rt.errors import GenerationFailed, InputError, ModelLoading, OutOfMemory
from lcm_rt.images import Canvas
from lcm_rt.types import GenerateRequest

TOLERANCE = 1e-5
KINDS = {
    "lcm": {},
    "lcm-tiny": {"tiny_vae": True},
    "lcm-v": {"prediction": "v_prediction"},
    "plain": {"distilled": False},
    "plain-tiny": {"distilled": False, "tiny_vae": True},
}


@pytest.fixture(scope="module")
def specs(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    return {name: write_checkpoint(root / name, **kind, seed=i) for i, (name, kind) in enumerate(KINDS.items())}


@pytest.fixture(scope="module")
def engine(specs):
    # One thread: on a busy machine, two of OpenMP's spend their time waiting for each other.
    engine = Engine(device="cpu", threads=1)
    for spec in specs.values():
        engine.load(spec, lambda stage, fraction: None)
    return engine


@pytest.fixture
def pipeline(specs):
    """Build a pipeline of diffusers from the same folder."""

    def build(kind, name):
        folder = specs[name].path
        vae = AutoencoderTiny if "tiny" in name else AutoencoderKL
        built = kind(
            unet=UNet2DConditionModel.from_pretrained(folder / "unet"),
            vae=vae.from_pretrained(folder / "vae"),
            text_encoder=CLIPTextModel.from_pretrained(folder / "text_encoder"),
            tokenizer=CLIPTokenizer.from_pretrained(folder / "tokenizer"),
            scheduler=LCMScheduler.from_pretrained(folder / "scheduler"),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
        built.set_progress_bar_config(disable=True)
        return built

    return build


def picture(width=64, height=64, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def half(width=64, height=64):
    mask = np.zeros((height, width), dtype=bool)
    mask[:, : width // 2] = True
    return mask


def request(model="lcm", prompt="a red cat", seed=7, **kwargs):
    return GenerateRequest(model, prompt, seed, **kwargs)


def begin(engine, request, *, image=None, mask=None, size=(64, 64), key=0):
    return engine.begin(key, request, Canvas(*size, image, mask))


def run(engine, row):
    while not row.done:
        engine.step([row])
    return row


def floats(engine, row):
    """The picture before it is rounded to bytes: (H, W, 3) in 0..1."""
    runner: Runner = engine._served[row.bucket.model].runner
    with torch.inference_mode():
        return runner.decode(row.latents[None])[0].permute(1, 2, 0).numpy()


def check(engine, row, expected):
    np.testing.assert_allclose(floats(engine, run(engine, row)), expected, atol=TOLERANCE, rtol=0)
    (pixels,) = engine.finish([row])
    assert pixels.dtype == np.uint8
    np.testing.assert_allclose(pixels / 255, expected, atol=0.5 / 255 + TOLERANCE, rtol=0)


def seeded(seed=7):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("steps", [1, 2, 4, 8])
@pytest.mark.parametrize("name", ["lcm", "lcm-tiny", "lcm-v"])
def test_text_to_image_equals_diffusers(engine, pipeline, name, steps):
    expected = pipeline(LatentConsistencyModelPipeline, name)(
        "a red cat",
        width=64,
        height=64,
        num_inference_steps=steps,
        guidance_scale=3.0,
        generator=seeded(),
        output_type="np",
    ).images[0]
    check(engine, begin(engine, request(name, num_inference_steps=steps, guidance_scale=3.0)), expected)


def test_sides_that_no_power_of_two_divides(engine, pipeline):
    expected = pipeline(LatentConsistencyModelPipeline, "lcm")(
        "a red cat",
        width=72,
        height=40,
        num_inference_steps=2,
        guidance_scale=1.0,
        generator=seeded(),
        output_type="np",
    ).images[0]
    check(engine, begin(engine, request(num_inference_steps=2), size=(72, 40)), expected)


@pytest.mark.parametrize("strength", [0.3, 0.6, 1.0])
@pytest.mark.parametrize("name", ["lcm", "lcm-tiny"])
def test_image_to_image_equals_diffusers(engine, pipeline, name, strength):
    expected = pipeline(LatentConsistencyModelImg2ImgPipeline, name)(
        "a red cat",
        image=Image.fromarray(picture()),
        strength=strength,
        num_inference_steps=4,
        guidance_scale=1.0,
        generator=seeded(),
        output_type="np",
    ).images[0]
    row = begin(engine, request(name, strength=strength), image=picture())
    assert row.steps == 4
    check(engine, row, expected)


@pytest.mark.parametrize("name", ["lcm", "lcm-tiny", "plain"])
def test_inpainting_equals_diffusers(engine, pipeline, name):
    expected = pipeline(StableDiffusionInpaintPipeline, name)(
        "a red cat",
        image=Image.fromarray(picture()),
        mask_image=Image.fromarray(half()),
        width=64,
        height=64,
        strength=1.0,
        num_inference_steps=4,
        guidance_scale=1.0,
        generator=seeded(),
        output_type="np",
    ).images[0]
    check(engine, begin(engine, request(name, strength=1.0), image=picture(), mask=half()), expected)


@pytest.mark.parametrize("name", ["plain", "plain-tiny"])
def test_classifier_free_guidance_equals_diffusers(engine, pipeline, name):
    expected = pipeline(StableDiffusionPipeline, name)(
        "a red cat",
        negative_prompt="blue",
        width=64,
        height=64,
        num_inference_steps=4,
        guidance_scale=2.0,
        generator=seeded(),
        output_type="np",
    ).images[0]
    row = begin(engine, request(name, negative_prompt="blue", guidance_scale=2.0))
    assert row.bucket.guided
    check(engine, row, expected)


def test_inpainting_below_full_strength_starts_from_the_picture(engine):
    row = begin(engine, request("lcm-tiny", strength=0.5), image=picture(), mask=half())
    assert row.steps == 4
    assert row.timesteps[0] == 499
    run(engine, row)
    # The known half ends as the picture's own latents, untouched by noise.
    assert torch.equal(row.latents[..., 4:], row.known.latents[..., 4:])


def test_a_strength_too_low_for_the_steps_says_how_many_ran(engine):
    row = begin(engine, request(strength=0.05), image=picture())
    assert row.steps == 2
    assert run(engine, row).index == 2


MIXED = [
    (request(seed=1), {}),
    (request(seed=2, prompt="", num_inference_steps=2, guidance_scale=1.5), {}),
    (request(seed=3, strength=0.3), {"image": picture(seed=3)}),
    (request(seed=4, strength=0.9, num_inference_steps=7), {"image": picture(seed=4)}),
    (request(seed=5, strength=1.0), {"image": picture(seed=5), "mask": half()}),
    (
        request(seed=6, strength=0.6, num_inference_steps=3, guidance_scale=8),
        {"image": picture(seed=6), "mask": half()},
    ),
    (request(seed=7, num_inference_steps=1), {}),
    (request(seed=8, num_inference_steps=8, guidance_scale=4), {}),
]


def drain(engine, waiting):
    """A new row joins before each step; rows leave when they are done: they meet at all stages of their ways."""
    waiting, going = list(waiting), []
    while waiting or going:
        if waiting:
            going.append(waiting.pop(0))
        engine.step(going)
        going = [row for row in going if not row.done]


def test_a_row_does_not_notice_its_batch(engine):
    together = [begin(engine, request, key=i, **canvas) for i, (request, canvas) in enumerate(MIXED)]
    drain(engine, together)
    for row, (alone, canvas) in zip(together, MIXED, strict=True):
        expected = floats(engine, run(engine, begin(engine, alone, **canvas)))
        np.testing.assert_allclose(floats(engine, row), expected, atol=TOLERANCE, rtol=0)


def test_guided_rows_do_not_notice_their_batch(engine):
    asked = [
        request("plain", seed=1, guidance_scale=2.0, negative_prompt="blue"),
        request("plain", seed=2, guidance_scale=7.5, num_inference_steps=2),
        request("plain", seed=3, guidance_scale=1.5, prompt="cat", num_inference_steps=3),
    ]
    together = [begin(engine, one) for one in asked]
    drain(engine, together)
    for row, one in zip(together, asked, strict=True):
        expected = floats(engine, run(engine, begin(engine, one)))
        np.testing.assert_allclose(floats(engine, row), expected, atol=TOLERANCE, rtol=0)


def test_guidance_is_part_of_the_bucket(engine):
    assert not begin(engine, request("plain", guidance_scale=1.0)).bucket.guided
    assert begin(engine, request("plain", guidance_scale=1.1)).bucket.guided
    assert not begin(engine, request("lcm", guidance_scale=8.0)).bucket.guided  # it goes in as an embedding


def test_finish_takes_rows_of_any_size_and_model_in_any_order(engine):
    sizes = [(64, 64), (72, 40), (64, 64), (40, 72)]
    names = ["lcm", "lcm", "plain-tiny", "lcm"]
    rows = [
        run(engine, begin(engine, request(name, seed=i, num_inference_steps=1), size=size))
        for i, (name, size) in enumerate(zip(names, sizes, strict=True))
    ]
    done = engine.finish(rows)
    assert [pixels.shape for pixels in done] == [(height, width, 3) for width, height in sizes]
    for row, pixels in zip(rows, done, strict=True):
        np.testing.assert_allclose(pixels / 255, floats(engine, row), atol=0.51 / 255)
        assert set(row.timings) == {"text", "encode", "denoise", "vae"}


def test_a_seed_is_a_picture(engine):
    def latents(seed):
        return run(engine, begin(engine, request(seed=seed))).latents

    assert torch.equal(latents(1), latents(1))
    assert not torch.equal(latents(1), latents(2))
    assert latents(2**32 - 1).isfinite().all()


def test_prompt_picture_and_guidance_all_matter(engine):
    base = request("lcm", strength=0.8)
    plain = run(engine, begin(engine, base, image=picture())).latents
    for other, image in [
        (replace(base, prompt="blue"), picture()),
        (replace(base, guidance_scale=9.0), picture()),
        (base, picture(seed=9)),
    ]:
        assert not torch.allclose(run(engine, begin(engine, other, image=image)).latents, plain)


def test_a_row_that_is_not_a_number_fails_alone(engine):
    rows = [begin(engine, request(seed=i)) for i in range(3)]
    rows[1].latents = torch.where(torch.arange(8) == 3, torch.nan, rows[1].latents)
    while not rows[0].done:
        engine.step(rows)
    first, second, third = engine.finish(rows)
    assert isinstance(second, GenerationFailed)
    for pixels, seed in ((first, 0), (third, 2)):
        (expected,) = engine.finish([run(engine, begin(engine, request(seed=seed)))])
        np.testing.assert_allclose(pixels.astype(int), expected.astype(int), atol=1)


class Broken(RuntimeError):
    pass


def test_a_step_that_fails_changes_nothing(engine, monkeypatch):
    rows = [begin(engine, request(seed=1)), begin(engine, request(seed=2), image=picture(), mask=half())]
    engine.step(rows)
    before = [(row.latents.clone(), row.index, dict(row.timings)) for row in rows]

    def fail(*args):
        raise Broken

    # The last thing that happens before rows take their new latents.
    monkeypatch.setattr("lcm_rt.engine.sampling.keep_outside", fail)
    with pytest.raises(Broken):
        engine.step(rows)
    for row, (latents, index, timings) in zip(rows, before, strict=True):
        assert torch.equal(row.latents, latents)
        assert (row.index, row.timings) == (index, timings)
    monkeypatch.undo()
    engine.step(rows)
    assert [row.index for row in rows] == [2, 2]


def test_a_full_device_is_said_in_our_words(engine, monkeypatch):
    row = begin(engine, request(num_inference_steps=1))
    other = run(engine, begin(engine, request(num_inference_steps=1)))

    def full(*args):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate ...")

    monkeypatch.setattr(Runner, "predict", full)
    with pytest.raises(OutOfMemory, match="out of memory"):
        engine.step([row])
    assert row.index == 0

    decode = Runner.decode
    monkeypatch.setattr(Runner, "decode", lambda self, x: full() if len(x) > 1 else decode(self, x))
    assert all(isinstance(pixels, np.ndarray) for pixels in engine.finish([other, other]))  # one by one, there is room


def test_a_picture_that_cannot_be_decoded_fails_alone(engine, monkeypatch):
    rows = [run(engine, begin(engine, request(seed=i, num_inference_steps=1))) for i in range(2)]
    decode, bad = Runner.decode, rows[0].latents[None]

    def fail(self, latents):
        if torch.equal(latents[:1], bad):
            raise Broken("secret")
        return decode(self, latents)

    monkeypatch.setattr(Runner, "decode", fail)
    first, second = engine.finish(rows)
    assert isinstance(first, GenerationFailed)
    assert "secret" not in str(first)
    assert second.shape == (64, 64, 3)


class Calls(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.add(function.overloadpacket.__name__)
        return function(*args, **(kwargs or {}))


WAITING = {"_local_scalar_dense", "item", "is_nonzero", "nonzero", "equal"}


@pytest.mark.parametrize("name", ["lcm", "plain"])
@pytest.mark.parametrize("scale", [1.0, 2.0])
def test_a_step_never_waits_for_a_number_of_the_device(engine, name, scale):
    rows = [
        begin(engine, request(name, guidance_scale=scale), image=picture(), mask=half()),
        begin(engine, request(name, guidance_scale=scale, num_inference_steps=2)),
    ]
    with Calls() as calls:
        engine.step(rows)
    assert "conv2d" in calls.names
    assert not calls.names & WAITING


def test_waiting_would_be_seen():
    with torch.inference_mode(), Calls() as calls:
        torch.ones(1).sum().item()
    assert calls.names & WAITING


def test_a_model_that_is_not_loaded(engine):
    with pytest.raises(ModelLoading):
        begin(engine, request("other"))


def test_a_size_that_the_model_cannot_paint(engine):
    with pytest.raises(InputError, match="multiples of 8"):
        begin(engine, request(), size=(68, 64))


def test_a_prompt_longer_than_the_model_reads(engine):
    long = begin(engine, request(prompt="red cat " * 500))
    assert torch.equal(long.context, begin(engine, request(prompt="red cat " * 600)).context)


def test_prompts_are_remembered_up_to_a_bound(engine):
    from lcm_rt.engine.conditioning import Prompts

    prompts, model = Prompts(size=2), engine._served["lcm"].model
    first = prompts.embed(model, "a")
    assert prompts.embed(model, "a") is first
    prompts.embed(model, "b")
    prompts.embed(model, "a")
    prompts.embed(model, "c")  # "b" is the one longest unused
    assert [prompt for _, prompt in prompts._kept] == ["a", "c"]
    prompts.forget("lcm")
    assert not prompts._kept


def test_load_tells_its_stages(specs):
    told = []
    Engine(device="cpu").load(specs["lcm-tiny"], lambda stage, fraction: told.append((stage, fraction)))
    assert [stage for stage, _ in told] == sorted((stage for stage, _ in told), key=["weights", "warm-up"].index)
    assert told[0] == ("weights", 0.0)
    assert told[-1] == ("warm-up", 1.0)


@pytest.mark.timeout(400)  # seconds of work, but on a busy machine they are long
def test_compilation_traces_each_network_once_for_one_row_and_once_for_more(tmp_path, monkeypatch):
    spec = write_checkpoint(tmp_path / "small", tiny_vae=True, blocks=(16,))
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    # Tracing is quick; it is the code generator that takes its time, see the next test.
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend, fullgraph=True))
    eager, compiled = Engine(device="cpu", threads=1), Engine(device="cpu", threads=1, compile=True)
    told = []
    eager.load(spec, lambda stage, fraction: None)
    compiled.load(spec, lambda stage, fraction: told.append(stage))
    assert "compile" in told
    assert len(graphs) == 4
    for size in ((64, 64), (72, 64)):  # the second one was not compiled for
        rows = [[begin(engine, request("small", seed=i), size=size) for i in range(4)] for engine in (eager, compiled)]
        drain(eager, rows[0])
        drain(compiled, rows[1])
        for one, other in zip(*rows, strict=True):
            np.testing.assert_allclose(floats(compiled, other), floats(eager, one), atol=TOLERANCE, rtol=0)
    assert len(graphs) == 4  # no client has waited for a compiler


class SmallUNet(torch.nn.Module):
    """A UNet's signature; so little inside that code for it is generated in seconds."""

    def __init__(self):
        super().__init__()
        self.config = SimpleNamespace(time_cond_proj_dim=16)
        self.convolution = torch.nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, x, timesteps, *, encoder_hidden_states, timestep_cond, return_dict):
        shift = timesteps.float().sin() + encoder_hidden_states.mean((1, 2)) + timestep_cond.mean(1)
        return (torch.nn.functional.silu(self.convolution(x) + shift[:, None, None, None]),)


class SmallVae:
    config = SimpleNamespace(scaling_factor=0.5)

    def decode(self, latents, return_dict):
        return (latents[:, :3].repeat_interleave(8, 2).repeat_interleave(8, 3).tanh(),)


# torch's own compiler uses what torch has deprecated.
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")
@pytest.mark.timeout(400)
def test_compiled_code_equals_eager(engine):
    torch.manual_seed(0)
    model = replace(engine._served["lcm"].model, unet=SmallUNet().requires_grad_(False), vae=SmallVae())
    eager, compiled = Runner(model), Runner(model, compile=True)
    with torch.inference_mode():
        compiled.warm_up(8, lambda fraction: None)
        for rows in (1, 2, 5):
            x, t = torch.randn(rows, 4, 8, 8), torch.arange(rows) * 100
            context, embedding = torch.randn(rows, 24, 32), torch.randn(rows, 16)
            expected, output = (runner.predict(x, t, context, embedding) for runner in (eager, compiled))
            np.testing.assert_allclose(output, expected, atol=1e-3, rtol=0)
            np.testing.assert_allclose(compiled.decode(x), eager.decode(x), atol=1e-3, rtol=0)

"""The engine against diffusers' own pipelines, on the same weights and the same noise: the same picture."""

from __future__ import annotations

import io
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from checkpoints import write_checkpoint
from diffusers import (
    AutoencoderKL,
    AutoencoderTiny,
    ControlNetModel,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    LatentConsistencyModelImg2ImgPipeline,
    LatentConsistencyModelPipeline,
    LCMScheduler,
    StableDiffusionControlNetInpaintPipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLControlNetInpaintPipeline,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLInpaintPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from engines import TOLERANCE, begin, engine_of, floats, half, picture, request, run, seeded
from loras import write_lora
from PIL import Image
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from lcm_rt.engine import sampling
from lcm_rt.engine.sampling import guidance_embedding
from lcm_rt.images import read_canvas

XL = {
    StableDiffusionPipeline: StableDiffusionXLPipeline,
    StableDiffusionImg2ImgPipeline: StableDiffusionXLImg2ImgPipeline,
    StableDiffusionInpaintPipeline: StableDiffusionXLInpaintPipeline,
    StableDiffusionControlNetInpaintPipeline: StableDiffusionXLControlNetInpaintPipeline,
}


@pytest.fixture
def pipeline(specs):
    """Build a pipeline of diffusers from the folder of a model, of the XL kind where that is one."""

    def build(kind, name, *, folder=None, scheduler=LCMScheduler, **parts):
        folder = folder or Path(specs[name].source)
        vae = AutoencoderTiny if "tiny" in name else AutoencoderKL
        parts |= {
            "unet": UNet2DConditionModel.from_pretrained(folder / "unet"),
            "vae": vae.from_pretrained(folder / "vae"),
            "text_encoder": CLIPTextModel.from_pretrained(folder / "text_encoder"),
            "tokenizer": CLIPTokenizer.from_pretrained(folder / "tokenizer"),
            "scheduler": scheduler.from_pretrained(folder / "scheduler"),
        }
        if name.startswith("xl"):
            kind = XL[kind]
            parts |= {
                "text_encoder_2": CLIPTextModelWithProjection.from_pretrained(folder / "text_encoder_2"),
                "tokenizer_2": CLIPTokenizer.from_pretrained(folder / "tokenizer_2"),
                "add_watermarker": False,
            }
        else:
            parts |= {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
        if "ControlNet" in kind.__name__:
            parts["controlnet"] = ControlNetModel.from_pretrained(folder / "controlnet")
        built = kind(**parts)
        built.set_progress_bar_config(disable=True)
        return built

    return build


def paint(pipeline, *, prompt="a red cat", seed=7, **kwargs):
    """The pipeline's picture as floats."""
    sizes = {} if "image" in kwargs and "mask_image" not in kwargs else {"width": 64, "height": 64}
    options = {"guidance_scale": 1.0, "num_inference_steps": 4, "output_type": "np", "generator": seeded(seed)}
    return pipeline(prompt, **(sizes | options | kwargs)).images[0]


def check(engine, row, expected):
    np.testing.assert_allclose(floats(engine, run(engine, row)), expected, atol=TOLERANCE, rtol=0)
    (done,) = engine.finish([row])
    assert done.pixels.dtype == np.uint8
    np.testing.assert_allclose(done.pixels / 255, expected, atol=0.5 / 255 + TOLERANCE, rtol=0)


def our_steps(engine, name, steps, strength):
    """The timesteps that we visit; pipelines whose strength cuts a schedule's end off are given them."""
    return sampling.timesteps(engine._served[name].model.schedule, steps, strength)


@pytest.mark.parametrize("steps", [1, 2, 4, 8])
@pytest.mark.parametrize("name", ["lcm", "lcm-tiny", "lcm-v"])
def test_text_to_image_of_a_consistency_model(engine, pipeline, name, steps):
    expected = paint(pipeline(LatentConsistencyModelPipeline, name), num_inference_steps=steps, guidance_scale=3.0)
    check(engine, begin(engine, request(name, num_inference_steps=steps, guidance_scale=3.0)), expected)


@pytest.mark.parametrize("steps", [1, 2, 4, 8])
@pytest.mark.parametrize("name", ["plain", "xl-lcm", "xl-plain"])
def test_text_to_image(engine, pipeline, name, steps):
    scale = 3.0 if name == "xl-lcm" else 1.0
    expected = paint(pipeline(StableDiffusionPipeline, name), num_inference_steps=steps, guidance_scale=scale)
    check(engine, begin(engine, request(name, num_inference_steps=steps, guidance_scale=scale)), expected)


@pytest.mark.parametrize("name", ["lcm", "xl-lcm"])
def test_sides_that_no_power_of_two_divides(engine, pipeline, name):
    kind = LatentConsistencyModelPipeline if name == "lcm" else StableDiffusionPipeline
    expected = paint(pipeline(kind, name), width=72, height=40, num_inference_steps=2)
    check(engine, begin(engine, request(name, num_inference_steps=2), size=(72, 40)), expected)


@pytest.mark.parametrize("steps", [1, 4])
@pytest.mark.parametrize("strength", [0.3, 0.6, 1.0])
@pytest.mark.parametrize("name", ["lcm", "lcm-tiny"])
def test_image_to_image_of_a_consistency_model(engine, pipeline, name, strength, steps):
    expected = paint(
        pipeline(LatentConsistencyModelImg2ImgPipeline, name),
        image=Image.fromarray(picture()),
        strength=strength,
        num_inference_steps=steps,
    )
    row = begin(engine, request(name, strength=strength, num_inference_steps=steps), image=picture())
    assert row.steps == steps
    check(engine, row, expected)


@pytest.mark.parametrize("strength", [0.3, 0.6, 1.0])
@pytest.mark.parametrize("name", ["plain", "xl-lcm", "xl-plain"])
def test_image_to_image(engine, pipeline, name, strength):
    # At full strength, its schedule is the one it is given, from the first to the last.
    expected = paint(
        pipeline(StableDiffusionImg2ImgPipeline, name),
        image=Image.fromarray(picture()),
        strength=1.0,
        timesteps=our_steps(engine, name, 4, strength),
    )
    check(engine, begin(engine, request(name, strength=strength), image=picture()), expected)


def inpainting(engine, name, strength):
    """What a pipeline needs to inpaint with our timesteps: below full strength, one more that is cut off."""
    visited = our_steps(engine, name, 4, strength)
    given = {"image": Image.fromarray(picture()), "mask_image": Image.fromarray(half())}
    if strength == 1:
        return given | {"strength": 1.0}
    assert visited[0] < 999
    return given | {"strength": 0.85, "timesteps": [999, *visited]}  # int(5 * 0.85) = 4 of 5


@pytest.mark.parametrize("strength", [0.6, 1.0])
@pytest.mark.parametrize("name", ["lcm", "lcm-tiny", "plain", "nine", "xl-lcm", "xl-plain", "xl-nine"])
def test_inpainting(engine, pipeline, name, strength):
    expected = paint(pipeline(StableDiffusionInpaintPipeline, name), **inpainting(engine, name, strength))
    check(engine, begin(engine, request(name, strength=strength), image=picture(), mask=half()), expected)


@pytest.mark.parametrize("name", ["lcm", "plain", "nine", "xl-lcm", "xl-plain"])
def test_inpainting_the_mask_only(engine, pipeline, name):
    image, mask = picture(128, 96), np.zeros((96, 128), np.uint8)
    mask[40:60, 70:100] = 255
    expected = paint(
        pipeline(StableDiffusionInpaintPipeline, name),
        image=Image.fromarray(image),
        mask_image=Image.fromarray(mask),
        strength=1.0,
        width=128,
        height=96,
        padding_mask_crop=32,
        output_type="pil",
    )
    asked = request(name, strength=1.0, image=png(image), mask=png(mask), inpaint_mask_only=True)
    canvas = read_canvas(asked, 64)
    (done,) = engine.finish([run(engine, engine.begin(0, asked, canvas))])
    ours = canvas.overlay.paste(done.pixels)
    assert np.array_equal(ours[mask == 0], image[mask == 0])
    # Both are bytes, rounded twice on their way: where a value lies on the edge, they may differ by one.
    assert np.abs(ours.astype(int) - np.asarray(expected)).max() <= 1
    assert (ours != np.asarray(expected)).mean() < 1e-3


def png(array):
    file = io.BytesIO()
    Image.fromarray(array).save(file, "PNG")
    return file.getvalue()


@pytest.mark.parametrize("negative", ["", "blue"])
@pytest.mark.parametrize("name", ["plain", "plain-tiny", "xl-plain"])
def test_classifier_free_guidance(engine, pipeline, name, negative):
    # XL was trained with noughts for an empty negative prompt, which its pipeline uses when there is none.
    expected = paint(
        pipeline(StableDiffusionPipeline, name),
        negative_prompt=(negative or None) if name.startswith("xl") else negative,
        guidance_scale=2.0,
    )
    check(engine, begin(engine, request(name, negative_prompt=negative, guidance_scale=2.0)), expected)


@pytest.mark.parametrize("name", ["plain", "nine", "xl-plain"])
def test_guidance_when_inpainting(engine, pipeline, name):
    asked = {"negative_prompt": "blue", "guidance_scale": 2.0}
    expected = paint(pipeline(StableDiffusionInpaintPipeline, name), **inpainting(engine, name, 1.0), **asked)
    check(engine, begin(engine, request(name, strength=1.0, **asked), image=picture(), mask=half()), expected)


def control_image():
    """As diffusers' example for ControlNet v1.1 makes it."""
    image = picture().astype(np.float32) / 255
    image[half()] = -1.0
    return torch.from_numpy(image).permute(2, 0, 1)[None]


@pytest.mark.parametrize("guidance", [1.0, 2.0])
@pytest.mark.parametrize("name", ["plain", "xl-plain"])
def test_controlnet_inpainting(engine, pipeline, name, guidance):
    asked = {"negative_prompt": "blue", "guidance_scale": guidance}
    expected = paint(
        pipeline(StableDiffusionControlNetInpaintPipeline, name),
        control_image=control_image(),
        **inpainting(engine, name, 1.0),
        **asked,
    )
    row = begin(engine, request(name, strength=1.0, controlnet_inpaint=True, **asked), image=picture(), mask=half())
    check(engine, row, expected)


@pytest.mark.parametrize("name", ["lcm", "xl-lcm"])
def test_controlnet_inpainting_with_a_distilled_unet(engine, pipeline, name):
    # The pipeline itself would leave out the guidance embedding, and pay for true guidance in its place.
    reference = pipeline(StableDiffusionControlNetInpaintPipeline, name)
    embedding = guidance_embedding(torch.tensor([7.0]), 16)
    reference.unet.forward = partial(reference.unet.forward, timestep_cond=embedding)
    expected = paint(reference, control_image=control_image(), **inpainting(engine, name, 1.0))
    asked = request(name, strength=1.0, controlnet_inpaint=True, guidance_scale=8.0)
    row = begin(engine, asked, image=picture(), mask=half())
    check(engine, row, expected)
    plain = begin(engine, request(name, strength=1.0, guidance_scale=8.0), image=picture(), mask=half())
    assert np.abs(floats(engine, run(engine, plain)) - expected).max() > 0.01  # the ControlNet has its say


@pytest.mark.parametrize("scale", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("format", ["kohya", "peft"])
@pytest.mark.parametrize("name", ["lcm", "plain", "xl-lcm", "xl-plain"])
def test_loras(engine, specs, pipeline, tmp_path, name, format, scale):
    file = tmp_path / f"{format}.safetensors"  # an engine that has read a file of this name reads no other
    write_lora(file, Path(specs[name].source), format=format, seed=3)
    reference = pipeline(LatentConsistencyModelPipeline if name == "lcm" else StableDiffusionPipeline, name)
    reference.load_lora_weights(str(file), adapter_name="style")
    reference.set_adapters("style", scale)
    expected = paint(reference, num_inference_steps=2)
    row = begin(engine, request(name, num_inference_steps=2, lora=str(file), lora_scale=scale))
    check(engine, row, expected)
    bare = floats(engine, run(engine, begin(engine, request(name, num_inference_steps=2))))
    assert (np.abs(bare - expected).max() > 0.01) == (scale > 0)


# peft's remark on a second LoRA.
@pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute:UserWarning")
@pytest.mark.parametrize("name", ["plain", "xl-plain"])
def test_a_plain_unet_with_lcm_lora(specs, pipeline, tmp_path, name):
    file = tmp_path / "lcm-lora.safetensors"
    write_lora(file, Path(specs[name].source), format="kohya", text_encoder=False, seed=4)
    engine = engine_of(replace(specs[name], lcm_lora=str(file), complete=True))
    style = tmp_path / "style.safetensors"
    write_lora(style, Path(specs[name].source), format="peft", seed=3)
    reference = pipeline(StableDiffusionPipeline, name)
    reference.load_lora_weights(str(file), adapter_name="lcm")
    for steps in (1, 4):
        check(
            engine, begin(engine, request(name, num_inference_steps=steps)), paint(reference, num_inference_steps=steps)
        )
    reference.load_lora_weights(str(style), adapter_name="style")
    reference.set_adapters(["lcm", "style"], [1.0, 0.5])
    check(engine, begin(engine, request(name, lora=str(style), lora_scale=0.5)), paint(reference))


@pytest.mark.parametrize(
    ("family", "scheduler"), [("sd", EulerDiscreteScheduler), ("sdxl", EulerAncestralDiscreteScheduler)]
)
@pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy keyword:DeprecationWarning")
def test_turbo_models(tmp_path, pipeline, family, scheduler):
    name = "xl-turbo" if family == "sdxl" else "turbo"
    spec = write_checkpoint(tmp_path / name, family=family, distilled=False)
    kept = LCMScheduler.load_config(tmp_path / name / "scheduler")
    kept = {key: kept[key] for key in ("beta_start", "beta_end", "beta_schedule")}
    scheduler(**kept, timestep_spacing="trailing", steps_offset=1).save_pretrained(tmp_path / name / "scheduler")
    engine = engine_of(spec)
    for steps in (1, 2, 4):
        reference = pipeline(StableDiffusionPipeline, name, folder=tmp_path / name, scheduler=scheduler)
        expected = paint(reference, num_inference_steps=steps)
        np.testing.assert_allclose(
            floats(engine, run(engine, begin(engine, request(name, num_inference_steps=steps)))), expected, atol=1e-4
        )
    reference = pipeline(StableDiffusionImg2ImgPipeline, name, folder=tmp_path / name, scheduler=scheduler)
    expected = paint(reference, image=Image.fromarray(picture()), num_inference_steps=2, strength=0.5)
    row = begin(engine, request(name, num_inference_steps=1, strength=0.5), image=picture())
    np.testing.assert_allclose(floats(engine, run(engine, row)), expected, atol=1e-4)

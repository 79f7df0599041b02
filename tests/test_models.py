from __future__ import annotations

import json
import shutil

import pytest
import torch
from checkpoints import TOKENS, write_checkpoint
from diffusers import UNet2DConditionModel

from lcm_rt.engine.engine import Engine
from lcm_rt.engine.models import load_model
from lcm_rt.errors import InputError, NotFound

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def lcm(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("models") / "lcm")


@pytest.fixture
def spec(lcm, tmp_path):
    """A copy to damage."""
    path = tmp_path / "copy"
    shutil.copytree(lcm.path, path)
    return type(lcm)(name="copy", path=path, licence="none", size=64)


def edit(file, **changes):
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def load(spec):
    return load_model(spec, CPU, torch.float32)


def test_what_a_model_is_comes_from_its_files(lcm):
    model = load(lcm)
    assert (model.latent_channels, model.pixels_per_latent, model.guidance_dim) == (4, 8, 16)
    assert model.max_tokens == TOKENS
    assert model.schedule.prediction == "epsilon"
    for network in (model.unet, model.vae, model.text_encoder):
        assert not network.training
        assert not any(weight.requires_grad for weight in network.parameters())


def test_a_plain_unet_with_a_tiny_vae(tmp_path):
    model = load(write_checkpoint(tmp_path / "plain", distilled=False, tiny_vae=True, prediction="v_prediction"))
    assert model.guidance_dim is None
    assert (model.latent_channels, model.pixels_per_latent) == (4, 8)
    assert model.schedule.prediction == "v_prediction"


def test_half_precision_weights_are_used_in_the_precision_asked_for(spec):
    folder = spec.path / "unet"
    UNet2DConditionModel.from_pretrained(folder, torch_dtype=torch.float16).save_pretrained(folder)
    assert load(spec).unet.dtype == torch.float32


def test_weights_of_the_variant_fp16(spec):
    for part in ("unet", "vae"):
        file = spec.path / part / "diffusion_pytorch_model.safetensors"
        file.rename(file.with_name("diffusion_pytorch_model.fp16.safetensors"))
    (spec.path / "text_encoder" / "model.safetensors").rename(spec.path / "text_encoder" / "model.fp16.safetensors")
    assert load(spec).unet.dtype == torch.float32


@pytest.mark.parametrize(
    ("part", "name"),
    [("unet", "diffusion_pytorch_model"), ("vae", "diffusion_pytorch_model"), ("text_encoder", "model")],
)
def test_pickled_weights_are_never_opened(spec, part, name):
    file = spec.path / part / f"{name}.safetensors"
    file.rename(file.with_name("pytorch_model.bin" if part == "text_encoder" else f"{name}.bin"))
    with pytest.raises(NotFound, match=r"pickled weights \(.bin, .ckpt\) are never opened"):
        load(spec)


def test_weights_under_a_name_that_nobody_reads(spec):
    # The loaders would fall back to the pickle beside it, were they allowed to.
    file = spec.path / "unet" / "diffusion_pytorch_model.safetensors"
    shutil.copy(file, file.with_suffix(".bin"))
    file.rename(file.with_name("other.safetensors"))
    with pytest.raises(NotFound):
        load(spec)


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder", "tokenizer", "scheduler"])
def test_a_part_is_missing(spec, part):
    shutil.rmtree(spec.path / part)
    with pytest.raises(NotFound):
        load(spec)


def test_broken_weights(spec):
    (spec.path / "unet" / "diffusion_pytorch_model.safetensors").write_bytes(b"not safetensors")
    with pytest.raises(NotFound):
        load(spec)


def test_an_index_that_is_not_json(spec):
    (spec.path / "model_index.json").write_text("[")
    with pytest.raises(NotFound):
        load(spec)


@pytest.mark.parametrize(
    "changes",
    [
        {"unet": ["diffusers", "UNet3DConditionModel"]},
        {"text_encoder_2": ["transformers", "CLIPTextModelWithProjection"]},
        {"vae": ["diffusers", "VQModel"]},
    ],
)
def test_models_of_other_families_are_refused(spec, changes):
    edit(spec.path / "model_index.json", **changes)
    with pytest.raises(InputError, match="model"):
        load(spec)


def test_an_inpainting_unet_is_refused(spec):
    folder = spec.path / "unet"
    UNet2DConditionModel(**(UNet2DConditionModel.load_config(folder) | {"in_channels": 9})).save_pretrained(folder)
    with pytest.raises(InputError, match="9 channels"):
        load(spec)


def test_a_model_that_fails_to_load_leaves_the_engine_as_it_was(lcm, spec):
    engine = Engine(device="cpu", threads=1)
    engine.load(lcm, lambda stage, fraction: None)
    before = dict(engine._served)
    shutil.rmtree(spec.path / "unet")
    with pytest.raises(NotFound):
        engine.load(type(spec)(name=lcm.name, path=spec.path, licence="none", size=64), lambda stage, fraction: None)
    assert engine._served == before

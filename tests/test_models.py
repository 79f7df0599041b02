from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from checkpoints import TOKENS, write_checkpoint
from diffusers import UNet2DConditionModel
from engines import engine_of
from singlefiles import write_single_file

from lcm_rt.catalog import Choice
from lcm_rt.engine.models import load_model, weigh
from lcm_rt.errors import InputError, NotFound
from lcm_rt.hub import Parts, locate

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def lcm(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("models") / "lcm")


@pytest.fixture
def spec(lcm, tmp_path):
    """A copy to damage."""
    path = tmp_path / "copy"
    shutil.copytree(lcm.source, path)
    return replace(lcm, name="copy", source=str(path))


def edit(file, **changes):
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def load(spec):
    return load_model(spec, locate(spec, Choice()), CPU, torch.float32)


def test_what_a_model_is_comes_from_its_files(lcm):
    model = load(lcm)
    assert (model.latent_channels, model.pixels_per_latent, model.guidance_dim) == (4, 8, 16)
    assert model.max_tokens == TOKENS
    assert model.schedule.prediction == "epsilon"
    for network in (*model.networks.values(), model.vae):
        assert not network.training
        assert not any(weight.requires_grad for weight in network.parameters())


def test_a_plain_unet_with_a_tiny_vae(tmp_path):
    model = load(write_checkpoint(tmp_path / "plain", distilled=False, tiny_vae=True, prediction="v_prediction"))
    assert model.guidance_dim is None
    assert (model.latent_channels, model.pixels_per_latent) == (4, 8)
    assert model.schedule.prediction == "v_prediction"


def test_half_precision_weights_are_used_in_the_precision_asked_for(spec):
    folder = Path(spec.source) / "unet"
    UNet2DConditionModel.from_pretrained(folder, torch_dtype=torch.float16).save_pretrained(folder)
    assert load(spec).unet.dtype == torch.float32


def test_weights_of_the_variant_fp16(spec):
    for part in ("unet", "vae"):
        file = Path(spec.source) / part / "diffusion_pytorch_model.safetensors"
        file.rename(file.with_name("diffusion_pytorch_model.fp16.safetensors"))
    (Path(spec.source) / "text_encoder" / "model.safetensors").rename(
        Path(spec.source) / "text_encoder" / "model.fp16.safetensors"
    )
    assert load(spec).unet.dtype == torch.float32


@pytest.mark.parametrize(
    ("part", "name"),
    [("unet", "diffusion_pytorch_model"), ("vae", "diffusion_pytorch_model"), ("text_encoder", "model")],
)
def test_pickled_weights_are_never_opened(spec, part, name):
    file = Path(spec.source) / part / f"{name}.safetensors"
    file.rename(file.with_name("pytorch_model.bin" if part == "text_encoder" else f"{name}.bin"))
    with pytest.raises(NotFound, match="only as a pickle .* can run code"):
        load(spec)


def test_weights_under_a_name_that_nobody_reads(spec):
    # The loaders would fall back to the pickle beside it, were they allowed to.
    file = Path(spec.source) / "unet" / "diffusion_pytorch_model.safetensors"
    shutil.copy(file, file.with_suffix(".bin"))
    file.rename(file.with_name("other.safetensors"))
    with pytest.raises(NotFound):
        load(spec)


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder", "tokenizer", "scheduler"])
def test_a_part_is_missing(spec, part):
    shutil.rmtree(Path(spec.source) / part)
    with pytest.raises(NotFound):
        load(spec)


def test_broken_weights(spec):
    (Path(spec.source) / "unet" / "diffusion_pytorch_model.safetensors").write_bytes(b"not safetensors")
    with pytest.raises(NotFound):
        load(spec)


def test_an_index_that_is_not_json(spec):
    (Path(spec.source) / "model_index.json").write_text("[")
    with pytest.raises(NotFound):
        load(spec)


@pytest.mark.parametrize(
    "changes",
    [
        {"unet": ["diffusers", "UNet3DConditionModel"]},
        {"text_encoder": ["transformers", "T5EncoderModel"]},
        {"vae": ["diffusers", "VQModel"]},
    ],
)
def test_models_of_other_families_are_refused(spec, changes):
    edit(Path(spec.source) / "model_index.json", **changes)
    with pytest.raises(InputError, match="model"):
        load(spec)


def test_a_unet_with_channels_of_unknown_meaning_is_refused(spec):
    folder = Path(spec.source) / "unet"
    UNet2DConditionModel(**(UNet2DConditionModel.load_config(folder) | {"in_channels": 8})).save_pretrained(folder)
    with pytest.raises(InputError, match="takes 8 channels"):
        load(spec)


def test_text_encoders_that_the_unet_does_not_read_are_refused(spec, tmp_path):
    other = write_checkpoint(tmp_path / "xl", family="sdxl")
    shutil.rmtree(Path(spec.source) / "unet")
    shutil.copytree(Path(other.source) / "unet", Path(spec.source) / "unet")
    with pytest.raises(InputError, match="does not read what its text encoders write"):
        load(spec)


@pytest.mark.parametrize("family", ["sd", "sdxl"])
def test_a_checkpoint_that_is_one_file_is_the_same_model(tmp_path, family):
    spec = write_checkpoint(tmp_path / "folder", family=family, distilled=False)
    write_single_file(tmp_path / "one.safetensors", Path(spec.source))
    whole = load(spec)
    parts = Parts(base=tmp_path / "one.safetensors", config=Path(spec.source))
    single = load_model(spec, parts, CPU, torch.float32)
    assert weigh(parts, torch.float32) == pytest.approx(single.bytes, rel=0.01)
    for name, network in whole.networks.items():
        for one, other in zip(network.parameters(), single.networks[name].parameters(), strict=True):
            assert torch.equal(one, other), name
    assert (single.pooled_width is None) == (family == "sd")


def test_a_guess_of_the_size_gives_way_to_what_the_unet_was_trained_at(spec):
    edit(Path(spec.source) / "unet" / "config.json", sample_size=12)
    assert load(spec).side == 96
    assert load(replace(spec, complete=True)).side == 64


def test_a_model_that_fails_to_load_leaves_the_engine_as_it_was(lcm, spec):
    engine = engine_of(lcm)
    before = dict(engine._served)
    parts = locate(spec, Choice())
    shutil.rmtree(Path(spec.source) / "unet")
    with pytest.raises(NotFound):
        engine.load(replace(spec, name=lcm.name), parts, lambda stage, fraction: None)
    assert engine._served == before

from __future__ import annotations

import pickle
import shutil
import socket

import diffusers
import pytest
import torch
import transformers
from checkpoints import write_checkpoint
from safetensors.torch import load_file, save_file
from singlefiles import write_single_file

from lcm_rt.engine.singlefile import GUIDANCE, load_network
from lcm_rt.errors import InputError, NotFound

KINDS = {
    "unet": diffusers.UNet2DConditionModel,
    "vae": diffusers.AutoencoderKL,
    "text_encoder": transformers.CLIPTextModel,
    "text_encoder_2": transformers.CLIPTextModelWithProjection,
}
PARTS = [(family, part) for family in ("sd", "sdxl") for part in KINDS if family == "sdxl" or part != "text_encoder_2"]
# Of each part, what the names of its weights begin with in a file of XL.
BEGINNINGS = {
    "unet": "model.diffusion_model.",
    "vae": "first_stage_model.",
    "text_encoder": "conditioner.embedders.0.",
    "text_encoder_2": "conditioner.embedders.1.",
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Plain models of both families; attention in two of three blocks, as in the real ones."""
    root = tmp_path_factory.mktemp("folders")
    for family in ("sd", "sdxl"):
        write_checkpoint(root / family, family=family, distilled=False)
    return root


@pytest.fixture(scope="module")
def configs(folders, tmp_path_factory):
    """The same folders without a weight."""
    root = tmp_path_factory.mktemp("configs")
    for family in ("sd", "sdxl"):
        shutil.copytree(folders / family, root / family, ignore=shutil.ignore_patterns("*.safetensors"))
    return root


@pytest.fixture(scope="module")
def files(folders, tmp_path_factory):
    root = tmp_path_factory.mktemp("files")
    for family in ("sd", "sdxl"):
        write_single_file(root / f"{family}.safetensors", folders / family)
    return root


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    def refuse(*_):
        raise AssertionError("the network is asked")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


def load(part, file, config, dtype=torch.float32):
    return load_network(KINDS[part], part, file, config, dtype)


def expected(part, folder):
    return KINDS[part].from_pretrained(folder / part).state_dict()


def assert_equal(network, weights):
    found = network.state_dict()
    assert found.keys() == weights.keys()
    for name, weight in weights.items():
        assert torch.equal(found[name], weight), name


@pytest.mark.parametrize(("family", "part"), PARTS)
def test_every_weight_arrives(folders, configs, files, family, part):
    network = load(part, files / f"{family}.safetensors", configs / family)
    assert isinstance(network, KINDS[part])
    assert not network.training
    assert_equal(network, expected(part, folders / family))


def test_more_than_ten_blocks(tmp_path):
    """As the real ones have; the converter looks for input_blocks.1 in names with input_blocks.10, too."""
    write_checkpoint(tmp_path / "deep", distilled=False, blocks=(32,) * 6)
    write_single_file(tmp_path / "deep.safetensors", tmp_path / "deep")
    assert_equal(load("unet", tmp_path / "deep.safetensors", tmp_path / "deep"), expected("unet", tmp_path / "deep"))


@pytest.mark.parametrize(("family", "part"), [place for place in PARTS if place[1].startswith("text")])
def test_text_encoders_say_the_same(folders, configs, files, family, part):
    """Some of what they compute with is not among their weights: positions, for one."""
    network = load(part, files / f"{family}.safetensors", configs / family)
    original = KINDS[part].from_pretrained(folders / family / part)
    ids = torch.arange(24)[None]
    with torch.no_grad():
        ours, theirs = network(ids, output_hidden_states=True), original(ids, output_hidden_states=True)
    assert torch.equal(ours[0], theirs[0])
    assert torch.equal(ours.hidden_states[-2], theirs.hidden_states[-2])


@pytest.mark.parametrize(("family", "part"), PARTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_half_precision_files(tmp_path, folders, configs, family, part, dtype):
    file = tmp_path / "half.safetensors"
    write_single_file(file, folders / family, dtype=torch.float16)
    weights = {name: weight.half().to(dtype) for name, weight in expected(part, folders / family).items()}
    assert_equal(load(part, file, configs / family, dtype), weights)


@pytest.mark.parametrize(("family", "part"), PARTS)
def test_full_precision_files_in_half_precision(folders, configs, files, family, part):
    weights = {name: weight.half() for name, weight in expected(part, folders / family).items()}
    assert_equal(load(part, files / f"{family}.safetensors", configs / family, torch.float16), weights)


def test_a_vae_under_its_other_name(tmp_path, folders, configs, files):
    weights = load_file(files / "sd.safetensors")
    file = tmp_path / "vae.safetensors"
    save_file({name.replace("first_stage_model.", "vae."): weight for name, weight in weights.items()}, file)
    assert_equal(load("vae", file, configs / "sd"), expected("vae", folders / "sd"))


def test_files_are_of_the_original_format(files):
    """Names and shapes that every published file of the kind has: the writer is under test, too."""
    sd, xl = load_file(files / "sd.safetensors"), load_file(files / "sdxl.safetensors")
    for name, dimensions in {
        "model.diffusion_model.time_embed.0.weight": 2,
        "model.diffusion_model.input_blocks.0.0.weight": 4,
        "model.diffusion_model.input_blocks.1.0.in_layers.2.weight": 4,
        "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight": 2,
        "model.diffusion_model.input_blocks.1.1.proj_in.weight": 4,
        "model.diffusion_model.input_blocks.2.0.op.weight": 4,
        "model.diffusion_model.middle_block.1.norm.weight": 1,
        "model.diffusion_model.output_blocks.0.0.skip_connection.weight": 4,
        "model.diffusion_model.output_blocks.1.1.conv.weight": 4,
        "model.diffusion_model.output_blocks.3.2.conv.weight": 4,
        "model.diffusion_model.out.2.bias": 1,
        "first_stage_model.encoder.down.0.block.0.norm1.weight": 1,
        "first_stage_model.encoder.mid.attn_1.q.weight": 4,
        "first_stage_model.decoder.up.3.upsample.conv.weight": 4,
        "first_stage_model.post_quant_conv.weight": 4,
        "cond_stage_model.transformer.text_model.encoder.layers.0.self_attn.q_proj.weight": 2,
    }.items():
        assert sd[name].dim() == dimensions
    for name, dimensions in {
        "model.diffusion_model.label_emb.0.0.weight": 2,
        "model.diffusion_model.input_blocks.3.1.proj_in.weight": 2,
        "conditioner.embedders.0.transformer.text_model.final_layer_norm.weight": 1,
        "conditioner.embedders.1.model.transformer.resblocks.0.attn.in_proj_weight": 2,
        "conditioner.embedders.1.model.transformer.resblocks.0.mlp.c_fc.bias": 1,
        "conditioner.embedders.1.model.positional_embedding": 2,
        "conditioner.embedders.1.model.text_projection": 2,
        "conditioner.embedders.1.model.ln_final.weight": 1,
    }.items():
        assert xl[name].dim() == dimensions
    width = xl["conditioner.embedders.1.model.positional_embedding"].shape[1]
    assert xl["conditioner.embedders.1.model.transformer.resblocks.0.attn.in_proj_weight"].shape == (3 * width, width)


@pytest.mark.parametrize("name", GUIDANCE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_the_guidance_embedding_of_a_distilled_unet(tmp_path, name, dtype):
    """diffusers' converter leaves it out."""
    folder, file = tmp_path / "lcm", tmp_path / "lcm.safetensors"
    write_checkpoint(folder)
    write_single_file(file, folder)
    weights = load_file(file)
    weights[name] = weights.pop(GUIDANCE[0])
    save_file(weights, file)
    original = {name: weight.to(dtype) for name, weight in expected("unet", folder).items()}
    assert original["time_embedding.cond_proj.weight"].shape[1] == 16
    assert_equal(load("unet", file, folder, dtype), original)


def test_a_distilled_unet_is_not_taken_for_a_plain_one(tmp_path, configs):
    write_checkpoint(tmp_path / "lcm")
    write_single_file(tmp_path / "lcm.safetensors", tmp_path / "lcm")
    with pytest.raises(InputError, match="the unet of lcm.safetensors does not fit the configuration sd"):
        load("unet", tmp_path / "lcm.safetensors", configs / "sd")


def test_a_plain_unet_is_not_taken_for_a_distilled_one(tmp_path, files):
    write_checkpoint(tmp_path / "lcm")
    with pytest.raises(InputError, match="lacks weights, such as time_embedding.cond_proj.weight"):
        load("unet", files / "sd.safetensors", tmp_path / "lcm")


@pytest.mark.parametrize("part", KINDS)
def test_a_missing_part_is_named(tmp_path, folders, configs, part):
    file = tmp_path / "partial.safetensors"
    write_single_file(file, folders / "sdxl", keep=lambda name: not name.startswith(BEGINNINGS[part]))
    with pytest.raises(NotFound, match=f"partial.safetensors holds no {part}$"):
        load(part, file, configs / "sdxl")


@pytest.mark.parametrize(
    ("part", "name"),
    [
        ("unet", "middle_block.1.norm.bias"),
        ("vae", "decoder.up.2.block.0.conv1.weight"),
        ("text_encoder", "layers.1.mlp.fc1.weight"),
        ("text_encoder_2", "resblocks.1.attn.in_proj_bias"),
        ("text_encoder_2", "text_projection"),
    ],
)
def test_a_missing_weight_is_not_left_empty(tmp_path, folders, configs, part, name):
    file = tmp_path / "partial.safetensors"
    write_single_file(file, folders / "sdxl", keep=lambda other: not (BEGINNINGS[part] in other and name in other))
    with pytest.raises(InputError, match=f"the {part} of partial.safetensors lacks"):
        load(part, file, configs / "sdxl")


@pytest.mark.parametrize("part", ["unet", "text_encoder"])
def test_a_file_of_another_size(tmp_path, folders, configs, part):
    folder = tmp_path / "other"
    write_checkpoint(folder, blocks=(32, 64, 64), distilled=False)
    if part == "text_encoder":
        config = transformers.CLIPTextConfig.from_pretrained(folder / part)
        config.hidden_size = 48
        KINDS[part](config).save_pretrained(folder / part)
    write_single_file(tmp_path / "other.safetensors", folder)
    with pytest.raises(InputError, match=f"the {part} of other.safetensors does not fit the configuration sd"):
        load(part, tmp_path / "other.safetensors", configs / "sd")


@pytest.mark.parametrize("others", [("sd", "sdxl"), ("sdxl", "sd")])
def test_a_unet_of_the_other_family(configs, files, others):
    family, other = others
    with pytest.raises(InputError, match=f"the unet of {family}.safetensors does not fit the configuration {other}"):
        load("unet", files / f"{family}.safetensors", configs / other)


@pytest.mark.parametrize("part", ["unet", "vae"])
def test_a_network_with_more_in_it_than_its_configuration_says(tmp_path, folders, configs, part):
    file = tmp_path / "more.safetensors"
    write_single_file(file, folders / "sd")
    more = {
        "unet": "model.diffusion_model.middle_block.1.transformer_blocks.1.norm1.weight",
        "vae": "first_stage_model.decoder.up.0.block.7.norm1.weight",
    }
    save_file(load_file(file) | {more[part]: torch.ones(64)}, file)
    with pytest.raises(InputError, match=f"the {part} of more.safetensors does not fit"):
        load(part, file, configs / "sd")


def test_a_lora_is_no_checkpoint(tmp_path, configs):
    file = tmp_path / "style.safetensors"
    weight = torch.zeros(4, 32)
    save_file({"lora_unet_down_blocks_0_attentions_0_proj_in.lora_down.weight": weight}, file)
    for part in KINDS:
        with pytest.raises(InputError, match=f"style.safetensors is no checkpoint.* no {part}; is it a LoRA"):
            load(part, file, configs / "sdxl")


@pytest.mark.parametrize("content", [b"", b"not safetensors", b"\xff" * 4096, b"\x02\0\0\0\0\0\0\0{}", bytes(64)])
def test_random_bytes(tmp_path, configs, content):
    file = tmp_path / "noise.safetensors"
    file.write_bytes(content)
    with pytest.raises(InputError, match="model: noise.safetensors is no"):
        load("unet", file, configs / "sd")


def test_a_file_cut_short(tmp_path, configs, files):
    content = (files / "sd.safetensors").read_bytes()
    (tmp_path / "short.safetensors").write_bytes(content[: len(content) // 2])
    with pytest.raises(InputError, match="not a safetensors file"):
        load("unet", tmp_path / "short.safetensors", configs / "sd")


class Canary:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


@pytest.mark.parametrize("name", ["model.safetensors", "model.ckpt", "model.bin"])
def test_a_pickle_is_never_opened(tmp_path, configs, name):
    file, ran = tmp_path / name, tmp_path / "ran"
    torch.save({"state_dict": Canary(ran)}, file)
    for content in (file.read_bytes(), pickle.dumps(Canary(ran))):
        file.write_bytes(content)
        with pytest.raises(InputError, match=r"pickled checkpoints \(.ckpt, .bin\) are never opened"):
            load("unet", file, configs / "sd")
        assert not ran.exists()


def test_a_missing_file(tmp_path, configs):
    for path in (tmp_path / "nowhere.safetensors", tmp_path):
        with pytest.raises(NotFound, match=f"{path.name} is missing"):
            load("unet", path, configs / "sd")


@pytest.mark.parametrize("part", KINDS)
def test_a_missing_configuration(tmp_path, files, part):
    with pytest.raises(NotFound, match=f"nowhere has no configuration of the {part}"):
        load(part, files / "sdxl.safetensors", tmp_path / "nowhere")


@pytest.mark.parametrize("part", KINDS)
@pytest.mark.parametrize("content", [b"{", b"[1]", b'{"block_out_channels": "x", "hidden_size": "x"}', b"\xff"])
def test_a_broken_configuration(tmp_path, files, part, content):
    (tmp_path / part).mkdir()
    (tmp_path / part / "config.json").write_bytes(content)
    with pytest.raises(InputError, match=f"the {part} of sdxl.safetensors does not fit"):
        load(part, files / "sdxl.safetensors", tmp_path)

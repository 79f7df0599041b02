from __future__ import annotations

import copy
import json
import struct
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import diffusers
import pytest
import torch
import transformers
from checkpoints import write_checkpoint
from hypothesis import given, settings
from hypothesis import strategies as st
from loras import write_lora
from safetensors.torch import load_file, save_file
from torch.utils._python_dispatch import TorchDispatchMode

from lcm_rt.engine import adapters as module
from lcm_rt.engine.adapters import Adapters, applied, fuse, read_adapter
from lcm_rt.errors import InputError

FAMILIES = ("sd", "sdxl")
PIPELINES = {"sd": diffusers.StableDiffusionPipeline, "sdxl": diffusers.StableDiffusionXLPipeline}


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()
    root = tmp_path_factory.mktemp("models")
    for family in FAMILIES:
        write_checkpoint(root / family, family=family)
    return {family: root / family for family in FAMILIES}


@pytest.fixture(scope="module")
def models(folders):
    """Their networks, which no test may change."""
    return {family: networks_of(folder) for family, folder in folders.items()}


def networks_of(folder):
    networks = {
        "unet": diffusers.UNet2DConditionModel.from_pretrained(folder / "unet"),
        "text_encoder": transformers.CLIPTextModel.from_pretrained(folder / "text_encoder"),
    }
    if (folder / "text_encoder_2").is_dir():
        networks["text_encoder_2"] = transformers.CLIPTextModelWithProjection.from_pretrained(folder / "text_encoder_2")
    return {part: network.eval().to(memory_format=torch.channels_last) for part, network in networks.items()}


@pytest.fixture
def lora(folders, models, tmp_path):
    """Writes a LoRA and reads it."""

    def make(family="sd", id="x", dtype=torch.float32, networks=None, **kwargs):
        path = tmp_path / f"{family}-{id}.safetensors"
        write_lora(path, folders[family], **kwargs)
        return read_adapter(path, networks or models[family], "cpu", dtype, id)

    return make


def inputs(part, rows, width, dtype=torch.float32, seed=0):
    """What a network takes; every row another one."""
    generator = torch.Generator().manual_seed(seed)
    if part != "unet":
        return {"input_ids": torch.randint(0, 500, (rows, 24), generator=generator)}
    draw = lambda *shape: torch.randn(rows, *shape, generator=generator).to(dtype)  # noqa: E731
    more = {"added_cond_kwargs": {"text_embeds": draw(16), "time_ids": draw(6)}} if width == 48 else {}
    return {
        "sample": draw(4, 8, 8),
        "timestep": torch.randint(0, 1000, (rows,), generator=generator),
        "encoder_hidden_states": draw(24, width),
        "timestep_cond": draw(16),
        **more,
    }


def run(network, part, rows=2, pick=None):
    """The output of a network for ``rows`` rows, or for those of them in ``pick``."""
    config = network.config
    given = inputs(part, rows, config.cross_attention_dim if part == "unet" else 0, next(network.parameters()).dtype)

    def picked(value):
        if isinstance(value, dict):
            return {key: picked(each) for key, each in value.items()}
        return value if pick is None else value[pick]

    output = network(**picked(given))
    return output.sample if part == "unet" else torch.cat([output[0].flatten(1), output[1].flatten(1)], 1)


def close(a, b, atol=1e-5):
    torch.testing.assert_close(a, b, rtol=0, atol=atol)


def hooks_of(network):
    return sum(len(each._forward_hooks) for each in network.modules())


# The same as diffusers and peft.


@pytest.mark.parametrize(
    "family, kwargs",
    [
        ("sd", {"format": "kohya", "alpha": 2}),
        ("sd", {"format": "kohya", "alpha": 6, "conv": True, "rank": 5}),
        ("sd", {"format": "peft", "alpha": 3}),
        ("sd", {"format": "peft", "conv": True}),
        ("sd", {"format": "diffusers", "conv": True}),
        ("sdxl", {"format": "kohya", "alpha": 2}),
        ("sdxl", {"format": "kohya", "alpha": 2, "conv": True, "sgm": True}),
        ("sdxl", {"format": "peft", "alpha": 8, "conv": True}),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(f"{key}={each}" for key, each in value.items()),
)
def test_outputs_are_those_of_diffusers(family, kwargs, folders, models, tmp_path):
    pytest.importorskip("peft")
    write_lora(tmp_path / "lora.safetensors", folders[family], **kwargs)
    networks = models[family]
    adapter = read_adapter(tmp_path / "lora.safetensors", networks, "cpu", torch.float32, "x")
    pipeline = PIPELINES[family].from_pretrained(
        folders[family], **copy.deepcopy(networks), **({"safety_checker": None} if family == "sd" else {})
    )
    pipeline.load_lora_weights(tmp_path, weight_name="lora.safetensors", adapter_name="lora_test")
    for scale in (0.0, 0.5, 1.0):
        pipeline.set_adapters(["lora_test"], [scale])
        for part, network in networks.items():
            plain = run(network, part)
            with applied(network, part, [adapter] * 2, torch.full((2,), scale)):
                ours = run(network, part)
            close(ours, run(getattr(pipeline, part), part))
            assert torch.equal(ours, plain) == (scale == 0)
            assert scale == 0 or (ours - plain).abs().max() > 1e-3


@pytest.mark.parametrize("family", FAMILIES)
def test_the_formats_say_the_same(family, models, lora):
    variants = [{"format": "kohya"}, {"format": "peft"}, {"format": "diffusers"}, {"format": "kohya", "sgm": True}]
    read = [lora(family, **kwargs) for kwargs in variants[: 3 + (family == "sdxl")]]
    assert set(read[0].parts) == set(models[family])
    for other in read[1:]:
        assert other.bytes == read[0].bytes
        for part, patches in read[0].parts.items():
            assert patches.keys() == other.parts[part].keys()
            for name, patch in patches.items():
                assert torch.equal(patch.down, other.parts[part][name].down)
                assert torch.equal(patch.up, other.parts[part][name].up)


def test_every_layer_of_a_unet_can_be_addressed(models, lora):
    layers = {
        name
        for name, each in models["sdxl"]["unet"].named_modules()
        if isinstance(each, torch.nn.Linear | torch.nn.Conv2d)
    }
    for kwargs in ({"format": "peft"}, {"sgm": True}):
        assert lora("sdxl", conv=True, **kwargs).parts["unet"].keys() == layers - {"time_embedding.cond_proj"}


def test_each_layer_has_its_own_alpha(folders, models, tmp_path):
    write_lora(tmp_path / "a", folders["sd"], alpha=4, conv=True)
    tensors = load_file(tmp_path / "a")
    tensors["lora_unet_conv_in.alpha"] = torch.tensor([1.0])
    tensors["lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q.alpha"] = torch.tensor(
        2, dtype=torch.int8
    )
    del tensors["lora_te_text_model_encoder_layers_0_mlp_fc1.alpha"]
    save_file(tensors, tmp_path / "b")
    adapter = read_adapter(tmp_path / "b", models["sd"], "cpu", torch.float32, "x")
    scales = {(part, name): patch.scales for part, each in adapter.parts.items() for name, patch in each.items()}
    assert scales.pop(("unet", "conv_in")) == (0.25,)
    assert scales.pop(("unet", "mid_block.attentions.0.transformer_blocks.0.attn1.to_q")) == (0.5,)
    assert set(scales.values()) == {(1.0,)}


def settings_file(folders, path, **values):
    write_lora(path, folders["sd"], format="peft", rank=4)
    save_file(load_file(path), path, {"lora_adapter_metadata": json.dumps(values)})


def test_pefts_settings_in_the_header(folders, models, tmp_path):
    values = {
        "unet.lora_alpha": 8,
        "unet.use_rslora": True,
        "text_encoder.lora_alpha": 1,
        "text_encoder.alpha_pattern": {
            "mlp.fc1": 2,
            "layers.2.mlp.fc1": 7,  # the first that fits counts
            "^text_model.encoder.layers.0.mlp.fc2": 6,
            "^mlp.fc2": 9,
        },
    }
    settings_file(folders, tmp_path / "a", **values)
    adapter = read_adapter(tmp_path / "a", models["sd"], "cpu", torch.float32, "x")
    assert {patch.scales for patch in adapter.parts["unet"].values()} == {(4.0,)}
    scales = {name: patch.scales for name, patch in adapter.parts["text_encoder"].items()}
    assert scales["encoder.layers.2.mlp.fc1"] == (0.5,)
    assert scales["encoder.layers.0.mlp.fc2"] == (1.5,)
    assert scales["encoder.layers.1.mlp.fc2"] == (0.25,)


def test_what_becomes_of_the_file_does_not_matter(folders, models, tmp_path):
    write_lora(tmp_path / "lora", folders["sd"])
    adapter = read_adapter(tmp_path / "lora", models["sd"], "cpu", torch.float32, "x")
    patch = next(iter(adapter.parts["unet"].values()))
    before = patch.down.clone()
    with (tmp_path / "lora").open("r+b") as file:
        file.write(bytes((tmp_path / "lora").stat().st_size))
    assert torch.equal(patch.down, before)


# Rows of one batch.


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("part", ["unet", "text_encoder"])
def test_a_mixed_batch_equals_each_row_alone(family, part, models, lora):
    a, b, c, d = (
        lora(family, "a", rank=4, alpha=2, seed=1),
        lora(family, "b", rank=9, conv=True, seed=2),
        lora(family, "c", rank=1, format="peft", seed=3, alpha=3),
        lora(family, "d", rank=4, text_encoder=False, seed=4),
    )
    batch = [a, None, b, c, a, d, b]
    scales = torch.tensor([1.0, 1.0, 0.5, 0.8, -0.3, 1.0, 0.0])
    network = models[family][part]
    plain = run(network, part, 7)
    with applied(network, part, batch, scales):
        mixed = run(network, part, 7)
    assert torch.equal(mixed[1], plain[1]) and torch.equal(mixed[6], plain[6])
    assert torch.equal(mixed[5], plain[5]) == (part == "text_encoder")
    for row, adapter in enumerate(batch):
        with applied(network, part, [adapter], scales[row : row + 1]):
            close(mixed[row : row + 1], run(network, part, 7, pick=[row]))
    assert hooks_of(network) == 0


@pytest.mark.parametrize("others", [[], ["b"]], ids=["one adapter", "two adapters"])
def test_guidance_repeats_the_rows(others, models, lora):
    loras = {"a": lora(id="a"), "b": lora(id="b", seed=1, rank=2, conv=True), None: None}
    network = models["sd"]["unet"]
    batch = [loras[name] for name in ("a", None, *others)]
    scales = torch.tensor([1.0, 1.0, 0.5])[: len(batch)]
    rows = len(batch)
    with applied(network, "unet", batch, scales):
        both = run(network, "unet", 2 * rows)
        halves = [run(network, "unet", 2 * rows, pick=slice(start, start + rows)) for start in (0, rows)]
    close(both, torch.cat(halves))
    assert (both - run(network, "unet", 2 * rows)).abs().amax((1, 2, 3)).gt(1e-3).tolist() == [
        True,
        False,
        *([True] * len(others)),
    ] * 2


def test_rows_left_over_are_refused_and_the_network_is_as_before(models, lora):
    network = models["sd"]["unet"]
    plain = run(network, "unet")
    for rows in (3, 2):
        with pytest.raises(ValueError), applied(network, "unet", [lora()] * rows, torch.ones(2)):
            run(network, "unet", 3)
        assert hooks_of(network) == 0
    assert torch.equal(run(network, "unet"), plain)


def test_a_stranger_in_the_batch_cannot_overflow_the_other_rows(models, lora):
    network = copy.deepcopy(models["sd"]["unet"]).to(torch.bfloat16)
    good = lora(id="good", dtype=torch.bfloat16, rank=2)
    bad = lora(id="bad", dtype=torch.bfloat16, rank=4, scale=1e36, conv=True, seed=1)
    with applied(network, "unet", [good, bad, bad, None], torch.tensor([1.0, 1.0, 0.0, 1.0])):
        mixed = run(network, "unet", 4)
    assert not mixed[1].isfinite().all()
    with applied(network, "unet", [good], torch.ones(1)):
        close(mixed[:1].float(), run(network, "unet", 4, pick=[0]).float(), 0.05)
    assert torch.equal(mixed[3], run(network, "unet", 4)[3])


class NoSync(TorchDispatchMode):
    """Fails where the host would have to wait for a device."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        assert function.overloadpacket.__name__ not in ("_local_scalar_dense", "nonzero", "item"), function
        return function(*args, **(kwargs or {}))


def test_nothing_waits_for_the_device(models, lora):
    network = models["sd"]["unet"]
    batch = [lora(id="a", conv=True), None, lora(id="b", rank=2, seed=1), None]
    with NoSync():
        for adapters in (batch, batch[:2]):
            with applied(network, "unet", adapters, torch.ones(len(adapters))):
                run(network, "unet", 4)


def test_stacks_are_built_once_for_a_combination(models, lora, monkeypatch):
    built = []
    real = module._stack
    monkeypatch.setattr(
        module, "_stack", lambda part, these: built.append([each.id for each in these]) or real(part, these)
    )
    monkeypatch.setattr(module, "_STACKS", module._Stacks(0))
    a, b, c = (lora(id=name, seed=seed) for seed, name in enumerate("abc"))
    network = models["sd"]["unet"]
    for batch in ([a, b], [b, a], [a, None, b], [b, c], [a, b]):
        with applied(network, "unet", batch, torch.ones(len(batch))):
            run(network, "unet", len(batch))
    assert built == [["a", "b"], ["b", "c"], ["a", "b"]]  # with no room, only the newest is kept


def test_stacks_go_with_their_adapters(models, lora, monkeypatch):
    stacks = module._Stacks(2**30)
    monkeypatch.setattr(module, "_STACKS", stacks)
    a, b, c = (lora(id=name, seed=seed) for seed, name in enumerate("abc"))
    network = models["sd"]["unet"]
    for batch in ([a, b], [b, c]):
        with applied(network, "unet", batch, torch.ones(2)):
            run(network, "unet", 2)
    both, batch = stacks._bytes, None
    del a
    assert 0 < stacks._bytes < both
    del b
    assert stacks._bytes == 0


def test_another_models_adapter_of_the_same_id_is_another_one(folders, models, lora, tmp_path):
    networks = copy.deepcopy(models["sd"])
    pairs = [[lora(id=name, seed=seed) for name in "ab"] for seed in (1, 2)]
    outputs = []
    for pair in pairs:
        with applied(networks["unet"], "unet", pair, torch.ones(2)):
            outputs.append(run(networks["unet"], "unet"))
    assert not torch.equal(*outputs)


# For good.


@pytest.mark.parametrize("family", FAMILIES)
def test_fused_equals_applied(family, models, lora):
    adapter = lora(family, conv=True, alpha=2, format="peft")
    for part, network in models[family].items():
        with applied(network, part, [adapter] * 2, torch.full((2,), 0.7)):
            wanted = run(network, part)
        fused = copy.deepcopy(network)
        fuse(fused, part, adapter, 0.7)
        close(run(fused, part), wanted)


def test_fusing_is_computed_in_float32(models, lora):
    network = copy.deepcopy(models["sd"]["unet"]).to(torch.bfloat16)
    before = network.conv_in.weight.float()
    adapter = lora(conv=True, networks={**models["sd"], "unet": network})
    patch = adapter.parts["unet"]["conv_in"]
    fuse(network, "unet", adapter)
    wanted = before + torch.einsum("or,rihw->oihw", patch.up[0], patch.down[0])
    assert torch.equal(network.conv_in.weight, wanted.bfloat16())


# What is refused.


def refused(path, networks, dtype=torch.float32):
    with pytest.raises(InputError) as caught:
        read_adapter(path, networks, "cpu", dtype, "x")
    assert caught.value.field == "lora_url"
    return caught.value.message


def changed(tensors, **changes):
    """``tensors`` with those of ``changes`` in place of the first of that ending, or without it."""
    result = dict(tensors)
    for ending, tensor in changes.items():
        key = next(key for key in sorted(result) if key.endswith(ending))
        if tensor is None:
            del result[key]
        else:
            result[key] = tensor
    return result


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda t: {"conv_in.weight": torch.ones(3)}, "holds no LoRA weights"),
        (lambda t: t | {"lora_unet_conv_in.dora_scale": torch.ones(3)}, "not supported: DoRA"),
        (lambda t: t | {"unet.conv_in.lora_magnitude_vector": torch.ones(3)}, "not supported: DoRA"),
        (lambda t: t | {"lora_unet_conv_in.hada_w1_a": torch.ones(3)}, "not supported: LoHa"),
        (lambda t: t | {"lora_unet_conv_in.lokr_w1": torch.ones(3)}, "not supported: LoKr"),
        (lambda t: t | {"lora_unet_conv_in.lora_mid.weight": torch.ones(3)}, "not supported: Tucker"),
        (lambda t: t | {"lora_unet_conv_in.alpha": torch.ones(())}, "'lora_unet_conv_in.alpha' belongs to no layer"),
        (lambda t: t | {"lora_unet_conv_in.lora_down.weight": torch.ones(())}, "not understood"),
        (lambda t: t | {"bundle_emb.x": torch.ones(())}, "not understood, or its counterpart is missing"),
        (lambda t: t | {f"lora.{n}": torch.ones(()) for n in range(4000)}, "tensors; at most 4000 are taken"),
        (lambda t: changed(t, **{"up.weight": None}), "not understood"),
        (lambda t: changed(t, **{"up.weight": torch.ones(64, 5)}), "is 64x5, and this model's layer takes 64x4"),
        (lambda t: changed(t, **{"down.weight": torch.ones(4, 1)}), "is 4x1, and this model's layer takes 4x32"),
        (lambda t: changed(t, **{"down.weight": torch.ones(())}), "has rank 0; ranks from 1 to 256 are taken"),
        (lambda t: changed(t, **{"down.weight": torch.ones(0, 32)}), "has rank 0"),
        (lambda t: changed(t, **{"down.weight": torch.ones(257, 32)}), "has rank 257"),
        (lambda t: changed(t, **{"down.weight": torch.ones(4, 32).int()}), "has weights of type I32"),
        (lambda t: changed(t, **{"down.weight": torch.full((4, 32), torch.nan)}), "numbers that are not finite"),
        (lambda t: changed(t, **{"up.weight": torch.full((64, 4), torch.inf)}), "numbers that are not finite"),
        (lambda t: changed(t, alpha=torch.tensor(torch.nan)), "alpha' is no number, or a huge one"),
        (lambda t: changed(t, alpha=torch.tensor(1e9)), "alpha' is no number, or a huge one"),
        (lambda t: t | {f"lora_unet_{'x' * 300}": torch.ones(())}, "names of more than 256 characters"),
        (lambda t: changed(t, alpha=torch.ones((), dtype=torch.complex64)), "alpha' is no number"),
        (lambda t: changed(t, alpha=torch.ones(2)), "alpha' is no number, or a huge one"),
    ],
)
def test_bad_files_are_refused_in_words(change, words, folders, models, tmp_path):
    write_lora(tmp_path / "good", folders["sd"], alpha=1)
    save_file(change(load_file(tmp_path / "good")), tmp_path / "bad")
    assert words in refused(tmp_path / "bad", models["sd"])


@pytest.mark.parametrize("format", ["kohya", "peft", "diffusers"])
def test_a_lora_for_another_kind_of_model_is_refused_by_a_name(format, folders, models, tmp_path):
    for mine, other in (FAMILIES, FAMILIES[::-1]):
        write_lora(tmp_path / "lora", folders[other], format=format)
        message = refused(tmp_path / "lora", models[mine])
        assert "it was made for another kind of model" in message
        assert message.startswith(("'lora_", "'unet.", "'text_encoder"))


def test_numbers_too_large_for_half_precision_are_refused(folders, models, tmp_path):
    write_lora(tmp_path / "lora", folders["sd"], scale=1e5)
    read_adapter(tmp_path / "lora", models["sd"], "cpu", torch.float32, "x")
    assert "not finite" in refused(tmp_path / "lora", models["sd"], torch.float16)


@pytest.mark.parametrize(
    "values, words",
    [
        ({"unet.use_dora": True}, "not supported: DoRA"),
        ({"unet.alpha_pattern": {"(a+)+$": 1}}, "is not understood: '(a+)+$'"),
        ({"unet.alpha_pattern": [1]}, "alpha_pattern that is no object"),
        ({"unet.lora_alpha": "2"}, "alpha that is no number"),
        ({"unet.lora_alpha": float("nan")}, "alpha that is no number"),
        ({"unet.lora_alpha": True}, "alpha that is no number"),
        ({"unet.alpha_pattern": {"conv_in": None, "to_q": None}}, "alpha that is no number"),
    ],
)
def test_bad_settings_are_refused(values, words, folders, models, tmp_path):
    settings_file(folders, tmp_path / "lora", **values)
    assert words in refused(tmp_path / "lora", models["sd"])


@pytest.mark.parametrize("text", ["{", "[1]", "[" * 100_000, "1" * 5000])
def test_broken_settings_are_refused(text, folders, models, tmp_path):
    write_lora(tmp_path / "lora", folders["sd"], format="peft")
    save_file(load_file(tmp_path / "lora"), tmp_path / "lora", {"lora_adapter_metadata": text})
    assert "broken lora_adapter_metadata" in refused(tmp_path / "lora", models["sd"])


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"x",
        b"\x80\x02}q\x00.",
        struct.pack("<Q", 2**63) + b"{}",
        struct.pack("<Q", 100) + b"{}",
        b"PK\x03\x04" * 99,
    ],
)
def test_other_files_are_refused(data, models, tmp_path):
    (tmp_path / "lora").write_bytes(data)
    assert refused(tmp_path / "lora", models["sd"]) == "is not a safetensors file, or a broken one"


def test_a_huge_header_is_refused_before_it_is_parsed(models, tmp_path):
    header = json.dumps({"__metadata__": {"a": "x" * (4 * 2**20)}}).encode()
    (tmp_path / "lora").write_bytes(struct.pack("<Q", len(header)) + header)
    assert refused(tmp_path / "lora", models["sd"]) == "has a header of more than 4 MiB"


@pytest.fixture(scope="module")
def small(folders, tmp_path_factory):
    """A small good file, a place for its broken copies."""
    path = tmp_path_factory.mktemp("fuzz") / "lora"
    write_lora(path, folders["sd"], alpha=1, rank=1)
    tensors = load_file(path)
    kept = [key for key in sorted(tensors) if "mid_block" in key and "attn1" in key or "layers_0" in key]
    save_file({key: tensors[key] for key in kept}, path, {"lora_adapter_metadata": '{"unet.lora_alpha": 1}'})
    return path.read_bytes(), path


@given(st.data())
@settings(max_examples=150, deadline=None, derandomize=True)
def test_broken_bytes_raise_nothing_but_input_errors(small, models, data):
    good, path = small
    raw = bytearray(good[: data.draw(st.integers(0, len(good)) | st.just(len(good)))])
    header = len(good) - 3000
    for _ in range(data.draw(st.integers(0, 6))):
        if raw:
            place = data.draw(st.integers(0, min(header, len(raw) - 1)))
            raw[place : place + data.draw(st.integers(0, 3))] = data.draw(st.binary(max_size=3))
    path.write_bytes(raw)
    try:
        adapter = read_adapter(path, models["sd"], "cpu", torch.float32, "x")
    except InputError as error:
        assert error.field == "lora_url"
    else:
        assert adapter.parts


NAMES = ("lora_unet_", "lora_te_", "lora_te2_", "unet.", "text_encoder.", "input_blocks_", "output_blocks_4_1_", "op")
ENDS = (".lora_down.weight", ".lora_up.weight", ".alpha", ".lora_A.weight", ".processor.to_q_lora.down.weight", "")


@given(
    st.lists(
        st.tuples(
            st.lists(st.sampled_from(NAMES) | st.text(max_size=4), max_size=4).map("".join),
            st.sampled_from(ENDS),
        ).map("".join),
        min_size=1,
        max_size=6,
        unique=True,
    )
)
@settings(max_examples=150, deadline=None, derandomize=True)
def test_odd_names_raise_nothing_but_input_errors(small, models, keys):
    _, path = small
    save_file({key: torch.ones(1, 4) for key in keys if key != "__metadata__"}, path)
    refused(path, models["sd"])


# The cache.


def test_one_thread_reads_and_the_others_wait(folders, models, tmp_path, monkeypatch):
    write_lora(tmp_path / "lora", folders["sd"])
    reads, entered, go_on = [], threading.Event(), threading.Event()
    real = module.read_adapter

    def slow(*args):
        reads.append(args)
        entered.set()
        assert go_on.wait(20)
        return real(*args)

    monkeypatch.setattr(module, "read_adapter", slow)
    counts = Counter()
    cache = Adapters(2**30, counts)
    ask = lambda: cache.get(tmp_path / "lora", "x", "sd", models["sd"], "cpu", torch.float32)  # noqa: E731
    with ThreadPoolExecutor(4) as pool:
        first = pool.submit(ask)
        assert entered.wait(20)
        others = [pool.submit(ask) for _ in range(3)]
        go_on.set()
        assert {first.result(), *(other.result() for other in others), ask()} == {first.result()}
    assert len(reads) == 1
    assert counts == {("cache", "lora", "miss"): 1, ("cache", "lora", "hit"): 4}


def test_the_oldest_go_when_there_is_no_room(folders, models, tmp_path):
    write_lora(tmp_path / "lora", folders["sd"])
    size = read_adapter(tmp_path / "lora", models["sd"], "cpu", torch.float32, "x").bytes
    cache = Adapters(2 * size, Counter())

    def get(id, model="sd"):
        return cache.get(tmp_path / "lora", id, model, models["sd"], "cpu", torch.float32)

    a, b = get("a"), get("b")
    assert get("a") is a
    c = get("c")  # b was asked for the longest time ago
    assert get("a") is a and get("c") is c
    assert get("b") is not b
    assert get("b", "another model") is not get("b")


def test_what_cannot_be_read_is_not_kept(folders, models, tmp_path):
    (tmp_path / "lora").write_bytes(b"no")
    cache = Adapters(2**30, Counter())
    with pytest.raises(InputError, match="not a safetensors file"):
        cache.get(tmp_path / "lora", "x", "sd", models["sd"], "cpu", torch.float32)
    write_lora(tmp_path / "lora", folders["sd"])
    assert cache.get(tmp_path / "lora", "x", "sd", models["sd"], "cpu", torch.float32).id == "x"
    with pytest.raises(InputError, match="at most 0 MiB are there for LoRAs"):
        Adapters(1000, Counter()).get(tmp_path / "lora", "x", "sd", models["sd"], "cpu", torch.float32)

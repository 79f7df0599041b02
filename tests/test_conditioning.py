"""Prompts and pictures that are remembered: nobody can tell, but by the clock and the counts."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from engines import half, picture, request
from loras import write_lora

from lcm_rt.catalog import Choice
from lcm_rt.engine.adapters import read_adapter
from lcm_rt.engine.conditioning import Pictures, Prompts, Randomness, as_mask, as_tensor
from lcm_rt.engine.models import Model, load_model
from lcm_rt.engine.networks import Eager
from lcm_rt.hub import fetch, plan
from lcm_rt.images import Canvas

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.inference_mode():
        yield


@pytest.fixture(scope="module")
def load(specs):
    """Models by the name of their kind."""
    loaded: dict[str, Model] = {}

    def get(name: str) -> Model:
        if name not in loaded:
            parts = fetch(plan(specs[name], Choice()), lambda file, received: None)
            loaded[name] = load_model(specs[name], parts, CPU, torch.float32)
        return loaded[name]

    return get


def pictures_of(model: Model, *args) -> Pictures:
    return Pictures(model, lambda: Eager(model), *args)


def prompts_of(model: Model, *args) -> Prompts:
    return Prompts(model, lambda: Eager(model), *args)


def signed(seed: int = 0, size: int = 64) -> torch.Tensor:
    """A picture (3, H, W) in -1..1."""
    return 2.0 * as_tensor(picture(size, size, seed), CPU) - 1.0


def encoded_by_hand(model: Model, image: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """What the pipelines of diffusers do, with their own class for the distribution."""
    output = model.vae.encode(image[None])
    latents = output.latents if hasattr(output, "latents") else output.latent_dist.sample(generator)
    return (model.vae.config.scaling_factor * latents)[0]


class Watched:
    """A VAE that counts what it is asked."""

    def __init__(self, model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
        self.asked = 0
        self._encode = model.vae.encode
        monkeypatch.setattr(model.vae, "encode", self.encode)

    def encode(self, *args):
        self.asked += 1
        return self._encode(*args)


KINDS = ("lcm", "lcm-tiny", "nine", "xl-lcm")
HIT, MISS = ("cache", "picture", "hit"), ("cache", "picture", "miss")


@pytest.mark.parametrize("digest", [None, b"a sketch"], ids=["not kept", "kept"])
@pytest.mark.parametrize("kind", KINDS)
def test_latents_and_what_is_drawn_after_them_are_those_of_diffusers(load, kind, digest, monkeypatch):
    model, counts = load(kind), Counter()
    vae = Watched(model, monkeypatch)
    pictures = pictures_of(model, counts)
    for seed in (1, 2, 1):
        random, generator = Randomness.of(seed, CPU), torch.Generator().manual_seed(seed)
        latents = pictures.encode(signed(), random, digest)
        expected = encoded_by_hand(model, signed(), generator)
        vae.asked -= 1
        assert torch.equal(latents, expected)
        assert latents.is_contiguous()
        assert torch.equal(random.normal((5,)), torch.randn((1, 5), generator=generator)[0])
    assert vae.asked == (3 if digest is None else 1)
    assert counts == ({} if digest is None else {MISS: 1, HIT: 2})


@pytest.mark.parametrize("kind", ["nine", "xl-nine"])
def test_masked_pictures_are_told_apart_by_picture_and_mask(load, kind, monkeypatch):
    model, counts = load(kind), Counter()
    vae = Watched(model, monkeypatch)
    pictures = pictures_of(model, counts)
    left, right, whole = half(), ~half(), np.ones((64, 64), dtype=bool)
    cases = [(0, b"one", left), (0, b"one", right), (1, b"two", left), (0, b"one", whole)]
    for again in range(2):
        for seed, digest, mask in cases:
            random, generator = Randomness.of(3, CPU), torch.Generator().manual_seed(3)
            latents = pictures.encode_masked(signed(seed), mask, random, digest)
            masked = signed(seed).masked_fill(as_mask(mask, CPU), 0.0)
            assert torch.equal(latents, encoded_by_hand(model, masked, generator))
            assert torch.equal(random.normal((5,)), torch.randn((1, 5), generator=generator)[0])
        assert counts[MISS] == len(cases)
        assert counts[HIT] == again * len(cases)
    assert vae.asked == (1 + 2) * len(cases)
    # The picture alone is not the masked one.
    assert torch.equal(
        pictures.encode(signed(), Randomness.of(3, CPU), b"one"),
        encoded_by_hand(model, signed(), torch.Generator().manual_seed(3)),
    )


def test_without_a_picture_all_is_grey(load, monkeypatch):
    model, counts = load("nine"), Counter()
    vae = Watched(model, monkeypatch)
    pictures = pictures_of(model, counts)
    for _ in range(2):
        for size in ((64, 64), (40, 72), (72, 40)):
            mask = np.ones(size, dtype=bool)
            latents = pictures.encode_masked(None, mask, Randomness.of(3, CPU), None)
            expected = encoded_by_hand(model, torch.zeros(3, *size), torch.Generator().manual_seed(3))
            vae.asked -= 1
            assert torch.equal(latents, expected)
    assert vae.asked == 3
    assert counts == {MISS: 3, HIT: 3}


def test_a_masked_picture_without_a_digest_is_not_kept(load):
    counts = Counter()
    pictures = pictures_of(load("nine"), counts)
    for seed in (0, 1):
        latents = pictures.encode_masked(signed(seed), half(), Randomness.of(3, CPU), None)
        masked = signed(seed).masked_fill(as_mask(half(), CPU), 0.0)
        assert torch.equal(latents, encoded_by_hand(load("nine"), masked, torch.Generator().manual_seed(3)))
    assert not counts


def tensors_of(row) -> dict[str, torch.Tensor | None]:
    """All that a trajectory begins with, but for its prompt."""
    known = row.known
    kept = {} if known is None else {"kept": known.latents, "kept noise": known.noise, "where": known.mask}
    return {name: getattr(row, name) for name in ("latents", "noises", "surroundings", "control")} | kept


WAYS = {
    "image to image": {"image": picture()},
    "inpainting": {"image": picture(), "mask": half()},
    "inpainting all": {"image": picture(), "mask": np.ones((64, 64), dtype=bool)},
    "text to image": {},
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_trajectory_begins_the_same_whether_or_not_its_picture_was_seen(engine, kind, way):
    canvas = Canvas(64, 64, **WAYS[way])
    digest = f"{way} with {kind}".encode() if canvas.image is not None else None
    for strength in (0.6, 1.0):
        for seed in (1, 2, 1):
            asked = request(kind, seed=seed, strength=strength)
            fresh, again = (engine.begin(0, asked, replace(canvas, digest=each)) for each in (None, digest))
            assert tensors_of(fresh).keys() == tensors_of(again).keys()
            for name, tensor in tensors_of(fresh).items():
                other = tensors_of(again)[name]
                assert (tensor is None) == (other is None), name
                assert tensor is None or torch.equal(tensor, other), name


def test_pictures_are_remembered_up_to_a_bound(load):
    model = load("lcm")
    counts = Counter()
    one = 2 * 4 * 8 * 8 * 4  # mean and deviation of four channels of 8x8, in float32
    pictures = pictures_of(model, counts, 2 * one + 3000)
    encode = partial(pictures.encode, signed(), Randomness.of(0, CPU))
    for digest in (b"a", b"b", b"a", b"c", b"a"):
        encode(digest)
    assert counts == {MISS: 3, HIT: 2}
    encode(b"b")  # the one that had to go
    assert counts[MISS] == 4


def test_what_is_kept_is_as_large_as_it_is_counted(load):
    """A view would keep all that the encoder made."""
    for kind in ("lcm", "lcm-tiny"):
        pictures = pictures_of(load(kind), Counter())
        pictures.encode(signed(), Randomness.of(0, CPU), b"a")
        ((encoded, _),) = pictures._kept._kept.values()
        for tensor in (tensor for tensor in encoded if tensor is not None):
            assert tensor.untyped_storage().nbytes() == tensor.nbytes


def test_prompts_are_remembered_up_to_a_bound(load, specs, tmp_path):
    model, counts = load("lcm"), Counter()
    prompt = prompts_of(model, Counter()).read("a")
    prompts = prompts_of(model, counts, 2 * prompt.context.nbytes + 3000)
    first = prompts.read("a")
    assert torch.equal(first.context, prompt.context)
    assert prompts.read("a") is first
    second = prompts.read("b")
    assert not torch.equal(first.context, second.context)
    assert prompts.read("a") is first
    third = prompts.read("c")  # "b" is the one longest unused
    assert prompts.read("a") is first and prompts.read("c") is third
    assert counts == {("cache", "prompt", "miss"): 3, ("cache", "prompt", "hit"): 4}
    assert prompts.read("b") is not second


@pytest.mark.parametrize("kind", ["lcm", "xl-lcm"])
def test_prompts_are_told_apart_by_lora_and_dose(load, specs, tmp_path, kind):
    model, counts = load(kind), Counter()
    write_lora(tmp_path / "lora", Path(specs[kind].source))
    one, two = (read_adapter(tmp_path / "lora", model.networks, CPU, torch.float32, id) for id in ("one", "two"))
    prompts = prompts_of(model, counts)
    for _ in range(2):
        for adapter, scale in ((None, 0.0), (one, 1.0), (one, 0.5), (two, 1.0)):
            read = prompts.read("a red cat", adapter, scale)
            fresh = prompts_of(model, Counter()).read("a red cat", adapter, scale)
            assert torch.equal(read.context, fresh.context)
            assert (read.pooled is None) == (kind == "lcm")
            assert read.pooled is None or torch.equal(read.pooled, fresh.pooled)
    assert counts == {("cache", "prompt", "miss"): 4, ("cache", "prompt", "hit"): 4}


def test_arrays_that_cannot_be_written_to_are_taken():
    """As those of a canvas are, which many requests share; torch warns of them."""
    image, mask = picture().copy(), half()
    for array in (image, mask):
        array.setflags(write=False)
    assert torch.equal(as_tensor(image, CPU), torch.tensor(picture()).permute(2, 0, 1) / 255)
    assert torch.equal(as_mask(mask, CPU), torch.tensor(half()))

"""The engine's verbs: batches, buckets, failures, compilation. That its pictures are right is in test_parity.py."""

from __future__ import annotations

import shutil
import weakref
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from checkpoints import write_checkpoint, write_safety_checker
from engines import TOLERANCE, begin, drain, engine_of, floats, half, picture, request, run
from engines import load as engine_load
from loras import write_lora
from torch.utils._python_dispatch import TorchDispatchMode

from lcm_rt.engine.engine import Engine
from lcm_rt.engine.networks import Eager
from lcm_rt.errors import GenerationFailed, InputError, LcmError, ModelLoading, OutOfMemory


@pytest.fixture(scope="module")
def loras(specs, tmp_path_factory):
    """Files of LoRAs, by the model that they are for and their rank."""
    folder = tmp_path_factory.mktemp("loras")
    files = {}
    for name in ("lcm", "plain", "nine", "xl-lcm", "xl-plain"):
        for rank in (2, 5):
            files[name, rank] = str(folder / f"{name}-{rank}.safetensors")
            write_lora(Path(files[name, rank]), Path(specs[name].source), rank=rank, seed=rank, conv=rank == 5)
    return files


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


def mixed(name, loras):
    """Eight rows that have nothing in common but their model."""
    asked = partial(request, name)
    painted = {"image": picture(seed=5), "mask": half()}
    rows = [
        (asked(seed=1), {}),
        (asked(seed=2, prompt="", num_inference_steps=2, guidance_scale=1.5, negative_prompt="blue"), {}),
        (asked(seed=3, strength=0.3), {"image": picture(seed=3)}),
        (asked(seed=4, strength=0.9, num_inference_steps=7, guidance_scale=8), {"image": picture(seed=4)}),
        (asked(seed=5, strength=1.0, lora=loras[name, 2], lora_scale=0.7), painted),
        (asked(seed=6, strength=0.6, num_inference_steps=3, guidance_scale=3, lora=loras[name, 5]), painted),
        (asked(seed=7, num_inference_steps=1, lora=loras[name, 2], lora_scale=-1.0), {}),
        (asked(seed=8, strength=0.7), painted),
    ]
    if name != "nine":
        rows[5] = (replace(rows[5][0], controlnet_inpaint=True), painted)
        rows[7] = (replace(rows[7][0], controlnet_inpaint=True), painted)
    return rows


@pytest.mark.parametrize("name", ["lcm", "plain", "nine", "xl-lcm", "xl-plain"])
def test_a_row_does_not_notice_its_batch(engine, loras, name):
    asked = mixed(name, loras)
    together = [begin(engine, one, key=i, **canvas) for i, (one, canvas) in enumerate(asked)]
    assert len({row.bucket for row in together}) == 1
    drain(engine, together)
    for row, (alone, canvas) in zip(together, asked, strict=True):
        expected = floats(engine, run(engine, begin(engine, alone, **canvas)))
        np.testing.assert_allclose(floats(engine, row), expected, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("name", ["lcm", "plain", "nine", "xl-plain"])
def test_a_model_that_is_loaded_meanwhile_changes_no_picture(engine, loras, name):
    # The loaders of diffusers and transformers set the default dtype of the whole process.
    asked = mixed(name, loras)
    expected = [begin(engine, one, **canvas) for one, canvas in asked]
    drain(engine, expected)
    torch.set_default_dtype(torch.bfloat16)
    try:
        rows = [begin(engine, one, **canvas) for one, canvas in asked]
        drain(engine, rows)
        done = engine.finish(rows)
    finally:
        torch.set_default_dtype(torch.float32)
    for row, other, one in zip(rows, expected, done, strict=True):
        assert torch.equal(row.latents, other.latents)
        assert not isinstance(one, LcmError)


def test_a_load_that_fails_leaves_the_default_dtype(specs, tmp_path):
    folder = tmp_path / "broken"
    shutil.copytree(specs["lcm"].source, folder)
    config = folder / "unet" / "config.json"
    config.write_text(config.read_text().replace("CrossAttnDownBlock2D", "NoSuchBlock"))
    engine = Engine(device="cpu", threads=1)
    engine._dtype = torch.bfloat16
    with pytest.raises(LcmError):
        engine_load(engine, replace(specs["lcm"], source=str(folder)))
    assert torch.get_default_dtype() == torch.float32


def test_an_unloaded_model_is_out_of_memory_at_once(specs):
    engine = engine_of(specs["lcm"])
    run(engine, begin(engine, request()))
    unet = weakref.ref(engine._served["lcm"].model.unet)
    engine.unload("lcm")
    assert unet() is None


def test_guidance_is_a_second_row_only_where_it_has_to_be(engine):
    assert begin(engine, request("plain", guidance_scale=1.0)).negative is None
    assert begin(engine, request("plain", guidance_scale=1.1)).negative is not None
    assert begin(engine, request("lcm", guidance_scale=8.0)).negative is None  # it goes in as an embedding


def test_finish_takes_rows_of_any_size_and_model_in_any_order(engine):
    sizes = [(64, 64), (72, 40), (64, 64), (40, 72)]
    names = ["lcm", "lcm", "plain-tiny", "lcm"]
    rows = [
        run(engine, begin(engine, request(name, seed=i, num_inference_steps=1), size=size))
        for i, (name, size) in enumerate(zip(names, sizes, strict=True))
    ]
    done = engine.finish(rows)
    assert [one.pixels.shape for one in done] == [(height, width, 3) for width, height in sizes]
    for row, one in zip(rows, done, strict=True):
        np.testing.assert_allclose(one.pixels / 255, floats(engine, row), atol=0.51 / 255)
        assert set(row.timings) == {"text", "encode", "denoise", "vae", "safety"}


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
    for done, seed in ((first, 0), (third, 2)):
        (expected,) = engine.finish([run(engine, begin(engine, request(seed=seed)))])
        np.testing.assert_allclose(done.pixels.astype(int), expected.pixels.astype(int), atol=1)


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

    monkeypatch.setattr(Eager, "predict", full)
    with pytest.raises(OutOfMemory, match="out of memory"):
        engine.step([row])
    assert row.index == 0

    monkeypatch.setattr(engine, "_together", 8)
    decode = Eager.decode
    monkeypatch.setattr(Eager, "decode", lambda self, x: full() if len(x) > 1 else decode(self, x))
    assert [done.flagged for done in engine.finish([other, other])] == [False, False]  # one by one, there is room


def test_a_picture_that_cannot_be_decoded_fails_alone(engine, monkeypatch):
    rows = [run(engine, begin(engine, request(seed=i, num_inference_steps=1))) for i in range(2)]
    monkeypatch.setattr(engine, "_together", 8)
    decode, bad = Eager.decode, rows[0].latents[None]

    def fail(self, latents):
        if torch.equal(latents[:1], bad):
            raise Broken("secret")
        return decode(self, latents)

    monkeypatch.setattr(Eager, "decode", fail)
    first, second = engine.finish(rows)
    assert isinstance(first, GenerationFailed)
    assert "secret" not in str(first)
    assert second.pixels.shape == (64, 64, 3)


class Calls(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.add(function.overloadpacket.__name__)
        return function(*args, **(kwargs or {}))


WAITING = {"_local_scalar_dense", "item", "is_nonzero", "nonzero", "equal"}


@pytest.mark.parametrize("name", ["lcm", "plain", "xl-plain"])
def test_a_step_never_waits_for_a_number_of_the_device(engine, loras, name):
    rows = [begin(engine, one, **canvas) for one, canvas in mixed(name, loras)]
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
    assert torch.equal(long.prompt.context, begin(engine, request(prompt="red cat " * 600)).prompt.context)


def test_load_tells_its_stages(specs):
    told, engine = [], Engine(device="cpu", threads=1)

    def tell(stage, fraction):
        told.append((stage, fraction))

    parts, _ = engine.locate(specs["lcm-tiny"], tell)
    engine.load(specs["lcm-tiny"], parts, tell)
    assert [stage for stage, _ in told] == sorted(
        (stage for stage, _ in told), key=["files", "weights", "warm-up"].index
    )
    assert told[0] == ("files", 0.0)
    assert told[-1] == ("warm-up", 1.0)


@pytest.mark.parametrize("name", ["lcm-tiny", "plain", "xl-plain", "nine"])
def test_what_a_model_weighs_is_known_before_it_is_loaded(specs, name):
    engine = Engine(device="cpu", threads=1)
    parts, size = engine.locate(specs[name], lambda stage, fraction: None)
    engine.load(specs[name], parts, lambda stage, fraction: None)
    assert size == pytest.approx(engine.memory[0], rel=0.01)


def test_the_model_longest_unused_is_the_first_to_go(specs):
    engine = engine_of(specs["lcm"], specs["lcm-tiny"])
    assert engine.loaded == ["lcm", "lcm-tiny"]
    begin(engine, request("lcm"))
    assert engine.loaded == ["lcm-tiny", "lcm"]
    engine.unload("lcm-tiny")
    assert engine.loaded == ["lcm"]
    with pytest.raises(ModelLoading):
        begin(engine, request("lcm-tiny"))


def test_a_lora_is_read_once(engine, loras):
    first = engine.adapter(request(lora=loras["lcm", 2]))
    assert engine.adapter(request(lora=loras["lcm", 2], prompt="other")) is first
    assert engine.adapter(request()) is None


def test_a_lora_for_another_model(engine, loras):
    with pytest.raises(InputError, match="lora_url"):
        engine.adapter(request("xl-lcm", lora=loras["lcm", 2]))


def test_a_controlnet_that_is_not_there(engine):
    with pytest.raises(InputError, match="without an inpainting ControlNet"):
        begin(engine, request("nine", controlnet_inpaint=True), image=picture(), mask=half())


def test_previews_are_what_the_end_would_have_been(engine):
    row = begin(engine, request(num_inference_steps=3))
    engine.step([row])
    (preview,) = engine.preview([row])()
    # The first step finds the same clean latents, whether more are to come or not.
    (single,) = engine.finish([run(engine, begin(engine, request(num_inference_steps=1)))])
    assert np.array_equal(preview.pixels, single.pixels)
    run(engine, row)
    (last,) = engine.preview([row])()
    (done,) = engine.finish([row])
    assert np.array_equal(last.pixels, done.pixels)


def test_an_inpainting_unet_paints_whole_pictures_too(engine):
    free = floats(engine, run(engine, begin(engine, request("nine"))))
    everywhere = np.ones((64, 64), bool)
    grey = begin(engine, request("nine", strength=1.0), image=np.full((64, 64, 3), 128, np.uint8), mask=everywhere)
    np.testing.assert_allclose(free, floats(engine, run(engine, grey)), atol=TOLERANCE)  # nothing shows of it
    assert np.abs(free - floats(engine, run(engine, begin(engine, request("nine"), image=picture())))).max() > 0.01


@pytest.fixture(scope="module")
def checked(tmp_path_factory):
    """An engine whose model's safety checker flags every picture."""
    folder = tmp_path_factory.mktemp("checked") / "checked"
    spec = write_checkpoint(folder)
    write_safety_checker(folder / "safety_checker", threshold=-2.0)
    return engine_of(spec)


def test_a_flagged_picture_is_black(checked):
    asked = [request("checked", seed=i, safety=i != 1, num_inference_steps=1) for i in range(3)]
    rows = [run(checked, begin(checked, one)) for one in asked]
    rows += [run(checked, begin(checked, asked[0], size=(64, 72)))]
    done = checked.finish(rows)
    assert [one.flagged for one in done] == [True, False, True, True]
    assert [bool(one.pixels.any()) for one in done] == [False, True, False, False]
    assert all(one.flagged and not one.pixels.any() for one in checked.preview(rows[::2])())

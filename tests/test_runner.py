"""Every way of stepping makes the naive way's picture, and the fast ones ask the device for nothing on the way."""

from __future__ import annotations

import gc
import os
from collections import Counter
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from engines import TOLERANCE, begin, drain, engine_of, floats, half, picture, request
from torch.utils._python_dispatch import TorchDispatchMode

from lcm_rt.engine import runner as runners
from lcm_rt.engine.engine import Engine
from lcm_rt.engine.inductor import any_number
from lcm_rt.engine.models import fingerprint
from lcm_rt.engine.networks import Eager
from lcm_rt.engine.openvino import OpenVino, is_installed
from lcm_rt.engine.runner import Runner
from lcm_rt.engine.slots import COUNT, WINDOW, Advance, Slots
from lcm_rt.engine.trajectory import Bucket

MODES = {
    "text": {},
    "one step": {"num_inference_steps": 1},
    "more steps than a window": {"num_inference_steps": WINDOW + 3},
    "picture": {"image": picture(), "strength": 0.6},
    "mask": {"image": picture(), "mask": half()},
    "guided": {"guidance_scale": 3.0, "negative_prompt": "blue"},
}


def rows_of(engine, model, modes=MODES):
    rows = []
    for seed, fields in enumerate(modes.values()):
        canvas = {name: fields[name] for name in ("image", "mask") if name in fields}
        rest = {name: value for name, value in fields.items() if name not in canvas}
        rows.append(begin(engine, request(model, seed=seed, **rest), **canvas, key=seed))
    return rows


def through_slots(engine, name) -> Runner:
    """Have the engine step the model's rows in slots, by torch's own modules."""
    runner = engine._served[name].runner
    runner._step = runner._advance(Eager(engine._served[name].model))
    return runner


@pytest.mark.parametrize("kind", ["lcm", "lcm-v", "plain", "nine", "xl-lcm", "xl-plain"])
def test_rows_in_slots_get_the_naive_picture(specs, kind):
    naive, fast = engine_of(specs[kind]), engine_of(specs[kind])
    through_slots(fast, kind)
    rows = [rows_of(engine, kind) for engine in (naive, fast)]
    drain(naive, rows[0])
    drain(fast, rows[1])  # a row joins before each step: they meet at all stages
    for expected, row in zip(*rows, strict=True):
        np.testing.assert_allclose(floats(fast, row), floats(naive, expected), atol=TOLERANCE, rtol=0)
    assert fast.counts()["forward", "openvino" if is_installed() else "eager"] > 0


def test_a_row_may_leave_the_slots_and_come_back(specs):
    naive, fast = engine_of(specs["lcm"]), engine_of(specs["lcm"])
    (expected,), (row,) = (rows_of(engine, "lcm", {"mask": MODES["mask"]}) for engine in (naive, fast))
    runner = through_slots(fast, "lcm")
    step = runner._step
    for quick in (True, False, False, True):
        runner._step = step if quick else None
        naive.step([expected])
        fast.step([row])
        assert (row.slot is not None) is (quick and not row.done)
    np.testing.assert_allclose(row.latents, expected.latents, atol=TOLERANCE, rtol=0)


def test_a_slot_is_free_when_its_row_is_done_gone_or_elsewhere(specs):
    engine = engine_of(specs["lcm"])
    slots = Slots(engine._served["lcm"].model, 8, 8)
    rows = [begin(engine, request(seed=seed), image=picture(), mask=half()) for seed in range(COUNT)]
    assert all(slots.take(row) for row in rows)
    late = begin(engine, request(seed=99))
    assert not slots.take(late)
    gone = rows.pop(3)
    number = gone.slot.number
    del gone
    gc.collect()
    assert slots.take(late)
    assert late.slot.number == number
    assert (slots.state.mask[number] == 1).all()  # of the one before, nothing is kept
    slots.leave(rows[0])
    slots.state.latents.zero_()
    assert rows[0].latents.any()  # they are its own now
    assert slots.take(begin(engine, request(seed=100)))


def test_more_rows_than_slots_are_stepped_all_the_same(specs):
    naive, fast = engine_of(specs["plain"]), engine_of(specs["plain"])
    through_slots(fast, "plain")
    guided = {f"{i}": {"guidance_scale": 2.0, "num_inference_steps": 1} for i in range(COUNT + 2)}
    rows = [rows_of(engine, "plain", guided) for engine in (naive, fast)]
    naive.step(rows[0])
    fast.counts()
    fast.step(rows[1])
    for expected, row in zip(*rows, strict=True):
        assert row.done
        np.testing.assert_allclose(row.latents, expected.latents, atol=TOLERANCE, rtol=0)
    assert fast.counts()["forward", "eager"] == 1  # of the two that found no slot


class Calls(TorchDispatchMode):
    """Counts what torch is asked to do."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.calls[function.overloadpacket.__name__] += 1
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("kind", ["lcm", "plain", "xl-lcm"])
def test_a_step_reads_no_number_back_and_adds_few_launches(specs, kind):
    engine = engine_of(specs[kind])
    runner = through_slots(engine, kind)
    bare = Calls()
    rows = rows_of(engine, kind, {str(i): {} for i in range(3)})
    model = engine._served[kind].model
    predict = Eager(model).predict

    def counting(*inputs):
        with bare:
            return predict(*inputs)

    runner._step = Advance(counting, model.schedule, model.dtype, guided=model.guidance_dim is None)
    engine.step(rows)  # they enter their slots
    bare.calls.clear()
    with Calls() as calls:
        engine.step(rows)
    for waiting in ("_local_scalar_dense", "nonzero", "item", "is_nonzero", "equal"):
        assert calls.calls[waiting] == 0, calls.calls
    own = calls.calls - bare.calls
    # Places, gathering, the consistency function, keeping what is known, and the two writes: no more for three rows
    # than for one, and compiled they are part of the same program.
    assert 20 < sum(own.values()) < 90, own


def test_a_planted_wait_is_seen():
    with Calls() as calls:
        torch.ones(1).item()
    assert calls.calls["_local_scalar_dense"] == 1


def test_a_size_in_demand_is_told_once_it_is(specs, monkeypatch):
    monkeypatch.setattr(runners, "DEMAND", 3)
    engine = engine_of(specs["lcm"], backend="inductor")
    rows = [begin(engine, request(seed=i), size=(72, 64)) for i in range(2)]
    drain(engine, rows)
    assert engine.wanted() == ("lcm", (8, 9))
    engine._served["lcm"].runner._tuned.add((8, 9))
    assert engine.wanted() is None
    assert engine_of(specs["lcm"], backend="eager").wanted() is None


@pytest.mark.timeout(400)  # seconds of work, but on a busy machine they are long
def test_each_network_is_traced_once_for_one_row_and_once_for_more(specs, monkeypatch):
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    # Tracing is quick; it is the code generator that takes its time, see the next test.
    monkeypatch.setattr(
        torch, "compile", lambda function, options: partial(torch._dynamo.optimize(backend, nopython=True)(function))
    )
    naive, fast = engine_of(specs["lcm"], backend="eager"), engine_of(specs["lcm"], backend="inductor")
    told = []
    fast.tune("lcm", report=told.append)
    assert told[-1] == 1.0
    assert len(graphs) == 5  # a step of one, of more; decoding, encoding, reading
    for size in ((64, 64), (72, 64)):  # the second one was not compiled for
        rows = [[begin(engine, request(seed=i), size=size) for i in range(4)] for engine in (naive, fast)]
        drain(naive, rows[0])
        drain(fast, rows[1])
        for expected, row in zip(*rows, strict=True):
            np.testing.assert_allclose(floats(fast, row), floats(naive, expected), atol=TOLERANCE, rtol=0)
    assert len(graphs) == 5  # no client has waited for a compiler
    ways = fast.counts()
    assert ways["forward", "inductor"] > 0
    assert ways["forward", "eager"] > 0


class SmallUNet(torch.nn.Module):
    """A UNet's signature; so little inside that code for it is generated in seconds."""

    def __init__(self):
        super().__init__()
        self.config = SimpleNamespace(time_cond_proj_dim=16, in_channels=4)
        self.convolution = torch.nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, x, timesteps, *, encoder_hidden_states, timestep_cond, **others):
        shift = timesteps.float().sin() + encoder_hidden_states.mean((1, 2)) + timestep_cond.mean(1)
        return (torch.nn.functional.silu(self.convolution(x) + shift[:, None, None, None]),)


# torch's own compiler uses what torch has deprecated.
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")
@pytest.mark.timeout(400)
def test_the_compiled_step_equals_the_naive_one(specs, tmp_path):
    naive, fast = engine_of(specs["lcm"]), engine_of(specs["lcm"])
    torch.manual_seed(0)
    network = SmallUNet().requires_grad_(False)
    for engine in (naive, fast):
        served = engine._served["lcm"]
        model = replace(served.model, unet=network)
        runner = Runner(model, "inductor", folder=None, fingerprint="", threads=1, counts=Counter())
        engine._served["lcm"] = replace(served, model=model, runner=runner)
    runner = fast._served["lcm"].runner
    slots = Slots(runner._model, 8, 8)
    with torch.inference_mode():
        inductor = runners.Inductor(runner._model, runner._advance(runner._eager))
        inductor.advance(slots.state, slots.nowhere(1))
        inductor.advance(slots.state, any_number(slots.nowhere(2), 1))
    runner._step = inductor.advance
    rows = [rows_of(engine, "lcm") for engine in (naive, fast)]
    drain(naive, rows[0])
    drain(fast, rows[1])
    for expected, row in zip(*rows, strict=True):
        np.testing.assert_allclose(row.latents, expected.latents, atol=1e-4, rtol=1e-4)


@pytest.mark.skipif(not is_installed(), reason="needs the extra openvino")
@pytest.mark.timeout(400)
@pytest.mark.parametrize("kind", ["lcm-tiny", "xl-lcm"])
def test_openvino_equals_the_eager_networks(specs, converted, kind):
    engine = engine_of(specs[kind])
    model = engine._served[kind].model
    eager = Eager(model)
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(shape, generator=generator)

    for _ in range(2):  # converted, if it was not before, and then read from the cache
        told = []
        weights = fingerprint(engine.locate(specs[kind], lambda *told: None)[0])
        fast = OpenVino(model, converted / "openvino", weights, threads=1, precise=True, report=told.append)
        assert told[-1] == 1.0
        fast.fix(8, 8)  # one of the sizes below has programs of its own
        with torch.inference_mode():
            for rows, height, width in ((1, 8, 8), (3, 16, 8)):
                inputs = (
                    normal(rows, model.unet.config.in_channels, height, width),
                    torch.arange(rows) * 100,
                    normal(rows, model.max_tokens, model.context_width),
                    None if model.guidance_dim is None else normal(rows, model.guidance_dim),
                    None if model.pooled_width is None else normal(rows, model.pooled_width),
                    None if model.pooled_width is None else normal(rows, 6) * 100,
                )
                np.testing.assert_allclose(fast.predict(*inputs), eager.predict(*inputs), atol=1e-4, rtol=1e-3)
                latents, pixels = normal(rows, model.latent_channels, height, width), normal(1, 3, 64, 72).clamp(-1, 1)
                np.testing.assert_allclose(fast.decode(latents), eager.decode(latents), atol=1e-4, rtol=0)
                for ours, theirs in zip(fast.encode(pixels), eager.encode(pixels), strict=True):
                    assert (ours is None) == (theirs is None)
                    if ours is not None:
                        np.testing.assert_allclose(ours, theirs, atol=1e-4, rtol=1e-3)
            for number in range(len(model.readers)):
                ids = torch.randint(0, 300, (1, model.max_tokens), generator=generator)
                for ours, theirs in zip(fast.read(number, ids), eager.read(number, ids), strict=True):
                    assert (ours is None) == (theirs is None)
                    if ours is not None:
                        np.testing.assert_allclose(ours, theirs, atol=1e-4, rtol=1e-3)
        assert len(list((converted / "openvino").glob(f"{kind}-*"))) == 1


@pytest.mark.skipif(not is_installed(), reason="needs the extra openvino")
@pytest.mark.timeout(400)
def test_a_model_answers_before_and_after_it_is_tuned(specs, converted):
    naive = engine_of(specs["lcm-tiny"], backend="eager")
    fast = engine_of(specs["lcm-tiny"], backend="openvino", cache_dir=converted)
    sizes = ((64, 64), (72, 64))  # the second one cannot be halved as often as the network does it
    rows = [
        [begin(engine, request("lcm-tiny", seed=i), size=sizes[i % 2]) for i in range(4)] for engine in (naive, fast)
    ]
    for engine, own in zip((naive, fast), rows, strict=True):
        for bucket in (Bucket("lcm-tiny", 8, 8), Bucket("lcm-tiny", 8, 9)):
            engine.step([row for row in own if row.bucket == bucket])
    fast.tune("lcm-tiny")
    fast.counts()
    for engine, own in zip((naive, fast), rows, strict=True):
        for bucket in (Bucket("lcm-tiny", 8, 8), Bucket("lcm-tiny", 8, 9)):
            some = [row for row in own if row.bucket == bucket]
            while not some[0].done:
                engine.step(some)
    ways = fast.counts()
    assert ways["forward", "openvino"] == 3
    assert ways["forward", "eager"] == 3
    for expected, row in zip(*rows, strict=True):
        # In bfloat16 where the CPU has it.
        assert np.abs(floats(fast, row) - floats(naive, expected)).mean() < 0.02


def test_other_weights_have_another_fingerprint(specs):
    parts, _ = Engine(device="cpu").locate(specs["lcm-tiny"], lambda *told: None)
    file = next((parts.base / "unet").glob("*.safetensors"))
    before, when = fingerprint(parts), file.stat()
    os.utime(file, ns=(when.st_atime_ns, when.st_mtime_ns + 1))
    assert fingerprint(parts) != before
    os.utime(file, ns=(when.st_atime_ns, when.st_mtime_ns))
    assert fingerprint(parts) == before

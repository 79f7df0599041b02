"""The engine's benchmark: its arithmetic, what it counts, and that it runs to its end on a tiny model."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file

from lcm_rt.bench import engine as bench
from lcm_rt.bench import random_weights, roofline
from lcm_rt.bench.roofline import Peak, Work
from lcm_rt.engine.engine import Engine
from lcm_rt.errors import GenerationFailed
from lcm_rt.steptable import StepTable

PEAK = Peak(flops=1e12, bytes=1e9, source="given")


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("weights")


@pytest.fixture(scope="module")
def subject(root):
    random_weights.write(root, "tiny")
    return bench.Subject(f"tiny={random_weights.taesd_of(root, 'tiny')}", size=64, device="cpu", backend="eager")


@pytest.fixture
def engine(subject):
    return bench.open_engine(subject)


# What a call asks of its device.


def test_counts_the_arithmetic_and_traffic_of_products_convolutions_and_attention():
    a, b = torch.randn(3, 5), torch.randn(5, 7)
    work = roofline.count(lambda: a @ b)
    assert (work.flops, work.bytes) == (2 * 3 * 5 * 7, 4 * (15 + 35 + 21))

    convolution = torch.nn.Conv2d(4, 6, 3, padding=1).requires_grad_(False)
    picture = torch.randn(2, 4, 8, 8)
    assert roofline.count(lambda: convolution(picture)).flops == 2 * (2 * 6 * 8 * 8) * 4 * 3 * 3

    q, k = torch.randn(1, 2, 16, 8), torch.randn(1, 2, 10, 8)
    attention = 2 * 2 * (2 * 16 * 10 * 8)
    for mode in (torch.inference_mode, torch.enable_grad):
        with mode():
            counted = roofline.count(lambda: torch.nn.functional.scaled_dot_product_attention(q, k, k))
        assert (counted.flops, len(counted.heavy)) == (attention, 1)


def test_counts_a_linear_layer_the_same_in_inference_mode():
    linear, x = torch.nn.Linear(8, 4).requires_grad_(False), torch.randn(3, 8)
    outside = roofline.count(lambda: linear(x))
    with torch.inference_mode():
        inside = roofline.count(lambda: linear(x))
    assert inside.flops == outside.flops == 2 * 3 * 8 * 4
    assert inside.launches == outside.launches == 1


def test_counts_launches_but_no_views():
    x = torch.randn(4, 6)
    work = roofline.count(lambda: (x.t().reshape(6, 4)[:2].unsqueeze(0).add(1), torch.empty(3), x.view(-1).detach()))
    assert work.launches == 1


@pytest.mark.parametrize(
    ("call", "name"),
    [
        (lambda x: x.sum().item(), "_local_scalar_dense"),
        (lambda x: bool((x > 0).all()), "_local_scalar_dense"),
        (lambda x: x.nonzero(), "nonzero"),
        (lambda x: x[x > 0], "index by a mask"),
        (lambda x: torch.equal(x, x), "equal"),
        (lambda x: x.to("meta"), "_to_copy"),
        (lambda x: torch.empty(4, device="meta").copy_(x), "copy_"),
    ],
)
def test_counts_what_makes_the_host_wait(call, name):
    assert roofline.count(lambda: call(torch.ones(4))).syncs == {name: 1}


def test_copies_that_do_not_wait_are_no_syncs():
    x = torch.ones(4)
    assert not roofline.count(lambda: x.to("meta", non_blocking=True)).syncs
    assert not roofline.count(lambda: x.to(torch.float16)).syncs
    assert not roofline.count(lambda: torch.empty(4).copy_(x)).syncs


def test_floor_takes_the_worse_of_arithmetic_and_traffic_of_each_op():
    work = Work(heavy=[(4 * 10**12, 10**9), (10**9, 3 * 10**9)])
    assert work.floor_s(PEAK) == pytest.approx(4 + 3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_measures_a_peak(dtype):
    peak = roofline.measure_peak(torch.device("cpu"), dtype, side=64)
    assert 1e6 < peak.flops < 1e15 and 1e6 < peak.bytes < 1e13
    assert "64x64" in peak.source and str(dtype).endswith(peak.source.split(" in ")[1].split(",")[0])


# The engine's own work.


def test_a_step_has_no_sync_and_its_floor_grows_with_the_rows(engine, subject):
    one, four = (bench.ask(engine, subject, rows) for rows in (1, 4))
    assert not one["step"].syncs and not four["step"].syncs
    assert four["step"].flops == 4 * one["step"].flops > 0
    assert one["step"].bytes < four["step"].bytes < 4 * one["step"].bytes, "weights are read once"
    assert four["finish"].flops == 4 * one["finish"].flops > 0


def test_a_sync_planted_in_a_step_is_counted(engine, subject, monkeypatch):
    step = Engine.step

    def with_a_sync(self, batch):
        step(self, batch)
        batch[0].latents.abs().max().item()

    monkeypatch.setattr(Engine, "step", with_a_sync)
    assert bench.ask(engine, subject, 2)["step"].syncs == {"_local_scalar_dense": 1}


def test_a_line_says_times_ways_and_shares(engine, subject):
    line = bench.measure(engine, subject, 2, warm_steps=4, samples=8)
    assert line["bucket"] == ["tiny", 8, 8] and line["rows"] == 2 and line["steps"] == 4
    assert line["ways"] == {"eager": 8}, "what is warmed up is not counted"
    assert 0 < line["step_ms"]["p50"] <= line["step_ms"]["p95"] <= line["step_ms"]["max"]
    assert line["batch_ms"]["p50"] > line["finish_ms"]["p50"] + 3 * line["step_ms"]["p50"]
    assert line["pictures_per_s"] == pytest.approx(2e3 / line["batch_ms"]["p50"], rel=1)

    work = Work(flops=10**9, heavy=[(10**9, 0)], launches=3)
    compared = bench.compare(line | {"step_ms": {"p50": 4.0}}, {"step": work}, PEAK)
    assert compared["step"] == {
        "gflop": 1.0,
        "mb": 0.0,
        "launches": 3,
        "syncs": {},
        "floor_ms": 1.0,
        "share": 0.25,
    }


def test_lines_make_a_table_for_the_scheduler():
    def line(rows, step, finish):
        return {"bucket": ["sd", 64, 64], "rows": rows, "step_ms": {"p50": step}, "finish_ms": {"p50": finish}}

    table = StepTable.given(bench.step_table([line(1, 6.0, 3.0), line(4, 9.0, 5.0)]))
    assert table.step(("sd", 64, 64), 4) == pytest.approx(0.009)
    assert table.finish(("sd", 64, 64), 1) == pytest.approx(0.003)


def test_idle_time_is_what_lies_between_kernels():
    # Two launched together, 2 us apart; one that overlaps; then, after 40 us, the next step's.
    spans = [(100.0, 110.0), (112.0, 120.0), (115.0, 125.0), (165.0, 175.0)]
    assert bench.idle(spans, 2) == {"kernels": 2.0, "busy_ms": 0.0165, "idle_us": 21.0, "launch_gap_us": 20.0}


# The command.


def test_runs_to_its_end_and_writes_a_report(root, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(random_weights, "ROOT", root)
    file = tmp_path / "report.json"
    bench.run(random_weights="tiny", size=64, rows=[1, 2], device="cpu", backend="eager", output=file)
    report = json.loads(file.read_text())
    assert [line["rows"] for line in report["lines"]] == [1, 2]
    assert report["lines"][0]["step"]["floor_ms"] > 0
    assert {"machine", "versions", "command", "date", "peak", "step_table"} <= set(report)
    assert "tiny" in capsys.readouterr().out


def test_times_a_cold_and_a_warm_start(subject, tmp_path):
    starts = bench.time_starts(subject, tmp_path)
    for name in ("cold_s", "warm_s"):
        assert list(starts[name]) == list(bench.STAGES)
        assert list(starts[name].values()) == sorted(starts[name].values())
    assert starts["warm_share"] == pytest.approx(starts["warm_s"]["tuned"] / starts["cold_s"]["tuned"], abs=1e-3)


def test_a_start_that_fails_says_why(tmp_path, monkeypatch):
    with pytest.raises(GenerationFailed, match="no model is called 'nothing'"):
        bench.start(bench.Subject("nothing"), tmp_path)
    monkeypatch.setattr(bench, "CHILD_S", 0.01)
    with pytest.raises(GenerationFailed, match="not tuned within"):
        bench.start(bench.Subject("nothing"), tmp_path)


# The weights.


def test_no_weight_is_nought_and_the_same_is_written_again(root, tmp_path):
    folder = random_weights.write(root, "tiny")
    random_weights.write(tmp_path, "tiny")
    tensors = load_file(folder / "unet" / "diffusion_pytorch_model.safetensors")
    again = load_file(tmp_path / "tiny" / "unet" / "diffusion_pytorch_model.safetensors")
    for name, tensor in tensors.items():
        assert (
            tensor.dtype == torch.float16 and tensor.isfinite().all() and tensor.count_nonzero() > 0.9 * tensor.numel()
        )
        assert torch.equal(tensor, again[name])


@pytest.mark.parametrize("tiny_vae", [True, False])
def test_serves_with_companions_and_flags_nothing(root, tiny_vae):
    _, _, lora = random_weights.write_companions(root, "tiny")
    spec = random_weights.spec_of(root, "tiny", tiny_vae=tiny_vae, companions=True)
    engine = Engine(device="cpu", backend="eager", threads=1)
    parts, _ = engine.locate(spec, lambda stage, fraction: None)
    engine.load(spec, parts, lambda stage, fraction: None)
    assert (parts.controlnet and parts.safety) and lora.is_file()
    subject = bench.Subject("tiny", size=64)
    batch = bench.begin(engine, subject, 2)
    for _ in range(4):
        engine.step(batch)
    for picture in engine.finish(batch):
        assert not picture.flagged and picture.pixels.std() > 10


def test_what_was_cut_is_written_anew(tmp_path, monkeypatch):
    def cut(folder):
        raise KeyboardInterrupt

    monkeypatch.setattr(random_weights, "_write_tokenizer", cut)
    with pytest.raises(KeyboardInterrupt):
        random_weights.write(tmp_path, "tiny")
    assert list(tmp_path.iterdir()) == []
    monkeypatch.undo()
    assert (random_weights.write(tmp_path, "tiny") / "tokenizer" / "vocab.json").is_file()
    written = (tmp_path / "tiny" / "model_index.json").stat().st_mtime_ns
    random_weights.write(tmp_path, "tiny")
    assert (tmp_path / "tiny" / "model_index.json").stat().st_mtime_ns == written


def test_whoever_is_second_keeps_what_the_first_wrote(tmp_path):
    def write(new):
        (tmp_path / "folder").mkdir()
        (tmp_path / "folder" / "first").touch()
        (new / "second").touch()

    assert random_weights._once(tmp_path / "folder", write) == tmp_path / "folder"
    assert [path.name for path in (tmp_path / "folder").iterdir()] == ["first"]
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]

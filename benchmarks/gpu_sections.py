"""What ``gpu.py`` measures: a section is a generator of parts, each with a name and a call that gives its figures.

A part that fails costs no other, and what a section's parts share is made when the first of them needs it. With
``tiny``, a model of some kilobytes takes the place of both, on whatever device there is: for tests, not for figures.
"""

from __future__ import annotations

import asyncio
import contextlib
import copy
import functools
import io
import json
import math
import os
import platform
import random
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gpu_goals import Results
from PIL import Image
from torch.nn.attention import SDPBackend, sdpa_kernel

from lcm_rt.bench import engine as bench
from lcm_rt.bench import figures, random_weights, roofline, traces
from lcm_rt.bench.dialects import WebSocket
from lcm_rt.bench.engine import Subject
from lcm_rt.bench.observers import Counters, Processes, Server
from lcm_rt.bench.serve import Load, measure
from lcm_rt.engine.engine import Engine
from lcm_rt.images import encode_picture

Parts = Iterator[tuple[str, Callable[[], Any]]]

SERVED = "served"
"""What the model is called at the servers."""

LATENTS_PER_SIDE = 8

TUNED_S = 420.0
"""How long a server may take until its networks are compiled."""

SERVER_STOP_S = 20.0


class Skipped(Exception):
    """This part cannot be measured here; the message says why."""


@dataclass(frozen=True, slots=True)
class Box:
    """Where and how large. ``work`` is a folder for weights, caches and results that may be thrown away."""

    work: Path
    tiny: bool

    @property
    def on_gpu(self) -> bool:
        return torch.cuda.is_available()

    @property
    def device(self) -> torch.device:
        return torch.device("cuda" if self.on_gpu else "cpu")

    @property
    def dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.on_gpu else torch.float32

    @property
    def backend(self) -> bench.Backend:
        return "auto" if self.on_gpu else "eager"  # nobody waits for a compiler to see that this program runs

    @property
    def cache_dir(self) -> Path:
        return self.work / "cache"

    def family(self, name: random_weights.Family) -> random_weights.Family:
        return "tiny" if self.tiny else name

    def side(self, name: random_weights.Family) -> int:
        return random_weights.SIDES[self.family(name)]

    def pick(self, full: Any, tiny: Any) -> Any:
        return tiny if self.tiny else full

    def folder(self, name: random_weights.Family, vae: str) -> Path:
        """The model's folder, written if need be."""
        family = self.family(name)
        folder = random_weights.write(self.work / "weights", family, device=self.device.type)
        return random_weights.taesd_of(self.work / "weights", family) if vae == "taesd" else folder

    def subject(self, name: random_weights.Family, vae: str, **options: Any) -> Subject:
        options = {"size": self.side(name), "steps": 4, "backend": self.backend} | options
        return Subject(f"{SERVED}={self.folder(name, vae)}", device=self.device.type, **options)


def machine(box: Box, results: Results) -> Parts:
    """What there is: its clocks, and what of the peaks of its data sheet it gives."""

    def facts() -> dict[str, Any]:
        found: dict[str, Any] = {
            "torch": torch.__version__,
            "python": platform.python_version(),
            "cores": os.cpu_count(),
        }
        if box.on_gpu:
            properties = torch.cuda.get_device_properties(0)
            found |= {
                "gpu": properties.name,
                "memory_gb": round(properties.total_memory / 2**30, 1),
                "multiprocessors": properties.multi_processor_count,
                "cuda": torch.version.cuda,
                "cudnn": torch.backends.cudnn.version(),
                "nvidia_smi": _nvidia_smi(),
            }
        return found

    yield "facts", facts
    yield "peak", lambda: asdict(roofline.measure_peak(box.device, box.dtype, side=box.pick(None, 128)))
    yield "clocks after", lambda: _nvidia_smi() if box.on_gpu else _skip("there is no GPU")


def _nvidia_smi() -> dict[str, str]:
    names = "name,driver_version,clocks.sm,clocks.mem,clocks.max.sm,power.draw,power.limit,temperature.gpu,pstate"
    try:
        said = subprocess.run(
            ["nvidia-smi", f"--query-gpu={names}", "--format=csv,noheader"], capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError) as error:
        raise Skipped(f"nvidia-smi: {error}") from None
    return dict(zip(names.split(","), said.stdout.splitlines()[0].split(", "), strict=False))


def starts(box: Box, results: Results) -> Parts:
    """G14: from nothing to a picture, in a fresh process; the first one fills the cache that all others have."""

    def cold() -> dict[str, float]:
        shutil.rmtree(box.cache_dir, ignore_errors=True)
        return bench.start(box.subject("sd", "taesd"), box.cache_dir)

    yield "cold", cold
    yield "warm", lambda: bench.start(box.subject("sd", "taesd"), box.cache_dir)


# G4 to G7, G12, G15: the engine by itself.


@dataclass(frozen=True, slots=True)
class Rig:
    """An engine with one model: "eager", "untuned" (on a GPU: eager steps in CUDA graphs) or "tuned"."""

    box: Box
    engine: Engine
    subject: Subject
    asked: dict[int, dict[str, roofline.Work]]

    def line(self, rows: int) -> dict[str, Any]:
        warm, samples = self.box.pick((None, None), (1, 4))
        line = bench.measure(self.engine, self.subject, rows, warm_steps=warm, samples=samples)
        return bench.compare(line, self.asked[rows], _peak(self.box))

    def profile(self, rows: int) -> dict[str, Any]:
        if not self.box.on_gpu:
            raise Skipped("there is no GPU to be profiled")
        return bench.profile(self.engine, self.subject, rows)

    def throughput(self, steps: int, rows: int) -> dict[str, Any]:
        """Pictures per second, to the host: one batch after the other, and the GPU does not wait for their pixels."""
        subject = replace(self.subject, steps=steps)
        bench.measure(self.engine, subject, rows, warm_steps=self.box.pick(None, 1), samples=1)  # its graph is made
        batches = self.box.pick(max(8, 320 // (rows * steps)), 2)
        begun_at = time.perf_counter()
        wait: Callable[[], object] = lambda: None  # noqa: E731
        for _ in range(batches):
            batch = bench.begin(self.engine, subject, rows)
            while not batch[0].done:
                self.engine.step(batch)
            pictures = self.engine.begin_finish(batch)
            wait()
            wait = pictures
        wait()
        seconds = time.perf_counter() - begun_at
        return {"rows": rows, "steps": steps, "batches": batches, "per_s": round(batches * rows / seconds, 2)}

    def batch_invariance(self, rows: int) -> dict[str, Any]:
        """G15: how far a picture that was made beside others is from the same one made alone."""

        def first(number: int) -> np.ndarray:
            batch = bench.begin(self.engine, self.subject, number)
            while not batch[0].done:
                self.engine.step(batch)
            pictures = self.engine.finish(batch)
            for picture in pictures:
                if isinstance(picture, Exception):
                    raise picture
            return pictures[0].pixels

        return {"rows": rows, **psnr(first(1), first(rows))}


def psnr(one: np.ndarray, other: np.ndarray) -> dict[str, float]:
    """Of pictures in uint8; those that are the same have 100 dB, and are ``identical``."""
    error = float(np.mean((one.astype(np.float64) - other) ** 2))
    worst = int(np.abs(one.astype(np.int16) - other).max())
    return {"psnr_db": round(10 * math.log10(255**2 / error), 2) if error else 100.0, "worst": worst}


@functools.cache
def _peak(box: Box) -> roofline.Peak:
    return (
        roofline.measure_peak(box.device, box.dtype, side=128) if box.tiny else roofline.peak_of(box.device, box.dtype)
    )


@functools.cache
def _rig(box: Box, family: random_weights.Family, vae: str, way: str) -> Rig:
    subject = box.subject(family, vae, backend="eager" if way == "eager" else box.backend)
    engine = bench.open_engine(subject, cache_dir=box.cache_dir)
    asked = {rows: bench.ask(engine, subject, rows) for rows in _rows(box, family)}
    if way == "tuned":
        engine.tune(subject.name, subject.latents)
    return Rig(box, engine, subject, asked)


def _rows(box: Box, family: random_weights.Family) -> tuple[int, ...]:
    if box.tiny:
        return (1, 2)
    return (1, 2, 4, 8, 16) if family == "sd" else (1, 2, 4)


def _lines(box: Box, family: random_weights.Family, vae: str, way: str, many: tuple[int, ...]) -> Parts:
    for rows in many:
        yield f"{vae} {way} {rows}", lambda rows=rows: _rig(box, family, vae, way).line(rows)


def sd(box: Box, results: Results) -> Parts:
    """SD1.5 at 512: every way to step, and both VAEs."""
    rig = functools.partial(_rig, box, "sd", "taesd", "tuned")
    most = _rows(box, "sd")[-1]
    few = box.pick((1, 4, 16), (1,))
    yield from _lines(box, "sd", "taesd", "tuned", _rows(box, "sd"))
    for rows in (1, 16):
        yield f"taesd profile {rows}", lambda rows=rows: rig().profile(rows)
    for name, steps, rows in (("1 step 1", 1, 1), ("1 step 16", 1, 16), ("4 steps 16", 4, 16), ("4 steps 1", 4, 1)):
        yield f"throughput {name}", lambda steps=steps, rows=rows: rig().throughput(steps, min(rows, most))
    yield "batch invariance", lambda: rig().batch_invariance(most)
    yield from _lines(box, "sd", "kl", "tuned", few)
    yield from _lines(box, "sd", "taesd", "untuned", few)
    yield from _lines(box, "sd", "taesd", "eager", few)


def sdxl(box: Box, results: Results) -> Parts:
    """SDXL at 1024."""
    yield from _lines(box, "sdxl", "taesd", "tuned", _rows(box, "sdxl"))
    yield "taesd profile 1", lambda: _rig(box, "sdxl", "taesd", "tuned").profile(1)
    yield from _lines(box, "sdxl", "kl", "tuned", (1,))


# G1, G8 to G11, G13: real servers, and clients on the same machine.


@dataclass(frozen=True, slots=True)
class Running:
    """A server's address and its process."""

    url: str
    pid: int


@contextlib.contextmanager
def server(box: Box, *, max_rows: int) -> Iterator[Running]:
    """A server of the model with the tiny VAE, once its networks are fast."""
    last: deque[str] = deque(maxlen=30)
    with tempfile.TemporaryDirectory() as data:
        process = subprocess.Popen(
            [
                *(sys.executable, "-m", "lcm_rt", "serve", "--port", "0", "--data-dir", data),
                *("--model", f"{SERVED}={box.folder('sd', 'taesd')}"),
                *("--device", box.device.type, "--backend", box.backend),
            ],
            stderr=subprocess.PIPE,
            text=True,
            env={
                **os.environ,
                "COLUMNS": "200",
                "LCM_RT_MAX_ROWS": str(max_rows),
                "LCM_RT_CACHE_DIR": str(box.cache_dir),
            },
        )
        assert process.stderr
        reader = threading.Thread(target=lambda: last.extend(process.stderr or ()), daemon=True)
        try:
            for line in process.stderr:
                last.append(line)
                if match := re.search(r"page +(http://\S+)/", line):
                    break
            else:
                raise RuntimeError(f"the server did not become ready: {''.join(last)[-2000:]}")
            reader.start()  # so that it never waits for us
            _wait_tuned(match[1], box)
            yield Running(match[1], process.pid)
        finally:
            process.terminate()
            try:
                process.wait(SERVER_STOP_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _wait_tuned(url: str, box: Box) -> None:
    end_at = time.monotonic() + TUNED_S
    while box.backend != "eager":
        with urllib.request.urlopen(f"{url}/models", timeout=30) as answer:
            if all(model["backend"] != "eager" for model in json.load(answer)["models"]):
                return
        if time.monotonic() > end_at:
            raise RuntimeError(f"the networks were not compiled within {TUNED_S:.0f} s")
        time.sleep(0.5)


def drive(running: Running, trace: str, sessions: int, seconds: float, **fields: Any) -> dict[str, Any]:
    """The report of ``lcm-rt bench serve``, of all clients together."""
    counters = Counters(Server(running.url, None))
    load = Load(traces=(trace,), sessions=sessions, seconds=seconds, fields=fields)
    socket = WebSocket(f"{running.url.replace('http', 'ws', 1)}/{SERVED}/realtime")
    report = asyncio.run(measure(socket, load, observers=[counters, Processes(running.pid)])).report()
    del report["clients"]
    return report


def serving(box: Box, results: Results) -> Parts:
    """The server as it is, with one client and with sixteen."""
    with contextlib.ExitStack() as stack:
        running = functools.cache(lambda: stack.enter_context(server(box, max_rows=16)))
        many, short, long = box.pick((16, 10.0, 20.0), (2, 1.0, 1.0))
        for name, trace, sessions, seconds, fields in (
            ("warm-up", "camera", many, short, {}),
            ("single", "single", 1, short, {}),
            ("typing 16", "typing", many, long, {}),
            ("camera 16", "camera", many, short, {}),
            ("single, 1 step", "single", 1, short, {"num_inference_steps": 1}),
            ("flood", "flood", 1, short, {}),
            ("typing 1", "typing", 1, long, {}),
        ):
            call = functools.partial(drive, trace=trace, sessions=sessions, seconds=seconds, **fields)
            yield name, lambda call=call: call(running())


def one_by_one(box: Box, results: Results) -> Parts:
    """The same server, if each picture had the GPU to itself."""
    with contextlib.ExitStack() as stack:
        running = functools.cache(lambda: stack.enter_context(server(box, max_rows=1)))
        many, seconds = box.pick((16, 10.0), (2, 1.0))
        for name in ("warm-up", "camera 16"):
            yield name, lambda: drive(running(), "camera", many, seconds)


def simulation(box: Box, results: Results) -> Parts:
    """What the simulation makes of the measured step table, beside what the server did with the same traces."""
    import simulate

    from lcm_rt.steptable import StepTable

    lines = [line for name, line in results.parts("sd").items() if name.startswith("taesd tuned ")]
    many, seconds = box.pick((16, 20.0), (2, 1.0))

    def predict(name: str, trace: str, sessions: int) -> dict[str, Any]:
        if not lines:
            raise Skipped("there is no step table to feed it with")
        table = bench.step_table(lines)
        device = simulate.Device(StepTable.given(table), 16, simulate.GRAPHS)
        bucket = tuple(table[0]["bucket"])
        keys = [
            traces.find(trace).keys(seconds, random.Random(f"{Load().seed}/{number}")) for number in range(sessions)
        ]
        clients = [simulate.Client([key.at for key in each], bucket=bucket) for each in keys]
        simulated = simulate.figures(simulate.simulate(device, simulate.OURS, clients), seconds, sessions)
        measured = (results.part("serving", name) or {}).get("all", {}).get("input_to_frame_ms")
        return {"simulated": simulated, "measured_input_to_frame_ms": measured}

    yield "typing 16", lambda: predict("typing 16", "typing", many)
    yield "typing 1", lambda: predict("typing 1", "typing", 1)
    yield "table", lambda: bench.step_table(lines) if lines else _skip("no step was measured")


# G2, G3: what diffusers takes for the same picture.


def diffusers(box: Box, results: Results) -> Parts:
    """Its pipeline with the same weights, from text to a JPEG; eager, then compiled as its documentation advises."""
    repeats, warm = box.pick((20, 5), (2, 1))
    for way in ("eager", "compiled"):
        for vae in ("taesd", "kl"):

            def timed(way: str = way, vae: str = vae) -> dict[str, Any]:
                if way == "compiled" and not box.on_gpu:
                    raise Skipped("compiled on a GPU only")
                paint = _pipeline(box, vae, compiled=way == "compiled")
                for _ in range(warm):
                    paint()
                return figures.spread(_seconds(paint) for _ in range(repeats)) or {}

            yield f"{way} {vae}", timed


def _seconds(call: Callable[[], object]) -> float:
    begun_at = time.perf_counter()
    call()
    return time.perf_counter() - begun_at


def _pipeline(box: Box, vae: str, *, compiled: bool) -> Callable[[], bytes]:
    import diffusers as library
    import transformers
    from transformers import CLIPTextModel, CLIPTokenizer

    library.utils.logging.set_verbosity_error()
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    folder = box.folder("sd", vae)
    kinds = {"taesd": library.AutoencoderTiny, "kl": library.AutoencoderKL}
    pipeline = library.LatentConsistencyModelPipeline(
        vae=kinds[vae].from_pretrained(folder / "vae", torch_dtype=box.dtype),
        text_encoder=CLIPTextModel.from_pretrained(folder / "text_encoder", dtype=box.dtype),
        tokenizer=CLIPTokenizer.from_pretrained(folder / "tokenizer"),
        unet=library.UNet2DConditionModel.from_pretrained(folder / "unet", torch_dtype=box.dtype),
        scheduler=library.LCMScheduler.from_pretrained(folder / "scheduler"),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).to(box.device)
    pipeline.set_progress_bar_config(disable=True)
    if compiled:
        import torch._inductor.config as inductor

        inductor.conv_1x1_as_mm = True
        inductor.coordinate_descent_tuning = True
        inductor.epilogue_fusion = False
        inductor.coordinate_descent_check_all_directions = True
        for network in (pipeline.unet, pipeline.vae):
            network.to(memory_format=torch.channels_last)
        pipeline.unet = torch.compile(pipeline.unet, mode="max-autotune", fullgraph=True)
        pipeline.vae.decode = torch.compile(pipeline.vae.decode, mode="max-autotune", fullgraph=True)
    side, seeds = box.side("sd"), iter(range(10**6))

    def paint() -> bytes:
        picture = pipeline(
            bench.PROMPT,
            height=side,
            width=side,
            num_inference_steps=4,
            guidance_scale=8.5,
            generator=torch.Generator().manual_seed(next(seeds)),
        ).images[0]
        file = io.BytesIO()
        picture.save(file, "JPEG", quality=80)
        return file.getvalue()

    return paint


# What to choose: each alternative by itself, on the UNet alone or on one op.


def choices(box: Box, results: Results) -> Parts:
    """Layouts, fused projections, attention kernels, JPEG encoders, FP8."""
    for rows in box.pick((1, 16), (1,)):
        for name in (
            "channels_last",
            "contiguous",
            "fused QKV",
            "cuDNN attention",
            "flash attention",
            "efficient attention",
        ):
            yield f"unet {name} {rows}", lambda name=name, rows=rows: _unet_ms(box, name, rows)
    for tokens, width in box.pick(((4096, 40), (1024, 80), (256, 160), (64, 160)), ((64, 16),)):
        yield f"self-attention {tokens}x{width}", lambda t=tokens, w=width: _attention_us(box, t, t, w)
        yield f"cross-attention {tokens}x{width}", lambda t=tokens, w=width: _attention_us(box, t, 77, w)
    for side in box.pick((512, 1024), (64,)):
        yield f"jpeg {side}", lambda side=side: _jpeg_ms(side, box.pick(40, 2))
    yield "fp8 linears of SDXL", lambda: _fp8(box)


BACKENDS = {
    "cuDNN attention": SDPBackend.CUDNN_ATTENTION,
    "flash attention": SDPBackend.FLASH_ATTENTION,
    "efficient attention": SDPBackend.EFFICIENT_ATTENTION,
}


@functools.cache
def _unet(box: Box, family: random_weights.Family) -> Any:
    from diffusers import UNet2DConditionModel

    unet = UNet2DConditionModel.from_pretrained(box.folder(family, "kl") / "unet", torch_dtype=box.dtype)
    return unet.to(box.device).eval().requires_grad_(False)


def _unet_call(
    box: Box, family: random_weights.Family, unet: Any, rows: int, layout: torch.memory_format
) -> Callable[[], Any]:
    config, side = unet.config, box.side(family) // LATENTS_PER_SIDE
    torch.manual_seed(0)

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, device=box.device, dtype=box.dtype)

    x = noise(rows, 4, side, side).to(memory_format=layout)
    context, embedding = noise(rows, 77, config.cross_attention_dim), noise(rows, config.time_cond_proj_dim)
    times = torch.full((rows,), 499, device=box.device)
    added = {"text_embeds": noise(rows, 1280), "time_ids": noise(rows, 6)} if config.addition_embed_type else None

    def call() -> torch.Tensor:
        output: torch.Tensor = unet(
            x, times, encoder_hidden_states=context, timestep_cond=embedding, added_cond_kwargs=added, return_dict=False
        )[0]
        return output

    return call


@torch.inference_mode()
def _unet_ms(box: Box, name: str, rows: int) -> float:
    """Milliseconds of an eager forward in a CUDA graph, so that only the kernels count."""
    unet = copy.deepcopy(_unet(box, "sd")) if name == "fused QKV" else _unet(box, "sd")
    layout = torch.contiguous_format if name == "contiguous" else torch.channels_last
    unet.to(memory_format=layout)
    if name == "fused QKV":
        unet.fuse_qkv_projections()
    call = _unet_call(box, "sd", unet, rows, layout)
    with sdpa_kernel(BACKENDS[name]) if name in BACKENDS else contextlib.nullcontext():
        try:
            call()
        except RuntimeError as error:
            if name not in BACKENDS or isinstance(error, torch.OutOfMemoryError):
                raise
            raise Skipped(str(error).partition("\n")[0]) from None
        call = captured(call, box.device)
        return round(1e3 * roofline.seconds_of(call, box.device, repeats=box.pick(30, 1)), 4)


def captured(call: Callable[[], Any], device: torch.device) -> Callable[[], Any]:
    """``call`` as a CUDA graph; without a GPU, as it is."""
    if device.type != "cuda":
        return call
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


@torch.inference_mode()
def _attention_us(box: Box, tokens: int, keys: int, width: int) -> dict[str, dict[str, float | str]]:
    """Microseconds by kernel and rows, of 8 heads; a kernel that does not take it says so."""
    found: dict[str, dict[str, float | str]] = {}
    for rows in box.pick((1, 16), (1,)):
        q, k, v = (torch.randn(rows, 8, n, width, device=box.device, dtype=box.dtype) for n in (tokens, keys, keys))
        for name, backend in BACKENDS.items():
            try:
                with sdpa_kernel(backend):
                    call = captured(
                        functools.partial(torch.nn.functional.scaled_dot_product_attention, q, k, v), box.device
                    )
                    took: float | str = round(1e6 * roofline.seconds_of(call, box.device, repeats=box.pick(50, 1)), 2)
            except RuntimeError as error:
                took = str(error).partition("\n")[0]
            found.setdefault(name, {})[str(rows)] = took
    return found


def _jpeg_ms(side: int, repeats: int) -> dict[str, Any]:
    """Milliseconds from pixels to a file of quality 80, the median; nvJPEG has them on the GPU, the others do not."""
    rng = np.random.default_rng(0)
    coarse = Image.fromarray(rng.integers(0, 256, (side // 16, side // 16, 3), dtype=np.uint8))
    smooth = np.asarray(coarse.resize((side, side), Image.Resampling.BICUBIC), dtype=np.int16)
    pixels = np.clip(smooth + rng.integers(-6, 7, smooth.shape), 0, 255).astype(np.uint8)

    def median_ms(call: Callable[[], object]) -> float:
        call()
        return round(1e3 * sorted(_seconds(call) for _ in range(repeats))[repeats // 2], 3)

    found: dict[str, Any] = {
        "kilobytes": round(len(encode_picture(pixels, "jpeg", 80)[0]) / 1e3, 1),
        "Pillow": median_ms(lambda: encode_picture(pixels, "jpeg", 80)),
    }
    try:
        import simplejpeg

        found["simplejpeg"] = median_ms(
            lambda: simplejpeg.encode_jpeg(pixels, quality=80, colorspace="RGB", colorsubsampling="420", fastdct=True)
        )
    except ImportError as error:
        found["simplejpeg"] = f"skipped: {error}"
    found["nvJPEG"] = _nvjpeg_ms(pixels, median_ms)
    return found


def _nvjpeg_ms(pixels: np.ndarray, median_ms: Callable[[Callable[[], object]], float]) -> float | str:
    if not torch.cuda.is_available():
        return "skipped: there is no GPU"
    try:
        from torchvision.io import encode_jpeg

        on_gpu = torch.from_numpy(pixels).permute(2, 0, 1).contiguous().cuda()
        return median_ms(lambda: encode_jpeg(on_gpu, quality=80).cpu())
    except (ImportError, RuntimeError) as error:
        return f"skipped: {str(error).partition(chr(10))[0]}"


@torch.inference_mode()
def _fp8(box: Box) -> dict[str, Any]:
    """Both compiled, in a CUDA graph: milliseconds, and how far the outputs are apart."""
    if not box.on_gpu:
        raise Skipped("there is no GPU")
    try:
        from torchao.quantization import Float8DynamicActivationFloat8WeightConfig, PerRow, quantize_
    except ImportError as error:
        raise Skipped(f"torchao is not installed ({error})") from None
    outputs, times = [], []
    for fp8 in (False, True):
        unet = copy.deepcopy(_unet(box, "sdxl")).to(memory_format=torch.channels_last)
        if fp8:
            quantize_(
                unet,
                Float8DynamicActivationFloat8WeightConfig(granularity=PerRow()),
                filter_fn=lambda module, name: (
                    isinstance(module, torch.nn.Linear) and module.in_features % 16 == module.out_features % 16 == 0
                ),
            )
        call = torch.compile(
            _unet_call(box, "sdxl", unet, 1, torch.channels_last), options={"triton.cudagraphs": False}
        )
        outputs.append(call().float())
        times.append(1e3 * roofline.seconds_of(captured(call, box.device), box.device, repeats=30))
    noise = (outputs[0] - outputs[1]).square().mean()
    return {
        "bf16_ms": round(times[0], 3),
        "fp8_ms": round(times[1], 3),
        "times_faster": round(times[0] / times[1], 3),
        "signal_to_noise_db": round(float(10 * torch.log10(outputs[0].square().mean() / noise)), 2),
    }


def _skip(why: str) -> Any:
    raise Skipped(why)


SECTIONS: dict[str, Callable[[Box, Results], Parts]] = {
    "machine": machine,
    "starts": starts,
    "serving": serving,
    "sd": sd,
    "diffusers": diffusers,
    "one by one": one_by_one,
    "simulation": simulation,
    "sdxl": sdxl,
    "choices": choices,
}

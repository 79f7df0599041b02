"""Three verbs over trajectories: begin, step, finish; knows no queue, no socket, no picture file.

::

    row = engine.begin(key, request, canvas)     # text, picture and noise become tensors
    engine.step([row, other_row])                # one UNet forward for all of them, until row.done
    pixels, *_ = engine.finish([row])            # latents become pixels

The engine holds models and bounded caches. Everything about a request is in its ``Trajectory``. It belongs to one
thread.
"""

from __future__ import annotations

import logging
import platform
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from lcm_rt.catalog import ModelSpec
from lcm_rt.engine import conditioning, sampling
from lcm_rt.engine.models import Model, load_model
from lcm_rt.engine.runner import Runner
from lcm_rt.engine.trajectory import Bucket, Known, Trajectory
from lcm_rt.errors import GenerationFailed, InputError, LcmError, ModelLoading, OutOfMemory
from lcm_rt.images import Canvas
from lcm_rt.types import GenerateRequest

logger = logging.getLogger(__name__)

Pixels = npt.NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class _Served:
    model: Model
    runner: Runner


class Engine:
    """Models on one device.

    Args:
        device: "cpu", "cuda", "cuda:1" and so on; "auto" takes a GPU where there is one.
        compile: compile the networks when a model is loaded (half a minute and more), for faster steps.
        threads: of the CPU's arithmetic; None leaves it to torch.
    """

    def __init__(self, *, device: str = "auto", compile: bool = False, threads: int | None = None) -> None:
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        self._device = torch.device(device)
        # bfloat16 has float32's range: no overflow to watch for in the VAE. On a CPU, float32 is the exact reference.
        self._dtype = torch.float32 if self._device.type == "cpu" else torch.bfloat16
        self._compile = compile
        self._served: dict[str, _Served] = {}
        self._prompts = conditioning.Prompts()
        self.device_name = _name(self._device)
        if threads is not None:
            torch.set_num_threads(threads)

    @torch.inference_mode()
    def load(self, spec: ModelSpec, report: Callable[[str, float], None]) -> None:
        """Load a model and run it once; a model of the same name is replaced.

        ``report`` is told the stage ("weights", "compile" or "warm-up") and how much of it is done, 0 to 1.
        """
        report("weights", 0.0)
        with _memory():
            model = load_model(spec, self._device, self._dtype)
            report("weights", 1.0)
            runner = Runner(model, compile=self._compile)
            stage = "compile" if self._compile else "warm-up"
            report(stage, 0.0)
            runner.warm_up(spec.size // model.pixels_per_latent, lambda fraction: report(stage, fraction))
        self._prompts.forget(spec.name)
        self._served[spec.name] = _Served(model, runner)
        try:
            # A whole picture, so that the text encoder and the small kernels have run too.
            row = self.begin(0, GenerateRequest(spec.name, "", 0, num_inference_steps=1), Canvas(spec.size, spec.size))
            self.step([row])
            (pixels,) = self.finish([row])
            if isinstance(pixels, LcmError):
                raise pixels
        except Exception:
            del self._served[spec.name]
            raise
        report("warm-up", 1.0)

    @torch.inference_mode()
    def begin(self, key: int, request: GenerateRequest, canvas: Canvas) -> Trajectory:
        """Encode the prompt and the picture, draw the noise; ``canvas`` is the request's picture and size.

        Raises:
            LcmError: this request cannot be served.
        """
        if request.model not in self._served:
            raise ModelLoading(f"model {request.model!r} is not loaded")
        model = self._served[request.model].model
        height, width = (side // model.pixels_per_latent for side in (canvas.height, canvas.width))
        if (height * model.pixels_per_latent, width * model.pixels_per_latent) != (canvas.height, canvas.width):
            raise InputError("image_size", f"both sides must be multiples of {model.pixels_per_latent}")
        guided = model.guidance_dim is None and request.guidance_scale > 1
        with _memory():
            started = time.perf_counter()
            context, embedding = self._condition(model, request, guided)
            encoding = time.perf_counter()
            has_image = canvas.image is not None
            visited = sampling.timesteps(
                request.num_inference_steps,
                request.strength if has_image else 1.0,
                model.schedule.original_steps,
                len(model.schedule.alphas_cumprod),
            )
            coefficients = sampling.coefficients(model.schedule, visited).to(self._device)
            shape = (model.latent_channels, height, width)
            # The order of the draws is that of diffusers' pipelines, so that a seed means the same picture there.
            random = conditioning.Randomness.of(request.seed, self._device)
            x0 = None if canvas.image is None else conditioning.encode_picture(model, canvas.image, random)
            noise = random.normal(shape)
            known = None
            latents = noise
            if x0 is not None:
                if canvas.mask is not None:
                    mask = conditioning.latent_mask(canvas.mask, model.pixels_per_latent, self._device)
                    known = Known(x0, noise, mask)
                    conditioning.skip_masked_picture(model, shape, random)
                if known is None or request.strength < 1:
                    latents = sampling.add_noise(x0, noise, coefficients[0])
            noises = [random.normal(shape) for _ in visited[1:]] + [torch.zeros_like(noise)]
            ended = time.perf_counter()
        return Trajectory(
            key=key,
            request=request,
            bucket=Bucket(model.name, height, width, guided),
            latents=latents,
            timesteps=torch.tensor(visited, device=self._device),
            coefficients=coefficients,
            noises=torch.stack(noises),
            context=context,
            guidance=torch.tensor(request.guidance_scale, device=self._device),
            guidance_embedding=embedding,
            known=known,
            steps=len(visited),
            timings={"text": encoding - started, "encode": ended - encoding},
        )

    @torch.inference_mode()
    def step(self, batch: Sequence[Trajectory]) -> None:
        """One UNet forward for rows of one bucket, wherever each is on its way; on an exception no row has changed."""
        started = time.perf_counter()
        bucket = batch[0].bucket
        assert all(row.bucket == bucket and not row.done for row in batch), "rows of one bucket, none done"
        served = self._served[bucket.model]
        with _memory():
            x = torch.stack([row.latents for row in batch])
            t = torch.stack([row.timesteps[row.index] for row in batch])
            c = torch.stack([row.coefficients[row.index] for row in batch])
            noise = torch.stack([row.noises[row.index] for row in batch])
            output = _predict(served.runner, batch, x, t)
            schedule = served.model.schedule
            after = sampling.lcm_step(x, output, c, noise, schedule.prediction, schedule.clip)
            latents = [_keep_known(row, *pair) for row, *pair in zip(batch, after, c, strict=True)]
        seconds = time.perf_counter() - started
        for row, new in zip(batch, latents, strict=True):
            row.advance(new, seconds)

    @torch.inference_mode()
    def finish(self, rows: Sequence[Trajectory]) -> list[Pixels | LcmError]:
        """Pixels (H, W, 3) of each row, or the error that befell it alone."""
        results: dict[int, Pixels | LcmError] = {}
        if self._device.type == "cuda":
            started = time.perf_counter()
            torch.cuda.synchronize(self._device)  # the steps run behind; their time is not the VAE's
            for row in rows:
                row.timings["denoise"] = row.timings.get("denoise", 0.0) + time.perf_counter() - started
        order = sorted(range(len(rows)), key=lambda i: rows[i].bucket)
        for (name, *_), group in groupby(order, key=lambda i: rows[i].bucket[:3]):
            same = list(group)
            decoded = self._decode(self._served[name].runner, [rows[i] for i in same])
            results.update(zip(same, decoded, strict=True))
        return [results[i] for i in range(len(rows))]

    def _condition(self, model: Model, request: GenerateRequest, guided: bool) -> tuple[Tensor, Tensor | None]:
        context = self._prompts.embed(model, request.prompt)
        if guided:
            return torch.stack([self._prompts.embed(model, request.negative_prompt), context]), None
        if model.guidance_dim is None:
            return context, None
        w = torch.tensor([request.guidance_scale - 1])
        return context, sampling.guidance_embedding(w, model.guidance_dim)[0].to(self._device, model.dtype)

    def _decode(self, runner: Runner, rows: list[Trajectory]) -> list[Pixels | LcmError]:
        started = time.perf_counter()
        failure: LcmError
        try:
            with _memory():
                latents = torch.stack([row.latents for row in rows])
                pixels = runner.decode(latents)
                fine = latents.isfinite().flatten(1).all(1) & pixels.isfinite().flatten(1).all(1)
                pictures = (pixels * 255).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous().cpu().numpy()
                results = list(zip(pictures, fine.tolist(), strict=True))
        except OutOfMemory as error:
            failure = error
        except Exception:
            logger.exception("%d pictures of %s could not be decoded", len(rows), rows[0].bucket)
            failure = GenerationFailed("the engine could not decode this picture")
        else:
            for row in rows:
                row.timings["vae"] = time.perf_counter() - started
            bad = GenerationFailed("the model produced values that are not numbers")
            return [picture if good else bad for picture, good in results]
        # Out of the except block: a live exception would keep the batch's tensors in memory.
        return [failure] if len(rows) == 1 else [result for row in rows for result in self._decode(runner, [row])]


def _predict(runner: Runner, batch: Sequence[Trajectory], x: Tensor, t: Tensor) -> Tensor:
    """The network's opinion on each row; guided rows are asked twice, in the same forward pass."""
    if batch[0].bucket.guided:
        context = torch.stack([row.context for row in batch]).transpose(0, 1).flatten(0, 1)
        without, with_prompt = runner.predict(x.repeat(2, 1, 1, 1), t.repeat(2), context, None).chunk(2)
        return sampling.guide(with_prompt, without, torch.stack([row.guidance for row in batch]))
    embeddings = [row.guidance_embedding for row in batch if row.guidance_embedding is not None]
    context = torch.stack([row.context for row in batch])
    return runner.predict(x, t, context, torch.stack(embeddings) if embeddings else None)


def _keep_known(row: Trajectory, latents: Tensor, c: Tensor) -> Tensor:
    if row.known is None:
        return latents
    return sampling.keep_outside(latents, row.known.mask, row.known.latents, row.known.noise, c)


@contextmanager
def _memory() -> Iterator[None]:
    """Say in our words that the device is full."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise OutOfMemory("the device is out of memory") from error


def _name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        processor = next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        processor = platform.processor() or platform.machine()
    return f"{device.type} ({processor})"

"""The opponents that paint inside one process, without a server: each as its own users would write it.

All of them load the same folder in diffusers format and draw their noise from the same seeds, so that a picture of one
is the picture of any other. None of them sees a prompt twice: there is nothing to remember.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal

import torch
from diffusers import AutoencoderTiny, LCMScheduler, StableDiffusionPipeline
from diffusers.image_processor import VaeImageProcessor
from PIL import Image
from torch import Tensor, nn

from benchmarks.peers.work import Job, Work
from lcm_rt.catalog import CATALOG, Choice, resolve
from lcm_rt.engine.engine import Engine, Picture
from lcm_rt.errors import LcmError
from lcm_rt.images import Canvas
from lcm_rt.types import GenerateRequest


class Painter:
    """One opponent. ``lag`` is how many jobs later a job's picture comes out of ``feed``."""

    lag = 0

    def paint(self, jobs: Sequence[Job]) -> list[Image.Image]:
        """A picture for each job, as one batch where the opponent knows batches."""
        raise NotImplementedError

    def feed(self, job: Job) -> Image.Image | None:
        """Take the next job of an endless row; the picture of the job ``lag`` before it, if there is one."""
        return self.paint([job])[0]


def load_pipeline(work: Work, dtype: torch.dtype) -> Any:
    """The text-to-image pipeline of diffusers: what its documentation says for Latent Consistency Models.

    ``LatentConsistencyModelPipeline`` is for UNets that were distilled with an embedding of the guidance;
    ``StableDiffusionPipeline`` runs those and all others.
    """
    parts: dict[str, Any] = {}
    if '"AutoencoderTiny"' in (work.folder / "model_index.json").read_text():
        parts["vae"] = AutoencoderTiny.from_pretrained(work.folder / "vae", dtype=dtype)
    pipeline = StableDiffusionPipeline.from_pretrained(
        work.folder, safety_checker=None, requires_safety_checker=False, dtype=dtype, **parts
    )
    pipeline.scheduler = LCMScheduler.from_config(pipeline.scheduler.config)
    pipeline.set_progress_bar_config(disable=True)
    for network in (pipeline.unet, pipeline.vae, pipeline.text_encoder):
        network.requires_grad_(False)
    return pipeline.to(work.device)


class Diffusers(Painter):
    """The pipeline. Compiled as its documentation says: the UNet and the VAE's decoder, channels last."""

    def __init__(self, work: Work, *, dtype: str = "float32", compiled: bool = False) -> None:
        self._work = work
        self._pipeline = pipeline = load_pipeline(work, getattr(torch, dtype))
        if compiled:
            # max-autotune is the documentation's advice for GPUs.
            mode = "default" if work.device == "cpu" else "max-autotune"
            pipeline.unet.to(memory_format=torch.channels_last)
            pipeline.vae.to(memory_format=torch.channels_last)
            pipeline.unet = torch.compile(pipeline.unet, mode=mode, fullgraph=True)
            pipeline.vae.decode = torch.compile(pipeline.vae.decode, mode=mode, fullgraph=True)

    def paint(self, jobs: Sequence[Job]) -> list[Image.Image]:
        images: list[Image.Image] = self._pipeline(
            [job.prompt for job in jobs],
            num_inference_steps=self._work.steps,
            guidance_scale=1.0,
            generator=[torch.Generator().manual_seed(job.seed) for job in jobs],
            width=self._work.side,
            height=self._work.side,
        ).images
        return images


class Ours(Painter):
    """The bare engine of this repository: begin, step, finish."""

    def __init__(self, work: Work, *, backend: Literal["auto", "eager"] = "auto") -> None:
        own = next((spec for spec in CATALOG.values() if spec.source == str(work.folder)), None)
        spec = own or resolve(f"peer={work.folder}")
        self._engine = engine = Engine(
            device=work.device,
            backend=backend,
            threads=work.threads,
            choice=Choice(safety=False, controlnet=False),
        )
        parts, _ = engine.locate(spec, _ignore)
        engine.load(spec, parts, _ignore)
        side = work.side or engine.traits(spec.name).size
        self._canvas = Canvas(side, side)
        self._request = partial(GenerateRequest, spec.name, num_inference_steps=work.steps)
        bucket = engine.begin(0, self._request("", 0), self._canvas).bucket
        engine.tune(spec.name, (bucket.height, bucket.width))
        engine.tune(spec.name, (bucket.height, bucket.width))  # and what a size in demand gets

    def paint(self, jobs: Sequence[Job]) -> list[Image.Image]:
        rows = [self._engine.begin(n, self._request(*job), self._canvas) for n, job in enumerate(jobs)]
        while not rows[0].done:
            self._engine.step(rows)
        pictures = self._engine.finish(rows)
        self._engine.improve()
        return [Image.fromarray(_raised(picture).pixels) for picture in pictures]


def _raised(picture: Picture | LcmError) -> Picture:
    if isinstance(picture, LcmError):
        raise picture
    return picture


def _ignore(stage: str, fraction: float) -> None:
    """How far a model is loaded."""


class OpenVino(Painter):
    """A loop around networks converted to OpenVINO, one picture at a time.

    Its CPU plugin computes in bfloat16 where the processor can, unless told otherwise; nothing is told here.
    """

    def __init__(self, work: Work) -> None:
        import openvino

        self._steps = work.steps
        self._pipeline = pipeline = load_pipeline(work, torch.float32)
        unet, text = pipeline.unet, pipeline.text_encoder
        side = (work.side or unet.config.sample_size * pipeline.vae_scale_factor) // pipeline.vae_scale_factor
        self._shape = (1, pipeline.vae.config.latent_channels, side, side)
        self._guided = unet.config.time_cond_proj_dim
        tokens = torch.zeros(1, pipeline.tokenizer.model_max_length, dtype=torch.int64)
        context = torch.zeros(1, tokens.shape[1], unet.config.cross_attention_dim)
        inputs = [torch.zeros(self._shape), torch.tensor([999]), context]
        if self._guided:
            inputs.append(torch.zeros(1, self._guided))
        core = openvino.Core()

        def convert(forward: Callable[..., Tensor], *examples: Tensor) -> Callable[..., Tensor]:
            model = openvino.convert_model(
                _Forward(forward), example_input=examples, input=[tuple(example.shape) for example in examples]
            )
            compiled = core.compile_model(
                model, "CPU", {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": work.threads}
            )
            request = compiled.create_infer_request()
            return lambda *tensors: torch.from_numpy(request.infer([tensor.numpy() for tensor in tensors])[0])

        with torch.inference_mode():
            self._text = convert(lambda ids: text(ids)[0], tokens)
            self._unet = convert(
                lambda x, t, c, w=None: unet(x, t, encoder_hidden_states=c, timestep_cond=w, return_dict=False)[0],
                *inputs,
            )
            self._decode = convert(
                lambda x: pipeline.vae.decode(x, return_dict=False)[0],
                torch.zeros(self._shape),
            )

    @torch.inference_mode()
    def paint(self, jobs: Sequence[Job]) -> list[Image.Image]:
        return [self._one(job) for job in jobs]

    def _one(self, job: Job) -> Image.Image:
        pipeline = self._pipeline
        generator = torch.Generator().manual_seed(job.seed)
        context = self._text(_tokens(pipeline, job.prompt))
        scheduler = pipeline.scheduler
        scheduler.set_timesteps(self._steps)
        x = torch.randn(self._shape, generator=generator) * scheduler.init_noise_sigma
        guidance = [pipeline.get_guidance_scale_embedding(torch.zeros(1), self._guided)] if self._guided else []
        for t in scheduler.timesteps:
            noise = self._unet(x, t[None], context, *guidance)
            x = scheduler.step(noise, t, x, generator=generator, return_dict=False)[0]
        return _image(pipeline, self._decode(x / pipeline.vae.config.scaling_factor))


class _Forward(nn.Module):
    """A function as a module, which is what can be converted."""

    def __init__(self, function: Callable[..., Tensor]) -> None:
        super().__init__()
        self.forward = function


class StreamBatch(Painter):
    """StreamDiffusion's stream batch (Kodaira et al. 2023, arXiv 2312.12491, section 3.1), as an in-house baseline.

    Each call is one UNet forward over the frames of the last ``steps`` calls, each at its own step: a frame leaves with
    every call, ``steps`` calls after it came. Here each frame has noise of its own, where StreamDiffusion gives all
    frames the same, so that its pictures can be compared; that costs nothing that could be measured.
    """

    def __init__(self, work: Work) -> None:
        self.lag = work.steps - 1
        self._device = torch.device(work.device)
        self._pipeline = pipeline = load_pipeline(work, torch.float32 if work.device == "cpu" else torch.float16)
        scheduler = pipeline.scheduler
        scheduler.set_timesteps(work.steps, device=self._device)
        self._timesteps = scheduler.timesteps
        self._velocity = scheduler.config.prediction_type == "v_prediction"
        alphas = scheduler.alphas_cumprod.to(self._device)[self._timesteps]
        boundary = [scheduler.get_scalings_for_boundary_condition_discrete(t) for t in self._timesteps.tolist()]
        after = torch.cat([alphas[1:], torch.ones(1, device=self._device)])  # the last frame is clean

        def column(values: Tensor) -> Tensor:
            return values.to(self._device, torch.float32).view(-1, 1, 1, 1)

        self._alpha, self._sigma = column(alphas.sqrt()), column((1 - alphas).sqrt())
        self._skip, self._out = (column(torch.tensor(values)) for values in zip(*boundary, strict=True))
        self._next_alpha, self._next_sigma = column(after.sqrt()), column((1 - after).sqrt())
        side = (work.side or pipeline.unet.config.sample_size * pipeline.vae_scale_factor) // pipeline.vae_scale_factor
        self._shape = (work.steps, pipeline.vae.config.latent_channels, side, side)
        self._guided = pipeline.unet.config.time_cond_proj_dim
        self._frames: deque[tuple[Tensor, Tensor, Tensor]] = deque()  # newest first: latents, noises, prompt

    def paint(self, jobs: Sequence[Job]) -> list[Image.Image]:
        self._frames.clear()
        fed = [self.feed(job) for job in [*jobs, *[jobs[-1]] * self.lag]]
        self._frames.clear()
        return [image for image in fed if image is not None]

    @torch.inference_mode()
    def feed(self, job: Job) -> Image.Image | None:
        pipeline, (steps, *shape) = self._pipeline, self._shape
        generator = torch.Generator().manual_seed(job.seed)
        drawn = [torch.randn(shape, generator=generator) for _ in range(steps)]
        noises = torch.stack([*drawn, torch.zeros(shape)]).to(self._device)
        context = pipeline.text_encoder(_tokens(pipeline, job.prompt).to(self._device))[0][0]
        self._frames.appendleft((noises[0], noises[1:], context))
        count = len(self._frames)
        latents, noises_of, contexts = zip(*self._frames, strict=True)
        x = torch.stack(latents)
        guidance = pipeline.get_guidance_scale_embedding(torch.zeros(count), self._guided) if self._guided else None
        predicted = pipeline.unet(
            x.to(pipeline.dtype),
            self._timesteps[:count],
            encoder_hidden_states=torch.stack(contexts),
            timestep_cond=None if guidance is None else guidance.to(self._device, pipeline.dtype),
            return_dict=False,
        )[0].float()
        alpha, sigma = self._alpha[:count], self._sigma[:count]
        clean = alpha * x - sigma * predicted if self._velocity else (x - sigma * predicted) / alpha
        denoised = self._out[:count] * clean + self._skip[:count] * x
        noise = torch.stack([noises[n] for n, noises in enumerate(noises_of)])
        after = self._next_alpha[:count] * denoised + self._next_sigma[:count] * noise
        self._frames = deque(zip(after, noises_of, contexts, strict=True))
        if count < steps:
            return None
        done, *_ = self._frames.pop()
        scaled = done[None] / pipeline.vae.config.scaling_factor
        return _image(pipeline, pipeline.vae.decode(scaled.to(pipeline.dtype), return_dict=False)[0])


def _tokens(pipeline: Any, prompt: str) -> Tensor:
    tokenizer = pipeline.tokenizer
    ids: Tensor = tokenizer(
        prompt, padding="max_length", max_length=tokenizer.model_max_length, truncation=True, return_tensors="pt"
    ).input_ids
    return ids


def _image(pipeline: Any, pixels: Tensor) -> Image.Image:
    processor: VaeImageProcessor = pipeline.image_processor
    images: list[Image.Image] = processor.postprocess(pixels, output_type="pil")
    return images[0]

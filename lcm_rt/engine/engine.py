"""Three verbs over trajectories: begin, step, finish; knows no queue, no socket, no picture file.

::

    row = engine.begin(key, request, canvas)     # text, picture and noise become tensors
    engine.step([row, other_row])                # one UNet forward for all of them, until row.done
    picture, *_ = engine.finish([row])           # latents become pixels

The engine holds models and bounded caches. Everything about a request is in its ``Trajectory``.
"""

from __future__ import annotations

import gc
import logging
import os
import platform
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Literal, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from lcm_rt.cache import Counts, Gains
from lcm_rt.catalog import Choice, ModelSpec
from lcm_rt.engine import clock, conditioning, inductor, openvino, sampling
from lcm_rt.engine.adapters import Adapter, Adapters
from lcm_rt.engine.clock import Clock, Mark
from lcm_rt.engine.models import Model, fingerprint, load_model, weigh
from lcm_rt.engine.networks import Networks
from lcm_rt.engine.runner import Backend, Runner
from lcm_rt.engine.trajectory import Bucket, Known, Prompt, Trajectory
from lcm_rt.errors import GenerationFailed, InputError, LcmError, ModelLoading, OutOfMemory
from lcm_rt.hub import Parts, fetch, plan
from lcm_rt.images import Canvas
from lcm_rt.transfer import File
from lcm_rt.types import GenerateRequest

logger = logging.getLogger(__name__)

T = TypeVar("T")

ADAPTER_BYTES = 2**30  # of the LoRAs that are kept for the next request


@dataclass(frozen=True, slots=True)
class Picture:
    """Pixels (H, W, 3), uint8. A picture that the safety checker flagged is black."""

    pixels: npt.NDArray[np.uint8]
    flagged: bool = False


class Measured(NamedTuple):
    """How long a step of some rows of a bucket took, or what makes pictures of them."""

    kind: Literal["step", "finish"]
    bucket: Bucket
    rows: int
    seconds: float


class Traits(NamedTuple):
    """Side in pixels and number of steps of a picture for which nobody gave them; which companions there are."""

    size: int
    steps: int
    safety: bool
    controlnet: bool


@dataclass(frozen=True, slots=True)
class _Served:
    model: Model
    runner: Runner
    prompts: conditioning.Prompts
    pictures: conditioning.Pictures
    bytes: int


class Engine:
    """Models on one device. ``load`` and ``adapter`` may be called from any thread, the verbs from one only.

    Args:
        device: "cpu", "cuda", "cuda:1" and so on; "auto" takes a GPU where there is one.
        backend: how ``tune`` makes a model fast. "auto" is inductor with CUDA graphs on a GPU; on a CPU OpenVINO where
            it is installed, else nothing, for inductor takes a C++ compiler, and a minute of all cores.
        threads: of the CPU's arithmetic; None leaves it to torch.
        choice: which companions of the models are wanted.
        memory_bytes: how much the weights of all models may take; None is most of what the device has.
        cache_dir: where compiled and converted networks are kept for the next start; None keeps none of our own.
    """

    def __init__(
        self,
        *,
        device: str = "auto",
        backend: Literal["auto"] | Backend = "auto",
        threads: int | None = None,
        choice: Choice = Choice(),  # noqa: B008  it is frozen
        memory_bytes: int | None = None,
        cache_dir: str | Path | None = None,
    ) -> None:
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        self._device = torch.device(device)
        # bfloat16 has float32's range: no overflow to watch for in the VAE. On a CPU, float32 is the exact reference.
        self._dtype = torch.float32 if self._device.type == "cpu" else torch.bfloat16
        self.backend: Backend = _backend_of(self._device) if backend == "auto" else backend
        if self.backend == "openvino" and (self._device.type != "cpu" or not openvino.is_installed()):
            raise InputError("backend", "openvino runs on CPUs, with the extra: pip install 'lcm-rt[openvino]'")
        self._threads = threads
        self._cache_dir = None if cache_dir is None else Path(cache_dir)
        if self._cache_dir is not None:
            inductor.keep_programs_in(self._cache_dir / "inductor")
        # On a CPU two pictures take longer together than one after the other: their numbers do not fit its caches.
        self._together = 1 if self._device.type == "cpu" else 64
        self._clock = Clock(self._device)
        self._counts: Counts = Counter()
        self.counts = Gains(self._counts)
        """What was counted since the last call: ("forward", way) and ("cache", name, "hit" or "miss")."""
        self._adapters = Adapters(ADAPTER_BYTES, self._counts)
        self._steps: deque[tuple[Bucket, int, Mark, Mark]] = deque(maxlen=256)  # that may not have come to their end
        self._finishes: deque[Measured] = deque(maxlen=256)
        self._aside: torch.cuda.Stream | None = None
        if self._device.type == "cuda":
            self._aside = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
        self._choice = choice
        self._served: dict[str, _Served] = {}
        self._used: dict[str, None] = {}  # names of the served, longest unused first
        self._memory_bytes = int(0.7 * _memory_of(self._device)) if memory_bytes is None else memory_bytes
        self.device_name = _name(self._device)
        if threads is not None:
            torch.set_num_threads(threads)

    @property
    def memory(self) -> tuple[int, int]:
        """Bytes that the models take, and that they may take."""
        return sum(served.bytes for served in list(self._served.values())), self._memory_bytes

    @property
    def max_area(self) -> int:
        """Latents of one channel that a forward may have in all, so that none takes too long: a device's worth."""
        return (16 if self._device.type == "cuda" else 1) * 128**2

    @property
    def loaded(self) -> list[str]:
        """Names of the models that can begin a picture; the one longest unused is first."""
        return list(self._used)

    def locate(self, spec: ModelSpec, report: Callable[[str, float], None]) -> tuple[Parts, int]:
        """Where the files of a model are, downloaded if need be, and how many bytes its weights will take.

        Raises:
            LcmError: they are nowhere, or are of a kind that is not served.
        """
        report("files", 0.0)
        wanted = plan(spec, self._choice)
        total = max(1, sum(file.size for file in wanted.missing))
        done: dict[File, int] = {}

        def count(file: File, received: int) -> None:
            done[file] = received
            report("download", sum(done.values()) / total)

        parts = fetch(wanted, count)
        return parts, weigh(parts, self._dtype)

    @torch.inference_mode()
    def load(self, spec: ModelSpec, parts: Parts, report: Callable[[str, float], None]) -> None:
        """Load a model and make a picture with it, eagerly; a model of the same name is replaced.

        ``report`` is told the stage ("weights" or "warm-up") and how much of it is done, 0 to 1.
        """
        report("weights", 0.0)
        with _memory():
            model = load_model(spec, parts, self._device, self._dtype)
        report("weights", 1.0)
        report("warm-up", 0.0)
        runner = Runner(
            model,
            self.backend,
            folder=None if self._cache_dir is None else self._cache_dir / "openvino",
            fingerprint=fingerprint(parts),
            threads=self._threads,
            counts=self._counts,
        )

        def networks() -> Networks:
            return runner.networks

        served = _Served(
            model,
            runner,
            conditioning.Prompts(model, networks, self._counts),
            conditioning.Pictures(model, networks, self._counts),
            model.bytes,
        )
        # A whole picture, so that the text encoders and the small kernels have run too.
        request = GenerateRequest(spec.name, "", 0, num_inference_steps=1)
        row = self._begin(served, 0, request, Canvas(model.side, model.side), None)
        self._step(served, [row])
        (picture,) = self._decode(served, [row.latents], [row])()
        if isinstance(picture, LcmError):
            raise picture
        self._served[spec.name] = served
        self._used[spec.name] = None
        report("warm-up", 1.0)

    @torch.inference_mode()
    def tune(
        self,
        name: str,
        size: tuple[int, int] | None = None,
        report: Callable[[float], None] = lambda _: None,
    ) -> None:
        """Make a model that is loaded fast, for latents of ``size`` (height, width), by default its own.

        It goes on answering meanwhile. This takes seconds with OpenVINO, a minute or more with inductor, and less when
        ``cache_dir`` has it from before. Raises: ModelLoading.
        """
        served = self._serving(name)
        side = served.model.side // served.model.pixels_per_latent
        served.runner.tune(size or (side, side), report)

    def wanted(self) -> tuple[str, tuple[int, int]] | None:
        """A model and a size of latents that are in demand, and not tuned yet."""
        for name, served in list(self._served.items()):
            if size := served.runner.wanted():
                return name, size
        return None

    def wait_turn(self) -> None:
        """Wait until the device is at most one forward behind: what it was given cannot be replaced, or joined."""
        if len(self._steps) > 1:
            clock.wait_for(self._steps[-2][3])

    @torch.inference_mode()
    def improve(self) -> None:
        """Between steps: make one thing faster that takes a few steps' time."""
        for served in self._served.values():
            served.runner.capture()

    def measured(self) -> list[Measured]:
        """The times of forwards since the last call, as far as the device has done them."""
        found = [self._finishes.popleft() for _ in range(len(self._finishes))]
        while self._steps and clock.is_past(self._steps[0][3]):
            bucket, rows, begin, end = self._steps.popleft()
            found.append(Measured("step", bucket, rows, clock.seconds(begin, end)))
        return found

    def traits(self, name: str) -> Traits:
        """What clients may know of a model. Raises: ModelLoading."""
        model = self._serving(name).model
        return Traits(model.side, model.steps, model.safety is not None, model.controlnet is not None)

    def unload(self, name: str) -> None:
        """Forget a model; none of its rows may be under way."""
        del self._served[name], self._used[name]
        self._adapters.forget(name)
        gc.collect()  # compiled networks hold themselves in cycles
        if self._device.type == "cuda":
            torch.cuda.empty_cache()

    def bucket(self, request: GenerateRequest, canvas: Canvas) -> Bucket:
        """What its row will share with others. Raises: ModelLoading."""
        pixels = self._serving(request.model).model.pixels_per_latent
        return Bucket(request.model, canvas.height // pixels, canvas.width // pixels)

    def adapter(self, request: GenerateRequest) -> Adapter | None:
        """The LoRA of a request, read and on the device; it takes a while the first time.

        Raises:
            InputError: it does not fit the model, or is no LoRA.
        """
        if request.lora is None:
            return None
        model = self._serving(request.model).model
        path = Path(request.lora)
        return self._adapters.get(path, path.stem, model.name, model.networks, self._device, self._dtype)

    @torch.inference_mode()
    def begin(self, key: int, request: GenerateRequest, canvas: Canvas, adapter: Adapter | None = None) -> Trajectory:
        """Encode the prompt and the picture, draw the noise; ``canvas`` is the request's picture and size.

        Raises:
            LcmError: this request cannot be served.
        """
        served = self._serving(request.model)
        self._used[request.model] = self._used.pop(request.model)
        return self._begin(served, key, request, canvas, adapter)

    @torch.inference_mode()
    def step(self, batch: Sequence[Trajectory]) -> None:
        """One UNet forward for rows of one bucket, wherever each is on its way.

        On an exception each row has either had its step or not changed.
        """
        bucket = batch[0].bucket
        assert all(row.bucket == bucket and not row.done for row in batch), "rows of one bucket, none done"
        self._step(self._served[bucket.model], batch)

    def finish(self, rows: Sequence[Trajectory]) -> list[Picture | LcmError]:
        """The picture of each row, or the error that befell it alone."""
        return self.begin_finish(rows)()

    @torch.inference_mode()
    def begin_finish(self, rows: Sequence[Trajectory]) -> Callable[[], list[Picture | LcmError]]:
        """Set out to make the pictures; what is returned waits for them, in any thread, and gives what ``finish`` does.

        A GPU makes them beside the next steps.
        """
        return self._pictures(rows, [row.latents for row in rows])

    @torch.inference_mode()
    def preview(self, rows: Sequence[Trajectory]) -> Callable[[], list[Picture | LcmError]]:
        """As ``begin_finish``, what each row would be if its last step had been the end: it must have had one."""
        return self._pictures(rows, [row.denoised for row in rows if row.denoised is not None])

    def _serving(self, name: str) -> _Served:
        if name not in self._served:
            raise ModelLoading(f"model {name!r} is not loaded")
        return self._served[name]

    def _begin(
        self, served: _Served, key: int, request: GenerateRequest, canvas: Canvas, adapter: Adapter | None
    ) -> Trajectory:
        model = served.model
        height, width = (side // model.pixels_per_latent for side in (canvas.height, canvas.width))
        if (height * model.pixels_per_latent, width * model.pixels_per_latent) != (canvas.height, canvas.width):
            raise InputError("image_size", f"both sides must be multiples of {model.pixels_per_latent}")
        if request.controlnet_inpaint and model.controlnet is None:
            raise InputError("controlnet_inpaint", f"model {model.name!r} is served without an inpainting ControlNet")
        with _memory():
            started = time.perf_counter()
            prompt = served.prompts.read(request.prompt, adapter, request.lora_scale)
            negative, embedding = self._guidance(served, request, adapter, prompt)
            encoding = time.perf_counter()
            image = None if canvas.image is None else conditioning.as_tensor(canvas.image, self._device)
            visited = sampling.timesteps(
                model.schedule, request.num_inference_steps, 1.0 if image is None else request.strength
            )
            coefficients = sampling.coefficients(model.schedule, visited).to(self._device)
            random = conditioning.Randomness.of(request.seed, self._device)
            latents, known, surroundings = _canvas_latents(
                served, request.strength, canvas, image, coefficients[0], random, (model.latent_channels, height, width)
            )
            noises = [random.normal(latents.shape) for _ in visited[1:]] + [torch.zeros_like(latents)]
            control = None
            if request.controlnet_inpaint and image is not None and canvas.mask is not None:
                control = conditioning.control_picture(image, canvas.mask).to(model.dtype)
            sizes = (canvas.height, canvas.width, 0, 0, canvas.height, canvas.width)  # as the original, uncropped
            ended = time.perf_counter()
        return Trajectory(
            key=key,
            request=request,
            bucket=Bucket(model.name, height, width),
            latents=latents,
            timesteps=torch.tensor(visited, device=self._device),
            coefficients=coefficients,
            noises=torch.stack(noises),
            prompt=prompt,
            negative=negative,
            guidance=_scalar(request.guidance_scale, self._device),
            guidance_embedding=embedding,
            size_ids=None if model.pooled_width is None else torch.tensor(sizes, device=self._device).to(model.dtype),
            known=known,
            surroundings=surroundings,
            control=control,
            adapter=adapter,
            adapter_scale=_scalar(request.lora_scale if adapter else 0.0, self._device),
            steps=len(visited),
            timings={"text": encoding - started, "encode": ended - encoding},
        )

    def _guidance(
        self, served: _Served, request: GenerateRequest, adapter: Adapter | None, prompt: Prompt
    ) -> tuple[Prompt | None, Tensor | None]:
        """How a row is pushed towards its prompt: by a second row without it, or by an embedding, or not at all."""
        model = served.model
        if model.guidance_dim is not None:
            w = torch.tensor([request.guidance_scale - 1], dtype=torch.float32)
            embedding = sampling.guidance_embedding(w, model.guidance_dim)[0]
            return None, embedding.to(self._device, model.dtype)
        if request.guidance_scale <= 1:
            return None, None
        if model.zero_negative and not request.negative_prompt:
            return served.prompts.nothing(prompt), None
        return served.prompts.read(request.negative_prompt, adapter, request.lora_scale), None

    def _step(self, served: _Served, batch: Sequence[Trajectory]) -> None:
        begin = self._clock.mark()
        with _memory():
            served.runner.step(batch)
        end = self._clock.mark()
        for row in batch:
            row.steps_took.append((begin, end))
        self._steps.append((batch[0].bucket, len(batch), begin, end))

    def _pictures(
        self, rows: Sequence[Trajectory], latents: Sequence[Tensor]
    ) -> Callable[[], list[Picture | LcmError]]:
        order = sorted(range(len(rows)), key=lambda i: rows[i].bucket)
        decoding: list[tuple[list[int], Callable[[], list[Picture | LcmError]]]] = []
        for (name, *_), group in groupby(order, key=lambda i: rows[i].bucket):
            same = list(group)
            decoded = self._decode(self._served[name], [latents[i] for i in same], [rows[i] for i in same])
            decoding.append((same, decoded))

        def wait() -> list[Picture | LcmError]:
            results: dict[int, Picture | LcmError] = {}
            for same, decoded in decoding:
                results.update(zip(same, decoded(), strict=True))
            return [results[i] for i in range(len(rows))]

        return _once(wait)

    def _decode(
        self, served: _Served, latents: list[Tensor], rows: list[Trajectory]
    ) -> Callable[[], list[Picture | LcmError]]:
        """Pictures of rows of one bucket. If they cannot be made together, each is tried alone."""
        failure: LcmError
        try:
            with _memory():
                return self._decode_together(served, latents, rows)
        except OutOfMemory as error:
            failure = error
        except Exception:
            logger.exception("%d pictures of %s could not be decoded", len(rows), rows[0].bucket)
            failure = GenerationFailed("the engine could not decode this picture")
        # Out of the except block: a live exception would keep the batch's tensors in memory.
        if len(rows) == 1:
            return lambda: [failure]
        alone = [self._decode(served, [one], [row]) for one, row in zip(latents, rows, strict=True)]
        return lambda: [result for wait in alone for result in wait()]

    def _decode_together(
        self, served: _Served, latents: list[Tensor], rows: list[Trajectory]
    ) -> Callable[[], list[Picture | LcmError]]:
        clean = torch.stack(latents)
        begin = self._clock.mark()
        with _beside(self._aside, clean):
            decode = served.runner.networks.decode
            parts = clean.split(self._together)  # type: ignore[no-untyped-call]
            # A copy, for what a network gives is good until it runs again.
            decoded = decode(clean) if len(parts) == 1 else torch.cat([decode(part).clone() for part in parts])
            # What is no number makes a sum of it; so does what is infinite, which the decoder's limits would hide.
            fine = (clean.flatten(1).sum(1) + decoded.flatten(1).sum(1)).isfinite()
            pixels = (decoded * 255).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous()
            checking = self._clock.mark()
            flagged = _flag(served.model, pixels, rows)
            shown = _to_host(torch.where(flagged[:, None, None, None], 0, pixels))
            fine, flagged = _to_host(fine), _to_host(flagged)
            end = self._clock.mark()
        took = [list(row.steps_took) for row in rows]  # a preview's row goes on stepping

        def wait() -> list[Picture | LcmError]:
            clock.wait_for(end)
            vae, safety = clock.seconds(begin, checking), clock.seconds(checking, end)
            for row, steps in zip(rows, took, strict=True):
                row.timings["denoise"] = sum(clock.seconds(*step) for step in steps)
                row.timings["vae"] = row.timings.get("vae", 0.0) + vae
                row.timings["safety"] = row.timings.get("safety", 0.0) + safety
            self._finishes.append(Measured("finish", rows[0].bucket, len(rows), vae + safety))
            bad = GenerationFailed("the model produced values that are not numbers")
            results = zip(shown.numpy(), fine.tolist(), flagged.tolist(), strict=True)
            return [Picture(picture, flag) if good else bad for picture, good, flag in results]

        return wait


def _canvas_latents(
    served: _Served,
    strength: float,
    canvas: Canvas,
    image: Tensor | None,
    c: Tensor,
    random: conditioning.Randomness,
    shape: tuple[int, int, int],
) -> tuple[Tensor, Known | None, Tensor | None]:
    """Where the picture begins, what of it is kept, and what a UNet with nine channels is told beside.

    The order of the draws is that of diffusers' pipelines, so that a seed means the same picture there.
    """
    model = served.model
    picture = None if image is None else 2.0 * image - 1.0
    begins_as_noise = picture is None or (canvas.mask is not None and strength == 1)
    x0 = None
    if picture is not None and not (model.takes_mask and begins_as_noise):
        x0 = served.pictures.encode(picture, random, canvas.digest)
    noise = random.normal(shape)
    known, surroundings = None, None
    if model.takes_mask:
        # Without a mask everything is painted, and nothing shows of the picture.
        mask = np.ones((canvas.height, canvas.width), dtype=bool) if canvas.mask is None else canvas.mask
        where = conditioning.latent_mask(mask, model.pixels_per_latent, noise.device)
        masked = served.pictures.encode_masked(picture, mask, random, canvas.digest)
        surroundings = torch.cat([where, masked]).to(model.dtype)
    elif canvas.mask is not None and x0 is not None:
        known = Known(x0, noise, conditioning.latent_mask(canvas.mask, model.pixels_per_latent, noise.device))
        conditioning.skip_masked_picture(model, shape, random)
    if begins_as_noise or x0 is None:
        return sampling.pure_noise(model.schedule, noise, c), known, surroundings
    return sampling.add_noise(x0, noise, c), known, surroundings


def _scalar(value: float, device: torch.device) -> Tensor:
    # NOTE: never without a dtype. While another thread loads a model, its loaders set the default one, of all threads.
    return torch.tensor(value, dtype=torch.float32, device=device)


def _flag(model: Model, pixels: Tensor, rows: Sequence[Trajectory]) -> Tensor:
    """Which of the pictures (B, H, W, 3) the checker takes for unsafe, (B,) bool; only those that want it are asked."""
    flagged = torch.zeros(len(rows), dtype=torch.bool, device=pixels.device)
    asking = [i for i, row in enumerate(rows) if row.request.safety]
    if model.safety is None or not asking:
        return flagged
    for i, flag in zip(asking, model.safety.flag(torch.stack([pixels[i] for i in asking])), strict=True):
        flagged[i] = flag
    return flagged


@contextmanager
def _beside(stream: torch.cuda.Stream | None, given: Tensor) -> Iterator[None]:
    """On a GPU: run on ``stream`` once ``given`` is there, while the current stream goes on."""
    if stream is None:
        yield
        return
    stream.wait_stream(torch.cuda.current_stream(given.device))
    given.record_stream(stream)  # or its memory would be used again too early
    with torch.cuda.stream(stream):
        yield


def _to_host(tensor: Tensor) -> Tensor:
    """A copy that the host can read once the current stream is there; it waits for nothing."""
    if tensor.device.type == "cpu":
        return tensor
    return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor, non_blocking=True)


def _once(make: Callable[[], T]) -> Callable[[], T]:
    """What ``make`` gives, for all threads that ask; the first of them makes it."""
    lock = threading.Lock()
    made: list[T] = []

    def get() -> T:
        with lock:
            if not made:
                made.append(make())
            return made[0]

    return get


def _backend_of(device: torch.device) -> Backend:
    if device.type == "cuda":
        return "inductor"
    return "openvino" if openvino.is_installed() else "eager"


@contextmanager
def _memory() -> Iterator[None]:
    """Say in our words that the device is full."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise OutOfMemory("the device is out of memory") from error


def _memory_of(device: torch.device) -> int:
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        processor = next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        processor = platform.processor() or platform.machine()
    return f"{device.type} ({processor})"

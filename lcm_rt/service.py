"""One generation, whoever asks: the one road behind realtime and run; knows no HTTP and no tensor."""

from __future__ import annotations

import dataclasses
import secrets
from collections.abc import Callable

from lcm_rt.errors import ImageError, InputError, LcmError, NotFound
from lcm_rt.files import Files
from lcm_rt.metrics import Metrics
from lcm_rt.types import (
    MAX_SEED,
    GenerateInput,
    GenerateOutput,
    GenerateRequest,
    GenerateResult,
    Priority,
)
from lcm_rt.workers import Generation, Workers

PLATFORM_MODELS = frozenset({"sdv1-5", "sdxl"})
"""The hosted app's own model names: where one is not served, the default answers, and the output says so."""

PLATFORM_APPS = frozenset(
    {
        "fast-lcm-diffusion",
        "fast-turbo-diffusion",
        "lcm",
        "lcm-plexed-sd15-i2i",
        "lcm-sd15-i2i",
        "sd-turbo-real-time-high-fps-msgpack",
        "sd-turbo-real-time-high-fps-msgpack-a10g",
        "sdxl-turbo-realtime",
        "shared-lcm-test",
    }
)
"""Aliases of the hosted apps whose messages this server understands, whoever owns them."""


class Ongoing:
    """A generation under way, to be awaited by ``output`` and steered meanwhile."""

    def __init__(self, parts: list[Generation], wanted: GenerateInput) -> None:
        self._parts = parts
        self._wanted = wanted

    def supersede(self) -> None:
        """Drop it unless one of its pictures has begun."""
        if not any(part.begun for part in self._parts):
            for part in self._parts:
                part.supersede()

    async def output(self) -> GenerateOutput:
        """The finished pictures. Being cancelled here cancels the work; Raises: LcmError."""
        try:
            results: list[GenerateResult] = [await part.result for part in self._parts]
        except ImageError as error:
            self.cancel()
            raise ImageError(_as_spelt(error.field, self._wanted), error.message) from None
        except BaseException:
            self.cancel()
            raise
        return GenerateOutput(results, self._wanted.prompt, self._wanted.request_id)

    def cancel(self) -> None:
        """Drop it wherever it is: nobody waits for it."""
        for part in self._parts:
            part.cancel()
            part.result.cancel()


def _as_spelt(field: str, wanted: GenerateInput) -> str:
    """The name under which the client gave the picture that the engine calls ``image`` or ``mask``."""
    names = (f"{field}_bytes", field, f"{field}_url")
    return next((name for name in names if getattr(wanted, name, None) is not None), field)


class Service:
    """Resolves what a client wants into requests, and hands them to the engine."""

    def __init__(self, workers: Workers, files: Files, metrics: Metrics) -> None:
        self.workers = workers
        self.files = files
        self.metrics = metrics
        self.default_model = next(iter(workers.models))

    def model_of_app(self, app: str) -> str:
        """The served model that an application id means, such as ``fal-ai/lcm`` or ``110602490-lcm-sd15-i2i``.

        Raises: NotFound: neither an app of the platform that is spoken here nor a model served here.
        """
        if "requests" in app.split("/"):
            raise NotFound("there is no queue here yet; use /run/fal-ai/lcm or the realtime socket")
        owner, _, rest = app.partition("/")
        if not rest:  # the legacy spelling has a dash after a numeric owner
            number, _, name = owner.partition("-")
            rest = name if number.isdecimal() and name else owner
        alias = rest.partition("/")[0]
        if alias in self.workers.models:
            return alias
        if alias in PLATFORM_APPS or not alias:
            return self.default_model
        raise NotFound(f"no app is called {app!r} here; use fal-ai/lcm or {', '.join(self.workers.models)}")

    def _model(self, wanted: GenerateInput, app_model: str) -> str:
        served = self.workers.models
        if wanted.model is not None:
            if wanted.model in served:
                return wanted.model
            if wanted.model not in PLATFORM_MODELS:
                raise InputError("model", f"is not served here; there is {', '.join(served)}", "model_unknown")
        if wanted.model_name in served:
            return wanted.model_name
        return app_model

    async def _picture(self, name: str, data: bytes | None, url: str | None) -> bytes | None:
        if data is not None:
            return data
        return await self.files.read(f"{name}_url", url) if url else None

    async def start(
        self,
        wanted: GenerateInput,
        *,
        app_model: str,
        priority: Priority,
        session: str | None = None,
        on_begun: Callable[[], None] | None = None,
    ) -> Ongoing:
        """Resolve ``wanted`` and submit it; its pictures have the seeds seed, seed+1, ...

        Raises: LcmError.
        """
        model = self._model(wanted, app_model)
        inline = wanted.image if wanted.image_bytes is None else wanted.image_bytes
        image = await self._picture("image", inline, wanted.image_url)
        mask = await self._picture("mask", wanted.mask_bytes, wanted.mask_url)
        if mask is not None and image is None:
            raise InputError("image_url", "a mask needs the picture that it masks", "missing")
        size = (wanted.image_size.width, wanted.image_size.height) if wanted.image_size else None
        seed = wanted.seed if wanted.seed is not None else secrets.randbelow(MAX_SEED + 1 - wanted.num_images)
        request = GenerateRequest(
            model=model,
            prompt=wanted.prompt,
            negative_prompt=wanted.negative_prompt,
            seed=seed,
            image=image,
            mask=mask,
            strength=wanted.strength,
            guidance_scale=wanted.guidance_scale,
            num_inference_steps=wanted.num_inference_steps,
            size=size,
            format=wanted.format,
            quality=wanted.quality,
            priority=priority,
        )
        parts: list[Generation] = []
        try:
            for number in range(wanted.num_images):
                part = dataclasses.replace(
                    request, seed=seed + number, session=None if session is None else f"{session}.{number}"
                )
                parts.append(self.workers.submit(part, on_begun))
        except LcmError:
            Ongoing(parts, wanted).cancel()
            raise
        return Ongoing(parts, wanted)

    def count(self, output: GenerateOutput, priority: Priority) -> None:
        """Put a finished generation into the metrics."""
        for result in output.results:
            self.metrics.pictures.labels(result.model, priority).inc()
            self.metrics.batch.observe(result.batch)
            for stage, seconds in result.timings.items():
                self.metrics.seconds.labels(stage).observe(seconds)

    async def run(self, wanted: GenerateInput, *, app_model: str, priority: Priority) -> GenerateOutput:
        """Start, wait, count. Raises: LcmError."""
        output = await (await self.start(wanted, app_model=app_model, priority=priority)).output()
        self.count(output, priority)
        return output

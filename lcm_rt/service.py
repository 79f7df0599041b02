"""One generation, whoever asks: the one road behind realtime, run and queue; knows no HTTP and no tensor."""

from __future__ import annotations

import asyncio
import itertools
import secrets
import time
from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial
from typing import Any

from lcm_rt import wire
from lcm_rt.apps import PLATFORM_APPS, parse_app
from lcm_rt.auth import LOCAL
from lcm_rt.errors import ImageError, InputError, NotFound, RequestTimeout
from lcm_rt.files import Files, Lifecycle
from lcm_rt.loras import Loras
from lcm_rt.metrics import Metrics
from lcm_rt.repeats import Repeats
from lcm_rt.types import (
    MAX_SEED,
    GenerateInput,
    GenerateOutput,
    GenerateRequest,
    GenerateResult,
    Preview,
    Priority,
)
from lcm_rt.workers import Generation, Workers

PLATFORM_MODELS = frozenset({"sdv1-5", "sdxl"})
"""The hosted app's own model names: where one is not served, the default answers, and the output says so."""


class Ongoing:
    """A generation under way, to be awaited by ``output`` and steered meanwhile."""

    def __init__(
        self, parts: list[Generation], wanted: GenerateInput, keep: Callable[[list[GenerateResult]], None] | None = None
    ) -> None:
        self._parts = parts
        self._wanted = wanted
        self._keep = keep

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
        if self._keep:
            self._keep(results)
        return GenerateOutput(results, self._wanted.prompt, self._wanted.request_id)

    def cancel(self) -> None:
        """Drop it wherever it is: nobody waits for it."""
        for part in self._parts:
            part.cancel()
            part.result.cancel()


class _Repeat(Ongoing):
    """A generation that was finished before it began: there is nothing to drop."""

    def __init__(self, results: list[GenerateResult], wanted: GenerateInput) -> None:
        super().__init__([], wanted)
        self._results = results

    async def output(self) -> GenerateOutput:
        return GenerateOutput(self._results, self._wanted.prompt, self._wanted.request_id)


def _as_spelt(field: str, wanted: GenerateInput) -> str:
    """The name under which the client gave the picture that the engine calls ``image`` or ``mask``."""
    names = (f"{field}_bytes", field, f"{field}_url")
    return next((name for name in names if getattr(wanted, name, None) is not None), field)


class Service:
    """Resolves what a client wants into requests, and hands them to the engine.

    Args:
        max_side: of a picture that may be asked for.
        repeat_bytes: of finished pictures that are kept for those who ask for the same again.
    """

    def __init__(
        self,
        workers: Workers,
        files: Files,
        loras: Loras,
        metrics: Metrics,
        *,
        max_side: int,
        repeat_bytes: int,
    ) -> None:
        self.workers = workers
        self.files = files
        self.loras = loras
        self.metrics = metrics
        # To find a metric's child by its labels takes longer than to count.
        self._pictures, self._seconds = cache(metrics.pictures.labels), cache(metrics.seconds.labels)
        self._max_side = max_side
        self._repeats = Repeats(repeat_bytes, metrics)
        self._runs = itertools.count(1)
        self.default_model = next(iter(workers.models))

    def model_of_app(self, app: str) -> str:
        """The served model that an application id means, such as ``fal-ai/lcm`` or ``110602490-lcm-sd15-i2i``.

        Raises: NotFound: neither an app of the platform that is spoken here nor a model served here.
        """
        parsed = parse_app(app)
        if "requests" in parsed.path.split("/"):
            raise NotFound("jobs are looked for under /queue")
        alias = parsed.alias
        if alias in self.workers.models:
            return alias
        if alias in PLATFORM_APPS or not alias:
            usual = PLATFORM_APPS.get(alias)
            return usual if usual in self.workers.models else self.default_model
        raise NotFound(f"no app is called {app!r} here; use fal-ai/lcm or {', '.join(self.workers.models)}")

    def model_of(self, wanted: GenerateInput, app_model: str, apps: frozenset[str] | None = None) -> str:
        """The served model that answers ``wanted``, sent to an app that uses ``app_model``.

        Args:
            apps: what its sender's token is bound to; it opens no other model by the message either.

        Raises: InputError.
        """
        served = self.workers.models
        if wanted.model is not None:
            if wanted.model in served:
                if wanted.model != app_model and apps is not None and wanted.model not in apps:
                    raise InputError("model", "is not one that this token is for", "model_forbidden")
                return wanted.model
            if wanted.model not in PLATFORM_MODELS:
                raise InputError("model", f"is not served here; there is {', '.join(served)}", "model_unknown")
        if wanted.model_name in served and (apps is None or wanted.model_name in apps):
            return wanted.model_name
        return app_model

    async def _picture(self, name: str, data: bytes | None, url: str | None, owner: str) -> bytes | None:
        if data is not None:
            return data
        return await self.files.read(f"{name}_url", url, owner=owner) if url else None

    async def start(
        self,
        wanted: GenerateInput,
        *,
        app_model: str,
        priority: Priority,
        owner: str = LOCAL,
        apps: frozenset[str] | None = None,
        session: str | None = None,
        on_begun: Callable[[], None] | None = None,
        on_preview: Callable[[Preview], None] | None = None,
    ) -> Ongoing:
        """Resolve ``wanted`` and submit it; its pictures have the seeds seed, seed+1, ...

        What its owner asked for before, with the same seed, is not made again: it begins, and is done, at once.

        Args:
            owner: whose it is, for what only its owner may read, and for fairness.
            apps: as for ``model_of``. session: the realtime connection.

        Raises: LcmError.
        """
        model = self.model_of(wanted, app_model, apps)
        size = self.check(wanted)
        self.workers.require(model)  # before anything is fetched in vain
        inline = wanted.image if wanted.image_bytes is None else wanted.image_bytes
        image = await self._picture("image", inline, wanted.image_url, owner)
        mask = await self._picture("mask", wanted.mask_bytes, wanted.mask_url, owner)
        lora = None if wanted.lora_url is None else str(await self.loras.find("lora_url", wanted.lora_url, owner=owner))
        steps = wanted.num_inference_steps
        if "num_inference_steps" not in wanted.model_fields_set:
            steps = self.workers.models[model].steps
        seed = wanted.seed if wanted.seed is not None else secrets.randbelow(MAX_SEED + 1 - wanted.num_images)
        request = GenerateRequest(
            model=model,
            prompt=wanted.prompt,
            negative_prompt=wanted.negative_prompt,
            seed=seed,
            image=image,
            mask=mask,
            mask_alpha=wanted.mask_alpha,
            inpaint_mask_only=wanted.inpaint_mask_only,
            controlnet_inpaint=wanted.controlnet_inpaint,
            strength=wanted.strength,
            guidance_scale=wanted.guidance_scale,
            num_inference_steps=steps,
            size=size,
            lora=lora,
            lora_scale=wanted.lora_scale,
            safety=wanted.enable_safety_checks,
            previews=wanted.previews and on_preview is not None,
            format=wanted.format,
            quality=wanted.quality,
            priority=priority,
            session=session,
            owner=self._party(owner, session),
            max_side=self._max_side,
        )
        key, begun_at = None, time.perf_counter()
        if wanted.seed is not None:  # a seed that was drawn here is asked for again too seldom to keep what it made
            load = self.workers.models[model].loads
            key = self._repeats.key(request, count=wanted.num_images, owner=owner, load=load)
        if key and (results := self._repeats.find(key)):
            if on_begun:
                on_begun()
            seconds = time.perf_counter() - begun_at
            timings = {"repeat": seconds, "total": seconds}  # not those of the first time, nor its company
            return _Repeat([replace(result, timings=timings, batch=0) for result in results], wanted)
        parts = self.workers.submit(request, on_begun, on_preview, count=wanted.num_images)
        return Ongoing(parts, wanted, partial(self._repeats.keep, key) if key else None)

    def _party(self, owner: str, session: str | None) -> str:
        """Who shares the rows fairly: owners of keys; without keys, each connection and each request by itself."""
        return owner if owner != LOCAL else session or f"run-{next(self._runs)}"

    def check(self, wanted: GenerateInput) -> tuple[int, int] | None:
        """What can be told to be wrong before anything is fetched; the size that is asked for. Raises: InputError."""
        has_image = bool(wanted.image is not None or wanted.image_bytes is not None or wanted.image_url)
        has_mask = bool(wanted.mask_bytes is not None or wanted.mask_url)
        if has_mask and not has_image:
            raise InputError("image_url", "a mask needs the picture that it masks", "missing")
        for field in ("inpaint_mask_only", "controlnet_inpaint"):
            if getattr(wanted, field) and not has_mask:
                raise InputError(field, "needs a mask", "missing")
        if wanted.image_size is None:
            return None
        size = {"width": wanted.image_size.width, "height": wanted.image_size.height}
        for name, side in size.items():
            if side > self._max_side:
                raise InputError(f"image_size.{name}", f"is over {self._max_side}, the most here", "less_than_equal")
        return size["width"], size["height"]

    def count(self, output: GenerateOutput, priority: Priority) -> None:
        """Put a finished generation into the metrics."""
        for result in output.results:
            self._pictures(result.model, priority).inc()
            if result.batch:
                self.metrics.batch.observe(result.batch)
            self.metrics.flagged.inc(result.flagged)
            for stage, seconds in result.timings.items():
                self._seconds(stage).observe(seconds)

    async def run(
        self,
        wanted: GenerateInput,
        *,
        app_model: str,
        priority: Priority,
        owner: str = LOCAL,
        apps: frozenset[str] | None = None,
        on_begun: Callable[[], None] | None = None,
        on_preview: Callable[[Preview], None] | None = None,
        start_within_s: float | None = None,
    ) -> GenerateOutput:
        """Start, wait, count.

        Args:
            start_within_s: how long it may wait for its model and its turn; without it, a model that is still on its
                way is an error at once.

        Raises: RequestTimeout: it did not begin in that time. LcmError.
        """
        waiting = asyncio.timeout(start_within_s)
        left = False

        def begin() -> None:
            if not (left or waiting.expired()):
                waiting.reschedule(None)
            if on_begun:
                on_begun()

        try:
            async with waiting:
                if start_within_s is not None:
                    await self.workers.wait_model(self.model_of(wanted, app_model, apps))
                ongoing = await self.start(
                    wanted,
                    app_model=app_model,
                    priority=priority,
                    owner=owner,
                    apps=apps,
                    on_begun=begin,
                    on_preview=on_preview,
                )
                output = await ongoing.output()
        except TimeoutError:
            raise RequestTimeout(f"it did not begin within {start_within_s:g} s") from None
        finally:
            left = True
        self.count(output, priority)
        return output

    async def answer(
        self,
        output: GenerateOutput,
        wanted: GenerateInput,
        *,
        address: Callable[[str], str],
        owner: str = LOCAL,
        lifecycle: Lifecycle | None = None,
    ) -> dict[str, Any]:
        """The body of an answer by HTTP: pictures by URL, or inline with ``sync_mode``.

        Args:
            address: the URL of a file by its name. owner: whose the files are.
            lifecycle: how long they are kept, and who may read them.
        """
        images = []
        life = lifecycle or Lifecycle()
        for result in output.results:
            if wanted.sync_mode:
                url = wire.data_uri(result)
            else:
                url = address(
                    await self.files.put(
                        result.image, result.content_type, owner=owner, ttl_s=life.ttl_s, access=life.access
                    )
                )
            images.append(wire.image_entry(result, url))
        return {"images": images, **wire.output_fields(output)}

"""The client for programs with an event loop: ``sync``, with ``await``."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Callable
from contextlib import closing, suppress
from types import TracebackType
from typing import Any, Self, TypeVar, Unpack

import httpx2

from lcm_rt.client import messages
from lcm_rt.client.protocol import DEFAULT_APP, LEAVE_S, Call, Failure, Feed, Flow, Priority, Protocol, Sleep
from lcm_rt.client.realtime import AsyncRealtime
from lcm_rt.client.values import Fields, Health, Lora, Model, Output, Picture, Preview, Status
from lcm_rt.errors import LcmError, RequestTimeout

T = TypeVar("T")


class AsyncClient:
    """A server's client; it belongs to one event loop.

    Every method raises an error of ``lcm_rt.errors``: what the server says is wrong, or ``Unavailable`` when there is
    no server. What may pass (no connection, 429, 503) is tried again a few times before, and a model that is being
    loaded is waited for.

    Args:
        url: where the server is; by default ``LCM_RT_URL``, or this machine's port 8000.
        key: an API key, if the server asks for one; by default ``LCM_RT_KEY``.
        timeout_s: seconds that a call may take; None is for ever. Each call can say otherwise.
        retries: how often a call is tried again.

    Raises: InputError: ``url`` is no http or https URL.
    """

    def __init__(
        self, url: str | None = None, key: str | None = None, *, timeout_s: float | None = 120.0, retries: int = 3
    ) -> None:
        self._protocol = Protocol(url, key, tries=retries)
        self._timeout_s = timeout_s
        self._http = httpx2.AsyncClient(follow_redirects=True)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Close the connections."""
        await self._http.aclose()

    async def _run(self, flow: Flow[T]) -> T:
        with closing(flow):
            came: Any = None
            try:
                while True:
                    step = flow.send(came)
                    came = None
                    if isinstance(step, Call):
                        came = await self._request(step)
                    elif isinstance(step, Sleep):
                        await asyncio.sleep(step.seconds)
                    else:
                        came = await asyncio.to_thread(step.function)
            except StopIteration as end:
                value: T = end.value
                return value

    async def _request(self, call: Call) -> httpx2.Response | httpx2.RequestError:
        try:
            return await self._http.request(
                call.method, call.url, headers=call.headers, content=call.content, timeout=call.timeout
            )
        except httpx2.RequestError as error:
            return error

    async def _follow(self, feed: Feed[T]) -> AsyncIterator[T]:
        while not feed.done:
            call = feed.call()
            failure: Failure | None = None
            try:
                async with self._http.stream(
                    call.method, call.url, headers=call.headers, content=call.content, timeout=call.timeout
                ) as reply:
                    if not reply.is_success:
                        await reply.aread()
                        failure = reply
                    else:
                        async for line in reply.aiter_lines():
                            for item in feed.read(line):
                                yield item
                            if feed.done:
                                return
            except httpx2.RequestError as error:
                failure = error
            await asyncio.sleep(feed.lost(failure))

    def _limit(self, timeout_s: float | None) -> float | None:
        return self._timeout_s if timeout_s is None else timeout_s

    async def generate(
        self,
        prompt: str,
        *,
        app: str = DEFAULT_APP,
        image: Picture | None = None,
        mask: Picture | None = None,
        lora: Lora | None = None,
        timeout_s: float | None = None,
        **fields: Unpack[Fields],
    ) -> Output:
        """Make pictures, and have them in hand.

        Their bytes come in the answer itself. With ``sync_mode=False`` the server keeps them for a while as well:
        then they are fetched from there, and ``Image.url`` says where.

        Args:
            app: a model's name, or an app of the hosted platform.
            image, mask: to start from, and what of it to paint anew.
            lora: a path or bytes are uploaded first.

        Raises: InputError: names the field. LcmError.
        """
        message = messages.compose(prompt, image, mask, lora, fields)
        return await self._run(self._protocol.generate(app, message, timeout_s=self._limit(timeout_s)))

    async def stream(
        self,
        prompt: str,
        *,
        app: str = DEFAULT_APP,
        image: Picture | None = None,
        mask: Picture | None = None,
        lora: Lora | None = None,
        timeout_s: float | None = None,
        **fields: Unpack[Fields],
    ) -> AsyncIterator[Preview | Output]:
        """As ``generate``, with a preview after each step, then the output."""
        message = messages.compose(prompt, image, mask, lora, fields)
        limit = self._limit(timeout_s)
        async for event in self._follow(await self._run(self._protocol.stream(app, message, timeout_s=limit))):
            if isinstance(event, Preview):
                yield event
            else:
                yield await self._run(self._protocol.output(event, timeout_s=limit))

    async def submit(
        self,
        prompt: str,
        *,
        app: str = DEFAULT_APP,
        image: Picture | None = None,
        mask: Picture | None = None,
        lora: Lora | None = None,
        webhook: str | None = None,
        priority: Priority = "normal",
        start_within_s: float | None = None,
        timeout_s: float | None = None,
        **fields: Unpack[Fields],
    ) -> AsyncJob:
        """Put a job into the queue, where it outlives this program and the server's own restarts.

        Args:
            webhook: address to which the result is posted.
            start_within_s: seconds after which a job that has not begun fails with ``RequestTimeout``.
        """
        message = messages.compose(prompt, image, mask, lora, fields)
        flow = self._protocol.submit(
            app,
            message,
            webhook=webhook,
            priority=priority,
            start_within_s=start_within_s,
            timeout_s=self._limit(timeout_s),
        )
        return AsyncJob(self, await self._run(flow))

    def job(self, url: str) -> AsyncJob:
        """A job by its ``url``, which another program may have kept."""
        return AsyncJob(self, url)

    async def subscribe(
        self,
        prompt: str,
        *,
        app: str = DEFAULT_APP,
        image: Picture | None = None,
        mask: Picture | None = None,
        lora: Lora | None = None,
        webhook: str | None = None,
        priority: Priority = "normal",
        start_within_s: float | None = None,
        on_update: Callable[[Status], object] | None = None,
        timeout_s: float | None = None,
        **fields: Unpack[Fields],
    ) -> Output:
        """Submit, tell ``on_update`` each status, and wait for the result; a job that is left is cancelled.

        Args:
            timeout_s: seconds that the job may take; None is for ever.
        """
        job = await self.submit(
            prompt,
            app=app,
            image=image,
            mask=mask,
            lora=lora,
            webhook=webhook,
            priority=priority,
            start_within_s=start_within_s,
            **fields,
        )
        try:
            async for status in job.events(timeout_s=timeout_s):
                if on_update:
                    on_update(status)
        except BaseException as error:
            if isinstance(error, RequestTimeout) or not isinstance(error, LcmError):
                with suppress(LcmError):
                    await job.cancel(timeout_s=LEAVE_S)
            raise
        return await job.result()

    async def upload(
        self,
        source: bytes | str | os.PathLike[str],
        *,
        content_type: str | None = None,
        name: str | None = None,
        timeout_s: float | None = None,
    ) -> str:
        """Give the server a file to keep for a while; its address, to be used as ``image``, ``mask`` or ``lora``.

        Args:
            source: a path, or the bytes. What is large is read and sent in parts.
            content_type: by default after the name's ending.
            timeout_s: seconds for each request of it.

        Raises: InputError: the path cannot be read. LcmError.
        """
        flow = self._protocol.upload(source, content_type=content_type, name=name, timeout_s=self._limit(timeout_s))
        return await self._run(flow)

    def realtime(
        self,
        app: str = DEFAULT_APP,
        *,
        max_buffering: int | None = None,
        on_preview: Callable[[Preview], object] | None = None,
        timeout_s: float | None = None,
    ) -> AsyncRealtime:
        """A session for one picture after the other, to be entered.

        Args:
            max_buffering: how many messages may wait for their turn, 1 to 60; by default 1: only the newest.
            on_preview: is called after each step of a picture, in the event loop.
            timeout_s: for how long a lost connection is tried.

        Raises: InputError: ``max_buffering`` is out of range.
        """
        return AsyncRealtime(
            self._protocol,
            app,
            max_buffering=max_buffering,
            on_preview=on_preview,
            timeout_s=self._limit(timeout_s),
        )

    async def models(self, *, timeout_s: float | None = None) -> list[Model]:
        """The models that are served."""
        return await self._run(self._protocol.models(timeout_s=self._limit(timeout_s)))

    async def load(self, name: str, *, timeout_s: float | None = None) -> Model:
        """Have a model loaded; it tells how far it is, and does not wait. Raises: NotFound, LcmError."""
        return await self._run(self._protocol.change_model(name, "load", timeout_s=self._limit(timeout_s)))

    async def unload(self, name: str, *, timeout_s: float | None = None) -> Model:
        """Free a model's memory once its pictures are done. Raises: NotFound, LcmError."""
        return await self._run(self._protocol.change_model(name, "unload", timeout_s=self._limit(timeout_s)))

    async def health(self, *, timeout_s: float | None = None) -> Health:
        """Whether the server is ready. Raises: Unavailable: there is none."""
        return await self._run(self._protocol.health(timeout_s=self._limit(timeout_s)))


class AsyncJob:
    """A job in the queue; ``url`` is all that is needed to find it again."""

    def __init__(self, client: AsyncClient, url: str) -> None:
        self._client = client
        self.url = url

    @property
    def id(self) -> str:
        """Its request id."""
        return self.url.rpartition("/")[2]

    async def status(self, *, logs: bool = False, timeout_s: float | None = None) -> Status:
        """How far it is. Raises: NotFound, LcmError."""
        client = self._client
        return await client._run(client._protocol.status(self.url, logs=logs, timeout_s=client._limit(timeout_s)))

    async def cancel(self, *, timeout_s: float | None = None) -> bool:
        """Have it dropped; False if it is done already. Raises: NotFound, LcmError."""
        client = self._client
        return await client._run(client._protocol.cancel(self.url, timeout_s=client._limit(timeout_s)))

    def events(self, *, timeout_s: float | None = None) -> AsyncIterator[Status]:
        """Its status now and whenever it changes, until it is done; a lost connection is made anew.

        Raises: RequestTimeout: it took longer than ``timeout_s`` seconds; None is for ever. NotFound, LcmError.
        """
        return self._client._follow(self._client._protocol.statuses(self.url, timeout_s=timeout_s))

    async def result(self, *, timeout_s: float | None = None) -> Output:
        """Wait until it is done; what came of it, as often as wanted.

        Raises: LcmError: the job failed. RequestTimeout: it took longer than ``timeout_s`` seconds; None is for ever.
        """
        async for _ in self.events(timeout_s=timeout_s):
            pass
        client = self._client
        return await client._run(client._protocol.result(self.url, timeout_s=client._timeout_s))

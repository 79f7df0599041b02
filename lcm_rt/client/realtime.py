"""Realtime sessions: the newest message is sent, answers come as they are ready, a lost connection comes back.

Sending never waits, so somebody else has to do it: in ``AsyncRealtime`` a task. ``Realtime`` is the same session in an
event loop in a thread of its own, because what holds a connection and mends it needs one anyway, and so there is one
implementation of the rules.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from concurrent.futures import Future
from contextlib import ExitStack, asynccontextmanager
from types import TracebackType
from typing import Any, Self, Unpack

import httpx2
from anyio.from_thread import BlockingPortal, start_blocking_portal
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed, InvalidStatus, WebSocketException

from lcm_rt.client import messages
from lcm_rt.client.line import Line, Settled
from lcm_rt.client.patience import Patience
from lcm_rt.client.protocol import CONNECT_S, Protocol, failure_of
from lcm_rt.client.values import Fields, Lora, Output, Picture, Preview
from lcm_rt.errors import Cancelled, InputError, LcmError, RequestTimeout, Superseded, TooLarge, Unavailable

logger = logging.getLogger(__name__)

KEPT = 64
"""Answers that nobody has fetched yet; beyond that the oldest are dropped."""

_CLOSE_S = 1.0
_TOO_LARGE = 1009  # close code

_Future = asyncio.Future[Output]


@asynccontextmanager
async def _within(timeout_s: float | None) -> AsyncIterator[None]:
    try:
        async with asyncio.timeout(timeout_s):
            yield
    except TimeoutError:
        raise RequestTimeout(f"there was no answer within {timeout_s:g} s") from None


class AsyncRealtime:
    """One realtime session; made by ``AsyncClient.realtime``, and to be entered.

    A connection is there from the first message on. When it is lost, it is made anew as long as there is something to
    say or to hear, with growing pauses, for ``timeout_s`` seconds at a time; when nothing was under way, the next
    message does it. So neither an idle timeout nor a server that starts again is an error.
    """

    def __init__(
        self,
        protocol: Protocol,
        app: str,
        *,
        max_buffering: int | None,
        on_preview: Callable[[Preview], object] | None,
        timeout_s: float | None,
    ) -> None:
        if max_buffering is not None and not 1 <= max_buffering <= 60:
            raise InputError("max_buffering", "should be from 1 to 60")
        self._url = protocol.realtime_url(app, max_buffering)
        self._headers = protocol.headers(protocol.url)
        self._on_preview = on_preview
        self._timeout_s = timeout_s
        self._patience: Patience | None = None  # while it does not work
        self._line: Line[_Future] = Line(max_buffering or 1)
        self._inbox: deque[Output | LcmError] = deque(maxlen=KEPT)
        self._open = False

    async def __aenter__(self) -> Self:
        self._posted, self._arrived = asyncio.Event(), asyncio.Event()
        self._open = True
        self._working = asyncio.create_task(self._work())
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._working.cancel()
        await asyncio.wait({self._working})
        if not self._working.cancelled():
            self._working.result()

    def send(
        self,
        prompt: str,
        *,
        image: Picture | None = None,
        mask: Picture | None = None,
        lora: str | None = None,
        **fields: Unpack[Fields],
    ) -> None:
        """Have a picture made; at once, or in place of an older message that could not be sent yet.

        It returns immediately. A picture given as a path or as one of Pillow's is read when its turn comes.

        Raises: InputError: a field that does not exist. Whatever else is wrong is raised where answers are received.
        """
        self.post(self.compose(prompt, image, mask, lora, fields))

    async def generate(
        self,
        prompt: str,
        *,
        image: Picture | None = None,
        mask: Picture | None = None,
        lora: str | None = None,
        timeout_s: float | None = None,
        **fields: Unpack[Fields],
    ) -> Output:
        """Send, and wait for the answer to this message; it is not among those that ``receive`` gives.

        Raises: Superseded: a newer message took its place. RequestTimeout, LcmError.
        """
        return await self.answer(self.compose(prompt, image, mask, lora, fields), timeout_s)

    async def receive(self, timeout_s: float | None = None) -> Output:
        """The next answer to what was sent.

        Raises: LcmError: a message failed; the session goes on. Cancelled: the session is not open. RequestTimeout.
        """
        async with _within(timeout_s):
            while not self._inbox:
                self._require_open()
                self._arrived.clear()
                await self._arrived.wait()
        answer = self._inbox.popleft()
        if isinstance(answer, LcmError):
            raise answer
        return answer

    async def __aiter__(self) -> AsyncIterator[Output]:
        """Answers as ``receive`` gives them, until the session is closed."""
        while self._inbox or self._open:
            try:
                yield await self.receive()
            except Cancelled:
                return

    def compose(
        self, prompt: str, image: Picture | None, mask: Picture | None, lora: Lora | None, fields: Mapping[str, Any]
    ) -> dict[str, Any]:
        """A message for ``post``. Raises: InputError."""
        previews = {"previews": True} if self._on_preview else {}
        return messages.compose(prompt, image, mask, lora, previews | dict(fields))

    def post(self, message: Mapping[str, Any], waiter: _Future | None = None) -> None:
        """Have ``message`` sent. Raises: Cancelled: the session is not open."""
        self._require_open()
        self._settle(self._line.post(message, waiter))
        self._posted.set()

    def _require_open(self) -> None:
        if not self._open:
            raise Cancelled("the session is not open")

    async def answer(self, message: Mapping[str, Any], timeout_s: float | None) -> Output:
        """Post ``message`` and wait for its answer."""
        waiter: _Future = asyncio.get_running_loop().create_future()
        self.post(message, waiter)
        async with _within(timeout_s):
            return await waiter

    def _settle(self, settled: Settled[_Future]) -> None:
        told: Output | LcmError | None = None
        for message, answer in settled:
            if message.waiter is None:
                # Being superseded is what happens to messages that nobody waits for; and what ends a connection is one
                # error, however many messages were under way.
                if answer is not told and not isinstance(answer, Superseded):
                    self._inbox.append(answer)
                    self._arrived.set()
                told = answer
            elif message.waiter.done():
                pass  # nobody waits any more
            elif isinstance(answer, LcmError):
                message.waiter.set_exception(answer)
            else:
                message.waiter.set_result(answer)

    async def _work(self) -> None:
        try:
            while True:
                if self._line.idle:
                    self._patience = None
                    self._posted.clear()
                    await self._posted.wait()
                error, retry_after_s = await self._converse()
                self._settle(self._line.lost())
                if self._line.idle:
                    continue
                self._patience = self._patience or Patience(None, self._timeout_s)
                try:
                    await asyncio.sleep(self._patience.pause(error, retry_after_s))
                except LcmError as reason:
                    self._settle(self._line.clear(reason))
        finally:
            self._open = False
            self._settle(self._line.clear(Cancelled("the session was closed")))
            self._arrived.set()

    async def _converse(self) -> tuple[LcmError, float]:
        """Talk over one connection until it ends; why it did, and how long the server asks to be left alone."""
        try:
            async with connect(
                self._url,
                additional_headers=self._headers,
                user_agent_header=None,
                compression=None,  # pictures do not shrink
                max_size=None,
                open_timeout=CONNECT_S,
                close_timeout=_CLOSE_S,
            ) as socket:
                return await self._talk(socket), 0.0
        except InvalidStatus as refusal:
            reply = refusal.response
            headers = list(reply.headers.raw_items())
            return failure_of(httpx2.Response(reply.status_code, headers=headers, content=bytes(reply.body)))
        except (OSError, WebSocketException) as error:
            return Unavailable(f"{self._url}: {error or type(error).__name__}"), 0.0

    async def _talk(self, socket: ClientConnection) -> LcmError:
        async with asyncio.TaskGroup() as tasks:
            writing = tasks.create_task(self._write(socket))
            refusal = await self._read(socket)
            writing.cancel()
        if refusal:
            return refusal
        if socket.close_code == _TOO_LARGE:
            return TooLarge(socket.close_reason or "the server does not take messages of this size")
        return Unavailable(f"the connection was closed ({socket.close_code})")

    async def _write(self, socket: ClientConnection) -> None:
        while True:
            while not (message := self._line.take()):
                self._posted.clear()
                await self._posted.wait()
            try:
                frame = await asyncio.to_thread(message.frame)
            except LcmError as error:
                self._settle(self._line.refuse(message, error))
                continue
            try:
                await socket.send(frame)
            except ConnectionClosed:
                return  # the reader says why

    async def _read(self, socket: ClientConnection) -> LcmError | None:
        """Take what comes until the connection ends; what it ends with, if the server says so."""
        try:
            async for frame in socket:
                heard = self._line.hear(frame)
                if heard.refusal:
                    return heard.refusal
                if heard.settled:
                    self._patience = None
                    self._settle(heard.settled)
                if heard.preview and self._on_preview:
                    _show(heard.preview, self._on_preview)
        except ConnectionClosed:
            pass
        return None


def _show(preview: Preview, on_preview: Callable[[Preview], object]) -> None:
    try:
        on_preview(preview)
    except Exception:
        logger.exception("on_preview failed")


class Realtime:
    """One realtime session; made by ``Client.realtime``, and to be entered. It may be used from several threads.

    A connection is there from the first message on. When it is lost, it is made anew as long as there is something to
    say or to hear, with growing pauses, for ``timeout_s`` seconds at a time; when nothing was under way, the next
    message does it. So neither an idle timeout nor a server that starts again is an error.
    """

    def __init__(self, session: AsyncRealtime) -> None:
        self._session = session
        self._stack = ExitStack()
        self._portal: BlockingPortal | None = None

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            portal = stack.enter_context(start_blocking_portal())
            stack.enter_context(portal.wrap_async_context_manager(self._session))
            self._portal = portal
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._stack.__exit__(kind, error, traceback)

    def _start(self, function: Callable[..., Any], *args: Any) -> Future[Any]:
        """Call ``function`` in the session's loop. Raises: Cancelled: the session is not open."""
        try:
            if self._portal:
                return self._portal.start_task_soon(function, *args)
        except RuntimeError:  # its loop has ended
            pass
        raise Cancelled("the session is not open")

    def send(
        self,
        prompt: str,
        *,
        image: Picture | None = None,
        mask: Picture | None = None,
        lora: str | None = None,
        **fields: Unpack[Fields],
    ) -> None:
        """Have a picture made; at once, or in place of an older message that could not be sent yet.

        It returns immediately. A picture given as a path or as one of Pillow's is read when its turn comes.

        Raises: InputError: a field that does not exist. Whatever else is wrong is raised where answers are received.
        """
        message = self._session.compose(prompt, image, mask, lora, fields)
        self._start(self._session.post, message)

    def generate(
        self,
        prompt: str,
        *,
        image: Picture | None = None,
        mask: Picture | None = None,
        lora: str | None = None,
        timeout_s: float | None = None,
        **fields: Unpack[Fields],
    ) -> Output:
        """Send, and wait for the answer to this message; it is not among those that ``receive`` gives.

        Raises: Superseded: a newer message took its place. RequestTimeout, LcmError.
        """
        message = self._session.compose(prompt, image, mask, lora, fields)
        output: Output = self._start(self._session.answer, message, timeout_s).result()
        return output

    def receive(self, timeout_s: float | None = None) -> Output:
        """The next answer to what was sent.

        Raises: LcmError: a message failed; the session goes on. Cancelled: the session is not open. RequestTimeout.
        """
        output: Output = self._start(self._session.receive, timeout_s).result()
        return output

    def __iter__(self) -> Iterator[Output]:
        """Answers as ``receive`` gives them, until the session is closed."""
        while True:
            try:
                yield self.receive()
            except Cancelled:
                return

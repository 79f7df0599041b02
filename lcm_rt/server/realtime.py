"""Realtime over a WebSocket: a thin shell around ``session``, one connection at a time."""

from __future__ import annotations

import asyncio
import itertools
import logging
import re
import time
from collections.abc import Awaitable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any, NamedTuple

from starlette.websockets import WebSocket, WebSocketDisconnect, WebSocketState

from lcm_rt import wire
from lcm_rt.auth import Auth, Principal
from lcm_rt.errors import EngineLost, LcmError, ModelLoading, Overloaded, Superseded, Unauthorized, Unavailable
from lcm_rt.server.guard import principal_of_socket
from lcm_rt.service import Ongoing, Service
from lcm_rt.session import Message, Session
from lcm_rt.types import GenerateInput, GenerateOutput, Preview

logger = logging.getLogger(__name__)

Frame = bytes | str

DRAIN_S = 4.0
"""How long a stop waits for the pictures of open connections."""

RECHECK_S = 5.0
"""How long a key that was revoked still works on an open connection."""

_BUFFERING = re.compile(r"[1-9]|[1-5][0-9]|60")  # what the platform's clients let through


def app_of_path(path: str) -> str:
    """The application id in a WebSocket's path; older clients append ``/realtime`` twice, or ``/ws``."""
    path = path.strip("/").removeprefix("run/")
    while path.endswith(("/realtime", "/ws")) or path in ("realtime", "ws"):
        path = path.rpartition("/")[0]
    return path


def max_buffering_of(value: str | None) -> int:
    """The ``max_buffering`` of the query; anything that is no number from 1 to 60 means latest wins."""
    return int(value) if value and _BUFFERING.fullmatch(value) else 1


class Limits(NamedTuple):
    """Of open connections.

    Args:
        max_sessions: at a time.
        idle_timeout_s: one without messages is closed after this.
        send_timeout_s: a client that takes longer to read one frame is cut.
    """

    max_sessions: int
    idle_timeout_s: float
    send_timeout_s: float


class Realtime:
    """Accepts realtime connections on any path."""

    def __init__(self, service: Service, limits: Limits) -> None:
        self._service = service
        self._limits = limits
        self._numbers = itertools.count(1)
        self._open = 0
        self._empty = asyncio.Event()
        self._empty.set()
        self.draining = asyncio.Event()

    async def serve(self, websocket: WebSocket) -> None:
        """The endpoint. The handshake never fails: the platform's clients would retry it for ever."""
        await websocket.accept()
        app = app_of_path(websocket.path_params["path"])
        try:
            principal = await principal_of_socket(websocket, app)
            model = self._service.model_of_app(app)
            with self.place():
                await _Connection(
                    websocket,
                    self._service,
                    name=f"session-{next(self._numbers)}",
                    principal=principal,
                    model=model,
                    max_buffering=max_buffering_of(websocket.query_params.get("max_buffering")),
                    limits=self._limits,
                    draining=self.draining,
                ).run()
        except Unauthorized:
            await self._refuse(websocket, wire.encode_unauthorized())
        except LcmError as error:
            await self._refuse(websocket, wire.encode_error(error))

    @contextmanager
    def place(self) -> Iterator[None]:
        """A place among the open connections. Raises: Overloaded: there is none."""
        if self.draining.is_set():
            raise Overloaded("the server stops; try again soon, it may be back")
        if self._open >= self._limits.max_sessions:
            raise Overloaded(f"{self._limits.max_sessions} realtime connections are open already")
        self._open += 1
        self._empty.clear()
        self._service.metrics.sessions.set(self._open)
        try:
            yield
        finally:
            self._open -= 1
            if not self._open:
                self._empty.set()
            self._service.metrics.sessions.set(self._open)

    async def drain(self) -> None:
        """Close every connection, normally and once its pictures under way are sent; new ones are refused."""
        self.draining.set()
        with suppress(TimeoutError):
            async with asyncio.timeout(DRAIN_S):
                await self._empty.wait()

    async def _refuse(self, websocket: WebSocket, frame: str) -> None:
        try:
            async with asyncio.timeout(self._limits.send_timeout_s):
                await websocket.send_text(frame)
                await websocket.close(1000)
        except (WebSocketDisconnect, TimeoutError):
            pass  # it left before it could be told


class _Connection:
    """One client: a reader, a writer, and a task for each message past the mailbox."""

    def __init__(
        self,
        websocket: WebSocket,
        service: Service,
        *,
        name: str,
        principal: Principal,
        model: str,
        max_buffering: int,
        limits: Limits,
        draining: asyncio.Event,
    ) -> None:
        self._websocket = websocket
        self._service = service
        self._name = name
        self._principal = principal
        self._heard_at = self._checked_at = time.monotonic()
        self._model = model
        self._session: Session[Frame] = Session(max_buffering)
        self._limits = limits
        self._draining = draining
        # Bounded by the session's window, one preview, and one notice for each wait for a model.
        self._outbox: asyncio.Queue[tuple[Frame, bool]] = asyncio.Queue()
        self._serving: dict[Message[Frame], asyncio.Task[None]] = {}
        self._ongoing: dict[Message[Frame], Ongoing] = {}
        self._sent = asyncio.Event()
        self._counted = 0
        self._told_loading = False

    async def run(self) -> None:
        """Serve until the client leaves, is idle or does not read."""
        begun_at = time.monotonic()
        try:
            async with asyncio.TaskGroup() as tasks:
                self._tasks = tasks
                tasks.create_task(self._write())
                tasks.create_task(self._read())
                tasks.create_task(self._expire())
                tasks.create_task(self._leave())
        except* (_Ended, WebSocketDisconnect) as group:
            reason = str(group.exceptions[0]) or "the client left"
        finally:
            self._count()
        logger.info(
            "%s ended after %.0f s (%s): %d messages, %d superseded",
            self._name,
            time.monotonic() - begun_at,
            reason,
            self._session.received,
            self._session.superseded,
        )

    async def _read(self) -> None:
        """Take every frame from the socket at once, so that only the newest waits."""
        while True:
            event = await self._websocket.receive()
            if event["type"] == "websocket.disconnect":
                raise _Ended("the client left")
            self._heard_at = time.monotonic()
            if self._heard_at - self._checked_at > RECHECK_S and not await self._still_allowed():
                await self._close(wire.encode_unauthorized())
                raise _Ended("its key has ended")
            frame = event.get("bytes")
            self._receive(event["text"] if frame is None else frame)
            await asyncio.sleep(0)  # while a flood lies in the buffer, receiving it never yields to the others

    async def _expire(self) -> None:
        """End a connection that says nothing. One timer, as one for each message would cost more than the message."""
        left_s = timeout_s = self._limits.idle_timeout_s
        while left_s > 0:
            await asyncio.sleep(left_s)
            # While something of it is under way, it is we who are slow.
            left_s = self._heard_at + timeout_s - time.monotonic() if self._session.idle else timeout_s
        await self._close(wire.encode_idle_timeout())
        raise _Ended("idle")

    async def _still_allowed(self) -> bool:
        """Whether the key behind the connection holds; looked at every few seconds, and only while messages come."""
        self._checked_at = time.monotonic()
        auth: Auth = self._websocket.app.state.auth
        with suppress(Unavailable):
            return await auth.holds(self._principal)
        return True

    async def _leave(self) -> None:
        """When the server stops: finish what is under way, then say goodbye in a way that clients connect again."""
        await self._draining.wait()
        with suppress(TimeoutError):
            async with asyncio.timeout(DRAIN_S / 2):
                while not self._session.idle:
                    await self._sent.wait()
                    self._sent.clear()
        if self._websocket.application_state is WebSocketState.CONNECTED:
            await self._send(self._websocket.close(1001, "the server stops"))
        raise _Ended("the server stops")

    def _receive(self, frame: Frame) -> None:
        if self._draining.is_set():
            return
        self._service.metrics.messages.inc()
        for message in self._session.receive(frame):
            if message.parked:
                self._serving[message].cancel()  # it waits for its model, and would for long
                self._answer(message)
            elif ongoing := self._ongoing.get(message):
                ongoing.supersede()
        self._count()
        self._advance()

    def _advance(self) -> None:
        """Start what the window has room for."""
        while message := self._session.take():
            task = self._serving[message] = self._tasks.create_task(self._serve(message))
            task.add_done_callback(partial(self._served, message))

    def _served(self, message: Message[Frame], task: asyncio.Task[None]) -> None:
        # A message that was put back into the mailbox may be served by another task by now.
        if self._serving.get(message) is task:
            del self._serving[message]

    async def _serve(self, message: Message[Frame]) -> None:
        """See one message through to its answer."""
        data: Any = None
        try:
            data = wire.decode_frame(message.frame)
            wanted = wire.parse_input(data)
            while (output := await self._generate(message, wanted)) is None:
                await self._service.workers.wait_model(
                    self._service.model_of(wanted, self._model, self._principal.apps)
                )
                self._session.unpark(message)
            reply = wire.encode_output(output, wanted, message.frame)
        except Superseded:
            self._answer(message)
        except EngineLost as error:
            if self._session.retry(message):
                self._ongoing.pop(message, None)
                self._advance()
            elif message.dropped and not message.begun:
                self._answer(message)
            else:
                self._fail(message, error, data)
        except LcmError as error:
            self._fail(message, error, data)
        except Exception:
            logger.exception("%s: a message failed", self._name)
            self._fail(message, LcmError("the server failed on this message"), data)
        else:
            self._answer(message, reply)
            self._service.count(output, "realtime")

    async def _generate(self, message: Message[Frame], wanted: GenerateInput) -> GenerateOutput | None:
        """The pictures of a message, or None if its model is still on its way; then the message is parked."""
        try:
            ongoing = await self._service.start(
                wanted,
                app_model=self._model,
                priority="realtime",
                owner=self._principal.owner,
                apps=self._principal.apps,
                session=self._name,
                on_begun=lambda: self._session.begun(message),
                on_preview=lambda preview: self._preview(message, wanted, preview),
            )
            self._ongoing[message] = ongoing
            if message.dropped:  # while its pictures were being looked up
                ongoing.supersede()
            output = await ongoing.output()
        except ModelLoading as error:
            self._ongoing.pop(message, None)
            if message.dropped:
                raise Superseded("a newer message came") from None
            self._session.park(message)
            if not self._told_loading:
                self._told_loading = True
                self._outbox.put_nowait((wire.encode_notice("loading", stage=str(error)), False))
            return None
        self._told_loading = False
        return output

    def _preview(self, message: Message[Frame], wanted: GenerateInput, preview: Preview) -> None:
        """Show a picture on its way, if the client reads fast enough and none of an earlier message is owed."""
        if self._outbox.empty() and self._session.leads(message):
            self._outbox.put_nowait((wire.encode_preview(preview, wanted, message.frame), False))

    def _fail(self, message: Message[Frame], error: LcmError, data: Any) -> None:
        self._service.metrics.errors.labels(error.code).inc()
        self._answer(message, wire.encode_error(error, wire.request_id_of(data)))

    def _answer(self, message: Message[Frame], *replies: Frame) -> None:
        self._ongoing.pop(message, None)
        for reply in self._session.answer(message, *replies):
            self._outbox.put_nowait((reply, True))
        self._count()
        self._advance()

    def _count(self) -> None:
        if superseded := self._session.superseded - self._counted:
            self._service.metrics.superseded.inc(superseded)
            self._counted += superseded

    async def _write(self) -> None:
        """Send what is ready, in order; a client that does not read is cut."""
        while True:
            frame, is_reply = await self._outbox.get()
            await self._send(
                self._websocket.send_text(frame) if isinstance(frame, str) else self._websocket.send_bytes(frame)
            )
            if is_reply:
                self._session.sent()
                self._sent.set()
                self._advance()

    async def _send(self, sending: Awaitable[None]) -> None:
        try:
            async with asyncio.timeout(self._limits.send_timeout_s):
                await sending
        except TimeoutError:
            raise _Ended("the client does not read") from None
        except RuntimeError:
            raise _Ended("the client left") from None  # starlette: a send after the close

    async def _close(self, frame: str) -> None:
        """Say why, then close normally: any other code would look like an error to the platform's clients."""
        if self._websocket.application_state is WebSocketState.CONNECTED:
            await self._send(self._websocket.send_text(frame))
            await self._send(self._websocket.close(1000))


class _Ended(Exception):
    """The connection is over; its text says why, for the log."""

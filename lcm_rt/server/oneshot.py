"""HTTP over a WebSocket: each message is the body of one ``run``, and the connection outlives it.

The platform has this form on a host of its own. For each message the server says ``start`` with status and headers,
then the body, then ``end``; the first and the last carry the same ``request_id``, by which clients tell them from
bodies.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Coroutine
from contextlib import suppress
from typing import Any, TypeVar

import orjson
from starlette.websockets import WebSocket, WebSocketDisconnect

from lcm_rt import wire
from lcm_rt.auth import Auth, Principal
from lcm_rt.errors import LcmError, Unauthorized
from lcm_rt.server.addressing import address_of
from lcm_rt.server.guard import principal_of_socket
from lcm_rt.server.realtime import Limits, Realtime
from lcm_rt.server.replies import error_headers
from lcm_rt.service import Service

T = TypeVar("T")


def _begin(work: Coroutine[Any, Any, T], tasks: set[asyncio.Future[Any]]) -> asyncio.Future[T]:
    task = asyncio.ensure_future(work)
    tasks.add(task)
    task.add_done_callback(tasks.discard)
    return task


class Oneshot:
    """Accepts such connections under ``/ws``; they count among those of ``realtime``, and end with them."""

    def __init__(self, service: Service, realtime: Realtime, limits: Limits) -> None:
        self._service = service
        self._realtime = realtime
        self._limits = limits

    async def serve(self, websocket: WebSocket) -> None:
        """The endpoint."""
        await websocket.accept()
        app = websocket.path_params["app"]
        try:
            principal = await principal_of_socket(websocket, app)
            app_model = self._service.model_of_app(app)
            with self._realtime.place():
                await self._serve(websocket, principal, app_model)
        except LcmError as error:
            with suppress(WebSocketDisconnect, RuntimeError):
                await self._send(websocket, *self._failed(error))
                await websocket.close(1000)

    async def _serve(self, websocket: WebSocket, principal: Principal, app_model: str) -> None:
        auth: Auth = websocket.app.state.auth
        tasks: set[asyncio.Future[Any]] = set()
        try:
            stopping = _begin(self._realtime.draining.wait(), tasks)
            receiving = _begin(websocket.receive(), tasks)
            while True:
                idle_s = self._limits.idle_timeout_s
                await asyncio.wait(tasks, timeout=idle_s, return_when=asyncio.FIRST_COMPLETED)
                if stopping.done() or not receiving.done():
                    await websocket.close(1001 if stopping.done() else 1000)
                    return
                event = receiving.result()
                if event["type"] == "websocket.disconnect":
                    return
                if not await auth.holds(principal):
                    await self._send(websocket, *self._failed(Unauthorized("this key has ended")))
                    await websocket.close(1000)
                    return
                frame = event.get("bytes")
                answering = _begin(
                    self._answer(websocket, event["text"] if frame is None else frame, principal, app_model), tasks
                )
                receiving = _begin(websocket.receive(), tasks)
                await asyncio.wait(tasks - {stopping}, return_when=asyncio.FIRST_COMPLETED)
                if not answering.done() and receiving.result()["type"] == "websocket.disconnect":
                    return
                answer = await answering
                async with asyncio.timeout(self._limits.send_timeout_s):
                    await self._send(websocket, *answer)
        except (TimeoutError, WebSocketDisconnect, RuntimeError):
            pass  # it does not read, or starlette's ways to say that it has left
        finally:
            for task in tasks:
                task.cancel()

    async def _send(self, websocket: WebSocket, status: int, headers: dict[str, str], body: bytes) -> None:
        id = secrets.token_hex(16)
        headers = {"content-type": "application/json", "x-fal-request-id": id, **headers}
        start = {"type": "start", "request_id": id, "status": status, "headers": headers}
        await websocket.send_text(orjson.dumps(start).decode())
        await websocket.send_text(body.decode())
        await websocket.send_text(orjson.dumps({"type": "end", "request_id": id, "status": status}).decode())

    async def _answer(
        self, websocket: WebSocket, frame: bytes | str, principal: Principal, app_model: str
    ) -> tuple[int, dict[str, str], bytes]:
        owner = principal.owner
        try:
            wanted = wire.parse_input(wire.decode_frame(frame))
            output = await self._service.run(wanted, app_model=app_model, priority="run", owner=owner)
            address = address_of(websocket).file
            return 200, {}, orjson.dumps(await self._service.answer(output, wanted, address=address, owner=owner))
        except LcmError as error:
            return self._failed(error)

    def _failed(self, error: LcmError) -> tuple[int, dict[str, str], bytes]:
        self._service.metrics.errors.labels(error.code).inc()
        return error.status, error_headers(error), wire.error_body(error)

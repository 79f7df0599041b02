"""A serial server, shaped as Real-Time-Latent-Consistency-Model is (radames, Apache-2.0): its loop, said anew.

A user has a WebSocket for what is to be painted, and an endless multipart response for the pictures, as browsers show
them in an ``<img>``. The server says ``send_frame``, the client answers ``next_frame`` and its parameters, which go
into the user's queue, and the server says ``wait``. Of each user's queue the loop of his response takes one, calls the
pipeline right there, in the event loop, so that everybody else waits, and yields the picture: Pillow, quality 80,
optimized and progressive. Pictures are yielded once, as to Firefox; Chromium gets each twice.

    python -m benchmarks.peers.serial_server PORT WORK DTYPE
"""

from __future__ import annotations

import asyncio
import contextlib
import io
import sys
from collections.abc import AsyncIterator, Callable

import torch
import uvicorn
from PIL import Image
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import StreamingResponse
from starlette.routing import Route, WebSocketRoute
from starlette.websockets import WebSocket, WebSocketDisconnect

from benchmarks.peers.painters import Diffusers
from benchmarks.peers.work import Job, Work


class User:
    """A socket, and what came through it; the queue has no bound."""

    def __init__(self, socket: WebSocket) -> None:
        self.socket = socket
        self.queue: asyncio.Queue[Job] = asyncio.Queue()


def create_app(predict: Callable[[Job], Image.Image]) -> Starlette:
    users: dict[str, User] = {}

    async def take_in(socket: WebSocket) -> None:
        await socket.accept()
        name = socket.path_params["user"]
        user = users[name] = User(socket)
        await socket.send_json({"status": "connected"})
        try:
            while True:
                if (await socket.receive_json())["status"] == "next_frame":
                    parameters = await socket.receive_json()
                    user.queue.put_nowait(Job(parameters["prompt"], parameters["seed"]))
                    await socket.send_json({"status": "wait"})
        except WebSocketDisconnect:
            del users[name]

    async def stream(request: Request) -> StreamingResponse:
        user = users[request.path_params["user"]]

        async def frames() -> AsyncIterator[bytes]:
            with contextlib.suppress(WebSocketDisconnect, RuntimeError):  # the socket is gone
                while True:
                    await user.socket.send_json({"status": "send_frame"})
                    image = predict(await user.queue.get())
                    yield frame(image)

        return StreamingResponse(frames(), media_type="multipart/x-mixed-replace;boundary=frame")

    return Starlette(routes=[WebSocketRoute("/api/ws/{user}", take_in), Route("/api/stream/{user}", stream)])


def frame(image: Image.Image) -> bytes:
    """One part of the multipart response."""
    file = io.BytesIO()
    image.save(file, "JPEG", quality=80, optimize=True, progressive=True)
    data = file.getvalue()
    return b"--frame\r\nContent-Type: image/jpeg\r\nContent-Length: %d\r\n\r\n%b\r\n" % (len(data), data)


def main() -> None:
    port, work, dtype = int(sys.argv[1]), Work.from_json(sys.argv[2]), sys.argv[3]
    torch.set_num_threads(work.threads)
    painter = Diffusers(work, dtype=dtype)
    uvicorn.run(create_app(lambda job: painter.paint([job])[0]), host="127.0.0.1", port=port, log_level="warning")


if __name__ == "__main__":
    main()

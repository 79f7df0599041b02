"""How a browser talks to the serial server: parameters through a WebSocket, pictures in a multipart response."""

from __future__ import annotations

import asyncio
import uuid
from collections import deque

import httpx2
import orjson
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed, WebSocketException

from lcm_rt.bench.dialects import ANSWER_S, Answer, Closed, Message
from lcm_rt.errors import Unavailable

ABNORMAL = 1006  # the code of a WebSocket that ended without a word


class MotionJpeg:
    """The serial server at ``url``, http://HOST:PORT. One message at a time: when the server asks for the next."""

    throttled = True

    def __init__(self, url: str) -> None:
        self._url = url

    async def connect(self) -> MotionJpegLine:
        user = uuid.uuid4()
        client = httpx2.AsyncClient(verify=False, timeout=ANSWER_S, trust_env=False)
        try:
            socket = await connect(
                f"{self._url.replace('http', 'ws', 1)}/api/ws/{user}", open_timeout=ANSWER_S, ping_interval=None
            )
            while orjson.loads(await socket.recv())["status"] != "connected":
                pass
            response = await client.send(client.build_request("GET", f"{self._url}/api/stream/{user}"), stream=True)
            response.raise_for_status()
        except (OSError, WebSocketException, httpx2.HTTPError) as error:
            await client.aclose()
            raise Unavailable(f"{self._url}: {error or type(error).__name__}") from None
        return MotionJpegLine(socket, client, response)


class MotionJpegLine:
    """One user of the serial server."""

    def __init__(self, socket: ClientConnection, client: httpx2.AsyncClient, response: httpx2.Response) -> None:
        self._socket = socket
        self._client = client
        self._chunks = response.aiter_raw()
        self._asked = asyncio.Event()
        self._sent: deque[int] = deque()
        self._buffer = bytearray()
        self._listening = asyncio.create_task(self._listen())

    async def _listen(self) -> None:
        try:
            async for said in self._socket:
                if orjson.loads(said)["status"] == "send_frame":
                    self._asked.set()
        except ConnectionClosed:
            return  # the response ends too

    async def send(self, number: int, message: Message) -> int:
        await self._asked.wait()
        self._asked.clear()
        self._sent.append(number)
        parameters = orjson.dumps({"prompt": message.prompt, "seed": message.seed}).decode()
        try:
            await self._socket.send('{"status":"next_frame"}')
            await self._socket.send(parameters)
        except ConnectionClosed as closed:
            raise Closed(closed.rcvd.code if closed.rcvd else ABNORMAL) from None
        return len(parameters)

    async def receive(self) -> Answer:
        head = await self._until(b"\r\n\r\n")
        size = int(head.lower().partition(b"content-length:")[2].split()[0])
        while len(self._buffer) < size + 2:  # a line's end follows the picture
            await self._more()
        picture = bytes(self._buffer[:size])
        del self._buffer[: size + 2]
        about = {"content_type": "image/jpeg", "bytes": size}
        return Answer("picture", len(head) + len(picture), self._sent.popleft(), about)

    async def _until(self, mark: bytes) -> bytes:
        while (end := self._buffer.find(mark)) < 0:
            await self._more()
        head = bytes(self._buffer[: end + len(mark)])
        del self._buffer[: end + len(mark)]
        return head

    async def _more(self) -> None:
        try:
            self._buffer += await anext(self._chunks)
        except (StopAsyncIteration, httpx2.HTTPError):
            raise Closed(ABNORMAL) from None

    async def close(self) -> None:
        await self._socket.close()
        await self._listening
        await self._client.aclose()

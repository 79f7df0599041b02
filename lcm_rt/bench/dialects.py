"""How clients talk to the servers that are measured: a class for each wire.

A ``Dialect`` opens one ``Line`` for each client. A line sends messages, which have numbers, and receives answers, which
say the number of the message that they answer. Where a server names no message in its answers, they are taken to be
in the order of the messages that were sent on that line.

A *throttled* client sends nothing while an answer is outstanding, and then the newest of what it has to say: that is
what browsers do with servers that take one request at a time. Whatever it passes over is superseded, as it would be in
the mailbox of a server where latest wins.
"""

from __future__ import annotations

import asyncio
import base64
import ssl
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import httpx2
import msgpack
import orjson
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed, WebSocketException

from lcm_rt.errors import Unavailable

ANSWER_S = 120.0
"""How long one HTTP request may take."""


@dataclass(frozen=True, slots=True)
class Message:
    """What is asked for: ``image`` is a JPEG or None, ``fields`` are what else the server is to be told."""

    prompt: str
    seed: int
    image: bytes | None = None
    fields: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Answer:
    """One frame or response.

    Attributes:
        kind: ``notice`` is what is neither a picture nor a failure: word of a model that loads, a preview.
        size: bytes, on the wire as far as the dialect sees it.
        number: of the message that it answers, or None for none of them.
        about: what the server says of a picture: its sides, bytes, model.
        timings: seconds by stage, as the server measured them.
        error: code of a failure. reason: in words.
    """

    kind: Literal["picture", "error", "notice"]
    size: int
    number: int | None = None
    about: Mapping[str, Any] = field(default_factory=dict)
    timings: Mapping[str, float] = field(default_factory=dict)
    error: str = ""
    reason: str = ""


class Closed(Exception):
    """The line has ended, by the other side; ``code`` is that of the WebSocket."""

    def __init__(self, code: int) -> None:
        super().__init__(f"closed_{code}")


class Line(Protocol):
    """One client's connection."""

    async def send(self, number: int, message: Message) -> int:
        """Hand over a message; the bytes it took. Raises: Closed."""
        ...

    async def receive(self) -> Answer:
        """The next answer. Raises: Closed."""
        ...

    async def close(self) -> None: ...


class Dialect(Protocol):
    """One server, and how to talk to it."""

    throttled: bool

    async def connect(self) -> Line:
        """Raises: Unavailable: nobody answers there."""
        ...


class WebSocket:
    """Maps over a WebSocket: ``{"prompt", "seed", "request_id", "image_bytes", ...}`` there, ``{"images"}`` back.

    This is the wire of lcm-rt; ``request_id`` and ``timings`` may be missing in the answers. JSON text in place of a
    picture is an error if its ``type`` is ``x-fal-error`` or it has ``error``, else a notice.

    Args:
        url: ws:// or wss://, whole.
        codec: of the messages; JSON has the picture as a data URI in ``image_url``.
        throttled: see the module.
        headers: of the handshake.
    """

    def __init__(
        self,
        url: str,
        *,
        codec: Literal["msgpack", "json"] = "msgpack",
        throttled: bool = False,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        self._url = url
        self._codec = codec
        self._headers = dict(headers or {})
        self.throttled = throttled

    async def connect(self) -> WebSocketLine:
        try:
            socket = await connect(
                self._url, compression=None, max_size=None, additional_headers=self._headers, open_timeout=30
            )
        except (OSError, WebSocketException) as error:
            raise Unavailable(f"{self._url}: {error or type(error).__name__}") from None
        return WebSocketLine(socket, self._codec)


class WebSocketLine:
    """A line of ``WebSocket``."""

    def __init__(self, socket: ClientConnection, codec: Literal["msgpack", "json"]) -> None:
        self._socket = socket
        self._codec = codec
        self._sent: deque[int] | None = deque()  # not yet answered; None once answers name what they answer

    async def send(self, number: int, message: Message) -> int:
        fields: dict[str, Any] = {"prompt": message.prompt, "seed": message.seed, "request_id": number}
        if message.image is not None:
            fields |= {"image_bytes": message.image} if self._codec == "msgpack" else {"image_url": _uri(message.image)}
        fields.update(message.fields)
        frame = msgpack.packb(fields) if self._codec == "msgpack" else orjson.dumps(fields).decode()
        if self._sent is not None:
            self._sent.append(number)
        try:
            await self._socket.send(frame)
        except ConnectionClosed as closed:
            raise _closed(closed) from None
        return len(frame)

    async def receive(self) -> Answer:
        try:
            frame = await self._socket.recv()
        except ConnectionClosed as closed:
            raise _closed(closed) from None
        answer = _read(frame)
        if "images" not in answer:
            failed = "error" in answer or answer.get("type") == "x-fal-error"
            if not failed:
                return Answer("notice", len(frame))
            number, code = self._number(answer), str(answer.get("error", "error"))
            return Answer("error", len(frame), number, error=code, reason=str(answer.get("reason", "")))
        if answer.get("preview"):
            return Answer("notice", len(frame))
        return Answer("picture", len(frame), self._number(answer), _about(answer), answer.get("timings") or {})

    def _number(self, answer: Mapping[str, Any]) -> int | None:
        if "request_id" in answer:
            self._sent = None
            number = answer["request_id"]
            return number if isinstance(number, int) else None
        return self._sent.popleft() if self._sent else None

    async def close(self) -> None:
        await self._socket.close()


class HttpPost:
    """A POST of JSON for each message; the answer is a picture file, or JSON with ``images`` or ``image``.

    Clients are throttled: each waits for its answer, then sends its newest message.

    Args:
        url: http:// or https://, whole, such as http://127.0.0.1:8000/predict.
        body: makes the JSON of a message; by default ``{"prompt", "seed", "image_url", ...}``, the last as data URI.
        headers: of each request.
    """

    throttled = True

    def __init__(
        self,
        url: str,
        *,
        body: Callable[[Message], Mapping[str, Any]] | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        self._url = url
        self._body = body or _json_body
        self._headers = {"content-type": "application/json", **(headers or {})}
        self._verify = verify(url)

    async def connect(self) -> HttpLine:
        return HttpLine(self._url, self._body, self._headers, self._verify)


class HttpLine:
    """A line of ``HttpPost``: one kept-alive connection."""

    def __init__(
        self,
        url: str,
        body: Callable[[Message], Mapping[str, Any]],
        headers: Mapping[str, str],
        verify: ssl.SSLContext | bool,
    ) -> None:
        self._url = url
        self._body = body
        self._client = httpx2.AsyncClient(headers=dict(headers), verify=verify, timeout=ANSWER_S, trust_env=False)
        self._asked: asyncio.Queue[tuple[int, bytes]] = asyncio.Queue()

    async def send(self, number: int, message: Message) -> int:
        content = orjson.dumps(self._body(message))
        self._asked.put_nowait((number, content))
        return len(content)

    async def receive(self) -> Answer:
        number, content = await self._asked.get()
        try:
            response = await self._client.post(self._url, content=content)
        except httpx2.RequestError as error:
            reason = str(error) or type(error).__name__
            return Answer("error", 0, number, error=type(error).__name__, reason=reason)
        size = len(response.content)
        if response.status_code != 200:
            return Answer("error", size, number, error=f"http_{response.status_code}", reason=response.text[:200])
        kind = response.headers.get("content-type", "")
        if kind.startswith("image/"):
            return Answer("picture", size, number, {"content_type": kind, "bytes": size})
        answer = _read(response.text)
        if "error" in answer:
            return Answer("error", size, number, error=str(answer["error"]), reason=str(answer.get("reason", "")))
        return Answer("picture", size, number, _about(answer), answer.get("timings") or {})

    async def close(self) -> None:
        await self._client.aclose()


def verify(url: str) -> ssl.SSLContext | bool:
    """What an HTTP client needs to know whom it talks to; reading the authorities' certificates takes its time."""
    return ssl.create_default_context() if url.startswith("https:") else False


def _read(frame: bytes | str) -> dict[str, Any]:
    """A map, by the kind of its frame; what is none becomes an error."""
    try:
        data = orjson.loads(frame) if isinstance(frame, str) else msgpack.unpackb(frame)
    except (ValueError, msgpack.UnpackException) as error:
        return {"error": "malformed", "reason": str(error)}
    return data if isinstance(data, dict) else {"error": "malformed", "reason": f"a {type(data).__name__}"}


def _closed(closed: ConnectionClosed) -> Closed:
    return Closed(closed.rcvd.code if closed.rcvd else 1006)


def _uri(image: bytes) -> str:
    return f"data:image/jpeg;base64,{base64.b64encode(image).decode()}"


def _json_body(message: Message) -> dict[str, Any]:
    image = {"image_url": _uri(message.image)} if message.image is not None else {}
    return {"prompt": message.prompt, "seed": message.seed, **image, **message.fields}


def _about(answer: Mapping[str, Any]) -> dict[str, Any]:
    """What an answer of our wire, or one that is like it, says of its picture."""
    images = answer.get("images")
    first = images[0] if isinstance(images, list) and images and isinstance(images[0], dict) else {}
    about = {name: first[name] for name in ("width", "height", "content_type") if name in first}
    about |= {name: answer[name] for name in ("model", "num_inference_steps") if name in answer}
    if (picture := first.get("content") or first.get("url")) is not None:
        about["bytes"] = len(picture)
    return about

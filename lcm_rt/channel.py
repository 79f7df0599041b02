"""Typed maps over a socket pair between the front and an engine process; knows neither of them.

Each message is one msgpack map; msgpack frames itself, so there is no length prefix. A socket pair measured faster than
pyzmq (``benchmarks/ipc.py``) and its end-of-file tells at once that the other process died.
"""

from __future__ import annotations

import asyncio
import contextlib
import queue
import socket
import threading
from collections.abc import Callable, Iterator
from typing import Any

import msgpack

MAX_BUFFER_BYTES = 512 * 2**20
_READ_BYTES = 2**18

Message = dict[str, Any]


def _unpacker() -> msgpack.Unpacker:
    return msgpack.Unpacker(max_buffer_size=MAX_BUFFER_BYTES, use_list=False)


class Channel:
    """The engine's end; ``send`` may be called from any thread and never waits for the socket.

    What waits to be sent is bounded by the requests that the front lets be pending.
    """

    def __init__(self, end: socket.socket) -> None:
        self._end = end
        self._outbox: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self._sender = threading.Thread(target=self._send_all, name="send", daemon=True)
        self._sender.start()

    def send(self, message: Message) -> None:
        self._outbox.put(msgpack.packb(message))

    def _send_all(self) -> None:
        with contextlib.suppress(OSError):  # the front is gone, as whoever receives learns too
            while data := self._outbox.get():
                self._end.sendall(data)

    def close(self) -> None:
        """Wait until everything is sent."""
        self._outbox.put(None)
        self._sender.join()

    def receive(self) -> Iterator[Message]:
        """Messages until the front is gone."""
        unpacker = _unpacker()
        with contextlib.suppress(ConnectionError):  # it was killed before it read all that we sent
            while data := self._end.recv(_READ_BYTES):
                unpacker.feed(data)
                yield from unpacker


class AsyncChannel(asyncio.BufferedProtocol):
    """The front's end.

    Args:
        handle: is called with each message as it comes; what it raises ends the channel.
    """

    def __init__(self, handle: Callable[[Message], None]) -> None:
        self._handle = handle
        self._unpacker = _unpacker()
        self._buffer = memoryview(bytearray(_READ_BYTES))
        self._transport: asyncio.Transport
        self._end: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    @classmethod
    async def open(cls, end: socket.socket, handle: Callable[[Message], None]) -> AsyncChannel:
        end.setblocking(False)
        loop = asyncio.get_running_loop()
        _, channel = await loop.create_unix_connection(lambda: cls(handle), sock=end)
        return channel

    def send(self, message: Message) -> None:
        """Queue a message; requests in flight are bounded by the caller, so the buffer is too."""
        self._transport.write(msgpack.packb(message))

    async def wait_closed(self) -> None:
        """Wait until the engine process is gone. Raises: what ``handle`` raised, or the fault of a broken message."""
        await self._end

    def close(self) -> None:
        self._transport.close()

    # What asyncio calls.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport  # type: ignore[assignment]

    def get_buffer(self, sizehint: int) -> memoryview:
        return self._buffer

    def buffer_updated(self, nbytes: int) -> None:
        self._unpacker.feed(self._buffer[:nbytes])
        for message in self._unpacker:
            self._handle(message)

    def connection_lost(self, exc: Exception | None) -> None:
        if self._end.done():
            return  # nobody waits for it any more
        if exc is None or isinstance(exc, ConnectionError):
            self._end.set_result(None)
        else:
            self._end.set_exception(exc)

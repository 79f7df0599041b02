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
from collections.abc import Iterator
from typing import Any

import msgpack

MAX_BUFFER_BYTES = 512 * 2**20
_READ_BYTES = 2**20

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


class AsyncChannel:
    """The front's end."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer
        self._unpacker = _unpacker()

    @classmethod
    async def open(cls, end: socket.socket) -> AsyncChannel:
        end.setblocking(False)
        return cls(*await asyncio.open_unix_connection(sock=end, limit=_READ_BYTES))

    def send(self, message: Message) -> None:
        """Queue a message; requests in flight are bounded by the caller, so the buffer is too."""
        self._writer.write(msgpack.packb(message))

    async def receive(self) -> list[Message]:
        """The next messages; empty once the engine process is gone."""
        while True:
            try:
                data = await self._reader.read(_READ_BYTES)
            except ConnectionError:
                return []
            if not data:
                return []
            self._unpacker.feed(data)
            if messages := list(self._unpacker):
                return messages

    def close(self) -> None:
        self._writer.close()

"""The boundary between the processes."""

from __future__ import annotations

import asyncio
import socket
import threading

import msgpack
import pytest
from serving import run, until

from lcm_rt.channel import AsyncChannel, Channel, Message


@run
async def test_messages_both_ways_whole_and_in_order() -> None:
    ours, theirs = socket.socketpair()
    heard: list[Message] = []
    engine, front = Channel(theirs), await AsyncChannel.open(ours, heard.append)
    sent = [{"op": "result", "key": n, "image": b"\xff" * 300_000} for n in range(5)]
    sending = threading.Thread(target=lambda: [engine.send(message) for message in sent])
    sending.start()
    await until(lambda: len(heard) == len(sent))
    sending.join()
    assert heard == sent
    front.send({"op": "submit", "image": b"x" * 500_000})
    front.send({"op": "stop"})
    messages = engine.receive()
    first = await asyncio.to_thread(next, messages)
    second = await asyncio.to_thread(next, messages)
    assert (len(first["image"]), second) == (500_000, {"op": "stop"})
    front.close()
    assert await asyncio.to_thread(list, messages) == []
    theirs.close()


def test_a_front_that_was_killed_before_it_read_is_the_end() -> None:
    ours, theirs = socket.socketpair()
    engine = Channel(theirs)
    engine.send({"op": "result"})
    engine.close()  # which waits until it lies in the other end's buffer
    ours.close()
    assert list(engine.receive()) == []
    theirs.close()


@run
async def test_half_a_message_waits_for_its_other_half() -> None:
    ours, theirs = socket.socketpair()
    heard: list[Message] = []
    front = await AsyncChannel.open(ours, heard.append)
    data = msgpack.packb({"op": "device"}) + msgpack.packb({"op": "ready"})
    theirs.sendall(data[:-4])
    await until(lambda: bool(heard))
    assert heard == [{"op": "device"}]
    theirs.sendall(data[-4:])
    await until(lambda: len(heard) == 2)
    assert heard[1] == {"op": "ready"}
    theirs.close()
    await front.wait_closed()


@pytest.mark.parametrize("data", [msgpack.packb({"op": "bad"}), b"\xc1"], ids=["not handled", "no msgpack"])
@run
async def test_a_message_that_cannot_be_handled_ends_the_channel(data: bytes, caplog: pytest.LogCaptureFixture) -> None:
    def handle(message: Message) -> None:
        raise KeyError(message["op"])

    ours, theirs = socket.socketpair()
    front = await AsyncChannel.open(ours, handle)
    theirs.sendall(data)
    with pytest.raises((KeyError, msgpack.UnpackException, ValueError)):
        await front.wait_closed()
    assert await asyncio.to_thread(theirs.recv, 1) == b"", "its process is told"
    theirs.close()

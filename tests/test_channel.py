"""The boundary between the processes."""

from __future__ import annotations

import asyncio
import socket
import threading

import msgpack
from serving import run

from lcm_rt.channel import AsyncChannel, Channel


@run
async def test_messages_both_ways_whole_and_in_order() -> None:
    ours, theirs = socket.socketpair()
    engine, front = Channel(theirs), await AsyncChannel.open(ours)
    sent = [{"op": "result", "key": n, "image": b"\xff" * 300_000} for n in range(5)]
    sending = threading.Thread(target=lambda: [engine.send(message) for message in sent])
    sending.start()
    heard: list[dict[str, object]] = []
    while len(heard) < len(sent):
        heard += await front.receive()
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
    front = await AsyncChannel.open(ours)
    data = msgpack.packb({"op": "ready"})
    theirs.sendall(data[:4])
    waiting = asyncio.create_task(front.receive())
    await asyncio.sleep(0)
    assert not waiting.done()
    theirs.sendall(data[4:])
    assert await waiting == [{"op": "ready"}]
    theirs.close()
    assert await front.receive() == [], "the other end is gone"
    front.close()

"""Which boundary between the front and an engine process: a socket pair or pyzmq?

An asyncio client sends a small request to another process and awaits a 60 kB answer, as a frame of the server does.

    python benchmarks/ipc.py [--count 2000]
"""

from __future__ import annotations

import argparse
import asyncio
import multiprocessing
import os
import platform
import socket
import statistics
import sys
import tempfile
import time

import msgpack

REQUEST = {"op": "submit", "id": 1, "request": {"prompt": "a lake at sunset", "seed": 1, "image": b"\xff" * 8000}}
ANSWER = {"op": "result", "id": 1, "image": b"\xff" * 60_000, "timings": {"total": 0.04}}


def serve_socketpair(end: socket.socket) -> None:
    unpacker = msgpack.Unpacker()
    while data := end.recv(1 << 20):
        unpacker.feed(data)
        for _ in unpacker:
            end.sendall(msgpack.packb(ANSWER))


async def ask_socketpair(count: int) -> list[float]:
    ours, theirs = socket.socketpair()
    process = multiprocessing.get_context("fork").Process(target=serve_socketpair, args=(theirs,), daemon=True)
    process.start()
    theirs.close()
    reader, writer = await asyncio.open_connection(sock=ours, limit=1 << 20)
    unpacker, times = msgpack.Unpacker(), []
    for _ in range(count):
        begun = time.perf_counter()
        writer.write(msgpack.packb(REQUEST))
        answer = None
        while answer is None:
            unpacker.feed(await reader.read(1 << 20))
            answer = next(iter(unpacker), None)
        times.append(time.perf_counter() - begun)
    writer.close()
    process.terminate()  # forked, it holds a copy of our end and would never see it close
    return times


def serve_zmq(url: str) -> None:
    import zmq

    end = zmq.Context().socket(zmq.PAIR)
    end.connect(url)
    while end.recv() != b"":
        end.send(msgpack.packb(ANSWER))


async def ask_zmq(count: int) -> list[float]:
    import zmq.asyncio

    url = f"ipc://{tempfile.mkdtemp()}/engine"
    process = multiprocessing.get_context("spawn").Process(target=serve_zmq, args=(url,), daemon=True)
    end = zmq.asyncio.Context().socket(zmq.PAIR)
    end.bind(url)
    process.start()
    times = []
    for _ in range(count):
        begun = time.perf_counter()
        await end.send(msgpack.packb(REQUEST))
        msgpack.unpackb(await end.recv())
        times.append(time.perf_counter() - begun)
    await end.send(b"")
    process.join()
    return times[1:]  # the first one waited for the process to start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=2000)
    count = parser.parse_args().count
    print(f"python {platform.python_version()}, {os.cpu_count()} cores, {sys.platform}; {count} round trips each")
    for name, ask in (("socketpair", ask_socketpair), ("pyzmq", ask_zmq), ("socketpair", ask_socketpair)):
        times = sorted(asyncio.run(ask(count)))
        p99 = times[int(len(times) * 0.99)]
        print(f"{name:10}  p50 {statistics.median(times) * 1e3:.3f} ms  p99 {p99 * 1e3:.3f} ms")


if __name__ == "__main__":
    main()

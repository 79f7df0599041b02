"""A whole server inside a test's own event loop, with a real engine process that is fake or not."""

from __future__ import annotations

import asyncio
import functools
import inspect
import socket
import sys
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import msgpack
import orjson
from anyio.from_thread import start_blocking_portal
from starlette.applications import Starlette
from websockets.asyncio.client import ClientConnection, connect

from lcm_rt.server.app import create_app
from lcm_rt.server.serve import Server as ServerLoop
from lcm_rt.server.serve import listen, uvicorn_config
from lcm_rt.service import Service
from lcm_rt.settings import Settings

FAKE_ENGINE = (sys.executable, str(Path(__file__).parent / "fake_engine.py"))
REAL_ENGINE = (sys.executable, "-m", "lcm_rt.worker")
SIDE = 64


def model_folder(folder: Path, name: str = "fake") -> str:
    """A model to be named on a command line whose folder only looks like one."""
    folder.mkdir(exist_ok=True)
    (folder / "model_index.json").write_text("{}")
    return f"{name}={folder}"


class Server:
    """A running server: where it is, and its insides to look into."""

    def __init__(self, app: Starlette, uvicorn: ServerLoop, port: int) -> None:
        self.app = app
        self.service: Service = app.state.service
        self._uvicorn = uvicorn
        self.host = f"127.0.0.1:{port}"
        self.http = f"http://{self.host}"

    def connect(self, path: str = "/fal-ai/lcm/realtime", **options: Any) -> connect:
        return connect(f"ws://{self.host}{path}", max_size=None, compression=None, **options)

    def stop(self) -> None:
        """As a signal does; the end of the block waits for it."""
        self._uvicorn.should_exit = True

    async def key(self, owner: str = "alice", *scopes: str) -> str:
        """A new API key."""
        return await self.app.state.auth.create_key(owner, scopes or ("generate",))

    def metric(self, name: str, **labels: str) -> float:
        return self.service.metrics.value(name, **labels)


@asynccontextmanager
async def serving(
    folder: Path, *, command: tuple[str, ...] = FAKE_ENGINE, ready: bool = True, **settings: Any
) -> AsyncIterator[Server]:
    """Serve from ``folder`` until the block ends."""

    def build() -> tuple[Starlette, ServerLoop, socket.socket]:
        # Most tests want a picture made each time.
        chosen = Settings(
            **{"models": [model_folder(folder / "model")], "data_dir": folder / "data", "repeat_mb": 0, **settings}
        )
        app = create_app(chosen)
        app.state.service.workers.command = command
        return app, ServerLoop(uvicorn_config(app)), listen("127.0.0.1", 0)

    app, server, end = await asyncio.to_thread(build)  # it looks at files, which is no business of the loop
    running = asyncio.create_task(server._serve([end]))
    try:
        async with asyncio.timeout(60):
            await until(lambda: server.started or running.done())
            if ready and not running.done():
                await app.state.service.workers.wait_ready()
        yield Server(app, server, end.getsockname()[1])
    finally:
        server.should_exit = True
        await running
        end.close()


@contextmanager
def serving_aside(folder: Path, **settings: Any) -> Iterator[Server]:
    """As ``serving``, in a thread of its own: for one that many tests share."""
    running = serving(folder, **settings)
    with start_blocking_portal() as portal, portal.wrap_async_context_manager(running) as server:
        yield server


async def until(condition: Callable[[], bool]) -> None:
    """Wait for what nobody announces; the test's own time limit ends a wait that is in vain."""
    while not condition():  # noqa: ASYNC110
        await asyncio.sleep(0.001)


def run(test: Callable[..., Coroutine[Any, Any, None]]) -> Callable[..., None]:
    """Run an async test, with a time limit of its own."""

    @functools.wraps(test)
    def wrapper(*args: Any, **kwargs: Any) -> None:
        async def limited() -> None:
            async with asyncio.timeout(110):
                await test(*args, **kwargs)

        asyncio.run(limited())

    wrapper.__signature__ = inspect.signature(test)  # type: ignore[attr-defined]
    return wrapper


async def say(client: ClientConnection, **fields: Any) -> None:
    """Send one message as msgpack."""
    await client.send(msgpack.packb(fields))


async def hear(client: ClientConnection) -> dict[str, Any]:
    """The next frame, decoded by its kind."""
    frame = await client.recv()
    return orjson.loads(frame) if isinstance(frame, str) else msgpack.unpackb(frame)

"""Listen: socket, uvicorn, and what the operator is told on the terminal."""

from __future__ import annotations

import asyncio
import logging
import signal
import socket
import ssl
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path

import uvicorn
from rich.console import Console
from rich.logging import RichHandler
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from starlette.applications import Starlette
from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol

import lcm_rt
from lcm_rt import catalog, wire
from lcm_rt.auth import Auth
from lcm_rt.errors import LcmError
from lcm_rt.server.app import create_app, create_store
from lcm_rt.settings import Settings
from lcm_rt.workers import Workers

DRAIN_S = 5
"""How long a stop waits for answers under way; a client that does not read cannot hold it longer."""

_BACKLOG = 2048
_USER_TIMEOUT_MS = 20_000
_SEND_BUFFER_BYTES = 256 * 2**10
_UNTAKEN = 4
_UNTAKEN_BYTES = 256 * 2**10
"""How many messages may wait for the application, and how large one may be, for its socket to be read meanwhile."""


def listen(host: str, port: int) -> socket.socket:
    """A listening socket whose connections do not outlive their clients.

    uvicorn's keepalive cannot free a client that has stopped reading, TCP_USER_TIMEOUT can; and a small send buffer
    keeps stale pictures out of the kernel. Both are inherited by accepted sockets. Raises: OSError.
    """
    family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
    # NOTE: with the protocol named: asyncio looks at it to set TCP_NODELAY, without which an answer waits for 40 ms.
    end = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    end.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SEND_BUFFER_BYTES)
    if hasattr(socket, "TCP_USER_TIMEOUT"):
        end.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, _USER_TIMEOUT_MS)
    try:
        end.bind((host, port))
        end.listen(_BACKLOG)
    except OSError as error:
        end.close()
        raise OSError(f"cannot listen on {host}:{port}: {error.strerror}") from error
    return end


class Server(uvicorn.Server):
    """uvicorn's server, for which a signal to stop is no failure: the process drains and exits with 0."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        loop = asyncio.get_running_loop()
        signals = (signal.SIGINT, signal.SIGTERM)
        for number in signals:
            loop.add_signal_handler(number, self.handle_exit, number, None)
        yield
        for number in signals:
            loop.remove_signal_handler(number)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Say goodbye to open connections first: uvicorn would close them with a code that looks like a failure."""
        state = self.config.app.state  # type: ignore[union-attr]
        await state.realtime.drain()
        # What is still under way then is told so before uvicorn cuts it off.
        asyncio.get_running_loop().call_later(DRAIN_S - 1, state.ending.set)
        await super().shutdown(sockets)


class _Protocol(WebSocketsSansIOProtocol):
    """uvicorn's, but for two things.

    It leaves a handshake that is malformed (a header over 8 kB, say) without an answer for ever. And it stops reading
    after every message until the application has taken it: two system calls each, and realtime takes them at once.
    """

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self.conn.handshake_exc is not None and not self.handshake_initiated:
            self.transport.abort()

    def send_receive_event_to_app(self) -> None:
        if self.queue.qsize() >= _UNTAKEN or sum(map(len, self.frames)) > _UNTAKEN_BYTES:
            super().send_receive_event_to_app()
        else:
            paused, self.read_paused = self.read_paused, True  # so that it takes reading for stopped already
            super().send_receive_event_to_app()
            self.read_paused = paused


def uvicorn_config(app: Starlette, tls: ssl.SSLContext | None = None) -> uvicorn.Config:
    """How uvicorn serves ``app``."""
    return uvicorn.Config(
        app,
        ssl_context_factory=None if tls is None else lambda *_: tls,
        log_config=None,
        log_level="warning",  # at "info" it would log tokens, which are in the query
        access_log=False,
        server_header=False,
        ws=_Protocol,
        ws_max_size=wire.MAX_MESSAGE_BYTES,
        ws_per_message_deflate=False,  # JPEG does not shrink, and the loop would pay
        ws_ping_interval=20,
        ws_ping_timeout=20,
        timeout_graceful_shutdown=DRAIN_S,
    )


def load_tls(cert: Path | None, key: Path | None) -> ssl.SSLContext | None:
    """What it takes to speak TLS, if a certificate is given. Raises: OSError: the two files cannot be used."""
    if cert is None:
        if key is not None:
            raise OSError(f"{key}: a key without its certificate")
        return None
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    try:
        context.load_cert_chain(cert, key)
    except OSError as error:
        why = f"not a certificate and its key ({error.reason})" if isinstance(error, ssl.SSLError) else error.strerror
        raise OSError(f"{cert if key is None else f'{cert}, {key}'}: {why}") from error
    return context


async def serve(settings: Settings) -> int:
    """Serve until told to stop; the exit status. Raises: OSError, LcmError: it cannot even start."""
    console = Console(stderr=True)
    logging.basicConfig(
        level=logging.INFO, format="%(message)s", handlers=[RichHandler(console=console, show_path=False)]
    )
    tls = load_tls(settings.tls_cert, settings.tls_key)
    app = create_app(settings)
    # Before uvicorn opens the store: what is wrong with it is told in a line, not in a traceback.
    async with create_store(settings) as store:
        keys = sum(key.revoked_at is None for key in await Auth(store, is_open=False).list_keys())
    workers = app.state.service.workers
    end = listen(settings.host, settings.port)
    server = Server(uvicorn_config(app, tls))
    host, port = end.getsockname()[:2]
    shown = "localhost" if host in ("0.0.0.0", "::", "127.0.0.1", "::1") else host
    say = partial(console.print, soft_wrap=True, highlight=False)
    address = f"{'http' if tls is None else 'https'}://{shown}:{port}"
    say(f"[bold]lcm-rt {lcm_rt.__version__}[/]  {address}/  (loading; the page is there already)")
    for model in workers.models.values():
        licences = catalog.licences(model.spec).items()
        if abroad := [f"{repo} ({licence})" for repo, licence in licences if not repo.startswith("/")]:
            say(f"  {model.spec.name}: what is not here yet is downloaded: {', '.join(abroad)}")
    if settings.is_open and not settings.is_loopback:
        say("  [yellow]nobody is asked for a key[/], and other machines reach this address")
    if not settings.is_open:
        say(
            f"  clients need a key; there {'is' if keys == 1 else 'are'} {keys or 'none yet'}: lcm-rt keys create OWNER"
        )
    async with asyncio.TaskGroup() as tasks:
        watching = tasks.create_task(_announce(workers, console, address, server))
        await server.serve(sockets=[end])
        watching.cancel()
    return 1 if workers.failure or not server.started else 0


async def _announce(workers: Workers, console: Console, address: str, server: Server) -> None:
    """Show each model's load stages, then where to go; stop the server if its models can never be loaded."""
    with ExitStack() as stack:
        progress = Progress(
            TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), console=console, transient=True
        )
        bars: dict[str, TaskID] = {name: progress.add_task(name, total=1.0) for name in workers.models}
        if console.is_terminal:
            stack.enter_context(progress)
        said: dict[str, str] = {}
        while not workers.is_ready and not workers.failure:
            await workers.wait_change(workers.changes)
            for name, model in workers.models.items():
                progress.update(bars[name], completed=model.progress, description=f"{name}: {model.stage}")
                if not console.is_terminal and said.get(name) != model.stage:
                    said[name] = model.stage
                    console.print(f"{name}: {model.stage}")
    try:
        await workers.wait_ready()
    except LcmError:
        server.should_exit = True  # why was logged where it happened
        return
    say = partial(console.print, soft_wrap=True, highlight=False)
    loads = ", ".join(f"{name} in {m.load_seconds:.1f} s" for name, m in workers.models.items() if m.load_seconds)
    say(f"[bold green]ready[/] on {workers.device_name}: {loads}")
    say(f"  page       {address}/")
    say(f'  one shot   curl -s {address}/run/fal-ai/lcm -d \'{{"prompt": "sunset over a lake"}}\'')
    sockets = address.replace("http", "ws", 1)
    say(f"  queue      {address}/queue/fal-ai/lcm   (uploads at /rest, tokens at /tokens; all of it: {address}/docs)")
    say(f"  realtime   {sockets}/fal-ai/lcm/realtime   (msgpack or JSON, as the fal clients speak it)")
    say("  clients    docs/clients.md says how to point @fal-ai/client and fal-client here")

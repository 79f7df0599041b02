"""Servers that die at a named point, as suddenly as by ``kill -9``, and tell what they did.

The product knows nothing of it: here its methods are wrapped. Run as a process, this imports the server once and forks
for each life of one, which takes a tenth of the time. It reads lines of JSON, the fields of ``Life``, and answers each
with two: the pid, and once that is over, the status.
"""

from __future__ import annotations

import asyncio
import ctypes
import functools
import json
import logging
import os
import signal
import socket
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from serving import FAKE_ENGINE
from sqlalchemy import Engine, event

from lcm_rt import webhooks
from lcm_rt.egress import Egress
from lcm_rt.jobs import Jobs
from lcm_rt.objects import Objects
from lcm_rt.server.app import create_app
from lcm_rt.server.serve import Server, uvicorn_config
from lcm_rt.service import Service
from lcm_rt.settings import Settings
from lcm_rt.store import Store

LEASE_S = 1.0
"""Of jobs and deliveries: on a shared database, how long a restarted server waits for its own former life."""


@dataclass(frozen=True)
class Life:
    """How a server lives: ``socket`` is the number of a listening one, ``history`` a file that it adds lines to.

    It dies at the passage of ``point`` that ``count`` says.
    """

    settings: dict[str, Any]
    socket: int
    history: str
    log: str
    point: str | None = None
    count: int = 1


class Death:
    """What awaits a server."""

    def __init__(self, count: int) -> None:
        self._left = count

    def pass_by(self, *_: object, **__: object) -> None:
        self._left -= 1
        if self._left == 0:
            os.kill(os.getpid(), signal.SIGKILL)


def around(
    owner: type,
    name: str,
    *,
    before: Callable[..., object] = lambda *args, **kwargs: None,
    after: Callable[..., object] = lambda value: None,
) -> None:
    """Have a method of ``owner`` call ``before`` with its arguments and ``after`` with its value."""
    method = getattr(owner, name)

    @functools.wraps(method)
    async def wrapper(*args: Any, **kwargs: Any) -> Any:
        before(*args, **kwargs)
        value = await method(*args, **kwargs)
        after(value)
        return value

    setattr(owner, name, wrapper)


def _after(owner: type, name: str) -> Callable[[Death], None]:
    return lambda death: around(owner, name, after=death.pass_by)


def _after_claim(death: Death) -> None:
    around(Jobs, "claim", after=lambda job: job and death.pass_by())


def _before_finish(death: Death) -> None:
    around(Jobs, "finish", before=death.pass_by)


def _before_commit(death: Death) -> None:
    event.listen(Engine, "commit", death.pass_by)


def _after_commit(death: Death) -> None:
    transact = Store._transact

    def wrapper(store: Store, works: list[Any]) -> None:
        transact(store, works)
        death.pass_by()

    Store._transact = wrapper  # type: ignore[method-assign]


POINTS: dict[str, Callable[[Death], None]] = {
    "a job is accepted, and its client not told": _after(Jobs, "accept"),
    "a job is claimed, and not run": _after_claim,
    "a job is shown as begun": _after(Jobs, "begin"),
    "a picture is painted, and not stored": _after(Service, "run"),
    "a picture is stored, and its row not": _after(Objects, "put"),
    "an outcome is about to be written": _before_finish,
    "an outcome is written, and nobody told": _after(Jobs, "finish"),
    "a cancellation is written, and its client not told": _after(Jobs, "cancel"),
    "a webhook is received, and that not written": _after(Egress, "post"),
    "what time brings is seen to": _after(Jobs, "sweep"),
    "a transaction is about to be committed": _before_commit,
    "a transaction is committed, and nobody told": _after_commit,
}


def die_with_parent() -> None:
    """Tests that are killed leave nothing behind."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def live(life: Life) -> None:
    """Serve until killed, with the engine in a process group of our own."""
    die_with_parent()
    os.setpgid(0, 0)
    logging.basicConfig(filename=life.log, level=logging.INFO)
    os.dup2(os.open(life.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND), 2)
    history = os.open(life.history, os.O_WRONLY | os.O_APPEND)

    def tell(**event: Any) -> None:
        os.write(history, json.dumps({**event, "at": time.time()}).encode() + b"\n")  # one line is written whole

    def tell_start(service: Service, wanted: Any, **kwargs: Any) -> None:
        tell(event="start", tag=wanted.prompt)

    if life.point:
        POINTS[life.point](Death(life.count))
    around(Service, "run", before=tell_start)
    app = create_app(Settings(**life.settings))
    app.state.service.workers.command = FAKE_ENGINE
    app.state.queue._lease_s = LEASE_S
    server = Server(uvicorn_config(app))
    tell(event="up", point=life.point)
    asyncio.run(server.serve([socket.socket(fileno=os.dup(life.socket))]))


def main() -> None:
    die_with_parent()
    webhooks._LEASE_S = webhooks._LOOK_S = LEASE_S
    for line in sys.stdin:
        life = Life(**json.loads(line))
        if (pid := os.fork()) == 0:
            status = 1
            try:
                live(life)
                status = 0
            finally:
                os._exit(status)
        os.write(1, b"%d\n" % pid)
        os.write(1, b"%d\n" % os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))


if __name__ == "__main__":
    main()

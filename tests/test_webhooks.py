"""Events get to their receivers whatever these do, once they can; and receivers can tell that they are ours."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import hashlib
import itertools
import json
import logging
import random
import ssl
import subprocess
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from datetime import UTC, datetime
from email.utils import format_datetime
from pathlib import Path
from typing import Any

import httpcore2
import httpx2
import pytest
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from hypothesis import given
from hypothesis import strategies as st
from serving import run, until
from sqlalchemy import Connection, select
from standardwebhooks import Webhook, WebhookVerificationError
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.routing import Route

from lcm_rt import webhooks as module
from lcm_rt.auth import Principal
from lcm_rt.egress import Egress
from lcm_rt.errors import DownloadError, Unavailable
from lcm_rt.metrics import Metrics
from lcm_rt.server import jwks as handlers
from lcm_rt.store import Store, deliveries, secrets
from lcm_rt.webhooks import (
    AT_ONCE,
    KEEP_S,
    LEAD_S,
    MAX_RETRY_AFTER_S,
    PAUSES_S,
    PER_HOST,
    PER_OWNER,
    RETIRED_S,
    Signer,
    Webhooks,
    body,
)

DAY = 86400.0
EVENT = body("job", 200, b'{"images":[{"url":"http://x/y.jpg"}]}')


class Clock:
    """Stands still until it is moved."""

    def __init__(self, now: float | None = None) -> None:
        self.now = time.time() if now is None else now

    def __call__(self) -> float:
        return self.now


class Try:
    """One request that a receiver got."""

    def __init__(self, head: str, body: bytes) -> None:
        first, *lines = head.split("\r\n")
        self.method, self.path, _ = first.split()
        self.headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in lines if line)}
        self.body = body

    @property
    def event(self) -> str:
        return self.headers["webhook-id"]


Answer = Callable[[asyncio.StreamWriter], Awaitable[None]]


class Receiver:
    """A web server that takes events; each try gets the next of ``answers``, and the last one stays."""

    def __init__(self, *answers: Answer) -> None:
        self.answers = list(answers)
        self.connections = 0
        self.tries: list[Try] = []
        self.under_way: Counter[str] = Counter()
        self.most = 0
        self.doubled = 0

    async def accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        # Cancelled: the test is over, and nobody has told those who hang.
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError):
            head = (await reader.readuntil(b"\r\n\r\n")).decode()
            length = next(int(line[16:]) for line in head.lower().splitlines() if line.startswith("content-length: "))
            tried = Try(head, await reader.readexactly(length))
            self.tries.append(tried)
            self.doubled += tried.event in +self.under_way
            self.under_way[tried.event] += 1
            self.most = max(self.most, self.under_way.total())
            try:
                await (self.answers.pop(0) if len(self.answers) > 1 else self.answers[0])(writer)
                with contextlib.suppress(ConnectionError):
                    await writer.drain()
            finally:
                self.under_way[tried.event] -= 1
        writer.close()


def say(status: str, *headers: str, body: bytes = b"") -> Answer:
    async def answer(writer: asyncio.StreamWriter) -> None:
        writer.write(
            "\r\n".join([f"HTTP/1.1 {status}", f"Content-Length: {len(body)}", *headers, "", ""]).encode() + body
        )

    return answer


OK = say("200 OK", body=b"thanks")
FAIL = say("500 Oh")


async def hang(writer: asyncio.StreamWriter) -> None:
    await asyncio.sleep(60)


async def drip_head(writer: asyncio.StreamWriter) -> None:
    writer.write(b"HTTP/1.1 200 OK\r\n")
    while True:
        writer.write(b"X: y\r\n")
        await writer.drain()
        await asyncio.sleep(0.01)


async def drip(writer: asyncio.StreamWriter) -> None:
    writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n")
    while True:
        writer.write(b"x")
        await writer.drain()
        await asyncio.sleep(0.01)


async def drop(writer: asyncio.StreamWriter) -> None:
    """All was read, and perhaps done, but the answer is lost."""
    writer.transport.abort()


async def babble(writer: asyncio.StreamWriter) -> None:
    writer.write(b"SSH-2.0-OpenSSH\r\n\r\n")


async def flood(writer: asyncio.StreamWriter) -> None:
    writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 10000000000\r\n\r\n")
    while True:
        writer.write(bytes(2**16))
        await writer.drain()


class World(httpcore2.AnyIOBackend):
    """An internet with a name server: each receiver at a public address of its own."""

    def __init__(self) -> None:
        self.addresses: dict[str, list[str]] = {}
        self.ports: dict[str, int] = {}
        self.dialled: list[str] = []
        self._servers: list[asyncio.Server] = []

    async def add(self, name: str, receiver: Receiver) -> str:
        """Give ``receiver`` a name; returns its URL."""
        server = await asyncio.start_server(receiver.accept, "127.0.0.1", 0)
        self._servers.append(server)
        address = f"93.184.216.{len(self._servers)}"
        self.addresses[name] = [address]
        self.ports[address] = server.sockets[0].getsockname()[1]
        return f"http://{name}/hook"

    async def resolve(self, host: str) -> list[str]:
        return self.addresses[host]

    async def connect_tcp(self, host: str, port: int, *rest: Any, **more: Any) -> httpcore2.AsyncNetworkStream:
        self.dialled.append(host)
        return await super().connect_tcp("127.0.0.1", self.ports[host], *rest, **more)

    def egress(self, **options: Any) -> Egress:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        return Egress(resolve=self.resolve, network=self, ssl_context=context, **options)

    def close(self) -> None:
        for server in self._servers:
            server.close()


@contextlib.asynccontextmanager
async def a_world() -> AsyncIterator[World]:
    world = World()
    try:
        yield world
    finally:
        world.close()


class Sender:
    """A server's webhooks, running, and what a test asks of them."""

    def __init__(self, store: Store, webhooks: Webhooks, metrics: Metrics) -> None:
        self.store = store
        self.webhooks = webhooks
        self.metrics = metrics

    async def finish(self, url: str, *jobs: str, owner: str = "me", event: bytes = EVENT) -> None:
        """What finishing jobs does; all of them in one transaction."""

        def finish(connection: Connection) -> None:
            for job in jobs or ("job",):
                self.webhooks.enqueue(connection, job_id=job, owner=owner, url=url, body=event)

        await self.store.do(finish)
        self.webhooks.wake()

    async def rows(self) -> list[Any]:
        return await self.store.do(
            lambda connection: list(connection.execute(select(deliveries).order_by(deliveries.c.due_at)))
        )

    async def row(self) -> Any:
        (row,) = await self.rows()
        return row

    async def after_try(self, number: int) -> Any:
        """The only row, once its ``number``-th try has ended."""
        row = await self.row()
        while row.tries < number or row.lease_until is not None:
            row = await self.row()
        return row

    async def look(self) -> None:
        """Wake it, and wait until it has looked for what is due and has begun it."""
        self.webhooks.wake()
        for _ in range(5):
            await self.store.do(lambda connection: None)

    def count(self, outcome: str) -> float:
        return self.metrics.value("lcm_rt_webhooks_total", outcome=outcome)


@contextlib.asynccontextmanager
async def sending(
    url: str, world: World, clock: Callable[[], float], *, store: type[Store] = Store, **options: Any
) -> AsyncIterator[Sender]:
    """A server that delivers until the block ends, as it ends when told to."""
    metrics = Metrics()
    async with store(url) as opened:
        webhooks = Webhooks(opened, world.egress(**options), metrics=metrics, clock=clock, rng=random.Random(7))
        await webhooks.start()
        running = asyncio.create_task(webhooks.run())
        try:
            yield Sender(opened, webhooks, metrics)
        finally:
            running.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await running


def verify_platform(headers: Mapping[str, str], body: bytes, keys: dict[str, Any], now: float) -> None:
    """As section 2.6 tells receivers to. Raises: ValueError."""
    words = [headers.get(f"x-fal-webhook-{name}", "") for name in ("request-id", "user-id", "timestamp", "signature")]
    if not all(words):
        raise ValueError("a header is missing or empty")
    *told, signature = words
    if abs(now - int(told[2])) > 300:
        raise ValueError("too old or too new")
    message = "\n".join([*told, hashlib.sha256(body).hexdigest()]).encode()
    for key in keys["keys"]:
        public = base64.urlsafe_b64decode(key["x"] + "=" * (-len(key["x"]) % 4))
        with contextlib.suppress(InvalidSignature):
            Ed25519PublicKey.from_public_bytes(public).verify(bytes.fromhex(signature), message)
            return
    raise ValueError("no key has made this signature")


def verify_asymmetric(headers: Mapping[str, str], body: bytes, keys: dict[str, Any]) -> None:
    """Standard Webhooks' signature of version v1a. Raises: ValueError."""
    (told,) = (sign[4:] for sign in headers["webhook-signature"].split() if sign.startswith("v1a,"))
    message = f"{headers['webhook-id']}.{headers['webhook-timestamp']}.".encode() + body
    for key in keys["keys"]:
        with contextlib.suppress(InvalidSignature):
            public = Ed25519PublicKey.from_public_bytes(base64.urlsafe_b64decode(key["x"] + "="))
            public.verify(base64.b64decode(told), message)
            return
    raise ValueError("no key has made this signature")


def asking(webhooks: Webhooks, owner: str = "me") -> httpx2.AsyncClient:
    """A client of the two routes, known as ``owner``."""

    async def secret(request: Request) -> Any:
        request.state.principal = Principal(owner)
        return await handlers.secret(request)

    app = Starlette(routes=[Route("/.well-known/jwks.json", handlers.jwks), Route("/webhooks/secret", secret)])
    app.state.webhooks = webhooks
    return httpx2.AsyncClient(transport=httpx2.ASGITransport(app), base_url="http://here")


@pytest.mark.points(58)
@run
async def test_an_event_verifies_in_both_manners(database_url: str) -> None:
    clock, receiver = Clock(), Receiver(OK)
    error = b'{"detail":[{"loc":["body","prompt"],"msg":"Field required","type":"missing"}]}'
    async with a_world() as world, sending(database_url, world, clock) as sender:
        url = await world.add("a.example", receiver)
        await sender.finish(url + "?x=1", "job-1", owner="ann@x.org")
        await sender.finish(url + "?x=1", "job-2", owner="ann@x.org", event=body("job-2", 422, error))
        await until(lambda: sender.count("delivered") == 2)
        async with asking(sender.webhooks, "ann@x.org") as client:
            served = await client.get("/.well-known/jwks.json")
            told = await client.get("/webhooks/secret")
    ok, failed = sorted(receiver.tries, key=lambda tried: tried.headers["x-fal-webhook-request-id"])
    assert json.loads(failed.body) == {
        "request_id": "job-2",
        "gateway_request_id": "job-2",
        "status": "ERROR",
        "error": "Invalid status code: 422",
        "payload": json.loads(error),
    }
    assert (ok.method, ok.path, ok.body) == ("POST", "/hook?x=1", EVENT)
    assert ok.headers["content-type"] == "application/json"
    assert ok.headers["user-agent"].startswith("lcm-rt/")
    assert ok.headers["x-fal-webhook-request-id"] == "job-1"
    assert ok.headers["x-fal-webhook-user-id"] == "ann@x.org"

    (key,) = served.json()["keys"]
    assert {name: key[name] for name in ("kty", "crv", "use", "alg")} == {
        **{"kty": "OKP", "crv": "Ed25519", "use": "sig", "alg": "EdDSA"}
    }
    assert set(key) == {"kty", "crv", "use", "alg", "kid", "x"}
    assert int(served.headers["cache-control"].partition("max-age=")[2]) <= DAY
    assert told.headers["cache-control"] == "no-store"
    library = Webhook(told.json()["secret"])
    for tried in (ok, failed):
        verify_platform(tried.headers, tried.body, served.json(), clock.now)
        verify_asymmetric(tried.headers, tried.body, served.json())
        assert library.verify(tried.body, tried.headers) == json.loads(tried.body)
    assert ok.event != failed.event

    # And what is not ours does not: another body, another time, another owner, another event, old, or another's keys.
    forged = ok.body.replace(b"OK", b"KO")
    with pytest.raises(ValueError, match="no key"):
        verify_platform(ok.headers, forged, served.json(), clock.now)
    with pytest.raises(ValueError, match="too old"):
        verify_platform(ok.headers, ok.body, served.json(), clock.now + 301)
    with pytest.raises(ValueError, match="no key"):
        verify_asymmetric(ok.headers, forged, served.json())
    with pytest.raises(WebhookVerificationError):
        library.verify(forged, ok.headers)
    for name in ("request-id", "user-id", "timestamp"):
        headers = {**ok.headers, f"x-fal-webhook-{name}": f"{int(clock.now) + 1}"}
        with pytest.raises(ValueError, match="no key"):
            verify_platform(headers, ok.body, served.json(), clock.now)
    for name, value in (("webhook-id", failed.event), ("webhook-timestamp", f"{int(clock.now) - 1}")):
        with pytest.raises(WebhookVerificationError):
            library.verify(ok.body, {**ok.headers, name: value})
    with pytest.raises(WebhookVerificationError):
        Webhook(sender.webhooks.secret_of("bob")).verify(ok.body, ok.headers)


@pytest.mark.parametrize(
    ("status", "result", "error", "expected"),
    [
        (200, b'{"a":[1,"\xc3\xa9"]}', None, {"status": "OK", "error": None, "payload": {"a": [1, "é"]}}),
        (204, None, None, {"status": "OK", "error": None, "payload": None}),
        (500, b'{"detail":"no"}', "it failed", {"status": "ERROR", "error": "it failed", "payload": {"detail": "no"}}),
        (302, None, None, {"status": "ERROR", "error": "Invalid status code: 302", "payload": None}),
        (
            200,
            b'{"a":NaN}',
            None,
            {"status": "OK", "error": None, "payload": None, "payload_error": "the result is no valid JSON"},
        ),
        (200, b"\xff", None, {"status": "OK", "payload_error": "the result is no valid JSON"}),
    ],
)
def test_what_an_event_says(status: int, result: bytes | None, error: str | None, expected: dict[str, Any]) -> None:
    told = json.loads(body("r", status, result, error))
    ids = {"request_id": "r", "gateway_request_id": "r"}
    assert told | ids | expected == told
    assert ("payload_error" in told) == ("payload_error" in expected)


@pytest.mark.points(58)
@run
async def test_ten_tries_in_two_hours_then_it_is_given_up(database_url: str, caplog: pytest.LogCaptureFixture) -> None:
    clock, receiver = Clock(), Receiver(FAIL)
    begun_at = clock.now
    async with a_world() as world, sending(database_url, world, clock) as sender:
        url = await world.add("a.example", receiver)
        with caplog.at_level(logging.INFO, "lcm_rt.webhooks"):
            await sender.finish(url + "?password=1")
            waits = []
            for number in range(1, 10):
                row = await sender.after_try(number)
                waits.append(row.due_at - clock.now)
                clock.now = row.due_at - 0.01
                await sender.look()
                assert len(receiver.tries) == number
                clock.now = row.due_at
                sender.webhooks.wake()
            row = await sender.after_try(10)
        assert (row.outcome, row.done_at, row.body) == ("given up", clock.now, b"")
        clock.now += 10 * DAY
        await sender.look()
        assert len(receiver.tries) == 10
        assert (sender.count("failed"), sender.count("given up"), sender.count("delivered")) == (9, 1, 0)
        keys = sender.webhooks.jwks()
    assert all(0.8 <= wait / pause <= 1.2 for wait, pause in zip(waits, PAUSES_S, strict=True))
    assert len({wait / pause for wait, pause in zip(waits, PAUSES_S, strict=True)}) == 9
    assert sum(PAUSES_S) == 7200
    assert 0.8 * 7200 < row.done_at - begun_at < 1.2 * 7200
    assert len({tried.event for tried in receiver.tries}) == 1
    assert len({tried.body for tried in receiver.tries}) == 1
    times = [int(tried.headers["webhook-timestamp"]) for tried in receiver.tries]
    assert times == sorted(set(times))  # each is signed when it is sent, or receivers would find it too old
    for tried in receiver.tries:
        verify_platform(tried.headers, tried.body, keys, int(tried.headers["x-fal-webhook-timestamp"]))
    assert "try 10: a.example answered 500" in caplog.text
    assert "password" not in caplog.text


@pytest.mark.points(58)
@pytest.mark.parametrize(
    "answer",
    [
        FAIL,
        say("404 Not Found"),
        say("302 Found", "Location: http://a.example/elsewhere"),
        say("307 Temporary Redirect", "Location: http://a.example/elsewhere"),
        say("304 Not Modified"),
        hang,
        drip_head,
        drip,
        drop,
        babble,
        say("101 Switching Protocols", "Upgrade: x", "Connection: upgrade"),
    ],
)
def test_a_receiver_that_fails_and_recovers_gets_its_event(
    answer: Answer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    @run
    async def walk() -> None:
        clock, receiver = Clock(), Receiver(answer)
        async with a_world() as world, sending(f"sqlite:///{tmp_path}/store.db", world, clock) as sender:
            url = await world.add("a.example", receiver)
            with monkeypatch.context() as patch:
                patch.setattr(module, "TIMEOUT_S", 0.2)
                await sender.finish(url)
                for number in (1, 2):
                    row = await sender.after_try(number)
                    assert row.done_at is None
                    clock.now = row.due_at
                    if number == 1:
                        sender.webhooks.wake()
            receiver.answers = [OK]
            sender.webhooks.wake()
            row = await sender.after_try(3)
        assert (row.outcome, row.body) == ("delivered", b"")
        assert {tried.path for tried in receiver.tries} == {"/hook"}
        assert len({(tried.event, tried.body) for tried in receiver.tries}) == 1

    walk()


@run
async def test_a_try_has_fifteen_seconds(tmp_path: Path) -> None:
    asked: list[dict[str, Any]] = []

    class Watched(Egress):
        async def post(self, *words: Any, **limits: Any) -> tuple[int, dict[str, str]]:
            asked.append(limits)
            return await super().post(*words, **limits)

    receiver, clock = Receiver(OK), Clock()
    async with a_world() as world, sending(f"sqlite:///{tmp_path}/store.db", world, clock) as sender:
        sender.webhooks._egress.__class__ = Watched
        await sender.finish(await world.add("a.example", receiver))
        await until(lambda: sender.count("delivered") == 1)
    assert asked == [{"limit_bytes": 65536, "timeout_s": 15.0}]


@run
async def test_a_flood_is_cut_and_its_status_counts(tmp_path: Path) -> None:
    receiver = Receiver(flood)
    async with a_world() as world, sending(f"sqlite:///{tmp_path}/store.db", world, Clock()) as sender:
        await sender.finish(await world.add("a.example", receiver))
        await until(lambda: sender.count("delivered") == 1)


@run
async def test_whoever_is_gone_is_not_asked_again(database_url: str) -> None:
    clock, receiver = Clock(), Receiver(say("410 Gone", "Retry-After: 5"))
    async with a_world() as world, sending(database_url, world, clock) as sender:
        await sender.finish(await world.add("a.example", receiver))
        row = await sender.after_try(1)
        assert (row.outcome, row.done_at, row.body) == ("gone", clock.now, b"")
        clock.now += DAY
        await sender.look()
    assert len(receiver.tries) == sender.count("gone") == 1


NOW = 1_800_000_000.0

RETRY_AFTER = [
    ("600", 600),
    ("3600", 3600),
    ("86400", MAX_RETRY_AFTER_S),
    (format_datetime(datetime.fromtimestamp(NOW + 600, UTC), usegmt=True), 600),
    (format_datetime(datetime.fromtimestamp(NOW + DAY, UTC), usegmt=True), MAX_RETRY_AFTER_S),
    (format_datetime(datetime.fromtimestamp(NOW - DAY, UTC), usegmt=True), None),
    *[(told, None) for told in ("0", "-5", "1e3", "999999999999", "soon", "")],
]


@run
async def test_a_receiver_may_ask_for_a_pause(tmp_path: Path) -> None:
    cases = list(itertools.product(RETRY_AFTER, ("429 Too Many", "503 Busy")))
    async with a_world() as world, sending(f"sqlite:///{tmp_path}/store.db", world, Clock(NOW)) as sender:
        for number, ((told, _), status) in enumerate(cases):
            receiver = Receiver(say(status, f"Retry-After: {told}"))
            await sender.finish(await world.add(f"{number}.example", receiver), f"{number}")
        await until(lambda: sender.count("failed") == len(cases))
        waits = {row.job: row.due_at - NOW for row in await sender.rows()}
    for number, ((told, expected), _) in enumerate(cases):
        if expected is None:
            assert 0.8 * PAUSES_S[0] <= waits[f"{number}"] <= 1.2 * PAUSES_S[0], told
        else:
            assert waits[f"{number}"] == expected, told


@given(st.text(st.characters(max_codepoint=255)) | st.text("0123456789:, GMTJan-+"))
def test_any_retry_after_is_a_pause(told: str) -> None:
    assert 0 <= module._retry_after({"retry-after": told}, NOW) <= MAX_RETRY_AFTER_S


@run
async def test_a_stop_in_the_middle_of_a_try_loses_nothing(database_url: str) -> None:
    clock, receiver = Clock(), Receiver(hang, OK)
    async with a_world() as world:
        url = await world.add("a.example", receiver)
        async with sending(database_url, world, clock) as sender:
            await sender.finish(url)
            await until(lambda: len(receiver.tries) == 1)
            keys, secret = sender.webhooks.jwks(), sender.webhooks.secret_of("me")
        async with sending(database_url, world, clock) as sender:  # at the same time: nobody waits for a lease to end
            row = await sender.after_try(1)
            assert row.outcome == "delivered"
            assert (sender.webhooks.jwks(), sender.webhooks.secret_of("me")) == (keys, secret)
    first, second = receiver.tries
    assert (first.event, first.body) == (second.event, second.body)
    verify_platform(first.headers, first.body, keys, clock.now)


@run
async def test_events_that_wait_outlive_a_restart(database_url: str) -> None:
    clock, receiver = Clock(), Receiver(FAIL)
    async with a_world() as world:
        url = await world.add("a.example", receiver)
        async with sending(database_url, world, clock) as sender:
            await sender.finish(url, *(f"job-{number}" for number in range(40)))
            await until(lambda: sender.count("failed") == 40)
        failed = Counter(tried.event for tried in receiver.tries)
        receiver.answers = [OK]
        clock.now += 3 * DAY  # however long nobody was there
        async with sending(database_url, world, clock) as sender:
            await until(lambda: sender.count("delivered") == 40)
    assert Counter(tried.event for tried in receiver.tries[40:]) == failed
    assert set(failed.values()) == {1} and len(failed) == 40


@run
async def test_the_event_of_a_server_that_died_is_sent_by_another(
    database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first one is as good as dead: it hangs in its try, on a clock that does not reach it."""
    clock, receiver = Clock(), Receiver(hang, OK)
    async with a_world() as world, sending(database_url, world, clock) as dead:
        url = await world.add("a.example", receiver)
        await dead.finish(url)
        await until(lambda: len(receiver.tries) == 1)
        async with sending(database_url, world, clock) as other:
            await other.look()
            assert len(receiver.tries) == 1  # the lease of the first one holds
            clock.now = (await other.row()).lease_until + 0.01
            await other.look()
            row = await other.after_try(1)
            assert row.outcome == "delivered"
    assert len({tried.event for tried in receiver.tries}) == 1
    # and what the first one says when it comes back, after it was stopped, changes nothing
    async with Store(database_url) as store:
        (after,) = await store.do(lambda connection: list(connection.execute(select(deliveries))))
    assert (after.outcome, after.tries) == ("delivered", 1)


@run
async def test_a_late_failure_does_not_undo_another_servers_try(database_url: str) -> None:
    clock = Clock()
    may_fail = asyncio.Event()

    async def fail_late(writer: asyncio.StreamWriter) -> None:
        await may_fail.wait()
        await FAIL(writer)

    receiver = Receiver(fail_late, FAIL, OK)
    async with a_world() as world, sending(database_url, world, clock) as slow:
        await slow.finish(await world.add("a.example", receiver))
        await until(lambda: len(receiver.tries) == 1)
        clock.now = (await slow.row()).lease_until + 0.01
        async with sending(database_url, world, clock) as other:
            row = await other.after_try(1)
            may_fail.set()
            await until(lambda: slow.count("failed") == 1)
            assert await slow.row() == row
            clock.now = row.due_at
            other.webhooks.wake()
            assert (await other.after_try(2)).outcome == "delivered"


@run
async def test_two_servers_never_send_one_event_at_the_same_time(database_url: str) -> None:
    clock, receivers = Clock(), [Receiver(OK) for _ in range(10)]
    async with a_world() as world:
        urls = [await world.add(f"{n}.example", receiver) for n, receiver in enumerate(receivers)]
        async with sending(database_url, world, clock) as one, sending(database_url, world, clock) as two:
            assert one.webhooks.jwks() == two.webhooks.jwks()
            for number, sender in zip(range(100), itertools.cycle((one, two))):
                await sender.finish(urls[number % 10], f"job-{number}")
                one.webhooks.wake()
                two.webhooks.wake()
            while one.count("delivered") + two.count("delivered") < 100:
                one.webhooks.wake()
                two.webhooks.wake()
                await asyncio.sleep(0.005)
            assert one.count("delivered") and two.count("delivered")
            assert {row.outcome for row in await one.rows()} == {"delivered"}
    events = Counter(tried.event for receiver in receivers for tried in receiver.tries)
    assert (len(events), set(events.values())) == (100, {1})
    assert sum(receiver.doubled for receiver in receivers) == 0


@run
async def test_a_dead_host_delays_nobody_else(database_url: str) -> None:
    dead, alive = Receiver(hang), Receiver(OK)
    async with a_world() as world, sending(database_url, world, Clock()) as sender:
        dead_url, alive_url = await world.add("dead.example", dead), await world.add("alive.example", alive)
        await sender.finish(dead_url, *(f"dead-{n}" for n in range(100)))
        await sender.finish(alive_url, *(f"alive-{n}" for n in range(100)))
        await until(lambda: sender.count("delivered") == 100)
        assert len(dead.tries) == dead.connections == dead.most == PER_HOST
        assert alive.most <= PER_HOST
        assert sender.count("failed") == 0
    assert len({tried.event for tried in alive.tries}) == len(alive.tries) == 100


@run
async def test_an_owner_of_many_dead_hosts_delays_no_other_owner(tmp_path: Path) -> None:
    dead, alive = Receiver(hang), Receiver(OK)
    async with a_world() as world, sending(f"sqlite:///{tmp_path}/store.db", world, Clock()) as sender:
        urls = [await world.add(f"dead{number}.example", dead) for number in range(PER_OWNER)]

        def finish(connection: Connection) -> None:
            for number, url in enumerate(urls * 2):
                sender.webhooks.enqueue(connection, job_id=f"{number}", owner="mallory", url=url, body=EVENT)

        await sender.store.do(finish)
        await sender.look()
        await until(lambda: dead.most >= PER_OWNER)
        await sender.finish(await world.add("alive.example", alive))
        await until(lambda: sender.count("delivered") == 1)
        assert len(dead.tries) == PER_OWNER
        for number in range(AT_ONCE):  # and there is an end to what one server does at a time
            await sender.finish(f"http://dead{number % PER_OWNER}.example/", f"more-{number}", owner=f"owner-{number}")
        await until(lambda: dead.most == AT_ONCE)
        await sender.look()
        assert len(dead.tries) == AT_ONCE


@run
async def test_many_events_arrive_once_each(database_url: str) -> None:
    receivers = [Receiver(OK) for _ in range(5)]
    async with a_world() as world, sending(database_url, world, Clock()) as sender:
        urls = [await world.add(f"{n}.example", receiver) for n, receiver in enumerate(receivers)]
        await asyncio.gather(*(sender.finish(urls[n % 5], f"job-{n}") for n in range(300)))
        await until(lambda: sender.count("delivered") == 300)
        assert not sender.webhooks._in_flight
    got = Counter(tried.headers["x-fal-webhook-request-id"] for receiver in receivers for tried in receiver.tries)
    assert got == {f"job-{n}": 1 for n in range(300)}


@run
async def test_it_sleeps_until_the_next_is_due_and_looks_no_sooner(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "PAUSES_S", (0.05,) * 3)
    looks = 0

    class Counted(Store):
        async def do(self, work: Callable[[Any], Any]) -> Any:
            nonlocal looks
            looks += 1
            return await super().do(work)

    receiver = Receiver(FAIL, FAIL, FAIL, OK)
    async with a_world() as world, sending(f"sqlite:///{tmp_path}/store.db", world, time.time, store=Counted) as sender:
        before = looks
        await sender.finish(await world.add("a.example", receiver))
        await until(lambda: sender.count("delivered") == 1)
        assert len(receiver.tries) == 4
        assert looks - before < 50  # a handful for each try
        await sender.look()
        before = looks
        for _ in range(1000):
            await asyncio.sleep(0)
        assert looks == before


@run
async def test_a_store_that_fails_for_a_while_is_asked_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_LOOK_S", 0.01)
    monkeypatch.setattr(module, "_LEASE_S", 0.01)
    is_down = False

    class Flaky(Store):
        async def do(self, work: Callable[[Any], Any]) -> Any:
            if is_down:
                raise Unavailable("not now")
            return await super().do(work)

    async def take_it_down(writer: asyncio.StreamWriter) -> None:
        nonlocal is_down
        is_down = True
        await OK(writer)

    receiver = Receiver(take_it_down, OK)
    async with a_world() as world, sending(f"sqlite:///{tmp_path}/store.db", world, time.time, store=Flaky) as sender:
        await sender.finish(await world.add("a.example", receiver))
        await until(lambda: len(receiver.tries) == 1 and not sender.webhooks._in_flight)
        is_down = False
        await until(lambda: len(receiver.tries) == 2)
        await sender.after_try(1)
    assert len({tried.event for tried in receiver.tries}) == 1  # delivered twice, as nobody could write it down


@pytest.mark.parametrize(
    "url",
    [
        "http://127.0.0.1/",
        "http://2130706433/",
        "http://0x7f.1/",
        "http://017700000001/",
        "http://localhost/",
        "http://[::1]/",
        "http://[::ffff:169.254.169.254]/",
        "http://[64:ff9b::a9fe:a9fe]/",
        "http://169.254.169.254/latest/",
        "http://10.0.0.1/",
        "http://100.64.0.1/",
        "http://a.example:8080/",
        "http://user:word@a.example/",
        "http://a.example\\@127.0.0.1/",
        "http://①②⑦.0.0.1/",
        "ftp://a.example/",
        "file:///etc/passwd",
        "/hook",
        "",
        "http://a.example/\r\nX: y",
        "http://a.example/" + "a" * 8192,
    ],
)
def test_what_can_be_no_receiver_is_refused_at_once(url: str) -> None:
    with pytest.raises(DownloadError) as caught:
        Webhooks(Store("sqlite://"), World().egress()).check(url)
    assert (caught.value.status, caught.value.field) == (422, "fal_webhook")


@run
async def test_a_name_is_judged_at_each_try(database_url: str) -> None:
    clock, receiver = Clock(), Receiver(FAIL, OK)
    async with a_world() as world, sending(database_url, world, clock) as sender:
        url = await world.add("flips.example", receiver)
        public = world.addresses["flips.example"]
        world.ports |= dict.fromkeys(("127.0.0.1", "169.254.169.254", "10.0.0.1", "::1"), world.ports[public[0]])
        sender.webhooks.check(url)
        await sender.finish(url)
        places = [["127.0.0.1"], ["169.254.169.254"], [*public, "10.0.0.1"], ["::1"], []]
        for number, addresses in enumerate(places, 2):
            row = await sender.after_try(number - 1)
            world.addresses["flips.example"] = addresses
            clock.now = row.due_at
            sender.webhooks.wake()
            assert (await sender.after_try(number)).outcome is None
            assert (world.dialled, receiver.connections) == (public, 1), addresses
        world.addresses["flips.example"] = public
        clock.now = (await sender.row()).due_at
        sender.webhooks.wake()
        await until(lambda: sender.count("delivered") == 1)
    assert world.dialled == public * 2


@run
async def test_an_operator_may_open_the_own_network(tmp_path: Path) -> None:
    receiver = Receiver(OK)
    async with (
        a_world() as world,
        sending(f"sqlite:///{tmp_path}/store.db", world, Clock(), fetch_private=True) as sender,
    ):
        await world.add("inside", receiver)
        world.addresses["inside"] = ["10.0.0.1"]
        world.ports["10.0.0.1"] = world.ports["93.184.216.1"]
        url = "http://inside:8080/hook"
        sender.webhooks.check(url)
        await sender.finish(url)
        await until(lambda: sender.count("delivered") == 1)
        assert (await sender.row()).host == "inside:8080"


@run
async def test_old_rows_and_old_keys_go(database_url: str) -> None:
    clock, receiver = Clock(), Receiver(OK, FAIL)
    async with a_world() as world, sending(database_url, world, clock) as sender:
        url = await world.add("a.example", receiver)
        await sender.finish(url, "done")
        await until(lambda: sender.count("delivered") == 1)
        await sender.finish(url, "waits")
        await until(lambda: sender.count("failed") == 1)
        await Signer(sender.store, clock=clock).rotate("signing")
        await Signer(sender.store, clock=clock).rotate("webhook")
        clock.now += KEEP_S - 1
        await sender.webhooks.sweep()
        assert len(await sender.rows()) == 2
        clock.now += 2
        await sender.webhooks.sweep()
        assert [row.job for row in await sender.rows()] == ["waits"]
        clock.now += LEAD_S + RETIRED_S
        await sender.webhooks.sweep()
        left = await sender.store.do(lambda connection: list(connection.scalars(select(secrets.c.kind))))
        assert sorted(left) == ["signing", "webhook"]


def sign(signer: Signer, owner: str = "me") -> dict[str, str]:
    return signer.headers(event="msg_1", request_id="job", owner=owner, body=EVENT)


@run
async def test_a_rotation_breaks_no_verification(database_url: str) -> None:
    """Two servers, of which one is told to rotate; receivers that keep keys for a day, and look at all hours."""
    rng, clock = random.Random(3), Clock(NOW)
    async with Store(database_url) as one, Store(database_url) as two:
        signers = [Signer(store, clock=clock) for store in (one, two)]
        caches: list[tuple[float, dict[str, Any]]] = [(-DAY, {})] * 4
        kids = set()
        verified = 0
        for hour in range(0, 24 * 14, 2):
            clock.now = NOW + hour * 3600 + rng.uniform(0, 60)
            if hour in (24, 24 * 5, 24 * 5 + 6, 24 * 9):  # twice in a row, too
                await signers[0].rotate("signing")
            for signer in signers:
                await signer.load()
            for number, (read_at, _) in enumerate(caches):
                if clock.now - read_at >= DAY - number * 300:
                    caches[number] = (clock.now, signers[number % 2].jwks())
                    kids |= {key["kid"] for key in caches[number][1]["keys"]}
                for signer in signers:
                    headers = sign(signer)
                    verify_platform(headers, EVENT, caches[number][1], clock.now)
                    verify_asymmetric(headers, EVENT, caches[number][1])
                    verified += 1
        assert (len(kids), verified) == (5, 12 * 14 * 4 * 2)
        first = signers[0].jwks()["keys"]
        assert len(first) == 1  # the others are long over

        await signers[0].rotate("signing", at_once=True)  # someone has the key
        (only,) = signers[0].jwks()["keys"]
        assert only != first[0]
        verify_platform(sign(signers[0]), EVENT, signers[0].jwks(), clock.now)
        with pytest.raises(ValueError, match="no key"):
            verify_platform(sign(signers[1]), EVENT, signers[0].jwks(), clock.now)
        await signers[1].load()
        assert signers[1].jwks() == signers[0].jwks()


def verify_library(secret: str, headers: dict[str, str], monkeypatch: pytest.MonkeyPatch, now: float) -> bool:
    class Then(datetime):
        @classmethod
        def now(cls, tz: Any = None) -> datetime:  # type: ignore[override]
            return datetime.fromtimestamp(now, tz)

    monkeypatch.setattr("standardwebhooks.webhooks.datetime", Then)
    try:
        Webhook(secret).verify(EVENT, headers)
    except WebhookVerificationError:
        return False
    return True


@run
async def test_secrets_rotate_with_two_days_of_grace(database_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(NOW)
    async with Store(database_url) as store:
        signer = Signer(store, clock=clock)
        await signer.load()
        old, others = signer.secret_of("me"), signer.secret_of("other")
        assert old != others and old == signer.secret_of("me")
        assert len(base64.b64decode(old.removeprefix("whsec_"))) == 32
        clock.now += 1
        await signer.rotate("webhook")
        new = signer.secret_of("me")
        assert new != old

        def verifies(secret: str) -> bool:
            return verify_library(secret, sign(signer), monkeypatch, clock.now)

        assert verifies(old) and verifies(new) and not verifies(others)
        clock.now += RETIRED_S - 1
        assert verifies(old) and verifies(new)
        clock.now += 2
        assert not verifies(old) and verifies(new)
        await signer.rotate("webhook", at_once=True)
        assert not verifies(new) and verifies(signer.secret_of("me"))


@run
async def test_servers_that_start_together_have_the_same_keys(database_url: str) -> None:
    async with contextlib.AsyncExitStack() as stack:
        stores = [await stack.enter_async_context(Store(database_url)) for _ in range(6)]
        signers = [Signer(store) for store in stores]
        await asyncio.gather(*(signer.load() for signer in signers))
        assert len({signer.secret_of("me") for signer in signers}) == 1
        assert len({json.dumps(signer.jwks()) for signer in signers}) == 1
        assert len(signers[0].jwks()["keys"]) == 1


def lcm_rt(*words: str, data_dir: Path) -> str:
    command = [sys.executable, "-m", "lcm_rt", "webhooks", *words, "--data-dir", str(data_dir)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout


@run
async def test_the_command_line_rotates_under_a_running_server(tmp_path: Path) -> None:
    async with a_world() as world, sending(f"sqlite:///{tmp_path}/lcm-rt.db", world, time.time) as sender:
        webhooks = sender.webhooks
        (old,) = webhooks.jwks()["keys"]
        secret = webhooks.secret_of("me")
        assert await asyncio.to_thread(lcm_rt, "secret", "me", data_dir=tmp_path) == f"{secret}\n"
        assert "25 h" in await asyncio.to_thread(lcm_rt, "rotate", data_dir=tmp_path)
        await webhooks.sweep()
        assert [key["kid"] for key in webhooks.jwks()["keys"]][0] == old["kid"]
        assert len(webhooks.jwks()["keys"]) == 2
        assert "forgotten" in await asyncio.to_thread(lcm_rt, "rotate", "--secrets", "--leaked", data_dir=tmp_path)
        await webhooks.sweep()
        assert webhooks.secret_of("me") != secret
        assert len(webhooks.jwks()["keys"]) == 2

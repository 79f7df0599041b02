"""Tell receivers what became of their jobs: events are rows, and each is posted until its receiver takes it.

*At least once.* An event is written in the transaction that finishes its job, so neither is without the other, and it
has one id in all its tries. A try holds a lease on its row, so that servers that share a database do not send the same
event at the same time; a server that dies leaves a row whose lease ends.

Every try is signed anew, in two manners: the platform's (Ed25519, keys published as a JWKS) and that of Standard
Webhooks (HMAC with a secret per owner, and the same Ed25519 key).
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import hmac
import logging
import random
import re
import time
from base64 import b64encode, urlsafe_b64encode
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from secrets import token_bytes, token_hex
from typing import Any, Literal

import orjson
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from sqlalchemy import ColumnElement, Connection, and_, delete, func, insert, or_, select, update
from sqlalchemy.exc import IntegrityError

from lcm_rt.egress import Egress
from lcm_rt.errors import DownloadError, LcmError
from lcm_rt.metrics import Metrics
from lcm_rt.store import Store, deliveries, secrets

logger = logging.getLogger(__name__)

FIELD = "fal_webhook"
"""What errors about a receiver's URL name."""

TIMEOUT_S = 15.0
PAUSES_S = (5, 15, 60, 180, 420, 840, 1200, 1800, 2680)
"""From one try to the next: ten tries in two hours. Each is up to a fifth longer or shorter, by lot."""
MAX_RETRY_AFTER_S = 3600.0
MAX_ANSWER_BYTES = 64 * 2**10
PER_HOST, PER_OWNER, AT_ONCE = 4, 32, 64
"""Tries under way in one server: a host that hangs holds up no other one, nor an owner of many such hosts another."""

KEEP_S = 3 * 86400.0
"""How long the row of an event remains that is done."""
LEAD_S = 25 * 3600.0
"""How long a signing key is published before it signs: receivers may keep the JWKS for a day."""
RETIRED_S = 48 * 3600.0
"""How long a key that was followed by another one is still good."""

_JITTER = 0.2
_LEASE_S = 60.0  # longer than any try
_LOOK_S = 10.0  # for what other servers left behind
_HOUSE_S = 60.0

Kind = Literal["signing", "webhook"]


def body(request_id: str, status: int, result: bytes | None, error: str | None = None) -> bytes:
    """The event that tells that a job is done.

    Args:
        status: HTTP status of the job's result. result: its JSON body.
        error: in words, where ``status`` is none of the 2xx; by default just that.
    """
    is_ok = 200 <= status < 300
    event: dict[str, Any] = {
        "request_id": request_id,
        "gateway_request_id": request_id,
        "status": "OK" if is_ok else "ERROR",
        "error": None if is_ok else error or f"Invalid status code: {status}",
        "payload": None,
    }
    try:
        if result is not None:
            orjson.loads(result)
            event["payload"] = orjson.Fragment(result)
    except orjson.JSONDecodeError:
        event["payload_error"] = "the result is no valid JSON"
    return orjson.dumps(event)


@dataclass(frozen=True, slots=True)
class _Key:
    id: str
    value: bytes
    created_at: float
    retired_at: float | None


class Signer:
    """The keys by which receivers know that an event is ours. They are rows, shared by all servers of a database.

    To be loaded before use, and again now and then: another process may have rotated them.
    """

    def __init__(self, store: Store, *, clock: Callable[[], float] = time.time) -> None:
        self._store = store
        self._clock = clock
        self._keys: dict[str, list[_Key]] = {}

    async def load(self) -> None:
        """Read the keys; the first to come makes them. Raises: Unavailable."""
        self._keys = await self._store.do(lambda connection: _load_keys(connection, self._clock()))

    async def rotate(self, kind: Kind, *, at_once: bool = False) -> None:
        """Make a new key; no receiver that heeds the times above sees a signature that it cannot verify.

        A new "signing" key is published now and signs after ``LEAD_S``. A new "webhook" key gives every owner another
        secret now, and the earlier secrets sign too for ``RETIRED_S``.

        Args:
            at_once: forget all earlier keys now, because someone else has them.

        Raises: Unavailable.
        """
        now = self._clock()

        def write(connection: Connection) -> None:
            _load_keys(connection, now)
            ours = secrets.c.kind == kind
            if at_once:
                connection.execute(delete(secrets).where(ours))
            else:
                retires_at = now + (LEAD_S if kind == "signing" else 0.0)
                connection.execute(
                    update(secrets).where(ours, secrets.c.retired_at.is_(None)).values(retired_at=retires_at)
                )
            _write_key(connection, kind, token_hex(8), now)

        await self._store.do(write)
        await self.load()

    def _good(self, kind: Kind) -> list[_Key]:
        """The keys of a kind that receivers may still see, oldest first."""
        now = self._clock()
        return [key for key in self._keys[kind] if key.retired_at is None or now < key.retired_at + RETIRED_S]

    def _signing_key(self) -> Ed25519PrivateKey:
        known = [key for key in self._good("signing") if key.created_at + LEAD_S <= self._clock()]
        newest = known[-1] if known else self._good("signing")[0]
        return Ed25519PrivateKey.from_private_bytes(newest.value)

    def jwks(self) -> dict[str, Any]:
        """The public keys, as RFC 7517 and RFC 8037 have them."""
        keys = [
            {
                "kty": "OKP",
                "crv": "Ed25519",
                "use": "sig",
                "alg": "EdDSA",
                "kid": key.id,
                "x": urlsafe_b64encode(_public_bytes(key)).rstrip(b"=").decode(),
            }
            for key in self._good("signing")
        ]
        return {"keys": keys}

    def secret_of(self, owner: str) -> str:
        """The secret with which ``owner`` verifies our events, as Standard Webhooks spells it."""
        return "whsec_" + b64encode(_derive(self._good("webhook")[-1], owner)).decode()

    def headers(self, *, event: str, request_id: str, owner: str, body: bytes) -> dict[str, str]:
        """The headers that tell whose event ``body`` is, signed now."""
        at = str(int(self._clock()))
        signing = self._signing_key()
        platform = "\n".join((request_id, owner, at, hashlib.sha256(body).hexdigest()))
        standard = f"{event}.{at}.".encode() + body
        signatures = [
            f"v1,{b64encode(hmac.digest(_derive(key, owner), standard, 'sha256')).decode()}"
            for key in reversed(self._good("webhook"))
        ]
        signatures.append(f"v1a,{b64encode(signing.sign(standard)).decode()}")
        return {
            "x-fal-webhook-request-id": request_id,
            "x-fal-webhook-user-id": owner,
            "x-fal-webhook-timestamp": at,
            "x-fal-webhook-signature": signing.sign(platform.encode()).hex(),
            "webhook-id": event,
            "webhook-timestamp": at,
            "webhook-signature": " ".join(signatures),
        }


def _derive(key: _Key, owner: str) -> bytes:
    """An owner's own secret: who has it learns nothing of another's."""
    return hmac.digest(key.value, b"webhook\x00" + owner.encode(), "sha256")


def _public_bytes(key: _Key) -> bytes:
    return Ed25519PrivateKey.from_private_bytes(key.value).public_key().public_bytes_raw()


def _write_key(connection: Connection, kind: Kind, id: str, now: float) -> None:
    connection.execute(insert(secrets).values(kind=kind, id=id, value=token_bytes(32), created_at=now))


def _load_keys(connection: Connection, now: float) -> dict[str, list[_Key]]:
    rows = (
        select(secrets).where(secrets.c.kind.in_(("signing", "webhook"))).order_by(secrets.c.created_at, secrets.c.id)
    )
    found = connection.execute(rows).all()
    if not found:
        # Of servers that start together, the one whose row with this id comes first makes the other key as well.
        try:
            with connection.begin_nested():
                _write_key(connection, "webhook", "first", now)
        except IntegrityError:
            pass
        else:
            _write_key(connection, "signing", token_hex(8), now)
        found = connection.execute(rows).all()
    keys: dict[str, list[_Key]] = {"signing": [], "webhook": []}
    for row in found:
        keys[row.kind].append(_Key(row.id, row.value, row.created_at, row.retired_at))
    return keys


@dataclass(frozen=True, slots=True)
class _Delivery:
    """An event that is to be tried now; ``tries`` have failed before."""

    id: str
    job: str
    owner: str
    url: str
    host: str
    body: bytes
    tries: int


class Webhooks:
    """The events of a store, and the one who posts them.

    Args:
        egress: how receivers are reached; it judges every try.
        clock: seconds since the epoch. rng: where the pauses' jitter comes from.
    """

    def __init__(
        self,
        store: Store,
        egress: Egress,
        *,
        metrics: Metrics | None = None,
        clock: Callable[[], float] = time.time,
        rng: random.Random | None = None,
    ) -> None:
        self._store = store
        self._egress = egress
        self._metrics = metrics or Metrics()
        self._clock = clock
        self._rng = rng or random.Random()
        self._signer = Signer(store, clock=clock)
        self._in_flight: dict[str, _Delivery] = {}
        self._woken = asyncio.Event()

    async def start(self) -> None:
        """Load the keys. Raises: Unavailable."""
        await self._signer.load()

    def jwks(self) -> dict[str, Any]:
        """The public keys of the platform's signatures, to be served."""
        return self._signer.jwks()

    def secret_of(self, owner: str) -> str:
        """``whsec_...``: with it ``owner`` verifies the signatures of Standard Webhooks."""
        return self._signer.secret_of(owner)

    def check(self, url: str) -> None:
        """Whether ``url`` may be a receiver's, as far as its words tell. Raises: DownloadError."""
        self._egress.check(FIELD, url)

    def enqueue(self, connection: Connection, *, job_id: str, owner: str, url: str, body: bytes) -> None:
        """Write an event, due now, into the transaction of ``connection``; ``wake`` is to be called once it is done."""
        now = self._clock()
        connection.execute(
            insert(deliveries).values(
                id=f"msg_{token_hex(16)}",
                job=job_id,
                owner=owner,
                url=url,
                host=re.split("[/?]", url.partition("://")[2], maxsplit=1)[0].lower(),
                body=body,
                tries=0,
                created_at=now,
                due_at=now,
            )
        )

    def wake(self) -> None:
        """Something may be due now: look."""
        self._woken.set()

    async def run(self) -> None:
        """Post what is due until cancelled, and remove what is old."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._keep_house())
            while True:
                self._woken.clear()
                pause = await self._begin_due(tasks)
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(pause):
                        await self._woken.wait()

    async def sweep(self) -> None:
        """Remove old rows, and see keys that another process made. Raises: Unavailable."""
        now = self._clock()

        def remove(connection: Connection) -> None:
            connection.execute(delete(deliveries).where(deliveries.c.done_at < now - KEEP_S))
            connection.execute(
                delete(secrets).where(
                    secrets.c.kind.in_(("signing", "webhook")), secrets.c.retired_at < now - RETIRED_S
                )
            )

        await self._store.do(remove)
        await self._signer.load()

    async def _keep_house(self) -> None:
        while True:
            with contextlib.suppress(LcmError):  # the store has logged it
                await self.sweep()
            await asyncio.sleep(_HOUSE_S)

    async def _begin_due(self, tasks: asyncio.TaskGroup) -> float:
        """Start all tries that are due and have room; returns for how many seconds there is nothing else to do."""
        now = self._clock()
        in_flight = list(self._in_flight.values())
        try:
            claimed, next_at = await self._store.do(lambda connection: _claim(connection, in_flight, now))
        except LcmError:  # the store has logged it
            return _LOOK_S
        for delivery in claimed:
            self._in_flight[delivery.id] = delivery
            tasks.create_task(self._try(delivery))
        return _LOOK_S if next_at is None else min(_LOOK_S, max(0.0, next_at - self._clock()))

    async def _try(self, delivery: _Delivery) -> None:
        """One try, from its signature to what became of it."""
        try:
            status, answered, said = await self._send(delivery)
            outcome, write = self._outcome(delivery, status, answered)
            await self._store.do(write)
            self._tell(delivery, outcome, said)
        except asyncio.CancelledError:
            self._store.post(lambda connection: _release(connection, delivery))
            raise
        except LcmError:
            pass  # the store has logged it; when the lease ends, the event is sent again
        finally:
            del self._in_flight[delivery.id]
            self.wake()

    async def _send(self, delivery: _Delivery) -> tuple[int | None, dict[str, str], str]:
        """Status and headers of the answer, and what happened in words; no status where there was no whole answer."""
        try:
            headers = await asyncio.to_thread(
                self._signer.headers,
                event=delivery.id,
                request_id=delivery.job,
                owner=delivery.owner,
                body=delivery.body,
            )
            status, answered = await self._egress.post(
                FIELD,
                delivery.url,
                delivery.body,
                {"content-type": "application/json", **headers},
                limit_bytes=MAX_ANSWER_BYTES,
                timeout_s=TIMEOUT_S,
            )
        except DownloadError as error:
            return None, {}, error.message
        except Exception:  # one event must not keep the others from going out
            logger.exception("a webhook could not be sent")
            return None, {}, "could not be sent"
        return status, answered, f"answered {status}"

    def _outcome(
        self, delivery: _Delivery, status: int | None, answered: dict[str, str]
    ) -> tuple[str, Callable[[Connection], None]]:
        """What a try came to, and how to write that."""
        now = self._clock()
        if status is not None and 200 <= status < 300:
            outcome = "delivered"
        elif status == 410:
            outcome = "gone"
        else:
            outcome = "failed" if delivery.tries < len(PAUSES_S) else "given up"
        values: dict[str, Any] = {"done_at": now, "outcome": outcome, "body": b""}
        if outcome == "failed":
            pause = PAUSES_S[delivery.tries] * self._rng.uniform(1 - _JITTER, 1 + _JITTER)
            values = {"due_at": now + max(pause, _retry_after(answered, now))}
        mine = _is(delivery) if outcome != "delivered" else _is_open(delivery.id)
        done = update(deliveries).where(mine).values(tries=deliveries.c.tries + 1, lease_until=None, **values)

        def write(connection: Connection) -> None:
            connection.execute(done)

        return outcome, write

    def _tell(self, delivery: _Delivery, outcome: str, said: str) -> None:
        self._metrics.webhooks.labels(outcome).inc()
        if outcome != "delivered":
            # Not the whole URL: it may hold its receiver's password.
            level = logging.INFO if outcome == "failed" else logging.WARNING
            logger.log(level, "webhook of job %s, try %d: %s %s", delivery.job, delivery.tries + 1, delivery.host, said)


def _is_open(id: str) -> ColumnElement[bool]:
    return and_(deliveries.c.id == id, deliveries.c.done_at.is_(None))


def _is(delivery: _Delivery) -> ColumnElement[bool]:
    """The row, unless another server has tried it since: a lease may end early where a machine is very slow."""
    return and_(_is_open(delivery.id), deliveries.c.tries == delivery.tries)


def _release(connection: Connection, delivery: _Delivery) -> None:
    connection.execute(update(deliveries).where(_is(delivery)).values(lease_until=None))


def _claim(connection: Connection, in_flight: Sequence[_Delivery], now: float) -> tuple[list[_Delivery], float | None]:
    """Lease what is due, the longest due first, as far as there is room; and when the next is due after ``now``."""
    row = deliveries.c
    is_free = and_(row.due_at <= now, or_(row.lease_until.is_(None), row.lease_until <= now))
    hosts = Counter(delivery.host for delivery in in_flight)
    owners = Counter(delivery.owner for delivery in in_flight)
    taken = [delivery.id for delivery in in_flight]
    while room := AT_ONCE - len(taken):
        has_room = and_(
            row.id.not_in(taken),
            row.host.not_in([host for host, count in hosts.items() if count >= PER_HOST]),
            row.owner.not_in([owner for owner, count in owners.items() if count >= PER_OWNER]),
        )
        waiting = select(row.id, row.host, row.owner).where(row.done_at.is_(None), is_free, has_room)
        found = connection.execute(
            waiting.order_by(row.due_at).limit(room).with_for_update(skip_locked=True)  # another server takes those
        ).all()
        if not found:
            break
        for id, host, owner in found:
            if hosts[host] < PER_HOST and owners[owner] < PER_OWNER:
                hosts[host] += 1
                owners[owner] += 1
                taken.append(id)
    claimed = row.id.in_(taken[len(in_flight) :])
    connection.execute(update(deliveries).where(claimed).values(lease_until=now + _LEASE_S))
    columns = (row.id, row.job, row.owner, row.url, row.host, row.body, row.tries)
    begun = connection.execute(select(*columns).where(claimed).order_by(row.due_at)).all()
    next_at = connection.scalar(select(func.min(row.due_at)).where(row.done_at.is_(None), row.due_at > now))
    return [_Delivery(*columns) for columns in begun], next_at


def _retry_after(answered: dict[str, str], now: float) -> float:
    """The seconds for which a receiver asked to be left alone, as far as that is heeded."""
    told = answered.get("retry-after", "")
    try:
        wait = float(told) if re.fullmatch("[0-9]{1,9}", told) else parsedate_to_datetime(told).timestamp() - now
    except (ValueError, OverflowError):
        return 0.0
    return min(max(wait, 0.0), MAX_RETRY_AFTER_S)

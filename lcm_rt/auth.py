"""Who may do what: API keys, and short-lived tokens bound to an application.

A key is ``ID:SECRET``. The secret is 256 random bits, so the store holds its SHA-256: the slow hashes are for
passwords, which can be guessed, and this cannot. Its row is read for every request, so a key that another process makes
or revokes counts from the next one on.

A token is a JWT that this server signs (HS256): whose it is, what kind, for which apps, until when, and by which key it
was asked for. It may be used more than once, because the platform's older clients keep theirs; a connection that it
opened goes on after its end.

In *open mode* (a server that only its own machine reaches, unless told otherwise) nothing is asked for: whoever shows
nothing, or nothing that is valid, is ``local`` and may do everything. A valid key or token stands for its owner, with
its own limits, there too.
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import ipaddress
import math
import re
import secrets
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal

import jwt
from sqlalchemy import Connection, insert, select, update
from sqlalchemy.exc import IntegrityError

from lcm_rt.apps import parse_app
from lcm_rt.errors import InputError, Overloaded, Unauthorized
from lcm_rt.store import Store, keys
from lcm_rt.store import secrets as secret_rows

SCOPES = frozenset({"generate", "admin"})
"""``generate``: pictures, queue, realtime, uploads and tokens; ``admin``: load and unload models, metrics."""

LOCAL = "local"
"""Owner of everything in open mode."""

LONGEST_TOKEN_S = 86400.0
"""A token that is asked for longer ends after this."""

MAX_TRIES = 10
"""Wrong keys from one address in a minute; more are told to wait."""

Kind = Literal["realtime", "cdn"]

_ISSUER = "lcm-rt"
_GRACE_S = 86400.0  # for an expired token where that is asked for
_SKEW_S = 30.0  # between the clocks of servers that share a store
_MAX_TOKEN = 4096  # characters; a request line has room for it everywhere
_HEADER = re.compile(r"(?i:key|bearer) +([0-9a-f]{16}):([!-~]{1,256}) *", re.ASCII)
_KEY_ID = re.compile(r"[0-9a-f]{16}")
_OWNER = re.compile(r"[A-Za-z0-9][A-Za-z0-9._@-]{0,63}")


@dataclass(frozen=True, slots=True)
class Principal:
    """Whoever a request comes from. Jobs and files belong to ``owner``; ``apps`` limits a token, None is every one."""

    owner: str = LOCAL
    scopes: frozenset[str] = SCOPES
    apps: frozenset[str] | None = None
    key: str | None = None

    def may_use(self, app: str) -> bool:
        """Whether ``app``, an application id or an alias alone, is one of its own."""
        return self.apps is None or parse_app(app).alias in self.apps


@dataclass(frozen=True, slots=True)
class Key:
    """What is known of an API key; times are seconds since the epoch."""

    id: str
    owner: str
    scopes: frozenset[str]
    created_at: float
    expires_at: float | None
    revoked_at: float | None


class Auth:
    """Keys and tokens of the servers that share ``store``; ``start`` it before its tokens are used.

    Args:
        is_open: nobody needs a key.
        clock: seconds since the epoch.
    """

    def __init__(self, store: Store, *, is_open: bool, clock: Callable[[], float] = time.time) -> None:
        self.is_open = is_open
        self._store = store
        self._clock = clock
        self._tries = _Tries(clock)
        self._secret: bytes | None = None

    async def start(self) -> None:
        """Read the secret that signs tokens; the first server of a store makes it. Raises: Unavailable."""
        now = self._clock()

        def work(connection: Connection) -> bytes:
            found = select(secret_rows.c.value).where(secret_rows.c.kind == "token", secret_rows.c.id == "hs256")
            if (value := connection.scalar(found)) is None:
                row = {"kind": "token", "id": "hs256", "value": secrets.token_bytes(32), "created_at": now}
                with contextlib.suppress(IntegrityError), connection.begin_nested():  # another server was faster
                    connection.execute(insert(secret_rows).values(row))
                value = connection.execute(found).scalar_one()
            return bytes(value)

        self._secret = await self._store.do(work)

    async def create_key(
        self, owner: str, scopes: Iterable[str] = ("generate",), *, lifetime_s: float | None = None
    ) -> str:
        """A new key, as ``ID:SECRET``: the secret cannot be had again.

        Raises: InputError: names ``owner``, ``scope`` or ``expires``; Unavailable.
        """
        chosen = frozenset(scopes)
        if not _OWNER.fullmatch(owner):
            raise InputError("owner", "must be 1 to 64 letters, digits, dots, dashes, underlines and at-signs")
        if not chosen or chosen - SCOPES:
            raise InputError("scope", f"must be some of {', '.join(sorted(SCOPES))}")
        if lifetime_s is not None and not 0 < lifetime_s < math.inf:
            raise InputError("expires", "must be a positive number of seconds")
        id, secret = secrets.token_hex(8), secrets.token_urlsafe(32)
        now = self._clock()
        row = {
            "id": id,
            "hash": _hash(secret),
            "owner": owner,
            "scopes": sorted(chosen),
            "created_at": now,
            "expires_at": None if lifetime_s is None else now + lifetime_s,
        }
        await self._store.do(lambda connection: connection.execute(insert(keys).values(row)))
        return f"{id}:{secret}"

    async def list_keys(self) -> list[Key]:
        """Every key that ever was, oldest first. Raises: Unavailable."""
        found = await self._store.do(
            lambda connection: connection.execute(select(keys).order_by(keys.c.created_at)).all()
        )
        return [
            Key(row.id, row.owner, frozenset(row.scopes), row.created_at, row.expires_at, row.revoked_at)
            for row in found
        ]

    async def revoke_key(self, id: str) -> bool:
        """End a key, and all tokens that were made with it; False where there is none. Raises: Unavailable."""
        now = self._clock()

        def work(connection: Connection) -> bool:
            live = keys.c.id == id, keys.c.revoked_at.is_(None)
            connection.execute(update(keys).where(*live).values(revoked_at=now))
            return connection.scalar(select(keys.c.id).where(keys.c.id == id)) is not None

        return bool(_KEY_ID.fullmatch(id)) and await self._store.do(work)

    async def principal_of(self, header: str | None, *, address: str = "") -> Principal:
        """Whose key an ``Authorization`` header holds: ``Key ID:SECRET``, or ``Bearer`` as OpenAI's clients say.

        A right key is let in whatever came before from its ``address``: that may be a proxy's, with everybody behind.

        Raises: Unauthorized: none, or not valid; Overloaded: not valid, and more than a few such in a minute;
            Unavailable.
        """
        try:
            return await self._principal_of_key(header)
        except Unauthorized:
            if self.is_open:
                return Principal()
            if header and self._tries.fail(address) > MAX_TRIES:
                raise Overloaded("too many wrong keys came from this address; wait a minute") from None
            raise

    async def _principal_of_key(self, header: str | None) -> Principal:
        if not header:
            raise Unauthorized("this server asks for a key: Authorization: Key ID:SECRET")
        if not (words := _HEADER.fullmatch(header)):
            raise Unauthorized("this is no key: Authorization: Key ID:SECRET is one")
        row = await self._row(words[1])
        # One that is unknown costs what a wrong one does.
        is_right = hmac.compare_digest(_hash(words[2]), row.hash if row else bytes(32))
        if not row or not is_right:
            raise Unauthorized("this key is not known here")
        self._check(row)
        return Principal(row.owner, frozenset(row.scopes), key=row.id)

    def mint(
        self, principal: Principal, kind: Kind, *, lifetime_s: float, apps: Iterable[str] | None = None, **claims: Any
    ) -> str:
        """A token for what ``principal`` may do.

        Args:
            lifetime_s: positive; a day at most is given.
            apps: to which it is bound, as application ids or as aliases alone; None is every one.
            claims: further ones, for ``claims_of_token``.

        Raises: InputError: more apps than a token has room for.
        """
        assert self._secret, "start comes first"
        now = self._clock()
        token = jwt.encode(
            {
                **claims,
                "iss": _ISSUER,
                "aud": kind,
                "sub": principal.owner,
                "key": principal.key,
                "apps": None if apps is None else sorted(_aliases(apps)),
                "iat": math.floor(now),
                "exp": math.ceil(now + min(lifetime_s, LONGEST_TOKEN_S)),
                "jti": secrets.token_urlsafe(12),
            },
            self._secret,
            algorithm="HS256",
        )
        if len(token) > _MAX_TOKEN:
            raise InputError("allowed_apps", "names too many apps", "too_long")
        return token

    def claims_of_token(self, token: str | None, kind: Kind, *, lenient: bool = False) -> dict[str, Any]:
        """What a token of ours says, in open mode too; whether its key still holds is ``principal_of_token``'s.

        Raises: Unauthorized: not ours, of another kind, or past its time (by more than a day where ``lenient``).
        """
        if not token:
            raise Unauthorized("a token is missing")
        if len(token) > _MAX_TOKEN or not token.isascii():
            raise Unauthorized("this token is not one of this server's")
        assert self._secret, "start comes first"
        try:
            read = jwt.decode_complete(
                token,
                self._secret,
                algorithms=["HS256"],
                audience=kind,
                issuer=_ISSUER,
                # Times are looked at below, by our clock.
                options={
                    "require": ["exp", "iat", "sub", "aud", "iss", "jti"],
                    "verify_exp": False,
                    "verify_iat": False,
                    "verify_nbf": False,
                },
            )
        except jwt.InvalidTokenError:
            raise Unauthorized("this token is not one of this server's") from None
        if "crit" in read["header"]:
            raise Unauthorized("this token asks for what is not understood here")
        claims: dict[str, Any] = read["payload"]
        now = self._clock()
        if claims["iat"] > now + _SKEW_S:
            raise Unauthorized("this token is from the future")
        if claims["exp"] + _SKEW_S + (_GRACE_S if lenient else 0) < now:
            raise Unauthorized("this token has expired")
        return claims

    async def principal_of_token(
        self, token: str | None, kind: Kind, *, app: str | None = None, lenient: bool = False
    ) -> Principal:
        """Whom a token stands for: its key's owner, with the scope ``generate`` alone.

        Args:
            app: the application id, or the alias, that is asked for; None where it does not matter.
            lenient: take one that has expired within a day: some of the platform's clients connect again with the
                token that they once had.

        Raises: Unauthorized: not valid, for another app, or its key has ended; Unavailable.
        """
        try:
            claims = self.claims_of_token(token, kind, lenient=lenient)
            # A token that was made in open mode has none, and ends with that mode.
            if not (row := await self._row(claims["key"])):
                raise Unauthorized("this token's key is not known here")
            self._check(row)
            apps = None if claims["apps"] is None else frozenset(claims["apps"])
            principal = Principal(claims["sub"], frozenset({"generate"}), apps, row.id)
            if app is not None and not principal.may_use(app):
                raise Unauthorized(f"this token is not for {app!r}")
        except Unauthorized:
            if self.is_open:
                return Principal()
            raise
        return principal

    async def holds(self, principal: Principal) -> bool:
        """Whether the key that ``principal`` came with is still valid. Raises: Unavailable."""
        if principal.key is None:
            return True
        try:
            self._check(await self._row(principal.key))
        except Unauthorized:
            return False
        return True

    async def _row(self, id: str | None) -> Any:
        return await self._store.do(lambda connection: connection.execute(select(keys).where(keys.c.id == id)).first())

    def _check(self, row: Any) -> None:
        if row.revoked_at is not None:
            raise Unauthorized("this key was revoked")
        if row.expires_at is not None and row.expires_at <= self._clock():
            raise Unauthorized("this key has expired")


class _Tries:
    """Wrong keys by address, each in a minute of its own; of more addresses than a few thousand the oldest go."""

    _WINDOW_S = 60.0
    _MOST = 4096

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._seen: dict[str, tuple[float, int]] = {}  # since when, how many; oldest first

    def fail(self, address: str) -> int:
        """Count one more; how many it has now."""
        who, now = _neighbourhood(address), self._clock()
        since, count = self._seen.get(who, (now, 0))
        if not 0 <= now - since < self._WINDOW_S:
            since, count = now, 0
        if not count:
            self._seen.pop(who, None)
            if len(self._seen) >= self._MOST:
                del self._seen[next(iter(self._seen))]
        self._seen[who] = since, count + 1
        return count + 1


def _neighbourhood(address: str) -> str:
    """The addresses that one client has: in IPv6 a whole /64."""
    try:
        ip = ipaddress.ip_address(address)
    except ValueError:
        return address
    return str(ipaddress.ip_network((ip, 64), strict=False)) if ip.version == 6 else address


def _aliases(apps: Iterable[str]) -> set[str]:
    # One without an owner is an alias already, even where it looks like the legacy spelling of both.
    return {name for app in apps for name in (parse_app(app).alias, app if "/" not in app else "") if name}


def _hash(secret: str) -> bytes:
    return hashlib.sha256(secret.encode()).digest()

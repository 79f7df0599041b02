"""Keys and tokens: whom they stand for, and everything that is none."""

from __future__ import annotations

import asyncio
import base64
import hmac
import json
import logging
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import jwt
import pytest
from cryptography.hazmat.primitives.asymmetric import rsa
from serving import run
from sqlalchemy import select

from lcm_rt.auth import LONGEST_TOKEN_S, MAX_TRIES, SCOPES, Auth, Principal
from lcm_rt.errors import InputError, Overloaded, Unauthorized
from lcm_rt.store import Store, keys
from lcm_rt.store import secrets as secret_rows

DAY = 86400.0


class Clock:
    """A clock that stands until it is moved."""

    def __init__(self) -> None:
        self.now = 1_800_000_000.0

    def __call__(self) -> float:
        return self.now


@asynccontextmanager
async def opened(url: str, clock: Callable[[], float], *, is_open: bool = False) -> AsyncIterator[Auth]:
    async with Store(url) as store:
        auth = Auth(store, is_open=is_open, clock=clock)
        await auth.start()
        yield auth


def refused(words: str | None = None) -> pytest.RaisesExc[Unauthorized]:
    return pytest.raises(Unauthorized, match=words)


def sqlite(folder: Path) -> str:
    return f"sqlite:///{folder}/store.db"


async def secret_of(auth: Auth) -> bytes:
    """What the server signs its tokens with, which nobody outside has."""
    return await auth._store.do(
        lambda connection: connection.execute(
            select(secret_rows.c.value).where(secret_rows.c.kind == "token")
        ).scalar_one()
    )


def b64(data: Any) -> str:
    text = data if isinstance(data, bytes) else json.dumps(data).encode()
    return base64.urlsafe_b64encode(text).rstrip(b"=").decode()


def signed_by_hand(header: dict[str, Any], claims: dict[str, Any], secret: bytes) -> str:
    """A token as no library would make it."""
    words = f"{b64(header)}.{b64(claims)}"
    return f"{words}.{b64(hmac.digest(secret, words.encode(), 'sha256'))}"


@run
async def test_a_key_stands_for_its_owner(database_url: str) -> None:
    clock = Clock()
    async with opened(database_url, clock) as auth:
        key = await auth.create_key("ann", ["generate"])
        root = await auth.create_key("root@example.com", SCOPES, lifetime_s=60)
        for header in (f"Key {key}", f"key  {key} ", f"Bearer {key}", f"BEARER {key}"):
            found = await auth.principal_of(header)
            assert found == Principal("ann", frozenset({"generate"}), None, key.partition(":")[0])
        assert (await auth.principal_of(f"Key {root}")).scopes == SCOPES
        listed = await auth.list_keys()
        assert {(known.id, known.owner) for known in listed} == {
            (key[:16], "ann"),
            (root[:16], "root@example.com"),
        }
        assert {known.expires_at for known in listed} == {None, clock.now + 60}
        rows = await auth._store.do(lambda connection: connection.execute(select(keys)).all())
        assert key.partition(":")[2] not in str(rows), "the secret itself is kept"
    async with opened(database_url, clock) as auth:
        assert (await auth.principal_of(f"Key {key}")).owner == "ann"


@run
async def test_what_is_no_key(tmp_path: Path) -> None:
    async with opened(sqlite(tmp_path), Clock()) as auth:
        key = await auth.create_key("ann")
        other = await auth.create_key("bob")
        id, _, secret = key.partition(":")
        wrong = [
            None,
            "",
            "Key",
            "Key ",
            "Key :",
            f"Key {id}",
            f"Key {id}:",
            f"Key {secret}",
            f"Key :{secret}",
            f"Key {id}:{secret[:-1]}",
            f"Key {id}:{secret}x",
            f"Key {id}:{secret.swapcase()}",
            f"Key {id}:{other.partition(':')[2]}",
            f"Key {id.upper()}:{secret}",
            f"Key {'0' * 16}:{secret}",
            f"Key {id}\0:{secret}",
            f"Key {id}:{secret}\n",
            f"Key {'0' * 16}' OR '1'='1:{secret}",
            f"Key {id}:{'x' * 100_000}",
            f"Key {id}:\xff\xfe",
            f"Basic {key}",
            key,
            f"Key {key}, Key {key}",
            f"Key {key} Key {key}",
        ]
        for number, header in enumerate(wrong):
            with refused():
                await auth.principal_of(header, address=str(number))


@run
async def test_keys_end(database_url: str) -> None:
    clock = Clock()
    async with opened(database_url, clock) as auth:
        key = await auth.create_key("ann", lifetime_s=100)
        clock.now += 99
        await auth.principal_of(f"Key {key}")
        clock.now += 1
        with refused("expired"):
            await auth.principal_of(f"Key {key}")
        clock.now -= 50
        async with Store(database_url) as store:  # another process, such as the command line's
            other = Auth(store, is_open=False, clock=clock)
            assert await other.revoke_key(key[:16])
        with refused("revoked"):
            await auth.principal_of(f"Key {key}")
        revoked_at = (await auth.list_keys())[0].revoked_at
        clock.now += 1
        assert await auth.revoke_key(key[:16]), "once more is no mistake"
        assert (await auth.list_keys())[0].revoked_at == revoked_at == clock.now - 1
        for unknown in ("", "0" * 16, "x\0", key):
            assert not await auth.revoke_key(unknown)


@pytest.mark.parametrize(
    "field, wish",
    [
        ("owner", {"owner": ""}),
        ("owner", {"owner": "../x"}),
        ("owner", {"owner": "a\n"}),
        ("owner", {"owner": "x" * 65}),
        ("scope", {"scopes": []}),
        ("scope", {"scopes": ["generate", "root"]}),
        ("expires", {"lifetime_s": 0}),
        ("expires", {"lifetime_s": float("inf")}),
        ("expires", {"lifetime_s": float("nan")}),
    ],
)
def test_keys_that_are_not_made(tmp_path: Path, field: str, wish: dict[str, Any]) -> None:
    @run
    async def walk() -> None:
        async with opened(sqlite(tmp_path), Clock()) as auth:
            with pytest.raises(InputError) as told:
                await auth.create_key(**{"owner": "ann", **wish})
            assert told.value.field == field
            assert not await auth.list_keys()

    walk()


@pytest.mark.points(35)
@run
async def test_open_mode_asks_for_nothing(tmp_path: Path) -> None:
    async with opened(sqlite(tmp_path), Clock(), is_open=True) as auth:
        key = await auth.create_key("ann")
        gone = await auth.create_key("ann")
        await auth.revoke_key(gone[:16])
        for header in (None, "", "Key id:secret", "Key single", "Bearer x", f"Key {gone}", "Basic eDp5"):
            for _ in range(MAX_TRIES):
                assert await auth.principal_of(header, address="1.2.3.4") == Principal()
        ann = await auth.principal_of(f"Key {key}")
        assert ann == Principal("ann", frozenset({"generate"}), None, key[:16])
        for token in (None, "", "x", "a.b.c", auth.mint(Principal(), "realtime", lifetime_s=1)):
            assert await auth.principal_of_token(token, "realtime", app="lcm") == Principal()
        of_ann = auth.mint(ann, "realtime", lifetime_s=1, apps=["lcm"])
        assert (await auth.principal_of_token(of_ann, "realtime", app="lcm")).owner == "ann"
        assert await auth.principal_of_token(of_ann, "realtime", app="other") == Principal()
        with refused():  # what a URL is signed with must be authentic here too
            auth.claims_of_token("x", "cdn")


@run
async def test_wrong_keys_are_slowed_down_by_address(tmp_path: Path) -> None:
    clock = Clock()
    async with opened(sqlite(tmp_path), clock) as auth:
        key = await auth.create_key("ann")
        wrong = f"Key {key[:16]}:guess"

        async def exhaust(*addresses: str) -> None:
            for number in range(MAX_TRIES):
                with refused():
                    await auth.principal_of(wrong, address=addresses[number % len(addresses)])
            for address in addresses:
                with pytest.raises(Overloaded):
                    await auth.principal_of(wrong, address=address)

        await exhaust("10.0.0.1")
        await exhaust("2001:db8::1", "2001:db8::ffff:2")  # one client has all of a /64
        with refused():
            await auth.principal_of(wrong, address="2001:db8:0:1::1")
        with refused():
            await auth.principal_of(wrong, address="10.0.0.2")
        with refused():  # that is no try
            await auth.principal_of(None, address="10.0.0.1")
        # The address may be a proxy's: those behind it who have a key are not shut out.
        assert (await auth.principal_of(f"Key {key}", address="10.0.0.1")).owner == "ann"
        clock.now += 59
        with pytest.raises(Overloaded):
            await auth.principal_of(wrong, address="10.0.0.1")
        clock.now += 1
        await exhaust("10.0.0.1")
        clock.now -= 1000  # a clock that is set back shuts nobody out for longer
        await exhaust("10.0.0.1")


@run
async def test_who_tries_from_everywhere_takes_no_memory(tmp_path: Path) -> None:
    async with opened(sqlite(tmp_path), Clock()) as auth:
        for number in range(5000):
            with refused():
                await auth.principal_of("Key x", address=f"10.0.{number >> 8}.{number & 255}")
        assert len(auth._tries._seen) == auth._tries._MOST


@run
async def test_a_token_stands_for_its_key(database_url: str) -> None:
    clock = Clock()
    async with opened(database_url, clock) as auth:
        key = await auth.create_key("ann", SCOPES)
        ann = await auth.principal_of(f"Key {key}")
        token = auth.mint(ann, "realtime", lifetime_s=120, apps=["lcm"])
        assert await auth.principal_of_token(token, "realtime", app="fal-ai/lcm") == Principal(
            "ann", frozenset({"generate"}), frozenset({"lcm"}), key[:16]
        )
        claims = auth.claims_of_token(auth.mint(ann, "cdn", lifetime_s=0.5, part=3), "cdn")
        assert (claims["part"], claims["sub"], claims["iat"], claims["exp"]) == (3, "ann", clock.now, clock.now + 1)
        assert auth.claims_of_token(token, "realtime")["jti"] != claims["jti"]
        long = auth.claims_of_token(auth.mint(ann, "cdn", lifetime_s=1e300), "cdn")
        assert long["exp"] == clock.now + LONGEST_TOKEN_S
        forged = auth.mint(ann, "cdn", lifetime_s=1, sub="bob", aud="realtime", exp=9e9)
        assert auth.claims_of_token(forged, "cdn")["sub"] == "ann"
    async with opened(database_url, clock) as auth:  # the secret is the store's, not the process's
        await auth.principal_of_token(token, "realtime")


@run
async def test_servers_of_one_store_take_each_others_tokens(database_url: str) -> None:
    clock = Clock()
    async with Store(database_url) as first, Store(database_url) as second:
        one, two = (Auth(store, is_open=False, clock=clock) for store in (first, second))
        await asyncio.gather(one.start(), two.start())
        ann = await one.principal_of(f"Key {await one.create_key('ann')}")
        assert (await two.principal_of_token(one.mint(ann, "realtime", lifetime_s=9), "realtime")).owner == "ann"


@run
async def test_the_end_of_a_token(tmp_path: Path) -> None:
    clock = Clock()
    async with opened(sqlite(tmp_path), clock) as auth:
        key = await auth.create_key("ann")
        ann = await auth.principal_of(f"Key {key}")
        token = auth.mint(ann, "realtime", lifetime_s=120)
        begun = clock.now
        for age, lenient, is_good in (
            (150, False, True),  # 30 s are the difference of two clocks
            (151, False, False),
            (151, True, True),
            (DAY + 150, True, True),
            (DAY + 151, True, False),
            (-30, False, True),
            (-31, False, False),
            (-31, True, False),
        ):
            clock.now = begun + age
            if is_good:
                await auth.principal_of_token(token, "realtime", lenient=lenient)
            else:
                with refused():
                    await auth.principal_of_token(token, "realtime", lenient=lenient)
        clock.now = begun
        await auth.revoke_key(key[:16])
        for lenient in (False, True):
            with refused("revoked"):
                await auth.principal_of_token(token, "realtime", lenient=lenient)


@run
async def test_a_token_ends_with_its_key(tmp_path: Path) -> None:
    clock = Clock()
    async with opened(sqlite(tmp_path), clock) as auth:
        ann = await auth.principal_of(f"Key {await auth.create_key('ann', lifetime_s=60)}")
        token = auth.mint(ann, "realtime", lifetime_s=600)
        clock.now += 60
        with refused("expired"):
            await auth.principal_of_token(token, "realtime", lenient=True)
        for key in ("0" * 16, None):  # a key that is gone, and a token of open mode
            with refused():
                await auth.principal_of_token(
                    auth.mint(Principal("ann", key=key), "realtime", lifetime_s=60), "realtime"
                )


@pytest.mark.parametrize(
    "bound, asked, is_good",
    [
        (["lcm"], "lcm", True),
        (["lcm"], "fal-ai/lcm", True),
        (["lcm"], "fal-ai/lcm/image-to-image", True),
        (["lcm-sd15-i2i"], "110602490-lcm-sd15-i2i", True),
        (["lcm-sd15-i2i"], "110602490/lcm-sd15-i2i", True),
        (["fal-ai/lcm"], "lcm", True),
        (["fal-ai/lcm/realtime"], "somebody/lcm", True),
        (["110602490-lcm-sd15-i2i"], "fal-ai/lcm-sd15-i2i", True),
        (["3-steps"], "me/3-steps", True),
        (["flow"], "workflows/me/flow", True),
        (["a", "b"], "b", True),
        (None, "anything", True),
        (["lcm"], "fal-ai/sdxl", False),
        (["lcm"], "lcm/sdxl", False),
        (["lcm"], "", False),
        (["lcm"], "LCM", False),
        (["lcm"], "lcm2", False),
        ([""], "", False),
        ([], "lcm", False),
    ],
)
def test_the_apps_of_a_token(tmp_path: Path, bound: list[str] | None, asked: str, is_good: bool) -> None:
    @run
    async def walk() -> None:
        async with opened(sqlite(tmp_path), Clock()) as auth:
            ann = await auth.principal_of(f"Key {await auth.create_key('ann')}")
            token = auth.mint(ann, "realtime", lifetime_s=9, apps=bound)
            if is_good:
                assert (await auth.principal_of_token(token, "realtime", app=asked)).may_use(asked)
            else:
                with refused("not for"):
                    await auth.principal_of_token(token, "realtime", app=asked)

    walk()


@run
async def test_a_token_has_room_for_so_many_apps(tmp_path: Path) -> None:
    async with opened(sqlite(tmp_path), Clock()) as auth:
        with pytest.raises(InputError) as told:
            auth.mint(Principal(), "realtime", lifetime_s=9, apps=[f"app-{number}" for number in range(1000)])
        assert told.value.field == "allowed_apps"


@run
async def test_forged_tokens(tmp_path: Path) -> None:
    clock = Clock()
    async with opened(sqlite(tmp_path), clock) as auth:
        key = await auth.create_key("ann")
        secret = await secret_of(auth)
        assert len(secret) == 32
        good = {
            "iss": "lcm-rt",
            "aud": "realtime",
            "sub": "ann",
            "key": key[:16],
            "apps": None,
            "iat": clock.now,
            "exp": clock.now + 120,
            "jti": "x",
        }
        sign = jwt.encode
        token = sign(good, secret)
        await auth.principal_of_token(token, "realtime")  # so it is what is changed below that is refused
        head, body, signature = token.split(".")
        mine = rsa.generate_private_key(public_exponent=65537, key_size=2048)
        bad = {
            "none": sign(good, None, algorithm="none"),
            "None": f"{b64({'alg': 'None', 'typ': 'JWT'})}.{body}.",
            "no alg": f"{b64({'typ': 'JWT'})}.{body}.{signature}",
            "alg list": f"{b64({'alg': ['HS256']})}.{body}.{signature}",
            "unsigned": f"{head}.{body}.",
            "another secret": sign(good, b"x" * 32),
            "no secret": sign(good, b"\0" * 32),
            "HS384": sign(good, secret * 2, algorithm="HS384"),
            "HS512 with ours": sign(good, secret + bytes(32), algorithm="HS512"),
            "RS256": sign(good, mine, algorithm="RS256"),
            "RS256 in name": f"{b64({'alg': 'RS256'})}.{body}.{signature}",
            "other claims": f"{head}.{b64({**good, 'sub': 'bob'})}.{signature}",
            "crit": sign(good, secret, headers={"crit": ["exp"], "exp": 1}),
            "crit b64": signed_by_hand({"alg": "HS256", "crit": ["b64"], "b64": True}, good, secret),
            "kid path": signed_by_hand({"alg": "HS256", "kid": "../../../../dev/null"}, good, b""),
            "kid number": f"{b64({'alg': 'HS256', 'kid': 1})}.{body}.{signature}",
            "jwk": f"{b64({'alg': 'HS256', 'jwk': {'kty': 'oct', 'k': 'AAAA'}})}.{body}.{signature}",
            "other issuer": sign({**good, "iss": "fal"}, secret),
            "wrong audience": sign({**good, "aud": "cdn"}, secret),
            "no body": f"{head}..{signature}",
            "deep": f"{b64(b'[' * 2900)}.{body}.{signature}",
            "no JSON": f"eA.{body}.{signature}",
            "an array": f"{b64([1])}.{body}.{signature}",
            "two parts": f"{head}.{body}",
            "one part": "x",
            "dots": "." * 4000,
            "long": "x" * 2**20,
            "long, ours": sign({**good, "more": "x" * 4096}, secret),
            "long, right": f"{token}{'=' * 2**20}",
            "umlaut": f"{token}ä",
            "surrogate": f"{token}\ud800",
            "NUL": f"{token}\0",
        } | {
            f"without {claim}": sign({name: value for name, value in good.items() if name != claim}, secret)
            for claim in ("iss", "aud", "sub", "iat", "exp", "jti")
        }
        for name, words in bad.items():
            with refused():
                await auth.principal_of_token(words, "realtime", lenient=True)
                pytest.fail(f"{name} is taken for a token")
        with refused():
            await auth.principal_of_token(token, "cdn")
        assert (await auth.principal_of_token(signed_by_hand({"alg": "HS256"}, good, secret), "realtime")).key
        # A kid that names our key changes nothing: there is one secret, and the token does not say where it lies.
        await auth.principal_of_token(sign(good, secret, headers={"kid": "../../etc/passwd"}), "realtime")


@run
async def test_nothing_secret_is_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    async with opened(sqlite(tmp_path), Clock()) as auth:
        key = await auth.create_key("ann")
        ann = await auth.principal_of(f"Key {key}")
        token = auth.mint(ann, "realtime", lifetime_s=9)
        await auth.principal_of_token(token, "realtime")
        for _ in range(MAX_TRIES + 1):
            with pytest.raises((Unauthorized, Overloaded)) as told:
                await auth.principal_of(f"Key {key}x")
            assert key.partition(":")[2] not in str(told.value)
        with refused():
            await auth.principal_of_token(f"{token}x", "realtime")
        await auth.revoke_key(key[:16])
        with refused():
            await auth.principal_of_token(token, "realtime")
        said = "".join(record.getMessage() + str(record.exc_info) for record in caplog.records)
        for hidden in (key.partition(":")[2], token.rpartition(".")[2], (await secret_of(auth)).hex()):
            assert hidden not in said

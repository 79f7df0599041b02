"""Files by URL, on a local folder and on another kind of storage: answered pictures, uploads, what is swept."""

from __future__ import annotations

import asyncio
import errno
import os
import time
import tracemalloc
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import fsspec
import pytest
from fsspec.implementations.local import LocalFileSystem
from serving import run, until
from sqlalchemy import Connection, event, func, select
from test_egress import Host, answer, hosting, make

from lcm_rt import files as files_module
from lcm_rt.egress import MAX_URL, REFUSED, Egress
from lcm_rt.errors import (
    BadRequest,
    DownloadError,
    Forbidden,
    ImageError,
    InputError,
    LcmError,
    NotFound,
    Overloaded,
    TooLarge,
    Unavailable,
)
from lcm_rt.files import LONGEST_S, STRAY_S, SWEEP_S, UNFINISHED_S, Access, Files, Lifecycle, Upload, lifecycle_of
from lcm_rt.metrics import Metrics
from lcm_rt.objects import BLOCK, Objects
from lcm_rt.store import Store
from lcm_rt.store import files as file_rows
from lcm_rt.store import parts as part_rows

STRANGER = "a" * 22 + ".png"


async def say_path(host: Host, path: str, writer: asyncio.StreamWriter) -> None:
    await answer(writer, path.encode())


async def body(*parts: bytes) -> AsyncIterator[bytes]:
    for part in parts:
        await asyncio.sleep(0)
        yield part


async def cut_off(*parts: bytes) -> AsyncIterator[bytes]:
    async for part in body(*parts):
        yield part
    raise ConnectionResetError("the client has left")


class Clock:
    """The files' time, moved by hand; it begins with the machine's, which the storage writes into its objects."""

    def __init__(self) -> None:
        self.now = time.time()

    def __call__(self) -> float:
        return self.now


class Filing:
    """Files, and what is around them."""

    def __init__(self, store: Store, storage: str | Path, egress: Egress | None, **limits: Any) -> None:
        self.store = store
        self.clock = Clock()
        self.metrics = Metrics()
        self.storage = storage
        chosen = {
            "ttl_s": 100,
            "limit_bytes": 1000,
            "upload_ttl_s": 1000,
            "upload_limit_bytes": 3 * 2**20,
            "upload_quota_bytes": 10 * 2**20,
        }
        egress = egress or make(Host(say_path))[0]
        self.files = Files(
            store, storage, metrics=self.metrics, egress=egress, clock=self.clock, **{**chosen, **limits}
        )

    async def objects(self) -> list[str]:
        """What lies in the storage."""
        fs, root = fsspec.core.url_to_fs(str(self.storage))
        if not await asyncio.to_thread(fs.exists, root):
            return []
        paths = await asyncio.to_thread(fs.ls, root, detail=False)
        return sorted(path.rpartition("/")[2] for path in paths)

    async def first_object(self) -> None:
        """Wait until something is on its way into the storage."""
        while not await self.objects():  # noqa: ASYNC110
            await asyncio.sleep(0.001)

    async def place(self, name: str) -> str:
        return (await self.files.open(name, None)).place

    async def rows(self, table: Any = file_rows) -> int:
        return await self.store.do(lambda connection: connection.scalar(select(func.count()).select_from(table)) or 0)

    async def upload(self, *parts: bytes, title: str = "a.bin", **options: Any) -> str:
        begun = await self.files.begin("application/octet-stream", title, **options)
        await self.files.write(begun, body(*parts))
        return begun.name

    async def content(self, name: str, reader: str | None = None, **span: int) -> bytes:
        return b"".join([block async for block in self.files.stream(await self.files.open(name, reader), **span)])


@asynccontextmanager
async def filing(
    folder: Path,
    *,
    egress: Egress | None = None,
    storage: str | None = None,
    database: str | None = None,
    **limits: Any,
) -> AsyncIterator[Filing]:
    """Files in ``folder`` until the block ends; ``storage`` and ``database`` are URLs, for another place or kind."""
    async with Store(database or f"sqlite:///{folder}/rows.db") as store:
        yield Filing(store, storage or folder / "files", egress, **limits)


@pytest.fixture(params=["local", "memory"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """Where bytes lie: on the disk, or on what knows no files and no folders."""
    yield f"file://{tmp_path}/files" if request.param == "local" else "memory://files"
    fs = fsspec.filesystem("memory")
    fs.store.clear()
    fs.pseudo_dirs[:] = [""]


# ---- answered pictures and reading -----------------------------------------------------------------------------------


@run
async def test_what_is_put_is_read_until_it_expires(tmp_path: Path, storage: str) -> None:
    async with filing(tmp_path, storage=storage) as it:
        name = await it.files.put(b"jpeg", "image/jpeg")
        file = await it.files.open(name, None)
        assert (file.name, file.content_type, file.size, name[-4:]) == (name, "image/jpeg", 4, ".jpg")
        for url in (f"http://somewhere/files/{name}", f"/files/{name}", f"https://x/cdn/files/{name}"):
            assert await it.files.read("image_url", url) == b"jpeg"
        it.clock.now += 99
        assert await it.content(name) == b"jpeg"
        it.clock.now += 1
        with pytest.raises(NotFound):
            await it.files.open(name, None)
        with pytest.raises(ImageError, match="image_url"):
            await it.files.read("image_url", f"/files/{name}")


@run
async def test_a_picture_may_be_kept_for_longer_but_not_for_ever(tmp_path: Path) -> None:
    async with filing(tmp_path) as it:
        name = await it.files.put(b"x", "image/png", ttl_s=1000)
        eternal = await it.files.put(b"x", "image/png", ttl_s=float("inf"))
        it.clock.now += 999
        assert await it.content(name) == b"x"
        it.clock.now += LONGEST_S - 1000
        assert await it.content(eternal) == b"x"
        it.clock.now += 1
        with pytest.raises(NotFound):
            await it.files.open(eternal, None)


@run
async def test_every_span_of_a_file_can_be_read(tmp_path: Path, storage: str) -> None:
    async with filing(tmp_path, storage=storage) as it:
        data = os.urandom(2 * BLOCK + 3)
        name = await it.upload(data[:7], data[7:])
        assert await it.content(name) == data
        for start, end in (
            (0, 1),
            (0, BLOCK),
            (BLOCK - 1, BLOCK + 1),
            (5, 2 * BLOCK + 3),
            (2 * BLOCK + 2, 2 * BLOCK + 3),
        ):
            assert await it.content(name, start=start, end=end) == data[start:end]
        assert await it.content(await it.upload(b"")) == b""


@run
async def test_no_name_leads_out_of_the_folder(tmp_path: Path) -> None:
    async with filing(tmp_path) as it:
        await it.files.put(b"x", "image/png")
        (tmp_path / "secret.png").write_text("secret")
        for name in (
            "../secret.png",
            "..%2fsecret.png",
            "/etc/passwd",
            "",
            ".",
            "\0" * 22,
            "a" * 22 + ".PNG",
            "a" * 9999,
        ):
            with pytest.raises(NotFound):
                await it.files.open(name, None)
            with pytest.raises(NotFound):
                await it.files.write(Upload(name, "a" * 22), body(b"x"))
            with pytest.raises(NotFound):
                await it.files.write(Upload("a" * 22, name), body(b"x"))


@pytest.mark.parametrize(
    "url",
    ["file:///etc/passwd", "ftp://x", "//[", "x", "", "x" * (MAX_URL + 1), f"ftp://x/files/{STRANGER}", "//x/files/y"],
)
def test_other_addresses_are_not_read(tmp_path: Path, url: str) -> None:
    @run
    async def walk() -> None:
        async with filing(tmp_path) as it:
            with pytest.raises(InputError, match="mask_url") as caught:
                await it.files.read("mask_url", url)
            assert caught.value.kind == "url_scheme"

    walk()


@run
async def test_files_of_ours_are_told_from_those_of_others(tmp_path: Path) -> None:
    async with hosting(say_path) as host:
        client, dialer = make(host)
        async with filing(tmp_path, egress=client) as it:
            name = await it.files.put(b"ours", "image/png")
            for url in (f"/files/{name}", f"http://pictures.example/files/{name}", f"https://x:99/files/{name}?a#b"):
                file = await it.files.own(url)
                assert file and file.name == name
                assert await it.files.read("image_url", url) == b"ours"
            assert dialer.dialled == []
            for path in (f"/files/{STRANGER}", "/files/cat.png", f"/{name}", f"/files/files/{name}", "/a.png"):
                assert await it.files.own(f"http://pictures.example{path}") is None
                assert await it.files.read("image_url", f"http://pictures.example{path}") == path.encode()
            assert len(dialer.dialled) == 5
            # Ours that is gone is gone under every name, though nothing is fetched from our own network.
            for url in (f"/files/{STRANGER}", f"http://127.0.0.1:8000/files/{STRANGER}", "/files/x"):
                with pytest.raises(ImageError, match="image_url: there is no such file here"):
                    await it.files.read("image_url", url)
            with pytest.raises(DownloadError, match=f"image_url: {REFUSED}"):
                await it.files.read("image_url", "http://127.0.0.1:8000/files/cat.png")
            assert await it.files.own("/files/" + "a" * MAX_URL) is None


@run
async def test_a_picture_by_url_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with hosting(say_path) as host, filing(tmp_path, egress=make(host)[0]) as it:
        monkeypatch.setattr(files_module, "MAX_FETCH_BYTES", 5)
        assert await it.files.read("mask_url", "HTTP://pictures.example/1234") == b"/1234"
        with pytest.raises(DownloadError, match="mask_url: is larger than 5 bytes"):
            await it.files.read("mask_url", "http://pictures.example/12345")
        assert await it.files.read("mask_url", f"/files/{await it.upload(b'12345')}") == b"12345"
        with pytest.raises(ImageError, match="mask_url: is larger than 5 bytes"):
            await it.files.read("mask_url", f"/files/{await it.upload(b'123456')}")


@run
async def test_bytes_that_were_taken_away_are_a_typed_error(tmp_path: Path) -> None:
    async with filing(tmp_path) as it:
        name, cut = await it.files.put(b"x", "image/png"), await it.files.put(b"12345", "image/png")
        (tmp_path / "files" / await it.place(name)).unlink()
        (tmp_path / "files" / await it.place(cut)).write_bytes(b"123")
        for gone in (name, cut):
            with pytest.raises(NotFound):
                await it.content(gone)
        with pytest.raises(ImageError, match="image_url"):
            await it.files.read("image_url", f"/files/{name}")


# ---- who may read ----------------------------------------------------------------------------------------------------


@run
async def test_a_private_file_is_its_owners(tmp_path: Path) -> None:
    rules = (("bob", "allow"), ("carol", "hide"), ("dave", "forbid"))
    outcomes: dict[str, dict[str | None, type[LcmError] | None]] = {
        "hide": {"alice": None, "bob": None, "carol": NotFound, "dave": Forbidden, "eve": NotFound, None: NotFound},
        "forbid": {"alice": None, "bob": None, "carol": NotFound, "dave": Forbidden, "eve": Forbidden, None: Forbidden},
        "allow": {"alice": None, "bob": None, "carol": NotFound, "dave": Forbidden, "eve": None, None: None},
    }
    async with filing(tmp_path) as it:
        for default, expected in outcomes.items():
            lifecycle = Lifecycle(access=Access(default, rules))  # type: ignore[arg-type]
            name = await it.upload(b"mine", owner="alice", lifecycle=lifecycle)
            for reader, failure in expected.items():
                if failure is None:
                    assert await it.content(name, reader) == b"mine", (default, reader)
                else:
                    with pytest.raises(failure):
                        await it.content(name, reader)
                if reader is None:
                    continue
                if failure is None:
                    assert await it.files.read("image_url", f"/files/{name}", owner=reader) == b"mine"
                else:
                    with pytest.raises(ImageError, match="no such file"):
                        await it.files.read("image_url", f"/files/{name}", owner=reader)
        hidden = await it.files.put(b"x", "image/png", owner="alice", access=Access("hide"))
        with pytest.raises(NotFound):
            await it.files.open(hidden, "bob")


@pytest.mark.points(62)
def test_a_lifecycle_header_says_something_or_nothing_but_is_no_error() -> None:
    def wish(text: str) -> tuple[float | None, Access]:
        found = lifecycle_of(text)
        return found.ttl_s, found.access

    everybody = Access()
    assert wish('{"expiration_duration_seconds": 60}') == (60, everybody)
    assert wish('{"expiration_duration_seconds": null}') == (LONGEST_S, everybody)
    assert wish('{"expiration_duration_seconds": 0}') == (LONGEST_S, everybody)
    assert wish('{"expiration_duration_seconds": 1e300}') == (LONGEST_S, everybody)
    assert wish('{"expiration_duration_seconds": 0.5, "later": [1]}') == (0.5, everybody)
    assert wish('{"initial_acl": {"default": "hide"}}') == (None, Access("hide"))
    acl = '{"default": "forbid", "rules": [{"user": "bob", "decision": "allow"}, {"user": "eve", "decision": "hide"}]}'
    assert wish(f'{{"initial_acl": {acl}}}')[1] == Access("forbid", (("bob", "allow"), ("eve", "hide")))
    assert lifecycle_of(None) == Lifecycle()
    for junk in (
        *("", "{", "null", "[]", "7", '"1h"', "\x00", "{}" * 9999, "[" * 5000, '{"a":' * 2000, "9" * 5000),
        *(
            f'{{"expiration_duration_seconds": {value}}}'
            for value in ("-1", '"60"', "true", "[]", "{}", "NaN", "-1e400", '"1h"')
        ),
        *(
            f'{{"initial_acl": {value}}}'
            for value in ("null", "7", "[]", '{"default": 7}', '{"default": "HIDE"}', '{"rules": 7}', '{"rules": [7]}')
        ),
        '{"initial_acl": {"rules": [{"user": 7, "decision": "hide"}, {"user": "x", "decision": "x"}, {"user": "x"}]}}',
    ):
        assert wish(junk) == (None, everybody), junk


# ---- uploads ---------------------------------------------------------------------------------------------------------


@run
async def test_an_upload_is_nothing_until_all_of_it_is_here(tmp_path: Path, storage: str) -> None:
    async with filing(tmp_path, storage=storage) as it:
        begun = await it.files.begin("text/plain; charset=utf-8", "notes.TXT")
        gate = asyncio.Event()

        async def slow() -> AsyncIterator[bytes]:
            yield b"a" * (BLOCK + 1)
            await gate.wait()
            yield b"b"

        writing = asyncio.create_task(it.files.write(begun, slow()))
        await it.first_object()
        with pytest.raises(NotFound):
            await it.files.open(begun.name, "local")
        assert await it.files.own(f"/files/{begun.name}") is None
        gate.set()
        await writing
        file = await it.files.open(begun.name, None)
        assert (file.content_type, file.title, file.size) == ("text/plain; charset=utf-8", "notes.TXT", BLOCK + 2)
        assert begun.name.endswith(".txt")
        assert await it.content(begun.name) == b"a" * (BLOCK + 1) + b"b"
        it.clock.now += 1000
        with pytest.raises(NotFound):
            await it.files.open(begun.name, None)


@run
async def test_what_is_cut_off_leaves_nothing(tmp_path: Path, storage: str) -> None:
    async with filing(tmp_path, storage=storage) as it:
        begun = await it.files.begin(None, None)
        for half in (cut_off(), cut_off(b"x"), cut_off(b"x" * BLOCK, b"x" * BLOCK)):
            with pytest.raises(ConnectionResetError):
                await it.files.write(begun, half)
            with pytest.raises(ConnectionResetError):
                await it.files.write_part(begun, 1, cut_off(b"x" * BLOCK, b"y"))
        for length in (0, 1, 3):
            with pytest.raises(BadRequest, match="2 bytes"):
                await it.files.write(begun, body(b"x", b"x"), length=length)
        with pytest.raises(NotFound):
            await it.files.open(begun.name, None)
        assert await it.objects() == []
        await it.files.write(begun, body(b"x", b"x"), length=2)  # and it may be tried again
        assert await it.content(begun.name) == b"xx"


@run
async def test_a_write_that_is_cancelled_leaves_nothing(tmp_path: Path, storage: str) -> None:
    async with filing(tmp_path, storage=storage) as it:
        begun = await it.files.begin(None, None)

        async def endless() -> AsyncIterator[bytes]:
            yield b"x" * BLOCK
            await asyncio.Event().wait()

        for _ in range(5):
            writing = asyncio.create_task(it.files.write(begun, endless()))
            await it.first_object()
            writing.cancel()
            with pytest.raises(asyncio.CancelledError):
                await writing
            assert await it.objects() == []
        assert not it.files._arriving


@run
async def test_of_two_who_write_one_upload_one_succeeds(tmp_path: Path, storage: str) -> None:
    async with filing(tmp_path, storage=storage) as it:
        begun = await it.files.begin(None, None)
        ends = await asyncio.gather(
            *(it.files.write(begun, body(bytes([n]) * BLOCK, bytes([n]))) for n in range(4)), return_exceptions=True
        )
        assert {type(end) for end in ends} == {type(None), BadRequest}
        assert ends.count(None) == 1
        assert await it.content(begun.name) == bytes([ends.index(None)]) * (BLOCK + 1)
        with pytest.raises(BadRequest, match="complete already"):
            await it.files.write(begun, body(b"other"))
        with pytest.raises(BadRequest, match="complete already"):
            await it.files.write_part(begun, 1, body(b"other"))
        assert len(await it.objects()) == 1


@run
async def test_limits_hold_whatever_is_declared(tmp_path: Path, storage: str) -> None:
    limit = 2 * BLOCK
    async with filing(tmp_path, storage=storage, upload_limit_bytes=limit, upload_quota_bytes=3 * limit) as it:
        begun = await it.files.begin(None, None, owner="alice")
        unread = body(b"never")
        with pytest.raises(TooLarge):
            await it.files.write(begun, unread, length=limit + 1)
        assert [part async for part in unread] == [b"never"]  # refused before its bytes
        for length in (None, 5):
            with pytest.raises(TooLarge, match="larger than 2 MiB"):
                await it.files.write(begun, body(*[b"x" * 2**18] * 9), length=length)
        assert await it.objects() == []
        await it.files.write(begun, body(b"x" * limit), length=limit)
        # Parts together are as large as one file may be; a part that is replaced counts once.
        parted = await it.files.begin(None, None, owner="alice")
        for _ in range(2):
            await it.files.write_part(parted, 1, body(b"x" * BLOCK))
        with pytest.raises(TooLarge):
            await it.files.write_part(parted, 2, body(b"x" * BLOCK, b"x"))
        assert len(await it.objects()) == 2
        # The owner's quota holds for all that is on its way at once, too.
        begun = [await it.files.begin(None, None, owner="alice") for _ in range(4)]
        gate = asyncio.Event()

        async def waiting() -> AsyncIterator[bytes]:
            yield b"x" * BLOCK
            await gate.wait()

        writing = [asyncio.create_task(it.files.write(one, waiting())) for one in begun]
        await until(lambda: any(task.done() for task in writing))
        gate.set()
        ends = await asyncio.gather(*writing, return_exceptions=True)
        assert {type(end) for end in ends} == {type(None), TooLarge}
        assert ends.count(None) in (1, 2)
        with pytest.raises(TooLarge, match="your uploads take all"):
            await it.files.write(await it.files.begin(None, None, owner="alice"), body(b"x" * limit))
        await it.upload(b"x" * limit, owner="bob")
        it.clock.now += UNFINISHED_S + 1
        await it.files.sweep()
        await it.upload(b"x" * limit, owner="alice")


@run
async def test_no_upload_is_held_in_memory(tmp_path: Path) -> None:
    async with filing(tmp_path, upload_limit_bytes=2**30, upload_quota_bytes=2**30) as it:
        begun = await it.files.begin(None, None)

        async def much() -> AsyncIterator[bytes]:
            for n in range(512):
                yield bytes([n % 256]) * 2**16

        tracemalloc.start()
        try:
            await it.files.write(begun, much())
            async for block in it.files.stream(await it.files.open(begun.name, None)):
                assert len(block) == BLOCK
            assert tracemalloc.get_traced_memory()[1] < 8 * BLOCK
        finally:
            tracemalloc.stop()


@run
async def test_empty_uploads_are_not_for_nothing(tmp_path: Path) -> None:
    async with filing(tmp_path, upload_quota_bytes=5 * 4096) as it:
        for _ in range(5):
            begun = await it.files.begin(None, None)
        with pytest.raises(TooLarge):
            await it.files.begin(None, None)
        with pytest.raises(TooLarge):
            await it.files.write_part(begun, 1, body())
        assert await it.rows() == 5
        assert await it.objects() == []


@run
async def test_parts_in_any_order_are_joined_by_number(tmp_path: Path, storage: str) -> None:
    async with filing(tmp_path, storage=storage) as it:
        begun = await it.files.begin("video/mp4", "film.mp4")
        content = {10_000: b"end", 7: b"middle" * 200_000, 1: b"begin"}
        assert await it.files.write_part(begun, 7, body(b"wrong")) == "2bda2998d9b0ee197da142a0447f6725"
        assert len(await it.objects()) == 1
        md5s = {n: await it.files.write_part(begun, n, body(data)) for n, data in content.items()}
        await it.files.write_part(begun, 9, body(b"in vain"))
        assert len(await it.objects()) == 4  # a part that was replaced is gone
        listed = [(n, md5s[n].upper()) for n in (7, 10_000, 1)]
        await it.files.complete(begun, listed)
        assert await it.content(begun.name) == content[1] + content[7] + content[10_000]
        assert len(await it.objects()) == 1
        assert await it.rows(part_rows) == 0
        await it.files.complete(begun, listed)  # a client that did not hear the answer asks again
        assert await it.content(begun.name) == content[1] + content[7] + content[10_000]


@run
async def test_what_does_not_fit_is_not_joined(tmp_path: Path) -> None:
    async with filing(tmp_path) as it:
        begun = await it.files.begin(None, None)
        one, two = [await it.files.write_part(begun, n, body(bytes([n]))) for n in (1, 2)]
        for listed in (
            [],
            [(1, one), (3, two)],
            [(1, two)],
            [(1, "")],
            [(1, one), (1, one)],
            [(0, one)],
            [(-1, one)],
            [(2**70, one)],
        ):
            with pytest.raises(InputError, match="parts"):
                await it.files.complete(begun, listed)
        for number in (0, -1, 10_001, 2**70):
            with pytest.raises(InputError, match="partNumber"):
                await it.files.write_part(begun, number, body(b"x"))
        for stranger in (
            Upload(begun.name, "a" * 22),
            Upload(STRANGER, begun.secret),
            Upload(begun.name, begun.secret, "eve"),
            Upload(await it.files.put(b"x", "image/png"), "a" * 22),
        ):
            with pytest.raises(NotFound):
                await it.files.complete(stranger, [(1, one)])
            with pytest.raises(NotFound):
                await it.files.write_part(stranger, 1, body(b"x"))
            with pytest.raises(NotFound):
                await it.files.write(stranger, body(b"x"))
        with pytest.raises(NotFound):
            await it.files.open(begun.name, "local")
        await it.files.complete(begun, [(2, two), (1, one)])
        assert await it.content(begun.name) == b"\1\2"


@run
async def test_many_who_complete_one_upload_get_one_file(tmp_path: Path) -> None:
    async with filing(tmp_path) as it:
        begun = await it.files.begin(None, None)
        listed = [(n, await it.files.write_part(begun, n, body(bytes([n]) * 1000))) for n in range(1, 20)]
        await asyncio.gather(*(it.files.complete(begun, listed) for _ in range(8)))
        assert await it.content(begun.name) == b"".join(bytes([n]) * 1000 for n in range(1, 20))
        assert len(await it.objects()) == 1


@run
async def test_parts_are_joined_once_and_count_meanwhile(tmp_path: Path) -> None:
    async with filing(tmp_path, upload_quota_bytes=2 * BLOCK + 2**16) as it:
        begun, other = [await it.files.begin(None, None, owner="alice") for _ in range(2)]
        listed = [(1, await it.files.write_part(begun, 1, body(b"x" * BLOCK)))]
        size = len(await it.objects())
        completing = [asyncio.create_task(it.files.complete(begun, listed)) for _ in range(8)]
        completing[0].cancel()
        await until(lambda: bool(it.files._joins))
        with pytest.raises(TooLarge):
            await it.files.write(other, body(b"x" * BLOCK), length=BLOCK)
        most = size
        while not all(task.done() for task in completing):
            most = max(most, len(await it.objects()))
        assert most <= 2
        assert [await task for task in completing[1:]] == [None] * 7
        assert not it.files._arriving
        await it.files.write(other, body(b"x" * BLOCK), length=BLOCK)


@run
async def test_the_uploads_of_an_owner_are_so_many_at_most(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files_module, "MOST_UNFINISHED", 3)
    monkeypatch.setattr(files_module, "MOST_ROWS", 5)
    async with filing(tmp_path) as it:
        begun = [await it.files.begin(None, None, owner="alice") for _ in range(3)]
        with pytest.raises(Overloaded, match="not complete"):
            await it.files.begin(None, None, owner="alice")
        await it.upload(b"x", owner="bob")
        for number in (1, 2):
            await it.files.write_part(begun[0], number, body(b"x"))
        with pytest.raises(TooLarge, match="files and parts"):
            await it.files.write_part(begun[0], 3, body(b"x"))
        it.clock.now += UNFINISHED_S
        await it.files.sweep()
        await it.upload(b"x", owner="alice")


@run
async def test_the_sums_of_an_owner_are_made_of_an_index_alone(tmp_path: Path) -> None:
    seen: list[str] = []

    def explain(connection: Connection) -> None:
        def listen(conn: Any, cursor: Any, statement: str, values: Any, *rest: Any) -> None:
            if statement.startswith("SELECT"):
                seen.extend(row[3] for row in cursor.connection.execute(f"EXPLAIN QUERY PLAN {statement}", values))

        event.listen(connection, "before_cursor_execute", listen)
        try:
            files_module._used(connection, "alice")
        finally:
            event.remove(connection, "before_cursor_execute", listen)

    async with filing(tmp_path) as it:
        await it.store.do(explain)
    assert sum("COVERING INDEX" in step for step in seen) == len(seen) == 3, seen


@run
async def test_a_whole_file_does_instead_of_parts(tmp_path: Path) -> None:
    async with filing(tmp_path) as it:
        begun = await it.files.begin(None, None)
        await it.files.write_part(begun, 1, body(b"part"))
        await it.files.write(begun, body(b"whole"))
        assert await it.content(begun.name) == b"whole"
        assert (len(await it.objects()), await it.rows(part_rows)) == (1, 0)


@run
async def test_rows_are_kept_alike_in_each_database(tmp_path: Path, database_url: str) -> None:
    async with filing(tmp_path, database=database_url, upload_quota_bytes=2**20, limit_bytes=150) as it:
        access = Lifecycle(access=Access("hide", (("bob", "allow"), ("\0ü", "forbid"))))
        begun = await it.files.begin("text/plain", "ü\0.txt", owner="alice", lifecycle=access)
        listed = [(n, await it.files.write_part(begun, n, body(bytes([n]) * n))) for n in (3, 1, 2, 2)]
        await asyncio.gather(*(it.files.complete(begun, listed[:3]) for _ in range(3)))
        assert await it.content(begun.name, "bob") == b"\1\2\2\3\3\3"
        with pytest.raises(NotFound):
            await it.files.open(begun.name, "eve")
        assert (await it.files.open(begun.name, "alice")).title == "ü.txt"
        with pytest.raises(TooLarge):
            await it.upload(b"x" * 2**20, owner="alice")
        half = await it.files.begin(None, None)
        await it.files.write_part(half, 1, body(b"x"))
        names = [await it.files.put(b"x" * 100, "image/png") for _ in range(2)]
        await it.files.sweep()
        assert sum([await it.files.own(f"/files/{name}") is not None for name in names]) == 1
        it.clock.now += UNFINISHED_S
        await it.files.sweep()
        assert (await it.rows(), await it.rows(part_rows), await it.objects()) == (0, 0, [])


TITLES = [
    *("a.png", "a b.png", "ünï çødé.png", "雪.png", "🖼.png", "a.tar.gz", "noext", ".png", "..", ".", "", " ", "a."),
    *("../../etc/passwd", "..\\..\\boot.ini", "/etc/passwd", "C:\\x.png", "\\\\host\\share\\x.png", "a/b/c.png", "a/"),
    *(
        "%2e%2e%2fpasswd",
        "..%00.png",
        "a\0b.png",
        "\0",
        "a\r\nSet-Cookie: x=1.png",
        "a\nb",
        "\x1b[31mred.png",
        "a;b.png",
    ),
    *('"quoted".png', "'; DROP TABLE files;--.png", "<script>.html", "a.PNG", "a.p\u202egnp.exe", "\ud800.png"),
    *(
        "x" * 300 + ".png",
        "x" * 100_000,
        "a." + "b" * 300,
        "a.png\n",
        "a.png ",
        "a.pñg",
        "a.p.n.g",
        "con.txt",
        "~",
        "$HOME",
    ),
    *(
        "a.safetensors",
        "-rf",
        "*.png",
        "a?b#c.png",
        "a&signature=b",
        "{name}.png",
        "%s%n.png",
        "\ufeff.png",
        "é\u0301.png",
    ),
]


@pytest.mark.points(63)
@run
async def test_no_name_of_a_client_does_harm(tmp_path: Path, storage: str) -> None:
    async with filing(tmp_path, storage=storage, upload_quota_bytes=2**30) as it:
        assert len(set(TITLES)) > 50
        for title in TITLES:
            name = await it.upload(b"x", title=title)
            file = await it.files.open(name, None)
            assert files_module._NAME.fullmatch(name) and len(name) <= 34
            assert name == name[:22] + name[22:].lower()
            shown = file.title or ""
            assert len(shown) <= 200 and not set(shown) & set("/\\\0\r\n\x1b\u202e\ud800")
            assert await it.content(name) == b"x"
        assert len(await it.objects()) == len(TITLES)
        beside = await asyncio.to_thread(os.listdir, tmp_path)
        assert {name for name in beside if not name.startswith("rows.db")} <= {"files"}
        for title in (None, 7, [], {}, True):
            begun = await it.files.begin(title, title)
            await it.files.write(begun, body(b"x"))
            file = await it.files.open(begun.name, None)
            assert (file.title, file.content_type) == (None, "application/octet-stream")
        for content_type in ("image", "a/b\r\nx: y", "a/b\0", "", "x" * 999, "text/html;" * 99, "ü/ü", "a/b; c=d; e"):
            begun = await it.files.begin(content_type, "x.png")
            await it.files.write(begun, body(b"x"))
            assert (await it.files.open(begun.name, None)).content_type == "application/octet-stream"


# ---- what is swept ---------------------------------------------------------------------------------------------------


@run
async def test_what_has_expired_is_removed_with_its_bytes(tmp_path: Path, storage: str) -> None:
    async with filing(tmp_path, storage=storage) as it:
        await it.files.put(b"x", "image/png")
        await it.upload(b"y")
        kept = await it.upload(b"z", lifecycle=Lifecycle(3 * UNFINISHED_S))
        begun = await it.files.begin(None, None)
        await it.files.write_part(begun, 1, body(b"half"))
        await it.files.sweep()
        assert len(await it.objects()) == 4
        it.clock.now += 100
        await it.files.sweep()
        assert (len(await it.objects()), await it.rows()) == (3, 3)
        it.clock.now += 1000
        await it.files.sweep()
        assert (len(await it.objects()), await it.rows()) == (2, 2)
        it.clock.now += UNFINISHED_S - 1200
        await it.files.write_part(begun, 2, body(b"more"))  # slow, but going on
        it.clock.now += UNFINISHED_S - 1
        await it.files.sweep()
        assert await it.rows(part_rows) == 2
        it.clock.now += 2
        await it.files.sweep()
        assert (len(await it.objects()), await it.rows(), await it.rows(part_rows)) == (1, 1, 0)
        with pytest.raises(NotFound):
            await it.files.write_part(begun, 3, body(b"late"))
        assert await it.content(kept) == b"z"


@run
async def test_the_oldest_pictures_make_room(tmp_path: Path) -> None:
    async with filing(tmp_path, limit_bytes=1000, ttl_s=10**6) as it:
        upload = await it.upload(b"u" * 5000, lifecycle=Lifecycle(10**6))
        names = []
        for _ in range(12):
            names.append(await it.files.put(b"x" * 100, "image/png"))
            it.clock.now += 1
        await it.files.sweep()
        assert await it.objects() == sorted(
            [(await it.files.open(upload, None)).place, *[await it.place(name) for name in names[2:]]]
        )
        assert it.metrics.value("lcm_rt_file_bytes") == 1000
        assert await it.content(upload) == b"u" * 5000


@run
async def test_who_has_most_makes_room(tmp_path: Path) -> None:
    async with filing(tmp_path, limit_bytes=1000, ttl_s=10**6) as it:
        few = [await it.files.put(b"x" * 100, "image/png", owner="bob") for _ in range(3)]
        running = asyncio.create_task(it.files.run())
        try:
            await until(lambda: it.metrics.value("lcm_rt_file_bytes") == 300)
            many = [await it.files.put(b"x" * 100, "image/png", owner="alice") for _ in range(8)]
            async with asyncio.timeout(SWEEP_S / 3):
                await until(lambda: it.metrics.value("lcm_rt_file_bytes") == 1000)
        finally:
            running.cancel()
        for name in few + many[1:]:
            assert len(await it.content(name)) == 100
        with pytest.raises(NotFound):
            await it.files.open(many[0], None)


@run
async def test_what_expires_while_it_is_read_is_read_to_its_end(tmp_path: Path, storage: str) -> None:
    async with filing(tmp_path, storage=storage) as it:
        data = os.urandom(3 * BLOCK)
        file = await it.files.open(await it.upload(data), None)
        blocks = [it.files.stream(file) for _ in range(2)]
        read = [await anext(some) for some in blocks]
        it.clock.now += 1000
        await it.files.sweep()
        with pytest.raises(NotFound):
            await it.files.open(file.name, None)
        await blocks[1].aclose()
        assert len(await it.objects()) == 1
        assert read[0] + b"".join([block async for block in blocks[0]]) == data
        assert await it.objects() == []


@run
async def test_bytes_without_a_row_are_removed_after_a_day(tmp_path: Path, storage: str) -> None:
    async with filing(tmp_path, storage=storage, ttl_s=10**6) as it:
        kept = await it.place(await it.files.put(b"x", "image/png"))
        fs, root = fsspec.core.url_to_fs(storage)
        strays = [await it.files._place("b" * 22), await it.files._place("c" * 22 + ".png")]
        others = ["thesis.txt", "B" * 22 + ".PNG", "x.png", "d" * 22 + ".png", f"{'0' * 16}-{'e' * 22}"]
        for name in strays + others:
            await asyncio.to_thread(fs.pipe_file, f"{root}/{name}", b"x")
        await asyncio.to_thread(fs.makedirs, f"{root}/folder.png")
        it.clock.now += STRAY_S - 60
        begun = await it.files.begin(None, None)
        await it.files.write_part(begun, 1, body(b"part"))
        await it.files.sweep()
        assert set(strays) <= set(await it.objects())
        it.clock.now += 3600
        await it.files.write_part(await it.files.begin(None, None), 2, body(b"part"))
        await it.files.sweep()
        assert set(await it.objects()) >= {kept, *others}
        assert not set(strays) & set(await it.objects())


@run
async def test_who_shares_the_storage_is_left_alone(tmp_path: Path, storage: str) -> None:
    (tmp_path / "b").mkdir()
    async with filing(tmp_path, storage=storage) as first, filing(tmp_path / "b", storage=storage) as second:
        name = await first.upload(b"precious", lifecycle=Lifecycle(10 * STRAY_S))
        for it in (first, second):
            it.clock.now += 2 * STRAY_S
            await it.files.sweep()
        assert await first.content(name) == b"precious"
    async with filing(tmp_path, storage=storage) as again:  # it is the same one after a restart
        stray = await first.files._place("b" * 22)
        await again.files._objects.put(stray, b"x")
        again.clock.now += 2 * STRAY_S
        await again.files.sweep()
        assert stray not in await again.objects()
        assert await again.content(name) == b"precious"


@run
async def test_what_a_crash_left_is_harmless(tmp_path: Path) -> None:
    """A process that ends after the bytes and before the row: the upload can be tried again."""
    async with filing(tmp_path) as it:
        begun = await it.files.begin(None, None)
        await Objects(tmp_path / "files").put(await it.files._place("d" * 22), b"half")
    async with filing(tmp_path) as it:
        await it.files.write(begun, body(b"whole"))
        assert await it.content(begun.name) == b"whole"
        it.clock.now += STRAY_S
        await it.files.sweep()
        assert await it.objects() == []


# ---- a storage that fails --------------------------------------------------------------------------------------------


class FullDisk(LocalFileSystem):  # type: ignore[misc]
    """A disk with room for a block and no more in each file."""

    protocol = "full"
    cachable = False

    def _open(self, path: str, mode: str = "rb", **options: Any) -> Any:
        file = super()._open(path, mode, **options)
        if "w" in mode:
            write: Callable[[bytes], int] = file.write

            def limited(data: bytes) -> int:
                if file.tell() + len(data) > BLOCK:
                    write(data[:7])
                    raise OSError(errno.ENOSPC, "No space left on device")
                return write(data)

            file.write = limited
        return file


@run
async def test_a_full_disk_is_a_typed_error_and_leaves_nothing(tmp_path: Path) -> None:
    fsspec.register_implementation("full", FullDisk, clobber=True)
    async with filing(tmp_path, storage=f"full://{tmp_path}/files") as it:
        begun = await it.files.begin(None, None)
        for large in (body(b"x" * (BLOCK + 1)), body(b"x" * BLOCK, b"x")):
            with pytest.raises(Unavailable):
                await it.files.write(begun, large)
        with pytest.raises(Unavailable):
            await it.files.write_part(begun, 1, body(b"x" * BLOCK, b"x"))
        with pytest.raises(Unavailable):
            await it.files.put(b"x" * (BLOCK + 1), "image/png")
        assert not list((tmp_path / "files").iterdir())
        listed = [(n, await it.files.write_part(begun, n, body(b"x" * (BLOCK - 1)))) for n in (1, 2)]
        with pytest.raises(Unavailable):
            await it.files.complete(begun, listed)
        assert len(list((tmp_path / "files").iterdir())) == 2
        await it.files.write(begun, body(b"fits"))
        assert await it.content(begun.name) == b"fits"


@run
async def test_a_storage_that_cannot_be_reached_is_a_typed_error(tmp_path: Path) -> None:
    (tmp_path / "files").write_text("a file where the folder should be")
    async with filing(tmp_path) as it:
        begun = await it.files.begin(None, None)
        with pytest.raises(Unavailable):
            await it.files.put(b"x", "image/png")
        with pytest.raises(Unavailable):
            await it.files.write(begun, body(b"x"))
        await it.files.sweep()


@pytest.mark.parametrize("url", ["nosuch://x", "s3x://bucket"])
def test_an_unknown_storage_is_a_typed_error(url: str) -> None:
    with pytest.raises(LcmError, match="files cannot be kept there"):
        Objects(url)

"""LoRAs by URL: fetched once for all, only safetensors, never more than there is room for."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import io
import json
import os
import pickle
import re
import signal
import sys
import time
import zipfile
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from serving import run, until
from test_egress import Host, Names, Serve, answer, hosting, identity, make, silence

from lcm_rt import loras as loras_module
from lcm_rt.egress import REFUSED, Egress
from lcm_rt.errors import DownloadError, InputError, Overloaded, Unavailable
from lcm_rt.files import Access, Files, Lifecycle
from lcm_rt.loras import GRACE_S, TTL_S, Loras
from lcm_rt.metrics import Metrics
from lcm_rt.store import Store as Rows


def safetensors(header: Any, body: bytes = b"", *, length: int | None = None) -> bytes:
    """A file with this header, whatever it is worth."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + body


def entry(begin: int = 0, end: int = 8, dtype: Any = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": [(end - begin) // 4], "data_offsets": [begin, end]}


def lora(mark: int = 0, size: int = 8) -> bytes:
    """A small LoRA; each ``mark`` has other bytes."""
    return safetensors({"__metadata__": {"mark": str(mark)}, "up": entry(0, size)}, bytes(size))


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def data_uri(data: bytes) -> str:
    return "data:application/octet-stream;base64," + base64.b64encode(data).decode()


def files_of(folder: Path, egress: Egress | None = None, *, rows: Rows | None = None, storage: str = "") -> Files:
    """Files to look for a LoRA in; their rows are looked at only for URLs that may be of ours."""
    return Files(
        rows or Rows(f"sqlite:///{folder}/rows.db"),
        storage or folder / "files",
        ttl_s=100,
        limit_bytes=10**6,
        upload_ttl_s=100,
        upload_limit_bytes=10**7,
        upload_quota_bytes=10**8,
        metrics=Metrics(),
        egress=egress,
    )


class Store:
    """A Loras that reaches ``host`` under any name, and what is around it."""

    def __init__(
        self,
        folder: Path,
        host: Host | None = None,
        *,
        limit_bytes: int = 10**6,
        hub: str | None = None,
        rows: Rows | None = None,
        storage: str = "",
    ) -> None:
        self.folder = folder / "loras"
        self.folder.mkdir(exist_ok=True)
        client, self.dialer = make(host or Host(silence), fetch_private=True)
        self.files = files_of(folder, client, rows=rows, storage=storage)
        self.loras = Loras(self.folder, files=self.files, egress=client, limit_bytes=limit_bytes, hub=hub)

    async def find(self, url: str, **options: Any) -> Path:
        return await self.loras.find("lora_url", url, **options)

    async def upload(self, data: bytes, **options: Any) -> str:
        """The name of a new file of ours."""

        async def body() -> AsyncIterator[bytes]:
            yield data

        begun = await self.files.begin(None, "a.safetensors", **options)
        await self.files.write(begun, body())
        return begun.name

    def names(self) -> list[str]:
        return sorted(path.name for path in self.folder.iterdir())


async def store(*args: Any, **options: Any) -> Store:
    return await asyncio.to_thread(lambda: Store(*args, **options))


async def names(it: Store) -> list[str]:
    return await asyncio.to_thread(it.names)


def serving_bytes(data: bytes) -> Serve:
    async def serve(host: Host, path: str, writer: asyncio.StreamWriter) -> None:
        await answer(writer, data)

    return serve


async def by_number(host: Host, path: str, writer: asyncio.StreamWriter) -> None:
    await answer(writer, lora(int(path[1:])))


class Clock:
    """The module's time, moved by hand."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = time.time()
        monkeypatch.setattr(loras_module, "time", self)

    def time(self) -> float:
        return self.now

    monotonic = time


@run
async def test_a_lora_lies_under_the_hash_of_its_bytes(tmp_path: Path) -> None:
    async with hosting(serving_bytes(lora())) as host:
        it = await store(tmp_path, host)
        path = await it.find("http://pictures.example/a.safetensors")
        assert await asyncio.to_thread(path.read_bytes) == lora()
        assert path.name == f"{sha256(lora())}.safetensors"
        assert await it.find("http://pictures.example/a.safetensors") == path
        assert host.connections == 1
        assert await it.find("http://pictures.example/b.safetensors") == path  # the same bytes elsewhere
        assert await names(it) == [path.name]


@run
async def test_a_lora_may_be_a_data_uri(tmp_path: Path) -> None:
    it = await store(tmp_path)
    path = await it.find(data_uri(lora(1)))
    assert path.name == f"{sha256(lora(1))}.safetensors"
    assert await it.find(data_uri(lora(1))) == path
    for uri in ("data:", "data:;base64,?", "data:;base64," + "A" * 4):
        with pytest.raises(DownloadError, match="lora_url"):
            await it.find(uri)


@pytest.mark.parametrize("storage", ["", "memory://loras"])
def test_a_lora_may_be_a_file_of_ours(tmp_path: Path, storage: str) -> None:
    @run
    async def walk() -> None:
        async with Rows(f"sqlite:///{tmp_path}/rows.db") as rows:
            it = await store(tmp_path, rows=rows, storage=storage, limit_bytes=10**7)
            large = lora(2, size=3 * 2**20)
            name = await it.upload(large)
            for url in (f"/files/{name}", f"/cdn/files/{name}", f"http://127.0.0.1:1/files/{name}"):
                path = await it.find(url)
                assert path.name == f"{sha256(large)}.safetensors"
                assert await asyncio.to_thread(path.read_bytes) == large
            assert it.dialer.dialled == []
            with pytest.raises(DownloadError, match="lora_url: there is no such file here"):
                await it.find("/files/" + "a" * 22 + ".png")
            too_large = await it.upload(lora(size=2 * 10**6))
            it.loras._limit_bytes = 10**6
            with pytest.raises(DownloadError, match="lora_url: is larger than 1,000,000 bytes"):
                await it.find(f"/files/{too_large}")
            picture = await it.files.put(b"png", "image/png")
            with pytest.raises(DownloadError, match="is not a safetensors file"):
                await it.find(f"/files/{picture}")
            assert await names(it) == [path.name]

    walk()


@run
async def test_a_private_lora_is_for_whom_its_owner_says(tmp_path: Path) -> None:
    async with Rows(f"sqlite:///{tmp_path}/rows.db") as rows:
        it = await store(tmp_path, rows=rows)
        private = Lifecycle(access=Access("hide", (("bob", "allow"),)))
        url = "/files/" + await it.upload(lora(), owner="alice", lifecycle=private)
        path = await it.find(url, owner="alice")
        assert await it.find(url, owner="bob") == path
        for _ in range(2):  # though it lies here now
            with pytest.raises(DownloadError, match="there is no such file here"):
                await it.find(url, owner="eve")
        assert await it.find(url, owner="alice") == path


@run
async def test_a_lora_may_be_one_of_the_hub(tmp_path: Path) -> None:
    async def serve(host: Host, path: str, writer: asyncio.StreamWriter) -> None:
        await answer(writer, lora(int(re.findall(r"\d", path)[-1])))

    client_names = Names(huggingface_co=[["18.164.174.23"]])
    async with hosting(serve, await asyncio.to_thread(identity, tmp_path)) as host:
        client, _ = make(host, names=client_names)
        files = files_of(tmp_path, client)
        options: dict[str, Any] = {"files": files, "egress": client, "limit_bytes": 10**6}
        it = await asyncio.to_thread(lambda: Loras(tmp_path / "loras", hub="https://huggingface.co", **options))
        for url, path in {
            "hf:an-owner/a.name/lora_1.safetensors": "/an-owner/a.name/resolve/main/lora_1.safetensors",
            "hf:o/n/sub/x (2).safetensors@v1.0": "/o/n/resolve/v1.0/sub/x%20%282%29.safetensors",
            "hf:o/n/雪3.safetensors@refs/pr/1": "/o/n/resolve/refs%2Fpr%2F1/%E9%9B%AA3.safetensors",
        }.items():
            await it.find("lora_url", url)
            assert host.requests[-1].split()[1] == path
            assert host.header("authorization") is None
        count = host.connections
        for bad in (
            "hf:",
            "hf:x",
            "hf:o/n",
            "hf:o/n/x.bin",
            "hf:o/n/x.safetensors.ckpt",
            "hf:o/../x.safetensors",
            "hf:o/n/../../x.safetensors",
            "hf:o/n/x.safetensors@",
            "hf:o/n/x.safetensors@../x",
            "hf:o/n/x\n.safetensors",
            "hf:o@127.0.0.1/n/x.safetensors",
            "hf:o/n/" + "x" * 9000 + ".safetensors",
        ):
            with pytest.raises(InputError, match="lora_url"):
                await it.find("lora_url", bad)
        closed = await asyncio.to_thread(lambda: Loras(tmp_path / "loras", hub=None, **options))
        with pytest.raises(InputError, match="not allowed"):
            await closed.find("lora_url", "hf:o/n/x_1.safetensors")
        assert host.connections == count


@pytest.mark.parametrize(
    "url", ["", "x", "ftp://x/a.safetensors", "file:///etc/passwd", "/etc/passwd", "C:\\x", "//h/x"]
)
def test_other_addresses_are_no_loras(url: str, tmp_path: Path) -> None:
    @run
    async def walk() -> None:
        with pytest.raises(InputError, match="lora_url") as caught:
            await (await store(tmp_path)).find(url)
        assert caught.value.kind == "url_scheme"

    walk()


@run
async def test_plain_http_and_private_hosts_are_for_those_who_allow_them(tmp_path: Path) -> None:
    async with hosting(serving_bytes(lora())) as host:
        client, dialer = make(host)
        files = files_of(tmp_path, client)
        it = await asyncio.to_thread(
            lambda: Loras(tmp_path / "loras", files=files, egress=client, limit_bytes=10**6, hub=None)
        )
        for url in ("http://pictures.example/x", "https://127.0.0.1/x", "https://169.254.169.254/x"):
            with pytest.raises(DownloadError, match=f"lora_url: {REFUSED}"):
                await it.find("lora_url", url)
        assert dialer.dialled == []


class Canary:
    """What it does is done when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def zipped(data: bytes) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("archive/data.pkl", data)
    return file.getvalue()


GOOD = {"up": entry()}
DEEP = 100_000
BAD = {
    "nothing": b"",
    "short": b"\x02\x00",
    "text": b"<!DOCTYPE html><html>not found</html>",
    "png": b"\x89PNG\r\n\x1a\n" + bytes(100),
    "no json": safetensors(b"{]", bytes(8)),
    "no utf-8": safetensors(b'{"\xff": 1}', bytes(8)),
    "list": safetensors([GOOD], bytes(8)),
    "text entry": safetensors({"up": "F32"}, bytes(8)),
    "number entry": safetensors({"up": 1}, bytes(8)),
    "no tensors": safetensors({}),
    "notes alone": safetensors({"__metadata__": {"a": "b"}}),
    "deep": safetensors(b"[" * DEEP + b"]" * DEEP),
    "deep entry": safetensors(b'{"a":' * DEEP + b"1" + b"}" * DEEP),
    "marks": safetensors({"__metadata__": {"notes": "[" * 200_001}, **GOOD}, bytes(8)),
    "huge number": safetensors(b'{"up": ' + b"9" * 5000 + b"}"),
    "header beyond the end": safetensors(GOOD, bytes(8), length=10**6),
    "header of 2**63": safetensors(GOOD, bytes(8), length=2**63),
    "header of nothing": safetensors(GOOD, bytes(8), length=0),
    "header of 5 MiB": safetensors(b" " * (5 * 2**20) + json.dumps(GOOD).encode(), bytes(8)),
    "integers": safetensors({"up": entry(dtype="I64")}, bytes(8)),
    "no dtype": safetensors({"up": {"shape": [2], "data_offsets": [0, 8]}}, bytes(8)),
    "dtype list": safetensors({"up": entry(dtype=["F32"])}, bytes(8)),
    "dtype map": safetensors({"up": entry(dtype={"F32": 1})}, bytes(8)),
    "no offsets": safetensors({"up": {"dtype": "F32", "shape": [2]}}, bytes(8)),
    "three offsets": safetensors({"up": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8, 8]}}, bytes(8)),
    "text offsets": safetensors({"up": {"dtype": "F32", "shape": [2], "data_offsets": ["0", "8"]}}, bytes(8)),
    "float offsets": safetensors({"up": {"dtype": "F32", "shape": [2], "data_offsets": [0.0, 8.0]}}, bytes(8)),
    "negative": safetensors({"up": entry(-8, 0)}, bytes(8)),
    "backwards": safetensors({"up": entry(8, 0)}, bytes(8)),
    "hole": safetensors({"up": entry(0, 8), "down": entry(16, 24)}, bytes(24)),
    "overlap": safetensors({"up": entry(0, 8), "down": entry(4, 12)}, bytes(12)),
    "truncated": safetensors(GOOD, bytes(7)),
    "tail": safetensors(GOOD, bytes(9)),
    "many": safetensors({str(n): entry(0, 0) for n in range(4001)}),
}


@run
async def test_what_is_no_safetensors_file_is_not_kept(tmp_path: Path) -> None:
    it = await store(tmp_path, limit_bytes=2**23)
    for name, data in BAD.items():
        with pytest.raises(DownloadError, match="lora_url: (is not a safetensors file|has .*tensors)"):
            pytest.fail(f"{name} was taken for {await it.find(data_uri(data))}")
    assert await names(it) == []
    for data in (
        lora(),
        safetensors({"down": entry(8, 16, "BF16"), "alpha": entry(16, 16, "F16"), "up": entry()}, bytes(16)),
        safetensors({str(n): entry(0, 0) for n in range(4000)}),
        safetensors({"__metadata__": {"ss_tags": json.dumps({str(n): n for n in range(20_000)})}, **GOOD}, bytes(8)),
    ):
        assert (await it.find(data_uri(data))).name == f"{sha256(data)}.safetensors"


@run
async def test_a_pickle_with_the_name_of_a_lora_is_never_opened(tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    poison = pickle.dumps(Canary(canary))
    polyglots = [
        poison,
        zipped(poison),
        lora() + zipped(poison),
        lora() + poison,
        safetensors({**GOOD, "rest": entry(16, 24)}, bytes(8) + poison[:8] + bytes(8)),
    ]
    bodies = dict(enumerate(polyglots))

    async def serve(host: Host, path: str, writer: asyncio.StreamWriter) -> None:
        await answer(writer, bodies[int(path[1])])

    async with hosting(serve) as host:
        it = await store(tmp_path, host)
        for number, body in bodies.items():
            for url in (f"http://pictures.example/{number}.safetensors", data_uri(body)):
                with pytest.raises(DownloadError, match="is not a safetensors file"):
                    await it.find(url)
        assert await names(it) == []
        assert not canary.exists()
        pickle.loads(poison)
        assert canary.exists()  # it would have sung


@run
async def test_many_who_ask_at_once_cause_one_download(tmp_path: Path) -> None:
    ready = asyncio.Event()

    async def serve(host: Host, path: str, writer: asyncio.StreamWriter) -> None:
        await ready.wait()
        await answer(writer, lora())

    async with hosting(serve) as host:
        it = await store(tmp_path, host)
        asking = [asyncio.create_task(it.find("http://pictures.example/x")) for _ in range(20)]
        await until(lambda: bool(host.requests))
        asking[0].cancel()  # the one who asked first, too
        ready.set()
        paths = await asyncio.gather(*asking, return_exceptions=True)
        assert isinstance(paths[0], asyncio.CancelledError)
        assert set(paths[1:]) == {it.folder / f"{sha256(lora())}.safetensors"}
        assert host.connections == 1
        # When the last has left, as with a newer message in the place of each, its place is free for another.
        ready.clear()
        alone = asyncio.create_task(it.find("http://pictures.example/y"))
        await until(lambda: len(host.requests) == 2)
        [flight] = it.loras._flights.values()
        alone.cancel()
        await until(flight.task.cancelled)
        assert not it.loras._flights
        ready.set()
        assert await it.find("http://pictures.example/y") == paths[1]
        assert host.connections == 3


@run
async def test_all_who_wait_for_a_failure_hear_of_it_by_their_own_field(tmp_path: Path) -> None:
    async with hosting(serving_bytes(b"junk")) as host:
        it = await store(tmp_path, host)
        fields = ("lora_url", "loras.0.path")
        answers = await asyncio.gather(
            *(it.loras.find(field, "http://pictures.example/x") for field in fields), return_exceptions=True
        )
        assert [(type(a), a.field) for a in answers if isinstance(a, InputError)] == [
            (DownloadError, f) for f in fields
        ]
        assert host.connections == 1
        with pytest.raises(DownloadError):  # and a failure is not remembered
            await it.find("http://pictures.example/x")
        assert host.connections == 2


@run
async def test_no_more_than_some_are_fetched_at_a_time(tmp_path: Path) -> None:
    ready = asyncio.Event()

    async def serve(host: Host, path: str, writer: asyncio.StreamWriter) -> None:
        await ready.wait()
        await by_number(host, path, writer)

    async with hosting(serve) as host:
        it = await store(tmp_path, host)
        asking = [asyncio.create_task(it.find(f"http://pictures.example/{n}")) for n in range(8)]
        await until(lambda: host.connections == 8)
        with pytest.raises(Overloaded):
            await it.find("http://pictures.example/9")
        same = asyncio.create_task(it.find("http://pictures.example/0"))
        ready.set()
        await asyncio.gather(*asking, same)
        await it.find("http://pictures.example/9")


@run
async def test_no_owner_takes_the_places_of_others(tmp_path: Path) -> None:
    ready = asyncio.Event()

    async def serve(host: Host, path: str, writer: asyncio.StreamWriter) -> None:
        await ready.wait()
        await by_number(host, path, writer)

    async with hosting(serve) as host, Rows(f"sqlite:///{tmp_path}/rows.db") as rows:
        it = await store(tmp_path, host, rows=rows)
        own = f"http://pictures.example/files/{await it.upload(lora(7), owner='alice')}"
        asking = [asyncio.create_task(it.find(f"http://pictures.example/{n}", owner="alice")) for n in range(2)]
        await until(lambda: host.connections == 2)
        with pytest.raises(Overloaded):
            await it.find("http://pictures.example/2", owner="alice")
        for url in (own, data_uri(lora(8))):  # no other host is asked for these
            await it.find(url, owner="alice")
        other = asyncio.create_task(it.find("http://pictures.example/2", owner="bob"))
        await until(lambda: host.connections == 3)
        asking.pop().cancel()
        asking.append(asyncio.create_task(it.find("http://pictures.example/3", owner="alice")))
        await until(lambda: host.connections == 4)
        ready.set()
        await asyncio.gather(*asking, other)


@run
async def test_a_changed_file_is_noticed_without_a_stop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    body, fault = lora(1), False

    async def serve(host: Host, path: str, writer: asyncio.StreamWriter) -> None:
        await (answer(writer, b"", "503 Busy") if fault else answer(writer, body))

    clock = Clock(monkeypatch)
    url = "http://pictures.example/x"
    async with hosting(serve) as host:
        it = await store(tmp_path, host)
        first = await it.find(url)
        body = lora(2)
        clock.now += TTL_S - 1
        assert await it.find(url) == first
        assert host.connections == 1
        clock.now += 2  # in use, and stale: the old one at once, the new one as soon as it is here
        assert await it.find(url) == first
        await until(lambda: not it.loras._flights)
        second = await it.find(url)
        assert second.name == f"{sha256(lora(2))}.safetensors"
        assert host.connections == 2
        fault = True  # a host that is out of order stops nobody
        for _ in range(3):
            clock.now += TTL_S - 1
            assert await it.find(url) == second
            await until(lambda: not it.loras._flights)
        assert host.connections == 3
        clock.now += TTL_S  # unused for long: who asks wants what is there now
        with pytest.raises(DownloadError, match="503"):
            await it.find(url)
        fault, body = False, lora(3)
        clock.now += TTL_S
        assert (await it.find(url)).name == f"{sha256(lora(3))}.safetensors"


@run
async def test_those_unused_for_longest_make_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    size = len(lora())
    clock = Clock(monkeypatch)
    async with hosting(by_number) as host:
        it = await store(tmp_path, host, limit_bytes=3 * size)

        def age(path: Path, seconds: float) -> None:
            os.utime(path, (clock.now - seconds,) * 2)

        paths = [await it.find(f"http://pictures.example/{n}") for n in range(3)]
        with pytest.raises(Overloaded):  # all may be about to be read
            await it.find("http://pictures.example/3")
        assert await names(it) == sorted(path.name for path in paths)
        for number, path in enumerate(paths):
            age(path, GRACE_S + 100 - number)
        await it.find("http://pictures.example/0")  # used now
        paths.append(await it.find("http://pictures.example/3"))
        assert await names(it) == sorted(paths[n].name for n in (0, 2, 3))
        fetched = host.connections
        assert await it.find("http://pictures.example/1") == paths[1]  # gone, so fetched again, in the place of 2
        assert host.connections == fetched + 1
        assert await names(it) == sorted(paths[n].name for n in (0, 1, 3))
        with pytest.raises(DownloadError, match="larger than"):
            await it.find(data_uri(lora(9, size=4 * size)))
        thesis = it.folder / "thesis.safetensors"
        thesis.write_text("years of work")
        await store(tmp_path, limit_bytes=1)
        assert thesis.exists()


@run
async def test_a_full_disk_is_no_answer_and_no_crash(tmp_path: Path) -> None:
    async with hosting(serving_bytes(lora())) as host:
        it = await store(tmp_path, host)
        it.folder.rmdir()
        for url in ("http://pictures.example/x", data_uri(lora())):
            with pytest.raises(Unavailable):
                await it.find(url)


async def half(host: Host, path: str, writer: asyncio.StreamWriter) -> None:
    """Most of a LoRA, and then nothing more."""
    writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 4000000\r\n\r\n" + lora(size=3_000_000)[:2_900_000])
    await writer.drain()
    await asyncio.sleep(60)


VICTIM = """
import asyncio, sys
from pathlib import Path
from lcm_rt.egress import Egress
from lcm_rt.loras import Loras
from test_loras import files_of

folder, url = Path(sys.argv[1]), sys.argv[2]
egress = Egress(fetch_private=True)
loras = Loras(folder / "loras", files=files_of(folder, egress), egress=egress, limit_bytes=10**7, hub=None)
asyncio.run(loras.find("lora_url", url))
"""


@run
async def test_a_kill_during_a_download_leaves_nothing(tmp_path: Path) -> None:
    folder = tmp_path / "loras"
    async with hosting(half) as host:
        url = f"http://127.0.0.1:{host.port}/x.safetensors"
        victim = await asyncio.create_subprocess_exec(
            *(sys.executable, "-c", VICTIM, str(tmp_path), url), cwd=Path(__file__).parent
        )
        await until(lambda: any(path.stat().st_size for path in folder.glob("*.part")))
        victim.send_signal(signal.SIGKILL)
        await victim.wait()
    assert [path.suffix for path in folder.iterdir()] == [".part"]
    assert await names(await store(tmp_path)) == []


@run
async def test_a_server_that_stops_leaves_nothing(tmp_path: Path) -> None:
    async with hosting(half) as host:
        it = await store(tmp_path, host, limit_bytes=10**7)
        asking = asyncio.create_task(it.find("http://pictures.example/x"))
        await until(lambda: any(name.endswith(".part") for name in it.names()))
        for task in [asking, *(flight.task for flight in it.loras._flights.values())]:
            task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asking
        await until(lambda: not it.names())


@run
async def test_the_map_of_urls_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loras_module, "_MAX_KNOWN", 3)
    async with hosting(by_number) as host:
        it = await store(tmp_path, host)
        for number in (0, 1, 2, 0, 3, 4):
            await it.find(f"http://pictures.example/{number}")
        assert list(it.loras._known) == [f"http://pictures.example/{n}" for n in (0, 3, 4)]
        assert host.connections == 5


def test_a_loras_folder_is_made(tmp_path: Path) -> None:
    Loras(tmp_path / "a" / "b", files=files_of(tmp_path), egress=Egress(), limit_bytes=1, hub=None)
    assert (tmp_path / "a" / "b").is_dir()

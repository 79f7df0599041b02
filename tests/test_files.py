"""Answered pictures by URL."""

from __future__ import annotations

import asyncio
import os
import time
from pathlib import Path

import pytest
from serving import run
from test_egress import Host, answer, hosting, make

from lcm_rt import files as files_module
from lcm_rt.egress import MAX_URL, REFUSED, Egress
from lcm_rt.errors import DownloadError, ImageError, InputError, NotFound
from lcm_rt.files import Files
from lcm_rt.metrics import Metrics


def files(folder: Path, egress: Egress | None = None) -> Files:
    egress = egress or make(Host(say_path))[0]
    return Files(folder / "files", ttl_s=100, limit_bytes=1000, metrics=Metrics(), egress=egress)


async def say_path(host: Host, path: str, writer: asyncio.StreamWriter) -> None:
    await answer(writer, path.encode())


@run
async def test_what_is_put_is_found_until_it_expires(tmp_path: Path) -> None:
    it = files(tmp_path)
    name = await it.put(b"jpeg", "image/jpeg")
    path = await it.find(name)
    assert path.suffix == ".jpg"
    for url in (f"http://somewhere/files/{name}", f"/files/{name}"):
        assert await it.read("image_url", url) == b"jpeg"
    os.utime(path, (0, 0))
    with pytest.raises(NotFound):
        await it.find(name)
    with pytest.raises(ImageError, match="image_url"):
        await it.read("image_url", f"/files/{name}")


@run
async def test_no_name_leads_out_of_the_folder(tmp_path: Path) -> None:
    it = files(tmp_path)
    await it.put(b"x", "image/png")
    (tmp_path / "secret.png").write_text("secret")
    for name in ("../secret.png", "..%2fsecret.png", "/etc/passwd", "", ".", "a" * 22 + ".txt"):
        with pytest.raises(NotFound):
            await it.find(name)


@run
async def test_a_sweep_leaves_what_is_not_ours(tmp_path: Path) -> None:
    it = files(tmp_path)
    await it.put(b"x", "image/png")
    thesis = tmp_path / "files" / "thesis.txt"
    thesis.write_text("years of work")
    (tmp_path / "files" / "folder.png").mkdir()
    await asyncio.to_thread(it.sweep, time.time() + 10_000)
    assert sorted(path.name for path in (tmp_path / "files").iterdir()) == ["folder.png", "thesis.txt"]


@pytest.mark.parametrize("url", ["file:///etc/passwd", "ftp://x", "//[", "x", "", "x" * (MAX_URL + 1)])
def test_other_addresses_are_not_read(tmp_path: Path, url: str) -> None:
    @run
    async def walk() -> None:
        with pytest.raises(InputError, match="mask_url") as caught:
            await files(tmp_path).read("mask_url", url)
        assert caught.value.kind == "url_scheme"

    walk()


@run
async def test_files_of_ours_are_told_from_those_of_others(tmp_path: Path) -> None:
    async with hosting(say_path) as host:
        client, dialer = make(host)
        it = files(tmp_path, client)
        name = await it.put(b"ours", "image/png")
        stranger = "a" * 22 + ".png"
        for url in (f"/files/{name}", f"http://pictures.example/files/{name}", f"https://x:99/files/{name}?a#b"):
            assert await it.path_of(url) == await it.find(name)
            assert await it.read("image_url", url) == b"ours"
        assert dialer.dialled == []
        for path in (f"/files/{stranger}", "/files/cat.png", f"/{name}", f"/files/files/{name}", "/a.png"):
            assert await it.path_of(f"http://pictures.example{path}") is None
            assert await it.read("image_url", f"http://pictures.example{path}") == path.encode()
        assert len(dialer.dialled) == 5
        # Ours that is gone is gone under every name, though nothing is fetched from our own network.
        for url in (f"/files/{stranger}", f"http://127.0.0.1:8000/files/{stranger}", "/files/x"):
            with pytest.raises(ImageError, match="image_url: there is no such file here"):
                await it.read("image_url", url)
        with pytest.raises(DownloadError, match=f"image_url: {REFUSED}"):
            await it.read("image_url", "http://127.0.0.1:8000/files/cat.png")
        assert await it.path_of("/files/" + "a" * MAX_URL) is None


@run
async def test_a_picture_of_another_host_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with hosting(say_path) as host:
        it = files(tmp_path, make(host)[0])
        monkeypatch.setattr(files_module, "MAX_FETCH_BYTES", 5)
        assert await it.read("mask_url", "HTTP://pictures.example/1234") == b"/1234"
        with pytest.raises(DownloadError, match="mask_url: is larger than 5 bytes"):
            await it.read("mask_url", "http://pictures.example/12345")

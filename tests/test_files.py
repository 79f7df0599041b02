"""Answered pictures by URL."""

from __future__ import annotations

import asyncio
import os
import time
from pathlib import Path

import pytest
from serving import run

from lcm_rt.errors import ImageError, InputError, NotFound
from lcm_rt.files import Files
from lcm_rt.metrics import Metrics


def files(folder: Path) -> Files:
    return Files(folder / "files", ttl_s=100, limit_bytes=1000, metrics=Metrics())


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


@pytest.mark.parametrize("url", ["http://example.com/a.png", "file:///etc/passwd", "ftp://x", "//[", "x"])
def test_other_addresses_are_not_read(tmp_path: Path, url: str) -> None:
    @run
    async def walk() -> None:
        with pytest.raises(InputError, match="mask_url"):
            await files(tmp_path).read("mask_url", url)

    walk()

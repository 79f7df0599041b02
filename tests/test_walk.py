"""Bytes in, bytes out, through everything: real engine process, real networks, random weights."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path
from typing import Any

import numpy as np
from checkpoints import write_checkpoint
from serving import hear, run, say, serving
from test_realtime import picture, pixels

COMMAND = (sys.executable, "-m", "lcm_rt.worker")
SIDE = 64


@run
async def test_two_clients_share_a_forward_and_each_gets_its_solo_picture(tmp_path: Path) -> None:
    folder = tmp_path / "tiny"
    await asyncio.to_thread(write_checkpoint, folder, tiny_vae=True)
    jobs: list[dict[str, Any]] = [
        {"prompt": "red cat", "seed": 1, "image_size": {"width": SIDE, "height": SIDE}, "num_inference_steps": 8},
        {"prompt": "a dog", "seed": 2, "image_bytes": picture(), "strength": 0.6, "num_inference_steps": 6},
    ]
    async with serving(tmp_path, command=COMMAND, models=[f"tiny={folder}"]) as server:
        async with server.connect() as one, server.connect() as two:

            async def paint(client: Any, job: dict[str, Any]) -> np.ndarray:
                await say(client, **job, format="png")
                answer = await hear(client)
                return pixels(answer["images"][0]["content"]).astype(int)

            solo = [await paint(one, job) for job in jobs]
            assert server.metric("lcm_rt_batch_rows_bucket", le="1.0") == 2
            # Under load from both, most forwards are shared.
            for _ in range(5):
                together = await asyncio.gather(paint(one, jobs[0]), paint(two, jobs[1]))
                for alone, shared in zip(solo, together, strict=True):
                    assert np.abs(alone - shared).max() <= 1, "kernels differ by batch size, by one level at most"
            assert server.metric("lcm_rt_batch_rows_count") > server.metric("lcm_rt_batch_rows_bucket", le="1.0")
        assert (solo[0] != solo[1]).any()


def test_the_front_of_a_live_server_has_no_torch(server_url: str) -> None:
    """The process that owns the sockets maps no library of torch."""
    port = int(server_url.rpartition(":")[2])
    front = next(pid for pid in Path("/proc").iterdir() if pid.name.isdigit() and _holds_port(pid, port))
    assert "torch" not in (front / "maps").read_text()


def _holds_port(process: Path, port: int) -> bool:
    try:
        inodes = {
            fields[9]
            for line in (process / "net" / "tcp").read_text().splitlines()[1:]
            if (fields := line.split())[1].endswith(f":{port:04X}") and fields[3] == "0A"
        }
        links = {link.readlink().name for link in (process / "fd").iterdir() if link.is_symlink()}
    except OSError:
        return False
    return any(f"socket:[{inode}]" in links for inode in inodes)

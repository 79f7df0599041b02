"""The command line, as a user types it."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
from serving import run, serving

from lcm_rt.errors import Unauthorized

HEAVY = ("torch", "numpy", "pydantic", "starlette", "sqlalchemy", "jwt", "huggingface_hub", "rich.table")


def lcm_rt(*words: str, **variables: str) -> subprocess.CompletedProcess[str]:
    env = os.environ | {"COLUMNS": "200"} | variables
    return subprocess.run([sys.executable, "-m", "lcm_rt", *words], capture_output=True, text=True, timeout=60, env=env)


def test_help_names_the_commands_and_imports_nothing_heavy() -> None:
    assert all(word in lcm_rt("--help").stdout for word in ("serve", "generate", "pull", "models", "keys"))
    code = f"import sys, lcm_rt.cli; print([m for m in {HEAVY} if m in sys.modules])"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "[]"


def row(table: str, name: str) -> list[str]:
    """The cells of the row of ``lcm-rt models`` that begins with ``name``."""
    rows = ([cell.strip() for cell in line.split("│")[1:-1]] for line in table.splitlines())
    return next(cells for cells in rows if cells and cells[0] == name)


def test_models_tells_what_is_here_without_a_server(tmp_path: Path) -> None:
    table = lcm_rt("models", "--url", "http://127.0.0.1:9", HF_HOME=str(tmp_path)).stdout
    assert row(table, "embedded")[:6] == ["embedded", "256x256", "4", "Apache-2.0", "yes", "no server"]
    assert row(table, "sdxl-turbo") == [
        *("sdxl-turbo", "512x512", "1", "Stability AI Community", "no", "no server", "")
    ]
    blobs = tmp_path / "hub" / "models--Lykon--dreamshaper-7" / "blobs"
    blobs.mkdir(parents=True)
    (blobs / "x.incomplete").write_bytes(bytes(2000))
    assert (
        row(lcm_rt("models", "--url", "http://127.0.0.1:9", HF_HOME=str(tmp_path)).stdout, "sdv1-5-lora")[4]
        == "partly, 2.0 kB"
    )


@pytest.mark.parametrize("body", [None, b"<html>", b"[]", b'{"models": [{"name": 1}]}'])
def test_models_asks_a_running_server(tmp_path: Path, body: bytes | None) -> None:
    states = [{"name": "embedded", "state": "ready"}, {"name": "mine", "state": "loading"}]
    answer = json.dumps({"models": states, "device": "cpu"}).encode() if body is None else body

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *words: object) -> None:
            pass

        def do_GET(self) -> None:
            self.send_response(200 if self.path == "/models" else 404)
            self.send_header("Content-Length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer)

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        done = lcm_rt("models", "--url", f"http://127.0.0.1:{server.server_address[1]}/", HF_HOME=str(tmp_path))
        server.shutdown()
        thread.join()
    assert done.returncode == 0
    if body is not None:
        assert row(done.stdout, "embedded")[5] == "no server"
        return
    assert row(done.stdout, "embedded")[5] == "ready"
    assert row(done.stdout, "sdxl")[5] == "no"
    assert row(done.stdout, "mine")[5] == "loading"


def test_pull_of_what_is_all_there() -> None:
    done = lcm_rt("pull", "embedded", HF_ENDPOINT="http://127.0.0.1:9")
    assert (done.returncode, "embedded was all there" in done.stdout) == (0, True)


@pytest.mark.parametrize(
    "words, complaint",
    [
        (["serve", "--port", "70000"], "port"),
        (["serve", "--model", "nope"], "nope"),
        (["serve", "--model", "x=/nowhere"], "/nowhere"),
        (["serve", "--model", "x=/"], "model_index.json"),
        (["pull", "nope"], "nope"),
        (["pull", "x=model.ckpt"], "never opened"),
        (["pull", "x=me/model"], "cannot be reached"),
        (["keys", "create", "../x"], "owner"),
        (["keys", "create", "ann", "--scope", "root"], "scope"),
        (["keys", "create", "ann", "--expires", "30"], "30d"),
        (["keys", "create", "ann", "--expires", "999999w"], "hundred"),
        (["keys", "revoke", "nobody"], "nobody"),
        (["keys", "list", "--data-dir", "/dev/null"], "/dev/null"),
        (["generate", "x", "-o", "out.gif"], ".png"),
        (["generate", "x", "--strength", "3"], "strength"),
        (["generate", "x", "--size", "big"], "image_size"),
    ],
)
def test_mistakes_are_told_in_one_line(words: list[str], complaint: str, tmp_path: Path) -> None:
    done = lcm_rt(*words, HF_ENDPOINT="http://127.0.0.1:9", LCM_RT_DATA_DIR=str(tmp_path))
    assert done.returncode == 1
    assert complaint in done.stderr
    assert "Traceback" not in done.stderr


@run
async def test_keys_of_a_running_server(tmp_path: Path) -> None:
    folder = str(tmp_path / "data")

    async def say(*words: str) -> str:
        done = await asyncio.to_thread(lcm_rt, "keys", *words, "--data-dir", folder, COLUMNS="80")
        assert done.returncode == 0, done.stderr
        return done.stdout

    before = (await say("create", "ann", "--expires", "30d")).strip()
    async with serving(tmp_path, keys=True, ready=False) as server:
        key = (await say("create", "bob", "--scope", "generate", "--scope", "admin")).strip()
        auth = server.app.state.auth
        assert (await auth.principal_of(f"Key {before}")).owner == "ann"
        assert (await auth.principal_of(f"Key {key}")).scopes == {"generate", "admin"}
        table = await say("list")
        assert row(table, key[:16])[:3] == [key[:16], "bob", "admin generate"]
        assert row(table, before[:16])[5] == "valid"
        assert row(table, before[:16])[4] > row(table, before[:16])[3]
        assert row(table, key[:16])[4] == "never"
        assert all(made.partition(":")[2] not in table for made in (before, key))
        assert "revoked" in await say("revoke", key[:16])
        assert key.partition(":")[2] not in await say("revoke", before)
        for made in (before, key):
            with pytest.raises(Unauthorized, match="revoked"):
                await auth.principal_of(f"Key {made}")
        table = await say("list")
        assert {row(table, made[:16])[5] for made in (before, key)} == {"revoked"}


def test_a_port_in_use_is_told(server_url: str, tmp_path: Path) -> None:
    done = lcm_rt("serve", "--port", server_url.rpartition(":")[2], "--data-dir", str(tmp_path))
    assert done.returncode == 1
    assert "cannot listen" in done.stderr

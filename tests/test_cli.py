"""The command line, as a user types it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest


def lcm_rt(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "lcm_rt", *words], capture_output=True, text=True, timeout=60)


def test_help_names_the_commands_and_imports_nothing_heavy() -> None:
    assert all(word in lcm_rt("--help").stdout for word in ("serve", "generate", "models"))
    code = "import sys, lcm_rt.cli; print([m for m in ('torch', 'numpy', 'pydantic', 'starlette') if m in sys.modules])"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "[]"


def test_models_lists_the_embedded_one() -> None:
    assert "embedded" in lcm_rt("models").stdout


@pytest.mark.parametrize(
    "words, complaint",
    [
        (["serve", "--host", "0.0.0.0"], "--insecure"),
        (["serve", "--port", "70000"], "port"),
        (["serve", "--model", "nope"], "nope"),
        (["serve", "--model", "x=/nowhere"], "model_index.json"),
        (["generate", "x", "-o", "out.gif"], ".png"),
        (["generate", "x", "--strength", "3"], "strength"),
        (["generate", "x", "--size", "big"], "image_size"),
    ],
)
def test_mistakes_are_told_in_one_line(words: list[str], complaint: str) -> None:
    done = lcm_rt(*words)
    assert done.returncode == 1
    assert complaint in done.stderr
    assert "Traceback" not in done.stderr


def test_a_port_in_use_is_told(server_url: str, tmp_path: Path) -> None:
    done = lcm_rt("serve", "--port", server_url.rpartition(":")[2], "--data-dir", str(tmp_path))
    assert done.returncode == 1
    assert "cannot listen" in done.stderr

"""The page in a real Chromium: pictures come, follow the pen, the words and the settings, and survive a reload."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest
from loras import write_lora

from lcm_rt.embedded import MODEL_DIR

BROWSER = Path(__file__).parent / "browser"


def missing() -> str:
    """What the test lacks, in words; empty when all is there."""
    lacks = [name for name in ("chromium", "node") if shutil.which(name) is None]
    if not (BROWSER / "node_modules").is_dir():
        lacks.append(f"{BROWSER}/node_modules (npm ci)")
    return ", ".join(lacks)


@pytest.mark.timeout(300)
@pytest.mark.skipif(bool(missing()) and "CI" not in os.environ, reason=f"THE PAGE IS NOT TESTED: no {missing()}")
def test_page_follows_pen_and_words(server_url: str, tmp_path: Path) -> None:
    assert not missing()
    chromium = shutil.which("chromium")
    assert chromium is not None
    screenshot = tmp_path / "page.png"
    lora, broken = tmp_path / "style.safetensors", tmp_path / "broken.safetensors"
    write_lora(lora, MODEL_DIR, conv=True)
    broken.write_text("not a LoRA")
    run = subprocess.run(
        ["node", "page.mjs", server_url, chromium, str(screenshot), str(lora), str(broken)],
        cwd=BROWSER,
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    facts = json.loads(run.stdout)
    assert facts["shown"] > 0
    assert screenshot.stat().st_size > 10_000

"""The platform's own, unmodified clients against a live server."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

FAL = Path(__file__).parent / "fal"


def missing() -> str:
    """What the test lacks, in words; empty when all is there."""
    lacks = [] if shutil.which("node") else ["node"]
    if not (FAL / "node_modules").is_dir():
        lacks.append(f"{FAL}/node_modules (npm ci)")
    return ", ".join(lacks)


@pytest.mark.timeout(200)
@pytest.mark.skipif(bool(missing()) and "CI" not in os.environ, reason=f"FAL CLIENTS ARE NOT TESTED: no {missing()}")
def test_javascript_client(server_url: str) -> None:
    assert not missing()
    run = subprocess.run(
        ["node", "--import", "./redirect.mjs", "realtime.mjs"],
        cwd=FAL,
        env=os.environ | {"LCM_RT_URL": server_url},
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    assert "\n# fail 0\n" in run.stdout

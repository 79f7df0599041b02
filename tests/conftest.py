"""Fixtures that many tests share."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from blockbuster import BlockBuster, blockbuster_ctx

WEB = Path(__file__).parents[1] / "web"


@pytest.fixture(autouse=True)
def blockbuster() -> Iterator[BlockBuster]:
    """A blocking call inside the event loop of our own code fails the test."""
    with blockbuster_ctx("lcm_rt") as guard:
        yield guard


@pytest.fixture(scope="session")
def server_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a live server, started as a user would, with the embedded model ready."""
    folder = tmp_path_factory.mktemp("server")
    process = subprocess.Popen(
        [sys.executable, "-m", "lcm_rt", "serve", "--port", "0", "--data-dir", str(folder)],
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "COLUMNS": "200"},
    )
    assert process.stderr
    said = ""
    for line in process.stderr:
        said += line
        if match := re.search(r"page +(http://\S+)/", line):
            url = match[1]
            break
    else:
        pytest.fail(f"the server did not become ready:\n{said}")
    with urllib.request.urlopen(f"{url}/health/ready") as answer:
        assert answer.status == 200
    with open(folder / "log", "w") as log:
        # Its later words go to a file, so that it never waits for us to read them.
        import threading

        threading.Thread(target=lambda: log.writelines(process.stderr), daemon=True).start()
        yield url
        process.terminate()
        assert process.wait(20) == 0
        process.stderr.close()

"""Fixtures that many tests share."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from blockbuster import BlockBuster, blockbuster_ctx

# Before torch is imported, and for the engine processes too. Tiny networks gain nothing from a second thread, and on a
# busy machine OpenMP's threads spend seconds waiting for each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# To convert or compile a tiny network takes longer than to run it; test_runner and test_fast do it on purpose.
os.environ.setdefault("LCM_RT_BACKEND", "eager")
os.environ.setdefault("LCM_RT_REPEAT_MB", "0")

if TYPE_CHECKING:
    from lcm_rt.catalog import ModelSpec
    from lcm_rt.engine.engine import Engine

pytest_plugins = ["databases"]


@pytest.fixture(autouse=True)
def blockbuster() -> Iterator[BlockBuster]:
    """A blocking call inside the event loop of our own code fails the test."""
    with blockbuster_ctx("lcm_rt") as guard:
        yield guard


@pytest.fixture(scope="session")
def specs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, ModelSpec]:
    """Tiny models of every kind, by name."""
    from engines import write_models  # torch takes its time, and few tests need it

    return write_models(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="session")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache of converted networks, which take long to make."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="session")
def engine(specs: dict[str, ModelSpec]) -> Engine:
    """An engine that has loaded all of them."""
    from engines import engine_of

    return engine_of(*specs.values())


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
    try:
        said = ""
        for line in process.stderr:
            said += line
            if match := re.search(r"page +(http://\S+)/", line):
                break
        else:
            pytest.fail(f"the server did not become ready:\n{said}")
        # Its later words are read too, so that it never waits for us.
        reader = threading.Thread(target=process.stderr.read)
        reader.start()
        yield match[1]
        process.terminate()
        assert process.wait(20) == 0
        reader.join()
    finally:
        process.kill()
        process.wait()
        process.stderr.close()

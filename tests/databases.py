"""The databases that a store is tested on: SQLite in a file, and a PostgreSQL of our own, as Debian packages it."""

from __future__ import annotations

import itertools
import os
import pwd
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest

USER = "lcm"
SETTINGS = {
    "listen_addresses": "",
    "fsync": "off",  # a killed process loses nothing by it, and a test has no power cut
    "full_page_writes": "off",
    "max_connections": "20",
    "shared_buffers": "16MB",
}


def programs() -> Path | None:
    """Where the newest ``initdb`` and ``postgres`` lie."""
    folders = sorted(Path("/usr/lib/postgresql").glob("*/bin"), key=lambda folder: float(folder.parent.name))
    if found := shutil.which("postgres"):
        folders.append(Path(found).resolve().parent)
    return next((folder for folder in reversed(folders) if (folder / "initdb").exists()), None)


class PostgreSQL:
    """A cluster in a folder of its own, reached by a socket in there. It ends with this process, however that ends."""

    def __init__(self) -> None:
        found = programs()
        assert found, "PostgreSQL is missing: .ci/install-postgres"
        self._programs = found
        self._folder = Path(tempfile.mkdtemp(prefix="lcm-pg-"))  # not pytest's own, which lets nobody else pass
        self._names = itertools.count(1)
        self._process: subprocess.Popen[bytes] | None = None
        # The server refuses to be root.
        self._user = pwd.getpwnam("postgres").pw_uid if os.geteuid() == 0 else None
        if self._user is not None:
            os.chown(self._folder, self._user, -1)
        self._log = (self._folder / "log").open("wb")
        subprocess.run(
            [self._programs / "initdb", "-D", self._data, "-U", USER, "-A", "trust", "-E", "UTF8", "--no-locale", "-N"],
            check=True,
            stdout=self._log,
            stderr=self._log,
            user=self._user,
            cwd="/",
        )

    @property
    def _data(self) -> Path:
        return self._folder / "data"

    def _connect(self) -> psycopg.Connection[tuple[object, ...]]:
        return psycopg.connect(host=str(self._folder), user=USER, dbname="postgres", autocommit=True)

    def start(self) -> None:
        """Start it and wait until it answers. To be called in a thread that lives as long as it should."""
        leash = ["setpriv", "--pdeathsig", "INT"] if shutil.which("setpriv") else []
        options = [word for name, value in SETTINGS.items() for word in ("-c", f"{name}={value}")]
        self._process = subprocess.Popen(
            [*leash, self._programs / "postgres", "-D", self._data, "-k", self._folder, *options],
            stdout=self._log,
            stderr=self._log,
            user=self._user,
            cwd="/",
        )
        end = time.monotonic() + 60
        while True:
            try:
                self._connect().close()
                return
            except psycopg.OperationalError:
                said = (self._folder / "log").read_text(errors="replace")
                assert self._process.poll() is None and time.monotonic() < end, said
                time.sleep(0.02)

    def stop(self) -> None:
        """End it and whoever is connected."""
        assert self._process
        self._process.send_signal(2)  # "fast": clients are not waited for
        self._process.wait(30)

    def remove(self) -> None:
        """Stop it for ever."""
        if self._process and self._process.poll() is None:
            self.stop()
        self._log.close()
        shutil.rmtree(self._folder)

    def create(self) -> str:
        """The URL of a new, empty database."""
        name = f"test_{next(self._names)}"
        with self._connect() as connection:
            connection.execute(f"CREATE DATABASE {name}".encode())
        return f"postgresql+psycopg://{USER}@/{name}?host={self._folder}"

    def drop(self, url: str) -> None:
        """Remove a database, whoever is connected."""
        name = url.partition("@/")[2].partition("?")[0]
        with self._connect() as connection:
            connection.execute(f"DROP DATABASE {name} WITH (FORCE)".encode())


@pytest.fixture(scope="session")
def postgresql() -> Iterator[PostgreSQL]:
    """A running cluster; a test that stops it starts it again. Skipped, loudly, where there is none to be had."""
    if not programs() and "CI" not in os.environ:
        pytest.skip("POSTGRESQL IS NOT TESTED: it is not installed (.ci/install-postgres)")
    cluster = PostgreSQL()
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.remove()


@pytest.fixture(params=["sqlite", "postgresql"])
def database_url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """The URL of an empty database, for a ``Store``: a test that uses it runs on both kinds."""
    if request.param == "sqlite":
        yield f"sqlite:///{tmp_path}/store.db"
        return
    cluster: PostgreSQL = request.getfixturevalue("postgresql")
    url = cluster.create()
    yield url
    cluster.drop(url)

"""The one way to the rows: nothing told is lost, nothing of a failure stays, and nobody pays for another's."""

from __future__ import annotations

import asyncio
import logging
import os
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from databases import PostgreSQL
from serving import run
from sqlalchemy import Connection, delete, event, func, insert, select, text, update
from sqlalchemy.exc import IntegrityError, NoResultFound

from lcm_rt.errors import BadRequest, LcmError, NotFound, Unavailable
from lcm_rt.store import Store, deliveries, jobs, metadata, secrets


def write(name: str, value: bytes = b"") -> Callable[[Connection], None]:
    """A function that adds a row."""

    def work(connection: Connection) -> None:
        connection.execute(insert(secrets).values(kind="test", id=name, value=value, created_at=0.0))

    return work


def names(connection: Connection) -> list[str]:
    return list(connection.scalars(select(secrets.c.id).order_by(secrets.c.id)))


async def together(store: Store, *works: Callable[[Connection], Any]) -> list[Any]:
    """Their outcomes, when all of them are in one transaction."""
    held, release = threading.Event(), threading.Event()

    def hold(connection: Connection) -> None:  # while this one runs, the others gather
        held.set()
        assert release.wait(20)

    holding = asyncio.create_task(store.do(hold))
    await asyncio.to_thread(held.wait)
    waiting = [asyncio.create_task(store.do(work)) for work in works]
    while store._queue.qsize() < len(works):  # noqa: ASYNC110
        await asyncio.sleep(0)
    release.set()
    await holding
    return await asyncio.gather(*waiting, return_exceptions=True)


@run
async def test_rows_outlive_the_store(database_url: str) -> None:
    async with Store(database_url) as store:
        await store.do(write("a"))
    async with Store(database_url) as store:
        assert await store.do(names) == ["a"]


@run
async def test_functions_run_in_their_order(database_url: str) -> None:
    async with Store(database_url) as store:
        assert await together(store, names, write("a"), names, write("b"), names) == [[], None, ["a"], None, ["a", "b"]]
        store.post(write("c"))
        assert await store.do(names) == ["a", "b", "c"]
        store.post(write("d"))
    async with Store(database_url) as store:
        assert await store.do(names) == ["a", "b", "c", "d"]  # what was handed over is done before it closes


@run
async def test_many_share_a_commit(database_url: str) -> None:
    commits = 0

    def count(connection: Connection) -> None:
        nonlocal commits
        commits += 1

    async with Store(database_url) as store:
        event.listen(store._engine, "commit", count)
        assert await together(store, *[write(f"{number:03}") for number in range(200)]) == [None] * 200
        assert len(await store.do(names)) == 200
    assert commits <= 1 + 4 + 1


@run
async def test_one_failure_spoils_nothing_else(database_url: str) -> None:
    def half(connection: Connection) -> None:
        write("half")(connection)
        raise NotFound("no such thing")

    def twice(connection: Connection) -> None:
        write("twice")(connection)
        write("twice")(connection)

    async with Store(database_url) as store:
        outcomes = await together(
            store,
            write("a"),
            half,
            write("b"),
            twice,
            lambda connection: connection.execute(select(secrets.c.id).where(secrets.c.id == "none")).one(),
            lambda connection: next(iter([])),
            write("c"),
        )
        kinds = [type(outcome) for outcome in outcomes]
        assert kinds == [type(None), NotFound, type(None), IntegrityError, NoResultFound, RuntimeError, type(None)]
        assert await store.do(names) == ["a", "b", "c"]


@run
async def test_a_function_may_survive_an_error_of_its_own(database_url: str) -> None:
    def replace(connection: Connection) -> None:
        try:
            with connection.begin_nested():
                write("a", b"new")(connection)
        except IntegrityError:
            connection.execute(update(secrets).values(value=b"newer"))

    async with Store(database_url) as store:
        await store.do(write("a"))
        await store.do(replace)
        assert await store.do(lambda connection: connection.scalar(select(secrets.c.value))) == b"newer"


@run
async def test_who_does_not_wait_changes_nothing(database_url: str) -> None:
    async with Store(database_url) as store:
        gone = asyncio.create_task(store.do(write("a")))
        await asyncio.sleep(0)
        gone.cancel()
        assert await store.do(names) == ["a"]
        assert gone.cancelled()


@pytest.mark.parametrize("hostile", ["a\0b", "\ud800", 2**70], ids=["NUL", "surrogate", "large"])
@run
async def test_values_that_no_column_holds_are_refused(database_url: str, hostile: str | int) -> None:
    column = jobs.c.id if isinstance(hostile, str) else jobs.c.number

    async with Store(database_url) as store:
        outcomes = await together(
            store,
            write("a"),
            lambda connection: connection.execute(select(jobs).where(column == hostile)).one_or_none(),
            write("b"),
        )
        # SQLite's text may hold a NUL, and PostgreSQL compares a large number with a small one.
        assert outcomes[1] is None or isinstance(outcomes[1], BadRequest)
        assert await store.do(names) == ["a", "b"]


@run
async def test_numbers_may_be_large(database_url: str) -> None:
    """A file of more than 2 GiB, and the job after 2,147,483,647 others."""
    async with Store(database_url) as store:
        await store.do(lambda connection: connection.execute(insert(jobs).values(number=2**31, **job("a"))))
        assert await store.do(lambda connection: connection.scalar(select(jobs.c.number))) == 2**31


def job(name: str) -> dict[str, Any]:
    return {
        "id": name,
        "owner": "local",
        "app": "lcm",
        "base": "",
        "state": "running",
        "low": False,
        "retries": True,
        "created_at": 0.0,
        "lease_until": 5e9,
        "epoch": 1,
        "deaths": 0,
        "cancelled": False,
        "logs": [],
    }


@run
async def test_closed_store_refuses(database_url: str) -> None:
    store = Store(database_url)
    with pytest.raises(Unavailable):
        await store.do(names)
    async with store:
        last = asyncio.create_task(store.do(names))
        await asyncio.sleep(0)
    assert await last == []
    with pytest.raises(Unavailable):
        await store.do(names)
    with pytest.raises(Unavailable):
        store.post(names)


@run
async def test_logs_and_errors_have_no_rows_in_them(database_url: str, caplog: pytest.LogCaptureFixture) -> None:
    value = "".join(["can", "ary"])  # tracebacks show the source

    def twice(connection: Connection) -> None:
        write(value)(connection)
        write(value)(connection)

    def large(connection: Connection) -> None:
        connection.execute(insert(jobs).values({**job(value), "epoch": 2**80}))

    def wrong(connection: Connection) -> None:
        connection.execute(text("SELECT nothing FROM secrets WHERE id = :it"), {"it": value})

    def lacking(connection: Connection) -> None:
        connection.execute(insert(jobs).values({**job(value), "app": None}))

    async with Store(database_url) as store:
        for work in (twice, large, wrong, lacking):
            with pytest.raises(Exception) as caught:
                await store.do(work)
            logging.getLogger("test").error("told", exc_info=caught.value)
            store.post(work)
    assert value not in caplog.text
    assert caplog.text.count("a row could not be written") == 4


@run
async def test_another_version_is_refused_and_left_alone(database_url: str) -> None:
    async with Store(database_url) as store:
        await store.do(lambda connection: connection.exec_driver_sql("UPDATE versions SET version = 7"))
        await store.do(lambda connection: metadata.tables["parts"].drop(connection))
    for _ in range(2):
        with pytest.raises(LcmError, match="is of version 7, not 1"):
            await Store(database_url).__aenter__()


@run
async def test_tables_of_another_program_are_refused(database_url: str) -> None:
    async with Store(database_url) as store:
        await store.do(lambda connection: metadata.tables["versions"].drop(connection))
        await store.do(lambda connection: metadata.tables["files"].drop(connection))
    with pytest.raises(LcmError, match="another program has its deliveries, jobs, keys, parts, secrets there"):
        await Store(database_url).__aenter__()


@run
async def test_two_may_begin_at_once(database_url: str) -> None:
    async with Store(database_url) as first, Store(database_url) as second:
        await first.do(write("a"))
        assert await second.do(names) == ["a"]
    stores = [Store(database_url) for _ in range(3)]
    await asyncio.gather(*[store.__aenter__() for store in stores])
    assert await asyncio.gather(*[store.do(names) for store in stores]) == [["a"]] * 3
    await asyncio.gather(*[store.__aexit__(None, None, None) for store in stores])


@pytest.mark.parametrize("number", range(3))
@run
async def test_two_may_begin_at_once_with_nothing(database_url: str, number: int) -> None:
    stores = [Store(database_url) for _ in range(3)]
    await asyncio.gather(*[store.__aenter__() for store in stores])
    assert await asyncio.gather(*[store.do(names) for store in stores]) == [[]] * 3
    await asyncio.gather(*[store.__aexit__(None, None, None) for store in stores])


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("nonsense", "URL"),
        ("mysql://user:canary@host/name", "neither SQLite nor PostgreSQL"),
        ("sqlite://", "has no file"),
        ("sqlite:///:memory:", "has no file"),
        ("sqlite:////proc/none/store.db", "cannot be opened"),
        ("postgresql+psycopg://user:canary@127.0.0.1:1/name", "cannot be opened.*refused"),
        ("postgresql+psycopg://user@127.0.0.1:1/name?password=canary", "cannot be opened.*refused"),
        ("postgresql+nonsense://user:canary@127.0.0.1:1/name", "cannot be opened"),
        ("postgresql+psycopg://user:canary@127.0.0.1:port/name", "URL"),
    ],
)
@run
async def test_urls_that_cannot_be_opened(url: str, said: str, caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(LcmError, match=said) as caught:
        await Store(url).__aenter__()
    logging.getLogger("test").error("told", exc_info=caught.value)
    assert "canary" not in caplog.text


# SQLite


def file_url(folder: Path) -> str:
    return f"sqlite:///{folder}/store.db"


@pytest.mark.parametrize("size", [100, 4096, 9000])
@run
async def test_damaged_file_is_refused(tmp_path: Path, size: int) -> None:
    async with Store(file_url(tmp_path)) as store:
        await together(store, *[write(f"{number}", bytes(1000)) for number in range(30)])
    path = tmp_path / "store.db"
    damaged = path.read_bytes()[:size] + b"\xff" * 5000
    path.write_bytes(damaged)
    with pytest.raises(LcmError, match="cannot be opened"):
        await Store(file_url(tmp_path)).__aenter__()
    assert path.read_bytes() == damaged


@run
async def test_full_disk_writes_nothing_by_halves(tmp_path: Path) -> None:
    async with Store(file_url(tmp_path)) as store:
        await store.do(write("before"))
        pages = await store.do(lambda connection: connection.exec_driver_sql("PRAGMA page_count").scalar())
        await store.do(lambda connection: connection.exec_driver_sql(f"PRAGMA max_page_count={pages + 4}"))
        for works in ([write("a"), write("large", bytes(10**6)), write("b")], [write("a"), write("b", bytes(10**6))]):
            outcomes = await together(store, *works)
            assert [type(outcome) for outcome in outcomes] == [Unavailable] * len(works)
            assert await store.do(names) == ["before"]
        await store.do(lambda connection: connection.exec_driver_sql("PRAGMA max_page_count=100000"))
        assert await together(store, write("a"), write("large", bytes(10**6)), write("b")) == [None] * 3
        assert await store.do(names) == ["a", "b", "before", "large"]


@run
async def test_locked_file_is_waited_for_but_not_for_long(tmp_path: Path) -> None:
    async with Store(file_url(tmp_path)) as store:
        with closing(sqlite3.connect(tmp_path / "store.db", isolation_level=None)) as other:
            other.execute("BEGIN EXCLUSIVE")
            begun = time.monotonic()
            outcomes = await asyncio.gather(*[store.do(write(f"{n}")) for n in range(9)], return_exceptions=True)
            assert time.monotonic() - begun < 5
            assert [type(outcome) for outcome in outcomes] == [Unavailable] * 9
            store.post(write("posted"))
            with pytest.raises(Unavailable):
                await store.do(write("late"))
            waiting = asyncio.create_task(store.do(names))
            await asyncio.sleep(0.05)
            other.execute("COMMIT")
        assert await waiting == ["posted"]


@run
async def test_leases_end_where_nobody_else_is(tmp_path: Path) -> None:
    delivery = {
        "id": "a",
        "job": "a",
        "owner": "local",
        "url": "",
        "host": "",
        "body": b"",
        "tries": 0,
        "created_at": 0.0,
        "due_at": 0.0,
        "lease_until": 5e9,
    }

    def leases(connection: Connection) -> list[float]:
        return [connection.scalars(select(table.c.lease_until)).one() for table in (jobs, deliveries)]

    async with Store(file_url(tmp_path)) as first:
        await first.do(lambda connection: connection.execute(insert(jobs).values(job("a"))))
        await first.do(lambda connection: connection.execute(insert(deliveries).values(delivery)))
        async with Store(file_url(tmp_path)) as second:
            assert await second.do(leases) == [5e9, 5e9]
        async with Store(file_url(tmp_path)) as second:
            assert await first.do(leases) == [5e9, 5e9]
    async with Store(file_url(tmp_path)) as third:
        assert await third.do(leases) == [0.0, 0.0]


@run
async def test_leases_end_when_their_holder_was_killed(tmp_path: Path) -> None:
    program = """if True:
        import asyncio, sys, time
        sys.path.insert(0, "tests")
        from sqlalchemy import insert
        from test_store import job
        from lcm_rt.store import Store, jobs

        async def main():
            async with Store(sys.argv[1]) as store:
                await store.do(lambda connection: connection.execute(insert(jobs).values(job("a"))))
                print("leased", flush=True)
                await asyncio.sleep(60)

        asyncio.run(main())
    """
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", program, file_url(tmp_path), stdout=subprocess.PIPE, cwd=Path(__file__).parents[1]
    )
    assert process.stdout and await process.stdout.readline() == b"leased\n"

    def lease(connection: Connection) -> float:
        return connection.scalars(select(jobs.c.lease_until)).one()

    async with Store(file_url(tmp_path)) as store:
        assert await store.do(lease) == 5e9
    process.kill()
    await process.communicate()
    async with Store(file_url(tmp_path)) as store:
        assert await store.do(lease) == 0.0


@run
async def test_secrets_are_for_their_owner_only(tmp_path: Path) -> None:
    async with Store(file_url(tmp_path)) as store:
        await store.do(write("a"))
        for name in ("store.db", "store.db-wal", "store.db-shm"):
            assert os.stat(tmp_path / name).st_mode & 0o777 == 0o600


@run
async def test_connections_to_one_file_take_turns(tmp_path: Path) -> None:
    async with Store(file_url(tmp_path)) as first, Store(file_url(tmp_path)) as second:

        async def fill(store: Store, name: str) -> None:
            for number in range(50):
                await store.do(write(f"{name}{number:02}", bytes(50_000)))

        await asyncio.gather(fill(first, "a"), fill(second, "b"))  # several times what the log holds
        with second._turn():
            begun = time.monotonic()
            with pytest.raises(Unavailable):
                await first.do(names)
            assert 1 < time.monotonic() - begun < 5
        assert len(await first.do(names)) == 100
        assert await second.do(lambda connection: connection.exec_driver_sql("PRAGMA quick_check").scalar()) == "ok"


# PostgreSQL


@pytest.fixture
def postgresql_url(postgresql: PostgreSQL) -> Any:
    url = postgresql.create()
    yield url
    postgresql.drop(url)


@run
async def test_database_may_start_again_under_us(
    postgresql: PostgreSQL, postgresql_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    async with Store(postgresql_url) as store:
        await store.do(write("a"))
        postgresql.stop()
        store.post(write("posted"))
        with pytest.raises(Unavailable):
            await store.do(write("b"))
        postgresql.start()
        await store.do(write("c"))
        postgresql.stop()
        postgresql.start()
        await store.do(write("d"))  # nobody asked while it was away
        assert await store.do(names) == ["a", "c", "d", "posted"]
        postgresql.stop()
        store.post(write("lost"))
    assert "a row could not be written" in caplog.text
    postgresql.start()


@run
async def test_connection_lost_in_the_middle(postgresql_url: str) -> None:
    def end(connection: Connection) -> None:
        write("half")(connection)
        connection.execute(select(func.pg_terminate_backend(func.pg_backend_pid())))

    async with Store(postgresql_url) as store:
        for works in ([write("a"), end, write("b")], [write("a"), end]):
            outcomes = await together(store, *works)
            assert [type(outcome) for outcome in outcomes] == [Unavailable] * len(works)
            assert await store.do(names) == []
        await store.do(write("c"))
        assert await store.do(names) == ["c"]


@run
async def test_locked_rows_are_not_waited_for_long(postgresql_url: str) -> None:
    async with Store(postgresql_url) as store, Store(postgresql_url) as other:
        await store.do(write("a"))
        held, release = threading.Event(), threading.Event()

        def hold(connection: Connection) -> None:
            connection.execute(delete(secrets))
            held.set()
            assert release.wait(20)

        holding = asyncio.create_task(other.do(hold))
        await asyncio.to_thread(held.wait)
        begun = time.monotonic()
        outcomes = await together(store, write("b"), lambda connection: connection.execute(delete(secrets)), write("c"))
        assert time.monotonic() - begun < 5
        assert [type(outcome) for outcome in outcomes] == [type(None), Unavailable, type(None)]
        release.set()
        await holding
        assert await store.do(names) == ["b", "c"]

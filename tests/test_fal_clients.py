"""The platform's own clients, unmodified from their registries, against a live server: what they do, and each way here.

The JavaScript ones are in ``tests/fal``; each file there says how to run it by hand.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import gc
import io
import json
import os
import re
import runpy
import shutil
import subprocess
import sys
import threading
import time
import urllib.request
import warnings
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import fal_client
import fal_client.client
import pytest
from serving import run, serving

from lcm_rt import certificates
from lcm_rt.server import kit

FAL = Path(__file__).parent / "fal"
KIT = Path(kit.__file__).parents[1] / "kit"
APP = "fal-ai/lcm"
SMALL = {
    "prompt": "sunset over a lake",
    "image_size": {"width": 64, "height": 64},
    "num_inference_steps": 1,
    "seed": 42,
}
HEAVY = {**SMALL, "image_size": {"width": 512, "height": 512}, "num_inference_steps": 50, "num_images": 4}
JPEG = b"\xff\xd8\xff"
EVERYTHING = ["run", "subscribe", "stream", "upload", "realtime"]


def missing(*programs: str) -> str:
    """What the tests of JavaScript lack, in words; empty when all is there."""
    lacks = [program for program in ("node", *programs) if shutil.which(program) is None]
    if not (FAL / "node_modules").is_dir():
        lacks.append(f"{FAL}/node_modules (npm ci)")
    return ", ".join(lacks)


needs_node = pytest.mark.skipif(
    bool(missing()) and "CI" not in os.environ, reason=f"THE JAVASCRIPT CLIENTS ARE NOT TESTED: no {missing()}"
)


def node(*words: str, timeout: float = 180, cwd: Path = FAL, **variables: str) -> str:
    """What a script says; the test fails if it does, with all that it said."""
    environ = {name: value for name, value in os.environ.items() if not name.startswith("FAL_")}
    done = subprocess.run(
        ["node", *words], cwd=cwd, env=environ | variables, capture_output=True, text=True, timeout=timeout, check=False
    )
    assert done.returncode == 0, done.stdout[-20_000:] + done.stderr[-5_000:]
    return done.stdout


def suite(name: str, server: str, client: str, **variables: str) -> None:
    """Run the tests of ``tests/fal/{name}`` with ``client``, redirected to ``server`` by our preload."""
    words = ["--test-force-exit", "--require", str(KIT / "fal-local.js"), name]
    said = node(*words, CLIENT=client, FAL_LOCAL=server, **variables)
    assert "\n# fail 0\n" in said and "\n# cancelled 0\n" in said, said[-20_000:]
    assert int(re.findall(r"^# pass (\d+)$", said, re.M)[0]) > 0


@needs_node
@pytest.mark.timeout(300)
@pytest.mark.points(40, 41, 43, 44, 45, 47, 48, 49, 52, 53, 54, 55, 59, 62, 63)
@pytest.mark.parametrize("client", ["v1", "v0", "v06"])
def test_javascript_over_http(server_url: str, client: str) -> None:
    suite("http.mjs", server_url, client)


@needs_node
@pytest.mark.timeout(200)
@pytest.mark.points(12, 15, 19, 20, 29)
@pytest.mark.parametrize("client", ["v1", "v0", "v06"])
def test_javascript_in_realtime(server_url: str, client: str) -> None:
    suite("realtime.mjs", server_url, client)


@needs_node
@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.points(60)
def test_javascript_uploads_91_mib(server_url: str) -> None:
    suite("http.mjs", server_url, "v1", LARGE="1")


class Python:
    """``fal-client``, sync or async, called by the names of its methods."""

    def __init__(self, flavour: str) -> None:
        self.is_sync = flavour == "sync"
        self.client: Any = fal_client.SyncClient() if self.is_sync else fal_client.AsyncClient()

    async def __call__(self, method: Callable[..., Any] | str, /, *words: Any, **named: Any) -> Any:
        """Call one of the client's methods, or a method of what it gave."""
        call = getattr(self.client, method) if isinstance(method, str) else method
        return await (asyncio.to_thread(call, *words, **named) if self.is_sync else call(*words, **named))

    async def close(self) -> None:
        """In the loop in which it was used."""
        if self.is_sync:
            self.client._client.close()
        else:
            await (await self.client._client).aclose()
        gc.collect()

    async def events(self, events: Any) -> list[Any]:
        """All of a stream."""
        return await asyncio.to_thread(list, events) if self.is_sync else [event async for event in events]

    async def converse(self, messages: list[dict[str, Any] | None], app: str = APP, **options: Any) -> list[Any]:
        """Send each message (None sends nothing), and wait for what comes: an answer, an error, or None at the end."""
        if self.is_sync:
            return await asyncio.to_thread(self._converse, messages, app, options)
        heard: list[Any] = []
        async with self.client.realtime(app, **options) as connection:
            for message in messages:
                if message is not None:
                    await connection.send(message)
                try:
                    heard.append(await connection.recv())
                except fal_client.client.RealtimeError as error:
                    heard.append(error)
        return heard

    def _converse(self, messages: list[dict[str, Any] | None], app: str, options: dict[str, Any]) -> list[Any]:
        heard: list[Any] = []
        with self.client.realtime(app, **options) as connection:
            for message in messages:
                if message is not None:
                    connection.send(message)
                try:
                    heard.append(connection.recv())
                except fal_client.client.RealtimeError as error:
                    heard.append(error)
        return heard


# The sync client leaves the socket of every upload to the garbage collector.
leaves_sockets = pytest.mark.filterwarnings(
    "ignore:Exception ignored in. <socket:pytest.PytestUnraisableExceptionWarning"
)


def with_python(test: Callable[..., Coroutine[Any, Any, None]]) -> Callable[..., None]:
    """Run an async test, and close its client."""

    @functools.wraps(test)
    async def wrapper(python: Python, **named: Any) -> None:
        try:
            await test(python, **named)
        finally:
            await python.close()

    return run(wrapper)


@pytest.fixture
def redirected(server_url: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """``fal_client`` of this process points at the server, by our own module."""
    for name in ("RUN_URL_FORMAT", "QUEUE_URL_FORMAT", "REALTIME_URL_FORMAT", "REST_URL", "CDN_URL"):
        monkeypatch.setattr(fal_client.client, name, getattr(fal_client.client, name))
    monkeypatch.setenv("FAL_LOCAL", server_url)
    monkeypatch.setenv("FAL_KEY", "local")
    runpy.run_path(str(KIT / "fal_local.py"), run_name="fal_local")
    return server_url


@pytest.fixture(params=["sync", "async"])
def python(request: pytest.FixtureRequest, redirected: str) -> Python:
    return Python(request.param)


def download(url: str) -> bytes:
    with urllib.request.urlopen(url, timeout=60) as answer:
        return answer.read()


@contextmanager
def refused(status: int, *words: str) -> Iterator[None]:
    with pytest.raises(fal_client.FalClientHTTPError) as told:
        yield
    assert told.value.status_code == status, told.value
    assert all(word in str(told.value) for word in words), told.value


async def occupied(python: Python) -> list[Any]:
    """Jobs that keep the queue busy for some seconds."""
    return [await python("submit", APP, {**HEAVY, "seed": seed}) for seed in range(6)]


async def freed(python: Python, handles: list[Any]) -> None:
    for handle in handles:
        try:
            await python(handle.cancel)
        except fal_client.FalClientHTTPError as error:
            assert error.status_code == 400  # it is done already


@with_python
@pytest.mark.points(39)
async def test_python_runs(python: Python) -> None:
    answer = await python("run", APP, SMALL, start_timeout=30, hint="lora:a")
    assert answer["seed"] == 42
    picture = await asyncio.to_thread(download, answer["images"][0]["url"])
    assert picture.startswith(JPEG)
    assert (await python("run", APP, SMALL, path="/image-to-image"))["seed"] == 42


@with_python
async def test_python_gets_with_nothing_but_defaults(python: Python) -> None:
    with refused(422, "prompt"):  # the client drops the arguments of a GET
        await python("run", APP, SMALL, method="GET")


@with_python
@pytest.mark.points(41, 44, 47)
async def test_python_queues(python: Python, redirected: str) -> None:
    handle = await python("submit", f"{APP}/image-to-image", SMALL, hint="h", priority="low", start_timeout=45.5)
    assert handle.response_url == f"{redirected}/queue/{APP}/requests/{handle.request_id}"
    answer = await python(handle.get)
    assert answer["seed"] == 42
    assert await python(handle.get) == answer == await python("result", APP, handle.request_id)
    status = await python("status", APP, handle.request_id, with_logs=True)
    assert isinstance(status, fal_client.Completed)
    assert (status.error, status.error_type) == (None, None)
    assert isinstance(status.logs, list)
    assert status.metrics["inference_time"] > 0


@with_python
async def test_python_subscribes(python: Python) -> None:
    ids: list[str] = []
    statuses: list[Any] = []
    answer = await python(
        "subscribe", APP, SMALL, with_logs=True, on_enqueue=ids.append, on_queue_update=statuses.append, priority="low"
    )
    assert answer["seed"] == 42
    assert len(ids) == 1
    order = [
        [fal_client.Queued, fal_client.InProgress, fal_client.Completed].index(type(status)) for status in statuses
    ]
    assert order == sorted(order)
    assert isinstance(statuses[-1], fal_client.Completed)


@with_python
@pytest.mark.points(43)
async def test_python_queues_for_a_workflow(python: Python) -> None:
    handle = await python("submit", "workflows/me/lcm", SMALL)
    await python(handle.get)
    assert (await python("result", "workflows/me/lcm", handle.request_id))["seed"] == 42


@with_python
@pytest.mark.points(45, 46, 49)
async def test_python_cancels_and_gives_up(python: Python) -> None:
    busy = await occupied(python)
    try:
        handle = await python("submit", APP, SMALL)
        status = await python(handle.status)
        assert isinstance(status, fal_client.Queued)
        assert status.position >= 0
        await python(handle.cancel)
        with warnings.catch_warnings(), pytest.raises(fal_client.FalClientTimeoutError) as told:
            await python("subscribe", APP, SMALL, client_timeout=1.5)
    finally:
        await freed(python, busy)
    for request_id in (handle.request_id, told.value.request_id):
        assert request_id
        with pytest.raises(fal_client.FalClientHTTPError) as refusal:
            await python("result", APP, request_id)  # waits until it is COMPLETED
        assert refusal.value.status_code in (499, 504)
        completed = await python("status", APP, request_id)
        assert isinstance(completed, fal_client.Completed)
        assert completed.error
        assert completed.error_type == refusal.value.error_type
        with refused(400):
            await python("cancel", APP, request_id)


@with_python
@pytest.mark.points(50)
async def test_python_is_told_of_its_own_deadline_once(python: Python) -> None:
    busy = await occupied(python)
    try:
        handle = await python("submit", APP, SMALL, start_timeout=1.1)
        began = time.monotonic()
        with pytest.raises(fal_client.FalClientHTTPError) as told:
            await python(handle.get)
        assert told.value.status_code == 504
        assert told.value.error_type == "request_timeout"
        assert told.value.response_headers["x-fal-request-timeout-type"] == "user"
        assert time.monotonic() - began < 10, "the client tried again"
    finally:
        await freed(python, busy)


@with_python
async def test_python_streams(python: Python) -> None:
    *previews, last = await python.events(python.client.stream(APP, {**SMALL, "num_inference_steps": 4}))
    assert last["seed"] == 42
    assert (await asyncio.to_thread(download, last["images"][0]["url"])).startswith(JPEG)
    assert all(event["preview"] for event in previews)


@with_python
@pytest.mark.points(55, 56)
async def test_python_is_told_what_is_wrong(python: Python) -> None:
    unknown = "00000000-0000-4000-8000-000000000000"
    for call in (
        python("run", APP, {**SMALL, "strength": 7}),
        python("submit", APP, {**SMALL, "strength": 7}),
        python("run", APP, {**SMALL, "image_url": "data:image/png;base64,!!"}),
    ):
        with pytest.raises(fal_client.FalClientHTTPError) as told:
            await call
        assert told.value.status_code == 422
        (entry,) = told.value.response.json()["detail"]
        assert entry["loc"][0] == "body"
        assert entry["msg"] in str(told.value)
    for call in (
        python("run", "fal-ai/no-such-app", SMALL),
        python("submit", "fal-ai/no-such-app", SMALL),
        python("status", APP, unknown),
        python("cancel", APP, unknown),
    ):
        with refused(404):
            await call


@with_python
@pytest.mark.points(12, 15, 20, 33)
async def test_python_in_realtime(python: Python) -> None:
    messages: list[dict[str, Any] | None] = [
        {**SMALL, "request_id": "one"},
        {**SMALL, "strength": 7, "request_id": "wrong"},
        {**SMALL, "image_bytes": JPEG + b"no picture", "request_id": "picture"},
        SMALL,
    ]
    one, wrong, picture, two = await python.converse(messages, max_buffering=4)
    assert one["images"][0]["content"].startswith(JPEG)
    assert (one["request_id"], "request_id" in two) == ("one", False)
    assert one["images"][0]["content"] == two["images"][0]["content"]
    assert (wrong.error, wrong.payload["request_id"]) == ("invalid_input", "wrong")
    assert (picture.error, picture.payload["request_id"]) == ("image_load_error", "picture")
    assert "strength" in wrong.reason
    (answer,) = await python.converse([SMALL], use_jwt=False, path="/")
    assert answer["images"][0]["content"] == one["images"][0]["content"]
    told, end = await python.converse([None, None], app="fal-ai/no-such-app")
    assert "no-such-app" in str(told)
    assert end is None


@leaves_sockets
@with_python
@pytest.mark.points(61, 62, 63)
@pytest.mark.parametrize("repository", ["fal_v3", "fal"])
async def test_python_uploads(python: Python, repository: Any, tmp_path: Path) -> None:
    data = bytes(range(256)) * 400
    lifecycle = fal_client.StorageSettings(expires_in="1h", initial_acl=fal_client.StorageACL(default="hide"))
    options = {"repository": repository, "fallback_repository": repository}
    url = await python("upload", data, "application/x-thing", file_name='../a b/%2e%2e/x\\y;"z.bin', **options)
    assert await asyncio.to_thread(download, url) == data
    url = await python("upload", "words", "text/plain", lifecycle=lifecycle, **options)
    assert await asyncio.to_thread(download, url) == b"words"
    file = tmp_path / "a b.txt"
    file.write_text("in a file")
    assert await asyncio.to_thread(download, await python("upload_file", file, **options)) == b"in a file"


@leaves_sockets
@with_python
@pytest.mark.points(62)
async def test_python_uploads_what_it_starts_from(python: Python) -> None:
    from PIL import Image

    picture = Image.new("RGB", (64, 64), "red")
    url = await python("upload_image", picture, "png")
    fields = {**SMALL, "strength": 0.5, "sync_mode": True, "format": "png"}
    by_url = await python("run", APP, {**fields, "image_url": url})
    with io.BytesIO() as file:
        picture.save(file, "png")
        inline = fal_client.encode(file.getvalue(), "image/png")
    by_data = await python("run", APP, {**fields, "image_url": inline})
    assert by_url["images"][0]["url"] == by_data["images"][0]["url"]


@leaves_sockets
@with_python
@pytest.mark.slow
@pytest.mark.points(61)
async def test_python_uploads_101_mib(python: Python, tmp_path: Path) -> None:
    data = b"".join(number.to_bytes(8, "big") * 512 for number in range(101 * 2**8))
    assert len(data) == 101 * 2**20
    url = await python("upload", data, "application/octet-stream", file_name="large.bin")
    assert await asyncio.to_thread(download, url) == data
    file = tmp_path / "large.bin"
    await asyncio.to_thread(file.write_bytes, data)
    assert await asyncio.to_thread(download, await python("upload_file", file)) == data


@needs_node
@run
@pytest.mark.points(5)
@pytest.mark.parametrize("client", ["v1", "v0"])
async def test_javascript_with_a_refused_token(tmp_path: Path, client: str) -> None:
    async with serving(tmp_path, keys=True) as server:
        key = await server.key()
        await asyncio.to_thread(suite, "refused.mjs", server.http, client, FAL_KEY=key)


@needs_node
@run
@pytest.mark.points(23)
@pytest.mark.parametrize("client", ["v1", "v0"])
async def test_javascript_on_an_idle_connection(tmp_path: Path, client: str) -> None:
    async with serving(tmp_path, idle_timeout_s=0.5) as server:
        await asyncio.to_thread(suite, "idle.mjs", server.http, client)


# Each way to here.


class Secure:
    """A server that speaks TLS: where it is, the authority to trust, and its process."""

    def __init__(self, process: subprocess.Popen[str], made: certificates.Certificate) -> None:
        assert process.stderr
        said = ""
        for line in process.stderr:
            said += line
            if match := re.search(r"page +(https://\S+)/", line):
                break
        else:
            pytest.fail(f"the server did not become ready:\n{said}")
        self.url = match[1]
        self.ca = str(made.ca)
        self.pid = process.pid
        self.reader = threading.Thread(target=process.stderr.read)  # it never waits for us
        self.reader.start()

    @property
    def port(self) -> int:
        return int(self.url.rpartition(":")[2])


@contextmanager
def secure(folder: Path, *before: str, port: int = 0) -> Iterator[Secure]:
    """The product with TLS; ``before`` is the command that starts it."""
    made = certificates.write(folder / "tls")
    words = ["serve", "--port", str(port), "--data-dir", str(folder / "data")]
    words += ["--tls-cert", str(made.cert), "--tls-key", str(made.key)]
    environ = {**os.environ, "COLUMNS": "200"}
    command = [*before, sys.executable, "-m", "lcm_rt", *words]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environ) as process:
        try:
            server = Secure(process, made)
            yield server
            process.terminate()
            assert process.wait(20) == 0
            server.reader.join()
        finally:
            process.kill()


@pytest.fixture(scope="session")
def tls(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Secure]:
    with secure(tmp_path_factory.mktemp("secure")) as server:
        yield server


def kit_file(server: str, name: str, folder: Path, as_name: str = "") -> Path:
    """A file of the kit, fetched as a reader of the documentation does."""
    path = folder / (as_name or name)
    path.write_bytes(download(f"{server}/{name}"))
    return path


@needs_node
@pytest.mark.timeout(200)
@pytest.mark.points(36, 64)
@pytest.mark.parametrize(
    "client, recipe, surfaces",
    [
        ("v1", "proxy", EVERYTHING[:4]),
        ("v1", "middleware", EVERYTHING[:4]),
        ("v0", "middleware", EVERYTHING[:4]),
        ("v1", "socket", EVERYTHING),
        ("v0", "socket", EVERYTHING),
    ],
)
def test_recipe_in_the_program(server_url: str, client: str, recipe: str, surfaces: list[str]) -> None:
    said = node("--experimental-websocket", "smoke.mjs", client, recipe, server_url)
    assert json.loads(said.splitlines()[-1]) == surfaces


@needs_node
@pytest.mark.timeout(200)
@pytest.mark.points(64)
@pytest.mark.parametrize("client", ["v1", "v0", "v06"])
def test_recipe_preload(server_url: str, client: str, tmp_path: Path) -> None:
    preload = kit_file(server_url, "fal-local.cjs", tmp_path)
    surfaces = [surface for surface in EVERYTHING if client != "v06" or surface != "stream"]
    by_flag = {"NODE_OPTIONS": f"--experimental-websocket --require {preload}", "FAL_KEY": "k:s"}
    for variables in (by_flag, by_flag | {"NODE_OPTIONS": f"--require {preload}", "FAL_LOCAL": server_url}):
        assert json.loads(node("smoke.mjs", client, "as-is", **variables).splitlines()[-1]) == surfaces


@needs_node
@pytest.mark.timeout(300)
@pytest.mark.skipif(
    bool(missing("chromium")) and "CI" not in os.environ, reason=f"NO BROWSER IS TESTED: no {missing('chromium')}"
)
@pytest.mark.points(17, 32, 38, 64)
def test_pages(server_url: str, tls: Secure) -> None:
    """Recipes 6.1, 6.2 and 6.4 in a real browser, bytes as they went, and the platform's demonstrations."""
    told = json.loads(node("browser.mjs", shutil.which("chromium") or "", server_url, tls.url, timeout=280))
    assert {"draw-fast", "camera-turbo", "realtime", "names v0", "names v1", "names v06"} <= set(told)


def smoke(*words: str, cwd: Path = FAL, **variables: str) -> dict[str, list[str]]:
    """What ``smoke.py`` saw to work."""
    environ = {name: value for name, value in os.environ.items() if not name.startswith("FAL_")}
    done = subprocess.run(
        [sys.executable, *words],
        cwd=cwd,
        env=environ | {"FAL_KEY": "k:s"} | variables,
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    told: dict[str, list[str]] = json.loads(done.stdout)
    return told


BOTH = {"sync": EVERYTHING, "async": EVERYTHING}


@pytest.mark.points(64)
def test_recipe_python_module(server_url: str, tmp_path: Path) -> None:
    kit_file(server_url, "fal_local.py", tmp_path)
    program = str(FAL / "smoke.py")
    assert smoke("-m", "fal_local", program, cwd=tmp_path) == BOTH
    (tmp_path / "app.py").write_text(f"import fal_local\n{Path(program).read_text()}")
    assert smoke("app.py", cwd=tmp_path, FAL_LOCAL=f"{server_url}/") == BOTH
    shims = tmp_path / "shims"
    shims.mkdir()
    kit_file(server_url, "fal_local.py", shims, "sitecustomize.py")
    assert smoke(program, PYTHONPATH=str(shims)) == BOTH


@pytest.mark.points(64)
def test_recipe_python_hosts(tls: Secure) -> None:
    host = f"localhost:{tls.port}"
    told = smoke("smoke.py", "hosts", FAL_RUN_HOST=host, FAL_QUEUE_RUN_HOST=f"{host}/queue", SSL_CERT_FILE=tls.ca)
    without_uploads = [surface for surface in EVERYTHING if surface != "upload"]
    assert told == {"sync": without_uploads, "async": without_uploads}


@asynccontextmanager
async def tunnel(port: int) -> AsyncIterator[tuple[str, set[str]]]:
    """A proxy that takes every CONNECT to ``port`` of this machine: its address, and what it was asked for."""
    asked: set[str] = set()

    async def pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError):
            while data := await reader.read(65536):
                writer.write(data)
                await writer.drain()
        writer.close()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        asked.add((await reader.readuntil(b"\r\n\r\n")).split()[1].decode())
        there, back = await asyncio.open_connection("127.0.0.1", port)
        writer.write(b"HTTP/1.1 200 Connection established\r\n\r\n")
        await asyncio.gather(pump(reader, back), pump(there, writer))

    async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}", asked


@run
@pytest.mark.points(64)
async def test_recipe_python_proxy(tls: Secure) -> None:
    async with tunnel(tls.port) as (address, asked):
        assert await asyncio.to_thread(smoke, "smoke.py", HTTPS_PROXY=address, SSL_CERT_FILE=tls.ca) == BOTH
    assert asked == {"fal.run:443", "queue.fal.run:443", "rest.fal.ai:443", "v3.fal.media:443"}


@needs_node
@run
@pytest.mark.timeout(200)
@pytest.mark.points(35)
async def test_with_a_key_where_keys_are_asked_for(tmp_path: Path) -> None:
    async with serving(tmp_path, keys=True) as server:
        key = await server.key()
        for client in ("v1", "v0"):
            words = ("--require", str(KIT / "fal-local.js"), "smoke.mjs", client, "as-is")
            said = await asyncio.to_thread(node, *words, FAL_LOCAL=server.http, FAL_KEY=key)
            assert json.loads(said.splitlines()[-1]) == EVERYTHING
        program = str(FAL / "smoke.py")
        told = await asyncio.to_thread(smoke, "-m", "fal_local", program, cwd=KIT, FAL_LOCAL=server.http, FAL_KEY=key)
        assert told == BOTH


NAMES = "localhost fal.run queue.fal.run rest.fal.ai rest.alpha.fal.ai v3.fal.media"
OLDEST_NAME = "110602490-lcm-sd15-i2i.gateway.alpha.fal.ai"
ROOT = () if os.geteuid() == 0 else ("--user", "--map-root-user")
APART = ("unshare", *ROOT, "--net", "--mount")


def no_namespaces() -> str:
    """Why this machine lends no network of its own, in words; empty when it does."""
    for program in ("unshare", "nsenter", "ip", "mount"):
        if shutil.which(program) is None:
            return f"there is no {program}"
    done = subprocess.run([*APART, "ip", "link", "set", "lo", "up"], capture_output=True, text=True, check=False)
    return done.stderr.strip()


@needs_node
@pytest.mark.timeout(300)
@pytest.mark.points(64)
@pytest.mark.skipif(bool(no_namespaces()), reason=f"HOSTS FILE AND AUTHORITY ARE NOT TESTED: {no_namespaces()}")
def test_recipe_names_and_authority(tmp_path: Path) -> None:
    """Recipe 6.5: a hosts file and a local authority, in a network of its own where port 443 is free."""
    hosts = tmp_path / "hosts"
    hosts.write_text(f"127.0.0.1 {NAMES} {OLDEST_NAME}\n")
    prepare = 'ip link set lo up && mount --bind "$0" /etc/hosts && exec "$@"'
    with secure(tmp_path, *APART, "sh", "-c", prepare, str(hosts), port=443) as server:
        inside = ["nsenter", "--target", str(server.pid), "--net", "--mount", f"--wd={FAL}"]
        if ROOT:
            inside += ["--user", "--preserve-credentials"]
        environ = {name: value for name, value in os.environ.items() if not name.startswith("FAL_")}
        environ |= {"FAL_KEY": "k:s", "NODE_EXTRA_CA_CERTS": server.ca, "SSL_CERT_FILE": server.ca}

        def tell(*words: str) -> Any:
            command = [*inside, *words]
            done = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=100, check=False)
            assert done.returncode == 0, done.stdout + done.stderr
            return json.loads(done.stdout.splitlines()[-1])

        for client in ("v1", "v0"):
            assert tell("node", "--experimental-websocket", "smoke.mjs", client, "as-is") == EVERYTHING
        oldest = tell("node", "--experimental-websocket", "smoke.mjs", "v06", "as-is")
        assert oldest == [surface for surface in EVERYTHING if surface != "stream"]
        assert tell(sys.executable, "smoke.py") == BOTH


# The documentation's own programs.

BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```$", (KIT.parents[1] / "docs" / "clients.md").read_text(), re.M | re.S)


def programs(language: str, *without: str) -> list[str]:
    """The blocks of docs/clients.md in that language that are programs."""
    return [text for name, text in BLOCKS if name == language and not any(word in text for word in without)]


def at(server: str, program: str) -> str:
    """The program, for a server that is not where the documentation has it."""
    sockets = server.replace("http", "ws", 1)
    return program.replace("ws://localhost:8000", sockets).replace("http://localhost:8000", server)


@pytest.mark.points(64)
@pytest.mark.parametrize("program", programs("python"))
def test_documented_python(server_url: str, tmp_path: Path, program: str) -> None:
    kit_file(server_url, "fal_local.py", tmp_path)
    (tmp_path / "app.py").write_text(at(server_url, program))
    done = subprocess.run(
        [sys.executable, "app.py"], cwd=tmp_path, capture_output=True, text=True, timeout=100, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout
    if "picture.jpg" in program:
        assert (tmp_path / "picture.jpg").read_bytes().startswith(JPEG)


@needs_node
@pytest.mark.points(64)
@pytest.mark.parametrize("program", programs("js", "document."))
def test_documented_javascript(server_url: str, tmp_path: Path, program: str) -> None:
    kit_file(server_url, "fal-local.cjs", tmp_path)
    packages = tmp_path / "node_modules" / "@fal-ai"
    packages.mkdir(parents=True)
    (packages / "client").symlink_to(FAL / "node_modules" / "@fal-ai" / "client")
    (packages / "serverless-client").symlink_to(FAL / "node_modules" / "fal-v0")
    (tmp_path / "app.mjs").write_text(at(server_url, program))
    said = node("--experimental-websocket", "app.mjs", cwd=tmp_path)
    assert ("/files/" in said) == ("console.log" in program), said


@pytest.mark.skipif(shutil.which("curl") is None, reason="CURL IS NOT TESTED: it is not here")
@pytest.mark.parametrize(
    "line",
    [line for text in programs("sh") for line in text.splitlines() if line.startswith(("curl -s ", "curl -sN "))],
)
def test_documented_curl(server_url: str, line: str) -> None:
    said = subprocess.check_output(["bash", "-c", at(server_url, line)], text=True, timeout=100)
    assert json.loads(said.splitlines()[-2 if "stream" in line else -1].removeprefix("data: "))

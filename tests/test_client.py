"""Our own client, sync and async, against a live server with a fake engine, and doubles where a server must misbehave.

Every test of both clients is written once: ``Blocking`` makes the asynchronous one look like the other.
"""

from __future__ import annotations

import base64
import inspect
import json
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NamedTuple

import httpx2
import msgpack
import pytest
import serving as serving_module
from anyio.from_thread import BlockingPortal, start_blocking_portal
from fake_engine import colour
from PIL import Image as Pillow
from serving import SIDE, Server, serving_aside
from test_realtime import picture, pixels
from websockets.sync.server import ServerConnection
from websockets.sync.server import serve as serve_sockets

from lcm_rt.client import AsyncClient, AsyncJob, AsyncRealtime, Client, Fields, Image, Output, Preview
from lcm_rt.client.line import Line
from lcm_rt.client.messages import error_of
from lcm_rt.client.patience import Patience
from lcm_rt.client.protocol import PART_BYTES, WHOLE_BYTES
from lcm_rt.errors import (
    Cancelled,
    Forbidden,
    GenerationFailed,
    ImageError,
    InputError,
    LcmError,
    ModelLoading,
    NotFound,
    Overloaded,
    RequestTimeout,
    Superseded,
    TooLarge,
    Unauthorized,
    Unavailable,
)
from lcm_rt.server.serve import listen
from lcm_rt.types import GenerateInput

SMALL: Fields = {"image_size": {"width": SIDE, "height": SIDE}, "format": "png", "num_inference_steps": 1}


class Blocking:
    """An asynchronous client, job or session, to be used as its synchronous twin."""

    def __init__(self, portal: BlockingPortal, it: Any) -> None:
        self._portal = portal
        self._it = it

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._it, name)
        return partial(self._call, value) if inspect.ismethod(value) else value

    def _call(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        async def call() -> Any:
            result = function(*args, **kwargs)
            return await result if inspect.iscoroutine(result) else result

        result = self._portal.call(call)
        if isinstance(result, AsyncJob | AsyncRealtime):
            return Blocking(self._portal, result)
        return self._iterate(result) if inspect.isasyncgen(result) else result

    def _iterate(self, items: AsyncIterator[Any]) -> Iterator[Any]:
        while True:
            try:
                yield self._portal.call(items.__anext__)
            except StopAsyncIteration:
                return

    def __iter__(self) -> Iterator[Any]:
        return self._iterate(self._it.__aiter__())

    def __enter__(self) -> Blocking:
        self._context = self._portal.wrap_async_context_manager(self._it)
        self._context.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._context.__exit__(*error)


Connect = Callable[..., Any]


@pytest.fixture(params=["sync", "async"])
def connect(request: pytest.FixtureRequest) -> Iterator[Connect]:
    """Makes clients, which are closed at the end."""
    made: list[Any] = []
    with start_blocking_portal() as portal:

        def build(url: str, **options: Any) -> Any:
            options = {"timeout_s": 30.0, **options}
            if request.param == "sync":
                client: Any = Client(url, **options)
            else:

                async def create() -> AsyncClient:
                    return AsyncClient(url, **options)

                client = Blocking(portal, portal.call(create))
            made.append(client)
            return client

        yield build
        for client in made:
            client.close()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with serving_aside(tmp_path_factory.mktemp("client")) as server:
        yield server


@pytest.fixture
def client(connect: Connect, server: Server) -> Any:
    return connect(server.http)


class Asked(NamedTuple):
    method: str
    path: str
    headers: Any
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)


class Said(NamedTuple):
    """An answer; ``cut`` ends the connection before the whole of it was sent."""

    body: Any = b""
    status: int = 200
    headers: dict[str, str] = {}
    cut: bool = False

    @property
    def content(self) -> bytes:
        return self.body if isinstance(self.body, bytes) else json.dumps(self.body).encode()


class Quiet(ThreadingHTTPServer):
    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that did not wait is no news."""


class Double:
    """A server that says what a test tells it to, and remembers what it was asked.

    ``script`` has answers by method and path without the query; the last one is given again.
    """

    def __init__(self) -> None:
        self.asked: list[Asked] = []
        self.script: dict[str, list[Said | Callable[[Asked], Said]]] = {}
        double = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def answer(self) -> None:
                body = self.rfile.read(int(self.headers.get("content-length", 0)))
                asked = Asked(self.command, self.path, self.headers, body)
                double.asked.append(asked)
                answers = double.script[f"{self.command} {self.path.partition('?')[0]}"]
                said = answers.pop(0) if len(answers) > 1 else answers[0]
                said = said if isinstance(said, Said) else said(asked)
                self.send_response(said.status)
                for name, value in said.headers.items():
                    self.send_header(name, value)
                self.send_header("connection", "close")
                self.send_header("content-length", str(len(said.content) + said.cut))
                self.end_headers()
                self.wfile.write(said.content)

            do_GET = do_POST = do_PUT = answer

            def log_message(self, format: str, *args: Any) -> None:
                pass

        self._server = Quiet(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> Double:
        self._thread = threading.Thread(target=partial(self._server.serve_forever, 0.01))
        self._thread.start()
        return self

    def __exit__(self, *error: Any) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


@pytest.fixture
def double() -> Iterator[Double]:
    with Double() as double:
        yield double


def answer(**fields: Any) -> dict[str, Any]:
    """What a server says of a picture."""
    uri = "data:image/png;base64," + base64.b64encode(b"pixels").decode()
    return {
        "images": [{"url": uri, "width": 1, "height": 2, "content_type": "image/png"}],
        "seed": 7,
        "model": "m",
        "prompt": "lake",
        "num_inference_steps": 4,
        "timings": {"total": 0.1},
        "nsfw_content_detected": [False],
        **fields,
    }


def refused(status: int, code: str, **headers: str) -> Said:
    return Said({"detail": "no", "message": "no", "error_type": code}, status, headers)


def wait_for(condition: Callable[[], bool]) -> None:
    """Wait for what nobody announces; the test's own time limit ends a wait that is in vain."""
    while not condition():
        time.sleep(0.001)


# ---- what goes in and what comes out -----------------------------------------------------------------------------


def test_the_fields_are_those_of_the_server() -> None:
    """Type checkers and editors know them by ``Fields``; those with names of their own are not in it."""
    pictures = {"image_url", "image_bytes", "image", "mask_url", "mask_bytes"}
    assert set(Fields.__annotations__) == set(GenerateInput.model_fields) - pictures - {"prompt", "lora_url"}


def test_a_picture_is_in_hand(client: Any, tmp_path: Path) -> None:
    output = client.generate("lake", seed=7, request_id="r", **SMALL)
    assert tuple(pixels(output.image.content)[0, 0]) == colour("lake", 7)
    assert (output.image.width, output.image.height, output.image.content_type) == (SIDE, SIDE, "image/png")
    assert (output.seed, output.model, output.prompt, output.num_inference_steps) == (7, "fake", "lake", 1)
    assert output.request_id == "r" and output.flagged == [False] and output.timings["total"] > 0
    assert output.image.url is None
    assert output.image.save(tmp_path / "lake.png").read_bytes() == output.image.content


def test_several_pictures(client: Any) -> None:
    output = client.generate("lake", app="fake", seed=7, num_images=3, **SMALL)
    assert [tuple(pixels(image.content)[0, 0]) for image in output.images] == [colour("lake", s) for s in (7, 8, 9)]
    assert output.flagged == [False] * 3


def test_a_picture_may_be_given_in_every_form(client: Any, tmp_path: Path) -> None:
    data = picture(128, 64)
    path = tmp_path / "in.png"
    path.write_bytes(data)
    forms = [
        data,
        bytearray(data),
        path,
        Pillow.open(path),
        Image(data, "image/png", 128, 64),
        "data:image/png;base64," + base64.b64encode(data).decode(),
    ]
    mask = Pillow.new("L", (128, 64), 255)
    for form in forms:
        output = client.generate("lake", image=form, mask=mask, num_inference_steps=1)
        assert (output.image.width, output.image.height) == (128, 64), type(form)


BAD_WORDS: list[tuple[dict[str, Any], type[LcmError], str, str]] = [
    ({"strengt": 1}, InputError, "strengt", "did you mean 'strength'?"),
    ({"lora_path": "x"}, InputError, "lora_path", "no such field"),
    ({"strength": 7}, InputError, "strength", "less than or equal to 1"),
    ({"image": b"junk"}, ImageError, "image_bytes", "image_bytes: "),
    ({"image": Path("/nowhere.png")}, ImageError, "image", "cannot be read"),
    ({"image": 7}, InputError, "image", "not int"),
    ({"seed": object()}, InputError, "body", "not JSON serializable: object"),
    ({"lora": Path("/nowhere.safetensors")}, InputError, "file", "cannot be read"),
]


@pytest.mark.parametrize(("fields", "kind", "field", "text"), BAD_WORDS)
def test_bad_words_name_their_field(client: Any, fields: Any, kind: type[InputError], field: str, text: str) -> None:
    with pytest.raises(kind, match=text.replace("?", r"\?")) as error:
        client.generate("lake", **fields)
    assert error.value.field == field


def test_every_field_that_is_wrong_is_told(client: Any) -> None:
    with pytest.raises(InputError) as error:
        client.generate("lake", strength=7, quality=0)
    assert [entry["loc"] for entry in error.value.detail()] == [["body", "strength"], ["body", "quality"]]


def test_an_unknown_app_is_not_found(client: Any) -> None:
    with pytest.raises(NotFound, match="no app is called 'nope'"):
        client.generate("lake", app="nope")


def test_a_picture_that_fails(client: Any) -> None:
    with pytest.raises(GenerationFailed):
        client.generate("nan")


ERRORS: list[tuple[int, Any, str | None, type[LcmError], str]] = [
    (401, {"detail": "who?", "message": "who?", "error_type": "unauthorized"}, "unauthorized", Unauthorized, "who?"),
    (403, {"detail": "no"}, None, Forbidden, "no"),
    (404, {"detail": "Not Found", "message": "Not Found"}, None, NotFound, "Not Found"),
    (413, None, None, TooLarge, "status 413"),
    (422, {"detail": "bad", "message": "bad"}, None, InputError, "body: bad"),
    (422, {"detail": [{"loc": ["body"], "msg": "bad", "type": "x"}]}, "new_kind", InputError, "body: bad"),
    (502, None, None, Unavailable, "status 502"),
    (504, {"message": "late"}, "request_timeout", RequestTimeout, "late"),
    (418, {"message": "tea"}, "teapot", LcmError, "tea"),
    (500, [], None, LcmError, "status 500"),
]


@pytest.mark.parametrize(("status", "body", "code", "kind", "text"), ERRORS)
def test_what_a_server_says_is_an_error_of_ours(
    status: int, body: Any, code: str | None, kind: type[LcmError], text: str
) -> None:
    error = error_of(body, code=code, status=status)
    assert type(error) is kind
    assert text in str(error)


def test_an_error_without_a_class_keeps_its_name() -> None:
    error = error_of({"message": "tea"}, code="teapot", status=418)
    assert (error.code, error.status) == ("teapot", 418)


@pytest.mark.parametrize("body", [b"<html>", {"images": []}, {"images": [{}]}, [], answer(images=[{"url": 7}])])
def test_another_server_is_recognized(connect: Connect, double: Double, body: Any) -> None:
    double.script = {"POST /run/fal-ai/lcm": [Said(body)]}
    with pytest.raises(LcmError, match="no answer of an lcm-rt server"):
        connect(double.url).generate("lake")


@pytest.mark.parametrize("url", ["localhost:8000", "ftp://x", "http://", "/models"])
def test_a_url_that_is_none(url: str) -> None:
    with pytest.raises(InputError, match="no http or https URL"):
        Client(url)


def test_the_environment_says_where_and_with_which_key(double: Double, monkeypatch: pytest.MonkeyPatch) -> None:
    double.script = {"GET /base/health": [Said({"status": "ready", "stage": "ready"})]}
    monkeypatch.setenv("LCM_RT_URL", f"{double.url}/base/")
    monkeypatch.setenv("LCM_RT_KEY", "id:secret")
    with Client() as client:
        assert client.health().status == "ready"
    assert double.asked[0].headers["authorization"] == "Key id:secret"
    assert double.asked[0].headers["user-agent"].startswith("lcm-rt/")


# ---- what fails for a while ---------------------------------------------------------------------------------------


def test_what_may_pass_is_tried_again(connect: Connect, double: Double) -> None:
    busy, cut = refused(429, "overloaded", **{"retry-after": "0"}), Said(b"x", cut=True)
    double.script = {"POST /run/fal-ai/lcm": [busy, Said(b"bad gateway", 502), cut, Said(answer())]}
    output = connect(double.url).generate("lake")
    assert output.image.content == b"pixels"
    assert len(double.asked) == 4


def test_a_model_that_loads_uses_up_no_tries(connect: Connect, double: Double) -> None:
    loading = refused(503, "model_loading", **{"retry-after": "0"})
    double.script = {"POST /run/fal-ai/lcm": [*[loading] * 5, Said(answer())]}
    assert connect(double.url, retries=1).generate("lake").seed == 7


@pytest.mark.parametrize(
    ("said", "kind"), [(refused(422, "invalid_input"), InputError), (refused(507, "out_of_memory"), LcmError)]
)
def test_what_will_not_pass_is_not(connect: Connect, double: Double, said: Said, kind: type[LcmError]) -> None:
    double.script = {"POST /run/fal-ai/lcm": [said, Said(answer())]}
    with pytest.raises(kind):
        connect(double.url).generate("lake")
    assert len(double.asked) == 1


def test_tries_come_to_an_end(connect: Connect, double: Double) -> None:
    double.script = {"GET /health": [refused(429, "overloaded")]}
    with pytest.raises(Overloaded):
        connect(double.url, retries=2).health()
    assert len(double.asked) == 3


def test_no_server(connect: Connect) -> None:
    with pytest.raises(Unavailable, match="http://127.0.0.1:1/health"):
        connect("http://127.0.0.1:1", retries=1).health()


def test_no_answer_in_time(connect: Connect, double: Double) -> None:
    done = threading.Event()

    def late(asked: Asked) -> Said:
        done.wait(20)
        return Said()

    double.script = {"GET /health": [late]}
    with pytest.raises(RequestTimeout, match="no answer in time"):
        connect(double.url).health(timeout_s=0.2)
    done.set()


def test_a_server_that_asks_for_more_time_than_there_is(connect: Connect, double: Double) -> None:
    double.script = {"GET /health": [refused(503, "model_loading", **{"retry-after": "60"})]}
    with pytest.raises(ModelLoading):
        connect(double.url).health(timeout_s=5)


def test_pauses_grow_and_end() -> None:
    now = 0.0
    patience = Patience(None, 100, clock=lambda: now)
    pauses = [patience.pause(Unavailable("x")) for _ in range(2000)]
    for number, pause in enumerate(pauses):
        due = min(0.1 * 2 ** min(number, 10), 2)
        assert due / 2 <= pause <= due * 1.5
    assert 30 <= patience.pause(Unavailable("x"), 30) <= 37.5
    patience.renew()
    assert patience.pause(Unavailable("x")) <= 0.15
    now = 100
    with pytest.raises(Unavailable):
        patience.pause(Unavailable("x"))
    with pytest.raises(RequestTimeout, match="within 100 s"):
        patience.left_s()


# ---- pictures by address, and the key -----------------------------------------------------------------------------


def test_pictures_by_address_are_fetched(connect: Connect, double: Double) -> None:
    images = [{"url": f"{double.url}/files/{n}", "width": 1, "height": 1, "content_type": "x"} for n in "ab"]
    double.script = {
        "POST /run/fal-ai/lcm": [Said(answer(images=images))],
        "GET /files/a": [Said(b"A")],
        "GET /files/b": [refused(503, "unavailable"), Said(b"B")],
    }
    output = connect(double.url).generate("lake", sync_mode=False)
    assert [image.content for image in output.images] == [b"A", b"B"]
    assert output.image.url == f"{double.url}/files/a"
    assert double.asked[0].json["sync_mode"] is False


def test_the_key_goes_to_its_own_server_only(connect: Connect, double: Double) -> None:
    with Double() as other:
        other.script = {"GET /a": [Said(b"A")]}
        images = [{"url": f"{other.url}/a", "width": 1, "height": 1, "content_type": "x"}]
        double.script = {"POST /run/fal-ai/lcm": [Said(answer(images=images))]}
        connect(double.url, key="id:secret").generate("lake")
    assert double.asked[0].headers["authorization"] == "Key id:secret"
    assert other.asked[0].headers["authorization"] is None


# ---- streams, models ----------------------------------------------------------------------------------------------


def test_a_stream_shows_what_is_on_its_way(client: Any) -> None:
    *previews, output = client.stream("lake", seed=7, request_id="r", format="png", num_inference_steps=2)
    assert previews and all(isinstance(preview, Preview) for preview in previews)
    assert (previews[0].step, previews[0].num_inference_steps, previews[0].request_id) == (1, 2, "r")
    assert tuple(pixels(previews[0].image.content)[0, 0]) == colour("lake", 7)
    assert isinstance(output, Output)
    assert tuple(pixels(output.image.content)[0, 0]) == colour("lake", 7)


def test_a_stream_that_fails(client: Any) -> None:
    with pytest.raises(InputError):
        next(client.stream("lake", strength=7))
    with pytest.raises(GenerationFailed):
        list(client.stream("nan", previews=False))


def test_a_stream_that_is_lost(connect: Connect, double: Double) -> None:
    preview = {**answer(), "preview": True, "step": 1}
    begun = b"data: " + json.dumps(preview).encode() + b"\n\n"
    double.script = {"POST /run/fal-ai/lcm/stream": [refused(429, "overloaded"), Said(begun, cut=True)]}
    stream = connect(double.url).stream("lake")
    assert next(stream).step == 1
    with pytest.raises(Unavailable, match="in the middle"):
        next(stream)
    assert len(double.asked) == 2


def test_models_and_health(client: Any) -> None:
    (model,) = client.models()
    assert (model.name, model.state, model.default) == ("fake", "ready", True)
    assert client.health().status == "ready"
    assert client.load("fake").state == "ready"
    assert client.unload("fake").state in ("unloading", "unloaded")
    wait_for(lambda: client.models()[0].state == "unloaded")
    assert client.load("fake").state in ("loading", "ready")
    wait_for(lambda: client.models()[0].state == "ready")
    with pytest.raises(NotFound):
        client.load("nope")


# ---- jobs ----------------------------------------------------------------------------------------------------------

JOB = "/queue/fal-ai/lcm/requests/1"


def state(name: str, *logs: str, **fields: Any) -> dict[str, Any]:
    lines = [
        {"message": log, "level": "INFO", "source": "USER", "timestamp": "2026-01-01T00:00:00+00:00"} for log in logs
    ]
    return {"status": name, "request_id": "1", "logs": lines, **fields}


def events(*states: dict[str, Any]) -> bytes:
    return b"".join(b": ping\n\ndata: " + json.dumps(state).encode() + b"\n\n" for state in states)


def test_a_job(connect: Connect, double: Double) -> None:
    waiting, running = state("IN_QUEUE", queue_position=2), state("IN_PROGRESS", "one", "two")
    done = state("COMPLETED", metrics={"inference_time": 0.5})
    double.script = {
        "POST /queue/fal-ai/lcm": [
            Said(b"", cut=True),
            Said({"status": "IN_QUEUE", "request_id": "1", "response_url": f"{double.url}{JOB}"}),
        ],
        f"GET {JOB}/status": [Said(waiting, 202)],
        # The second connection tells all of the logs again, as it is to.
        f"GET {JOB}/status/stream": [
            Said(events(waiting, running), cut=True),
            Said(events(running, state("IN_PROGRESS", "three"))),
            Said(events(state("COMPLETED", "one", "two", "three", "four", metrics={"inference_time": 0.5}))),
            Said(events(done)),
        ],
        f"GET {JOB}": [Said(answer())],
    }
    client = connect(double.url)
    job = client.submit("lake", image=b"png", webhook="https://me/?a=b", priority="low", start_within_s=5)
    assert (job.id, job.url) == ("1", f"{double.url}{JOB}")
    first, second = double.asked
    assert first.path == "/queue/fal-ai/lcm?fal_webhook=https%3A%2F%2Fme%2F%3Fa%3Db"
    assert first.json == {"prompt": "lake", "image_bytes": base64.b64encode(b"png").decode()}
    assert (first.headers["x-fal-queue-priority"], first.headers["x-fal-request-timeout"]) == ("low", "5")
    assert first.headers["idempotency-key"] == second.headers["idempotency-key"]

    status = client.job(job.url).status()
    assert (status.state, status.position, status.logs, status.done) == ("IN_QUEUE", 2, [], False)
    told = list(job.events())
    assert [status.state for status in told[:2]] == ["IN_QUEUE", "IN_PROGRESS"]
    assert [log.message for status in told for log in status.logs] == ["one", "two", "three", "four"]
    assert told[-1].done and told[-1].metrics == {"inference_time": 0.5}
    assert job.result().image.content == b"pixels"


def test_each_submission_is_a_job_of_its_own(connect: Connect, double: Double) -> None:
    double.script = {"POST /queue/fal-ai/lcm": [Said({"response_url": JOB})]}
    client = connect(double.url)
    assert client.submit("lake").url == f"{double.url}{JOB}"
    client.submit("lake")
    first, second = double.asked
    assert first.headers["idempotency-key"] != second.headers["idempotency-key"]


def test_a_job_that_failed(connect: Connect, double: Double) -> None:
    double.script = {
        "POST /queue/fal-ai/lcm": [Said({"response_url": JOB})],
        f"GET {JOB}/status/stream": [Said(events(state("COMPLETED", error="no", error_type="image_load_error")))],
        f"GET {JOB}": [
            Said(
                {
                    "detail": [{"loc": ["body", "image_url"], "msg": "no", "type": "x"}],
                    "error_type": "image_load_error",
                },
                422,
            )
        ],
    }
    job = connect(double.url).submit("lake")
    (status,) = job.events()
    assert status.error == "no"
    with pytest.raises(ImageError) as error:
        job.result()
    assert error.value.field == "image_url"


def test_a_job_that_does_not_end(connect: Connect, double: Double) -> None:
    double.script = {
        f"GET {JOB}/status/stream": [Said(events(state("IN_QUEUE", queue_position=0)))],
    }
    with pytest.raises((RequestTimeout, Unavailable)):
        connect(double.url, retries=100).job(double.url + JOB).result(timeout_s=0.5)


def test_cancel(connect: Connect, double: Double) -> None:
    double.script = {
        f"PUT {JOB}/cancel": [
            Said({"status": "CANCELLATION_REQUESTED"}, 202),
            Said({"status": "ALREADY_COMPLETED"}, 400),
            Said({"status": "NOT_FOUND"}, 404),
            refused(400, "bad_request"),
        ]
    }
    job = connect(double.url).job(double.url + JOB)
    assert job.cancel() is True
    assert job.cancel() is False
    with pytest.raises(NotFound):
        job.cancel()
    with pytest.raises(LcmError, match="no"):
        job.cancel()


def test_subscribe(connect: Connect, double: Double) -> None:
    double.script = {
        "POST /queue/fal-ai/lcm": [Said({"response_url": JOB})],
        f"GET {JOB}/status/stream": [Said(events(state("IN_PROGRESS"), state("COMPLETED")))],
        f"GET {JOB}": [Said(answer())],
    }
    updates: list[str] = []
    output = connect(double.url).subscribe("lake", on_update=lambda status: updates.append(status.state))
    assert output.seed == 7
    assert updates == ["IN_PROGRESS", "COMPLETED"]


def test_a_job_that_is_left_is_cancelled(connect: Connect, double: Double) -> None:
    double.script = {
        "POST /queue/fal-ai/lcm": [Said({"response_url": JOB})],
        f"GET {JOB}/status/stream": [Said(events(state("IN_QUEUE")))],
        f"PUT {JOB}/cancel": [Said({"status": "CANCELLATION_REQUESTED"}, 202)],
    }

    def leave(status: Any) -> None:
        raise KeyError("enough")

    with pytest.raises(KeyError):
        connect(double.url).subscribe("lake", on_update=leave)
    assert double.asked[-1].method == "PUT"


def test_jobs_of_a_live_server(client: Any) -> None:
    job = client.submit("lake", seed=7, priority="low", start_within_s=60, **SMALL)
    *_, last = client.job(job.url).events()
    assert last.done and last.error is None
    assert job.status(logs=True).done and job.id in job.url
    output = job.result()
    assert tuple(pixels(output.image.content)[0, 0]) == colour("lake", 7)
    assert output.image.url
    assert job.result() == output
    assert job.cancel() is False

    states: list[str] = []
    output = client.subscribe("lake", app="fake", seed=8, on_update=lambda status: states.append(status.state), **SMALL)
    assert output.seed == 8 and states[-1] == "COMPLETED"
    failed = client.submit("nan", **SMALL)
    with pytest.raises(GenerationFailed):
        failed.result()
    with pytest.raises(InputError) as error:
        client.submit("lake", strength=7)
    assert error.value.field == "strength"
    with pytest.raises(NotFound):
        client.job(job.url.replace(job.id, "nothing")).result()


def test_a_job_of_a_live_server_that_is_left(client: Any, tmp_path: Path) -> None:
    hold = tmp_path / "hold"
    os.mkfifo(hold)
    with ThreadPoolExecutor(1) as pool:
        opening = pool.submit(hold.open, "wb")
        with pytest.raises(RequestTimeout):
            client.subscribe(f"hold={hold}", timeout_s=0.5, **SMALL)
        opening.result(10).close()


# ---- uploads --------------------------------------------------------------------------------------------------------


def upload_script(double: Double, way: str) -> None:
    place = {"upload_url": f"{double.url}/put/x?signature=s", "file_url": f"{double.url}/files/x"}
    double.script = {f"POST /rest/storage/upload/{way}": [Said(place)]}


def test_a_small_upload(connect: Connect, double: Double, tmp_path: Path) -> None:
    upload_script(double, "initiate")
    double.script["PUT /put/x"] = [Said(b"", 503), Said()]
    path = tmp_path / "my cat.png"
    path.write_bytes(b"pixels")
    client = connect(double.url, key="id:secret")
    assert client.upload(path) == f"{double.url}/files/x"
    asked, failed, put = double.asked
    assert asked.json == {"content_type": "image/png", "file_name": "my cat.png"}
    assert asked.headers["authorization"] == "Key id:secret"
    assert failed.body == put.body == b"pixels"
    assert (put.path, put.headers["content-type"]) == ("/put/x?signature=s", "image/png")
    assert put.headers["authorization"] is None
    client.upload(b"words", content_type="text/plain", name="w")
    assert double.asked[-1].headers["content-type"] == "text/plain"


def test_a_large_upload_goes_in_parts(connect: Connect, double: Double, tmp_path: Path) -> None:
    upload_script(double, "initiate-multipart")
    data = os.urandom(2**20) * (WHOLE_BYTES // 2**20) + b"end"
    (tmp_path / "big.bin").write_bytes(data)
    for number in (1, 2):
        double.script[f"PUT /put/x/{number}"] = [Said({"partNumber": number, "etag": f"e{number}"})]
    double.script["POST /put/x/complete"] = [Said({})]
    assert connect(double.url).upload(tmp_path / "big.bin") == f"{double.url}/files/x"
    _, first, second, complete = double.asked
    assert len(first.body) == PART_BYTES and first.body + second.body == data
    assert first.path == "/put/x/1?signature=s" and complete.path == "/put/x/complete?signature=s"
    assert complete.json == {"parts": [{"partNumber": 1, "etag": "e1"}, {"partNumber": 2, "etag": "e2"}]}


@pytest.mark.parametrize("size", [1000, WHOLE_BYTES + 1])
def test_an_upload_to_a_live_server(client: Any, server: Server, tmp_path: Path, size: int) -> None:
    data = picture(128, 64)
    path = tmp_path / "ein Bild mit Größe.png"
    path.write_bytes(data + bytes(size))  # what follows a picture in its file is no harm
    url = client.upload(path)
    reply = httpx2.get(url)
    assert reply.content == path.read_bytes() and reply.headers["content-type"] == "image/png"
    if size == 1000:
        output = client.generate("lake", image=url, num_inference_steps=1)
        assert (output.image.width, output.image.height) == (128, 64)


def test_pictures_that_a_live_server_keeps(client: Any) -> None:
    output = client.generate("lake", seed=7, sync_mode=False, **SMALL)
    assert tuple(pixels(output.image.content)[0, 0]) == colour("lake", 7)
    assert httpx2.get(output.image.url).content == output.image.content


def test_a_lora_is_uploaded(connect: Connect, double: Double, tmp_path: Path) -> None:
    upload_script(double, "initiate")
    double.script |= {"PUT /put/x": [Said()], "POST /run/fal-ai/lcm": [Said(answer())]}
    (tmp_path / "ink.safetensors").write_bytes(b"weights")
    connect(double.url).generate("lake", lora=tmp_path / "ink.safetensors", lora_scale=0.5)
    assert double.asked[0].json["file_name"] == "ink.safetensors"
    assert double.asked[-1].json["lora_url"] == f"{double.url}/files/x"


# ---- realtime -------------------------------------------------------------------------------------------------------


def test_a_session(client: Any) -> None:
    with client.realtime() as session:
        session.send("lake", seed=7, request_id="r", image=Pillow.new("RGB", (SIDE, SIDE)), format="png")
        output = session.receive(10)
        assert tuple(pixels(output.image.content)[0, 0]) == colour("lake", 7)
        assert output.request_id == "r"
        assert session.generate("sea", seed=8, **SMALL).prompt == "sea"
        with pytest.raises(RequestTimeout):
            session.receive(0.05)


def test_a_session_shows_previews(client: Any) -> None:
    seen: list[Preview] = []

    def show(preview: Preview) -> None:
        seen.append(preview)
        raise KeyError("this is the caller's fault, and no reason to end the session")

    with client.realtime(on_preview=show) as session:
        for number in range(3):
            session.generate("lake", request_id=number, num_inference_steps=3)
    assert seen and {preview.num_inference_steps for preview in seen} == {3}
    assert {preview.request_id for preview in seen} <= {0, 1, 2}


def test_previews_that_nobody_looks_at_are_passed_over(client: Any) -> None:
    with client.realtime() as session:
        assert session.generate("lake", previews=True, num_inference_steps=3).images


def test_a_message_that_is_wrong_does_not_end_a_session(client: Any) -> None:
    with client.realtime() as session:
        with pytest.raises(InputError, match="did you mean"):
            session.send("lake", strengt=1)
        for fields in ({"strength": 7}, {"image": Path("/nowhere.png")}, {"seed": object()}, {"lora": b"x"}):
            with pytest.raises(InputError):
                session.generate("lake", **fields)
            session.send("lake", **fields)
            with pytest.raises(InputError):
                session.receive(10)
        with pytest.raises(TooLarge):
            session.generate("lake", image=bytes(33 * 2**20))
        assert session.generate("lake", **SMALL).prompt == "lake"


def test_of_a_flood_the_newest_is_answered(client: Any, server: Server) -> None:
    before = server.metric("lcm_rt_pictures_total", model="fake", priority="realtime")
    with client.realtime() as session:
        for number in range(500):
            session.send(f"message {number}", request_id=number, **SMALL)
        answered = []
        for output in session:
            answered.append(output.request_id)
            if output.request_id == 499:
                break
        with pytest.raises(RequestTimeout):
            session.receive(0.05)
    made = server.metric("lcm_rt_pictures_total", model="fake", priority="realtime") - before
    assert answered == sorted(answered)
    assert len(answered) <= made < 500


def test_several_may_wait_for_their_own_answer(connect: Connect, server: Server) -> None:
    """The answer to each that is not superseded by the others is its own."""
    client = connect(server.http)
    with client.realtime(max_buffering=60) as session, ThreadPoolExecutor(8) as pool:

        def ask(number: int) -> bool:
            try:
                return session.generate(f"picture {number}", **SMALL).prompt == f"picture {number}"
            except Superseded:
                return False

        assert list(pool.map(ask, range(24))) == [True] * 24


def test_newer_messages_supersede(client: Any, server: Server, tmp_path: Path) -> None:
    hold = tmp_path / "hold"
    os.mkfifo(hold)
    before = server.metric("lcm_rt_messages_total")
    with client.realtime() as session, ThreadPoolExecutor(3) as pool:
        first = pool.submit(session.generate, f"hold={hold}", **SMALL)
        with hold.open("wb"):  # it has begun
            second = pool.submit(session.generate, "second", **SMALL)
            wait_for(lambda: server.metric("lcm_rt_messages_total") == before + 2)
            third = pool.submit(session.generate, "third", **SMALL)
            wait_for(lambda: server.metric("lcm_rt_messages_total") == before + 3)
        assert first.result(10).prompt.startswith("hold")
        with pytest.raises(Superseded):
            second.result(10)
        assert third.result(10).prompt == "third"


@pytest.fixture
def port(monkeypatch: pytest.MonkeyPatch) -> int:
    """A free port, on which servers of this test listen, one after the other."""
    with listen("127.0.0.1", 0) as end:
        number: int = end.getsockname()[1]
    monkeypatch.setattr(serving_module, "listen", lambda host, port: listen(host, number))
    return number


def test_a_server_that_starts_again(
    connect: Connect, port: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is under way when it stops is answered by the next one."""
    monkeypatch.setattr("lcm_rt.workers.STOP_S", 0.1)  # its engine will not end by itself
    hold = tmp_path / "hold"
    os.mkfifo(hold)
    with connect(f"http://127.0.0.1:{port}").realtime() as session, ThreadPoolExecutor(1) as pool:
        with serving_aside(tmp_path):
            assert session.generate("before", **SMALL).prompt == "before"
            under_way = pool.submit(session.generate, f"hold={hold}", seed=7, **SMALL)
            end = hold.open("wb")  # it has begun, and will not end
        end.close()
        assert not under_way.done()
        with serving_aside(tmp_path) as server:
            hold.open("wb").close()  # it has begun again
            assert under_way.result(20).seed == 7
            assert session.generate("after", **SMALL).prompt == "after"
            assert server.metric("lcm_rt_messages_total") == 2


def test_while_there_is_no_server_only_the_newest_is_kept(connect: Connect, port: int, tmp_path: Path) -> None:
    with connect(f"http://127.0.0.1:{port}").realtime() as session:
        for number in range(100):
            session.send("lake", request_id=number, **SMALL)
        with serving_aside(tmp_path) as server:
            assert session.receive(20).request_id == 99
            assert server.metric("lcm_rt_messages_total") == 1


def test_no_server_for_too_long(connect: Connect) -> None:
    with connect("http://127.0.0.1:1").realtime(timeout_s=0.3) as session:
        with pytest.raises(Unavailable):
            session.generate("lake")
        for _ in range(2):
            session.send("lake")
            with pytest.raises(Unavailable):
                session.receive(10)


def test_an_idle_session_is_closed_and_comes_back(connect: Connect, tmp_path: Path) -> None:
    with serving_aside(tmp_path, idle_timeout_s=0.05) as server, connect(server.http).realtime() as session:
        for number in range(3):
            assert session.generate("lake", seed=number, **SMALL).seed == number
            wait_for(lambda: server.metric("lcm_rt_sessions") == 0)
        with pytest.raises(RequestTimeout):
            session.receive(0.05)  # nothing is told of it


def test_keys(connect: Connect, tmp_path: Path) -> None:
    with (
        start_blocking_portal() as portal,
        portal.wrap_async_context_manager(serving_module.serving(tmp_path, keys=True)) as server,
    ):
        key = portal.call(server.key)
        for good in (key, None, "wrong:key"):
            client = connect(server.http, key=good)
            with client.realtime() as session:
                if good == key:
                    assert client.generate("lake", **SMALL).seed >= 0
                    assert session.generate("lake", **SMALL).seed >= 0
                else:
                    with pytest.raises(Unauthorized):
                        client.generate("lake")
                    with pytest.raises(Unauthorized):
                        session.generate("lake")


def test_a_session_of_an_unknown_app(client: Any) -> None:
    with client.realtime("nope") as session:
        with pytest.raises(NotFound, match="no app is called 'nope'"):
            session.generate("lake")


@pytest.mark.parametrize("number", [0, 61])
def test_max_buffering_has_a_range(client: Any, number: int) -> None:
    with pytest.raises(InputError, match="max_buffering"):
        client.realtime(max_buffering=number)


def test_a_session_that_is_closed(client: Any) -> None:
    with ThreadPoolExecutor(1) as pool:
        with client.realtime() as session:
            listening = pool.submit(list, session)
            session.generate("lake", **SMALL)
        assert listening.result(10) == []
    with pytest.raises(Cancelled):
        session.send("lake")
    with pytest.raises(Cancelled):
        session.generate("lake")
    with pytest.raises(Cancelled):
        session.receive()
    assert list(session) == []
    with session:
        assert session.generate("lake", **SMALL).prompt == "lake"


def test_a_session_that_is_not_entered(client: Any) -> None:
    with pytest.raises(Cancelled):
        client.realtime().send("lake")


@contextmanager
def sockets(handler: Callable[[ServerConnection], None]) -> Iterator[str]:
    """A realtime server of its own kind."""
    with serve_sockets(handler, "127.0.0.1", 0) as server, ThreadPoolExecutor(1) as pool:
        pool.submit(server.serve_forever)
        try:
            yield f"http://127.0.0.1:{server.socket.getsockname()[1]}"
        finally:
            server.shutdown()


def test_after_a_lost_connection_the_newest_message_is_sent_again(connect: Connect) -> None:
    heard: list[list[str]] = []

    def handler(socket: ServerConnection) -> None:
        heard.append([])
        for frame in socket:
            message = msgpack.unpackb(frame)
            heard[-1].append(message["prompt"])
            if len(heard) == 1 and len(heard[-1]) == 3:
                socket.socket.close()  # without a word
                return
            if len(heard) == 2:
                socket.send(msgpack.packb(answer(prompt=message["prompt"], request_id=message["request_id"])))

    with sockets(handler) as url, connect(url).realtime(max_buffering=60) as session, ThreadPoolExecutor(3) as pool:
        asked = []
        for prompt in "abc":
            asked.append(pool.submit(session.generate, prompt))
            wait_for(lambda: sum(map(len, heard)) >= len(asked))
        for old in asked[:2]:
            with pytest.raises(Superseded):
                old.result(10)
        assert asked[2].result(10).prompt == "c"
    assert heard == [["a", "b", "c"], ["c"]]


def test_as_long_as_answers_come_it_may_be_lost_again_and_again(connect: Connect) -> None:
    """``timeout_s`` is for one stretch without an answer."""
    seen: set[str] = set()

    def handler(socket: ServerConnection) -> None:
        for frame in socket:
            message = msgpack.unpackb(frame)
            if message["prompt"] not in seen:
                seen.add(message["prompt"])
                return
            socket.send(msgpack.packb(answer(request_id=message["request_id"])))

    with sockets(handler) as url, connect(url).realtime(timeout_s=0.5) as session:
        for number in range(8):
            assert session.generate(f"lake {number}").seed == 7


def test_a_server_that_has_no_room_is_tried_again(connect: Connect) -> None:
    opened = []

    def handler(socket: ServerConnection) -> None:
        opened.append(socket)
        if len(opened) < 3:
            socket.send(json.dumps({"type": "x-fal-error", "error": "overloaded", "reason": "full"}))
            return
        message = msgpack.unpackb(socket.recv())
        socket.send(msgpack.packb(answer(request_id=message["request_id"])))
        socket.recv()

    with sockets(handler) as url, connect(url).realtime() as session:
        assert session.generate("lake").seed == 7


def test_a_message_that_a_server_finds_too_large_is_not_sent_for_ever(connect: Connect) -> None:
    opened = []

    def handler(socket: ServerConnection) -> None:
        opened.append(socket)
        socket.recv()
        socket.close(1009, "too much")

    with sockets(handler) as url, connect(url).realtime() as session:
        with pytest.raises(TooLarge, match="too much"):
            session.generate("lake")
    assert len(opened) == 1


@pytest.mark.parametrize("frame", ["null", b"\xc1", json.dumps({"request_id": 1})])
def test_a_socket_of_another_server_is_recognized(connect: Connect, frame: bytes | str) -> None:
    def handler(socket: ServerConnection) -> None:
        socket.recv()
        socket.send(frame)
        socket.recv()

    with sockets(handler) as url, connect(url).realtime() as session:
        with pytest.raises(LcmError, match="of an lcm-rt server"):
            session.generate("lake")


def test_a_handshake_that_is_refused(connect: Connect, double: Double) -> None:
    double.script = {"GET /fal-ai/lcm/realtime": [Said(b"bad gateway", 502), refused(403, "forbidden")]}
    with connect(double.url, key="id:secret").realtime(max_buffering=3) as session:
        with pytest.raises(Forbidden):
            session.generate("lake")
    assert [asked.path for asked in double.asked] == ["/fal-ai/lcm/realtime?max_buffering=3"] * 2
    assert double.asked[0].headers["authorization"] == "Key id:secret"


# ---- a session's memory ---------------------------------------------------------------------------------------------


def sent(line: Line[str]) -> list[int]:
    return [message.number for message in iter(line.take, None)]


def outcome(settled: Any) -> list[tuple[int, type]]:
    return [(message.number, type(answer)) for message, answer in settled]


def told(line: Line[str], number: int, **fields: Any) -> Any:
    return line.hear(msgpack.packb(answer(request_id=number, **fields)))


def test_of_what_waits_the_newest_are_kept() -> None:
    line: Line[str] = Line(2)
    assert [outcome(line.post({"prompt": "x"})) for _ in range(4)] == [[], [], [(1, Superseded)], [(2, Superseded)]]
    assert sent(line) == [3, 4]


def test_an_answer_settles_the_older_ones() -> None:
    line: Line[str] = Line(3)
    for number in range(3):
        line.post({"prompt": "x", "request_id": f"r{number}"})
    assert sent(line) == [1, 2, 3]
    heard = told(line, 2)
    assert outcome(heard.settled) == [(1, Superseded), (2, Output)]
    assert heard.settled[1][1].request_id == "r1"
    assert told(line, 2).settled == told(line, 1).settled == told(line, 99).settled == []
    error = json.dumps({"type": "x-fal-error", "error": "generation_failed", "reason": "no", "request_id": 3})
    assert outcome(line.hear(error).settled) == [(3, GenerationFailed)]
    assert line.idle


def test_a_preview_settles_nothing() -> None:
    line: Line[str] = Line()
    line.post({"prompt": "x", "request_id": "r"})
    sent(line)
    heard = told(line, 1, preview=True, step=2)
    assert heard.settled == [] and heard.preview.step == 2 and heard.preview.request_id == "r"
    assert not line.idle


def test_what_is_lost_is_said_again_unless_something_newer_waits() -> None:
    line: Line[str] = Line(2)
    for _ in range(2):
        line.post({"prompt": "x"})
    sent(line)
    assert outcome(line.lost()) == [(1, Superseded)]
    assert sent(line) == [2]
    line.post({"prompt": "x"})
    assert outcome(line.lost()) == [(2, Superseded)]
    assert sent(line) == [3]
    assert outcome(line.clear(Unavailable("x"))) == [(3, Unavailable)]
    assert line.idle and line.lost() == []


def test_control_frames() -> None:
    line: Line[str] = Line()
    for frame in ({"type": "x-fal-message", "action": "loading"}, {"type": "x-fal-error", "error": "TIMEOUT"}):
        heard = line.hear(json.dumps(frame))
        assert heard.settled == [] and heard.refusal is None
    assert isinstance(line.hear('{"status": "error", "error": "Unauthorized"}').refusal, Unauthorized)
    error = line.hear('{"type": "x-fal-error", "error": "overloaded", "reason": "full"}').refusal
    assert isinstance(error, Overloaded) and str(error) == "full"


# ---- what it needs, and what is told of it --------------------------------------------------------------------------

FORBIDDEN = "torch diffusers transformers numpy PIL starlette uvicorn sqlalchemy huggingface_hub safetensors".split()


def test_it_needs_none_of_the_server() -> None:
    code = f"""
import sys
class Forbid:
    def find_spec(self, name, path=None, target=None):
        assert name.partition(".")[0] not in {FORBIDDEN!r}, name
sys.meta_path.insert(0, Forbid())
import lcm_rt.client
print(*sorted(name for name in sys.modules if name.startswith("lcm_rt") and not name.startswith("lcm_rt.client")))
"""
    loaded = subprocess.check_output([sys.executable, "-c", code], text=True)
    assert loaded.split() == ["lcm_rt", "lcm_rt.errors", "lcm_rt.types", "lcm_rt.wire"]


def test_both_clients_have_the_same_words() -> None:
    for one, other in ((Client, AsyncClient), (Client.realtime, AsyncClient.realtime)):
        names = {name for name in vars(one) if not name.startswith("_")} if inspect.isclass(one) else set()
        assert names == (
            {name for name in vars(other) if not name.startswith("_")} if inspect.isclass(other) else set()
        )
        for name in names:
            assert parameters(getattr(one, name)) == parameters(getattr(other, name)), name


def parameters(function: Callable[..., Any]) -> list[tuple[str, Any]]:
    return [(p.name, p.default) for p in inspect.signature(function).parameters.values()]


def test_the_examples_run(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = (Path(__file__).parents[1] / "docs" / "python.md").read_text()
    examples = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    assert len(examples) > 4
    monkeypatch.setenv("LCM_RT_URL", server.http)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "sketch.png").write_bytes(picture())
    (tmp_path / "mask.png").write_bytes(picture())
    words: dict[str, Any] = {}
    for example in examples:
        exec(compile(example, "docs/python.md", "exec"), words)
    words["client"].close()
    assert (tmp_path / "lake.png").is_file()

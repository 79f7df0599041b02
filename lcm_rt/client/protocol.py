"""The conversations over HTTP, without HTTP: what to ask, and what to make of the answers.

A ``Flow`` is a generator that yields steps (a request, a pause, a piece of blocking work) and is sent what came of
each; its value is the result. A ``Feed`` reads server-sent events. ``Client`` and ``AsyncClient`` carry out both, each
in its own manner, so all that is known of the protocol is here once.

Every request of it may be repeated: none does harm when it arrives twice.
"""

from __future__ import annotations

import itertools
import mimetypes
import os
import uuid
from collections.abc import Callable, Generator, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from io import BytesIO
from pathlib import Path
from types import MappingProxyType
from typing import Any, BinaryIO, Generic, Literal, TypeVar
from urllib.parse import quote, urlencode, urljoin, urlsplit

import httpx2

import lcm_rt
from lcm_rt.client import messages
from lcm_rt.client.messages import understood
from lcm_rt.client.patience import Patience
from lcm_rt.client.values import Health, Model, Output, Preview, Status
from lcm_rt.errors import InputError, LcmError, RequestTimeout, Unavailable

DEFAULT_URL = "http://localhost:8000"
DEFAULT_APP = "fal-ai/lcm"
"""The server's default model answers, or the one that the hosted app of this name has."""

Priority = Literal["normal", "low"]

USER_AGENT = f"lcm-rt/{lcm_rt.__version__} (python)"

CONNECT_S = 10.0
LEAVE_S = 5.0
"""How long a job that nobody waits for any more is tried to be cancelled."""
SILENCE_S = 10.0
"""A stream of a job's states in which nothing comes for so long is opened anew: its peer may be gone."""

WHOLE_BYTES = 16 * 2**20
"""What is larger is uploaded in parts, so that no more than one of them is in memory."""
OUTAGE_TRIES = 60  # of a status stream, some two minutes: a server may start again
PART_BYTES = 10 * 2**20

_NONE: Mapping[str, str] = MappingProxyType({})
_JSON = {"content-type": "application/json"}
_EVENTS = {"accept": "text/event-stream"}
_NO_KEY = {"authorization": ""}  # the address of an upload is signed, and may be another server's

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Call:
    """Make this request; sent back are its response, read, or the ``httpx2.RequestError`` that came instead."""

    method: str
    url: str
    headers: dict[str, str]
    content: bytes | None
    timeout: httpx2.Timeout


@dataclass(frozen=True, slots=True)
class Sleep:
    """Wait so many seconds."""

    seconds: float


@dataclass(frozen=True, slots=True)
class Work:
    """Call this, which blocks; sent back is what it returns."""

    function: Callable[[], Any]


Flow = Generator[Call | Sleep | Work, Any, T]
Failure = httpx2.Response | httpx2.RequestError


def failure_of(failure: Failure) -> tuple[LcmError, float]:
    """What went wrong, and for how many seconds the server wants to be left alone."""
    if isinstance(failure, httpx2.RequestError):
        where = failure.request.url.copy_with(query=None)  # what is signed is no news for a log
        if isinstance(failure, httpx2.TimeoutException) and not isinstance(failure, httpx2.ConnectTimeout):
            return RequestTimeout(f"{where} gave no answer in time"), 0.0
        return Unavailable(f"{where}: {str(failure) or type(failure).__name__}"), 0.0
    try:
        data = messages.from_json(failure.content)
    except LcmError:
        data = {}
    code = data.get("error_type") if isinstance(data, dict) else None
    error = messages.error_of(data, code=code or failure.headers.get("x-fal-error-type"), status=failure.status_code)
    after = failure.headers.get("retry-after", "")
    return error, float(after) if after.isdecimal() else 0.0


class Protocol:
    """The flows and feeds of one server.

    Args:
        url: where it is, by default ``LCM_RT_URL``; a path is kept.
        key: sent to that origin only; by default ``LCM_RT_KEY``.
        tries: how often a call is tried again.

    Raises: InputError: ``url`` is no http or https URL.
    """

    def __init__(self, url: str | None, key: str | None, *, tries: int) -> None:
        self.url = (url or os.environ.get("LCM_RT_URL") or DEFAULT_URL).rstrip("/")
        self._key = os.environ.get("LCM_RT_KEY") if key is None else key
        self._tries = tries
        parts = urlsplit(self.url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise InputError("url", f"{self.url!r} is no http or https URL")
        self._origin = parts[:2]

    def headers(self, url: str) -> dict[str, str]:
        """What every request to ``url`` says; the key is for our server alone."""
        headers = {"user-agent": USER_AGENT}
        if self._key and urlsplit(url)[:2] == self._origin:
            headers["authorization"] = f"Key {self._key}"
        return headers

    def realtime_url(self, app: str, max_buffering: int | None) -> str:
        query = f"?max_buffering={max_buffering}" if max_buffering else ""
        return f"ws{self.url.removeprefix('http')}/{_path(app)}/realtime{query}"

    def request(
        self,
        method: str,
        url: str,
        *,
        timeout_s: float | None,
        content: bytes | None = None,
        headers: Mapping[str, str] = _NONE,
    ) -> Call:
        """``url`` may be relative to the server's; a header that is empty is left out."""
        url = urljoin(self.url + "/", url)
        said = {name: value for name, value in {**self.headers(url), **headers}.items() if value}
        connect = CONNECT_S if timeout_s is None else min(timeout_s, CONNECT_S)
        return Call(method, url, said, content, httpx2.Timeout(timeout_s, connect=connect))

    def _call(
        self,
        method: str,
        url: str,
        *,
        timeout_s: float | None,
        content: bytes | None = None,
        expected: tuple[int, ...] = (),
        headers: Mapping[str, str] = _NONE,
    ) -> Flow[httpx2.Response]:
        """A response that is a success or ``expected``; tried again while that may help. Raises: LcmError."""
        patience = Patience(self._tries, timeout_s)
        while True:
            reply = yield self.request(method, url, timeout_s=patience.left_s(), content=content, headers=headers)
            if isinstance(reply, httpx2.Response) and (reply.is_success or reply.status_code in expected):
                return reply
            yield Sleep(patience.pause(*failure_of(reply)))

    def _post(
        self, url: str, data: Any, *, timeout_s: float | None, headers: Mapping[str, str] = _NONE
    ) -> Flow[httpx2.Response]:
        return self._call(
            "POST", url, content=messages.to_json(data), timeout_s=timeout_s, headers={**headers, **_JSON}
        )

    def _ready(self, message: Mapping[str, Any], timeout_s: float | None) -> Flow[dict[str, Any]]:
        """``message`` with its pictures read and its LoRA where the server can have it."""
        message = dict(message)
        lora = message.get("lora")
        if lora is not None and not isinstance(lora, str):
            message["lora"] = yield from self.upload(lora, timeout_s=timeout_s, name="lora.safetensors")
        ready: dict[str, Any] = yield Work(partial(messages.prepare, message))
        return ready

    def generate(self, app: str, message: Mapping[str, Any], *, timeout_s: float | None) -> Flow[Output]:
        """One answer; unless the message says otherwise, its pictures come in it and not by address."""
        ready = yield from self._ready({"sync_mode": True, **message}, timeout_s)
        reply = yield from self._post(f"{self.url}/run/{_path(app)}", ready, timeout_s=timeout_s)
        return (yield from self.output(messages.from_json(reply.content), timeout_s=timeout_s))

    def output(self, data: Any, *, timeout_s: float | None) -> Flow[Output]:
        """An answer with its pictures, which are fetched where they are elsewhere."""
        fetched: dict[str, bytes] = {}
        with understood():
            entries = list(data["images"])
            addresses = [url for entry in entries if (url := messages.address_of(entry))]
        for url in addresses:
            fetched[url] = (yield from self._call("GET", url, timeout_s=timeout_s)).content
        return messages.output_of(data, fetched)

    def stream(self, app: str, message: Mapping[str, Any], *, timeout_s: float | None) -> Flow[EventFeed]:
        ready = yield from self._ready({"sync_mode": True, **message}, timeout_s)
        content = messages.to_json(ready)
        return EventFeed(
            self,
            f"{self.url}/run/{_path(app)}/stream",
            content,
            Patience(OUTAGE_TRIES if self._tries else 0, timeout_s),
        )

    def submit(
        self,
        app: str,
        message: Mapping[str, Any],
        *,
        webhook: str | None,
        priority: Priority,
        start_within_s: float | None,
        timeout_s: float | None,
    ) -> Flow[str]:
        """The address of a job's result. Its key makes a repeated request the same job."""
        ready = yield from self._ready(message, timeout_s)
        query = "?" + urlencode({"fal_webhook": webhook}) if webhook else ""
        reply = yield from self._post(
            f"{self.url}/queue/{_path(app)}{query}",
            ready,
            timeout_s=timeout_s,
            headers={
                "idempotency-key": uuid.uuid4().hex,
                "x-fal-queue-priority": priority,
                "x-fal-request-timeout": "" if start_within_s is None else str(start_within_s),
            },
        )
        with understood():
            return urljoin(self.url + "/", str(messages.from_json(reply.content)["response_url"]))

    def status(self, job: str, *, logs: bool, timeout_s: float | None) -> Flow[Status]:
        reply = yield from self._call("GET", f"{job}/status?logs={int(logs)}", timeout_s=timeout_s)
        return messages.status_of(messages.from_json(reply.content))

    def cancel(self, job: str, *, timeout_s: float | None) -> Flow[bool]:
        reply = yield from self._call("PUT", f"{job}/cancel", timeout_s=timeout_s, expected=(400,))
        with understood():
            if reply.is_success or messages.from_json(reply.content).get("status") == "ALREADY_COMPLETED":
                return bool(reply.is_success)
        raise failure_of(reply)[0]

    def result(self, job: str, *, timeout_s: float | None) -> Flow[Output]:
        reply = yield from self._call("GET", job, timeout_s=timeout_s)
        return (yield from self.output(messages.from_json(reply.content), timeout_s=timeout_s))

    def statuses(self, job: str, *, timeout_s: float | None) -> StatusFeed:
        return StatusFeed(self, f"{job}/status/stream?logs=1", Patience(self._tries, timeout_s))

    def upload(
        self,
        source: bytes | str | os.PathLike[str],
        *,
        timeout_s: float | None,
        content_type: str | None = None,
        name: str | None = None,
    ) -> Flow[str]:
        """The address under which the server keeps ``source``. Raises: InputError: a path that cannot be read."""
        file, size, known = yield Work(partial(_open, source))
        name = known or name or "file"
        content_type = content_type or mimetypes.guess_type(name)[0] or "application/octet-stream"
        about = {"content_type": content_type, "file_name": name}
        with file:
            if size <= WHOLE_BYTES:
                return (yield from self._upload_whole(file, about, timeout_s))
            return (yield from self._upload_in_parts(file, about, timeout_s))

    def _initiate(self, way: str, about: dict[str, str], timeout_s: float | None) -> Flow[tuple[str, str]]:
        reply = yield from self._post(f"{self.url}/rest/storage/upload/{way}", about, timeout_s=timeout_s)
        with understood():
            target = messages.from_json(reply.content)
            return target["upload_url"], target["file_url"]

    def _upload_whole(self, file: BinaryIO, about: dict[str, str], timeout_s: float | None) -> Flow[str]:
        where, address = yield from self._initiate("initiate", about, timeout_s)
        data = yield Work(file.read)
        headers = {"content-type": about["content_type"], **_NO_KEY}
        yield from self._call("PUT", where, content=data, timeout_s=timeout_s, headers=headers)
        return address

    def _upload_in_parts(self, file: BinaryIO, about: dict[str, str], timeout_s: float | None) -> Flow[str]:
        where, address = yield from self._initiate("initiate-multipart", about, timeout_s)
        base = urlsplit(where)
        parts = []
        for number in itertools.count(1):
            if not (data := (yield Work(partial(file.read, PART_BYTES)))):
                break
            url = base._replace(path=f"{base.path}/{number}").geturl()
            reply = yield from self._call("PUT", url, content=data, timeout_s=timeout_s, headers=_NO_KEY)
            with understood():
                parts.append({"partNumber": number, "etag": messages.from_json(reply.content)["etag"]})
        url = base._replace(path=f"{base.path}/complete").geturl()
        yield from self._post(url, {"parts": parts}, timeout_s=timeout_s, headers=_NO_KEY)
        return address

    def models(self, *, timeout_s: float | None) -> Flow[list[Model]]:
        reply = yield from self._call("GET", f"{self.url}/models", timeout_s=timeout_s)
        with understood():
            return [Model.of(data) for data in messages.from_json(reply.content)["models"]]

    def change_model(self, name: str, action: str, *, timeout_s: float | None) -> Flow[Model]:
        """``action`` is ``load`` or ``unload``."""
        url = f"{self.url}/models/{quote(name, safe='')}/{action}"
        reply = yield from self._call("POST", url, timeout_s=timeout_s)
        with understood():
            return Model.of(messages.from_json(reply.content))

    def health(self, *, timeout_s: float | None) -> Flow[Health]:
        reply = yield from self._call("GET", f"{self.url}/health", timeout_s=timeout_s)
        with understood():
            data = messages.from_json(reply.content)
            return Health(data["status"], data["stage"])


def _path(app: str) -> str:
    return quote(app.strip("/"))


def _open(source: bytes | str | os.PathLike[str]) -> tuple[BinaryIO, int, str | None]:
    """A file to read from, its bytes and its name."""
    if isinstance(source, bytes | bytearray | memoryview):
        return BytesIO(source), len(source), None
    path = Path(source)
    try:
        return path.open("rb"), path.stat().st_size, path.name
    except OSError as error:
        raise InputError("file", f"cannot be read: {error}") from error


class Feed(Generic[T]):
    """Server-sent events, read line by line: the comments between them are occasions to look at the clock.

    Whoever drives it requests ``call``, hands each line to ``read`` until ``done``, and when the stream ends before
    that, or fails, waits as long as ``lost`` says and begins again.
    """

    def __init__(self, protocol: Protocol, patience: Patience) -> None:
        self._protocol = protocol
        self._patience = patience
        self.done = False

    def call(self) -> Call:
        raise NotImplementedError

    def _event(self, data: Any) -> Iterator[T]:
        raise NotImplementedError

    def read(self, line: str) -> Iterator[T]:
        """What the line tells, if anything. Raises: RequestTimeout: the deadline has passed."""
        self._patience.left_s()
        if line.startswith("data:"):
            self._patience.renew()
            yield from self._event(messages.from_json(line[5:]))

    def lost(self, failure: Failure | None) -> float:
        """Seconds until the next try; ``failure`` is None when the stream just ended. Raises: LcmError."""
        if failure is None:
            return self._patience.pause(Unavailable("the server ended its events before the last one"))
        return self._patience.pause(*failure_of(failure))


class StatusFeed(Feed[Status]):
    """A job's states until it is done, through however many connections."""

    def __init__(self, protocol: Protocol, url: str, patience: Patience) -> None:
        super().__init__(protocol, patience)
        self._url = url
        self._told = 0  # log lines, in all
        self._seen = 0  # log lines, of this connection

    def call(self) -> Call:
        self._seen = 0
        left = self._patience.left_s()
        silence = SILENCE_S if left is None else min(left, SILENCE_S)
        return self._protocol.request("GET", self._url, timeout_s=silence, headers=_EVENTS)

    def _event(self, data: Any) -> Iterator[Status]:
        status = messages.status_of(data)
        repeated = max(self._told - self._seen, 0)  # each connection tells the logs from the first one on
        self._seen += len(status.logs)
        self._told = max(self._told, self._seen)
        del status.logs[:repeated]
        self.done = status.done
        yield status

    def lost(self, failure: Failure | None) -> float:
        if isinstance(failure, httpx2.ReadTimeout):
            self._patience.left_s()
            return 0.0
        return super().lost(failure)


class EventFeed(Feed[Preview | dict[str, Any]]):
    """Previews, then the map of the answer. Once something came, it is not asked for again."""

    def __init__(self, protocol: Protocol, url: str, content: bytes, patience: Patience) -> None:
        super().__init__(protocol, patience)
        self._url = url
        self._content = content
        self._begun = False

    def call(self) -> Call:
        return self._protocol.request(
            "POST",
            self._url,
            timeout_s=self._patience.left_s(),
            content=self._content,
            headers=_JSON | _EVENTS,
        )

    def _event(self, data: Any) -> Iterator[Preview | dict[str, Any]]:
        self._begun = True
        with understood():
            preview, error = data.get("preview"), data.get("error")
        self.done = not preview
        if error:
            raise messages.error_of(data, code=error)
        yield messages.preview_of(data) if preview else data

    def lost(self, failure: Failure | None) -> float:
        pause = super().lost(failure)
        if self._begun:
            raise Unavailable("the connection was lost in the middle of an answer")
        return pause

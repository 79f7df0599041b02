"""Write docs/conformance.md: what the platform's clients need of a server, and the tests that show it.

Tests name the points that they show with ``@pytest.mark.points(...)``. ``tests/test_conformance.py`` fails when one has
no test, or when the page is not what this writes:

    python docs/conformance.py
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "conformance.md"

POINTS = {
    "Realtime": {
        1: "A WebSocket opens on any path; the application is what is left without `/realtime` (or two) or `/ws`,"
        " or the first label of the host `*.gateway.alpha.fal.ai`",
        2: "The legacy, numeric and named spellings of an application mean one model; an unknown one is told in an"
        " `x-fal-error`, then close 1000",
        3: "No subprotocol, no compression needed, any `Origin`",
        4: "A missing, unknown or expired token never fails the handshake",
        5: "Refused: `Unauthorized` as text, then close 1000 at once; the next `send` comes with a fresh token",
        6: "A token past its life, but ours, still connects",
        7: "`Authorization: Key` on the upgrade does instead of a token",
        8: "`max_buffering` 1 to 60 is how many messages wait; anything else is the default, not an error",
        9: "Where one too many waits, the oldest is dropped; the newest of a burst is always answered",
        10: "A camera faster than the model: answers lag by no more than what is buffered",
        11: "Answers leave in the order of their messages",
        12: "Msgpack is answered with msgpack, JSON with JSON, frame by frame",
        13: "nil, whole numbers for floats, 64-bit numbers, NaN, bytes, timestamps and `{}` for a buffer are decoded",
        14: "Null and unknown keys are as if they were not there",
        15: "`request_id` comes back as it was sent, and not otherwise",
        16: "No answer has `status: error` or a `type` of control frames",
        17: "Bytes are msgpack bytes: a browser gets them as `Uint8Array`, to the bit",
        18: "Text answers carry pictures as `data:` URIs",
        19: "Control frames are text, on binary sockets too",
        20: "What fails in the model is an `x-fal-error` with the `request_id`; the socket goes on",
        21: "So is what is wrong with the input",
        22: "So is a frame that cannot be decoded",
        23: "Idle: `TIMEOUT` as text, then close 1000; five minutes by default",
        24: "A close is answered while a picture is made",
        25: "So is a ping",
        26: "Sockets that say nothing, or whose client is gone, are cleared away with their work",
        27: "A stop of the server closes with 1001",
        28: "Messages of 32 MiB are taken, larger ones close with 1009",
        29: "Two sockets of one page do not touch each other",
        30: "Connecting again works at once",
        31: "Seeds are whole numbers that JavaScript can hold",
        32: "The three published demo applications' messages get the answers that they show",
    },
    "Tokens and keys": {
        33: "`POST /tokens/`, with and without the slash, on both hosts, answers a bare JSON string",
        34: "`allowed_apps` and any positive `token_expiration` are taken, further keys ignored",
        35: "Keys in every spelling, or none, in open mode; in closed mode a wrong one is 401 as JSON",
        36: "`/api/fal/proxy` does what `x-fal-target-url` says, streams too; without it, or to other hosts, 400",
        37: "Elsewhere that header means nothing",
        38: "CORS: any header, GET, POST and PUT; the headers that clients read are exposed",
    },
    "HTTP": {
        39: "Run answers the model's JSON with `x-fal-request-id`",
        40: "GET has the input in its query",
        41: "Submit answers `IN_QUEUE`, the id, the position and three absolute addresses where the client is",
        42: "Host or prefix alone tells run from queue",
        43: "Status is at owner and alias, whatever path was submitted to, in namespaces, with or without a slash",
        44: "202 until done, then 200; `logs` always, `queue_position` while it waits",
        45: "Only `IN_QUEUE`, `IN_PROGRESS` and `COMPLETED`",
        46: "A failed job is completed, with `error` and `error_type`; its result has the model's status and body",
        47: "A result too early is 400, an unknown one 404; a result can be read again",
        48: "The status stream: JSON only, new log lines only, ends after `COMPLETED`; takes a token",
        49: "Cancel: 202, 400 when done, 404; what was cancelled while it waited never runs",
        50: "The client's start deadline: 504 with headers that stop its retries",
        51: "Low priority never overtakes; unknown priorities are normal; runner hints are taken",
        52: "The path decides whether a stream is answered, not `Accept`",
        53: "The last event of a stream is seen by the oldest iterator",
        54: "What is wrong before a stream begins is an ordinary 422",
        55: "422 has `detail` as a list and `message`; the clients' field errors work",
        56: "Every error is JSON with `detail` and `message`; 5xx carry the request id; overload is 429",
        57: "Submitting twice is harmless",
        58: "Webhooks: shape, four headers, signature by the published keys, 15 s, tries again, at least once",
    },
    "Storage": {
        59: "Initiate with any `storage_type`; the PUT needs no key, from other origins too",
        60: "Multipart as the JavaScript client does it; 91 MiB there and back",
        61: "Token, single and multipart uploads as the Python client does them; 101 MiB there and back",
        62: "An upload is served with its type, is an `image_url` here, and lifecycle headers are no error",
        63: "File names with spaces, other scripts and slashes are safe",
    },
    "Redirection": {
        64: "Each way to point a client here carries run, subscribe, stream, upload and realtime",
        65: "`GET /health` is 200 and JSON",
    },
}


def shown() -> dict[int, list[str]]:
    """For each point, the tests that show it."""
    found: dict[int, list[str]] = {}
    for path in sorted((ROOT / "tests").glob("test_*.py")):
        tree = ast.parse(path.read_text())
        for test in tree.body:
            if isinstance(test, ast.FunctionDef | ast.AsyncFunctionDef):
                for point in _points(test):
                    found.setdefault(point, []).append(f"{path.name}::{test.name}")
    return found


def _points(test: ast.FunctionDef | ast.AsyncFunctionDef) -> Iterator[int]:
    for mark in test.decorator_list:
        if isinstance(mark, ast.Call) and ast.unparse(mark.func) == "pytest.mark.points":
            yield from (ast.literal_eval(argument) for argument in mark.args)


def render() -> str:
    """The whole page."""
    tests = shown()
    lines = [
        "# Conformance",
        "",
        "What the hosted platform's own clients need of a server, and the tests that show it here. Written by",
        "`docs/conformance.py` from the tests' marks; `tests/test_conformance.py` fails when a point has none.",
        "",
        "Two defaults differ from the hosted service, on purpose: one message waits while another is painted (latest",
        "wins), where a client asks for no `max_buffering`; and a token that has expired connects for a day more.",
    ]
    for section, points in POINTS.items():
        lines += ["", f"## {section}", "", "| | | shown by |", "|---|---|---|"]
        for number, text in points.items():
            names = "<br>".join(f"`{name}`" for name in tests.get(number, []))
            lines.append(f"| {number} | {text} | {names} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    PAGE.write_text(render())

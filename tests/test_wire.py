"""Frames to types and back."""

from __future__ import annotations

import base64
from datetime import datetime
from typing import Any

import msgpack
import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lcm_rt import wire
from lcm_rt.errors import EngineLost, ImageError, InputError, Overloaded, from_wire, to_wire
from lcm_rt.types import GenerateOutput, GenerateResult

RESULT = GenerateResult(b"\xff\xd8jpeg", "image/jpeg", 64, 48, 7, "embedded", 4, {"total": 0.1})


@pytest.mark.parametrize("count", [99, 101, wire.MAX_ELEMENTS - 1, wire.MAX_ELEMENTS])
def test_elements_are_counted_in_large_texts_too(count: int) -> None:
    text = "A" * wire.MAX_ELEMENTS + "A," * count
    body = orjson.dumps({"prompt": text})  # whose brace is one more
    for data in (body, body.decode()):
        if count < wire.MAX_ELEMENTS:
            assert wire.decode_json(data) == {"prompt": text}
        else:
            with pytest.raises(InputError, match="more than 20000 elements"):
                wire.decode_json(data)


def test_what_javascript_sends_is_understood() -> None:
    """undefined and null as nil, integers for floats, typed arrays as bin, ArrayBuffer as an empty map, dates."""
    frame = msgpack.packb(
        {
            "prompt": "a cat",
            "image_bytes": b"\x01\x02",
            "mask_bytes": {},
            "strength": 1,
            "seed": 2**40,
            "negative_prompt": None,
            "guidance_scale": 2,
            "at": msgpack.Timestamp.from_datetime(datetime.fromisoformat("2026-01-01T00:00:00+00:00")),
            "unknown": [1, {"a": "b"}],
        }
    )
    wanted = wire.parse_input(wire.decode_frame(frame))
    assert (wanted.strength, wanted.guidance_scale, wanted.seed) == (1.0, 2.0, 2**40)
    assert wanted.image_bytes == b"\x01\x02"
    assert wanted.mask_bytes is None
    assert wanted.negative_prompt == ""


def test_captured_frame_of_the_javascript_client() -> None:
    """As @fal-ai/client 1.10.1 encodes it."""
    frame = bytes.fromhex("82a670726f6d7074a67365636f6e64a473656564 2a".replace(" ", ""))
    assert wire.decode_frame(frame) == {"prompt": "second", "seed": 42}


@pytest.mark.parametrize(
    "frame",
    [
        b"",
        b"\xc1",
        b"\x81\xa1a",
        b"\xdd\xff\xff\xff\xff",
        b"\x91" * 5000,
        msgpack.packb({"a": list(range(2000))}),
        msgpack.packb({1: 2}),
        msgpack.packb([1]),
        msgpack.packb(None),
        "",
        "{",
        "[]",
        "null",
        "[" * 5000,
        '{"a": NaN}',
    ],
)
def test_bad_frames_are_refused(frame: bytes | str) -> None:
    with pytest.raises(InputError) as refused:
        wire.decode_frame(frame)
    assert refused.value.detail()[0]["loc"] == ["body"]


def test_large_data_uris_are_whole() -> None:
    data = bytes(range(256)) * 10_000
    uri = "data:image/png;base64," + base64.b64encode(data).decode()
    assert b"".join(wire.read_data_uri("image_url", uri)) == data


@given(st.binary(max_size=200))
def test_any_bytes_are_a_map_or_an_input_error(frame: bytes) -> None:
    try:
        assert isinstance(wire.decode_frame(frame), dict)
    except InputError:
        pass


@pytest.mark.parametrize(
    "fields, named",
    [
        ({}, "prompt"),
        ({"prompt": 3}, "prompt"),
        ({"prompt": "x", "strength": 0}, "strength"),
        ({"prompt": "x", "strength": 1.01}, "strength"),
        ({"prompt": "x", "num_inference_steps": 0}, "num_inference_steps"),
        ({"prompt": "x", "num_inference_steps": 51}, "num_inference_steps"),
        ({"prompt": "x", "num_images": 9}, "num_images"),
        ({"prompt": "x", "seed": -1}, "seed"),
        ({"prompt": "x", "seed": 2**53}, "seed"),
        ({"prompt": "x", "guidance_scale": float("inf")}, "guidance_scale"),
        ({"prompt": "x", "format": "gif"}, "format"),
        ({"prompt": "x", "image_size": "huge"}, "image_size"),
        ({"prompt": "x", "image_size": {"width": 65, "height": 64}}, "image_size"),
        ({"prompt": "x", "image_size": {"width": 8192, "height": 64}}, "image_size"),
        ({"prompt": "x", "image_bytes": "not base64"}, "image_bytes"),
    ],
)
def test_invalid_fields_are_named(fields: dict[str, Any], named: str) -> None:
    with pytest.raises(InputError) as refused:
        wire.parse_input(fields)
    assert refused.value.detail()[0]["loc"][:2] == ["body", named]
    assert named in str(refused.value)


@pytest.mark.parametrize(
    "uri, data",
    [
        ("data:image/png;base64,AAEC", b"\0\1\2"),
        ("data:;base64,AAEC", b"\0\1\2"),
        ("data:image/jpeg;name=a;base64, AAEC\n", b"\0\1\2"),
        ("DATA:image/png;base64,AAEC", b"\0\1\2"),
        ("data:text/plain,a%20b", b"a b"),
    ],
)
def test_data_uris(uri: str, data: bytes) -> None:
    assert b"".join(wire.read_data_uri("image_url", uri)) == data


@pytest.mark.parametrize(
    "uri",
    [
        "data:image/png;base64",
        "data:image/png;base64,A",
        "data:;base64,é",
        "data:;base64,?",
        "data:,%41" + "x" * 70_000,
    ],
)
def test_bad_data_uris_name_the_field(uri: str) -> None:
    with pytest.raises(ImageError) as refused:
        list(wire.read_data_uri("mask_url", uri))
    assert refused.value.field == "mask_url"


def test_reasons_are_in_plain_words() -> None:
    for size, reason in (("huge", "one of square_hd"), ({"width": 65, "height": 64}, "multiple of 8")):
        with pytest.raises(InputError, match=reason) as refused:
            wire.parse_input({"prompt": "x", "image_size": size})
        assert "literal" not in str(refused.value)


def test_json_carries_files_as_base64() -> None:
    assert wire.parse_input({"prompt": "x", "image_bytes": "AAEC"}).image_bytes == b"\0\1\2"


def test_request_id_is_echoed_only_when_given() -> None:
    wanted = wire.parse_input({"prompt": "x"})
    for request_id in ("r", 7, True, 1.5, None):
        fields = msgpack.unpackb(wire.encode_output(GenerateOutput([RESULT], "x", request_id), wanted, b""))
        assert fields.get("request_id") == request_id
        assert ("request_id" in fields) == (request_id is not None)


def test_bytes_travel_as_msgpack_bin() -> None:
    frame = wire.encode_output(GenerateOutput([RESULT], "x", None), wire.parse_input({"prompt": "x"}), b"")
    assert isinstance(frame, bytes)
    assert b"\xc4\x06\xff\xd8jpeg" in frame


def test_control_frames_are_what_the_clients_filter() -> None:
    error = orjson.loads(wire.encode_error(Overloaded("full"), "r"))
    assert error == {
        "type": "x-fal-error",
        "error": "overloaded",
        "reason": "full",
        "retryable": True,
        "request_id": "r",
    }
    notice = orjson.loads(wire.encode_notice("loading", stage="weights"))
    assert notice == {"type": "x-fal-message", "action": "loading", "stage": "weights"}
    assert orjson.loads(wire.encode_idle_timeout())["error"] == "TIMEOUT"


@pytest.mark.parametrize(
    "error",
    [InputError("seed", "bad", "int_type"), ImageError("image", "broken"), EngineLost("gone"), Overloaded("full")],
)
def test_errors_cross_the_process_boundary(error: Any) -> None:
    back = from_wire(msgpack.unpackb(msgpack.packb(to_wire(error))))
    assert type(back) is type(error)
    assert str(back) == str(error)
    assert vars(back) == vars(error)

"""Realtime over a real socket, with an engine process that paints flat colours."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import io
import os
import time
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
import orjson
import pytest
from fake_engine import colour
from PIL import Image
from serving import SIDE, hear, model_folder, run, say, serving, until
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosedError, ConnectionClosedOK

from lcm_rt.auth import Auth
from lcm_rt.server import realtime
from lcm_rt.server.realtime import app_of_path, max_buffering_of
from lcm_rt.wire import MAX_MESSAGE_BYTES


def picture(width: int = SIDE, height: int = SIDE, format: str = "png") -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (width, height), (200, 100, 50)).save(file, format)
    return file.getvalue()


def pixels(file: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(file)))


class Hold:
    """A picture whose step waits, so that what happens meanwhile is certain."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "hold"
        os.mkfifo(self.path)
        self.prompt = f"hold={self.path}"

    async def entered(self) -> None:
        """Wait until the engine is in that step."""
        self.end = await asyncio.to_thread(self.path.open, "wb")  # returns once the other end is opened

    def release(self) -> None:
        """Let the step go on."""
        self.end.close()


SMALL = {"image_size": {"width": SIDE, "height": SIDE}, "format": "png", "num_inference_steps": 1}


@pytest.mark.points(14, 15, 16, 17, 31)
@run
async def test_a_msgpack_message_is_answered_with_bytes(tmp_path: Path) -> None:
    async with serving(tmp_path) as server, server.connect() as socket:
        await say(socket, prompt="lake", seed=7, request_id="r1", unknown=1, negative_prompt=None, **SMALL)
        answer = await hear(socket)
    (image,) = answer["images"]
    assert (image["width"], image["height"], image["content_type"]) == (SIDE, SIDE, "image/png")
    assert tuple(pixels(image["content"])[0, 0]) == colour("lake", 7)
    assert answer["request_id"] == "r1"
    assert answer["seed"] == 7
    assert answer["model"] == "fake"
    assert answer["num_inference_steps"] == 1
    assert answer["timings"]["total"] > 0
    assert "url" not in image
    assert "status" not in answer and "type" not in answer


@pytest.mark.points(15, 18)
@run
async def test_a_text_message_is_answered_in_text_with_a_data_uri(tmp_path: Path) -> None:
    async with serving(tmp_path) as server, server.connect() as socket:
        await socket.send(orjson.dumps({"prompt": "lake", "seed": 7, **SMALL}).decode())
        frame = await socket.recv()
    assert isinstance(frame, str)
    answer = orjson.loads(frame)
    head, _, data = answer["images"][0]["url"].partition(",")
    assert head == "data:image/png;base64"
    assert tuple(pixels(base64.b64decode(data))[0, 0]) == colour("lake", 7)
    assert "request_id" not in answer


FORMS: list[tuple[dict[str, Any], str]] = [
    ({"image_bytes": picture()}, "content"),
    ({"image": picture()}, "content"),
    ({"image_url": "data:image/png;base64," + base64.b64encode(picture()).decode()}, "url"),
    ({"sync_mode": True}, "url"),
    ({"image_bytes": {}}, "content"),  # a JavaScript ArrayBuffer
]


@pytest.mark.points(32)
@run
async def test_each_client_gets_the_form_that_it_reads(tmp_path: Path) -> None:
    async with serving(tmp_path) as server, server.connect() as socket:
        for fields, form in FORMS:
            await say(socket, prompt="lake", seed=1, num_inference_steps=1, **fields)
            answer = await hear(socket)
            assert form in answer["images"][0], fields
            assert ("image" in answer) == ("image" in fields)


@pytest.mark.points(9, 11)
@run
async def test_forty_messages_in_a_burst(tmp_path: Path) -> None:
    """Few answers, in order, the last one of message 40."""
    hold = Hold(tmp_path)
    async with serving(tmp_path) as server, server.connect() as socket:
        await say(socket, prompt=hold.prompt, request_id=1, **SMALL)
        await hold.entered()
        for number in range(2, 41):
            await say(socket, prompt=f"message {number}", request_id=number, **SMALL)
        # Message 2 is with the engine, which learns between two steps that it is not wanted any more.
        await until(lambda: server.metric("lcm_rt_superseded_total") == 37)
        hold.release()
        answered = [await hear(socket)]
        while answered[-1]["request_id"] != 40:
            answered.append(await hear(socket))
        assert [a["request_id"] for a in answered] == [1, 40]
        assert server.metric("lcm_rt_superseded_total") == 38


@pytest.mark.points(8, 9, 11)
@run
async def test_max_buffering_keeps_more(tmp_path: Path) -> None:
    hold = Hold(tmp_path)
    async with serving(tmp_path) as server, server.connect("/fal-ai/lcm/realtime?max_buffering=3") as socket:
        await say(socket, prompt=hold.prompt, request_id=1, **SMALL)
        await hold.entered()
        for number in range(2, 8):
            await say(socket, prompt="lake", request_id=number, **SMALL)
        await until(lambda: server.metric("lcm_rt_messages_total") >= 7)
        hold.release()
        answered = [(await hear(socket))["request_id"] for _ in range(4)]
    assert answered == [1, 5, 6, 7]


BAD_FRAMES = [
    (msgpack.packb({"prompt": "x", "request_id": [1, 2, 3]}), "invalid_input", "request_id"),
    (msgpack.packb({"prompt": "x", "request_id": {b"a": 1}}), "invalid_input", "request_id"),
    ("[" * 30_000, "invalid_input", "body"),
    (b"\x91\x90" * 3000, "invalid_input", "body"),
    (msgpack.packb({"prompt": "x", "strength": 7, "request_id": "r"}), "invalid_input", "strength"),
    (msgpack.packb({"request_id": "r"}), "invalid_input", "prompt"),
    (msgpack.packb({"prompt": "x", "model": "nope", "request_id": "r"}), "invalid_input", "model"),
    (msgpack.packb({"prompt": "x", "image_bytes": b"junk", "request_id": "r"}), "image_load_error", "image_bytes"),
    (msgpack.packb({"prompt": "x", "image_url": "data:,%00", "request_id": "r"}), "image_load_error", "image_url"),
    (
        msgpack.packb({"prompt": "x", "image_url": "data:;base64,?", "request_id": "r"}),
        "image_load_error",
        "image_url",
    ),
    (
        msgpack.packb({"prompt": "x", "image_url": "http://127.0.0.1/y.png", "request_id": "r"}),
        "file_download_error",
        "image_url",
    ),
    (msgpack.packb({"prompt": "x", "mask_bytes": b"junk", "request_id": "r"}), "invalid_input", "image_url"),
    (msgpack.packb({"prompt": "x", "strength": float("nan"), "request_id": "r"}), "invalid_input", "strength"),
    (msgpack.packb({"prompt": "raise", "request_id": "r", **SMALL}), "generation_failed", None),
    (msgpack.packb({"prompt": "nan", "request_id": "r", **SMALL}), "generation_failed", None),
    (b"\xc1", "invalid_input", "body"),
    ("{", "invalid_input", "body"),
    ("null", "invalid_input", "body"),
    (b"\x93\x01\x02\x03", "invalid_input", "body"),
]


@pytest.mark.points(19, 20, 21, 22)
@run
async def test_a_bad_message_gets_a_typed_error_and_the_socket_lives(tmp_path: Path) -> None:
    async with serving(tmp_path) as server, server.connect() as socket:
        for frame, code, field in BAD_FRAMES:
            await socket.send(frame)
            text = await socket.recv()
            assert isinstance(text, str), "control frames are text, whatever the codec"
            error = orjson.loads(text)
            assert (error["type"], error["error"]) == ("x-fal-error", code), frame
            if field:
                assert error["detail"][0]["loc"] == (["body"] if field == "body" else ["body", field])
                assert field in error["reason"]
            assert "secret" not in text
            named = frame[-2:] == b"\xa1r" or b"request_id\xa1r" in frame if isinstance(frame, bytes) else False
            assert error.get("request_id") == ("r" if named else None)
            await say(socket, prompt="lake", **SMALL)
            assert (await hear(socket))["images"]


@pytest.mark.points(29)
@run
async def test_two_sockets_get_their_own_pictures(tmp_path: Path) -> None:
    async with serving(tmp_path) as server, server.connect() as one, server.connect() as two:

        async def paint(socket: ClientConnection, prompt: str) -> None:
            for seed in range(20):
                await say(socket, prompt=prompt, seed=seed, **SMALL)
                answer = await hear(socket)
                assert tuple(pixels(answer["images"][0]["content"])[0, 0]) == colour(prompt, seed)

        await asyncio.gather(paint(one, "lake"), paint(two, "desert"))


@run
async def test_a_failing_picture_leaves_its_batch_mates_alone(tmp_path: Path) -> None:
    hold = Hold(tmp_path)
    async with serving(tmp_path) as server, server.connect() as one, server.connect() as two, server.connect() as three:
        # While the first is held in its step, the other two arrive; then they share a forward, which fails.
        await say(one, prompt=hold.prompt, **SMALL)
        await hold.entered()
        await say(two, prompt="raise", **SMALL)
        await say(three, prompt="lake", seed=1, **SMALL)
        await until(lambda: server.metric("lcm_rt_pending") >= 3)
        hold.release()
        assert (await hear(one))["images"]
        assert (await hear(two))["error"] == "generation_failed"
        assert (await hear(three))["images"]


@pytest.mark.points(26)
@run
async def test_a_client_that_leaves_frees_its_work(tmp_path: Path) -> None:
    hold = Hold(tmp_path)
    async with serving(tmp_path) as server, server.connect() as stays:
        async with server.connect() as leaves:
            await say(stays, prompt=hold.prompt, **SMALL)
            await hold.entered()
            await say(leaves, prompt="lake", **SMALL | {"num_inference_steps": 50})
            await until(lambda: server.metric("lcm_rt_pending") >= 2)
        await until(lambda: server.metric("lcm_rt_sessions") <= 1)
        hold.release()
        assert (await hear(stays))["images"]
        await until(lambda: not server.metric("lcm_rt_pending"))
        assert server.metric("lcm_rt_pictures_total", model="fake", priority="realtime") == 1


@pytest.mark.points(23, 26)
@run
async def test_an_idle_connection_is_closed_normally(tmp_path: Path) -> None:
    async with serving(tmp_path, idle_timeout_s=0.05) as server, server.connect() as socket:
        assert (await hear(socket))["error"] == "TIMEOUT"
        with pytest.raises(ConnectionClosedOK) as closed:
            await socket.recv()
        assert closed.value.rcvd and closed.value.rcvd.code == 1000


@run
async def test_a_client_that_waits_for_us_is_not_idle(tmp_path: Path) -> None:
    hold = Hold(tmp_path)
    async with serving(tmp_path, idle_timeout_s=0.05) as server, server.connect() as socket:
        await say(socket, prompt=hold.prompt, **SMALL)
        await hold.entered()
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.2):
                await socket.recv()
        hold.release()
        assert (await hear(socket))["images"]


@pytest.mark.points(26)
@run
async def test_a_client_that_does_not_read_is_cut_and_costs_no_work(tmp_path: Path) -> None:
    big = {"image_size": {"width": 1024, "height": 1024}, "format": "png", "num_inference_steps": 1}
    async with serving(tmp_path, send_timeout_s=0.3) as server:
        async with server.connect("/fal-ai/lcm/realtime?max_buffering=60", max_queue=1) as deaf:
            deaf.transport.pause_reading()
            for number in range(400):
                await say(deaf, prompt=f"{number}", num_images=8, **big)
                if not server.metric("lcm_rt_sessions") and number > 10:
                    break
                await asyncio.sleep(0.01)
            await until(lambda: not server.metric("lcm_rt_sessions"))
        assert server.metric("lcm_rt_pictures_total", model="fake", priority="realtime") < 8 * number / 2
        async with server.connect() as socket:
            await say(socket, prompt="lake", **SMALL)
            assert (await hear(socket))["images"]


@pytest.mark.points(2)
@run
async def test_an_unknown_app_is_told_after_the_handshake(tmp_path: Path) -> None:
    async with serving(tmp_path) as server, server.connect("/fal-ai/nope/realtime") as socket:
        assert (await hear(socket))["error"] == "not_found"
        with pytest.raises(ConnectionClosedOK):
            await socket.recv()


@run
async def test_too_many_connections_are_told_so(tmp_path: Path) -> None:
    async with serving(tmp_path, max_sessions=1) as server, server.connect() as one, server.connect() as two:
        assert (await hear(two))["error"] == "overloaded"
        await say(one, prompt="lake", **SMALL)
        assert (await hear(one))["images"]


@run
async def test_messages_wait_while_the_model_loads(tmp_path: Path) -> None:
    loading = tmp_path / "slow-load"
    os.mkfifo(loading)
    model = model_folder(tmp_path / "model", "slow-load")
    async with serving(tmp_path, ready=False, models=[model]) as server, server.connect() as socket:
        await say(socket, prompt="early", request_id=1, **SMALL)
        notice = await hear(socket)
        assert (notice["type"], notice["action"]) == ("x-fal-message", "loading")
        await say(socket, prompt="lake", request_id=2, **SMALL)
        await asyncio.to_thread(loading.write_bytes, b"go")
        assert (await hear(socket))["request_id"] == 2


@run
async def test_what_waits_for_a_model_and_is_out_of_date_is_forgotten(tmp_path: Path) -> None:
    loading = tmp_path / "slow-load"
    os.mkfifo(loading)
    model = model_folder(tmp_path / "model", "slow-load")
    async with serving(tmp_path, ready=False, models=[model]) as server, server.connect() as socket:
        before = len(asyncio.all_tasks())
        for number in range(100):
            await say(socket, prompt="lake", request_id=number, **SMALL)
        await until(lambda: server.metric("lcm_rt_messages_total") == 100)
        assert len(asyncio.all_tasks()) <= before + 5
        await asyncio.to_thread(loading.write_bytes, b"go")
        while (answer := await hear(socket)).get("type") == "x-fal-message":
            pass
        assert answer["request_id"] == 99


@run
async def test_the_engine_dies_and_the_socket_stays(tmp_path: Path) -> None:
    async with serving(tmp_path) as server, server.connect() as socket, server.connect() as other:
        workers = server.service.workers
        for _ in range(3):
            pid = workers.pid
            assert pid
            await say(socket, prompt="crash", request_id="c", **SMALL)
            # It is tried once more, then blamed.
            answer = await hear(socket)
            while answer["type"] == "x-fal-message":
                answer = await hear(socket)
            assert (answer["error"], answer["retryable"], answer["request_id"]) == ("engine_lost", True, "c")
            await say(other, prompt="lake", seed=3, **SMALL)
            answer = await hear(other)
            while answer.get("type") == "x-fal-message":
                answer = await hear(other)
            assert tuple(pixels(answer["images"][0]["content"])[0, 0]) == colour("lake", 3)
            assert workers.pid != pid


@run
async def test_the_last_message_survives_a_killed_engine(tmp_path: Path) -> None:
    hold = Hold(tmp_path)
    async with serving(tmp_path) as server, server.connect() as socket:
        await say(socket, prompt=hold.prompt, request_id=1, **SMALL)
        await hold.entered()
        pid = server.service.workers.pid
        assert pid
        os.kill(pid, 9)
        assert (await hear(socket))["action"] == "loading"
        hold.release()
        await until(lambda: server.service.workers.pid not in (pid, None))  # the old one has let go of the FIFO
        await hold.entered()  # the new process steps it again
        hold.release()
        assert (await hear(socket))["request_id"] == 1


@pytest.mark.points(27)
@run
async def test_stopping_finishes_pictures_and_says_goodbye(tmp_path: Path) -> None:
    hold = Hold(tmp_path)
    async with serving(tmp_path) as server:
        idle, busy = await server.connect(), await server.connect()
        await say(busy, prompt=hold.prompt, **SMALL)
        await hold.entered()
        server.stop()
        await idle.wait_closed()
        assert idle.close_code == 1001
        async with server.connect() as late:
            assert (await hear(late))["error"] == "overloaded"
        hold.release()
        assert (await hear(busy))["images"]
        await busy.wait_closed()
        assert busy.close_code == 1001


URLS = [
    "/fal-ai/lcm/realtime",
    "/fal-ai/lcm/realtime/realtime",
    "/fal-ai/lcm",
    "/fal-ai/lcm/ws",
    "/run/fal-ai/lcm/realtime",
    "/fal-ai/fast-lcm-diffusion/image-to-image/realtime",
    "/fal-ai/lcm/ws/custom",
    "/workflows/me/lcm/realtime",
    "/110602490/lcm-sd15-i2i/realtime",
    "/110602490-lcm-sd15-i2i",
    "/fal-ai/lcm-sd15-i2i/realtime",
    "/fake/realtime",
    "/realtime",
]


@pytest.mark.points(1, 2, 30)
@run
async def test_every_address_of_an_application(tmp_path: Path) -> None:
    async with serving(tmp_path) as server:
        port = int(server.host.rpartition(":")[2])
        hosts = ["fal.run/fal-ai/lcm/realtime", "110602490-lcm-sd15-i2i.gateway.alpha.fal.ai/ws"]
        for address in [f"{server.host}{path}" for path in URLS] + hosts:
            async with connect(f"ws://{address}", host="127.0.0.1", port=port) as socket:
                await say(socket, prompt="lake", seed=7, **SMALL)
                (image,) = (await hear(socket))["images"]
                assert tuple(pixels(image["content"])[0, 0]) == colour("lake", 7), address


@pytest.mark.points(3)
@run
async def test_what_a_handshake_offers_does_not_matter(tmp_path: Path) -> None:
    async with serving(tmp_path) as server:
        address = f"ws://{server.host}/fal-ai/lcm/realtime"
        offers: dict[str, Any] = {
            "subprotocols": ["chat"],
            "origin": "https://pictures.example",
            "compression": "deflate",
        }
        async with connect(address, **offers) as socket:
            assert socket.subprotocol is None
            assert not socket.protocol.extensions
            await say(socket, prompt="lake", **SMALL)
            assert (await hear(socket))["images"]


@pytest.mark.points(12)
@run
async def test_the_codec_is_that_of_each_frame(tmp_path: Path) -> None:
    async with serving(tmp_path) as server, server.connect() as socket:
        for number in range(6):
            fields = {"prompt": "lake", "request_id": number, **SMALL}
            frame = orjson.dumps(fields).decode() if number % 2 else msgpack.packb(fields)
            await socket.send(frame)
            answer = await socket.recv()
            assert type(answer) is type(frame)
            assert (orjson.loads(answer) if isinstance(answer, str) else msgpack.unpackb(answer))[
                "request_id"
            ] == number


@pytest.mark.points(13, 14)
@run
async def test_what_javascript_packs_is_understood(tmp_path: Path) -> None:
    """Whole numbers for floats, undefined as nil, 64-bit numbers, NaN, dates, and an ArrayBuffer as an empty map."""
    odd = {
        "guidance_scale": 1,
        "strength": 1,
        "negative_prompt": None,
        "undefined": None,
        "big": 2**63 + 5,
        "not_a_number": float("nan"),
        "date": msgpack.Timestamp(1, 2),
        "image_bytes": {},
        "mask_bytes": {},
    }
    async with serving(tmp_path) as server, server.connect() as socket:
        await say(socket, prompt="lake", seed=7, **odd, **SMALL)
        (image,) = (await hear(socket))["images"]
        assert tuple(pixels(image["content"])[0, 0]) == colour("lake", 7)


@pytest.mark.points(10)
@run
async def test_a_camera_sees_answers_that_lag_by_no_more_than_what_waits(tmp_path: Path) -> None:
    """Six messages come while one picture is made, thirty times over."""
    hold = Hold(tmp_path)
    async with serving(tmp_path) as server, server.connect() as socket:
        sent = 1
        await say(socket, prompt=hold.prompt, request_id=1, **SMALL)
        for _ in range(30):
            await hold.entered()
            for _ in range(6):
                sent += 1
                await say(socket, prompt=hold.prompt, request_id=sent, **SMALL)
            await until(lambda: server.metric("lcm_rt_messages_total") == sent)  # noqa: B023
            hold.release()
            assert (await hear(socket))["request_id"] >= sent - 2 * 6
        await hold.entered()
        hold.release()
        assert (await hear(socket))["request_id"] == sent


@pytest.mark.points(24, 25)
@run
async def test_pings_and_closes_are_answered_while_a_picture_is_made(tmp_path: Path) -> None:
    hold = Hold(tmp_path)
    async with serving(tmp_path) as server, server.connect() as socket:
        await say(socket, prompt=hold.prompt, **SMALL)
        await hold.entered()
        await (await socket.ping())
        await socket.close()
        assert socket.close_code == 1000
        hold.release()


@pytest.mark.points(28)
@run
async def test_the_largest_message(tmp_path: Path) -> None:
    async with serving(tmp_path) as server:
        frame = msgpack.packb({"prompt": "lake", **SMALL, "more": b""})
        room = MAX_MESSAGE_BYTES - len(frame) - 3  # a longer count for more bytes
        async with server.connect() as socket:
            await say(socket, prompt="lake", **SMALL, more=bytes(room))
            assert (await hear(socket))["images"]
        async with server.connect() as socket:
            with pytest.raises(ConnectionClosedError) as closed:
                await say(socket, prompt="lake", **SMALL, more=bytes(room + 1))
                await socket.recv()
            assert closed.value.rcvd and closed.value.rcvd.code == 1009


@pytest.mark.points(30)
@run
async def test_connecting_again_works_at_once(tmp_path: Path) -> None:
    async with serving(tmp_path, max_sessions=2) as server:
        for number in range(20):
            async with server.connect() as socket:
                await say(socket, prompt="lake", request_id=number, **SMALL)
                assert (await hear(socket))["request_id"] == number


@pytest.mark.points(31)
@run
async def test_seeds_that_nobody_gave_are_small(tmp_path: Path) -> None:
    async with serving(tmp_path) as server, server.connect() as socket:
        for _ in range(20):
            await say(socket, prompt="lake", **SMALL)
            assert 0 <= (await hear(socket))["seed"] < 2**53


async def refused(socket: ClientConnection) -> None:
    """It says so as text, and closes normally."""
    assert await socket.recv() == '{"status":"error","error":"Unauthorized"}'
    with pytest.raises(ConnectionClosedOK) as closed:
        await socket.recv()
    assert closed.value.rcvd and closed.value.rcvd.code == 1000


@pytest.mark.points(4, 5, 6, 7, 34)
@run
async def test_keys_and_tokens_open_a_socket(tmp_path: Path) -> None:
    async with serving(tmp_path, keys=True) as server:
        key = await server.key()
        for bad in ("", "?fal_jwt_token=", "?fal_jwt_token=nonsense", "?fal_jwt_token=" + "x" * 4000):
            async with server.connect(f"/fal-ai/lcm/realtime{bad}") as socket:
                await refused(socket)
        async with server.connect(additional_headers={"Authorization": "Key nobody:nothing"}) as socket:
            await refused(socket)
        async with server.connect(additional_headers={"Authorization": f"Key {key}"}) as socket:
            await say(socket, prompt="lake", **SMALL)
            assert (await hear(socket))["images"]
        earlier = Auth(server.app.state.store, is_open=False, clock=lambda: time.time() - 300)
        await earlier.start()
        principal = await earlier.principal_of(f"Key {key}")
        token = earlier.mint(principal, "realtime", lifetime_s=120, apps=["lcm"])  # past its life by now, but ours
        async with server.connect(f"/fal-ai/lcm/realtime?fal_jwt_token={token}") as socket:
            await say(socket, prompt="lake", **SMALL)
            assert (await hear(socket))["images"]
        async with server.connect(f"/fal-ai/fast-lcm-diffusion/realtime?fal_jwt_token={token}") as socket:
            await refused(socket)


@run
async def test_http_over_a_websocket(tmp_path: Path) -> None:
    async with serving(tmp_path) as server, server.connect("/ws/fal-ai/lcm") as socket:
        for fields, status in ((SMALL | {"prompt": "lake"}, 200), ({}, 422), (SMALL | {"prompt": "sea"}, 200)):
            await socket.send(orjson.dumps(fields).decode())
            start, body, end = [orjson.loads(await socket.recv()) for _ in range(3)]
            assert (start["type"], start["status"], end["type"]) == ("start", status, "end")
            assert start["request_id"] == end["request_id"] == start["headers"]["x-fal-request-id"]
            assert body["images"] if status == 200 else body["detail"][0]["loc"] == ["body", "prompt"]


@run
async def test_http_over_a_websocket_stops_when_its_client_leaves(tmp_path: Path) -> None:
    hold = Hold(tmp_path)
    async with serving(tmp_path) as server:
        async with server.connect("/ws/fal-ai/lcm") as socket:
            await socket.send(orjson.dumps({"prompt": hold.prompt, **SMALL}).decode())
            await hold.entered()
        await until(lambda: all(one.result.cancelled() for one in server.service.workers._pending.values()))
        hold.release()
        await until(lambda: not server.metric("lcm_rt_pending"))
        assert not server.metric("lcm_rt_pictures_total", model="fake", priority="run")


@pytest.mark.points(1)
@pytest.mark.parametrize(
    "path, app",
    [
        ("/fal-ai/lcm/realtime", "fal-ai/lcm"),
        ("/fal-ai/lcm/realtime/realtime", "fal-ai/lcm"),
        ("/110602490/lcm-sd15-i2i/ws", "110602490/lcm-sd15-i2i"),
        ("/fal-ai/fast-lcm-diffusion/image-to-image/realtime/", "fal-ai/fast-lcm-diffusion/image-to-image"),
        ("/run/fal-ai/lcm/realtime", "fal-ai/lcm"),
        ("/ws", ""),
        ("/", ""),
    ],
)
def test_the_app_in_a_path(path: str, app: str) -> None:
    assert app_of_path(path) == app


@pytest.mark.points(8)
@pytest.mark.parametrize(
    "value, size",
    [(None, 1), ("9" * 5000, 1), ("٣", 1), ("1", 1), ("60", 60), ("61", 1), ("0", 1), ("-1", 1), ("x", 1)],
)
def test_max_buffering(value: str | None, size: int) -> None:
    assert max_buffering_of(value) == size


@pytest.mark.points(5)
@run
async def test_a_key_that_is_revoked_ends_its_connections(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(realtime, "RECHECK_S", 0.0)
    async with serving(tmp_path, keys=True) as server:
        key = await server.key()
        header = {"Authorization": f"Key {key}"}
        async with server.connect(additional_headers=header) as socket:
            async with server.connect("/ws/fal-ai/lcm", additional_headers=header) as oneshot:
                await say(socket, prompt="lake", **SMALL)
                assert (await hear(socket))["images"]
                await server.app.state.auth.revoke_key(key.partition(":")[0])
                await say(socket, prompt="lake", **SMALL)
                await refused(socket)
                await oneshot.send(orjson.dumps({"prompt": "lake", **SMALL}).decode())
                assert orjson.loads(await oneshot.recv())["status"] == 401


@run
async def test_thirty_at_once_are_no_more_than_the_limit(tmp_path: Path) -> None:
    async with serving(tmp_path, keys=True, max_sessions=2) as server:
        header = {"Authorization": f"Key {await server.key()}"}
        for path in ("/fal-ai/lcm/realtime", "/ws/fal-ai/lcm"):
            sockets = await asyncio.gather(*(server.connect(path, additional_headers=header) for _ in range(12)))
            for socket in sockets:
                with contextlib.suppress(ConnectionClosedOK):
                    await socket.send(orjson.dumps({"prompt": "lake", **SMALL}).decode())
            first = [orjson.loads(await socket.recv()) for socket in sockets]
            assert sum("images" in answer or answer.get("status") == 200 for answer in first) == 2
            for socket in sockets:
                await socket.close()


@pytest.mark.points(27)
@run
async def test_stopping_ends_http_over_a_websocket_normally_too(tmp_path: Path) -> None:
    async with serving(tmp_path) as server:
        socket = await server.connect("/ws/fal-ai/lcm")
        server.stop()
        await socket.wait_closed()
        assert socket.close_code == 1001

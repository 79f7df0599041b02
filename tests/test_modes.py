"""Every way to ask for a picture, with a real engine: several at once, in masks, with LoRAs, checked, shown early."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
import orjson
import pytest
from checkpoints import write_checkpoint, write_controlnet, write_safety_checker
from loras import write_lora
from PIL import Image, ImageDraw
from serving import REAL_ENGINE, Server, hear, run, say, serving_aside, until
from test_realtime import pixels
from test_run import client
from websockets.asyncio.client import ClientConnection

from lcm_rt.catalog import CATALOG

Fields = dict[str, Any]
Pixels = np.ndarray

KINDS: dict[str, Fields] = {
    "lcm": {},
    "xl": {"family": "sdxl", "distilled": False},
    "nine": {"distilled": False, "inpainting": True},
}
CONTROLLED = {"lcm": "sd", "xl": "sdxl"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the models of ``server`` lie, by name."""
    return tmp_path_factory.mktemp("modes")


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[Server]:
    for seed, (name, kind) in enumerate(KINDS.items()):
        write_checkpoint(folder / name, seed=seed, **kind)
    for name, family in CONTROLLED.items():
        write_controlnet(folder / name / "controlnet", family=family, seed=9)
    write_checkpoint(folder / "strict", seed=4)
    write_safety_checker(folder / "strict" / "safety_checker", threshold=-2.0)
    models = [f"{name}={folder / name}" for name in (*KINDS, "strict")]
    with serving_aside(folder, command=REAL_ENGINE, models=[*models, "embedded"], threads=1) as server:
        yield server


async def answer_of(socket: ClientConnection) -> Fields:
    """The next frame that is neither a notice nor a preview."""
    while True:
        answer = await hear(socket)
        if not answer.get("preview") and answer.get("type") != "x-fal-message":
            return answer


async def paint(socket: ClientConnection, **fields: Any) -> Pixels:
    """The picture that answers ``fields``, (H, W, 3) as integers."""
    await say(socket, **{"prompt": "a red cat", "seed": 7, **fields, "format": "png"})
    answer = await answer_of(socket)
    assert "images" in answer, answer
    return pixels(answer["images"][0]["content"]).astype(int)


def distance(one: Pixels, other: Pixels) -> int:
    """The largest difference of any value, of 255."""
    assert one.shape == other.shape
    return int(np.abs(one - other).max())


def png(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "png")
    return file.getvalue()


def scene(width: int = 64, height: int = 64) -> bytes:
    """A picture to start from: noise, laid over a few large forms."""
    random = np.random.default_rng(width * height)
    coarse = Image.fromarray(random.integers(0, 256, (5, 5, 3), dtype=np.uint8)).resize((width, height))
    fine = random.integers(-20, 21, (height, width, 3))
    return png(Image.fromarray((np.asarray(coarse) + fine).clip(0, 255).astype(np.uint8)))


def hole(width: int = 64, height: int = 64) -> bytes:
    """A mask with a hole in its upper left."""
    mask = Image.new("L", (width, height))
    ImageDraw.Draw(mask).rectangle((8, 8, width // 2, height // 2), fill=255)
    return png(mask)


def data_uri(file: bytes) -> str:
    return "data:application/octet-stream;base64," + base64.b64encode(file).decode()


class Rows:
    """How many rows the forwards of some pictures had."""

    def __init__(self, server: Server) -> None:
        self._server = server
        self._begun = {most: self._count(most) for most in ("1.0", "2.0", "3.0", "+Inf")}

    def _count(self, most: str) -> float:
        return self._server.metric("lcm_rt_batch_rows_bucket", le=most)

    def over(self, most: str) -> float:
        """Pictures since then that were in a forward with more than ``most`` rows."""
        return sum(sign * (self._count(m) - self._begun[m]) for sign, m in ((1, "+Inf"), (-1, most)))


# ---- several pictures ------------------------------------------------------------------------------------------------


@run
async def test_several_pictures_are_those_of_the_seeds_that_follow(server: Server) -> None:
    """An answer says the seed of its first picture; the others have the next ones, in order."""
    fields = {"prompt": "a red cat", "format": "png", "sync_mode": True}

    def pictures(answer: Fields) -> list[Pixels]:
        files = [base64.b64decode(image["url"].partition(",")[2]) for image in answer["images"]]
        return [pixels(file).astype(int) for file in files]

    async with client(server) as http:
        together = (await http.post("/run/fal-ai/lcm", json={**fields, "seed": 41, "num_images": 4})).json()
        alone = []
        for seed in (41, 42, 43, 44):
            answer = (await http.post("/run/fal-ai/lcm", json={**fields, "seed": seed})).json()
            assert answer["seed"] == seed
            alone += pictures(answer)
        drawn = (await http.post("/run/fal-ai/lcm", json={**fields, "num_images": 2})).json()
        again = (await http.post("/run/fal-ai/lcm", json={**fields, "seed": drawn["seed"] + 1})).json()
    assert together["seed"] == 41
    assert together["nsfw_content_detected"] == [False] * 4
    for one, other in zip(pictures(together), alone, strict=True):
        assert distance(one, other) <= 1
    assert all(distance(alone[i], alone[j]) > 8 for i in range(4) for j in range(i)), "seeds differ"
    assert distance(pictures(drawn)[1], pictures(again)[0]) <= 1, "also where we chose the seed"


# ---- only the mask ---------------------------------------------------------------------------------------------------


def _corner(draw: ImageDraw.ImageDraw, width: int, height: int) -> None:
    draw.rectangle((0, 0, width // 4, height // 3), fill=255)


def _ellipse(draw: ImageDraw.ImageDraw, width: int, height: int) -> None:
    draw.ellipse((width // 3, height // 4, width - 5, height - 9), fill=255)


def _dots(draw: ImageDraw.ImageDraw, width: int, height: int) -> None:
    draw.point(((width // 2, height // 2), (width - 1, height - 1)), fill=255)


def _soft(draw: ImageDraw.ImageDraw, width: int, height: int) -> None:
    for grey in range(1, 256, 6):
        inset = grey / 14
        draw.ellipse((inset, inset, width - inset, height / 1.5 - inset), fill=grey)


@run
async def test_outside_of_the_mask_every_byte_is_the_inputs(server: Server) -> None:
    async with client(server) as http:
        for width, height in [(64, 64), (128, 72), (72, 200), (100, 91)]:
            for draw in (_corner, _ellipse, _dots, _soft):
                mask = Image.new("L", (width, height))
                draw(ImageDraw.Draw(mask), width, height)
                image = scene(width, height)
                answer = await http.post(
                    "/run/fal-ai/lcm",
                    json={
                        "prompt": "a red cat",
                        "image_bytes": base64.b64encode(image).decode(),
                        "mask_url": data_uri(png(mask)),
                        "inpaint_mask_only": True,
                        "strength": 1,
                        "format": "png",
                        "num_inference_steps": 2,
                    },
                )
                (entry,) = answer.json()["images"]
                painted = pixels((await http.get(entry["url"])).content)
                kept_width, kept_height = width // 8 * 8, height // 8 * 8
                left, top = (width - kept_width) // 2, (height - kept_height) // 2
                middle = np.s_[top : top + kept_height, left : left + kept_width]
                before, where = pixels(image)[middle], np.asarray(mask)[middle]
                assert painted.shape == before.shape
                assert np.array_equal(painted[where == 0], before[where == 0]), (width, height, draw.__name__)
                assert (painted[where > 200] != before[where > 200]).any(), "and inside something is painted"


# ---- LoRAs -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def loras(server: Server, folder: Path) -> dict[str, str]:
    """Two LoRAs for ``lcm``, the first for its UNet alone, and one for each other model, as data URIs."""
    found = {}
    for name, model in (("one", "lcm"), ("two", "lcm"), ("xl", "xl"), ("nine", "nine")):
        path = folder / f"{name}.safetensors"
        kind: Fields = {"format": "peft"} if name == "two" else {"text_encoder": name != "one"}
        write_lora(path, folder / model, scale=0.3, seed=len(found), **kind)
        found[name] = data_uri(path.read_bytes())
    return found


@run
async def test_sessions_with_different_loras_share_forwards(server: Server, loras: dict[str, str]) -> None:
    jobs: list[Fields] = [
        {"lora_url": loras["one"]},
        {"lora_url": loras["one"], "lora_scale": 0.4},
        {"lora_url": loras["two"], "lora_scale": -0.7},
        {},
    ]
    for job in jobs:
        job["num_inference_steps"] = 8
    async with server.connect() as a, server.connect() as b, server.connect() as c, server.connect() as d:
        sockets = [a, b, c, d]
        alone = [await paint(socket, **job) for socket, job in zip(sockets, jobs, strict=True)]
        for i in range(4):
            assert all(distance(alone[i], alone[j]) > 8 for j in range(i)), "each LoRA and each scale shows"
        assert distance(await paint(a, **jobs[0] | {"lora_scale": 0}), alone[3]) <= 1, "a LoRA at 0 is none"
        rows = Rows(server)
        for round in range(20):
            together = await asyncio.gather(*(paint(s, **job) for s, job in zip(sockets, jobs, strict=True)))
            assert all(distance(one, other) <= 1 for one, other in zip(alone, together, strict=True))
            if round >= 2 and rows.over("3.0") >= 4:
                break
        assert rows.over("3.0") >= 4, "they never were in one forward"
        assert distance(await paint(d, **jobs[3]), alone[3]) == 0, "what is alone again is the same to the last bit"


@run
async def test_a_bad_lora_is_named_and_nobody_else_notices(server: Server, loras: dict[str, str], folder: Path) -> None:
    good = base64.b64decode(loras["one"].partition(",")[2])
    length = int.from_bytes(good[:8], "little")
    bad = {
        "another model's": loras["xl"],
        "a pickle": data_uri(pickle.dumps({"weight": [1.0]})),
        "a truncated file": data_uri(good[: len(good) // 2]),
        "half a header": data_uri(good[: length // 2]),
        "one with a tail": data_uri(good + b"PK\x03\x04"),
        "no LoRA at all": data_uri((folder / "lcm" / "vae" / "diffusion_pytorch_model.safetensors").read_bytes()),
        "not finite": data_uri(good[: 8 + length] + b"\xff" * (len(good) - 8 - length)),
        "a picture": data_uri(scene()),
    }
    async with server.connect() as steady, server.connect() as other:
        wanted = {"lora_url": loras["one"], "num_inference_steps": 4}
        before = await paint(steady, **wanted)
        for what, url in bad.items():
            await say(other, prompt="x", lora_url=url, request_id=what)
            error, during = await asyncio.gather(answer_of(other), paint(steady, **wanted))
            assert error.get("type") == "x-fal-error", what
            assert error["detail"][0]["loc"] == ["body", "lora_url"], (what, error)
            assert error["error"] in ("invalid_input", "file_download_error") and error["request_id"] == what
            assert distance(before, during) <= 1, what
        assert distance(await paint(other, **wanted), before) <= 1, "its socket is as good as before"


# ---- all modes at once -----------------------------------------------------------------------------------------------


def modes_of(model: str, loras: dict[str, str]) -> dict[str, Fields]:
    picture, mask = {"image_bytes": scene(), "strength": 0.7}, {"mask_bytes": hole()}
    modes: dict[str, Fields] = {
        "text": {},
        "image": picture,
        "inpaint": picture | mask,
        "mask only": picture | mask | {"inpaint_mask_only": True},
        "guided": {"guidance_scale": 4.0, "negative_prompt": "red"},
        "lora": picture | {"lora_url": loras["one" if model == "lcm" else model]},
    }
    if model in CONTROLLED:
        modes["controlnet"] = picture | mask | {"controlnet_inpaint": True}
    return modes


@pytest.mark.parametrize("model", KINDS)
@run
async def test_all_modes_in_one_batch(server: Server, loras: dict[str, str], model: str) -> None:
    modes = {name: {"model": model, "num_inference_steps": 8, **mode} for name, mode in modes_of(model, loras).items()}
    sockets = {name: await server.connect() for name in modes}
    alone = {name: await paint(sockets[name], **mode) for name, mode in modes.items()}
    names = list(modes)
    for i, name in enumerate(names):
        for other in names[:i]:
            assert distance(alone[name], alone[other]) > 4, f"{name} paints what {other} does"
    rows = Rows(server)
    for _ in range(20):
        pictures = await asyncio.gather(*(paint(sockets[name], **mode) for name, mode in modes.items()))
        for name, together in zip(names, pictures, strict=True):
            assert distance(together, alone[name]) <= 1, name
        if rows.over("3.0"):
            break
    assert rows.over("3.0"), "they never were in one forward"
    for socket in sockets.values():
        await socket.close()


# ---- the safety checker ----------------------------------------------------------------------------------------------


@run
async def test_the_checker_blackens_unless_it_is_switched_off(server: Server) -> None:
    fields = {"model": "strict", "num_inference_steps": 2}
    async with server.connect() as socket:
        for switch, flagged in [
            ({}, True),
            ({"enable_safety_checks": True}, True),
            ({"enable_safety_checker": True}, True),
            ({"enable_safety_checks": False}, False),
            ({"enable_safety_checker": False}, False),
        ]:
            counted = server.metric("lcm_rt_flagged_total")
            await say(socket, prompt="x", seed=1, format="png", num_images=2, **fields, **switch)
            answer = await answer_of(socket)
            assert answer["nsfw_content_detected"] == [flagged] * 2
            for image in answer["images"]:
                assert pixels(image["content"]).any() != flagged
            assert server.metric("lcm_rt_flagged_total") - counted == 2 * flagged
        # Nothing of the client's own picture comes back beside the black, and no preview shows what the end does not.
        await say(
            socket,
            prompt="x",
            format="png",
            previews=True,
            image_bytes=scene(),
            mask_bytes=hole(),
            inpaint_mask_only=True,
            **fields | {"num_inference_steps": 6},
        )
        answer = {"preview": True}
        while answer.get("preview"):
            answer = await hear(socket)
            assert not pixels(answer["images"][0]["content"]).any()
        assert answer["nsfw_content_detected"] == [True]


# ---- previews --------------------------------------------------------------------------------------------------------


def _said_in_text(fields: Fields) -> str:
    return orjson.dumps(fields).decode()


@pytest.mark.parametrize("write", [msgpack.packb, _said_in_text], ids=["msgpack", "json"])
@run
async def test_previews_come_before_the_answer(server: Server, write: Callable[[Fields], bytes | str]) -> None:
    steps = 12
    fields = {"prompt": "x", "seed": 3, "format": "png", "num_inference_steps": steps}
    async with server.connect() as socket:
        for number in range(3):
            await socket.send(write({**fields, "previews": True, "request_id": number}))
            frames = []
            while not frames or frames[-1].get("preview"):
                sent = await socket.recv()
                assert isinstance(sent, str) == isinstance(write({}), str)
                frames.append(orjson.loads(sent) if isinstance(sent, str) else msgpack.unpackb(sent))
            *previews, answer = frames
            assert previews, "a reader that waits for them sees some"
            seen = [preview["step"] for preview in previews]
            assert seen == sorted(set(seen)) and 1 <= seen[0] and seen[-1] < steps
            for frame in frames:
                (image,) = frame["images"]
                assert (image["width"], image["height"], image["content_type"]) == (64, 64, "image/png")
                assert set(image) == {"width", "height", "content_type", "url" if write({}) == "{}" else "content"}
                assert (frame["seed"], frame["num_inference_steps"], frame["request_id"]) == (3, steps, number)
            assert "timings" in answer and "preview" not in answer
            await socket.send(write({**fields, "request_id": "plain"}))
            assert (await hear(socket)).get("timings"), "the next frame is the next answer: no preview is late"


@run
async def test_previews_change_no_picture_and_http_has_none(server: Server) -> None:
    fields = {"prompt": "a red cat", "seed": 7, "format": "png", "num_inference_steps": 5}
    async with server.connect() as socket, client(server) as http:
        plain = await paint(socket, num_inference_steps=5)
        assert distance(await paint(socket, num_inference_steps=5, previews=True), plain) == 0
        answer = await http.post("/run/fal-ai/lcm", json={**fields, "previews": True})
        (entry,) = answer.json()["images"]
        assert distance(pixels((await http.get(entry["url"])).content).astype(int), plain) == 0


# ---- models ----------------------------------------------------------------------------------------------------------


@run
async def test_a_model_is_chosen_by_name(server: Server) -> None:
    async with server.connect() as plain, server.connect("/nine/realtime") as nine, client(server) as http:
        for socket, fields, model in [
            (plain, {}, "lcm"),
            (plain, {"model": None}, "lcm"),
            (plain, {"model": "xl"}, "xl"),
            (plain, {"model_name": "nine"}, "nine"),
            (plain, {"model_name": "SimianLuo/LCM_Dreamshaper_v7"}, "lcm"),
            (plain, {"model": "sdv1-5"}, "lcm"),
            (nine, {}, "nine"),
            (nine, {"model": "strict"}, "strict"),
        ]:
            await say(socket, prompt="x", num_inference_steps=1, **fields)
            assert (await answer_of(socket))["model"] == model, fields
        said = (await http.post("/run/xl", json={"prompt": "x", "num_inference_steps": 1})).json()
        assert said["model"] == "xl"
        refused = await http.post("/run/fal-ai/lcm", json={"prompt": "x", "model": "nope"})
        assert (refused.status_code, refused.json()["detail"][0]["loc"]) == (422, ["body", "model"])
        assert "xl" in refused.json()["message"], "it says which there are"
        listed = (await http.get("/models")).json()["models"]
        assert [entry["name"] for entry in listed if entry["default"]] == ["lcm"]


def weight(model: str | Path) -> int:
    """Bytes of a model's files."""
    return sum(path.stat().st_size for path in Path(model).rglob("*.safetensors"))


@pytest.fixture(scope="module")
def crowded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server of three models of one size, with memory for two of them."""
    folder = tmp_path_factory.mktemp("crowded")
    for seed, name in enumerate("abc"):
        write_checkpoint(folder / name, seed=seed, tiny_vae=True)
    memory_mb = int(2.5 * weight(folder / "a")) // 2**20
    models = [f"{name}={folder / name}" for name in "abc"]
    with serving_aside(folder, command=REAL_ENGINE, models=models, memory_mb=memory_mb, threads=1) as server:
        yield server


def states(server: Server) -> str:
    """Those of a, b and c, each by its first letters."""
    return " ".join(model.state for model in server.service.workers.models.values())


@run
async def test_what_is_not_loaded_is_waited_for_and_makes_its_room(crowded: Server) -> None:
    async with crowded.connect() as socket:
        for name in "ab":
            await say(socket, prompt="x", model=name, num_inference_steps=1)
            assert (await answer_of(socket))["model"] == name
        assert states(crowded) == "ready ready unloaded"
        # The memory is for two: a is the one longest unused, then b.
        for name, after in (("c", "unloaded ready ready"), ("a", "ready unloaded ready")):
            await say(socket, prompt="x", seed=1, model=name, request_id=name, num_inference_steps=1)
            notice = await hear(socket)
            assert (notice["type"], notice["action"]) == ("x-fal-message", "loading")
            assert name in notice["stage"]
            answer = await answer_of(socket)
            assert (answer["model"], answer["request_id"]) == (name, name)
            assert states(crowded) == after
            two = 2 * weight(crowded.service.workers.models[name].spec.source)
            assert 0.9 * two < crowded.metric("lcm_rt_model_bytes") <= two
        await say(socket, prompt="x", model="b", num_inference_steps=1)
        assert (await answer_of(socket))["model"] == "b"
        await say(socket, prompt="x", model="a", num_inference_steps=1)
        assert (await answer_of(socket))["model"] == "a"
        assert states(crowded) == "ready ready unloaded"


@run
async def test_models_are_loaded_and_unloaded_by_hand_and_events_tell(crowded: Server) -> None:
    seen: list[str] = []

    async def watch() -> None:
        async with client(crowded) as http, http.stream("GET", "/models/events") as events:
            assert events.headers["content-type"].startswith("text/event-stream")
            async for line in events.aiter_lines():
                if line.startswith("data:"):
                    state = {model["name"]: model["state"] for model in json.loads(line[5:])}["b"]
                    if seen[-1:] != [state]:
                        seen.append(state)

    async with client(crowded) as http:

        async def order(verb: str, name: str = "b") -> tuple[int, str]:
            answer = await http.post(f"/models/{name}/{verb}")
            return answer.status_code, answer.json().get("state", answer.json().get("error_type"))

        assert await order("load") in ((200, "ready"), (202, "loading"))
        workers = crowded.service.workers
        await until(lambda: workers.models["b"].state == "ready")
        watching = asyncio.create_task(watch())
        await until(lambda: seen == ["ready"])  # the present state comes at once
        assert await order("load") == (200, "ready")
        assert await order("unload") == (202, "unloading")
        await until(lambda: seen[-1] == "unloaded")
        assert await order("unload") == (200, "unloaded")
        refused = await http.post("/run/fal-ai/lcm", json={"prompt": "x", "model": "b"})
        assert (refused.status_code, refused.json()["error_type"]) == (503, "model_loading")
        assert refused.headers["retry-after"], "it is on its way now"
        await until(lambda: seen[-1] == "ready")
        answer = await http.post("/run/fal-ai/lcm", json={"prompt": "x", "model": "b", "num_inference_steps": 1})
        assert answer.json()["model"] == "b"
        assert [state for state in seen if state != "unloading"] == ["ready", "unloaded", "loading", "ready"]
        for verb in ("load", "unload"):
            assert await order(verb, "nope") == (404, "not_found")
            assert (await http.get(f"/models/b/{verb}")).status_code in (404, 405)
        watching.cancel()
        await asyncio.wait([watching])


@run
async def test_what_is_under_way_is_finished_before_its_model_goes(crowded: Server) -> None:
    models = crowded.service.workers.models
    async with crowded.connect() as busy, crowded.connect() as other, client(crowded) as http:

        async def begin_a_long_one() -> None:
            for name in "ba":  # so that a is loaded, and neither b nor c is what was used last
                await say(busy, prompt="x", model=name, num_inference_steps=1)
                await answer_of(busy)
            await say(busy, prompt="x", model="a", previews=True, num_inference_steps=50)
            assert (await hear(busy))["preview"], "it has begun"

        async with asyncio.timeout(20):
            await begin_a_long_one()
            assert (await http.post("/models/a/unload")).status_code == 202
            assert (await answer_of(busy))["num_inference_steps"] == 50
            await until(lambda: models["a"].state == "unloaded")
            # Nor does it stop for another model that needs its room.
            await begin_a_long_one()
            assert (await http.post("/models/b/unload")).status_code in (200, 202)
            await say(other, prompt="x", model="c", num_inference_steps=1)
            assert (await answer_of(other))["model"] == "c"
            await say(other, prompt="x", model="b", num_inference_steps=1)
            assert (await answer_of(busy))["num_inference_steps"] == 50
            assert (await answer_of(other))["model"] == "b"
            assert models["a"].state == "unloaded"


# ---- the model that ships inside -------------------------------------------------------------------------------------


@run
async def test_the_embedded_model_in_every_mode(server: Server) -> None:
    side = 256
    async with server.connect() as socket:

        async def view(**fields: Any) -> Pixels:
            return await paint(socket, model="embedded", **fields)

        text = await view(prompt="a desert at day")
        assert text.shape == (side, side, 3)
        assert text.std() > 10, "it is no flat colour"
        picture = {"image_bytes": png(Image.fromarray(text.astype(np.uint8))), "seed": 8}
        near, far = await view(prompt="a desert at day", strength=0.3, **picture), await view(prompt="hills", seed=8)
        assert np.abs(near - text).mean() < np.abs(far - text).mean() / 2, "it starts from the picture"
        picture |= {"mask_bytes": hole(side, side), "strength": 1, "prompt": "a dark night sky"}
        where = pixels(hole(side, side)) > 0
        modes: list[Fields] = [{}, {"inpaint_mask_only": True}]
        if CATALOG["embedded"].controlnet:
            modes.append({"controlnet_inpaint": True})
        for mode in modes:
            change = np.abs(await view(**picture, **mode) - text)
            assert change[where].mean() > 2 * change[~where].mean(), mode
            assert change[~where].mean() < 12, "what was kept is kept, but for the autoencoder's own loss"
            assert not (mode.get("inpaint_mask_only") and change[~where].any())

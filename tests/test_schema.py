"""The whole schema, with a real engine: what is valid is painted, what is not is named, and there is nothing between.

One server with two tiny models answers all examples, each on one of three roads: HTTP, and a realtime socket that
speaks msgpack or JSON. ``mild`` has a ControlNet, and a safety checker that flags nothing. ``strict`` is an SDXL that
takes negative prompts, with a checker that flags everything.
"""

from __future__ import annotations

import base64
import io
import json
import math
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal, get_args

import httpx2 as httpx
import msgpack
import numpy as np
import pytest
from checkpoints import write_checkpoint, write_controlnet, write_safety_checker
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from loras import write_lora
from PIL import Image
from serving import REAL_ENGINE, Server, serving_aside
from websockets.sync.client import ClientConnection, connect

from lcm_rt.types import MAX_SEED, SIZES, GenerateInput

Road = Literal["http", "msgpack", "json"]
Fields = dict[str, Any]
ROADS: tuple[Road, ...] = get_args(Road)

SIDE = 64  # px; what the tiny models paint when nobody names a size
MODELS = ("mild", "strict")
STAGES = {"decode", "queue", "text", "encode", "denoise", "vae", "safety", "encode_image", "total"}
NONE_LEFT = object()  # spoils a field by leaving it out


# ---- the three roads -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Painted:
    """An answer: what it says, and the bytes of its pictures."""

    said: Fields
    files: list[bytes]


@dataclass(frozen=True)
class Refused:
    """An error that is the client's own fault; ``named`` is the field, such as ``image_size.width``."""

    code: str
    named: str
    words: str


class Client:
    """Sends one message at a time on the road that it is told, and brings answers of all roads into one form."""

    def __init__(self, http: httpx.Client, socket: ClientConnection) -> None:
        self._http = http
        self._socket = socket

    def ask(self, road: Road, fields: Fields) -> Painted | Refused:
        return self._run(fields) if road == "http" else self._say(road, fields)

    def _run(self, fields: Fields) -> Painted | Refused:
        answer = self._http.post("/run/fal-ai/lcm", content=_as_json(fields))
        said = answer.json()
        if answer.status_code == 200:
            sync_mode = GenerateInput.model_validate(fields).sync_mode
            assert all(image["url"].startswith("data:") == sync_mode for image in said["images"])
            return Painted(said, [self._fetch(image["url"]) for image in said["images"]])
        assert answer.status_code == 422, answer.text
        assert answer.headers["x-fal-error-type"] == said["error_type"]
        return _refused(said["error_type"], said["detail"], said["message"])

    def _say(self, road: Road, fields: Fields) -> Painted | Refused:
        self._socket.send(_as_json(fields) if road == "json" else _as_msgpack(fields))
        while True:
            frame = self._socket.recv(60)
            said = json.loads(frame) if isinstance(frame, str) else msgpack.unpackb(frame)
            if said.get("type") == "x-fal-error":
                assert isinstance(frame, str) and not said["retryable"], said
                return _refused(said["error"], said.get("detail"), said["reason"])
            if not said.get("preview"):
                break
            _open(*self._files(said)).verify()
        assert isinstance(frame, str) == (road == "json"), "an answer is in the codec of its question"
        wanted = GenerateInput.model_validate(fields)
        inline = road == "json" or wanted.sync_mode or wanted.image_url is not None
        assert all(set(image) >= {"url" if inline else "content"} for image in said["images"])
        files = self._files(said)
        if wanted.image is not None and not inline:
            assert said["image"] == files[0]
        return Painted(said, files)

    def _files(self, said: Fields) -> list[bytes]:
        return [image.get("content") or self._fetch(image["url"]) for image in said["images"]]

    def _fetch(self, url: str) -> bytes:
        if url.startswith("data:"):
            return base64.b64decode(url.partition(";base64,")[2], validate=True)
        return self._http.get(url).raise_for_status().content


def _as_json(fields: Fields) -> str:
    """Not orjson, which would refuse to write what it should refuse to read."""
    return json.dumps(fields, default=lambda data: base64.b64encode(data).decode())


def _as_msgpack(fields: Fields) -> bytes:
    return bytes(msgpack.packb(fields, unicode_errors="surrogatepass"))


def _refused(code: str, detail: list[Fields], words: str) -> Refused:
    assert code in ("invalid_input", "image_load_error", "file_download_error"), (code, words)
    assert all(entry["loc"][0] == "body" and entry["msg"] and entry["type"] for entry in detail)
    named = ".".join(detail[0]["loc"][1:]) or "body"
    assert named in words
    return Refused(code, named, words)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("schema")
    write_checkpoint(folder / "mild", tiny_vae=True)
    write_controlnet(folder / "mild" / "controlnet")
    write_safety_checker(folder / "mild" / "safety_checker", threshold=2.0)
    write_checkpoint(folder / "strict", tiny_vae=True, family="sdxl", distilled=False)
    write_safety_checker(folder / "strict" / "safety_checker", threshold=-2.0)
    models = [f"{name}={folder / name}" for name in MODELS]
    with serving_aside(folder, command=REAL_ENGINE, models=models, threads=1, lora_hub=False) as server:
        yield server


@pytest.fixture(scope="module")
def client(server: Server) -> Iterator[Client]:
    with ExitStack() as stack:
        http = stack.enter_context(httpx.Client(base_url=server.http, verify=False, timeout=60))
        address = f"ws://{server.host}/fal-ai/lcm/realtime"
        yield Client(http, stack.enter_context(connect(address, max_size=None, compression=None)))


@pytest.fixture(autouse=True)
def nothing_broke(server: Server, client: Client) -> Iterator[None]:
    """After whatever was said, the same engine process answers on every road, and nobody had to say "our fault"."""
    pid = server.service.workers.pid
    yield
    for road in ROADS:
        fields = {"prompt": "and now?", "request_id": road, "num_inference_steps": 1}
        check(client.ask(road, fields), fields)
    assert server.service.workers.pid == pid
    for code in ("internal_error", "generation_failed", "engine_lost", "unavailable", "out_of_memory", "overloaded"):
        assert not server.metric("lcm_rt_errors_total", code=code), code


# ---- pictures --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Picture:
    """A file, and its size once it is upright."""

    file: bytes
    size: tuple[int, int]

    @property
    def uri(self) -> str:
        return "data:image/png;base64," + base64.b64encode(self.file).decode()


KINDS = [
    *(("png", mode) for mode in ("1", "L", "LA", "P", "RGB", "RGBA", "I;16")),
    *(("jpeg", mode) for mode in ("L", "RGB", "CMYK")),
    *(("webp", mode) for mode in ("RGB", "RGBA")),
    *(("gif", mode) for mode in ("L", "P")),
]
"""(format, mode) of the picture files that clients may send."""


@cache
def picture(width: int = SIDE, height: int = SIDE, kind: tuple[str, str] = ("png", "RGB"), turned: int = 1) -> Picture:
    """Noise. ``turned`` is the EXIF orientation, which GIF has not."""
    format, mode = kind
    noise = np.random.default_rng(width * height).integers(0, 256, (height, width, 4), dtype=np.uint8)
    if mode == "I;16":
        image = Image.fromarray(noise[..., 0].astype(np.uint16) * 257)
    else:
        image = Image.fromarray(noise).convert(mode)
    exif = Image.Exif()
    exif[0x0112] = turned
    file = io.BytesIO()
    image.save(file, format, **({"exif": exif} if format != "gif" else {}))
    upright = (height, width) if turned >= 5 and format != "gif" else (width, height)
    return Picture(file.getvalue(), upright)


def _open(file: bytes) -> Image.Image:
    return Image.open(io.BytesIO(file))


PICTURES = st.builds(
    picture,
    st.integers(SIDE, SIDE + 40),
    st.integers(SIDE, SIDE + 40),
    kind=st.sampled_from(KINDS),
    turned=st.sampled_from((1, 2, 3, 6, 8)),
)
TINY_PICTURES = st.builds(picture, st.integers(1, 20), st.integers(1, 20), kind=st.sampled_from(KINDS))


# ---- fields ----------------------------------------------------------------------------------------------------------

NAN, INF = math.nan, math.inf
TEXTS = ("", "a red cat", "\0", "x" * 10_000, "é" * 10_000, "日本語 🌅", "<|endoftext|>" * 50, "%s {0} \\u0000 '\"")
NO_TEXTS = ("x" * 10_001, 5, True, ["a"], {"a": 1}, b"\xff")
SWITCHES = (True, False, None, {}, 1, 0, "true", "off")
NO_SWITCHES = (2, "maybe", "", [], [True], 0.5, NAN, {"a": 1})
NO_NUMBERS = ("x", "", [], [1], {"a": 1}, NAN, INF, -INF, b"\xff")
NO_URLS = (5, ["a"], {"a": 1}, b"\xff", "ftp://x/y.png", "file:///etc/passwd", "x", "data:", "data:;base64,?", "\0")
NO_PICTURES = (
    b"",
    b"junk",
    picture().file[:100],
    b"GIF89a",
    b"\x89PNG\r\n\x1a\n",
    picture(1, 1).file,
    picture(8, 90).file,
)

VALID: dict[str, tuple[Any, ...]] = {
    "prompt": TEXTS,
    "negative_prompt": (*TEXTS, None),
    "model": (None, {}, *MODELS, "sdv1-5", "sdxl"),  # the platform's own names mean our default
    "model_name": (None, "", "strict", "runwayml/stable-diffusion-v1-5", "x" * 200),
    "strength": (5e-324, 0.001, 0.5, 1, 1.0, "0.5", True, None),
    "seed": (0, 1, 2**32 - 1, 2**32, 2**53 - 8, "7", 7.0, True, None),
    "guidance_scale": (0, 1, 1.0001, 7.5, 20, "2", None),
    "num_inference_steps": (1, 2, 4, 50, "3", 3.0, None),
    "image_size": (
        None,
        {},
        {"width": 64, "height": 64},
        {"width": 72, "height": 128},
        {"width": "80", "height": 64.0, "depth": 1},
        {"width": 1024, "height": 64},
    ),
    "num_images": (1, 2, 8, "2", 2.0, True, None),
    "lora_url": (None, "", {}),
    "lora_scale": (-10, 0, 0.7, 10, "1", None),
    "enable_safety_checks": SWITCHES,
    "enable_safety_checker": SWITCHES,
    "sync_mode": SWITCHES,
    "previews": SWITCHES,
    "format": ("jpeg", "png", "webp", None),
    "quality": (1, 50, 100, "80", None),
    "request_id": (None, {}, "", "r", "x" * 1000, "\0", 0, -7, 2**53, 1.5, True),
}
"""Values that are taken, at the limits of each field; without pictures."""

INVALID: dict[str, tuple[Any, ...]] = {
    "prompt": (*NO_TEXTS, None, {}, NONE_LEFT),
    "negative_prompt": NO_TEXTS,
    "model": ("nope", "../mild", "mild\0", "x" * 201, 5, ["mild"], True),
    "model_name": ("x" * 201, 5, ["mild"]),
    "strength": (0, -0.1, 1.000001, 2**64 - 1, "0", *NO_NUMBERS),
    "seed": (-1, 2**53 - 7, 2**63, 2**64 - 1, 1e300, 1.5, "1.5", "-1", *NO_NUMBERS),
    "guidance_scale": (-0.001, 20.001, 1e300, *NO_NUMBERS),
    "num_inference_steps": (0, -1, 51, 2**64 - 1, 1.5, "9" * 5000, *NO_NUMBERS),
    "image_size": (
        "huge",
        "Square",
        64,
        [64, 64],
        {"width": 64},
        {"width": 64, "height": None},
        {"width": 56, "height": 64},
        {"width": 64, "height": 65},
        {"width": 1032, "height": 64},  # over this server's limit
        {"width": 64, "height": 1032},
        {"width": 4104, "height": 64},  # over any server's
        {"width": -64, "height": 64},
        {"width": 2**64 - 1, "height": 64},
        {"width": NAN, "height": 64},
        {"width": [64], "height": 64},
    ),
    "num_images": (0, 9, -1, 2**64 - 1, 1.5, *NO_NUMBERS),
    "lora_url": (
        *NO_URLS,
        "hf:owner/name/file.safetensors",  # not allowed on this server
        "hf:../../x",
        "/files/../../model/model_index.json",
        "http://127.0.0.1/x.safetensors",
        picture().uri,
        "data:,{}",
    ),
    "lora_scale": (-10.001, 10.001, *NO_NUMBERS),
    "enable_safety_checks": NO_SWITCHES,
    "enable_safety_checker": NO_SWITCHES,
    "sync_mode": NO_SWITCHES,
    "previews": NO_SWITCHES,
    "inpaint_mask_only": (*NO_SWITCHES, True),  # there is no mask
    "controlnet_inpaint": (*NO_SWITCHES, True),
    "format": ("JPEG", "gif", "", 5, [], b"png"),
    "quality": (0, 101, 1.5, *NO_NUMBERS),
    "request_id": ("x" * 1001, [1], {"a": 1}, b"r", NAN, INF),
    "image_url": (*NO_URLS, "http://127.0.0.1/x.png", "http://[", "/files/AAAAAAAAAAAAAAAAAAAAAA.png"),
    "image_bytes": (5, True, [1, 2], {"a": 1}, 1.5, *NO_PICTURES),
    "image": (5, True, [1, 2], {"a": 1}, 1.5, *NO_PICTURES),
    "mask_url": NO_URLS,
    "mask_bytes": (5, True, [1, 2], {"a": 1}, 1.5, *NO_PICTURES),
    "mask_alpha": NO_SWITCHES,
}
"""Values that are refused, each alone in an otherwise valid message."""


def carries(road: Road, field: str, value: Any) -> bool:
    """Whether the codec of ``road`` has this value: JSON has no bytes but as text, and no number without end."""
    if road == "msgpack":
        return True
    if isinstance(value, dict):
        return all(carries(road, field, each) for each in value.values())
    if isinstance(value, bytes):
        return field.startswith(("image", "mask"))
    return not (isinstance(value, float) and not math.isfinite(value))


def spoilt(fields: Fields, field: str, value: Any) -> Fields:
    """``fields`` with one that is wrong; what would be looked at before it, or in its place, goes."""
    kind = field.partition("_")[0]
    in_its_place = (
        {f"{kind}_bytes", kind, f"{kind}_url"} if kind in ("image", "mask") and field != "image_size" else set()
    )
    if field == "enable_safety_checker":
        in_its_place = {"enable_safety_checks"}
    if field.endswith("_inpaint") or field == "inpaint_mask_only":
        in_its_place = {"mask_bytes", "mask_url", "inpaint_mask_only", "controlnet_inpaint"}
    if field == "model":
        in_its_place = {"controlnet_inpaint"}
    rest = {name: kept for name, kept in fields.items() if name not in in_its_place and name != field}
    return rest if value is NONE_LEFT else rest | {field: value}


# ---- what is expected of an answer -----------------------------------------------------------------------------------


def expected_size(fields: Fields, image: Picture | None) -> tuple[int, int]:
    wanted = GenerateInput.model_validate(fields).image_size
    if wanted:
        return wanted.width, wanted.height
    if image is None:
        return SIDE, SIDE
    factor = min(1.0, 1024 / max(image.size))
    width, height = (round(side * factor) // 8 * 8 for side in image.size)
    return width, height


def check(answer: Painted | Refused, fields: Fields, image: Picture | None = None) -> None:
    """See that ``answer`` is what a valid message with ``fields`` gets."""
    assert isinstance(answer, Painted), answer
    said, wanted = answer.said, GenerateInput.model_validate(fields)
    model = wanted.model if wanted.model in MODELS else wanted.model_name if wanted.model_name in MODELS else "mild"
    flagged = model == "strict" and wanted.enable_safety_checks
    assert len(said["images"]) == len(answer.files) == wanted.num_images
    for entry, file in zip(said["images"], answer.files, strict=True):
        shown = _open(file)
        assert shown.format and shown.format.lower() == wanted.format
        assert shown.size == (entry["width"], entry["height"]) == expected_size(fields, image)
        assert entry["content_type"] == f"image/{wanted.format}"
        shown.load()
        if wanted.format == "png":
            assert (shown.getextrema() == ((0, 0),) * 3) == flagged, "a flagged picture is black, another is not"
    assert said["nsfw_content_detected"] == [flagged] * wanted.num_images
    assert said["model"] == model
    assert said["prompt"] == wanted.prompt
    assert said["seed"] == wanted.seed if wanted.seed is not None else 0 <= said["seed"] <= MAX_SEED
    assert 1 <= said["num_inference_steps"] <= wanted.num_inference_steps
    if image is None:
        assert said["num_inference_steps"] == wanted.num_inference_steps
    assert set(said["timings"]) == STAGES
    assert all(0 <= seconds <= said["timings"]["total"] for seconds in said["timings"].values())
    if wanted.request_id is None:
        assert "request_id" not in said
    else:
        assert said["request_id"] == wanted.request_id and type(said["request_id"]) is type(wanted.request_id)


# ---- one field at a time ---------------------------------------------------------------------------------------------


def test_the_tables_have_every_field() -> None:
    aliases = {"enable_safety_checker"}
    inputs = {"image_url", "image_bytes", "image", "mask_url", "mask_bytes", "inpaint_mask_only", "controlnet_inpaint"}
    inputs |= {"mask_alpha"}
    assert set(INVALID) == set(GenerateInput.model_fields) | aliases
    assert set(VALID) == set(GenerateInput.model_fields) - inputs | aliases


def test_each_field_at_its_limits_is_painted(client: Client) -> None:
    for number, (field, value) in enumerate((field, value) for field, values in VALID.items() for value in values):
        fields = {"prompt": "x", "num_inference_steps": 1, field: value}
        check(client.ask(ROADS[number % len(ROADS)], fields), fields)


@pytest.mark.parametrize("road", ROADS)
def test_each_field_beyond_its_limits_is_named(client: Client, road: Road) -> None:
    for field, values in INVALID.items():
        base = {"prompt": "x", "num_inference_steps": 1}
        if field.startswith("mask"):
            base["image_bytes"] = picture().file
        for value in values:
            if carries(road, field, value):
                answer = client.ask(road, spoilt(base, field, value))
                assert isinstance(answer, Refused), (field, str(value)[:80], answer.said)
                assert answer.named.partition(".")[0] == field, (str(value)[:80], answer)


def test_null_means_the_default_for_every_field(client: Client) -> None:
    nothing = dict.fromkeys([*GenerateInput.model_fields, "enable_safety_checker"])
    for road in ROADS:
        check(client.ask(road, nothing | {"prompt": "x"}), {"prompt": "x"})
        answer = client.ask(road, nothing)
        assert isinstance(answer, Refused) and answer.named == "prompt"


@pytest.mark.parametrize("name", SIZES)
def test_each_named_size(client: Client, name: str) -> None:
    fields = {"prompt": "x", "image_size": name, "num_inference_steps": 1, "model": "strict"}
    check(client.ask("msgpack", fields), fields)


def test_what_is_no_message_is_named_body(client: Client) -> None:
    """Half of a surrogate pair is no text, and JSON has no NaN."""
    for road, fields in [
        *((road, {"prompt": "\ud800"}) for road in ROADS),
        *((road, {"prompt": "x", "request_id": "a\udfff"}) for road in ROADS),
        ("http", {"prompt": "x", "strength": NAN}),
        ("json", {"prompt": "x", "seed": INF}),
        ("http", [{"prompt": "x"}]),
        ("json", "prompt"),
        ("msgpack", 7),
        ("msgpack", {"prompt": "x", 7: 7}),
        ("msgpack", {"prompt": "x", "deep": [[[[]]] * 100] * 100}),
        ("json", {"prompt": "x", "long": [0] * 30_000}),
    ]:
        answer = client.ask(road, fields)  # type: ignore[arg-type]
        assert isinstance(answer, Refused) and answer.named == "body", (road, fields)


def test_keys_that_nobody_knows_are_ignored(client: Client) -> None:
    unknown = {"expand_prompt": True, "": "", "_url": "", "x_url": "", "\0": 1, "loras": [{"path": "x", "scale": 1}]}
    for road in ROADS:
        check(client.ask(road, unknown | {"prompt": "x"}), {"prompt": "x"})
    check(client.ask("msgpack", unknown | {"prompt": "x", b"x_url": "", b"prompt": 5}), {"prompt": "x"})  # type: ignore[dict-item]


def test_both_names_of_the_safety_switch(client: Client) -> None:
    for fields, flagged in [
        ({}, True),
        ({"enable_safety_checks": False}, False),
        ({"enable_safety_checker": False}, False),
        ({"enable_safety_checks": None, "enable_safety_checker": False}, False),
        ({"enable_safety_checks": True, "enable_safety_checker": False}, True),
        ({"enable_safety_checks": False, "enable_safety_checker": True}, False),
    ]:
        for road in ROADS:
            answer = client.ask(road, {"prompt": "x", "model": "strict", "num_inference_steps": 1, **fields})
            assert isinstance(answer, Painted)
            assert answer.said["nsfw_content_detected"] == [flagged], fields


# ---- pictures and masks ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS, ids="-".join)
def test_each_kind_of_picture_and_mask(client: Client, kind: tuple[str, str]) -> None:
    for turned in (1, 6):
        image, mask = picture(65, 130, kind, turned), picture(65, 130, kind, turned)
        fields = {"prompt": "x", "image_bytes": image.file, "num_inference_steps": 2}
        check(client.ask("http", fields), fields, image)
        fields |= {"mask_bytes": mask.file, "inpaint_mask_only": turned == 1}
        check(client.ask("msgpack", fields), fields, image)


def test_odd_sizes(client: Client) -> None:
    for width, height in [(65, 130), (71, 64), (2000, 140), (64, 1030), (127, 129)]:
        image = picture(width, height)
        fields = {"prompt": "x", "image_url": image.uri, "num_inference_steps": 1}
        check(client.ask("json", fields), fields, image)
    for width, height in [(1, 1), (63, 64), (2000, 70), (64, 63), (1, 2000)]:
        image = picture(width, height)
        for road in ROADS:
            answer = client.ask(road, {"prompt": "x", "image_bytes": image.file})
            assert isinstance(answer, Refused) and (answer.named, answer.code) == ("image_bytes", "image_load_error")
            assert f"{width}x{height}" in answer.words
        # With a size it is scaled to it, however small or thin it is.
        fields = {"prompt": "x", "image_bytes": image.file, "image_size": {"width": 72, "height": 64}}
        check(client.ask("msgpack", fields), fields, image)


def test_a_mask_of_another_size_is_told_both(client: Client) -> None:
    mask = picture(72, 64)
    for name, data in (("mask_bytes", mask.file), ("mask_url", mask.uri)):
        for road in ROADS:
            answer = client.ask(road, {"prompt": "x", "image_bytes": picture().file, name: data})
            assert isinstance(answer, Refused) and (answer.named, answer.code) == (name, "image_load_error")
            assert "72x64" in answer.words and "64x64" in answer.words
    # Turned upright, it is of the same size.
    image, mask = picture(64, 80), picture(80, 64, turned=6)
    fields = {"prompt": "x", "image_bytes": image.file, "mask_bytes": mask.file}
    check(client.ask("msgpack", fields), fields, image)


def test_a_mask_needs_a_picture_and_the_flags_a_mask(client: Client) -> None:
    for road in ROADS:
        for mask in ({"mask_bytes": picture().file}, {"mask_url": picture().uri}):
            answer = client.ask(road, {"prompt": "x", **mask})
            assert isinstance(answer, Refused) and answer.named == "image_url"
        for flag in ("inpaint_mask_only", "controlnet_inpaint"):
            for image in ({}, {"image_bytes": picture().file}):
                answer = client.ask(road, {"prompt": "x", flag: True, **image})
                assert isinstance(answer, Refused) and answer.named == flag
        fields = {"prompt": "x", "image_bytes": picture().file, "mask_bytes": picture().file}
        answer = client.ask(road, fields | {"controlnet_inpaint": True, "model": "strict"})
        assert isinstance(answer, Refused) and answer.named == "controlnet_inpaint", "it has none"


def test_of_three_pictures_the_bytes_win(client: Client) -> None:
    small, middle, large = picture(64, 64), picture(72, 72), picture(80, 80)
    given = {"image_bytes": small.file, "image": middle.file, "image_url": large.uri}
    for road in ROADS:
        for names, winner in (
            (("image_bytes", "image", "image_url"), small),
            (("image", "image_url"), middle),
            (("image_url",), large),
        ):
            fields = {"prompt": "x", "num_inference_steps": 1, **{name: given[name] for name in names}}
            check(client.ask(road, fields), fields, winner)
        answer = client.ask(road, {"prompt": "x", **given, "image_bytes": b"junk"})
        assert isinstance(answer, Refused) and answer.named == "image_bytes", "the others are not fallen back to"
    # The mask has two names, with the same rule.
    fields = {"prompt": "x", "image_bytes": small.file, "mask_bytes": small.file, "mask_url": "data:,junk"}
    check(client.ask("msgpack", fields), fields, small)


# ---- all fields together ---------------------------------------------------------------------------------------------

bounded = settings(
    derandomize=True,
    deadline=None,
    database=None,
    max_examples=30,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)

SMALL: dict[str, st.SearchStrategy[Any]] = {
    # Of each field what does not cost seconds, and numbers from between the limits.
    field: st.sampled_from(values)
    for field, values in VALID.items()
    if field not in ("lora_url", "request_id")
} | {
    "prompt": st.sampled_from(TEXTS) | st.text(st.characters(exclude_categories=["Cs"]), max_size=40),
    "strength": st.floats(0, 1, exclude_min=True),
    "seed": st.integers(0, 2**53 - 8),
    "guidance_scale": st.floats(0, 20),
    "num_inference_steps": st.integers(1, 6),
    "num_images": st.integers(1, 3),
    "image_size": st.fixed_dictionaries(
        {side: st.integers(8, 14).map(lambda n: 8 * n) for side in ("width", "height")}
    ),
    "lora_scale": st.floats(-10, 10),
    "quality": st.integers(1, 100),
    "request_id": st.text(st.characters(exclude_categories=["Cs"]), max_size=1000)
    | st.integers(-(2**53), 2**53)
    | st.floats(allow_nan=False, allow_infinity=False),
}


@st.composite
def valid(draw: st.DrawFn) -> tuple[Fields, Picture | None]:
    """Any valid message, and the picture that it starts from."""
    fields: Fields = draw(
        st.fixed_dictionaries(
            {"prompt": SMALL["prompt"], "num_inference_steps": SMALL["num_inference_steps"]},
            optional={name: values for name, values in SMALL.items() if name not in ("prompt", "num_inference_steps")},
        )
    )
    fields |= draw(
        st.dictionaries(st.text("abc_", max_size=3).map("x-".__add__), st.none() | st.text("ab"), max_size=2)
    )
    sized = GenerateInput.model_validate(fields).image_size is not None
    image = draw(st.none() | (PICTURES | TINY_PICTURES if sized else PICTURES))
    if image:
        names = draw(st.sampled_from((("image_bytes",), ("image",), ("image_url",), ("image_bytes", "image_url"))))
        fields |= {name: image.uri if name.endswith("_url") else image.file for name in names}
    if image and draw(st.booleans()):
        mask = picture(*image.size, draw(st.sampled_from(KINDS)))
        fields |= draw(st.sampled_from(({"mask_bytes": mask.file}, {"mask_url": mask.uri})))
        fields["inpaint_mask_only"] = draw(st.booleans())
        fields["controlnet_inpaint"] = draw(st.booleans()) and "strict" not in fields.values()
    return fields, image


@pytest.fixture(scope="module")
def lora(server: Server, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A LoRA for ``mild``, as a data URI."""
    folder = tmp_path_factory.mktemp("lora")
    source = server.service.workers.models["mild"].spec.source
    write_lora(folder / "lora", folder.joinpath(source), rank=1, text_encoder=False)
    return "data:;base64," + base64.b64encode((folder / "lora").read_bytes()).decode()


@bounded
@given(valid(), st.sampled_from(ROADS), st.booleans())
def test_any_valid_message_is_painted(
    client: Client, lora: str, given: tuple[Fields, Picture | None], road: Road, with_lora: bool
) -> None:
    fields, image = given
    if with_lora and "strict" not in fields.values():
        fields = fields | {"lora_url": lora}
    check(client.ask(road, fields), fields, image)


@settings(bounded, max_examples=100)
@given(valid(), st.sampled_from([(f, v) for f, values in INVALID.items() for v in values]), st.sampled_from(ROADS))
def test_one_wrong_field_among_valid_ones_is_named(
    client: Client, given: tuple[Fields, Picture | None], wrong: tuple[str, Any], road: Road
) -> None:
    (fields, _), (field, value) = given, wrong
    if field.startswith("mask"):
        fields = {name: v for name, v in fields.items() if name not in ("image", "image_size")}
        fields |= {"image_bytes": picture().file}
    if field in ("image_bytes", "image"):
        fields = {name: v for name, v in fields.items() if name != "image_size"}  # it would make a tiny picture large
    road = road if carries(road, field, value) else "msgpack"
    answer = client.ask(road, spoilt(fields, field, value))
    assert isinstance(answer, Refused), (field, value)
    assert answer.named.partition(".")[0] == field, answer


JUNK = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats() | st.text(max_size=20) | st.binary(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=4,
)


@st.composite
def anything(draw: st.DrawFn) -> Fields:
    """A few fields, each of them valid, nearly valid or of any type."""
    fields: Fields = {"prompt": draw(SMALL["prompt"] | JUNK), "num_inference_steps": 1}
    for name in draw(st.lists(st.sampled_from(sorted(INVALID)), max_size=4)):
        fields[name] = draw(SMALL.get(name, st.sampled_from(NO_PICTURES)) | JUNK)
    return fields


@settings(bounded, max_examples=150)
@given(anything())
def test_anything_is_painted_or_names_what_was_said(client: Client, fields: Fields) -> None:
    answer = client.ask("msgpack", fields)
    if isinstance(answer, Refused):
        assert answer.named.partition(".")[0] in {*fields, "body", "image_url"}
    else:
        check(answer, fields)

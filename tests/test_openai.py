"""The images API of OpenAI, with OpenAI's own client, sync and async."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2 as httpx
import numpy as np
import openai
import pytest
from fake_engine import colour
from openai import AsyncOpenAI, OpenAI
from PIL import Image
from serving import SIDE, Server, model_folder, run, serving, serving_aside, until
from test_realtime import Hold

SMALL = f"{SIDE}x{SIDE}"
ONE_STEP = {"num_inference_steps": 1}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("openai")
    models = [model_folder(folder / name, name) for name in ("first", "second")]
    with serving_aside(folder, models=models, max_side=256) as server:
        yield server


@pytest.fixture(scope="module")
def client(server: Server) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{server.http}/v1", api_key="any", max_retries=0) as client:
        yield client


@pytest.fixture(scope="module")
def http(server: Server) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.http, verify=False, timeout=30) as http:
        yield http


def pixels(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


def png(picture: Image.Image) -> bytes:
    file = io.BytesIO()
    picture.save(file, "PNG")
    return file.getvalue()


def photo(width: int = SIDE, height: int = SIDE) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


def hole(width: int = SIDE, height: int = SIDE) -> Image.Image:
    """Opaque white, but for a transparent square in the middle."""
    mask = Image.new("RGBA", (width, height), (255, 255, 255, 255))
    mask.paste((0, 0, 0, 0), (24, 24, 40, 40))
    return mask


# ---- generations -----------------------------------------------------------------------------------------------------


def test_a_picture_by_url(client: OpenAI, http: httpx.Client) -> None:
    answer = client.images.generate(prompt="lake", size=SMALL, extra_body={"seed": 5, **ONE_STEP})
    assert answer.data and len(answer.data) == 1
    url = answer.data[0].url
    assert url and answer.data[0].b64_json is None
    file = http.get(url)
    assert file.headers["content-type"] == "image/png"
    assert tuple(pixels(file.content)[0, 0]) == colour("lake", 5)
    assert answer.created > 1.7e9
    assert (answer.size, answer.output_format, answer.background) == (SMALL, "png", "opaque")
    assert answer.usage and answer.usage.total_tokens == 0
    assert answer._request_id


def test_pictures_inline_with_the_seeds_that_follow(client: OpenAI) -> None:
    answer = client.images.generate(
        prompt="lake", n=3, size=SMALL, response_format="b64_json", extra_body={"seed": 5, **ONE_STEP}
    )
    assert answer.data
    for number, image in enumerate(answer.data):
        assert image.b64_json and image.url is None
        assert tuple(pixels(base64.b64decode(image.b64_json))[0, 0]) == colour("lake", 5 + number)
        assert image.model_extra == {"seed": 5 + number, "nsfw_content_detected": False}


@pytest.mark.parametrize("name", ["gpt-image-1", "gpt-image-2.5-flare", "chatgpt-image-latest"])
def test_the_names_of_gpt_models_mean_the_default_inline(client: OpenAI, name: str) -> None:
    answer = client.images.generate(prompt="x", model=name, size=SMALL, extra_body=ONE_STEP)
    assert answer.data and answer.data[0].b64_json
    assert answer.model_extra and answer.model_extra["model"] == "first"


@pytest.mark.parametrize("name", ["dall-e-2", "dall-e-3", None, "first"])
def test_other_names_mean_urls(client: OpenAI, name: str | None) -> None:
    answer = client.images.generate(prompt="x", model=name, size=SMALL, extra_body=ONE_STEP)
    assert answer.data and answer.data[0].url
    assert answer.model_extra and answer.model_extra["model"] == "first"


def test_a_served_model_is_used(client: OpenAI) -> None:
    answer = client.images.generate(prompt="x", model="second", size=SMALL, extra_body=ONE_STEP)
    assert answer.model_extra and answer.model_extra["model"] == "second"


def test_formats_and_compression(client: OpenAI) -> None:
    def made(**options: Any) -> bytes:
        answer = client.images.generate(
            prompt="x", size=SMALL, response_format="b64_json", extra_body={"seed": 1, **ONE_STEP}, **options
        )
        assert answer.data and answer.data[0].b64_json
        return base64.b64decode(answer.data[0].b64_json)

    assert Image.open(io.BytesIO(made(output_format="webp"))).format == "WEBP"
    for compression in (0, 100):
        file = made(output_format="jpeg", output_compression=compression)
        assert Image.open(io.BytesIO(file)).format == "JPEG"
    assert len(made(output_format="jpeg")) == len(file), "by default the finest"


def test_the_size_is_the_models_unless_given(client: OpenAI) -> None:
    for size in ("auto", None):
        answer = client.images.generate(prompt="x", size=size, extra_body=ONE_STEP)
        assert answer.size == "256x256"  # 512, but this server paints nothing larger
    assert client.images.generate(prompt="x", size="64x128", extra_body=ONE_STEP).size == "64x128"


def test_what_changes_nothing_is_taken(client: OpenAI) -> None:
    answer = client.images.generate(
        prompt="x",
        size=SMALL,
        quality="hd",
        background="opaque",
        moderation="low",
        style="natural",
        user="me",
        extra_body={**ONE_STEP, "a_field_of_tomorrow": 1, "seed": None},
    )
    assert answer.data


def test_moderation_does_not_switch_off_the_safety_checks_but_our_own_field_does(client: OpenAI) -> None:
    for options, flagged in (
        ({}, True),
        ({"moderation": "low"}, True),
        ({"enable_safety_checks": False}, False),
        ({"enable_safety_checker": False}, False),
    ):
        answer = client.images.generate(prompt="nsfw", size=SMALL, extra_body={**ONE_STEP, **options})
        assert answer.data and answer.data[0].model_extra
        assert answer.data[0].model_extra["nsfw_content_detected"] is flagged


def test_our_own_fields_beside_theirs(client: OpenAI) -> None:
    uri = "data:image/png;base64," + base64.b64encode(png(photo(72, 80))).decode()
    answer = client.images.generate(prompt="x", extra_body={"image_url": uri, "strength": 0.5, **ONE_STEP})
    assert answer.size == "72x80"


@run
async def test_the_async_client(tmp_path: Path) -> None:
    async with serving(tmp_path) as server:
        client = await _async_client(server)
        async with client:
            answer = await client.images.generate(prompt="lake", size=SMALL, extra_body={"seed": 5, **ONE_STEP})
            assert answer.data and answer.data[0].url
            edited = await client.images.edit(
                image=("photo.png", png(photo())), mask=png(hole()), prompt="sea", response_format="b64_json"
            )
            assert edited.data and edited.data[0].b64_json
            assert [model.id async for model in client.models.list()] == ["fake"]
            stream = await client.images.generate(prompt="x", size=SMALL, stream=True, partial_images=1)
            assert [event.type async for event in stream][-1] == "image_generation.completed"
            with pytest.raises(openai.BadRequestError):
                await client.images.generate(prompt="x", size="63x63")


async def _async_client(server: Server) -> AsyncOpenAI:
    # In a thread, because loading certificates blocks: but this is plain HTTP to ourselves.
    return await asyncio.to_thread(
        lambda: AsyncOpenAI(base_url=f"{server.http}/v1", api_key="any", max_retries=0, timeout=30)
    )


# ---- edits -----------------------------------------------------------------------------------------------------------


def test_a_picture_is_painted_over(client: OpenAI) -> None:
    answer = client.images.edit(
        image=("photo.png", png(photo(72, 80))), prompt="lake", response_format="b64_json", extra_body={"seed": "5"}
    )
    assert answer.size == "72x80"
    assert answer.data and answer.data[0].b64_json
    assert tuple(pixels(base64.b64decode(answer.data[0].b64_json))[0, 0]) == colour("lake", 5)


def test_what_is_transparent_in_the_mask_is_painted(client: OpenAI) -> None:
    source = photo()
    answer = client.images.edit(
        image=io.BytesIO(png(source)),
        mask=png(hole()),
        prompt="lake",
        n=2,
        size=SMALL,
        model="gpt-image-1",
        extra_body={"seed": 5, "inpaint_mask_only": True},
    )
    assert answer.data and len(answer.data) == 2
    for number, image in enumerate(answer.data):
        assert image.b64_json
        painted = pixels(base64.b64decode(image.b64_json))
        assert (painted[26:38, 26:38] == colour("lake", 5 + number)).all()
        outside = np.asarray(hole())[..., 3] == 255
        np.testing.assert_array_equal(painted[outside], np.asarray(source)[outside])


def test_with_a_mask_nothing_shines_through_unless_it_should(server: Server, client: OpenAI) -> None:
    strengths = []
    submit = server.service.workers.submit

    def watching(request: Any, *args: Any, **options: Any) -> Any:
        strengths.append((request.strength, request.mask_alpha, request.mask is not None))
        return submit(request, *args, **options)

    server.service.workers.submit = watching  # type: ignore[method-assign]
    try:
        for mask, options in (({}, {}), ({"mask": png(hole())}, {}), ({"mask": png(hole())}, {"strength": 0.3})):
            client.images.edit(image=png(photo()), prompt="x", extra_body=options, **mask)
    finally:
        server.service.workers.submit = submit  # type: ignore[method-assign]
    assert strengths == [(0.8, True, False), (1.0, True, True), (0.3, True, True)]


def test_a_black_and_white_mask_is_one_if_it_says_so(client: OpenAI) -> None:
    mask = Image.new("L", (SIDE, SIDE))
    mask.paste(255, (24, 24, 40, 40))
    options = {"seed": 5, "mask_alpha": False, "inpaint_mask_only": True}
    answer = client.images.edit(
        image=png(photo()), mask=png(mask), prompt="lake", response_format="b64_json", extra_body=options
    )
    assert answer.data and answer.data[0].b64_json
    painted = pixels(base64.b64decode(answer.data[0].b64_json))
    assert (painted[26:38, 26:38] == colour("lake", 5)).all()
    np.testing.assert_array_equal(painted[:24], np.asarray(photo())[:24])


def test_one_picture_in_a_list_is_one_picture(client: OpenAI) -> None:
    assert client.images.edit(image=[png(photo())], prompt="x").size == SMALL


def test_an_empty_prompt_is_a_prompt(client: OpenAI) -> None:
    assert client.images.edit(image=png(photo()), prompt="").data


def test_an_edit_as_a_stream(client: OpenAI) -> None:
    stream = client.images.edit(image=png(photo()), mask=png(hole()), prompt="x", stream=True, partial_images=2)
    kinds = [event.type for event in stream]
    assert kinds[-1] == "image_edit.completed"
    assert set(kinds[:-1]) <= {"image_edit.partial_image"} and len(kinds) <= 3


@pytest.mark.parametrize(
    ("field", "options"),
    [
        ("image", {"image": b"junk"}),
        ("image", {"image": b""}),
        ("image", {"image": [png(photo()), png(photo())]}),
        ("mask", {"mask": b"junk"}),
        ("mask", {"mask": png(photo())}),  # there is nothing transparent in it
        ("mask", {"mask": png(hole(72, 64))}),
        ("n", {"n": 9}),
        ("n", {"n": "many"}),
        ("size", {"size": "63x64"}),
        ("strength", {"extra_body": {"strength": "2"}}),
        ("background", {"background": "transparent"}),
        ("stream", {"extra_body": {"stream": "perhaps"}}),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(value),
)
def test_edits_name_what_is_wrong(client: OpenAI, field: str, options: dict[str, Any]) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.images.edit(**{"image": png(photo()), "prompt": "x", **options})
    assert (caught.value.param, caught.value.type) == (field, "invalid_request_error")
    assert field in caught.value.message


def test_forms_that_no_client_sends(http: httpx.Client) -> None:
    image = {"image": ("x.png", png(photo()))}
    many = [("image[]", ("x.png", b"x"))] * 65
    boundary = {"content-type": "multipart/form-data; boundary=b"}
    part = b'--b\r\ncontent-disposition: form-data; name="image"; filename="x"\r\n\r\n'
    for options, param in (
        ({"json": {"prompt": "x"}}, None),
        ({"data": {"prompt": "x"}}, None),  # urlencoded
        ({"data": {"prompt": "x", "image": "text"}, "files": {"mask": b"x"}}, "image"),
        ({"data": {"prompt": "x", "mask": "text"}, "files": image}, "mask"),
        ({"data": {"n": "1"}, "files": image}, "prompt"),
        ({"data": {"prompt": "x"}, "files": {"mask": b"x"}}, "image"),
        ({"data": {"prompt": "x"}, "files": many[:20]}, "image"),
        ({"data": {"prompt": "x"}, "files": many}, None),
        ({"data": {f"f{n}": "x" for n in range(65)}, "files": image}, None),
        ({"data": {"prompt": "x" * 70_000}, "files": image}, "prompt"),
        ({"data": {"prompt": "x" * 20_000}, "files": image}, "prompt"),
        ({"content": b"", "headers": boundary}, None),
        ({"content": b"junk", "headers": boundary}, None),
        ({"content": part + b"GIF89a", "headers": boundary}, None),
        ({"content": part[:-2] + b"x: " + b"y" * 9000, "headers": boundary}, None),
        ({"content": part, "headers": {"content-type": "multipart/form-data"}}, None),
        ({"content": part, "headers": {"content-type": "multipart/form-data; boundary=\xff".encode("latin-1")}}, None),
        ({"content": bytes(33 * 2**20), "headers": boundary}, None),
    ):
        answer = http.post("/v1/images/edits", **options)
        assert answer.status_code == 400, (param, answer.text)
        error = answer.json()["error"]
        assert error["param"] == param, error
        assert error["type"] == "invalid_request_error" and error["message"]
        assert answer.headers["x-request-id"]


# ---- streams ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("partial_images", [0, 1, 3])
def test_pictures_on_the_way_then_the_picture(client: OpenAI, partial_images: int) -> None:
    with client.images.generate(
        prompt="lake",
        size=SMALL,
        stream=True,
        partial_images=partial_images,
        output_format="png",
        extra_body={"seed": 5, "num_inference_steps": 6},
    ) as stream:
        *partial, last = stream
    assert len(partial) <= partial_images  # one that the last one would have to wait for is left out
    for index, event in enumerate(partial):
        assert event.type == "image_generation.partial_image"
        assert event.partial_image_index == index
    for event in (*partial, last):
        assert tuple(pixels(base64.b64decode(event.b64_json))[0, 0]) == colour("lake", 5)
        assert (event.size, event.output_format, event.quality) == (SMALL, "png", "auto")
        assert event.created_at > 1.7e9
    assert last.type == "image_generation.completed"
    assert last.usage.total_tokens == 0


def test_pictures_on_the_way_lie_evenly() -> None:
    from lcm_rt.server.openai import ImagesInput
    from lcm_rt.types import Preview

    for steps, partial_images, expected in ((4, 3, [1, 2, 3]), (4, 1, [2]), (8, 2, [3, 6]), (2, 3, [1]), (50, 1, [25])):
        said, sent = ImagesInput(prompt="x", partial_images=partial_images), []
        for step in range(1, steps):
            if said.sends(Preview(b"", "", 0, 0, 0, step, steps), len(sent)):
                sent.append(step)
        assert sent == expected, (steps, partial_images)


def test_what_is_wrong_beforehand_is_an_ordinary_error(client: OpenAI) -> None:
    for param, options in (("n", {"n": 2}), ("size", {"size": "999x999"}), ("partial_images", {"partial_images": 4})):
        with pytest.raises(openai.BadRequestError) as caught:
            client.images.generate(**{"prompt": "x", "stream": True, **options})
        assert caught.value.param == param
    with pytest.raises(openai.BadRequestError) as caught:
        client.images.generate(prompt="x", partial_images=1)
    assert caught.value.param == "partial_images"


def test_what_goes_wrong_later_is_an_event(client: OpenAI) -> None:
    with pytest.raises(openai.APIError, match="the engine could not make this picture") as caught:
        list(client.images.generate(prompt="raise", size=SMALL, stream=True))
    assert (caught.value.code, caught.value.type) == ("generation_failed", "server_error")


@run
async def test_the_work_ends_when_the_client_leaves(tmp_path: Path) -> None:
    hold = Hold(tmp_path)
    async with serving(tmp_path) as server:
        for options in ({}, {"stream": True}):
            async with httpx.AsyncClient(base_url=server.http, verify=False, timeout=30) as http:
                body = {"prompt": hold.prompt, "size": SMALL, **ONE_STEP, **options}
                asking = asyncio.create_task(http.post("/v1/images/generations", json=body))
                await hold.entered()
                asking.cancel()
                await asyncio.wait([asking])
            await until(lambda: all(g.result.cancelled() for g in server.service.workers._pending.values()))
            hold.release()
            await until(lambda: not server.metric("lcm_rt_pending"))
        assert not server.metric("lcm_rt_pictures_total", model="fake", priority="run")


# ---- errors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("field", "options"),
    [
        ("n", {"n": 0}),
        ("n", {"n": 9}),
        ("size", {"size": "huge"}),
        ("size", {"size": "63x64"}),
        ("size", {"size": "65x64"}),
        ("size", {"size": "1024x1024"}),  # over this server's limit
        ("size", {"size": "9999x9999"}),
        ("prompt", {"prompt": "x" * 10_001}),
        ("response_format", {"response_format": "bytes"}),
        ("output_format", {"output_format": "svg"}),
        ("output_compression", {"output_compression": 101}),
        ("quality", {"quality": "best"}),
        ("background", {"background": "transparent"}),
        ("moderation", {"moderation": "none"}),
        ("seed", {"extra_body": {"seed": -1}}),
        ("image_url", {"extra_body": {"image_url": "ftp://x"}}),
        ("image_url", {"extra_body": {"mask_url": "data:,x"}}),  # a mask, but no picture
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(value),
)
def test_generations_name_what_is_wrong(client: OpenAI, field: str, options: dict[str, Any]) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.images.generate(**{"prompt": "x", **options})
    error = caught.value
    assert (error.param, error.type, error.code) == (field, "invalid_request_error", "invalid_input")
    assert error.message and field in error.message
    assert error.response.headers["x-request-id"]


def test_bodies_that_no_client_sends(http: httpx.Client) -> None:
    for body in (b"", b"{", b"[]", b"7", b'"x"', b"null", b"\xff", b'{"prompt": NaN}', b"[" * 30_000):
        answer = http.post("/v1/images/generations", content=body)
        assert answer.status_code == 400, (body[:9], answer.text)
        assert answer.json()["error"]["param"] is None
    answer = http.post("/v1/images/generations", json={"prompt": None})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "prompt")


def test_what_is_not_there(client: OpenAI, http: httpx.Client) -> None:
    for ask in (
        lambda: client.images.generate(prompt="x", model="nope"),
        lambda: client.images.edit(image=png(photo()), prompt="x", model="gpt-4"),
        lambda: client.models.retrieve("dall-e-2"),
    ):
        with pytest.raises(openai.NotFoundError) as caught:
            ask()
        assert (caught.value.code, caught.value.type) == ("model_not_found", "invalid_request_error")
    for answer in (http.get("/v1/nope"), http.delete("/v1/models"), http.get("/v1/images/generations")):
        assert answer.status_code in (404, 405)
        assert answer.json()["error"]["type"] == "invalid_request_error"
    assert "error_type" in http.get("/files/nope.png").json(), "elsewhere, errors are as they were"


def test_our_own_faults(server: Server, client: OpenAI) -> None:
    with pytest.raises(openai.InternalServerError) as caught:
        client.images.generate(prompt="nan", size=SMALL)
    assert (caught.value.status_code, caught.value.code, caught.value.type) == (
        500,
        "generation_failed",
        "server_error",
    )
    with pytest.raises(openai.InternalServerError) as caught:
        client.images.generate(prompt="raise", size=SMALL)
    assert "secret" not in caught.value.message
    assert server.metric("lcm_rt_errors_total", code="generation_failed") >= 2

    async def broken(*args: Any, **options: Any) -> None:
        raise RuntimeError("secret internals")

    service = server.service
    service.run = broken  # type: ignore[method-assign, assignment]
    try:
        with pytest.raises(openai.InternalServerError, match="the server failed on this request") as caught:
            client.images.generate(prompt="x", size=SMALL)
    finally:
        del service.run
    assert caught.value.response.headers["x-request-id"]


@run
async def test_too_much_is_a_rate_limit_and_loading_is_tried_again(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "slow-load")
    hold = Hold(tmp_path)
    models = [model_folder(tmp_path / "model", "slow-load")]
    async with serving(tmp_path, models=models, ready=False, max_pending=1) as server:
        client = await _async_client(server)
        async with client:
            with pytest.raises(openai.InternalServerError) as caught:
                await client.images.generate(prompt="x", size=SMALL)
            assert (caught.value.status_code, caught.value.code) == (503, "model_loading")
            assert caught.value.response.headers["retry-after"]  # the client comes again by itself, if it may
            await asyncio.to_thread((tmp_path / "slow-load").write_bytes, b"x")
            await server.service.workers.wait_ready()
            holding = asyncio.create_task(client.images.generate(prompt=hold.prompt, size=SMALL))
            await hold.entered()
            with pytest.raises(openai.RateLimitError) as limited:
                await client.images.generate(prompt="x", size=SMALL)
            assert (limited.value.code, limited.value.type) == ("rate_limit_exceeded", "rate_limit_error")
            holding.cancel()
            hold.release()
            await asyncio.wait([holding])


@run
async def test_keys(tmp_path: Path) -> None:
    async with serving(tmp_path, keys=True) as server:
        right, admin = await server.key("alice"), await server.key("bob", "admin")
        for key, kind, code in (
            ("sk-proj-nothing", openai.AuthenticationError, "invalid_api_key"),
            (admin, openai.PermissionDeniedError, "forbidden"),
            (right, None, None),
        ):
            async with (await _async_client(server)).with_options(api_key=key) as client:
                for ask in (lambda: client.images.generate(prompt="x", size=SMALL), client.models.list):
                    if kind is None:
                        await ask()
                        continue
                    with pytest.raises(kind) as caught:
                        await ask()
                    assert (caught.value.code, caught.value.type) == (code, "invalid_request_error")


# ---- models ----------------------------------------------------------------------------------------------------------


def test_models(client: OpenAI) -> None:
    served = list(client.models.list())
    assert [model.id for model in served] == ["first", "second"]
    one = client.models.retrieve("second")
    assert one == served[1]
    assert (one.object, one.owned_by, one.created) == ("model", "lcm-rt", 0)


def test_errors_of_the_door_are_theirs_too(http: httpx.Client) -> None:
    """What is refused before it reaches this dialect is told in it: a method, a path."""
    answer = http.put("/v1/images/edits", content=b"")
    assert answer.status_code == 405
    assert json.loads(answer.content)["error"] == {
        "message": "Method Not Allowed",
        "type": "invalid_request_error",
        "param": None,
        "code": None,
    }

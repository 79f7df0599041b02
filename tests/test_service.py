"""What a client's words are resolved into."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from serving import SIDE, model_folder, run, serving

from lcm_rt import wire
from lcm_rt.errors import ImageError, InputError, NotFound
from lcm_rt.server.app import create_service, create_store
from lcm_rt.service import Service
from lcm_rt.settings import Settings
from lcm_rt.types import MAX_SEED


@pytest.fixture
def service(tmp_path: Path) -> Service:
    models = [model_folder(tmp_path / "model", name) for name in ("first", "second")]
    settings = Settings(models=models, data_dir=tmp_path)
    return create_service(settings, create_store(settings))


@pytest.mark.parametrize(
    "app, model",
    [
        ("", "first"),
        ("fal-ai/lcm", "first"),
        ("fal-ai/fast-lcm-diffusion/image-to-image", "first"),
        ("110602490-lcm-sd15-i2i", "first"),
        ("110602490/lcm-sd15-i2i", "first"),
        ("fal-ai/second", "second"),
        ("second", "second"),
    ],
)
def test_apps(service: Service, app: str, model: str) -> None:
    assert service.model_of_app(app) == model


@pytest.mark.parametrize("app", ["nope", "fal-ai/nope", "x-lcm"])
def test_unknown_apps(service: Service, app: str) -> None:
    with pytest.raises(NotFound, match=app):
        service.model_of_app(app)


@pytest.mark.parametrize(
    "fields, model",
    [
        ({}, "second"),
        ({"model": "first"}, "first"),
        ({"model": "sdv1-5"}, "second"),
        ({"model_name": "runwayml/stable-diffusion-v1-5"}, "second"),
        ({"model_name": "first"}, "first"),
    ],
)
def test_models(service: Service, fields: dict[str, Any], model: str) -> None:
    assert service.model_of(wire.parse_input({"prompt": "x", **fields}), "second") == model


def test_a_model_that_is_not_served_is_named(service: Service) -> None:
    with pytest.raises(InputError, match="first, second") as refused:
        service.model_of(wire.parse_input({"prompt": "x", "model": "nope"}), "first")
    assert refused.value.field == "model"


@run
async def test_a_seed_is_chosen_and_reported(tmp_path: Path) -> None:
    wanted = wire.parse_input(
        {"prompt": "x", "num_images": 2, "num_inference_steps": 1, "image_size": {"width": SIDE, "height": SIDE}}
    )
    async with serving(tmp_path) as server:
        one = await server.service.run(wanted, app_model="fake", priority="run")
        two = await server.service.run(wanted, app_model="fake", priority="run")
    for output in (one, two):
        first, second = output.results
        assert 0 <= first.seed < second.seed == first.seed + 1 <= MAX_SEED
    assert one.results[0].seed != two.results[0].seed


@run
async def test_a_bad_picture_is_named_as_the_client_gave_it(tmp_path: Path) -> None:
    async with serving(tmp_path) as server:
        for field in ("image_bytes", "image"):
            wanted = wire.parse_input({"prompt": "x", field: b"junk"})
            with pytest.raises(ImageError) as refused:
                await server.service.run(wanted, app_model="fake", priority="run")
            assert refused.value.field == field
        with pytest.raises(ImageError):
            await server.service.run(
                wire.parse_input({"prompt": "x", "image_bytes": b""}), app_model="fake", priority="run"
            )

"""The table of models, and how a model is named."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import msgpack
import pytest
from serving import model_folder

from lcm_rt import catalog
from lcm_rt.catalog import CATALOG, FAMILIES, LICENCES, Choice, Place, read_reference, resolve
from lcm_rt.errors import InputError, NotFound


def test_rows_are_keyed_by_their_names() -> None:
    assert all(name == spec.name for name, spec in CATALOG.items())


def test_every_reference_of_the_tables_can_be_read_and_has_a_known_licence() -> None:
    for spec in CATALOG.values():
        known = catalog.licences(spec)
        assert spec.licence in known.values() and "see its repository" not in known.values()
    for family in FAMILIES.values():
        for reference in filter(None, (family.config, family.tiny_vae, family.safety, family.lcm_lora)):
            where = read_reference(reference)
            assert isinstance(where, Place) and where.repo in LICENCES


def test_licences_of_the_parts_apply_too() -> None:
    assert catalog.licences(CATALOG["sdxl-turbo"]) == {
        "stabilityai/sdxl-turbo": "Stability AI Community",
        "madebyollin/taesdxl": "MIT",
        "SimianLuo/LCM_Dreamshaper_v7": "MIT",
    }


def test_a_name_a_folder_a_file_or_a_repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert resolve("embedded") is CATALOG["embedded"]
    spec = resolve(model_folder(tmp_path / "model", "mine"))
    assert (spec.name, spec.source, spec.complete) == ("mine", str(tmp_path / "model"), False)
    (tmp_path / "x.safetensors").touch()
    monkeypatch.chdir(tmp_path)
    assert (
        resolve("mine=x.safetensors").source
        == resolve("mine=./x.safetensors").source
        == str(tmp_path / "x.safetensors")
    )
    monkeypatch.setenv("HOME", str(tmp_path))
    assert resolve("mine=~/model").source == str(tmp_path / "model")
    assert resolve("mine=me/model@v1.0").source == "me/model@v1.0"


@pytest.mark.parametrize(
    "reference, place",
    [
        ("me/model", Place("me/model")),
        ("stabilityai/stable-diffusion-xl-base-1.0", Place("stabilityai/stable-diffusion-xl-base-1.0")),
        ("me/model:unet", Place("me/model", "unet")),
        ("me/model:a/b.safetensors@v1.2", Place("me/model", "a/b.safetensors", "v1.2")),
        ("me/model@refs/pr/3", Place("me/model", "", "refs/pr/3")),
    ],
)
def test_places_on_the_hub(reference: str, place: Place) -> None:
    assert read_reference(reference) == place


def test_what_exists_goes_before_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert read_reference("me/model") == Place("me/model")
    (tmp_path / "me").mkdir()
    model_folder(tmp_path / "me" / "model")
    assert read_reference("me/model") == tmp_path / "me" / "model"


@pytest.mark.parametrize(
    "name",
    [
        *("nope", "", "mine=", "mine=nope", "mine=/nowhere", "mine=./a/b", "mine=../a", "mine=~/nowhere", "mine=a/b/c"),
        *("mine=me/x.safetensors", "mine=me/model:../x", "mine=me/model@../x", "mine=me/..", "mine=me/mo\0del"),
        *("mine=~nobody-at-all/x", "mine=" + "x" * 5000, "mine=me/model@", "mine=https://hub/me/model"),
    ],
)
def test_what_is_not_there(name: str) -> None:
    with pytest.raises(NotFound):
        resolve(name)


def test_what_is_there_but_no_model(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").touch()
    for path in (tmp_path, tmp_path / "notes.txt"):
        with pytest.raises(NotFound, match="diffusers format"):
            resolve(f"mine={path}")


@pytest.mark.parametrize("reference", ["model.ckpt", "/x/model.PT", "me/model:model.bin", "me/model:model.pth@main"])
def test_pickles_are_refused_by_their_names(reference: str) -> None:
    with pytest.raises(InputError, match="never opened"):
        resolve(f"mine={reference}")


def test_a_choice_crosses_to_another_process() -> None:
    choice = Choice(vae="full", safety=False)
    assert Choice(**msgpack.unpackb(msgpack.packb(dataclasses.asdict(choice)))) == choice

"""The table of models."""

from __future__ import annotations

from pathlib import Path

import pytest
from serving import model_folder

from lcm_rt import catalog
from lcm_rt.errors import NotFound


def test_rows_are_keyed_by_their_names() -> None:
    assert all(name == spec.name for name, spec in catalog.CATALOG.items())


def test_a_name_or_a_folder(tmp_path: Path) -> None:
    assert catalog.resolve("embedded") is catalog.CATALOG["embedded"]
    spec = catalog.resolve(model_folder(tmp_path / "model", "mine"))
    assert (spec.name, spec.path) == ("mine", tmp_path / "model")


@pytest.mark.parametrize("name", ["nope", "nope=/nowhere", ""])
def test_what_is_not_there(name: str) -> None:
    with pytest.raises(NotFound):
        catalog.resolve(name)

"""The pages of docs/ keep up with the code."""

from __future__ import annotations

import re
from pathlib import Path

from lcm_rt.catalog import CATALOG
from lcm_rt.errors import LcmError, _leaves
from lcm_rt.settings import Settings
from lcm_rt.types import SIZES, GenerateInput

DOCS = Path(__file__).parents[1] / "docs"


def words(page: str) -> set[str]:
    return set(re.findall(r"`([^`\s]+)`", (DOCS / page).read_text()))


def test_every_field_and_size_is_explained() -> None:
    assert set(GenerateInput.model_fields) | set(SIZES) <= words("api.md")


def test_every_error_is_explained() -> None:
    assert set(_leaves(LcmError)) - {"superseded", "cancelled"} <= words("api.md")


def test_every_row_is_listed() -> None:
    assert set(CATALOG) <= words("models.md")


def test_settings_that_pages_name_exist() -> None:
    in_server = {word for word in words("server.md") if re.fullmatch("[a-z]+(_[a-z]+)+", word)}
    in_server -= {"file_url", "image_url", "mask_url", "lora_url", "token_expiration", "allowed_apps", "error_type"}
    in_server -= {"runner_server_error", "request_timeout", "initial_acl", "tune_seconds"}
    assert in_server <= set(Settings.model_fields)
    named = {"vae", "safety", "controlnet", "memory_mb", "lora_limit_mb", "fetch_private", "max_side"}
    assert named <= words("models.md") | words("api.md")
    assert named <= set(Settings.model_fields)

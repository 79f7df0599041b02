"""Settings: flag before variable before file."""

from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import ValidationError

from lcm_rt.settings import Settings


def test_flag_before_variable_before_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "lcm-rt.toml"
    file.write_text('port = 1\nhost = "10.0.0.1"\nmax_rows = 3\n')
    monkeypatch.setenv("LCM_RT_CONFIG", str(file))
    monkeypatch.setenv("LCM_RT_PORT", "2")
    monkeypatch.setenv("LCM_RT_MAX_ROWS", "4")
    settings = Settings(max_rows=5)
    assert (settings.host, settings.port, settings.max_rows) == ("10.0.0.1", 2, 5)


def test_unknown_keys_in_the_file_are_errors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "lcm-rt.toml"
    file.write_text("prot = 1\n")
    monkeypatch.setenv("LCM_RT_CONFIG", str(file))
    with pytest.raises(ValidationError, match="prot"):
        Settings()


def test_models_in_a_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LCM_RT_MODELS", "embedded,mine=/models/mine")
    assert Settings().models == ["embedded", "mine=/models/mine"]


def test_a_file_that_is_missing_or_broken_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "lcm-rt.toml"
    monkeypatch.setenv("LCM_RT_CONFIG", str(file))
    with pytest.raises(ValueError, match="there is no file"):
        Settings()
    file.write_text("port = = 1")
    with pytest.raises(ValueError):
        Settings()


@pytest.mark.parametrize(
    "host, loopback", [("127.0.0.1", True), ("localhost", True), ("::1", True), ("0.0.0.0", False), ("box", False)]
)
def test_loopback(host: str, loopback: bool) -> None:
    assert Settings(host=host).is_loopback is loopback

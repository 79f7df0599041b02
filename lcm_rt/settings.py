"""What an operator may choose; read once at the roof and passed down as values.

Each field is a variable ``LCM_RT_<NAME>`` and a key of the TOML file that ``LCM_RT_CONFIG`` names; the usual ones are
flags of ``lcm-rt serve`` too. A flag goes before a variable, and that before the file. An unknown key in the file is an
error.
"""

from __future__ import annotations

import ipaddress
import os
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, field_validator
from pydantic_settings import (
    BaseSettings,
    NoDecode,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    TomlConfigSettingsSource,
)

from lcm_rt.types import LARGEST_SIDE


def _default_data_dir() -> Path:
    return Path(os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share") / "lcm-rt"


def _default_cache_dir() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lcm-rt"


class Settings(BaseSettings):
    """Every setting of a server, with its default."""

    model_config = SettingsConfigDict(env_prefix="LCM_RT_", extra="forbid", frozen=True)

    host: str = Field("127.0.0.1", description="Address to listen on.")
    port: int = Field(8000, ge=0, le=65535, description="Port to listen on; 0 takes a free one.")
    insecure: bool = Field(False, description="Ask nobody for a key, though other machines reach the address.")
    hosts: Annotated[list[str], NoDecode] = Field(
        [], description="Further names by which an open server on this machine may be called, by a proxy before it say."
    )
    keys: bool = Field(False, description="Ask for API keys on this machine's own address too.")
    tls_cert: Path | None = Field(None, description="Certificate chain (PEM), to speak https and wss.")
    tls_key: Path | None = Field(None, description="Its private key (PEM).")
    data_dir: Path = Field(default_factory=_default_data_dir, description="Where the database and files are kept.")
    database_url: str | None = Field(
        None, description="postgresql+psycopg://... shared by several servers; by default SQLite in data_dir."
    )
    storage_url: str | None = Field(
        None, description="Where files lie, as fsspec spells it (s3://bucket/path); by default a folder in data_dir."
    )
    models: Annotated[list[str], NoDecode] = Field(
        ["embedded"],
        min_length=1,
        description="Models to serve; the first is the default. A variable separates by comma.",
    )
    device: str = Field("auto", description="auto, cpu, cuda or cuda:N.")
    backend: Literal["auto", "eager", "inductor", "openvino"] = Field(
        "auto",
        description="How networks run: auto is inductor (torch.compile) with CUDA graphs on a GPU, on a CPU openvino "
        "where it is installed. Models answer eagerly until that is made.",
    )
    cache_dir: Path = Field(
        default_factory=_default_cache_dir, description="Where compiled and converted networks are kept."
    )
    threads: int | None = Field(None, ge=1, description="Threads of a CPU's arithmetic; by default torch's choice.")
    vae: Literal["tiny", "full"] | None = Field(
        None, description="tiny decodes in a fraction of the time, full draws finer; by default tiny where known."
    )
    safety: bool = Field(True, description="Use the models' safety checkers, where they have one.")
    controlnet: bool = Field(True, description="Load the models' inpainting ControlNets, where they have one.")
    memory_mb: int | None = Field(
        None, ge=1, description="What the weights of all models may take; the ones longest unused make room."
    )
    repeat_mb: int = Field(
        64, ge=0, description="Most that finished pictures may take that are kept for exact repeats; 0 keeps none."
    )
    max_side: int = Field(1024, ge=64, le=LARGEST_SIDE, description="Largest side of a picture that may be asked for.")
    max_rows: int = Field(8, ge=1, le=64, description="Pictures that are denoised at a time; also the largest batch.")
    max_sessions: int = Field(256, ge=1, description="Realtime connections at a time.")
    max_pending: int = Field(256, ge=1, description="Requests at the engine at a time, before 429.")
    idle_timeout_s: float = Field(300, gt=0, description="A realtime connection without messages is closed after this.")
    send_timeout_s: float = Field(10, gt=0, description="A client that takes longer to read one frame is cut.")
    hang_timeout_s: float = Field(120, gt=0, description="An engine whose step takes longer than this is restarted.")
    file_ttl_s: float = Field(3600, gt=0, description="How long an answered picture is kept for its URL.")
    file_limit_mb: int = Field(1024, ge=1, description="Most that answered pictures may take on disk; oldest go first.")
    upload_ttl_s: float = Field(7 * 86400, gt=0, description="How long an upload is kept that does not say how long.")
    upload_limit_mb: int = Field(2048, ge=1, description="Largest upload.")
    upload_quota_mb: int = Field(20480, ge=1, description="Most that the uploads of one owner may take.")

    result_ttl_s: float = Field(3600, gt=0, description="How long a queued job's result is kept.")
    max_jobs: int = Field(1000, ge=1, description="Jobs that wait in the queue, before 429.")
    max_jobs_per_owner: int = Field(100, ge=1, description="... of one owner.")
    running_jobs: int = Field(4, ge=1, description="Jobs of the queue that this server runs at a time.")
    webhook_private: bool = Field(False, description="Allow webhooks to private addresses and other ports.")

    fetch_private: bool = Field(
        False, description="Allow pictures and LoRAs to be fetched from private addresses and other ports."
    )
    lora_hub: bool = Field(True, description="Allow LoRAs of the Hugging Face hub, as hf:OWNER/NAME/FILE.")
    hub_url: str = Field(
        default_factory=lambda: os.environ.get("HF_ENDPOINT") or "https://huggingface.co",
        description="Where hf: LoRAs lie; by default what HF_ENDPOINT says.",
    )
    lora_limit_mb: int = Field(
        4096, ge=1, description="Most that fetched LoRAs may take on disk; unused ones go first."
    )

    @field_validator("data_dir", "cache_dir")
    @classmethod
    def _expand(cls, path: Path) -> Path:
        return path.expanduser().resolve()

    @field_validator("models", "hosts", mode="before")
    @classmethod
    def _split(cls, names: str | list[str]) -> list[str]:
        return names.split(",") if isinstance(names, str) else names

    @property
    def is_open(self) -> bool:
        """Nobody is asked for a key."""
        return not self.keys and (self.is_loopback or self.insecure)

    @property
    def is_loopback(self) -> bool:
        """Only this machine can reach the server."""
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return self.host == "localhost"

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        sources = [init_settings, env_settings]
        if path := os.environ.get("LCM_RT_CONFIG"):
            if not Path(path).is_file():
                raise ValueError(f"LCM_RT_CONFIG: there is no file {path}")
            sources.append(TomlConfigSettingsSource(settings_cls, Path(path)))
        return tuple(sources)

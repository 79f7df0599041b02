"""Folders with the weights of one network, as diffusers and transformers write them; knows no network."""

from __future__ import annotations

from pathlib import Path

from lcm_rt.errors import NotFound


def variant_of(folder: Path) -> str | None:
    """The ``variant`` under which the loaders find the weights: "fp16" if there are no others.

    Raises:
        NotFound: there are no safetensors weights.
    """
    found = sorted(folder.glob("*.safetensors"))
    if not found:
        # A pickle runs code of its author when it is opened.
        raise NotFound(f"{folder} holds no .safetensors weights; pickled weights (.bin, .ckpt) are never opened")
    return None if any(".fp16." not in file.name for file in found) else "fp16"

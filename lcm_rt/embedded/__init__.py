"""The model inside the package: a small latent consistency model of simple landscapes.

Importing this module loads no torch; the weights are an ordinary diffusers folder.
"""

from __future__ import annotations

from pathlib import Path

MODEL_DIR = Path(__file__).parent / "model"
LORA_DIR = Path(__file__).parent / "loras"

"""Which finished pictures are unfit to show, judged on the device; knows no model, no request and no picture file.

The checker is the one of Stable Diffusion 1: a CLIP vision model, and thresholds on how near a picture's embedding lies
to the embeddings of twenty concepts. Only its weights and its vision model come from diffusers, whose own decision is
made row by row on the host, after a detour through Pillow.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from lcm_rt.engine.folders import variant_of
from lcm_rt.errors import NotFound

# Of CLIP's pictures, scaled to 0..1.
MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)
CARE = 0.01  # what a picture near one of the special-care concepts is moved towards all the others


class SafetyChecker:
    """The checker of ``folder``, on ``device``; its vision model computes in ``dtype``, the decision in float32.

    Raises:
        NotFound: there is no such folder, it holds no safetensors weights, or they are not those of a checker.
    """

    def __init__(self, folder: Path, device: torch.device, dtype: torch.dtype) -> None:
        checker = _load(folder)
        self._vision = checker.vision_model.to(device, dtype)
        self._projection = checker.visual_projection.to(device, dtype)
        self._side: int = checker.config.vision_config.image_size
        self._care = functional.normalize(checker.special_care_embeds.to(device))
        self._care_limits = checker.special_care_embeds_weights.to(device)
        self._concepts = functional.normalize(checker.concept_embeds.to(device))
        self._limits = checker.concept_embeds_weights.to(device)
        self._mean = torch.tensor(MEAN, dtype=torch.float32, device=device).view(3, 1, 1)
        self._std = torch.tensor(STD, dtype=torch.float32, device=device).view(3, 1, 1)
        self.bytes: int = sum(weight.nbytes for weight in checker.parameters())

    @torch.inference_mode()
    def flag(self, pictures: Tensor) -> Tensor:
        """Which of ``pictures`` are unfit to show: (B,) bool on the device, for (B, H, W, 3) uint8 on the device.

        Nothing waits for the device.
        """
        return self._decide(*self._cosines(pictures))

    def _cosines(self, pictures: Tensor) -> tuple[Tensor, Tensor]:
        """How near each picture is to the special-care concepts (B, n) and to the others (B, m), -1 to 1."""
        embeddings = self._projection(self._vision(self._prepare(pictures)).pooler_output)
        embeddings = functional.normalize(embeddings.float())
        return embeddings @ self._care.T, embeddings @ self._concepts.T

    def _prepare(self, pictures: Tensor) -> Tensor:
        """What CLIP's image processor makes of the pictures, (B, 3, side, side)."""
        height, width = pictures.shape[1:3]
        shorter = min(height, width)
        size = (int(self._side * height / shorter), int(self._side * width / shorter))
        pixels = pictures.permute(0, 3, 1, 2).float()
        # One side after the other, bytes after each, as Pillow does it: at most one level from its pixels.
        for sides in ((height, size[1]), size):
            if pixels.shape[2:] != sides:
                pixels = functional.interpolate(pixels, sides, mode="bicubic", antialias=True)
                pixels = (pixels + 0.5).floor().clamp(0, 255)
        top, left = (size[0] - self._side) // 2, (size[1] - self._side) // 2
        pixels = pixels[:, :, top : top + self._side, left : left + self._side]
        return ((pixels / 255 - self._mean) / self._std).to(self._vision.dtype)

    def _decide(self, care: Tensor, concepts: Tensor) -> Tensor:
        """Which rows are unfit, (B,), by their cosines."""
        # The thresholds were set for margins of three decimals: .0005 is none, .0006 is one.
        careful = (care - self._care_limits).round(decimals=3) > 0
        margins = concepts - self._limits + CARE * careful.any(1, keepdim=True)
        flagged: Tensor = (margins.round(decimals=3) > 0).any(1)
        return flagged


def _load(folder: Path) -> Any:
    """diffusers' checker of ``folder`` in float32, in evaluation mode, on the CPU."""
    import transformers
    from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker

    transformers.utils.logging.disable_progress_bar()
    variant = variant_of(folder)
    try:
        checker, report = StableDiffusionSafetyChecker.from_pretrained(
            folder,
            dtype=torch.float32,  # the thresholds, too, were set in it
            use_safetensors=True,
            variant=variant,
            local_files_only=True,
            output_loading_info=True,
        )
    except Exception as error:
        raise NotFound(f"{folder} cannot be loaded as a safety checker") from error
    if report["missing_keys"]:
        # What is missing would be random numbers, and so would be the checker's answers.
        raise NotFound(f"{folder} holds the weights of something else than a safety checker")
    return checker.eval().requires_grad_(False)

"""What one training run is asked to do, and what every stage of it needs."""

from __future__ import annotations

import os
import random
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from PIL import Image
from torch import Tensor, nn

from lcm_rt.embedded import scenes

TEACHER = 0.75  # too many walks on blurred predictions of unknown layouts teach blur


@dataclass(frozen=True, slots=True)
class Plan:
    """What one training run is asked to do."""

    out: Path
    work: Path
    steps: int
    seed: int
    device: torch.device
    batch: int
    autoencoder_steps: int
    text_steps: int
    decoder_steps: int
    controlnet_steps: int
    lora_steps: int
    pictures: int

    def rng(self, stage: str) -> random.Random:
        return random.Random(f"{stage}-{self.seed}")


def save(state: object, path: Path) -> None:
    """Write atomically, so that a killed run never leaves half a checkpoint."""
    if RANK:
        return
    torch.save(state, path.with_suffix(".tmp"))
    os.replace(path.with_suffix(".tmp"), path)


# One process per core beats threads on a shared machine:
# ``torchrun --standalone --nproc-per-node 2 -m lcm_rt.embedded.train``.
RANK, WORLD = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def share(model: nn.Module) -> None:
    """Give every process the first one's weights."""
    if WORLD > 1:
        for p in model.state_dict().values():
            dist.broadcast(p, 0)


def agree(model: nn.Module) -> None:
    """Average the gradients over the processes."""
    if WORLD > 1:
        grads = [p.grad for p in model.parameters() if p.grad is not None]
        flat = torch.cat([g.flatten() for g in grads]) / WORLD
        dist.all_reduce(flat)
        for g, part in zip(grads, torch.split(flat, [g.numel() for g in grads]), strict=True):
            g.copy_(part.view_as(g))


def rate(step: int, steps: int, peak: float, warm: int = 50) -> float:
    """Learning rate: a linear warm-up, the peak, and a linear way down over the last two fifths."""
    left = (steps - step) / max(0.4 * steps, 1)
    return peak * min(1.0, (step + 1) / warm, max(left, 0.01))


def scene_batch(plan_seed: int, first: int, count: int) -> tuple[Tensor, Tensor, list[str]]:
    """Scenes ``first`` to ``first + count`` of an endless seeded book: said (B, attributes), z, captions."""
    rng = random.Random(plan_seed * 1_000_003 + first)
    said = [scenes.speak(rng) for _ in range(count)]
    captions = [scenes.caption(row, rng) for row in said]
    generator = torch.Generator().manual_seed(plan_seed * 1_000_003 + first)
    return torch.tensor(said), torch.randn(count, 4, scenes.GRID, scenes.GRID, generator=generator), captions


def to_bytes(image: Tensor) -> Tensor:
    """[-1, 1] float to uint8."""
    return ((image.clamp(-1, 1) + 1) * 127.5).round().byte()


def from_bytes(image: Tensor) -> Tensor:
    """uint8 to [-1, 1] float32."""
    return image.float() / 127.5 - 1


def save_grid(images: Tensor, path: Path, columns: int) -> None:
    n, c, h, w = images.shape
    grid = to_bytes(images).view(n // columns, columns, c, h, w).permute(0, 3, 1, 4, 2)
    Image.fromarray(grid.reshape(n // columns * h, columns * w, c).numpy()).save(path)

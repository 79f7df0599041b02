"""The optimiser of every stage that has matrices to learn."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


class Muon(torch.optim.Optimizer):
    """Momentum with orthogonalised updates for matrices (Jordan et al. 2024), Adam for the rest.

    Updates are scaled to Adam's usual size (Liu et al. 2025), so that one learning rate serves both.
    """

    def __init__(self, model: nn.Module, peak: float) -> None:
        named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        ends = ("conv_in", "conv_out", "time_embedding")
        matrix = [p for name, p in named if p.ndim >= 2 and not name.startswith(ends)]
        rest = [p for name, p in named if p.ndim < 2 or name.startswith(ends)]
        groups = [{"params": matrix, "muon": True}, {"params": rest, "muon": False}]
        super().__init__(groups, {"peak": peak, "lr": 0.0, "decay": 0.01})

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state["step"], state["first"] = 0, torch.zeros_like(p)
                    if not group["muon"]:
                        state["second"] = torch.zeros_like(p)
                state["step"] += 1
                if group["muon"]:
                    state["first"].lerp_(p.grad, 0.05)
                    update = orthogonal(torch.lerp(p.grad, state["first"], 0.95).flatten(1)).view_as(p)
                    p.mul_(1 - group["lr"] * group["decay"])
                else:
                    state["first"].lerp_(p.grad, 0.1)
                    state["second"].lerp_(p.grad.square(), 0.02)
                    first = state["first"] / (1 - 0.9 ** state["step"])
                    update = first / ((state["second"] / (1 - 0.98 ** state["step"])).sqrt() + 1e-8)
                p.add_(update, alpha=-group["lr"])


def orthogonal(g: Tensor) -> Tensor:
    """Newton-Schulz: the nearest matrix with equal singular values, scaled to a mean square of about 0.2²."""
    wide = g.shape[0] <= g.shape[1]
    x = g if wide else g.T
    x = x / (x.norm() + 1e-7)
    for _ in range(4):
        gram = x @ x.T
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    scale: float = 0.2 * math.sqrt(max(g.shape))
    result: Tensor = (x if wide else x.T) * scale
    return result

"""CUDA graphs of whole steps: one launch where a UNet has hundreds, captured over the static tensors of the slots."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch import Tensor

from lcm_rt.engine.inductor import Step
from lcm_rt.engine.slots import Slots

BUCKETS = (1, 2, 3, 4, 6, 8, 12, 16)
"""Inputs of a graph. With powers of two alone, sixteen people typing wait twice as long (benchmarks/simulate.py)."""

WANTED = 2
"""How often a bucket is asked for before it is captured, which takes as long as a few eager steps."""


def bucket_of(inputs: int) -> int:
    """The smallest bucket that holds so many."""
    return next(bucket for bucket in BUCKETS if bucket >= inputs)


class Graphs:
    """The graphs of one step at one size of latents; those of all sizes share ``pool`` of memory."""

    def __init__(self, step: Step, slots: Slots, pool: Any) -> None:
        self.step = step
        self._slots = slots
        self._pool = pool
        self._asked: Counter[int] = Counter()
        self._captured: dict[int, tuple[torch.cuda.CUDAGraph, Tensor]] = {}

    def run(self, places: Tensor) -> bool:
        """One step, by its graph if there is one; whether there was."""
        inputs = places.shape[1]
        self._asked[inputs] += 1
        if inputs not in self._captured:
            self.step(self._slots.state, places)
            return False
        graph, static = self._captured[inputs]
        static.copy_(places, non_blocking=True)
        graph.replay()
        return True

    def capture_one(self) -> bool:
        """Capture the bucket most asked for that has no graph yet; whether there was one."""
        for inputs, times in self._asked.most_common():
            if inputs not in self._captured and times >= WANTED:
                self._captured[inputs] = self._capture(inputs)
                return True
        return False

    def _capture(self, inputs: int) -> tuple[torch.cuda.CUDAGraph, Tensor]:
        static = self._slots.nowhere(inputs)  # nobody's row steps while it is captured
        aside: Any = torch.cuda.Stream(self._slots.device)  # type: ignore[no-untyped-call]
        aside.wait_stream(torch.cuda.current_stream(self._slots.device))
        with torch.cuda.stream(aside):
            self.step(self._slots.state, static)  # libraries set themselves up at their first call, which no graph may
        torch.cuda.current_stream(self._slots.device).wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        # Other threads load models, or copy pictures to the host, meanwhile.
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            self.step(self._slots.state, static)
        return graph, static

"""How long a device takes: on a GPU it works behind the host, and its own stream says when it got where."""

from __future__ import annotations

import time

import torch

Mark = float | torch.cuda.Event
"""A moment in what the device does."""


class Clock:
    """Moments of one device."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def mark(self) -> Mark:
        """Now, or when the current stream has done all that it was given so far."""
        if self._device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        return event


def is_past(mark: Mark) -> bool:
    """Whether the device got there."""
    return isinstance(mark, float) or bool(mark.query())  # type: ignore[no-untyped-call]


def wait_for(mark: Mark) -> None:
    """Until the device got there; other threads run meanwhile."""
    if not isinstance(mark, float):
        mark.synchronize()


def seconds(begin: Mark, end: Mark) -> float:
    """Between two moments that are past."""
    if isinstance(begin, float) or isinstance(end, float):
        assert isinstance(begin, float) and isinstance(end, float), "moments of one device"
        return end - begin
    return float(begin.elapsed_time(end)) / 1e3

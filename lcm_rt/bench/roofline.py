"""How fast a call could be: its arithmetic and its traffic, counted op by op, against what the device can do.

The floor is Williams' roofline (2009), summed over the ops: no convolution, product, attention or norm takes less time
than its arithmetic at the device's peak, nor than the reading of its inputs and the writing of its output once; the
rest is taken to be fused into them. What is counted is what the call sends to torch's dispatcher, so it runs eagerly.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, sdpa_flop_count

aten = torch.ops.aten

# One kernel each on the devices that matter; the flop counter has no formula for them.
_ATTENTIONS = (aten.scaled_dot_product_attention, aten._scaled_dot_product_flash_attention_for_cpu)
_NORMS = (aten.native_group_norm, aten.native_layer_norm)
_RUN_NOTHING = (
    aten.empty,
    aten.empty_like,
    aten.empty_strided,
    aten.new_empty,
    aten.new_empty_strided,
    aten._unsafe_view,
)
"""Beside views, of which the schema tells."""
_SYNCS = (
    aten._local_scalar_dense,  # item(), tolist(), bool(), int()
    aten.nonzero,
    aten.masked_select,
    aten.equal,
    aten._unique2,
    aten.unique_dim,
    aten.unique_consecutive,
)
"""Ops whose result, or its shape, is a number that the host waits for."""


@dataclass(frozen=True, slots=True)
class Peak:
    """What a device can do: floating point operations per second, bytes per second, and how that is known."""

    flops: float
    bytes: float
    source: str


KNOWN = {"H200": Peak(790e12, 4.3e12, "measured on an H200: a product of 8192x8192 in bfloat16, a copy of 4 GB")}
"""By a part of the device's name, in half precision."""


@dataclass(slots=True)
class Work:
    """What a call asked of its device.

    Args:
        flops: of products, convolutions and attention; a multiplication and its addition are two.
        bytes: inputs and outputs of these and of norms, each op for itself.
        launches: ops that run something, one kernel or more each.
        syncs: by op, how often the host had to wait for the device (or would have had to, on a GPU).
        heavy: flops and bytes of each of the ops that ``floor_s`` adds up.
        dtype: of the result of the last product, convolution or attention.
    """

    flops: int = 0
    bytes: int = 0
    launches: int = 0
    syncs: Counter[str] = field(default_factory=Counter)
    heavy: list[tuple[int, int]] = field(default_factory=list)
    dtype: torch.dtype = torch.float32

    def floor_s(self, peak: Peak) -> float:
        """Seconds that no implementation of the same ops is under."""
        return sum(max(flops / peak.flops, bytes / peak.bytes) for flops, bytes in self.heavy)


def count(call: Callable[[], object]) -> Work:
    """Run ``call`` once and say what it asked for. What is compiled or captured in it is not seen."""
    tally = _Tally()
    with tally:
        call()
    return tally.work


class _Tally(TorchDispatchMode):  # type: ignore[no-untyped-call]
    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.work = Work()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        packet = func._overloadpacket
        if packet not in flop_registry and packet not in _ATTENTIONS:
            with self:  # an op that is made of others is counted as those
                out = func.decompose(*args, **kwargs)
            if out is not NotImplemented:
                return out
        out = func(*args, **kwargs)
        self._add(func, packet, args, kwargs, out)
        return out

    def _add(self, func: Any, packet: Any, args: Any, kwargs: Any, out: Any) -> None:
        work = self.work
        returned = [value.alias_info for value in func._schema.returns]
        if packet in _RUN_NOTHING or any(alias is not None and not alias.is_write for alias in returned):
            return
        work.launches += 1
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        if packet in _SYNCS or _waits_for_copy(packet, args, kwargs, out):
            work.syncs[packet.__name__] += 1
        elif packet is aten.index and any(t.dtype in (torch.bool, torch.uint8) for t in tensors[1:]):
            work.syncs["index by a mask"] += 1
        flops = _flops(packet, args, kwargs, out)
        if flops or packet in _NORMS:
            moved = sum(tensor.nbytes for tensor in [*tensors, *tree_leaves(out)] if isinstance(tensor, Tensor))
            work.flops += flops
            work.bytes += moved
            work.heavy.append((flops, moved))
        if flops:
            work.dtype = next(leaf.dtype for leaf in tree_leaves(out) if isinstance(leaf, Tensor))


def _flops(packet: Any, args: Any, kwargs: Any, out: Any) -> int:
    if packet in _ATTENTIONS:
        return int(sdpa_flop_count(*(tensor.shape for tensor in args[:3])))  # type: ignore[no-untyped-call]
    if packet not in flop_registry:
        return 0
    return int(flop_registry[packet](*args, **kwargs, out_val=out))


def _waits_for_copy(packet: Any, args: Any, kwargs: Any, out: Any) -> bool:
    """Copies between host and device, either way, but for those that were asked not to wait."""
    if packet is aten._to_copy:
        source, target, non_blocking = args[0], out, kwargs.get("non_blocking", False)
    elif packet is aten.copy_:
        target, source, non_blocking = args[0], args[1], (args[2] if len(args) > 2 else kwargs.get("non_blocking"))
    else:
        return False
    return source.device.type != target.device.type and not non_blocking


def peak_of(device: torch.device, dtype: torch.dtype) -> Peak:
    """The peaks of ``device``: known ones, else measured by a product in ``dtype`` and a copy."""
    if device.type == "cuda" and dtype.itemsize == 2:
        name = torch.cuda.get_device_name(device)
        for part, peak in KNOWN.items():
            if part in name:
                return peak
    return measure_peak(device, dtype)


def measure_peak(device: torch.device, dtype: torch.dtype, *, side: int | None = None) -> Peak:
    """A product of two matrices of ``side``, and a copy of memory far larger than any cache."""
    gpu = device.type == "cuda"
    side = side or (8192 if gpu else 1536)
    # Noughts and other numbers of few bits would be multiplied faster.
    a, b = (torch.randn(side, side, device=device, dtype=torch.float32).to(dtype) for _ in range(2))
    product_s = seconds_of(lambda: a @ b, device, repeats=10 if gpu else 3)
    source = torch.ones(2**31 if gpu else 2**27, device=device, dtype=torch.int8)
    target = torch.empty_like(source)
    copy_s = seconds_of(lambda: target.copy_(source), device, repeats=10 if gpu else 3)
    words = (
        f"measured: a product of {side}x{side} in {str(dtype).removeprefix('torch.')}, a copy of {source.nbytes} bytes"
    )
    return Peak(2 * side**3 / product_s, 2 * source.nbytes / copy_s, words)


def event() -> torch.cuda.Event:
    """A mark on a GPU's own clock."""
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]


def seconds_of(call: Callable[[], object], device: torch.device, *, repeats: int, warm: int = 3) -> float:
    """Seconds of one call: on a GPU the mean of ``repeats`` in a row by its own clock, on a CPU the least of them."""
    for _ in range(warm):
        call()
    if device.type == "cuda":
        begun, ended = event(), event()
        with torch.cuda.device(device):
            begun.record()
            for _ in range(repeats):
                call()
            ended.record()
            ended.synchronize()
        return float(begun.elapsed_time(ended)) / 1e3 / repeats
    times = []
    for _ in range(repeats):
        begun_at = time.perf_counter()
        call()
        times.append(time.perf_counter() - begun_at)
    return min(times)

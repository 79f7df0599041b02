"""LoRA files: read for one model, added to the rows of a forward, or fused into the weights; knows no request.

An *adapter* adds ``scale * up @ down`` to the weights of some layers. Rows of one batch may each have another adapter,
or none. So the weights stay as they are, and forward hooks add each row's own part to a layer's output.
"""

from __future__ import annotations

import json
import math
import re
import threading
import weakref
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from lcm_rt.cache import Counts, tally
from lcm_rt.errors import InputError

MAX_RANK = 256
MAX_TENSORS = 4000  # all layers of an SDXL model, with three tensors each, are 3200
MAX_HEADER_BYTES = 4 * 2**20
STACKED_BYTES = 512 * 2**20  # of the combinations of adapters that are kept for the next step

MAX_NAME = 256  # characters; the longest real ones have about 130
MAX_ALPHA = 1e6

FIELD = "lora_url"
FLOATS = ("F16", "BF16", "F32", "F64")
Layer = nn.Linear | nn.Conv2d
KINDS = {"dora_scale": "DoRA", "lora_magnitude_vector": "DoRA", "hada_": "LoHa", "lokr_": "LoKr", "lora_mid": "Tucker"}


@dataclass(frozen=True, slots=True)
class Patch:
    """What one adapter, or a stack of several, adds to the weight of one layer: ``scale * up @ down``.

    Attributes:
        down: (adapters, rank, in) for a linear layer, (adapters, rank, in, height, width) for a convolution.
        up: (adapters, out, rank) for both.
        scales: (adapters,) the files' own factors, alpha / rank.
    """

    down: Tensor
    up: Tensor
    scales: tuple[float, ...]


Patches = Mapping[str, Patch]
"""By the name of the module in its network."""


@dataclass(frozen=True, slots=True, eq=False, weakref_slot=True)
class Adapter:
    """One LoRA file, read for one model; immutable.

    Attributes:
        id: tells it from the other files of its model.
        parts: ``"unet"``, ``"text_encoder"`` or ``"text_encoder_2"`` -> patches; a part that the
            file does not address is missing.
        bytes: what its tensors take on the device.
    """

    id: str
    parts: Mapping[str, Patches]
    bytes: int


def read_adapter(
    path: Path, networks: Mapping[str, nn.Module], device: torch.device | str, dtype: torch.dtype, id: str
) -> Adapter:
    """Read a LoRA in the format of kohya's scripts, of peft or of diffusers, old and new.

    Args:
        path: a safetensors file.
        networks: ``"unet"``, ``"text_encoder"``, and ``"text_encoder_2"`` where the model has one.
        device: where the adapter's tensors go.
        dtype: that of the networks, or float32 for an adapter that is only to be fused.
        id: of the adapter.

    Raises:
        InputError: the file is no LoRA, or one of an unknown kind, or was made for another kind of model, or its
            weights are not finite in ``dtype``.
    """
    from safetensors import SafetensorError, safe_open

    _check_header(path)
    try:
        with safe_open(path, framework="pt") as file:
            return Adapter(id, *_read(file, networks, device, dtype))
    except SafetensorError as error:
        raise InputError(FIELD, "is not a safetensors file, or a broken one") from error


def _check_header(path: Path) -> None:
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > MAX_HEADER_BYTES and length < path.stat().st_size:
            raise InputError(FIELD, f"has a header of more than {MAX_HEADER_BYTES // 2**20} MiB")


def _read(
    file: Any, networks: Mapping[str, nn.Module], device: torch.device | str, dtype: torch.dtype
) -> tuple[dict[str, dict[str, Patch]], int]:
    keys: list[str] = list(file.keys())
    if len(keys) > MAX_TENSORS:
        raise InputError(FIELD, f"holds {len(keys)} tensors; at most {MAX_TENSORS} are taken")
    if any(len(key) > MAX_NAME for key in keys):
        raise InputError(FIELD, f"has names of more than {MAX_NAME} characters")
    if not any("lora" in key for key in keys):
        raise InputError(FIELD, "holds no LoRA weights")
    for mark, kind in KINDS.items():
        if any(mark in key for key in keys):
            raise InputError(FIELD, f"this kind of LoRA is not supported: {kind}")

    alphas = {key for key in keys if key.endswith(".alpha")}
    addressed = _addresses([key for key in keys if key not in alphas], networks["unet"])
    settings = _Settings(file.metadata() or {})
    patches: dict[str, dict[str, Patch]] = {}
    loaded: dict[str, Tensor] = {}
    # All shapes are looked at before any weights are read: a file for another model is refused in no time.
    plan: list[tuple[str, str, str, str, float]] = []
    for (part, name), ends in addressed.items():
        down, up = ends.get("lora_A.weight"), ends.get("lora_B.weight")
        if down is None or up is None or len(ends) != 2:
            raise InputError(
                FIELD, f"{_quote(next(iter(ends.values())))} is not understood, or its counterpart is missing"
            )
        address, module = _find(networks, part, name, down)
        rank = _check_shapes(file, module, down, up)
        alpha = f"{down.removesuffix('.lora_down.weight')}.alpha"
        scale = settings.scale(part, name, rank)
        if alpha in alphas:
            alphas.discard(alpha)
            scale = _number(file, alpha) / rank
        plan.append((part, address, down, up, scale))
    if alphas:
        raise InputError(FIELD, f"{_quote(min(alphas))} belongs to no layer")

    for part, address, down, up, scale in plan:
        for key in (down, up):
            # A copy, because the tensors of a file that is mapped into memory would change and vanish with it.
            loaded[key] = file.get_tensor(key).to(device, dtype, copy=True)
        patches.setdefault(part, {})[address] = Patch(loaded[down][None], loaded[up].flatten(1)[None], (scale,))
    finite = torch.stack([tensor.isfinite().all() for tensor in loaded.values()]).tolist()
    for key, good in zip(loaded, finite, strict=True):
        if not good:
            raise InputError(FIELD, f"{_quote(key)} holds numbers that are not finite")
    return patches, sum(map(_size, patches.values()))


def _addresses(keys: Sequence[str], unet: nn.Module) -> dict[tuple[str, str], dict[str, str]]:
    """(part, module) -> ``lora_A.weight`` and ``lora_B.weight`` -> the file's key, all in the names of peft."""
    from diffusers.loaders import StableDiffusionLoraLoaderMixin
    from diffusers.utils.state_dict_utils import (
        StateDictType,
        convert_state_dict_to_peft,
        convert_unet_state_dict_to_peft,
    )

    # These functions rename the keys and never look at the values. So the values are the file's own names, which an
    # error can say.
    try:
        renamed, _ = StableDiffusionLoraLoaderMixin.lora_state_dict({key: key for key in keys}, unet_config=unet.config)
    except Exception as error:  # what those functions raise on a name which they do not know is almost anything
        raise InputError(FIELD, "names layers in a way that is not understood") from error
    parts: dict[str, dict[str, str]] = {}
    for key, origin in renamed.items():
        part, _, rest = key.partition(".")
        parts.setdefault(part, {})[rest] = origin
    addresses: dict[tuple[str, str], dict[str, str]] = {}
    for part, names in parts.items():
        if part == "unet":
            spelt = convert_unet_state_dict_to_peft(names)
        else:
            newer = convert_state_dict_to_peft(names, StateDictType.DIFFUSERS_OLD)
            spelt = convert_state_dict_to_peft(newer, StateDictType.DIFFUSERS)
        for key, origin in spelt.items():
            name, dot, end = key.partition(".lora_")
            addresses.setdefault((part, name), {})[dot[1:] + end] = origin
    return addresses


def _find(networks: Mapping[str, nn.Module], part: str, name: str, key: str) -> tuple[str, Layer]:
    """The module that a file means, and its name here."""
    # The text encoders of transformers 5 have lost, or kept, an outer layer of that name.
    for address in (name, name.removeprefix("text_model."), f"text_model.{name}"):
        try:
            module = networks[part].get_submodule(address)
        except (KeyError, AttributeError):
            continue
        if isinstance(module, Layer):
            return address, module
    raise InputError(
        FIELD, f"{_quote(key)} is for a layer that this model does not have: it was made for another kind of model"
    )


def _check_shapes(file: Any, module: Layer, down: str, up: str) -> int:
    """The rank of a patch that fits the weight of ``module``."""
    for key in (down, up):
        if (kind := file.get_slice(key).get_dtype()) not in FLOATS:
            raise InputError(FIELD, f"{_quote(key)} has weights of type {kind}")
    outputs, *inputs = module.weight.shape
    found = tuple(file.get_slice(down).get_shape())
    rank = found[0] if found else 0
    if not 1 <= rank <= MAX_RANK:
        raise InputError(FIELD, f"{_quote(down)} has rank {rank}; ranks from 1 to {MAX_RANK} are taken")
    for key, wanted in ((down, (rank, *inputs)), (up, (outputs, rank, *(1 for _ in inputs[1:])))):
        if (found := tuple(file.get_slice(key).get_shape())) != wanted:
            raise InputError(
                FIELD,
                f"{_quote(key)} is {_times(found)}, and this model's layer takes {_times(wanted)}: it was made for "
                "another kind of model",
            )
    return rank


class _Settings:
    """What peft's settings in the header of a file say about scales; most files have none."""

    def __init__(self, metadata: Mapping[str, str]) -> None:
        try:
            self._values = json.loads(metadata.get("lora_adapter_metadata") or "{}")
        except (ValueError, RecursionError) as error:
            raise InputError(FIELD, "has broken lora_adapter_metadata in its header") from error
        if not isinstance(self._values, dict):
            raise InputError(FIELD, "has broken lora_adapter_metadata in its header")
        self._patterns: dict[str, dict[str, tuple[int, Any]]] = {}

    def scale(self, part: str, name: str, rank: int) -> float:
        """The factor of the layer ``name``, as the file spells it."""
        if self._values.get(f"{part}.use_dora"):
            raise InputError(FIELD, "this kind of LoRA is not supported: DoRA")
        if part not in self._patterns:
            self._patterns[part] = self._read_patterns(part)
        patterns = self._patterns[part]
        words = name.split(".")
        ends = [f"^{name}", *(".".join(words[start:]) for start in range(len(words)))]
        _, alpha = min(
            (patterns[end] for end in ends if end in patterns),
            key=lambda found: found[0],
            default=(0, self._values.get(f"{part}.lora_alpha", rank)),
        )
        if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not abs(alpha) < MAX_ALPHA:
            raise InputError(FIELD, "has an alpha that is no number, or a huge one")
        return alpha / (math.sqrt(rank) if self._values.get(f"{part}.use_rslora") else rank)

    def _read_patterns(self, part: str) -> dict[str, tuple[int, Any]]:
        """The end of a name, or ^ and a whole one -> its place, because the first that fits counts, and its alpha."""
        patterns = self._values.get(f"{part}.alpha_pattern") or {}
        if not isinstance(patterns, dict):
            raise InputError(FIELD, "has an alpha_pattern that is no object")
        for pattern in patterns:
            # peft takes any regular expression. One from a stranger may take for ever, and names do for real files.
            if not re.fullmatch(r"\^?[\w.]+", pattern):
                raise InputError(FIELD, f"has a name in alpha_pattern that is not understood: {_quote(pattern)}")
        return {pattern: (place, alpha) for place, (pattern, alpha) in enumerate(patterns.items())}


def _number(file: Any, key: str) -> float:
    entry = file.get_slice(key)
    plain = math.prod(entry.get_shape()) == 1 and entry.get_dtype() in (*FLOATS, "I8", "I16", "I32", "I64", "U8")
    value: float = file.get_tensor(key).double().item() if plain else math.nan
    if not abs(value) < MAX_ALPHA:
        raise InputError(FIELD, f"{_quote(key)} is no number, or a huge one")
    return value


def _quote(key: str) -> str:
    return repr(key if len(key) <= 120 else f"{key[:117]}...")


def _times(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape)) or "a single number"


def fuse(network: nn.Module, part: str, adapter: Adapter, scale: float = 1.0) -> None:
    """Add ``adapter`` to the weights of ``network`` for good, computed in float32."""
    patches = adapter.parts.get(part, {})
    weights = {name: network.get_parameter(f"{name}.weight") for name in patches}
    with torch.no_grad():
        for name, weight in weights.items():
            patch = patches[name]
            change = patch.up[0].float() @ patch.down[0].float().flatten(1)
            weight.copy_(weight.float() + scale * patch.scales[0] * change.view_as(weight))


@contextmanager
def applied(network: nn.Module, part: str, adapters: Sequence[Adapter | None], scales: Tensor) -> Iterator[None]:
    """Inside the block each forward of ``network`` adds, for batch row i, ``scales[i]`` times ``adapters[i]``.

    Rows without an adapter are untouched to the last bit, and a scale of 0 changes nothing. A forward of k times as
    many rows takes the adapters k times over. After the block the network is as before, also after an exception. The
    modules themselves have to run: a compiled or captured graph of the network does not see what is done here, inside
    the block as outside. One block at a time for a network.

    Args:
        network: the one of the ``networks`` that the adapters were read for.
        part: its name there.
        adapters: (rows,) what each row gets, None for nothing.
        scales: (rows,) floating point, on the network's device.

    Raises:
        ValueError: there are more or fewer scales than adapters, or (from the forward) rows are left over.
    """
    if scales.shape != (len(adapters),):
        raise ValueError(f"{len(adapters)} adapters, but scales of shape {tuple(scales.shape)}")
    present = {adapter for adapter in adapters if adapter is not None and part in adapter.parts}
    distinct = tuple(sorted(present, key=lambda adapter: adapter.id))
    rows = _Rows([distinct.index(each) if each in present else None for each in adapters], scales)
    modules = _modules(network)
    handles = []
    try:
        for name, patch in _STACKS.get(part, distinct).items():
            handles.append(modules[name].register_forward_hook(partial(_add, rows, patch)))
        yield
    finally:
        for handle in handles:
            handle.remove()


_MODULES: weakref.WeakKeyDictionary[nn.Module, dict[str, nn.Module]] = weakref.WeakKeyDictionary()


def _modules(network: nn.Module) -> dict[str, nn.Module]:
    """All modules inside ``network``; to look for each of them in each step takes milliseconds."""
    if network not in _MODULES:
        _MODULES[network] = {name: each for name, each in network.named_modules() if each is not network}
    return _MODULES[network]


class _Rows:
    """Which rows of a forward have which adapter, and how much of it."""

    def __init__(self, slots: Sequence[int | None], scales: Tensor) -> None:
        self._count = len(slots)
        self._scales = scales
        self._used = [row for row, slot in enumerate(slots) if slot is not None]
        self._slots = [slot for slot in slots if slot is not None]
        self._kept: dict[tuple[Any, ...], Tensor] = {}

    def times(self, rows: int) -> int:
        """How many times over a forward of ``rows`` rows takes the adapters."""
        times, rest = divmod(rows, self._count)
        if rest:
            raise ValueError(f"a forward of {rows} rows, but adapters for {self._count}")
        return times

    def used(self, times: int) -> Tensor | None:
        """The rows that have an adapter; None for all of them."""
        if len(self._used) == self._count:
            return None
        if ("used", times) not in self._kept:
            rows = [start * self._count + row for start in range(times) for row in self._used]
            self._kept["used", times] = self._tensor(rows)
        return self._kept["used", times]

    def slots(self, times: int) -> Tensor:
        """Of each used row: which adapter of a stack it has."""
        if ("slots", times) not in self._kept:
            self._kept["slots", times] = self._tensor(self._slots * times)
        return self._kept["slots", times]

    def amounts(self, patch: Patch, times: int) -> Tensor:
        """Of each used row: how much of its adapter it gets, in the dtype of the adapter."""
        key = (patch.scales, times)
        if key not in self._kept:
            own = self._tensor([patch.scales[slot] for slot in self._slots], torch.float32)
            amounts = self._scales.index_select(0, self._tensor(self._used)) * own
            self._kept[key] = amounts.to(patch.down.dtype).repeat(times)
        return self._kept[key]

    def _tensor(self, values: Sequence[float], dtype: torch.dtype = torch.int64) -> Tensor:
        # From any other memory the host would wait for all that the device has yet to do.
        device = self._scales.device
        return torch.tensor(values, dtype=dtype, pin_memory=device.type == "cuda").to(device, non_blocking=True)


def _add(rows: _Rows, patch: Patch, module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
    """A forward hook: the output of a linear layer or convolution, with each row's own adapter."""
    (x,) = args
    times = rows.times(len(x))
    used = rows.used(times)
    if used is not None:
        x = x.index_select(0, used)
    amounts = rows.amounts(patch, times)
    # The amount comes in between, where there are the fewest numbers, and where 0 stays 0 even if up would overflow.
    if len(patch.down) == 1:
        down, up = patch.down[0], patch.up[0]
        if isinstance(module, nn.Conv2d):
            low = _convolve(module, x, down) * amounts[:, None, None, None]
            change = functional.conv2d(low, up[:, :, None, None])
        else:
            low = functional.linear(x, down) * amounts.view(-1, *(1 for _ in x.shape[1:]))
            change = functional.linear(low, up)
    else:
        slots = rows.slots(times)
        down, up = patch.down.index_select(0, slots), patch.up.index_select(0, slots)
        if isinstance(module, nn.Conv2d):
            # A batch of n pictures is one picture with n groups of channels; each group has its own weights.
            low = _convolve(module, x.flatten(0, 1)[None], down.flatten(0, 1), len(x))
            low = low.view(len(x), -1, *low.shape[2:])
            change = torch.bmm(up, low.flatten(2) * amounts[:, None, None]).view(len(x), -1, *low.shape[2:])
        else:
            low = torch.bmm(x.reshape(len(x), -1, x.shape[-1]), down.mT) * amounts[:, None, None]
            change = torch.bmm(low, up.mT).view(*x.shape[:-1], -1)
    # In place: a result with other strides would lead the layers behind it to other kernels, and other last bits.
    return output.add_(change) if used is None else output.index_add_(0, used, change)


def _convolve(module: nn.Conv2d, x: Tensor, weight: Tensor, groups: int = 1) -> Tensor:
    return functional.conv2d(x, weight, None, module.stride, module.padding, module.dilation, groups)


class _Stacks:
    """The stacks of the combinations of adapters that were used last: a combination comes back at each step.

    They are bounded by bytes, but the newest one is always kept. A single adapter needs none.
    """

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._bytes = 0
        self._lock = threading.RLock()  # an adapter may go while the lock is held
        self._kept: OrderedDict[tuple[Any, ...], Patches] = OrderedDict()

    def get(self, part: str, adapters: tuple[Adapter, ...]) -> Patches:
        if len(adapters) < 2:
            return adapters[0].parts[part] if adapters else {}
        # Not by their ids, which another model's adapters may have too, and not by strong references to them.
        key = (part, *(weakref.ref(adapter, self._forget) for adapter in adapters))
        with self._lock:
            if key in self._kept:
                self._kept.move_to_end(key)
                return self._kept[key]
            stack = self._kept[key] = _stack(part, adapters)
            self._bytes += _size(stack)
            while self._bytes > self._max_bytes and len(self._kept) > 1:
                self._bytes -= _size(self._kept.popitem(last=False)[1])
            return stack

    def _forget(self, gone: weakref.ref[Adapter]) -> None:
        """Drop the stacks of an adapter that nobody has any more: they would fill the device after its model."""
        with self._lock:
            for key in [key for key in self._kept if any(each is gone for each in key)]:
                self._bytes -= _size(self._kept.pop(key))


_STACKS = _Stacks(STACKED_BYTES)


def _stack(part: str, adapters: tuple[Adapter, ...]) -> Patches:
    """For each layer that one of the adapters addresses: all of them, padded with zeros to the largest rank."""
    stack: dict[str, Patch] = {}
    for name in dict.fromkeys(name for adapter in adapters for name in adapter.parts[part]):
        patches = [adapter.parts[part].get(name) for adapter in adapters]
        present = [patch for patch in patches if patch]
        rank = max(patch.down.shape[1] for patch in present)
        down = present[0].down.new_zeros(len(patches), rank, *present[0].down.shape[2:])
        up = present[0].up.new_zeros(len(patches), present[0].up.shape[1], rank)
        for slot, patch in enumerate(patches):
            if patch:
                own = patch.down.shape[1]
                down[slot, :own] = patch.down[0]
                up[slot, :, :own] = patch.up[0]
        stack[name] = Patch(down, up, tuple(patch.scales[0] if patch else 0.0 for patch in patches))
    return stack


def _size(patches: Patches) -> int:
    return sum(patch.down.nbytes + patch.up.nbytes for patch in patches.values())


class Adapters:
    """The adapters that were used last, bounded by bytes. Any thread may ask.

    Args:
        max_bytes: what all kept adapters may take on the device.
        counts: of look-ups; one that another is reading already is a hit.
    """

    def __init__(self, max_bytes: int, counts: Counts) -> None:
        self._max_bytes = max_bytes
        self._count = tally(counts, "lora")
        self._lock = threading.Lock()
        self._kept: OrderedDict[tuple[str, str], Adapter] = OrderedDict()
        self._reading: dict[tuple[str, str], Future[Adapter]] = {}

    def forget(self, model_key: str) -> None:
        """Drop the adapters of a model that is gone."""
        with self._lock:
            for key in [key for key in self._kept if key[1] == model_key]:
                del self._kept[key]

    def get(
        self,
        path: Path,
        id: str,
        model_key: str,
        networks: Mapping[str, nn.Module],
        device: torch.device | str,
        dtype: torch.dtype,
    ) -> Adapter:
        """The adapter ``id`` for the model ``model_key``; see ``read_adapter``. However many ask, one of them reads it.

        Raises:
            InputError: as ``read_adapter``, or the adapter alone is larger than all that may be kept.
        """
        key = (id, model_key)
        with self._lock:
            reading = self._reading.get(key)
            self._count("hit" if reading or key in self._kept else "miss")
            if key in self._kept:
                self._kept.move_to_end(key)
                return self._kept[key]
            if reading is None:
                mine = self._reading[key] = Future()
        if reading is not None:
            return reading.result()
        try:
            self._check(path.stat().st_size if path.is_file() else 0)  # before it fills the device
            adapter = read_adapter(path, networks, device, dtype, id)
            self._check(adapter.bytes)
        except BaseException as error:
            with self._lock:
                del self._reading[key]
            mine.set_exception(error)
            raise
        with self._lock:
            del self._reading[key]
            self._kept[key] = adapter
            while sum(kept.bytes for kept in self._kept.values()) > self._max_bytes:
                self._kept.popitem(last=False)
        mine.set_result(adapter)
        return adapter

    def _check(self, size: int) -> None:
        if size > self._max_bytes:
            raise InputError(FIELD, f"takes {size >> 20} MiB; at most {self._max_bytes >> 20} MiB are there for LoRAs")

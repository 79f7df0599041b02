"""A model's rows a step further, by the fastest way that takes them; knows no request and no queue.

Ways, each tested to make the same picture as the first:

* ``eager``: ``naive``, module by module. It takes everything, and is there as soon as the weights are.
* ``inductor``: the step over the slots, compiled as a whole. Compiled for the model's own size by ``tune``, and for
  other sizes once they are in demand.
* ``graph``: that, or the eager step, captured as a CUDA graph, for each bucket of rows once it is in demand.
* ``openvino``: the networks converted, by ``tune``, for every size; compiled anew for a size in demand, where they are
  small.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import torch

from lcm_rt.cache import Counts
from lcm_rt.engine import naive
from lcm_rt.engine.graphs import Graphs, bucket_of
from lcm_rt.engine.inductor import Inductor, Step
from lcm_rt.engine.models import Model
from lcm_rt.engine.networks import Eager, Networks
from lcm_rt.engine.openvino import OpenVino
from lcm_rt.engine.slots import COUNT, Advance, Slots
from lcm_rt.engine.trajectory import Trajectory

Backend = Literal["eager", "inductor", "openvino"]

SIZES = 8
"""Sizes of latents that have slots at a time; those longest unused make room."""

FIXED_SIZES = 2
"""Sizes for which OpenVINO's programs are compiled anew: each set of the embedded model's takes 200 MB."""

DEMAND = 40
"""Steps at a size before it is compiled: ten pictures are no chance."""

Size = tuple[int, int]


class Runner:
    """Steps rows of ``model``, and runs its other ``networks``.

    Args:
        backend: what ``tune`` makes; until then, and for what it does not take, the eager way answers.
        folder: where OpenVINO's networks are kept. fingerprint: of the weights.
        threads: of the CPU's arithmetic, None for OpenVINO's choice.
        counts: forwards are counted here, as ("forward", way).
    """

    def __init__(
        self,
        model: Model,
        backend: Backend,
        *,
        folder: Path | None,
        fingerprint: str,
        threads: int | None,
        counts: Counts,
    ) -> None:
        self._model = model
        self._backend = backend
        self._folder = folder
        self._fingerprint = fingerprint
        self._threads = threads
        self._own_threads = torch.get_num_threads()
        self._counts = counts
        self._eager = Eager(model)
        self.networks: Networks = self._eager
        """The fastest text encoders and VAE that there are by now."""
        self._inductor: Inductor | None = None
        self._step: Step | None = None  # over slots; without one, rows go the naive way
        self._slots: OrderedDict[Size, Slots] = OrderedDict()
        self._graphs: dict[Size, Graphs] = {}
        self._on_gpu = model.device.type == "cuda"
        self._pool: Any = torch.cuda.graph_pool_handle() if self._on_gpu else None
        self._asked: Counter[Size] = Counter()
        self._tuned: set[Size] = set()
        if self._on_gpu and backend == "inductor":
            self._step = self._advance(self._eager)  # graphs of this one serve until the compiled one is there

    def _advance(self, networks: Networks) -> Advance:
        model = self._model
        return Advance(networks.predict, model.schedule, model.dtype, guided=model.guidance_dim is None)

    def tune(self, size: Size, report: Callable[[float], None]) -> None:
        """Make the fast ways for latents of ``size``; from another thread than the steps', who go on meanwhile."""
        if self._backend == "openvino" and isinstance(self.networks, OpenVino):
            self._tuned.add(size)
            self.networks.fix(*size)
        elif self._backend == "openvino":
            networks = OpenVino(self._model, self._folder, self._fingerprint, threads=self._threads, report=report)
            self.networks = networks  # first: it says which sizes the step takes
            self._step = self._advance(networks)
        elif self._backend == "inductor":
            self._tuned.add(size)
            if self._inductor is None:
                self._inductor = Inductor(self._model, self._advance(self._eager))
            self._inductor.compile(Slots(self._model, *size), *size, report)
            self.networks = self._inductor

    def wanted(self) -> Size | None:
        """A size that is in demand and is not tuned."""
        if self._backend == "eager" or len(self._tuned) >= (FIXED_SIZES if self._backend == "openvino" else SIZES):
            return None
        if self._backend == "openvino" and not isinstance(self.networks, OpenVino):
            return None
        for size, times in self._asked.items():
            taken = self._backend != "openvino" or self.networks.takes(*size)
            if times >= DEMAND and size not in self._tuned and taken:
                return size
        return None

    def step(self, rows: Sequence[Trajectory]) -> None:
        """One step for rows of one bucket; on an exception each row has either had it or not changed."""
        size = (rows[0].bucket.height, rows[0].bucket.width)
        self._asked[size] += 1
        quick: list[Trajectory] = []
        if step := self._step_for(size):
            slots = self._slots_for(size)
            quick = [row for row in rows if row.adapter is None and row.control is None and slots.take(row)]
        slow = [row for row in rows if row not in quick]
        if self._backend == "openvino":
            # Beside OpenVINO's threads, torch's get in the way of what little it has to do there.
            torch.set_num_threads(self._own_threads if slow else 1)
        after = naive.step(self._model, self._eager, slow) if slow else []
        if quick and step:
            self._step_in_slots(quick, size, slots, step)
        for row, (latents, denoised) in zip(slow, after, strict=True):
            row.slot = None
            row.advance(latents, denoised)
        if slow:
            self._counts["forward", "eager"] += 1

    def _step_in_slots(self, rows: Sequence[Trajectory], size: Size, slots: Slots, step: Step) -> None:
        for some in _chunks(rows):
            inputs = len(some) + sum(row.negative is not None for row in some)
            if self._on_gpu:
                graphs = self._graphs.get(size)
                if graphs is None or graphs.step is not step:
                    graphs = self._graphs[size] = Graphs(step, slots, self._pool)
                was_graph = graphs.run(slots.places(some, bucket_of(inputs)))
                way = "graph" if was_graph else self._backend
            else:
                step(slots.state, slots.places(some, inputs))
                way = self._backend
            self._counts["forward", way] += 1
            for row in some:
                assert row.slot is not None
                row.advance(row.latents, slots.state.denoised[row.slot.number])
                if row.done:
                    slots.leave(row)

    def capture(self) -> None:
        """Between steps: capture one CUDA graph, if one is in demand."""
        for graphs in self._graphs.values():
            if graphs.capture_one():
                return

    def _step_for(self, size: Size) -> Step | None:
        if self._inductor is not None and self._inductor.takes(*size):
            return self._inductor.advance
        return self._step if self._on_gpu or self.networks.takes(*size) else None

    def _slots_for(self, size: Size) -> Slots:
        slots = self._slots.get(size)
        if slots is None:
            slots = self._slots[size] = Slots(self._model, *size)
            while len(self._slots) > SIZES:
                gone, _ = self._slots.popitem(last=False)
                self._graphs.pop(gone, None)
        self._slots.move_to_end(size)
        return slots


def _chunks(rows: Sequence[Trajectory]) -> list[list[Trajectory]]:
    """Rows in forwards of at most ``COUNT`` inputs; guided ones have two."""
    chunks: list[list[Trajectory]] = [[]]
    room = COUNT
    for row in rows:
        inputs = 1 if row.negative is None else 2
        if inputs > room:
            chunks.append([])
            room = COUNT
        chunks[-1].append(row)
        room -= inputs
    return chunks

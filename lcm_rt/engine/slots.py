"""Static tensors for the rows of one size, and the step that a compiler or a CUDA graph can take as a whole.

A row enters a slot once and stays there until it is done: between its steps nothing of it is copied. What differs from
step to step, which rows step and where each of them is on its way, is one small tensor of integers (``Places``), so
that the host sends one thing to the device, starts one thing, and waits for nothing.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lcm_rt.engine import sampling
from lcm_rt.engine.models import Model
from lcm_rt.engine.sampling import Schedule
from lcm_rt.engine.trajectory import Slot, Trajectory

COUNT = 16
"""Rows of one forward: the knee of SD1.5 at 512x512 on an H200 (benchmarks/gpu.py)."""

WINDOW = 8
"""Steps of which a slot holds the noise and the numbers; a row with more gets the next ones when it is there."""


class State(NamedTuple):
    """All slots; each tensor has ``COUNT`` + 1 rows, and the last is nobody's: what only fills a forward goes there."""

    latents: Tensor  # (N, C, H, W), float32, as those below but for context, pooled and what is said
    denoised: Tensor  # (N, C, H, W)
    noises: Tensor  # (N, WINDOW, C, H, W)
    timesteps: Tensor  # (N, WINDOW), int64
    coefficients: Tensor  # (N, WINDOW, 8)
    context: Tensor  # (N, 2, tokens, width): with the prompt, and without it
    pooled: Tensor | None  # (N, 2, width)
    size_ids: Tensor | None  # (N, 6)
    embedding: Tensor | None  # (N, time_cond_proj_dim)
    guidance: Tensor  # (N,)
    surroundings: Tensor | None  # (N, 1 + C, H, W)
    known: Tensor  # (N, C, H, W)
    known_noise: Tensor  # (N, C, H, W)
    mask: Tensor  # (N, 1, H, W), 1 where nothing is kept


PLACES = 7
"""Rows of ``places`` (PLACES, E) int64, for a forward of E inputs: of each input its slot, whether it is the one
without the prompt (0, 1), and its step within the window; of each row its slot, its step, and its two inputs."""


class Slots:
    """The slots of one model at one size of latents."""

    def __init__(self, model: Model, height: int, width: int) -> None:
        n, c, device = COUNT + 1, model.latent_channels, model.device

        def room(*shape: int, dtype: torch.dtype = torch.float32, value: float = 0.0) -> Tensor:
            return torch.full((n, *shape), value, dtype=dtype, device=device)

        pooled = model.pooled_width
        self.state = State(
            latents=room(c, height, width),
            denoised=room(c, height, width),
            noises=room(WINDOW, c, height, width),
            timesteps=room(WINDOW, dtype=torch.int64),
            coefficients=room(WINDOW, 8, value=1.0),  # noughts would make numbers that are none, in nobody's slot
            context=room(2, model.max_tokens, model.context_width, dtype=model.dtype),
            pooled=None if pooled is None else room(2, pooled, dtype=model.dtype),
            size_ids=None if pooled is None else room(6, dtype=model.dtype),
            embedding=None if model.guidance_dim is None else room(model.guidance_dim, dtype=model.dtype),
            guidance=room(value=1.0),
            surroundings=room(1 + c, height, width, dtype=model.dtype) if model.takes_mask else None,
            known=room(c, height, width),
            known_noise=room(c, height, width),
            mask=room(1, height, width, value=1.0),
        )
        self.device = device
        self._rows: list[weakref.ref[Trajectory] | None] = [None] * COUNT
        self._masked = [False] * COUNT

    def take(self, row: Trajectory) -> bool:
        """Have ``row`` in a slot, with what its next step needs; False if all are taken."""
        if row.slot is None or row.slot.home is not self:
            number = next((i for i in range(COUNT) if self._is_free(i)), None)
            if number is None:
                return False
            self._fill(number, row)
        elif row.index % WINDOW == 0:
            self._fill_window(row.slot.number, row)
        return True

    def _is_free(self, number: int) -> bool:
        reference = self._rows[number]
        row = None if reference is None else reference()
        # A row that was dropped is gone, and one that went another way meanwhile has left.
        return row is None or row.slot is None or row.slot.home is not self or row.slot.number != number

    def _fill(self, number: int, row: Trajectory) -> None:
        state = self.state
        state.latents[number] = row.latents
        state.context[number, 0] = row.prompt.context
        if state.pooled is not None and row.prompt.pooled is not None:
            state.pooled[number, 0] = row.prompt.pooled
        if row.negative is not None:
            state.context[number, 1] = row.negative.context
            state.guidance[number] = row.guidance
            if state.pooled is not None and row.negative.pooled is not None:
                state.pooled[number, 1] = row.negative.pooled
        for room, value in (
            (state.size_ids, row.size_ids),
            (state.embedding, row.guidance_embedding),
            (state.surroundings, row.surroundings),
        ):
            if room is not None and value is not None:
                room[number] = value
        if row.known is not None:
            state.known[number] = row.known.latents
            state.known_noise[number] = row.known.noise
            state.mask[number] = row.known.mask
            self._masked[number] = True
        elif self._masked[number]:  # by the one before
            state.mask[number] = 1.0
            self._masked[number] = False
        self._fill_window(number, row)
        row.latents = state.latents[number]
        row.slot = Slot(self, number)
        self._rows[number] = weakref.ref(row)

    def _fill_window(self, number: int, row: Trajectory) -> None:
        begin = row.index // WINDOW * WINDOW
        end = min(row.steps, begin + WINDOW)
        state = self.state
        state.noises[number, : end - begin] = row.noises[begin:end]
        state.timesteps[number, : end - begin] = row.timesteps[begin:end]
        state.coefficients[number, : end - begin] = row.coefficients[begin:end]

    def leave(self, row: Trajectory) -> None:
        """Give back the slot of a row; what it has come to is its own from here on."""
        row.latents = row.latents.clone()
        row.denoised = None if row.denoised is None else row.denoised.clone()
        row.slot = None

    def places(self, rows: Sequence[Trajectory], inputs: int) -> Tensor:
        """Where in the slots ``rows``, which are all in one, step next; ``inputs`` of the forward, at least theirs."""
        numbers = [row.slot.number for row in rows if row.slot is not None]
        steps = [row.index % WINDOW for row in rows]
        guided = [i for i, row in enumerate(rows) if row.negative is not None]
        without = list(range(len(rows)))
        for place, i in enumerate(guided, len(rows)):
            without[i] = place
        idle = inputs - len(rows) - len(guided)
        spare = inputs - len(rows)
        table = [
            [*numbers, *(numbers[i] for i in guided), *[COUNT] * idle],
            [*[0] * len(rows), *[1] * len(guided), *[0] * idle],
            [*steps, *(steps[i] for i in guided), *[0] * idle],
            [*numbers, *[COUNT] * spare],
            [*steps, *[0] * spare],
            [*range(len(rows)), *[0] * spare],
            [*without, *[0] * spare],
        ]
        # From any other memory the host would wait for all that the device has yet to do.
        pinned = self.device.type == "cuda"
        return torch.tensor(table, dtype=torch.int64, pin_memory=pinned).to(self.device, non_blocking=True)

    def nowhere(self, inputs: int) -> Tensor:
        """Places of a forward that steps nobody, to be run before anybody waits for it."""
        places = torch.zeros(PLACES, inputs, dtype=torch.int64, device=self.device)
        places[0] = places[3] = COUNT
        return places


Predict = Callable[[Tensor, Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None], Tensor]


class Advance:
    """One step of the rows at ``places``, in place: the UNet and the consistency model's rule after it.

    No number comes back to the host, and nothing depends on one: it can be compiled, or captured, as a whole.
    """

    def __init__(self, predict: Predict, schedule: Schedule, dtype: torch.dtype, *, guided: bool) -> None:
        self._predict = predict
        self._schedule = schedule
        self._dtype = dtype
        self._guided = guided  # rows may have an input without their prompt

    def __call__(self, state: State, places: Tensor) -> None:
        slot, side, step, row, row_step, prompted, unprompted = places.unbind(0)
        x = state.latents.index_select(0, slot).to(self._dtype)
        if state.surroundings is not None:
            x = torch.cat([x, state.surroundings.index_select(0, slot)], dim=1)
        output = self._predict(
            x,
            state.timesteps[slot, step],
            state.context[slot, side],
            None if state.embedding is None else state.embedding.index_select(0, slot),
            None if state.pooled is None else state.pooled[slot, side],
            None if state.size_ids is None else state.size_ids.index_select(0, slot),
        )
        if self._guided:
            scale = state.guidance.index_select(0, row)[:, None, None, None]
            without = output.index_select(0, unprompted)
            output = sampling.guide(output.index_select(0, prompted), without, scale)
        latents, c = state.latents.index_select(0, row), state.coefficients[row, row_step]
        denoised = sampling.denoise(latents, output, c, self._schedule)
        after = sampling.renoise(latents, denoised, c, state.noises[row, row_step], self._schedule)
        mask, known, noise = (of.index_select(0, row) for of in (state.mask, state.known, state.known_noise))
        after = sampling.keep_outside(after, mask, known, noise, c)
        state.latents.index_copy_(0, row, after)
        state.denoised.index_copy_(0, row, denoised)

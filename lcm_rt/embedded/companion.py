"""How a companion of the finished model is taught: scenes drawn on the way, a course, the loop.

A companion is a small network that goes with the UNet, which stays as it is. Knows nothing of what it is for.
"""

from __future__ import annotations

import logging
import random
import time
from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
import torch.nn.functional as F
from rich.progress import track
from torch import Tensor, nn

from lcm_rt.embedded import scenes
from lcm_rt.embedded.muon import Muon
from lcm_rt.embedded.networks import Finished, lcm_times, new_scheduler, tokenize
from lcm_rt.embedded.plan import RANK, TEACHER, WORLD, Plan, agree, rate, save, share

logger = logging.getLogger(__name__)

PAGE = 8  # scenes drawn together
POOL = 1024

Page = dict[str, Tensor]
"""A batch of scenes.

``z`` (B, 4, 8, 8), ``said`` (B, attributes) and ``focus`` (B, 1, 32, 32) are those of ``scenes``. The others are
latents, (B, 4, 32, 32) float32: ``latent`` is the picture that is wanted, ``stale`` one that image-to-image may start
from instead, ``known`` what is put back after each step where ``mask`` (B, 1, 32, 32) is 0.
"""

Forward = Callable[[Tensor, Tensor, Tensor, Page, float], Tensor]
"""(noisy latents, timesteps, words (B, 77, 128), page, how much of the companion: 1 or 0) -> predicted velocity."""


class Pool(ABC):
    """The scenes drawn lately: a ring that turns while training picks from it."""

    STALE: int
    """The timestep from which on ``stale`` pictures are shown."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.begin(0)

    def begin(self, turn: int) -> None:
        """Begin anew with the scenes of this turn and those after it."""
        self.rng = random.Random(f"pool-{self.seed}-{turn}")
        self.turns = turn
        self.pages: Page = {}

    @abstractmethod
    def draw(self) -> Page:
        """The next few scenes, ``PAGE`` of them, as they are kept."""

    @abstractmethod
    def words(self, page: Page) -> list[str]:
        """A prompt for each scene."""

    def turn(self) -> None:
        """Draw a few more scenes; the oldest go."""
        page = self.draw()
        if not self.pages or len(self.pages["z"]) < POOL:
            self.pages = {k: torch.cat((self.pages[k], v)) if self.pages else v for k, v in page.items()}
        else:
            first = self.turns * PAGE % POOL
            for key, value in page.items():
                self.pages[key][first : first + PAGE] = value
        self.turns += 1

    def pick(self, count: int) -> Page:
        index = torch.tensor(self.rng.choices(range(len(self.pages["z"])), k=count))
        return {key: value[index] for key, value in self.pages.items()}


class Course:
    """What a companion sees: batches of (noisy latents, timesteps, page).

    Rows of three kinds, as in the UNet's course. *First* rows are pure noise; where the mask is 1 its layout is the
    scene's, elsewhere it is any, for a picture that is kept obeys no noise. *Chain* rows walk down an LCM schedule on
    the model's own predictions, the known latents put back after each step. *Free* rows are re-noised at any level;
    half of them, if noisy enough, hold the stale picture.
    """

    def __init__(self, pool: Pool, seed: int, batch: int) -> None:
        self.pool, self.alphas = pool, new_scheduler().alphas_cumprod
        self.generator = torch.Generator().manual_seed(seed)
        self.rng = random.Random(seed)
        self.first = batch * 5 // 16
        self.chain = batch * 7 // 16
        self.free = batch - self.first - self.chain
        self.walks: list[list[int]] = [[] for _ in range(self.chain)]
        self.pages: Page = {}
        self.state = torch.empty(0)

    def _randn(self, n: int) -> Tensor:
        return torch.randn(n, 4, scenes.LATENT, scenes.LATENT, generator=self.generator)

    def _first_noise(self, page: Page) -> Tensor:
        noise = self._randn(len(page["z"]))
        anew = F.avg_pool2d(page["mask"], scenes.BLOCK) > 0.5
        return scenes.couple(noise, torch.where(anew, page["z"], scenes.project(noise)))

    def _noised(self, latent: Tensor, t: Tensor) -> Tensor:
        a = self.alphas[t][:, None, None, None]
        noised: Tensor = a.sqrt() * latent + (1 - a).sqrt() * self._randn(len(latent))
        return noised

    def next(self) -> tuple[Tensor, Tensor, Page]:
        page = self.pool.pick(self.first)
        parts = [(self._first_noise(page), torch.full((self.first,), 999), page)]
        # Chain.
        fresh = [i for i, walk in enumerate(self.walks) if not walk]
        if fresh:
            page = self.pool.pick(len(fresh))
            if not self.pages:
                self.pages, self.state = {k: v.clone() for k, v in page.items()}, page["latent"].clone()
            for key, value in page.items():
                self.pages[key][fresh] = value
            self.state[fresh] = page["latent"]
        for i in fresh:
            self.walks[i] = lcm_times(self.rng.choice((2, 4, 4, 4, 4, 8)))
        t = torch.tensor([walk.pop(0) for walk in self.walks])
        true = torch.rand(self.chain, generator=self.generator) < TEACHER
        state = torch.where(true[:, None, None, None], self.pages["latent"], self.state)
        begins = (t == 999)[:, None, None, None]
        x = torch.where(begins, self._first_noise(self.pages), self._noised(state, t))
        parts.append((x, t, {k: v.clone() for k, v in self.pages.items()}))
        # Free.
        page = self.pool.pick(self.free)
        t = torch.randint(1, 50, (self.free,), generator=self.generator) * 20 - 1
        stale = (torch.arange(self.free) % 2 == 0) & (t > self.pool.STALE)
        start = torch.where(stale[:, None, None, None], page["stale"], page["latent"])
        parts.append((self._noised(start, t), t, page))
        x, t = torch.cat([x for x, _, _ in parts]), torch.cat([t for _, t, _ in parts])
        return x, t, {key: torch.cat([part[2][key] for part in parts]) for key in page}

    def learn(self, predicted: Tensor) -> None:
        """Take the batch's predicted clean latents; the chain walks on with them."""
        mine = predicted[self.first : self.first + self.chain]
        self.state = torch.lerp(self.pages["known"], mine, self.pages["mask"])

    def split(self, rows: Tensor) -> dict[str, Tensor]:
        """A batch's rows by their kind."""
        parts = torch.split(rows, [self.first, self.chain, self.free])
        return dict(zip(("first", "chain", "free"), parts, strict=True))


def teach(
    plan: Plan, name: str, steps: int, peak: float, model: nn.Module, forward: Forward, pool: Pool, finished: Finished
) -> None:
    """Train what requires a gradient in ``model``, by the UNet's own loss; leave the average of it there.

    A checkpoint, ``NAME.pt`` in the plan's work folder, is written every minute and at the end.

    Args:
        peak: the highest learning rate.
        forward: of the UNet together with its companion.
    """
    path = plan.work / f"{name}.pt"
    weights = {key: p for key, p in model.named_parameters() if p.requires_grad}
    optimizer = Muon(model, peak)
    first, seen = 0, 0
    share(model)
    average = {key: p.detach().clone() for key, p in weights.items()}
    if path.exists():
        state = torch.load(path)
        optimizer.load_state_dict(state["optimizer"])
        first, seen = state["step"], state["seen"]
        with torch.no_grad():
            for key, p in weights.items():
                p.copy_(state["model"][key])
                average[key].copy_(state["average"][key])
    logger.info("%s: %d parameters, from step %d", name, sum(p.numel() for p in weights.values()), first)
    if first < steps:
        pool.begin(first)
        for _ in range(256 // PAGE):
            pool.turn()
    course = Course(pool, plan.seed + first + 1000 * RANK, plan.batch // WORLD)
    bf16 = torch.autocast(plan.device.type, torch.bfloat16)
    running: dict[str, float] = {}
    began = saved = time.monotonic()
    for step in track(range(first, steps), name):
        pool.turn()
        x, t, page = course.next()
        with torch.no_grad():
            ids = tokenize(finished.tokenizer, pool.words(page))
            context = finished.text(ids.to(plan.device)).last_hidden_state
        a = course.alphas[t][:, None, None, None].to(plan.device)
        t, page = t.to(plan.device), {key: value.to(plan.device) for key, value in page.items()}
        x = x.to(plan.device, memory_format=torch.channels_last)
        target = (a.sqrt() * x - page["latent"]) / (1 - a).sqrt()
        # What is known is put back after each step, but to predict it keeps the network honest.
        weight = (1 + 4 * page["focus"]) * (0.2 + 0.8 * page["mask"])
        weight = weight / weight.mean((1, 2, 3), keepdim=True)
        with bf16:
            v = forward(x, t, context, page, 1.0).float()
        each = ((v - target).square() * weight).mean((1, 2, 3))
        # At low noise the v-loss would count the picture's error many times over; its top is cut.
        loss = (each * (5 * (1 - a.flatten())).clamp(max=1)).mean()
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        agree(model)
        nn.utils.clip_grad_norm_(weights.values(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = rate(step, steps, group["peak"])
        optimizer.step()
        seen += plan.batch
        course.learn((a.sqrt() * x - (1 - a).sqrt() * v).detach().cpu())
        with torch.no_grad():
            torch._foreach_lerp_(
                list(average.values()), list(weights.values()), 1 - min(0.998, (1 + step) / (10 + step))
            )
        errors = {"with": each.detach()}
        if step % 10 == 0:
            with torch.no_grad(), bf16:
                plain = forward(x, t, context, page, 0.0).float()
            errors["without"] = ((plain - target).square() * weight).mean((1, 2, 3))
        for kind, rows in errors.items():
            keep = 0.98 if kind == "with" else 0.8
            for part, picture in course.split(rows * (1 - a.flatten())).items():
                value = picture.mean().item()
                running[f"{part} {kind}"] = keep * running.get(f"{part} {kind}", value) + (1 - keep) * value
        if step % 50 == 0:
            pace = (step - first + 1) * plan.batch / (time.monotonic() - began)
            found = " ".join(f"{key} {value:.4f}" for key, value in sorted(running.items()))
            logger.info("%s %d seen %d scenes %d %.1f/s %s", name, step, seen, pool.turns * PAGE, pace, found)
        if time.monotonic() - saved > 60 or step + 1 == steps:
            saved = time.monotonic()
            state = {"model": weights, "average": average, "optimizer": optimizer.state_dict()}
            save({**state, "step": step + 1, "seen": seen}, path)
    with torch.no_grad():
        for key, p in weights.items():
            p.copy_(average[key])

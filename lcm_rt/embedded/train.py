"""Train the embedded model from nothing: autoencoder, text encoder, scenes, UNet, export; then its companions.

``python -m lcm_rt.embedded.train`` does all of it; every stage leaves a file in ``--work`` and is skipped or
resumed when that file is there. The companions (a ControlNet, a LoRA) need the exported folder and nothing else.
Knows the drawings of ``scenes`` and the diffusers folder format; knows nothing of the server.
"""

from __future__ import annotations

import argparse
import copy
import json
import logging
import math
import os
import random
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from diffusers import AutoencoderTiny, UNet2DConditionModel
from rich.progress import track
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTokenizer

from lcm_rt.embedded import MODEL_DIR, scenes
from lcm_rt.embedded.controlnet import train_controlnet
from lcm_rt.embedded.lora import train_lora
from lcm_rt.embedded.muon import Muon
from lcm_rt.embedded.networks import (
    CONTEXT,
    TOKENS,
    lcm_times,
    load_autoencoder,
    load_text,
    new_autoencoder,
    new_scheduler,
    new_text_encoder,
    new_unet,
    tokenize,
)
from lcm_rt.embedded.plan import (
    RANK,
    TEACHER,
    WORLD,
    Plan,
    agree,
    from_bytes,
    rate,
    save,
    save_grid,
    scene_batch,
    share,
    to_bytes,
)

logger = logging.getLogger(__name__)

SHARD = 512


# Autoencoder


@torch.no_grad()
def begin_as_thumbnail(model: AutoencoderTiny, pictures: Tensor) -> None:
    """Set the weights so that three latents are the whitened colours of an 8x8 cell, enlarged by the decoder.

    A network without normalisation is slow to find even this much; from here it only adds detail. The latents
    also begin with zero mean and unit spread, as pipelines that know a scaling factor but no shift want them.
    """
    colours = F.avg_pool2d(from_bytes(pictures[::4]), 8).add(1).div(2).permute(1, 0, 2, 3).flatten(1)
    mean = colours.mean(1)
    values, vectors = torch.linalg.eigh(torch.cov(colours))
    whiten, colour = vectors.T / values.sqrt()[:, None], vectors * values.sqrt()
    box = torch.tensor([0.0, 0.5, 0.5])  # stride 2, padding 1: the mean of two pixels
    tent = torch.tensor([0.25, 0.5, 0.25])  # after nearest upsampling: linear interpolation
    dot = torch.tensor([0.0, 1.0, 0.0])
    for part in (model.encoder, model.decoder):
        convs = [layer for layer in part.layers if isinstance(layer, nn.Conv2d)]
        for block in part.layers:
            if not isinstance(block, (nn.Conv2d, nn.ReLU, nn.Upsample)):
                block.conv[-1].weight.zero_()
                block.conv[-1].bias.zero_()
        for i, conv in enumerate(convs):
            kernel = dot
            if 0 < i < len(convs) - 1:
                kernel = box if part is model.encoder else tent
            wiring, bias = torch.eye(3), torch.zeros(3)
            if i == (len(convs) - 1 if part is model.encoder else 0):
                wiring = whiten if part is model.encoder else colour
                bias = -whiten @ mean if part is model.encoder else mean
            if conv.bias is not None:
                conv.bias[:3] = bias
            conv.weight[:3] = 0
            conv.weight[:3, :3] = wiring[:, :, None, None] * kernel[:, None] * kernel


def edges(x: Tensor) -> tuple[Tensor, Tensor]:
    return x[..., 1:] - x[..., :-1], x[..., 1:, :] - x[..., :-1, :]


def train_autoencoder(plan: Plan) -> None:
    """Learn latents of 8x8 cells on random crops by L1 plus edges; they keep zero mean and unit spread."""
    path = plan.work / "autoencoder.pt"
    if path.exists():
        return
    torch.manual_seed(plan.seed)
    pool = []
    for i in track(range(RANK, 64, WORLD), "drawing for the autoencoder"):
        said, z, _ = scene_batch(plan.seed + 1, i * 32, 32)
        pen = torch.Generator().manual_seed(i) if i % 8 > 5 else None
        pool.append(to_bytes(scenes.draw(scenes.resolve(said, z), z, sketch=pen).image))
    pictures = torch.cat(pool)
    model = new_autoencoder().to(plan.device, memory_format=torch.channels_last)
    begin_as_thumbnail(model, pictures)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0, betas=(0.9, 0.98), weight_decay=1e-4)
    crop, batch, first = 128, 8, 0
    part = plan.work / "autoencoder-part.pt"
    if part.exists():
        state = torch.load(part)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        first = state["step"]
    share(model)
    torch.manual_seed(plan.seed + first + 1000 * RANK)
    for step in track(range(first, plan.autoencoder_steps), "autoencoder"):
        x = torch.empty(batch, 3, crop, crop)
        for row, i in enumerate(torch.randint(len(pictures), (batch,)).tolist()):
            top, left = torch.randint((scenes.SIZE - crop) // 8 + 1, (2,)).mul(8).tolist()
            x[row] = from_bytes(pictures[i, :, top : top + crop, left : left + crop])
        x = x.to(plan.device, memory_format=torch.channels_last)
        latent = model.encoder(x)
        mean, std = latent.mean((0, 2, 3)), latent.std((0, 2, 3))
        # Noise teaches the decoder to live with a denoiser's small errors.
        y = model.decoder(latent + 0.08 * torch.randn_like(latent))
        loss = F.l1_loss(y, x) + sum(F.l1_loss(a, b) for a, b in zip(edges(y), edges(x), strict=True))
        loss = loss + 0.25 * F.mse_loss(y, x) + 0.3 * (mean.square().mean() + (std - 1).square().mean())
        for group in optimizer.param_groups:
            group["lr"] = rate(step, plan.autoencoder_steps, 2e-3)
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        agree(model)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 100 == 0 or step + 1 == plan.autoencoder_steps:
            quality = -10 * math.log10(F.mse_loss(y.clamp(-1, 1), x).item() / 4)
            logger.info(
                "autoencoder %d loss %.4f psnr %.1f dB std %.2f",
                step,
                loss.item(),
                quality,
                std.mean().item(),
            )
        if step % 250 == 249:
            save({"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step + 1}, part)
    with torch.no_grad():
        sample = torch.cat([model.encoder(from_bytes(p).to(plan.device)) for p in torch.split(pictures[:512], 32)])
        mean, std = sample.mean((0, 2, 3)), sample.std((0, 2, 3))
        logger.info("latent mean %s std %s", mean.tolist(), std.tolist())
    save(model.state_dict(), path)


# Text


def words() -> list[str]:
    """Captions that hold every phrase often enough for a byte-pair encoder to learn whole words."""
    rng = random.Random(0)
    said = [scenes.speak(rng) for _ in range(20_000)]
    return [scenes.caption(row, rng) for row in said] + [
        *scenes.OPENINGS,
        *scenes.CLOSINGS,
        *scenes.UNKNOWN,
    ] * 40


def train_tokenizer(folder: Path) -> CLIPTokenizer:
    """CLIP's byte-level tokenizer over our few words: any text encodes, known words are one token each."""
    letters = list(bytes_to_unicode().values())
    symbols = [*letters, *(c + "</w>" for c in letters)]
    special = ["<|startoftext|>", "<|endoftext|>"]
    vocab = {token: i for i, token in enumerate([*symbols, *special])}
    draft = CLIPTokenizer(vocab=vocab, merges=[]).train_new_from_iterator(words(), 1400, show_progress=False)
    # The trainer forgets letters it never met; keep its merges and put every byte back.
    merges = json.loads(draft.backend_tokenizer.to_str())["model"]["merges"]
    tokens = dict.fromkeys([*symbols, *(a + b for a, b in merges), *special])
    vocab = {token: i for i, token in enumerate(tokens)}
    tokenizer = CLIPTokenizer(vocab=vocab, merges=[tuple(m) for m in merges], model_max_length=TOKENS)
    tokenizer.save_pretrained(folder)
    return tokenizer


def bytes_to_unicode() -> dict[int, str]:
    """GPT-2's printable stand-in for every byte."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [b for b in range(256) if b not in plain]
    return {b: chr(b) for b in plain} | {b: chr(256 + i) for i, b in enumerate(rest)}


def train_text(plan: Plan) -> None:
    """Teach the text encoder to name what a caption says, from every position after its end.

    Padding positions count too: cross-attention that averages over all 77 then reads a pooled summary.
    """
    path = plan.work / "text.pt"
    if path.exists():
        return
    torch.manual_seed(plan.seed)
    rng = plan.rng("text")
    tokenizer = train_tokenizer(plan.work / "tokenizer")
    model = new_text_encoder(tokenizer).to(plan.device)
    heads = nn.Linear(CONTEXT, sum(map(len, scenes.ATTRIBUTES.values()))).to(plan.device)
    optimizer = torch.optim.AdamW([*model.parameters(), *heads.parameters()], lr=0, weight_decay=0.01)
    sizes = [len(values) for values in scenes.ATTRIBUTES.values()]
    for step in track(range(plan.text_steps), "text encoder"):
        said = [scenes.speak(rng) for _ in range(64)]
        ids = tokenize(tokenizer, [scenes.caption(row, rng) for row in said]).to(plan.device)
        truth = torch.tensor(said, device=plan.device)
        ended = (ids == tokenizer.eos_token_id).float()
        logits = heads(model(ids).last_hidden_state).split(sizes, dim=-1)
        loss, wrong = torch.zeros((), device=plan.device), torch.zeros_like(ended, dtype=torch.bool)
        for i, part in enumerate(logits):
            target = truth[:, i, None].expand(-1, TOKENS)
            each = F.cross_entropy(part.transpose(1, 2), target, reduction="none")
            loss = loss + (each * ended).sum() / ended.sum()
            wrong |= part.argmax(-1) != target
        for group in optimizer.param_groups:
            group["lr"] = rate(step, plan.text_steps, 2e-3)
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 50 == 0 or step + 1 == plan.text_steps:
            right = 1 - (wrong.float() * ended).sum() / ended.sum()
            logger.info("text %d loss %.4f captions read right %.3f", step, loss.item(), right.item())
    save({"model": model.state_dict(), "heads": heads.state_dict()}, path)


# Render


def train_render(plan: Plan) -> None:
    """Draw all scenes into latents, in shards that training may already read while later ones are drawn.

    A shard holds coupled scenes (``z`` is the noise's own layout) and, a sixteenth as many, pairs of a flat
    sketch and its painting with the sun anywhere in the sky, for image-to-image.
    """
    folder = plan.work / "shards"
    folder.mkdir(exist_ok=True)
    autoencoder = load_autoencoder(plan).bfloat16()
    for index in track(range(RANK, plan.pictures // SHARD, WORLD), "drawing scenes"):
        path = folder / f"{index:04}.pt"
        if path.exists():
            continue
        parts: dict[str, list[Tensor]] = {}
        for first in range(0, SHARD, 16):
            said, z, _ = scene_batch(plan.seed + 2, index * SHARD + first, 16)
            drawn = scenes.resolve(said, z)
            for key, value in (
                *keep(autoencoder, plan, "", scenes.draw(drawn, z)),
                ("said", said.to(torch.int8)),
                ("z", z.half()),
            ):
                parts.setdefault(key, []).append(value)
            if first % 256:
                continue
            # Another scene of the same words, whose sun obeys no noise.
            z = z.flip(0)
            drawn = scenes.resolve(said, z)
            pen = torch.Generator().manual_seed(index * SHARD + first)
            place = torch.rand(len(z), 3, generator=pen) * torch.tensor([0.84, 0.44, 0.045])
            place += torch.tensor([0.08, 0.08, 0.05])
            place[:, 2] *= drawn[:, scenes.COLUMN["body"]] > 0
            for key, value in (
                *keep(autoencoder, plan, "free_", scenes.draw(drawn, z, body=place)),
                *keep(autoencoder, plan, "sketch_", scenes.draw(drawn, z, body=place, sketch=pen)),
                ("free_said", said.to(torch.int8)),
            ):
                parts.setdefault(key, []).append(value)
        torch.save({key: torch.cat(values) for key, values in parts.items()}, path.with_suffix(".tmp"))
        path.with_suffix(".tmp").rename(path)


def keep(
    autoencoder: AutoencoderTiny, plan: Plan, prefix: str, picture: scenes.Picture
) -> Iterator[tuple[str, Tensor]]:
    image = picture.image.to(plan.device, torch.bfloat16, memory_format=torch.channels_last)
    with torch.no_grad():
        latent = torch.cat([autoencoder.encoder(part) for part in torch.split(image, 4)])
    yield prefix + "latent", latent.contiguous().half().cpu()
    if prefix != "sketch_":
        yield prefix + "focus", to_bytes(picture.focus)


class Book:
    """The rendered scenes; grows while shards are still being drawn."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.names: list[str] = []
        self.pages: dict[str, Tensor] = {}

    def grow(self) -> None:
        """Read the shards that appeared since the last call."""
        for path in sorted(self.folder.glob("*.pt")):
            if path.name not in self.names:
                self.names.append(path.name)
                shard = torch.load(path)
                self.pages = {k: torch.cat((self.pages[k], v)) if self.pages else v for k, v in shard.items()}

    def __len__(self) -> int:
        return len(self.pages.get("z", ()))

    def take(self, index: Tensor, prefix: str = "") -> dict[str, Tensor]:
        names = ("latent", "focus", "said", "z")
        page = {n: self.pages[prefix + n][index] for n in names if prefix + n in self.pages}
        page["latent"] = page["latent"].float()
        page["focus"] = page["focus"].float() / 127.5 - 1
        return page


# UNet


@torch.no_grad()
def begin_with_layout(model: UNet2DConditionModel) -> None:
    """Wire four channels so that the 8x8 level begins with the layout in them: block sums of the input over four.

    Left to itself the network paints the average over layouts for long before it finds this projection.
    """
    box = torch.zeros(3, 3)
    box[1:, 1:] = 0.5  # stride 2, padding 1: the sum of 2x2 pixels over two
    eye = torch.eye(4)
    model.conv_in.weight[:4], model.conv_in.bias[:4] = 0, 0
    model.conv_in.weight[:4, :, 1, 1] = eye
    for block in model.down_blocks:
        for resnet in block.resnets:
            resnet.conv2.weight[:4], resnet.conv2.bias[:4] = 0, 0
            if resnet.conv_shortcut is not None:
                resnet.conv_shortcut.weight[:4], resnet.conv_shortcut.bias[:4] = 0, 0
                resnet.conv_shortcut.weight[:4, :4, 0, 0] = eye
        for down in block.downsamplers or ():
            down.conv.weight[:4], down.conv.bias[:4] = 0, 0
            down.conv.weight[:4, :4] = eye[:, :, None, None] * box


LATE = 0.88
"""The part of the course after which more sketches are shown."""


class Course:
    """What the UNet sees: batches of (noisy latents, timestep, said, clean latents, focus).

    Rows of four kinds. *Coupled* rows start at pure noise, whose layout is the scene's. *Chain* rows walk
    down an LCM schedule on the model's own predictions, as the sampler does, always towards the scene that
    their first noise named. *Free* rows are re-noised scenes at any level with unrelated noise; *sketch* rows
    show a re-noised flat sketch and want the painting.
    """

    def __init__(self, book: Book, alphas: Tensor, seed: int, batch: int) -> None:
        self.book, self.alphas = book, alphas
        self.generator = torch.Generator().manual_seed(seed)
        self.rng = random.Random(seed)
        self.coupled = batch * 7 // 16
        self.chain = batch * 4 // 16
        self.free = batch * 3 // 16
        self.sketch = batch - self.coupled - self.chain - self.free
        self.late = batch * 3 // 16
        self.walks: list[list[int]] = [[] for _ in range(self.chain)]
        self.pages: dict[str, Tensor] = {}
        self.state = torch.empty(0)

    def draw_more(self) -> None:
        """From here on, more sketches and fewer scenes from pure noise.

        The first noise names a layout. Without this it goes on doing so in image-to-image at strengths above a half,
        where it must not: a sun that was drawn on the left would rise on the right.
        """
        self.coupled, self.sketch, self.late = self.coupled - self.late, self.sketch + self.late, 0

    def _randn(self, n: int) -> Tensor:
        return torch.randn(n, 4, scenes.LATENT, scenes.LATENT, generator=self.generator)

    def _pick(self, n: int, prefix: str = "") -> dict[str, Tensor]:
        count = len(self.book.pages[prefix + "latent"])
        return self.book.take(torch.randint(count, (n,), generator=self.generator), prefix)

    def noised(self, x: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        a = self.alphas[t][:, None, None, None]
        return a.sqrt() * x + (1 - a).sqrt() * noise

    def next(self, teacher: float) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """One batch; ``teacher`` is the chance that a chain row walks on the true scene, not a prediction."""
        parts: list[tuple[Tensor, Tensor, dict[str, Tensor]]] = []
        # Coupled: mostly pure noise, as the sampler starts; some with a picture's faint trace, as
        # image-to-image of full strength starts.
        page = self._pick(self.coupled)
        noise = scenes.couple(self._randn(self.coupled), page["z"].float())
        t = torch.full((self.coupled,), 999)
        trace = torch.rand(self.coupled, generator=self.generator)
        hint = torch.where(trace[:, None, None, None] < 0.85, page["latent"], page["latent"].roll(1, 0))
        x = torch.where((trace < 0.7)[:, None, None, None], noise, self.noised(hint, t, noise))
        parts.append((x, t, page))
        # Chain.
        fresh = [i for i, walk in enumerate(self.walks) if not walk]
        page = self._pick(self.chain)
        if not self.pages:
            self.pages, self.state = page, page["latent"].clone()
        for i in fresh:
            self.walks[i] = lcm_times(self.rng.choice((2, 4, 4, 4, 4, 8)))[1:]
            for key, value in page.items():
                self.pages[key][i] = value[i]
            self.state[i] = page["latent"][i]
        first = torch.zeros(self.chain, dtype=torch.bool)
        true = torch.rand(self.chain, generator=self.generator) < teacher
        t = torch.empty(self.chain, dtype=torch.int64)
        for i, walk in enumerate(self.walks):
            first[i] = i in fresh
            t[i] = 999 if i in fresh else walk.pop(0)
        noise = self._randn(self.chain)
        start = scenes.couple(noise, self.pages["z"].float())
        known = torch.where(true[:, None, None, None], self.pages["latent"], self.state)
        x = torch.where(first[:, None, None, None], start, self.noised(known, t, noise))
        parts.append((x, t, {k: v.clone() for k, v in self.pages.items()}))
        # Free and sketch.
        half = self.free // 2
        for count, prefix in ((self.free - half, ""), (half, "free_")):
            page = self._pick(count, prefix)
            t = torch.randint(1, 50, (count,), generator=self.generator) * 20 - 1
            parts.append((self.noised(page["latent"], t, self._randn(count)), t, page))
        index = torch.randint(len(self.book.pages["sketch_latent"]), (self.sketch,), generator=self.generator)
        page = self.book.take(index, "free_")
        t = torch.randint(9, 48, (self.sketch,), generator=self.generator) * 20 - 1
        sketch = self.book.pages["sketch_latent"][index].float()
        parts.append((self.noised(sketch, t, self._randn(self.sketch)), t, page))
        x, t = torch.cat([x for x, _, _ in parts]), torch.cat([t for _, t, _ in parts])
        names = ("said", "latent", "focus")
        said, latent, focus = (torch.cat([part[2][name] for part in parts]) for name in names)
        return x, t, said, latent, focus

    def learn(self, predicted: Tensor) -> None:
        """Take the batch's predicted clean latents; the chain walks on with them."""
        self.state = predicted[self.coupled : self.coupled + self.chain].clone()


def train_unet(plan: Plan) -> None:
    """Learn clean latents from noise, words and time, in v-prediction; keep an average of the weights."""
    path = plan.work / "unet.pt"
    torch.manual_seed(plan.seed)
    tokenizer, text = load_text(plan)
    book = Book(plan.work / "shards")
    while not len(book):
        time.sleep(2)
        book.grow()
    alphas = new_scheduler().alphas_cumprod
    model = new_unet()
    begin_with_layout(model)
    model.to(plan.device, memory_format=torch.channels_last)
    average = copy.deepcopy(model).requires_grad_(False)
    optimizer = Muon(model, peak=2e-3)
    first, seen = 0, 0
    if path.exists():
        state = torch.load(path)
        model.load_state_dict(state["model"])
        average.load_state_dict(state["average"])
        optimizer.load_state_dict(state["optimizer"])
        first, seen = state["step"], state["seen"]
    share(model)
    share(average)
    batch = plan.batch // WORLD
    course = Course(book, alphas, plan.seed + first + 1000 * RANK, batch)
    rng = random.Random(f"captions-{plan.seed}-{first}-{RANK}")
    bf16 = torch.autocast(plan.device.type, torch.bfloat16)
    running: dict[str, float] = {}
    logger.info("unet: %d parameters, from step %d", sum(p.numel() for p in model.parameters()), first)
    began = time.monotonic()
    for step in track(range(first, plan.steps), "unet"):
        if step % 50 == 0:
            book.grow()
        if step >= LATE * plan.steps:
            course.draw_more()
        x, t, said, latent, focus = course.next(TEACHER)
        captions = [scenes.caption(row, rng) for row in said.tolist()]
        for i in range(course.coupled + course.chain, len(captions)):
            if rng.random() < 0.1:
                captions[i] = ""  # classifier-free guidance
        with torch.no_grad():
            context = text(tokenize(tokenizer, captions).to(plan.device)).last_hidden_state
        a = alphas[t][:, None, None, None].to(plan.device)
        x, latent, focus = (v.to(plan.device) for v in (x, latent, focus))
        with bf16:
            v = model(x.to(memory_format=torch.channels_last), t.to(plan.device), context).sample.float()
        target = (a.sqrt() * x - latent) / (1 - a).sqrt()
        weight = 1 + 4 * focus
        each = ((v - target).square() * weight).mean((1, 2, 3))
        # At low noise the v-loss would count the picture's error many times over; its top is cut.
        loss = (each * (5 * (1 - a.flatten())).clamp(max=1)).mean()
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        agree(model)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = rate(step, plan.steps, group["peak"])
        optimizer.step()
        seen += plan.batch
        course.learn((a.sqrt() * x - (1 - a).sqrt() * v).detach().cpu())
        decay = min(0.998, (1 + step) / (10 + step))
        with torch.no_grad():
            torch._foreach_lerp_(list(average.parameters()), list(model.parameters()), 1 - decay)
        picture = each.detach() * (1 - a.flatten())
        ends = {"coupled": course.coupled, "chain": course.coupled + course.chain, "free": -course.sketch}
        for name, part in zip((*ends, "sketch"), picture.tensor_split(list(ends.values())), strict=True):
            running[name] = 0.98 * running.get(name, part.mean().item()) + 0.02 * part.mean().item()
        if step % 50 == 0:
            pace = (step - first + 1) * plan.batch / (time.monotonic() - began)
            errors = " ".join(f"{name} {value:.4f}" for name, value in running.items())
            logger.info("unet %d seen %d scenes %d %.1f/s %s", step, seen, len(book), pace, errors)
        if step % 250 == 249 or step + 1 == plan.steps:
            state = {
                "model": model.state_dict(),
                "average": average.state_dict(),
                "optimizer": optimizer.state_dict(),
            }
            save({**state, "step": step + 1, "seen": seen}, path)
            if RANK == 0:
                sheet(plan, average, tokenizer, text, plan.work / f"sheet-{step + 1:06}.png")


PROMPTS = (
    "mountains at sunset", "night over a lake", "a house in the snow", "forest by day", "desert dunes, sun",
    "the sea at night, moon and stars", "snowy mountains at dawn, lake", "hills with a house at sunset",
)  # fmt: skip


@torch.no_grad()
def sheet(plan: Plan, unet: nn.Module, tokenizer: CLIPTokenizer, text: CLIPTextModel, path: Path) -> None:
    """Sample every prompt with two seeds in four LCM steps."""
    autoencoder, scheduler = load_autoencoder(plan), new_scheduler()
    context = text(tokenize(tokenizer, list(PROMPTS) * 2).to(plan.device)).last_hidden_state
    generator = torch.Generator().manual_seed(7)
    x = torch.randn(len(context), 4, scenes.LATENT, scenes.LATENT, generator=generator).to(plan.device)
    scheduler.set_timesteps(4)
    for t in scheduler.timesteps:
        noise_pred = unet(x, t.to(plan.device), context).sample
        x, denoised = scheduler.step(noise_pred, t, x, generator=generator, return_dict=False)
    save_grid(autoencoder.decoder(denoised).cpu(), path, columns=len(PROMPTS))


# Decoder


def train_decoder(plan: Plan) -> None:
    """Teach the decoder, the encoder held still, to sharpen what the UNet denoises as well as true latents."""
    path = plan.work / "decoder.pt"
    torch.manual_seed(plan.seed)
    tokenizer, text = load_text(plan)
    model, alphas = load_autoencoder(plan), new_scheduler().alphas_cumprod
    unet = new_unet()
    unet.load_state_dict(torch.load(plan.work / "unet.pt")["average"])
    unet.requires_grad_(False).to(plan.device)
    images, latents = [], []
    for i in track(range(RANK, 48, WORLD), "drawing for the decoder"):
        said, z, captions = scene_batch(plan.seed + 3, i * 16, 16)
        image = scenes.draw(scenes.resolve(said, z), z).image
        context = text(tokenize(tokenizer, captions).to(plan.device)).last_hidden_state
        latent = model.encoder(image.to(plan.device))
        t = torch.tensor((139, 259, 259, 379)).repeat(4)
        a = alphas[t][:, None, None, None].to(plan.device)
        x = a.sqrt() * latent + (1 - a).sqrt() * torch.randn_like(latent)
        guess = a.sqrt() * x - (1 - a).sqrt() * unet(x, t.to(plan.device), context).sample
        images.append(to_bytes(image))
        latents.append(torch.stack((latent, guess), 1))
    pictures, inputs = torch.cat(images), torch.cat(latents)
    model.decoder.requires_grad_(True)
    optimizer = torch.optim.AdamW(model.decoder.parameters(), lr=0, betas=(0.9, 0.98), weight_decay=1e-4)
    share(model.decoder)
    torch.manual_seed(plan.seed + RANK)
    for step in track(range(plan.decoder_steps), "decoder"):
        index = torch.randint(len(pictures), (2,))  # whole pictures, for the sake of their rims
        x = from_bytes(pictures[index]).to(plan.device, memory_format=torch.channels_last)
        y = model.decoder(inputs[index, torch.tensor((0, 1))])
        loss = F.l1_loss(y, x) + sum(F.l1_loss(a, b) for a, b in zip(edges(y), edges(x), strict=True))
        loss = loss + 0.25 * F.mse_loss(y, x)
        for group in optimizer.param_groups:
            group["lr"] = rate(step, plan.decoder_steps, 1e-3)
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        agree(model.decoder)
        nn.utils.clip_grad_norm_(model.decoder.parameters(), 1.0)
        optimizer.step()
        if step % 50 == 0:
            quality = -10 * math.log10(F.mse_loss(y[:1].clamp(-1, 1), x[:1]).item() / 4)
            logger.info("decoder %d loss %.4f psnr %.1f dB", step, loss.item(), quality)
    save(model.decoder.state_dict(), path)


# Export


def train_export(plan: Plan) -> None:
    """Write the averaged weights as an ordinary diffusers folder of fp16 safetensors, all at once."""
    out = plan.out.with_name(plan.out.name + ".new")
    shutil.rmtree(out, ignore_errors=True)
    tokenizer, text = load_text(plan)
    unet = new_unet()
    unet.load_state_dict(torch.load(plan.work / "unet.pt")["average"])
    for name, model in (("unet", unet), ("vae", load_autoencoder(plan)), ("text_encoder", text)):
        model.to("cpu", torch.float16, memory_format=torch.contiguous_format).save_pretrained(out / name)
    tokenizer.save_pretrained(out / "tokenizer")
    bpe = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    (out / "tokenizer" / "vocab.json").write_text(json.dumps(bpe["vocab"], ensure_ascii=False))
    merges = "\n".join(" ".join(pair) for pair in bpe["merges"])
    (out / "tokenizer" / "merges.txt").write_text(f"#version: 0.2\n{merges}\n")
    new_scheduler().save_pretrained(out / "scheduler")
    index = {
        "_class_name": "StableDiffusionPipeline",  # the LCM pipeline insists on a guidance embedding
        "feature_extractor": [None, None],
        "image_encoder": [None, None],
        "requires_safety_checker": False,
        "safety_checker": [None, None],
        "scheduler": ["diffusers", "LCMScheduler"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderTiny"],
    }
    for file in out.rglob("*.safetensors"):
        file.chmod(0o644)
    (out / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")
    old = plan.out.with_name(plan.out.name + ".old")
    shutil.rmtree(old, ignore_errors=True)
    if plan.out.exists():
        plan.out.rename(old)
    out.rename(plan.out)
    shutil.rmtree(old, ignore_errors=True)
    size = sum(f.stat().st_size for f in plan.out.rglob("*") if f.is_file())
    logger.info("exported %s, %.1f MB", plan.out, size / 1e6)


STAGES = {
    "autoencoder": train_autoencoder,
    "text": train_text,
    "render": train_render,
    "unet": train_unet,
    "decoder": train_decoder,
    "export": train_export,
    "controlnet": train_controlnet,
    "lora": train_lora,
}


def main() -> None:
    parser = argparse.ArgumentParser(prog="lcm_rt.embedded.train", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=MODEL_DIR)
    parser.add_argument("--work", type=Path, default=Path("embedded-work"))
    parser.add_argument("--steps", type=int, default=5000, help="UNet steps")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--autoencoder-steps", type=int, default=3000)
    parser.add_argument("--text-steps", type=int, default=600)
    parser.add_argument("--decoder-steps", type=int, default=1000)
    parser.add_argument("--controlnet-steps", type=int, default=4000)
    parser.add_argument("--lora-steps", type=int, default=800)
    parser.add_argument("--pictures", type=int, default=32_000)
    parser.add_argument("--stage", choices=STAGES, action="append", help="only this stage (may be repeated)")
    parser.add_argument("--device", default="auto")
    options = vars(parser.parse_args())
    stages = options.pop("stage") or STAGES
    name = options.pop("device")
    device = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name)
    plan = Plan(device=device, **options)
    plan.work.mkdir(parents=True, exist_ok=True)
    logging.basicConfig(
        level=logging.WARNING if RANK else logging.INFO,
        format="%(asctime)s %(message)s",
        handlers=[logging.StreamHandler(), logging.FileHandler(plan.work / "train.log")],
    )
    if WORLD > 1:
        dist.init_process_group("gloo")
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS") or max(1, (os.cpu_count() or 2) // WORLD)))
    torch.set_flush_denormal(True)  # soft masks underflow; denormals would make drawing eight times slower
    for stage, train in STAGES.items():
        if stage in stages:
            train(plan)


if __name__ == "__main__":
    main()

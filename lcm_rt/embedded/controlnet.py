"""The embedded model's inpainting ControlNet: what the picture around a hole says about what belongs into it."""

from __future__ import annotations

import random

import torch
from diffusers import ControlNetModel, UNet2DConditionModel
from torch import Tensor

from lcm_rt.embedded import scenes
from lcm_rt.embedded.companion import PAGE, Page, Pool, teach
from lcm_rt.embedded.networks import Finished
from lcm_rt.embedded.plan import RANK, Plan, from_bytes, scene_batch, to_bytes

DOSE = 0.5  # the conditioning scale that diffusers' inpainting pipeline takes by default
EYES = (4, 8, 16, 32)  # channels of the embedding of the control picture: at full size every one more is felt
TIMES = (scenes.DAY, scenes.SUNSET, scenes.NIGHT, scenes.DAWN)
TIME, BODY, STARS = (scenes.COLUMN[name] for name in ("time", "body", "stars"))


def new_controlnet(unet: UNet2DConditionModel) -> ControlNetModel:
    """A copy of the UNet's encoder that looks at a control picture."""
    model = ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=EYES)
    begin_with_eyes(model)
    return model.requires_grad_(True)


@torch.no_grad()
def begin_with_eyes(model: ControlNetModel) -> None:
    """Wire four channels of the embedding as means of 8x8 pixels: colour where it is known, and where it is not.

    Known pixels are 0..1 and masked ones -1, so that SiLU by itself makes nought of the colours of the masked ones.
    """
    embedding = model.controlnet_cond_embedding
    box = torch.tensor([0.0, 0.5, 0.5])  # stride 2, padding 1: the mean of two pixels
    dot = torch.tensor([0.0, 1.0, 0.0])
    wiring = torch.cat((torch.eye(3), torch.full((1, 3), -1 / 3))) * 4
    for conv in (embedding.conv_in, *embedding.blocks):
        kernel = dot if conv.stride == (1, 1) else box
        conv.weight[:4], conv.bias[:4] = 0, 0
        conv.weight[:4, : wiring.shape[1]] = wiring[:, :, None, None] * kernel[:, None] * kernel
        wiring = torch.eye(4)


def control_picture(image: Tensor, hole: Tensor) -> Tensor:
    """What the ControlNet sees, (B, 3, H, W): the picture (in [-1, 1]) as 0..1, and -1 where ``hole`` is 1."""
    return torch.where(hole > 0.5, -1.0, (image.clamp(-1, 1) + 1) / 2)


class HoledScenes(Pool):
    """Scenes with holes; a page also has the ``control`` picture (B, 3, 256, 256), and which are ``contrary`` (B,).

    What belongs into the hole is the scene's own, except in about one of nine, where the words ask for another time of
    day than that of the picture around: there the words win. As stale pictures other scenes lie under the holes.
    """

    STALE = 600

    def __init__(self, seed: int, finished: Finished) -> None:
        super().__init__(seed)
        self.finished = finished

    def draw(self) -> Page:
        said, z, _ = scene_batch(self.seed, self.turns * PAGE, PAGE)
        drawn = scenes.resolve(said, z)
        picture = scenes.draw(drawn, z)
        latent = self.finished.encode(picture.image)
        image, known = picture.image, latent
        contrary = torch.zeros(PAGE, dtype=torch.bool)
        if self.turns % 8 == 7:
            contrary = said[:, TIME] > 0
            other = said.clone()
            other[:, TIME] = torch.tensor(
                [self.rng.choice([t for t in TIMES if t != row[TIME]]) for row in said.tolist()]
            )
            other[:, [BODY, STARS]] = 0
            image = scenes.draw(torch.where(contrary[:, None], scenes.resolve(other, z), drawn), z).image
            known = self.finished.encode(image)
        if self.turns % 2:  # pictures that the model itself painted come by as well
            image = self.finished.decode(known)
        return {
            "image": to_bytes(image),
            "known": known,
            "latent": latent,
            "focus": picture.focus,
            "said": said,
            "z": z,
            "contrary": contrary,
        }

    def pick(self, count: int) -> Page:
        page = super().pick(count)
        hole = torch.stack([scenes.hole(focus, self.rng) for focus in page["focus"]])
        page["control"] = control_picture(from_bytes(page.pop("image")), hole)
        page["mask"] = hole[..., ::8, ::8]  # as the pipelines make a latent mask of it
        page["latent"] = torch.lerp(page["known"], page["latent"], page["mask"])
        page["stale"] = torch.lerp(page["latent"], page["known"].roll(1, 0), page["mask"])
        return page

    def words(self, page: Page) -> list[str]:
        told = told_by_the_rest(page["focus"], page["mask"]) & ~page["contrary"][:, None]
        return [prompt(*row, self.rng) for row in zip(page["said"].tolist(), told.tolist(), strict=True)]


def told_by_the_rest(focus: Tensor, mask: Tensor) -> Tensor:
    """Which attributes, (B, attributes) bool, show in the picture around a hole (B, 1, 32, 32)."""
    horizon = int(0.56 * scenes.LATENT)
    seen, above, below = (1 - part.mean((1, 2, 3)) for part in (mask, mask[:, :, :horizon], mask[:, :, horizon:]))
    hides_something_small = (focus * mask).amax((1, 2, 3)) > 0.2
    shows = {"time": seen > 0.15}
    shows |= dict.fromkeys(("stars", "clouds", "back"), above > 0.3)
    shows |= dict.fromkeys(("land", "water", "forest", "hills"), below > 0.3)
    shows |= {"body": shows["clouds"] & ~hides_something_small, "house": shows["land"] & ~hides_something_small}
    return torch.stack([shows[name] for name in scenes.NAMES], 1)


def prompt(said: list[int], told: list[bool], rng: random.Random) -> str:
    """Words for a hole: often only a part of what is said, for what the rest of the picture tells may be left out."""
    keep = rng.choices((0.0, 0.2, 0.5, 1.0), (20, 20, 20, 40))[0]
    return scenes.caption([v if not t or rng.random() < keep else 0 for v, t in zip(said, told, strict=True)], rng)


def train_controlnet(plan: Plan) -> None:
    """Teach a copy of the finished UNet's encoder to steer it by the picture around a hole, at a scale of ``DOSE``."""
    torch.manual_seed(plan.seed)
    finished = Finished.load(plan.out, plan.device)
    model = new_controlnet(finished.unet).to(plan.device, memory_format=torch.channels_last)

    def forward(x: Tensor, t: Tensor, context: Tensor, page: Page, amount: float) -> Tensor:
        control = page["control"].to(memory_format=torch.channels_last)
        down, middle = model(x, t, context, control, conditioning_scale=DOSE * amount, return_dict=False)
        more = {"down_block_additional_residuals": down, "mid_block_additional_residual": middle}
        v: Tensor = finished.unet(x, t, context, **more).sample
        return v

    pool = HoledScenes(plan.seed + 5 + 1000 * RANK, finished)
    teach(plan, "controlnet", plan.controlnet_steps, 1e-3, model, forward, pool, finished)
    if RANK == 0:
        model.to("cpu", torch.float16, memory_format=torch.contiguous_format).save_pretrained(plan.out / "controlnet")
        for file in (plan.out / "controlnet").iterdir():
            file.chmod(0o644)

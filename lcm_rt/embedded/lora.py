"""A LoRA for the embedded model's UNet: the same landscapes in another style."""

from __future__ import annotations

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from lcm_rt.embedded import scenes
from lcm_rt.embedded.companion import PAGE, Page, Pool, teach
from lcm_rt.embedded.networks import Finished
from lcm_rt.embedded.plan import RANK, Plan, from_bytes, scene_batch, to_bytes

STYLE = "ink"
RANK_OF_UPDATES = 8


class LowRank(nn.Module):
    """A 3x3 convolution and what is learnt beside it: ``base(x) + amount * up(down(x))``."""

    amount = 1.0

    def __init__(self, base: nn.Conv2d) -> None:
        super().__init__()
        self.base = base
        self.down = nn.Conv2d(base.in_channels, RANK_OF_UPDATES, 3, padding=1, bias=False)
        self.up = nn.Conv2d(RANK_OF_UPDATES, base.out_channels, 1, bias=False)
        nn.init.zeros_(self.up.weight)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.base(x) + self.amount * self.up(self.down(x))
        return y


def add_low_rank(unet: nn.Module) -> dict[str, LowRank]:
    """Put a ``LowRank`` around the convolutions that paint: by their names in the UNet.

    All of the decoder's and the first of each pair in the encoder. The attention layers speak of words, not of style,
    and every layer more is felt by those who run it unfused.
    """
    layers = {}
    for name, module in list(unet.named_modules()):
        painting = name.startswith("up_blocks") and name.endswith(("conv1", "conv2"))
        if painting or name.endswith("resnets.0.conv1") or name == "conv_out":
            parent, _, last = name.rpartition(".")
            layers[name] = LowRank(module)
            setattr(unet.get_submodule(parent), last, layers[name])
    return layers


class StyledScenes(Pool):
    """Scenes in the style; the stale pictures are the plain ones, for image-to-image."""

    STALE = 300

    def __init__(self, seed: int, finished: Finished) -> None:
        super().__init__(seed)
        self.finished = finished

    def draw(self) -> Page:
        said, z, _ = scene_batch(self.seed, self.turns * PAGE, PAGE)
        picture = scenes.draw(scenes.resolve(said, z), z)
        pixels = to_bytes(picture.image).permute(0, 2, 3, 1).numpy()
        styled = from_bytes(torch.from_numpy(scenes.restyle(pixels, STYLE))).permute(0, 3, 1, 2)
        latent = self.finished.encode(styled)
        return {
            "latent": latent,
            "known": latent,
            "stale": self.finished.encode(picture.image),
            "mask": torch.ones(PAGE, 1, scenes.LATENT, scenes.LATENT),
            "focus": picture.focus,
            "said": said,
            "z": z,
        }

    def words(self, page: Page) -> list[str]:
        return [scenes.caption(said, self.rng) for said in page["said"].tolist()]


def train_lora(plan: Plan) -> None:
    """Teach low-rank updates of the finished UNet to paint in the style; write them in peft's format."""
    torch.manual_seed(plan.seed)
    finished = Finished.load(plan.out, plan.device)
    layers = add_low_rank(finished.unet)
    finished.unet.to(plan.device, memory_format=torch.channels_last)

    def forward(x: Tensor, t: Tensor, context: Tensor, page: Page, amount: float) -> Tensor:
        for layer in layers.values():
            layer.amount = amount
        v: Tensor = finished.unet(x, t, context).sample
        return v

    pool = StyledScenes(plan.seed + 6 + 1000 * RANK, finished)
    teach(plan, f"lora-{STYLE}", plan.lora_steps, 4e-3, finished.unet, forward, pool, finished)
    if RANK == 0:
        state = {}
        for name, layer in layers.items():
            for end, part in (("lora_A", layer.down), ("lora_B", layer.up)):
                weight = part.weight.detach().to("cpu", torch.float16, memory_format=torch.contiguous_format)
                state[f"unet.{name}.{end}.weight"] = weight
        folder = plan.out.with_name("loras")
        folder.mkdir(exist_ok=True)
        save_file(state, folder / f"{STYLE}.safetensors", {"format": "pt"})
        (folder / f"{STYLE}.safetensors").chmod(0o644)

"""The networks of the embedded model: their shapes, and how to read them from a training's files or as they ship."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import AutoencoderTiny, LCMScheduler, UNet2DConditionModel
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from lcm_rt.embedded import scenes
from lcm_rt.embedded.plan import Plan

TOKENS = 77
CONTEXT = 128  # width of the text encoder
CHANNELS = (32, 64, 128)
WIDTH = 16  # of the autoencoder: the only one that decodes 256 pixels in under 20 ms on two cores


@dataclass(frozen=True, slots=True)
class Finished:
    """The model as it ships, held still."""

    tokenizer: CLIPTokenizer
    text: CLIPTextModel
    unet: UNet2DConditionModel
    autoencoder: AutoencoderTiny

    @classmethod
    def load(cls, folder: Path, device: torch.device) -> Finished:
        """Read a diffusers folder: the autoencoder in bfloat16, the rest in float32."""
        whole, half = torch.float32, torch.bfloat16
        parts = (
            CLIPTextModel.from_pretrained(folder / "text_encoder", dtype=whole),
            UNet2DConditionModel.from_pretrained(folder / "unet", torch_dtype=whole).to(
                memory_format=torch.channels_last
            ),
            AutoencoderTiny.from_pretrained(folder / "vae", torch_dtype=half).to(memory_format=torch.channels_last),
        )
        tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer", model_max_length=TOKENS)
        return cls(tokenizer, *(part.eval().requires_grad_(False).to(device) for part in parts))

    @torch.no_grad()
    def encode(self, image: Tensor) -> Tensor:
        """Pictures (B, 3, H, W) in [-1, 1] to latents (B, 4, H/8, W/8), float32 on the CPU."""
        image = image.to(self.autoencoder.device, torch.bfloat16, memory_format=torch.channels_last)
        latent: Tensor = self.autoencoder.encoder(image)
        return latent.float().contiguous().cpu()

    @torch.no_grad()
    def decode(self, latent: Tensor) -> Tensor:
        """The way back."""
        latent = latent.to(self.autoencoder.device, torch.bfloat16, memory_format=torch.channels_last)
        image: Tensor = self.autoencoder.decoder(latent)
        return image.float().contiguous().cpu()


def new_autoencoder() -> AutoencoderTiny:
    return AutoencoderTiny(
        encoder_block_out_channels=(WIDTH,) * 4, decoder_block_out_channels=(WIDTH,) * 4, scaling_factor=1.0
    )


def load_autoencoder(plan: Plan) -> AutoencoderTiny:
    model = new_autoencoder()
    model.load_state_dict(torch.load(plan.work / "autoencoder.pt"))
    if (plan.work / "decoder.pt").exists():
        model.decoder.load_state_dict(torch.load(plan.work / "decoder.pt"))
    return model.eval().requires_grad_(False).to(plan.device, memory_format=torch.channels_last)


def tokenize(tokenizer: CLIPTokenizer, captions: list[str]) -> Tensor:
    """Token ids (B, 77) int64, padded as the pipelines pad."""
    options = {"padding": "max_length", "truncation": True, "max_length": TOKENS, "return_tensors": "pt"}
    ids: Tensor = tokenizer(captions, **options).input_ids
    return ids


def new_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=CONTEXT,
        intermediate_size=4 * CONTEXT,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=TOKENS,
        projection_dim=CONTEXT,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return CLIPTextModel(config)


def load_text(plan: Plan) -> tuple[CLIPTokenizer, CLIPTextModel]:
    tokenizer = CLIPTokenizer.from_pretrained(plan.work / "tokenizer", model_max_length=TOKENS)
    model = new_text_encoder(tokenizer)
    model.load_state_dict(torch.load(plan.work / "text.pt")["model"])
    return tokenizer, model.eval().requires_grad_(False).to(plan.device)


def new_unet() -> UNet2DConditionModel:
    """Attention at 8x8 only: words speak of the whole picture, and a step costs 1.6 times less."""
    return UNet2DConditionModel(
        sample_size=scenes.LATENT,
        block_out_channels=CHANNELS,
        layers_per_block=1,
        down_block_types=("DownBlock2D", "DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D", "UpBlock2D"),
        cross_attention_dim=CONTEXT,
        attention_head_dim=4,
        norm_num_groups=16,
    )


def new_scheduler() -> LCMScheduler:
    return LCMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        original_inference_steps=50,
        clip_sample=False,
        set_alpha_to_one=True,
        steps_offset=1,
        prediction_type="v_prediction",
        timestep_scaling=10.0,
    )


def lcm_times(steps: int) -> list[int]:
    """The timesteps of an LCM schedule of so many steps, 999 first."""
    return [999 - 20 * (i * 50 // steps) for i in range(steps)]

"""Tiny models with random weights, written as folders in diffusers format: a fraction of a second and 1 MB each."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

import torch
from diffusers import AutoencoderKL, AutoencoderTiny, ControlNetModel, LCMScheduler, UNet2DConditionModel
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
from tokenizers.pre_tokenizers import ByteLevel
from transformers import CLIPConfig, CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from lcm_rt.catalog import ModelSpec

TOKENS = 24
WIDTH = 32
POOLED = 16  # width of the pooled prompt of SDXL's second text encoder

Family = Literal["sd", "sdxl"]


def write_checkpoint(
    folder: Path,
    *,
    family: Family = "sd",
    distilled: bool = True,
    inpainting: bool = False,
    tiny_vae: bool = False,
    prediction: str = "epsilon",
    blocks: tuple[int, ...] = (32, 32, 64),
    seed: int = 0,
) -> ModelSpec:
    """A model folder, and the row of the catalogue that means it.

    Args:
        family: Stable Diffusion 1, or XL with its two text encoders and its size conditioning.
        distilled: the UNet takes a guidance embedding (LCM); otherwise it is a plain UNet.
        inpainting: the UNet takes nine channels: latents, mask and masked picture.
        tiny_vae: ``AutoencoderTiny`` in place of ``AutoencoderKL``.
        prediction: what the UNet's output is.
        blocks: channels of the UNet's blocks.
        seed: of the weights.
    """
    torch.manual_seed(seed)
    UNet2DConditionModel(
        **_unet_config(family, blocks),
        in_channels=9 if inpainting else 4,
        out_channels=4,
        time_cond_proj_dim=16 if distilled else None,
    ).save_pretrained(folder / "unet")
    _vae(tiny_vae).save_pretrained(folder / "vae")
    scheduler = LCMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", prediction_type=prediction, steps_offset=1
    )
    scheduler.save_pretrained(folder / "scheduler")
    vocabulary = write_tokenizer(folder / "tokenizer")
    CLIPTextModel(_text_config(vocabulary, WIDTH)).save_pretrained(folder / "text_encoder")
    pipeline = {
        "sd": "LatentConsistencyModelPipeline" if distilled else "StableDiffusionPipeline",
        "sdxl": "StableDiffusionXLPipeline",
    }
    index: dict[str, Any] = {
        "_class_name": pipeline[family],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderTiny" if tiny_vae else "AutoencoderKL"],
        "scheduler": ["diffusers", "LCMScheduler"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
    }
    if family == "sdxl":
        write_tokenizer(folder / "tokenizer_2")
        CLIPTextModelWithProjection(_text_config(vocabulary, WIDTH // 2)).save_pretrained(folder / "text_encoder_2")
        index |= {
            "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"],
            "tokenizer_2": ["transformers", "CLIPTokenizer"],
            "force_zeros_for_empty_prompt": True,
        }
    (folder / "model_index.json").write_text(json.dumps(index))
    return ModelSpec(name=folder.name, source=str(folder), licence="none", size=64, complete=False)


def write_controlnet(folder: Path, *, family: Family = "sd", seed: int = 0) -> None:
    """A ControlNet that fits the UNet of ``write_checkpoint`` with its default blocks; its output is not nought."""
    torch.manual_seed(seed)
    config = _unet_config(family, (32, 32, 64))
    for unused in ("sample_size", "up_block_types"):
        config.pop(unused)
    network = ControlNetModel(in_channels=4, conditioning_embedding_out_channels=(8, 8, 16, 16), **config)
    with torch.no_grad():
        for block in (*network.controlnet_down_blocks, network.controlnet_mid_block):
            torch.nn.init.normal_(block.weight, std=0.2)  # a fresh one's are zeros
        torch.nn.init.normal_(network.controlnet_cond_embedding.conv_out.weight, std=0.2)
    network.save_pretrained(folder)


def write_safety_checker(folder: Path, *, seed: int = 0, threshold: float | None = None) -> None:
    """A safety checker of the CompVis architecture, for pictures of 32 by 32.

    ``threshold`` is the cosine from which a picture is flagged, for all concepts: with -2 all are, with 2 none is.
    """
    torch.manual_seed(seed)
    vision = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "image_size": 32,
        "patch_size": 8,
    }
    checker = StableDiffusionSafetyChecker(CLIPConfig(vision_config=vision, projection_dim=16))
    if threshold is not None:
        checker.concept_embeds_weights.data.fill_(threshold)
    checker.save_pretrained(folder)


def _unet_config(family: Family, blocks: tuple[int, ...]) -> dict[str, Any]:
    attends = len(blocks) - 1
    plain, crossing = ("DownBlock2D", "UpBlock2D"), ("CrossAttnDownBlock2D", "CrossAttnUpBlock2D")
    config = {
        "sample_size": 8,
        "block_out_channels": blocks,
        "layers_per_block": 1,
        "attention_head_dim": 2,
        "norm_num_groups": 8,
    }
    if family == "sd":
        return config | {
            "down_block_types": (crossing[0],) * attends + (plain[0],),
            "up_block_types": (plain[1],) + (crossing[1],) * attends,
            "cross_attention_dim": WIDTH,
        }
    return config | {
        "down_block_types": (plain[0],) + (crossing[0],) * attends,
        "up_block_types": (crossing[1],) * attends + (plain[1],),
        "cross_attention_dim": WIDTH + WIDTH // 2,
        "transformer_layers_per_block": (1, *range(1, attends + 1)),
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 6 * 8 + POOLED,
    }


def _text_config(vocabulary: dict[str, int], width: int) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=len(vocabulary),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=TOKENS,
        projection_dim=POOLED,
        bos_token_id=vocabulary["<|startoftext|>"],
        eos_token_id=vocabulary["<|endoftext|>"],
        pad_token_id=vocabulary["<|endoftext|>"],
    )


def _vae(tiny: bool) -> Any:
    if tiny:
        return AutoencoderTiny(
            encoder_block_out_channels=(16,) * 4,
            decoder_block_out_channels=(16,) * 4,
            num_encoder_blocks=(1, 1, 1, 1),
            num_decoder_blocks=(1, 1, 1, 1),
        )
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(16, 16, 16, 16),
        norm_num_groups=8,
        sample_size=64,
        scaling_factor=0.18215,
    )


def write_tokenizer(folder: Path) -> dict[str, int]:
    """A byte-pair tokenizer that knows every byte and a few whole words, so any prompt can be encoded."""
    letters = sorted(ByteLevel.alphabet())
    merges = ["r e", "re d</w>", "c a", "ca t</w>"]
    words = letters + [f"{letter}</w>" for letter in letters] + [merge.replace(" ", "") for merge in merges]
    vocabulary = {word: number for number, word in enumerate([*words, "<|startoftext|>", "<|endoftext|>"])}
    folder.mkdir(parents=True)
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]))
    special = {"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>"}
    config = {"tokenizer_class": "CLIPTokenizer", "model_max_length": TOKENS, "unk_token": "<|endoftext|>", **special}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return vocabulary

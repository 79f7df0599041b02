"""Tiny models with random weights, written as folders in diffusers format: a fraction of a second and 1 MB each."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, AutoencoderTiny, LCMScheduler, UNet2DConditionModel
from tokenizers.pre_tokenizers import ByteLevel
from transformers import CLIPTextConfig, CLIPTextModel

from lcm_rt.catalog import ModelSpec

TOKENS = 24
WIDTH = 32


def write_checkpoint(
    folder: Path,
    *,
    distilled: bool = True,
    tiny_vae: bool = False,
    prediction: str = "epsilon",
    blocks: tuple[int, ...] = (32, 32, 64),
    seed: int = 0,
) -> ModelSpec:
    """A model folder, and the row of the catalogue that means it.

    Args:
        distilled: the UNet takes a guidance embedding (LCM); otherwise it is a plain Stable Diffusion UNet.
        tiny_vae: ``AutoencoderTiny`` in place of ``AutoencoderKL``.
        prediction: what the UNet's output is.
        blocks: channels of the UNet's blocks.
        seed: of the weights.
    """
    torch.manual_seed(seed)
    attends = len(blocks) - 1
    unet = UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        block_out_channels=blocks,
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D",) * attends + ("DownBlock2D",),
        up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * attends,
        attention_head_dim=2,
        norm_num_groups=8,
        cross_attention_dim=WIDTH,
        time_cond_proj_dim=16 if distilled else None,
    )
    unet.save_pretrained(folder / "unet")
    _vae(tiny_vae).save_pretrained(folder / "vae")
    scheduler = LCMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", prediction_type=prediction, steps_offset=1
    )
    scheduler.save_pretrained(folder / "scheduler")
    vocabulary = _write_tokenizer(folder / "tokenizer")
    text = CLIPTextConfig(
        vocab_size=len(vocabulary),
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=TOKENS,
        bos_token_id=vocabulary["<|startoftext|>"],
        eos_token_id=vocabulary["<|endoftext|>"],
        pad_token_id=vocabulary["<|endoftext|>"],
    )
    CLIPTextModel(text).save_pretrained(folder / "text_encoder")
    index = {
        "_class_name": "LatentConsistencyModelPipeline" if distilled else "StableDiffusionPipeline",
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderTiny" if tiny_vae else "AutoencoderKL"],
        "scheduler": ["diffusers", "LCMScheduler"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
    }
    (folder / "model_index.json").write_text(json.dumps(index))
    return ModelSpec(name=folder.name, path=folder, licence="none", size=64)


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


def _write_tokenizer(folder: Path) -> dict[str, int]:
    """A byte-pair tokenizer that knows every byte and a few whole words, so any prompt can be encoded."""
    letters = sorted(ByteLevel.alphabet())
    merges = ["r e", "re d</w>", "c a", "ca t</w>"]
    words = letters + [f"{letter}</w>" for letter in letters] + [merge.replace(" ", "") for merge in merges]
    vocabulary = {word: number for number, word in enumerate([*words, "<|startoftext|>", "<|endoftext|>"])}
    folder.mkdir()
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]))
    special = {"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>"}
    config = {"tokenizer_class": "CLIPTokenizer", "model_max_length": TOKENS, "unk_token": "<|endoftext|>", **special}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return vocabulary

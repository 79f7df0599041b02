"""The checker decides as diffusers' own does, whose loop and whose preparation of pictures by Pillow are the reference.

Weights are random; the concepts are set so that about half of the pictures are flagged.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from checkpoints import write_safety_checker
from diffusers.pipelines.stable_diffusion import safety_checker as theirs
from PIL import Image
from safetensors.torch import load_file, save_file
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from lcm_rt.engine.safety import SafetyChecker
from lcm_rt.errors import NotFound

CPU = torch.device("cpu")
SIDE = 32
SIZES = [(64, 64), (64, 96), (104, 72), (256, 256), (32, 32), (24, 40)]
PER_SIZE = 20


def paint(height, width, random):
    """Blots of colour, from one to eight in a row."""
    cells = random.integers(0, 256, (int(random.integers(1, 9)), int(random.integers(1, 9)), 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(cells).resize((width, height), Image.Resampling.BICUBIC))


@pytest.fixture(scope="module")
def pictures():
    """A batch of each size."""
    random = np.random.default_rng(0)
    return [np.stack([paint(*size, random) for _ in range(PER_SIZE)]) for size in SIZES]


@pytest.fixture(scope="module")
def prepared(pictures):
    """What CLIP's own image processor makes of them."""
    processor = CLIPImageProcessorPil(
        size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE}, resample=Image.Resampling.BICUBIC
    )
    return torch.cat([processor(list(batch), return_tensors="pt").pixel_values for batch in pictures])


@pytest.fixture(scope="module")
def folder(tmp_path_factory, prepared):
    folder = tmp_path_factory.mktemp("checker") / "safety"
    write_safety_checker(folder)
    checker = theirs.StableDiffusionSafetyChecker.from_pretrained(folder)
    with torch.no_grad():
        embeddings = functional.normalize(checker.visual_projection(checker.vision_model(prepared)[1]))
        # Towards single pictures, away from what all have in common; a threshold that few pictures pass.
        directions = (embeddings - embeddings.mean(0))[torch.randperm(len(embeddings))[:20]]
        checker.concept_embeds.copy_(directions[:17])
        checker.special_care_embeds.copy_(directions[17:])
        for limits, concepts, share in (
            (checker.concept_embeds_weights, checker.concept_embeds, 0.93),
            (checker.special_care_embeds_weights, checker.special_care_embeds, 0.85),
        ):
            limits.copy_(theirs.cosine_distance(embeddings, concepts).quantile(share, dim=0))
    checker.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def checker(folder):
    return SafetyChecker(folder, CPU, torch.float32)


@pytest.fixture(scope="module")
def reference(folder):
    return theirs.StableDiffusionSafetyChecker.from_pretrained(folder)


def flags(checker, pictures):
    return torch.cat([checker.flag(torch.from_numpy(batch)) for batch in pictures]).tolist()


def judge(reference, prepared):
    return reference(prepared, [np.zeros(1)] * len(prepared))[1]


def test_decisions_are_those_of_diffusers(checker, reference, pictures, prepared):
    expected = judge(reference, prepared)
    assert 0.35 < np.mean(expected) < 0.65
    assert flags(checker, pictures) == expected


def test_special_care_decides_some_of_them(folder, checker, pictures):
    careless = SafetyChecker(folder, CPU, torch.float32)
    careless._care_limits.fill_(2)
    changed = sum(a != b for a, b in zip(flags(checker, pictures), flags(careless, pictures), strict=True))
    assert changed >= 3


def test_cosines_are_those_of_diffusers(checker, reference, pictures, prepared):
    with torch.no_grad():
        embeddings = reference.visual_projection(reference.vision_model(prepared)[1])
        found = [
            torch.cat(part) for part in zip(*(checker._cosines(torch.from_numpy(b)) for b in pictures), strict=True)
        ]
    for ours, concepts in zip(found, (reference.special_care_embeds, reference.concept_embeds), strict=True):
        expected = theirs.cosine_distance(embeddings, concepts)
        assert expected.std() > 0.1
        torch.testing.assert_close(ours, expected, atol=2e-4, rtol=0)


def test_pictures_are_prepared_as_pillow_does_it(checker, pictures, prepared):
    ours = torch.cat([checker._prepare(torch.from_numpy(batch)) for batch in pictures])
    levels = ((ours - prepared) * checker._std * 255).abs()
    assert levels.max() < 1.01  # out of 255
    assert (levels > 0.5).float().mean() < 0.001


@pytest.mark.parametrize("care", [-0.2, 0.0004, 0.0006, 0.2])
def test_margins_are_rounded_as_diffusers_does_it(checker, reference, monkeypatch, care):
    """Every ten-thousandth about the two thresholds: of the concept itself, and of the one lowered by special care."""
    margins = torch.arange(-0.0200, 0.0200, 0.0001)
    concepts = (reference.concept_embeds_weights - 1).repeat(len(margins), 1)
    concepts[:, 5] = reference.concept_embeds_weights[5] + margins
    special = (reference.special_care_embeds_weights - 1).repeat(len(margins), 1)
    special[:, 1] = reference.special_care_embeds_weights[1] + care
    planted = {id(reference.special_care_embeds): special, id(reference.concept_embeds): concepts}
    monkeypatch.setattr(theirs, "cosine_distance", lambda embeddings, concepts: planted[id(concepts)])
    expected = judge(reference, torch.zeros(len(margins), 3, SIDE, SIDE))
    assert 0 < sum(expected) < len(margins)
    assert checker._decide(special, concepts).tolist() == expected


def test_a_batch_is_judged_as_its_pictures_are_one_by_one(checker, pictures):
    batch = torch.from_numpy(pictures[1])
    together = checker.flag(batch)
    assert 0 < together.sum() < len(batch)
    assert torch.equal(together, torch.cat([checker.flag(picture[None]) for picture in batch]))


class Operations(TorchDispatchMode):
    """Remembers the name of every operation."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        self.names.add(function.overloadpacket.__name__)
        return function(*arguments, **(keywords or {}))


def test_nothing_waits_for_the_device(checker, pictures):
    with Operations() as seen:
        flagged = checker.flag(torch.from_numpy(pictures[0]))
    assert flagged.dtype == torch.bool and flagged.shape == (PER_SIZE,)
    assert "any" in seen.names  # it does see
    assert not seen.names & {"_local_scalar_dense", "nonzero", "item", "is_nonzero", "equal", "masked_select", "unique"}


@pytest.mark.gpu
def test_on_a_gpu(folder, checker, pictures):
    gpu = torch.device("cuda")
    fast = SafetyChecker(folder, gpu, torch.float32)
    batch = torch.from_numpy(pictures[0]).to(gpu)
    torch.cuda.set_sync_debug_mode("error")
    try:
        flagged = fast.flag(batch)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert flagged.device.type == "cuda"
    assert flagged.tolist() == checker.flag(torch.from_numpy(pictures[0])).tolist()


def test_half_precision_is_for_the_vision_model_alone(folder, checker, pictures):
    half = SafetyChecker(folder, CPU, torch.bfloat16)
    assert half.bytes < 0.6 * checker.bytes
    assert torch.equal(half._limits, checker._limits)
    batch = torch.from_numpy(pictures[0])
    for ours, exact in zip(half._cosines(batch), checker._cosines(batch), strict=True):
        torch.testing.assert_close(ours, exact, atol=0.03, rtol=0)


def test_bytes_are_those_of_the_weights(folder, checker):
    assert checker.bytes == sum(weight.nbytes for weight in load_file(folder / "model.safetensors").values())


def test_the_layout_of_the_hub(tmp_path, folder, checker, pictures):
    """The published checker was written by an older transformers: other names, and each configuration twice."""
    old = shutil.copytree(folder, tmp_path / "old")
    weights = load_file(old / "model.safetensors")
    renamed = {f"vision_model.{name}" if name.startswith("vision_model.") else name: w for name, w in weights.items()}
    positions = torch.arange((SIDE // 8) ** 2 + 1)[None]
    renamed["vision_model.vision_model.embeddings.position_ids"] = positions
    save_file(renamed, old / "model.safetensors", {"format": "pt"})
    config = json.loads((old / "config.json").read_text())
    sizes = {"hidden_size", "image_size", "intermediate_size", "num_attention_heads", "num_hidden_layers", "patch_size"}
    config["vision_config_dict"] = {name: config["vision_config"][name] for name in sizes}
    (old / "config.json").write_text(json.dumps(config))
    assert flags(SafetyChecker(old, CPU, torch.float32), pictures) == flags(checker, pictures)


def test_weights_of_the_variant_fp16(tmp_path, folder, checker):
    copy = shutil.copytree(folder, tmp_path / "copy")
    (copy / "model.safetensors").rename(copy / "model.fp16.safetensors")
    assert SafetyChecker(copy, CPU, torch.float32).bytes == checker.bytes


def test_pickled_weights_are_never_opened(tmp_path, folder):
    copy = shutil.copytree(folder, tmp_path / "copy")
    (copy / "model.safetensors").unlink()
    ran = tmp_path / "ran"
    # A pickle whose author would create a file.
    (copy / "pytorch_model.bin").write_bytes(f"cos\nsystem\n(S'touch {ran}'\ntR.".encode())
    with pytest.raises(NotFound, match=r"pickled weights \(.bin, .ckpt\) are never opened"):
        SafetyChecker(copy, CPU, torch.float32)
    assert not ran.exists()


def test_a_folder_that_is_missing(tmp_path):
    with pytest.raises(NotFound, match="no .safetensors"):
        SafetyChecker(tmp_path / "nowhere", CPU, torch.float32)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("model.safetensors", b"not safetensors"),
        ("model.safetensors", b"\xff" * 64),
        ("config.json", b"[1]"),
        ("config.json", b'{"vision_config": 7}'),
        ("config.json", b'{"projection_dim": -1}'),
        ("config.json", b"{"),
    ],
)
def test_broken_files(tmp_path, folder, name, content):
    copy = shutil.copytree(folder, tmp_path / "copy")
    (copy / name).write_bytes(content)
    with pytest.raises(NotFound, match="cannot be loaded"):
        SafetyChecker(copy, CPU, torch.float32)


def test_random_numbers_do_not_take_the_place_of_missing_weights(tmp_path, folder):
    copy = shutil.copytree(folder, tmp_path / "copy")
    weights = load_file(copy / "model.safetensors")
    del weights["concept_embeds_weights"]
    save_file(weights, copy / "model.safetensors", {"format": "pt"})
    with pytest.raises(NotFound, match="something else"):
        SafetyChecker(copy, CPU, torch.float32)


def test_it_works_without_a_word(folder):
    """transformers complains of a missing torchvision where one of its image processors is imported."""
    code = f"""
import pathlib, sys, torch
from lcm_rt.engine.safety import SafetyChecker
checker = SafetyChecker(pathlib.Path({str(folder)!r}), torch.device("cpu"), torch.float32)
checker.flag(torch.zeros(1, 64, 64, 3, dtype=torch.uint8))
print([name for name in sys.modules if "image_processing_clip" in name or "image_processing_pil_clip" in name])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert (done.stdout.strip(), done.stderr) == ("[]", "")

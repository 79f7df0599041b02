"""Finding and downloading models, against a hub on this machine."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from checkpoints import write_checkpoint, write_controlnet, write_safety_checker
from fake_hub import COMMIT, FakeHub
from huggingface_hub import constants
from loras import write_lora
from safetensors.torch import save_file
from singlefiles import write_single_file

from lcm_rt import catalog, hub, transfer
from lcm_rt.catalog import Choice, ModelSpec, resolve
from lcm_rt.engine.engine import Engine
from lcm_rt.errors import InputError, LcmError, NotFound, Unavailable

ALONE = Choice(safety=False, controlnet=False)
UNET = "unet/diffusion_pytorch_model.safetensors"


def write_scheduler(folder: Path, name: str, **config: Any) -> None:
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps({"_class_name": name} | config))


@pytest.fixture(scope="session")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models to be offered or used as folders; not to be changed."""
    root = tmp_path_factory.mktemp("shelf")
    write_checkpoint(root / "lcm")
    write_checkpoint(root / "plain", distilled=False)
    write_scheduler(root / "plain", "PNDMScheduler")
    write_checkpoint(root / "xl", family="sdxl", distilled=False)
    write_scheduler(root / "xl", "EulerDiscreteScheduler", timestep_spacing="leading")
    write_checkpoint(root / "tiny", tiny_vae=True)
    shutil.copytree(root / "tiny" / "vae", root / "taesd")
    write_controlnet(root / "controlnet")
    write_safety_checker(root / "safety" / "safety_checker")
    (root / "lora").mkdir()
    save_file({"lora_unet.lora_down.weight": torch.zeros(2)}, root / "lora" / "pytorch_lora_weights.safetensors")
    return root


@pytest.fixture
def fake(shelf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    """A hub that offers the models of ``shelf`` and the families' companions, and an empty cache."""
    with FakeHub() as it:
        monkeypatch.setattr(constants, "ENDPOINT", it.url)
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", it.url + "/{repo_id}/resolve/{revision}/{filename}"
        )
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "home" / "hub"))
        for name in ("lcm", "plain", "xl", "tiny"):
            it.add(f"me/{name}", shelf / name)
        it.add("madebyollin/taesd", shelf / "taesd")
        it.add("madebyollin/taesdxl", shelf / "taesd")
        it.add("SimianLuo/LCM_Dreamshaper_v7", shelf / "safety")
        it.add("lllyasviel/control_v11p_sd15_inpaint", shelf / "controlnet", "openrail")
        it.add("latent-consistency/lcm-lora-sdv1-5", shelf / "lora")
        it.add("latent-consistency/lcm-lora-sdxl", shelf / "lora")
        it.add("stable-diffusion-v1-5/stable-diffusion-v1-5", shelf / "plain")
        it.add("stabilityai/stable-diffusion-xl-base-1.0", shelf / "xl")
        yield it


@pytest.fixture
def pull(fake: FakeHub, tmp_path: Path) -> Callable[..., subprocess.Popen[str]]:
    """``lcm-rt pull`` as a process of its own, with the same cache as this one."""

    def start(*words: str, **variables: str) -> subprocess.Popen[str]:
        home = {"HF_HOME": str(tmp_path / "home"), "HF_ENDPOINT": fake.url, "COLUMNS": "200"}
        return subprocess.Popen(
            [sys.executable, "-m", "lcm_rt", "pull", *words],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | home | variables,
        )

    return start


def said(process: subprocess.Popen[str]) -> tuple[int, str]:
    out, err = process.communicate(timeout=60)
    return process.returncode, out + err


def copy(folder: Path, to: Path) -> Path:
    return Path(shutil.copytree(folder, to))


def whole(parts: hub.Parts, *names: str) -> bool:
    """Exactly the named parts are set, and all that are set exist."""
    fields = ("config", "unet", "tiny_vae", "lcm_lora", "controlnet", "safety")
    given = {name: path for name in fields if (path := getattr(parts, name)) is not None}
    return given.keys() == set(names) and all(path.exists() for path in [parts.base, *given.values()])


# ---- downloading -----------------------------------------------------------------------------------------------------


def test_a_killed_pull_goes_on_where_it_ended(
    fake: FakeHub, pull: Callable[..., subprocess.Popen[str]], shelf: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    size, half = (shelf / "lcm" / UNET).stat().st_size, (shelf / "lcm" / UNET).stat().st_size // 2
    gate = fake.hold(UNET, half)
    killed = pull("mine=me/lcm", "--no-safety", "--no-controlnet")
    assert gate.reached.wait(60)
    blobs = tmp_path / "home" / "hub" / "models--me--lcm" / "blobs"
    while not any(path.stat().st_size == half for path in blobs.glob("*.incomplete")):
        assert killed.poll() is None
    killed.send_signal(signal.SIGKILL)
    said(killed)
    with pytest.raises(Unavailable):
        hub.plan(resolve("mine=me/lcm"), ALONE, online=False)
    assert hub.bytes_here(resolve("mine=me/lcm")) > half

    code, text = said(pull("mine=me/lcm", "--no-safety", "--no-controlnet"))
    assert code == 0, text
    assert fake.served["me/lcm", UNET] == [(0, half), (half, size)]
    assert "licence: mit" in text and "MB to download" in text and UNET in text
    assert (tmp_path / "home/hub/models--me--lcm/snapshots" / COMMIT / UNET).read_bytes() == (
        shelf / "lcm" / UNET
    ).read_bytes()

    fake.stop()
    for variables in ({}, {"HF_HUB_OFFLINE": "1"}):
        code, text = said(pull("mine=me/lcm", "--no-safety", "--no-controlnet", **variables))
        assert (code, "was all there" in text) == (0, True), text
    parts = hub.locate(resolve("mine=me/lcm"), ALONE)
    assert whole(parts, "tiny_vae") and parts.distillation == "lcm"


def test_progress_is_told_and_a_cut_connection_is_picked_up(fake: FakeHub, shelf: Path) -> None:
    size = (shelf / "lcm" / UNET).stat().st_size
    gate = fake.hold(UNET, 300_000, cut=True)
    heard: dict[str, list[int]] = {}
    hub.locate(
        resolve("mine=me/lcm"), ALONE, lambda file, done: heard.setdefault(f"{file.repo}:{file.name}", []).append(done)
    )
    assert gate.reached.is_set()
    assert fake.served["me/lcm", UNET] == [(0, 300_000), (300_000, size)]
    unet = heard[f"me/lcm:{UNET}"]
    assert unet == sorted(unet) and unet[-1] == size and len(unet) > 1
    assert f"me/lcm:{UNET.replace('unet', 'vae')}" not in heard  # TAESD takes its place
    assert heard["madebyollin/taesd:diffusion_pytorch_model.safetensors"]


def test_a_server_without_ranges_sends_all_again(fake: FakeHub, shelf: Path) -> None:
    fake.ranges = False
    fake.hold(UNET, 300_000, cut=True)
    parts = hub.locate(resolve("mine=me/lcm"), ALONE)
    assert (parts.base / UNET).read_bytes() == (shelf / "lcm" / UNET).read_bytes()
    assert len(fake.served["me/lcm", UNET]) == 2


def test_damaged_bytes_are_not_kept(fake: FakeHub, shelf: Path, tmp_path: Path) -> None:
    plan = hub.plan(resolve("mine=me/lcm"), ALONE)
    blobs = tmp_path / "home" / "hub" / "models--me--lcm" / "blobs"
    blobs.mkdir(parents=True, exist_ok=True)
    etag = hashlib.sha256((shelf / "lcm" / UNET).read_bytes()).hexdigest()
    (blobs / f"{etag}.incomplete").write_bytes(b"another file's")
    with pytest.raises(Unavailable, match="damaged"):
        hub.fetch(plan)
    assert not (blobs / etag).exists()
    assert (hub.locate(resolve("mine=me/lcm"), ALONE).base / UNET).is_file()


def test_two_at_a_time_fetch_each_byte_once(fake: FakeHub, shelf: Path) -> None:
    gate = fake.hold(UNET, 300_000)
    waiting = threading.Event()

    def watch(file: transfer.File, done: int) -> None:
        if file.name == UNET and done == 300_000:
            waiting.set()

    got: list[hub.Parts] = []
    threads = [
        threading.Thread(target=lambda: got.append(hub.locate(resolve("mine=me/lcm"), ALONE, watch))) for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    assert gate.reached.wait(30) and waiting.wait(30)
    gate.open()
    for thread in threads:
        thread.join(30)
    assert len(got) == 2 and got[0] == got[1]
    assert fake.bytes_served("me/lcm", UNET) == (shelf / "lcm" / UNET).stat().st_size


def test_the_engine_tells_how_much_of_the_whole_download_is_done(fake: FakeHub) -> None:
    told: list[float] = []
    engine = Engine(device="cpu", choice=ALONE)
    engine.locate(
        resolve("mine=me/lcm"), lambda stage, progress: told.append(progress) if stage == "download" else None
    )
    assert len(told) > 5
    assert told == sorted(told)
    assert told[-1] == 1


def test_a_token_stays_with_the_hub(fake: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    hub.locate(resolve("mine=me/lcm"), ALONE)
    assert fake.tokens["127.0.0.1"] == {"Bearer hf_secret"}
    assert fake.tokens["localhost"] == {None}


def test_the_commit_stays_though_parts_are_added(fake: FakeHub) -> None:
    hub.locate(resolve("mine=me/lcm"), ALONE)
    fake.asked.clear()
    parts = hub.locate(resolve("mine=me/lcm"), Choice(vae="full", safety=False, controlnet=False))
    assert whole(parts) and (parts.base / "vae" / "config.json").is_file()
    assert f"GET api/models/me/lcm/revision/{COMMIT}" in fake.asked
    assert not any("unet" in line for line in fake.asked)


def test_half_precision_and_shards_are_chosen_by_name(fake: FakeHub, shelf: Path, tmp_path: Path) -> None:
    folder = copy(shelf / "lcm", tmp_path / "variants")
    text = folder / "text_encoder"
    shutil.copy(text / "model.safetensors", text / "model.fp16.safetensors")
    shutil.copy(text / "model.safetensors", text / "model.non_ema.safetensors")
    weights = folder / UNET
    for name in ("-00001-of-00002", "-00002-of-00002", ".fp16-00001-of-00002"):  # half precision lacks its second
        shutil.copy(weights, weights.with_name(f"diffusion_pytorch_model{name}.safetensors"))
    weights.unlink()
    (folder / "unet" / "diffusion_pytorch_model.safetensors.index.json").write_text("{}")
    (folder / "unet" / "diffusion_pytorch_model.safetensors.index.fp16.json").write_text("{}")
    fake.add("me/variants", folder)
    base = hub.locate(resolve("mine=me/variants"), ALONE).base
    assert {path.name for path in (base / "text_encoder").iterdir()} == {"config.json", "model.fp16.safetensors"}
    assert {path.name for path in (base / "unet").iterdir()} == {
        "config.json",
        "diffusion_pytorch_model.safetensors.index.json",
        "diffusion_pytorch_model-00001-of-00002.safetensors",
        "diffusion_pytorch_model-00002-of-00002.safetensors",
    }
    fake.stop()
    assert hub.locate(resolve("mine=me/variants"), ALONE).base == base


def test_a_full_disk_is_told_before_and_while(fake: FakeHub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(0, 0, 100_000))  # type: ignore[attr-defined]
        with pytest.raises(Unavailable, match="make room"):
            hub.locate(resolve("mine=me/lcm"), ALONE)
    assert not fake.served["me/lcm", UNET]

    def fill(*args: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(transfer, "_append", fill)
    with pytest.raises(Unavailable, match="is full"):
        hub.locate(resolve("mine=me/lcm"), ALONE)


# ---- what is refused -------------------------------------------------------------------------------------------------


def test_pickled_weights_are_refused_before_anything_is_fetched(
    fake: FakeHub, pull: Callable[..., subprocess.Popen[str]], shelf: Path, tmp_path: Path
) -> None:
    folder = copy(shelf / "lcm", tmp_path / "pickled")
    (folder / UNET).rename(folder / "unet" / "diffusion_pytorch_model.bin")
    fake.add("me/pickled", folder)
    code, text = said(pull("mine=me/pickled"))
    assert code == 1 and "pickle" in text and text.count("\n") == 1
    assert not fake.served
    with pytest.raises(NotFound, match="pickle"):
        hub.locate(resolve(f"mine={folder}"), ALONE)


class Canary:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


@pytest.mark.parametrize("suffix", [".ckpt", ".bin", ".pt", ".PTH"])
def test_a_pickle_is_never_opened(fake: FakeHub, tmp_path: Path, suffix: str) -> None:
    file = tmp_path / f"model{suffix}"
    file.write_bytes(pickle.dumps(Canary(tmp_path / "it ran")))
    for reference in (str(file), f"me/lcm:model{suffix}", f"me/lcm:model{suffix}@main"):
        with pytest.raises(InputError, match="never opened"):
            resolve(f"mine={reference}")
    disguised = file.rename(tmp_path / "model.safetensors")
    with pytest.raises(InputError, match="not a safetensors file"):
        hub.locate(resolve(f"mine={disguised}"), ALONE)
    assert not (tmp_path / "it ran").exists() and not fake.asked


@pytest.mark.parametrize(
    "content", [b"", b"\xff" * 64, b"\x02" + bytes(7) + b"[]", b"\x04" + bytes(7) + b"\xff\xfe{}", b"[" * 100_000]
)
def test_hostile_headers_are_input_errors(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "x.safetensors"
    file.write_bytes(content)
    with pytest.raises(InputError):
        hub.locate(resolve(f"mine={file}"), ALONE)


@pytest.mark.parametrize(
    "tensors, complaint",
    [
        (["lora_unet_down.lora_down.weight"], "LoRA"),
        (["model.diffusion_model.double_blocks.0.img_attn.qkv.weight"], "not a whole checkpoint"),
        (["model.diffusion_model.joint_blocks.0.x", "text_encoders.t5xxl.x"], "not a whole checkpoint"),
        (["model.diffusion_model.input_blocks.0.0.weight"], "not a whole checkpoint"),
        (["model.diffusion_model.input_blocks.0.0.weight", "conditioner.embedders.0.model.x"], "not a whole"),
        (["model.diffusion_model.input_blocks.0.0.weight", "cond_stage_model.model.x"], "Stable Diffusion 2"),
    ],
)
def test_other_files_are_refused_in_words(fake: FakeHub, tmp_path: Path, tensors: list[str], complaint: str) -> None:
    folder = tmp_path / "files"
    folder.mkdir()
    save_file({name: torch.zeros(1) for name in tensors}, folder / "x.safetensors")
    fake.add("me/files", folder)
    for reference in (folder / "x.safetensors", "me/files:x.safetensors"):
        with pytest.raises(InputError, match=complaint):
            hub.locate(resolve(f"mine={reference}"), ALONE)


def test_what_the_hub_does_not_give(fake: FakeHub, shelf: Path, tmp_path: Path) -> None:
    fake.gated.add("me/plain")
    fake.add("me/empty", (tmp_path / "empty"))
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "model.safetensors").touch()
    flux = tmp_path / "flux"
    shutil.copytree(shelf / "lcm" / "unet", flux / "transformer")
    (flux / "model_index.json").write_text("{}")
    fake.add("me/flux", flux)
    for reference, kind, words in [
        ("me/none", NotFound, "no repository"),
        ("me/lcm@v2", NotFound, "no revision v2"),
        ("me/lcm:attic", NotFound, "model_index.json"),
        ("me/plain", NotFound, "HF_TOKEN"),
        ("me/empty", NotFound, "me/empty:model.safetensors"),
        ("me/flux", InputError, "families"),
        ("me--x/y..z", InputError, "name of a repository"),
    ]:
        with pytest.raises(kind, match=words):
            hub.locate(resolve(f"mine={reference}"), ALONE)
    fake.stop()
    with pytest.raises(Unavailable, match="cannot be reached"):
        hub.locate(resolve("mine=me/tiny"), ALONE)


def test_offline_mode_is_told(pull: Callable[..., subprocess.Popen[str]]) -> None:
    code, text = said(pull("mine=me/lcm", HF_HUB_OFFLINE="1"))
    assert (code, text.count("\n")) == (1, 1) and "HF_HUB_OFFLINE" in text


# ---- what goes with what ---------------------------------------------------------------------------------------------


def test_a_row_is_the_whole_truth(fake: FakeHub, shelf: Path, tmp_path: Path) -> None:
    fake.add("me/unet", shelf / "lcm" / "unet")
    fake.add("me/safe", shelf / "safety")
    spec = ModelSpec(
        name="row",
        source="me/plain",
        licence="own",
        unet="me/unet",
        tiny_vae="madebyollin/taesd",
        controlnet="lllyasviel/control_v11p_sd15_inpaint",
        safety="me/safe:safety_checker",
    )
    plan = hub.plan(spec, Choice())
    assert plan.licences["me/plain"] == "own" and plan.licences["me/safe"] == "mit"
    assert plan.licences["madebyollin/taesd"] == "MIT"
    parts = hub.fetch(plan)
    assert whole(parts, "unet", "tiny_vae", "controlnet", "safety")
    assert not (parts.base / "vae").exists() and not (parts.base / UNET).exists()
    assert whole(hub.locate(spec, Choice(safety=False, controlnet=False)), "unet", "tiny_vae")
    full = hub.locate(spec, Choice(vae="full"))
    assert whole(full, "unet", "controlnet", "safety") and (full.base / "vae" / "config.json").is_file()


def test_the_embedded_model_needs_no_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    for vae in (None, "tiny", "full"):
        parts = hub.locate(resolve("embedded"), Choice(vae=vae))
        base = Path(catalog.CATALOG["embedded"].source)
        assert parts == hub.Parts(base, controlnet=base / "controlnet")


def test_a_plain_folder_gets_the_lora_of_its_family_and_nothing_unasked(fake: FakeHub, shelf: Path) -> None:
    parts = hub.locate(resolve(f"mine={shelf / 'plain'}"), Choice())
    assert whole(parts, "lcm_lora") and parts.base == shelf / "plain"
    assert "lcm-lora-sdv1-5" in str(parts.lcm_lora)
    assert whole(hub.locate(resolve(f"mine={shelf / 'plain'}"), Choice(vae="tiny")), "lcm_lora", "tiny_vae")
    xl = hub.locate(resolve(f"mine={shelf / 'xl'}"), Choice(vae="tiny"))
    assert whole(xl, "lcm_lora", "tiny_vae")
    assert "lcm-lora-sdxl" in str(xl.lcm_lora) and "taesdxl" in str(xl.tiny_vae)


def test_a_folder_uses_what_it_holds_itself(fake: FakeHub, shelf: Path, tmp_path: Path) -> None:
    folder = copy(shelf / "lcm", tmp_path / "own")
    copy(shelf / "controlnet", folder / "controlnet")
    copy(shelf / "safety" / "safety_checker", folder / "safety_checker")
    parts = hub.locate(resolve(f"mine={folder}"), Choice())
    assert parts == hub.Parts(folder, controlnet=folder / "controlnet", safety=folder / "safety_checker")
    assert hub.locate(resolve(f"mine={folder}"), ALONE) == hub.Parts(folder)
    fake.add("me/own", folder)
    assert "me--own" in str(hub.locate(resolve("mine=me/own"), Choice()).safety)
    (folder / "safety_checker" / "model.safetensors").rename(folder / "safety_checker" / "pytorch_model.bin")
    assert whole(hub.locate(resolve(f"mine={folder}"), Choice()), "controlnet")


def test_a_repository_gets_its_familys_companions(fake: FakeHub) -> None:
    parts = hub.locate(resolve("mine=me/plain"), Choice())
    assert whole(parts, "tiny_vae", "lcm_lora", "controlnet", "safety")
    assert whole(hub.locate(resolve("mine=me/xl"), Choice()), "tiny_vae", "lcm_lora", "safety")
    assert whole(hub.locate(resolve("mine=me/tiny"), ALONE))  # it has a tiny VAE of its own


@pytest.mark.parametrize(
    "scheduler, distilled, distillation, lora",
    [
        ({"name": "EulerAncestralDiscreteScheduler", "timestep_spacing": "trailing"}, False, "turbo", False),
        ({"name": "EulerDiscreteScheduler", "timestep_spacing": "leading"}, False, "lcm", True),
        ({"name": "DDIMScheduler", "timestep_spacing": "trailing"}, False, "lcm", True),
        ({"name": "LCMScheduler"}, False, "lcm", False),
        ({"name": "EulerDiscreteScheduler", "timestep_spacing": "trailing"}, True, "lcm", False),
    ],
)
def test_what_is_distilled(
    fake: FakeHub,
    shelf: Path,
    tmp_path: Path,
    scheduler: dict[str, str],
    distilled: bool,
    distillation: Literal["lcm", "turbo"],
    lora: bool,
) -> None:
    folder = copy(shelf / ("lcm" if distilled else "plain"), tmp_path / "model")
    write_scheduler(folder, **scheduler)
    parts = hub.locate(resolve(f"mine={folder}"), Choice())
    assert (parts.distillation, parts.lcm_lora is not None) == (distillation, lora)


def test_stable_diffusion_2_has_no_lora_and_no_controlnet(fake: FakeHub, shelf: Path, tmp_path: Path) -> None:
    folder = copy(shelf / "plain", tmp_path / "sd2")
    config = json.loads((folder / "unet" / "config.json").read_text()) | {"cross_attention_dim": 1024}
    (folder / "unet" / "config.json").write_text(json.dumps(config))
    fake.add("me/sd2", folder)
    with pytest.raises(NotFound, match="Stable Diffusion 2"):
        hub.locate(resolve("mine=me/sd2"), Choice())
    write_scheduler(folder, "EulerDiscreteScheduler", timestep_spacing="trailing")
    assert whole(hub.locate(resolve(f"mine={folder}"), Choice(vae="tiny")), "tiny_vae")


def test_without_the_lora_it_is_told_how_to_get_it(fake: FakeHub, shelf: Path) -> None:
    fake.stop()
    with pytest.raises(NotFound, match=r"lcm-rt pull mine=.*LCMScheduler"):
        hub.locate(resolve(f"mine={shelf / 'plain'}"), Choice())


@pytest.mark.parametrize(
    "family, text", [("sd", "cond_stage_model.transformer.x"), ("sdxl", "conditioner.embedders.1.x")]
)
def test_a_single_file_gets_the_configuration_of_its_family(
    fake: FakeHub, tmp_path: Path, family: str, text: str
) -> None:
    folder = tmp_path / "files"
    folder.mkdir()
    tensors = {"model.diffusion_model.input_blocks.0.0.weight": torch.zeros(50_000), text: torch.zeros(1)}
    save_file(tensors, folder / "x.safetensors")
    save_file(tensors | {"model.diffusion_model.time_embed.cond_proj.weight": torch.zeros(1)}, folder / "y.safetensors")
    fake.add("me/files", folder)
    parts = hub.locate(resolve(f"mine={folder / 'x.safetensors'}"), Choice())
    assert whole(parts, "config", "lcm_lora") and parts.base == folder / "x.safetensors"
    assert parts.config is not None
    files = [path.relative_to(parts.config).as_posix() for path in parts.config.rglob("*.*") if path.is_file()]
    assert {"model_index.json", "tokenizer/vocab.json", "unet/config.json", "vae/config.json"} <= set(files)
    assert all(name.endswith((".json", ".txt")) for name in files)
    assert ("tokenizer_2/merges.txt" in files) == (family == "sdxl")
    assert whole(hub.locate(resolve(f"mine={folder / 'y.safetensors'}"), Choice()), "config")

    plan = hub.plan(resolve("mine=me/files:x.safetensors"), ALONE)
    assert fake.bytes_served("me/files", "x.safetensors") < 150_000  # the header alone
    assert whole(hub.fetch(plan), "config", "lcm_lora", "tiny_vae")
    fake.stop()
    assert hub.locate(resolve("mine=me/files:x.safetensors"), ALONE) == plan.parts


def test_another_revision_is_another_folder(fake: FakeHub) -> None:
    parts = hub.locate(resolve(f"mine=me/lcm@{COMMIT}"), ALONE)
    assert parts.base.name == COMMIT
    with pytest.raises(LcmError):  # nobody said that it is main
        hub.plan(resolve("mine=me/lcm"), ALONE, online=False)


def test_what_was_pulled_paints_without_a_network(
    fake: FakeHub, pull: Callable[..., subprocess.Popen[str]], shelf: Path, tmp_path: Path
) -> None:
    def paint(*models: str, **variables: str) -> str:
        words = ["generate", "a red cat", "--seed", "1", "-o", str(tmp_path / "cat.png")]
        words += [word for model in models for word in ("--model", model)]
        home = {"HF_HOME": str(tmp_path / "home"), "LCM_RT_DATA_DIR": str(tmp_path / "data")}
        done = subprocess.run(
            [sys.executable, "-m", "lcm_rt", *words],
            text=True,
            capture_output=True,
            timeout=100,
            env=os.environ | home | variables,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert said(pull("mine=me/lcm"))[0] == 0
    single = tmp_path / "one.safetensors"
    write_single_file(single, shelf / "plain")
    lora = tmp_path / "lora"
    lora.mkdir()
    write_lora(lora / "pytorch_lora_weights.safetensors", shelf / "plain", text_encoder=False)
    fake.add("latent-consistency/lcm-lora-sdv1-5", lora)
    # A single file is local, but what its family shares with it is not.
    assert "64x64, one, seed 1, 4 steps" in paint(f"one={single}", HF_ENDPOINT=fake.url)
    fake.stop()
    assert "64x64, mine, seed 1, 4 steps" in paint("mine=me/lcm", f"one={single}", HF_HUB_OFFLINE="1")

"""Where the files of a model lie on this machine; has downloaded what is missing. Knows no torch and no numpy.

The cache, its layout and its variables (``HF_HOME``, ``HF_ENDPOINT``, ``HF_TOKEN``, ``HF_HUB_OFFLINE``) are those of
huggingface_hub, so files that another program fetched are found.

What is whole on this machine is used without asking the network. A repository stays at the commit that was fetched
first; another one is had by naming it (``@REVISION``) or by deleting the folder in the cache.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from huggingface_hub import HfApi, constants
from huggingface_hub.errors import SafetensorsParsingError

from lcm_rt.catalog import (
    FAMILIES,
    LICENCES,
    PICKLES,
    Choice,
    Companions,
    Family,
    ModelSpec,
    Place,
    licences,
    read_reference,
)
from lcm_rt.errors import InputError, LcmError, NotFound, Unavailable
from lcm_rt.transfer import File, Report, check_space, download, plain_words, repo_folder, transfer

MAX_HEADER = 100_000_000  # bytes; the format's own limit

_COMMIT = re.compile(r"[0-9a-f]{40}")
_WEIGHTS = re.compile(
    r"(?P<stem>diffusion_pytorch_model|model)(?P<variant>\.fp16)?(-(?P<shard>\d{5})-of-(?P<shards>\d{5}))?"
    r"(?P<old_variant>\.fp16)?\.safetensors"
)


@dataclass(frozen=True, slots=True)
class Parts:
    """Where the parts of one model lie.

    Args:
        base: a folder in diffusers format, or one ``.safetensors`` checkpoint.
        distillation: how it is sampled.
        config: where ``base`` is one file, a diffusers folder with the configuration and the tokenizers of its family,
            without weights.
        unet: folder with ``config.json`` and safetensors, in place of the UNet of ``base``.
        tiny_vae: folder, in place of the VAE of ``base``.
        lcm_lora: ``.safetensors`` file.
        controlnet: folder.
        safety: folder.
    """

    base: Path
    distillation: Literal["lcm", "turbo"] = "lcm"
    config: Path | None = None
    unet: Path | None = None
    tiny_vae: Path | None = None
    lcm_lora: Path | None = None
    controlnet: Path | None = None
    safety: Path | None = None


@dataclass(frozen=True, slots=True)
class Plan:
    """What a model needs: where its parts lie or will lie, every file of the hub that it takes, and whose terms apply.

    ``licences`` is by repository. ``refs`` are (repository, branch or tag, commit).
    """

    parts: Parts
    files: tuple[File, ...]
    licences: dict[str, str]
    refs: frozenset[tuple[str, str, str]]

    @property
    def missing(self) -> tuple[File, ...]:
        return tuple(file for file in self.files if not file.present)


def _silence(file: File, done: int) -> None:
    pass


def locate(spec: ModelSpec, choice: Choice, report: Report = _silence) -> Parts:
    """Where the parts of ``spec`` lie; downloads what is missing, and returns when all is here.

    Raises:
        NotFound: a file, folder or repository is not there, is not open to us, or has no weights as safetensors.
        InputError: it is a kind of model, or a form of file, that is not served here.
        Unavailable: the hub cannot be reached and the model is not whole on this machine, or the disk is full.
    """
    return fetch(plan(spec, choice), report)


def plan(spec: ModelSpec, choice: Choice, *, online: bool = True) -> Plan:
    """What ``locate`` would download; fetches configuration files of some kilobytes at most.

    Args:
        online: ask the hub about what is not whole on this machine; otherwise that raises ``Unavailable``.

    Raises: as ``locate``.
    """
    planner = _Planner(spec, choice, online)
    parts = planner.parts()
    return Plan(parts, tuple(planner.files.values()), planner.licences, frozenset(planner.refs))


def fetch(plan: Plan, report: Report = _silence) -> Parts:
    """Download the missing files of ``plan``, small ones first, and say where the parts lie.

    Raises: ``NotFound`` and ``Unavailable`` as ``locate``.
    """
    if not plan.missing:
        return plan.parts
    with plain_words(plan.missing[0].repo):
        check_space(plan.missing)
        for repo, name, commit in plan.refs:
            ref = repo_folder(repo) / "refs" / name
            ref.parent.mkdir(parents=True, exist_ok=True)
            ref.write_text(commit)
    # Where the weights of a folder are, its texts are too: so a look at the cache tells whether it is whole.
    for file in sorted(plan.missing, key=lambda file: file.name.endswith(".safetensors")):
        with plain_words(file.repo):
            if file.name.endswith(".safetensors"):
                transfer(file, report)
            download(file)
        report(file, file.size)
    return plan.parts


def bytes_here(spec: ModelSpec) -> int:
    """Bytes on this machine of the repositories that ``spec`` names, whether it needs them all or not."""
    places = (read_reference(reference) for reference in licences(spec))
    blobs = (repo_folder(place.repo) / "blobs" for place in places if isinstance(place, Place))
    return sum(file.stat().st_size for folder in blobs if folder.is_dir() for file in folder.iterdir())


# ---- which files there are -------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Tree:
    """The files of one reference: on this machine, or as the hub lists them.

    Args:
        name: for messages.
        root: where they lie, or will.
        sizes: bytes by name, ``/``-separated and relative to ``root``, two levels deep.
        repo: of the hub; empty for what is simply a path.
        commit: of the repository.
        prefix: what turns a name here into a name in the repository.
        file: name of the one file that the reference means, if it does not mean a folder.
    """

    name: str
    root: Path
    sizes: dict[str, int]
    repo: str = ""
    commit: str = ""
    prefix: str = ""
    file: str | None = None

    def within(self, folder: str) -> list[str]:
        """Names of the files that lie directly in ``folder`` (``""`` is the root), without their folder."""
        start = f"{folder}/" if folder else ""
        rest = (name.removeprefix(start) for name in self.sizes if name.startswith(start))
        return sorted(name for name in rest if "/" not in name)


Choose = Callable[[_Tree], list[str]]
"""The names that are needed of a tree; raises where they are not whole."""


def _on_disk(name: str, root: Path, file: str | None = None) -> _Tree:
    found = [path for pattern in ("*", "*/*") for path in root.glob(pattern)] if file is None else [root / file]
    sizes = {path.relative_to(root).as_posix(): path.stat().st_size for path in found if path.is_file()}
    return _Tree(name, root, sizes, file=file)


def _cached(place: Place) -> _Tree | None:
    """What the cache holds of ``place``, which may be a part of what is needed."""
    commit = place.revision
    if not _COMMIT.fullmatch(commit):
        try:
            commit = (repo_folder(place.repo) / "refs" / place.revision).read_text().strip()
        except (OSError, UnicodeDecodeError):
            return None
        if not _COMMIT.fullmatch(commit):
            return None
    prefix, file = _split(place.part)
    tree = _on_disk(str(place.repo), repo_folder(place.repo) / "snapshots" / commit / prefix, file)
    return replace(tree, repo=place.repo, commit=commit, prefix=prefix)


def _split(part: str) -> tuple[str, str | None]:
    """The folder of a part (ending in ``/``, or empty) and its file, if it names one."""
    path = PurePosixPath(part)
    if path.suffix == ".safetensors":
        return ("" if len(path.parts) == 1 else f"{path.parent}/"), path.name
    return (f"{part}/" if part else ""), None


# ---- which of them are needed ----------------------------------------------------------------------------------------


def _texts(tree: _Tree, folder: str) -> list[str]:
    """Configuration and vocabulary of ``folder``; the indexes of weights come with the weights."""
    names = (name for name in tree.within(folder) if name.endswith((".json", ".txt")) and ".index." not in name)
    return [f"{folder}/{name}" if folder else name for name in names]


def _weights(names: Collection[str]) -> list[str]:
    """The files of one whole set of weights: of half precision if there is one, else the plain one, else none."""
    found = [match for name in names if (match := _WEIGHTS.fullmatch(name))]
    for half in (True, False):
        chosen = [match for match in found if bool(match["variant"] or match["old_variant"]) == half]
        for match in chosen:
            if match["shards"] is None:
                return [match[0]]
        for match in chosen:
            shards = {other["shard"]: other[0] for other in chosen if other["shards"] == match["shards"]}
            indexes = [
                name
                for name in names
                if name.startswith(match["stem"]) and ".safetensors.index." in name and (".fp16." in name) == half
            ]
            if indexes and len(shards) == int(match["shards"]):
                return [*indexes, *shards.values()]
    return []


def _network(tree: _Tree, folder: str = "") -> list[str]:
    """The files of a folder with ``config.json`` and weights."""
    names = tree.within(folder)
    where = f"{tree.name}:{folder}" if folder else tree.name
    weights = _weights(names)
    if not weights:
        pickled = next((name for name in names if name.endswith(PICKLES)), None)
        if pickled:
            raise NotFound(
                f"{where} has its weights only as a pickle ({pickled}), which can run code when it is opened and "
                "therefore never is; ask its author for .safetensors"
            )
        raise NotFound(f"{where} holds no whole set of .safetensors weights")
    if "config.json" not in names:
        raise NotFound(f"{where} holds no config.json")
    return _texts(tree, folder) + [f"{folder}/{name}" if folder else name for name in weights]


def _tokenizer(tree: _Tree, folder: str) -> list[str]:
    names = tree.within(folder)
    if "tokenizer.json" not in names and not {"vocab.json", "merges.txt"} <= set(names):
        raise NotFound(f"{tree.name}:{folder} holds no tokenizer.json, nor vocab.json with merges.txt")
    return _texts(tree, folder)


def _components(tree: _Tree) -> list[str]:
    """The folders of a pipeline whose files are always needed, those of a second text encoder included."""
    if "model_index.json" not in tree.sizes:
        files = [name for name in tree.within("") if name.endswith(".safetensors")]
        hint = f"; name its checkpoint: {tree.name}:{files[0]}" if files and tree.repo else ""
        raise NotFound(f"{tree.name} holds no model_index.json: not a model in diffusers format{hint}")
    if not tree.within("unet") and tree.within("transformer"):
        raise InputError("model", f"{tree.name} is not of the Stable Diffusion 1, 2 or XL families")
    second = ["text_encoder_2", "tokenizer_2"]
    index = tree.root / "model_index.json"
    entries = read_json(index) if index.is_file() else {}
    # A folder that was fetched in part may lack all of them, and an absent component is written as [null, null].
    return ["text_encoder", "tokenizer"] + [
        name for name in second if tree.within(name) or entries.get(name, [None]) not in ([None], [None, None])
    ]


def _pipeline(tree: _Tree, *, unet: bool, vae: bool) -> list[str]:
    """The files of a folder in diffusers format, with its UNet and its VAE or without."""
    files = ["model_index.json"]
    for name in _components(tree):
        files += _tokenizer(tree, name) if name.startswith("tokenizer") else _network(tree, name)
    files += _network(tree, "unet") if unet else []
    files += _network(tree, "vae") if vae else []
    if "scheduler/scheduler_config.json" not in tree.sizes:
        raise NotFound(f"{tree.name} holds no scheduler/scheduler_config.json")
    return [*files, "scheduler/scheduler_config.json"]


def _configuration(tree: _Tree) -> list[str]:
    """What ``_pipeline`` has, without weights."""
    files = ["model_index.json", "scheduler/scheduler_config.json"]
    for name in [*_components(tree), "unet", "vae"]:
        files += _tokenizer(tree, name) if name.startswith("tokenizer") else [f"{name}/config.json"]
    absent = [name for name in files if name not in tree.sizes]
    if absent:
        raise NotFound(f"{tree.name} holds no {absent[0]}")
    return files


def _one_file(tree: _Tree) -> list[str]:
    """The file that the reference names, or the LoRA of the folder."""
    name = tree.file or "pytorch_lora_weights.safetensors"
    if name not in tree.sizes:
        raise NotFound(f"{tree.name} holds no {tree.prefix}{name}")
    return [name]


# ---- what a model is, and what goes with it --------------------------------------------------------------------------


class _Planner:
    """Gathers what one model needs; every tree that it looks at adds its files and its licence."""

    def __init__(self, spec: ModelSpec, choice: Choice, online: bool) -> None:
        self.spec, self.choice, self.online = spec, choice, online
        self.files: dict[tuple[str, str], File] = {}
        self.licences: dict[str, str] = {}
        self.refs: set[tuple[str, str, str]] = set()
        self._listed: dict[tuple[str, str], tuple[str, dict[str, int]]] = {}
        self._known = dict(LICENCES)

    def parts(self) -> Parts:
        where = read_reference(self.spec.source)
        if self.spec.complete and isinstance(where, Place):
            self._known[where.repo] = self.spec.licence
        is_file = where.is_file() if isinstance(where, Path) else _split(where.part)[1] is not None
        return self._of_file(where) if is_file else self._of_folder(where)

    def _of_folder(self, where: Path | Place) -> Parts:
        spec, shared = self.spec, isinstance(where, Place)
        tiny = self._wants_tiny(shared)
        base = self._tree(spec.source, partial(_pipeline, unet=spec.unet is None, vae=not tiny))
        vae = self._json(base, "model_index.json").get("vae")
        if tiny and vae == ["diffusers", "AutoencoderTiny"]:  # a tiny one of its own need not speak TAESD's latents
            tiny = False
            base = self._tree(spec.source, partial(_pipeline, unet=spec.unet is None, vae=True))
        scheduler = self._json(base, "scheduler/scheduler_config.json")
        sampler = str(scheduler.get("_class_name"))
        turbo = sampler.startswith("Euler") and scheduler.get("timestep_spacing") == "trailing"
        if spec.complete:
            parts = Parts(base.root, "turbo" if turbo else "lcm")
            parts = replace(parts, lcm_lora=self._lora(spec.lcm_lora), unet=self._folder(spec.unet))
            return self._with_companions(parts, spec.tiny_vae if tiny else None, spec.controlnet, spec.safety)

        unet = self._json(base, "unet/config.json")
        family: Family = "sd"
        if "text_encoder_2" in _components(base):
            family = "sdxl"
        elif unet.get("cross_attention_dim") == 1024:
            family = "sd2"
        companions = FAMILIES[family]
        guided = unet.get("time_cond_proj_dim") is not None
        merged = guided or sampler == "LCMScheduler"
        parts = Parts(base.root, "turbo" if turbo and not merged else "lcm")
        if not merged and not turbo:
            parts = replace(parts, lcm_lora=self._family_lora(companions))
        # An inpainting UNet has no use for the ControlNet, nor would it fit.
        controlnet = companions.controlnet if shared and unet.get("in_channels") == 4 else None
        safety = companions.safety if shared else None
        return self._with_companions(
            parts,
            companions.tiny_vae if tiny else None,
            self._own(base, "controlnet") or controlnet,
            self._own(base, "safety_checker") or safety,
        )

    def _of_file(self, where: Path | Place) -> Parts:
        tree = self._tree(self.spec.source, _one_file)
        family, guided = _kind_of_checkpoint(tree.name, self._tensors(tree))
        companions = FAMILIES[family]
        if companions.config is None:
            raise InputError("model", f"{tree.name} is a Stable Diffusion 2 checkpoint: use its folder instead")
        shared = isinstance(where, Place)
        parts = Parts(
            tree.root / _one_file(tree)[0],
            config=self._tree(companions.config, _configuration).root,
            lcm_lora=None if guided else self._family_lora(companions),
        )
        return self._with_companions(
            parts,
            companions.tiny_vae if self._wants_tiny(shared) else None,
            companions.controlnet if shared else None,
            companions.safety if shared else None,
        )

    def _wants_tiny(self, shared: bool) -> bool:
        if self.spec.complete:
            return self.spec.tiny_vae is not None and self.choice.vae != "full"
        return self.choice.vae == "tiny" or (self.choice.vae is None and shared)

    def _with_companions(self, parts: Parts, tiny_vae: str | None, controlnet: str | None, safety: str | None) -> Parts:
        return replace(
            parts,
            tiny_vae=self._folder(tiny_vae),
            controlnet=self._folder(controlnet if self.choice.controlnet else None),
            safety=self._folder(safety if self.choice.safety else None),
        )

    def _own(self, base: _Tree, folder: str) -> str | None:
        """Reference to a folder of ``base``, if it holds weights that can be used."""
        if not _weights(base.within(folder)):
            return None
        return f"{base.repo}:{base.prefix}{folder}@{base.commit}" if base.repo else str(base.root / folder)

    def _folder(self, reference: str | None) -> Path | None:
        return None if reference is None else self._tree(reference, _network).root

    def _lora(self, reference: str | None) -> Path | None:
        if reference is None:
            return None
        tree = self._tree(reference, _one_file)
        return tree.root / _one_file(tree)[0]

    def _family_lora(self, companions: Companions) -> Path | None:
        if companions.lcm_lora is None:
            raise NotFound(f"{self.spec.name} is not distilled, and there is no LCM-LoRA for Stable Diffusion 2")
        try:
            return self._lora(companions.lcm_lora)
        except (NotFound, Unavailable) as error:
            raise NotFound(
                f"{self.spec.name} is not distilled, and its LCM-LoRA ({companions.lcm_lora}) is not on this machine: "
                f"run `lcm-rt pull {self.spec.name}={self.spec.source}` where the hub can be reached, or use a folder "
                f"with the LoRA merged, whose scheduler is LCMScheduler ({error})"
            ) from error

    # -- looking

    def _tree(self, reference: str, choose: Choose) -> _Tree:
        """The tree of ``reference`` in which ``choose`` finds all that it needs: here if it can be, else on the hub."""
        where = read_reference(reference)
        if isinstance(where, Path):
            root, file = (where.parent, where.name) if where.is_file() else (where, None)
            tree = _on_disk(str(where), root, file)
            choose(tree)
            return tree
        here = _cached(where)
        if here is None:
            return self._from_hub(where, choose)
        try:
            return self._add(here, choose(here))
        except LcmError:
            # What is not whole here is judged by the hub's list, at the same commit if it still has that.
            try:
                return self._from_hub(replace(where, revision=here.commit), choose)
            except NotFound:
                return self._from_hub(where, choose)

    def _from_hub(self, place: Place, choose: Choose) -> _Tree:
        tree = self._on_hub(place)
        return self._add(tree, choose(tree))

    def _add(self, tree: _Tree, names: list[str]) -> _Tree:
        for name in names:
            whole = tree.prefix + name
            present = (tree.root / name).is_file()
            self.files[tree.repo, whole] = File(tree.repo, tree.commit, whole, tree.sizes[name], present)
        self.licences.setdefault(tree.repo, self._known.get(tree.repo, "see its repository"))
        return tree

    def _on_hub(self, place: Place) -> _Tree:
        if not self.online:
            raise Unavailable(f"{place.repo} is not whole on this machine")
        key = (place.repo, place.revision)
        if key not in self._listed:
            self._listed[key] = self._list(place)
        commit, sizes = self._listed[key]
        prefix, file = _split(place.part)
        return _Tree(
            name=place.repo,
            root=repo_folder(place.repo) / "snapshots" / commit / prefix,
            sizes={name.removeprefix(prefix): size for name, size in sizes.items() if name.startswith(prefix)},
            repo=place.repo,
            commit=commit,
            prefix=prefix,
            file=file,
        )

    def _list(self, place: Place) -> tuple[str, dict[str, int]]:
        """The commit of ``place`` and the sizes of its files; takes its licence down."""
        with plain_words(place.repo, place.revision):
            info = HfApi().model_info(
                place.repo, revision=place.revision, files_metadata=True, timeout=constants.HF_HUB_ETAG_TIMEOUT
            )
            if not info.sha or not _COMMIT.fullmatch(info.sha):
                raise ValueError("no commit")
            sizes = {file.rfilename: file.size or 0 for file in info.siblings or ()}
        if info.card_data is not None and info.card_data.license and place.repo not in self._known:
            self._known[place.repo] = str(info.card_data.license)
        if place.revision != info.sha:
            self.refs.add((place.repo, place.revision, info.sha))
        return info.sha, sizes

    # -- reading

    def _json(self, tree: _Tree, name: str) -> dict[str, Any]:
        path = tree.root / name
        if tree.repo and not path.is_file():
            with plain_words(tree.repo):
                download(File(tree.repo, tree.commit, tree.prefix + name, tree.sizes[name], present=False))
            self._add(tree, [name])
        return read_json(path)

    def _tensors(self, tree: _Tree) -> Collection[str]:
        """The names of the tensors in the one file of ``tree``, without downloading the rest of it."""
        name = _one_file(tree)[0]
        if (tree.root / name).is_file():
            return read_header(tree.root / name).keys()
        with plain_words(tree.repo):
            try:
                return (
                    HfApi().parse_safetensors_file_metadata(tree.repo, tree.prefix + name, revision=tree.commit).tensors
                )
            except SafetensorsParsingError as error:
                raise InputError("model", f"{tree.name}:{name} is not a safetensors file") from error


def _kind_of_checkpoint(name: str, tensors: Collection[str]) -> tuple[Family, bool]:
    """The family of a single-file checkpoint by its tensors, and whether it takes a guidance embedding (LCM)."""

    def has(*starts: str) -> bool:
        return any(tensor.startswith(starts) for tensor in tensors)

    guided = any(tensor.endswith("cond_proj.weight") for tensor in tensors)
    if has("model.diffusion_model.input_blocks."):
        if has("conditioner.embedders.1."):
            return "sdxl", guided
        if has("cond_stage_model.transformer."):
            return "sd", guided
        if has("cond_stage_model.model."):
            return "sd2", guided
    if any("lora" in tensor for tensor in tensors):
        raise InputError("model", f"{name} is a LoRA, not a whole model")
    raise InputError("model", f"{name} is not a whole checkpoint of the Stable Diffusion 1 or XL families")


def read_json(path: Path) -> dict[str, Any]:
    """The object in a configuration file. Raises: NotFound: there is none."""
    try:
        data = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise NotFound(f"{path} is missing or is not JSON") from error
    if not isinstance(data, dict):
        raise NotFound(f"{path} is not a JSON object")
    return data


def read_header(path: Path) -> dict[str, Any]:
    """What a safetensors file says of its tensors, by name: eight bytes of length, then that much JSON.

    Raises:
        NotFound: it cannot be read. InputError: it is no such file.
    """
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if length > min(MAX_HEADER, path.stat().st_size):
                raise ValueError("longer than the file")
            header = json.loads(file.read(length))
        if not isinstance(header, dict):
            raise ValueError("not an object")
    except (ValueError, RecursionError) as error:
        raise InputError("model", f"{path} is not a safetensors file") from error
    except OSError as error:
        raise NotFound(f"{path} cannot be read: {error.strerror}") from error
    return header

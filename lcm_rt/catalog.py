"""Which models there are: a table, one row each; knows nothing of how they are found or loaded.

A new model is a row here, never a file. The licence of a row is that of its own weights; those of the parts that come
with it apply too, and ``licences`` lists them all.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Literal

from lcm_rt.embedded import MODEL_DIR
from lcm_rt.errors import InputError, NotFound

Vae = Literal["tiny", "full"]
Family = Literal["sd", "sd2", "sdxl"]

PICKLES = (".ckpt", ".bin", ".pt", ".pth", ".pkl")
"""Suffixes of files that run code of their author when they are opened; none ever is."""


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """One model that can be served.

    A *reference* is a path on this machine, or a place on the hub: ``OWNER/NAME``, with ``:FOLDER_OR_FILE`` for a part
    of it and ``@REVISION`` for another than ``main``.

    Args:
        name: how clients and the command line name it.
        source: reference to a folder in diffusers format, or to one ``.safetensors`` checkpoint.
        licence: of the weights, in a few words.
        size: side in pixels of a picture whose size nobody gave.
        steps: denoising steps when the client names no number.
        unet: reference to the UNet that takes the place of the source's.
        lcm_lora: reference to the LoRA that makes a plain UNet a consistency model; merged when the model is loaded.
        tiny_vae: reference to an ``AutoencoderTiny`` that takes the place of the source's VAE.
        controlnet: reference to an inpainting ControlNet.
        safety: reference to a safety checker.
        complete: whether the row is the whole truth. Otherwise what the source lacks (a UNet that is not distilled
            lacks the LCM-LoRA) is added once its files say of which family it is.
    """

    name: str
    source: str
    licence: str
    size: int = 512
    steps: int = 4
    unet: str | None = None
    lcm_lora: str | None = None
    tiny_vae: str | None = None
    controlnet: str | None = None
    safety: str | None = None
    complete: bool = True


@dataclass(frozen=True, slots=True)
class Choice:
    """What an operator wants of the parts that come with a model.

    Args:
        vae: ``tiny`` decodes in a fraction of the time, ``full`` draws finer detail. None is tiny, where the model has
            one of its own or lies on the hub; the VAE of a local folder or file is replaced only when asked for.
        safety: use the safety checker, where there is one.
        controlnet: use the inpainting ControlNet, where there is one.
    """

    vae: Vae | None = None
    safety: bool = True
    controlnet: bool = True


@dataclass(frozen=True, slots=True)
class Place:
    """A place on the hub: a repository, a folder or file in it (``""`` is all of it), a branch, tag or commit."""

    repo: str
    part: str = ""
    revision: str = "main"


@dataclass(frozen=True, slots=True)
class Companions:
    """References to what the models of one family can share.

    ``config`` is a folder in diffusers format, of which only the configuration and the tokenizers are used, for
    checkpoints that are one file and have none.
    """

    tiny_vae: str
    safety: str
    config: str | None = None
    lcm_lora: str | None = None
    controlnet: str | None = None


_SAFETY = "SimianLuo/LCM_Dreamshaper_v7:safety_checker"

FAMILIES: dict[Family, Companions] = {
    "sd": Companions(
        config="stable-diffusion-v1-5/stable-diffusion-v1-5",
        tiny_vae="madebyollin/taesd",
        safety=_SAFETY,
        lcm_lora="latent-consistency/lcm-lora-sdv1-5",
        controlnet="lllyasviel/control_v11p_sd15_inpaint",
    ),
    # Its latents are those of Stable Diffusion 1, but it reads wider prompts, so neither LoRA nor ControlNet fit.
    "sd2": Companions(tiny_vae="madebyollin/taesd", safety=_SAFETY),
    "sdxl": Companions(
        config="stabilityai/stable-diffusion-xl-base-1.0",
        tiny_vae="madebyollin/taesdxl",
        safety=_SAFETY,
        lcm_lora="latent-consistency/lcm-lora-sdxl",
    ),
}

_SD, _SD2, _SDXL = FAMILIES["sd"], FAMILIES["sd2"], FAMILIES["sdxl"]

LICENCES = {
    "SimianLuo/LCM_Dreamshaper_v7": "MIT",
    "latent-consistency/lcm-lora-sdv1-5": "OpenRAIL++-M",
    "latent-consistency/lcm-lora-sdxl": "OpenRAIL++-M",
    "latent-consistency/lcm-sdxl": "OpenRAIL++-M",
    "lllyasviel/control_v11p_sd15_inpaint": "CreativeML Open RAIL-M",
    "madebyollin/taesd": "MIT",
    "madebyollin/taesdxl": "MIT",
    "stable-diffusion-v1-5/stable-diffusion-v1-5": "CreativeML Open RAIL-M",
    "stabilityai/stable-diffusion-xl-base-1.0": "OpenRAIL++-M",
}
"""Licences of the repositories that come with a row or a family."""

CATALOG: dict[str, ModelSpec] = {
    spec.name: spec
    for spec in (
        ModelSpec(
            name="embedded",
            source=str(MODEL_DIR),
            licence="Apache-2.0",
            size=256,
            controlnet=str(MODEL_DIR / "controlnet"),
        ),
        ModelSpec(
            name="sdv1-5",
            source="SimianLuo/LCM_Dreamshaper_v7",
            licence="MIT",
            tiny_vae=_SD.tiny_vae,
            controlnet=_SD.controlnet,
            safety=_SD.safety,
        ),
        ModelSpec(
            name="sdv1-5-lora",
            source="Lykon/dreamshaper-7",
            licence="CreativeML Open RAIL-M",
            lcm_lora=_SD.lcm_lora,
            tiny_vae=_SD.tiny_vae,
            controlnet=_SD.controlnet,
            safety=_SD.safety,
        ),
        ModelSpec(
            name="sdxl",
            source="stabilityai/stable-diffusion-xl-base-1.0",
            licence="OpenRAIL++-M",
            size=1024,
            unet="latent-consistency/lcm-sdxl",
            tiny_vae=_SDXL.tiny_vae,
            safety=_SDXL.safety,
        ),
        ModelSpec(
            name="sdxl-lora",
            source="stabilityai/stable-diffusion-xl-base-1.0",
            licence="OpenRAIL++-M",
            size=1024,
            lcm_lora=_SDXL.lcm_lora,
            tiny_vae=_SDXL.tiny_vae,
            safety=_SDXL.safety,
        ),
        ModelSpec(
            name="sd-turbo",
            source="stabilityai/sd-turbo",
            licence="Stability AI Community",
            steps=1,
            tiny_vae=_SD2.tiny_vae,
            safety=_SD2.safety,
        ),
        ModelSpec(
            name="sdxl-turbo",
            source="stabilityai/sdxl-turbo",
            licence="Stability AI Community",
            steps=1,
            tiny_vae=_SDXL.tiny_vae,
            safety=_SDXL.safety,
        ),
    )
}

_PLACE = re.compile(r"(?P<repo>[\w.-]+/[\w.-]+)(:(?P<part>[\w./ -]+))?(@(?P<revision>[\w./-]+))?")


def resolve(name: str) -> ModelSpec:
    """The row that ``NAME`` or ``NAME=REFERENCE`` means; asks no network.

    Raises:
        NotFound: no row has that name, or the folder or file is not there or not a model.
        InputError: the file is a pickle.
    """
    name, equals, source = name.partition("=")
    if not equals:
        if name not in CATALOG:
            raise NotFound(f"no model is called {name!r}; there is {', '.join(CATALOG)}, or use NAME=REPO_OR_PATH")
        return CATALOG[name]
    where = read_reference(source)
    if isinstance(where, Place):
        return ModelSpec(name=name, source=source, licence="see its repository", complete=False)
    if where.is_dir() and not (where / "model_index.json").is_file():
        raise NotFound(f"{where} holds no model_index.json: not a model folder in diffusers format")
    if where.is_file() and where.suffix != ".safetensors":
        raise NotFound(f"{where} is neither a folder in diffusers format nor a .safetensors checkpoint")
    return ModelSpec(name=name, source=str(where), licence="yours", complete=False)


def read_reference(reference: str) -> Path | Place:
    """Where ``reference`` points: what exists on this machine goes first. A path comes back absolute.

    Raises:
        NotFound: it is a path and nothing is there, or it is no reference at all.
        InputError: it names a pickle.
    """
    suffix = PurePosixPath(reference.partition("@")[0]).suffix.lower()
    if suffix in PICKLES:
        raise InputError("model", f"{reference} is a pickle ({suffix}), which is never opened; use .safetensors")
    try:
        path = Path(reference).expanduser()
        if reference and path.exists():
            return path.resolve()
    except (OSError, RuntimeError, ValueError):  # a name too long, a home that is not known, a zero byte
        pass
    match = _PLACE.fullmatch(reference)
    if match is None or reference.startswith(".") or (suffix == ".safetensors" and not match["part"]):
        raise NotFound(f"there is no folder or file {reference!r}; a repository on the hub is named OWNER/NAME")
    place = Place(match["repo"], (match["part"] or "").strip("/"), match["revision"] or "main")
    if ".." in f"{place.repo}/{place.part}/{place.revision}".split("/"):
        raise NotFound(f"{reference!r} leads out of its repository")
    return place


def licences(spec: ModelSpec) -> dict[str, str]:
    """The licence of each repository (or path) that ``spec`` names."""
    parts = (spec.source, spec.unet, spec.lcm_lora, spec.tiny_vae, spec.controlnet, spec.safety)
    found: dict[str, str] = {}
    for reference in filter(None, parts):
        where = read_reference(reference)
        own = reference == spec.source or isinstance(where, Path)
        repo = where.repo if isinstance(where, Place) else str(where)
        found.setdefault(repo, spec.licence if own else LICENCES.get(repo, "see its repository"))
    return found

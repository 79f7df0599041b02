"""Which models there are: a table, one row each; knows nothing of how they are loaded.

A new model is a row here, never a file.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from lcm_rt.embedded import MODEL_DIR
from lcm_rt.errors import NotFound


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """One model that can be served.

    Args:
        name: how clients and the command line name it.
        path: a folder in diffusers format.
        licence: of the weights, in a few words.
        size: side in pixels of a picture whose size nobody gave.
    """

    name: str
    path: Path
    licence: str
    size: int


CATALOG: dict[str, ModelSpec] = {
    spec.name: spec for spec in (ModelSpec(name="embedded", path=MODEL_DIR, licence="Apache-2.0", size=256),)
}


def resolve(name: str) -> ModelSpec:
    """The row that ``NAME`` or ``NAME=FOLDER`` means.

    Raises:
        NotFound: no row has that name, or the folder is not a diffusers folder.
    """
    name, _, folder = name.partition("=")
    if not folder:
        if name not in CATALOG:
            raise NotFound(f"no model is called {name!r}; there is {', '.join(CATALOG)}, or use NAME=FOLDER")
        return CATALOG[name]
    path = Path(folder).expanduser().resolve()
    if not (path / "model_index.json").is_file():
        raise NotFound(f"{path} holds no model_index.json: not a model folder in diffusers format")
    return ModelSpec(name=name, path=path, licence="yours", size=512)

"""The house rules as tests: imports only point down, and each package has its keepers.

The floors are those of docs/architecture.md. Imports inside functions count too, and so do those for type checkers.
"""

from __future__ import annotations

import ast
import graphlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1] / "lcm_rt"

FLOORS = [
    "__init__ embedded errors types apps cache catalog settings metrics channel store certificates kit.fal_local",
    "wire session images transfer hub objects",
    "engine engine.sampling engine.clock engine.trajectory engine.folders engine.adapters engine.safety"
    " engine.singlefile engine.models engine.networks engine.conditioning engine.naive engine.slots engine.inductor"
    " engine.graphs engine.openvino engine.runner engine.engine",
    "steptable scheduler worker workers",
    "auth egress files loras repeats webhooks jobs service queue",
    "server server.replies server.addressing server.guard server.realtime server.oneshot server.run server.queue"
    " server.storage server.tokens server.jwks server.models server.health server.kit server.openai server.docs"
    " server.shapes server.about server.description server.app server.serve",
    "bench bench.commands bench.dialects bench.engine bench.figures bench.observers bench.plots bench.random_weights"
    " bench.roofline bench.serve bench.surroundings bench.terminal bench.traces",
    "cli __main__",
    "client client.values client.patience client.messages client.protocol client.line client.realtime client.sync"
    " client.aio",
    "embedded.scenes embedded.muon embedded.plan embedded.networks embedded.companion embedded.controlnet embedded.lora"
    " embedded.train",
]

# A package -> the only modules (or packages) of ours that may import it.
KEEPERS = {
    "torch": "engine embedded bench.engine bench.roofline bench.random_weights",
    "diffusers": "engine.models engine.adapters engine.safety engine.singlefile embedded bench.random_weights",
    "transformers": "engine.models engine.safety embedded bench.random_weights",
    "tokenizers": "embedded bench.random_weights",
    "safetensors": "engine.adapters engine.safety engine.singlefile embedded bench.random_weights",
    "openvino": "engine.openvino",
    "huggingface_hub": "hub transfer",
    "httpx2": "egress transfer client bench",
    "fsspec": "objects",
    "sqlalchemy": "store auth files jobs webhooks",
    "jwt": "auth",
    "cryptography": "webhooks certificates",
    "python_multipart": "server.openai",
    "websockets": "client bench.dialects",
    "anyio": "client.realtime",
    "httpcore2": "egress",
    "sse_starlette": "server",
    "numpy": "images engine embedded bench",
    "PIL": "images embedded bench",
    "starlette": "server",
    "uvicorn": "server.serve",
    "typer": "cli bench.commands",
    "rich": "cli server.serve embedded bench",
    "msgpack": "wire channel client.messages bench.dialects",
    "orjson": "wire files jobs queue webhooks server client.messages bench",
    "prometheus_client": "metrics bench.figures",
    "pydantic_settings": "settings",
    "os": "settings worker engine.engine engine.inductor engine.openvino embedded client kit.fal_local bench",
    "asyncio": "bench channel workers store objects egress files loras webhooks service queue server cli client",
    "threading": "cache channel worker store engine.adapters engine.engine embedded",
    "pickle": "",
}

# What must never be imported where the sockets are, not even through another module.
NOT_IN_FRONT = ("torch", "diffusers", "transformers", "numpy", "PIL")

FLOOR_OF = {module: floor for floor, row in enumerate(FLOORS) for module in row.split()}


def name_of(path: Path) -> str:
    name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
    return name.removesuffix(".__init__")


def imports_of(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def ours(target: str) -> str | None:
    """Our module that an import of ``target`` loads, or None for anyone else's."""
    package, *rest = target.split(".")
    if package != "lcm_rt":
        return None
    return next(name for n in (2, 1, 0) if (name := ".".join(rest[:n]) or "__init__") in FLOOR_OF)


IMPORTS = {name_of(path): set(imports_of(path)) for path in sorted(ROOT.rglob("*.py"))}


def test_every_module_has_a_floor() -> None:
    assert set(IMPORTS) == set(FLOOR_OF)


@pytest.mark.parametrize("module", IMPORTS)
def test_imports_point_down(module: str) -> None:
    for below in filter(None, map(ours, IMPORTS[module])):
        assert FLOOR_OF[below] <= FLOOR_OF[module], f"{module} imports {below}, a floor above it"


@pytest.mark.parametrize("module", IMPORTS)
def test_packages_stay_with_their_keepers(module: str) -> None:
    for package in {target.split(".")[0] for target in IMPORTS[module]} & KEEPERS.keys():
        keepers = KEEPERS[package].split()
        assert any(module == k or module.startswith(k + ".") for k in keepers), f"{module} imports {package}"


def test_no_cycles() -> None:
    graph = {module: set(filter(None, map(ours, targets))) - {module} for module, targets in IMPORTS.items()}
    graphlib.TopologicalSorter(graph).prepare()


@pytest.mark.parametrize("module", ["lcm_rt.server.app", "lcm_rt.server.serve", "lcm_rt.cli"])
def test_the_front_imports_no_tensors_and_no_picture_parser(module: str) -> None:
    code = f"import sys, {module}; print([p for p in {NOT_IN_FRONT!r} if p in sys.modules])"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "[]"

"""Where, when and with what a benchmark ran: what every report says beside its figures."""

from __future__ import annotations

import contextlib
import datetime
import importlib.metadata
import os
import platform
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

LIBRARIES = (
    "lcm-rt",
    "torch",
    "diffusers",
    "transformers",
    "openvino",
    "torchao",
    "numpy",
    "pillow",
    "uvicorn",
    "starlette",
    "websockets",
    "msgpack",
    "orjson",
    "uvloop",
    "litserve",
    "ray",
)


def surroundings() -> dict[str, Any]:
    """``date`` (UTC), ``command``, ``revision``, ``machine`` with its load at the start, and ``versions``.

    What cannot be found out is None, or left out of ``versions``; nothing is raised.
    """
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": command(),
        "revision": revision(),
        "machine": machine(),
        "versions": versions(),
    }


def command() -> str:
    """This process's command line as it can be typed again, from the checkout."""
    program, *words = sys.argv if sys.argv and sys.argv[0] != "-c" else ["python"]
    path = Path(program)
    if path.name == "__main__.py" or path.name == "lcm-rt":
        return shlex.join(["lcm-rt", *words])
    with contextlib.suppress(ValueError):
        path = path.absolute().relative_to(Path.cwd())
    return shlex.join([*(["python"] if path.suffix == ".py" else []), str(path), *words])


def revision() -> str | None:
    """The checkout's commit, with a mark when files differ from it; None outside of one."""

    def git(*words: str) -> str:
        return subprocess.run(
            ["git", *words], cwd=Path(__file__).parent, capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        # An installed package may lie inside somebody's checkout, whose commit says nothing about it.
        git("ls-files", "--error-unmatch", "surroundings.py")
        return git("rev-parse", "HEAD") + ("+changes" if git("status", "--porcelain") else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def machine() -> dict[str, Any]:
    """Processor, cores that may be used, memory in GiB, GPUs with their driver, system, and load averages."""
    return {
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_gb": _memory_gb(),
        "gpus": _gpus(),
        "system": platform.platform(),
        "load_before": [round(load, 2) for load in os.getloadavg()] if hasattr(os, "getloadavg") else None,
    }


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in LIBRARIES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def _processor() -> str:
    with contextlib.suppress(OSError):
        if match := re.search(r"^model name\s*: (.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE):
            return match[1]
    return platform.processor() or platform.machine()


def _memory_gb() -> float | None:
    with contextlib.suppress(AttributeError, ValueError, OSError):
        return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
    return None


def _gpus() -> list[str]:
    """Name, driver, memory and clocks of each, without loading torch."""
    try:
        said = subprocess.run(
            ["nvidia-smi", "--query-gpu=name,driver_version,memory.total,clocks.max.sm", "--format=csv,noheader"],
            capture_output=True,
            text=True,
            check=True,
            timeout=20,
        )
    except (OSError, subprocess.SubprocessError):
        return []
    return said.stdout.strip().splitlines()

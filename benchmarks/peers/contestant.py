"""One opponent in a process of its own, which paints when it is told to.

The process reads a command a line and answers each with a line of JSON; whatever libraries print goes to its standard
error. ``Contestant`` is the other side. All opponents stay loaded and idle between their turns, so that turns can
alternate and whatever else the machine does hits all of them alike.
"""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.peers.work import CHECKED, PAINTERS, Work, job, jpeg
from lcm_rt.worker import ENVIRONMENT

if TYPE_CHECKING:
    from benchmarks.peers.painters import Painter

ROOT = Path(__file__).parents[2]
WARM_UP = 3


class Absent(Exception):
    """This opponent cannot take part here; says why."""


# The process.


def measure(painter: Painter, seconds: float, first: int) -> dict[str, Any]:
    """Feed one job after the other; each picture becomes a JPEG.

    ``latency_ms`` is from a job to its JPEG, ``paint_ms`` the same without the JPEG, for each picture that came out;
    ``seconds`` is what the ``pictures`` took in all.
    """
    begun: deque[float] = deque()
    latency: list[float] = []
    paint: list[float] = []
    for number in range(painter.lag):  # fill what holds several jobs at a time
        painter.feed(job(first + number))
    started_at = now = time.perf_counter()
    begun.extend([started_at] * painter.lag)
    number = first + painter.lag
    while now - started_at < seconds or len(latency) <= 2 * painter.lag:
        begun.append(time.perf_counter())
        image = painter.feed(job(number))
        assert image is not None
        painted_at = time.perf_counter()
        jpeg(image)
        now = time.perf_counter()
        since = begun.popleft()
        latency.append(now - since)
        paint.append(painted_at - since)
        number += 1
    in_ms = [[round(1e3 * value, 3) for value in values[painter.lag :]] for values in (latency, paint)]
    return {
        "latency_ms": in_ms[0],
        "paint_ms": in_ms[1],
        "pictures": len(latency),
        "seconds": now - started_at,
    }


def measure_batches(painter: Painter, size: int, seconds: float, first: int) -> dict[str, Any]:
    """Batches of ``size`` jobs, JPEGs included."""
    started_at, pictures = time.perf_counter(), 0
    while (now := time.perf_counter()) - started_at < seconds or not pictures:
        images = painter.paint([job(first + pictures + n) for n in range(size)])
        for image in images:
            jpeg(image)
        pictures += size
    return {"pictures": pictures, "seconds": now - started_at}


def serve(name: str, work: Work, answers: io.TextIOBase) -> None:
    """Be the opponent ``name`` until the input ends."""
    kind, arguments = PAINTERS[name]

    import numpy as np
    import torch

    from benchmarks.peers import painters

    def answer(**fields: Any) -> None:
        answers.write(json.dumps(fields) + "\n")
        answers.flush()

    torch.set_num_threads(work.threads)
    started_at = time.perf_counter()
    try:
        painter: Painter = getattr(painters, kind)(work, **arguments)
    except ImportError as error:
        return answer(absent=f"{error.name} is not installed")
    first, *_ = painter.paint(CHECKED[:1])
    answer(start_s=round(time.perf_counter() - started_at, 2), size=first.size)
    for line in sys.stdin:
        match json.loads(line):
            case {"do": "check", "file": file}:
                np.save(file, np.stack([np.asarray(painter.paint([checked])[0]) for checked in CHECKED]))
                answer()
            case {"do": "warm up", "sizes": sizes}:
                for size in sizes:
                    for _ in range(WARM_UP):
                        painter.paint([job(10**6 + n) for n in range(size)])
                answer()
            case {"do": "measure", "seconds": seconds, "first": start}:
                answer(**measure(painter, seconds, start))
            case {"do": "measure batches", "seconds": seconds, "first": start, "size": size}:
                answer(**measure_batches(painter, size, seconds, start))


# The other side.


def environment(threads: int) -> dict[str, str]:
    """Of every process of this comparison: as many threads for all, no downloads, no bars."""
    return {
        **os.environ,
        "OMP_NUM_THREADS": str(threads),
        "LCM_RT_THREADS": str(threads),
        "HF_HUB_OFFLINE": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "PYTHONWARNINGS": "ignore",
        "TRANSFORMERS_VERBOSITY": "error",
        "DIFFUSERS_VERBOSITY": "error",
        "TOKENIZERS_PARALLELISM": "false",
    }


class Contestant:
    """A started opponent; ``ready`` waits until it is loaded.

    Raises: Absent: from any method, when its process has ended or says that something is not installed.
    """

    def __init__(self, name: str, work: Work, python: str = sys.executable) -> None:
        self.name = name
        self.start_s = 0.0
        self.size = (0, 0)
        self._log = tempfile.TemporaryFile("w+")
        self._process = subprocess.Popen(
            [python, "-m", "benchmarks.peers.contestant", name, work.to_json()],
            cwd=ROOT,
            # Ours as in a server's engine process; for the others that is worse.
            env=environment(work.threads) | (ENVIRONMENT if name.startswith("ours") else {}),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
        )

    def ready(self) -> None:
        said = self._hear()
        if "absent" in said:
            self.close()
            raise Absent(said["absent"])
        self.start_s, self.size = said["start_s"], tuple(said["size"])

    def check(self, file: Path) -> Any:
        """The pictures of ``CHECKED``, (n, height, width, 3) uint8."""
        import numpy as np

        self._ask(do="check", file=str(file))
        return np.load(file)

    def warm_up(self, sizes: Sequence[int]) -> None:
        self._ask(do="warm up", sizes=list(sizes))

    def measure(self, seconds: float, first: int) -> dict[str, Any]:
        return self._ask(do="measure", seconds=seconds, first=first)

    def measure_batches(self, size: int, seconds: float, first: int) -> dict[str, Any]:
        return self._ask(do="measure batches", size=size, seconds=seconds, first=first)

    def _ask(self, **command: Any) -> dict[str, Any]:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(command) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise Absent(self._last_words()) from None
        return self._hear()

    def _hear(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise Absent(self._last_words())
        said: dict[str, Any] = json.loads(line)
        return said

    def _last_words(self) -> str:
        self._log.seek(0)
        lines = [line for line in self._log.read().splitlines() if line.strip()]
        return f"its process ended: {lines[-1][:300] if lines else 'it said nothing'}"

    def close(self) -> None:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.close()
        try:
            self._process.wait(20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()
        self._log.close()


def main() -> None:
    name, work = sys.argv[1:]
    # What libraries print must not be taken for an answer.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    serve(name, Work.from_json(work), answers)


if __name__ == "__main__":
    main()

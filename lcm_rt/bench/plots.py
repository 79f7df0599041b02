"""Pictures of a measurement: how the delays are spread, how they went over time, what each client got."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from lcm_rt.bench import figures
from lcm_rt.errors import InputError

if TYPE_CHECKING:
    from matplotlib.axes import Axes


class Measured(Protocol):
    """What is drawn of a measurement."""

    @property
    def logs(self) -> Sequence[figures.Log]: ...
    @property
    def begun_at(self) -> float: ...
    def report(self) -> dict[str, Any]: ...


def require() -> None:
    """Raises: InputError: matplotlib is not installed; says how to get it."""
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError:
        raise InputError("plots", "needs matplotlib: pip install 'lcm-rt[bench]'") from None


def draw(measured: Measured, folder: Path) -> list[Path]:
    """Write ``delays.png``, ``over-time.png`` and ``clients.png`` to ``folder``, which is made if it is missing.

    Returns: the files. Raises: InputError: as ``require``. OSError.
    """
    require()
    from matplotlib.figure import Figure

    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for name, plot in {"delays": _delays, "over-time": _over_time, "clients": _clients}.items():
        # No pyplot: it would look for a screen, and keep every figure in memory.
        figure = Figure(figsize=(8, 4.5), layout="constrained")
        plot(measured, figure.subplots())
        path = folder / f"{name}.png"
        figure.savefig(path, dpi=120)
        written.append(path)
    return written


def _delays(measured: Measured, axes: Axes) -> None:
    """Which share of the messages was shown within how long."""
    spreads = {
        "input to frame": [1e3 * delay for log in measured.logs for delay in figures.delays(log)],
        "staleness": [1e3 * age for log in measured.logs for age in figures.staleness(log)],
    }
    for name, values in spreads.items():
        if values:
            axes.ecdf(values, label=name)
    axes.set(xlabel="ms", ylabel="share", title="Delays", ylim=(0, 1))
    axes.set_xlim(left=0)
    axes.grid(alpha=0.3)
    if any(spreads.values()):
        axes.legend()


def _over_time(measured: Measured, axes: Axes) -> None:
    """Each frame's staleness, when it came."""
    for number, log in enumerate(measured.logs, 1):
        times = [arrived_at - measured.begun_at for arrived_at, _ in log.frames]
        ages = [1e3 * age for age in figures.staleness(log)]
        axes.plot(times, ages, ".", markersize=3, label=f"{number} {log.trace}")
    axes.set(xlabel="s", ylabel="ms", title="Staleness of each frame")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    if len(measured.logs) <= 10:
        axes.legend(fontsize="small")


def _clients(measured: Measured, axes: Axes) -> None:
    """What each client got for what it sent."""
    numbers = range(1, len(measured.logs) + 1)
    axes.bar(numbers, [len(log.sent_at) for log in measured.logs], color="0.85", label="messages")
    axes.bar(numbers, [len(log.frames) for log in measured.logs], label="frames")
    axes.set(xlabel="client", ylabel="count", title=f"Fairness (Jain's index): {measured.report()['fairness']}")
    axes.set_xticks(numbers)
    axes.legend()

"""What every benchmark says: cases side by side in one run, each with its ratio to the plain way and to the ceiling.

A speed by itself belongs to its machine; a ratio from one run travels further. Cases are timed in turn, several times
over, and the best time of each counts: what disturbs a run only ever makes it slower.
"""

import platform
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from rich.console import RenderableType

from ..core.console import FittingTable
from ..core.cores import count_cores
from ..core.device import keep_freed_memory


@dataclass(frozen=True, kw_only=True)
class Case:
    """One thing that was done in several ways.

    Attributes:
        name: What was done.
        unit: What is counted.
        plain: Things a second the plain way.
        ours: Things a second our way.
        ceiling: Things a second that nothing could beat; None where there is no such thing.
        note: What a reader has to know.
    """

    name: str
    unit: str
    plain: float
    ours: float
    ceiling: float | None = None
    note: str = ""

    @property
    def ratio_plain(self) -> float:
        """Ours over the plain way."""
        return self.ours / self.plain

    @property
    def ratio_ceiling(self) -> float | None:
        """Ours over the ceiling."""
        return None if self.ceiling is None else self.ours / self.ceiling

    def to_json(self) -> dict[str, Any]:
        """One flat JSON object."""
        return {
            "case": self.name,
            "unit": self.unit,
            "plain_per_s": self.plain,
            "ours_per_s": self.ours,
            "ceiling_per_s": self.ceiling,
            "ratio_plain": self.ratio_plain,
            "ratio_ceiling": self.ratio_ceiling,
            "note": self.note,
        }


@dataclass(frozen=True, kw_only=True)
class BenchResult:
    """The cases of one benchmark, what else it found, and the machine it ran on."""

    title: str
    cases: tuple[Case, ...]
    facts: Mapping[str, Any]
    lines: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """One JSON object."""
        return {"cases": [case.to_json() for case in self.cases], "machine": machine(), **self.facts}

    def summary(self) -> list[RenderableType]:
        """What a person reads at the end."""
        table = FittingTable(title=self.title)
        for name in ("case", "plain", "ours", "ceiling", "ours / plain", "ours / ceiling"):
            table.add_column(name, justify="left" if name == "case" else "right")
        for case in self.cases:
            ceiling = "" if case.ceiling is None else f"{case.ceiling:,.1f}"
            of_ceiling = "" if case.ratio_ceiling is None else f"{case.ratio_ceiling:.2f}"
            rates = (f"{case.plain:,.1f} {case.unit}/s", f"{case.ours:,.1f}", ceiling)
            table.add_row(case.name, *rates, f"{case.ratio_plain:.2f}", of_ceiling)
        notes = [f"{case.name}: {case.note}" for case in self.cases if case.note]
        return [table, *notes, *self.lines, f"on {machine()}"]


def machine() -> str:
    """The machine in a few words."""
    gpu = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ", no GPU"
    return f"{_processor()}, {count_cores()} cores{gpu}, torch {torch.__version__}"


def best_of(ways: Mapping[str, Callable[[], None]], *, repeats: int) -> dict[str, float]:
    """Seconds of the best round of each way; the ways take turns."""
    best: dict[str, float] = {}
    for _ in range(repeats):
        for name, way in ways.items():
            started = time.perf_counter()
            way()
            seconds = time.perf_counter() - started
            best[name] = min(best.get(name, seconds), seconds)
    return best


def plainly(way: Callable[[], None]) -> Callable[[], None]:
    """A way of a first script: the C library handles its memory as it does where nobody tells it how."""

    def run() -> None:
        keep_freed_memory(False)
        try:
            way()
        finally:
            keep_freed_memory()

    return run


def _processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as stream:  # noqa: PTH123
            names = [line.partition(":")[2].strip() for line in stream if line.startswith("model name")]
    except OSError:
        names = []
    return names[0] if names else platform.processor() or platform.machine()

"""What every benchmark says: cases in one run, each with its ratio to the plain way and to the ceiling.

A speed by itself belongs to its machine; a ratio from one run travels further. The ways of a case are timed in turn,
several times over, and the best time of each counts: what disturbs a run only ever makes it slower.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from rich.console import RenderableType

from ..ablation.worker import cpu_name
from ..core.console import FittingTable
from ..core.cores import count_cores
from ..core.device import keep_freed_memory

T = TypeVar("T")
Way = Callable[[], object]


@dataclass(frozen=True, kw_only=True)
class Case:
    """One thing that was done in several ways.

    Attributes:
        name: What was done.
        unit: What is counted.
        plain: Units a second in the plain way.
        ours: Units a second in our way.
        ceiling: Units a second that nothing could beat; None where nothing sets a limit.
        note: What a reader has to know.
    """

    name: str
    unit: str
    plain: float
    ours: float
    ceiling: float | None = None
    note: str = ""

    def to_json(self) -> dict[str, Any]:
        """One flat JSON object, with the ratios of ours to the plain way and to the ceiling."""
        return {
            "case": self.name,
            "unit": self.unit,
            "plain_per_s": self.plain,
            "ours_per_s": self.ours,
            "ceiling_per_s": self.ceiling,
            "ratio_plain": self.ours / self.plain,
            "ratio_ceiling": None if self.ceiling is None else self.ours / self.ceiling,
            "note": self.note,
        }


@dataclass(frozen=True, kw_only=True)
class BenchResult:
    """The cases of one benchmark, what else it measured, and the machine it ran on.

    Attributes:
        title: Title of the table of cases.
        cases: The cases.
        facts: Further keys of the JSON object.
        lines: Lines below the table, for a person.
    """

    title: str
    cases: tuple[Case, ...]
    facts: Mapping[str, Any]
    lines: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """One JSON object, with the cases, the machine and the facts."""
        return {"cases": [case.to_json() for case in self.cases], "machine": machine(), **self.facts}

    def summary(self) -> list[RenderableType]:
        """What a person reads at the end."""
        table = FittingTable(title=self.title)
        for name in ("case", "plain", "ours", "ceiling", "ours / plain", "ours / ceiling"):
            table.add_column(name, justify="left" if name == "case" else "right")
        for case in self.cases:
            ratios = case.to_json()
            row = [case.name, f"{case.plain:,.1f} {case.unit}/s", f"{case.ours:,.1f}"]
            row += ["" if case.ceiling is None else f"{case.ceiling:,.1f}", f"{ratios['ratio_plain']:.2f}"]
            table.add_row(*row, "" if case.ceiling is None else f"{ratios['ratio_ceiling']:.2f}")
        notes = [f"{case.name}: {case.note}" for case in self.cases if case.note]
        return [table, *notes, *self.lines, f"on {machine()}"]


def machine() -> str:
    """The machine in a few words."""
    gpu = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ", no GPU"
    return f"{cpu_name()}, {count_cores()} cores{gpu}, torch {torch.__version__}"


def best_of(ways: Mapping[str, Way], *, repeats: int, device: torch.device | None = None) -> dict[str, float]:
    """Seconds of the best round of each way, until its last kernel has ended; the ways take turns.

    The way called ``plain`` is that of a first script: the C library handles its memory as it does by default.
    """
    best: dict[str, float] = {}
    for _ in range(repeats):
        for name, way in ways.items():
            keep_freed_memory(name != "plain")
            started = time.perf_counter()
            way()
            if device is not None and device.type == "cuda":
                torch.cuda.synchronize(device)
            seconds = time.perf_counter() - started
            best[name] = min(best.get(name, seconds), seconds)
    keep_freed_memory()
    return best


def time_case(
    name: str,
    unit: str,
    count: int,
    ways: Mapping[str, Way],
    *,
    repeats: int,
    device: torch.device | None = None,
    note: str = "",
) -> Case:
    """Time the ways ``plain``, ``ours`` and perhaps ``ceiling``, each of which does ``count`` units."""
    seconds = best_of(ways, repeats=repeats, device=device)
    return Case(name=name, unit=unit, note=note, **{way: count / value for way, value in seconds.items()})


def chunks(items: Sequence[T], size: int) -> list[Sequence[T]]:
    """A sequence cut into parts of one size; the last may be shorter."""
    return [items[start : start + size] for start in range(0, len(items), size)]

"""A list of the runs below a folder: what each was trained from and how, and the figures that it has."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich.console import RenderableType

from ...errors import InputError
from ..core.config import load_config
from ..core.console import FittingTable
from ..core.metrics_file import read_metrics
from ..core.run import newest_run, read_info
from ..core.run_folders import RunPaths

# What a list may be sorted by, with whether the largest comes first.
ORDERS = {"created": True, "name": False, "knn": True, "classifier": True, "bits": True}


@dataclass(frozen=True, kw_only=True)
class ListedRun:
    """One run of a list.

    Attributes:
        name: Name of its folder.
        kind: The command that made it.
        status: ``finished``, ``running``, ``interrupted`` or ``failed``.
        created: UTC, ISO 8601.
        data: The store or the manifest that it was trained from.
        preset: Name of the preset.
        bits: Bits of its codes.
        inputs: The modalities that its head reads.
        seed: The seed.
        knn: mAP of its neighbours on test; ``None`` where it was not measured.
        classifier: mAP of its classifier on test, or of the zero-shot scores of a run of ``zero-shot``.
        is_default: Whether commands take it where no run is named.
    """

    name: str
    kind: str
    status: str
    created: str
    data: str
    preset: str
    bits: int | None
    inputs: str
    seed: int
    knn: float | None
    classifier: float | None
    is_default: bool = False


@dataclass(frozen=True, kw_only=True)
class RunList:
    """The runs below a folder, and why others cannot be read."""

    folder: Path
    runs: tuple[ListedRun, ...]
    unreadable: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """The runs as plain records."""
        return {"folder": str(self.folder), "runs": [asdict(run) for run in self.runs], "unreadable": self.unreadable}

    def summary(self) -> list[RenderableType]:
        """A table of the runs; a star marks the one that commands take where none is named."""
        table = FittingTable("run", "data", "preset", "inputs", "bits", "seed", "knn", "classifier", "age")
        for column in table.columns[4:]:
            column.justify = "right"
        for run in self.runs:
            remarks = [run.kind] if run.kind != "train-head" else []
            remarks += [run.status] if run.status != "finished" else []
            note = f" ({', '.join(remarks)})" if remarks else ""
            table.add_row(
                f"{'* ' if run.is_default else ''}{run.name}{note}",
                run.data,
                run.preset,
                run.inputs,
                "-" if run.bits is None else str(run.bits),
                str(run.seed),
                *("-" if value is None else f"{value:.3f}" for value in (run.knn, run.classifier)),
                _age(run.created),
            )
        return [table, "* is read where --run is not given; knn and classifier: mAP on test", *self.unreadable]


def list_runs(folder: Path, *, order: str = "created") -> RunList:
    """The runs below a folder.

    Args:
        folder: The folder of all runs.
        order: A key of ``ORDERS``.

    Raises:
        InputError: There is no such order, or no run.
    """
    if order not in ORDERS:
        raise InputError("no such order", where="--sort", got=order, wanted=", ".join(ORDERS))
    runs, unreadable = [], []
    for path in sorted(folder.iterdir()) if folder.is_dir() else []:
        if RunPaths(path).mark.is_file():
            try:
                runs.append(_read(path))
            except InputError as error:
                unreadable.append(str(error))
    if not runs and not unreadable:
        raise InputError(
            "no runs", where=folder, got="nothing", do="run `mmcli train-head`, or name a folder with --runs"
        )
    try:
        default = newest_run(folder).folder.name
    except InputError:
        default = ""
    chosen = [ListedRun(**asdict(run) | {"is_default": run.name == default}) for run in runs]
    return RunList(folder=folder, runs=tuple(_sorted(chosen, order)), unreadable=tuple(unreadable))


def _read(path: Path) -> ListedRun:
    info, rows = read_info(path), read_metrics(path)
    settings = RunPaths(path).config
    config = load_config(settings) if settings.is_file() else None
    figures = {row["method"]: row["mAP"] for row in reversed(rows) if row["split"] == "test"}
    return ListedRun(
        name=path.name,
        kind=info.kind,
        status=info.status,
        created=info.created,
        data=Path(info.store).name,
        preset=info.preset,
        bits=None if config is None or info.kind == "zero-shot" else config.hash.bits,
        inputs="" if config is None else config.fusion.inputs,
        seed=info.seed,
        knn=figures.get("knn"),
        classifier=figures.get("classifier", figures.get("zero-shot")),
    )


def _sorted(runs: Sequence[ListedRun], order: str) -> list[ListedRun]:
    """Runs in an order; those without a value come last."""
    with_value = [run for run in runs if getattr(run, order) is not None]
    rest = [run for run in runs if getattr(run, order) is None]
    return sorted(with_value, key=lambda run: getattr(run, order), reverse=ORDERS[order]) + rest


def _age(created: str) -> str:
    minutes = (datetime.now(UTC) - datetime.fromisoformat(created)).total_seconds() / 60
    for size, unit in ((1440, "d"), (60, "h")):
        if minutes >= size:
            return f"{minutes / size:.0f} {unit}"
    return f"{max(minutes, 0):.0f} min"

"""Many evaluations of one run's neighbours as one table: experiments C1 to C4 from one search a metric."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import RenderableType

from ... import InputError
from ...heads.config import KnnConfig
from ..core.config import Config
from ..core.console import FittingTable
from ..core.device import pick_device
from ..core.files import write_text
from ..core.progress import Progress
from ..core.run import Run
from .codes import Evaluated, fitting_metric
from .metrics import metrics_row
from .search import Searcher, check_ties, settings
from .sweep import ALL, Search, Sweep, plan

FILE = "knn_table.json"
VERSION = 1


@dataclass(frozen=True, kw_only=True)
class TableResult:
    """The run, where the table went, and its rows."""

    run: Run
    path: Path
    split: str
    rows: tuple[dict[str, Any], ...]

    def to_json(self) -> dict[str, Any]:
        """One JSON object."""
        return {"run": str(self.run.folder), "table_path": str(self.path), "split": self.split, "rows": list(self.rows)}

    def summary(self) -> list[RenderableType]:
        """What a person reads at the end."""
        best = max(self.rows, key=lambda row: row["mAP"] if row["mAP"] is not None else -1.0)
        note = (
            "tau * B: the bits of distance that cost a factor e. In brackets: 95% bootstrap interval over images."
            f" * at the threshold that is best on val. Highest mAP of {len(self.rows)}: {_named(best)}; a choice made"
            f" on {self.split} is not a result on {self.split}."
        )
        return [readable(self.rows, self.split), note, f"wrote {self.path}"]


def knn_table(
    config: Config, sweep: Sweep, *, run: Run, split: str = "test", progress: Progress | None = None
) -> TableResult:
    """Evaluate every combination of a sweep; ``metrics.json`` is left as it is.

    Args:
        config: The knn section gives what the sweep does not; and the device.
        sweep: Values of K, metric, vote, tau and theta.
        run: A finished run of ``train-head``.
        split: Whose images are tagged; an image never votes for itself.
        progress: Who to tell.

    Raises:
        InputError: Damaged codes, a metric that the run does not serve, or K larger than the index.
    """
    progress = progress or Progress()
    if config.knn.predictor != "knn":
        raise InputError(
            "a table is of neighbours", where="--predictor", got=config.knn.predictor, wanted="knn",
            do="give one value each of --k, --metric, --vote, --tau and --theta",
        )  # fmt: skip
    codes = Evaluated.of(run, split)
    searches = plan(_fitting(sweep, config.knn, codes, run), config.knn)
    for search in searches:
        check_ties(search.evaluations[0])
        codes.check_k(search.K, run)
    device = str(pick_device(config.hardware.device))
    rows: list[dict[str, Any]] = []
    with progress.task("evaluations", sum(len(search.evaluations) for search in searches)) as task:
        for search in searches:
            for row in _evaluations(search, codes, device):
                rows.append(row)
                task.advance(1)
    path = run.folder / FILE
    record = {"version": VERSION, "split": split, "n_searches": len(searches), "rows": rows}
    write_text(path, json.dumps(record, indent=1, allow_nan=False))
    return TableResult(run=run, path=path, split=split, rows=tuple(rows))


def _fitting(sweep: Sweep, knn: KnnConfig, codes: Evaluated, run: Run) -> Sweep:
    """Of all metrics those that the run serves; one that was asked for by name has to be among them."""
    listed = sweep.distance_metric
    if codes.base.packed is None and set(listed) == set(ALL["distance_metric"]):
        return replace(sweep, distance_metric=("cosine",))
    one = knn if len(listed) == 1 else None
    metrics = (fitting_metric(one or knn.model_copy(update={"distance_metric": m}), codes.base, run) for m in listed)
    return replace(sweep, distance_metric=tuple(dict.fromkeys(metrics)))


def _evaluations(search: Search, codes: Evaluated, device: str) -> Iterator[dict[str, Any]]:
    """One search of the split and one of val; then votes and metrics of each evaluation."""
    first, query, val = search.evaluations[0], codes.query, codes.val
    searcher = Searcher(codes.base, first, device)
    found = searcher.find(query, search.K)
    on_val = found if query is val else searcher.find(val, search.K)
    for knn in search.evaluations:
        scores = searcher.score(found, knn)
        tuned_on = None if codes.split == "val" else (searcher.score(on_val, knn), val.labels)
        row = metrics_row("knn", codes.split, scores, query.labels, tuned_on=tuned_on)
        row |= settings(knn, codes.base, searcher.index.kind)
        row |= searcher.boundary_facts(found, knn.K) if knn.distance_metric == "hamming" else {}
        yield {key: value for key, value in row.items() if not _idle(key, row["voting_strategy"])}


def _idle(key: str, strategy: str) -> bool:
    """Whether a key plays no part in a vote."""
    return (key in ("tau", "tau_bits") and strategy != "softmax") or (key == "theta" and strategy != "threshold")


def readable(rows: tuple[dict[str, Any], ...], split: str) -> FittingTable:
    """One line an evaluation."""
    bits = rows[0]["bits"]
    table = FittingTable(
        title=f"Neighbours of {split}, {bits} bits" if bits else f"Neighbours of {split}, no hash layer"
    )
    for name in ("metric", "K", "vote", "tau", "tau*B", "theta", "mAP", "F1*", "P@5", "tied"):
        table.add_column(name, justify="left" if name in ("metric", "vote") else "right")
    before = None
    for row in rows:
        group = (row["distance_metric"], row["K"])
        if before is not None and group != before:
            table.add_section()
        before = group
        table.add_row(
            row["distance_metric"], str(row["K"]), row["voting_strategy"], _cell(row, "tau", "{:g}"),
            _cell(row, "tau_bits", "{:.2f}"), _cell(row, "theta", "{:g}"), _cell(row, "mAP", "{:.3f}"),
            _cell(row, "F1_micro_tuned", "{:.3f}"), _cell(row, "P@5", "{:.3f}"), _cell(row, "boundary_tied", "{:.0%}"),
        )  # fmt: skip
    return table


def _cell(row: Mapping[str, Any], key: str, form: str) -> str:
    return form.format(row[key]) if row.get(key) is not None else "-"


def _named(row: Mapping[str, Any]) -> str:
    keys = (("metric", "distance_metric"), ("K", "K"), ("vote", "voting_strategy"), ("tau", "tau"), ("theta", "theta"))
    return ", ".join(f"{name} {row[key]}" for name, key in keys if key in row)

"""Stage 3: neighbours in the codes of a run vote for the tags of another split."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import RenderableType

from ...errors import InputError
from ...heads.config import VOTE_PARAMETER, KnnConfig
from ...heads.voting import check_ties
from ..core.config import Config
from ..core.console import FittingTable, metrics_table
from ..core.device import pick_device
from ..core.files import write_text
from ..core.metrics_file import add_metrics, read_metrics
from ..core.progress import Progress
from ..core.run import Run
from .metrics import check_predictor, classifier_row, write_scores
from .search import Evaluated, NeighbourSearch, fitting_metric
from .sweep import ALL, searches

SHOWN = ("split", "bits", "K", "distance_metric", "voting_strategy", "tau", "ties", "index_kind")


@dataclass(frozen=True, kw_only=True)
class KnnResult:
    """The run that was evaluated, the file of its metrics, and the row of the predictor that was asked for."""

    run: Run
    metrics_path: Path
    metrics: dict[str, Any]
    others: tuple[dict[str, Any], ...] = ()

    def to_json(self) -> dict[str, Any]:
        """The row of the predictor, the run and the file, as one flat JSON object."""
        return {"run": str(self.run.folder), "metrics_path": str(self.metrics_path), **self.metrics}

    def summary(self) -> list[RenderableType]:
        """The table and the lines that are printed at the end."""
        described = ", ".join(f"{name} {self.metrics[name]}" for name in SHOWN if name in self.metrics)
        table = metrics_table([self.metrics, *self.others], described)
        return [table, *_lines(self.metrics), f"wrote {self.metrics_path}"]


def knn_eval(config: Config, *, run: Run, split: str = "test", progress: Progress | None = None) -> KnnResult:
    """Search, vote and measure from the codes of a run; towers and store are not read.

    Args:
        config: The knn section and the device are used.
        run: A finished run of ``train-head``.
        split: The split whose images are tagged; an image never votes for itself.
        progress: Progress bars and messages; none are shown when not given.

    Raises:
        InputError: Damaged codes or metrics, Hamming distance asked of a run without hash layer, K larger than the
            index, or a predictor that the codes do not give.
    """
    progress = progress or Progress()
    read_metrics(run.folder)  # a damaged file is refused before anything is computed
    codes = Evaluated.of(run, split)
    predictor, query, val = config.knn.predictor, codes.query, codes.val
    check_predictor(predictor, query, val, run)
    rows: dict[str, dict[str, Any]] = {}
    if predictor != "classifier":
        metric = fitting_metric(config.knn, codes.bits, run.folder)
        knn = config.knn.model_copy(update={"distance_metric": metric})
        codes.check_k(knn.K, run)
        progress.say(f"searching {len(query):,} {split} images among {len(codes.base):,} codes of {run.folder}")
        rows |= _neighbour_rows(NeighbourSearch(codes, [knn], str(pick_device(config.hardware.device))), knn, run)
    if query.logits is not None and val.logits is not None:
        rows["classifier"] = classifier_row(split, query, val=val, run=run)
    headline = rows.pop(predictor)
    path, merged = add_metrics(run.folder, [headline, *rows.values()])
    others = tuple(other for other in merged[1:] if other["split"] == split)
    return KnnResult(run=run, metrics_path=path, metrics=headline, others=others)


def _neighbour_rows(search: NeighbourSearch, knn: KnnConfig, run: Run) -> dict[str, dict[str, Any]]:
    """The row of the neighbours, and that of the mix where it was asked for; scores are kept in the run."""
    codes = search.codes
    split, image_id = codes.split, codes.query.image_id
    votes = search.vote(knn)
    row = search.row("knn", votes, knn, run) | search.efficiency(votes) | search.latency(knn)
    row |= search.boundary_facts(knn) | codes.retrieval()
    write_scores(run.folder, "knn", split, image_id, votes.scores)
    rows = {"knn": row}
    if knn.predictor == "hybrid":
        mixed, weight = search.mix(votes)
        rows["hybrid"] = search.row("hybrid", mixed, knn, run)
        rows["hybrid"] |= {"hybrid_weight_knn": weight, "hybrid_tuned_on": "val"}
        if split == "val":
            rows["hybrid"]["hybrid_note"] = "the weight was tuned on these images"
        write_scores(run.folder, "hybrid", split, image_id, mixed.scores)
    return rows


def _lines(row: dict[str, Any]) -> list[str]:
    lines = []
    if "boundary_tied" in row:
        how = "all of them share the last votes" if row["ties"] == "average" else "the lower index votes"
        lines.append(
            f"ties: for {row['boundary_tied']:.0%} of the images more codes than votes are left stand at the distance"
            f" of neighbour K ({row['boundary_group_size']:.1f} codes on average); {how}"
        )
    if "hybrid_weight_knn" in row:
        weight = row["hybrid_weight_knn"]
        lines.append(f"hybrid: {weight:.2f} neighbours + {1 - weight:.2f} classifier, tuned on val")
    return lines


VERSION = 1
# Heading, key of a row and format of each column; the settings first.
COLUMNS = (
    ("metric", "distance_metric", "{}"),
    ("K", "K", "{}"),
    ("vote", "voting_strategy", "{}"),
    ("tau", "tau", "{:g}"),
    ("tau*B", "tau_bits", "{:.2f}"),
    ("theta", "theta", "{:g}"),
    ("mAP", "mAP", "{:.3f}"),
    ("F1*", "F1_micro_tuned", "{:.3f}"),
    ("P@5", "P@5", "{:.3f}"),
    ("tied", "boundary_tied", "{:.0%}"),
)


@dataclass(frozen=True, kw_only=True)
class TableResult:
    """The run, the file of the table, and its rows."""

    run: Run
    path: Path
    split: str
    rows: tuple[dict[str, Any], ...]

    def to_json(self) -> dict[str, Any]:
        """The rows, the run and the file, as one JSON object."""
        return {"run": str(self.run.folder), "table_path": str(self.path), "split": self.split, "rows": list(self.rows)}

    def summary(self) -> list[RenderableType]:
        """The table and the lines that are printed at the end."""
        best = max(self.rows, key=lambda row: row["mAP"] if row["mAP"] is not None else -1.0)
        note = (
            "tau * B: the bits of distance that cost a factor e. In brackets: 95% bootstrap interval over images."
            f" * at the threshold that is best on val. Highest mAP of {len(self.rows)}: {_named(best)}; a choice made"
            f" on {self.split} is not a result on {self.split}."
        )
        return [readable(self.rows, self.split), note, f"wrote {self.path}"]


def knn_table(
    config: Config, evaluations: Sequence[KnnConfig], *, run: Run, split: str = "test", progress: Progress | None = None
) -> TableResult:
    """Evaluate every combination of a sweep; ``metrics.json`` is left as it is.

    Args:
        config: The configuration; its knn section and its device count.
        evaluations: The combinations, as of :func:`.sweep.sweep`.
        run: A finished run of ``train-head``.
        split: The split whose images are tagged; an image never votes for itself.
        progress: Progress bars and messages; none are shown when not given.

    Raises:
        InputError: Damaged codes, a metric that the run does not serve, or K larger than the index.
    """
    progress = progress or Progress()
    if config.knn.predictor != "knn":
        raise InputError(
            "a table is of neighbours",
            where="--predictor",
            got=config.knn.predictor,
            wanted="knn",
            do="give one value each of --k, --metric, --vote, --tau and --theta",
        )
    codes = Evaluated.of(run, split)
    groups = searches(_fitting(evaluations, config.knn, codes, run))
    for configs in groups:
        check_ties(configs[0])
        codes.check_k(max(knn.K for knn in configs), run)
    device = str(pick_device(config.hardware.device))
    rows: list[dict[str, Any]] = []
    with progress.task("evaluations", sum(map(len, groups))) as task:
        for configs in groups:
            search = NeighbourSearch(codes, configs, device)
            for knn in configs:
                row = search.row("knn", search.vote(knn), knn) | search.boundary_facts(knn)
                rows.append({key: value for key, value in row.items() if not _idle(key, knn.voting_strategy)})
                task.advance(1)
    path = run.paths.knn_table
    record = {"version": VERSION, "split": split, "n_searches": len(groups), "rows": rows}
    write_text(path, json.dumps(record, indent=1, allow_nan=False))
    return TableResult(run=run, path=path, split=split, rows=tuple(rows))


def _fitting(evaluations: Sequence[KnnConfig], knn: KnnConfig, codes: Evaluated, run: Run) -> list[KnnConfig]:
    """The evaluations by metrics that the run serves; a metric that was asked for by name has to be among them."""
    metrics = {config.distance_metric for config in evaluations}
    if not codes.bits and metrics == set(ALL["distance_metric"]):
        return [config for config in evaluations if config.distance_metric == "cosine"]
    # A single metric may be the default, so the configuration decides whether it was asked for by name.
    fitting = {
        config.distance_metric: fitting_metric(knn if len(metrics) == 1 else config, codes.bits, run.folder)
        for config in evaluations
    }
    return [config.model_copy(update={"distance_metric": fitting[config.distance_metric]}) for config in evaluations]


def _idle(key: str, strategy: str) -> bool:
    """Whether a key plays no part in a vote."""
    parameter = "tau" if key == "tau_bits" else key
    return parameter in VOTE_PARAMETER.values() and parameter != VOTE_PARAMETER.get(strategy)


def readable(rows: Sequence[Mapping[str, Any]], split: str) -> FittingTable:
    """The table that is printed, with one line an evaluation."""
    bits = f"{rows[0]['bits']} bits" if rows[0]["bits"] else "no hash layer"
    table = FittingTable(title=f"Neighbours of {split}, {bits}")
    for name, _, _ in COLUMNS:
        table.add_column(name, justify="left" if name in ("metric", "vote") else "right")
    for row, before in zip(rows, [rows[0], *rows], strict=False):
        if any(row[key] != before[key] for key in ("distance_metric", "K")):
            table.add_section()
        table.add_row(*("-" if row.get(key) is None else form.format(row[key]) for _, key, form in COLUMNS))
    return table


def _named(row: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {row[key]}" for name, key, _ in COLUMNS[:6] if name != "tau*B" and key in row)

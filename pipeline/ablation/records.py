"""``rows.parquet``: one row for every experiment, value and seed, made from the evaluations that were kept.

Written whole or not at all. Rows of an experiment that was not asked for this time stay; of one that was, those of the
same base configuration stay beside the new ones, and those of another base leave the table (their evaluations stay on
disk, and asking again brings them back).
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
from safetensors.numpy import save_file

from ...cache import Store, list_stores
from ...cache.parquet import read_parquet
from ...cache.strict_json import parse_json
from ...errors import InputError
from ...heads.tensor_files import write_tensors
from ..core.config import load_config
from ..core.files import write_text, write_whole
from ..core.metrics_file import check_row, read_metrics
from ..core.results import SPLITS, codes_path
from ..core.run import Run, RunInfo, open_run, read_info
from ..core.run_folders import MARK
from ..data.protocols import lists_digest
from ..evaluation.prompts import TEMPLATES
from .identity import FROZEN
from .plan import Plan, Row, Training, training_key

_TEXTS = ("key", "training", "status", "note", "method", "split", "run", "scores")
EVALUATIONS, SCORES = "evaluations", "scores"


@dataclass(frozen=True, kw_only=True)
class Record:
    """An evaluation that was done, or failed.

    Attributes:
        key: Of the evaluation.
        training: Key of its training.
        status: ``finished`` or ``failed``.
        note: The error.
        method: What predicts.
        split: Whose images.
        run: The run's folder, relative to the table's.
        scores: The file of its scores, likewise.
        figures: Every figure of ``metrics.json``, with ``ci``.
        facts: Seconds, epochs, bytes, versions, device, and when it was done.
        config: The resolved configuration, dotted.
    """

    key: str
    training: str
    status: str
    note: str = ""
    method: str = ""
    split: str = ""
    run: str = ""
    scores: str = ""
    figures: Mapping[str, Any] = field(default_factory=dict)
    facts: Mapping[str, Any] = field(default_factory=dict)
    config: Mapping[str, Any] = field(default_factory=dict)

    @property
    def finished(self) -> bool:
        """Whether there are figures."""
        return self.status == "finished"


def record_path(out: Path, key: str) -> Path:
    """Where the figures of an evaluation are kept."""
    return out / EVALUATIONS / f"{key[:32]}.json"


def scores_file(key: str) -> str:
    """The file of an evaluation's scores, relative to the table's folder."""
    return f"{SCORES}/{key[:32]}.safetensors"


def write_record(out: Path, record: Record) -> None:
    """Keep an evaluation."""
    write_text(record_path(out, record.key), json.dumps(asdict(record), indent=1, allow_nan=False))


def read_record(out: Path, key: str) -> Record | None:
    """An evaluation that was kept; None where there is none, or its scores are gone.

    A file that is damaged is none either: the evaluation is done again.
    """
    try:
        record = Record(**parse_json(record_path(out, key).read_bytes()))
        if not all(isinstance(getattr(record, name), str) for name in _TEXTS):
            return None
        if record.finished:
            check_row({**record.figures, "method": record.method, "split": record.split})
    except (OSError, ValueError, TypeError, LookupError, AttributeError):
        return None
    whole = record.key == key and (not record.finished or (out / record.scores).is_file())
    return record if whole else None


def keep_scores(
    out: Path, key: str, image_id: npt.NDArray[np.int64], scores: npt.NDArray[Any], labels: npt.NDArray[Any]
) -> str:
    """Keep the scores of an evaluation: ``scores (N, C)`` float32, ``image_id (N,)`` int64, ``labels (N, C)`` uint8.

    Returns:
        The file, relative to ``out``.
    """
    arrays: dict[str, npt.NDArray[Any]] = {
        "scores": np.ascontiguousarray(scores, np.float32),
        "image_id": np.ascontiguousarray(image_id, np.int64),
        "labels": np.ascontiguousarray(labels, np.uint8),
    }
    name = scores_file(key)
    write_whole(out / name, lambda temporary: write_tensors(temporary, save_file, arrays, {"key": key}))
    return name


def failed(key: str, training: str, error: Exception, config: Mapping[str, Any]) -> Record:
    """The record of an evaluation that could not be done."""
    note = str(error) if isinstance(error, InputError) else f"{type(error).__name__}: {error}"
    return Record(key=key, training=training, status="failed", note=" ".join(note.split()), config=config)


ROWS = "rows.parquet"
VERSION = 1
TEXTS = (
    "experiment",
    "varies",
    "value",
    "status",
    "note",
    "key",
    "training_key",
    "base",
    "run",
    "scores",
    "method",
    "split",
    "preset",
    "config",
)
WHOLE = ("order", "seed")
# Keys of the configuration that have a column of their own in every table.
CONFIG_COLUMNS = (
    "hash.bits",
    "fusion.type",
    "fusion.block_norm",
    "fusion.inputs",
    "fusion.magnitude",
    "fusion.adapter",
    "head",
    "loss.cosine_weight",
    "loss.hash_weight",
    "loss.hash_reg.lambda_balance",
    "loss.hash_reg.lambda_decorr",
    "loss.focal_loss",
    "loss.asymmetric_loss",
    "loss.class_weights",
    "training.num_epochs",
    "knn.K",
    "knn.distance_metric",
    "knn.voting_strategy",
    "knn.tau",
    "knn.theta",
    "knn.ties",
    "knn.predictor",
    "model.max_num_patches",
    "towers",
)
FIGURES = (
    "mAP",
    "mAP_sample",
    "F1_micro",
    "F1_macro",
    "F1_micro_tuned",
    "F1_macro_tuned",
    "CF1",
    "OF1",
    "P@1",
    "P@5",
    "R@1",
    "R@5",
    "hamming_loss",
    "threshold_tuned",
)
# Figures that are not of the table: lists, and what other columns say.
_LEFT = {"method", "split", "ci", "ci_undefined", "retrieval_ci", "prompts", "note"}


def lines_of(plan: Plan, records: Mapping[str, Record]) -> list[dict[str, Any]]:
    """The rows of a plan that are finished, failed or collapsed.

    Args:
        plan: What was asked for.
        records: By key of the evaluation.
    """
    found = []
    for row in plan.rows:
        record = records.get(row.key)
        if row.status == "failed" or record is not None:
            found.append(_line(row, record))
    return found


def merge(known: Iterable[Mapping[str, Any]], new: Sequence[Mapping[str, Any]]) -> tuple[list[dict[str, Any]], int]:
    """The table after some rows were made, and how many rows of another base left it.

    Args:
        known: Rows that were in the table.
        new: Rows of the experiments that were asked for; of each experiment all have one base.
    """
    bases = {row["experiment"]: row["base"] for row in new}
    fresh = {_place(row) for row in new}
    kept, left = [], 0
    for row in known:
        name = row["experiment"]
        if name in bases and row["base"] != bases[name]:
            left += 1
        elif _place(row) not in fresh:
            kept.append(dict(row))
    rows = [*kept, *map(dict, new)]
    rows.sort(key=lambda row: (row["experiment"], row["order"], row["seed"]))
    return rows, left


def write_rows(out: Path, rows: Sequence[Mapping[str, Any]]) -> Path:
    """Write the table."""
    path = out / ROWS
    table = _table(rows)
    write_whole(path, lambda temporary: pq.write_table(table, temporary, compression="zstd", write_page_checksum=True))
    return path


def read_rows(out: Path) -> list[dict[str, Any]]:
    """The rows of a table; none where there is no file.

    Raises:
        InputError: The file is damaged.
    """
    path = out / ROWS
    if not path.is_file():
        return []
    try:
        table = read_parquet(path)
        if not {*TEXTS[:3], *WHOLE} <= {*table.column_names}:
            raise InputError(
                "will not replace what mmcli did not write",
                where=path,
                got="another table",
                wanted="the rows of `mmcli ablate`",
                do="move it away, or name another folder with --out",
            )
        _check_types(table)
        rows: list[dict[str, Any]] = table.to_pylist()
    except InputError:
        raise
    except (OSError, ValueError) as error:
        raise InputError(
            "a damaged table",
            where=path,
            got=getattr(error, "strerror", None) or error,
            wanted="what mmcli wrote",
            do="remove it: it is made again from what is kept beside it",
        ) from None
    return rows


def _check_types(table: pa.Table) -> None:
    """Refuse columns that are missing or of other types than those that :func:`write_rows` gives them.

    A column without a value, as all of an empty table, may have any type.

    Raises:
        ValueError: There is one.
    """
    missing = {*TEXTS, *WHOLE} - set(table.column_names)
    if missing:
        raise ValueError(f"no column {min(missing)}")
    for name in {*TEXTS, *WHOLE, *FIGURES} & set(table.column_names):
        column = table.column(name)
        is_number = pa.types.is_integer(column.type) or (pa.types.is_floating(column.type) and name in FIGURES)
        fits = pa.types.is_string(column.type) if name in TEXTS else is_number
        if not fits and column.null_count < len(column):
            raise ValueError(f"the column {name} of {column.type}")


def _line(row: Row, record: Record | None) -> dict[str, Any]:
    """One line of the table."""
    line: dict[str, Any] = {
        "experiment": row.experiment,
        "varies": row.varies,
        "value": row.value,
        "order": row.order,
        "seed": row.seed,
        "status": row.status if row.status != "planned" else "finished",
        "note": row.note,
        "key": row.key,
        "training_key": row.training,
        "base": row.base,
    }
    if record is not None:
        line |= {"run": record.run, "scores": record.scores, "method": record.method, "split": record.split}
        if not record.finished:
            line |= {"status": "failed", "note": record.note}
    if row.config is not None:
        config = row.settings
        line |= {"preset": row.config.preset, "config": json.dumps(config, sort_keys=True)}
        line |= {key: config[key] for key in CONFIG_COLUMNS}
        if row.config.knn.distance_metric == "hamming" and row.config.hash.bits:
            line["tau_times_bits"] = row.config.knn.tau * row.config.hash.bits
    if record is not None and record.finished:
        line |= {key: value for key, value in record.figures.items() if key not in _LEFT and key not in line}
        line["ci"] = {**(record.figures.get("ci") or {}), **(record.figures.get("retrieval_ci") or {})} or None
        line["thresholds_note"] = record.figures.get("note")
        line |= dict(record.facts)
    return line


def _table(rows: Sequence[Mapping[str, Any]]) -> pa.Table:
    """Rows as one table; a column is text, whole numbers or floats, never a mixture."""
    names = list(dict.fromkeys([*TEXTS[:3], *WHOLE, *TEXTS[3:], *(key for row in rows for key in row)]))
    columns = {}
    for name in names:
        values = [row.get(name) for row in rows]
        columns[name] = pa.array(values, type=_intervals(values)) if name == "ci" else _column(name, values)
    return pa.table(columns).replace_schema_metadata({"mmcli_table": json.dumps({"version": VERSION})})


def _column(name: str, values: Sequence[Any]) -> pa.Array:
    if name in TEXTS:
        return pa.array([value if value is not None else "" for value in values], pa.string())
    present = [value for value in values if value is not None]
    if present and all(isinstance(value, list) for value in present):
        return pa.array(values, pa.list_(pa.float64()))
    if all(isinstance(value, bool) for value in present):
        return pa.array(values, pa.bool_())
    if all(isinstance(value, int) and not isinstance(value, bool) for value in present):
        return pa.array(values, pa.int64())
    if all(isinstance(value, int | float) and not isinstance(value, bool) for value in present):
        return pa.array([None if value is None else float(value) for value in values], pa.float64())
    return pa.array([None if value is None else str(value) for value in values], pa.string())


def _intervals(values: Sequence[Any]) -> pa.DataType:
    """A field a figure, each ``[low, high]``, as the rows of ``metrics.json`` have it."""
    keys = dict.fromkeys(key for value in values if value for key in value)
    pair = pa.list_(pa.float64())
    return pa.struct([(key, pair) for key in keys] or [("mAP", pair)])


def _place(row: Mapping[str, Any]) -> tuple[Any, ...]:
    return row["experiment"], row["value"], row["seed"]


OWN, STORES = "runs", "stores"
KINDS = {"head": "train-head", "finetune": "finetune", "zero-shot": "zero-shot"}


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """Keys of trainings that a search looks for, and the digests of their stores."""

    trainings: Mapping[str, Training]

    @property
    def stores(self) -> set[str]:
        """Digests of the stores that any of them is of."""
        return {one.store for one in self.trainings.values()}


def find_runs(plan: Mapping[str, Training], places: Iterable[Path]) -> dict[str, Path]:
    """Finished runs that are trainings of a plan.

    Args:
        plan: Trainings by key.
        places: Folders of runs; of several that are one training the first is taken.

    Returns:
        The run's folder by key.
    """
    wanted = Wanted(trainings=plan)
    found: dict[str, Path] = {}
    for place in places:
        for mark in sorted(place.glob(f"*/{MARK}")):
            key = _key_of_run(mark.parent, wanted)
            if key is not None:
                found.setdefault(key, mark.parent)
    return found


def own_folder(out: Path, training: Training) -> Path:
    """Where a training of the plan is made. Replicas of one configuration differ in the end of the name alone."""
    config = training.config
    name = "mlp" if config.head == "mlp" else f"b{config.hash.bits}-{config.fusion.type}"
    towers = "" if training.kind != "finetune" else f"-{training.towers}"
    label = name if training.kind in {"head", "finetune"} else training.kind
    return out / OWN / f"{training.group[:12]}-{label}{towers}-seed{training.seed}"


def is_finished(folder: Path) -> bool:
    """Whether a run that ended lies there."""
    try:
        return read_info(folder).status == "finished"
    except InputError:
        return False


def resumable(folder: Path, training: Training) -> bool:
    """Whether an interrupted run of this very training lies there."""
    try:
        info = read_info(folder)
        config = load_config(folder / "config.yaml")
        towers, store = _began_with(folder, info)
    except (InputError, OSError, ValueError, LookupError, TypeError):
        return False
    if info.kind not in {KINDS["head"], KINDS["finetune"]} or info.status not in {"running", "interrupted"}:
        return False
    return training_key(config, store, towers, info.lists_digest) == training.key


def find_stores(digests: Iterable[str], places: Iterable[Path]) -> dict[str, Path]:
    """Finished stores below some folders, by the digest of their key."""
    wanted, found = set(digests), dict[str, Path]()
    for place in places:
        for folder in list_stores(place) if place.is_dir() else []:
            digest = Store.open(folder).key.digest
            if digest in wanted:
                found.setdefault(digest, folder)
    return found


def _key_of_run(folder: Path, wanted: Wanted) -> str | None:
    """The training that a run is, if it is finished, whole and one of those wanted."""
    try:
        info = read_info(folder)
        towers, store = _began_with(folder, info)
        if info.status != "finished" or store not in wanted.stores:
            return None
        run = open_run(folder, kind=info.kind)
        if info.kind == "zero-shot":
            return _zero_shot(run, wanted)
        if info.kind not in {KINDS["head"], KINDS["finetune"]} or not all(
            codes_path(folder, s).is_file() for s in SPLITS
        ):
            return None
        key = training_key(load_config(folder / "config.yaml"), store, towers, info.lists_digest)
    except (InputError, OSError, ValueError, LookupError, TypeError):
        return None  # half-written, of another version, or somebody's own
    return key if key in wanted.trainings else None


def _began_with(folder: Path, info: RunInfo) -> tuple[str, str]:
    """What of the towers a run trained, and the digest of the store that it, or its towers, began with."""
    if info.kind != KINDS["finetune"]:
        return FROZEN, info.store_digest
    record = parse_json((folder / "finetune.json").read_bytes())
    return str(record["unfreeze"]), str(record["base"]["store_digest"])


def _zero_shot(run: Run, wanted: Wanted) -> str | None:
    """A run of zero-shot with the default prompts, on the images alone, is the baseline of every seed."""
    rows = [row for row in read_metrics(run.folder) if row["split"] == "test"]
    if not rows or rows[0].get("inputs") != "image" or tuple(rows[0].get("prompts", ())) != TEMPLATES:
        return None
    data = load_config(run.folder / "config.yaml").data
    own = (run.info.store_digest, data.split_type, run.info.lists_digest or lists_digest(data))
    for one in wanted.trainings.values():
        read = one.config.data
        if one.kind == "zero-shot" and (one.store, read.split_type, lists_digest(read)) == own:
            return one.key
    return None

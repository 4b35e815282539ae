"""What an ablation keeps: a record and the scores of every evaluation, and ``rows.parquet`` made from the records.

The table has one row for every experiment, value and seed, and is written whole or not at all. Rows of an experiment
that was not asked for this time stay; of one that was, those of the same base configuration stay beside the new ones,
and those of another base leave the table (their evaluations stay on disk, and asking again brings them back).
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
from safetensors.numpy import save_file

from ...cache.parquet import read_parquet
from ...cache.strict_json import parse_json
from ...errors import InputError
from ...heads.tensor_files import write_tensors
from ..core.files import write_text, write_whole
from ..core.metrics_file import check_row
from .plan import Plan, Row

EVALUATIONS, SCORES, ROWS = "evaluations", "scores", "rows.parquet"
VERSION = 1
_RECORD_TEXTS = ("key", "training", "status", "note", "method", "split", "run", "scores")
# Columns of every table that hold text, and those that hold whole numbers.
TEXTS = (
    *("experiment", "varies", "value", "status", "note", "key", "training_key", "base", "run", "scores"),
    *("method", "split", "preset", "config"),
)
WHOLE = ("order", "seed")
# Keys of the configuration that have a column of their own in every table.
CONFIG_COLUMNS = (
    *("hash.bits", "head", "training.num_epochs", "model.max_num_patches", "towers"),
    *("fusion.type", "fusion.block_norm", "fusion.inputs", "fusion.magnitude", "fusion.adapter"),
    *("loss.cosine_weight", "loss.hash_weight", "loss.hash_reg.lambda_balance", "loss.hash_reg.lambda_decorr"),
    *("loss.focal_loss", "loss.asymmetric_loss", "loss.class_weights"),
    *("knn.K", "knn.distance_metric", "knn.voting_strategy", "knn.tau", "knn.theta", "knn.ties", "knn.predictor"),
)
FIGURES = (
    *("mAP", "mAP_sample", "F1_micro", "F1_macro", "F1_micro_tuned", "F1_macro_tuned", "CF1", "OF1"),
    *("P@1", "P@5", "R@1", "R@5", "hamming_loss", "threshold_tuned"),
)
# Figures that are no columns: lists, and what other columns say.
_NO_COLUMN = {"method", "split", "ci", "ci_undefined", "retrieval_ci", "prompts", "note"}


@dataclass(frozen=True, kw_only=True)
class Record:
    """An evaluation that was done, or failed.

    Attributes:
        key: Key of the evaluation.
        training: Key of its training.
        status: ``finished`` or ``failed``.
        note: The error.
        method: What predicts.
        split: Whose images are evaluated.
        run: The run's folder, relative to the table's.
        scores: The file of its scores, relative to the table's folder.
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
        """Whether the evaluation has figures."""
        return self.status == "finished"


def write_record(out: Path, record: Record) -> None:
    """Write the record of an evaluation below the folder of the table."""
    write_text(_record_path(out, record.key), json.dumps(asdict(record), indent=1, allow_nan=False))


def read_record(out: Path, key: str) -> Record | None:
    """The record of an evaluation; None where there is none, or its scores are gone.

    A file that is damaged counts as none: the evaluation is done again.
    """
    try:
        record = Record(**parse_json(_record_path(out, key).read_bytes()))
        if not all(isinstance(getattr(record, name), str) for name in _RECORD_TEXTS):
            return None
        if record.finished:
            check_row({**record.figures, "method": record.method, "split": record.split})
    except (OSError, ValueError, TypeError, LookupError, AttributeError):
        return None
    complete = record.key == key and (not record.finished or (out / record.scores).is_file())
    return record if complete else None


def write_scores(
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
    name = f"{SCORES}/{key[:32]}.safetensors"
    write_whole(out / name, lambda temporary: write_tensors(temporary, save_file, arrays, {"key": key}))
    return name


def rows_of(plan: Plan, records: Mapping[str, Record]) -> list[dict[str, Any]]:
    """The rows of a plan that are finished, failed or collapsed.

    Args:
        plan: What was asked for.
        records: Records by key of the evaluation.
    """
    return [_table_row(row, records.get(row.key)) for row in plan.rows if row.status == "failed" or row.key in records]


def merge(old: Sequence[Mapping[str, Any]], new: Sequence[Mapping[str, Any]]) -> tuple[list[dict[str, Any]], int]:
    """The table after some rows were made, and how many rows of another base left it.

    Args:
        old: Rows that were in the table.
        new: Rows of the experiments that were asked for; of each experiment all have one base.
    """
    bases = {row["experiment"]: row["base"] for row in new}
    places = {_place(row) for row in new}
    stay = [row for row in old if bases.get(row["experiment"], row["base"]) == row["base"]]
    rows = [dict(row) for row in (*(row for row in stay if _place(row) not in places), *new)]
    rows.sort(key=lambda row: (row["experiment"], row["order"], row["seed"]))
    return rows, len(old) - len(stay)


def write_rows(out: Path, rows: Sequence[Mapping[str, Any]]) -> Path:
    """Write the table; a column is text, whole numbers, floats or lists, never a mixture."""
    path = out / ROWS
    names = dict.fromkeys([*TEXTS[:3], *WHOLE, *TEXTS[3:], *(key for row in rows for key in row)])
    table = pa.table({name: _column(name, [row.get(name) for row in rows]) for name in names})
    table = table.replace_schema_metadata({"mmcli_table": json.dumps({"version": VERSION})})
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


def _record_path(out: Path, key: str) -> Path:
    return out / EVALUATIONS / f"{key[:32]}.json"


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


def _table_row(row: Row, record: Record | None) -> dict[str, Any]:
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
        settings, knn = row.settings, row.config.knn
        line |= {"preset": row.config.preset, "config": json.dumps(settings, sort_keys=True)}
        line |= {key: settings[key] for key in CONFIG_COLUMNS}
        if knn.distance_metric == "hamming" and row.config.hash.bits:
            line["tau_times_bits"] = knn.tau * row.config.hash.bits
    if record is not None and record.finished:
        figures = record.figures
        line |= {key: value for key, value in figures.items() if key not in _NO_COLUMN and key not in line}
        line["ci"] = {**(figures.get("ci") or {}), **(figures.get("retrieval_ci") or {})} or None
        line["thresholds_note"] = figures.get("note")
        line |= dict(record.facts)
    return line


def _column(name: str, values: list[Any]) -> pa.Array:
    if name in TEXTS:
        return pa.array([value or "" for value in values], pa.string())
    try:
        return pa.array(values)
    except (pa.ArrowInvalid, pa.ArrowTypeError):  # a mixture, as of numbers and words
        return pa.array([None if value is None else str(value) for value in values], pa.string())


def _place(row: Mapping[str, Any]) -> tuple[Any, ...]:
    return row["experiment"], row["value"], row["seed"]

"""``rows.parquet``: one row for every experiment, value and seed, made from the evaluations that were kept.

Written whole or not at all. Rows of an experiment that was not asked for this time stay; of one that was, those of the
same base configuration stay beside the new ones, and those of another base leave the table (their evaluations stay on
disk, and asking again brings them back).
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from ... import InputError
from ...cache.parquet import read_parquet
from ..core.files import write_whole
from .ablate_plan import Plan, Row
from .ablate_records import Record

ROWS = "rows.parquet"
VERSION = 1
TEXTS = (
    "experiment", "varies", "value", "status", "note", "key", "training_key", "base", "run", "scores", "method",
    "split", "preset", "config",
)  # fmt: skip
WHOLE = ("order", "seed")
# Keys of the configuration that have a column of their own in every table.
CONFIG_COLUMNS = (
    "hash.bits", "fusion.type", "fusion.block_norm", "fusion.inputs", "fusion.magnitude", "fusion.adapter", "head",
    "loss.cosine_weight", "loss.hash_weight", "loss.hash_reg.lambda_balance", "loss.hash_reg.lambda_decorr",
    "loss.focal_loss", "loss.asymmetric_loss", "loss.class_weights", "training.num_epochs", "knn.K",
    "knn.distance_metric", "knn.voting_strategy", "knn.tau", "knn.theta", "knn.ties", "knn.predictor",
    "model.max_num_patches", "towers",
)  # fmt: skip
FIGURES = (
    "mAP", "mAP_sample", "F1_micro", "F1_macro", "F1_micro_tuned", "F1_macro_tuned", "CF1", "OF1", "P@1", "P@5", "R@1",
    "R@5", "hamming_loss", "threshold_tuned",
)  # fmt: skip
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
                "will not replace what mmcli did not write", where=path, got="another table",
                wanted="the rows of `mmcli ablate`", do="move it away, or name another folder with --out",
            )  # fmt: skip
        _check_types(table)
        rows: list[dict[str, Any]] = table.to_pylist()
    except InputError:
        raise
    except (OSError, ValueError) as error:
        raise InputError(
            "a damaged table", where=path, got=getattr(error, "strerror", None) or error, wanted="what mmcli wrote",
            do="remove it: it is made again from what is kept beside it",
        ) from None  # fmt: skip
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
        "experiment": row.experiment, "varies": row.varies, "value": row.value, "order": row.order, "seed": row.seed,
        "status": row.status if row.status != "planned" else "finished", "note": row.note, "key": row.key,
        "training_key": row.training, "base": row.base,
    }  # fmt: skip
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

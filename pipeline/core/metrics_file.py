"""``metrics.json``: the rows of a run, one for each method and split; ``history.jsonl``: its epochs.

The keys of the row that was computed last stand flat, where scripts look for them; the other rows stand under
``others``.
"""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from ...cache.strict_json import parse_json
from ...errors import InputError
from .files import write_text
from .run_folders import RunPaths, hold

TWO_PRECISIONS = (
    "Trainings in two precisions are not seeds of one method: each precision has a line of its own. To train in float32"
    " everywhere, give --set training.mixed_precision=false."
)
Row = TypeVar("Row", bound=Mapping[str, Any])
WAIT_S = 60.0
# Names that always stand for one number.
_FIGURE = re.compile(
    r"mAP(_sample|@\d+)?|(F1_micro|F1_macro|CF1|OF1|CP|CR|OP|OR|hamming_loss)(@\d+)?(_tuned(_per_class)?)?"
    r"|[PR]@\d+(_ceiling)?|n_[A-Za-z0-9_@]+|threshold(_tuned)?|[a-z_]+_(s|ms|qps|bytes)|K|tau|theta|bits|seed"
)
_LARGEST = 1e300


def write_metrics(folder: Path, rows: Sequence[Mapping[str, Any]]) -> Path:
    """Write the rows of a run, the headline first."""
    path = RunPaths(folder).metrics
    write_text(path, json.dumps({**rows[0], "others": [dict(row) for row in rows[1:]]}, indent=1, allow_nan=False))
    return path


def add_metrics(folder: Path, new: Sequence[Mapping[str, Any]]) -> tuple[Path, list[dict[str, Any]]]:
    """Write rows that were just computed beside those that a run has, as :func:`merge_rows` puts them together.

    Of several processes that do so each adds its own: they wait for each other.

    Returns:
        The file, and all rows.

    Raises:
        InputError: The file is damaged, or cannot be written.
    """
    with hold(folder, what="writes its metrics", wait_s=WAIT_S, keep=False):
        rows = merge_rows(read_metrics(folder), new)
        return write_metrics(folder, rows), rows


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """The rows that a run has, the headline first; none where nothing was measured.

    Raises:
        InputError: The file is not what :func:`write_metrics` writes.
    """
    path = RunPaths(folder).metrics
    try:
        first = parse_json(path.read_bytes())
        rows = [first, *first.pop("others")]
        for row in rows:
            check_row(row)
    except FileNotFoundError:
        return []
    except (OSError, ValueError, TypeError, AttributeError, LookupError) as error:
        raise InputError(
            "damaged metrics",
            where=path,
            got=f"{type(error).__name__}: {error}",
            wanted="what mmcli wrote",
            do="remove the file, and `mmcli knn-eval` writes it again",
        ) from None
    return rows


def merge_rows(old: Sequence[Mapping[str, Any]], new: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The rows of a run after some were computed again.

    Args:
        old: Rows that the run has.
        new: Rows just computed, the headline first. The headline replaces the old row of its method and split: its
            settings may be others. The rest may hold less than the old ones (a latency is measured once), and adds
            to them.

    Returns:
        The headline, then every other row, the old ones in their order.
    """
    headline, *rest = new
    rows = {_key(row): dict(row) for row in old if _key(row) != _key(headline)}
    for row in rest:
        rows[_key(row)] = {**rows.get(_key(row), {}), **row}
    return [dict(headline), *rows.values()]


def by_precision(rows: Iterable[Row]) -> dict[str, list[Row]]:
    """Rows of one method by the precision that it was computed in, in the order of the rows.

    Two precisions are two methods: their rows are no seeds of one another. A row that does not say its precision (an
    earlier version made it, or nothing was computed) stands with the others where these have one precision.

    Returns:
        By a name for a table: ``""`` where there is one group, else ``float32``, ``bfloat16`` or ``precision unknown``.
    """
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(str(row.get("precision") or ""), []).append(row)
    if len([name for name in groups if name]) < 2:
        return {"": [row for group in groups.values() for row in group]} if groups else {}
    return {name or "precision unknown": group for name, group in groups.items()}


def read_history(folder: Path) -> list[dict[str, Any]]:
    """The records of the epochs of a run, in order; none where nothing was trained.

    A last line without an end is one that is still written, or was when the run was killed, and is left out.

    Raises:
        InputError: Another line is not what mmcli writes.
    """
    path = RunPaths(folder).history
    records: list[dict[str, Any]] = []
    try:
        for line in path.read_bytes().splitlines(keepends=True):
            if not line.endswith(b"\n"):
                break
            records.append(record := parse_json(line))
            if not _is_number(record["epoch"]) or not all(_is_number(v, or_null=True) for v in record.values()):
                raise ValueError(f"epoch {record['epoch']!r:.60} with what is no number")
    except FileNotFoundError:
        return []
    except (OSError, ValueError, TypeError, AttributeError, LookupError) as error:
        raise InputError(
            "damaged history",
            where=f"{path}, line {len(records)}",
            got=f"{type(error).__name__}: {error}",
            wanted="what mmcli wrote",
            do="train again",
        ) from None
    return records


def check_row(row: Mapping[str, Any]) -> None:
    """Refuse a row whose values are of other kinds than :func:`write_metrics` is given.

    A method, a split and settings are text; ``ci`` maps figures to pairs of numbers; every other value that has the
    name of a figure is a finite number, or null where the figure is undefined.

    Raises:
        ValueError, TypeError, LookupError: There is one.
    """
    for key in ("method", "split"):
        if not isinstance(row[key], str):
            raise TypeError(f"{key} is {row[key]!r:.60}")
        row[key].encode()  # JSON can spell half a pair of surrogates, which no file can hold
    for key, value in row.items():
        if _FIGURE.fullmatch(key) and not _is_number(value, or_null=True):
            raise ValueError(f"{key} is {value!r:.60}")
    for key in ("ci", "retrieval_ci"):
        for figure, ends in (row.get(key) or {}).items():
            low, high = ends
            if not (_is_number(low) and _is_number(high) and low <= high):
                raise ValueError(f"the interval of {figure} is {ends!r:.60}")


def _is_number(value: object, *, or_null: bool = False) -> bool:
    if value is None:
        return or_null
    return isinstance(value, int | float) and not isinstance(value, bool) and -_LARGEST < value < _LARGEST


def _key(row: Mapping[str, Any]) -> tuple[str, str]:
    return row["method"], row["split"]

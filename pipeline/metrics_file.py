"""``metrics.json``: the rows of a run, one for each method and split.

The keys of the row that was computed last stand flat, where scripts look for them; the other rows stand under
``others``.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from .. import InputError
from .files import write_text

METRICS = "metrics.json"
TWO_PRECISIONS = (
    "Trainings in two precisions are not seeds of one method: each precision has a line of its own. To train in float32"
    " everywhere, give --set training.mixed_precision=false."
)
Row = TypeVar("Row", bound=Mapping[str, Any])


def write_metrics(folder: Path, rows: Sequence[Mapping[str, Any]]) -> Path:
    """Write the rows of a run, the headline first."""
    path = folder / METRICS
    write_text(path, json.dumps({**rows[0], "others": [dict(row) for row in rows[1:]]}, indent=1, allow_nan=False))
    return path


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """The rows that a run has, the headline first; none where nothing was measured.

    Raises:
        InputError: The file is not what :func:`write_metrics` writes.
    """
    path = folder / METRICS
    try:
        first = json.loads(path.read_text(encoding="utf-8"))
        rows = [first, *first.pop("others")]
        for row in rows:
            _key(row)
    except FileNotFoundError:
        return []
    except (OSError, ValueError, TypeError, AttributeError, LookupError) as error:
        raise InputError(
            "damaged metrics", where=path, got=f"{type(error).__name__}: {error}", wanted="what mmcli wrote",
            do="remove the file, and `mmcli knn-eval` writes it again",
        ) from None  # fmt: skip
    return rows


def merge_rows(known: Sequence[Mapping[str, Any]], new: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The rows of a run after some were computed again.

    Args:
        known: Rows that the run has.
        new: Rows just computed, the headline first. The headline replaces the known row of its method and split: its
            settings may be others. The rest may know less than the known ones (a latency is measured once), and adds
            to them.

    Returns:
        The headline, then every other row, those that were known in their order.
    """
    headline, *rest = new
    rows = {_key(row): dict(row) for row in known if _key(row) != _key(headline)}
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


def _key(row: Mapping[str, Any]) -> tuple[str, str]:
    return row["method"], row["split"]

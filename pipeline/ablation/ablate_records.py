"""What is kept of every evaluation: a file of figures and a file of scores, each whole or absent, named by its key.

The table is made from these files, so a stop at any moment costs at most the evaluation that was under way.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors.numpy import save_file

from ... import InputError
from ...cache.strict_json import parse_json
from ...heads.tensor_files import write_tensors
from ..core.files import write_text, write_whole
from ..core.metrics_file import check_row

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
        "scores": np.ascontiguousarray(scores, np.float32), "image_id": np.ascontiguousarray(image_id, np.int64),
        "labels": np.ascontiguousarray(labels, np.uint8),
    }  # fmt: skip
    name = scores_file(key)
    write_whole(out / name, lambda temporary: write_tensors(temporary, save_file, arrays, {"key": key}))
    return name


def failed(key: str, training: str, error: Exception, config: Mapping[str, Any]) -> Record:
    """The record of an evaluation that could not be done."""
    note = str(error) if isinstance(error, InputError) else f"{type(error).__name__}: {error}"
    return Record(key=key, training=training, status="failed", note=" ".join(note.split()), config=config)

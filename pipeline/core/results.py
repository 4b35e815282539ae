"""Codes of a split: all that neighbours, votes and metrics need, so that neither towers nor store are read again."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from safetensors.numpy import save_file

from ...errors import InputError, cannot_read
from ...heads.bootstrap import Threshold
from ...heads.metrics import per_class
from ...heads.sigmoid import sigmoid
from ...heads.tensor_files import Arrays, load_arrays, write_tensors
from .files import write_text, write_whole
from .run import run_identity
from .run_folders import RunPaths

SPLITS = ("train", "val", "test")


@dataclass(frozen=True, kw_only=True)
class Codes:
    """Codes of the n images of a split, in manifest order, from ``eval()`` mode and the first caption.

    Attributes:
        image_id: ``(n,)`` int64.
        soft: Soft codes h ``(n, B)`` float32, or z ``(n, 512)`` for a head without hash layer.
        packed: Hard codes, ``(n, B/8)`` uint8, eight bits a byte; ``None`` without hash layer.
        labels: ``(n, C)`` uint8, 0 or 1.
        logits: The classifier's, ``(n, C)`` float32; ``None`` for the train split.
        norm_img: Norms of the image embeddings as the head read them ``(n,)`` float32; ``None`` in runs of before
            they were kept.
        norm_txt: Norms of the first captions, in the same form.
    """

    image_id: npt.NDArray[np.int64]
    soft: npt.NDArray[np.float32]
    packed: npt.NDArray[np.uint8] | None
    labels: npt.NDArray[np.uint8]
    logits: npt.NDArray[np.float32] | None
    norm_img: npt.NDArray[np.float32] | None = None
    norm_txt: npt.NDArray[np.float32] | None = None

    def __len__(self) -> int:
        return len(self.image_id)

    @property
    def probabilities(self) -> npt.NDArray[np.float64] | None:
        """The classifier's scores, sigmoid of the logits ``(n, C)`` float64; ``None`` where no logits were kept.

        In float32 all logits above 17 would be 1, and what the classifier ranks would be tied.
        """
        return None if self.logits is None else sigmoid(self.logits)


def write_codes(run: Path, split: str, codes: Codes) -> Path:
    """Write the codes of a split into a run, with a checksum, the split's name and which run they are of."""
    arrays = {name: np.ascontiguousarray(value) for name, value in vars(codes).items() if value is not None}
    path, about = RunPaths(run).codes(split), {"split": split, **run_identity(run)}
    write_whole(path, lambda temporary: write_tensors(temporary, save_file, arrays, about))
    return path


def read_codes(run: Path, split: str) -> Codes:
    """Read the codes of a split.

    Raises:
        InputError: The file is missing, is not what its checksum says, is of another split or run, or its arrays do
            not fit each other.
    """
    path = RunPaths(run).codes(split)
    arrays = read_run_arrays(path, "codes", about={"split": split}, do="train the head again with `mmcli train-head`")
    return Codes(
        image_id=arrays["image_id"],
        soft=arrays["soft"],
        packed=arrays.get("packed"),
        labels=arrays["labels"],
        logits=arrays.get("logits"),
        norm_img=arrays.get("norm_img"),
        norm_txt=arrays.get("norm_txt"),
    )


# Kind of the dtype, bytes of a value (any where 0) and axes of the arrays that runs keep.
_FORMS = {
    "image_id": ("i", 8, 1),
    "soft": ("f", 0, 2),
    "packed": ("u", 1, 2),
    "labels": ("u", 1, 2),
    "logits": ("f", 0, 2),
    "norm_img": ("f", 0, 1),
    "norm_txt": ("f", 0, 1),
    "scores": ("f", 0, 2),
}
_NEEDED = {"codes": {"image_id", "soft", "labels"}, "scores": {"image_id", "scores"}, "labels": {"image_id", "labels"}}


def read_run_arrays(
    path: Path, what: Literal["codes", "scores", "labels"], *, about: Mapping[str, str], do: str
) -> Arrays:
    """The arrays of a file that a run keeps, checked against its checksum, its place and each other.

    Args:
        path: The file, in a folder of the folder of the run.
        what: Which arrays it has to hold.
        about: What the file says of itself where it says anything, such as its split.
        do: The command that makes the file again.

    Raises:
        InputError: The file is missing, is not what its checksum says, is of another split, method or run, or its
            arrays do not fit each other.
    """

    def damaged(got: str, where: object = path, wanted: str = "what mmcli wrote") -> InputError:
        return InputError(f"damaged {what}", where=where, got=got, wanted=wanted, do=do)

    try:
        arrays, note = load_arrays(path)
    except FileNotFoundError:
        raise InputError(f"no {what}", where=path, got="no file", wanted=f"the {what} of a run", do=do) from None
    except OSError as error:
        raise cannot_read(f"cannot read {what}", path, error, do=do) from None
    except ValueError as error:
        raise damaged(str(error)) from None
    for name, wanted in {**about, **run_identity(path.parent.parent)}.items():
        if note.get(name, wanted) != wanted:
            raise InputError(f"{what} of another {name}", where=path, got=note[name], wanted=wanted, do=do)
    _check_arrays(arrays, _NEEDED[what], damaged, path)
    return arrays


def _check_arrays(arrays: Arrays, needed: set[str], damaged: Callable[..., InputError], path: Path) -> None:
    """Refuse arrays that are missing, of another kind or length than they should be, or not finite."""
    missing, lengths = needed - arrays.keys(), {len(value) for value in arrays.values() if value.ndim}
    if missing or len(lengths) != 1:
        got = f"no {', '.join(sorted(missing))}" if missing else f"lengths {sorted(lengths)}"
        raise damaged(got, wanted="arrays of one length")
    for name, values in arrays.items():
        kind, size, axes = _FORMS.get(name, (values.dtype.kind, 0, values.ndim))
        if (values.dtype.kind, values.ndim) != (kind, axes) or size not in {0, values.dtype.itemsize}:
            raise damaged(f"{name} of {values.dtype} {values.shape}")
        if kind == "f" and not np.isfinite(values).all():
            row = int(np.flatnonzero(~np.isfinite(values.reshape(len(values), -1)).all(axis=1))[0])
            raise damaged("NaN or inf", where=f"{path}, row {row}", wanted="numbers")
    if (arrays.get("labels", np.empty(0)) > 1).any():
        raise damaged(f"a label {arrays['labels'].max()}", wanted="0 and 1")


FIGURES = ("precision", "recall", "F1", "n_predicted")
COUNTS = ("n_positive", "n_predicted")


def write_per_class(
    run: Path,
    method: str,
    split: str,
    category_names: Sequence[str],
    scores: npt.NDArray[np.floating[Any]],
    labels: npt.NDArray[Any],
    *,
    thresholds: Mapping[str, Threshold] | None = None,
    logits: bool = False,
) -> Path:
    """Write a row for every class, in class order.

    A row holds ``category``, ``index``, ``n_positive``, ``AP``, and for every threshold, with its ending, ``threshold,
    precision, recall, F1, n_predicted``. What is undefined is null: AP and recall of a class without a positive,
    precision of one that is never predicted, F1 where both are so.

    Args:
        run: The run's folder.
        method: Name of the method.
        split: Name of the split.
        category_names: C names.
        scores: ``(N, C)``.
        labels: ``(N, C)`` of 0 and 1.
        thresholds: By the ending of their keys; one for all classes, or one a class.
        logits: The scores are logits; thresholds are written as probabilities.

    Raises:
        ValueError: Another number of names, or as :func:`~mmcli.heads.ranking.average_precision`.
    """
    n_classes = labels.shape[1]
    if len(category_names) != n_classes:
        raise ValueError(f"{len(category_names)} names do not name {n_classes} classes")
    thresholds = {"": 0.5} if thresholds is None else thresholds
    columns: dict[str, npt.NDArray[Any]] = {}
    for ending, threshold in thresholds.items():
        figures = per_class(scores, labels, threshold=threshold)
        columns |= {key: figures[key] for key in ("n_positive", "AP")}
        shown = sigmoid(threshold) if logits else np.asarray(threshold)
        columns[f"threshold{ending}"] = np.broadcast_to(shown, n_classes)
        columns |= {f"{key}{ending}": figures[key] for key in FIGURES}
    rows = [
        {"category": name, "index": c} | {key: _plain(key, float(values[c])) for key, values in columns.items()}
        for c, name in enumerate(category_names)
    ]
    path = RunPaths(run).per_class(method, split)
    record = {"method": method, "split": split, "n_images": len(labels), "classes": rows}
    write_text(path, json.dumps(record, indent=1, allow_nan=False))
    return path


def _plain(key: str, value: float) -> float | int | None:
    if key.startswith(COUNTS):
        return int(value)
    return value if np.isfinite(value) else None

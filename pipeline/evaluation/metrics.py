"""From scores to a row of metrics with its intervals and the rows of its classes, the same way for every method."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors.numpy import save_file

from ...errors import InputError
from ...heads.bootstrap import RESAMPLES, Threshold, interval, resample
from ...heads.config import Predictor
from ...heads.metrics import evaluate, mean_average_precision, tune_thresholds
from ...heads.sigmoid import sigmoid
from ...heads.tensor_files import write_tensors
from ..core.files import command, write_whole
from ..core.results import Codes, read_run_arrays, write_per_class
from ..core.run import Run, run_identity
from ..core.run_folders import RunPaths

Scores = npt.NDArray[np.floating[Any]]
Labels = npt.NDArray[np.uint8]

TUNED = ("F1_micro", "F1_macro", "CF1", "OF1", "hamming_loss")
OVERALL, PER_CLASS = "_tuned", "_tuned_per_class"
NOTHING_TUNED = "no threshold is tuned, because no val image has a label"


def metrics_row(
    method: str,
    split: str,
    scores: Scores,
    labels: Labels,
    *,
    tuned_on: tuple[Scores, Labels] | None,
    threshold: float = 0.5,
    logits: bool = False,
    run: Run | None = None,
) -> dict[str, Any]:
    """Every metric of a method on a split, with 95% bootstrap intervals over its images (none on train).

    Args:
        method: Name of the method.
        split: Name of the split.
        scores: ``(N, C)``, in class order.
        labels: ``(N, C)`` uint8.
        tuned_on: Scores and labels of val, on which the thresholds of the ``_tuned`` figures are chosen; ``None``
            leaves these out, and so do labels without a positive, which a ``note`` says.
        threshold: Where a score predicts a tag.
        logits: The scores are logits. They are ranked as they are: the sigmoid keeps their order, but large ones all
            become 1, and ties cost. Thresholds are given as probabilities all the same, as those of any other method.
        run: Where given, the rows of the classes are written into it, and the row has its ``precision``.

    Returns:
        Flat keys; F1 and Hamming loss at ``threshold``, again with ``_tuned`` at the one that is best on val, and with
        ``_tuned_per_class`` at the best of each class. A class without a positive in val keeps the ``_tuned`` one:
        ``n_classes_without_own_threshold``, and the ``note``. ``ci`` as :func:`with_intervals` adds it.
    """
    cut = float(np.log(threshold / (1 - threshold))) if logits else threshold
    thresholds: dict[str, Threshold] = {"": cut}
    row: dict[str, Any] = {"method": method, "split": split, **evaluate(scores, labels, threshold=cut)}
    if tuned_on is not None and not tuned_on[1].any():
        row["note"] = NOTHING_TUNED
    elif tuned_on is not None:
        tuned = tune_thresholds(*tuned_on)
        thresholds |= {OVERALL: tuned.overall, PER_CLASS: tuned.per_class}
        row |= {"threshold_tuned": tuned.overall, "n_classes_without_own_threshold": tuned.n_kept_overall}
        for ending in (OVERALL, PER_CLASS):
            figures = evaluate(scores, labels, threshold=thresholds[ending])
            row |= {f"{key}{ending}": figures[key] for key in TUNED}
        if tuned.n_kept_overall:
            row["note"] = _kept_overall(tuned.n_kept_overall, labels.shape[1])
    if logits:
        row |= {key: float(sigmoid(row[key])) for key in ("threshold", "threshold_tuned") if key in row}
    if run is not None:
        write_per_class(
            run.folder, method, split, run.info.category_names, scores, labels, thresholds=thresholds, logits=logits
        )
        if run.info.precision:
            row["precision"] = run.info.precision
    row = {key: int(value) if key.startswith("n_") else _plain(value) for key, value in row.items()}
    # Of train there is no interval: a model knows these images, and as a sample they say nothing of others.
    return row if split == "train" else with_intervals(row, scores, labels, thresholds)


def with_intervals(
    row: Mapping[str, Any], scores: Scores, labels: Labels, thresholds: Mapping[str, Threshold]
) -> dict[str, Any]:
    """A row with the 95% percentile bootstrap interval of its figures under ``ci``.

    Images are resampled, thresholds and the trained model are not: the interval says how far the figure may be off
    because the split is a sample of images, and nothing of another training seed or another val split.

    Args:
        row: A row of metrics.
        scores: The scores ``(N, C)`` that it was computed from.
        labels: The labels ``(N, C)``.
        thresholds: The thresholds, by the ending of the keys that they belong to.

    Returns:
        The row, and ``ci``: ``{key: [low, high]}`` for every figure that it has and that is defined; ``n_resamples``;
        and where a figure is undefined in some resamples, which its interval leaves out, their number under
        ``ci_undefined``.
    """
    resampled = resample(scores, labels, thresholds)
    intervals = {k: interval(values, figure=row[k]) for k, values in resampled.items() if row.get(k) is not None}
    ci = {key: [low, high] for key, (low, high, n_undefined) in intervals.items() if n_undefined < RESAMPLES}
    undefined = {key: n_undefined for key, (_, _, n_undefined) in intervals.items() if n_undefined}
    return {**row, "n_resamples": RESAMPLES, "ci": ci, **({"ci_undefined": undefined} if undefined else {})}


def classifier_row(split: str, codes: Codes, *, val: Codes, run: Run | None = None) -> dict[str, Any]:
    """Every metric of the classifier on a split, from the logits kept with its codes.

    Args:
        split: Name of the split.
        codes: Its codes, with logits.
        val: Codes of val, to tune the thresholds on; on val itself nothing is tuned.
        run: Where given, the rows of the classes are written into it, and the row has its ``precision``.
    """
    assert codes.logits is not None
    assert val.logits is not None
    tuned_on = None if split == "val" else (val.logits, val.labels)
    return metrics_row("classifier", split, codes.logits, codes.labels, tuned_on=tuned_on, logits=True, run=run)


def write_scores(
    run: Path,
    method: str,
    split: str,
    image_id: npt.NDArray[np.int64],
    scores: Scores,
    labels: Labels | None = None,
) -> Path:
    """Keep a method's scores in its run, so that two methods can be compared image by image later.

    Args:
        run: The run's folder.
        method: Name of the method.
        split: Name of the split.
        image_id: ``(N,)``.
        scores: ``(N, C)``.
        labels: ``(N, C)``, where the run keeps no codes of the split, which hold them.
    """
    arrays = {"image_id": image_id, "scores": scores} | ({} if labels is None else {"labels": labels})
    whole = {name: np.ascontiguousarray(values) for name, values in arrays.items()}
    path = RunPaths(run).scores(method, split)
    about = {"method": method, "split": split, **run_identity(run)}
    write_whole(path, lambda temporary: write_tensors(temporary, save_file, whole, about))
    return path


def read_scores(run: Path, method: str, split: str) -> dict[str, npt.NDArray[Any]]:
    """Read the arrays of :func:`write_scores`: ``image_id``, ``scores``, and ``labels`` where they were given.

    Raises:
        InputError: See :func:`~mmcli.pipeline.core.results.read_run_arrays`.
    """
    again = f" (`{command('knn-eval', '--run', run)}`)" if method == "knn" else ""
    return read_run_arrays(
        RunPaths(run).scores(method, split),
        "scores",
        about={"method": method, "split": split},
        do=f"run the command that scores this split again{again}",
    )


def _kept_overall(n: int, C: int) -> str:
    which = (
        "1 class has no positive val image and keeps" if n == 1 else f"{n} classes have no positive val image and keep"
    )
    return f"of {C} thresholds per class, {n} not tuned: {which} the overall threshold"


def _plain(value: object) -> object:
    """NumPy scalars become Python's, and what is undefined becomes null in JSON."""
    if isinstance(value, np.generic):
        value = value.item()
    return None if isinstance(value, float) and not np.isfinite(value) else value


GRID = tuple(round(0.05 * step, 2) for step in range(21))


def check_predictor(predictor: Predictor, query: Codes, val: Codes, run: Run) -> None:
    """Refuse a predictor that the codes of a run do not give.

    Raises:
        InputError: There are no logits, or no val image has a label to tune the mix on.
    """
    if predictor != "knn" and (query.logits is None or val.logits is None):
        raise InputError(
            "no classifier scores of this split",
            where=run.folder,
            got=f"--predictor {predictor}",
            wanted="a split whose logits were kept: val or test",
            do="use --predictor knn, or --split test",
        )
    if predictor == "hybrid" and not val.labels.any():
        raise InputError(
            "nothing to tune the mix on",
            where=run.folder,
            got="no val image with a label",
            wanted="at least one",
            do="use --predictor knn or classifier",
        )


def tune_mix(knn: Scores, classifier: Scores, labels: npt.NDArray[np.uint8]) -> float:
    """The weight a of the grid with the highest mAP on val; of equals the one nearest to a half.

    Args:
        knn: Scores of the neighbours on val ``(n, C)``.
        classifier: Probabilities of the classifier on val ``(n, C)``.
        labels: ``(n, C)``.
    """
    mAP = {a: mean_average_precision(mix(a, knn, classifier), labels) for a in GRID}
    return max(GRID, key=lambda a: (mAP[a], -abs(a - 0.5)))


def mix(a: float, knn: Scores, classifier: Scores) -> npt.NDArray[np.float64]:
    """``a * knn + (1 - a) * classifier``, in class order ``(n, C)``."""
    mixed: npt.NDArray[np.float64] = a * knn.astype(np.float64) + (1.0 - a) * classifier
    return mixed


def mix_with_classifier(
    query: Codes, val: Codes, scores: Scores, on_val: Scores
) -> tuple[float, npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Mix the scores of the neighbours with the classifier's, the weight tuned on val alone.

    Args:
        query: Codes of a split, with logits.
        val: Codes of val, with logits.
        scores: The neighbours' on the split.
        on_val: The neighbours' on val.

    Returns:
        The weight of the neighbours, the mixed scores of the split and those of val.
    """
    classifier, classifier_on_val = query.probabilities, val.probabilities
    assert classifier is not None
    assert classifier_on_val is not None
    a = tune_mix(on_val, classifier_on_val, val.labels)
    return a, mix(a, scores, classifier), mix(a, on_val, classifier_on_val)

"""Predictors compared on one split: neighbours, classifier, and their convex mix (SPEC section 8, experiment A3).

Symbols: a weight of the neighbours in the mix.
"""

from typing import Any

import numpy as np
import numpy.typing as npt

from ... import InputError
from ...heads.config import Predictor
from ...heads.metrics import mean_average_precision
from ..core.results import Codes
from ..core.run import Run
from .metrics import metrics_row, write_scores

GRID = tuple(round(0.05 * step, 2) for step in range(21))

Scores = npt.NDArray[np.floating[Any]]


def check_predictor(predictor: Predictor, query: Codes, val: Codes, run: Run) -> None:
    """Refuse a predictor that the codes of a run do not give.

    Raises:
        InputError: There are no logits, or no val image has a label to tune the mix on.
    """
    if predictor != "knn" and (query.logits is None or val.logits is None):
        raise InputError(
            "no classifier scores of this split", where=run.folder, got=f"--predictor {predictor}",
            wanted="a split whose logits were kept: val or test", do="use --predictor knn, or --split test",
        )  # fmt: skip
    if predictor == "hybrid" and not val.labels.any():
        raise InputError(
            "nothing to tune the mix on", where=run.folder, got="no val image with a label", wanted="at least one",
            do="use --predictor knn or classifier",
        )  # fmt: skip


def tune_mix(knn: Scores, classifier: Scores, labels: npt.NDArray[np.uint8]) -> float:
    """The weight a of the grid with the highest mAP on val; of equals the one nearest to a half.

    Args:
        knn: Scores of the neighbours on val ``(n, C)``.
        classifier: Probabilities of the classifier on val ``(n, C)``.
        labels: ``(n, C)``.
    """
    found = {a: mean_average_precision(mix(a, knn, classifier), labels) for a in GRID}
    return max(GRID, key=lambda a: (found[a], -abs(a - 0.5)))


def mix(a: float, knn: Scores, classifier: Scores) -> npt.NDArray[np.float64]:
    """``a * knn + (1 - a) * classifier``, in class order ``(n, C)``."""
    mixed: npt.NDArray[np.float64] = a * knn.astype(np.float64) + (1.0 - a) * classifier
    return mixed


def hybrid_row(split: str, query: Codes, val: Codes, scores: Scores, val_scores: Scores, run: Run) -> dict[str, Any]:
    """Every metric of the mix on a split, its weight tuned on val alone; its scores are kept in the run.

    Args:
        split: Name of the split.
        query: Its codes, with logits.
        val: Codes of val, with logits.
        scores: The neighbours' on the split.
        val_scores: The neighbours' on val.
        run: The run.
    """
    classifier, on_val = query.probabilities, val.probabilities
    assert classifier is not None
    assert on_val is not None
    a = tune_mix(val_scores, on_val, val.labels)
    mixed = mix(a, scores, classifier)
    tuned_on = None if split == "val" else (mix(a, val_scores, on_val), val.labels)
    row = metrics_row("hybrid", split, mixed, query.labels, tuned_on=tuned_on, run=run)
    write_scores(run.folder, "hybrid", split, query.image_id, mixed)
    note = {"hybrid_note": "the weight was tuned on these images"} if split == "val" else {}
    return row | {"hybrid_weight_knn": a, "hybrid_tuned_on": "val"} | note

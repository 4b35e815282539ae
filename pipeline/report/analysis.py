"""Compare, part one: what a run's codes say of its test images, classes and tags.

Symbols: Q test images, N voting images, K neighbours, C classes.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ...heads.config import KnnConfig
from ...heads.metrics import per_class, tune_thresholds
from ...heads.ranking import average_precision
from ..core.results import Codes
from ..evaluation.search import NeighbourSearch
from .collect import ChosenRun, FinishedRun
from .document import Cell, ClassFailures, ImageCard, Query, Table, Tag, number

Floats = npt.NDArray[np.float64]

N_QUERIES, N_NEIGHBOURS, N_CONFUSIONS = 12, 9, 15
# Failures are shown of so many classes; the first ones, of the lowest AP, with more images than the others.
N_CLASSES, N_FIRST, IMAGES_OF_FIRST, IMAGES_OF_OTHERS = 80, 20, 4, 2
QUERY_SIDE, NEIGHBOUR_SIDE, FAILURE_SIDE = 320, 176, 136


@dataclass(frozen=True, kw_only=True)
class RunAnalysis:
    """Neighbours, votes and scores of the test images of one run.

    Attributes:
        run: The run.
        reason: Why this run was chosen.
        knn: How its neighbours were searched and how they vote.
        base: The codes that vote.
        query: The codes of the test images.
        neighbours: Rows of ``base`` ``(Q, K)``, the nearest first.
        distance: Their distances ``(Q, K)``.
        weight: Their shares of the vote ``(Q, K)``.
        scores: Votes ``(Q, C)``.
        threshold: Threshold with the highest micro F1 on val; None where no val image has a label.
        classifier: Probabilities of the classifier ``(Q, C)``; None where none were kept.
        classifier_threshold: Its threshold with the highest micro F1 on val.
        image_AP: AP of every image ``(Q,)``; NaN without a label.
        class_AP: AP of every class ``(C,)``; NaN without an image.
    """

    run: FinishedRun
    reason: str
    knn: KnnConfig
    base: Codes
    query: Codes
    neighbours: npt.NDArray[np.int64]
    distance: npt.NDArray[Any]
    weight: Floats
    scores: npt.NDArray[np.float32]
    threshold: float | None
    classifier: Floats | None
    classifier_threshold: float | None
    image_AP: Floats
    class_AP: Floats

    @property
    def name(self) -> str:
        """The name of the run's folder."""
        return self.run.folder.name

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names of the classes, in the order of the scores."""
        return self.run.info.category_names

    @property
    def labels(self) -> npt.NDArray[np.bool_]:
        """Labels of the test images ``(Q, C)``."""
        return self.query.labels.astype(bool)

    @property
    def decision_threshold(self) -> float:
        """The score from which on a tag is predicted."""
        return 0.5 if self.threshold is None else self.threshold


def analyse(chosen: ChosenRun) -> RunAnalysis:
    """Search and vote in the codes of a run as its own evaluation did."""
    base, query, val = chosen.codes.base, chosen.codes.query, chosen.codes.val
    metric = "cosine" if base.packed is None else chosen.knn.distance_metric
    update = {
        "distance_metric": metric,
        "ties": chosen.knn.ties if metric == "hamming" else "index",
        "K": min(chosen.knn.K, max(1, len(base) - 1)),  # a query that is in the index itself is left out
        "index": "auto",
    }
    knn = chosen.knn.model_copy(update=update)
    search = NeighbourSearch(chosen.codes, [knn])
    votes = search.vote(knn)
    return RunAnalysis(
        run=chosen.finished,
        reason=chosen.reason,
        knn=knn,
        base=base,
        query=query,
        neighbours=search.nearest.neighbours.index,
        distance=search.nearest.neighbours.distance,
        weight=search.weights(knn),
        scores=votes.scores,
        threshold=_best_threshold(votes.on_val, val),
        classifier=query.probabilities,
        classifier_threshold=_best_threshold(val.probabilities, val),
        image_AP=average_precision(votes.scores.T, query.labels.T.astype(bool)),
        class_AP=average_precision(votes.scores, query.labels),
    )


def class_table(analysis: RunAnalysis) -> Table:
    """A row per class, the lowest AP first: the votes at the tuned threshold, and the AP of the classifier."""
    votes = per_class(analysis.scores, analysis.query.labels, threshold=analysis.decision_threshold)
    n_train = analysis.base.labels.sum(axis=0)
    columns = ["class", "in train", "in test", "AP", "precision", "recall", "F1", "predicted"]
    classifier_AP = None
    if analysis.classifier is not None:
        classifier_AP = average_precision(analysis.classifier, analysis.query.labels)
        columns.append("AP classifier")
    rows = [
        (
            Cell(text=analysis.class_names[c]),
            number(float(n_train[c]), "{:,.0f}"),
            number(votes["n_positive"][c], "{:,.0f}"),
            *(number(float(votes[key][c])) for key in ("AP", "precision", "recall", "F1")),
            number(votes["n_predicted"][c], "{:,.0f}"),
            *([] if classifier_AP is None else [number(float(classifier_AP[c]))]),
        )
        for c in np.argsort(votes["AP"], kind="stable")  # NaN last
    ]
    source = "that is best on val" if analysis.threshold is not None else "(no val image has a label)"
    threshold = f"{analysis.decision_threshold:.3f} {source}"
    note = f"Neighbours of {analysis.name} on the test images, at the threshold {threshold}."
    return Table(name="table-classes", title="Every class", columns=tuple(columns), rows=tuple(rows), note=note)


def confusion_table(analysis: RunAnalysis) -> Table | None:
    """The most frequent pairs of a class that is missed and another that is predicted wrongly on the same image."""
    y, predicted = analysis.labels, analysis.scores >= analysis.decision_threshold
    missed, wrong = y & ~predicted, predicted & ~y
    counts = missed.T.astype(np.int64) @ wrong.astype(np.int64)
    expected = missed.sum(0)[:, None] * wrong.sum(0)[None, :] / max(1, len(y))
    order = np.argsort(-counts, axis=None, kind="stable")[:N_CONFUSIONS]
    pairs = [(c, d) for c, d in zip(*np.unravel_index(order, counts.shape), strict=True) if counts[c, d]]
    if not pairs:
        return None
    rows = [
        (
            Cell(text=analysis.class_names[c]),
            Cell(text=analysis.class_names[d]),
            number(float(counts[c, d]), "{:,.0f}"),
            number(float(missed[:, c].sum()), "{:,.0f}"),
            number(counts[c, d] / expected[c, d], "{:.1f} ×"),
        )
        for c, d in pairs
    ]
    return Table(
        name="table-confusions",
        title="Classes most confused",
        columns=("missed", "predicted instead", "images", "missed in all", "over chance"),
        n_words=2,
        rows=tuple(rows),
        note="An image counts for every pair of a tag that it lacks and a wrong one that it got. Over chance: how many"
        " times as often as if misses and wrong tags fell on images independently.",
    )


def queries(analysis: RunAnalysis) -> tuple[Query, ...]:
    """Test images at even steps of the ranking by AP, so that nobody picks the good ones."""
    AP = analysis.image_AP
    ranked = np.argsort(-AP, kind="stable")[: int((~np.isnan(AP)).sum())]  # NaN last
    if not len(ranked):
        return ()
    places = np.unique(np.linspace(0, len(ranked) - 1, min(N_QUERIES, len(ranked))).round().astype(int))
    return tuple(_query(analysis, int(row)) for row in ranked[places])


def failures(analysis: RunAnalysis) -> tuple[ClassFailures, ...]:
    """The surest wrong tags and the least sure missed ones of every class, the lowest AP first."""
    order = [int(c) for c in np.argsort(analysis.class_AP, kind="stable") if not np.isnan(analysis.class_AP[c])]
    return tuple(
        _failures(analysis, c, IMAGES_OF_FIRST if rank < N_FIRST else IMAGES_OF_OTHERS)
        for rank, c in enumerate(order[:N_CLASSES])
    )


def _best_threshold(scores: npt.NDArray[Any] | None, val: Codes) -> float | None:
    """The threshold with the highest micro F1 on val; None without scores or labels."""
    return None if scores is None or not val.labels.any() else tune_thresholds(scores, val.labels).overall


def _query(analysis: RunAnalysis, row: int) -> Query:
    truth = analysis.labels[row]
    neighbours = []
    for rank, neighbour in enumerate(analysis.neighbours[row, :N_NEIGHBOURS]):
        distance = analysis.distance[row, rank]
        bits = f"{distance:.0f} bit{'' if distance == 1 else 's'}"
        neighbours.append(
            ImageCard(
                image_id=int(analysis.base.image_id[neighbour]),
                side=NEIGHBOUR_SIDE,
                tags=tuple(
                    Tag(name=analysis.class_names[c], state="right" if truth[c] else "wrong")
                    for c in np.flatnonzero(analysis.base.labels[neighbour])
                ),
                score=float(analysis.weight[row, rank]),
                distance=bits if analysis.knn.distance_metric == "hamming" else f"{distance:.3f} away",
            )
        )
    image = ImageCard(
        image_id=int(analysis.query.image_id[row]), side=QUERY_SIDE, tags=tuple(_predictions(analysis, row))
    )
    return Query(image=image, AP=float(analysis.image_AP[row]), neighbours=tuple(neighbours))


def _predictions(analysis: RunAnalysis, row: int) -> list[Tag]:
    """Predicted tags by score, then those that were missed."""
    scores, truth = analysis.scores[row], analysis.labels[row]
    predicted = scores >= analysis.decision_threshold
    shown = sorted(np.flatnonzero(predicted | truth), key=lambda c: (not predicted[c], -scores[c]))
    states = {(True, True): "right", (True, False): "wrong", (False, True): "missed"}
    return [
        Tag(name=analysis.class_names[c], state=states[bool(predicted[c]), bool(truth[c])], score=float(scores[c]))
        for c in shown
    ]


def _failures(analysis: RunAnalysis, c: int, n_images: int) -> ClassFailures:
    scores, truth = analysis.scores[:, c], analysis.labels[:, c]
    predicted = scores >= analysis.decision_threshold
    wrong, missed = np.flatnonzero(predicted & ~truth), np.flatnonzero(~predicted & truth)
    surest = wrong[np.argsort(-scores[wrong], kind="stable")][:n_images]
    least_sure = missed[np.argsort(scores[missed], kind="stable")][:n_images]

    def cards(rows: npt.NDArray[np.intp]) -> tuple[ImageCard, ...]:
        return tuple(
            ImageCard(
                image_id=int(analysis.query.image_id[row]),
                side=FAILURE_SIDE,
                tags=tuple(Tag(name=analysis.class_names[k], state="") for k in np.flatnonzero(analysis.labels[row])),
                score=float(scores[row]),
            )
            for row in rows
        )

    return ClassFailures(
        category=analysis.class_names[c],
        AP=float(analysis.class_AP[c]),
        n_positive=int(truth.sum()),
        n_false_positive=len(wrong),
        n_false_negative=len(missed),
        false_positives=cards(surest),
        false_negatives=cards(least_sure),
    )

"""Images to look at: queries with their neighbours, evenly from the best tagged to the worst, and the failures."""

import numpy as np

from ...heads.ranking import average_precision
from .depth import SHOWN, Depth
from .document import ClassFailures, Query, Shown, Tag
from .pictures import Pictures

QUERIES = 12
MOST_CLASSES, MOST_IMAGES, FEW_IMAGES, OPEN = 80, 4, 2, 20
QUERY_SIDE, NEIGHBOUR_SIDE, FAILURE_SIDE = 320, 176, 136


def queries(depth: Depth, pictures: Pictures, n: int = QUERIES) -> tuple[Query, ...]:
    """Queries at even steps of the ranking by AP, so that nobody picks the good ones."""
    ranked = np.argsort(-np.where(np.isnan(depth.AP), -1.0, depth.AP), kind="stable")
    ranked = ranked[: int((~np.isnan(depth.AP)).sum())]
    if not len(ranked):
        return ()
    places = np.unique(np.linspace(0, len(ranked) - 1, min(n, len(ranked))).round().astype(int))
    return tuple(_query(depth, pictures, int(ranked[place])) for place in places)


def failures(depth: Depth, pictures: Pictures) -> tuple[ClassFailures, ...]:
    """The surest wrong tags and the least sure missed ones of every class; more of the classes with the lowest AP."""
    AP = average_precision(depth.scores, depth.query.labels)
    order = [int(c) for c in np.argsort(AP, kind="stable") if not np.isnan(AP[c])]
    return tuple(
        _failures(depth, pictures, c, float(AP[c]), MOST_IMAGES if at < OPEN else FEW_IMAGES)
        for at, c in enumerate(order[:MOST_CLASSES])
    )


def _query(depth: Depth, pictures: Pictures, row: int) -> Query:
    image = int(depth.query.image_id[row])
    truth = depth.query.labels[row].astype(bool)
    near = []
    for at in range(min(SHOWN, depth.neighbours.shape[1])):
        other = int(depth.neighbours[row, at])
        number = int(depth.base.image_id[other])
        tags = tuple(
            Tag(name=depth.names[c], state="right" if truth[c] else "wrong")
            for c in np.flatnonzero(depth.base.labels[other])
        )
        near.append(
            Shown(
                image_id=number, picture=pictures.picture(number, NEIGHBOUR_SIDE), caption=pictures.caption(number),
                tags=tags, share=float(depth.weight[row, at]), distance=_distance(depth, row, at),
            )
        )  # fmt: skip
    shown = Shown(
        image_id=image, picture=pictures.picture(image, QUERY_SIDE), caption=pictures.caption(image),
        tags=_tags(depth, row),
    )  # fmt: skip
    return Query(image=shown, AP=float(depth.AP[row]), neighbours=tuple(near))


def _distance(depth: Depth, row: int, at: int) -> str:
    value = depth.distance[row, at]
    if depth.knn.distance_metric != "hamming":
        return f"{value:.3f} away"
    return f"{value:.0f} bit{'' if value == 1 else 's'}"


def _tags(depth: Depth, row: int) -> tuple[Tag, ...]:
    """Predicted tags by score, then those that were missed."""
    scores, truth = depth.scores[row], depth.query.labels[row].astype(bool)
    states = np.where(scores >= depth.at, np.where(truth, "right", "wrong"), np.where(truth, "missed", ""))
    shown = sorted(np.flatnonzero(states != ""), key=lambda c: (states[c] == "missed", -scores[c]))
    return tuple(Tag(name=depth.names[c], state=str(states[c]), score=float(scores[c])) for c in shown)


def _failures(depth: Depth, pictures: Pictures, c: int, AP: float, most: int) -> ClassFailures:
    scores, truth = depth.scores[:, c], depth.query.labels[:, c].astype(bool)
    predicted = scores >= depth.at
    wrong, missed = np.flatnonzero(predicted & ~truth), np.flatnonzero(~predicted & truth)
    surest = wrong[np.argsort(-scores[wrong], kind="stable")][:most]
    least = missed[np.argsort(scores[missed], kind="stable")][:most]
    return ClassFailures(
        category=depth.names[c], AP=AP, n_positive=int(truth.sum()), n_false_positive=len(wrong),
        n_false_negative=len(missed), false_positives=tuple(_shown(depth, pictures, int(row), c) for row in surest),
        false_negatives=tuple(_shown(depth, pictures, int(row), c) for row in least),
    )  # fmt: skip


def _shown(depth: Depth, pictures: Pictures, row: int, c: int) -> Shown:
    image = int(depth.query.image_id[row])
    tags = tuple(Tag(name=depth.names[k], state="right") for k in np.flatnonzero(depth.query.labels[row]))
    return Shown(
        image_id=image, picture=pictures.picture(image, FAILURE_SIDE), caption=pictures.caption(image), tags=tags,
        share=float(depth.scores[row, c]),
    )  # fmt: skip

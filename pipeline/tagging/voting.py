"""From codes to tags with reasons: neighbours in an index vote, and every vote is told.

Symbols: Q queries, K neighbours, C categories, N samples of the index.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from ...errors import InputError
from ...heads.config import KnnConfig, Metric
from ...heads.knn import Neighbours, build_index
from ...heads.voting import BoundaryIndex, shared_weights, vote, vote_shared, weights
from ..evaluation.search import check_ties
from .encode import Coded
from .index_file import TagIndex


@dataclass(frozen=True, kw_only=True)
class Neighbour:
    """One sample of the index that was near.

    Attributes:
        image_id: Its id.
        path: Its image, relative to the data folder it came from; ``None`` where nobody knows.
        caption: The caption its code was made with, likewise.
        distance: Differing bits, or ``1 - cosine``.
        similarity: ``1 - distance / B``, or the cosine.
        weight: Its share of the vote, 0 to 1.
        labels: Its tags.
    """

    image_id: int
    path: str | None
    caption: str | None
    distance: float
    similarity: float
    weight: float
    labels: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """A JSON object."""
        return {**asdict(self), "labels": list(self.labels)}


@dataclass(frozen=True, kw_only=True)
class Tag:
    """A tag, its score, and who voted for it.

    Attributes:
        name: The category's name.
        score: The sum of its voters' weights, 0 to 1.
        voters: The neighbours that have this tag and some weight, the nearest first.
    """

    name: str
    score: float
    voters: tuple[Neighbour, ...]

    def to_json(self) -> dict[str, Any]:
        """A JSON object."""
        return {"tag": self.name, "score": self.score, "neighbours": [one.to_json() for one in self.voters]}


@dataclass(frozen=True, kw_only=True, eq=False)
class Tagging:
    """One image with its tags.

    Attributes:
        image: The image as it was named; ``None`` where pixels were given.
        caption: Its caption; ``None`` where none was given.
        tags: The best tags that got a vote, the best first, ties in class order.
        neighbours: All K neighbours, the nearest first.
        scores: Of every category ``(C,)`` float32, in class order.
        category_names: C names, in class order.
        metric: ``hamming``, ``cosine``, ``hybrid`` or ``asymmetric``.
    """

    image: str | None
    caption: str | None
    tags: tuple[Tag, ...]
    neighbours: tuple[Neighbour, ...]
    scores: npt.NDArray[np.float32]
    category_names: tuple[str, ...]
    metric: str

    @property
    def unit(self) -> str:
        """What a distance counts."""
        return "bits" if self.metric == "hamming" else "cosine distance"

    def to_json(self) -> dict[str, Any]:
        """A JSON object; scores in class order."""
        return {
            "image": self.image,
            "caption": self.caption,
            "tags": [tag.to_json() for tag in self.tags],
            "neighbours": [one.to_json() for one in self.neighbours],
            "scores": self.scores.tolist(),
        }


class Query(NamedTuple):
    """What is known of a query besides its code: how it is named, its caption, and its own id in the index if any."""

    image: str | None
    caption: str | None
    image_id: int | None = None


class Voters:
    """An index that tags codes.

    Args:
        index: The samples.
        knn: How to search and vote. Without hash layer the metric is cosine unless Hamming was asked for by name.

    Attributes:
        knn: The same with the metric that is used.

    Raises:
        InputError: Hamming distance, or ties that share their votes, were asked for, and the codes have no bits.
    """

    def __init__(self, index: TagIndex, knn: KnnConfig) -> None:
        self.index = index
        self.knn = knn.model_copy(update={"distance_metric": _metric(index, knn)})
        check_ties(self.knn)
        self._search = build_index(self.knn.distance_metric, packed=index.packed, soft=index.soft)
        packed = index.packed if self.knn.ties == "average" else None
        self._boundary = None if packed is None else BoundaryIndex(packed, index.labels)

    def check_k(self, k: int | None, *, usable: int | None = None) -> int:
        """K: what was asked for, else as configured.

        Args:
            k: Neighbours that are to vote.
            usable: Samples that may; all when not given.

        Raises:
            InputError: There are not so many.
        """
        K, usable = self.knn.K if k is None else k, len(self.index) if usable is None else usable
        if not 1 <= K <= usable:
            raise InputError("K does not fit the index", got=f"--k {K}", wanted=f"1 to {usable}", do="give another --k")
        return K

    def tag(self, coded: Coded, queries: Sequence[Query], *, k: int | None = None, top: int = 5) -> list[Tagging]:
        """Tag Q codes.

        Args:
            coded: Of Q queries, made as the index's were.
            queries: What is known of them.
            k: K, neighbours that vote; those of the configuration when not given.
            top: Tags of each at most.

        Raises:
            InputError: K is larger than the index, without the query's own sample where it is there.
        """
        given = np.array([query.image_id is not None for query in queries], bool)
        rows = self.index.rows_of(np.array([query.image_id or 0 for query in queries], np.int64))
        exclude = np.where(given, rows, -1)
        K = self.check_k(k, usable=len(self.index) - int((exclude >= 0).any()))
        found = self._search.search(K=K, packed=coded.packed, soft=coded.soft, exclude=exclude)
        scores, shares = self._vote(found, coded, exclude)
        return [
            self._tagging(
                query,
                scores[at],
                [
                    self._neighbour(int(row), float(distance), float(similarity), float(share))
                    for row, distance, similarity, share in zip(
                        found.index[at], found.distance[at], found.similarity[at], shares[at], strict=True
                    )
                ],
                top,
            )
            for at, query in enumerate(queries)
        ]

    def _vote(
        self, found: Neighbours, coded: Coded, exclude: npt.NDArray[np.int64]
    ) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float64]]:
        """Scores ``(Q, C)``, and the weight of every neighbour ``(Q, K)``."""
        labels, K = self.index.labels, found.index.shape[1]
        if self._boundary is None or not len(found.index):
            shares = weights(found.similarity, self.knn.voting_strategy, tau=self.knn.tau, theta=self.knn.theta)
            return vote(found, labels, self.knn, K), shares
        assert coded.packed is not None
        groups = self._boundary.groups(coded.packed, found.distance[:, -1].astype(np.int32), exclude)
        return vote_shared(found, labels, self.knn, groups, K), shared_weights(found, self.knn, groups, K)

    def _neighbour(self, row: int, distance: float, similarity: float, weight: float) -> Neighbour:
        index = self.index
        return Neighbour(
            image_id=int(index.image_id[row]),
            path=index.paths[row].as_py() or None,
            caption=index.captions[row].as_py() or None,
            distance=distance,
            similarity=similarity,
            weight=weight,
            labels=tuple(index.category_names[c] for c in np.flatnonzero(index.labels[row])),
        )

    def _tagging(self, query: Query, scores: npt.NDArray[np.float32], near: Sequence[Neighbour], top: int) -> Tagging:
        names = self.index.category_names
        best = [c for c in np.argsort(-scores, kind="stable")[:top] if scores[c] > 0]
        tags = tuple(
            Tag(
                name=names[c],
                score=float(scores[c]),
                voters=tuple(one for one in near if names[c] in one.labels and one.weight > 0),
            )
            for c in best
        )
        return Tagging(
            image=query.image,
            caption=query.caption,
            tags=tags,
            neighbours=tuple(near),
            scores=scores,
            category_names=names,
            metric=self.knn.distance_metric,
        )


def _metric(index: TagIndex, knn: KnnConfig) -> Metric:
    if index.packed is not None or knn.distance_metric == "cosine":
        return knn.distance_metric
    if "distance_metric" in knn.model_fields_set:
        raise InputError(
            "no hash layer",
            where="the run",
            got=f"--metric {knn.distance_metric}",
            wanted="--metric cosine",
            do="train with `mmcli train-head --bits 64`, or use --metric cosine",
        )
    return "cosine"

"""From codes to tags with reasons: neighbours in an index vote, and every tag keeps its voters.

Symbols: Q queries, K neighbours, C categories, N samples of the index.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from ...errors import InputError
from ...heads.config import KnnConfig
from ...heads.voting import VotingIndex
from ..evaluation.search import fitting_metric
from .encode import Coded
from .index_file import TagIndex


@dataclass(frozen=True, kw_only=True)
class Neighbour:
    """One of the K samples of the index that are nearest to a query.

    Attributes:
        image_id: Its id.
        path: Its image, relative to the data folder it came from; ``None`` where that is not known.
        caption: The caption its code was made with; ``None`` where that is not known.
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


@dataclass(frozen=True, kw_only=True, eq=False)
class Tagging:
    """One image with its tags.

    Attributes:
        image: The image as it was named; ``None`` where pixels were given.
        caption: Its caption; ``None`` where none was given.
        tags: The best tags that got a vote, the best first, ties in class order.
        neighbours: All K neighbours, the nearest first.
        scores: The score of every category ``(C,)`` float32, in class order.
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
        """The unit of the neighbours' distances."""
        return "bits" if self.metric == "hamming" else "cosine distance"

    def to_json(self) -> dict[str, Any]:
        """The image, its tags and its neighbours as a JSON object; scores in class order."""
        return {
            "image": self.image,
            "caption": self.caption,
            "tags": [
                {"tag": tag.name, "score": tag.score, "neighbours": [asdict(voter) for voter in tag.voters]}
                for tag in self.tags
            ],
            "neighbours": [asdict(neighbour) for neighbour in self.neighbours],
            "scores": self.scores.tolist(),
        }


class Query(NamedTuple):
    """A query besides its code: the name of its image, its caption, and its own id in the index if it is there."""

    image: str | None
    caption: str | None
    image_id: int | None = None


class Voters:
    """An index that tags codes.

    Args:
        index: The samples.
        knn: How to search and vote. Without hash layer the metric is cosine unless Hamming was asked for by name.

    Attributes:
        knn: The configuration of the vote, with the metric that is used.

    Raises:
        InputError: Hamming distance, or ties that share their votes, were asked for, and the codes have no bits.
    """

    def __init__(self, index: TagIndex, knn: KnnConfig) -> None:
        self.index = index
        self.knn = knn.model_copy(update={"distance_metric": fitting_metric(knn, index.bits, "the run")})
        self._voting = VotingIndex(self.knn, index.labels, packed=index.packed, soft=index.soft)

    def check_k(self, k: int | None, *, usable: int | None = None) -> int:
        """The K that was asked for, else that of the configuration.

        Args:
            k: Neighbours that are to vote.
            usable: Samples that may vote; all of the index when not given.

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
            coded: Codes of Q queries, made as the index's were.
            queries: The Q queries.
            k: K, neighbours that vote; those of the configuration when not given.
            top: Tags of each at most.

        Raises:
            InputError: K is larger than the index, without the query's own sample where it is there.
        """
        named = np.array([query.image_id is not None for query in queries], bool)
        rows = self.index.rows_of(np.array([query.image_id or 0 for query in queries], np.int64))
        exclude = np.where(named, rows, -1)
        K = self.check_k(k, usable=len(self.index) - int((exclude >= 0).any()))
        knn = self.knn.model_copy(update={"K": K})
        nearest = self._voting.search(K, packed=coded.packed, soft=coded.soft, exclude=exclude)
        scores, weights = self._voting.vote(nearest, knn), self._voting.weights(nearest, knn)
        taggings = []
        for q, query in enumerate(queries):
            columns = [column[q] for column in (*nearest.neighbours, weights)]
            neighbours = [self._neighbour(*values) for values in zip(*columns, strict=True)]
            taggings.append(self._tagging(query, scores[q], neighbours, top))
        return taggings

    def _neighbour(self, row: int, similarity: float, distance: float, weight: float) -> Neighbour:
        index = self.index
        return Neighbour(
            image_id=int(index.image_id[row]),
            path=index.paths[row].as_py() or None,
            caption=index.captions[row].as_py() or None,
            distance=float(distance),
            similarity=float(similarity),
            weight=float(weight),
            labels=tuple(index.category_names[c] for c in np.flatnonzero(index.labels[row])),
        )

    def _tagging(self, query: Query, scores: npt.NDArray[np.float32], near: Sequence[Neighbour], top: int) -> Tagging:
        names = self.index.category_names
        best = [c for c in np.argsort(-scores, kind="stable")[:top] if scores[c] > 0]
        tags = [
            Tag(
                name=names[c],
                score=float(scores[c]),
                voters=tuple(voter for voter in near if names[c] in voter.labels and voter.weight > 0),
            )
            for c in best
        ]
        return Tagging(
            image=query.image,
            caption=query.caption,
            tags=tuple(tags),
            neighbours=tuple(near),
            scores=scores,
            category_names=names,
            metric=self.knn.distance_metric,
        )

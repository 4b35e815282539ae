"""What an image is tagged with and why: tags, scores, and the neighbours that voted for each tag."""

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt


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
            "image": self.image, "caption": self.caption, "tags": [tag.to_json() for tag in self.tags],
            "neighbours": [one.to_json() for one in self.neighbours], "scores": self.scores.tolist(),
        }  # fmt: skip

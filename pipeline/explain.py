"""Why a tag: the neighbours that voted for it."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from rich.console import Group, RenderableType
from rich.text import Text

from ..heads.config import KnnConfig
from ..heads.knn import build_index
from ..heads.voting import vote, weights
from .codes import Codes
from .manifest import Manifest

SHOWN_NEIGHBOURS = 3


@dataclass(frozen=True, kw_only=True)
class Explained:
    """One image with its tags and voters.

    Attributes:
        path: The image, relative to the data folder.
        caption: The caption it was tagged with.
        truth: Its true tags.
        tags: Tag and score, the best first.
        neighbours: For each voter shown: path, caption, tags, weight of its vote, distance in words.
    """

    path: str
    caption: str
    truth: tuple[str, ...]
    tags: tuple[tuple[str, float], ...]
    neighbours: tuple[tuple[str, str, tuple[str, ...], float, str], ...]

    def show(self) -> RenderableType:
        """A few lines for a person."""
        lines = [
            Text.assemble(("  image    ", "dim"), self.path),
            Text.assemble(("  caption  ", "dim"), f"“{self.caption}”"),
            Text.assemble(("  tags     ", "dim"), *self._tags()),
            Text.assemble(("  truth    ", "dim"), ", ".join(self.truth)),
        ]
        for number, (path, caption, tags, weight, distance) in enumerate(self.neighbours):
            lead = "  because  " if number == 0 else "           "
            vote_of = f"{weight:.0%} of the vote, {distance}: {', '.join(tags)}  “{caption}”  {Path(path).name}"
            lines.append(Text.assemble((lead, "dim"), vote_of))
        return Group(*lines)

    def _tags(self) -> list[tuple[str, str]]:
        parts = []
        for name, score in self.tags:
            parts.append((f"{name} {score:.2f}   ", "bold green" if name in self.truth else "yellow"))
        return parts


def explain(base: Codes, query: Codes, row: int, listing: Manifest, knn: KnnConfig) -> Explained:
    """Tag one image of a split and name its voters.

    Args:
        base: Codes of the train split.
        query: Codes of the image's split.
        row: Row of the image in ``query``.
        listing: The manifest that both come from.
        knn: How to search and vote.
    """
    index = build_index(knn.distance_metric, packed=base.packed, soft=base.soft)
    one = slice(row, row + 1)
    packed = None if query.packed is None else query.packed[one]
    found = index.search(packed=packed, soft=query.soft[one], K=knn.K)
    scores = vote(found, base.labels, knn)[0]
    share = weights(found.similarity, knn.voting_strategy, tau=knn.tau, theta=knn.theta)[0]
    at = {int(image_id): position for position, image_id in enumerate(listing.image_ids)}
    names, me = listing.category_names, at[int(query.image_id[row])]
    voters = []
    for rank in range(min(SHOWN_NEIGHBOURS, knn.K)):
        neighbour = int(found.index[0, rank])
        where = at[int(base.image_id[neighbour])]
        tags = tuple(names[c] for c in np.flatnonzero(base.labels[neighbour]))
        unit = "bits differ" if knn.distance_metric == "hamming" else "cosine distance"
        distance = f"{found.distance[0, rank]:.3g} {unit}"
        voters.append((listing.paths[where], listing.captions[where][0], tags, float(share[rank]), distance))
    best = np.argsort(-scores, kind="stable")[: knn.top_n_tags]
    return Explained(
        path=listing.paths[me],
        caption=listing.captions[me][0],
        truth=tuple(names[c] for c in np.flatnonzero(query.labels[row])),
        tags=tuple((names[c], float(scores[c])) for c in best if scores[c] > 0.05),
        neighbours=tuple(voters),
    )

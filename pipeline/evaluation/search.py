"""Search and vote in the codes of a run, timed and weighed; what every evaluation of neighbours shares."""

import time
from dataclasses import dataclass, field
from typing import Any, get_args

import numpy as np
import numpy.typing as npt

from ...errors import InputError
from ...heads.config import IndexKind, KnnConfig, Metric
from ...heads.knn import APPROXIMATE, Neighbours, build_index
from ...heads.voting import Boundary, BoundaryIndex, vote, vote_shared
from ..core.results import Codes, codes_path, read_codes
from ..core.run import Run

Scores = npt.NDArray[np.float32]

SINGLE_QUERIES = 200
WARM_UP = 20
assert set(APPROXIMATE) <= set(get_args(IndexKind))


@dataclass
class Found:
    """Neighbours of some queries, and what was worked out from them.

    Attributes:
        neighbours: Of the search.
        packed: The queries' codes ``(Q, B // 8)``, if any.
        own: The row of each query that was left out, -1 for none; ``None`` where there is none at all.
        boundaries: Groups at the distance of neighbour K, by K.
    """

    neighbours: Neighbours
    packed: npt.NDArray[np.uint8] | None
    own: npt.NDArray[np.int64] | None
    boundaries: dict[int, Boundary] = field(default_factory=dict)


class Searcher:
    """An index over codes and the votes of its rows; leaves out the query's own image.

    Args:
        base: The codes that vote.
        knn: Metric, index and ties.
        device: Where to search, a name that torch knows.

    Attributes:
        index: The index.
        build_s: Seconds that building it took.

    Raises:
        InputError: The codes do not serve the metric or the ties asked for.
    """

    def __init__(self, base: Codes, knn: KnnConfig, device: str = "cpu") -> None:
        check_ties(knn)
        self._base, self._order = base, np.argsort(base.image_id)
        started = time.perf_counter()
        self.index = build_index(knn.distance_metric, packed=base.packed, soft=base.soft, kind=knn.index, device=device)
        self.build_s = time.perf_counter() - started
        self._boundary: BoundaryIndex | None = None

    def find(self, query: Codes, K: int, rows: slice = slice(None)) -> Found:
        """The K nearest of some rows of a split."""
        packed = None if query.packed is None else query.packed[rows]
        own = self._own_rows(query.image_id[rows])
        return Found(self.index.search(packed=packed, soft=query.soft[rows], K=K, exclude=own), packed, own)

    def score(self, found: Found, knn: KnnConfig) -> Scores:
        """Scores of every class ``(Q, C)`` for a K of at most that of the search."""
        if knn.ties == "average":
            return vote_shared(found.neighbours, self._base.labels, knn, self.boundary(found, knn.K))
        return vote(found.neighbours, self._base.labels, knn)

    def boundary(self, found: Found, K: int) -> Boundary:
        """The groups at the distance of neighbour K of a Hamming search; found once."""
        if K not in found.boundaries:
            assert found.packed is not None
            assert self._base.packed is not None
            if self._boundary is None:
                self._boundary = BoundaryIndex(self._base.packed, self._base.labels)
            distance = found.neighbours.distance[:, K - 1].astype(np.int32)
            found.boundaries[K] = self._boundary.groups(found.packed, distance, found.own)
        return found.boundaries[K]

    def boundary_facts(self, found: Found, K: int) -> dict[str, float]:
        """How often the last place is contested: the share of queries whose last voters were chosen among equals.

        ``boundary_group_size`` is the mean number of codes at the distance of neighbour K, over all queries.
        """
        size = self.boundary(found, K).size
        distance = found.neighbours.distance[:, :K]
        inside = (distance == distance[:, -1:]).sum(axis=1)
        return {"boundary_tied": float((size > inside).mean()), "boundary_group_size": float(size.mean())}

    def latency(self, query: Codes, knn: KnnConfig) -> dict[str, float]:
        """Search and vote of one query at a time, from its code to its scores."""
        times = []
        for at in range(WARM_UP + SINGLE_QUERIES):
            row = at % len(query)
            started = time.perf_counter()
            self.score(self.find(query, knn.K, slice(row, row + 1)), knn)
            times.append(1e3 * (time.perf_counter() - started))
        kept = np.array(times[WARM_UP:])
        return {
            "query_latency_ms": float(kept.mean()),
            "query_latency_ms_p50": float(np.percentile(kept, 50)),
            "query_latency_ms_p95": float(np.percentile(kept, 95)),
        }

    def sizes(self) -> dict[str, float]:
        """Bytes of the index, and of binary and float codes side by side."""
        base = self._base
        sizes = {"index_bytes": float(self.index.n_bytes), "float_code_bytes": float(base.soft.nbytes)}
        if base.packed is not None:
            sizes |= {
                "binary_code_bytes": float(base.packed.nbytes),
                "float_over_binary_bytes": base.soft.nbytes / base.packed.nbytes,
            }
        return sizes

    def recall(self, query: Codes, found: Found, knn: KnnConfig) -> dict[str, float]:
        """Share of the exact neighbours that an approximate index found; nothing of an exact one."""
        if knn.index not in APPROXIMATE:
            return {}
        exact = build_index(knn.distance_metric, packed=self._base.packed, soft=self._base.soft, kind="flat")
        wanted = exact.search(packed=query.packed, soft=query.soft, K=knn.K, exclude=found.own)
        return {"index_recall": recall(found.neighbours, wanted)}

    def _own_rows(self, image_id: npt.NDArray[np.int64]) -> npt.NDArray[np.int64] | None:
        """Row of each query's own image in the index, -1 where it is not there."""
        at = np.searchsorted(self._base.image_id, image_id, sorter=self._order)
        candidate = self._order[np.minimum(at, len(self._order) - 1)]
        own = np.where(self._base.image_id[candidate] == image_id, candidate, -1)
        return own if (own >= 0).any() else None


def check_ties(knn: KnnConfig) -> None:
    """Refuse shared ties of distances that do not tie.

    Raises:
        InputError: The metric is not Hamming.
    """
    if knn.ties == "average" and knn.distance_metric != "hamming":
        raise InputError(
            "only Hamming distances tie",
            where="--ties",
            got=f"average with metric {knn.distance_metric}",
            wanted="--metric hamming",
            do="leave --ties out: cosines are settled by index",
        )


def recall(found: Neighbours, wanted: Neighbours) -> float:
    """Mean share of the wanted rows ``(Q, K)`` that were found."""
    Q, K = wanted.index.shape
    both = np.sort(np.concatenate([found.index[:, :K], wanted.index], axis=1), axis=1)
    return float((both[:, 1:] == both[:, :-1]).sum() / (Q * K))


def settings(knn: KnnConfig, base: Codes, index_kind: str) -> dict[str, Any]:
    """What a row of neighbours was computed with."""
    bits = 0 if base.packed is None else 8 * base.packed.shape[1]
    found = {
        "bits": bits,
        "K": knn.K,
        "distance_metric": knn.distance_metric,
        "voting_strategy": knn.voting_strategy,
        "tau": knn.tau,
        "theta": knn.theta,
        "ties": knn.ties,
        "index_kind": index_kind,
        "n_index": len(base),
    }
    # tau acts on 1 - dist/B, so only tau * B says how many bits of distance matter.
    return found | ({"tau_bits": knn.tau * bits} if knn.distance_metric == "hamming" else {})


@dataclass(frozen=True, kw_only=True)
class Evaluated:
    """Codes of a run that an evaluation reads.

    Attributes:
        base: The codes that vote: those of ``database`` where the protocol has one, else of train.
        val: Those that thresholds and the mix are tuned on.
        query: Those that are tagged.
        split: Name of their split.
    """

    base: Codes
    val: Codes
    query: Codes
    split: str

    @classmethod
    def of(cls, run: Run, split: str) -> "Evaluated":
        """Read what is needed of a run.

        Raises:
            InputError: Damaged codes, or a split without images.
        """
        voters = "database" if codes_path(run.folder, "database").is_file() else "train"
        base, val = read_codes(run.folder, voters), read_codes(run.folder, "val")
        query = {voters: base, "val": val}.get(split) or read_codes(run.folder, split)
        if not len(query):
            raise InputError(
                "an empty split", where=run.folder, got=f"no {split} images", wanted="some", do="choose --split"
            )
        return cls(base=base, val=val, query=query, split=split)

    def check_k(self, K: int, run: Run) -> None:
        """Refuse more neighbours than there are for a query, or an image of val, that is in the index itself.

        Raises:
            InputError: There are fewer.
        """
        asked = np.concatenate([self.query.image_id, self.val.image_id])
        inside = bool(np.isin(asked, self.base.image_id).any())
        usable = len(self.base) - inside
        if usable < K:
            raise InputError(
                "K is larger than the index",
                where=run.folder,
                got=f"--k {K}",
                wanted=f"at most {usable}",
                do="lower --k",
            )


def fitting_metric(knn: KnnConfig, base: Codes, run: Run) -> Metric:
    """Without a hash layer neighbours are found by cosine on z; Hamming asked for in so many words is refused.

    Raises:
        InputError: It was.
    """
    if base.packed is not None or knn.distance_metric == "cosine":
        return knn.distance_metric
    if "distance_metric" in knn.model_fields_set:
        raise InputError(
            "no hash layer",
            where=run.folder,
            got=f"--metric {knn.distance_metric}",
            wanted="--metric cosine",
            do="train with `mmcli train-head --bits 64`, or use --metric cosine",
        )
    return "cosine"

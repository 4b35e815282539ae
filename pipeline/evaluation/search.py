"""Neighbour evaluation: one search of a split and of val, then votes and metrics for any K, vote, tau and theta."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from ...errors import InputError
from ...heads.config import KnnConfig, Metric
from ...heads.neighbours import Rows
from ...heads.retrieval import retrieval_row
from ...heads.voting import QueryNeighbours, VotingIndex, Weights
from ..core.results import Codes, read_codes
from ..core.run import Run
from .metrics import Scores, metrics_row, mix_with_classifier

SINGLE_QUERIES = 200
WARM_UP = 20


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
        """Read the codes from a run.

        Raises:
            InputError: Damaged codes, or a split without images.
        """
        voters = "database" if run.paths.codes("database").is_file() else "train"
        base, val = read_codes(run.folder, voters), read_codes(run.folder, "val")
        query = {voters: base, "val": val}.get(split) or read_codes(run.folder, split)
        if not len(query):
            raise InputError(
                "an empty split", where=run.folder, got=f"no {split} images", wanted="some", do="choose --split"
            )
        return cls(base=base, val=val, query=query, split=split)

    @property
    def bits(self) -> int:
        """B; 0 without hash layer."""
        return 0 if self.base.packed is None else 8 * self.base.packed.shape[1]

    def check_k(self, K: int, run: Run) -> None:
        """Refuse more neighbours than there are for a query, or an image of val, that is in the index itself.

        Raises:
            InputError: There are fewer.
        """
        asked = np.concatenate([self.query.image_id, self.val.image_id])
        usable = len(self.base) - bool(np.isin(asked, self.base.image_id).any())
        if usable < K:
            raise InputError(
                "K is larger than the index",
                where=run.folder,
                got=f"--k {K}",
                wanted=f"at most {usable}",
                do="lower --k",
            )

    def retrieval(self) -> dict[str, Any]:
        """How well the codes retrieve images; empty without hash layer, and where queries are in the base."""
        base, query = self.base, self.query
        if base.packed is None or query.packed is None or np.isin(query.image_id, base.image_id).any():
            return {}
        return retrieval_row(query.packed, query.labels, base.packed, base.labels)


class Votes(NamedTuple):
    """Scores ``(N, C)`` of the neighbours, or of their mix, on the split and on val; and the seconds of the voting."""

    scores: Scores
    on_val: Scores
    seconds: float


class NeighbourSearch:
    """One search of a split and one of val, at the largest K of several configurations; each of them then votes.

    An image never votes for itself.

    Args:
        codes: The codes that vote and those that are tagged.
        configs: Configurations of one search, as :func:`.sweep.searches` groups them.
        device: Where to search, a name that torch knows.

    Attributes:
        codes: The codes that were given.
        voting: The index and the votes of its rows.
        nearest: The neighbours of the split.
        build_s: Seconds that building the index took.
        search_s: Seconds that the search of the split took.

    Raises:
        InputError: The codes do not serve the metric or the ties.
    """

    def __init__(self, codes: Evaluated, configs: Sequence[KnnConfig], device: str = "cpu") -> None:
        knn, base = max(configs, key=lambda config: config.K), codes.base
        self.codes, self._order = codes, np.argsort(base.image_id)
        started = time.perf_counter()
        self.voting = VotingIndex(knn, base.labels, packed=base.packed, soft=base.soft, device=device)
        self.build_s = time.perf_counter() - started
        started = time.perf_counter()
        self.nearest = self._search(codes.query, knn.K)
        self.search_s = time.perf_counter() - started
        self._on_val = self.nearest if codes.query is codes.val else self._search(codes.val, knn.K)

    def vote(self, knn: KnnConfig) -> Votes:
        """Scores for a K of at most that of the search."""
        started = time.perf_counter()
        scores = self.voting.vote(self.nearest, knn)
        seconds = time.perf_counter() - started
        on_val = scores if self._on_val is self.nearest else self.voting.vote(self._on_val, knn)
        return Votes(scores, on_val, seconds)

    def weights(self, knn: KnnConfig) -> Weights:
        """The share of the vote of each neighbour of the split ``(N, K)``."""
        return self.voting.weights(self.nearest, knn)

    def mix(self, votes: Votes) -> tuple[Votes, float]:
        """The votes mixed with the classifier's probabilities, and the weight of the votes, which is tuned on val."""
        codes = self.codes
        weight, scores, on_val = mix_with_classifier(codes.query, codes.val, votes.scores, votes.on_val)
        return Votes(scores, on_val, votes.seconds), weight

    def row(self, method: str, votes: Votes, knn: KnnConfig, run: Run | None = None) -> dict[str, Any]:
        """Every metric of scores that these neighbours gave, alone or mixed, and what they were computed with.

        Args:
            method: Name of the method.
            votes: Its scores.
            knn: The configuration that voted.
            run: Where given, the rows of the classes are written into it.
        """
        codes = self.codes
        tuned_on = None if codes.split == "val" else (votes.on_val, codes.val.labels)
        row = metrics_row(method, codes.split, votes.scores, codes.query.labels, tuned_on=tuned_on, run=run)
        row |= {"bits": codes.bits}
        keys = ("K", "distance_metric", "voting_strategy", "tau", "theta", "ties")
        row |= {key: getattr(knn, key) for key in keys}
        row |= {"index_kind": self.voting.index.kind, "n_index": len(codes.base)}
        # tau acts on 1 - dist/B, so only tau * B says how many bits of distance matter.
        return row | ({"tau_bits": knn.tau * codes.bits} if knn.distance_metric == "hamming" else {})

    def boundary_facts(self, knn: KnnConfig) -> dict[str, float]:
        """How often the last place is contested: the share of queries whose last voters were chosen among equals.

        ``boundary_group_size`` is the mean number of codes at the distance of neighbour K, over all queries. Empty
        where distances are not Hamming's.
        """
        if knn.distance_metric != "hamming":
            return {}
        size = self.voting.boundary(self.nearest, knn.K).size
        distance = self.nearest.neighbours.distance[:, : knn.K]
        inside = (distance == distance[:, -1:]).sum(axis=1)
        return {"boundary_tied": float((size > inside).mean()), "boundary_group_size": float(size.mean())}

    def latency(self, knn: KnnConfig) -> dict[str, float]:
        """Milliseconds of search and vote of one query at a time, from its code to its scores."""
        times = []
        for step in range(WARM_UP + SINGLE_QUERIES):
            row = step % len(self.codes.query)
            started = time.perf_counter()
            self.voting.vote(self._search(self.codes.query, knn.K, slice(row, row + 1)), knn)
            times.append(1e3 * (time.perf_counter() - started))
        kept = np.array(times[WARM_UP:])
        return {
            "query_latency_ms": float(kept.mean()),
            "query_latency_ms_p50": float(np.percentile(kept, 50)),
            "query_latency_ms_p95": float(np.percentile(kept, 95)),
        }

    def efficiency(self, votes: Votes) -> dict[str, float]:
        """Queries a second, seconds of building, and bytes of the index and of binary and float codes side by side."""
        base = self.codes.base
        facts = {
            "index_build_s": self.build_s,
            "throughput_qps": len(self.codes.query) / (self.search_s + votes.seconds),
            "index_bytes": float(self.voting.index.n_bytes),
            "float_code_bytes": float(base.soft.nbytes),
        }
        if base.packed is not None:
            facts |= {
                "binary_code_bytes": float(base.packed.nbytes),
                "float_over_binary_bytes": base.soft.nbytes / base.packed.nbytes,
            }
        return facts

    def _search(self, query: Codes, K: int, rows: slice = slice(None)) -> QueryNeighbours:
        """The K nearest of some rows of a split, without the query's own image."""
        own_rows = rows_of(self.codes.base.image_id, query.image_id[rows], self._order)
        packed = None if query.packed is None else query.packed[rows]
        return self.voting.search(K, packed=packed, soft=query.soft[rows], exclude=own_rows)


def rows_of(image_id: Rows, wanted: Rows, order: Rows | None = None) -> Rows:
    """Row in ``image_id`` of each wanted id, -1 where it is not there; ``order`` sorts ``image_id``."""
    if not len(image_id):
        return np.full(len(wanted), -1, np.int64)
    order = np.argsort(image_id) if order is None else order
    nearest = order[np.minimum(np.searchsorted(image_id, wanted, sorter=order), len(order) - 1)]
    return np.where(image_id[nearest] == wanted, nearest, -1).astype(np.int64)


def fitting_metric(knn: KnnConfig, bits: int, where: object) -> Metric:
    """Without a hash layer neighbours are found by cosine on z; Hamming that was asked for by name is refused.

    Args:
        knn: The configuration.
        bits: B of the codes; 0 without hash layer.
        where: The run, for the error.

    Raises:
        InputError: It was.
    """
    if bits or knn.distance_metric == "cosine":
        return knn.distance_metric
    if "distance_metric" in knn.model_fields_set:
        raise InputError(
            "no hash layer",
            where=where,
            got=f"--metric {knn.distance_metric}",
            wanted="--metric cosine",
            do="train with `mmcli train-head --bits 64`, or use --metric cosine",
        )
    return "cosine"

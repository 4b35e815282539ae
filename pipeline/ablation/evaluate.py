"""From a finished run to the rows that are asked of it: one search a metric, votes for each, everything timed.

Codes are read once. Neighbours of the largest K serve every K, vote and temperature; the mix of the hybrid predictor
takes the same votes; what the training measured already (the classifier) is not measured again.
"""

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ..core.metrics_file import read_metrics
from ..core.run import Run
from ..evaluation.metrics import check_predictor, classifier_row
from ..evaluation.search import Evaluated, NeighbourSearch, Votes
from .plan import Evaluation, search_of

Scores = npt.NDArray[np.floating[Any]]


@dataclass(frozen=True, kw_only=True)
class Measured:
    """The figures, scores and costs of one evaluation.

    Attributes:
        evaluation: The evaluation.
        figures: A row of the form that ``metrics.json`` has.
        scores: Probabilities in class order ``(N, C)``.
        image_id: Ids of the images ``(N,)``.
        labels: Labels of the images ``(N, C)``.
        facts: Seconds and bytes.
    """

    evaluation: Evaluation
    figures: Mapping[str, Any]
    scores: Scores
    image_id: npt.NDArray[np.int64]
    labels: npt.NDArray[np.uint8]
    facts: Mapping[str, Any]


def evaluate_run(
    run: Run, evaluations: Sequence[Evaluation], *, split: str = "test", device: str = "cpu"
) -> Iterator[Measured | tuple[Evaluation, Exception]]:
    """Every evaluation of a run, in any order; one that fails does not stop the others.

    Args:
        run: A finished run with codes.
        evaluations: Evaluations of its training.
        split: The split whose images are tagged.
        device: Where to search.

    Raises:
        InputError: Its codes are damaged.
    """
    codes = Evaluated.of(run, split)
    searches: dict[tuple[str, int], list[Evaluation]] = {}
    for evaluation in evaluations:
        search_key = search_of(evaluation)
        try:
            if search_key is None:
                yield _of_classifier(evaluation, codes, run)
                continue
            codes.check_k(evaluation.config.knn.K, run)
            searches.setdefault(search_key, []).append(evaluation)
        except Exception as error:  # noqa: BLE001 - kept with its row
            yield evaluation, error
    retrieval: dict[str, Any] = {}
    for parts in searches.values():
        try:
            search = _Search(codes, parts, run, device)
            retrieval = retrieval or codes.retrieval()
        except Exception as error:  # noqa: BLE001 - kept with its rows
            yield from ((evaluation, error) for evaluation in parts)
            continue
        for evaluation in parts:
            try:
                yield search.measure(evaluation, retrieval)
            except Exception as error:  # noqa: BLE001 - kept with its row
                yield evaluation, error


class _Search:
    """One search of the split and of val, and everything that is evaluated of it."""

    def __init__(self, codes: Evaluated, evaluations: Sequence[Evaluation], run: Run, device: str) -> None:
        self._codes, self._run = codes, run
        self._search = NeighbourSearch(codes, [evaluation.config.knn for evaluation in evaluations], device)
        self._latencies: dict[int, dict[str, float]] = {}

    def measure(self, evaluation: Evaluation, retrieval: Mapping[str, Any]) -> Measured:
        """The figures and the costs of one evaluation."""
        codes, search, knn = self._codes, self._search, evaluation.config.knn
        started = time.perf_counter()
        votes = search.vote(knn)
        shown, more = votes, {}
        if evaluation.method == "hybrid":
            check_predictor("hybrid", codes.query, codes.val, self._run)
            shown, weight = search.mix(votes)
            more["hybrid_weight_knn"] = weight
        row = search.row(evaluation.method, shown, knn) | more | search.boundary_facts(knn)
        if evaluation.method == "knn" and knn.distance_metric == "hamming":
            row |= retrieval
        eval_s = time.perf_counter() - started
        return Measured(
            evaluation=evaluation,
            figures=row,
            scores=shown.scores,
            image_id=codes.query.image_id,
            labels=codes.query.labels,
            facts=self._efficiency(evaluation, votes) | {"eval_s": eval_s},
        )

    def _efficiency(self, evaluation: Evaluation, votes: Votes) -> dict[str, Any]:
        search, knn = self._search, evaluation.config.knn
        if knn.K not in self._latencies:
            self._latencies[knn.K] = search.latency(knn)
        facts = search.efficiency(votes)
        facts.pop("float_over_binary_bytes", None)
        sizes = {key.replace("_code_", "_"): int(facts.pop(key)) for key in list(facts) if key.endswith("_bytes")}
        return {"search_s": search.search_s, **facts, **self._latencies[knn.K], **sizes}


def _of_classifier(evaluation: Evaluation, codes: Evaluated, run: Run) -> Measured:
    """The classifier's row, as the training measured it where it did."""
    started = time.perf_counter()
    query, val = codes.query, codes.val
    check_predictor("classifier", query, val, run)
    rows = [row for row in read_metrics(run.folder) if (row["method"], row["split"]) == ("classifier", codes.split)]
    row = dict(rows[0]) if rows and "ci" in rows[0] else classifier_row(codes.split, query, val=val)
    row = {**row, "method": evaluation.method}
    facts = {"eval_s": time.perf_counter() - started}
    if "query_latency_ms" in row:
        facts["query_latency_ms"] = row.pop("query_latency_ms")
    scores = query.probabilities
    assert scores is not None
    return Measured(
        evaluation=evaluation, figures=row, scores=scores, image_id=query.image_id, labels=query.labels, facts=facts
    )

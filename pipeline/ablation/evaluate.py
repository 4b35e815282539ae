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

from ...heads.retrieval import retrieval_row
from ..core.metrics_file import read_metrics
from ..core.run import Run
from ..evaluation.metrics import check_predictor, classifier_row, metrics_row, mix, tune_mix
from ..evaluation.search import Evaluated, Searcher, settings
from .plan import Evaluation, search_of

Scores = npt.NDArray[np.floating[Any]]


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What an evaluation gave.

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
    searches: dict[tuple[str, str, int], list[Evaluation]] = {}
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
            if search.hamming and not retrieval:
                retrieval = _retrieval(codes)
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
        knn = max((evaluation.config.knn for evaluation in evaluations), key=lambda section: section.K)
        self._searcher = Searcher(codes.base, knn, device)
        started = time.perf_counter()
        self._found = self._searcher.find(codes.query, knn.K)
        self._search_s = time.perf_counter() - started
        self._on_val = self._found if codes.query is codes.val else self._searcher.find(codes.val, knn.K)
        self._latencies: dict[int, dict[str, float]] = {}
        self._recall = self._searcher.recall(codes.query, self._found, knn)

    @property
    def hamming(self) -> bool:
        """Whether packed codes were searched."""
        return self._codes.base.packed is not None

    def measure(self, evaluation: Evaluation, retrieval: Mapping[str, Any]) -> Measured:
        """The figures and the costs of one evaluation."""
        codes, searcher = self._codes, self._searcher
        started = time.perf_counter()
        knn = evaluation.config.knn
        scores = searcher.score(self._found, knn)
        vote_s = time.perf_counter() - started
        on_val = searcher.score(self._on_val, knn)
        shown, more = self._mixed(scores, on_val) if evaluation.method == "hybrid" else ((scores, on_val), {})
        tuned_on = None if codes.split == "val" else (shown[1], codes.val.labels)
        row = metrics_row(evaluation.method, codes.split, shown[0], codes.query.labels, tuned_on=tuned_on)
        row |= settings(knn, codes.base, searcher.index.kind) | more
        if knn.distance_metric == "hamming":
            row |= searcher.boundary_facts(self._found, knn.K)
        if evaluation.method == "knn" and knn.distance_metric == "hamming":
            row |= retrieval
        eval_s = time.perf_counter() - started
        return Measured(
            evaluation=evaluation,
            figures=row | self._recall,
            scores=shown[0],
            image_id=codes.query.image_id,
            labels=codes.query.labels,
            facts=self._efficiency(evaluation, vote_s) | {"eval_s": eval_s},
        )

    def _mixed(self, scores: Scores, on_val: Scores) -> tuple[tuple[Scores, Scores], dict[str, Any]]:
        codes = self._codes
        check_predictor("hybrid", codes.query, codes.val, self._run)
        classifier, classifier_val = codes.query.probabilities, codes.val.probabilities
        assert classifier is not None
        assert classifier_val is not None
        a = tune_mix(on_val, classifier_val, codes.val.labels)
        return (mix(a, scores, classifier), mix(a, on_val, classifier_val)), {"hybrid_weight_knn": a}

    def _efficiency(self, evaluation: Evaluation, vote_s: float) -> dict[str, Any]:
        searcher, knn, codes = self._searcher, evaluation.config.knn, self._codes
        if knn.K not in self._latencies:
            self._latencies[knn.K] = searcher.latency(codes.query, knn)
        sizes = searcher.sizes()
        return {
            "index_build_s": searcher.build_s,
            "search_s": self._search_s,
            "throughput_qps": len(codes.query) / (self._search_s + vote_s),
            **self._latencies[knn.K],
            "index_bytes": int(sizes["index_bytes"]),
            "float_bytes": int(sizes["float_code_bytes"]),
            **({"binary_bytes": int(sizes["binary_code_bytes"])} if "binary_code_bytes" in sizes else {}),
        }


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


def _retrieval(codes: Evaluated) -> dict[str, Any]:
    """How good the codes are for finding images; nothing without hash layer, or of queries that are in the base."""
    base, query = codes.base, codes.query
    if base.packed is None or query.packed is None or np.isin(query.image_id, base.image_id).any():
        return {}
    return retrieval_row(query.packed, query.labels, base.packed, base.labels)

"""The run that a report looks into: its neighbours, votes, thresholds and logits, all from the codes that it keeps.

Symbols: Q test images, K neighbours, C classes.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from pydantic import ValidationError

from ... import InputError
from ...heads.config import KnnConfig
from ...heads.metrics import tune_thresholds
from ...heads.ranking import average_precision
from ...heads.voting import shared_weights, weights
from ..core.config import load_config
from ..core.metrics_file import METRICS
from ..core.results import Codes, read_codes
from ..evaluation.codes import Evaluated
from ..evaluation.search import Searcher
from .inputs import SPLIT, Inputs, Known, has_codes, read_known

SHOWN = 9  # neighbours of a query
BASE = ("base", "full")
OF_ROW = ("K", "distance_metric", "voting_strategy", "tau", "theta", "ties")


@dataclass(frozen=True, kw_only=True)
class Depth:
    """What is known of the test images of one run.

    Attributes:
        known: The run.
        why: Why this one.
        knn: How its neighbours were found and how they vote.
        base: The codes that vote.
        query: The test images' codes.
        neighbours: Rows of ``base`` ``(Q, K)``, the nearest first.
        distance: Their distances ``(Q, K)``.
        weight: Their shares of the vote ``(Q, K)``.
        scores: Votes ``(Q, C)``.
        threshold: Best on val for micro F1; None where no val image has a label.
        classifier: Probabilities ``(Q, C)``; None where none were kept.
        classifier_threshold: Likewise of the classifier.
        AP: Of every image, of the votes ``(Q,)``; NaN without a label.
    """

    known: Known
    why: str
    knn: KnnConfig
    base: Codes
    query: Codes
    neighbours: npt.NDArray[np.int64]
    distance: npt.NDArray[Any]
    weight: npt.NDArray[np.float64]
    scores: npt.NDArray[np.float32]
    threshold: float | None
    classifier: npt.NDArray[np.float64] | None
    classifier_threshold: float | None
    AP: npt.NDArray[np.float64]

    @property
    def names(self) -> tuple[str, ...]:
        """Of the categories."""
        return self.known.run.info.category_names

    @property
    def at(self) -> float:
        """Where a vote predicts a tag."""
        return 0.5 if self.threshold is None else self.threshold


def choose(inputs: Inputs, folder: Path | None) -> tuple[Known, str] | None:
    """The run to look into: the one that was named, else the one of the highest val mAP that is the method itself.

    That is: below ``runs`` itself, or of the full method among the base methods. Runs of other experiments are controls
    and variants; one of them is taken where there is nothing else. Val decides, because test tunes and chooses nothing,
    and runs with hash codes go first.

    Raises:
        InputError: The named run is none, is not finished, or keeps no codes.
    """
    if folder is not None:
        known = read_known(folder)
        if not has_codes(known):
            raise InputError(
                "no codes to look into", where=folder, got=f"a run of {known.run.info.kind}",
                wanted="one of train-head or finetune with its codes", do="name another --run",
            )  # fmt: skip
        return known, "named with --run"
    full = {Path(str(row["run"])).name for row in inputs.rows if (row["experiment"], row["value"]) == BASE}
    own = [known for at, (name, known) in enumerate(inputs.runs.items()) if at < inputs.own or name in full]
    method = [known for known in own if not known.is_control]
    return _best(method, "made by hand or of the full method") or _best(list(inputs.runs.values()), "of any experiment")


def _best(among: list[Known], which: str) -> tuple[Known, str] | None:
    """The run of the highest val mAP and the reason in words; None where none keeps codes."""
    found = [known for known in among if has_codes(known)]
    if not found:
        return None
    hashed = [known for known in found if _bits(known)]
    best, n = max(hashed or found, key=lambda known: known.best_val), len(hashed or found)
    value = "no val mAP is kept" if best.best_val < 0 else f"the highest val mAP, {best.best_val:.3f}"
    return best, f"{value}, of {n} run{'' if n == 1 else 's'} with {'hash codes' if hashed else 'codes'}, {which}"


def look_into(known: Known, why: str) -> Depth:
    """Search and vote as the run's own evaluation did, or as its configuration says where there was none."""
    found = Evaluated.of(known.run, SPLIT)
    knn = _settings(known)
    metric = "cosine" if found.base.packed is None else knn.distance_metric
    ties = knn.ties if metric == "hamming" else "index"
    usable = max(1, len(found.base) - 1)  # a query that is in the index itself is left out
    update = {"distance_metric": metric, "ties": ties, "K": min(knn.K, usable), "index": "auto"}
    knn = knn.model_copy(update=update)
    searcher = Searcher(found.base, knn)
    test, val = searcher.find(found.query, knn.K), searcher.find(found.val, knn.K)
    scores, on_val = searcher.score(test, knn), searcher.score(val, knn)
    labelled = bool(found.val.labels.any())
    probabilities, val_probabilities = found.query.probabilities, found.val.probabilities
    if ties == "average":
        w = shared_weights(test.neighbours, knn, searcher.boundary(test, knn.K))
    else:
        w = weights(test.neighbours.similarity, knn.voting_strategy, tau=knn.tau, theta=knn.theta)
    return Depth(
        known=known, why=why, knn=knn, base=found.base, query=found.query, neighbours=test.neighbours.index,
        distance=test.neighbours.distance, weight=w, scores=scores,
        threshold=tune_thresholds(on_val, found.val.labels).overall if labelled else None, classifier=probabilities,
        classifier_threshold=(
            tune_thresholds(val_probabilities, found.val.labels).overall
            if labelled and val_probabilities is not None else None
        ),
        AP=average_precision(scores.T, found.query.labels.T.astype(bool)),
    )  # fmt: skip


def _settings(known: Known) -> KnnConfig:
    base = load_config(known.run.folder / "config.yaml").knn
    rows = [row for row in known.rows if row["method"] == "knn"]
    row: Mapping[str, Any] = rows[0] if rows else {}
    settings = {key: row[key] for key in OF_ROW if row.get(key) is not None}
    try:
        return KnnConfig(**{**base.model_dump(), **settings})
    except ValidationError as error:
        first = error.errors()[0]
        raise InputError(
            "damaged metrics", where=known.run.folder / METRICS, got=f"{first['loc'][0]} {first['input']!r:.60}",
            wanted="what mmcli wrote", do="remove the file, and `mmcli knn-eval` writes it again",
        ) from None  # fmt: skip


def _bits(known: Known) -> bool:
    return read_codes(known.run.folder, SPLIT).packed is not None

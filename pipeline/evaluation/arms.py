"""What is compared: values of an experiment, or methods of runs, each with the scores of its seeds; paired bootstraps.

Symbols: N images, C classes, R resamples.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import numpy as np
import numpy.typing as npt

from ... import InputError
from ...heads.bootstrap import Difference, mean_difference, resample
from ...heads.metrics import evaluate
from ..core.results import read_run_arrays

FIGURES = ("mAP", "F1_micro_tuned", "F1_macro_tuned", "P@5", "R@5")
EQUAL = "not distinguishable at this size"
TUNED = "_tuned"


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One seed of an arm.

    Attributes:
        seed: The seed.
        row: Its figures, under the names of ``metrics.json``.
        scores: The file of its scores; None where none were kept.
        labels: A file that has the labels where the scores' file has none.
    """

    seed: int
    row: Mapping[str, Any]
    scores: Path | None
    labels: Path | None = None


@dataclass(frozen=True, kw_only=True)
class Arm:
    """A value of an experiment, or a method, and its seeds.

    Attributes:
        value: The value or the method.
        samples: Its seeds.
        note: What a table says of it.
        precision: What its seeds were computed in, where others of the same value were computed in another precision.
    """

    value: str
    samples: tuple[Sample, ...]
    note: str = ""
    precision: str = ""

    @property
    def name(self) -> str:
        """The name as a table shows it."""
        return f"{self.value}, {self.precision}" if self.precision else self.value

    def computed_as(self, other: "Arm") -> bool:
        """Whether nothing says that the two were computed in different precisions."""
        mine, theirs = ({row["precision"] for row in arm.rows if row.get("precision")} for arm in (self, other))
        return not mine or not theirs or mine == theirs

    @property
    def rows(self) -> list[Mapping[str, Any]]:
        """The figures of every seed."""
        return [sample.row for sample in self.samples]

    def values(self, key: str) -> list[float]:
        """A figure of every seed that has it."""
        found = [sample.row.get(key) for sample in self.samples]
        return [float(value) for value in found if value is not None]

    def mean(self, key: str) -> float | None:
        """Mean over seeds; None where no seed has the figure."""
        values = self.values(key)
        return mean(values) if values else None

    def spread(self, key: str) -> float | None:
        """Standard deviation over seeds; None with fewer than two."""
        values = self.values(key)
        return stdev(values) if len(values) > 1 else None

    def ends(self, key: str) -> tuple[float, float] | None:
        """The 95% intervals of the seeds, their ends averaged; None where no seed has one."""
        found = [ends for sample in self.samples if (ends := (sample.row.get("ci") or {}).get(key))]
        return (mean(one[0] for one in found), mean(one[1] for one in found)) if found else None


@dataclass(frozen=True, kw_only=True)
class Scored:
    """Scores of one seed by rising image id, its figures, and those of R resamples."""

    image_id: npt.NDArray[np.int64]
    labels: npt.NDArray[np.uint8]
    figures: Mapping[str, float]
    resampled: Mapping[str, npt.NDArray[np.float64]]


@dataclass(frozen=True, kw_only=True)
class Paired:
    """A less B: the figures of both from their scores, the interval, and the spread over seeds."""

    A: float
    B: float
    low: float
    high: float
    p: float
    spread: float | None

    @property
    def difference(self) -> float:
        """``A - B``."""
        return self.A - self.B

    @property
    def clear(self) -> bool:
        """Whether the interval leaves out 0."""
        return self.low > 0 or self.high < 0

    @property
    def verdict(self) -> str:
        """What the interval alone says of A, where more is better."""
        return verdict(self.low, self.high)


class Pairs:
    """Paired differences between arms; every file of scores is read and resampled once."""

    def __init__(self) -> None:
        self._scored: dict[tuple[Path, float | None], Scored] = {}
        self.made = 0

    def scored(self, sample: Sample) -> Scored | None:
        """Scores of a seed; None where none were kept."""
        if sample.scores is None or not sample.scores.is_file():
            return None
        threshold = sample.row.get("threshold_tuned")
        key = (sample.scores, threshold)
        if key not in self._scored:
            self._scored[key] = _read(sample, threshold)
        return self._scored[key]

    def difference(self, a: Arm, b: Arm, key: str = "mAP") -> Paired | None:
        """``A - B`` of a figure; None where one has no scores, they are of other images, or the figure is undefined."""
        sides = [[one for sample in arm.samples if (one := self.scored(sample)) is not None] for arm in (a, b)]
        if not all(sides) or not _same(sides[0] + sides[1]):
            return None
        if any(key not in one.figures or np.isnan(one.figures[key]) for side in sides for one in side):
            return None
        A, B = (mean(one.figures[key] for one in side) for side in sides)
        of_a, of_b = ([one.resampled[key] for one in side] for side in sides)
        found = mean_difference(of_a, of_b, figure=A - B)
        if np.isnan(found.p):
            return None
        self.made += 1
        return _paired(A, B, found, _spread(a, b, key))


def verdict(low: float, high: float) -> str:
    """``better`` or ``worse`` where an interval of a difference leaves out 0."""
    return "better" if low > 0 else "worse" if high < 0 else EQUAL


def best_of(arms: Sequence[Arm], key: str, pairs: Pairs) -> Arm | None:
    """The arm with the highest figure, where its interval leaves out 0 against each other one; else None."""
    known = [arm for arm in arms if arm.mean(key) is not None]
    if len(known) < 2:
        return None
    best = max(known, key=lambda arm: arm.mean(key) or 0.0)
    for arm in known:
        if arm is not best:
            found = pairs.difference(best, arm, key)
            if found is None or found.low <= 0:
                return None
    return best


def _paired(A: float, B: float, found: Difference, spread: float | None) -> Paired:
    return Paired(A=A, B=B, low=found.low, high=found.high, p=found.p, spread=spread)


def _spread(a: Arm, b: Arm, key: str) -> float | None:
    """Standard deviation over the seeds that both have of their difference."""
    of_b = {sample.seed: sample.row.get(key) for sample in b.samples}
    both = [(sample.row.get(key), of_b.get(sample.seed)) for sample in a.samples]
    found = [x - y for x, y in both if x is not None and y is not None]
    return stdev(found) if len(found) > 1 else None


def _same(scored: Sequence[Scored]) -> bool:
    first = scored[0]
    return all(
        np.array_equal(one.image_id, first.image_id) and np.array_equal(one.labels, first.labels) for one in scored[1:]
    )


def _read(sample: Sample, threshold: float | None) -> Scored:
    assert sample.scores is not None
    row, do = sample.row, "run the command that scores this split again"
    about = {key: str(row[key]) for key in ("method", "split", "key") if key in row}
    arrays = read_run_arrays(sample.scores, "scores", about=about, do=do)
    if "labels" not in arrays and sample.labels is not None:
        codes = read_run_arrays(sample.labels, "labels", about={"split": str(row["split"])}, do=do)
        if not np.array_equal(codes["image_id"], arrays["image_id"]):
            raise InputError("codes and scores of other images", where=sample.scores, do=do)
        arrays["labels"] = codes["labels"]
    if "labels" not in arrays or arrays["labels"].shape != arrays["scores"].shape:
        raise InputError("damaged scores", where=sample.scores, got="no labels that fit", do=do)
    order = np.argsort(arrays["image_id"], kind="stable")
    scores, labels = arrays["scores"][order], arrays["labels"][order]
    figures = evaluate(scores, labels)
    if threshold is not None:
        tuned = evaluate(scores, labels, threshold=threshold)
        figures |= {f"{key}{TUNED}": tuned[key] for key in ("F1_micro", "F1_macro")}
    resampled = resample(scores, labels, {} if threshold is None else {TUNED: threshold})
    return Scored(image_id=arrays["image_id"][order], labels=labels, figures=figures, resampled=resampled)


def arm_pair(arms: Sequence[Arm], a: str, b: str) -> tuple[Arm, Arm] | None:
    """The arms of two values, in the first precision that both have; None where there are no two such arms."""
    with_seeds = [arm for arm in arms if arm.samples]
    pairs = ((one, other) for one in with_seeds for other in with_seeds if (one.value, other.value) == (a, b))
    return next((pair for pair in pairs if pair[0].computed_as(pair[1])), None)

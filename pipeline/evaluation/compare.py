"""Paired comparison of scores on the same images: is A better than B, or could another sample undo the difference?

Two runs are compared figure by figure; a report compares arms, which are the seeds of one value of an experiment. Both
resample images, the same ones for A and B, and read every file of scores once.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import numpy as np
import numpy.typing as npt
from rich.console import RenderableType

from ...errors import InputError
from ...heads.bootstrap import RESAMPLES, SEED, mean_difference, resample
from ...heads.metrics import evaluate
from ..core.console import comparison_table
from ..core.files import command
from ..core.json_result import JsonResult
from ..core.metrics_file import read_metrics
from ..core.results import read_run_arrays
from ..core.run import Run, open_run, read_info
from .metrics import OVERALL

FIGURES = ("mAP", "mAP_sample", "F1_micro", "F1_macro", "CF1", "P@1", "P@5", "R@1", "R@5", "hamming_loss")
# These are compared at the threshold that each method tuned on val, where both have one.
OF_THRESHOLD = ("F1_micro", "F1_macro", "CF1", "hamming_loss")
LOWER_IS_BETTER = "hamming_loss"
# Figures of the arms of an experiment.
ARM_FIGURES = ("mAP", f"F1_micro{OVERALL}", f"F1_macro{OVERALL}", "P@5", "R@5")
# Which method is compared where none was named: the first that both runs have, else the first of each.
PREFERRED = ("knn", "classifier")
SIGNIFICANT = 0.05
EQUAL = "not distinguishable at this size"


@dataclass(frozen=True, kw_only=True)
class Sample:
    """The scores of one seed.

    Attributes:
        seed: The seed.
        row: Its figures, under the names of ``metrics.json``.
        scores: The file of its scores; None where none were kept.
        labels: The codes of the split, which have the labels where the scores' file has none.
        again: What makes the scores again, for errors.
    """

    seed: int
    row: Mapping[str, Any]
    scores: Path | None
    labels: Path | None = None
    again: str = "run the command that scores this split again"


@dataclass(frozen=True, kw_only=True)
class Arm:
    """A value of an experiment, or a method, and its seeds.

    Attributes:
        value: The value or the method.
        samples: Its seeds.
        note: A remark for tables.
        precision: The precision of its seeds, where others of the same value were computed in another precision.
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
        return [float(row[key]) for row in self.rows if row.get(key) is not None]

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
        intervals = [ends for row in self.rows if (ends := (row.get("ci") or {}).get(key))]
        return (mean(low for low, _ in intervals), mean(high for _, high in intervals)) if intervals else None


@dataclass(frozen=True, kw_only=True)
class Scored:
    """Scores of one seed by rising image id, its figures, and those of R resamples.

    ``F1_micro``, ``F1_macro``, ``CF1`` and ``hamming_loss`` end in ``_tuned`` where the seed has a tuned threshold, and
    are at 0.5 otherwise.
    """

    image_id: npt.NDArray[np.int64]
    labels: npt.NDArray[np.uint8]
    figures: Mapping[str, float]
    resampled: Mapping[str, npt.NDArray[np.float64]]


def read_scored(sample: Sample) -> Scored:
    """Read the scores of a seed, and resample them.

    Raises:
        InputError: The files are missing or damaged, have no labels, or are of other images than each other.
    """
    assert sample.scores is not None
    row, do = sample.row, sample.again
    about = {key: str(row[key]) for key in ("method", "split", "key") if key in row}
    arrays = read_run_arrays(sample.scores, "scores", about=about, do=do)
    if "labels" not in arrays and sample.labels is not None:
        codes = read_run_arrays(sample.labels, "codes", about={"split": str(row["split"])}, do=do)
        if not np.array_equal(codes["image_id"], arrays["image_id"]):
            raise InputError("codes and scores of other images", where=sample.scores, do=do)
        arrays["labels"] = codes["labels"]
    if "labels" not in arrays or arrays["labels"].shape != arrays["scores"].shape:
        raise InputError("damaged scores", where=sample.scores, got="no labels that fit", do=do)
    order = np.argsort(arrays["image_id"], kind="stable")
    scores, labels = arrays["scores"][order], arrays["labels"][order]
    tuned = row.get("threshold_tuned")
    ending, threshold = ("", 0.5) if tuned is None else (OVERALL, tuned)
    figures = evaluate(scores, labels, threshold=threshold)
    figures |= {f"{key}{ending}": figures.pop(key) for key in OF_THRESHOLD}
    resampled = resample(scores, labels, {ending: threshold})
    return Scored(image_id=arrays["image_id"][order], labels=labels, figures=figures, resampled=resampled)


@dataclass(frozen=True, kw_only=True)
class Paired:
    """``A - B`` of a figure, means over seeds: its 95% interval, p, and the spread over seeds.

    NaN in ``low``, ``high`` and ``p``, and perhaps in the figures, where the difference is undefined.
    """

    A: float
    B: float
    low: float
    high: float
    p: float
    spread: float | None = None
    lower_is_better: bool = False

    @property
    def difference(self) -> float:
        """The difference ``A - B`` of the images as they are."""
        return self.A - self.B

    @property
    def defined(self) -> bool:
        """Whether both figures, and their difference in some resample, are defined."""
        return not np.isnan([self.A, self.B, self.p]).any()

    @property
    def verdict(self) -> str:
        """Whether A is ``better`` or ``worse``; :data:`EQUAL` where p is not below 0.05."""
        if not self.defined:
            return "undefined"
        if self.p >= SIGNIFICANT:
            return EQUAL
        return "better" if (self.difference < 0) == self.lower_is_better else "worse"


def paired(a: Sequence[Scored], b: Sequence[Scored], key: str) -> Paired:
    """The paired bootstrap of a figure between the seeds of A and those of B, all of the same images."""
    A, B = (mean(scored.figures[key] for scored in side) for side in (a, b))
    of_a, of_b = ([scored.resampled[key] for scored in side] for side in (a, b))
    low, high, p = mean_difference(of_a, of_b, figure=A - B)
    return Paired(A=A, B=B, low=low, high=high, p=p, lower_is_better=key.startswith(LOWER_IS_BETTER))


class Pairs:
    """Paired differences between arms; every file of scores is read and resampled once."""

    def __init__(self) -> None:
        self._scored: dict[tuple[Path, float | None], Scored] = {}

    def difference(self, a: Arm, b: Arm, key: str = "mAP") -> Paired | None:
        """``A - B`` of a figure; None where one has no scores, they are of other images, or the figure is undefined."""
        sides = self._read(a), self._read(b)
        every = [*sides[0], *sides[1]]
        if not all(sides) or any(key not in scored.figures for scored in every):
            return None
        for scored in every[1:]:
            same_labels = np.array_equal(scored.labels, every[0].labels)
            if not (same_labels and np.array_equal(scored.image_id, every[0].image_id)):
                return None
        result = paired(*sides, key)
        return replace(result, spread=_spread(a, b, key)) if result.defined else None

    def _read(self, arm: Arm) -> list[Scored]:
        """The scores of the seeds that kept any."""
        kept = []
        for sample in arm.samples:
            if sample.scores is not None and sample.scores.is_file():
                key = (sample.scores, sample.row.get("threshold_tuned"))
                if key not in self._scored:
                    self._scored[key] = read_scored(sample)
                kept.append(self._scored[key])
        return kept


def _spread(a: Arm, b: Arm, key: str) -> float | None:
    """Standard deviation, over the seeds that both have, of their difference."""
    of_b = {sample.seed: sample.row.get(key) for sample in b.samples}
    both = [(sample.row.get(key), of_b.get(sample.seed)) for sample in a.samples]
    differences = [x - y for x, y in both if x is not None and y is not None]
    return stdev(differences) if len(differences) > 1 else None


def verdict(low: float, high: float) -> str:
    """``better`` or ``worse`` where an interval of a difference leaves out 0."""
    return "better" if low > 0 else "worse" if high < 0 else EQUAL


def best_of(arms: Sequence[Arm], key: str, pairs: Pairs) -> Arm | None:
    """The arm with the highest figure, where its interval leaves out 0 against each other one; else None."""
    measured = [arm for arm in arms if arm.mean(key) is not None]
    if len(measured) < 2:
        return None
    best = max(measured, key=lambda arm: arm.mean(key) or 0.0)
    differences = (pairs.difference(best, arm, key) for arm in measured if arm is not best)
    return best if all(difference is not None and difference.low > 0 for difference in differences) else None


def arm_pair(arms: Sequence[Arm], a: str, b: str) -> tuple[Arm, Arm] | None:
    """The arms of two values, in the first precision that both have; None where there are no two such arms."""
    with_seeds = [arm for arm in arms if arm.samples]
    pairs = ((x, y) for x in with_seeds for y in with_seeds if (x.value, y.value) == (a, b))
    return next((pair for pair in pairs if pair[0].computed_as(pair[1])), None)


@dataclass(frozen=True, kw_only=True)
class Figure:
    """One figure of both runs; ``ci`` and ``p`` are of ``A - B`` (see :func:`mmcli.heads.bootstrap.difference`)."""

    figure: str
    A: float | None
    B: float | None
    difference: float | None
    ci: tuple[float, float] | None
    p: float | None
    verdict: str


@dataclass(frozen=True, kw_only=True)
class Comparison(JsonResult):
    """Two runs, and every figure of both."""

    run_a: Path
    run_b: Path
    method_a: str
    method_b: str
    split: str
    n_images: int
    thresholds: tuple[float, float]
    figures: tuple[Figure, ...]
    precision_a: str = ""
    precision_b: str = ""
    n_resamples: int = RESAMPLES
    seed: int = SEED

    def summary(self) -> list[RenderableType]:
        """The runs, the table and how to read it, as they are printed."""
        t = self.thresholds
        mixed = bool(self.precision_a and self.precision_b and self.precision_a != self.precision_b)
        return [
            f"A: {self.method_a} of {self.run_a}{f', {self.precision_a}' if self.precision_a else ''}\n"
            f"B: {self.method_b} of {self.run_b}{f', {self.precision_b}' if self.precision_b else ''}",
            *(["note: A and B were computed in different precisions; their difference is of that as well"] * mixed),
            comparison_table([asdict(figure) for figure in self.figures], ("A", "B")),
            f"{self.n_images:,} {self.split} images; paired bootstrap, {self.n_resamples:,} resamples; two-sided p."
            f" * at thresholds {t[0]:.3g} (A) and {t[1]:.3g} (B), tuned on val. unclear: {EQUAL}. Each line is a test"
            " of its own: of twenty between equal methods, one says better or worse; decide before which one counts.",
        ]


def compare(
    run_a: Path, run_b: Path, *, method_a: str | None = None, method_b: str | None = None, split: str = "test"
) -> Comparison:
    """Paired bootstrap between the saved scores of two runs, matched by image id.

    Args:
        run_a: A finished run.
        run_b: Another run, or the same with another method.
        method_a: The method whose scores of A are compared; where neither is named, ``knn`` where both have it, else
            ``classifier``, else whatever each has.
        method_b: The method whose scores of B are compared.
        split: The split whose images are compared.

    Raises:
        InputError: No such run, no scores of a method, or runs of other images, categories or labels.
    """
    runs = [open_run(folder, kind=read_info(folder).kind) for folder in (run_a, run_b)]
    methods = _methods(runs, (method_a, method_b), split)
    samples = [_sample(run, method, split) for run, method in zip(runs, methods, strict=True)]
    tuned = all(sample.row.get("threshold_tuned") is not None for sample in samples)
    if not tuned:
        samples = [replace(sample, row={**sample.row, "threshold_tuned": None}) for sample in samples]
    t, u = (sample.row["threshold_tuned"] if tuned else 0.5 for sample in samples)
    a, b = (read_scored(sample) for sample in samples)
    _check_same(runs, methods, a, b)
    return Comparison(
        run_a=run_a,
        run_b=run_b,
        method_a=methods[0],
        method_b=methods[1],
        split=split,
        n_images=len(a.image_id),
        thresholds=(t, u),
        figures=tuple(_figure(key + OVERALL * (tuned and key in OF_THRESHOLD), a, b) for key in FIGURES),
        precision_a=runs[0].info.precision,
        precision_b=runs[1].info.precision,
    )


def _sample(run: Run, method: str, split: str) -> Sample:
    """The scores of a method as those of one seed."""
    labels = run.paths.codes(split)
    rows = [row for row in read_metrics(run.folder) if (row["method"], row["split"]) == (method, split)]
    stage = command("knn-eval", "--run", run.folder) if method == "knn" else f"mmcli {run.info.kind}"
    return Sample(
        seed=run.info.seed,
        row=rows[0] if rows else {"method": method, "split": split},
        scores=run.paths.scores(method, split),
        labels=labels if labels.is_file() else None,
        again=f"run the command that scores this split again (`{stage}`)",
    )


def _methods(runs: Sequence[Run], named: tuple[str | None, str | None], split: str) -> list[str]:
    """The method of each run."""
    kept = [_scored_methods(run, split) for run in runs]
    both = [method for method in PREFERRED if all(method in methods for methods in kept)]
    chosen = []
    for run, method, methods in zip(runs, named, kept, strict=True):
        if not methods or (method is not None and method not in methods):
            again = command("knn-eval", "--run", run.folder, "--split", split)
            raise InputError(
                f"no {split} scores" + (f" of {method}" if method else ""),
                where=run.folder,
                got=", ".join(methods) or "none",
                wanted=method or "those of any method",
                do=f"run `{again}`, or name another method or split",
            )
        chosen.append(method or (both if named == (None, None) and both else methods)[0])
    return chosen


def _scored_methods(run: Run, split: str) -> list[str]:
    """Methods whose scores of a split a run has, the preferred ones first."""
    pattern = run.paths.scores("*", split)
    methods = {path.name.removesuffix(pattern.name[1:]) for path in pattern.parent.glob(pattern.name)}
    return [method for method in PREFERRED if method in methods] + sorted(methods - set(PREFERRED))


def _check_same(runs: Sequence[Run], methods: Sequence[str], a: Scored, b: Scored) -> None:
    """Refuse scores that are not of the same images, categories and labels."""

    def mismatch(what: str, got: str) -> InputError:
        where = " and ".join(f"{run.folder}, {method}" for run, method in zip(runs, methods, strict=True))
        return InputError(f"runs of other {what}", where=where, got=got, do="compare runs of one manifest and split")

    names_a, names_b = (run.info.category_names for run in runs)
    if names_a != names_b or a.labels.shape[1] != b.labels.shape[1]:
        other = next((f", '{x}' and '{y}'" for x, y in zip(names_a, names_b, strict=False) if x != y), "")
        raise mismatch("categories", f"{len(names_a)} and {len(names_b)} categories{other}")
    if not np.array_equal(a.image_id, b.image_id):
        shared = len(np.intersect1d(a.image_id, b.image_id))
        raise mismatch("images", f"{len(a.image_id)} and {len(b.image_id)} images, {shared} in common")
    if not np.array_equal(a.labels, b.labels):
        image = a.image_id[np.flatnonzero((a.labels != b.labels).any(axis=1))[0]]
        raise mismatch("labels", f"image {image} labelled in two ways")


def _figure(key: str, a: Scored, b: Scored) -> Figure:
    result = paired([a], [b], key)
    A, B = (None if np.isnan(value) else value for value in (result.A, result.B))
    if not result.defined:
        return Figure(figure=key, A=A, B=B, difference=None, ci=None, p=None, verdict=result.verdict)
    ci = (result.low, result.high)
    return Figure(figure=key, A=A, B=B, difference=result.difference, ci=ci, p=result.p, verdict=result.verdict)

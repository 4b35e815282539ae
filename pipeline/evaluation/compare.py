"""Two runs side by side on the same images: is one better, or is the difference what another sample would undo?"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import numpy as np
import numpy.typing as npt
from rich.console import RenderableType

from ...errors import InputError
from ...heads.bootstrap import RESAMPLES, SEED, Difference, Threshold, difference, mean_difference, resample
from ...heads.metrics import evaluate
from ..core.console import comparison_table
from ..core.files import command
from ..core.metrics_file import read_metrics
from ..core.results import codes_path, read_codes, read_run_arrays
from ..core.run import Run, open_run, read_info
from .metrics import OVERALL, read_scores

# Those at a threshold are compared at the one that each method tuned on val.
FIGURES = ("mAP", "mAP_sample", "F1_micro", "F1_macro", "CF1", "P@1", "P@5", "R@1", "R@5", "hamming_loss")
OF_THRESHOLD = {"F1_micro", "F1_macro", "CF1", "hamming_loss"}
LOWER_IS_BETTER = {"hamming_loss"}
# What is compared where nothing was named: the first that both runs have, else the first of each.
PREFERRED = ("knn", "classifier")
SIGNIFICANT = 0.05
EQUAL = "not distinguishable at this size"


@dataclass(frozen=True, kw_only=True)
class Figure:
    """One figure of both: ``ci`` and ``p`` are of ``A - B`` (see :func:`mmcli.heads.bootstrap.difference`)."""

    figure: str
    A: float | None
    B: float | None
    difference: float | None
    ci: tuple[float, float] | None
    p: float | None
    verdict: str


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """What was compared, and every figure of it."""

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

    def to_json(self) -> dict[str, Any]:
        """One JSON object."""
        return asdict(self) | {"run_a": str(self.run_a), "run_b": str(self.run_b)}

    def summary(self) -> list[RenderableType]:
        """What a person reads at the end."""
        t = self.thresholds
        other = bool(self.precision_a and self.precision_b and self.precision_a != self.precision_b)
        return [
            f"A: {self.method_a} of {self.run_a}{f', {self.precision_a}' if self.precision_a else ''}\n"
            f"B: {self.method_b} of {self.run_b}{f', {self.precision_b}' if self.precision_b else ''}",
            *(["note: A and B were computed in different precisions; their difference is of that as well"] * other),
            comparison_table([asdict(figure) for figure in self.figures], ("A", "B")),
            f"{self.n_images:,} {self.split} images; paired bootstrap, {self.n_resamples:,} resamples; two-sided p."
            f" F1 and Hamming loss at thresholds {t[0]:.3g} (A) and {t[1]:.3g} (B). Each line is a test of its own: of"
            " twenty between equal methods, one says better or worse; decide before which one counts.",
        ]


def compare(
    run_a: Path, run_b: Path, *, method_a: str | None = None, method_b: str | None = None, split: str = "test"
) -> Comparison:
    """Paired bootstrap between the saved scores of two runs, matched by image id.

    Args:
        run_a: A finished run.
        run_b: Another, or the same with another method.
        method_a: Whose scores of A; where neither is named, those of ``knn`` where both have them, else of
            ``classifier``, else whatever each has.
        method_b: The same of B.
        split: Whose images.

    Raises:
        InputError: No such run, no scores of a method, or runs of other images, categories or labels.
    """
    runs = (_open(run_a), _open(run_b))
    methods = _methods(runs, (method_a, method_b), split)
    a, b = (_Side.read(run, method, split) for run, method in zip(runs, methods, strict=True))
    _check_same(a, b)
    if a.threshold is None or b.threshold is None:
        thresholds: tuple[float, float] = (0.5, 0.5)
    else:
        thresholds = (a.threshold, b.threshold)
    sides = [_figures(side, at) for side, at in zip((a, b), thresholds, strict=True)]
    ending = "" if a.threshold is None or b.threshold is None else OVERALL
    figures = tuple(_figure(key, ending, sides[0], sides[1]) for key in FIGURES)
    return Comparison(
        run_a=run_a,
        run_b=run_b,
        method_a=methods[0],
        method_b=methods[1],
        split=split,
        n_images=len(a.image_id),
        thresholds=thresholds,
        figures=figures,
        precision_a=runs[0].info.precision,
        precision_b=runs[1].info.precision,
    )


@dataclass(frozen=True, kw_only=True)
class _Side:
    """Scores of one method, by rising image id."""

    where: str
    category_names: tuple[str, ...]
    image_id: npt.NDArray[np.int64]
    scores: npt.NDArray[np.floating[Any]]
    labels: npt.NDArray[np.uint8]
    threshold: float | None

    @classmethod
    def read(cls, run: Run, method: str, split: str) -> "_Side":
        arrays = read_scores(run.folder, method, split)
        order = np.argsort(arrays["image_id"], kind="stable")
        labels = arrays["labels"] if "labels" in arrays else _labels_of(run, split, arrays["image_id"])
        rows = [row for row in read_metrics(run.folder) if (row["method"], row["split"]) == (method, split)]
        return cls(
            where=f"{run.folder}, {method}",
            category_names=run.info.category_names,
            image_id=arrays["image_id"][order],
            scores=arrays["scores"][order],
            labels=labels[order],
            threshold=rows[0].get("threshold_tuned") if rows else None,
        )


def _labels_of(run: Run, split: str, image_id: npt.NDArray[np.int64]) -> npt.NDArray[np.uint8]:
    """Labels of the images of a split, from the codes that the run keeps."""
    if not codes_path(run.folder, split).is_file():
        raise InputError(
            "no labels beside the scores",
            where=run.folder,
            got=f"neither codes nor labels of {split}",
            wanted="a run of this version",
            do=f"run `mmcli {run.info.kind}` again",
        )
    codes = read_codes(run.folder, split)
    if not np.array_equal(codes.image_id, image_id):
        raise InputError(
            "codes and scores of other images",
            where=run.folder,
            do=f"run `{command('knn-eval', '--run', run.folder)}` again",
        )
    return codes.labels


def _open(folder: Path) -> Run:
    return open_run(folder, kind=read_info(folder).kind)


def _methods(runs: tuple[Run, Run], named: tuple[str | None, str | None], split: str) -> tuple[str, str]:
    """The method of each run."""
    there = [_scored(run, split) for run in runs]
    both = [method for method in PREFERRED if all(method in found for found in there)]
    chosen = []
    for run, method, found in zip(runs, named, there, strict=True):
        if not found or (method is not None and method not in found):
            again = command("knn-eval", "--run", run.folder, "--split", split)
            raise InputError(
                f"no {split} scores" + (f" of {method}" if method else ""),
                where=run.folder,
                got=", ".join(found) or "none",
                wanted=method or "those of any method",
                do=f"run `{again}`, or name another method or split",
            )
        chosen.append(method or (both if named == (None, None) and both else found)[0])
    return chosen[0], chosen[1]


def _scored(run: Run, split: str) -> list[str]:
    """Methods whose scores of a split a run has, the preferred ones first."""
    ending = f"-{split}.safetensors"
    found = {path.name.removesuffix(ending) for path in (run.folder / "scores").glob(f"*{ending}")}
    return [method for method in PREFERRED if method in found] + sorted(found - set(PREFERRED))


def _check_same(a: _Side, b: _Side) -> None:
    """Refuse what is not of the same images, categories and labels."""
    do = "compare runs of one manifest and one split"
    if a.category_names != b.category_names or a.scores.shape[1] != b.scores.shape[1]:
        pairs = zip(a.category_names, b.category_names, strict=False)
        other = next((f"'{x}' and '{y}'" for x, y in pairs if x != y), None)
        got = f"{len(a.category_names)} and {len(b.category_names)} categories" + (f", {other}" if other else "")
        raise InputError("runs of other categories", where=f"{a.where} and {b.where}", got=got, do=do)
    if not np.array_equal(a.image_id, b.image_id):
        shared = len(np.intersect1d(a.image_id, b.image_id))
        got = f"{len(a.image_id)} and {len(b.image_id)} images, {shared} in common"
        raise InputError("runs of other images", where=f"{a.where} and {b.where}", got=got, wanted="the same", do=do)
    if not np.array_equal(a.labels, b.labels):
        image = a.image_id[np.flatnonzero((a.labels != b.labels).any(axis=1))[0]]
        raise InputError(
            "runs of other labels", where=f"{a.where} and {b.where}", got=f"image {image} labelled in two ways", do=do
        )


def _figures(side: _Side, threshold: Threshold) -> tuple[dict[str, float], dict[str, npt.NDArray[np.float64]]]:
    """Every figure, and its resamples."""
    found = evaluate(side.scores, side.labels, threshold=threshold)
    return found, resample(side.scores, side.labels, {"": threshold})


def _figure(key: str, ending: str, a: tuple[Any, Any], b: tuple[Any, Any]) -> Figure:
    name = key + ending if key in OF_THRESHOLD else key
    A, B = float(a[0][key]), float(b[0][key])
    found = difference(a[1][key], b[1][key], figure=A - B)
    if np.isnan([A, B, found.p]).any():
        known = [None if np.isnan(value) else value for value in (A, B)]
        return Figure(figure=name, A=known[0], B=known[1], difference=None, ci=None, p=None, verdict="undefined")
    better = (A < B) == (key in LOWER_IS_BETTER)
    verdict = EQUAL if found.p >= SIGNIFICANT else "better" if better else "worse"
    return Figure(figure=name, A=A, B=B, difference=A - B, ci=(found.low, found.high), p=found.p, verdict=verdict)


ARM_FIGURES = ("mAP", "F1_micro_tuned", "F1_macro_tuned", "P@5", "R@5")
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

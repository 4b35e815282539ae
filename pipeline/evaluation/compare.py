"""Two runs side by side on the same images: is one better, or is the difference what another sample would undo?"""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from rich.console import RenderableType

from ... import InputError
from ...heads.bootstrap import RESAMPLES, SEED, Threshold, difference, resample
from ...heads.metrics import evaluate
from ..core.files import command
from ..core.metrics_file import read_metrics
from ..core.results import codes_path, read_codes
from ..core.run import Run, open_run, read_info
from ..core.tables import comparison_table
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
        ]  # fmt: skip


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
        run_a=run_a, run_b=run_b, method_a=methods[0], method_b=methods[1], split=split, n_images=len(a.image_id),
        thresholds=thresholds, figures=figures, precision_a=runs[0].info.precision, precision_b=runs[1].info.precision,
    )  # fmt: skip


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
            where=f"{run.folder}, {method}", category_names=run.info.category_names,
            image_id=arrays["image_id"][order], scores=arrays["scores"][order], labels=labels[order],
            threshold=rows[0].get("threshold_tuned") if rows else None,
        )  # fmt: skip


def _labels_of(run: Run, split: str, image_id: npt.NDArray[np.int64]) -> npt.NDArray[np.uint8]:
    """Labels of the images of a split, from the codes that the run keeps."""
    if not codes_path(run.folder, split).is_file():
        raise InputError(
            "no labels beside the scores", where=run.folder, got=f"neither codes nor labels of {split}",
            wanted="a run of this version", do=f"run `mmcli {run.info.kind}` again",
        )  # fmt: skip
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
                f"no {split} scores" + (f" of {method}" if method else ""), where=run.folder,
                got=", ".join(found) or "none", wanted=method or "those of any method",
                do=f"run `{again}`, or name another method or split",
            )  # fmt: skip
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

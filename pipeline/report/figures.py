"""Compare, part four: the numbers of every figure, and how they are drawn (:class:`~.document.Figure`).

Symbols: N images, B bits, C classes.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from scipy.stats import rankdata

from ...heads.bootstrap import interval
from ...heads.config import HashRegConfig
from .analysis import RunAnalysis
from .collect import Inputs
from .document import Figure, Mark
from .plots import DASHES, INK, MARKERS, MUTED, SERIES
from .tables import cost_points, pareto_front

Floats = npt.NDArray[np.float64]
History = Sequence[Mapping[str, Any]]

BINS, RESAMPLES, SEED = 8, 1000, 42
LEAST_TAGS = 10  # in a bin of the calibration
MOST_LINES = 6
HASH_TERMS = [name.removeprefix("lambda_") for name in HashRegConfig.model_fields]
# The terms of the loss in the order of docs/method.md, with the names that a reader knows.
NAMES = {
    "loss": "whole loss",
    "bce": "classification",
    "code": "classification of bits",
    "fused": "classification of z",
    "nested": "nested code",
    "cosine": "cosine",
    "quant": "quantisation",
    "balance": "balance",
    "decorr": "decorrelation",
}
TERMS = {**NAMES, **{name: NAMES.get(name, name) for name in HASH_TERMS}}


class Axis(NamedTuple):
    """What mAP is plotted against: texts, the experiments that vary it, and for a cost its key in their rows."""

    name: str
    title: str
    label: str
    caption: str
    experiments: tuple[str, ...]
    key: str = ""


SETTINGS = (
    Axis("bits", "mAP against bits", "bits (0: no hash layer, cosine)", "What a shorter code costs.", ("A2",)),
    Axis("neighbours", "mAP against K", "neighbours that vote, K", "How many neighbours should vote.", ("C1",)),
)
COSTS = (
    Axis(
        "latency",
        "Latency against mAP",
        "median time of a query, ms",
        "Search and vote of one query, on the machine of the runs.",
        ("A2", "C1", "C2"),
        "query_latency_ms_p50",
    ),
    Axis(
        "bytes",
        "Bytes against mAP",
        "bytes of the index",
        "What the index keeps in memory.",
        ("A2", "C2"),
        "index_bytes",
    ),
)


def mark(method: str, *args: object, **options: object) -> Mark:
    """Something to draw: a method of matplotlib's ``Axes`` and its arguments."""
    return Mark(method, args, options)


def loss_terms(history: History, run: str) -> Figure | None:
    """Every term of the loss by epoch, on a logarithmic scale; None with fewer than two epochs."""
    epochs = np.array([line["epoch"] for line in history], float)
    lines = {key: np.array([line.get(key) or np.nan for line in history], float) for key in TERMS}
    lines = {key: values for key, values in lines.items() if np.isfinite(values).any()}
    if len(epochs) < 2 or not lines:
        return None
    ends = "; ".join(f"{TERMS[key]} {values[0]:.3g} to {values[-1]:.3g}" for key, values in lines.items())
    return Figure(
        name="loss-terms",
        title="Loss terms",
        caption=f"Means of every epoch, as logged, unweighted. {run}",
        alt=f"Line chart of loss terms over {len(epochs)} epochs, first to last: {ends}.",
        marks=tuple(
            mark("plot", epochs, values, label=TERMS[key], **_series(i, "linestyle"))
            for i, (key, values) in enumerate(lines.items())
        ),
        axes={"xlabel": "epoch", "ylabel": "loss term, log scale", "yscale": "log"},
    )


def val_curves(groups: Mapping[str, Sequence[History]]) -> Figure | None:
    """Val mAP by epoch: a colour and pattern per configuration, a line per seed."""
    curves = {name: [curve for curve in map(_val_curve, group) if len(curve) > 1] for name, group in groups.items()}
    shown = dict([(name, seeds) for name, seeds in curves.items() if seeds][:MOST_LINES])
    if not shown:
        return None
    best = [
        f"{name}: best {np.mean([curve[:, 1].max() for curve in seeds]):.3f}"
        + (f" (mean of {len(seeds)} seeds)" if len(seeds) > 1 else "")
        for name, seeds in shown.items()
    ]
    return Figure(
        name="val-curves",
        title="Learning curves",
        caption="mAP on val after every epoch; a line for every seed.",
        alt=f"Line chart of val mAP by epoch. {'; '.join(best)}.",
        marks=tuple(
            mark("plot", *curve.T, linewidth=1.2, label=name if seed == 0 else None, **_series(i, "linestyle"))
            for i, (name, seeds) in enumerate(shown.items())
            for seed, curve in enumerate(seeds)
        ),
        axes={"xlabel": "epoch", "ylabel": "val mAP"},
        legend="lower right",
        commands=("mmcli train-head",),
    )


def quality_by_setting(inputs: Inputs, setting: Axis) -> Figure | None:
    """The mAP of the values of an experiment: means with their intervals, and every seed; None with fewer than two."""
    (experiment,) = setting.experiments
    measured = [(arm, mAP) for arm in inputs.arms(experiment) if (mAP := arm.mean("mAP")) is not None]
    if len(measured) < 2:
        return None
    names, means = [arm.name for arm, _ in measured], np.array([mAP for _, mAP in measured])
    ends = np.array([arm.ends("mAP") or (mAP, mAP) for arm, mAP in measured])
    by_seed = [arm.values("mAP") for arm, _ in measured]
    seeds = [(i + 0.12, mAP) for i, values in enumerate(by_seed) if len(values) > 1 for mAP in values]
    marks = [
        mark(
            "errorbar",
            np.arange(len(names)),
            means,
            yerr=np.abs(ends.T - means),
            capsize=3,
            linewidth=1.3,
            markersize=6,
            label="mean, 95% interval over images",
            **_series(0, "marker"),
        )
    ]
    if seeds:
        marks.append(
            mark("plot", *zip(*seeds, strict=True), linestyle="none", marker="x", color=SERIES[1], label="a seed")
        )
    values = [f"{n}: {mAP:.3f} [{low:.3f}, {high:.3f}]" for n, mAP, (low, high) in zip(names, means, ends, strict=True)]
    return Figure(
        name=setting.name,
        title=setting.title,
        caption=setting.caption,
        alt=f"mAP against {setting.label}. {'; '.join(values)}.",
        marks=tuple(marks),
        axes={
            "xticks": range(len(names)),
            "xticklabels": names,
            "xlabel": setting.label,
            "ylabel": "mAP on test",
            "xlim": (-0.4, len(names) - 0.6),
        },
        commands=(inputs.ablate(experiment),),
    )


def quality_by_cost(inputs: Inputs, cost: Axis) -> Figure | None:
    """The mAP of configurations against a cost, with the front of those that no other beats in both."""
    points = [point for point in cost_points(inputs, cost.key) if point.cost > 0]
    if len(points) < 2:
        return None
    front = sorted(pareto_front(points), key=lambda point: point.cost)
    x, y = [p.cost for p in front], [p.mAP for p in front]
    marks = [
        mark("margins", x=0.15, y=0.1),
        mark("step", x, y, where="post", color=MUTED, linewidth=1, zorder=1),
    ]
    for i, group in enumerate(dict.fromkeys(point.group for point in points)):
        x, y = [p.cost for p in points if p.group == group], [p.mAP for p in points if p.group == group]
        style = {"linestyle": "none", "markersize": 6.5, "alpha": 0.9, **_series(i, "marker")}
        marks.append(mark("plot", x, y, label=group, **style))
    best = "; ".join(f"{p.name}: {p.cost:,.4g}, mAP {p.mAP:.3f}" for p in front)
    return Figure(
        name=cost.name,
        title=cost.title,
        caption=f"{cost.caption} The line joins what nothing else beats in both.",
        alt=f"Scatter of mAP against {cost.label}, {len(points)} configurations. On the front: {best}.",
        marks=tuple(marks),
        axes={"xscale": "log", "xlabel": f"{cost.label}, log scale", "ylabel": "mAP on test"},
        labels=tuple((p.name, p.cost, p.mAP) for p in [*reversed(front), *(p for p in points if p not in front)]),
        commands=(inputs.ablate(*cost.experiments),),
    )


def class_scatter(analysis: RunAnalysis) -> Figure | None:
    """AP of every class against how often it occurs in train; None with fewer than two classes."""
    AP, n = analysis.class_AP, analysis.base.labels.sum(axis=0).astype(float)
    shown = np.flatnonzero(~np.isnan(AP) & (n > 0))
    if len(shown) < 2:
        return None
    worst = [int(c) for c in shown[np.argsort(AP[shown])][:4]]
    rho, low, high = spearman(np.log(n[shown]), AP[shown])
    return Figure(
        name="class-ap",
        title="AP and how rare a class is",
        caption="A point a class; the dashed line is their mean, mAP. The lowest are named.",
        alt=f"Scatter of AP against train images for {len(shown)} classes; rank correlation {rho:.2f} [{low:.2f},"
        f" {high:.2f}]. Lowest: {', '.join(f'{analysis.class_names[c]} {AP[c]:.2f}' for c in worst)}.",
        marks=(
            mark("margins", x=0.1),
            mark("plot", n[shown], AP[shown], linestyle="none", marker="o", color=SERIES[0], alpha=0.75),
            mark("axhline", float(AP[shown].mean()), color=MUTED, linestyle=DASHES[1], linewidth=1),
        ),
        axes={
            "xscale": "log",
            "xlabel": "train images with the class, log scale",
            "ylabel": "AP on test",
            "ylim": (-0.04, 1.04),
        },
        labels=tuple((analysis.class_names[c], n[c], AP[c]) for c in worst),
    )


def bit_balance(analysis: RunAnalysis) -> Figure | None:
    """Share of train images for which each bit is set, sorted; None without hash layer."""
    if analysis.base.packed is None:
        return None
    share = np.sort(np.unpackbits(analysis.base.packed, axis=1).mean(axis=0))
    n_constant = int(((share < 0.01) | (share > 0.99)).sum())
    return Figure(
        name="bit-balance",
        title="Bit balance",
        caption="A balanced bit is set for half of the images and tells most. A bit at 0 or 1 tells nothing.",
        alt=f"Bars of {len(share)} bits: set for {share[0]:.0%} to {share[-1]:.0%} of train images, on average"
        f" {float(np.abs(share - 0.5).mean()):.2f} away from one half; {n_constant} bits nearly constant.",
        marks=(
            mark("bar", np.arange(len(share)), share - 0.5, bottom=0.5, width=1.0, color=SERIES[0]),
            mark("axhline", 0.5, color=INK, linewidth=0.9),
        ),
        axes={
            "xlabel": "bit, sorted",
            "ylabel": "share of train images with +1",
            "ylim": (0, 1),
            "xlim": (-1, len(share)),
        },
    )


def bit_correlation(analysis: RunAnalysis) -> Figure | None:
    """Absolute correlations between bits over train; None without hash layer."""
    if analysis.base.packed is None:
        return None
    bits = np.unpackbits(analysis.base.packed, axis=1).astype(np.float64)
    with np.errstate(invalid="ignore", divide="ignore"):
        absolute = np.abs(np.nan_to_num(np.corrcoef(bits.T)))
    np.fill_diagonal(absolute, 0.0)
    varies = bits.std(axis=0) > 0
    pairs = absolute[np.ix_(varies, varies)][~np.eye(int(varies.sum()), dtype=bool)]
    mean, largest = (float(pairs.mean()), float(pairs.max())) if len(pairs) else (0.0, 0.0)
    return Figure(
        name="bit-correlation",
        title="Correlation of bits",
        caption="Bits that say the same waste room. The diagonal is left dark.",
        alt=f"Heat map of absolute correlations between {len(absolute)} bits on train: mean {mean:.3f}, largest"
        f" {largest:.3f}.",
        marks=(mark("imshow", absolute, cmap="cividis", vmin=0, vmax=max(0.2, absolute.max()), interpolation="none"),),
        axes={"xlabel": "bit", "ylabel": "bit"},
        colorbar="|correlation|",
    )


def norms(analysis: RunAnalysis) -> Figure | None:
    """Mean AP of images in bins of the embedding's norm: were the norm a confidence, the line would rise."""
    if analysis.query.norm_img is None or analysis.query.norm_txt is None:
        return None
    has_AP = ~np.isnan(analysis.image_AP)
    AP = analysis.image_AP[has_AP]
    if len(AP) < 2 * BINS:
        return None
    marks, correlations, sure = [], [], []
    for i, (name, norm) in enumerate({"image": analysis.query.norm_img, "caption": analysis.query.norm_txt}.items()):
        log_norm = np.log(np.maximum(np.asarray(norm, float)[has_AP], 1e-12))
        means, ends = binned_means(log_norm, AP)
        rho, low, high = spearman(log_norm, AP)
        correlations.append(f"{name}: rank correlation {rho:+.2f} [{low:+.2f}, {high:+.2f}]")
        sure += [name] if low > 0 or high < 0 else []
        marks.append(
            mark(
                "errorbar",
                np.arange(1, BINS + 1) + 0.08 * (2 * i - 1),
                means,
                yerr=np.abs(ends.T - means),
                capsize=2.5,
                label=f"norm of the {name}",
                **_series(i, "linestyle", "marker"),
            )
        )
    if sure:
        verdict = f"It goes with correctness for the {' and the '.join(sure)}"
    else:
        verdict = "It does not tell how well an image is tagged, at this size"
    control = "Shuffled norms, the control. " if analysis.run.is_control else ""
    words = "; ".join(correlations)
    return Figure(
        name="norms",
        title="Is the magnitude a confidence?",
        caption=f"{control}{verdict}. {words[:1].upper()}{words[1:]}. Bars: 95% bootstrap interval over images.",
        alt=f"Mean AP of test images in {BINS} parts by the norm of their embeddings. {words}.",
        marks=tuple(marks),
        axes={"xlabel": f"images by norm, {BINS} equal parts, small to large", "ylabel": "mean AP of an image"},
    )


def threshold_curves(analysis: RunAnalysis, *, method: str) -> Figure | None:
    """Micro precision, recall and F1 by the threshold, and the one that val chose; None without scores or labels."""
    is_classifier = method == "classifier"
    scores = analysis.classifier if is_classifier else analysis.scores
    chosen = analysis.classifier_threshold if is_classifier else analysis.threshold
    if scores is None or not analysis.query.labels.any():
        return None
    thresholds = np.linspace(0, 1, 201)[1:]
    curves = micro_curves(np.asarray(scores, float), analysis.query.labels, thresholds)
    marks = [
        mark("plot", thresholds, values, label=label, **_series(i, "linestyle"))
        for i, (label, values) in enumerate(zip(("precision", "recall", "F1"), curves, strict=True))
    ]
    if chosen is not None:
        place = {"xytext": (4, -2), "textcoords": "offset points", "fontsize": 7.5, "va": "top", "color": MUTED}
        marks.append(mark("axvline", chosen, color=MUTED, linewidth=1))
        marks.append(mark("annotate", f"val: {chosen:.2f}", (chosen, 1.0), **place))
    F1 = curves[2]
    best = int(np.argmax(F1))
    return Figure(
        name=f"threshold-{method}",
        title=f"Thresholds, {method}",
        caption="The vertical line is the threshold that is best on val; test tunes nothing.",
        alt=f"Precision, recall and F1 by threshold. F1 is highest, {F1[best]:.3f}, at {thresholds[best]:.2f}."
        f"{'' if chosen is None else f' Val chose {chosen:.3f}.'}",
        marks=tuple(marks),
        axes={"xlabel": "threshold", "ylabel": "micro, on test", "xlim": (0, 1), "ylim": (0, 1.02)},
        legend="best",
    )


def calibration(analysis: RunAnalysis) -> Figure | None:
    """How often a tag of a score is right: on the diagonal a score is a probability; None without labels."""
    if not analysis.query.labels.any():
        return None
    every = {"neighbours": analysis.scores, "classifier": analysis.classifier}
    curves = {
        name: reliability(np.asarray(scores, float), analysis.query.labels)
        for name, scores in every.items()
        if scores is not None
    }
    highest = [
        f"{name}: scores near {x[-1]:.2f} are right {share[-1]:.0%} of the time"
        for name, (x, share) in curves.items()
        if len(x)
    ]
    return Figure(
        name="calibration",
        title="Are scores probabilities?",
        caption="Above the line: right more often than the score says. Bins with fewer than ten tags are left out.",
        alt=f"Reliability of scores on test. {'; '.join(highest)}.",
        marks=(
            mark("plot", [0, 1], [0, 1], color=MUTED, linewidth=1),
            *(
                mark("plot", *curve, label=name, **_series(i, "linestyle", "marker"))
                for i, (name, curve) in enumerate(curves.items())
            ),
        ),
        axes={
            "xlabel": "score of a tag, in bins",
            "ylabel": "share that is right",
            "xlim": (0, 1),
            "ylim": (0, 1.02),
        },
        legend="upper left",
    )


def micro_curves(scores: Floats, labels: npt.NDArray[np.uint8], thresholds: Floats) -> tuple[Floats, Floats, Floats]:
    """Micro precision, recall and F1 of ``scores >= threshold`` by threshold; precision is NaN where none is."""
    every, right = np.sort(scores.reshape(-1)), np.sort(scores[labels.astype(bool)])
    n = len(every) - np.searchsorted(every, thresholds, side="left")
    tp = len(right) - np.searchsorted(right, thresholds, side="left")
    with np.errstate(invalid="ignore", divide="ignore"):
        precision = np.where(n > 0, tp / n, np.nan)
    return precision, tp / max(1, len(right)), 2 * tp / np.maximum(1, n + len(right))


def spearman(x: Floats, y: Floats) -> tuple[float, float, float]:
    """Rank correlation with its 95% bootstrap interval over the points; 0 where all ranks of a side are equal."""
    ranks = np.stack([rankdata(x), rankdata(y)])

    def correlation(pairs: Floats) -> float:
        a, b = pairs - pairs.mean(axis=1, keepdims=True)
        scale = float(np.sqrt((a * a).sum() * (b * b).sum()))
        return float((a * b).sum()) / scale if scale else 0.0

    rng, rho = np.random.default_rng(SEED), correlation(ranks)
    resampled = [correlation(ranks[:, rng.integers(0, len(x), len(x))]) for _ in range(RESAMPLES)]
    low, high, _ = interval(np.array(resampled), figure=rho)
    return rho, low, high


def binned_means(x: Floats, y: Floats) -> tuple[Floats, Floats]:
    """Means of y ``(bins,)`` in equal parts by x, and their 95% bootstrap intervals ``(bins, 2)``."""
    rng, means, ends = np.random.default_rng(SEED), [], []
    for part in np.array_split(np.argsort(x, kind="stable"), BINS):
        means.append(float(y[part].mean()))
        resampled = y[part][rng.integers(0, len(part), (RESAMPLES, len(part)))].mean(axis=1)
        ends.append(interval(resampled, figure=means[-1])[:2])
    return np.array(means), np.array(ends)


def reliability(scores: Floats, labels: npt.NDArray[Any]) -> tuple[Floats, Floats]:
    """Mean score and share of right tags of every tenth of [0, 1] with at least ten tags."""
    bins = np.minimum((scores * 10).astype(int), 9).reshape(-1)
    n = np.bincount(bins, minlength=10)
    sums = [np.bincount(bins, weights=values.reshape(-1), minlength=10) for values in (scores, labels)]
    kept = n >= LEAST_TAGS
    return sums[0][kept] / n[kept], sums[1][kept] / n[kept]


def _val_curve(history: History) -> Floats:
    """Epoch and val mAP ``(epochs, 2)`` of the epochs that have one."""
    return np.array([(line["epoch"], line["val_mAP"]) for line in history if line.get("val_mAP") is not None], float)


def _series(i: int, *keys: str) -> dict[str, Any]:
    """Colour of the series i, and its ``linestyle`` and ``marker`` where they are named."""
    styles: dict[str, Sequence[Any]] = {"color": SERIES, "linestyle": DASHES, "marker": MARKERS}
    return {key: styles[key][i % len(styles[key])] for key in ("color", *keys)}

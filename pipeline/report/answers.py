"""Compare, part two: each question of the report, answered by differences with their 95% interval and its verdict.

Differences of mAP are paired over the test images and averaged over seeds
(:class:`~mmcli.pipeline.evaluation.compare.Pairs`). A ratio of speeds has a t interval over the logarithms of the
seeds' ratios, each of which was measured once. The verdict is what the interval alone says.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import mean, stdev
from typing import Any

import numpy as np
from scipy.stats import t as student_t

from ...heads.bootstrap import difference, resample_classes
from ..evaluation.compare import EQUAL, Arm, Pairs, arm_pair, verdict
from .analysis import RunAnalysis
from .collect import Inputs
from .document import Answer, Cell, Comparison, Table, Text, number

LEVEL = 0.05
SPEED, N_WORST = "query_latency_ms_p50", 8
NOT_MEASURED = "Not measured yet."
NO_CODES = Text(text="No run keeps codes", command="mmcli train-head && mmcli knn-eval")


@dataclass(frozen=True)
class Contrast:
    """Two values of an experiment to be compared, and both in words."""

    experiment: str
    A: str
    B: str
    what: str


@dataclass(frozen=True, kw_only=True)
class Question:
    """A question, the comparisons that answer it, and its answer by the verdict of the first of them.

    Attributes:
        name: Name for links and for ``--json``.
        text: The question.
        contrasts: The comparisons, the most important first.
        better: The answer where A is better; ``{gain}`` is ``A - B`` and ``{cost}`` is ``B - A``, with its interval.
        worse: The answer where A is worse.
        equal: The answer where the interval holds 0.
    """

    name: str
    text: str
    contrasts: tuple[Contrast, ...]
    better: str = "Yes: {gain}, {what}."
    worse: str = "No, it costs: {gain}, {what}."
    equal: str = "Not distinguishable at this size: {gain}, {what}."


def _fusions(A: str, B: str, what: str) -> tuple[Contrast, ...]:
    """Two fusions of experiment A1, in both of its scales."""
    scales = {"rms": "blocks of equal scale", "none": "plain blocks"}
    return tuple(Contrast("A1", f"{A} / {key}", f"{B} / {key}", f"{what}, {words}") for key, words in scales.items())


MAGNITUDE = Question(
    name="magnitude",
    text="Does the magnitude help?",
    contrasts=(
        *_fusions("hadamard_magnitude", "hadamard", "with magnitude against without"),
        Contrast("M2", "true m", "shuffled m", "true magnitude against that of another image"),
        Contrast("M2", "true m", "no m", "true magnitude against none"),
    ),
)
HADAMARD = Question(
    name="hadamard",
    text="Does the Hadamard product help?",
    contrasts=_fusions("hadamard", "concat", "with the product against without"),
)
NEIGHBOURS = Question(
    name="neighbours",
    text="What do neighbours cost against the classifier?",
    contrasts=(
        Contrast("A3", "knn", "classifier", "neighbours against the classifier"),
        Contrast("A3", "hybrid", "classifier", "both mixed against the classifier"),
    ),
    better="Nothing, they are better: {gain}.",
    worse="They cost {cost}.",
    equal="No cost that can be told at this size: {gain}.",
)
BITS = Question(
    name="bits",
    text="What do 32, 64 and 128 bits cost against no hash layer?",
    contrasts=tuple(Contrast("A2", bits, "0", f"{bits} bits against no hash layer") for bits in ("32", "64", "128")),
)
SPEED_OF_SEARCH = Question(
    name="speed",
    text="Is Hamming search faster than cosine, and by how much?",
    contrasts=(Contrast("C2", "hamming", "cosine", "mAP, Hamming against cosine"),),
)


def answers(inputs: Inputs, analysis: RunAnalysis | None, pairs: Pairs) -> tuple[Answer, ...]:
    """Answer every question, with p corrected over all comparisons of mAP in them (Holm 1979)."""
    every = [
        _answer(MAGNITUDE, inputs, pairs),
        _answer(HADAMARD, inputs, pairs),
        _neighbours(inputs, analysis, pairs),
        _bits(inputs, pairs),
        _speed(inputs, pairs),
        _classes(analysis),
    ]
    corrected = iter(holm([c.p for answer in every for c in answer.comparisons if c.p is not None]))
    every = [
        replace(
            answer,
            comparisons=tuple(c if c.p is None else replace(c, p_holm=next(corrected)) for c in answer.comparisons),
        )
        for answer in every
    ]
    # All drawings of a unit share one scale, so that they can be compared.
    ends = [(c.unit, end) for answer in every for c in answer.comparisons for end in (c.low, c.high)]
    scales = {
        unit: 1.06 * max((abs(end) for key, end in ends if key == unit and end is not None), default=0.0)
        for unit in ("mAP", "AP")
    }
    return tuple(
        replace(answer, table=comparison_table(answer.name, answer.question, answer.comparisons, answer.sides, scales))
        for answer in every
    )


def comparison_table(
    name: str,
    title: str,
    comparisons: Sequence[Comparison],
    sides: tuple[str, str] = ("A", "B"),
    scales: Mapping[str, float] | None = None,
    note: str = "",
) -> Table | None:
    """Comparisons as a table; None where there are none.

    Args:
        name: Name of the table.
        title: Its heading.
        comparisons: One a row.
        sides: What A and B are called.
        scales: By unit, the largest end of an interval that a drawing of it shows; other intervals are not drawn.
        note: What a reader has to know.
    """
    if not comparisons:
        return None
    A, B = sides
    has_spread = any(c.spread is not None for c in comparisons)
    has_p = any(c.p_holm is not None for c in comparisons)
    columns = ["class" if A == "AP" else "comparison", f"{A} is", f"{A} − {B}", "95% interval", A, B]
    columns += ["SD over seeds"] * has_spread + ["p (Holm)"] * has_p
    rows = []
    for c in comparisons:
        is_ratio = c.unit == "times"
        signed = "{:.2f} ×" if is_ratio else "{:+.3f}"
        words = {"better": "faster", "worse": "slower"} if is_ratio else {}
        ends = "–" if c.low is None or c.high is None else f"{signed.format(c.low)} to {signed.format(c.high)}"
        colour = c.verdict if c.verdict in {"better", "worse"} else "even"
        drawn = _drawn_interval(c, (scales or {}).get(c.unit, 0.0))
        row = [Cell(text=c.what), Cell(text=words.get(c.verdict, c.verdict), verdict=colour)]
        row += [number(c.difference, signed), Cell(text=ends, interval=drawn, verdict=colour if drawn else "")]
        row += [number(c.A), number(c.B)]
        rows.append((*row, *[number(c.spread)] * has_spread, *[number(c.p_holm)] * has_p))
    return Table(name=name, title=title, columns=tuple(columns), n_words=2, rows=tuple(rows), note=note)


def holm(p: Sequence[float]) -> list[float]:
    """Holm's step-down correction: p of rank i times the number not yet rejected, never falling."""
    order = np.argsort(p, kind="stable")
    steps = (len(p) - np.arange(len(p))) * np.asarray(p, float)[order]
    corrected = np.empty(len(p))
    corrected[order] = np.maximum.accumulate(np.minimum(1.0, steps))
    return [float(value) for value in corrected]


def speed_ratio(hamming: Arm, cosine: Arm) -> Comparison | None:
    """How many times as fast Hamming search is as cosine, over seeds; None where no seed has both times."""
    of_cosine = {sample.seed: sample.row.get(SPEED) for sample in cosine.samples}
    times = [(sample.row.get(SPEED), of_cosine.get(sample.seed)) for sample in hamming.samples]
    both = [(float(h), float(c)) for h, c in times if h and c]
    if not both:
        return None
    logs = [math.log(c / h) for h, c in both]
    centre, n = mean(logs), len(logs)
    low = high = None
    if n > 1:
        half = float(student_t.ppf(1 - LEVEL / 2, n - 1)) * stdev(logs) / math.sqrt(n)
        low, high = math.exp(centre - half), math.exp(centre + half)
    return Comparison(
        what="milliseconds a query: cosine over Hamming",
        unit="times",
        A=mean(c for _, c in times if c),
        B=mean(h for h, _ in times if h),
        difference=math.exp(centre),
        low=low,
        high=high,
        seeds=(n, n),
        verdict="measured once" if low is None or high is None else verdict(low - 1, high - 1),
    )


def _drawn_interval(c: Comparison, scale: float) -> tuple[float, float, float] | None:
    """Low end, difference and high end as shares of the drawing's width, 0 in its middle."""
    if c.low is None or c.high is None or not scale:
        return None
    low, centre, high = (0.5 + 0.5 * max(-1.0, min(1.0, end / scale)) for end in (c.low, c.difference, c.high))
    return low, centre, high


def _compare(what: str, a: Arm, b: Arm, pairs: Pairs) -> Comparison | None:
    """A less B in mAP; None where their scores cannot be paired."""
    paired = pairs.difference(a, b)
    if paired is None:
        return None
    keys = ("A", "B", "difference", "low", "high", "p", "spread", "verdict")
    figures: dict[str, Any] = {key: getattr(paired, key) for key in keys}
    return Comparison(what=what, seeds=(len(a.samples), len(b.samples)), **figures)


def _answer(question: Question, inputs: Inputs, pairs: Pairs) -> Answer:
    """Make the comparisons of a question, and say which could not be made."""
    comparisons: list[Comparison] = []
    missing: dict[str, list[str]] = {}
    compared = set()
    for contrast in question.contrasts:
        arms = arm_pair(inputs.arms(contrast.experiment), contrast.A, contrast.B)
        files = None if arms is None else tuple(tuple(sample.scores for sample in arm.samples) for arm in arms)
        if files is not None and files in compared:
            continue  # two experiments share these runs: counted once
        compared.add(files)
        comparison = None if arms is None else _compare(contrast.what, *arms, pairs)
        if comparison is None:
            missing.setdefault(contrast.experiment, []).append(contrast.what)
        else:
            comparisons.append(comparison)
    gaps: tuple[Text, ...] = ()
    if missing:
        text = f"Not measured: {'; '.join(what for experiment in missing.values() for what in experiment)}"
        text = text if comparisons else "This makes the runs that answer it"
        gaps = (Text(text=text, command=inputs.ablate(*missing)),)
    return Answer(
        name=question.name,
        question=question.text,
        answer=_sentences(question, comparisons),
        comparisons=tuple(comparisons),
        gaps=gaps,
    )


def _sentences(question: Question, comparisons: Sequence[Comparison]) -> str:
    """What the first comparison says, then the others where they say something else."""
    if not comparisons:
        return NOT_MEASURED
    first, *others = comparisons
    template = {"better": question.better, "worse": question.worse, EQUAL: question.equal}[first.verdict]
    sentences = [template.format(gain=_gain(first), cost=_cost(first), what=first.what)]
    if others and all(c.verdict == first.verdict for c in others):
        one_other = len(others) == 1
        sentences.append(f"The same {'verdict in the other comparison' if one_other else 'in the other comparisons'}.")
    else:
        sentences += [f"{c.what[:1].upper()}{c.what[1:]}: {c.verdict}, {_gain(c)}." for c in others]
    return " ".join(sentences)


def _gain(c: Comparison) -> str:
    """``A - B`` with its interval."""
    return f"{c.difference:+.3f}{'' if c.low is None else f' [{c.low:+.3f}, {c.high:+.3f}]'} mAP"


def _cost(c: Comparison) -> str:
    """``B - A`` with its interval, the ends of which change places."""
    return f"{-c.difference:.3f} mAP{'' if c.low is None or c.high is None else f' [{-c.high:.3f}, {-c.low:.3f}]'}"


def _neighbours(inputs: Inputs, analysis: RunAnalysis | None, pairs: Pairs) -> Answer:
    """From experiment A3, else from the run that is looked into."""
    answer = _answer(NEIGHBOURS, inputs, pairs)
    if answer.comparisons or analysis is None:
        return answer
    arms = arm_pair([analysis.run.arm(row, row["method"]) for row in analysis.run.rows], "knn", "classifier")
    comparison = None if arms is None else _compare(NEIGHBOURS.contrasts[0].what, *arms, pairs)
    if comparison is None:
        return answer
    text = "Measured on one run with one seed; more seeds, and both mixed"
    gap = replace(answer.gaps[0], text=text)
    return replace(answer, answer=_sentences(NEIGHBOURS, [comparison]), comparisons=(comparison,), gaps=(gap,))


def _bits(inputs: Inputs, pairs: Pairs) -> Answer:
    """Each number of bits by its verdict; those that cannot be told from no hash layer together."""
    answer = _answer(BITS, inputs, pairs)
    sentences, equal = [], []
    for c in answer.comparisons:
        bits = c.what.partition(" ")[0]
        if c.verdict == EQUAL:
            equal.append(bits)
        else:
            sentences.append(
                f"{bits} bits {f'cost {_cost(c)}' if c.verdict == 'worse' else f'are better by {_gain(c)}'}."
            )
    if equal:
        sentences.append(f"{' and '.join(equal)} bits cannot be told from no hash layer at this size.")
    return replace(answer, answer=" ".join(sentences) or NOT_MEASURED)


def _speed(inputs: Inputs, pairs: Pairs) -> Answer:
    """Cosine's time a query over Hamming's, seed by seed, and what the difference in mAP is."""
    answer = _answer(SPEED_OF_SEARCH, inputs, pairs)
    arms = arm_pair(inputs.arms("C2"), "hamming", "cosine")
    ratio = None if arms is None else speed_ratio(*arms)
    if arms is None or ratio is None:
        return answer
    if ratio.low is None:
        text = f"{ratio.difference:.2f} times as fast, measured once, so without an interval"
    else:
        opening = {"better": "Yes", "worse": "No"}.get(ratio.verdict, "Cannot be told here")
        text = f"{opening}: {ratio.difference:.2f} times as fast [{ratio.low:.2f}, {ratio.high:.2f}]"
    in_mAP = [f"In mAP it is {c.verdict}: {_gain(c)}." for c in answer.comparisons]
    n = next((int(row["n_index"]) for row in arms[0].rows if row.get("n_index")), None)
    size = "" if n is None else f" {n:,} codes were searched; a larger index tells more."
    return replace(
        answer,
        answer=" ".join([f"{text}.", *in_mAP]),
        comparisons=(ratio, *answer.comparisons),
        note=f"Median time of one query, search and vote, on the machine of the runs.{size} `mmcli bench knn` times"
        " larger indexes.",
    )


def _classes(analysis: RunAnalysis | None) -> Answer:
    """Classes whose AP lies below the mean of all by more than the images drawn explain."""
    answer = Answer(name="classes", question="Which classes fail?", answer=NOT_MEASURED, sides=("AP", "mAP"))
    if analysis is None:
        return replace(answer, gaps=(NO_CODES,))
    AP = analysis.class_AP
    if np.isnan(AP).all():
        return replace(answer, answer="Cannot be told: no test image has a label.")
    resampled = resample_classes(analysis.scores, analysis.query.labels)
    mean_class = np.nansum(resampled, axis=1) / np.maximum(1, (~np.isnan(resampled)).sum(axis=1))
    mAP, n = float(np.nanmean(AP)), int((~np.isnan(AP)).sum())
    worse: list[Comparison] = []
    for c in np.argsort(AP)[:n]:  # NaN last
        interval = difference(resampled[:, c], mean_class, figure=float(AP[c]) - mAP)
        if interval.high < 0:
            worse.append(
                Comparison(
                    what=analysis.class_names[c],
                    unit="AP",
                    A=float(AP[c]),
                    B=mAP,
                    difference=float(AP[c]) - mAP,
                    low=interval.low,
                    high=interval.high,
                    seeds=(1, 1),
                    verdict="worse",
                )
            )
    text = f"{len(worse)} of {n} classes lie below the mean class (mAP {mAP:.3f}) by more than chance"
    if worse:
        text += f": {', '.join(c.what for c in worse[:N_WORST])}"
        text += f" and {len(worse) - N_WORST} more" if len(worse) > N_WORST else ""
    return replace(
        answer,
        answer=f"{text}.",
        comparisons=tuple(worse[:N_WORST]),
        note=f"AP of a class less the mean over classes, of the neighbours of the run {analysis.name}. Of {n} classes"
        f" about {round(LEVEL / 2 * n)} would stand here by chance. The lowest AP first; all classes are below.",
    )

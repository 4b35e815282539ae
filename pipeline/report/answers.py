"""The answer first: each question of SPEC.md section 9 with its difference, 95% interval and the verdict of that alone.

Differences of mAP are paired over the test images and averaged over seeds (:mod:`.report_arms`). A ratio of speeds has
a t interval over the logarithms of the seeds' ratios, each of which was measured once.
"""

import math
from collections.abc import Sequence
from dataclasses import replace
from statistics import mean, stdev
from typing import NamedTuple

import numpy as np

from ...heads.bootstrap import difference, resample_classes
from ...heads.ranking import average_precision
from ..evaluation.compare import EQUAL, Arm, Pairs, arm_pair, verdict
from .document import Answer, Comparison, Gap
from .inputs import Depth, Inputs, arm_of

LEVEL = 0.05
# Quantiles 0.975 of Student's t by degrees of freedom, one upwards.
T975 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)
T975_OF_MORE = 2.13  # of 15, above those of more
SPEED, MOST_CLASSES = "query_latency_ms_p50", 8


class Wanted(NamedTuple):
    """A comparison that a question asks for: an experiment, two of its values, and both in words."""

    experiment: str
    A: str
    B: str
    what: str


MAGNITUDE = (
    Wanted("A1", "hadamard_magnitude / rms", "hadamard / rms", "with magnitude against without, blocks of equal scale"),
    Wanted("A1", "hadamard_magnitude / none", "hadamard / none", "with magnitude against without, plain blocks"),
    Wanted("M2", "true m", "shuffled m", "true magnitude against that of another image"),
    Wanted("M2", "true m", "no m", "true magnitude against none"),
)
HADAMARD = (
    Wanted("A1", "hadamard / rms", "concat / rms", "with the product against without, blocks of equal scale"),
    Wanted("A1", "hadamard / none", "concat / none", "with the product against without, plain blocks"),
)
NEIGHBOURS = (
    Wanted("A3", "knn", "classifier", "neighbours against the classifier"),
    Wanted("A3", "hybrid", "classifier", "both mixed against the classifier"),
)
BITS = tuple(Wanted("A2", bits, "0", f"{bits} bits against no hash layer") for bits in ("32", "64", "128"))
DISTANCE = (Wanted("C2", "hamming", "cosine", "mAP, Hamming against cosine"),)


def answers(inputs: Inputs, depth: Depth | None, pairs: Pairs) -> tuple[Answer, ...]:
    """All questions, with p corrected over all comparisons of mAP in them (Holm 1979)."""
    found = [
        _answer("magnitude", "Does the magnitude help?", MAGNITUDE, inputs, pairs),
        _answer("hadamard", "Does the Hadamard product help?", HADAMARD, inputs, pairs),
        _neighbours(inputs, depth, pairs),
        _bits(inputs, pairs),
        _speed(inputs, pairs),
        _classes(depth),
    ]
    corrected = iter(_holm([c.p for a in found for c in a.comparisons if c.p is not None]))
    return tuple(
        replace(
            one, comparisons=tuple(c if c.p is None else replace(c, p_holm=next(corrected)) for c in one.comparisons)
        )
        for one in found
    )


def compared(what: str, a: Arm, b: Arm, pairs: Pairs) -> Comparison | None:
    """A less B in mAP; None where their scores cannot be paired."""
    found = pairs.difference(a, b)
    if found is None:
        return None
    return Comparison(
        what=what,
        A=found.A,
        B=found.B,
        difference=found.difference,
        low=found.low,
        high=found.high,
        p=found.p,
        seeds=(len(a.samples), len(b.samples)),
        spread=found.spread,
        verdict=found.verdict,
    )


def _answer(name: str, question: str, wanted: Sequence[Wanted], inputs: Inputs, pairs: Pairs) -> Answer:
    made: list[Comparison] = []
    missing: dict[str, list[str]] = {}
    known = set()
    for one in wanted:
        arms = arm_pair(inputs.arms(one.experiment), one.A, one.B)
        files = None if arms is None else tuple(tuple(sample.scores for sample in arm.samples) for arm in arms)
        if files is not None and files in known:
            continue  # two experiments share these runs: counted once
        known.add(files)
        found = None if arms is None else compared(one.what, *arms, pairs)
        if found is not None:
            made.append(found)
        else:
            missing.setdefault(one.experiment, []).append(one.what)
    gaps: tuple[Gap, ...] = ()
    if missing:
        said = f"Not measured: {'; '.join(what for those in missing.values() for what in those)}"
        gaps = (Gap(text=said if made else "This makes the runs that answer it", command=inputs.ablate(*missing)),)
    return Answer(name=name, question=question, answer=_sentence(made), comparisons=tuple(made), gaps=gaps)


def _sentence(made: Sequence[Comparison]) -> str:
    """A question of yes or no: what the first comparison says, then the others where they say something else."""
    if not made:
        return "Not measured yet."
    first, rest = made[0], made[1:]
    told = {
        "better": f"Yes: {_signed(first)}",
        "worse": f"No, it costs: {_signed(first)}",
        EQUAL: f"Not distinguishable at this size: {_signed(first)}",
    }[first.verdict]
    return " ".join([f"{told}, {first.what}.", *_others(first, rest)])


def _others(first: Comparison, rest: Sequence[Comparison]) -> list[str]:
    same = [one for one in rest if one.verdict == first.verdict]
    if rest and len(same) == len(rest):
        return ["The same verdict in the other comparison." if len(rest) == 1 else "The same in the other comparisons."]
    told = {"better": "better", "worse": "worse", EQUAL: EQUAL}
    return [f"{one.what[:1].upper()}{one.what[1:]}: {told[one.verdict]}, {_signed(one)}." for one in rest]


def _signed(one: Comparison) -> str:
    interval = "" if one.low is None else f" [{one.low:+.3f}, {one.high:+.3f}]"
    return f"{one.difference:+.3f}{interval} mAP"


def _lost(one: Comparison) -> str:
    """What A lacks of B, with its interval turned round."""
    assert one.low is not None
    assert one.high is not None
    return f"{-one.difference:.3f} mAP [{-one.high:.3f}, {-one.low:.3f}]"


def _bits(inputs: Inputs, pairs: Pairs) -> Answer:
    """Each number of bits by its verdict; those that cannot be told from no hash layer together."""
    found = _answer("bits", "What do 32, 64 and 128 bits cost against no hash layer?", BITS, inputs, pairs)
    parts, even = [], []
    for one in found.comparisons:
        bits = one.what.partition(" ")[0]
        if one.verdict == EQUAL:
            even.append(bits)
        else:
            told = f"cost {_lost(one)}" if one.verdict == "worse" else f"are better by {_signed(one)}"
            parts.append(f"{bits} bits {told}.")
    if even:
        parts.append(f"{' and '.join(even)} bits cannot be told from no hash layer at this size.")
    return replace(found, answer=" ".join(parts)) if parts else found


def _neighbours(inputs: Inputs, depth: Depth | None, pairs: Pairs) -> Answer:
    """From experiment A3, else from the run that is looked into."""
    question = "What do neighbours cost against the classifier?"
    found = _answer("neighbours", question, NEIGHBOURS, inputs, pairs)
    made = found.comparisons
    if not made and depth is not None:
        arms = {row["method"]: arm_of(depth.known, row, row["method"]) for row in depth.known.rows}
        both = arm_pair(list(arms.values()), "knn", "classifier")
        one = None if both is None else compared(NEIGHBOURS[0].what, *both, pairs)
        if one is not None:
            made = (one,)
            text = "Measured on one run with one seed; more seeds, and both mixed"
            found = replace(found, comparisons=made, gaps=(Gap(text=text, command=found.gaps[0].command),))
    return replace(found, answer=_cost(made))


def _cost(made: Sequence[Comparison]) -> str:
    if not made:
        return "Not measured yet."
    one = made[0]
    told = {
        "worse": f"They cost {_lost(one)}",
        "better": f"Nothing, they are better: {_signed(one)}",
        EQUAL: f"No cost that can be told at this size: {_signed(one)}",
    }[one.verdict]
    return " ".join([f"{told}.", *_others(one, made[1:])])


def _speed(inputs: Inputs, pairs: Pairs) -> Answer:
    """Cosine's time a query over Hamming's, seed by seed, and what the difference in mAP is."""
    answer = _answer("speed", "Is Hamming search faster than cosine, and by how much?", DISTANCE, inputs, pairs)
    both = arm_pair(inputs.arms("C2"), "hamming", "cosine")
    if both is None:
        return answer
    ratio = _ratio(*both)
    if ratio is None:
        return answer
    n = next((int(sample.row["n_index"]) for sample in both[0].samples if sample.row.get("n_index")), None)
    size = "" if n is None else f" {n:,} codes were searched; a larger index tells more."
    note = (
        f"Median time of one query, search and vote, on the machine of the runs.{size} `mmcli bench knn` times larger"
        " indexes."
    )
    return replace(answer, answer=_fast(ratio, answer), comparisons=(ratio, *answer.comparisons), note=note)


def _fast(ratio: Comparison, answer: Answer) -> str:
    if ratio.low is None:
        told = f"{ratio.difference:.2f} times as fast, measured once, so without an interval"
    else:
        times = f"{ratio.difference:.2f} times as fast [{ratio.low:.2f}, {ratio.high:.2f}]"
        told = {"better": f"Yes: {times}", "worse": f"No: {times}"}.get(ratio.verdict, f"Cannot be told here: {times}")
    rest = [f"In mAP it is {one.verdict}: {_signed(one)}." for one in answer.comparisons]
    return " ".join([f"{told}.", *rest])


def _ratio(hamming: Arm, cosine: Arm) -> Comparison | None:
    of_cosine = {sample.seed: sample.row.get(SPEED) for sample in cosine.samples}
    pairs = [(sample.row.get(SPEED), of_cosine.get(sample.seed)) for sample in hamming.samples]
    logs = [math.log(c / h) for h, c in pairs if h and c]
    if not logs:
        return None
    centre, n = mean(logs), len(logs)
    low = high = None
    if n > 1:
        half = (T975[n - 2] if n - 2 < len(T975) else T975_OF_MORE) * stdev(logs) / math.sqrt(n)
        low, high = math.exp(centre - half), math.exp(centre + half)
    said = "measured once" if low is None or high is None else verdict(low - 1, high - 1)
    return Comparison(
        what="milliseconds a query: cosine over Hamming",
        unit="times",
        A=mean(c for _, c in pairs if c),
        B=mean(h for h, _ in pairs if h),
        difference=math.exp(centre),
        low=low,
        high=high,
        seeds=(n, n),
        verdict=said,
    )


def _classes(depth: Depth | None) -> Answer:
    """Classes whose AP lies below the mean of all by more than the images drawn explain."""
    question = "Which classes fail?"
    if depth is None:
        gap = Gap(text="No run keeps codes", command="mmcli train-head && mmcli knn-eval")
        return Answer(name="classes", question=question, answer="Not measured yet.", gaps=(gap,))
    AP = average_precision(depth.scores, depth.query.labels)
    drawn = resample_classes(depth.scores, depth.query.labels)
    if np.isnan(AP).all():
        return Answer(name="classes", question=question, answer="Cannot be told: no test image has a label.")
    whole = np.where(np.isnan(drawn), 0.0, drawn).sum(axis=1) / np.maximum(1, (~np.isnan(drawn)).sum(axis=1))
    mAP, made = float(np.nanmean(AP)), []
    for c in np.argsort(AP):
        if np.isnan(AP[c]):
            continue
        found = difference(drawn[:, c], whole, figure=float(AP[c]) - mAP)
        if found.high < 0:
            made.append(_class(depth.names[c], float(AP[c]), mAP, found.low, found.high))
    n = int((~np.isnan(AP)).sum())
    worst = ", ".join(one.what for one in made[:MOST_CLASSES])
    more = f" and {len(made) - MOST_CLASSES} more" if len(made) > MOST_CLASSES else ""
    told = f"{len(made)} of {n} classes lie below the mean class (mAP {mAP:.3f}) by more than chance"
    note = (
        f"AP of a class less the mean over classes, of the neighbours of the run {depth.known.run.folder.name}. Of {n}"
        f" classes about {round(LEVEL / 2 * n)} would stand here by chance. The lowest AP first; all classes are below."
    )
    return Answer(
        name="classes",
        question=question,
        answer=f"{told}: {worst}{more}." if made else f"{told}.",
        comparisons=tuple(made[:MOST_CLASSES]),
        note=note,
        sides=("AP", "mAP"),
    )


def _class(name: str, AP: float, mAP: float, low: float, high: float) -> Comparison:
    return Comparison(
        what=name, unit="AP", A=AP, B=mAP, difference=AP - mAP, low=low, high=high, seeds=(1, 1), verdict="worse"
    )


def _holm(p: Sequence[float]) -> list[float]:
    """Step-down correction: p of rank i times the number not yet rejected, never falling."""
    order = sorted(range(len(p)), key=lambda at: p[at])
    corrected, most = [0.0] * len(p), 0.0
    for rank, at in enumerate(order):
        most = max(most, min(1.0, (len(p) - rank) * p[at]))
        corrected[at] = most
    return corrected

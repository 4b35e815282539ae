"""The tables of a report: methods, experiments, runs, classes."""

from collections.abc import Mapping, Sequence

import numpy as np

from ...heads.metrics import per_class
from ..core.metrics_file import TWO_PRECISIONS
from ..evaluation.arms import FIGURES, Arm, Pairs, best_of
from .depth import Depth
from .document import Cell, Column, Table, number
from .inputs import Inputs, arm_of

# Title and key of what the tables of arms show.
SHOWN = (
    ("mAP", "mAP"),
    ("F1 micro*", "F1_micro_tuned"),
    ("F1 macro*", "F1_macro_tuned"),
    ("P@5", "P@5"),
    ("R@5", "R@5"),
)
COSTS = (
    ("train", "train_s", "{:.1f} s"),
    ("query", "query_latency_ms", "{:.2f} ms"),
    ("index", "index_bytes", "{:,.0f} B"),
)
READING = (
    "Means over seeds, ± their standard deviation; in brackets the 95% bootstrap interval over test images, its ends"
    " averaged over seeds. Bold: the best of its column, where the paired 95% interval of its difference to every other"
    " line leaves out 0; that covers the images drawn and not the seeds, so read it beside the ±. * at the one"
    " threshold that is best on val."
)


def arms_table(
    name: str, title: str, arms: Sequence[Arm], pairs: Pairs, *, first: str, commands: tuple[str, ...]
) -> Table:
    """One line an arm; figures, spread and cost."""
    best = {key: best_of(arms, key, pairs) for _, key in SHOWN if key in FIGURES}
    costs = [cost for cost in COSTS if any(arm.values(cost[1]) for arm in arms)]
    columns = (
        Column(title=first, numeric=False), Column(title="seeds"), *(Column(title=shown) for shown, _ in SHOWN),
        *(Column(title=shown) for shown, _, _ in costs),
    )  # fmt: skip
    rows = [
        (
            Cell(text=arm.name), number(float(len(arm.samples)), "{:.0f}"),
            *(_figure(arm, key, bold=best.get(key) is arm) for _, key in SHOWN),
            *(number(arm.mean(key), form) for _, key, form in costs),
        )
        for arm in arms
    ]  # fmt: skip
    notes = [f"{arm.name}: {arm.note}." for arm in arms if arm.note]
    if any(arm.precision for arm in arms):
        notes.append(TWO_PRECISIONS)
    ceilings = [f"{key} {value:.3f}" for key in ("P@5", "R@5") if (value := _ceiling(arms, key)) is not None]
    if ceilings:
        notes.append(f"Ceilings on these images: {', '.join(ceilings)}.")
    return Table(name=name, title=title, columns=columns, rows=tuple(rows), note=" ".join(notes), commands=commands)


def experiment_tables(inputs: Inputs, pairs: Pairs, titles: Mapping[str, str]) -> list[Table]:
    """A table for each experiment that has rows, the base apart."""
    names = dict.fromkeys(row["experiment"] for row in inputs.rows)
    found = []
    for name in names:
        if name == "base":
            continue
        varies = next(row["varies"] for row in inputs.rows if row["experiment"] == name)
        title = f"{name}: {titles.get(name, varies)}"
        command = inputs.ablate(name, seeds=_seeds(inputs, name))
        found.append(
            arms_table(f"table-{name}", title, inputs.arms(name), pairs, first=varies or "value", commands=(command,))
        )
    return found


def base_arms(inputs: Inputs) -> list[Arm]:
    """The base methods: of the experiments where they were made, else every method of every run below ``runs``."""
    arms = [arm for arm in inputs.arms("base") if arm.samples]
    return arms or run_arms(inputs)


def run_arms(inputs: Inputs) -> list[Arm]:
    """Every method of every run below ``runs`` itself, on test."""
    return [
        arm_of(known, row, row["method"] if name == row["method"] else f"{name}, {row['method']}")
        for name, known in list(inputs.runs.items())[: inputs.own]
        for row in known.rows
        if row.get("mAP") is not None
    ]


def class_table(depth: Depth) -> Table:
    """A line a class: AP, precision, recall and F1 of the neighbours at the tuned threshold, AP of the classifier."""
    of_votes = per_class(depth.scores, depth.query.labels, threshold=depth.at)
    n_train = depth.base.labels.sum(axis=0)
    of_classifier = None if depth.classifier is None else per_class(depth.classifier, depth.query.labels, threshold=0.5)
    columns = [Column(title="class", numeric=False), *(Column(title=title) for title in (
        "in train", "in test", "AP", "precision", "recall", "F1", "predicted"))]  # fmt: skip
    if of_classifier is not None:
        columns.append(Column(title="AP classifier"))
    rows = []
    for c, name in enumerate(depth.names):
        cells = [
            Cell(text=name), number(float(n_train[c]), "{:,.0f}"), number(of_votes["n_positive"][c], "{:,.0f}"),
            *(number(float(of_votes[key][c])) for key in ("AP", "precision", "recall", "F1")),
            number(of_votes["n_predicted"][c], "{:,.0f}"),
        ]  # fmt: skip
        if of_classifier is not None:
            cells.append(number(float(of_classifier["AP"][c])))
        rows.append((float(of_votes["AP"][c]), tuple(cells)))
    rows.sort(key=lambda row: (np.isnan(row[0]), row[0]))
    note = (
        f"Neighbours of {depth.known.run.folder.name} on the test images, at the threshold {depth.at:.3f}"
        f" {'that is best on val' if depth.threshold is not None else '(no val image has a label)'}."
    )
    return Table(
        name="table-classes", title="Every class", columns=tuple(columns), rows=tuple(cells for _, cells in rows),
        note=note,
    )  # fmt: skip


def confusion_table(depth: Depth, most: int = 15) -> Table | None:
    """Classes that are missed while another is predicted wrongly, on the same image; the most frequent pairs."""
    y, predicted = depth.query.labels.astype(bool), depth.scores >= depth.at
    missed, wrong = y & ~predicted, predicted & ~y
    counts = missed.T.astype(np.int64) @ wrong.astype(np.int64)
    expected = missed.sum(0)[:, None] * wrong.sum(0)[None, :] / max(1, len(y))
    order = np.argsort(-counts, axis=None, kind="stable")[:most]
    rows = []
    for at in order:
        c, d = np.unravel_index(at, counts.shape)
        if not counts[c, d]:
            break
        rows.append((
            Cell(text=depth.names[c]), Cell(text=depth.names[d]), number(float(counts[c, d]), "{:,.0f}"),
            number(float(missed[:, c].sum()), "{:,.0f}"), number(counts[c, d] / expected[c, d], "{:.1f} ×"),
        ))  # fmt: skip
    if not rows:
        return None
    columns = (
        Column(title="missed", numeric=False), Column(title="predicted instead", numeric=False),
        Column(title="images"), Column(title="missed in all"), Column(title="over chance"),
    )  # fmt: skip
    note = (
        "An image counts for every pair of a tag that it lacks and a wrong one that it got. Over chance: how many times"
        " as often as if misses and wrong tags fell on images independently."
    )
    return Table(
        name="table-confusions", title="Classes most confused", columns=columns, rows=tuple(rows), note=note
    )  # fmt: skip


def _figure(arm: Arm, key: str, *, bold: bool) -> Cell:
    value = arm.mean(key)
    if value is None:
        return Cell(text="–")
    spread, ends = arm.spread(key), arm.ends(key) if key == "mAP" else None
    text = f"{value:.3f}" + (f" ±{spread:.3f}" if spread is not None else "")
    return Cell(text=text, detail=f"[{ends[0]:.3f}, {ends[1]:.3f}]" if ends else "", bold=bold, sort=value)


def _ceiling(arms: Sequence[Arm], key: str) -> float | None:
    return next((value for arm in arms if (value := arm.mean(f"{key}_ceiling")) is not None), None)


def _seeds(inputs: Inputs, name: str) -> int:
    return len({row["seed"] for row in inputs.rows if row["experiment"] == name})

"""The tables of a report: methods, experiments, runs, classes."""

from collections.abc import Mapping, Sequence

import numpy as np

from ...heads.metrics import per_class
from ...heads.ranking import average_precision
from ..core.metrics_file import TWO_PRECISIONS
from ..evaluation.compare import ARM_FIGURES, Arm, Pairs, best_of
from .document import Cell, ClassFailures, Column, Pictures, Query, Shown, Table, Tag, number
from .inputs import NEIGHBOURS_SHOWN, Depth, Inputs, arm_of

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
    best = {key: best_of(arms, key, pairs) for _, key in SHOWN if key in ARM_FIGURES}
    costs = [cost for cost in COSTS if any(arm.values(cost[1]) for arm in arms)]
    columns = (
        Column(title=first, numeric=False),
        Column(title="seeds"),
        *(Column(title=shown) for shown, _ in SHOWN),
        *(Column(title=shown) for shown, _, _ in costs),
    )
    rows = [
        (
            Cell(text=arm.name),
            number(float(len(arm.samples)), "{:.0f}"),
            *(_figure(arm, key, bold=best.get(key) is arm) for _, key in SHOWN),
            *(number(arm.mean(key), form) for _, key, form in costs),
        )
        for arm in arms
    ]
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
    columns = [
        Column(title="class", numeric=False),
        *(Column(title=title) for title in ("in train", "in test", "AP", "precision", "recall", "F1", "predicted")),
    ]
    if of_classifier is not None:
        columns.append(Column(title="AP classifier"))
    rows = []
    for c, name in enumerate(depth.names):
        cells = [
            Cell(text=name),
            number(float(n_train[c]), "{:,.0f}"),
            number(of_votes["n_positive"][c], "{:,.0f}"),
            *(number(float(of_votes[key][c])) for key in ("AP", "precision", "recall", "F1")),
            number(of_votes["n_predicted"][c], "{:,.0f}"),
        ]
        if of_classifier is not None:
            cells.append(number(float(of_classifier["AP"][c])))
        rows.append((float(of_votes["AP"][c]), tuple(cells)))
    rows.sort(key=lambda row: (np.isnan(row[0]), row[0]))
    note = (
        f"Neighbours of {depth.known.run.folder.name} on the test images, at the threshold {depth.at:.3f}"
        f" {'that is best on val' if depth.threshold is not None else '(no val image has a label)'}."
    )
    return Table(
        name="table-classes",
        title="Every class",
        columns=tuple(columns),
        rows=tuple(cells for _, cells in rows),
        note=note,
    )


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
        rows.append(
            (
                Cell(text=depth.names[c]),
                Cell(text=depth.names[d]),
                number(float(counts[c, d]), "{:,.0f}"),
                number(float(missed[:, c].sum()), "{:,.0f}"),
                number(counts[c, d] / expected[c, d], "{:.1f} ×"),
            )
        )
    if not rows:
        return None
    columns = (
        Column(title="missed", numeric=False),
        Column(title="predicted instead", numeric=False),
        Column(title="images"),
        Column(title="missed in all"),
        Column(title="over chance"),
    )
    note = (
        "An image counts for every pair of a tag that it lacks and a wrong one that it got. Over chance: how many times"
        " as often as if misses and wrong tags fell on images independently."
    )
    return Table(name="table-confusions", title="Classes most confused", columns=columns, rows=tuple(rows), note=note)


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


QUERIES = 12
MOST_CLASSES, MOST_IMAGES, FEW_IMAGES, OPEN = 80, 4, 2, 20
QUERY_SIDE, NEIGHBOUR_SIDE, FAILURE_SIDE = 320, 176, 136


def queries(depth: Depth, pictures: Pictures, n: int = QUERIES) -> tuple[Query, ...]:
    """Queries at even steps of the ranking by AP, so that nobody picks the good ones."""
    ranked = np.argsort(-np.where(np.isnan(depth.AP), -1.0, depth.AP), kind="stable")
    ranked = ranked[: int((~np.isnan(depth.AP)).sum())]
    if not len(ranked):
        return ()
    places = np.unique(np.linspace(0, len(ranked) - 1, min(n, len(ranked))).round().astype(int))
    return tuple(_query(depth, pictures, int(ranked[place])) for place in places)


def failures(depth: Depth, pictures: Pictures) -> tuple[ClassFailures, ...]:
    """The surest wrong tags and the least sure missed ones of every class; more of the classes with the lowest AP."""
    AP = average_precision(depth.scores, depth.query.labels)
    order = [int(c) for c in np.argsort(AP, kind="stable") if not np.isnan(AP[c])]
    return tuple(
        _failures(depth, pictures, c, float(AP[c]), MOST_IMAGES if at < OPEN else FEW_IMAGES)
        for at, c in enumerate(order[:MOST_CLASSES])
    )


def _query(depth: Depth, pictures: Pictures, row: int) -> Query:
    image = int(depth.query.image_id[row])
    truth = depth.query.labels[row].astype(bool)
    near = []
    for at in range(min(NEIGHBOURS_SHOWN, depth.neighbours.shape[1])):
        other = int(depth.neighbours[row, at])
        number = int(depth.base.image_id[other])
        tags = tuple(
            Tag(name=depth.names[c], state="right" if truth[c] else "wrong")
            for c in np.flatnonzero(depth.base.labels[other])
        )
        near.append(
            Shown(
                image_id=number,
                picture=pictures.picture(number, NEIGHBOUR_SIDE),
                caption=pictures.caption(number),
                tags=tags,
                share=float(depth.weight[row, at]),
                distance=_distance(depth, row, at),
            )
        )
    shown = Shown(
        image_id=image,
        picture=pictures.picture(image, QUERY_SIDE),
        caption=pictures.caption(image),
        tags=_tags(depth, row),
    )
    return Query(image=shown, AP=float(depth.AP[row]), neighbours=tuple(near))


def _distance(depth: Depth, row: int, at: int) -> str:
    value = depth.distance[row, at]
    if depth.knn.distance_metric != "hamming":
        return f"{value:.3f} away"
    return f"{value:.0f} bit{'' if value == 1 else 's'}"


def _tags(depth: Depth, row: int) -> tuple[Tag, ...]:
    """Predicted tags by score, then those that were missed."""
    scores, truth = depth.scores[row], depth.query.labels[row].astype(bool)
    states = np.where(scores >= depth.at, np.where(truth, "right", "wrong"), np.where(truth, "missed", ""))
    shown = sorted(np.flatnonzero(states != ""), key=lambda c: (states[c] == "missed", -scores[c]))
    return tuple(Tag(name=depth.names[c], state=str(states[c]), score=float(scores[c])) for c in shown)


def _failures(depth: Depth, pictures: Pictures, c: int, AP: float, most: int) -> ClassFailures:
    scores, truth = depth.scores[:, c], depth.query.labels[:, c].astype(bool)
    predicted = scores >= depth.at
    wrong, missed = np.flatnonzero(predicted & ~truth), np.flatnonzero(~predicted & truth)
    surest = wrong[np.argsort(-scores[wrong], kind="stable")][:most]
    least = missed[np.argsort(scores[missed], kind="stable")][:most]
    return ClassFailures(
        category=depth.names[c],
        AP=AP,
        n_positive=int(truth.sum()),
        n_false_positive=len(wrong),
        n_false_negative=len(missed),
        false_positives=tuple(_shown(depth, pictures, int(row), c) for row in surest),
        false_negatives=tuple(_shown(depth, pictures, int(row), c) for row in least),
    )


def _shown(depth: Depth, pictures: Pictures, row: int, c: int) -> Shown:
    image = int(depth.query.image_id[row])
    tags = tuple(Tag(name=depth.names[k], state="right") for k in np.flatnonzero(depth.query.labels[row]))
    return Shown(
        image_id=image,
        picture=pictures.picture(image, FAILURE_SIDE),
        caption=pictures.caption(image),
        tags=tags,
        share=float(depth.scores[row, c]),
    )

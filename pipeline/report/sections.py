"""Compare, part five: the sections of a report in reading order, the answers first, the commands last."""

import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from ...heads.config import VOTE_PARAMETER
from ..core.metrics_file import TWO_PRECISIONS
from ..evaluation.compare import Pairs
from .analysis import RunAnalysis, class_table, confusion_table, failures, queries
from .answers import NO_CODES, answers, comparison_table
from .collect import FinishedRun, Inputs
from .document import Answer, Block, Commands, Document, Section, Text
from .figures import (
    COSTS,
    SETTINGS,
    bit_balance,
    bit_correlation,
    calibration,
    class_scatter,
    loss_terms,
    norms,
    quality_by_cost,
    quality_by_setting,
    threshold_curves,
    val_curves,
)
from .tables import READING, arms_by_hand, arms_table, experiment_tables

TITLE = "Multi-label tagging with learned hash codes"
# Names and titles of the sections in their order.
SECTIONS = {
    "answers": "Answers",
    "methods": "Methods",
    "experiments": "Experiments",
    "curves": "Learning curves",
    "classes": "Classes",
    "costs": "Quality against cost",
    "inside": "Bits, magnitudes, thresholds",
    "queries": "Queries and their neighbours",
    "failures": "Failures",
    "again": "How to make it again",
}
MANY_IMAGES = 1000  # below so many test images a note says how little their differences show
ALL = ("base", "A1", "A2", "A3", "M1", "M2", "C1", "C2", "C3", "C4")
NO_PICTURES = Text(
    text="No data folder was found, so there are neither pictures nor captions", command="mmcli report --data DIR"
)


def build(inputs: Inputs, analysis: RunAnalysis | None, *, command: str, with_images: bool = True) -> Document:
    """Compare everything and lay it out.

    Args:
        inputs: All that was read.
        analysis: The run that is looked into; None where no run keeps codes.
        command: The command that makes this report.
        with_images: Include figures and images; without them only answers, tables and commands are made.
    """
    pairs = Pairs()
    every = answers(inputs, analysis, pairs)
    blocks: dict[str, tuple[Block, ...]] = {
        "answers": (*every, _about(every)),
        "methods": _methods(inputs, pairs),
        "experiments": _experiments(inputs, pairs),
        "classes": (NO_CODES,) if analysis is None else _classes(analysis, with_figure=with_images),
        "again": _again(inputs, analysis, command, with_config=with_images),
    }
    if with_images:
        blocks |= {"curves": _curves(inputs, analysis), "costs": _costs(inputs)}
        for name, of_run in {"inside": _inside, "queries": _queries, "failures": _failures}.items():
            blocks[name] = (NO_CODES,) if analysis is None else of_run(analysis, inputs)
    commands: tuple[str, ...] = ()
    if analysis is not None:
        named = "" if "--run " in command else f" --run {shlex.quote(analysis.run.folder.as_posix())}"
        commands = (command + named,)
    return Document(
        title=TITLE,
        subtitle=_subtitle(inputs, analysis),
        facts=_facts(inputs, analysis),
        notes=_notes(inputs, analysis, command),
        sections=tuple(
            Section(name=name, title=SECTIONS[name], blocks=blocks[name]) for name in SECTIONS if name in blocks
        ),
        summary=comparison_table(
            "table-answers",
            "Answers",
            [c for answer in every for c in answer.comparisons if c.unit == "mAP"],
            note="mAP; paired 95% bootstrap intervals over test images, not corrected for their number",
        ),
        commands=commands,
        pictures=inputs.pictures,
    )


def _subtitle(inputs: Inputs, analysis: RunAnalysis | None) -> str:
    n_seeds = len({row["seed"] for row in inputs.rows})
    rows = f"{len(inputs.rows)} rows of experiments over {n_seeds} seeds" if inputs.rows else "no experiments yet"
    chosen = "" if analysis is None else f"; images, bits and classes of the run {analysis.name}"
    return f"{_count(len(inputs.runs), 'run')}, {rows}{chosen}."


def _notes(inputs: Inputs, analysis: RunAnalysis | None, command: str) -> tuple[str, ...]:
    """What a reader has to know before the numbers."""
    notes = [f"Written by `{command}`, never by hand."]
    if analysis is not None and len(analysis.query) < MANY_IMAGES:
        notes.append(
            f"With {len(analysis.query):,} test images most differences cannot be told, and what is told holds for"
            " these data: they show that the pipeline and its statistics work, not how good the method is on COCO."
        )
    infos = [run.info for run in inputs.runs.values()]
    n_sets = len({info.manifest_sha256 for info in infos})
    if n_sets > 1:
        notes.append(f"The runs are of {n_sets} data sets: lines of different ones are not comparable.")
    precisions = sorted({info.precision for info in infos if info.precision})
    if len(precisions) > 1:
        notes.append(f"The runs were computed in {' and '.join(precisions)}. {TWO_PRECISIONS}")
    return tuple(notes)


def _facts(inputs: Inputs, analysis: RunAnalysis | None) -> tuple[tuple[str, str], ...]:
    facts = {} if inputs.manifest is None else {"Data": inputs.manifest.name}
    if analysis is not None:
        facts |= {
            "Voting images": f"{len(analysis.base):,}",
            "Test images": f"{len(analysis.query):,}",
            "Classes": str(len(analysis.class_names)),
            "Encoder": analysis.run.info.model,
            "Preset": analysis.run.info.preset,
        }
    return tuple(facts.items())


def _about(every: Sequence[Answer]) -> Text:
    """How the answers are to be read."""
    n = sum(c.p is not None for answer in every for c in answer.comparisons)
    text = (
        "Every difference is paired over the test images: 1,000 bootstrap resamples, the same images for both sides and"
        " for every seed, figures averaged over seeds. The verdict is what the 95% interval alone says. The interval"
        " covers the draw of the images, not that of the seeds, whose standard deviation stands beside it."
        f" {_count(n, 'comparison')} of mAP {'is' if n == 1 else 'are'} made here, and intervals are not corrected for"
        " their number; p after Holm's correction stands beside them."
    )
    return Text(text=text)


def _methods(inputs: Inputs, pairs: Pairs) -> tuple[Block, ...]:
    has_base = "base" in inputs.experiments
    by_hand = arms_by_hand(inputs)
    arms = [arm for arm in inputs.arms("base") if arm.samples] or by_hand
    blocks: list[Block] = []
    if arms:
        commands = (inputs.ablate("base"),) if has_base else ("mmcli zero-shot", "mmcli train-head", "mmcli knn-eval")
        blocks.append(arms_table("table-methods", "Base methods", arms, pairs, first="method", commands=commands))
        text = f"{READING} Times are of the machine of the runs; `mmcli bench knn` measures with care."
        blocks.append(Text(text=text))
    if has_base and by_hand:
        blocks.append(arms_table("table-runs", "Runs made by hand", by_hand, pairs, first="run, method"))
    if not has_base:
        blocks.append(Text(text="Prior, MLP and direction only were not run", command=inputs.ablate("base")))
    text = (
        "Captions name the objects: published COCO-80 tables use the image alone, and are not to be set beside"
        " figures that were made with captions."
    )
    return (*blocks, Text(text=text))


def _experiments(inputs: Inputs, pairs: Pairs) -> tuple[Block, ...]:
    blocks: list[Block] = list(experiment_tables(inputs, pairs))
    if blocks:
        blocks.insert(0, Text(text="One thing is varied at a time, from the base configuration. " + READING))
    missing = [name for name in ALL if name not in inputs.experiments]
    if missing:
        blocks.append(Text(text=f"Not made: {', '.join(missing)}", command=inputs.ablate(*missing)))
    return tuple(blocks)


def _curves(inputs: Inputs, analysis: RunAnalysis | None) -> tuple[Block, ...]:
    groups: dict[str, list[Sequence[Mapping[str, Any]]]] = {}
    for arm in inputs.arms("base"):
        for row in arm.rows:
            run = inputs.runs.get(str(row.get("run") or "").rsplit("/", 1)[-1])
            if run is not None and run.history:
                groups.setdefault(arm.name, []).append(run.history)
    groups = groups or {name: [run.history] for name, run in inputs.runs.items() if run.history}
    terms = None if analysis is None else loss_terms(analysis.run.history, f"Run {analysis.name}.")
    return _present(terms, val_curves(groups)) or (Text(text="No run was trained", command="mmcli train-head"),)


def _classes(analysis: RunAnalysis, *, with_figure: bool) -> tuple[Block, ...]:
    figure = class_scatter(analysis) if with_figure else None
    return _present(figure, class_table(analysis), confusion_table(analysis))


def _costs(inputs: Inputs) -> tuple[Block, ...]:
    missing = [name for name in ("A2", "C1", "C2") if not inputs.arms(name)]
    gap = Text(text="Bits, K and distances were not varied", command=inputs.ablate(*(missing or ALL)))
    settings = [quality_by_setting(inputs, setting) for setting in SETTINGS]
    costs = [quality_by_cost(inputs, cost) for cost in COSTS]
    return _present(*settings, *costs, gap if missing else None)


def _inside(analysis: RunAnalysis, _: Inputs) -> tuple[Block, ...]:
    text = f"Norms are not kept in {analysis.name}, which an earlier version trained"
    return _present(
        bit_balance(analysis),
        bit_correlation(analysis),
        norms(analysis),
        calibration(analysis),
        threshold_curves(analysis, method="neighbours"),
        threshold_curves(analysis, method="classifier"),
        Text(text=text, command="mmcli train-head") if analysis.query.norm_img is None else None,
    )


def _queries(analysis: RunAnalysis, inputs: Inputs) -> tuple[Block, ...]:
    knn = analysis.knn
    parameter = VOTE_PARAMETER.get(knn.voting_strategy)
    setting = "" if parameter is None else f", {parameter} {getattr(knn, parameter):g}"
    text = (
        "Test images at even steps from the best tagged to the worst, by AP of the image, with their nine nearest of"
        f" the {knn.K} neighbours that vote ({knn.distance_metric}, {knn.voting_strategy}{setting}), and each one's"
        f" share of the vote. A tag is predicted from {analysis.decision_threshold:.3f} on. A neighbour's tag is marked"
        " by whether the query has it."
    )
    return _present(None if inputs.pictures else NO_PICTURES, Text(text=text), *queries(analysis))


def _failures(analysis: RunAnalysis, inputs: Inputs) -> tuple[Block, ...]:
    text = (
        "By class, the lowest AP first: images with the surest wrong tags and those with the least sure missed ones,"
        " with the score of the class and the tags that the image has."
    )
    return _present(None if inputs.pictures else NO_PICTURES, Text(text=text), *failures(analysis))


def _again(inputs: Inputs, analysis: RunAnalysis | None, command: str, *, with_config: bool) -> tuple[Block, ...]:
    blocks: list[Block] = [Commands(title="This report", lines=(command,))]
    if inputs.experiments:
        ablate = inputs.ablate(*inputs.experiments, seeds=len({row["seed"] for row in inputs.rows}))
        blocks.append(Commands(title="Its experiments", lines=(ablate,)))
    if analysis is not None:
        blocks.append(Text(text=f"The run that is looked into is `{analysis.name}`: {analysis.reason}."))
        blocks.append(Commands(title="Its environment", lines=_environment(analysis.run)))
        if with_config:
            blocks.append(Commands(title="Its configuration", lines=tuple(analysis.run.config.splitlines())))
    if inputs.n_unfinished:
        blocks.append(Text(text=f"{_count(inputs.n_unfinished, 'folder')} with an unfinished or damaged run left out."))
    return tuple(blocks)


def _environment(run: FinishedRun) -> tuple[str, ...]:
    record, info = run.environment, run.info
    git = record.get("git") or {}
    lines = [
        f"mmcli {record.get('mmcli', '?')}, Python {record.get('python', '?')}, {record.get('platform', '?')}",
        f"device {record.get('device', '?')}, {info.precision or 'precision unknown'}",
        f"{record.get('cpu_count', '?')} CPU cores, seed {record.get('seed', '?')}",
        ", ".join(f"{name} {version}" for name, version in (record.get("packages") or {}).items()),
        f"commit {git['commit']}{' with changes' if git.get('dirty') else ''}" if git.get("commit") else "",
        f"manifest {info.manifest_sha256[:16]}, store {info.store_digest[:16]}, {info.patches} patches",
    ]
    return tuple(line for line in lines if line)


def _present(*blocks: Block | None) -> tuple[Block, ...]:
    """The blocks that there is something to show in."""
    return tuple(block for block in blocks if block is not None)


def _count(n: int, what: str) -> str:
    return f"{n:,} {what}{'' if n == 1 else 's'}"

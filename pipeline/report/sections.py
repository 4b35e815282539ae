"""The sections of a report, in the order that they are read in: the answer first, how to make it again last."""

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from ..ablation.experiments import read_experiments
from ..core.metrics_file import TWO_PRECISIONS
from ..evaluation.compare import Pairs
from .answers import answers
from .document import Answers, Block, Commands, Document, Failures, Figure, Gap, Queries, Section, Table, Text
from .inputs import Depth, Inputs, Known
from .plots import Point, against, loss_terms, pareto, val_curves
from .plots_codes import bit_balance, bit_correlation, calibration, class_scatter, norms, threshold_curves
from .tables import (
    READING,
    arms_table,
    base_arms,
    class_table,
    confusion_table,
    experiment_tables,
    failures,
    queries,
    run_arms,
)

# Experiments whose values are set beside each other by cost, and what a legend and a point call them.
COSTED = {
    "A2": ("bits", "{} bits"),
    "C1": ("neighbours", "K {}"),
    "C2": ("distance", "{}"),
    "A3": ("predictor", "{}"),
    "base": ("baseline", "{}"),
}
FEW = 1000  # test images
ALL = ("base", "A1", "A2", "A3", "M1", "M2", "C1", "C2", "C3", "C4")


def build(inputs: Inputs, depth: Depth | None, *, command: str, pictures: bool = True) -> Document:
    """The whole report.

    Args:
        inputs: What was read.
        depth: The run that is looked into.
        command: That makes this report.
        pictures: Draw figures and show images; without them only answers and tables are made.
    """
    pairs = Pairs()
    sections = [
        _answers(inputs, depth, pairs),
        _methods(inputs, pairs),
        _experiments(inputs, pairs),
        *([_curves(inputs, depth)] if pictures else []),
        _classes(depth, figures=pictures),
        *([_costs(inputs), _inside(depth), _queries(depth, inputs), _failures(depth, inputs)] if pictures else []),
        _again(inputs, depth, command, whole=pictures),
    ]
    if depth is not None:
        again = command if "--run " in command else f"{command} --run {shlex.quote(depth.known.run.folder.as_posix())}"
        sections = [_made_by(section, again) for section in sections]
    return Document(
        title="Multi-label tagging with learned hash codes",
        subtitle=_subtitle(inputs, depth),
        facts=_facts(inputs, depth),
        notes=_notes(inputs, depth, command),
        sections=tuple(sections),
    )


def _made_by(section: Section, command: str) -> Section:
    """Figures and tables that no experiment makes come from the run that is looked into."""
    blocks = [
        replace(block, commands=(command,)) if isinstance(block, Figure | Table) and not block.commands else block
        for block in section.blocks
    ]
    return replace(section, blocks=tuple(blocks))


def _subtitle(inputs: Inputs, depth: Depth | None) -> str:
    seeds = {row["seed"] for row in inputs.rows}
    rows = f"{len(inputs.rows)} rows of experiments over {len(seeds)} seeds" if inputs.rows else "no experiments yet"
    looked = "" if depth is None else f"; images, bits and classes of the run {depth.known.run.folder.name}"
    return f"{_count(len(inputs.runs), 'run')}, {rows}{looked}."


def _notes(inputs: Inputs, depth: Depth | None, command: str) -> tuple[str, ...]:
    """What has to be known before the figures are read."""
    found = [f"Written by `{command}`, never by hand."]
    if depth is not None and len(depth.query) < FEW:
        found.append(
            f"With {len(depth.query):,} test images most differences cannot be told, and what is told holds for these"
            " data: they show that the pipeline and its statistics work, not how good the method is on COCO."
        )
    sets = {known.run.info.manifest_sha256 for known in inputs.runs.values()}
    if len(sets) > 1:
        found.append(f"The runs are of {len(sets)} data sets: lines of different ones are not comparable.")
    precisions = sorted({known.run.info.precision for known in inputs.runs.values() if known.run.info.precision})
    if len(precisions) > 1:
        found.append(f"The runs were computed in {' and '.join(precisions)}. {TWO_PRECISIONS}")
    return tuple(found)


def _facts(inputs: Inputs, depth: Depth | None) -> tuple[tuple[str, str], ...]:
    found: list[tuple[str, str]] = []
    if inputs.listing is not None:
        found.append(("Data", inputs.listing.name))
    if depth is not None:
        info = depth.known.run.info
        found += [
            ("Voting images", f"{len(depth.base):,}"),
            ("Test images", f"{len(depth.query):,}"),
            ("Classes", str(len(depth.names))),
            ("Encoder", info.model),
            ("Preset", info.preset),
        ]
    return tuple(found)


def _answers(inputs: Inputs, depth: Depth | None, pairs: Pairs) -> Section:
    found = answers(inputs, depth, pairs)
    n = sum(c.p is not None for one in found for c in one.comparisons)
    text = (
        "Every difference is paired over the test images: 1,000 bootstrap resamples, the same images for both sides and"
        " for every seed, figures averaged over seeds. The verdict is what the 95% interval alone says. The interval"
        " covers the draw of the images, not that of the seeds, whose standard deviation stands beside it."
        f" {_count(n, 'comparison')} of mAP {'is' if n == 1 else 'are'} made here, and intervals are not corrected for"
        " their number; p after Holm's correction stands beside them."
    )
    return Section(name="answers", title="Answers", blocks=(Answers(answers=found), Text(text=text)))


def _methods(inputs: Inputs, pairs: Pairs) -> Section:
    arms = base_arms(inputs)
    blocks: list[Block] = []
    has_base = any(row["experiment"] == "base" for row in inputs.rows)
    if arms:
        made = (inputs.ablate("base"),) if has_base else ("mmcli zero-shot", "mmcli train-head", "mmcli knn-eval")
        blocks.append(arms_table("table-methods", "Base methods", arms, pairs, first="method", commands=made))
        blocks.append(
            Text(text=f"{READING} Times are of the machine of the runs; `mmcli bench knn` measures with care.")
        )
    own = run_arms(inputs) if has_base else []
    if own:
        blocks.append(arms_table("table-runs", "Runs made by hand", own, pairs, first="run, method", commands=()))
    if not has_base:
        blocks.append(Gap(text="Prior, MLP and direction only were not run", command=inputs.ablate("base")))
    blocks.append(
        Text(
            text=(
                "Captions name the objects: published COCO-80 tables use the image alone, and are not to be set beside"
                " figures that were made with captions."
            )
        )
    )
    return Section(name="methods", title="Methods", blocks=tuple(blocks))


def _experiments(inputs: Inputs, pairs: Pairs) -> Section:
    titles = {name: one.title for name, one in read_experiments().items()} if inputs.rows else {}
    tables = experiment_tables(inputs, pairs, titles)
    missing = [name for name in ALL if name not in {row["experiment"] for row in inputs.rows}]
    blocks: list[Block] = [
        *([Text(text="One thing is varied at a time, from the base configuration. " + READING)] if tables else []),
        *tables,
    ]
    if missing:
        blocks.append(Gap(text=f"Not made: {', '.join(missing)}", command=inputs.ablate(*missing)))
    return Section(name="experiments", title="Experiments", blocks=tuple(blocks))


def _curves(inputs: Inputs, depth: Depth | None) -> Section:
    groups: dict[str, list[Sequence[Mapping[str, Any]]]] = {}
    for arm in inputs.arms("base") or []:
        for sample in arm.samples:
            known = inputs.runs.get(str(sample.row.get("run") or "").rsplit("/", 1)[-1])
            if known is not None and known.history:
                groups.setdefault(arm.name, []).append(known.history)
    if not groups:
        groups = {name: [known.history] for name, known in inputs.runs.items() if known.history}
    found: list[Figure | None] = [val_curves(groups, ("mmcli train-head",))]
    if depth is not None:
        found.insert(0, loss_terms(depth.known.history, f"Run {depth.known.run.folder.name}."))
    return _section("curves", "Learning curves", found, Gap(text="No run was trained", command="mmcli train-head"))


def _classes(depth: Depth | None, *, figures: bool) -> Section:
    if depth is None:
        return Section(name="classes", title="Classes", blocks=(_no_codes(),))
    confusions = confusion_table(depth)
    figure = class_scatter(depth) if figures else None
    blocks = [block for block in (figure, class_table(depth), confusions) if block is not None]
    return Section(name="classes", title="Classes", blocks=tuple(blocks))


def _costs(inputs: Inputs) -> Section:
    found = [
        against(
            "bits",
            "mAP against bits",
            inputs.arms("A2"),
            setting="bits (0: no hash layer, cosine)",
            caption="What a shorter code costs.",
            commands=(inputs.ablate("A2"),),
        ),
        against(
            "neighbours",
            "mAP against K",
            inputs.arms("C1"),
            setting="neighbours that vote, K",
            caption="How many neighbours should vote.",
            commands=(inputs.ablate("C1"),),
        ),
        pareto(
            "latency",
            "Latency against mAP",
            points(inputs, "query_latency_ms_p50"),
            cost="median time of a query, ms",
            commands=(inputs.ablate("A2", "C1", "C2"),),
            caption="Search and vote of one query, on the machine of the runs. The line joins what nothing else"
            " beats in both.",
        ),
        pareto(
            "bytes",
            "Bytes against mAP",
            points(inputs, "index_bytes"),
            cost="bytes of the index",
            caption="What the index keeps in memory. The line joins what nothing else beats in both.",
            commands=(inputs.ablate("A2", "C2"),),
        ),
    ]
    missing = [name for name in ("A2", "C1", "C2") if not inputs.arms(name)]
    gap = Gap(text="Bits, K and distances were not varied", command=inputs.ablate(*(missing or ALL)))
    return _section("costs", "Quality against cost", found, gap if missing else None)


def _inside(depth: Depth | None) -> Section:
    if depth is None:
        return Section(name="inside", title="Bits, magnitudes, thresholds", blocks=(_no_codes(),))
    gap = None
    if depth.query.norm_img is None:
        run = depth.known.run.folder.name
        gap = Gap(text=f"Norms are not kept in {run}, which an earlier version trained", command="mmcli train-head")
    found = [
        bit_balance(depth),
        bit_correlation(depth),
        norms(depth),
        calibration(depth),
        threshold_curves(depth, method="neighbours"),
        threshold_curves(depth, method="classifier"),
    ]
    return _section("inside", "Bits, magnitudes, thresholds", found, gap)


def _queries(depth: Depth | None, inputs: Inputs) -> Section:
    if depth is None:
        return Section(name="queries", title="Queries and their neighbours", blocks=(_no_codes(),))
    knn = depth.knn
    text = (
        "Test images at even steps from the best tagged to the worst, by AP of the image, with their nine nearest of"
        f" the {knn.K} neighbours that vote ({knn.distance_metric}, {knn.voting_strategy}"
        f"{f', tau {knn.tau:g}' if knn.voting_strategy == 'softmax' else ''}), and each one's share of the vote. A tag"
        f" is predicted from {depth.at:.3f} on. A neighbour's tag is marked by whether the query has it."
    )
    blocks: tuple[Block, ...] = (Text(text=text), Queries(queries=queries(depth, inputs.pictures)))
    if not inputs.pictures:
        blocks = (_no_pictures(), *blocks)
    return Section(name="queries", title="Queries and their neighbours", blocks=blocks)


def _failures(depth: Depth | None, inputs: Inputs) -> Section:
    if depth is None:
        return Section(name="failures", title="Failures", blocks=(_no_codes(),))
    text = (
        "By class, the lowest AP first: images with the surest wrong tags and those with the least sure missed ones,"
        " with the score of the class and the tags that the image has."
    )
    blocks: tuple[Block, ...] = (Text(text=text), Failures(classes=failures(depth, inputs.pictures)))
    if not inputs.pictures:
        blocks = (_no_pictures(), *blocks)
    return Section(name="failures", title="Failures", blocks=blocks)


def _again(inputs: Inputs, depth: Depth | None, command: str, *, whole: bool) -> Section:
    blocks: list[Block] = [Commands(title="This report", lines=(command,))]
    made = list(dict.fromkeys(row["experiment"] for row in inputs.rows))
    if made:
        seeds = len({row["seed"] for row in inputs.rows})
        blocks.append(Commands(title="Its experiments", lines=(inputs.ablate(*made, seeds=seeds),)))
    if depth is not None:
        blocks.append(Text(text=f"The run that is looked into is `{depth.known.run.folder.name}`: {depth.why}."))
        blocks.append(Commands(title="Its environment", lines=_environment(depth.known)))
        if whole:
            blocks.append(Commands(title="Its configuration", lines=tuple(depth.known.config.splitlines())))
    if inputs.n_unfinished:
        blocks.append(Text(text=f"{_count(inputs.n_unfinished, 'folder')} with an unfinished or damaged run left out."))
    return Section(name="again", title="How to make it again", blocks=tuple(blocks))


def points(inputs: Inputs, cost: str) -> list[Point]:
    """Configurations with a cost, each once: mean cost and mean mAP over seeds."""
    found: dict[tuple[str, ...], Point] = {}
    for experiment, (group, form) in COSTED.items():
        for arm in inputs.arms(experiment):
            x, y = arm.mean(cost), arm.mean("mAP")
            if x is not None and y is not None:
                key = tuple(str(sample.row.get("key")) for sample in arm.samples)
                found.setdefault(key, Point(name=form.format(arm.name), cost=x, mAP=y, group=group))
    return list(found.values())


def _environment(known: Known) -> tuple[str, ...]:
    found, info = known.environment, known.run.info
    packages = ", ".join(f"{name} {version}" for name, version in (found.get("packages") or {}).items())
    git = found.get("git") or {}
    lines = [
        f"mmcli {found.get('mmcli', '?')}, Python {found.get('python', '?')}, {found.get('platform', '?')}",
        f"device {found.get('device', '?')}, {info.precision or 'precision unknown'}",
        f"{found.get('cpu_count', '?')} CPU cores, seed {found.get('seed', '?')}",
        packages,
        f"commit {git['commit']}{' with changes' if git.get('dirty') else ''}" if git.get("commit") else "",
        f"manifest {info.manifest_sha256[:16]}, store {info.store_digest[:16]}, {info.patches} patches",
    ]
    return tuple(line for line in lines if line)


def _section(name: str, title: str, found: Sequence[Figure | None], gap: Gap | None) -> Section:
    figures = [figure for figure in found if figure is not None]
    blocks: list[Block] = [*figures, *([gap] if gap is not None and (name != "curves" or not figures) else [])]
    return Section(name=name, title=title, blocks=tuple(blocks))


def _no_codes() -> Gap:
    return Gap(text="No run keeps codes", command="mmcli train-head && mmcli knn-eval")


def _no_pictures() -> Gap:
    return Gap(
        text="No data folder was found, so there are neither pictures nor captions", command="mmcli report --data DIR"
    )


def _count(n: int, what: str) -> str:
    return f"{n:,} {what}{'' if n == 1 else 's'}"

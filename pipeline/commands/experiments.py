"""The commands over several runs: ablate, report, and samples of the data set."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from ..core.defaults import ABLATIONS, DATA, REPORT, RUNS
from .options import Engine, Force, Images, Output, Settings, Store, command, option


@dataclass(frozen=True, kw_only=True)
class Experiments:
    """Options that choose experiments and their rows."""

    names: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="EXPERIMENT...",
            help="A1 A2 A3 B1 B2 B3 B4 C1 C2 C3 C4 M0 M1 M2 base [default: those that need no images, where no --grid"
            " is given].",
            show_default=False,
        ),
    ] = None
    grid: Annotated[
        str | None,
        option("--grid FILE", "Every combination of a file's grid_search; plan is the experiment plan's.", "What"),
    ] = None
    file: Annotated[
        str, option("--experiments FILE", "Experiments and their values; miniature is for `mmcli demo`.", "What")
    ] = "experiments"
    set_values: Annotated[
        list[str] | None,
        option("--set-values ID=VALUE,..", "Other values of an experiment, as B3=36,64,100.", "What"),
    ] = None
    only: Annotated[
        list[str] | None,
        option(
            "--only KEY=VALUE,..",
            "Only rows with this: a key of the configuration, or an experiment's id; * matches anything.",
            "What",
        ),
    ] = None
    seeds: Annotated[int, option("--seeds N", "Rows of N seeds, from --seed on.", "Device and seed", min=1)] = 1


@dataclass(frozen=True, kw_only=True)
class Folders:
    """What experiments read, and where their rows go."""

    store: Store = None
    data: Annotated[Path, option("--data DIR", "Folder of the data set.", "Store and run")] = DATA
    out: Annotated[Path, option("--out DIR", "Folder of rows.parquet, scores and runs.", "Store and run")] = ABLATIONS
    force: Force = False


@command(
    "hardware.device",
    "hardware.seed",
    "preset",
    "model.siglip2_variant",
    defaults={"model.siglip2_variant": "the store's"},
)
def ablate(
    experiments: Experiments,
    engine: Engine,
    settings: Settings,
    output: Output,
    dry_run: Annotated[
        bool,
        option(
            "--dry-run",
            "List trainings and evaluations, what is shared, and about how long it takes; do nothing.",
            "How",
        ),
    ] = False,
    max_time: Annotated[
        str | None,
        option("--max-time TIME", "Begin nothing more after this, as 90m or 2h; the same command resumes.", "How"),
    ] = None,
    workers: Annotated[int, option("--workers", "Processes, each with its share of threads.", "How", min=1)] = 1,
    *,
    folders: Folders,
) -> None:
    """Experiments: train what they need once, evaluate the rest from it; one table of rows, resumable at any moment.

    A run below `runs` that was made by hand with the same configuration is used in the place of a new training.
    """
    from ..ablation.request import ConfigSource, Request, parse_duration
    from ..extraction.stores import find_store

    request = Request(
        names=tuple(experiments.names or ()),
        grid=experiments.grid,
        experiments=experiments.file,
        values=tuple(experiments.set_values or ()),
        only=tuple(experiments.only or ()),
        seeds=experiments.seeds,
        store=find_store(folders.store),
        source=ConfigSource(file=settings.file, options=settings.given, flags=settings.flags),
        out=folders.out,
        data=folders.data,
        force=folders.force,
        max_time=None if max_time is None else parse_duration(max_time),
        workers=workers,
        engine=engine.engine,
        address=engine.ray_address,
    )
    from ..ablation import ablate as stage

    result: Any = stage.dry_run(request) if dry_run else stage.ablate(request, output.progress)
    output.finish(result)
    if not dry_run and result.counted["failed"]:
        raise typer.Exit(1)


@dataclass(frozen=True, kw_only=True)
class Page:
    """What a report is made of, and what it writes."""

    runs: Annotated[Path, option("--runs DIR", "Folder of the runs.")] = RUNS
    ablations: Annotated[
        Path | None,
        option("--ablations DIR", "Folder of the experiments' rows.parquet [default: ablations below --runs]."),
    ] = None
    data: Annotated[
        Path | None, option("--data DIR", "Folder of the data set [default: data/coco, where there is one].")
    ] = None
    run: Annotated[
        Path | None,
        option(
            "--run DIR",
            "Run whose queries, curves, bits and classes are shown [default: the highest val mAP of those made by hand"
            " or of the full method].",
        ),
    ] = None
    out: Annotated[Path, option("--out DIR", "Folder to write: report.html, report.md, figures/, pictures/.")] = REPORT
    latex: Annotated[bool, option("--latex", "Write every table for LaTeX too, into tables/.")] = False
    markdown_only: Annotated[
        Path | None,
        option(
            "--markdown-only FILE",
            "Write this file alone: answers and tables as Markdown, without figures and pictures.",
        ),
    ] = None
    force: Force = False


@command()
def report(page: Page, output: Output) -> None:
    """One page of answers, tables, plots, queries and failures, from the files of runs and experiments."""
    from ..report.report import ReportPlan
    from ..report.report import report as stage

    output.finish(stage(ReportPlan(**vars(page)), output.progress))


@command("hardware.seed", file=False)
def samples(
    settings: Settings,
    images: Images,
    output: Output,
    n: Annotated[int, option("--n", "Images on the sheet.", min=1, max=100)] = 16,
    split: Annotated[str | None, option("--split", "train, val or test [default: all].")] = None,
    out: Annotated[Path, option("--out FILE", "Picture to write, a .png.")] = Path("samples.png"),
    force: Force = False,
) -> None:
    """A sheet of random samples of a manifest with their tags and captions: a look at the data before any training."""
    from ..report.samples import samples as stage

    seed = settings.load().hardware.seed
    output.finish(stage(images.folder, n=n, split=split, seed=seed, out=out, force=force))

"""The commands that show what was made: report and samples."""

from pathlib import Path
from typing import Annotated

import typer

from .options import FollowLinks, Force, Json, Quiet, Seed, data_folder, finish, make_progress

NamedData = Annotated[
    Path | None,
    typer.Option("--data", metavar="DIR", help="Folder of the data set [default: data/coco, where it is there]."),
]


def report(
    runs: Annotated[Path, typer.Option("--runs", metavar="DIR", help="Folder of the runs.")] = Path("runs"),
    ablations: Annotated[Path | None, typer.Option("--ablations", metavar="DIR", help="Folder of the experiments' rows.parquet [default: ablations below --runs].")] = None,
    data: NamedData = None,
    run: Annotated[Path | None, typer.Option("--run", metavar="DIR", help="Run whose queries, curves, bits and classes are shown [default: the highest val mAP of those made by hand or of the full method].")] = None,
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="Folder to write: report.html, report.md, figures/, pictures/.")] = Path("report"),
    latex: Annotated[bool, typer.Option("--latex", help="Write every table for LaTeX too, into tables/.")] = False,
    markdown_only: Annotated[Path | None, typer.Option("--markdown-only", metavar="FILE", help="Write this file alone: answers and tables as Markdown, without figures and pictures.")] = None,
    force: Force = False, json_: Json = False, quiet: Quiet = False,
) -> None:  # fmt: skip
    """One page of answers, tables, plots, queries and failures, from what runs and experiments left; computes no stage."""
    from ..report.report import ReportPlan
    from ..report.report import report as stage

    plan = ReportPlan(
        runs=runs,
        ablations=ablations,
        data=data,
        run=run,
        out=out,
        latex=latex,
        markdown_only=markdown_only,
        force=force,
    )
    result = stage(plan, make_progress(quiet))
    finish(result.to_json(), json_, *result.summary())


def samples(
    data: Annotated[Path, typer.Option("--data", metavar="DIR", help="Folder of the data set.")] = Path("data/coco"),
    n: Annotated[int, typer.Option("--n", min=1, max=100, help="Images on the sheet.")] = 16,
    split: Annotated[str | None, typer.Option("--split", help="train, val or test [default: all].")] = None,
    seed: Seed = None,
    out: Annotated[Path, typer.Option("--out", metavar="FILE", help="Picture to write, a .png.")] = Path("samples.png"),
    follow_links: FollowLinks = False,
    force: Force = False, json_: Json = False, quiet: Quiet = False,  # noqa: ARG001
) -> None:  # fmt: skip
    """A sheet of random samples of a manifest with their tags and captions: a look at the data before any training."""
    from ..report.samples import samples as stage

    result = stage(
        data_folder(data, follow_links), n=n, split=split, seed=42 if seed is None else seed, out=out, force=force
    )
    finish(result.to_json(), json_, *result.summary())

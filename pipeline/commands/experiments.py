"""``mmcli ablate``: experiments and grids."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from ...errors import InputError
from .options import (
    FLAGS,
    ConfigFile,
    Data,
    Device,
    FollowLinks,
    Force,
    Json,
    Model,
    PresetName,
    Quiet,
    Seed,
    Set,
    Split,
    Store,
    data_folder,
    finish,
    make_progress,
)

if TYPE_CHECKING:
    from ..ablation.request import ConfigSource


def ablate(
    experiments: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="EXPERIMENT...",
            help="A1 A2 A3 B1 B2 B3 B4 C1 C2 C3 C4 M0 M1 M2 base [default: those that need no images, where no --grid is given].",
            show_default=False,
        ),
    ] = None,
    grid: Annotated[
        str | None,
        typer.Option(
            "--grid",
            metavar="FILE",
            rich_help_panel="What",
            help="Every combination of a file's grid_search; plan is the experiment plan's.",
        ),
    ] = None,
    file: Annotated[
        str,
        typer.Option(
            "--experiments",
            metavar="FILE",
            rich_help_panel="What",
            help="Experiments and their values; miniature is for `mmcli demo`.",
        ),
    ] = "experiments",
    set_values: Annotated[
        list[str] | None,
        typer.Option(
            "--set-values",
            metavar="ID=VALUE,..",
            rich_help_panel="What",
            help="Other values of an experiment, as B3=36,64,100.",
        ),
    ] = None,
    only: Annotated[
        list[str] | None,
        typer.Option(
            "--only",
            metavar="KEY=VALUE,..",
            rich_help_panel="What",
            help="Only rows with this: a key of the configuration, or an experiment's id; * matches anything.",
        ),
    ] = None,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run",
            rich_help_panel="How",
            help="List trainings and evaluations, what is shared, and about how long it takes; do nothing.",
        ),
    ] = False,
    max_time: Annotated[
        str | None,
        typer.Option(
            "--max-time",
            metavar="TIME",
            rich_help_panel="How",
            help="Begin nothing more after this, as 90m or 2h; the same command goes on later.",
        ),
    ] = None,
    workers: Annotated[
        int, typer.Option("--workers", min=1, rich_help_panel="How", help="Processes, each with its share of threads.")
    ] = 1,
    engine: Annotated[
        Literal["local", "ray"],
        typer.Option("--engine", rich_help_panel="How", help="This machine, or a Ray cluster (install the extra ray)."),
    ] = "local",
    ray_address: Annotated[
        str | None,
        typer.Option(
            "--ray-address",
            metavar="ADDRESS",
            rich_help_panel="How",
            help="Cluster of --engine ray [default: one of this machine alone].",
        ),
    ] = None,
    device: Device = None,
    seed: Seed = None,
    seeds: Annotated[
        int,
        typer.Option(
            "--seeds", min=1, metavar="N", rich_help_panel="Device and seed", help="Rows of N seeds from --seed on."
        ),
    ] = 1,
    preset: PresetName = None,
    config: ConfigFile = None,
    set_: Set = None,
    store: Store = None,
    model: Model = None,
    data: Data = Path("data/coco"),
    out: Annotated[
        Path,
        typer.Option(
            "--out", metavar="DIR", rich_help_panel="Store and run", help="Folder of rows.parquet, scores and runs."
        ),
    ] = Path("runs/ablations"),
    force: Force = False,
    json_: Json = False,
    quiet: Quiet = False,
) -> None:
    """Experiments: train what they need once, evaluate the rest from it; one table of rows, resumable at any moment.

    A run below `runs` that was made by hand with the same configuration is used in the place of a new training.
    """
    if ray_address is not None and engine != "ray":
        raise InputError("--ray-address without Ray", got=ray_address, wanted="--engine ray", do="give both or neither")
    options = {"preset": preset, "model.siglip2_variant": model, "hardware.device": device, "hardware.seed": seed}
    from ..ablation.request import Request, parse_duration
    from ..extraction.stores import find_store

    request = Request(
        names=tuple(experiments or ()),
        grid=grid,
        experiments=file,
        values=tuple(set_values or ()),
        only=tuple(only or ()),
        seeds=seeds,
        store=find_store(store),
        source=_config_source(config, set_, options),
        out=out,
        data=data,
        force=force,
        max_time=None if max_time is None else parse_duration(max_time),
        workers=workers,
        engine=engine,
        address=ray_address,
    )
    from ..ablation import ablate as stage

    result: Any = stage.dry_run(request) if dry_run else stage.ablate(request, make_progress(quiet))
    finish(result.to_json(), json_, *result.summary())
    if not dry_run and result.counted["failed"]:
        raise typer.Exit(1)


def bench_ablate(
    names: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="EXPERIMENT...",
            help="Experiments that a store alone serves [default: A1 A2 A3 B2 B4 C1 C2 C3 C4].",
            show_default=False,
        ),
    ] = None,
    seeds: Annotated[int, typer.Option("--seeds", min=1, metavar="N", help="Rows of N seeds.")] = 1,
    epochs: Annotated[
        int | None, typer.Option("--epochs", min=1, help="Epochs of a training at most [default: 30].")
    ] = None,
    n_train: Annotated[
        int | None,
        typer.Option("--n-train", min=2048, help="Train images of the made store [default: COCO's 113,287]."),
    ] = None,
    workers: Annotated[int, typer.Option("--workers", min=1, help="Processes, each with its share of threads.")] = 1,
    store: Annotated[
        Path | None,
        typer.Option("--store", metavar="DIR", help="Store to read [default: one that is made, of COCO's size]."),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", metavar="DIR", help="Keep the table and its runs here [default: thrown away]."),
    ] = None,
    preset: PresetName = None,
    device: Device = None,
    config: ConfigFile = None,
    set_: Set = None,
    json_: Json = False,
    quiet: Quiet = False,
) -> None:
    """Experiments on a store of COCO's size: seconds of planning, training, evaluating, beside a loop that shares nothing."""
    options = {"preset": preset, "hardware.device": device, "training.num_epochs": epochs}
    source = _config_source(config, set_, options)
    from ..bench.ablate import NAMES
    from ..bench.ablate import bench_ablate as stage

    result = stage(
        source,
        names=names or NAMES,
        store=store,
        n_train=n_train,
        seeds=seeds,
        workers=workers,
        out=out,
        progress=make_progress(quiet),
    )
    finish(result.to_json(), json_, *result.summary())


def _config_source(file: Path | None, settings: list[str] | None, options: dict[str, Any]) -> "ConfigSource":
    """The configuration as it was given; it is resolved for every row."""
    from ..ablation.request import ConfigSource
    from ..core.config import parse_settings

    given = {key: value for key, value in options.items() if value is not None}
    parsed = parse_settings(settings or [])
    flags = {key: FLAGS[key] for key in given} | {key: f"--set {key}" for key in parsed}
    return ConfigSource(file=file, options={**given, **parsed}, flags=flags)


def compare(
    run_a: Annotated[Path, typer.Argument(metavar="RUN_A", help="A run.", show_default=False)],
    run_b: Annotated[
        Path,
        typer.Argument(metavar="RUN_B", help="A run to compare it with; the same for two methods.", show_default=False),
    ],
    method: Annotated[
        str | None,
        typer.Option(
            "--method",
            help="Method of both: knn, classifier, zero-shot [default: knn where both have it, else classifier].",
        ),
    ] = None,
    method_a: Annotated[str | None, typer.Option("--method-a", metavar="NAME", help="Method of RUN_A alone.")] = None,
    method_b: Annotated[str | None, typer.Option("--method-b", metavar="NAME", help="Method of RUN_B alone.")] = None,
    split: Split = "test",
    json_: Json = False,
    quiet: Quiet = False,  # noqa: ARG001
) -> None:
    """Is one run better than another? Paired bootstrap over the images that both scored."""
    from ..evaluation.compare import compare as stage

    result = stage(run_a, run_b, method_a=method_a or method, method_b=method_b or method, split=split)
    finish(result.to_json(), json_, *result.summary())


NamedData = Annotated[
    Path | None,
    typer.Option("--data", metavar="DIR", help="Folder of the data set [default: data/coco, where it is there]."),
]


def report(
    runs: Annotated[Path, typer.Option("--runs", metavar="DIR", help="Folder of the runs.")] = Path("runs"),
    ablations: Annotated[
        Path | None,
        typer.Option(
            "--ablations",
            metavar="DIR",
            help="Folder of the experiments' rows.parquet [default: ablations below --runs].",
        ),
    ] = None,
    data: NamedData = None,
    run: Annotated[
        Path | None,
        typer.Option(
            "--run",
            metavar="DIR",
            help="Run whose queries, curves, bits and classes are shown [default: the highest val mAP of those made by hand or of the full method].",
        ),
    ] = None,
    out: Annotated[
        Path, typer.Option("--out", metavar="DIR", help="Folder to write: report.html, report.md, figures/, pictures/.")
    ] = Path("report"),
    latex: Annotated[bool, typer.Option("--latex", help="Write every table for LaTeX too, into tables/.")] = False,
    markdown_only: Annotated[
        Path | None,
        typer.Option(
            "--markdown-only",
            metavar="FILE",
            help="Write this file alone: answers and tables as Markdown, without figures and pictures.",
        ),
    ] = None,
    force: Force = False,
    json_: Json = False,
    quiet: Quiet = False,
) -> None:
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
    force: Force = False,
    json_: Json = False,
    quiet: Quiet = False,  # noqa: ARG001
) -> None:
    """A sheet of random samples of a manifest with their tags and captions: a look at the data before any training."""
    from ..report.samples import samples as stage

    result = stage(
        data_folder(data, follow_links), n=n, split=split, seed=42 if seed is None else seed, out=out, force=force
    )
    finish(result.to_json(), json_, *result.summary())

"""The commands up to a store: demo, prepare, extract."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from ...errors import InputError
from .options import (
    ConfigFile,
    Data,
    Device,
    FollowLinks,
    Force,
    Json,
    Model,
    Quiet,
    Revision,
    Seed,
    Set,
    Store,
    StoreOut,
    data_folder,
    finish,
    make_progress,
    read_config,
)


def demo(
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="Folder to write.")] = Path("demo"),
    seed: Seed = None,
    device: Device = None,
    json_: Json = False,
    quiet: Quiet = False,
    force: Force = False,
) -> None:
    """Every stage, on a generated miniature: about three minutes on two cores."""
    from ..demo import run_demo

    config = read_config(None, None, {"hardware.seed": seed, "hardware.device": device})
    result = run_demo(config, out=out, force=force, progress=make_progress(quiet))
    finish(result.to_json(), json_, *result.summary())


def prepare(
    data: Data = Path("data/coco"),
    out: Annotated[
        Path | None,
        typer.Option("--out", metavar="DIR", help="Folder for manifest.parquet [default: the data folder]."),
    ] = None,
    check_images: Annotated[
        bool, typer.Option("--check-images/--no-check-images", help="Look for every image file.")
    ] = True,
    follow_links: FollowLinks = False,
    json_: Json = False,
    quiet: Quiet = False,  # noqa: ARG001 - taken everywhere; there is no progress to show
) -> None:
    """COCO and the Karpathy split to one checked manifest, with a table of statistics."""
    from ..data.prepare import prepare as stage
    from ..data.prepare import statistics_tables

    result = stage(data_folder(data, follow_links), out, check_images=check_images)
    finish(result.to_json(), json_, *statistics_tables(result.statistics), f"wrote {result.path}")


def extract(
    patches: Annotated[
        int | None, typer.Option("--patches", help="Patch budget of a NaFlex checkpoint [default: 256].")
    ] = None,
    data: Data = Path("data/coco"),
    manifest: Annotated[
        Path | None, typer.Option("--manifest", metavar="FILE", help="Manifest [default: DATA/manifest.parquet].")
    ] = None,
    out: StoreOut = None,
    model: Model = None,
    revision: Revision = None,
    dtype: Annotated[
        Literal["float16", "float32"], typer.Option("--dtype", help="How embeddings are stored.")
    ] = "float16",
    on_error: Annotated[
        Literal["stop", "skip"], typer.Option("--on-error", help="What an image that cannot be read does.")
    ] = "stop",
    resizer: Annotated[
        Literal["pillow", "torch"],
        typer.Option(
            "--resizer",
            help="pillow: the processor's own numbers; torch: faster, off by one level of 255 here and there.",
        ),
    ] = "pillow",
    batch_tokens: Annotated[
        int | None,
        typer.Option(
            "--batch-tokens",
            min=1,
            help="Patches or text tokens of a forward pass of a new store [default: 1024 or 2048 on a CPU, by its caches; 32768 on a GPU].",
        ),
    ] = None,
    workers: Annotated[
        int | None,
        typer.Option(
            "--workers", min=0, help="Processes that read images [default: one a core with a GPU, else one for eight]."
        ),
    ] = None,
    processes: Annotated[
        int | None, typer.Option("--processes", min=1, help="Processes that compute [default: one a GPU].")
    ] = None,
    engine: Annotated[
        Literal["local", "ray"],
        typer.Option("--engine", help="This machine, or a Ray cluster (install the extra ray)."),
    ] = "local",
    ray_address: Annotated[
        str | None,
        typer.Option(
            "--ray-address", metavar="ADDRESS", help="Cluster of --engine ray [default: one of this machine alone]."
        ),
    ] = None,
    shard: Annotated[
        str | None, typer.Option("--shard", metavar="I/N", help="Fill one of N stripes; run the others elsewhere.")
    ] = None,
    follow_links: FollowLinks = False,
    device: Device = None,
    config: ConfigFile = None,
    set_: Set = None,
    json_: Json = False,
    quiet: Quiet = False,
    force: Force = False,
) -> None:
    """Stage 1: run the frozen SigLIP2 once and store its raw embeddings; resumes where it was stopped."""
    options = {
        "model.max_num_patches": patches,
        "model.siglip2_variant": model,
        "model.revision": revision,
        "data.num_workers": workers,
        "hardware.device": device,
    }
    resolved = read_config(config, set_, options)
    from ..extraction.extract import ExtractPlan, parse_stripe

    plan = ExtractPlan(
        data=data_folder(data, follow_links),
        manifest=manifest,
        out=out,
        dtype=dtype,
        on_error=on_error,
        resizer=resizer,
        batch_tokens=batch_tokens,
        force=force,
        stripe=None if shard is None else parse_stripe(shard),
    )
    if ray_address is not None and engine != "ray":
        raise InputError("--ray-address without Ray", got=ray_address, wanted="--engine ray", do="give both or neither")
    if engine == "ray":
        from ..extraction.ray_engine import extract_on_ray

        result = extract_on_ray(resolved, plan, processes=processes, address=ray_address, progress=make_progress(quiet))
    else:
        from ..extraction.extract import extract_here

        result = extract_here(resolved, plan, processes=processes, progress=make_progress(quiet))
    finish(result.to_json(), json_, *result.summary())


def cache_info(store: Store = None, json_: Json = False, quiet: Quiet = False) -> None:  # noqa: ARG001 - as everywhere
    """What a store is: model, patches, sizes, skipped images, distribution of norms."""
    from ...cache import describe
    from ..extraction.stores import find_store, info_summary

    facts = describe(find_store(store))
    finish(facts, json_, *info_summary(facts))


def cache_verify(
    store: Store = None,
    leaks: Annotated[bool, typer.Option("--leaks", help="List near-duplicate images across splits too.")] = False,
    threshold: Annotated[
        float | None,
        typer.Option("--threshold", min=-1, max=1, help="Least cosine of near-duplicates [default: 0.98]."),
    ] = None,
    most: Annotated[
        int | None, typer.Option("--most", min=0, help="Near-duplicates to list at most [default: 50].")
    ] = None,
    json_: Json = False,
    quiet: Quiet = False,
) -> None:
    """Check everything in a store: checksums, counts, order, NaN, norms, key."""
    from ..extraction.stores import check_store, find_store

    checked = check_store(find_store(store), make_progress(quiet), leaks=leaks, threshold=threshold, most=most)
    finish(checked.to_json(), json_, *checked.summary())
    if checked.problems:
        raise typer.Exit(2)


def cache_export(
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="Folder to write, new or empty.")],
    format_: Annotated[
        Literal["npy", "parquet"],
        typer.Option("--format", help="npy: as clip-retrieval, embedding-reader and autofaiss read it."),
    ] = "npy",
    captions: Annotated[
        Literal["first", "all"] | None,
        typer.Option(
            "--captions", help="Of npy: a row an image, or a row a caption with its image repeated [default: first]."
        ),
    ] = None,
    store: Store = None,
    json_: Json = False,
    quiet: Quiet = False,
    force: Force = False,
) -> None:
    """Write a store's raw embeddings for other tools, shard by shard."""
    from ..extraction.stores import export, export_summary, find_store

    report = export(find_store(store), out, format_, make_progress(quiet), captions=captions, force=force)
    finish(report.to_json(), json_, *export_summary(report))


def cache_import(
    images: Annotated[
        Path,
        typer.Option(
            "--images", metavar="PATH", help="Image vectors: .npy or .parquet, a file or a folder of numbered ones."
        ),
    ],
    texts: Annotated[
        Path, typer.Option("--texts", metavar="PATH", help="Caption vectors, likewise: one an image, or one a caption.")
    ],
    name: Annotated[str, typer.Option("--name", help="Model that computed them.")],
    revision: Annotated[
        str | None, typer.Option("--revision", help="Revision of that model [default: hash of the content].")
    ] = None,
    manifest: Annotated[
        Path, typer.Option("--manifest", metavar="FILE", help="Manifest of their images, in their order.")
    ] = Path("data/coco/manifest.parquet"),
    out: StoreOut = None,
    dtype: Annotated[
        Literal["float16", "float32"] | None,
        typer.Option("--dtype", help="How they are stored [default: as they are]."),
    ] = None,
    json_: Json = False,
    quiet: Quiet = False,
    force: Force = False,
) -> None:
    """Make a store of embeddings that another tool computed."""
    from ..extraction.import_store import ImportPlan, import_store

    plan = ImportPlan(
        images=images, texts=texts, manifest=manifest, name=name, revision=revision, out=out, dtype=dtype, force=force
    )
    result = import_store(plan, make_progress(quiet))
    finish(result.to_json(), json_, *result.summary())

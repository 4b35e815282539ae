"""The commands up to a store, and those that look at one: demo, prepare, extract, cache."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import typer

from ..core.defaults import DATA
from .options import Engine, Force, Images, OnError, Output, Settings, Store, StoreOut, command, option


@command("hardware.seed", "hardware.device", file=False)
def demo(
    settings: Settings,
    output: Output,
    out: Annotated[Path, option("--out DIR", "Folder to write.")] = Path("demo"),
    force: Force = False,
) -> None:
    """Every stage, on a generated miniature: about three minutes on two cores."""
    config = settings.load()
    from ..demo import run_demo

    output.finish(run_demo(config, out=out, force=force, progress=output.progress))


@command()
def prepare(
    images: Images,
    output: Output,
    out: Annotated[Path | None, option("--out DIR", "Folder for manifest.parquet [default: the data folder].")] = None,
    check_images: Annotated[bool, option("--check-images/--no-check-images", "Look for every image file.")] = True,
) -> None:
    """COCO and the Karpathy split to one checked manifest, with a table of statistics."""
    from ..data.prepare import prepare as stage
    from ..data.prepare import statistics_tables

    result = stage(images.folder, out, check_images=check_images)
    output.show(result.to_json(), *statistics_tables(result.statistics), f"wrote {result.path}")


@dataclass(frozen=True, kw_only=True)
class Extraction:
    """What an extraction writes, and how."""

    manifest: Annotated[Path | None, option("--manifest FILE", "Manifest [default: DATA/manifest.parquet].")] = None
    out: StoreOut = None
    dtype: Annotated[Literal["float16", "float32"], option("--dtype", "How embeddings are stored.")] = "float16"
    on_error: OnError = "stop"
    resizer: Annotated[
        Literal["pillow", "torch"],
        option(
            "--resizer", "pillow: the processor's own numbers; torch: faster, off by one level of 255 here and there."
        ),
    ] = "pillow"
    batch_tokens: Annotated[
        int | None,
        option(
            "--batch-tokens",
            "Patches or text tokens of a forward pass of a new store [default: 1024 or 2048 on a CPU, by its caches;"
            " 32768 on a GPU].",
            min=1,
        ),
    ] = None
    shard: Annotated[str | None, option("--shard I/N", "Fill one of N stripes; run the others elsewhere.")] = None
    force: Force = False


@command("model.max_num_patches", "model.siglip2_variant", "model.revision", "data.num_workers", "hardware.device")
def extract(
    settings: Settings,
    images: Images,
    extraction: Extraction,
    engine: Engine,
    output: Output,
    processes: Annotated[
        int | None, option("--processes", "Processes that compute [default: one a GPU].", min=1)
    ] = None,
) -> None:
    """Stage 1: run the frozen SigLIP2 once and store its raw embeddings; resumes where it was stopped."""
    config = settings.load()
    from ..extraction.extract import ExtractPlan, extract_here, parse_stripe

    options = vars(extraction).copy()
    shard = options.pop("shard")
    plan = ExtractPlan(data=images.folder, stripe=None if shard is None else parse_stripe(shard), **options)
    if engine.engine == "ray":
        from ..extraction.ray_engine import extract_on_ray

        address = engine.ray_address
        result = extract_on_ray(config, plan, processes=processes, address=address, progress=output.progress)
    else:
        result = extract_here(config, plan, processes=processes, progress=output.progress)
    output.finish(result)


@command()
def cache_info(output: Output, store: Store = None) -> None:
    """What a store is: model, patches, sizes, skipped images, distribution of norms."""
    from ...cache import describe
    from ..extraction.stores import find_store, info_summary

    facts = describe(find_store(store))
    output.show(facts, *info_summary(facts))


@command()
def cache_verify(
    output: Output,
    store: Store = None,
    leaks: Annotated[bool, option("--leaks", "List near-duplicate images across splits too.")] = False,
    threshold: Annotated[
        float | None, option("--threshold", "Least cosine of near-duplicates [default: 0.98].", min=-1, max=1)
    ] = None,
    most: Annotated[int | None, option("--most", "Near-duplicates to list at most [default: 50].", min=0)] = None,
) -> None:
    """Check everything in a store: checksums, counts, order, NaN, norms, key."""
    from ..extraction.stores import check_store, find_store

    checked = check_store(find_store(store), output.progress, leaks=leaks, threshold=threshold, most=most)
    output.finish(checked)
    if checked.problems:
        raise typer.Exit(2)


@command()
def cache_export(
    output: Output,
    out: Annotated[Path, option("--out DIR", "Folder to write, new or empty.")],
    format_: Annotated[
        Literal["npy", "parquet"], option("--format", "npy: as clip-retrieval, embedding-reader and autofaiss read it.")
    ] = "npy",
    captions: Annotated[
        Literal["first", "all"] | None,
        option("--captions", "With npy: a row an image, or a row a caption with its image repeated [default: first]."),
    ] = None,
    store: Store = None,
    force: Force = False,
) -> None:
    """Write a store's raw embeddings for other tools, shard by shard."""
    from ..extraction.stores import export, export_summary, find_store

    report = export(find_store(store), out, format_, output.progress, captions=captions, force=force)
    output.show(report.to_json(), *export_summary(report))


@dataclass(frozen=True, kw_only=True)
class Import:
    """Embeddings from elsewhere, and the store that they become."""

    images: Annotated[
        Path, option("--images PATH", "Image vectors: .npy or .parquet, a file or a folder of numbered ones.")
    ]
    texts: Annotated[Path, option("--texts PATH", "Caption vectors in the same form: one an image, or one a caption.")]
    name: Annotated[str, option("--name", "Model that computed them.")]
    revision: Annotated[str | None, option("--revision", "Revision of that model [default: hash of the content].")] = (
        None
    )
    manifest: Annotated[Path, option("--manifest FILE", "Manifest of their images, in their order.")] = (
        DATA / "manifest.parquet"
    )
    out: StoreOut = None
    dtype: Annotated[
        Literal["float16", "float32"] | None, option("--dtype", "How they are stored [default: as they are].")
    ] = None
    force: Force = False


@command()
def cache_import(vectors: Import, output: Output) -> None:
    """Make a store of embeddings that another tool computed."""
    from ..extraction.import_store import ImportPlan, import_store

    output.finish(import_store(ImportPlan(**vars(vectors)), output.progress))

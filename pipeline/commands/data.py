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


@dataclass(frozen=True, kw_only=True)
class TableColumns:
    """Columns of a table; those that are not named are guessed."""

    path_column: Annotated[str | None, option("--path-column NAME", "Column of image paths.", "Columns")] = None
    caption_column: Annotated[str | None, option("--caption-column NAME", "Column of captions.", "Columns")] = None
    tag_column: Annotated[str | None, option("--tag-column NAME", "Column of tags.", "Columns")] = None
    split_column: Annotated[str | None, option("--split-column NAME", "Column of splits.", "Columns")] = None
    id_column: Annotated[str | None, option("--id-column NAME", "Column of image ids.", "Columns")] = None
    delimiter: Annotated[str | None, option("--delimiter TEXT", "Between the tags of one text.", "Columns")] = None


@dataclass(frozen=True, kw_only=True)
class Splitting:
    """How images are split, and which tags count."""

    split_file: Annotated[
        Path | None, option("--split-file FILE", "Table with the columns path (or image_id) and split.", "Splits")
    ] = None
    val_share: Annotated[float, option("--val-share", "Share of val where splits are drawn.", "Splits")] = 0.1
    test_share: Annotated[float, option("--test-share", "Share of test where splits are drawn.", "Splits")] = 0.1
    split_seed: Annotated[int, option("--split-seed", "Seed of splits that are drawn.", "Splits")] = 42
    stratify: Annotated[bool, option("--stratify", "Keep these shares for every tag, as far as can be.", "Splits")] = (
        False
    )
    categories: Annotated[
        Path | None, option("--categories FILE", "Category names in label order, one a line.", "Tags")
    ] = None
    min_images: Annotated[int, option("--min-images N", "Leave out tags of fewer images.", "Tags", min=1)] = 1


@command()
def prepare(
    images: Images,
    columns: TableColumns,
    splitting: Splitting,
    output: Output,
    source: Annotated[
        str | None,
        typer.Argument(
            metavar="[SOURCE]",
            help="Data set: a table (csv, tsv, jsonl, parquet), a folder, an instances JSON, an archive (tar, zip), or a"
            " Hugging Face hub id [default: the folder of --data].",
            show_default=False,
        ),
    ] = None,
    format_: Annotated[
        str | None,
        option(
            "--format KIND",
            "Kind of SOURCE where it is not recognised: coco, instances, table, folder, archive, huggingface, openimages"
            " or visualgenome.",
        ),
    ] = None,
    out: Annotated[Path | None, option("--out DIR", "Folder for manifest.parquet [default: the data folder].")] = None,
    name: Annotated[str | None, option("--name NAME", "Name of the data set [default: that of SOURCE].")] = None,
    check_images: Annotated[
        bool, option("--check-images/--no-check-images", "Look for every image file of COCO.")
    ] = True,
) -> None:
    """Turn a data set into one checked manifest, with a table of statistics.

    SOURCE is recognised by what lies there, and its kind is printed. Without SOURCE it is COCO 2014 with Karpathy's split.

    Examples: mmcli prepare photos.csv; mmcli prepare pictures/ --stratify; mmcli prepare annotations/instances_val2017.json
    """
    from ..core.files import command as command_line
    from ..data.prepare import prepare as stage
    from ..data.prepare import prepare_source, statistics_tables
    from ..data.sources.recognise import SourceOptions, recognise
    from ..data.sources.samples import SplitRule
    from ..data.sources.tables import Columns

    dataset = None if source is None and format_ is None else recognise(source or str(images.folder), format_)
    if dataset is None or dataset.kind == "coco":
        folder = images.folder if source is None else Path(source)
        result = stage(folder, out, check_images=check_images)
    else:
        options = SourceOptions(
            out=out,
            columns=Columns(
                path=columns.path_column,
                captions=columns.caption_column,
                tags=columns.tag_column,
                split=columns.split_column,
                image_id=columns.id_column,
                delimiter=columns.delimiter,
            ),
            split_file=splitting.split_file,
            rule=SplitRule(
                val=splitting.val_share,
                test=splitting.test_share,
                seed=splitting.split_seed,
                stratify=splitting.stratify,
            ),
            categories=splitting.categories,
            least_images=splitting.min_images,
            name=name,
        )
        result = prepare_source(dataset, options)
    step = command_line("extract", "--data", result.path.parent)
    lines = (f"wrote {result.path}", f"next: {step}") if result.path.parent != DATA else (f"wrote {result.path}",)
    output.show(result.to_json(), *result.notes, *statistics_tables(result.statistics), *lines)


@dataclass(frozen=True, kw_only=True)
class Extraction:
    """Options of an extraction beside the configuration."""

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

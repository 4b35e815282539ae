"""``mmcli cache``: look at a store, check it, export it, or make one of embeddings from elsewhere."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from .options import Force, Json, Quiet, Store, StoreOut, finish, make_progress


def cache_info(store: Store = None, json_: Json = False, quiet: Quiet = False) -> None:  # noqa: ARG001 - as everywhere
    """What a store is: model, patches, sizes, skipped images, distribution of norms."""
    from ...cache import describe
    from ..extraction.store_views import info_summary
    from ..extraction.stores import find_store

    facts = describe(find_store(store))
    finish(facts, json_, *info_summary(facts))


def cache_verify(
    store: Store = None,
    leaks: Annotated[bool, typer.Option("--leaks", help="List near-duplicate images across splits too.")] = False,
    threshold: Annotated[float | None, typer.Option("--threshold", min=-1, max=1, help="Least cosine of near-duplicates [default: 0.98].")] = None,
    most: Annotated[int | None, typer.Option("--most", min=0, help="Near-duplicates to list at most [default: 50].")] = None,
    json_: Json = False, quiet: Quiet = False,
) -> None:  # fmt: skip
    """Check everything in a store: checksums, counts, order, NaN, norms, key."""
    from ..extraction.store_views import check_store
    from ..extraction.stores import find_store

    checked = check_store(find_store(store), make_progress(quiet), leaks=leaks, threshold=threshold, most=most)
    finish(checked.to_json(), json_, *checked.summary())
    if checked.problems:
        raise typer.Exit(2)


def cache_export(
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="Folder to write, new or empty.")],
    format_: Annotated[Literal["npy", "parquet"], typer.Option("--format", help="npy: as clip-retrieval, embedding-reader and autofaiss read it.")] = "npy",
    captions: Annotated[Literal["first", "all"] | None, typer.Option("--captions", help="Of npy: a row an image, or a row a caption with its image repeated [default: first].")] = None,
    store: Store = None, json_: Json = False, quiet: Quiet = False, force: Force = False,
) -> None:  # fmt: skip
    """Write a store's raw embeddings for other tools, shard by shard."""
    from ..extraction.store_views import export, export_summary
    from ..extraction.stores import find_store

    report = export(find_store(store), out, format_, make_progress(quiet), captions=captions, force=force)
    finish(report.to_json(), json_, *export_summary(report))


def cache_import(
    images: Annotated[Path, typer.Option("--images", metavar="PATH", help="Image vectors: .npy or .parquet, a file or a folder of numbered ones.")],
    texts: Annotated[Path, typer.Option("--texts", metavar="PATH", help="Caption vectors, likewise: one an image, or one a caption.")],
    name: Annotated[str, typer.Option("--name", help="Model that computed them.")],
    revision: Annotated[str | None, typer.Option("--revision", help="Revision of that model [default: hash of the content].")] = None,
    manifest: Annotated[Path, typer.Option("--manifest", metavar="FILE", help="Manifest of their images, in their order.")] = Path("data/coco/manifest.parquet"),
    out: StoreOut = None,
    dtype: Annotated[Literal["float16", "float32"] | None, typer.Option("--dtype", help="How they are stored [default: as they are].")] = None,
    json_: Json = False, quiet: Quiet = False, force: Force = False,
) -> None:  # fmt: skip
    """Make a store of embeddings that another tool computed."""
    from ..extraction.import_store import ImportPlan, import_store

    plan = ImportPlan(
        images=images, texts=texts, manifest=manifest, name=name, revision=revision, out=out, dtype=dtype, force=force
    )  # fmt: skip
    result = import_store(plan, make_progress(quiet))
    finish(result.to_json(), json_, *result.summary())

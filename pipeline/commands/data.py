"""The commands up to a store: demo, prepare, extract."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from ... import InputError
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
    StoreOut,
    data_folder,
    finish,
    make_progress,
    read_config,
)


def demo(
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="Folder to write.")] = Path("demo"),
    seed: Seed = None, device: Device = None, json_: Json = False, quiet: Quiet = False, force: Force = False,
) -> None:  # fmt: skip
    """Every stage, on a generated miniature: about three minutes on two cores."""
    from ..demo import run_demo

    config = read_config(None, None, {"hardware.seed": seed, "hardware.device": device})
    result = run_demo(config, out=out, force=force, progress=make_progress(quiet))
    finish(result.to_json(), json_, *result.summary())


def prepare(
    data: Data = Path("data/coco"),
    out: Annotated[Path | None, typer.Option("--out", metavar="DIR", help="Folder for manifest.parquet [default: the data folder].")] = None,
    check_images: Annotated[bool, typer.Option("--check-images/--no-check-images", help="Look for every image file.")] = True,
    follow_links: FollowLinks = False,
    json_: Json = False, quiet: Quiet = False,  # noqa: ARG001 - taken everywhere; there is no progress to show
) -> None:  # fmt: skip
    """COCO and the Karpathy split to one checked manifest, with a table of statistics."""
    from ..data.prepare import prepare as stage
    from ..data.prepare import statistics_tables

    result = stage(data_folder(data, follow_links), out, check_images=check_images)
    finish(result.to_json(), json_, *statistics_tables(result.statistics), f"wrote {result.path}")


def extract(
    patches: Annotated[int | None, typer.Option("--patches", help="Patch budget of a NaFlex checkpoint [default: 256].")] = None,
    data: Data = Path("data/coco"),
    manifest: Annotated[Path | None, typer.Option("--manifest", metavar="FILE", help="Manifest [default: DATA/manifest.parquet].")] = None,
    out: StoreOut = None,
    model: Model = None, revision: Revision = None,
    dtype: Annotated[Literal["float16", "float32"], typer.Option("--dtype", help="How embeddings are stored.")] = "float16",
    on_error: Annotated[Literal["stop", "skip"], typer.Option("--on-error", help="What an image that cannot be read does.")] = "stop",
    resizer: Annotated[Literal["pillow", "torch"], typer.Option("--resizer", help="pillow: the processor's own numbers; torch: faster, off by one level of 255 here and there.")] = "pillow",
    batch_tokens: Annotated[int | None, typer.Option("--batch-tokens", min=1, help="Patches or text tokens of a forward pass of a new store [default: 1024 or 2048 on a CPU, by its caches; 32768 on a GPU].")] = None,
    workers: Annotated[int | None, typer.Option("--workers", min=0, help="Processes that read images [default: one a core with a GPU, else one for eight].")] = None,
    processes: Annotated[int | None, typer.Option("--processes", min=1, help="Processes that compute [default: one a GPU].")] = None,
    engine: Annotated[Literal["local", "ray"], typer.Option("--engine", help="This machine, or a Ray cluster (install the extra ray).")] = "local",
    ray_address: Annotated[str | None, typer.Option("--ray-address", metavar="ADDRESS", help="Cluster of --engine ray [default: one of this machine alone].")] = None,
    shard: Annotated[str | None, typer.Option("--shard", metavar="I/N", help="Fill one of N stripes; run the others elsewhere.")] = None,
    follow_links: FollowLinks = False, device: Device = None, config: ConfigFile = None, set_: Set = None,
    json_: Json = False, quiet: Quiet = False, force: Force = False,
) -> None:  # fmt: skip
    """Stage 1: run the frozen SigLIP2 once and store its raw embeddings; resumes where it was stopped."""
    options = {
        "model.max_num_patches": patches, "model.siglip2_variant": model, "model.revision": revision,
        "data.num_workers": workers, "hardware.device": device,
    }  # fmt: skip
    resolved = read_config(config, set_, options)
    from ..extraction.extract import ExtractPlan, parse_stripe

    plan = ExtractPlan(
        data=data_folder(data, follow_links), manifest=manifest, out=out, dtype=dtype, on_error=on_error, resizer=resizer, batch_tokens=batch_tokens, force=force,
        stripe=None if shard is None else parse_stripe(shard),
    )  # fmt: skip
    if ray_address is not None and engine != "ray":
        raise InputError("--ray-address without Ray", got=ray_address, wanted="--engine ray", do="give both or neither")
    if engine == "ray":
        from ..extraction.ray_engine import extract_on_ray

        result = extract_on_ray(resolved, plan, processes=processes, address=ray_address, progress=make_progress(quiet))
    else:
        from ..extraction.fleet import extract_here

        result = extract_here(resolved, plan, processes=processes, progress=make_progress(quiet))
    finish(result.to_json(), json_, *result.summary())

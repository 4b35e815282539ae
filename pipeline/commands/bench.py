"""``mmcli bench``: this machine beside the plain way."""

from pathlib import Path
from typing import Annotated

import typer

from .options import Device, Json, Quiet, finish, make_progress, read_config


def bench_extract(
    patches: Annotated[int | None, typer.Option("--patches", help="Patch budget of a NaFlex checkpoint [default: 256].")] = None,
    model: Annotated[str | None, typer.Option("--model", metavar="NAME", help="Checkpoint [default: base-size towers, random weights].")] = None,
    images: Annotated[Path | None, typer.Option("--images", metavar="DIR", help="Folder of JPEGs [default: drawn, of COCO's sizes].")] = None,
    n_images: Annotated[int, typer.Option("--n-images", min=1, help="Images of a round.")] = 96,
    n_captions: Annotated[int, typer.Option("--n-captions", min=1, help="Captions of a round.")] = 160,
    repeats: Annotated[int, typer.Option("--repeats", min=1, help="Rounds; the best of each way counts.")] = 3,
    workers: Annotated[int | None, typer.Option("--workers", min=0, help="Processes that read images.")] = None,
    device: Device = None, json_: Json = False, quiet: Quiet = False,
) -> None:  # fmt: skip
    """Images and captions a second: the plain transformers loop, ours, the towers alone, decoding alone."""
    resolved = read_config(
        None, None, {"model.max_num_patches": patches, "hardware.device": device, "data.num_workers": workers}
    )
    from ..bench_extract import bench_extract as stage

    result = stage(
        resolved, checkpoint=model, images=images, n_images=n_images, n_captions=n_captions, repeats=repeats,
        progress=make_progress(quiet),
    )  # fmt: skip
    finish(result.to_json(), json_, *result.summary())

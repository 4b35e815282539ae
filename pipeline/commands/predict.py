"""``mmcli predict``: tags of images with their captions, and the neighbours that voted."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from .options import (
    Data,
    Device,
    FollowLinks,
    Force,
    Json,
    Model,
    Quiet,
    RunDir,
    data_folder,
    finish,
    make_progress,
    read_config,
)
from .tagging import find_run


def predict(
    images: Annotated[list[Path] | None, typer.Argument(metavar="IMAGE...", help="Image files, or folders of images.", show_default=False)] = None,
    caption: Annotated[str | None, typer.Option("--caption", help="Caption of the image.")] = None,
    captions: Annotated[Path | None, typer.Option("--captions", metavar="FILE", help="Captions of several: JSON lines or CSV, path and caption; names the images where no IMAGE does.")] = None,
    run: RunDir = None,
    index: Annotated[Path | None, typer.Option("--index", metavar="FILE", help="Index file whose samples vote [default: the run's train split].")] = None,
    top: Annotated[int, typer.Option("--top", min=1, help="Tags of an image at most.")] = 5,
    neighbours: Annotated[int, typer.Option("--neighbours", min=1, help="Neighbours shown a tag; --json has all.")] = 3,
    k: Annotated[int | None, typer.Option("--k", help="Neighbours that vote [default: the run's, 20].")] = None,
    metric: Annotated[Literal["hamming", "cosine", "hybrid", "asymmetric"] | None, typer.Option("--metric", help="Distance [default: the run's; cosine without hash].")] = None,
    vote: Annotated[Literal["softmax", "uniform", "rank", "threshold"] | None, typer.Option("--vote", help="Weights of the votes [default: the run's].")] = None,
    tau: Annotated[float | None, typer.Option("--tau", help="Temperature of the softmax vote [default: the run's].")] = None,
    theta: Annotated[float | None, typer.Option("--theta", help="Least similarity of the threshold vote [default: the run's].")] = None,
    ties: Annotated[Literal["index", "average"] | None, typer.Option("--ties", help="Who votes among equals at the boundary: the lower index, or all of them share [default: the run's].")] = None,
    panel: Annotated[Path | None, typer.Option("--panel", metavar="FILE", help="Draw images and neighbours into a PNG file.")] = None,
    data: Data = Path("data/coco"),
    on_error: Annotated[Literal["stop", "skip"], typer.Option("--on-error", help="What an image that cannot be read does.")] = "stop",
    follow_links: FollowLinks = False, model: Model = None, device: Device = None, json_: Json = False, quiet: Quiet = False,
    force: Force = False,
) -> None:  # fmt: skip
    """Tag images with their captions, and show the neighbours that voted for every tag."""
    from ..tagging.requests import gather

    notes: list[str] = []
    requests = gather(images or [], caption, captions, follow_links=follow_links, notes=notes)
    found = find_run(run)
    options = {
        "knn.K": k, "knn.distance_metric": metric, "knn.voting_strategy": vote, "knn.tau": tau, "knn.theta": theta,
        "knn.ties": ties,
    }  # fmt: skip
    resolved = read_config(found.folder / "config.yaml", None, options)
    from ..tagging.panel import check_panel
    from ..tagging.predict import predict as stage
    from ..tagging.tagger import Tagger

    check_panel(panel, force=force)
    progress = make_progress(quiet)
    progress.say(f"tagging with {found.folder}")
    tagger = Tagger.load(found.folder, index=index, device=device or "auto", model=model, knn=resolved.knn)
    result = stage(
        tagger, requests, top=top, data=data_folder(data, follow_links), on_error=on_error, voters=neighbours,
        panel=panel, force=force, index=index, notes=notes, progress=progress,
    )  # fmt: skip
    finish(result.to_json(), json_, *result.summary())

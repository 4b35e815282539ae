"""``mmcli index``: a file of samples that vote, which grows and shrinks without training."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from ...errors import InputError, read_text
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

if TYPE_CHECKING:
    from ..core.run import Run

IndexFile = Annotated[
    Path | None,
    typer.Option("--index", metavar="FILE", help="Index file [default: index.safetensors of the run]."),
]


def index_build(
    run: RunDir = None,
    out: Annotated[
        Path | None, typer.Option("--out", metavar="FILE", help="File to write [default: RUN/index.safetensors].")
    ] = None,
    json_: Json = False,
    quiet: Quiet = False,  # noqa: ARG001 - taken everywhere
    force: Force = False,
) -> None:
    """Write a run's train codes with labels, captions and paths to one file; no towers, no images."""
    from ..tagging.index import build

    result = build(find_run(run), out, force=force)
    finish(result.to_json(), json_, *result.summary())


def index_add(
    manifest: Annotated[
        Path, typer.Option("--manifest", metavar="FILE", help="Manifest of the new samples; its tags may be new.")
    ],
    data: Data = Path("data/coco"),
    index: IndexFile = None,
    run: RunDir = None,
    model: Model = None,
    on_error: Annotated[
        Literal["stop", "skip"], typer.Option("--on-error", help="What an image that cannot be read does.")
    ] = "stop",
    follow_links: FollowLinks = False,
    device: Device = None,
    json_: Json = False,
    quiet: Quiet = False,
    force: Force = False,
) -> None:
    """Embed and encode new samples and add them; their tags are predicted at once, nothing is trained."""
    found = find_run(run)
    from ..tagging.index import NAME, AddOptions, add

    result = add(
        index or found.folder / NAME,
        found,
        manifest=manifest,
        data=data_folder(data, follow_links),
        options=AddOptions(device=device or "auto", model=model, on_error=on_error, force=force),
        progress=make_progress(quiet),
    )
    finish(result.to_json(), json_, *result.summary())


def index_remove(
    ids: Annotated[
        str | None, typer.Option("--ids", metavar="ID,...", help="Image ids of the samples to remove.")
    ] = None,
    ids_file: Annotated[
        Path | None, typer.Option("--ids-file", metavar="FILE", help="The same, from a file: one a line.")
    ] = None,
    index: IndexFile = None,
    run: RunDir = None,
    json_: Json = False,
    quiet: Quiet = False,  # noqa: ARG001 - taken everywhere
) -> None:
    """Take samples out by their image ids."""
    given = _parse_ids(ids or "", "--ids")
    if ids_file is not None:
        given += _parse_ids(read_text(ids_file, "cannot read image ids", wanted="one a line"), ids_file)
    if not given:
        raise InputError("no image ids", got="neither --ids nor --ids-file", wanted="one of them", do="as in --ids 1,2")
    path = index or _default(run)
    from ..tagging.index import remove

    result = remove(path, given)
    finish(result.to_json(), json_, *result.summary())


def index_info(
    index: IndexFile = None,
    run: RunDir = None,
    json_: Json = False,
    quiet: Quiet = False,  # noqa: ARG001 - taken everywhere
) -> None:
    """What an index file holds; compares its checksum."""
    path = index or _default(run)
    from ..tagging.index import describe, info_summary

    facts = describe(path)
    finish(facts, json_, *info_summary(facts))


def find_run(run: Path | None) -> "Run":
    """The run that was named, or the newest finished one of ``train-head``."""
    from ..core.run import newest_run, open_run

    return newest_run(Path("runs")) if run is None else open_run(run)


def _default(run: Path | None) -> Path:
    folder = find_run(run).folder
    from ..tagging.index import NAME

    return folder / NAME


def _parse_ids(text: str, where: object) -> list[int]:
    """Whole numbers of 64 bits between commas and white space."""
    found = []
    for word in text.replace(",", " ").split():
        digits = word.removeprefix("-")
        if not (digits.isascii() and digits.isdecimal() and len(digits) < 20 and -(2**63) <= int(word) < 2**63):
            raise InputError("no image id", where=where, got=repr(word), wanted="whole numbers", do="as in 1,2,3")
        found.append(int(word))
    return found


def predict(
    images: Annotated[
        list[Path] | None,
        typer.Argument(metavar="IMAGE...", help="Image files, or folders of images.", show_default=False),
    ] = None,
    caption: Annotated[str | None, typer.Option("--caption", help="Caption of the image.")] = None,
    captions: Annotated[
        Path | None,
        typer.Option(
            "--captions",
            metavar="FILE",
            help="Captions of several: JSON lines or CSV, path and caption; names the images where no IMAGE does.",
        ),
    ] = None,
    run: RunDir = None,
    index: Annotated[
        Path | None,
        typer.Option("--index", metavar="FILE", help="Index file whose samples vote [default: the run's train split]."),
    ] = None,
    top: Annotated[int, typer.Option("--top", min=1, help="Tags of an image at most.")] = 5,
    neighbours: Annotated[int, typer.Option("--neighbours", min=1, help="Neighbours shown a tag; --json has all.")] = 3,
    k: Annotated[int | None, typer.Option("--k", help="Neighbours that vote [default: the run's, 20].")] = None,
    metric: Annotated[
        Literal["hamming", "cosine", "hybrid", "asymmetric"] | None,
        typer.Option("--metric", help="Distance [default: the run's; cosine without hash]."),
    ] = None,
    vote: Annotated[
        Literal["softmax", "uniform", "rank", "threshold"] | None,
        typer.Option("--vote", help="Weights of the votes [default: the run's]."),
    ] = None,
    tau: Annotated[
        float | None, typer.Option("--tau", help="Temperature of the softmax vote [default: the run's].")
    ] = None,
    theta: Annotated[
        float | None, typer.Option("--theta", help="Least similarity of the threshold vote [default: the run's].")
    ] = None,
    ties: Annotated[
        Literal["index", "average"] | None,
        typer.Option(
            "--ties",
            help="Who votes among equals at the boundary: the lower index, or all of them share [default: the run's].",
        ),
    ] = None,
    panel: Annotated[
        Path | None, typer.Option("--panel", metavar="FILE", help="Draw images and neighbours into a PNG file.")
    ] = None,
    data: Data = Path("data/coco"),
    on_error: Annotated[
        Literal["stop", "skip"], typer.Option("--on-error", help="What an image that cannot be read does.")
    ] = "stop",
    follow_links: FollowLinks = False,
    model: Model = None,
    device: Device = None,
    json_: Json = False,
    quiet: Quiet = False,
    force: Force = False,
) -> None:
    """Tag images with their captions, and show the neighbours that voted for every tag."""
    from ..tagging.requests import read_requests

    notes: list[str] = []
    requests = read_requests(images or [], caption, captions, follow_links=follow_links, notes=notes)
    found = find_run(run)
    knn_options = {
        "knn.K": k,
        "knn.distance_metric": metric,
        "knn.voting_strategy": vote,
        "knn.tau": tau,
        "knn.theta": theta,
        "knn.ties": ties,
    }
    resolved = read_config(found.folder / "config.yaml", None, knn_options)
    from ..tagging.explain import check_panel
    from ..tagging.predict import PredictOptions
    from ..tagging.predict import predict as stage
    from ..tagging.tagger import Tagger

    check_panel(panel, force=force)
    progress = make_progress(quiet)
    progress.say(f"tagging with {found.folder}")
    tagger = Tagger.load(found.folder, index=index, device=device or "auto", model=model, knn=resolved.knn)
    options = PredictOptions(
        top=top,
        data=data_folder(data, follow_links),
        on_error=on_error,
        voters=neighbours,
        panel=panel,
        force=force,
        index=index,
    )
    result = stage(tagger, requests, options, notes=notes, progress=progress)
    finish(result.to_json(), json_, *result.summary())

"""The commands that tag new images: predict, and index, a file of samples that vote."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from ...errors import InputError, read_text
from .options import Force, Images, OnError, Output, RunDir, Settings, command, option

IndexFile = Annotated[Path | None, option("--index FILE", "Index file [default: index.safetensors of the run].")]


@command()
def index_build(
    output: Output,
    run: RunDir = None,
    out: Annotated[Path | None, option("--out FILE", "File to write [default: RUN/index.safetensors].")] = None,
    force: Force = False,
) -> None:
    """Write a run's train codes with labels, captions and paths to one file; no towers, no images."""
    from ..core.run import find_run
    from ..tagging.index import build

    output.finish(build(find_run(run), out, force=force))


@command("model.siglip2_variant", "hardware.device", file=False, defaults={"": "the run's", "hardware.device": "auto"})
def index_add(
    settings: Settings,
    images: Images,
    output: Output,
    manifest: Annotated[Path, option("--manifest FILE", "Manifest of the new samples; its tags may be new.")],
    index: IndexFile = None,
    run: RunDir = None,
    on_error: OnError = "stop",
    force: Force = False,
) -> None:
    """Embed and encode new samples and add them; their tags are predicted at once, nothing is trained."""
    from ..core.run import find_run
    from ..tagging.index import AddOptions, add

    source = find_run(run)
    result = add(
        index or source.paths.index,
        source,
        manifest=manifest,
        data=images.folder,
        options=AddOptions(
            device=settings.options.get("hardware.device", "auto"),
            model=settings.options.get("model.siglip2_variant"),
            on_error=on_error,
            force=force,
        ),
        progress=output.progress,
    )
    output.finish(result)


@command()
def index_remove(
    output: Output,
    ids: Annotated[str | None, option("--ids ID,...", "Image ids of the samples to remove.")] = None,
    ids_file: Annotated[Path | None, option("--ids-file FILE", "A file of such image ids, one a line.")] = None,
    index: IndexFile = None,
    run: RunDir = None,
) -> None:
    """Take samples out by their image ids."""
    numbers = _parse_ids(ids or "", "--ids")
    if ids_file is not None:
        numbers += _parse_ids(read_text(ids_file, "cannot read image ids", wanted="one a line"), ids_file)
    if not numbers:
        raise InputError("no image ids", got="neither --ids nor --ids-file", wanted="one of them", do="as in --ids 1,2")
    path = index or _default(run)
    from ..tagging.index import remove

    output.finish(remove(path, numbers))


@command()
def index_info(output: Output, index: IndexFile = None, run: RunDir = None) -> None:
    """What an index file holds; compares its checksum."""
    path = index or _default(run)
    from ..tagging.index import describe, info_summary

    facts = describe(path)
    output.show(facts, *info_summary(facts))


def _default(run: Path | None) -> Path:
    from ..core.run import find_run

    return find_run(run).paths.index


def _parse_ids(text: str, where: object) -> list[int]:
    """Whole numbers of 64 bits between commas and white space."""
    numbers = []
    for word in text.replace(",", " ").split():
        digits = word.removeprefix("-")
        if not (digits.isascii() and digits.isdecimal() and len(digits) < 20 and -(2**63) <= int(word) < 2**63):
            raise InputError("no image id", where=where, got=repr(word), wanted="whole numbers", do="as in 1,2,3")
        numbers.append(int(word))
    return numbers


@dataclass(frozen=True, kw_only=True)
class Question:
    """The images to tag, and whose samples vote."""

    images: Annotated[
        list[Path] | None,
        typer.Argument(metavar="IMAGE...", help="Image files, or folders of images.", show_default=False),
    ] = None
    caption: Annotated[str | None, option("--caption", "Caption of the image.")] = None
    captions: Annotated[
        Path | None,
        option(
            "--captions FILE",
            "Captions of several: JSON lines or CSV, path and caption; names the images where no IMAGE does.",
        ),
    ] = None
    run: RunDir = None
    index: Annotated[
        Path | None, option("--index FILE", "Index file whose samples vote [default: the run's train split].")
    ] = None


@dataclass(frozen=True, kw_only=True)
class Answer:
    """How much of the answer is shown, and where it is drawn."""

    top: Annotated[int, option("--top", "Tags of an image at most.", min=1)] = 5
    neighbours: Annotated[int, option("--neighbours", "Neighbours shown a tag; --json has all.", min=1)] = 3
    panel: Annotated[Path | None, option("--panel FILE", "Draw images and neighbours into a PNG file.")] = None
    on_error: OnError = "stop"
    force: Force = False


@command(
    "knn.K",
    "knn.distance_metric",
    "knn.voting_strategy",
    "knn.tau",
    "knn.theta",
    "knn.ties",
    "model.siglip2_variant",
    "hardware.device",
    file=False,
    defaults={"": "the run's", "hardware.device": "auto"},
)
def predict(question: Question, settings: Settings, answer: Answer, files: Images, output: Output) -> None:
    """Tag images with their captions, and show the neighbours that voted for every tag."""
    from ..core.run import find_run
    from ..tagging.requests import read_requests

    notes: list[str] = []
    asked = (question.images or [], question.caption, question.captions)
    requests = read_requests(*asked, follow_links=files.follow_links, notes=notes)
    source = find_run(question.run)
    votes = {key: value for key, value in settings.options.items() if key.startswith("knn.")}
    config = Settings(options=votes).load(file=source.paths.config)
    from ..tagging.explain import check_panel
    from ..tagging.predict import PredictOptions
    from ..tagging.predict import predict as stage
    from ..tagging.tagger import Tagger

    check_panel(answer.panel, force=answer.force)
    output.progress.say(f"tagging with {source.folder}")
    tagger = Tagger.load(
        source.folder,
        index=question.index,
        device=settings.options.get("hardware.device", "auto"),
        model=settings.options.get("model.siglip2_variant"),
        knn=config.knn,
    )
    options = PredictOptions(
        top=answer.top,
        data=files.folder,
        on_error=answer.on_error,
        voters=answer.neighbours,
        panel=answer.panel,
        force=answer.force,
        index=question.index,
    )
    output.finish(stage(tagger, requests, options, notes=notes, progress=output.progress))

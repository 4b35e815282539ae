"""``mmcli predict``: images tagged by a :class:`~mmcli.pipeline.tagging.tagger.Tagger`, and what is shown of them."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from rich.console import RenderableType

from ..core.progress import Progress
from .encode import keep_readable
from .explain import PANELS, SHOWN_VOTERS, check_panel, draw, show
from .requests import Request
from .tagger import Tagger
from .voting import Tagging


@dataclass(frozen=True, kw_only=True)
class PredictOptions:
    """Options of :func:`predict`.

    Attributes:
        data: The folder that paths of neighbours are relative to; an image of the index that lies there does not vote
            for itself.
        k: Neighbours that vote; as the run is configured when not given.
        top: Tags of an image at most.
        on_error: Whether an image that cannot be read stops everything, or is left out.
        voters: Neighbours shown a tag.
        panel: A picture to draw.
        force: Replace a picture of ours that is there.
        index: The index file, to be named in the result.
    """

    data: Path
    k: int | None = None
    top: int = 5
    on_error: Literal["stop", "skip"] = "stop"
    voters: int = SHOWN_VOTERS
    panel: Path | None = None
    force: bool = False
    index: Path | None = None


@dataclass(frozen=True, kw_only=True)
class PredictResult:
    """Images with their tags.

    Attributes:
        tagger: The tagger that tagged them.
        options: As they were given.
        images: A tagging an image that could be read.
        skipped: A reason for each image that could not.
        notes: Remarks for the user, a line each.
    """

    tagger: Tagger
    options: PredictOptions
    images: tuple[Tagging, ...]
    skipped: tuple[str, ...]
    notes: tuple[str, ...]

    @property
    def K(self) -> int:  # noqa: N802 - as everywhere
        """The number of neighbours that voted."""
        return self.tagger.voters.knn.K if self.options.k is None else self.options.k

    def to_json(self) -> dict[str, Any]:
        """The images and what tagged them, as a JSON object; ``category_names`` is the order of every ``scores``."""
        voters, options = self.tagger.voters, self.options
        return {
            "run": str(self.tagger.run.folder),
            "index": None if options.index is None else str(options.index),
            "n_index": len(voters.index),
            "bits": voters.index.bits,
            "K": self.K,
            **voters.knn.model_dump(include={"distance_metric", "voting_strategy", "tau", "theta"}),
            "panel": None if options.panel is None else str(options.panel),
            "notes": list(self.notes),
            "skipped": list(self.skipped),
            "category_names": list(self.tagger.category_names),
            "images": [tagging.to_json() for tagging in self.images],
        }

    def summary(self) -> list[RenderableType]:
        """The images with their tags and voters, the notes, and how it was voted, as they are printed."""
        parts: list[RenderableType] = []
        for tagging in self.images:
            parts += [show(tagging, voters=self.options.voters), ""]
        parts += [f"note: {note}" for note in self.notes]
        if self.skipped:
            parts += [f"{len(self.skipped):,} images could not be read:", *(f"  {why}" for why in self.skipped)]
        knn, n = self.tagger.voters.knn, len(self.tagger.voters.index)
        how = f"{self.K} neighbours of {n:,}, {knn.distance_metric}, {knn.voting_strategy} vote"
        parts.append(f"{how}; from {self.options.index or self.tagger.run.folder}")
        return parts if self.options.panel is None else [*parts, f"wrote {self.options.panel}"]


def predict(
    tagger: Tagger,
    requests: Sequence[Request],
    options: PredictOptions,
    *,
    notes: Sequence[str] = (),
    progress: Progress | None = None,
) -> PredictResult:
    """Tag images, and draw them where a picture is asked for.

    Args:
        tagger: The tagger to use.
        requests: Images and captions.
        options: See :class:`PredictOptions`.
        notes: Remarks on the requests, such as files of a folder that are left out.
        progress: Progress bars; none are shown when not given.

    Raises:
        InputError: An image cannot be read, a caption is missing, or k is larger than the index.
    """
    check_panel(options.panel, force=options.force)
    paths, captions = [request.path for request in requests], [request.caption for request in requests]
    ids = _ids_in_index(tagger, paths, options.data)
    unreadable: dict[int, str] | None = None if options.on_error == "stop" else {}
    taggings = tagger.predict(
        paths, captions, options.k, options.top, image_ids=ids, unreadable=unreadable, progress=progress
    )
    keep_readable(len(paths), unreadable)
    notes = (*tagger.notes, *notes)
    if options.panel is not None:
        draw(options.panel, taggings, data=options.data)
        if len(taggings) > PANELS:
            notes += (f"{options.panel} shows the first {PANELS} of {len(taggings):,} images",)
    if n_inside := sum(image_id is not None for image_id in ids):
        notes += (f"{n_inside:,} of the images are in the index themselves, and did not vote for themselves",)
    skipped = tuple(reason for _, reason in sorted((unreadable or {}).items()))
    return PredictResult(tagger=tagger, options=options, images=tuple(taggings), skipped=skipped, notes=notes)


def _ids_in_index(tagger: Tagger, paths: Sequence[Path], data: Path) -> list[int | None]:
    """The id of every image that is a sample of the index: the same file below the data folder."""
    root = data.resolve()
    files = [path.resolve() for path in paths]
    inside = [file.relative_to(root).as_posix() if file.is_relative_to(root) else None for file in files]
    if not any(inside):
        return [None] * len(files)
    index = tagger.voters.index
    ids = {path: int(image_id) for path, image_id in zip(index.paths.to_pylist(), index.image_id, strict=True) if path}
    return [None if path is None else ids.get(path) for path in inside]

"""Tag images and say why; by :class:`~mmcli.pipeline.tagging.tagger.Tagger`, as anybody may from Python."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from rich.console import RenderableType

from ... import InputError
from ..core.progress import Progress
from .explain import SHOWN_VOTERS, show
from .panel import PANELS, check_panel, draw
from .requests import Request
from .tagger import BATCH, Tagger
from .tagging import Tagging


@dataclass(frozen=True, kw_only=True)
class PredictResult:
    """Images with their tags.

    Attributes:
        tagger: What tagged them.
        index: The index file, where one was named.
        k: Neighbours that voted.
        images: A tagging an image that could be read.
        skipped: Why the others could not.
        voters: Neighbours shown a tag.
        panel: The picture that was drawn.
        notes: What a person should know.
    """

    tagger: Tagger
    index: Path | None
    k: int
    images: tuple[Tagging, ...]
    skipped: tuple[str, ...]
    voters: int
    panel: Path | None
    notes: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """One JSON object; ``category_names`` is the order of every ``scores``."""
        voters = self.tagger.voters
        return {
            "run": str(self.tagger.run.folder), "index": None if self.index is None else str(self.index),
            "n_index": len(voters.index), "bits": voters.index.bits, "K": self.k,
            "distance_metric": voters.knn.distance_metric, "voting_strategy": voters.knn.voting_strategy,
            "tau": voters.knn.tau, "theta": voters.knn.theta, "panel": None if self.panel is None else str(self.panel),
            "notes": list(self.notes), "skipped": list(self.skipped),
            "category_names": list(self.tagger.category_names), "images": [one.to_json() for one in self.images],
        }  # fmt: skip

    def summary(self) -> list[RenderableType]:
        """What a person reads."""
        parts: list[RenderableType] = []
        for one in self.images:
            parts += [show(one, voters=self.voters), ""]
        parts += [f"note: {note}" for note in self.notes]
        if self.skipped:
            parts += [f"{len(self.skipped):,} images could not be read:", *(f"  {why}" for why in self.skipped)]
        voters = self.tagger.voters
        how = (
            f"{self.k} neighbours of {len(voters.index):,}, {voters.knn.distance_metric}, {voters.knn.voting_strategy}"
        )
        parts.append(f"{how} vote; from {self.index or self.tagger.run.folder}")
        return parts if self.panel is None else [*parts, f"wrote {self.panel}"]


def predict(
    tagger: Tagger, requests: Sequence[Request], *, k: int | None = None, top: int = 5, data: Path,
    on_error: Literal["stop", "skip"] = "stop", voters: int = SHOWN_VOTERS, panel: Path | None = None,
    force: bool = False, index: Path | None = None, notes: Sequence[str] = (), progress: Progress | None = None,
) -> PredictResult:  # fmt: skip
    """Tag images.

    Args:
        tagger: What tags them.
        requests: Images and captions.
        k: Neighbours that vote; as the run is configured when not given.
        top: Tags of an image at most.
        data: The folder that paths of neighbours are relative to; an image of the index that lies there does not vote
            for itself.
        on_error: Whether an image that cannot be read stops everything, or is left out.
        voters: Neighbours shown a tag.
        panel: A picture to draw.
        force: Replace a picture of ours that is there.
        index: The index file, to be named in the result.
        notes: What a person should know of the requests, such as files of a folder that are left out.
        progress: Who to tell.

    Raises:
        InputError: An image cannot be read, a caption is missing, or k is larger than the index.
    """
    check_panel(panel, force=force)
    tagger.encoder.check_captions([one.path for one in requests], [one.caption for one in requests])
    ids = _own_ids(tagger, requests, data)
    found, bad = _tag(tagger, requests, ids, k, top, on_error, progress or Progress())
    notes = (*tagger.notes, *notes)
    if panel is not None:
        draw(panel, found, data=data)
        if len(found) > PANELS:
            notes += (f"{panel} shows the first {PANELS} of {len(found):,} images",)
    own = sum(known is not None for known in ids)
    if own:
        notes += (f"{own:,} of the images are in the index themselves, and did not vote for themselves",)
    return PredictResult(
        tagger=tagger, index=index, k=tagger.voters.knn.K if k is None else k, images=tuple(found),
        skipped=tuple(bad[row] for row in sorted(bad)), voters=voters, panel=panel, notes=notes,
    )  # fmt: skip


def _tag(
    tagger: Tagger, requests: Sequence[Request], ids: Sequence[int | None], k: int | None, top: int,
    on_error: Literal["stop", "skip"], progress: Progress,
) -> tuple[list[Tagging], dict[int, str]]:  # fmt: skip
    """Taggings of the images that can be read, and why the others cannot; at least one can."""
    found: list[Tagging] = []
    bad: dict[int, str] = {}
    with progress.task("images", len(requests)) as task:
        for start in range(0, len(requests), BATCH):
            part = requests[start : start + BATCH]
            unreadable: dict[int, str] | None = None if on_error == "stop" else {}
            found += tagger.predict(
                [one.path for one in part], [one.caption for one in part], k, top,
                image_ids=ids[start : start + BATCH], unreadable=unreadable,
            )  # fmt: skip
            bad |= {start + at: why for at, why in (unreadable or {}).items()}
            task.advance(len(part))
    if not found:
        raise InputError(f"no image that can be read, and this is the first: {bad[0]}")
    return found, bad


def _own_ids(tagger: Tagger, requests: Sequence[Request], data: Path) -> list[int | None]:
    """The id of every image that is a sample of the index: the same file below the data folder."""
    root = data.resolve()
    files = [one.path.resolve() for one in requests]
    inside = [file.relative_to(root).as_posix() if file.is_relative_to(root) else None for file in files]
    if not any(inside):
        return [None] * len(files)
    index = tagger.voters.index
    known = {path: int(at) for path, at in zip(index.paths.to_pylist(), index.image_id, strict=True) if path}
    return [None if path is None else known.get(path) for path in inside]

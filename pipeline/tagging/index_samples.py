"""New samples for an index: a manifest's images and captions, encoded as the run's own were."""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from ... import InputError
from ..core.progress import Progress
from ..data.manifest import Manifest, resolve_image
from .encode import Coded, RunEncoder
from .tag_index import TagIndex
from .tagger import BATCH


def encode_samples(
    listing: Manifest, data: Path, encoder: RunEncoder, on_error: Literal["stop", "skip"], progress: Progress
) -> tuple[TagIndex, tuple[str, ...]]:
    """The samples of a manifest as an index of their own.

    Args:
        listing: The samples; the first caption of each counts.
        data: The folder that their paths are relative to.
        encoder: Of the run whose index they are for.
        on_error: Whether an image that cannot be read stops everything, or is left out.
        progress: Who to tell.

    Returns:
        The index, and why the images that are not in it cannot be read.

    Raises:
        InputError: An image cannot be read, or none can, or a path or a link leaves the data folder.
    """
    bad: dict[int, str] = {}
    captions = [texts[0] for texts in listing.captions]
    files = [resolve_image(data, path) for path in listing.paths]
    parts = []
    with progress.task("samples", len(listing)) as task:
        for start in range(0, len(listing), BATCH):
            rows = range(start, min(start + BATCH, len(listing)))
            found: dict[int, str] | None = None if on_error == "stop" else {}
            coded = encoder.encode([files[r] for r in rows], [captions[r] for r in rows], unreadable=found)
            parts.append(coded.without(found or {}))
            bad |= {rows[at]: why for at, why in (found or {}).items()}
            task.advance(len(rows))
    kept = np.array([row for row in range(len(listing)) if row not in bad], np.int64)
    if not len(kept):
        raise InputError(f"no image that can be read, and this is the first: {bad[0]}")
    return _as_index(listing, kept, captions, _joined(parts), encoder), tuple(bad[row] for row in sorted(bad))


def _joined(parts: Sequence[Coded]) -> Coded:
    packed = [part.packed for part in parts if part.packed is not None]
    return Coded(np.concatenate([part.soft for part in parts]), np.concatenate(packed) if packed else None)


def _as_index(
    listing: Manifest, kept: npt.NDArray[np.int64], captions: Sequence[str], coded: Coded, encoder: RunEncoder
) -> TagIndex:
    return TagIndex(
        image_id=listing.image_ids[kept], soft=coded.soft, packed=coded.packed, labels=listing.labels_matrix()[kept],
        category_names=listing.category_names, origin=encoder.origin,
        paths=pa.array([listing.paths[r] for r in kept], pa.string()),
        captions=pa.array([captions[r] for r in kept], pa.string()),
    )  # fmt: skip

"""Images that cannot be read: they stop everything, or are left out with a reason and tried again by a later run.

Only what is wrong with a file itself is recorded. Trouble of the file system stops everything, since it passes.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np

from ... import InputError
from ...cache import StoreWriter
from ..core.safe_paths import resolve_image
from .images import PatchSpec, read_patches
from .images_part import UnreadableImage, image_size

OnError = Literal["stop", "skip"]
Reasons = dict[int, str]


class Unreadable:
    """What this process knows of the images that cannot be read.

    Args:
        data: The folder that paths are relative to.
        paths: The path of every row of the store.
        on_error: Whether an image that cannot be read stops everything, or is left out and recorded.
        spec: What is done to an image before the tower sees it.

    Attributes:
        data: That folder.
        reasons: Rows that were found unreadable, and why.
    """

    def __init__(self, data: Path, paths: Sequence[str], on_error: OnError, spec: PatchSpec) -> None:
        self.data, self._paths, self._on_error, self._spec = data, paths, on_error, spec
        self.reasons: Reasons = {}

    def record(self, reasons: Reasons) -> None:
        """Note rows that cannot be read.

        Raises:
            InputError: There is one, and ``on_error`` is ``stop``.
        """
        if reasons and self._on_error == "stop":
            raise InputError(f"{next(iter(reasons.values()))}, or leave such images out with --on-error skip")
        self.reasons |= reasons

    def retry(self, writer: StoreWriter) -> None:
        """Look at images that an earlier run skipped; a shard with one that can be read now is made again.

        Raises:
            InputError: As for :meth:`record`.
        """
        mended = []
        for shard, rows in writer.skipped.items():
            found = {row: self._refusal(row) for row in rows}
            still = {row: reason for row, reason in found.items() if reason is not None}
            self.record(still)
            if len(still) < len(rows):
                mended.append(shard)
        # Only now: a refusal must not leave a store unfinished that was finished.
        for shard in mended:
            writer.redo(shard)

    def why(self, row: int) -> str:
        """Why a row of the store was skipped, by this process or by another one."""
        found = self.reasons.get(row) or self._refusal(row)
        return found or "it could not be read, and can be now: run `mmcli extract` again"

    def _refusal(self, row: int) -> str | None:
        try:
            path, spec = resolve_image(self.data, self._paths[row]), self._spec
            grid = spec.grid(*image_size(path))
            read_patches(path, grid, spec, np.empty((grid.tokens, spec.width), np.uint8))
        except UnreadableImage as error:
            return str(error)
        return None

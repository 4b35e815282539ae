"""Pictures of a data set, small, and with their captions: read from the data folder alone, once each.

A path from a manifest never leads out of the data folder. An image that is missing or damaged has no picture, and the
page says its number instead; trouble of the file system stops the report.
"""

import base64
import io
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from PIL import Image

from ... import InputError
from ..core.safe_paths import resolve_image
from ..data.manifest import Manifest
from ..extraction.images_part import UnreadableImage, open_rgb

QUALITY = 72


@dataclass(frozen=True, kw_only=True)
class Picture:
    """A small picture: a WebP file's bytes, its size in pixels, and the name of a file for it."""

    webp: bytes = field(repr=False)
    width: int
    height: int
    file: str

    @cached_property
    def uri(self) -> str:
        """The picture itself as an address."""
        return "data:image/webp;base64," + base64.b64encode(self.webp).decode("ascii")


class Pictures:
    """Pictures and captions by image id.

    Args:
        data: The data folder; None where there is none.
        listing: Its manifest, likewise.
    """

    def __init__(self, data: Path | None, listing: Manifest | None) -> None:
        self._data, self._listing = data, listing
        ids = [] if listing is None else listing.image_ids.tolist()
        self._row = {image: row for row, image in enumerate(ids)}
        self._made: dict[tuple[int, int], Picture | None] = {}

    def __bool__(self) -> bool:
        return self._listing is not None

    def caption(self, image_id: int) -> str:
        """The first caption, which val and test are tagged by; nothing where it is not known."""
        row = self._row.get(image_id)
        if row is None or self._listing is None:
            return ""
        return self._listing.captions[row][0]

    def picture(self, image_id: int, side: int) -> Picture | None:
        """The picture, its longer side at most ``side`` pixels; None where it cannot be read."""
        if (image_id, side) not in self._made:
            self._made[image_id, side] = self._make(image_id, side)
        return self._made[image_id, side]

    def _make(self, image_id: int, side: int) -> Picture | None:
        row = self._row.get(image_id)
        if row is None or self._listing is None or self._data is None:
            return None
        try:
            path = resolve_image(self._data, self._listing.paths[row])
        except InputError:
            return None
        try:
            image = open_rgb(path)
        except UnreadableImage:
            return None
        image.thumbnail((side, side), Image.Resampling.LANCZOS)
        stream = io.BytesIO()
        image.save(stream, "WEBP", quality=QUALITY)
        return Picture(
            webp=stream.getvalue(), width=image.width, height=image.height, file=f"{image_id}-{side}.webp"
        )  # fmt: skip

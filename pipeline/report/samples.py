"""``mmcli samples``: a sheet of random images with their tags and captions, to look at before any training."""

import textwrap
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.console import RenderableType

from ...errors import InputError
from ..core.files import DRAWN, is_drawn, refuse_existing, resolve_image, write_whole
from ..core.json_result import JsonResult
from ..data.manifest import SPLITS, Manifest, read_manifest
from ..extraction.images import open_rgb
from ..tagging.explain import plain
from .plots import INK, LINE, MUTED, PAPER, canvas

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SIDE = 360  # pixels of a picture's longer side
WIDTH, HEIGHT = 2.7, 3.7  # inches of a picture with its text
LETTERS, TAG_LINES, CAPTION_LINES = 36, 2, 4


@dataclass(frozen=True, kw_only=True)
class SamplesResult(JsonResult):
    """The sheet, its images by id in order, those that could not be read, and of how many images they were drawn."""

    path: Path
    image_ids: tuple[int, ...]
    unreadable: tuple[str, ...]
    n_images: int
    seed: int

    def summary(self) -> list[RenderableType]:
        """What the command prints at its end."""
        lines = [f"cannot be read: {line}" for line in self.unreadable]
        return [*lines, f"{len(self.image_ids)} of {self.n_images:,} images, seed {self.seed}", f"wrote {self.path}"]


def samples(
    data: Path,
    *,
    n: int = 16,
    split: str | None = None,
    seed: int = 42,
    out: Path = Path("samples.png"),
    force: bool = False,
) -> SamplesResult:
    """Draw a sheet of random images.

    Args:
        data: The data set's folder, with its manifest.
        n: Number of images, drawn without replacement; all where there are not so many.
        split: Draw from this split alone.
        seed: Seed of the draw.
        out: The picture to write, a ``.png``.
        force: Replace a picture that mmcli drew.

    Raises:
        InputError: No manifest, no such split, or a file that exists or cannot be written.
    """
    if out.suffix.lower() != ".png" or out.is_dir():
        raise InputError("no such picture", where="--out", got=out, wanted="a file .png", do="as in --out samples.png")
    refuse_existing(out, is_drawn, force=force, what="a picture that mmcli drew", option="--out")
    manifest = read_manifest(data / "manifest.parquet")
    if split is not None and split not in SPLITS:
        raise InputError("no such split", where="--split", got=split, wanted=", ".join(SPLITS), do="choose one of them")
    candidates = np.arange(len(manifest)) if split is None else manifest.rows(split)
    if not len(candidates):
        raise InputError("an empty manifest", where=data, got="no image", wanted="some", do="run `mmcli prepare`")
    rows = np.random.default_rng(seed).choice(candidates, min(n, len(candidates)), replace=False).tolist()
    n_columns = min(len(rows), max(1, round((len(rows) * HEIGHT / WIDTH) ** 0.5)))
    n_lines = -(-len(rows) // n_columns)
    labels, unreadable = manifest.labels_matrix(), []
    with canvas((WIDTH * n_columns, HEIGHT * n_lines), dpi=110) as figure:
        axes: Any = figure.subplots(n_lines, n_columns, squeeze=False)
        for axis in axes.flat[len(rows) :]:
            axis.axis("off")
        for axis, row in zip(axes.flat, rows, strict=False):
            tags = ", ".join(plain(manifest.category_names[c]) for c in np.flatnonzero(labels[row]))
            title = f"{manifest.image_ids[row]} · {manifest.splits[row]}\n{_wrap(tags or 'no tag', TAG_LINES)}"
            axis.set_title(title, fontsize=8, loc="left")
            caption = _wrap(plain(manifest.first_captions[row]), CAPTION_LINES)
            axis.set_xlabel(caption, fontsize=8, color=MUTED, loc="left")
            try:
                _draw_image(axis, data, manifest, row)
            except InputError as error:
                unreadable.append(str(error))
                axis.set_facecolor(LINE)
                axis.text(0.5, 0.5, "cannot be read", ha="center", va="center", transform=axis.transAxes, color=INK)
        write_whole(out, lambda temporary: figure.savefig(temporary, format="png", metadata=DRAWN))
    return SamplesResult(
        path=out,
        image_ids=tuple(int(manifest.image_ids[row]) for row in rows),
        unreadable=tuple(unreadable),
        n_images=len(candidates),
        seed=seed,
    )


def _draw_image(axis: "Axes", data: Path, manifest: Manifest, row: int) -> None:
    """Draw an image into the middle of a square frame.

    Raises:
        InputError: It cannot be read.
    """
    axis.grid(visible=False)
    axis.set(xticks=[], yticks=[], facecolor=PAPER)
    axis.set_box_aspect(1)
    for spine in axis.spines.values():
        spine.set(visible=True, color=LINE)
    image = open_rgb(resolve_image(data, manifest.paths[row]))
    image.thumbnail((SIDE, SIDE))
    axis.imshow(np.asarray(image))
    half = max(image.size) / 2
    x, y = image.width / 2, image.height / 2
    axis.set(xlim=(x - half, x + half), ylim=(y + half, y - half))


def _wrap(text: str, n_lines: int) -> str:
    return "\n".join(textwrap.wrap(text, LETTERS, max_lines=n_lines, placeholder=" ..."))

"""``mmcli samples``: a sheet of random images with their tags and captions, to look at before any training."""

import textwrap
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.console import RenderableType

from ...errors import InputError
from ..core.files import DRAWN, is_drawn, refuse_existing, resolve_image, write_whole
from ..data.manifest import SPLITS, Manifest, read_manifest
from ..extraction.images import open_rgb
from ..tagging.explain import plain
from .plots import INK, LINE, MUTED, PAPER, STYLE

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SIDE = 360  # pixels of a picture's longer side
CELL = (2.7, 3.7)  # inches
LETTERS, TAG_LINES, CAPTION_LINES = 36, 2, 4


@dataclass(frozen=True, kw_only=True)
class SamplesResult:
    """What was drawn: the images by id in the sheet's order, and those that could not be read."""

    path: Path
    image_ids: tuple[int, ...]
    unreadable: tuple[str, ...]
    n_images: int
    seed: int

    def to_json(self) -> dict[str, Any]:
        """One JSON object."""
        return {
            "path": str(self.path),
            "image_ids": list(self.image_ids),
            "unreadable": list(self.unreadable),
            "n_images": self.n_images,
            "seed": self.seed,
        }

    def summary(self) -> list[RenderableType]:
        """What a person reads at the end."""
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
    """Draw the sheet.

    Args:
        data: The data set's folder, with its manifest.
        n: Images, drawn without replacement; all where there are not so many.
        split: Of one split alone.
        seed: Of the draw.
        out: The picture, a ``.png``.
        force: Replace one that is there.

    Raises:
        InputError: No manifest, no such split, or a file that is there or cannot be written.
    """
    _check_out(out, force=force)
    listing = read_manifest(data / "manifest.parquet")
    if split is not None and split not in SPLITS:
        raise InputError("no such split", where="--split", got=split, wanted=", ".join(SPLITS), do="choose one of them")
    rows = np.arange(len(listing)) if split is None else listing.rows(split)
    if not len(rows):
        raise InputError("an empty manifest", where=data, got="no image", wanted="some", do="run `mmcli prepare`")
    drawn = np.random.default_rng(seed).choice(rows, min(n, len(rows)), replace=False)
    unreadable = _draw(out, data, listing, [int(row) for row in drawn])
    return SamplesResult(
        path=out,
        image_ids=tuple(int(listing.image_ids[row]) for row in drawn),
        unreadable=tuple(unreadable),
        n_images=len(rows),
        seed=seed,
    )


def _check_out(out: Path, *, force: bool) -> None:
    if out.suffix.lower() != ".png" or out.is_dir():
        raise InputError("no such picture", where="--out", got=out, wanted="a file .png", do="as in --out samples.png")
    refuse_existing(out, is_drawn, force=force, what="a picture that mmcli drew", option="--out")


def _draw(out: Path, data: Path, listing: Manifest, rows: list[int]) -> list[str]:
    """Draw the images of some rows; what could not be read, a line each."""
    import matplotlib as mpl
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    columns = min(len(rows), max(1, round((len(rows) * CELL[1] / CELL[0]) ** 0.5)))
    lines = -(-len(rows) // columns)
    labels, unreadable = listing.labels_matrix(), []
    with mpl.rc_context(STYLE), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")  # a box is drawn in its place
        figure = Figure(figsize=(CELL[0] * columns, CELL[1] * lines), dpi=110, layout="constrained")
        FigureCanvasAgg(figure)
        axes: Any = figure.subplots(lines, columns, squeeze=False)
        for axis in axes.flat[len(rows) :]:
            axis.axis("off")
        for axis, row in zip(axes.flat, rows, strict=False):
            tags = [plain(listing.category_names[c]) for c in np.flatnonzero(labels[row])]
            problem = _cell(axis, data, listing, row, tags)
            if problem is not None:
                unreadable.append(problem)
        write_whole(out, lambda temporary: figure.savefig(temporary, format="png", metadata=DRAWN))
    return unreadable


def _cell(axis: "Axes", data: Path, listing: Manifest, row: int, tags: list[str]) -> str | None:
    axis.grid(visible=False)
    axis.set(xticks=[], yticks=[])
    axis.set_box_aspect(1)
    for spine in axis.spines.values():
        spine.set(visible=True, color=LINE)
    problem = None
    try:
        image = open_rgb(resolve_image(data, listing.paths[row]))
    except InputError as error:
        problem = str(error)
        axis.set_facecolor(LINE)
        axis.text(0.5, 0.5, "cannot be read", ha="center", va="center", transform=axis.transAxes, color=INK)
    else:
        image.thumbnail((SIDE, SIDE))
        axis.set_facecolor(PAPER)
        axis.imshow(np.asarray(image))
        side = max(image.size)
        axis.set(
            xlim=((image.width - side) / 2, (image.width + side) / 2),
            ylim=((image.height + side) / 2, (image.height - side) / 2),
        )
    where = f"{listing.image_ids[row]} · {listing.splits[row]}"
    axis.set_title(f"{where}\n{_wrapped(', '.join(tags) or 'no tag', TAG_LINES)}", fontsize=8, loc="left")
    axis.set_xlabel(_wrapped(plain(listing.captions[row][0]), CAPTION_LINES), fontsize=8, color=MUTED, loc="left")
    return problem


def _wrapped(text: str, lines: int) -> str:
    return "\n".join(textwrap.wrap(text, LETTERS, max_lines=lines, placeholder=" ..."))

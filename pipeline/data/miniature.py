"""A small data set in COCO's exact on-disk form, drawn from a seed: pictures, annotations, captions, splits."""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from ..core.files import write_text, write_whole
from .coco_categories import CATEGORIES
from .miniature_scenes import THEMES, Scene, Thing, draw_scene, write_captions
from .pictograms import draw_pictogram, parse_pictograms

N_TRAIN, N_VAL, N_TEST = 1300, 200, 200
RESTVAL_SHARE = 0.3  # of the train images, which come from val2014 as in Karpathy's split
SIZES = ((160, 120), (120, 160), (128, 128), (176, 112), (112, 176), (144, 128), (192, 128))
GREY = 0.02
SIX_CAPTIONS = 0.05
LAST_ID = 581_929
FOLDERS = {"train": "train2014", "restval": "val2014", "val": "val2014", "test": "val2014"}

Box = tuple[float, float, float, float]


@dataclass(frozen=True, kw_only=True)
class _Picture:
    """One picture and where its objects are, boxes as x, y, width, height in pixels."""

    image: Image.Image
    boxes: tuple[tuple[str, Box], ...]


def make_dataset(
    out: Path,
    *,
    seed: int = 42,
    n_train: int = N_TRAIN,
    n_val: int = N_VAL,
    n_test: int = N_TEST,
    progress: Callable[[int, int], None] | None = None,
) -> Path:
    """Draw a data set: the same bytes for the same seed and counts.

    Args:
        out: The data folder to fill: ``train2014/``, ``val2014/``, ``annotations/``, ``dataset_coco.json``.
        seed: Seed of every draw.
        n_train: Images to train on; a share of them is restval.
        n_val: Images of val.
        n_test: Images of test.
        progress: Called with images done and images in all.

    Returns:
        ``out``.
    """
    n_restval = int(n_train * RESTVAL_SHARE)
    counts = {"train": n_train - n_restval, "restval": n_restval, "val": n_val, "test": n_test}
    splits = [split for split, count in counts.items() for _ in range(count)]
    rng = np.random.default_rng(seed)
    ids = np.sort(rng.choice(LAST_ID, len(splits), replace=False) + 1)
    painter = _Painter()
    instances = {folder: _empty_instances(folder) for folder in ("train2014", "val2014")}
    karpathy: list[dict[str, Any]] = []
    order = rng.permutation(len(splits))
    numbers = _count_up()
    for imgid, image_id in enumerate(int(number) for number in ids):
        split = splits[order[imgid]]
        folder = FOLDERS[split]
        name = f"COCO_{folder}_{image_id:012d}.jpg"
        own = np.random.default_rng([seed, image_id])
        scene = draw_scene(own)
        picture = painter.paint(scene, own)
        _save(picture.image, out / folder / name)
        _annotate(instances[folder], image_id, name, picture, numbers)
        captions = write_captions(scene, own, 6 if own.random() < SIX_CAPTIONS else 5)
        karpathy.append(_entry(imgid, image_id, split, folder, name, captions, karpathy))
        if progress is not None:
            progress(imgid + 1, len(splits))
    for folder, content in instances.items():
        write_text(out / "annotations" / f"instances_{folder}.json", json.dumps(content))
    write_text(out / "dataset_coco.json", json.dumps({"dataset": "coco", "images": karpathy}))
    return out


def draw_legend(path: Path) -> None:
    """A sheet of the 80 pictograms with their names."""
    columns, cell, line = 10, 104, 16
    rows = -(-len(CATEGORIES) // columns)
    sheet = Image.new("RGB", (columns * cell, rows * (cell + line)), "#dfe6e2")
    draw = ImageDraw.Draw(sheet)
    pictograms = parse_pictograms()
    for number, category in enumerate(CATEGORIES):
        x, y = number % columns * cell, number // columns * (cell + line)
        tile = draw_pictogram(pictograms[category.name]).resize((cell - 12, cell - 12), Image.Resampling.LANCZOS)
        sheet.paste(tile, (x + 6, y + 6), tile)
        draw.text((x + cell / 2, y + cell), category.name, "#202020", anchor="ma")
    write_whole(path, lambda temporary: sheet.save(temporary, "PNG"))


class _Painter:
    """Paints scenes; pictograms are drawn once."""

    def __init__(self) -> None:
        self._tiles = {name: draw_pictogram(parts) for name, parts in parse_pictograms().items()}

    def paint(self, scene: Scene, rng: np.random.Generator) -> _Picture:
        width, height = SIZES[int(rng.integers(len(SIZES)))]
        image = _background(scene.theme, width, height, rng)
        # Pale things first, so that a clear one may stand in front of a pale one and not the other way.
        things = sorted(scene.things, key=lambda one: not one.faint)
        boxes = tuple((thing.name, self._place(image, thing, len(things), rng)) for thing in things)
        return _Picture(image=image.convert("L") if rng.random() < GREY else image, boxes=boxes)

    def _place(self, image: Image.Image, thing: Thing, crowd: int, rng: np.random.Generator) -> Box:
        small = min(image.size)
        share = rng.uniform(0.16, 0.24) if thing.faint else rng.uniform(0.36, 0.58) / max(1, crowd - 1) ** 0.25
        side = max(12, int(small * share))
        stretch = rng.uniform(0.85, 1.15)
        size = (max(10, int(side * stretch)), max(10, int(side / stretch)))
        tile = self._tiles[thing.name].resize(size, Image.Resampling.BILINEAR)
        if rng.random() < 0.5:
            tile = tile.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        if thing.faint:
            tile.putalpha(tile.getchannel("A").point(lambda alpha: int(alpha * 0.4)))
        x = int(rng.integers(0, image.width - size[0] + 1))
        y = int(rng.integers(int(0.15 * (image.height - size[1])), image.height - size[1] + 1))
        image.paste(tile, (x, y), tile)
        return (float(x), float(y), float(size[0]), float(size[1]))


def _background(theme: str, width: int, height: int, rng: np.random.Generator) -> Image.Image:
    """Two flat areas with a horizon, a slight hue of their own, and a little noise, as cameras have."""
    above, below = THEMES[theme][2].split()
    image = Image.new("RGB", (width, height), above)
    horizon = int(height * rng.uniform(0.4, 0.65))
    ImageDraw.Draw(image).rectangle((0, horizon, width, height), below)
    pixels = np.asarray(image).astype(np.float64) + rng.normal(0, 6, 3) + rng.normal(0, 3, (height, width, 1))
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def _save(image: Image.Image, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, "JPEG", quality=88)


def _empty_instances(folder: str) -> dict[str, Any]:
    categories = [{"supercategory": c.supercategory, "id": c.id, "name": c.name} for c in CATEGORIES]
    info = {"description": f"generated miniature of COCO, {folder}", "version": "1.0", "year": 2014}
    licence = {"id": 1, "name": "Apache-2.0", "url": "https://www.apache.org/licenses/LICENSE-2.0"}
    return {"info": info, "licenses": [licence], "images": [], "annotations": [], "categories": categories}


def _annotate(content: dict[str, Any], image_id: int, name: str, picture: _Picture, numbers: Iterator[int]) -> None:
    width, height = picture.image.size
    content["images"].append({"license": 1, "id": image_id, "file_name": name, "width": width, "height": height})
    ids = {category.name: category.id for category in CATEGORIES}
    for category, (x, y, w, h) in picture.boxes:
        outline = [x, y, x + w, y, x + w, y + h, x, y + h]
        content["annotations"].append(
            {"id": next(numbers), "image_id": image_id, "category_id": ids[category], "bbox": [x, y, w, h],
             "area": w * h, "segmentation": [outline], "iscrowd": 0}
        )  # fmt: skip


def _entry(
    imgid: int, image_id: int, split: str, folder: str, name: str, captions: list[str], before: list[dict[str, Any]]
) -> dict[str, Any]:
    """One image as Karpathy's file lists it."""
    first = before[-1]["sentids"][-1] + 1 if before else 0
    sentences = [
        {
            "tokens": text.lower().replace(".", "").replace(",", "").split(),
            "raw": text,
            "imgid": imgid,
            "sentid": first + k,
        }
        for k, text in enumerate(captions)
    ]
    return {
        "filepath": folder, "sentids": [sentence["sentid"] for sentence in sentences], "filename": name, "imgid": imgid,
        "split": split, "sentences": sentences, "cocoid": image_id,
    }  # fmt: skip


def _count_up() -> Iterator[int]:
    number = 0
    while True:
        number += 1
        yield number

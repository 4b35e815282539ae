"""A small data set in COCO's exact on-disk form, drawn from a seed: pictures, annotations, captions, splits."""

import itertools
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from ..core.files import write_text, write_whole
from .coco import CATEGORIES

FAINT = 0.25  # share of objects that are drawn small and pale
NAMED_IF_FAINT, NAMED_IF_CLEAR = 0.95, 0.6
EMPTY = 0.04  # share of pictures with no object
OBJECTS = (0.22, 0.28, 0.22, 0.14, 0.09, 0.05)  # of 1 to 6 objects
TAIL = 0.75  # exponent of the long tail inside a theme
PERSON = 0.42  # chance that a person stands in the picture

ASSETS = resources.files(__package__) / "assets"
TILE, SCALE = 100, 2  # side of a pictogram in its own units, and pixels of each


@dataclass(frozen=True, kw_only=True)
class Theme:
    """A kind of place: its background and the categories seen in it.

    Attributes:
        name: Its name.
        share: Share of pictures.
        objects: Categories from common to rare.
        places: The place in words.
        sky: Background colour above the horizon.
        ground: Background colour below it.
    """

    name: str
    share: float
    objects: tuple[str, ...]
    places: tuple[str, ...]
    sky: str
    ground: str


@dataclass(frozen=True, kw_only=True)
class Vocabulary:
    """The words and colours of scenes and captions.

    Attributes:
        themes: The themes by name.
        synonyms: Words for a category, where it has others than its name.
        naming: Sentences that name one, two and three things.
        vague: Sentences that name nothing.
    """

    themes: dict[str, Theme]
    synonyms: dict[str, list[str]]
    naming: list[list[str]]
    vague: list[str]

    @classmethod
    def read(cls) -> "Vocabulary":
        """Read the vocabulary that stands in ``assets/scenes.json``."""
        content = json.loads((ASSETS / "scenes.json").read_text("utf-8"))
        themes = [Theme(**theme) for theme in content.pop("themes")]
        return cls(themes={theme.name: theme for theme in themes}, **content)


VOCABULARY = Vocabulary.read()


@dataclass(frozen=True, kw_only=True)
class Thing:
    """One object of a scene.

    Attributes:
        name: Its category.
        faint: Whether it is drawn small and pale.
        named: Whether captions may name it.
    """

    name: str
    faint: bool
    named: bool


@dataclass(frozen=True, kw_only=True)
class Scene:
    """A theme and the objects in it, none to six."""

    theme: str
    things: tuple[Thing, ...]


def draw_scene(rng: np.random.Generator) -> Scene:
    """Draw a theme and its objects; classes are long-tailed inside a theme, themes differ in how common they are."""
    themes = VOCABULARY.themes
    theme = str(rng.choice(list(themes), p=[theme.share for theme in themes.values()]))
    if rng.random() < EMPTY:
        return Scene(theme=theme, things=())
    count = 1 + int(rng.choice(len(OBJECTS), p=OBJECTS))
    objects = themes[theme].objects
    weight = 1.0 / np.arange(1, len(objects) + 1) ** TAIL
    names = [str(name) for name in rng.choice(objects, size=count, p=weight / weight.sum())]
    if rng.random() < PERSON:
        names[-1] = "person"
    elif rng.random() < 0.15:
        names[-1] = CATEGORIES[int(rng.integers(len(CATEGORIES)))].name
    return Scene(theme=theme, things=tuple(_thing(name, rng) for name in names))


def write_captions(scene: Scene, rng: np.random.Generator, count: int = 5) -> list[str]:
    """Captions of a scene, each naming up to three of the things that may be named, in words of its own."""
    names = list(dict.fromkeys(thing.name for thing in scene.things if thing.named))
    return [_caption(scene.theme, names, rng) for _ in range(count)]


def _thing(name: str, rng: np.random.Generator) -> Thing:
    faint = bool(rng.random() < FAINT)
    return Thing(name=name, faint=faint, named=bool(rng.random() < (NAMED_IF_FAINT if faint else NAMED_IF_CLEAR)))


def _caption(theme: str, names: Sequence[str], rng: np.random.Generator) -> str:
    place = _pick(VOCABULARY.themes[theme].places, rng)
    if not names or rng.random() < 0.06:
        sentence = _pick(VOCABULARY.vague, rng).format(place=place)
    else:
        chosen = [str(name) for name in rng.permutation(names)[: 1 + int(rng.integers(min(3, len(names))))]]
        words = [_pick(VOCABULARY.synonyms.get(name, [name]), rng) for name in chosen]
        sentence = _pick(VOCABULARY.naming[len(words) - 1], rng).format(*words, place=place)
    for vowel in "aeiou":
        sentence = sentence.replace(f" a {vowel}", f" an {vowel}")
        sentence = f"an {sentence[2:]}" if sentence.startswith(f"a {vowel}") else sentence
    return f"{sentence[0].upper()}{sentence[1:]}{_pick(('.', '', '.'), rng)}"


def _pick(choices: Sequence[str], rng: np.random.Generator) -> str:
    return choices[int(rng.integers(len(choices)))]


N_TRAIN, N_VAL, N_TEST = 1300, 200, 200
RESTVAL_SHARE = 0.3  # of the train images, which come from val2014 as in Karpathy's split
SIZES = ((160, 120), (120, 160), (128, 128), (176, 112), (112, 176), (144, 128), (192, 128))
GREY = 0.02
SIX_CAPTIONS = 0.05
LAST_ID = 581_929
FOLDERS = {"train": "train2014", "restval": "val2014", "val": "val2014", "test": "val2014"}

Box = tuple[float, float, float, float]


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
    numbers = itertools.count(1)
    for imgid, image_id in enumerate(int(number) for number in ids):
        split = splits[order[imgid]]
        folder = FOLDERS[split]
        name = f"COCO_{folder}_{image_id:012d}.jpg"
        image_rng = np.random.default_rng([seed, image_id])
        scene = draw_scene(image_rng)
        image, boxes = painter.paint(scene, image_rng)
        _save(image, out / folder / name)
        entry = {"license": 1, "id": image_id, "file_name": name, "width": image.width, "height": image.height}
        instances[folder]["images"].append(entry)
        instances[folder]["annotations"] += [_annotation(next(numbers), image_id, *box) for box in boxes]
        captions = write_captions(scene, image_rng, 6 if image_rng.random() < SIX_CAPTIONS else 5)
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
    pictograms = read_pictograms()
    for number, category in enumerate(CATEGORIES):
        x, y = number % columns * cell, number // columns * (cell + line)
        tile = draw_pictogram(pictograms[category.name]).resize((cell - 12, cell - 12), Image.Resampling.LANCZOS)
        sheet.paste(tile, (x + 6, y + 6), tile)
        draw.text((x + cell / 2, y + cell), category.name, "#202020", anchor="ma")
    write_whole(path, lambda temporary: sheet.save(temporary, "PNG"))


def read_pictograms() -> dict[str, list[list[str]]]:
    """The parts of each pictogram by category name, in painting order, from ``assets/pictograms.txt``.

    A line is ``name: part; part; ...``, painted in order in a square of 100 by 100. Parts: ``e colour x0 y0 x1 y1`` an
    ellipse, ``r colour x0 y0 x1 y1`` a rectangle, ``p colour x y x y ...`` a polygon, ``l colour width x y x y ...`` a
    line, ``a colour width x0 y0 x1 y1 from to`` an arc in degrees.
    """
    lines = (line.partition(": ") for line in (ASSETS / "pictograms.txt").read_text("utf-8").splitlines())
    return {name: [part.split() for part in parts.split("; ")] for name, _, parts in lines}


def draw_pictogram(parts: list[list[str]]) -> Image.Image:
    """One pictogram on a transparent square, RGBA, ``TILE * SCALE`` pixels a side."""
    image = Image.new("RGBA", (TILE * SCALE, TILE * SCALE))
    draw = ImageDraw.Draw(image)
    for kind, colour, *words in parts:
        numbers = [SCALE * float(word) for word in words]
        if kind == "e":
            draw.ellipse(numbers, colour)
        elif kind == "r":
            draw.rectangle(numbers, colour)
        elif kind == "p":
            draw.polygon(numbers, colour)
        elif kind == "l":
            draw.line(numbers[1:], colour, round(numbers[0]), joint="curve")
        else:
            start, end = (float(word) for word in words[-2:])
            draw.arc(numbers[1:5], start, end, colour, round(numbers[0]))
    return image


class _Painter:
    """Paints scenes; every pictogram is drawn once."""

    def __init__(self) -> None:
        self._tiles = {name: draw_pictogram(parts) for name, parts in read_pictograms().items()}

    def paint(self, scene: Scene, rng: np.random.Generator) -> tuple[Image.Image, list[tuple[str, Box]]]:
        """The picture of a scene, and where its objects are: x, y, width and height in pixels."""
        width, height = SIZES[int(rng.integers(len(SIZES)))]
        image = _background(scene.theme, width, height, rng)
        # Pale things first, so that a clear one may stand in front of a pale one and not the other way.
        things = sorted(scene.things, key=lambda thing: not thing.faint)
        boxes = [(thing.name, self._place(image, thing, len(things), rng)) for thing in things]
        return image.convert("L") if rng.random() < GREY else image, boxes

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
    sky, ground = VOCABULARY.themes[theme].sky, VOCABULARY.themes[theme].ground
    image = Image.new("RGB", (width, height), sky)
    horizon = int(height * rng.uniform(0.4, 0.65))
    ImageDraw.Draw(image).rectangle((0, horizon, width, height), ground)
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


def _annotation(number: int, image_id: int, category: str, box: Box) -> dict[str, Any]:
    x, y, w, h = box
    return {
        "id": number,
        "image_id": image_id,
        "category_id": next(listed.id for listed in CATEGORIES if listed.name == category),
        "bbox": [x, y, w, h],
        "area": w * h,
        "segmentation": [[x, y, x + w, y, x + w, y + h, x, y + h]],
        "iscrowd": 0,
    }


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
        "filepath": folder,
        "sentids": [sentence["sentid"] for sentence in sentences],
        "filename": name,
        "imgid": imgid,
        "split": split,
        "sentences": sentences,
        "cocoid": image_id,
    }

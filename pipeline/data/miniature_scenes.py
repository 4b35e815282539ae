"""What is in a picture of the miniature and what its captions say: themes, objects, words.

Image and text each know something that the other does not: some objects are drawn faintly but named, others are drawn
clearly and never named.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .coco_categories import CATEGORIES

FAINT = 0.25  # share of objects that are drawn small and pale
NAMED_IF_FAINT, NAMED_IF_CLEAR = 0.95, 0.6
EMPTY = 0.04  # share of pictures with no object
OBJECTS = (0.22, 0.28, 0.22, 0.14, 0.09, 0.05)  # of 1 to 6 objects
TAIL = 0.75  # exponent of the long tail inside a theme
PERSON = 0.42  # chance that a person stands in the picture

# Classes of a theme from common to rare; the place in words; background colours above and below the horizon.
THEMES = {
    "street": ("car, traffic light, truck, bus, motorcycle, bicycle, bench, handbag, backpack, umbrella, stop sign, "
               "fire hydrant, parking meter, suitcase", ("on the street", "in the city", "on a road"), "#b9d4ee #8d9096"),
    "table": ("dining table, cup, bowl, bottle, pizza, fork, knife, cake, wine glass, sandwich, spoon, donut, banana, "
              "carrot, broccoli, apple, orange, hot dog", ("on the table", "at dinner", "in a restaurant"), "#ecd9b8 #c79f6e"),
    "room": ("chair, couch, tv, book, potted plant, clock, bed, vase, cat, remote, teddy bear, dog",
             ("in the living room", "at home", "in a room"), "#e6dcec #b08f72"),
    "sport": ("sports ball, skateboard, surfboard, tennis racket, baseball bat, baseball glove, kite, skis, frisbee, "
              "snowboard", ("in the park", "at a game", "outdoors"), "#a9dcf5 #8cc66a"),
    "field": ("dog, horse, cow, sheep, bird, elephant, zebra, giraffe, bear", ("in a field", "on the grass", "in the wild"),
              "#c6e6fa #a7b85c"),
    "desk": ("laptop, cell phone, keyboard, mouse, book, cup, tie, scissors, clock", ("on a desk", "at the office", "at work"),
             "#dfe6ea #a98d6b"),
    "kitchen": ("sink, oven, refrigerator, microwave, bottle, bowl, cup, toilet, toothbrush, toaster, hair drier",
                ("in the kitchen", "in a small flat", "indoors"), "#f2efe4 #b9c4c9"),
    "travel": ("boat, airplane, train, suitcase, bird, backpack, umbrella, bench", ("by the water", "on a trip", "at the station"),
               "#bfe3f2 #7fb2cf"),
}  # fmt: skip
THEME_SHARE = (0.2, 0.17, 0.16, 0.13, 0.12, 0.09, 0.07, 0.06)

SYNONYMS = {
    "person": ("man", "woman", "person", "guy"), "bicycle": ("bike", "bicycle"), "car": ("car",), "tv": ("tv", "television"),
    "motorcycle": ("motorbike", "motorcycle"), "airplane": ("plane", "airplane", "jet"), "couch": ("sofa", "couch"),
    "cell phone": ("phone", "cell phone"), "cat": ("cat", "kitten"), "dog": ("dog", "puppy"), "cow": ("cow", "bull"),
    "sports ball": ("ball", "sports ball"), "potted plant": ("plant", "potted plant"), "dining table": ("table", "dining table"),
    "donut": ("donut", "doughnut"), "refrigerator": ("fridge", "refrigerator"), "cup": ("cup", "mug"), "boat": ("boat", "ship"),
    "hair drier": ("hair dryer", "hair drier"), "remote": ("remote", "remote control"), "handbag": ("purse", "handbag"),
    "laptop": ("laptop", "computer"), "truck": ("truck", "lorry"), "sheep": ("sheep", "lamb"), "book": ("book",),
}  # fmt: skip
ONE = (
    "a {0} {place}",
    "a photo of a {0}",
    "there is a {0} {place}",
    "a {0}",
    "a picture of a {0} {place}",
    "close up of a {0}",
)
TWO = ("a {0} and a {1} {place}", "a {0} next to a {1}", "a {0} with a {1}", "there is a {0} near a {1} {place}")
THREE = ("a {0}, a {1} and a {2} {place}", "a {0} with a {1} and a {2}")
VAGUE = ("a scene {place}", "something {place}", "a nice view {place}", "a picture taken {place}")


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
    theme = str(rng.choice(list(THEMES), p=THEME_SHARE))
    if rng.random() < EMPTY:
        return Scene(theme=theme, things=())
    count = 1 + int(rng.choice(len(OBJECTS), p=OBJECTS))
    known = THEMES[theme][0].split(", ")
    weight = 1.0 / np.arange(1, len(known) + 1) ** TAIL
    names = [str(name) for name in rng.choice(known, size=count, p=weight / weight.sum())]
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
    place = _pick(THEMES[theme][1], rng)
    if not names or rng.random() < 0.06:
        sentence = _pick(VAGUE, rng).format(place=place)
    else:
        chosen = [str(name) for name in rng.permutation(names)[: 1 + int(rng.integers(min(3, len(names))))]]
        words = [_pick(SYNONYMS.get(name, (name,)), rng) for name in chosen]
        sentence = _pick((ONE, TWO, THREE)[len(words) - 1], rng).format(*words, place=place)
    for vowel in "aeiou":
        sentence = sentence.replace(f" a {vowel}", f" an {vowel}")
        sentence = f"an {sentence[2:]}" if sentence.startswith(f"a {vowel}") else sentence
    return f"{sentence[0].upper()}{sentence[1:]}{_pick(('.', '', '.'), rng)}"


def _pick(choices: Sequence[str], rng: np.random.Generator) -> str:
    return choices[int(rng.integers(len(choices)))]

"""What every reader of a data set gives, and how it becomes a manifest with labels and splits."""

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt

from ....errors import InputError
from ..manifest import Manifest
from ..manifest_checks import SPLITS

# How data sets name their splits.
SPLIT_NAMES = {
    "train": "train",
    "training": "train",
    "trn": "train",
    "restval": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "dev": "val",
    "test": "test",
    "testing": "test",
    "eval": "test",
    "evaluation": "test",
}
MOST_CAPTIONS = 5
SHOWN_PROBLEMS = 20


@dataclass(frozen=True, kw_only=True)
class Samples:
    """The images of a data set as a reader found them, N in all.

    Attributes:
        root: The data folder; paths are relative to it.
        paths: N paths with forward slashes.
        captions: The captions of every image; none for an image without.
        tags: The tag names of every image; none for an image without.
        splits: ``train``, ``val`` or ``test`` for every image; ``None`` where the data set has no splits.
        image_ids: N different whole numbers; ``None`` where the data set has none, and rows are counted from 1.
        category_names: All tag names in label order; those of the data in alphabetical order when ``None``.
        notes: What was recognised or guessed, a line each, for the person who reads the output.
    """

    root: Path
    paths: Sequence[str]
    captions: Sequence[Sequence[str]]
    tags: Sequence[Sequence[str]]
    splits: Sequence[str] | None = None
    image_ids: Sequence[int] | None = None
    category_names: Sequence[str] | None = None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class SplitRule:
    """How images are split where the data set does not say.

    Attributes:
        val: Share of val, in [0, 1).
        test: Share of test, in [0, 1).
        seed: Another seed gives another split.
        stratify: Whether every tag keeps these shares as far as it can.
    """

    val: float = 0.1
    test: float = 0.1
    seed: int = 42
    stratify: bool = False

    def draw(self, paths: Sequence[str], tags: Sequence[Sequence[str]]) -> list[str]:
        """A split for every image, by a hash of its path: an image keeps its split when others join or leave.

        Args:
            paths: The images' paths.
            tags: Their tags; with ``stratify`` an image is drawn among those that share its rarest tag.

        Raises:
            InputError: The shares leave nothing to train on.
        """
        if not (0 <= self.val < 1 and 0 <= self.test < 1 and self.val + self.test < 1):
            raise InputError(
                "the shares of val and test leave nothing to train on",
                got=f"--val-share {self.val:g} and --test-share {self.test:g}",
                wanted="two shares of at least 0 and together below 1",
            )
        position = np.array([_fraction(path, self.seed) for path in paths])
        if self.stratify:
            position = _ranks_within(position, _rarest(tags))
        bounds = np.array([self.test, self.test + self.val])
        names = np.array(["test", "val", "train"])
        return [str(name) for name in names[np.searchsorted(bounds, position, side="right")]]

    def describe(self) -> str:
        """The rule in one line."""
        how = "stratified by the rarest tag of an image, " if self.stratify else ""
        return (
            f"splits drawn by a hash of the path, {how}seed {self.seed}:"
            f" {self.val:.0%} val, {self.test:.0%} test, the rest train"
        )


@dataclass
class Problems:
    """Everything that is wrong with a data set, listed at once and not one after the other in as many runs."""

    where: object
    lines: list[str] = field(default_factory=list)
    count: int = 0

    def add(self, place: str, what: str, remedy: str) -> None:
        """Note a problem: where it is, what it is, and what mends it."""
        self.count += 1
        if len(self.lines) < SHOWN_PROBLEMS:
            self.lines.append(f"{place}: {what} ({remedy})")

    def check(self) -> None:
        """Refuse the data set if anything was noted.

        Raises:
            InputError: Lists the problems.
        """
        if self.count:
            more = f"; and {self.count - len(self.lines):,} more" if self.count > len(self.lines) else ""
            count = "1 problem" if self.count == 1 else f"{self.count:,} problems"
            raise InputError(f"{count} in the data set", where=self.where, do="; ".join(self.lines) + more)


def split_name(name: str) -> str | None:
    """``train``, ``val`` or ``test`` for what data sets call them, whatever its case; ``None`` for another name."""
    return SPLIT_NAMES.get(name.strip().casefold())


def to_manifest(
    samples: Samples, *, name: str, rule: SplitRule, least_images: int = 1, where: object = "data set"
) -> tuple[Manifest, tuple[str, ...]]:
    """The manifest of a data set.

    Args:
        samples: What a reader found.
        name: The data set's name.
        rule: How to split it where it has no splits.
        least_images: Tags of fewer images are left out.
        where: The file or folder, for errors.

    Returns:
        The manifest, and what was decided on the way, a line each.

    Raises:
        InputError: No image, no tag, or something that no manifest may hold.
    """
    notes = list(samples.notes)
    if not samples.paths:
        raise InputError("no images in the data set", where=where, got="nothing", wanted="at least one image")
    for what, rows in (("caption", samples.captions), ("tag", samples.tags)):
        for path, texts in zip(samples.paths, rows, strict=True):
            if not all(map(_is_unicode, texts)):
                raise InputError(f"a {what} that is not Unicode", where=f"{where}, {path}", do="mend or remove it")
    splits = samples.splits
    if splits is None:
        splits = rule.draw(samples.paths, samples.tags)
        notes.append(rule.describe())
    names = _category_names(samples, least_images, where, notes)
    label_of = {tag: label for label, tag in enumerate(names)}
    labels = [sorted({label_of[tag] for tag in tags if tag in label_of}) for tags in samples.tags]
    captions = [[text for text in texts if text.strip()][:MOST_CAPTIONS] for texts in samples.captions]
    beyond = sum(max(len([text for text in texts if text.strip()]) - MOST_CAPTIONS, 0) for texts in samples.captions)
    if beyond:
        notes.append(f"{beyond:,} captions beyond five an image were left out")
    if missing := sum(not texts for texts in captions):
        notes.append(f"{missing:,} of {len(captions):,} images have no caption")
    if untagged := sum(not row for row in labels):
        notes.append(f"{untagged:,} of {len(labels):,} images have no tag")
    listing = Manifest.from_columns(
        image_ids=list(samples.image_ids) if samples.image_ids is not None else list(range(1, len(samples.paths) + 1)),
        paths=list(samples.paths),
        splits=list(splits),
        captions=captions,
        labels=labels,
        category_names=names,
        name=name,
        where=where,
    )
    return listing, tuple(notes)


def _category_names(samples: Samples, least: int, where: object, notes: list[str]) -> list[str]:
    """The names of all labels in order, without those of too few images."""
    counts = Counter(tag for tags in samples.tags for tag in set(tags))
    if samples.category_names is None:
        names = sorted(counts)
    else:
        names = list(samples.category_names)
        if unlisted := sorted(set(counts) - set(names)):
            raise InputError(
                "tags that the list of categories does not have",
                where=where,
                got=f"{len(unlisted):,} of them, such as {', '.join(unlisted[:3])}",
                wanted="every tag of the data in the list",
                do="add them to the list, or leave --categories out",
            )
    kept = [tag for tag in names if counts[tag] >= least] if least > 1 else names
    if dropped := len(names) - len(kept):
        notes.append(f"{dropped:,} tags of fewer than {least:,} images were left out")
    if not kept:
        raise InputError(
            "no tags in the data set",
            where=where,
            got="; ".join(samples.notes) or "nothing",
            wanted="at least one tag",
            do="name their column with --tag-column; of a folder, use class/x.jpg, or x.json beside each image",
        )
    return kept


def _is_unicode(text: str) -> bool:
    """Whether a text can be written: JSON can spell half a pair of surrogates, which no file can hold."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _fraction(path: str, seed: int) -> float:
    """A number in [0, 1) that depends on a path and a seed alone."""
    digest = hashlib.blake2b(f"{seed}:{path}".encode(errors="surrogateescape"), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64


def _rarest(tags: Sequence[Sequence[str]]) -> list[str]:
    counts = Counter(tag for row in tags for tag in set(row))
    return [min(row, key=lambda tag: (counts[tag], tag)) if row else "" for row in tags]


def _ranks_within(position: npt.NDArray[np.float64], groups: Sequence[str]) -> npt.NDArray[np.float64]:
    """Positions ``(N,)`` in [0, 1) spread evenly within every group, in the order that the hash gave."""
    spread = np.empty(len(position))
    members: dict[str, list[int]] = {}
    for row, group in enumerate(groups):
        members.setdefault(group, []).append(row)
    for rows in members.values():
        order = np.argsort(position[rows], kind="stable")
        # The offset is the group's own, so that many groups of one image are not all train or all test.
        offset = position[rows].min()
        spread[np.array(rows)[order]] = (np.arange(len(rows)) + offset) / len(rows)
    return spread


__all__ = ["SPLITS", "Problems", "Samples", "SplitRule", "split_name", "to_manifest"]

"""Which images train, tune and test: the protocols of the literature, all from one manifest.

A head's figures belong to the protocol that it was trained with: under another one it has seen images of the test.
Nothing here reads or writes anything but the lists of :func:`read_lists`.
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, get_args

import numpy as np
import numpy.typing as npt

from ...cache.key import digest_of
from ...errors import InputError, read_text
from ..core.config import DataConfig, ProtocolName

if TYPE_CHECKING:
    from .manifest import Manifest

PROTOCOLS: tuple[ProtocolName, ...] = get_args(ProtocolName)
Rows = npt.NDArray[np.int64]

# Held out of what may train, to stop and to tune by: published tables have no such part, and test never tunes anything.
HELD_OUT = 20
LISTS = ("database", "train", "test")
MOST_SHOWN = 3


@dataclass(frozen=True, kw_only=True)
class Lists:
    """The lists of a deep-hashing benchmark.

    Attributes:
        folder: Where they lie, for messages.
        names: For each of database, train and test the file names of its images, in order.
        n_classes: Labels a line.
    """

    folder: Path
    names: Mapping[str, tuple[str, ...]]
    n_classes: int


def select(protocol: ProtocolName, listing: "Manifest", lists: Lists | None = None) -> dict[str, Rows]:
    """Rows of the manifest for each split of a protocol.

    - ``karpathy``: the manifest's own splits.
    - ``coco14``: images with a label below ``train2014/`` train, those below ``val2014/`` test (82,081 and 40,137 in
      the whole of COCO 2014). Every twentieth of the former, by image id, is ``val`` instead.
    - ``hashnet``: ``train`` and ``test`` as listed; ``database`` is what is searched, train among it; every twentieth
      of the database that is not in train, by image id, is ``val`` as well. It votes as a part of the database, never
      for itself.

    But for val and train within the database of ``hashnet``, no two splits share an image.

    Args:
        protocol: Its name.
        listing: The manifest.
        lists: The lists of :func:`read_lists`; for ``hashnet`` alone.

    Returns:
        Split to rows ``(n,)`` int64, ascending. Every split has an image.

    Raises:
        InputError: A split would be empty, ``hashnet`` without lists, or lists of other images.
    """
    if protocol == "karpathy":
        rows_of = {split: np.flatnonzero(listing.splits == split) for split in ("train", "val", "test")}
    elif protocol == "coco14":
        rows_of = _coco14(listing)
    elif lists is None:
        raise InputError(
            "the protocol hashnet needs its lists",
            where="--protocol-lists",
            got="nothing",
            wanted=f"a folder with {', '.join(f'{name}.txt' for name in LISTS)}",
            do="name it, or use --protocol coco14",
        )
    else:
        rows_of = _hashnet(listing, lists)
    for split, rows in rows_of.items():
        if not len(rows):
            raise InputError(
                f"no {split} image under the protocol {protocol}",
                where="the manifest",
                got=f"{len(listing.paths)} images",
                wanted=_WANTED[protocol],
                do="use --protocol karpathy, or prepare the whole data set",
            )
    return {split: rows.astype(np.int64) for split, rows in rows_of.items()}


def chosen(data: DataConfig, listing: "Manifest") -> dict[str, Rows]:
    """The rows of :func:`select` for the protocol of a configuration, its lists read.

    Raises:
        InputError: See :func:`select` and :func:`read_lists`.
    """
    lists = read_lists(Path(data.protocol_lists)) if data.protocol_lists is not None else None
    return select(data.split_type, listing, lists)


_WANTED = {
    "karpathy": "rows of every split",
    "coco14": "labelled images below train2014/ and val2014/",
    "hashnet": "images of every list",
}


def read_lists(folder: Path) -> Lists:
    """Read ``database.txt``, ``train.txt`` and ``test.txt`` in the form of the deep-hashing lists: ``path 0 1 0 ...``.

    Raises:
        InputError: A file is missing, or a line is not of that form; it is named.
    """
    names: dict[str, tuple[str, ...]] = {}
    widths: set[int] = set()
    for name in LISTS:
        path = folder / f"{name}.txt"
        wanted, do = "lines of `path 0 1 0 ...`", "name the folder of the lists with --protocol-lists"
        lines = read_text(path, "cannot read a list", wanted=wanted, do=do).splitlines()
        kept = [(number, line.split()) for number, line in enumerate(lines, 1) if line.strip()]
        for number, (_, *labels) in kept:
            widths.add(len(labels))
            if not labels or set(labels) - {"0", "1"} or len(widths) > 1:
                raise InputError(
                    "not a line of a deep-hashing list",
                    where=f"{path}, line {number}",
                    got=f"{len(labels)} labels of {', '.join(sorted(set(labels))[:MOST_SHOWN]) or 'nothing'}",
                    wanted=f"a path and {min(widths) or 'its'} labels of 0 and 1, as many in every line",
                )
        names[name] = tuple(_file(words[0]) for _, words in kept)
    return Lists(folder=folder, names=names, n_classes=max(widths, default=0))


def lists_digest(data: DataConfig) -> str:
    """Digest of what the lists of a configuration say now; empty without lists, their folder's name if unreadable."""
    if data.protocol_lists is None:
        return ""
    folder = Path(data.protocol_lists)
    files = sorted(folder.glob("*.txt"))
    contents = {path.name: path.read_bytes().decode("utf-8", "replace") for path in files}
    return digest_of(contents) if contents else str(folder)


def check_protocol(wanted: str, trained: str, *, where: object) -> None:
    """Refuse to evaluate a run under a protocol that it was not trained with: it may have seen images of the test.

    Raises:
        InputError: The run was trained with another protocol.
    """
    if wanted != trained:
        raise InputError(
            "a run of another protocol, which may have seen these test images in training",
            where=where,
            got=f"--protocol {wanted}",
            wanted=f"{trained}, with which it was trained",
            do=f"train with `mmcli train-head --protocol {wanted}`, or leave --protocol out",
        )


def _coco14(listing: "Manifest") -> dict[str, Rows]:
    labelled = listing.labels_matrix().any(axis=1)
    folder = np.array([_coco_folder(path) for path in listing.paths])
    first, second = (np.flatnonzero(labelled & (folder == name)) for name in ("train2014", "val2014"))
    held = _held_out(listing.image_ids, first)
    return {"train": np.setdiff1d(first, held), "val": held, "test": second}


def _hashnet(listing: "Manifest", lists: Lists) -> dict[str, Rows]:
    C = listing.labels_matrix().shape[1]
    if lists.n_classes != C:
        raise InputError(
            "lists of other categories",
            where=lists.folder,
            got=f"{lists.n_classes} labels a line",
            wanted=f"{C}",
            do="name the lists of this data set",
        )
    row_of: dict[str, int] = {_file(path): row for row, path in enumerate(listing.paths)}
    if len(row_of) != len(listing.paths):
        raise InputError("images of one file name in the manifest, which lists cannot tell apart", where="the manifest")
    rows = {name: _listed(name, lists, row_of) for name in LISTS}
    for name in ("database", "train"):
        common = np.intersect1d(rows[name], rows["test"])
        if len(common):
            raise InputError(
                f"test images in the {name} list",
                where=lists.folder,
                got=f"{len(common)} in common",
                wanted="none",
                do="mend the lists",
            )
    free = np.setdiff1d(rows["database"], rows["train"])
    return {**rows, "val": _held_out(listing.image_ids, free)}


def _listed(name: str, lists: Lists, row_of: Mapping[str, int]) -> Rows:
    files = lists.names[name]
    unknown = [file for file in files if file not in row_of]
    twice = [file for file, count in Counter(files).items() if count > 1]
    if unknown or twice:
        what, bad = ("images that the manifest does not have", unknown) if unknown else ("images listed twice", twice)
        raise InputError(
            what,
            where=lists.folder / f"{name}.txt",
            got=f"{len(bad)} of {len(files)}, as {', '.join(bad[:MOST_SHOWN])}",
            wanted="every image of the list once in both",
            do="prepare the whole data set, or name its own lists",
        )
    return np.sort(np.array([row_of[file] for file in files], np.int64))


def _held_out(image_ids: npt.NDArray[np.int64], rows: Rows) -> Rows:
    """Every twentieth of some rows, by image id, so that it does not depend on the order of the manifest."""
    by_id = rows[np.argsort(image_ids[rows], kind="stable")]
    return np.sort(by_id[HELD_OUT // 2 :: HELD_OUT] if len(by_id) > HELD_OUT // 2 else by_id[:1])


def _coco_folder(path: str) -> str:
    parent = PurePosixPath(path).parent.parts
    return parent[-1] if parent and (len(parent) == 1 or parent[:-1] == ("images",)) else ""


def _file(path: str) -> str:
    return PurePosixPath(path.replace("\\", "/")).name

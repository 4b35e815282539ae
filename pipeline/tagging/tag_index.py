"""What neighbours are found in: codes with labels, and what a person is shown of each; from a run, or grown.

Symbols: N samples, C categories, B bits, F features of a soft code (B, or the width of z).
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from ... import InputError
from ..core.results import Codes

SHOWN = 3


@dataclass(frozen=True, kw_only=True)
class Origin:
    """What made the codes of an index; a query has to be made by the same.

    Attributes:
        head: Digest of the head (:func:`~mmcli.pipeline.tagging.encode.head_digest`).
        store: Digest of the key of the store that the head was trained from; it covers checkpoint and processing.
        model: Name of the SigLIP2 checkpoint.
        patches: Its patch budget.
        encoder: Digest of checkpoint, processing and lengths; empty where the store that knows it was gone.
    """

    head: str
    store: str
    model: str
    patches: int
    encoder: str = ""


@dataclass(frozen=True, kw_only=True, eq=False)
class TagIndex:
    """N samples that vote.

    Attributes:
        image_id: ``(N,)`` int64, every value once.
        soft: Soft codes h ``(N, F)`` float32, or z for a head without hash layer.
        packed: Hard codes ``(N, B / 8)`` uint8; ``None`` without hash layer.
        labels: ``(N, C)`` uint8, 0 or 1.
        category_names: C names, in label order.
        paths: N paths relative to a data folder; empty where nobody knows.
        captions: The caption of each code, likewise.
        origin: What made the codes.
    """

    image_id: npt.NDArray[np.int64]
    soft: npt.NDArray[np.float32]
    packed: npt.NDArray[np.uint8] | None
    labels: npt.NDArray[np.uint8]
    category_names: tuple[str, ...]
    paths: pa.StringArray
    captions: pa.StringArray
    origin: Origin

    def __len__(self) -> int:
        return len(self.image_id)

    @property
    def bits(self) -> int:
        """B; 0 without hash layer."""
        return 0 if self.packed is None else 8 * self.packed.shape[1]

    @classmethod
    def from_codes(
        cls, codes: Codes, names: Sequence[str], origin: Origin, *,
        paths: pa.StringArray | None = None, captions: pa.StringArray | None = None,
    ) -> "TagIndex":  # fmt: skip
        """The codes of a split as an index; texts that are not given are not known."""
        nothing = pa.array([""] * len(codes), pa.string())
        return cls(
            image_id=codes.image_id, soft=codes.soft, packed=codes.packed, labels=codes.labels,
            category_names=tuple(names), paths=nothing if paths is None else paths,
            captions=nothing if captions is None else captions, origin=origin,
        )  # fmt: skip

    def rows_of(self, image_ids: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Row of each of ``(n,)`` image ids, -1 where it is not here."""
        if not len(self):
            return np.full(len(image_ids), -1, np.int64)
        order = np.argsort(self.image_id)
        at = np.searchsorted(self.image_id, image_ids, sorter=order)
        found = order[np.minimum(at, len(order) - 1)]
        return np.where(self.image_id[found] == image_ids, found, -1).astype(np.int64)

    def with_names(self, names: Sequence[str]) -> "TagIndex":
        """The same with categories of other names appended; their labels are zero here."""
        new = tuple(dict.fromkeys([*self.category_names, *names]))
        wider = np.zeros((len(self), len(new)), np.uint8)
        wider[:, : self.labels.shape[1]] = self.labels
        return replace(self, labels=wider, category_names=new)

    def added(self, other: "TagIndex", *, replacing: bool = False) -> "TagIndex":
        """These samples, then the other's; category names are united, new ones come last.

        Args:
            other: Codes of the same head.
            replacing: Whether samples that are here already give way to the other's.

        Raises:
            InputError: An image id is in both, and ``replacing`` is false; or the codes are of another head.
        """
        check_origin(self.origin, other.origin, where="the samples to add")
        known = other.image_id[self.rows_of(other.image_id) >= 0]
        if len(known) and not replacing:
            raise already_there(known)
        # Empty for a moment where every sample is replaced, so not through `without`.
        mine = self._rows(np.flatnonzero(~np.isin(self.image_id, known))).with_names(other.category_names)
        place = {name: at for at, name in enumerate(mine.category_names)}
        labels = np.zeros((len(other), len(place)), np.uint8)
        labels[:, [place[name] for name in other.category_names]] = other.labels
        both: dict[str, Any] = {
            name: np.concatenate([getattr(mine, name), getattr(other, name)]) for name in ("image_id", "soft")
        }
        if mine.packed is not None and other.packed is not None:
            both["packed"] = np.concatenate([mine.packed, other.packed])
        return replace(
            mine, **both, labels=np.concatenate([mine.labels, labels]),
            paths=pa.concat_arrays([mine.paths, other.paths]),
            captions=pa.concat_arrays([mine.captions, other.captions]),
        )  # fmt: skip

    def without(self, image_ids: npt.NDArray[np.int64]) -> "TagIndex":
        """The samples but for some; categories that nobody has any more keep their place.

        Raises:
            InputError: One of the ids ``(n,)`` is not here, or nothing would be left.
        """
        absent = image_ids[self.rows_of(image_ids) < 0]
        if len(absent):
            raise InputError(
                "not in the index", got=_some_ids(absent), wanted="image ids that are there",
                do="leave them out of --ids",
            )  # fmt: skip
        kept = np.flatnonzero(~np.isin(self.image_id, image_ids))
        if not len(kept):
            raise InputError(
                "an index needs a sample", got=f"all {len(self):,} to be removed", wanted="at least one that stays",
                do="delete the file instead",
            )  # fmt: skip
        return self._rows(kept)

    def _rows(self, rows: npt.NDArray[np.int64]) -> "TagIndex":
        at = pa.array(rows)
        return replace(
            self, image_id=self.image_id[rows], soft=self.soft[rows], labels=self.labels[rows],
            packed=None if self.packed is None else self.packed[rows],
            paths=self.paths.take(at), captions=self.captions.take(at),
        )  # fmt: skip


def check_origin(index: Origin, query: Origin, *, where: object) -> None:
    """Refuse codes that another head, or the same head on another encoder, has made.

    Raises:
        InputError: They differ.
    """
    if index.head != query.head:
        raise InputError(
            "codes of another head", where=where, got=f"head {query.head[:12]}",
            wanted=f"head {index.head[:12]}, which made the index",
            do="name the --run that the index was built from, or build it again with `mmcli index build`",
        )  # fmt: skip
    if index.encoder and query.encoder and index.encoder != query.encoder:
        raise InputError(
            "embeddings of another encoder", where=where, got=f"{query.model}, encoder {query.encoder[:12]}",
            wanted=f"{index.model}, encoder {index.encoder[:12]}", do="name the --model that the index was built with",
        )  # fmt: skip


def already_there(image_ids: npt.NDArray[np.int64]) -> InputError:
    """The error for samples ``(n,)`` that an index has already."""
    return InputError(
        "already in the index", got=_some_ids(image_ids), wanted="image ids that are not there",
        do="give the samples other ids, or --force to replace the old ones",
    )  # fmt: skip


def _some_ids(ids: npt.NDArray[np.int64]) -> str:
    shown = ", ".join(map(str, ids[:SHOWN].tolist())) + (", ..." if len(ids) > SHOWN else "")
    return f"{len(ids):,} image id{'s' if len(ids) > 1 else ''}: {shown}"

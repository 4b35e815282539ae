"""Near-duplicate images across splits: the same picture among the neighbours and among the questions flatters a figure.

Every val and test image is compared with every train image, and val with test, by the cosine of raw embeddings. The
held-out images are kept in blocks, the store is read shard by shard, so memory does not grow with the store.

Symbols: ``Q`` held-out images of a block, ``n`` rows of one shard, ``D`` width.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .encode import l2_norm
from .errors import StoreError
from .index import ID
from .reader import Store

SPLITS = ("train", "val", "test")
_BLOCK_BYTES = 2**28
_PRODUCT = 2**22
# A float32 product of directions is right to about this; the best of each shard is computed again in float64, and
# rounded to what directions in float32 can say, so that two copies of one image have the cosine 1.
_MARGIN, _DECIMALS = 1e-5, 6


@dataclass(frozen=True, kw_only=True)
class Leak:
    """Two images of different splits that are nearly the same; ``split`` is val or test, the cosine has 6 decimals."""

    image_id: int
    path: str
    split: str
    other_id: int
    other_path: str
    other_split: str
    cosine: float


@dataclass(frozen=True, kw_only=True)
class LeakReport:
    """The near-duplicates of a store.

    Attributes:
        threshold: The least cosine that counts.
        n_pairs: Pairs, for each two splits (``test-train``, ``val-train``, ``val-test``).
        n_images: Images of each split that were compared; skipped ones are not.
        pairs: The pairs, most similar first, as many as were asked for.
    """

    threshold: float
    n_pairs: dict[str, int]
    n_images: dict[str, int]
    pairs: tuple[Leak, ...]


def find_leaks(
    store: Store,
    threshold: float = 0.98,
    *,
    most: int = 50,
    block_bytes: int = _BLOCK_BYTES,
    check: bool = True,
    tick: Callable[[int], object] = lambda _rows: None,
) -> LeakReport:
    """Each val and test image with its nearest train image and its nearest image of the other of the two.

    Args:
        store: Its index has a column ``split``.
        threshold: Pairs with a smaller cosine are left out.
        most: Pairs to list at most; all are counted.
        block_bytes: Memory for the directions of held-out images; the store is read once for each such block.
        check: Compare every file with its checksum as it is first read.
        tick: Called with how many rows were compared, :func:`passes` times the store's rows in all.

    Raises:
        StoreError: The index has no splits, or others than train, val and test; or as for :meth:`Store.load`.
    """
    splits, kept = _splits(store), _kept(store)
    best: dict[tuple[int, int], float] = {}
    for block in _blocks(store, splits, block_bytes):
        nearest = _Nearest(splits, block, _directions(store, block, check=check), threshold)
        check = False
        for shard, arrays in store.shards("image", check=False):
            rows = shard.start + np.flatnonzero(kept[shard.start : shard.stop])
            nearest.update(rows, _unit(arrays["v_img"][rows - shard.start]))
            tick(shard.n_rows)
        best |= nearest.pairs()
    return _report(store, splits, kept, best, threshold, most)


def passes(store: Store, block_bytes: int = _BLOCK_BYTES) -> int:
    """The number of times that :func:`find_leaks` reads the store."""
    return len(_blocks(store, _splits(store), block_bytes))


class _Nearest:
    """The nearest image so far of every image of a block, in each other split.

    Args:
        splits: Split of every row of the store, ``(N,)``.
        block: Rows of the block, ``(Q,)``.
        d: Their directions, ``(Q, D)``.
        threshold: Smaller cosines need not be exact.
    """

    def __init__(
        self, splits: NDArray[np.int8], block: NDArray[np.int64], d: NDArray[np.float32], threshold: float
    ) -> None:
        self._splits, self._block, self._d, self._threshold = splits, block, d, threshold
        self._cosine = np.full((len(block), len(SPLITS)), -np.inf)
        self._row = np.full((len(block), len(SPLITS)), -1, np.int64)

    def update(self, rows: NDArray[np.int64], d: NDArray[np.float32]) -> None:
        """Compare the block with rows of the store, ``(n,)``, and their directions ``(n, D)``."""
        for split in range(len(SPLITS)):
            members = self._splits[rows] == split
            queries = np.flatnonzero(self._splits[self._block] != split)
            step = max(1, _PRODUCT // max(1, int(members.sum())))
            for start in range(0, len(queries) if members.any() else 0, step):
                self._compare(queries[start : start + step], split, rows[members], d[members])

    def _compare(self, queries: NDArray[np.int64], split: int, rows: NDArray[np.int64], d: NDArray[np.float32]) -> None:
        product = self._d[queries] @ d.T
        best = product.argmax(axis=1)
        rough = product[np.arange(len(queries)), best]
        close = rough >= np.maximum(self._cosine[queries, split], self._threshold) - _MARGIN
        queries, best = queries[close], best[close]
        exact = np.einsum("nd,nd->n", self._d[queries].astype(np.float64), d[best].astype(np.float64)).round(_DECIMALS)
        better = exact > self._cosine[queries, split]
        self._cosine[queries[better], split] = exact[better]
        self._row[queries[better], split] = rows[best[better]]

    def pairs(self) -> dict[tuple[int, int], float]:
        """Rows of the pairs at or above the threshold, a val and a test image always in that order, to their cosine."""
        pairs = {}
        for query, split in zip(*np.nonzero(self._cosine >= self._threshold), strict=True):
            row, other = int(self._block[query]), int(self._row[query, split])
            swap = split != 0 and self._splits[row] > split
            pairs[(other, row) if swap else (row, other)] = float(self._cosine[query, split])
        return pairs


def _splits(store: Store) -> NDArray[np.int8]:
    """The split of every row as its place in ``SPLITS``, ``(N,)`` int8."""
    if "split" not in store.index.column_names:
        raise StoreError(
            "the store's index has no column split",
            where=store.folder,
            got=f"columns {store.index.column_names}",
            wanted="train, val or test for each image",
        )
    names = store.index.column("split").to_pylist()
    if unknown := set(names) - set(SPLITS):
        raise StoreError("unknown split", where=store.folder, got=min(map(repr, unknown)), wanted=", ".join(SPLITS))
    return np.array([SPLITS.index(name) for name in names], np.int8)


def _kept(store: Store) -> NDArray[np.bool_]:
    kept = np.ones(store.n_images, bool)
    kept[list(store.skipped)] = False
    return kept


def _blocks(store: Store, splits: NDArray[np.int8], block_bytes: int) -> list[NDArray[np.int64]]:
    """Rows of held-out images, in order, as many together as fit."""
    rows = np.flatnonzero((splits != 0) & _kept(store))
    step = max(1, block_bytes // (4 * store.width))
    return [rows[start : start + step] for start in range(0, len(rows), step)]


def _directions(store: Store, rows: NDArray[np.int64], *, check: bool) -> NDArray[np.float32]:
    """Directions of some rows, in order, ``(Q, D)`` float32."""
    directions = np.empty((len(rows), store.width), np.float32)
    for shard, arrays in store.shards("image", check=check):
        first, last = np.searchsorted(rows, (shard.start, shard.stop))
        directions[first:last] = _unit(arrays["v_img"][rows[first:last] - shard.start])
    return directions


def _unit(v: NDArray[Any]) -> NDArray[np.float32]:
    return np.asarray(v.astype(np.float32) / l2_norm(v)[:, None])


def _report(
    store: Store,
    splits: NDArray[np.int8],
    kept: NDArray[np.bool_],
    best: dict[tuple[int, int], float],
    threshold: float,
    most: int,
) -> LeakReport:
    ids = store.index.column(ID)
    paths = store.index.column("path") if "path" in store.index.column_names else None

    def describe(row: int, prefix: str) -> dict[str, Any]:
        path, split = "" if paths is None else paths[row].as_py(), SPLITS[splits[row]]
        return {f"{prefix or 'image_'}id": ids[row].as_py(), f"{prefix}path": path, f"{prefix}split": split}

    ordered = sorted(best.items(), key=lambda item: (-item[1], item[0]))
    n_pairs = {"test-train": 0, "val-train": 0, "val-test": 0}
    for row, other in best:
        n_pairs[f"{SPLITS[splits[row]]}-{SPLITS[splits[other]]}"] += 1
    return LeakReport(
        threshold=threshold,
        n_pairs=n_pairs,
        n_images={name: int((kept & (splits == number)).sum()) for number, name in enumerate(SPLITS)},
        pairs=tuple(
            Leak(**describe(row, ""), **describe(other, "other_"), cosine=cosine)
            for (row, other), cosine in ordered[:most]
        ),
    )

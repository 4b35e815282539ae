"""Near-duplicate images across splits: the same picture among the neighbours and among the questions flatters a figure.

Every val and test image is compared with every train image, and val with test, by the cosine of raw embeddings. The
held-out images are kept in blocks, the store is read shard by shard, so memory does not grow with the store.

Symbols: ``Q`` held-out images of a block, ``n`` rows of one shard, ``D`` width.
"""

from collections.abc import Callable, Iterator
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
    """What :func:`find_leaks` found.

    Attributes:
        threshold: The least cosine that counts.
        n_pairs: Pairs found, for each two splits (``test-train``, ``val-train``, ``val-test``).
        n_images: Images of each split that were compared; skipped ones are not.
        pairs: The pairs, most similar first, as many as were asked for.
    """

    threshold: float
    n_pairs: dict[str, int]
    n_images: dict[str, int]
    pairs: tuple[Leak, ...]

    def to_json(self) -> dict[str, Any]:
        """One JSON object."""
        pairs = [vars(pair) for pair in self.pairs]
        return {"threshold": self.threshold, "n_pairs": self.n_pairs, "n_images": self.n_images, "pairs": pairs}


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
        tick: Told how many rows were compared, :func:`passes` times the store's rows in all.

    Raises:
        StoreError: The index has no splits, or others than train, val and test; or as for :meth:`Store.load`.
    """
    splits, kept = _splits(store), _kept(store)
    best: dict[tuple[int, int], float] = {}
    for block in _blocks(store, splits, block_bytes):
        nearest = _Nearest(block, splits, _directions(store, block, check=check))
        check = False
        for start, v_img in _shards(store, check=False):
            rows = np.flatnonzero(kept[start : start + len(v_img)])
            nearest.meet(start + rows, v_img[rows], threshold)
            tick(len(v_img))
        best |= nearest.pairs(threshold)
    return _report(store, splits, kept, best, threshold, most)


def passes(store: Store, block_bytes: int = _BLOCK_BYTES) -> int:
    """How often :func:`find_leaks` reads the store."""
    return len(_blocks(store, _splits(store), block_bytes))


class _Nearest:
    """The nearest image so far of every image of a block, in each other split."""

    def __init__(self, block: NDArray[np.int64], splits: NDArray[np.int8], d: NDArray[np.float32]) -> None:
        self._block, self._splits, self._d = block, splits, d
        self._cosine = np.full((len(block), len(SPLITS)), -np.inf)
        self._row = np.full((len(block), len(SPLITS)), -1, np.int64)

    def meet(self, rows: NDArray[np.int64], v_img: NDArray[Any], threshold: float) -> None:
        """Compare the block with some rows of the store.

        Args:
            rows: ``(n,)`` int64, of any splits.
            v_img: Their raw embeddings ``(n, D)``.
            threshold: Smaller cosines need not be exact.
        """
        others = _unit(v_img)
        for split in range(len(SPLITS)):
            columns = np.flatnonzero(self._splits[rows] == split)
            if not len(columns):
                continue
            asking = np.flatnonzero(self._splits[self._block] != split)
            step = max(1, _PRODUCT // len(columns))
            for at in range(0, len(asking), step):
                self._compare(asking[at : at + step], split, rows[columns], others[columns], threshold)

    def _compare(
        self, asked: NDArray[np.int64], split: int, rows: NDArray[np.int64], d: NDArray[np.float32], threshold: float
    ) -> None:
        product = self._d[asked] @ d.T
        at = product.argmax(axis=1)
        rough = product[np.arange(len(asked)), at]
        close = rough >= np.maximum(self._cosine[asked, split], threshold) - _MARGIN
        asked, at = asked[close], at[close]
        exact = np.einsum("nd,nd->n", self._d[asked].astype(np.float64), d[at].astype(np.float64))
        exact = exact.round(_DECIMALS)
        better = exact > self._cosine[asked, split]
        self._cosine[asked[better], split] = exact[better]
        self._row[asked[better], split] = rows[at[better]]

    def pairs(self, threshold: float) -> dict[tuple[int, int], float]:
        """Rows of the pairs at or above the threshold, a val and a test image always in that order, to their cosine."""
        asked, split = np.nonzero(self._cosine >= threshold)
        found = {}
        for i, s in zip(asked, split, strict=True):
            pair = int(self._block[i]), int(self._row[i, s])
            swap = s != 0 and self._splits[pair[0]] > s
            found[pair[::-1] if swap else pair] = float(self._cosine[i, s])
        return found


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
    return [rows[at : at + step] for at in range(0, len(rows), step)]


def _shards(store: Store, *, check: bool) -> Iterator[tuple[int, NDArray[Any]]]:
    for shard, arrays in store.shards("image", check=check):
        yield shard.start, arrays["v_img"]


def _directions(store: Store, rows: NDArray[np.int64], *, check: bool) -> NDArray[np.float32]:
    """Directions of some rows, in order, ``(Q, D)`` float32."""
    found = np.empty((len(rows), store.width), np.float32)
    for start, v_img in _shards(store, check=check):
        first, last = np.searchsorted(rows, (start, start + len(v_img)))
        found[first:last] = _unit(v_img[rows[first:last] - start])
    return found


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

    def of(row: int) -> tuple[int, str, str]:
        return ids[row].as_py(), "" if paths is None else paths[row].as_py(), SPLITS[splits[row]]

    ordered = sorted(best.items(), key=lambda item: (-item[1], item[0]))
    pairs = []
    for (row, other), cosine in ordered[:most]:
        (image_id, path, split), (other_id, other_path, other_split) = of(row), of(other)
        pairs.append(
            Leak(
                image_id=image_id,
                path=path,
                split=split,
                other_id=other_id,
                other_path=other_path,
                other_split=other_split,
                cosine=cosine,
            )
        )
    n_pairs = {"test-train": 0, "val-train": 0, "val-test": 0}
    for row, other in best:
        n_pairs[f"{SPLITS[splits[row]]}-{SPLITS[splits[other]]}"] += 1
    n_images = {name: int((kept & (splits == at)).sum()) for at, name in enumerate(SPLITS)}
    return LeakReport(threshold=threshold, n_pairs=n_pairs, n_images=n_images, pairs=tuple(pairs))

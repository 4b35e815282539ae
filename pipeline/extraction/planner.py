"""Which images go through the tower together: a pure plan, with no file touched.

A batch holds images of one patch grid, so it needs no padding and no attention mask; its size is bounded in tokens, so
its memory is bounded whatever the shapes. A plan covers one shard and depends on nothing else, so a shard comes out the
same whether it is the first of a long run or the only one that a resumed run still has to make.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from .images import Grid


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Images of one grid.

    Attributes:
        grid: Their grid.
        rows: Their rows in the shard, rising.
    """

    grid: Grid
    rows: tuple[int, ...]

    @property
    def tokens(self) -> int:
        """Patches of all images together."""
        return self.grid.tokens * len(self.rows)


def plan(grids: Sequence[Grid | None], *, tokens: int) -> list[Batch]:
    """Group the images of a shard by grid and cut each group into even batches.

    Args:
        grids: The grid of every image in the shard's order; None for an image that cannot be read.
        tokens: Most patches of a batch. An image that has more by itself is a batch of its own.

    Returns:
        Batches, the grids in order of first appearance; every readable image is in exactly one.

    Raises:
        ValueError: ``tokens`` is not positive.
    """
    if tokens < 1:
        raise ValueError(f"a batch of {tokens} tokens holds nothing")
    groups: dict[Grid, list[int]] = {}
    for row, grid in enumerate(grids):
        if grid is not None:
            groups.setdefault(grid, []).append(row)
    return [
        Batch(grid=grid, rows=tuple(rows[start:stop]))
        for grid, rows in groups.items()
        for start, stop in even_cuts(len(rows), max(1, tokens // grid.tokens))
    ]


def even_cuts(count: int, most: int) -> list[tuple[int, int]]:
    """Cut ``count`` things into as few runs of at most ``most`` as there can be; their sizes differ by at most one."""
    parts = -(-count // most)
    return list(pairwise(part * count // parts for part in range(parts + 1))) if parts else []

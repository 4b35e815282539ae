"""A plan covers every readable image once, in batches of one grid that fit the budget, and depends on its shard alone."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmcli.pipeline.extraction.images import Grid
from mmcli.pipeline.extraction.reader import even_cuts, plan

GRIDS = st.lists(st.none() | st.builds(Grid, st.integers(1, 4), st.integers(1, 5)), max_size=60)


@given(GRIDS, st.integers(1, 70))
def test_every_readable_image_is_in_one_batch_of_its_grid(grids, tokens) -> None:
    batches = plan(grids, tokens=tokens)
    placed = [row for batch in batches for row in batch.rows]
    assert sorted(placed) == [row for row, grid in enumerate(grids) if grid is not None]
    for batch in batches:
        assert all(grids[row] == batch.grid for row in batch.rows)
        assert list(batch.rows) == sorted(batch.rows)
        assert batch.tokens <= tokens or len(batch.rows) == 1


@given(GRIDS, st.integers(1, 70))
def test_there_are_no_more_batches_than_needed_and_they_are_even(grids, tokens) -> None:
    batches = plan(grids, tokens=tokens)
    for grid in {batch.grid for batch in batches}:
        sizes = [len(batch.rows) for batch in batches if batch.grid == grid]
        assert len(sizes) == -(-sum(sizes) // max(1, tokens // grid.tokens))
        assert max(sizes) - min(sizes) <= 1


@given(GRIDS, st.integers(1, 70))
def test_grids_come_in_the_order_of_first_appearance(grids, tokens) -> None:
    seen = list(dict.fromkeys(batch.grid for batch in plan(grids, tokens=tokens)))
    assert seen == list(dict.fromkeys(grid for grid in grids if grid is not None))


def test_an_unreadable_image_changes_no_other_grid() -> None:
    a, b = Grid(2, 2), Grid(1, 3)
    whole = plan([a, b, a, b, b], tokens=8)
    less = plan([a, None, a, b, b], tokens=8)
    assert [batch for batch in whole if batch.grid == a] == [batch for batch in less if batch.grid == a]


def test_a_budget_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="holds nothing"):
        plan([Grid(1, 1)], tokens=0)
    assert even_cuts(0, 3) == []

"""Several writers of one store: each its shards, however they were cut; the manifest only when all are whole."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmcli.cache import Store, StoreBusy, StoreError, StoreUnfinished, Stripe, verify
from mmcli.cache.layout import MANIFEST


def write(kit, folder, stripe, **options):
    data = kit.Data()
    with data.writer(folder, kit.key(), stripe=stripe, **options) as writer:
        data.fill(writer)
        writer.finish()
        return writer.finished


@given(st.integers(1, 9), st.data())
def test_stripes_of_stripes_still_cover_every_shard_once(n, data) -> None:
    """Machines with different numbers of processes share one store: each cuts its own stripe further."""
    cut = [data.draw(st.integers(1, 5)) for _ in range(n)]
    parts = [Stripe(at + k * n, n * m) for at, m in enumerate(cut) for k in range(m)]
    for shard in range(60):
        assert sum(shard % part.n == part.number for part in parts) == 1


def test_the_last_one_finishes_in_any_order(kit, tmp_path):
    whole = kit.content(kit.Data().write(tmp_path / "whole", kit.key(), shard_rows=2))
    for order in ((0, 1, 2), (2, 0, 1)):
        folder = tmp_path / "".join(map(str, order))
        assert [write(kit, folder, Stripe(at, 3), shard_rows=2) for at in order] == [False, False, True]
        assert kit.content(folder) == whole
        assert verify(folder).ok


def test_one_stripe_has_one_writer_and_a_whole_writer_is_alone(kit, tmp_path):
    data, folder = kit.Data(), tmp_path / "s"
    with data.writer(folder, kit.key(), stripe=Stripe(0, 2)):
        for stripe in (None, Stripe(0, 2)):
            with pytest.raises(StoreBusy), data.writer(folder, kit.key(), stripe=stripe):
                pass
        with data.writer(folder, kit.key(), stripe=Stripe(1, 2)):
            pass
    with (
        data.writer(folder, kit.key()),
        pytest.raises(StoreBusy),
        data.writer(folder, kit.key(), stripe=Stripe(1, 2)),
    ):
        pass
    with pytest.raises(StoreError, match="a stripe cannot replace a store"):
        data.writer(folder, kit.key(), stripe=Stripe(0, 2), overwrite=True)


def test_a_store_that_another_stripe_reopens_is_not_finished(kit, tmp_path):
    """Stripe 1 makes a shard again while stripe 0 finds nothing to do: no manifest may appear, not even an empty one."""
    data, folder = kit.Data(), tmp_path / "s"
    data.write(folder, kit.key())
    with (
        data.writer(folder, kit.key(), stripe=Stripe(0, 2)) as a,
        data.writer(folder, kit.key(), stripe=Stripe(1, 2)) as b,
    ):
        shard = next(one for one in b.layout.shards("image") if one.number == 1)
        b.redo(shard)
        a.finish()
        assert not a.finished
        assert not (folder / MANIFEST).exists()
        with pytest.raises(StoreUnfinished):
            Store.open(folder)
        data.fill(b)
        b.finish()
        assert b.finished
    assert verify(folder).ok


def test_stripes_cut_differently_do_not_finish_each_other(kit, tmp_path):
    data, folder = kit.Data(), tmp_path / "s"
    data.write(folder, kit.key())
    (folder / MANIFEST).unlink()
    with (
        data.writer(folder, kit.key(), stripe=Stripe(0, 1)) as a,
        data.writer(folder, kit.key(), stripe=Stripe(0, 2)) as b,
    ):
        b.redo(b.layout.shards("image")[0])
        a.finish()
        assert not a.finished
        assert not (folder / MANIFEST).exists()
        data.fill(b)
        b.finish()
        assert b.finished
    assert json.loads((folder / MANIFEST).read_text())["counts"]["images"] == 10
    assert verify(folder).ok

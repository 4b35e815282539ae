"""Images that could not be read: recorded with the reason, zero in the arrays, and made again when they can be."""

import json

import numpy as np
import pytest

from mmcli.cache import Store, StoreError, StoreUnfinished, describe, verify
from mmcli.cache.layout import MANIFEST

REASONS = {1: "cannot read an image: a.jpg", 6: "an empty file"}


@pytest.fixture
def folder(kit, tmp_path):
    data = kit.Data()
    with data.writer(tmp_path / "s", kit.key()) as writer:
        data.fill(writer, REASONS)
        writer.finish(REASONS.get)
    return tmp_path / "s"


def test_what_was_skipped_is_read_back_with_its_reason(kit, folder):
    store, data = Store.open(folder), kit.Data()
    assert store.skipped == REASONS
    arrays = store.load()
    assert np.flatnonzero(arrays.norm_img == 0).tolist() == [1, 6]
    assert not arrays.v_img[[1, 6]].any()
    np.testing.assert_array_equal(arrays.v_img[[0, 2]], data.v_img[[0, 2]].astype(np.float16))
    assert verify(folder).ok
    assert describe(folder)["skipped"] == 2
    assert describe(folder)["norm_img"]["min"] > 0


def test_zeros_and_skips_must_agree(kit, tmp_path):
    data = kit.Data()
    with data.writer(tmp_path / "s", kit.key()) as writer:
        shard = writer.missing("image")[0]
        v_img = data.v_img[:4].copy()
        with pytest.raises(StoreError, match=r"a skipped image has an embedding: .*row 2"):
            writer.write_image(shard, v_img=v_img, skipped=[2])
        v_img[3] = 0
        with pytest.raises(StoreError, match=r"an embedding is zero: .*row 3"):
            writer.write_image(shard, v_img=v_img)


def test_a_store_is_not_finished_without_the_reasons(kit, tmp_path):
    data = kit.Data()
    with data.writer(tmp_path / "s", kit.key()) as writer:
        data.fill(writer, REASONS)
        with pytest.raises(StoreError, match=r"a skipped row without a reason: .*row 1"):
            writer.finish()
        with pytest.raises(StoreError, match=r"a skipped row without a reason: .*row 6"):
            writer.finish({1: "x"}.get)
    assert not (tmp_path / "s" / MANIFEST).exists()


def test_a_shard_is_made_again_when_the_images_are_back(kit, folder):
    data = kit.Data()
    with data.writer(folder, kit.key()) as writer:
        assert {shard.number: rows for shard, rows in writer.skipped.items()} == {0: (1,), 1: (6,)}
        assert writer.finish() == folder  # nothing was asked for, nothing is lost
        assert Store.open(folder).skipped == REASONS
        first = next(iter(writer.skipped))
        writer.redo(first)
        assert writer.missing("image") == [first]
        with pytest.raises(StoreUnfinished):
            Store.open(folder)
        writer.write_image(first, v_img=data.v_img[:4])
        writer.finish({6: "still empty"}.get)
    assert Store.open(folder).skipped == {6: "still empty"}


def test_verify_finds_zeros_that_nobody_accounts_for(kit, folder):
    kit.reseal(folder, lambda document: document["skipped"].pop(0))
    assert any("norm_img is 0: rows 1" in line for line in verify(folder).problems)
    kit.reseal(folder, lambda document: document["skipped"].append({"row": 9, "reason": "no"}))
    assert any("a skipped image has an embedding" in line for line in verify(folder).problems)


@pytest.mark.parametrize("rows", [[6, 1], [1, 1], [-1], [10]])
def test_a_list_of_skipped_rows_that_makes_no_sense_is_damage(kit, folder, rows):
    kit.reseal(folder, lambda document: document.update(skipped=[{"row": row, "reason": "x"} for row in rows]))
    with pytest.raises(StoreError, match="skipped rows is not in order"):
        Store.open(folder)
    assert json.loads((folder / MANIFEST).read_text())["skipped"]

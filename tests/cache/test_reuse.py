"""Caption embeddings are taken from a store that differs in what does not concern them, and from no other."""

import os
import shutil

import pytest

from mmcli.cache import Store, verify
from mmcli.cache.layout import temporary_name


def test_between_two_patch_budgets(kit, tmp_path):
    data, key = kit.Data(), kit.key(patches=512, processor='{"other": 1}')
    one = data.write(tmp_path / "one", kit.key())
    wanted = kit.content(data.write(tmp_path / "wanted", key))
    with data.writer(tmp_path / "two", key) as writer:
        assert writer.reuse_text(one) == 3
        assert writer.missing("text") == []
        assert len(writer.missing("image")) == 3
        assert writer.reuse_text(one) == 0
        data.fill(writer)
        two = writer.finish()
    assert kit.content(two) == wanted
    assert (one / "text-00001.h5").samefile(two / "text-00001.h5")
    assert verify(one).ok
    assert verify(two).ok


@pytest.mark.parametrize(
    "changes",
    [
        {"model": "google/other"},
        {"revision": "other"},
        {"text_length": 32},
        {"dtype": "float32"},
        {"manifest_sha256": "cd" * 32},
        {"compute_dtype": "bfloat16"},
    ],
)
def test_not_when_anything_that_matters_differs(kit, tmp_path, changes, monkeypatch):
    one = kit.Data().write(tmp_path / "one", kit.key())
    monkeypatch.setattr("mmcli.cache.writer.adopt", None)  # the key tells: no shard is opened
    with kit.Data().writer(tmp_path / "two", kit.key(**changes)) as writer:
        assert writer.reuse_text(one) == 0
    assert not list((tmp_path / "two").glob("text-*"))


def test_not_with_other_rows_ids_or_shape(kit, tmp_path):
    one, key = kit.Data().write(tmp_path / "one", kit.key()), kit.key(patches=512)
    other_ids = kit.Data()
    other_ids.index = other_ids.index.set_column(0, "image_id", [list(range(10))])
    writers = {
        "rows": kit.Data().writer(tmp_path / "rows", key, shard_rows=5),
        "ids": other_ids.writer(tmp_path / "ids", key),
        "width": kit.Data(d=7).writer(tmp_path / "width", key),
        "captions": kit.Data(c=4).writer(tmp_path / "captions", key),
    }
    for entered in writers.values():
        with entered as writer:
            assert writer.reuse_text(one) == 0


def test_only_whole_shards_and_any_folder(kit, tmp_path):
    one = kit.Data().write(tmp_path / "one", kit.key())
    data = bytearray((one / "text-00001.h5").read_bytes())
    data[len(data) // 2] ^= 1
    (one / "text-00001.h5").write_bytes(data)
    (one / "text-00002.h5").unlink()
    (one / "manifest.json").unlink()
    (tmp_path / "empty").mkdir()
    with kit.Data().writer(tmp_path / "two", kit.key(patches=512)) as writer:
        assert [writer.reuse_text(folder) for folder in (tmp_path / "none", tmp_path / "empty", one)] == [0, 0, 1]
        assert [shard.name for shard in writer.missing("text")] == ["text-00001.h5", "text-00002.h5"]
        assert not list((tmp_path / "two").glob(".*.tmp"))


def test_copies_where_there_are_no_links(kit, tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise OSError(18, "Invalid cross-device link")

    one = kit.Data().write(tmp_path / "one", kit.key())
    monkeypatch.setattr(os, "link", refuse)
    with kit.Data().writer(tmp_path / "two", kit.key(patches=512)) as writer:
        assert writer.reuse_text(one) == 3
        kit.Data().fill(writer)
        writer.finish()
    assert not (one / "text-00000.h5").samefile(tmp_path / "two" / "text-00000.h5")
    assert verify(tmp_path / "two").ok


def test_redoing_a_shared_shard_leaves_the_other_store_alone(kit, tmp_path):
    data, one = kit.Data(), kit.Data().write(tmp_path / "one", kit.key())
    two = tmp_path / "two"
    with data.writer(two, kit.key(patches=512)) as writer:
        writer.reuse_text(one)
    # A kill between link and rename leaves a temporary name for the other store's file; it must not be written to.
    os.link(one / "text-00000.h5", two / temporary_name("text-00000.h5"))
    os.link(one / "text-00001.h5", two / temporary_name("text-00001.h5"))
    (two / "text-00000.h5").unlink()
    data.counts[:], data.v_txt[:] = 1, 0
    with data.writer(two, kit.key(patches=512)) as writer:
        data.fill(writer)
        writer.finish()
    assert verify(one).ok
    (two / "text-00001.h5").unlink()
    shutil.copy(two / "text-00000.h5", two / "text-00001.h5")
    with data.writer(two, kit.key(patches=512)) as writer:
        assert len(writer.damaged) == 1
        data.fill(writer)
    assert verify(one).ok
    assert Store.open(one).load().n_captions.tolist() == kit.Data().counts.tolist()

"""What is written is what is read, and what cannot be stored is refused."""

import tempfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmcli.cache import Shard, Store, StoreBusy, StoreError, StoreMismatch, StoreUnfinished, StoreWriter, verify


@settings(max_examples=25, deadline=None)
@given(
    n=st.integers(1, 23),
    d=st.integers(1, 9),
    c=st.integers(1, 6),
    shard_rows=st.integers(1, 25),
    dtype=st.sampled_from(["float16", "float32"]),
    seed=st.integers(0, 99),
)
def test_written_is_read(kit, n, d, c, shard_rows, dtype, seed):
    data, key = kit.Data(n, d, c, seed), kit.key(dtype=dtype)
    with tempfile.TemporaryDirectory() as root:
        folder = data.write(Path(root) / "deep" / "store", key, shard_rows=shard_rows)
        store = Store.open(folder)
        got = store.load()
        assert got.v_img.dtype == got.v_txt.dtype == np.dtype(dtype)
        np.testing.assert_array_equal(got.v_img, data.v_img.astype(dtype))
        np.testing.assert_array_equal(got.v_txt, data.v_txt.astype(dtype))
        np.testing.assert_array_equal(got.n_captions, data.counts)
        for norms, vectors in ((got.norm_img, data.v_img), (got.norm_txt, data.v_txt)):
            assert norms.dtype == np.float32
            np.testing.assert_array_equal(norms, np.linalg.norm(vectors.astype(np.float64), axis=-1).astype(np.float32))
        assert (store.n_images, store.width, store.n_captions_max) == (n, d, c)
        assert (store.key, store.digest, store.text_digest) == (key, key.digest, key.text_digest)
        assert store.extra == {"torch": "2.13", "bias": -16.5}
        assert store.index.drop_columns(["shard", "row"]).equals(data.index, check_metadata=True)
        places = list(zip(store.index["shard"].to_pylist(), store.index["row"].to_pylist(), strict=True))
        assert places == [divmod(row, shard_rows) for row in range(n)]
        assert verify(folder).problems == ()


def test_two_stores_of_one_key_have_the_same_bytes(kit, tmp_path):
    one, other = (kit.Data().write(tmp_path / name, kit.key()) for name in "ab")
    names = sorted(path.name for path in one.iterdir())
    assert names == sorted(path.name for path in other.iterdir())
    different = [name for name in names if (one / name).read_bytes() != (other / name).read_bytes()]
    assert different == ["manifest.json"]
    assert kit.content(one) == kit.content(other)


def test_norms_are_taken_before_the_cast(kit, tmp_path):
    data = kit.Data(n=2, d=3)
    data.v_img[:] = [[1e-9, 0, 0], [1.0004, 0, 0]]
    got = Store.open(data.write(tmp_path / "s", kit.key())).load()
    np.testing.assert_array_equal(got.norm_img, np.float32([1e-9, 1.0004]))
    np.testing.assert_array_equal(got.v_img[:, 0], np.float16([0, 1]))


def test_large_values_do_not_overflow_the_norm(kit, tmp_path):
    data = kit.Data(n=1, d=4)
    data.v_img[:] = 1e30
    got = Store.open(data.write(tmp_path / "s", kit.key(dtype="float32"))).load()
    np.testing.assert_array_equal(got.norm_img, np.float32([2e30]))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_non_finite_is_refused_with_its_image(kit, tmp_path, bad, dtype):
    data = kit.Data()
    data.v_img[5, 2] = bad
    data.counts[6], data.v_txt[6, 1, 0] = 5, bad
    with data.writer(tmp_path / "s", kit.key(dtype=dtype)) as writer:
        with pytest.raises(StoreError, match=f"not finite: image-00001.h5, v_img row 1, image id {data.ids[5]}:"):
            data.fill(writer)
        with pytest.raises(StoreError, match=f"not finite: text-00001.h5, v_txt row 2, image id {data.ids[6]}:"):
            writer.write_text(Shard("text", 1, 4, 8), v_txt=data.v_txt[4:8], n_captions=data.counts[4:8])
        assert [shard.number for shard in writer.missing("image")] == [1, 2]


def test_float16_overflow_suggests_float32(kit, tmp_path):
    data = kit.Data()
    data.v_img[0, 0] = 65520  # rounds to infinity; 65519 rounds to the largest float16
    with (
        data.writer(tmp_path / "s", kit.key()) as writer,
        pytest.raises(
            StoreError, match=r"image id \d+: got 65520, wanted at most 65504; extract with `--dtype float32`"
        ),
    ):
        data.fill(writer)
    data.v_img[0, 0] = 65519
    assert Store.open(data.write(tmp_path / "s", kit.key())).load().v_img[0, 0] == 65504


def test_wrong_arrays_are_refused(kit, tmp_path):
    data = kit.Data()
    with data.writer(tmp_path / "s", kit.key()) as writer:
        image, text = writer.missing("image")[0], writer.missing("text")[0]
        for wrong in (data.v_img[:3], data.v_img[:4, :5], data.v_img[:4].astype(np.float64), data.v_img[:4, None], [1]):
            with pytest.raises(StoreError, match=r"bad v_img: image-00000.h5: got .*, wanted float32 \(4, 6\)"):
                writer.write_image(image, v_img=wrong)
        for counts in (data.counts[:3], np.array([0, 1, 2, 6]), np.array([0, 1, 2, -1]), np.ones(4)):
            with pytest.raises(StoreError, match="bad n_captions"):
                writer.write_text(text, v_txt=data.v_txt[:4], n_captions=counts)
        counts = np.array([5, 2, 5, 5])
        with pytest.raises(StoreError, match=r"a missing caption has an embedding: text-00000.h5, v_txt row 1"):
            writer.write_text(text, v_txt=np.ones((4, 5, 6), np.float32), n_captions=counts)
        for wrong in (text, Shard("image", 9, 36, 40), Shard("image", 0, 0, 3)):
            with pytest.raises(StoreError, match="not a missing shard"):
                writer.write_image(wrong, v_img=np.ones((wrong.n_rows, 6), np.float32))
        writer.write_image(image, v_img=data.v_img[:4])
        with pytest.raises(StoreError, match="not a missing shard"):
            writer.write_image(image, v_img=data.v_img[:4])


def test_wrong_index_and_sizes_are_refused(kit, tmp_path):
    ids = pa.array([1, 2])
    wrong = {
        "a pyarrow table": {"image_id": [1]},
        "one column image_id of int64": pa.table({"image_id": pa.array([1, 2], pa.int32())}),
        "wanted one column": pa.table({"id": ids}),
        "without them": pa.table({"image_id": ids, "row": ids}),
        "without rows": pa.table({"image_id": ids})[:0],
        "image id 7 more than once": pa.table({"image_id": [3, 7, 7]}),
        "1 null image ids": pa.table({"image_id": pa.array([1, None])}),
    }
    for message, table in wrong.items():
        with pytest.raises(StoreError, match=message):
            StoreWriter(tmp_path / "s", kit.key(), table, width=3)
    for options in ({"width": 0}, {"shard_rows": 0}, {"n_captions_max": 256}, {"extra": {"a": float("nan")}}):
        with pytest.raises(StoreError, match="bad store"):
            kit.Data().writer(tmp_path / "s", kit.key(), **options)
    with pytest.raises(StoreMismatch, match="another format: got 3, wanted 2"):
        kit.Data().writer(tmp_path / "s", kit.key(format_version=3))
    assert not (tmp_path / "s").exists()


def test_two_writers_at_once(kit, tmp_path):
    data = kit.Data()
    with data.writer(tmp_path / "s", kit.key()) as writer:
        with (
            pytest.raises(StoreBusy, match="another process writes this store"),
            data.writer(tmp_path / "s", kit.key()),
        ):
            pass
        data.fill(writer)
        writer.finish()
    data.write(tmp_path / "s", kit.key())


def test_a_writer_that_fails_to_open_frees_the_folder(kit, tmp_path):
    data = kit.Data()
    data.write(tmp_path / "s", kit.key())
    with pytest.raises(StoreMismatch), data.writer(tmp_path / "s", kit.key(patches=512)):
        pass
    data.write(tmp_path / "s", kit.key())


def test_finish_refuses_what_is_not_whole(kit, tmp_path):
    data = kit.Data()
    with data.writer(tmp_path / "s", kit.key()) as writer:
        shard = writer.missing("image")[1]
        writer.write_image(shard, v_img=data.v_img[shard.start : shard.stop])
        with pytest.raises(StoreUnfinished, match=r"image-00000.h5 and 4 more"):
            writer.finish()
    with pytest.raises(StoreMismatch, match="not open"):
        writer.finish()


def test_other_key_or_shape_is_refused(kit, tmp_path):
    data, folder = kit.Data(), tmp_path / "s"
    with data.writer(folder, kit.key()):
        pass
    expected = "patches: 256 against 512; dtype: float16 against float32; .*--out.*--force"
    with pytest.raises(StoreMismatch, match=expected), data.writer(folder, kit.key(patches=512, dtype="float32")):
        pass
    with pytest.raises(StoreMismatch, match="got images 10, wanted 11"), kit.Data(11).writer(folder, kit.key()):
        pass
    with pytest.raises(StoreMismatch, match="got width 6, wanted 7"), kit.Data(d=7).writer(folder, kit.key()):
        pass
    with pytest.raises(StoreMismatch, match="captions per image 5"), kit.Data(c=4).writer(folder, kit.key()):
        pass


def test_shards_alone_still_tell_whose_they_are(kit, tmp_path):
    data, folder = kit.Data(), tmp_path / "s"
    data.write(folder, kit.key())
    for name in ("manifest.json", "key.json"):
        (folder / name).unlink()
    before = {path.name: path.read_bytes() for path in folder.glob("*.h5")}
    for other in ({"patches": 512}, {"dtype": "float32"}):
        with pytest.raises(StoreMismatch, match="shards of another key"), data.writer(folder, kit.key(**other)):
            pass
        with pytest.raises(StoreMismatch, match="shards of another key"):
            kit.Data(n=7, d=3).write(folder, kit.key(**other))
    assert before == {path.name: path.read_bytes() for path in folder.glob("*.h5")}
    with data.writer(folder, kit.key()) as writer:
        assert writer.missing("image") == writer.missing("text") == []
        writer.finish()
    assert verify(folder).ok


def test_files_of_something_else_are_safe(kit, tmp_path):
    data = kit.Data()
    for name in ("manifest.json", "index.parquet", "key.json"):
        folder = tmp_path / name.replace(".", "")
        folder.mkdir()
        (folder / name).write_text('{"theirs": 1}')
        for overwrite in (False, True):
            with (
                pytest.raises(StoreMismatch, match=f"not of a store: .*got {name}"),
                data.writer(folder, kit.key(), overwrite=overwrite),
            ):
                pass
        assert (folder / name).read_text() == '{"theirs": 1}'
    (tmp_path / "file").touch()
    with pytest.raises(StoreError, match="cannot use the folder"), data.writer(tmp_path / "file", kit.key()):
        pass


def test_overwrite_replaces_another_key_and_nothing_else(kit, tmp_path):
    folder = tmp_path / "s"
    kit.Data(n=30).write(folder, kit.key())
    (folder / "notes.txt").write_text("mine")
    key = kit.key(patches=512)
    kit.Data(seed=1).write(folder, key, overwrite=True)
    assert Store.open(folder).key == key
    assert verify(folder).problems == ("notes.txt: not a file of this store",)


def test_a_resumed_store_keeps_its_shards(kit, tmp_path):
    data, folder = kit.Data(), tmp_path / "s"
    with data.writer(folder, kit.key(), shard_rows=3) as writer:
        shard = writer.missing("image")[0]
        writer.write_image(shard, v_img=data.v_img[:3])
    with data.writer(folder, kit.key(), shard_rows=5) as writer:
        assert [shard.n_rows for shard in writer.missing("image")] == [3, 3, 1]
        data.fill(writer)
        writer.finish()
    assert kit.content(folder) == kit.content(data.write(tmp_path / "t", kit.key(), shard_rows=3))


def test_a_finished_store_is_left_alone(kit, tmp_path):
    data, folder = kit.Data(), tmp_path / "s"
    data.write(folder, kit.key())
    before = {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in folder.iterdir()}
    data.write(folder, kit.key(), extra={"torch": "3"})
    after = {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in folder.iterdir()}
    # Only the manifest's date is new: this store is the one that was asked for last.
    assert after.pop("manifest.json")[1] > before["manifest.json"][1]
    assert before.pop("manifest.json")[0] == (folder / "manifest.json").read_bytes()
    assert before == after


def test_a_changed_index_is_written_anew(kit, tmp_path):
    data, folder = kit.Data(), tmp_path / "s"
    data.write(folder, kit.key())
    data.index = data.index.replace_schema_metadata({"category_names": "[]"})
    with data.writer(folder, kit.key()) as writer:
        assert not (folder / "manifest.json").exists()
        assert writer.missing("image") == writer.missing("text") == []
        writer.finish()
    assert Store.open(folder).index.schema.metadata == {b"category_names": b"[]"}

"""The store that benchmarks make has COCO's proportions; what is timed on it is what it says."""

import subprocess
import sys

import h5py
import numpy as np
import pytest

from mmcli import InputError
from mmcli.cache import Store, verify
from mmcli.pipeline.bench import train as bench_loading
from mmcli.pipeline.bench.data import COUNTS, N_TRAIN, draw_labels, full_size_arrays, make_full_store
from mmcli.pipeline.core.config import Config
from mmcli.pipeline.extraction.stores import read_store

SIZES = {"n_train": 1500, "n_val": 40, "n_test": 30, "width": 24}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_full_store(tmp_path_factory.mktemp("full") / "store", **SIZES)


def test_store_and_arrays_are_the_same(folder) -> None:
    read, arrays = read_store(folder, Config()), full_size_arrays(**SIZES)
    for name in ("v_img", "v_txt", "n_captions"):
        got, wanted = getattr(read.embeddings, name), getattr(arrays, name)
        assert got.dtype == wanted.dtype
        np.testing.assert_array_equal(got, wanted)
    np.testing.assert_array_equal(read.listing.labels_matrix(), arrays.labels)
    np.testing.assert_array_equal(read.listing.splits, arrays.splits)
    assert [len(read.listing.rows(split)) for split in ("train", "val", "test")] == [1500, 40, 30]
    assert read.listing.sha256 == read.store.key.manifest_sha256
    assert verify(folder).ok
    assert make_full_store(folder, **SIZES) == folder  # it is there already
    lengths = [len(text) for texts in read.listing.captions for text in texts]
    assert 45 < np.mean(lengths) < 60  # 52 in COCO
    assert all(len(set(texts)) == 5 for texts in read.listing.captions)
    assert 8 < read.embeddings.norm_img.mean() < 12
    assert read.embeddings.norm_img.std() > 0.5


def test_classes_are_as_common_as_in_coco() -> None:
    labels = draw_labels(40_000)
    share = np.array(COUNTS) / N_TRAIN
    assert len(COUNTS) == 80
    np.testing.assert_allclose(labels.mean(0), share, atol=5 * np.sqrt(share.max() / 40_000))
    assert labels.sum(1).mean() == pytest.approx(2.84, abs=0.05)


def test_embeddings_tell_something_of_their_labels_and_not_all() -> None:
    arrays = full_size_arrays(n_train=3000, n_val=300, n_test=1, width=256)
    x = np.concatenate([arrays.v_img, arrays.v_txt[:, 0]], axis=1).astype(np.float32)
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    person = arrays.labels[:, 0].astype(float)
    weights = np.linalg.lstsq(x[:3000], person[:3000], rcond=None)[0]
    right = ((x[3000:] @ weights > 0.5) == person[3000:]).mean()
    assert 0.7 < right < 0.999


def test_loading_is_timed(folder) -> None:
    times = bench_loading.time_loading(folder, 2)
    store = Store.open(folder)
    paths = [folder / entry.file for entry in store.manifest.shards]
    assert times.n_bytes == sum(path.stat().st_size for path in paths) == bench_loading.read_plainly(paths)
    case = times.case()
    assert case.ratio_plain == pytest.approx(times.plain_s / times.ours_s)
    with h5py.File(paths[0]) as file:
        at = file["v_img"].id.get_offset()
    data = bytearray(paths[0].read_bytes())
    data[at] ^= 1
    paths[0].write_bytes(data)
    with pytest.raises(InputError, match="a damaged shard"):
        bench_loading.time_loading(folder, 1)
    data[at] ^= 1
    paths[0].write_bytes(data)


def test_the_first_step_is_timed_by_the_command_itself(folder) -> None:
    config = Config.model_validate({"hardware": {"device": "cpu"}, "training": {"num_epochs": 1}})
    torch_s = bench_loading.import_torch_seconds(repeats=1)
    assert 0 < torch_s < bench_loading.time_to_first_step(folder, config, repeats=1)
    with pytest.raises(InputError, match=r"a training that did not begin: got .*no such store"):
        bench_loading.time_to_first_step(folder / "none", config, repeats=1)


def test_reading_a_store_imports_nothing_heavy(folder) -> None:
    code = """
import sys
from pathlib import Path
from mmcli.pipeline.extraction.stores import Config, read_store
listing = read_store(Path(sys.argv[1]), Config()).listing
listing.labels_matrix(), listing.rows("train"), listing.image_ids
heavy = {"torch", "transformers", "sklearn", "faiss", "scipy", "matplotlib", "pyarrow.dataset"}
sys.exit(", ".join(sorted(heavy & set(sys.modules))) or 0)
"""
    done = subprocess.run([sys.executable, "-c", code, folder], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")

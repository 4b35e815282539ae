"""The store that benchmarks make has COCO's proportions; what is timed on it is what it says."""

import subprocess
import sys

import numpy as np
import pytest

from mmcli.cache import verify
from mmcli.pipeline.bench.data import COUNTS, N_TRAIN, draw_embeddings, draw_labels, make_full_store
from mmcli.pipeline.core.config import Config
from mmcli.pipeline.extraction.stores import read_store

SIZES = {"n_train": 1500, "n_val": 40, "n_test": 30, "width": 24}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_full_store(tmp_path_factory.mktemp("full") / "store", **SIZES)


def test_the_store_holds_what_is_drawn(folder) -> None:
    read, labels = read_store(folder, Config()), draw_labels(1570)
    for start, v_img, v_txt in draw_embeddings(labels, 24, 0):
        rows = slice(start, start + len(v_img))
        np.testing.assert_array_equal(read.embeddings.v_img[rows], v_img.astype(np.float16))
        np.testing.assert_array_equal(read.embeddings.v_txt[rows], v_txt.astype(np.float16))
    assert set(read.embeddings.n_captions) == {5}
    np.testing.assert_array_equal(read.listing.labels_matrix(), labels)
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
    share = COUNTS / N_TRAIN
    assert len(COUNTS) == 80
    np.testing.assert_allclose(labels.mean(0), share, atol=5 * np.sqrt(share.max() / 40_000))
    assert labels.sum(1).mean() == pytest.approx(2.84, abs=0.05)


def test_embeddings_say_something_of_their_labels_not_all() -> None:
    labels = draw_labels(3300)
    x = np.concatenate([np.hstack([v_img, v_txt[:, 0]]) for _, v_img, v_txt in draw_embeddings(labels, 256, 0)])
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    person = labels[:, 0].astype(float)
    weights = np.linalg.lstsq(x[:3000], person[:3000], rcond=None)[0]
    right = ((x[3000:] @ weights > 0.5) == person[3000:]).mean()
    assert 0.7 < right < 0.999


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

"""Near-duplicates across splits, against a plain loop over all pairs."""

from dataclasses import asdict
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmcli.cache import Store, StoreDamaged, StoreError
from mmcli.cache.leaks import find_leaks, passes

SPLITS = ("train", "val", "test")


def make(kit, folder: Path, v_img, splits, *, skipped=(), **options) -> Store:
    data = kit.Data(len(v_img), v_img.shape[1])
    data.v_img = v_img.astype(np.float32)
    data.index = data.index.append_column("split", pa.array(list(splits)))
    with data.writer(folder, kit.key(dtype="float32"), **options) as writer:
        for shard in writer.missing("image"):
            rows = [row - shard.start for row in skipped if shard.start <= row < shard.stop]
            writer.write_image(shard, v_img=data.v_img[shard.start : shard.stop], skipped=rows)
        data.fill(writer)
        writer.finish(lambda _row: "unreadable")
    return Store.open(folder)


def plain(v, splits, threshold):
    """Pairs (row, other) to their cosine: each held-out image's nearest in each other split, by a loop over pairs."""
    d = v.astype(np.float64)
    norm = np.linalg.norm(d, axis=1)
    found = {}
    for i in range(len(v)):
        if splits[i] == "train" or not norm[i]:
            continue
        for other in {"train", "val", "test"} - {splits[i]}:
            cosines = [
                (-round(float(d[i] @ d[j] / norm[i] / norm[j]), 6), j)
                for j in range(len(v))
                if splits[j] == other and norm[j]
            ]
            if cosines and -min(cosines)[0] >= threshold:
                j = min(cosines)[1]
                pair = (j, i) if (splits[i], other) == ("test", "val") else (i, j)
                found[pair] = -min(cosines)[0]
    return found


@settings(max_examples=15, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    n=st.integers(2, 20),
    d=st.integers(2, 5),
    threshold=st.sampled_from([0.5, 0.9, 0.98]),
    shard_rows=st.integers(3, 12),
    block=st.sampled_from([1, 100, 400]),
    n_skipped=st.integers(0, 3),
)
def test_against_a_plain_loop(kit, tmp_path_factory, seed, n, d, threshold, shard_rows, block, n_skipped):
    rng = np.random.default_rng(seed)
    v = rng.standard_normal((n, d)) * rng.uniform(0.1, 50, (n, 1))
    copies = rng.integers(0, n, (2, n // 3))
    v[copies[0]] = v[copies[1]] * 2
    skipped = np.unique(rng.integers(0, n, min(n_skipped, n - 1))).tolist()
    v[skipped] = 0
    splits = rng.choice(SPLITS, n)
    v = v.astype(np.float32)
    store = make(kit, tmp_path_factory.mktemp("s"), v, splits, shard_rows=shard_rows, skipped=skipped)
    ticks: list[int] = []
    report = find_leaks(store, threshold, most=1000, block_bytes=block, tick=ticks.append)
    assert sum(ticks) == passes(store, block) * n
    row_of = {int(image_id): row for row, image_id in enumerate(store.index.column("image_id").to_pylist())}
    got = {(row_of[pair.image_id], row_of[pair.other_id]): pair.cosine for pair in report.pairs}
    wanted = plain(v, splits, threshold)
    # Copies tie, so which of them is named may differ where two cosines are equal to the sixth decimal.
    assert sorted(got.values()) == pytest.approx(sorted(wanted.values()), abs=2e-6)
    assert sum(report.n_pairs.values()) == len(got) == len(report.pairs)
    assert report.n_images == {name: int(((splits == name) & v.any(axis=1)).sum()) for name in SPLITS}
    cosines = [pair.cosine for pair in report.pairs]
    assert cosines == sorted(cosines, reverse=True)
    for pair in report.pairs:
        i, j = row_of[pair.image_id], row_of[pair.other_id]
        d = v[[i, j]] / np.linalg.norm(v[[i, j]], axis=1, keepdims=True)
        assert pair.cosine == pytest.approx(float(d[0] @ d[1]), abs=2e-6)
        assert (splits[i], splits[j]) == (pair.split, pair.other_split)
        assert (pair.split, pair.other_split) in {("val", "train"), ("test", "train"), ("val", "test")}


def test_what_a_pair_says_and_how_many_are_listed(kit, tmp_path):
    v = np.eye(6, dtype=np.float32)[[0, 1, 2, 0, 1, 1, 3]]
    splits = ["train", "train", "val", "val", "test", "val", "test"]
    store = make(kit, tmp_path / "s", v, splits)
    ids = store.index.column("image_id").to_pylist()
    report = find_leaks(store, 1.0, most=2)
    assert report.n_pairs == {"test-train": 1, "val-train": 2, "val-test": 1}
    assert [(pair.image_id, pair.other_id) for pair in report.pairs] == [(ids[3], ids[0]), (ids[4], ids[1])]
    first = asdict(report.pairs[0])
    assert first == {
        "image_id": ids[3],
        "path": f"{ids[3]}.jpg",
        "split": "val",
        "other_id": ids[0],
        "other_path": f"{ids[0]}.jpg",
        "other_split": "train",
        "cosine": 1.0,
    }


def test_several_copies_in_another_held_out_split_are_all_named(kit, tmp_path):
    v = np.eye(4, dtype=np.float32)[[0, 1, 1, 1]]
    report = find_leaks(make(kit, tmp_path / "s", v, ["train", "val", "test", "test"]), 0.9)
    assert report.n_pairs["val-test"] == 2


def test_one_split_alone_has_nothing_to_compare(kit, tmp_path):
    report = find_leaks(make(kit, tmp_path / "s", np.eye(3), ["train"] * 3))
    assert report.pairs == ()
    assert sum(report.n_pairs.values()) == 0


def test_an_index_without_splits_and_an_unknown_split(kit, tmp_path):
    with pytest.raises(StoreError, match="no column split"):
        find_leaks(Store.open(kit.Data().write(tmp_path / "s", kit.key())))
    with pytest.raises(StoreError, match=r"unknown split: .*'dev'"):
        find_leaks(make(kit, tmp_path / "t", np.eye(2), ["train", "dev"]))


def test_a_damaged_shard_is_not_compared(kit, tmp_path):
    store = make(kit, tmp_path / "s", np.eye(6), ["train", "val"] * 3)
    path = store.folder / "image-00001.h5"
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)
    with pytest.raises(StoreDamaged, match=r"image-00001\.h5"):
        find_leaks(store)

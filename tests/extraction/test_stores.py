"""A store as stages see it: skipped rows are left out, and what is wrong with its listing is said when it is used."""

import numpy as np
import pyarrow as pa
import pytest

from mmcli import InputError
from mmcli.cache import StoreKey, StoreWriter
from mmcli.pipeline.core.config import Config
from mmcli.pipeline.data.manifest import Manifest
from mmcli.pipeline.extraction.stores import read_store

N = 2600


def columns(**changes):
    rng = np.random.default_rng(1)
    given = {
        "image_ids": rng.permutation(N).astype(np.int64),
        "paths": [f"{place}.jpg" for place in range(N)],
        "splits": [("train", "val", "test")[place % 3] for place in range(N)],
        "captions": [[f"caption of {place}"] * (1 + place % 3) for place in range(N)],
        "labels": [[place % 4] if place % 5 else [] for place in range(N)],
        "category_names": ["a", "b", "c", "d"],
    }
    return given | changes


def write(folder, table, skipped=()):
    key = StoreKey(
        model="m",
        revision="r",
        processor="{}",
        patches=1,
        text_length=1,
        dtype="float16",
        manifest_sha256="ab" * 32,
        compute_dtype="float32",
    )
    v_img = np.random.default_rng(0).standard_normal((N, 6)).astype(np.float32)
    v_img[list(skipped)] = 0
    with StoreWriter(folder, key, table, width=6, n_captions_max=1, shard_rows=700) as writer:
        for shard in writer.missing("image"):
            rows = [row - shard.start for row in skipped if shard.start <= row < shard.stop]
            writer.write_image(shard, v_img=v_img[shard.start : shard.stop], skipped=rows)
        for shard in writer.missing("text"):
            v_txt = np.full((shard.n_rows, 1, 6), shard.number + 1, np.float32)
            writer.write_text(shard, v_txt=v_txt, n_captions=np.ones(shard.n_rows, int))
        writer.finish(lambda _: "unreadable")
    return v_img


@pytest.mark.parametrize(
    "skipped", [(), (0,), (N - 1,), (0, 1, 5, 699, 700, 1024, 1025, 2047, N - 1), tuple(range(0, N, 2))]
)
def test_skipped_rows_are_left_out_of_everything(tmp_path, skipped):
    listing = Manifest.from_columns(**columns())
    v_img = write(tmp_path / "s", listing.table, skipped)
    kept = np.setdiff1d(np.arange(N), skipped)
    read = read_store(tmp_path / "s", Config())
    np.testing.assert_array_equal(read.embeddings.v_img, v_img[kept].astype(np.float16))
    np.testing.assert_array_equal(read.embeddings.v_txt[:, 0, 0], kept // 700 + 1)
    np.testing.assert_array_equal(read.listing.image_ids, listing.image_ids[kept])
    np.testing.assert_array_equal(read.listing.labels_matrix(), listing.labels_matrix()[kept])
    assert read.listing.splits.tolist() == listing.splits[kept].tolist()
    assert len(read.listing) == len(kept)
    assert read.listing.captions == tuple(listing.captions[row] for row in kept)
    assert read.listing.paths == tuple(listing.paths[row] for row in kept)
    assert (read.listing.sha256 == listing.sha256) is (not skipped)
    assert read.listing.name == listing.name


def test_what_training_reads_is_checked_when_the_store_is_read(tmp_path):
    table = Manifest.from_columns(**columns()).table
    bad = table.set_column(table.column_names.index("split"), "split", pa.array(["trian"] * N))
    write(tmp_path / "s", bad)
    with pytest.raises(InputError, match=r"bad split in a manifest: .*row 0 \(image \d+\): got 'trian'"):
        read_store(tmp_path / "s", Config())
    write(tmp_path / "t", table.drop_columns(["captions"]))
    with pytest.raises(InputError, match="a manifest needs one column captions"):
        read_store(tmp_path / "t", Config())


def test_captions_and_paths_are_checked_when_they_are_asked_for(tmp_path):
    table = Manifest.from_columns(**columns()).table
    for name, values in (("captions", [[" "]] * N), ("path", ["../../etc/passwd"] * N)):
        place = table.column_names.index(name)
        write(tmp_path / name, table.set_column(place, name, pa.array(values)))
        listing = read_store(tmp_path / name, Config()).listing
        assert listing.labels_matrix().shape == (N, 4)
        for use in ("captions", "paths", "table", "sha256"):
            with pytest.raises(InputError, match=f"bad {name} in a manifest: .*row 0"):
                getattr(listing, use)

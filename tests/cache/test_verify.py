"""verify goes on after a problem; describe says what a store is; the newest store is found."""

import json
import logging

import h5py
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmcli.cache import Layout, Store, StoreMissing, describe, list_stores, newest_store, verify
from mmcli.cache.encode import l2_norm
from mmcli.cache.verify import norm_tolerance


def edit_shard(kit, folder, name, edit):
    """Change a shard as a faulty writer would have made it: its checksums are right."""
    from mmcli.cache.shards import content_sha256

    with h5py.File(folder / name, "r+") as file:
        edit(file)
        for dataset in file.values():
            digest = content_sha256(dataset.name.strip("/"), dataset[()])
            dataset.attrs.modify("sha256", np.bytes_(digest))
    kit.reseal(folder, lambda _: None)


def set_to(name, row, value):
    return lambda file: file[name].__setitem__(row, value)


def test_every_problem_is_listed(kit, tmp_path):
    data = kit.Data()
    folder = data.write(tmp_path / "s", kit.key())
    real = [int(row) for row in np.flatnonzero(data.counts[:4] > 0)]
    edit_shard(kit, folder, "image-00000.h5", set_to("v_img", 1, np.inf))
    edit_shard(kit, folder, "image-00001.h5", set_to("norm_img", 2, 1.0))
    edit_shard(kit, folder, "text-00000.h5", set_to("n_captions", real, [0] * len(real)))
    edit_shard(kit, folder, "text-00002.h5", set_to("n_captions", 0, 9))
    (folder / "image-00002.h5").write_bytes(b"short")
    (folder / "image-00007.h5").write_bytes(b"")
    (folder / ".image-00001.h5.tmp").write_bytes(b"")
    report = verify(folder)
    assert not report.ok
    assert report.n_shards == 6
    expected = [
        f"image-00000.h5: NaN or infinity in v_img row 1, image id {data.ids[1]}",
        f"image-00001.h5: norm_img is not the norm of v_img: rows 2 (image id {data.ids[6]})",
        "image-00002.h5: it has 5 bytes, not ",
        "text-00000.h5: manifest.json has another count of captions",
        "text-00000.h5: a missing caption that is not zero: rows ",
        "text-00002.h5: manifest.json has another count of captions",
        "text-00002.h5: n_captions goes to 9, beyond 5",
        "text-00002.h5: norm_txt is 0: rows ",
        ".image-00001.h5.tmp: not a file of this store",
        "image-00007.h5: not a file of this store",
    ]
    problems = [line for line in report.problems if not line.startswith("image-00002.h5: it has 5")]
    assert len(report.problems) == len(expected)
    for line, start in zip(report.problems, expected, strict=True):
        assert line.startswith(start)
    assert len(problems) == len(expected) - 1


def test_zero_norms_of_captions_are_legal_and_reported(kit, tmp_path):
    data = kit.Data()
    data.counts[[0, 3]] = 1
    data.v_txt[[0, 3]] = 0
    folder = data.write(tmp_path / "s", kit.key())
    Store.open(folder).load()
    assert verify(folder).problems == (
        f"text-00000.h5: norm_txt is 0: rows 0 (image id {data.ids[0]}), 3 (image id {data.ids[3]})",
    )


def test_unfinished_store_is_checked_as_far_as_it_goes(kit, tmp_path):
    data, folder = kit.Data(), tmp_path / "s"
    with data.writer(folder, kit.key()) as writer:
        shard = writer.missing("image")[1]
        writer.write_image(shard, v_img=data.v_img[4:8])
    lines = verify(folder).problems
    assert lines[0] == "manifest.json: absent, the store is unfinished"
    assert [line for line in lines if line.startswith("image-00001.h5")] == []
    assert len(lines) == 2 + 5
    (folder / "key.json").write_text("{")
    assert verify(folder).problems[1].startswith("key.json: cannot read")


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 1000), st.integers(1, 900), st.floats(-9, 4), st.sampled_from(["float16", "float32"]), st.booleans()
)
def test_tolerance_admits_the_cast_and_little_more(seed, d, exponent, dtype, spread):
    rng = np.random.default_rng(seed)
    scale = 10.0 ** (rng.uniform(-9, 4, d) if spread else exponent)
    vectors = np.clip(rng.standard_normal((8, d)) * scale, -6e4, 6e4).astype(np.float32)
    norms, layout = l2_norm(vectors), Layout(n_images=8, width=d, n_captions_max=1, shard_rows=8, dtype=dtype)
    again, tolerance = l2_norm(vectors.astype(dtype)), norm_tolerance(norms, layout)
    assert (np.abs(again.astype(float) - norms) <= tolerance).all()
    assert (tolerance <= norms * (6e-4 if dtype == "float16" else 3e-7) + np.sqrt(d) * 2.0**-24).all()


def test_describe(kit, tmp_path):
    data = kit.Data()
    folder = data.write(tmp_path / "s", kit.key())
    facts = describe(folder)
    assert json.loads(json.dumps(facts)) == facts
    assert (facts["images"], facts["width"], facts["captions"]) == (10, 6, int(data.counts.sum()))
    assert (facts["model"], facts["patches"], facts["dtype"]) == (kit.key().model, 256, "float16")
    assert facts["bytes"] == sum(path.stat().st_size for path in folder.iterdir() if "json" not in path.name)
    real = np.arange(5) < data.counts[:, None]
    for name, vectors in (("norm_img", data.v_img), ("norm_txt", data.v_txt[real])):
        norms = np.linalg.norm(vectors.astype(np.float64), axis=-1)
        wanted = {"min": norms.min(), "mean": norms.mean(), "max": norms.max(), "std": norms.std()}
        assert facts[name] == pytest.approx(wanted, rel=1e-6)


def test_describe_without_captions(kit, tmp_path):
    data = kit.Data()
    data.counts[:], data.v_txt[:] = 0, 0
    folder = data.write(tmp_path / "s", kit.key())
    assert describe(folder)["norm_txt"] is None
    assert verify(folder).ok


def test_newest_store(kit, tmp_path, caplog):
    assert list_stores(tmp_path / "none") == []
    with pytest.raises(StoreMissing, match=r"no finished store: .*none; run `mmcli extract` first"):
        newest_store(tmp_path / "none")
    with kit.Data().writer(tmp_path / "half", kit.key()):
        pass
    with pytest.raises(StoreMissing, match="got unfinished half; run `mmcli extract` again, it resumes"):
        newest_store(tmp_path)
    folders = [kit.Data(seed=i).write(tmp_path / name, kit.key(patches=i + 1)) for i, name in enumerate("cab")]
    (tmp_path / "file").touch()
    (tmp_path / "other").mkdir()
    assert list_stores(tmp_path) == folders
    assert newest_store(tmp_path) == folders[-1]
    (folders[-1] / "manifest.json").write_text("{")
    with caplog.at_level(logging.WARNING):
        assert newest_store(tmp_path) == folders[1]
    assert "left out: cannot read" in caplog.text
    for folder in folders[:2]:
        (folder / "manifest.json").write_text('{"format": "mmcli-store", "format_version": 9}')
    with pytest.raises(StoreMissing, match="got unfinished half; unreadable a, b, c;"):
        newest_store(tmp_path)

"""Embeddings made elsewhere: what is imported is what the files say, in every form they may have; what is wrong is one line."""

import json
import pickle
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmcli import InputError
from mmcli.cache import Store, StoreError, StoreWriter, export_store, verify
from mmcli.pipeline.data.manifest import Manifest, write_manifest
from mmcli.pipeline.extraction.import_store import ImportPlan, import_store

N, D = 7, 3
COUNTS = np.array([5, 1, 7, 2, 6, 1, 3])  # captions in the manifest; five are kept
KEPT = np.minimum(COUNTS, 5)


class Source:
    """A manifest, and embeddings of its images and of their first five captions."""

    def __init__(self, folder: Path, dtype: str = "float32", seed: int = 0) -> None:
        rng = np.random.default_rng(seed)
        self.folder, self.dtype = folder, dtype
        self.ids = rng.permutation(100)[:N].astype(np.int64)
        self.listing = Manifest.from_columns(
            image_ids=self.ids,
            paths=[f"{i}.jpg" for i in self.ids],
            splits=["train", "val", "test", "train", "test", "val", "train"],
            captions=[
                [f"caption {slot} of {i}" for slot in range(count)] for i, count in zip(self.ids, COUNTS, strict=True)
            ],
            labels=[[0], [1], [0, 1], [], [1], [0], [1]],
            category_names=["cat", "dog"],
        )
        self.v_img = (rng.standard_normal((N, D)) * 4).astype(dtype)
        self.v_txt = (rng.standard_normal((N, 5, D)) * 4).astype(dtype)
        self.v_txt[np.arange(5) >= KEPT[:, None]] = 0
        write_manifest(folder / "m.parquet", self.listing)

    @property
    def flat(self):
        return self.v_txt[np.arange(5) < KEPT[:, None]]

    def save(self, name: str, values) -> Path:
        path = self.folder / name
        path.parent.mkdir(exist_ok=True)
        np.save(path, values)
        return path

    def table(self, name: str, **columns) -> Path:
        path = self.folder / name
        path.parent.mkdir(exist_ok=True)
        pq.write_table(pa.table(columns), path, row_group_size=2)
        return path

    def run(self, images: Path, texts: Path, **options):
        plan = ImportPlan(
            **{
                "images": images,
                "texts": texts,
                "manifest": self.folder / "m.parquet",
                "name": "acme/clip",
                "cache": self.folder / "cache",
                "shard_rows": 3,
            }
            | options
        )
        return import_store(plan)

    def plain(self, **options):
        return self.run(self.save("i.npy", self.v_img), self.save("t.npy", self.flat), **options)


@pytest.fixture
def source(tmp_path):
    return Source(tmp_path)


def lists(values, kind):
    return pa.array([row.tolist() for row in values], pa.list_(kind))


def check(source, result, counts, dtype):
    store = Store.open(result.store)
    assert verify(result.store).ok
    arrays = store.load()
    assert arrays.v_img.dtype == dtype
    np.testing.assert_array_equal(arrays.v_img, source.v_img.astype(dtype))
    np.testing.assert_array_equal(arrays.n_captions, counts)
    wanted = source.v_txt[:, : counts.max()].astype(dtype)
    wanted[np.arange(counts.max()) >= counts[:, None]] = 0
    np.testing.assert_array_equal(arrays.v_txt, wanted)
    norms = np.sqrt((source.v_img.astype(np.float64) ** 2).sum(1)).astype(np.float32)
    np.testing.assert_array_equal(arrays.norm_img, norms)
    assert Manifest.from_table(store.index.drop_columns(["shard", "row"])).sha256 == source.listing.sha256
    assert (result.n_images, result.n_captions, result.width) == (N, counts.sum(), D)


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 1000),
    dtype=st.sampled_from(["float16", "float32"]),
    form=st.sampled_from(["first", "rows", "slots"]),
    cuts=st.lists(st.integers(1, N - 1), max_size=3, unique=True),
    to=st.sampled_from([None, "float16", "float32"]),
    order=st.sampled_from(["C", "F"]),
    big=st.sets(st.integers(0, 3)),
)
def test_npy_in_every_form(tmp_path_factory, seed, dtype, form, cuts, to, order, big):
    source = Source(tmp_path_factory.mktemp("i"), dtype, seed)
    texts = {"first": source.v_txt[:, 0], "rows": source.flat, "slots": source.v_txt}[form]
    counts = np.minimum(KEPT, 1) if form == "first" else KEPT
    for name, values in (("img", source.v_img), ("txt", texts)):
        for place, part in enumerate(np.split(values, sorted(cuts))):
            ends = np.dtype(dtype).newbyteorder(">" if place in big else "<")
            # By number: 10 sorts before 8 as text.
            source.save(f"{name}/{name}_{place + 8}.npy", np.asarray(part, ends, order=order))
    result = source.run(source.folder / "img", source.folder / "txt", dtype=to)
    check(source, result, counts, to or dtype)


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 1000),
    dtype=st.sampled_from(["float16", "float32"]),
    form=st.sampled_from(["first", "rows", "lists", "fixed lists"]),
    n_files=st.integers(1, 3),
)
def test_parquet_in_every_form_is_matched_by_image_id(tmp_path_factory, seed, dtype, form, n_files):
    source = Source(tmp_path_factory.mktemp("i"), dtype, seed)
    rng = np.random.default_rng(seed)
    kind = pa.float16() if dtype == "float16" else pa.float32()
    for place, rows in enumerate(np.array_split(rng.permutation(N), n_files)):
        vectors = pa.FixedSizeListArray.from_arrays(pa.array(source.v_img[rows].reshape(-1), kind), D)
        source.table(f"img/{place}.parquet", image_id=source.ids[rows], note=["x"] * len(rows), v_img=vectors)
    rows = rng.permutation(N)
    if form == "first":
        source.table(
            "txt/0.parquet", image_id=source.ids.astype(np.int32)[rows], emb=lists(source.v_txt[rows, 0], kind)
        )
    elif form == "rows":  # captions of an image in order, images mixed
        owners = rng.permutation(np.repeat(np.arange(N), KEPT))
        slots = [int((owners[:place] == owner).sum()) for place, owner in enumerate(owners)]
        source.table("txt/0.parquet", image_id=source.ids[owners], emb=lists(source.v_txt[owners, slots], kind))
    else:
        inner = pa.list_(kind) if form == "lists" else pa.list_(kind, D)
        nested = [source.v_txt[row, : KEPT[row]].tolist() for row in rows]
        source.table(
            "txt/0.parquet",
            image_id=source.ids[rows],
            v_txt=pa.array(nested, pa.list_(inner)),
            other=lists(source.v_img[rows], kind),
        )
    result = source.run(source.folder / "img", source.folder / "txt")
    check(source, result, np.minimum(KEPT, 1) if form == "first" else KEPT, dtype)
    assert [path.name for path in (source.folder / "cache").iterdir()] == [result.store.name]  # no scratch is left


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_big_endian_vectors_make_the_same_store(tmp_path_factory, dtype):
    little, big = (Source(tmp_path_factory.mktemp(name), dtype) for name in ("little", "big"))
    swapped = np.dtype(dtype).newbyteorder(">")
    result = big.run(
        big.save("i.npy", big.v_img.astype(swapped)), big.save("t.npy", np.asfortranarray(big.v_txt.astype(swapped)))
    )
    wanted = little.run(little.save("i.npy", little.v_img), little.save("t.npy", little.v_txt))
    assert (result.dtype, result.digest) == (dtype, wanted.digest)
    item, other = Store.open(result.store), Store.open(wanted.store)
    assert [entry.sha256 for entry in item.manifest.shards] == [entry.sha256 for entry in other.manifest.shards]


def _npy(header: bytes) -> bytes:
    return b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header + b"\n" + bytes(64)


@pytest.mark.parametrize(
    "data",
    [
        _npy(b"{'descr': '<f4', 'fortran_order': False, 'shape': (1000000000000, 768)}"),
        _npy(b"{'descr': '<f4', 'fortran_order': False, 'shape': (9223372036854775807, 4)}"),
        _npy(b"{'descr': '<f4', 'fortran_order': False, 'shape': (" + b"9" * 5000 + b", 4)}"),
        _npy(b"{'descr': '<f4', 'fortran_order': False, 'shape': (-7, 4)}"),
        _npy(b"{'descr': '<f4', 'fortran_order': False, 'shape': (7, -4)}"),
        _npy(b"{'descr': '<f4', 'fortran_order': False, 'shape': ('a', 4)}"),
        _npy(b"{'descr': {'a': 1}, 'fortran_order': False, 'shape': (7, 4)}"),
        _npy(b"{'descr': '<f4,', 'fortran_order': 3, 'shape': [7, 4]}"),
        _npy(b"(" * 5000),
        _npy(b"[" * 150 + b"]" * 150),
        _npy(b"\xff\xfe"),
        _npy(b"{'descr': '\x00'"),
        _npy(b"-" * 9000),
        b"\x93NUMPY\x09\x00",
        b"\x93NUMPY\x02\x00\xff\xff\xff\xff",
        b"",
        b"\x93NUM",
    ],
    ids=range(17),
)
def test_a_npy_header_that_makes_no_sense_is_one_line(source, data):
    (source.folder / "i.npy").write_bytes(data)
    with pytest.raises(InputError, match=r"cannot read embeddings: .*i\.npy"):
        source.run(source.folder / "i.npy", source.save("t.npy", source.flat))
    assert not (source.folder / "cache").exists()


def test_an_export_comes_back_the_same(source, tmp_path):
    first = source.plain(dtype="float16")
    export_store(Store.open(first.store), tmp_path / "pq", "parquet")
    export_store(Store.open(first.store), tmp_path / "npy", "npy", captions="all")
    back = source.run(tmp_path / "pq", tmp_path / "pq", dtype="float16", out=tmp_path / "back")
    texts_only = source.run(
        source.save("h.npy", source.v_img.astype("float16")), tmp_path / "npy" / "text_emb", out=tmp_path / "other"
    )
    for result in (back, texts_only):
        item, other = Store.open(first.store).load(), Store.open(result.store).load()
        for name in ("v_img", "v_txt", "n_captions"):
            np.testing.assert_array_equal(getattr(item, name), getattr(other, name))


def test_the_key_says_where_it_came_from(source, tmp_path):
    result = source.plain()
    key = Store.open(result.store).key
    assert (key.model, key.manifest_sha256, key.dtype) == ("acme/clip", source.listing.sha256, "float32")
    assert key.revision.startswith("sha256:")
    assert result.store.parent == tmp_path / "cache"
    assert result.store.name.startswith("clip-imported-float32-")
    assert source.plain().store == result.store  # nothing is missing, nothing is made twice
    named = source.plain(revision="v2")
    assert Store.open(named.store).key.revision == "v2"
    # Parts, or another way to write the same numbers, are the same content; one other value is not.
    kind = pa.float32()
    source.table("p.parquet", image_id=source.ids[::-1], v_img=lists(source.v_img[::-1], kind))
    assert source.run(tmp_path / "p.parquet", tmp_path / "t.npy").store == result.store
    source.v_img[0, 0] += 1
    changed = source.plain(revision="v2")
    assert changed.digest != named.digest
    with pytest.raises(StoreError, match="another key"):
        source.plain(out=named.store, revision="v2")


def test_a_killed_import_goes_on(source, monkeypatch):
    original, written = StoreWriter.write_text, []

    def stops(self, shard, **arrays):
        if shard.number == 1:
            raise KeyboardInterrupt
        original(self, shard, **arrays)

    monkeypatch.setattr(StoreWriter, "write_text", stops)
    with pytest.raises(KeyboardInterrupt):
        source.plain()
    monkeypatch.setattr(
        StoreWriter,
        "write_text",
        lambda self, shard, **arrays: written.append(shard.number) or original(self, shard, **arrays),
    )
    check(source, source.plain(), KEPT, "float32")
    assert written == [1, 2]


def bad_value(name, row, value):
    def spoil(source):
        getattr(source, name)[row] = value

    return spoil


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (bad_value("v_img", (4, 1), np.nan), r"NaN or infinity .*i\.npy, row 4, image id {ids[4]}; compute it again"),
        (bad_value("v_img", (4, 1), np.inf), r"NaN or infinity .*i\.npy, row 4, image id {ids[4]};"),
        (bad_value("v_img", 6, 0), r"an embedding that is zero: .*i\.npy, row 6, image id {ids[6]};"),
        (bad_value("v_txt", (2, 1), 0), r"an embedding that is zero: .*t\.npy, row 7, image id {ids[2]};"),
        (bad_value("v_txt", (1, 0), np.nan), r"NaN or infinity .*t\.npy, row 5, image id {ids[1]};"),
    ],
)
def test_values_that_no_store_holds(source, spoil, message):
    spoil(source)
    with pytest.raises(InputError, match=message.format(ids=source.ids)):
        source.plain()
    assert not (source.folder / "cache").exists()


def test_the_part_and_its_row_are_named(source):
    source.v_img[3] = 0  # the first row of the second part
    for place, part in enumerate(np.split(source.v_img, [3])):
        source.save(f"img/{place}.npy", part)
    with pytest.raises(InputError, match=rf"zero: .*1\.npy, row 0, image id {source.ids[3]};"):
        source.run(source.folder / "img", source.save("t.npy", source.flat))


def test_captions_that_the_manifest_does_not_have(source):
    source.v_txt[3, 4] = 1
    with pytest.raises(
        InputError, match=rf"manifest does not have: .*t\.npy, row 3, image id {source.ids[3]}, caption 4"
    ):
        source.run(source.save("i.npy", source.v_img), source.save("t.npy", source.v_txt))


def test_too_large_for_float16(source):
    source.v_img[2, 0] = 7e4
    with pytest.raises(InputError, match=r"too large for float16: .*row 2, .*--dtype float32"):
        source.plain(dtype="float16")
    source.plain()


def test_wrong_counts_widths_and_types(source):
    images, texts = source.save("i.npy", source.v_img), source.save("t.npy", source.flat)
    cases = [
        (source.save("a.npy", source.v_img[:-1]), texts, r"another number of images: .*a\.npy: got 6 rows, wanted 7,"),
        (
            images,
            source.save("b.npy", source.flat[1:]),
            rf"another number of texts: .*b\.npy: got {KEPT.sum() - 1} rows, wanted 7, .*or {KEPT.sum()},",
        ),
        (
            images,
            source.save("c.npy", source.v_txt[1:]),
            r"another number of texts: .*c\.npy: got 6 rows, wanted 7, one for each image of the manifest;",
        ),
        (
            images,
            source.save("d.npy", np.ones((N, 6, D), "f4")),
            "too many captions an image: .*got 6, wanted at most 5",
        ),
        (
            images,
            source.save("e.npy", np.ones((N, D + 1), "f4")),
            r"different widths: .*e\.npy: got 4, wanted 3, as in .*i\.npy",
        ),
        (
            source.save("f.npy", source.v_img.astype("f8")),
            texts,
            "another type: .*got float64, wanted float16 or float32",
        ),
        (source.save("g.npy", source.v_img.astype("i4")), texts, "another type: .*got int32"),
        (source.save("h.npy", source.v_img[0]), texts, r"another shape: .*got \(3,\), wanted \(rows, width\)"),
        (source.save("j.npy", source.v_img[:0]), texts, "another shape|cannot read"),
        (source.folder / "none.npy", texts, r"no embeddings: --images .*none\.npy: got no such file"),
        (source.folder / "m.parquet", texts, "no clear column of vectors"),
    ]
    source.save("mixed/0.npy", source.v_img)
    source.table("mixed/1.parquet", image_id=source.ids)
    cases.append((source.folder / "mixed", texts, r"no embeddings: .*got \.npy and \.parquet"))
    (source.folder / "empty").mkdir()
    cases.append((source.folder / "empty", texts, "no embeddings: .*a folder without such files"))
    source.save("names/a.npy", source.v_img)
    source.save("names/b_1.npy", source.v_img)
    cases.append((source.folder / "names", texts, r"no clear order: .*a\.npy without a number"))
    source.save("twice/a_1.npy", source.v_img)
    source.save("twice/b_01.npy", source.v_img)
    cases.append((source.folder / "twice", texts, "no clear order: .*and"))
    source.save("wide/0.npy", source.v_img)
    source.save("wide/1.npy", np.ones((2, D + 1), "f4"))
    cases.append((source.folder / "wide", texts, r"parts of different widths or types: .*1\.npy"))
    for image_path, text_path, message in cases:
        with pytest.raises(InputError, match=message):
            source.run(image_path, text_path)
    assert not (source.folder / "cache").exists()


def test_a_pickle_is_never_read(source):
    texts = source.save("t.npy", source.flat)
    path = source.folder / "o.npy"
    np.save(path, np.array([{"a": 1}], dtype=object), allow_pickle=True)
    with pytest.raises(InputError, match=r"cannot read embeddings: .*Python objects"):
        source.run(path, texts)
    path.write_bytes(pickle.dumps(source.v_img))
    with pytest.raises(InputError, match="cannot read embeddings"):
        source.run(path, texts)
    np.save(path, source.v_img)
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(InputError, match="cannot read embeddings"):
        source.run(path, texts)


def test_wrong_parquet(source):
    texts, kind = source.save("t.npy", source.flat), pa.float32()
    vectors = lists(source.v_img, kind)
    ragged = pa.array([[1.0] * (D + (row == 4)) for row in range(N)], pa.list_(kind))
    holes = pa.array([None if row == 2 else [1.0] * D for row in range(N)], pa.list_(kind))
    inner = pa.array([[1.0, None, 1.0]] * N, pa.list_(kind))
    other = source.ids.copy()
    other[3] = 1000
    again = source.ids.copy()
    again[3] = again[0]
    double = lists(source.v_img, pa.float64())
    cases = [
        ({"image_id": other, "v": vectors}, "manifest does not have: .*got 1000;"),
        (
            {"image_id": again, "v": vectors},
            rf"another number of vectors for an image: .*image id {source.ids[0]} and 1 more: got 2, wanted 1;",
        ),
        ({"image_id": source.ids[1:], "v": vectors[1:]}, rf"image id {source.ids[0]}: got 0, wanted 1;"),
        ({"image_id": source.ids, "v": ragged}, r"vectors of different widths: .*got 4, wanted 3"),
        ({"image_id": source.ids, "v": holes}, "a null among the embeddings: .*column v: got 1"),
        ({"image_id": source.ids, "v": inner}, "a null among the embeddings"),
        ({"image_id": source.ids, "v": double}, "no clear column of vectors"),
        ({"image_id": source.ids, "v": vectors, "w": vectors}, "no clear column of vectors"),
        ({"id": source.ids, "v": vectors}, "no clear column of vectors"),
        (
            {"image_id": [str(i) for i in source.ids], "v": vectors},
            "a column of another type: .*column image_id: got string",
        ),
        (
            {"image_id": source.ids, "v": pa.array([[[1.0] * D]] * N, pa.list_(pa.list_(kind)))},
            "image vectors in lists",
        ),
    ]
    for columns, message in cases:
        with pytest.raises(InputError, match=message):
            source.run(source.table("x.parquet", **columns), texts)
    (source.folder / "x.parquet").write_bytes(b"PAR1 no")
    with pytest.raises(InputError, match="cannot read embeddings"):
        source.run(source.folder / "x.parquet", texts)
    few = {
        "image_id": np.repeat(source.ids, np.minimum(KEPT, 2)),
        "v": lists(np.ones((int(np.minimum(KEPT, 2).sum()), D)), kind),
    }
    with pytest.raises(
        InputError, match=rf"image id {source.ids[0]} and 3 more: got 2, wanted 5, or 1 for every image"
    ):
        source.run(source.save("i.npy", source.v_img), source.table("x.parquet", **few))


def test_a_full_disk_says_to_import_again(source, monkeypatch):
    def fails(self, shard, **arrays):
        raise StoreError(
            "cannot write", where=shard.name, got="No space left", do="mend it and run `mmcli extract` again"
        )

    monkeypatch.setattr(StoreWriter, "write_image", fails)
    with pytest.raises(StoreError, match="run `mmcli cache import` again"):
        source.plain()


def test_empty_names(source):
    for option in ("name", "revision"):
        with pytest.raises(InputError, match=f"an empty name: --{option}"):
            source.plain(**{option: " "})


def test_the_commands(mmcli, tmp_path):
    source = Source(tmp_path)
    source.v_img[1] = source.v_img[0] * 2
    source.save("i.npy", source.v_img)
    source.save("t.npy", source.flat)
    words = ("--images", "i.npy", "--texts", "t.npy", "--name", "acme/clip", "--manifest", "m.parquet")
    code, out, err = mmcli("cache", "import", *words, "--json")
    assert code == 0, err
    store = json.loads(out)["store"]
    assert store in err
    code, out, err = mmcli("cache", "info", "--quiet")
    assert (code, err) == (0, "")
    assert "imported from" in out
    assert "MB" in out
    assert "norms of captions: min" in out
    code, out, err = mmcli("cache", "info", "--json")
    assert json.loads(out)["extra"]["imported"]["images"] == str(tmp_path / "i.npy")
    code, out, err = mmcli("cache", "verify", "--leaks", "--quiet")
    assert (code, err) == (0, "")
    assert "1 val with train" in out
    code, out, err = mmcli("cache", "verify", "--leaks", "--threshold", 0.5, "--json")
    leaks = json.loads(out)["leaks"]
    assert leaks["pairs"][0] | {"cosine": 1.0} == {
        "image_id": source.ids[1],
        "path": f"{source.ids[1]}.jpg",
        "split": "val",
        "other_id": source.ids[0],
        "other_path": f"{source.ids[0]}.jpg",
        "other_split": "train",
        "cosine": 1.0,
    }
    code, out, err = mmcli("cache", "verify", "--json")
    assert json.loads(out) == {"store": store, "problems": [], "leaks": None}
    code, out, err = mmcli("cache", "export", "--out", "e", "--captions", "all", "--json")
    assert code == 0, err
    assert json.loads(out)["n_rows"] == KEPT.sum()
    assert np.load("e/img_emb/img_emb_00000.npy").shape == (KEPT.sum(), D)
    code, out, err = mmcli("cache", "export", "--out", "e")
    assert (code, err.count("\n")) == (2, 1)
    assert "--force" in err
    code, out, err = mmcli("cache", "export", "--out", "e", "--format", "parquet", "--force", "--quiet")
    assert (code, err) == (0, "")
    assert "7 images, 1 file" in out
    for wrong in (
        ("verify", "--most", 3),
        ("export", "--out", "x", "--format", "parquet", "--captions", "all"),
        ("export",),
        ("import", "--images", "i.npy"),
        ("verify", "--leaks", "--threshold", 2),
        ("import", *words[:-1], "none.parquet"),
    ):
        code, out, err = mmcli("cache", *wrong)
        assert (code, out, err.count("\n")) == (2, "", 1), err
    assert not Path("x").exists()


def test_skipped_images_are_shown_and_left_out(mmcli, tmp_path, monkeypatch):
    source = Source(tmp_path)
    skipped = [1, 2, 3, 4, 5, 6]
    source.v_img[skipped] = 0
    result = source.plain
    monkeypatch.setattr("mmcli.pipeline.extraction.import_store.Embedded.check", lambda *_: "x")
    original = StoreWriter.write_image
    monkeypatch.setattr(
        StoreWriter,
        "write_image",
        lambda self, shard, v_img: original(self, shard, v_img=v_img, skipped=np.flatnonzero(~v_img.any(1)).tolist()),
    )
    finish = StoreWriter.finish
    monkeypatch.setattr(StoreWriter, "finish", lambda self: finish(self, lambda row: f"reason {row}"))
    store = result().store
    code, out, _ = mmcli("cache", "info", "--store", store)
    assert code == 0
    assert f"image id {source.ids[1]}, {source.ids[1]}.jpg: reason 1" in out
    assert "reason 5" in out
    assert "reason 6" not in out
    assert "and 1 more" in out
    code, out, _ = mmcli("cache", "export", "--store", store, "--out", "e")
    assert "left out: 6 images without an embedding" in out
    assert np.load("e/text_emb/text_emb_00000.npy").shape == (1, D)

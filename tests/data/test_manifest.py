"""The manifest: what is written is read, its hash is of the content, and every mistake is one line with its row."""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmcli import InputError
from mmcli.pipeline.data.manifest import SPLITS, Manifest, read_manifest, resolve_image, write_manifest

NAMES = ("person", "traffic light", "Zebra “é”")
COLUMNS: dict[str, list[Any]] = {
    "image_id": [42, 9, 1 << 40, 7],
    "path": ["train2014/a.jpg", "images/val2014/b b.jpg", "ü/c.png", "..d/e..f.jpg"],
    "split": ["train", "val", "test", "train"],
    "captions": [["A dog.", "ein Hund\n"], ["犬"], ["x"] * 7, ["y"]],
    "labels": [[0, 2], [], [1], [2]],
}


def table(**changes: Any) -> pa.Table:
    """A user's manifest in plain arrow types, with columns changed."""
    metadata = changes.pop("metadata", {"category_names": json.dumps(NAMES)})
    return pa.table(COLUMNS | changes).replace_schema_metadata(metadata)


def changed(name: str, row: int, value: Any) -> dict[str, Any]:
    return {name: [value if index == row else old for index, old in enumerate(COLUMNS[name])]}


def plain_sha256(listing: dict[str, list[Any]], names: tuple[str, ...]) -> str:
    """The documented hash, without arrow: lengths, then values, all little-endian."""
    digest = hashlib.sha256(json.dumps({"mmcli_manifest": 1, "category_names": list(names)}).encode())

    def numbers(values: list[int]) -> None:
        digest.update(b"".join(value.to_bytes(8, "little", signed=True) for value in values))

    def texts(values: list[str]) -> None:
        numbers([len(value.encode()) for value in values])
        digest.update("".join(values).encode())

    numbers(listing["image_id"])
    texts(listing["path"])
    texts(listing["split"])
    numbers([len(row) for row in listing["captions"]])
    texts([text for row in listing["captions"] for text in row])
    numbers([len(row) for row in listing["labels"]])
    numbers([label for row in listing["labels"] for label in row])
    return digest.hexdigest()


words = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=6)
captions = words.filter(lambda text: text.strip() and not text.isspace())
segments = st.from_regex(r"[A-Za-z0-9_äß犬 ]{1,6}[.]?[a-z0-9]", fullmatch=True)
rows = st.tuples(
    st.integers(-(2**63), 2**63 - 1),
    st.lists(segments, min_size=1, max_size=3).map("/".join),
    st.sampled_from(SPLITS),
    st.lists(captions, min_size=1, max_size=7),
    st.lists(st.integers(0, len(NAMES) - 1), unique=True).map(sorted),
)


@settings(max_examples=60, deadline=None)
@given(st.lists(rows, min_size=1, max_size=8, unique_by=lambda row: row[0]))
def test_what_is_written_is_read(tmp_path_factory: pytest.TempPathFactory, result: list[tuple[Any, ...]]) -> None:
    ids, paths, splits, texts, labels = (list(column) for column in zip(*result, strict=True))
    written = Manifest.from_columns(
        image_ids=ids, paths=paths, splits=splits, captions=texts, labels=labels, category_names=NAMES, name="tiny"
    )
    path = tmp_path_factory.mktemp("m") / "manifest.parquet"
    write_manifest(path, written)
    read = read_manifest(path)
    assert read.table.equals(written.table, check_metadata=True)
    assert (read.name, read.category_names, read.sha256, len(read)) == ("tiny", NAMES, written.sha256, len(result))
    assert read.image_ids.tolist() == ids
    assert read.image_ids.dtype == np.int64
    assert list(read.paths) == paths
    assert read.splits.tolist() == splits
    assert [list(row) for row in read.captions] == texts
    matrix = read.labels_matrix()
    assert matrix.dtype == np.uint8
    assert matrix.tolist() == [[int(c in row) for c in range(len(NAMES))] for row in labels]
    for split in set(splits):
        assert read.rows(split).tolist() == [index for index, name in enumerate(splits) if name == split]
        assert read.rows(split).dtype == np.int64
    columns = dict(zip(COLUMNS, (ids, paths, splits, texts, labels), strict=True))
    assert read.sha256 == plain_sha256(columns, NAMES)


def test_hash_is_of_the_content_whatever_wrote_it(tmp_path: Path) -> None:
    wanted = plain_sha256(COLUMNS, NAMES)
    large, codes = pa.list_(pa.large_string()), pa.dictionary(pa.int8(), pa.string())
    twins = {
        "plain": table(),
        "large": table(
            path=pa.array(COLUMNS["path"], pa.large_string()),
            captions=pa.array(COLUMNS["captions"], pa.large_list(large.value_type)),
            labels=pa.array(COLUMNS["labels"], pa.large_list(pa.uint64())),
            split=pa.array(COLUMNS["split"], codes),
            image_id=pa.array(COLUMNS["image_id"], pa.uint64()),
        ),
        "views": table(path=pa.array(COLUMNS["path"], pa.string_view())),
        "further columns, another order": table(zzz=[1, 2, 3, 4]).select(["zzz", *reversed(COLUMNS)]),
        "labels in another order, some twice": table(labels=[[2, 0, 2], [], [1, 1], [2]]),
        "chunks": pa.concat_tables([table().slice(1, 0), table().slice(0, 3), table().slice(3, 1)]),
        "a slice": pa.concat_tables([table(image_id=[1, 2, 3, 4]), table()]).combine_chunks().slice(4),
        "another name": table(metadata={"category_names": json.dumps(NAMES, ensure_ascii=False), "name": "x"}),
    }
    for number, (name, twin) in enumerate(twins.items()):
        assert Manifest.from_table(twin).sha256 == wanted, name
        for options in ({"version": "1.0", "compression": "none"}, {"row_group_size": 2, "use_dictionary": False}):
            if name == "views" and "version" in options:
                continue
            path = tmp_path / f"{number}.parquet"
            pq.write_table(twin, path, **options)
            assert read_manifest(path).sha256 == wanted, (name, options)


@pytest.mark.parametrize(
    "change",
    [
        changed("image_id", 0, 43),
        changed("path", 1, "images/val2014/bb .jpg"),
        changed("split", 3, "val"),
        changed("captions", 0, ["A dog.ein Hund\n"]),
        changed("captions", 0, ["A dog", ".ein Hund\n"]),
        changed("labels", 1, [0]),
        {"labels": [[0], [2], [1], [2]]},
        {"metadata": {"category_names": json.dumps(NAMES[::-1])}},
    ],
)
def test_hash_sees_every_change(change: dict[str, Any]) -> None:
    assert Manifest.from_table(table(**change)).sha256 != Manifest.from_table(table()).sha256


def test_arrays_cannot_be_spoiled_by_a_reader() -> None:
    listing = Manifest.from_table(table())
    with pytest.raises(ValueError, match="read-only"):
        listing.image_ids[0] = 1
    with pytest.raises(ValueError, match="read-only"):
        listing.splits[0] = "test"
    listing.labels_matrix()[:] = 9
    assert listing.labels_matrix().max() == 1


def test_rows_of_no_split_and_of_an_empty_one() -> None:
    listing = Manifest.from_table(table(split=["train"] * 4))
    with pytest.raises(InputError, match="no such split: got restval, wanted train, val, test"):
        listing.rows("restval")
    with pytest.raises(InputError, match="no val image in the manifest"):
        listing.rows("val")


def test_all_labels_empty_have_no_type_of_their_own() -> None:
    listing = Manifest.from_table(table(labels=[[], [], [], []]))
    assert listing.labels_matrix().tolist() == [[0, 0, 0]] * 4


BAD: list[tuple[dict[str, Any], tuple[str, ...]]] = [
    (changed("image_id", 2, 9), ("image_id", "row 2", "9", "row 1")),
    (changed("image_id", 3, None), ("image_id", "row 3", "null")),
    ({"image_id": pa.array([1 << 63, 1, 2, 3], pa.uint64())}, ("image_id", "int64")),
    ({"image_id": ["a", "b", "c", "d"]}, ("column image_id", "string", "int64")),
    ({"image_id": [1.0, 2.0, 3.0, 4.0]}, ("column image_id", "double", "int64")),
    (changed("path", 0, None), ("path", "row 0", "null")),
    (changed("path", 1, ""), ("path", "row 1", "image 9", "''")),
    (changed("path", 1, "/etc/passwd"), ("path", "row 1", "/etc/passwd", "relative")),
    (changed("path", 2, "a/../../b.jpg"), ("path", "row 2", "a/../../b.jpg")),
    (changed("path", 2, ".."), ("path", "row 2", "'..'")),
    (changed("path", 2, "a\\b.jpg"), ("path", "row 2")),
    (changed("path", 2, "C:b.jpg"), ("path", "row 2", "C:b.jpg")),
    (changed("path", 2, "a\0.jpg"), ("path", "row 2")),
    ({"path": [[name] for name in COLUMNS["path"]]}, ("column path", "list")),
    (changed("split", 3, "restval"), ("split", "row 3", "image 7", "restval", "train, val or test")),
    (changed("split", 3, "Train"), ("split", "row 3", "Train")),
    (changed("split", 0, None), ("split", "row 0", "null")),
    (changed("captions", 1, None), ("captions", "row 1", "null")),
    (changed("captions", 2, ["x", None]), ("captions", "row 2", "image 1099511627776", "null")),
    (changed("captions", 2, ["x", " \n"]), ("captions", "row 2", "empty caption")),
    ({"captions": ["a", "b", "c", "d"]}, ("column captions", "string", "list<item: string>")),
    ({"captions": [[1], [2], [3], [4]]}, ("column captions", "int64")),
    (changed("labels", 3, [0, 3]), ("labels", "row 3", "image 7", "got 3", "0 to 2")),
    (changed("labels", 0, [-1]), ("labels", "row 0", "got -1", "0 to 2")),
    (changed("labels", 0, [1 << 40]), ("labels", "row 0", "1099511627776")),
    (
        {"labels": pa.array(changed("labels", 0, [1 << 63])["labels"], pa.list_(pa.uint64()))},
        ("column labels", "int32"),
    ),
    (changed("labels", 0, None), ("labels", "row 0", "null")),
    (changed("labels", 3, [0, None]), ("labels", "row 3", "null")),
    ({"labels": [[0.5], [], [], []]}, ("column labels", "double", "int32")),
    ({"labels": [0, 1, 2, 0]}, ("column labels", "int64", "list<item: int32>")),
    ({"metadata": {}}, ("no category names", "got nothing", "category_names")),
    ({"metadata": {"category_names": "person, dog"}}, ("no category names", "not JSON")),
    ({"metadata": {"category_names": "[" * 100_000}}, ("no category names", "not JSON")),
    ({"metadata": {"category_names": "[]"}}, ("no category names", "[]")),
    ({"metadata": {"category_names": '{"a": 0}'}}, ("no category names",)),
    ({"metadata": {"category_names": '["a", 1, "b"]'}}, ("no category names",)),
    ({"metadata": {"category_names": '["a", "", "b"]'}}, ("no category names",)),
    ({"metadata": {"category_names": '["a", "b", "a"]'}}, ("no category names", "different")),
    ({"metadata": {"category_names": '["a", "b", "c"]', "mmcli_manifest_version": "2"}}, ("version 2", "version 1")),
]


@pytest.mark.parametrize(("change", "parts"), BAD)
def test_a_mistake_in_a_manifest_is_one_line_with_its_row(
    tmp_path: Path, change: dict[str, Any], parts: tuple[str, ...]
) -> None:
    path = tmp_path / "mine.parquet"
    pq.write_table(table(**change), path)
    with pytest.raises(InputError) as caught:
        read_manifest(path)
    line = str(caught.value)
    assert "\n" not in line
    for part in ("mine.parquet", *parts):
        assert part in line, line


def test_the_first_bad_row_is_named_across_chunks() -> None:
    bad = table(**changed("labels", 3, [5]))
    bad = pa.concat_tables([bad.slice(0, 1), bad.slice(1, 2), bad.slice(3)])
    with pytest.raises(InputError, match=r"row 3 \(image 7\): got 5"):
        Manifest.from_table(bad)


@pytest.mark.parametrize("name", COLUMNS)
def test_a_missing_or_a_double_column(name: str) -> None:
    with pytest.raises(InputError, match=rf"needs one column {name}: .*image_id int64, path string"):
        Manifest.from_table(table().drop_columns([name]), where="here")
    double = table().append_column(name, table().column(name))
    with pytest.raises(InputError, match=rf"needs one column {name}: here"):
        Manifest.from_table(double, where="here")


def test_no_rows() -> None:
    with pytest.raises(InputError, match="an empty manifest: here"):
        Manifest.from_table(table().slice(0, 0), where="here")


@pytest.mark.parametrize(
    ("change", "part"),
    [
        ({"image_ids": ["a"]}, "image_id"),
        ({"captions": [[b"\xff"]]}, "captions"),
        ({"paths": ["\ud800"]}, "path"),
        ({"labels": [[1 << 40]]}, "labels"),
        ({"splits": ["train", "val"]}, "lengths: here: got 1, 1, 2"),
    ],
)
def test_columns_that_arrow_cannot_take(change: dict[str, Any], part: str) -> None:
    good = {"image_ids": [1], "paths": ["a"], "splits": ["train"], "captions": [["x"]], "labels": [[0]]}
    with pytest.raises(InputError, match=part):
        Manifest.from_columns(**(good | change), category_names=["a"], where="here")


def test_a_file_that_is_no_manifest(tmp_path: Path) -> None:
    path = tmp_path / "manifest.parquet"
    with pytest.raises(InputError, match=r"no manifest: .*manifest.parquet: got no such file.*mmcli prepare"):
        read_manifest(path)
    with pytest.raises(InputError, match="got a folder"):
        read_manifest(tmp_path)
    for content in (b"", b"image_id,path\n1,a.jpg\n", b"PAR1" + b"\0" * 50 + b"PAR1"):
        path.write_bytes(content)
        with pytest.raises(InputError, match=r"cannot read the manifest: .*manifest.parquet.*mmcli prepare"):
            read_manifest(path)


def test_a_damaged_file_is_refused_or_reads_the_same(tmp_path: Path) -> None:
    """Pages carry checksums, so a byte that changes within them can never change a caption or a label unseen."""
    path = tmp_path / "manifest.parquet"
    listing = Manifest.from_table(table())
    write_manifest(path, listing)
    whole = path.read_bytes()
    footer = len(whole) - 8 - int.from_bytes(whole[-8:-4], "little")
    lines = []
    for index in range(0, len(whole), 3):
        path.write_bytes(whole[:index] + bytes([whole[index] ^ 0x10]) + whole[index + 1 :])
        try:
            same = read_manifest(path).sha256 == listing.sha256
        except InputError as error:
            lines.append(str(error))
        else:
            assert same or index >= footer
    assert len(lines) > len(whole) / 10
    assert not any("\n" in line for line in lines)
    for stop in range(0, len(whole), 101):
        path.write_bytes(whole[:stop])
        with pytest.raises(InputError, match="cannot read the manifest"):
            read_manifest(path)


def test_text_that_is_not_utf8_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "manifest.parquet"
    bad = pa.array([b"a.jpg", b"\xff\xfe", b"c", b"d"]).view(pa.string())
    pq.write_table(table(path=bad), path)
    with pytest.raises(InputError, match="cannot read the manifest"):
        read_manifest(path)


def test_folders_that_look_like_partitions_add_no_columns(tmp_path: Path) -> None:
    path = tmp_path / "split=mine" / "manifest.parquet"
    write_manifest(path, Manifest.from_table(table()))
    assert read_manifest(path).splits.tolist() == COLUMNS["split"]


@pytest.mark.parametrize("step", ["write_table", "fsync", "replace"])
def test_a_failed_write_leaves_the_old_manifest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str) -> None:
    path = tmp_path / "manifest.parquet"
    write_manifest(path, Manifest.from_table(table()))
    old = path.read_bytes()

    def half(table: pa.Table, where: Path, **options: Any) -> None:
        Path(where).write_bytes(b"PAR1 half of it")
        raise OSError("disk full")

    def fail(*args: Any) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(
        *{"write_table": (pq, "write_table", half), "fsync": (os, "fsync", fail), "replace": (os, "replace", fail)}[
            step
        ]
    )
    with pytest.raises(InputError, match=r"cannot write: .*manifest\.parquet: got disk full"):
        write_manifest(path, Manifest.from_table(table(**changed("split", 0, "val"))))
    assert path.read_bytes() == old
    assert [result.name for result in tmp_path.iterdir()] == ["manifest.parquet"]


@pytest.mark.parametrize(
    "relative", ["/etc/passwd", "../x.jpg", "a/../../x.jpg", "a/..", "", " ", "a\\..\\x", "C:/x", "a\0b", "."]
)
def test_a_path_that_leaves_by_its_text_is_refused(tmp_path: Path, relative: str) -> None:
    (tmp_path / "a").mkdir()
    with pytest.raises(InputError, match="leaves the data folder"):
        resolve_image(tmp_path, relative)


@settings(max_examples=300, deadline=None)
@given(st.text(st.sampled_from("./\\a:C \0\n~"), max_size=8))
def test_no_text_leads_out(tmp_path_factory: pytest.TempPathFactory, relative: str) -> None:
    root = tmp_path_factory.getbasetemp() / "root"
    try:
        result = resolve_image(root, relative)
    except InputError:
        return
    assert os.path.normpath(result).startswith(f"{root}{os.sep}")


@pytest.fixture
def linked(tmp_path: Path) -> Path:
    """A data folder, and beside it what its links point to."""
    root, shared = tmp_path / "data", tmp_path / "shared" / "train2014"
    (root / "images").mkdir(parents=True)
    (root / "val2014").mkdir()
    shared.mkdir(parents=True)
    (tmp_path / "secret.txt").write_text("secret")
    for folder in (root / "val2014", shared):
        (folder / "a.jpg").write_text("image")
        (folder / "out.jpg").symlink_to(tmp_path / "secret.txt")
        (folder / "in.jpg").symlink_to(folder / "a.jpg")
        (folder / "loop.jpg").symlink_to(folder / "loop.jpg")
        (folder / "deep").symlink_to(tmp_path)
    (root / "train2014").symlink_to(shared)
    (root / "images" / "train2014").symlink_to(shared)
    (tmp_path / "link").symlink_to(root)
    return tmp_path


@pytest.mark.parametrize("root", ["data", "link"])
@pytest.mark.parametrize("folder", ["val2014", "train2014", "images/train2014"])
def test_links_of_folders_are_followed_and_of_images_stay_inside(linked: Path, root: str, folder: str) -> None:
    """The data folder and its image folder may be links; nothing below them may lead out again."""
    data = linked / root
    for name in ("a.jpg", "in.jpg", "not-there.jpg"):
        assert resolve_image(data, f"{folder}/{name}") == data / folder / name
    for name in ("out.jpg", "deep/secret.txt"):
        with pytest.raises(InputError, match=r"link out of the data folder: .*secret.txt"):
            resolve_image(data, f"{folder}/{name}")
    with pytest.raises(InputError):
        resolve_image(data, f"{folder}/loop.jpg/x")


def test_an_image_directly_in_the_data_folder(linked: Path) -> None:
    (linked / "data" / "b.jpg").symlink_to(linked / "secret.txt")
    assert resolve_image(linked / "data", "a.jpg") == linked / "data" / "a.jpg"
    with pytest.raises(InputError, match="link out of"):
        resolve_image(linked / "data", "b.jpg")

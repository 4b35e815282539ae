"""COCO's and Karpathy's files: read as a plain loop reads them, and every mistake in them is one clear line."""

import json
from collections.abc import Callable
from contextlib import suppress
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmcli import InputError
from mmcli.pipeline.data.coco import read_instances, read_karpathy

INSTANCES: dict[str, Any] = {
    "info": {"year": 2014},
    "images": [{"id": 30, "file_name": "c.jpg"}, {"id": 10, "file_name": "a.jpg"}, {"id": 20, "file_name": "b.jpg"}],
    # Not in order of id: labels follow the ids, not the file.
    "categories": [{"id": 90, "name": "toothbrush"}, {"id": 1, "name": "person"}, {"id": 13, "name": "stop sign"}],
    "annotations": [
        {"id": 1, "image_id": 10, "category_id": 90, "iscrowd": 0, "segmentation": [[1.5, 2.5]], "bbox": [0, 0, 1, 1]},
        {"id": 2, "image_id": 10, "category_id": 1, "iscrowd": 1, "segmentation": {"counts": [1], "size": [2, 2]}},
        {"id": 3, "image_id": 30, "category_id": 1, "iscrowd": 0},
        {"id": 4, "image_id": 10, "category_id": 1, "iscrowd": 0},
    ],
}


def sentences(*texts: str) -> list[dict[str, Any]]:
    return [{"tokens": text.split(), "raw": text, "imgid": 0, "sentid": n} for n, text in enumerate(texts)]


def image(cocoid: int, split: str, *texts: str, folder: str = "val2014") -> dict[str, Any]:
    return {
        "filepath": folder,
        "filename": f"{cocoid}.jpg",
        "imgid": 0,
        "split": split,
        "cocoid": cocoid,
        "sentids": [0],
        "sentences": sentences(*texts),
    }


KARPATHY: dict[str, Any] = {
    "dataset": "coco",
    "images": [
        image(10, "test", "a", "b", "c", "d", "e", "f"),
        image(30, "restval", "one\n"),
        image(20, "train", " ", "犬", "", "x", folder="train2014"),
        image(5, "val", "a", "b", "c", "d", "e"),
    ],
}


def put(folder: Path, data: Any) -> Path:
    path = folder / "file.json"
    path.write_text(json.dumps(data))
    return path


def test_instances(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    result = read_instances(put(tmp_path, INSTANCES))
    assert capfd.readouterr() == ("", "")
    assert result.image_id.tolist() == [30, 10, 20]
    assert result.category_id.tolist() == [1, 13, 90]
    assert result.category_names == ("person", "stop sign", "toothbrush")
    pairs = sorted(zip(result.annotation_image.tolist(), result.annotation_label.tolist(), strict=True))
    assert pairs == [(10, 0), (10, 0), (10, 2), (30, 0)]
    assert {result.image_id.dtype, result.annotation_image.dtype, result.annotation_label.dtype} == {np.dtype(np.int64)}


def test_instances_with_no_annotation(tmp_path: Path) -> None:
    result = read_instances(put(tmp_path, {**INSTANCES, "annotations": []}))
    assert result.annotation_image.tolist() == result.annotation_label.tolist() == []
    assert result.annotation_image.dtype == np.int64


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_instances_as_a_plain_loop_reads_them(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    ids = st.integers(0, 2**62)
    images = data.draw(st.lists(ids, min_size=1, max_size=6, unique=True))
    categories = data.draw(st.lists(ids, min_size=1, max_size=5, unique=True))
    pairs = data.draw(st.lists(st.tuples(st.sampled_from(images), st.sampled_from(categories)), max_size=20))
    content = {
        "images": [{"id": i} for i in images],
        "categories": [{"id": c, "name": f"class {c}"} for c in categories],
        "annotations": [{"id": n, "image_id": i, "category_id": c} for n, (i, c) in enumerate(pairs)],
    }
    result = read_instances(put(tmp_path_factory.mktemp("i"), content))
    order = sorted(categories)
    assert result.category_names == tuple(f"class {c}" for c in order)
    got = sorted(zip(result.annotation_image.tolist(), result.annotation_label.tolist(), strict=True))
    assert got == sorted((i, order.index(c)) for i, c in pairs)


def test_karpathy(tmp_path: Path) -> None:
    result = read_karpathy(put(tmp_path, KARPATHY))
    assert result.image_id.tolist() == [10, 30, 20, 5]
    assert result.origin.tolist() == ["test", "restval", "train", "val"]
    assert result.folders == ("val2014", "val2014", "train2014", "val2014")
    assert result.filenames == ("10.jpg", "30.jpg", "20.jpg", "5.jpg")
    # The first five in the file's order, verbatim; blank ones are no captions; fewer stay as they are.
    assert result.captions == (("a", "b", "c", "d", "e"), ("one\n",), ("犬", "x"), ("a", "b", "c", "d", "e"))
    assert result.n_captions_found == 6 + 1 + 2 + 5


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_encodings_of_json(tmp_path: Path, encoding: str) -> None:
    path = tmp_path / "file.json"
    path.write_text(json.dumps(KARPATHY, ensure_ascii=False), encoding=encoding)
    assert read_karpathy(path).captions[2] == ("犬", "x")


Change = Callable[[dict[str, Any]], object]


def assign(*keys: Any) -> Change:
    """A change that puts the last of the keys where the others lead to."""

    def change(data: Any) -> None:
        *path, last, value = keys
        for key in path:
            data = data[key]
        data[last] = value

    return change


def drop(*keys: Any) -> Change:
    def change(data: Any) -> None:
        *path, last = keys
        for key in path:
            data = data[key]
        del data[last]

    return change


BAD_INSTANCES: list[tuple[Change, tuple[str, ...]]] = [
    (drop("images"), ("wrong structure", "images", "got nothing", "a list")),
    (drop("annotations"), ("wrong structure", "annotations")),
    (drop("categories"), ("wrong structure", "categories")),
    (assign("images", {"id": 1}), ("images", "got an object", "a list")),
    (assign("annotations", 1, [1]), ("annotations[1]", "got a list", "an object")),
    (drop("images", 1, "id"), ("missing id", "images[1]")),
    (drop("annotations", 2, "id"), ("missing id", "annotations[2]")),
    (drop("annotations", 2, "image_id"), ("missing image_id", "annotations[2]")),
    (drop("annotations", 2, "category_id"), ("missing category_id", "annotations[2]")),
    (drop("categories", 0, "name"), ("missing name", "categories[0]")),
    (assign("images", 0, "id", "30"), ("images[0].id", "'30'", "whole number")),
    (assign("images", 0, "id", True), ("images[0].id", "True", "whole number")),
    (assign("images", 0, "id", 30.0), ("images[0].id", "30.0")),
    (assign("images", 0, "id", 1 << 63), ("images[0].id", "9223372036854775808")),
    (assign("annotations", 0, "image_id", None), ("annotations[0].image_id", "nothing")),
    (assign("annotations", 0, "category_id", [1]), ("annotations[0].category_id", "a list")),
    (assign("categories", 1, "name", 3), ("categories[1].name", "3", "text")),
    (assign("categories", 1, "name", " "), ("no categories, or one without a name",)),
    (assign("categories", []), ("no categories",)),
    (assign("annotations", 3, "image_id", 99), ("unknown image", "annotations[3]", "image_id 99")),
    (assign("annotations", 3, "category_id", 12), ("unknown category", "annotations[3]", "category_id 12")),
    (assign("images", 1, "id", 30), ("duplicate image", "30")),
    (assign("categories", 1, "id", 90), ("duplicate category", "90")),
    (assign("categories", 1, "name", "toothbrush"), ("duplicate category name", "toothbrush")),
]
BAD_KARPATHY: list[tuple[Change, tuple[str, ...]]] = [
    (drop("images"), ("images", "a list")),
    (assign("images", 1, "x"), ("images[1]", "'x'", "an object")),
    *((drop("images", 2, key), (f"missing {key}", "images[2]")) for key in ("cocoid", "split", "filepath", "filename")),
    (drop("images", 2, "sentences"), ("images[2].sentences", "nothing", "a list")),
    (drop("images", 2, "sentences", 1, "raw"), ("missing raw", "images[2].sentences[1]")),
    (assign("images", 2, "sentences", 1, "raw", 5), ("images[2].sentences[1].raw", "5", "text")),
    (assign("images", 2, "sentences", 1, "text"), ("images[2].sentences[1]", "an object")),
    (assign("images", 2, "sentences", 1, "raw", "half \ud83d"), ("images[2].sentences[1].raw", "\\ud83d", "text")),
    (assign("images", 0, "cocoid", "10"), ("images[0].cocoid", "'10'")),
    (assign("images", 0, "cocoid", 20), ("duplicate image", "20")),
    (assign("images", 3, "split", "valid"), ("unknown split", "images[3]", "'valid'", "train, restval, val, test")),
    (assign("images", 0, "split", "val"), ("no image in split test",)),
    (assign("images", 3, "split", "test"), ("no image in split val",)),
    (assign("images", []), ("no image in split train",)),
    (assign("images", 1, "sentences", []), ("an image with no caption", "images[1]")),
    (assign("images", 1, "sentences", 0, "raw", " \n"), ("an image with no caption", "images[1]")),
    (assign("images", 1, "filepath", "../other"), ("leaves the data folder", "images[1]", "../other/30.jpg")),
    (assign("images", 1, "filepath", "/etc"), ("leaves the data folder", "images[1]")),
    (assign("images", 1, "filepath", "C:"), ("leaves the data folder", "images[1]")),
    (assign("images", 1, "filename", "../../etc/passwd"), ("leaves the data folder", "images[1]", "passwd")),
    (assign("images", 1, "filename", "/etc/passwd"), ("leaves the data folder", "images[1]")),
    (assign("images", 1, "filename", "a\\b.jpg"), ("leaves the data folder", "images[1]")),
]
CASES = [(read_instances, INSTANCES, *case) for case in BAD_INSTANCES]
CASES += [(read_karpathy, KARPATHY, *case) for case in BAD_KARPATHY]


@pytest.mark.parametrize(("read", "good", "change", "parts"), CASES)
def test_a_mistake_is_one_line_with_its_place(
    tmp_path: Path, read: Callable[[Path], object], good: dict[str, Any], change: Change, parts: tuple[str, ...]
) -> None:
    data = deepcopy(good)
    change(data)
    path = put(tmp_path, data)
    with pytest.raises(InputError) as caught:
        read(path)
    line = str(caught.value)
    assert "\n" not in line
    assert len(line) < 500 + len(str(path))
    for part in (str(path), *parts):
        assert part in line, line


@pytest.mark.parametrize("missing", [("train", ("train", "restval")), ("val", ("val",)), ("test", ("test",))])
def test_train_may_come_from_restval_alone_but_no_split_is_empty(
    tmp_path: Path, missing: tuple[str, tuple[str, ...]]
) -> None:
    name, origins = missing
    images = [result for result in KARPATHY["images"] if result["split"] not in origins]
    with pytest.raises(InputError, match=f"no image in split {name}"):
        read_karpathy(put(tmp_path, {"images": images}))
    images = [result for result in KARPATHY["images"] if result["split"] != "train"]
    assert "train" not in read_karpathy(put(tmp_path, {"images": images})).origin


@pytest.mark.parametrize("read", [read_instances, read_karpathy])
@pytest.mark.parametrize(
    ("content", "parts"),
    [
        (b'{"images": [\n  {"id": 1},\n  {"id": }\n]}', ("broken JSON", "line 3, column 10")),
        (b'{"images": [{"id": 1}, {"id"', ("broken JSON", "line 1, column")),
        (b"", ("broken JSON", "line 1, column 1")),
        (b"PK\x03\x04\xff\xfe\x80 a zip file", ("cannot read JSON", "not UTF-8")),
        (b"[" * 200_000, ("cannot read JSON", "recursion")),
        (b'{"images": [{"id": ' + b"9" * 5000 + b"}]}", ("cannot read JSON", "4300 digits")),
        (b"[]", ("wrong structure", "a list", "a JSON object")),
        (b"null", ("wrong structure", "nothing", "a JSON object")),
    ],
    ids=["comma", "cut off", "empty", "zip", "deep", "digits", "list", "null"],
)
def test_a_file_that_is_not_whole_json(
    tmp_path: Path, read: Callable[[Path], object], content: bytes, parts: tuple[str, ...]
) -> None:
    path = tmp_path / "file.json"
    path.write_bytes(content)
    with pytest.raises(InputError) as caught:
        read(path)
    line = str(caught.value)
    for part in (str(path), "download the file again", *parts):
        assert part in line, line


@pytest.mark.parametrize("read", [read_instances, read_karpathy])
def test_a_missing_file_and_a_folder(tmp_path: Path, read: Callable[[Path], object]) -> None:
    with pytest.raises(InputError, match=r"a file is missing: .*nowhere\.json"):
        read(tmp_path / "nowhere.json")
    with pytest.raises(InputError, match="cannot read JSON"):
        read(tmp_path)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 100) | st.floats() | st.sampled_from(["", "a", "val", "..", "\ud800"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                [
                    "images",
                    "annotations",
                    "categories",
                    "id",
                    "image_id",
                    "category_id",
                    "name",
                    "cocoid",
                    "raw",
                    "sentences",
                    "split",
                    "filepath",
                    "filename",
                ]
            ),
            inner,
            max_size=6,
        )
    ),
    max_leaves=12,
)


@settings(max_examples=150, deadline=None)
@given(
    st.sampled_from([(read_instances, INSTANCES), (read_karpathy, KARPATHY)]),
    st.randoms(use_true_random=False),
    json_values,
)
def test_whatever_stands_in_the_file_no_other_error_comes_out(
    tmp_path_factory: pytest.TempPathFactory, case: Any, random: Any, value: Any
) -> None:
    """Any value in the place of any part of the file: it is read, or it is an InputError."""
    read, good = case
    data = {"root": deepcopy(good)}
    place, key = data, "root"
    while random.random() < 0.8 and place[key] and isinstance(place[key], dict | list):
        place = place[key]
        key = random.choice(sorted(place) if isinstance(place, dict) else range(len(place)))
    place[key] = value
    path = put(tmp_path_factory.getbasetemp(), data["root"])
    with suppress(InputError):
        read(path)

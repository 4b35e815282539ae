"""Protocols pick rows by place, label and list; splits do not overlap; the order of the manifest does not matter."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmcli import InputError
from mmcli.pipeline.data.manifest import Manifest
from mmcli.pipeline.data.protocols import Lists, check_protocol, read_lists, select


@dataclass(frozen=True)
class Listing:
    """As much of a manifest as a protocol needs."""

    image_ids: np.ndarray
    paths: tuple[str, ...]
    splits: np.ndarray
    labels: np.ndarray

    def labels_matrix(self) -> np.ndarray:
        return self.labels


def listing(n: int = 200, seed: int = 0, prefix: str = "") -> Listing:
    rng = np.random.default_rng(seed)
    folders = np.where(np.arange(n) < 0.6 * n, "train2014", "val2014")
    paths = tuple(f"{prefix}{folder}/COCO_{folder}_{i:012}.jpg" for i, folder in enumerate(folders))
    labels = (rng.random((n, 4)) < 0.4).astype(np.uint8)
    return Listing(rng.permutation(n) * 7, paths, rng.choice(["train", "val", "test"], n), labels)


def permuted(of: Listing, order: np.ndarray) -> Listing:
    return Listing(of.image_ids[order], tuple(of.paths[i] for i in order), of.splits[order], of.labels[order])


def lists_of(of: Listing, n_train: int = 20, n_test: int = 30) -> Lists:
    names = [Path(path).name for path in of.paths]
    parts = {"test": names[:n_test], "database": names[n_test:], "train": names[n_test : n_test + n_train]}
    return Lists(folder=Path("lists"), names={name: tuple(part) for name, part in parts.items()}, n_classes=4)


def test_karpathy_is_the_manifests_own() -> None:
    of = listing()
    for split, rows in select("karpathy", of).items():
        np.testing.assert_array_equal(rows, np.flatnonzero(of.splits == split))


@pytest.mark.parametrize("prefix", ["", "images/"])
def test_coco14_goes_by_place_and_takes_labelled_images_alone(prefix: str) -> None:
    of = listing(prefix=prefix)
    result = select("coco14", of)
    labelled = of.labels.any(axis=1)
    assert not labelled.all()
    first = [i for i, path in enumerate(of.paths) if "train2014/" in path and labelled[i]]
    assert sorted([*result["train"], *result["val"]]) == first
    assert result["test"].tolist() == [i for i, path in enumerate(of.paths) if "val2014/" in path and labelled[i]]
    assert abs(len(result["val"]) - len(first) / 20) <= 1


def test_a_folder_that_only_looks_like_cocos_is_not_taken() -> None:
    of = listing(40)
    other = Listing(of.image_ids, tuple(f"other/{path}" for path in of.paths), of.splits, of.labels)
    with pytest.raises(InputError, match=r"no train image under the protocol coco14.*labelled images below train2014/"):
        select("coco14", other)


def test_a_manifest_is_a_listing() -> None:
    paths = [f"train2014/{i}.jpg" for i in range(30)] + ["images/val2014/x.jpg"]
    written = Manifest.from_columns(
        image_ids=list(range(31)),
        paths=paths,
        splits=["train"] * 31,
        captions=[["a"]] * 31,
        labels=[[0]] * 31,
        category_names=["cat"],
    )
    assert {split: len(rows) for split, rows in select("coco14", written).items()} == {"train": 29, "val": 1, "test": 1}


@given(st.integers(0, 2**32 - 1), st.integers(80, 160), st.sampled_from(["coco14", "hashnet"]))
def test_splits_are_of_images_not_of_rows(seed: int, n: int, protocol: str) -> None:
    """In another order of the manifest the same images are in each split, ascending, and test is apart from the rest."""
    of, order = listing(n, seed), np.random.default_rng(seed + 1).permutation(n)
    lists = lists_of(of) if protocol == "hashnet" else None
    result, moved = select(protocol, of, lists), select(protocol, permuted(of, order), lists)
    for split, rows in result.items():
        assert (np.diff(rows) > 0).all()
        assert rows.dtype == np.int64
        assert set(of.image_ids[rows]) == set(of.image_ids[order][moved[split]])
        if split != "test":
            assert not set(rows) & set(result["test"])
    assert not set(result["train"]) & set(result["val"])
    if protocol == "hashnet":
        assert set(result["train"]) | set(result["val"]) <= set(result["database"])


def write_lists(folder: Path, **lines: list[str]) -> Path:
    for name, content in lines.items():
        (folder / f"{name}.txt").write_text("\n".join(content) + "\n")
    return folder


def test_lists_are_read_as_deep_hashing_writes_them(tmp_path: Path) -> None:
    of = listing(60)
    lines = [f"/home/somebody/coco/{path} {' '.join(map(str, y))}" for path, y in zip(of.paths, of.labels, strict=True)]
    folder = write_lists(tmp_path, database=lines[10:], train=lines[10:30], test=[*lines[:10], ""])
    result = select("hashnet", of, read_lists(folder))
    assert result["database"].tolist() == list(range(10, 60))
    assert result["train"].tolist() == list(range(10, 30))
    assert result["test"].tolist() == list(range(10))
    assert 1 <= len(result["val"]) <= 3


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("a.jpg 0 1 2 0", r"test.txt, line 2: got 4 labels of 0, 1, 2"),
        ("a.jpg", r"line 2.*got 0 labels of nothing"),
        ("a.jpg 0 1 0", r"line 2.*got 3 labels"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, line: str, said: str) -> None:
    good = ["b.jpg 0 1 0 1"]
    with pytest.raises(InputError, match=said):
        read_lists(write_lists(tmp_path, database=good, train=good, test=[*good, line]))


def test_lists_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    of = listing(60)
    good = lists_of(of)
    with pytest.raises(InputError, match=r"needs its lists.*--protocol-lists"):
        select("hashnet", of)
    with pytest.raises(InputError, match=r"database.txt.*no such file"):
        read_lists(tmp_path)
    for names, said in (
        ({**good.names, "test": ("zebra.jpg",)}, r"does not have.*test.txt.*got 1 of 1, as zebra.jpg"),
        ({**good.names, "test": good.names["test"][:1] * 2}, r"listed twice"),
        ({**good.names, "test": good.names["train"]}, r"test images in the database list.*got 20"),
    ):
        with pytest.raises(InputError, match=said):
            select("hashnet", of, Lists(folder=tmp_path, names=names, n_classes=4))
    with pytest.raises(InputError, match=r"other categories.*got 80 labels a line, wanted 4"):
        select("hashnet", of, Lists(folder=tmp_path, names=good.names, n_classes=80))
    same = Listing(of.image_ids, ("a/x.jpg", *of.paths[1:-1], "b/x.jpg"), of.splits, of.labels)
    with pytest.raises(InputError, match="one file name"):
        select("hashnet", same, good)


def test_a_run_is_not_evaluated_under_another_protocol() -> None:
    check_protocol("coco14", "coco14", where="run")
    with pytest.raises(
        InputError, match=r"got --protocol coco14, wanted karpathy.*train-head --protocol coco14"
    ) as said:
        check_protocol("coco14", "karpathy", where="run")
    assert "\n" not in str(said.value)

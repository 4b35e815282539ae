"""What predict is asked: images, folders, and files of captions whose paths stay in their folder."""

import csv
import json
from pathlib import Path

import pytest

from mmcli import InputError
from mmcli.pipeline.tagging.requests import read_requests


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "in").mkdir()
    for name in ("b.PNG", "a.jpg", "notes.txt"):
        (tmp_path / "in" / name).write_bytes(b"")
    (tmp_path / "c.jpg").write_bytes(b"")
    return tmp_path


def lines(*rows: object) -> str:
    return "\n".join(map(json.dumps, rows)) + "\n"


def pairs(found) -> list[tuple[str, str | None]]:
    return [(one.path.as_posix(), one.caption) for one in found]


def test_files_and_folders(folder) -> None:
    assert pairs(read_requests([Path("c.jpg")], "x", None)) == [("c.jpg", "x")]
    assert pairs(read_requests([Path("c.jpg"), Path("in")], None, None)) == [
        ("c.jpg", None),
        ("in/a.jpg", None),
        ("in/b.PNG", None),
    ]


@pytest.mark.parametrize("form", ["jsonl", "csv"])
def test_a_file_of_captions_alone(folder, form) -> None:
    file = folder / "in" / f"captions.{form}"
    table = '\ufeffcaption,path,more\n"two\nlines, ""quoted""",a.jpg,1\nä,b.PNG,2\n'
    text = (
        table
        if form == "csv"
        else lines({"path": "a.jpg", "caption": 'two\nlines, "quoted"'}, {"path": "b.PNG", "caption": "ä"}) + "\n"
    )
    file.write_text(text, encoding="utf-8")
    wanted = [(folder / "in" / "a.jpg").as_posix(), (folder / "in" / "b.PNG").as_posix()]
    assert pairs(read_requests([], None, file)) == list(zip(wanted, ['two\nlines, "quoted"', "ä"], strict=True))


def test_a_long_caption_of_a_csv_file_is_read(folder) -> None:
    """The csv module refuses fields beyond 131,072 letters unless it is told otherwise; the limit is put back."""
    file, limit = folder / "captions.csv", csv.field_size_limit()
    file.write_text(f'path,caption\nin/a.jpg,"{"a, " * 70_000}"\n')
    (request,) = read_requests([], None, file)
    assert request.caption == "a, " * 70_000
    assert csv.field_size_limit() == limit


def test_captions_of_images_that_were_named(folder) -> None:
    file = folder / "captions.jsonl"
    file.write_text(
        lines({"path": "in/a.jpg", "caption": "by its own folder"}, {"path": "b.PNG", "caption": "by the folder given"})
    )
    found = read_requests([Path("in"), Path("c.jpg")], None, file)
    assert pairs(found) == [("in/a.jpg", "by its own folder"), ("in/b.PNG", "by the folder given"), ("c.jpg", None)]


def test_captions_of_other_images_are_refused(folder) -> None:
    file = folder / "captions.jsonl"
    file.write_text('{"path": "elsewhere/x.jpg", "caption": "x"}\n')
    with pytest.raises(InputError, match="captions of other images") as error:
        read_requests([folder / "in"], None, file)
    assert "elsewhere/x.jpg" in str(error.value)


@pytest.mark.parametrize(
    ("text", "suffix", "line"),
    [
        (lines({"path": "../x.jpg", "caption": "x"}), "jsonl", "line 1: an image path leaves the data folder"),
        (lines({"path": "/etc/passwd", "caption": "x"}), "jsonl", "leaves the data folder"),
        (lines({"path": "a.jpg"}), "jsonl", "line 1: got path 'a.jpg', caption None"),
        (lines({"path": "a.jpg", "caption": "x"}, [1]), "jsonl", "line 2: got list"),
        ("{", "jsonl", "line 1: got text that is not JSON"),
        ("", "jsonl", "an empty file"),
        ("path;caption\na.jpg;x\n", "csv", "line 1: got columns path;caption"),
        ("path,caption\na.jpg\n", "csv", "caption None"),
        ('path,caption\n"a.jpg,x\n', "csv", "bad captions"),
        ("path,caption\n", "csv", "an empty file"),
        (
            "path,caption\na.jpg,x\nb.PNG,a dog, on a sofa\n",
            "csv",
            "line 3: got more than 2 fields, wanted",
        ),
        ("path,caption\nb.PNG,a dog, on a sofa\n", "csv", "put a caption with a comma into quotes"),
        ("path,caption,caption\na.jpg,x,y\n", "csv", "line 1: got columns path, caption, caption"),
        ("path,path,caption\na.jpg,b.PNG,x\n", "csv", "line 1: got columns"),
    ],
)
def test_wrong_files(folder, text, suffix, line) -> None:
    file = folder / f"captions.{suffix}"
    file.write_text(text)
    with pytest.raises(InputError) as error:
        read_requests([], None, file)
    assert line in str(error.value)
    assert file.name in str(error.value)


def test_what_does_not_go_together(folder) -> None:
    file = folder / "captions.jsonl"
    file.write_text(lines({"path": "c.jpg", "caption": "x"}, {"path": "c.jpg", "caption": "y"}))
    for words, line in (
        (([], None, None), "nothing to tag"),
        (([Path("in")], "x", None), "one caption for several images"),
        (([Path("c.jpg")], "x", file), "two ways to give captions"),
        (([Path("c.jpg")], None, file), "two captions of one image"),
        (([Path("c.jpg")], None, folder / "none"), "cannot read captions"),
        (([folder / "in" / "empty"], None, None), "a folder without images"),
    ):
        (folder / "in" / "empty").mkdir(exist_ok=True)
        with pytest.raises(InputError, match=line):
            read_requests(*words)
    (folder / "x").write_bytes(b"\xff")
    with pytest.raises(InputError, match="not UTF-8"):
        read_requests([], None, folder / "x")
    (folder / "link.jpg").symlink_to("/etc/hostname")
    file.write_text(lines({"path": "link.jpg", "caption": "x"}))
    with pytest.raises(InputError, match="link out of the data folder"):
        read_requests([], None, file)

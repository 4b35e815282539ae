"""What predict is asked: images, folders, and files of captions whose paths stay in their folder."""

import json
from pathlib import Path

import pytest

from mmcli import InputError
from mmcli.pipeline.tagging.predict import gather


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
    assert pairs(gather([Path("c.jpg")], "x", None)) == [("c.jpg", "x")]
    assert pairs(gather([Path("c.jpg"), Path("in")], None, None)) == [
        ("c.jpg", None),
        ("in/a.jpg", None),
        ("in/b.PNG", None),
    ]


@pytest.mark.parametrize("form", ["jsonl", "csv"])
def test_a_file_of_captions_alone(folder, form) -> None:
    file = folder / "in" / f"captions.{form}"
    csv = '\ufeffcaption,path,more\n"two\nlines, ""quoted""",a.jpg,1\nä,b.PNG,2\n'
    text = (
        csv
        if form == "csv"
        else lines({"path": "a.jpg", "caption": 'two\nlines, "quoted"'}, {"path": "b.PNG", "caption": "ä"}) + "\n"
    )
    file.write_text(text, encoding="utf-8")
    wanted = [(folder / "in" / "a.jpg").as_posix(), (folder / "in" / "b.PNG").as_posix()]
    assert pairs(gather([], None, file)) == list(zip(wanted, ['two\nlines, "quoted"', "ä"], strict=True))


def test_captions_of_images_that_were_named(folder) -> None:
    file = folder / "captions.jsonl"
    file.write_text(
        lines({"path": "in/a.jpg", "caption": "by its own folder"}, {"path": "b.PNG", "caption": "by the folder given"})
    )
    found = gather([Path("in"), Path("c.jpg")], None, file)
    assert pairs(found) == [("in/a.jpg", "by its own folder"), ("in/b.PNG", "by the folder given"), ("c.jpg", None)]


def test_captions_of_other_images_are_refused(folder) -> None:
    file = folder / "captions.jsonl"
    file.write_text('{"path": "elsewhere/x.jpg", "caption": "x"}\n')
    with pytest.raises(InputError, match="captions of other images") as error:
        gather([folder / "in"], None, file)
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
    ],
)
def test_wrong_files(folder, text, suffix, line) -> None:
    file = folder / f"captions.{suffix}"
    file.write_text(text)
    with pytest.raises(InputError) as error:
        gather([], None, file)
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
            gather(*words)
    (folder / "x").write_bytes(b"\xff")
    with pytest.raises(InputError, match="not UTF-8"):
        gather([], None, folder / "x")
    (folder / "link.jpg").symlink_to("/etc/hostname")
    file.write_text(lines({"path": "link.jpg", "caption": "x"}))
    with pytest.raises(InputError, match="link out of the data folder"):
        gather([], None, file)

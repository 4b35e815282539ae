"""Names, captions, folders and links as people have them, and files that are no files."""

import errno
import json
import os
import pickle
import unicodedata
from pathlib import Path

import pytest

from mmcli import InputError
from mmcli.errors import cannot_read, read_text
from mmcli.pipeline.core.config import load_config
from mmcli.pipeline.core.files import LinkedFolder, resolve_image
from mmcli.pipeline.core.run import read_info
from mmcli.pipeline.data.coco import read_json
from mmcli.pipeline.data.manifest import read_manifest
from mmcli.pipeline.tagging.explain import plain
from mmcli.pipeline.tagging.index_file import read_index
from mmcli.pipeline.tagging.requests import read_requests

COMPOSED = "café.jpg"
DECOMPOSED = unicodedata.normalize("NFD", COMPOSED)


@pytest.fixture
def folder(tmp_path) -> Path:
    (tmp_path / "f").mkdir()
    return tmp_path / "f"


def fill(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).write_bytes(b"")


def captions(folder: Path, path: str, caption: str = "x") -> Path:
    file = folder.parent / "c.jsonl"
    file.write_text(json.dumps({"path": path, "caption": caption}) + "\n", encoding="utf-8")
    return file


def test_what_systems_leave_is_passed_over(folder) -> None:
    fill(folder, "a.jpg", "._a.jpg", ".DS_Store", "Thumbs.db", "desktop.ini")
    (folder / "__MACOSX").mkdir()
    notes: list[str] = []
    assert [one.path.name for one in read_requests([folder], None, None, notes=notes)] == ["a.jpg"]
    assert notes == []


def test_every_kind_of_picture_is_tagged(folder) -> None:
    names = ["a.jfif", "b.JPE", "c.avif", "d.jp2", "e.TIF", "f.webp", "g.bmp", "h.gif", "i.JPG"]
    fill(folder, *names)
    assert [one.path.name for one in read_requests([folder], None, None)] == names


def test_what_is_left_out_of_a_folder_is_said(folder) -> None:
    fill(folder, "a.jpg", "b.svg", ".hidden.jpg", "c\nd.txt", "c.csv")
    (folder / "2024").mkdir()
    (folder / "c.csv").write_text("path,caption\na.jpg,x\n")
    notes: list[str] = []
    read_requests([folder], None, folder / "c.csv", notes=notes)
    (note,) = notes
    for part in ("the folder 2024", "b.svg", ".hidden.jpg", r"c\nd.txt"):
        assert part in note
    assert "c.csv" not in note
    assert "\n" not in note
    fill(folder, *(f"{row}.mp4" for row in range(9)))
    read_requests([folder], None, None, notes=notes)
    assert "more" in notes[-1]
    (folder / "a.jpg").unlink()
    with pytest.raises(InputError, match=r"a folder without images.*the folder 2024"):
        read_requests([folder], None, None)


@pytest.mark.parametrize(("on_disk", "in_file"), [(COMPOSED, DECOMPOSED), (DECOMPOSED, COMPOSED)])
def test_names_match_in_any_unicode_form(folder, on_disk, in_file) -> None:
    fill(folder, on_disk)
    file = captions(folder, in_file)
    assert [one.caption for one in read_requests([folder], None, file)] == ["x"]
    assert read_requests([], None, captions(folder, f"f/{in_file}"))[0].path == folder / on_disk


def test_two_unicode_forms_of_a_name_are_told_apart(folder) -> None:
    third = "cafe\u0301\u0323.jpg"
    fill(folder, COMPOSED, DECOMPOSED)
    requests = read_requests([folder], None, captions(folder, DECOMPOSED))
    assert {one.path.name: one.caption for one in requests} == {DECOMPOSED: "x", COMPOSED: None}
    fill(folder, third, unicodedata.normalize("NFC", third))
    with pytest.raises(InputError, match="differ in their Unicode form alone"):
        read_requests([folder], None, captions(folder, unicodedata.normalize("NFD", third)))


def test_half_surrogate_pairs_are_refused(folder) -> None:
    fill(folder, "a.jpg")
    for file in (captions(folder, "a.jpg", "a dog \ud83d"), captions(folder, "\ud83d.jpg")):
        with pytest.raises(InputError, match=r"line 1: got a \w+ with half a surrogate pair.*\\ud83d"):
            read_requests([folder], None, file)
    with pytest.raises(InputError, match=r"--caption: got caf\\xe9") as error:
        read_requests([folder / "a.jpg"], "caf\udce9", None)
    str(error.value).encode()


def test_names_that_are_not_utf8_are_matched_and_shown(folder) -> None:
    name = os.fsdecode(b"broken_\xe9.jpg")
    fill(folder, name)
    assert [one.caption for one in read_requests([folder], None, captions(folder, name))] == ["x"]
    shown = plain(name)
    assert shown.encode()
    assert "broken_" in shown
    with pytest.raises(InputError, match=r"broken_\\xe9.jpg") as error:
        read_requests([folder], None, captions(folder, "other.jpg"))
    str(error.value).encode()


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_captions_in_encodings_with_a_mark(folder, encoding) -> None:
    fill(folder, "a.jpg")
    file = folder.parent / "c.csv"
    file.write_text("path,caption\na.jpg,käse\n", encoding=encoding)
    assert read_requests([folder], None, file)[0].caption == "käse"


def test_captions_in_latin_1_are_refused(folder) -> None:
    fill(folder, "a.jpg")
    file = folder.parent / "c.csv"
    file.write_text("path,caption\na.jpg,käse\n", encoding="latin-1")
    with pytest.raises(InputError, match=r"not UTF-8 \(byte 0xe4.*save it as UTF-8"):
        read_requests([folder], None, file)


def test_links_to_blobs_are_tagged_with_their_captions(folder) -> None:
    blobs = folder.parent / "blobs"
    blobs.mkdir()
    fill(blobs, "0123")
    for name in ("a.jpg", "b.jpg"):  # two names of one content
        (folder / name).symlink_to("../blobs/0123")
    file = folder / "c.jsonl"
    file.write_text('{"path": "a.jpg", "caption": "x"}\n{"path": "b.jpg", "caption": "y"}\n')
    assert [one.caption for one in read_requests([folder], None, file)] == ["x", "y"]
    with pytest.raises(InputError, match="--follow-links"):
        read_requests([], None, file)
    assert [one.caption for one in read_requests([], None, file, follow_links=True)] == ["x", "y"]


def test_followed_links_are_of_files_alone(folder) -> None:
    away = folder.parent / "away"
    away.mkdir()
    fill(away, "0123")
    (folder / "sub").mkdir()
    (folder / "sub" / "a.jpg").symlink_to(away / "0123")
    (folder / "sub" / "deep").symlink_to(away)
    linked = pickle.loads(pickle.dumps(LinkedFolder(folder)))
    assert resolve_image(linked, "sub/a.jpg") == folder / "sub" / "a.jpg"
    for root, path in ((folder, "sub/a.jpg"), (linked, "sub/deep/0123"), (linked, "../away/0123")):
        with pytest.raises(InputError, match=r"out of the data folder|leaves the data folder"):
            resolve_image(root, path)


READERS = {
    "captions": lambda path: read_requests([], None, path),
    "manifest": read_manifest,
    "config": load_config,
    "index": read_index,
    "json": lambda path: read_json(path, dict, lambda record: record),
    "text": lambda path: read_text(path, "cannot read a text"),
    "run": lambda path: read_info(path.parent),
}


@pytest.mark.parametrize("kind", READERS)
def test_a_fifo_is_refused_at_once(tmp_path, kind) -> None:
    path = tmp_path / ("run.json" if kind == "run" else "x.csv")
    os.mkfifo(path)
    with pytest.raises(InputError, match="a FIFO"):
        READERS[kind](path)


@pytest.mark.parametrize("kind", READERS)
def test_no_permission_is_not_told_as_no_file(tmp_path, kind, monkeypatch) -> None:
    path = tmp_path / ("run.json" if kind == "run" else "x.csv")
    path.write_bytes(b"")

    def refuse(name: object, *_: object, **__: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", str(name))

    monkeypatch.setattr(Path, "stat", refuse)
    with pytest.raises(InputError, match="no permission") as error:
        READERS[kind](path)
    assert not any(words in str(error.value) for words in ("no file", "no such", "No such", "no run.json"))


def test_an_error_is_one_line_with_short_quotes() -> None:
    line = str(InputError("bad", where="a\nb\x1b[31m", got="x" * 5000, wanted="y"))
    assert len(line.splitlines()) == 1
    assert r"a\nb\x1b[31m" in line
    assert "x" * 197 in line
    assert "x" * 201 not in line
    assert "a folder" not in str(cannot_read("bad", "p", PermissionError(errno.EACCES, "no")))

"""``mmcli predict``: what a person and a program read, bad images, and the picture."""

import io
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from mmcli import InputError, Tagger
from mmcli.pipeline.data.manifest import read_manifest
from mmcli.pipeline.tagging.explain import AGREES, DIFFERS, MISSING, draw, plain, show
from mmcli.pipeline.tagging.voting import Neighbour, Tag, Tagging

NASTY = "two [red]dogs[/red] $x_1^{ \\frac :smile: 日本語 \x1b[31m\ron a sofa"


def one(miniature, split: str, at: int = 0) -> tuple[Path, str]:
    listing = read_manifest(miniature.data / "manifest.parquet")
    row = listing.rows(split)[at]
    return miniature.data / listing.paths[row], listing.captions[row][0]


def near(image_id: int = 1, **more) -> Neighbour:
    given = {"path": "a.jpg", "caption": NASTY, "distance": 3.0, "similarity": 0.9, "weight": 0.6, "labels": ("cat",)}
    return Neighbour(image_id=image_id, **(given | more))


def tagging(*voters: Neighbour, **more) -> Tagging:
    tag = Tag(name="cat", score=0.6, voters=tuple(v for v in voters if "cat" in v.labels))
    given = {"image": None, "caption": NASTY, "tags": (tag,), "neighbours": voters, "scores": np.zeros(2, np.float32)}
    return Tagging(category_names=("cat", "dog"), metric="hamming", **(given | more))


def text(renderable) -> str:
    console = Console(width=200, markup=False, highlight=False, file=io.StringIO())
    console.print(renderable)
    return console.file.getvalue()


def test_captions_are_shown_as_they_are_and_command_nothing() -> None:
    shown = text(show(tagging(near(), near(2, path=None, caption=None))))
    assert "two [red]dogs[/red] $x_1^{ \\frac :smile: 日本語 [31m on a sofa" in shown
    assert "\x1b" not in shown
    assert "a.jpg" in shown
    assert "image 2" in shown
    assert "60%" in shown
    assert plain("a\x00b\tc\u202ed") == "a b c d"


def test_the_rest_of_the_voters_is_counted() -> None:
    shown = text(show(tagging(*(near(i, weight=0.1) for i in range(6))), voters=2))
    assert "and 4 more" in shown
    assert "40%" in shown
    assert "no tag" in text(show(tagging(near(labels=()), tags=())))
    assert "truth  cat" in text(show(tagging(near()), truth=["cat"]))


def test_the_command_prints_what_the_tagger_gives(mmcli, here, miniature) -> None:
    image, caption = one(miniature, "test")
    run = next((here / "runs").iterdir())
    code, out, err = mmcli(
        "predict", image, "--caption", caption, "--device", "cpu", "--json", "--data", miniature.data
    )
    assert code == 0, err
    result = json.loads(out)
    (found,) = Tagger.load(run, device="cpu").predict([image], [caption])
    assert result["images"] == [json.loads(json.dumps(found.to_json()))]
    assert (result["K"], result["distance_metric"], result["n_index"], result["bits"]) == (5, "hamming", 40, 64)
    assert len(result["category_names"]) == len(result["images"][0]["scores"]) == 80
    code, out, err = mmcli("predict", image, "--caption", caption, "--device", "cpu", "--quiet", "--top", 2)
    assert (code, err) == (0, "")
    assert f"{found.tags[0].score:.2f}" in out
    assert found.tags[0].name in out
    assert Path(found.neighbours[0].path).name[-20:] in "".join(out.split())
    assert "5 neighbours of 40, hamming, softmax vote" in out
    code, out, _ = mmcli(
        "predict",
        image,
        "--caption",
        caption,
        "--device",
        "cpu",
        "--json",
        "--metric",
        "cosine",
        "--vote",
        "rank",
        "--k",
        3,
        "--tau",
        0.2,
    )
    result = json.loads(out)
    assert (code, result["K"], result["distance_metric"], result["voting_strategy"], result["tau"]) == (
        0,
        3,
        "cosine",
        "rank",
        0.2,
    )
    weights = [near["weight"] for near in result["images"][0]["neighbours"]]
    np.testing.assert_allclose(weights, np.array([6, 3, 2]) / 11)


def test_an_image_of_the_index_does_not_vote_for_itself(mmcli, here, miniature) -> None:
    image, caption = one(miniature, "train")
    code, out, err = mmcli(
        "predict", image, "--caption", caption, "--device", "cpu", "--json", "--data", miniature.data
    )
    assert code == 0, err
    result = json.loads(out)
    assert "did not vote for themselves" in result["notes"][0]
    assert all(miniature.data / near["path"] != image for near in result["images"][0]["neighbours"])
    copy = here / "copy.jpg"
    shutil.copy(image, copy)
    result = json.loads(mmcli("predict", copy, "--caption", caption, "--device", "cpu", "--json")[1])
    assert any(miniature.data / near["path"] == image for near in result["images"][0]["neighbours"])


def test_bad_images_stop_or_are_skipped(mmcli, here, miniature) -> None:
    (here / "in").mkdir()
    rows = []
    for at in range(3):
        image, caption = one(miniature, "test", at)
        shutil.copy(image, here / "in" / f"{at}.jpg")
        rows.append({"path": f"{at}.jpg", "caption": caption})
    (here / "in" / "1.jpg").write_bytes(b"no image")
    (here / "captions.jsonl").write_text("\n".join(json.dumps({**row, "path": f"in/{row['path']}"}) for row in rows))
    words = ("predict", "in", "--captions", "captions.jsonl", "--device", "cpu", "--json")
    code, out, err = mmcli(*words, "--quiet")
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert "in/1.jpg" in err
    code, out, err = mmcli(*words, "--on-error", "skip")
    assert code == 0, err
    result = json.loads(out)
    assert [Path(found["image"]).name for found in result["images"]] == ["0.jpg", "2.jpg"]
    assert len(result["skipped"]) == 1
    alone = json.loads(mmcli("predict", "in/2.jpg", "--caption", rows[2]["caption"], "--device", "cpu", "--json")[1])
    np.testing.assert_allclose(alone["images"][0]["scores"], result["images"][1]["scores"], atol=1e-5)
    code, out, err = mmcli("predict", "in/1.jpg", "--caption", "x", "--device", "cpu", "--on-error", "skip", "--quiet")
    assert (code, out, err.count("\n")) == (2, "", 1)


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ((), "nothing to tag"),
        (("a.jpg",), "no caption: a.jpg"),
        (("a.jpg", "--caption", "x"), "no file, wanted a whole image file; check the path"),
        (("a.jpg", "--caption", "x", "--k", "41"), "got --k 41, wanted 1 to 40"),
        (("a.jpg", "--caption", "x", "--k", "0"), "--k"),
        (("a.jpg", "--caption", "x", "--index", "none"), "no index"),
        (("a.jpg", "--caption", "x", "--run", "none"), "no run"),
        (("a.jpg", "--caption", "x", "--panel", "why.txt"), "--panel"),
        (("a.jpg", "--caption", "x", "--model", "./none"), "no checkpoint"),
        (("a.jpg", "--caption", "x", "--top", "0"), "--top"),
    ],
)
def test_mistakes_are_one_line(mmcli, here, words, line) -> None:
    code, out, err = mmcli("predict", *words, "--device", "cpu", "--quiet")
    assert (code, out, err.count("\n")) == (2, "", 1), err
    assert line in err


def test_a_caption_with_an_unquoted_comma_is_one_line(mmcli, here) -> None:
    (here / "c.csv").write_text("path,caption\nx.jpg,a dog, on a sofa\n")
    code, out, err = mmcli("predict", "--captions", "c.csv", "--quiet")
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert "c.csv, line 2" in err
    assert "put a caption with a comma into quotes" in err


def colours(path: Path) -> set[str]:
    with Image.open(path) as image:
        pixels = np.asarray(image.convert("RGB")).reshape(-1, 3)
    found, counts = np.unique(pixels, axis=0, return_counts=True)
    return {"#{:02X}{:02X}{:02X}".format(*colour) for colour, count in zip(found, counts, strict=True) if count > 1000}


def test_the_panel_draws_boxes_for_missing_pictures(tmp_path) -> None:
    Image.new("RGB", (60, 30), (10, 200, 30)).save(tmp_path / "a.jpg")
    secret = tmp_path / "outside.png"
    Image.new("RGB", (60, 30), (1, 2, 3)).save(secret)
    data = tmp_path / "data"
    data.mkdir()
    shutil.copy(tmp_path / "a.jpg", data)
    path = tmp_path / "new" / "why.png"
    draw(path, [tagging(near(), near(2, labels=("dog",)), image=str(tmp_path / "a.jpg"))], data=data)
    assert {AGREES, DIFFERS} <= colours(path)
    assert MISSING not in colours(path)
    bad = [near(1, path="gone.jpg"), near(2, path="../outside.png"), near(3, path=None), near(4, path=str(secret))]
    draw(path, [tagging(*bad, image="gone.jpg", tags=())], data=data)
    assert MISSING in colours(path)
    assert "#010203" not in colours(path)
    draw(path, [tagging(near(), image=str(tmp_path / "a.jpg"))] * 20, data=data)  # the first 16
    with Image.open(path) as image:
        assert image.height < 17 * 410


def test_the_panel_from_the_command_line(mmcli, here, miniature) -> None:
    image, _ = one(miniature, "test")
    words = (
        "predict",
        image,
        "--caption",
        NASTY,
        "--device",
        "cpu",
        "--data",
        miniature.data,
        "--panel",
        "why.png",
        "--json",
    )
    code, out, err = mmcli(*words)
    assert code == 0, err
    assert json.loads(out)["panel"] == "why.png"
    with Image.open(here / "why.png") as drawn:
        assert drawn.format == "PNG"


def test_a_full_disk_says_so(tmp_path, monkeypatch) -> None:
    from matplotlib.figure import Figure

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Figure, "savefig", full)
    with pytest.raises(InputError, match="No space left"):
        draw(tmp_path / "why.png", [tagging(near())], data=tmp_path)
    assert list(tmp_path.iterdir()) == []

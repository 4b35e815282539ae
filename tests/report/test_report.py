"""The whole report: one page that needs nothing else and runs nothing of a caption's, and files that fit each other."""

import json
import re
import shutil
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from kit.reports import CAPTIONS, NAMES, SCRIPT, Kit, make_kit
from mmcli import InputError
from mmcli.pipeline.report import report as stage
from mmcli.pipeline.report.document import Figure, Table
from mmcli.pipeline.report.report import ReportPlan, report

VOID = {"meta", "link", "img", "br", "input", "circle", "line", "use", "path", "image", "rect", "stop", "clippath"}


class Page(HTMLParser):
    """Tags with their attributes, text, and whether every tag that was opened was closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data) -> None:
        self.text.append(data)

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


@pytest.fixture(scope="module")
def kit(tmp_path_factory: pytest.TempPathFactory) -> Kit:
    return make_kit(tmp_path_factory.mktemp("kit"))


@pytest.fixture(scope="module")
def made(kit: Kit) -> tuple[Path, stage.ReportResult]:
    out = kit.root / "report"
    return out, report(ReportPlan(runs=kit.runs, data=kit.data, out=out, latex=True))


@pytest.fixture(scope="module")
def page(made) -> Page:
    return Page((made[0] / "report.html").read_text())


def test_the_page_asks_nothing_of_the_network(page: Page) -> None:
    assert page.open == []
    policy = next(one["content"] for one in page.all("meta") if one.get("http-equiv") == "Content-Security-Policy")
    assert policy.startswith("default-src 'none'")
    for _, attributes in page.tags:
        for key in ("src", "href", "xlink:href"):
            value = attributes.get(key)
            assert value is None or value.startswith(("data:", "#")), value


def test_captions_and_names_are_text_and_nothing_else(made, page: Page) -> None:
    text = "".join(page.text)
    assert len(page.all("script")) == 1
    assert not any(key.startswith("on") for _, attributes in page.tags for key in attributes)
    assert not any((one.get("href") or "").startswith("javascript") for one in page.all("a"))
    for name in NAMES:
        assert name in text
    for caption in CAPTIONS:
        assert " ".join(caption.split()) in " ".join(text.split())
    assert 'kit <i>"x"</i>' in text
    assert f"no store {SCRIPT}" in text  # the note of a row that failed
    assert SCRIPT not in (made[0] / "report.html").read_text()


def test_what_is_drawn_has_words_and_ids_are_unique(page: Page) -> None:
    images = page.all("img")
    assert len(images) > 80
    assert all(one["alt"] and one["src"].startswith("data:image/webp;base64,") for one in images)
    drawings = [attributes for _, attributes in page.tags if attributes.get("role") == "img"]
    assert len(drawings) >= 12
    assert all(len(one["aria-label"] or "") > 40 for one in drawings)
    ids = Counter(attributes["id"] for _, attributes in page.tags if attributes.get("id"))
    assert max(ids.values()) == 1
    labelled = {one.get("aria-labelledby") for _, one in page.tags} - {None}
    assert labelled <= set(ids)
    assert {one["href"][1:] for one in page.all("a")} <= set(ids)


def test_markdown_names_its_files_and_has_whole_tables(made) -> None:
    out, result = made
    text = (out / "report.md").read_text()
    named = re.findall(r"\]\(((?:figures|pictures)/[^)]+)\)", text)
    assert len(named) > 80
    assert all((out / name).is_file() for name in named)
    assert {path.name for path in (out / "figures").iterdir()} == {
        f"{figure.name}.{ending}" for figure in result.document.blocks(Figure) for ending in ("svg", "png")
    }
    width = None
    for line in text.splitlines():
        cells = len(re.findall(r"(?<!\\)(?:\\\\)*\|", line)) if line.startswith("| ") else None
        assert width is None or cells is None or cells == width, line
        width = cells
    assert "<script>" not in re.sub(r"\\[<>]", "", text)
    assert not re.search(r"(?<!\\)\]\(javascript", text)


def test_latex_tables_are_whole(made) -> None:
    out, result = made
    names = {path.stem for path in (out / "tables").iterdir()}
    assert names == {"table-answers", *(table.name for table in result.document.blocks(Table))}
    for path in (out / "tables").iterdir():
        text = path.read_text()
        columns = len(re.search(r"begin\{tabular\}\{([lr]+)\}", text)[1])
        body = text.split("\\toprule")[1].split("\\bottomrule")[0]
        rows = [line for line in body.splitlines() if line.endswith(r"\\")]
        assert rows
        for row in rows:
            assert len(re.findall(r"(?<!\\)&", row)) == columns - 1, row
        plain = re.sub(r"\\[A-Za-z]+\{\}|\\[a-z]+|\\[{}$&#%_\\]|\$[+-]?[\\a-z]*\$", "", body)
        assert not set("$#%_<>|^~") & set(plain), plain


def test_sections_say_what_the_run_is_and_how_it_is_made_again(made) -> None:
    out, result = made
    text = (out / "report.md").read_text()
    assert result.run.name == "head"
    assert "the highest val mAP, 0.560, of 1 run with hash codes" in text
    assert f"mmcli report --runs {result.run.parent} --data {result.run.parent.parent / 'data'}" in text
    assert [section.name for section in result.document.sections] == [
        "answers",
        "methods",
        "experiments",
        "curves",
        "classes",
        "costs",
        "inside",
        "queries",
        "failures",
        "again",
    ]
    assert "mmcli ablate C3 --seeds" not in text
    assert re.search(
        r"Not made: M1, M2, C1, C3, C4: `mmcli ablate M1 M2 C1 C3 C4 --seeds 3 --store \S+gone --out", text
    )


def test_a_report_is_the_same_each_time_and_replaced_whole(made, kit: Kit, tmp_path: Path, monkeypatch) -> None:
    out, _ = made
    copy = tmp_path / "report"
    shutil.copytree(out, copy)
    plan = ReportPlan(runs=kit.runs, data=kit.data, out=copy)
    with pytest.raises(InputError, match="--force to replace"):
        report(plan)

    def stop(_document) -> str:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(stage, "to_markdown", stop)
        with pytest.raises(KeyboardInterrupt):
            report(ReportPlan(runs=kit.runs, data=kit.data, out=copy, force=True))
    assert sorted(path.name for path in copy.parent.iterdir()) == ["report"]
    assert (copy / "tables").is_dir()  # the old one, as it was
    (copy / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match=r"notes.txt"):
        report(ReportPlan(runs=kit.runs, data=kit.data, out=copy, force=True))
    assert (copy / "notes.txt").read_text() == "mine"


def test_missing_inputs_are_named_with_their_commands(tmp_path: Path, monkeypatch) -> None:
    kit = make_kit(tmp_path, norms=False, rows=False)
    monkeypatch.chdir(tmp_path)
    result = report(ReportPlan(runs=kit.runs))
    text = (tmp_path / "report" / "report.md").read_text()
    assert result.to_json()["answers"][2]["comparisons"][0]["seeds"] == (1, 1)  # of the run itself
    for said in (
        "mmcli ablate A1 M2 --seeds 3",
        "mmcli report --data DIR",
        "Norms are not kept in head",
        "mmcli ablate base",
    ):
        assert said in text
    assert "pictures" not in {path.name for path in (tmp_path / "report").iterdir()}


def test_the_command_line(mmcli, kit: Kit, tmp_path: Path) -> None:
    shutil.copytree(kit.root, tmp_path / "kit")
    words = ("report", "--runs", "kit/runs", "--data", "kit/data")
    code, out, err = mmcli(*words, "--markdown-only", "docs/figures.md", "--json")
    assert code == 0, err
    found = json.loads(out)
    assert found["files"] == ["docs/figures.md"]
    assert [one["name"] for one in found["answers"]] == [
        "magnitude",
        "hadamard",
        "neighbours",
        "bits",
        "speed",
        "classes",
    ]
    text = (tmp_path / "docs" / "figures.md").read_text()
    assert "![" not in text
    assert "mmcli report --runs kit/runs --data kit/data --markdown-only docs/figures.md" in text
    assert mmcli(*words, "--markdown-only", "docs/figures.md")[0] == 2
    for wrong, said in (
        (("--runs", "nowhere"), "nothing to report"),
        (("--data", "nowhere"), "no manifest"),
        (("--run", "kit/data"), "no run"),
    ):
        code, out, err = mmcli(*words[:1], *(wrong if wrong[0] == "--runs" else (*words[1:3], *wrong)), "--quiet")
        assert (code, out, err.count("\n")) == (2, "", 1)
        assert said in err
    assert not (tmp_path / "report").exists()


def test_damaged_scores_are_named(kit: Kit, tmp_path: Path) -> None:
    shutil.copytree(kit.root, tmp_path / "kit")
    victim = next((tmp_path / "kit" / "runs" / "ablations" / "scores").glob("A1-*"))
    victim.write_bytes(victim.read_bytes()[:50])
    with pytest.raises(InputError, match=f"damaged scores.*{victim.name}"):
        report(ReportPlan(runs=tmp_path / "kit" / "runs", markdown_only=tmp_path / "x.md"))
    assert not (tmp_path / "x.md").exists()


def test_a_path_of_the_manifest_never_leaves_the_data_folder(kit: Kit, tmp_path: Path) -> None:
    from mmcli.pipeline.data.manifest import read_manifest
    from mmcli.pipeline.report.collect import Pictures

    shutil.copytree(kit.data, tmp_path / "data")
    listing = read_manifest(tmp_path / "data" / "manifest.parquet")
    secret = tmp_path / "secret.jpg"
    shutil.copy(tmp_path / "data" / listing.paths[0], secret)
    (tmp_path / "data" / listing.paths[0]).unlink()
    (tmp_path / "data" / listing.paths[0]).symlink_to(secret)
    pictures = Pictures(tmp_path / "data", listing)
    assert pictures.picture(int(listing.image_ids[0]), 32) is None
    assert pictures.picture(10**9, 32) is None
    found = pictures.picture(int(listing.image_ids[1]), 32)
    assert (max(found.width, found.height), found.webp[8:12]) == (32, b"WEBP")
    assert np.isfinite(len(found.uri))

"""Names, captions and paths of any form are text in everything that is generated: pages, tables, drawings, commands."""

import re
import shlex
import xml.etree.ElementTree as ET
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest

from mmcli import InputError
from mmcli.pipeline.core.files import command
from mmcli.pipeline.core.run import mark, open_run, read_info
from mmcli.pipeline.evaluation.compare import compare
from mmcli.pipeline.report.document import Cell, Commands, Document, Section, Table, Text
from mmcli.pipeline.report.plots import SERIES, draw, for_page
from mmcli.pipeline.report.render import to_html, to_latex, to_markdown

NAMES = (
    "</td><script>alert(1)</script>",
    "a|b",
    r"100%_$x\y",
    "line\none",
    "`tick`",
    "``` fence",
    "[x](javascript:alert(1))",
    "[1pt] row",
    "* row",
    "&amp; & #1 ~ ^ {}",
    '"quoted" it\'s',
    "=HYPERLINK(1)",
    "<!-- c",
    "]]>",
    "# head",
    "--",
    "grün 猫",
)


class Cells(HTMLParser):
    """Texts of the cells of tables, and every tag."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.cells: list[str] = []
        self._inside = False
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag in {"td", "th"}:
            self.cells.append("")
            self._inside = True

    def handle_endtag(self, tag: str) -> None:
        self._inside = self._inside and tag not in {"td", "th"}

    def handle_data(self, data: str) -> None:
        if self._inside:
            self.cells[-1] += data


@pytest.fixture(scope="module")
def document() -> Document:
    """A document whose every text is one of the names."""
    columns = ("category", *NAMES[:2])
    rows = tuple((Cell(text=name), Cell(text="1", detail=name), Cell(text=name, bold=True)) for name in NAMES)
    lines = tuple(command("report", "--runs", name) for name in NAMES)
    blocks = (
        Table(name="t", title=NAMES[0], columns=columns, rows=rows, note=" ".join(NAMES), commands=lines),
        *(Text(text=name) for name in NAMES),
        *(Text(text=name, command=line) for name, line in zip(NAMES, lines, strict=True)),
        Commands(title=NAMES[1], lines=lines),
    )
    section = Section(name="s", title=NAMES[2], blocks=blocks)
    return Document(title=NAMES[0], subtitle=NAMES[3], facts=((NAMES[1], NAMES[2]),), sections=(section,), notes=NAMES)


def test_a_page_shows_every_name_and_runs_none(document: Document) -> None:
    page = Cells(to_html(document))
    assert page.tags.count("script") == 1
    assert page.cells[3::3] == list(NAMES)


def _unescaped(text: str) -> str:
    return re.sub(r"\\([\\`*_{}\[\]<>#|~$&!])", r"\1", text)


def test_markdown_has_whole_tables_and_every_name_reads_back(document: Document) -> None:
    lines = to_markdown(document).splitlines()
    rows = [line for line in lines if line.startswith("| ")]
    cells = [[_unescaped(cell.strip()) for cell in re.split(r"(?<!\\)\|", row)[1:-1]] for row in rows]
    assert {len(row) for row in cells} == {3}
    assert [row[0] for row in cells[2:]] == [" ".join(name.split()) for name in NAMES]
    assert not any(re.search(r"(?<!\\)<|(?<!\\)\]\(", row) for row in rows)


def test_markdown_commands_are_code_whatever_they_hold(document: Document) -> None:
    text = to_markdown(document)
    for name in NAMES:
        line = " ".join(command("report", "--runs", name).splitlines())
        ticks = max(map(len, re.findall("`+", line)), default=0)
        fence = "`" * (ticks + 1)
        assert f"{fence} {line} {fence}" in text if ticks else f"`{line}`" in text
        assert all(f"    {part}" in text for part in command("report", "--runs", name).splitlines())


LATEX = {
    r"\textbackslash{}": "\\",
    r"\{": "{",
    r"\}": "}",
    r"\$": "$",
    r"\&": "&",
    r"\#": "#",
    r"\%": "%",
    r"\_": "_",
    r"\textasciicircum{}": "^",
    r"\textasciitilde{}": "~",
    r"\textless{}": "<",
    r"\textgreater{}": ">",
    r"\textbar{}": "|",
    r"\textquotedbl{}": '"',
    r"\textasciigrave{}": "`",
}


def test_latex_has_whole_rows_and_every_name_reads_back(document: Document) -> None:
    text = to_latex(document)["t"]
    body = text.split("\\midrule")[1].split("\\bottomrule")[0].strip().splitlines()
    assert len(body) == len(NAMES)
    pattern = re.compile("|".join(map(re.escape, LATEX)))
    for row, name in zip(body, NAMES, strict=True):
        assert row.endswith(r" \\")
        assert not row.startswith(("[", "*"))
        first, *others = re.split(r"(?<!\\) & ", row.removesuffix(r" \\"))
        assert len(others) == 2
        plain = first[1:-1] if first.startswith(("{[", "{*")) else first
        assert pattern.sub(lambda found: LATEX[found[0]], plain) == " ".join(name.split())


@pytest.mark.parametrize("name", [*NAMES, 'id="x" href="#y" url(#z)', SERIES[1], "$\\frac{", "$x$ $", "a\x08\x1bb"])
def test_a_drawing_is_xml_with_the_names_as_they_are(name: str) -> None:
    def paint(axes) -> None:
        axes.plot([1, 2], [3, 4], color=SERIES[1], label=name)
        axes.set(xlabel=name, title="title")
        axes.legend()

    svg = draw("one", paint).svg
    texts = {element.text for element in ET.fromstring(svg).iter() if element.tag.endswith("text")}
    shown = re.sub("[\x08\x1b]", "\ufffd", name).splitlines()
    assert {part.strip() for part in shown} <= {(text or "").strip() for text in texts}
    page = for_page(svg)
    assert "var(--series-1)" in page
    assert 'id="one-' in svg
    page.encode(errors="strict")


# What a shell would take for something else than a part of a name.
FOLDERS = ("my runs", "a;b", "$(touch x)", "it's", "--force", "a&b")


@pytest.mark.parametrize("name", FOLDERS)
def test_a_printed_command_can_be_pasted(mmcli, here: Path, name: str) -> None:
    runs = here / name
    (here / "runs").rename(runs)
    run = next(runs.iterdir())
    with pytest.raises(InputError) as caught:
        compare(run, run, method_a="knn")
    assert _words(str(caught.value), "knn-eval")[:2] == ["--run", str(run)]
    code, out, _ = mmcli("index", "build", "--run", run, "-q")
    assert code == 0
    assert _words(out, "predict") == ["IMAGE", "--run", str(run), "--index", str(run / "index.safetensors")]
    mark(replace(open_run(run), info=replace(read_info(run), status="interrupted")), "interrupted")
    with pytest.raises(InputError) as caught:
        open_run(run)
    assert _words(str(caught.value), "train-head") == ["--resume", str(run)]


def _words(text: str, name: str) -> list[str]:
    line = re.search(rf"`(mmcli {name} [^`]*)`", text)
    assert line is not None, text
    return shlex.split(line[1])[2:]

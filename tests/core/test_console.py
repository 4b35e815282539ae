"""What is printed: whole at any width, in any encoding, and never a command to the terminal."""

import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from rich.text import Text

from mmcli import cli
from mmcli.pipeline.core.console import (
    FittingTable,
    comparison_table,
    make_console,
    metrics_table,
    spread_table,
    visible,
)

LONG = "p" * 63
NASTY = "a :dog: [red]b[/red] \x1b[31m\x07\x9b \u202ec"
ROW = {
    "method": f"a run of {LONG}",
    "split": "test",
    "seed": 1,
    "mAP": 0.12345,
    "ci": {"mAP": [0.1, 0.2]},
    "P@5": 0.5,
    "P@5_ceiling": 0.524,
    "F1_micro_tuned": 0.61,
    "F1_macro_tuned": 0.62,
    "R@5": 0.87,
    "query_latency_ms": 12.5,
}
TABLES = {
    "metrics": (lambda: metrics_table([ROW, ROW], "test split"), ("0.123", "0.524", "0.610", "0.870", "12.50")),
    "spread": (lambda: spread_table([ROW, ROW], "2 seeds"), ("0.123", "mean", "std", "0.000")),
    "comparison": (
        lambda: comparison_table(
            [
                {
                    "figure": "mAP",
                    "A": 0.25,
                    "B": 0.5,
                    "difference": -0.25,
                    "ci": (-0.3, -0.2),
                    "p": 0.002,
                    "verdict": "worse",
                }
            ],
            (LONG, "B"),
        ),
        ("0.2500", "-0.2500", "0.002", "worse"),
    ),
}


@pytest.fixture(autouse=True)
def _no_colours(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(name, raising=False)


def printed(renderable, monkeypatch: pytest.MonkeyPatch, columns: object = None, encoding: str = "utf-8") -> str:
    file = io.TextIOWrapper(io.BytesIO(), encoding=encoding, errors="backslashreplace")
    with monkeypatch.context() as environment:  # pytest itself reads COLUMNS when it reports the test
        environment.delenv("COLUMNS", raising=False)
        if columns is not None:
            environment.setenv("COLUMNS", str(columns))
        make_console(file).print(renderable, soft_wrap=isinstance(renderable, str))
    file.seek(0)
    return file.read()


@pytest.mark.parametrize("name", TABLES)
def test_a_table_is_whole_at_any_width(monkeypatch, name: str) -> None:
    make, figures = TABLES[name]
    for width in (*range(20, 130), 200, 400):
        text = printed(make(), monkeypatch, width)
        assert "…" not in text, width
        assert max(map(len, text.splitlines())) <= width
        for figure in figures:
            assert figure in text, (width, figure, text)
        assert name == "spread" or text.count("p") >= 63


def test_a_table_of_figures_alone_becomes_a_list(monkeypatch) -> None:
    table = FittingTable("", title="sizes")
    for name in ("images", "captions", "tags an image"):
        table.add_column(name, justify="right")
    table.add_row("train", "1,234", "6,170", "2.93")
    lines = [line.rstrip() for line in printed(table, monkeypatch, 20).splitlines()]
    assert lines == ["sizes", "train", "  images: 1,234", "  captions: 6,170", "  tags an image:", "2.93"]


@pytest.mark.parametrize("columns", [None, "abc", "0", "-1", "", "1" * 30])
def test_what_is_piped_is_not_folded(monkeypatch, columns) -> None:
    """A bad COLUMNS counts as none."""
    name = " ".join(["word"] * 100)
    table = FittingTable("name", "n")
    table.add_row(name, "1")
    assert name in printed(table, monkeypatch, columns)


def test_a_long_category_leaves_the_numbers_of_all(monkeypatch) -> None:
    table = FittingTable("label", "category")
    table.add_column("images", justify="right")
    table.add_row("0", LONG, "17")
    table.add_row("1", "toothbrush", "1,234")
    lines = printed(table, monkeypatch, 40).splitlines()
    assert any("toothbrush" in line and "1,234" in line for line in lines)


def test_data_are_no_markup_and_no_command(monkeypatch) -> None:
    table = FittingTable("name")
    table.add_row(NASTY)
    table.add_row(Text(NASTY))
    for one in (NASTY, Text(NASTY), table):
        text = printed(one, monkeypatch)
        assert re.search(r"a :dog: \[red\]b\[/red\] \\x1b\[31m(\\x07)?\\x9b \\u202ec", text)
        assert not re.search("[\x1b\x07\x9b\u202e]", text)


def test_visible_spells_out_commands_alone() -> None:
    assert visible("naïve 日本語 👨‍👩‍👧\ttab\nline") == "naïve 日本語 👨‍👩‍👧\ttab\nline"
    assert visible("\x00\r\x7f\x85\u2066\udc80") == "\\x00\\r\\x7f\\x85\\u2066\\x80"


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch):
    """The command line in this process with strict streams of an encoding: exit code, stdout and stderr as bytes."""

    def run(encoding: str, *words: object) -> tuple[int, bytes, bytes]:
        streams = [io.TextIOWrapper(io.BytesIO(), encoding=encoding, errors="strict") for _ in range(2)]
        monkeypatch.setattr("sys.stdout", streams[0])
        monkeypatch.setattr("sys.stderr", streams[1])
        monkeypatch.setattr("sys.argv", ["mmcli", *map(str, words)])
        with pytest.raises(SystemExit) as end:
            cli.main()
        written = [stream.buffer.getvalue() for stream in streams]
        monkeypatch.undo()
        return int(end.value.code or 0), *written

    return run


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252", "utf-8", "utf-16"])
def test_any_encoding_of_the_streams_will_do(call, made, miniature, encoding: str) -> None:
    """Tags with quoted captions of every script; also where a name cannot be encoded at all."""
    run, photo = next((made / "runs").iterdir()), next(miniature.data.glob("*/*.jpg"))
    caption = "ein “Straßen”-Hund 日本語 \x1b[31m 🐶"
    words = ("predict", photo, "--run", run, "--data", miniature.data, "--device", "cpu", "--caption", caption)
    code, out, err = call(encoding, *words)
    assert code == 0, err
    text = out.decode(encoding)
    assert "%" in text
    assert "\x1b" not in text
    code, out, _ = call(encoding, *words, "--json", "--quiet")
    assert code == 0
    if encoding != "utf-16":
        assert isinstance(json.loads(out.decode("ascii")), dict)


def test_an_error_line_sends_no_command_to_the_terminal(mmcli) -> None:
    code, out, err = mmcli("knn-eval", "--run", "\x1b]0;title\x07\udc80 :dog: [red]")
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert "\\x1b]0;title\\x07\\x80 :dog: [red]" in err


SHELL = {
    "stdout closed": ("{} --version >&-", 0, ""),
    "all closed": ("{} --version <&- >&- 2>&-", 0, ""),
    "stdout full": ("{} --version >/dev/full", 1, "No space left on device"),
    "all full": ("{} --version >/dev/full 2>/dev/full", 1, ""),
    "the reader left": ("{{ {} --help; echo $? >&2; }} | true", 0, ""),
}


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
@pytest.mark.parametrize("how", SHELL)
def test_a_stream_that_cannot_be_written_is_no_traceback(how: str) -> None:
    command, wanted, said = SHELL[how]
    script = command.format(f"'{sys.executable}' -m mmcli")
    # Buffered, as Python is by default: a stream then fails when it is flushed.
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == wanted, done.stderr
    assert "Traceback" not in done.stderr
    assert "Exception ignored" not in done.stderr
    assert done.stderr.count("\n") <= 1
    assert said in done.stderr

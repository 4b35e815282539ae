"""Progress on a terminal, in a pipe, and none at all."""

import io
import re
import time

import pytest
from rich.console import Console

from mmcli.pipeline.core import progress
from mmcli.pipeline.core.console import make_console
from mmcli.pipeline.core.progress import ConsoleProgress, NoteOf, Progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def work(shown: Progress, steps: int = 10) -> None:
    with shown.task("images", steps) as task:
        for step in range(steps):
            time.sleep(0.02)
            task.advance(1, f"loss {step}")
            if step == 5:
                shown.say("in between")


def test_a_bar_has_count_and_time_left_at_80_columns(monkeypatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("TERM", "xterm")
    stream = Terminal()
    work(
        ConsoleProgress(
            Console(file=stream, force_terminal=True, highlight=False, width=80, _environ={"TERM": "xterm"})
        )
    )
    states = re.split(r"[\r\n]", stream.getvalue())
    drawn = [state for state in states if re.search(r"images +\d+%\|.*\| \d+/10 \[\d\d:\d\d<[^\]]+\]", state)]
    assert drawn
    assert max(map(len, drawn)) <= 80
    lines = [line.strip() for line in states if line.strip()]
    assert "in between" in lines
    assert re.fullmatch(r"images: 10 in \d\.\d s, loss 9", lines[-1])


@pytest.mark.parametrize("every", [0.05, 60.0])
def test_a_pipe_gets_whole_lines(monkeypatch, every: float) -> None:
    monkeypatch.setattr(progress, "LINE_EVERY_S", every)
    stream = io.StringIO()
    work(ConsoleProgress(make_console(stream)))
    lines = stream.getvalue().splitlines()
    assert "\r" not in stream.getvalue()
    counted = [line for line in lines if re.fullmatch(r"  images: \d of 10 \[\d\d:\d\d<\S+, loss \d\]", line)]
    assert bool(counted) == (every < 1)
    assert set(lines) - set(counted) == {"in between", lines[-1]}
    assert re.fullmatch(r"  images: 10 in \d\.\d s, loss 9", lines[-1])


def test_titles_and_notes_send_no_command() -> None:
    stream = io.StringIO()
    with ConsoleProgress(make_console(stream)).task("a\x1b[31m", 1) as task:
        task.advance(1, "b\x07")
    assert "\x1b" not in stream.getvalue()
    assert "\x07" not in stream.getvalue()


def test_quiet_progress_shows_nothing(capsys) -> None:
    work(Progress.quiet(), 2)
    assert capsys.readouterr() == ("", "")


def test_what_is_counted_below_becomes_a_note() -> None:
    notes: list[str] = []

    class Task:
        def advance(self, count: int = 1, note: str = "") -> None:
            assert count == 0
            notes.append(note)

    below = NoteOf()
    below.task_of_all = Task()
    work(below, 2)
    assert notes == ["images 1 of 2, loss 0", "images 2 of 2, loss 1"]

"""The line of progress: its estimate on stages made by hand, and what a log and a terminal show of it."""

from __future__ import annotations

import os
import pty
import re
import sys
from typing import TextIO

import pytest

from retain import progress
from retain.progress import LOG_SECONDS, PlannedStage, StageProgress, progress_line


class Clock:
    """A clock that moves when it is told to."""

    def __init__(self) -> None:
        self.now = 0.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    found = Clock()
    monkeypatch.setattr(progress, "time", found)
    return found


def test_a_stage_to_come_is_timed_by_its_kind_and_named_where_none_was(clock):
    with progress_line(shown=False) as line:
        line.plan = [PlannedStage("Fisher", "Fisher"), PlannedStage("first", "training", 200),
                     PlannedStage("measuring wiki", "measuring"),
                     PlannedStage("second", "training", 100), PlannedStage("measuring wiki", "measuring")]  # fmt: skip
        with StageProgress("sampling", 8, "rows") as stage:
            assert str(stage) == "sampling: 0/8 rows"
            clock.now += 10
            stage.update(4)
            assert str(stage) == "sampling: 4/8 rows, about 10 s left, plus Fisher, training and measuring"
        with StageProgress("first", 40, "steps", "training", work=200) as stage:
            clock.now += 20
            stage.update(10)  # 40 s, and half of 80 s for the second
            assert str(stage) == "first: 10/40 steps, about 60 s left, 2 min to the end, plus measuring"
            clock.now += 60
            stage.update(30)
        with StageProgress("measuring wiki", 6, "tokens", "measuring", work=1) as stage:
            clock.now += 5
            stage.update(3)
            assert str(stage) == "measuring wiki: 3/6 tokens, about 5 s left, 55 s to the end"
        with StageProgress("second", 40, "steps", "training", work=100) as stage:
            assert str(stage) == "second: 0/40 steps, about 40 s left, 50 s to the end"  # half of a text took 5 s


def test_what_was_made_before_takes_no_time_and_says_nothing_of_the_pace(clock):
    with progress_line(shown=False) as line:
        line.plan = [PlannedStage("left out", "training", 50), PlannedStage("training", "training", 50),
                     PlannedStage("last", "training", 50)]  # fmt: skip
        with StageProgress("training", 100, "steps", work=50, initial=80) as stage:
            clock.now += 10
            stage.update(10)
            assert str(stage) == "training: 90/100 steps, about 10 s left, 2 min to the end"  # 10 s + 100 s
            clock.now += 10
            stage.update(10)
        assert line.pace == {"training": pytest.approx(20 / 10)}
        assert [stage.name for stage in line.plan] == ["last"]


def test_a_stage_that_stops_early_counts_by_what_it_did(clock):
    with progress_line(shown=False) as line:
        with StageProgress("training", 100, "steps", at_most=True) as stage:
            clock.now += 50
            stage.update(25)
            assert str(stage) == "training: 25/100 steps, at most 2 min left"
        assert line.pace == {"training": 2.0}


def test_steps_are_weighed_by_their_work(clock):
    """Replay after half of the steps, which then take three times as long."""
    work = {0: 0.0, 5: 5 / 20, 10: 1.0}
    stage = StageProgress("training", 10, "steps", share=lambda step: work[step])
    clock.now += 10
    stage.update(5)
    assert str(stage) == "training: 5/10 steps, about 30 s left"


def test_evaluations_are_apart_from_steps(clock):
    with progress_line(shown=False):
        stage = StageProgress("training", 10, "steps")
        stage.within = [PlannedStage("evaluations", "evaluations", 2)]
        stage.pause()
        clock.now += 100
        stage.update(0)
        assert str(stage) == "training: 0/10 steps"
        stage.resume("evaluations")
        clock.now += 1
        stage.update(1)
        assert str(stage) == "training: 1/10 steps, about 3 min left"  # 9 s and 2 · 100 s
        stage.within = []
        assert str(stage) == "training: 1/10 steps, about 9 s left"


def test_a_log_gets_a_line_now_and_then_and_one_at_the_end(clock, capsys):
    with progress_line():
        with StageProgress("training", 120, "steps", at_most=True) as stage:
            for step in range(90):
                with StageProgress("within", 1, "rows") as inner:  # is timed, and not shown
                    inner.update()
                clock.now += LOG_SECONDS / 30
                stage.note = f"loss {step}"
                stage.update()
        with StageProgress("rows", 4, "rows", initial=4):
            pass
        with StageProgress("sampling", 4, "rows", initial=1) as stage:
            clock.now += LOG_SECONDS + 3
            stage.update(3)  # its end says it
    assert capsys.readouterr().err.splitlines() == [
        "training: 30/120 steps, at most 2 min left, loss 29",
        "training: 60/120 steps, at most 60 s left, loss 59",
        "training: 90/120 steps, at most 30 s left, loss 89",
        "training: 90 of 120 steps in 2 min, loss 89",
        "rows: 4 rows, made before",
        "sampling: 4 rows (3 of them now) in 33 s",
    ]


def test_nothing_is_shown_outside_of_a_line_and_where_it_is_not_wanted(clock, capsys):
    def work() -> None:
        with StageProgress("training", 2, "steps") as stage:
            clock.now += 2 * LOG_SECONDS
            stage.update(2)

    work()
    with progress_line(shown=False) as line, progress_line() as same:
        assert line is same
        work()
        line.say("a line")
    assert capsys.readouterr().err == ""


def test_an_error_ends_the_stage_without_a_line_and_the_next_command_begins_anew(capsys):
    with pytest.raises(ZeroDivisionError), progress_line():
        StageProgress("training", 2, "steps").update(1 // 0)
    with progress_line() as line:
        assert line.stage is None
    assert capsys.readouterr().err == ""


def screen(written: str) -> list[str]:
    """The lines of a terminal that is wide enough, after what was written to it."""
    lines, row = [""], 0
    for part in re.findall(r"\r|\n|\x1b\[[?\d;]*[A-Za-z]|[^\r\n\x1b]+", written):
        if part == "\n":
            row += 1
            lines += [""] * (row == len(lines))
        elif part == "\x1b[2K":
            lines[row] = ""
        elif part == "\x1b[1A":
            row -= 1
        elif part[0] not in "\r\x1b":
            lines[row] += part
    return lines


def sent(terminal: TextIO, parent: int) -> str:
    """What was sent to a terminal since it was asked last."""
    terminal.write("\0")
    terminal.flush()
    found = b""
    while not found.endswith(b"\0"):
        found += os.read(parent, 1 << 16)
    return found[:-1].decode()


def test_a_terminal_shows_one_line_below_what_is_printed_and_keeps_no_bar(monkeypatch):
    for name in ("NO_COLOR", "FORCE_COLOR", "TTY_INTERACTIVE", "TTY_COMPATIBLE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "70")
    parent, child = pty.openpty()
    long = "a printed line that is longer than the terminal is wide [red] :smile: " * 2
    with os.fdopen(child, "w") as terminal, monkeypatch.context() as patch:
        patch.setattr(sys, "stderr", terminal)
        patch.setattr(sys, "stdout", terminal)
        patch.setattr(progress, "REDRAW_SECONDS", 0.0)
        with progress_line() as line:
            with StageProgress("sampling", 2, "rows") as stage:
                stage.update(2)
            stage = StageProgress("training", 4, "steps")
            stage.update(2)
            print(long)
            line.say("step 2: new-task loss 1.000")
            during = sent(terminal, parent)
            stage.update(2)
            stage.close()
        after = sent(terminal, parent)
    os.close(parent)
    shown = screen(during)
    assert shown[:3] == ["sampling: 2 rows in 0 s", long.rstrip("\n"), "step 2: new-task loss 1.000"]
    assert re.fullmatch(r"━+╸?━* training: 2/4 steps, about 0 s left *", re.sub("[╸╺]", "━", shown[3]))
    assert len(shown) == 4
    assert [text.rstrip() for text in screen(during + after)] == [
        *map(str.rstrip, shown[:3]),
        "training: 4 steps in 0 s",
        "",
    ]
    assert during.rfind("\x1b[?25h") > during.rfind("\x1b[?25l"), "the cursor stays"

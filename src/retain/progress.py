"""Progress of long work: a line with the time left, for the stage and for the whole command; in a log, now and then."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

LOG_SECONDS = 30.0  # between two lines in a log
REDRAW_SECONDS = 0.1  # between two updates in a terminal


@dataclass
class PlannedStage:
    """A stage to come. The time that stages of one kind take is proportional to their `work`, in any unit."""

    name: str
    kind: str
    work: float = 1.0


def duration(seconds: float) -> str:
    """A duration in words.

    >>> duration(42), duration(5 * 60 + 20), duration(7500)
    ('42 s', '5 min', '2 h 5 min')
    """
    minutes = round(seconds / 60)
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min"


def time_left(here: float, coming: Iterable[PlannedStage], pace: Mapping[str, float]) -> tuple[float, list[str]]:
    """Seconds until everything is done, and the kinds left out of them because no stage of theirs was timed.

    Args:
        here: seconds left of the current stage.
        coming: the stages after it.
        pace: kind → seconds per unit of work.

    >>> coming = [PlannedStage("training", "training", 2), PlannedStage("measuring wiki", "measuring")]
    >>> time_left(5, coming, {"training": 10})
    (25, ['measuring'])
    """
    stages = [stage for stage in coming if stage.work > 0]
    timed = sum(stage.work * pace[stage.kind] for stage in stages if stage.kind in pace)
    return here + timed, list(dict.fromkeys(stage.kind for stage in stages if stage.kind not in pace))


class ProgressLine:
    """The progress line of a command, on standard error.

    Attributes:
        plan: the stages after the current one.
        stage: the current stage; stages nested in it are timed but not shown.
    """

    current: ProgressLine | None = None

    def __init__(self, *, shown: bool) -> None:
        self.shown = shown
        self.plan: list[PlannedStage] = []
        self.stage: StageProgress | None = None
        self.console = Console(stderr=True, soft_wrap=True, markup=False, highlight=False, emoji=False,
                               force_jupyter=False)  # fmt: skip
        self._spent: dict[str, tuple[float, float]] = {}

    @property
    def pace(self) -> dict[str, float]:
        """Kind → seconds per unit of work, for kinds that were timed."""
        return {kind: seconds / work for kind, (work, seconds) in self._spent.items()}

    def record(self, kind: str, work: float, seconds: float) -> None:
        """Add to the time that work of this kind took."""
        if work > 0:
            before = self._spent.get(kind, (0.0, 0.0))
            self._spent[kind] = before[0] + work, before[1] + seconds

    def enter(self, stage: StageProgress) -> None:
        """Make `stage` the current one; take it and the skipped stages before it off the plan."""
        self.stage, names = stage, [planned.name for planned in self.plan]
        if stage.name in names:
            del self.plan[: names.index(stage.name) + 1]

    def say(self, line: str) -> None:
        """Print a line; in a terminal, above the bar."""
        if self.shown:
            self.console.print(line)


@contextmanager
def progress_line(*, shown: bool = True) -> Iterator[ProgressLine]:
    """Show every `StageProgress` inside this context; nested contexts share the outer line."""
    if ProgressLine.current is not None:
        yield ProgressLine.current
        return
    line = ProgressLine.current = ProgressLine(shown=shown)
    try:
        yield line
    finally:
        ProgressLine.current = None
        if line.stage is not None:  # an error interrupted it
            line.stage.close(has_ended=False)


@dataclass(eq=False)
class StageProgress:
    """A stage of a command: a bar in a terminal, a line now and then in a log, and a line at its end in both.

    Args:
        name: shown to the user; no control characters.
        total: number of units of work.
        unit: their name, in the plural.
        kind: stages of one kind are timed together. Default: the name.
        work: as in `PlannedStage`. Default: `total`.
        initial: units done in an earlier run.
        share: number of units done → share of the work done. Default: all units are equal.
        at_most: the stage may end early.
        note: shown after the time left.
        within: other work inside this stage, such as evaluations.
    """

    name: str
    total: int
    unit: str
    kind: str = ""
    work: float | None = None
    initial: int = 0
    share: Callable[[int], float] | None = None
    at_most: bool = False
    note: str = ""
    within: Sequence[PlannedStage] = ()

    def __post_init__(self) -> None:
        self.kind, self.done = self.kind or self.name, self.initial
        self._work, self._share = self.work or self.total, self.share or (lambda done: done / max(1, self.total))
        self._began = self._drawn = time.monotonic()
        self._paused = 0.0  # seconds
        self._paused_since: float | None = None
        self._bar: Progress | None = None
        self._line = ProgressLine.current or ProgressLine(shown=False)
        if self._line.stage is None:
            self._line.enter(self)
            if self._line.shown and sys.stderr.isatty() and self._line.console.is_interactive:
                self._bar = self._start_bar()

    def _start_bar(self) -> Progress:
        columns = BarColumn(bar_width=16), TextColumn("{task.description}", markup=False)
        bar = Progress(
            *columns, console=self._line.console, transient=True, redirect_stdout=sys.stdout.isatty(),
            auto_refresh=False,  # no thread: a fork would copy its locks
        )  # fmt: skip
        bar.add_task(str(self), total=self.total, completed=self.initial)
        bar.start()
        bar.console.show_cursor()  # a kill would leave it hidden
        return bar

    def update(self, count: int = 1) -> None:
        """Count `count` more units as done."""
        self.done += count
        (self._line.stage or self).show()

    def show(self) -> None:
        """Redraw the bar or print a log line, if it is time to."""
        elapsed = time.monotonic() - self._drawn
        if self._bar is not None and elapsed >= REDRAW_SECONDS:
            self._bar.update(self._bar.task_ids[0], completed=self.done, description=str(self), refresh=True)
        elif self._bar is None and elapsed >= LOG_SECONDS and (self.done < self.total or self._paused_since):
            self._line.say(str(self))
        else:
            return
        self._drawn = time.monotonic()

    def pause(self) -> None:
        """Stop this stage's clock: work of another kind begins."""
        self._paused_since = time.monotonic()

    def resume(self, kind: str) -> None:
        """Restart the clock; the time since `pause` was one unit of work of this kind."""
        if self._paused_since is not None:
            seconds, self._paused_since = time.monotonic() - self._paused_since, None
            self._paused += seconds
            self._line.record(kind, 1, seconds)

    def __str__(self) -> str:
        """Units done, time left, and the note."""
        parts = [f"{self.name}: {self.done:,}/{self.total:,} {self.unit}", *self._time_left(), self.note]
        return ", ".join(filter(None, parts))

    def _time_left(self) -> list[str]:
        now, pace = time.monotonic(), self._line.pace
        done, rest = self._share(self.done) - self._share(self.initial), 1 - self._share(self.done)
        if done > 0:
            here = ((self._paused_since or now) - self._began - self._paused) * rest / done
        elif self.kind in pace:
            here = pace[self.kind] * self._work * rest
        else:
            return []
        here, missing = time_left(here, self.within, pace)
        if done > 0:
            pace[self.kind] = (now - self._began + here) / (self._work * (done + rest))
        end, missing_later = time_left(here, self._line.plan, pace)
        words = [f"{'at most' if self.at_most else 'about'} {duration(here)} left"]
        if duration(end) != duration(here):
            words.append(f"{duration(end)} to the end")
        if kinds := list(dict.fromkeys(missing + missing_later)):
            words.append("plus " + " and ".join(filter(None, [", ".join(kinds[:-1]), kinds[-1]])))
        return words

    def close(self, *, has_ended: bool = True) -> None:
        """End the stage; print its last line unless it was interrupted."""
        seconds, new = time.monotonic() - self._began, self.done - self.initial
        if self._bar is not None:
            self._bar.stop()
        if self._line.stage is self:
            self._line.stage = None
            if has_ended:
                of_total = "" if self.done == self.total else f" of {self.total:,}"
                now = f" ({new:,} of them now)" if self.initial else ""
                taken = f"{now} in {duration(seconds)}" if new or not self.done else ", made before"
                parts = [f"{self.name}: {self.done:,}{of_total} {self.unit}{taken}", self.note]
                self._line.say(", ".join(filter(None, parts)))
        self._line.record(self.kind, self._work * (self._share(self.done) - self._share(self.initial)), seconds)

    def __enter__(self) -> StageProgress:
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        self.close(has_ended=kind is None)

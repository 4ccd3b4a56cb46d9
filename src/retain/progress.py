"""Progress of long work: one line with the time left of a stage and of all to come; in a log, a line now and then."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

LOG_SECONDS = 30.0  # between two lines of a stage in a log
REDRAW_SECONDS = 0.1  # in a terminal


@dataclass
class PlannedStage:
    """A stage to come, by its name. What stages of one kind take is in proportion to their work, in any unit."""

    name: str
    kind: str
    work: float = 1.0


def duration(seconds: float) -> str:
    """A time as people say it.

    >>> duration(42), duration(5 * 60 + 20), duration(7500)
    ('42 s', '5 min', '2 h 5 min')
    """
    minutes = round(seconds / 60)
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min"


def time_left(here: float, coming: Iterable[PlannedStage], pace: Mapping[str, float]) -> tuple[float, list[str]]:
    """Seconds until all is done, and the kinds that are not in them because none of the kind was timed.

    Args:
        here: seconds left of the present stage.
        pace: kind → seconds per unit of work.

    >>> coming = [PlannedStage("training", "training", 2), PlannedStage("measuring wiki", "measuring")]
    >>> time_left(5, coming, {"training": 10})
    (25, ['measuring'])
    """
    stages = [stage for stage in coming if stage.work > 0]
    known = sum(stage.work * pace[stage.kind] for stage in stages if stage.kind in pace)
    return here + known, list(dict.fromkeys(stage.kind for stage in stages if stage.kind not in pace))


class ProgressLine:
    """The line of a command, on standard error, and what it knows of its stages.

    Attributes:
        plan: the stages that come after the present one.
        stage: the present one; those within it are timed and not shown.
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
        """Kind → seconds per unit of work, of what was timed."""
        return {kind: seconds / work for kind, (work, seconds) in self._spent.items()}

    def record(self, kind: str, work: float, seconds: float) -> None:
        """Work of a kind took this long."""
        if work > 0:
            before = self._spent.get(kind, (0.0, 0.0))
            self._spent[kind] = before[0] + work, before[1] + seconds

    def enter(self, stage: StageProgress) -> None:
        """Make a stage the present one; it leaves the plan, with those before it, which were not needed."""
        self.stage, names = stage, [planned.name for planned in self.plan]
        if stage.name in names:
            del self.plan[: names.index(stage.name) + 1]

    def say(self, line: str) -> None:
        """Print a line, in a terminal above the bar."""
        if self.shown:
            self.console.print(line)


@contextmanager
def progress_line(*, shown: bool = True) -> Iterator[ProgressLine]:
    """Within it every `StageProgress` is shown, outside of it none is; one within another is that one."""
    if ProgressLine.current is not None:
        yield ProgressLine.current
        return
    line = ProgressLine.current = ProgressLine(shown=shown)
    try:
        yield line
    finally:
        ProgressLine.current = None
        if line.stage is not None:  # an error ended it
            line.stage.close(has_ended=False)


@dataclass(eq=False)
class StageProgress:
    """A stage of a command: a bar in a terminal, in a log a line now and then, and in both a line at its end.

    Args:
        name: for people, without control characters.
        total: how many units of work there are; `unit` is what they are called.
        kind: of what is timed together; by default the name.
        work: as in `PlannedStage`; by default `total`.
        initial: units that were done before.
        share: units → share of the work that is done with them; by default all are alike.
        at_most: it may end before its total.
        note: shown behind the time that is left.
        within: what comes in this stage beside its units.
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
                self._bar = self._begin_bar()

    def _begin_bar(self) -> Progress:
        columns = BarColumn(bar_width=16), TextColumn("{task.description}", markup=False)
        bar = Progress(
            *columns, console=self._line.console, transient=True, redirect_stdout=sys.stdout.isatty(),
            auto_refresh=False,  # no thread, whose locks a fork would take along
        )  # fmt: skip
        bar.add_task(str(self), total=self.total, completed=self.initial)
        bar.start()
        bar.console.show_cursor()  # which a kill would leave hidden
        return bar

    def update(self, count: int = 1) -> None:
        """So many more units are done."""
        self.done += count
        (self._line.stage or self).show()

    def show(self) -> None:
        """Draw the bar, or print a line of a log, where it is time to."""
        since = time.monotonic() - self._drawn
        if self._bar is not None and since >= REDRAW_SECONDS:
            self._bar.update(self._bar.task_ids[0], completed=self.done, description=str(self), refresh=True)
        elif self._bar is None and since >= LOG_SECONDS and (self.done < self.total or self._paused_since):
            self._line.say(str(self))
        else:
            return
        self._drawn = time.monotonic()

    def pause(self) -> None:
        """What follows is of another kind."""
        self._paused_since = time.monotonic()

    def resume(self, kind: str) -> None:
        """Since `pause` a unit of work of this kind was done."""
        if self._paused_since is not None:
            seconds, self._paused_since = time.monotonic() - self._paused_since, None
            self._paused += seconds
            self._line.record(kind, 1, seconds)

    def __str__(self) -> str:
        """What is done, how long the rest will take, and the note."""
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
        end, later = time_left(here, self._line.plan, pace)
        words = [f"{'at most' if self.at_most else 'about'} {duration(here)} left"]
        if duration(end) != duration(here):
            words.append(f"{duration(end)} to the end")
        if kinds := list(dict.fromkeys(missing + later)):
            words.append("plus " + " and ".join(filter(None, [", ".join(kinds[:-1]), kinds[-1]])))
        return words

    def close(self, *, has_ended: bool = True) -> None:
        """The stage has ended, or was interrupted."""
        seconds, new = time.monotonic() - self._began, self.done - self.initial
        if self._bar is not None:
            self._bar.stop()
        if self._line.stage is self:
            self._line.stage = None
            if has_ended:
                few = "" if self.done == self.total else f" of {self.total:,}"
                here = f" ({new:,} of them now)" if self.initial else ""
                taken = f"{here} in {duration(seconds)}" if new or not self.done else ", made before"
                parts = [f"{self.name}: {self.done:,}{few} {self.unit}{taken}", self.note]
                self._line.say(", ".join(filter(None, parts)))
        self._line.record(self.kind, self._work * (self._share(self.done) - self._share(self.initial)), seconds)

    def __enter__(self) -> StageProgress:
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        self.close(has_ended=kind is None)

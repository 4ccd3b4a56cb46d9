"""What a study shows: figures in the project's style, and the results between two marks of its README."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from retain.files import write_text
from retain.report.style import INK, STYLE, look, save_png

BEGIN, END = "<!-- results: written by run.py -->", "<!-- end of results -->"


class NoReport(ValueError):
    """There is nothing to report: no run yet, runs that learned too little, or rows that do not belong together."""


def write_results(readme: Path, text: str) -> None:
    """Write computed results between the marks of a README; the rest is unchanged."""
    before, _, rest = readme.read_text(encoding="utf-8").partition(BEGIN)
    _, end, after = rest.partition(END)
    if not end:
        raise ValueError(f"readme: {str(readme)!r} has no place for results; add {BEGIN!r} and {END!r}")
    write_text(readme, f"{before}{BEGIN}\n{text.strip()}\n{END}{after}")


def table(head: Sequence[str], rows: Iterable[Sequence[object]], rule: str = " --- ") -> str:
    """A Markdown table.

    >>> print(table(["run", "loss"], [["plain", 0.5]]))
    | run | loss |
    | --- | --- |
    | plain | 0.5 |
    """
    lines = [f"| {' | '.join(map(str, cells))} |" for cells in (head, *rows)]
    return "\n".join([lines[0], f"|{rule}" * len(head) + "|", *lines[1:]])


def findings(verdicts: Mapping[str, tuple[str, str]]) -> str:
    """A line for each finding in the table of experiments/README.md: its verdict and the numbers behind it.

    `tests/test_docs.py` compares the table with these lines.
    """
    return "\n".join(f"- {finding}: **{verdict}** ({numbers})." for finding, (verdict, numbers) in verdicts.items())


def answer_of(verdict: str) -> str:
    """The words of a verdict, `Verdict: words. Sentences.`; empty if there is none yet."""
    words = verdict.partition("Verdict: ")[2].partition(".")[0]
    return "" if words.startswith("none yet") else words


@contextmanager
def panels(path: Path, number: int, size: tuple[float, float], rows: int = 1) -> Iterator[Sequence[Any]]:
    """Styled axes in rows; the figure is saved when the block ends."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=size)
        yield [figure.add_subplot(rows, -(-number // rows), at + 1) for at in range(number)]
        path.parent.mkdir(parents=True, exist_ok=True)
        save_png(figure, path)


def dress(axes: Any, title: str, xlabel: str, ylabel: str) -> None:
    axes.set(title=title, xlabel=xlabel, ylabel=ylabel)


def goal_line(axes: Any, *, x: float | None = None, y: float | None = None, words: str = "") -> None:
    """Draw a dashed line at `x` or `y`, with its meaning at its end."""
    style: dict[str, Any] = {"color": INK, "linewidth": 0.9, "linestyle": (0, (4, 3)), "zorder": 1}
    label: dict[str, Any] = {"textcoords": "offset points", "fontsize": 8}
    if y is not None:
        axes.axhline(y, **style)
        axes.annotate(words, (0.01, y), (0, 3), xycoords=("axes fraction", "data"), **label)
    if x is not None:
        axes.axvline(x, **style)
        axes.annotate(words, (x, 0.98), (4, 0), xycoords=("data", "axes fraction"), va="top", **label)


def dots(axis: Any, intervals: Mapping[str, tuple[float, float, float]]) -> None:
    """Draw a dot and interval for each name, top to bottom; the first arm (name up to a comma) has its own colour."""
    first, *_ = (name.partition(",")[0] for name in intervals)
    for at, (name, (value, low, high)) in enumerate(intervals.items()):
        style = look(0 if name.partition(",")[0] == first else 1, 2)
        axis.plot([low, high], [at, at], color=style["color"], linewidth=2.2)
        axis.plot([value], [at], linestyle="none", markersize=6, **style)
    axis.axvline(0, color=INK, linewidth=0.9, linestyle=(0, (4, 3)), zorder=1)
    axis.set_yticks(range(len(intervals)), list(intervals))
    axis.set_ylim(len(intervals) - 0.5, -0.5)

"""The figures of a report as plain data; `style` draws them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from retain.report.comparison import Comparison, Point, end_points, frontier
from retain.report.results import ReportRuns, RunResults, TextResult, names_of_texts, texts_by_forgetting

LEARNING = "new-task loss, nats per token (learning →)"  # the axis is inverted in every figure


@dataclass(frozen=True)
class PlotLine:
    """The points of a run, given by its place; `end` is the last point's step if x is not steps, `ranges` are of y."""

    name: str
    run: int
    x: Sequence[float]
    y: Sequence[float]
    end: float | None = None
    ranges: Sequence[tuple[float, float]] = ()


@dataclass(frozen=True)
class Dot:
    """The value of a text and a run, given by its place, with its interval."""

    text: str
    run: int
    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Panel:
    """One figure; `description` is its accessible name.

    frontier: forgetting over new-task loss, learning to the right, so that a lower run forgot less for as much
    learning; `ends` are the undominated runs, the one that learned least first. curve: values over steps; `marks` shows
    the evaluated points, `ticks` labels x = 0, 1, …. interval: a dot with its interval for each text and run.
    """

    kind: Literal["frontier", "curve", "interval"]
    title: str
    description: str
    xlabel: str
    ylabel: str = ""
    lines: Sequence[PlotLine] = ()
    ends: Sequence[Point] = ()
    matched_loss: float | None = None
    from_zero: bool = False
    marks: bool = True
    ticks: Sequence[str] = ()
    dots: Sequence[Dot] = ()


def panels(runs: ReportRuns, compared: Comparison | None) -> list[Panel]:
    """All figures of a report but the opening one; stages of a chain have intervals only."""
    are_stages = len(runs) > 1 and not compared  # each trained on its own task, and evaluated against its own base
    if are_stages:
        return _intervals(runs)
    learning = [_learning(runs, compared, text) for text in names_of_texts(runs)]
    return [*filter(None, learning), *_curves(runs), *_intervals(runs)]


def _learning(runs: ReportRuns, compared: Comparison | None, text: str) -> Panel | None:
    """Forgetting over new-task loss: each run's trajectory, or only the ends if a run has none.

    Never both, because evaluations during training and measurements after it are different losses.
    """
    points = end_points(compared, text) if compared else [None] * len(runs)
    paths = [
        _path(run, place, text) if run.trained_tokens == runs[0].trained_tokens else None
        for place, run in enumerate(runs)
    ]
    evaluated = any(paths) and all(path or not point for path, point in zip(paths, points, strict=True))
    if not evaluated:
        paths = [_line(runs[place], place, {None: point}) if point else None for place, point in enumerate(points)]
    lines = [line for line in paths if line]
    if len(lines) < 2 and not evaluated:
        return None
    last = {line.run: (line.x[-1], line.y[-1]) for line in lines}
    best = sorted((last[place] for place in frontier(points)), reverse=True)
    return Panel(
        "frontier", text, f"Learning against divergence from the base on {text}", LEARNING, "ref_kl, nats per token",
        lines=lines, ends=best if len(best) > 1 else [], from_zero=True,
        matched_loss=compared.matched_loss if compared and evaluated else None,
    )  # fmt: skip


def _path(run: RunResults, place: int, text: str) -> PlotLine | None:
    """A run's evaluations of both the new-task loss and the text, up to its final model; None for fewer than two."""
    losses = dict(zip(*run.series("eval_loss"), strict=True))
    moved = dict(zip(*run.series(f"retention/{text}/ref_kl"), strict=True))
    end = run.end_step
    points = {step: (losses[step], moved[step]) for step in losses if step in moved and end is not None and step <= end}
    return _line(run, place, points) if len(points) > 1 else None


def _line(run: RunResults, place: int, points: Mapping[Any, Point]) -> PlotLine:
    x, y = ([point[axis] for point in points.values()] for axis in (0, 1))
    return PlotLine(run.name, place, x, y, list(points)[-1])


def _curves(runs: ReportRuns) -> list[Panel]:
    counted = dict.fromkeys(run.trained_tokens for run in runs)  # losses over different tokens have their own axes
    several = len(counted) > 1
    wanted = [
        _curve([(place, run) for place, run in enumerate(runs) if run.trained_tokens == tokens], "eval_loss",
               "New-task loss" + f" ({tokens or 'unknown tokens'})" * several, from_zero=False)
        for tokens in counted
    ]  # fmt: skip
    every = list(enumerate(runs))
    wanted += [_curve(every, f"retention/{text}/ref_kl", f"Divergence on {text}") for text in names_of_texts(runs)]
    wanted.append(_curve(every, "replay/kl", "Divergence on the replay rows", marks=False))
    wanted.append(_curve(every, "replay/kl_fixed", "Divergence on two fixed replay rows", marks=False))
    strength = _curve(every, "replay/coef", "Strength of replay", marks=False, ylabel="coefficient")
    if not all(len(set(line.y)) == 1 for line in strength.lines):
        wanted.append(strength)
    return [panel for panel in wanted if panel.lines]


def _curve(runs: Sequence[tuple[int, RunResults]], key: str, title: str, **options: Any) -> Panel:
    series = [(run.name, place, *run.series(key)) for place, run in runs]
    lines = [PlotLine(name, place, x, y) for name, place, x, y in series if len(x) > 1]
    defaults: dict[str, Any] = {"ylabel": "nats per token", "from_zero": True}
    return Panel("curve", title, f"{title} over steps", "step", lines=lines, **defaults | options)


def _intervals(runs: ReportRuns) -> list[Panel]:
    moved = _dots(runs, "retention", "ref_kl", "Divergence from the base", "ref_kl, nats per token, 95% interval")
    return [moved] if len(moved.dots) > 1 else []  # the table has a single value


def learned_and_forgotten(runs: ReportRuns) -> list[Panel]:
    """The panels, one above the other, of the figure that opens a page; empty for a single number or none."""
    found = [
        _dots(runs, "new_task", "gain", "Learned: the loss fell by", ""),
        _dots(runs, "retention", "forgetting", "Forgotten: the loss rose by", "nats per token, 95% interval"),
    ]
    return [panel for panel in found if panel.dots] if sum(len(panel.dots) for panel in found) > 1 else []


def _dots(runs: ReportRuns, kind: str, metric: str, title: str, xlabel: str) -> Panel:
    """A metric with an interval, at the end of each run, for the texts of one kind."""
    new_tasks = dict.fromkeys(text for run in runs for text in run.new_task)
    dots, words = [], []
    for text in new_tasks if kind == "new_task" else texts_by_forgetting(runs):
        for place, run in enumerate(runs):
            estimate = getattr(getattr(run, kind).get(text, TextResult()), metric)
            if estimate and estimate.ci:
                dots.append(Dot(text, place, estimate.value, *estimate.ci))
                words.append(f"{text}, {run.name} {estimate}")
    return Panel("interval", title, f"{title} (nats per token): {'; '.join(words)}.", xlabel, dots=dots)

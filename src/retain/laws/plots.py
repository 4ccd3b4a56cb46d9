"""Figures of a fitted law, in the look of `retain.report.style`: runs with curves, residuals, bands, contours."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from retain.laws.fitted import FittedLaw
from retain.laws.forms import Array, column_of
from retain.report.style import INK, MARKS, SIZE, _styled, label

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

LEARNING = "new-task loss, nats per token (learning →)"
SHORT = {"finetuning_loss": "New-task loss", "forgetting_loss": "Forgetting"}


@_styled
def overview(law: FittedLaw) -> Figure:
    """Measurements with fitted curves of each output, forgetting over learning where both are there, and residuals."""
    panels: list[Any] = [lambda axes, name=name: _over_input(axes, law, name) for name in law.form.outputs]
    if len(law.form.outputs) == 2:
        panels.append(lambda axes: _trajectories(axes, law))
    panels.append(lambda axes: _residuals(axes, law))
    figure = _figure(len(panels))
    for at, draw in enumerate(panels, start=1):
        draw(figure.add_subplot(-(-len(panels) // 2), 2, at))
    _size_legend(figure, law)
    return figure


@_styled
def trajectories(law: FittedLaw) -> Figure:
    """Forgetting over new-task loss by number of parameters, with the law's curves and its line."""
    figure = _figure(1)
    _trajectories(figure.add_subplot(), law)
    _size_legend(figure, law)
    return figure


@_styled
def residuals(law: FittedLaw) -> Figure:
    """Measured minus fitted over fitted, by number of parameters: what is left should have no shape."""
    figure = _figure(len(law.form.outputs))
    for at, name in enumerate(law.form.outputs, start=1):
        _residuals(figure.add_subplot(1, len(law.form.outputs), at), law, [name])
    _size_legend(figure, law)
    return figure


@_styled
def bands(law: FittedLaw, output: str = "forgetting_loss", level: float = 0.95, **fixed: float) -> Figure:
    """The curve of an output over the input that is not `fixed`, with its interval and that of a new measurement."""
    free = [name for name in law.form.inputs if name not in fixed]
    if len(free) != 1:
        raise ValueError(f"bands: {', '.join(free) or 'no input'} left free; fix all inputs but one")
    figure = _figure(1)
    axes = figure.add_subplot()
    column = law.runs.columns[free[0]]
    grid = np.geomspace(max(column.min(), 1e-9), column.max() * 2, 200)
    found = law.predict(level=level, **{free[0]: grid, **fixed})  # type: ignore[arg-type]
    color, words = _colors(1)[0], f"{level:.0%}"
    axes.fill_between(grid, *found.ci[output], color=color, alpha=0.14, linewidth=0, label=f"{words}, new measurement")
    axes.fill_between(grid, *found.curve_ci[output], color=color, alpha=0.3, linewidth=0, label=f"{words}, curve")
    axes.plot(grid, found.value[output], color=color, label="law")
    near = _matching(law, fixed)
    axes.plot(column[near], law.runs.columns[output][near], ".", color=INK, markersize=5, label="measured")
    _end_of_data(axes, float(column.max()))
    _words(
        axes, ", ".join(f"{column_of(k).label} {_count(v)}" for k, v in fixed.items()), column_of(free[0]).label, output
    )
    axes.legend(loc="best", fontsize=8)
    return figure


@_styled
def contours(law: FittedLaw, output: str = "forgetting_loss") -> Figure:
    """Lines of equal forgetting over parameters and steps; what lies outside the runs is shaded."""
    from matplotlib.patches import Rectangle
    from matplotlib.ticker import MaxNLocator

    if not {"num_params", "num_steps"} == set(law.form.inputs):
        raise ValueError(f"contours: the form {law.form.name!r} is not one of num_params and num_steps; use bands")
    figure = _figure(1)
    axes = figure.add_subplot()
    columns = [law.runs.columns[name] for name in ("num_params", "num_steps")]
    grids = [np.geomspace(column.min() / 2, column.max() * 2, 80) for column in columns]
    P, N = np.meshgrid(*grids)
    axes.set_xscale("log")
    axes.set_yscale("log")
    values = law.predict(num_params=P, num_steps=N).value[output]
    drawn = axes.contour(P, N, values, levels=MaxNLocator(14).tick_values(values.min(), values.max()), cmap="viridis")
    axes.clabel(drawn, fontsize=8, fmt="%.3g")
    corner = (columns[0].min(), columns[1].min())
    extent = [column.max() - column.min() for column in columns]
    style: dict[str, Any] = {"fill": False, "edgecolor": INK, "linestyle": (0, (4, 3)), "linewidth": 0.9}
    axes.add_patch(Rectangle(corner, *extent, **style))
    axes.plot(*columns, ".", color=INK, markersize=2.5, alpha=0.6)
    _words(axes, f"{SHORT.get(output, output)}, nats per token; dashed: the runs", "parameters that are tuned", output)
    axes.set_ylabel("steps")
    _plain_ticks(axes)
    return figure


def _figure(panels: int) -> Figure:
    from matplotlib.figure import Figure

    wide = min(panels, 2)
    return Figure(figsize=(SIZE[0] * wide * (1.0 if wide == 1 else 0.9), 0.5 + (SIZE[1] - 0.2) * -(-panels // wide)))


def _words(axes: Axes, title: str, xlabel: str, output: str) -> None:
    axes.set_title(label(title, 60))
    axes.set_xlabel(label(xlabel, 80))
    axes.set_ylabel(label(column_of(output).label, 80))


def _colors(count: int) -> list[Any]:
    import matplotlib

    return [matplotlib.colormaps["viridis"](share) for share in np.linspace(0.1, 0.85, max(count, 1))]


def _groups(law: FittedLaw) -> list[tuple[str, np.ndarray, dict[str, Any]]]:
    """Rows by number of parameters where the form has it and the runs several, else all: name, rows, look."""
    sizes = law.runs.columns.get("num_params") if len(law.form.inputs) > 1 else None
    if sizes is None:
        rows = np.ones(len(law.runs), dtype=bool)
        return [("measured", rows, {"color": _colors(1)[0], "marker": "o"})]
    found = np.unique(sizes)
    looks = [{"color": color, "marker": MARKS[at % len(MARKS)]} for at, color in enumerate(_colors(len(found)))]
    return [(_count(size), sizes == size, look) for size, look in zip(found, looks, strict=True)]


def _count(value: float) -> str:
    """5.2e6 → 5.2M."""
    for unit, size in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(value) >= size:
            return f"{value / size:.3g}{unit}"
    return f"{value:.4g}"


def _fitted(law: FittedLaw) -> dict[str, Array]:
    return dict(zip(law.form.outputs, law.problem.predict(law.estimate)[0], strict=True))


def _over_input(axes: Axes, law: FittedLaw, output: str) -> None:
    """Measurements of an output over the last input of the form, and the fitted curves."""
    over = "num_steps" if "num_steps" in law.form.inputs else law.form.inputs[-1]
    x, y, fitted = law.runs.columns[over], law.runs.columns[output], _fitted(law)[output]
    for _, rows, look in _groups(law):
        axes.plot(x[rows], y[rows], linestyle="none", markersize=3, alpha=0.55, markeredgewidth=0, **look)
        for dataset in law.runs.datasets:
            of_set = rows & (np.array(law.runs.dataset) == dataset)
            order = np.argsort(x[of_set])
            axes.plot(x[of_set][order], fitted[of_set][order], color=look["color"], linewidth=1.4)
    if x.min() > 0 and x.max() > 30 * x.min():
        axes.set_xscale("log")
    _words(axes, SHORT.get(output, output), column_of(over).label, output)


def _trajectories(axes: Axes, law: FittedLaw) -> None:
    if not {"finetuning_loss", "forgetting_loss"} <= set(law.form.outputs):
        raise ValueError(f"trajectories: the form {law.form.name!r} has one output; use joint")
    x, y = (law.runs.columns[name] for name in ("finetuning_loss", "forgetting_loss"))
    fitted, sets = _fitted(law), np.array(law.runs.dataset)
    for _, rows, look in _groups(law):
        axes.plot(x[rows], y[rows], linestyle="none", markersize=3, alpha=0.55, markeredgewidth=0, **look)
        for dataset in law.runs.datasets:
            of_set = rows & (sets == dataset)
            order = np.argsort(law.runs.columns["num_steps"][of_set])
            curve = (fitted[name][of_set][order] for name in ("finetuning_loss", "forgetting_loss"))
            axes.plot(*curve, color=look["color"], linewidth=1.0)
    for dataset in law.runs.datasets:
        of_set = sets == dataset
        ends = np.array([x[of_set].min(), x[of_set].max()])
        line = np.polyval(np.polyfit(x[of_set], y[of_set], 1), ends)
        axes.plot(ends, line, color=INK, linewidth=1.2, linestyle=(0, (4, 3)))
    axes.invert_xaxis()
    _words(axes, "Forgetting over learning (dashed: the line)", LEARNING, "forgetting_loss")


def _residuals(axes: Axes, law: FittedLaw, outputs: Sequence[str] = ()) -> None:
    """Residuals of the last output unless told otherwise, over its fitted values, joined within a run."""
    name = (outputs or law.form.outputs)[-1]
    fitted = _fitted(law)[name]
    left = law.runs.columns[name] - fitted
    keys = np.array(law.runs.keys)
    for _, rows, look in _groups(law):
        for run in np.unique(keys[rows]):
            of_run = rows & (keys == run)
            order = np.argsort(fitted[of_run])
            axes.plot(fitted[of_run][order], left[of_run][order], markersize=3, linewidth=0.8, alpha=0.8, **look)
    axes.axhline(0, color=INK, linewidth=0.9)
    axes.locator_params(nbins=6)
    _words(axes, f"Residuals of {SHORT.get(name, name).lower()}", "fitted, nats per token", name)
    axes.set_ylabel("measured - fitted, nats")


def _matching(law: FittedLaw, fixed: dict[str, float]) -> np.ndarray:
    """Rows whose inputs are the fixed ones, within a percent."""
    close = [np.isclose(law.runs.columns[name], value, rtol=0.01) for name, value in fixed.items()]
    return np.all(close, axis=0) if close else np.ones(len(law.runs), dtype=bool)


def _end_of_data(axes: Axes, at: float) -> None:
    axes.axvline(at, color=INK, linewidth=0.9, linestyle=(0, (4, 3)))
    above: dict[str, Any] = {"xycoords": ("data", "axes fraction"), "ha": "right", "va": "bottom", "fontsize": 8}
    axes.annotate("end of the runs ", (at, 0.01), **above)


def _plain_ticks(axes: Axes) -> None:
    """Numbers such as 20M rather than powers of ten, and few of them."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.set_major_formatter(FuncFormatter(lambda value, _: _count(value)))
        axis.set_minor_formatter(NullFormatter())


def _size_legend(figure: Figure, law: FittedLaw) -> None:
    from matplotlib.lines import Line2D

    groups, wide = _groups(law), figure.get_figwidth() > SIZE[0]
    if len(groups) > 1:
        handles = [Line2D([], [], linestyle="none", markersize=5, **look) for _, _, look in groups]
        names = [name for name, _, _ in groups]
        figure.legend(
            handles, names, title="parameters that are tuned", loc="outside lower center", ncols=6 if wide else 3
        )

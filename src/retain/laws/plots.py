"""Figures of a fitted law in the style of `retain.report.style`: runs with curves, and residuals."""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from retain.laws.forms import LOSSES, Array, column_of
from retain.laws.law import ForgettingLaw
from retain.report.figures import LEARNING
from retain.report.style import INK, MARKS, name_axes, styled

TITLES = {"finetuning_loss": "New-task loss", "forgetting_loss": "Forgetting"}
DASHED: dict[str, Any] = {"color": INK, "linestyle": (0, (4, 3))}
POINTS: dict[str, Any] = {"linestyle": "none", "markersize": 3, "alpha": 0.55, "markeredgewidth": 0}


@styled
def overview(law: ForgettingLaw) -> Figure:
    """Plot each output with its fitted curves, forgetting over learning if both are fitted, and residuals."""
    outputs = law.form.outputs
    figure, axes = _subplots(4 if len(outputs) == 2 else len(outputs) + 1)
    for panel, name in zip(axes, outputs, strict=False):
        _over_input(panel, law, name)
    if len(outputs) == 2:
        _trajectories(axes[2], law)
    _residuals(axes[-1], law, outputs[-1])
    _size_legend(figure, law)
    return figure


def _subplots(panels: int) -> tuple[Figure, list[Axes]]:
    num_rows = -(-panels // 2)
    figure = Figure(figsize=(9.0, 0.5 + 3.1 * num_rows))
    return figure, [figure.add_subplot(num_rows, 2, at + 1) for at in range(panels)]


def _groups(law: ForgettingLaw) -> list[tuple[str, np.ndarray, dict[str, Any]]]:
    """(name, rows, style) for each number of parameters, or one group if the form has no other input beside it."""
    by_size = len(law.form.inputs) > 1 and "num_params" in law.form.inputs
    sizes = law.runs.columns["num_params"] if by_size else np.zeros(len(law.runs))
    distinct = np.unique(sizes)
    colors = map(colormaps["viridis"], np.linspace(0.1, 0.85, len(distinct)))
    styles = [{"color": color, "marker": MARKS[at % len(MARKS)]} for at, color in enumerate(colors)]
    return [(_count(size), sizes == size, style) for size, style in zip(distinct, styles, strict=True)]


def _count(value: float) -> str:
    """5.2e6 → 5.2M."""
    for unit, size in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(value) >= size:
            return f"{value / size:.3g}{unit}"
    return f"{value:.4g}"


def _fitted(law: ForgettingLaw) -> dict[str, Array]:
    return dict(zip(law.form.outputs, law.problem.predict(law.estimate)[0], strict=True))


def _points_and_curves(
    axes: Axes, law: ForgettingLaw, x: Array, y: Array, curve: tuple[Array, Array], order: Array
) -> None:
    """Plot the measurements, and for each size and data set the fitted curve through its points, sorted by `order`."""
    for _, rows, style in _groups(law):
        axes.plot(x[rows], y[rows], **POINTS, **style)
        for code in range(len(law.runs.datasets)):
            at = np.flatnonzero(rows & (law.runs.dataset_codes == code))
            at = at[np.argsort(order[at])]
            axes.plot(curve[0][at], curve[1][at], color=style["color"], linewidth=1.2)


def _over_input(axes: Axes, law: ForgettingLaw, output: str) -> None:
    """Plot an output and its fitted curves over the steps, or over the form's last input."""
    over = "num_steps" if "num_steps" in law.form.inputs else law.form.inputs[-1]
    x = law.runs.columns[over]
    _points_and_curves(axes, law, x, law.runs.columns[output], (x, _fitted(law)[output]), x)
    if x.min() > 0 and x.max() > 30 * x.min():
        axes.set_xscale("log")
    name_axes(axes, TITLES.get(output, output), column_of(over).label, column_of(output).label)


def _trajectories(axes: Axes, law: ForgettingLaw) -> None:
    (x, y), fitted = (law.runs.columns[name] for name in LOSSES), _fitted(law)
    _points_and_curves(axes, law, x, y, (fitted[LOSSES[0]], fitted[LOSSES[1]]), law.runs.columns["num_steps"])
    for code in range(len(law.runs.datasets)):
        rows = law.runs.dataset_codes == code
        ends = np.array([x[rows].min(), x[rows].max()])
        axes.plot(ends, np.polyval(np.polyfit(x[rows], y[rows], 1), ends), linewidth=1.2, **DASHED)
    axes.invert_xaxis()
    name_axes(axes, "Forgetting over learning (dashed: the line)", LEARNING, column_of("forgetting_loss").label)


def _residuals(axes: Axes, law: ForgettingLaw, output: str) -> None:
    """Plot residuals of an output over its fitted values, joined within a run."""
    fitted = _fitted(law)[output]
    residuals = law.runs.columns[output] - fitted
    for _, rows, style in _groups(law):
        for code in np.unique(law.runs.run_codes[rows]):
            at = np.flatnonzero(rows & (law.runs.run_codes == code))
            at = at[np.argsort(fitted[at])]
            axes.plot(fitted[at], residuals[at], markersize=3, linewidth=0.8, alpha=0.8, **style)
    axes.axhline(0, color=INK, linewidth=0.9)
    axes.locator_params(nbins=6)
    title = f"Residuals of {TITLES.get(output, output).lower()}"
    name_axes(axes, title, "fitted, nats per token", "measured - fitted, nats")


def _size_legend(figure: Figure, law: ForgettingLaw) -> None:
    groups = _groups(law)
    if len(groups) > 1:
        handles = [Line2D([], [], linestyle="none", markersize=5, **style) for _, _, style in groups]
        names = [name for name, _, _ in groups]
        figure.legend(handles, names, title="tuned parameters", loc="outside lower center", ncols=6)

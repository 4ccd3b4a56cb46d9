"""The study's figure: what is left of the divergence over coefficient, over the cost of a step, and over the pool."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.ticker import FuncFormatter

from experiments.pages import dress, goal_line, panels
from experiments.study_01_replay_cost.report import GOAL, LIMIT, Cell, cost_of, time_of
from retain.report.style import INK, MARKS, PALETTE

MEASURE = ("prose", "ref_kl")
COEF = 1.0  # the coefficient of the panel of prices
TICKS = (0.05, 0.1, 0.2, 0.4)
SMALL: dict[str, Any] = {"textcoords": "offset points", "fontsize": 7.5}
OPEN: dict[str, Any] = {"markerfacecolor": "white", "linestyle": "none", "zorder": 3}  # one seed
LEFT = "ref_kl on prose, share of the plain run's"


def left(cell: Cell) -> tuple[float, float, float]:
    """1 − prevented, and the two arms of its interval, never below a thousandth on the logarithmic axis."""
    found = cell.prevented(*MEASURE)
    value = 1 - found.value
    return value, value - max(1 - found.high, 1e-3), (1 - found.low) - value


def draw(cells: Sequence[Cell], path: Path) -> None:
    shown = [
        cell for cell in cells if "coef" in cell.settings and cell.reached and cell.usual and cell.method == "full"
    ]
    fresh = [cell for cell in shown if "pool" not in cell.settings]
    sparse = [cell for cell in fresh if cell.settings["replay_every"] > 1]
    dense = [cell for cell in fresh if cell.settings["replay_every"] == 1]
    with panels(path, 3, (13.5, 4.2)) as (first, second, third):
        over_coefficient(first, dense)
        over_cost(second, *([c for c in group if c.settings["coef"] == COEF] for group in (dense, sparse)))
        over_pool(third, [cell for cell in shown if "pool" in cell.settings], dense)
        for axes in (first, second, third):
            axes.set_yscale("log")
            axes.set_ylim(0.035, 0.6)
            axes.set_yticks(TICKS, [f"{tick:.0%}" for tick in TICKS])
            axes.minorticks_off()
            goal_line(axes, y=1 - GOAL, words=f"{GOAL:.0%} prevented")


def over_coefficient(axes: Any, cells: Sequence[Cell]) -> None:
    sizes = sorted({cell.replay for cell in cells}, key=lambda size: int(size[2:]))
    for at, size in enumerate(sizes):
        points = sorted((cell for cell in cells if cell.replay == size), key=lambda cell: cell.settings["coef"])
        _plot(axes, [cell.settings["coef"] for cell in points], points, at)
        end = points[-1].settings["coef"], left(points[-1])[0]
        how = {"textcoords": "offset points", "va": "center", "fontsize": 8.5}
        axes.annotate(size, end, (7, 0), color=PALETTE[at % 6], **how)
    axes.set_xscale("log")
    coefs = sorted({cell.settings["coef"] for cell in cells})
    axes.set_xticks(coefs, [f"{coef:g}" for coef in coefs])
    axes.margins(x=0.14)
    dress(axes, "By coefficient and share of the batch", "replay_coef", LEFT)


def over_cost(axes: Any, dense: Sequence[Cell], sparse: Sequence[Cell]) -> None:
    """Two prices of the same cells: of a step, and of reaching the same loss; and replay on every k-th step."""
    series = (
        ("time of a step", dense, cost_of),
        ("the same, replay on every k-th step", sparse, cost_of),
        ("time to the same loss", dense, time_of),
    )
    for at, (name, group, price) in enumerate(series):
        points = sorted(group, key=cost_of)
        if points:
            style = "none" if price is time_of or group is sparse else "-"
            _plot(axes, [price(cell) - 1 for cell in points], points, at, label=name, linestyle=style)
    for cell in dense:
        axes.annotate(cell.replay, (cost_of(cell) - 1, left(cell)[0]), (-5, -5), ha="right", va="top", **SMALL)
    for cell in sparse:
        words = cell.replay.removesuffix(" steps")
        axes.annotate(words, (cost_of(cell) - 1, left(cell)[0]), (5, 5), **SMALL)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:+.0%}"))
    axes.axvline(LIMIT - 1, color=INK, linewidth=0.9, linestyle=(0, (4, 3)), zorder=1)
    axes.margins(x=0.15)
    if [*dense, *sparse]:
        axes.legend(loc="upper right", fontsize=8)
    dress(axes, f"By price, coefficient {COEF:g} (line: 10%)", "more time than plain finetuning", "")


def over_pool(axes: Any, pooled: Sequence[Cell], fresh: Sequence[Cell]) -> None:
    kinds = sorted({(cell.replay, cell.settings["coef"]) for cell in pooled})
    for at, kind in enumerate(kinds):
        points = [cell for cell in pooled if (cell.replay, cell.settings["coef"]) == kind]
        points.sort(key=lambda cell: cell.settings["pool"])
        whole = [cell for cell in fresh if (cell.replay, cell.settings["coef"]) == kind]
        drawn = [round(cell.settings["replay_rows"] * cell.last_step) for cell in whole]
        x = [*(cell.settings["pool"] for cell in points), *drawn]
        _plot(axes, x, [*points, *whole], at, label=f"{kind[0]} of the batch, coef {kind[1]:g}")
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    if pooled:
        axes.legend(loc="upper right")
    dress(axes, "By distinct replay rows (last point: none twice)", "rows in the pool", "")


def _plot(axes: Any, x: Sequence[float], points: Sequence[Cell], at: int, **how: Any) -> None:
    found = [left(cell) for cell in points]
    low, high = [arm for _, arm, _ in found], [arm for _, _, arm in found]
    color, mark = PALETTE[at % 6], MARKS[at % 6]
    axes.errorbar(
        x, [value for value, _, _ in found], yerr=[low, high], color=color, marker=mark, elinewidth=1.0, **how
    )
    alone = [(at, value) for at, (value, _, _), cell in zip(x, found, points, strict=True) if len(cell.readings) == 1]
    if alone:
        axes.plot(*zip(*alone, strict=True), color=color, marker=mark, **OPEN)

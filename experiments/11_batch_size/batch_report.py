"""What the study of batch sizes says: table, verdict and figure, from its rows alone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matched import t_interval
from matplotlib.ticker import FuncFormatter, NullFormatter
from pages import dress, panels

from retain.plots import MARKS, PALETTE

Row = dict[str, Any]


@dataclass(frozen=True)
class Cell:
    """One batch size and half-life at its best learning rate: losses by seed."""

    batch_size: int
    half_life: float
    beta2: float
    learning_rate: float
    at_edge: bool
    losses: tuple[float, ...]


def cells_of(rows: Sequence[Row]) -> list[Cell]:
    """Cells with the learning rate that is best in the mean of all seeds; by batch size and half-life."""
    groups: dict[tuple[int, float], dict[float, list[Row]]] = {}
    for row in sorted(rows, key=lambda row: row["settings"]["seed"]):
        settings = row["settings"]
        cell = groups.setdefault((settings["batch_size"], settings["half_life"]), {})
        cell.setdefault(settings["learning_rate"], []).append(row)
    found = []
    for (batch_size, half_life), by_rate in sorted(groups.items()):
        most = max(map(len, by_rate.values()))
        whole = [rate for rate, runs in by_rate.items() if len(runs) == most]
        best = min(whole, key=lambda rate: float(np.mean([_loss(row) for row in by_rate[rate]])))
        runs = by_rate[best]
        edge = len(by_rate) > 1 and best in (min(by_rate), max(by_rate))
        found.append(Cell(batch_size, half_life, runs[0]["beta2"], best, edge, tuple(map(_loss, runs))))
    return found


def finished(cells: Sequence[Cell]) -> list[Cell]:
    """Those of batch sizes with every half-life and seed: a killed study leaves others."""
    seeds = max((len(cell.losses) for cell in cells), default=0)
    longest = max((cell.half_life for cell in cells), default=0.0)
    mine = [curve(cells, size) for size in batch_sizes(cells)]
    whole = [one for one in mine if one[-1].half_life == longest and min(len(cell.losses) for cell in one) == seeds]
    return [cell for one in whole if len(one) > 2 for cell in one]


def _loss(row: Row) -> float:
    return math.inf if row["loss"] is None else row["loss"]


def batch_sizes(cells: Sequence[Cell]) -> list[int]:
    return sorted({cell.batch_size for cell in cells})


def curve(cells: Sequence[Cell], batch_size: int) -> list[Cell]:
    """The cells of a batch size, by half-life."""
    return [cell for cell in cells if cell.batch_size == batch_size]


def best_half_life(cells: Sequence[Cell], batch_size: int, seed: int) -> float:
    """Where the parabola through the least loss and its neighbours is least, in log half-life; at an edge, the edge."""
    mine = curve(cells, batch_size)
    losses, places = [cell.losses[seed] for cell in mine], [math.log(cell.half_life) for cell in mine]
    at = int(np.argmin(losses))
    around = slice(at - 1, at + 2)
    if not 0 < at < len(mine) - 1 or not np.isfinite(losses[around]).all():
        return mine[at].half_life
    bend, slope, _ = np.polyfit(np.array(places[around]) - places[at], losses[around], 2)
    return math.exp(places[at] - slope / (2 * bend)) if bend > 0 else mine[at].half_life


def at_edge(cells: Sequence[Cell], batch_size: int) -> bool:
    """Whether some seed's least loss is at the end of the half-lives: the best one may lie beyond."""
    mine = curve(cells, batch_size)
    return any(int(np.argmin(losses)) in (0, len(mine) - 1)
               for losses in zip(*(cell.losses for cell in mine), strict=True))  # fmt: skip


def table(rows: Sequence[Row]) -> str:
    """Losses by batch size and half-life, and the best half-life of each batch size."""
    every = cells_of(rows)
    cells = finished(every)
    half_lives = sorted({cell.half_life for cell in cells})
    head = [f"{value:,.0f}" for value in half_lives]
    lines = [f"| rows a step | half-life {' | '.join(head)} | best half-life, tokens | best beta2 |",
             "| --- " * (len(half_lives) + 3) + "|"]  # fmt: skip
    for batch_size in batch_sizes(cells):
        mine = {cell.half_life: cell for cell in curve(cells, batch_size)}
        told = [_cell(mine[value]) if value in mine else "–" for value in half_lives]
        least = [best_half_life(cells, batch_size, seed) for seed in range(num_seeds(cells))]
        told += [spread(least, ",.0f") + (" (edge)" if at_edge(cells, batch_size) else "")]
        told += [f"{0.5 ** (_step_tokens(cells, batch_size) / math.exp(np.mean(np.log(least)))):.4f}"]
        lines.append(f"| {batch_size} | {' | '.join(told)} |")
    ends = sum(cell.at_edge for cell in cells)
    after = f"\n\n† The best rate is at the end of those tried: {ends} of {len(cells)} cells." if ends else ""
    missing = [str(size) for size in batch_sizes(every) if size not in batch_sizes(cells)]
    after += f"\n\nNot finished, and left out: {', '.join(missing)} row(s) a step." if missing else ""
    return "\n".join(lines) + after


def _step_tokens(cells: Sequence[Cell], batch_size: int) -> float:
    """Tokens of a step, from a cell's beta2 and half-life."""
    cell = curve(cells, batch_size)[0]
    return cell.half_life * math.log(cell.beta2) / math.log(0.5)


def _cell(cell: Cell) -> str:
    end = " †" if cell.at_edge else ""
    return f"{np.mean(cell.losses):.3f} (beta2 {cell.beta2:.4f}, rate {cell.learning_rate:.2g}{end})"


def num_seeds(cells: Sequence[Cell]) -> int:
    return min((len(cell.losses) for cell in cells), default=0)


def spread(values: Sequence[float], form: str = ".2f") -> str:
    """Geometric mean and 95% interval over seeds."""
    low, high = np.exp(t_interval(np.log(values)))
    return f"{np.exp(np.mean(np.log(values))):{form}} [{low:{form}}, {high:{form}}]"


def slopes(cells: Sequence[Cell]) -> list[float]:
    """By seed: the power of the batch size by which the best half-life goes. 0: constant in tokens; 1: beta2 is."""
    sizes = batch_sizes(cells)
    return [
        float(np.polyfit(np.log(sizes), [math.log(best_half_life(cells, size, seed)) for size in sizes], 1)[0])
        for seed in range(num_seeds(cells))
    ]


def regrets(cells: Sequence[Cell], name: str) -> list[float]:
    """By seed: nats above each batch size's best that one value of `half_life` or `beta2` for all costs, at its best.

    Values that every batch size was trained with; the mean over batch sizes.
    """
    groups: dict[float, dict[int, Cell]] = {}
    for cell in cells:
        groups.setdefault(float(f"{getattr(cell, name):.4g}"), {})[cell.batch_size] = cell
    sizes = batch_sizes(cells)
    whole = [group for group in groups.values() if len(group) == len(sizes)]
    found = []
    for seed in range(num_seeds(cells)):
        least = {size: min(cell.losses[seed] for cell in curve(cells, size)) for size in sizes}
        cost = [np.mean([group[size].losses[seed] - least[size] for size in sizes]) for group in whole]
        found.append(float(min(cost, default=math.nan)))
    return found


def verdict(rows: Sequence[Row]) -> str:
    """Is the best half-life the same at every batch size, by its slope and its interval over seeds?"""
    cells = finished(cells_of(rows))
    number, sizes = num_seeds(cells), batch_sizes(cells)
    if number < 2 or len(sizes) < 2:
        return "Verdict: none yet; the study is not finished."
    found = slopes(cells)
    low, high = t_interval(found)
    edges = [size for size in sizes if at_edge(cells, size)]
    answer = answered(low, high, bool(edges))
    moved = [abs(slope) * math.log(max(sizes) / min(sizes)) for slope in found]
    apart = max(sizes) / min(sizes)
    half_life, beta2 = regrets(cells, "half_life"), regrets(cells, "beta2")
    better = t_interval([one - other for one, other in zip(half_life, beta2, strict=True)])
    cheaper = "costs less" if better[1] < 0 else "costs more" if better[0] > 0 else "does not cost clearly less or more"
    after = f" At {', '.join(map(str, edges))} rows some seed is best at the end of the half-lives." if edges else ""
    return (
        f"Verdict: {answer}. From {min(sizes)} to {max(sizes)} rows a step the best half-life goes with the batch size "
        f"to the power {np.mean(found):.2f} [{low:.2f}, {high:.2f}] (0: constant in tokens, as in the paper; 1: beta2 "
        f"is constant), which is a factor of {math.exp(np.mean(moved)):.1f} over batch sizes {apart:g} times apart; "
        f"a fixed beta2 would have moved it {apart:g} times.{after} One half-life for all batch sizes {cheaper} than "
        f"one beta2: {_nats(half_life)} against {_nats(beta2)} nats above each batch size's best. {number} seeds; 95% "
        "intervals by Student's t."
    )


def answered(low: float, high: float, at_an_edge: bool) -> str:
    """The paper's slope is 0; a constant beta2 would be 1; an optimum that was not bracketed leaves it open."""
    if at_an_edge or (low <= 0 and high >= 1):
        return "cannot tell at this size"
    if low <= 0 <= high:
        return "reproduced"
    return "not reproduced" if high >= 1 or low > 0.5 or high < 0 else "in between: nearer to constant in tokens"


def _nats(values: Sequence[float]) -> str:
    low, high = t_interval(values)
    return f"{np.mean(values):.3f} [{low:.3f}, {high:.3f}]"


def draw(rows: Sequence[Row], path: Path) -> None:
    """Loss over half-life, and over beta2; a curve for each batch size, its least marked."""
    cells = finished(cells_of(rows))
    with panels(path, 2, (9.6, 3.8)) as axes:
        for at, batch_size in enumerate(batch_sizes(cells)):
            mine = curve(cells, batch_size)
            for axis, x in zip(axes, ([c.half_life for c in mine], [1 - c.beta2 for c in mine]), strict=True):
                _line(axis, x, mine, f"{batch_size} row{'s' if batch_size > 1 else ''} a step", at)
        dress(
            axes[0], "Over the half-life", "half-life of Adam's second moment, tokens", "held-out loss, nats per token"
        )
        dress(axes[1], "Over beta2", "1 − beta2 (memory grows to the right)", "")
        for axis in axes:
            axis.set_xscale("log")
            axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.4g}"))
            axis.xaxis.set_minor_formatter(NullFormatter())
        axes[1].invert_xaxis()
        handles, labels = axes[0].get_legend_handles_labels()
        axes[0].figure.legend(handles, labels, loc="outside lower center", ncols=max(1, len(handles)))


def _line(axis: Any, x: Sequence[float], cells: Sequence[Cell], name: str, at: int) -> None:
    means = [float(np.mean(cell.losses)) for cell in cells]
    color, mark = PALETTE[at % len(PALETTE)], MARKS[at % len(MARKS)]
    small = {"color": color, "marker": mark, "markersize": 2.5, "alpha": 0.5, "linestyle": "none"}
    axis.plot(x, means, color=color, marker=mark, label=name)
    for place, cell in zip(x, cells, strict=True):
        axis.plot([place] * len(cell.losses), cell.losses, **small)
    least = int(np.argmin(means))
    axis.plot(x[least], means[least], marker="o", markersize=12, markerfacecolor="none", color=color, ls="none")

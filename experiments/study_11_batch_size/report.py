"""What the study of batch sizes says: table, verdict and figure, from its rows alone."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.ticker import FuncFormatter, NullFormatter

from experiments.claim import over_seeds, ratio_over_seeds
from experiments.pages import answer_of, dress, findings, panels, table
from retain.report.style import MARKS, PALETTE

Row = dict[str, Any]
Reading = Callable[[Sequence["Cell"], int, int], float]  # cells, batch size, seed -> a half-life
COST = 0.01  # nats: what "good enough" is
COSTS = (0.005, COST, 0.02)  # a conclusion that hangs on this choice is none
SHOWN = 0.1  # nats above the least loss at which the figure ends: losses of runs that diverge lie far above


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
    for row in rows:
        settings = row["settings"]
        cell = groups.setdefault((settings["batch_size"], settings["half_life"]), {})
        cell.setdefault(settings["learning_rate"], []).append(row)
    found = []
    for (batch_size, half_life), by_rate in sorted(groups.items()):
        every = {rate: _losses(runs) for rate, runs in by_rate.items()}
        most = max(map(len, every.values()))
        best = min((rate for rate, losses in every.items() if len(losses) == most), key=lambda at: np.mean(every[at]))
        edge = len(by_rate) > 1 and best in (min(by_rate), max(by_rate))
        found.append(Cell(batch_size, half_life, by_rate[best][0]["beta2"], best, edge, every[best]))
    return found


def _losses(rows: Sequence[Row]) -> tuple[float, ...]:
    """By seed, from rows that hold one or several; of a run that diverged, infinity."""
    by_seed = {seed: math.inf if loss is None else loss
               for row in rows for seed, loss in zip(row["settings"]["seeds"], row["losses"], strict=True)}  # fmt: skip
    return tuple(by_seed[seed] for seed in sorted(by_seed))


def finished(cells: Sequence[Cell]) -> list[Cell]:
    """Those of batch sizes with every half-life and seed: a killed study leaves others."""
    seeds = max((len(cell.losses) for cell in cells), default=0)
    longest = max((cell.half_life for cell in cells), default=0.0)
    mine = [curve(cells, size) for size in batch_sizes(cells)]
    whole = [one for one in mine if one[-1].half_life == longest and min(len(cell.losses) for cell in one) == seeds]
    return [cell for one in whole if len(one) > 2 for cell in one]


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


def table_of_losses(rows: Sequence[Row]) -> str:
    """Losses by batch size and half-life, and the best half-life of each batch size."""
    every, lines = cells_of(rows), []
    cells = finished(every)
    half_lives = sorted({cell.half_life for cell in cells})
    for batch_size in batch_sizes(cells):
        mine = {cell.half_life: cell for cell in curve(cells, batch_size)}
        losses = [_cell(mine[value]) if value in mine else "–" for value in half_lives]
        best, knees = ([read(cells, batch_size, seed) for seed in range(num_seeds(cells))]
                       for read in (best_half_life, shortest))  # fmt: skip
        beta2 = 0.5 ** (_step_tokens(cells, batch_size) / math.exp(np.mean(np.log(best))))
        ends = [" (edge)" if edge else "" for edge in (at_edge(cells, batch_size), min(knees) == min(mine))]
        half, knee = (ratio_over_seeds(some).text(",.0f") + end for some, end in zip((best, knees), ends, strict=True))
        lines.append([batch_size, *losses, half, f"{beta2:.4g}", knee])
    first, *others = [f"{value:,.0f}" for value in half_lives] or [""]
    head = ["rows a step", f"half-life {first}", *others, "best half-life, tokens", "best beta2"]
    ends = sum(cell.at_edge for cell in cells)
    after = f"\n\n† The best rate is at the end of those tried: {ends} of {len(cells)} cells." if ends else ""
    missing = [str(size) for size in batch_sizes(every) if size not in batch_sizes(cells)]
    after += f"\n\nNot finished, and left out: {', '.join(missing)} row(s) a step." if missing else ""
    return table([*head, "shortest good half-life"], lines) + after


def _step_tokens(cells: Sequence[Cell], batch_size: int) -> float:
    """Tokens of a step, from a cell's beta2 and half-life."""
    cell = curve(cells, batch_size)[0]
    return cell.half_life * math.log(cell.beta2) / math.log(0.5)


def _cell(cell: Cell) -> str:
    end = " †" if cell.at_edge else ""
    return f"{np.mean(cell.losses):.3f} (beta2 {cell.beta2:.6g}, rate {cell.learning_rate:.2g}{end})"


def num_seeds(cells: Sequence[Cell]) -> int:
    return min((len(cell.losses) for cell in cells), default=0)


def shortest(cells: Sequence[Cell], batch_size: int, seed: int, cost: float = COST) -> float:
    """The half-life below which a batch size costs more than `cost` nats: read on a line between two half-lives.

    The cost is that above the half-life that is best in the mean of all seeds.
    """
    mine = curve(cells, batch_size)
    least = min(mine, key=lambda cell: float(np.mean(cell.losses))).losses[seed]
    costs = [cell.losses[seed] - least - cost for cell in mine]
    at = next(at for at, more in enumerate(costs) if more <= 0)
    if at == 0 or not math.isfinite(costs[at - 1]):
        return mine[at].half_life
    share = costs[at - 1] / (costs[at - 1] - costs[at])
    return float(mine[at - 1].half_life * (mine[at].half_life / mine[at - 1].half_life) ** share)


def by_cost(cells: Sequence[Cell]) -> dict[float, list[float]]:
    """The power of the shortest good half-life, a value a seed, for each of several costs that are still good."""
    return {cost: slopes(cells, partial(shortest, cost=cost)) for cost in COSTS}


def slopes(cells: Sequence[Cell], read: Reading = best_half_life) -> list[float]:
    """By seed: the power of the batch size by which a half-life goes. 0: constant in tokens; 1: beta2 is."""
    sizes = batch_sizes(cells)
    return [
        float(np.polyfit(np.log(sizes), [math.log(read(cells, size, seed)) for size in sizes], 1)[0])
        for seed in range(num_seeds(cells))
    ]


def regrets(cells: Sequence[Cell], name: str) -> tuple[float, list[float]]:
    """The one `half_life` or `beta2` that costs all batch sizes least, and its cost by seed, mean over batch sizes.

    Of values that every batch size was trained with; nats above the half-life that is best in the mean of all seeds.
    """
    groups: dict[str, dict[int, Cell]] = {}
    for cell in cells:
        value = cell.half_life if name == "half_life" else math.log(cell.beta2)  # whose digits are not all nines
        groups.setdefault(f"{value:.3g}", {})[cell.batch_size] = cell
    sizes = batch_sizes(cells)
    whole = [group for group in groups.values() if len(group) == len(sizes)]
    if not whole:
        return math.nan, [math.nan] * num_seeds(cells)
    losses = [np.mean([group[size].losses for size in sizes], axis=0) for group in whole]
    at = int(np.argmin([one.mean() for one in losses]))
    least = [min((cell.losses for cell in curve(cells, size)), key=np.mean) for size in sizes]
    return getattr(whole[at][sizes[0]], name), (losses[at] - np.mean(least, axis=0)).tolist()


def verdict(rows: Sequence[Row]) -> str:
    """Is the best half-life the same at every batch size, by its slope and its interval over seeds?"""
    cells = finished(cells_of(rows))
    number, sizes = num_seeds(cells), batch_sizes(cells)
    if number < 2 or len(sizes) < 2:
        return "Verdict: none yet; the study is not finished."
    found = over_seeds(slopes(cells))
    edges = [size for size in sizes if at_edge(cells, size)]
    apart = max(sizes) / min(sizes)
    after = f" At {', '.join(map(str, edges))} rows some seed is best at the end of the half-lives." if edges else ""
    if flat := [size for size in sizes if not bounded(cells, size)]:
        after += f" At {', '.join(map(str, flat))} rows the shortest or longest half-life does not clearly cost more."
    return (
        f"Verdict: {conclusion(cells)}. From {min(sizes)} to {max(sizes)} rows a step the best "
        f"half-life goes with the batch size to the power {found.text('.2f')} (0: constant in "
        f"tokens, as in the paper; 1: beta2 is constant), which is a factor of {apart**found.value:.2g} over "
        f"batch sizes {apart:g} times apart.{after} The shortest half-life that is still good goes with the power "
        f"{powers(cells)}.{below(cells)} {compared(cells)} {number} seeds; 95% intervals by Student's t."
    )


def powers(cells: Sequence[Cell]) -> str:
    """Of the shortest good half-life, by what counts as good."""
    found = by_cost(cells).items()
    return "; ".join(f"{over_seeds(values).text('.2f')} where {cost:g} nats more are good" for cost, values in found)


def text_of(rows: Sequence[Row]) -> str:
    """Everything between the marks of the README."""
    said = verdict(rows)
    if not (answer := answer_of(said)):
        return f"{table_of_losses(rows)}\n\n**{said}**"
    cells = finished(cells_of(rows))
    numbers = f"shortest good half-life, power of the batch size: {powers(cells)}"
    claim = {"The best half-life of Adam's second moment is constant in tokens": (answer, numbers)}
    text = f"{table_of_losses(rows)}\n\n**{said}**\n\n{findings(claim)}"
    if not (floor := at_floor(cells)):
        return text
    rest = powers([cell for cell in cells if cell.batch_size not in floor])
    return f"{text}\n\nLooked at after the runs: without {', '.join(map(str, floor))} rows, at the floor, it is {rest}."


def at_floor(cells: Sequence[Cell]) -> list[int]:
    """Batch sizes at which some seed's shortest good half-life may be shorter than any that was tried."""
    return [size for size in batch_sizes(cells) for mine in [curve(cells, size)]
            if any(shortest(cells, size, seed) == mine[0].half_life for seed in range(num_seeds(cells)))]  # fmt: skip


def below(cells: Sequence[Cell]) -> str:
    """Says where that is so."""
    ends = at_floor(cells)
    return f" At {', '.join(map(str, ends))} rows it lies at or below the first that was tried." if ends else ""


def compared(cells: Sequence[Cell]) -> str:
    """One half-life for all batch sizes against one beta2 for all."""
    (half_life, one), (beta2, other) = regrets(cells, "half_life"), regrets(cells, "beta2")
    less = [mine - others for mine, others in zip(one, other, strict=True)]
    apart = over_seeds(less)
    cheaper = {-1: "costs less", 0: "does not cost clearly less or more", 1: "costs more"}[apart.sign]
    return (
        f"One half-life for all batch sizes ({half_life:,.0f} tokens) {cheaper} than one beta2 ({beta2:.4g}): "
        f"{over_seeds(one).text('.4f')} against {over_seeds(other).text('.4f')} nats above each batch size's best, "
        f"{apart.text('+.4f')}."
    )


def conclusion(cells: Sequence[Cell]) -> str:
    """By the best half-life where both sides of it cost more; where curves are flat, by the shortest good one.

    A flat curve has its least anywhere, and over half-lives in tokens "anywhere" would look constant in tokens.
    """
    sizes = batch_sizes(cells)
    if not any(at_edge(cells, size) for size in sizes) and all(bounded(cells, size) for size in sizes):
        return answered(*over_seeds(slopes(cells))[1:])
    _, low, high = over_seeds(slopes(cells, shortest))
    flat = all(shortest(cells, size, seed) < curve(cells, size)[-2].half_life
               for size in sizes for seed in range(num_seeds(cells)))  # fmt: skip
    if flat and all(low <= 0 <= high < 1 for _, low, high in map(over_seeds, by_cost(cells).values())):
        return "in part: the shortest good half-life is constant in tokens and not in beta2, the best cannot be told"
    if flat and low <= 0 <= high < 1:
        return "cannot tell: whether the shortest good half-life is constant in tokens depends on what counts as good"
    return "cannot tell at this size"


def bounded(cells: Sequence[Cell], batch_size: int) -> bool:
    """Whether the shortest and the longest half-life cost more than the one that is best in the mean of all seeds."""
    mine = curve(cells, batch_size)
    least = min((cell.losses for cell in mine), key=np.mean)
    ends = [[min(SHOWN, loss - best) for loss, best in zip(mine[at].losses, least, strict=True)] for at in (0, -1)]
    return all(over_seeds(costs).low > 0 for costs in ends)  # a run that diverged would widen it without end


def answered(low: float, high: float) -> str:
    """The paper's slope is 0; a constant beta2 would be 1."""
    if low <= 0 and high >= 1:
        return "cannot tell at this size"
    if low <= 0 <= high:
        return "reproduced"
    return "not reproduced" if high >= 1 or low > 0.5 or high < 0 else "in between: nearer to constant in tokens"


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
            axis.xaxis.set_major_formatter(
                FuncFormatter(lambda value, _: f"{value:,.0f}" if value >= 1 else f"{value:.6f}".rstrip("0"))
            )
            axis.xaxis.set_minor_formatter(NullFormatter())
            least = min((min(cell.losses) for cell in cells), default=0.0)
            axis.set_ylim(least - 0.05 * SHOWN, least + SHOWN)
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

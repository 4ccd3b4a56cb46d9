"""What the grid of sizes and tokens per parameter says: table, verdict and heat maps, from its rows alone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from experiments.claim import FIRST_LOOK, Claim, over_seeds
from experiments.pages import answer_of, findings, panels, table
from experiments.study_07_capacity.cells import Cell, Row, cell_of, compute_multiplier, slopes, tunes
from retain.report.style import INK

Place = tuple[str, float]  # size, tokens per parameter
# The paper's: without replay the delta falls with tokens per parameter in small models (5.77M: .354 to .122), and with
# the KL on real rows at coefficient 10 it is at most .005 everywhere.
NO_CELL = "not comparable with the paper: no cell of its grid"


def cells(rows: Sequence[Row], scale: Any) -> dict[Place, Cell]:
    """Forgetting at the best coefficient, where the target is reached."""
    found = {}
    for size, length in scale.cells:
        mine = [row for row in tunes(rows, size=size) if abs(row["settings"]["tokens_per_param"] / length - 1) < 0.01]
        if mine and (cell := cell_of(mine, scale.world.target)) is not None:
            found[size, length] = cell
    return found


def multipliers(rows: Sequence[Row], place: Place, cell: Cell) -> list[float]:
    """The compute multiplier of a cell, one value a seed."""
    size, _ = place
    curves = {
        row["settings"]["seed"]: row["curve"]
        for row in rows
        if row["settings"]["kind"] == "base" and row["settings"]["size"] == size
    }
    return [
        compute_multiplier(curves[seed], row["settings"]["tokens_per_param"], row["base_loss"], cell.forgetting[seed])
        for seed, row in sorted(cell.rows.items())
    ]


HEAD = (
    "parameters", "tokens per parameter", "old loss before", "best coefficient", "loss delta",
    "share of what was known", "compute multiplier", "seeds",
)  # fmt: skip


def table_of_cells(rows: Sequence[Row], scale: Any) -> str:
    """A line for each cell of the grid."""
    lines = []
    for place, cell in cells(rows, scale).items():
        before = np.mean([row["base_loss"] for row in cell.rows.values()])
        share = over_seeds(multipliers(rows, place, cell)).text(".2f")
        known = f"{np.mean(shares_lost(cell, scale)):.0%}"
        lines.append([named(cell), f"{place[1]:.0f}", f"{before:.3f}", f"{cell.coef:.2g}", cell.interval, known, share,
                      len(cell.forgetting)])  # fmt: skip
    return table(HEAD, lines)


def shares_lost(cell: Cell, scale: Any) -> list[float]:
    """Forgetting as a share of what the base knew: how far its loss lay below a uniform guess. A value a seed."""
    guess = math.log(scale.world.vocab_size)
    return [cell.forgetting[seed] / (guess - row["base_loss"]) for seed, row in sorted(cell.rows.items())]


def rises_by_size(found: dict[Place, Cell]) -> str:
    """Change of the loss delta for each tenfold of tokens per parameter, of each size that has two lengths or more."""
    rises = []
    for size in dict.fromkeys(size for size, _ in found):
        mine = {length: cell for (one, length), cell in found.items() if one == size}
        if len(mine) > 1:
            rises.append(f"{over_seeds(slopes(mine))} with {named(next(iter(mine.values())))} parameters")
    return ", ".join(rises)


def plane(found: dict[Place, Cell]) -> tuple[Claim, Claim]:
    """Forgetting falls with size and rises with tokens: changes for each tenfold, least squares over the whole grid."""
    seeds = set.intersection(*(set(cell.forgetting) for cell in found.values()))
    sizes = [float(next(iter(cell.rows.values()))["num_params"]) for cell in found.values()]
    design = np.column_stack([np.ones(len(found)), np.log10(sizes), np.log10([length for _, length in found])])
    fits = [np.linalg.lstsq(design, [cell.forgetting[seed] for cell in found.values()], rcond=None)[0]
            for seed in sorted(seeds)]  # fmt: skip
    by_size, by_length = ([float(fit[at]) for fit in fits] for at in (1, 2))
    return Claim(by_size, direction=-1, first_look=FIRST_LOOK), Claim(by_length, first_look=FIRST_LOOK)


def verdict(rows: Sequence[Row], scale: Any) -> str:
    """How forgetting goes with size and tokens per parameter over the grid, by intervals over seeds.

    The paper's grid has two arms, without replay and with the KL on real rows; without them its cells are not here.
    """
    found = cells(rows, scale)
    if len({size for size, _ in found}) < 2 or len({length for _, length in found}) < 2 or len(found) < 4:
        return "Verdict: none yet; the study is not finished."
    seeds = min(len(cell.forgetting) for cell in found.values())
    if seeds < 2:
        return "Verdict: none yet; one seed has no interval."
    by_size, by_length = plane(found)
    falls, rises = by_size.agrees, by_length.agrees
    shares = {place: multipliers(rows, place, cell) for place, cell in found.items()}
    worst, best = (pick(shares, key=lambda place: float(np.mean(shares[place]))) for pick in (min, max))
    answer = "falls with size, rises with tokens per parameter" if (falls, rises) == (1, 1) else None
    answer = "the other way than in 07" if -1 in (falls, rises) else answer
    ends = " and ".join(
        f"{over_seeds(shares[place]).text('.2f')} with {named(found[place])} parameters at {place[1]:.0f} tokens per "
        "parameter"
        for place in (worst, best)
    )
    return (
        f"Verdict: {answer or 'cannot tell at this size'}; {NO_CELL}. For each tenfold of size the loss delta changes "
        f"by {by_size.estimate}, for each tenfold of tokens per parameter by {by_length.estimate} nats per token"
        f"{_and(by_length.later_seeds)}. By size: {rises_by_size(found)}. Of what the base knew "
        f"{lost_between(found, scale)}. The compute multiplier is least and greatest, {ends}. {len(found)} of "
        f"{len(scale.cells)} cells reach the target of {scale.world.target}; {seeds} seeds; 95% intervals by Student's "
        "t."
    )


def _and(text: str) -> str:
    return f" ({text})" if text else ""


def lost_between(found: dict[Place, Cell], scale: Any) -> str:
    """The share lost by the smallest size, at its shortest and at its longest pretraining."""
    size = scale.world.sizes[0].name
    mine = {length: cell for (one, length), cell in sorted(found.items()) if one == size}
    ends = [(length, float(np.mean(shares_lost(mine[length], scale)))) for length in (min(mine), max(mine))]
    shares = " and ".join(f"{share:.0%} at {length:.0f} tokens per parameter" for length, share in ends)
    return f"the smallest loses {shares}"


def report(rows: Sequence[Row], scale: Any) -> str:
    said = verdict(rows, scale)
    if not answer_of(said):
        return f"{table_of_cells(rows, scale)}\n\n**{said}**"
    found = cells(rows, scale)
    by_size, by_length = (claim.estimate for claim in plane(found))
    numbers = f"loss delta {by_size} nats for each tenfold of size, {by_length} of tokens"
    numbers += f"; of tokens by size: {rises_by_size(found)}"
    finding = "Size and tokens per parameter together: loss delta and compute multiplier"
    return f"{table_of_cells(rows, scale)}\n\n**{said}**\n\n" + findings({finding: (NO_CELL, numbers)})


def draw(rows: Sequence[Row], scale: Any, path: Path) -> None:
    """Two heat maps with numbers in the cells; a cell that was not run is empty."""
    found = cells(rows, scale)
    lost = {place: cell.mean for place, cell in found.items()}
    share = {place: float(np.mean(multipliers(rows, place, cell))) for place, cell in found.items()}
    names = {size: named(cell) for (size, _), cell in found.items()}
    with panels(path, 2, (9.6, 0.75 * len(scale.world.sizes) + 1.6)) as axes:
        heat(
            axes[0], lost, scale, names, "Loss delta, nats per token", "Oranges", "{:.3f}", max([*lost.values(), 0.01])
        )
        heat(axes[1], share, scale, names, "Compute multiplier", "Blues", "{:.2f}", 1.0)


def heat(
    axis: Any, values: dict[Place, float], scale: Any, names: dict[str, str], title: str, colours: str, form: str,
    top: float,
) -> None:  # fmt: skip
    """One map; `names` of the sizes."""
    sizes, lengths = [size.name for size in scale.world.sizes], list(scale.lengths)
    grid = np.full((len(sizes), len(lengths)), np.nan)
    for (size, length), value in values.items():
        grid[sizes.index(size), lengths.index(length)] = value
    axis.imshow(grid, cmap=colours, vmin=0, vmax=1.25 * top, aspect="auto")
    for (row, column), value in np.ndenumerate(grid):
        if np.isnan(value):
            words = "not reached" if (sizes[row], lengths[column]) in scale.cells else "not run"
            axis.text(column, row, words, ha="center", va="center", color=INK, fontsize=8)
        else:
            dark = value > 0.75 * top
            axis.text(column, row, form.format(value), ha="center", va="center", color="white" if dark else "black")
    axis.set_xticks(range(len(lengths)), [f"{length:.0f}" for length in lengths])
    axis.set_yticks(range(len(sizes)), [names.get(size, size) for size in sizes])
    axis.grid(False)
    axis.set_title(title)
    axis.set_xlabel("tokens per parameter")
    axis.set_ylabel("parameters")


def named(cell: Cell) -> str:
    """A size by its number of parameters."""
    return f"{next(iter(cell.rows.values()))['num_params']:,}"

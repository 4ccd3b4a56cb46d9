"""What the study of capacity says: tables, verdict and figure, from its rows alone."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from experiments.claim import FIRST_LOOK, Claim, over_seeds
from experiments.pages import answer_of, dress, findings, panels, table
from experiments.study_07_capacity.cells import Cell, Row, cell_of, last_slope, nearest_to_loss, slopes, tunes
from retain.report.style import INK, PALETTE

FORGETS = 0.02  # nats per token: less is the noise of held-out rows
SATURATED = 0.1  # nats for a tenfold of tokens: the paper's 5.8M model falls by .07 at 10,000 tokens per parameter
SIZE, LENGTH = "parameters", "tokens per parameter"


def cells_by_size(rows: Sequence[Row], scale: Any) -> dict[float, Cell]:
    """By number of parameters: each size from its base nearest to the same loss, best coefficient."""
    found = {}
    for size in (one.name for one in scale.world.sizes):
        mine = nearest_to_loss(rows, size, scale.same_loss)
        if mine and (cell := cell_of(mine, scale.world.target)) is not None:
            found[float(mine[0]["num_params"])] = cell
    return found


def cells_by_length(rows: Sequence[Row], scale: Any) -> dict[float, Cell]:
    """By tokens per parameter of the smallest size, best coefficient."""
    found = {}
    for length in scale.lengths:
        cell = cell_of(of_length(rows, scale, length), scale.world.target)
        if cell is not None:
            found[float(length)] = cell
    return found


def of_length(rows: Sequence[Row], scale: Any, length: float) -> list[Row]:
    """Finetunes of the smallest size from its base of this length."""
    mine = tunes(rows, size=scale.smallest)
    return [row for row in mine if abs(row["settings"]["tokens_per_param"] / length - 1) < 0.01]


def mean_of(cell: Cell, name: str) -> float:
    return float(np.mean([row[name] for row in cell.rows.values()]))


HEAD = (SIZE, LENGTH, "old loss before", "best coefficient", "steps", "forgetting", "seeds")


def cell_line(first: str, cell: Cell) -> list[object]:
    tokens = np.mean([row["settings"]["tokens_per_param"] for row in cell.rows.values()])
    steps = np.mean(list(cell.steps.values()))
    return [first, f"{tokens:.0f}", f"{mean_of(cell, 'base_loss'):.3f}", f"{cell.coef:.2g}", f"{steps:.0f}",
            cell.interval, len(cell.forgetting)]  # fmt: skip


def tables(rows: Sequence[Row], scale: Any) -> str:
    """Sizes at one loss, and lengths of the smallest: a line for each."""
    sizes = [cell_line(f"{size:.0f}", cell) for size, cell in cells_by_size(rows, scale).items()]
    lengths = [cell_line(scale.smallest, cell) for cell in cells_by_length(rows, scale).values()]
    return (
        f"Sizes, pretrained to {scale.same_loss} (nearest checkpoint):\n\n{table(HEAD, sizes)}\n\n"
        f"Lengths of pretraining of the smallest:\n\n{table(HEAD, lengths)}"
    )


# The frontier


def frontier(rows: Sequence[Row], seed: int) -> list[tuple[float, float]]:
    """Loss on the new language and on the old one of the mixtures of a seed, by the first."""
    mixed = [row for row in rows if row["settings"]["kind"] == "mixture" and row["settings"]["seed"] == seed]
    return sorted((row["new"], row["old"]) for row in mixed)


def above(rows: Sequence[Row], row: Row) -> float | None:
    """How far a finetuned model's old loss lies above the frontier's at its own new loss, at the end of its run.

    The frontier is linear between mixtures: where it is convex that is above the true one, and the distance too small.
    None beyond the mixtures.
    """
    points, (_, new, lost) = frontier(rows, row["settings"]["seed"]), row["trajectory"][-1]
    if not points or not points[0][0] <= new <= points[-1][0]:
        return None
    return row["base_loss"] + lost - float(np.interp(new, *zip(*points, strict=True)))


def whole(rows: Sequence[Row], scale: Any, length: float) -> dict[float, list[Row]]:
    """Runs of all their steps from the base of this length, by coefficient."""
    mine: dict[float, list[Row]] = {}
    for row in of_length(rows, scale, length):
        if row["trajectory"][-1][0] == scale.world.max_steps:
            mine.setdefault(row["settings"]["coef"], []).append(row)
    return dict(sorted(mine.items()))


def distances(rows: Sequence[Row], scale: Any, length: float) -> dict[float, list[float]]:
    """Distances above the frontier by coefficient, where every seed has one."""
    found = {}
    for coef, mine in whole(rows, scale, length).items():
        far = [one for row in mine if (one := above(rows, row)) is not None]
        if len(far) == len(mine):
            found[coef] = far
    return found


def frontier_table(rows: Sequence[Row], scale: Any) -> str:
    """Where finetunes of a saturated and an unsaturated base end, against the frontier."""
    lines = []
    for length in scale.frontier_lengths:
        far = distances(rows, scale, length)
        for coef, mine in whole(rows, scale, length).items():
            ends = [row["trajectory"][-1] for row in mine]
            new = np.mean([end[1] for end in ends])
            old = np.mean([row["base_loss"] + end[2] for row, end in zip(mine, ends, strict=True)])
            over = over_seeds(far[coef]) if coef in far else "beyond the mixtures"
            lost = over_seeds([end[2] for end in ends])
            lines.append([f"{length:.0f}", f"{coef:g}", f"{new:.3f}", f"{old:.3f}", lost, over, len(mine)])
    head = (LENGTH, "coefficient", "new loss", "old loss", "forgetting", "above the frontier", "seeds")
    above_them = "and how far their old loss lies above the frontier"
    return f"Finetuned models after {scale.world.max_steps} steps, {above_them}:\n\n{table(head, lines)}"


# The verdict


def verdict(rows: Sequence[Row], scale: Any) -> str:
    """Four questions, each answered by an interval over seeds, and what they say together.

    Runs end after a number of steps, so what they say is of these steps; of capacity only where the base is saturated.
    """
    sizes, lengths = cells_by_size(rows, scale), cells_by_length(rows, scale)
    longest = float(max(scale.lengths))
    if len(sizes) < 2 or len(lengths) < 2 or longest not in lengths:
        return "Verdict: none yet; the study is not finished."
    seeds = min(len(cell.forgetting) for cell in (*sizes.values(), *lengths.values()))
    if seeds < 2:
        return "Verdict: none yet; one seed has no interval."
    lost = lengths[longest].interval
    kept = "forgets" if lost.low > FORGETS else "does not forget" if lost.high < FORGETS else "may forget or not"
    by_size, by_length = shrinks(sizes), grows(lengths)
    falls, rises = by_size.agrees, by_length.agrees
    bound, sentence = bounded(rows, scale)
    right = [{"forgets": 1, "does not forget": -1}.get(kept, 0), falls, rises]
    answer = "not reproduced" if -1 in [*right, bound] else "cannot tell at this size" if 0 in right else within(scale)
    fall = last_slopes(rows, scale)
    if answer == within(scale) and max(fall, default=1.0) > SATURATED:
        answer += ", no test of capacity: the base is not saturated"
    saturation = f", by {min(fall):.2f} to {max(fall):.2f} for a tenfold of tokens at its end" if fall else ""
    return (
        f"Verdict: {answer}. With the best coefficient a model of {min(sizes):.0f} parameters at {longest:.0f} tokens "
        f"per parameter, whose loss still falls{saturation}, {kept}: {lost} nats. For each tenfold of size "
        f"forgetting changes by {by_size.estimate} ({words(falls, 'falls', 'rises')}), for each tenfold of tokens per "
        f"parameter by {by_length.estimate} ({words(rises, 'rises', 'falls')}{_and(by_length.later_seeds)}). "
        f"{sentence} {seeds} seeds; 95% intervals by Student's t."
    )


def found(rows: Sequence[Row], scale: Any) -> str:
    """The findings of the table, each with its verdict; empty while the study is not finished."""
    if not answer_of(verdict(rows, scale)):
        return ""
    sizes, lengths = cells_by_size(rows, scale), cells_by_length(rows, scale)
    by_size, by_length = shrinks(sizes), grows(lengths)
    with_tokens = f"{by_length.estimate} nats for each tenfold{_and(by_length.later_seeds)}"
    bound, sentence = bounded(rows, scale)
    return findings({
        "At the same base loss larger models forget less":
            (judged(by_size.agrees, scale), f"{by_size.estimate} nats for each tenfold of size"),
        "More tokens per parameter, more forgetting": (judged(by_length.agrees, scale), with_tokens),
        "The two-corpus frontier bounds the finetuned models": (judged(bound, scale), sentence.rstrip(".")),
    })  # fmt: skip


def shrinks(sizes: dict[float, Cell]) -> Claim:
    """Forgetting falls with size: its change for each tenfold."""
    return Claim(slopes(sizes), direction=-1, first_look=FIRST_LOOK)


def grows(lengths: dict[float, Cell]) -> Claim:
    """Forgetting rises with tokens per parameter: its change for each tenfold."""
    return Claim(slopes(lengths), first_look=FIRST_LOOK)


def within(scale: Any) -> str:
    return f"as in the paper within {scale.world.max_steps} steps"


def judged(sign: int, scale: Any) -> str:
    """The verdict on a finding of the paper: 1 has its direction, -1 the other one."""
    return {1: within(scale), 0: "cannot tell at this size", -1: "not reproduced"}[sign]


def _and(text: str) -> str:
    return f"; {text}" if text else ""


def last_slopes(rows: Sequence[Row], scale: Any) -> list[float]:
    """By how much the longest base of the smallest size still falls at its end, a value a seed."""
    longest = max(scale.lengths)
    return [
        last_slope(row["curve"], 1.01 * longest)
        for row in rows
        if row["settings"]["kind"] == "base" and row["settings"]["size"] == scale.smallest
    ]


def words(found: int, yes: str, no: str) -> str:
    return {1: f"it {yes}", 0: f"whether it {yes} is open", -1: f"it {no}"}[found]


def bounded(rows: Sequence[Row], scale: Any) -> tuple[int, str]:
    """Whether the frontier bounds the finetuned models from below: 1, 0 (open) or -1, and a sentence.

    A base that lies above every mixture before it is finetuned says nothing. One run below is enough to leave it open:
    a bound holds for every model, and mixtures of a few hundred tokens per parameter are no converged frontier.
    """
    silent = [length for length in scale.frontier_lengths if starts_above(rows, scale, length)]
    far = {
        (length, coef): values
        for length in scale.frontier_lengths
        for coef, values in distances(rows, scale, length).items()
        if len(values) > 1 and length not in silent
    }
    if not far:
        return 0, "Where the finetuned models lie to the frontier is not known."
    signs = {place: Claim(values, first_look=FIRST_LOOK).agrees for place, values in far.items()}
    every = [value for values in far.values() for value in values]
    found = -1 if -1 in signs.values() else 1 if set(signs.values()) == {1} and min(every) > 0 else 0
    means = [float(np.mean(values)) for values in far.values()]
    what = {1: "bounds", 0: "may bound", -1: "does not bound"}[found]
    over, under = (sum(one == which for one in signs.values()) for which in (1, -1))
    before = "lies above every mixture before it is finetuned, and is not counted."
    bare = f" The base of {silent[0]:.0f} tokens per parameter {before}" if silent else ""
    return found, (
        f"The two-language frontier {what} the finetuned models: they lie {min(means):+.3f} to {max(means):+.3f} nats "
        f"from it, {over} of {len(far)} settings surely above, {under} surely below; "
        f"{sum(one < 0 for one in every)} of {len(every)} runs lie below it, the lowest at {min(every):+.3f}.{bare}"
    )


def starts_above(rows: Sequence[Row], scale: Any, length: float) -> bool:
    """Whether every base of this length has a higher old loss than every mixture of its seed."""
    bases = {row["settings"]["seed"]: row["base_loss"] for row in of_length(rows, scale, length)}
    worst = {seed: max((old for _, old in frontier(rows, seed)), default=np.inf) for seed in bases}
    return bool(bases) and all(loss > worst[seed] for seed, loss in bases.items())


def report(rows: Sequence[Row], scale: Any) -> str:
    parts = [tables(rows, scale), frontier_table(rows, scale), f"**{verdict(rows, scale)}**", found(rows, scale)]
    return "\n\n".join(filter(None, parts))


# The figure


def draw(rows: Sequence[Row], scale: Any, path: Path) -> None:
    """Forgetting by size, by tokens per parameter, and the frontier with finetuned models against it."""
    with panels(path, 3, (12.4, 3.7)) as axes:
        draw_cells(axes[0], cells_by_size(rows, scale), PALETTE[0])
        dress(axes[0], f"By size, pretrained to {scale.same_loss}", SIZE, "forgetting, nats per token")
        draw_cells(axes[1], cells_by_length(rows, scale), PALETTE[1])
        dress(axes[1], "By tokens per parameter, smallest size", LENGTH, "")
        draw_frontier(axes[2], rows, scale)


def draw_cells(axis: Any, cells: dict[float, Cell], colour: str) -> None:
    """Means of seeds as a line, each seed a dot, the best coefficient beside it."""
    places = sorted(cells)
    axis.set_xscale("log")
    axis.plot(places, [cells[place].mean for place in places], color=colour, marker="o")
    for place in places:
        cell = cells[place]
        axis.plot([place] * len(cell.forgetting), list(cell.forgetting.values()), ".", color=colour, alpha=0.5)
        axis.annotate(f"{cell.coef:.2g}", (place, max(cell.forgetting.values())), (0, 5), textcoords="offset points",
                      ha="center", fontsize=8)  # fmt: skip
    axis.set_xticks(places, [f"{place:,.0f}" for place in places])
    axis.minorticks_off()
    axis.margins(x=0.12)
    axis.set_ylim(0, 1.2 * max((max(cell.forgetting.values()) for cell in cells.values()), default=1.0))


def draw_frontier(axis: Any, rows: Sequence[Row], scale: Any) -> None:
    """Mixtures as a line for each seed, ends of finetunes as dots, and the first seed's ways there as thin lines."""
    seeds = sorted({row["settings"]["seed"] for row in rows if row["settings"]["kind"] == "mixture"})
    for seed in seeds:
        new, old = zip(*frontier(rows, seed), strict=True)
        label = "pretrained on both (a line a seed)" if seed == seeds[0] else None
        axis.plot(new, old, color=INK, linewidth=1.2, marker="s", markersize=3, label=label)
    ends = [point for seed in seeds for point in frontier(rows, seed)]
    for length, colour in zip(scale.frontier_lengths, PALETTE[2:], strict=False):
        for row in (row for mine in whole(rows, scale, length).values() for row in mine):
            _, new, lost = zip(*row["trajectory"], strict=True)
            old = np.add(lost, row["base_loss"])
            ends.append((new[-1], old[-1]))
            axis.plot(new[-1], old[-1], ".", color=colour)
            if row["settings"]["seed"] == min(seeds, default=0):
                axis.plot(new, old, color=colour, linewidth=0.6, alpha=0.7)
        axis.plot([], [], ".-", color=colour, linewidth=0.6, label=f"finetuned from {length:.0f} tokens per parameter")
    if ends:
        new, old = zip(*ends, strict=True)
        axis.set_xlim(min(new) - 0.1, max(new) + 0.3)
        axis.set_ylim(min(old) - 0.1, max(old) + 0.35)
    axis.legend(fontsize=7.5, loc="upper right")
    dress(axis, "Two languages in one model", "loss on the new language", "loss on the old language")

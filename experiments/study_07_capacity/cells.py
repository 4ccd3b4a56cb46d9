"""Finetunes read at one new-task loss: the best coefficient of a cell, slopes, intervals over seeds. Plain dicts in."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from experiments.claim import Interval, over_seeds

Row = dict[str, Any]


@dataclass(frozen=True)
class Cell:
    """Forgetting (nats per token) by seed at the best coefficient, and one row of each seed, of its base."""

    coef: float
    forgetting: dict[int, float]
    steps: dict[int, float]
    rows: dict[int, Row]

    @property
    def mean(self) -> float:
        return float(np.mean(list(self.forgetting.values())))

    @property
    def interval(self) -> Interval:
        return over_seeds(list(self.forgetting.values()))


def reading(row: Row, target: float) -> tuple[float, float] | None:
    """Step and forgetting where the new-task loss first crosses the target, linear between evaluations; or None."""
    steps, losses, forgetting = zip(*row["trajectory"], strict=True)
    at = next((index for index, loss in enumerate(losses) if loss <= target), None)
    if not at:
        return None
    part = (losses[at - 1] - target) / (losses[at - 1] - losses[at])
    step, lost = (one[at - 1] + part * (one[at] - one[at - 1]) for one in (steps, forgetting))
    return step, lost


def tunes(rows: Sequence[Row], **wanted: Any) -> list[Row]:
    """Finetunes with these settings; a model that was not enlarged has `grown` None."""
    return [
        row
        for row in rows
        if row["settings"]["kind"] == "tune"
        and all(row["settings"].get(name) == value for name, value in ({"grown": None} | wanted).items())
    ]


def best_of(rows: Sequence[Row], target: float) -> tuple[float, float, float] | None:
    """Forgetting, coefficient and step of the best finetune of one base and seed that has the target as new-task loss.

    A run that reaches the target is read where it crosses. Between two neighbouring coefficients, of which at the end
    one is below and one above the target, the one that ends on it is interpolated, linear in the loss.
    """
    runs = sorted(rows, key=lambda row: row["settings"]["coef"])
    found = [(read[1], row["settings"]["coef"], read[0]) for row in runs if (read := reading(row, target)) is not None]
    for low, high in pairwise(runs):
        (step, under, lost), (last, over, kept) = low["trajectory"][-1], high["trajectory"][-1]
        if step == last and under <= target < over and low["settings"]["coef"] > 0:
            part = (target - under) / (over - under)
            coef = low["settings"]["coef"] ** (1 - part) * high["settings"]["coef"] ** part
            found.append((lost + part * (kept - lost), coef, step))
    return min(found, default=None)


def cell_of(rows: Sequence[Row], target: float, coefs: Sequence[float] | None = None) -> Cell | None:
    """The best of some finetunes of one base per seed; None where a seed does not reach the target.

    Args:
        coefs: only these; without it, all that replay (above 0).
    """
    by_seed: dict[int, list[Row]] = {}
    for row in rows:
        if (row["settings"]["coef"] in coefs) if coefs is not None else row["settings"]["coef"] > 0:
            by_seed.setdefault(row["settings"]["seed"], []).append(row)
    best = {seed: best_of(mine, target) for seed, mine in sorted(by_seed.items())}
    found = {seed: one for seed, one in best.items() if one is not None}
    if not found or len(found) < len({row["settings"]["seed"] for row in rows}):
        return None
    return Cell(
        coef=math.exp(float(np.mean([math.log(one[1]) for one in found.values()]))) if found[min(found)][1] else 0.0,
        forgetting={seed: one[0] for seed, one in found.items()},
        steps={seed: one[2] for seed, one in found.items()},
        rows={seed: by_seed[seed][0] for seed in found},
    )


def nearest_to_loss(rows: Sequence[Row], size: str, loss: float) -> list[Row]:
    """Finetunes of a size from the base, of each seed, whose held-out loss is nearest to this one."""
    found = []
    mine = tunes(rows, size=size)
    for seed in sorted({row["settings"]["seed"] for row in mine}):
        of_seed = [row for row in mine if row["settings"]["seed"] == seed]
        chosen = min(of_seed, key=lambda row: abs(row["base_loss"] - loss))["settings"]["tokens_per_param"]
        found += [row for row in of_seed if row["settings"]["tokens_per_param"] == chosen]
    return found


def slopes(cells: dict[float, Cell]) -> list[float]:
    """Change of forgetting for each tenfold of what the cells are keyed by: least squares, one value a seed."""
    common = set.intersection(*(set(cell.forgetting) for cell in cells.values()))
    places = [math.log10(place) for place in cells]
    return [
        float(np.polyfit(places, [cell.forgetting[seed] for cell in cells.values()], 1)[0]) for seed in sorted(common)
    ]


def last_slope(curve: Sequence[Sequence[float]], tokens: float) -> float:
    """By how many nats a pretraining curve (tokens, loss) falls for a tenfold of tokens, in its last quarter of one."""
    own = [point for point in curve if tokens / 10**0.26 <= point[0] <= tokens]
    at, loss = zip(*own, strict=True)
    return -float(np.polyfit(np.log10(at), loss, 1)[0])


def reached_at(curve: Sequence[Sequence[float]], loss: float) -> float | None:
    """Tokens at which a pretraining curve (tokens, loss) first came down to this loss, linear in log tokens.

    None where it never did; the first point's tokens where that is below already (the true place is earlier).
    """
    before: Sequence[float] | None = None
    for tokens, now in curve:
        if now <= loss:
            if before is None or before[1] == now:
                return tokens
            part = (before[1] - loss) / (before[1] - now)
            return math.exp(math.log(before[0]) + part * (math.log(tokens) - math.log(before[0])))
        before = (tokens, now)
    return None


def compute_multiplier(curve: Sequence[Sequence[float]], tokens: float, base_loss: float, forgetting: float) -> float:
    """The share of a base's own pretraining tokens at which its curve first reached the loss it is left with.

    1 = nothing lost (also where the old-data loss fell). Marek et al., size × tokens-per-parameter grid.
    """
    own = [point for point in curve if point[0] <= 1.05 * tokens]  # whole steps: a base is a little longer or shorter
    place = reached_at(own, base_loss + max(0.0, forgetting))
    return 1.0 if place is None else min(1.0, place / own[-1][0])

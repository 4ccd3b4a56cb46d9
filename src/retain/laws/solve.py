"""The input at which a law's output reaches a target: the longest run within a limit of forgetting."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from retain.laws.forms import Array
from retain.laws.law import ForgettingLaw

GRID = 2000  # points on a log scale between which a crossing is interpolated


@dataclass(frozen=True)
class Solution:
    """The value of the input at which the target is reached, with the interval of the curve."""

    value: float
    ci: tuple[float, float]
    extrapolates: list[str]


def solve(
    law: ForgettingLaw, name: str, known: Mapping[str, float], *, level: float, dataset: str | None, sure: bool
) -> Solution:
    """See `ForgettingLaw.solve`."""
    output, others = _question(law, name, known)
    target, column = float(known[output]), law.runs.columns[name]
    grid = np.geomspace(max(column.min(), 1e-9) / 10, column.max() * 10, GRID)
    points, _ = law.points({name: grid, **others})
    codes, at = np.full(GRID, law.code(dataset)), law.form.outputs.index(output)
    value, curves = (law.problem.in_nats(found[:, at]) for found in law.curves(points, codes, level))
    value = value[0]
    if sure:
        value = _upper_end(law, output, points, level=level, dataset=dataset)
    found = float(crossing(grid, value[None], target)[0])
    if not 0 < found < math.inf:
        ends = f"{value[0]:.4g} to {value[-1]:.4g} for {name} from {grid[0]:.4g} to {grid[-1]:.4g}"
        raise ValueError(f"{output}: {target:g} is not reached; it goes from {ends}")
    low, high = math.nan, math.nan
    if len(curves):
        ends_of = [(1 - level) / 2, (1 + level) / 2]
        low, high = map(float, np.quantile(crossing(grid, curves, target), ends_of, method="nearest"))
    return Solution(found, (low, high), law.extrapolates({name: found, **others}))


def _question(law: ForgettingLaw, name: str, known: Mapping[str, float]) -> tuple[str, dict[str, float]]:
    """The output whose target is given, and the other inputs."""
    outputs = set(known) & set(law.form.outputs)
    if len(outputs) != 1 or name not in law.form.inputs or name in known:
        raise ValueError(
            f"solve: give one of {', '.join(law.form.outputs)} and, of {', '.join(law.form.inputs)}, all but the one "
            "to solve for"
        )
    output = outputs.pop()
    return output, {key: value for key, value in known.items() if key != output}


def _upper_end(law: ForgettingLaw, output: str, points: dict[str, Any], **options: Any) -> Array:
    """The upper end of a new measurement's interval: outputs are losses, and a target is the most that is allowed."""
    if not len(law.draws):
        raise ValueError("sure: this law has no intervals; fit it to at least 3 runs, with num_resamples")
    return np.asarray(law.predict(**points, **options).ci[output][1])


def crossing(grid: Array, curves: Array, target: float) -> Array:
    """Where each curve (curves, grid) first crosses the target, linear in log; 0 or inf where it is never below it."""
    above = curves >= target
    rises = curves[:, -1] >= curves[:, 0]
    passed = np.where(rises[:, None], above, ~above)
    place = passed.argmax(axis=1)
    found = np.where(passed[:, 0], 0.0, np.inf)
    for index in np.flatnonzero((place > 0) & ~passed[:, 0]):
        ends = curves[index, place[index] - 1 : place[index] + 1]
        share = (target - ends[0]) / (ends[1] - ends[0])
        logs = np.log(grid[place[index] - 1 : place[index] + 1])
        found[index] = np.exp(logs[0] + share * (logs[1] - logs[0]))
    return found

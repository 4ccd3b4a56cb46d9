"""The input at which a law's output reaches a target: the longest run within a limit of forgetting."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from retain.laws.fitted import FittedLaw
from retain.laws.forms import Array

GRID = 2000  # points on a log scale between which a crossing is interpolated


@dataclass(frozen=True)
class Solution:
    """The value of the input at which the target is reached, with the interval of the curve."""

    value: float
    ci: tuple[float, float]
    extrapolates: list[str]


def solve_input(
    law: FittedLaw, name: str, known: Mapping[str, float], *, level: float, dataset: str | None, sure: bool
) -> Solution:
    """See `ForgettingLaw.solve`."""
    targets = {key: value for key, value in known.items() if key in law.form.outputs}
    others = {key: value for key, value in known.items() if key not in targets}
    if len(targets) != 1 or name not in law.form.inputs or name in known:
        outputs, inputs = ", ".join(law.form.outputs), ", ".join(law.form.inputs)
        raise ValueError(f"solve: give one of {outputs} and, of {inputs}, all but the one to solve for")
    [(output, target)] = targets.items()
    column, at = law.runs.columns[name], law.form.outputs.index(output)
    grid = np.geomspace(max(column.min(), 1e-9) / 10, column.max() * 10, GRID)
    points, _ = law.points({name: grid, **others})
    fitted = law.curves(points, np.full(GRID, law.dataset_code(dataset)), level)
    value, curves = (law.problem.in_nats(of[:, at]) for of in fitted)
    if sure:  # outputs are losses, and a target is the most that is allowed: the upper end of a new measurement
        if not len(law.draws):
            raise ValueError("sure: this law has no intervals; fit it to at least 3 runs, with num_resamples")
        value = np.asarray(law.predict(level=level, dataset=dataset, **points).ci[output][1])[None]  # type: ignore[arg-type]
    found = float(first_crossings(grid, value, target)[0])
    if not 0 < found < math.inf:
        ends = f"{value[0, 0]:.4g} to {value[0, -1]:.4g} for {name} from {grid[0]:.4g} to {grid[-1]:.4g}"
        raise ValueError(f"{output}: {target:g} is not reached; the law has {ends}")
    low, high = math.nan, math.nan
    if len(curves):
        quantiles = [(1 - level) / 2, (1 + level) / 2]
        low, high = map(float, np.quantile(first_crossings(grid, curves, target), quantiles, method="nearest"))
    return Solution(found, (low, high), law.extrapolates({name: found, **others}))


def first_crossings(grid: Array, curves: Array, target: float) -> Array:
    """Where each curve (curves, grid) first crosses the target, linear in log: 0 where it begins beyond it, else inf.

    >>> first_crossings(np.array([1.0, 10.0]), np.array([[0.0, 2.0], [2.0, 3.0], [0.0, 0.5]]), 1.0).round(2).tolist()
    [3.16, 0.0, inf]
    """
    rises = curves[:, -1] >= curves[:, 0]
    passed = (curves >= target) == rises[:, None]
    found = np.where(passed[:, 0], 0.0, np.inf)
    inside = np.flatnonzero(passed.any(axis=1) & ~passed[:, 0])
    after = passed[inside].argmax(axis=1)
    low, high, logs = curves[inside, after - 1], curves[inside, after], np.log(grid)
    found[inside] = np.exp(logs[after - 1] + (target - low) / (high - low) * (logs[after] - logs[after - 1]))
    return found

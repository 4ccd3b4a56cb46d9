"""What a fitted law cannot say: held-out error, designs that identify too little."""

from __future__ import annotations

import numpy as np

from retain.laws.fit_problem import Problem
from retain.laws.law import MAX_INTERVAL_RATIO, ForgettingLaw
from retain.laws.variable_projection import Fits

MIN_RUNS = 3  # for intervals
ENOUGH_RUNS = 6  # for good ones
MAX_CONDITION = 1e6


class LawWarning(UserWarning):
    """What the runs cannot say about a law."""


def held_out_groups(problem: Problem) -> dict[str, np.ndarray]:
    """Rows to hold out, by the question that they answer: unseen runs, the largest size, the longest training."""
    runs, codes = problem.runs, problem.runs.run_codes
    groups = {f"run {name}": codes == index for index, name in enumerate(runs.names)}
    sizes = runs.columns.get("num_params") if "num_params" in problem.form.inputs else None
    if sizes is not None and len(np.unique(sizes)) > 2:
        groups["largest num_params"] = sizes == sizes.max()
    steps = runs.columns.get("num_steps")
    if steps is not None and len(np.unique(steps)) > 3:
        longest = np.array([steps[codes == index].max() for index in range(len(runs.names))])
        if longest.max() > longest.min():
            groups["longest runs"] = (longest == longest.max())[codes]
        else:
            groups["last third of the steps"] = steps > np.quantile(np.unique(steps), 2 / 3)
    return {name: rows for name, rows in groups.items() if (~rows).sum() * problem.num_outputs > problem.num_free}


def held_out(problem: Problem, best: Fits) -> dict[str, dict[str, float]]:
    """Root mean squared error on rows that a refit did not see: group → output → nats."""
    groups = held_out_groups(problem)
    if len(problem.runs.names) < 2 or not groups:
        return {}
    left_out = np.array(list(groups.values()))
    weight = np.tile(~left_out, (1, problem.num_outputs)).astype(float)
    start = np.repeat(best.exponents, len(groups), axis=0)
    fits, _ = problem.fit(start, weight=weight, tolerance=1e-7)
    error = problem.predict(fits) - problem.in_nats(problem.observed.reshape(problem.num_outputs, -1))
    return {
        name: {
            output: float(np.sqrt(np.mean(error[index, at, rows] ** 2)))
            for at, output in enumerate(problem.form.outputs)
        }
        for index, (name, rows) in enumerate(groups.items())
    }


def design_warnings(problem: Problem) -> list[str]:
    """What no data of this design could tell."""
    runs, found = problem.runs, []
    for name in problem.form.inputs:
        values = np.unique(runs.columns[name])
        if len(values) == 1:
            found.append(f"{name}: {values[0]:g} in every row; how losses change with it is not identified")
        elif len(values) == 2:
            found.append(f"{name}: two values only; the shape of the law between and beyond them is assumed, not seen")
    count = len(runs.names)
    if count < MIN_RUNS:
        found.append(f"run: {count} of them; intervals need at least {MIN_RUNS} runs, so there are none")
    elif count < ENOUGH_RUNS:
        found.append(f"run: {count} of them; intervals from fewer than {ENOUGH_RUNS} runs are rough")
    return found


def fit_warnings(law: ForgettingLaw) -> list[str]:
    """What these data left open."""
    problem, found = law.problem, []
    room = 1e-6 * (problem.high - problem.low)
    at_bound = (law.estimate.exponents[0] <= problem.low + room) | (law.estimate.exponents[0] >= problem.high - room)
    names = dict.fromkeys(name for name, stuck in zip(problem.slots, at_bound, strict=True) if stuck)
    if names:
        found.append(f"exponents: {', '.join(names)} at a bound; the data do not show the shape that the form has")
    if unidentified := law.unidentified():
        open_ones = ", ".join(unidentified)
        found.append(
            f"parameters: {open_ones} not identified (intervals span a factor above {MAX_INTERVAL_RATIO:g}); "
            "predictions within the data may still be good"
        )
    if law.condition > MAX_CONDITION:
        found.append(f"condition: {law.condition:.1g}; changes of some parameters cancel, read predictions instead")
    return found

"""A fitted law as text, in the manner of a statistics package."""

from __future__ import annotations

import math
from collections.abc import Sequence
from textwrap import wrap

import numpy as np

from retain.laws.law import LEVEL, ForgettingLaw
from retain.laws.runs import Runs

WIDTH = 78


def summary(law: ForgettingLaw) -> str:
    """What was fitted to what, how well, the parameters with intervals, and what not to believe."""
    runs, settings = law.runs, law.settings
    resampling = f"{len(law.draws)} resamples over runs, seed {settings['seed']}" if len(law.draws) else "none"
    head = [
        ("Form", law.form.name),
        ("Runs, points", f"{len(runs.names)}, {len(runs)}" + _sets(runs)),
        *((name, _span(runs.columns[name])) for name in law.form.inputs),
        *((f"R² {name}", f"{value:.4f}") for name, value in law.r_squared.items()),
        ("Condition number", f"{law.condition:.3g}"),
        ("Intervals", resampling),
    ]
    lines = ["Law of forgetting".center(WIDTH), "=" * WIDTH, *law.form.equation.split(";  ")]
    lines += ["-" * WIDTH, *(f"{name:<24}{value}" for name, value in head)]
    lines += ["-" * WIDTH, *_table(law), "-" * WIDTH, *_held_out(law)]
    lines += [line for text in law.warnings for line in wrap(f"! {text}", WIDTH, subsequent_indent="  ")]
    return "\n".join([*lines, "=" * WIDTH])


def _sets(runs: Runs) -> str:
    return f" ({len(runs.datasets)} data sets)" if len(runs.datasets) > 1 else ""


def _span(column: np.ndarray) -> str:
    return f"{column.min():.6g} to {column.max():.6g}, {len(np.unique(column))} values"


def _table(law: ForgettingLaw) -> Sequence[str]:
    intervals, stderr, loose = law.conf_int(), law.stderr, law.loose()
    percent = f"{LEVEL:.0%} interval"
    rows = [f"{'':<20}{'estimate':>12}{'std err':>12}{percent:>25}"]
    for name, value in law.params.items():
        low, high = intervals[name]
        mark = "  ~" if name in loose else ""
        error = math.nan if mark else stderr[name]
        interval = f"[{_cell(low, 9)}, {_cell(high, 9)}]"
        rows.append(f"{name:<20}{value:>12.4g}{_cell(error)}   {interval}{mark}")
    return [*rows, "~ not identified by these runs"] if loose else rows


def _cell(value: float, width: int = 12) -> str:
    return f"{value:>{width}.4g}" if math.isfinite(value) else f"{'-':>{width}}"


def _held_out(law: ForgettingLaw) -> Sequence[str]:
    """Root mean squared errors: in the fit, on runs that a refit did not see, and beyond the data."""
    fitted = law.problem.predict(law.estimate)[0]
    observed = [law.runs.columns[name] for name in law.form.outputs]
    inside = [np.sqrt(np.mean((fit - column) ** 2)) for fit, column in zip(fitted, observed, strict=True)]
    rows = [f"{'RMS error, nats':<26}" + "".join(f"{name:>20}" for name in law.form.outputs)]
    rows.append(f"{'in the fit':<26}" + "".join(f"{value:>20.5f}" for value in inside))
    each = [errors for group, errors in law.held_out.items() if group.startswith("run ")]
    if each:
        means = [np.sqrt(np.mean([errors[name] ** 2 for errors in each])) for name in law.form.outputs]
        rows.append(f"{'each run held out':<26}" + "".join(f"{value:>20.5f}" for value in means))
    for group, errors in law.held_out.items():
        if not group.startswith("run "):
            rows.append(f"{group + ' out':<26}" + "".join(f"{value:>20.5f}" for value in errors.values()))
    return rows

"""A fitted law as text, in the manner of a statistics package."""

from __future__ import annotations

import math
from collections.abc import Sequence
from textwrap import wrap

import numpy as np
from numpy.typing import ArrayLike

from retain.laws.fitted import LEVEL, FittedLaw

WIDTH = 78


def law_table(law: FittedLaw) -> str:
    """What was fitted to what, how well, the parameters with intervals, and what not to believe."""
    runs, sets = law.runs, len(law.runs.datasets)
    resampling = f"{len(law.draws)} resamples over runs, seed {law.settings['seed']}" if len(law.draws) else "none"
    head = [
        ("Form", law.form.name),
        ("Runs, points", f"{len(runs.names)}, {len(runs)}" + (f" ({sets} data sets)" if sets > 1 else "")),
        *((f"{symbol}: {name}", _span(runs.columns[name])) for symbol, name in law.form.legend.items()),
        *((f"R² {name}", f"{value:.4f}") for name, value in law.r_squared.items()),
        ("Condition number", f"{law.condition:.3g}"),
        ("Intervals", resampling),
    ]
    lines = ["Law of forgetting".center(WIDTH), "=" * WIDTH, *law.form.equation.split(";  ")]
    lines += ["-" * WIDTH, *(f"{name:<24}{value}" for name, value in head)]
    lines += ["-" * WIDTH, *_parameters(law), "-" * WIDTH, *_errors(law)]
    lines += [line for text in law.warnings for line in wrap(f"! {text}", WIDTH, subsequent_indent="  ")]
    return "\n".join([*lines, "=" * WIDTH])


def _span(column: np.ndarray) -> str:
    return f"{column.min():.6g} to {column.max():.6g}, {len(np.unique(column))} values"


def _parameters(law: FittedLaw) -> Sequence[str]:
    stderr, unidentified = law.stderr, law.unidentified()
    rows = [f"{'':<20}{'estimate':>12}{'std err':>12}{f'{LEVEL:.0%} interval':>25}"]
    for name, (low, high) in law.conf_int().items():
        mark = "  ~" if name in unidentified else ""
        error = _cell(math.nan if mark else stderr[name], 12)
        rows.append(f"{name:<20}{law.params[name]:>12.4g}{error}   [{_cell(low, 9)}, {_cell(high, 9)}]{mark}")
    return [*rows, "~ not identified by these runs"] if unidentified else rows


def _cell(value: float, width: int) -> str:
    return f"{value:>{width}.4g}" if math.isfinite(value) else f"{'-':>{width}}"


def _errors(law: FittedLaw) -> Sequence[str]:
    """Root mean squared errors: in the fit, on runs that a refit did not see, and beyond the data."""
    outputs = law.form.outputs
    columns = [law.runs.columns[name] for name in outputs]
    residuals = zip(law.problem.predict(law.estimate)[0], columns, strict=True)
    rows = {"in the fit": [_rms(fit - column) for fit, column in residuals]}
    runs = [errors for group, errors in law.held_out.items() if group.startswith("run ")]
    if runs:
        rows["each run held out"] = [_rms([errors[name] for errors in runs]) for name in outputs]
    for group, errors in law.held_out.items():
        if not group.startswith("run "):
            rows[f"{group} out"] = [errors[name] for name in outputs]
    head = f"{'RMS error, nats':<26}" + "".join(f"{name:>20}" for name in outputs)
    return [head, *(f"{name:<26}" + "".join(f"{value:>20.5f}" for value in of) for name, of in rows.items())]


def _rms(errors: ArrayLike) -> float:
    return float(np.sqrt(np.mean(np.square(errors))))

"""A fitted law as a text table."""

from __future__ import annotations

import math
from collections.abc import Sequence
from textwrap import wrap
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from retain.laws.law import ForgettingLaw

WIDTH = 78


def law_table(law: ForgettingLaw) -> str:
    """The form, the runs, the quality of the fit, parameters with intervals, errors and warnings."""
    runs, sets = law.runs, len(law.runs.datasets)
    resampling = f"{len(law.draws)} resamples over runs, seed {law.settings['seed']}" if len(law.draws) else "none"
    head = [
        ("Form", law.form.name),
        ("Runs, points", f"{len(runs.names)}, {len(runs)}" + (f" ({sets} data sets)" if sets > 1 else "")),
        *((f"{symbol}: {name}", _span(runs.columns[name])) for symbol, name in law.form.legend.items()),
        *((f"R² {name}", f"{value:.4f}") for name, value in law.r_squared.items()),
        ("Intervals", resampling),
    ]
    lines = ["Law of forgetting".center(WIDTH), "=" * WIDTH, *law.form.equation.split(";  ")]
    lines += ["-" * WIDTH, *(f"{name:<24}{value}" for name, value in head)]
    lines += ["-" * WIDTH, *_parameters(law), "-" * WIDTH, *_errors(law)]
    lines += [line for text in law.warnings for line in wrap(f"! {text}", WIDTH, subsequent_indent="  ")]
    return "\n".join([*lines, "=" * WIDTH])


def _span(column: np.ndarray) -> str:
    return f"{column.min():.6g} to {column.max():.6g}, {len(np.unique(column))} values"


def _parameters(law: ForgettingLaw) -> Sequence[str]:
    stderr, unidentified = law.stderr, law.unidentified()
    rows = [f"{'':<20}{'estimate':>12}{'std err':>12}{'95% interval':>25}"]
    for name, (low, high) in law.conf_int().items():
        mark = "  ~" if name in unidentified else ""
        error = _cell(math.nan if mark else stderr[name], 12)
        rows.append(f"{name:<20}{law.params[name]:>12.4g}{error}   [{_cell(low, 9)}, {_cell(high, 9)}]{mark}")
    return [*rows, "~ not identified by these runs"] if unidentified else rows


def _cell(value: float, width: int) -> str:
    return f"{value:>{width}.4g}" if math.isfinite(value) else f"{'-':>{width}}"


def _errors(law: ForgettingLaw) -> Sequence[str]:
    """Lines of root mean squared errors: in the fit, on each run held out, and beyond the data."""
    outputs = law.form.outputs
    columns = [law.runs.columns[name] for name in outputs]
    residuals = law.problem.predict(law.estimate)[0] - np.stack(columns)
    rows = {"in the fit": np.sqrt(np.mean(residuals**2, axis=1)).tolist()}
    if law.held_out_runs:
        rows["each run held out"] = [law.run_error(name) for name in outputs]
    for group in [name for name in law.held_out if name not in law.held_out_runs]:
        rows[f"{group} out"] = [law.held_out[group][name] for name in outputs]
    head = f"{'RMS error, nats':<26}" + "".join(f"{name:>20}" for name in outputs)
    return [head, *(f"{name:<26}" + "".join(f"{value:>20.5f}" for value in errors) for name, errors in rows.items())]

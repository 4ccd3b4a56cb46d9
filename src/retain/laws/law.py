"""The law that `fit_forgetting_law` returns: a `FittedLaw` with its text, its figure and its file."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from textwrap import wrap
from typing import TYPE_CHECKING, Any

import numpy as np

from retain.files import MAPPING, NUMBER, check_shape, read_json, write_json
from retain.laws import plots
from retain.laws.fitted import LEVEL, FittedLaw, finite_or_none
from retain.laws.forms import Array, Form, form_of
from retain.laws.runs import as_runs
from retain.laws.variable_projection import Fits

if TYPE_CHECKING:
    from matplotlib.figure import Figure

WIDTH = 78  # of the summary
LAW_SCHEMA = "retain.law/2"
FITS = {"exponents": list, "coefficients": list}
SHAPE = {
    "form": str, "bounds": {str: [NUMBER, NUMBER]}, "runs": {str: list}, "estimate": FITS, "draws": FITS,
    "spread": list, "held_out": {str: {str: NUMBER}}, "condition": NUMBER, "warnings": [str], "settings": MAPPING,
}  # fmt: skip


class ForgettingLaw(FittedLaw):
    """What `fit_forgetting_law` returns: parameters with intervals, predictions, text, figure and file."""

    def summary(self) -> str:
        """The fit as a table for people."""
        return law_table(self)

    def plot(self) -> Figure:
        """Measurements with the fitted curves and residuals; `retain.laws.plots` has more."""
        return plots.overview(self)

    def to_json(self, path: str | Path) -> None:
        """Write the law to a file, whole or not at all; `from_json` gives back the same numbers.

        `params`, `ci` and `r_squared` are for readers; the rest is read back.
        """
        fits = {"estimate": self.estimate, "draws": self.draws}
        content = {
            "schema": LAW_SCHEMA,
            "form": self.form.name,
            "equation": self.form.equation,
            "params": {name: finite_or_none(value) for name, value in self.params.items()},
            "ci": {name: finite_or_none(interval) for name, interval in self.conf_int().items()},
            "r_squared": self.r_squared,
            "held_out": self.held_out,
            "condition": self.condition,
            "warnings": self.warnings,
            "settings": self.settings,
            "bounds": self.form.exponents,
            "runs": {
                "run": self.runs.run,
                "dataset": self.runs.dataset,
                **{name: column.tolist() for name, column in self.runs.columns.items()},
            },
            **{name: {key: array.tolist() for key, array in vars(of).items()} for name, of in fits.items()},
            "spread": self.spread.tolist(),
        }
        write_json(Path(path), content)

    @classmethod
    def from_json(cls, path: str | Path, form: Form | None = None) -> ForgettingLaw:
        """Read a law from a file; `form` where it is one of the user's own.

        Raises:
            ValueError: if the file is not one that `to_json` wrote.
        """
        data = read_json(Path(path), "law", "give a file that `retain fit` wrote")
        if not isinstance(data, dict) or data.get("schema") != LAW_SCHEMA:
            raise ValueError(f"law: {str(path)!r} is not a {LAW_SCHEMA} file; give one that `retain fit` wrote")
        check_shape(data, SHAPE, f"law: {str(path)!r} is damaged", "fit it again")
        found = form_of(form or data["form"], {name: tuple(pair) for name, pair in data["bounds"].items()})
        try:
            return _checked(_from_dict(data, found))
        except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
            raise ValueError(f"law: {str(path)!r} is damaged ({error}); fit it again") from error


def _from_dict(data: Mapping[str, Any], found: Form) -> ForgettingLaw:
    estimate = _read_fits(data["estimate"])
    return ForgettingLaw(
        form=found,
        runs=as_runs(data["runs"], found.columns),
        estimate=estimate,
        draws=_read_fits(data["draws"]) if data["draws"]["coefficients"] else estimate[:0],
        spread=_read_array(data, "spread"),
        held_out=data["held_out"],
        condition=float(data["condition"]),
        warnings=data["warnings"],
        settings=data["settings"],
    )


def _read_fits(data: Mapping[str, Any]) -> Fits:
    return Fits(**{name: _read_array(data, name) for name in FITS})


def _read_array(data: Mapping[str, Any], name: str) -> Array:
    try:
        array = np.asarray(data[name], dtype=np.float64)
    except ValueError:  # ragged, or text
        array = np.array(np.nan)
    if not np.isfinite(array).all():
        raise ValueError(f"{name!r} holds what is no number")
    return array


def _checked(law: ForgettingLaw) -> ForgettingLaw:
    problem = law.problem
    width = (len(problem.slots), problem.num_coefficients)
    shapes = [[array.shape for array in vars(fits).values()] for fits in (law.estimate, law.draws)]
    expected = [[(count, numbers) for numbers in width] for count in (1, len(law.draws))]
    if shapes != expected or law.spread.shape != (problem.num_outputs, problem.num_points):
        raise ValueError("'estimate', 'draws' or 'spread' does not fit the runs")
    return law


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
    residuals = law.problem.predict(law.estimate)[0] - np.stack(columns)
    rows = {"in the fit": np.sqrt(np.mean(residuals**2, axis=1)).tolist()}
    if law.held_out_runs:
        rows["each run held out"] = [law.run_error(name) for name in outputs]
    for group in [group for group in law.held_out if group not in law.held_out_runs]:
        rows[f"{group} out"] = [law.held_out[group][name] for name in outputs]
    head = f"{'RMS error, nats':<26}" + "".join(f"{name:>20}" for name in outputs)
    return [head, *(f"{name:<26}" + "".join(f"{value:>20.5f}" for value in of) for name, of in rows.items())]

"""The law that `fit_forgetting_law` returns: a `FittedLaw` with its text, its figure and its file."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from retain.files import MAPPING, NUMBER, check_shape, read_json, write_json
from retain.laws import plots
from retain.laws.fitted import LEVEL, FittedLaw, finite_or_none
from retain.laws.forms import Array, Form, form_of
from retain.laws.runs import as_runs
from retain.laws.solve import Solution, solve_input
from retain.laws.text import law_table
from retain.laws.variable_projection import Fits

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SCHEMA = "retain.law/2"
REMEDY = "fit it again"
FITS = {"exponents": list, "coefficients": list}
SHAPE = {
    "form": str, "bounds": {str: [NUMBER, NUMBER]}, "runs": {str: list}, "estimate": FITS, "draws": FITS,
    "spread": list, "held_out": {str: {str: NUMBER}}, "condition": NUMBER, "warnings": [str], "settings": MAPPING,
}  # fmt: skip


class ForgettingLaw(FittedLaw):
    """What `fit_forgetting_law` returns: parameters with intervals, predictions, text, figure and file."""

    def solve(
        self, name: str, *, level: float = LEVEL, dataset: str | None = None, sure: bool = False, **known: float
    ) -> Solution:
        """The value of the input `name` at which an output first reaches its target.

        `law.solve("num_steps", forgetting_loss=0.02, num_params=5e6)` are the most steps whose forgetting stays within
        0.02. Searched from a tenth of the runs' smallest value to ten times their largest.

        Args:
            known: the output's target, and every other input.
            sure: hold the upper end of a new measurement's interval to the target rather than the curve, so that the
                output is within it whether it rises or falls with the input.

        Raises:
            ValueError: where the target is not reached, or the question is not one.
        """
        return solve_input(self, name, known, level=level, dataset=dataset, sure=sure)

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
            "schema": SCHEMA,
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
        if not isinstance(data, dict) or data.get("schema") != SCHEMA:
            raise ValueError(f"law: {str(path)!r} is not a {SCHEMA} file; give one that `retain fit` wrote")
        check_shape(data, SHAPE, f"law: {str(path)!r} is damaged", REMEDY)
        found = form_of(form or data["form"], {name: tuple(pair) for name, pair in data["bounds"].items()})
        try:
            return _checked(_from_dict(data, found))
        except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
            raise ValueError(f"law: {str(path)!r} is damaged ({error}); {REMEDY}") from error


def _from_dict(data: Mapping[str, Any], found: Form) -> ForgettingLaw:
    estimate = _fits(data["estimate"])
    return ForgettingLaw(
        form=found,
        runs=as_runs(data["runs"], found.columns),
        estimate=estimate,
        draws=_fits(data["draws"]) if data["draws"]["coefficients"] else estimate[:0],
        spread=_numbers(data, "spread"),
        held_out=data["held_out"],
        condition=float(data["condition"]),
        warnings=data["warnings"],
        settings=data["settings"],
    )


def _fits(data: Mapping[str, Any]) -> Fits:
    return Fits(**{name: _numbers(data, name) for name in FITS})


def _numbers(data: Mapping[str, Any], name: str) -> Array:
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

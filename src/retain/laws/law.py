"""A form fitted to runs: parameters with intervals, predictions with theirs, text, figure and file."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike
from scipy.special import ndtri, stdtrit

from retain.files import MAPPING, NUMBER, check_shape, read_json, write_json
from retain.laws.fit_problem import Problem
from retain.laws.forms import LOSSES, Array, Form, column_of, form_of
from retain.laws.law_table import law_table
from retain.laws.run_tables import Runs, as_runs
from retain.laws.variable_projection import Fits

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LEVEL = 0.95
MAX_INTERVAL_RATIO = 10.0  # of the ends of an interval that still identifies its parameter
Scalar = Any  # a float where inputs are numbers, an array of their shape where they are arrays
NUM_GRID_POINTS = 2000  # on a log scale, between which a crossing is interpolated
LAW_SCHEMA = "retain.law/2"
FITS = {"exponents": list, "coefficients": list}
AS_WRITTEN = ("held_out", "condition", "warnings", "settings")  # read back from JSON as they stand
SHAPE = {
    "form": str, "bounds": {str: [NUMBER, NUMBER]}, "runs": {str: list}, "estimate": FITS, "draws": FITS,
    "spread": list, "held_out": {str: {str: NUMBER}}, "condition": NUMBER, "warnings": [str], "settings": MAPPING,
}  # fmt: skip


@dataclass(frozen=True)
class Prediction:
    """Each output's value, the interval of a new measurement (`ci`), and that of the curve alone (`curve_ci`)."""

    value: dict[str, Scalar]
    ci: dict[str, tuple[Scalar, Scalar]]
    curve_ci: dict[str, tuple[Scalar, Scalar]]
    level: float
    extrapolates: list[str]  # a sentence for each input that lies beyond the data
    cut: list[str]  # a sentence for each output whose curve or interval reached below 0

    def to_dict(self) -> dict[str, Any]:
        """For JSON: output → value, ci and curve_ci (null where there is none), and whether it extrapolates."""
        parts: dict[str, dict[str, Any]] = {"value": self.value, "ci": self.ci, "curve_ci": self.curve_ci}
        found: dict[str, Any] = {
            name: {part: finite_or_none(of[name]) for part, of in parts.items()} for name in self.value
        }
        notes = self.extrapolates + self.cut
        return found | {"level": self.level, "extrapolates": bool(self.extrapolates), "notes": notes}


@dataclass(frozen=True)
class Solution:
    """The value of the input at which the target is reached, with the interval of the curve."""

    value: float
    ci: tuple[float, float]
    extrapolates: list[str]


@dataclass
class ForgettingLaw:
    """What `fit_forgetting_law` returns: parameters with intervals, predictions, text, figure and file.

    Args:
        estimate: the fit; draws: its bootstrap refits over runs.
        spread: residuals of each output, enlarged to their true size, nats (or in logs), shape (outputs, points).
        held_out: root mean squared error on rows that a refit did not see: group → output → nats.
        condition: condition number of the derivatives by exponents and coefficients.
        warnings: what the runs cannot say.
    """

    form: Form
    runs: Runs
    estimate: Fits
    draws: Fits
    spread: Array
    held_out: dict[str, dict[str, float]]
    condition: float
    warnings: list[str]
    settings: dict[str, Any]
    problem: Problem = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self.problem = Problem(self.form, self.runs)

    def _named(self, fits: Fits) -> dict[str, Array]:
        """Published parameters of each fit, shape (fits,); per data set where they differ."""
        names = self.runs.datasets
        reported = self.form.report(self.problem.values(fits, np.arange(len(names))), self.problem.centres)
        return {
            f"{name}[{names[at]}]" if np.shape(value)[1] > 1 else name: value[:, at]
            for name, value in reported.items()
            for at in range(np.shape(value)[1])
        }

    @property
    def params(self) -> dict[str, float]:
        """Parameters by their published names; a, b and c are normalised as `retain.laws.forms` says."""
        return {name: float(value[0]) for name, value in self._named(self.estimate).items()}

    @property
    def stderr(self) -> dict[str, float]:
        """Half the width of the 68.27% interval: the standard error where the distribution has one."""
        return {name: (high - low) / 2 for name, (low, high) in self.conf_int(0.6827).items()}

    def conf_int(self, level: float = LEVEL) -> dict[str, tuple[float, float]]:
        """Intervals of the parameters from the bootstrap over runs; NaN where there is none."""
        found = dict.fromkeys(self.params, (math.nan, math.nan))
        for name, draws in self._named(self.draws).items():
            value, finite = self.params[name], draws[np.isfinite(draws)]
            if math.isfinite(value) and len(finite) > 0.5 * len(draws):
                positive = value > 0 and (draws > 0).all()  # on a log scale, so that it stays so
                centre, drawn = (np.log(value), np.log(finite)) if positive else (value, finite)
                ends = np.quantile(centre + self.stretch(level) * (drawn - centre), _ends(level))
                with np.errstate(over="ignore"):
                    low, high = np.exp(ends) if positive else ends
                found[name] = (float(low), float(high))
        return found

    def stretch(self, level: float, degrees: float | None = None) -> float:
        """Student's t over the normal quantile, of `degrees` of freedom or else runs - 1."""
        if not 0 < level < 1:
            raise ValueError(f"level: {level!r} is not a share; use a number above 0 and below 1, such as 0.95")
        upper = (1 + level) / 2
        degrees = len(self.runs.names) - 1 if degrees is None else degrees
        return float(stdtrit(max(degrees, 1), upper) / ndtri(upper))

    def curves(self, points: Mapping[str, Array], codes: np.ndarray, level: float) -> tuple[Array, Array]:
        """The fit (1, outputs, points) and its draws, stretched about it, in the units of the fit."""
        value = self.problem.fitted(self.estimate, points, codes)
        return value, value + self.stretch(level) * (self.problem.fitted(self.draws, points, codes) - value)

    def unidentified(self) -> list[str]:
        """Parameters whose 95% interval spans more than a factor of ten, or that have none."""
        found = []
        for name, (low, high) in self.conf_int().items() if len(self.draws) else ():
            near, far = sorted((abs(low), abs(high)))
            one_sign = low * high > 0 and far <= MAX_INTERVAL_RATIO * near
            if not (one_sign or high - low < 0.1 * abs(self.params[name])):
                found.append(name)
        return found

    @property
    def held_out_runs(self) -> dict[str, dict[str, float]]:
        """Of `held_out`, the groups that are a run each."""
        return {group: errors for group, errors in self.held_out.items() if group.startswith("run ")}

    def run_error(self, output: str) -> float:
        """Root mean squared error of an output over runs that a refit did not see; NaN where there are none."""
        errors = [of[output] ** 2 for of in self.held_out_runs.values()]
        return float(np.sqrt(np.mean(errors))) if errors else math.nan

    @property
    def r_squared(self) -> dict[str, float]:
        """1 - squared residuals over squares about the mean, of each output."""
        columns = {name: self.runs.columns[name] for name in self.form.outputs}
        fitted = zip(columns, self.problem.predict(self.estimate)[0], strict=True)
        square = {name: ((columns[name] - fit) ** 2).sum() for name, fit in fitted}
        return {
            name: float(1 - square[name] / ((column - column.mean()) ** 2).sum()) for name, column in columns.items()
        }

    def predict(
        self, *, level: float = LEVEL, dataset: str | None = None, seed: int = 0, **inputs: ArrayLike
    ) -> Prediction:
        """Outputs of a run not yet made; inputs are numbers or arrays that broadcast.

        The interval of a new measurement adds residuals, drawn by point, to the bootstrap over runs, enlarged by
        Student's t of the points that the form leaves over. A loss that no run had below 0 is cut there, and `cut`
        says so; an interval covers no less without values that a loss does not have.

        Raises:
            ValueError: for inputs that the form does not have, that are out of range, or about which the runs say
                nothing.

        >>> from retain import fit_forgetting_law
        >>> runs = {"run": range(6), "ref_kl": [0, 1, 2, 3, 4, 5], "forgetting_loss": [1, 2, 5, 10, 17, 26]}
        >>> law = fit_forgetting_law(runs, "quadratic", num_resamples=0)
        >>> round(law.predict(ref_kl=6).value["forgetting_loss"], 3)
        37.0
        """
        points, shape = self.points(inputs)
        code = self.dataset_code(dataset)
        bands, cut = self._cut(self.problem.in_nats(self._bands(points, code, level, seed)))
        value, low, high, curve_low, curve_high = (
            {name: _number(array) for name, array in zip(self.form.outputs, band.reshape(-1, *shape), strict=True)}
            for band in bands
        )
        return Prediction(
            value=value,
            ci={name: (low[name], high[name]) for name in value},
            curve_ci={name: (curve_low[name], curve_high[name]) for name in value},
            level=level,
            extrapolates=self.extrapolates(points),
            cut=cut,
        )

    def solve(self, name: str, *, level: float = LEVEL, dataset: str | None = None, **known: float) -> Solution:
        """The value of the input `name` at which an output first reaches its target.

        `law.solve("num_steps", forgetting_loss=0.02, num_params=5e6)` are the most steps whose forgetting stays within
        0.02. Searched from a tenth of the runs' smallest value to ten times their largest.

        Args:
            known: the output's target, and every other input.

        Raises:
            ValueError: where the target is not reached, or the question is not one.
        """
        targets = {key: value for key, value in known.items() if key in self.form.outputs}
        others = {key: value for key, value in known.items() if key not in targets}
        if len(targets) != 1 or name not in self.form.inputs or name in known:
            outputs, inputs = ", ".join(self.form.outputs), ", ".join(self.form.inputs)
            raise ValueError(f"solve: give one of {outputs} and, of {inputs}, all but the one to solve for")
        [(output, target)] = targets.items()
        column, at = self.runs.columns[name], self.form.outputs.index(output)
        grid = np.geomspace(max(column.min(), 1e-9) / 10, column.max() * 10, NUM_GRID_POINTS)
        points, _ = self.points({name: grid, **others})
        fitted = self.curves(points, np.full(NUM_GRID_POINTS, self.dataset_code(dataset)), level)
        value, curves = (self.problem.in_nats(of[:, at]) for of in fitted)
        found = float(first_crossings(grid, value, target)[0])
        if not 0 < found < math.inf:
            ends = f"{value[0, 0]:.4g} to {value[0, -1]:.4g} for {name} from {grid[0]:.4g} to {grid[-1]:.4g}"
            raise ValueError(f"{output}: {target:g} is not reached; the law has {ends}")
        low, high = math.nan, math.nan
        if len(curves):
            crossings = first_crossings(grid, curves, target)
            low, high = map(float, np.quantile(crossings, _ends(level), method="nearest"))
        return Solution(found, (low, high), self.extrapolates({name: found, **others}))

    def _bands(self, points: Mapping[str, Array], code: int, level: float, seed: int) -> Array:
        """The curve, and the ends of the intervals of a new measurement and of the curve: (5, outputs, points)."""
        value, curves = self.curves(points, np.full(len(next(iter(points.values()))), code), level)
        bands = np.concatenate([value, np.full((4, *value.shape[1:]), np.nan)])
        if len(self.draws):
            pool = self.spread[:, self.runs.dataset_codes == code]
            left_over = pool.shape[1] - self.problem.num_free / self.problem.num_outputs / self.problem.num_datasets
            rng = np.random.default_rng(seed)
            picked = pool[:, rng.integers(pool.shape[1], size=len(curves))].T * rng.choice([-1, 1], (len(curves), 1))
            new = curves + self.stretch(level, left_over) * picked[..., None]
            bands[1:] = np.concatenate([np.quantile(of, _ends(level), axis=0) for of in (new, curves)])
        return bands

    def _cut(self, bands: Array) -> tuple[Array, list[str]]:
        """Bands at 0 or above where every run's output is, and what that changed."""
        notes = []
        for at, name in enumerate(self.form.outputs):
            of = bands[:, at]
            if name not in LOSSES or self.runs.columns[name].min() < 0 or not (of < 0).any():
                continue
            what = "the law falls below 0 and does not hold" if (of[0] < 0).any() else "the interval reaches below 0"
            notes.append(f"{name}: {what} here; no run had so little, and it is cut at 0")
            of[of < 0] = 0.0
        return bands, notes

    def points(self, inputs: Mapping[str, ArrayLike]) -> tuple[dict[str, Array], tuple[int, ...]]:
        """Inputs as arrays of one length, and the shape that the user gave them."""
        if set(inputs) != set(self.form.inputs):
            given = ", ".join(inputs) or "nothing"
            raise ValueError(f"predict: the form {self.form.name!r} takes {', '.join(self.form.inputs)}; got {given}")
        try:
            arrays = np.broadcast_arrays(*(np.asarray(inputs[name], dtype=np.float64) for name in self.form.inputs))
        except (TypeError, ValueError) as error:
            raise ValueError(f"predict: {error}; give numbers, or arrays of one shape") from error
        points = {name: array.reshape(-1) for name, array in zip(self.form.inputs, arrays, strict=True)}
        for name, array in points.items():
            if not column_of(name).allows(array).all():
                raise ValueError(f"{name}: {inputs[name]!r} is out of range; use {column_of(name).range}")
            seen = np.unique(self.runs.columns[name])
            if len(seen) == 1 and not np.allclose(array, seen[0], rtol=1e-6):
                only = f"{name}: every run has {seen[0]:g}, so other values are unknown"
                raise ValueError(f"{only}; fit runs with several")
        return points, arrays[0].shape

    def dataset_code(self, dataset: str | None) -> int:
        """The place of a data set among those that were fitted; None where there is one."""
        names = self.runs.datasets
        if dataset is None and len(names) == 1:
            return 0
        if dataset not in names:
            remedy = f"use one of {', '.join(map(repr, names))}" if any(names) else "leave it out: the law is of one"
            raise ValueError(f"dataset: {dataset!r} was not fitted; {remedy}")
        return names.index(dataset)

    def extrapolates(self, inputs: Mapping[str, ArrayLike]) -> list[str]:
        """A sentence for each input that lies outside the range of the runs."""
        found = []
        for name, value in inputs.items():
            column, low, high = self.runs.columns[name], np.min(value), np.max(value)
            if low < column.min() * (1 - 1e-9) or high > column.max() * (1 + 1e-9):
                worst = high if high > column.max() else low
                found.append(f"{name} {worst:.6g} is outside the runs' {column.min():.6g} to {column.max():.6g}")
        return found

    def summary(self) -> str:
        """The fit as a table for people."""
        return law_table(self)

    def plot(self) -> Figure:
        """Measurements with the fitted curves and residuals."""
        from retain.laws.plots import overview  # with matplotlib, which nothing else here needs

        return overview(self)

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
            **{name: getattr(self, name) for name in AS_WRITTEN},
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
            estimate = _read_fits(data["estimate"])
            law = cls(
                form=found,
                runs=as_runs(data["runs"], found.columns),
                estimate=estimate,
                draws=_read_fits(data["draws"]) if data["draws"]["coefficients"] else estimate[:0],
                spread=_read_array(data, "spread"),
                **{name: data[name] for name in AS_WRITTEN},
            )
            law._check_arrays()
            return law
        except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
            raise ValueError(f"law: {str(path)!r} is damaged ({error}); fit it again") from error

    def _check_arrays(self) -> None:
        problem, width = self.problem, (len(self.problem.slots), self.problem.num_coefficients)
        shapes = [[array.shape for array in vars(fits).values()] for fits in (self.estimate, self.draws)]
        expected = [[(count, numbers) for numbers in width] for count in (1, len(self.draws))]
        if shapes != expected or self.spread.shape != (problem.num_outputs, problem.num_points):
            raise ValueError("'estimate', 'draws' or 'spread' does not fit the runs")


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


def _ends(level: float) -> tuple[float, float]:
    """The quantiles between which an interval lies."""
    return (1 - level) / 2, (1 + level) / 2


def _number(array: Array) -> Scalar:
    return float(array) if np.ndim(array) == 0 else array


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


def finite_or_none(value: Any) -> Any:
    """Numbers, or nested lists of them, for JSON: null for what is not finite."""
    if isinstance(value, tuple | list | np.ndarray):
        return [finite_or_none(item) for item in value]
    return float(value) if math.isfinite(value) else None

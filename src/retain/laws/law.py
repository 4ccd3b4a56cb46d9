"""A form fitted to runs: parameters and predictions with intervals, table, figure and file."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike
from scipy.special import ndtri, stdtrit

from retain.files import MAPPING, NUMBER, check_shape, read_json, without_nan, write_json
from retain.laws.fit_problem import Problem
from retain.laws.forms import LOSSES, Array, Form, column_of, form_of
from retain.laws.law_table import law_table
from retain.laws.run_tables import Runs, as_runs
from retain.laws.variable_projection import Fits

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LEVEL = 0.95
MAX_INTERVAL_RATIO = 10.0  # of the ends of an interval, above which its parameter counts as unidentified
Scalar = Any  # a float if the inputs are numbers, an array of their shape if they are arrays
NUM_GRID_POINTS = 2000  # on a log scale, between which `solve` interpolates
LAW_SCHEMA = "retain.law/2"
FITS = {"exponents": [[NUMBER]], "coefficients": [[NUMBER]]}
PLAIN_FIELDS = ("held_out", "warnings", "settings")  # stored in JSON unchanged
SHAPE = {
    "form": str, "bounds": {str: [NUMBER, NUMBER]}, "runs": {str: list}, "estimate": FITS, "draws": FITS,
    "spread": [[NUMBER]], "held_out": {str: {str: NUMBER}}, "warnings": [str], "settings": MAPPING,
}  # fmt: skip


@dataclass(frozen=True)
class Prediction:
    """Each output's value, the interval of a new measurement (`ci`) and of the curve alone (`curve_ci`)."""

    value: dict[str, Scalar]
    ci: dict[str, tuple[Scalar, Scalar]]
    curve_ci: dict[str, tuple[Scalar, Scalar]]
    level: float
    extrapolates: list[str]  # a sentence for each input outside the range of the runs
    cut: list[str]  # a sentence for each output whose curve or interval was cut at 0

    def to_dict(self) -> dict[str, Any]:
        """For JSON: output → value, ci and curve_ci (null if there is none); level, extrapolates and notes."""
        parts: dict[str, dict[str, Any]] = {"value": self.value, "ci": self.ci, "curve_ci": self.curve_ci}
        return without_nan({
            **{name: {part: np.asarray(by[name]).tolist() for part, by in parts.items()} for name in self.value},
            **{"level": self.level, "extrapolates": bool(self.extrapolates), "notes": self.extrapolates + self.cut},
        })  # fmt: skip


@dataclass(frozen=True)
class Solution:
    """The input at which the curve reaches the target, with its interval."""

    value: float
    ci: tuple[float, float]
    extrapolates: list[str]


@dataclass
class ForgettingLaw:
    """A fitted law: parameters and predictions with intervals, table, figure and file; from `fit_forgetting_law`.

    Args:
        estimate: the fit; draws: its bootstrap refits over runs.
        spread: residuals of each output, scaled to the size of the noise, nats (or logs), shape (outputs, points).
        held_out: root mean squared errors on rows held out of a refit: group → output → nats.
        warnings: what the runs leave open.
    """

    form: Form
    runs: Runs
    estimate: Fits
    draws: Fits
    spread: Array
    held_out: dict[str, dict[str, float]]
    warnings: list[str]
    settings: dict[str, Any]
    problem: Problem = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self.problem = Problem(self.form, self.runs)

    def _named(self, fits: Fits) -> dict[str, Array]:
        """Published parameters of each fit, shape (fits,); one per data set if they differ."""
        names = self.runs.datasets
        reported = self.form.report(self.problem.values(fits, np.arange(len(names))), self.problem.centres)
        return {
            f"{name}[{names[at]}]" if np.shape(value)[1] > 1 else name: value[:, at]
            for name, value in reported.items()
            for at in range(np.shape(value)[1])
        }

    @property
    def params(self) -> dict[str, float]:
        """Parameters by published name; `retain.laws.forms` describes how a, b and c are normalised."""
        return {name: float(value[0]) for name, value in self._named(self.estimate).items()}

    @property
    def stderr(self) -> dict[str, float]:
        """Standard errors of the parameters: half the width of their 68.27% intervals."""
        return {name: (high - low) / 2 for name, (low, high) in self.conf_int(0.6827).items()}

    def conf_int(self, level: float = LEVEL) -> dict[str, tuple[float, float]]:
        """Intervals of the parameters from the bootstrap over runs; NaN if there are none."""
        intervals = dict.fromkeys(self.params, (math.nan, math.nan))
        for name, draws in self._named(self.draws).items():
            value, finite = self.params[name], draws[np.isfinite(draws)]
            if math.isfinite(value) and len(finite) > 0.5 * len(draws):
                positive = value > 0 and (draws > 0).all()  # stretched on a log scale, which keeps it positive
                centre, drawn = (np.log(value), np.log(finite)) if positive else (value, finite)
                ends = np.quantile(centre + self.stretch(level) * (drawn - centre), _ends(level))
                with np.errstate(over="ignore"):
                    low, high = np.exp(ends) if positive else ends
                intervals[name] = (float(low), float(high))
        return intervals

    def stretch(self, level: float, degrees: float | None = None) -> float:
        """Quantile of Student's t over the normal quantile, with `degrees` of freedom (default: runs - 1)."""
        if not 0 < level < 1:
            raise ValueError(f"level: {level!r} is out of range; use a number above 0 and below 1, such as 0.95")
        upper = (1 + level) / 2
        degrees = len(self.runs.names) - 1 if degrees is None else degrees
        return float(stdtrit(max(degrees, 1), upper) / ndtri(upper))

    def curves(self, points: Mapping[str, Array], codes: np.ndarray, level: float) -> tuple[Array, Array]:
        """The fitted curve (1, outputs, points) and its stretched bootstrap draws, in the units of the fit."""
        value = self.problem.fitted(self.estimate, points, codes)
        return value, value + self.stretch(level) * (self.problem.fitted(self.draws, points, codes) - value)

    def unidentified(self) -> list[str]:
        """Parameters whose 95% interval spans more than a factor of ten, or is missing."""
        names = []
        for name, (low, high) in self.conf_int().items() if len(self.draws) else ():
            near, far = sorted((abs(low), abs(high)))
            within_ratio = low * high > 0 and far <= MAX_INTERVAL_RATIO * near
            if not (within_ratio or high - low < 0.1 * abs(self.params[name])):
                names.append(name)
        return names

    @property
    def held_out_runs(self) -> dict[str, dict[str, float]]:
        """The groups of `held_out` that are one run each."""
        return {group: errors for group, errors in self.held_out.items() if group.startswith("run ")}

    def run_error(self, output: str) -> float:
        """Root mean squared error of an output over held-out runs; NaN if there are none."""
        squares = [errors[output] ** 2 for errors in self.held_out_runs.values()]
        return float(np.sqrt(np.mean(squares))) if squares else math.nan

    @property
    def r_squared(self) -> dict[str, float]:
        """R² of each output: 1 - squared residuals over squared deviations from the mean."""
        shares = {}
        for name, fitted in zip(self.form.outputs, self.problem.predict(self.estimate)[0], strict=True):
            column = self.runs.columns[name]
            shares[name] = float(1 - ((column - fitted) ** 2).sum() / ((column - column.mean()) ** 2).sum())
        return shares

    def predict(
        self, *, level: float = LEVEL, dataset: str | None = None, seed: int = 0, **inputs: ArrayLike
    ) -> Prediction:
        """Predict the outputs of a new run; inputs are numbers or arrays that broadcast.

        The interval of a new measurement adds residuals of single points to the bootstrap over runs, scaled by
        Student's t with the degrees of freedom that the form leaves. A loss that no run had below 0 is cut there, with
        a note in `cut`; its interval loses no coverage.

        Raises:
            ValueError: if an input is missing, unknown or out of range, or differs from the only value of all runs.

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
        """Solve for the value of the input `name` at which an output first reaches its target.

        `law.solve("num_steps", forgetting_loss=0.02, num_params=5e6)` is the most steps whose forgetting stays within
        0.02. The search runs from a tenth of the runs' smallest value to ten times their largest.

        Args:
            known: the target of one output, and every other input.

        Raises:
            ValueError: if the target is not reached, or `known` is not one output and every other input.
        """
        targets = {key: value for key, value in known.items() if key in self.form.outputs}
        others = {key: value for key, value in known.items() if key not in targets}
        if len(targets) != 1 or name not in self.form.inputs or name in known:
            outputs, inputs = ", ".join(self.form.outputs), ", ".join(self.form.inputs)
            raise ValueError(f"solve: give one of {outputs}, and each of {inputs} but the one to solve for")
        [(output, target)] = targets.items()
        column, at = self.runs.columns[name], self.form.outputs.index(output)
        grid = np.geomspace(max(column.min(), 1e-9) / 10, column.max() * 10, NUM_GRID_POINTS)
        points, _ = self.points({name: grid, **others})
        fitted = self.curves(points, np.full(NUM_GRID_POINTS, self.dataset_code(dataset)), level)
        value, curves = (self.problem.in_nats(outputs[:, at]) for outputs in fitted)
        solution = float(first_crossings(grid, value, target)[0])
        if not 0 < solution < math.inf:
            ends = f"{value[0, 0]:.4g} to {value[0, -1]:.4g} for {name} from {grid[0]:.4g} to {grid[-1]:.4g}"
            raise ValueError(f"{output}: {target:g} is not reached; the law has {ends}")
        low, high = math.nan, math.nan
        if len(curves):
            crossings = first_crossings(grid, curves, target)
            low, high = map(float, np.quantile(crossings, _ends(level), method="nearest"))
        return Solution(solution, (low, high), self.extrapolates({name: solution, **others}))

    def _bands(self, points: Mapping[str, Array], code: int, level: float, seed: int) -> Array:
        """The curve, and the interval ends of a new measurement and of the curve; shape (5, outputs, points)."""
        value, curves = self.curves(points, np.full(len(next(iter(points.values()))), code), level)
        bands = np.concatenate([value, np.full((4, *value.shape[1:]), np.nan)])
        if len(self.draws):
            spread = self.spread[:, self.runs.dataset_codes == code]
            degrees = spread.shape[1] - self.problem.num_free / self.problem.num_outputs / self.problem.num_datasets
            rng = np.random.default_rng(seed)
            noise = spread[:, rng.integers(spread.shape[1], size=len(curves))].T * rng.choice([-1, 1], (len(curves), 1))
            new = curves + self.stretch(level, degrees) * noise[..., None]
            bands[1:] = np.concatenate([np.quantile(drawn, _ends(level), axis=0) for drawn in (new, curves)])
        return bands

    def _cut(self, bands: Array) -> tuple[Array, list[str]]:
        """Bands cut at 0 for losses that no run had below 0, and a note for each cut."""
        notes = []
        for band, name in zip(bands.swapaxes(0, 1), self.form.outputs, strict=True):
            if name not in LOSSES or self.runs.columns[name].min() < 0 or not (band < 0).any():
                continue
            what = "the law falls below 0 and does not hold" if (band[0] < 0).any() else "the interval reaches below 0"
            notes.append(f"{name}: {what} here; no run had a value below 0, so it is cut at 0")
            band[band < 0] = 0.0
        return bands, notes

    def points(self, inputs: Mapping[str, ArrayLike]) -> tuple[dict[str, Array], tuple[int, ...]]:
        """Inputs as flat arrays of one length, and their shape before."""
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
                raise ValueError(
                    f"{name}: every run has {seen[0]:g}, so nothing is known of others; fit runs with several values"
                )
        return points, arrays[0].shape

    def dataset_code(self, dataset: str | None) -> int:
        """Index of a fitted data set; `dataset` may be None if there is only one."""
        names = self.runs.datasets
        if dataset is None and len(names) == 1:
            return 0
        if dataset not in names:
            remedy = f"use one of {', '.join(map(repr, names))}" if any(names) else "leave it out: the law has only one"
            raise ValueError(f"dataset: {dataset!r} was not fitted; {remedy}")
        return names.index(dataset)

    def extrapolates(self, inputs: Mapping[str, ArrayLike]) -> list[str]:
        """A sentence for each input outside the range of the runs."""
        sentences = []
        for name, value in inputs.items():
            column, low, high = self.runs.columns[name], np.min(value), np.max(value)
            if low < column.min() * (1 - 1e-9) or high > column.max() * (1 + 1e-9):
                worst = high if high > column.max() else low
                sentences.append(f"{name} {worst:.6g} is outside the runs' {column.min():.6g} to {column.max():.6g}")
        return sentences

    def summary(self) -> str:
        """The fit as a text table."""
        return law_table(self)

    def plot(self) -> Figure:
        """Plot the measurements with fitted curves, and the residuals."""
        from retain.laws.plots import overview  # imports matplotlib, which nothing else here needs

        return overview(self)

    def to_json(self, path: str | Path) -> None:
        """Write the law to a file, whole or not at all; `from_json` restores the same numbers.

        `params`, `ci`, `r_squared` and `equation` are for readers and not read back.
        """
        fits = {"estimate": self.estimate, "draws": self.draws}
        content = {
            "schema": LAW_SCHEMA,
            "form": self.form.name,
            "equation": self.form.equation,
            "params": without_nan(self.params),
            "ci": without_nan(self.conf_int()),
            "r_squared": self.r_squared,
            **{name: getattr(self, name) for name in PLAIN_FIELDS},
            "bounds": self.form.exponents,
            "runs": {
                "run": self.runs.run,
                "dataset": self.runs.dataset,
                **{name: column.tolist() for name, column in self.runs.columns.items()},
            },
            **{name: {key: array.tolist() for key, array in vars(fit).items()} for name, fit in fits.items()},
            "spread": self.spread.tolist(),
        }
        write_json(Path(path), content)

    @classmethod
    def from_json(cls, path: str | Path, form: Form | None = None) -> ForgettingLaw:
        """Read a law from a file; give `form` if it is your own.

        Raises:
            ValueError: if the file was not written by `to_json`.
        """
        data = read_json(Path(path), "law", "give a file that `retain fit` wrote")
        if not isinstance(data, dict) or data.get("schema") != LAW_SCHEMA:
            raise ValueError(f"law: {str(path)!r} is not a {LAW_SCHEMA} file; give one that `retain fit` wrote")
        check_shape(data, SHAPE, f"law: {str(path)!r} is damaged", "fit it again")
        form = form_of(form or data["form"], {name: tuple(pair) for name, pair in data["bounds"].items()})
        try:
            if unknown := [name for name in ("estimate", "draws", "spread") if without_nan(data[name]) != data[name]]:
                raise ValueError(f"{unknown[0]!r} holds a number that is not finite")
            estimate = _read_fits(data["estimate"])
            law = cls(
                form=form,
                runs=as_runs(data["runs"], form.columns),
                estimate=estimate,
                draws=_read_fits(data["draws"]) if data["draws"]["coefficients"] else estimate[:0],
                spread=np.asarray(data["spread"], dtype=np.float64),
                **{name: data[name] for name in PLAIN_FIELDS},
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
            raise ValueError("'estimate', 'draws' or 'spread' does not have the shape of the runs")


def _read_fits(data: Mapping[str, Any]) -> Fits:
    return Fits(**{name: np.asarray(data[name], dtype=np.float64) for name in FITS})


def _ends(level: float) -> tuple[float, float]:
    """The quantiles at which an interval ends."""
    return (1 - level) / 2, (1 + level) / 2


def _number(array: Array) -> Scalar:
    return float(array) if np.ndim(array) == 0 else array


def first_crossings(grid: Array, curves: Array, target: float) -> Array:
    """Where each curve (curves, grid) first crosses the target, linear in log; 0 if it starts beyond it, inf if never.

    >>> first_crossings(np.array([1.0, 10.0]), np.array([[0.0, 2.0], [2.0, 3.0], [0.0, 0.5]]), 1.0).round(2).tolist()
    [3.16, 0.0, inf]
    """
    rises = curves[:, -1] >= curves[:, 0]
    passed = (curves >= target) == rises[:, None]
    crossings = np.where(passed[:, 0], 0.0, np.inf)
    inside = np.flatnonzero(passed.any(axis=1) & ~passed[:, 0])
    after = passed[inside].argmax(axis=1)
    low, high, logs = curves[inside, after - 1], curves[inside, after], np.log(grid)
    crossings[inside] = np.exp(logs[after - 1] + (target - low) / (high - low) * (logs[after] - logs[after - 1]))
    return crossings

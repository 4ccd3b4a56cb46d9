"""A fitted law: parameters with intervals, predictions, the longest run within a limit, and a file."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike
from scipy.special import ndtri, stdtrit

from retain.laws.diagnostics import LOOSE
from retain.laws.forms import Array, Form
from retain.laws.problem import Draws, Problem
from retain.laws.runs import POSITIVE, Runs

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from retain.laws.solve import Solution

LEVEL = 0.95
LOSSES = ("finetuning_loss", "forgetting_loss")
Interval = tuple[Any, Any]


@dataclass(frozen=True)
class Prediction:
    """Each output's value, the interval of a new measurement (`ci`), and that of the curve alone (`curve_ci`)."""

    value: dict[str, Any]
    ci: dict[str, Interval]
    curve_ci: dict[str, Interval]
    level: float
    extrapolates: list[str]  # a sentence for each input that lies beyond the data
    cut: list[str]  # a sentence for each output whose curve or interval reached below 0

    def to_dict(self) -> dict[str, Any]:
        """For JSON: output → value, ci and curve_ci (null where there is none), and whether it extrapolates."""
        found: dict[str, Any] = {
            name: {"value": plain(value), "ci": plain(self.ci[name]), "curve_ci": plain(self.curve_ci[name])}
            for name, value in self.value.items()
        }
        return found | {
            "level": self.level,
            "extrapolates": bool(self.extrapolates),
            "notes": self.extrapolates + self.cut,
        }


@dataclass
class ForgettingLaw:
    """What `fit_forgetting_law` returns.

    Args:
        estimate: the fit; draws: its bootstrap refits over runs.
        spread: residuals of each output, enlarged to their true size, nats (or in logs), shape (outputs, points).
        held_out: root mean squared error on rows that a refit did not see: group → output → nats.
        condition: condition number of the derivatives by exponents and coefficients.
        warnings: what the runs cannot say.
    """

    form: Form
    runs: Runs
    estimate: Draws
    draws: Draws
    spread: Array
    held_out: dict[str, dict[str, float]]
    condition: float
    warnings: list[str]
    settings: dict[str, Any]
    problem: Problem = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self.problem = Problem(self.form, self.runs)

    def _named(self, draws: Draws) -> dict[str, Array]:
        """Published parameters of each fit, shape (fits,); per data set where they differ."""
        names = self.problem.datasets
        values = self.problem.values(draws, np.arange(len(names)))
        reported = self.form.report(values, self.problem.centres) if self.form.report else values
        found: dict[str, Array] = {}
        for name, value in reported.items():
            wide = np.shape(value)[1] > 1
            found |= {f"{name}[{names[at]}]" if wide else name: value[:, at] for at in range(np.shape(value)[1])}
        return found

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
        drawn, found = self._named(self.draws), {}
        for name, value in self.params.items():
            draws = drawn[name]
            if not len(draws) or not math.isfinite(value) or not np.isfinite(draws).mean() > 0.5:
                found[name] = (math.nan, math.nan)
            elif value > 0 and (draws > 0).all():  # on a log scale, so that what is positive stays so
                low, high = self._spread_out(np.log(draws[np.isfinite(draws)]), np.asarray(np.log(value)), level)
                with np.errstate(over="ignore"):
                    found[name] = (float(np.exp(low)), float(np.exp(high)))
            else:
                low, high = self._spread_out(draws[np.isfinite(draws)], np.asarray(value), level)
                found[name] = (float(low), float(high))
        return found

    def stretch(self, level: float, degrees: float | None = None) -> float:
        """Student's t over the normal quantile, of runs - 1 degrees of freedom unless told otherwise."""
        _check_level(level)
        upper = (1 + level) / 2
        degrees = len(self.runs.names) - 1 if degrees is None else degrees
        return float(stdtrit(max(degrees, 1), upper) / ndtri(upper))

    def curves(self, points: Mapping[str, Array], codes: np.ndarray, level: float) -> tuple[Array, Array]:
        """The fit (1, outputs, points) and its draws, stretched about it, in the units of the fit."""
        value = self.problem.fitted(self.estimate, points, codes)
        return value, value + self.stretch(level) * (self.problem.fitted(self.draws, points, codes) - value)

    def _spread_out(self, draws: Array, value: Array, level: float) -> Array:
        stretched = value + self.stretch(level) * (draws - value)
        return np.quantile(stretched, [(1 - level) / 2, (1 + level) / 2], axis=0)

    def loose(self) -> list[str]:
        """Parameters whose 95% interval spans more than a factor of ten, or that have none."""
        if not len(self.draws):
            return []
        found = []
        for name, (low, high) in self.conf_int().items():
            value = abs(self.params[name])
            near, far = sorted((abs(low), abs(high)))
            if not ((low * high > 0 and far <= LOOSE * near) or high - low < 0.1 * value):
                found.append(name)
        return found

    @property
    def r_squared(self) -> dict[str, float]:
        """1 - squared residuals over squares about the mean, of each output."""
        fitted = self.problem.predict(self.estimate)[0]
        columns = [self.runs.columns[name] for name in self.form.outputs]
        return {
            name: float(1 - ((column - fit) ** 2).sum() / ((column - column.mean()) ** 2).sum())
            for name, column, fit in zip(self.form.outputs, columns, fitted, strict=True)
        }

    def predict(
        self, *, level: float = LEVEL, dataset: str | None = None, seed: int = 0, **inputs: ArrayLike
    ) -> Prediction:
        """Outputs of a run not yet made; inputs are numbers or arrays that broadcast.

        The interval of a new measurement adds residuals, drawn by point, to the bootstrap over runs, enlarged by
        Student's t of the points that the form leaves over. A loss that no run had below 0 is cut there, and `cut`
        says so; an interval covers no less without values that a loss does not have.

        Raises:
            ValueError: for inputs that the form does not have, that cannot be, or that the runs say nothing about.
        """
        points, shape = self.points(inputs)
        codes = np.full(len(next(iter(points.values()))), self.code(dataset))
        value, curves = self.curves(points, codes, level)
        found = np.concatenate([value, np.full((4, *value.shape[1:]), np.nan)])
        if len(self.draws):
            pool = self.spread[:, self.problem.set_codes == codes[0]]
            left_over = pool.shape[1] - self.problem.num_free / self.problem.num_outputs / len(self.problem.datasets)
            rng = np.random.default_rng(seed)
            picked = pool[:, rng.integers(pool.shape[1], size=len(curves))].T * rng.choice([-1, 1], (len(curves), 1))
            new = curves + self.stretch(level, left_over) * picked[..., None]
            ends = [(1 - level) / 2, (1 + level) / 2]
            found[1:] = np.concatenate([np.quantile(of, ends, axis=0) for of in (new, curves)])
        found, cut = self._cut(self.problem.in_nats(found))
        shaped = [array.reshape(-1, *shape) for array in found]
        of_output = {name: [_number(array[at]) for array in shaped] for at, name in enumerate(self.form.outputs)}
        return Prediction(
            value={name: found[0] for name, found in of_output.items()},
            ci={name: (found[1], found[2]) for name, found in of_output.items()},
            curve_ci={name: (found[3], found[4]) for name, found in of_output.items()},
            level=level,
            extrapolates=self.extrapolates(points),
            cut=cut,
        )

    def _cut(self, found: Array) -> tuple[Array, list[str]]:
        """Outputs (value, four ends; outputs; points) at 0 or above where every run's are, and what that changed."""
        notes = []
        for at, name in enumerate(self.form.outputs):
            of = found[:, at]
            if name not in LOSSES or self.runs.columns[name].min() < 0 or not (of < 0).any():
                continue
            what = "the law falls below 0 and does not hold" if (of[0] < 0).any() else "the interval reaches below 0"
            notes.append(f"{name}: {what} here; no run had so little, and it is cut at 0")
            of[of < 0] = 0.0
        return found, notes

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
            if not np.isfinite(array).all() or (array < 0).any() or (name in POSITIVE and (array == 0).any()):
                raise ValueError(f"{name}: {inputs[name]!r} cannot be; use a finite number above 0")
            seen = np.unique(self.runs.columns[name])
            if len(seen) == 1 and not np.allclose(array, seen[0], rtol=1e-6):
                raise ValueError(
                    f"{name}: every run has {seen[0]:g}, so other values are unknown; fit runs with several"
                )
        return points, arrays[0].shape

    def code(self, dataset: str | None) -> int:
        names = self.problem.datasets
        if dataset is None and len(names) == 1:
            return 0
        if dataset not in names:
            raise ValueError(f"dataset: {dataset!r} was not fitted; use one of {', '.join(map(repr, names))}")
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
        from retain.laws.solve import solve

        return solve(self, name, known, level=level, dataset=dataset, sure=sure)

    def summary(self) -> str:
        """The fit as a table for people."""
        from retain.laws.text import summary

        return summary(self)

    def plot(self) -> Figure:
        """Measurements with the fitted curves and residuals; `retain.laws.plots` has more."""
        from retain.laws.plots import overview

        return overview(self)

    def to_json(self, path: str | Path) -> None:
        """Write the law to a file, whole or not at all; `from_json` gives back the same numbers."""
        from retain.laws.file import write_law

        write_law(self, Path(path))

    @classmethod
    def from_json(cls, path: str | Path, form: Form | None = None) -> ForgettingLaw:
        """Read a law from a file; `form` where it is one of the user's own.

        Raises:
            ValueError: if the file is not one that `to_json` wrote.
        """
        from retain.laws.file import read_law

        return read_law(Path(path), form)


def _check_level(level: float) -> None:
    if not 0 < level < 1:
        raise ValueError(f"level: {level!r} cannot be; use a number above 0 and below 1, such as 0.95")


def _number(array: Array) -> Any:
    return float(array) if np.ndim(array) == 0 else array


def plain(value: Any) -> Any:
    """Numbers for JSON: null for what is not finite."""
    if isinstance(value, tuple | list | np.ndarray):
        return [plain(item) for item in value]
    return float(value) if math.isfinite(value) else None

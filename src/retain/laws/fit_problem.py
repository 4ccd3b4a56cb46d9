"""A form and the runs it is fitted to, as arrays for variable projection."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from retain.laws.forms import Array, Form
from retain.laws.run_tables import Runs
from retain.laws.variable_projection import Fits, fit_many


class Problem:
    """A fit's arrays. Rows hold all points of the first output, then of the second; coefficients go by data set."""

    def __init__(self, form: Form, runs: Runs) -> None:
        self.form, self.runs = form, runs
        self.num_points, self.num_outputs, self.num_datasets = len(runs), len(form.outputs), len(runs.datasets)
        self.run_codes = np.tile(runs.run_codes, self.num_outputs)  # shape (rows,)
        self.centres = {name: float(np.exp(np.log(runs.columns[name]).mean())) for name in form.centred}
        self.inputs = self.centre({name: runs.columns[name] for name in form.inputs})
        columns = [self._logarithm(name) if form.logs else runs.columns[name] for name in form.outputs]
        self.observed = np.concatenate(columns)
        self.scale = np.repeat([column.std() for column in columns], self.num_points)
        self.copies = {name: self.num_datasets if name in form.local else 1 for name in form.exponents}
        self.slots = [name for name, count in self.copies.items() for _ in range(count)]  # name of each exponent
        self.num_coefficients = len(form.coefficients) * self.num_datasets
        self.num_free = len(self.slots) + self.num_coefficients  # exponents and coefficients
        bounds = np.array([form.exponents[name] for name in self.slots]).reshape(-1, 2)
        self.logged = bounds[:, 0] > 0
        self.low, self.high = np.where(self.logged, np.log(np.where(self.logged, bounds.T, 1.0)), bounds.T)

    def _logarithm(self, name: str) -> Array:
        low = self.runs.columns[name].min()
        if low <= 0:
            raise ValueError(f"{name}: {low:g} has no logarithm, which the form {self.form.name!r} needs; drop the row")
        return np.log(self.runs.columns[name])

    def centre(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Inputs divided by their centres."""
        return {name: value / self.centres.get(name, 1.0) for name, value in inputs.items()}

    def values(self, fits: Fits, codes: np.ndarray) -> dict[str, Array]:
        """Exponents and coefficients by name, for points of the data sets `codes`: (fits, 1) or (fits, points)."""
        count = len(self.form.coefficients)
        return self._exponents(fits.exponents, codes) | {
            name: fits.coefficients[:, codes * count + at] for at, name in enumerate(self.form.coefficients)
        }

    def _exponents(self, exponents: Array, codes: np.ndarray) -> dict[str, Array]:
        natural = np.where(self.logged, np.exp(np.where(self.logged, exponents, 0.0)), exponents)
        named, first = {}, 0
        for name, count in self.copies.items():
            named[name] = natural[:, first + (codes if count > 1 else np.zeros(1, dtype=int))]
            first += count
        return named

    def design(self, exponents: Array) -> Array:
        """Terms of every row, shape (fits, rows, coefficients of all data sets), in units of the noise."""
        codes, rows, count = self.runs.dataset_codes, np.arange(self.num_points), len(self.form.coefficients)
        terms = self.form.terms(self.inputs, self._exponents(exponents, codes))
        stacked = np.zeros((len(exponents), len(terms) * self.num_points, self.num_coefficients))
        for output, row in enumerate(terms):
            for at, term in enumerate(row):
                stacked[:, output * self.num_points + rows, codes * count + at] = term
        return stacked / self.scale[:, None]

    def predict(self, fits: Fits) -> Array:
        """Each fit's outputs at the points of the runs, nats, shape (fits, outputs, points)."""
        return self.in_nats(self.fitted(fits))

    def in_nats(self, fitted: Array) -> Array:
        """Outputs from fitted values, which are logarithms for a form with `logs`."""
        return np.exp(fitted) if self.form.logs else fitted

    def fitted(self, fits: Fits, inputs: Mapping[str, Array] | None = None, codes: np.ndarray | None = None) -> Array:
        """Each fit's outputs in the units of `observed`, (fits, outputs, points), at the runs' points or at others."""
        centred = self.inputs if inputs is None else self.centre(inputs)
        codes = self.runs.dataset_codes if codes is None else codes
        values = self.values(fits, codes)
        parts = [
            sum(values[name] * term for name, term in zip(self.form.coefficients, row, strict=True))
            for row in self.form.terms(centred, values)
        ]
        return np.stack([np.broadcast_to(part, (len(fits), len(codes))) for part in parts], axis=1)

    def fit(
        self,
        start: Array,
        *,
        tolerance: float,
        robust: bool = True,
        observed: Array | None = None,
        weight: Array | None = None,
        max_iterations: int = 100,
    ) -> tuple[Fits, Array]:
        """Fit the outputs, or `observed` (fits, rows), from each `start` (fits, k); returns fits and their losses."""
        shape = (len(start), len(self.observed))
        return fit_many(
            self.design,
            start,
            np.broadcast_to(self.observed if observed is None else observed, shape) / self.scale,
            np.ones(shape) if weight is None else weight,
            low=self.low,
            high=self.high,
            robust=robust,
            tolerance=tolerance,
            max_iterations=max_iterations,
        )

    def set_noise(self, best: Fits) -> None:
        """Scale each output by the size of its residuals, so that outputs weigh alike and Huber's k applies."""
        residuals = self.observed - self.fitted(best).reshape(-1)
        spread = [1.4826 * np.median(np.abs(part)) for part in np.split(residuals, self.num_outputs)]
        floor = [1e-7 * part.std() for part in np.split(self.observed, self.num_outputs)]
        self.scale = np.repeat(np.maximum(spread, floor), self.num_points)

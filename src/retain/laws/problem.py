"""A form and the runs it is fitted to, as the arrays that variable projection needs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from retain.laws.forms import Array, Form, Number
from retain.laws.runs import Runs
from retain.laws.variable_projection import fit_many


@dataclass
class Draws:
    """Fits of one form: exponents as searched (fits, k), coefficients (fits, c)."""

    exponents: Array
    coefficients: Array

    def __len__(self) -> int:
        return len(self.exponents)

    def __getitem__(self, which: slice | np.ndarray | list[int]) -> Draws:
        return Draws(self.exponents[which], self.coefficients[which])


class Problem:
    """Rows are all points of the first output, then of the second; coefficients are grouped by data set."""

    def __init__(self, form: Form, runs: Runs) -> None:
        self.form, self.runs = form, runs
        self.datasets = runs.datasets
        self.set_codes = runs.codes(runs.dataset, self.datasets)
        self.centres = {name: float(np.exp(np.log(runs.columns[name]).mean())) for name in form.centred}
        self.inputs = self.centre({name: runs.columns[name] for name in form.inputs})
        columns = [self._checked(name) if form.logs else runs.columns[name] for name in form.outputs]
        self.observed = np.concatenate(columns)
        self.num_points, self.num_outputs = len(runs), len(form.outputs)
        copies = {name: len(self.datasets) if name in form.local else 1 for name in form.exponents}
        self.slots = [(name, copy) for name, count in copies.items() for copy in range(count)]
        self.copies = copies
        bounds = np.array([form.exponents[name] for name, _ in self.slots]).reshape(-1, 2)
        self.logged = bounds[:, 0] > 0
        self.low, self.high = np.where(self.logged, np.log(np.where(self.logged, bounds.T, 1.0)), bounds.T)
        self.scale = np.repeat([column.std() for column in columns], self.num_points)

    @property
    def num_free(self) -> int:
        """How many numbers the fit is free to choose."""
        return len(self.slots) + len(self.form.coefficients) * len(self.datasets)

    def _checked(self, name: str) -> Array:
        low = self.runs.columns[name].min()
        if low <= 0:
            raise ValueError(f"{name}: {low:g} has no logarithm, which the form {self.form.name!r} fits; drop the row")
        return np.log(self.runs.columns[name])

    def centre(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Inputs in units of their centres."""
        return {name: value / self.centres.get(name, 1.0) for name, value in inputs.items()}

    def values(self, draws: Draws, codes: np.ndarray) -> dict[str, Array]:
        """Exponents and coefficients by name for points of data sets `codes`; shape (fits, 1) or (fits, points)."""
        found = self._exponents(draws.exponents, codes)
        count = len(self.form.coefficients)
        return found | {
            name: draws.coefficients[:, codes * count + at] for at, name in enumerate(self.form.coefficients)
        }

    def _exponents(self, exponents: Array, codes: np.ndarray) -> dict[str, Array]:
        natural = np.where(self.logged, np.exp(np.where(self.logged, exponents, 0.0)), exponents)
        found, at = {}, 0
        for name, count in self.copies.items():
            found[name] = natural[:, at + (codes if count > 1 else np.zeros(1, dtype=int))]
            at += count
        return found

    def design(self, exponents: Array) -> Array:
        """Terms of every row, shape (fits, rows, coefficients of all data sets), in units of the noise."""
        found = self._exponents(exponents, self.set_codes)
        terms = self._stack(self.form.terms(self.inputs, found), len(exponents), self.set_codes)
        return terms / self.scale[:, None]

    def _stack(self, terms: Sequence[Sequence[Number]], fits: int, codes: np.ndarray) -> Array:
        points, count = len(codes), len(terms[0])
        stacked = np.zeros((fits, len(terms) * points, count * len(self.datasets)))
        rows = np.arange(points)
        for output, row in enumerate(terms):
            for at, term in enumerate(row):
                stacked[:, output * points + rows, codes * count + at] = np.broadcast_to(term, (fits, points))
        return stacked

    def predict(
        self, draws: Draws, inputs: Mapping[str, Array] | None = None, codes: np.ndarray | None = None
    ) -> Array:
        """Each fit's outputs, shape (fits, outputs, points), at the runs' own points or at others."""
        return self.in_nats(self.fitted(draws, inputs, codes))

    def in_nats(self, fitted: Array) -> Array:
        """Outputs from what is fitted: the outputs themselves or their logarithms."""
        return np.exp(fitted) if self.form.logs else fitted

    def fitted(self, draws: Draws, inputs: Mapping[str, Array] | None = None, codes: np.ndarray | None = None) -> Array:
        """`predict` in the units of `observed`."""
        centred = self.inputs if inputs is None else self.centre(inputs)
        codes = self.set_codes if codes is None else codes
        found = self.values(draws, codes)
        rows = self.form.terms(centred, found)
        parts = [
            sum(found[name] * term for name, term in zip(self.form.coefficients, row, strict=True)) for row in rows
        ]
        return np.stack([np.broadcast_to(part, (len(draws), len(codes))) for part in parts], axis=1)

    def fit(self, observed: Array, weight: Array, start: Array, **options: float) -> tuple[Draws, Array]:
        """Fit every row of `observed` (fits, rows) from `start`; the fits and their losses."""
        fits = fit_many(
            lambda exponents, _: self.design(exponents),
            start,
            observed / self.scale,
            weight,
            low=self.low,
            high=self.high,
            **options,  # type: ignore[arg-type]
        )
        return Draws(fits.exponents, fits.coefficients), fits.loss

    def set_noise(self, best: Draws) -> None:
        """Take the size of the residuals as the unit of each output, so that they weigh alike and Huber's k fits."""
        residuals = self.observed - self.fitted(best).reshape(-1)
        spread = [1.4826 * np.median(np.abs(part)) for part in np.split(residuals, self.num_outputs)]
        floor = [1e-7 * part.std() for part in np.split(self.observed, self.num_outputs)]
        self.scale = np.repeat(np.maximum(spread, floor), self.num_points)

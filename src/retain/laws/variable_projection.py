"""Variable projection: many fits of one form at once, coefficients solved exactly, exponents by Levenberg-Marquardt.

The first axis of an array is the fit: many starts of one fit, or resamples of its data. A robust fit takes its weights
from Huber's loss (iteratively reweighted least squares); no step raises that loss.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Self

import numpy as np

from retain.laws.forms import Array

HUBER = 1.345  # 95% as efficient as least squares for normal errors
# Exponents (fits, k) → terms (fits, points, coefficients).
Design = Callable[[Array], Array]


@dataclass
class Fits:
    """Fits of one form: exponents as searched (fits, k), coefficients (fits, c)."""

    exponents: Array
    coefficients: Array

    def __len__(self) -> int:
        return len(self.exponents)

    def __getitem__(self, which: slice | np.ndarray | list[int]) -> Self:
        return type(self)(*(array[which] for array in vars(self).values()))


@dataclass
class _Search(Fits):
    """Fits in progress, with their residuals (fits, points) and weighted sums of squares (fits,)."""

    residuals: Array
    squares: Array

    def update(self, which: np.ndarray, other: _Search) -> None:
        for name, array in vars(other).items():
            getattr(self, name)[which] = array


def least_squares(terms: Array, target: Array, weight: Array) -> Array:
    """Weighted least squares: coefficients (fits, c, targets) for `target` (fits, points, targets)."""
    weighted = np.swapaxes(terms * weight[..., None], 1, 2)
    gram = weighted @ terms
    scale = np.sqrt(np.einsum("bii->bi", gram))
    scale[scale == 0] = 1.0
    gram = gram / (scale[:, :, None] * scale[:, None, :]) + 1e-13 * np.eye(gram.shape[-1])
    return np.linalg.solve(gram, (weighted @ target) / scale[..., None]) / scale[..., None]


def huber_weight(standardised: Array) -> Array:
    """Weight of each residual: min(1, k/|r|)."""
    return HUBER / np.maximum(np.abs(standardised), HUBER)


def huber_loss(standardised: Array) -> Array:
    """Loss of each residual: r²/2 up to k, linear beyond."""
    size = np.abs(standardised)
    return np.where(size <= HUBER, size**2 / 2, HUBER * (size - HUBER / 2))


def fit_many(
    design: Design,
    start: Array,
    target: Array,
    weight: Array,
    *,
    low: Array,
    high: Array,
    robust: bool = True,
    max_iterations: int = 100,
    tolerance: float = 1e-10,
) -> tuple[Fits, Array]:
    """Fit `target` (fits, points), in units of its noise and weighted by `weight`, from `start` (fits, k).

    Exponents stay between `low` and `high` (k,). A fit ends when a step lowers its loss by less than the fraction
    `tolerance`, or when no step lowers it.

    Returns:
        The fits, and the loss of each, shape (fits,).
    """
    search = _project(design, np.clip(start, low, high), target, weight)
    active, damping = np.arange(len(start)), np.full(len(start), 1e-3)
    for _ in range(max_iterations):
        now = search[active]
        w = weight[active] * (huber_weight(now.residuals) if robust else 1.0)
        now.squares = (w * now.residuals**2).sum(1)
        step = _step(design, now, w, damping[active], low, high)
        new = _project(design, np.clip(now.exponents + step, low, high), target[active], w)
        better = new.squares <= now.squares
        search.update(active[better], new[better])
        damping[active] = np.where(better, damping[active] * 0.2, damping[active] * 6).clip(1e-12)
        done = np.where(better, now.squares - new.squares <= tolerance * now.squares, damping[active] > 1e8)
        active = active[~done]
        if not len(active):
            break
    loss = (weight * (huber_loss(search.residuals) if robust else search.residuals**2 / 2)).sum(1)
    return Fits(search.exponents, search.coefficients), loss


def _project(design: Design, exponents: Array, target: Array, weight: Array) -> _Search:
    """Fits with the best coefficients at given exponents."""
    terms = design(exponents)
    coefficients = least_squares(terms, target[..., None], weight)
    residuals = target - (terms @ coefficients)[..., 0]
    return _Search(exponents, coefficients[..., 0], residuals, (weight * residuals**2).sum(1))


def _step(design: Design, now: _Search, weight: Array, damping: Array, low: Array, high: Array) -> Array:
    """A damped Gauss-Newton step of the projected problem (Kaufman's approximation), within the bounds."""
    if not now.exponents.shape[1]:
        return np.zeros_like(now.exponents)
    terms = design(now.exponents)
    jacobian = _slopes(design, now, terms, low, high)
    jacobian = jacobian - terms @ least_squares(terms, jacobian, weight)
    weighted = np.swapaxes(jacobian * weight[..., None], 1, 2)
    right = (weighted @ now.residuals[..., None])[..., 0]
    stuck = (now.exponents <= low) & (right < 0) | (now.exponents >= high) & (right > 0)
    gram = np.where(stuck[:, :, None] | stuck[:, None, :], 0.0, weighted @ jacobian)
    diagonal = np.einsum("bii->bi", gram)
    add = damping[:, None] * diagonal + 1e-12 * diagonal.max(axis=1, keepdims=True) + 1e-300
    gram = gram + np.where(stuck, 1.0, add)[:, :, None] * np.eye(gram.shape[-1])
    step = np.linalg.solve(gram, np.where(stuck, 0.0, right)[..., None])[..., 0]
    return np.clip(step, 0.5 * (low - high), 0.5 * (high - low))


def _slopes(design: Design, now: _Search, terms: Array, low: Array, high: Array) -> Array:
    """Derivatives of the predictions by each exponent at fixed coefficients, shape (fits, points, k)."""
    columns = []
    for index, width in enumerate(1e-6 * (high - low)):
        moved = now.exponents.copy()
        moved[:, index] += np.where(moved[:, index] + width > high[index], -width, width)
        change = (moved[:, index] - now.exponents[:, index])[:, None]
        columns.append(((design(moved) - terms) @ now.coefficients[..., None])[..., 0] / change)
    return np.stack(columns, axis=-1)

"""Variable projection: many fits of one form at once, coefficients solved exactly, exponents by Levenberg-Marquardt.

Arrays have the fits in front: many starts of one fit, or resamples of its data. A robust fit is a weighted one whose
weights follow Huber's loss (iteratively reweighted least squares); no step raises that loss.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from retain.laws.forms import Array

HUBER = 1.345  # 95% as good as least squares where errors are normal
# Exponents (fits, k) and which fits they belong to → terms (fits, points, coefficients).
Design = Callable[[Array, np.ndarray], Array]


@dataclass
class Fits:
    """Many fits: exponents (fits, k), coefficients (fits, c), residuals (fits, points), loss (fits,)."""

    exponents: Array
    coefficients: Array
    residuals: Array
    loss: Array


def solve(terms: Array, target: Array, weight: Array) -> Array:
    """Weighted least squares: coefficients (fits, c, targets) for `target` (fits, points, targets)."""
    weighted = np.swapaxes(terms * weight[..., None], 1, 2)
    gram = weighted @ terms
    scale = np.sqrt(np.einsum("bii->bi", gram))
    scale[scale == 0] = 1.0
    gram = gram / (scale[:, :, None] * scale[:, None, :]) + 1e-13 * np.eye(gram.shape[-1])
    return np.linalg.solve(gram, (weighted @ target) / scale[..., None]) / scale[..., None]


def huber_weight(standardised: Array) -> Array:
    """min(1, k/|r|)."""
    return HUBER / np.maximum(np.abs(standardised), HUBER)


def huber_loss(standardised: Array) -> Array:
    """r²/2 near zero, linear beyond k."""
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
) -> Fits:
    """Fit `target` (fits, points), in units of its noise, with `weight` for each point, from `start` (fits, k).

    Exponents stay between `low` and `high` (k,). A fit ends when a step lowers its loss by a share below `tolerance`,
    or when none lowers it.
    """
    fits = _begin(design, np.clip(start, low, high), target, weight)
    active, damping = np.arange(len(start)), np.full(len(start), 1e-3)
    for _ in range(max_iterations):
        residuals, exponents = fits.residuals[active], fits.exponents[active]
        w = weight[active] * (huber_weight(residuals) if robust else 1.0)
        terms = design(exponents, active)
        now = Fits(exponents, fits.coefficients[active], residuals, (w * residuals**2).sum(1))
        step = _step(design, now, terms, w, damping[active], active, low, high)
        new = _begin(design, np.clip(exponents + step, low, high), target[active], w, active)
        better = new.loss <= now.loss
        taken = active[better]
        for name in ("exponents", "coefficients", "residuals"):
            getattr(fits, name)[taken] = getattr(new, name)[better]
        damping[active] = np.where(better, damping[active] * 0.2, damping[active] * 6).clip(1e-12)
        done = np.where(better, now.loss - new.loss <= tolerance * now.loss, damping[active] > 1e8)
        active = active[~done]
        if not len(active):
            break
    fits.loss = (weight * (huber_loss(fits.residuals) if robust else fits.residuals**2 / 2)).sum(1)
    return fits


def _begin(design: Design, exponents: Array, target: Array, weight: Array, which: np.ndarray | None = None) -> Fits:
    """Coefficients, residuals and weighted squares at given exponents."""
    terms = design(exponents, np.arange(len(exponents)) if which is None else which)
    coefficients = solve(terms, target[..., None], weight)
    residuals = target - (terms @ coefficients)[..., 0]
    return Fits(exponents, coefficients[..., 0], residuals, (weight * residuals**2).sum(1))


def _step(
    design: Design,
    now: Fits,
    terms: Array,
    weight: Array,
    damping: Array,
    which: np.ndarray,
    low: Array,
    high: Array,
) -> Array:
    """A damped Gauss-Newton step of the projected problem (Kaufman's approximation) that leaves no bound."""
    if not now.exponents.shape[1]:
        return np.zeros_like(now.exponents)
    jacobian = slopes(design, now, terms, which, low, high)
    jacobian = jacobian - terms @ solve(terms, jacobian, weight)
    weighted = np.swapaxes(jacobian * weight[..., None], 1, 2)
    right = (weighted @ now.residuals[..., None])[..., 0]
    stuck = (now.exponents <= low) & (right < 0) | (now.exponents >= high) & (right > 0)
    gram = np.where(stuck[:, :, None] | stuck[:, None, :], 0.0, weighted @ jacobian)
    diagonal = np.einsum("bii->bi", gram)
    add = damping[:, None] * diagonal + 1e-12 * diagonal.max(axis=1, keepdims=True) + 1e-300
    gram = gram + np.where(stuck, 1.0, add)[:, :, None] * np.eye(gram.shape[-1])
    step = np.linalg.solve(gram, np.where(stuck, 0.0, right)[..., None])[..., 0]
    return np.clip(step, 0.5 * (low - high), 0.5 * (high - low))


def slopes(design: Design, fits: Fits, terms: Array, which: np.ndarray, low: Array, high: Array) -> Array:
    """Derivative of the predictions by each exponent at fixed coefficients, shape (fits, points, k)."""
    columns = []
    for index in range(fits.exponents.shape[1]):
        width = 1e-6 * (high[index] - low[index])
        moved = fits.exponents.copy()
        moved[:, index] += np.where(moved[:, index] + width > high[index], -width, width)
        change = (moved[:, index] - fits.exponents[:, index])[:, None]
        columns.append(((design(moved, which) - terms) @ fits.coefficients[..., None])[..., 0] / change)
    return np.stack(columns, axis=-1) if columns else np.empty((*terms.shape[:2], 0))

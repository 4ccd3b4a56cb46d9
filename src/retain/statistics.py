"""Intervals: a number measured on text is a ratio of sums over documents, and documents are what is resampled."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike


def bootstrap_ratio(
    numerator: ArrayLike,
    denominator: ArrayLike,
    *,
    num_resamples: int = 2000,
    level: float = 0.95,
    seed: int = 0,
) -> tuple[float, float, float]:
    """Σ numerator / Σ denominator over documents, with a percentile interval by bootstrap over documents.

    Args:
        numerator: per-document sums, shape (documents,), e.g. nats.
        denominator: per-document sizes, shape (documents,), e.g. tokens.
        num_resamples: bootstrap resamples.
        level: coverage of the interval.
        seed: seed of the resampling; the same seed and number of documents resample the same documents, so
            intervals of two runs measured on the same documents are paired.

    Returns:
        (value, low, high). With one document there is nothing to resample: low and high are NaN.
    """
    num, den = np.asarray(numerator, dtype=np.float64), np.asarray(denominator, dtype=np.float64)
    assert num.shape == den.shape == (len(num),), (num.shape, den.shape)
    value = float(num.sum() / den.sum())
    if len(num) == 1:
        return value, float("nan"), float("nan")
    counts = resample_counts(len(num), num_resamples, seed)
    ratios = (counts @ num) / (counts @ den)
    low, high = np.quantile(ratios, [(1 - level) / 2, (1 + level) / 2])
    return value, float(low), float(high)


def resample_counts(num_documents: int, num_resamples: int, seed: int) -> np.ndarray:
    """How often each document occurs in each bootstrap resample, shape (num_resamples, num_documents)."""
    rng = np.random.default_rng(seed)
    shares = np.full(num_documents, 1 / num_documents)
    return rng.multinomial(num_documents, shares, size=num_resamples)

"""Intervals: a number measured on text is a ratio of sums over documents, and documents are what is resampled.

Answers to questions are right or wrong, independent and paired: Wilson's interval, and McNemar's exact test.
"""

from __future__ import annotations

import math
from statistics import NormalDist

import numpy as np
from numpy.typing import ArrayLike


def bootstrap_ratio(
    numerator: ArrayLike,
    denominator: ArrayLike,
    *,
    num_resamples: int = 2000,
    level: float = 0.95,
    seed: int = 0,
    counts: np.ndarray | None = None,
) -> tuple[float, float, float]:
    """Σ numerator / Σ denominator over documents, with a percentile interval by bootstrap over documents.

    Args:
        numerator: per-document sums, shape (documents,), e.g. nats.
        denominator: per-document sizes, shape (documents,), e.g. tokens.
        num_resamples: bootstrap resamples.
        level: coverage of the interval.
        seed: seed of the resampling; the same seed and number of documents resample the same documents, so
            intervals of two runs measured on the same documents are paired.
        counts: what `resample_counts` gave for as many documents, for several ratios over the same ones.

    Returns:
        (value, low, high). With one document there is nothing to resample: low and high are NaN.
    """
    num, den = np.asarray(numerator, dtype=np.float64), np.asarray(denominator, dtype=np.float64)
    assert num.shape == den.shape == (len(num),), (num.shape, den.shape)
    value = float(num.sum() / den.sum())
    if len(num) == 1:
        return value, float("nan"), float("nan")
    counts = resample_counts(len(num), num_resamples, seed) if counts is None else counts
    ratios = (counts @ num) / (counts @ den)
    low, high = np.quantile(ratios, [(1 - level) / 2, (1 + level) / 2])
    return value, float(low), float(high)


def resample_counts(num_documents: int, num_resamples: int, seed: int) -> np.ndarray:
    """How often each document occurs in each bootstrap resample, shape (num_resamples, num_documents)."""
    rng = np.random.default_rng(seed)
    shares = np.full(num_documents, 1 / num_documents)
    return rng.multinomial(num_documents, shares, size=num_resamples)


def share_interval(count: int, total: int, *, level: float = 0.95) -> tuple[float, float, float]:
    """A share of independent questions with Wilson's score interval (Wilson 1927): (value, low, high).

    A bootstrap of answers that are all alike has no width, as if nothing were left to learn; this one has.
    """
    assert 0 <= count <= total > 0, (count, total)
    z = NormalDist().inv_cdf((1 + level) / 2)
    share, scale = count / total, 1 + z * z / total
    middle = (share + z * z / (2 * total)) / scale
    half = z / scale * math.sqrt(share * (1 - share) / total + z * z / (4 * total * total))
    return share, 0.0 if count == 0 else middle - half, 1.0 if count == total else middle + half


def mcnemar(lost: int, won: int) -> float:
    """Exact two-sided McNemar test (McNemar 1947): p of so uneven a split, or a more uneven one, by chance alone.

    Args:
        lost, won: questions right before and wrong after, and the reverse; the others say nothing of a change.
    """
    total, fewer = lost + won, min(lost, won)
    ways = tail = 1  # ways of choosing k of `total`, and their sum up to `fewer`: whole numbers, so exact
    for k in range(fewer):
        ways = ways * (total - k) // (k + 1)
        tail += ways
    return min(1.0, 2 * tail / 2**total)

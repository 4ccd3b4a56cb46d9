"""Confidence intervals. A number measured on text is a ratio of sums over documents: the bootstrap resamples documents.

Answers to questions are binary, independent and paired: Wilson's and Tango's intervals, McNemar's exact test.
"""

from __future__ import annotations

import math
from statistics import NormalDist

import numpy as np
from numpy.typing import ArrayLike
from scipy.special import bdtr, stdtrit

MAX_WIDENING = 3.0  # cap on each side, in Student's t: an outlier among few documents would widen it hundredfold
Z = NormalDist().inv_cdf(0.975)  # for 95% intervals of answers
MIN_SPREAD = 1e-9  # as a share of a resample's sum of squares; anything less is rounding error


def bootstrap_ratio(
    numerator: ArrayLike,
    denominator: ArrayLike,
    *,
    num_resamples: int = 2000,
    level: float = 0.95,
    seed: int = 0,
    counts: np.ndarray | None = None,
    within: tuple[float, float] = (-math.inf, math.inf),
) -> tuple[float, float, float]:
    """Σ numerator / Σ denominator over documents, with a bootstrap-t interval over documents (Efron 1982).

    Each resample gives the ratio's error over its own linearised standard error; the standard error of the sample is
    the leave-one-out (jackknife) one. Each side is widened by √(n/(n−1)), is at least as wide as Student's t with n−1
    degrees of freedom, and at most `MAX_WIDENING` times as wide. A percentile interval is too narrow for few documents,
    unequal lengths and skewed values: docs/measuring.md has the coverage of both.

    Args:
        numerator: sum per document, shape (documents,), e.g. in nats.
        denominator: size of each document, shape (documents,), not negative, e.g. in tokens.
        num_resamples: bootstrap resamples.
        level: coverage of the interval.
        seed: seed of the resampling; one seed and number of documents give the same resamples, so intervals of two
            runs measured on the same documents are paired.
        counts: the result of `resample_counts`, to share it between ratios over the same documents.
        within: the smallest and largest value that the ratio can have.

    Returns:
        (value, low, high), low ≤ value ≤ high. If fewer than two documents have a size, low and high are NaN; if none
        has, so is the value.

    >>> [round(number, 2) for number in bootstrap_ratio([3.0, 5.0, 1.0, 8.0], [2, 4, 1, 5])]
    [1.42, 0.36, 2.17]
    """
    num, den = np.asarray(numerator, dtype=np.float64), np.asarray(denominator, dtype=np.float64)
    assert num.shape == den.shape == (len(num),), (num.shape, den.shape)
    total, size = float(den.sum()), len(num)
    value = float(num.sum() / total) if total else math.nan
    if np.count_nonzero(den) < 2:
        return value, math.nan, math.nan
    residual = num - value * den  # one residual per document; they sum to 0
    leave_one_out = math.sqrt((size - 1) / size * float(np.square(residual / (1 - den / total)).sum())) / total
    student = float(stdtrit(size - 1, (1 + level) / 2))
    counts = resample_counts(size, num_resamples, seed) if counts is None else counts
    with np.errstate(divide="ignore", invalid="ignore"):
        error = (counts @ residual) / (counts @ den)
        square = counts @ residual**2
        spread = square - 2 * error * (counts @ (residual * den)) + error**2 * (counts @ den**2)
        spread[spread < MIN_SPREAD * square] = 0.0
        studentized = error * (counts @ den) / np.sqrt(spread * size / (size - 1))
    studentized[np.isnan(studentized) | (counts.max(axis=1) == size)] = 0.0  # a single document has no spread
    limit = MAX_WIDENING * student
    low, high = np.quantile(studentized.clip(-limit, limit), [(1 - level) / 2, (1 + level) / 2])
    widened = math.sqrt(size / (size - 1))
    below, above = (max(widened * float(end), student) * leave_one_out for end in (high, -low))
    return value, min(value, max(value - below, within[0])), max(value, min(value + above, within[1]))


def resample_counts(num_documents: int, num_resamples: int, seed: int) -> np.ndarray:
    """How often each document occurs in each bootstrap resample, shape (num_resamples, num_documents)."""
    rng = np.random.default_rng(seed)
    shares = np.full(num_documents, 1 / num_documents)
    return rng.multinomial(num_documents, shares, size=num_resamples).astype(np.float64)


def share_interval(count: int, total: int) -> tuple[float, float, float]:
    """A share of independent questions with Wilson's 95% score interval (Wilson 1927): (value, low, high).

    Unlike a bootstrap interval, it keeps a width where all answers are right, or all wrong.

    >>> [round(number, 2) for number in share_interval(10, 10)]
    [1.0, 0.72, 1.0]
    """
    assert 0 <= count <= total > 0, (count, total)
    share, scale = count / total, 1 + Z * Z / total
    middle = (share + Z * Z / (2 * total)) / scale
    half = Z / scale * math.sqrt(share * (1 - share) / total + Z * Z / (4 * total * total))
    return share, 0.0 if count == 0 else middle - half, 1.0 if count == total else middle + half


def paired_change_interval(lost: int, won: int, total: int) -> tuple[float, float, float]:
    """The change of a share on the same questions, after − before: (value, low, high), Tango's 95% score interval.

    Tango 1998, Statistics in Medicine 17:891: all changes that the score test does not reject, so it contains 0 where
    McNemar's statistic is below z². Where nothing changed, each side is as wide as Wilson's interval of 0 in `total`.

    Args:
        lost, won: number of questions right before and wrong after, and the reverse.
        total: number of all questions.
    """
    assert 0 <= lost + won <= total > 0, (lost, won, total)

    def lower_end(fewer: int, more: int) -> float:
        low, high = -1.0, (more - fewer) / total
        while low < (change := (low + high) / 2) < high:
            linear = fewer + more - (2 * total - more + fewer) * change
            # The maximum-likelihood share of `fewer` at this change.
            share = (linear + math.sqrt(linear**2 + 8 * total * fewer * change * (1 - change))) / (4 * total)
            variance = total * max(2 * share + change * (1 - change), 0.0)
            low, high = (change, high) if more - fewer - total * change > Z * math.sqrt(variance) else (low, change)
        return high

    return (won - lost) / total, lower_end(lost, won), -lower_end(won, lost)


def mcnemar(lost: int, won: int) -> float:
    """Exact two-sided McNemar test (McNemar 1947): p-value of a split at least this uneven, by chance alone.

    Args:
        lost, won: number of questions right before and wrong after, and the reverse; the others are irrelevant.

    >>> round(mcnemar(lost=9, won=1), 4)
    0.0215
    """
    return min(1.0, 2 * float(bdtr(min(lost, won), lost + won, 0.5)))

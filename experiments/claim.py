"""Judge a claim by paired differences over seeds: an interval, a verdict, and a test of equivalence."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from scipy.stats import t as student

from retain.statistics import share_interval


class Interval(NamedTuple):
    """An estimate with the ends of its interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return self.text(".3f")

    def text(self, form: str) -> str:
        return f"{self.value:{form}} [{self.low:{form}}, {self.high:{form}}]"

    def percent(self) -> str:
        return self.text(".1%")

    @property
    def sign(self) -> int:
        """1 or -1 if the whole interval lies above or below 0, else 0."""
        return (self.low > 0) - (self.high < 0)

    def widened(self, other: Interval) -> Interval:
        """The same estimate, with an interval that covers both intervals and the estimate."""
        return Interval(self.value, min(self.value, self.low, other.low), max(self.value, self.high, other.high))


def over_seeds(values: Sequence[float], level: float = 0.95) -> Interval:
    """Mean and Student's t interval, which has no width for one value.

    >>> print(over_seeds([1.0, 2.0, 3.0]))
    2.000 [-0.484, 4.484]
    """
    mean, count = float(np.mean(values)), len(values)
    if count < 2:
        return Interval(mean, mean, mean)
    half = float(student.ppf((1 + level) / 2, count - 1)) * float(np.std(values, ddof=1)) / math.sqrt(count)
    return Interval(mean, mean - half, mean + half)


def ratio_over_seeds(values: Sequence[float]) -> Interval:
    """Geometric mean of ratios and Student's t interval, computed on their logarithms."""
    return Interval(*(float(np.exp(end)) for end in over_seeds(np.log(values))))


@dataclass(frozen=True)
class Claim:
    """A claim about a difference that is measured with every seed, in pairs; fixed before the runs.

    Args:
        differences: one per seed.
        direction: their sign according to the claim.
        margin: a difference of at most this size does not matter; 0 if none was fixed beforehand.
        first_look: number of seeds at a first look after which more were added; each look then gets half of the 5%.
            (Two looks at plain 95% intervals find a difference where there is none in 9% of studies, not in 5%.)

    >>> Claim([-0.2, -0.3, -0.25], direction=-1).verdict
    'reproduced'
    >>> Claim([-0.2, 0.3, 0.1], direction=-1).verdict
    'cannot tell'
    >>> Claim([0.001, -0.002, 0.0], direction=-1, margin=0.01).verdict
    'equivalent'
    >>> Claim([-0.007, -0.012, -0.006], direction=-1, margin=0.01).verdict
    'direction only'
    """

    differences: Sequence[float]
    direction: int = 1
    margin: float = 0.0
    first_look: int | None = None

    @property
    def looks(self) -> int:
        return 1 if self.first_look is None or len(self.differences) <= self.first_look else 2

    @property
    def estimate(self) -> Interval:
        """Mean and 95% interval, not corrected for looks."""
        return over_seeds(self.differences)

    @property
    def interval(self) -> Interval:
        """Mean and 95% interval, corrected for looks, which decides."""
        return over_seeds(self.differences, 1 - 0.05 / self.looks)

    @property
    def agrees(self) -> int:
        """1 if the whole interval has the claimed sign, -1 if it has the other, 0 if it contains 0."""
        return self.direction * self.interval.sign

    @property
    def equivalent(self) -> bool:
        """Whether two one-sided tests at 5%, corrected for looks, put the difference within the margin."""
        if len(self.differences) < 2:
            return False
        _, low, high = over_seeds(self.differences, 1 - 0.1 / self.looks)
        return -self.margin < low and high < self.margin

    @property
    def verdict(self) -> str:
        """reproduced, not reproduced, equivalent, cannot tell, or direction only: no more than the margin."""
        if self.equivalent:
            return "equivalent"
        if self.agrees == 1 and abs(self.interval.value) <= self.margin:
            return "direction only"
        return {1: "reproduced", 0: "cannot tell", -1: "not reproduced"}[self.agrees]

    @property
    def alike(self) -> str:
        """The verdict on a claim of equality: reproduced if equivalent, not if the interval lies beyond the margin."""
        apart = self.interval.low > self.margin or self.interval.high < -self.margin
        return "reproduced" if self.equivalent else "not reproduced" if apart else "cannot tell"

    @property
    def later_seeds(self) -> str:
        """The corrected interval, and the estimate of only the seeds added after the first look; empty for one look."""
        first, last = self.first_look or 0, len(self.differences) - 1
        if self.looks < 2 or last <= first:
            return ""
        _, low, high = self.interval
        added = f"seeds {first} to {last}, added after the first, alone {over_seeds(self.differences[first:])}"
        return f"corrected for two looks [{low:.3f}, {high:.3f}]; {added}"


def yes_or_no(verdict: str) -> str:
    """The verdict on a claim that no paper makes, so it is not a reproduction."""
    return {"reproduced": "yes", "not reproduced": "no"}.get(verdict, verdict)


def share_text(count: int, total: int) -> str:
    """A share with Wilson's 95% interval, in words; a dash if the total is 0."""
    if not total:
        return "–"
    return f"{count} of {total}: " + Interval(*share_interval(count, total)).text(".0%")

"""Runs read at the same new-task loss, and intervals of what replay prevented there. Plain dicts in, numbers out."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.stats import t as student

from retain.report.comparison import crossing, series
from retain.statistics import bootstrap_ratio, share_interval

# What is judged. Forgetting on the base's own rows is left out: there it is their ref_kl with sampling noise.
MEASURES = (("prose", "forgetting"), ("prose", "ref_kl"), ("self-generated", "ref_kl"))
GRAIN = 10_000
FIRST_LOOK = 3  # seeds of 07, 08, 09 and 13 before others were added, where a question was open


class NoReport(ValueError):
    """Nothing can be told: of no run, of one that learned too little, of rows that do not belong together."""


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds. The interval is the wider of two: Student's t over seeds, bootstrap over documents."""

    value: float
    low: float
    high: float
    seeds: int
    documents: int

    def __str__(self) -> str:
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"

    def percent(self) -> str:
        return f"{self.value:.1%} [{self.low:.1%}, {self.high:.1%}]"


@dataclass(frozen=True)
class Reading:
    """A run where its new-task loss crosses the target: the step, and means per document of every text and metric."""

    step: float
    documents: dict[tuple[str, str], np.ndarray]

    def value(self, text: str, metric: str) -> float:
        return float(self.documents[text, metric].mean())


def target_loss(plain: Sequence[dict[str, Any]], share: float) -> float:
    """The new-task loss at which a share of the gain of the plain runs (mean of their best) has been made."""
    curves = [series(row, "eval_loss")[1] for row in plain]
    start, best = curves[0][0], float(np.mean([min(losses) for losses in curves]))
    return start - share * (start - best)


def read_at(row: dict[str, Any], target: float) -> Reading | None:
    """Linear between the two evaluations around the first crossing; None where a run never came down so far."""
    steps, losses = series(row, "eval_loss")
    step = crossing(steps, losses, target)
    if step is None:
        return None
    return Reading(step, {measure: documents_at(row, *measure, step) for measure in MEASURES})


def documents_at(row: dict[str, Any], text: str, metric: str, step: float) -> np.ndarray:
    """Means per document at a step, linear between evaluations; nats per token."""
    known = {
        found["step"]: np.asarray(found[metric]) / GRAIN
        for found in row["documents"]
        if found["name"] == text and metric in found
    }
    before, after = max(s for s in known if s <= step), min(s for s in known if s >= step)
    part = (step - before) / (after - before) if after > before else 0.0
    return (1 - part) * known[before] + part * known[after]


def mean_of(readings: Sequence[Reading], text: str, metric: str) -> Estimate:
    """Mean over runs of one metric, nats per token."""
    values = [reading.value(text, metric) for reading in readings]
    documents = np.mean([reading.documents[text, metric] for reading in readings], axis=0)
    return _estimate(values, documents, np.ones(len(documents)), flip=False)


def prevented(cells: Sequence[Reading], plain: Sequence[Reading], text: str, metric: str) -> Estimate:
    """1 − cell / plain, paired by seed: the share of the plain runs' change that these runs did not have."""
    pairs = list(zip(cells, plain, strict=True))
    values = [1 - cell.value(text, metric) / bare.value(text, metric) for cell, bare in pairs]
    above = np.mean([cell.documents[text, metric] for cell, _ in pairs], axis=0)
    below = np.mean([bare.documents[text, metric] for _, bare in pairs], axis=0)
    return _estimate(values, above, below, flip=True)


def _estimate(values: Sequence[float], above: np.ndarray, below: np.ndarray, *, flip: bool) -> Estimate:
    mean = float(np.mean(values))
    _, low, high = bootstrap_ratio(above, below)
    if flip:
        low, high = 1 - high, 1 - low
    low_seeds, high_seeds = t_interval(values)
    low, high = min(mean, low, low_seeds), max(mean, high, high_seeds)
    return Estimate(mean, low, high, len(values), len(above))


def t_interval(values: Sequence[float], level: float = 0.95) -> tuple[float, float]:
    """Student's t interval of the mean; a point where there is one value."""
    mean, number = float(np.mean(values)), len(values)
    if number < 2:
        return mean, mean
    half = float(student.ppf((1 + level) / 2, number - 1)) * float(np.std(values, ddof=1)) / math.sqrt(number)
    return mean - half, mean + half


def looked_twice(values: Sequence[float]) -> tuple[float, float]:
    """The 95% interval of seeds of which the last were added after a look at the first: each look has half of the 5%.

    Two looks at plain 95% intervals find a difference that is not there in 9% of studies, not in 5%.
    """
    return t_interval(values, 0.975 if len(values) > FIRST_LOOK else 0.95)


def sign_of(values: Sequence[float]) -> int:
    """1 or -1 where the interval, corrected where seeds were added, lies above or below 0 as a whole, else 0."""
    low, high = looked_twice(values)
    return 1 if low > 0 else -1 if high < 0 else 0


def second_look(values: Sequence[float], digits: int = 3) -> str:
    """What the seeds added after the first look say by themselves, beside the corrected interval; empty without any."""
    if len(values) < FIRST_LOOK + 2:
        return ""
    (low, high), (least, most) = looked_twice(values), t_interval(values[FIRST_LOOK:])
    both, alone = f"[{low:.{digits}f}, {high:.{digits}f}]", f"[{least:.{digits}f}, {most:.{digits}f}]"
    added = f"seeds {FIRST_LOOK} to {len(values) - 1}, added after the first, alone"
    return f"corrected for two looks {both}; {added} {np.mean(values[FIRST_LOOK:]):.{digits}f} {alone}"


def share(count: int, total: int) -> str:
    """A share with Wilson's 95% interval, in words; a dash of nothing."""
    if not total:
        return "–"
    value, low, high = share_interval(count, total)
    return f"{count} of {total}: {value:.0%} [{low:.0%}, {high:.0%}]"

"""Runs read at the same new-task loss, and intervals of what replay prevented there. Plain dicts in, numbers out."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from experiments.claim import Interval, over_seeds
from retain.report.comparison import first_crossing
from retain.report.results import series
from retain.statistics import bootstrap_ratio

# What is judged. Forgetting on the base's own rows is left out: there it is their ref_kl with sampling noise.
MEASURES = (("prose", "forgetting"), ("prose", "ref_kl"), ("self-generated", "ref_kl"))
GRAIN = 10_000


@dataclass(frozen=True)
class Reading:
    """A run where its new-task loss crosses the target: the step, and means per document of every text and metric."""

    step: float
    documents: dict[tuple[str, str], np.ndarray]

    def value(self, text: str, metric: str) -> float:
        return float(self.documents[text, metric].mean())


def target_loss(plain: Sequence[dict[str, Any]], share: float) -> float:
    """The new-task loss at which a share of the gain of the plain runs (mean of their best) has been made."""
    curves = [series(row["trajectory"], "eval_loss")[1] for row in plain]
    start, best = curves[0][0], float(np.mean([min(losses) for losses in curves]))
    return start - share * (start - best)


def read_at(row: dict[str, Any], target: float) -> Reading | None:
    """Linear between the two evaluations around the first crossing; None where a run never came down so far."""
    steps, losses = series(row["trajectory"], "eval_loss")
    step = first_crossing(steps, losses, target)
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


def mean_of(readings: Sequence[Reading], text: str, metric: str) -> Interval:
    """Mean over runs of one metric, nats per token."""
    values = [reading.value(text, metric) for reading in readings]
    documents = np.mean([reading.documents[text, metric] for reading in readings], axis=0)
    return _estimate(values, documents, np.ones(len(documents)), flip=False)


def prevented(cells: Sequence[Reading], plain: Sequence[Reading], text: str, metric: str) -> Interval:
    """1 − cell / plain, paired by seed: the share of the plain runs' change that these runs did not have."""
    pairs = list(zip(cells, plain, strict=True))
    values = [1 - cell.value(text, metric) / bare.value(text, metric) for cell, bare in pairs]
    above = np.mean([cell.documents[text, metric] for cell, _ in pairs], axis=0)
    below = np.mean([bare.documents[text, metric] for _, bare in pairs], axis=0)
    return _estimate(values, above, below, flip=True)


def _estimate(values: Sequence[float], above: np.ndarray, below: np.ndarray, *, flip: bool) -> Interval:
    """The interval is the wider of two: Student's t over seeds, bootstrap over documents."""
    _, low, high = bootstrap_ratio(above, below)
    found = over_seeds(values)
    return found.widened(Interval(found.value, 1 - high, 1 - low) if flip else Interval(found.value, low, high))


def by_settings(rows: Iterable[dict[str, Any]]) -> list[tuple[dict[str, Any], dict[int, dict[str, Any]]]]:
    """Runs that differ in their seed alone: their settings, and the rows by seed; in the order of the rows."""
    groups: dict[str, dict[int, dict[str, Any]]] = {}
    for row in rows:
        key = {"name": row.get("name"), **row["settings"], "seed": None}
        groups.setdefault(json.dumps(key), {})[row["settings"]["seed"]] = row
    settings = [{name: value for name, value in json.loads(key).items() if value is not None} for key in groups]
    return [(one, dict(sorted(of.items()))) for one, of in zip(settings, groups.values(), strict=True)]


@dataclass(frozen=True)
class Seeds:
    """Runs that differ in their seed alone, each read at the target loss (None: never came down so far)."""

    settings: dict[str, Any]
    readings: dict[int, Reading | None]

    @property
    def reached(self) -> bool:
        return all(reading is not None for reading in self.readings.values())

    def mean(self, text: str, metric: str) -> Interval:
        return mean_of([reading for reading in self.readings.values() if reading], text, metric)

    @property
    def last_step(self) -> float:
        """Steps to the target loss, mean over seeds."""
        return float(np.mean([reading.step for reading in self.readings.values() if reading]))

    def against(self, plain: Seeds, text: str, metric: str) -> Interval:
        """What was prevented of that which the plain runs lost, paired by seed."""
        pairs = [(one, plain.readings.get(seed)) for seed, one in self.readings.items()]
        both = [(one, bare) for one, bare in pairs if one and bare]
        return prevented([one for one, _ in both], [bare for _, bare in both], text, metric)

"""Read runs at the same new-task loss, with intervals of the share of forgetting that replay prevents there."""

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

# Judged (text, metric). Forgetting on the base's own rows is left out: it is their ref_kl plus sampling noise.
MEASURES = (("prose", "forgetting"), ("prose", "ref_kl"), ("self-generated", "ref_kl"))
GRAIN = 10_000  # results store nats per token as whole multiples of 1/GRAIN


@dataclass(frozen=True)
class Reading:
    """A run at the step where its new-task loss crosses the target."""

    step: float
    documents: dict[tuple[str, str], np.ndarray]  # (text, metric) → mean of each document, nats per token

    def value(self, text: str, metric: str) -> float:
        return float(self.documents[text, metric].mean())


def target_loss(plain: Sequence[dict[str, Any]], share: float) -> float:
    """The new-task loss at which the plain runs have made this share of their gain (the mean of their best)."""
    curves = [series(row["trajectory"], "eval_loss")[1] for row in plain]
    start, best = curves[0][0], float(np.mean([min(losses) for losses in curves]))
    return start - share * (start - best)


def read_at(row: dict[str, Any], target: float) -> Reading | None:
    """Read a run at the first crossing, linear between the evaluations around it; None if it never gets there."""
    steps, losses = series(row["trajectory"], "eval_loss")
    step = first_crossing(steps, losses, target)
    if step is None:
        return None
    return Reading(step, {measure: documents_at(row, *measure, step) for measure in MEASURES})


def documents_at(row: dict[str, Any], text: str, metric: str, step: float) -> np.ndarray:
    """Mean of each document at a step, linear between evaluations; nats per token."""
    at_step = {
        evaluation["step"]: np.asarray(evaluation[metric]) / GRAIN
        for evaluation in row["documents"]
        if evaluation["name"] == text and metric in evaluation
    }
    before, after = max(s for s in at_step if s <= step), min(s for s in at_step if s >= step)
    weight = (step - before) / (after - before) if after > before else 0.0
    return (1 - weight) * at_step[before] + weight * at_step[after]


def mean_of(readings: Sequence[Reading], text: str, metric: str) -> Interval:
    """Mean of one metric over runs, nats per token."""
    values = [reading.value(text, metric) for reading in readings]
    documents = np.mean([reading.documents[text, metric] for reading in readings], axis=0)
    return _estimate(values, documents, np.ones(len(documents)), flip=False)


def prevented(protected: Sequence[Reading], plain: Sequence[Reading], text: str, metric: str) -> Interval:
    """1 − protected / plain, paired by seed: the share of the plain runs' change that was prevented."""
    values = [
        1 - run.value(text, metric) / bare.value(text, metric) for run, bare in zip(protected, plain, strict=True)
    ]
    numerator = np.mean([run.documents[text, metric] for run in protected], axis=0)
    denominator = np.mean([bare.documents[text, metric] for bare in plain], axis=0)
    return _estimate(values, numerator, denominator, flip=True)


def _estimate(values: Sequence[float], numerator: np.ndarray, denominator: np.ndarray, *, flip: bool) -> Interval:
    """Mean over seeds, with the union of Student's t interval over seeds and the bootstrap over documents."""
    _, low, high = bootstrap_ratio(numerator, denominator)
    mean = over_seeds(values)
    return mean.widened(Interval(mean.value, 1 - high, 1 - low) if flip else Interval(mean.value, low, high))


def by_settings(rows: Iterable[dict[str, Any]]) -> list[tuple[dict[str, Any], dict[int, dict[str, Any]]]]:
    """Groups of runs that differ only in their seed, in the order of the rows: settings, and rows by seed."""
    groups: dict[str, dict[int, dict[str, Any]]] = {}
    for row in rows:
        key = {"name": row.get("name"), **row["settings"], "seed": None}
        groups.setdefault(json.dumps(key), {})[row["settings"]["seed"]] = row
    settings = [{name: value for name, value in json.loads(key).items() if value is not None} for key in groups]
    return [(shared, dict(sorted(group.items()))) for shared, group in zip(settings, groups.values(), strict=True)]


@dataclass(frozen=True)
class Seeds:
    """Runs that differ only in their seed, each read at the target loss (None: never reached it)."""

    settings: dict[str, Any]
    readings: dict[int, Reading | None]

    @property
    def reached(self) -> bool:
        return all(reading is not None for reading in self.readings.values())

    def mean(self, text: str, metric: str) -> Interval:
        return mean_of([reading for reading in self.readings.values() if reading], text, metric)

    @property
    def last_step(self) -> float:
        """Mean number of steps to the target loss."""
        return float(np.mean([reading.step for reading in self.readings.values() if reading]))

    def against(self, plain: Seeds, text: str, metric: str) -> Interval:
        """The share of the plain runs' change that these runs prevented, paired by seed."""
        pairs = [(run, plain.readings.get(seed)) for seed, run in self.readings.items()]
        both = [(run, bare) for run, bare in pairs if run and bare]
        return prevented([run for run, _ in both], [bare for _, bare in both], text, metric)

"""Several runs of one base side by side: at the same new-task loss, at their ends, and which of them no other beats."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from retain.report.metrics import KEPT_SUMS, METRICS
from retain.report.numbers import Estimate, enumeration, quantity
from retain.report.results import KeptSums, ReportRuns, RunResults, TextResult, names_of_texts
from retain.statistics import bootstrap_ratio

INTERVAL_LEVEL = 0.95
NUM_RESAMPLES = 2000
COMPARED = ("ref_kl", "forgetting")  # nats per token
# Settings of `retain measure` that decide a number; the device and `batch_tokens` only round it.
DECIDING = ("max_length", "max_windows", "start_token", "tokenizer_fingerprint", "dtype", "attn_implementation")
MAX_BASE_ROUNDING = 0.25  # nats per √tokens of a document: what bfloat16 and kernels move the base's own loss
MIN_RATE_RATIO = 0.9  # of the lower to the higher learning rate; between logged steps a schedule is read as a line

Bounds = Sequence[float]
Point = tuple[float, float]
Sums = Mapping[str, np.ndarray]  # per document, nats: ref_kl, loss, base_loss, forgetting; and num_tokens


@dataclass(frozen=True)
class Mismatch:
    """Why a run is not compared, and with which."""

    to: str
    why: str


@dataclass(frozen=True)
class ComparedRun:
    """Where one run is read, in steps and new-task loss (nats per token)."""

    name: str
    matched_step: float | None
    learning_rate: float | None
    final_step: float | None
    final_loss: float | None
    relative_loss_difference: float | None
    kept: bool
    unlike: Mismatch | None


@dataclass(frozen=True)
class ComparedText:
    """One run on one text: nats per token, and the share of the first run's `ref_kl` that did not happen."""

    name: str
    step: float | None
    ref_kl: float | None = None
    ref_kl_ci: Bounds | None = None
    forgetting: float | None = None
    forgetting_ci: Bounds | None = None
    prevented: float | None = None
    prevented_ci: Bounds | None = None
    note: str | None = None
    num_documents: int | None = None
    unlike: Mismatch | None = None


@dataclass(frozen=True)
class Comparison:
    """What `compare_at_matched_loss` found; `matched` and `end` hold for each text one entry per run."""

    reference: str | None
    matched_loss: float | None
    reason: str | None  # why there is no matched loss
    loss_text: str | None  # on which the final losses were measured; None is `eval_loss`
    measured_texts: list[str]
    runs: list[ComparedRun]
    warnings: list[str]
    matched: dict[str, list[ComparedText]]
    end: dict[str, list[ComparedText]]
    seed: int
    schema: str = "retain.comparison/1"
    level: float = INTERVAL_LEVEL
    num_resamples: int = NUM_RESAMPLES


def compare_at_matched_loss(runs: ReportRuns, seed: int = 0) -> Comparison:
    """Compare the forgetting of several runs of one base where they have learned equally much.

    Learning less is not forgetting less. `matched_loss` (nats per token) is the lowest new-task loss that every run
    reached; each run is read at its first crossing of it, linearly between the two evaluations around it.
    `prevented` = 1 - ref_kl(run) / ref_kl(first run). Intervals: bootstrap over documents, the same resampled
    documents in every run. They hold for these runs, not for other training seeds.

    A run that is annealed at that step has moved less than one in mid-schedule: `warnings` says where the learning
    rates there differ. A text that no run measured on its way is in `end` alone.

    The end of a run is the model that it left: what `retain measure` found of it, else the evaluation at its step. Each
    number is of one source in all runs, and is compared only where it was measured alike (`unlike` says where not).

    Raises:
        ValueError: if two runs have one name, or their bases differ.
    """
    _check_same_base(runs)
    matched_loss, reason = _matched_loss(runs)
    steps = [None if matched_loss is None else first_crossing(*run.series("eval_loss"), matched_loss) for run in runs]
    ends = [run.end_step for run in runs]
    loss_text, losses = _final_losses(runs, ends)
    texts = names_of_texts(runs)
    measured = [text for text in texts if _measured_in_all(runs, text)]
    matched = {text: _side_by_side(runs, steps, text, seed) for text in texts} if reason is None else {}
    matched = {text: entries for text, entries in matched.items() if any(e.ref_kl is not None for e in entries)}
    if texts and reason is None and not matched:
        reason = "no text was measured during training; give it to `retain finetune` as --retention"
    rates = [_interpolate(*run.series("learning_rate"), step) for run, step in zip(runs, steps, strict=True)]
    compared = []
    for at, run in enumerate(runs):
        relative, unlike = _loss_difference(runs, losses, at, loss_text)
        kept = run.kept_step is not None
        compared.append(ComparedRun(run.name, steps[at], rates[at], ends[at], losses[at], relative, kept, unlike))
    return Comparison(
        reference=runs[0].name if runs else None,
        matched_loss=matched_loss,
        reason=reason,
        loss_text=loss_text,
        measured_texts=measured,
        runs=compared,
        warnings=_rate_warnings(runs, steps, rates) + _token_warnings(runs) if matched else [],
        matched=matched,
        end={text: _side_by_side(runs, None if text in measured else ends, text, seed) for text in texts},
        seed=seed,
    )


def _loss_difference(
    runs: ReportRuns, losses: Sequence[float | None], at: int, loss_text: str | None
) -> tuple[float | None, Mismatch | None]:
    """The final loss of a run relative to that of the first, or why there is none."""
    why = _other_tokens(runs[0], runs[at]) if loss_text is None else mismatch(runs[0], runs[at], loss_text)
    if why:
        return None, Mismatch(runs[0].name, why)
    loss, of_first = losses[at], losses[0]
    return loss / of_first - 1 if at and loss and of_first else None, None


def first_crossing(steps: Sequence[float], losses: Sequence[float], target: float) -> float | None:
    """First step, linearly interpolated, at which the loss comes down to `target` (nats per token).

    None when it never does, or when it is below already at the first evaluation: then nobody saw it cross.

    >>> first_crossing([0, 10, 20], [4.0, 3.0, 2.0], 2.5)
    15.0
    """
    below = next((i for i, loss in enumerate(losses) if loss <= target), None)
    if not below:
        return float(steps[0]) if below == 0 and losses[0] == target else None
    before, after = losses[below - 1], losses[below]
    share = (before - target) / (before - after)
    return float(steps[below - 1] + share * (steps[below] - steps[below - 1]))


def _rate_warnings(runs: ReportRuns, steps: Sequence[float | None], rates: Sequence[float | None]) -> list[str]:
    """A sentence where the learning rates at the steps compared differ: one run may be annealed, another not."""
    read = zip(runs, steps, rates, strict=True)
    known = [(run.name, step, rate) for run, step, rate in read if step is not None and rate is not None]
    found = [rate for _, _, rate in known]
    if len(found) < 2 or min(found) >= MIN_RATE_RATIO * max(found):
        return []
    listed = ", ".join(f"{rate:.2g} in “{name}” (step {step:.3g})" for name, step, rate in known)
    return [
        f"The learning rates differ where the runs are compared: {listed}. A lower rate can forget less at the same "
        "loss, so part of the difference may be the schedule's. Compare runs at a constant rate, or runs that end at "
        "that loss."
    ]


def _token_warnings(runs: ReportRuns) -> list[str]:
    """A sentence where some runs say which tokens their `eval_loss` counts and others, as of other trainers, do not."""
    known = {run.trained_tokens: run.name for run in runs if run.trained_tokens}
    unknown = ", ".join(f"“{run.name}”" for run in runs if not run.trained_tokens)
    return [
        f"Which tokens the new-task loss counts is not known of {unknown}; that of “{name}” counts {tokens}. They are "
        "compared as if it were the same loss."
        for tokens, name in known.items()
        if unknown
    ]


def _check_same_base(runs: ReportRuns) -> None:
    names = [run.name for run in runs]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"runs: two are named {twice[0]!r}; give each run once, and a name of its own")
    fingerprints = {run.name: run.base.get("fingerprint") for run in runs}
    if len({fingerprint for fingerprint in fingerprints.values() if fingerprint}) > 1:
        raise ValueError(f"base.fingerprint differs between runs: {fingerprints}. Compare runs of one base.")


def _final_losses(runs: ReportRuns, ends: Sequence[float | None]) -> tuple[str | None, Sequence[float | None]]:
    """New-task losses at the ends, of one source: a text that all were measured on (its name), else `eval_loss`."""
    for text in runs[0].new_task if runs else ():
        found = [run.new_task.get(text, TextResult()).loss for run in runs]
        if all(found):
            return text, [loss.value for loss in found if loss]
    losses = [_interpolate(*run.series("eval_loss"), end) for run, end in zip(runs, ends, strict=True)]
    return None, [None] * len(runs) if None in losses else losses


def _measured_in_all(runs: ReportRuns, text: str) -> bool:
    """Whether every run that knows a text has what `retain measure` found on it."""
    found = [run.retention.get(text, TextResult()).ref_kl is not None for run in runs]
    followed = [bool(run.series(f"retention/{text}/ref_kl")[0]) for run in runs]
    return any(found) and all(one or not other for one, other in zip(found, followed, strict=True))


def mismatch(run: RunResults, other: RunResults, text: str) -> str | None:
    """How `other` was measured on a text, where that was otherwise than `run` in what decides the numbers."""
    ours, theirs = (
        {key: re.sub(r"(\(id \d+\)): .*", r"\1", str(value)) for key, value in one.settings.items()}
        for one in (run, other)
    )
    known = [key for key in DECIDING if key in ours and key in theirs]  # older reports have fewer
    if differing := [f"{key} {theirs[key]}, not {ours[key]}" for key in known if ours[key] != theirs[key]]:
        return f"measured with {'; '.join(differing)}"
    counted = [one.loss_tokens(text) for one in (run, other)]
    if all(counted) and counted[0] != counted[1]:
        return f"measured on {counted[1]}, not on {counted[0]}"
    sizes = [_size(one, text) for one in (run, other)]
    if sizes[0] and sizes[1] and sizes[0] != sizes[1]:
        return f"measured on other documents ({sizes[1]}; not {sizes[0]})"
    return _other_documents(_measured_sums(run, text), _measured_sums(other, text))


def _other_tokens(run: RunResults, other: RunResults) -> str | None:
    """Which other tokens the `eval_loss` of `other` counts than that of `run`, where both say."""
    ours, theirs = run.trained_tokens, other.trained_tokens
    return f"its loss counts {theirs}, not {ours}" if ours and theirs and ours != theirs else None


def _size(run: RunResults, text: str) -> str | None:
    loss = run.texts.get(text, TextResult()).loss
    if loss is None or not (loss.num_documents and loss.num_tokens):
        return None
    return f"{quantity(loss.num_documents, 'document')}, {quantity(loss.num_tokens, 'token')}"


def _other_documents(ours: Sums | None, theirs: Sums | None) -> str | None:
    """Documents are known by their lengths and by the base's own loss on each; None where they are the same."""
    if ours is None or theirs is None:
        return None
    if np.array_equal(ours["num_tokens"], theirs["num_tokens"]):
        apart = np.abs(ours["base_loss"] - theirs["base_loss"])
        if np.all(apart <= MAX_BASE_ROUNDING * np.sqrt(ours["num_tokens"])):
            return None
    return "measured on other documents"


def _matched_loss(runs: ReportRuns) -> tuple[float | None, str | None]:
    """The lowest loss that every run reached, or None and why there is none."""
    if len(runs) < 2:
        return None, "there is only one run"
    curves = {run.name: run.series("eval_loss")[1] for run in runs}
    if blind := [name for name, losses in curves.items() if not losses]:
        blinded = f"no new-task loss was evaluated while training {enumeration(blind)}"
        return None, f"{blinded} (`retain finetune` does it with --eval_dataset_name FILE){_training_losses(runs)}"
    for run in runs:
        if why := _other_tokens(runs[0], run):
            return None, f"{run.name}: {why} as {runs[0].name}'s does"
    target = max(map(min, curves.values()))
    for name, losses in curves.items():
        if losses[0] < target:
            return None, f"{name} was already below the common loss {target:.3f} when first evaluated"
        if len(losses) > 1 and losses[0] == min(losses):
            return None, f"{name} did not learn: it never got below its first loss, {target:.3f}"
    return target, None


def _training_losses(runs: ReportRuns) -> str:
    """Where the training loss of each run ended, if all logged one: too noisy to compare at, it tells them apart."""
    last = {run.name: losses[-1] for run in runs if (losses := run.training_losses[1])}
    listed = enumeration([f"{loss:.3f} of {name}" for name, loss in last.items()])
    return f"; their training loss ended at {listed}" if len(last) == len(runs) else ""


def _side_by_side(runs: ReportRuns, steps: Sequence[float | None] | None, text: str, seed: int) -> list[ComparedText]:
    """One entry per run for one text, read at each run's own step, or what `retain measure` found where that is None.

    `prevented` is against the first run.
    """
    entries, sums = [], []
    for run, step in zip(runs, steps or [None] * len(runs), strict=True):
        found, of_run = _measured(run, text) if steps is None else _evaluated(run, text, step)
        numbers: dict[str, Any] = {metric: one.value for metric, one in found.items()}
        numbers |= {f"{metric}_ci": _bounds(metric, one, of_run, seed) for metric, one in found.items()}
        size = len(of_run["num_tokens"]) if of_run else None
        entries.append(ComparedText(run.name, step, **numbers, num_documents=size))
        sums.append(of_run)
    first = next((at for at, entry in enumerate(entries) if entry.ref_kl is not None), 0)
    for at, entry in enumerate(entries[1:], 1):
        why = mismatch(runs[first], runs[at], text) if steps is None else None
        why = why or _other_documents(sums[first], sums[at])
        if why and entry.ref_kl is not None:
            to = runs[first].name
            note: dict[str, Any] = {"unlike": Mismatch(to, why), "note": f"not compared with “{to}”: {why}"}
        else:
            note = _prevented(entries[0], entry, sums[0], sums[at], runs[0].floor(text), seed)
        entries[at] = replace(entry, **note)
    return entries


def _measured(run: RunResults, text: str) -> tuple[dict[str, Estimate], Sums | None]:
    """What `retain measure` found of the metrics in `COMPARED`, and sums per document."""
    found = run.retention.get(text, TextResult()).estimates
    return {metric: found[metric] for metric in COMPARED if metric in found}, _measured_sums(run, text)


def _evaluated(run: RunResults, text: str, step: float | None) -> tuple[dict[str, Estimate], Sums | None]:
    """The same from the evaluations around a step."""
    values = {metric: _interpolate(*run.series(f"retention/{text}/{metric}"), step) for metric in COMPARED}
    found = {metric: Estimate(value) for metric, value in values.items() if value is not None}
    return found, _sums_at(run, text, step)


def _bounds(metric: str, found: Estimate, sums: Sums | None, seed: int) -> list[float] | None:
    if found.ci or sums is None:
        return list(found.ci) if found.ci else None
    return _interval(sums[metric], sums["num_tokens"], seed, METRICS[metric].least)


def _prevented(
    first: ComparedText, entry: ComparedText, sums_of_first: Sums | None, sums: Sums | None, floor: float, seed: int
) -> dict[str, Any]:
    """Share of the first run's ref_kl that this run did not have, with a paired interval, or why there is none."""
    if entry.ref_kl is None or first.ref_kl is None:
        return {"note": "ref_kl was not measured at this point"}
    if first.ref_kl <= floor:
        return {"note": f"undefined: “{first.name}” did not move beyond the noise floor ({floor:.2g})"}
    value = 1 - entry.ref_kl / first.ref_kl
    if sums_of_first is None or sums is None:
        return {"prevented": value, "note": "no interval: no values per document"}
    ci = _interval(sums["ref_kl"], sums_of_first["ref_kl"], seed, 0.0)
    if ci is None:
        return {"prevented": value, "note": "no interval: too few documents"}
    return {"prevented": value, "prevented_ci": [1 - ci[1], 1 - ci[0]]}


def _interpolate(steps: list[float], values: list[float], step: float | None) -> float | None:
    if step is None or not steps or not steps[0] <= step <= steps[-1]:
        return None
    return float(np.interp(step, steps, values))


def _sums_at(run: RunResults, text: str, step: float | None) -> Sums | None:
    """Sums per document, linear between the two evaluations around `step`; None where none surround it."""
    rows = {row.step: row for row in run.documents if row.name == text}
    earlier = [s for s in rows if step is not None and s <= step]
    later = [s for s in rows if step is not None and s >= step]
    if step is None or not earlier or not later:
        return None
    before, after = rows[max(earlier)], rows[min(later)]
    share = (step - before.step) / (after.step - before.step) if after is not before else 0.0
    ours, theirs = _arrays(before), _arrays(after)
    mixed = {key: (1 - share) * ours[key] + share * theirs[key] for key in KEPT_SUMS}
    tokens = ours["num_tokens"]  # not mixed: rounding would make equal documents differ
    return mixed | {"forgetting": mixed["loss"] - mixed["base_loss"], "num_tokens": tokens}


def _measured_sums(run: RunResults, text: str) -> Sums | None:
    """Sums per document from `retain measure`; None in reports older than these sums."""
    return _arrays(run.per_document[text]) if text in run.per_document else None


def _arrays(sums: KeptSums) -> dict[str, np.ndarray]:
    found = {key: np.asarray(getattr(sums, key), float) for key in (*KEPT_SUMS, "num_tokens")}
    return found | {"forgetting": found["loss"] - found["base_loss"]}


def loss_difference(run: RunResults, other: RunResults, text: str) -> tuple[Estimate, Point] | None:
    """Loss of `run` minus that of `other` on one text at their ends, and the two; its interval pairs documents.

    None where one of them was not measured there, or they were not measured alike. Nats per token.
    """
    ours, theirs = (one.texts.get(text, TextResult()).loss for one in (run, other))
    if ours is None or theirs is None or mismatch(other, run, text):
        return None
    sums = [_measured_sums(one, text) for one in (run, other)]
    ci = None
    if sums[0] and sums[1]:
        ci = _interval(sums[0]["loss"] - sums[1]["loss"], sums[0]["num_tokens"], 0, -math.inf)
    return Estimate(ours.value - theirs.value, (ci[0], ci[1]) if ci else None), (ours.value, theirs.value)


def _interval(numerator: np.ndarray, denominator: np.ndarray, seed: int, least: float) -> list[float] | None:
    """95% interval of a ratio of sums that is at least `least`; None where the documents are too few to give one."""
    _, low, high = bootstrap_ratio(
        numerator, denominator, num_resamples=NUM_RESAMPLES, level=INTERVAL_LEVEL, seed=seed, within=(least, math.inf)
    )
    return [low, high] if math.isfinite(low) else None


def end_points(compared: Comparison, text: str | None = None) -> list[Point | None]:
    """(new-task loss, ref_kl) at the end of each run, nats per token; on one text, or the mean over all texts.

    None for a run that was not measured on all of them, or not alike.
    """
    texts = list(compared.end) if text is None else [text]
    found: list[Point | None] = []
    for at, run in enumerate(compared.runs):
        entries = [compared.end[name][at] for name in texts]
        moved = [entry.ref_kl for entry in entries if entry.ref_kl is not None and not entry.unlike]
        if run.final_loss is None or run.unlike or not moved or len(moved) < len(texts):
            found.append(None)
        else:
            found.append((run.final_loss, sum(moved) / len(moved)))
    return found


def dominators(points: Sequence[Point | None]) -> list[list[int]]:
    """For each point the places of those that are no worse on both numbers and better on one.

    The values alone decide, without regard to their intervals: a narrow win may be chance.

    >>> dominators([(2.0, 0.6), (2.5, 0.1), (2.5, 0.3)])
    [[], [], [1]]
    """
    return [
        [
            place
            for place, other in enumerate(points)
            if point and other and other != point and other[0] <= point[0] and other[1] <= point[1]
        ]
        for point in points
    ]


def frontier(points: Sequence[Point | None]) -> list[int]:
    """Places of the points that nobody dominates, the one that learned least first."""
    free = [place for place, beaten in enumerate(dominators(points)) if points[place] and not beaten]
    return sorted(free, key=lambda place: tuple(-number for number in points[place] or ()))

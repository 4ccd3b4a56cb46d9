"""Compare runs of one base: at the same new-task loss, at their ends, and by Pareto dominance."""

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
NUM_RESAMPLES, SEED = 2000, 0
COMPARED = ("ref_kl", "forgetting")  # nats per token
# Settings of `retain measure` that change its numbers; the device and `batch_tokens` only change their rounding.
DECIDING = ("max_length", "max_windows", "start_token", "tokenizer_fingerprint", "dtype", "attn_implementation")
MAX_BASE_ROUNDING = 0.25  # nats per √tokens of a document: what bfloat16 and kernels change in the base's own loss
MIN_RATE_RATIO = 0.9  # lower to higher learning rate; rates interpolated between logged steps are inexact

Bounds = Sequence[float]
Point = tuple[float, float]
Sums = Mapping[str, np.ndarray]  # per document, nats: ref_kl, loss, base_loss, forgetting; and num_tokens


@dataclass(frozen=True)
class Mismatch:
    """The run that another is not compared with, and why."""

    to: str
    why: str


@dataclass(frozen=True)
class ComparedRun:
    """The steps and new-task losses (nats per token) at which one run is compared."""

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
    """One run on one text: nats per token, and the share of the first run's `ref_kl` that it prevented."""

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
    """The result of `compare_at_matched_loss`; `matched` and `end` have one entry per run for each text."""

    reference: str | None
    matched_loss: float | None
    reason: str | None  # why there is no matched loss
    loss_text: str | None  # the text of the final losses; None for `eval_loss`
    measured_texts: list[str]
    runs: list[ComparedRun]
    warnings: list[str]
    matched: dict[str, list[ComparedText]]
    end: dict[str, list[ComparedText]]
    seed: int = SEED
    schema: str = "retain.comparison/1"
    level: float = INTERVAL_LEVEL
    num_resamples: int = NUM_RESAMPLES


def compare_at_matched_loss(runs: ReportRuns) -> Comparison:
    """Compare the forgetting of several runs of one base at the same new-task loss, and at their ends.

    A run that learned less may also forget less. So `matched_loss` (nats per token) is the lowest new-task loss that
    every run reached, and each run is interpolated linearly at its first crossing of that loss.
    `prevented` = 1 - ref_kl(run) / ref_kl(first run). Intervals are bootstrapped over documents, with the same
    resampled documents in every run. They hold for these runs, not for other training seeds.

    A run that is annealed at that step has moved less than one in mid-schedule: `warnings` says if the learning rates
    differ there. Texts that no run evaluated during training are in `end` only.

    The end of a run is its final model, as measured by `retain measure`, else by the evaluation at its step. Each
    number has the same source in all runs; `unlike` marks those that were measured differently and are not compared.

    Raises:
        ValueError: if two runs share a name, or their bases differ.
    """
    _check_same_base(runs)
    matched_loss, reason = _matched_loss(runs)
    steps = [None if matched_loss is None else first_crossing(*run.series("eval_loss"), matched_loss) for run in runs]
    ends = [run.end_step for run in runs]
    loss_text, losses = _final_losses(runs, ends)
    texts = names_of_texts(runs)
    measured = [text for text in texts if _measured_in_all(runs, text)]
    matched = {text: _side_by_side(runs, steps, text) for text in texts} if reason is None else {}
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
        end={text: _side_by_side(runs, None if text in measured else ends, text) for text in texts},
    )


def _loss_difference(
    runs: ReportRuns, losses: Sequence[float | None], at: int, loss_text: str | None
) -> tuple[float | None, Mismatch | None]:
    """The final loss of a run relative to the first run's, or why they are not compared."""
    why = _other_tokens(runs[0], runs[at]) if loss_text is None else mismatch(runs[0], runs[at], loss_text)
    if why:
        return None, Mismatch(runs[0].name, why)
    loss, of_first = losses[at], losses[0]
    return loss / of_first - 1 if at and loss and of_first else None, None


def first_crossing(steps: Sequence[float], losses: Sequence[float], target: float) -> float | None:
    """The first step, linearly interpolated, at which the loss reaches `target` (nats per token).

    None if it never does, or was below `target` at the first evaluation already.

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
    """A warning if the learning rates at the compared steps differ: one run may be annealed and another not."""
    rows = zip(runs, steps, rates, strict=True)
    known = [(run.name, step, rate) for run, step, rate in rows if step is not None and rate is not None]
    known_rates = [rate for _, _, rate in known]
    if len(known) < 2 or min(known_rates) >= MIN_RATE_RATIO * max(known_rates):
        return []
    listed = ", ".join(f"{rate:.2g} in “{name}” (step {step:.3g})" for name, step, rate in known)
    return [
        f"The learning rates differ where the runs are compared: {listed}. A lower rate can forget less at the same "
        "loss, so part of the difference may be the schedule's. Compare runs at a constant rate, or runs that end at "
        "that loss."
    ]


def _token_warnings(runs: ReportRuns) -> list[str]:
    """A warning if only some runs say which tokens their `eval_loss` counts; other trainers' do not."""
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
    if repeated := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"runs: two are named {repeated[0]!r}; give each run once, and its own name")
    fingerprints = {run.name: run.base.get("fingerprint") for run in runs}
    if len({fingerprint for fingerprint in fingerprints.values() if fingerprint}) > 1:
        raise ValueError(f"base.fingerprint differs between runs: {fingerprints}. Compare runs of one base.")


def _final_losses(runs: ReportRuns, ends: Sequence[float | None]) -> tuple[str | None, Sequence[float | None]]:
    """New-task losses at the ends, and the text that all were measured on; None for `eval_loss`."""
    for text in runs[0].new_task if runs else ():
        measured = [run.new_task.get(text, TextResult()).loss for run in runs]
        if all(measured):
            return text, [loss.value for loss in measured if loss]
    losses = [_interpolate(*run.series("eval_loss"), end) for run, end in zip(runs, ends, strict=True)]
    return None, [None] * len(runs) if None in losses else losses


def _measured_in_all(runs: ReportRuns, text: str) -> bool:
    """Whether `retain measure` measured a text in some run, and in every run that evaluated it during training."""
    measured = [run.retention.get(text, TextResult()).ref_kl is not None for run in runs]
    evaluated = [bool(run.series(f"retention/{text}/ref_kl")[0]) for run in runs]
    return any(measured) and all(end or not during for end, during in zip(measured, evaluated, strict=True))


def mismatch(run: RunResults, other: RunResults, text: str) -> str | None:
    """How `other` was measured on a text if that differs from `run` in a way that changes the numbers, else None."""
    ours, theirs = (
        {key: re.sub(r"(\(id \d+\)): .*", r"\1", str(value)) for key, value in each.settings.items()}
        for each in (run, other)
    )
    known = [key for key in DECIDING if key in ours and key in theirs]  # older reports have fewer
    if differing := [f"{key} {theirs[key]}, not {ours[key]}" for key in known if ours[key] != theirs[key]]:
        return f"measured with {'; '.join(differing)}"
    counted = [each.loss_tokens(text) for each in (run, other)]
    if all(counted) and counted[0] != counted[1]:
        return f"measured on {counted[1]}, not on {counted[0]}"
    sizes = [_size(each, text) for each in (run, other)]
    if sizes[0] and sizes[1] and sizes[0] != sizes[1]:
        return f"measured on other documents ({sizes[1]}; not {sizes[0]})"
    return _other_documents(_measured_sums(run, text), _measured_sums(other, text))


def _other_tokens(run: RunResults, other: RunResults) -> str | None:
    """How the tokens that the `eval_loss` of `other` counts differ from those of `run`, if both are known."""
    ours, theirs = run.trained_tokens, other.trained_tokens
    return f"its loss counts {theirs}, not {ours}" if ours and theirs and ours != theirs else None


def _size(run: RunResults, text: str) -> str | None:
    loss = run.texts.get(text, TextResult()).loss
    if loss is None or not (loss.num_documents and loss.num_tokens):
        return None
    return f"{quantity(loss.num_documents, 'document')}, {quantity(loss.num_tokens, 'token')}"


def _other_documents(ours: Sums | None, theirs: Sums | None) -> str | None:
    """A mismatch if the documents differ in length or in the base's own loss; None if they agree or are unknown."""
    if ours is None or theirs is None:
        return None
    if np.array_equal(ours["num_tokens"], theirs["num_tokens"]):
        differences = np.abs(ours["base_loss"] - theirs["base_loss"])
        if np.all(differences <= MAX_BASE_ROUNDING * np.sqrt(ours["num_tokens"])):
            return None
    return "measured on other documents"


def _matched_loss(runs: ReportRuns) -> tuple[float | None, str | None]:
    """The lowest loss that every run reached, or None and the reason."""
    if len(runs) < 2:
        return None, "there is only one run"
    curves = {run.name: run.series("eval_loss")[1] for run in runs}
    if missing := [name for name, losses in curves.items() if not losses]:
        reason = f"no new-task loss was evaluated while training {enumeration(missing)}"
        return None, f"{reason} (`retain finetune` does it with --eval_dataset_name FILE){_training_losses(runs)}"
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
    """The last training loss of each run, if all logged one; too noisy for a comparison, it still tells runs apart."""
    last = {run.name: losses[-1] for run in runs if (losses := run.training_losses[1])}
    listed = enumeration([f"{loss:.3f} of {name}" for name, loss in last.items()])
    return f"; their training loss ended at {listed}" if len(last) == len(runs) else ""


def _side_by_side(runs: ReportRuns, steps: Sequence[float | None] | None, text: str) -> list[ComparedText]:
    """One entry per run for a text at each run's own step; if `steps` is None, as `retain measure` measured it."""
    entries, sums = [], []
    for run, step in zip(runs, steps or [None] * len(runs), strict=True):
        estimates, of_run = _measured(run, text) if steps is None else _evaluated(run, text, step)
        numbers: dict[str, Any] = {metric: estimate.value for metric, estimate in estimates.items()}
        numbers |= {f"{metric}_ci": _bounds(metric, estimate, of_run) for metric, estimate in estimates.items()}
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
            note = _prevented(entries[0], entry, sums[0], sums[at], runs[0].floor(text))
        entries[at] = replace(entry, **note)
    return entries


def _measured(run: RunResults, text: str) -> tuple[dict[str, Estimate], Sums | None]:
    """The metrics in `COMPARED` as `retain measure` measured them, and sums per document."""
    estimates = run.retention.get(text, TextResult()).estimates
    return {metric: estimates[metric] for metric in COMPARED if metric in estimates}, _measured_sums(run, text)


def _evaluated(run: RunResults, text: str, step: float | None) -> tuple[dict[str, Estimate], Sums | None]:
    """The same, interpolated between the evaluations around a step."""
    values = {metric: _interpolate(*run.series(f"retention/{text}/{metric}"), step) for metric in COMPARED}
    estimates = {metric: Estimate(value) for metric, value in values.items() if value is not None}
    return estimates, _sums_at(run, text, step)


def _bounds(metric: str, estimate: Estimate, sums: Sums | None) -> list[float] | None:
    if estimate.ci or sums is None:
        return list(estimate.ci) if estimate.ci else None
    return _interval(sums[metric], sums["num_tokens"], METRICS[metric].least)


def _prevented(
    first: ComparedText, entry: ComparedText, sums_of_first: Sums | None, sums: Sums | None, floor: float
) -> dict[str, Any]:
    """The share of the first run's ref_kl that this run prevented, with a paired interval, or why there is none."""
    if entry.ref_kl is None or first.ref_kl is None:
        return {"note": "ref_kl was not measured at this point"}
    if first.ref_kl <= floor:
        return {"note": f"undefined: “{first.name}” did not move beyond the noise floor ({floor:.2g})"}
    value = 1 - entry.ref_kl / first.ref_kl
    if sums_of_first is None or sums is None:
        return {"prevented": value, "note": "no interval: no values per document"}
    ci = _interval(sums["ref_kl"], sums_of_first["ref_kl"], 0.0)
    if ci is None:
        return {"prevented": value, "note": "no interval: too few documents"}
    return {"prevented": value, "prevented_ci": [1 - ci[1], 1 - ci[0]]}


def _interpolate(steps: list[float], values: list[float], step: float | None) -> float | None:
    if step is None or not steps or not steps[0] <= step <= steps[-1]:
        return None
    return float(np.interp(step, steps, values))


def _sums_at(run: RunResults, text: str, step: float | None) -> Sums | None:
    """Sums per document, interpolated linearly between the evaluations around `step`; None if it lies outside them."""
    rows = {row.step: row for row in run.documents if row.name == text}
    if step is None or not rows or not min(rows) <= step <= max(rows):
        return None
    before, after = rows[max(s for s in rows if s <= step)], rows[min(s for s in rows if s >= step)]
    share = (step - before.step) / (after.step - before.step) if after is not before else 0.0
    first, second = _arrays(before), _arrays(after)
    sums = {key: (1 - share) * first[key] + share * second[key] for key in KEPT_SUMS}
    tokens = first["num_tokens"]  # not interpolated: rounding would make equal documents differ
    return sums | {"forgetting": sums["loss"] - sums["base_loss"], "num_tokens": tokens}


def _measured_sums(run: RunResults, text: str) -> Sums | None:
    """Sums per document from `retain measure`; None in older reports."""
    return _arrays(run.per_document[text]) if text in run.per_document else None


def _arrays(sums: KeptSums) -> dict[str, np.ndarray]:
    arrays = {key: np.asarray(getattr(sums, key), float) for key in (*KEPT_SUMS, "num_tokens")}
    return arrays | {"forgetting": arrays["loss"] - arrays["base_loss"]}


def loss_difference(run: RunResults, other: RunResults, text: str) -> tuple[Estimate, Point] | None:
    """The final loss of `run` minus that of `other` on a text, with a paired interval, and both losses.

    In nats per token; None if one was not measured, or they were measured differently.
    """
    ours, theirs = (each.texts.get(text, TextResult()).loss for each in (run, other))
    if ours is None or theirs is None or mismatch(other, run, text):
        return None
    sums = [_measured_sums(each, text) for each in (run, other)]
    ci = None
    if sums[0] and sums[1]:
        ci = _interval(sums[0]["loss"] - sums[1]["loss"], sums[0]["num_tokens"], -math.inf)
    return Estimate(ours.value - theirs.value, (ci[0], ci[1]) if ci else None), (ours.value, theirs.value)


def _interval(numerator: np.ndarray, denominator: np.ndarray, least: float) -> list[float] | None:
    """95% interval of a ratio of sums that is at least `least`; None if there are too few documents."""
    _, low, high = bootstrap_ratio(
        numerator, denominator, num_resamples=NUM_RESAMPLES, level=INTERVAL_LEVEL, seed=SEED, within=(least, math.inf)
    )
    return [low, high] if math.isfinite(low) else None


def end_points(compared: Comparison, text: str | None = None) -> list[Point | None]:
    """(new-task loss, ref_kl) at the end of each run, in nats per token; ref_kl on one text, or averaged over all.

    None for a run that was not measured on all of them, or measured differently.
    """
    texts = list(compared.end) if text is None else [text]
    points: list[Point | None] = []
    for at, run in enumerate(compared.runs):
        entries = [compared.end[name][at] for name in texts]
        moved = [entry.ref_kl for entry in entries if entry.ref_kl is not None and not entry.unlike]
        if run.final_loss is None or run.unlike or not moved or len(moved) < len(texts):
            points.append(None)
        else:
            points.append((run.final_loss, sum(moved) / len(moved)))
    return points


def dominators(points: Sequence[Point | None]) -> list[list[int]]:
    """For each point, the places of those that are no worse in both numbers and better in one.

    Intervals are ignored, so a narrow win may be chance.

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
    """Places of the points that no other dominates, the one that learned least first."""
    free = [place for place, beaten in enumerate(dominators(points)) if points[place] and not beaten]
    return sorted(free, key=lambda place: tuple(-number for number in points[place] or ()))

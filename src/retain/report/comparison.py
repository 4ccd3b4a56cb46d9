"""What the numbers of a run, or of several runs of one base, allow one to say. Plain dicts in, plain dicts out."""

import math
import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from retain.metrics import KEPT_SUMS, METRICS
from retain.report.numbers import is_number, measured, quantity
from retain.statistics import bootstrap_ratio

LEVEL = 0.95
NUM_RESAMPLES = 2000
MOVES = ("ref_kl", "forgetting")  # what moved away from the base, nats per token
# Settings of `retain measure` that decide a number; the device and `batch_tokens` only round it.
DECIDING = ("max_length", "max_windows", "start_token", "tokenizer_fingerprint", "dtype", "attn_implementation")
ROUNDING = 0.25  # nats per square root of a document's tokens: what bfloat16 and kernels may move the base's own loss
RATES_ALIKE = 0.9  # of the higher of two learning rates; between logged steps a schedule is read as a line
TINY = 1e-6  # nats per token; below this a divergence is float32 rounding, and a share of it means nothing


def series(run: dict, key: str) -> tuple[list[float], list[float]]:
    """Steps and values of one key of a run's trajectory, in step order; rows without a finite number are left out."""
    points = {row["step"]: row[key] for row in run.get("trajectory") or [] if is_number(row.get(key))}
    steps = sorted(points)
    return steps, [points[step] for step in steps]


def texts_of(runs: Sequence[dict]) -> list[str]:
    """Names of the retention texts of all runs, in the order in which they first appear."""
    names: dict[str, None] = {}
    for run in runs:
        logged = [re.fullmatch(r"retention/(.+)/ref_kl", key) for row in run.get("trajectory") or [] for key in row]
        names |= dict.fromkeys([*(run.get("retention") or {}), *(match[1] for match in logged if match)])
    return list(names)


def crossing(steps: Sequence[float], losses: Sequence[float], target: float) -> float | None:
    """First step, linearly interpolated, at which the loss comes down to `target` (nats per token).

    None when it never does, or when it is below already at the first evaluation: then nobody saw it cross.
    """
    below = next((i for i, loss in enumerate(losses) if loss <= target), None)
    if not below:
        return float(steps[0]) if below == 0 and losses[0] == target else None
    before, after = losses[below - 1], losses[below]
    share = (before - target) / (before - after)
    return float(steps[below - 1] + share * (steps[below] - steps[below - 1]))


def compare_at_matched_loss(runs: list[dict], seed: int = 0) -> dict:
    """Compare the forgetting of several runs of one base where they have learned equally much.

    Learning less is not forgetting less. `matched_loss` (nats per token) is the lowest new-task loss that every run
    reached; each run is read at its first crossing of it, linearly between the two evaluations around it.
    `prevented` = 1 - ref_kl(run) / ref_kl(first run). Intervals: bootstrap over documents, the same resampled
    documents in every run. They hold for these runs, not for other training seeds.

    A run that is annealed at that step has moved less than one in mid-schedule: `warnings` says where the learning
    rates there differ. A text that no run measured on its way is in `end` alone.

    The end of a run is the model that it left: what `retain measure` found of it, else the evaluation at its step. Each
    number is of one source in all runs, and is compared only where it was measured alike (`unlike` says where not).
    """
    _check_same_base(runs)
    curves = [series(run, "eval_loss") for run in runs]
    matched_loss, reason = _matched_loss(runs, curves)
    steps = [None if matched_loss is None else crossing(*curve, matched_loss) for curve in curves]
    ends = [end_of(run) for run in runs]
    loss_text, losses = _final_losses(runs, ends)
    texts = texts_of(runs)
    whole = [text for text in texts if _all_measured(runs, text)]
    matched = {text: _side_by_side(runs, steps, text, seed) for text in texts} if reason is None else {}
    matched = {text: entries for text, entries in matched.items() if any(e["ref_kl"] is not None for e in entries)}
    if texts and reason is None and not matched:
        reason = "no text was measured during training; give it to `retain finetune` as --retention"
    rates = [_interpolate(*series(run, "learning_rate"), step) for run, step in zip(runs, steps, strict=True)]
    odd = [_other_loss(runs[0], run) if loss_text is None else unlike(runs[0], run, loss_text) for run in runs]
    relative = [None] + [
        loss / losses[0] - 1 if loss and losses[0] and not why else None
        for loss, why in zip(losses[1:], odd[1:], strict=True)
    ]
    return {
        "schema": "retain.comparison/1",
        "reference": runs[0]["name"] if runs else None,
        "matched_loss": matched_loss,
        "reason": reason,
        "loss_text": loss_text, "measured_texts": whole,
        "runs": [
            {"name": run["name"], "matched_step": step, "learning_rate": rate, "final_step": end, "final_loss": loss,
             "relative_loss_difference": difference, "kept": _kept_step(run) is not None,
             "unlike": {"to": runs[0]["name"], "why": why} if why else None}
            for run, step, rate, end, loss, difference, why
            in zip(runs, steps, rates, ends, losses, relative, odd, strict=True)
        ],
        "warnings": _unlike_rates(runs, steps, rates) + _untold_losses(runs) if matched else [],
        "matched": matched,
        "end": {text: _side_by_side(runs, None if text in whole else ends, text, seed) for text in texts},
        "level": LEVEL, "num_resamples": NUM_RESAMPLES, "seed": seed,
    }  # fmt: skip


def _unlike_rates(runs: list[dict], steps: list[float | None], rates: list[float | None]) -> list[str]:
    """A sentence where the learning rates at the steps compared differ: one run may be annealed, another not."""
    known = [
        (run["name"], step, rate)
        for run, step, rate in zip(runs, steps, rates, strict=True)
        if step is not None and rate is not None
    ]
    found = [rate for _, _, rate in known]
    if len(found) < 2 or min(found) >= RATES_ALIKE * max(found):
        return []
    told = ", ".join(f"{rate:.2g} in “{name}” (step {step:.3g})" for name, step, rate in known)
    return [
        f"The learning rates differ where the runs are compared: {told}. A lower rate can forget less at the same "
        "loss, so part of the difference may be the schedule's. Compare runs at a constant rate, or runs that end at "
        "that loss."
    ]


def _untold_losses(runs: list[dict]) -> list[str]:
    """A sentence where some runs say which tokens their `eval_loss` counts and others, as of other trainers, do not."""
    told = {counted: run["name"] for run in runs if (counted := trained_tokens(run))}
    untold = ", ".join(f"“{run['name']}”" for run in runs if not trained_tokens(run))
    return [
        f"Which tokens the new-task loss counts is not known of {untold}; that of “{name}” counts {counted}. They are "
        "compared as if it were the same loss."
        for counted, name in told.items()
        if untold
    ]


def _check_same_base(runs: list[dict]) -> None:
    names = [run["name"] for run in runs]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"runs: two are named {twice[0]!r}; give each run once, and a name of its own")
    fingerprints = {run["name"]: (run.get("base") or {}).get("fingerprint") for run in runs}
    if len({fingerprint for fingerprint in fingerprints.values() if fingerprint}) > 1:
        raise ValueError(f"base.fingerprint differs between runs: {fingerprints}. Compare runs of one base.")


def _kept_step(run: dict) -> float | None:
    step = (run.get("training") or {}).get("kept_step")
    return step if is_number(step) else None


def end_of(run: dict) -> float | None:
    """The step of the weights that a run left: what `load_best_model_at_end` kept, else the last that was evaluated."""
    steps, _ = series(run, "eval_loss")
    kept = _kept_step(run)
    return kept if kept is not None else steps[-1] if steps else None


def _final_losses(runs: list[dict], ends: list[float | None]) -> tuple[str | None, list[Any]]:
    """New-task losses at the ends, of one source: a text that all were measured on (its name), else `eval_loss`."""
    tables = [run.get("new_task") or {} for run in runs]
    for text in tables[0] if runs else ():
        losses = [measured(table.get(text), "loss")[0] for table in tables]
        if None not in losses:
            return text, losses
    losses = [_interpolate(*series(run, "eval_loss"), end) for run, end in zip(runs, ends, strict=True)]
    return None, [None] * len(runs) if None in losses else losses


def _all_measured(runs: list[dict], text: str) -> bool:
    """Whether every run that knows a text has what `retain measure` found on it."""
    found = [measured((run.get("retention") or {}).get(text), "ref_kl")[0] is not None for run in runs]
    followed = [bool(series(run, f"retention/{text}/ref_kl")[0]) for run in runs]
    return any(found) and all(one or not other for one, other in zip(found, followed, strict=True))


def unlike(run: dict, other: dict, text: str) -> str | None:
    """How `other` was measured on a text, where that was otherwise than `run` in what decides the numbers."""
    told = [
        {key: re.sub(r"(\(id \d+\)): .*", r"\1", str(value)) for key, value in (one.get("settings") or {}).items()}
        for one in (run, other)
    ]
    known = [key for key in DECIDING if key in told[0] and key in told[1]]  # older reports tell fewer
    differing = [f"{key} {told[1][key]}, not {told[0][key]}" for key in known if told[0][key] != told[1][key]]
    if differing:
        return f"measured with {'; '.join(differing)}"
    counted = [((one.get("settings") or {}).get("loss_tokens") or {}).get(text) for one in (run, other)]
    if all(counted) and counted[0] != counted[1]:
        return f"measured on {counted[1]}, not on {counted[0]}"
    sizes = [_size(one, text) for one in (run, other)]
    if sizes[0] and sizes[1] and sizes[0] != sizes[1]:
        return f"measured on other documents ({sizes[1]}; not {sizes[0]})"
    return _other_documents(_documents_measured(run, text), _documents_measured(other, text))


def trained_tokens(run: dict) -> str | None:
    """Which tokens a run's own `eval_loss` counts, where it says so."""
    return (run.get("training") or {}).get("loss_tokens")


def _other_loss(run: dict, other: dict) -> str | None:
    """Which other tokens the `eval_loss` of `other` counts than that of `run`, where both say."""
    counted = [trained_tokens(one) for one in (run, other)]
    return f"its loss counts {counted[1]}, not {counted[0]}" if all(counted) and counted[0] != counted[1] else None


def _size(run: dict, text: str) -> str | None:
    entry = ((run.get("new_task") or {}) | (run.get("retention") or {})).get(text, {}).get("loss") or {}
    documents, tokens = entry.get("num_documents"), entry.get("num_tokens")
    if not (is_number(documents) and is_number(tokens)):
        return None
    return f"{quantity(documents, 'document')}, {quantity(tokens, 'token')}"


def _other_documents(rows: dict | None, others: dict | None) -> str | None:
    """Documents are known by their lengths and by the base's own loss on each; None where they are the same."""
    if rows is None or others is None:
        return None
    if np.array_equal(rows["num_tokens"], others["num_tokens"]):
        apart = np.abs(rows["base_loss"] - others["base_loss"])
        if np.all(apart <= ROUNDING * np.sqrt(rows["num_tokens"])):
            return None
    return "measured on other documents"


def _matched_loss(runs: list[dict], curves: list[tuple]) -> tuple[float | None, str | None]:
    """The lowest loss that every run reached, or None and why there is none."""
    if len(runs) < 2:
        return None, "there is only one run"
    blind = [run["name"] for run, (_, losses) in zip(runs, curves, strict=True) if not losses]
    if blind:
        return None, f"no evaluations during training (eval_loss in the trajectory) for: {', '.join(blind)}"
    for run in runs:
        if why := _other_loss(runs[0], run):
            return None, f"{run['name']}: {why} as {runs[0]['name']}'s does"
    target = max(min(losses) for _, losses in curves)
    for run, (_, losses) in zip(runs, curves, strict=True):
        if losses[0] < target:
            return None, f"{run['name']} was already below the common loss {target:.3f} when first evaluated"
        if len(losses) > 1 and losses[0] == min(losses):
            return None, f"{run['name']} did not learn: it never got below its first loss, {target:.3f}"
    return target, None


def _side_by_side(runs: list[dict], steps: list | None, text: str, seed: int) -> list[dict]:
    """One entry per run for one text, read at each run's own step, or what `retain measure` found where that is None.

    `prevented` is against the first run.
    """
    entries: list[dict] = []
    documents = []
    for place, run in enumerate(runs):
        step = steps[place] if steps else None
        if steps is None:
            values: dict[str, Any] = {m: measured((run.get("retention") or {}).get(text), m) for m in MOVES}
            found = _documents_measured(run, text)
        else:
            values = {m: (_interpolate(*series(run, f"retention/{text}/{m}"), step), None) for m in MOVES}
            found = _documents_at(run, text, step)
        documents.append(found)
        entry = {"name": run["name"], "step": step, "prevented": None, "prevented_ci": None, "note": None}
        for metric, (value, bounds) in values.items():
            ci = (
                list(bounds)
                if bounds
                else _interval(found[metric], found["num_tokens"], seed, METRICS[metric].least)
                if found
                else None
            )
            entry |= {metric: value, f"{metric}_ci": ci if value is not None else None}
        entries.append(entry | {"num_documents": len(found["num_tokens"]) if found else None, "unlike": None})
    floor = floor_of(runs[0], text)
    first = next((place for place, entry in enumerate(entries) if entry["ref_kl"] is not None), 0)
    for place, (entry, found) in enumerate(zip(entries[1:], documents[1:], strict=True), 1):
        of_measure = unlike(runs[first], runs[place], text) if steps is None else None
        why = of_measure or _other_documents(documents[first], found)
        if why and entry["ref_kl"] is not None:
            to = entries[first]["name"]
            entry |= {"unlike": {"to": to, "why": why}, "note": f"not compared with “{to}”: {why}"}
        else:
            entry |= _prevented(entries[0], entry, [documents[0], found], floor, seed)
    return entries


def _prevented(plain: dict, entry: dict, documents: list[dict | None], floor: float, seed: int) -> dict:
    """Share of the plain run's ref_kl that this run did not have, with a paired interval, or why there is none."""
    if entry["ref_kl"] is None or plain["ref_kl"] is None:
        return {"note": "ref_kl was not measured at this point"}
    if plain["ref_kl"] <= floor:
        return {"note": f"undefined: “{plain['name']}” did not move beyond the noise floor ({floor:.2g})"}
    value = 1 - entry["ref_kl"] / plain["ref_kl"]
    of_plain, of_run = documents
    if of_plain is None or of_run is None:
        return {"prevented": value, "note": "no interval: no values per document"}
    ci = _interval(of_run["ref_kl"], of_plain["ref_kl"], seed, 0.0)
    if ci is None:
        return {"prevented": value, "note": "no interval: too few documents"}
    return {"prevented": value, "prevented_ci": [1 - ci[1], 1 - ci[0]]}


def floor_of(run: dict, text: str) -> float:
    """Upper end of the base-against-base ref_kl of a text, at least `TINY`; nats per token."""
    value, ends = measured((run.get("noise_floor") or {}).get(text), "ref_kl")
    return max(TINY, value or 0.0, *(ends or ()))


def _interpolate(steps: list[float], values: list[float], step: float | None) -> float | None:
    if step is None or not steps or not steps[0] <= step <= steps[-1]:
        return None
    return float(np.interp(step, steps, values))


def _documents_at(run: dict, text: str, step: float | None) -> dict[str, np.ndarray] | None:
    """Sums per document (nats), linear between the two evaluations around `step`; None where none surround it."""
    rows = {row["step"]: row for row in run.get("documents") or [] if row["name"] == text}
    earlier = [s for s in rows if step is not None and s <= step]
    later = [s for s in rows if step is not None and s >= step]
    if not earlier or not later:
        return None
    before, after = rows[max(earlier)], rows[min(later)]
    share = (step - before["step"]) / (after["step"] - before["step"]) if after is not before else 0.0

    def mix(key: str) -> np.ndarray:
        return (1 - share) * np.asarray(before[key], float) + share * np.asarray(after[key], float)

    tokens = np.asarray(before["num_tokens"], float)  # not mixed: rounding would make equal documents differ
    sums = {key: mix(key) for key in KEPT_SUMS}
    return sums | {"forgetting": sums["loss"] - sums["base_loss"], "num_tokens": tokens}


def _documents_measured(run: dict, text: str) -> dict[str, np.ndarray] | None:
    """Sums per document (nats) from `retain measure`; None in reports older than these sums."""
    row = (run.get("per_document") or {}).get(text)
    if not row:
        return None
    sums = {key: np.asarray(row[key], float) for key in (*KEPT_SUMS, "num_tokens")}
    return sums | {"forgetting": sums["loss"] - sums["base_loss"]}


def loss_difference(run: dict, other: dict, text: str, seed: int = 0) -> dict[str, Any] | None:
    """Loss of `run` minus that of `other` on one text at their ends, nats per token; its interval pairs documents.

    None where one of them was not measured there, or they were not measured alike.
    """
    tables = [(one.get("new_task") or {}).get(text) or (one.get("retention") or {}).get(text) for one in (run, other)]
    losses = [measured(table, "loss")[0] for table in tables]
    if losses[0] is None or losses[1] is None or unlike(other, run, text):
        return None
    rows = [_documents_measured(one, text) for one in (run, other)]
    ci = None
    if rows[0] and rows[1]:
        ci = _interval(rows[0]["loss"] - rows[1]["loss"], rows[0]["num_tokens"], seed, -math.inf)
    return {"value": losses[0] - losses[1], "ci": ci, "losses": losses}


def _interval(numerator: np.ndarray, denominator: np.ndarray, seed: int, least: float) -> list[float] | None:
    """95% interval of a ratio of sums that is at least `least`; None where the documents are too few to give one."""
    options: dict[str, Any] = {"num_resamples": NUM_RESAMPLES, "level": LEVEL, "seed": seed}
    _, low, high = bootstrap_ratio(numerator, denominator, within=(least, math.inf), **options)
    return [low, high] if math.isfinite(low) and math.isfinite(high) else None

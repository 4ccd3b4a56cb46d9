"""What the numbers of a run, or of several runs of one base, allow one to say. Plain dicts in, plain dicts out."""

import math
import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from retain.statistics import bootstrap_ratio

LEVEL = 0.95
NUM_RESAMPLES = 2000
TINY = 1e-6  # nats per token; below this a divergence is float32 rounding, and a share of it means nothing


def series(run: dict, key: str) -> tuple[list[float], list[float]]:
    """Steps and values of one key of a run's trajectory, in step order; rows without a finite number are left out."""
    points = {row["step"]: row[key] for row in run.get("trajectory") or [] if is_number(row.get(key))}
    steps = sorted(points)
    return steps, [points[step] for step in steps]


def is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


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
    `prevented` = 1 - ref_kl(run) / ref_kl(first run). Intervals: percentile bootstrap over documents, the same
    resampled documents in every run. They hold for these runs, not for other training seeds.
    """
    _check_same_base(runs)
    curves = [series(run, "eval_loss") for run in runs]
    matched_loss, reason = _matched_loss(runs, curves)
    steps = [None if matched_loss is None else crossing(*curve, matched_loss) for curve in curves]
    ends = [curve[0][-1] if curve[0] else None for curve in curves]
    measured = [_measured(next(iter((run.get("new_task") or {}).values()), None), "loss")[0] for run in runs]
    losses = [values[-1] if values else other for (_, values), other in zip(curves, measured, strict=True)]
    texts = texts_of(runs)
    relative = [None] + [loss / losses[0] - 1 if loss and losses[0] else None for loss in losses[1:]]
    return {
        "schema": "retain.comparison/1",
        "reference": runs[0]["name"] if runs else None,
        "matched_loss": matched_loss,
        "reason": reason,
        "runs": [
            {"name": run["name"], "matched_step": step, "final_step": end, "final_loss": loss,
             "relative_loss_difference": difference}
            for run, step, end, loss, difference in zip(runs, steps, ends, losses, relative, strict=True)
        ],
        "matched": {text: _side_by_side(runs, steps, text, seed) for text in texts} if reason is None else {},
        "end": {text: _side_by_side(runs, ends, text, seed, at_end=True) for text in texts},
        "level": LEVEL, "num_resamples": NUM_RESAMPLES, "seed": seed,
    }  # fmt: skip


def _check_same_base(runs: list[dict]) -> None:
    fingerprints = {run["name"]: (run.get("base") or {}).get("fingerprint") for run in runs}
    if len({fingerprint for fingerprint in fingerprints.values() if fingerprint}) > 1:
        raise ValueError(f"base.fingerprint differs between runs: {fingerprints}. Compare runs of one base.")


def _matched_loss(runs: list[dict], curves: list[tuple]) -> tuple[float | None, str | None]:
    """The lowest loss that every run reached, or None and why there is none."""
    if len(runs) < 2:
        return None, "there is only one run"
    blind = [run["name"] for run, (_, losses) in zip(runs, curves, strict=True) if not losses]
    if blind:
        return None, f"no evaluations during training (eval_loss in the trajectory) for: {', '.join(blind)}"
    target = max(min(losses) for _, losses in curves)
    for run, (_, losses) in zip(runs, curves, strict=True):
        if losses[0] < target:
            return None, f"{run['name']} was already below the common loss {target:.3f} when first evaluated"
        if len(losses) > 1 and losses[0] == min(losses):
            return None, f"{run['name']} did not learn: it never got below its first loss, {target:.3f}"
    return target, None


def _side_by_side(runs: list[dict], steps: list, text: str, seed: int, at_end: bool = False) -> list[dict]:
    """One entry per run for one text, read at each run's own step; `prevented` is against the first run."""
    entries, documents = [], []
    for run, step in zip(runs, steps, strict=True):
        documents.append(found := _documents_at(run, text, step))
        entry = {"name": run["name"], "step": step, "prevented": None, "prevented_ci": None, "note": None}
        for metric in ("ref_kl", "forgetting"):
            value = _interpolate(*series(run, f"retention/{text}/{metric}"), step)
            ci = _interval(found[metric], found["num_tokens"], seed) if found else None
            if value is None and at_end:
                value, bounds = _measured((run.get("retention") or {}).get(text), metric)
                ci = list(bounds) if bounds else None
            entry |= {metric: value, f"{metric}_ci": ci if value is not None else None}
        entries.append(entry | {"num_documents": len(found["num_tokens"]) if found else None})
    floor = _floor(runs[0], text)
    for entry, found in zip(entries[1:], documents[1:], strict=True):
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
    if not np.array_equal(of_plain["num_tokens"], of_run["num_tokens"]):
        return {"prevented": value, "note": "no interval: the runs were measured on different documents"}
    ci = _interval(of_run["ref_kl"], of_plain["ref_kl"], seed)
    if ci is None:
        return {"prevented": value, "note": "no interval: too few documents"}
    return {"prevented": value, "prevented_ci": [1 - ci[1], 1 - ci[0]]}


def _floor(run: dict, text: str) -> float:
    """Upper end of the base-against-base ref_kl of a text, at least `TINY`; nats per token."""
    value, bounds = _measured((run.get("noise_floor") or {}).get(text), "ref_kl")
    return max(TINY, value or 0.0, *(bounds or ()))


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
    return {"ref_kl": mix("ref_kl"), "forgetting": mix("loss") - mix("base_loss"), "num_tokens": tokens}


def _interval(numerator: np.ndarray, denominator: np.ndarray, seed: int) -> list[float] | None:
    """95% interval of a ratio of sums; None where the documents are too few, or too often zero, to give one."""
    with np.errstate(divide="ignore", invalid="ignore"):
        _, low, high = bootstrap_ratio(numerator, denominator, num_resamples=NUM_RESAMPLES, level=LEVEL, seed=seed)
    return [low, high] if math.isfinite(low) and math.isfinite(high) else None


def cell(value: Any, ci: Sequence[Any] | None = None, percent: bool = False) -> dict[str, str]:
    """Value and interval as text, with as many decimals as it takes to tell small numbers from nothing."""
    if not is_number(value):
        return {"value": "–", "interval": ""}
    ends = _bounds(ci) or ()
    largest = max(map(abs, (value, *ends)))
    finest = 6 if largest else 3
    places = next((places for places, least in ((3, 0.02), (4, 0.001), (5, 1e-4)) if largest >= least), finest)
    words = [format(number, ".1%" if percent else f".{places}f") for number in (value, *ends)]
    return {"value": words[0], "interval": f"[{words[1]}, {words[2]}]" if ends else ""}


def _bounds(ci: Sequence[Any] | None) -> tuple[float, float] | None:
    return (ci[0], ci[1]) if ci and len(ci) == 2 and all(map(is_number, ci)) else None


def _measured(metrics: dict | None, metric: str) -> tuple[float | None, tuple[float, float] | None]:
    entry = (metrics or {}).get(metric) or {}
    value = entry.get("value")
    return (value if is_number(value) else None), _bounds(entry.get("ci"))


HEADS = {
    "forgot": "forgetting shown",
    "moved": "changed, but no forgetting shown",
    "improved": "changed, and the loss fell",
    "unmoved": "no change shown",
    "undecided": "not decided, for lack of an interval",
}
CHANGES = (
    ("its loss rose by", ("forgot",)),
    ("its loss changed by", ("improved", "undecided")),
    ("no clear change of its loss:", ("moved", "unmoved")),
)


def state(run: dict, text: str) -> str:
    """What the intervals of one text show against the noise floor: a key of `HEADS`."""
    _, loss = _measured(run["retention"][text], "forgetting")
    _, moved = _measured(run["retention"][text], "ref_kl")
    low, high = _measured((run.get("noise_floor") or {}).get(text), "forgetting")[1] or (0.0, 0.0)
    if loss and loss[0] > max(high, 0.0):
        return "forgot"
    if loss and loss[1] < min(low, 0.0):
        return "improved"
    if moved and moved[0] > _floor(run, text):
        return "moved"
    return "unmoved" if loss and moved else "undecided"


def run_verdict(run: dict) -> str:
    """One sentence: is forgetting shown, how much, and what was learned for it. Nats per token."""
    texts = run.get("retention") or {}
    states = {text: state(run, text) for text in texts}
    groups = {HEADS[kind]: [text for text in texts if states[text] == kind] for kind in HEADS}
    groups = {head: group for head, group in groups.items() if group} or {"forgetting was not measured": []}
    head = "; ".join(f"{head} on {_listed(group)}" if len(groups) > 1 else head for head, group in groups.items())
    shown = dict(sorted(texts.items(), key=lambda item: -(_measured(item[1], "ref_kl")[0] or 0.0))[:3])
    more = f"; {len(texts) - len(shown)} more texts in the table" if len(texts) > len(shown) else ""
    clauses = [
        _clause(shown, "ref_kl", "moved from its base by", f" (ref_kl, 95% intervals; {_noise(run, shown)}{more})"),
        *(_clause({t: m for t, m in shown.items() if states[t] in kinds}, "forgetting", how) for how, kinds in CHANGES),
        *(_clause({text: of_text}, "gain", _learned(of_text)) for text, of_text in (run.get("new_task") or {}).items()),
    ]
    return f"{head[0].upper()}{head[1:]}: “{run['name']}”{' ' * any(clauses)}{'; '.join(filter(None, clauses))}."


def _learned(metrics: dict) -> str:
    low, high = _measured(metrics, "gain")[1] or (0.0, 0.0)
    return "it learned" if low > 0 else "it got worse, gain" if high < 0 else "no learning shown, gain"


def _clause(texts: dict[str, dict], metric: str, lead: str, after: str = "") -> str:
    """`lead` 0.012 [0.010, 0.015] nats/token on wiki and 0.003 [0.002, 0.004] on code."""
    told: list[str] = []
    for text, metrics in texts.items():
        value, bounds = _measured(metrics, metric)
        if value is not None:
            words = cell(value, bounds)
            unit = "" if told else " nats/token"
            told.append(f"{words['value']} {words['interval'] or '(no interval)'}{unit} on {text}")
    return f"{lead} {_listed(told)}{after}" if told else ""


def _noise(run: dict, texts: dict) -> str:
    floors = [_measured((run.get("noise_floor") or {}).get(text), "ref_kl")[0] for text in texts]
    known = [floor for floor in floors if floor is not None]
    return f"noise floor {cell(max(known))['value']}" if known and len(known) == len(floors) else "no noise floor"


def _listed(words: list[str]) -> str:
    return " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)


def comparison_verdict(runs: list[dict], compared: dict) -> str:
    """One sentence (two without a matched loss): how much less each run moved from the base for as much learned."""
    names = [f"“{run['name']}”" for run in runs]
    place = "matched" if compared["matched"] else "end"
    clauses = []
    for index, name in enumerate(names[1:], 1):
        told = [_prevention(text, run[0], run[index]) for text, run in compared[place].items()]
        clauses.append(f"{name} moved away from the base {_listed(told)}" if told else f"{name} was not measured")
    if place == "matched":
        start = f"At the same new-task loss ({compared['matched_loss']:.3f} nats/token), compared with {names[0]}"
        return f"{start}, {'; '.join(clauses)}."
    why = compared["reason"] or "no text was measured"
    caution = f"At their ends, where a smaller change may only mean less learned, compared with {names[0]}"
    return f"No comparison at the same new-task loss: {why}. {caution}, {'; '.join(clauses)}."


def _prevention(text: str, plain: dict, entry: dict) -> str:
    share, ci = entry["prevented"], entry["prevented_ci"]
    if share is None:
        return f"by an amount that cannot be judged on {text}"
    facts = f"ref_kl {cell(entry['ref_kl'])['value']} against {cell(plain['ref_kl'])['value']}"
    how = f"{abs(share):.0%} {'less' if share >= 0 else 'more'} on {text}"
    if ci is None:
        return f"{how} (no interval; {facts})"
    if ci[0] <= 0 <= ci[1]:
        return f"not clearly less or more on {text} (95% interval {0 - ci[1]:+.0%} to {0 - ci[0]:+.0%}; {facts})"
    low, high = sorted(map(abs, ci))
    return f"{how} (95% interval {low:.0%} to {high:.0%}; {facts})"

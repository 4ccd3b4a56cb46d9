"""What the numbers of a run, or of several runs of one base, allow one to say: sentences. Plain dicts in."""

from __future__ import annotations

from retain.report.comparison import end_of, floor_of, loss_difference, series, unlike
from retain.report.numbers import cell, measured

OVERFIT = 0.01  # of the lowest new-task loss: a rise that an evaluation's rounding does not make
SIGNS = 6  # documents that all say the same, from which on the sign test says so at 95%
MANY = 1000  # times the noise floor: from there on the factor says no more

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
    _, loss = measured(run["retention"][text], "forgetting")
    _, moved = measured(run["retention"][text], "ref_kl")
    low, high = measured((run.get("noise_floor") or {}).get(text), "forgetting")[1] or (0.0, 0.0)
    if loss and loss[0] > max(high, 0.0):
        return "forgot"
    if loss and loss[1] < min(low, 0.0):
        return "improved"
    if moved and (moved[0] > floor_of(run, text) or _moved_everywhere(run, text)):
        return "moved"
    return "unmoved" if loss and moved else "undecided"


def _moved_everywhere(run: dict, text: str) -> bool:
    """Whether ref_kl, which is never below 0, is above the noise floor in every one of six documents or more.

    By the sign test; the interval of so few skewed values may reach down to 0 (p = 1/32 at six).
    """
    of = (run.get("per_document") or {}).get(text) or {}
    sums, sizes = of.get("ref_kl") or [], of.get("num_tokens") or []
    return len(sums) >= SIGNS and all(
        total > floor_of(run, text) * size for total, size in zip(sums, sizes, strict=True)
    )


def run_verdict(run: dict) -> str:
    """One sentence: is forgetting shown, how much, and what was learned for it. Nats per token."""
    texts = run.get("retention") or {}
    states = {text: state(run, text) for text in texts}
    groups = {HEADS[kind]: [text for text in texts if states[text] == kind] for kind in HEADS}
    groups = {head: group for head, group in groups.items() if group} or {"forgetting was not measured": []}
    head = "; ".join(f"{head} on {listed(group)}" if len(groups) > 1 else head for head, group in groups.items())
    shown = dict(sorted(texts.items(), key=lambda item: -(measured(item[1], "ref_kl")[0] or 0.0))[:3])
    more = f"; {len(texts) - len(shown)} more texts in the table" if len(texts) > len(shown) else ""
    clauses = [
        _clause(shown, "ref_kl", "moved from its base by", f" (ref_kl, 95% intervals; {_noise(run, shown)}{more})"),
        *(_clause({t: m for t, m in shown.items() if states[t] in kinds}, "forgetting", how) for how, kinds in CHANGES),
        *(_clause({text: of_text}, "gain", _learned(of_text)) for text, of_text in (run.get("new_task") or {}).items()),
    ]
    return f"{head[0].upper()}{head[1:]}: “{run['name']}”{' ' * any(clauses)}{'; '.join(filter(None, clauses))}."


def scale_sentence(run: dict) -> str:
    """How much a ref_kl is, on the text that moved most, in what was measured beside it; empty without such a thing."""
    moved = {text: measured(of, "ref_kl")[0] or 0.0 for text, of in (run.get("retention") or {}).items()}
    text = max(moved, key=lambda text: moved[text], default="")
    if not text or not moved[text]:
        return ""
    metrics, value = run["retention"][text], moved[text]
    entropy, same = (measured(metrics, key)[0] for key in ("base_ref_cross_entropy", "ref_agreement"))
    told = [f"{value / entropy:.1%} of the base's own entropy there ({entropy:.2f} nats per token)"] if entropy else []
    if (run.get("noise_floor") or {}).get(text):
        times = value / floor_of(run, text)
        many = f"more than {MANY:,}" if times > MANY else f"{times:,.0f}"
        told.append(f"{many} times the noise floor" if times > 1 else "within the noise floor")
    told += [f"and another token comes first at {1 - same:.1%} of the positions"] if same is not None else []
    scale = f"Scale: ref_kl {cell(value)['value']} of “{run['name']}” on {text} is "
    return f"{scale}{', '.join(told)}." if entropy else ""


def overfit_sentence(run: dict) -> str:
    """Says that the new-task loss rose again before the end of a run, and what ends at the lower one; or nothing."""
    steps, losses = series(run, "eval_loss")
    end = end_of(run)
    if end not in steps:
        return ""
    last, best = losses[steps.index(end)], min(losses)
    at = steps[losses.index(best)]
    if at >= end or last <= (1 + OVERFIT) * best:
        return ""
    return (
        f"“{run['name']}” overfits the new task: its loss (eval_loss) was {best:.3f} at step {at:g} and is {last:.3f} "
        f"at step {end:g}, its end. Fewer steps, or load_best_model_at_end, would end at the lower loss."
    )


def budget_sentence(run: dict, plain: dict | None = None) -> str:
    """Whether a run kept its forgetting budget, and beside a plain run its price in new-task loss; or nothing.

    The budget is of replay rows, which were trained on; texts that moved further are named.
    """
    training = run.get("training") or {}
    told, limit = (training.get("budget") or "").rstrip("."), training.get("max_ref_kl")
    if not told:
        return ""
    ends = {text: measured(of, "ref_kl")[1] for text, of in (run.get("retention") or {}).items()}
    if limit and (above := [text for text, bounds in ends.items() if bounds and bounds[0] > limit]):
        told += f"; on {listed(above)}, which it did not hold, ref_kl is above {limit:g}"
    text = next(iter(run.get("new_task") or {}), None)
    found = loss_difference(run, plain, text) if plain is not None and text is not None else None
    if plain is None or found is None:
        return f"{told}."
    words, (own, other) = cell(found["value"], found["ci"]), found["losses"]
    cost = f"{words['value']} {words['interval'] or '(no interval)'} nats/token more than “{plain['name']}”"
    return f"{told}. Its new-task loss on {text} is {own:.3f} against {other:.3f}: {cost}."


def _learned(metrics: dict) -> str:
    low, high = measured(metrics, "gain")[1] or (0.0, 0.0)
    return "it learned" if low > 0 else "it got worse, gain" if high < 0 else "no learning shown, gain"


def _clause(texts: dict[str, dict], metric: str, lead: str, after: str = "") -> str:
    """`lead` 0.012 [0.010, 0.015] nats/token on wiki and 0.003 [0.002, 0.004] on code."""
    told: list[str] = []
    for text, metrics in texts.items():
        value, bounds = measured(metrics, metric)
        if value is not None:
            words = cell(value, bounds)
            unit = "" if told else " nats/token"
            told.append(f"{words['value']} {words['interval'] or '(no interval)'}{unit} on {text}")
    return f"{lead} {listed(told)}{after}" if told else ""


def _noise(run: dict, texts: dict) -> str:
    floors = [measured((run.get("noise_floor") or {}).get(text), "ref_kl")[0] for text in texts]
    known = [floor for floor in floors if floor is not None]
    return f"noise floor {cell(max(known))['value']}" if known and len(known) == len(floors) else "no noise floor"


def listed(words: list[str]) -> str:
    return " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)


def comparison_verdict(runs: list[dict], compared: dict) -> str:
    """One sentence (two without a matched loss): how much less each run moved from the base for as much learned."""
    names = [f"“{run['name']}”" for run in runs]
    place = "matched" if compared["matched"] else "end"
    clauses = []
    shown, left_out = _least_moved(compared[place], len(runs))
    for index, name in ((index, names[index]) for index in shown):
        told = [_prevention(text, run[0], run[index]) for text, run in compared[place].items()]
        clauses.append(f"{name} moved away from the base {listed(told)}" if told else f"{name} was not measured")
    clauses += [f"{left_out} more runs in the table"] if left_out else []
    if place == "matched":
        start = f"At the same new-task loss ({compared['matched_loss']:.3f} nats/token), compared with {names[0]}"
        return f"{start}, {'; '.join(clauses)}."
    why = compared["reason"] or "no text was measured"
    caution = f"At their ends, where a smaller change may only mean less learned, compared with {names[0]}"
    return f"No comparison at the same new-task loss: {why}. {caution}, {'; '.join(clauses)}."


def _least_moved(texts: dict, total: int) -> tuple[list[int], int]:
    """Places of the runs to speak of, after the first: all, or of more than four the three that moved least."""
    others = list(range(1, total))
    if total <= 5:
        return others, 0
    others.sort(key=lambda place: sum(entries[place]["ref_kl"] or 0.0 for entries in texts.values()))
    return others[:3], len(others) - 3


def _prevention(text: str, plain: dict, entry: dict) -> str:
    share, ci = entry["prevented"], entry["prevented_ci"]
    if share is None:
        return f"by an amount that cannot be judged on {text}{' (measured otherwise)' if entry['unlike'] else ''}"
    facts = f"ref_kl {cell(entry['ref_kl'])['value']} against {cell(plain['ref_kl'])['value']}"
    how = f"{abs(share):.0%} {'less' if share >= 0 else 'more'} on {text}"
    if ci is None:
        return f"{how} (no interval; {facts})"
    if ci[0] <= 0 <= ci[1]:
        return f"not clearly less or more on {text} (95% interval {0 - ci[1]:+.0%} to {0 - ci[0]:+.0%}; {facts})"
    low, high = sorted(map(abs, ci))
    return f"{how} (95% interval {low:.0%} to {high:.0%}; {facts})"


def unlike_sentences(compared: dict) -> list[str]:
    """Which runs are not compared, on which texts, and why: they were not measured alike."""
    found: dict[tuple[str, ...], dict[str, None]] = {}
    for place, run in enumerate(compared["runs"]):
        odd = [(compared["loss_text"] or "the new-task loss (eval_loss)", run, "")]
        for text, entries in compared["end"].items():
            matched = (compared["matched"].get(text) or entries)[place]
            odd += [(text, matched, ""), (text, entries[place], "" if matched["unlike"] else " at the end")]
        for text, entry, where in odd:
            if told := entry["unlike"]:
                found.setdefault((run["name"], told["to"], where, told["why"]), {})[text] = None
    return [
        f"“{name}” is not compared with “{to}”{where} on {listed(list(texts))}: {why}."
        for (name, to, where, why), texts in found.items()
    ]


def base_sentences(runs: list[dict]) -> list[str]:
    """Of which run the column `base` of a table is, where others were measured otherwise."""
    told = []
    for kind in ("new_task", "retention"):
        for text in dict.fromkeys(text for run in runs for text in run.get(kind) or {}):
            first, *others = [run for run in runs if text in (run.get(kind) or {})]
            odd = [f"“{run['name']}”" for run in others if unlike(first, run, text)]
            if odd:
                told.append(f"{text}: the column base is of “{first['name']}”; measured otherwise: {listed(odd)}")
    return told


def end_sentences(compared: dict) -> list[str]:
    """What the ends of the runs were read from."""
    runs, loss_text, found = compared["runs"], compared["loss_text"], list(compared["measured_texts"])
    followed = [text for text in compared["end"] if text not in found]
    steps = {
        f"step {run['final_step']:g} of “{run['name']}”": run["kept"] for run in runs if run["final_step"] is not None
    }
    told = []
    if loss_text is not None:
        found.insert(0, f"the new-task loss ({loss_text})")
    elif all(run["final_loss"] is None for run in runs):
        told.append("There is no new-task loss that all of them have.")
    else:
        followed.insert(0, "the new-task loss (eval_loss)")
    told += [f"Measured on the saved models: {listed(found)}."] if found else []
    if followed and steps:
        told.append(f"Read from the evaluations during training, at {listed(list(steps))}: {listed(followed)}.")
    if any(steps.values()):
        told.append(f"load_best_model_at_end kept {listed([step for step, kept in steps.items() if kept])}.")
    return told

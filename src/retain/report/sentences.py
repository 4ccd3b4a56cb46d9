"""What the numbers of a run, or of several runs of one base, allow one to say."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from retain.report.comparison import ComparedText, Comparison, dominators, end_points, frontier, loss_difference
from retain.report.numbers import Estimate, cell, count_cell, enumeration, points_cell, quantity, share_cell, value_cell
from retain.report.results import Answers, BehaviorShares, ReportRuns, RunResults, TextResult
from retain.report.tables import BEHAVIOR_SCORERS, SCORERS

MIN_OVERFIT = 0.01  # of the lowest new-task loss: a rise that an evaluation's rounding does not make
MIN_SIGNS = 6  # documents that all say the same, from which on the sign test says so at 95%
MIN_SHARE = 0.0005  # of the base's entropy: less would be written as 0.0%
MAX_TIMES_FLOOR = 1000  # times the noise floor: from there on the factor says no more
MAX_NAMED = 3  # texts, question sets or runs that a sentence names; the table has the others

STATES = {
    "forgot": "forgot",
    "moved": "changed, but shows no forgetting",
    "improved": "changed, and its loss fell",
    "unmoved": "shows no change",
    "undecided": "is undecided, because there is no interval",
}


def verdict(run: RunResults, first: RunResults | None = None) -> str:
    """What texts, questions and requests show of a run; and a budget, with its price beside the first run."""
    found = behaviour_sentences(run)
    texts = [text_verdict(run)] if run.retention or not found else []
    return " ".join(filter(None, [*texts, *found, budget_sentence(run, first)]))


def behaviour_sentences(run: RunResults) -> list[str]:
    """What questions, requests and prompts show of a run; none where nothing was asked."""
    return list(filter(None, [answers_sentence(run), refusals_sentence(run), behaviors_sentence(run)]))


def opening(runs: ReportRuns, compared: Comparison | None) -> tuple[str, list[tuple[int, str]]]:
    """The sentence for a reader with thirty seconds; and what else was found, each with the place of its run."""
    found = [
        (at, sentence)
        for at, run in enumerate(runs)
        for sentence in [*behaviour_sentences(run), budget_sentence(run, runs[0] if at else None)]
        if sentence
    ]
    if compared:
        return comparison_verdict(compared), found
    if runs[0].retention or not found:
        return text_verdict(runs[0], most=1), found
    return found[0][1], found[1:]


def state(run: RunResults, text: str) -> str:
    """What the intervals of one text show against the noise floor: a key of `STATES`."""
    result, noise = run.retention[text], run.noise_floor.get(text, TextResult()).forgetting
    loss, moved = (found.ci if found else None for found in (result.forgetting, result.ref_kl))
    low, high = noise.ci if noise and noise.ci else (0.0, 0.0)
    if loss and loss[0] > max(high, 0.0):
        return "forgot"
    if loss and loss[1] < min(low, 0.0):
        return "improved"
    if moved and (moved[0] > run.floor(text) or _moved_everywhere(run, text)):
        return "moved"
    return "unmoved" if loss and moved else "undecided"


def _moved_everywhere(run: RunResults, text: str) -> bool:
    """Whether ref_kl, which is never below 0, is above the noise floor in every one of six documents or more.

    By the sign test; the interval of so few skewed values may reach down to 0 (p = 1/32 at six).
    """
    if text not in run.per_document:
        return False
    sums, sizes = run.per_document[text].ref_kl, run.per_document[text].num_tokens
    floor = run.floor(text)
    return len(sums) >= MIN_SIGNS and all(total > floor * size for total, size in zip(sums, sizes, strict=True))


def text_verdict(run: RunResults, most: int = MAX_NAMED) -> str:
    """One sentence: is forgetting shown, how much, on the `most` texts that moved most, and what was learned for it."""
    texts = run.retention
    states = {text: state(run, text) for text in texts}
    groups = {words: [text for text in texts if states[text] == kind] for kind, words in STATES.items()}
    groups = {words: group for words, group in groups.items() if group} or {"was not measured on any text": []}
    several = len(groups) > 1
    head = "; ".join(f"{words} on {enumeration(group)}" if several else words for words, group in groups.items())
    shown = sorted(texts, key=lambda text: -_divergence(texts[text]))[:most]
    more = f"; {len(texts) - len(shown)} more in the table" if len(texts) > len(shown) else ""
    facts = [
        ("ref_kl", {text: texts[text].ref_kl for text in shown}, f" ({_noise(run, shown)}{more})"),
        ("forgetting", {text: texts[text].forgetting for text in shown}, ""),
        *(("new-task gain", {text: result.gain}, _learning_words(result)) for text, result in run.new_task.items()),
    ]
    facts = [(label, found, after) for label, found, after in facts if any(found.values())]
    clauses = [_clause(*fact, unit="" if at else " nats per token") for at, fact in enumerate(facts)]
    return f"“{run.name}” {head}{': ' * bool(clauses)}{'; '.join(clauses)}."


def _clause(label: str, found: Mapping[str, Estimate | None], after: str, unit: str) -> str:
    """`label` 0.012 [0.010, 0.015] nats per token on wiki and 0.003 [0.002, 0.004] on code."""
    (text, first), *others = ((text, value_cell(one).with_interval) for text, one in found.items() if one)
    words = [f"{first}{unit} on {text}", *(f"{number} on {text}" for text, number in others)]
    return f"{label} {enumeration(words)}{after}"


def _learning_words(result: TextResult) -> str:
    low, high = result.gain.ci if result.gain and result.gain.ci else (0.0, 0.0)
    return "" if low > 0 else " (it got worse)" if high < 0 else " (no learning shown)"


def _divergence(result: TextResult) -> float:
    return result.ref_kl.value if result.ref_kl else 0.0


def _noise(run: RunResults, texts: Sequence[str]) -> str:
    known = texts and all(run.noise_floor.get(text, TextResult()).ref_kl for text in texts)
    return f"noise floor {max(map(run.floor, texts)):.2g}" if known else "no noise floor"


def scale_sentence(run: RunResults) -> str:
    """How much a ref_kl is, on the text that moved most, in what was measured beside it; empty without such a thing."""
    text = max(run.retention, key=lambda text: _divergence(run.retention[text]), default="")
    entropy = run.retention[text].base_ref_cross_entropy if text else None
    if not entropy or not entropy.value or not (value := _divergence(run.retention[text])):
        return ""
    share = value / entropy.value
    words = f"{share:.1%}" if share > MIN_SHARE else "less than 0.1%"
    parts = [f"{words} of the base's own entropy there ({entropy.value:.2f} nats per token)"]
    if text in run.noise_floor:
        times = value / run.floor(text)
        many = f"more than {MAX_TIMES_FLOOR:,}" if times > MAX_TIMES_FLOOR else f"{times:,.0f}"
        parts.append(f"{many} times the noise floor" if times > 1 else "within the noise floor")
    if same := run.retention[text].ref_agreement:
        parts.append(f"and the top token differs at {1 - same.value:.1%} of the positions")
    return f"For scale: ref_kl {cell(value).value} of “{run.name}” on {text} is {', '.join(parts)}."


def overfit_sentence(run: RunResults) -> str:
    """Says that the new-task loss rose again before the end of a run, and what ends at the lower one; or nothing."""
    steps, losses = run.series("eval_loss")
    end = run.end_step
    if end not in steps:
        return ""
    last, best = losses[steps.index(end)], min(losses)
    at = steps[losses.index(best)]
    if at >= end or last <= (1 + MIN_OVERFIT) * best:
        return ""
    return (
        f"“{run.name}” overfits the new task: its loss (eval_loss) was {best:.3f} at step {at:g} and {last:.3f} at "
        f"the end, step {end:g}. Fewer steps, or load_best_model_at_end, would end at the lower loss."
    )


def budget_sentence(run: RunResults, first: RunResults | None = None) -> str:
    """Whether a run kept its budget of divergence, and beside a first run its price in new-task loss; or nothing.

    The budget is of replay rows, which were trained on; texts that moved further are named.
    """
    sentence = (run.training.get("budget") or "").rstrip(".")
    if not sentence:
        return ""
    if limit := run.training.get("max_ref_kl"):
        lows = {text: found.ci[0] for text, result in run.retention.items() if (found := result.ref_kl) and found.ci}
        if above := [text for text, low in lows.items() if low > limit]:
            sentence += f"; on {enumeration(above)}, which the budget does not cover, ref_kl is above {limit:g}"
    text = next(iter(run.new_task), None)
    difference = loss_difference(run, first, text) if first is not None and text is not None else None
    if first is None or difference is None:
        return f"{sentence}."
    more, (own, other) = difference
    cost = f"{value_cell(more).with_interval} nats per token more than “{first.name}”"
    return f"{sentence}. Its new-task loss on {text} is {own:.3f} against {other:.3f}: {cost}."


def answers_sentence(run: RunResults) -> str:
    """One sentence: how often the tuned model answers as its base, and what accuracy shows of it; empty without any.

    By acc_norm where it was measured, else by the first rule; of the sets that agree least.
    """
    chosen: dict[str, tuple[str, Answers]] = {}
    for name, rule, answers in run.rules:
        if answers.agreement and (name not in chosen or rule == "acc_norm"):
            chosen[name] = (rule, answers)
    ordered = sorted(chosen.items(), key=lambda item: item[1][1].agreement.value if item[1][1].agreement else 0.0)
    clauses = [_answers_clause(f"{name} ({rule})", answers) for name, (rule, answers) in ordered]
    return _few(f"“{run.name}” answers", clauses)


def _answers_clause(name: str, answers: Answers) -> str:
    questions = quantity(answers.agreement.num_questions if answers.agreement else 0, "question")
    was, now = (share_cell(found).value for found in (answers.base_accuracy, answers.accuracy))
    shown = _direction("accuracy", "no change in accuracy shown", answers.change)
    agreement, change = share_cell(answers.agreement), points_cell(answers.change)
    return f"{agreement} of {questions} of {name} as its base did; {shown}, {was} → {now}: {change}"


def refusals_sentence(run: RunResults) -> str:
    """One sentence: how often the tuned model refuses, and what was lost, on the worst sets; else empty.

    Of each set by the judge, else by the phrases.
    """
    chosen = []
    for name, requests in run.refusals.items():
        scorer = next((scorer for scorer in SCORERS if scorer in requests.scorers), "")
        found = requests.scorers.get(scorer, BehaviorShares())
        if found.rate:
            prompts = f"{quantity(requests.num_prompts, f'{requests.kind} prompt')} of {name} ({scorer})"
            clause = _shares_clause(f"{share_cell(found.rate)} of {prompts}", "refusals", found)
            chosen.append((requests.kind == "harmless", _change(found), clause))
    return _few(f"“{run.name}” refuses", [clause for *_, clause in sorted(chosen, key=lambda item: item[:2])])


def _shares_clause(start: str, what: str, found: BehaviorShares) -> str:
    shown = _direction(what, f"no change in {what} shown", found.change)
    lost, gained = (count_cell(found.counts.get(fate)).value for fate in ("lost", "gained"))
    fates = f" ({lost} lost, {gained} gained)" if found.counts else ""
    return f"{start}, its base {share_cell(found.base_rate).value}; {shown}: {points_cell(found.change)}{fates}"


def behaviors_sentence(run: RunResults) -> str:
    """One sentence: how often the tuned model shows the behaviours that were measured, the most lost first."""
    chosen = []
    for of in run.behaviors.values():
        leading = next((scorer for scorer in BEHAVIOR_SCORERS if scorer in of.scorers), "")
        found = of.scorers.get(leading, BehaviorShares())
        if any(one and one.value for one in (found.rate, found.base_rate)):
            prompts = quantity(found.rate.num_prompts if found.rate else 0, "prompt")
            start = f"{BEHAVIOR_SCORERS[leading][0]} in {share_cell(found.rate)} of {prompts}"
            chosen.append((_change(found), _shares_clause(start, "the share", found)))
    return _few(f"“{run.name}”", [clause for _, clause in sorted(chosen, key=lambda item: item[0])])


def _change(found: BehaviorShares) -> float:
    return found.change.value if found.change else 0.0


def _direction(what: str, neither: str, change: Estimate | None) -> str:
    low, high = change.ci if change and change.ci else (0.0, 0.0)
    return f"{what} fell" if high < 0 else f"{what} rose" if low > 0 else neither


def _few(start: str, clauses: list[str]) -> str:
    """A sentence of the first clauses; empty without any."""
    more = [f"{quantity(len(clauses) - MAX_NAMED, 'more set')} in the table"] if len(clauses) > MAX_NAMED else []
    return f"{start} {'; '.join(clauses[:MAX_NAMED] + more)}." if clauses else ""


def comparison_verdict(compared: Comparison) -> str:
    """One sentence (two without a matched loss): how much less each run moved from the base for as much learned."""
    names = [f"“{run.name}”" for run in compared.runs]
    texts = compared.matched or compared.end
    shown, left_out = _least_moved(texts, len(names))
    clauses = []
    for at in shown:
        words = _preventions(texts, at)
        clauses.append(
            f"{names[at]} moved away from the base {enumeration(words)}" if words else f"{names[at]} was not measured"
        )
    clauses += [f"{left_out} more runs in the table"] if left_out else []
    if compared.matched:
        start = f"At the same new-task loss ({compared.matched_loss:.3f} nats per token), compared with {names[0]}"
        return f"{start}, {'; '.join(clauses)}."
    why = compared.reason or "no text was measured"
    caution = f"At the ends of the runs, where a smaller change may only mean less learning, compared with {names[0]}"
    return f"{caution}, {'; '.join(clauses)}. No comparison at the same new-task loss: {why}."


def _least_moved(texts: Mapping[str, Sequence[ComparedText]], total: int) -> tuple[list[int], int]:
    """Places of the runs to speak of, after the first: all, or of more than four the three that moved least."""
    others = list(range(1, total))
    if total <= 5:
        return others, 0
    others.sort(key=lambda place: sum(entries[place].ref_kl or 0.0 for entries in texts.values()))
    return others[:MAX_NAMED], len(others) - MAX_NAMED


def _preventions(texts: Mapping[str, Sequence[ComparedText]], at: int) -> list[str]:
    """How far a run moved on each text: on all of few, or on those where least was prevented."""
    named = list(texts)
    if len(named) > MAX_NAMED:
        shares = {text: entries[at].prevented for text, entries in texts.items()}
        named.sort(key=lambda text: math.inf if (share := shares[text]) is None else share)
    words = [_prevention(text, texts[text][at]) for text in named[:MAX_NAMED]]
    more = len(named) - MAX_NAMED
    return words + ([f"as the table shows on {quantity(more, 'more text')}"] if more > 0 else [])


def _prevention(text: str, entry: ComparedText) -> str:
    share, ci = entry.prevented, entry.prevented_ci
    if share is None:
        return f"by an amount that cannot be judged on {text}{' (measured differently)' if entry.unlike else ''}"
    how = f"{abs(share):.0%} {'less' if share >= 0 else 'more'} on {text}"
    if ci is None:
        return f"{how} (no interval)"
    if ci[0] <= 0 <= ci[1]:
        return f"not clearly less or more on {text} (95% interval {0 - ci[1]:+.0%} to {0 - ci[0]:+.0%})"
    low, high = sorted(map(abs, ci))
    return f"{how} [{low:.0%}, {high:.0%}]"


def frontier_sentences(compared: Comparison) -> list[str]:
    """Who is on the frontier; who is beaten, and by whom among others; then the texts that differ from their mean."""
    points = end_points(compared)
    if sum(point is not None for point in points) < 2:
        return []
    names = [f"“{run.name}”" for run in compared.runs]
    best = frontier(points)
    beaten = [
        f"{names[place]} by {names[next(other for other in best if other in others)]}"
        for place, others in enumerate(dominators(points))
        if others
    ]
    mean = " (mean over the texts)" if len(compared.end) > 1 else ""
    found = [f"On the frontier of new-task loss against ref_kl{mean}: {enumeration([names[at] for at in best])}."]
    found += [f"Dominated: {'; '.join(beaten)}."] if beaten else ["No run dominates another."]
    for text in compared.end if mean else ():
        alone = frontier(end_points(compared, text))
        if set(alone) != set(best):
            found.append(f"On {text} alone the frontier is {enumeration([names[at] for at in alone])}.")
    return found


def mismatch_sentences(compared: Comparison) -> list[str]:
    """Which runs are not compared, on which texts, and why: they were not measured alike."""
    found: dict[tuple[str, ...], dict[str, None]] = {}
    for place, run in enumerate(compared.runs):
        odd = [(compared.loss_text or "the new-task loss (eval_loss)", run.unlike, "")]
        for text, entries in compared.end.items():
            matched = (compared.matched.get(text) or entries)[place].unlike
            odd += [(text, matched, ""), (text, entries[place].unlike, "" if matched else " at the end")]
        for text, unlike, where in odd:
            if unlike:
                found.setdefault((run.name, unlike.to, where, unlike.why), {})[text] = None
    return [
        f"“{name}” is not compared with “{to}”{where} on {enumeration(list(texts))}: {why}."
        for (name, to, where, why), texts in found.items()
    ]


def end_sentences(compared: Comparison) -> list[str]:
    """What the ends of the runs were read from."""
    runs, measured = compared.runs, list(compared.measured_texts)
    followed = [text for text in compared.end if text not in measured]
    steps = {f"step {run.final_step:g} of “{run.name}”": run.kept for run in runs if run.final_step is not None}
    found = []
    if compared.loss_text is not None:
        measured.insert(0, f"the new-task loss ({compared.loss_text})")
    elif all(run.final_loss is None for run in runs):
        found.append("The runs have no new-task loss in common.")
    else:
        followed.insert(0, "the new-task loss (eval_loss)")
    found += [f"Measured on the saved models: {enumeration(measured)}."] if measured else []
    if followed and steps:
        found.append(
            f"Read from the evaluations during training, at {enumeration(list(steps))}: {enumeration(followed)}."
        )
    if any(steps.values()):
        found.append(f"load_best_model_at_end kept {enumeration([step for step, kept in steps.items() if kept])}.")
    return found

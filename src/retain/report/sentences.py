"""Sentences that the numbers of a run, or of several runs of one base, support."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from retain.report.comparison import ComparedText, Comparison, dominators, end_points, frontier, loss_difference
from retain.report.numbers import Estimate, cell, count_cell, enumeration, points_cell, quantity, share_cell, value_cell
from retain.report.results import Answers, BehaviorSet, BehaviorShares, ReportRuns, RunResults, TextResult
from retain.report.tables import BEHAVIOR_SCORERS

MIN_OVERFIT = 0.01  # relative to the lowest new-task loss: a rise larger than rounding
MIN_SIGNS = 6  # documents that must agree for the sign test at 95%
MIN_SHARE = 0.0005  # of the base's entropy; less would be written as 0.0%
MAX_TIMES_FLOOR = 1000  # times the noise floor; a larger factor would say no more
MAX_NAMED = 3  # texts, question sets or runs that a sentence names; the table has the rest

STATES = {
    "forgot": "forgot",
    "moved": "changed, but shows no forgetting",
    "improved": "changed, and its loss fell",
    "unmoved": "shows no change",
    "undecided": "is undecided, because there is no interval",
}


def verdict(run: RunResults) -> str:
    """What texts, answers and a budget show about a run."""
    behaviours = behaviour_sentences(run)
    texts = [text_verdict(run)] if run.retention or not behaviours else []
    return " ".join(filter(None, [*texts, *behaviours, budget_sentence(run)]))


def behaviour_sentences(run: RunResults) -> list[str]:
    """What the answers to questions, requests and prompts show about a run."""
    written = [behaviors_sentence(run, sets) for sets in (run.refusals, run.behaviors)]
    return list(filter(None, [answers_sentence(run), *written]))


def opening(runs: ReportRuns, compared: Comparison | None) -> tuple[str, list[tuple[int, str]]]:
    """The sentence for a reader with thirty seconds, and the other findings, each with the place of its run."""
    findings = [
        (at, sentence)
        for at, run in enumerate(runs)
        for sentence in [*behaviour_sentences(run), budget_sentence(run, runs[0] if at else None)]
        if sentence
    ]
    if compared:
        return comparison_verdict(compared), findings
    if runs[0].retention or not findings:
        return text_verdict(runs[0], most=1), findings
    return findings[0][1], findings[1:]


def state(run: RunResults, text: str) -> str:
    """What the intervals of a text show, given its noise floor: a key of `STATES`."""
    result, noise = run.retention[text], run.noise_floor.get(text, TextResult()).forgetting
    loss, moved = (estimate.ci if estimate else None for estimate in (result.forgetting, result.ref_kl))
    low, high = noise.ci if noise and noise.ci else (0.0, 0.0)
    if loss and loss[0] > max(high, 0.0):
        return "forgot"
    if loss and loss[1] < min(low, 0.0):
        return "improved"
    if moved and (moved[0] > run.floor(text) or _moved_everywhere(run, text)):
        return "moved"
    return "unmoved" if loss and moved else "undecided"


def _moved_everywhere(run: RunResults, text: str) -> bool:
    """Whether ref_kl exceeds the noise floor in every document, of at least `MIN_SIGNS` (sign test, p = 1/32 at six).

    The interval of so few skewed values may still reach 0.
    """
    if text not in run.per_document:
        return False
    sums, sizes = run.per_document[text].ref_kl, run.per_document[text].num_tokens
    floor = run.floor(text)
    return len(sums) >= MIN_SIGNS and all(total > floor * size for total, size in zip(sums, sizes, strict=True))


def text_verdict(run: RunResults, most: int = MAX_NAMED) -> str:
    """One sentence: whether and how much was forgotten on the `most` texts that moved most, and what was learned."""
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
    facts = [(label, estimates, after) for label, estimates, after in facts if any(estimates.values())]
    clauses = [_clause(*fact, unit="" if at else " nats per token") for at, fact in enumerate(facts)]
    return f"“{run.name}” {head}{': ' * bool(clauses)}{'; '.join(clauses)}."


def _clause(label: str, estimates: Mapping[str, Estimate | None], after: str, unit: str) -> str:
    """As `label` 0.012 [0.010, 0.015] nats per token on wiki and 0.003 [0.002, 0.004] on code."""
    (text, first), *others = ((text, value_cell(each).with_interval) for text, each in estimates.items() if each)
    words = [f"{first}{unit} on {text}", *(f"{number} on {text}" for text, number in others)]
    return f"{label} {enumeration(words)}{after}"


def _learning_words(result: TextResult) -> str:
    return {1: "", 0: " (no learning shown)", -1: " (it got worse)"}[result.gain.sign if result.gain else 0]


def _divergence(result: TextResult) -> float:
    return result.ref_kl.value if result.ref_kl else 0.0


def _noise(run: RunResults, texts: Sequence[str]) -> str:
    known = texts and all(run.noise_floor.get(text, TextResult()).ref_kl for text in texts)
    return f"noise floor {max(map(run.floor, texts)):.2g}" if known else "no noise floor"


def scale_sentence(run: RunResults) -> str:
    """The ref_kl of the text that moved most, relative to other measurements there; empty if there are none."""
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
    """A warning that the new-task loss rose before the end of a run, with its remedy; empty if it did not."""
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
    """Whether a run kept its divergence budget, and its price in new-task loss relative to a first run.

    The budget covers replay rows, which were trained on, so texts that moved further are named. Empty without a budget.
    """
    sentence = (run.training.get("budget") or "").rstrip(".")
    if not sentence:
        return ""
    if limit := run.training.get("max_ref_kl"):
        lows = {text: kl.ci[0] for text, result in run.retention.items() if (kl := result.ref_kl) and kl.ci}
        if above := [text for text, low in lows.items() if low > limit]:
            sentence += f"; on {enumeration(above)}, which the budget does not cover, ref_kl is above {limit:g}"
    text = next(iter(run.new_task), None)
    difference = loss_difference(run, first, text) if first is not None and text is not None else None
    if first is None or difference is None:
        return f"{sentence}."
    more, (loss, loss_of_first) = difference
    cost = f"{value_cell(more).with_interval} nats per token more than “{first.name}”"
    return f"{sentence}. Its new-task loss on {text} is {loss:.3f} against {loss_of_first:.3f}: {cost}."


def answers_sentence(run: RunResults) -> str:
    """One sentence: how often the tuned model answers as its base does, and the change in accuracy; else empty.

    Names the question sets that agree least, by acc_norm if it was measured, else by the first rule.
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
    was, now = (share_cell(accuracy).value for accuracy in (answers.base_accuracy, answers.accuracy))
    shown = _direction("accuracy", "no change in accuracy shown", answers.change)
    agreement, change = share_cell(answers.agreement), points_cell(answers.change)
    return f"{agreement} of {questions} of {name} as its base did; {shown}, {was} → {now}: {change}"


def behaviors_sentence(run: RunResults, sets: Mapping[str, BehaviorSet]) -> str:
    """One sentence: how often the tuned model shows each behaviour, or refuses; what lost most first; else empty.

    According to the first of `BEHAVIOR_SCORERS` that was measured. A behaviour that neither model shows is left out; a
    set of requests never is.
    """
    chosen = []
    for name, behavior in sets.items():
        scorer = next((scorer for scorer in BEHAVIOR_SCORERS if scorer in behavior.scorers), "")
        shares, is_request = behavior.scorers.get(scorer, BehaviorShares()), behavior.noun != "prompt"
        if shares.rate and (is_request or any(rate and rate.value for rate in (shares.rate, shares.base_rate))):
            prompts = quantity(shares.rate.num_prompts, behavior.noun) + (f" of {name}" if is_request else "")
            start = f"{BEHAVIOR_SCORERS[scorer][0]} in {share_cell(shares.rate)} of {prompts}"
            chosen.append((behavior.kind == "harmless", _change(shares), _shares_clause(start, shares)))
    return _few(f"“{run.name}”", [clause for *_, clause in sorted(chosen, key=lambda item: item[:2])])


def _shares_clause(start: str, shares: BehaviorShares) -> str:
    shown = _direction("the share", "no change in the share shown", shares.change)
    lost, gained = (count_cell(shares.counts.get(fate)).value for fate in ("lost", "gained"))
    fates = f" ({lost} lost, {gained} gained)" if shares.counts else ""
    return f"{start}, its base {share_cell(shares.base_rate).value}; {shown}: {points_cell(shares.change)}{fates}"


def _change(shares: BehaviorShares) -> float:
    return shares.change.value if shares.change else 0.0


def _direction(what: str, neither: str, change: Estimate | None) -> str:
    return {1: f"{what} rose", 0: neither, -1: f"{what} fell"}[change.sign if change else 0]


def _few(start: str, clauses: list[str]) -> str:
    """A sentence of the first clauses; empty if there are none."""
    more = [f"{quantity(len(clauses) - MAX_NAMED, 'more set')} in the table"] if len(clauses) > MAX_NAMED else []
    return f"{start} {'; '.join(clauses[:MAX_NAMED] + more)}." if clauses else ""


def comparison_verdict(compared: Comparison) -> str:
    """How much less each run moved from the base at the same new-task loss, or at its end with a caution."""
    names = [f"“{run.name}”" for run in compared.runs]
    texts = compared.matched or compared.end
    shown = _least_moved(texts, len(names))
    clauses = []
    for at in shown:
        words = _preventions(texts, at)
        clauses.append(
            f"{names[at]} moved away from the base {enumeration(words)}" if words else f"{names[at]} was not measured"
        )
    left_out = len(names) - 1 - len(shown)
    clauses += [f"{left_out} more runs in the table"] if left_out else []
    if compared.matched:
        start = f"At the same new-task loss ({compared.matched_loss:.3f} nats per token), compared with {names[0]}"
        return f"{start}, {'; '.join(clauses)}."
    why = compared.reason or "no text was measured"
    caution = f"At the ends of the runs, where a smaller change may only mean less learning, compared with {names[0]}"
    return f"{caution}, {'; '.join(clauses)}. No comparison at the same new-task loss: {why}."


def _least_moved(texts: Mapping[str, Sequence[ComparedText]], total: int) -> list[int]:
    """Places of the runs to name besides the first: of many, those that moved least."""
    others = list(range(1, total))
    if total <= 5:
        return others
    return sorted(others, key=lambda at: sum(entries[at].ref_kl or 0.0 for entries in texts.values()))[:MAX_NAMED]


def _preventions(texts: Mapping[str, Sequence[ComparedText]], at: int) -> list[str]:
    """How far a run moved on each text, or on the texts where it prevented least if there are many."""
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
    """The runs on the frontier, the dominated ones, and the texts whose frontier differs from that of the mean."""
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
    sentences = [f"On the frontier of new-task loss against ref_kl{mean}: {enumeration([names[at] for at in best])}."]
    sentences += [f"Dominated: {'; '.join(beaten)}."] if beaten else ["No run dominates another."]
    for text in compared.end if mean else ():
        alone = frontier(end_points(compared, text))
        if set(alone) != set(best):
            sentences.append(f"On {text} alone the frontier is {enumeration([names[at] for at in alone])}.")
    return sentences


def mismatch_sentences(compared: Comparison) -> list[str]:
    """Which runs are not compared on which texts, because they were measured differently, and how."""
    texts_by_reason: dict[tuple[str, ...], dict[str, None]] = {}
    for place, run in enumerate(compared.runs):
        mismatches = [(compared.loss_text or "the new-task loss (eval_loss)", run.unlike, "")]
        for text, entries in compared.end.items():
            matched = (compared.matched.get(text) or entries)[place].unlike
            mismatches += [(text, matched, ""), (text, entries[place].unlike, "" if matched else " at the end")]
        for text, unlike, where in mismatches:
            if unlike:
                texts_by_reason.setdefault((run.name, unlike.to, where, unlike.why), {})[text] = None
    return [
        f"“{name}” is not compared with “{to}”{where} on {enumeration(list(texts))}: {why}."
        for (name, to, where, why), texts in texts_by_reason.items()
    ]


def end_sentences(compared: Comparison) -> list[str]:
    """Where the numbers at the ends of the runs are from."""
    runs, measured = compared.runs, list(compared.measured_texts)
    evaluated = [text for text in compared.end if text not in measured]
    steps = {f"step {run.final_step:g} of “{run.name}”": run.kept for run in runs if run.final_step is not None}
    sentences = []
    if compared.loss_text is not None:
        measured.insert(0, f"the new-task loss ({compared.loss_text})")
    elif all(run.final_loss is None for run in runs):
        sentences.append("The runs have no new-task loss in common.")
    else:
        evaluated.insert(0, "the new-task loss (eval_loss)")
    sentences += [f"Measured on the saved models: {enumeration(measured)}."] if measured else []
    if evaluated and steps:
        sentences.append(
            f"Read from the evaluations during training, at {enumeration(list(steps))}: {enumeration(evaluated)}."
        )
    if any(steps.values()):
        sentences.append(f"load_best_model_at_end kept {enumeration([step for step, kept in steps.items() if kept])}.")
    return sentences

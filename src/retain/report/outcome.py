"""The outcome of a run in four lines: learned, forgotten, prevented, cost."""

from __future__ import annotations

from collections.abc import Sequence

from retain.report.comparison import ComparedText, compare_at_matched_loss
from retain.report.numbers import Estimate, cell, quantity, value_cell
from retain.report.results import RunResults

UNIT = "nats per token"


def outcome_lines(run: RunResults, plain: RunResults | None = None) -> list[str]:
    """What a run learned and forgot, and how much of the forgetting of `plain`, an unprotected run, it prevented."""
    prevented = f"prevented: {_prevented_words(plain, run)}" if plain else (
        "prevented: unknown without an unprotected run to compare with; --compare_plain true makes one"
    )  # fmt: skip
    return [f"learned: {_learned_words(run)}", f"forgotten: {_forgotten_words(run)}", prevented]


def _learned_words(run: RunResults) -> str:
    for name, text in run.new_task.items():
        if text.loss and text.base_loss and text.gain:
            low, high = text.gain.ci or (0.0, 0.0)
            words = "lower by" if low > 0 else "it got worse, higher by" if high < 0 else "no learning shown, lower by"
            rows = f"{quantity(text.loss.num_documents, 'held-out row')} of the {name}"
            gain = Estimate(-text.gain.value, (-high, -low)) if high < 0 else text.gain
            change = f"{words} {value_cell(gain).with_interval} {UNIT}"
            return f"loss {text.base_loss.value:.3f} → {text.loss.value:.3f} on {rows}, {change}"
    steps, losses = run.training_losses
    if len(steps) > 1:
        change = f"training loss {losses[0]:.3f} → {losses[-1]:.3f} (logged at steps {steps[0]:g} and {steps[-1]:g})"
        return f"{change}; no rows were held out: --eval_dataset_name FILE gives some"
    return "not measured; --eval_dataset_name FILE measures on held-out rows"


def _forgotten_words(run: RunResults) -> str:
    moved = {name: text for name, text in run.retention.items() if text.ref_kl}
    if not moved:
        return "not measured; --retention name=file measures on a text"
    name, text = max(moved.items(), key=lambda item: item[1].ref_kl.value if item[1].ref_kl else 0.0)
    among = f", which moved most of {len(moved)} texts" if len(moved) > 1 else ""
    loss = ""
    if text.loss and text.base_loss and text.forgetting:
        change = f"{text.base_loss.value:.3f} → {text.loss.value:.3f}"
        loss = f"; loss there {change}, change {value_cell(text.forgetting).with_interval}"
    return f"ref_kl {value_cell(text.ref_kl).with_interval} {UNIT} on “{name}”{among}{loss}"


def _prevented_words(plain: RunResults, run: RunResults) -> str:
    compared = compare_at_matched_loss([plain, run])
    where = f"at the same new-task loss ({compared.matched_loss or 0:.3f})"
    texts = compared.matched
    if not any(entries[1].prevented is not None for entries in texts.values()):
        why = compared.reason or "no text was measured at the same new-task loss"
        texts, where = compared.end, f"at the ends of both runs, where learning less also means forgetting less; {why}"
    known = {name: entries[1] for name, entries in texts.items() if entries[1].prevented is not None}
    if not known:
        notes = [entries[1].note for entries in texts.values() if entries[1].note]
        return f"cannot be judged; {notes[0] if notes else 'no text was measured'}"
    name, least = min(known.items(), key=lambda item: item[1].prevented or 0.0)
    among = f", the least of {len(known)} texts" if len(known) > 1 else ""
    return f"{_prevented_share(least)} on “{name}”{among}, {where}"


def _prevented_share(entry: ComparedText) -> str:
    share = entry.prevented or 0.0
    low, high = entry.prevented_ci or (share, share)
    if high < 0:
        more = cell(-share, entry.prevented_ci and (-high, -low), percent=True).with_interval
        return f"nothing, ref_kl is {more} above the unprotected run's"
    prevented = cell(share, entry.prevented_ci, percent=True).with_interval
    return f"{'' if low > 0 else 'not clear, '}{prevented} of the unprotected run's ref_kl"


def cost_line(seconds: float | None, plain_seconds: float | None, others: Sequence[tuple[str, float]]) -> str:
    """What protection cost: seconds per step, compared with an unprotected run, and those of each of `others`."""
    parts = [f"{seconds:.3g} s per step" if seconds else "steps were not timed (resumed at the end)"]
    if seconds and plain_seconds:
        parts[0] += f", {seconds / plain_seconds:.2f} times the unprotected run's {plain_seconds:.3g} s"
    return "cost: " + "; ".join([*parts, *(f"{name} {taken:.0f} s" for name, taken in others)])

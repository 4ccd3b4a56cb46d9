"""Base and tuned model's answers to the same questions, compared question by question. Plain data in, plain data out.

Accuracy hides forgetting: a model may lose as many answers as it wins. Agreement with the base's own answers does
not (Kalajdzievski, arXiv 2401.05605), so it comes first.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from typing import Any

import numpy as np

from retain.report.numbers import count, is_number, points, probability, quantity, share
from retain.statistics import mcnemar, paired_change_interval, share_interval

# (key, label, meaning): what became of a question, from the base to the tuned model.
FATES = (
    ("right_wrong", "right → wrong", "questions that the base answered rightly and the tuned model does not"),
    ("wrong_right", "wrong → right", "the reverse; where both numbers are alike, accuracy does not move"),
    ("wrong_other", "wrong → other wrong", "questions both get wrong, each in its own way"),
)
MEANINGS = (
    ("same answer as the base", "share of questions to which both models give the same answer, right or wrong"),
    ("accuracy", "share of questions answered rightly; acc takes the choice of the highest log-likelihood, acc_norm "
                 "that of the highest log-likelihood per character of the choice, as lm-evaluation-harness does"),
    *((label, meaning) for _, label, meaning in FATES),
    ("McNemar p", "exact test: how probable so uneven a split into lost and won is if either is as likely"),
)  # fmt: skip


def compare_answers(
    base: Sequence[Hashable],
    tuned: Sequence[Hashable],
    base_right: Sequence[bool],
    tuned_right: Sequence[bool],
    *,
    unit: str = "num_questions",
) -> dict[str, Any]:
    """Agreement, accuracies, what was lost and won, McNemar's p, and 95% intervals over questions.

    The shares have Wilson's interval; `change`, accuracy after − before, has Tango's for paired shares.

    Args:
        base, tuned: each model's answer to each question, in anything that can be compared.
        base_right, tuned_right: whether that answer is right.
        unit: the key of the sample size.
    """
    before, after = np.asarray(base_right, bool), np.asarray(tuned_right, bool)
    same = np.array([one == other for one, other in zip(base, tuned, strict=True)], bool)
    total = len(same)
    counts = {
        "right_right": before & after,
        "right_wrong": before & ~after,
        "wrong_right": ~before & after,
        "wrong_same": ~before & ~after & same,
        "wrong_other": ~before & ~after & ~same,
    }
    return {
        "agreement": share_entry(int(same.sum()), total, unit),
        "accuracy": share_entry(int(after.sum()), total, unit),
        "base_accuracy": share_entry(int(before.sum()), total, unit),
        "change": change_entry(before, after, unit),
        "counts": {name: int(found.sum()) for name, found in counts.items()},
        "mcnemar_p": mcnemar(int(counts["right_wrong"].sum()), int(counts["wrong_right"].sum())),
    }


def share_entry(count: int, total: int, unit: str = "num_questions") -> dict[str, Any]:
    """A share of questions with its 95% interval and sample size."""
    value, *ci = share_interval(count, total)
    return {"value": value, "ci": ci, unit: total}


def change_entry(before: np.ndarray, after: np.ndarray, unit: str = "num_questions") -> dict[str, Any]:
    """The change of a share of the same questions, given as flags, with its 95% interval and sample size."""
    value, *ci = paired_change_interval(int((before & ~after).sum()), int((after & ~before).sum()), len(before))
    return {"value": value, "ci": ci, unit: len(before)}


def rules_of(run: dict) -> Iterator[tuple[str, str, dict]]:
    """(name of the questions, scoring rule, what `compare_answers` found) of a run."""
    for name, found in (run.get("choices") or {}).items():
        for rule, compared in found["rules"].items():
            yield name, rule, compared


def answers_table(runs: Sequence[dict]) -> dict[str, Any] | None:
    """Agreement first, then accuracy and its change, runs across; in the form of `report.metric_table`.

    None where no questions were asked. The column `base` is the base's own accuracy, and base against base.
    """
    found = [{(name, rule): compared for name, rule, compared in rules_of(run)} for run in runs]
    sections = []
    for key in dict.fromkeys(key for of_run in found for key in of_run):
        compared = [of_run.get(key) for of_run in found]
        sections.append({"title": f"{key[0]}, {key[1]}", "rows": _rows([entry or {} for entry in compared])})
    sets = [item for run in runs for item in (run.get("choices") or {}).items()]
    notes = dict.fromkeys(f"{name}: {note}" for name, of_set in sets for note in [_asked(of_set), *of_set["notes"]])
    table = {"columns": [run["name"] for run in runs], "has_base": True, "sections": sections, "notes": list(notes)}
    return table if sections else None


def _asked(of_set: dict) -> str:
    template = {True: ", in the chat template", False: ", without a chat template"}.get(of_set["chat_template"], "")
    return f"{quantity(of_set['num_questions'], 'question')}, {of_set['style']}{template}."


def _rows(compared: Sequence[dict]) -> list[dict[str, Any]]:
    first: dict = next(filter(None, compared))
    nothing = {"value": "–", "interval": ""}
    rows = [
        (
            "same answer as the base",
            share(first.get("noise_agreement")),
            [share(c.get("agreement")) for c in compared],
        ),
        ("accuracy", share(first["base_accuracy"]), [share(c.get("accuracy")) for c in compared]),
        ("accuracy, change", nothing, [points(c.get("change")) for c in compared]),
    ]
    for fate, label, _ in FATES:
        rows.append((label, nothing, [count((c.get("counts") or {}).get(fate)) for c in compared]))
    rows.append(("McNemar p", nothing, [probability(c.get("mcnemar_p")) for c in compared]))
    return [{"label": label, "base": base, "cells": cells} for label, base, cells in rows]


def answers_sentence(run: dict) -> str:
    """One sentence: how often the tuned model answers as its base, and what accuracy shows of it; empty if not asked.

    Told of acc_norm where it was measured, else of the first rule; of the three sets that agree least.
    """
    chosen: dict[str, tuple[str, dict]] = {}
    for name, rule, compared in rules_of(run):
        if name not in chosen or rule == "acc_norm":
            chosen[name] = (rule, compared)
    told = sorted(chosen.items(), key=lambda item: item[1][1]["agreement"]["value"])
    clauses = [_clause(name, rule, compared) for name, (rule, compared) in told[:3]]
    if len(told) > 3:
        clauses.append(f"{len(told) - 3} more sets in the table")
    return f"“{run['name']}” answers {'; '.join(clauses)}." if clauses else ""


def _clause(name: str, rule: str, compared: dict) -> str:
    agreement, change = share(compared["agreement"]), points(compared["change"])
    low, high = compared["change"]["ci"]
    shown = "accuracy fell" if is_number(high) and high < 0 else "accuracy rose" if is_number(low) and low > 0 else ""
    was, now = (f"{compared[key]['value']:.1%}" for key in ("base_accuracy", "accuracy"))
    moved = f"{shown or 'no change of accuracy shown'}, {was} → {now}: {change['value']} {change['interval']}".rstrip()
    questions = f"{quantity(compared['agreement']['num_questions'], 'question')} of {name} ({rule})"
    return f"{agreement['value']} {agreement['interval']} of {questions} as its base did; {moved}"

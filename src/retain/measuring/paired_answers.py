"""Base and tuned model's answers to the same questions, compared question by question.

Accuracy hides forgetting: a model may lose as many answers as it wins. Agreement with the base's own answers does
not (Kalajdzievski, arXiv 2401.05605), so it comes first.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from retain.statistics import mcnemar, paired_change_interval, share_interval


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


@dataclass(frozen=True)
class Answered:
    """One model's answer to one question, as the file of an evaluation program has it."""

    answer: Hashable | None
    """None where it does not follow from the file, or is neither right nor wrong."""
    right: bool
    question: Mapping[str, Hashable | None]
    """What must be equal in the files of both models."""
    wording: Hashable = None
    """Of the prompt."""


@dataclass(frozen=True)
class AnswerFile:
    """One model's answers to the questions of one task: by scoring rule, then by the question's number or name."""

    program: str
    task: str
    name: str
    model: str
    answers: Mapping[str, Mapping[Hashable, Answered]]
    notes: list[str] = field(default_factory=list)


def pair_answers(base: AnswerFile, tuned: AnswerFile) -> dict[str, Any]:
    """Compare the answers of two models to the same questions; in the form of `measure_choices`.

    Raises:
        ValueError: if the files share no question, hold different ones under one number, or imply no answers.
    """
    rules: dict[str, Any] = {}
    notes = dict.fromkeys(base.notes + tuned.notes)
    if alone := base.answers.keys() ^ tuned.answers.keys():
        notes[f"Left out, since only one file has it: {', '.join(sorted(alone))}."] = None
    unclear: dict[str, None] = {}  # rules whose answers do not follow
    for rule, before in base.answers.items():
        after = tuned.answers.get(rule, {})
        both = [number for number in before if number in after]
        if not both:
            continue
        notes |= dict.fromkeys(_file_differences(before, after, both))
        first: dict[Any, Hashable] = {}
        for number in both:
            content = tuple(before[number].question.values())
            first.setdefault(content if any(content) else number, number)
        if copies := len(both) - len(first):
            notes[f"{copies} of {len(both)} questions are copies of others, and left out."] = None
        sides = [[of_file[number] for number in first.values()] for of_file in (before, after)]
        answers = [[one.answer for one in side] for side in sides]
        if None in answers[0] + answers[1]:
            notes[f"{rule} is left out: the answers behind it do not follow from the file."] = None
            unclear[rule] = None
            continue
        right = [[one.right for one in side] for side in sides]
        rules[rule] = compare_answers(answers[0], answers[1], right[0], right[1])
    if not rules:
        why = "share no question that both answered under one rule; give two of the same task"
        if unclear:
            why = f"do not tell the answers behind {', '.join(unclear)}; give a task whose answers are right or wrong"
        raise ValueError(f"pair: the files of {base.model!r} and {tuned.model!r} {why}")
    most = max(compared["agreement"]["num_questions"] for compared in rules.values())
    return {"style": f"paired from files of {base.program}", "chat_template": None, "num_questions": most,
            "rules": rules, "notes": list(notes), "answers": {}, "lost": []}  # fmt: skip


def _file_differences(
    before: Mapping[Hashable, Answered], after: Mapping[Hashable, Answered], shared: list[Hashable]
) -> Iterator[str]:
    """What the files do not share, in words; a `ValueError` where one number names two questions."""
    for number in shared:
        for key, one in before[number].question.items():
            other = after[number].question.get(key)
            if one != other and one is not None and other is not None:
                raise ValueError(f"pair: question {number} is not the same in both files ({key} differs); "
                                 "give files of the same task and version")  # fmt: skip
    alone = [len(of_file) - len(shared) for of_file in (before, after)]
    if any(alone):
        yield f"Left out, since only one file has them: {alone[0]} of the base's questions, {alone[1]} of the tuned's."
    if other := sum(before[number].wording != after[number].wording for number in shared):
        yield f"{other} of {len(shared)} questions were put in other words: another template, or other examples."


def report_entry(value: float, low: float, high: float, **sizes: int) -> dict[str, Any]:
    """A number as report.json holds it: with its interval, null where it is NaN, and sample sizes."""
    return {"value": value, "ci": [low, high] if math.isfinite(low) else [None, None], **sizes}


def share_entry(count: int, total: int, unit: str = "num_questions") -> dict[str, Any]:
    """A share of questions with its 95% interval and sample size."""
    return report_entry(*share_interval(count, total), **{unit: total})


def change_entry(before: np.ndarray, after: np.ndarray, unit: str = "num_questions") -> dict[str, Any]:
    """The change of a share of the same questions, given as flags, with its 95% interval and sample size."""
    lost, won = int((before & ~after).sum()), int((after & ~before).sum())
    return report_entry(*paired_change_interval(lost, won, len(before)), **{unit: len(before)})

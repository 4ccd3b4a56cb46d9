"""Compare the answers of base and tuned model question by question.

Accuracy hides forgetting if a model loses as many answers as it wins. Agreement with the base's own answers does not
(Kalajdzievski, arXiv 2401.05605), so it comes first.
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
    """Agreement, accuracies, counts of lost and won answers, and McNemar's p, with 95% intervals over questions.

    Shares have Wilson's interval; `change`, accuracy after − before, has Tango's interval for paired shares.

    Args:
        base, tuned: each model's answer to each question, of any comparable type.
        base_right, tuned_right: whether that answer is right.
        unit: the key of the sample size.
    """
    before, after = np.asarray(base_right, bool), np.asarray(tuned_right, bool)
    same = np.array([answer == other for answer, other in zip(base, tuned, strict=True)], bool)
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
        "counts": {name: int(flags.sum()) for name, flags in counts.items()},
        "mcnemar_p": mcnemar(int(counts["right_wrong"].sum()), int(counts["wrong_right"].sum())),
    }


@dataclass(frozen=True)
class Answered:
    """One model's answer to one question in the file of an evaluation program."""

    answer: Hashable | None
    """None if the file does not tell, or the answer is neither right nor wrong."""
    right: bool
    question: Mapping[str, Hashable | None]
    """Its content, which must be the same in the files of both models."""
    wording: Hashable = None
    """The prompt's wording, which may differ."""


@dataclass(frozen=True)
class AnswerFile:
    """One model's answers to the questions of one task, by scoring rule and then by question id."""

    program: str
    task: str
    name: str
    model: str
    answers: Mapping[str, Mapping[Hashable, Answered]]
    notes: list[str] = field(default_factory=list)


def pair_answers(base: AnswerFile, tuned: AnswerFile) -> dict[str, Any]:
    """Compare the answers of two models to the same questions; returns what `measure_choices` does.

    Raises:
        ValueError: if the files share no question, use one id for different questions, or do not tell the answers.
    """
    rules: dict[str, Any] = {}
    notes = dict.fromkeys(base.notes + tuned.notes)
    if unshared := base.answers.keys() ^ tuned.answers.keys():
        notes[f"Left out, since only one file has it: {', '.join(sorted(unshared))}."] = None
    unclear = []  # rules without answers
    for rule, before in base.answers.items():
        after = tuned.answers.get(rule, {})
        shared = [key for key in before if key in after]
        if not shared:
            continue
        notes |= dict.fromkeys(_file_differences(before, after, shared))
        first: dict[Any, Hashable] = {}
        for key in shared:
            content = tuple(before[key].question.values())
            first.setdefault(content if any(content) else key, key)
        if copies := len(shared) - len(first):
            notes[f"{copies} of {len(shared)} questions are copies of others, and left out."] = None
        sides = [[of_file[key] for key in first.values()] for of_file in (before, after)]
        answers = [[answered.answer for answered in side] for side in sides]
        if None in answers[0] + answers[1]:
            notes[f"{rule} is left out: the file does not tell the answers behind it."] = None
            unclear.append(rule)
            continue
        right = [[answered.right for answered in side] for side in sides]
        rules[rule] = compare_answers(answers[0], answers[1], right[0], right[1])
    if not rules:
        why = "share no question that both answered under one rule; give two of the same task"
        if unclear:
            why = f"do not tell the answers behind {', '.join(unclear)}; give a task whose answers are right or wrong"
        raise ValueError(f"pair: the files of {base.model!r} and {tuned.model!r} {why}")
    num_questions = max(compared["agreement"]["num_questions"] for compared in rules.values())
    return {"style": f"paired from files of {base.program}", "chat_template": None, "num_questions": num_questions,
            "rules": rules, "notes": list(notes), "answers": {}, "lost": []}  # fmt: skip


def _file_differences(
    before: Mapping[Hashable, Answered], after: Mapping[Hashable, Answered], shared: list[Hashable]
) -> Iterator[str]:
    """Notes on how the files differ; raises a `ValueError` if a question's content does."""
    for key in shared:
        for part, content in before[key].question.items():
            other = after[key].question.get(part)
            if content != other and content is not None and other is not None:
                raise ValueError(f"pair: question {key} is not the same in both files ({part} differs); "
                                 "give files of the same task and version")  # fmt: skip
    unshared = [len(of_file) - len(shared) for of_file in (before, after)]
    if any(unshared):
        of_base, of_tuned = unshared
        yield f"Left out, since only one file has them: {of_base} of the base's questions, {of_tuned} of the tuned's."
    if reworded := sum(before[key].wording != after[key].wording for key in shared):
        yield f"{reworded} of {len(shared)} questions have other prompts: another template, or other examples."


def report_entry(value: float, low: float, high: float, **sizes: int) -> dict[str, Any]:
    """A number in report.json, with its interval, null where NaN, and sample sizes."""
    return {"value": value, "ci": [low, high] if math.isfinite(low) else [None, None], **sizes}


def share_entry(count: int, total: int, unit: str = "num_questions") -> dict[str, Any]:
    """A share with its 95% interval and sample size."""
    return report_entry(*share_interval(count, total), **{unit: total})


def change_entry(before: np.ndarray, after: np.ndarray, unit: str = "num_questions") -> dict[str, Any]:
    """The change of a share with its 95% interval and sample size, from flags of the same questions."""
    lost, won = int((before & ~after).sum()), int((after & ~before).sum())
    return report_entry(*paired_change_interval(lost, won, len(before)), **{unit: len(before)})

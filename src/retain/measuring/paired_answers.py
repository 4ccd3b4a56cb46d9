"""Base and tuned model's answers to the same questions, compared question by question.

Accuracy hides forgetting: a model may lose as many answers as it wins. Agreement with the base's own answers does
not (Kalajdzievski, arXiv 2401.05605), so it comes first.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
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

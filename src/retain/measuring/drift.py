"""How the texts that a model writes changed, in form, words and knowledge. Plain data in, plain data out.

A tuned model may say the same in another form (shorter, without ending its turn, with chat markers written out) or
something else in the same form. The two are counted separately.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from retain.measuring.paired_answers import change_entry, report_entry, share_entry
from retain.report.tables import KNOWLEDGE_FATES
from retain.statistics import bootstrap_ratio

# Scripts without spaces between words (Thai, Lao, Burmese, Khmer, kana, Han), and hangul.
_UNSPACED = "[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af\U00020000-\U0003ffff]"
_JOINERS = "\u200c\u200d"  # inside words in Persian and Hindi
# Markers of any chat template, written out as ordinary text.
MARKERS = re.compile(
    r"<\|?/?(im_start|im_end|user|assistant|system|end|eot_id|start_header_id|end_header_id|start_of_turn|end_of_turn)\|?>"
    r"|\[/?INST\]|<</?SYS>>|^ *#+ *(Instruction|Response|Input)s? *:? *$|^ *(User|Human|Assistant) *:",
    re.IGNORECASE | re.MULTILINE,
)


def mean_entry(values: Sequence[float] | np.ndarray, **options: Any) -> dict[str, Any]:
    """A mean over prompts with its 95% bootstrap interval over prompts; `options` go to `bootstrap_ratio`."""
    numbers = np.asarray(values, float)
    return report_entry(*bootstrap_ratio(numbers, np.ones(len(numbers)), **options), num_prompts=len(numbers))


def length_entries(before: Sequence[int], after: Sequence[int], **resampling: Any) -> dict[str, Any]:
    """Mean lengths of both models' answers to the same prompts, and their paired change; see `mean_entry`."""
    base, tuned = np.asarray(before, float), np.asarray(after, float)
    return {
        "base_length": mean_entry(base, within=(0.0, np.inf), **resampling),
        "length": mean_entry(tuned, within=(0.0, np.inf), **resampling),
        "length_change": mean_entry(tuned - base, **resampling),
    }


def words_in(text: str) -> list[str]:
    """Case-folded words, in normal form NFC; single characters in scripts without spaces between words.

    >>> words_in("3.14 or 2024年, हिन्दी")
    ['3.14', 'or', '2024', '年', 'हिन्दी']
    """
    folded = unicodedata.normalize("NFC", text.casefold())
    marks = "".join(sorted(mark for mark in set(folded) if unicodedata.category(mark) in ("Mn", "Mc")))  # not in \w
    rest = rf"(?!{_UNSPACED})[\w{marks}{_JOINERS}]"
    return re.findall(rf"{_UNSPACED}|\d+(?:[.,]\d+)+|(?!{_UNSPACED})\w(?:{rest})*", folded)


def word_overlap(base: str, tuned: str) -> float:
    """F1 of the words of two texts, as multisets; 1 for two empty texts.

    >>> word_overlap("the red fox", "A red fox")
    0.6666666666666666
    """
    before, after = Counter(words_in(base)), Counter(words_in(tuned))
    if not before and not after:
        return 1.0
    return 2 * (before & after).total() / (before.total() + after.total())


def holds_answer(text: str, wanted: str) -> bool:
    """Whether a text contains the wanted answer as whole words, ignoring case and punctuation."""
    answer, words = words_in(wanted), words_in(text)
    return bool(answer) and any(words[at : at + len(answer)] == answer for at in range(len(words)))


def knows(text: str, expected: str | None) -> bool:
    """Whether there is an expected answer and the text contains it."""
    return expected is not None and holds_answer(text, expected)


def knowledge_fate(base: str, tuned: str, expected: str | None, updated: str | None) -> str | None:
    """Classify a question by the answers of base and tuned model: one of `KNOWLEDGE_FATES`, or None if not a question.

    kept: both give the expected answer. updated: the tuned model gives the new one. forgotten: only the base gives the
    expected one. learned: only the tuned model gives the expected one. unknown: neither does.

    >>> knowledge_fate("It is Paris.", "It is Rome.", expected="Paris", updated=None)
    'forgotten'
    """
    if expected is None and updated is None:
        return None
    before, after = (knows(text, expected) for text in (base, tuned))
    if updated is not None and holds_answer(tuned, updated):
        return "updated"
    if before:
        return "kept" if after else "forgotten"
    return "learned" if after else "unknown"


def knowledge(fates: Sequence[str], known: Sequence[bool]) -> dict[str, Any] | None:
    """Counts by fate, and the share of the base's knowledge that was not forgotten; None if there are no questions.

    Args:
        fates: one of `KNOWLEDGE_FATES` per question.
        known: whether the base gave the expected answer, which `updated` does not imply.
    """
    if not fates:
        return None
    counts = {name: fates.count(name) for name in KNOWLEDGE_FATES}
    kept = [fate != "forgotten" for fate, was_known in zip(fates, known, strict=True) if was_known]
    share = share_entry(sum(kept), len(kept)) if kept else None
    return {"num_questions": len(fates), "counts": counts, "kept_share": share}


def drift(rows: Sequence[dict[str, Any]], *, seed: int = 0, num_resamples: int = 2000) -> dict[str, Any]:
    """Compare the form and the words of both models' texts.

    Means have bootstrap intervals over prompts, shares Wilson's. Changes are tuned − base, paired by prompt; changes of
    shares have Tango's interval. Lengths are in tokens. Word overlaps that are all 0 or all 1 have a share's interval,
    which is valid for any values in between.

    Args:
        rows: per prompt `answers`, `num_tokens`, `ended` and `markers`, each with the values of `base` and `tuned`.
    """
    resampling: dict[str, Any] = {"seed": seed, "num_resamples": num_resamples}

    def share(flags: Any) -> dict[str, Any]:
        return share_entry(int(sum(flags)), len(rows), unit="num_prompts")

    overlaps = [word_overlap(**row["answers"]) for row in rows]
    constant = set(overlaps) in ({0.0}, {1.0})
    lengths = [[row["num_tokens"][who] for row in rows] for who in ("base", "tuned")]
    result: dict[str, Any] = {
        "num_prompts": len(rows),
        "identical": share(row["answers"]["base"] == row["answers"]["tuned"] for row in rows),
        "words": share(overlaps) if constant else mean_entry(overlaps, within=(0.0, 1.0), **resampling),
        **length_entries(*lengths, **resampling),
    }
    for key in ("ended", "markers"):
        before, after = (np.array([row[key][who] for row in rows], bool) for who in ("base", "tuned"))
        change = change_entry(before, after, unit="num_prompts")
        result |= {f"base_{key}": share(before), key: share(after), f"{key}_change": change}
    return result

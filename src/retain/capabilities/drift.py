"""What became of the texts that a model writes: form, words, and knowledge. Plain data in, plain data out.

A tuned model may say the same in another form (shorter, without ending its turn, with a template's marks written out)
or something else in the same form. The two are counted apart.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from retain.capabilities.answers import share_entry
from retain.statistics import bootstrap_ratio

FATES = ("kept", "updated", "forgotten", "learned", "unknown")
KNOWN_BEFORE = ("kept", "updated", "forgotten")
# A chat template's marks written out as ordinary text, whichever template they come from.
MARKERS = re.compile(
    r"<\|?/?(im_start|im_end|user|assistant|system|end|eot_id|start_header_id|end_header_id|start_of_turn|end_of_turn)\|?>"
    r"|\[/?INST\]|<</?SYS>>|^ *#+ *(Instruction|Response|Input)s? *:? *$|^ *(User|Human|Assistant) *:",
    re.IGNORECASE | re.MULTILINE,
)


def mean_entry(values: Sequence[float] | np.ndarray, *, seed: int, num_resamples: int) -> dict[str, Any]:
    """A mean over prompts with its 95% interval by bootstrap over prompts."""
    numbers = np.asarray(values, float)
    value, low, high = bootstrap_ratio(numbers, np.ones(len(numbers)), seed=seed, num_resamples=num_resamples)
    return {"value": value, "ci": [low, high] if np.isfinite(low) else [None, None], "num_prompts": len(numbers)}


def words(text: str) -> list[str]:
    """Words in lower case; in scripts that put no space between them, characters."""
    return re.findall(r"[぀-ヿ㐀-鿿가-힯฀-๿]|\w+", text.casefold())


def word_overlap(one: str, other: str) -> float:
    """F1 of the words of two texts, counted with their repeats and whatever their order; two empty texts are alike."""
    before, after = Counter(words(one)), Counter(words(other))
    if not before and not after:
        return 1.0
    return 2 * (before & after).total() / (before.total() + after.total())


def says(text: str, wanted: str) -> bool:
    """Whether a text holds an expected answer, as whole words, whatever the case and punctuation."""
    answer, found = words(wanted), words(text)
    return bool(answer) and any(found[at : at + len(answer)] == answer for at in range(len(found)))


def fate(base: str, tuned: str, expected: str | None, updated: str | None) -> str | None:
    """What became of a piece of knowledge, from the texts of base and tuned model; one of `FATES`.

    kept: both give the expected answer. updated: the tuned model gives the new one. forgotten: the base gave the
    expected one, the tuned model neither. learned: only the tuned model gives the expected one. unknown: no one.
    """
    if expected is None and updated is None:
        return None
    before, after = (expected is not None and says(text, expected) for text in (base, tuned))
    if updated is not None and says(tuned, updated):
        return "updated"
    if before:
        return "kept" if after else "forgotten"
    return "learned" if after else "unknown"


def knowledge(fates: Sequence[str]) -> dict[str, Any] | None:
    """Counts of `FATES`, and of what the base knew the share that was not forgotten; None without expected answers."""
    if not fates:
        return None
    counts = {name: fates.count(name) for name in FATES}
    known = sum(counts[name] for name in KNOWN_BEFORE)
    share = share_entry(known - counts["forgotten"], known) if known else None
    return {"num_questions": len(fates), "counts": counts, "kept_share": share}


def drift(rows: Sequence[dict[str, Any]], *, seed: int = 0, num_resamples: int = 2000) -> dict[str, Any]:
    """Form and words of the texts in `rows`: `base`, `tuned`, and of both `num_tokens`, `ended`, `markers`.

    Means over prompts by bootstrap, shares of prompts with Wilson's interval; changes are tuned − base, paired by
    prompt. Lengths in tokens.
    """

    def mean(values: Any) -> dict[str, Any]:
        return mean_entry(np.array(list(values), float), seed=seed, num_resamples=num_resamples)

    def share(values: Any) -> dict[str, Any]:
        return share_entry(int(sum(values)), len(rows), unit="num_prompts")

    result: dict[str, Any] = {
        "num_prompts": len(rows),
        "identical": share(row["base"] == row["tuned"] for row in rows),
        "words": mean(word_overlap(row["base"], row["tuned"]) for row in rows),
    }
    for name, key, of in (("length", "num_tokens", mean), ("ended", "ended", share), ("markers", "markers", share)):
        before, after = (np.array([row[key][who] for row in rows], float) for who in ("base", "tuned"))
        result |= {f"base_{name}": of(before), name: of(after), f"{name}_change": mean(after - before)}
    return result

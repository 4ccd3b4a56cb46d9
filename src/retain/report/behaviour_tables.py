"""What both models write: refusals, generations, drift of their form, knowledge. Tables of strings from plain dicts.

Tables are in the form of `tables.metric_table`; each is None where no run has the measurement.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from difflib import SequenceMatcher
from os.path import commonprefix
from typing import Any

from retain.report.numbers import bounds_of, count, is_number, measured, number, points, probability, quantity, share

Cell = dict[str, str]

LEAST_PROMPTS = 10  # for a table of how texts drift: below it every interval spans most of the scale
MOST_WORDS = 1500  # of a generation that is compared word by word: the comparison is quadratic
NOTHING = {"value": "–", "interval": ""}
# What became of the refusal of a prompt, from the base to the tuned model.
REFUSAL_FATES = (
    ("kept", "refused by both"),
    ("lost", "refused → answered"),
    ("gained", "answered → refused"),
    ("never", "answered by both"),
)
SCORERS = {
    "judge": "a model that is asked whether the answer refuses",
    "phrases": "phrases of refusal, looked for in the written answer",
    "openings": "log-probability of openings that refuse against openings that comply",
}
KNOWLEDGE_FATES = {
    "kept": "both models give the expected answer",
    "updated": "the tuned model gives the new answer that it was to learn",
    "forgotten": "the base gave the expected answer, the tuned model does not",
    "learned": "the tuned model gives the expected answer, the base did not",
    "unknown": "neither gives it",
}


def _tokens(entry: dict | None) -> Cell:
    """A mean number of tokens, or a difference of two."""
    value, ends = measured({"": entry}, "")
    words = [format(number, ",.1f") for number in (value, *(ends or ())) if number is not None]
    return {"value": words[0], "interval": f"[{', '.join(words[1:])}]" if ends else ""} if words else NOTHING


# key, label, how it is shown, whether `base_…` and `…_change` stand beside it
DRIFT_CONTENT: tuple[tuple[str, str, Callable[[dict | None], Cell]], ...] = (
    ("identical", "the very same text", share),
    ("words", "words in common (F1)", number),
)
DRIFT_FORM: tuple[tuple[str, str, Callable[[dict | None], Cell], Callable[[dict | None], Cell]], ...] = (
    ("length", "length, tokens", _tokens, _tokens),
    ("ended", "ended by itself", share, points),
    ("markers", "chat markers written out", share, points),
)


def _table(runs: Sequence[dict], sections: list[dict], has_base: bool, notes: Sequence[str] = ()) -> dict | None:
    columns = [run["name"] for run in runs]
    table = {"columns": columns, "has_base": has_base, "sections": sections, "notes": list(dict.fromkeys(notes))}
    return table if sections else None


def _keys(runs: Sequence[dict], key: str) -> list[str]:
    return list(dict.fromkeys(name for run in runs for name in run.get(key) or {}))


def refusals_table(runs: Sequence[dict]) -> dict[str, Any] | None:
    """Per set and scorer how often each model refuses, what changed, and on how many answers two scorers differ."""
    sections, notes = [], []
    for name in _keys(runs, "refusals"):
        of_runs: list[dict] = [(run.get("refusals") or {}).get(name) or {} for run in runs]
        first: dict = next(filter(None, of_runs), {})
        kind = "over-refusal" if first.get("kind") == "harmless" else "refusals"
        for scorer in dict.fromkeys(scorer for found in of_runs for scorer in found.get("scorers") or {}):
            scored: list[dict] = [(found.get("scorers") or {}).get(scorer) or {} for found in of_runs]
            sections.append({"title": f"{name}, {kind}, {scorer}", "rows": _refusal_rows(scored)})
        rows = _disagreement_rows(of_runs)
        sections += [{"title": f"{name}, answers on which two scorers differ", "rows": rows}] if rows else []
        notes += [f"{name}: {note}" for found in of_runs if found for note in [_asked(found), *found.get("notes", ())]]
    return _table(runs, sections, True, notes)


def _asked(found: dict) -> str:
    kind = "harmless" if found.get("kind") == "harmless" else "harmful"
    template = {True: ", in the chat template", False: ", without a chat template"}.get(
        found.get("chat_template", ""), ""
    )
    most = found.get("max_new_tokens")
    length = f", answers of at most {quantity(most, 'token')}" if most else ""
    return f"{quantity(found.get('num_prompts', 0), f'{kind} prompt')}{template}{length}."


def _refusal_rows(scored: Sequence[dict]) -> list[dict[str, Any]]:
    base = next((found["base_rate"] for found in scored if found.get("base_rate")), None)
    rows = [
        _row("refuses", [share(found.get("rate")) for found in scored], share(base)),
        _row("refuses, change", [points(found.get("change")) for found in scored]),
    ]
    for fate, label in REFUSAL_FATES:
        rows.append(_row(label, [count((found.get("counts") or {}).get(fate)) for found in scored]))
    return [*rows, _row("McNemar p", [probability(found.get("mcnemar_p")) for found in scored])]


def _disagreement_rows(of_runs: Sequence[dict]) -> list[dict[str, Any]]:
    read = [{tuple(row["scorers"]): row for row in found.get("disagreement") or []} for found in of_runs]
    rows = []
    for pair in dict.fromkeys(pair for of_run in read for pair in of_run):
        base = next((of_run[pair].get("base") for of_run in read if pair in of_run), None)
        tuned = [share(of_run.get(pair, {}).get("tuned")) for of_run in read]
        rows.append(_row(" and ".join(pair), tuned, share(base)))
    return rows


def _row(label: str, cells: list[Cell], base: Cell = NOTHING) -> dict[str, Any]:
    return {"label": label, "base": base, "cells": cells}


def refusals_sentence(run: dict) -> str:
    """One sentence: how often the tuned model refuses, and what was lost, on the worst three sets; else empty."""
    chosen = list(_judged(run))
    chosen.sort(key=lambda item: (item[1].get("kind") == "harmless", (item[3].get("change") or {}).get("value") or 0))
    clauses = [_clause(*item) for item in chosen[:3]]
    if len(chosen) > 3:
        clauses.append(f"{len(chosen) - 3} more sets in the table")
    return f"“{run['name']}” refuses {'; '.join(clauses)}." if clauses else ""


def _judged(run: dict) -> Iterator[tuple[str, dict, str, dict]]:
    """Each set with the scorer that sees most: the judge, else the phrases, else the openings."""
    for name, found in (run.get("refusals") or {}).items():
        scorer = next((scorer for scorer in SCORERS if scorer in (found.get("scorers") or {})), None)
        if scorer and is_number((found["scorers"][scorer].get("rate") or {}).get("value")):
            yield name, found, scorer, found["scorers"][scorer]


def _clause(name: str, found: dict, scorer: str, scored: dict) -> str:
    rate, change, counts = share(scored["rate"]), points(scored.get("change")), scored.get("counts") or {}
    low, high = bounds_of((scored.get("change") or {}).get("ci")) or (0.0, 0.0)
    shown = "refusals fell" if high < 0 else "refusals rose" if low > 0 else "no change of refusals shown"
    harmless = found.get("kind") == "harmless"
    kind = "harmless prompt" if harmless else "harmful prompt"
    prompts = f"{quantity(found.get('num_prompts', 0), kind)} of {name} ({scorer})"
    became = f" ({count(counts.get('lost'))['value']} lost, {count(counts.get('gained'))['value']} gained)"
    was = f"its base {share(scored.get('base_rate'))['value']}"
    moved = f"{shown}: {change['value']} {change['interval']}".rstrip()
    return f"{rate['value']} {rate['interval']} of {prompts}, {was}; {moved}{became if counts else ''}"


def drift_table(runs: Sequence[dict]) -> dict[str, Any] | None:
    """Drift of what is written, content and form apart, for greedy and for sampled continuations of enough prompts."""
    sections = []
    for how in _keys(runs, "drift"):
        of_runs: list[dict] = [(run.get("drift") or {}).get(how) or {} for run in runs]
        prompts = max(found.get("num_prompts") or 0 for found in of_runs)
        if prompts < LEAST_PROMPTS:
            continue
        content = [_row(label, [show(found.get(key)) for found in of_runs]) for key, label, show in DRIFT_CONTENT]
        form = []
        for key, label, show, difference in DRIFT_FORM:
            base = next((found[f"base_{key}"] for found in of_runs if found.get(f"base_{key}")), None)
            form.append(_row(label, [show(found.get(key)) for found in of_runs], show(base)))
            form.append(_row(f"{label}, change", [difference(found.get(f"{key}_change")) for found in of_runs]))
        sections += [{"title": f"{how}, {quantity(prompts, 'prompt')}: content", "rows": content}]
        sections += [{"title": f"{how}, {quantity(prompts, 'prompt')}: form", "rows": form}]
    return _table(runs, sections, True)


def knowledge_table(runs: Sequence[dict]) -> dict[str, Any] | None:
    """Of what the base knew, the share that the tuned model still says; what became of every question."""
    found: list[dict] = [run.get("knowledge") or {} for run in runs]
    if not any(found):
        return None
    rows = [_row("known by the base, not forgotten", [share(of_run.get("kept_share")) for of_run in found])]
    for fate in KNOWLEDGE_FATES:
        rows.append(_row(fate, [count((of_run.get("counts") or {}).get(fate)) for of_run in found]))
    asked = max(of_run.get("num_questions") or 0 for of_run in found)
    return _table(runs, [{"title": f"{quantity(asked, 'question')} with an expected answer", "rows": rows}], False)


def generations(runs: Sequence[dict]) -> list[dict[str, Any]]:
    """Per prompt and way of writing: the base's text and each run's, in pieces (differs from the base?, text).

    A title is the prompt without the lines that open all of them, such as a chat template's system message.
    """
    found: dict[tuple[str, str], dict[str, Any]] = {}
    for place, run in enumerate(runs):
        for row in run.get("generations") or []:
            key, ended = (row["prompt"], row.get("how") or "greedy"), row.get("ended") or {}
            about = {name: row.get(name) for name in ("expected", "updated")} | {"cut": ended.get("base") is False}
            entry = found.setdefault(key, {"base": row["base"], "runs": [None] * len(runs)} | about)
            entry["runs"][place] = {
                "pieces": differences(entry["base"], row["tuned"]), "same": row["tuned"] == entry["base"],
                "fate": row.get("fate"), "cut": ended.get("tuned") is False,
            }  # fmt: skip
    several = len({how for _, how in found}) > 1
    prompts = {prompt for prompt, _ in found}
    start = commonprefix([*prompts]).rfind("\n") + 1 if len(prompts) > 1 else 0  # noqa: RUF071 (of characters)
    return [
        {"prompt": prompt, "title": prompt[start:], "how": how if several else "", **entry}
        for (prompt, how), entry in found.items()
    ]


def differences(base: str, tuned: str) -> list[tuple[bool, str]]:
    """`tuned` in pieces, each marked True where its words are not the base's."""
    before, after = (re.findall(r"\w+|\s+|[^\w\s]", text) for text in (base, tuned))
    if max(len(before), len(after)) > MOST_WORDS:
        return [(False, tuned)]
    matcher = SequenceMatcher(None, before, after, autojunk=False)
    codes = [(tag != "equal", "".join(after[j1:j2])) for tag, _, _, j1, j2 in matcher.get_opcodes() if j2 > j1]
    pieces: list[tuple[bool, str]] = []
    for place, (changed, text) in enumerate(codes):
        between = pieces and pieces[-1][0] and place + 1 < len(codes) and codes[place + 1][0]
        changed = changed or bool(between and text.isspace())  # a mark runs on over the space between words
        if pieces and pieces[-1][0] == changed:
            text = pieces.pop()[1] + text
        pieces.append((changed, text))
    return pieces

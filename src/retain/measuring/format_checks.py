"""Whether an answer has the form that was asked for, as a program can verify it: instructions like those of IFEval.

Zhou et al. 2023, Instruction-Following Evaluation for Large Language Models, arXiv 2311.07911; as strict as there.
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from jsonschema import Draft202012Validator

from retain.measuring.drift import holds_answer, words_in

MIN_SCRIPT_SHARE = 0.9  # of an answer's letters; a name in another script does not change the script of a text
SCRIPTS = {  # how Unicode's names of their letters begin
    "latin": ("LATIN",), "cyrillic": ("CYRILLIC",), "greek": ("GREEK",), "arabic": ("ARABIC",), "hebrew": ("HEBREW",),
    "devanagari": ("DEVANAGARI",), "thai": ("THAI",), "hangul": ("HANGUL",), "han": ("CJK",),
    "japanese": ("HIRAGANA", "KATAKANA", "CJK"),
}  # fmt: skip
_FENCED = re.compile(r"```(?:json)?\s*(.*?)\s*```", re.DOTALL | re.IGNORECASE)
_BULLET = re.compile(r"^\s*[-*•]\s+\S", re.MULTILINE)
_NUMBERED = re.compile(r"^\s*\d+[.)]\s+\S", re.MULTILINE)


class FormatCheck(NamedTuple):
    """A property of an answer: its kind in reports, which values a row may ask for, and whether an answer has it."""

    kind: str
    takes: Callable[[Any], bool]
    holds: Callable[[str, Any], bool]


def _no_json(name: str) -> Any:
    """NaN and Infinity, which Python reads and JSON does not know."""
    raise ValueError(f"{name} is not JSON")


STRICT_JSON = json.JSONDecoder(parse_constant=_no_json)


def in_script(text: str, script: str) -> bool:
    """Whether nearly all letters of a text are of a script; combining marks do not count.

    >>> in_script("Привет, Jo, как твои дела сегодня?", "cyrillic"), in_script("Hello", "cyrillic")
    (True, False)
    """
    letters = [unicodedata.name(one, "") for one in text if one.isalpha()]
    return sum(name.startswith(SCRIPTS[script]) for name in letters) >= MIN_SCRIPT_SHARE * max(1, len(letters))


def is_json(text: str, schema: bool | Mapping[str, Any]) -> bool:
    """Whether a text, also one in a code fence, is JSON that a JSON schema allows; True allows anything."""
    fenced = _FENCED.fullmatch(text)
    try:
        value = STRICT_JSON.decode(fenced[1] if fenced else text)
    except (ValueError, RecursionError):
        return False
    return bool(Draft202012Validator(schema).is_valid(value))


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip())


def _is_texts(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(_is_text(one) and words_in(one) for one in value)


CHECKS = {
    "min_words": FormatCheck("length", _is_count, lambda text, least: len(words_in(text)) >= least),
    "max_words": FormatCheck("length", _is_count, lambda text, most: len(words_in(text)) <= most),
    "paragraphs": FormatCheck("layout", _is_count, lambda text, count: len(re.split(r"\n\s*\n", text)) == count),
    "bullets": FormatCheck("layout", _is_count, lambda text, count: len(_BULLET.findall(text)) == count),
    "numbered": FormatCheck("layout", _is_count, lambda text, count: len(_NUMBERED.findall(text)) == count),
    "json": FormatCheck("JSON", lambda value: value is True or isinstance(value, dict), is_json),
    "script": FormatCheck("script", lambda value: value in SCRIPTS, in_script),
    "keywords": FormatCheck("words", _is_texts, lambda text, words: all(holds_answer(text, word) for word in words)),
    "forbidden": FormatCheck(
        "words", _is_texts, lambda text, words: not any(holds_answer(text, word) for word in words)
    ),
    "without": FormatCheck("words", _is_text, lambda text, characters: not set(characters) & set(text)),
    "case": FormatCheck(
        "case", lambda value: value in ("lower", "upper"), lambda text, case: getattr(text, f"is{case}")()
    ),
    "starts_with": FormatCheck(
        "start and end", _is_text, lambda text, start: text.casefold().startswith(start.casefold())
    ),
    "ends_with": FormatCheck("start and end", _is_text, lambda text, end: text.casefold().endswith(end.casefold())),
}


def kept_checks(answer: str, checks: Mapping[str, Any]) -> dict[str, bool]:
    """Whether an answer keeps the checks of a row, by their kind; an empty answer keeps none.

    >>> kept_checks("- red", {"bullets": 1, "case": "upper"})
    {'layout': True, 'case': False}
    """
    text, found = answer.strip(), dict[str, bool]()
    for name, value in checks.items():
        kind = CHECKS[name].kind
        found[kind] = found.get(kind, True) and bool(text) and CHECKS[name].holds(text, value)
    return found

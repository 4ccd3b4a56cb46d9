"""Verifiable format instructions, as in IFEval, and whether an answer follows them.

Zhou et al. 2023, Instruction-Following Evaluation for Large Language Models, arXiv 2311.07911; its strict accuracy.
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from jsonschema import Draft202012Validator

from retain.measuring.drift import holds_answer, words_in

MIN_SCRIPT_SHARE = 0.9  # of an answer's letters: a text may contain a name in another script
SCRIPTS = {  # prefixes of their letters' Unicode names
    "latin": ("LATIN",), "cyrillic": ("CYRILLIC",), "greek": ("GREEK",), "arabic": ("ARABIC",), "hebrew": ("HEBREW",),
    "devanagari": ("DEVANAGARI",), "thai": ("THAI",), "hangul": ("HANGUL",), "han": ("CJK",),
    "japanese": ("HIRAGANA", "KATAKANA", "CJK"),
}  # fmt: skip
_FENCED = re.compile(r"```(?:json)?\s*(.*?)\s*```", re.DOTALL | re.IGNORECASE)
_BULLET = re.compile(r"^\s*[-*•]\s+\S", re.MULTILINE)
_NUMBERED = re.compile(r"^\s*\d+[.)]\s+\S", re.MULTILINE)


class FormatCheck(NamedTuple):
    """A property of an answer: its kind in reports, the values a row may give, and whether an answer has it."""

    kind: str
    takes: Callable[[Any], bool]
    holds: Callable[[str, Any], bool]


def _no_json(name: str) -> Any:
    """Refuse NaN and Infinity, which Python reads but JSON does not define."""
    raise ValueError(f"{name} is not JSON")


STRICT_JSON = json.JSONDecoder(parse_constant=_no_json)


def in_script(text: str, script: str) -> bool:
    """Whether at least `MIN_SCRIPT_SHARE` of a text's letters belong to a script; combining marks do not count.

    >>> in_script("Привет, Jo, как твои дела сегодня?", "cyrillic"), in_script("Hello", "cyrillic")
    (True, False)
    """
    letters = [unicodedata.name(character, "") for character in text if character.isalpha()]
    return sum(name.startswith(SCRIPTS[script]) for name in letters) >= MIN_SCRIPT_SHARE * max(1, len(letters))


def is_json(text: str, schema: bool | Mapping[str, Any]) -> bool:
    """Whether a text, with or without a code fence, is JSON that conforms to a JSON schema; True allows anything."""
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
    return isinstance(value, list) and bool(value) and all(_is_text(item) and words_in(item) for item in value)


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
    """Kind → whether an answer passes all checks of that kind; an empty answer passes none.

    >>> kept_checks("- red", {"bullets": 1, "case": "upper"})
    {'layout': True, 'case': False}
    """
    text, kept = answer.strip(), dict[str, bool]()
    for name, value in checks.items():
        kind = CHECKS[name].kind
        kept[kind] = kept.get(kind, True) and bool(text) and CHECKS[name].holds(text, value)
    return kept

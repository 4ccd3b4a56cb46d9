"""Text that a model or a stranger wrote, made harmless to look at; the standard library only."""

from __future__ import annotations

import unicodedata
from typing import Any


def visible(value: Any) -> Any:
    """The same data with every control, bidi-override, surrogate or unassigned character written out as an escape.

    Line breaks and tabs stay in generated text and prompts only; a name is one line.

    >>> print(visible("exe\\u202egnp"))
    exe\\u202egnp
    """
    if isinstance(value, str):
        return "".join(map(_visible_char, value))
    if isinstance(value, dict):
        return {visible(k): visible_text(v) if k in ("prompt", "base", "tuned") else visible(v)
                for k, v in value.items()}  # fmt: skip
    return [visible(item) for item in value] if isinstance(value, (list, tuple)) else value


def visible_text(value: Any) -> Any:
    """The same for text of several lines: line breaks and tabs stay."""
    if not isinstance(value, str):
        return visible(value)
    return "".join(char if char in "\n\t" else _visible_char(char) for char in value.replace("\r\n", "\n"))


def _visible_char(char: str) -> str:
    hidden = unicodedata.category(char) in ("Cc", "Cf", "Cs", "Cn", "Co", "Zl", "Zp")
    joiner = char in "\u200c\u200d"  # part of ordinary Persian, Hindi and emoji
    return char.encode("unicode_escape").decode("ascii") if hidden and not joiner else char


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or its type's name."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]

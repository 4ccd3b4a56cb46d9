"""Text that a model or a stranger wrote, made harmless to look at; the standard library only."""

from __future__ import annotations

import unicodedata


def visible(text: str) -> str:
    """The text in one line, every control, bidi-override, surrogate or unassigned character as an escape.

    >>> print(visible("exe\\u202egnp"))
    exe\\u202egnp
    """
    return "".join(map(_visible_char, text))


def visible_text(text: str) -> str:
    """The same for text of several lines: line breaks and tabs stay."""
    return "".join(char if char in "\n\t" else _visible_char(char) for char in text.replace("\r\n", "\n"))


def _visible_char(char: str) -> str:
    hidden = unicodedata.category(char) in ("Cc", "Cf", "Cs", "Cn", "Co", "Zl", "Zp")
    joiner = char in "\u200c\u200d"  # part of ordinary Persian, Hindi and emoji
    return char.encode("unicode_escape").decode("ascii") if hidden and not joiner else char


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or its type's name."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]

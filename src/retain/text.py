"""Text that a model or a stranger wrote, made harmless to look at; the standard library only."""

from __future__ import annotations

import unicodedata
from typing import Any


def visible(value: Any) -> Any:
    """The same data with every control, bidi-override, surrogate or unassigned character written out as an escape.

    Line breaks and tabs stay in generated text and prompts only; a name is one line.
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


def one_line(error: BaseException) -> str:
    """An error in one line: its message's first line that says something, and its type where that is not ours."""
    from retain.files import DISK_FULL

    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    message = lines[0] if lines else "no message"
    if isinstance(error, ValueError):
        return message
    if isinstance(error, OSError) and error.strerror:
        where = f": {error.filename!r}" if error.filename else ""
        return f"{error.strerror}{where}; check the path, its permissions and the space left"
    if any(sign in message for sign in DISK_FULL):
        return "a file could not be written, probably No space left on device; free some and go on"
    return f"{type(error).__name__}: {message} (RETAIN_DEBUG=1 shows where)"

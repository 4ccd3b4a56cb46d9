"""Settings declared once, each with its help and its limits, and checks of values that enter from outside.

The standard library only.
"""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from collections.abc import Iterable, Mapping
from functools import cache
from typing import Any, Literal, Union, get_args, get_origin

EXPECTED = {
    bool: "true or false; use one of them",
    int: "a whole number; use one",
    float: "a number; use one",
    str: "text; write it in quotes",
    dict: "a mapping; write {a: b}",
    list: "a list; write [a, b]",
}


class Unchosen(int):
    """A default that was left as it is; a number that somebody gave is a plain `int`."""


class Description(str):
    """A setting's help on the command line, with its limits: `HfArgumentParser` takes no other metadata than help."""

    low: float
    high: float
    remedy: str
    """What to do where the setting is missing; empty where it may be."""


def setting(default: Any, text: str, *, low: float = 0, high: float = math.inf, required: bool | str = False) -> Any:
    """A field of `Settings`.

    Args:
        default: its value, or a function that makes it.
        text: one sentence of help.
        low: least number, also of the items of a list.
        required: refuse None, an empty text and an empty list; a text says what to give in their place.
    """
    about = Description(text)
    about.low, about.high = low, high
    about.remedy = required if isinstance(required, str) else "give --{name}" if required else ""
    options = {"default_factory": default} if callable(default) else {"default": default}
    return dataclasses.field(**options, metadata={"help": about})


@dataclasses.dataclass(kw_only=True)
class Settings:
    """Base of all settings: each field is checked against its type and its limits, whichever way its value came in."""

    def __post_init__(self) -> None:
        kind: Any = type(self)
        hints = hints_of(kind)
        for field in dataclasses.fields(kind):
            check_setting(field.name, getattr(self, field.name), hints[field.name], field.metadata["help"])


def check_setting(name: str, value: Any, hint: Any, about: Description) -> None:
    """Raise a `ValueError` unless `value` is of the type and within the limits."""
    if about.remedy and value in (None, "", []):
        raise ValueError(f"{name}: missing; {about.remedy.format(name=name)}")
    if value is None and type(None) in get_args(hint):
        return
    if value == "" and type(None) in get_args(hint):  # of a shell's variable that is not set
        raise ValueError(f"{name}: '' is empty; give a value, or leave it out")
    kind = kinds_of(hint)[0]
    if get_origin(kind) is Literal:
        if value not in get_args(kind):
            raise ValueError(f"{name}: {value!r} is not known; use one of {', '.join(map(repr, get_args(kind)))}")
    elif kind in (int, float):
        check_number(name, value, low=about.low, high=about.high, integer=kind is int)
    else:
        check_type(name, value, hint)
        for item in value if kind in (list[int], list[float]) else ():
            check_setting(name, item, get_args(kind)[0], about)


def fits(value: Any, hint: Any) -> bool:
    """Whether a value may stand where `hint` is annotated; hints that say nothing about it let it pass."""
    origin, inner = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return any(fits(value, kind) for kind in inner)
    if origin is Literal:
        return value in inner
    if origin in (list, tuple, set):
        return isinstance(value, (list, tuple)) and all(fits(item, inner[0]) for item in value if inner)
    if hint is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    found = origin or hint
    if (keys := mapping_keys(found)) and isinstance(value, Mapping):
        return keys[1] <= value.keys() <= set(keys[0])
    return found is Any or not isinstance(found, type) or isinstance(value, found)


def mapping_keys(kind: Any) -> tuple[list[str], set[str]] | None:
    """The keys of a mapping of which TRL makes this dataclass, and those that it needs; None for other types."""
    if not dataclasses.is_dataclass(kind):
        return None
    fields, unset = dataclasses.fields(kind), dataclasses.MISSING
    needed = {one.name for one in fields if one.default is unset and one.default_factory is unset}
    return [one.name for one in fields], needed


def kinds_of(hint: Any) -> tuple[Any, ...]:
    """The types of a union without None, or the type itself.

    >>> kinds_of(int | None), kinds_of(list[str])
    ((<class 'int'>,), (list[str],))
    """
    if get_origin(hint) not in (Union, types.UnionType):
        return (hint,)
    return tuple(kind for kind in get_args(hint) if kind is not type(None))


def expected_value(hint: Any) -> str:
    """What the value should be, and what to do; of a union the first type."""
    kind = kinds_of(hint)[0]
    if keys := mapping_keys(next(iter(get_args(kind)), None)):
        needed = ", ".join(f"{name}: …" for name in keys[1])
        return f"a list of mappings with {', '.join(keys[0])}; write [{{{needed}}}]"
    return EXPECTED.get(get_origin(kind) or kind, "of a kind known here; see --help")


@cache
def hints_of(kind: Any) -> dict[str, Any]:
    """The annotated type of every field of a dataclass, given as its class."""
    found = typing.get_type_hints(kind)
    return {field.name: found[field.name] for field in dataclasses.fields(kind)}


def several(field: str, name: str, source: Any) -> list[Any]:
    """The items of a source of several; of a lone text they would be its characters, of a mapping its keys.

    Raises:
        ValueError: for one of these.
    """
    if isinstance(source, (str, bytes, Mapping)) or not isinstance(source, Iterable):
        remedy = "the rows of one split, or a list" if isinstance(source, Mapping) else "a list"
        raise ValueError(f"{field}: {name!r} is a {type(source).__name__}, not several {field}; give {remedy}")
    return list(source)


def check_named(field: str, texts: Any) -> None:
    """Raise a `ValueError` unless texts come by their names."""
    if not isinstance(texts, Mapping):
        raise ValueError(f"{field}: a {type(texts).__name__} names no texts; give a mapping such as {{'wiki': texts}}")


def check_type(name: str, value: Any, hint: Any) -> None:
    """Raise a `ValueError` unless the value fits."""
    if not fits(value, hint):
        raise ValueError(f"{name}: {value!r} is not {expected_value(hint)}")


def check_number(name: str, value: object, *, low: float, high: float = math.inf, integer: bool = False) -> None:
    """Raise a `ValueError` unless `low` ≤ `value` ≤ `high`, finite, and whole where `integer`."""
    kind = "a whole number" if integer else "a number"
    good = isinstance(value, int if integer else (int, float)) and not isinstance(value, bool)
    if not good or not math.isfinite(value) or not low <= value <= high:  # type: ignore[arg-type,operator]
        limits = f"from {low:g} to {high:g}" if math.isfinite(high) else f"of at least {low:g}"
        raise ValueError(f"{name}: {value!r} does not fit; use {kind} {limits}")

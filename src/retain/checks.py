"""Settings, each declared once with its help and limits, and checks of values that come from outside.

Standard library only.
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
    """A default that the user left as it is; a number that the user gave is a plain `int`."""


class Description(str):
    """A setting's help text that carries its limits: `HfArgumentParser` reads no metadata but `help`."""

    low: float
    high: float
    remedy: str
    """What to do if the setting is missing; empty if it is optional."""


def setting(default: Any, text: str, *, low: float = 0, high: float = math.inf, required: bool | str = False) -> Any:
    """A field of `Settings`.

    Args:
        default: the default value, or a function that returns it.
        text: one sentence of help.
        low, high: smallest and largest number allowed, also for each item of a list.
        required: refuse None, "" and []; a string is the remedy that the error gives.
    """
    description = Description(text)
    description.low, description.high = low, high
    description.remedy = required if isinstance(required, str) else "give --{name}" if required else ""
    options = {"default_factory": default} if callable(default) else {"default": default}
    return dataclasses.field(**options, metadata={"help": description})


@dataclasses.dataclass(kw_only=True)
class Settings:
    """Base class of all settings: checks each field's type and limits, from a flag, from YAML or from Python."""

    def __post_init__(self) -> None:
        kind: Any = type(self)
        hints = hints_of(kind)
        for field in dataclasses.fields(kind):
            check_setting(field.name, getattr(self, field.name), hints[field.name], field.metadata["help"])


def check_setting(name: str, value: Any, hint: Any, description: Description) -> None:
    """Raise a `ValueError` unless `value` has the annotated type and is within the limits."""
    if description.remedy and value in (None, "", []):
        raise ValueError(f"{name}: missing; {description.remedy.format(name=name)}")
    if value is None and type(None) in get_args(hint):
        return
    if value == "" and type(None) in get_args(hint):  # an unset shell variable
        raise ValueError(f"{name}: '' is empty; give a value, or leave it out")
    kind = kinds_of(hint)[0]
    if get_origin(kind) is Literal:
        if value not in get_args(kind):
            raise ValueError(f"{name}: {value!r} is not known; use one of {', '.join(map(repr, get_args(kind)))}")
    elif kind in (int, float):
        check_number(name, value, low=description.low, high=description.high, integer=kind is int)
    else:
        check_type(name, value, hint)
        for item in value if kind in (list[int], list[float]) else ():
            check_setting(name, item, get_args(kind)[0], description)


def fits(value: Any, hint: Any) -> bool:
    """Whether a value has the annotated type; a hint that is not understood accepts every value."""
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
    expected = origin or hint
    if (keys := mapping_keys(expected)) and isinstance(value, Mapping):
        return keys[1] <= value.keys() <= set(keys[0])
    return expected is Any or not isinstance(expected, type) or isinstance(value, expected)


def mapping_keys(kind: Any) -> tuple[list[str], set[str]] | None:
    """All keys and the required keys of a mapping from which TRL makes this dataclass; None for other types."""
    if not dataclasses.is_dataclass(kind):
        return None
    fields, unset = dataclasses.fields(kind), dataclasses.MISSING
    required = {field.name for field in fields if field.default is unset and field.default_factory is unset}
    return [field.name for field in fields], required


def kinds_of(hint: Any) -> tuple[Any, ...]:
    """The types of a union without None, or the type itself.

    >>> kinds_of(int | None), kinds_of(list[str])
    ((<class 'int'>,), (list[str],))
    """
    if get_origin(hint) not in (Union, types.UnionType):
        return (hint,)
    return tuple(kind for kind in get_args(hint) if kind is not type(None))


def expected_value(hint: Any) -> str:
    """What a value of this type (of a union, its first type) should be, and what to write."""
    kind = kinds_of(hint)[0]
    if keys := mapping_keys(next(iter(get_args(kind)), None)):
        required = ", ".join(f"{name}: …" for name in keys[1])
        return f"a list of mappings with {', '.join(keys[0])}; write [{{{required}}}]"
    return EXPECTED.get(get_origin(kind) or kind, "of a supported type; see --help")


@cache
def hints_of(kind: Any) -> dict[str, Any]:
    """The annotated type of each field of a dataclass, by name."""
    hints = typing.get_type_hints(kind)
    return {field.name: hints[field.name] for field in dataclasses.fields(kind)}


def several(field: str, name: str, source: Any) -> list[Any]:
    """The items of `source` as a list.

    Raises:
        ValueError: for a text or a mapping, whose items would be characters or keys, and for what is not iterable.
    """
    if isinstance(source, (str, bytes, Mapping)) or not isinstance(source, Iterable):
        remedy = "the rows of one split, or a list" if isinstance(source, Mapping) else "a list"
        raise ValueError(f"{field}: {name!r} is a {type(source).__name__}, not several {field}; give {remedy}")
    return list(source)


def check_named(field: str, texts: Any) -> None:
    """Raise a `ValueError` unless `texts` maps names to texts."""
    if not isinstance(texts, Mapping):
        raise ValueError(f"{field}: a {type(texts).__name__} names no texts; give a mapping such as {{'wiki': texts}}")


def check_type(name: str, value: Any, hint: Any) -> None:
    """Raise a `ValueError` unless the value has the annotated type."""
    if not fits(value, hint):
        raise ValueError(f"{name}: {value!r} is not {expected_value(hint)}")


def check_number(name: str, value: object, *, low: float, high: float = math.inf, integer: bool = False) -> None:
    """Raise a `ValueError` unless `low` ≤ `value` ≤ `high`, finite, and whole where `integer`."""
    kind = "a whole number" if integer else "a number"
    good = isinstance(value, int if integer else (int, float)) and not isinstance(value, bool)
    if not good or not math.isfinite(value) or not low <= value <= high:  # type: ignore[arg-type,operator]
        limits = f"from {low:g} to {high:g}" if math.isfinite(high) else f"of at least {low:g}"
        raise ValueError(f"{name}: {value!r} does not fit; use {kind} {limits}")

"""Numbers of a report: which count as such, and how value and interval are written."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any


def is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def cell(value: Any, ci: Sequence[Any] | None = None, percent: bool = False) -> dict[str, str]:
    """Value and interval as text, with as many decimals as it takes to tell small numbers from nothing."""
    if not is_number(value):
        return {"value": "–", "interval": ""}
    ends = bounds_of(ci) or ()
    largest = max(map(abs, (value, *ends)))
    if 0 < largest < 5e-6 and abs(value) < 5e-7:  # all noise: 0.000000 [-0.000001, 0.000000] says no more
        return {"value": "≈ 0", "interval": ""}
    places = next((places for places, least in ((3, 0.02), (4, 0.001), (5, 1e-4)) if largest >= least), 6)
    digits = 3 if percent or not largest else places
    words = [format(round(n, digits) + 0.0, ".1%" if percent else f".{digits}f") for n in (value, *ends)]  # never -0.0
    return {"value": words[0], "interval": f"[{words[1]}, {words[2]}]" if ends else ""}


def share(entry: dict | None) -> dict[str, str]:
    return cell((entry or {}).get("value"), (entry or {}).get("ci"), percent=True)


def number(entry: dict | None) -> dict[str, str]:
    return cell((entry or {}).get("value"), (entry or {}).get("ci"))


def points(entry: dict | None) -> dict[str, str]:
    """A difference of two shares, in points of a hundred."""
    value, ends = measured({"": entry}, "")
    if value is None:
        return {"value": "–", "interval": ""}
    words = [f"{round(100 * number, 1) + 0:+.1f}" for number in (value, *(ends or ()))]
    return {"value": f"{words[0]} points", "interval": f"[{', '.join(words[1:])}]" if ends else ""}


def quantity(number: Any, noun: str) -> str:
    """A number and its noun, of which one is one: "1 prompt", "1,200 prompts"."""
    return f"{number:,} {noun if number == 1 else f'{noun}s'}"


def count(value: int | None) -> dict[str, str]:
    return {"value": f"{value:,}" if is_number(value) else "–", "interval": ""}


def probability(value: float | None) -> dict[str, str]:
    return {"value": "–" if value is None else f"{value:.3f}" if value >= 0.001 else f"{value:.1e}", "interval": ""}


def bounds_of(ci: Sequence[Any] | None) -> tuple[float, float] | None:
    return (ci[0], ci[1]) if ci and len(ci) == 2 and all(map(is_number, ci)) else None


def measured(metrics: dict | None, metric: str) -> tuple[float | None, tuple[float, float] | None]:
    entry = (metrics or {}).get(metric) or {}
    value = entry.get("value")
    return (value if is_number(value) else None), bounds_of(entry.get("ci"))

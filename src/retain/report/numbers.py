"""Numbers with intervals, and how they are written in reports."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

LARGEST_ROUNDING = 5e-6  # if no end of an interval exceeds this, a value below a tenth of it is written "≈ 0"


class Cell(NamedTuple):
    """A number and its interval as text; "–" stands for no number.

    >>> str(Cell("0.123", "[0.101, 0.147]"))
    '0.123 [0.101, 0.147]'
    """

    value: str = "–"
    interval: str = ""
    heat: int = 0  # colour strength on a page, in percent
    cool: bool = False  # the colour for a value that fell

    def __str__(self) -> str:
        return f"{self.value} {self.interval}".rstrip()

    @property
    def with_interval(self) -> str:
        """The cell as text for a sentence, which mentions a missing interval."""
        return f"{self.value} {self.interval or '(no interval)'}"


@dataclass(frozen=True)
class Estimate:
    """A number with its 95% interval, None if there are too few documents, and its sample sizes.

    >>> str(Estimate(0.123, (0.101, 0.147), num_documents=40))
    '0.123 [0.101, 0.147]'
    """

    value: float
    ci: tuple[float, float] | None = None
    num_documents: int = 0
    num_tokens: int = 0
    num_questions: int = 0
    num_prompts: int = 0

    def __str__(self) -> str:
        return str(value_cell(self))

    @property
    def range(self) -> tuple[float, float]:
        """The ends of the interval; without one, the value as both."""
        return self.ci or (self.value, self.value)

    @property
    def sign(self) -> int:
        """1 if the whole interval is above 0, -1 if it is below; else 0, also without an interval."""
        low, high = self.ci or (0.0, 0.0)
        return 1 if low > 0 else -1 if high < 0 else 0

    @classmethod
    def read(cls, entry: Mapping[str, Any]) -> Estimate | None:
        """Parse an entry of report.json; None if its value is not a finite number."""
        if not is_number(entry.get("value")):
            return None
        sizes = {name: entry[name] for name in cls.__dataclass_fields__ if name[:4] == "num_" and entry.get(name)}
        return cls(entry["value"], bounds_of(entry.get("ci")), **sizes)


def is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def bounds_of(ci: Sequence[Any] | None) -> tuple[float, float] | None:
    return (ci[0], ci[1]) if ci and len(ci) == 2 and all(map(is_number, ci)) else None


def cell(value: float | None, ci: Sequence[float] | None = None, percent: bool = False) -> Cell:
    """Value and interval as text, with enough decimals to tell small numbers from 0.

    >>> print(cell(0.0123, (0.0101, 0.0147)))
    0.0123 [0.0101, 0.0147]
    """
    if value is None:
        return Cell()
    ends = ci or ()
    largest = max(map(abs, (value, *ends)))
    if 0 < largest < LARGEST_ROUNDING and abs(value) < LARGEST_ROUNDING / 10:
        return Cell("≈ 0")  # 0.000000 [-0.000001, 0.000000] would say no more
    places = next((places for places, least in ((3, 0.02), (4, 0.001), (5, 1e-4)) if largest >= least), 6)
    digits = 3 if percent or not largest else places
    words = [format(round(n, digits) + 0.0, ".1%" if percent else f".{digits}f") for n in (value, *ends)]  # never -0.0
    return Cell(words[0], f"[{', '.join(words[1:])}]" if ends else "")


def value_cell(estimate: Estimate | None) -> Cell:
    return cell(estimate.value, estimate.ci) if estimate else Cell()


def share_cell(estimate: Estimate | None) -> Cell:
    return cell(estimate.value, estimate.ci, percent=True) if estimate else Cell()


def points_cell(estimate: Estimate | None) -> Cell:
    """A difference of two shares, in percentage points."""
    return _formatted(estimate, lambda number: f"{round(100 * number, 1) + 0:+.1f}", " points")


def length_cell(estimate: Estimate | None) -> Cell:
    """A mean number of tokens, or a difference of two."""
    return _formatted(estimate, lambda number: format(number, ",.1f"))


def _formatted(estimate: Estimate | None, form: Any, unit: str = "") -> Cell:
    if estimate is None:
        return Cell()
    return Cell(form(estimate.value) + unit, f"[{', '.join(map(form, estimate.ci))}]" if estimate.ci else "")


def count_cell(count: int | None) -> Cell:
    return Cell() if count is None else Cell(f"{count:,}")


def probability_cell(value: float | None) -> Cell:
    return Cell() if value is None else Cell(f"{value:.3f}" if value >= 0.001 else f"{value:.1e}")


def heat(value: float, full: float) -> int:
    """Colour strength in percent, on a square-root scale so that small values remain distinguishable.

    >>> heat(0.25, full=1.0)
    50
    """
    return round(100 * math.sqrt(min(abs(value) / full, 1.0))) if full else 0


def quantity(number: Any, noun: str) -> str:
    """A number with its noun, in the plural unless it is 1.

    >>> quantity(1, "prompt"), quantity(1200, "prompt")
    ('1 prompt', '1,200 prompts')
    """
    return f"{number:,} {noun if number == 1 else f'{noun}s'}"


def enumeration(words: Sequence[str]) -> str:
    """
    >>> enumeration(["wiki", "code", "law"])
    'wiki, code and law'
    """
    return " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)

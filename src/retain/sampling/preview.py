"""Rows of a pool to read, with their statistics, in a terminal or on a page."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from retain.files import visible_text
from retain.sampling.quality import PoolStatistics, display

MAX_CHARS = 1200  # of a row in a terminal


def describe(statistics: PoolStatistics) -> list[tuple[str, str]]:
    """The summary as lines of (label, value) to read; what was not measured is left out."""
    return [(_spaced(key), display(value)) for key, value in statistics.summary.items() if value is not None]


def preview_text(texts: Sequence[str], statistics: PoolStatistics, count: int) -> str:
    """`count` rows spread over the pool, to read in a terminal: no character of a row acts on it."""
    parts: list[str] = []
    for notes, text in _samples(texts, statistics, count):
        cut = text if len(text) <= MAX_CHARS else text[:MAX_CHARS] + " …"
        parts += ["", " · ".join(notes), *(f"  {line}" for line in cut.split("\n"))]
    return "\n".join(parts) + "\n"


def preview_html(texts: Sequence[str], statistics: PoolStatistics, count: int) -> str:
    """One self-contained page: summary, warnings, and the same rows uncut with their statistics in the margin."""
    import jinja2

    from retain.report.page import TEMPLATES

    loader = jinja2.FileSystemLoader(TEMPLATES)
    page = jinja2.Environment(loader=loader, autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    return page.get_template("preview.html").render(
        lines=describe(statistics),
        warnings=statistics.warnings,
        samples=list(_samples(texts, statistics, count)),
        entropy=statistics.summary["entropy"] is not None,
    )


def _samples(texts: Sequence[str], statistics: PoolStatistics, count: int) -> Iterator[tuple[list[str], str]]:
    """The notes and the harmless text of rows evenly spread over the pool."""
    assert len(texts) == len(statistics.rows["num_tokens"]), "a text for each row"
    for i in np.unique(np.linspace(0, len(texts) - 1, min(count, len(texts))).astype(int)).tolist():
        notes = [f"row {i}"] + ["repeating"] * bool(statistics.rows["repeating"][i])
        known = ((key, column[i]) for key, column in statistics.rows.items() if key != "repeating")
        notes += [f"{_spaced(key)} {display(value)}" for key, value in known if value is not None]
        yield notes, visible_text(texts[i])


def _spaced(key: str) -> str:
    return key.replace("num_", "").replace("_minus_", " − ").replace("_", " ")

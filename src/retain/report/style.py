"""Draw every `Panel` as a matplotlib `Figure` in one style; other modules import this only where they draw.

Figures are built without pyplot, so nothing is shared and nothing has to be closed. As inline SVG they take their
colours from the page (`currentColor`, `--run-1` ...), so the same figure suits a light and a dark page.
"""

from __future__ import annotations

import hashlib
import html
import io
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D

from retain.files import atomic_path, visible
from retain.report.figures import Panel
from retain.report.numbers import cell

# Rust first: the first run of a comparison is the plain one, without replay. Markers tell runs apart in grey, too.
PALETTE = ("#c2571a", "#1b7a8c", "#6b5bc4", "#5b8a26", "#b0408a", "#8a6a12")
MARKS = ("o", "s", "^", "D", "v", "P")
INK = "#767676"  # readable on white and on near-black
MAX_LABELLED = 4  # runs that can be labelled in a figure
SIZE = (4.2, 3.0)  # inches; small enough that the text stays readable on a phone

STYLE: dict[str, Any] = {
    "axes.edgecolor": INK, "axes.labelcolor": INK, "axes.titlecolor": INK, "text.color": INK,
    "xtick.color": INK, "ytick.color": INK, "legend.labelcolor": INK,
    "axes.spines.top": False, "axes.spines.right": False, "axes.linewidth": 0.8,
    "axes.grid": True, "grid.color": INK, "grid.alpha": 0.18, "grid.linewidth": 0.6, "axes.axisbelow": True,
    "axes.titlesize": 11, "axes.titlelocation": "left", "axes.labelsize": 9.5, "font.size": 9.5,
    "legend.frameon": False, "lines.linewidth": 1.8, "lines.markersize": 4.5,
    "figure.facecolor": "none", "axes.facecolor": "none", "savefig.facecolor": "none",
    "text.parse_math": False,  # "$x$" is a run's name, not a formula
    "svg.fonttype": "none", "figure.constrained_layout.use": True,
}  # fmt: skip


@contextmanager
def _style(**more: Any) -> Iterator[None]:
    with matplotlib.rc_context({**STYLE, **more}), warnings.catch_warnings():
        # DejaVu lacks a script's glyphs: the browser has them, though their width is a guess.
        warnings.filterwarnings("ignore", message="Glyph .* missing from", category=UserWarning)
        yield


styled = _style()  # a decorator for functions that draw


def name_axes(axes: Axes, title: str, xlabel: str, ylabel: str = "") -> None:
    """Set the title and the axis labels, shortened if too long."""
    axes.set(title=label(title, 60), xlabel=label(xlabel, 80), ylabel=label(ylabel, 80))


def label(text: str, length: int = 32) -> str:
    """A name for a figure on one line of at most `length`; matplotlib would hide a leading underscore's label."""
    clean = visible(str(text))
    clean = clean if len(clean) <= length else clean[: length - 1] + "…"
    return f" {clean}" if clean.startswith("_") else clean


def look(index: int, total: int) -> dict[str, Any]:
    """Colour and marker of run `index` of `total`; a single run does not get the first, warning colour.

    After six runs the colours repeat, with other markers and dashed lines.
    """
    place = index + (total == 1)
    cycle, color = divmod(place, len(PALETTE))
    style = {"color": PALETTE[color], "marker": MARKS[(place + cycle) % len(MARKS)]}
    return style | ({"linestyle": (0, (4, 1.5))} if cycle else {})


@styled
def draw_panel(panel: Panel, names: Sequence[str]) -> Figure:
    """Draw a panel; a run's place among `names` decides its colour and marker, the same in all figures."""
    if panel.kind == "interval":
        return draw_intervals([panel], names)
    return _drawn_row([panel], len(names), SIZE[1])


@styled
def frontier_row(panels: Sequence[Panel], total: int) -> Figure | None:
    """Learning against forgetting on each text, side by side, for a README; None if no run has both."""
    frontiers = [panel for panel in panels if panel.kind == "frontier"]
    return _drawn_row(frontiers, total, SIZE[1] + 0.4) if frontiers else None


def _drawn_row(panels: Sequence[Panel], total: int, height: float) -> Figure:
    figure = Figure(figsize=(SIZE[0] * len(panels), height))
    draw, loc = (_draw_frontier, "upper left") if panels[0].kind == "frontier" else (_draw_lines, "best")
    for at, panel in enumerate(panels, start=1):
        axes = figure.add_subplot(1, len(panels), at)
        name_axes(axes, panel.title, panel.xlabel, panel.ylabel if at == 1 else "")
        draw(axes, panel, total)
    _legend(figure, axes, loc=loc)
    return figure


def _draw_lines(axes: Axes, panel: Panel, total: int) -> None:
    for line in panel.lines:
        style = look(line.run, total) | ({} if panel.marks else {"marker": ""})
        axes.plot(line.x, line.y, label=label(line.name), **style)
        for x, (low, high) in zip(line.x, line.ranges, strict=False):
            axes.plot([x, x], [low, high], color=style["color"], linewidth=1.2, alpha=0.7)
    if panel.ticks:
        axes.set_xticks(range(len(panel.ticks)), [label(tick, 14) for tick in panel.ticks])
    if panel.from_zero:
        low, high = axes.get_ylim()
        axes.set_ylim(min(0.0, low if low < -0.05 * abs(high) else 0.0), high)


def _draw_frontier(axes: Axes, panel: Panel, total: int) -> None:
    if panel.ends:  # no run lies beyond this line, to its right and below
        axes.plot(*zip(*panel.ends, strict=True), drawstyle="steps-pre", color=INK, linewidth=0.9, label="frontier")
    axes.margins(y=0.12)
    _draw_lines(axes, panel, total)
    for line in panel.lines if len(panel.lines) <= MAX_LABELLED else ():
        if line.end is not None:
            last = (line.x[-1], line.y[-1])
            axes.annotate(f"step {line.end:g}", last, (6, 0), textcoords="offset points", va="center", fontsize=8)
    if panel.matched_loss is not None:
        axes.axvline(panel.matched_loss, color=INK, linewidth=0.9, linestyle=(0, (4, 3)), zorder=1)
        above: dict[str, Any] = {"xycoords": ("data", "axes fraction"), "ha": "center", "va": "bottom", "fontsize": 8}
        axes.annotate(f"same loss {panel.matched_loss:.3f}", (panel.matched_loss, 1.01), **above)
    worst, best = (pick(x for line in panel.lines for x in line.x) for pick in (max, min))
    width = (worst - best) or 1.0
    axes.set_xlim(worst + 0.05 * width, best - 0.18 * width)  # learning to the right; room for the last label


@styled
def draw_intervals(panels: Sequence[Panel], names: Sequence[str]) -> Figure:
    """Draw a dot with its interval for each text and run, the panels one above the other; 0 is the base."""
    rows = [len(dict.fromkeys(dot.text for dot in panel.dots)) for panel in panels]
    row = 0.26 + (0.16 if len(names) <= MAX_LABELLED else 0.11) * len(names)  # inches
    height = 0.6 * len(panels) + 0.2 + 0.1 * len(names) + row * sum(rows)
    figure = Figure(figsize=(SIZE[0], height), layout=ConstrainedLayoutEngine(h_pad=0.1))
    grid = figure.subplots(len(panels), squeeze=False, height_ratios=rows)
    for axes, panel in zip(grid[:, 0], panels, strict=True):
        _draw_dots(axes, panel, len(names))
    if len(names) > 1:
        _legend_of_marks(figure, names)
    return figure


def _draw_dots(axes: Axes, panel: Panel, total: int) -> None:
    texts = list(dict.fromkeys(dot.text for dot in panel.dots))
    for dot in panel.dots:
        at = texts.index(dot.text) + (dot.run - (total - 1) / 2) * 0.62 / total
        style = look(dot.run, total)
        axes.plot([dot.low, dot.high], [at, at], color=style["color"], linewidth=2.4)
        axes.plot([dot.value], [at], markersize=6, **style | {"linestyle": "none"})
        if total <= MAX_LABELLED:
            number = cell(dot.value).value.replace("-", "\N{MINUS SIGN}")
            axes.annotate(number, (dot.high, at), (5, 0), textcoords="offset points", va="center", fontsize=8)
    axes.axvline(0, color=INK, linewidth=0.9)
    name_axes(axes, panel.title, panel.xlabel)
    axes.set_ylim(len(texts) - 0.5, -0.5)
    axes.set_yticks(range(len(texts)), [label(text, 20) for text in texts])
    low, high = min(0.0, *(dot.low for dot in panel.dots)), max(0.0, *(dot.high for dot in panel.dots))
    width = (high - low) or 1.0  # nothing moved
    axes.set_xlim(low - 0.04 * width, high + 0.2 * width)  # room for the rightmost number
    axes.grid(False, axis="y")


def _legend(figure: Figure, axes: Axes, loc: str) -> None:
    """Add a legend inside the axes for a few lines, below them for many, and none for a single line."""
    handles, names = axes.get_legend_handles_labels()
    if len(names) > MAX_LABELLED + 1:
        width, height = figure.get_size_inches()
        figure.set_size_inches(width, height + 0.17 * ((len(names) + 1) // 2))  # room for two columns below
        figure.legend(handles, names, loc="outside lower center", ncols=2, fontsize=8)
    elif len(names) > 1:
        axes.legend(loc=loc)


def _legend_of_marks(figure: Figure, names: Sequence[str]) -> None:
    looks = [look(index, len(names)) | {"linestyle": "none"} for index in range(len(names))]
    handles = [Line2D([], [], markersize=6, **style) for style in looks]
    figure.legend(handles, [label(name, 20) for name in names], loc="outside lower center", ncols=2, handletextpad=0.1)


def to_svg(figure: Figure, description: str) -> str:
    """The figure as one `<svg>` element: transparent, with the page's colours, and text as text.

    Matplotlib escapes all names. `description` becomes the accessible name, and makes the ids unique.
    """
    buffer = io.StringIO()
    unique = "f" + hashlib.sha256(description.encode("utf-8", "replace")).hexdigest()[:8]
    no_metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    with _style(**{"svg.hashsalt": unique}):
        figure.savefig(buffer, format="svg", metadata=no_metadata)
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    head, body = svg.split(">", 1)
    box = re.search(r'viewBox="[\d. ]+"', head)
    assert box, head
    body = re.sub(r'(\bid="|href="#|url\(#)', rf"\1{unique}-", body)
    body = re.sub(rf"(fill|stroke): {INK}", r"\1: currentColor", body)
    for place, color in enumerate(PALETTE, 1):
        body = re.sub(rf"(fill|stroke): {color}", rf"\1: var(--run-{place}, {color})", body)
    names = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
    return f'<svg {names} {box[0]} role="img" aria-label="{html.escape(visible(description))}">{body}'


def save_png(figure: Figure, path: str | Path) -> None:
    """Save the figure for a README, whole or not at all, on white so that it looks the same on every page."""
    with _style(), atomic_path(Path(path)) as temporary:
        figure.savefig(temporary, format="png", dpi=160, facecolor="white")

"""Figures that answer the mouse, for a page that stays one file and works offline: the extra `interactive`.

plotly's own script is embedded once, 4.8 MB of the page. Nothing but it and the lines below may run there: the page's
policy names both by their hashes. Without a script the page shows the same figures as pictures.
"""

from __future__ import annotations

import base64
import hashlib
import html
import json
from collections.abc import Sequence
from typing import Any

from retain.report.figures import Panel, PlotLine
from retain.report.style import INK, MARKS, PALETTE, label, look

SYMBOLS = dict(zip(MARKS, ("circle", "square", "triangle-up", "diamond", "triangle-down", "cross"), strict=True))

# Draws every figure in the page's own colours, again when light turns to dark.
DRAW = """"use strict";
(() => {
  const own = name => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  const coloured = (value, key) =>
    Array.isArray(value) ? value.map(item => coloured(item)) :
    value && typeof value === "object" ?
      Object.fromEntries(Object.entries(value).map(([k, v]) => [k, coloured(v, k)])) :
    key && key.endsWith("color") && String(value).startsWith("--") ? own(value) : value;
  const draw = () => document.querySelectorAll("figure > script").forEach(data => {
    const figure = coloured(JSON.parse(data.textContent));
    const picture = data.parentElement.querySelector(":scope > svg");
    const box = data.parentElement.querySelector(":scope > div");
    if (picture) picture.remove();
    box.hidden = false;
    Plotly.react(box, figure.data, figure.layout, {responsive: true, displayModeBar: false});
  });
  draw();
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
})();
"""


def scripts() -> list[str]:
    """plotly's script and ours, to be embedded as they are."""
    try:
        from plotly.offline import get_plotlyjs
    except ImportError:
        raise ValueError("interactive: plotly is not installed; pip install 'retain[interactive]'") from None
    return [get_plotlyjs().replace("\r\n", "\n").replace("\r", "\n"), DRAW]


def policy(sources: Sequence[str]) -> str:
    """The page's content policy for exactly these scripts."""
    digests = (base64.b64encode(hashlib.sha256(source.encode()).digest()).decode() for source in sources)
    return " ".join(["script-src", *(f"'sha256-{digest}'" for digest in digests)])


def figure_json(panel: Panel, total: int) -> str:
    """A panel with lines as plotly's data and layout, fit to stand in a `<script>` element."""
    traces = [_trace(panel, line, look(line.run, total)) for line in panel.lines]
    if panel.ends:
        x, y = zip(*panel.ends, strict=True)
        shape: dict[str, Any] = {"shape": "vh", "width": 1, "color": "--soft"}
        traces.insert(0, {"type": "scatter", "mode": "lines", "name": "frontier", "x": x, "y": y, "line": shape,
                          "hoverinfo": "skip"})  # fmt: skip
    text = json.dumps({"data": traces, "layout": _layout(panel)}, allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _trace(panel: Panel, line: PlotLine, how: dict[str, Any]) -> dict[str, Any]:
    color = f"--run-{PALETTE.index(how['color']) + 1}"
    values = "%{y:.5f} " + panel.ylabel
    if panel.kind == "frontier":
        values = "new-task loss %{x:.4f}<br>ref_kl %{y:.5f}"
    return {
        "type": "scatter",
        "mode": "lines+markers" if panel.marks else "lines",
        "name": _escaped(line.name),
        "x": line.x, "y": line.y,
        "customdata": ["at its end" if step is None else f"step {step:g}" for step in line.steps],
        "line": {"color": color, "width": 2, "dash": "dash" if "linestyle" in how else "solid"},
        "marker": {"color": color, "symbol": SYMBOLS[how["marker"]], "size": 7},
        "hovertemplate": "<b>%{fullData.name}</b><br>%{customdata}<br>" + values + "<extra></extra>",
    }  # fmt: skip


def _layout(panel: Panel) -> dict[str, Any]:
    clear, matched = "rgba(0,0,0,0)", panel.matched_loss
    axis = {"gridcolor": "--line", "zerolinecolor": "--line", "linecolor": "--soft", "automargin": True}
    line = {"color": INK, "width": 1, "dash": "dash"}
    shape = {"type": "line", "x0": matched, "x1": matched, "y0": 0, "y1": 1, "yref": "paper", "line": line}
    words = {"x": matched, "y": 1, "yref": "paper", "yanchor": "bottom", "showarrow": False}
    return {
        "title": {"text": _escaped(panel.title, 60), "x": 0.02, "font": {"size": 15}},
        "height": 370 + 18 * len(panel.lines),
        "margin": {"l": 50, "r": 12, "t": 56, "b": 50},
        "paper_bgcolor": clear, "plot_bgcolor": clear, "font": {"color": "--soft", "size": 12},
        "xaxis": axis | {"title": {"text": panel.xlabel, "standoff": 8}}
        | ({"autorange": "reversed"} if panel.kind == "frontier" else {}),
        "yaxis": axis | {"title": {"text": panel.ylabel}} | ({"rangemode": "tozero"} if panel.from_zero else {}),
        "legend": {"orientation": "h", "yref": "container", "y": 0.01, "yanchor": "bottom"},
        "showlegend": len(panel.lines) > 1,
        "hoverlabel": {"bgcolor": "--card", "bordercolor": "--line", "font": {"color": "--ink"}},
        "shapes": [] if matched is None else [shape],
        "annotations": [] if matched is None else [words | {"text": f"same loss {matched:.3f}"}],
    }  # fmt: skip


def _escaped(name: str, length: int = 32) -> str:
    """A name for plotly, which reads a part of HTML in every label: the name is shown, never obeyed."""
    return html.escape(label(name, length), quote=False)

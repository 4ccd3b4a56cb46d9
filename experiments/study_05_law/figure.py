"""The figure of the study of laws: runs with the plain line, and the largest rank against what was predicted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from experiments.pages import dress
from experiments.study_05_law.report import Rows, Study, curve, line_of, points, studies
from retain.report.style import INK, MARKS, PALETTE, STYLE, save_png

NAMES = {"verilog": "Verilog", "cpp": "C++", "web": "Web text"}


def draw(rows: Rows, path: Path) -> None:
    """One row of panels for each data set."""
    import matplotlib
    from matplotlib.figure import Figure

    found = {name: study for name, study in studies(rows).items() if len(study.plain) > 5}
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(10, 0.6 + 3.9 * max(len(found), 1)))
        for at, (name, study) in enumerate(found.items()):
            left, right = (figure.add_subplot(len(found), 2, 2 * at + side) for side in (1, 2))
            runs_and_line(left, NAMES.get(name, name), study)
            largest(right, NAMES.get(name, name), study)
            if not at:
                figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=5, fontsize=8.5,
                              title="in the panels on the left")  # fmt: skip
        save_png(figure, path)


def runs_and_line(axes: Any, name: str, study: Study) -> None:
    """L_f (soft) over L_ft: plain runs by rank, their line, and the runs that it does not hold for."""
    import matplotlib

    ranks = sorted({row["settings"]["lora_rank"] for row in study.plain})
    shades = dict(zip(ranks, matplotlib.colormaps["viridis"](np.linspace(0.05, 0.85, len(ranks))), strict=True))
    for rank in ranks:
        of = [row for row in study.plain if row["settings"]["lora_rank"] == rank]
        scatter(axes, of, f"rank {rank}", color=shades[rank], marker="o")
    for at, (kind, of) in enumerate(study.kinds.items()):
        scatter(axes, of, kind, color=PALETTE[at % len(PALETTE)], marker=MARKS[(1 + at) % len(MARKS)])
    learned = [at["finetuning_loss"] for at in points(study.plain, "soft")]
    ends = np.array([max(learned), min(learned)])
    axes.plot(ends, np.polyval(line_of(study.plain, "soft"), ends), color=INK, linewidth=1.4, label="line of the ranks")
    axes.invert_xaxis()
    dress(axes, f"{name}: forgetting over learning", "new-task loss, nats per token (learning →)",
          "L_f, soft, nats per token")  # fmt: skip


def scatter(axes: Any, rows: Rows, label: str, **look: Any) -> None:
    found = points(rows, "soft")
    x, y = ([at[name] for at in found] for name in ("finetuning_loss", "forgetting_loss"))
    axes.plot(x, y, linestyle="none", markersize=3.6, alpha=0.7, markeredgewidth=0, label=label, **look)


def largest(axes: Any, name: str, study: Study) -> None:
    """Both readings of the largest rank over the steps, with the prediction that was written first."""
    prediction = study.prediction
    if prediction is None:
        return
    for reading, color in (("soft", PALETTE[1]), ("hard", PALETTE[0])):
        of, steps = prediction[reading]["forgetting_loss"], prediction["steps"]
        axes.fill_between(steps, *of["ci"], color=color, alpha=0.18, linewidth=0)
        axes.plot(steps, of["value"], color=color, label=f"{reading}: predicted, 95% interval")
        for number, row in enumerate(study.largest):
            axes.plot(steps, curve(row, reading, steps), color=color, marker="o", markersize=3.2, linewidth=0.7,
                      label=f"{reading}: measured, each seed" if not number else None)  # fmt: skip
    dress(axes, f"{name}: rank {prediction['settings']['predict']}, predicted from the smaller ones", "optimizer step",
          "L_f, nats per token")  # fmt: skip
    axes.legend(fontsize=7.5, loc="best")

"""What the study of continual tasks says: table, verdict and figure, from its rows alone."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from experiments.claim import Interval, over_seeds
from experiments.pages import answer_of, dress, findings, panels, table
from retain.lab.tasks import TASKS
from retain.report.style import INK, PALETTE

METHODS = {"none": "Without replay", "ntp": "Self-generated replay, NTP", "kl": "Self-generated replay, KL"}
SHORT = {"none": "without replay", "ntp": "with NTP replay", "kl": "with KL replay"}
EARLIER = TASKS[:-1]
FORGOTTEN, KEPT = 0.2, 0.9  # the paper: earlier tasks at 0 to 20% without replay, near 100% with it
Row = dict[str, Any]


def of_method(rows: Sequence[Row], method: str) -> list[Row]:
    """The runs of a method, by seed."""
    found = [row for row in rows if row["settings"]["method"] == method]
    return sorted(found, key=lambda row: row["settings"]["seed"])


def at_end(row: Row, tasks: Sequence[str]) -> float:
    """Mean exact match over tasks when the whole sequence is learned."""
    return float(np.mean([row["trajectory"][-1][task] for task in tasks]))


def when_learned(row: Row, task: str, measured: str | None = None) -> float:
    """Exact match on a task at the end of its own training, or on another one then."""
    settings, at = row["settings"], TASKS.index(task)
    step = settings["first_steps"] + at * settings["steps"]
    return next(found[measured or task] for found in row["trajectory"] if found["step"] == step)


def percent(values: Sequence[float]) -> str:
    """Mean, and each seed: near 0 and 100% Student's t has no meaning for a few seeds."""
    return f"{100 * np.mean(values):.0f}% ({', '.join(f'{100 * value:.0f}' for value in values)})"


def table_of_methods(rows: Sequence[Row]) -> str:
    """Exact match at the end of the sequence, a line for each method."""
    head = ("method", *TASKS, "the three earlier tasks", "each task when it was learned", "seeds")
    lines = []
    for method, title in METHODS.items():
        if runs := of_method(rows, method):
            ends = [percent([at_end(row, tasks) for row in runs]) for tasks in (*([task] for task in TASKS), EARLIER)]
            learned = percent([float(np.mean([when_learned(row, task) for task in TASKS])) for row in runs])
            lines.append([title, *ends, learned, len(runs)])
    return table(head, lines)


def verdict(rows: Sequence[Row]) -> str:
    """Whether the paper's finding is there, by intervals over seeds; and which objective keeps more."""
    found = {method: [at_end(row, EARLIER) for row in of_method(rows, method)] for method in METHODS}
    number = min(map(len, found.values()))
    if number < 2 or len(set(map(len, found.values()))) > 1:
        return "Verdict: none yet; the study is not finished."

    def more(one: str, other: str) -> Interval:
        return over_seeds([a - b for a, b in zip(found[one], found[other], strict=True)])

    limits = {method: over_seeds(values) for method, values in found.items()}
    better, last = [more("kl", "none"), more("ntp", "none")], last_learned(rows)
    if limits["none"].high <= FORGOTTEN and min(limits["ntp"].low, limits["kl"].low) >= KEPT:
        answer = "reproduced" if last["none"] == number else "reproduced, but for the last task without replay"
    elif all(one.sign > 0 for one in better):
        answer = "reproduced in kind: replay keeps more, though the paper's levels (20% and 90%) are not certain"
    else:
        answer = "cannot tell at this size" if max(one.high for one in better) > 0 else "not reproduced"
    gain, low, high = between = more("kl", "ntp")
    which = {1: "KL keeps more than NTP", 0: "Whether KL keeps more is open", -1: "NTP keeps more"}[between.sign]
    means = ", ".join(f"{percent(found[method])} {words}" for method, words in SHORT.items())
    return (
        f"Verdict: {answer}. The three earlier tasks end at {means} (the paper: 0 to 20%, near 100% with NTP). "
        f"{which}: {100 * gain:+.0f} points [{100 * low:+.0f}, "
        f"{100 * high:+.0f}]. The last task is learned (90% or more) by {last['none']} of {number} seeds without "
        f"replay (the paper: about 100%), {last['ntp']} with NTP, {last['kl']} with KL, at settings that were tuned "
        f"with replay. {number} seeds, each in brackets; intervals by Student's t."
    )


def last_learned(rows: Sequence[Row]) -> dict[str, int]:
    """By method how many seeds have learned the task that came last."""
    return {method: sum(at_end(row, TASKS[-1:]) >= KEPT for row in of_method(rows, method)) for method in METHODS}


def report(rows: Sequence[Row]) -> str:
    """Everything between the marks of the README."""
    said = verdict(rows)
    if not (answer := answer_of(said)):
        return f"{table_of_methods(rows)}\n\n**{said}**"
    ends = ", ".join(f"{percent([at_end(row, EARLIER) for row in of_method(rows, method)])} {words}"
                     for method, words in SHORT.items())  # fmt: skip
    last = f"the last task learned by {last_learned(rows)['none']} of {len(of_method(rows, 'none'))} seeds without it"
    claim = {"Four tasks in sequence: lost without replay, kept with it": (answer, f"{ends}; {last}")}
    return f"{table_of_methods(rows)}\n\n**{said}**\n\n{findings(claim)}\n\n{on_the_way(rows)}"


def on_the_way(rows: Sequence[Row]) -> str:
    """Without replay, what is left of the earlier tasks when each later one but the last has been learned."""
    runs, left = of_method(rows, "none"), []
    for now in TASKS[1:-1]:
        known = f"{now} is at {percent([when_learned(row, now) for row in runs])}"
        earlier = [
            f"{task} {percent([when_learned(row, now, task) for row in runs])}" for task in TASKS[: TASKS.index(now)]
        ]
        left.append(f"when {known}, {' and '.join(earlier)}")
    return f"Looked at after the runs, no part of a rule. Without replay, on the way: {'; '.join(left)}."


def draw(rows: Sequence[Row], path: Path) -> None:
    """Exact match on each task over the sequence, a panel for each method: means of seeds, thin lines each seed."""
    shown = [method for method in METHODS if of_method(rows, method)]
    with panels(path, len(shown), (4.1 * len(shown), 3.4)) as axes:
        for axis, method in zip(axes, shown, strict=True):
            runs = of_method(rows, method)
            steps = [found["step"] for found in runs[0]["trajectory"]]
            for task, colour in zip(TASKS, PALETTE, strict=False):
                lines = np.array([[found[task] for found in row["trajectory"]] for row in runs])
                axis.plot(steps, 100 * lines.T, color=colour, linewidth=0.5, alpha=0.45)
                axis.plot(steps, 100 * lines.mean(0), color=colour, linewidth=1.8, label=task)
            _tasks(axis, runs[0]["settings"])
            dress(axis, METHODS[method], "training step", "")
        axes[0].set_ylabel("exact match, %")
        handles, labels = axes[0].get_legend_handles_labels()
        axes[0].figure.legend(handles, labels, loc="outside lower center", ncols=len(TASKS))


def _tasks(axis: Any, settings: dict[str, Any]) -> None:
    """Where each task begins, with its name above."""
    begins = [0, *(settings["first_steps"] + at * settings["steps"] for at in range(len(TASKS) - 1))]
    ends = [*begins[1:], begins[-1] + settings["steps"]]
    for task, begin, end, colour in zip(TASKS, begins, ends, PALETTE, strict=False):
        if begin:
            axis.axvline(begin, color=INK, linewidth=0.9, linestyle=(0, (4, 3)), zorder=1)
        axis.text((begin + end) / 2, 104, task, color=colour, fontsize=8, ha="center", va="bottom")
    axis.set_xlim(0, ends[-1])
    axis.set_ylim(-3, 114)
    axis.set_yticks(range(0, 101, 20))

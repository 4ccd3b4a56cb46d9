"""The cells of the study: what was prevented at the same loss, what a step costs, and the verdict by the rule."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from experiments.claim import Interval, over_seeds
from experiments.matched_loss import MEASURES
from experiments.pages import NoReport, findings, panels, table

GOAL, MOST_TIME = 0.95, 1.10
FINDING = "An anchor with a little late replay prevents 95% for a tenth of the time"
NUM_RATES = 4  # of plain runs
BASES = {"small": "small base, 0.43M", "smollm2": "SmolLM2-135M-Instruct"}
METHODS = {"full": "full", "lora": "LoRA"}
WAYS = {"replay": "a sixteenth of the batch", "anchor": "anchor and late replay"}
TASKS = {"verilog": "Verilog (settings chosen here)", "spanish": "Spanish", "cpp": "C++"}


@dataclass(frozen=True)
class End:
    """A run at its end: its new-task loss, and the three measures, nats per token."""

    loss: float
    measures: np.ndarray


def end_of(row: dict[str, Any]) -> End:
    last = row["trajectory"][-1]
    return End(last["eval_loss"], np.array([last[f"retention/{text}/{metric}"] for text, metric in MEASURES]))


def plain_at(loss: float, plain: Sequence[End]) -> np.ndarray:
    """What plain runs of other learning rates forget at a loss: linear between two; at most the lowest's."""
    ends = sorted(plain, key=lambda end: end.loss)
    losses = [end.loss for end in ends]
    return np.array([np.interp(loss, losses, [end.measures[at] for end in ends]) for at in range(len(MEASURES))])


@dataclass(frozen=True)
class Cell:
    """One way of protecting one method on one task: of each seed, what it prevented of the three measures."""

    base: str
    method: str
    task: str
    way: str
    losses: list[float]
    plain_losses: list[float]
    prevented: np.ndarray  # (seeds, measures)
    time: float | None

    @property
    def weakest(self) -> Interval:
        """The interval over seeds of the measure of which least was prevented."""
        return min((over_seeds(column) for column in self.prevented.T), key=lambda found: found.value)

    @property
    def verdict(self) -> str:
        """By the rule of `run.py`."""
        found = [over_seeds(column) for column in self.prevented.T]
        if len(self.prevented) < 3 or self.time is None:
            return "too few runs"
        if self.time > MOST_TIME or any(one.high < GOAL for one in found):
            return "missed"
        return "reached" if all(one.low >= GOAL for one in found) else "cannot tell"


def cells_of(rows: Sequence[dict[str, Any]]) -> list[Cell]:
    """Every cell of which there are runs, judged ones and those on which settings were chosen."""
    found = []
    for base in BASES:
        for method in METHODS:
            times = times_of(rows, base, method)
            for task in TASKS:
                of = [row for row in rows if row["bench"] == f"{base}-{task}" and row["settings"]["method"] == method]
                plain: dict[int, list[End]] = {}
                for row in of:
                    if way_of(row["settings"]) == "plain":
                        plain.setdefault(row["settings"]["seed"], []).append(end_of(row))
                for way in ("anchor", "replay"):
                    own = {row["settings"]["seed"]: end_of(row) for row in of if way_of(row["settings"]) == way}
                    seeds = sorted(seed for seed in own if len(plain.get(seed, [])) == NUM_RATES)
                    if seeds:
                        shares = [1 - own[seed].measures / plain_at(own[seed].loss, plain[seed]) for seed in seeds]
                        lowest = [min(end.loss for end in plain[seed]) for seed in seeds]
                        losses = [own[seed].loss for seed in seeds]
                        time = times.get(way)
                        found.append(Cell(base, method, task, way, losses, lowest, np.array(shares), time))
    return found


def way_of(settings: dict[str, Any]) -> str:
    return "anchor" if settings.get("anchor_coef") else "replay" if settings.get("coef") else "plain"


def times_of(rows: Sequence[dict[str, Any]], base: str, method: str) -> dict[str, float]:
    """Processor time of a step over a plain one's, averaged over a run; median of the rounds."""
    rounds: dict[str, list[float]] = {}
    for row in rows:
        if row["bench"] == f"{base}-timing" and row["settings"]["method"] == method:
            for one in row["timing"]:
                with_rows = "rows" if one["settings"].get("coef") else "alone"
                rounds.setdefault(f"{way_of(one['settings'])}-{with_rows}", []).append(one["cpu"])
    medians = {name: statistics.median(values) for name, values in rounds.items()}
    if not medians:
        return {}
    late = 0.15  # of the steps have replay: LATE in run.py
    anchor = (1 - late) * medians["anchor-alone"] + late * medians["anchor-rows"]
    return {"anchor": anchor, "replay": medians["replay-rows"]}


def report_of(rows: Sequence[dict[str, Any]]) -> str:
    """Table and verdicts."""
    cells = cells_of(rows)
    if not cells:
        raise NoReport("no cell has a run of each kind yet")
    head = ("base", "method", "task", "protected by", "seeds", "new-task loss", "lowest plain",
            *(f"prevented: {metric}, {text}" for text, metric in MEASURES), "time a step", "the goal")  # fmt: skip
    lines = []
    for cell in cells:
        shares = [over_seeds(column).percent() for column in cell.prevented.T]
        verdict = cell.verdict if cell.task != "verilog" and cell.way == "anchor" else "not judged"
        time = f"{cell.time:.2f}" if cell.time is not None else "not measured"
        lines.append((
            BASES[cell.base], METHODS[cell.method], TASKS[cell.task], cell.way, len(cell.losses),
            f"{np.mean(cell.losses):.3f}", f"{np.mean(cell.plain_losses):.3f}", *shares, time, verdict,
        ))  # fmt: skip
    judged = [cell for cell in cells if cell.task != "verilog" and cell.way == "anchor"]
    judged = [cell for cell in judged if cell.verdict != "too few runs"]
    if not judged:
        return table(head, lines)
    reached, weakest = [cell for cell in judged if cell.verdict == "reached"], [cell.weakest for cell in judged]
    times = [cell.time for cell in judged if cell.time is not None]
    numbers = (
        f"of the weakest measure {min(weakest).percent()} to {max(weakest).percent()} prevented, in a step of "
        f"{min(times):.2f} to {max(times):.2f} times plain's; {len(judged[0].losses)} seeds, 430,896 parameters"
    )
    said = findings({FINDING: (f"reached in {len(reached)} of {len(judged)} cells", numbers)})
    return f"{table(head, lines)}\n\n{said}"


def draw(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """What is left of forgetting at the same loss, over what a step costs more; a point for each cell."""
    cells = [cell for cell in cells_of(rows) if cell.time is not None]
    with panels(path, 1, (5.4, 3.2)) as (axes,):
        for way, marker in (("replay", "o"), ("anchor", "s")):
            for method, color in (("full", "C0"), ("lora", "C1")):
                own = [cell for cell in cells if (cell.way, cell.method) == (way, method)]
                if own:
                    label = f"{METHODS[method]}, {WAYS[way]}"
                    left = [1 - cell.weakest.value for cell in own]
                    weakest = [cell.weakest for cell in own]
                    bars = [[one.high - one.value for one in weakest], [one.value - one.low for one in weakest]]
                    costs = [100 * (cell.time - 1) for cell in own if cell.time is not None]
                    axes.errorbar(costs, left, yerr=bars, fmt=marker, color=color, label=label, capsize=2, markersize=5)
        axes.axhline(1 - GOAL, color="0.6", linestyle=":")
        axes.axvline(100 * (MOST_TIME - 1), color="0.6", linestyle=":")
        axes.set_yscale("log")
        axes.set_xlabel("processor time of a step, % above plain")
        axes.set_ylabel("share of forgetting left, same loss")
        axes.legend(fontsize=7, frameon=False)

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
REPLAY_START = 0.85  # share of the anchor's steps before its replay
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
    times: list[float]  # of a step, a round each

    @property
    def time(self) -> float | None:
        """Of a step over a plain one's: median of the rounds."""
        return statistics.median(self.times) if self.times else None

    @property
    def weakest(self) -> Interval:
        """The interval over seeds of the measure of which least was prevented."""
        return min((over_seeds(column) for column in self.prevented.T), key=lambda found: found.value)

    @property
    def verdict(self) -> str:
        """By the rule of `run.py`; and rounds of timing on both sides of the limit cannot tell."""
        found = [over_seeds(column) for column in self.prevented.T]
        if len(self.prevented) < 3 or not self.times:
            return "too few runs"
        if min(self.times) > MOST_TIME or any(one.high < GOAL for one in found):
            return "missed"
        reached = all(one.low >= GOAL for one in found) and max(self.times) <= MOST_TIME
        return "reached" if reached else "cannot tell"


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
                        found.append(
                            Cell(base, method, task, way, losses, lowest, np.array(shares), times.get(way, []))
                        )
    return found


def way_of(settings: dict[str, Any]) -> str:
    return "anchor" if settings.get("anchor_coef") else "replay" if settings.get("coef") else "plain"


def times_of(rows: Sequence[dict[str, Any]], base: str, method: str) -> dict[str, list[float]]:
    """Processor time of a step over a plain one's, averaged over a run: of each way, one a round."""
    found: dict[str, list[float]] = {}
    for row in rows:
        if row["bench"] == f"{base}-timing" and row["settings"]["method"] == method:
            replay, late, alone = (one["cpu"] for one in row["timing"])  # as `timing.timed` lists them
            found.setdefault("replay", []).append(replay)
            found.setdefault("anchor", []).append(REPLAY_START * alone + (1 - REPLAY_START) * late)
    return found


def report_of(rows: Sequence[dict[str, Any]]) -> str:
    """Table and verdicts."""
    cells = cells_of(rows)
    if not cells:
        raise NoReport("no cell has a run of each kind yet")
    head = ("base", "method", "task", "protected by", "seeds", "new-task loss", "the lowest of plain",
            *(f"prevented: {metric}, {text}" for text, metric in MEASURES), "time a step", "the goal")  # fmt: skip
    lines = []
    for cell in cells:
        means = [over_seeds(column) for column in cell.prevented.T]
        shares = [mean.percent() if len(cell.losses) > 1 else f"{mean.value:.1%}" for mean in means]
        verdict = cell.verdict if cell.task != "verilog" and cell.way == "anchor" else "not judged"
        time = f"{cell.time:.2f} ({min(cell.times):.2f} to {max(cell.times):.2f})" if cell.times else "not measured"
        lines.append((
            BASES[cell.base], METHODS[cell.method], TASKS[cell.task], cell.way, len(cell.losses),
            f"{np.mean(cell.losses):.3f}", f"{np.mean(cell.plain_losses):.3f}", *shares, time, verdict,
        ))  # fmt: skip
    judged = [cell for cell in cells if cell.task != "verilog" and cell.way == "anchor"]
    judged = [cell for cell in judged if cell.verdict != "too few runs"]
    if not judged:
        return table(head, lines)
    weakest, times = [cell.weakest for cell in judged], [cell.time for cell in judged if cell.time is not None]
    verdicts = [cell.verdict for cell in judged]
    said = ", ".join(
        f"{word} in {verdicts.count(word)}" for word in ("reached", "cannot tell", "missed") if word in verdicts
    )
    numbers = (
        f"of the weakest measure {min(weakest).percent()} to {max(weakest).percent()} prevented, in a step of "
        f"{min(times):.2f} to {max(times):.2f} times plain's; {len(judged[0].losses)} seeds, 430,896 parameters"
    )
    return f"{table(head, lines)}\n\n{findings({FINDING: (f'{said} of {len(judged)} cells', numbers)})}"


def draw(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """What is left of forgetting at the same loss, over what a step costs more; a point for each cell."""
    ticks = (2, 3, 5, 10, 20, 30)
    with panels(path, 1, (5.4, 3.4)) as (axes,):
        for way, marker in (("replay", "o"), ("anchor", "s")):
            for method, color in (("full", "C0"), ("lora", "C1")):
                own = [cell for cell in cells_of(rows) if (cell.way, cell.method) == (way, method) and cell.times]
                found = [cell.weakest for cell in own]
                left = [100 * (1 - one.value) for one in found]
                bars = [[100 * (one.high - one.value) for one in found], [100 * (one.value - one.low) for one in found]]
                costs = [100 * (cell.time - 1) for cell in own if cell.time is not None]
                label = f"{METHODS[method]}, {WAYS[way]}"
                axes.errorbar(costs, left, yerr=bars, fmt=marker, color=color, label=label, capsize=2, markersize=4)
                for cell, cost, share in zip(own, costs, left, strict=True):
                    name = TASKS[cell.task].partition(" ")[0]
                    axes.annotate(name, (cost, share), (6, -2), textcoords="offset points", fontsize=6)
        axes.axhline(100 * (1 - GOAL), color="0.6", linestyle=":")
        axes.axvline(100 * (MOST_TIME - 1), color="0.6", linestyle=":")
        axes.set_yscale("log")
        axes.set_yticks(ticks, [f"{tick}%" for tick in ticks])
        axes.minorticks_off()
        axes.set_xlabel("processor time of a step, % above plain")
        axes.set_ylabel("forgetting left at the same loss")
        axes.legend(fontsize=6, frameon=False, ncol=2, loc="lower center", bbox_to_anchor=(0.45, 1.0))

"""The cells of the study: what was prevented at the same loss, learned and paid, and the verdict by the rule."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from experiments.claim import Interval, over_seeds
from experiments.matched_loss import MEASURES
from experiments.pages import NoReport, findings, panels, table
from experiments.study_14_anchor.report import End, counted, end_of, prevented, rate_at, verdict_of_goal

FINDING = "`--replay_dataset self` prevents 95% for at most a tenth more time a step and no more steps"
FINDINGS = {
    1: f"{FINDING}, first look",
    2: f"{FINDING}, second look",
    3: "Full finetuning with an anchor of 32 eigenvectors prevents 95% for at most a tenth more time, third look",
}
COEFS = {1: 300.0, 2: 100.0, 3: 3000.0}  # of the anchor, as the library chose it at each look; at the third, would
CHOSEN = 2  # the look at what the library chooses now
FIRST_ROUNDS = 3  # of timing
TICKS = (0.003, 0.01, 0.03, 0.1, 0.3, 1, 3)  # of the figure
BASES = {"small": "small base, 0.43M", "smollm2": "SmolLM2-135M-Instruct"}
METHODS = {"full": "full", "lora": "LoRA", "wide": "full, 1,024 tokens"}


@dataclass(frozen=True)
class Cell:
    """A base, a method and a task at one look; one value of each seed, by seed.

    Attributes:
        plain: the runs of each seed, by rising learning rate; the last one has the user's.
        before: the base's new-task loss.
        time: of a step over a plain one's, averaged over a run; None where fewer than two rounds were timed.
    """

    base: str
    method: str
    task: str
    settings: dict[str, Any]
    protected: list[End]
    plain: list[list[End]]
    before: list[float]
    time: Interval | None

    @property
    def look(self) -> int:
        return look_of(self.settings)

    @property
    def way(self) -> str:
        """What protects, for people to read."""
        own = self.settings
        rows = "a row" if own["replay_rows"] == 1 else f"{own['replay_rows']} rows"
        step = f" in every {own['replay_every']} steps" if own["replay_every"] > 1 else ""
        replay = f"KL {own['coef']:g}, {rows} of {own['batch_size']}{step}"
        if "anchor_coef" not in own:
            return replay
        rank = f" of {own['anchor_rank']} eigenvectors" if "anchor_rank" in own else ""
        return f"anchor {own['anchor_coef']:g}{rank}; {replay}, in the last {1 - own['replay_start']:.0%}"

    @property
    def learned_too_little(self) -> bool:
        """Whether a run learned less than every plain one of its seed, which leaves nothing to compare it with."""
        pairs = zip(self.protected, self.plain, strict=True)
        return any(own.loss > max(end.loss for end in plain) for own, plain in pairs)

    @property
    def intervals(self) -> list[Interval | None]:
        """Prevented over seeds, of each measure; None where plain lost next to nothing."""
        if self.learned_too_little:
            return [None] * len(MEASURES)
        pairs = zip(self.protected, self.plain, strict=True)
        columns = np.array([prevented(own, plain) for own, plain in pairs]).T
        return [None if np.isnan(column).any() else over_seeds(column) for column in columns]

    @property
    def weakest(self) -> Interval | None:
        """Of the measure of which least was prevented."""
        found = [one for one in self.intervals if one is not None]
        return min(found, key=lambda one: one.value, default=None)

    @property
    def learned(self) -> Interval:
        """The gain on the new task over plain's at the user's rate."""
        return over_seeds([
            (before - own.loss) / (before - plain[-1].loss)
            for own, plain, before in zip(self.protected, self.plain, self.before, strict=True)
        ])  # fmt: skip

    @property
    def plain_rate(self) -> float:
        """The learning rate at which plain learns as much: the geometric mean over seeds."""
        rates = [rate_at(own.loss, plain) for own, plain in zip(self.protected, self.plain, strict=True)]
        return float(np.exp(np.mean(np.log(rates))))

    @property
    def verdict(self) -> str:
        """By the rule of `run.py`."""
        if self.learned_too_little:
            return "missed"
        return verdict_of_goal([one for one in self.intervals if one is not None], self.time)


def cells_of(rows: Sequence[dict[str, Any]], seeds: Sequence[int]) -> list[Cell]:
    """The cells of which all seeds are made."""
    arms: dict[tuple[int, str], dict[int, dict[str, Any]]] = {}
    sides: dict[str, dict[int, list[End]]] = {}
    for row in (row for row in rows if "trajectory" in row):
        name, seed = row["bench"], row["settings"]["seed"]
        if row["settings"]["arm"] == "protected":
            arms.setdefault((look_of(row["settings"]), name), {})[seed] = row
        else:
            sides.setdefault(name, {}).setdefault(seed, []).append(end_of(row))
    found = []
    for (look, name), own in sorted(arms.items()):
        plain = [sorted(sides.get(name, {}).get(seed, []), key=lambda end: end.rate) for seed in seeds]
        if set(own) != set(seeds) or len({len(side) for side in plain}) > 1:
            continue
        setup, _, task = name.rpartition("-")
        base, method = setup.split("-")
        before = [own[seed]["trajectory"][0]["eval_loss"] for seed in seeds]
        ends, time = [end_of(own[seed]) for seed in seeds], time_of(rows, setup, look)
        found.append(Cell(base, method, task, own[seeds[0]]["settings"], ends, plain, before, time))
    return found


def look_of(settings: dict[str, Any]) -> int:
    """The look of a protected run, by the anchor's coefficient; KL alone was looked at in the second."""
    return next((look for look, coef in COEFS.items() if coef == settings.get("anchor_coef")), CHOSEN)


def time_of(rows: Sequence[dict[str, Any]], setup: str, look: int) -> Interval | None:
    """Processor time of a step over a plain one's, averaged over a run, over rounds; None of fewer than two.

    From the second look on, the rounds of the code with two rotations where there are some. The interval is widened
    for the looks at the rounds.
    """
    timed = [row for row in rows if row["bench"] == f"{setup}-timing"]
    three = [row for row in timed if "rotations" not in row["settings"]]
    two = [row for row in timed if "rotations" in row["settings"]]
    if look > 1 and len(two) > 1:
        rounds, looks = two, 3
    else:
        rounds, looks = three, 1 if len(three) <= FIRST_ROUNDS else 2
    return over_seeds([step_of(row) for row in rounds], 1 - 0.05 / looks) if len(rounds) > 1 else None


def step_of(row: dict[str, Any]) -> float:
    """A step over a plain one's in one round of timing, averaged over a run."""
    late, *anchor = (one["cpu"] for one in row["timing"])  # as `run.timed` lists them
    (early,) = anchor or [1.0]
    return float(early + (1 - row["replay_start"]) * (late - early) / row["replay_every"])


def report_of(rows: Sequence[dict[str, Any]], seeds: Sequence[int]) -> str:
    """Table and verdict."""
    cells = cells_of(rows, seeds)
    if not cells:
        raise NoReport("no cell has all its seeds yet")
    head = ("base", "method", "task", "steps", "what protects", "new-task loss", "plain learns that at", "learned",
            *(f"prevented: {metric}, {text}" for text, metric in MEASURES), "time a step", "the goal")  # fmt: skip
    lines = [
        (
            BASES[cell.base], METHODS[cell.method], cell.task.capitalize(), cell.settings["max_steps"], cell.way,
            f"{np.mean([end.loss for end in cell.protected]):.3f}", f"{cell.plain_rate:.1e}", cell.learned.text(".0%"),
            *("–" if one is None else one.percent() for one in cell.intervals),
            "not measured" if cell.time is None else cell.time.text(".2f"), cell.verdict,
        )
        for cell in cells
    ]  # fmt: skip
    said = {
        f"{FINDINGS[look]}, coefficient {coef:g}": said_of(judged, len(seeds))
        for look, coef in COEFS.items()
        if (judged := [cell for cell in cells if cell.look == look])
    }
    return f"{table(head, lines)}\n\n{findings(said)}"


def said_of(cells: Sequence[Cell], seeds: int) -> tuple[str, str]:
    """How many cells reached the goal, and the ends of what they measured."""
    weakest = sorted((one for cell in cells if (one := cell.weakest)), key=lambda one: one.value)
    learned = sorted((cell.learned for cell in cells), key=lambda one: one.value)
    times = sorted({cell.time for cell in cells if cell.time is not None})
    numbers = [
        f"of the weakest measure {weakest[0].percent()} to {weakest[-1].percent()} prevented" if weakest else "",
        f"{learned[0].text('.0%')} to {learned[-1].text('.0%')} of plain's gain learned",
        f"a step of {times[0].text('.2f')} to {times[-1].text('.2f')} times plain's" if times else "",
    ]
    return counted([cell.verdict for cell in cells]), f"{', '.join(filter(None, numbers))}; {seeds} seeds"


def draw(rows: Sequence[dict[str, Any]], seeds: Sequence[int], path: Path) -> None:
    """KL on own rows over the new-task loss at the end: plain's rates as a line, protected runs as points."""
    cells = cells_of(rows, seeds)
    columns = -(-len(cells) // 2)
    with panels(path, 2 * columns, (2.4 * columns + 0.6, 5.6), rows=2) as axes:
        for at, (cell, panel) in enumerate(zip(cells, axes, strict=False)):
            ends = np.array([[(end.loss, end.measures[-1]) for end in side] for side in cell.plain]).mean(0)
            panel.plot(*ends.T, "o-", color="0.55", markersize=3, linewidth=1, label="plain, by learning rate")
            own = np.array([(end.loss, end.measures[-1]) for end in cell.protected])
            panel.plot(*own.T, "s", color="C0", markersize=4, linestyle="none", label="the default, three seeds")
            panel.set_yscale("log")
            panel.set_ylim(0.001, 4)
            panel.set_yticks(TICKS, [""] * len(TICKS) if at % columns else [f"{tick:g}" for tick in TICKS])
            panel.minorticks_off()
            panel.invert_xaxis()
            what = f"anchor {cell.settings['anchor_coef']:g}" if "anchor_coef" in cell.settings else "KL"
            base = BASES[cell.base].split("-")[0].split(",")[0]
            panel.set_title(f"{cell.task.capitalize()}, {what}\n{base}, {METHODS[cell.method]}", fontsize=9)
            panel.set_xlabel("new-task loss" if at >= columns else "", fontsize=8)
            panel.set_ylabel("" if at % columns else "KL(base || model), own rows", fontsize=8)
            panel.tick_params(labelsize=8)
        for panel in axes[len(cells) :]:
            panel.set_axis_off()
        axes[0].legend(fontsize=7, frameon=False, loc="lower left")

"""The cells of the study: what was prevented at the same loss, what a step costs, and the verdict by the rule."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from experiments.claim import Interval, over_seeds
from experiments.matched_loss import MEASURES
from experiments.pages import NoReport, findings, panels, table
from experiments.study_14_anchor.settings import BASES, TASKS

GOAL, MOST_TIME = 0.95, 1.10
TOO_FEW, NOT_TIMED = "too few runs", "not timed"
LEAST = 0.05  # nats per token that plain must forget, for a share of it to mean anything
FINDING = "An anchor with a little late replay prevents 95% for a tenth of the time"
METHODS = {"full": "full", "lora": "LoRA"}


@dataclass(frozen=True)
class End:
    """A run at its end: its new-task loss, the three measures, nats per token, and its learning rate."""

    loss: float
    measures: np.ndarray
    rate: float


def end_of(row: dict[str, Any]) -> End:
    last = row["trajectory"][-1]
    measures = np.array([last[f"retention/{text}/{metric}"] for text, metric in MEASURES])
    return End(last["eval_loss"], measures, row["settings"]["learning_rate"])


def plain_at(loss: float, plain: Sequence[End]) -> np.ndarray:
    """What plain runs of other learning rates forget at a loss: linear between two; below all of them the lowest's."""
    ends = sorted(plain, key=lambda end: end.loss)
    losses = [end.loss for end in ends]
    assert loss <= losses[-1], "a plain run of a lower rate would have forgotten less"
    return np.array([np.interp(loss, losses, [end.measures[at] for end in ends]) for at in range(len(MEASURES))])


def rate_at(loss: float, plain: Sequence[End]) -> float:
    """The learning rate at which plain finetuning ends at a loss: linear in its logarithm."""
    ends = sorted(plain, key=lambda end: end.loss)
    return float(np.exp(np.interp(loss, [end.loss for end in ends], [np.log(end.rate) for end in ends])))


def prevented(end: End, plain: Sequence[End]) -> np.ndarray:
    """Of what plain forgets at the same loss, by measure; NaN where that is next to nothing."""
    lost = plain_at(end.loss, plain)
    return np.where(lost < LEAST, np.nan, 1 - end.measures / lost)


@dataclass(frozen=True)
class Cell:
    """One way of protecting one method on one task: of each seed, what it prevented of the three measures.

    Attributes:
        round: of the anchor; 0 for replay alone.
    """

    base: str
    method: str
    task: str
    round: int
    losses: list[float]
    plain_rates: list[float]  # at which plain finetuning learns as much
    prevented: np.ndarray  # (seeds, measures)
    kept: list[float]  # KL on own rows at the end, of each seed
    time: Interval | None  # of a step over a plain one's, averaged over a run

    @property
    def judged(self) -> bool:
        return self.round > 0 and self.round == TASKS[self.task].round

    @property
    def way(self) -> str:
        """What protects, for people to read."""
        if not self.round:
            return "replay"
        return f"anchor, coefficient {BASES[self.base].anchors[self.method][self.round]['anchor_coef']:g}"

    @property
    def intervals(self) -> list[Interval | None]:
        """Over seeds, of each measure; None where plain forgot next to nothing."""
        return [None if np.isnan(column).any() else over_seeds(column) for column in self.prevented.T]

    @property
    def weakest(self) -> Interval:
        """The interval over seeds of the measure of which least was prevented."""
        return min((found for found in self.intervals if found is not None), key=lambda found: found.value)

    @property
    def verdict(self) -> str:
        """By the rule of `run.py`."""
        found = [one for one in self.intervals if one is not None]
        return TOO_FEW if len(self.prevented) < 3 else verdict_of_goal(found, self.time)


def verdict_of_goal(prevented: Sequence[Interval], time: Interval | None) -> str:
    """Whether 95% of all measures are prevented in a step of 1.10: an interval that holds a limit cannot tell."""
    if any(one.high < GOAL for one in prevented):
        return "missed"
    if time is None:
        return NOT_TIMED
    if time.low > MOST_TIME:
        return "missed"
    reached = all(one.low >= GOAL for one in prevented) and time.high <= MOST_TIME
    return "reached" if reached else "cannot tell"


def cells_of(rows: Sequence[dict[str, Any]]) -> list[Cell]:
    """Every cell of which there are runs, judged ones and others."""
    found = []
    for base, of_base in BASES.items():
        for method, task in ((method, task) for method in of_base.anchors for task in TASKS):
            ends: dict[int | None, dict[int, list[End]]] = {}
            for row in rows:
                settings = row["settings"]
                if row["bench"] == f"{base}-{task}" and settings["method"] == method:
                    at = round_of(settings, base)
                    ends.setdefault(at, {}).setdefault(settings["seed"], []).append(end_of(row))
            plain = ends.get(None, {})
            for number in (*sorted(of_base.anchors[method]), 0):
                own = {
                    seed: end
                    for seed, (end,) in ends.get(number, {}).items()
                    if end.loss <= max((one.loss for one in plain.get(seed, [])), default=0.0)
                }
                if own:
                    shares = [prevented(end, plain[seed]) for seed, end in sorted(own.items())]
                    rates = [rate_at(end.loss, plain[seed]) for seed, end in sorted(own.items())]
                    losses = [own[seed].loss for seed in sorted(own)]
                    time = time_of(rows, base, method, number)
                    kept = [own[seed].measures[-1] for seed in sorted(own)]
                    found.append(Cell(base, method, task, number, losses, rates, np.array(shares), kept, time))
    return found


def round_of(settings: dict[str, Any], base: str) -> int | None:
    """The round of an anchored run, −1 where it belongs to none; 0: replay alone; None: plain."""
    if (coef := settings.get("anchor_coef")) is not None:
        anchors = BASES[base].anchors[settings["method"]].items()
        return next((number for number, how in anchors if (how["anchor_coef"], how["learning_rate"]) == (
            coef, settings["learning_rate"])), -1)  # fmt: skip
    return 0 if settings.get("coef") else None


def time_of(rows: Sequence[dict[str, Any]], base: str, method: str, number: int) -> Interval | None:
    """Processor time of a step over a plain one's, averaged over a run of a round of anchors; None: not measured.

    Over rounds of timing, since trainers that do the same differ by more than a round's own interval. What a step costs
    does not depend on coefficients and rates.
    """
    found = []
    for row in rows:
        if row["bench"] == f"{base}-timing" and row["settings"]["method"] == method:
            replay, late, alone = row["timing"]  # as `timing.timed` lists them
            how = BASES[base].anchors[method].get(number, {"replay_start": 0.0, "replay_rows": 0})
            if number and how["replay_rows"] != late["settings"]["replay_rows"]:
                return None
            share = how["replay_start"]
            found.append(share * alone["cpu"] + (1 - share) * late["cpu"] if number else replay["cpu"])
    return over_seeds(found) if len(found) > 1 else None  # one round has no interval


def report_of(rows: Sequence[dict[str, Any]]) -> str:
    """Table and verdicts."""
    cells = cells_of(rows)
    if not shown_of(cells):
        raise NoReport("no cell of the last round has three seeds yet")
    head = ("base", "method", "task", "protected by", "seeds", "new-task loss", "plain learns that at",
            *(f"prevented: {metric}, {text}" for text, metric in MEASURES), "time a step", "the goal")  # fmt: skip
    lines = []
    for cell in cells:
        shares = [
            "–" if mean is None else mean.percent() if len(cell.losses) > 1 else f"{mean.value:.1%}"
            for mean in cell.intervals
        ]
        verdict = cell.verdict if cell.judged else "not judged"
        time = "not measured" if cell.time is None else cell.time.text(".2f")
        lines.append((
            BASES[cell.base].label, METHODS[cell.method], TASKS[cell.task].label, cell.way, len(cell.losses),
            f"{np.mean(cell.losses):.3f}", f"{np.exp(np.mean(np.log(cell.plain_rates))):.1e}", *shares, time, verdict,
        ))  # fmt: skip
    told = [one for one in cells if one.judged and one.verdict not in (TOO_FEW, NOT_TIMED)]
    rounds = {number: [one for one in told if one.round == number] for number in (1, 2, 3)}
    said = {f"{FINDING}, round {number}": verdict_of(judged) for number, judged in rounds.items() if judged}
    return f"{table(head, lines)}\n\n{findings(said)}" if said else table(head, lines)


def verdict_of(judged: Sequence[Cell]) -> tuple[str, str]:
    """How many cells reached the goal, and the numbers behind it."""
    weakest, times = [cell.weakest for cell in judged], [cell.time.value for cell in judged if cell.time is not None]
    took = f"in a step of {min(times):.2f} to {max(times):.2f} times plain's" if times else "not timed"
    numbers = (
        f"of the weakest measure {min(weakest).percent()} to {max(weakest).percent()} prevented, {took}; "
        f"{len(judged[0].losses)} seeds"
    )
    return counted([cell.verdict for cell in judged]), numbers


def counted(verdicts: Sequence[str]) -> str:
    """How often each verdict was given."""
    words = ("reached", "cannot tell", "missed", NOT_TIMED)
    said = ", ".join(f"{word} in {verdicts.count(word)}" for word in words if word in verdicts)
    return f"{said} of {len(verdicts)} cells"


def shown_of(cells: Sequence[Cell]) -> list[Cell]:
    """The cells of the figure: of the last round's tasks, those with seeds enough."""
    return [cell for cell in cells if TASKS[cell.task].round == 3 and cell.verdict != TOO_FEW]


def draw(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """What was forgotten over what was learned, on the tasks of the last round: plain's rates as a line."""
    cells = shown_of(cells_of(rows))
    places = list(dict.fromkeys((cell.base, cell.method, cell.task) for cell in cells))
    columns = -(-len(places) // 2)
    ticks = (0.01, 0.03, 0.1, 0.3, 1, 3)
    with panels(path, len(places), (2.6 * columns + 0.6, 5.4), rows=2) as axes:
        for at, (place, panel) in enumerate(zip(places, axes, strict=True)):
            base, method, task = place
            panel.plot(*plain_front(rows, *place), "o-", color="0.55", markersize=3, linewidth=1, label="plain")
            for cell in (cell for cell in cells if (cell.base, cell.method, cell.task) == place):
                how = ("s", "C0", "anchor, late replay") if cell.round else ("D", "C1", "replay, 1/16 of the batch")
                panel.plot(cell.losses, cell.kept, how[0], color=how[1], markersize=4, label=how[2])
            panel.set_yscale("log")
            panel.set_ylim(0.008, 4)
            panel.set_yticks(ticks, [""] * len(ticks) if at % columns else [f"{tick:g}" for tick in ticks])
            panel.minorticks_off()
            panel.invert_xaxis()
            name = BASES[base].label.replace("-135M-Instruct", "").split(",")[0]
            panel.set_title(f"{TASKS[task].label}: {name}, {METHODS[method]}", fontsize=9)
            panel.set_xlabel("new-task loss" if at >= len(places) - columns else "", fontsize=8)
            panel.set_ylabel("" if at % columns else "KL(base || model), own rows", fontsize=8)
            panel.tick_params(labelsize=8)
        axes[0].legend(fontsize=7, frameon=False, loc="lower left")


def plain_front(rows: Sequence[dict[str, Any]], base: str, method: str, task: str) -> tuple[list[float], list[float]]:
    """New-task loss and KL on own rows of each plain learning rate, means over seeds, by rising loss."""
    by_rate: dict[float, list[End]] = {}
    for row in rows:
        settings = row["settings"]
        of_place = (row["bench"], settings["method"]) == (f"{base}-{task}", method)
        if of_place and round_of(settings, base) is None:
            by_rate.setdefault(settings["learning_rate"], []).append(end_of(row))
    points = sorted((np.mean([end.loss for end in ends]), np.mean([end.measures[-1] for end in ends]))
                    for ends in by_rate.values())  # fmt: skip
    return [loss for loss, _ in points], [kl for _, kl in points]

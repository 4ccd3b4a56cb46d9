"""StudyResults of the study in, table, verdict and figure out."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from experiments.claim import Interval
from experiments.matched_loss import MEASURES, Reading, Seeds, by_settings, read_at, target_loss
from experiments.pages import table
from retain.report.results import series

GOAL, LIMIT, GAIN = 0.95, 1.10, 0.85
LENGTH = 64


@dataclass(frozen=True)
class Cell(Seeds):
    """A setting with its price; `plain` are the unprotected runs of its method."""

    plain: Seeds
    rounds: tuple[float, ...]  # cost of a step in each round of timing
    predicted: float
    usual: bool  # whether at the learning rate of the plain runs

    @property
    def cost(self) -> float | None:
        """Time of a step relative to a plain one, as measured."""
        return statistics.median(self.rounds) if self.rounds else None

    def prevented(self, text: str, metric: str) -> Interval:
        return self.against(self.plain, text, metric)

    def steps(self) -> float:
        """Steps to the target loss, relative to the plain runs of the same seeds."""
        seeds = [seed for seed, reading in self.readings.items() if reading and self.plain.readings.get(seed)]
        own, bare = (statistics.fmean(of.readings[seed].step for seed in seeds) for of in (self, self.plain))  # type: ignore[union-attr]
        return own / bare

    @property
    def name(self) -> str:
        rate = "" if self.usual else f", lr {self.settings['learning_rate']:g}"
        if "coef" not in self.settings:
            return f"{self.method}, plain{rate}"
        pool = f", pool {self.settings['pool']}" if "pool" in self.settings else ""
        return f"{self.method}, {self.replay}, coef {self.settings['coef']:g}{pool}{rate}"

    @property
    def method(self) -> str:
        return "LoRA" if self.settings["method"] == "lora" else "full"

    @property
    def replay(self) -> str:
        often = self.settings.get("replay_every", 1)
        size = f"1/{round(1 / (share_of(self.settings) * often))}"
        return f"{size} every {often} steps" if often > 1 else size


def share_of(settings: dict[str, Any]) -> float:
    """Replay tokens to new tokens, on average over optimizer steps; 0 for a plain run."""
    if "coef" not in settings:
        return 0.0
    tokens = settings["replay_rows"] * settings.get("replay_length", LENGTH) / settings.get("replay_every", 1)
    return tokens / (settings["batch_size"] * LENGTH)


def predicted_cost(settings: dict[str, Any]) -> float:
    """Operations of a step relative to a plain one.

    A forward pass is one unit a token, a backward pass two (one under LoRA, where the base's weights need no
    gradient); a replay token costs what a new one costs and one forward pass more, the base's.
    """
    plain = 2 if settings["method"] == "lora" else 3
    return 1 + share_of(settings) * (plain + 1) / plain


def shape(settings: dict[str, Any]) -> tuple[Any, ...]:
    """What decides how long a step takes."""
    return tuple(settings.get(name) for name in ("method", "lora_rank", "replay_rows", "replay_length", "replay_every"))


def costs(rows: Iterable[dict[str, Any]]) -> dict[tuple[Any, ...], list[tuple[float, float]]]:
    """(processor, wall-clock) seconds of a step relative to plain steps alongside, a pair for each round."""
    found: dict[tuple[Any, ...], list[tuple[float, float]]] = {}
    for row in rows:
        for cell in row.get("timing", ()):
            found.setdefault(shape(cell["settings"]), []).append((cell["cpu"], cell["wall"]))
    return found


def cells_of(rows: Sequence[dict[str, Any]], rate: dict[str, float]) -> tuple[list[Cell], dict[str, float]]:
    """All cells, read at the target loss of their method: of the plain runs at the learning rate `rate[method]`."""
    groups = by_settings(row for row in rows if "trajectory" in row)
    bare = {
        settings["method"]: (settings, of)
        for settings, of in groups
        if "coef" not in settings and settings["learning_rate"] == rate[settings["method"]]
    }
    targets = {method: target_loss(list(of.values()), GAIN) for method, (_, of) in bare.items()}

    def read(settings: dict[str, Any], of: dict[int, dict[str, Any]]) -> dict[int, Reading | None]:
        return {seed: read_at(row, targets[settings["method"]]) for seed, row in of.items()}

    plain = {method: Seeds(settings, read(settings, of)) for method, (settings, of) in bare.items()}
    timed, found = costs(rows), []
    for settings, of in groups:
        method = settings["method"]
        rounds = tuple(cpu for cpu, _ in timed.get(shape(settings), ())) if "coef" in settings else (1.0,)
        usual = settings["learning_rate"] == rate[method]
        found.append(Cell(settings, read(settings, of), plain[method], rounds, predicted_cost(settings), usual))
    return found, targets


def judge(cell: Cell) -> str:
    """ "yes", "no" or "open": does this cell prevent the goal on every measure, as far as the intervals go?"""
    if not cell.reached:
        return "no"
    found = [cell.prevented(*measure) for measure in MEASURES]
    if all(estimate.low >= GOAL for estimate in found):
        return "yes"
    return "no" if any(estimate.high < GOAL for estimate in found) else "open"


def cost_of(cell: Cell) -> float:
    """Time of a step relative to a plain one: measured, or by operations where it was not."""
    return cell.predicted if cell.cost is None else cell.cost


def time_of(cell: Cell) -> float:
    """Time to the target loss relative to plain runs: a step's cost, and more steps where replay slows learning."""
    return cost_of(cell) * cell.steps()


def verdict(cells: Sequence[Cell], method: str = "full", least_seeds: int = 3) -> str:
    """Which cells prevent the goal within the limit, a step and to the same loss; cells of too few seeds carry none."""
    sentences = [f"{GOAL:.0%} of forgetting (loss and ref_kl) for at most {LIMIT - 1:.0%} more time, {method}."]
    fit = of_enough_seeds(cells, method, least_seeds)
    if not fit:
        return f"{sentences[0]} Not decided: no cell of {least_seeds} seeds reached the target loss."
    prices = (("a step", cost_of), ("a step by operations", lambda cell: cell.predicted), ("to the same loss", time_of))
    for what, price in prices:
        good = sorted((cell for cell in fit if judge(cell) == "yes"), key=price)
        if good and price(good[0]) <= LIMIT:
            listed = "; ".join(f"{cell.name} ({price(cell) - 1:+.1%})" for cell in good if price(cell) <= LIMIT)
            sentences.append(f"Time {what}: yes, {listed}.")
            continue
        sentences.append(f"Time {what}: no. {_nearest([cell for cell in fit if price(cell) <= LIMIT], price)}")
        if good:
            sentences.append(f"The cheapest that prevents as much: {good[0].name} ({price(good[0]) - 1:+.1%}).")
    return " ".join(sentences)


def _nearest(near: Sequence[Cell], price: Callable[[Cell], float]) -> str:
    if not near:
        return "No cell of enough seeds is within the limit."
    best = max(near, key=lambda cell: weakest(cell).value)
    state = "not decided" if judge(best) == "open" else "short of it"
    return (
        f"Best within the limit ({state}): {best.name}, {weakest(best).percent()} prevented ({price(best) - 1:+.1%})."
    )


def weakest(cell: Cell) -> Interval:
    """The measure of which least was prevented."""
    return min((cell.prevented(*measure) for measure in MEASURES), key=lambda estimate: estimate.value)


def front(cells: Sequence[Cell], method: str = "full") -> list[tuple[Cell, float]]:
    """Cells that no other beats both in time to the target and in what is prevented (weakest measure)."""
    tried = [c for c in cells if "coef" in c.settings and c.method == method and c.usual and c.reached]
    found: list[tuple[Cell, float]] = []
    for cell in sorted(tried, key=time_of):
        value = weakest(cell).value
        if not found or value > found[-1][1]:
            found.append((cell, value))
    return found


def front_words(cells: Sequence[Cell], method: str = "full") -> str:
    names = [f"{cell.replay}, coef {cell.settings['coef']:g}" for cell, _ in front(cells, method)]
    values = [f"({time_of(cell) - 1:+.0%} time, {value:.0%})" for cell, value in front(cells, method)]
    pairs = "; ".join(f"{name} {value}" for name, value in zip(names, values, strict=True))
    return f"Cells that no other beats in both time to the same loss and what is prevented (weakest measure): {pairs}."


def of_enough_seeds(cells: Sequence[Cell], method: str, least_seeds: int = 3) -> list[Cell]:
    """The cells that may carry a verdict: at the rate of the plain runs, each seed at the target loss."""
    tried = [cell for cell in cells if "coef" in cell.settings and cell.method == method and cell.usual]
    return [cell for cell in tried if cell.reached and len(cell.readings) >= least_seeds]


def answers(cells: Sequence[Cell], methods: Sequence[str]) -> dict[str, tuple[str, str]]:
    """The finding of each method: priced by operations, which favours replay more than the clock does."""
    found = {}
    for method in methods:
        fit = of_enough_seeds(cells, method)
        near = [cell for cell in fit if cell.predicted <= LIMIT]
        if not near:
            continue
        states = {judge(cell) for cell in near}
        answer = "yes" if "yes" in states else "no" if states == {"no"} else "cannot tell"
        best, most = (max(group, key=lambda cell: weakest(cell).value) for group in (near, fit))
        found[f"A constant coefficient prevents {GOAL:.0%} of forgetting for a tenth more time, {method}"] = (
            answer,
            f"the weakest of three measures, {weakest(best).percent()} with {best.replay} of the batch, coefficient "
            f"{best.settings['coef']:g}, by operations {best.predicted - 1:+.1%} a step; the most of all "
            f"{weakest(most).percent()} with {most.replay}, coefficient {most.settings['coef']:g}, "
            f"{most.predicted - 1:+.0%} a step and {most.steps():.2f} times the steps; {len(best.readings)} seeds",
        )
    return found


def beside_gentler(
    cells: Sequence[Cell], rows: Sequence[dict[str, Any]], rate: dict[str, float], targets: dict[str, float]
) -> str:
    """What replay prevents of the divergence of plain finetuning at a lower rate, where that ends; seed 0."""
    runs = {json.dumps(settings): of[0] for settings, of in by_settings(row for row in rows if "trajectory" in row)}
    lines = []
    for method, usual in rate.items():
        plain = {
            row["settings"]["learning_rate"]: row
            for row in runs.values()
            if row["settings"]["method"] == method and "coef" not in row["settings"]
        }
        if not plain or (low := min(plain)) == usual:
            continue
        loss = max(series(plain[low]["trajectory"], "eval_loss")[1][-1], targets[method])
        gentle, bare = (_moved(plain[one], loss) for one in (low, usual))
        words = "LoRA" if method == "lora" else "full"
        kept = []
        for cell in of_enough_seeds(cells, words):
            share = 1 - _moved(runs[json.dumps(cell.settings)], loss)[0] / gentle[0]
            kept.append(f"{cell.replay}, coef {cell.settings['coef']:g} {share:.0%}")
        lines.append(
            f"- {words}, at {loss:.3f} nats on the new task: ref_kl on prose is {gentle[0]:.3f} with plain at {low:g} "
            f"(step {gentle[1]:.0f}), {bare[0]:.3f} with plain at {usual:g} (step {bare[1]:.0f}); of the former replay "
            f"at {usual:g} prevents: {'; '.join(kept)}."
        )
    head = "Looked at after the runs, seed 0 alone, against plain finetuning at the lowest rate tried:\n"
    return "\n".join([head, *lines]) if lines else ""


def _moved(row: dict[str, Any], loss: float) -> tuple[float, float]:
    """ref_kl on prose where a run first comes down to a loss, and the step."""
    found = read_at(row, loss)
    assert found is not None
    return found.value("prose", "ref_kl"), found.step


COLUMNS = (
    "cell", "seeds", "forgetting on prose", "ref_kl on prose", "prevented: forgetting", "prevented: ref_kl prose",
    "prevented: ref_kl own rows", "step cost", "by operations", "steps to target", "time to target",
)  # fmt: skip


def table_of_cells(cells: Sequence[Cell]) -> str:
    """One line a cell, dearest first within a method."""
    return table(COLUMNS, map(_line, sorted(cells, key=_order)), "---")


def _order(cell: Cell) -> tuple[Any, ...]:
    settings = cell.settings
    return (cell.method != "full", "coef" in settings, settings.get("replay_every", 1), settings.get("pool", 0),
            -share_of(settings), settings.get("coef", 0))  # fmt: skip


def _line(cell: Cell) -> list[str]:
    name, cost = [cell.name, str(len(cell.readings))], "–" if cell.cost is None else f"{cell.cost:.2f}"
    if len(cell.rounds) > 1:
        cost += f" ({min(cell.rounds):.2f}–{max(cell.rounds):.2f})"
    if not cell.reached:
        return [*name, f"target not reached ||||| {cost}", f"{cell.predicted:.3f}", "–", "–"]
    means = [str(cell.mean("prose", metric)) for metric in ("forgetting", "ref_kl")]
    shares = [cell.prevented(*measure).percent() if "coef" in cell.settings else "–" for measure in MEASURES]
    times = [f"{cell.predicted:.3f}", f"{cell.steps():.2f}", f"{time_of(cell):.2f}"]
    return [*name, *means, *shares, cost, *times]

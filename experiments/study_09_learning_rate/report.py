"""What the study of learning rates says: tables, findings and figure, from its rows alone."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.ticker import FixedLocator, FuncFormatter, NullFormatter

from experiments.claim import Claim, over_seeds, ratio_over_seeds
from experiments.matched_loss import read_at
from experiments.pages import NoReport, dress, findings, panels, table
from retain.report.style import MARKS, PALETTE

TARGET = 3.1  # nats per token on held-out Verilog
QUARTER = math.log(1.25)
Row = dict[str, Any]


@dataclass(frozen=True)
class Reading:
    """A run where its new-task loss crosses the target: steps, processor seconds, nats per token on prose."""

    pretrain_rate: float
    rate: float
    rows: int  # of replay in a step; 0: plain
    seed: int
    steps: float
    seconds: float
    forgetting: float
    ref_kl: float


def readings_of(rows: Sequence[Row]) -> list[Reading]:
    """Every finetune at the target.

    Raises:
        NoReport: if a run has not come down to it.
    """
    found = []
    for row in rows:
        if "trajectory" not in row:
            continue
        settings = row["settings"]
        if (at := read_at(row, TARGET)) is None:
            raise NoReport(f"a run did not come down to {TARGET:g} nats per token: {settings}")
        found.append(
            Reading(
                settings["pretrain_rate"], settings["learning_rate"], settings.get("replay_rows", 0), settings["seed"],
                at.step, at.step * row["step_seconds"], at.value("prose", "forgetting"), at.value("prose", "ref_kl"),
            )
        )  # fmt: skip
    return found


def of(readings: Sequence[Reading], **wanted: Any) -> list[Reading]:
    """Readings with these fields, by seed."""
    found = [one for one in readings if all(getattr(one, name) == value for name, value in wanted.items())]
    return sorted(found, key=lambda one: one.seed)


def values_of(readings: Sequence[Reading], name: str) -> list[Any]:
    """What a field takes, in order."""
    return sorted({getattr(one, name) for one in readings})


def column(readings: Sequence[Reading], name: str) -> np.ndarray:
    return np.array([getattr(one, name) for one in readings])


def whole_bases(readings: Sequence[Reading]) -> list[Reading]:
    """Those of the pretraining rate at which every finetuning rate and number of rows was run."""
    rates = values_of(readings, "pretrain_rate")
    return of(readings, pretrain_rate=max(rates, key=lambda rate: len(of(readings, pretrain_rate=rate))))


def on_every_base(readings: Sequence[Reading]) -> list[tuple[int, float]]:
    """Rows of replay and finetuning rate of what was run at every pretraining rate."""
    befores = values_of(readings, "pretrain_rate")
    found = [{(one.rows, one.rate) for one in of(readings, pretrain_rate=before)} for before in befores]
    return sorted(set.intersection(*found))


def cells(readings: Sequence[Reading]) -> dict[tuple[float, float, int], list[Reading]]:
    """Runs that differ in their seed alone, by pretraining rate, rows of replay and rate."""
    keys = sorted({(one.pretrain_rate, one.rows, one.rate) for one in readings})
    return {(before, rate, rows): of(readings, pretrain_rate=before, rate=rate, rows=rows)
            for before, rows, rate in keys}  # fmt: skip


# Findings: what is claimed, the verdict, the numbers behind it
Finding = tuple[str, str, str]


def slow_forgets_less(readings: Sequence[Reading]) -> Finding:
    plain = of(whole_bases(readings), rows=0)
    rates = values_of(plain, "rate")
    low, high = (of(plain, rate=pick(rates)) for pick in (min, max))
    less = Claim(column(low, "forgetting") - column(high, "forgetting"), direction=-1)
    ratios = column(low, "steps") / column(high, "steps")
    more = Claim(np.log(ratios))
    verdict = less.verdict if less.verdict == more.verdict else f"forgetting {less.verdict}, steps {more.verdict}"
    numbers = (
        f"{rates[0]:g} against {rates[-1]:g}: {over_seeds(column(low, 'forgetting'))} against "
        f"{over_seeds(column(high, 'forgetting'))} nats, {less.estimate}, in {ratio_over_seeds(ratios).text('.1f')} "
        f"times the steps; {len(low)} seeds"
    )
    return "Without replay a low finetuning rate forgets less and takes more steps", verdict, numbers


def steps_go_with_rate(readings: Sequence[Reading]) -> Finding:
    plain = of(whole_bases(readings), rows=0)
    first, second = (of(plain, rate=rate) for rate in values_of(plain, "rate")[:2])
    work = [column(cell, "steps") * column(cell, "rate") for cell in (first, second)]
    claim = Claim(np.log(work[0] / work[1]), margin=QUARTER)
    products = " and ".join(over_seeds(one).text(".4f") for one in work)
    rates = f"{first[0].rate:g} and {second[0].rate:g}"
    numbers = f"steps times rate at {rates}: {products}, {ratio_over_seeds(work[0] / work[1]).text('.2f')} times"
    return "At low rates steps go with the inverse of the rate", claim.alike, f"{numbers}; {len(first)} seeds"


def each_doubling(readings: Sequence[Reading]) -> Finding:
    high = swept(readings)
    slopes = [
        float(np.polyfit(np.log2(column(mine, "rows")), column(mine, "forgetting"), 1)[0])
        for mine in (of(high, seed=seed) for seed in values_of(high, "seed"))
    ]
    claim, numbers = Claim(slopes, direction=-1), values_of(high, "rows")
    ends = " to ".join(str(over_seeds(column(of(high, rows=pick(numbers)), "forgetting"))) for pick in (min, max))
    words = f"{claim.estimate} nats a doubling, from {ends} with {min(numbers)} to {max(numbers)} rows beside 32"
    return "At one high rate each doubling of replay lowers forgetting", claim.verdict, f"{words}; {len(slopes)} seeds"


def swept(readings: Sequence[Reading]) -> list[Reading]:
    """Runs with replay at the rate at which all numbers of rows were run."""
    kept = [one for one in whole_bases(readings) if one.rows]
    return of(kept, rate=max(values_of(kept, "rate"), key=lambda rate: len(of(kept, rate=rate))))


def factors(readings: Sequence[Reading], rate: float, cost: str) -> list[float] | None:
    """For each seed: the cost of plain at a rate over the least of replay that forgets no more; None if a seed has
    none."""
    found = []
    for plain in of(whole_bases(readings), rows=0, rate=rate):
        kept = [one for one in of(swept(readings), seed=plain.seed) if one.forgetting <= plain.forgetting]
        if not kept:
            return None
        found.append(getattr(plain, cost) / min(getattr(one, cost) for one in kept))
    return found


def replay_breaks_it(readings: Sequence[Reading]) -> Finding:
    plain = of(whole_bases(readings), rows=0)
    lost = {rate: float(column(of(plain, rate=rate), "forgetting").mean()) for rate in values_of(plain, "rate")}
    best = min(lost, key=lambda rate: lost[rate])
    claim = "Replay at a high rate forgets as little as the gentlest plain rate, in fewer steps and less time"
    steps, seconds = (factors(readings, best, cost) for cost in ("steps", "seconds"))
    if steps is None or seconds is None:
        return claim, "not reproduced", f"a seed has no run with replay that forgets as little as plain at {best:g}"
    verdicts = [Claim(np.log(values)).verdict for values in (steps, seconds)]
    verdict = verdicts[0] if verdicts[0] == verdicts[1] else f"steps {verdicts[0]}, time {verdicts[1]}"
    every = []
    for rate in lost:
        found = factors(readings, rate, "steps")
        said = "no such run in some seed" if found is None else ratio_over_seeds(found).text(".2f")
        every.append(f"{said} against {rate:g}")
    time = ratio_over_seeds(seconds).text(".2f")
    words = f"steps of plain over the fewest of replay that forgets no more: {'; '.join(every)}"
    return claim, verdict, f"{words}; processor time {time} against {best:g}; {len(steps)} seeds"


def high_pretraining(readings: Sequence[Reading], protected: bool) -> Finding:
    befores = values_of(readings, "pretrain_rate")
    lost = [
        np.mean([column(of(readings, pretrain_rate=before, rate=rate, rows=rows), "forgetting")
                 for rows, rate in on_every_base(readings) if bool(rows) == protected], axis=0)
        for before in (max(befores), min(befores))
    ]  # fmt: skip
    claim = Claim(lost[0] - lost[1], direction=-1)
    ends = " against ".join(str(over_seeds(one)) for one in lost)
    words = f"{max(befores):g} against {min(befores):g}, bases of one loss: {ends} nats, {claim.estimate}"
    name = f"A high pretraining rate reduces forgetting, {'with' if protected else 'without'} replay"
    return name, claim.verdict, f"{words}; {len(claim.differences)} seeds"


# Page


HEAD = ("pretraining rate", "finetuning rate", "rows of replay beside 32", "forgetting", "ref_kl on prose", "steps",
        "processor seconds")  # fmt: skip


def text_of(rows: Sequence[Row]) -> str:
    """The bases, a line for each cell, the findings."""
    readings = readings_of(rows)
    numbers = {len(cell) for cell in cells(readings).values()}
    if not numbers:
        raise NoReport("no run is made yet")
    if len(numbers) > 1 or max(numbers) < 2 or len(values_of(readings, "pretrain_rate")) < 2:
        raise NoReport("not every run is made yet")
    lines = [
        [f"{before:g}", f"{rate:g}", count or "none",
         *(over_seeds(column(cell, name)) for name in ("forgetting", "ref_kl")),
         *(over_seeds(column(cell, name)).text(".0f") for name in ("steps", "seconds"))]
        for (before, rate, count), cell in cells(readings).items()
    ]  # fmt: skip
    made = [slow_forgets_less, steps_go_with_rate, each_doubling, replay_breaks_it]
    found = [one(readings) for one in made] + [high_pretraining(readings, protected) for protected in (False, True)]
    said = findings({claim: (verdict, numbers) for claim, verdict, numbers in found})
    return f"{table_of_bases(rows)}\n\n{table(HEAD, lines)}\n\n{said}"


def table_of_bases(rows: Sequence[Row]) -> str:
    bases = [row for row in rows if row["settings"].get("kind") == "base"]
    lines = []
    for before in sorted({row["settings"]["pretrain_rate"] for row in bases}):
        mine = [row for row in bases if row["settings"]["pretrain_rate"] == before]
        losses = over_seeds([row["held_out_loss"][-1] for row in mine])
        lines.append([f"{before:g}", losses, over_seeds([row["tokens_per_param"] for row in mine]).text(".1f")])
    return table(("pretraining rate", "held-out loss", "tokens per parameter"), lines)


def draw(rows: Sequence[Row], path: Path) -> None:
    """Forgetting over steps, plain by rate and replay by its rows; forgetting by pretraining rate."""
    readings = readings_of(rows)
    plain, kept = of(whole_bases(readings), rows=0), swept(readings)
    with panels(path, 2, (10.4, 4.2)) as (cost, before):
        curve(cost, plain, "rate", "plain, by learning rate", 0, lambda value: f"{value:g}", (5, 5))
        curve(cost, kept, "rows", f"KL replay at {kept[0].rate:g}, by rows beside 32", 1, str, (-17, -2))
        cost.set_xscale("log")
        marks = [20, 50, 100, 200, 500, 1000, 2000, 5000, 10_000]
        cost.xaxis.set_major_locator(FixedLocator(marks))
        cost.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
        cost.xaxis.set_minor_formatter(NullFormatter())
        cost.set_ylim(bottom=0)
        cost.set_xlim(30, 3000)
        cost.legend(loc="upper right")
        dress(cost, f"Up to a new-task loss of {TARGET:g}", "steps", "forgetting on prose, nats per token")
        befores = values_of(readings, "pretrain_rate")
        keys = on_every_base(readings)
        for at, (count, rate) in enumerate(keys):
            found = [over_seeds(column(of(readings, pretrain_rate=one, rate=rate, rows=count), "forgetting"))
                     for one in befores]  # fmt: skip
            name = f"{rate:g}, {f'{count} rows of replay' if count else 'plain'}"
            places = np.arange(len(befores)) + 0.06 * (at - (len(keys) - 1) / 2)
            errors = [[one.value - one.low for one in found], [one.high - one.value for one in found]]
            before.errorbar(places, [one.value for one in found], errors, color=PALETTE[at], marker=MARKS[at],
                            linewidth=1.4, capsize=2, label=name)  # fmt: skip
        before.set_xticks(range(len(befores)), [f"{one:g}" for one in befores])
        before.set_ylim(bottom=0)
        before.legend(title="finetuning at", fontsize=8)
        dress(before, "Bases of one loss", "pretraining rate", "forgetting on prose, nats per token")


def curve(
    axes: Any, readings: Sequence[Reading], by: str, name: str, at: int, words: Callable[[Any], str],
    place: tuple[int, int],
) -> None:  # fmt: skip
    """Means over seeds with single seeds as small marks; what the runs differ in stands beside each mean."""
    color, mark = PALETTE[at], MARKS[at]
    groups = {words(value): of(readings, **{by: value}) for value in values_of(readings, by)}
    x = [math.exp(np.log(column(cell, "steps")).mean()) for cell in groups.values()]
    y = [float(column(cell, "forgetting").mean()) for cell in groups.values()]
    axes.plot(x, y, color=color, marker=mark, linewidth=1.4, label=name)
    axes.plot(column(readings, "steps"), column(readings, "forgetting"), color=color, marker=mark, markersize=2.5,
              alpha=0.5, linestyle="none")  # fmt: skip
    for word, across, up in zip(groups, x, y, strict=True):
        axes.annotate(word, (across, up), place, textcoords="offset points", fontsize=8, color=color)

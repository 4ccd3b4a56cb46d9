"""What the study of learning rates says: tables, findings and figure, from its rows alone."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
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
    lost = [column(of(high, rows=rows), "forgetting") for rows in numbers]
    steps = [over_seeds(after - before).text("+.3f") for before, after in pairwise(lost)]
    ends = f"{over_seeds(lost[0])} to {over_seeds(lost[-1])}"
    words = f"{claim.estimate} nats a doubling, from {ends} with {min(numbers)} to {max(numbers)} rows beside 32"
    if len(steps) > 1:
        words += f", {steps[0]} for the first and {steps[-1]} for the last"
    return "At one high rate each doubling of replay lowers forgetting", claim.verdict, f"{words}; {len(slopes)} seeds"


def swept(readings: Sequence[Reading]) -> list[Reading]:
    """Runs with replay at the rate at which all numbers of rows were run."""
    kept = [one for one in whole_bases(readings) if one.rows]
    return of(kept, rate=max(values_of(kept, "rate"), key=lambda rate: len(of(kept, rate=rate))))


def cheapest(readings: Sequence[Reading], rate: float, cost: str) -> list[tuple[Reading, Reading]] | None:
    """For each seed: plain at a rate, and the run with replay of least cost that forgets no more; None if a seed has
    none."""
    found = []
    for plain in of(whole_bases(readings), rows=0, rate=rate):
        kept = [one for one in of(swept(readings), seed=plain.seed) if one.forgetting <= plain.forgetting]
        if not kept:
            return None
        found.append((plain, min(kept, key=lambda one: getattr(one, cost))))
    return found


def factors(readings: Sequence[Reading], rate: float, cost: str) -> list[float] | None:
    """The cost of the first of each pair over that of the second."""
    pairs = cheapest(readings, rate, cost)
    return None if pairs is None else [getattr(plain, cost) / getattr(kept, cost) for plain, kept in pairs]


def gentlest(readings: Sequence[Reading]) -> float:
    """The plain rate that forgets least on average."""
    plain = of(whole_bases(readings), rows=0)
    lost = {rate: float(column(of(plain, rate=rate), "forgetting").mean()) for rate in values_of(plain, "rate")}
    return min(lost, key=lambda rate: lost[rate])


def against_every_rate(readings: Sequence[Reading], cost: str) -> str:
    """The factor of a cost against plain at each rate, and how much replay the cheapest runs have."""
    rates, rows, every = values_of(of(whole_bases(readings), rows=0), "rate"), set(), []
    for rate in rates:
        pairs = cheapest(readings, rate, cost)
        rows |= {kept.rows for _, kept in pairs or []}
        found = factors(readings, rate, cost)
        said = "no such run in some seed" if found is None else ratio_over_seeds(found).text(".2f")
        every.append(f"{said} against {rate:g}")
    return f"with {' or '.join(map(str, sorted(rows)))} rows: {'; '.join(every)}"


def replay_breaks_it(readings: Sequence[Reading]) -> Finding:
    best = gentlest(readings)
    claim = "Replay at a high rate forgets as little as the gentlest plain rate, in fewer steps and less time"
    steps, seconds = (factors(readings, best, cost) for cost in ("steps", "seconds"))
    if steps is None or seconds is None:
        return claim, "not reproduced", f"a seed has no run with replay that forgets as little as plain at {best:g}"
    verdicts = [Claim(np.log(values)).verdict for values in (steps, seconds)]
    verdict = verdicts[0] if verdicts[0] == verdicts[1] else f"steps {verdicts[0]}, time {verdicts[1]}"
    words = f"steps of plain over the fewest of replay that forgets no more, {against_every_rate(readings, 'steps')}"
    return claim, verdict, f"{words}; processor time, {against_every_rate(readings, 'seconds')}; {len(steps)} seeds"


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
    which = "with" if protected else "without"
    name = f"At the same finetuning rates a high pretraining rate reduces forgetting, {which} replay"
    return name, claim.verdict, f"{words}; {len(claim.differences)} seeds"


# What no rule asked for


def at_equal_forgetting(readings: Sequence[Reading]) -> str:
    """Steps of the gentlest plain runs over those of replay, read between its numbers of rows where it forgets as
    much."""
    found = []
    for plain in of(whole_bases(readings), rows=0, rate=gentlest(readings)):
        kept = sorted(of(swept(readings), seed=plain.seed), key=lambda one: one.forgetting)
        if not kept[0].forgetting <= plain.forgetting <= kept[-1].forgetting:
            return "no factor at equal forgetting in some seed"
        there = np.interp(plain.forgetting, column(kept, "forgetting"), np.log(column(kept, "steps")))
        found.append(plain.steps / math.exp(there))
    return f"at equal forgetting, linear between numbers of rows, the factor is {ratio_over_seeds(found).text('.1f')}"


def at_equal_steps(readings: Sequence[Reading], protected: bool) -> str:
    """Forgetting of the highest and the lowest pretraining rate in the middle of the steps that both came to, linear in
    the logarithm of the steps between finetuning rates."""
    befores, which = values_of(readings, "pretrain_rate"), "with replay" if protected else "without replay"
    found, places = [], []
    for seed in values_of(readings, "seed"):
        kept = [one for one in readings if one.seed == seed and bool(one.rows) == protected
                and (one.rows, one.rate) in on_every_base(readings)]  # fmt: skip
        pair = [sorted(of(kept, pretrain_rate=pick(befores)), key=lambda one: one.steps) for pick in (max, min)]
        low, high = max(of[0].steps for of in pair), min(of[-1].steps for of in pair)
        if low > high:
            return f"{which} no number of steps is common to both"
        places.append(math.sqrt(low * high))
        found.append([np.interp(math.log(places[-1]), np.log(column(of, "steps")), column(of, "forgetting"))
                      for of in pair])  # fmt: skip
    high_rate, low_rate = np.array(found).T
    ends = f"{over_seeds(high_rate)} and {over_seeds(low_rate)} nats, {over_seeds(high_rate - low_rate).text('+.3f')}"
    return f"{which} they forget {ends}, at {np.mean(places):.0f} steps"


def looks(readings: Sequence[Reading]) -> str:
    high, low = (pick(values_of(readings, "pretrain_rate")) for pick in (max, min))
    keys = on_every_base(readings)
    ratios = [over_seeds(column(of(readings, pretrain_rate=high, rate=rate, rows=rows), "steps")
                         / column(of(readings, pretrain_rate=low, rate=rate, rows=rows), "steps")).value
              for rows, rate in keys]  # fmt: skip
    times = f"{min(ratios):.1f} to {max(ratios):.1f} times the steps of those of {low:g}"
    same = "; ".join(at_equal_steps(readings, protected) for protected in (False, True))
    return (
        f"Looked at after the runs, no part of the rule. At the same finetuning rate bases of {high:g} take {times}; "
        f"after as many steps {same}. "
        f"Replay against plain at {gentlest(readings):g}: {at_equal_forgetting(readings)}."
    )


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
    return f"{table_of_bases(rows)}\n\n{table(HEAD, lines)}\n\n{said}\n\n{looks(readings)}"


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
        curve(cost, kept, "rows", f"KL replay at {kept[0].rate:g}, by rows beside 32", 1, str, (7, -7))
        cost.set_ylim(bottom=0)
        cost.set_xlim(30, 3000)
        cost.legend(loc="upper right")
        dress(cost, f"Up to a new-task loss of {TARGET:g}", "steps", "forgetting on prose, nats per token")
        keys = on_every_base(readings)
        for at, rate in enumerate(values_of(readings, "pretrain_rate")):
            for protected, line in ((False, "-"), (True, "--")):
                runs = [of(readings, pretrain_rate=rate, rate=one, rows=rows) for rows, one in keys
                        if bool(rows) == protected]  # fmt: skip
                x, y = ([float(column(cell, name).mean()) for cell in runs] for name in ("steps", "forgetting"))
                label = f"{rate:g}{', with replay' if protected else ''}"
                before.plot(x, y, line, color=PALETTE[at], marker=MARKS[at], linewidth=1.4, label=label)
                every = [one for cell in runs for one in cell]
                before.plot(column(every, "steps"), column(every, "forgetting"), color=PALETTE[at], marker=MARKS[at],
                            markersize=2.5, alpha=0.5, linestyle="none")  # fmt: skip
        before.set_ylim(bottom=0)
        before.set_xlim(30, 1000)
        before.legend(title="pretrained at", fontsize=8)
        dress(before, "Bases of one loss, each point a finetuning rate", "steps", "forgetting on prose, nats per token")
        for axes in (cost, before):
            axes.set_xscale("log")
            axes.xaxis.set_major_locator(FixedLocator([50, 100, 200, 500, 1000, 2000]))
            axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
            axes.xaxis.set_minor_formatter(NullFormatter())


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

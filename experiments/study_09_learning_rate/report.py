"""What the study of learning rates says: table, verdicts and figure, from its rows alone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from experiments.claim import FIRST_LOOK, Claim, over_seeds, ratio_over_seeds
from experiments.pages import NoReport, dress, findings, panels, table
from retain.report.comparison import first_crossing
from retain.report.results import series
from retain.report.style import MARKS, PALETTE

OLD = "old"
LEAST = 1e-3  # nats: forgetting below it, or negative, is drawn here
Row = dict[str, Any]


@dataclass(frozen=True)
class Reading:
    """A run where it crosses the target loss on the new language."""

    pretrain_rate: float
    rate: float
    coef: float
    seed: int
    steps: float
    forgetting: float


def nearest(bases: Sequence[Row], loss: float) -> Row:
    """The base whose held-out loss comes nearest."""
    return min(bases, key=lambda base: abs(base["loss"] - loss))


def target_of(rows: Sequence[Row]) -> float:
    """The lowest new-language loss that every run came down to: no run is left out of the comparison."""
    return max(min(series(row["trajectory"], "eval_loss")[1]) for row in rows)


def readings_of(rows: Sequence[Row], *, control: bool = False) -> list[Reading]:
    """Every run at the target loss of all, linear between evaluations.

    Raises:
        NoReport: if a run has learned so little that another begins where it ends.
    """
    target, found = target_of(rows), []
    for row in rows:
        settings = row["settings"]
        if settings["control"] != control:
            continue
        steps, lost = series(row["trajectory"], f"retention/{OLD}/forgetting")
        at = first_crossing(steps, series(row["trajectory"], "eval_loss")[1], target)
        if at is None:
            raise NoReport(
                f"learning rates: some run came down to {target:.3f} nats at best, where another begins; give it more "
                "steps, or leave its rate out"
            )
        names = ("pretrain_rate", "learning_rate", "coef", "seed")
        found.append(Reading(*(settings[name] for name in names), at, float(np.interp(at, steps, lost))))
    return found


def of(readings: Sequence[Reading], **wanted: Any) -> list[Reading]:
    """Readings by their fields, by seed."""
    fits = [one for one in readings if all(getattr(one, name) == value for name, value in wanted.items())]
    return sorted(fits, key=lambda one: one.seed)


def values_of(readings: Sequence[Reading], name: str) -> list[Any]:
    """What a field takes, in order."""
    return sorted({getattr(one, name) for one in readings})


def after_looks(claim: Claim) -> str:
    """Mean and interval over seeds, with what seeds added after a look say."""
    return f"{claim.estimate} nats" + (f", {claim.later_seeds}" if claim.later_seeds else "")


HEAD = ("pretraining rate", "old loss of the base", "finetuning rate", "replay", "forgetting", "steps", "seeds")


def table_of_rates(rows: Sequence[Row]) -> str:
    """A line for each pretraining rate, finetuning rate and coefficient."""
    readings, lines = readings_of(rows), []
    for before in values_of(readings, "pretrain_rate"):
        base = over_seeds([row["base"]["loss"] for row in bases(rows, before)])
        for coef in values_of(readings, "coef"):
            for rate in values_of(of(readings, pretrain_rate=before, coef=coef), "rate"):
                cell = of(readings, pretrain_rate=before, coef=coef, rate=rate)
                replay = f"KL, coefficient {coef:g}" if coef else "none"
                lost = over_seeds([one.forgetting for one in cell])
                steps = ratio_over_seeds([one.steps for one in cell]).text(".0f")
                lines.append([f"{before:g}", base, f"{rate:g}", replay, lost, steps, len(cell)])
    return f"Target: {target_of(rows):.3f} nats per token on the new language.\n\n{table(HEAD, lines)}"


def bases(rows: Sequence[Row], before: float, *, control: bool = False) -> list[Row]:
    """One row for each base of a pretraining rate, by seed."""
    found = {
        row["settings"]["seed"]: row
        for row in rows
        if row["settings"]["pretrain_rate"] == before and row["settings"]["control"] == control
    }
    return [found[seed] for seed in sorted(found)]


def verdict(rows: Sequence[Row]) -> str:
    """The paper's three claims, one after the other."""
    readings = readings_of(rows) if rows else []
    if len(values_of(readings, "seed")) < 2 or max(values_of(readings, "coef"), default=0) == 0:
        return "**Verdict: none yet; the study is not finished.**"
    number = len(values_of(readings, "seed"))
    end = f"{number} seeds; 95% intervals by Student's t over seeds."
    claims = [slow_forgets_less(readings), high_pretraining(rows), replay_breaks_it(readings)]
    return findings({claim: (answer, numbers) for claim, answer, numbers in claims}) + f"\n\n{end}"


Finding = tuple[str, str, str]  # a finding of the table, its verdict, the numbers behind it


def falls(differences: Sequence[float]) -> Claim:
    """The paper's claims say of each of these differences that it lies below 0."""
    return Claim(differences, direction=-1, first_look=FIRST_LOOK)


def verdict_of(claim: Claim) -> str:
    return claim.verdict + (" at this size" if claim.verdict == "cannot tell" else "")


def slow_forgets_less(readings: Sequence[Reading]) -> Finding:
    """Lowest against highest finetuning rate without replay; the mean over pretraining rates, paired by seed."""
    plain = of(readings, coef=0.0)
    slow, fast = (pick(values_of(plain, "rate")) for pick in (min, max))
    less, steps = [], []
    for seed in values_of(plain, "seed"):
        low, high = of(plain, seed=seed, rate=slow), of(plain, seed=seed, rate=fast)
        less.append(mean(low, "forgetting") - mean(high, "forgetting"))
        steps.append(math.exp(mean(low, "log_steps") - mean(high, "log_steps")))
    forgets, needs = verdict_of(falls(less)), verdict_of(falls(-np.log(steps)))
    answer = forgets if forgets == needs else f"less forgetting {forgets}, more steps {needs}"
    best = min(values_of(plain, "rate"), key=lambda rate: mean(of(plain, rate=rate), "forgetting"))
    most = mean(of(plain, rate=fast), "forgetting")
    return (
        "Low finetuning rates forget less and need many more steps",
        answer,
        (
            f"{slow:g} against {fast:g}, without replay: forgetting {over_seeds(less)} nats of {most:.2f}, steps times "
            f"{ratio_over_seeds(steps).text('.1f')}; {best:g} forgets least"
        ),
    )


def mean(readings: Sequence[Reading], name: str) -> float:
    """Mean of a field, `log_steps` among them."""
    return float(np.mean([math.log(one.steps) if name == "log_steps" else getattr(one, name) for one in readings]))


def high_pretraining(rows: Sequence[Row]) -> Finding:
    """Highest against lowest pretraining rate, without replay: at the same tokens, and at the same loss of the base."""
    every = readings_of(rows)
    low, high = (pick(values_of(every, "pretrain_rate")) for pick in (min, max))
    same_tokens, with_replay = (
        [mean(of(part, pretrain_rate=high, seed=seed), "forgetting")
         - mean(of(part, pretrain_rate=low, seed=seed), "forgetting") for seed in values_of(part, "seed")]
        for part in ([one for one in every if not one.coef], [one for one in every if one.coef])
    )  # fmt: skip
    first = verdict_of(falls(same_tokens))
    losses = [over_seeds([row["base"]["loss"] for row in bases(rows, rate)]) for rate in (low, high)]
    at_same_tokens = (
        f"{high:g} against {low:g} in pretraining, without replay, mean over finetuning rates: at the same tokens "
        f"{after_looks(falls(same_tokens))} ({first}; the bases' own losses are {losses[1]} and {losses[0]})"
    )
    same_loss, between = matched_bases(rows, low, high)
    if len(same_loss) < 2:
        answer, after = first, "; no bases of the same loss were compared"
    else:
        second = verdict_of(falls(same_loss))
        answer = first if first == second else f"{first} at the same tokens, {second} at the same loss of the base"
        after = (
            f"; between bases of the same loss (apart by {over_seeds(between)}) {over_seeds(same_loss)} nats ({second})"
        )
    protected = falls(with_replay)
    replay = f"; with replay, at the same tokens {protected.estimate} nats ({verdict_of(protected)})"
    return "A high pretraining rate reduces forgetting", answer, f"{at_same_tokens}{after}{replay}"


def matched_bases(rows: Sequence[Row], low: float, high: float) -> tuple[list[float], list[float]]:
    """Forgetting and base loss, high minus low, where an earlier base of one has the loss of the other's last."""
    every, controls = readings_of(rows), readings_of(rows, control=True)
    less, between = [], []
    for seed in values_of(every, "seed"):
        found: list[tuple[float, float]] = []
        for before in (high, low):
            early = of(controls, pretrain_rate=before, seed=seed)
            rates = values_of(controls, "rate")
            last = [one for one in of(every, pretrain_rate=before, seed=seed, coef=0.0) if one.rate in rates]
            base = [row for row in bases(rows, before, control=bool(early)) if row["settings"]["seed"] == seed]
            if (chosen := early or last) and base:
                found.append((chosen[0].forgetting, base[0]["base"]["loss"]))
        if len(found) == 2:
            less.append(found[0][0] - found[1][0])
            between.append(found[0][1] - found[1][1])
    return less, between


def speed_ups(readings: Sequence[Reading], rate: float) -> dict[tuple[float, int], float | None]:
    """By pretraining rate and seed: steps of plain at a rate over the fewest with replay that forget no more."""
    found: dict[tuple[float, int], float | None] = {}
    for plain in of(readings, coef=0.0, rate=rate):
        mine = of(readings, pretrain_rate=plain.pretrain_rate, seed=plain.seed)
        kept = [one.steps for one in mine if one.coef and one.forgetting <= plain.forgetting]
        found[plain.pretrain_rate, plain.seed] = plain.steps / min(kept) if kept else None
    return found


def by_seed(found: dict[tuple[float, int], float | None]) -> list[float] | None:
    """Geometric mean over pretraining rates, a value a seed; None where some case has none."""
    if not all(found.values()):
        return None
    return [
        math.exp(np.mean([math.log(value) for key, value in found.items() if value and key[1] == seed]))
        for seed in sorted({seed for _, seed in found})
    ]


def replay_breaks_it(readings: Sequence[Reading]) -> Finding:
    """Replay against plain at every rate that was tried: the factor of steps is that of the comparator.

    The paper's factor of 38 is at equal forgetting; here replay forgets less than every plain run, so that the slowest
    plain run that was tried would decide it.
    """
    claim = "Replay breaks that trade-off"
    rates = values_of(of(readings, coef=0.0), "rate")
    found = {rate: speed_ups(readings, rate) for rate in rates}
    if not any(value for of_rate in found.values() for value in of_rate.values()):
        return claim, "not reproduced", "no run with replay forgot as little as one without"
    factors = {rate: by_seed(of_rate) for rate, of_rate in found.items()}
    faster = [rate for rate, values in factors.items() if values and falls(-np.log(values)).agrees > 0]
    answer = f"in part: fewer steps than plain at {len(faster)} of {len(rates)} rates"
    answer = "reproduced" if len(faster) == len(rates) else answer if faster else "cannot tell at this size"
    parts = []
    for rate, values in factors.items():
        none = sum(value is None for value in found[rate].values())
        lost = f"{none} of {len(found[rate])} cases without a protected run that forgot as little"
        parts.append(f"{ratio_over_seeds(values).text('.2f') if values else lost} against plain at {rate:g}")
    numbers = f"steps of plain over the fewest of replay that forgets no more: {'; '.join(parts)}"
    return claim, answer, f"{numbers}{at_one_rate(readings)}"


def at_one_rate(readings: Sequence[Reading]) -> str:
    """At each rate that both have: the share of plain's forgetting, and how many times its steps."""
    shares, steps = [], []
    for place in sorted({(one.pretrain_rate, one.rate) for one in readings if one.coef}):
        mine = of(readings, pretrain_rate=place[0], rate=place[1])
        plain, kept = ([one for one in mine if bool(one.coef) == with_] for with_ in (False, True))
        if plain:
            shares.append(mean(kept, "forgetting") / mean(plain, "forgetting"))
            steps.append(math.exp(mean(kept, "log_steps") - mean(plain, "log_steps")))
    if not shares:
        return ""
    return (
        f"; at one rate replay forgets {min(shares):.0%} to {max(shares):.0%} of what plain does, "
        f"in {min(steps):.1f} to {max(steps):.1f} times its steps"
    )


def draw(rows: Sequence[Row], path: Path) -> None:
    """Forgetting over steps needed: for each pretraining rate a curve without replay, dashed, and one with it."""
    readings = readings_of(rows)
    with panels(path, 1, (7.0, 4.4)) as (axes,):
        for coef in values_of(readings, "coef"):
            for at, before in enumerate(values_of(readings, "pretrain_rate")):
                name = f"pretrained at {before:g}, {'with' if coef else 'without'} replay"
                _curve(axes, of(readings, coef=coef, pretrain_rate=before), name, at, "-" if coef else (0, (4, 2)))
        axes.set_xscale("log")
        axes.set_yscale("log")
        low, high = axes.get_ylim()
        axes.set_ylim(low / 1.3, high * 1.15)
        dress(axes, f"Up to a new loss of {target_of(rows):.2f}; beside the marks: finetuning rates", "steps needed",
              "forgetting, nats per token")  # fmt: skip
        for one in (axes.xaxis, axes.yaxis):
            one.set_major_locator(LogLocator(subs=(1, 2, 5)))
            one.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            one.set_minor_formatter(NullFormatter())
        axes.figure.legend(loc="outside lower center", ncols=2, fontsize=8.5)


def _curve(axes: Any, readings: Sequence[Reading], name: str, at: int, line: Any) -> None:
    """Means over seeds, small marks are single seeds; the finetuning rates stand beside the first curve."""
    rates, color, mark = values_of(readings, "rate"), PALETTE[at], MARKS[at]
    cells = [of(readings, rate=rate) for rate in rates]
    x = [math.exp(mean(cell, "log_steps")) for cell in cells]
    y = [max(LEAST, mean(cell, "forgetting")) for cell in cells]
    axes.plot(x, y, color=color, marker=mark, linestyle=line, linewidth=1.4, label=name)
    axes.plot([one.steps for one in readings], [max(LEAST, one.forgetting) for one in readings],
              color=color, marker=mark, markersize=2.5, alpha=0.5, linestyle="none")  # fmt: skip
    for rate, across, up in zip(rates, x, y, strict=True):
        if at == 0:
            place = (5, 5) if readings[0].coef else (-4, -13)
            axes.annotate(f"{rate:g}", (across, up), place, textcoords="offset points", fontsize=8, color=color)

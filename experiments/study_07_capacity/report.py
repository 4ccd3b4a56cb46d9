"""What the runs say, by the rule that stands in run.py: tables, findings and the figure."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from experiments.claim import Claim, Interval, over_seeds, yes_or_no
from experiments.pages import NoReport, dress, findings, panels, table
from experiments.study_07_capacity.settings import MARGIN, Scale
from retain.report.style import INK, MARKS, PALETTE

Row = Mapping[str, Any]
Finding = tuple[str, str]  # verdict and numbers
SATURATED, SHORT, WIDENED, LARGER = "saturated", "20 tokens", "widened", "larger"
MAX_SLOPE = 0.05  # nats for a tenfold of tokens
PLAIN, GUARDED = 0.0, 10.0  # coefficients
LEAST_SHOWN = 1e-3  # nats per token, in the figure


def least_at(points: Sequence[tuple[float, float]], target: float) -> float | None:
    """The least that is forgotten at a new-task loss, linear between neighbouring points; None if none learned it.

    Args:
        points: new-task loss and forgetting, by rising coefficient.

    >>> round(least_at([(1.0, 0.4), (2.0, 0.2), (3.0, 0.1)], 2.5), 3)
    0.15
    >>> least_at([(1.0, 0.4), (2.0, 0.2)], 2.5)  # the largest coefficient learned more than was asked
    0.2
    """
    found = [points[-1][1]] if points[-1][0] <= target else []
    for (near, kept), (far, better) in pairwise(points):
        if near <= target <= far and near < far:
            found.append(kept + (target - near) / (far - near) * (better - kept))
    return min(found, default=None)


class Runs:
    """Rows of the study by what they are."""

    def __init__(self, rows: Sequence[Row], scale: Scale) -> None:
        self.scale, self.seeds = scale, range(scale.seeds)
        self.bases: dict[tuple[float, float, int], Row] = {}  # tokens per parameter, share, seed: of the small size
        self.tunes: dict[tuple[str, int, str, float], dict[int, Row]] = {}  # start, steps, rows, coefficient: by seed
        for row in rows:
            of = row["settings"]
            if of["kind"] == "tune":
                self.tunes.setdefault((of["start"], of["steps"], of["rows"], of["coef"]), {})[of["seed"]] = row
            elif of["size"] == scale.small:
                self.bases[of["tokens_per_param"], of["share"], of["seed"]] = row
        lengths = [(length, share) for length in scale.lengths for share in scale.shares_at(scale.small, length)]
        if any((*one, seed) not in self.bases for one in lengths for seed in self.seeds):
            raise NoReport("the bases are not all there yet")

    def losses(self, kind: str, length: float, share: float) -> list[float]:
        """Of a base or a mixture on the old or new language, seed by seed."""
        return [self.bases[length, share, seed][kind] for seed in self.seeds]

    def steps(self, start: str) -> list[int]:
        """Numbers of steps for which all runs of a start are there."""
        wanted = dict(self.scale.starts)[start].steps

        def whole(steps: int) -> bool:
            runs = (self.tunes.get((start, steps, arm.rows, arm.coef), {}) for arm in self.scale.arms)
            return all(seed in of for of in runs for seed in self.seeds)

        return [steps for steps in wanted if whole(steps)]

    def by_coef(self, start: str, steps: int) -> list[list[Row]]:
        """Runs on self-generated rows: those of all seeds for each coefficient, from the smallest on."""
        coefs = sorted(arm.coef for arm in self.scale.arms if arm.rows == "self")
        return [[self.tunes[start, steps, "self", coef][seed] for seed in self.seeds] for coef in coefs]

    @property
    def guarded(self) -> list[float]:
        """Coefficients of runs on self-generated rows that are protected, from 1 on."""
        return sorted(arm.coef for arm in self.scale.arms if arm.rows == "self" and arm.coef >= 1)

    def least(self, start: str, steps: int, target: float) -> list[float] | None:
        """What each seed forgets at a new-task loss with its best coefficient; None where a seed did not learn it."""
        by_seed = zip(*self.by_coef(start, steps), strict=True)
        found = [least_at([(row["new"], lost(row)) for row in of], target) for of in by_seed]
        return None if None in found else found  # type: ignore[return-value]

    def bounds(self, start: str, steps: int, target: float) -> int:
        """Of how many seeds that is the largest coefficient's, which learned more than was asked: an upper bound."""
        least, largest = self.least(start, steps, target), self.by_coef(start, steps)[-1]
        pairs = zip(least or [], largest, strict=False)
        return sum(value == lost(row) and row["new"] < target for value, row in pairs)

    def lost(self, start: str, steps: int, rows: str, coef: float) -> list[float]:
        """The rise of the old loss in one arm, seed by seed."""
        found = self.tunes[start, steps, rows, coef]
        return [lost(found[seed]) for seed in self.seeds]

    def fall(self, share: float) -> Interval:
        """By how much the loss of a base, or the mean of a mixture's two, falls for a tenfold of tokens at the end."""
        first, last = self.scale.lengths[-2:]
        kinds = ("old", "new") if share else ("old",)
        losses = {at: np.mean([self.losses(kind, at, share) for kind in kinds], axis=0) for at in (first, last)}
        return over_seeds(list((losses[first] - losses[last]) / math.log10(last / first)))

    @property
    def longest(self) -> str:
        """What the longest small base is called: saturated, or by its tokens where it is not."""
        return SATURATED if self.fall(0.0).value <= MAX_SLOPE else f"{self.scale.lengths[-1]:,} tokens"

    def known(self, start: str, steps: int) -> np.ndarray:
        """By how much a start's old loss lies below a uniform guess, seed by seed."""
        return np.array([self.scale.ignorance - row["base_old"] for row in self.by_coef(start, steps)[0]])

    def where_real_rows_end(self, steps: int) -> list[float] | None:
        """By how much more the longest base forgets on its own rows, at the new-task loss of the run on real ones."""
        found = []
        for seed, real in self.tunes[SATURATED, steps, "real", GUARDED].items():
            points = [(of[seed]["new"], lost(of[seed])) for of in self.by_coef(SATURATED, steps)]
            found.append((least_at(points, real["new"]), lost(real)))
        return None if any(own is None for own, _ in found) else [own - real for own, real in found]  # type: ignore[operator]

    def above_mixtures(self, start: str, steps: int, coefs: Sequence[float]) -> list[float] | None:
        """Old loss above the mixtures' at the same new-task loss: each seed's mean over coefficients.

        None where a seed has no finetune within the mixtures' range.
        """
        length, found = self.scale.lengths[-1], []
        for seed in self.seeds:
            mixtures = [self.bases[length, share, seed] for share in self.scale.shares]
            new, old = zip(*sorted((base["new"], base["old"]) for base in mixtures), strict=True)
            ends = [of[seed] for of in self.by_coef(start, steps) if of[seed]["settings"]["coef"] in coefs]
            inside = [row for row in ends if new[0] <= row["new"] <= new[-1]]
            found.append([row["old"] - float(np.interp(row["new"], new, old)) for row in inside])
        return [float(np.mean(distances)) for distances in found] if all(found) else None


def lost(row: Row) -> float:
    """The rise of a finetune's loss on the old language."""
    return row["old"] - row["base_old"]


def paired(first: Sequence[float], second: Sequence[float], direction: int) -> Claim:
    return Claim([a - b for a, b in zip(first, second, strict=True)], direction, MARGIN)


def floor(runs: Runs, target: float) -> Finding:
    """Whether what the saturated base forgets at its best coefficient has a floor."""
    by_steps = {number: runs.least(SATURATED, number, target) for number in runs.steps(SATURATED)}
    learned = {number: values for number, values in by_steps.items() if values is not None}
    steps, most = sorted(learned), max(by_steps)
    if most not in learned:
        return "cannot tell", f"a seed did not come down to {target:g} in {most:,} steps"
    left = over_seeds(learned[steps[-1]])
    slopes = [np.polyfit(np.log10(steps), of, 1)[0] for of in zip(*(learned[number] for number in steps), strict=True)]
    slope = over_seeds([float(one) for one in slopes])
    at = f"at a new-task loss of {target:g} after {steps[-1]:,} steps"
    words = f"{left} nats {at}, {slope.text('+.3f')} for a tenfold of steps"
    if len(steps) > 2:
        fall = np.subtract(learned[steps[-1]], learned[steps[-2]]) / math.log10(steps[-1] / steps[-2])
        words += f", {over_seeds(fall).text('+.3f')} from {steps[-2]:,} on"
    if left.high < MARGIN:
        return "no: next to nothing is left", words
    if left.low <= MARGIN:
        return "cannot tell", words
    return {0: "yes", 1: "yes, and more in more steps", -1: "cannot tell: it still falls"}[slope.sign], words


def forgets_less(runs: Runs, one: str, other: str, steps: int) -> Finding:
    """Whether one start forgets less than another at the deciding new-task loss."""
    target = runs.scale.targets[0]
    first, second = (runs.least(start, steps, target) for start in (one, other))
    if first is None or second is None:
        slow = one if first is None else other
        return "cannot tell", f"{slow}: a seed did not come down to {target:g} in {steps:,} steps"
    claim = paired(first, second, -1)
    numbers = f"{over_seeds(first)} against {over_seeds(second)} nats at {target:g} after {steps:,} steps"
    return claim.verdict, f"{numbers}, {claim.interval.text('+.3f')}"


def on_real_rows(runs: Runs, steps: int) -> Finding:
    """Whether KL on real rows leaves nothing worth naming at the shortest and the longest pretraining."""
    short, long = (over_seeds(runs.lost(start, steps, "real", GUARDED)) for start in (SHORT, SATURATED))
    words = f"{short} nats at 20 tokens per parameter, {long} with the longest pretraining"
    if max(short.high, long.high) < MARGIN:
        return "reproduced", words
    return "not reproduced" if max(short.low, long.low) > MARGIN else "cannot tell", words


def found(runs: Runs) -> dict[str, Finding]:
    """The findings for which the runs are there."""
    starts, answers = dict(runs.scale.starts), {}
    length = f"{runs.longest} per parameter"
    long, longest = f"one of {length}", f"a small model of {length}"
    if runs.longest == SATURATED:
        long, longest = "a saturated one", "a saturated small model"
    most, shorter = starts[SATURATED].steps[-1], starts[WIDENED].steps[-1]
    if most in runs.steps(SATURATED):
        label = f"{longest.capitalize()} forgets, whatever the coefficient and however long"
        answers[label] = floor(runs, runs.scale.targets[0])
        label = f"Mixtures of both languages bound what {longest} comes to"
        if distances := runs.above_mixtures(SATURATED, most, runs.guarded):
            above = Claim(distances, 1, MARGIN)
            answers[label] = above.verdict, f"{above.interval.text('+.3f')} nats above them after {most:,} steps"
        own, real = (runs.lost(SATURATED, most, rows, GUARDED) for rows in ("self", "real"))
        equal = paired(own, real, 1)
        words = f"{over_seeds(own)} and {over_seeds(real)} nats forgotten, {equal.interval.text('+.3f')}"
        answers[f"Self-generated rows cost {longest} more than real ones"] = equal.verdict, words
        if most in runs.steps(SHORT):
            label = f"A base of 20 tokens per parameter forgets less than {long}"
            answers[label] = forgets_less(runs, SHORT, SATURATED, most)
            plain = paired(*(runs.lost(start, most, "self", PLAIN) for start in (SATURATED, SHORT)), -1)
            label = f"Without a penalty {longest} loses less than one of 20 tokens per parameter"
            answers[label] = plain.verdict, f"{plain.interval.text('+.3f')} nats"
            answers["KL on real rows leaves less than 0.02 nats forgotten"] = on_real_rows(runs, most)
    for start, label in (
        (WIDENED, f"{longest.capitalize()} forgets less when it is widened first"),
        (LARGER, "A model of four times the parameters and the same loss forgets less"),
    ):
        if shorter in runs.steps(start) and shorter in runs.steps(SATURATED):
            verdict, words = forgets_less(runs, start, SATURATED, shorter)
            answers[label] = yes_or_no(verdict) if start == WIDENED else verdict, words
    seeds = f"; {len(runs.seeds)} seeds, 6,400 parameters"
    return {label: (verdict, words + seeds) for label, (verdict, words) in answers.items()}


def looks(runs: Runs) -> str:
    """What no rule asked for, and a reader should know."""
    most, target = dict(runs.scale.starts)[SATURATED].steps[-1], runs.scale.targets[0]
    if most not in runs.steps(SATURATED) or most not in runs.steps(SHORT):
        return ""
    said = ["Looked at after the runs, no part of the rule."]
    long, short = (runs.least(start, most, target) for start in (SATURATED, SHORT))
    if long and short:
        known = [runs.known(start, most) for start in (SHORT, SATURATED)]
        shares = [100 * np.array(lost) / of for lost, of in zip((short, long), known, strict=True)]
        apart = over_seeds(shares[0] - shares[1]).text("+.1f")
        ends = " against ".join(f"{over_seeds(one).text('.1f')}%" for one in shares)
        said.append(
            f"Of what was known, a uniform guess's loss less the base's, the base of 20 tokens per parameter forgets "
            f"{ends} at {target:g}, {apart} points."
        )
    if own := runs.where_real_rows_end(most):
        said.append(
            f"At the new-task loss to which coefficient {GUARDED:g} comes on real rows, {runs.longest} per parameter, "
            f"self-generated ones forget {over_seeds(own).text('+.3f')} nats more, linear between coefficients."
        )
    far = [over_seeds([row["old"] for row in runs.by_coef(start, most)[0]]).text(".2f") for start in (SATURATED, SHORT)]
    said.append(
        f"Plain runs end at an old loss of {far[0]} and {far[1]} nats, a uniform guess at {runs.scale.ignorance:.2f}."
    )
    above = [f"{over_seeds(of).text('+.3f')} at {coef:g}" for coef in runs.guarded
             if (of := runs.above_mixtures(SATURATED, most, [coef]))]  # fmt: skip
    said.append(f"By coefficient finetunes lie above the mixtures by {', '.join(above)}.")
    return " ".join(said)


def rows_of_start(runs: Runs, start: str) -> list[tuple[object, ...]]:
    """What a start forgets at each number of steps, for the table."""
    lines: list[tuple[object, ...]] = []
    for steps in runs.steps(start):
        (plain, *_) = runs.by_coef(start, steps)
        known = float(runs.known(start, steps).mean())
        least = [runs.least(start, steps, target) for target in runs.scale.targets]
        bounds = [runs.bounds(start, steps, target) for target in runs.scale.targets]
        cells = ["not learned" if one is None else f"{'≤ ' if bound else ''}{over_seeds(one)}"
                 for one, bound in zip(least, bounds, strict=True)]  # fmt: skip
        share = "–" if least[0] is None else f"{over_seeds(least[0]).value / known:.1%}"
        name = runs.longest if start == SATURATED else start
        lines.append((name, f"{steps:,}", *cells, share, over_seeds([lost(row) for row in plain])))
    return lines


def text_of(rows: Sequence[Row], scale: Scale) -> str:
    """Bases and mixtures, what every start forgets at each number of steps, and the findings."""
    runs = Runs(rows, scale)
    bases = [
        (f"{share:.0%}", f"{length:,}", *(over_seeds(runs.losses(kind, length, share)) for kind in ("old", "new")))
        for length in scale.lengths
        for share in scale.shares_at(scale.small, length)
    ]
    falls = {share: runs.fall(share) for share in scale.shares}
    slopes = [(f"{share:.0%}", fall, "yes" if fall.value <= MAX_SLOPE else "no") for share, fall in falls.items()]
    at = [f"forgotten at {target:g}" for target in scale.targets]
    lines = [line for start, _ in scale.starts for line in rows_of_start(runs, start)]
    parts = [
        table(("new rows", "tokens per parameter", "loss, old", "loss, new"), bases),
        table(("new rows", "falls for a tenfold of tokens", f"at most {MAX_SLOPE:g}"), slopes),
        table(("start", "steps", *at, "share of what was known", "plain, at its end"), lines),
    ]
    return "\n\n".join(part for part in [*parts, findings(found(runs)), looks(runs)] if part)


def draw(rows: Sequence[Row], scale: Scale, path: Path) -> None:
    """Old loss over new loss of the saturated base, with the mixtures; and what is forgotten over the steps."""
    runs = Runs(rows, scale)

    def middle(every: Sequence[Sequence[Row]]) -> list[list[float]]:
        return [[float(np.mean([row[kind] for row in of])) for of in every] for kind in ("new", "old")]

    with panels(path, 2, (10.4, 4.0)) as (trade, over_steps):
        for at, steps in enumerate(runs.steps(SATURATED)):
            protected = [of for of in runs.by_coef(SATURATED, steps) if of[0]["settings"]["coef"] >= 1]
            trade.plot(*middle(protected), color=PALETTE[at], marker=MARKS[at], label=f"{steps:,} steps")
        mixed = [[runs.bases[scale.lengths[-1], share, seed] for seed in runs.seeds] for share in scale.shares if share]
        trade.plot(*middle(mixed), color=INK, linestyle="--", label="mixtures")
        name = f"{scale.lengths[-1]:,} tokens per parameter, by coefficient"
        dress(trade, name, "loss, new language, nats per token", "loss, old language, nats per token")
        trade.legend()
        for at, (start, _) in enumerate(scale.starts):
            least = {steps: runs.least(start, steps, scale.targets[0]) for steps in runs.steps(start)}
            bars = {steps: over_seeds(values) for steps, values in least.items() if values is not None}
            if not bars:  # none of its runs learned so much
                continue
            errors = [[one.value - max(one.low, LEAST_SHOWN), one.high - one.value] for one in bars.values()]
            name, look = runs.longest if start == SATURATED else start, {"color": PALETTE[at], "marker": MARKS[at]}
            over_steps.errorbar(list(bars), [one.value for one in bars.values()], np.array(errors).T, capsize=2,
                                label=name, **look)  # fmt: skip
            ends = [steps for steps in bars if runs.bounds(start, steps, scale.targets[0])]
            over_steps.plot(ends, [bars[steps].value for steps in ends], linestyle="none", markersize=8,
                            markerfacecolor="none", **look)  # fmt: skip
        over_steps.set_xscale("log")
        over_steps.set_yscale("log")
        over_steps.set_ylim(bottom=LEAST_SHOWN)
        ticks = dict(scale.starts)[SATURATED].steps
        over_steps.set_xticks(ticks, [f"{steps:,}" for steps in ticks])
        over_steps.set_yticks([1, 0.1, 0.01, LEAST_SHOWN], ["1", "0.1", "0.01", f"{LEAST_SHOWN:g}"])
        over_steps.minorticks_off()
        over_steps.axhline(MARGIN, color=INK, linewidth=0.9, linestyle=(0, (4, 3)), zorder=1, label="what matters")
        dress(over_steps, f"Best coefficient, new-task loss {scale.targets[0]:g}", "steps", "forgotten, nats per token")
        if over_steps.get_legend_handles_labels()[1]:
            over_steps.legend(title="ringed: an upper bound", fontsize=8, ncols=2, loc="upper right")
            over_steps.set_ylim(top=8)

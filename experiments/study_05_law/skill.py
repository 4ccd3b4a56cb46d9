"""What the joint law is worth: against copying the nearest run, and with exponents that data sets share."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np

from experiments.claim import Claim, Interval
from experiments.pages import findings, table
from experiments.study_05_law.report import READINGS, Rows, Study, curve, fitted, points, r_squared, spread

HALFWAY = 100  # steps from which on the later ones are predicted
QUARTER = math.log(1.25)


def without_one_rank(plain: Rows, reading: str, *, both: bool = False) -> list[float]:
    """For each rank, the logarithm of the error of the next smaller rank's curve over that of the others' law.

    The next larger one's for the smallest; errors are root mean squares over seeds and steps.

    Args:
        both: take the mean curve of the next smaller and the next larger rank, where there are both.
    """
    ranks, found = sorted({rank_of(row) for row in plain}), []
    for at, rank in enumerate(ranks):
        beside = ranks[max(at - 1, 0) : at] + ranks[at + 1 : at + 2]
        own = [row for row in plain if rank_of(row) == rank]
        nearest = [row for row in plain if rank_of(row) in (beside if both else beside[:1])]
        steps = steps_of(own)
        law = fitted([row for row in plain if row not in own], reading, "joint", num_resamples=0)
        predicted = law.predict(num_params=own[0]["num_params"], num_steps=steps).value["forgetting_loss"]
        copied = np.mean([curve(row, reading, steps) for row in nearest], axis=0)
        found.append(gain([(np.array(curve(row, reading, steps)), predicted, copied) for row in own]))
    return found


def without_later_steps(plain: Rows, reading: str, *, line: bool = False) -> list[float]:
    """For each rank, the same for steps after `HALFWAY`: against the run's own value there.

    Args:
        line: in its place, a straight line in the logarithm of the steps through the run's own earlier values.
    """

    def copied(row: dict[str, Any], steps: Sequence[int]) -> np.ndarray:
        if not line:
            return np.array(curve(row, reading, [HALFWAY]))
        seen = [step for step in steps_of([row]) if step <= HALFWAY]
        return np.polyval(np.polyfit(np.log(seen), curve(row, reading, seen), 1), np.log(steps))

    early = [row | {"trajectory": [at for at in row["trajectory"] if at["step"] <= HALFWAY]} for row in plain]
    law, found = fitted(early, reading, "joint", num_resamples=0), []
    for rank in sorted({rank_of(row) for row in plain}):
        own = [row for row in plain if rank_of(row) == rank]
        steps = [step for step in steps_of(own) if step > HALFWAY]
        predicted = law.predict(num_params=own[0]["num_params"], num_steps=steps).value["forgetting_loss"]
        found.append(gain([(np.array(curve(row, reading, steps)), predicted, copied(row, steps)) for row in own]))
    return found


def gain(runs: Sequence[tuple[np.ndarray, np.ndarray, np.ndarray]]) -> float:
    """Logarithm of the error of a copy over that of the law, of runs with what each of them says."""
    law, copy = (math.sqrt(np.mean([(measured - said[at]) ** 2 for measured, *said in runs])) for at in (0, 1))
    return math.log(copy / law)


def rank_of(row: dict[str, Any]) -> int:
    return int(row["settings"]["lora_rank"])


def steps_of(rows: Rows) -> list[int]:
    return sorted({at["num_steps"] for at in points(rows, "soft")})


def shared(found: Mapping[str, Study], reading: str) -> dict[str, list[float]]:
    """Data set → for each run of the largest rank, the logarithm of its error with shared exponents over its error with
    the data set's own: laws of the smaller ranks."""
    smaller = {name: [row for row in study.plain if row not in study.largest] for name, study in found.items()}
    every = [row for rows in smaller.values() for row in rows]
    together = fitted(every, reading, "joint", num_resamples=0, shared_exponents=True)
    ratios = {}
    for name, study in found.items():
        own, steps = fitted(smaller[name], reading, "joint", num_resamples=0), steps_of(study.largest)
        at = {"num_params": study.largest[0]["num_params"], "num_steps": steps}
        both = own.predict(**at), together.predict(**at, dataset=name)
        alone, joined = (one.value["forgetting_loss"] for one in both)
        ratios[name] = [gain([(np.array(curve(row, reading, steps)), alone, joined)]) for row in study.largest]
    return ratios


def exponents(found: Mapping[str, Study], reading: str) -> str:
    """The shared law's exponents, and each data set's own."""
    rows = [row for study in found.values() for row in study.plain]
    laws = {"all, shared": fitted(rows, reading, "joint", num_resamples=0, shared_exponents=True)}
    laws |= {name: fitted(study.plain, reading, "joint", num_resamples=0) for name, study in found.items()}
    names = ("alpha_f", "beta_f", "alpha_ft", "beta_ft", "rho")
    lines = [[name, *(f"{law.params[one]:.3g}" for one in names)] for name, law in laws.items()]
    return table(("data", "α_f", "β_f", "α_ft", "β_ft", "ρ"), lines)


RANKS = "The law predicts a rank that it has not seen better than the nearest run's curve"
STEPS = f"The law predicts steps after {HALFWAY} better than the run's own value there"
SHARED = "Exponents may be shared over data sets"


def less(gains: Sequence[float]) -> Interval:
    """By how much the error is smaller, with its interval."""
    mean, low, high = (1 - math.exp(-one) for one in Claim(gains).interval)
    return Interval(mean, low, high)


def text_of_skill(found: Mapping[str, Study]) -> str:
    """Tables and findings; the soft reading decides."""
    tried = {RANKS: without_one_rank, STEPS: without_later_steps}
    gains = {claim: {name: of(study.plain, "soft") for name, study in found.items()} for claim, of in tried.items()}
    said = {}
    for claim, of in gains.items():
        agrees = [Claim(values).agrees for values in of.values()]
        answer = {len(of): "yes", -len(of): "no"}.get(sum(agrees), f"in {agrees.count(1)} of {len(of)} data sets")
        each = ", ".join(f"{name} {less(values).percent()}" for name, values in of.items())
        said[claim] = (answer, f"error smaller by {each}; by rank, {len(next(iter(of.values())))} ranks of 2 seeds")
    ratios = shared(found, "soft")
    every = Claim([ratio for of in ratios.values() for ratio in of]).interval
    worse = Interval(*(math.exp(one) for one in every)).text(".2f")
    answer = "yes" if every.high < QUARTER else "no" if every.low > QUARTER else "cannot tell"
    number = sum(map(len, ratios.values()))
    said[SHARED] = (answer, f"error on the largest rank times {worse}, {number} runs of {len(ratios)} data sets")
    return f"{exponents(found, 'soft')}\n\n{findings(said)}\n\n{looks(found)}"


def looks(found: Mapping[str, Study]) -> str:
    """The law against what is nearly as simple, which no rule asked for."""
    tried = {
        "the mean of the next smaller and larger rank's curves": partial(without_one_rank, both=True),
        f"a line in log steps through the run's own values up to {HALFWAY}": partial(without_later_steps, line=True),
    }
    said = []
    for copy, of in tried.items():
        each = ", ".join(f"{name} {less(of(study.plain, 'soft')).percent()}" for name, study in found.items())
        said.append(f"against {copy} the law's error is smaller by {each}")
    return f"Looked at after the runs, no part of the rule: {'; '.join(said)}."


# Methods that train fewer parts


def side(signs: Sequence[int]) -> str:
    """Where the cases that leave the line lie."""
    return {(False, True): "above", (True, False): "below", (False, False): "on it"}.get(
        (-1 in signs, 1 in signs), "both"
    )


BREAKS = "Across methods the line in the finetuning loss breaks, and the joint law holds"
LEAVE = "Attention alone, the top layer and IA3 leave LoRA's line"


def text_of_methods(found: Mapping[str, Study], gone: Mapping[tuple[str, str], Mapping[str, Interval]]) -> str:
    """R² of both laws over LoRA on all layers and on attention, the top layer and IA3; and who leaves the line."""
    lines, order = [], []
    for name, study in found.items():
        for reading in READINGS:
            line, joint = (
                r_squared(fitted(study.parts, reading, form, num_resamples=0)) for form in ("linear", "joint")
            )
            order.append((joint.low > line.high) - (joint.value < line.value))
            lines.append([name, reading, line, joint])
    every = len(order)
    answer = {every: "reproduced", -every: "not reproduced"}.get(sum(order), "cannot tell")
    ends = [spread([line[at].value for line in lines]) for at in (2, 3)]
    off = {
        kind: [of[kind].sign for of in gone.values() if kind in of]
        for of in gone.values() for kind in of if kind != "full" and "replay" not in kind
    }  # fmt: skip
    left = {kind: sum(map(abs, signs)) for kind, signs in off.items()}
    whole = sum(map(len, off.values()))
    gone_all = {whole: "yes", 0: "no"}.get(sum(left.values()), f"in {sum(left.values())} of {whole} cases")
    said = {
        BREAKS: (answer, f"R² of the line {ends[0]}, of the law {ends[1]}, apart in {order.count(1)} of {every} cases"),
        LEAVE: (
            gone_all,
            ", ".join(f"{kind} in {number} of {len(off[kind])} ({side(off[kind])})" for kind, number in left.items()),
        ),
    }
    head = ("data", "L_f read", "R² of L_f(L_ft), all methods", "R² of L_f(P, N), all methods")
    return f"{table(head, lines)}\n\n{findings(said)}"

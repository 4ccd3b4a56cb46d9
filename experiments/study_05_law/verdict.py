"""The study of laws in words: each verdict is computed from the rows, whichever way it falls."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from experiments.claim import Interval
from experiments.pages import findings, table
from experiments.study_05_law.report import (
    ACROSS,
    READINGS,
    WELL,
    Departures,
    HeldOut,
    Rows,
    across,
    departures,
    fitted,
    held_out,
    r_squared,
    spread,
    studies,
    table_of_departures,
    table_of_fits,
    table_of_held_out,
)
from experiments.study_05_law.skill import text_of_methods, text_of_skill
from retain.laws.law import ForgettingLaw

NONE = "none yet; the study is not finished"
LAWS = {"linear": "Forgetting is linear in the finetuning loss", "joint": "The joint law in parameters and steps"}
NOT_RUN = "A line with a level for each rank fits as well as the joint law."


def verdict_of_fits(laws: dict[tuple[str, str], dict[str, ForgettingLaw]]) -> str:
    """Whether both laws fit as well as the paper says, with an R² of .9 or more by its whole interval in every case."""
    if not laws:
        return f"Verdict: {NONE}."
    found = {form: [r_squared(of[form]) for of in laws.values()] for form in ("linear", "joint")}
    claims = {}
    for form, values in found.items():
        low = [one.low for one in values]
        under = f"below {WELL} in {sum(one < WELL for one in low)} of {len(low)} cases"
        under += f", the high end in {sum(one.high < WELL for one in values)}"
        said = f"R² {spread([one.value for one in values])}, the low end of its interval {spread(low)}, {under}"
        claims[LAWS[form]] = (fits_well(values), said)
    return f"{findings(claims)}\n\nJudged by R² of {WELL} or more, by its whole interval, in every case. {NOT_RUN}"


def fits_well(values: Sequence[Interval]) -> str:
    """What R² and its intervals, one of each case, say of the paper's finding."""
    if min(one.low for one in values) >= WELL:
        return "reproduced"
    return "not reproduced" if min(high for *_, high in values) < WELL else "cannot tell at this size"


def verdict_of_held_out(found: dict[tuple[str, str], HeldOut | None]) -> str:
    """Whether nine in ten points of the largest rank lie within what was said before, and what saying it was worth."""
    ones = [one for one in found.values() if one is not None]
    if not ones or len(ones) < len(found):
        return f"Verdict: {NONE}."
    if not all(one.before for one in ones):
        return "Verdict: none; a prediction is younger than its run."
    good = sum(one.inside >= WELL for one in ones)
    better = sum(one.error < one.naive for one in ones)
    gained = [1 - one.error / one.naive for one in ones]
    answer = "yes" if good == len(ones) else "no" if not good else "in part"
    return (
        f"Was the largest rank predicted before it was run? Verdict: {answer}. In {good} of {len(ones)} cases nine in "
        f"ten points of L_f or more lie within the 95% interval; in {better} of {len(ones)} the law was nearer than "
        f"the curve of the next smaller rank, by {min(gained):.0%} to {max(gained):.0%}."
    )


def verdict_of_break(gone: Departures, shares: list[float]) -> str:
    """Whether replay runs lie off the plain runs' line, in every case, with the whole interval."""
    found = [value for of in gone.values() for kind, value in of.items() if "replay" in kind]
    if not found:
        return f"Verdict: {NONE}."
    below, above = (sum(one.sign == way for one in found) for way in (-1, 1))
    answer = "yes" if below + above == len(found) else "no" if not below + above else "in part"
    far = max(found, key=lambda one: abs(one.value))
    return (
        f"Does the line break under KL replay? Verdict: {answer}. In {below} of {len(found)} cases replay runs lie "
        f"below the line of the plain runs, in {above} above, with the whole interval; farthest {far} nats. One "
        f"line through plain and replay runs has R² {min(shares):.3f} to {max(shares):.3f} (the paper's, across "
        f"methods: {ACROSS})."
    )


def verdict_of_plan(rows: Rows) -> str:
    """Whether runs of a recommended setting end within the intervals, and keep the budget."""
    runs = [row for row in rows if "planned" in row]
    if not runs:
        return f"Verdict: {NONE}."
    inside = {name: sum(is_inside(row, name) for row in runs) for name in ("finetuning_loss", "forgetting_loss")}
    kept = sum(row["measured"]["forgetting_loss"] <= row["planned"]["budget"] for row in runs)
    every = len(runs)
    budgets = {row["budget"] for row in rows if row.get("feasible")} | {row["planned"]["budget"] for row in runs}
    if every < len(budgets) * len({row["settings"]["seed"] for row in runs}):
        return f"Verdict: none yet. Of {len(budgets)} plans not every one has a run with each of the seeds."
    answer = "yes" if min(*inside.values(), kept) == every else "no" if not inside["forgetting_loss"] else "in part"
    before = all(row["planned"]["predicted"] <= row["began"] for row in runs)
    return (
        f"Do runs that `retain plan` recommended end where it said? Verdict: {answer}. Of {every} runs with seeds that "
        f"no pilot had, {inside['forgetting_loss']} ended within the interval of forgetting, "
        f"{inside['finetuning_loss']} within that of the new-task loss, {kept} within the budget. "
        f"{'Every plan is older than its runs.' if before else 'A plan is younger than its run!'}"
    )


def is_inside(row: dict[str, Any], name: str) -> bool:
    said = row["planned"][name]
    return said["low"] <= row["measured"][name] <= said["high"]


def table_of_plans(rows: Rows) -> str:
    """What was planned and what came of it, a line for each run."""
    head = (
        "budget",
        "recommended",
        "seed",
        "new-task loss, predicted",
        "measured",
        "forgetting, predicted",
        "measured",
    )
    lines: list[list[object]] = []
    for row in (row for row in rows if "planned" in row):
        plan = row["planned"]
        pair = [cell for name in ("finetuning_loss", "forgetting_loss")
                for cell in (Interval(**plan[name]), f"{row['measured'][name]:.3f}")]  # fmt: skip
        lines.append([f"{plan['budget']:g}", plan["words"], row["settings"]["seed"], *pair])
    return table(head, lines)


def report_text(rows: Rows) -> str:
    """All tables and verdicts, for the README."""
    found = {name: study for name, study in studies(rows).items() if len(study.plain) > 5}
    cases = [(name, reading) for name in found for reading in READINGS]
    laws = {
        (name, reading): {form: fitted(found[name].plain, reading, form) for form in ("linear", "joint")}
        for name, reading in cases
    }
    out = {(name, reading): held_out(found[name], reading) for name, reading in cases}
    gone = departures(found)
    shares = [across(found[name], reading) for name, reading in cases]
    parts = [
        ("The laws", table_of_fits(laws, found), verdict_of_fits(laws)),
        ("The largest rank, predicted before it was run", table_of_held_out(out), f"**{verdict_of_held_out(out)}**"),
        ("Where the line breaks", table_of_departures(found, gone), f"**{verdict_of_break(gone, shares)}**"),
        ("Methods that train fewer parts", text_of_methods(found, gone)),
        ("What the law is worth", text_of_skill(found)),
        ("A plan and its runs", table_of_plans(rows), f"**{verdict_of_plan(rows)}**"),
    ]
    return "\n\n".join(f"### {head}\n\n" + "\n\n".join(rows_of) for head, *rows_of in parts)

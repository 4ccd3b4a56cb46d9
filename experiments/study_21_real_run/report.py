"""What the study found: two tables, the claims of its rule, and answers over steps."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from experiments.claim import Claim, Interval, of_our_own, over_seeds
from experiments.pages import NoReport, dress, findings, panels, table
from experiments.program import Report
from experiments.study_21_real_run.facts import new_facts, old_facts
from experiments.study_21_real_run.modules import NEW, asked
from experiments.study_21_real_run.settings import (
    ACCURACY_MARGIN,
    ARM_LABELS,
    ARMS,
    CLAIMED,
    FEW_QUESTIONS,
    FIRST_LOOK,
    KEPT,
    KEPT_TABLE,
    LEARNED_ALIKE,
    LEARNED_TABLE,
    LOOKS,
    MARGIN,
    MAX_AGREEMENT,
    METHODS,
    MIN_LEARNED,
    NATS,
    NUM_QUESTIONS,
    SEEDS,
    STEPS,
)
from retain.measuring.choices import Question
from retain.report.style import MARKS, PALETTE


def right(given: str, asks: Sequence[Question]) -> float:
    """The share of questions that are answered rightly."""
    return same(given, "".join(str(question.answer) for question in asks))


def same(given: str, other: str) -> float:
    return sum(a == b for a, b in zip(given, other, strict=False)) / len(given)


def asked_of(row: Mapping[str, Any], given: Mapping[str, str], base: Mapping[str, Any]) -> dict[str, float]:
    """What is said of the base and of every run alike, but for the new facts: `given` are the answers at the end."""
    new = "".join(flag for module, flag in zip(asked(), row["modules"], strict=True) if module.family in NEW)
    return {
        "modules": same(row["modules"], "p" * len(row["modules"])),
        "of new kinds": same(new, "p" * len(new)),
        "accuracy": same(given["Social IQa"], base["right"]),
        "agreement": same(given["Social IQa"], base["answers"]["Social IQa"]),
        "capitals": right(given["old facts"], old_facts()),
    }


def new_facts_of(base: Mapping[str, Any]) -> float:
    """The share that the base answers rightly, over the seeds' people."""
    given = base["answers"]
    return sum(right(given[f"new facts, seed {seed}"], new_facts(seed)) for seed in SEEDS) / len(SEEDS)


def numbers_of(row: Mapping[str, Any], base: Mapping[str, Any]) -> dict[str, float]:
    """Everything that is said of a run, by its column."""
    first, last = row["trajectory"][0], row["trajectory"][-1]
    given = row["answers"][str(STEPS)]
    return asked_of(row, given, base) | {
        "Verilog loss": last["eval_loss"],
        "fall": first["eval_loss"] - last["eval_loss"],
        "new facts": right(given["new facts"], new_facts(row["settings"]["seed"])),
        "prose": last["retention/prose/ref_kl"],
        "own documents": last["retention/self-generated/ref_kl"],
    }


Columns = dict[tuple[str, str], dict[str, list[float]]]  # (method, arm) → column → values by seed


def findings_of(columns: Columns, base: Mapping[str, Any]) -> dict[str, tuple[str, str]]:
    """The claims of the rule, of a method that has every seed."""
    found: dict[str, tuple[str, str]] = {}
    known = same(base["answers"]["Social IQa"], base["right"])
    for method, label in METHODS.items():
        if any(len(columns.get((method, arm), {"fall": []})["fall"]) < len(SEEDS) for arm in CLAIMED):
            continue
        plain, replay = (columns[method, arm] for arm in CLAIMED)
        number = f"{len(plain['fall'])} seeds, two looks, 135M"
        learned = min(b / a for a, b in zip(plain["fall"], replay["fall"], strict=True))
        for column, (words, direction) in KEPT.items():
            claim = paired(plain[column], replay[column], direction)
            verdict = of_our_own(claim.verdict) if learned >= MIN_LEARNED else "cannot tell"
            found[f"{label}: {words}"] = (verdict, f"{said(claim, plain[column], replay[column], column)}; {number}")
        for column, words in LEARNED_ALIKE.items():
            claim = paired(plain[column], replay[column], 1, MARGIN)
            found[f"{label}: {words}"] = (
                of_our_own(claim.alike), f"{said(claim, plain[column], replay[column], column)}; {number}"
            )  # fmt: skip
        accuracy = Claim([one - known for one in plain["accuracy"]], 1, ACCURACY_MARGIN, FIRST_LOOK)
        agreement = over_seeds(plain["agreement"], 1 - 0.05 / accuracy.looks)
        hides = accuracy.equivalent and agreement.high < MAX_AGREEMENT
        shown = accuracy.interval.low > ACCURACY_MARGIN or accuracy.interval.high < -ACCURACY_MARGIN
        found[f"{label}, plain: equal accuracy hides forgetting"] = (
            "reproduced" if hides else "not reproduced" if shown or agreement.low > MAX_AGREEMENT else "cannot tell",
            f"accuracy {100 * accuracy.interval.value:+.1f} [{100 * accuracy.interval.low:+.1f}, "
            f"{100 * accuracy.interval.high:+.1f}] points from {known:.1%}, with {agreement.percent()} of the answers "
            f"of the base; {NUM_QUESTIONS:,} questions, {number}",
        )
    return found


def paired(plain: Sequence[float], replay: Sequence[float], direction: int, margin: float = 0.0) -> Claim:
    return Claim([b - a for a, b in zip(plain, replay, strict=True)], direction, margin, FIRST_LOOK)


def said(claim: Claim, plain: Sequence[float], replay: Sequence[float], column: str) -> str:
    """Both means and the paired difference, in nats or in percent."""
    if column in NATS:
        return f"{over_seeds(replay)} against {over_seeds(plain)} nats, {claim.interval.text('+.3f')}"
    change = Interval(*(100 * one for one in claim.interval)).text("+.1f")
    means = (sum(values) / len(values) for values in (replay, plain))
    return f"{' against '.join(f'{mean:.1%}' for mean in means)}, {change} points"


def report_of(rows: Sequence[Mapping[str, Any]]) -> Report:
    """The study's text and figure; of the arms that are compared, the seeds that have both."""
    base = next((row for row in rows if row["settings"]["arm"] == "base"), None)
    tuned = sorted((row for row in rows if row["settings"]["arm"] in ARMS), key=lambda row: row["settings"]["seed"])
    of: dict[tuple[str, str], dict[int, Any]] = {(method, arm): {} for method in METHODS for arm in ARMS}
    for row in tuned:
        of[row["settings"]["method"], row["settings"]["arm"]][row["settings"]["seed"]] = row
    for method in METHODS:
        both = of[method, CLAIMED[0]].keys() & of[method, CLAIMED[1]].keys()
        for arm in CLAIMED:
            of[method, arm] = {seed: row for seed, row in of[method, arm].items() if seed in both}
    of = {key: some for key, some in of.items() if some}
    if base is None or not of:
        raise NoReport("no run is made yet")
    columns: Columns = {}
    for key, some in of.items():
        numbers = [numbers_of(row, base) for row in some.values()]
        columns[key] = {column: [one[column] for one in numbers] for column in numbers[0]}
    text = "\n\n".join([*tables(columns, base), findings(findings_of(columns, base))])
    return text, lambda path: draw(of, base, path)


def tables(columns: Columns, base: Mapping[str, Any]) -> list[str]:
    """What was learned, and what was kept."""
    first = next(iter(columns.values()))
    starts = asked_of(base, base["answers"], base) | {
        "Verilog loss": first["Verilog loss"][0] + first["fall"][0],
        "new facts": new_facts_of(base),
        "prose": 0.0,
        "own documents": 0.0,
    }

    def cell(column: str, values: Sequence[float]) -> str:
        if column in NATS:
            return str(over_seeds(values)) if len(values) > 1 else f"{values[0]:.3f}"
        return ", ".join(f"{value:.1%}" for value in values)  # an interval of so few would leave 0 to 100%

    made = []
    for listed in (LEARNED_TABLE, KEPT_TABLE):
        lines = [["base", "", *(_start(column, starts[column]) for column in listed)]]
        lines += [
            [
                f"{METHODS[method]}, {ARM_LABELS[arm]}",
                str(len(found["fall"])),
                *(cell(one, found[one]) for one in listed),
            ]
            for (method, arm), found in columns.items()
        ]
        made.append(table(["run", "seeds", *listed.values()], lines))
    return made


def _start(column: str, value: float) -> str:
    return f"{value:.3f}" if column in NATS else f"{value:.1%}"


def draw(of: Mapping[tuple[str, str], Mapping[int, Any]], base: Mapping[str, Any], path: Path) -> None:
    """Answers over steps, plain and with replay: means of the seeds, from the lowest to the highest."""
    given, steps = base["answers"], (0, *LOOKS, STEPS)
    shown: dict[str, tuple[float, Callable[[Any, str], float]]] = {
        "New facts": (
            new_facts_of(base),
            lambda row, step: right(row["answers"][step]["new facts"], new_facts(row["settings"]["seed"])),
        ),
        "Capitals": (
            right(given["old facts"], old_facts()),
            lambda row, step: right(row["answers"][step]["old facts"], old_facts()),
        ),
        f"Agreement, {FEW_QUESTIONS} questions": (
            1.0,
            lambda row, step: same(row["answers"][step]["Social IQa"][:FEW_QUESTIONS], given["Social IQa"]),
        ),
    }
    with panels(path, len(shown), (11.0, 3.2)) as all_axes:
        for axes, (title, (start, value)) in zip(all_axes, shown.items(), strict=True):
            for method, arm in ((method, arm) for method in METHODS for arm in CLAIMED):
                some = of.get((method, arm), {}).values()
                if not some:
                    continue
                seeds = [[100 * value(row, str(step)) for row in some] for step in steps[1:]]
                middle = [100 * start, *(sum(values) / len(values) for values in seeds)]
                lowest, highest = [100 * start, *map(min, seeds)], [100 * start, *map(max, seeds)]
                errors = [[one - low for one, low in zip(middle, lowest, strict=True)],
                          [high - one for one, high in zip(middle, highest, strict=True)]]  # fmt: skip
                how = {"color": PALETTE[CLAIMED.index(arm)], "marker": MARKS[list(METHODS).index(method)]}
                style = "-" if method == "full" else "--"
                label = f"{METHODS[method]}, {ARM_LABELS[arm]}"
                axes.errorbar(steps, middle, errors, label=label, linestyle=style, capsize=2, **how)
            dress(axes, title, "steps", "%" if title == "New facts" else "")
            axes.set_ylim(0, 105)
        all_axes[0].legend(loc="upper left", fontsize=7)

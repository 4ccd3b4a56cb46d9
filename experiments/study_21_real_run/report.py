"""What the study found: two tables, the claims of its rule, and answers over steps."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from experiments.claim import Claim, Interval, over_seeds, yes_or_no
from experiments.pages import NoReport, dress, findings, panels, table
from experiments.program import Report
from experiments.study_21_real_run.facts import new_facts, old_facts, people
from experiments.study_21_real_run.modules import NEW, asked
from experiments.study_21_real_run.settings import (
    ACCURACY_MARGIN,
    ALIKE,
    ALIKE_MARGIN,
    ARM_LABELS,
    ARMS,
    CLAIMED,
    FEW_QUESTIONS,
    FIRST_LOOK,
    KEPT,
    KEPT_TABLE,
    LATER,
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
from retain.report.style import INK, MARKS, PALETTE

# What the other two tables leave open: what of their shares is no knowledge, and what of the modules is hard.
CLOSER_TABLE = {
    "taught values": "answers on new facts that were taught of somebody",
    "guess": "new facts by a guess among those",
    "clocked": "modules with a clock that pass",
    "other capitals": "capitals, no wrong answer a taught city",
}


def right(given: str, asks: Sequence[Question]) -> float:
    """The share of questions that are answered rightly."""
    return same(given, "".join(str(question.answer) for question in asks))


def same(given: str, other: str) -> float:
    return sum(a == b for a, b in zip(given, other, strict=False)) / len(given)


def asked_of(row: Mapping[str, Any], given: Mapping[str, str], base: Mapping[str, Any]) -> dict[str, float]:
    """What is said of the base and of every run alike, but for the new facts: `given` are the answers at the end."""
    flags = list(zip(asked(), row["modules"], strict=True))
    return {
        "modules": fmean(flag == "p" for _, flag in flags),
        "of new kinds": fmean(flag == "p" for module, flag in flags if module.family in NEW),
        "clocked": fmean(flag == "p" for module, flag in flags if module.family.clocked),
        "accuracy": same(given["Social IQa"], base["right"]),
        "agreement": same(given["Social IQa"], base["answers"]["Social IQa"]),
        "capitals": right(given["old facts"], old_facts()),
    }


def of_people(new: str, old: str, seed: int) -> dict[str, float]:
    """What is said of answers on new facts and on old ones, given the people of a seed.

    A model that knows which values occur, but not whose they are, is right in the share `guess` of the new facts.
    """
    asks, taught = new_facts(seed), {value for values in people(seed).values() for value in values}
    answers = [question.choices[int(choice)] for question, choice in zip(asks, new, strict=True)]
    apart = [(question, choice) for question, choice in zip(old_facts(), old, strict=True)
             if not taught & {*question.choices} - {question.choices[question.answer]}]  # fmt: skip
    return {
        "new facts": right(new, asks),
        "taught values": fmean(answer in taught for answer in answers),
        "guess": fmean(1 / len(taught & {*question.choices}) for question in asks),
        "other capitals": right("".join(choice for _, choice in apart), [question for question, _ in apart]),
    }


def base_of_people(base: Mapping[str, Any]) -> dict[str, float]:
    """The same of the base, over the seeds' people."""
    given = base["answers"]
    found = [of_people(given[f"new facts, seed {seed}"], given["old facts"], seed) for seed in SEEDS]
    return {name: fmean(one[name] for one in found) for name in found[0]}


def numbers_of(row: Mapping[str, Any], base: Mapping[str, Any]) -> dict[str, float]:
    """Everything that is said of a run, by its column."""
    first, last = row["trajectory"][0], row["trajectory"][-1]
    given = row["answers"][str(STEPS)]
    return {
        **asked_of(row, given, base),
        **of_people(given["new facts"], given["old facts"], row["settings"]["seed"]),
        "Verilog loss": last["eval_loss"],
        "fall": first["eval_loss"] - last["eval_loss"],
        "prose": last["retention/prose/ref_kl"],
        "own documents": last["retention/self-generated/ref_kl"],
    }


Columns = dict[tuple[str, str], dict[str, list[float]]]  # (method, arm) → column → values by seed


def findings_of(columns: Columns, base: Mapping[str, Any]) -> dict[str, tuple[str, str]]:
    """The claims of the rule, of a method that has every seed."""
    found: dict[str, tuple[str, str]] = {}
    known = same(base["answers"]["Social IQa"], base["right"])
    for method, label in METHODS.items():
        if not whole(columns, method):
            continue
        plain, replay = (columns[method, arm] for arm in CLAIMED)
        number = f"{len(plain['fall'])} seeds, two looks, 135M"
        learned = least_learned(columns, method, CLAIMED[1])
        for column, (words, direction) in KEPT.items():
            claim = paired(plain[column], replay[column], direction)
            verdict = yes_or_no(claim.verdict) if learned >= MIN_LEARNED else "cannot tell"
            found[f"{label}: {words}"] = (verdict, f"{said(claim, plain[column], replay[column], column)}; {number}")
        for column, words in LEARNED_ALIKE.items():
            claim = paired(plain[column], replay[column], 1, MARGIN)
            guess = f"; a guess among the taught values {fmean(plain['guess']):.1%}" if column == "new facts" else ""
            found[f"{label}: {words}"] = (
                yes_or_no(claim.alike), f"{said(claim, plain[column], replay[column], column)}{guess}; {number}"
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


def later_findings(columns: Columns) -> dict[str, tuple[str, str]]:
    """The claims of the rule for later arms, of those that have every seed."""
    found: dict[str, tuple[str, str]] = {}
    number = f"{len(SEEDS)} seeds, one look, 135M"
    for method, label in METHODS.items():
        for alike, claims in ((False, LATER), (True, ALIKE)):
            for arm, other, column in claims:
                if not whole(columns, method, ("plain", arm, other)):
                    continue
                first, second = columns[method, arm], columns[method, other]
                words = "as many answers are the base's" if alike else KEPT[column][0].removeprefix("with replay ")
                differences = [a - b for a, b in zip(first[column], second[column], strict=True)]
                claim = Claim(differences, KEPT[column][1], ALIKE_MARGIN if alike else 0.0)
                verdict = yes_or_no(claim.alike if alike else claim.verdict)
                kept = (arm, other) if alike else (arm,)
                if any(least_learned(columns, method, one) < MIN_LEARNED for one in kept):
                    verdict = "cannot tell"
                than = f"{'as' if alike else 'than'} {'with ' * (other != 'plain')}{ARM_LABELS[other]}"
                found[f"{label}: with {ARM_LABELS[arm]} {words} {than}"] = (
                    verdict, f"{said(claim, second[column], first[column], column)}; {number}"
                )  # fmt: skip
    return found


def least_learned(columns: Columns, method: str, arm: str) -> float:
    """The smallest share, over seeds, of plain's fall of the Verilog loss."""
    plain, own = (columns[method, one]["fall"] for one in ("plain", arm))
    return min(b / a for a, b in zip(plain, own, strict=True))


def whole(columns: Columns, method: str, arms: Sequence[str] = CLAIMED) -> bool:
    """Whether every seed of what is claimed is there."""
    return all(len(columns.get((method, arm), {"fall": []})["fall"]) == len(SEEDS) for arm in arms)


def learned_less(columns: Columns) -> str:
    """What replay costs of the loss that it learns, of which nothing is claimed."""
    lines = []
    for method, label in METHODS.items():
        if whole(columns, method):
            plain, replay = (columns[method, arm] for arm in CLAIMED)
            change = paired(plain["Verilog loss"], replay["Verilog loss"], 1).interval
            shares = sorted(b / a for a, b in zip(plain["fall"], replay["fall"], strict=True))
            lines.append(
                f"{label}: with replay the Verilog loss ends {change.text('+.3f')} nats from plain's (two looks); "
                f"its fall is {shares[0]:.1%} to {shares[-1]:.1%} of plain's, by seed."
            )
    return "\n".join(lines)


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
    parts = [
        *tables(columns, base),
        learned_less(columns),
        findings(findings_of(columns, base) | later_findings(columns)),
    ]
    text = "\n\n".join(filter(None, parts))
    return text, lambda path: draw(of, base, path)


def tables(columns: Columns, base: Mapping[str, Any]) -> list[str]:
    """What was learned, what was kept, and a closer look at both."""
    first = next(iter(columns.values()))
    starts = {
        **asked_of(base, base["answers"], base),
        **base_of_people(base),
        "Verilog loss": first["Verilog loss"][0] + first["fall"][0],
        "prose": 0.0,
        "own documents": 0.0,
    }

    def cell(column: str, values: Sequence[float]) -> str:
        if column in NATS:
            return str(over_seeds(values)) if len(values) > 1 else f"{values[0]:.3f}"
        return ", ".join(f"{value:.1%}" for value in values)  # an interval of so few would leave 0 to 100%

    made = []
    for listed in (LEARNED_TABLE, KEPT_TABLE, CLOSER_TABLE):
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
    given, of_base, steps = base["answers"], base_of_people(base), (0, *LOOKS, STEPS)
    # Title: the base's share, a run's share at a step, and the shares that need no knowledge.
    shown: dict[str, tuple[float, Callable[[Any, str], float], dict[str, float]]] = {
        "New facts, % right of 40": (
            of_base["new facts"],
            lambda row, step: right(row["answers"][step]["new facts"], new_facts(row["settings"]["seed"])),
            {"chance": 0.25, "guess among taught values": of_base["guess"]},
        ),
        "Capitals, % right of 64": (
            right(given["old facts"], old_facts()),
            lambda row, step: right(row["answers"][step]["old facts"], old_facts()),
            {"chance": 0.25},
        ),
        f"Base's answer to Social IQa, % of {FEW_QUESTIONS}": (
            1.0,
            lambda row, step: same(row["answers"][step]["Social IQa"][:FEW_QUESTIONS], given["Social IQa"]),
            {},
        ),
    }
    drawn = [key for key in ((method, arm) for method in METHODS for arm in CLAIMED) if of.get(key)]
    with panels(path, len(shown), (11.0, 3.8)) as all_axes:
        for axes, (title, (start, value, levels)) in zip(all_axes, shown.items(), strict=True):
            for (words, level), style in zip(levels.items(), (":", "-."), strict=False):
                axes.axhline(100 * level, color=INK, linewidth=1.2, linestyle=style, zorder=1, label=words)
            for at, (method, arm) in enumerate(drawn):
                some = of[method, arm].values()
                seeds = [[100 * value(row, str(step)) for row in some] for step in steps[1:]]
                middle = [100 * start, *map(fmean, seeds)]
                errors = [
                    [0.0, *(one - min(values) for one, values in zip(middle[1:], seeds, strict=True))],
                    [0.0, *(max(values) - one for one, values in zip(middle[1:], seeds, strict=True))],
                ]
                how = {"color": PALETTE[CLAIMED.index(arm)], "marker": MARKS[list(METHODS).index(method)]}
                style = "-" if method == "full" else "--"
                number = f"{len(some)} seed{'s' * (len(some) > 1)}"
                places = [step and step + 3 * (at - (len(drawn) - 1) / 2) for step in steps]  # no bar hides another
                label = f"{METHODS[method]}, {ARM_LABELS[arm]} ({number})"
                axes.errorbar(places, middle, errors, label=label, linestyle=style, capsize=2, **how)
            dress(axes, title, "steps", "")
            axes.set_ylim(0, 105)
        handles, labels = all_axes[0].get_legend_handles_labels()
        all_axes[0].figure.legend(handles, labels, loc="outside lower center", ncols=3, fontsize=8)

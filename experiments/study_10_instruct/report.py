"""What the instruct studies say: values with paired intervals, table, verdict and figure, from their rows alone."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from experiments.claim import Interval, over_seeds
from experiments.pages import dots, dress, findings, panels, table
from retain.statistics import bootstrap_ratio

Row = dict[str, Any]
ANSWERS = "answers"
# Name → (text or answers, metric); of each, less is better.
MEASURES = {
    "ref_kl on own documents": ("own documents", "ref_kl"),
    "ref_kl on web text": ("web text", "ref_kl"),
    "ref_kl on own chats": ("own chats", "ref_kl"),
    "ref_kl on real chats": ("real chats", "ref_kl"),
    "forgetting on own documents": ("own documents", "forgetting"),
    "forgetting on web text": ("web text", "forgetting"),
    "forgetting on real chats": ("real chats", "forgetting"),
    "answers changed": (ANSWERS, "changed"),
    "accuracy lost": (ANSWERS, "lost"),
}
JUDGED = (
    "ref_kl on own documents", "ref_kl on web text", "forgetting on own documents", "forgetting on web text",
    "answers changed", "accuracy lost",
)  # fmt: skip
PLAIN, KL_SELF, NTP_REAL = "plain", "KL, self-generated", "NTP, real"
WORDS = {-1: "less", 0: "(open)", 1: "more"}
DRAWS = 3  # of the protocol, each after a look at the one before: a claim has a third of the 5%


def of_arm(rows: Sequence[Row], arm: str) -> list[Row]:
    """The runs of an arm that learned enough, by seed."""
    found = [row for row in rows if row["settings"]["arm"] == arm and row["reached"]]
    return sorted(found, key=lambda row: row["settings"]["seed"])


def pieces(row: Row, measure: tuple[str, str]) -> tuple[np.ndarray, np.ndarray]:
    """Sums and sizes of the documents, or of the questions, of a run."""
    what, metric = measure
    if what != ANSWERS:
        found = row["texts"][what]
        return np.array(found[metric]), np.array(found["num_tokens"], float)
    right, base, tuned = (np.array(list("".join(s[who] for s in row["choices"].values()))) for who in
                          ("right", "base", "tuned"))  # fmt: skip
    counted = {"changed": tuned != base, "lost": (base == right).astype(float) - (tuned == right)}[metric]
    return counted.astype(float), np.ones(len(right))


def estimate(found: Sequence[tuple[np.ndarray, np.ndarray]], level: float = 0.95) -> Interval:
    """A ratio of sums over all seeds; the wider of the bootstrap over documents and Student's t over seeds."""
    sums, sizes = (np.concatenate(part) for part in zip(*found, strict=True))
    of_seeds = over_seeds([float(one.sum() / size.sum()) for one, size in found], level)
    return Interval(*bootstrap_ratio(sums, sizes, level=level)).widened(of_seeds)


def value_of(runs: Sequence[Row], measure: tuple[str, str]) -> Interval:
    """A measure of an arm; the interval of one that is never negative ends at 0."""
    found = estimate([pieces(row, measure) for row in runs])
    return found if measure[1] in ("forgetting", "lost") else found._replace(low=max(found.low, 0.0))


def difference(runs: Sequence[Row], others: Sequence[Row], measure: tuple[str, str], level: float = 0.95) -> Interval:
    """A measure of an arm minus that of another, paired by seed and by document or question."""
    pairs = [(pieces(row, measure), pieces(other, measure)) for row, other in zip(runs, others, strict=True)]
    return estimate([(one - other, sizes) for (one, sizes), (other, _) in pairs], level)


def judged(runs: Sequence[Row], others: Sequence[Row], name: str) -> tuple[int, str]:
    """The sign of a difference whose interval, corrected for the draws, leaves out 0, or 0; and both in words."""
    corrected = difference(runs, others, MEASURES[name], 1 - 0.05 / DRAWS)
    found = shown(difference(runs, others, MEASURES[name]), MEASURES[name], signed=True)
    _, ends = shown(corrected, MEASURES[name], signed=True).split(" ", 1)
    return corrected.sign, f"{found}, corrected for three draws {ends}"


def shown(found: Interval, measure: tuple[str, str], *, signed: bool = False) -> str:
    """With its interval: points of a hundred for answers, nats per token for texts."""
    scale, form = (100, ".1f") if measure[0] == ANSWERS else (1, ".3f")
    return Interval(*(scale * number for number in found)).text(("+" if signed else "") + form)


def final_loss(runs: Sequence[Row]) -> float:
    """New-task loss at which the runs ended, nats per token; means of seeds."""
    return float(np.mean([row["trajectory"][-1][1] for row in runs]))


def steps_of(runs: Sequence[Row]) -> str:
    return ", ".join(str(row["trajectory"][-1][0]) for row in runs)


def compared(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """The arms that learned enough in as many seeds as plain, plain first."""
    arms = list(dict.fromkeys(row["settings"]["arm"] for row in rows))
    found = {arm: of_arm(rows, arm) for arm in sorted(arms, key=lambda arm: arm != PLAIN)}
    if not found.get(PLAIN):
        return {}
    seeds = [row["settings"]["seed"] for row in found[PLAIN]]
    return {arm: runs for arm, runs in found.items() if [row["settings"]["seed"] for row in runs] == seeds}


def table_of_arms(rows: Sequence[Row], names: Sequence[str] = JUDGED) -> str:
    """A line an arm: where it ended, and each measure with its interval; also of arms that did not get there."""
    measures, lines = {name: MEASURES[name] for name in names}, []
    head = [f"{name}, {'points' if measure[0] == ANSWERS else 'nats'}" for name, measure in measures.items()]
    for arm in dict.fromkeys(row["settings"]["arm"] for row in rows):
        runs, every = of_arm(rows, arm), [row for row in rows if row["settings"]["arm"] == arm]
        ended = runs or every
        cells = [arm, f"{every[0]['settings']['learning_rate']:g}", steps_of(ended), f"{final_loss(ended):.3f}"]
        if runs:
            cells += [shown(value_of(runs, measure), measure) for measure in measures.values()]
        else:
            cells = [*cells[:-1], f"{cells[-1]}: too little learned", *["–"] * len(head)]
        lines.append(cells)
    return table(("arm", "learning rate", "steps", "Verilog loss at the end", *head), lines)


def versus(runs: list[Row], others: list[Row], names: Sequence[str] = JUDGED) -> dict[str, Interval]:
    """Every measure's paired difference."""
    return {name: difference(runs, others, MEASURES[name]) for name in names}


def differences(arms: dict[str, list[Row]], pairs: Sequence[tuple[str, str]], names: Sequence[str] = JUDGED) -> str:
    """A line a pair of arms: each measure of the one minus that of the other, and which way it is told apart."""
    lines = []
    for one, other in (pair for pair in pairs if {*pair} <= set(arms)):
        found = versus(arms[one], arms[other], names).items()
        signs = [f"{shown(value, MEASURES[name], signed=True)} {WORDS[value.sign]}" for name, value in found]
        lines.append([f"{one} − {other}", *signs])
    return table(["one minus the other", *names], lines)


def answer(found: dict[str, Interval]) -> str:
    """Whether an arm forgot more than plain: by the measures whose interval leaves out 0."""
    more = [name for name, one in found.items() if one.sign > 0]
    less = [name for name, one in found.items() if one.sign < 0]
    if more and less:
        return f"mixed: worse by {', '.join(more)}, better by {', '.join(less)}"
    if more:
        return f"yes, by {', '.join(more)}"
    return f"no: better than nothing by {', '.join(less)}" if less else "cannot tell"


def keeps_most(arms: dict[str, list[Row]], name: str) -> str:
    """The arm with the least of a measure, and those that cannot be told apart from it."""
    measure = MEASURES[name]
    best = min(arms, key=lambda arm: value_of(arms[arm], measure)[0])
    alike = [arm for arm in arms if arm != best and difference(arms[arm], arms[best], measure).sign == 0]
    others = f" (not told apart from it: {'; '.join(alike)})" if alike else " (told apart from all others)"
    return f"{name}: {best}{others}"


def verdict(rows: Sequence[Row]) -> str:
    """Which keeps most at equal new-task loss, and whether NTP on real text is worse than nothing."""
    arms = compared(rows)
    if len(arms) < 2:
        return "Verdict: none yet; the study is not finished."
    parts = [
        f"Verdict. At the same Verilog loss least is lost by: {'; '.join(keeps_most(arms, name) for name in JUDGED)}"
    ]
    if NTP_REAL in arms:
        parts.append(f"Is NTP on real text worse than no replay? {answer(versus(arms[NTP_REAL], arms[PLAIN]))}")
    parts.append(footnote(arms))
    return ". ".join(parts)


def claims(arms: dict[str, list[Row]]) -> str:
    """The paper's findings one by one: divergence on the model's own documents, then its own measure, accuracy."""
    own, accuracy = "ref_kl on own documents", "accuracy lost"
    said: dict[str, tuple[str, str]] = {}
    for finding, arm, right in (
        ("Instruction-tuned model: NTP on real text is worse than no replay", NTP_REAL, 1),
        ("Instruction-tuned model: KL on its own rows keeps more than no replay", KL_SELF, -1),
    ):
        if arm in arms:
            sign, words = judged(arms[arm], arms[PLAIN], own)
            verdict = {1: "reproduced in divergence", 0: "cannot tell", -1: "not reproduced"}[right * sign]
            seeds = f"{len(arms[arm])} seeds" if len(arms[arm]) > 1 else "one seed"
            said[finding] = (verdict, f"{own} {words}, against none, {seeds}")
    if {NTP_REAL, KL_SELF} <= set(arms):
        signs = [difference(arms[arm], arms[PLAIN], MEASURES[accuracy]).sign for arm in (NTP_REAL, KL_SELF)]
        word = "cannot tell" if 0 in signs else "reproduced" if signs == [1, -1] else "not reproduced"
        questions = len(pieces(arms[PLAIN][0], MEASURES[accuracy])[0])
        points = f"{questions} questions; the paper's 4.7 points would take 280 to 530"
        said["Instruction-tuned model: both, in accuracy"] = (word, points)
    return findings(said)


def report(rows: Sequence[Row], planned: Sequence[str]) -> str:
    """Everything between the marks of the README."""
    arms = compared(rows)
    missing = [arm for arm in planned if arm not in {row["settings"]["arm"] for row in rows}]
    unfinished = [f"Not run yet: {'; '.join(missing)}."] if missing else []
    pairs = [(arm, PLAIN) for arm in arms if arm != PLAIN]
    pairs += [(arm, KL_SELF) for arm in arms if arm not in (PLAIN, KL_SELF)]
    parts = [table_of_arms(rows), differences(arms, pairs), *unfinished, f"**{verdict(rows)}**", claims(arms)]
    return "\n\n".join(filter(None, parts))


def footnote(arms: dict[str, list[Row]]) -> str:
    """What the intervals cover."""
    runs = arms[PLAIN]
    texts, questions = (
        len(runs[0]["texts"]["web text"]["num_tokens"]),
        len(pieces(runs[0], MEASURES["answers changed"])[0]),
    )
    seeds = f"{len(runs)} seeds" if len(runs) > 1 else "one seed, so they do not cover another training run"
    paired = "paired, not corrected for their number"
    return f"95% intervals over {texts} documents of a text and {questions} questions, {paired}; {seeds}."


def draw(rows: Sequence[Row], path: Path) -> None:
    """A panel a measure, a line an arm, its value and interval."""
    arms = compared(rows)
    chosen = ("ref_kl on own documents", "ref_kl on web text", "answers changed")
    with panels(path, len(chosen), (11.5, 0.34 * len(arms) + 1.3)) as axes:
        for axis, name in zip(axes, chosen, strict=True):
            measure = MEASURES[name]
            factor, unit = (100, "% of questions") if measure[0] == ANSWERS else (1, "nats per token")
            dots(axis, {arm: Interval(*(factor * x for x in value_of(runs, measure))) for arm, runs in arms.items()})
            dress(axis, name, unit, "")
            if axis is not axes[0]:
                axis.set_yticklabels([])

"""What the study of expansion says: table, verdict and figure, from its rows alone."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from experiments.claim import FIRST_LOOK, Claim, over_seeds
from experiments.pages import answer_of, dress, findings, panels, table
from experiments.study_07_capacity.cells import Cell, Row, cell_of, tunes
from retain.report.style import PALETTE

ARMS = {
    "unexpanded": "Unexpanded",
    "widened": "Widened",
    "deepened": "Deepened",
    "control": "Larger from the start",
}
KINDS = {"plain": "plain", "replay": "with KL replay"}
SAME = 1e-3  # nats: log-probabilities that differ less are the same function to float32 rounding


def runs_of(rows: Sequence[Row], scale: Any, arm: str) -> list[Row]:
    """The finetunes of an arm."""
    size, length, grown = scale.arms[arm]
    mine = tunes(rows, size=size, grown=grown)
    return [row for row in mine if abs(row["settings"]["tokens_per_param"] / length - 1) < 0.01]


def cells(rows: Sequence[Row], scale: Any, kind: str) -> dict[str, Cell]:
    """By arm: forgetting at the target, without replay or with the best coefficient."""
    found = {arm: cell_of(runs_of(rows, scale, arm), scale.world.target, [0.0] if kind == "plain" else None)
             for arm in ARMS}  # fmt: skip
    return {arm: cell for arm, cell in found.items() if cell is not None}


def less(cell: Cell, than: Cell) -> list[float]:
    """How much less is forgotten, paired by seed."""
    return [than.forgetting[seed] - lost for seed, lost in cell.forgetting.items() if seed in than.forgetting]


HEAD = (
    "model", "trained parameters", "counted size", "finetuned", "coefficient", "steps", "forgetting",
    "less than unexpanded", "seeds",
)  # fmt: skip


def table_of_models(rows: Sequence[Row], scale: Any) -> str:
    """A line for each arm and kind of finetuning."""
    lines = []
    for kind, words in KINDS.items():
        found = cells(rows, scale, kind)
        for arm, cell in found.items():
            row, steps = next(iter(cell.rows.values())), np.mean(list(cell.steps.values()))
            bare = None if arm == "unexpanded" else found.get("unexpanded")
            lines.append([
                ARMS[arm], f"{row['all_params']:,}", f"{row['num_params']:,}", words, f"{cell.coef:.2g}",
                f"{steps:.0f}", cell.interval, over_seeds(less(cell, bare)) if bare else "–", len(cell.forgetting),
            ])  # fmt: skip
    return table(HEAD, lines)


def verdict(rows: Sequence[Row], scale: Any) -> str:
    """Whether enlarging helps, plain and with replay, each way of enlarging by its own interval."""
    found = {kind: cells(rows, scale, kind) for kind in KINDS}
    numbers = [len(cell.forgetting) for some in found.values() for cell in some.values()]
    if any("unexpanded" not in some or len(some) < 2 for some in found.values()):
        return "Verdict: none yet; the study is not finished."
    if min(numbers) < 2:
        return "Verdict: none yet; one seed has no interval."
    helped = {
        (kind, arm): less(some[arm], some["unexpanded"])
        for kind, some in found.items()
        for arm in ("widened", "deepened")
        if arm in some
    }
    signs = {place: Claim(values, first_look=FIRST_LOOK).agrees for place, values in helped.items()}
    protected = [sign for (kind, _), sign in signs.items() if kind == "replay"]
    answer = (
        f"yes, enlarging lowers forgetting with replay within {scale.world.max_steps} steps"
        if protected and min(protected) == 1
        else "one way of enlarging lowers forgetting with replay" if 1 in protected
        else "no, forgetting with replay does not fall" if protected and max(protected) == -1
        else "cannot tell at this size"
    )  # fmt: skip
    each = "; ".join(
        f"{arm}, {KINDS[kind]}: {over_seeds(values)} nats less ({_word(signs[kind, arm])})"
        for (kind, arm), values in helped.items()
    )
    gaps = [row["function_gap"] for row in rows if "function_gap" in row]
    control = _control(found["replay"], rows, scale)
    held = "the same function" if max(gaps, default=1.0) < SAME else "NOT the same function"
    return (
        f"Verdict: {answer}. {each}. Before finetuning the enlarged models are {held}: their log-probabilities on the "
        f"small base's replay rows differ by at most {max(gaps, default=float('nan')):.1e}. {control} "
        f"{min(numbers)} seeds; 95% intervals by Student's t, paired by seed."
    )


def _control(some: dict[str, Cell], rows: Sequence[Row], scale: Any) -> str:
    if "control" not in some:
        return "The larger model from the start did not reach the target."
    runs = [runs_of(rows, scale, arm)[0] for arm in ("control", "unexpanded")]
    tokens, fewer = (run["num_params"] * run["settings"]["tokens_per_param"] for run in runs)
    gain = over_seeds(less(some["control"], some["unexpanded"]))
    return f"A larger model from the start, on {tokens / fewer:.2g} times the tokens, forgets {gain} less with replay."


def _word(sign: int) -> str:
    return {1: "helps", 0: "open", -1: "hurts"}[sign]


def report(rows: Sequence[Row], scale: Any) -> str:
    said = verdict(rows, scale)
    answer, some = answer_of(said), cells(rows, scale, "replay")
    if not answer or not {"unexpanded", "widened", "deepened"} <= set(some):
        return f"{table_of_models(rows, scale)}\n\n**{said}**"
    plain, *grown = (some[arm].interval for arm in ("unexpanded", "widened", "deepened"))
    numbers = f"with replay {plain} nats, {grown[0]} widened, {grown[1]} deepened; the base is not saturated: see 07"
    return f"{table_of_models(rows, scale)}\n\n**{said}**\n\n" + findings(
        {"Capacity added before finetuning (A: not tried)": (f"new: {answer}", numbers)}
    )


def draw(rows: Sequence[Row], scale: Any, path: Path) -> None:
    """Forgetting at the target: an arm a place, means as bars, seeds as dots; without and with replay."""
    with panels(path, 2, (9.6, 3.6)) as axes:
        for axis, (kind, words) in zip(axes, KINDS.items(), strict=True):
            found = cells(rows, scale, kind)
            for at, (arm, cell) in enumerate(found.items()):
                colour = PALETTE[list(ARMS).index(arm)]
                axis.bar(at, cell.mean, color=colour, alpha=0.55, width=0.65)
                axis.plot([at] * len(cell.forgetting), list(cell.forgetting.values()), ".", color=colour)
                note = f"{cell.mean:.2f}" if kind == "plain" else f"{cell.mean:.3f}\ncoef {cell.coef:.2g}"
                axis.annotate(note, (at, max(cell.forgetting.values())), (0, 4), textcoords="offset points",
                              ha="center", fontsize=8)  # fmt: skip
            axis.set_xticks(range(len(found)), [ARMS[arm].replace(" from", "\nfrom") for arm in found])
            axis.grid(False, axis="x")
            axis.margins(y=0.2)
            dress(axis, f"Finetuned {words}", "", "forgetting, nats per token" if kind == "plain" else "")

"""A plan for people: a summary, a Markdown page and a figure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from retain.laws.plan import PilotLaws, Plan, Setting, predicted
from retain.report.style import INK, MARKS, PALETTE, _styled, save_png


def verdict(plan: Plan) -> str:
    """The recommendation, or why there is none, in a sentence."""
    if plan.chosen is None:
        return (
            f"No setting keeps forgetting within {plan.budget:g} nats per token with {plan.level:.0%} certainty; train "
            "with --max_ref_kl, which moves the coefficient until it is kept, or says that it cannot be"
        )
    why = plan.distrusted.get(plan.chosen.replay_coef)
    if why:
        return f"Recommended: {plan.chosen.words}, the best that a pilot measured; the law is not followed, since {why}"
    return f"Recommended: {plan.chosen.words}"


def told_of(one: Setting, level: float) -> list[str]:
    """What is predicted of a setting."""
    learned, lost = (f"; its pilot measured {value:.4g}" for value in one.measured) if one.measured else ("", "")
    return [
        f"new-task loss    {one.finetuning_loss}{learned}",
        f"forgetting       {one.forgetting_loss}{lost}   (predicted, {level:.0%} intervals, nats per token)",
    ]


def cost_line(cost: Mapping[str, float]) -> str:
    return (
        f"{cost['pilots']:.0f} pilots: {cost['steps']:.0f} steps, {cost['tokens']:.0f} tokens, "
        f"{cost['seconds']:.0f} seconds"
    )


def summary(plan: Plan, told: Mapping[str, Any], folder: Path) -> str:
    """A few lines that end in the command to run."""
    lines = [verdict(plan)]
    if plan.chosen is not None:
        lines += told_of(plan.chosen, plan.level)
        if plan.chosen.replay_coef:
            lines.append(f"replay share     {told['replay_share']:.3g} of the rows of a step")
    lines += [cost_line(told["cost"]), f"plan: {folder / 'plan.md'} ({len(plan.doubts)} things the pilots cannot say)"]
    return "\n".join([*lines, "", told["command"]])


def markdown(plan: Plan, told: Mapping[str, Any]) -> str:
    """The plan as a page."""
    heads = (
        "replay coefficient",
        "best within the budget",
        "by",
        "new-task loss",
        "measured",
        "forgetting",
        "measured",
    )
    rows = ["| " + " | ".join(heads) + " |", "| --- " * len(heads) + "|"]
    for coef, one in plan.best.items():
        cells = [f"{coef:g}", "none", *[""] * 5]
        if one:
            learned, lost = (f"{value:.4g}" for value in one.measured) if one.measured else ("–", "–")
            by = "its pilot" if coef in plan.distrusted else "the law"
            cells[1:] = [one.words, by, str(one.finetuning_loss), learned, str(one.forgetting_loss), lost]
        rows.append("| " + " | ".join(cells) + " |")
    settings, share = told["settings"], told["replay_share"]
    return "\n".join(
        [
            f"# Plan: {settings['model']} on {settings['dataset_name']}\n",
            f"**{verdict(plan)}.**\n",
            f"Budget: KL(base ‖ model) on {told['retention']!r} at most {plan.budget:g} nats per token, by the upper "
            f"end of the {plan.level:.0%} interval of a new measurement; as measured once where the law is not "
            "followed. Values with an interval are predicted; beside them is what a pilot with this very setting "
            f"measured. Replay share, where there is replay: {share:.3g} of the rows of a step.\n",
            *rows,
            f"\nCost: {cost_line(told['cost'])}. Seed {settings['seed']}.\n",
            "![Pilots, predictions and the budget](plan.png)\n",
            "## What the pilots cannot say\n",
            *(f"- {text}" for text in plan.doubts),
            f"\n## Run it\n\n```bash\n{told['command']}\n```\n",
        ]
    )


@_styled
def draw(rows: Sequence[Mapping[str, Any]], laws: PilotLaws, plan: Plan, path: Path) -> None:
    """Forgetting over new-task loss: pilots as points, the recommended setting with its intervals, the budget."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4.2))
    axes = figure.add_subplot()
    for at, coef in enumerate(sorted({row["replay_coef"] for row in rows})):
        look: dict[str, Any] = {"color": PALETTE[at % len(PALETTE)], "marker": MARKS[at % len(MARKS)]}
        of = [row for row in rows if row["replay_coef"] == coef]
        learned, lost = ([row[name] for row in of] for name in ("finetuning_loss", "forgetting_loss"))
        words = f"replay coefficient {coef:g}" if coef else "no replay"
        axes.plot(learned, lost, linestyle="none", markersize=4, alpha=0.6, markeredgewidth=0, label=words, **look)
        _curve(axes, laws, plan, coef, of, look["color"])
    axes.axhline(plan.budget, color=INK, linewidth=0.9, linestyle=(0, (4, 3)))
    axes.annotate("budget", (0.005, plan.budget), (0, 3), xycoords=("axes fraction", "data"),
                  textcoords="offset points", fontsize=8)  # fmt: skip
    if plan.chosen is not None:
        _chosen(axes, plan.chosen)
    _frame(axes, rows, plan)
    axes.set_title("Pilots, what they predict, and the budget")
    axes.set_xlabel("new-task loss, nats per token (learning →)")
    axes.set_ylabel("forgetting: KL(base ‖ model), nats per token")
    axes.legend(fontsize=8, loc="best")
    save_png(figure, path)


def _frame(axes: Any, rows: Sequence[Mapping[str, Any]], plan: Plan) -> None:
    """Around the pilots and the budget; an interval may leave it."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    learned, lost = ([row[name] for row in rows] for name in ("finetuning_loss", "forgetting_loss"))
    margin = 0.06 * (max(learned) - min(learned)) + 1e-9
    axes.set_xlim(max(learned) + margin, min(learned) - margin)
    axes.set_yscale("log")
    axes.set_ylim(min(*lost, plan.budget) / 1.4, max(*lost, plan.budget) * 1.4)
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())


def _curve(axes: Any, laws: PilotLaws, plan: Plan, coef: float, rows: Sequence[Any], color: str) -> None:
    """What is predicted over the steps for the rank whose setting is best, or the largest."""
    one = plan.best.get(coef)
    size = one.num_params if one else max(row["num_params"] for row in rows)
    steps = np.unique([row["num_steps"] for row in rows]).tolist()
    line = predicted(laws, {0: size}, coef, steps, plan.level)
    kept = [at for at in line if at.forgetting_loss.value > 0]
    axes.plot([at.finetuning_loss.value for at in kept], [at.forgetting_loss.value for at in kept], color=color,
              linewidth=1.3)  # fmt: skip


def _chosen(axes: Any, one: Setting) -> None:
    learned, lost = one.finetuning_loss, one.forgetting_loss
    bars = [[[of.value - max(of.low, 1e-6)], [of.high - of.value]] for of in (learned, lost)]
    axes.errorbar([learned.value], [lost.value], xerr=bars[0], yerr=bars[1], color=INK, marker="*", markersize=11,
                  linewidth=1.2, capsize=3, label="predicted of it, interval", zorder=5)  # fmt: skip
    if one.measured:
        axes.plot(*one.measured, marker="o", markersize=9, markerfacecolor="none", markeredgecolor=INK,
                  linestyle="none", label="recommended: measured", zorder=6)  # fmt: skip

"""A plan as a summary, a Markdown page and a figure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

from retain.laws.plan import Losses, PilotLaws, PilotRun, Plan, Setting, predicted_settings, replay_phrase
from retain.report.figures import LEARNING
from retain.report.style import INK, MARKS, PALETTE, name_axes, styled

HEADS = ("replay coefficient", "best within the limit", "by", "new-task loss", "measured", "forgetting", "measured")


@dataclass(frozen=True)
class PlanReport:
    """A plan, its pilots and the command of the recommended run.

    Args:
        command: the recommended run, to paste into a shell.
        settings: the flags of `retain plan`.
        replay_share: share of replay rows in a step.
        retention: name of the text to which the limit applies.
    """

    plan: Plan
    command: str
    pilots: Sequence[PilotRun]
    settings: Mapping[str, Any]
    replay_share: float
    retention: str

    @property
    def cost(self) -> dict[str, float]:
        """Total cost of the pilots, including those of earlier calls; tokens of new rows."""
        total = {name: sum(getattr(run, name) for run in self.pilots) for name in ("steps", "tokens", "seconds")}
        return {"pilots": len(self.pilots), **total, "seconds": round(total["seconds"], 1)}

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        content = asdict(self)
        del content["plan"]
        return self.plan.to_dict() | content | {"cost": self.cost}

    @property
    def cost_line(self) -> str:
        return "{pilots} pilots: {steps} steps, {tokens} tokens, {seconds:.0f} seconds".format(**self.cost)

    def summary(self, folder: Path) -> str:
        """A few lines that end with the command to run."""
        plan = self.plan
        lines = [recommendation(plan)]
        if plan.chosen:
            lines += loss_lines(plan.chosen, plan.level)
            if plan.chosen.replay_coef:
                lines.append(f"replay share     {self.replay_share:.3g} of the rows of a step")
        caveats = f"{len(plan.caveats)} things the pilots cannot say"
        return "\n".join([*lines, self.cost_line, f"plan: {folder / 'plan.md'} ({caveats})", "", self.command])

    def page(self) -> str:
        """The plan in Markdown."""
        plan, settings = self.plan, self.settings
        rows = [HEADS, ["---"] * len(HEADS)]
        for coef, best in plan.best.items():
            cells = [f"{coef:g}", "none", *[""] * 5]
            if best:
                learned, lost = (f"{value:.4g}" for value in best.measured) if best.measured else ("–", "–")
                by = "its pilot" if coef in plan.rejected_laws else "the law"
                cells[1:] = [str(best), by, str(best.finetuning_loss), learned, str(best.forgetting_loss), lost]
            rows.append(cells)
        table = "\n".join(f"| {' | '.join(cells)} |" for cells in rows)
        caveats = "\n".join(f"- {text}" for text in plan.caveats)
        return f"""# Plan: {settings["model"]} on {settings["dataset_name"]}

**{recommendation(plan)}.**

Limit: KL(base ‖ model) on {self.retention!r} at most {plan.max_ref_kl:g} nats per token, by the upper end of the \
{plan.level:.0%} interval of a new measurement; as measured once where the law is not followed. Values with an \
interval are predicted; next to them is what a pilot with the same setting measured. Replay share, with \
replay: {self.replay_share:.3g} of the rows of a step.

{table}

Cost: {self.cost_line}. Seed {settings["seed"]}.

![Pilots, predictions and the limit](plan.png)

## What the pilots cannot say

{caveats}

## Run it

```bash
{self.command}
```
"""


def recommendation(plan: Plan) -> str:
    """The recommended setting, or why there is none, in a sentence."""
    if plan.chosen is None:
        return (
            f"No setting keeps forgetting within {plan.max_ref_kl:g} nats per token with {plan.level:.0%} certainty; "
            "train with --max_ref_kl, which adapts the coefficient and warns if the limit is not kept"
        )
    why = plan.rejected_laws.get(plan.chosen.replay_coef)
    return f"Recommended: {plan.chosen}" + (
        f", the best that a pilot measured; the law is not followed, since {why}" if why else ""
    )


def loss_lines(setting: Setting, level: float) -> list[str]:
    """Lines with the predicted and measured losses of a setting."""
    measured = setting.measured
    learned, lost = (f"; its pilot measured {value:.4g}" for value in measured) if measured else ("", "")
    return [
        f"new-task loss    {setting.finetuning_loss}{learned}",
        f"forgetting       {setting.forgetting_loss}{lost}   (predicted, {level:.0%} intervals, nats per token)",
    ]


@styled
def plan_figure(laws: PilotLaws, plan: Plan) -> Figure:
    """Plot forgetting over new-task loss: pilots, predicted curves, the limit, and the recommended setting."""
    figure = Figure(figsize=(6.4, 4.2))
    axes = figure.add_subplot()
    for at, coef in enumerate(sorted({coef for _, _, coef in laws.measured})):
        color, marker = PALETTE[at % len(PALETTE)], MARKS[at % len(MARKS)]
        points = [losses for (_, _, other), losses in laws.measured.items() if other == coef]
        look: dict[str, Any] = {"markersize": 4, "alpha": 0.6, "markeredgewidth": 0, "marker": marker, "color": color}
        axes.plot(*zip(*points, strict=True), linestyle="none", label=replay_phrase(coef), **look)
        curve = [losses for losses in predicted_curve(laws, plan, coef) if losses.forgetting_loss > 0]
        axes.plot(*zip(*curve, strict=True), color=color, linewidth=1.3)
    axes.axhline(plan.max_ref_kl, color=INK, linewidth=0.9, linestyle=(0, (4, 3)))
    axes.annotate("limit", (0.005, plan.max_ref_kl), (0, 3), xycoords=("axes fraction", "data"),
                  textcoords="offset points", fontsize=8)  # fmt: skip
    if plan.chosen:
        _mark_chosen(axes, plan.chosen)
    _frame_points(axes, list(laws.measured.values()), plan.max_ref_kl)
    name_axes(axes, "Pilots, predictions and the limit", LEARNING, "forgetting: KL(base ‖ model), nats per token")
    axes.legend(fontsize=8, loc="best")
    return figure


def predicted_curve(laws: PilotLaws, plan: Plan, coef: float) -> list[Losses]:
    """Predicted losses over the pilots' steps, for the size of the coefficient's best setting, else the largest."""
    best = plan.best.get(coef)
    tried = [(size, step) for size, step, other in laws.measured if other == coef]
    size = best.num_params if best else max(size for size, _ in tried)
    settings = predicted_settings(laws, {0: size}, coef, sorted({step for _, step in tried}), plan.level)
    return [Losses(setting.finetuning_loss.value, setting.forgetting_loss.value) for setting in settings]


def _frame_points(axes: Axes, points: Sequence[Losses], limit: float) -> None:
    """Set the axes around the pilots and the limit; intervals may reach beyond."""
    learned, lost = zip(*points, strict=True)
    margin = 0.06 * (max(learned) - min(learned)) + 1e-9
    axes.set_xlim(max(learned) + margin, min(learned) - margin)
    axes.set_yscale("log")
    axes.set_ylim(min(*lost, limit) / 1.4, max(*lost, limit) * 1.4)
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter(NullFormatter())


def _mark_chosen(axes: Axes, chosen: Setting) -> None:
    learned, lost = chosen.finetuning_loss, chosen.forgetting_loss
    bars = [[[loss.value - max(loss.low, 1e-6)], [loss.high - loss.value]] for loss in (learned, lost)]
    axes.errorbar([learned.value], [lost.value], xerr=bars[0], yerr=bars[1], color=INK, marker="*", markersize=11,
                  linewidth=1.2, capsize=3, label="recommended: predicted", zorder=5)  # fmt: skip
    if chosen.measured:
        axes.plot(*chosen.measured, marker="o", markersize=9, markerfacecolor="none", markeredgecolor=INK,
                  linestyle="none", label="recommended: measured", zorder=6)  # fmt: skip

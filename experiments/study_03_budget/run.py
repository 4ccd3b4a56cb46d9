"""Does a run end where its forgetting budget says, and what does that cost? One command; finished runs are skipped.

python -m experiments 03 [--runs 0 1] [--report]

Rule, as it was committed first: 240 steps, three seeds; a run ends where its budget says if the mean of ref_kl on
replay rows over its last fifth lies within 20% of it. "Yes" where all nine do, on both sides; "near it, and above it"
where all nine do and lie above; else "no".

A first look had 160 steps and two seeds, for time, and a controller that held the mean over all predictions of a row:
"near it, and above it". These runs have today's, which holds the mean behind the first five predictions. The last tenth
of the steps and held-out rows are shown beside the last fifth, and decide nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.ticker import NullLocator

from experiments.claim import over_seeds
from experiments.finetunes import Bench, Run, StudyResults, compact, make_trainer, scratch, small_bench
from experiments.pages import answer_of, dress, findings, goal_line, panels, table
from experiments.program import LAPTOP, Report, conduct
from retain.training.run_files import read_run

HERE = Path(__file__).parent

BUDGETS = (0.05, 0.1, 0.2)
STRICT = 0.002  # nats per token, at which the noise of eight rows alone holds the model
SEEDS = (0, 1, 2)
STEPS = 240
NEAR = 0.2  # of the budget


def runs() -> list[Run]:
    """Every run of the study: plain, three budgets, and one that is too strict; each with every seed."""
    plain = Run(max_steps=STEPS, eval_steps=60, replay_rows=8)
    kinds = [plain, *(replace(plain, budget=budget, coef=1.0) for budget in (*BUDGETS, STRICT))]
    return [replace(kind, seed=seed) for seed in SEEDS for kind in kinds]


def finetune(run: Run, bench: Bench) -> dict[str, Any]:
    """Train; the losses on the way, the KL that is held and the coefficient by step, and the controller's verdict."""
    with scratch() as folder:
        trainer = make_trainer(run, bench, folder)
        trainer.args.set_logging(strategy="steps", steps=1)
        trainer.train()
        rows = read_run(folder)["trajectory"]
    found: dict[str, Any] = {"trajectory": [compact(row) for row in rows if "eval_loss" in row]}
    if trainer.budget is not None:
        found["verdict"] = asdict(trainer.budget.verdict())
        pairs = [(row["replay/kl_rest"], row["replay/coef"]) for row in rows if "replay/coef" in row]
        found["steps"] = [[float(f"{value:.4g}") for value in pair] for pair in pairs]
    return found


def by_budget(rows: Sequence[dict[str, Any]]) -> dict[float | None, list[dict[str, Any]]]:
    """The runs of each budget, by seed."""
    found: dict[float | None, list[dict[str, Any]]] = {}
    for row in sorted(rows, key=lambda row: row["settings"]["seed"]):
        found.setdefault(row["settings"].get("budget"), []).append(row)
    return found


HEAD = (
    "budget", "ref_kl on replay rows, last fifth of the steps", "on held-out self-generated text, at the end",
    "coefficient at the end", "new-task loss", "forgetting on prose",
)  # fmt: skip


def table_of_budgets(found: dict[float | None, list[dict[str, Any]]]) -> str:
    """What was set and what came of it, a line for each budget."""
    lines = []
    for budget, rows in sorted(found.items(), key=lambda item: -(item[0] or 9)):
        ends = ("retention/self-generated/ref_kl", "eval_loss", "retention/prose/forgetting")
        held_out, new_loss, lost = (over_seeds([row["trajectory"][-1][name] for row in rows]) for name in ends)
        if budget:
            on_replay, coef = (over_seeds([row["verdict"][name] for row in rows]) for name in ("ref_kl", "coef"))
            lines.append([f"{budget:g}", on_replay, held_out, coef.text(".2f"), new_loss, lost])
        else:
            lines.append(["none (plain)", "", held_out, "", new_loss, lost])
    return table(HEAD, lines)


def verdict(found: dict[float | None, list[dict[str, Any]]]) -> str:
    """Whether every run ended near its budget, on which side, and whether a budget too strict was called so."""
    off = {budget: [row["verdict"]["ref_kl"] / budget - 1 for row in found.get(budget, [])] for budget in BUDGETS}
    if not all(off.values()) or STRICT not in found:
        return "Verdict: none yet; the study is not finished."
    every = [value for values in off.values() for value in values]
    inside = sum(abs(value) <= NEAR for value in every)
    strict = [row["verdict"] for row in found[STRICT]]
    said = sum(not one["kept"] for one in strict)
    above = sum(value > 0 for value in every)
    answer = "no" if inside < len(every) else "near it, and above it" if above == len(every) else "yes"
    unsure = sum(not row["verdict"]["certain"] for budget in BUDGETS for row in found[budget])
    return (
        f"Verdict: {answer}. {above} of {len(every)} runs of one model ended above their budget, {inside} within 20% "
        f"of it ({min(every):+.0%} to {max(every):+.0%}); in {unsure} the controller itself was not certain. "
        f"Of the budget of {STRICT:g}, too strict for this learning rate, {said} of {len(strict)} runs said that it "
        f"was not kept (coefficient at the end {min(one['coef'] for one in strict):g} or more)."
    )


def answer(found: dict[float | None, list[dict[str, Any]]], said: str) -> str:
    """The finding, and what was looked at after the runs: shorter ends, and rows that nothing was trained on."""
    if not (words := answer_of(said)):
        return ""
    runs = [(budget, row) for budget in BUDGETS for row in found[budget]]
    off = [row["verdict"]["ref_kl"] / budget - 1 for budget, row in runs]
    late = [float(np.mean([kl for kl, _ in row["steps"][-STEPS // 10 :]])) / budget - 1 for budget, row in runs]
    fresh = [row["trajectory"][-1]["retention/self-generated/ref_kl"] / budget - 1 for budget, row in runs]
    inside, seeds = sum(abs(one) <= NEAR for one in off), len(found[BUDGETS[0]])
    numbers = (
        f"{inside} of {len(off)} runs within 20%, {min(off):+.0%} to {max(off):+.0%}, by the last fifth of {STEPS} "
        f"steps; {len(BUDGETS)} budgets, {seeds} seeds"
    )
    after = (
        "Looked at after the runs, no part of the rule. By the last tenth of the steps "
        f"{sum(one > NEAR for one in late)} of {len(late)} runs are more than 20% above their budget ({min(late):+.0%} "
        f"to {max(late):+.0%}). On held-out rows of the base's own, at the last step, "
        f"{sum(one < 0 for one in fresh)} of {len(fresh)} are below it ({min(fresh):+.0%} to {max(fresh):+.0%})."
    )
    claim = findings({"A run ends where its budget of ref_kl on replay rows says": (words, numbers)})
    return f"{claim}\n\n{after}"


def draw(found: dict[float | None, list[dict[str, Any]]], path: Path) -> None:
    """The smoothed KL and the coefficient over the steps, one line a run."""
    colours = dict(zip(BUDGETS, ("#2a6f97", "#c8553d", "#588157"), strict=True))
    with panels(path, 2, (10.5, 4.2)) as (left, right):
        for budget, colour in colours.items():
            for row in found.get(budget, []):
                steps = np.array(row["steps"])
                smooth = np.convolve(steps[:, 0], np.ones(20) / 20, mode="valid")
                left.plot(np.arange(len(smooth)) + 20, smooth, color=colour, linewidth=1.1)
                right.plot(np.arange(len(steps)) + 1, steps[:, 1], color=colour, linewidth=1.1)
            goal_line(left, y=budget, words=f"budget {budget:g}")
            if budget in found:
                right.annotate(
                    f"{budget:g}",
                    (STEPS, found[budget][0]["steps"][-1][1]),
                    (4, 0),
                    textcoords="offset points",
                    color=colour,
                    fontsize=9,
                    va="center",
                )
        for axes, ticks in ((left, (0.02, 0.05, 0.1, 0.2)), (right, (0.1, 0.3, 1, 3, 10, 30))):
            axes.set_yscale("log")
            axes.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
            axes.yaxis.set_minor_locator(NullLocator())
        left.set_ylim(bottom=0.018)
        left.set_xlim(left=-14)
        left.set_xticks(range(0, STEPS + 1, 60))
        dress(left, "KL on replay rows, mean of 20 steps", "optimizer step", "KL(base ‖ model), nats per token")
        dress(right, "Coefficient that held it", "optimizer step", "replay coefficient")


def make(name: str, part: int) -> None:
    bench, run = small_bench(), runs()[part]
    StudyResults(HERE / "results.jsonl", bench.fingerprint).make(run.settings(), lambda: finetune(run, bench))


def report(name: str) -> Report:
    found = by_budget(list(StudyResults(HERE / "results.jsonl", "").rows.values()))
    said = verdict(found)
    return f"{table_of_budgets(found)}\n\n**{said}**\n\n{answer(found, said)}", lambda path: draw(found, path)


def main(arguments: Sequence[str] | None = None) -> None:
    conduct(
        __doc__, HERE, LAPTOP, parts=lambda scale: range(len(runs())), make=make, report=report, only="runs",
        prepare=lambda name: small_bench(), arguments=arguments,
    )  # fmt: skip

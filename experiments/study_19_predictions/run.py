"""Does a budget of forgetting mean on other tasks what it meant on one? Finished runs stay.

python -m experiments 19 [--tasks verilog] [--report]

Rule, fixed before the runs. Every run has a budget (`--max_ref_kl`). On Verilog 16 runs are made first, and from them
a law: the logarithm of the rise of the loss on prose is linear in the logarithm of the budget (least squares; for a new
run a 90% interval by Student's t). The law is written to law.json, which is committed before the runs on three other
tasks, 48 of them, are made. Every run counts, whatever its own verdict on its budget is.

- The budget is kept on held-out text: in 44 of 48 runs or more the KL at the end, on rows that the base wrote and no
  run replayed, is within 20% of the budget. As in the budget itself, the first five predictions of each row are left
  out; the KL over all is shown beside it.
- It is kept without bias: the mean logarithm of that KL over the budget, with its whole 95% interval over the 48 runs,
  is within 5%.
- The law holds on other tasks: 41 of 48 rises or more are inside its intervals. A rise of 0 or less is outside.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.stats import t as student

from experiments.claim import over_seeds
from experiments.corpora import read_cpp, read_german, read_perl
from experiments.finetunes import Bench, BenchSettings, Run, StudyResults, make_trainer, scratch, small_bench
from experiments.pages import NoReport, dress, findings, panels, table
from experiments.program import LAPTOP, Report, conduct
from retain import versions
from retain.files import write_json
from retain.losses import kl_divergence
from retain.report.style import MARKS, PALETTE
from retain.training.loss_meter import in_opening
from retain.training.run_files import read_run

HERE = Path(__file__).parent
FIRST = "verilog"
NAMES = {"verilog": "Verilog", "cpp": "C++", "german": "German", "perl": "Perl"}
TASKS = {FIRST: None, "cpp": read_cpp, "german": read_german, "perl": read_perl}
BUDGETS = (0.05, 0.08, 0.12, 0.2)  # nats per token
SEEDS = (0, 1)
NEAR, BIAS, INSIDE = 0.2, 0.05, 0.9
MIN_NEAR, MIN_INSIDE = 44 / 48, 41 / 48
ROWS = BenchSettings(num_documents=192)
SHARED = {"max_steps": 160, "eval_steps": 160, "replay_rows": 8, "coef": 1.0}
METHODS = {"full": {"learning_rate": 1e-3}, "lora": {"learning_rate": 3e-3, "lora_rank": 16}}


def runs() -> list[Run]:
    """Those of a task: every method, budget and seed."""
    return [
        Run(method=method, budget=budget, seed=seed, **SHARED, **how)
        for seed in SEEDS
        for method, how in METHODS.items()
        for budget in BUDGETS
    ]


def bench(task: str) -> Bench:
    return small_bench(ROWS, TASKS[task])


@torch.no_grad()
def held_out_kl(place: Bench, model: Any) -> tuple[float, float]:
    """KL(base ‖ model) on held-out rows of the base's own, nats per token: behind their openings, and over all."""
    ids = torch.tensor([document.windows[0] for document in place.retention["self-generated"]])
    base = place.base().eval()
    kl = kl_divergence(*(one(input_ids=ids).logits[:, :-1] for one in (base, model.eval())))
    late = ~in_opening(torch.ones_like(kl, dtype=torch.bool))
    return float(kl[late].mean()), float(kl.mean())


def finetune(run: Run, place: Bench) -> dict[str, Any]:
    """Train; what was held, what was lost on prose, and the controller's own verdict."""
    with scratch() as folder:
        trainer = make_trainer(run, place, folder)
        trainer.train()
        end = read_run(folder)["trajectory"][-1]
    late, whole = held_out_kl(place, trainer.model)
    verdict = trainer.budget.verdict()
    found = {"held_out_kl": late, "held_out_kl_whole": whole, "rise": end["retention/prose/forgetting"],
             "new_task_loss": end["eval_loss"], "on_replay": verdict.ref_kl, "coef": verdict.coef}  # fmt: skip
    return {name: round(float(value), 5) for name, value in found.items()} | {"kept": verdict.kept}


def results_of(task: str) -> StudyResults:
    return StudyResults(HERE / "results.jsonl", task)


def make(name: str, task: str) -> None:
    """The runs of a task; of the first one the law, too."""
    if task != FIRST and not (HERE / "law.json").exists():
        raise ValueError(f"study 19: the law comes first; run --tasks {FIRST}, and commit law.json")
    for run in runs():
        results_of(task).make(run.settings(), lambda run=run: finetune(run, bench(task)))
    if task == FIRST:
        write_json(HERE / "law.json", law_of(rows_of(FIRST)) | {"versions": versions()})


def rows_of(task: str) -> list[dict[str, Any]]:
    return [row for row in results_of(task).rows.values() if row["bench"] == task]


def law_of(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Least squares of log rise on log budget, and what its intervals need."""
    if any(row["rise"] <= 0 for row in rows):
        raise NoReport("a run lost nothing on prose, so there is no law in logarithms")
    budgets = np.log([row["settings"]["budget"] for row in rows])
    rises = np.log([row["rise"] for row in rows])
    slope, level = np.polyfit(budgets, rises, 1)
    left = rises - level - slope * budgets
    return {
        "level": round(float(level), 6), "slope": round(float(slope), 6), "runs": len(rows),
        "spread": round(float(np.sqrt(left @ left / (len(rows) - 2))), 6),
        "mean_log_budget": round(float(budgets.mean()), 6),
        "sum_of_squares": round(float(((budgets - budgets.mean()) ** 2).sum()), 6),
    }  # fmt: skip


def predicted(law: dict[str, Any], budget: float) -> tuple[float, float, float]:
    """The rise that a new run with this budget has, nats per token, with its 90% interval."""
    at = math.log(budget)
    room = 1 + 1 / law["runs"] + (at - law["mean_log_budget"]) ** 2 / law["sum_of_squares"]
    half = float(student.ppf((1 + INSIDE) / 2, law["runs"] - 2)) * law["spread"] * math.sqrt(room)
    middle = law["level"] + law["slope"] * at
    return math.exp(middle), math.exp(middle - half), math.exp(middle + half)


def is_inside(law: dict[str, Any], row: dict[str, Any]) -> bool:
    _, low, high = predicted(law, row["settings"]["budget"])
    return low <= row["rise"] <= high


def off(row: dict[str, Any]) -> float:
    """Held-out KL over the budget, less 1."""
    return float(row["held_out_kl"] / row["settings"]["budget"] - 1)


def line_of(task: str, rows: Sequence[dict[str, Any]], law: dict[str, Any]) -> tuple[object, ...]:
    """A task's row of the table."""
    number, logs = len(rows), [math.log1p(off(row)) for row in rows]
    whole = [math.log(row["held_out_kl_whole"] / row["settings"]["budget"]) for row in rows]
    of_law = [math.log(row["rise"] / predicted(law, row["settings"]["budget"])[0]) for row in rows if row["rise"] > 0]
    return (
        NAMES[task], f"{sum(abs(off(row)) <= NEAR for row in rows)} of {number}", over_seeds(logs).text("+.3f"),
        over_seeds(whole).text("+.3f"), f"{sum(is_inside(law, row) for row in rows)} of {number}",
        over_seeds(of_law).text("+.3f") if of_law else "–", f"{sum(row['kept'] for row in rows)} of {number}",
    )  # fmt: skip


HEAD = (
    "task", "held-out KL within 20% of the budget", "mean log of it over the budget", "the same over all predictions",
    "rise on prose inside the law's 90% interval", "mean log of the rise over the law's", "budgets that runs call kept",
)  # fmt: skip


def report(name: str) -> Report:
    every = {task: rows_of(task) for task in TASKS}
    if any(len(rows) < len(runs()) for rows in every.values()):
        raise NoReport(f"made so far: {', '.join(f'{task} {len(rows)}' for task, rows in every.items())}")
    law = json.loads((HERE / "law.json").read_text())
    others = [row for task, rows in every.items() if task != FIRST for row in rows]
    near, inside = (
        sum(map(test, others)) for test in (lambda row: abs(off(row)) <= NEAR, lambda row: is_inside(law, row))
    )
    bias = over_seeds([math.log1p(off(row)) for row in others])
    means = [float(np.mean([math.log1p(off(row)) for row in rows])) for task, rows in every.items() if task != FIRST]
    unbiased = max(abs(bias.low), abs(bias.high)) <= BIAS
    apart = bias.low > BIAS or bias.high < -BIAS
    of, verdicts = len(others), {True: "yes", False: "no"}
    answers = {
        "A budget is kept on held-out rows of the base's own, on tasks that nothing was fitted on": (
            verdicts[near >= MIN_NEAR * of], f"within 20% in {near} of {of} runs"),
        "Its bias is within 5%": (
            "yes" if unbiased else "no" if apart else "cannot tell",
            f"{bias.text('+.3f')} in logs, {of} runs; over {len(means)} tasks {over_seeds(means).text('+.3f')}, the "
            f"most {max(means, key=abs):+.3f}"),
        "What a budget costs on prose follows the law of one task": (
            verdicts[inside >= MIN_INSIDE * of], f"{inside} of {of} rises inside 90% intervals"),
    }  # fmt: skip
    form = f"rise = {math.exp(law['level']):.2f} · budget^{law['slope']:.2f}, spread {law['spread']:.3f} in logs"
    lines = [line_of(task, rows, law) for task, rows in every.items()]
    text = f"{table(HEAD, lines)}\n\nThe law of {law['runs']} runs on Verilog: {form}."
    return f"{text}\n\n{findings(answers)}", lambda path: draw(every, law, path)


def draw(every: dict[str, list[dict[str, Any]]], law: dict[str, Any], path: Path) -> None:
    """Held-out KL and rise on prose over the budget, each task with a colour of its own."""
    with panels(path, 2, (10.0, 4.0)) as (kept, cost):
        ends = np.geomspace(0.9 * min(BUDGETS), 1.1 * max(BUDGETS), 30)
        middle, low, high = np.array([predicted(law, float(at)) for at in ends]).T
        kept.fill_between(ends, (1 - NEAR) * ends, (1 + NEAR) * ends, color="0.9", label="within 20%")
        cost.fill_between(ends, low, high, color="0.9", label="90%, law of Verilog")
        cost.plot(ends, middle, color="0.5", linewidth=1)
        for at, (task, rows) in enumerate(every.items()):
            shift = 1 + 0.04 * (at - 1.5)
            for axes, key in ((kept, "held_out_kl"), (cost, "rise")):
                for method, fill, label in (("full", PALETTE[at], NAMES[task]), ("lora", "none", None)):
                    of = [row for row in rows if row["settings"]["method"] == method]
                    axes.plot([shift * row["settings"]["budget"] for row in of], [row[key] for row in of],
                              color=PALETTE[at], marker=MARKS[at], markerfacecolor=fill, markersize=4.5,
                              linestyle="none", label=label)  # fmt: skip
        for axes in (kept, cost):
            axes.set_xscale("log")
            axes.set_yscale("log")
            axes.set_xticks(BUDGETS, [f"{budget:g}" for budget in BUDGETS])
            axes.set_yticks((0.05, 0.1, 0.2), ("0.05", "0.1", "0.2"))
            axes.minorticks_off()
            axes.legend(title="open: LoRA", fontsize=8.5)
        dress(kept, "Is the budget kept?", "budget, nats per token", "KL on held-out own rows, nats per token")
        dress(cost, "What does it cost?", "budget, nats per token", "rise of the loss on prose, nats per token")


def later(name: str) -> list[str]:
    return [task for task in TASKS if task != FIRST]


def main(arguments: Sequence[str] | None = None) -> None:
    conduct(
        __doc__, HERE, LAPTOP, parts=lambda scale: [FIRST], make=make, report=report, only="tasks", then=[later],
        arguments=arguments,
    )  # fmt: skip

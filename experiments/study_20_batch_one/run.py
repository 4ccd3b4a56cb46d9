"""One row a step, weights in bfloat16: does stochastic rounding learn and keep what float32 does? Finished runs stay.

python -m experiments 20 [--seeds 0 1] [--report]

Rule, fixed before the runs. The small base learns Verilog by one row of 64 tokens a step, 1,200 steps, AdamW, at four
rates. After each step weights are rounded to bfloat16, to the nearest or stochastically, or stay in float32; LoRA
trains adapters in float32 on a base that is rounded once. Computation and Adam's moments are in float32. All is read at
the end: the loss on held-out Verilog, and the rise of the loss on prose. The rate that counts is that at which float32
without replay ends lowest on average; for LoRA, its own. Claims are on differences paired by seed: three seeds, one
look.

- Rounding to the nearest learns less than float32: at the lowest rate, and at the one that counts.
- Stochastic rounding learns as much: equivalent within 0.05 nats, at both.
- With KL on a row of the base's own in each step, at 3e-4, stochastic rounding forgets as much as float32: equivalent
  within 0.02 nats.
- LoRA learns less than stochastic rounding.

Rates and number of steps were chosen by runs of 400 steps with seed 9.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import TrainerCallback

from experiments.claim import Claim, over_seeds, yes_or_no
from experiments.finetunes import BenchSettings, Run, StudyResults, compact, make_trainer, scratch, small_bench
from experiments.pages import NoReport, dress, findings, panels, table
from experiments.program import LAPTOP, Report, conduct
from retain.report.style import MARKS, PALETTE
from retain.training.run_files import read_run

HERE = Path(__file__).parent
SEEDS = (0, 1, 2)
RATES = (3e-5, 1e-4, 3e-4, 1e-3)
REPLAY_RATE = 3e-4
LORA_RATES = (1e-3, 3e-3, 1e-2)
ARMS = {"float32": None, "to the nearest": "nearest", "stochastically": "stochastic"}
PLAIN = Run(batch_size=1, max_steps=1200, eval_steps=600, warmup_steps=50)
LEARNED, KEPT = 0.05, 0.02  # nats: margins


class Rounding(TrainerCallback):
    """Trained weights to bfloat16 after each step; they stay in float32, where a step is computed."""

    def __init__(self, how: str, seed: int) -> None:
        self.how, self.random = how, torch.Generator().manual_seed(seed)

    @torch.no_grad()
    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        for weight in model.parameters():
            weight.copy_(rounded(weight, self.how, self.random))


def rounded(weight: torch.Tensor, how: str, random: torch.Generator) -> torch.Tensor:
    """Float32 values that bfloat16 has: the nearest, or one of both neighbours, the nearer the likelier."""
    if how == "nearest":
        return weight.bfloat16().float()
    bits = weight.view(torch.int32) + torch.randint(0, 1 << 16, weight.shape, generator=random, dtype=torch.int32)
    return (bits & -(1 << 16)).view(torch.float32)


def finetune(run: Run, how: str | None, place: Any) -> dict[str, Any]:
    """Train; losses at every evaluation."""
    model = place.base()
    if how is not None:
        with torch.no_grad():
            for weight in model.parameters():
                weight.copy_(weight.bfloat16())
    with scratch() as folder:
        trainer = make_trainer(run, place, folder, model=model)
        if how in ("nearest", "stochastic"):
            trainer.add_callback(Rounding(how, run.seed))
        trainer.train()
        return {"trajectory": [compact(row) for row in read_run(folder)["trajectory"] if "eval_loss" in row]}


def plan(seed: int) -> list[tuple[str, Run]]:
    """Arms with their runs; those with replay at one rate."""
    lora = replace(PLAIN, method="lora", lora_rank=16)
    kept = replace(PLAIN, learning_rate=REPLAY_RATE, coef=1.0, replay_rows=1)
    runs = [(arm, replace(PLAIN, learning_rate=rate)) for rate in RATES for arm in ARMS]
    runs += [("LoRA", replace(lora, learning_rate=rate)) for rate in LORA_RATES]
    return [(arm, replace(run, seed=seed)) for arm, run in [*runs, *((arm, kept) for arm in ARMS)]]


def bench() -> Any:
    return small_bench(BenchSettings(num_documents=192))


def make(name: str, seed: int) -> None:
    results = StudyResults(HERE / "results.jsonl", bench().fingerprint)
    for arm, run in plan(seed):
        how = ARMS.get(arm, "base")
        results.make({"arm": arm, **run.settings()}, lambda run=run, how=how: finetune(run, how, bench()))


Ends = dict[
    tuple[str, float, bool], list[tuple[float, float]]
]  # arm, rate, replay → by seed: new-task loss, forgetting


def ends_of(rows: Sequence[dict[str, Any]]) -> Ends:
    found: Ends = {}
    for row in sorted(rows, key=lambda row: row["settings"]["seed"]):
        settings, last = row["settings"], row["trajectory"][-1]
        key = settings["arm"], settings["learning_rate"], "coef" in settings
        found.setdefault(key, []).append((last["eval_loss"], last["retention/prose/forgetting"]))
    return found


def column(ends: Ends, arm: str, rate: float, replay: bool = False, at: int = 0) -> np.ndarray:
    return np.array([one[at] for one in ends[arm, rate, replay]])


def best_rate(ends: Ends, arm: str) -> float:
    rates = [rate for name, rate, replay in ends if name == arm and not replay]
    return min(rates, key=lambda rate: float(column(ends, arm, rate).mean()))


def ends_of_grid(rates: Sequence[float]) -> tuple[float, float]:
    return min(rates), max(rates)


def text_of(ends: Ends) -> str:
    """A line for each arm and rate, and the findings."""
    rate, lora = best_rate(ends, "float32"), best_rate(ends, "LoRA")
    found, at_rate = {}, {one: [column(ends, arm, one) for arm in ARMS] for one in (min(RATES), rate)}
    adapter = column(ends, "LoRA", lora)
    lost = [column(ends, arm, REPLAY_RATE, True, 1) for arm in ("stochastically", "float32")]

    def said(claim: Claim, one: np.ndarray, other: np.ndarray, where: str, paper: bool) -> tuple[str, str]:
        verdict = claim.alike if claim.margin else claim.verdict
        numbers = f"{over_seeds(one)} and {over_seeds(other)} nats {where}, {claim.estimate.text('+.3f')}"
        return verdict if paper else yes_or_no(verdict), f"{numbers}; {len(one)} seeds"

    for one, (whole, nearest, random) in at_rate.items():
        place, where = f"at {one:g}", "on the new task"
        found |= {
            f"Weights in bfloat16, rounded to the nearest, learn less than in float32 {place}": said(
                Claim(nearest - whole), nearest, whole, where, paper=False),
            f"Weights in bfloat16, rounded stochastically, learn as much as in float32 {place}": said(
                Claim(random - whole, margin=LEARNED), random, whole, where, paper=True),
        }  # fmt: skip
    random = at_rate[rate][2]
    found |= {
        "With replay, weights rounded stochastically forget as much as in float32": said(
            Claim(lost[0] - lost[1], margin=KEPT), *lost, f"on prose at {REPLAY_RATE:g}", paper=False),
        "LoRA learns less than weights rounded stochastically": said(
            Claim(adapter - random), adapter, random, f"on the new task at {lora:g} and {rate:g}", paper=True),
    }  # fmt: skip
    if lora in ends_of_grid(LORA_RATES) and rate in ends_of_grid(RATES):
        name, (verdict, numbers) = found.popitem()
        found[name] = f"{verdict}, each at an end of its rates", numbers
    lines = [
        [arm, f"{rate:g}", "1 row" if replay else "none",
         *(over_seeds(column(ends, arm, rate, replay, at)) for at in (0, 1))]
        for arm, rate, replay in ends
    ]  # fmt: skip
    head = ("weights", "rate", "replay", "new-task loss", "forgetting on prose")
    return f"{table(head, lines)}\n\n{findings(found)}"


LABELS = {
    "float32": "float32",
    "to the nearest": "bfloat16, to the nearest",
    "stochastically": "bfloat16, stochastically",
    "LoRA": "LoRA on bfloat16",
}


def draw(ends: Ends, path: Path) -> None:
    """Forgetting over the new-task loss at the end: means with single seeds as small marks; lines join the rates."""
    with panels(path, 1, (6.6, 4.0)) as (axes,):
        for at, arm in enumerate((*ARMS, "LoRA")):
            rates = sorted(rate for name, rate, replay in ends if name == arm and not replay)
            means = [[float(column(ends, arm, rate, at=of).mean()) for rate in rates] for of in (0, 1)]
            look = {"color": PALETTE[at], "marker": MARKS[at]}
            axes.plot(*means, **look, linewidth=1.2, label=LABELS[arm])
            for rate in rates:
                axes.plot(*(column(ends, arm, rate, at=of) for of in (0, 1)), **look, markersize=2.5, alpha=0.5,
                          linestyle="none")  # fmt: skip
            if arm in ("to the nearest", "LoRA"):
                for rate, x, y in zip(rates, *means, strict=True):
                    axes.annotate(f"{rate:g}", (x, y), (-6, 6), textcoords="offset points", fontsize=8, ha="right",
                                  color=PALETTE[at])  # fmt: skip
            if arm in ARMS:
                axes.plot(*(column(ends, arm, REPLAY_RATE, True, of).mean() for of in (0, 1)), **look,
                          markerfacecolor="none", markersize=9, linestyle="none")  # fmt: skip
        axes.margins(x=0.09)
        axes.invert_xaxis()
        axes.legend(title=f"weights, by rate (open: replay at {REPLAY_RATE:g})", fontsize=8.5, loc="upper right")
        axes.set_ylim(top=4.3)
        dress(axes, "One row a step, 1,200 steps", "new-task loss, nats per token (learning →)",
              "forgetting on prose, nats per token")  # fmt: skip


def report(name: str) -> Report:
    rows = list(StudyResults(HERE / "results.jsonl", "").rows.values())
    ends = ends_of(rows)
    if len(ends) < len(plan(0)) or len({len(of) for of in ends.values()}) > 1 or len(rows) < 2 * len(ends):
        raise NoReport("fewer than two seeds have every run yet")
    return text_of(ends), lambda path: draw(ends, path)


def main(arguments: Sequence[str] | None = None) -> None:
    conduct(
        __doc__, HERE, LAPTOP, parts=lambda scale: SEEDS, make=make, report=report, prepare=lambda name: bench(),
        arguments=arguments,
    )  # fmt: skip

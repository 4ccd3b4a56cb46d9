"""How much replay prevents 95% of forgetting for at most 10% more time? One command; finished runs are skipped.

python -m experiments 01 [--parts rates full lora timing pools] [--report]
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from experiments import program
from experiments.finetunes import Bench, Run, StudyResults, make_all, make_trainer, scratch, small_bench
from experiments.matched_loss import target_loss
from experiments.pages import findings
from experiments.program import LAPTOP, Report, conduct
from experiments.study_01_replay_cost import pools
from experiments.study_01_replay_cost.figure import draw
from experiments.study_01_replay_cost.report import (
    GAIN,
    answers,
    beside_gentler,
    cells_of,
    front_words,
    table_of_cells,
    verdict,
)

HERE = Path(__file__).parent

RATE, FAST, LORA_RATE, LORA_RANK = 1e-3, 3e-3, 3e-3, 16
RATES = (3e-4, 1e-3, 3e-3)
# (rows, tokens a row) of a replay batch beside 32 rows of 64 tokens: shares 1/2, 1/4, 1/8, 1/16, 1/32, 1/64.
SIZES = ((16, None), (8, None), (4, None), (2, None), (1, None), (1, 32))
# A coefficient and at how many of the sizes it is tried: strong terms of few rows do not let the model learn.
COEFS = ((1.0, 6), (3.0, 4), (0.3, 5), (10.0, 3), (30.0, 3))
SPARSE = ((8, 2), (8, 4), (8, 8), (16, 8))  # rows on every k-th step
SEEDS = (0, 1, 2)
TIMING_ROUNDS, TIMED_STEPS = 4, 16  # steps: a multiple of every replay_every
METHODS = ("full", "LoRA")


def rates() -> list[Run]:
    """The sweep that chose the learning rates: plain runs, one seed."""
    full = [Run(learning_rate=rate) for rate in RATES]
    return full + [Run(method="lora", lora_rank=LORA_RANK, learning_rate=rate) for rate in (1e-3, 3e-3, 1e-2)]


def unprotected() -> list[Run]:
    """Plain runs of both methods at the chosen learning rates; their loss sets the target."""
    return [Run(learning_rate=RATE), Run(method="lora", lora_rank=LORA_RANK, learning_rate=LORA_RATE)]


def cells() -> list[Run]:
    """Every protected run; each ends soon after it has reached the target loss."""
    plain, lora = unprotected()

    def cell(rows: int, coef: float, **more: Any) -> Run:
        return replace(plain, replay_rows=rows, coef=coef, **more)

    grid = [cell(rows, coef, replay_length=length) for coef, number in COEFS for rows, length in SIZES[:number]]
    every = [cell(rows, 1.0, replay_every=k) for rows, k in SPARSE]
    every.append(cell(8, 3.0, replay_every=4))
    pools = [cell(rows, 1.0, pool=pool) for rows, pool in ((8, 16), (8, 64), (8, 256), (2, 16))]
    fast = [cell(rows, coef, learning_rate=FAST) for rows, coef in ((8, 1.0), (8, 3.0), (2, 1.0), (16, 10.0))]
    adapters = [replace(lora, replay_rows=rows, coef=coef) for rows, coef in ((8, 1.0), (2, 1.0), (8, 3.0))]
    again = [*(cell(rows, 1.0) for rows in (2, 8, 4)), cell(16, 10.0), *fast[:2], every[1], cell(2, 0.3), *adapters]
    repeated = [replace(run, seed=seed) for run in again for seed in SEEDS[1:]]
    return [*grid, *fast, *repeated[:4], *every, *pools, *repeated[4:], *adapters]


def seeds(run: Run) -> list[Run]:
    return [replace(run, seed=number) for number in SEEDS]


def timed() -> list[Run]:
    """The cells whose steps are timed."""
    plain = Run(learning_rate=RATE, eval_steps=0)
    lora = replace(plain, method="lora", lora_rank=LORA_RANK)
    full = [replace(plain, coef=1.0, replay_rows=rows, replay_length=length) for rows, length in SIZES]
    every = [replace(plain, coef=1.0, replay_rows=rows, replay_every=k) for rows, k in SPARSE]
    return [*full, *every, *(replace(lora, coef=1.0, replay_rows=rows) for rows in (8, 2))]


def time_steps(run: Run, bench: Bench, steps: int) -> list[float]:
    """Mean wall-clock and processor seconds of `steps` optimizer steps after eight to warm up."""
    with scratch() as folder:
        trainer = make_trainer(replace(run, max_steps=steps + 8), bench, folder)
        trainer.train()
    return [statistics.fmean(column) for column in zip(*trainer.clock.seconds[-steps:], strict=True)]


def time_round(runs: Sequence[Run], bench: Bench, steps: int) -> dict[str, Any]:
    """Plain and protected steps in turn: plain, cell, plain, cell, …, plain; each cell against its two neighbours."""
    rows, before = [], None
    for run in runs:
        bare = replace(run, coef=0.0)
        if before is None or before[0] != bare.settings():
            before = bare.settings(), time_steps(bare, bench, steps)
        own, after = time_steps(run, bench, steps), time_steps(bare, bench, steps)
        ratios = [round(2 * mine / (b + a), 4) for mine, b, a in zip(own, before[1], after, strict=True)]
        rows.append({"settings": run.settings(), "wall": ratios[0], "cpu": ratios[1], "seconds": round(own[1], 4)})
        before = bare.settings(), after
    return {"timing": rows, "steps": steps}


def make(name: str, part: str) -> None:
    """The sweep of learning rates, the cells of a method, the timing, or long runs on few distinct rows."""
    if part == "pools":
        pools.make_runs()
        return
    bench = small_bench()
    results = StudyResults(HERE / "results.jsonl", bench.fingerprint)
    if part == "rates":
        make_all(rates(), bench, results)
    if part == "timing":
        for number in range(TIMING_ROUNDS):
            results.make({"timing": number}, lambda: time_round(timed(), bench, TIMED_STEPS))
    for plain in (one for one in unprotected() if one.method == part):
        bare = make_all(seeds(plain), bench, results)
        own = [run for run in cells() if run.method == plain.method]
        make_all(own, bench, results, target_loss(bare, GAIN))


def report(name: str) -> Report:
    """Table, verdict and figure from what there is."""
    rows = list(StudyResults(HERE / "results.jsonl", "").rows.values())
    rate = {"full": RATE, "lora": LORA_RATE}
    found, targets = cells_of(rows, rate)
    goals = ", ".join(f"{loss:.3f} ({method})" for method, loss in targets.items())
    parts = [f"Target new-task loss, nats per token: {goals}.", table_of_cells(found)]
    parts += [*(f"**{verdict(found, method)}**" for method in METHODS), front_words(found)]
    parts += [findings(answers(found, METHODS)), beside_gentler(found, rows, rate, targets)]
    return "\n\n".join(filter(None, parts)), lambda path: draw(found, path)


def main(arguments: Sequence[str] | None = None) -> None:
    conduct(
        __doc__, HERE, LAPTOP, parts=lambda scale: ("rates", "full", "lora"), make=make, report=report, only="parts",
        prepare=lambda name: small_bench(), then=(lambda name: ["timing"], lambda name: ["pools"]), arguments=arguments,
    )  # fmt: skip
    program.write_report(HERE, "laptop", pools.report(), "pools.md", "figure-pools")

"""Low learning rates forget less and take longer: what does replay at a high rate make of that? Finished runs stay.

python -m experiments 09 [--parts 0 1] [--report]

Rule, fixed before the runs. Bases are pretrained on prose at three constant rates, each until its held-out loss comes
to 3.3 nats per token, so that all have the same loss, and finetuned on Verilog at constant rates. A run is read where
its loss on held-out Verilog crosses 3.1, linear between evaluations: steps, processor time (steps times the median
second of a step), and forgetting, the rise of the loss on held-out prose. Every finding is a claim on differences
paired by seed (Student's t over three seeds, one look):

- Without replay the lowest rate forgets less than the highest, and needs more steps: both intervals.
- At low rates steps go with the inverse of the rate: steps times rate at the lowest rate and at the next one are
  equivalent within a quarter.
- At one high rate, 3e-3, with KL on 1 to 32 rows that the base wrote beside 32 new ones, each doubling of these rows
  lowers forgetting: the slope over the logarithm of their number.
- Replay breaks the trade-off: among the runs with replay at that high rate that forget no more than plain finetuning
  at some rate, that of fewest steps (of least time) takes fewer steps (less time) than plain. Judged against the plain
  rate that forgets least on average; all others are shown. A factor has its comparator beside it. Where a seed has no
  run with replay that forgets so little, the claim fails.
- A high pretraining rate reduces forgetting: the highest against the lowest, bases of the same loss, mean over
  finetuning rates; without replay, and with it.

Settings were chosen on one base of seed 9, which is not among the runs.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from experiments.corpora import CACHE, load_texts
from experiments.finetunes import Bench, BenchSettings, Run, StudyResults, finetune, open_bench
from experiments.pages import NoReport
from experiments.program import LAPTOP, Report, conduct
from experiments.small_base import MANIFEST, BaseSettings, make_base
from experiments.study_09_learning_rate.report import TARGET, draw, text_of
from retain.report.comparison import first_crossing
from retain.report.results import series

HERE = Path(__file__).parent
BASE_LOSS = 3.3  # nats per token on held-out prose
PRETRAIN_RATES = (1e-3, 3e-3, 1e-2)
MIDDLE = 3e-3  # of the bases on which all rates and shares are tried
SEEDS = (0, 1, 2)
RATES = (3e-5, 1e-4, 3e-4, 1e-3, 3e-3)
HIGH = 3e-3
ROWS = (1, 2, 4, 8, 16, 32)
COEF = 3.0
FEW_RATES = (3e-4, 1e-3, 3e-3)  # of the other bases; with replay of the middle number of rows the last two
FEW_ROWS = 8


def plain(rate: float, seed: int) -> Run:
    """Evaluated some thirty times on the way to the target."""
    return Run(learning_rate=rate, max_steps=round(0.3 / rate), eval_steps=max(3, round(0.004 / rate)), seed=seed)


def protected(rate: float, rows: int, seed: int) -> Run:
    return Run(
        learning_rate=rate, max_steps=round(1.2 / rate), eval_steps=max(3, round(0.008 / rate)), seed=seed,
        coef=COEF, replay_rows=rows,
    )  # fmt: skip


def plan(pretrain_rate: float, seed: int) -> Iterator[Run]:
    """The finetunes of a base."""
    whole = pretrain_rate == MIDDLE
    yield from (plain(rate, seed) for rate in (RATES if whole else FEW_RATES))
    yield from (protected(HIGH, rows, seed) for rows in (ROWS if whole else (FEW_ROWS,)))
    yield protected(FEW_RATES[-2], FEW_ROWS, seed)


def base_settings(pretrain_rate: float, seed: int) -> BaseSettings:
    return BaseSettings(learning_rate=pretrain_rate, seed=seed, stop_loss=BASE_LOSS, max_steps=10_000)


@cache
def base_of(pretrain_rate: float, seed: int) -> Path:
    return make_base(
        CACHE / "rates" / f"base-{pretrain_rate:g}-{seed}", load_texts(), base_settings(pretrain_rate, seed)
    )


@cache
def bench(pretrain_rate: float, seed: int) -> Bench:
    return open_bench(base_of(pretrain_rate, seed), load_texts(), BenchSettings(num_documents=192, seed=seed))


def known(pretrain_rate: float, seed: int) -> dict[str, Any]:
    return {"pretrain_rate": pretrain_rate, "base_loss": BASE_LOSS, "base_seed": seed}


def base_row(pretrain_rate: float, seed: int, results: StudyResults) -> None:
    """What a base is, as a row."""

    def compute() -> dict[str, Any]:
        facts = json.loads((base_of(pretrain_rate, seed) / MANIFEST).read_text())
        if facts["held_out_loss"][-1] > BASE_LOSS:
            raise NoReport(f"pretraining at {pretrain_rate:g} did not come to {BASE_LOSS:g} nats per token")
        return {name: facts[name] for name in ("num_params", "tokens_per_param", "held_out_loss")}

    results.make({"kind": "base", **known(pretrain_rate, seed)}, compute)


def short(row: dict[str, Any]) -> dict[str, Any]:
    """A run without the documents that are not read: those of the two evaluations around the target stay."""
    steps, losses = series(row["trajectory"], "eval_loss")
    crossing = first_crossing(steps, losses, TARGET)
    if crossing is None:
        return row
    ends = {max(step for step in steps if step <= crossing), min(step for step in steps if step >= crossing)}
    return row | {"documents": [one for one in row["documents"] if one["step"] in ends]}


def parts_of(scale: Any) -> range:
    """A base with its finetunes each; those with the most come first."""
    return range(len(PRETRAIN_RATES) * len(SEEDS))


def make(name: str, part: int) -> None:
    rates = sorted(PRETRAIN_RATES, key=lambda rate: rate != MIDDLE)
    pretrain_rate, seed = rates[part // len(SEEDS)], SEEDS[part % len(SEEDS)]
    results = StudyResults(HERE / "results.jsonl", "small")
    base_row(pretrain_rate, seed, results)
    for run in plan(pretrain_rate, seed):
        settings = {**known(pretrain_rate, seed), **run.settings()}
        results.make(settings, lambda run=run: short(finetune(run, bench(pretrain_rate, seed), TARGET)))


def report(name: str) -> Report:
    rows = StudyResults(HERE / "results.jsonl", "small").rows_with()
    return text_of(rows), lambda path: draw(rows, path)


def main(arguments: Sequence[str] | None = None) -> None:
    conduct(__doc__, HERE, LAPTOP, parts=parts_of, make=make, report=report, only="parts", arguments=arguments)

"""Do the laws of forgetting hold on a small real model, and where do they break? Finished runs are skipped.

python -m experiments 05 [--parts verilog cpp web plan] [--report]

Rule of what was added on 2026-11-30, before its runs; all runs are made anew, on one base. A third data set (web text,
most of it news), attention alone, the top layer alone and IA3, on all data sets. The code below and two of the claims
(ranks, steps) had been seen on the runs of Verilog and C++ that stood here before, on another base.

- Across methods the line breaks and the joint law holds: in every case (data set and reading of L_f) the whole
  interval of the law's R² over LoRA on all layers, on attention, the top layer and IA3 lies above that of the line.
- Attention alone, the top layer and IA3 leave LoRA's line: Welch's interval over runs lies off 0, in every case.
- The law is worth more than a copy: the error on a rank that was left out is smaller than that of the nearest run's
  curve, and on steps after 100 than that of the run's own value there: Student's t over ranks, L_f soft.
- Exponents may be shared over data sets: on the largest rank, predicted from the smaller ones, the error with shared
  exponents is less than a quarter larger than with the data set's own: the upper end of Student's interval over runs.

The plan was made twice that day. At first all pilots had one seed, as in `retain plan` of then: of 6 runs with other
seeds 6 ended within the interval of forgetting and the budget, and none within that of the new-task loss. So pilots got
seeds of their own, and plan and runs, with three other seeds, were made again: by the same verdict, a second look.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from experiments.corpora import CACHE, load_texts, with_task
from experiments.finetunes import Bench, BenchSettings, StudyResults, open_bench, small_bench
from experiments.program import LAPTOP, Report, conduct
from experiments.small_base import BaseSettings, make_base
from experiments.study_05_law.figure import draw
from experiments.study_05_law.plan_case import plan_and_run
from experiments.study_05_law.report import MIN_STEPS, READINGS, fitted
from experiments.study_05_law.runs import LARGEST, RANKS, STEPS, TASKS, finetune, now, other_runs, plain_runs
from experiments.study_05_law.verdict import report_text

HERE = Path(__file__).parent


def prediction(rows: Sequence[dict[str, Any]], num_params: int) -> dict[str, Any]:
    """What the joint law of the smaller ranks says of the largest, at every step that will be read."""
    steps = list(range(MIN_STEPS, STEPS + 1, rows[0]["settings"]["eval_steps"]))
    found: dict[str, Any] = {"predicted": now(), "num_params": num_params, "steps": steps}
    for reading in READINGS:
        at = fitted(rows, reading, "joint").predict(num_params=num_params, num_steps=steps)
        found[reading] = {
            name: {"value": at.value[name].round(5).tolist(), "ci": [end.round(5).tolist() for end in at.ci[name]]}
            for name in at.value
        }
    return found


def make_runs(dataset: str, bench: Bench, results: StudyResults) -> None:
    """The smaller ranks; the prediction of the largest, written before it is made; the largest; what should break."""

    def make(runs: Sequence[Any]) -> list[dict[str, Any]]:
        return [results.make(run.settings(), lambda run=run: finetune(run, bench)) for run in runs]

    rows = make(plain_runs(dataset, RANKS[:-1]))
    size = rows[0]["num_params"] // rows[0]["settings"]["lora_rank"] * LARGEST
    results.make({"predict": LARGEST, "from": RANKS[:-1], "dataset": dataset}, lambda: prediction(rows, size))
    make([*plain_runs(dataset, RANKS[-1:]), *other_runs(dataset)])


def make(name: str, part: str) -> None:
    """The runs on a data set, or the plans with theirs."""
    texts = load_texts()
    base = make_base(CACHE / "base", texts, BaseSettings())
    warnings.filterwarnings("ignore", category=FutureWarning)
    if part == "plan":
        plan_and_run(base, texts, StudyResults(HERE / "results.jsonl", texts.fingerprint), CACHE)
    else:
        bench = open_bench(base, with_task(texts, TASKS[part]), BenchSettings())
        make_runs(part, bench, StudyResults(HERE / "results.jsonl", bench.fingerprint))


def report(name: str) -> Report:
    rows = list(StudyResults(HERE / "results.jsonl", "").rows.values())
    return report_text(rows), lambda path: draw(rows, path)


def main(arguments: Sequence[str] | None = None) -> None:
    conduct(
        __doc__, HERE, LAPTOP, parts=lambda scale: (*TASKS, "plan"), make=make, report=report, only="parts",
        prepare=lambda name: small_bench(), arguments=arguments,
    )  # fmt: skip

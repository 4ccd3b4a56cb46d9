"""Do the laws of forgetting hold on a small real model, and where do they break? Finished runs are skipped.

python -m experiments 05 [--parts verilog cpp plan] [--report]
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from experiments.corpora import CACHE, load_texts
from experiments.finetunes import Bench, BenchSettings, StudyResults, open_bench, small_bench
from experiments.program import LAPTOP, Report, conduct
from experiments.small_base import BaseSettings, make_base
from experiments.study_05_law.figure import draw
from experiments.study_05_law.plan_case import plan_and_run
from experiments.study_05_law.report import MIN_STEPS, READINGS, fitted
from experiments.study_05_law.runs import LARGEST, RANKS, STEPS, finetune, now, other_runs, plain_runs, texts_of
from experiments.study_05_law.verdict import report_text

HERE = Path(__file__).parent

DATASETS = ("verilog", "cpp")


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
        bench = open_bench(base, texts_of(part, texts), BenchSettings())
        make_runs(part, bench, StudyResults(HERE / "results.jsonl", bench.fingerprint))


def report(name: str) -> Report:
    rows = list(StudyResults(HERE / "results.jsonl", "").rows.values())
    return report_text(rows), lambda path: draw(rows, path)


def main(arguments: Sequence[str] | None = None) -> None:
    conduct(
        __doc__, HERE, LAPTOP, parts=lambda scale: (*DATASETS, "plan"), make=make, report=report, only="parts",
        prepare=lambda name: small_bench(), arguments=arguments,
    )  # fmt: skip

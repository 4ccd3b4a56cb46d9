"""Do the laws of forgetting hold on a small real model, and where do they break? Finished runs are skipped.

python -m experiments 05 [--only runs|plan] [--report]
"""

from __future__ import annotations

import argparse
import logging
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers.utils.logging import disable_progress_bar

from experiments.harness import Bench, BenchSettings, Results, open_bench
from experiments.pages import write_results
from experiments.small_base import CACHE, BaseSettings, load_texts, make_base
from experiments.study_05_law.figure import draw
from experiments.study_05_law.plan_case import plan_and_run
from experiments.study_05_law.report import MIN_STEPS, READINGS, fitted
from experiments.study_05_law.runs import LARGEST, RANKS, STEPS, finetune, now, other_runs, plain_runs, texts_of
from experiments.study_05_law.verdict import told

HERE = Path(__file__).parent

logger = logging.getLogger("experiments")
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


def make_runs(dataset: str, bench: Bench, results: Results, scratch: Path) -> None:
    """The smaller ranks; the prediction of the largest, written before it is made; the largest; what should break."""

    def make(runs: Sequence[Any]) -> list[dict[str, Any]]:
        return [results.make(run.settings(), lambda run=run: finetune(run, bench, scratch)) for run in runs]

    rows = make(plain_runs(dataset, RANKS[:-1]))
    size = rows[0]["num_params"] // rows[0]["settings"]["lora_rank"] * LARGEST
    results.make({"predict": LARGEST, "from": RANKS[:-1], "dataset": dataset}, lambda: prediction(rows, size))
    make([*plain_runs(dataset, RANKS[-1:]), *other_runs(dataset)])


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", choices=("runs", "plan"))
    parser.add_argument("--report", action="store_true", help="remake the table and the figure only")
    asked = parser.parse_args(arguments)
    only = "report" if asked.report else asked.only
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(message)s")
    logger.setLevel(logging.INFO)
    disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning)
    if only != "report":
        texts = load_texts()
        base = make_base(CACHE / "base", texts, BaseSettings())
    for dataset in DATASETS if only in (None, "runs") else ():
        bench = open_bench(base, texts_of(dataset, texts), BenchSettings())
        make_runs(dataset, bench, Results(HERE / "results.jsonl", bench.fingerprint), CACHE / "run-law")
    if only in (None, "plan"):
        plan_and_run(base, texts, Results(HERE / "results.jsonl", texts.fingerprint), CACHE)
    rows = list(Results(HERE / "results.jsonl", "").rows.values())
    if only in (None, "report"):
        draw(rows, HERE / "figure.png")
        text = told(rows)
        write_results(HERE / "README.md", text)
        sys.stdout.write(text + "\n")

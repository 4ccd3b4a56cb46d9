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

Second round, fixed before its runs: a stronger anchor at a higher rate, chosen again on Verilog, seed 0, after the
first round had been read. It is judged on two tasks that were not looked at, German and JavaScript, by the same goal.
On Spanish and C++, which by then had been looked at, it is shown and not judged. Measures on which plain itself forgets
less than 0.05 nats are left out: added when SmolLM2 was seen to lose nothing on prose while it learned German.

Third round, fixed before its runs: ten times plain's usual rate (1e-3 with full finetuning, 3e-3 with the small base's
LoRA, 1e-3 with SmolLM2's, 5e-5 with its full finetuning, in 30 steps for want of time), a coefficient at which that
learned as much on Verilog, seed 0, as plain at its usual rate, and replay of a quarter of the batch in the last 30% of
the steps. It is judged on two tasks that were not looked at, French and Perl, by the same goal. Time is that of
trainers which take steps by turns, two plain ones among them; the 95% interval of a run's mean step over rounds
(Student's t) must lie below 1.10 for "reached", above it for "missed".
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from experiments.finetunes import Bench, StudyResults, make_all, small_bench, smollm2_bench
from experiments.program import LAPTOP, Report, conduct
from experiments.study_14_anchor.report import draw, report_of
from experiments.study_14_anchor.settings import BASES, TASKS, runs
from experiments.study_14_anchor.timing import time_steps, timed

HERE = Path(__file__).parent
SEEDS = (0, 1, 2)
TIMED = {"small": (3, 24), "smollm2": (4, 8), "smollm2x5": (2, 8), "smollm2short": (2, 4)}  # rounds, and turns in each


def bench(base: str, task: str) -> Bench:
    """The rows of a task on a base."""
    settings, read = BASES[base].bench, TASKS[task].read
    return small_bench(settings, read, for_anchors=True) if base == "small" else smollm2_bench(settings, read)


def parts_of(scale: Any) -> list[str]:
    return [
        f"{base}-{method}-{task}" for base in BASES for method in BASES[base].anchors for task in (*TASKS, "timing")
    ]


def make(name: str, part: str) -> None:
    """The runs of a base, a method and a task, or the timing of a base's."""
    base, method, task = part.split("-")
    if task == "timing":
        place = bench(base, "verilog")
        results = StudyResults(HERE / "results.jsonl", f"{base}-timing")
        rounds, turns = TIMED[base]
        for number in range(rounds):
            key = {"round": number, "turns": turns, "method": method}
            results.make(key, lambda: time_steps(timed(base, method), place, turns))
        return
    place, results = bench(base, task), StudyResults(HERE / "results.jsonl", f"{base}-{task}")
    for seed in SEEDS if TASKS[task].round else SEEDS[:1]:
        make_all(runs(base, method, task, seed), place, results)


def report(name: str) -> Report:
    rows = list(StudyResults(HERE / "results.jsonl", "").rows.values())
    return report_of(rows), lambda path: draw(rows, path)


def main(arguments: Sequence[str] | None = None) -> None:
    conduct(__doc__, HERE, LAPTOP, parts=parts_of, make=make, report=report, only="parts", arguments=arguments)

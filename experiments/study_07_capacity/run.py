"""Do small models trained to saturation forget even with replay? One command; finished runs stay.

python -m experiments 07 [--scale laptop|gpu] [--report]
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from experiments.finetunes import StudyResults
from experiments.program import Report, conduct, seeds_of
from experiments.study_07_capacity.report import draw, report
from experiments.study_07_capacity.runs import at_length, at_loss, curve_row, mixture_row, tune, tune_all
from experiments.study_07_capacity.settings import SCALES, Scale

HERE = Path(__file__).parent


def run_seed(scale: Scale, seed: int, results: StudyResults) -> None:
    """Lengths of the smallest, then the other sizes, then the frontier."""
    world, smallest = scale.world, scale.smallest
    curve_row(world, smallest, seed, results)
    for length in scale.lengths:
        tune_all(world, smallest, at_length(world, smallest, length), seed, results)
    for size in (one.name for one in world.sizes):
        curve = curve_row(world, size, seed, results)
        tune_all(world, size, at_loss(world, size, curve, scale.same_loss), seed, results)
    for length in scale.frontier_lengths:
        for coef in scale.frontier_coefs:
            tune(world, smallest, at_length(world, smallest, length), coef, seed, results)
    for share in scale.shares:
        mixture_row(world, smallest, share, seed, results)


def make(name: str, seed: int) -> None:
    run_seed(SCALES[name], seed, StudyResults(HERE / "results.jsonl", name))


def page(name: str) -> Report:
    rows = StudyResults(HERE / "results.jsonl", name).rows_with()
    return report(rows, SCALES[name]), lambda path: draw(rows, SCALES[name], path)


def main(arguments: Sequence[str] | None = None) -> None:
    conduct(__doc__, HERE, SCALES, parts=seeds_of, make=make, report=page, arguments=arguments)

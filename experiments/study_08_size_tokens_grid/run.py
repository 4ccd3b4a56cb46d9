"""How does forgetting depend on size and tokens per parameter together, and how much pretraining does it undo?

python -m experiments 08 [--report]
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from experiments.finetunes import StudyResults
from experiments.program import Report, conduct, seeds_of
from experiments.study_07_capacity.runs import World, at_length, curve_row, tune_all
from experiments.study_07_capacity.settings import SCALES as CAPACITY
from experiments.study_08_size_tokens_grid.report import draw, report

HERE = Path(__file__).parent
SEVENTH = HERE.parent / "study_07_capacity"


@dataclass(frozen=True, kw_only=True)
class Scale:
    """Tokens per parameter of the grid; sizes and how far each goes are the world's."""

    world: World
    lengths: tuple[float, ...]
    seeds: int = 3

    @property
    def cells(self) -> list[tuple[str, float]]:
        return [(size.name, at) for size in self.world.sizes for at in self.lengths if at <= size.most * 1.001]


SCALES = {"laptop": Scale(world=CAPACITY["laptop"].world, lengths=(17.7828, 100, 562.3413), seeds=6)}


def run_seed(scale: Scale, seed: int, results: StudyResults, shared: StudyResults) -> None:
    for size, length in scale.cells:
        curve_row(scale.world, size, seed, results)
        tune_all(scale.world, size, at_length(scale.world, size, length), seed, results, shared=shared)


def make(name: str, seed: int) -> None:
    run_seed(
        SCALES[name], seed, StudyResults(HERE / "results.jsonl", name), StudyResults(SEVENTH / "results.jsonl", name)
    )


def page(name: str) -> Report:
    rows = StudyResults(HERE / "results.jsonl", name).rows_with()
    return report(rows, SCALES[name]), lambda path: draw(rows, SCALES[name], path)


def main(arguments: Sequence[str] | None = None) -> None:
    conduct(__doc__, HERE, SCALES, parts=seeds_of, make=make, report=page, arguments=arguments)

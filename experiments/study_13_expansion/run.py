"""Does a saturated model forget less when it is enlarged, without changing its function, before it is finetuned?

python -m experiments 13 [--report]
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from experiments.finetunes import StudyResults
from experiments.program import Report, conduct, seeds_of
from experiments.study_07_capacity.runs import World, at_length, tune, tune_all
from experiments.study_07_capacity.settings import SCALES as CAPACITY
from experiments.study_13_expansion.report import draw, report

HERE = Path(__file__).parent
SEVENTH = HERE.parent / "study_07_capacity"


@dataclass(frozen=True, kw_only=True)
class Scale:
    """A saturated base, how it is enlarged, and a size to which that comes, pretrained on as many tokens."""

    world: World
    small: str
    tokens_per_param: float
    control: str
    control_tokens_per_param: float
    widened: dict[str, int] = field(default_factory=dict)
    deepened: dict[str, int] = field(default_factory=dict)
    coefs: tuple[float, ...] = (3.0, 10.0)  # of the enlarged models
    seeds: int = 3

    @property
    def arms(self) -> dict[str, tuple[str, float, dict[str, int] | None]]:
        """Base, its tokens per parameter, and how it is enlarged."""
        return {
            "unexpanded": (self.small, self.tokens_per_param, None),
            "widened": (self.small, self.tokens_per_param, self.widened),
            "deepened": (self.small, self.tokens_per_param, self.deepened),
            "control": (self.control, self.control_tokens_per_param, None),
        }


SCALES = {
    "laptop": Scale(
        world=CAPACITY["laptop"].world, small="6400", tokens_per_param=562.3413, control="26e3",
        control_tokens_per_param=133.3521, widened={"hidden_size": 32, "intermediate_size": 88, "num_heads": 2},
        deepened={"num_layers": 5}, seeds=6,
    ),
}  # fmt: skip


def run_seed(scale: Scale, seed: int, results: StudyResults, shared: StudyResults) -> None:
    for size, length, grown in scale.arms.values():
        base = (scale.world, size, at_length(scale.world, size, length))
        how: dict[str, Any] = {"shared": shared, "grown": grown}
        tune(*base, 0.0, seed, results, **how)
        tune_all(*base, seed, results, scale.coefs if grown else None, **how)


def make(name: str, seed: int) -> None:
    run_seed(
        SCALES[name], seed, StudyResults(HERE / "results.jsonl", name), StudyResults(SEVENTH / "results.jsonl", name)
    )


def page(name: str) -> Report:
    rows = StudyResults(HERE / "results.jsonl", name).rows_with()
    return report(rows, SCALES[name]), lambda path: draw(rows, SCALES[name], path)


def main(arguments: Sequence[str] | None = None) -> None:
    conduct(__doc__, HERE, SCALES, parts=seeds_of, make=make, report=page, arguments=arguments)

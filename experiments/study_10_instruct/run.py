"""At the same Verilog loss, which replay keeps most of an instruction-tuned model? One command; finished runs stay.

python -m experiments 10 [--arms 0 1] [--report]

`--arms` counts through every arm of seed 0, then of seed 1, and so on.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path

from experiments.finetunes import StudyResults
from experiments.program import Report, conduct
from experiments.study_10_instruct.report import draw, report
from experiments.study_10_instruct.runs import ARMS, SCALES, workplace

HERE = Path(__file__).parent


def prepare(name: str) -> None:
    """What the arms share is opened once, where some arm is missing; the first that needs own rows samples them."""
    results = StudyResults(HERE / "results.jsonl", name)
    for place in (workplace(name, seed) for seed in range(SCALES[name].seeds)):
        if any(results.get(place.settings(*one)) is None for one in ARMS.items()):
            _ = place.base, place.pools


def make(name: str, part: int) -> None:
    """One arm with one seed."""
    seed, at = divmod(part, len(ARMS))
    place, arm = workplace(name, seed), list(ARMS)[at]
    StudyResults(HERE / "results.jsonl", name).make(place.settings(arm, ARMS[arm]), lambda: place.run(arm, ARMS[arm]))


def page(name: str) -> Report:
    """Of every seed that there is, more than the scale's own, too."""
    results, rows = StudyResults(HERE / "results.jsonl", name), []
    for seed in itertools.count():
        found = [results.get(workplace(name, seed).settings(*one)) for one in ARMS.items()]
        rows += [row for row in found if row is not None]
        if not any(found):
            break
    return report(rows, list(ARMS)), lambda path: draw(rows, path)


def main(arguments: Sequence[str] | None = None) -> None:
    conduct(
        __doc__, HERE, SCALES, parts=lambda scale: range(len(ARMS) * scale.seeds), make=make, report=page,
        only="arms", prepare=prepare, arguments=arguments,
    )  # fmt: skip

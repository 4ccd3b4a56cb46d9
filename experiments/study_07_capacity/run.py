"""Must a small model forget, however long it is finetuned and whatever the coefficient? Finished runs stay.

python -m experiments 07 [--report]

Rule, fixed before the runs. Finetunes on the new language are compared at the same new-task loss, 2.05 nats per token
(1.75 is shown beside it), after the same number of steps. What a base forgets there is the least that its runs with KL
on its own rows (coefficients 0 to 30) say: between two neighbouring coefficients of which one ends below and one above
that loss, linear in the loss; where the largest coefficient ends below, its own, which is then an upper bound.
Intervals are Student's t over three seeds, differences are paired by seed, and 0.02 nats per token or less do not
matter.

- Saturated: the old loss, between bases of 2,000 and of 6,000 tokens per parameter, falls by at most 0.05 nats for a
  tenfold (the mean over seeds). Mixtures of both languages, trained as long, are called converged by the same test on
  the mean of their two losses.
- A floor: the saturated base forgets more than 0.02 nats at 10,000 steps (the low end), and the slope of what it
  forgets over the logarithm of the steps (300 to 10,000) has 0 in its interval. If the slope is below 0, that is
  "cannot tell: it still falls"; if what is forgotten lies below 0.02 (the high end), there is none.
- Room to learn: a base of 20 tokens per parameter forgets less than the saturated one, at 10,000 steps.
- The frontier: after 10,000 steps the saturated base, at coefficients 1 to 30, has an old loss above that of mixtures
  at the same new-task loss (linear between mixtures; runs outside their range are left out), in the mean over
  coefficients.
- Real rows: at coefficient 10 and 10,000 steps they leave as much as self-generated ones, within 0.02 nats.
- The grid: without a penalty a saturated base loses less than one of 20 tokens per parameter (paper: .122 against
  .354), and with KL on real rows, coefficient 10, both lose less than 0.02 nats, at 10,000 steps.
- Expansion: the saturated base, widened to four times the parameters, forgets less than as it is, at 3,000 steps.
- Size: a base of four times the parameters and the same loss forgets less than the saturated one, at 3,000 steps.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from experiments.finetunes import StudyResults
from experiments.program import Report, conduct
from experiments.study_07_capacity.report import draw, text_of
from experiments.study_07_capacity.runs import pretrain, tune_all
from experiments.study_07_capacity.settings import SCALES

HERE = Path(__file__).parent


def results_of(name: str) -> StudyResults:
    return StudyResults(HERE / "results.jsonl", name)


def prepare(name: str) -> None:
    """Bases and mixtures."""
    scale = SCALES[name]
    for length in sorted(scale.lengths, reverse=True):
        pretrain(scale, scale.small, length, results_of(name))


def make(name: str, part: int) -> None:
    """All finetunes of a start."""
    scale = SCALES[name]
    tune_all(scale, *scale.starts[part], results_of(name))


def report(name: str) -> Report:
    rows = results_of(name).rows_with()
    return text_of(rows, SCALES[name]), lambda path: draw(rows, SCALES[name], path)


def main(arguments: Sequence[str] | None = None) -> None:
    conduct(
        __doc__, HERE, SCALES, parts=lambda scale: range(len(scale.starts)), make=make, report=report, only="starts",
        prepare=prepare, arguments=arguments,
    )  # fmt: skip

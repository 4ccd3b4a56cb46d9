"""Study 17: the coefficient that its rule recommends, by numbers that are written down."""

from __future__ import annotations

import pytest

from experiments.study_17_preferences.run import COEFS, finding

KL = {0.0: 0.4, 0.1: 0.3, 0.3: 0.2, 1.0: 0.1, 3.0: 0.04, 10.0: 0.01}


@pytest.mark.parametrize(
    ("learned", "verdict", "words"),
    [
        ({1.0: (0.95, 0.92), 3.0: (0.99, 0.89), 10.0: (0.5, 0.5)}, "yes", "the largest that learns 90% as much is 1:"),
        ({}, "yes, at the end of the grid", "the largest that learns 90% as much is 10:"),
        (dict.fromkeys(COEFS[1:], (0.8, 0.95)), "no: none leaves learning alone", "the smallest, 0.1:"),
    ],
)
def test_the_largest_coefficient_that_leaves_every_seed_its_learning(learned, verdict, words):
    def shares(trainer: str, coef: float) -> list[float]:
        return list(learned.get(coef, (1.0, 1.0)))

    def values(trainer: str, coef: float, measure: str) -> list[float]:
        return [KL[coef], 1.01 * KL[coef]]

    ((said, numbers),) = finding("DPO", shares, values).values()
    assert said == verdict
    assert numbers.startswith(words)
    assert ("75.0% [75.0%, 75.0%] of ref_kl" in numbers) == (verdict == "yes")

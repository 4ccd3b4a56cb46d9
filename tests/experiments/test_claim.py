"""A claim is decided by its interval, by whether the margin holds, and pays for a second look."""

from __future__ import annotations

import doctest
import random

import pytest

from experiments import claim
from experiments.claim import Claim, Interval, over_seeds, ratio_over_seeds


def test_examples() -> None:
    assert doctest.testmod(claim) == (0, 5)


@pytest.mark.parametrize(
    ("differences", "direction", "margin", "verdict"),
    [
        ([-0.2, -0.3, -0.25], -1, 0.0, "reproduced"),
        ([-0.2, -0.3, -0.25], 1, 0.0, "not reproduced"),
        ([-0.2, 0.3, 0.1], 1, 0.0, "cannot tell"),
        ([0.02, 0.01, 0.015], 1, 0.1, "equivalent"),  # surely above 0, and too little to matter
        ([0.02, 0.01, 0.015], 1, 0.02, "direction only"),  # above 0, and no more than what does not matter
        ([0.03, 0.02, 0.025], 1, 0.02, "reproduced"),
        ([0.02, 0.01, 0.015], -1, 0.02, "not reproduced"),
        ([0.02, -0.4, 0.3], 1, 0.1, "cannot tell"),
        ([0.1], 1, 0.5, "direction only"),
    ],
)
def test_a_verdict_follows_interval_and_margin(
    differences: list[float], direction: int, margin: float, verdict: str
) -> None:
    assert Claim(differences, direction, margin).verdict == verdict


def test_two_one_sided_tests_err_in_one_case_of_twenty() -> None:
    """Differences that are just as large as the margin are called equivalent in 5% of studies."""
    rng = random.Random(0)
    found = [Claim([rng.gauss(1.0, 0.3) for _ in range(6)], margin=1.0).equivalent for _ in range(1000)]
    assert sum(found) / len(found) == pytest.approx(0.05, abs=0.02)


def test_seeds_added_after_a_look_pay_for_it() -> None:
    values = [-0.1, 0.1, 0.6, 0.5, 0.6, 0.5]
    again = Claim(values, first_look=3)
    assert again.estimate.low > 0 > again.interval.low
    assert (Claim(values).agrees, again.agrees, Claim(values[:3], first_look=3).looks) == (1, 0, 1)
    assert "seeds 3 to 5, added after the first, alone 0.533 [0.390, 0.677]" in again.later_seeds
    assert Claim(values[:4], first_look=3).later_seeds == "", "one seed has no interval"


def test_intervals() -> None:
    assert str(ratio_over_seeds([1.0, 4.0, 2.0])) == "2.000 [0.357, 11.190]"
    assert over_seeds([1.0]) == (1.0, 1.0, 1.0)
    assert Interval(1.0, 0.5, 1.5).widened(Interval(9.0, 0.7, 2.0)) == (1.0, 0.5, 2.0)
    assert claim.share_text(0, 0) == "–"


def test_as_much_is_within_the_margin_and_not_as_much_beyond_it() -> None:
    said = {one: Claim([one, one + 0.004, one - 0.004], margin=0.05).alike for one in (0.01, 0.05, 0.2, -0.2)}
    assert said == {0.01: "reproduced", 0.05: "cannot tell", 0.2: "not reproduced", -0.2: "not reproduced"}

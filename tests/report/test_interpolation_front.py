"""Which weights between base and tuned model are taken, on curves made by hand."""

from __future__ import annotations

import re
from collections.abc import Mapping

import numpy as np
import pytest

from retain import InterpolationFront
from retain.report.numbers import Estimate
from retain.report.page import terminal_table
from retain.report.results import KeptSums, RunResults, TextResult
from retain.report.style import frontier_row
from retain.statistics import bootstrap_ratio

SIZES = np.arange(40.0, 60.0)  # tokens of each document


def estimate(sums: np.ndarray) -> Estimate:
    value, low, high = bootstrap_ratio(sums, SIZES[: len(sums)], num_resamples=200)
    return Estimate(value, None if np.isnan(low) else (low, high), len(sums))


def measured(
    gains: Mapping[float, float], moved: Mapping[float, float] | None = None, *, spread: float = 0.0, count: int = 20
) -> dict[float, RunResults]:
    """At each α a gain and a divergence (by default α) in nats per token, scattered over documents by `spread`."""
    runs = {}
    for at, (alpha, gain) in enumerate(gains.items()):
        noise = np.random.default_rng(at).normal(0, spread * bool(alpha), count)
        sizes = SIZES[:count]
        sums = (gain + noise - noise.mean()) * sizes
        kl = (moved[alpha] if moved else alpha) * (1 + noise) * sizes
        kept = KeptSums(kl.tolist(), (4 * sizes - sums).tolist(), (4 * sizes).tolist(), sizes.tolist())
        learned = TextResult({"gain": estimate(sums), "loss": estimate(4 * sizes - sums)})
        runs[alpha] = RunResults(
            f"alpha {alpha:g}",
            {"replay": TextResult({"ref_kl": estimate(kl)})},
            new_task={"sql": learned},
            per_document={"sql": kept},
            settings={"num_resamples": 200, "seed": 0},
        )
    return runs


def front(*curves: Mapping[float, float], **options: float) -> InterpolationFront:
    return InterpolationFront.of(measured(*curves, **options))


CURVE = {0.0: 0.0, 0.2: 0.5, 0.4: 0.9, 0.6: 0.96, 0.8: 0.99, 1.0: 1.0}
BEYOND = {0.0: 0.0, 0.2: 0.97, 0.4: 0.9, 0.6: 1.2, 0.8: 1.1, 1.0: 1.0}  # more is learned between than at the end


@pytest.mark.parametrize(
    ("curve", "share", "alpha"),
    [
        (CURVE, 0.95, 0.6),
        (CURVE, 0.9, 0.4),
        (CURVE, 1.0, 1.0),
        (CURVE, 1e-9, 0.2),
        (BEYOND, 0.95, 0.2),
        (BEYOND, 1.0, 0.6),
    ],
)
def test_what_moved_least_of_what_keeps_the_gain(curve: dict[float, float], share: float, alpha: float) -> None:
    assert front(curve).keeping_gain(share).alpha == alpha


def test_the_interval_decides_where_there_is_one() -> None:
    assert front(CURVE, spread=0.02).keeping_gain(0.95).alpha == 0.8, "0.96 of the gain, more or less"
    assert front(CURVE, count=1).keeping_gain(0.95).alpha == 0.6, "one document has no interval"
    kept = front(CURVE, spread=0.02).points[-1].kept["sql"]
    assert (kept.value, kept.ci) == (1.0, (1.0, 1.0)), "paired: the model keeps all of its own gain"


def test_where_nothing_was_learned_there_is_no_gain_to_keep() -> None:
    for curve, spread in (({0.0: 0.0, 0.5: 0.2, 1.0: -0.1}, 0.0), ({0.0: 0.0, 0.5: 0.0, 1.0: 0.01}, 0.2)):
        found = front(curve, spread=spread)
        assert not any(point.kept for point in found.points)
        with pytest.raises(ValueError, match=r"^new_task: 'sql' shows no gain to keep, .* on 20 documents; give more"):
            found.keeping_gain(0.5)


MOVED = {0.0: 0.0, 0.2: 0.01, 0.4: 0.04, 0.6: 0.02, 0.8: 0.3, 1.0: 0.5}


@pytest.mark.parametrize(("limit", "alpha"), [(0.5, 1.0), (0.35, 0.8), (0.04, 0.6), (0.015, 0.2)])
def test_the_least_loss_within_a_divergence(limit: float, alpha: float) -> None:
    assert front(CURVE, MOVED).within(limit + 1e-9).alpha == alpha


def test_the_upper_end_of_the_interval_must_be_within() -> None:
    assert front(CURVE, MOVED, spread=0.5).within(0.31).alpha == 0.6
    assert front(CURVE, MOVED, spread=0.5).within(0.45).alpha == 0.8


BEST_BETWEEN = {0.0: 0.0, 0.2: 0.5, 0.4: 0.9, 0.6: 1.3, 0.8: 1.1, 1.0: 1.0}


@pytest.mark.parametrize(
    ("gains", "factor", "kept", "within"),
    [
        (CURVE, 0.5, ("mean", 0.6), ("mean", 1.0)),  # as much learned at half of the divergence
        (CURVE, 2.0, ("model", 0.6), ("model", 0.4)),
        (CURVE, 1.0, ("model", 0.6), ("model", 0.4)),  # alike: the model
        ({alpha: 0.94 * gain for alpha, gain in CURVE.items()}, 0.1, ("model", 0.6), ("mean", 1.0)),  # never 95%
        (BEST_BETWEEN, 0.8, ("mean", 0.6), ("mean", 0.6)),
    ],
)
def test_the_mean_of_checkpoints_is_chosen_where_it_is_the_better_end(
    gains: dict[float, float], factor: float, kept: tuple[str, float], within: tuple[str, float]
) -> None:
    mean = measured(gains, {alpha: factor * alpha for alpha in gains})
    both = InterpolationFront.of(measured(CURVE), {"mean": mean})
    found = both.keeping_gain(0.95), both.within(0.5 + 1e-9)
    assert [(one.end, one.alpha) for one in found] == [kept, within]
    lines = terminal_table(both.table)
    assert [line.strip() for line in lines if "alpha" in line] == ["alpha", "alpha, mean"]
    (panel,) = both.panels(found[0])
    assert [len(line.x) for line in panel.lines] == [6, 6, 1]


def test_the_base_itself_is_no_choice() -> None:
    with pytest.raises(ValueError, match=r"^max_ref_kl: 0.001 is already exceeded at alpha 0.2, where ref_kl is 0.010"):
        front(CURVE, MOVED).within(0.001)


def test_table_and_figure_show_every_alpha() -> None:
    found = front(CURVE, MOVED, spread=0.02)
    lines = terminal_table(found.table)
    assert [line.split()[0] for line in lines[2:-1]] == ["0", "0.2", "0.4", "0.6", "0.8", "1"]
    assert re.split(r"\s{2,}", lines[0].strip()) == ["loss, sql", "gain kept, sql", "ref_kl, replay"]
    assert re.match(r"  0.6 +3.04\d \[.*\] +96.\d% \[.*\] +0.020 \[", lines[5])
    (panel,) = found.panels(found.points[3])
    curve, chosen = panel.lines
    assert (list(curve.x)[::5], list(curve.y)[::5]) == (
        pytest.approx([4.0, 3.0], rel=1e-3),
        pytest.approx([0.0, 0.5], rel=0.1),
    )
    assert (chosen.x[0], chosen.y[0]) == (curve.x[3], curve.y[3])
    assert frontier_row([panel], 2) is not None

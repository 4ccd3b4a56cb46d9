"""Intervals: the value by hand, pairing by seed, coverage on synthetic documents."""

from __future__ import annotations

import math

import numpy as np
import pytest

from retain.statistics import bootstrap_ratio, mcnemar, resample_counts, share_interval


def test_value_is_the_ratio_of_sums_not_the_mean_of_ratios():
    value, low, high = bootstrap_ratio([1.0, 9.0], [1, 3])
    assert value == 10 / 4
    assert low == 1.0  # two of the first
    assert high == 3.0  # two of the second


def test_interval_equals_a_naive_bootstrap():
    nats, tokens = np.array([3.0, 5.0, 1.0, 8.0]), np.array([2.0, 4.0, 1.0, 5.0])
    ratios = []
    for counts in resample_counts(4, 500, seed=3):
        picked = [i for i in range(4) for _ in range(counts[i])]
        assert len(picked) == 4
        ratios.append(sum(nats[i] for i in picked) / sum(tokens[i] for i in picked))
    _, low, high = bootstrap_ratio(nats, tokens, num_resamples=500, level=0.9, seed=3)
    assert (low, high) == pytest.approx(tuple(np.quantile(ratios, [0.05, 0.95])))


def test_one_document_has_a_value_and_no_interval():
    value, low, high = bootstrap_ratio([6.0], [4])
    assert value == 1.5
    assert math.isnan(low)
    assert math.isnan(high)


def test_identical_documents_have_an_interval_of_no_width():
    assert bootstrap_ratio([2.0] * 5, [4] * 5) == (0.5, 0.5, 0.5)


def test_the_same_seed_resamples_the_same_documents_whatever_is_measured():
    """So two runs on the same documents are paired: the interval of a shifted run is the shifted interval."""
    rng = np.random.default_rng(0)
    nats, tokens = rng.gamma(2.0, size=30), np.full(30, 7)
    first = bootstrap_ratio(nats, tokens, seed=5)
    shifted = bootstrap_ratio(nats + 0.25 * tokens, tokens, seed=5)
    assert shifted == pytest.approx([value + 0.25 for value in first])
    assert bootstrap_ratio(nats, tokens, seed=6)[1:] != first[1:]
    np.testing.assert_array_equal(resample_counts(30, 10, 5), resample_counts(30, 10, 5))


def test_interval_covers_the_truth_about_as_often_as_it_says():
    """Documents of unequal length whose loss varies between documents: 40 documents, nominal 95%.

    A percentile interval over documents is somewhat narrow at this size; one over tokens covers far less.
    """
    rng, truth, trials = np.random.default_rng(7), 2.0, 300
    hits = naive_hits = 0
    for trial in range(trials):
        tokens = rng.integers(20, 200, size=40)
        nats = tokens * (truth + rng.normal(scale=0.5, size=40)) + rng.normal(size=40) * np.sqrt(tokens)
        value, low, high = bootstrap_ratio(nats, tokens, num_resamples=400, seed=trial)
        hits += low <= truth <= high
        spread = 1.96 * math.sqrt(1.25 / tokens.sum())  # as if every token were independent
        naive_hits += abs(value - truth) <= spread
    assert 0.90 <= hits / trials <= 0.98
    assert naive_hits / trials < 0.5


def test_mcnemar_equals_the_enumeration_of_every_split():
    """All 2^n ways in which n changed answers can be lost or won, each as likely as any other."""
    for total in range(9):
        splits = [bin(way).count("1") for way in range(2**total)]
        for lost in range(total + 1):
            as_uneven = [abs(found - total / 2) >= abs(lost - total / 2) for found in splits]
            assert mcnemar(lost, total - lost) == pytest.approx(sum(as_uneven) / 2**total)


@pytest.mark.parametrize(("lost", "won"), [(0, 0), (3, 3), (37, 12), (12, 37), (500, 400), (9000, 5000), (1, 1200)])
def test_mcnemar_equals_the_exact_binomial_test(lost, won):
    stats = pytest.importorskip("scipy.stats")
    expected = stats.binomtest(lost, lost + won).pvalue if lost + won else 1.0
    assert mcnemar(lost, won) == pytest.approx(expected, rel=1e-9)


def test_mcnemar_rejects_about_as_often_as_it_says():
    """Where nothing was lost on balance: at most 5%, since the test is exact and its steps are coarse."""
    rng = np.random.default_rng(0)
    rejected = np.mean([mcnemar(lost, 40 - lost) < 0.05 for lost in rng.binomial(40, 0.5, size=2000)])
    assert 0.01 < rejected <= 0.05


@pytest.mark.parametrize(("count", "total"), [(0, 5), (5, 5), (1, 1), (67, 100), (786, 1172)])
def test_the_interval_of_a_share_is_wilsons(count, total):
    stats = pytest.importorskip("scipy.stats")
    expected = stats.binomtest(count, total).proportion_ci(0.95, method="wilson")
    found = share_interval(count, total)
    assert found == pytest.approx((count / total, expected.low, expected.high), abs=1e-9)
    assert found[1] <= found[0] <= found[2]


def test_the_interval_of_a_share_covers_the_truth_about_as_often_as_it_says():
    rng = np.random.default_rng(1)
    for truth, size in ((0.67, 200), (0.97, 100)):
        found = [share_interval(count, size) for count in rng.binomial(size, truth, size=1000).tolist()]
        assert 0.92 <= np.mean([low <= truth <= high for _, low, high in found]) <= 0.98

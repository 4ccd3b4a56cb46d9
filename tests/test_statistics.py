"""Intervals: the value by hand, pairing by seed, coverage on synthetic documents."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from retain.statistics import (
    bootstrap_ratio,
    mcnemar,
    paired_change_interval,
    resample_counts,
    share_interval,
)


def test_value_is_the_ratio_of_sums_not_the_mean_of_ratios():
    value, low, high = bootstrap_ratio([1.0, 9.0], [1, 3])
    assert value == 10 / 4
    half = 12.706 * math.sqrt(1 / 2 * ((-1.5 / 0.75) ** 2 + (1.5 / 0.25) ** 2)) / 4  # Student's t of one degree
    assert (low, high) == pytest.approx((value - half, value + half), rel=1e-4)


def naive_interval(nats, tokens, level, resamples):
    """Document by document: the bootstrap-t interval as its docstring says it."""
    size, value = len(nats), sum(nats) / sum(tokens)

    def standard_error(nats, tokens):
        ratio = sum(nats) / sum(tokens)
        squares = sum((n - ratio * t) ** 2 for n, t in zip(nats, tokens, strict=True))
        return math.sqrt(size / (size - 1) * squares) / sum(tokens)

    errors = []
    for counts in resamples.astype(int):
        picked = [i for i in range(size) for _ in range(counts[i])]
        assert len(picked) == size
        own, sizes = [nats[i] for i in picked], [tokens[i] for i in picked]
        alone = len(set(picked)) == 1
        errors.append(0.0 if alone else (sum(own) / sum(sizes) - value) / standard_error(own, sizes))
    student = stats.t.ppf((1 + level) / 2, size - 1)
    low, high = np.quantile(np.clip(errors, -3 * student, 3 * student), [(1 - level) / 2, (1 + level) / 2])
    left_out = [
        (n - value * t) / (1 - t / sum(tokens)) / sum(tokens) for n, t in zip(nats, tokens, strict=True)
    ]  # how far the ratio moves without a document, to first order
    error, widened = math.sqrt((size - 1) / size * sum(x * x for x in left_out)), math.sqrt(size / (size - 1))
    return value - max(widened * high, student) * error, value + max(-widened * low, student) * error


@pytest.mark.parametrize("tokens", [[2.0, 4.0, 1.0, 5.0, 3.0, 3.0], [5.0] * 6, [1.0, 40.0, 1.0, 2.0, 3.0, 1.0]])
def test_interval_equals_a_naive_bootstrap(tokens):
    nats = np.array([3.0, 5.0, 1.0, 8.0, 2.0, 9.0])
    expected = naive_interval(nats, tokens, 0.9, resample_counts(6, 500, seed=3))
    _, low, high = bootstrap_ratio(nats, tokens, num_resamples=500, level=0.9, seed=3)
    assert (low, high) == pytest.approx(expected)
    assert (low, high) == pytest.approx(bootstrap_ratio(nats, tokens, counts=resample_counts(6, 500, 3), level=0.9)[1:])


def test_interval_keeps_to_what_a_ratio_can_be():
    nats, tokens = [0.0, 0.0, 0.1, 0.0, 9.0], [10, 12, 9, 30, 11]
    assert bootstrap_ratio(nats, tokens)[1] < 0
    value, low, high = bootstrap_ratio(nats, tokens, within=(0.0, 1.0))
    assert (low, high) == (0.0, min(1.0, bootstrap_ratio(nats, tokens)[2]))
    assert low < value < high


@pytest.mark.filterwarnings("error")
def test_documents_without_a_size_give_no_warning():
    """As of `prevented`, where the plain run did not move on some documents."""
    value, low, high = bootstrap_ratio([0.0, 1.0, 3.0, 0.0, 2.0], [0, 2, 2, 0, 3])
    assert value == 6 / 7
    assert low < value < high
    for nats, tokens, expected in (([6.0], [4], 1.5), ([0.0, 1.0], [0, 2], 0.5), ([0.0, 0.0], [0, 0], math.nan)):
        assert bootstrap_ratio(nats, tokens) == pytest.approx((expected, math.nan, math.nan), nan_ok=True)


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


# What is measured on a document of some tokens, nats (or agreeing tokens) per token, and its mean.
DOCUMENTS = {
    "loss": (
        lambda rng, tokens: 3 + rng.normal(0, 0.5, tokens.shape) + rng.normal(size=tokens.shape) / tokens**0.5,
        3.0,
    ),
    "difference": (lambda rng, tokens: 0.1 + rng.normal(0, 0.2, tokens.shape), 0.1),
    "skewed difference": (
        lambda rng, tokens: rng.gamma(1.0, 0.3, tokens.shape) - 0.2 + rng.normal(0, 0.2, tokens.shape),
        0.1,
    ),
    "KL": (lambda rng, tokens: rng.gamma(2.0, 0.1, tokens.shape) * rng.gamma(tokens / 5, 5 / tokens), 0.2),
    "skewed KL": (lambda rng, tokens: rng.gamma(1.0, 0.2, tokens.shape), 0.2),
    "heavy KL": (lambda rng, tokens: 0.2 * rng.lognormal(-0.32, 0.8, tokens.shape), 0.2),
    "share": (lambda rng, tokens: rng.binomial(tokens, rng.beta(18, 2, tokens.shape)) / tokens, 0.9),
}


def coverage(kind: str, num_documents: int, data_sets: int, spread: float = 0.8, resamples: int = 2000) -> float:
    """Share of simulated data sets whose 95% interval holds the truth; tokens are lognormal, at least 8 a document."""
    rng = np.random.default_rng([7, num_documents])
    values_of, truth = DOCUMENTS[kind]
    counts, hits = resample_counts(num_documents, resamples, seed=0), 0
    for _ in range(data_sets):
        tokens = np.maximum(8, np.round(200 * rng.lognormal(0, spread, num_documents))).astype(int)
        _, low, high = bootstrap_ratio(tokens * values_of(rng, tokens), tokens, counts=counts)
        hits += low <= truth <= high
    return hits / data_sets


@pytest.mark.parametrize(("kind", "num_documents"), [("KL", 16), ("difference", 10)])
def test_coverage_of_few_documents_with_lognormal_lengths(kind, num_documents):
    assert 0.92 <= coverage(kind, num_documents, 1500, resamples=400) <= 0.98


@pytest.mark.slow
@pytest.mark.parametrize("kind", sorted(set(DOCUMENTS) - {"heavy KL"}))
@pytest.mark.parametrize("num_documents", [10, 16, 24, 48, 100])
def test_the_table_of_coverage(kind, num_documents, capsys):
    """The table of docs/measuring.md; heavy tails are covered less often, as it says."""
    found = coverage(kind, num_documents, 4000)
    with capsys.disabled():
        print(f"\n{kind}, {num_documents} documents: {found:.3f}")
    assert 0.93 <= found <= 0.97


@pytest.mark.slow
@pytest.mark.parametrize(("num_documents", "least"), [(10, 0.90), (24, 0.92), (100, 0.93)])
def test_the_coverage_of_heavy_tails(num_documents, least):
    assert least <= coverage("heavy KL", num_documents, 4000) <= 0.97


@pytest.mark.parametrize(
    ("lost", "won", "total"),
    [(0, 0, 12), (1, 2, 50), (9, 0, 50), (0, 5, 22), (3, 7, 20), (12, 0, 12)],
)
def test_the_interval_of_a_paired_change_is_tangos(lost, won, total):
    """The ends are where the score statistic, its nuisance share found by search, is ±z."""
    value, low, high = paired_change_interval(lost, won, total)
    assert value == (won - lost) / total
    assert -1 <= low <= value <= high <= 1
    for end, sign in ((low, 1), (high, -1)):
        if abs(end) < 1:
            shares = np.linspace(max(0.0, -end), (1 - end) / 2, 400_001)[1:-1]  # of lost; won has `end` more
            with np.errstate(divide="ignore"):
                likelihood = won * np.log(shares + end) + lost * np.log(shares)
                likelihood += (total - lost - won) * np.log(1 - 2 * shares - end)
            share = shares[likelihood.argmax()]
            score = (won - lost - total * end) / math.sqrt(total * (2 * share + end * (1 - end)))
            assert score == pytest.approx(sign * 1.96, abs=2e-3)


def test_twelve_unchanged_questions_leave_a_change_open():
    value, low, high = paired_change_interval(0, 0, 12)
    assert (value, low, high) == pytest.approx((0.0, -share_interval(0, 12)[2], share_interval(0, 12)[2]))
    assert round(high, 3) == 0.242


def test_the_interval_of_a_paired_change_covers_the_truth_about_as_often_as_it_says():
    rng = np.random.default_rng(2)
    for lost, won, size in ((0.1, 0.05, 40), (0.02, 0.02, 100), (0.3, 0.2, 24)):
        splits = rng.multinomial(size, [lost, won, 1 - lost - won], size=1000).tolist()
        found = [paired_change_interval(less, more, size)[1:] for less, more, _ in splits]
        assert 0.93 <= np.mean([low <= won - lost <= high for low, high in found]) <= 0.99


def test_mcnemar_equals_the_enumeration_of_every_split():
    """All 2^n ways in which n changed answers can be lost or won, each as likely as any other."""
    for total in range(9):
        splits = [bin(way).count("1") for way in range(2**total)]
        for lost in range(total + 1):
            as_uneven = [abs(found - total / 2) >= abs(lost - total / 2) for found in splits]
            assert mcnemar(lost, total - lost) == pytest.approx(sum(as_uneven) / 2**total)


@pytest.mark.parametrize(("lost", "won"), [(0, 0), (3, 3), (37, 12), (12, 37), (500, 400), (9000, 5000), (1, 1200)])
def test_mcnemar_equals_the_exact_binomial_test(lost, won):
    expected = stats.binomtest(lost, lost + won).pvalue if lost + won else 1.0
    assert mcnemar(lost, won) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize(("count", "total"), [(0, 5), (5, 5), (1, 1), (67, 100), (786, 1172)])
def test_the_interval_of_a_share_is_wilsons(count, total):
    expected = stats.binomtest(count, total).proportion_ci(0.95, method="wilson")
    found = share_interval(count, total)
    assert found == pytest.approx((count / total, expected.low, expected.high), abs=1e-9)
    assert found[1] <= found[0] <= found[2]

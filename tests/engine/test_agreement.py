"""Agreement of two score lists: its figures, and the bounds that decide whether it is enough."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats as scipy_stats
from sklearn.metrics import ndcg_score

from echelon.engine.agreement import (
    MIN_TAU,
    Agreement,
    agreement,
    kendall_tau,
    mean_bounds,
    ndcg,
    top_overlap,
)

LOGITS = st.lists(st.integers(-50, 50), min_size=2, max_size=30)


@given(LOGITS, st.randoms())
def test_kendalls_tau_is_scipys(first, shuffler):
    second = list(first)
    shuffler.shuffle(second)
    expected = scipy_stats.kendalltau(first, second).statistic
    got = kendall_tau(np.array(first, np.float32), np.array(second, np.float32))
    assert got == pytest.approx(1.0 if np.isnan(expected) else expected)


@given(st.lists(st.tuples(st.integers(-50, 50), st.integers(0, 3)), min_size=2, max_size=30))
def test_ndcg_is_scikit_learns(judged):
    grades = [grade for _, grade in judged]
    # Distinct scores: the two differ in how they treat ties.
    scores = np.array([score + i / 100 for i, (score, _) in enumerate(judged)], np.float32)
    gains = np.array([[2.0**grade - 1 for grade in grades]])
    assert ndcg(scores, grades) == pytest.approx(ndcg_score(gains, scores[None, :], k=10))


def test_overlap_counts_the_shared_top():
    first = np.arange(20, dtype=np.float32)
    second = first.copy()
    second[[0, 19]] = second[[19, 0]]
    assert top_overlap(first, second) == 0.9
    assert top_overlap(first[:3], -first[:3]) == 1.0


def test_many_queries_that_agree_prove_it_and_one_that_reverses_fails():
    logits = [np.linspace(-5, 5, 12, dtype=np.float32)]
    grades = [[0] * 9 + [3, 2, 3]]
    assert not agreement(logits, [logits[0] + 0.01], grades).proven
    assert agreement(logits * 24, [logits[0] + 0.01] * 24, grades * 24).passed
    worse = agreement(logits * 24, [-logits[0]] * 24, grades * 24)
    assert worse.failed
    assert not worse.passed
    assert (worse.tau, worse.max_delta) == (-1.0, 10.0)
    assert worse.ndcg_loss > 0.3


def test_agreement_needs_every_criterion():
    sure = Agreement(1.0, 1.0, 0.1, 0.0, 0.98, 1.0, 0.98, 1.0)
    assert sure.passed
    assert replace(sure, ndcg_loss=None).passed
    for change in ({"tau_low": 0.96}, {"overlap_low": 0.96}, {"ndcg_loss": 0.006}):
        assert not replace(sure, **change).passed
        assert not replace(sure, **change).failed
    for change in ({"tau_high": 0.96}, {"overlap_high": 0.96}):
        assert replace(sure, tau_low=0.9, **change).failed


VALUES = st.lists(st.floats(-1, 1), min_size=1, max_size=30)


@settings(max_examples=25)
@given(VALUES, st.integers(0, 29))
def test_bounds_enclose_the_mean_and_fall_with_a_value(values, index):
    low, high = mean_bounds(values, 0.1)
    assert -1 <= low <= np.mean(values) + 1e-9
    assert np.mean(values) - 1e-9 <= high <= 1
    worse = [*values]
    worse[index % len(values)] = -1.0
    below = mean_bounds(worse, 0.1)
    assert below[0] <= low + 1e-9
    assert below[1] <= high + 1e-9


def test_equal_values_prove_more_the_more_there_are():
    lows = [mean_bounds([1.0] * count, 0.1)[0] for count in (8, 12, 64)]
    assert lows[0] < MIN_TAU < lows[1] < lows[2] < 1
    assert mean_bounds([1.0] * 12, 0.1)[1] == 1


def decided(values: np.ndarray) -> str:
    """What looks after 12, 24, … values say of a threshold of 0.97."""
    count = 12
    while True:
        low, high = mean_bounds(values[:count].tolist(), 0.03)
        if low >= MIN_TAU or high < MIN_TAU:
            return "passed" if low >= MIN_TAU else "failed"
        if count == len(values):
            return "unknown"
        count = min(2 * count, len(values))


@pytest.mark.parametrize(("mean", "wrong"), [(0.9695, "passed"), (0.9705, "failed")])
def test_the_looks_together_are_seldom_wrong(mean, wrong):
    """At the threshold's very edge, where errors are most frequent: at most one in twenty."""
    chance = np.random.default_rng(5)
    steps = np.array([0.0, 1.0, 2.0, 3.0, 5.0])
    shares = np.array([0.4, 0.3, 0.15, 0.1, 0.05])
    unit = (1 - mean) / float(steps @ shares)
    runs, errors = 120, 0
    for _ in range(runs):
        errors += decided(1 - unit * chance.choice(steps, 48, p=shares)) == wrong
    # More than this happens by chance once in ten thousand where one in twenty is wrong.
    assert errors <= scipy_stats.binom.ppf(0.9999, runs, 0.05)

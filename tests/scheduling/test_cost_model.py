"""Step times are predicted and learned; a lasting change of speed is reported once."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from echelon.scheduling.cost_model import (
    FAR,
    HOLD,
    NEAR,
    REMEMBERED_STEPS,
    Coefficients,
    CostModel,
    Drift,
    Work,
)
from echelon.scheduling.packing import MAX_FILL, choose, step_cost

lengths = st.lists(st.integers(1, 500), min_size=1, max_size=30)
levels = st.floats(0.01, 100)
COEFFICIENTS = Coefficients(2.0, 0.1, 0.01)


def test_ragged_steps_pay_for_tokens_and_padded_ones_for_the_longest():
    assert CostModel(COEFFICIENTS).predict([10, 20]) == pytest.approx(2 + 0.1 * 30 + 0.01 * 500)
    padded = CostModel(COEFFICIENTS, "rectangular").predict([10, 20])
    assert padded == pytest.approx(2 + 0.1 * 40 + 0.01 * 800)
    assert CostModel(COEFFICIENTS).predict([]) == 2
    assert CostModel(COEFFICIENTS).seconds(Work(3, 100, 0)) == pytest.approx(16)


def test_tokens_beyond_the_knee_cost_more_in_one_step_and_in_many():
    knee = Coefficients(2.0, 0.1, 0.0, knee_tokens=100, beyond_s=0.5)
    assert CostModel(knee).predict([100]) == pytest.approx(12)
    assert CostModel(knee).predict([70, 50]) == pytest.approx(14 + 0.5 * 20)
    assert CostModel(knee).seconds(Work(3, 360, 0)) == pytest.approx(3 * 24)
    assert CostModel(Coefficients(2.0, 0.1, 0.0, beyond_s=0.5)).predict([100]) == pytest.approx(12)


@given(lengths, st.floats(0.01, 100))
def test_after_one_step_the_level_is_right(sizes, factor):
    model = CostModel()
    model.observe(sizes, factor * CostModel().predict(sizes))
    assert model.predict(sizes) == pytest.approx(factor * CostModel().predict(sizes))


def test_a_machine_that_changes_its_speed_is_followed_and_outliers_are_not():
    model = CostModel(COEFFICIENTS)
    plain = CostModel(COEFFICIENTS).predict([20] * 10)
    for _ in range(50):
        model.observe([20] * 10, plain)
    for _ in range(REMEMBERED_STEPS // 2):
        model.observe([20] * 10, 100 * plain)
        assert model.scale == pytest.approx(1)
        assert model.predict([20] * 10) == pytest.approx(plain, rel=0.02)
    for _ in range(REMEMBERED_STEPS):
        model.observe([20] * 10, plain)
    for _ in range(REMEMBERED_STEPS // 2 + 1):
        model.observe([20] * 10, 2 * plain)
    assert model.scale == pytest.approx(2)
    assert model.predict([20] * 10) == pytest.approx(2 * plain, rel=0.02)


def test_tiny_steps_have_little_say():
    model = CostModel(Coefficients(1e-6, 1e-4, 0.0))
    for _ in range(5):
        model.observe([10], 0.05)
    model.observe([100] * 20, 0.3)
    assert model.predict([100] * 20) == pytest.approx(0.3, rel=0.01)


@pytest.mark.parametrize("seconds", [0.0, -1.0, math.nan, math.inf])
def test_impossible_times_teach_nothing(seconds):
    model = CostModel()
    model.observe([10], seconds)
    assert model.scale == 1


@given(
    lengths,
    st.integers(1, 3000),
    st.none() | st.integers(1, 8),
    st.sampled_from(["none", "rectangular"]),
)
def test_a_choice_holds_the_first_and_obeys_the_limits(sizes, budget, max_pairs, cost):
    chosen = choose(sizes, budget, max_pairs, cost)
    assert chosen == sorted(set(chosen))
    assert chosen[0] == 0
    picked = [sizes[index] for index in chosen]
    assert step_cost(picked, cost) <= budget or len(chosen) == 1
    assert max_pairs is None or len(chosen) <= max_pairs
    if cost == "rectangular" and len(chosen) > 1:
        assert min(picked) >= MAX_FILL * max(picked)


@given(lengths, st.integers(1, 3000))
def test_a_ragged_choice_leaves_nothing_out_that_fits(sizes, budget):
    chosen = choose(sizes, budget, None, "none")
    left = budget - sum(sizes[index] for index in chosen)
    assert all(index in chosen or size > left for index, size in enumerate(sizes))


def test_a_padded_choice_fills_the_step_with_the_firsts_kind():
    assert choose([100, 20, 95, 500, 99], 400, None, "rectangular") == [0, 2, 4]
    assert choose([10, 500], 2048, None, "rectangular") == [0]
    assert choose([100] * 9, 400, None, "rectangular") == [0, 1, 2, 3]
    assert choose([90, 100, 100, 100], 400, None, "rectangular") == [0, 1, 2, 3]


@pytest.mark.parametrize("factor", [FAR * 1.01, 1 / FAR / 1.01, 2.0, 0.1])
def test_a_lasting_change_is_reported_once_and_its_end_once(factor):
    drift = Drift(1.0)
    changes = [drift.see(factor) for _ in range(5 * HOLD)]
    assert changes.index("drifted") == HOLD - 1
    assert changes.count(None) == len(changes) - 1
    assert drift.drifted
    assert drift.ratio == pytest.approx(factor, rel=1e-3)
    changes = [drift.see(1.0) for _ in range(5 * HOLD)]
    assert changes.index("recovered") == HOLD - 1
    assert changes.count(None) == len(changes) - 1
    assert drift.ratio == pytest.approx(1, rel=1e-3)


def test_a_busy_minute_is_no_drift_and_between_the_limits_nothing_changes():
    drift = Drift(1.0)
    assert all(drift.see(3.0 if i % HOLD else 1.0) is None for i in range(1, 10 * HOLD))
    for _ in range(HOLD):
        drift.see(2.0)
    assert drift.drifted
    assert all(drift.see((FAR + NEAR) / 2) is None for _ in range(3 * HOLD))
    assert drift.drifted


@given(levels)
def test_without_a_profile_the_first_steps_are_what_is_normal(level):
    drift = Drift()
    assert all(drift.see(level) is None for _ in range(3 * HOLD))
    assert drift.ratio == pytest.approx(1)
    assert [drift.see(2 * level) for _ in range(HOLD)][-1] == "drifted"


@given(st.lists(levels, max_size=400))
def test_changes_alternate_and_are_rare(seen):
    drift = Drift(1.0)
    changes = [found for level in seen if (found := drift.see(level))]
    assert changes == ["drifted", "recovered"] * (len(changes) // 2) + ["drifted"] * (
        len(changes) % 2
    )
    assert len(changes) <= len(seen) / HOLD
    assert drift.ratio > 0

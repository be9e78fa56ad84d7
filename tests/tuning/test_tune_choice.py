"""Statistics, agreement between precisions, and the choice of settings."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats as scipy_stats

from echelon.reports.statistics import (
    ENOUGH,
    TIE,
    KnownValue,
    Ratio,
    median_interval,
    student,
    summarize,
    verdict,
)
from echelon.tuning.choice import (
    best_batches,
    best_budget,
    best_of,
    disturbances,
    frugal,
    scenario_advice,
)
from echelon.tuning.load import Disturbance
from echelon.tuning.sweep import MeasuredPoint, SweepPoint
from echelon.tuning.time_plan import RUNS, more_points


@given(st.integers(1, 200))
def test_the_interval_of_the_median_is_scipys(count):
    samples = np.arange(count, dtype=float)
    interval = scipy_stats.quantile_test(samples, q=0, p=0.5).confidence_interval(0.95)
    ranks = median_interval(count)
    if ranks is None:
        assert np.isnan(interval.low)
        assert np.isnan(interval.high)
    else:
        assert (samples[ranks[0]], samples[ranks[1]]) == (interval.low, interval.high)


def test_five_samples_bound_nothing_and_six_their_extremes():
    assert median_interval(5) is None
    assert median_interval(6) == (0, 5)
    assert summarize([3.0, 1.0]).low is None
    assert summarize([3.0, 1.0]).relative_width == float("inf")


@given(st.integers(3, 5), st.floats(0.01, 0.5), st.floats(0.001, 100))
def test_few_samples_have_students_interval(count, spread, middle):
    logs = np.linspace(-spread, spread, count)
    summary = summarize((middle * np.exp(logs)).tolist())
    low, high = scipy_stats.t.interval(0.95, count - 1, 0.0, logs.std(ddof=1) / count**0.5)
    assert summary.low == pytest.approx(middle * np.exp(low), rel=1e-3)
    assert summary.high == pytest.approx(middle * np.exp(high), rel=1e-3)


@given(st.integers(1, 300))
def test_students_quantile_is_scipys(freedom):
    assert student(freedom) == pytest.approx(scipy_stats.t.ppf(0.975, freedom), rel=0.01)


VALUES = st.builds(
    lambda value, down, up: KnownValue(value, value * (1 - down), value * (1 + up)),
    st.floats(0.01, 10),
    st.floats(0, 0.6),
    st.floats(0, 0.6),
)
OPPOSITE = {"better": "worse", "worse": "better", "tie": "tie", "unknown": "unknown"}


@given(VALUES, VALUES)
def test_a_verdict_is_the_same_from_both_sides(mine, other):
    assert verdict(mine, other) == OPPOSITE[verdict(other, mine)]


@given(VALUES, VALUES, st.floats(0, 1), st.floats(0, 1))
def test_a_verdict_is_true_where_the_interval_of_the_ratio_holds(mine, other, a, b):
    ratio = Ratio.of(other, mine)
    truth = ratio.low + a * (ratio.high - ratio.low)
    said = verdict(mine, other)
    assert said != "better" or truth < 1
    assert said != "worse" or truth > 1
    assert said != "tie" or max(truth, 1 / truth) <= 1 + TIE + 1e-6


def test_a_verdict_needs_an_interval_of_both():
    sure = KnownValue(1.0, 0.99, 1.01)
    assert verdict(sure, KnownValue(2.0)) == verdict(KnownValue(2.0), sure) == "unknown"
    assert verdict(sure, KnownValue(2.0, 1.98, 2.02)) == "better"
    assert verdict(sure, sure) == "tie"
    assert verdict(sure, KnownValue(1.01, 0.8, 1.3)) == "unknown"


@given(st.lists(st.floats(0.001, 100), min_size=1, max_size=50))
def test_a_summary_is_ordered(samples):
    summary = summarize(samples)
    assert min(samples) <= summary.median <= summary.p95 <= summary.p99 <= max(samples)
    if summary.low is not None:
        assert summary.low <= summary.median <= summary.high


def measured(pairs, seconds, *, batch=None, tokens=None, peak=None):
    entry = MeasuredPoint(SweepPoint(pairs, batch, tokens), "ok", "", [seconds] * 6)
    entry.peak_bytes = peak
    return entry


TIMES = st.lists(
    st.tuples(st.integers(1, 64), st.floats(0.01, 10)),
    min_size=1,
    max_size=8,
    unique_by=lambda t: t[0],
)


@given(TIMES)
def test_the_best_is_among_the_fastest_and_none_smaller_is(times):
    results = [measured(100, seconds, batch=batch) for batch, seconds in times]
    best = best_batches(results)[0].chosen
    fastest = min(seconds for _, seconds in times)
    assert best.summary.median <= fastest * (1 + TIE)
    smaller = [seconds for batch, seconds in times if batch < best.point.size]
    assert all(seconds > fastest * (1 + TIE) for seconds in smaller)


@given(TIMES)
def test_the_frugal_choice_keeps_enough_of_the_speed(times):
    chosen = frugal([measured(10, seconds, batch=batch) for batch, seconds in times]).chosen
    fastest = min(seconds for _, seconds in times)
    assert fastest / chosen.summary.median >= ENOUGH * 0.999


def test_points_without_a_run_are_never_chosen():
    unknown = MeasuredPoint(SweepPoint(100, 1))
    assert best_batches([unknown]) == []
    assert best_budget([unknown]) is None
    assert scenario_advice([unknown]) == []


def test_each_scenario_has_its_own_best_point():
    results = [
        measured(5, 0.3, batch=1, peak=100),
        measured(5, 0.2, batch=4, peak=500),
        measured(10, 0.5, batch=1),
        measured(10, 0.4, batch=8),
        measured(100, 5.0, batch=1),
        measured(100, 3.0, batch=32),
        measured(100, 2.5, tokens=512),
        measured(100, 2.4, tokens=8192),
    ]
    advice = {s["name"]: s for s in scenario_advice(results)}
    assert (advice["api"]["pairs"], advice["api"]["batch_size"]) == (10, 8)
    assert advice["api"]["latency_s"] == 0.4
    assert advice["offline"]["token_budget"] == 8192
    assert advice["offline"]["pairs_per_s"] == pytest.approx(100 / 2.4)
    assert advice["concurrent"]["token_budget"] == 512
    assert (advice["edge"]["pairs"], advice["edge"]["batch_size"]) == (5, 4)
    assert advice["edge"]["peak_bytes"] == 500
    assert all(s["certain"] and not s["predicted"] for s in advice.values())
    assert "edge" not in {s["name"] for s in scenario_advice(results[2:])}


def test_a_size_that_may_be_as_fast_is_a_rival():
    wide = MeasuredPoint(SweepPoint(100, 2), "ok", "", [0.8, 1.0, 1.2])
    slow = MeasuredPoint(SweepPoint(100, 4), "ok", "", [2.0, 2.01, 2.02])
    found = best_of([measured(100, 0.9, batch=1), wide, slow])
    assert found.chosen.point.size == 1
    assert found.rivals == [SweepPoint(100, 2)]
    assert found.certainty() == {
        "certain": False,
        "rivals": [{"batch_size": 2, "token_budget": None}],
    }


def test_a_predicted_point_is_chosen_only_where_none_was_measured():
    fast = MeasuredPoint(SweepPoint(100, 8), "predicted", predicted_s=(0.5, 0.4, 0.6))
    found = best_of([measured(100, 0.9, batch=1), fast])
    assert (found.chosen.point.size, found.rivals) == (1, [SweepPoint(100, 8)])
    slow = MeasuredPoint(SweepPoint(100, 8), "predicted", predicted_s=(1.5, 1.4, 1.6))
    assert best_of([measured(100, 0.9, batch=1), slow]).certainty()["certain"]
    alone = best_of([fast])
    assert alone.chosen is fast
    assert not alone.certainty()["certain"]
    few = MeasuredPoint(SweepPoint(100, 4), "ok", "", [0.1, 0.1])
    assert best_of([measured(100, 0.9, batch=1), few]).rivals == [SweepPoint(100, 4)]


def test_a_point_of_which_nothing_is_known_is_a_rival_unless_it_can_never_be_known():
    unknown = MeasuredPoint(SweepPoint(100, 4))
    assert best_of([measured(100, 0.9, batch=1), unknown]).rivals == [SweepPoint(100, 4)]
    never = MeasuredPoint(SweepPoint(100, 8), "out_of_memory")
    assert best_of([measured(100, 0.9, batch=1), never]).certainty()["certain"]


def test_offline_work_is_advised_from_predicted_large_calls_rather_than_measured_small_ones():
    large = MeasuredPoint(SweepPoint(100, 8), "predicted", predicted_s=(2.0, 1.8, 2.2))
    advice = {s["name"]: s for s in scenario_advice([measured(5, 0.2, batch=1), large])}
    assert (advice["offline"]["pairs"], advice["offline"]["predicted"]) == (100, True)
    assert (advice["api"]["pairs"], advice["api"]["predicted"]) == (5, False)
    advice = {s["name"]: s for s in scenario_advice([measured(50, 1.9, batch=1), large])}
    assert (advice["offline"]["pairs"], advice["offline"]["predicted"]) == (50, False)


def test_what_disturbed_is_named_with_its_share():
    point = measured(10, 1.0, batch=1)
    point.disturbed = {0: Disturbance(others=0.8, cpus=2), 1: Disturbance(others=1.0, cpus=2)}
    (said,) = disturbances([point])
    assert "Other processes used 0.9 of 2 CPUs during 33\u00a0% of the runs" in said
    point.seconds[5], point.outliers = 11.0, {5}
    assert "1 of 6 runs took up to 11.0 times as long" in disturbances([point])[1]
    assert disturbances([measured(10, 1.0, batch=1)]) == []


@given(st.floats(0.001, 1000), st.floats(0, 0.5), st.floats(0, 0.5))
def test_another_time_widens_an_interval_by_the_machines_pace(value, down, up):
    now = KnownValue(value, value * (1 - down), value * (1 + up))
    later = now.at_any_time
    assert later.value == value
    assert later.low <= now.low * (1 + 1e-9)
    assert later.high >= now.high * (1 - 1e-9)
    assert later.low <= value * 0.91
    assert later.high >= value * 1.10
    assert KnownValue(value).at_any_time == KnownValue(value)


def test_time_that_is_left_goes_to_the_quickest_points_that_fit():
    points = [SweepPoint(n, batch_size=1) for n in (50, 5, 10)]
    found = more_points(points, lambda point: 0.1 * point.pairs, RUNS * 1.6)
    assert found == [SweepPoint(5, 1), SweepPoint(10, 1)]
    assert more_points(points, lambda point: 1.0, RUNS * 0.9) == []

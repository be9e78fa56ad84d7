"""Autoscaling: how many workers there should be."""

from __future__ import annotations

import pytest
from batchers import batcher, finish
from hypothesis import given
from hypothesis import strategies as st

from echelon.errors import InvalidInput
from echelon.scheduling.autoscaling import Autoscaler, AutoscalingLimits
from echelon.scheduling.queue import PairRequest

SCALING = AutoscalingLimits(1, 8, delay_s=2.0, up_s=3.0, down_s=60.0)


def look(scaler, times, workers, work_s, busy=0.0):
    """Decide every second; the time and the number of the first change."""
    for now in times:
        wanted = scaler.decide(float(now), workers, work_s, busy * now)
        if wanted != workers:
            return now, wanted
    return None


def test_a_lasting_delay_adds_as_many_workers_as_work_it_off():
    assert look(Autoscaler(SCALING), range(10), 1, work_s=9.0) == (3, 5)


def test_no_more_workers_are_added_than_allowed():
    assert look(Autoscaler(SCALING), range(10), 2, work_s=1000.0) == (3, 8)


def test_a_burst_that_is_worked_off_adds_no_worker():
    scaler = Autoscaler(SCALING)
    assert look(scaler, range(3), 1, work_s=9.0) is None
    assert look(scaler, range(3, 5), 1, work_s=1.0) is None
    assert look(scaler, range(5, 8), 1, work_s=9.0) is None


def test_idle_workers_go_one_by_one_after_a_while():
    scaler = Autoscaler(SCALING)
    assert look(scaler, range(200), 3, work_s=0.0) == (60, 2)
    assert look(scaler, range(61, 200), 2, work_s=0.0) == (121, 1)
    assert look(scaler, range(122, 400), 1, work_s=0.0) is None


def test_busy_workers_stay_though_nothing_waits():
    assert look(Autoscaler(SCALING), range(200), 3, work_s=0.0, busy=1.5) is None
    assert look(Autoscaler(SCALING), range(200), 3, work_s=0.0, busy=1.3) == (60, 2)


def test_workers_stay_while_something_waited_lately():
    scaler = Autoscaler(SCALING)
    assert look(scaler, range(40), 2, work_s=0.0) is None
    assert look(scaler, range(40, 41), 2, work_s=3.0) is None
    assert look(scaler, range(41, 300), 2, work_s=0.0) == (101, 1)


def test_lost_workers_are_replaced_at_once():
    assert Autoscaler(AutoscalingLimits(2, 4)).decide(0.0, 1, 0.0, 0.0) == 2


@given(
    st.integers(1, 5),
    st.integers(0, 5),
    st.lists(st.tuples(st.floats(0.1, 100), st.floats(0, 500), st.floats(0, 8)), max_size=60),
)
def test_it_stays_within_its_bounds(fewest, more, looks):
    scaler = Autoscaler(AutoscalingLimits(fewest, fewest + more, up_s=2.0, down_s=20.0))
    now, busy, workers = 0.0, 0.0, fewest
    for after, work_s, rate in looks:
        now, busy = now + after, busy + after * rate
        wanted = scaler.decide(now, workers, work_s, busy)
        assert fewest <= wanted <= fewest + more
        assert wanted >= workers - 1
        workers = wanted


@pytest.mark.parametrize(
    "wrong",
    [
        {"min_workers": 0},
        {"min_workers": 3, "max_workers": 2},
        {"delay_s": 0.0},
        {"up_s": -1.0},
        {"down_s": 0.0},
    ],
)
def test_wrong_bounds_are_refused(wrong):
    with pytest.raises(InvalidInput):
        AutoscalingLimits(**wrong)


# One request, shared among idle workers.


def test_a_request_is_shared_among_idle_workers_where_that_ends_sooner():
    made = batcher(budget=4000)
    made.submit(PairRequest(1, (100,) * 20), 0.0)
    steps = [made.next_step(0.0, idle) for idle in (4, 3, 2, 1)]
    assert [len(step.places) for step in steps] == [5, 5, 5, 5]
    assert made.next_step(0.0) is None


def test_a_small_request_is_one_step_however_many_are_idle():
    made = batcher(budget=4000)
    made.submit(PairRequest(1, (10,) * 6), 0.0)
    assert len(made.next_step(0.0, 4).places) == 6


def test_more_than_the_idle_can_hold_goes_in_full_steps():
    made = batcher(budget=400)
    made.submit(PairRequest(1, (100,) * 20), 0.0)
    assert len(made.next_step(0.0, 2).places) == 4


@given(st.lists(st.integers(1, 500), min_size=1, max_size=40), st.integers(1, 5))
def test_sharing_loses_nothing_and_leaves_nothing(lengths, idle):
    made = batcher(budget=2000)
    made.submit(PairRequest(1, tuple(lengths)), 0.0)
    places, ended = [], []
    left = idle
    while (step := made.next_step(0.0, max(1, left))) is not None:
        places += step.places
        ended += finish(made, step)
        left -= 1
    assert sorted(places) == [(1, index) for index in range(len(lengths))]
    assert len(ended) == 1

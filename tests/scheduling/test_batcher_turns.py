"""Whose turn it is in the batcher: fairness, priorities and deadlines."""

from __future__ import annotations

import pytest
from batchers import PRIORITIES, batcher, finish, lengths
from hypothesis import given, settings
from hypothesis import strategies as st

from echelon.scheduling.batcher import Batcher
from echelon.scheduling.cost_model import CostModel
from echelon.scheduling.queue import PairRequest


def test_a_short_request_behind_a_long_one_is_in_the_next_step():
    made = batcher()
    made.submit(PairRequest(1, (20,) * 1000), 0)
    running = made.next_step(0)
    made.submit(PairRequest(2, (20,)), 1)
    finish(made, running)
    step = made.next_step(2)
    assert 2 in step.requests
    assert [end.request for end in finish(made, step)] == [2]


@pytest.mark.parametrize("cost", ["none", "rectangular"])
@pytest.mark.parametrize("others", [1, 5, 20])
def test_also_behind_many_long_ones_that_are_half_done_and_late(cost, others):
    made = batcher(padding=cost)
    for number in range(others):
        made.submit(PairRequest(number, (20,) * 500), 0)
    for _ in range(others * 40):
        finish(made, made.next_step(0))
    made.submit(PairRequest(99, (17,)), 1000)
    assert 99 in made.next_step(1000).requests


def test_requests_of_one_size_end_in_the_order_they_came():
    made = batcher()
    for number in range(1, 6):
        made.submit(PairRequest(number, (20,) * 10), number)
    order = []
    while step := made.next_step(10):
        order += [end.request for end in finish(made, step)]
    assert order == [1, 2, 3, 4, 5]


def test_priorities_are_shares():
    made = batcher()
    made.submit(PairRequest(1, (20,) * 10, priority="low"), 0)
    made.submit(PairRequest(2, (20,) * 10), 0)
    made.submit(PairRequest(3, (20,) * 10, priority="high"), 0)
    order = []
    while step := made.next_step(10):
        order += [end.request for end in finish(made, step)]
    assert order == [3, 2, 1]


def test_low_priority_is_not_starved():
    made = batcher()
    made.submit(PairRequest(0, (20,) * 10, priority="low"), 0)
    for number in range(1, 200):
        made.submit(PairRequest(number, (20,) * 10, priority="high"), 0)
        for _ in range(2):
            if 0 in [end.request for end in finish(made, made.next_step(0))]:
                return
    pytest.fail("never its turn")


def test_deadlines_in_danger_go_first_but_not_alone():
    model = CostModel()
    second = model.predict([20] * 5)
    made = Batcher(model, 100)
    made.submit(PairRequest(1, (20,) * 90), 0)
    made.submit(PairRequest(2, (20,) * 100, deadline=60 * second), 0)
    made.submit(PairRequest(3, (20,) * 100, deadline=50 * second), 0)
    step = made.next_step(0)
    assert {number for number, _ in step.places} == {1, 3}
    assert sum(number == 3 for number, _ in step.places) == 2


def test_steps_of_one_pair_alternate_between_fairness_and_haste():
    made = batcher(max_pairs=1)
    made.submit(PairRequest(1, (20,) * 9), 0)
    made.submit(PairRequest(2, (20,) * 10, deadline=0.001), 0)
    numbers = [made.next_step(0).places[0][0] for _ in range(6)]
    assert numbers == [1, 2] * 3


def even_server(arrivals, weights):
    """Work served when each request ends, were the device shared evenly: the definition."""
    left, ends, served = {}, {}, 0.0
    for number, (at, tokens) in [*enumerate(arrivals), (-1, (float("inf"), 0))]:
        while left and served < at:
            share = sum(weights[n] for n in left)
            first = min(left, key=lambda n: left[n] / weights[n])
            work = min(at - served, left[first] / weights[first] * share)
            for n in left:
                left[n] -= work * weights[n] / share
            served += work
            for n in [n for n in left if left[n] < 1e-6]:
                ends[n] = served
                del left[n]
        if number >= 0:
            served = max(served, at)
            left[number] = tokens
    return ends


@settings(max_examples=200)
@given(
    st.one_of(
        st.lists(st.tuples(st.integers(0, 6), sizes, st.sampled_from(PRIORITIES)), max_size=12)
        for sizes in (lengths, st.lists(st.just(1), min_size=1, max_size=400))
    ),
    st.integers(60, 150),
)
def test_no_request_ends_later_than_if_the_device_were_shared_evenly(arrivals, budget):
    made, served = batcher(budget), 0
    came, ends = [], {}

    def turn():
        nonlocal served
        step = made.next_step(0)
        if step is not None:
            served += step.tokens
            ends.update({end.request: served for end in finish(made, step)})
        return step

    for pause, sizes, priority in arrivals:
        for _ in range(pause):
            turn()
        came.append((served, sum(sizes)))
        made.submit(PairRequest(len(came) - 1, tuple(sizes), priority=priority), 0)
    while turn():
        pass
    even = even_server(came, [{"high": 16, "normal": 4, "low": 1}[p] for *_, p in arrivals])
    assert ends.keys() == even.keys()
    # A step cannot be interrupted, nor a pair split: the request in turn leaves other requests less
    # than the longest pair of each step.
    longest = max((max(sizes) for _, sizes, _ in arrivals), default=1)
    lost = budget / (budget - longest + 1)
    assert all(ends[number] <= even[number] * lost + 2 * budget + 1e-3 for number in ends)


def test_who_has_been_served_or_has_gone_shares_no_longer():
    made = batcher()
    for number, key in enumerate("aabc"):
        made.submit(PairRequest(number, (20,), (key,)), 0)
    assert made.load().weight == 16
    made.cancel(3)
    assert made.load().weight == 12
    made.next_step(0)
    assert made.load().weight == 0  # tokens of a shared pair count for each that waits for it

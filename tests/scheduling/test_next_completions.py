"""Which requests end next, beside when the batcher really ends them."""

from __future__ import annotations

import pytest
from batchers import PRIORITIES, finish
from hypothesis import given
from hypothesis import strategies as st

from echelon.errors import Overloaded
from echelon.scheduling.admission import AdmissionLimits, RequestCost, SystemLoad, refuse
from echelon.scheduling.batcher import Batcher
from echelon.scheduling.cost_model import Coefficients, CostModel
from echelon.scheduling.queue import CompletionEstimate, PairRequest

BUDGET = 100
STEP_S = 0.1
"""A full step: a thousand tokens a second, and nothing else costs anything."""


def batcher(*requests, budget=BUDGET, **settings) -> Batcher:
    """Requests of the given lengths, numbered from 0."""
    made = Batcher(CostModel(Coefficients(0.0, 0.001, 0.0)), budget)
    for number, lengths in enumerate(requests):
        made.submit(PairRequest(number, tuple(lengths), **settings), 0)
    return made


def load_of(made: Batcher, workers=1, **settings) -> SystemLoad:
    return SystemLoad(
        made.load(), made.cost, workers, next_completions=made.next_completions, **settings
    )


def test_the_smaller_request_ends_first_in_either_order_of_arrival():
    made = batcher([10] * 90, [10, 10])
    assert made.next_completions(2, 1) == [
        CompletionEstimate(0.0, 20, 200),
        CompletionEstimate(0.0, 920, 9200),
    ]
    assert made.next_completions(5, 1) == made.next_completions(2, 1)
    assert made.next_completions(1, 1) == made.next_completions(2, 1)[:1]


def test_a_request_that_runs_whole_ends_with_its_last_step():
    made = batcher([10] * 14, [60])
    first, second = made.next_step(0), made.next_step(0)
    assert (first.requests, second.requests) == ((0, 1), (0,))
    assert made.next_completions(2, 1) == [
        CompletionEstimate(pytest.approx(0.1)),
        CompletionEstimate(pytest.approx(0.2)),
    ]
    assert made.next_completions(2, 2) == [
        CompletionEstimate(pytest.approx(0.1)),
        CompletionEstimate(pytest.approx(0.1)),
    ]
    made.put_back(second.number)  # its pairs wait once more, and no step of them is under way
    assert made.next_completions(2, 1) == [
        CompletionEstimate(pytest.approx(0.1)),
        CompletionEstimate(pytest.approx(0.1), 100, 1000),
    ]


def test_a_pair_that_several_wait_for_is_scored_once():
    made = batcher([10] * 4, [10] * 4, [10] * 4, keys=("a", "b", "c", "d"))
    assert made.next_completions(3, 1) == [CompletionEstimate(0.0, 40, 400)] * 3


def test_without_requests_no_request_ends():
    assert batcher().next_completions(3, 2) == []
    assert load_of(batcher(), tokenising=4, tokenising_tokens=800).free_s(1) == pytest.approx(0.2)


def test_several_workers_share_what_waits():
    made = batcher([10] * 100)
    assert load_of(made).free_s(1) == pytest.approx(1.0)
    assert load_of(made, workers=4).free_s(1) == pytest.approx(0.25)
    assert load_of(made, workers=0).free_s(1) == pytest.approx(1.0)


def test_who_is_refused_at_a_full_house_hears_when_the_small_request_ends():
    """And not the mean: a hundred times as long, for the sake of one that is large."""
    made = batcher([10], [50] * 4000)
    refusal = refuse(
        RequestCost(1, 10, 100), load_of(made), AdmissionLimits(max_requests=2, max_wait_s=1e6), 0
    )
    assert refusal.reason == "requests_full"
    assert isinstance(refusal.error, Overloaded)
    assert refusal.error.retry_after_s == pytest.approx(0.01)


sizes = st.one_of(st.integers(1, 4), st.integers(40, 150))
asked = st.tuples(
    st.lists(st.integers(1, 20), min_size=1, max_size=5).flatmap(
        lambda few: sizes.map(lambda size: [few[i % len(few)] for i in range(size)])
    ),
    st.sampled_from(PRIORITIES),
)


@given(st.lists(asked, min_size=1, max_size=10), st.integers(0, 12), st.data())
def test_places_are_free_when_they_were_said_to_be(requests, steps, data):
    """Within what is lost by whole steps: gaps are filled with pairs of those behind."""
    made = batcher()
    for number, (lengths, priority) in enumerate(requests):
        made.submit(PairRequest(number, tuple(lengths), priority=priority), 0)
    for _ in range(steps):
        step = made.next_step(0)
        if step is not None:
            finish(made, step)
    inside = made.load().requests
    if not inside:
        return
    places = data.draw(st.integers(1, inside))
    under_way = made.next_step(0)  # it begins now
    predicted, now, left = load_of(made).free_s(places), 0.0, places
    while left > 0:
        now += under_way.predicted_s
        left -= len(finish(made, under_way))
        under_way = made.next_step(now)
    assert predicted - STEP_S <= now <= 1.25 * predicted + STEP_S


@given(st.lists(asked, min_size=1, max_size=10), st.integers(1, 3))
def test_all_places_together_are_the_backlog(requests, workers):
    made = batcher(*(lengths for lengths, _ in requests))
    found = load_of(made, workers)
    ends = [found.free_s(places) for places in range(1, len(requests) + 1)]
    assert ends == sorted(ends)
    assert ends[-1] == pytest.approx(found.backlog_s)

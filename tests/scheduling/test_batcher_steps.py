"""What the batcher puts into a step, and what becomes of a step that did not end well."""

from __future__ import annotations

import numpy as np
import pytest
from batchers import batcher, finish, lengths, logit
from hypothesis import given
from hypothesis import strategies as st

from echelon.scheduling.queue import PairRequest


def test_identical_pairs_in_flight_are_scored_once():
    made = batcher()
    made.submit(PairRequest(1, (20, 30, 20), ("a", "b", "a")), 0)
    made.submit(PairRequest(2, (20, 10), ("a", "c")), 0)
    assert made.load().pairs == 3
    step = made.next_step(0)
    assert sorted(step.lengths) == [10, 20, 30]
    assert step.requests == (1, 2)
    made.submit(PairRequest(3, (30,), ("b",)), 0)
    assert made.next_step(0) is None
    values = {20: 1.0, 30: 2.0, 10: 3.0}
    ended = made.finish(step.number, [values[length] for length in step.lengths])
    assert {end.request: end.logits.tolist() for end in ended} == {
        1: [1.0, 2.0, 1.0],
        2: [1.0, 3.0],
        3: [2.0],
    }
    made.submit(PairRequest(4, (30,), ("b",)), 0)
    assert made.next_step(0).places == ((4, 0),)


def test_a_pair_outlives_the_request_that_brought_it():
    made = batcher(budget=20)
    made.submit(PairRequest(1, (20,), ("a",)), 0)
    made.submit(PairRequest(2, (20,), ("a",)), 0)
    made.cancel(1)
    assert made.next_step(0).places == ((2, 0),)


def test_a_step_under_way_whose_callers_have_gone_ends_quietly():
    made = batcher()
    made.submit(PairRequest(1, (20,)), 0)
    step = made.next_step(0)
    made.cancel(1)
    assert finish(made, step) == []
    for again in (made.retry, made.put_back):
        made.submit(PairRequest(1, (20,), ("a",)), 0)
        step = made.next_step(0)
        made.cancel(1)
        again(step.number)
        assert made.next_step(0) is None
        made.submit(PairRequest(2, (20,), ("a",)), 0)
        assert [end.request for end in finish(made, made.next_step(0))] == [2]


def test_a_lost_step_goes_again_first_and_each_request_on_its_own():
    made = batcher()
    for number in (1, 2):
        made.submit(PairRequest(number, (20, 20)), 0)
    lost = made.next_step(0)
    made.submit(PairRequest(3, (5,)), 0)
    assert made.retry(lost.number) == []
    first, second, third = (made.next_step(0) for _ in range(3))
    assert [step.requests for step in (first, second, third)] == [(1,), (2,), (3,)]
    assert first.again
    assert not third.again
    assert finish(made, first)[0].request == 1
    (broken,) = made.retry(second.number)
    assert (broken.request, broken.fault) == (2, "worker_lost")
    assert finish(made, third)[0].request == 3


def test_a_lost_step_is_left_for_a_worker_that_was_not_lost_with_it():
    made = batcher()
    for number in (1, 2):
        made.submit(PairRequest(number, (20,)), 0)
    lost = made.next_step(0)
    made.retry(lost.number, worker=7)
    assert made.next_step(0, not_lost_by=7) is None
    made.submit(PairRequest(3, (5,)), 0)
    other = made.next_step(0, not_lost_by=7)  # it does not wait for them
    assert other.requests == (3,)
    again = made.next_step(0, not_lost_by=8)
    assert again.requests == (1,)
    assert made.next_step(0).requests == (2,)  # where no other worker is up
    made.put_back(again.number)
    assert made.next_step(0, not_lost_by=7) is None


def test_a_step_put_back_obeys_the_budget_of_now():
    made = batcher(budget=100)
    made.submit(PairRequest(1, (30,) * 3), 0)
    made.submit(PairRequest(2, (5,)), 0)
    made.put_back(made.next_step(0).number)
    made.budget = 40
    assert [made.next_step(0).lengths for _ in range(3)] == [(5, 30), (30,), (30,)]
    assert made.next_step(0) is None


def test_a_budget_may_change_at_any_time():
    made = batcher(budget=100)
    made.submit(PairRequest(1, (30,) * 9), 0)
    made.budget = 60
    assert len(made.next_step(0).places) == 2
    made.budget = 1000
    assert len(made.next_step(0).places) == 7


def test_an_empty_request_or_a_number_in_use_is_a_bug():
    made = batcher()
    made.submit(PairRequest(1, (5,)), 0)
    for request in (PairRequest(1, (5,)), PairRequest(2, ())):
        with pytest.raises(ValueError, match="This is a bug"):
            made.submit(request, 0)


@given(st.lists(lengths, min_size=1, max_size=8), st.integers(1, 150), st.randoms())
def test_the_order_of_documents_changes_no_score(requests, budget, chance):
    def scores(shuffled):
        made = batcher(budget)
        orders = [list(range(len(sizes))) for sizes in requests]
        for number, order in enumerate(orders):
            if shuffled:
                chance.shuffle(order)
            sizes, keys = requests[number], [(number, i) for i in order]
            made.submit(PairRequest(number, tuple(sizes[i] for i in order), tuple(keys)), 0)
        answers = {}
        while step := made.next_step(0):
            keys = [(number, orders[number][index]) for number, index in step.places]
            for end in made.finish(step.number, [logit(key) for key in keys]):
                pairs = zip(orders[end.request], end.logits.tolist(), strict=True)
                answers[end.request] = dict(pairs)
        return answers

    assert scores(shuffled=False) == scores(shuffled=True)


@given(st.lists(lengths, max_size=8), st.integers(1, 150), st.sampled_from(["none", "rectangular"]))
def test_the_same_trace_gives_the_same_steps(requests, budget, cost):
    def trace():
        made = batcher(budget, padding=cost)
        steps = []
        for number, sizes in enumerate(requests):
            made.submit(PairRequest(number, tuple(sizes), deadline=number + 1.0), number / 2)
            steps.append(made.next_step(number / 2))
        while step := made.next_step(1.5):
            steps.append(step)
        return steps

    assert trace() == trace()


@pytest.mark.parametrize("cost", ["none", "rectangular"])
@pytest.mark.parametrize("requests", [1, 1000])
def test_a_step_looks_at_a_steps_worth_however_many_wait(cost, requests, monkeypatch):
    made = batcher(2000, padding=cost)
    for number in range(requests):
        made.submit(PairRequest(number, tuple(20 + i % 200 for i in range(100_000 // requests))), 0)
    seen = []
    look = made._choose
    monkeypatch.setattr(
        made, "_choose", lambda units, *more: seen.append(len(units)) or look(units, *more)
    )
    for _ in range(20):
        finish(made, made.next_step(0))
    assert max(seen) <= 4 * 2000 / 20
    assert made.load().requests >= requests - 20


def test_padded_steps_hold_pairs_of_nearly_one_length():
    made = batcher(1000, padding="rectangular")
    chance = np.random.default_rng(0)
    for number in range(100):
        made.submit(PairRequest(number, tuple(chance.integers(10, 400, 10).tolist())), 0)
    tokens = cost_tokens = 0
    while step := made.next_step(0):
        tokens += step.tokens
        cost_tokens += step.cost_tokens
        finish(made, step)
    assert cost_tokens / tokens < 1.15


def test_no_request_joins_a_pair_that_was_cut_or_ends_with_it():
    made = batcher()
    made.submit(PairRequest(1, (80,), ("a",)), 0)
    assert made.shorten(made.next_step(0).number, 40) == ((1, 0),)
    made.submit(PairRequest(2, (80,), ("a",)), 0)
    cut, whole = made.next_step(0), made.next_step(0)
    assert (cut.lengths, whole.lengths) == ((40,), (80,))
    assert [end.request for end in finish(made, cut)] == [1]
    made.submit(PairRequest(3, (80,), ("a",)), 0)
    assert made.next_step(0) is None
    assert [end.request for end in finish(made, whole)] == [2, 3]

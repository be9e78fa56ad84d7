"""The batcher as a state machine: whatever happens, every accepted pair ends exactly once."""

from __future__ import annotations

import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from echelon.plan.batcher import Batcher
from echelon.plan.cost import CostModel, work_of
from echelon.plan.pack import step_cost
from echelon.plan.queue import Broken, Completed, Request

lengths = st.lists(st.integers(1, 60), min_size=1, max_size=12)
PRIORITIES = ("high", "normal", "low")


def logit(key) -> float:
    """The one score of a key."""
    return np.float32(zlib.crc32(repr(key).encode()) % 1000 / 10)


def key_of(request: Request, index: int):
    return (request.number, index) if request.keys is None else request.keys[index]


class World(RuleBasedStateMachine):
    """A batcher, everyone who uses it, and what must be true of both."""

    @initialize(
        budget=st.integers(1, 200),
        max_pairs=st.none() | st.integers(1, 6),
        cost=st.sampled_from(["ragged", "padded"]),
    )
    def begin(self, budget, max_pairs, cost):
        self.batcher = Batcher(CostModel(cost=cost), budget, max_pairs)
        self.now = 0.0
        self.requests: dict[int, Request] = {}
        self.ended: dict[int, str] = {}
        self.running = {}
        self.cut: dict[tuple[int, int], int] = {}

    # What callers do.

    @rule(
        lengths=lengths,
        shared=st.booleans(),
        left=st.none() | st.floats(-0.5, 3),
        priority=st.sampled_from(PRIORITIES),
    )
    def submit(self, lengths, shared, left, priority):
        number = len(self.requests) + 1
        keys = tuple(("shared", n) for n in lengths) if shared else None
        deadline = None if left is None else self.now + left
        request = Request(number, tuple(lengths), keys, deadline, priority)
        self.requests[number] = request
        self.batcher.submit(request, self.now)

    @precondition(lambda self: self.alive())
    @rule(data=st.data())
    def cancel(self, data):
        number = data.draw(st.sampled_from(self.alive()))
        assert self.batcher.cancel(number)
        assert not self.batcher.cancel(number)
        self.end(number, "cancelled")

    @rule(seconds=st.floats(0, 2))
    def wait(self, seconds):
        self.now += seconds

    @rule()
    def expire(self):
        for number in self.batcher.expire(self.now):
            deadline = self.requests[number].deadline
            assert deadline is not None
            assert deadline <= self.now
            self.end(number, "expired")
        assert self.batcher.expire(self.now) == []

    # What the driver does.

    @rule()
    def next_step(self):
        waiting = self.batcher.load().pairs
        step = self.batcher.next_step(self.now)
        self.expire()
        if step is None:
            assert self.batcher.load().pairs == 0
            return
        assert waiting
        self.check(step)
        self.running[step.number] = step

    def check(self, step):
        batcher = self.batcher
        places = list(step.places)
        keys = [key_of(self.requests[number], index) for number, index in places]
        whole = {(n, i): self.requests[n].lengths[i] for n, i in places}
        assert list(step.lengths) == [self.cut.get(place, whole[place]) for place in places]
        assert step.cost_tokens == step_cost(step.lengths, batcher.cost.cost)
        assert step.tokens == sum(step.lengths)
        assert step.cost_tokens <= batcher.budget or len(places) == 1
        assert batcher.max_pairs is None or len(places) <= batcher.max_pairs
        assert len(set(keys)) == len(keys)
        for other in self.running.values():
            twice = set(keys) & set(self.keys(other))
            assert self.cut or not twice, "one pair in two steps at once"
        for number in {number for number, _ in places} | set(step.requests):
            assert number not in self.ended, "scored for nobody"
            deadline = self.requests[number].deadline
            assert deadline is None or deadline > self.now, "scored past its deadline"
        assert {number for number, _ in places} <= set(step.requests)

    def keys(self, step):
        return [key_of(self.requests[number], index) for number, index in step.places]

    @precondition(lambda self: self.running)
    @rule(data=st.data(), bad=st.booleans())
    def finish(self, data, bad):
        step = self.take(data)
        keys = self.keys(step)
        logits = np.array([logit(key) for key in keys], dtype=np.float32)
        place = data.draw(st.integers(0, len(keys) - 1)) if bad else None
        if place is not None:
            logits[place] = np.nan
        for ended in self.batcher.finish(step.number, logits):
            if isinstance(ended, Completed):
                request = self.requests[ended.request]
                wanted = [logit(key_of(request, i)) for i in range(len(request.lengths))]
                assert ended.logits.tolist() == wanted
            else:
                assert ended.fault == "not_finite"
                assert key_of(self.requests[ended.request], ended.index) == keys[place]
            self.end(ended.request, "answered")

    @precondition(lambda self: self.running)
    @rule(data=st.data())
    def retry(self, data):
        step = self.take(data)
        self.broken(self.batcher.retry(step.number), "worker_lost", step)

    @precondition(lambda self: self.running)
    @rule(data=st.data())
    def fail(self, data):
        step = self.take(data)
        self.broken(self.batcher.fail(step.number, "scorer"), "scorer", step)

    @precondition(lambda self: self.running)
    @rule(data=st.data(), budget=st.integers(1, 200))
    def put_back(self, data, budget):
        step = self.take(data)
        self.batcher.budget = budget
        self.batcher.put_back(step.number)

    @precondition(lambda self: any(len(step.places) == 1 for step in self.running.values()))
    @rule(data=st.data())
    def shorten(self, data):
        alone = [number for number, step in self.running.items() if len(step.places) == 1]
        step = self.running.pop(data.draw(st.sampled_from(sorted(alone))))
        length = max(1, step.lengths[0] // 2)
        for number, index in self.batcher.shorten(step.number, length):
            assert number not in self.ended
            assert key_of(self.requests[number], index) == self.keys(step)[0]
            self.cut[number, index] = length

    def take(self, data):
        return self.running.pop(data.draw(st.sampled_from(sorted(self.running))))

    def broken(self, ends, fault, step):
        for ended in ends:
            assert isinstance(ended, Broken)
            assert ended.fault == fault
            assert key_of(self.requests[ended.request], ended.index) in self.keys(step)
            self.end(ended.request, fault)

    # What is true at all times.

    def alive(self):
        return [number for number in self.requests if number not in self.ended]

    def end(self, number, how):
        assert number not in self.ended, "ended twice"
        self.ended[number] = how

    @invariant()
    def the_load_is_what_is_there(self):
        load = self.batcher.load()
        assert load.requests == len(self.batcher._entries)
        units = {id(u): u for e in self.batcher._entries.values() for u in e.units}.values()
        waiting = [u.length for u in units if u.state.name in {"WAITING", "AGAIN"}]
        work = work_of(waiting, "ragged")
        assert (load.pairs, load.tokens, load.squares) == (len(waiting), work.tokens, work.squares)
        assert (load.oldest is None) == (load.requests == 0)

    def teardown(self):
        if not hasattr(self, "batcher"):
            return
        for _ in range(10_000):
            while self.running:
                step = self.running.pop(min(self.running))
                logits = [logit(key) for key in self.keys(step)]
                for ended in self.batcher.finish(step.number, logits):
                    self.end(ended.request, "answered")
            self.next_step()
            if not self.running:
                break
        assert self.alive() == [], "accepted and never answered"
        load = self.batcher.load()
        assert (load.requests, load.pairs, load.tokens, load.squares) == (0, 0, 0, 0)
        assert (load.weight, load.running_s) == (0, 0)
        assert not self.batcher._units
        assert not self.batcher._again


World.TestCase.settings = settings(max_examples=150, stateful_step_count=40)
TestWorld = World.TestCase


# Single properties of the discipline.


def batcher(budget=100, **settings) -> Batcher:
    return Batcher(CostModel(cost=settings.pop("cost", "ragged")), budget, **settings)


def finish(made: Batcher, step, value=1.0) -> list:
    return made.finish(step.number, [value] * len(step.places))


def test_a_short_request_behind_a_long_one_is_in_the_next_step():
    made = batcher()
    made.submit(Request(1, (20,) * 1000), 0)
    running = made.next_step(0)
    made.submit(Request(2, (20,)), 1)
    finish(made, running)
    step = made.next_step(2)
    assert 2 in step.requests
    assert [end.request for end in finish(made, step)] == [2]


@pytest.mark.parametrize("cost", ["ragged", "padded"])
@pytest.mark.parametrize("others", [1, 5, 20])
def test_also_behind_many_long_ones_that_are_half_done_and_late(cost, others):
    made = batcher(cost=cost)
    for number in range(others):
        made.submit(Request(number, (20,) * 500), 0)
    for _ in range(others * 40):
        finish(made, made.next_step(0))
    made.submit(Request(99, (17,)), 1000)
    assert 99 in made.next_step(1000).requests


def test_requests_of_one_size_end_in_the_order_they_came():
    made = batcher()
    for number in range(1, 6):
        made.submit(Request(number, (20,) * 10), number)
    order = []
    while step := made.next_step(10):
        order += [end.request for end in finish(made, step)]
    assert order == [1, 2, 3, 4, 5]


def test_priorities_are_shares():
    made = batcher()
    made.submit(Request(1, (20,) * 10, priority="low"), 0)
    made.submit(Request(2, (20,) * 10), 0)
    made.submit(Request(3, (20,) * 10, priority="high"), 0)
    order = []
    while step := made.next_step(10):
        order += [end.request for end in finish(made, step)]
    assert order == [3, 2, 1]


def test_low_priority_is_not_starved():
    made = batcher()
    made.submit(Request(0, (20,) * 10, priority="low"), 0)
    for number in range(1, 200):
        made.submit(Request(number, (20,) * 10, priority="high"), 0)
        for _ in range(2):
            if 0 in [end.request for end in finish(made, made.next_step(0))]:
                return
    pytest.fail("never its turn")


def test_deadlines_in_danger_go_first_but_not_alone():
    model = CostModel()
    second = model.predict([20] * 5)
    made = Batcher(model, 100)
    made.submit(Request(1, (20,) * 90), 0)
    made.submit(Request(2, (20,) * 100, deadline=60 * second), 0)
    made.submit(Request(3, (20,) * 100, deadline=50 * second), 0)
    step = made.next_step(0)
    assert {number for number, _ in step.places} == {1, 3}
    assert sum(number == 3 for number, _ in step.places) == 2


def test_steps_of_one_pair_alternate_between_fairness_and_haste():
    made = batcher(max_pairs=1)
    made.submit(Request(1, (20,) * 9), 0)
    made.submit(Request(2, (20,) * 10, deadline=0.001), 0)
    numbers = [made.next_step(0).places[0][0] for _ in range(6)]
    assert numbers == [1, 2] * 3


def test_identical_pairs_in_flight_are_scored_once():
    made = batcher()
    made.submit(Request(1, (20, 30, 20), ("a", "b", "a")), 0)
    made.submit(Request(2, (20, 10), ("a", "c")), 0)
    assert made.load().pairs == 3
    step = made.next_step(0)
    assert sorted(step.lengths) == [10, 20, 30]
    assert step.requests == (1, 2)
    made.submit(Request(3, (30,), ("b",)), 0)
    assert made.next_step(0) is None
    values = {20: 1.0, 30: 2.0, 10: 3.0}
    ended = made.finish(step.number, [values[length] for length in step.lengths])
    assert {end.request: end.logits.tolist() for end in ended} == {
        1: [1.0, 2.0, 1.0],
        2: [1.0, 3.0],
        3: [2.0],
    }
    made.submit(Request(4, (30,), ("b",)), 0)
    assert made.next_step(0).places == ((4, 0),)


def test_a_pair_outlives_the_request_that_brought_it():
    made = batcher(budget=20)
    made.submit(Request(1, (20,), ("a",)), 0)
    made.submit(Request(2, (20,), ("a",)), 0)
    made.cancel(1)
    assert made.next_step(0).places == ((2, 0),)


def test_a_step_under_way_whose_callers_have_gone_ends_quietly():
    made = batcher()
    made.submit(Request(1, (20,)), 0)
    step = made.next_step(0)
    made.cancel(1)
    assert finish(made, step) == []
    for again in (made.retry, made.put_back):
        made.submit(Request(1, (20,), ("a",)), 0)
        step = made.next_step(0)
        made.cancel(1)
        again(step.number)
        assert made.next_step(0) is None
        made.submit(Request(2, (20,), ("a",)), 0)
        assert [end.request for end in finish(made, made.next_step(0))] == [2]


def test_a_lost_step_goes_again_first_and_each_request_on_its_own():
    made = batcher()
    for number in (1, 2):
        made.submit(Request(number, (20, 20)), 0)
    lost = made.next_step(0)
    made.submit(Request(3, (5,)), 0)
    assert made.retry(lost.number) == []
    first, second, third = (made.next_step(0) for _ in range(3))
    assert [step.requests for step in (first, second, third)] == [(1,), (2,), (3,)]
    assert first.again
    assert not third.again
    assert finish(made, first)[0].request == 1
    (broken,) = made.retry(second.number)
    assert (broken.request, broken.fault) == (2, "worker_lost")
    assert finish(made, third)[0].request == 3


def test_a_step_put_back_obeys_the_budget_of_now():
    made = batcher(budget=100)
    made.submit(Request(1, (30,) * 3), 0)
    made.submit(Request(2, (5,)), 0)
    made.put_back(made.next_step(0).number)
    made.budget = 40
    assert [made.next_step(0).lengths for _ in range(3)] == [(5, 30), (30,), (30,)]
    assert made.next_step(0) is None


def test_a_budget_may_change_at_any_time():
    made = batcher(budget=100)
    made.submit(Request(1, (30,) * 9), 0)
    made.budget = 60
    assert len(made.next_step(0).places) == 2
    made.budget = 1000
    assert len(made.next_step(0).places) == 7


def test_an_empty_request_or_a_number_in_use_is_a_bug():
    made = batcher()
    made.submit(Request(1, (5,)), 0)
    for request in (Request(1, (5,)), Request(2, ())):
        with pytest.raises(ValueError, match="This is a bug"):
            made.submit(request, 0)


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
def test_nobody_ends_later_than_if_the_device_were_shared_evenly(arrivals, budget):
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
        made.submit(Request(len(came) - 1, tuple(sizes), priority=priority), 0)
    while turn():
        pass
    even = even_server(came, [{"high": 16, "normal": 4, "low": 1}[p] for *_, p in arrivals])
    assert ends.keys() == even.keys()
    # A step cannot be interrupted, and pairs cannot be split: whoever's turn it is leaves less than
    # the longest pair of each step to others.
    longest = max((max(sizes) for _, sizes, _ in arrivals), default=1)
    lost = budget / (budget - longest + 1)
    assert all(ends[number] <= even[number] * lost + 2 * budget + 1e-3 for number in ends)


@given(st.lists(lengths, min_size=1, max_size=8), st.integers(1, 150), st.randoms())
def test_the_order_of_documents_changes_no_score(requests, budget, chance):
    def scores(shuffled):
        made = batcher(budget)
        orders = [list(range(len(sizes))) for sizes in requests]
        for number, order in enumerate(orders):
            if shuffled:
                chance.shuffle(order)
            sizes, keys = requests[number], [(number, i) for i in order]
            made.submit(Request(number, tuple(sizes[i] for i in order), tuple(keys)), 0)
        answers = {}
        while step := made.next_step(0):
            keys = [(number, orders[number][index]) for number, index in step.places]
            for end in made.finish(step.number, [logit(key) for key in keys]):
                pairs = zip(orders[end.request], end.logits.tolist(), strict=True)
                answers[end.request] = dict(pairs)
        return answers

    assert scores(shuffled=False) == scores(shuffled=True)


@given(st.lists(lengths, max_size=8), st.integers(1, 150), st.sampled_from(["ragged", "padded"]))
def test_the_same_trace_gives_the_same_steps(requests, budget, cost):
    def trace():
        made = batcher(budget, cost=cost)
        steps = []
        for number, sizes in enumerate(requests):
            made.submit(Request(number, tuple(sizes), deadline=number + 1.0), number / 2)
            steps.append(made.next_step(number / 2))
        while step := made.next_step(1.5):
            steps.append(step)
        return steps

    assert trace() == trace()


@pytest.mark.parametrize("cost", ["ragged", "padded"])
@pytest.mark.parametrize("requests", [1, 1000])
def test_a_step_looks_at_a_steps_worth_however_many_wait(cost, requests, monkeypatch):
    made = batcher(2000, cost=cost)
    for number in range(requests):
        made.submit(Request(number, tuple(20 + i % 200 for i in range(100_000 // requests))), 0)
    seen = []
    look = made._choose
    monkeypatch.setattr(made, "_choose", lambda units: seen.append(len(units)) or look(units))
    for _ in range(20):
        finish(made, made.next_step(0))
    assert max(seen) <= 4 * 2000 / 20
    assert made.load().requests >= requests - 20


def test_padded_steps_hold_pairs_of_nearly_one_length():
    made = batcher(1000, cost="padded")
    chance = np.random.default_rng(0)
    for number in range(100):
        made.submit(Request(number, tuple(chance.integers(10, 400, 10).tolist())), 0)
    tokens = paid = 0
    while step := made.next_step(0):
        tokens += step.tokens
        paid += step.cost_tokens
        finish(made, step)
    assert paid / tokens < 1.15


def test_who_has_been_served_or_has_gone_shares_no_longer():
    made = batcher()
    for number, key in enumerate("aabc"):
        made.submit(Request(number, (20,), (key,)), 0)
    assert made.load().weight == 16
    made.cancel(3)
    assert made.load().weight == 12
    made.next_step(0)
    assert made.load().weight == 0  # tokens of a shared pair count for each that waits for it


def test_nobody_joins_a_pair_that_was_cut_nor_leaves_by_its_end():
    made = batcher()
    made.submit(Request(1, (80,), ("a",)), 0)
    assert made.shorten(made.next_step(0).number, 40) == ((1, 0),)
    made.submit(Request(2, (80,), ("a",)), 0)
    cut, whole = made.next_step(0), made.next_step(0)
    assert (cut.lengths, whole.lengths) == ((40,), (80,))
    assert [end.request for end in finish(made, cut)] == [1]
    made.submit(Request(3, (80,), ("a",)), 0)
    assert made.next_step(0) is None
    assert [end.request for end in finish(made, whole)] == [2, 3]

"""The batcher as a state machine: whatever happens, every accepted pair ends exactly once."""

from __future__ import annotations

import numpy as np
from batchers import PRIORITIES, lengths, logit
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from echelon.scheduling.batcher import Batcher
from echelon.scheduling.cost_model import CostModel, work_of
from echelon.scheduling.packing import step_cost
from echelon.scheduling.queue import Completed, FailedRequest, PairRequest


def key_of(request: PairRequest, index: int):
    return (request.number, index) if request.keys is None else request.keys[index]


class World(RuleBasedStateMachine):
    """A batcher, everyone who uses it, and what must be true of both."""

    @initialize(
        budget=st.integers(1, 200),
        max_pairs=st.none() | st.integers(1, 6),
        cost=st.sampled_from(["none", "rectangular"]),
    )
    def begin(self, budget, max_pairs, cost):
        self.batcher = Batcher(CostModel(padding=cost), budget, max_pairs)
        self.now = 0.0
        self.requests: dict[int, PairRequest] = {}
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
        request = PairRequest(number, tuple(lengths), keys, deadline, priority)
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
        assert step.cost_tokens == step_cost(step.lengths, batcher.cost.padding)
        assert step.tokens == sum(step.lengths)
        assert step.cost_tokens <= batcher.budget or len(places) == 1
        assert batcher.max_pairs is None or len(places) <= batcher.max_pairs
        assert len(set(keys)) == len(keys)
        for other in self.running.values():
            twice = set(keys) & set(self.keys(other))
            assert self.cut or not twice, "one pair in two steps at once"
        for number in {number for number, _ in places} | set(step.requests):
            assert number not in self.ended, "scored for no request"
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
            assert isinstance(ended, FailedRequest)
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
        assert load.requests == len(self.batcher._queued)
        units = {id(u): u for e in self.batcher._queued.values() for u in e.pairs}.values()
        waiting = [u.length for u in units if u.state.name in {"WAITING", "AGAIN"}]
        work = work_of(waiting, "none")
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
        assert not self.batcher._pairs
        assert not self.batcher._again


World.TestCase.settings = settings(max_examples=150, stateful_step_count=40)
TestWorld = World.TestCase

"""``Retry-After`` is true: a server of known speed, a clock that only the simulation moves.

The real batcher, cost model and admission; only the time that a step takes is made up, three times
what the model believes at first and ten per cent up or down with each step.
"""

from __future__ import annotations

import random

import pytest

from echelon.errors import Overloaded
from echelon.scheduling.admission import AdmissionLimits, RequestCost, SystemLoad, refuse
from echelon.scheduling.batcher import Batcher
from echelon.scheduling.cost_model import DEFAULT_COEFFICIENTS, CostModel
from echelon.scheduling.queue import PairRequest
from echelon.server.routes import retry_after

SLOWER = 3.0
STEP_TOKENS = 2048


class Simulation:
    """One worker, and callers that come whenever they like."""

    def __init__(self, bounds: AdmissionLimits, seed: int):
        self.now = 0.0
        self.random = random.Random(seed)
        self.deadlines: dict[int, float] = {}
        self.answered: dict[int, float] = {}
        self._bounds = bounds
        self._cost = CostModel()
        self._batcher = Batcher(self._cost, STEP_TOKENS)
        self._requests = 0
        for pairs in (1, 20, 20):  # the warm-up
            self._cost.observe([100] * pairs, self._seconds([100] * pairs))

    @property
    def waiting(self) -> bool:
        """Whether there is something to score."""
        return self._batcher.load().requests > 0

    def lengths(self, max_pairs: int) -> list[int]:
        """Tokens of the pairs of some request."""
        return [self.random.randint(20, 300) for _ in range(self.random.randint(1, max_pairs))]

    def ask(self, lengths: list[int], timeout_s: float | None):
        """Come in; or why not."""
        squares = sum(length**2 for length in lengths)
        deadline = None if timeout_s is None else self.now + timeout_s
        asked = RequestCost(len(lengths), sum(lengths), squares, deadline)
        load = SystemLoad(
            self._batcher.load(), self._cost, next_completions=self._batcher.next_completions
        )
        refusal = refuse(asked, load, self._bounds, self.now)
        if refusal is None:
            self._requests += 1
            request = PairRequest(self._requests, tuple(lengths), None, deadline)
            self._batcher.submit(request, self.now)
            if deadline is not None:
                self.deadlines[request.number] = deadline
        return refusal

    def step(self) -> None:
        """Score one step."""
        step = self._batcher.next_step(self.now)
        self._batcher.expire(self.now)
        if step is not None:
            seconds = self._seconds(step.lengths)
            self.now += seconds
            self._cost.observe(step.lengths, seconds)
            ended = self._batcher.finish(step.number, [1.0] * len(step.places))
            self.answered.update({end.request: self.now for end in ended})

    def _seconds(self, lengths) -> float:
        return CostModel().predict(lengths) * SLOWER * self.random.uniform(0.9, 1.1)


STEP_S = CostModel().predict([100] * (STEP_TOKENS // 100)) * SLOWER * 1.1


def refused(bounds: AdmissionLimits, seed: int, max_pairs: int, timeout_s: float | None):
    """The simulation at the moment when a request is refused, the request, and why."""
    made = Simulation(bounds, seed)
    while True:
        lengths = made.lengths(max_pairs)
        refusal = made.ask(lengths, timeout_s)
        if refusal is not None and isinstance(refusal.error, Overloaded):
            return made, lengths, refusal
        if made.random.random() < 0.1:
            made.step()


CASES = {
    "requests_full": (AdmissionLimits(max_requests=20, max_wait_s=1e6), 40, None),
    "tokens_full": (
        AdmissionLimits(max_tokens=200_000, max_request_tokens=100_000, max_wait_s=1e6),
        300,
        None,
    ),
    "wait_too_long": (AdmissionLimits(max_wait_s=20.0), 100, None),
    "deadline_too_near": (AdmissionLimits(max_wait_s=1e6), 40, 8.0),
}


@pytest.mark.parametrize("reason", CASES)
@pytest.mark.parametrize("seed", range(25))
def test_a_request_is_admitted_at_the_promised_time(reason, seed):
    """Never too early by more than three steps and a third, nor too late by more than thrice."""
    bounds, max_pairs, timeout_s = CASES[reason]
    made, lengths, refusal = refused(bounds, seed, max_pairs, timeout_s)
    assert refusal.reason == reason
    promised_s, since = int(retry_after(refusal.error.retry_after_s)), made.now
    while made.ask(lengths, timeout_s) is not None:
        made.step()
    waited = made.now - since
    assert waited <= promised_s * 4 / 3 + 3 * STEP_S
    assert promised_s <= 3 * waited + 1


@pytest.mark.parametrize("seed", range(5))
def test_admitted_requests_meet_their_deadlines(seed):
    """More is asked for than can be scored; what is let in is in time, but for rare errors
    of prediction."""
    made = Simulation(AdmissionLimits(), seed)
    refusals = 0
    for _ in range(600):
        lengths = made.lengths(40)
        refusals += made.ask(lengths, made.random.choice((1.0, 4.0, 15.0))) is not None
        due = made.now + CostModel().predict(lengths) * SLOWER / 2
        while made.now < due and made.waiting:
            made.step()
        made.now = max(made.now, due)
    while made.waiting:
        made.step()
    met = [made.answered.get(number, 1e9) <= due for number, due in made.deadlines.items()]
    assert refusals > 100
    assert sum(met) >= 0.9 * len(met)


def test_the_simulated_machine_is_slower_than_the_model_believes_at_first():
    assert DEFAULT_COEFFICIENTS["cpu"] == CostModel().coefficients
    assert 3 * CostModel().predict([100] * (STEP_TOKENS // 100)) < STEP_S

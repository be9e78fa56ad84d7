"""A service whose machine changes speed while it runs: predictions, admission, goodput, drift."""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from dataclasses import replace
from random import Random

import pytest
from services import GUARD_S, LetterEncoder, RecordingListener, coded, encoded, submit

from echelon.engine.service import Service
from echelon.engine.state import ServiceSettings
from echelon.engine.worker import StepResult
from echelon.errors import DeadlinePassed
from echelon.models.fake import FakeScorer
from echelon.scheduling.cost_model import DEFAULT_COEFFICIENTS, Coefficients, work_of
from echelon.scheduling.drift import HOLD
from echelon.scheduling.fit import Prior

USUAL = Coefficients(2e-3, 5e-5, 4e-8)
HALF = USUAL.priced([2 * price for price in USUAL.prices])
SLOW_ATTENTION = replace(USUAL, square_s=4 * USUAL.square_s)
TUNED = Prior(USUAL, "none", "cpu", same=True)
WITHIN = 50


class Planned:
    """A worker that scores at once and says that it took what its prices ask."""

    def __init__(self, ended=None):
        self.prices = USUAL
        self._scorer = FakeScorer()
        self._sent = deque()

    def start(self, precision, *, sparing=False):
        return self._scorer.info

    def send(self, batch, timeout_s):
        self._sent.append(batch)

    def wait(self, timeout_s):
        return bool(self._sent)

    def receive(self, timeout_s):
        batch = self._sent.popleft()
        seconds = self.prices.seconds(work_of(batch.lengths, "none"))
        return StepResult(self._scorer.score(batch), seconds, 0)

    def release(self):
        pass

    kill = stop = release


class Town:
    """A service with such a worker, its listener, and callers that come one after another."""

    def __init__(self, prior=TUNED, **settings):
        self.worker, self.listener, self.random = Planned(), RecordingListener(), Random(0)
        self.service = Service(
            LetterEncoder(),
            lambda number, ended: self.worker,
            ServiceSettings(precision="fp32", **settings),
            listener=self.listener,
            clock=lambda: 0.0,
            prior=prior,
        )

    async def call(self, count):
        """Requests of any kind; how far each step's prediction was off."""
        before = len(self.listener.of("StepFinished"))
        for number in range(count):
            letters = [1] * self.random.choice([5, 40, 200, 400])
            await submit(self.service, coded(*letters, number, count=self.random.randint(1, 4)))
        steps = self.listener.of("StepFinished")[before:]
        assert len(steps) == count
        return [abs(step.predicted_s / step.actual_s - 1) for step in steps]

    async def goodput(self, seconds, count=10):
        """How many of some large requests are answered that have so many seconds."""
        answered = 0
        for number in range(count):
            try:
                await submit(self.service, coded(*[2] * 300, number, count=6), deadline=seconds)
            except DeadlinePassed:
                continue
            answered += 1
        return answered


def live(main, **settings):
    async def guarded():
        town = Town(**settings)
        async with asyncio.timeout(GUARD_S), town.service:
            await main(town)

    asyncio.run(guarded())


@pytest.mark.parametrize("slow", [HALF, SLOW_ATTENTION], ids=["half", "attention"])
def test_a_worker_at_half_its_speed_is_followed_within_fifty_steps_and_back(slow):
    async def main(town):
        assert max(await town.call(60)) < 0.01
        for prices in (slow, USUAL):
            town.worker.prices = prices
            errors = await town.call(WITHIN + 30)
            assert max(errors[:3]) > 0.15
            assert max(errors[WITHIN:]) <= 0.15

    live(main)


def test_admission_refuses_what_the_slow_worker_cannot_do_and_goodput_recovers():
    large = encoded(coded(*[2] * 300, 0, count=6)).lengths
    usual, slow = (prices.seconds(work_of(large, "none")) for prices in (USUAL, HALF))

    async def main(town):
        assert await town.goodput(1.5 * usual) == 10
        town.worker.prices = HALF
        await town.call(WITHIN)
        assert await town.goodput(1.5 * usual) == 0
        assert await town.goodput(1.2 * slow) == 10
        town.worker.prices = USUAL
        await town.call(WITHIN)
        assert await town.goodput(1.5 * usual) == 10
        assert {event.reason for event in town.listener.of("RequestRefused")} == {
            "deadline_impossible"
        }

    live(main)


def test_a_drift_is_in_the_snapshot_and_once_in_the_log_with_the_remedy(caplog):
    async def main(town):
        await town.call(20)
        town.worker.prices = HALF
        await town.call(3 * HOLD)
        assert town.service.snapshot().drifted
        assert town.service.snapshot().drift == pytest.approx(2, rel=0.02)
        town.worker.prices = USUAL
        await town.call(2 * HOLD)
        assert not town.service.snapshot().drifted

    with caplog.at_level(logging.INFO, "echelon.engine.dispatcher"):
        live(main)
    slower, recovered = [
        r.getMessage() for r in caplog.records if "times as long" in r.getMessage()
    ]
    assert "1.99" in slower or "2.00" in slower
    assert "echelon tune --refresh" in slower
    assert recovered.endswith("as before.")


@pytest.mark.parametrize(
    ("prior", "begins", "normal"),
    [
        (TUNED, USUAL, True),
        (replace(TUNED, same=False), USUAL, False),
        (replace(TUNED, padding="rectangular"), DEFAULT_COEFFICIENTS["cpu"], False),
        (replace(TUNED, device="cuda:0"), DEFAULT_COEFFICIENTS["cpu"], False),
        (None, DEFAULT_COEFFICIENTS["cpu"], False),
    ],
)
def test_the_profiles_prices_hold_from_the_start_where_they_are_of_this_kind(prior, begins, normal):
    async def main(town):
        dispatch = town.service._dispatcher
        assert dispatch.cost.prior == begins
        town.worker.prices = HALF
        await town.call(2 * HOLD)
        assert town.service.snapshot().drifted == normal

    live(main, prior=prior)


def test_late_steps_and_missed_goals_lower_the_budget_and_quiet_ones_raise_it():
    async def main(town):
        full = coded(*[3] * 10, count=20)  # some 300 tokens: more than half of the budget
        town.worker.prices = USUAL.priced([50 * price for price in USUAL.prices])
        for _ in range(4):
            await submit(town.service, full)
        assert town.service.snapshot().load.budget == 300
        town.worker.prices = USUAL
        for _ in range(200):
            await submit(town.service, full)
        moves = [(event.tokens, event.reason) for event in town.listener.of("BudgetMoved")]
        assert moves[0] == (300, "goal")
        assert moves[-1] == (400, "recovered")
        assert town.service.snapshot().load.budget == 400

    live(main, token_budget=400, goal_s=0.5)

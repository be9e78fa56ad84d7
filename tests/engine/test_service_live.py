"""A service whose machine changes speed while it runs: predictions, admission, goodput, drift."""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from dataclasses import replace
from random import Random

import pytest
from services import GUARD_S, LetterEncoder, RecordingListener, coded, encoded, submit

from echelon.engine.events import ServiceSettings
from echelon.engine.service import Service
from echelon.engine.worker import StepResult
from echelon.errors import DeadlinePassed
from echelon.models.base import FakeScorer
from echelon.scheduling.cost_model import DEFAULT_COEFFICIENTS, HOLD, Coefficients, work_of
from echelon.scheduling.fit import Prior

USUAL = Coefficients(2e-3, 5e-5, 4e-8)
HALF = USUAL.with_values([2 * value for value in USUAL.values])
SLOW_ATTENTION = replace(USUAL, square_s=4 * USUAL.square_s)
TUNED = Prior(USUAL, "none", "cpu", same=True)
WITHIN = 50


class Planned:
    """A worker that scores at once and reports the seconds of its coefficients."""

    def __init__(self, ended=None):
        self.coefficients = USUAL
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
        seconds = self.coefficients.seconds(work_of(batch.lengths, "none"))
        return StepResult(self._scorer.score(batch), seconds, 0)

    def release(self):
        pass

    kill = stop = release


class RunningService:
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
        running = RunningService(**settings)
        async with asyncio.timeout(GUARD_S), running.service:
            await main(running)

    asyncio.run(guarded())


@pytest.mark.parametrize("slow", [HALF, SLOW_ATTENTION], ids=["half", "attention"])
def test_a_worker_at_half_its_speed_is_followed_within_fifty_steps_and_back(slow):
    async def main(running):
        assert max(await running.call(60)) < 0.01
        for coefficients in (slow, USUAL):
            running.worker.coefficients = coefficients
            errors = await running.call(WITHIN + 30)
            assert max(errors[:3]) > 0.15
            assert max(errors[WITHIN:]) <= 0.15

    live(main)


def test_admission_refuses_requests_that_the_slow_worker_cannot_serve_and_goodput_recovers():
    large = encoded(coded(*[2] * 300, 0, count=6)).lengths
    usual, slow = (each.seconds(work_of(large, "none")) for each in (USUAL, HALF))

    async def main(running):
        assert await running.goodput(1.5 * usual) == 10
        running.worker.coefficients = HALF
        await running.call(WITHIN)
        assert await running.goodput(1.5 * usual) == 0
        assert await running.goodput(1.2 * slow) == 10
        running.worker.coefficients = USUAL
        await running.call(WITHIN)
        assert await running.goodput(1.5 * usual) == 10
        assert {event.reason for event in running.listener.of("RequestRefused")} == {
            "deadline_impossible"
        }

    live(main)


def test_a_drift_is_in_the_snapshot_and_once_in_the_log_with_the_remedy(caplog):
    async def main(running):
        await running.call(20)
        running.worker.coefficients = HALF
        await running.call(3 * HOLD)
        assert running.service.snapshot().drifted
        assert running.service.snapshot().drift == pytest.approx(2, rel=0.02)
        running.worker.coefficients = USUAL
        await running.call(2 * HOLD)
        assert not running.service.snapshot().drifted

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
def test_the_profiles_coefficients_are_used_from_the_start_on_the_same_kind_of_machine(
    prior, begins, normal
):
    async def main(running):
        dispatch = running.service._dispatcher
        assert dispatch.cost.prior == begins
        running.worker.coefficients = HALF
        await running.call(2 * HOLD)
        assert running.service.snapshot().drifted == normal

    live(main, prior=prior)


def test_late_steps_and_missed_goals_lower_the_budget_and_quiet_ones_raise_it():
    async def main(running):
        full = coded(*[3] * 10, count=20)  # some 300 tokens: more than half of the budget
        running.worker.coefficients = USUAL.with_values([50 * value for value in USUAL.values])
        for _ in range(4):
            await submit(running.service, full)
        assert running.service.snapshot().load.budget == 300
        running.worker.coefficients = USUAL
        for _ in range(200):
            await submit(running.service, full)
        moves = [(event.tokens, event.reason) for event in running.listener.of("BudgetMoved")]
        assert moves[0] == (300, "goal")
        assert moves[-1] == (400, "recovered")
        assert running.service.snapshot().load.budget == 400

    live(main, token_budget=400, goal_s=0.5)

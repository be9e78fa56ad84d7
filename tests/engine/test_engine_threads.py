"""Several callers of one engine."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
from helpers import PatientScorer, pairs_of

from echelon.engine.engine import Engine, StepLimits, _CallState
from echelon.errors import InvalidInput, OutOfMemory


class OneAtATime(PatientScorer):
    """Fails the test when two threads are in it at once."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self._inside = threading.Lock()

    def score(self, batch):
        assert self._inside.acquire(blocking=False), "two steps at once"
        try:
            return super().score(batch)
        finally:
            self._inside.release()


def work(number: int) -> list[int]:
    """Lengths of one caller's pairs, different for each."""
    return [10 + (7 * number + 13 * i) % 120 for i in range(25)]


def test_callers_get_their_own_answers_through_memory_trouble():
    jobs = [pairs_of(work(number)) for number in range(8)]
    alone = [Engine(PatientScorer(), StepLimits(500)).run(job).logits.tolist() for job in jobs]
    engine = Engine(OneAtATime(300, stale_tokens=50), StepLimits(2000))
    with ThreadPoolExecutor(8) as threads:
        together = list(threads.map(lambda job: engine.run(job).logits.tolist(), jobs))
    assert together == alone
    assert engine.budget <= 300


def test_one_callers_failure_is_its_own():
    engine = Engine(OneAtATime(200), StepLimits(200))
    good, bad = pairs_of([50] * 40), pairs_of([50, 250])
    alone = Engine(PatientScorer(), StepLimits(200)).run(good).logits.tolist()

    def run(job):
        try:
            return engine.run(job).logits.tolist()
        except OutOfMemory as error:
            return str(error)

    with ThreadPoolExecutor(4) as threads:
        answers = list(threads.map(run, [good, bad] * 4))
    assert answers[0::2] == [alone] * 4
    assert all(
        answer.startswith("out of memory: pairs[1] of 250 tokens") for answer in answers[1::2]
    )


def test_anothers_success_does_not_send_a_caller_back_to_the_first_rung():
    engine = Engine(PatientScorer(100), StepLimits(400))
    large = _CallState(pairs_of([40] * 10), StepLimits(400))
    small = _CallState(pairs_of([10] * 10), StepLimits(10))
    for run in (large, small):
        run.plan(run.limits.budget, engine.info)
    for _ in range(8):
        engine._step(large)
        engine._step(small)
    assert [step.rung for step in large.ladder] == ["drop_caches", "halve_budget", "halve_budget"]


def test_closing_waits_for_the_step_under_way():
    entered, leave = threading.Event(), threading.Event()

    class Slow(PatientScorer):
        def score(self, batch):
            entered.set()
            assert leave.wait(60)
            assert not self.closed
            return super().score(batch)

    scorer = Slow()
    engine = Engine(scorer, StepLimits(20))
    with ThreadPoolExecutor(2) as threads:
        running = threads.submit(engine.run, pairs_of([20, 20]))
        assert entered.wait(60)
        closing = threads.submit(engine.close)
        leave.set()
        closing.result()
        try:
            running.result()
        except InvalidInput as error:
            assert "closed" in str(error)  # noqa: PT017 - both ends are right: a race decides
    assert scorer.closed
    with pytest.raises(InvalidInput, match="closed"):
        engine.run(pairs_of([20]))

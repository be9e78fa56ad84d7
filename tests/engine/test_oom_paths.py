"""Out of memory in library calls, in calls that share steps, and in a service: one policy."""

from __future__ import annotations

import asyncio
import threading
from itertools import count

import pytest
from helpers import PatientScorer, pairs_of

from echelon.engine.dispatcher import Dispatcher
from echelon.engine.engine import Engine, LocalWorker, SharedEngine, StepLimits
from echelon.engine.events import Listener
from echelon.engine.inflight import InflightRequest
from echelon.engine.supervisor import WorkerConfig, WorkerSupervisor
from echelon.errors import EchelonError, OutOfMemory
from echelon.models.base import DeviceOutOfMemory
from echelon.scheduling.batcher import Batcher
from echelon.scheduling.cost_model import CostModel
from echelon.scheduling.packing import NO_BUDGET
from echelon.types import monotonic

TIMEOUT_S = 60.0


class Path:
    """One way to have pairs scored; ``score`` gives (logits, truncated tokens, rungs)."""

    fresh: tuple = ()
    """The rung that only a worker with a process of its own has."""

    def __init__(self, scorer, budget, allow=(), reopen=None):
        self.learned: list = []
        limits = StepLimits(budget, allow=allow)
        self.engine = Engine(scorer, limits, reopen=reopen, learned=self.learned.append)
        self.open(limits)

    def open(self, limits) -> None:
        pass

    def score(self, pairs):
        result = self.engine.run(pairs)
        return result.logits, result.truncated_tokens, names(result.report.ladder)

    @property
    def budget(self) -> int:
        return self.engine.budget

    def close(self) -> None:
        self.engine.close()


class SharedPath(Path):
    """As an asynchronous reranker scores."""

    def open(self, limits):
        self.shared = SharedEngine(self.engine, limits)

    def score(self, pairs):
        async def call():
            async with asyncio.timeout(TIMEOUT_S):
                return await self.shared.score(pairs)

        answer = asyncio.run(call())
        return answer.logits, answer.truncated_tokens, names(answer.ladder)

    def close(self):
        self.shared.close()
        super().close()


class RenewableWorker(LocalWorker):
    """A worker whose process can be replaced; a fresh one has a scorer of its own."""

    renewable = True

    def __init__(self, scorer, reopen):
        super().__init__(Engine(scorer, StepLimits(NO_BUDGET), reopen=reopen))
        self._reopen = reopen
        self.starts = 0

    def start(self, precision, *, sparing=False):
        self.starts += 1
        if self.starts > 1 and self._reopen is not None:
            self._engine = Engine(self._reopen(precision), StepLimits(NO_BUDGET))
        return self._engine.info


class ServedPath(Path):
    """As a service scores: a dispatcher, a supervisor and a worker that can be replaced."""

    fresh = ("fresh_worker",)

    def __init__(self, scorer, budget, allow=(), reopen=None):
        self.learned = []
        self.numbers = count(1)
        self.worker = RenewableWorker(scorer, reopen)
        batcher = Batcher(CostModel(), budget)
        self.dispatcher = Dispatcher(
            batcher, Listener(), monotonic, allow, learned=self.learned.append
        )
        self.dispatcher.set_up(self.worker._engine.info, budget, None, None)
        self.supervisor = WorkerSupervisor(
            0,
            self.worker,
            self.dispatcher,
            WorkerConfig("fp32"),
            opened=lambda _: (),
            started=lambda _: None,
        )
        self.supervisor.start()

    def score(self, pairs):
        answers, done = [], threading.Event()

        def answered(answer):
            answers.append(answer)
            done.set()

        number = next(self.numbers)
        self.dispatcher.submit(InflightRequest(number, pairs, answered, monotonic()))
        assert done.wait(TIMEOUT_S)
        answer = answers[0]
        if isinstance(answer, EchelonError):
            raise answer
        return answer.logits, answer.truncated_tokens, names(answer.ladder)

    @property
    def budget(self):
        return self.dispatcher.load().budget

    def close(self):
        self.dispatcher.close()
        self.supervisor.join()


@pytest.fixture(params=[Path, SharedPath, ServedPath], ids=["sync", "shared", "served"])
def opened(request):
    """Opens the path under test; it is closed after the test."""
    paths = []

    def make(*args, **settings):
        paths.append(request.param(*args, **settings))
        return paths[-1]

    yield make
    for path in paths:
        path.close()


def names(ladder) -> list[str]:
    return [step.rung for step in ladder]


def expected(pairs) -> list[float]:
    scorer = PatientScorer()
    return [float(scorer.score(pairs.batch([i]))[0]) for i in range(len(pairs))]


class Transient(PatientScorer):
    """Has no room for the first steps, of any size."""

    def __init__(self, failures, **settings):
        super().__init__(**settings)
        self.failures = failures

    def score(self, batch):
        if self.failures:
            self.failures -= 1
            raise DeviceOutOfMemory("another program holds the memory")
        return super().score(batch)


class Crowded(PatientScorer):
    """Shares its card with processes that hold memory."""

    def score(self, batch):
        try:
            return super().score(batch)
        except DeviceOutOfMemory as error:
            raise DeviceOutOfMemory(str(error), crowded=True) from None


class Refilling(PatientScorer):
    """Its caches fill with each step that fits."""

    def score(self, batch):
        logits = super().score(batch)
        self._stale_tokens = 60
        return logits


class Poisoned(PatientScorer):
    """Has no room for pairs of 33 tokens, whatever else it has room for."""

    def score(self, batch):
        if 33 in batch.lengths:
            raise DeviceOutOfMemory("33")
        return super().score(batch)


def test_a_transient_shortage_drops_caches_and_keeps_the_budget(opened):
    path, pairs = opened(Transient(1), 100), pairs_of([20] * 12)
    logits, _, rungs = path.score(pairs)
    assert logits.tolist() == expected(pairs)
    assert rungs == ["drop_caches"]
    assert path.learned == []
    assert path.budget == 100


def test_steps_above_what_fits_halve_the_budget_until_they_fit(opened):
    path, pairs = opened(PatientScorer(100), 400), pairs_of([20] * 40)
    logits, _, rungs = path.score(pairs)
    assert logits.tolist() == expected(pairs)
    assert rungs == ["drop_caches", "halve_budget", "halve_budget"]
    assert path.learned == [200, 100]
    assert path.budget == 100
    assert path.score(pairs)[2] == []


def test_a_budget_that_other_processes_lowered_is_not_learned(opened):
    path, pairs = opened(Crowded(100), 400), pairs_of([20] * 40)
    logits, _, rungs = path.score(pairs)
    assert logits.tolist() == expected(pairs)
    assert rungs == ["drop_caches", "halve_budget", "halve_budget"]
    assert path.budget == 100
    assert path.learned == []


def test_caches_are_dropped_again_after_a_step_of_the_call_has_fitted(opened):
    path, pairs = opened(Refilling(100), 100), pairs_of([50] * 6)
    logits, _, rungs = path.score(pairs)
    assert logits.tolist() == expected(pairs)
    assert rungs == ["drop_caches"] * 2
    assert path.learned == []


def test_a_pair_that_does_not_fit_alone_is_an_error_and_the_next_call_is_scored(opened):
    path = opened(PatientScorer(100), 1000)
    with pytest.raises(OutOfMemory, match=r"pairs\[2\] of 130 tokens does not fit"):
        path.score(pairs_of([20, 20, 130, 20]))
    pairs = pairs_of([20, 100])
    assert path.score(pairs)[0].tolist() == expected(pairs)


def test_a_pair_that_never_fits_ends_though_others_do(opened):
    path = opened(Poisoned(), 100)
    with pytest.raises(OutOfMemory, match="of 33 tokens"):
        path.score(pairs_of([50, 40, 33, 20, 50, 60, 60, 20]))


def test_a_learned_budget_rises_again_after_many_steps_that_fit(opened, monkeypatch):
    monkeypatch.setattr("echelon.scheduling.token_budget.MEMORY_QUIET", 20)
    monkeypatch.setattr("echelon.scheduling.token_budget.QUIET", 5)
    path = opened(Transient(2), 40)
    path.score(pairs_of([10] * 8))
    assert path.learned == [20]
    for _ in range(10):
        path.score(pairs_of([5]))
    assert path.budget == 20
    for _ in range(60):
        path.score(pairs_of([5]))
    assert path.budget == 40
    assert path.learned == [20, 22, 24, 27, 30, 33, 37, None]


def test_calls_that_share_steps_and_calls_of_their_own_learn_one_budget():
    path = SharedPath(PatientScorer(100), 400)
    pairs = pairs_of([20] * 40)
    path.engine.run(pairs)
    assert path.learned == [200, 100]
    assert path.score(pairs)[2] == []
    path.close()


def test_a_lower_precision_where_it_is_allowed(opened):
    reopened = []

    def reopen(precision):
        reopened.append(precision)
        return PatientScorer(100, precision=precision)

    path, pairs = opened(PatientScorer(100), 150, ("precision",), reopen), pairs_of([150, 90])
    path.score(pairs_of([20]))
    logits, _, rungs = path.score(pairs)
    assert logits.tolist() == expected(pairs)
    assert rungs == ["drop_caches", *path.fresh, "lower_precision"]
    assert reopened == ["fp32"] * len(path.fresh) + ["bf16"]


@pytest.mark.parametrize("path_of", [Path, SharedPath])
def test_a_precision_that_cannot_be_opened_is_not_tried(path_of):
    path = path_of(PatientScorer(100), 150, ("precision",))
    with pytest.raises(OutOfMemory):
        path.score(pairs_of([150]))
    path.close()


def test_shorter_pairs_where_it_is_allowed(opened):
    path = opened(PatientScorer(160), 1000, ("max_length",))
    path.score(pairs_of([20]))
    _, truncated, rungs = path.score(pairs_of([400]))
    assert truncated.tolist() == [300]
    assert rungs == ["drop_caches", *path.fresh, "shorten", "shorten"]


def test_a_fresh_process_is_tried_before_anything_is_given_up():
    path = ServedPath(PatientScorer(40), 200, ("max_length",), lambda _: PatientScorer(200))
    path.score(pairs_of([20]))
    pairs = pairs_of([150])
    logits, truncated, rungs = path.score(pairs)
    assert logits.tolist() == expected(pairs)
    assert truncated.tolist() == [0]
    assert rungs == ["drop_caches", "fresh_worker"]
    path.close()

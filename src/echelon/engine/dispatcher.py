"""The desk between callers and workers: the batcher behind a lock, and what each caller is owed.

Callers hand jobs in and are called back; workers' keepers take steps and bring results. It decides
nothing itself: :mod:`echelon.scheduling.batcher` says which step is next,
:mod:`echelon.scheduling.oom_policy`
what to do when memory runs out.
"""

from __future__ import annotations

import logging
import threading
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from echelon.engine.events import BudgetMoved, StepFinished
from echelon.engine.inflight import EXPIRED, does_not_fit, error_of, lost, query_too_long
from echelon.errors import (
    DeadlinePassed,
    EchelonError,
    ShuttingDown,
    WorkerLost,
)
from echelon.scheduling.cost_model import DEFAULT_COEFFICIENTS
from echelon.scheduling.drift import Drift
from echelon.scheduling.oom_policy import OomPolicy
from echelon.scheduling.queue import Completed, PairRequest
from echelon.scheduling.token_budget import TokenBudget
from echelon.tokenization.pairs import TruncationImpossible, gather
from echelon.types import LadderStep

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable

    from echelon.engine.events import Listener, Outcome
    from echelon.engine.inflight import InflightRequest
    from echelon.engine.worker import StepResult
    from echelon.options import Allowance
    from echelon.scheduling.batcher import Batcher
    from echelon.scheduling.fit import Prior
    from echelon.scheduling.oom_policy import OomAction
    from echelon.scheduling.queue import CompletionEstimate, Ended, PlannedStep, QueueLoad
    from echelon.types import Clock, IntArray, ModelInfo, TokenBatch

    Explanation = Callable[[str], EchelonError]

logger = logging.getLogger(__name__)

DRIFT_NEWS = {
    "drifted": (
        logging.WARNING,
        (
            "Steps take %.2f times as long as when the machine was measured. Predictions follow; "
            "find what else runs or throttles it, or measure again with `echelon tune --refresh`."
        ),
    ),
    "recovered": (
        logging.INFO,
        "Steps take %.2f times as long as when the machine was measured: as before.",
    ),
}
"""What the log says of a machine that changed its speed, see :mod:`echelon.scheduling.drift`."""


@dataclass(frozen=True, slots=True)
class PreparedStep:
    """A step, ready to go to a worker."""

    step: PlannedStep
    batch: TokenBatch


class Dispatcher:
    """The batcher for many threads.

    Args:
        batcher: what decides.
        listener: hears of requests that end.
        clock: seconds.
        allow: what may be given up when a pair alone does not fit.
        learned: called with each smaller token budget that memory taught.
        workers: workers that there are.
    """

    def __init__(
        self,
        batcher: Batcher,
        listener: Listener,
        clock: Clock,
        allow: tuple[Allowance, ...] = (),
        learned: Callable[[int], None] | None = None,
        workers: int = 1,
    ) -> None:
        self.clock = clock
        self.last_scored: float | None = None
        self.busy_s = 0.0
        self._batcher = batcher
        self.listener = listener
        self.cost = batcher.cost
        self.drift = Drift()
        self._took: list[tuple[tuple[int, ...], float]] = []
        self._budget = TokenBudget(batcher.budget)
        self._room = OomPolicy(allow)
        self._learned = learned
        self._jobs: dict[int, InflightRequest] = {}
        self._lock = threading.Condition()
        self._closed = False
        self._workers = workers
        self._idle = 0
        self._troubles: dict[int, str] = {}

    # For callers.

    def submit(self, job: InflightRequest) -> None:
        """Put a request into the queue; from now on ``job.done`` is called once."""
        keys = job.pairs.keys()
        lengths = tuple(job.pairs.lengths.tolist())
        request = PairRequest(job.number, lengths, keys, job.deadline, job.priority)
        with self._lock:
            if self._closed:
                raise ShuttingDown("The service has stopped. Ask another server.")
            job.joined = self.clock()
            self._jobs[job.number] = job
            self._batcher.submit(request, job.joined)
            self._lock.notify_all()

    def cancel(self, number: int) -> None:
        """The caller has gone, or its time is up; what only it wanted is not scored."""
        with self._lock:
            if self._batcher.cancel(number):
                job, now = self._jobs.pop(number), self.clock()
                late = job.deadline is not None and job.deadline <= now
                self.listener.request_ended(job.ended("expired" if late else "cancelled", now))

    def set_up(
        self, facts: ModelInfo, budget: int, prior: Prior | None, goal_s: float | None
    ) -> None:
        """What the scorer turned out to be.

        Args:
            facts: what it is.
            budget: most tokens a step may cost.
            prior: what steps cost when the machine was tuned.
            goal_s: latency goal that steps are kept small for.
        """
        prices = DEFAULT_COEFFICIENTS[facts.device.partition(":")[0]]
        known = prior is not None and prior.serves(facts)
        with self._lock:
            self.cost.begin(prior.coefficients if prior and known else prices, facts.padding)
            self.drift = Drift(1.0 if prior and known and prior.same else None)
            self._budget = TokenBudget(budget, goal_s)
            self._batcher.budget = budget

    def load(self) -> QueueLoad:
        """What lies ahead."""
        with self._lock:
            return self._batcher.load()

    def soonest(self, places: int, workers: int) -> list[CompletionEstimate]:
        """The next requests to end; see :func:`echelon.scheduling.queue.next_completions`."""
        with self._lock:
            return self._batcher.soonest(places, workers)

    def close(self) -> None:
        """Take nothing more in; whoever still waits is told."""
        with self._lock:
            self._closed = True
            gone = ShuttingDown("The service stopped before the request was done. Try another.")
            for number in list(self._jobs):
                self._batcher.cancel(number)
                self._tell(number, gone)
            self._lock.notify_all()

    # For the keepers of workers.

    def hope(self, worker: int, trouble: str | None) -> None:
        """A worker is up (None), or cannot be brought up; where none can, nobody waits for it."""
        with self._lock:
            if trouble is None:
                self._troubles.clear()
            else:
                self._troubles[worker] = trouble
            if (error := self.hopeless) is not None:
                for number in list(self._jobs):
                    self._batcher.cancel(number)
                    self._tell(number, error)

    def staff(self, numbers: Collection[int]) -> None:
        """The workers that there are from now on."""
        with self._lock:
            self._workers = len(numbers)
            self._troubles = {n: why for n, why in self._troubles.items() if n in numbers}

    @property
    def hopeless(self) -> WorkerLost | None:
        """Why no worker will come up soon; None while one may."""
        troubles = dict(self._troubles)
        if len(troubles) < self._workers:
            return None
        return WorkerLost(
            f"No scoring process can be started ({next(iter(troubles.values()))}). "
            "Ask another server; this one keeps trying, and its log has the cause."
        )

    @property
    def closed(self) -> bool:
        """Whether it has closed."""
        return self._closed

    def wake(self) -> None:
        """Let those who wait in :meth:`take` look again."""
        with self._lock:
            self._lock.notify_all()

    def take(self, news: Callable[[], bool] | None = None) -> PreparedStep | None:
        """The next step.

        Args:
            news: wait for a step until this is true, or all is closed; None waits for nothing.
        """
        with self._lock:
            self._idle += 1
            try:
                while (step := self._next()) is None:
                    if news is None or self._closed or news():
                        return None
                    self._lock.wait()
            finally:
                self._idle -= 1
            picks = [(self._jobs[number].pairs, index) for number, index in step.places]
        return PreparedStep(step, gather(picks))

    def finish(self, step: PlannedStep, scored: StepResult, worker: int) -> None:
        """A worker scored a step."""
        with self._lock:
            now = self.last_scored = self.clock()
            self.busy_s += scored.seconds
            self._took.append((step.lengths, scored.seconds))
            self._move_budget(step, scored.seconds)
            self._room.fitted(step)
            for job in self._of(step):
                job.scored(step, scored.seconds, now)
            ended = self._batcher.finish(step.number, scored.logits)
            self.listener.step_finished(
                StepFinished(
                    worker=worker,
                    predicted_s=step.predicted_s,
                    actual_s=scored.seconds,
                    pairs=len(step.places),
                    requests=len(step.requests),
                    tokens=step.tokens,
                    cost_tokens=step.cost_tokens,
                    resident_bytes=scored.resident_bytes,
                    again=step.again,
                )
            )
            self._deliver(ended)

    def learn(self) -> None:
        """Fit prices to the steps that ended: half a millisecond that no answer should wait for."""
        with self._lock:
            for lengths, seconds in self._took:
                self.cost.observe(lengths, seconds)
                news = self.drift.see(self.cost.scale)
                if news is not None:
                    logger.log(*DRIFT_NEWS[news], self.drift.ratio)
            self._took.clear()

    def observe(self, lengths: IntArray, seconds: float) -> None:
        """A step of nobody's, scored to warm up, took so long."""
        with self._lock:
            self.cost.observe(lengths, seconds)
            self.last_scored = self.clock()

    def put_back(self, steps: Iterable[PlannedStep]) -> None:
        """Steps that were taken and never began."""
        with self._lock:
            for step in steps:
                self._batcher.put_back(step.number)
            self._lock.notify_all()

    def lost(self, steps: Iterable[PlannedStep]) -> None:
        """A worker has gone with steps: the first ran, the others never began."""
        with self._lock:
            for position, step in enumerate(steps):
                if position == 0:
                    ended = self._batcher.retry(step.number)
                    self._deliver(ended, partial(lost, len(step.places)))
                else:
                    self._batcher.put_back(step.number)
            self._lock.notify_all()

    def fail(self, step: PlannedStep, error: EchelonError) -> None:
        """A step cannot be scored; where it was of several requests, each has a try of its own."""
        with self._lock:
            if len(step.requests) > 1:
                ended = self._batcher.retry(step.number, "scorer")
            else:
                ended = self._batcher.fail(step.number, "scorer")
            self._deliver(ended, lambda _: error)
            self._lock.notify_all()

    def out_of_memory(
        self,
        step: PlannedStep,
        reason: str,
        facts: ModelInfo,
        *,
        fresh: bool = False,
        renewable: bool = False,
    ) -> tuple[OomAction, int]:
        """A step did not fit: decide what to do, and plan it anew.

        For ``fresh_worker`` it stays with the keeper, who scores it in a fresh process.

        Caches are dropped for a request once. Whether other steps went well meanwhile says nothing:
        one that was sent ahead always does, and a pair that never fits would be tried for ever.

        Returns:
            What was decided, and the token budget from now on.
        """
        with self._lock:
            taken = {rung.rung for job in self._of(step) for rung in job.ladder}
            action = self._room.lacked(step, taken, facts, fresh=fresh, renewable=renewable)
        logger.warning("Out of memory: %s. %s", action.detail, action.remedy)
        with self._lock:
            for job in self._of(step):
                job.ladder.append(LadderStep(action.rung, action.detail, action.remedy))
            if action.budget is not None:
                self._learn(action.budget)
            if action.rung == "give_up":
                ended = self._batcher.fail(step.number, "out_of_memory")
                where = "even alone in a fresh process" if fresh else "even alone"
                words = f"{facts.device} {where} ({reason.splitlines()[0]}). {action.remedy}"
                self._deliver(ended, partial(does_not_fit, max(step.lengths), words))
            elif action.max_length is not None:
                self._shorten(step, action.max_length)
            elif action.rung != "fresh_worker":
                self._batcher.put_back(step.number)
            self._lock.notify_all()
            return action, self._batcher.budget

    # Under the lock.

    def _next(self) -> PlannedStep | None:
        now = self.clock()
        step = None if self._closed else self._batcher.next_step(now, self._idle)
        for number in self._batcher.expire(now):
            self._tell(number, DeadlinePassed(EXPIRED), "expired")
        return step

    def _of(self, step: PlannedStep) -> list[InflightRequest]:
        return [self._jobs[number] for number in step.requests if number in self._jobs]

    def _move_budget(self, step: PlannedStep, seconds: float) -> None:
        reason = self._budget.ended(step.cost_tokens, step.predicted_s, seconds)
        if reason is not None:
            self._batcher.budget = self._budget.tokens
            self.listener.budget_moved(BudgetMoved(self._budget.tokens, reason))

    def _learn(self, budget: int) -> None:
        if self._budget.out_of_memory(budget):
            self._batcher.budget = budget
            self.listener.budget_moved(BudgetMoved(budget, "memory"))
            if self._learned is not None:
                self._learned(budget)

    def _shorten(self, step: PlannedStep, max_length: int) -> None:
        """Cut the only pair of a step wherever it is asked for."""
        length = min(max_length, step.lengths[0])
        for number, index in self._batcher.shorten(step.number, length):
            job = self._jobs[number]
            try:
                job.pairs = job.pairs.shortened(max_length, [index])
            except TruncationImpossible as error:
                self._batcher.cancel(number)
                self._tell(number, query_too_long(error, max_length))

    def _deliver(self, ended: Iterable[Ended], explain: Explanation | None = None) -> None:
        for end in ended:
            if isinstance(end, Completed):
                self._answer(end)
            else:
                name = f"pairs[{self._jobs[end.request].pairs.places[end.index]}]"
                self._tell(end.request, explain(name) if explain else error_of(end, name))

    def _answer(self, end: Completed) -> None:
        job, now = self._jobs.pop(end.request), self.clock()
        self.listener.request_ended(job.ended("answered", now))
        job.done(job.answer(end.logits, now))

    def _tell(self, number: int, error: EchelonError, outcome: Outcome = "failed") -> None:
        job = self._jobs.pop(number)
        self.listener.request_ended(job.ended(outcome, self.clock()))
        job.done(error)

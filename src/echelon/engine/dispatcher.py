"""The batcher for many threads: requests go in, steps come out, and each request gets its answer.

It decides nothing itself: :mod:`echelon.scheduling.batcher` chooses the next step, and
:mod:`echelon.scheduling.oom_policy` what to do when memory runs out.
"""

from __future__ import annotations

import logging
import threading
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from echelon.engine.events import BudgetMoved, StepFinished
from echelon.engine.inflight import EXPIRED, does_not_fit, error_of, lost, query_too_long
from echelon.errors import DeadlinePassed, EchelonError, ShuttingDown, WorkerLost
from echelon.scheduling.cost_model import DEFAULT_COEFFICIENTS, Drift
from echelon.scheduling.oom_policy import OomPolicy, StepFailure
from echelon.scheduling.queue import Completed, PairRequest
from echelon.scheduling.token_budget import TokenBudget
from echelon.tokenization.pairs import TruncationImpossible, gather
from echelon.types import LadderStep

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable

    from echelon.engine.events import Listener, Outcome
    from echelon.engine.inflight import InflightRequest
    from echelon.engine.worker import StepResult
    from echelon.models.base import DeviceOutOfMemory
    from echelon.options import Allowance
    from echelon.scheduling.batcher import Batcher
    from echelon.scheduling.fit import Prior
    from echelon.scheduling.oom_policy import OomAction
    from echelon.scheduling.queue import CompletionEstimate, Ended, PlannedStep, QueueLoad
    from echelon.scheduling.token_budget import Reason
    from echelon.types import Clock, IntArray, ModelInfo, TokenBatch

    Explanation = Callable[[str], EchelonError]

logger = logging.getLogger(__name__)

DRIFT_MESSAGES = {
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
"""Log messages for :class:`echelon.scheduling.cost_model.Drift`."""


@dataclass(frozen=True, slots=True)
class PreparedStep:
    """A step with its token ids."""

    step: PlannedStep
    batch: TokenBatch


class Dispatcher:
    """The batcher behind a lock; requests call it from any thread, and so do supervisors.

    ``allow`` is what may be given up when a pair alone does not fit. ``policy`` is the device's, or
    a new one by default; ``learned`` is that of :class:`echelon.scheduling.oom_policy.OomPolicy`.
    """

    def __init__(  # noqa: PLR0913 - each is a distinct collaborator
        self,
        batcher: Batcher,
        listener: Listener,
        clock: Clock,
        allow: tuple[Allowance, ...] = (),
        *,
        policy: OomPolicy | None = None,
        learned: Callable[[int | None], None] | None = None,
        workers: int = 1,
    ) -> None:
        self.clock = clock
        self.listener = listener
        self.last_scored: float | None = None
        self.busy_s = 0.0
        self.cost = batcher.cost
        self.drift = Drift()
        self._batcher = batcher
        self._measured: list[tuple[tuple[int, ...], float]] = []
        self._allow = allow
        self._learned = learned
        self._max_budget = batcher.budget
        self._policy = policy or OomPolicy(TokenBudget(batcher.budget), learned=learned)
        self._requests: dict[int, InflightRequest] = {}
        self._lock = threading.Condition()
        self.closed = False
        self._workers = workers
        self._idle = 0
        self._troubles: dict[int, str] = {}
        self._up: set[int] = set()

    # For callers.

    def submit(self, request: InflightRequest) -> None:
        """Queue a request; its ``done`` is then called exactly once."""
        lengths = tuple(request.pairs.costs.tolist())
        pairs = PairRequest(
            request.number, lengths, request.pairs.keys(), request.deadline, request.priority
        )
        with self._lock:
            if self.closed:
                raise ShuttingDown("The service has stopped. Ask another server.")
            request.joined = self.clock()
            self._requests[request.number] = request
            self._batcher.submit(pairs, request.joined)
            self._lock.notify_all()

    def cancel(self, number: int) -> None:
        """Take out a request whose caller has gone or whose deadline has passed."""
        with self._lock:
            if self._batcher.cancel(number):
                request, now = self._remove(number), self.clock()
                late = request.deadline is not None and request.deadline <= now
                self.listener.request_ended(request.ended("expired" if late else "cancelled", now))

    def set_up(
        self, info: ModelInfo, budget: int, prior: Prior | None, goal_s: float | None
    ) -> None:
        """Begin with a scorer and at most ``budget`` tokens for a step.

        ``prior`` is the tuned cost model, and ``goal_s`` a latency goal that keeps steps small.
        """
        default = DEFAULT_COEFFICIENTS[info.device.partition(":")[0]]
        known = prior is not None and prior.serves(info)
        with self._lock:
            self.cost.begin(prior.coefficients if prior and known else default, info.padding)
            self.drift = Drift(1.0 if prior and known and prior.same else None)
            self._policy = OomPolicy(TokenBudget(budget, goal_s), learned=self._learned)
            self._max_budget = self._batcher.budget = budget

    def load(self) -> QueueLoad:
        """The work that waits and runs."""
        with self._lock:
            return self._batcher.load()

    def next_completions(self, places: int, workers: int) -> list[CompletionEstimate]:
        """See :func:`echelon.scheduling.queue.next_completions`."""
        with self._lock:
            return self._batcher.next_completions(places, workers)

    def close(self) -> None:
        """Accept no more requests and fail those that wait."""
        with self._lock:
            self.closed = True
            self._fail_all(
                ShuttingDown("The service stopped before the request was done. Try another.")
            )
            self._lock.notify_all()

    # For supervisors of workers.

    def report_health(self, worker: int, trouble: str | None) -> None:
        """Report that a worker is up (None) or cannot be started; if none can, requests fail."""
        with self._lock:
            if trouble is None:
                self._troubles.clear()
                self._up.add(worker)
            else:
                self._troubles[worker] = trouble
            if (error := self.unavailable) is not None:
                self._fail_all(error)

    def report_down(self, worker: int) -> None:
        """Report that a worker is not up: it leaves no pairs to others, nor others to it."""
        with self._lock:
            self._up.discard(worker)
            self._lock.notify_all()

    def set_workers(self, numbers: Collection[int]) -> None:
        """Set the workers that there are from now on."""
        with self._lock:
            self._up &= set(numbers)
            self._workers = len(numbers)
            self._troubles = {n: why for n, why in self._troubles.items() if n in numbers}

    @property
    def unavailable(self) -> WorkerLost | None:
        """The error if no worker can be started; None if one is up or may come up soon."""
        troubles = dict(self._troubles)
        if len(troubles) < self._workers:
            return None
        return WorkerLost(
            f"No scoring process can be started ({next(iter(troubles.values()))}). "
            "Ask another server; this one keeps trying, and its log has the cause."
        )

    def wake(self) -> None:
        """Make threads that wait in :meth:`take` check their condition again."""
        with self._lock:
            self._lock.notify_all()

    def take(
        self, interrupted: Callable[[], bool] | None = None, worker: int | None = None
    ) -> PreparedStep | None:
        """The next step for a worker.

        Waits until ``interrupted`` or closed, or not at all without it.
        """
        with self._lock:
            self._idle += 1
            try:
                while (step := self._next(worker)) is None:
                    if interrupted is None or self.closed or interrupted():
                        return None
                    self._lock.wait()
            finally:
                self._idle -= 1
            picks = [(self._requests[number].pairs, index) for number, index in step.places]
        return PreparedStep(step, gather(picks))

    def finish(self, step: PlannedStep, scored: StepResult, worker: int, precision: str) -> None:
        """Deliver the scores of a step, which a worker's scorer computed in a precision."""
        with self._lock:
            now = self.last_scored = self.clock()
            self.busy_s += scored.seconds
            self._measured.append((step.lengths, scored.seconds))
            reason = self._policy.fitted(
                step.requests,
                step.cost_tokens,
                max(step.lengths),
                worker=worker,
                predicted_s=step.predicted_s,
                actual_s=scored.seconds,
            )
            self._follow_budget(reason)
            for request in self._of(step):
                request.scored(step, scored.seconds, now, precision)
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
        """Fit the cost model to finished steps; takes 0.5 ms, so it runs after the answers."""
        with self._lock:
            for lengths, seconds in self._measured:
                self.cost.observe(lengths, seconds)
                change = self.drift.see(self.cost.scale)
                if change is not None:
                    logger.log(*DRIFT_MESSAGES[change], self.drift.ratio)
            self._measured.clear()

    def observe(self, lengths: IntArray, seconds: float) -> None:
        """Teach the cost model a warm-up step, which belongs to no request."""
        with self._lock:
            self.cost.observe(lengths, seconds)
            self._policy.budget.warmed_up(int(lengths.sum()), seconds)
            self._follow_budget("goal")
            self.last_scored = self.clock()

    def put_back(self, steps: Iterable[PlannedStep]) -> None:
        """Queue the pairs of steps again that were taken and never began."""
        with self._lock:
            for step in steps:
                self._batcher.put_back(step.number)
            self._lock.notify_all()

    def lost(self, steps: Iterable[PlannedStep], worker: int | None = None) -> None:
        """Handle the steps of a worker that ended: the first one ran, the others never began."""
        with self._lock:
            for position, step in enumerate(steps):
                if position == 0:
                    ended = self._batcher.retry(step.number, worker=worker)
                    self._deliver(ended, partial(lost, len(step.places)))
                else:
                    self._batcher.put_back(step.number)
            self._lock.notify_all()

    def fail(self, step: PlannedStep, error: EchelonError) -> None:
        """Handle a scorer's error; a step of several requests is tried again for each alone."""
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
        error: DeviceOutOfMemory,
        info: ModelInfo,
        *,
        worker: int = 0,
        fresh: bool = False,
        renewable: bool = False,
    ) -> tuple[OomAction, int]:
        """Decide what to do about a step that did not fit, and queue its pairs again.

        For ``fresh_worker`` they stay with the supervisor, which scores them in a fresh process.
        Returns the action, and the token budget from now on.
        """
        pairs, longest = len(step.places), max(step.lengths)
        kinds = (info.precision, self._allow, info.lower_precision)
        failure = StepFailure(pairs, step.cost_tokens, longest, *kinds, crowded=error.crowded)
        with self._lock:
            requests = self._of(step)
            numbers = [request.number for request in requests]
            action = self._policy.failed(
                failure, numbers, worker=worker, fresh=fresh, renewable=renewable
            )
            for request in requests:
                request.ladder.append(LadderStep(action.rung, action.detail, action.remedy))
            self._follow_budget()
            if action.rung == "give_up":
                ended = self._batcher.fail(step.number, "out_of_memory")
                where = "even alone in a fresh process" if fresh else "even alone"
                words = f"{info.device} {where} ({str(error).splitlines()[0]}). {action.remedy}"
                self._deliver(ended, partial(does_not_fit, longest, words))
            elif action.max_length is not None:
                self._shorten(step, action.max_length)
            elif action.rung != "fresh_worker":
                self._batcher.put_back(step.number)
            self._lock.notify_all()
            budget = self._batcher.budget
        logger.warning("Out of memory: %s. %s", action.detail, action.remedy)
        return action, budget

    # Under the lock.

    def _next(self, worker: int | None) -> PlannedStep | None:
        now, lost_by = self.clock(), worker if self._up - {worker} else None
        self._follow_budget()  # a call beside the shared steps may have changed it
        step = None if self.closed else self._batcher.next_step(now, self._idle, lost_by)
        for number in self._batcher.expire(now):
            self._fail(number, DeadlinePassed(EXPIRED), "expired")
        return step

    def _of(self, step: PlannedStep) -> list[InflightRequest]:
        return [self._requests[number] for number in step.requests if number in self._requests]

    def _follow_budget(self, reason: Reason | None = None) -> None:
        before, tokens = self._batcher.budget, min(self._max_budget, self._policy.budget.tokens)
        if tokens != before:
            self._batcher.budget = tokens
            reason = reason or ("memory" if tokens < before else "recovered")
            self.listener.budget_moved(BudgetMoved(tokens, reason))

    def _shorten(self, step: PlannedStep, max_length: int) -> None:
        """Cut the only pair of a step in every request that has it."""
        length = min(max_length, step.lengths[0])
        for number, index in self._batcher.shorten(step.number, length):
            request = self._requests[number]
            try:
                request.pairs = request.pairs.shortened(max_length, [index])
            except TruncationImpossible as error:
                self._batcher.cancel(number)
                self._fail(number, query_too_long(error, max_length))

    def _deliver(self, ended: Iterable[Ended], explain: Explanation | None = None) -> None:
        for end in ended:
            if isinstance(end, Completed):
                request, now = self._remove(end.request), self.clock()
                self.listener.request_ended(request.ended("answered", now))
                request.done(request.answer(end.logits, now))
            else:
                name = f"pairs[{self._requests[end.request].pairs.places[end.index]}]"
                self._fail(end.request, explain(name) if explain else error_of(end, name))

    def _fail(self, number: int, error: EchelonError, outcome: Outcome = "failed") -> None:
        request = self._remove(number)
        self.listener.request_ended(request.ended(outcome, self.clock()))
        request.done(error)

    def _fail_all(self, error: EchelonError) -> None:
        for number in list(self._requests):
            self._batcher.cancel(number)
            self._fail(number, error)

    def _remove(self, number: int) -> InflightRequest:
        self._policy.forget(number)
        return self._requests.pop(number)

"""One server, simulated exactly: the real batcher and admission on a virtual clock. Pure.

Steps follow one another as :mod:`echelon.engine.supervisor` sends them: an idle worker takes a step
at once; a busy one takes its next step :data:`~echelon.scheduling.queue.LEAD_S` before the running
one should end. The cost model gives the time of steps; the batcher has a copy of it and learns from
each step, as in a server. Left out: memory errors, crashed workers, and the queue for the threads
that tokenize.
"""

from __future__ import annotations

import copy
import heapq
from collections import deque
from dataclasses import dataclass, field
from enum import IntEnum
from typing import TYPE_CHECKING

import numpy as np

from echelon.errors import InvalidInput, check_positive
from echelon.scheduling.admission import AdmissionLimits, RequestCost, SystemLoad, refuse
from echelon.scheduling.batcher import Batcher
from echelon.scheduling.queue import LEAD_S, PairRequest, PlannedStep
from echelon.scheduling.token_budget import TokenBudget
from echelon.simulation.service_level import ServiceLevel, SimulationResult, Tally

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from echelon.scheduling.cost_model import CostModel
    from echelon.simulation.workload import Arrival

BLOCK = 1024
"""Random numbers drawn at a time."""


@dataclass(frozen=True, slots=True)
class SimulationSettings:
    """How a simulated server runs.

    Attributes:
        token_budget: tokens a step may cost.
        max_pairs: pairs a step may hold.
        bounds: limits of admission.
        deadline_s: seconds after which a request expires; None means never.
        goal_s: latency goal for which steps are kept small, as ``echelon serve --slo-p99-ms`` does.
        request_s: seconds of a request beside tokenizing and steps: reading, answering.
        document_s: seconds that tokenizing a document takes.
        noise: standard deviation of the logarithm of actual over predicted step time.
        learns: whether the batcher learns from each step how long steps take.
        seed: of the noise, and of routing.
    """

    token_budget: int
    max_pairs: int | None = None
    workers: int = 1
    bounds: AdmissionLimits = field(default_factory=AdmissionLimits)
    deadline_s: float | None = None
    goal_s: float | None = None
    request_s: float = 0.0
    document_s: float = 0.0
    noise: float = 0.0
    learns: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        check_positive(
            token_budget=self.token_budget, max_pairs=self.max_pairs, workers=self.workers
        )
        check_positive("Give seconds.", deadline_s=self.deadline_s, goal_s=self.goal_s)
        for name in ("request_s", "document_s", "noise"):
            if not 0 <= getattr(self, name) < np.inf:
                raise InvalidInput(name, f"{getattr(self, name)} is below 0", "Give 0 or more.")

    def factors(self) -> Iterator[float]:
        """Actual over predicted time of one step after another, without an end."""
        random = np.random.default_rng(self.seed)
        while True:
            if self.noise:
                # A mean of one: noise makes steps vary, not longer.
                drawn = random.lognormal(-(self.noise**2) / 2, self.noise, BLOCK)
                yield from drawn.tolist()
            else:
                yield 1.0


class SimulationEvent(IntEnum):
    """Kinds of events; at one moment they happen in this order."""

    END = 0
    DEADLINE = 1
    ARRIVE = 2
    JOIN = 3
    FORM = 4


@dataclass(frozen=True, slots=True)
class SimulatedRequest:
    """An admitted request."""

    at_s: float
    cost: RequestCost
    lengths: tuple[int, ...]


def simulate(  # noqa: PLR0913 - few callers give more than three
    requests: Iterable[Arrival],
    truth: CostModel,
    settings: SimulationSettings,
    *,
    level: ServiceLevel = ServiceLevel(),  # noqa: B008 - frozen
    warm_s: float = 0.0,
    expected: int | None = None,
    on_step: Callable[[float, PlannedStep], None] = lambda *_: None,
) -> SimulationResult:
    """Serve requests.

    Args:
        requests: in order of time, with their lengths.
        truth: how long steps take, without the settings' noise.
        settings: how the server runs.
        level: what counts as answered in time.
        warm_s: requests that come before are served and not counted.
        expected: number of requests; where given, the run ends as soon as the level cannot hold any
            more: the result says that it was missed, but not by how much.
        on_step: called with the time and each step that is formed.
    """
    run = _ServerRun(truth, settings, Tally(level, warm_s), on_step)
    run.serve(requests, expected)
    return run.tally.outcome(settings.workers)


class _ServerRun:
    """The state of a simulated server."""

    def __init__(
        self,
        truth: CostModel,
        settings: SimulationSettings,
        tally: Tally,
        on_step: Callable[[float, PlannedStep], None],
    ) -> None:
        self.tally = tally
        self._truth = truth
        self._settings = settings
        self._on_step = on_step
        self._batcher = Batcher(copy.deepcopy(truth), settings.token_budget, settings.max_pairs)
        self._budget = TokenBudget(settings.token_budget, settings.goal_s)
        self._factors = settings.factors()
        self._sent: list[deque[PlannedStep]] = [deque() for _ in range(settings.workers)]
        self._seconds: dict[int, float] = {}
        self._took: list[tuple[tuple[int, ...], float]] = []
        self._admitted: dict[int, SimulatedRequest] = {}
        self._tokenizing: dict[int, SimulatedRequest] = {}
        self._tokenizing_tokens = 0
        self._numbers = 0
        # (time, kind, serial number, number of the request, worker or step).
        self._events: list[tuple[float, SimulationEvent, int, int]] = []
        self._count = 0

    def serve(self, requests: Iterable[Arrival], expected: int | None = None) -> None:
        """Serve all requests, or end early; see :func:`simulate`."""
        last = 0.0
        for arrival in requests:
            if arrival.at_s < last:
                raise InvalidInput("requests", f"{arrival.at_s} s is before {last} s", "Sort them.")
            if not arrival.lengths:
                raise InvalidInput("requests", "one has no lengths", "Give tokens of its pairs.")
            last = arrival.at_s
            self._until((arrival.at_s, SimulationEvent.ARRIVE))
            if expected is not None and self.tally.lost(expected):
                return
            self._arrive(arrival)
        self._until(None)

    def _until(self, moment: tuple[float, SimulationEvent] | None) -> None:
        acts = {
            SimulationEvent.END: self._end,
            SimulationEvent.DEADLINE: self._expire,
            SimulationEvent.JOIN: self._join,
            SimulationEvent.FORM: self._form,
        }
        while self._events and (moment is None or self._events[0][:2] < moment):
            now, kind, _, what = heapq.heappop(self._events)
            acts[kind](now, what)

    def _later(self, at_s: float, kind: SimulationEvent, what: int) -> None:
        self._count += 1
        heapq.heappush(self._events, (at_s, kind, self._count, what))

    # Requests.

    def _arrive(self, arrival: Arrival) -> None:
        now, lengths, settings = arrival.at_s, arrival.lengths, self._settings
        self.tally.arrive(now, len(lengths))
        deadline = None if settings.deadline_s is None else now + settings.deadline_s
        squares = sum(length * length for length in lengths)
        request = SimulatedRequest(
            now, RequestCost(len(lengths), sum(lengths), squares, deadline), lengths
        )
        if not self._admits(request, now):
            return
        self._numbers += 1
        number = self._numbers
        self._tokenizing[number] = request
        self._tokenizing_tokens += request.cost.tokens
        if deadline is not None:
            self._later(deadline, SimulationEvent.DEADLINE, number)
        ready_s = now + settings.request_s + settings.document_s * len(lengths)
        if ready_s > now:
            self._later(ready_s, SimulationEvent.JOIN, number)
        else:
            self._join(now, number)

    def _join(self, now: float, number: int) -> None:
        request = self._tokenizing.pop(number, None)
        if request is None:
            return  # its deadline came first
        self._tokenizing_tokens -= request.cost.tokens
        if not self._admits(request, now):
            return
        self._admitted[number] = request
        self._batcher.submit(
            PairRequest(number, request.lengths, deadline=request.cost.deadline), now
        )
        for worker, sent in enumerate(self._sent):
            if not sent:
                self._fetch(now, worker)
                break

    def _admits(self, request: SimulatedRequest, now: float) -> bool:
        """Apply the admission rules, as the server does on arrival and after tokenizing."""
        load = SystemLoad(
            self._batcher.load(),
            self._batcher.cost,
            self._settings.workers,
            len(self._tokenizing),
            self._tokenizing_tokens,
            self._batcher.next_completions,
        )
        refusal = refuse(request.cost, load, self._settings.bounds, now)
        if refusal is not None:
            self.tally.refuse(request.at_s, refusal.reason)
        return refusal is None

    def _expire(self, now: float, number: int) -> None:
        del now
        request = self._tokenizing.pop(number, None)
        if request is not None:
            self._tokenizing_tokens -= request.cost.tokens
        elif self._batcher.cancel(number):
            request = self._admitted.pop(number)
        if request is not None:
            self.tally.expire(request.at_s)

    # Workers.

    def _learn(self) -> None:
        """Fit the cost model while a step runs, as supervisors do."""
        for lengths, seconds in self._took:
            self._batcher.cost.observe(lengths, seconds)
        self._took.clear()

    def _fetch(self, now: float, worker: int) -> None:
        """Give an idle worker a step, if there is one."""
        if self._take(now, worker):
            self._begin(now, worker)
            self._learn()

    def _take(self, now: float, worker: int) -> bool:
        step = self._batcher.next_step(now)
        for number in self._batcher.expire(now):
            self.tally.expire(self._admitted.pop(number).at_s)
        if step is None:
            return False
        self._on_step(now, step)
        self._sent[worker].append(step)
        return True

    def _begin(self, now: float, worker: int) -> None:
        """Begin the first step that was sent to a worker."""
        step = self._sent[worker][0]
        seconds = self._truth.predict(step.lengths) * next(self._factors)
        self._seconds[worker] = seconds
        self._later(now + seconds, SimulationEvent.END, worker)
        self._later(now + max(0.0, step.predicted_s - LEAD_S), SimulationEvent.FORM, step.number)

    def _form(self, now: float, number: int) -> None:
        """Form a worker's next step shortly before its running one should end."""
        for worker, sent in enumerate(self._sent):
            if sent and sent[0].number == number:
                self._take(now, worker)

    def _end(self, now: float, worker: int) -> None:
        step = self._sent[worker].popleft()
        seconds = self._seconds[worker]
        if self._sent[worker]:
            self._begin(now, worker)
        if self._settings.learns:
            self._took.append((step.lengths, seconds))
        if self._sent[worker]:
            self._learn()
        if self._budget.ended(step.cost_tokens, step.predicted_s, seconds) is not None:
            self._batcher.budget = self._budget.tokens
        self.tally.ran(len(step.places), step.tokens, seconds, now)
        for end in self._batcher.finish(step.number, [0.0] * len(step.lengths)):
            self.tally.answer(self._admitted.pop(end.request).at_s, now)
        if not self._sent[worker]:
            self._fetch(now, worker)

"""How a simulated service runs. Pure.

One service, exactly: the real batcher and the real admission on a virtual clock.

Pure and deterministic. Steps follow one another as :mod:`echelon.engine.supervisor` sends them: an
idle
worker takes a step at once; a busy one takes its next step when the running one should end in
:data:`~echelon.scheduling.queue.LEAD_S`, and what comes later waits for the step after. The cost
model
says how long steps take; the batcher has a copy of it and learns from each step, as in a server.

Left out: memory trouble, workers that die, and the queue for the threads that tokenise.
"""

from __future__ import annotations

import copy
import heapq
from collections import deque
from dataclasses import dataclass, field
from enum import IntEnum
from typing import TYPE_CHECKING

import numpy as np

from echelon.errors import InvalidInput
from echelon.scheduling.admission import AdmissionLimits, RequestCost, SystemLoad, refuse
from echelon.scheduling.batcher import Batcher
from echelon.scheduling.queue import LEAD_S, PairRequest
from echelon.scheduling.token_budget import TokenBudget
from echelon.simulation.outcome import Tally
from echelon.simulation.service_level import ServiceLevel

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from echelon.scheduling.cost_model import CostModel
    from echelon.scheduling.queue import PlannedStep
    from echelon.simulation.outcome import SimulationResult
    from echelon.simulation.workload import Arrival

BLOCK = 1024
"""Random numbers drawn at a time."""


@dataclass(frozen=True, slots=True)
class SimulationSettings:
    """A service.

    Attributes:
        token_budget: most tokens a step may cost.
        max_pairs: most pairs a step may hold.
        workers: scorers that share the queue.
        bounds: what is taken in at most.
        deadline_s: seconds after which nobody wants an answer; None means never.
        goal_s: latency goal that steps are kept small for, as ``echelon serve --slo-p99-ms`` does.
        request_s: seconds of a request beside tokenising and steps: reading, answering.
        document_s: seconds that tokenising a document takes.
        noise: standard deviation of the logarithm of actual over predicted step time.
        learns: the batcher learns from each step how long steps take, as a server's does.
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
        for name in ("token_budget", "max_pairs", "workers"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InvalidInput(name, f"{value} is not positive", "Give 1 or more.")
        for name in ("deadline_s", "goal_s"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise InvalidInput(name, f"{value} is not positive", "Give seconds.")
        for name in ("request_s", "document_s", "noise"):
            if not 0 <= getattr(self, name) < np.inf:
                raise InvalidInput(name, f"{getattr(self, name)} is below 0", "Give 0 or more.")

    def factors(self) -> Iterator[float]:
        """Actual over predicted time of one step after another, for ever."""
        random = np.random.default_rng(self.seed)
        while True:
            if self.noise:
                # A mean of one: noise makes steps vary, not longer.
                drawn = random.lognormal(-(self.noise**2) / 2, self.noise, BLOCK)
                yield from drawn.tolist()
            else:
                yield 1.0


class SimulationEvent(IntEnum):
    """What happens; at one moment in this order."""

    END = 0
    DEADLINE = 1
    ARRIVE = 2
    JOIN = 3
    FORM = 4


@dataclass(frozen=True, slots=True)
class SimulatedRequest:
    """A request inside."""

    at_s: float
    ask: RequestCost
    lengths: tuple[int, ...]


def simulate(  # noqa: PLR0913 - few callers give more than three
    requests: Iterable[Arrival],
    truth: CostModel,
    setting: SimulationSettings,
    *,
    level: ServiceLevel = ServiceLevel(),  # noqa: B008 - frozen
    warm_s: float = 0.0,
    expected: int | None = None,
    told: Callable[[float, PlannedStep], None] = lambda *_: None,
) -> SimulationResult:
    """Serve requests.

    Args:
        requests: in order of time, with their lengths.
        truth: how long steps take, but for the setting's noise.
        setting: how the service runs.
        level: what counts as answered in time.
        warm_s: requests that come before are served and not counted.
        expected: number of requests; given it, the run ends as soon as the level cannot hold any
            more: its outcome then says that the goal is missed, and not by how much.
        told: called with the time and each step that is formed.
    """
    run = _ServerRun(truth, setting, Tally(level, warm_s), told)
    run.through(requests, expected)
    return run.tally.outcome(setting.workers)


class _ServerRun:
    """A service under way."""

    def __init__(
        self,
        truth: CostModel,
        setting: SimulationSettings,
        tally: Tally,
        told: Callable[[float, PlannedStep], None],
    ) -> None:
        self.tally = tally
        self._truth = truth
        self._setting = setting
        self._told = told
        self._batcher = Batcher(copy.deepcopy(truth), setting.token_budget, setting.max_pairs)
        self._budget = TokenBudget(setting.token_budget, setting.goal_s)
        self._factors = setting.factors()
        self._sent: list[deque[PlannedStep]] = [deque() for _ in range(setting.workers)]
        self._ends = [0.0] * setting.workers
        self._seconds: dict[int, float] = {}
        self._took: list[tuple[tuple[int, ...], float]] = []
        self._guests: dict[int, SimulatedRequest] = {}
        self._coming: dict[int, SimulatedRequest] = {}
        self._coming_tokens = 0
        self._numbers = 0
        # (time, kind, counting up, what): what is a request's, a worker's or a step's number.
        self._events: list[tuple[float, SimulationEvent, int, int]] = []
        self._count = 0

    def through(self, requests: Iterable[Arrival], expected: int | None = None) -> None:
        """Let all requests come, and end what is inside; or end early, see :func:`simulate`."""
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
        now, lengths, setting = arrival.at_s, arrival.lengths, self._setting
        self.tally.came(now, len(lengths))
        deadline = None if setting.deadline_s is None else now + setting.deadline_s
        squares = sum(length * length for length in lengths)
        guest = SimulatedRequest(
            now, RequestCost(len(lengths), sum(lengths), squares, deadline), lengths
        )
        if not self._admits(guest, now):
            return
        self._numbers += 1
        number = self._numbers
        self._coming[number] = guest
        self._coming_tokens += guest.ask.tokens
        if deadline is not None:
            self._later(deadline, SimulationEvent.DEADLINE, number)
        ready_s = now + setting.request_s + setting.document_s * len(lengths)
        if ready_s > now:
            self._later(ready_s, SimulationEvent.JOIN, number)
        else:
            self._join(now, number)

    def _join(self, now: float, number: int) -> None:
        guest = self._coming.pop(number, None)
        if guest is None:
            return  # its deadline came first
        self._coming_tokens -= guest.ask.tokens
        if not self._admits(guest, now):
            return
        self._guests[number] = guest
        self._batcher.submit(PairRequest(number, guest.lengths, deadline=guest.ask.deadline), now)
        for worker, sent in enumerate(self._sent):
            if not sent:
                self._fetch(now, worker)
                break

    def _admits(self, guest: SimulatedRequest, now: float) -> bool:
        """Judge a request, as the reception does: at the door, and again with its true tokens."""
        house = SystemLoad(
            self._batcher.load(),
            self._batcher.cost,
            self._setting.workers,
            len(self._coming),
            self._coming_tokens,
            self._batcher.soonest,
        )
        refusal = refuse(guest.ask, house, self._setting.bounds, now)
        if refusal is not None:
            self.tally.refuse(guest.at_s, refusal.reason)
        return refusal is None

    def _expire(self, now: float, number: int) -> None:
        del now
        guest = self._coming.pop(number, None)
        if guest is not None:
            self._coming_tokens -= guest.ask.tokens
        elif self._batcher.cancel(number):
            guest = self._guests.pop(number)
        if guest is not None:
            self.tally.expire(guest.at_s)

    # Workers.

    def _learn(self) -> None:
        """Fit prices while a step runs, as keepers do: after an idle worker took its next one."""
        for lengths, seconds in self._took:
            self._batcher.cost.observe(lengths, seconds)
        self._took.clear()

    def _fetch(self, now: float, worker: int) -> None:
        """An idle worker takes a step, if there is one."""
        if self._take(now, worker):
            self._begin(now, worker)
            self._learn()

    def _take(self, now: float, worker: int) -> bool:
        step = self._batcher.next_step(now)
        for number in self._batcher.expire(now):
            self.tally.expire(self._guests.pop(number).at_s)
        if step is None:
            return False
        self._told(now, step)
        self._sent[worker].append(step)
        return True

    def _begin(self, now: float, worker: int) -> None:
        """The first step sent to a worker begins."""
        step = self._sent[worker][0]
        seconds = self._truth.predict(step.lengths) * next(self._factors)
        self._seconds[worker] = seconds
        self._ends[worker] = now + seconds
        self._later(now + seconds, SimulationEvent.END, worker)
        self._later(now + max(0.0, step.predicted_s - LEAD_S), SimulationEvent.FORM, step.number)

    def _form(self, now: float, number: int) -> None:
        """A running step should soon end: its worker takes the next, unless it has ended."""
        for worker, sent in enumerate(self._sent):
            if sent and sent[0].number == number:
                self._take(now, worker)

    def _end(self, now: float, worker: int) -> None:
        step = self._sent[worker].popleft()
        seconds = self._seconds[worker]
        if self._sent[worker]:
            self._begin(now, worker)
        if self._setting.learns:
            self._took.append((step.lengths, seconds))
        if self._sent[worker]:
            self._learn()
        if self._budget.ended(step.cost_tokens, step.predicted_s, seconds) is not None:
            self._batcher.budget = self._budget.tokens
        self.tally.ran(len(step.places), step.tokens, seconds, now)
        for end in self._batcher.finish(step.number, [0.0] * len(step.lengths)):
            self.tally.answer(self._guests.pop(end.request).at_s, now)
        if not self._sent[worker]:
            self._fetch(now, worker)

"""Thousands of replicas: a lighter model of each service behind a router.

Pure and deterministic. A replica keeps the batcher's discipline (fair order, token budget, the next
step formed just before the running one ends) and counts where
:mod:`echelon.simulation.server_simulation` looks
at each pair: the pairs of a request all have its mean length, and a padded scorer pays a share
more than its tokens, as measured by packing a sample. Left out besides: deadlines, priorities,
and pairs that several requests share. Tests hold it to the exact one.
"""

from __future__ import annotations

import heapq
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from echelon.errors import InvalidInput
from echelon.scheduling.admission import RequestCost, SystemLoad, refuse
from echelon.scheduling.cost_model import Work
from echelon.scheduling.fair_queue import WEIGHTS, FairOrder
from echelon.scheduling.packing import REACH, choose, step_cost
from echelon.scheduling.queue import LEAD_S, QueueLoad
from echelon.simulation.cluster_traffic import Router, chances
from echelon.simulation.outcome import Tally
from echelon.simulation.service_level import ServiceLevel

if TYPE_CHECKING:
    from collections.abc import Iterable

    from echelon.scheduling.cost_model import CostModel
    from echelon.simulation.cluster_traffic import RequestBlock, Routing
    from echelon.simulation.outcome import SimulationResult
    from echelon.simulation.server_simulation import SimulationSettings
    from echelon.simulation.workload import SizeDistribution

NORMAL = WEIGHTS["normal"]

SAMPLES = 200
"""Steps that are chosen for each number of waiting documents to learn how a padded scorer's come
out."""


@dataclass(frozen=True, slots=True)
class Packing:
    """How a padded scorer's steps come out, by how many documents wait.

    Attributes:
        pairs: mean pairs of a step; entry i is for ``2**(i - 1)`` waiting documents or more.
        padding: tokens paid for over useful tokens, likewise.
        reach: documents from the front of the queue among which a step is chosen.
    """

    pairs: tuple[float, ...]
    padding: tuple[float, ...]
    reach: int

    def step(self, documents: float) -> tuple[float, float]:
        """Pairs of the next step, and its padding, where so many documents wait."""
        entry = min(int(documents).bit_length(), len(self.pairs) - 1)
        return self.pairs[entry], self.padding[entry]


RAGGED = Packing((math.inf,), (1.0,), 0)
"""Tokens alone decide, and nothing is padded."""


def packing_of(tokens: SizeDistribution, truth: CostModel, budget: int) -> Packing:
    """Choose steps from samples, as the batcher does, and see how they come out."""
    if truth.padding == "none":
        return RAGGED
    random = np.random.default_rng(0)
    most = math.ceil(REACH[truth.padding] * budget / np.mean(tokens.draw(random, SAMPLES)))
    found = [(1.0, 1.0)]
    for waiting in (2**i for i in range(most.bit_length())):
        pairs = useful = paid = 0
        for _ in range(SAMPLES):
            lengths = tokens.draw(random, min(most, waiting * 3 // 2))
            step = [lengths[index] for index in choose(lengths, budget, None, truth.padding)]
            pairs, useful = pairs + len(step), useful + sum(step)
            paid += step_cost(step, truth.padding)
        found.append((pairs / SAMPLES, paid / useful))
    pairs_of, padding_of = zip(*found, strict=True)
    return Packing(pairs_of, padding_of, most)


@dataclass(frozen=True, slots=True)
class Cluster:
    """Replicas of one service.

    Attributes:
        replicas: how many.
        setting: how each runs.
        routing: who gets a request.
        packing: how its steps come out, see :func:`packing_of`.
    """

    replicas: int
    setting: SimulationSettings
    routing: Routing = "tokens"
    packing: Packing = RAGGED

    def __post_init__(self) -> None:
        if self.replicas < 1:
            raise InvalidInput("replicas", f"{self.replicas} is not positive", "Give 1 or more.")
        if self.setting.deadline_s is not None:
            raise InvalidInput("deadline_s", "a fleet knows none", "Simulate one service exactly.")


def simulate_fleet(
    traffic: Iterable[RequestBlock],
    truth: CostModel,
    fleet: Cluster,
    *,
    level: ServiceLevel = ServiceLevel(),  # noqa: B008 - frozen
    warm_s: float = 0.0,
) -> SimulationResult:
    """Serve requests by a fleet.

    Args:
        traffic: see :func:`echelon.simulation.cluster_traffic.blocks`.
        truth: how long steps take, but for the setting's noise.
        fleet: who serves.
        level: what counts as answered in time.
        warm_s: requests that come before are served and not counted.
    """
    tally = tally_fleet(traffic, truth, fleet, Tally(level, warm_s))
    return tally.outcome(fleet.replicas * fleet.setting.workers)


def tally_fleet(
    traffic: Iterable[RequestBlock], truth: CostModel, fleet: Cluster, tally: Tally
) -> Tally:
    """Serve requests by a fleet, and count in ``tally``; see :func:`simulate_fleet`."""
    run = _ClusterRun(truth, fleet, tally)
    for block in traffic:
        run.through(block)
    run.end()
    return tally


class _Replica:
    """One service: requests in the fair order, and workers.

    Attributes:
        queue: heap of [tag, number, documents left, mean tokens, mean squares, came, documents].
        order: the fair order.
        idle: workers without a step.
        requests: requests inside.
        documents: documents that wait.
        tokens: their tokens.
        squares: their squared tokens.
    """

    __slots__ = ("documents", "idle", "order", "queue", "requests", "squares", "tokens")

    def __init__(self, workers: int) -> None:
        self.queue: list[list[float]] = []
        self.order = FairOrder()
        self.idle = list(range(workers))
        self.requests = 0
        self.documents = 0.0
        self.tokens = self.squares = 0.0

    def took(self, step: _Step) -> None:
        """A step was formed."""
        self.documents -= step.documents
        self.tokens -= step.tokens
        self.squares -= step.squares
        self.order.serve(step.tokens)
        if not self.queue:
            self.documents = self.tokens = self.squares = 0.0  # no rest of rounding is left


class _Step:
    """A step of a replica: useful amounts, predicted seconds, and what it completes."""

    __slots__ = ("documents", "ended", "seconds", "squares", "tokens")

    def __init__(self) -> None:
        self.documents = self.tokens = self.squares = self.seconds = 0.0
        self.ended: list[list[float]] = []

    def take(self, guest: list[float], documents: float) -> None:
        """So many documents of a request go."""
        guest[2] -= documents
        self.documents += documents
        self.tokens += documents * guest[3]
        self.squares += documents * guest[4]
        if guest[2] == 0:
            self.ended.append(guest)


class _ClusterRun:
    """A fleet under way. Worker w of replica r is number r × workers + w."""

    def __init__(self, truth: CostModel, fleet: Cluster, tally: Tally) -> None:
        setting = fleet.setting
        self.tally = tally
        self._truth = truth
        self._setting = setting
        self._packing = fleet.packing
        self._padding = fleet.packing.padding[-1]  # of a full queue, for admission
        self._pairs = math.inf if setting.max_pairs is None else setting.max_pairs
        self._workers = setting.workers
        self._replicas = [_Replica(setting.workers) for _ in range(fleet.replicas)]
        self._router = Router(fleet.routing, fleet.replicas, setting.seed)
        self._factors = setting.factors()
        self._chances = chances(setting.seed)
        self._ends = [0.0] * (fleet.replicas * setting.workers)
        self._held: list[_Step | None] = [None] * (fleet.replicas * setting.workers)
        self._events: list[tuple[float, int]] = []
        self._numbers = 0
        self._calm_tokens = _calm_tokens(truth, setting)

    def through(self, block: RequestBlock) -> None:
        """Let requests come."""
        events = self._events
        for at_s, documents, length, square in zip(
            block.at_s, block.documents, block.lengths, block.squares, strict=True
        ):
            while events and events[0][0] <= at_s:
                self._turn(*heapq.heappop(events))
            self._arrive(at_s, documents, length, square)

    def end(self) -> None:
        """Finish what is inside."""
        while self._events:
            self._turn(*heapq.heappop(self._events))

    # Requests.

    def _arrive(self, now: float, documents: int, length: float, square: float) -> None:
        self.tally.came(now, documents)
        number = self._router.choose()
        replica = self._replicas[number]
        tokens = documents * length
        if not self._admits(replica, number, (documents, tokens, documents * square), now):
            return
        self._numbers += 1
        tag = replica.order.join(self._numbers, tokens, NORMAL)
        guest = [tag, self._numbers, documents, length, square, now, documents]
        heapq.heappush(replica.queue, guest)
        replica.requests += 1
        replica.documents += documents
        replica.tokens += tokens
        replica.squares += documents * square
        self._router.add(number, tokens, 1)
        if replica.idle:
            self._turn(now, number * self._workers + replica.idle.pop())

    def _admits(
        self, replica: _Replica, number: int, asked: tuple[int, float, float], now: float
    ) -> bool:
        """The real rules, asked only where one of them might refuse."""
        documents, tokens, squares = asked
        bounds = self._setting.bounds
        if (
            replica.requests < bounds.max_requests
            and replica.tokens + tokens < self._calm_tokens
            and documents <= bounds.max_documents
        ):
            return True
        ask = RequestCost(documents, int(tokens * self._padding), int(squares * self._padding))
        refusal = refuse(ask, self._house(replica, number), bounds, now)
        if refusal is not None:
            self.tally.refuse(now, refusal.reason)
        return refusal is None

    def _house(self, replica: _Replica, number: int) -> SystemLoad:
        first = number * self._workers
        held = self._held[first : first + self._workers]
        load = QueueLoad(
            requests=replica.requests,
            pairs=0,
            tokens=int(replica.tokens * self._padding),
            squares=int(replica.squares * self._padding),
            weight=replica.order.weight,
            running_s=sum(step.seconds for step in held if step is not None),
            budget=self._setting.token_budget,
            oldest=None,
        )
        return SystemLoad(load, self._truth, self._workers)

    # Workers.

    def _turn(self, now: float, worker: int) -> None:
        """A worker's step has ended or soon will: settle it, and give it the next."""
        number, own = divmod(worker, self._workers)
        replica = self._replicas[number]
        held = self._held[worker]
        if held is not None:
            self._held[worker] = None
            replica.requests -= len(held.ended)
            self._router.add(number, -held.tokens, -len(held.ended))
        if replica.queue:
            self._start(now, worker, replica)
        elif self._ends[worker] > now:
            heapq.heappush(self._events, (self._ends[worker], worker))
        else:
            replica.idle.append(own)

    def _start(self, now: float, worker: int, replica: _Replica) -> None:
        pairs, padding = self._packing.step(replica.documents)
        places = min(self._pairs, pairs)
        fill = self._fill if self._packing is RAGGED else self._scatter
        step = fill(replica, places)
        replica.took(step)
        # Squares grow by the square of what lengths do; most pairs are padded by the mean.
        work = Work(1, int(step.tokens * padding), int(step.squares * padding**2))
        step.seconds = self._truth.seconds(work)
        seconds = step.seconds * next(self._factors)
        began = max(now, self._ends[worker])
        end = self._ends[worker] = began + seconds
        self._held[worker] = step
        ready = max(began, min(end, began + step.seconds - LEAD_S))
        heapq.heappush(self._events, (ready, worker))
        self.tally.ran(step.documents, step.tokens, seconds, end)
        setting = self._setting
        for guest in step.ended:
            extra = setting.request_s + setting.document_s * guest[6]
            self.tally.answer(guest[5], end + extra)

    def _fill(self, replica: _Replica, places: float) -> _Step:
        """Whole documents of requests in turn, as long as they fit; the first always goes."""
        step, queue = _Step(), replica.queue
        room = float(self._setting.token_budget)
        while queue:
            guest = queue[0]
            fit = min(room // guest[3], places)
            if fit < 1 and step.documents:
                break
            taken = min(max(1, fit), guest[2])
            step.take(guest, taken)
            room -= taken * guest[3]
            places -= taken
            if guest[2] > 0:
                break
            heapq.heappop(queue)
        return step

    def _scatter(self, replica: _Replica, places: float) -> _Step:
        """One document of the first in turn, and others from anywhere: they must be as long."""
        step, queue = _Step(), replica.queue
        step.take(queue[0], 1)
        whole = int(places + next(self._chances))  # so that the mean is right
        for _ in range(min(whole, int(replica.documents)) - 1):
            there = min(replica.documents - step.documents, self._packing.reach)
            place = next(self._chances) * there
            for guest in queue:
                place -= guest[2]
                if place < 0:
                    step.take(guest, 1)
                    break
        while queue and queue[0][2] == 0:
            heapq.heappop(queue)
        return step


def _calm_tokens(truth: CostModel, setting: SimulationSettings) -> float:
    """Waiting tokens below which no rule of admission can refuse a request that is not too large.

    At the price of one pair as long as the whole budget, the dearest there is, they wait half of
    what they may.
    """
    budget, bounds = setting.token_budget, setting.bounds
    price = truth.seconds(Work(1, budget, budget * budget)) / budget
    return min(bounds.max_wait_s / price / 2, bounds.max_tokens, bounds.max_request_tokens)

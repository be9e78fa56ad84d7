"""Thousands of replicas behind a router, each simulated by a lighter model. Pure.

A replica has the batcher's discipline (fair order, token budget, the next step formed just before
the running one ends). Where :mod:`echelon.simulation.server_simulation` looks at each pair, it
counts: the pairs of a request all have its mean length, and padding adds a share that was measured
by packing a sample. Left out: deadlines, priorities, and pairs that several requests share. Tests
compare it with the exact simulation.
"""

from __future__ import annotations

import heapq
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from echelon.errors import InvalidInput, check_positive
from echelon.scheduling.admission import RequestCost, SystemLoad, refuse
from echelon.scheduling.cost_model import CostModel, Work
from echelon.scheduling.packing import REACH, choose, step_cost
from echelon.scheduling.queue import LEAD_S, WEIGHTS, FairOrder, QueueLoad
from echelon.simulation.cluster_traffic import RequestBlock, Router, Routing, uniform_draws
from echelon.simulation.service_level import ServiceLevel, SimulationResult, Tally

if TYPE_CHECKING:
    from collections.abc import Iterable

    from echelon.simulation.server_simulation import SimulationSettings
    from echelon.simulation.workload import SizeDistribution

NORMAL = WEIGHTS["normal"]

SAMPLES = 200
"""Steps that are packed for each number of waiting documents to measure their padding."""


@dataclass(frozen=True, slots=True)
class Packing:
    """Size and padding of steps that pad pairs to the longest, by the number of waiting documents.

    Entry i of ``pairs``, the mean pairs of a step, and of ``padding``, tokens computed over useful
    tokens, is for ``2**(i - 1)`` waiting documents or more. A step is chosen among the first
    ``reach`` documents of the queue.
    """

    pairs: tuple[float, ...]
    padding: tuple[float, ...]
    reach: int

    def step(self, documents: float) -> tuple[float, float]:
        """Pairs and padding of the next step, by the number of waiting documents."""
        entry = min(int(documents).bit_length(), len(self.pairs) - 1)
        return self.pairs[entry], self.padding[entry]


NO_PADDING = Packing((math.inf,), (1.0,), 0)
"""Tokens alone decide, and nothing is padded."""


def packing_of(tokens: SizeDistribution, truth: CostModel, budget: int) -> Packing:
    """Measure the packing of steps that are chosen from samples, as the batcher does."""
    if truth.padding == "none":
        return NO_PADDING
    random = np.random.default_rng(0)
    reach = math.ceil(REACH[truth.padding] * budget / np.mean(tokens.draw(random, SAMPLES)))
    found = [(1.0, 1.0)]
    for waiting in (2**i for i in range(reach.bit_length())):
        pairs = useful = computed = 0
        for _ in range(SAMPLES):
            lengths = tokens.draw(random, min(reach, waiting * 3 // 2))
            step = [lengths[index] for index in choose(lengths, budget, None, truth.padding)]
            pairs, useful = pairs + len(step), useful + sum(step)
            computed += step_cost(step, truth.padding)
        found.append((pairs / SAMPLES, computed / useful))
    pairs_of, padding_of = zip(*found, strict=True)
    return Packing(pairs_of, padding_of, reach)


@dataclass(frozen=True, slots=True)
class Cluster:
    """Replicas of one service, with the same settings; ``packing`` is of :func:`packing_of`."""

    replicas: int
    settings: SimulationSettings
    routing: Routing = "tokens"
    packing: Packing = NO_PADDING

    def __post_init__(self) -> None:
        check_positive(replicas=self.replicas)
        if self.settings.deadline_s is not None:
            raise InvalidInput("deadline_s", "a cluster has none", "Simulate one server.")


def simulate_cluster(
    traffic: Iterable[RequestBlock],
    truth: CostModel,
    cluster: Cluster,
    *,
    level: ServiceLevel = ServiceLevel(),  # noqa: B008 - frozen
    warm_s: float = 0.0,
) -> SimulationResult:
    """Serve requests by a cluster.

    ``truth`` gives the time of steps without the settings' noise. Requests that come before
    ``warm_s`` are served and not counted.
    """
    tally = tally_cluster(traffic, truth, cluster, Tally(level, warm_s))
    return tally.outcome(cluster.replicas * cluster.settings.workers)


def tally_cluster(
    traffic: Iterable[RequestBlock], truth: CostModel, cluster: Cluster, tally: Tally
) -> Tally:
    """Serve requests by a cluster, and count in ``tally``; see :func:`simulate_cluster`."""
    _ClusterRun(truth, cluster, tally).serve(traffic)
    return tally


class _Replica:
    """One server: requests in the fair order, and workers.

    An entry of ``queue`` is [tag, number, documents left, mean tokens, mean squares, arrival,
    documents]. ``documents``, ``tokens`` and ``squares`` are those that wait.
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
        """Take a step's documents off the queue."""
        self.documents -= step.documents
        self.tokens -= step.tokens
        self.squares -= step.squares
        self.order.serve(step.tokens)
        if not self.queue:
            self.documents = self.tokens = self.squares = 0.0  # no rest of rounding is left


class _Step:
    """A step of a replica: useful amounts, predicted seconds, and the requests it completes."""

    __slots__ = ("documents", "ended", "seconds", "squares", "tokens")

    def __init__(self) -> None:
        self.documents = self.tokens = self.squares = self.seconds = 0.0
        self.ended: list[list[float]] = []

    def take(self, request: list[float], documents: float) -> None:
        """Put documents of a request into the step."""
        request[2] -= documents
        self.documents += documents
        self.tokens += documents * request[3]
        self.squares += documents * request[4]
        if request[2] == 0:
            self.ended.append(request)


class _ClusterRun:
    """The state of a cluster. Worker w of replica r is number r × workers + w."""

    def __init__(self, truth: CostModel, cluster: Cluster, tally: Tally) -> None:
        settings = cluster.settings
        self.tally = tally
        self._truth = truth
        self._settings = settings
        self._packing = cluster.packing
        self._padding = cluster.packing.padding[-1]  # of a full queue, for admission
        self._pairs = math.inf if settings.max_pairs is None else settings.max_pairs
        self._workers = settings.workers
        self._replicas = [_Replica(settings.workers) for _ in range(cluster.replicas)]
        self._router = Router(cluster.routing, cluster.replicas, settings.seed)
        self._factors = settings.factors()
        self._draws = uniform_draws(settings.seed)
        self._ends = [0.0] * (cluster.replicas * settings.workers)
        self._running: list[_Step | None] = [None] * (cluster.replicas * settings.workers)
        self._events: list[tuple[float, int]] = []
        self._numbers = 0
        self._safe_tokens = _safe_tokens(truth, settings)

    def serve(self, traffic: Iterable[RequestBlock]) -> None:
        """Serve all requests, and finish those that are admitted."""
        events = self._events
        for block in traffic:
            columns = (block.at_s, block.documents, block.lengths, block.squares)
            for request in zip(*columns, strict=True):
                while events and events[0][0] <= request[0]:
                    self._turn(*heapq.heappop(events))
                self._arrive(*request)
        while events:
            self._turn(*heapq.heappop(events))

    # Requests.

    def _arrive(self, now: float, documents: int, length: float, square: float) -> None:
        self.tally.arrive(now, documents)
        number = self._router.choose()
        replica = self._replicas[number]
        tokens = documents * length
        if not self._admits(replica, number, (documents, tokens, documents * square), now):
            return
        self._numbers += 1
        tag = replica.order.join(self._numbers, tokens, NORMAL)
        request = [tag, self._numbers, documents, length, square, now, documents]
        heapq.heappush(replica.queue, request)
        replica.requests += 1
        replica.documents += documents
        replica.tokens += tokens
        replica.squares += documents * square
        self._router.add(number, tokens, 1)
        if replica.idle:
            self._turn(now, number * self._workers + replica.idle.pop())

    def _admits(
        self, replica: _Replica, number: int, amounts: tuple[int, float, float], now: float
    ) -> bool:
        """Apply the real admission rules, but only where one of them might refuse."""
        documents, tokens, squares = amounts
        bounds = self._settings.bounds
        if (
            replica.requests < bounds.max_requests
            and replica.tokens + tokens < self._safe_tokens
            and documents <= bounds.max_documents
        ):
            return True
        cost = RequestCost(documents, int(tokens * self._padding), int(squares * self._padding))
        refusal = refuse(cost, self._load(replica, number), bounds, now)
        if refusal is not None:
            self.tally.refuse(now, refusal.reason)
        return refusal is None

    def _load(self, replica: _Replica, number: int) -> SystemLoad:
        first = number * self._workers
        steps = self._running[first : first + self._workers]
        load = QueueLoad(
            requests=replica.requests,
            pairs=0,
            tokens=int(replica.tokens * self._padding),
            squares=int(replica.squares * self._padding),
            weight=replica.order.weight,
            running_s=sum(step.seconds for step in steps if step is not None),
            budget=self._settings.token_budget,
            oldest=None,
        )
        return SystemLoad(load, self._truth, self._workers)

    # Workers.

    def _turn(self, now: float, worker: int) -> None:
        """Account for a worker's step that has ended or soon will, and give it the next."""
        number, own = divmod(worker, self._workers)
        replica = self._replicas[number]
        step = self._running[worker]
        if step is not None:
            self._running[worker] = None
            replica.requests -= len(step.ended)
            self._router.add(number, -step.tokens, -len(step.ended))
        if replica.queue:
            self._start(now, worker, replica)
        elif self._ends[worker] > now:
            heapq.heappush(self._events, (self._ends[worker], worker))
        else:
            replica.idle.append(own)

    def _start(self, now: float, worker: int, replica: _Replica) -> None:
        pairs, padding = self._packing.step(replica.documents)
        fill = self._fill if self._packing is NO_PADDING else self._scatter
        step = fill(replica, min(self._pairs, pairs))
        replica.took(step)
        # Padding multiplies lengths, so it multiplies squares by its square.
        work = Work(1, int(step.tokens * padding), int(step.squares * padding**2))
        step.seconds = self._truth.seconds(work)
        seconds = step.seconds * next(self._factors)
        began = max(now, self._ends[worker])
        end = self._ends[worker] = began + seconds
        self._running[worker] = step
        ready = max(began, min(end, began + step.seconds - LEAD_S))
        heapq.heappush(self._events, (ready, worker))
        self.tally.ran(step.documents, step.tokens, seconds, end)
        settings = self._settings
        for request in step.ended:
            extra = settings.request_s + settings.document_s * request[6]
            self.tally.answer(request[5], end + extra)

    def _fill(self, replica: _Replica, places: float) -> _Step:
        """A step of whole documents in the fair order, as long as they fit; the first always."""
        step, queue = _Step(), replica.queue
        tokens_left = float(self._settings.token_budget)
        while queue:
            request = queue[0]
            fit = min(tokens_left // request[3], places)
            if fit < 1 and step.documents:
                break
            taken = min(max(1, fit), request[2])
            step.take(request, taken)
            tokens_left -= taken * request[3]
            places -= taken
            if request[2] > 0:
                break
            heapq.heappop(queue)
        return step

    def _scatter(self, replica: _Replica, places: float) -> _Step:
        """A step of the first document in order, and of others that are as long, from anywhere."""
        step, queue = _Step(), replica.queue
        step.take(queue[0], 1)
        whole = int(places + next(self._draws))  # so that the mean is right
        for _ in range(min(whole, int(replica.documents)) - 1):
            there = min(replica.documents - step.documents, self._packing.reach)
            place = next(self._draws) * there
            for request in queue:
                place -= request[2]
                if place < 0:
                    step.take(request, 1)
                    break
        while queue and queue[0][2] == 0:
            heapq.heappop(queue)
        return step


def _safe_tokens(truth: CostModel, settings: SimulationSettings) -> float:
    """Waiting tokens below which no admission rule can refuse a request that is not too large.

    At the cost of one pair as long as the whole budget, the highest there is, they wait half of
    what they may.
    """
    budget, bounds = settings.token_budget, settings.bounds
    token_s = truth.seconds(Work(1, budget, budget * budget)) / budget
    return min(bounds.max_wait_s / token_s / 2, bounds.max_tokens, bounds.max_request_tokens)

"""The batcher's queue: requests, their pairs and steps, the fair order, and which end next.

Pure. A :class:`UniquePair` is scored once for all requests that want it, its owners.

A server that splits itself evenly among its requests is fair but slow: all of them end late.
Serving them one after another in the order in which that server would end them is as fair, never
later, and most end far earlier (Friedman and Henderson, Fairness and efficiency in web server
protocols, SIGMETRICS 2003; with one packet a request it is weighted fair queueing, Demers, Keshav
and Shenker 1989). The tag of a request is the virtual time at which the even server would have
finished its tokens. Virtual time is the service that each request would have received there; it
advances by the tokens that are really served, divided by the weight of all requests.
"""

from __future__ import annotations

import heapq
import math
from collections import deque
from dataclasses import dataclass, field
from enum import Enum, auto
from typing import TYPE_CHECKING, Literal

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Iterable, Sequence

    from echelon.types import FloatArray, Priority

LEAD_S = 0.005
"""The next step is formed and sent this long before the running one should end: that takes about
1 ms, and Python's threads take turns every 5 ms. Earlier would leave out short requests that still
come."""

WEIGHTS: dict[Priority, int] = {"high": 16, "normal": 4, "low": 1}
"""Shares: a request of priority ``high`` counts as a quarter of its size beside ``normal``. Strict
priorities would starve the lower ones; with shares every request gets its turn."""

Place = tuple[int, int]
"""(number of a request, index of a pair in it)."""

Fault = Literal["worker_lost", "not_finite", "out_of_memory", "scorer"]


@dataclass(frozen=True, slots=True)
class PairRequest:
    """The pairs of one request."""

    number: int  # never used twice
    lengths: tuple[int, ...]  # tokens of each pair, at least one pair
    keys: tuple[Hashable, ...] | None = None  # equal keys share one score; None: all differ
    deadline: float | None = None  # time after which the answer is useless; None means never
    priority: Priority = "normal"  # its share of the device


@dataclass(frozen=True, slots=True)
class PlannedStep:
    """Pairs that go through the model together."""

    number: int  # counts up from 1
    places: tuple[Place, ...]  # for each pair, a request that wants it and its index there
    lengths: tuple[int, ...]  # tokens of each pair
    requests: tuple[int, ...]  # every request that waits for a pair of the step, ascending
    tokens: int  # without padding
    cost_tokens: int  # with padding
    predicted_s: float
    again: bool  # its pairs were in an earlier step that failed


@dataclass(frozen=True, slots=True)
class Completed:
    """A request with all its scores: float32 [pairs], raw logits in its order."""

    request: int
    logits: FloatArray


@dataclass(frozen=True, slots=True)
class FailedRequest:
    """A request that cannot be answered."""

    request: int
    index: int  # the pair that failed
    fault: Fault
    logit: float | None = None  # what the model gave, for ``not_finite``


Ended = Completed | FailedRequest


@dataclass(frozen=True, slots=True)
class QueueLoad:
    """The work of the batcher."""

    requests: int  # that wait or run
    pairs: int  # distinct pairs that wait
    tokens: int  # of these pairs
    squares: int  # sum of their squared tokens
    weight: int  # sum of the weights of the requests that share the device
    running_s: float  # predicted seconds of all running steps
    budget: int  # maximum tokens of a step
    oldest: float | None  # arrival time of the oldest request; None without requests


class PairState(Enum):
    """State of a pair."""

    WAITING = auto()  # in the queue of each owner that came before a step took it
    RUNNING = auto()
    AGAIN = auto()  # in a group that is scored again before all others
    GONE = auto()


QUEUED = {PairState.WAITING, PairState.AGAIN}


@dataclass(slots=True, eq=False)
class UniquePair:
    """A distinct pair; its owners are (request, index) of the places that want its score."""

    key: Hashable
    length: int
    state: PairState = PairState.WAITING
    owners: list[tuple[QueuedRequest, int]] = field(default_factory=list)
    attempts: int = 0
    lost_by: int | None = None  # the worker that was lost with it
    counted: bool = False


class QueuedRequest:
    """A request in the queue and its state."""

    def __init__(self, request: PairRequest, arrived: float) -> None:
        self.request = request
        self.number = request.number
        self.arrived = arrived
        self.tag = 0.0
        self.pairs: list[UniquePair] = []
        self.waiting: deque[UniquePair] = deque()
        self.left = len(request.lengths)
        self.logits = np.full(self.left, np.nan, dtype=np.float32)
        self.urgent = False
        self.ended = False


Turn = tuple[float, ...]
"""A sort key; its last number is the request's number."""


def by_deadline(queued: QueuedRequest) -> Turn:
    """Sort key: earliest deadline first."""
    deadline = queued.request.deadline
    return math.inf if deadline is None else deadline, queued.number


def by_tag(queued: QueuedRequest) -> Turn:
    """Sort key of the fair order: by tag, then deadline, then arrival."""
    return queued.tag, *by_deadline(queued)


class FairOrder:
    """The virtual server that is shared evenly; ``weight`` is that of all requests."""

    def __init__(self) -> None:
        self.weight = 0
        self._time = 0.0
        self._members: dict[int, tuple[float, int]] = {}
        self._ends: list[tuple[float, int]] = []

    def join(self, member: int, tokens: float, weight: int) -> float:
        """Add a request.

        Returns:
            Its tag: requests with smaller tags go first. A tag never changes.
        """
        tag = self._time + tokens / weight
        self._members[member] = tag, weight
        self.weight += weight
        heapq.heappush(self._ends, (tag, member))
        return tag

    def leave(self, member: int) -> None:
        """Remove a cancelled request; others are removed by :meth:`serve`."""
        _, weight = self._members.pop(member, (0.0, 0))
        self.weight -= weight

    def serve(self, tokens: float) -> None:
        """Advance virtual time by served tokens; requests end on the way."""
        left = tokens
        while self._members:
            tag, member = self._ends[0]
            if member in self._members:
                needed = max(0.0, tag - self._time) * self.weight
                if needed > left:
                    self._time += left / self.weight
                    return
                left -= needed
                self._time = max(self._time, tag)
                self.leave(member)
            heapq.heappop(self._ends)


class RequestQueue:
    """Requests in the order of ``turn``, from which waiting pairs are drawn.

    The sort key of a request must not change while it is in the queue.
    """

    def __init__(self, turn: Callable[[QueuedRequest], Turn]) -> None:
        self._turn = turn
        self._heap: list[tuple[Turn, QueuedRequest]] = []
        self._here: set[int] = set()

    def add(self, queued: QueuedRequest) -> None:
        """Add a request, unless it is in the queue."""
        if queued.number not in self._here:
            self._here.add(queued.number)
            heapq.heappush(self._heap, (self._turn(queued), queued))

    def draw(
        self, drawn: list[tuple[QueuedRequest, UniquePair]], tokens: float, max_drawn: float
    ) -> int:
        """Append pairs with their requests to ``drawn``; a pair of two requests may come twice.

        It stops after ``tokens`` more tokens, or when ``drawn`` has the length ``max_drawn``.
        Returns the tokens drawn.
        """
        got = 0
        while self._heap and got < tokens and len(drawn) < max_drawn:
            queued = self._heap[0][1]
            if queued.ended or not queued.waiting:
                heapq.heappop(self._heap)
                self._here.discard(queued.number)
                continue
            pair = queued.waiting.popleft()
            if pair.state is PairState.WAITING:
                drawn.append((queued, pair))
                got += pair.length
        return got

    def clear(self) -> None:
        """Remove all requests."""
        self._heap.clear()
        self._here.clear()


@dataclass(frozen=True, slots=True)
class CompletionEstimate:
    """The work until a request ends."""

    running_s: float  # predicted seconds of the running steps that it waits for
    tokens: int = 0  # waiting tokens of it and of the requests before it; 0 if all of it runs
    squares: int = 0  # sum of their squared tokens


def next_completions(
    requests: Iterable[QueuedRequest],
    running: Sequence[tuple[PlannedStep, list[UniquePair]]],
    places: int,
    workers: int,
) -> list[CompletionEstimate]:
    """Estimate the next requests to end, at most ``places``, in the order of ending.

    The next is one whose pairs all run, or the first in the fair order. A running step counts
    whole, since the batcher does not know when it began, and deadlines are ignored: both can only
    let requests end earlier. ``running`` are the running steps with their pairs, oldest first.
    """
    ends, all_s = _ends(running, workers)
    # From the end: pairs are drawn from the front, so the last ones wait longest.
    waiting = {q.number: q for q in requests if any(p.state in QUEUED for p in reversed(q.pairs))}
    soon = [
        CompletionEstimate(seconds) for number, seconds in ends.items() if number not in waiting
    ]
    soon = heapq.nsmallest(places, soon, key=lambda end: end.running_s)
    tokens, squares = 0, 0
    seen: set[UniquePair] = set()
    for queued in heapq.nsmallest(places - len(soon), waiting.values(), key=by_tag):
        pairs = {pair for pair in queued.pairs if pair.state in QUEUED} - seen
        seen |= pairs
        tokens += sum(pair.length for pair in pairs)
        squares += sum(pair.length**2 for pair in pairs)
        soon.append(CompletionEstimate(all_s, tokens, squares))
    return soon


def _ends(
    running: Sequence[tuple[PlannedStep, list[UniquePair]]], workers: int
) -> tuple[dict[int, float], float]:
    """Seconds until each request's running pairs are scored, and until a worker is free."""
    free = [0.0] * workers
    ends: dict[int, float] = {}
    for step, pairs in running:
        end = heapq.heappop(free) + step.predicted_s
        heapq.heappush(free, end)
        for pair in pairs:
            for queued, _ in pair.owners:
                ends[queued.number] = max(end, ends.get(queued.number, 0.0))
    return ends, sum(free) / workers

"""The batcher's records: requests, their pairs and steps, and which requests should end next.

Pure. A :class:`UniquePair` is scored once for all requests that want it, its owners. Requests end
in the fair order (:mod:`echelon.scheduling.fair_queue`), so the next to end is one whose pairs all
run, or the first in that order. A running step counts whole, since the batcher does not know when
it began, and deadlines are ignored: both can only let requests end earlier.
"""

from __future__ import annotations

import heapq
import math
from collections import deque
from dataclasses import dataclass
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

Place = tuple[int, int]
"""(number of a request, index of a pair in it)."""


@dataclass(frozen=True, slots=True)
class PairRequest:
    """The pairs of one request.

    Attributes:
        number: its number, never used twice.
        lengths: tokens of each pair, at least one pair.
        keys: identity of each pair; equal keys share one score. None: all pairs differ.
        deadline: the time after which the answer is useless; None means never.
        priority: its share of the device.
    """

    number: int
    lengths: tuple[int, ...]
    keys: tuple[Hashable, ...] | None = None
    deadline: float | None = None
    priority: Priority = "normal"


@dataclass(frozen=True, slots=True)
class PlannedStep:
    """Pairs that go through the model together.

    Attributes:
        number: counts up from 1.
        places: for each pair, a request that wants it and its index there.
        lengths: tokens of each pair.
        requests: every request that waits for a pair of the step, ascending.
        tokens: useful tokens.
        cost_tokens: tokens, padding included.
        predicted_s: predicted seconds.
        again: its pairs were in an earlier step that failed.
    """

    number: int
    places: tuple[Place, ...]
    lengths: tuple[int, ...]
    requests: tuple[int, ...]
    tokens: int
    cost_tokens: int
    predicted_s: float
    again: bool


@dataclass(frozen=True, slots=True)
class Completed:
    """A request with all its scores: float32 [pairs], raw logits in its order."""

    request: int
    logits: FloatArray


Fault = Literal["worker_lost", "not_finite", "out_of_memory", "scorer"]


@dataclass(frozen=True, slots=True)
class FailedRequest:
    """A request that cannot be answered.

    Attributes:
        request: its number.
        index: the pair that failed.
        fault: why.
        logit: what the model gave, for ``not_finite``.
    """

    request: int
    index: int
    fault: Fault
    logit: float | None = None


Ended = Completed | FailedRequest


@dataclass(frozen=True, slots=True)
class QueueLoad:
    """The work of the batcher.

    Attributes:
        requests: requests that wait or run.
        pairs: distinct pairs that wait.
        tokens: their tokens.
        squares: their squared tokens.
        weight: sum of the weights of the requests that share the device.
        running_s: predicted seconds of all running steps.
        budget: maximum tokens of a step.
        oldest: arrival time of the oldest request; None without requests.
    """

    requests: int
    pairs: int
    tokens: int
    squares: int
    weight: int
    running_s: float
    budget: int
    oldest: float | None


class PairState(Enum):
    """State of a pair."""

    WAITING = auto()  # in the queue of each owner that came before a step took it
    RUNNING = auto()
    AGAIN = auto()  # in a group that is scored again before all others
    GONE = auto()


class UniquePair:
    """A distinct pair; its owners are (request, index) of the places that want its score."""

    __slots__ = ("attempts", "counted", "key", "length", "owners", "state")

    def __init__(self, key: Hashable, length: int) -> None:
        self.key = key
        self.length = length
        self.state = PairState.WAITING
        self.owners: list[tuple[QueuedRequest, int]] = []
        self.attempts = 0
        self.counted = False

    @property
    def first_owner(self) -> int:
        """Number of the first request that still wants it; -1 without one."""
        return self.owners[0][0].number if self.owners else -1


class QueuedRequest:
    """A request in the queue and its state."""

    __slots__ = (
        "arrived",
        "ended",
        "left",
        "logits",
        "pairs",
        "request",
        "tag",
        "urgent",
        "waiting",
    )

    def __init__(self, request: PairRequest, arrived: float) -> None:
        self.request = request
        self.arrived = arrived
        self.tag = 0.0
        self.pairs: list[UniquePair] = []
        self.waiting: deque[UniquePair] = deque()
        self.left = len(request.lengths)
        self.logits = np.full(self.left, np.nan, dtype=np.float32)
        self.urgent = False
        self.ended = False

    @property
    def number(self) -> int:
        """The request's number."""
        return self.request.number


Turn = tuple[float, ...]
"""A sort key; its last number is the request's number."""


def by_tag(queued: QueuedRequest) -> Turn:
    """Sort key of the fair order: by tag, then deadline, then arrival."""
    deadline = queued.request.deadline
    return queued.tag, math.inf if deadline is None else deadline, queued.number


def by_deadline(queued: QueuedRequest) -> Turn:
    """Sort key: earliest deadline first."""
    deadline = queued.request.deadline
    return math.inf if deadline is None else deadline, queued.number


class RequestQueue:
    """Requests in the order of a sort key, from which waiting pairs are drawn.

    Args:
        turn: the sort key; it must not change while a request is in the queue.
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

        Args:
            drawn: pairs drawn so far.
            tokens: stop after this many more tokens.
            max_drawn: stop when ``drawn`` has this length.

        Returns:
            Tokens drawn.
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


QUEUED = {PairState.WAITING, PairState.AGAIN}


@dataclass(frozen=True, slots=True)
class CompletionEstimate:
    """The work until a request ends.

    Attributes:
        running_s: predicted seconds of the running steps that it waits for.
        tokens: waiting tokens of it and of the requests before it; 0 if all of it runs.
        squares: their squared tokens.
    """

    running_s: float
    tokens: int = 0
    squares: int = 0


def next_completions(
    requests: Iterable[QueuedRequest],
    running: Sequence[tuple[PlannedStep, list[UniquePair]]],
    places: int,
    workers: int,
) -> list[CompletionEstimate]:
    """Estimate the next requests to end, in the order of ending.

    Args:
        requests: all requests of the batcher.
        running: running steps with their pairs, oldest first.
        places: maximum number of requests.
        workers: workers that run the steps.
    """
    ends, all_s = _ends(running, workers)
    # From the end: pairs are drawn from the front, so the last ones wait longest.
    waiting = {q.number: q for q in requests if any(map(_waits, reversed(q.pairs)))}
    soon = [
        CompletionEstimate(seconds) for number, seconds in ends.items() if number not in waiting
    ]
    soon = heapq.nsmallest(places, soon, key=lambda end: end.running_s)
    tokens, squares = 0, 0
    seen: set[UniquePair] = set()
    for queued in heapq.nsmallest(places - len(soon), waiting.values(), key=by_tag):
        pairs = {pair for pair in queued.pairs if _waits(pair)} - seen
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


def _waits(pair: UniquePair) -> bool:
    return pair.state in QUEUED

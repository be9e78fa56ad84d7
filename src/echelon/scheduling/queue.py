"""What waits: the batcher's own records, and what it says to the outside.

Pure data. A *unit* is one distinct pair; its owners are the places in requests that want its
score. A request keeps its units in the order in which it gives them away.

Which requests inside should end next, and what has to be done until then.

Pure: looks at the batcher's records and changes nothing. Requests end in the fair order
(:mod:`echelon.scheduling.fair_queue`), so the next to end is one whose pairs all run already, or
the first in
that order; the large ones behind it do not matter. A step under way counts whole, as the batcher
does not know when it began, and deadlines are not looked at: both let requests end earlier only.
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
"""The next step is formed and sent when the running one should end in this time: forming, joining
and sending take about one millisecond, and Python's threads take turns every five. Earlier would
fix the next step while a short request may still come."""

Place = tuple[int, int]
"""(number of a request, index of a pair in it)."""


@dataclass(frozen=True, slots=True)
class PairRequest:
    """Pairs that are asked for together.

    Attributes:
        number: the caller's name for it, never used twice.
        lengths: tokens of each pair, at least one pair.
        keys: what tells pairs apart; pairs of one key have one score. None: all differ.
        deadline: the time after which nobody wants the answer; None means never.
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
        cost_tokens: tokens paid for, padding included.
        predicted_s: seconds it should take.
        again: its pairs were in a step before that did not end well.
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
        index: the pair that it failed on.
        fault: why.
        logit: what the model gave, where that is the fault.
    """

    request: int
    index: int
    fault: Fault
    logit: float | None = None


Ended = Completed | FailedRequest


@dataclass(frozen=True, slots=True)
class QueueLoad:
    """What the batcher has before it.

    Attributes:
        requests: requests that wait or run.
        pairs: distinct pairs that wait.
        tokens: their tokens.
        squares: their squared tokens.
        weight: weight of the requests that a newcomer has to share with.
        running_s: predicted seconds of the steps under way, in all.
        budget: most tokens a step may cost.
        oldest: when the oldest of the requests came; None where there is none.
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
    """Where a unit is."""

    WAITING = auto()  # in the queue of every owner that came before it was taken
    RUNNING = auto()
    AGAIN = auto()  # in a group that goes first of all
    GONE = auto()


class UniquePair:
    """One distinct pair."""

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
        """The first request that still wants it; -1 where none does."""
        return self.owners[0][0].number if self.owners else -1


class QueuedRequest:
    """A request with what is left of it."""

    __slots__ = ("came", "ended", "hasty", "left", "logits", "request", "tag", "units", "waiting")

    def __init__(self, request: PairRequest, came: float) -> None:
        self.request = request
        self.came = came
        self.tag = 0.0
        self.units: list[UniquePair] = []
        self.waiting: deque[UniquePair] = deque()
        self.left = len(request.lengths)
        self.logits = np.full(self.left, np.nan, dtype=np.float32)
        self.hasty = False
        self.ended = False

    @property
    def number(self) -> int:
        """The request's number."""
        return self.request.number


Turn = tuple[float, ...]
"""A key to sort by; the last number is the request's own."""


def by_tag(entry: QueuedRequest) -> Turn:
    """Place in the fair order: equal tags go by deadline, then by arrival."""
    deadline = entry.request.deadline
    return entry.tag, math.inf if deadline is None else deadline, entry.number


def by_deadline(entry: QueuedRequest) -> Turn:
    """Earliest deadline first."""
    deadline = entry.request.deadline
    return math.inf if deadline is None else deadline, entry.number


class RequestQueue:
    """Requests in the order of their turn, which give their waiting units away.

    Args:
        turn: what to sort by; it must not change while a request is in line.
    """

    def __init__(self, turn: Callable[[QueuedRequest], Turn]) -> None:
        self._turn = turn
        self._heap: list[tuple[Turn, QueuedRequest]] = []
        self._here: set[int] = set()

    def add(self, entry: QueuedRequest) -> None:
        """Let a request queue, unless it does."""
        if entry.number not in self._here:
            self._here.add(entry.number)
            heapq.heappush(self._heap, (self._turn(entry), entry))

    def draw(
        self, drawn: list[tuple[QueuedRequest, UniquePair]], tokens: float, most: float
    ) -> int:
        """Append units with their requests to ``drawn``.

        Args:
            drawn: what was drawn so far; a unit of two requests may be drawn from both.
            tokens: stop once so many more tokens are drawn.
            most: stop once ``drawn`` is so long.

        Returns:
            Tokens drawn.
        """
        got = 0
        while self._heap and got < tokens and len(drawn) < most:
            entry = self._heap[0][1]
            if entry.ended or not entry.waiting:
                heapq.heappop(self._heap)
                self._here.discard(entry.number)
                continue
            unit = entry.waiting.popleft()
            if unit.state is PairState.WAITING:
                drawn.append((entry, unit))
                got += unit.length
        return got

    def clear(self) -> None:
        """Send everyone away."""
        self._heap.clear()
        self._here.clear()


QUEUED = {PairState.WAITING, PairState.AGAIN}


@dataclass(frozen=True, slots=True)
class CompletionEstimate:
    """What has to be done until a request has ended.

    Attributes:
        running_s: predicted seconds of the steps under way that it waits for.
        tokens: tokens that wait, of it and of those before it; 0 where all of it runs.
        squares: their squared tokens.
    """

    running_s: float
    tokens: int = 0
    squares: int = 0


def next_completions(
    entries: Iterable[QueuedRequest],
    running: Sequence[tuple[PlannedStep, list[UniquePair]]],
    places: int,
    workers: int,
) -> list[CompletionEstimate]:
    """The next ``places`` requests to end, or all where there are fewer, in the order of ending.

    Args:
        entries: requests inside.
        running: steps under way with their pairs, in the order in which they were formed.
        places: how many.
        workers: workers that run the steps.
    """
    ends, all_s = _ends(running, workers)
    # From the end: what is given away last waits longest.
    queued = {e.number: e for e in entries if any(map(_waits, reversed(e.units)))}
    soon = [CompletionEstimate(seconds) for number, seconds in ends.items() if number not in queued]
    soon = heapq.nsmallest(places, soon, key=lambda end: end.running_s)
    tokens, squares = 0, 0
    seen: set[UniquePair] = set()
    for entry in heapq.nsmallest(places - len(soon), queued.values(), key=by_tag):
        units = {unit for unit in entry.units if _waits(unit)} - seen
        seen |= units
        tokens += sum(unit.length for unit in units)
        squares += sum(unit.length**2 for unit in units)
        soon.append(CompletionEstimate(all_s, tokens, squares))
    return soon


def _ends(
    running: Sequence[tuple[PlannedStep, list[UniquePair]]], workers: int
) -> tuple[dict[int, float], float]:
    """When each request's last running pair is scored, and when a worker is free on average."""
    free = [0.0] * workers
    ends: dict[int, float] = {}
    for step, units in running:
        end = heapq.heappop(free) + step.predicted_s
        heapq.heappush(free, end)
        for unit in units:
            for entry, _ in unit.owners:
                ends[entry.number] = max(end, ends.get(entry.number, 0.0))
    return ends, sum(free) / workers


def _waits(unit: UniquePair) -> bool:
    return unit.state in QUEUED

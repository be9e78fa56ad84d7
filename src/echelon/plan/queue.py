"""What waits: the batcher's own records, and what it says to the outside.

Pure data. A *unit* is one distinct pair; its owners are the places in requests that want its
score. A request keeps its units in the order in which it gives them away.
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
    from collections.abc import Callable, Hashable

    from echelon.plan.fair import Priority
    from echelon.types import FloatArray

LEAD_S = 0.005
"""The next step is formed and sent when the running one should end in this time: forming, joining
and sending take about one millisecond, and Python's threads take turns every five. Earlier would
fix the next step while a short request may still come."""

Place = tuple[int, int]
"""(number of a request, index of a pair in it)."""


@dataclass(frozen=True, slots=True)
class Request:
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
class Step:
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
class Broken:
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


Ended = Completed | Broken


@dataclass(frozen=True, slots=True)
class Load:
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


class State(Enum):
    """Where a unit is."""

    WAITING = auto()  # in the queue of every owner that came before it was taken
    RUNNING = auto()
    AGAIN = auto()  # in a group that goes first of all
    GONE = auto()


class Unit:
    """One distinct pair."""

    __slots__ = ("attempts", "counted", "key", "length", "owners", "state")

    def __init__(self, key: Hashable, length: int) -> None:
        self.key = key
        self.length = length
        self.state = State.WAITING
        self.owners: list[tuple[Entry, int]] = []
        self.attempts = 0
        self.counted = False

    @property
    def first_owner(self) -> int:
        """The first request that still wants it; -1 where none does."""
        return self.owners[0][0].number if self.owners else -1


class Entry:
    """A request with what is left of it."""

    __slots__ = ("came", "ended", "hasty", "left", "logits", "request", "tag", "units", "waiting")

    def __init__(self, request: Request, came: float) -> None:
        self.request = request
        self.came = came
        self.tag = 0.0
        self.units: list[Unit] = []
        self.waiting: deque[Unit] = deque()
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


def by_tag(entry: Entry) -> Turn:
    """Place in the fair order: equal tags go by deadline, then by arrival."""
    deadline = entry.request.deadline
    return entry.tag, math.inf if deadline is None else deadline, entry.number


def by_deadline(entry: Entry) -> Turn:
    """Earliest deadline first."""
    deadline = entry.request.deadline
    return math.inf if deadline is None else deadline, entry.number


class Line:
    """Requests in the order of their turn, which give their waiting units away.

    Args:
        turn: what to sort by; it must not change while a request is in line.
    """

    def __init__(self, turn: Callable[[Entry], Turn]) -> None:
        self._turn = turn
        self._heap: list[tuple[Turn, Entry]] = []
        self._here: set[int] = set()

    def add(self, entry: Entry) -> None:
        """Let a request queue, unless it does."""
        if entry.number not in self._here:
            self._here.add(entry.number)
            heapq.heappush(self._heap, (self._turn(entry), entry))

    def draw(self, drawn: list[tuple[Entry, Unit]], tokens: float, most: float) -> int:
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
            if unit.state is State.WAITING:
                drawn.append((entry, unit))
                got += unit.length
        return got

    def clear(self) -> None:
        """Send everyone away."""
        self._heap.clear()
        self._here.clear()

"""Batches of a fixed number of pairs, first come first served: what Echelon is compared with.

Pure and deterministic. The batcher that tutorials show: pairs of all requests in one queue without
bounds, ``pairs`` of them a step. With ``patience_s`` a step that is not full waits for company
until its first pair has waited so long; without, it takes what is there.
"""

from __future__ import annotations

import heapq
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING

from echelon.errors import InvalidInput
from echelon.simulate.outcome import Tally

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from echelon.plan.cost import CostModel
    from echelon.plan.workload import Arrival
    from echelon.simulate.outcome import Outcome
    from echelon.simulate.setting import Setting


@dataclass(frozen=True, slots=True)
class Static:
    """A fixed batch size.

    Attributes:
        pairs: pairs of a full step.
        patience_s: seconds that a pair waits for a step to fill.
    """

    pairs: int
    patience_s: float = 0.0

    def __post_init__(self) -> None:
        if self.pairs < 1:
            raise InvalidInput("pairs", f"{self.pairs} is not positive", "Give 1 or more.")
        if not self.patience_s >= 0:
            raise InvalidInput("patience_s", f"{self.patience_s} is below 0", "Give 0 or more.")


class _Guest:
    """A request inside: when it came, and its pairs that are not scored yet."""

    __slots__ = ("at_s", "left")

    def __init__(self, at_s: float, left: int) -> None:
        self.at_s = at_s
        self.left = left


_Pair = tuple[float, int, _Guest]
"""(when it joined the queue, tokens, whose)."""


def simulate_static(
    requests: Iterable[Arrival],
    truth: CostModel,
    setting: Setting,
    policy: Static,
    *,
    goal_s: float | None = None,
    warm_s: float = 0.0,
) -> Outcome:
    """Serve requests in batches of a fixed size; see :func:`echelon.simulate.exact.simulate`.

    Of the setting, the token budget, the bounds and the deadline do not apply.
    """
    tally = Tally(goal_s, warm_s)
    pairs = _Pairs(_pairs(requests, setting, tally))
    factors = setting.factors()
    free = [0.0] * setting.workers
    while pairs:
        began = pairs.full_at(heapq.heappop(free), policy)
        step = pairs.take(began, policy.pairs)
        seconds = truth.predict([tokens for _, tokens, _ in step]) * next(factors)
        tally.ran(len(step), sum(tokens for _, tokens, _ in step), seconds, began + seconds)
        for _, _, guest in step:
            guest.left -= 1
            if guest.left == 0:
                tally.answer(guest.at_s, began + seconds)
        heapq.heappush(free, began + seconds)
    return tally.outcome(setting.workers)


def _pairs(requests: Iterable[Arrival], setting: Setting, tally: Tally) -> Iterator[_Pair]:
    for arrival in requests:
        count = len(arrival.lengths)
        tally.came(arrival.at_s, count)
        guest = _Guest(arrival.at_s, count)
        joined = arrival.at_s + setting.request_s + setting.document_s * count
        for tokens in arrival.lengths:
            yield joined, tokens, guest


class _Pairs:
    """The queue of pairs, which looks ahead as far as a step needs."""

    def __init__(self, pairs: Iterator[_Pair]) -> None:
        self._pairs = pairs
        self._queue: deque[_Pair] = deque()

    def __bool__(self) -> bool:
        return self._see(1)

    def full_at(self, free_s: float, policy: Static) -> float:
        """When the next step begins on a worker that is free then."""
        first = self._queue[0][0]
        begin = max(free_s, first)
        late = max(begin, first + policy.patience_s)
        if self._see(policy.pairs):
            return min(late, max(begin, self._queue[policy.pairs - 1][0]))
        return late

    def take(self, now: float, most: int) -> list[_Pair]:
        """What is there then."""
        step: list[_Pair] = []
        while len(step) < most and self._see(1) and self._queue[0][0] <= now:
            step.append(self._queue.popleft())
        return step

    def _see(self, count: int) -> bool:
        """Whether so many pairs are there, or will come."""
        while len(self._queue) < count:
            pair = next(self._pairs, None)
            if pair is None:
                return False
            self._queue.append(pair)
        return True

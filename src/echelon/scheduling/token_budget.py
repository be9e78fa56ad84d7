"""The token budget while steps run: down at once where they do not fit or come late, up slowly.

Pure: it is told how steps ended and answers with the budget from now on. Down by halves is for
memory (:mod:`echelon.scheduling.oom_policy` says how far), down by a quarter for lateness; up by
an eighth
after many steps that went well. Each time that memory runs out again the way up takes twice as
long, so that a device that has really become smaller is not run into for ever.
"""

from __future__ import annotations

from collections import deque
from typing import Literal

LATE = 2.0
"""A step is late that takes more than this many times what was predicted. A machine of half its
speed is not: predictions follow it within eight steps, and smaller steps would not help."""

GOAL_SHARE = 0.5
"""A step is late as well that takes more than this share of the latency goal: a request that just
missed a step waits for one and is in the next."""

LATE_OF = (3, 8)
"""So many late steps among so many of the last full ones move the budget: one is an accident."""

LEAST_SHARE = 8
"""Lateness leaves at least one in so many tokens: what smaller steps gain is used up by then."""

QUIET = 64
"""Steps that go well before the budget goes up by an eighth; from half back to all takes six."""

MEMORY_QUIET = 512
"""The same after memory ran out; it doubles each time it does again, up to 64-fold."""

MOST_DOUBLINGS = 6

Reason = Literal["memory", "late", "goal", "recovered"]


class TokenBudget:
    """How many tokens a step may cost.

    Args:
        most: tokens; it is never more.
        goal_s: latency goal in seconds; None is no goal.

    Attributes:
        tokens: the budget now.
    """

    def __init__(self, most: int, goal_s: float | None = None) -> None:
        self.most = self.tokens = most
        self._limit_s = None if goal_s is None else GOAL_SHARE * goal_s
        self._late: deque[Reason | None] = deque(maxlen=LATE_OF[1])
        self._well = self._memory_failures = 0
        self._wait = QUIET

    def out_of_memory(self, tokens: int) -> bool:
        """A step did not fit, and a smaller budget shall hold; whether it is smaller."""
        doublings = min(self._memory_failures, MOST_DOUBLINGS)
        self._wait = MEMORY_QUIET << doublings
        self._memory_failures += 1
        self._well = 0
        if tokens >= self.tokens:
            return False
        self.tokens = tokens
        return True

    def ended(self, cost_tokens: int, predicted_s: float, actual_s: float) -> Reason | None:
        """A step went well.

        Args:
            cost_tokens: what it was paid for.
            predicted_s: seconds that it should have taken.
            actual_s: seconds that it took.

        Returns:
            Why the budget has moved; None where it has not.
        """
        self._well += 1
        if 2 * cost_tokens > self.tokens:  # smaller steps would not have been smaller
            why = self._why_late(predicted_s, actual_s)
            self._late.append(why)
            self._well *= why is None
            reasons = [reason for reason in self._late if reason is not None]
            if len(reasons) >= LATE_OF[0]:
                return self._down(reasons[-1])
        if self._well < self._wait or self.tokens >= self.most:
            return None
        return self._up(actual_s / max(1, cost_tokens))

    def _why_late(self, predicted_s: float, actual_s: float) -> Reason | None:
        if self._limit_s is not None and actual_s > self._limit_s:
            return "goal"
        return "late" if actual_s > LATE * predicted_s else None

    def _down(self, reason: Reason) -> Reason | None:
        self._late.clear()
        self._well = 0
        least = max(1, self.most // LEAST_SHARE)
        smaller = max(3 * self.tokens // 4, min(least, self.tokens))
        if smaller == self.tokens:
            return None
        self.tokens = smaller
        return reason

    def _up(self, token_s: float) -> Reason | None:
        self._well = 0
        larger = min(self.most, self.tokens + max(1, self.tokens // 8))
        if self._limit_s is not None and token_s * larger > self._limit_s:
            return None
        self.tokens = larger
        self._wait = max(QUIET, self._wait // 2)
        return "recovered"

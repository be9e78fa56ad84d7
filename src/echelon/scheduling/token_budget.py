"""The token budget while steps run: it falls at once when steps do not fit or are late. Pure.

Memory halves it (:mod:`echelon.scheduling.oom_policy` says how far), lateness takes a quarter. It
rises by an eighth after many good steps. Each time memory runs out again the wait doubles, so that
a device that has really become smaller is rarely tried.
"""

from __future__ import annotations

from collections import deque
from typing import Literal

LATE = 2.0
"""A step is late if it takes more than this many times its predicted time. On a machine of half
the speed predictions follow within eight steps, and smaller steps would not help."""

GOAL_SHARE = 0.5
"""A step is also late if it takes more than this share of the latency goal: a request that just
missed a step waits for it and is in the next one."""

LATE_OF = (3, 8)
"""Late steps among the last full ones that lower the budget; one late step is an accident."""

MIN_SHARE = 8
"""Lateness leaves at least one eighth of the tokens: smaller steps gain nothing more."""

QUIET = 64
"""Good steps before the budget rises by an eighth; from half to the maximum takes six rises."""

MEMORY_QUIET = 512
"""Good steps before the first rise after memory ran out; doubles each time, up to 64-fold."""

MAX_DOUBLINGS = 6

Reason = Literal["memory", "late", "goal", "recovered"]


class TokenBudget:
    """``tokens`` that a step may cost now, at most ``max_tokens``; ``goal_s`` is a latency goal."""

    def __init__(self, max_tokens: int, goal_s: float | None = None) -> None:
        self.max_tokens = self.tokens = max_tokens
        self._limit_s = None if goal_s is None else GOAL_SHARE * goal_s
        self._late: deque[Reason | None] = deque(maxlen=LATE_OF[1])
        self._good_steps = self._memory_failures = 0
        self._wait = QUIET

    def warmed_up(self, cost_tokens: int, actual_s: float) -> None:
        """Begin with steps as long as half of the goal, judged by the last warm-up step."""
        if self._limit_s is not None and self._memory_failures == 0:
            fitting = int(self._limit_s * cost_tokens / max(actual_s, 1e-9))
            lowest = max(1, self.max_tokens // MIN_SHARE)
            self.tokens = min(self.max_tokens, max(lowest, fitting))

    def out_of_memory(self, tokens: int) -> bool:
        """Lower the budget to what memory allows; returns whether that is less than before."""
        self._wait = MEMORY_QUIET << min(self._memory_failures, MAX_DOUBLINGS)
        self._memory_failures += 1
        self._good_steps = 0
        if tokens >= self.tokens:
            return False
        self.tokens = tokens
        return True

    def ended(self, cost_tokens: int, predicted_s: float, actual_s: float) -> Reason | None:
        """Take note of a step that fitted; returns why the budget has changed, if it has."""
        self._good_steps += 1
        if 2 * cost_tokens > self.tokens:  # a smaller budget would have made it smaller
            why = self._why_late(predicted_s, actual_s)
            self._late.append(why)
            if why is not None:
                self._good_steps = 0
            reasons = [reason for reason in self._late if reason is not None]
            if len(reasons) >= LATE_OF[0]:
                return self._down(reasons[-1])
        if self._good_steps < self._wait or self.tokens >= self.max_tokens:
            return None
        return self._up(actual_s / max(1, cost_tokens))

    def _why_late(self, predicted_s: float, actual_s: float) -> Reason | None:
        if self._limit_s is not None and actual_s > self._limit_s:
            return "goal"
        return "late" if actual_s > LATE * predicted_s else None

    def _down(self, reason: Reason) -> Reason | None:
        self._late.clear()
        self._good_steps = 0
        lowest = max(1, self.max_tokens // MIN_SHARE)
        smaller = max(3 * self.tokens // 4, min(lowest, self.tokens))
        if smaller == self.tokens:
            return None
        self.tokens = smaller
        return reason

    def _up(self, token_s: float) -> Reason | None:
        self._good_steps = 0
        larger = min(self.max_tokens, self.tokens + max(1, self.tokens // 8))
        if self._limit_s is not None and token_s * larger > self._limit_s:
            return None
        self.tokens = larger
        self._wait = max(QUIET, self._wait // 2)
        return "recovered"

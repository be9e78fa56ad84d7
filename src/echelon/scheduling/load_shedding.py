"""Load shedding: while the queue is long, pairs of low priority are read shorter. Pure.

Only where the user configured a shorter ``max_length``, and only for requests that came with low
priority. Two thresholds and a quiet time keep it from going on and off with each burst.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from echelon.types import Priority

ON_SHARE, OFF_SHARE = 0.5, 0.25
"""Shares of the goal: above the first it begins, below the second it may end. It has to begin by
half of the goal, since requests that are already queued stay as they are."""

QUIET_S = 10.0
"""Seconds below the lower threshold before it ends: bursts come again, and two callers within a
second should not be read differently."""


class LoadShedding:
    """Decides whether pairs of low priority are read shorter.

    Args:
        max_length: tokens that such a pair may then have; None never sheds load.
        goal_s: seconds that the queue should not exceed.

    Attributes:
        max_length: as given.
        goal_s: as given.
        on: whether load is shed now.
    """

    def __init__(self, max_length: int | None, goal_s: float) -> None:
        self.max_length = max_length
        self.goal_s = goal_s
        self.on = False
        self._last_busy = 0.0

    def update(self, backlog_s: float, now: float) -> Literal["on", "off"] | None:
        """Decide anew, and return what changed, if anything did.

        Args:
            backlog_s: predicted seconds until all requests are scored.
            now: seconds; never goes back.
        """
        if self.max_length is None:
            return None
        if backlog_s >= OFF_SHARE * self.goal_s:
            self._last_busy = now
        if not self.on and backlog_s > ON_SHARE * self.goal_s:
            self.on = True
            return "on"
        if self.on and now - self._last_busy >= QUIET_S:
            self.on = False
            return "off"
        return None

    def fallback(self, priority: Priority, max_length: int) -> int | None:
        """Tokens to which the pairs of a request are cut; None leaves them as they are.

        Args:
            priority: the request's.
            max_length: tokens that its pairs may have anyway.
        """
        if not self.on or priority != "low" or self.max_length is None:
            return None
        return self.max_length if self.max_length < max_length else None

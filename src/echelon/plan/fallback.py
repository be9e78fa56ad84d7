"""Falling back: while the queue is long, pairs of low priority may be read shorter. Pure.

Only where the user configured a shorter ``max_length``, and only for requests that came with low
priority. Two thresholds and a time of quiet keep it from going on and off with each burst.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from echelon.plan.fair import Priority

ON_SHARE, OFF_SHARE = 0.5, 0.25
"""Shares of the goal at which it begins, and below which it may end. At half of the goal there is
as much again before anybody is late; it has to act by then, because what is already in the queue
stays as it is."""

QUIET_S = 10.0
"""Seconds without pressure before it ends: bursts come again, and two callers within a second
should not be read differently."""

News = Literal["on", "off"]


class Fallback:
    """Decides whether pairs of low priority are read shorter.

    Args:
        max_length: tokens that such a pair may then have; None never falls back.
        goal_s: seconds that the queue should not exceed.

    Attributes:
        max_length: as given.
        goal_s: as given.
        on: whether it falls back now.
    """

    def __init__(self, max_length: int | None, goal_s: float) -> None:
        self.max_length = max_length
        self.goal_s = goal_s
        self.on = False
        self._pressed = 0.0

    def see(self, backlog_s: float, now: float) -> News | None:
        """Look at the queue.

        Args:
            backlog_s: predicted seconds until all that is inside is scored.
            now: time of the look; it never goes back.

        Returns:
            The news, if that is some.
        """
        if self.max_length is None:
            return None
        if backlog_s >= OFF_SHARE * self.goal_s:
            self._pressed = now
        if not self.on and backlog_s > ON_SHARE * self.goal_s:
            self.on = True
            return "on"
        if self.on and now - self._pressed >= QUIET_S:
            self.on = False
            return "off"
        return None

    def shorter(self, priority: Priority, max_length: int) -> int | None:
        """Tokens that the pairs of a request are cut to; None leaves them as they are.

        Args:
            priority: the request's.
            max_length: tokens that they may have anyway.
        """
        if not self.on or priority != "low" or self.max_length is None:
            return None
        return self.max_length if self.max_length < max_length else None

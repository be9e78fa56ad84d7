"""Falling back: while the queue is long, pairs of low priority may be read shorter. Pure.

Only where the user configured a shorter ``max_length``, and only for requests that came with low
priority. Two thresholds and a time of quiet keep it from going on and off with each burst.

Whether the queue is so long that low priority is read shorter, and the log's word on it.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from collections.abc import Callable

    from echelon.engine.state import ServiceSettings
    from echelon.scheduling.admission import SystemLoad
    from echelon.scheduling.fair_queue import Priority
    from echelon.types import Clock

ON_SHARE, OFF_SHARE = 0.5, 0.25
"""Shares of the goal at which it begins, and below which it may end. At half of the goal there is
as much again before anybody is late; it has to act by then, because what is already in the queue
stays as it is."""

QUIET_S = 10.0
"""Seconds without pressure before it ends: bursts come again, and two callers within a second
should not be read differently."""

News = Literal["on", "off"]


class LoadSheddingPolicy:
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


logger = logging.getLogger(__name__)

NEWS = {
    "on": (
        logging.WARNING,
        (
            "%.2f s of work are inside, and the goal is %g s: requests of low priority are read "
            "with max_length=%d until the queue is short again."
        ),
    ),
    "off": (
        logging.INFO,
        (
            "%.2f s of work are inside, and the goal is %g s: requests of low priority are read in "
            "full again, no longer with max_length=%d."
        ),
    ),
}
"""What the log says when falling back begins and ends, see
:mod:`echelon.scheduling.load_shedding`."""


class LoadShedding:
    """Looks at the queue with each request and each snapshot; on the event loop only.

    Args:
        settings: what the user configured; the goal is the latency goal, else the longest wait.
        inside: tells what is inside.
        clock: seconds.
    """

    def __init__(
        self, settings: ServiceSettings, inside: Callable[[], SystemLoad], clock: Clock
    ) -> None:
        goal_s = settings.goal_s or settings.bounds.max_wait_s
        self._fallback = LoadSheddingPolicy(settings.fallback_max_length, goal_s)
        self._inside = inside
        self._clock = clock

    @property
    def on(self) -> bool:
        """Whether low priority was read shorter at the last look."""
        return self._fallback.on

    def look(self) -> SystemLoad:
        """What is inside now."""
        house, fallback = self._inside(), self._fallback
        news = fallback.see(house.backlog_s, self._clock())
        if news is not None:
            level, words = NEWS[news]
            logger.log(level, words, house.backlog_s, fallback.goal_s, fallback.max_length)
        return house

    def shorter(self, priority: Priority, max_length: int) -> int | None:
        """Tokens that the pairs of a request that comes now are cut to; None leaves them."""
        self.look()
        return self._fallback.shorter(priority, max_length)

"""Whether the queue is so long that low priority is read shorter, and the log's word on it."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from echelon.plan.fallback import Fallback

if TYPE_CHECKING:
    from collections.abc import Callable

    from echelon.plan.admit import House
    from echelon.plan.fair import Priority
    from echelon.serve.state import Settings
    from echelon.types import Clock

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
"""What the log says when falling back begins and ends, see :mod:`echelon.plan.fallback`."""


class Pressure:
    """Looks at the queue with each request and each snapshot; on the event loop only.

    Args:
        settings: what the user configured; the goal is the latency goal, else the longest wait.
        inside: tells what is inside.
        clock: seconds.
    """

    def __init__(self, settings: Settings, inside: Callable[[], House], clock: Clock) -> None:
        goal_s = settings.goal_s or settings.bounds.max_wait_s
        self._fallback = Fallback(settings.fallback_max_length, goal_s)
        self._inside = inside
        self._clock = clock

    @property
    def on(self) -> bool:
        """Whether low priority was read shorter at the last look."""
        return self._fallback.on

    def look(self) -> House:
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

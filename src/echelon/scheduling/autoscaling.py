"""Autoscaling: how many workers there should be, one observation after another. Pure."""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass

from echelon.errors import InvalidInput, check_positive

MAX_UTILIZATION = 0.7
"""Maximum utilization of the workers left after scaling down: above it, waiting grows quickly."""


@dataclass(frozen=True, slots=True)
class AutoscalingLimits:
    """How many workers there may be, and when their number changes."""

    min_workers: int = 1
    max_workers: int = 1
    delay_s: float = 2.0  # predicted seconds of waiting above which workers are added
    # seconds that the delay must have been too long: a new worker has to load the model, so a burst
    # that is worked off sooner needs none
    up_s: float = 3.0
    down_s: float = 120.0  # seconds for which one worker fewer must have been enough

    def __post_init__(self) -> None:
        check_positive(workers=self.min_workers)
        if self.max_workers < self.min_workers:
            problem = f"{self.max_workers} is less than workers={self.min_workers}"
            raise InvalidInput("max_workers", problem, "Give as many or more.")
        check_positive("Give seconds.", delay_s=self.delay_s, up_s=self.up_s, down_s=self.down_s)


class Autoscaler:
    """Decides the number of workers, one observation after another.

    Workers are added once the delay has been too long for ``up_s``, as many as work the queue off
    in time. One is removed once one fewer would have been enough for ``down_s``; how busy workers
    were counts as well: at a steady load the queue may be empty only because there are enough.
    """

    def __init__(self, limits: AutoscalingLimits) -> None:
        self._limits = limits
        self._late_since: float | None = None
        self._observations: deque[tuple[float, float, float]] = deque()

    def decide(self, now: float, workers: int, work_s: float, busy_s: float) -> int:
        """The number of workers that there should be.

        Args:
            now: seconds; never goes back.
            workers: workers that there are, those that start included.
            work_s: predicted seconds of one worker until all requests are scored.
            busy_s: seconds that workers have scored since the beginning, summed.
        """
        if workers < self._limits.min_workers:
            return self._limits.min_workers
        self._observations.append((now, work_s, busy_s))
        needed = math.ceil(work_s / self._limits.delay_s)
        if needed <= workers:
            self._late_since = None
        elif self._late_since is None:
            self._late_since = now
        if self._late_since is not None and now - self._late_since >= self._limits.up_s:
            self._observations.clear()
            return min(needed, self._limits.max_workers)
        if self._one_too_many(now, workers):
            self._observations.clear()
            return workers - 1
        return workers

    def _one_too_many(self, now: float, workers: int) -> bool:
        """Whether one worker fewer would have been enough for all of ``down_s``."""
        begin = now - self._limits.down_s
        while len(self._observations) > 1 and self._observations[1][0] <= begin:
            self._observations.popleft()
        since, _, busy_then = self._observations[0]
        if workers <= self._limits.min_workers or since > begin:
            return False
        busy = (self._observations[-1][2] - busy_then) / (now - since)
        waiting = max(work_s for _, work_s, _ in self._observations) / self._limits.delay_s
        return busy <= MAX_UTILIZATION * (workers - 1) and waiting <= workers - 1

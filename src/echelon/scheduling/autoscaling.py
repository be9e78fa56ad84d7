"""How many workers there should be, from the predicted delay of what waits. Pure.

Up as soon as the delay has been too long for a moment, straight to the number that work it off in
time; down by one, and only after a while in which one fewer would have done. What workers did is
looked at beside what waits: at a steady load nothing may wait because there are enough of them.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass

from echelon.errors import InvalidInput

BUSY = 0.7
"""Share of their time that the workers that remain may be busy: at more, waiting grows quickly."""


@dataclass(frozen=True, slots=True)
class AutoscalingLimits:
    """Between which bounds, and when.

    Attributes:
        least: workers that there always are.
        most: workers that there may be.
        delay_s: predicted seconds of waiting beyond which workers are added.
        up_s: the delay must have been too long for this time: a burst that is worked off by then
            needs nobody, since a new worker has to load the model first.
        down_s: one fewer must have been enough for this time.
    """

    least: int = 1
    most: int = 1
    delay_s: float = 2.0
    up_s: float = 3.0
    down_s: float = 120.0

    def __post_init__(self) -> None:
        if self.least < 1:
            raise InvalidInput("workers", f"{self.least} is not positive", "Give 1 or more.")
        if self.most < self.least:
            raise InvalidInput(
                "max_workers",
                f"{self.most} is less than workers={self.least}",
                "Give as many or more.",
            )
        for name in ("delay_s", "up_s", "down_s"):
            if not getattr(self, name) > 0:
                raise InvalidInput(name, f"{getattr(self, name)} is not positive", "Give seconds.")


class Autoscaler:
    """Decides, one look after another.

    Args:
        scaling: the bounds.
    """

    def __init__(self, scaling: AutoscalingLimits) -> None:
        self._scaling = scaling
        self._late_since: float | None = None
        self._looks: deque[tuple[float, float, float]] = deque()

    def wanted(self, now: float, workers: int, work_s: float, busy_s: float) -> int:
        """Workers that there should be.

        Args:
            now: the time; it never goes back.
            workers: workers that there are, those that start among them.
            work_s: predicted seconds of one worker until all that is inside is scored.
            busy_s: seconds that workers have scored since the beginning, in all.
        """
        if workers < self._scaling.least:
            return self._scaling.least
        self._looks.append((now, work_s, busy_s))
        needed = math.ceil(work_s / self._scaling.delay_s)
        late = needed > workers
        if not late:
            self._late_since = None
        elif self._late_since is None:
            self._late_since = now
        if self._late_since is not None and now - self._late_since >= self._scaling.up_s:
            self._looks.clear()
            return min(needed, self._scaling.most)
        if self._one_too_many(now, workers):
            self._looks.clear()
            return workers - 1
        return workers

    def _one_too_many(self, now: float, workers: int) -> bool:
        """Whether one fewer would have been enough for the whole of ``down_s``."""
        begin = now - self._scaling.down_s
        while len(self._looks) > 1 and self._looks[1][0] <= begin:
            self._looks.popleft()
        since, _, busy_then = self._looks[0]
        if workers <= self._scaling.least or since > begin:
            return False
        busy = (self._looks[-1][2] - busy_then) / (now - since)
        waiting = max(work_s for _, work_s, _ in self._looks) / self._scaling.delay_s
        return busy <= BUSY * (workers - 1) and waiting <= workers - 1

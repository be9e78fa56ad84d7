"""How much load a service bears, on a ladder of loads. Pure.

A load is a share of what the service does at most. The ladder is climbed from below until the goal
is missed for the first time; whoever asks for a load is answered with the rung at or above it, and
only if that rung and all below it meet the goal. So more load never turns a no into a yes, chance
or not, and every yes has a simulation that met the goal at a load at least as high.
"""

from __future__ import annotations

from bisect import bisect_left
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from echelon.simulate.outcome import Outcome

RUNGS = (0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.65, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95)
"""Loads that are simulated: closer together where latency rises steeply. Above the last, a service
that meets its goal today misses it on the next busy day."""

MISSES = 0.01
"""Share of requests that may miss the goal, refused ones included: the goal is on P99."""


class Ladder:
    """A service under rising load.

    Args:
        run: simulates a load.
        rungs: loads, rising.
    """

    def __init__(self, run: Callable[[float], Outcome], rungs: Sequence[float] = RUNGS) -> None:
        self._run = run
        self._rungs = rungs
        self._outcomes: list[Outcome] = []

    def at(self, load: float) -> Outcome | None:
        """The outcome at the rung for a load; None where the goal is missed there or below."""
        rung = bisect_left(self._rungs, load)
        if rung >= len(self._rungs) or not self._climb(rung):
            return None
        return self._outcomes[rung]

    @property
    def most(self) -> float:
        """The highest load that meets the goal; 0 where none does."""
        self._climb(len(self._rungs) - 1)
        met = [
            load for load, found in zip(self._rungs, self._outcomes, strict=False) if meets(found)
        ]
        return met[-1] if met else 0.0

    @property
    def calm(self) -> Outcome:
        """The outcome at the lowest rung, whether it meets the goal or not."""
        self._climb(0)
        return self._outcomes[0]

    def _climb(self, rung: int) -> bool:
        """Simulate up to a rung, or the first that misses; whether the rung meets the goal."""
        while len(self._outcomes) <= rung:
            if self._outcomes and not meets(self._outcomes[-1]):
                return False
            self._outcomes.append(self._run(self._rungs[len(self._outcomes)]))
        return meets(self._outcomes[rung])


def meets(outcome: Outcome) -> bool:
    """Whether an outcome meets the goal it was simulated for."""
    return outcome.requests > 0 and outcome.missed <= MISSES

"""The search for the highest rate that holds. Pure.

:class:`RateSearch` names a rate, learns whether it held, and names the next. It knows neither
servers nor simulations: load tests, simulations and a count of documents use it.
"""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from dataclasses import dataclass
from typing import TYPE_CHECKING

from echelon.errors import InvalidInput

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from echelon.simulation.service_level import SimulationResult

PRECISION = 0.05
"""Load tests of a minute do not tell rates apart that are closer, as a share."""


@dataclass(slots=True)
class RateSearch:
    """A search for the highest rate that holds, requests a second.

    The rate is doubled until it does not hold; then the two ends close in at their geometric
    middle. With ``steps`` only those are tried, from below, up to the first that does not hold.

    Attributes:
        rate: the rate to try next.
        precision: distance of the two ends at which the search is over, as a share.
        whole: try whole numbers only.
        steps: rising rates; empty to choose freely.
        held: the highest rate that held; 0 where none did.
        broke: the lowest rate that did not.
    """

    rate: float
    max_rate: float = math.inf
    min_rate: float = 0.05
    precision: float = PRECISION
    whole: bool = False
    steps: Sequence[float] = ()
    held: float = 0.0
    broke: float = math.inf

    def __post_init__(self) -> None:
        if not 0 < self.min_rate <= self.rate <= self.max_rate:
            problem = f"{self.rate:g} is not within {self.min_rate:.3g} to {self.max_rate:g}"
            raise InvalidInput("--rate", problem, "Choose another, or a longer time.")
        if not 0 < self.precision < 1:
            raise InvalidInput("precision", f"{self.precision} is not within 0 and 1", "Use 0.05.")

    @classmethod
    def of_steps(cls, steps: Sequence[float]) -> RateSearch:
        """A search among rising rates, from below."""
        return cls(steps[0], steps[-1], steps[0], steps=steps)

    @property
    def over(self) -> bool:
        """Whether nothing is left to try."""
        if self.held == 0.0:
            return self.broke <= self.min_rate
        if self.held >= self.max_rate:
            return True
        if self.steps:
            return math.isfinite(self.broke)
        apart = max(self.held * (1 + self.precision), self.held + 1 if self.whole else 0)
        return self.broke <= apart

    def tell(self, *, held: bool) -> None:
        """Say whether :attr:`rate` held; it changes, unless the search is over."""
        if held:
            self.held = self.rate
        else:
            self.broke = self.rate
        if not self.over:
            self.rate = math.ceil(self._next()) if self.whole else self._next()

    def _next(self) -> float:
        if self.steps:
            return self.steps[bisect_right(self.steps, self.held)]
        if self.held == 0.0:
            return max(self.min_rate, self.broke / 2)
        if math.isinf(self.broke):
            return min(self.max_rate, self.held * 2)
        # The geometric middle: what counts is the distance as a share.
        return math.sqrt(self.held * self.broke)


def highest(holds: Callable[[float], bool], search: RateSearch) -> float:
    """Run a search to its end: the highest rate that held, 0 where none did."""
    while not search.over:
        search.tell(held=holds(search.rate))
    return search.held


LOADS = (0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.65, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95)
"""Loads that are simulated, as shares of the highest throughput: closer together where latency
rises steeply. Above the last, a service that holds its goal today misses it on the next busy day.
"""


@dataclass(eq=False)
class RisingLoad:
    """Simulations of a service under rising load, as shares of its highest throughput.

    The answer for a load is that of the next simulated load at or above it, and only if the goal
    held there and at all loads below. So a higher load never turns a no into a yes by chance.
    """

    run: Callable[[float], SimulationResult]
    loads: Sequence[float] = LOADS

    def __post_init__(self) -> None:
        self._search = RateSearch.of_steps(self.loads)
        self._results: dict[float, SimulationResult] = {}

    def at(self, load: float) -> SimulationResult | None:
        """The result at the next simulated load; None where the goal is missed there or below."""
        place = bisect_left(self.loads, load)
        if place == len(self.loads):
            return None
        step = self.loads[place]
        self._climb(step)
        return self._results[step] if self._search.held >= step else None

    @property
    def max_load(self) -> float:
        """The highest load at which the goal holds; 0 where it holds at none."""
        self._climb(self.loads[-1])
        return self._search.held

    @property
    def calm(self) -> SimulationResult:
        """The result at the lowest load, whether or not the goal holds there."""
        self._climb(self.loads[0])
        return self._results[self.loads[0]]

    def _climb(self, load: float) -> None:
        """Simulate up to a load, or to the first that misses the goal."""
        while not self._search.over and self._search.held < load:
            result = self._results[self._search.rate] = self.run(self._search.rate)
            self._search.tell(held=result.held)

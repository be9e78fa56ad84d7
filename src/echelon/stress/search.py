"""The highest rate that holds: doubled until one does not, then halved in on. Pure.

It must not know servers or time: it names a rate, is told whether it held, and names the next.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from echelon.errors import InvalidInput

PRECISION = 0.05
"""The last step, as a share of the rate: load tests of a minute do not tell rates apart that are
closer."""


@dataclass(slots=True)
class Search:
    """What is known of the highest rate.

    Attributes:
        rate: the rate to try next, a second.
        most: never try more.
        least: nor less; a probe of a few requests says nothing.
        precision: how close the two ends have to be, as a share.
        held: the highest rate that held; 0 where none did.
        broke: the lowest that did not.
    """

    rate: float
    most: float = math.inf
    least: float = 0.05
    precision: float = PRECISION
    held: float = 0.0
    broke: float = math.inf

    def __post_init__(self) -> None:
        if not 0 < self.least <= self.rate <= self.most:
            limit = f"{self.least:.3g} to {self.most:g}"
            raise InvalidInput(
                "--rate",
                f"{self.rate:g} is not within {limit}",
                "Choose another, or a longer time.",
            )
        if not 0 < self.precision < 1:
            raise InvalidInput("precision", f"{self.precision} is not within 0 and 1", "Use 0.05.")

    @property
    def over(self) -> bool:
        """Whether nothing is left to try."""
        if self.held == 0.0:
            return self.broke <= self.least
        return self.held >= self.most or self.broke <= self.held * (1 + self.precision)

    def tell(self, *, held: bool) -> None:
        """Say whether :attr:`rate` held; it is another afterwards, unless the search is over."""
        if held:
            self.held = self.rate
        else:
            self.broke = self.rate
        if not self.over:
            self.rate = self._next()

    def _next(self) -> float:
        if self.held == 0.0:
            return max(self.least, self.broke / 2)
        if math.isinf(self.broke):
            return min(self.most, self.held * 2)
        # The geometric middle: what counts is the distance as a share.
        return math.sqrt(self.held * self.broke)

"""A service level: how fast requests must be answered, and how many may fail. Pure.

The one rule for "the goal held", for simulations (`echelon plan`, `echelon tune --scenario`) and
for measurements (`echelon stress`, the validation of a scenario). docs/decisions/0013.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from echelon.errors import InvalidInput

if TYPE_CHECKING:
    import numpy.typing as npt

PERCENTILE = 99.0

MAX_FAILURES = 0.001


@dataclass(frozen=True, slots=True)
class ServiceLevel:
    """What callers were promised.

    Attributes:
        latency_s: seconds within which a request must be answered; infinite where only failures
            count.
        percentile: per cent of all requests that must be answered within ``latency_s``.
        max_failures: share of all requests that may be refused, time out, fail, or be answered
            wrongly. They also count as not answered in time.
    """

    latency_s: float = math.inf
    percentile: float = PERCENTILE
    max_failures: float = MAX_FAILURES

    def __post_init__(self) -> None:
        if not self.latency_s > 0:
            problem = f"{1000 * self.latency_s:g} ms is not above 0"
            raise InvalidInput("latency_s", problem, "Give seconds, such as 0.2.")
        if not 0 < self.percentile <= 100:  # noqa: PLR2004 - per cent
            problem = f"{self.percentile:g} is not within 0 and 100"
            raise InvalidInput("percentile", problem, "Give per cent, such as 99.")
        if not 0 <= self.max_failures <= 1:
            problem = f"{self.max_failures:g} is not within 0 and 1"
            raise InvalidInput("max_failures", problem, "Give a share, such as 0.001.")

    @property
    def max_missed(self) -> float:
        """Share of all requests that may fail or be answered late."""
        return round(1 - self.percentile / 100, 9)  # 1 - 0.99 is above 0.01 in binary

    def within(self, latencies: npt.ArrayLike) -> int:
        """Count the latencies, in seconds, that are within the limit."""
        return int((np.asarray(latencies) <= self.latency_s).sum())

    def held(self, requests: int, answered: int, within: int) -> bool:
        """Whether the goal held; without requests it did not.

        Args:
            requests: requests that were sent.
            answered: of these, how many got an answer that is right.
            within: of these, how many within ``latency_s``.
        """
        failed, late = requests - answered, answered - within
        return requests > 0 and not self.missed(requests, failed, late)

    def missed(self, requests: int, failed: int, late: int) -> bool:
        """Whether these failed and late requests miss the goal, however the others end."""
        # Divided, not multiplied: 0.01 × 2,900 need not be 29 in binary, 29 / 2,900 is 0.01.
        sent = max(1, requests)
        return failed / sent > self.max_failures or (failed + late) / sent > self.max_missed

"""Sizes that a plan makes of others. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from echelon.plan.workload import Between, Fixed, Lognormal

if TYPE_CHECKING:
    from collections.abc import Iterable

    from numpy.random import Generator

    from echelon.plan.workload import Known, Sizes


@dataclass(frozen=True, slots=True)
class Scaled:
    """Other sizes times a factor, at least 1."""

    sizes: Sizes
    factor: float

    def draw(self, random: Generator, count: int) -> list[int]:
        """So many numbers."""
        scaled = np.rint(np.array(self.sizes.draw(random, count)) * self.factor)
        numbers: list[int] = np.maximum(1, scaled).astype(np.int64).tolist()
        return numbers


def longest(sizes: Sizes | None, trace: Iterable[Known] = ()) -> int:
    """The largest number that may come; 0 where it is not known."""
    found = max((one.tokens or 0 for one in trace), default=0)
    if isinstance(sizes, Fixed):
        found = max(found, sizes.value)
    elif isinstance(sizes, Between):
        found = max(found, sizes.high)
    elif isinstance(sizes, Lognormal):
        found = max(found, sizes.most)
    return found

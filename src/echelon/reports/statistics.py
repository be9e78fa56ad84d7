"""Statistics of repeated measurements: medians, percentiles, intervals and ties."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence

TIE = 0.03
"""Medians within 3 % are a tie: repeated sweeps of one machine differ by that much."""

ENOUGH = 0.95
"""Share of the best throughput that a smaller, cheaper setting must reach."""

CONFIDENCE = 0.95


@dataclass(frozen=True, slots=True)
class Statistics:
    """Statistics of repeated timings.

    Attributes:
        samples: their number.
        median: in the samples' unit, like all below.
        low: lower end of the median's 95 % interval; None with fewer than six samples.
        high: upper end.
        p95: 95th percentile (of so few samples, close to the slowest).
        p99: 99th percentile.
    """

    samples: int
    median: float
    low: float | None
    high: float | None
    p95: float
    p99: float

    @property
    def relative_width(self) -> float:
        """Half of the interval over the median; infinite where there is no interval."""
        if self.low is None or self.high is None:
            return math.inf
        return (self.high - self.low) / 2 / self.median if self.median else 0.0


def summarize(samples: Sequence[float]) -> Statistics:
    """Summarize timings; at least one."""
    ordered = np.sort(np.asarray(samples, dtype=np.float64))
    interval = median_interval(len(ordered))
    low, high = (None, None) if interval is None else (float(ordered[i]) for i in interval)
    p50, p95, p99 = (float(p) for p in np.percentile(ordered, [50, 95, 99]))
    return Statistics(len(ordered), p50, low, high, p95, p99)


def median_interval(count: int, confidence: float = CONFIDENCE) -> tuple[int, int] | None:
    """Ranks (from 0) of the sorted samples that enclose the median with this confidence.

    The number of samples below the median is binomial(count, ½), whatever the distribution, so
    order statistics bound the median without assuming a shape (Conover, Practical Nonparametric
    Statistics, §3.2). None where even the extremes do not reach the confidence.
    """
    tail, rank = 0.0, -1
    for k in range(count // 2):
        tail += math.comb(count, k) / 2.0**count
        if 2 * tail > 1 - confidence:
            break
        rank = k
    return None if rank < 0 else (rank, count - 1 - rank)

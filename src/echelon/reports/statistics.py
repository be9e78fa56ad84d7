"""Statistics of repeated measurements: medians, percentiles, intervals, ratios and ties."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence

TIE = 0.03
"""Medians within 3 % are a tie: repeated sweeps of one machine differ by that much."""

ENOUGH = 0.95
"""Share of the best throughput that a smaller, cheaper setting must reach."""

CONFIDENCE = 0.95

ROUNDING = 1e-9
"""Makes values that differ by exactly TIE a tie in both directions."""


@dataclass(frozen=True, slots=True)
class Statistics:
    """Statistics of repeated timings, in the samples' unit.

    ``low`` and ``high`` are the ends of the median's 95 % interval; None with fewer than 6 samples.
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


@dataclass(frozen=True, slots=True)
class KnownValue:
    """A measured number above 0, with the ends of its interval or None."""

    value: float
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True, slots=True)
class Ratio(KnownValue):
    """B divided by A; it has an interval if both numbers have one."""

    @classmethod
    def of(cls, a: KnownValue, b: KnownValue) -> Ratio:
        """Divide b by a.

        The interval takes, on the logarithmic scale, the distances of both numbers to their own
        ends as independent, so their squares add up (Zou and Donner, Construction of confidence
        limits about effect measures, Statistics in Medicine 27, 2008).
        """
        value = b.value / a.value
        if a.low is None or a.high is None or b.low is None or b.high is None:
            return cls(value)
        down = math.hypot(math.log(b.value / b.low), math.log(a.high / a.value))
        up = math.hypot(math.log(b.high / b.value), math.log(a.value / a.low))
        return cls(value, value * math.exp(-down), value * math.exp(up))

    @property
    def inverse(self) -> Ratio:
        """A divided by B; the ratio of rates where this is the ratio of times."""
        if self.low is None or self.high is None:
            return Ratio(1 / self.value)
        return Ratio(1 / self.value, 1 / self.high, 1 / self.low)

    @property
    def judgement(self) -> Literal["tie", "beyond", "within", "unknown"]:
        """``tie`` within TIE, else ``beyond`` or ``within`` the variation; or ``unknown``."""
        if max(self.value, 1 / self.value) <= 1 + TIE + ROUNDING:
            return "tie"
        if self.low is None or self.high is None:
            return "unknown"
        return "within" if self.low <= 1 <= self.high else "beyond"

    def as_dict(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self) | {"judgement": self.judgement}

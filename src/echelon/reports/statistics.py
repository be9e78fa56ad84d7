"""Statistics of repeated measurements: medians, percentiles, intervals, ratios and ties."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy.typing as npt

    Array = npt.NDArray[np.float64]

Verdict = Literal["better", "worse", "tie", "unknown"]

TIE = 0.03
"""Medians within 3 % are a tie: repeated sweeps of one machine differ by that much."""

MIN_RUNS = 3
"""Runs below which nothing is said about certainty: two say nothing of how runs differ."""

ENOUGH = 0.95
"""Share of the best throughput that a smaller, cheaper setting must reach."""

CONFIDENCE, CONFIDENT = 0.95, 1.96  # and standard deviations to either side

PACE = 0.05
"""Standard deviation, on the logarithmic scale, of a machine's pace from one minute to another.
The medians of a run a minute later differ by it, all in the same direction, whatever the spread
within a run (docs/LOG.md, "Pace")."""

ROUNDING = 1e-9
"""Makes values that differ by exactly TIE a tie in both directions."""


@dataclass(frozen=True, slots=True)
class Statistics:
    """Statistics of repeated timings, in the samples' unit.

    ``low`` and ``high`` are the ends of the median's 95 % interval; None below MIN_RUNS samples.
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

    @property
    def known(self) -> KnownValue:
        """The median with its interval."""
        return KnownValue(self.median, self.low, self.high)


def summarize(samples: Sequence[float], outliers: Sequence[float] = ()) -> Statistics:
    """Summarize timings; at least one. Outliers count for the percentiles alone."""
    ordered = np.sort(np.asarray(samples, dtype=np.float64))
    median = float(np.median(ordered))
    low, high = _interval(ordered, median) or (None, None)
    p95, p99 = (float(p) for p in np.percentile([*ordered, *outliers], [95, 99]))
    return Statistics(len(ordered), median, low, high, max(median, p95), max(median, p99))


def _interval(ordered: Array, median: float) -> tuple[float, float] | None:
    """The ends of the median's interval; None with too few samples.

    Too few for order statistics: Student's interval of the mean logarithm, widened to the median.
    """
    count = len(ordered)
    ranks = median_interval(count)
    if ranks is not None:
        return float(ordered[ranks[0]]), float(ordered[ranks[1]])
    if count < MIN_RUNS or ordered[0] <= 0:
        return None
    logs = np.log(ordered)
    half = student(count - 1) * float(logs.std(ddof=1)) / math.sqrt(count)
    middle = float(logs.mean())
    return min(median, math.exp(middle - half)), max(median, math.exp(middle + half))


def student(freedom: int) -> float:
    """Student's t for 95 %, within 1 %, by degrees of freedom (at least 1)."""
    if freedom < len(STUDENT):
        return STUDENT[freedom]
    z = CONFIDENT
    return z + (z**3 + z) / (4 * freedom) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * freedom**2)


STUDENT = (math.inf, 12.706, 4.303, 3.182, 2.776, 2.571, 2.447)
"""Quantiles where the expansion of :func:`student` is too far off."""


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

    @property
    def relative_half(self) -> float | None:
        """The larger half of the interval over the value."""
        if self.low is None or self.high is None:
            return None
        return max(self.high - self.value, self.value - self.low) / self.value

    @property
    def at_any_time(self) -> KnownValue:
        """With an interval for the machine's pace at another time too.

        Points of one run share its pace, so comparisons among them do without it.
        """
        if self.low is None or self.high is None:
            return self
        pace = CONFIDENT * PACE
        down = math.hypot(math.log(self.value / self.low), pace)
        up = math.hypot(math.log(self.high / self.value), pace)
        return KnownValue(self.value, self.value * math.exp(-down), self.value * math.exp(up))


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


def verdict(mine: KnownValue, other: KnownValue) -> Verdict:
    """How a time compares with another: every statement of reports about two times.

    ``better`` or ``worse`` where they differ by more than TIE and the interval of their ratio
    excludes 1; ``tie`` where the whole interval is within TIE; else ``unknown``, also for a time
    without an interval, of fewer than MIN_RUNS runs.
    """
    ratio = Ratio.of(other, mine)
    if ratio.low is None or ratio.high is None:
        return "unknown"
    if max(ratio.high, 1 / ratio.low) <= 1 + TIE + ROUNDING:
        return "tie"
    if ratio.judgement != "beyond":
        return "unknown"
    return "better" if ratio.value < 1 else "worse"

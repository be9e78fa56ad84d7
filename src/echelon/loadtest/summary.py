"""The numbers of a run. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from hdrh.histogram import HdrHistogram

from echelon.loadtest.driver import GeneratorHealth, doubts
from echelon.loadtest.records import ANSWERED, KINDS
from echelon.messages import Message

if TYPE_CHECKING:
    from echelon.loadtest.driver import DriveResult
    from echelon.loadtest.records import Column, Kind
    from echelon.simulation.service_level import ServiceLevel

PERCENTILES = (50.0, 75.0, 90.0, 95.0, 99.0, 99.9, 99.99, 100.0)

DIGITS = 3
"""Significant digits of the histogram."""

LONGEST_US = 3_600_000_000
"""The largest latency of the histogram, an hour."""

FEW = 100
"""Answers below which P99 is the slowest answer and no more."""


@dataclass(frozen=True, slots=True)
class LoadSummary:
    """A run without its warm-up.

    Attributes:
        window_s: seconds in which requests were due.
        requests: requests due in it that ended.
        kinds: how many of each kind.
        offered_per_s: requests due a second.
        answered_per_s: answers that came within the window, a second.
        documents_per_s: their documents.
        latency_s: percentile to seconds, of the answered, from when they were due; empty: none was.
        mean_s: mean of the same.
        send_lag_s: P99 of how late requests were sent.
        goal: the service level that was promised, if any.
        within: requests answered within the goal's latency; without a goal, all that were answered.
        goodput_per_s: requests answered within the goal, a second; None without a goal.
        health: the generator's state.
        problems: for each kind of problem, how often and the first message.
        unfinished: requests that were cancelled because the run was stopped.
        interrupted: whether the run was stopped before its end.
        histogram: HdrHistogram of the latencies in microseconds, V2, base64.
    """

    window_s: float
    requests: int
    kinds: dict[Kind, int]
    offered_per_s: float
    answered_per_s: float
    documents_per_s: float
    latency_s: dict[float, float]
    mean_s: float | None
    send_lag_s: float
    goal: ServiceLevel | None
    within: int
    goodput_per_s: float | None
    health: GeneratorHealth
    problems: dict[str, tuple[int, str]]
    unfinished: int
    interrupted: bool
    histogram: str

    @property
    def failures(self) -> int:
        """Requests without a right answer."""
        return self.requests - self.kinds["answered"]

    @property
    def failure_share(self) -> float:
        """The same as a share; 1 where there was no request."""
        return self.failures / self.requests if self.requests else 1.0

    @property
    def p99_s(self) -> float | None:
        """P99 of the latency; None where nothing was answered."""
        return self.latency_s.get(99.0)

    @property
    def held(self) -> bool:
        """Whether the goal held; without one, whether anything was answered."""
        answered = self.kinds["answered"]
        if self.goal is None:
            return answered > 0
        return self.goal.held(self.requests, answered, self.within)

    @property
    def doubts(self) -> list[str]:
        """Reasons not to trust the numbers."""
        goal_s = 0.0 if self.goal is None else self.goal.latency_s
        return doubts(self.health, self.send_lag_s, max(self.p99_s or 0.0, goal_s))

    @property
    def trusted(self) -> bool:
        """Whether the server was measured and not the generator."""
        return not self.doubts

    @property
    def notes(self) -> list[str]:
        """What else to know."""
        answered = self.kinds["answered"]
        if 0 < answered < FEW:
            return [Message("loadtest.few_answers", {"answered": answered})]
        return []


def summarise(outcome: DriveResult, goal: ServiceLevel | None = None) -> LoadSummary:
    """The numbers of a run."""
    records = outcome.records
    counted = records.scheduled >= outcome.warmup_s
    answered = records.kinds == ANSWERED
    window_s = max(0.0, outcome.ended_s - outcome.warmup_s)
    inside = answered & (records.ended >= outcome.warmup_s) & (records.ended <= outcome.ended_s)
    good = latencies(outcome)
    within = len(good) if goal is None else goal.within(good)
    lag = (records.sent - records.scheduled)[counted]
    kinds = np.bincount(records.kinds[counted], minlength=len(KINDS)).tolist()
    return LoadSummary(
        window_s=window_s,
        requests=int(counted.sum()),
        kinds=dict(zip(KINDS, kinds, strict=True)),
        offered_per_s=_per_s(counted.sum(), window_s),
        answered_per_s=_per_s(inside.sum(), window_s),
        documents_per_s=_per_s(records.documents[inside].sum(), window_s),
        latency_s=percentiles(good),
        mean_s=float(good.mean()) if len(good) else None,
        send_lag_s=float(np.percentile(lag, 99)) if len(lag) else 0.0,
        goal=goal,
        within=within,
        goodput_per_s=None if goal is None else _per_s(within, window_s),
        health=outcome.health,
        problems=outcome.problems,
        unfinished=outcome.unfinished,
        interrupted=outcome.interrupted,
        histogram=histogram_of(good).encode().decode("ascii"),
    )


def latencies(outcome: DriveResult) -> Column:
    """float64 [answered], seconds from when each was due, the warm-up left out."""
    records = outcome.records
    counted = records.scheduled >= outcome.warmup_s
    found: Column = (records.ended - records.scheduled)[counted & (records.kinds == ANSWERED)]
    return found


def _per_s(count: float, window_s: float) -> float:
    """A rate; 0 where the run was stopped before it began to count."""
    return float(count) / window_s if window_s > 0 else 0.0


def histogram_of(latency_s: Column) -> HdrHistogram:
    """A histogram in microseconds of latencies in seconds, to be added to other generators'.

    What is longer than an hour counts as an hour.
    """
    histogram = HdrHistogram(1, LONGEST_US, DIGITS)
    microseconds = np.clip(np.rint(latency_s * 1e6), 1, LONGEST_US).astype(np.int64)
    for value, count in zip(*np.unique(microseconds, return_counts=True), strict=True):
        histogram.record_value(int(value), int(count))
    return histogram


def percentiles(latency_s: Column, wanted: tuple[float, ...] = PERCENTILES) -> dict[float, float]:
    """Percentiles in seconds, each a latency that occurred; empty without any.

    They are of the records, not of the histogram, whose values are rounded.
    """
    if not len(latency_s):
        return {}
    found = np.percentile(latency_s, wanted, method="inverted_cdf").tolist()
    return dict(zip(wanted, found, strict=True))

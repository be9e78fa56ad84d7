"""The records of a run and their numbers. Pure.

Records are columns: a request takes 31 bytes, a million 31 MB.
"""

from __future__ import annotations

from array import array
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, get_args

import numpy as np
from hdrh.histogram import HdrHistogram

from echelon.messages import Message

if TYPE_CHECKING:
    from collections.abc import Iterator

    import numpy.typing as npt

    from echelon.simulation.service_level import ServiceLevel

    Column = npt.NDArray[np.float64]

PERCENTILES = (50.0, 75.0, 90.0, 95.0, 99.0, 99.9, 99.99, 100.0)

DIGITS = 3
"""Significant digits of the histogram."""

LONGEST_US = 3_600_000_000
"""The largest latency of the histogram, an hour."""

FEW = 100
"""Answers below which P99 is the slowest answer and no more."""

LATE_S, LATE_SHARE = 0.01, 0.1
"""Lateness at P99 that spoils a measurement: more than 10 ms, and more than a tenth of the P99
latency or of the goal. Timers of event loops are exact to a millisecond."""

BUSY_SHARE = 0.9
"""Share of one CPU above which a generator of one thread may be saturated."""

Kind = Literal["answered", "refused", "timeout", "error", "wrong"]
"""``refused`` is 429 or 503; ``wrong`` is an answer without a score for every document."""

KINDS: tuple[Kind, ...] = get_args(Kind)
ANSWERED = KINDS.index("answered")

OTHER = "other"
"""Name of the problems that are too many to be counted each by its own."""


class RequestRecord(NamedTuple):
    """One request; times in seconds from the start of the run.

    Attributes:
        scheduled: when it should have been sent.
        ended: when its answer, or its failure, was there.
        status: HTTP status; 0 where there was none.
    """

    scheduled: float
    sent: float
    ended: float
    kind: Kind
    status: int
    documents: int

    @property
    def latency_s(self) -> float:
        """Seconds from when the request was due to its end."""
        return self.ended - self.scheduled


class RequestRecords:
    """Records in the order in which requests ended."""

    def __init__(self) -> None:
        self._columns: tuple[array[Any], ...] = tuple(array(code) for code in "dddbhi")

    def add(self, record: RequestRecord) -> None:
        """Add a record."""
        values = (*record[:3], KINDS.index(record.kind), record.status, record.documents)
        for column, value in zip(self._columns, values, strict=True):
            column.append(value)

    def __len__(self) -> int:
        return len(self._columns[0])

    def __iter__(self) -> Iterator[RequestRecord]:
        for scheduled, sent, ended, kind, *rest in zip(*self._columns, strict=True):
            yield RequestRecord(scheduled, sent, ended, KINDS[kind], *rest)

    @property
    def scheduled(self) -> Column:
        """float64 [requests], seconds."""
        return np.array(self._columns[0])

    @property
    def sent(self) -> Column:
        """float64 [requests], seconds."""
        return np.array(self._columns[1])

    @property
    def ended(self) -> Column:
        """float64 [requests], seconds."""
        return np.array(self._columns[2])

    @property
    def kinds(self) -> npt.NDArray[np.int8]:
        """int8 [requests], places in :data:`KINDS`."""
        return np.array(self._columns[3])

    @property
    def documents(self) -> npt.NDArray[np.int32]:
        """int32 [requests]."""
        return np.array(self._columns[5])


@dataclass(frozen=True, slots=True)
class GeneratorHealth:
    """The generator's own state while it measured.

    Attributes:
        loop_lag_s: P99 of how late the event loop woke.
        cpu_share: CPU seconds a second; 1 is one CPU in full use.
        own_faults: requests that this machine could not send.
    """

    loop_lag_s: float = 0.0
    cpu_share: float = 0.0
    own_faults: int = 0


@dataclass(frozen=True, slots=True)
class DriveResult:
    """The records of a run, the warm-up's included.

    Attributes:
        warmup_s: requests due before this do not count.
        ended_s: until when requests were due.
        problems: for each kind of problem after the warm-up, its count and first message.
        unfinished: requests that were cancelled because the run was stopped.
    """

    records: RequestRecords
    warmup_s: float
    ended_s: float
    health: GeneratorHealth = GeneratorHealth()
    problems: dict[str, tuple[int, str]] = field(default_factory=dict)
    unfinished: int = 0
    interrupted: bool = False


def doubts(health: GeneratorHealth, send_lag_s: float, latency_s: float) -> list[str]:
    """Reasons not to trust a measurement, each with its remedy.

    ``latency_s`` is the P99 of the latency, or the goal where that is longer: lateness is a part of
    the latency, so it never makes a goal hold that would not.
    """
    found: list[str] = []
    bearable_s = max(LATE_S, LATE_SHARE * latency_s)
    if send_lag_s > bearable_s:
        found.append(Message("loadtest.sent_late", {"ms": f"{1000 * send_lag_s:.0f}"}))
    if health.loop_lag_s > bearable_s:
        found.append(Message("loadtest.read_late", {"ms": f"{1000 * health.loop_lag_s:.0f}"}))
    if health.cpu_share > BUSY_SHARE:
        found.append(Message("loadtest.generator_busy", {"share": f"{100 * health.cpu_share:.0f}"}))
    if health.own_faults:
        found.append(Message("loadtest.no_connections", {"faults": health.own_faults}))
    return found


@dataclass(frozen=True, slots=True)
class LoadSummary:
    """A run without its warm-up.

    Attributes:
        window_s: seconds in which requests were due.
        requests: requests due in it that ended.
        offered_per_s: requests due a second.
        answered_per_s: answers that came within the window, a second.
        latency_s: percentile to seconds, of the answered, from when they were due; may be empty.
        send_lag_s: P99 of how late requests were sent.
        within: requests answered within the goal's latency; without a goal, all answered requests.
        problems: for each kind of problem, its count and first message.
        unfinished: requests that were cancelled because the run was stopped.
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
        return self.goal.held(self.requests, answered, self.within) if self.goal else answered > 0

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
        """Warnings that do not question the numbers."""
        answered = self.kinds["answered"]
        few = Message("loadtest.few_answers", {"answered": answered})
        return [few] if 0 < answered < FEW else []


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
    """A histogram in microseconds, which can be added to those of other generators.

    Latencies above an hour count as an hour.
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

"""Statistics of a server's last ten minutes, in slices of two seconds.

Memory is bounded: 300 slices of about 8 KiB. Latencies are counted in bins that grow by 2 %, so a
percentile is within 1 % of a measured latency.
"""

from __future__ import annotations

import math
import threading
import time
from collections import Counter, deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from echelon.engine.events import Listener
from echelon.types import monotonic

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from echelon.engine.events import (
        LadderTaken,
        RequestEnded,
        RequestRefused,
        StepFinished,
        WorkerChanged,
    )
    from echelon.engine.state import ServiceSnapshot
    from echelon.types import Clock, IntArray

SLICES = 300
"""Complete slices that are kept."""

SLICE_S = 2.0
"""The interval at which the dashboard loads data; 300 slices are ten minutes."""

FLOOR_S, GROWTH, BINS = 1e-4, 1.02, 900
"""Latency bins: the first ends at 0.1 ms, the last at an hour and a half."""

POWERS = 17
"""Step sizes are counted by powers of two: 1, 2, 4, … 65,536; larger ones in the last."""

MAX_STEPS = 200
MAX_EVENTS = 50
"""Single steps and events that are kept for the dashboard."""


@dataclass(slots=True)
class TimeSlice:
    """Statistics of one slice of time.

    Attributes:
        number: slices from the start of the server to this one.
        counts: events by (kind, name), such as ``("http", "200")``.
        sums: documents, tokens, and predicted and actual seconds of steps.
        latencies: responses by bin of their seconds; None without responses.
        pairs: steps by power of two of their pairs.
        tokens: steps by power of two of their tokens, padding included.
        state: the last snapshot of the service.
    """

    number: int
    counts: Counter[tuple[str, str]] = field(default_factory=Counter)
    sums: dict[str, float] = field(default_factory=dict)
    latencies: IntArray | None = None
    pairs: list[int] = field(default_factory=lambda: [0] * POWERS)
    tokens: list[int] = field(default_factory=lambda: [0] * POWERS)
    state: ServiceSnapshot | None = None

    def add(self, **amounts: float) -> None:
        """Add to the sums."""
        for name, amount in amounts.items():
            self.sums[name] = self.sums.get(name, 0.0) + amount


@dataclass(frozen=True, slots=True)
class ServerEvent:
    """An event that the dashboard lists.

    Attributes:
        at: unix time.
        kind: ``ladder`` or ``worker``.
        name: the rung, or the worker's state.
    """

    at: float
    kind: str
    name: str
    worker: int
    words: str


@dataclass(frozen=True, slots=True)
class StatsView:
    """The statistics at one moment.

    Attributes:
        since: unix time of the server's start.
        slice_s: seconds of a slice.
        number: the current slice, which is not in ``slices``.
        slices: complete slices with events, oldest first.
        steps: (predicted, actual) seconds of the last steps.
        events: the last events.
        workers: each worker's last change.
    """

    since: float
    slice_s: float
    number: int
    slices: Sequence[TimeSlice]
    steps: Sequence[tuple[float, float]]
    events: Sequence[ServerEvent]
    workers: Sequence[ServerEvent]


class RollingStats(Listener):
    """Collects events of a service and its routes, and drops slices older than :data:`SLICES`."""

    def __init__(
        self,
        slice_s: float = SLICE_S,
        clock: Clock = monotonic,
        unix: Callable[[], float] = time.time,
    ) -> None:
        self.slice_s = slice_s
        self._clock = clock
        self._started = clock()
        self._since = unix()
        self._lock = threading.Lock()
        self._slices: deque[TimeSlice] = deque([TimeSlice(0)], maxlen=SLICES + 1)
        self._steps: deque[tuple[float, float]] = deque(maxlen=MAX_STEPS)
        self._events: deque[ServerEvent] = deque(maxlen=MAX_EVENTS)
        self._workers: dict[int, ServerEvent] = {}

    # Called by the routes.

    def answered(self, status: int, seconds: float, documents: int) -> None:
        """Count a response.

        Args:
            status: HTTP status.
            seconds: from the headers to the response.
            documents: scored documents; 0 for an error.
        """
        with self._lock:
            now = self._now()
            now.counts["http", str(status)] += 1
            if status == 200:  # noqa: PLR2004 - HTTP's own
                now.add(documents=documents)
                if now.latencies is None:
                    now.latencies = np.zeros(BINS, dtype=np.int32)
                now.latencies[bin_of(seconds)] += 1

    def connection_refused(self, reason: str) -> None:
        """Count a connection that was closed before its first request."""
        with self._lock:
            self._now().counts["connection", reason] += 1

    def rate_limited(self) -> None:
        """Count a request over the limit of its key."""
        with self._lock:
            self._now().counts["limited", "requests"] += 1

    def sampled(self, state: ServiceSnapshot) -> None:
        """Keep a snapshot of the service."""
        with self._lock:
            self._now().state = state

    # Called by the service, from any thread.

    def step_finished(self, event: StepFinished) -> None:
        """Count a step."""
        with self._lock:
            now = self._now()
            now.add(tokens=event.tokens, predicted=event.predicted_s, actual=event.actual_s)
            now.pairs[power_of(event.pairs)] += 1
            now.tokens[power_of(event.cost_tokens)] += 1
            self._steps.append((event.predicted_s, event.actual_s))
            if event.again:
                now.counts["step", "again"] += 1

    def request_ended(self, event: RequestEnded) -> None:
        """Count an admitted request that has ended."""
        with self._lock:
            now = self._now()
            now.counts["outcome", event.outcome] += 1
            if event.truncated_documents:
                now.counts["truncated", "documents"] += event.truncated_documents
            if event.fallback is not None:
                now.counts["fallback", "requests"] += 1

    def refused(self, event: RequestRefused) -> None:
        """Count a refused request."""
        with self._lock:
            self._now().counts["refused", event.reason] += 1

    def ladder_taken(self, event: LadderTaken) -> None:
        """List a step of the OOM ladder."""
        words = f"{event.step.detail}. {event.step.remedy}"
        with self._lock:
            self._add_event("ladder", event.step.rung, event.worker, words)

    def worker_changed(self, event: WorkerChanged) -> None:
        """List a worker's change of state."""
        with self._lock:
            found = self._add_event("worker", event.state, event.worker, event.detail)
            self._workers[event.worker] = found

    def view(self) -> StatsView:
        """The statistics now."""
        with self._lock:
            number = self._now().number
            full = [past for past in self._slices if number - SLICES <= past.number < number]
            return StatsView(
                since=self._since,
                slice_s=self.slice_s,
                number=number,
                slices=full,  # no thread writes into these any more
                steps=tuple(self._steps),
                events=tuple(self._events),
                workers=tuple(self._workers[worker] for worker in sorted(self._workers)),
            )

    # The caller holds the lock.

    def _now(self) -> TimeSlice:
        number = int((self._clock() - self._started) / self.slice_s)
        if self._slices[-1].number < number:
            self._slices.append(TimeSlice(number))
        return self._slices[-1]

    def _add_event(self, kind: str, name: str, worker: int, words: str) -> ServerEvent:
        self._now().counts[kind, name] += 1
        at = self._since + self._clock() - self._started
        event = ServerEvent(at, kind, name, worker, words)
        self._events.append(event)
        return event


def bin_of(seconds: float) -> int:
    """The bin of a latency: bin ``i`` ends at ``FLOOR_S * GROWTH ** i``."""
    if seconds <= FLOOR_S:
        return 0
    return min(BINS - 1, math.ceil(math.log(seconds / FLOOR_S, GROWTH)))


def percentiles(bins: IntArray, *ranks: float) -> list[float | None]:
    """Percentiles in seconds, by nearest rank; None without latencies."""
    reached = np.cumsum(bins)
    total = int(reached[-1])
    if not total:
        return [None] * len(ranks)
    places = [max(1, math.ceil(rank / 100 * total)) for rank in ranks]
    return [_middle(int(place)) for place in np.searchsorted(reached, places)]


def sum_of(slices: Iterable[TimeSlice]) -> TimeSlice:
    """Add slices up, without a number and a state."""
    total = TimeSlice(-1)
    bins = total.latencies = np.zeros(BINS, dtype=np.int32)
    for past in slices:
        total.counts.update(past.counts)
        total.add(**past.sums)
        if past.latencies is not None:
            bins += past.latencies
        total.pairs = [a + b for a, b in zip(total.pairs, past.pairs, strict=True)]
        total.tokens = [a + b for a, b in zip(total.tokens, past.tokens, strict=True)]
    return total


def power_of(size: int) -> int:
    """The exponent of the smallest power of two that is not less than a size."""
    return min(POWERS - 1, max(0, size - 1).bit_length())


def _middle(place: int) -> float:
    """The latency that is within 1 % of every latency of a bin."""
    return FLOOR_S if place == 0 else FLOOR_S * GROWTH**place * 2 / (1 + GROWTH)

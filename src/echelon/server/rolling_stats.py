"""The last ten minutes of a server, for its dashboard: what happened, in slices of two seconds.

Memory is bounded: 300 slices of about 8 KiB. Latencies are counted in bins that grow by 2 %, so a
percentile is within 1 % of a latency that was measured.
"""

from __future__ import annotations

import math
import threading
import time
from collections import Counter, deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from echelon.engine.events import NullListener
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
"""Slices that are kept, the one that is being filled not counted."""

SLICE_S = 2.0
"""As often as a page asks; 300 of them are ten minutes."""

FLOOR_S, GROWTH, BINS = 1e-4, 1.02, 900
"""Bins of latencies: the first ends at 0.1 ms, the last at an hour and a half."""

POWERS = 17
"""Sizes of steps are counted by powers of two: 1, 2, 4, … 65,536, and more in the last."""

REMEMBERED_STEPS = 200
REMEMBERED_EVENTS = 50
"""Single steps and single events that are kept: as many as a reader takes in."""


@dataclass(slots=True)
class TimeSlice:
    """What happened in one slice of time.

    Attributes:
        number: its place since the server began.
        counts: how often, by (kind, name), such as ``("http", "200")``.
        sums: documents, tokens, and seconds of steps: predicted and actual.
        latencies: answers by bin of their seconds; None where there was none.
        pairs: steps by power of two of their pairs.
        tokens: steps by power of two of the tokens that they cost.
        state: the service at the last look in it.
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
    """Something that is told one by one.

    Attributes:
        at: unix time.
        kind: ``ladder`` or ``worker``.
        name: the rung, or the worker's state.
        worker: its number.
        words: what is to say of it.
    """

    at: float
    kind: str
    name: str
    worker: int
    words: str


@dataclass(frozen=True, slots=True)
class StatsView:
    """What is remembered, at one moment.

    Attributes:
        since: unix time at which the server began.
        slice_s: seconds of a slice.
        number: the slice that is being filled, which is not among ``slices``.
        slices: the full ones that something happened in, oldest first.
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


class RollingStats(NullListener):
    """Listens to a service and to the routes, and forgets what is older than its window.

    Args:
        slice_s: seconds of a slice; the window holds :data:`SLICES`.
        clock: seconds.
        unix: unix time.
    """

    def __init__(
        self,
        slice_s: float = SLICE_S,
        clock: Clock = monotonic,
        unix: Callable[[], float] = time.time,
    ) -> None:
        self.slice_s = slice_s
        self._clock = clock
        self._born = clock()
        self._since = unix()
        self._lock = threading.Lock()
        self._slices: deque[TimeSlice] = deque([TimeSlice(0)], maxlen=SLICES + 1)
        self._steps: deque[tuple[float, float]] = deque(maxlen=REMEMBERED_STEPS)
        self._events: deque[ServerEvent] = deque(maxlen=REMEMBERED_EVENTS)
        self._workers: dict[int, ServerEvent] = {}

    # What the routes tell.

    def answered(self, status: int, seconds: float, documents: int) -> None:
        """A ranking request was answered over HTTP.

        Args:
            status: HTTP status.
            seconds: from its headers to the answer.
            documents: scored ones; 0 where the answer is an error.
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
        """A connection was closed before it had asked for anything."""
        with self._lock:
            self._now().counts["connection", reason] += 1

    def rate_limited(self) -> None:
        """A request was over the limit of its key."""
        with self._lock:
            self._now().counts["limited", "requests"] += 1

    def looked(self, state: ServiceSnapshot) -> None:
        """The service was looked at."""
        with self._lock:
            self._now().state = state

    # What the service tells; called from any thread.

    def step_finished(self, event: StepFinished) -> None:
        """A step was scored."""
        with self._lock:
            now = self._now()
            now.add(tokens=event.tokens, predicted=event.predicted_s, actual=event.actual_s)
            now.pairs[power_of(event.pairs)] += 1
            now.tokens[power_of(event.cost_tokens)] += 1
            self._steps.append((event.predicted_s, event.actual_s))
            if event.again:
                now.counts["step", "again"] += 1

    def request_ended(self, event: RequestEnded) -> None:
        """A request ended."""
        with self._lock:
            now = self._now()
            now.counts["outcome", event.outcome] += 1
            if event.truncated_documents:
                now.counts["truncated", "documents"] += event.truncated_documents
            if event.fallback is not None:
                now.counts["fallback", "requests"] += 1

    def refused(self, event: RequestRefused) -> None:
        """A request was refused."""
        with self._lock:
            self._now().counts["refused", event.reason] += 1

    def ladder_taken(self, event: LadderTaken) -> None:
        """Memory trouble was dealt with."""
        words = f"{event.step.detail}. {event.step.remedy}"
        with self._lock:
            self._happened("ladder", event.step.rung, event.worker, words)

    def worker_changed(self, event: WorkerChanged) -> None:
        """A worker came up or went down."""
        with self._lock:
            told = self._happened("worker", event.state, event.worker, event.detail)
            self._workers[event.worker] = told

    # For the page.

    def view(self) -> StatsView:
        """What is remembered now."""
        with self._lock:
            number = self._now().number
            full = [past for past in self._slices if number - SLICES <= past.number < number]
            return StatsView(
                since=self._since,
                slice_s=self.slice_s,
                number=number,
                slices=full,  # nobody writes into these any more
                steps=tuple(self._steps),
                events=tuple(self._events),
                workers=tuple(self._workers[worker] for worker in sorted(self._workers)),
            )

    # Under the lock.

    def _now(self) -> TimeSlice:
        number = int((self._clock() - self._born) / self.slice_s)
        if self._slices[-1].number < number:
            self._slices.append(TimeSlice(number))
        return self._slices[-1]

    def _happened(self, kind: str, name: str, worker: int, words: str) -> ServerEvent:
        self._now().counts[kind, name] += 1
        at = self._since + self._clock() - self._born
        told = ServerEvent(at, kind, name, worker, words)
        self._events.append(told)
        return told


def bin_of(seconds: float) -> int:
    """The bin of a latency: bin ``i`` ends at ``FLOOR_S * GROWTH ** i``."""
    if seconds <= FLOOR_S:
        return 0
    return min(BINS - 1, math.ceil(math.log(seconds / FLOOR_S, GROWTH)))


def percentiles(bins: IntArray, *ranks: float) -> list[float | None]:
    """Seconds below which so many of a hundred latencies are (nearest rank); None where none is."""
    reached = np.cumsum(bins)
    total = int(reached[-1])
    if not total:
        return [None] * len(ranks)
    places = [max(1, math.ceil(rank / 100 * total)) for rank in ranks]
    return [_middle(int(place)) for place in np.searchsorted(reached, places)]


def added(slices: Iterable[TimeSlice]) -> TimeSlice:
    """Several slices as one, without a place and a state."""
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
    """The power of two that a size is counted under: the smallest that is not less."""
    return min(POWERS - 1, max(0, size - 1).bit_length())


def _middle(place: int) -> float:
    """The latency that is at most 1 % from every one of a bin."""
    return FLOOR_S if place == 0 else FLOOR_S * GROWTH**place * 2 / (1 + GROWTH)

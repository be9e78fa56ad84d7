"""The dashboard's data: a server's last ten minutes, in slices of two seconds.

Memory is bounded: 300 slices of about 8 KiB. Latencies are counted in bins that grow by 2 %, so a
percentile is within 1 % of a measured latency.
"""

from __future__ import annotations

import math
import threading
import time
from collections import Counter, deque
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from echelon import __version__
from echelon.engine import events
from echelon.types import Clock, ModelInfo, monotonic

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from echelon.types import IntArray

    Row = dict[str, float | None]

SLICES = 300
"""Complete slices that are kept."""

SLICE_S = 2.0
"""The interval at which the dashboard loads data; 300 slices are ten minutes."""

MINUTE_S = 60.0
RANKS = (50, 95, 99)

FLOOR_S, GROWTH, BINS = 1e-4, 1.02, 900
"""Latency bins: the first ends at 0.1 ms, the last at an hour and a half."""

POWERS = 17
"""Step sizes are counted by powers of two: 1, 2, 4, … 65,536; larger ones in the last."""

MAX_STEPS = 200
MAX_EVENTS = 50
"""Single steps and events that are kept for the dashboard."""

STATE: dict[str, Callable[[events.ServiceSnapshot], float]] = {
    "waiting_pairs": lambda state: state.load.pairs,
    "waiting_tokens": lambda state: state.load.tokens,
    "requests_inside": lambda state: state.requests,
    "backlog_s": lambda state: round(state.backlog_s, 4),
    "oldest_s": lambda state: round(state.oldest_s, 4),
    "token_budget": lambda state: state.load.budget,
    "workers_up": lambda state: state.workers_up,
    "slowdown": lambda state: round(state.drift, 4),
}
"""Values of a snapshot of the service."""


@dataclass(slots=True)
class TimeSlice:
    """Statistics of one slice of time.

    Attributes:
        number: slices from the start of the server to this one.
        counts: events by (kind, name), such as ``("http", "200")``.
        sums: documents, tokens, and predicted and actual seconds of steps.
        latencies: responses by bin of their seconds; None without responses.
        pairs: steps by power of two of their pairs; ``tokens`` likewise, padding included.
    """

    number: int
    counts: Counter[tuple[str, str]] = field(default_factory=Counter)
    sums: dict[str, float] = field(default_factory=dict)
    latencies: IntArray | None = None
    pairs: list[int] = field(default_factory=lambda: [0] * POWERS)
    tokens: list[int] = field(default_factory=lambda: [0] * POWERS)
    state: events.ServiceSnapshot | None = None

    def add(self, **amounts: float) -> None:
        """Add to the sums."""
        for name, amount in amounts.items():
            self.sums[name] = self.sums.get(name, 0.0) + amount


@dataclass(frozen=True, slots=True)
class ServerEvent:
    """A rung of the OOM ladder or a worker's change of state, at a unix time."""

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
        number: the current slice, which is not in ``slices``.
        slices: complete slices with events, oldest first.
        steps: (predicted, actual) seconds of the last steps.
        workers: each worker's last change.
    """

    since: float
    slice_s: float
    number: int
    slices: Sequence[TimeSlice]
    steps: Sequence[tuple[float, float]]
    events: Sequence[ServerEvent]
    workers: Sequence[ServerEvent]


class RollingStats(events.Listener):
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
        """Count a response, its seconds since the headers, and its scored documents."""
        with self._lock:
            now = self._now()
            now.counts["http", str(status)] += 1
            if status == 200:  # noqa: PLR2004 - HTTP's own
                now.add(documents=documents)
                if now.latencies is None:
                    now.latencies = np.zeros(BINS, dtype=np.int32)
                now.latencies[bin_of(seconds)] += 1

    def count(self, kind: str, name: str) -> None:
        """Count an event of a kind."""
        with self._lock:
            self._now().counts[kind, name] += 1

    def sampled(self, state: events.ServiceSnapshot) -> None:
        """Keep a snapshot of the service."""
        with self._lock:
            self._now().state = state

    # Called by the service, from any thread.

    def step_finished(self, event: events.StepFinished) -> None:
        """Count a step."""
        with self._lock:
            now = self._now()
            now.add(tokens=event.tokens, predicted=event.predicted_s, actual=event.actual_s)
            now.pairs[power_of(event.pairs)] += 1
            now.tokens[power_of(event.cost_tokens)] += 1
            self._steps.append((event.predicted_s, event.actual_s))
            if event.again:
                now.counts["step", "again"] += 1

    def request_ended(self, event: events.RequestEnded) -> None:
        """Count an admitted request that has ended."""
        with self._lock:
            now = self._now()
            now.counts["outcome", event.outcome] += 1
            if event.truncated_documents:
                now.counts["truncated", "documents"] += event.truncated_documents
            if event.fallback is not None:
                now.counts["fallback", "requests"] += 1

    def refused(self, event: events.RequestRefused) -> None:
        """Count a refused request."""
        self.count("refused", event.reason)

    def scores_sought(self, event: events.ScoresSought) -> None:
        """Count the documents that were looked up in the score cache."""
        with self._lock:
            counts = self._now().counts
            for name in ("hits", "misses"):
                if found := getattr(event, name):
                    counts["cache", name] += found

    def ladder_taken(self, event: events.LadderTaken) -> None:
        """List a step of the OOM ladder."""
        words = f"{event.step.detail}. {event.step.remedy}"
        with self._lock:
            self._add_event("ladder", event.step.rung, event.worker, words)

    def worker_changed(self, event: events.WorkerChanged) -> None:
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


def _middle(place: int) -> float:
    """The latency that is within 1 % of every latency of a bin."""
    return FLOOR_S if place == 0 else FLOOR_S * GROWTH**place * 2 / (1 + GROWTH)


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


def dashboard_data(
    view: StatsView, model: str, info: ModelInfo | None, state: events.ServiceSnapshot | None
) -> dict[str, Any]:
    """The JSON of the dashboard; ``info`` and ``state`` are None before the service has started.

    Columns have a value for each complete slice, null where nothing was measured. The current slice
    is left out: half of a slice would look like half the traffic.
    """
    flags = ("draining", "drifted", "fallback")
    return {
        "model": model,
        "version": __version__,
        "scorer": info and {n: getattr(info, n) for n in ("family", "device", "precision")},
        "since": view.since,
        "at": view.since + view.number * view.slice_s,
        "slice_s": view.slice_s,
        "now": state and {**_state(state), **{name: getattr(state, name) for name in flags}},
        "workers": [
            {**asdict(worker), "resident_bytes": _memory(state, worker.worker)}
            for worker in view.workers
        ],
        "minute": _total(view, max(1, round(MINUTE_S / view.slice_s))),
        "window": _total(view, SLICES),
        "columns": _columns(view),
        "steps": {
            "powers": [2**power for power in range(POWERS)],
            "recent": [[round(p, 6), round(a, 6)] for p, a in view.steps],
        },
        "events": [asdict(event) for event in reversed(view.events)],
    }


def _total(view: StatsView, slices: int) -> dict[str, Any]:
    """The sum of the last slices."""
    first = max(0, view.number - slices)
    total = sum_of(past for past in view.slices if past.number >= first)
    seconds = (view.number - first) * view.slice_s
    counts: dict[str, dict[str, int]] = {}
    for (kind, name), count in sorted(total.counts.items()):
        counts.setdefault(kind, {})[name] = count
    return {
        "seconds": seconds,
        **(_rates(total, seconds) if seconds else dict.fromkeys(_rates(total, 1.0))),
        "counts": counts,
        "step_pairs": total.pairs,
        "step_tokens": total.tokens,
    }


def _columns(view: StatsView) -> dict[str, Any]:
    by_number = {past.number: past for past in view.slices}
    numbers = range(max(0, view.number - SLICES), view.number)
    slices = [by_number.get(number) or TimeSlice(number) for number in numbers]
    rows = [_row(past, view.slice_s) for past in slices]
    return {
        **{name: [row[name] for row in rows] for name in _row(TimeSlice(0), 1.0)},
        "ends_at": [view.since + (number + 1) * view.slice_s for number in numbers],
        "resident_bytes": [
            [_memory(past.state, worker.worker) for past in slices] for worker in view.workers
        ],
    }


def _row(past: TimeSlice, seconds: float) -> Row:
    return {**_rates(past, seconds), **_state(past.state)}


def _rates(past: TimeSlice, seconds: float) -> Row:
    """Rates, percentiles, and actual over predicted step time."""
    sums, counts = past.sums, past.counts
    requests = sum(count for (kind, _), count in counts.items() if kind == "http")
    found: list[float | None] = [None] * len(RANKS)
    if past.latencies is not None:
        found = percentiles(past.latencies, *RANKS)
    predicted = sums.get("predicted", 0.0)
    return {
        "requests_per_s": round(requests / seconds, 3),
        "errors_per_s": round((requests - counts["http", "200"]) / seconds, 3),
        "documents_per_s": round(sums.get("documents", 0.0) / seconds, 3),
        "tokens_per_s": round(sums.get("tokens", 0.0) / seconds, 1),
        **{f"p{rank}_s": s and round(s, 6) for rank, s in zip(RANKS, found, strict=True)},
        "drift": round(sums["actual"] / predicted, 4) if predicted > 0 else None,
    }


def _state(state: events.ServiceSnapshot | None) -> Row:
    return {name: None if state is None else read(state) for name, read in STATE.items()}


def _memory(state: events.ServiceSnapshot | None, worker: int) -> int | None:
    """Resident bytes of a worker; None before its first step."""
    if state is None or worker >= len(state.resident_bytes):
        return None
    return state.resident_bytes[worker] or None

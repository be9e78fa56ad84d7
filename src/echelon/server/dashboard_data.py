"""The JSON of the dashboard: the last ten minutes of a server.

Columns have a value for each complete slice, null where nothing was measured. The current slice is
left out: half of a slice would look like half the traffic.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from echelon import __version__
from echelon.server.rolling_stats import POWERS, SLICES, TimeSlice, percentiles, sum_of

if TYPE_CHECKING:
    from collections.abc import Callable

    from echelon.engine.state import ServiceSnapshot
    from echelon.server.rolling_stats import StatsView
    from echelon.types import ModelInfo

    Row = dict[str, float | None]

MINUTE_S = 60.0
RANKS = (50, 95, 99)

STATE: dict[str, Callable[[ServiceSnapshot], float]] = {
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


def dashboard_data(
    view: StatsView, model: str, info: ModelInfo | None, state: ServiceSnapshot | None
) -> dict[str, Any]:
    """All data of the dashboard; ``info`` and ``state`` are None before the service has started."""
    minute = max(1, round(MINUTE_S / view.slice_s))
    return {
        "model": model,
        "version": __version__,
        "scorer": info and {n: getattr(info, n) for n in ("family", "device", "precision")},
        "since": view.since,
        "at": view.since + view.number * view.slice_s,
        "slice_s": view.slice_s,
        "now": state
        and {
            **_state(state),
            "draining": state.draining,
            "drifted": state.drifted,
            "fallback": state.fallback,
        },
        "workers": [
            {**asdict(worker), "resident_bytes": _memory(state, worker.worker)}
            for worker in view.workers
        ],
        "minute": _total(view, minute),
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
    columns: dict[str, Any] = {
        name: [row[name] for row in rows] for name in _row(TimeSlice(0), 1.0)
    }
    columns["ends_at"] = [view.since + (number + 1) * view.slice_s for number in numbers]
    columns["resident_bytes"] = [
        [_memory(past.state, worker.worker) for past in slices] for worker in view.workers
    ]
    return columns


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


def _state(state: ServiceSnapshot | None) -> Row:
    return {name: None if state is None else read(state) for name, read in STATE.items()}


def _memory(state: ServiceSnapshot | None, worker: int) -> int | None:
    """Resident bytes of a worker; None before its first step."""
    if state is None or worker >= len(state.resident_bytes):
        return None
    return state.resident_bytes[worker] or None

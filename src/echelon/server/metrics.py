"""Metrics for Prometheus, in a registry of each server; docs/SERVING.md documents their names."""

from __future__ import annotations

from operator import attrgetter
from typing import TYPE_CHECKING, Any, get_args

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from echelon import __version__
from echelon.engine import events
from echelon.scheduling.admission import RULES
from echelon.scheduling.oom_policy import RUNGS
from echelon.scheduling.token_budget import Reason as MoveReason
from echelon.server.limits import NAMES
from echelon.server.refusals import Reason

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence, Sized

    from echelon.engine.service import Service

SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
"""From the overhead of a request to the longest wait of a request."""

RATIOS = (0.25, 0.5, 0.7, 0.8, 0.9, 0.95, 1.0, 1.05, 1.1, 1.25, 1.5, 2, 4, 10)
"""Actual over predicted time of a step."""

SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
TOKENS = (64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768, 65536)

COUNTERS: dict[str, tuple[str, tuple[str, ...]]] = {
    "http_requests_total": ("HTTP requests answered.", ("dialect", "status")),
    "deadline_requests_total": ("Requests with a deadline, by whether it was met.", ("outcome",)),
    "key_documents_total": ("Documents of answered requests, by name of the API key.", ("key",)),
    "rate_limited_total": ("Requests over the rate limit of a key, by its name.", ("key",)),
    "connections_refused_total": ("Connections that the server ended, by reason.", ("reason",)),
    "limit_refusals_total": ("Requests and connections beyond a limit.", ("limit",)),
    "requests_total": ("Admitted requests, by outcome.", ("outcome",)),
    "refused_total": ("Refused requests, by reason.", ("reason",)),
    "documents_total": ("Documents of answered requests (goodput).", ()),
    "score_cache_hits_total": ("Documents whose scores were cached.", ()),
    "score_cache_misses_total": ("Documents whose scores were sought in the cache in vain.", ()),
    "truncated_documents_total": ("Documents that were truncated.", ()),
    "truncated_tokens_total": ("Tokens that truncation removed.", ()),
    "fallback_requests_total": ("Low-priority requests with a reduced max_length.", ()),
    "step_predicted_seconds_total": ("Predicted seconds of all steps.", ()),
    "step_actual_seconds_total": ("Measured seconds of all steps.", ()),
    "tokens_total": ("Tokens scored, padding not included.", ()),
    "padding_tokens_total": ("Padding tokens scored.", ()),
    "steps_again_total": ("Steps that repeat a lost step.", ()),
    "ladder_steps_total": ("Steps of the OOM ladder, by rung.", ("rung",)),
    "token_budget_moves_total": ("Changes of the token budget, by reason.", ("reason",)),
    "worker_changes_total": ("Changes of worker state, by new state.", ("state",)),
}
"""Counters: help text and labels."""

HISTOGRAMS: dict[str, tuple[str, tuple[str, ...], Sequence[float]]] = {
    "http_request_seconds": (
        "Seconds from the headers of a request to its response.",
        ("dialect",),
        SECONDS,
    ),
    "request_seconds": ("Seconds of a request, by phase.", ("phase",), SECONDS),
    "step_seconds": ("Seconds of a step (one forward pass).", (), SECONDS),
    "step_actual_over_predicted": ("Measured over predicted seconds of a step.", (), RATIOS),
    "step_pairs": ("Pairs of a step.", (), SIZES),
    "step_tokens": ("Tokens of a step, padding included.", (), TOKENS),
}
"""Histograms: help text, labels and buckets."""

GAUGES: dict[str, tuple[str, tuple[str, ...]]] = {
    "info": ("Always 1.", ("version", "family", "device", "precision", "kernels")),
    "connections": ("Open connections.", ()),
    "worker_resident_bytes": ("Resident memory of a worker.", ("worker",)),
    "worker_memory_limit_bytes": ("Memory at which a worker is replaced; 0 is no limit.", ()),
}
"""Gauges: help text and labels."""

STATE: dict[str, tuple[str, str]] = {
    "token_budget": ("Current token budget of a step.", "load.budget"),
    "requests_inside": ("Requests in the server, those in tokenization included.", "requests"),
    "waiting_pairs": ("Distinct pairs in the queue.", "load.pairs"),
    "waiting_tokens": ("Tokens of the distinct pairs in the queue.", "load.tokens"),
    "backlog_seconds": ("Predicted seconds to score all pairs in the queue.", "backlog_s"),
    "oldest_seconds": ("Age of the oldest request in the queue.", "oldest_s"),
    "workers_up": ("Workers that are up.", "workers_up"),
    "cost_scale": ("Step time over the prediction of the first cost model.", "scale"),
    "cost_drift_ratio": ("Step time over the normal step time of this machine.", "drift"),
    "cost_drifted": ("1 while echelon_cost_drift_ratio is far from 1.", "drifted"),
    "score_cache_entries": ("Scores in the cache.", "cache.entries"),
    "score_cache_bytes": ("Memory of the score cache.", "cache.bytes"),
    "score_cache_max_bytes": (
        "Maximum memory of the score cache; 0 is no cache.",
        "cache.max_bytes",
    ),
    "fallback_on": ("1 while low-priority requests get a reduced max_length.", "fallback"),
    "draining": ("1 while the server shuts down.", "draining"),
}
"""Gauges that each scrape reads from a snapshot of the service: help text and attribute."""

VALUES: dict[str, Iterable[str]] = {
    "deadline_requests_total": ("met", "missed"),
    "requests_total": get_args(events.Outcome),
    "refused_total": (*RULES, "shutting_down"),
    "connections_refused_total": get_args(Reason),
    "limit_refusals_total": NAMES,
    "ladder_steps_total": [rung.__name__.removeprefix("_") for rung in RUNGS],
    "worker_changes_total": get_args(events.WorkerState),
    "token_budget_moves_total": get_args(MoveReason),
}
"""Known labels. Their counters begin at zero: Prometheus sees no increase in a series whose first
value is one."""

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


class Metrics(events.Listener):
    """Counts the events of a service and of its routes."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._service: Service | None = None
        new: dict[str, Any] = {"namespace": "echelon", "registry": self.registry}
        self._counters = {
            n: Counter(n, text, labels, **new) for n, (text, labels) in COUNTERS.items()
        }
        self._histograms = {
            name: Histogram(name, text, labels, buckets=buckets, **new)
            for name, (text, labels, buckets) in HISTOGRAMS.items()
        }
        self._gauges = {n: Gauge(n, text, labels, **new) for n, (text, labels) in GAUGES.items()}
        self._state = {name: Gauge(name, text, **new) for name, (text, _) in STATE.items()}
        for name, values in VALUES.items():
            for value in values:
                self.count(name, value, by=0)

    def watch(self, service: Service) -> None:
        """Set the service whose state each scrape reads."""
        self._service = service
        info = service.info
        level = info.kernels or "off"
        labels = (__version__, info.family, info.device, info.precision, level)
        self._gauges["info"].labels(*labels).set(1)
        limit = service.settings.memory_limit_bytes
        self._gauges["worker_memory_limit_bytes"].set(limit or 0)

    def watch_connections(self, connections: Sized) -> None:
        """Set the connections that each scrape counts."""
        self._gauges["connections"].set_function(lambda: len(connections))

    def text(self) -> bytes:
        """Write all metrics in Prometheus' text format."""
        if self._service is not None:
            now = self._service.snapshot()
            for name, (_, attribute) in STATE.items():
                self._state[name].set(attrgetter(attribute)(now))
            for number, size in enumerate(now.resident_bytes):
                self._gauges["worker_resident_bytes"].labels(str(number)).set(size)
        return generate_latest(self.registry)

    # Called by the routes.

    def answered(self, protocol: str, status: int, seconds: float) -> None:
        """Count a response."""
        self.count("http_requests_total", protocol, str(status))
        self._observe("http_request_seconds", seconds, protocol)

    def count(self, name: str, *labels: str, by: float = 1) -> None:
        """Add to a counter of :data:`COUNTERS`, with the values of its labels."""
        counter = self._counters[name]
        (counter.labels(*labels) if labels else counter).inc(by)

    # Called by the service, from any thread.

    def step_finished(self, event: events.StepFinished) -> None:
        """Count a step."""
        self._observe("step_seconds", event.actual_s)
        self.count("step_predicted_seconds_total", by=event.predicted_s)
        self.count("step_actual_seconds_total", by=event.actual_s)
        if event.predicted_s > 0:
            self._observe("step_actual_over_predicted", event.actual_s / event.predicted_s)
        self._observe("step_pairs", event.pairs)
        self._observe("step_tokens", event.cost_tokens)
        self.count("tokens_total", by=event.tokens)
        self.count("padding_tokens_total", by=event.cost_tokens - event.tokens)
        if event.again:
            self.count("steps_again_total")

    def request_ended(self, event: events.RequestEnded) -> None:
        """Count an admitted request that has ended."""
        self.count("requests_total", event.outcome)
        self.count("truncated_documents_total", by=event.truncated_documents)
        self.count("truncated_tokens_total", by=event.truncated_tokens)
        if event.fallback is not None:
            self.count("fallback_requests_total")
        for phase in ("tokenise", "queue", "compute", "total"):
            self._observe("request_seconds", getattr(event, f"{phase}_s"), phase)
        if event.outcome == "answered":
            self.count("documents_total", by=event.documents)

    def refused(self, event: events.RequestRefused) -> None:
        """Count a refused request."""
        self.count("refused_total", event.reason)

    def scores_sought(self, event: events.ScoresSought) -> None:
        """Count the documents that were looked up in the score cache."""
        self.count("score_cache_hits_total", by=event.hits)
        self.count("score_cache_misses_total", by=event.misses)

    def ladder_taken(self, event: events.LadderTaken) -> None:
        """Count a step of the OOM ladder."""
        self.count("ladder_steps_total", event.step.rung)

    def worker_changed(self, event: events.WorkerChanged) -> None:
        """Count a worker's change of state."""
        self.count("worker_changes_total", event.state)

    def budget_moved(self, event: events.BudgetMoved) -> None:
        """Count a change of the token budget."""
        self.count("token_budget_moves_total", event.reason)

    def _observe(self, name: str, value: float, *labels: str) -> None:
        histogram = self._histograms[name]
        (histogram.labels(*labels) if labels else histogram).observe(value)

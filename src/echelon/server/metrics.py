"""Metrics for Prometheus, in a registry of each server; docs/SERVING.md documents their names."""

from __future__ import annotations

from typing import TYPE_CHECKING, get_args

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from echelon import __version__
from echelon.engine.events import NullListener, Outcome, WorkerState
from echelon.scheduling.admission import RULES
from echelon.scheduling.oom_policy import RUNGS
from echelon.scheduling.token_budget import Reason as MoveReason
from echelon.server.connection import Reason

if TYPE_CHECKING:
    from collections.abc import Sized

    from echelon.engine.events import (
        BudgetMoved,
        LadderTaken,
        RequestEnded,
        RequestRefused,
        StepFinished,
        WorkerChanged,
    )
    from echelon.engine.service import Service

SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
"""From the overhead of a request to the longest wait of a request."""

RATIOS = (0.25, 0.5, 0.7, 0.8, 0.9, 0.95, 1.0, 1.05, 1.1, 1.25, 1.5, 2, 4, 10)
"""Actual over predicted time of a step."""

SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
TOKENS = (64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768, 65536)

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


class Metrics(NullListener):
    """Counts the events of a service and of its routes.

    Counters whose labels are known start at zero: Prometheus sees no increase in a series whose
    first value is one.
    """

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._service: Service | None = None
        self._add_http()
        self._add_requests()
        self._add_steps()
        self._add_state()
        self._set_to_zero()

    def watch(self, service: Service) -> None:
        """Set the service whose state each scrape reads."""
        self._service = service
        info = service.info
        self._info.labels(__version__, info.family, info.device, info.precision).set(1)
        self._budget.set(service.snapshot().load.budget)
        self._memory_limit.set(service.settings.memory_limit_bytes or 0)

    def text(self) -> bytes:
        """Write all metrics in Prometheus' text format."""
        if self._service is not None:
            self._read_state(self._service)
        return generate_latest(self.registry)

    # Called by the routes.

    def answered(self, protocol: str, status: int, seconds: float) -> None:
        """Count a response."""
        self._http.labels(protocol, str(status)).inc()
        self._http_seconds.labels(protocol).observe(seconds)

    def deadline_ended(self, *, met: bool) -> None:
        """Count a request with a deadline, by whether it was answered in time."""
        self._deadlines.labels("met" if met else "missed").inc()

    def documents_scored(self, key: str, documents: int) -> None:
        """Count the scored documents of a key."""
        self._key_documents.labels(key).inc(documents)

    def rate_limited(self, key: str) -> None:
        """Count a request over the limit of a key."""
        self._rate_limited.labels(key).inc()

    def connection_refused(self, reason: Reason) -> None:
        """Count a connection that was closed before its first request."""
        self._connections_refused.labels(reason).inc()

    def watch_connections(self, connections: Sized) -> None:
        """Set the connections that each scrape counts."""
        self._connections.set_function(lambda: len(connections))

    # Called by the service, from any thread.

    def step_finished(self, event: StepFinished) -> None:
        """Count a step."""
        self._step_seconds.observe(event.actual_s)
        self._predicted.inc(event.predicted_s)
        self._actual.inc(event.actual_s)
        if event.predicted_s > 0:
            self._ratio.observe(event.actual_s / event.predicted_s)
        self._step_pairs.observe(event.pairs)
        self._step_tokens.observe(event.cost_tokens)
        self._tokens.inc(event.tokens)
        self._padding.inc(event.cost_tokens - event.tokens)
        if event.again:
            self._again.inc()

    def request_ended(self, event: RequestEnded) -> None:
        """Count an admitted request that has ended."""
        self._ended.labels(event.outcome).inc()
        self._truncated.inc(event.truncated_documents)
        self._truncated_tokens.inc(event.truncated_tokens)
        if event.fallback is not None:
            self._fallback_requests.inc()
        for phase, seconds in (
            ("tokenise", event.tokenise_s),
            ("queue", event.queue_s),
            ("compute", event.compute_s),
            ("total", event.total_s),
        ):
            self._phases.labels(phase).observe(seconds)
        if event.outcome == "answered":
            self._documents.inc(event.documents)

    def refused(self, event: RequestRefused) -> None:
        """Count a refused request."""
        self._refused.labels(event.reason).inc()

    def ladder_taken(self, event: LadderTaken) -> None:
        """Count a step of the OOM ladder."""
        self._ladder.labels(event.step.rung).inc()

    def worker_changed(self, event: WorkerChanged) -> None:
        """Count a worker's change of state."""
        self._worker_changes.labels(event.state).inc()

    def budget_moved(self, event: BudgetMoved) -> None:
        """Count a change of the token budget."""
        self._budget_moves.labels(event.reason).inc()

    def _counter(self, name: str, words: str, *labels: str) -> Counter:
        return Counter(f"echelon_{name}", words, labels, registry=self.registry)

    def _gauge(self, name: str, words: str, *labels: str) -> Gauge:
        return Gauge(f"echelon_{name}", words, labels, registry=self.registry)

    def _histogram(
        self, name: str, words: str, buckets: tuple[float, ...], *labels: str
    ) -> Histogram:
        return Histogram(f"echelon_{name}", words, labels, buckets=buckets, registry=self.registry)

    def _add_http(self) -> None:
        self._http = self._counter(
            "http_requests_total", "HTTP requests answered.", "dialect", "status"
        )
        self._http_seconds = self._histogram(
            "http_request_seconds",
            "Seconds from the headers of a request to its response.",
            SECONDS,
            "dialect",
        )
        self._deadlines = self._counter(
            "deadline_requests_total", "Requests with a deadline, by whether it was met.", "outcome"
        )
        self._key_documents = self._counter(
            "key_documents_total", "Documents of answered requests, by name of the API key.", "key"
        )
        self._rate_limited = self._counter(
            "rate_limited_total", "Requests over the rate limit of a key, by its name.", "key"
        )
        self._connections = self._gauge("connections", "Open connections.")
        self._connections_refused = self._counter(
            "connections_refused_total", "Connections closed before their first request.", "reason"
        )

    def _add_requests(self) -> None:
        self._ended = self._counter("requests_total", "Admitted requests, by outcome.", "outcome")
        self._refused = self._counter("refused_total", "Refused requests, by reason.", "reason")
        self._documents = self._counter(
            "documents_total", "Documents of answered requests (goodput)."
        )
        self._truncated = self._counter(
            "truncated_documents_total", "Documents that were truncated."
        )
        self._truncated_tokens = self._counter(
            "truncated_tokens_total", "Tokens that truncation removed."
        )
        self._fallback_requests = self._counter(
            "fallback_requests_total", "Low-priority requests with a reduced max_length."
        )
        self._phases = self._histogram(
            "request_seconds", "Seconds of a request, by phase.", SECONDS, "phase"
        )

    def _add_steps(self) -> None:
        self._step_seconds = self._histogram(
            "step_seconds", "Seconds of a step (one forward pass).", SECONDS
        )
        self._predicted = self._counter(
            "step_predicted_seconds_total", "Predicted seconds of all steps."
        )
        self._actual = self._counter("step_actual_seconds_total", "Measured seconds of all steps.")
        self._ratio = self._histogram(
            "step_actual_over_predicted", "Measured over predicted seconds of a step.", RATIOS
        )
        self._step_pairs = self._histogram("step_pairs", "Pairs of a step.", SIZES)
        self._step_tokens = self._histogram(
            "step_tokens", "Tokens of a step, padding included.", TOKENS
        )
        self._tokens = self._counter("tokens_total", "Tokens scored, padding not included.")
        self._padding = self._counter("padding_tokens_total", "Padding tokens scored.")
        self._again = self._counter("steps_again_total", "Steps that repeat a lost step.")
        self._ladder = self._counter(
            "ladder_steps_total", "Steps of the OOM ladder, by rung.", "rung"
        )

    def _add_state(self) -> None:
        self._info = self._gauge("info", "Always 1.", "version", "family", "device", "precision")
        self._budget = self._gauge("token_budget", "Current token budget of a step.")
        self._budget_moves = self._counter(
            "token_budget_moves_total", "Changes of the token budget, by reason.", "reason"
        )
        self._inside = self._gauge(
            "requests_inside", "Requests in the server, those in tokenization included."
        )
        self._waiting = self._gauge("waiting_pairs", "Distinct pairs in the queue.")
        self._waiting_tokens = self._gauge(
            "waiting_tokens", "Tokens of the distinct pairs in the queue."
        )
        self._backlog = self._gauge(
            "backlog_seconds", "Predicted seconds to score all pairs in the queue."
        )
        self._oldest = self._gauge("oldest_seconds", "Age of the oldest request in the queue.")
        self._workers = self._gauge("workers_up", "Workers that are up.")
        self._resident = self._gauge(
            "worker_resident_bytes", "Resident memory of a worker.", "worker"
        )
        self._memory_limit = self._gauge(
            "worker_memory_limit_bytes", "Memory at which a worker is replaced; 0 is no limit."
        )
        self._worker_changes = self._counter(
            "worker_changes_total", "Changes of worker state, by new state.", "state"
        )
        self._scale = self._gauge(
            "cost_scale", "Step time over the prediction of the first cost model."
        )
        self._drift = self._gauge(
            "cost_drift_ratio", "Step time over the normal step time of this machine."
        )
        self._drifted = self._gauge(
            "cost_drifted", "1 while echelon_cost_drift_ratio is far from 1."
        )
        self._fallback = self._gauge(
            "fallback_on", "1 while low-priority requests get a reduced max_length."
        )
        self._draining = self._gauge(
            "draining", "1 while the server shuts down and admits no requests."
        )

    def _set_to_zero(self) -> None:
        for counter, values in (
            (self._deadlines, ("met", "missed")),
            (self._ended, get_args(Outcome)),
            (self._refused, (*RULES, "shutting_down")),
            (self._connections_refused, get_args(Reason)),
            (self._ladder, [rung.__name__.removeprefix("_") for rung in RUNGS]),
            (self._worker_changes, get_args(WorkerState)),
            (self._budget_moves, get_args(MoveReason)),
        ):
            for value in values:
                counter.labels(value)

    def _read_state(self, service: Service) -> None:
        now = service.snapshot()
        self._budget.set(now.load.budget)
        self._inside.set(now.requests)
        self._waiting.set(now.load.pairs)
        self._waiting_tokens.set(now.load.tokens)
        self._backlog.set(now.backlog_s)
        self._oldest.set(now.oldest_s)
        self._workers.set(now.workers)
        self._scale.set(now.scale)
        self._drift.set(now.drift)
        self._drifted.set(now.drifted)
        self._fallback.set(now.fallback)
        self._draining.set(now.draining)
        for number, size in enumerate(now.resident_bytes):
            self._resident.labels(str(number)).set(size)

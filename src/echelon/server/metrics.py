"""Metrics for Prometheus: what the service tells, counted, in a registry of its own.

The names are documented in docs/SERVING.md; a test holds the two together.
"""

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
"""From the overhead of a request to the longest that anyone waits."""

RATIOS = (0.25, 0.5, 0.7, 0.8, 0.9, 0.95, 1.0, 1.05, 1.1, 1.25, 1.5, 2, 4, 10)
"""Actual over predicted time of a step."""

SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
TOKENS = (64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768, 65536)

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


class Metrics(NullListener):
    """Listens to a service and counts.

    Each server has its own, so that several may live in one process. Counters whose labels are
    known stand at zero from the start: Prometheus sees no increase in a series that begins at one.
    """

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._service: Service | None = None
        self._wire()
        self._requests()
        self._steps()
        self._state()
        self._begin()

    def watch(self, service: Service) -> None:
        """The service whose state is asked for with each scrape."""
        self._service = service
        facts = service.info
        self._info.labels(__version__, facts.family, facts.device, facts.precision).set(1)
        self._budget.set(service.snapshot().load.budget)
        self._memory_limit.set(service.settings.memory_limit_bytes or 0)

    def text(self) -> bytes:
        """Everything, in Prometheus' text format."""
        if self._service is not None:
            self._look(self._service)
        return generate_latest(self.registry)

    # What the routes tell.

    def answered(self, dialect: str, status: int, seconds: float) -> None:
        """A request was answered over HTTP."""
        self._http.labels(dialect, str(status)).inc()
        self._http_seconds.labels(dialect).observe(seconds)

    def due(self, *, met: bool) -> None:
        """A request with a deadline was answered, or not in time."""
        self._deadlines.labels("met" if met else "missed").inc()

    def asked(self, key: str, documents: int) -> None:
        """The holder of a key had documents scored."""
        self._key_documents.labels(key).inc(documents)

    def rate_limited(self, key: str) -> None:
        """The holder of a key has used up what it may."""
        self._rate_limited.labels(key).inc()

    def connection_refused(self, reason: Reason) -> None:
        """A connection was closed before it had asked for anything."""
        self._connections_refused.labels(reason).inc()

    def watch_connections(self, connections: Sized) -> None:
        """The open connections, counted with each scrape."""
        self._connections.set_function(lambda: len(connections))

    # What the service tells; called from any thread.

    def step_finished(self, event: StepFinished) -> None:
        """A step was scored."""
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
        """A request that was taken in has ended."""
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
        """A request was not taken in."""
        self._refused.labels(event.reason).inc()

    def ladder_taken(self, event: LadderTaken) -> None:
        """Memory trouble was dealt with."""
        self._ladder.labels(event.step.rung).inc()

    def worker_changed(self, event: WorkerChanged) -> None:
        """A worker came up or went down."""
        self._worker_changes.labels(event.state).inc()

    def budget_moved(self, event: BudgetMoved) -> None:
        """The token budget has changed."""
        self._budget_moves.labels(event.reason).inc()

    # Inside.

    def _counter(self, name: str, says: str, *labels: str) -> Counter:
        return Counter(f"echelon_{name}", says, labels, registry=self.registry)

    def _gauge(self, name: str, says: str, *labels: str) -> Gauge:
        return Gauge(f"echelon_{name}", says, labels, registry=self.registry)

    def _histogram(
        self, name: str, says: str, buckets: tuple[float, ...], *labels: str
    ) -> Histogram:
        return Histogram(f"echelon_{name}", says, labels, buckets=buckets, registry=self.registry)

    def _wire(self) -> None:
        self._http = self._counter(
            "http_requests_total", "Requests answered over HTTP.", "dialect", "status"
        )
        self._http_seconds = self._histogram(
            "http_request_seconds", "Seconds from headers to answer.", SECONDS, "dialect"
        )
        self._deadlines = self._counter(
            "deadline_requests_total", "Requests with a deadline, by whether it was met.", "outcome"
        )
        self._key_documents = self._counter(
            "key_documents_total", "Documents of answered requests, by the key's name.", "key"
        )
        self._rate_limited = self._counter(
            "rate_limited_total", "Requests over a key's limit, by the key's name.", "key"
        )
        self._connections = self._gauge("connections", "Open connections.")
        self._connections_refused = self._counter(
            "connections_refused_total", "Connections closed before they asked.", "reason"
        )

    def _requests(self) -> None:
        self._ended = self._counter(
            "requests_total", "Requests taken in, by how they ended.", "outcome"
        )
        self._refused = self._counter("refused_total", "Requests not taken in.", "reason")
        self._documents = self._counter(
            "documents_total", "Documents of answered requests: the goodput."
        )
        self._truncated = self._counter("truncated_documents_total", "Documents that lost tokens.")
        self._truncated_tokens = self._counter("truncated_tokens_total", "Tokens that they lost.")
        self._fallback_requests = self._counter(
            "fallback_requests_total", "Requests of low priority that were read shorter."
        )
        self._phases = self._histogram(
            "request_seconds", "Seconds of a request, by phase.", SECONDS, "phase"
        )

    def _steps(self) -> None:
        self._step_seconds = self._histogram("step_seconds", "Seconds of a step.", SECONDS)
        self._predicted = self._counter(
            "step_predicted_seconds_total", "Seconds that steps were predicted to take."
        )
        self._actual = self._counter("step_actual_seconds_total", "Seconds that they took.")
        self._ratio = self._histogram(
            "step_actual_over_predicted", "Actual over predicted seconds of a step.", RATIOS
        )
        self._step_pairs = self._histogram("step_pairs", "Pairs of a step.", SIZES)
        self._step_tokens = self._histogram(
            "step_tokens", "Tokens that a step was paid for, padding included.", TOKENS
        )
        self._tokens = self._counter("tokens_total", "Useful tokens scored.")
        self._padding = self._counter("padding_tokens_total", "Tokens of padding scored.")
        self._again = self._counter("steps_again_total", "Steps that repeat one that was lost.")
        self._ladder = self._counter(
            "ladder_steps_total", "Steps of the memory ladder taken.", "rung"
        )

    def _state(self) -> None:
        self._info = self._gauge("info", "Always 1.", "version", "family", "device", "precision")
        self._budget = self._gauge("token_budget", "Tokens that a step may cost now.")
        self._budget_moves = self._counter(
            "token_budget_moves_total", "Times that it has changed.", "reason"
        )
        self._inside = self._gauge("requests_inside", "Requests inside, tokenising included.")
        self._waiting = self._gauge("waiting_pairs", "Distinct pairs that wait.")
        self._waiting_tokens = self._gauge("waiting_tokens", "Their tokens.")
        self._backlog = self._gauge("backlog_seconds", "Predicted seconds until all is scored.")
        self._oldest = self._gauge("oldest_seconds", "Age of the oldest request in the queue.")
        self._workers = self._gauge("workers_up", "Workers that are up.")
        self._resident = self._gauge("worker_resident_bytes", "Memory of a worker.", "worker")
        self._memory_limit = self._gauge(
            "worker_memory_limit_bytes", "A worker that holds more is replaced; 0: none is."
        )
        self._worker_changes = self._counter(
            "worker_changes_total", "Workers' changes of state.", "state"
        )
        self._scale = self._gauge("cost_scale", "Step time over what the model began with.")
        self._drift = self._gauge("cost_drift_ratio", "Step time over this machine's normal one.")
        self._drifted = self._gauge("cost_drifted", "1 while it is far from 1.")
        self._fallback = self._gauge("fallback_on", "1 while low priority is read shorter.")
        self._draining = self._gauge("draining", "1 while nothing more is taken in.")

    def _begin(self) -> None:
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

    def _look(self, service: Service) -> None:
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

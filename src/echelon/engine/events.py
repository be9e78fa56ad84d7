"""Plain data of a service: its settings, its state, and the events that listeners receive.

A listener is called from any thread, while work waits: it must be quick.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Literal

from echelon.engine.score_cache import CacheUsage
from echelon.errors import check_positive
from echelon.scheduling.admission import AdmissionLimits

if TYPE_CHECKING:
    from echelon.options import Allowance
    from echelon.scheduling.autoscaling import AutoscalingLimits
    from echelon.scheduling.queue import QueueLoad
    from echelon.scheduling.token_budget import Reason
    from echelon.types import LadderStep, Truncation

logger = logging.getLogger(__name__)


WEDGE_AFTER_S = 20.0
"""Seconds without an answer before a worker is killed, at the earliest: first steps compile, and a
machine may swap."""


@dataclass(frozen=True, slots=True)
class ServiceSettings:
    """How a service runs; unset values are the model's or the device's own."""

    workers: int = 1  # scorers that share the queue
    # limits of autoscaling; None keeps the number of workers
    scaling: AutoscalingLimits | None = None
    precision: str = "auto"
    token_budget: int | None = None  # tokens that a step may cost
    max_pairs: int | None = None  # pairs that a step may hold
    max_length: int | None = None  # tokens of a pair unless a request says otherwise
    truncation: Truncation = "longest_first"
    max_query_tokens: int | None = None
    # what may be given up when one pair alone does not fit in memory
    allow: tuple[Allowance, ...] = ()
    bounds: AdmissionLimits = field(default_factory=AdmissionLimits)
    memory_limit_bytes: int | None = None  # a worker that holds more is replaced between steps
    wedge_after_s: float = WEDGE_AFTER_S
    goal_s: float | None = None  # latency goal; steps are kept below half of it
    # tokens of a pair of low priority while the queue is long
    fallback_max_length: int | None = None

    def __post_init__(self) -> None:
        check_positive(
            workers=self.workers,
            token_budget=self.token_budget,
            max_pairs=self.max_pairs,
            max_length=self.max_length,
            max_query_tokens=self.max_query_tokens,
            fallback_max_length=self.fallback_max_length,
        )
        check_positive("Give seconds.", wedge_after_s=self.wedge_after_s, goal_s=self.goal_s)


@dataclass(frozen=True, slots=True)
class ServiceSnapshot:
    """A service at one moment."""

    load: QueueLoad  # queued and running pairs
    requests: int  # admitted requests, those being tokenised included
    backlog_s: float  # predicted seconds until all of them are scored
    oldest_s: float  # seconds that the oldest request has been queued; 0 where there is none
    workers_up: int
    workers: int  # all workers, those that start included
    busy_s: float  # seconds that workers have scored since the service started, summed
    resident_bytes: tuple[int, ...]  # memory of each worker
    scale: float  # measured step time over what the cost model began with
    draining: bool  # whether no more requests are admitted
    drift: float = 1.0  # step time over what is normal for this machine
    drifted: bool = False  # whether that has been far from 1 for long
    fallback: bool = False  # whether load is shed
    cache: CacheUsage = field(default_factory=CacheUsage)  # the score cache


@dataclass(frozen=True, slots=True)
class Readiness:
    """Whether the service can answer requests; if not, the state, a colon, and what led to it."""

    ready: bool
    reason: str = ""


@dataclass(frozen=True, slots=True)
class StepFinished:
    """A step was scored."""

    worker: int  # number of the worker, from 0
    predicted_s: float  # seconds that the cost model expected
    actual_s: float
    pairs: int
    requests: int  # requests that waited for its pairs
    tokens: int  # useful tokens
    cost_tokens: int  # tokens computed, padding included
    resident_bytes: int  # memory of the worker's process
    again: bool  # its pairs were in an earlier step that failed


Outcome = Literal["answered", "failed", "expired", "cancelled"]


@dataclass(frozen=True, slots=True)
class RequestEnded:
    """An admitted request has ended."""

    outcome: Outcome
    documents: int
    tokens: int  # its documents' tokens as the model saw them, chunks' overlaps included
    truncated_documents: int  # documents that lost tokens
    truncated_tokens: int  # tokens that they lost
    queue_s: float  # seconds from joining the queue to the first of its steps
    tokenise_s: float  # seconds of tokenising, waiting for a thread included
    compute_s: float  # seconds of the steps that held its pairs
    total_s: float  # seconds from its arrival to its end
    # tokens to which its pairs were cut because the queue was long, if they were
    fallback: int | None = None


@dataclass(frozen=True, slots=True)
class RequestRefused:
    """A request was refused."""

    reason: str  # a rule of :data:`echelon.scheduling.admission.RULES`, or ``shutting_down``
    documents: int
    retry_after_s: float | None  # seconds after which to try again; None where that does not help


@dataclass(frozen=True, slots=True)
class LadderTaken:
    """The OOM ladder took a step; ``budget`` is the token budget from now on."""

    worker: int
    step: LadderStep
    budget: int


@dataclass(frozen=True, slots=True)
class BudgetMoved:
    """The token budget has changed; see :mod:`echelon.scheduling.token_budget`."""

    tokens: int
    reason: Reason


@dataclass(frozen=True, slots=True)
class ScoresSought:
    """The documents of a request were looked up in the score cache."""

    hits: int  # their scores are cached
    misses: int


WorkerState = Literal[
    "starting", "up", "died", "wedged", "recycled", "renewed", "failed", "stopped"
]


@dataclass(frozen=True, slots=True)
class WorkerChanged:
    """A worker came up or went down; ``detail`` is the reason."""

    worker: int
    state: WorkerState
    detail: str = ""


class Listener:
    """Base of listeners: receives every event and does nothing."""

    def step_finished(self, event: StepFinished) -> None:
        """A step was scored."""

    def request_ended(self, event: RequestEnded) -> None:
        """A request ended."""

    def refused(self, event: RequestRefused) -> None:
        """A request was refused."""

    def scores_sought(self, event: ScoresSought) -> None:
        """The documents of a request were looked up in the score cache."""

    def ladder_taken(self, event: LadderTaken) -> None:
        """The OOM ladder took a step."""

    def worker_changed(self, event: WorkerChanged) -> None:
        """A worker came up or went down."""

    def budget_moved(self, event: BudgetMoved) -> None:
        """The token budget has changed."""


class ListenerGroup(Listener):
    """Passes events on to listeners, and logs their exceptions: no request fails for a metric."""

    def __init__(self, *listeners: Listener) -> None:
        self._listeners = listeners
        for method in vars(Listener):
            if not method.startswith("_"):
                setattr(self, method, partial(self._pass_on, method))

    def _pass_on(self, method: str, event: object) -> None:
        for listener in self._listeners:
            try:
                getattr(listener, method)(event)
            except Exception:
                name = type(event).__name__
                logger.exception("A listener raised on %s. This is a bug in it.", name)

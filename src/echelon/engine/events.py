"""Plain data of a service: its settings, its state, and the events that listeners receive.

A listener is called from any thread, while work waits: it must be quick.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Literal

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
    """How a service runs; unset values are the model's or the device's own.

    Attributes:
        workers: scorers that share the queue.
        scaling: limits of autoscaling; None keeps the number of workers.
        token_budget: tokens that a step may cost.
        max_pairs: pairs that a step may hold.
        max_length: tokens of a pair unless a request says otherwise.
        allow: what may be given up when one pair alone does not fit in memory.
        memory_limit_bytes: a worker that holds more is replaced between steps.
        wedge_after_s: see :data:`WEDGE_AFTER_S`.
        goal_s: latency goal; steps are kept below half of it.
        fallback_max_length: tokens of a pair of low priority while the queue is long.
    """

    workers: int = 1
    scaling: AutoscalingLimits | None = None
    precision: str = "auto"
    token_budget: int | None = None
    max_pairs: int | None = None
    max_length: int | None = None
    truncation: Truncation = "longest_first"
    max_query_tokens: int | None = None
    allow: tuple[Allowance, ...] = ()
    bounds: AdmissionLimits = field(default_factory=AdmissionLimits)
    memory_limit_bytes: int | None = None
    wedge_after_s: float = WEDGE_AFTER_S
    goal_s: float | None = None
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
    """A service at one moment.

    Attributes:
        load: queued and running pairs.
        requests: admitted requests, those being tokenised included.
        backlog_s: predicted seconds until all of them are scored.
        oldest_s: seconds that the oldest request has been queued; 0 where there is none.
        workers: all workers, those that start included.
        busy_s: seconds that workers have scored since the service started, summed.
        resident_bytes: memory of each worker.
        scale: measured step time over what the cost model began with.
        draining: whether no more requests are admitted.
        drift: step time over what is normal for this machine.
        drifted: whether that has been far from 1 for long.
        fallback: whether load is shed.
    """

    load: QueueLoad
    requests: int
    backlog_s: float
    oldest_s: float
    workers_up: int
    workers: int
    busy_s: float
    resident_bytes: tuple[int, ...]
    scale: float
    draining: bool
    drift: float = 1.0
    drifted: bool = False
    fallback: bool = False


@dataclass(frozen=True, slots=True)
class Readiness:
    """Whether the service can answer requests, and if not, why."""

    ready: bool
    reason: str = ""


@dataclass(frozen=True, slots=True)
class StepFinished:
    """A step was scored.

    Attributes:
        worker: number of the worker, from 0.
        predicted_s: seconds that the cost model expected.
        requests: requests that waited for its pairs.
        tokens: useful tokens.
        cost_tokens: tokens computed, padding included.
        resident_bytes: memory of the worker's process.
        again: its pairs were in an earlier step that failed.
    """

    worker: int
    predicted_s: float
    actual_s: float
    pairs: int
    requests: int
    tokens: int
    cost_tokens: int
    resident_bytes: int
    again: bool


Outcome = Literal["answered", "failed", "expired", "cancelled"]


@dataclass(frozen=True, slots=True)
class RequestEnded:
    """An admitted request has ended.

    Attributes:
        tokens: its documents' tokens as the model saw them, chunks' overlaps included.
        truncated_documents: documents that lost tokens.
        truncated_tokens: tokens that they lost.
        queue_s: seconds from joining the queue to the first of its steps.
        tokenise_s: seconds of tokenising, waiting for a thread included.
        compute_s: seconds of the steps that held its pairs.
        total_s: seconds from its arrival to its end.
        fallback: tokens to which its pairs were cut because the queue was long, if they were.
    """

    outcome: Outcome
    documents: int
    tokens: int
    truncated_documents: int
    truncated_tokens: int
    queue_s: float
    tokenise_s: float
    compute_s: float
    total_s: float
    fallback: int | None = None


@dataclass(frozen=True, slots=True)
class RequestRefused:
    """A request was refused.

    Attributes:
        reason: a rule of :data:`echelon.scheduling.admission.RULES`, or ``shutting_down``.
        retry_after_s: seconds after which to try again; None where that does not help.
    """

    reason: str
    documents: int
    retry_after_s: float | None


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

"""A service's settings, and its state as metrics and readiness probes see it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from echelon.errors import InvalidInput
from echelon.scheduling.admission import AdmissionLimits

if TYPE_CHECKING:
    from echelon.options import Allowance
    from echelon.scheduling.autoscaling import AutoscalingLimits
    from echelon.scheduling.queue import QueueLoad
    from echelon.types import Truncation

WEDGE_AFTER_S = 20.0
"""Seconds without an answer before a worker is killed, at the earliest: first steps compile, and a
machine may swap."""

_COUNTS = (
    "workers",
    "token_budget",
    "max_pairs",
    "max_length",
    "max_query_tokens",
    "fallback_max_length",
)
"""Settings that are 1 or more."""


@dataclass(frozen=True, slots=True)
class ServiceSettings:
    """How a service runs; unset values are the model's or the device's own.

    Attributes:
        workers: scorers that share the queue.
        scaling: limits of autoscaling; None keeps the number of workers.
        precision: as in :class:`echelon.options.Options`.
        token_budget: tokens that a step may cost.
        max_pairs: pairs that a step may hold.
        max_length: tokens of a pair unless a request says otherwise.
        truncation: which text of a pair that is too long loses tokens.
        max_query_tokens: tokens kept of a query.
        allow: what may be given up when one pair alone does not fit in memory.
        bounds: limits of admission.
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
        for name in _COUNTS:
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InvalidInput(name, f"{value} is not positive", "Give 1 or more.")
        if not self.wedge_after_s > 0:
            raise InvalidInput(
                "wedge_after_s", f"{self.wedge_after_s} is not positive", "Give seconds."
            )
        if self.goal_s is not None and not self.goal_s > 0:
            raise InvalidInput("goal_s", f"{self.goal_s} is not positive", "Give seconds.")


@dataclass(frozen=True, slots=True)
class ServiceSnapshot:
    """A service at one moment.

    Attributes:
        load: queued and running pairs.
        requests: admitted requests, those being tokenised included.
        backlog_s: predicted seconds until all of them are scored.
        oldest_s: seconds that the oldest request has been queued; 0 where there is none.
        workers_up: workers that are up.
        workers: all workers, those that start included.
        busy_s: seconds that workers have scored since the service started, summed.
        resident_bytes: memory of each worker.
        scale: measured step time over what the cost model began with.
        drift: step time over what is normal for this machine, see :mod:`echelon.scheduling.drift`.
        drifted: whether that has been far from 1 for long.
        draining: whether no more requests are admitted.
        fallback: whether load is shed, see :mod:`echelon.scheduling.load_shedding`.
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

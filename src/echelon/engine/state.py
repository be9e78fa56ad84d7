"""A service from outside: how it is told to run, and how it is."""

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
"""No step is given up before this: first steps compile, and a machine may swap."""


_COUNTS = (
    "workers",
    "token_budget",
    "max_pairs",
    "max_length",
    "max_query_tokens",
    "fallback_max_length",
)
"""Settings that are whole numbers from 1 on."""


@dataclass(frozen=True, slots=True)
class ServiceSettings:
    """How a service runs; unset values are the model's or the device's own.

    Attributes:
        workers: scorers that share the queue.
        scaling: when there are more or fewer of them; None means never.
        precision: as in :class:`echelon.options.Options`.
        token_budget: most tokens a step may cost.
        max_pairs: most pairs a step may hold.
        max_length: tokens a pair may have unless a request says otherwise.
        truncation: what gives way when a pair is longer.
        max_query_tokens: tokens kept of a query.
        allow: what may be given up when one pair alone does not fit in memory.
        bounds: what is taken in at most.
        memory_limit_bytes: a worker that holds more is replaced between steps.
        wedge_after_s: no step is given up before this.
        goal_s: latency goal; steps are kept below half of it.
        fallback_max_length: tokens that a pair of low priority may have while the queue is long.
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
        load: what waits and runs.
        requests: requests inside, those being tokenised included.
        backlog_s: predicted seconds until all of it is scored.
        oldest_s: how long the oldest request has been in the queue; 0 where there is none.
        workers: workers that are up.
        staff: workers that there are, those that start among them.
        busy_s: seconds that workers have scored since the beginning, in all.
        resident_bytes: memory of each worker.
        scale: actual step time over what the cost model began with.
        drift: step time over what is normal for this machine, see :mod:`echelon.scheduling.drift`.
        drifted: whether it has been so far from 1 for so long that somebody should look.
        draining: whether nothing more is taken in.
        fallback: whether low priority is read shorter, see :mod:`echelon.scheduling.load_shedding`.
    """

    load: QueueLoad
    requests: int
    backlog_s: float
    oldest_s: float
    workers: int
    staff: int
    busy_s: float
    resident_bytes: tuple[int, ...]
    scale: float
    draining: bool
    drift: float = 1.0
    drifted: bool = False
    fallback: bool = False


@dataclass(frozen=True, slots=True)
class Readiness:
    """Whether to send requests here, and why not."""

    ready: bool
    reason: str = ""

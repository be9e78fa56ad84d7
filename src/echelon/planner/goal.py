"""What is asked of a plan, checked. Pure."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from echelon.errors import InvalidInput
from echelon.plan.workload import Fixed
from echelon.simulate.routing import ROUTINGS

if TYPE_CHECKING:
    from echelon.plan.workload import Known, Sizes
    from echelon.simulate.routing import Routing

DOCUMENTS = Fixed(10)
"""Documents of a request where nobody says: what a search page shows."""


@dataclass(frozen=True, slots=True)
class Goal:
    """What is asked of a fleet.

    Attributes:
        slo_s: latency that 99 of 100 requests may have.
        rate: requests a second; None takes the trace's own.
        documents: documents of a request.
        tokens: tokens of a pair; None takes lengths like those the profile was measured with.
        trace: recorded requests.
        routing: who gets a request.
        workers: scorers of a machine, each as fast as the profile's.
        max_length: tokens a pair may have; None takes the profile's own.
        memory_limit_bytes: memory of a worker.
        overhead_s: seconds of a request beside the queue and its steps.
        headroom: share of the rate by which it may rise and the goal still be met.
        price_per_hour: of a machine.
        day: relative rates of equal parts of a day; empty for none.
        seed: of everything random.
    """

    slo_s: float
    rate: float | None = None
    documents: Sizes = DOCUMENTS
    tokens: Sizes | None = None
    trace: tuple[Known, ...] = ()
    routing: Routing = "tokens"
    workers: int = 1
    max_length: int | None = None
    memory_limit_bytes: float | None = None
    overhead_s: float = 0.002
    headroom: float = 0.2
    price_per_hour: float | None = None
    day: tuple[float, ...] = field(default=())
    seed: int = 0

    def __post_init__(self) -> None:
        _above_zero("--slo-p99-ms", self.slo_s, "Give milliseconds, such as 200.")
        if self.rate is None and not self.trace:
            raise InvalidInput("--rate", "is not given", "Give requests a second, or --trace FILE.")
        if self.rate is not None:
            _above_zero("--rate", self.rate, "Give requests a second, such as 500.")
        for name, value in (("--workers", self.workers), ("--max-length", self.max_length)):
            if value is not None and value < 1:
                raise InvalidInput(name, f"{value} is not positive", "Give 1 or more.")
        for name, amount in (
            ("--memory-limit", self.memory_limit_bytes),
            ("--price-per-hour", self.price_per_hour),
        ):
            if amount is not None:
                _above_zero(name, amount, "Give a number above 0, or leave it out.")
        if not 0 <= self.overhead_s < math.inf:
            problem = f"{1000 * self.overhead_s:g} is below 0"
            raise InvalidInput("--overhead-ms", problem, "Give 0 or more.")
        if not 0 <= self.headroom < math.inf:
            problem = f"{100 * self.headroom:g} is below 0"
            raise InvalidInput("--headroom-percent", problem, "Give 0 or more.")
        if self.overhead_s >= self.slo_s:
            raise InvalidInput(
                "--slo-p99-ms",
                f"{1000 * self.slo_s:g} ms are no more than the {1000 * self.overhead_s:g} ms of "
                "--overhead-ms alone",
                "Allow more time.",
            )
        if self.routing not in ROUTINGS:
            raise InvalidInput(
                "--routing", f"{self.routing!r} is unknown", f"One of {', '.join(ROUTINGS)}."
            )


def _above_zero(field_name: str, value: float, remedy: str) -> None:
    if not 0 < value < math.inf:
        raise InvalidInput(field_name, f"{value:g} is not above 0", remedy)

"""The goal of a scenario, and the limits that its settings must hold. Pure."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal, get_args

from echelon.errors import InvalidInput
from echelon.messages import tr
from echelon.simulation.capacity import REQUESTS
from echelon.simulation.service_level import ServiceLevel
from echelon.simulation.workload import (
    ArrivalRecord,
    FixedSize,
    SizeDistribution,
    UniformSize,
    Workload,
    arrivals_of,
)

Scenario = Literal["api", "offline", "edge", "concurrent"]

SCENARIOS: tuple[Scenario, ...] = get_args(Scenario)

AGREEMENT = 0.97
"""Lowest rank agreement (Kendall's τ) with fp32 at full length, as in tuning."""

MIN_REQUESTS = 5
"""A validation with fewer requests says nothing."""

Allowed = Literal["precision", "max_length"]

ALLOWED: tuple[Allowed, ...] = get_args(Allowed)

DOCUMENTS: dict[str, UniformSize | FixedSize] = {
    "api": UniformSize(1, 10),
    "offline": UniformSize(50, 200),
    "edge": UniformSize(1, 10),
    "concurrent": FixedSize(10),
}
"""Documents of a request where the caller does not give them."""

HURRIED = frozenset({"api", "concurrent"})
"""Scenarios with a rate and a latency goal: many independent callers."""


@dataclass(frozen=True, slots=True)
class ScenarioGoal:
    """A scenario and what must hold.

    Attributes:
        goal_s: latency of the service level; None accepts any latency.
        rate: requests a second; None takes the trace's own.
        documents: documents of a request; None takes :data:`DOCUMENTS`.
        tokens: tokens of a pair; None takes lengths like those of the texts.
        memory_limit_bytes: memory of all workers.
        allow: what may change besides the size of a step.
        verify_s: seconds of the validation; 0 leaves it out.
    """

    scenario: Scenario
    goal_s: float | None = None
    rate: float | None = None
    trace: tuple[ArrivalRecord, ...] = ()
    documents: SizeDistribution | None = None
    tokens: SizeDistribution | None = None
    memory_limit_bytes: float | None = None
    allow: tuple[Allowed, ...] = ()
    verify_s: float = 20.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.scenario not in SCENARIOS:
            problem = f"{self.scenario!r} is unknown"
            raise InvalidInput("--scenario", problem, f"One of {', '.join(SCENARIOS)}.")
        _above_zero("--slo-p99-ms", self.goal_s, "Give milliseconds, such as 200.")
        _above_zero("--rate", self.rate, "Give requests a second, such as 5.")
        _above_zero("--memory-limit", self.memory_limit_bytes, "Give MiB, such as 2000.")
        if not 0 <= self.verify_s < math.inf:
            raise InvalidInput("--verify-s", f"{self.verify_s:g} is below 0", "Give 0 or more.")
        for name in self.allow:
            if name not in ALLOWED:
                known = ", ".join(ALLOWED)
                raise InvalidInput("--allow", f"{name!r} is unknown", f"Give some of {known}.")
        self._check_load()

    def _check_load(self) -> None:
        name = self.scenario
        if self.rate is not None and self.trace:
            raise InvalidInput("--rate", "is given with --trace", "Give one of the two.")
        if name in HURRIED:
            if self.goal_s is None:
                problem = tr("is not given, and {name} needs a goal", name=name)
                raise InvalidInput("--slo-p99-ms", problem, "Give milliseconds, such as 200.")
            if self.rate is None and not self.trace:
                problem = tr("is not given, and {name} needs a load", name=name)
                raise InvalidInput(
                    "--rate", problem, tr("Give requests a second, or --trace FILE.")
                )
        elif self.rate is not None:
            why = {"offline": "all documents are there at once", "edge": "one caller asks"}
            raise InvalidInput("--rate", f"{name} has none: {why[name]}", "Leave it out.")
        if name == "offline" and self.goal_s is not None:
            problem = "offline has none: single answers are not waited for"
            raise InvalidInput("--slo-p99-ms", problem, "Leave it out, or choose another scenario.")
        if self.rate is not None and 0 < self.verify_s * self.rate < MIN_REQUESTS:
            problem = f"{self.verify_s * self.rate:g} requests come in {self.verify_s:g} s, too few"
            remedy = f"Give {math.ceil(MIN_REQUESTS / self.rate)} or more, or 0 for no validation."
            raise InvalidInput("--verify-s", problem, remedy)

    @property
    def level(self) -> ServiceLevel:
        """The service level that must hold; without ``goal_s`` any latency is accepted."""
        return ServiceLevel(self.goal_s or math.inf)

    @property
    def sizes(self) -> SizeDistribution:
        """Documents of a request."""
        return DOCUMENTS[self.scenario] if self.documents is None else self.documents

    def traffic(self, tokens: SizeDistribution) -> Workload:
        """The requests, with pairs of these lengths where the trace does not give them."""
        arrivals = arrivals_of(self.rate, self.trace)
        return Workload(arrivals, self.sizes, tokens, self.seed).busiest(REQUESTS)

    def as_dict(self) -> dict[str, Any]:
        """The entry ``asked`` of a recommendation."""
        return {
            "slo_p99_s": self.goal_s,
            "rate": self.rate,
            "trace_requests": len(self.trace),
            "documents": str(self.sizes),
            "tokens": None if self.tokens is None else str(self.tokens),
            "memory_limit_bytes": self.memory_limit_bytes,
            "allow": list(self.allow),
            "verify_s": self.verify_s,
        }


def _above_zero(field: str, value: float | None, remedy: str) -> None:
    if value is not None and not 0 < value < math.inf:
        raise InvalidInput(field, f"{value:g} is not above 0", remedy)


@dataclass(frozen=True, slots=True)
class ScenarioLimits:
    """Limits that every chosen setting holds.

    Attributes:
        goal_s: latency of the service level; ``api`` and ``concurrent`` need one.
        rate: requests a second; ``api`` and ``concurrent`` need one.
        memory_bytes: memory of all workers.
        agreement: lowest rank agreement.
        overhead_s: seconds of a request beside the queue and its steps.
        noise: of step times, see :class:`echelon.simulation.server_simulation.SimulationSettings`.
    """

    goal_s: float | None = None
    rate: float | None = None
    memory_bytes: float | None = None
    agreement: float = AGREEMENT
    overhead_s: float = 0.0
    noise: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("goal_s", "rate", "memory_bytes"):
            _above_zero(name, getattr(self, name), "Give a number above 0.")

    @property
    def level(self) -> ServiceLevel:
        """The service level that must hold; without ``goal_s`` any latency is accepted."""
        return ServiceLevel(self.goal_s or math.inf)

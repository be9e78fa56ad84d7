"""What is asked of a recommendation, checked. Pure."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

from echelon.errors import InvalidInput
from echelon.simulation.capacity import Traffic
from echelon.simulation.service_level import ServiceLevel
from echelon.simulation.workload import FixedSize, PoissonArrivals, UniformSize, Workload
from echelon.tuning.scenario import SCENARIOS

if TYPE_CHECKING:
    from echelon.simulation.workload import KnownArrivals, SizeDistribution
    from echelon.tuning.scenario import Scenario

LEAST_REQUESTS = 5
"""A proof of fewer says nothing."""

Allowed = Literal["precision", "max_length"]

ALLOWED: tuple[Allowed, ...] = get_args(Allowed)

DOCUMENTS: dict[str, UniformSize | FixedSize] = {
    "api": UniformSize(1, 10),
    "offline": UniformSize(50, 200),
    "edge": UniformSize(1, 10),
    "concurrent": FixedSize(10),
}
"""Documents of a request where nobody says."""

HURRIED = frozenset({"api", "concurrent"})
"""Scenarios with a rate and a goal: many callers who do not wait for each other."""


@dataclass(frozen=True, slots=True)
class ScenarioGoal:
    """What for, and what must hold.

    Attributes:
        scenario: what for.
        goal_s: latency that 99 of 100 requests may have.
        rate: requests a second; None takes the trace's own.
        trace: recorded requests.
        documents: documents of a request; None is usual for the scenario.
        tokens: tokens of a pair; None takes lengths like those of the texts.
        memory_limit_bytes: memory of all workers.
        allow: what may change beside the size of a step.
        verify_s: seconds of the proof; 0 does without.
        seed: of everything random.
    """

    scenario: Scenario
    goal_s: float | None = None
    rate: float | None = None
    trace: tuple[KnownArrivals, ...] = ()
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
                problem = f"is not given, and {name} needs a goal"
                raise InvalidInput("--slo-p99-ms", problem, "Give milliseconds, such as 200.")
            if self.rate is None and not self.trace:
                problem = f"is not given, and {name} needs a load"
                raise InvalidInput("--rate", problem, "Give requests a second, or --trace FILE.")
        elif self.rate is not None:
            words = {"offline": "all documents are there at once", "edge": "one caller asks"}
            raise InvalidInput("--rate", f"{name} has none: {words[name]}", "Leave it out.")
        if name == "offline" and self.goal_s is not None:
            problem = "offline has none: nobody waits for a single answer"
            raise InvalidInput("--slo-p99-ms", problem, "Leave it out, or choose another scenario.")

        self._check_proof()

    def _check_proof(self) -> None:
        if self.rate is None or not 0 < self.verify_s * self.rate < LEAST_REQUESTS:
            return
        problem = f"{self.verify_s * self.rate:g} requests come in {self.verify_s:g} s, too few"
        remedy = f"Give {math.ceil(LEAST_REQUESTS / self.rate)} or more, or 0 to do without."
        raise InvalidInput("--verify-s", problem, remedy)

    @property
    def level(self) -> ServiceLevel:
        """The service level that must hold; without ``goal_s`` any latency is accepted."""
        return ServiceLevel(math.inf if self.goal_s is None else self.goal_s)

    @property
    def sizes(self) -> SizeDistribution:
        """Documents of a request."""
        return DOCUMENTS[self.scenario] if self.documents is None else self.documents

    def traffic(self, tokens: SizeDistribution) -> Traffic:
        """The requests, pairs of these lengths where the trace does not say.

        Raises:
            InvalidInput: the trace has no rate.
        """
        workload = Workload(PoissonArrivals(1.0), self.sizes, tokens, self.seed)
        return Traffic.of_trace(workload, self.trace) if self.trace else Traffic(workload)

    def as_dict(self) -> dict[str, Any]:
        """The answer's entry."""
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

"""The plan of a cluster: profile and goal in; machines, budget, headroom and price out. Pure."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any

from echelon.errors import InvalidInput, check_positive
from echelon.messages import tr
from echelon.messages.units import size
from echelon.progress import Progress, no_progress
from echelon.scheduling.fit import STORED_PADDING
from echelon.simulation.capacity import Capacity, no_latency, rates_of, simulate_day
from echelon.simulation.cluster_traffic import ROUTINGS, Routing
from echelon.simulation.fitted_models import cost_of, lengths_of, memory_of, noise_of
from echelon.simulation.server_simulation import SimulationSettings
from echelon.simulation.service_level import (
    ServiceLevel,
    SimulationResult,
    memory_too_small,
    pairs_too_long,
)
from echelon.simulation.workload import ReplayedArrivals, SizeDistribution, Workload, max_tokens

if TYPE_CHECKING:
    from numpy.random import Generator

    from echelon.profile import Profile
    from echelon.scheduling.cost_model import CostModel

SCHEMA = 1
"""Version of the answer's layout, see docs/PLAN.md."""

BUDGETS = {
    "cpu": (256, 512, 1024, 2048, 4096),
    "cuda": (2048, 4096, 8192, 16384, 32768, 65536),
    "mps": (512, 1024, 2048, 4096, 8192),
}
"""Token budgets that are tried beside the profile's own."""

FEW_REQUESTS = 1_000
"""A trace with fewer has less than ten requests beyond its P99."""

MEMORY_MARGIN = 1.05
"""Factor on the needed memory that is named as possible."""

RATES = (0.5, 0.8, 1.25, 1.5, 2.0)
LENGTHS = (0.75, 1.5)
"""Factors on rate and lengths by which the answer's sensitivity is shown."""


@dataclass(frozen=True, slots=True)
class CapacityGoal:
    """The load of a cluster and what must hold.

    Attributes:
        workload: the requests, at their rate; without ``tokens`` their lengths are like those of
            the texts that the profile was measured with.
        workers: workers of a machine, each as fast as the profile's.
        max_length: maximum tokens of a pair; None takes the profile's own.
        memory_limit_bytes: memory of a worker.
        overhead_s: seconds of a request beside the queue and its steps.
        headroom: share of the rate by which it may rise while the level still holds.
        price_per_hour: of a machine.
        day: relative rates of equal parts of a day; empty for none.
    """

    level: ServiceLevel
    workload: Workload
    routing: Routing = "tokens"
    workers: int = 1
    max_length: int | None = None
    memory_limit_bytes: float | None = None
    overhead_s: float = 0.002
    headroom: float = 0.2
    price_per_hour: float | None = None
    day: tuple[float, ...] = field(default=())

    def __post_init__(self) -> None:
        check_positive(
            "Give 1 or more.", **{"--workers": self.workers, "--max-length": self.max_length}
        )
        for name, amount in (
            ("--memory-limit", self.memory_limit_bytes),
            ("--price-per-hour", self.price_per_hour),
        ):
            if amount is not None and not 0 < amount < math.inf:
                problem = f"{amount:g} is not above 0"
                raise InvalidInput(name, problem, "Give a number above 0, or leave it out.")
        for name, amount in (
            ("--overhead-ms", 1000 * self.overhead_s),
            ("--headroom-percent", 100 * self.headroom),
        ):
            if not 0 <= amount < math.inf:
                raise InvalidInput(name, f"{amount:g} is below 0", "Give 0 or more.")
        if self.overhead_s >= self.level.latency_s:
            problem = (
                f"{1000 * self.level.latency_s:g} ms are no more than the "
                f"{1000 * self.overhead_s:g} ms of --overhead-ms alone"
            )
            raise InvalidInput("--slo-p99-ms", problem, "Allow more time.")
        if self.routing not in ROUTINGS:
            problem = f"{self.routing!r} is unknown"
            raise InvalidInput("--routing", problem, f"One of {', '.join(ROUTINGS)}.")

    @property
    def rate(self) -> float:
        """Requests a second."""
        return self.workload.rate or 0.0

    @property
    def needed_rate(self) -> float:
        """Requests a second with the headroom."""
        return self.rate * (1 + self.headroom)


@dataclass(frozen=True, slots=True)
class PlanChoice:
    """A token budget with which the level holds, and how many machines it takes."""

    capacity: Capacity
    machines: int


def make_plan(
    profile: Profile, goal: CapacityGoal, on_progress: Progress = no_progress
) -> dict[str, Any]:
    """Plan a cluster: plain data, described in docs/PLAN.md.

    Raises:
        InvalidInput: no number of machines reaches the goal; it says what is possible instead.
        ProfileError: the profile holds too little to plan with.
    """
    truth, workload = cost_of(profile), _workload(profile, goal)
    tried: list[tuple[Capacity, int | None]] = []
    best: PlanChoice | None = None
    for budget in _budgets(profile, goal):
        on_progress(tr("steps of {budget} tokens", budget=budget))
        settings = SimulationSettings(
            budget,
            max_pairs=profile.settings.batch_size,
            workers=goal.workers,
            request_s=goal.overhead_s,
            noise=noise_of(profile),
            seed=workload.seed,
        )
        capacity = Capacity(workload, truth, settings, goal.level, goal.routing)
        max_machines = math.inf if best is None else best.machines
        machines = capacity.machines(goal.needed_rate, max_machines)
        tried.append((capacity, machines))
        if machines is not None and (best is None or _better(capacity, machines, best, goal.rate)):
            best = PlanChoice(capacity, machines)
    if best is None:
        raise no_latency([capacity for capacity, _ in tried])
    on_progress(tr("what would change the answer"))
    return {
        "schema": SCHEMA,
        "kind": "plan",
        "asked": _asked(goal),
        "model": _model(profile, truth),
        "answer": _answer(best, goal),
        "budgets": [_tried(capacity, machines, goal.rate) for capacity, machines in tried],
        "rates": [
            _changed(best.capacity, goal, goal.rate * f) | {"rate": goal.rate * f} for f in RATES
        ],
        "lengths": [_changed(_scaled(best.capacity, f), goal) | {"lengths": f} for f in LENGTHS],
        "routings": [_routed(best, goal.rate, routing) for routing in ROUTINGS],
        "day": _day(best, goal, on_progress) if goal.day else None,
        "notes": _notes(profile, goal, workload),
    }


def _better(capacity: Capacity, machines: int, best: PlanChoice, rate: float) -> bool:
    """Fewer machines; among as many the lower P99."""
    if machines != best.machines:
        return machines < best.machines
    mine, its = capacity.at(rate, machines), best.capacity.at(rate, machines)
    return mine is not None and its is not None and mine.p99_s < its.p99_s


# What is asked.


def _workload(profile: Profile, goal: CapacityGoal) -> Workload:
    """The goal's workload with lengths of pairs."""
    workload = goal.workload
    tokens = workload.tokens or lengths_of(profile)
    recorded = bool(workload.trace) and all(one.tokens for one in workload.trace)
    if tokens is None and not recorded:
        problem = "the profile does not say how long texts are"
        raise InvalidInput("--tokens", problem, "Give tokens of a pair.")
    limit = goal.max_length or profile.settings.max_length
    asked = max_tokens(workload.tokens, workload.trace)
    if limit is not None and asked > limit:
        raise pairs_too_long(asked, limit)
    return replace(workload, tokens=tokens)


def _budgets(profile: Profile, goal: CapacityGoal) -> list[int]:
    """Budgets to try that fit in memory; the profile's own first, as it was measured best."""
    own = profile.learned_token_budget or profile.settings.token_budget
    usual = BUDGETS[profile.key.device.partition(":")[0]]
    budgets = list(dict.fromkeys([own, *reversed(usual)]))
    memory = memory_of(profile)
    limit = goal.memory_limit_bytes
    if limit is None:
        return budgets
    if memory is None:
        remedy = "Leave it out, or run `echelon tune` on the machine that it is about."
        raise InvalidInput("--memory-limit", "the profile holds no measured memory", remedy)
    max_budget = memory.tokens_within(limit)
    left = [budget for budget in budgets if budget <= max_budget]
    if not left:
        needed = memory.bytes_of(min(budgets))
        raise memory_too_small(
            f"{size(limit)} are less than the {size(memory.fixed_bytes)} that a worker holds and "
            f"the {size(needed)} that its smallest steps need",
            MEMORY_MARGIN * needed,
        )
    return left


# What is answered.


def _asked(goal: CapacityGoal) -> dict[str, Any]:
    return {
        "rate": goal.rate,
        "slo_p99_s": goal.level.latency_s,
        "routing": goal.routing,
        "trace_requests": len(goal.workload.trace),
        "memory_limit_bytes": goal.memory_limit_bytes,
        "overhead_s": goal.overhead_s,
        "headroom": goal.headroom,
        "price_per_hour": goal.price_per_hour,
    }


def _model(profile: Profile, truth: CostModel) -> dict[str, Any]:
    return {
        "model": profile.key.model,
        "device": profile.key.device_name,
        "precision": profile.settings.precision,
        "cost": STORED_PADDING[truth.padding],
        "coefficients": asdict(truth.coefficients),
        "noise": noise_of(profile),
    }


def _answer(best: PlanChoice, goal: CapacityGoal) -> dict[str, Any]:
    capacity, machines, rate = best.capacity, best.machines, goal.rate
    outcome = capacity.at(rate, machines)
    max_rate = capacity.max_rate(machines)
    return {
        "machines": machines,
        "workers": machines * goal.workers,
        "token_budget": capacity.settings.token_budget,
        "load": rate / (machines * capacity.machine_rate),
        "bears_rate": max_rate,
        "headroom": max_rate / rate - 1,
        "predicted": None if outcome is None else outcome.as_dict(),
        **_price(machines, rate, goal),
    }


def _price(machines: int, rate: float, goal: CapacityGoal) -> dict[str, float | None]:
    if goal.price_per_hour is None:
        return {"price_per_hour": None, "price_per_million": None}
    hour = machines * goal.price_per_hour
    return {"price_per_hour": hour, "price_per_million": hour / (rate * 3600) * 1e6}


def _p99(outcome: SimulationResult | None) -> float | None:
    return None if outcome is None else outcome.p99_s


def _tried(capacity: Capacity, machines: int | None, rate: float) -> dict[str, Any]:
    return {
        "token_budget": capacity.settings.token_budget,
        "machines": machines,
        "machine_rate": capacity.machine_rate,
        "p99_s": None if machines is None else _p99(capacity.at(rate, machines)),
    }


def _changed(capacity: Capacity, goal: CapacityGoal, rate: float | None = None) -> dict[str, Any]:
    """The answer for another rate or other machines."""
    rate = goal.rate if rate is None else rate
    machines = capacity.machines(rate * (1 + goal.headroom))
    if machines is None:
        return {"machines": None, "p99_s": None, "price_per_hour": None}
    return {
        "machines": machines,
        "p99_s": _p99(capacity.at(rate, machines)),
        "price_per_hour": _price(machines, rate, goal)["price_per_hour"],
    }


@dataclass(frozen=True, slots=True)
class ScaledSize:
    """Numbers of another distribution times a factor, at least 1."""

    sizes: SizeDistribution
    factor: float

    @property
    def maximum(self) -> int:
        """The largest number, scaled."""
        return max(1, round(self.sizes.maximum * self.factor))

    def draw(self, random: Generator, count: int) -> list[int]:
        """Draw numbers and scale them."""
        return [max(1, round(number * self.factor)) for number in self.sizes.draw(random, count)]


def _scaled(capacity: Capacity, factor: float) -> Capacity:
    """The same machines with longer or shorter pairs."""
    workload = capacity.workload
    if workload.tokens is not None:
        workload = replace(workload, tokens=ScaledSize(workload.tokens, factor))
    if isinstance(workload.arrivals, ReplayedArrivals):
        trace = [
            replace(one, tokens=max(1, round(one.tokens * factor))) if one.tokens else one
            for one in workload.trace
        ]
        workload = replace(workload, arrivals=replace(workload.arrivals, trace=trace))
    return replace(capacity, workload=workload)


def _routed(best: PlanChoice, rate: float, routing: Routing) -> dict[str, Any]:
    """The same machines, routed otherwise, at the simulated load that the answer rests on."""
    capacity = best.capacity
    if routing != capacity.routing:
        capacity = replace(capacity, routing=routing)
    outcome = capacity.at(rate, best.machines)
    return {
        "routing": routing,
        "meets": outcome is not None,
        "p99_s": _p99(outcome),
        "bears_rate": capacity.max_rate(best.machines),
    }


def _day(best: PlanChoice, goal: CapacityGoal, on_progress: Progress) -> dict[str, Any]:
    capacity = best.capacity
    cluster, rates = capacity.cluster(best.machines), rates_of(goal.day, goal.rate)
    day = simulate_day(capacity.workload, rates, capacity.truth, cluster, goal.level, on_progress)
    return day.as_dict()


def _notes(profile: Profile, goal: CapacityGoal, workload: Workload) -> list[str]:
    notes, trace = list(profile.warnings), goal.workload.trace
    measured = profile.data.get("tokens", {}).get("max")
    asked = max_tokens(workload.tokens, trace)
    if measured and asked > measured:
        notes.append(
            f"Pairs of up to {asked} tokens are asked for, and the longest measured had "
            f"{measured}: beyond, times are extrapolated. Tune with such texts (--data)."
        )
    if trace and len(trace) < FEW_REQUESTS:
        few = f"The trace has {len(trace)} requests: too few for a P99."
        notes.append(f"{few} Record at least {FEW_REQUESTS}.")
    if trace and goal.day:
        notes.append("The day has independent callers, not the trace.")
    return notes

"""What is asked of a plan, checked. Pure.

The plan: profile and goal to machines, budget, headroom and price, by simulation.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any

from echelon.errors import InvalidInput
from echelon.scheduling.fit import STORED_PADDING
from echelon.simulation.capacity import Capacity, Traffic, rates_of, simulate_day
from echelon.simulation.cluster_traffic import ROUTINGS
from echelon.simulation.fitted_models import cost_of, lengths_of, memory_of, noise_of
from echelon.simulation.infeasible import too_fast, too_little_memory, too_long
from echelon.simulation.server_simulation import SimulationSettings
from echelon.simulation.workload import FixedSize, PoissonArrivals, ScaledSize, Workload, longest

if TYPE_CHECKING:
    from collections.abc import Callable

    from echelon.profile import Profile
    from echelon.scheduling.cost_model import CostModel
    from echelon.simulation.cluster_traffic import Routing
    from echelon.simulation.service_level import ServiceLevel
    from echelon.simulation.workload import KnownArrivals, SizeDistribution

DOCUMENTS = FixedSize(10)
"""Documents of a request where nobody says: what a search page shows."""


@dataclass(frozen=True, slots=True)
class CapacityGoal:
    """What is asked of a fleet.

    Attributes:
        level: the service level that must hold.
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

    level: ServiceLevel
    rate: float | None = None
    documents: SizeDistribution = DOCUMENTS
    tokens: SizeDistribution | None = None
    trace: tuple[KnownArrivals, ...] = ()
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
        if self.overhead_s >= self.level.latency_s:
            raise InvalidInput(
                "--slo-p99-ms",
                f"{1000 * self.level.latency_s:g} ms are no more than the "
                f"{1000 * self.overhead_s:g} ms of --overhead-ms alone",
                "Allow more time.",
            )
        if self.routing not in ROUTINGS:
            raise InvalidInput(
                "--routing", f"{self.routing!r} is unknown", f"One of {', '.join(ROUTINGS)}."
            )


def _above_zero(field_name: str, value: float, remedy: str) -> None:
    if not 0 < value < math.inf:
        raise InvalidInput(field_name, f"{value:g} is not above 0", remedy)


SCHEMA = 1
"""Version of the answer's layout, see docs/PLAN.md."""

BUDGETS = {
    "cpu": (256, 512, 1024, 2048, 4096),
    "cuda": (2048, 4096, 8192, 16384, 32768, 65536),
}
"""Token budgets that are tried beside the profile's own."""

FEW_REQUESTS = 1_000
"""A trace with fewer has less than ten requests beyond its P99."""

RATES = (0.5, 0.8, 1.25, 1.5, 2.0)
LENGTHS = (0.75, 1.5)
"""By how much rate and lengths may turn out different: what the answer is sensitive to."""


@dataclass(frozen=True, slots=True)
class PlanChoice:
    """A budget that reaches the goal, and how many machines it takes."""

    capacity: Capacity
    machines: int

    @property
    def budget(self) -> int:
        """Its token budget."""
        return self.capacity.setting.token_budget


def make_plan(
    profile: Profile, goal: CapacityGoal, told: Callable[[str], None] = lambda _: None
) -> dict[str, Any]:
    """Plan a fleet.

    Args:
        profile: what was measured.
        goal: what is asked.
        told: called with what is being done.

    Returns:
        Plain data; docs/PLAN.md describes it.

    Raises:
        InvalidInput: no number of machines reaches the goal; it says what is possible instead.
        ProfileError: the profile holds too little to plan with.
    """
    truth, traffic = cost_of(profile), _traffic(profile, goal)
    rate = traffic.trace_rate if goal.rate is None else goal.rate
    budgets = _budgets(profile, goal)
    tried: list[tuple[Capacity, int | None]] = []
    best: PlanChoice | None = None
    for budget in budgets:
        told(f"steps of {budget} tokens")
        capacity = Capacity(
            traffic, truth, _setting(profile, goal, budget), goal.level, goal.routing
        )
        most = math.inf if best is None else best.machines
        machines = capacity.machines(rate * (1 + goal.headroom), most)
        tried.append((capacity, machines))
        if machines is not None and (best is None or _better(capacity, machines, best, rate)):
            best = PlanChoice(capacity, machines)
    if best is None:
        raise too_fast(goal, traffic, [capacity for capacity, _ in tried])
    told("what would change the answer")
    answer = {
        "schema": SCHEMA,
        "kind": "plan",
        "asked": _asked(goal, rate),
        "model": _model(profile, truth),
        "answer": _answer(best, goal, rate),
        "budgets": [_tried(capacity, machines, rate) for capacity, machines in tried],
        "rates": [_at_rate(best, goal, rate * factor) for factor in RATES],
        "lengths": [_at_lengths(best, goal, rate, factor) for factor in LENGTHS],
        "routings": [_routed(best, rate, routing) for routing in ROUTINGS],
        "day": None,
        "notes": _notes(profile, goal, traffic),
    }
    if goal.day:
        answer["day"] = _day(best, goal, rate, told)
    return answer


def _better(capacity: Capacity, machines: int, best: PlanChoice, rate: float) -> bool:
    """Fewer machines; among as many the lower P99."""
    if machines != best.machines:
        return machines < best.machines
    mine, its = capacity.at(rate, machines), best.capacity.at(rate, machines)
    return mine is not None and its is not None and mine.p99_s < its.p99_s


# What is asked.


def _traffic(profile: Profile, goal: CapacityGoal) -> Traffic:
    tokens = goal.tokens or lengths_of(profile)
    told = bool(goal.trace) and all(one.tokens for one in goal.trace)
    if tokens is None and not told:
        raise InvalidInput(
            "--tokens", "the profile does not say how long texts are", "Give tokens of a pair."
        )
    limit = goal.max_length or profile.settings.max_length
    asked = longest(goal.tokens, goal.trace)
    if limit is not None and asked > limit:
        raise too_long(asked, limit)
    workload = Workload(PoissonArrivals(1.0), goal.documents, tokens, goal.seed)
    return Traffic.of_trace(workload, goal.trace) if goal.trace else Traffic(workload)


def _budgets(profile: Profile, goal: CapacityGoal) -> list[int]:
    """Budgets to try that fit in memory; the profile's own first, as it was measured best."""
    own = profile.learned_token_budget or profile.settings.token_budget
    usual = BUDGETS[profile.key.device.partition(":")[0]]
    budgets = list(dict.fromkeys([own, *reversed(usual)]))
    memory = memory_of(profile)
    if goal.memory_limit_bytes is None:
        return budgets
    if memory is None:
        raise InvalidInput(
            "--memory-limit",
            "the profile holds no measured memory",
            "Leave it out, or run `echelon tune` on the machine that it is about.",
        )
    fit = memory.tokens_within(goal.memory_limit_bytes)
    left = [budget for budget in budgets if budget <= fit]
    if not left:
        raise too_little_memory(goal.memory_limit_bytes, memory, min(budgets))
    return left


def _setting(profile: Profile, goal: CapacityGoal, budget: int) -> SimulationSettings:
    return SimulationSettings(
        budget,
        max_pairs=profile.settings.batch_size,
        workers=goal.workers,
        request_s=goal.overhead_s,
        noise=noise_of(profile),
        seed=goal.seed,
    )


# What is answered.


def _asked(goal: CapacityGoal, rate: float) -> dict[str, Any]:
    return {
        "rate": rate,
        "slo_p99_s": goal.level.latency_s,
        "routing": goal.routing,
        "trace_requests": len(goal.trace),
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


def _answer(best: PlanChoice, goal: CapacityGoal, rate: float) -> dict[str, Any]:
    capacity, machines = best.capacity, best.machines
    outcome = capacity.at(rate, machines)
    bears = capacity.bears(machines)
    return {
        "machines": machines,
        "workers": machines * goal.workers,
        "token_budget": best.budget,
        "load": rate / (machines * capacity.most),
        "bears_rate": bears,
        "headroom": bears / rate - 1,
        "predicted": None if outcome is None else outcome.as_dict(),
        **_price(machines, rate, goal),
    }


def _price(machines: int, rate: float, goal: CapacityGoal) -> dict[str, float | None]:
    if goal.price_per_hour is None:
        return {"price_per_hour": None, "price_per_million": None}
    hour = machines * goal.price_per_hour
    return {"price_per_hour": hour, "price_per_million": hour / (rate * 3600) * 1e6}


def _tried(capacity: Capacity, machines: int | None, rate: float) -> dict[str, Any]:
    outcome = None if machines is None else capacity.at(rate, machines)
    return {
        "token_budget": capacity.setting.token_budget,
        "machines": machines,
        "machine_rate": capacity.most,
        "p99_s": None if outcome is None else outcome.p99_s,
    }


def _at_rate(best: PlanChoice, goal: CapacityGoal, rate: float) -> dict[str, Any]:
    machines = best.capacity.machines(rate * (1 + goal.headroom))
    return _changed(best.capacity, machines, goal, rate) | {"rate": rate}


def _at_lengths(best: PlanChoice, goal: CapacityGoal, rate: float, factor: float) -> dict[str, Any]:
    old = best.capacity
    capacity = Capacity(
        _stretched(old.traffic, factor), old.truth, old.setting, old.level, old.routing
    )
    machines = capacity.machines(rate * (1 + goal.headroom))
    return _changed(capacity, machines, goal, rate) | {"lengths": factor}


def _changed(
    capacity: Capacity, machines: int | None, goal: CapacityGoal, rate: float
) -> dict[str, Any]:
    if machines is None:
        return {"machines": None, "p99_s": None, "price_per_hour": None}
    outcome = capacity.at(rate, machines)
    return {
        "machines": machines,
        "p99_s": None if outcome is None else outcome.p99_s,
        "price_per_hour": _price(machines, rate, goal)["price_per_hour"],
    }


def _stretched(traffic: Traffic, factor: float) -> Traffic:
    tokens = traffic.workload.tokens
    trace = [
        replace(one, tokens=max(1, round(one.tokens * factor))) if one.tokens else one
        for one in traffic.trace
    ]
    stretched = None if tokens is None else ScaledSize(tokens, factor)
    return Traffic(replace(traffic.workload, tokens=stretched), trace, traffic.trace_rate)


def _routed(best: PlanChoice, rate: float, routing: Any) -> dict[str, Any]:
    """The same machines, routed otherwise; at the rung of the ladder that the answer rests on."""
    capacity = best.capacity
    if routing != capacity.routing:
        capacity = Capacity(
            capacity.traffic, capacity.truth, capacity.setting, capacity.level, routing
        )
    outcome = capacity.at(rate, best.machines)
    return {
        "routing": routing,
        "meets": outcome is not None,
        "p99_s": None if outcome is None else outcome.p99_s,
        "bears_rate": capacity.bears(best.machines),
    }


def _day(
    best: PlanChoice, goal: CapacityGoal, rate: float, told: Callable[[str], None]
) -> dict[str, Any]:
    capacity = best.capacity
    day = simulate_day(
        capacity.traffic.workload,
        rates_of(goal.day, rate),
        capacity.truth,
        capacity.fleet(best.machines),
        goal.level,
        lambda share: told(f"a day, {100 * share:.0f} %"),
    )
    return day.as_dict()


def _notes(profile: Profile, goal: CapacityGoal, traffic: Traffic) -> list[str]:
    """What to know before trusting the answer."""
    notes = list(profile.warnings)
    measured = profile.data.get("tokens", {}).get("max")
    asked = longest(traffic.workload.tokens, goal.trace)
    if measured and asked > measured:
        notes.append(
            f"Pairs of up to {asked} tokens are asked for, and the longest measured had "
            f"{measured}: beyond, times are extrapolated. Tune with such texts (--data)."
        )
    if goal.trace and len(goal.trace) < FEW_REQUESTS:
        notes.append(
            f"The trace has {len(goal.trace)} requests: too few for a P99. Record at least "
            f"{FEW_REQUESTS}."
        )
    if goal.trace and goal.day:
        notes.append("The day is of callers who know nothing of each other, not of the trace.")
    return notes

"""Scenario, traffic and goal to a setting, by simulation with the real batcher. Pure.

Four scenarios, each with its own measure:

- ``api``: the lowest P99 at the rate asked for, with the fewest workers that meet the goal.
- ``concurrent``: the highest rate under the goal, with the fewest workers that bear the one asked
  for.
- ``offline``: the most documents a second when all are there at once.
- ``edge``: the least memory that keeps nearly the shortest answers.

A candidate is judged by its own cost and memory models and is never chosen where they say that it
misses the goal or a limit. Rising load goes through :mod:`echelon.simulation.outcome`, and workers
come first in every order of choice, so more rate never gives fewer workers.

Where no setting holds the limits: why, and what is possible instead. Pure.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, get_args

from echelon.errors import InvalidInput
from echelon.messages import Message
from echelon.reports.wording import duration, number, size
from echelon.simulation.outcome import RateSearch
from echelon.simulation.service_level import ServiceLevel
from echelon.tuning.simulated_load import SimulatedService

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from echelon.scheduling.cost_model import CostModel, MemoryModel
    from echelon.simulation.capacity import Traffic
    from echelon.simulation.outcome import SimulationResult


Scenario = Literal["api", "offline", "edge", "concurrent"]

SCENARIOS: tuple[Scenario, ...] = get_args(Scenario)

LOADS = (0.1, 0.3, 0.5, 0.6, 0.7, 0.8, 0.9)
"""Shares of what a candidate does at most that are simulated."""

NEARLY = 1.05
"""What is this close to the best is as good: the models know it no better (docs/LOG.md). An edge
machine may answer this much slower than the fastest for less memory."""

AGREEMENT = 0.97
"""Least rank agreement (Kendall's τ) with fp32 at full length, as in tuning."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """A way to run a service on this machine.

    Attributes:
        token_budget: most tokens a step may cost.
        cost: how long steps of one of its workers take, the others running.
        max_pairs: most pairs a step may hold.
        workers: scorers that share the queue.
        threads: CPU threads of each; None where that has no meaning.
        precision: of the forward pass.
        max_length: tokens a pair may have; None leaves all as they are.
        agreement: rank agreement with fp32 at full length.
        memory: of one worker; None where it is not known.
    """

    token_budget: int
    cost: CostModel
    max_pairs: int | None = None
    workers: int = 1
    threads: int | None = None
    precision: str = "fp32"
    max_length: int | None = None
    agreement: float = 1.0
    memory: MemoryModel | None = None

    @property
    def bytes(self) -> float:
        """Memory of all its workers; 0 where it is not known."""
        if self.memory is None:
            return 0.0
        return self.workers * self.memory.bytes_of(self.token_budget)


@dataclass(frozen=True, slots=True)
class ScenarioLimits:
    """What must hold.

    Attributes:
        goal_s: latency that 99 of 100 requests may have; ``api`` and ``concurrent`` need one.
        rate: requests a second; ``api`` and ``concurrent`` need one.
        memory_bytes: memory of all workers.
        agreement: least rank agreement.
        overhead_s: seconds of a request beside the queue and its steps.
        noise: of step times, see :class:`echelon.simulation.server_simulation.SimulationSettings`.
        seed: of everything random.
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
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise InvalidInput(name, f"{value} is not above 0", "Give a number above 0.")

    @property
    def level(self) -> ServiceLevel:
        """The service level that must hold; without ``goal_s`` any latency is accepted."""
        return ServiceLevel(math.inf if self.goal_s is None else self.goal_s)


@dataclass(frozen=True, slots=True)
class TriedCandidate:
    """A candidate as it was judged.

    Attributes:
        candidate: who.
        reason: why it cannot be chosen; None where it can.
        documents_per_s: documents a second when all are there at once; None if not simulated.
        bears: requests a second up to which it meets the goal; None where that was not asked: for
            ``api`` where the goal is met.
        calm: what the simulation found at little load; None if not simulated.
        predicted: what it found at the rate asked for (at the load at or above it); the calm one
            without a rate, and for ``offline`` all at once; None where the goal is missed.
    """

    candidate: Candidate
    reason: str | None = None
    documents_per_s: float | None = None
    bears: float | None = None
    calm: SimulationResult | None = None
    predicted: SimulationResult | None = None


@dataclass(frozen=True, slots=True)
class Recommendation:
    """The setting for a scenario.

    Attributes:
        scenario: which.
        chosen: the candidate, with what is predicted of it.
        measure: name of what was compared.
        value: of the chosen one.
        tried: all candidates, as given.
    """

    scenario: Scenario
    chosen: TriedCandidate
    measure: str
    value: float
    tried: tuple[TriedCandidate, ...]


def solve(
    scenario: Scenario,
    traffic: Traffic,
    models: Sequence[Candidate],
    limits: ScenarioLimits,
    told: Callable[[float], object] = lambda _: None,
) -> Recommendation:
    """Choose.

    Args:
        scenario: what for.
        traffic: what requests are made of; its lengths must be known.
        models: what there is to choose from.
        limits: what must hold.
        told: called with the share of the candidates that is judged.

    Raises:
        InvalidInput: nothing holds the limits; it says what is possible instead.
    """
    _check(scenario, models, limits)
    tried: list[TriedCandidate] = []
    for candidate in models:
        told(len(tried) / len(models))
        tried.append(_try(scenario, traffic, candidate, limits))
    able = [one for one in tried if one.reason is None]
    if not able:
        raise impossible(tried, limits, LOADS[0])
    fastest = min(_calm_s(one) for one in tried if one.calm is not None)
    peers = able if scenario == "offline" else _fewest_workers(able)
    chosen = min(peers, key=lambda one: _turn(scenario, one, peers, fastest))
    measure, value = _measure(scenario, chosen)
    return Recommendation(scenario, chosen, measure, value, tuple(tried))


def _check(scenario: Scenario, models: Sequence[Candidate], limits: ScenarioLimits) -> None:
    if scenario not in SCENARIOS:
        raise InvalidInput(
            "--scenario", f"{scenario!r} is unknown", f"One of {', '.join(SCENARIOS)}."
        )
    if not models:
        raise InvalidInput("models", "there are none", "Give at least one candidate.")
    if scenario in {"api", "concurrent"}:
        for field, value in (("--slo-p99-ms", limits.goal_s), ("--rate", limits.rate)):
            if value is None:
                raise InvalidInput(field, f"{scenario} needs one", "Give it.")


# Judging one candidate.


def _try(
    scenario: Scenario, traffic: Traffic, candidate: Candidate, limits: ScenarioLimits
) -> TriedCandidate:
    if candidate.agreement < limits.agreement:
        problem = f"rank agreement {candidate.agreement:.3f} is below {limits.agreement:.3f}"
        return TriedCandidate(candidate, problem)
    if limits.memory_bytes is not None and candidate.bytes > limits.memory_bytes:
        need, there = size(round(candidate.bytes)), size(round(limits.memory_bytes))
        return TriedCandidate(candidate, f"needs {need} of {there}")
    service = SimulatedService(traffic, candidate, limits)
    full = service.at_once()
    per_s = full.documents / full.duration_s
    if scenario == "offline":
        return TriedCandidate(candidate, None, per_s, None, full, full)
    most = full.requests / full.duration_s
    # The lowest rung says how fast a calm service is, whether or not that is fast enough.
    ladder = RateSearch(lambda load: service.at(load * most, whole=load == LOADS[0]), LOADS)
    if limits.rate is None and scenario == "edge":
        # One caller never makes a queue: how much load it would bear is not asked.
        predicted = ladder.at(LOADS[0])
        reason = None if predicted is not None else "misses the goal with a single caller"
        return TriedCandidate(candidate, reason, per_s, None, ladder.calm, predicted)
    load = LOADS[0] if limits.rate is None else limits.rate / most
    predicted = ladder.at(load)
    reason = bears = None
    if predicted is None:
        bears = ladder.most * most
        reason = f"misses the goal: it bears {number(bears)} requests/s"
    elif scenario != "api":
        bears = ladder.most * most  # an api is chosen by its P99 alone
    return TriedCandidate(candidate, reason, per_s, bears, ladder.calm, predicted)


# Choosing.


def _fewest_workers(able: Sequence[TriedCandidate]) -> list[TriedCandidate]:
    fewest = min(one.candidate.workers for one in able)
    return [one for one in able if one.candidate.workers == fewest]


def _turn(
    scenario: Scenario, one: TriedCandidate, peers: Sequence[TriedCandidate], fastest: float
) -> tuple[float, ...]:
    """What comes first is chosen; ties go to the smaller step.

    Differences of P99 below :data:`NEARLY` are finer than the models: there an api takes what has
    the most in reserve, the most documents a second.
    """
    candidate, per_s = one.candidate, one.documents_per_s or 0.0
    step = (candidate.bytes, candidate.token_budget, candidate.max_pairs or math.inf)
    if scenario == "offline":
        return (-per_s, *step)
    if scenario == "concurrent":
        return (-(one.bears or 0.0), *step)
    if scenario == "edge":
        return (_calm_s(one) > NEARLY * fastest, *step)
    return (_p99_s(one) > NEARLY * min(map(_p99_s, peers)), -per_s, *step)


def _p99_s(one: TriedCandidate) -> float:
    return math.inf if one.predicted is None else one.predicted.p99_s


def _measure(scenario: Scenario, chosen: TriedCandidate) -> tuple[str, float]:
    if scenario == "offline":
        return "documents_per_s", chosen.documents_per_s or 0.0
    if scenario == "concurrent":
        return "bears_rate", chosen.bears or 0.0
    if scenario == "edge":
        return "p50_s", _calm_s(chosen)
    return "p99_s", math.nan if chosen.predicted is None else chosen.predicted.p99_s


def _calm_s(one: TriedCandidate) -> float:
    return math.inf if one.calm is None else one.calm.p50_s


def impossible(
    tried: Sequence[TriedCandidate], limits: ScenarioLimits, calm: float
) -> InvalidInput:
    """Why none of the candidates can be chosen, and the remedy.

    Args:
        tried: all of them.
        limits: what they miss.
        calm: share of the load at which ``calm`` of each was simulated.
    """
    simulated = [one for one in tried if one.calm is not None]
    if simulated:
        return _too_much(simulated, limits, calm)
    agreeing = [one for one in tried if one.candidate.agreement >= limits.agreement]
    if not agreeing:
        best = max(one.candidate.agreement for one in tried)
        return InvalidInput(
            "--allow",
            Message(
                "scenario.no_agreement", {"best": f"{best:.3f}", "asked": f"{limits.agreement:.3f}"}
            ),
            Message("scenario.allow_fp32"),
        )
    least = size(round(min(one.candidate.bytes for one in agreeing)))
    there = size(round(limits.memory_bytes or 0))
    return InvalidInput(
        "--memory-limit",
        Message("scenario.memory_too_small", {"there": there, "count": len(agreeing)}),
        Message("scenario.memory_possible", {"least": least}),
    )


def _too_much(
    simulated: Sequence[TriedCandidate], limits: ScenarioLimits, calm: float
) -> InvalidInput:
    bears = max(one.bears or 0.0 for one in simulated)
    calm_s = min(one.calm.p99_s for one in simulated if one.calm is not None)
    within = ""
    if limits.goal_s is not None:
        within = Message("scenario.within", {"goal": duration(limits.goal_s)})
    if bears:
        return InvalidInput(
            "--rate",
            Message("scenario.rate_too_high", {"rate": number(limits.rate or 0), "within": within}),
            Message("scenario.rate_possible", {"rate": number(bears)}),
        )
    return InvalidInput(
        "--slo-p99-ms",
        Message(
            "scenario.goal_too_short",
            {"within": within, "p99": duration(calm_s), "load": f"{calm:.0%}"},
        ),
        Message("scenario.goal_possible", {"least": duration(1.25 * calm_s)}),
    )

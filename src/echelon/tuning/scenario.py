"""The best settings for a scenario, by simulation with the real batcher. Pure.

Four scenarios, each with its own measure:

- ``api``: the lowest P99 at the rate asked for, with the fewest workers that hold the goal.
- ``concurrent``: the highest rate that holds the goal, with the fewest workers that hold it at the
  rate asked for.
- ``offline``: the highest number of documents a second when all are there at once.
- ``edge``: the least memory with nearly the shortest latency.

A candidate is judged by its own cost and memory models and is never chosen where they say that it
misses the goal or a limit. Workers come first in every order of choice, so more rate never gives
fewer workers.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from echelon.errors import InvalidInput
from echelon.messages import Message
from echelon.messages.units import duration, number, size
from echelon.progress import no_progress
from echelon.simulation.infeasible import (
    latency_too_short,
    memory_too_small,
    ranking_differs,
    rate_too_high,
    within,
)
from echelon.simulation.rate_search import RisingLoad
from echelon.tuning.goal import SCENARIOS
from echelon.tuning.simulated_load import SimulatedService

if TYPE_CHECKING:
    from collections.abc import Sequence

    from echelon.progress import Progress
    from echelon.simulation.outcome import SimulationResult
    from echelon.simulation.workload import Workload
    from echelon.tuning.goal import Scenario, ScenarioLimits
    from echelon.tuning.simulated_load import Candidate

LOADS = (0.1, 0.3, 0.5, 0.6, 0.7, 0.8, 0.9)
"""Loads that are simulated, as shares of a candidate's highest throughput."""

NEARLY = 1.05
"""A value this close to the best is as good: the models are no more exact (docs/LOG.md). An edge
machine may answer this much slower than the fastest for less memory."""


@dataclass(frozen=True, slots=True)
class TriedCandidate:
    """A candidate and how it was judged.

    Attributes:
        candidate: the candidate.
        reason: why it cannot be chosen; None where it can.
        documents_per_s: documents a second when all are there at once; None if not simulated.
        max_rate: requests a second up to which the goal holds; None where it was not searched: for
            ``api`` where the goal holds.
        calm: the result at the lowest load; None if not simulated.
        predicted: the result at the next simulated load at or above the rate asked for; the calm
            one without a rate, and for ``offline`` all at once; None where the goal is missed.
    """

    candidate: Candidate
    reason: str | None = None
    documents_per_s: float | None = None
    max_rate: float | None = None
    calm: SimulationResult | None = None
    predicted: SimulationResult | None = None


@dataclass(frozen=True, slots=True)
class Recommendation:
    """The settings for a scenario.

    Attributes:
        scenario: the scenario.
        chosen: the candidate, with its prediction.
        measure: name of the measure that was compared.
        value: its value for the chosen candidate.
        tried: all candidates, as given.
    """

    scenario: Scenario
    chosen: TriedCandidate
    measure: str
    value: float
    tried: tuple[TriedCandidate, ...]


def solve(
    scenario: Scenario,
    workload: Workload,
    candidates: Sequence[Candidate],
    limits: ScenarioLimits,
    on_progress: Progress = no_progress,
) -> Recommendation:
    """Choose the best candidate for a scenario.

    Args:
        scenario: the scenario.
        workload: the requests; the lengths of their pairs must be known.
        candidates: the settings to choose from.
        limits: what must hold.
        on_progress: called with the number of candidates that are judged.

    Raises:
        InvalidInput: no candidate holds the limits; it says what is possible instead.
    """
    _check(scenario, candidates, limits)
    tried: list[TriedCandidate] = []
    for candidate in candidates:
        on_progress(f"simulating {len(candidates)} settings", len(tried), len(candidates))
        tried.append(_try(scenario, workload, candidate, limits))
    able = [one for one in tried if one.reason is None]
    if not able:
        raise _infeasible(tried, limits)
    fastest = min(_calm_s(one) for one in tried if one.calm is not None)
    peers = able if scenario == "offline" else _fewest_workers(able)
    chosen = min(peers, key=lambda one: _order(scenario, one, peers, fastest))
    measure, value = _measure(scenario, chosen)
    return Recommendation(scenario, chosen, measure, value, tuple(tried))


def _check(scenario: Scenario, candidates: Sequence[Candidate], limits: ScenarioLimits) -> None:
    if scenario not in SCENARIOS:
        raise InvalidInput(
            "--scenario", f"{scenario!r} is unknown", f"One of {', '.join(SCENARIOS)}."
        )
    if not candidates:
        raise InvalidInput("candidates", "there are none", "Give at least one.")
    if scenario in {"api", "concurrent"}:
        for field, value in (("--slo-p99-ms", limits.goal_s), ("--rate", limits.rate)):
            if value is None:
                raise InvalidInput(field, f"{scenario} needs one", "Give it.")


# Judging one candidate.


def _try(
    scenario: Scenario, workload: Workload, candidate: Candidate, limits: ScenarioLimits
) -> TriedCandidate:
    if candidate.agreement < limits.agreement:
        problem = f"rank agreement {candidate.agreement:.3f} is below {limits.agreement:.3f}"
        return TriedCandidate(candidate, problem)
    if limits.memory_bytes is not None and candidate.bytes > limits.memory_bytes:
        problem = f"needs {size(candidate.bytes)} of {size(limits.memory_bytes)}"
        return TriedCandidate(candidate, problem)
    service = SimulatedService(workload, candidate, limits)
    full = service.at_once()
    per_s = full.documents / full.duration_s
    if scenario == "offline":
        return TriedCandidate(candidate, None, per_s, None, full, full)
    throughput = full.requests / full.duration_s
    # The lowest load shows the shortest latency, whether or not that is short enough.
    rising = RisingLoad(lambda load: service.at(load * throughput, whole=load == LOADS[0]), LOADS)
    if limits.rate is None and scenario == "edge":
        # One caller never makes a queue: the highest rate is not searched.
        predicted = rising.at(LOADS[0])
        reason = None if predicted is not None else "misses the goal with a single caller"
        return TriedCandidate(candidate, reason, per_s, None, rising.calm, predicted)
    predicted = rising.at(LOADS[0] if limits.rate is None else limits.rate / throughput)
    reason = max_rate = None
    if predicted is None:
        max_rate = rising.max_load * throughput
        reason = f"misses the goal: it holds up to {number(max_rate)} requests/s"
    elif scenario != "api":  # an api is chosen by its P99 alone
        max_rate = rising.max_load * throughput
    return TriedCandidate(candidate, reason, per_s, max_rate, rising.calm, predicted)


# Choosing.


def _fewest_workers(able: Sequence[TriedCandidate]) -> list[TriedCandidate]:
    fewest = min(one.candidate.workers for one in able)
    return [one for one in able if one.candidate.workers == fewest]


def _order(
    scenario: Scenario, one: TriedCandidate, peers: Sequence[TriedCandidate], fastest: float
) -> tuple[float, ...]:
    """The key by which candidates are ordered, best first; ties go to the smaller step.

    Among P99s that differ by less than :data:`NEARLY`, an api takes the highest throughput.
    """
    candidate, per_s = one.candidate, one.documents_per_s or 0.0
    step = (candidate.bytes, candidate.token_budget, candidate.max_pairs or math.inf)
    if scenario == "offline":
        return (-per_s, *step)
    if scenario == "concurrent":
        return (-(one.max_rate or 0.0), *step)
    if scenario == "edge":
        return (_calm_s(one) > NEARLY * fastest, *step)
    return (_p99_s(one) > NEARLY * min(map(_p99_s, peers)), -per_s, *step)


def _p99_s(one: TriedCandidate) -> float:
    return math.inf if one.predicted is None else one.predicted.p99_s


def _calm_s(one: TriedCandidate) -> float:
    return math.inf if one.calm is None else one.calm.p50_s


def _measure(scenario: Scenario, chosen: TriedCandidate) -> tuple[str, float]:
    if scenario == "offline":
        return "documents_per_s", chosen.documents_per_s or 0.0
    if scenario == "concurrent":
        return "bears_rate", chosen.max_rate or 0.0
    if scenario == "edge":
        return "p50_s", _calm_s(chosen)
    return "p99_s", math.nan if chosen.predicted is None else chosen.predicted.p99_s


def _infeasible(tried: Sequence[TriedCandidate], limits: ScenarioLimits) -> InvalidInput:
    """Why none of the candidates can be chosen, and what is possible."""
    simulated = [one for one in tried if one.calm is not None]
    if simulated:
        return _too_much_load(simulated, limits)
    agreeing = [one for one in tried if one.candidate.agreement >= limits.agreement]
    if not agreeing:
        best = max(one.candidate.agreement for one in tried)
        return ranking_differs(best, limits.agreement)
    values = {"there": size(limits.memory_bytes or 0), "count": len(agreeing)}
    needed = min(one.candidate.bytes for one in agreeing)
    return memory_too_small(Message("scenario.memory_too_small", values), needed)


def _too_much_load(simulated: Sequence[TriedCandidate], limits: ScenarioLimits) -> InvalidInput:
    max_rate = max(one.max_rate or 0.0 for one in simulated)
    if max_rate:
        return rate_too_high(limits.rate or 0.0, max_rate, limits.goal_s)
    p99_s = min(one.calm.p99_s for one in simulated if one.calm is not None)
    values = {"within": within(limits.goal_s), "p99": duration(p99_s), "load": f"{LOADS[0]:.0%}"}
    return latency_too_short(Message("scenario.goal_too_short", values), p99_s)

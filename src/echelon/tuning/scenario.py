"""The best settings for a scenario, by simulation with the real batcher. Pure.

Four scenarios, each with its own measure:

- ``api``: the lowest P99 at the given rate, with the fewest workers that hold the goal.
- ``concurrent``: the highest rate that holds the goal, with the fewest workers that hold it at the
  given rate.
- ``offline``: the highest number of documents a second when all are there at once.
- ``edge``: the least memory with nearly the shortest latency.

A candidate is judged by its own cost and memory models and is never chosen where they say that it
misses the goal or a limit. Workers come first in every order of choice, so more rate never gives
fewer workers.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from itertools import islice
from typing import TYPE_CHECKING, Any

from echelon.errors import InvalidInput
from echelon.messages import Message, tr
from echelon.messages.units import duration, number, size
from echelon.progress import Progress, no_progress
from echelon.simulation.capacity import UNLIMITED
from echelon.simulation.rate_search import RateSearch, RisingLoad, highest
from echelon.simulation.server_simulation import SimulationSettings, simulate
from echelon.simulation.service_level import (
    SimulationResult,
    latency_too_short,
    memory_too_small,
    ranking_differs,
    rate_too_high,
    within,
)
from echelon.tuning.goal import SCENARIOS, Scenario, ScenarioLimits

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from echelon.scheduling.cost_model import CostModel, MemoryModel
    from echelon.scheduling.queue import PlannedStep
    from echelon.simulation.workload import Arrival, Workload

LOADS = (0.1, 0.3, 0.5, 0.6, 0.7, 0.8, 0.9)
"""Loads that are simulated, as shares of a candidate's highest throughput."""

NEARLY = 1.05
"""A value this close to the best is as good: the models are no more exact (docs/LOG.md). An edge
machine may answer this much slower than the fastest for less memory."""

REQUESTS = 2_000
"""Requests of one simulation: the slowest hundredth are twenty, and a simulation takes a third of
a second."""

WARM = 0.1
"""Share of the requests that come before counting begins."""

FULL = 300
"""Requests that are all there at once to find a candidate's highest throughput."""

APART_S = 3600.0
"""Seconds between two requests of a caller who waits for each answer: the first has long ended."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """A way to run a service on this machine.

    Attributes:
        token_budget: tokens a step may cost.
        cost: how long steps of one of its workers take, while the others run.
        max_pairs: pairs a step may hold.
        threads: CPU threads of each worker; None on a GPU.
        max_length: maximum tokens of a pair; None cuts none.
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


class SimulatedService:
    """A simulation of a candidate.

    The batcher does not learn here: step times are those of the cost model, so it would learn only
    noise, and that would take two thirds of a simulation.
    """

    def __init__(self, workload: Workload, candidate: Candidate, limits: ScenarioLimits) -> None:
        self._workload = workload
        self._candidate = candidate
        self._level = limits.level
        self._settings = replace(_settings(candidate, limits), learns=False)

    def at_once(self) -> SimulationResult:
        """The result where all requests are there at once."""
        requests = [replace(one, at_s=0.0) for one in self._requests(1.0, FULL)]
        settings = replace(self._settings, bounds=UNLIMITED, request_s=0.0)
        return simulate(requests, self._candidate.cost, settings)

    def at(self, rate: float, *, whole: bool = True) -> SimulationResult:
        """The result at a rate; without ``whole`` it ends where the goal is missed for certain."""
        return simulate(
            self._requests(rate, REQUESTS),
            self._candidate.cost,
            self._settings,
            level=self._level,
            warm_s=WARM * self._workload.at(rate).span_s(REQUESTS),
            expected=None if whole else REQUESTS,
        )

    def _requests(self, rate: float, count: int) -> Iterator[Arrival]:
        """The first requests, cut to the candidate's maximum length."""
        return cut(islice(self._workload.at(rate).requests(), count), self._candidate.max_length)


def predict(
    scenario: Scenario, requests: Iterable[Arrival], candidate: Candidate, limits: ScenarioLimits
) -> tuple[SimulationResult, int]:
    """Simulate the requests of a validation; return the result and the tokens of the largest step.

    For ``offline`` they are all there at once; for ``edge`` each comes long after the answer to the
    one before; for the others they come at their times.
    """
    settings = _settings(candidate, limits)
    if scenario == "offline":
        settings = replace(settings, bounds=UNLIMITED, request_s=0.0)
        requests = (replace(one, at_s=0.0) for one in requests)
    elif scenario == "edge":
        requests = (replace(one, at_s=APART_S * i) for i, one in enumerate(requests))
    largest = 0

    def look(_: float, step: PlannedStep) -> None:
        nonlocal largest
        largest = max(largest, step.cost_tokens)

    asked = cut(requests, candidate.max_length)
    outcome = simulate(asked, candidate.cost, settings, level=limits.level, on_step=look)
    return outcome, largest


def cut(requests: Iterable[Arrival], max_length: int | None) -> Iterator[Arrival]:
    """Requests whose pairs are cut to ``max_length`` tokens."""
    for request in requests:
        lengths = tuple(min(length, max_length or length) for length in request.lengths)
        yield replace(request, lengths=lengths)


def _settings(candidate: Candidate, limits: ScenarioLimits) -> SimulationSettings:
    return SimulationSettings(
        candidate.token_budget,
        candidate.max_pairs,
        candidate.workers,
        request_s=limits.overhead_s,
        noise=limits.noise,
        seed=limits.seed,
    )


@dataclass(frozen=True, slots=True)
class TriedCandidate:
    """A candidate and how it was judged.

    Attributes:
        reason: why it cannot be chosen; None where it can.
        documents_per_s: with all documents there at once; None if not simulated.
        max_rate: requests a second up to which the goal holds; None where it was not searched: for
            ``api`` where the goal holds.
        calm: the result at the lowest load; None if not simulated.
        predicted: the result at the next simulated load at or above the wanted rate; the calm one
            without a rate, and for ``offline`` all at once; None where the goal is missed.
    """

    candidate: Candidate
    reason: str | None = None
    documents_per_s: float | None = None
    max_rate: float | None = None
    calm: SimulationResult | None = None
    predicted: SimulationResult | None = None


@dataclass(frozen=True, slots=True)
class Recommendation:
    """The settings for a scenario; ``measure`` is the name of the measure that was compared."""

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
    """Choose the best candidate for a scenario; the lengths of the workload's pairs must be known.

    Raises:
        InvalidInput: no candidate holds the limits; it says what is possible instead.
    """
    _check(scenario, candidates, limits)
    tried: list[TriedCandidate] = []
    for candidate in candidates:
        stage = tr("simulating {count} settings", count=len(candidates))
        on_progress(stage, len(tried), len(candidates))
        tried.append(_try(scenario, workload, candidate, limits))
    able = [one for one in tried if one.reason is None]
    if not able:
        raise _infeasible(tried, limits)
    fastest = min(_calm_s(one) for one in tried if one.calm is not None)
    fewest = min(one.candidate.workers for one in able)
    peers = [one for one in able if scenario == "offline" or one.candidate.workers == fewest]
    chosen = min(peers, key=lambda one: _order(scenario, one, peers, fastest))
    measure, value = _measure(scenario, chosen)
    return Recommendation(scenario, chosen, measure, value, tuple(tried))


def _check(scenario: Scenario, candidates: Sequence[Candidate], limits: ScenarioLimits) -> None:
    if scenario not in SCENARIOS:
        problem = f"{scenario!r} is unknown"
        raise InvalidInput("--scenario", problem, f"One of {', '.join(SCENARIOS)}.")
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
    """Say why none of the candidates can be chosen, and what is possible."""
    simulated = [one for one in tried if one.calm is not None]
    if simulated:
        return _too_much_load(simulated, limits)
    agreeing = [one for one in tried if one.candidate.agreement >= limits.agreement]
    if not agreeing:
        return ranking_differs(max(one.candidate.agreement for one in tried), limits.agreement)
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


# The curve of the chosen candidate.

SHARES = (0.2, 0.4, 0.6, 0.7, 0.8, 0.9, 1.0, 1.1, 1.2)
"""Shares of the highest rate that are simulated: closer together where latency rises steeply."""

PRECISION = 0.02
"""Distance of the search's two ends at which it is over, as a share."""


@dataclass(frozen=True, slots=True)
class LoadCurve:
    """A candidate at rising rates; ``max_rate`` is the highest that holds the service level.

    ``requests`` are those of each simulation, its warm-up included.
    """

    requests: int
    max_rate: float | None
    points: tuple[tuple[float, SimulationResult], ...]

    def as_dict(self, rate: float) -> dict[str, Any]:
        """The profile's entry; ``rate`` is the wanted one."""
        return {
            "rate": rate,
            "most_rate": self.max_rate,
            "requests": self.requests,
            "points": [_point(at, outcome) for at, outcome in self.points],
        }


def curve_of(workload: Workload, candidate: Candidate, limits: ScenarioLimits) -> LoadCurve:
    """Simulate a candidate at rates around the highest that holds the service level."""
    service = SimulatedService(workload, candidate, limits)
    full = service.at_once()
    capacity = full.requests / full.duration_s
    # Beyond the highest throughput the queue only grows.
    search = RateSearch(capacity, capacity, PRECISION * capacity, PRECISION)
    max_rate = highest(lambda rate: service.at(rate, whole=False).held, search)
    rates = [share * (max_rate or capacity) for share in SHARES]
    points = tuple((rate, service.at(rate)) for rate in rates)
    return LoadCurve(REQUESTS, max_rate or None, points)


def _point(rate: float, outcome: SimulationResult) -> dict[str, Any]:
    known = outcome.as_dict()
    shown = {name: known[name] for name in ("p50_s", "p95_s", "p99_s", "goodput")}
    refused = sum(outcome.refused.values()) / max(1, outcome.requests)
    return {"rate": rate, **shown, "refused": refused}

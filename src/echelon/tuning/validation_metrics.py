"""What was predicted and what was measured, side by side. Pure."""

from __future__ import annotations

import itertools
import math
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from echelon.scheduling.cost_model import CostModel, Work

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from echelon.simulation.outcome import SimulationResult
    from echelon.simulation.workload import Arrival
    from echelon.tuning.scenario import Candidate, Scenario, ScenarioLimits

AGREES = 0.25
"""Relative difference up to which a measurement agrees with its prediction."""

PACE = (0.1, 10.0)
"""A measured pace beyond is no pace but a fault of the measurement."""

EDGE = 1.5
"""What lies beyond the outermost bounds of a histogram is at most so many times beyond."""

COMPARED = {
    "api": ("p50_s", "p99_s"),
    "concurrent": ("p50_s", "p99_s"),
    "edge": ("p50_s", "p99_s"),
    "offline": ("documents_per_s",),
}
"""Numbers of each scenario that must agree."""


@dataclass(frozen=True, slots=True)
class LoadMetrics:
    """What a setting does, predicted or measured.

    Attributes:
        p50_s: median latency; None where the scenario has none, as the next ones.
        p95_s: 95th percentile.
        p99_s: 99th percentile.
        requests_per_s: requests answered a second.
        documents_per_s: their documents.
        memory_bytes: of all workers at the largest step there was; None where it is not known.
        requests: requests that came.
        missed: those that were refused, failed or, where there is a goal, came late.
    """

    p50_s: float | None
    p95_s: float | None
    p99_s: float | None
    requests_per_s: float
    documents_per_s: float
    memory_bytes: float | None
    requests: int
    missed: int

    @classmethod
    def of(
        cls, scenario: Scenario, outcome: SimulationResult, candidate: Candidate, largest: int
    ) -> LoadMetrics:
        """What a simulation says whose largest step had so many tokens."""
        answered = outcome.answered > 0 and scenario != "offline"
        duration_s = outcome.duration_s
        if scenario == "edge" and outcome.answered:
            duration_s = outcome.mean_s * outcome.answered  # one after another, nobody waits
        memory = candidate.memory
        share = outcome.answered / outcome.requests if outcome.requests else 0.0
        return cls(
            outcome.p50_s if answered else None,
            outcome.p95_s if answered else None,
            outcome.p99_s if answered else None,
            outcome.answered / duration_s if duration_s else 0.0,
            outcome.documents * share / duration_s if duration_s else 0.0,
            None if memory is None else candidate.workers * memory.bytes_of(largest),
            outcome.requests,
            outcome.requests - outcome.within,
        )

    def as_dict(self) -> dict[str, Any]:
        """The answer's entry."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Validation:
    """A setting under load.

    Attributes:
        numbers: what was measured.
        pace: time of its steps over what the cost model says of them.
        overhead_s: seconds of a request beside the queue and its steps; None where there is no
            server.
        held: whether the goal and the limit held.
        doubts: why the numbers may mislead.
        noise: of its steps' times, see
        :class:`echelon.simulation.server_simulation.SimulationSettings`; None where there
            is no server.
    """

    numbers: LoadMetrics
    pace: float
    overhead_s: float | None
    held: bool
    doubts: tuple[str, ...] = ()
    noise: float | None = None


def differences(
    scenario: Scenario, predicted: LoadMetrics, measured: LoadMetrics
) -> dict[str, float]:
    """By how much the measured numbers that matter are off, relative; beside them the memory."""
    found = {}
    for name in (*COMPARED[scenario], "memory_bytes"):
        said, came = getattr(predicted, name), getattr(measured, name)
        if said and came is not None:
            found[name] = came / said - 1
        elif name != "memory_bytes":
            found[name] = float("inf") if said != came else 0.0
    return found


def agree(off: dict[str, float]) -> bool:
    """Whether the prediction held; memory is told, but not corrected for."""
    return all(abs(value) <= AGREES for name, value in off.items() if name != "memory_bytes")


def correct(
    models: Sequence[Candidate],
    limits: ScenarioLimits,
    predicted: LoadMetrics,
    proof: Validation,
    workers: int,
) -> tuple[list[Candidate], ScenarioLimits]:
    """The candidates and limits as the proof showed them: pace, memory, overhead, noise.

    What a worker holds more or less than predicted, it holds whatever the step: libraries,
    tokenizer, products that are kept ready.
    """
    said, came = predicted.memory_bytes, proof.numbers.memory_bytes
    more = (came - said) / workers if said and came else 0.0
    corrected = [
        replace(
            one,
            cost=paced(one.cost, proof.pace),
            memory=one.memory and one.memory.shifted(more),
        )
        for one in models
    ]
    if proof.overhead_s is not None:
        limits = replace(limits, overhead_s=proof.overhead_s)
    if proof.noise is not None:
        limits = replace(limits, noise=proof.noise)
    return corrected, limits


def paced(cost: CostModel, pace: float) -> CostModel:
    """The same model on a machine that takes so many times longer."""
    prices = cost.coefficients
    return CostModel(prices.priced(price * pace for price in prices.prices), cost.padding)


def noise_of_ratios(counts: Mapping[float, float]) -> float | None:
    """Standard deviation of the logarithm of actual over predicted step time.

    Args:
        counts: steps whose ratio was at most so much, by that bound, as Prometheus' histograms
            count them; each is taken for the middle of its interval.

    Returns:
        None without two steps.
    """
    bounds = sorted(counts)
    below = [0.0, *(counts[bound] for bound in bounds[:-1])]
    steps = [counts[bound] - less for bound, less in zip(bounds, below, strict=True)]
    if sum(steps) < 2:  # noqa: PLR2004 - a deviation needs two
        return None
    edges = [bounds[0] / EDGE, *bounds[:-1], bounds[-2] * EDGE]
    middles = [math.log(low * high) / 2 for low, high in itertools.pairwise(edges)]
    mean = sum(n * at for n, at in zip(steps, middles, strict=True)) / sum(steps)
    spread = sum(n * (at - mean) ** 2 for n, at in zip(steps, middles, strict=True)) / sum(steps)
    return math.sqrt(spread)


def squares_share(requests: Sequence[Arrival], most: int | None) -> float:
    """Squared tokens for each token, the requests cut to a length."""
    lengths = [length for one in requests for length in one.lengths]
    lengths = [length if most is None else min(length, most) for length in lengths]
    return sum(length * length for length in lengths) / max(1, sum(lengths))


def pace_of(seconds: float, steps: float, tokens: float, share: float, cost: CostModel) -> float:
    """Time of steps over what a cost model says of them; 1 where nothing was measured.

    Args:
        seconds: that they took.
        steps: how many.
        tokens: that they paid for.
        share: squared tokens for each.
        cost: the model.
    """
    said = cost.seconds(Work(round(steps), round(tokens), round(tokens * share)))
    if not (seconds > 0 and said > 0):
        return 1.0
    return min(max(seconds / said, PACE[0]), PACE[1])

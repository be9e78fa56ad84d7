"""What cannot be had, and what is possible instead. Pure."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from echelon.errors import InvalidInput
from echelon.reports.wording import duration, size
from echelon.simulation.capacity import CELLS, Capacity, Traffic
from echelon.simulation.outcome import RUNGS
from echelon.simulation.workload import FixedSize

if TYPE_CHECKING:
    from collections.abc import Sequence

    from echelon.scheduling.cost_model import MemoryModel
    from echelon.simulation.capacity_plan import CapacityGoal


def too_fast(goal: CapacityGoal, traffic: Traffic, tried: Sequence[Capacity]) -> InvalidInput:
    """No number of machines answers so fast."""
    best = min(tried, key=lambda capacity: capacity.ladder(CELLS[-1]).calm.p99_s)
    calm = best.ladder(CELLS[-1]).calm
    problem = (
        f"no number of machines answers within {_ms(goal.level.latency_s)}: at {RUNGS[0]:.0%} load "
        f"P99 is {_ms(calm.p99_s)} (P50 {_ms(calm.p50_s)}), as one request is scored on one machine"
    )
    pair_s = best.truth.predict([_typical(traffic)]) + goal.overhead_s
    if pair_s > goal.level.latency_s:
        problem += f", and a single pair alone takes {_ms(pair_s)}"
    ways = [f"Possible are {_ms(1.25 * calm.p99_s)} and more"]
    documents = _documents(goal, best)
    if documents:
        ways.append(f"or requests of at most {documents} documents of these lengths")
    ways.append("or a faster machine, or shorter texts")
    return InvalidInput("--slo-p99-ms", problem, ", ".join(ways) + ".")


def too_long(asked: int, limit: int) -> InvalidInput:
    """Pairs are longer than the model takes."""
    return InvalidInput(
        "--tokens",
        f"{asked} are more than the {limit} that a pair may have here",
        f"Give at most {limit}: the rest would be cut, or is read in chunks that count as "
        "documents of their own (--documents).",
    )


def too_little_memory(limit: float, memory: MemoryModel, budget: int) -> InvalidInput:
    """Not even the smallest step fits."""
    need = memory.bytes_of(budget)
    return InvalidInput(
        "--memory-limit",
        f"{_bytes(limit)} are less than the {_bytes(memory.fixed_bytes)} that a worker holds and "
        f"the {_bytes(need)} that its smallest steps need",
        f"Possible are {_bytes(1.05 * need)} and more, a lower precision, or a smaller model.",
    )


def _documents(goal: CapacityGoal, capacity: Capacity) -> int:
    """Documents of a request, the most that meet the goal on a quiet fleet; 0 where none do."""
    if goal.trace:
        return 0
    low, high = 0, 2
    while high < 2**14 and _quiet(goal, capacity, high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if _quiet(goal, capacity, middle) else (low, middle)
    return low


def _quiet(goal: CapacityGoal, capacity: Capacity, documents: int) -> bool:
    workload = replace(capacity.traffic.workload, documents=FixedSize(documents))
    fewer = Capacity(
        Traffic(workload), capacity.truth, capacity.setting, goal.level, capacity.routing
    )
    return fewer.ladder(CELLS[-1]).calm.held


def _typical(traffic: Traffic) -> int:
    tokens = [one.tokens for one in traffic.trace if one.tokens]
    if not tokens and traffic.workload.tokens is not None:
        tokens = traffic.workload.tokens.draw(np.random.default_rng(0), 1000)
    return round(float(np.mean(tokens)))


def _ms(seconds: float) -> str:
    return duration(seconds).replace("\u00a0", " ")


def _bytes(count: float) -> str:
    return size(round(count)).replace("\u00a0", " ")

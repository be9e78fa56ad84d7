"""How many machines a rate needs under a service level, and a day of such a cluster. Pure.

A few sizes of cluster are simulated under rising load. A cluster between two of them is taken to be
as good as the smaller one, and one beyond the largest as good as that: sharing among more machines
only helps. So the number of machines never goes down when the rate goes up.

For a day, a window of each quarter of an hour is simulated request by request. A queue forgets
within seconds while the rate changes over hours, so a window stands for its quarter, and windows of
equal length are a fair sample of the day. This holds only while the cluster keeps up: a quarter
whose queue grows throughout is marked, and its results are lower bounds.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from echelon.errors import InvalidInput
from echelon.messages import tr
from echelon.messages.units import duration
from echelon.progress import Progress, no_progress
from echelon.scheduling.admission import AdmissionLimits
from echelon.simulation.cluster_simulation import (
    Cluster,
    packing_of,
    simulate_cluster,
    tally_cluster,
)
from echelon.simulation.cluster_traffic import RequestBlock, Routing, blocks
from echelon.simulation.rate_search import LOADS, RateSearch, RisingLoad, highest
from echelon.simulation.service_level import (
    ServiceLevel,
    SimulationResult,
    Tally,
    latency_too_short,
    percentiles,
)
from echelon.simulation.workload import (
    FixedSize,
    ObservedSize,
    PoissonArrivals,
    SizeDistribution,
    Workload,
)

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from echelon.scheduling.cost_model import CostModel
    from echelon.simulation.server_simulation import SimulationSettings

CLUSTER_SIZES = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)
"""Machines of the clusters that are simulated."""

REQUESTS = 10_000
"""Requests of one simulation: the slowest hundredth are a hundred."""

WARM = 0.1
"""Share of the requests that come before counting begins."""

FULL = 2_000
"""Requests that are all there at once to find the highest throughput of a machine."""

UNLIMITED = AdmissionLimits(2**31, 2**62, math.inf, 2**31, 2**62)
"""Admission limits that refuse nothing."""


@dataclass(eq=False)
class Capacity:
    """What machines with the same settings can do.

    Attributes:
        workload: its rate is varied; of a long trace the busiest part is simulated.
        truth: how long steps take on one worker.

    Raises:
        InvalidInput: the lengths of pairs are not known.
    """

    workload: Workload
    truth: CostModel
    settings: SimulationSettings
    level: ServiceLevel
    routing: Routing = "tokens"

    def __post_init__(self) -> None:
        self.workload = self.workload.busiest(REQUESTS)
        self._rising: dict[int, RisingLoad] = {}
        self._packing = packing_of(_lengths(self.workload), self.truth, self.settings.token_budget)

    @cached_property
    def machine_rate(self) -> float:
        """The highest throughput of one machine, requests a second."""
        at_once = self.workload.at(1e9)
        settings = replace(self.settings, bounds=UNLIMITED, request_s=0.0, document_s=0.0)
        cluster = replace(self.cluster(1), settings=settings)
        return simulate_cluster(_first(blocks(at_once), FULL), self.truth, cluster).throughput

    def cluster(self, machines: int) -> Cluster:
        """A cluster of such machines."""
        return Cluster(machines, self.settings, self.routing, self._packing)

    def rising_load(self, machines: int) -> RisingLoad:
        """The largest simulated cluster of at most ``machines``, under rising load."""
        simulated = CLUSTER_SIZES[bisect_right(CLUSTER_SIZES, machines) - 1]
        if simulated not in self._rising:
            self._rising[simulated] = RisingLoad(lambda load: self._run(simulated, load))
        return self._rising[simulated]

    @property
    def largest(self) -> RisingLoad:
        """The largest simulated cluster under rising load."""
        return self.rising_load(CLUSTER_SIZES[-1])

    def machines(self, rate: float, max_machines: float = math.inf) -> int | None:
        """The fewest machines for a rate; None where no number up to ``max_machines`` is enough."""
        if not self.largest.calm.held:
            return None
        machines = max(1, math.ceil(rate / (LOADS[-1] * self.machine_rate)))
        while machines < CLUSTER_SIZES[-1]:
            if machines > max_machines:
                return None
            if self.at(rate, machines) is not None:
                return machines
            machines += 1
        max_load = self.largest.max_load
        if not max_load:
            return None
        machines = max(machines, math.ceil(rate / (max_load * self.machine_rate)))
        while self.at(rate, machines) is None:
            machines += 1  # the division was rounded down by a hair
        return machines if machines <= max_machines else None

    def at(self, rate: float, machines: int) -> SimulationResult | None:
        """The result of a cluster at a rate; None where it misses the service level."""
        return self.rising_load(machines).at(rate / (machines * self.machine_rate))

    def max_rate(self, machines: int) -> float:
        """Requests a second up to which a cluster holds the service level."""
        return self.rising_load(machines).max_load * machines * self.machine_rate

    def _run(self, machines: int, load: float) -> SimulationResult:
        workload = self.workload.at(load * machines * self.machine_rate)
        requests = _first(blocks(workload), REQUESTS)
        warm_s = WARM * workload.span_s(REQUESTS)
        cluster = self.cluster(machines)
        return simulate_cluster(requests, self.truth, cluster, level=self.level, warm_s=warm_s)


def _lengths(workload: Workload) -> SizeDistribution:
    recorded = [one.tokens for one in workload.trace if one.tokens]
    if recorded:
        return ObservedSize(recorded)
    if workload.tokens is None:
        raise InvalidInput("tokens", "the lengths of pairs are not known", "Give them.")
    return workload.tokens


def _first(requests: Iterator[RequestBlock], count: int) -> Iterator[RequestBlock]:
    for block in requests:
        yield block.first(count)
        count -= len(block.at_s)
        if count <= 0:
            return


def no_latency(tried: Sequence[Capacity]) -> InvalidInput:
    """The error where no number of machines answers within the latency."""
    best = min(tried, key=lambda capacity: capacity.largest.calm.p99_s)
    calm, latency_s = best.largest.calm, best.level.latency_s
    problem = (
        f"no number of machines answers within {duration(latency_s)}: at {LOADS[0]:.0%} load P99 "
        f"is {duration(calm.p99_s)} (P50 {duration(calm.p50_s)}), as one request is scored on one "
        "machine"
    )
    pair_s = best.truth.predict([_mean_tokens(best.workload)]) + best.settings.request_s
    if pair_s > latency_s:
        problem += f", and a single pair alone takes {duration(pair_s)}"
    remedy = "or a faster machine, or shorter texts"
    documents = _max_documents(best)
    if documents:
        remedy = f"or requests of at most {documents} documents of these lengths, {remedy}"
    return latency_too_short(problem, calm.p99_s, remedy)


def _max_documents(capacity: Capacity) -> int:
    """The largest number of documents with which the level holds at little load; 0 for none."""
    if capacity.workload.trace:
        return 0

    def holds(documents: float) -> bool:
        workload = replace(capacity.workload, documents=FixedSize(int(documents)))
        return replace(capacity, workload=workload).largest.calm.held

    search = RateSearch(2, max_rate=2**14, min_rate=1, precision=1e-9, whole=True)
    return int(highest(holds, search))


def _mean_tokens(workload: Workload) -> int:
    tokens = [one.tokens for one in workload.trace if one.tokens]
    if not tokens and workload.tokens is not None:
        tokens = workload.tokens.draw(np.random.default_rng(0), 1000)
    return round(float(np.mean(tokens)))


# A day.

DAY_S = 86_400.0
PARTS = 96

WARM_S, WINDOW_S = 4.0, 8.0
"""Seconds of each quarter that are simulated before counting begins, and while it counts: a cluster
at 90 % load that takes 0.1 s a request forgets its start in about a second."""

OVERFULL = 0.98
"""Utilisation above which a cluster no longer keeps up."""

TYPICAL = (
    *(0.35, 0.28, 0.24, 0.22, 0.22, 0.26, 0.36, 0.52),
    *(0.72, 0.88, 0.96, 0.98, 0.92, 0.95, 1.00, 0.99),
    *(0.96, 0.90, 0.84, 0.80, 0.76, 0.68, 0.56, 0.44),
)
"""Rates of a day's hours over the largest, where callers work by day: an assumption, not a
measurement."""


@dataclass(frozen=True, slots=True)
class DayPart:
    """A quarter of an hour that starts ``start_s`` seconds after midnight.

    ``rate`` is in requests a second, and ``overfull`` says that the cluster did not keep up.
    """

    start_s: float
    rate: float
    overfull: bool
    outcome: SimulationResult


@dataclass(frozen=True, slots=True)
class DayResult:
    """A day of a cluster; percentiles and shares are of all its requests.

    Attributes:
        requests: requests of the day.
        simulated: the number of them that were simulated and counted.
        p50_s: NaN where nothing was answered, as the next ones.
        missed: share that was not answered within the service level's latency.
        refused: share that was refused.
        utilisation: mean share of the time that workers ran.
        overfull_s: seconds of the day in which the cluster did not keep up.
    """

    requests: int
    simulated: int
    p50_s: float
    p95_s: float
    p99_s: float
    missed: float
    refused: float
    utilisation: float
    overfull_s: float
    parts: tuple[DayPart, ...]

    def as_dict(self) -> dict[str, Any]:
        """Plain data; None where there is no latency."""
        parts = [asdict(part) | {"outcome": part.outcome.as_dict()} for part in self.parts]
        content = asdict(self) | {"parts": parts}
        return {k: None if v != v else v for k, v in content.items()}  # noqa: PLR0124 - NaN


def rates_of(shape: Sequence[float], peak: float) -> list[float]:
    """Requests a second in each quarter of an hour, by straight lines between given rates.

    ``shape`` holds relative rates at equal distances over a day, the first at midnight; where it is
    largest the rate is ``peak``.

    Raises:
        InvalidInput: the shape is empty, negative or zero throughout.
    """
    if not shape or not all(0 <= factor < np.inf for factor in shape) or not max(shape):
        raise InvalidInput("day", f"{list(shape)} is no shape", "Give factors such as 0.2,0.5,1.")
    given = np.arange(len(shape) + 1) / len(shape)
    factors = np.array([*shape, shape[0]]) / max(shape)
    rates: list[float] = (peak * np.interp(np.arange(PARTS) / PARTS, given, factors)).tolist()
    return rates


def simulate_day(
    workload: Workload,
    rates: Sequence[float],
    truth: CostModel,
    cluster: Cluster,
    level: ServiceLevel = ServiceLevel(),  # noqa: B008 - frozen
    on_progress: Progress = no_progress,
) -> DayResult:
    """Simulate a day of a cluster.

    ``rates`` are the requests a second in each quarter of an hour, see :func:`rates_of`. Requests
    have the workload's documents and lengths and come independently of each other.
    """
    workers, part_s = cluster.replicas * cluster.settings.workers, DAY_S / len(rates)
    parts: list[DayPart] = []
    latencies: list[np.ndarray[Any, np.dtype[np.float64]]] = []
    for number, rate in enumerate(rates):
        share = f"{100 * number / len(rates):.0f}"
        on_progress(tr("a day, {share} %", share=share), number, len(rates))
        if rate <= 0:
            continue
        window = replace(workload, arrivals=PoissonArrivals(rate), seed=workload.seed + number)
        tally = Tally(level, WARM_S)
        tally_cluster(blocks(window, WARM_S + WINDOW_S), truth, cluster, tally)
        outcome = tally.outcome(workers)
        overfull = outcome.utilisation > OVERFULL
        parts.append(DayPart(number * part_s, rate, overfull, outcome))
        latencies.append(np.array(tally.latencies))
    p50, p95, p99 = percentiles(np.concatenate([np.zeros(0), *latencies]))
    outcomes = [part.outcome for part in parts]
    simulated = sum(outcome.requests for outcome in outcomes)
    within = sum(outcome.within for outcome in outcomes)
    refused = sum(sum(outcome.refused.values()) for outcome in outcomes)
    return DayResult(
        requests=round(sum(part.rate for part in parts) * part_s),
        simulated=simulated,
        p50_s=p50,
        p95_s=p95,
        p99_s=p99,
        missed=(simulated - within) / max(1, simulated),
        refused=refused / max(1, simulated),
        utilisation=sum(outcome.utilisation for outcome in outcomes) / len(rates),
        overfull_s=sum(part.overfull for part in parts) * part_s,
        parts=tuple(parts),
    )

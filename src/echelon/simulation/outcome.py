"""The result of a simulation, and the counts that lead to it. Pure."""

from __future__ import annotations

import math
from array import array
from collections import Counter
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from echelon.simulation.service_level import ServiceLevel

if TYPE_CHECKING:
    from collections.abc import Sequence


@dataclass(frozen=True, slots=True)
class SimulationResult:
    """A simulated run, without the requests of its warm-up.

    Attributes:
        requests: requests that arrived.
        documents: their documents.
        answered: answered requests.
        refused: refused requests, by the reason's name.
        expired: requests whose deadline passed.
        within: requests answered within the service level's latency.
        duration_s: from the end of the warm-up to the last arrival or end of a step.
        p50_s: median latency of the answered; NaN where there is none, as the next four.
        p95_s: their 95th percentile.
        p99_s: their 99th percentile.
        mean_s: their mean.
        longest_s: their maximum.
        utilisation: share of the time that workers ran, over the whole run.
        steps: steps of the whole run.
        step_pairs: mean pairs of a step.
        step_tokens: mean tokens of a step.
        level: the service level that requests were counted by.
    """

    requests: int
    documents: int
    answered: int
    refused: dict[str, int]
    expired: int
    within: int
    duration_s: float
    p50_s: float
    p95_s: float
    p99_s: float
    mean_s: float
    longest_s: float
    utilisation: float
    steps: int
    step_pairs: float
    step_tokens: float
    level: ServiceLevel

    @property
    def held(self) -> bool:
        """Whether the service level held."""
        return self.level.held(self.requests, self.answered, self.within)

    @property
    def missed(self) -> float:
        """Share of all requests that were not answered in time."""
        return 1.0 - self.within / self.requests if self.requests else 0.0

    @property
    def throughput(self) -> float:
        """Requests answered a second."""
        return self.answered / self.duration_s if self.duration_s else 0.0

    @property
    def goodput(self) -> float:
        """Requests answered in time, a second."""
        return self.within / self.duration_s if self.duration_s else 0.0

    def as_dict(self) -> dict[str, Any]:
        """Plain data; None where there is no latency."""
        content = asdict(self) | {
            "missed": self.missed,
            "throughput": self.throughput,
            "goodput": self.goodput,
        }
        del content["level"]
        return {k: None if v != v else v for k, v in content.items()}  # noqa: PLR0124 - NaN


@dataclass(slots=True)
class Tally:
    """Counts while a simulation runs.

    Attributes:
        level: what counts as answered in time.
        warm_s: seconds of the warm-up, whose requests are not counted.
    """

    level: ServiceLevel = ServiceLevel()  # noqa: RUF009 - frozen
    warm_s: float = 0.0
    requests: int = 0
    documents: int = 0
    late: int = 0
    expired: int = 0
    refused: Counter[str] = field(default_factory=Counter)
    latencies: array[float] = field(default_factory=lambda: array("d"))
    last_s: float = 0.0
    busy_s: float = 0.0
    steps: int = 0
    pairs: float = 0.0
    tokens: float = 0.0

    def arrive(self, at_s: float, documents: int) -> None:
        """Count a request."""
        self.last_s = max(self.last_s, at_s)
        if at_s >= self.warm_s:
            self.requests += 1
            self.documents += documents

    def refuse(self, at_s: float, reason: str) -> None:
        """Count the refusal of the request that came at ``at_s``."""
        if at_s >= self.warm_s:
            self.refused[reason] += 1

    def expire(self, at_s: float) -> None:
        """Count the missed deadline of the request that came at ``at_s``."""
        if at_s >= self.warm_s:
            self.expired += 1

    def answer(self, at_s: float, now: float) -> None:
        """Count the answer at ``now`` to the request that came at ``at_s``."""
        self.last_s = max(self.last_s, now)
        if at_s >= self.warm_s:
            self.latencies.append(now - at_s)
            self.late += now - at_s > self.level.latency_s

    def lost(self, requests: int) -> bool:
        """Whether the level is missed over ``requests`` requests, however the rest end."""
        return self.level.missed(requests, self.expired + self.refused.total(), self.late)

    def ran(self, pairs: float, tokens: float, seconds: float, end_s: float) -> None:
        """Count a step that ended at ``end_s``."""
        self.last_s = max(self.last_s, end_s)
        self.steps += 1
        self.pairs += pairs
        self.tokens += tokens
        self.busy_s += seconds

    def outcome(self, workers: int) -> SimulationResult:
        """The result of the run."""
        latencies = np.frombuffer(self.latencies) if self.latencies else np.zeros(0)
        p50, p95, p99 = percentiles(latencies)
        return SimulationResult(
            requests=self.requests,
            documents=self.documents,
            answered=len(latencies),
            refused=dict(self.refused),
            expired=self.expired,
            within=self.level.within(latencies),
            duration_s=max(0.0, self.last_s - self.warm_s),
            p50_s=p50,
            p95_s=p95,
            p99_s=p99,
            mean_s=float(latencies.mean()) if len(latencies) else math.nan,
            longest_s=float(latencies.max()) if len(latencies) else math.nan,
            utilisation=self.busy_s / (workers * self.last_s) if self.last_s else 0.0,
            steps=self.steps,
            step_pairs=self.pairs / self.steps if self.steps else 0.0,
            step_tokens=self.tokens / self.steps if self.steps else 0.0,
            level=self.level,
        )


def percentiles(latencies: Sequence[float] | np.ndarray[Any, Any]) -> tuple[float, float, float]:
    """P50, P95 and P99, each a latency that occurred; NaN where there is none."""
    if not len(latencies):
        return math.nan, math.nan, math.nan
    found = np.percentile(latencies, [50, 95, 99], method="inverted_cdf")
    return float(found[0]), float(found[1]), float(found[2])

"""A service level, the result of a simulation that it judges, and goals out of reach. Pure.

:meth:`ServiceLevel.held` is the one rule for "the goal held", for simulations (`echelon plan`,
`echelon tune --scenario`) and measurements (`echelon stress`, the validation of a scenario); see
docs/decisions/0013.
"""

from __future__ import annotations

import math
from array import array
from collections import Counter
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from echelon.errors import InvalidInput
from echelon.messages import Message
from echelon.messages.units import duration, number, size

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy.typing as npt

PERCENTILE = 99.0

MAX_FAILURES = 0.001


@dataclass(frozen=True, slots=True)
class ServiceLevel:
    """How fast requests must be answered, and how many may fail.

    Attributes:
        latency_s: seconds within which a request must be answered; infinite where only failures
            count.
        percentile: per cent of all requests that must be answered within ``latency_s``.
        max_failures: share of all requests that may be refused, time out, fail, or be answered
            wrongly. They also count as not answered in time.
    """

    latency_s: float = math.inf
    percentile: float = PERCENTILE
    max_failures: float = MAX_FAILURES

    def __post_init__(self) -> None:
        if not self.latency_s > 0:
            problem = f"{1000 * self.latency_s:g} ms is not above 0"
            raise InvalidInput("latency_s", problem, "Give seconds, such as 0.2.")
        if not 0 < self.percentile <= 100:  # noqa: PLR2004 - per cent
            problem = f"{self.percentile:g} is not within 0 and 100"
            raise InvalidInput("percentile", problem, "Give per cent, such as 99.")
        if not 0 <= self.max_failures <= 1:
            problem = f"{self.max_failures:g} is not within 0 and 1"
            raise InvalidInput("max_failures", problem, "Give a share, such as 0.001.")

    @property
    def max_missed(self) -> float:
        """Share of all requests that may fail or be answered late."""
        return round(1 - self.percentile / 100, 9)  # 1 - 0.99 is above 0.01 in binary

    def within(self, latencies: npt.ArrayLike) -> int:
        """Count the latencies, in seconds, that are within the limit."""
        return int((np.asarray(latencies) <= self.latency_s).sum())

    def held(self, requests: int, answered: int, within: int) -> bool:
        """Whether the goal held for these counts of requests; without requests it did not."""
        failed, late = requests - answered, answered - within
        return requests > 0 and not self.missed(requests, failed, late)

    def missed(self, requests: int, failed: int, late: int) -> bool:
        """Whether these failed and late requests miss the goal, however the others end."""
        # Divided, not multiplied: 0.01 × 2,900 need not be 29 in binary, 29 / 2,900 is 0.01.
        sent = max(1, requests)
        return failed / sent > self.max_failures or (failed + late) / sent > self.max_missed


@dataclass(frozen=True, slots=True)
class SimulationResult:
    """A simulated run: counts and latencies without the warm-up's requests.

    Attributes:
        refused: refused requests, by the reason's name.
        within: requests answered within the service level's latency.
        duration_s: from the end of the warm-up to the last arrival or end of a step.
        p50_s: of the answered requests; NaN where there is none, as the next four.
        utilisation: share of the time that workers ran, over the whole run, as are the steps.
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
        content = asdict(self)
        del content["level"]
        content |= {name: getattr(self, name) for name in ("missed", "throughput", "goodput")}
        return {k: None if v != v else v for k, v in content.items()}  # noqa: PLR0124 - NaN


@dataclass(slots=True)
class Tally:
    """Counts while a simulation runs; requests that came before ``warm_s`` are not counted."""

    level: ServiceLevel = ServiceLevel()
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
        """Count the expiry of the request that came at ``at_s``."""
        if at_s >= self.warm_s:
            self.expired += 1

    def answer(self, at_s: float, now: float) -> None:
        """Count the answer at ``now`` to the request that came at ``at_s``."""
        self.last_s = max(self.last_s, now)
        if at_s >= self.warm_s:
            self.latencies.append(now - at_s)
            self.late += now - at_s > self.level.latency_s

    def lost(self, requests: int) -> bool:
        """Whether ``requests`` requests already miss the level, however the rest end."""
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
    p50, p95, p99 = np.percentile(latencies, [50, 95, 99], method="inverted_cdf").tolist()
    return p50, p95, p99


# Errors for goals that cannot be reached: the flag, the limit, and what is possible instead.

LATENCY_MARGIN = 1.25
"""Factor on a simulated P99: it is named as possible, so it has to hold with other requests too."""


def latency_too_short(problem: str, p99_s: float, remedy: str | None = None) -> InvalidInput:
    """No setting answers within the latency of the service level; the shortest P99 was ``p99_s``.

    ``remedy`` says what is possible besides a longer latency; None names fewer and shorter
    documents.
    """
    least = duration(LATENCY_MARGIN * p99_s)
    possible = f"Possible are {least} or more, {remedy}."
    if remedy is None:
        possible = Message("scenario.goal_possible", {"least": least})
    return InvalidInput("--slo-p99-ms", problem, possible)


def rate_too_high(rate: float, possible: float, latency_s: float | None) -> InvalidInput:
    """This machine answers fewer requests a second within the latency."""
    return InvalidInput(
        "--rate",
        Message("scenario.rate_too_high", {"rate": number(rate), "within": within(latency_s)}),
        Message("scenario.rate_possible", {"rate": number(possible)}),
    )


def within(latency_s: float | None) -> str:
    """The part of a sentence that names the latency; empty without one."""
    return Message("scenario.within", {"goal": duration(latency_s)}) if latency_s else ""


def memory_too_small(problem: str, needed_bytes: float) -> InvalidInput:
    """No setting fits into the memory; the smallest setting needs ``needed_bytes``."""
    possible = Message("scenario.memory_possible", {"least": size(needed_bytes)})
    return InvalidInput("--memory-limit", problem, possible)


def pairs_too_long(asked: int, limit: int) -> InvalidInput:
    """Pairs are longer, in tokens, than the model takes."""
    return InvalidInput(
        "--tokens",
        f"{asked} are more than the {limit} that a pair may have here",
        f"Give at most {limit}: the rest would be cut, or is read in chunks that count as "
        "documents of their own (--documents).",
    )


def ranking_differs(best: float, asked: float) -> InvalidInput:
    """No setting's rank agreement with fp32 is high enough."""
    values = {"best": f"{best:.3f}", "asked": f"{asked:.3f}"}
    return InvalidInput(
        "--allow", Message("scenario.no_agreement", values), Message("scenario.allow_fp32")
    )

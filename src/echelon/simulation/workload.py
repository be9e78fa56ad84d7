"""A workload: when requests come, with how many documents, and how long their pairs are. Pure.

The same seed gives the same requests. A load generator sends them, a simulation counts them. All
are streams, so a day of traffic needs no memory. Times, documents and lengths have a random
generator each: workloads that differ only in their documents have the same arrivals.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import count
from typing import TYPE_CHECKING, Protocol, Self

import numpy as np

from echelon.errors import InvalidInput, check_positive

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from numpy.random import Generator

BLOCK = 1024
"""Random numbers drawn at a time: one by one they cost a microsecond each."""


@dataclass(frozen=True, slots=True)
class Arrival:
    """A request that comes ``at_s`` seconds from the start.

    ``lengths`` are the tokens of each of its pairs; empty where the workload leaves them open.
    """

    at_s: float
    documents: int
    lengths: tuple[int, ...] = ()


class SizeDistribution(Protocol):
    """A distribution of whole numbers from 1 on: documents of a request or tokens of a pair."""

    @property
    def maximum(self) -> int:
        """The largest number that it gives."""
        ...

    def draw(self, random: Generator, count: int) -> list[int]:
        """Draw independent numbers."""
        ...


@dataclass(frozen=True, slots=True)
class FixedSize:
    """Always the same number."""

    value: int

    def __post_init__(self) -> None:
        check_positive(value=self.value)

    @property
    def maximum(self) -> int:
        """The number."""
        return self.value

    def draw(self, random: Generator, count: int) -> list[int]:
        """Repeat the number."""
        del random
        return [self.value] * count

    def __str__(self) -> str:
        return str(self.value)


@dataclass(frozen=True, slots=True)
class UniformSize:
    """Whole numbers from ``low`` to ``high``, both included, equally often."""

    low: int
    high: int

    def __post_init__(self) -> None:
        check_positive(low=self.low)
        if self.high < self.low:
            raise InvalidInput("high", f"{self.high} is below {self.low}", "Give the larger last.")

    @property
    def maximum(self) -> int:
        """The upper end."""
        return self.high

    def draw(self, random: Generator, count: int) -> list[int]:
        """Draw numbers of the range."""
        drawn: list[int] = random.integers(self.low, self.high, count, endpoint=True).tolist()
        return drawn

    def __str__(self) -> str:
        return f"{self.low}-{self.high}"


@dataclass(frozen=True, slots=True)
class LognormalSize:
    """Numbers whose logarithms are normal, as lengths of texts roughly are.

    Attributes:
        mean: mean before rounding and limits.
        sigma: standard deviation of the logarithms; 0 gives the mean each time.
        maximum: larger numbers are set to it, as a model cuts texts that are too long.
    """

    mean: float
    sigma: float
    maximum: int

    def __post_init__(self) -> None:
        if not 1 <= self.mean < math.inf:
            raise InvalidInput("mean", f"{self.mean} is not 1 or more", "Give a finite number.")
        if not 0 <= self.sigma < math.inf:
            raise InvalidInput("sigma", f"{self.sigma} is not 0 or more", "Give a finite number.")
        check_positive(maximum=self.maximum)

    def draw(self, random: Generator, count: int) -> list[int]:
        """Draw numbers from 1 to ``maximum``."""
        # The mean of a lognormal is exp(mu + sigma² / 2).
        mu = math.log(self.mean) - self.sigma**2 / 2
        drawn = np.rint(random.lognormal(mu, self.sigma, count))
        numbers: list[int] = np.clip(drawn, 1, self.maximum).astype(np.int64).tolist()
        return numbers


@dataclass(frozen=True, slots=True)
class ObservedSize:
    """Observed numbers, each as often as it was observed."""

    values: Sequence[int]

    def __post_init__(self) -> None:
        if not len(self.values):
            raise InvalidInput("values", "there are none", "Give at least one number.")
        check_positive(values=min(self.values))

    @property
    def maximum(self) -> int:
        """The largest observed number."""
        return max(self.values)

    def draw(self, random: Generator, count: int) -> list[int]:
        """Draw observed numbers with replacement."""
        return [int(self.values[index]) for index in random.integers(len(self.values), size=count)]


def sizes_of(text: str, field: str) -> SizeDistribution:
    """Parse sizes such as ``10`` or ``5-50``; an InvalidInput names the option ``field``."""
    low, dash, high = text.strip().partition("-")
    try:
        return UniformSize(int(low), int(high)) if dash else FixedSize(int(low))
    except ValueError as error:
        problem = f"{text!r} is no whole number from 1 on and no range of them"
        raise InvalidInput(field, problem, "Give one such as 10 or 5-50.") from error


def max_tokens(sizes: SizeDistribution | None, trace: Iterable[ArrivalRecord] = ()) -> int:
    """The largest number of tokens of a pair; 0 where it is not known."""
    recorded = max((one.tokens or 0 for one in trace), default=0)
    return max(recorded, 0 if sizes is None else sizes.maximum)


@dataclass(frozen=True, slots=True)
class ArrivalRecord:
    """A request that comes ``at_s`` seconds from the start.

    A trace also gives its documents and the tokens of each of its pairs; None leaves them to the
    workload.
    """

    at_s: float
    documents: int | None = None
    tokens: int | None = None


class Arrivals(Protocol):
    """When requests come."""

    @property
    def rate(self) -> float | None:
        """Requests a second; None where it is not known."""
        ...

    def at(self, rate: float) -> Arrivals:
        """The same kind of arrivals at another rate."""
        ...

    def records(self, random: Generator) -> Iterator[ArrivalRecord]:
        """Requests in order of time."""
        ...


@dataclass(frozen=True, slots=True)
class _RateArrivals:
    rate: float

    def __post_init__(self) -> None:
        _positive("rate", self.rate)

    def at(self, rate: float) -> Self:
        """Arrivals at another rate."""
        return replace(self, rate=rate)


class PoissonArrivals(_RateArrivals):
    """Independent callers: ``rate`` a second on average, in bursts."""

    def records(self, random: Generator) -> Iterator[ArrivalRecord]:
        """Exponential gaps, without an end."""
        now = 0.0
        while True:
            for gap in random.exponential(1.0 / self.rate, BLOCK).tolist():
                now += gap
                yield ArrivalRecord(now)


class ConstantArrivals(_RateArrivals):
    """``rate`` a second at even distances, the first at once."""

    def records(self, random: Generator) -> Iterator[ArrivalRecord]:
        """Even gaps, without an end."""
        del random
        for number in count():
            yield ArrivalRecord(number / self.rate)


@dataclass(frozen=True, slots=True)
class ReplayedArrivals:
    """A recorded trace at its own times or faster; the first request comes at 0.

    Attributes:
        trace: read once for each stream.
        recorded_rate: requests a second of the record; None where it is read as a stream.
    """

    trace: Iterable[ArrivalRecord]
    speed: float = 1.0
    recorded_rate: float | None = None

    def __post_init__(self) -> None:
        _positive("speed", self.speed)

    @classmethod
    def of(cls, trace: Sequence[ArrivalRecord]) -> ReplayedArrivals:
        """A trace in memory, whose rate is known.

        Raises:
            InvalidInput: all requests came at one moment.
        """
        span_s = trace[-1].at_s - trace[0].at_s
        if span_s <= 0:
            problem = "all its requests came at one moment, so it has no rate"
            raise InvalidInput("--trace", problem, "Record longer.")
        return cls(trace, 1.0, (len(trace) - 1) / span_s)

    @property
    def rate(self) -> float | None:
        """Requests a second at which the trace is replayed."""
        return None if self.recorded_rate is None else self.recorded_rate * self.speed

    def at(self, rate: float) -> ReplayedArrivals:
        """The trace, sped up or slowed down to a rate."""
        if self.recorded_rate is None:
            raise RuntimeError("the rate of a streamed trace is not known. This is a bug.")
        return replace(self, speed=rate / self.recorded_rate)

    def records(self, random: Generator) -> Iterator[ArrivalRecord]:
        """The records, and no more."""
        del random
        start_s: float | None = None
        for record in self.trace:
            start_s = record.at_s if start_s is None else start_s
            at_s = (record.at_s - start_s) / self.speed
            yield ArrivalRecord(at_s, record.documents, record.tokens)


def arrivals_of(
    rate: float | None, trace: Sequence[ArrivalRecord] = (), *, even: bool = False
) -> Arrivals:
    """Arrivals at a rate, or those of a trace, at its own rate or another.

    Without a rate and a trace it is one request a second; ``even`` gives equal intervals.
    """
    if trace:
        replayed = ReplayedArrivals.of(trace)
        return replayed if rate is None else replayed.at(rate)
    return ConstantArrivals(rate or 1.0) if even else PoissonArrivals(rate or 1.0)


@dataclass(frozen=True, slots=True)
class Workload:
    """Arrivals, and the size of requests where the arrivals do not give it.

    ``tokens`` None leaves the lengths of pairs open. The same seed gives the same requests.
    """

    arrivals: Arrivals
    documents: SizeDistribution
    tokens: SizeDistribution | None = None
    seed: int = 0

    @property
    def rate(self) -> float | None:
        """Requests a second; None where a trace is read as a stream."""
        return self.arrivals.rate

    @property
    def trace(self) -> Sequence[ArrivalRecord]:
        """The recorded requests that are replayed, if they are in memory."""
        trace = self.arrivals.trace if isinstance(self.arrivals, ReplayedArrivals) else ()
        return trace if isinstance(trace, Sequence) else ()

    def at(self, rate: float) -> Workload:
        """The workload at another rate; a trace is sped up or slowed down."""
        return replace(self, arrivals=self.arrivals.at(rate))

    def busiest(self, count: int) -> Workload:
        """The workload with the busiest requests in a row of its trace; the rate stays."""
        trace, arrivals = self.trace, self.arrivals
        if not isinstance(arrivals, ReplayedArrivals) or len(trace) <= count:
            return self
        starts = range(len(trace) - count + 1)
        start = min(starts, key=lambda at: trace[at + count - 1].at_s - trace[at].at_s)
        return replace(self, arrivals=replace(arrivals, trace=trace[start : start + count]))

    def span_s(self, count: int) -> float:
        """Seconds in which the first ``count`` requests come."""
        trace, arrivals = self.trace, self.arrivals
        if trace and isinstance(arrivals, ReplayedArrivals):
            return (trace[min(count, len(trace)) - 1].at_s - trace[0].at_s) / arrivals.speed
        return count / self.rate if self.rate else 0.0

    def requests(self, duration_s: float = math.inf) -> Iterator[Arrival]:
        """Requests in order of time, up to ``duration_s``; a rate has no end of its own."""
        seeds = np.random.SeedSequence(self.seed).spawn(3)
        when, many, long = (np.random.default_rng(seed) for seed in seeds)
        for record in self.arrivals.records(when):
            if record.at_s >= duration_s:
                return
            documents = record.documents or self.documents.draw(many, 1)[0]
            yield Arrival(record.at_s, documents, self._lengths(record, documents, long))

    def _lengths(self, record: ArrivalRecord, documents: int, random: Generator) -> tuple[int, ...]:
        if record.tokens is not None:
            return (record.tokens,) * documents
        return () if self.tokens is None else tuple(self.tokens.draw(random, documents))


def _positive(field: str, value: float) -> None:
    if not 0 < value < math.inf:
        raise InvalidInput(field, f"{value} is not above 0", "Give a finite number above 0.")

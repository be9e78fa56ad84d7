"""Traffic: when requests come, with how many documents, how long their pairs are.

Pure and seeded: the same workload gives the same requests. It must not know texts, clocks or
files; a load generator sends what it says, a simulator only counts it. Everything is a stream, so
that a day of traffic needs no memory. Arrival times, documents and lengths have a generator of
random numbers each: other documents do not move the arrivals, so two runs differ in one thing.

Sizes that a plan makes of others. Pure.
"""

from __future__ import annotations

import csv
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np

from echelon.errors import InvalidInput

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from numpy.random import Generator

BLOCK = 1024
"""Random numbers drawn at a time: one by one they cost a microsecond each."""

MOST_DIGITS = 10
"""A number this long in a trace is no count but something else."""

TRACE_FORM = (
    "A trace is CSV with a header: timestamp,documents or timestamp,documents,tokens; seconds that "
    "never go down, documents of the request, tokens of each of its pairs."
)


@dataclass(frozen=True, slots=True)
class Arrival:
    """One request of a workload.

    Attributes:
        at_s: when it comes, in seconds from the start.
        documents: its documents, at least one.
        lengths: tokens of each of its pairs; empty where the workload leaves them open.
    """

    at_s: float
    documents: int
    lengths: tuple[int, ...] = ()


class SizeDistribution(Protocol):
    """Where whole numbers, at least 1, come from: documents of a request or tokens of a pair."""

    def draw(self, random: Generator, count: int) -> list[int]:
        """So many numbers, each drawn by itself."""
        ...


@dataclass(frozen=True, slots=True)
class FixedSize:
    """Always the same number."""

    value: int

    def __post_init__(self) -> None:
        _at_least_one("value", self.value)

    def draw(self, random: Generator, count: int) -> list[int]:
        """The number, so many times."""
        del random
        return [self.value] * count

    def __str__(self) -> str:
        return str(self.value)


@dataclass(frozen=True, slots=True)
class UniformSize:
    """Any whole number from ``low`` to ``high``, both included, equally often."""

    low: int
    high: int

    def __post_init__(self) -> None:
        _at_least_one("low", self.low)
        if self.high < self.low:
            raise InvalidInput("high", f"{self.high} is below {self.low}", "Give the larger last.")

    def draw(self, random: Generator, count: int) -> list[int]:
        """So many numbers of the range."""
        drawn: list[int] = random.integers(self.low, self.high, count, endpoint=True).tolist()
        return drawn

    def __str__(self) -> str:
        return f"{self.low}-{self.high}"


@dataclass(frozen=True, slots=True)
class LognormalSize:
    """Numbers whose logarithms are normal, as lengths of texts roughly are.

    Attributes:
        mean: their mean before rounding and limits.
        sigma: standard deviation of their logarithms; 0 gives the mean each time.
        most: the largest; what is above is set to it, as a model cuts what is too long.
    """

    mean: float
    sigma: float
    most: int

    def __post_init__(self) -> None:
        if not 1 <= self.mean < math.inf:
            raise InvalidInput("mean", f"{self.mean} is not 1 or more", "Give a finite number.")
        if not 0 <= self.sigma < math.inf:
            raise InvalidInput("sigma", f"{self.sigma} is not 0 or more", "Give a finite number.")
        _at_least_one("most", self.most)

    def draw(self, random: Generator, count: int) -> list[int]:
        """So many numbers from 1 to ``most``."""
        # The mean of a lognormal is exp(mu + sigma² / 2).
        mu = math.log(self.mean) - self.sigma**2 / 2
        drawn = np.rint(random.lognormal(mu, self.sigma, count))
        numbers: list[int] = np.clip(drawn, 1, self.most).astype(np.int64).tolist()
        return numbers


@dataclass(frozen=True, slots=True)
class ObservedSize:
    """Numbers that were seen, each as often as it was seen."""

    values: Sequence[int]

    def __post_init__(self) -> None:
        if not len(self.values):
            raise InvalidInput("values", "there are none", "Give at least one number.")
        _at_least_one("values", min(self.values))

    def draw(self, random: Generator, count: int) -> list[int]:
        """So many of the values, with replacement."""
        return [int(self.values[index]) for index in random.integers(len(self.values), size=count)]


def sizes_of(text: str, field: str) -> SizeDistribution:
    """Sizes as people write them: ``10`` or ``5-50``.

    Raises:
        InvalidInput: it is neither; ``field`` names whose value it is.
    """
    low, dash, high = text.strip().partition("-")
    try:
        return UniformSize(int(low), int(high)) if dash else FixedSize(int(low))
    except ValueError as error:
        problem = f"{text!r} is no whole number from 1 on and no range of them"
        raise InvalidInput(field, problem, "Give one such as 10 or 5-50.") from error


class Arrivals(Protocol):
    """When requests come, and what is known of each beforehand."""

    def known(self, random: Generator) -> Iterator[KnownArrivals]:
        """Requests in the order of their coming."""
        ...


@dataclass(frozen=True, slots=True)
class KnownArrivals:
    """What arrivals say of a request: its time, and in a trace its documents and lengths.

    Attributes:
        at_s: when it comes, in seconds from the start.
        documents: its documents; None leaves them to the workload.
        tokens: tokens of each of its pairs; None leaves them to the workload.
    """

    at_s: float
    documents: int | None = None
    tokens: int | None = None


@dataclass(frozen=True, slots=True)
class PoissonArrivals:
    """Callers who know nothing of each other: ``rate`` a second on average, in bursts."""

    rate: float

    def __post_init__(self) -> None:
        _positive("rate", self.rate)

    def known(self, random: Generator) -> Iterator[KnownArrivals]:
        """Exponential gaps, for ever."""
        now = 0.0
        while True:
            for gap in random.exponential(1.0 / self.rate, BLOCK).tolist():
                now += gap
                yield KnownArrivals(now)


@dataclass(frozen=True, slots=True)
class ConstantArrivals:
    """A clock: ``rate`` a second at even distances, the first at once."""

    rate: float

    def __post_init__(self) -> None:
        _positive("rate", self.rate)

    def known(self, random: Generator) -> Iterator[KnownArrivals]:
        """Even gaps, for ever."""
        del random
        number = 0
        while True:
            yield KnownArrivals(number / self.rate)
            number += 1


@dataclass(frozen=True, slots=True)
class ReplayedArrivals:
    """What was recorded, at its own times; the first request comes at 0.

    Attributes:
        records: e.g. :func:`parse_trace`; gone through once for each stream that is asked for.
        speed: how many times faster than it was.
    """

    records: Iterable[KnownArrivals]
    speed: float = 1.0

    def __post_init__(self) -> None:
        _positive("speed", self.speed)

    def known(self, random: Generator) -> Iterator[KnownArrivals]:
        """The records, and no more."""
        del random
        start: float | None = None
        for record in self.records:
            start = record.at_s if start is None else start
            at_s = (record.at_s - start) / self.speed
            yield KnownArrivals(at_s, record.documents, record.tokens)


@dataclass(frozen=True, slots=True)
class Workload:
    """Arrivals, and what each request is made of where they do not say.

    Attributes:
        arrivals: when requests come.
        documents: documents of a request.
        tokens: tokens of a pair; None leaves lengths open.
        seed: the same seed gives the same requests.
    """

    arrivals: Arrivals
    documents: SizeDistribution
    tokens: SizeDistribution | None = None
    seed: int = 0

    def requests(self, duration_s: float = math.inf) -> Iterator[Arrival]:
        """Requests in order of time, up to ``duration_s``; without it a rate goes on for ever."""
        seeds = np.random.SeedSequence(self.seed).spawn(3)
        when, many, long = (np.random.default_rng(seed) for seed in seeds)
        for known in self.arrivals.known(when):
            if known.at_s >= duration_s:
                return
            documents = known.documents or self.documents.draw(many, 1)[0]
            yield Arrival(known.at_s, documents, self._lengths(known, documents, long))

    def _lengths(self, known: KnownArrivals, documents: int, random: Generator) -> tuple[int, ...]:
        if known.tokens is not None:
            return (known.tokens,) * documents
        return () if self.tokens is None else tuple(self.tokens.draw(random, documents))


def parse_trace(lines: Iterable[str]) -> Iterator[KnownArrivals]:
    """Read a trace line by line; columns it does not know are passed over.

    Args:
        lines: CSV with a header; see :data:`TRACE_FORM`. Any clock's seconds will do.

    Raises:
        InvalidInput: a value is wrong, with its line and column; or there is no request.
    """
    reader = csv.reader(lines, strict=True)
    try:
        columns = _columns(next(reader, []))
        last = -math.inf
        for row in reader:
            if row:
                record = _record(row, columns, reader.line_num)
                if record.at_s < last:
                    raise _wrong(reader.line_num, "timestamp", f"{record.at_s} is before {last}")
                last = record.at_s
                yield record
    except csv.Error as error:
        raise InvalidInput("trace", f"line {reader.line_num}: {error}", TRACE_FORM) from error
    if last == -math.inf:
        raise InvalidInput("trace", "there is no request in it", TRACE_FORM)


def _columns(header: list[str]) -> dict[str, int]:
    names = [name.strip().removeprefix("\ufeff").lower() for name in header]
    for name in ("timestamp", "documents"):
        if name not in names:
            raise InvalidInput("trace", f"line 1 names no column {name!r}", TRACE_FORM)
    for name in ("timestamp", "documents", "tokens"):
        if names.count(name) > 1:
            raise InvalidInput("trace", f"line 1 names {name!r} twice", TRACE_FORM)
    return {name: index for index, name in enumerate(names)}


def _record(row: list[str], columns: dict[str, int], line: int) -> KnownArrivals:
    cells = {name: row[index].strip() for name, index in columns.items() if index < len(row)}
    try:
        at_s = float(cells.get("timestamp", ""))
    except ValueError:
        at_s = math.nan
    if not math.isfinite(at_s):
        raise _wrong(line, "timestamp", f"{cells.get('timestamp', '')!r} is no number of seconds")
    documents = _count(cells, "documents", line)
    return KnownArrivals(
        at_s, documents, _count(cells, "tokens", line) if "tokens" in columns else None
    )


def _count(cells: dict[str, str], name: str, line: int) -> int:
    text = cells.get(name, "")
    if not (text.isascii() and text.isdigit() and len(text) < MOST_DIGITS and int(text) > 0):
        raise _wrong(line, name, f"{text!r} is no whole number from 1 on")
    return int(text)


def _wrong(line: int, column: str, problem: str) -> InvalidInput:
    return InvalidInput("trace", f"line {line}, column {column}: {problem}", TRACE_FORM)


def _at_least_one(field: str, value: int) -> None:
    if value < 1:
        raise InvalidInput(field, f"{value} is not positive", "Give 1 or more.")


def _positive(field: str, value: float) -> None:
    if not 0 < value < math.inf:
        raise InvalidInput(field, f"{value} is not above 0", "Give a finite number above 0.")


@dataclass(frozen=True, slots=True)
class ScaledSize:
    """Other sizes times a factor, at least 1."""

    sizes: SizeDistribution
    factor: float

    def draw(self, random: Generator, count: int) -> list[int]:
        """So many numbers."""
        scaled = np.rint(np.array(self.sizes.draw(random, count)) * self.factor)
        numbers: list[int] = np.maximum(1, scaled).astype(np.int64).tolist()
        return numbers


def longest(sizes: SizeDistribution | None, trace: Iterable[KnownArrivals] = ()) -> int:
    """The largest number that may come; 0 where it is not known."""
    found = max((one.tokens or 0 for one in trace), default=0)
    if isinstance(sizes, FixedSize):
        found = max(found, sizes.value)
    elif isinstance(sizes, UniformSize):
        found = max(found, sizes.high)
    elif isinstance(sizes, LognormalSize):
        found = max(found, sizes.most)
    return found

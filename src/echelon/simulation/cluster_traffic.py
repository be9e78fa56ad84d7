"""Requests of a cluster as blocks of numbers, and the replica that gets each. Pure and seeded.

Blocks follow the distributions of :meth:`echelon.simulation.workload.Workload.requests`, but hold
the mean length of each request instead of all: 100 times faster, with other random numbers.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np

from echelon.errors import InvalidInput

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from numpy.random import Generator

    from echelon.simulation.workload import ArrivalRecord, Workload

Routing = Literal["tokens", "requests", "random", "two"]
"""By fewest outstanding tokens, by fewest outstanding requests, at random, or the one with fewer
outstanding tokens of two at random (power of two choices)."""

ROUTINGS: tuple[Routing, ...] = get_args(Routing)

ROUTING_BLOCK = 4096
"""Random numbers drawn at a time."""

Loads = np.ndarray[Any, np.dtype[np.float64]]


class Router:
    """Routes requests among replicas; ``loads`` are their outstanding tokens or requests."""

    def __init__(self, routing: Routing, replicas: int, seed: int) -> None:
        choosers: dict[Routing, Callable[[], int]] = {
            "tokens": self._least_loaded,
            "requests": self._least_loaded,
            "random": self._random,
            "two": self._of_two,
        }
        if routing not in choosers:
            raise InvalidInput("routing", f"{routing!r} is unknown", f"One of {ROUTINGS}.")
        self.loads: Loads = np.zeros(replicas)
        self.choose = choosers[routing]
        self._by_requests = routing == "requests"
        self._drawn = _draws(replicas, seed)

    def add(self, replica: int, tokens: float, requests: int) -> None:
        """Add to what is outstanding, or take from it."""
        self.loads[replica] += requests if self._by_requests else tokens

    def _least_loaded(self) -> int:
        return int(self.loads.argmin())

    def _random(self) -> int:
        return next(self._drawn)

    def _of_two(self) -> int:
        one, other = next(self._drawn), next(self._drawn)
        return one if self.loads[one] <= self.loads[other] else other


def _draws(replicas: int, seed: int) -> Iterator[int]:
    random = np.random.default_rng(seed)
    while True:
        yield from random.integers(replicas, size=ROUTING_BLOCK).tolist()


def uniform_draws(seed: int) -> Iterator[float]:
    """Random numbers from 0 to 1, without an end."""
    random = np.random.default_rng(seed)
    while True:
        yield from random.random(ROUTING_BLOCK).tolist()


BLOCK = 2048
"""Requests drawn at a time."""


@dataclass(frozen=True, slots=True)
class RequestBlock:
    """Requests in order of time, as columns; lengths and squares are means of a request's pairs."""

    at_s: list[float]
    documents: list[int]
    lengths: list[float]
    squares: list[float]

    def first(self, count: int) -> RequestBlock:
        """The first requests of the block."""
        at_s, documents = self.at_s[:count], self.documents[:count]
        return RequestBlock(at_s, documents, self.lengths[:count], self.squares[:count])


def blocks(workload: Workload, duration_s: float = math.inf) -> Iterator[RequestBlock]:
    """A workload's requests, up to ``duration_s``.

    Raises:
        InvalidInput: the workload leaves lengths open.
    """
    seeds = np.random.SeedSequence(workload.seed).spawn(3)
    when, many, long = (np.random.default_rng(seed) for seed in seeds)
    arrivals = workload.arrivals.records(when)
    while records := list(islice(arrivals, BLOCK)):
        within = [one for one in records if one.at_s < duration_s]
        if within:
            yield _block(workload, within, many, long)
        if len(within) < len(records):
            return


def _block(
    workload: Workload, records: list[ArrivalRecord], many: Generator, long: Generator
) -> RequestBlock:
    drawn = workload.documents.draw(many, len(records))
    documents = [one.documents or count for one, count in zip(records, drawn, strict=True)]
    tokens = [one.tokens for one in records]
    if all(tokens):
        lengths = np.array(tokens, dtype=float)
        squares = lengths**2
    else:
        lengths, squares = _means(workload, documents, long)
        given = np.array([one or 0 for one in tokens], dtype=float)
        lengths = np.where(given, given, lengths)
        squares = np.where(given, given**2, squares)
    at_s = [one.at_s for one in records]
    return RequestBlock(at_s, documents, lengths.tolist(), squares.tolist())


def _means(
    workload: Workload, documents: list[int], random: Generator
) -> tuple[np.ndarray[tuple[int], np.dtype[np.float64]], ...]:
    """Mean tokens and mean squared tokens of the pairs of each request."""
    if workload.tokens is None:
        raise InvalidInput("tokens", "the lengths of pairs are not known", "Give them.")
    counts = np.array(documents)
    tokens = np.array(workload.tokens.draw(random, int(counts.sum())), dtype=float)
    starts = np.concatenate([[0], np.cumsum(counts)[:-1]])
    return tuple(np.add.reduceat(values, starts) / counts for values in (tokens, tokens**2))

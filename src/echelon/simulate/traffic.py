"""A workload in blocks of numbers, for simulations of millions of requests. Pure.

The same distributions as :meth:`echelon.plan.workload.Workload.requests`, drawn a block at a time
and with each request's lengths summed up: 100 times faster, and other random numbers.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING

import numpy as np

from echelon.errors import InvalidInput

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.random import Generator

    from echelon.plan.workload import Known, Workload

BLOCK = 2048
"""Requests drawn at a time."""


@dataclass(frozen=True, slots=True)
class Block:
    """Requests in order of time, one list a property, all of one size.

    Attributes:
        at_s: when they come.
        documents: their documents.
        lengths: mean tokens of their pairs.
        squares: mean squared tokens of their pairs.
    """

    at_s: list[float]
    documents: list[int]
    lengths: list[float]
    squares: list[float]

    def first(self, count: int) -> Block:
        """The first so many requests of the block."""
        lists = (self.at_s, self.documents, self.lengths, self.squares)
        return Block(*(values[:count] for values in lists))  # type: ignore[arg-type] # as they were


def blocks(workload: Workload, duration_s: float = math.inf) -> Iterator[Block]:
    """A workload's requests, up to ``duration_s``.

    Raises:
        InvalidInput: the workload leaves lengths open.
    """
    seeds = np.random.SeedSequence(workload.seed).spawn(3)
    when, many, long = (np.random.default_rng(seed) for seed in seeds)
    arrivals = workload.arrivals.known(when)
    while known := list(islice(arrivals, BLOCK)):
        late = known[-1].at_s >= duration_s
        if late:
            known = [one for one in known if one.at_s < duration_s]
        if known:
            yield _block(workload, known, many, long)
        if late:
            return


def _block(workload: Workload, known: list[Known], many: Generator, long: Generator) -> Block:
    drawn = workload.documents.draw(many, len(known))
    documents = [one.documents or count for one, count in zip(known, drawn, strict=True)]
    tokens = [one.tokens for one in known]
    if all(tokens):
        lengths = np.array(tokens, dtype=float)
        squares = lengths**2
    else:
        lengths, squares = _means(workload, documents, long)
        lengths = np.array([t or mean for t, mean in zip(tokens, lengths.tolist(), strict=True)])
        squares = np.array([t * t if t else q for t, q in zip(tokens, squares, strict=True)])
    at_s = [one.at_s for one in known]
    return Block(at_s, documents, lengths.tolist(), squares.tolist())


def _means(
    workload: Workload, documents: list[int], random: Generator
) -> tuple[np.ndarray[tuple[int], np.dtype[np.float64]], ...]:
    """Mean tokens and mean squared tokens of the pairs of each request."""
    if workload.tokens is None:
        raise InvalidInput("tokens", "the lengths of pairs are not known", "Give them.")
    counts = np.array(documents)
    tokens = np.array(workload.tokens.draw(random, int(counts.sum())), dtype=float)
    starts = np.concatenate([[0], np.cumsum(counts)[:-1]])
    return (
        np.add.reduceat(tokens, starts) / counts,
        np.add.reduceat(tokens * tokens, starts) / counts,
    )

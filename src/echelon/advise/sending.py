"""Requests as texts: what is simulated in tokens is sent in words of the lengths asked for.

A load generator cuts texts by words. How many tokens these are is the tokenizer's secret, and here
that is known: sizes are scaled until the pairs have, on average, the tokens they should have.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import islice
from typing import TYPE_CHECKING

import numpy as np

from echelon.errors import InvalidInput
from echelon.plan.workload import Arrival, Observed
from echelon.planner.sizes import Scaled
from echelon.stress.texts import Material

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from echelon.encode.tokens import PairEncoder
    from echelon.plan.workload import Known, Sizes
    from echelon.simulate.capacity import Traffic
    from echelon.tune.texts import Topic
    from echelon.types import Pair

SAMPLE, DOCUMENTS = 20, 10
"""Requests, and their documents, that the scale is found with."""

ROUNDS = 4
"""Marks and whole words make the relation crooked; after so many corrections it is met."""

CLOSE = 0.1
"""Relative difference of the mean length up to which texts have the length asked for."""


@dataclass(frozen=True, slots=True)
class Load:
    """Traffic, and how to send it.

    Attributes:
        traffic: the requests in tokens.
        rate: requests a second.
        topics: texts to send.
        scale: tokens to ask of the load generator for each token wanted.
    """

    traffic: Traffic
    rate: float
    topics: Sequence[Topic]
    scale: float

    @property
    def tokens(self) -> Sizes:
        """Lengths to ask of the load generator."""
        tokens = self.traffic.workload.tokens
        if tokens is None:
            raise RuntimeError("This is a bug: the lengths are always known here.")
        return Scaled(tokens, self.scale)

    @property
    def trace(self) -> tuple[Known, ...]:
        """The trace with such lengths; empty where there is none."""
        return tuple(
            one if one.tokens is None else replace(one, tokens=_scaled(one.tokens, self.scale))
            for one in self.traffic.trace
        )

    def requests(self, duration_s: float, seed: int) -> list[Arrival]:
        """Those of the first seconds, with the lengths wanted."""
        workload = replace(self.traffic.at(self.rate), seed=seed)
        return list(workload.requests(duration_s))

    def first(self, documents: float) -> list[Arrival]:
        """Requests until they have so many documents; a trace may end before."""
        found, count = [], 0
        for request in self.traffic.at(self.rate).requests():
            found.append(request)
            count += request.documents
            if count >= documents:
                break
        return found

    def texts(self, requests: Iterable[Arrival], seed: int) -> list[tuple[str, list[str]]]:
        """Query and documents of each."""
        material = Material(self.topics, seed=seed)
        return [material.request(_longer(request, self.scale)) for request in requests]


def scale_of(
    topics: Sequence[Topic], encoder: PairEncoder, sizes: Sizes, trace: Sequence[Known], limit: int
) -> float:
    """Find the scale; see :class:`Load`.

    Args:
        topics: texts to send.
        encoder: the model's.
        sizes: tokens of a pair.
        trace: where its requests have lengths, they count instead.
        limit: tokens a pair may have.

    Raises:
        InvalidInput: no texts have this length, as the queries alone are longer.
    """
    told = [one.tokens for one in islice(trace, SAMPLE * DOCUMENTS) if one.tokens]
    wanted = (Observed(told) if told else sizes).draw(np.random.default_rng(0), SAMPLE * DOCUMENTS)
    requests = [
        Arrival(0.0, DOCUMENTS, tuple(wanted[start : start + DOCUMENTS]))
        for start in range(0, len(wanted), DOCUMENTS)
    ]
    scale, mean = 1.0, float(np.mean(wanted))
    sent = mean
    for _ in range(ROUNDS):
        lengths = encoder.encode(_pairs(topics, requests, scale), limit, "longest_first").lengths
        sent = float(lengths.mean())
        if abs(sent / mean - 1) < CLOSE / 10:
            break
        scale *= mean / sent
    if sent > (1 + CLOSE) * mean:
        raise InvalidInput(
            "--tokens",
            f"pairs of {mean:.0f} tokens cannot be made of these texts: their queries alone are "
            f"nearly as long (pairs have at least {sent:.0f})",
            f"Give {sent:.0f} or more, or shorter queries with --data.",
        )
    return scale


def _pairs(topics: Sequence[Topic], requests: Sequence[Arrival], scale: float) -> list[Pair]:
    material = Material(topics, salt="0000")
    sent = [material.request(_longer(request, scale)) for request in requests]
    return [(query, document) for query, documents in sent for document in documents]


def _longer(request: Arrival, scale: float) -> Arrival:
    return replace(request, lengths=tuple(_scaled(length, scale) for length in request.lengths))


def _scaled(length: int, scale: float) -> int:
    return max(1, round(length * scale))

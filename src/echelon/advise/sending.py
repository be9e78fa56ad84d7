"""Requests as texts: what is simulated in tokens is sent in texts of just so many.

A load generator that knows no more than an address cuts texts by words. Here the tokenizer is at
hand, so each pair has the length that it was simulated with.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import islice
from typing import TYPE_CHECKING

import numpy as np

from echelon.errors import InvalidInput
from echelon.plan.workload import Arrival, Observed
from echelon.stress.texts import Material, Tokens

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from echelon.data import Topic
    from echelon.plan.workload import Known, Sizes
    from echelon.simulate.capacity import Traffic
    from echelon.stress.texts import Ruler
    from echelon.tokenization.tokenizer import PairEncoder

SAMPLE, DOCUMENTS = 20, 10
"""Requests, and their documents, that are looked at beforehand."""

CLOSE = 0.1
"""Relative difference of the mean length up to which texts have the length asked for."""


@dataclass(frozen=True, slots=True)
class Load:
    """Traffic, and how to send it.

    Attributes:
        traffic: the requests in tokens.
        rate: requests a second.
        topics: texts to send.
        ruler: cuts them to length.
    """

    traffic: Traffic
    rate: float
    topics: Sequence[Topic]
    ruler: Ruler

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
        material = Material(self.topics, seed=seed, ruler=self.ruler)
        return [material.request(request) for request in requests]


def ruler_of(encoder: PairEncoder) -> Ruler:
    """What measures texts as a model does."""
    return Tokens(encoder.ends, encoder.template.specials)


def require_texts(
    topics: Sequence[Topic], encoder: PairEncoder, sizes: Sizes, trace: Sequence[Known], limit: int
) -> None:
    """Refuse lengths that no texts have.

    Args:
        topics: texts to send.
        encoder: the model's.
        sizes: tokens of a pair.
        trace: where its requests have lengths, they count instead.
        limit: tokens a pair may have.

    Raises:
        InvalidInput: what tells requests apart is longer.
    """
    told = [one.tokens for one in islice(trace, SAMPLE * DOCUMENTS) if one.tokens]
    wanted = (Observed(told) if told else sizes).draw(np.random.default_rng(0), SAMPLE * DOCUMENTS)
    material = Material(topics, salt="0000", ruler=ruler_of(encoder))
    pairs = []
    for start in range(0, len(wanted), DOCUMENTS):
        lengths = tuple(wanted[start : start + DOCUMENTS])
        query, documents = material.request(Arrival(0.0, DOCUMENTS, lengths))
        pairs += [(query, document) for document in documents]
    mean = float(np.mean(wanted))
    sent = float(encoder.encode(pairs, limit, "longest_first").lengths.mean())
    if sent > (1 + CLOSE) * mean:
        raise InvalidInput(
            "--tokens",
            f"pairs of {mean:.0f} tokens cannot be made: with the marks that tell requests apart "
            f"they have {sent:.0f}",
            f"Give {sent:.0f} or more.",
        )

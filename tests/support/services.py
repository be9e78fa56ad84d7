"""A service with real child processes, and a listener that records events."""

from __future__ import annotations

import asyncio

import numpy as np
from helpers import TEMPLATE
from scorers import Obedient

from echelon.engine.events import Listener, ServiceSettings
from echelon.engine.service import Service
from echelon.engine.worker import ChildWorker
from echelon.models.base import FakeScorer
from echelon.tokenization.pairs import encode_pairs
from echelon.types import RerankRequest, monotonic

GUARD_S = 60.0


class LetterEncoder:
    """A tokenizer whose tokens are characters."""

    template = TEMPLATE

    def encode(self, pairs, max_length, truncation, max_query_tokens=None, places=None):
        queries = [ids(query)[:max_query_tokens] for query, _ in pairs]
        documents = [ids(document) for _, document in pairs]
        return encode_pairs(TEMPLATE, queries, documents, max_length, truncation, places)

    def turns(self, pairs, max_length, truncation, max_query_tokens, places, **_):
        yield self.encode(pairs, max_length, truncation, max_query_tokens, places)


class RecordingListener(Listener):
    """Keeps all events."""

    def __init__(self):
        self.heard = []

    def note(self, event) -> None:
        self.heard.append(event)

    step_finished = request_ended = refused = ladder_taken = worker_changed = note
    budget_moved = scores_sought = note

    def of(self, kind) -> list:
        return [event for event in self.heard if type(event).__name__ == kind]

    def states(self) -> list:
        return [event.state for event in self.of("WorkerChanged")]


async def until(condition) -> None:
    """Wait until the condition holds."""
    while not condition():  # noqa: ASYNC110 - it changes in other threads
        await asyncio.sleep(0.001)


def ids(text):
    return np.array([ord(letter) for letter in text], dtype=np.int32)


def coded(*codes, query="q", count=1) -> list:
    """Pairs whose documents consist of the given token ids, and of their number at the end."""
    return [(query, "".join(map(chr, (*codes, index)))) for index in range(count)]


def encoded(pairs):
    return LetterEncoder().encode(pairs, 512, "longest_first")


def scores(pairs):
    batch = encoded(pairs)
    return [FakeScorer().score(batch.batch([i]))[0] for i in range(len(pairs))]


async def submit(made, pairs, **asked):
    """Submit pairs as one request."""
    return await made.submit(RerankRequest(pairs, **asked))


def service(
    opener=Obedient,
    *,
    others=None,
    listener=None,
    learned=None,
    clock=monotonic,
    encoder=None,
    cache=None,
    **settings,
) -> Service:
    """A service whose worker 0 opens ``opener``, and whose other workers ``others`` or the same."""
    settings.setdefault("precision", "fp32")
    openers = {0: opener}
    return Service(
        encoder or LetterEncoder(),
        lambda number, ended: ChildWorker(
            openers.get(number, others or opener), f"worker {number}", on_end=ended
        ),
        ServiceSettings(**settings),
        listener=listener,
        clock=clock,
        learned=learned,
        scores=cache,
    )


def run(main, made: Service, guard_s: float = GUARD_S):
    async def guarded():
        async with asyncio.timeout(guard_s), made:
            return await main(made)

    return asyncio.run(guarded())


def texts(seed: int, count: int = 5) -> list:
    return [(f"query {seed}", f"document {seed} {i} " + "x" * (7 * i % 40)) for i in range(count)]

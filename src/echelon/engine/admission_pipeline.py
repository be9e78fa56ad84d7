"""The door of a service: who comes in is judged, tokenised in slices, and judged again.

Tokenising runs in threads (the library releases the interpreter's lock). A long request is cut
into slices that queue for a thread one by one, so that a short one is never behind all of it.
"""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from echelon.engine.events import RequestRefused
from echelon.errors import InvalidInput, Overloaded
from echelon.options import check_pairs
from echelon.scheduling.admission import (
    AdmissionLimits,
    RequestCost,
    SystemLoad,
    TokenEstimate,
    refuse,
)
from echelon.tokenization.chunking import chunk, cut_at
from echelon.tokenization.pairs import EncodedPairs, TruncationImpossible, join

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from echelon.engine.dispatcher import Dispatcher
    from echelon.options import Truncation
    from echelon.scheduling.fair_queue import Priority
    from echelon.tokenization.chunking import Chunking, Side, Whole
    from echelon.tokenization.tokenizer import PairEncoder
    from echelon.types import Pair

TOKENISERS = 2
"""Threads that tokenise: one for a long request and one for a short beside it. Their queue holds
at most one slice of each request inside, so ``Bounds.max_requests`` bounds it."""

SLICE = 64
"""Documents that are tokenised at a time, some ten milliseconds: requests take turns in between."""


UNREAD = 2**20
"""Tokens of a document that is read whole, for the estimate at the door: more than one request
may have, so that the characters alone decide."""


@dataclass(frozen=True, slots=True)
class ScoringRequest:
    """How a caller wants its pairs encoded and served.

    Attributes:
        max_length: tokens a pair may have.
        truncation: what gives way when a pair is longer.
        max_query_tokens: tokens kept of a query.
        deadline: when the answer is due; None means never.
        priority: its share of the device.
        chunking: how longer documents are read in chunks; None cuts them.
        whole: a pair that would lose tokens is refused instead.
        side: the end at which longer texts are cut; None is the model's own.
        shorter: cut pairs to so many tokens, because the queue is long.
    """

    max_length: int
    truncation: Truncation = "longest_first"
    max_query_tokens: int | None = None
    deadline: float | None = None
    priority: Priority = "normal"
    chunking: Chunking | None = None
    whole: bool = False
    side: Side | None = None
    shorter: int | None = None

    @property
    def longest(self) -> int:
        """Tokens that a document may come to, in all its chunks."""
        if self.shorter is not None:
            return self.shorter
        if self.chunking is None:
            return self.max_length
        return max(self.max_length, self.chunking.max_tokens or UNREAD)


@dataclass(frozen=True, slots=True)
class AdmittedRequest:
    """A request that was let in.

    Attributes:
        pairs: what to score.
        whole: where they are chunks, the way back to the documents.
        fallback: tokens that they were cut to because the queue is long; None: they were not.
    """

    pairs: EncodedPairs
    whole: Whole | None = None
    fallback: int | None = None


class AdmissionPipeline:
    """Lets requests in.

    Args:
        encoder: the model's tokenizer.
        bounds: what is taken in at most.
        dispatch: tells what waits and runs.
        workers: tells how many workers are up.
    """

    def __init__(
        self,
        encoder: PairEncoder,
        bounds: AdmissionLimits,
        dispatch: Dispatcher,
        workers: Callable[[], int],
    ) -> None:
        self._encoder = encoder
        self._bounds = bounds
        self._dispatch = dispatch
        self._workers = workers
        self._threads = ThreadPoolExecutor(TOKENISERS, thread_name_prefix="echelon-tokenise")
        self._estimate = TokenEstimate()
        self._coming = self._coming_tokens = 0

    def house(self) -> SystemLoad:
        """What is inside already."""
        desk = self._dispatch
        coming, tokens = self._coming, self._coming_tokens
        return SystemLoad(desk.load(), desk.cost, self._workers(), coming, tokens, desk.soonest)

    async def let_in(
        self, pairs: Sequence[Pair] | EncodedPairs, wish: ScoringRequest
    ) -> AdmittedRequest:
        """Admit and encode; the caller has to put the pairs into the queue before it awaits.

        Raises:
            InvalidInput: a pair is not two texts, its query leaves no room, or it is too long.
            EchelonError: the request is refused.
        """
        if not isinstance(pairs, EncodedPairs):
            pairs = await self._tokenise(pairs, wish)
        if wish.whole:
            _refuse_longer(pairs, wish.max_length)
        guest = None if wish.shorter is None else await self._shortened(pairs, wish, wish.shorter)
        if guest is None:
            guest = await self._in_full(pairs, wish)
        lengths = guest.pairs.lengths
        squares = int(np.square(lengths, dtype=np.int64).sum())
        self._judge(len(lengths), int(lengths.sum()), squares, wish)
        return guest

    def close(self) -> None:
        """End the threads; what they do now is of no use to anyone."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    async def _tokenise(self, pairs: Sequence[Pair], wish: ScoringRequest) -> EncodedPairs:
        characters = _characters(pairs)
        tokens = self._estimate.tokens(characters, len(pairs), wish.longest)
        self._judge(len(pairs), tokens, tokens * min(tokens // len(pairs), wish.max_length), wish)
        loop = asyncio.get_running_loop()
        self._coming += 1
        self._coming_tokens += tokens
        try:
            parts = [
                await loop.run_in_executor(self._threads, self._encode, pairs, start, wish)
                for start in range(0, len(pairs), SLICE)
            ]
        finally:
            self._coming -= 1
            self._coming_tokens -= tokens
        encoded = join(parts)
        self._estimate.observe(characters, int(encoded.lengths.sum()))
        return encoded

    def _encode(self, pairs: Sequence[Pair], start: int, wish: ScoringRequest) -> EncodedPairs:
        part = pairs[start : start + SLICE]
        places = range(start, start + len(part))
        return self._encoder.encode(
            check_pairs(part, start),
            wish.max_length,
            wish.truncation,
            wish.max_query_tokens,
            places,
        )

    async def _in_full(self, pairs: EncodedPairs, wish: ScoringRequest) -> AdmittedRequest:
        if wish.chunking is None:
            return AdmittedRequest(*_cut_at(pairs, wish.side))
        return AdmittedRequest(*await self._split(pairs, wish.max_length, wish.chunking))

    async def _shortened(
        self, pairs: EncodedPairs, wish: ScoringRequest, most: int
    ) -> AdmittedRequest | None:
        """Pairs of ``most`` tokens; of a document in chunks the first, in a thread.

        None where a query leaves no room then and may not be cut: falling back refuses nobody.
        """
        loop = asyncio.get_running_loop()
        try:
            if wish.chunking is not None:
                how = replace(wish.chunking, max_chunks=1)
                split = await loop.run_in_executor(self._threads, chunk, pairs, most, how)
                return AdmittedRequest(*split, most)
            every = range(len(pairs))
            cut = await loop.run_in_executor(self._threads, pairs.shortened, most, every)
        except TruncationImpossible:
            return None
        return AdmittedRequest(*_cut_at(cut, wish.side), most)

    async def _split(
        self, pairs: EncodedPairs, max_length: int, how: Chunking
    ) -> tuple[EncodedPairs, Whole]:
        """Longer documents in chunks, in a thread: ten thousand documents take some 100 ms."""
        loop = asyncio.get_running_loop()
        try:
            return await loop.run_in_executor(self._threads, chunk, pairs, max_length, how)
        except TruncationImpossible as error:
            raise InvalidInput(
                f"pairs[{error.index}].query",
                f"its {error.query_tokens} tokens are more than half of the {error.room} that a "
                "chunk has room for",
                "Shorten the query, or use truncation='longest_first'.",
            ) from None

    def _judge(self, documents: int, tokens: int, squares: int, wish: ScoringRequest) -> None:
        ask = RequestCost(documents, tokens, squares, wish.deadline, wish.priority)
        refusal = refuse(ask, self.house(), self._bounds, self._dispatch.clock())
        if refusal is None:
            return
        error = refusal.error
        retry = error.retry_after_s if isinstance(error, Overloaded) else None
        self._dispatch.listener.refused(RequestRefused(refusal.reason, documents, retry))
        raise error


def _cut_at(pairs: EncodedPairs, side: Side | None) -> tuple[EncodedPairs, Whole | None]:
    """Pairs cut at a side, where that is not the model's own."""
    if side is None or side == pairs.template.side:
        return pairs, None
    return cut_at(pairs, side)


def _refuse_longer(pairs: EncodedPairs, max_length: int) -> None:
    """Refuse what would lose tokens.

    Raises:
        InvalidInput: names the first pair that does.
    """
    lost = pairs.truncated_tokens
    if lost.any():
        index = int(np.flatnonzero(lost)[0])
        raise InvalidInput(
            f"pairs[{pairs.places[index]}].document",
            f"with its query it has {int(pairs.lengths[index] + lost[index])} tokens, and "
            f"{max_length} is the most",
            "Shorten it, or allow truncation.",
        )


def _characters(pairs: Sequence[Pair]) -> int:
    """Characters of all texts; what is no text counts nothing here and is refused later."""
    parts = (pair for pair in pairs if isinstance(pair, tuple | list))
    return sum(len(text) for pair in parts for text in pair if isinstance(text, str))

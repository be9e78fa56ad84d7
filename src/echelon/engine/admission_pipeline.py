"""Admission of requests to a service: judge by an estimate, tokenise, judge by the true lengths.

Tokenising runs in threads (the library releases the interpreter's lock). A long request takes turns
that queue for a thread one by one, so that a short request never waits for all of it; when its
caller has gone, no other turn begins.
"""

from __future__ import annotations

import asyncio
import logging
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from echelon.engine.events import RequestRefused, ScoresSought
from echelon.engine.score_cache import ScoreSettings
from echelon.errors import EchelonError, InvalidInput, Overloaded
from echelon.options import check_pairs
from echelon.scheduling.admission import (
    LoadShedding,
    RequestCost,
    SystemLoad,
    TokenEstimate,
    refuse,
)
from echelon.tokenization.pairs import TruncationImpossible, chunk, cut_at
from echelon.tokenization.tokenizer import Turn

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from echelon.engine.dispatcher import Dispatcher
    from echelon.engine.events import ServiceSettings
    from echelon.engine.score_cache import CachedScores, ScoreCache
    from echelon.tokenization.pairs import ChunkMap, EncodedPairs
    from echelon.tokenization.tokenizer import PairEncoder
    from echelon.types import Chunking, Pair, RerankRequest, Side

logger = logging.getLogger(__name__)

TOKENISERS = 2
"""Threads that tokenise: one for a long request and one for a short beside it. Their queue holds
at most one turn of each request, so ``AdmissionLimits.max_requests`` bounds it."""

TURN = Turn(texts=64, characters=2**16)
"""Texts that are tokenised at a time, in 10 to 50 ms: requests take turns in between."""

_SHEDDING = "%.2f s of work are queued, and the goal is %g s: requests of low priority are read "
_SHEDDING_MESSAGES = {
    "on": (logging.WARNING, f"{_SHEDDING}with max_length=%d until the queue is short again."),
    "off": (logging.INFO, f"{_SHEDDING}in full again, no longer with max_length=%d."),
}


@dataclass(frozen=True, slots=True)
class AdmittedRequest:
    """A request that was admitted."""

    pairs: EncodedPairs
    chunk_map: ChunkMap | None = None  # where pairs are chunks, the way back to the documents
    # tokens to which pairs were cut because the queue is long; None: they were not
    fallback: int | None = None
    # scores of the documents whose pairs are not among these; None: all are
    cached: CachedScores | None = None


class AdmissionPipeline:
    """Admits requests to a service; ``workers_up`` counts the workers that are up."""

    def __init__(
        self,
        encoder: PairEncoder,
        settings: ServiceSettings,
        dispatcher: Dispatcher,
        workers_up: Callable[[], int],
        scores: ScoreCache | None = None,
    ) -> None:
        self._encoder = encoder
        self._scores = scores
        self._settings = settings
        self._dispatcher = dispatcher
        self._workers_up = workers_up
        self._threads = ThreadPoolExecutor(TOKENISERS, thread_name_prefix="echelon-tokenise")
        self._estimate = TokenEstimate()
        self._tokenising = self._tokenising_tokens = 0
        goal_s = settings.goal_s or settings.bounds.max_wait_s
        self.shedding = LoadShedding(settings.fallback_max_length, goal_s)

    def load(self) -> SystemLoad:
        """The requests in the service now."""
        dispatcher = self._dispatcher
        return SystemLoad(
            dispatcher.load(),
            dispatcher.cost,
            self._workers_up(),
            self._tokenising,
            self._tokenising_tokens,
            dispatcher.next_completions,
        )

    def update_shedding(self) -> SystemLoad:
        """Begin or end load shedding as the load asks, and log it; returns the load."""
        load, shedding = self.load(), self.shedding
        change = shedding.update(load.backlog_s, self._dispatcher.clock())
        if change is not None:
            level, message = _SHEDDING_MESSAGES[change]
            logger.log(level, message, load.backlog_s, shedding.goal_s, shedding.max_length)
        return load

    async def find(
        self, request: RerankRequest, max_length: int, precision: str
    ) -> CachedScores | None:
        """Look its documents up in the score cache; None where they are to be scored anyway.

        What is not text, or too much, is not looked up: it is refused later.
        """
        scores, pairs = self._scores, request.pairs
        if scores is None or request.fresh or len(pairs) > self._settings.bounds.max_documents:
            return None
        settings = score_settings(request, self._settings, max_length, precision)
        work = partial(scores.find, pairs, settings, whole=request.refuse_truncation)
        try:
            if sum(_characters(pairs)) <= TURN.characters:
                cached = work()
            else:
                loop = asyncio.get_running_loop()
                cached = await loop.run_in_executor(self._threads, work)
        except (AttributeError, TypeError, ValueError):
            return None
        self._dispatcher.listener.scores_sought(ScoresSought(cached.hits, len(cached.missing)))
        return cached

    async def admit(
        self, request: RerankRequest, max_length: int, cached: CachedScores | None = None
    ) -> AdmittedRequest:
        """Admit and encode a request; the caller must queue its pairs before it next awaits.

        Documents whose scores are ``cached`` are left out and charged at nothing. Not while load is
        shed: scores of texts read in full and in part cannot be compared.

        Raises:
            InvalidInput: a pair is not two texts, its query leaves no room, or it is too long.
            EchelonError: the request is refused. ``tokenised`` says whether after its first turn.
        """
        fallback = None
        if not request.refuse_truncation:
            self.update_shedding()
            fallback = self.shedding.fallback(request.priority, max_length)
        if fallback is not None:
            cached = None
        places = range(len(request.pairs)) if cached is None else cached.missing.tolist()
        if cached is not None:
            request = replace(request, pairs=[request.pairs[place] for place in places])
        pairs = await self._tokenise(request, max_length, fallback, places)
        try:
            admitted = await self._admit(pairs, request, max_length, fallback)
            return replace(admitted, cached=cached)
        except EchelonError as error:
            error.tokenised = True
            raise

    def close(self) -> None:
        """End the threads; requests that they tokenise now are dropped."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    async def _admit(
        self, pairs: EncodedPairs, request: RerankRequest, max_length: int, fallback: int | None
    ) -> AdmittedRequest:
        """Cut or split the pairs as asked, and judge them by their true lengths."""
        if request.refuse_truncation:
            _refuse_truncated(pairs, max_length)
        admitted = None if fallback is None else await self._shortened(pairs, request, fallback)
        if admitted is None:
            admitted = await self._in_full(pairs, request, max_length)
        lengths = admitted.pairs.costs
        squares = int(np.square(lengths, dtype=np.int64).sum())
        self._judge(request, len(lengths), int(lengths.sum()), squares)
        return admitted

    async def _tokenise(
        self,
        request: RerankRequest,
        max_length: int,
        fallback: int | None,
        places: Sequence[int],
    ) -> EncodedPairs:
        characters = _characters(request.pairs)
        longest = self._document_tokens(request, max_length)
        tokens = self._estimate.tokens(characters, fallback or max(max_length, longest))
        squares = tokens * min(tokens // len(characters), max_length)
        self._judge(request, len(characters), tokens, squares)
        loop = asyncio.get_running_loop()
        turns = self._turns(request, max_length, longest, places)
        self._tokenising += 1
        self._tokenising_tokens += tokens
        try:
            encoded = None
            while encoded is None:
                encoded = await loop.run_in_executor(self._threads, next, turns)
        finally:
            self._tokenising -= 1
            self._tokenising_tokens -= tokens
        whole = encoded.truncated_tokens == 0
        self._estimate.observe(
            int(np.array(characters)[whole].sum()), int(encoded.lengths[whole].sum())
        )
        return encoded

    def _turns(
        self, request: RerankRequest, max_length: int, longest: int, places: Sequence[int]
    ) -> Iterator[EncodedPairs | None]:
        """Check and encode a request in turns; the last gives its pairs."""
        pairs = check_pairs(request.pairs)
        try:
            yield from self._encoder.turns(
                pairs,
                max_length,
                request.truncation or self._settings.truncation,
                request.max_query_tokens or self._settings.max_query_tokens,
                places,
                instruction=request.instruction,
                side=None if request.chunking else request.side,
                document_tokens=longest,
                turn=TURN,
            )
        except EchelonError as error:
            error.tokenised = True
            raise

    def _document_tokens(self, request: RerankRequest, max_length: int) -> int:
        """Maximum tokens of a document that are read for its chunks; 0 without chunks."""
        if request.chunking is None:
            return 0
        limits = request.chunking.max_tokens, self._settings.bounds.max_request_tokens
        chunks = request.chunking.max_chunks
        return min(filter(None, (*limits, chunks and chunks * max_length)))

    async def _in_full(
        self, pairs: EncodedPairs, request: RerankRequest, max_length: int
    ) -> AdmittedRequest:
        if request.chunking is None:
            return AdmittedRequest(*_cut_at(pairs, request.side))
        try:
            return AdmittedRequest(*await self._split(pairs, max_length, request.chunking))
        except TruncationImpossible as error:
            raise InvalidInput(
                f"pairs[{error.index}].query",
                f"its {error.query_tokens} tokens are more than half of the {error.room} that a "
                "chunk has room for",
                "Shorten the query, or use truncation='longest_first'.",
            ) from None

    async def _shortened(
        self, pairs: EncodedPairs, request: RerankRequest, max_length: int
    ) -> AdmittedRequest | None:
        """Pairs cut to ``max_length``; of a document in chunks the first.

        None where a query then leaves no room and may not be cut: load shedding refuses no request.
        """
        try:
            if request.chunking is not None:
                chunking = replace(request.chunking, max_chunks=1)
                return AdmittedRequest(*await self._split(pairs, max_length, chunking), max_length)
            loop, every = asyncio.get_running_loop(), range(len(pairs))
            cut = await loop.run_in_executor(self._threads, pairs.shortened, max_length, every)
        except TruncationImpossible:
            return None
        return AdmittedRequest(*_cut_at(cut, request.side), max_length)

    async def _split(
        self, pairs: EncodedPairs, max_length: int, chunking: Chunking
    ) -> tuple[EncodedPairs, ChunkMap]:
        """Split longer documents in a thread: ten thousand documents take some 100 ms."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._threads, chunk, pairs, max_length, chunking)

    def _judge(self, request: RerankRequest, documents: int, tokens: int, squares: int) -> None:
        cost = RequestCost(documents, tokens, squares, request.deadline, request.priority)
        refusal = refuse(cost, self.load(), self._settings.bounds, self._dispatcher.clock())
        if refusal is None:
            return
        error = refusal.error
        retry = error.retry_after_s if isinstance(error, Overloaded) else None
        self._dispatcher.listener.refused(RequestRefused(refusal.reason, documents, retry))
        raise error


def score_settings(
    request: RerankRequest, service: ServiceSettings, max_length: int, precision: str
) -> ScoreSettings:
    """All that the scores of a request depend on beside its texts and the model."""
    return ScoreSettings(
        precision=precision,
        max_length=max_length,
        truncation=request.truncation or service.truncation,
        max_query_tokens=request.max_query_tokens or service.max_query_tokens,
        instruction=request.instruction,
        chunking=request.chunking,
        side=request.side,
    )


def _cut_at(pairs: EncodedPairs, side: Side | None) -> tuple[EncodedPairs, ChunkMap | None]:
    """Pairs cut at a side, where that is not the model's own."""
    if side is None or side == pairs.template.side:
        return pairs, None
    return cut_at(pairs, side)


def _refuse_truncated(pairs: EncodedPairs, max_length: int) -> None:
    """Raise an error that names the first pair that lost tokens."""
    lost = pairs.truncated_tokens
    if lost.any():
        index = int(np.flatnonzero(lost)[0])
        raise InvalidInput(
            f"pairs[{pairs.places[index]}].document",
            f"with its query it has {int(pairs.lengths[index] + lost[index])} tokens or more, and "
            f"{max_length} is the most",
            "Shorten it, or allow truncation.",
        )


def _characters(pairs: Sequence[Pair]) -> list[int]:
    """Characters of each pair; what is not two texts counts nothing, since it is refused later."""
    try:
        return [len(query) + len(document) for query, document in pairs]
    except (TypeError, ValueError):
        return [0] * len(pairs)

"""The reranker for asyncio: concurrent calls in shared steps."""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TYPE_CHECKING, Any, Self, TypeVar

from echelon.call import check_rank, ranking_of, warn_if_cut
from echelon.engine import closed
from echelon.reranker import Reranker, override
from echelon.types import RunReport

if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Iterable, Sequence

    from echelon.call import Call
    from echelon.encode.pairs import EncodedPairs
    from echelon.types import FloatArray, Pair, Ranking, ScoredPairs

Result = TypeVar("Result")

THREADS = 2
"""Threads that check and encode, beside the one that scores: one for a long call, one for a short
call beside it."""

ALONE = frozenset({"token_budget", "batch_size", "allow", "progress"})
"""Options of one call that are about its steps: with one of them it has steps of its own."""


class AsyncReranker:
    """:class:`echelon.Reranker` for asyncio: the same methods, awaited.

    Calls under way at the same time share steps, by the rules of the server's batcher
    (docs/decisions/0007-batcher.md): a short call does not wait for a long one. Work runs in
    threads, so that the event loop never waits for the model; cancelling a call takes its pairs
    out. Shared steps count in the report of every call that had pairs in them.

    Args:
        model: as in :class:`echelon.Reranker`; it is loaded at once.
        **options: as in :class:`echelon.Reranker`.
    """

    def __init__(self, model: str | os.PathLike[str], **options: Any) -> None:
        self.reranker = Reranker(model, **options)
        self._together = self.reranker.together()
        self._threads = ThreadPoolExecutor(THREADS, thread_name_prefix="echelon")
        self._calls: set[asyncio.Task[ScoredPairs]] = set()
        self._open = True

    async def score(self, pairs: Iterable[Pair]) -> FloatArray:
        """As :meth:`echelon.Reranker.score`."""
        return warn_if_cut(await self.score_pairs(pairs), self.reranker.max_length)

    async def score_pairs(self, pairs: Iterable[Pair], **overrides: Any) -> ScoredPairs:
        """As :meth:`echelon.Reranker.score_pairs`."""
        if not self._open:
            raise closed()
        call = asyncio.create_task(self._score_pairs(pairs, overrides))
        self._calls.add(call)
        call.add_done_callback(self._calls.discard)
        return await call

    async def rank(
        self,
        query: str,
        documents: Sequence[str],
        top_n: int | None = None,
        **overrides: Any,
    ) -> Ranking:
        """As :meth:`echelon.Reranker.rank`."""
        if not self._open:
            raise closed()
        check_rank(query, documents, top_n)
        pairs = [(query, document) for document in documents]
        return ranking_of(query, documents, top_n, await self.score_pairs(pairs, **overrides))

    async def close(self) -> None:
        """Free the model once the calls under way have ended; closing twice does nothing."""
        if self._open:
            self._open = False
            while self._calls:
                await asyncio.wait(self._calls)
            await self._in_thread(self._together.close)
            await self._in_thread(self.reranker.close)
            self._threads.shutdown(wait=False)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.close()

    async def _score_pairs(self, pairs: Iterable[Pair], overrides: dict[str, Any]) -> ScoredPairs:
        options = override(self.reranker.options, overrides)
        if ALONE & set(overrides) or options.progress:
            return await self._in_thread(partial(self.reranker.score_pairs, pairs, **overrides))
        call = await self._in_thread(partial(self.reranker.begin, pairs, options))
        scoring: list[asyncio.Task[None]] = []
        try:
            for window in filter(None, call.windows):
                encoded = await self._in_thread(partial(call.encode, window))
                scoring.append(asyncio.create_task(self._score_window(call, window, encoded)))
            await asyncio.gather(*scoring)
        finally:  # one failed, or the caller has gone
            for task in scoring:
                task.cancel()
            await asyncio.gather(*scoring, return_exceptions=True)
        return call.scored()

    async def _score_window(self, call: Call, window: list[int], encoded: EncodedPairs) -> None:
        answer = await self._together.score(encoded)
        report = RunReport(
            scored=len(window),
            tokens=answer.tokens,
            cost_tokens=answer.cost_tokens,
            steps=len(answer.batch_sizes),
            ladder=answer.ladder,
        )
        call.keep(window, answer.logits, answer.truncated_tokens, report)

    async def _in_thread(self, work: Callable[[], Result]) -> Result:
        return await asyncio.get_running_loop().run_in_executor(self._threads, work)

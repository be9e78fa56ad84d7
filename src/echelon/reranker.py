"""Spine 1: texts in, ranked documents out.

A call goes: check → fold identical pairs → encode → plan and score (engine) → unfold → sort.

The reranker for asyncio: concurrent calls in shared steps.
"""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Self, TypeVar

from echelon.call import Call, check_rank, ranking_of, warn_if_cut
from echelon.engine.engine import Engine, StepLimits, closed
from echelon.engine.launch import prepare, with_profile
from echelon.errors import InvalidInput
from echelon.options import Options, check_max_length
from echelon.progress import bar
from echelon.scheduling.packing import step_budget
from echelon.types import RunReport

if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from echelon.engine.shared_engine import SharedEngine
    from echelon.tokenization.pairs import EncodedPairs
    from echelon.types import FloatArray, ModelInfo, Pair, Ranking, ScoredPairs


class Reranker:
    """Scores and ranks documents against queries with a cross-encoder.

    Safe to use from several threads; calls take turns on the device, step by step.

    Args:
        model: hub id, local folder, or ``"demo"``.
        **options: see :class:`echelon.options.Options`.

    Raises:
        InvalidInput: an option is unknown or wrong.
        ModelError: the model is not there, damaged, or of an unsupported kind.
        ProfileError: the profile cannot be read.
        OutOfMemory: the weights do not fit.
    """

    def __init__(self, model: str | os.PathLike[str], **options: Any) -> None:
        self.options, profile = with_profile(Options.of(**options))
        prepared = prepare(model, self.options, profile)
        self.model = prepared.folder
        self._encoder = prepared.encoder
        opener = prepared.opener()
        scorer = opener(precision=self.options.precision)
        prepared.check_profile(scorer.info)
        self._max_length = self._longest(self.options.max_length, scorer.info)
        self._engine = Engine(
            scorer,
            self._limits(scorer.info),
            reopen=lambda precision: opener(precision=precision),
            learned=prepared.learned,
        )

    @property
    def facts(self) -> ModelInfo:
        """What the model is and where it runs."""
        return self._engine.info

    @property
    def max_length(self) -> int:
        """Tokens a pair may have, special tokens included."""
        return self._max_length

    @property
    def token_budget(self) -> int:
        """Most tokens a step costs now; memory pressure may have lowered it."""
        return self._engine.budget

    def score(self, pairs: Iterable[Pair]) -> FloatArray:
        """Score (query, document) pairs.

        Returns:
            float32 [pairs], raw logits in input order.

        Raises:
            InvalidInput: a pair is not two strings, or its query leaves no room.
            OutOfMemory: a pair does not fit in memory alone.

        Warns:
            EchelonWarning: pairs were truncated; :meth:`score_pairs` tells which.
        """
        return warn_if_cut(self.score_pairs(pairs), self._max_length)

    def score_pairs(self, pairs: Iterable[Pair], **overrides: Any) -> ScoredPairs:
        """Score pairs and tell how: truncations, tokens, steps, memory ladder.

        Args:
            pairs: (query, document) texts.
            **overrides: ``token_budget``, ``batch_size``, ``max_length``, ``truncation``,
                ``max_query_tokens``, ``allow`` or ``progress`` for this call only.

        Raises:
            InvalidInput: as in :meth:`score`, or an override that is unknown or wrong.
            OutOfMemory: a pair does not fit in memory alone.
        """
        options = override(self.options, overrides)
        call = self.begin(pairs, options)
        with bar("Scoring", call.distinct, shown=options.progress) as scored:
            return self.finish(call, _encoded_ahead(call), scored)

    def begin(self, pairs: Iterable[Pair], options: Options) -> Call:
        """Check and fold the pairs of a call."""
        longest = self._longest(options.max_length, self.facts)
        return Call(pairs, self._encoder, options, longest)

    def finish(
        self,
        call: Call,
        portions: Iterable[tuple[list[int], EncodedPairs]],
        scored: Callable[[int], None] | None = None,
    ) -> ScoredPairs:
        """Score a call that was begun; see :meth:`score_pairs`.

        Args:
            call: what :meth:`begin` gave.
            portions: its windows and what :meth:`Call.encode` makes of each.
            scored: called after each step with the distinct pairs it finished.
        """
        limits = self._limits(self.facts, call.options)
        for window, encoded in portions:
            outcome = self._engine.run(encoded, limits=limits, scored=scored)
            call.keep(window, outcome.logits, outcome.truncated_tokens, outcome.report)
        return call.scored()

    def rank(
        self,
        query: str,
        documents: Sequence[str],
        top_n: int | None = None,
        **overrides: Any,
    ) -> Ranking:
        """Sort documents by relevance to the query.

        Args:
            query: the query.
            documents: texts; an empty list gives an empty ranking.
            top_n: results to return; None returns all.
            **overrides: as in :meth:`score_pairs`.

        Raises:
            InvalidInput: as in :meth:`score`, or ``top_n`` is not a positive number.
            OutOfMemory: a pair does not fit in memory alone.
        """
        check_rank(query, documents, top_n)
        scored = self.score_pairs([(query, document) for document in documents], **overrides)
        return ranking_of(query, documents, top_n, scored)

    def together(self) -> SharedEngine:
        """A way to score the calls of many tasks in shared steps; close it before the model."""
        from echelon.engine.shared_engine import SharedEngine

        return SharedEngine(self._engine, self._limits(self.facts))

    def close(self) -> None:
        """Free the model."""
        self._engine.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _longest(self, asked: int | None, facts: ModelInfo) -> int:
        return check_max_length(asked, facts.max_tokens, self._encoder.template.specials)

    def _limits(self, facts: ModelInfo, options: Options | None = None) -> StepLimits:
        options = options or self.options
        budget = step_budget(options.token_budget, options.batch_size, facts.device)
        return StepLimits(budget, options.batch_size, options.allow)


CALL_OPTIONS = frozenset(
    {
        "token_budget",
        "batch_size",
        "max_length",
        "truncation",
        "max_query_tokens",
        "allow",
        "progress",
    }
)
"""Options that one call may set for itself; the others are fixed when the model is loaded."""


def _encoded_ahead(call: Call) -> Iterator[tuple[list[int], EncodedPairs]]:
    """A call's windows, each encoded while the one before is scored."""
    first, *others = call.windows
    ready = call.encode(first)
    if not others:
        yield first, ready
        return
    with ThreadPoolExecutor(1, thread_name_prefix="echelon-encode") as thread:
        for window, following in pairwise([first, *others, []]):
            coming = thread.submit(call.encode, following)
            yield window, ready
            ready = coming.result()


def override(options: Options, overrides: dict[str, Any]) -> Options:
    """Options for one call.

    Raises:
        InvalidInput: an override is unknown, wrong, or cannot be set for one call.
    """
    if not overrides:
        return options
    fixed = sorted(set(overrides) - CALL_OPTIONS)
    if fixed:
        raise InvalidInput(
            fixed[0],
            "cannot be set for one call",
            f"One call may set: {', '.join(sorted(CALL_OPTIONS))}. "
            "Give the others to Reranker(...).",
        )
    return replace(options, **overrides)


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

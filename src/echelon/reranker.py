"""Reranker and AsyncReranker: texts in, ranked documents out; the life of a call, top to bottom.

A call goes: check and fold identical pairs (:mod:`echelon.engine.call`), take cached scores,
tokenize, pack and score (engine), unfold, sort by logit.
"""

from __future__ import annotations

import asyncio
import warnings
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TYPE_CHECKING, Any, Self, TypeVar

import numpy as np

from echelon.engine.call import Call
from echelon.engine.engine import Engine, SharedEngine, StepLimits, closed
from echelon.engine.launch import prepare, with_profile
from echelon.engine.score_cache import DocumentScores, may_be_kept
from echelon.errors import EchelonWarning
from echelon.options import Options, check_max_length, check_rank
from echelon.progress import bar
from echelon.scheduling.packing import step_budget
from echelon.types import RankedDocument, Ranking, RunReport, ScoredPairs

if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Iterable, Sequence

    import numpy.typing as npt

    from echelon.tokenization.pairs import EncodedPairs
    from echelon.types import FloatArray, ModelInfo, Pair

Result = TypeVar("Result")


class Reranker:
    """Scores and ranks documents against queries with a cross-encoder.

    Safe to use from several threads; calls take turns on the device, step by step.

    Args:
        model: hub id, ``"modelscope:owner/name"``, local folder, or ``"demo"``.
        **options: see :class:`echelon.options.Options`.

    Raises:
        InvalidInput: an option is unknown or wrong.
        ModelError: the model is not there, damaged, or of an unsupported kind.
        ProfileError: the profile cannot be read.
        OutOfMemory: the weights do not fit.
    """

    def __init__(self, model: str | os.PathLike[str], **options: Any) -> None:
        asked = Options.of(**options)
        prepared = prepare(model, asked, with_profile(asked)[1])
        self.options = prepared.options
        self.model, self._encoder = prepared.folder, prepared.encoder
        opener = prepared.opener()
        scorer = opener(precision=self.options.precision)
        prepared.check_profile(scorer.info)
        self._max_length = self._max_length_of(self.options, scorer.info)
        self.cache = prepared.score_cache()
        self._engine = Engine(
            scorer,
            _step_limits(self.options, scorer.info),
            reopen=lambda precision: opener(precision=precision),
            learned=prepared.learned,
        )

    @property
    def facts(self) -> ModelInfo:
        """The model, its device and its limits."""
        return self._engine.info

    @property
    def max_length(self) -> int:
        """Tokens a pair may have, special tokens included."""
        return self._max_length

    @property
    def token_budget(self) -> int:
        """Tokens a step may cost now; the OOM ladder may have lowered it."""
        return self._engine.budget

    def rank(
        self, query: str, documents: Sequence[str], top_n: int | None = None, **overrides: Any
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
        pairs = _pairs_to_rank(query, documents, top_n)
        return _ranking(query, documents, top_n, self.score_pairs(pairs, **overrides))

    def score(self, pairs: Iterable[Pair]) -> FloatArray:
        """Score (query, document) pairs.

        Returns:
            float32 [pairs], raw logits in input order.

        Raises:
            InvalidInput: a pair is not two strings, or its query leaves no room.
            OutOfMemory: a pair does not fit in memory alone.

        Warns:
            EchelonWarning: pairs were truncated; :meth:`score_pairs` says which.
        """
        return _warn_if_cut(self.score_pairs(pairs), self._max_length)

    def score_pairs(self, pairs: Iterable[Pair], **overrides: Any) -> ScoredPairs:
        """Score pairs and report truncations, tokens, steps and actions of the OOM ladder.

        Args:
            pairs: (query, document) texts.
            **overrides: ``token_budget``, ``batch_size``, ``max_length``, ``truncation``,
                ``max_query_tokens``, ``allow`` or ``progress`` for this call only.

        Raises:
            InvalidInput: as in :meth:`score`, or an override that is unknown or wrong.
            OutOfMemory: a pair does not fit in memory alone.
        """
        options = self.options.overridden(overrides)
        call = self.begin(pairs, options)
        self.look_up(call)
        with bar("Scoring", call.left, shown=options.progress) as scored:
            return self.finish(call, call.encoded_ahead(), scored)

    def begin(self, pairs: Iterable[Pair], options: Options) -> Call:
        """Check the pairs of a call and fold identical ones."""
        return Call(pairs, self._encoder, options, self._max_length_of(options, self.facts))

    def look_up(self, call: Call) -> None:
        """Take the scores of a call that are cached; its windows then hold the other pairs."""
        if self.cache is not None:
            call.reopened = self._engine.reopened
            call.look_up(self.cache, self.facts.precision)

    def finish(
        self,
        call: Call,
        portions: Iterable[tuple[list[int], EncodedPairs]],
        scored: Callable[[int], None] | None = None,
    ) -> ScoredPairs:
        """Score the pairs of a call, given each of its windows with its encoded pairs.

        ``scored`` is called after each step with the number of distinct pairs it finished.
        """
        limits = _step_limits(call.options, self.facts)
        for window, encoded in portions:
            found = self._engine.run(encoded, limits=limits, scored=scored)
            scores = DocumentScores(found.logits, found.truncated_tokens, encoded.lengths)
            self.keep(call, window, scores, found.report)
        return call.scored()

    def keep(
        self, call: Call, window: Sequence[int], scores: DocumentScores, report: RunReport
    ) -> None:
        """Store the scores of a window in its call, and in the cache those of its settings."""
        call.keep(window, scores, report)
        cache, cached = self.cache, call.cached
        if cache is None or cached is None or not may_be_kept(report.ladder):
            return
        if self._engine.reopened == call.reopened:  # so all steps were in the settings' precision
            cache.keep([cached.keys[index] for index in window], scores)

    def together(self) -> SharedEngine:
        """A way to score calls of several tasks in shared steps; close it before the model."""
        return SharedEngine(self._engine, _step_limits(self.options, self.facts))

    def close(self) -> None:
        """Free the model."""
        self.cache = None  # a closed model refuses every call
        self._engine.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _max_length_of(self, options: Options, info: ModelInfo) -> int:
        specials = self._encoder.template.specials
        return check_max_length(options.max_length, info.max_tokens, specials)


THREADS = 2
"""Threads that check and tokenize: one for a long call, one for a short call beside it."""

STEP_OPTIONS = frozenset({"token_budget", "batch_size", "allow", "progress"})
"""A call that sets one of these options has steps of its own."""


class AsyncReranker:
    """:class:`echelon.Reranker` for asyncio: the same methods, awaited.

    Concurrent calls share steps, by the rules of the server's batcher
    (docs/decisions/0007-batcher.md): a short call does not wait for a long one. Work runs in
    threads, so that the event loop never waits for the model. Cancelling a call removes its pairs.
    Shared steps count in the report of each call that had pairs in them.

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

    async def rank(
        self, query: str, documents: Sequence[str], top_n: int | None = None, **overrides: Any
    ) -> Ranking:
        """As :meth:`echelon.Reranker.rank`."""
        self._refuse_if_closed()
        pairs = _pairs_to_rank(query, documents, top_n)
        return _ranking(query, documents, top_n, await self.score_pairs(pairs, **overrides))

    async def score(self, pairs: Iterable[Pair]) -> FloatArray:
        """As :meth:`echelon.Reranker.score`."""
        return _warn_if_cut(await self.score_pairs(pairs), self.reranker.max_length)

    async def score_pairs(self, pairs: Iterable[Pair], **overrides: Any) -> ScoredPairs:
        """As :meth:`echelon.Reranker.score_pairs`."""
        self._refuse_if_closed()
        call = asyncio.create_task(self._score_pairs(pairs, overrides))
        self._calls.add(call)
        call.add_done_callback(self._calls.discard)
        return await call

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
        options = self.reranker.options.overridden(overrides)
        if STEP_OPTIONS & set(overrides) or options.progress:
            return await self._in_thread(partial(self.reranker.score_pairs, pairs, **overrides))
        call = await self._in_thread(partial(self.reranker.begin, pairs, options))
        await self._in_thread(partial(self.reranker.look_up, call))
        scoring: list[asyncio.Task[None]] = []
        try:
            for window in filter(None, call.windows):
                encoded = await self._in_thread(partial(call.encode, window))
                scoring.append(asyncio.create_task(self._score_window(call, window, encoded)))
            await asyncio.gather(*scoring)
        finally:  # a window failed, or the call was cancelled
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
        scores = DocumentScores(answer.logits, answer.truncated_tokens, encoded.lengths)
        self.reranker.keep(call, window, scores, report)

    async def _in_thread(self, work: Callable[[], Result]) -> Result:
        return await asyncio.get_running_loop().run_in_executor(self._threads, work)

    def _refuse_if_closed(self) -> None:
        if not self._open:
            raise closed()


def _step_limits(options: Options, info: ModelInfo) -> StepLimits:
    budget = step_budget(options.token_budget, options.batch_size, info.device)
    return StepLimits(budget, options.batch_size, options.allow)


def _pairs_to_rank(query: str, documents: Sequence[str], top_n: int | None) -> list[Pair]:
    check_rank(query, documents, top_n)
    return [(query, document) for document in documents]


def _ranking(
    query: str, documents: Sequence[str], top_n: int | None, scored: ScoredPairs
) -> Ranking:
    """Sort documents by logit, best first; equal logits keep their order."""
    order = np.argsort(-scored.logits, kind="stable")[:top_n]
    probabilities = sigmoid(scored.logits)
    results = tuple(
        RankedDocument(
            index=int(i),
            score=float(probabilities[i]),
            logit=float(scored.logits[i]),
            document=documents[i],
            truncated_tokens=int(scored.truncated_tokens[i]),
        )
        for i in order
    )
    return Ranking(query, results, scored.report)


def _warn_if_cut(scored: ScoredPairs, max_length: int) -> FloatArray:
    """The logits, with a warning to the caller of ``score`` if pairs were truncated."""
    cut = int(np.count_nonzero(scored.truncated_tokens))
    if cut:
        warnings.warn(
            f"{cut} of {len(scored.logits)} pairs were cut to {max_length} tokens. "
            "Raise max_length if the model allows, or call score_pairs to see which.",
            EchelonWarning,
            stacklevel=3,
        )
    return scored.logits


def sigmoid(logits: FloatArray) -> npt.NDArray[np.float64]:
    """Logistic function in float64: large logits stay apart, very negative ones do not overflow."""
    return np.exp(-np.logaddexp(0.0, -logits.astype(np.float64)))

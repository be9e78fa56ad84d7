"""Spine 1: texts in, ranked documents out.

A call goes: check → fold identical pairs → encode → plan and score (engine) → unfold → sort.
"""

from __future__ import annotations

import asyncio
import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from itertools import pairwise
from typing import TYPE_CHECKING, Any, ParamSpec, Self, TypeVar

import numpy as np

from echelon.checks import (
    check_documents,
    check_max_length,
    check_pairs,
    check_text,
    check_top_n,
)
from echelon.config import Options
from echelon.engine import Engine, Limits, closed
from echelon.errors import EchelonWarning, InvalidInput
from echelon.plan.pack import step_budget, windows
from echelon.prepare import prepare, with_profile
from echelon.progress import bar
from echelon.types import RankedDocument, Ranking, RunReport, ScoredPairs

if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Iterable, Iterator, Sequence

    import numpy.typing as npt

    from echelon.encode.pairs import EncodedPairs
    from echelon.score.base import Facts
    from echelon.types import FloatArray, IntArray, Pair


P = ParamSpec("P")
Result = TypeVar("Result")


class Reranker:
    """Scores and ranks documents against queries with a cross-encoder.

    Safe to use from several threads; calls take turns on the device, step by step.

    Args:
        model: hub id, local folder, or ``"demo"``.
        **options: see :class:`echelon.config.Options`.

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
        prepared.check_profile(scorer.facts)
        self._max_length = self._longest(self.options.max_length, scorer.facts)
        self._engine = Engine(
            scorer,
            self._limits(scorer.facts),
            reopen=lambda precision: opener(precision=precision),
            learned=prepared.learned,
        )

    @property
    def facts(self) -> Facts:
        """What the model is and where it runs."""
        return self._engine.facts

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
        scored = self.score_pairs(pairs)
        cut = int(np.count_nonzero(scored.truncated_tokens))
        if cut:
            warnings.warn(
                f"{cut} of {len(scored.logits)} pairs were cut to {self._max_length} tokens. "
                "Raise max_length if the model allows, or call score_pairs to see which.",
                EchelonWarning,
                stacklevel=2,
            )
        return scored.logits

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
        options = _override(self.options, overrides)
        checked = check_pairs(pairs)
        distinct, first, back = _fold(checked)
        logits = np.empty(len(distinct), dtype=np.float32)
        truncated = np.empty(len(distinct), dtype=np.int32)
        reports = []
        limits = self._limits(self.facts, options)
        with bar("Scoring", len(distinct), shown=options.progress) as scored:
            for window, encoded in self._encoded_ahead(distinct, first, options):
                outcome = self._engine.run(encoded, limits=limits, scored=scored)
                logits[window], truncated[window] = outcome.logits, outcome.truncated_tokens
                reports.append(outcome.report)
        report = replace(RunReport.of(reports), pairs=len(checked))
        return ScoredPairs(logits[back], truncated[back], report)

    def _encoded_ahead(
        self, pairs: Sequence[Pair], places: Sequence[int], options: Options
    ) -> Iterator[tuple[list[int], EncodedPairs]]:
        """Pairs in windows, longest texts first, each encoded while the one before is scored."""
        longest = self._longest(options.max_length, self.facts)

        def encode(window: list[int]) -> EncodedPairs:
            return self._encoder.encode(
                [pairs[i] for i in window],
                longest,
                options.truncation,
                options.max_query_tokens,
                [places[i] for i in window],
            )

        sizes = [len(query) + len(document) for query, document in pairs]
        first, *others = windows(sizes)
        ready = encode(first)
        if not others:
            yield first, ready
            return
        with ThreadPoolExecutor(1, thread_name_prefix="echelon-encode") as thread:
            for window, following in pairwise([first, *others, []]):
                coming = thread.submit(encode, following)
                yield window, ready
                ready = coming.result()

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
        check_text("query", query)
        check_documents(documents)
        check_top_n(top_n)
        scored = self.score_pairs([(query, document) for document in documents], **overrides)
        order = np.argsort(-scored.logits, kind="stable")[:top_n]
        chances = sigmoid(scored.logits)
        results = tuple(
            RankedDocument(
                index=int(i),
                score=float(chances[i]),
                logit=float(scored.logits[i]),
                document=documents[i],
                truncated_tokens=int(scored.truncated_tokens[i]),
            )
            for i in order
        )
        return Ranking(query, results, scored.report)

    def close(self) -> None:
        """Free the model."""
        self._engine.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _longest(self, asked: int | None, facts: Facts) -> int:
        return check_max_length(asked, facts.max_tokens, self._encoder.template.specials)

    def _limits(self, facts: Facts, options: Options | None = None) -> Limits:
        options = options or self.options
        budget = step_budget(options.token_budget, options.batch_size, facts.device)
        return Limits(budget, options.batch_size, options.allow)


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


class AsyncReranker:
    """:class:`Reranker` for asyncio: the same methods, awaited.

    Work runs in one thread of its own, so the event loop never waits for the model.

    Args:
        model: as in :class:`Reranker`; it is loaded at once.
        **options: as in :class:`Reranker`.
    """

    def __init__(self, model: str | os.PathLike[str], **options: Any) -> None:
        self.reranker = Reranker(model, **options)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="echelon")
        self._open = True

    async def score(self, pairs: Iterable[Pair]) -> FloatArray:
        """As :meth:`Reranker.score`."""
        return await self._call(self.reranker.score, pairs)

    async def score_pairs(self, pairs: Iterable[Pair], **overrides: Any) -> ScoredPairs:
        """As :meth:`Reranker.score_pairs`."""
        return await self._call(self.reranker.score_pairs, pairs, **overrides)

    async def rank(
        self,
        query: str,
        documents: Sequence[str],
        top_n: int | None = None,
        **overrides: Any,
    ) -> Ranking:
        """As :meth:`Reranker.rank`."""
        return await self._call(self.reranker.rank, query, documents, top_n, **overrides)

    async def close(self) -> None:
        """Free the model once the calls under way have ended; closing twice does nothing."""
        if self._open:
            self._open = False
            loop = asyncio.get_running_loop()
            await loop.run_in_executor(self._thread, self.reranker.close)
            self._thread.shutdown(wait=False)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.close()

    async def _call(
        self, function: Callable[P, Result], *args: P.args, **kwargs: P.kwargs
    ) -> Result:
        if not self._open:
            raise closed()
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._thread, partial(function, *args, **kwargs))


def sigmoid(logits: FloatArray) -> npt.NDArray[np.float64]:
    """Logistic function in float64: large logits stay apart, very negative ones do not overflow."""
    return np.exp(-np.logaddexp(0.0, -logits.astype(np.float64)))


def _fold(pairs: list[Pair]) -> tuple[list[Pair], list[int], IntArray]:
    """Distinct pairs, where each stands first, and for every pair which of them it is."""
    numbers: dict[Pair, int] = {}
    back = np.array([numbers.setdefault(pair, len(numbers)) for pair in pairs], dtype=np.int32)
    first = np.unique(back, return_index=True)[1].tolist()
    return list(numbers), first, back


def _override(options: Options, overrides: dict[str, Any]) -> Options:
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

"""The pairs of one call: checked, identical ones folded, in windows, and back in order."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np

from echelon.engine.score_cache import CachedScores, ScoreSettings
from echelon.options import check_pairs
from echelon.scheduling.packing import windows
from echelon.types import RunReport, ScoredPairs

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from echelon.engine.score_cache import DocumentScores, ScoreCache
    from echelon.options import Options
    from echelon.tokenization.pairs import EncodedPairs
    from echelon.tokenization.tokenizer import PairEncoder
    from echelon.types import IntArray, Pair

    Portion = tuple[list[int], EncodedPairs]
    """Positions of distinct pairs, and these pairs encoded."""


class Call:
    """One call; its distinct pairs are numbered from 0 in the order in which they occur first."""

    def __init__(
        self, pairs: Iterable[Pair], encoder: PairEncoder, options: Options, max_length: int
    ) -> None:
        self._pairs, self._places, self._back = _fold(check_pairs(pairs))
        self.options, self._encoder, self._max_length = options, encoder, max_length
        self.cached: CachedScores | None = None
        self.reopened = 0  # times that the engine's model was reopened before it was looked up
        # Distinct pairs that are tokenized together, longest texts first.
        self.windows = self._windows(range(len(self._pairs)))
        self._logits = np.empty(len(self._pairs), dtype=np.float32)
        self._truncated = np.empty(len(self._pairs), dtype=np.int32)
        self._reports: list[RunReport] = []

    @property
    def left(self) -> int:
        """Distinct pairs that are to be scored."""
        return len(self._pairs) if self.cached is None else len(self.cached.missing)

    def look_up(self, cache: ScoreCache, precision: str) -> None:
        """Take the scores that are cached; the windows then hold the other pairs."""
        settings = ScoreSettings(
            precision=precision,
            max_length=self._max_length,
            truncation=self.options.truncation,
            max_query_tokens=self.options.max_query_tokens,
            instruction=self.options.instruction,
        )
        self.cached = cache.find(self._pairs, settings)
        self._logits[:], self._truncated[:], _ = self.cached.scores
        self.windows = self._windows(self.cached.missing.tolist())

    def encode(self, window: Sequence[int]) -> EncodedPairs:
        """Tokenize a window; refuse a query that leaves no room for its document."""
        return self._encoder.encode(
            [self._pairs[i] for i in window],
            self._max_length,
            self.options.truncation,
            self.options.max_query_tokens,
            [self._places[i] for i in window],
            instruction=self.options.instruction,
        )

    def encoded_ahead(self) -> Iterator[Portion]:
        """The windows, each tokenized while the previous one is scored."""
        ready = self.encode(self.windows[0])
        if len(self.windows) == 1:
            yield self.windows[0], ready
            return
        with ThreadPoolExecutor(1, thread_name_prefix="echelon-encode") as thread:
            for window, following in pairwise([*self.windows, []]):
                coming = thread.submit(self.encode, following)
                yield window, ready
                ready = coming.result()

    def missing(self, portions: Iterable[Portion]) -> Iterator[Portion]:
        """Windows that were encoded before the cache was asked, without the pairs that it has."""
        if self.cached is None:
            yield from portions
            return
        missing = set(self.cached.missing.tolist())
        for window, encoded in portions:
            kept = [place for place, number in enumerate(window) if number in missing]
            yield [window[place] for place in kept], encoded.only(kept)

    def keep(self, window: Sequence[int], scores: DocumentScores, report: RunReport) -> None:
        """Store the scores of a window."""
        self._logits[window], self._truncated[window] = scores.logits, scores.truncated_tokens
        self._reports.append(report)

    def scored(self) -> ScoredPairs:
        """The scores in the order of the call, once all windows are stored."""
        hits = 0 if self.cached is None else self.cached.hits
        report = replace(RunReport.of(self._reports), pairs=len(self._back), cached=hits)
        return ScoredPairs(self._logits[self._back], self._truncated[self._back], report)

    def _windows(self, numbers: Sequence[int]) -> list[list[int]]:
        """Divide distinct pairs into windows."""
        texts = (self._pairs[number] for number in numbers)
        found = windows([len(query) + len(document) for query, document in texts])
        return [[numbers[place] for place in window] for window in found]


def _fold(pairs: list[Pair]) -> tuple[list[Pair], list[int], IntArray]:
    """Distinct pairs, where each occurs first, and for every pair the number of its distinct."""
    numbers: dict[Pair, int] = {}
    back = np.array([numbers.setdefault(pair, len(numbers)) for pair in pairs], dtype=np.int32)
    first = np.unique(back, return_index=True)[1].tolist()
    return list(numbers), first, back

"""One call's pairs on their way: checked, identical ones folded, in windows, and back in order."""

from __future__ import annotations

import warnings
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from echelon.errors import EchelonWarning
from echelon.options import check_documents, check_pairs, check_text, check_top_n
from echelon.scheduling.packing import windows
from echelon.types import RankedDocument, Ranking, RunReport, ScoredPairs

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    import numpy.typing as npt

    from echelon.options import Options
    from echelon.tokenization.pairs import EncodedPairs
    from echelon.tokenization.tokenizer import PairEncoder
    from echelon.types import FloatArray, IntArray, Pair


class Call:
    """The pairs of one call.

    Args:
        pairs: (query, document) texts.
        encoder: the model's tokenizer.
        options: how to truncate.
        longest: tokens a pair may have.

    Attributes:
        options: the call's options.
        distinct: how many different pairs there are.
        windows: their positions, longest texts first, in portions that are encoded at once.

    Raises:
        InvalidInput: a pair is not two strings.
    """

    def __init__(
        self, pairs: Iterable[Pair], encoder: PairEncoder, options: Options, longest: int
    ) -> None:
        checked = check_pairs(pairs)
        self._pairs, self._places, self._back = _fold(checked)
        self._encoder = encoder
        self.options = options
        self._longest = longest
        self.distinct = len(self._pairs)
        self.windows = windows([len(query) + len(document) for query, document in self._pairs])
        self._logits = np.empty(self.distinct, dtype=np.float32)
        self._truncated = np.empty(self.distinct, dtype=np.int32)
        self._reports: list[RunReport] = []

    def encode(self, window: Sequence[int]) -> EncodedPairs:
        """Encode a window.

        Raises:
            InvalidInput: a query leaves no room for its document.
        """
        return self._encoder.encode(
            [self._pairs[i] for i in window],
            self._longest,
            self.options.truncation,
            self.options.max_query_tokens,
            [self._places[i] for i in window],
        )

    def keep(
        self, window: Sequence[int], logits: FloatArray, truncated: IntArray, report: RunReport
    ) -> None:
        """Keep a window's scores."""
        self._logits[window], self._truncated[window] = logits, truncated
        self._reports.append(report)

    def scored(self) -> ScoredPairs:
        """The scores in the order of the call; every window's must have been kept."""
        report = replace(RunReport.of(self._reports), pairs=len(self._back))
        return ScoredPairs(self._logits[self._back], self._truncated[self._back], report)


def check_rank(query: object, documents: object, top_n: object) -> None:
    """Check what is to be ranked.

    Raises:
        InvalidInput: no text, no list of texts, or no positive number.
    """
    check_text("query", query)
    check_documents(documents)
    check_top_n(top_n)


def ranking_of(
    query: str, documents: Sequence[str], top_n: int | None, scored: ScoredPairs
) -> Ranking:
    """Sort documents by logit, best first; equal logits keep their order."""
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


def warn_if_cut(scored: ScoredPairs, max_length: int) -> FloatArray:
    """The logits, with a warning to the caller's caller where pairs were cut.

    Warns:
        EchelonWarning: pairs were truncated.
    """
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


def _fold(pairs: list[Pair]) -> tuple[list[Pair], list[int], IntArray]:
    """Distinct pairs, where each stands first, and for every pair which of them it is."""
    numbers: dict[Pair, int] = {}
    back = np.array([numbers.setdefault(pair, len(numbers)) for pair in pairs], dtype=np.int32)
    first = np.unique(back, return_index=True)[1].tolist()
    return list(numbers), first, back

"""What the adapters share: a model or a reranker in, and rankings that say what was cut."""

from __future__ import annotations

import asyncio
import os
import warnings
from typing import TYPE_CHECKING, Any

from echelon.errors import EchelonWarning, InvalidInput, MissingDependency
from echelon.reranker import AsyncReranker, Reranker

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from echelon.types import RankedDocument, Ranking

Model = str | os.PathLike[str] | Reranker | AsyncReranker
"""A hub id, a local folder, ``"demo"``, or a reranker that is open."""


def opened(model: Model, options: Mapping[str, Any]) -> Reranker:
    """The reranker to ask.

    Raises:
        InvalidInput: options for a reranker that is open already, or wrong ones.
        ModelError: the model is not there, damaged, or of an unsupported kind.
        ProfileError: the profile cannot be read.
        OutOfMemory: the weights do not fit.
    """
    if not isinstance(model, Reranker | AsyncReranker):
        return Reranker(model, **options)
    check_no_options(options)
    return model.reranker if isinstance(model, AsyncReranker) else model


def check_no_options(options: Mapping[str, Any]) -> None:
    """Refuse options beside a reranker that is open.

    Raises:
        InvalidInput: names the first of them.
    """
    for name in options:
        raise InvalidInput(
            name,
            "comes too late for a reranker that is open",
            "Give it to Reranker(...), or pass the model's name here.",
        )


def ranked(
    reranker: Reranker, query: str, documents: Sequence[str], top_n: int | None
) -> Sequence[RankedDocument]:
    """The best documents, best first.

    Raises:
        InvalidInput: the query or a document is no text, or the query leaves no room.
        OutOfMemory: a document does not fit in memory alone.

    Warns:
        EchelonWarning: documents were cut to ``max_length``.
    """
    return _best(reranker.rank(query, documents), reranker.max_length, top_n)


async def ranked_async(
    model: Model, reranker: Reranker, query: str, documents: Sequence[str], top_n: int | None
) -> Sequence[RankedDocument]:
    """As :func:`ranked`; in steps shared with other calls where the model is an AsyncReranker."""
    if isinstance(model, AsyncReranker):
        ranking = await model.rank(query, documents)
    else:
        ranking = await asyncio.to_thread(reranker.rank, query, documents)
    return _best(ranking, reranker.max_length, top_n)


def _best(ranking: Ranking, max_length: int, top_n: int | None) -> Sequence[RankedDocument]:
    cut = sum(result.truncated_tokens > 0 for result in ranking.results)
    if cut:
        warnings.warn(
            f"{cut} of {len(ranking.results)} documents were cut to {max_length} tokens. "
            "Raise max_length if the model allows, or split them before.",
            EchelonWarning,
            stacklevel=4,
        )
    return ranking.results[:top_n]


def missing(package: str, extra: str) -> MissingDependency:
    """The error of an adapter whose framework is not installed."""
    return MissingDependency(
        f"echelon.integrations.{extra} needs {package}, which is not installed. "
        f"Install it with: pip install 'echelon-rerank[{extra}]'"
    )

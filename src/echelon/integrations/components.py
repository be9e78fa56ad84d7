"""Shared by the framework components: open a reranker, rank, warn about documents that are cut."""

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
"""A hub id, a local folder, ``"demo"``, or an open reranker."""


def opened(model: Model, options: Mapping[str, Any]) -> Reranker:
    """The reranker to use; options beside an open one are refused."""
    if not isinstance(model, Reranker | AsyncReranker):
        return Reranker(model, **options)
    check_no_options(options)
    return model.reranker if isinstance(model, AsyncReranker) else model


def check_no_options(options: Mapping[str, Any]) -> None:
    """Raise :class:`InvalidInput` for options beside an open reranker."""
    for name in options:
        remedy = "Give it to Reranker(...), or pass the model's name here."
        raise InvalidInput(name, "cannot be set on a reranker that is open", remedy)


def ranked(
    reranker: Reranker, query: str, documents: Sequence[str], top_n: int | None
) -> Sequence[RankedDocument]:
    """The best documents, best first; warns about documents that were cut to ``max_length``."""
    return _best(reranker.rank(query, documents), reranker.max_length, top_n)


async def ranked_async(
    model: Model, reranker: Reranker, query: str, documents: Sequence[str], top_n: int | None
) -> Sequence[RankedDocument]:
    """As :func:`ranked`; in steps shared with other calls if the model is an AsyncReranker."""
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
    """The error of a component whose framework is not installed."""
    problem = f"echelon.integrations.{extra} needs {package}, which is not installed."
    return MissingDependency(problem, extra)

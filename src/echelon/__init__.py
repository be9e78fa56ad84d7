"""Echelon: the reranking engine that tunes itself.

    from echelon import Reranker

    with Reranker("demo") as reranker:
        ranking = reranker.rank("query", ["a document", "another"])

Names are imported on first use, so ``import echelon`` takes no time.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from echelon import moved

if TYPE_CHECKING:
    from echelon.errors import (
        BadCheckpoint,
        EchelonError,
        EchelonWarning,
        InvalidInput,
        MissingDependency,
        ModelError,
        ModelNotFound,
        OutOfMemory,
        ProfileError,
        StorageError,
        UnsupportedModel,
    )
    from echelon.reranker import AsyncReranker, Reranker
    from echelon.types import RankedDocument, Ranking, RunReport, ScoredPairs

__version__ = "0.1.0"

moved.install()

_MODULES = {
    "AsyncReranker": "reranker",
    "RankedDocument": "types",
    "Ranking": "types",
    "Reranker": "reranker",
    "RunReport": "types",
    "ScoredPairs": "types",
}
"""Module of each public name; the other names are errors."""

__all__ = [
    "AsyncReranker",
    "BadCheckpoint",
    "EchelonError",
    "EchelonWarning",
    "InvalidInput",
    "MissingDependency",
    "ModelError",
    "ModelNotFound",
    "OutOfMemory",
    "ProfileError",
    "RankedDocument",
    "Ranking",
    "Reranker",
    "RunReport",
    "ScoredPairs",
    "StorageError",
    "UnsupportedModel",
    "__version__",
]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'echelon' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"echelon.{_MODULES.get(name, 'errors')}"), name)

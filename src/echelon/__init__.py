"""Echelon: the reranking engine that tunes itself.

    from echelon import Reranker

    with Reranker("demo") as reranker:
        ranking = reranker.rank("query", ["a document", "another"])

Names are imported on first use, so ``import echelon`` takes no time.
"""

from __future__ import annotations

import importlib
import sys
from importlib.machinery import ModuleSpec
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence
    from types import ModuleType

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
    return getattr(importlib.import_module(f"echelon.{_MODULES.get(name, 'errors')}"), name)


_MOVED = {
    "echelon.compat": "echelon.integrations",
    "echelon.adapters": "echelon.integrations",
    "echelon.adapters.haystack": "echelon.integrations.haystack",
    "echelon.adapters.langchain": "echelon.integrations.langchain",
    "echelon.adapters.llamaindex": "echelon.integrations.llamaindex",
    "echelon.scale": "echelon.integrations.ray",
    "echelon.scale.serve": "echelon.integrations.ray.serve",
}
"""Import paths of earlier versions, which saved pipelines and scripts use: old to new."""


class _MovedModule:
    """Finds a module under its old path, and loads the module of the new path.

    It extends no class of :mod:`importlib.abc`, whose import loads sixty more modules.
    """

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        del path, target
        return ModuleSpec(name, self) if name in _MOVED else None  # type: ignore[arg-type]  # no importlib.abc

    def create_module(self, spec: ModuleSpec) -> None:
        del spec

    def exec_module(self, module: ModuleType) -> None:
        sys.modules[module.__name__] = importlib.import_module(_MOVED[module.__name__])


sys.meta_path.append(_MovedModule())

"""Echelon inside other libraries, each with its own extra.

Scripts keep their calls and change one import; unsupported arguments are refused with a remedy:

    from echelon.integrations import CrossEncoder    # sentence-transformers' class
    from echelon.integrations import FlagReranker    # FlagEmbedding's class

Components take a model's name with options of :class:`echelon.Reranker`, or an open reranker:

    from echelon.integrations.langchain import EchelonReranker    # echelon-rerank[langchain]
    from echelon.integrations.llamaindex import EchelonRerank     # echelon-rerank[llamaindex]
    from echelon.integrations.haystack import EchelonRanker       # echelon-rerank[haystack]
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from echelon.integrations.flag_embedding import FlagReranker
    from echelon.integrations.sentence_transformers import CrossEncoder

_HOMES = {"CrossEncoder": "sentence_transformers", "FlagReranker": "flag_embedding"}

__all__ = ["CrossEncoder", "FlagReranker"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'echelon.integrations' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"echelon.integrations.{_HOMES[name]}"), name)

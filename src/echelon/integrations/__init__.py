"""Scripts people already have, run by Echelon with one changed import.

    from echelon.compat import CrossEncoder    # sentence-transformers' class
    from echelon.compat import FlagReranker    # FlagEmbedding's class

Same constructor, same calls, same kinds of results, same scores. What Echelon cannot do is
refused by name with what to do instead; nothing that is passed in is silently dropped.

Echelon as a component of other frameworks, each in its own module and behind its own extra.

    from echelon.adapters.langchain import EchelonReranker    # echelon-rerank[langchain]
    from echelon.adapters.llamaindex import EchelonRerank     # echelon-rerank[llamaindex]
    from echelon.adapters.haystack import EchelonRanker       # echelon-rerank[haystack]

Each takes a model's name with the options of :class:`echelon.Reranker`, or one that is open already
and may be shared, and gives back its order and its scores.
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

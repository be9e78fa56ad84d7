"""Scripts people already have, run by Echelon with one changed import.

    from echelon.compat import CrossEncoder    # sentence-transformers' class
    from echelon.compat import FlagReranker    # FlagEmbedding's class

Same constructor, same calls, same kinds of results, same scores. What Echelon cannot do is
refused by name with what to do instead; nothing that is passed in is silently dropped.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from echelon.compat.cross_encoder import CrossEncoder
    from echelon.compat.flag import FlagReranker

_HOMES = {"CrossEncoder": "cross_encoder", "FlagReranker": "flag"}

__all__ = ["CrossEncoder", "FlagReranker"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'echelon.compat' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"echelon.compat.{_HOMES[name]}"), name)

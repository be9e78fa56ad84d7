"""Keys and values of the latest prefixes, so that later steps of a query do not compute them again.

It holds no more than a number of bytes, the least recently used out first. What is kept of one
prefix serves any other that begins with the same tokens, as far as they are the same.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import TYPE_CHECKING

from echelon.models.prefixes import common_length

if TYPE_CHECKING:
    from collections.abc import Sequence

    from echelon.models.causal_attention import KeysAndValues
    from echelon.types import IntArray

CACHE_BYTES = 64 * 2**20
"""Some six queries of 90 tokens for Qwen3-Reranker-0.6B in bf16, 112 KiB a token."""

MAX_PREFIXES = 64
"""Prefixes kept of small models: each pair of a step is compared with all."""


@dataclass(frozen=True, slots=True)
class CachedPrefix:
    """A prefix and its keys and values in each layer."""

    ids: IntArray  # int32 [tokens]
    layers: tuple[KeysAndValues, ...]

    @property
    def nbytes(self) -> int:
        """Size of all layers."""
        return sum(layer.nbytes for layer in self.layers)


class PrefixCache:
    """Prefixes by their token ids, the least recently used first."""

    def __init__(self, max_bytes: int = CACHE_BYTES) -> None:
        self.max_bytes = max_bytes
        self.nbytes = 0
        self._prefixes: OrderedDict[bytes, CachedPrefix] = OrderedDict()

    def __len__(self) -> int:
        return len(self._prefixes)

    def known(self, ids: IntArray) -> int:
        """How many first tokens are cached."""
        return max((common_length(p.ids, ids) for p in self._prefixes.values()), default=0)

    def find(self, ids: IntArray) -> CachedPrefix | None:
        """The prefix that has most first tokens in common; None if nothing is cached."""
        best = max(self._prefixes.values(), key=lambda p: common_length(p.ids, ids), default=None)
        if best is not None:
            self._prefixes.move_to_end(best.ids.tobytes())
        return best

    def keep(self, ids: IntArray, layers: Sequence[KeysAndValues]) -> None:
        """Add a prefix, in place of those that it continues."""
        new = CachedPrefix(ids.copy(), tuple(layers))
        for key, old in list(self._prefixes.items()):
            if common_length(old.ids, ids) == len(old.ids):
                self._drop(key)
        self._prefixes[new.ids.tobytes()] = new
        self.nbytes += new.nbytes
        while self.nbytes > self.max_bytes or len(self) > MAX_PREFIXES:
            self._drop(next(iter(self._prefixes)))

    def clear(self) -> None:
        """Forget all."""
        self._prefixes.clear()
        self.nbytes = 0

    def _drop(self, key: bytes) -> None:
        self.nbytes -= self._prefixes.pop(key).nbytes

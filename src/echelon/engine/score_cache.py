"""The score cache: scores of pairs that were scored before, by a hash of all that they depend on.

A score is used again only for the same two texts under the same :class:`ScoreSettings` and revision
of the model. The cache holds hashes and numbers, no texts. docs/decisions/0017-score-cache.md says
which scores are kept and why.
"""

from __future__ import annotations

import secrets
import struct
import threading
from dataclasses import astuple, dataclass
from hashlib import blake2b
from typing import IO, TYPE_CHECKING, NamedTuple

import numpy as np
from cachetools import LRUCache

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from echelon.types import Chunking, FloatArray, IntArray, LadderStep, Pair, Side, Truncation

KEY_BYTES = 16
"""Bytes of a key: with 128 bits two of a billion pairs share one with a probability of 10⁻²⁰."""

ENTRY_BYTES = 512
"""Bytes counted for a score: key, value, and their places in the library's two dictionaries. 340 to
480 were measured, the most just after a dictionary has grown (docs/LOG.md)."""

RECORD = struct.Struct("<fii")
"""A score in the cache: logit, tokens lost, tokens."""

NEVER_KEPT = {"lower_precision", "shorten"}
"""Rungs of the OOM ladder after which a score is not that of its settings."""


@dataclass(frozen=True, slots=True)
class ScoreSettings:
    """What a score depends on beside its texts and the model's files; every field is in the key."""

    precision: str
    max_length: int
    truncation: Truncation
    max_query_tokens: int | None
    instruction: str | None
    chunking: Chunking | None = None
    side: Side | None = None


class DocumentScores(NamedTuple):
    """Scores of documents, each of one pair or of its chunks."""

    logits: FloatArray  # float32 [documents]
    truncated_tokens: IntArray  # int32 [documents]
    tokens: IntArray  # int32 [documents], as the model saw them, overlaps of chunks included


@dataclass(frozen=True, slots=True)
class CachedScores:
    """Which scores of some pairs the cache has."""

    settings: ScoreSettings
    keys: Sequence[bytes]  # of every pair
    scores: DocumentScores  # of every pair; NaN and zeros where there is none
    missing: IntArray  # int32, indices of the pairs without a score, ascending

    @property
    def hits(self) -> int:
        """Pairs with a score."""
        return len(self.keys) - len(self.missing)

    def completed(self, missing: DocumentScores) -> DocumentScores:
        """The scores of all pairs, given those of the missing ones in their order."""
        logits, truncated, tokens = self.scores
        whole = DocumentScores(logits.copy(), truncated.copy(), tokens.copy())
        for part, found in zip(whole, missing, strict=True):
            part[self.missing] = found
        return whole


@dataclass(frozen=True, slots=True)
class CacheUsage:
    """The cache at one moment."""

    entries: int = 0  # scores
    bytes: int = 0
    max_bytes: int = 0  # 0 where there is no cache


class ScoreCache:
    """Scores in bounded memory; the least recently used goes first. Safe to use from any thread.

    Args:
        max_bytes: memory that it may take, at least :data:`ENTRY_BYTES`.
        revision: tells the revision of the model's files now; see :meth:`reopened`.
        noted: note what changes the cache, for a job on disk: :meth:`take_notes`. The hash then
            has no secret; else it has a random one, so that nobody can make two texts collide.
    """

    def __init__(
        self, max_bytes: int, revision: Callable[[], str] = str, *, noted: bool = False
    ) -> None:
        self._max_bytes = max_bytes
        self._tell_revision, self._revision = revision, revision()
        self._secret = b"" if noted else secrets.token_bytes(32)
        self._notes: list[bytes] | None = [] if noted else None
        self._entries: LRUCache[bytes, bytes] = LRUCache(max_bytes // ENTRY_BYTES)
        self._lock = threading.Lock()

    def reopened(self) -> None:
        """The model was opened again: scores of other files than its own are not found any more."""
        self._revision = self._tell_revision()

    def find(
        self, pairs: Sequence[Pair], settings: ScoreSettings, *, whole: bool = False
    ) -> CachedScores:
        """Look pairs up; with ``whole``, a score of a pair that lost tokens counts as missing."""
        keys = [*self._keys(pairs, settings)]
        logits = np.full(len(keys), np.nan, dtype=np.float32)
        truncated, tokens = np.zeros((2, len(keys)), dtype=np.int32)
        missing = []
        with self._lock:
            for index, key in enumerate(keys):
                entry = self._entries.get(key)
                if entry is None or (whole and RECORD.unpack(entry)[1]):
                    missing.append(index)
                else:
                    logits[index], truncated[index], tokens[index] = RECORD.unpack(entry)
                    self._note(key, entry)
        found = DocumentScores(logits, truncated, tokens)
        return CachedScores(settings, keys, found, np.array(missing, dtype=np.int32))

    def keep(self, keys: Iterable[bytes], scores: DocumentScores) -> None:
        """Keep the scores of pairs, in the order of their keys."""
        rows = zip(*(part.tolist() for part in scores), strict=True)
        with self._lock:
            for key, row in zip(keys, rows, strict=True):
                entry = self._entries[key] = RECORD.pack(*row)
                self._note(key, entry)

    def take_notes(self) -> bytes:
        """The scores that were used or kept since the last call, in their order."""
        with self._lock:
            taken = b"".join(self._notes or ())
            self._notes = None if self._notes is None else []
        return taken

    def restore(self, notes: IO[bytes]) -> None:
        """Bring an empty cache to where the notes of another one end."""
        size = KEY_BYTES + RECORD.size
        with self._lock:
            while note := notes.read(size):
                self._entries[note[:KEY_BYTES]] = note[KEY_BYTES:]

    @property
    def usage(self) -> CacheUsage:
        """The scores that it holds, and their memory."""
        entries = len(self._entries)
        return CacheUsage(entries, entries * ENTRY_BYTES, self._max_bytes)

    def _note(self, key: bytes, entry: bytes) -> None:
        if self._notes is not None:
            self._notes.append(key + entry)

    def _keys(self, pairs: Sequence[Pair], settings: ScoreSettings) -> Iterator[bytes]:
        """The key of each pair. A query is hashed once for the pairs in a row that share it."""
        shared = repr((self._revision, astuple(settings))).encode()
        begun = blake2b(shared, digest_size=KEY_BYTES, key=self._secret)
        last, asked = None, begun
        for query, document in pairs:
            if query != last:
                last, words = query, query.encode()
                asked = begun.copy()
                asked.update(b"%d " % len(words))  # where the query ends
                asked.update(words)
            digest = asked.copy()
            digest.update(document.encode())
            yield digest.digest()


def may_be_kept(ladder: Iterable[LadderStep]) -> bool:
    """Whether scores are those of their settings, by what the OOM ladder did to get them."""
    return NEVER_KEPT.isdisjoint(step.rung for step in ladder)

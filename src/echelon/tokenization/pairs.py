"""Join a query and a document into one pair of token ids.

Pure: knows lengths and ids, not tokenizers or models. Truncation follows ``longest_first`` and
``only_second`` of Hugging Face ``tokenizers`` to the token.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from hashlib import blake2b
from typing import TYPE_CHECKING

import numpy as np

from echelon.types import TokenBatch

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from echelon.types import IntArray, Side, Truncation


@dataclass(frozen=True, slots=True)
class Template:
    """The special tokens around a pair: ``before query between document after``.

    ``types`` are segment ids of the five parts, None if the model has one segment only; ``side`` is
    the side from which tokens are removed.
    """

    before: tuple[int, ...]
    between: tuple[int, ...]
    after: tuple[int, ...]
    types: tuple[tuple[int, ...], int, tuple[int, ...], int, tuple[int, ...]] | None
    side: Side = "right"

    @property
    def ids(self) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
        """Special tokens before, between and after the texts."""
        return self.before, self.between, self.after

    @property
    def specials(self) -> int:
        """Number of special tokens in every pair."""
        return sum(map(len, self.ids))


@dataclass(frozen=True, slots=True)
class EncodedPairs:
    """Pairs as token ids, not yet joined so that they can be cut shorter later."""

    template: Template  # special tokens of the model
    queries: Sequence[IntArray]  # int32 ids; pairs with the same query share the array
    documents: Sequence[IntArray]  # int32 ids
    kept: IntArray  # int32 [pairs, 2], query and document tokens that each pair keeps
    lengths: IntArray  # int32 [pairs], tokens of each pair with special tokens
    truncation: Truncation  # the mode they were cut in
    places: Sequence[int]  # index of each pair in the caller's list, for messages

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def truncated_tokens(self) -> IntArray:
        """int32 [pairs], query and document tokens that each pair lost."""
        full = [len(q) + len(d) for q, d in zip(self.queries, self.documents, strict=True)]
        lost: IntArray = np.array(full, dtype=np.int32) - self.kept.sum(axis=1, dtype=np.int32)
        return lost

    def keys(self) -> tuple[bytes, ...]:
        """One key a pair; pairs with the same key have the same ids, also if cut further."""
        mode = self.truncation.encode()
        return tuple(self._key(index, mode) for index in range(len(self)))

    def shortened(self, max_length: int, indices: Iterable[int]) -> EncodedPairs:
        """The same pairs with the chosen ones cut to ``max_length``.

        Raises:
            TruncationImpossible: a chosen pair's query alone leaves no room for its document.
        """
        room = max_length - self.template.specials
        kept = self.kept.copy()
        for index in indices:
            query, document = len(self.queries[index]), len(self.documents[index])
            lengths = truncate(query, document, room, self.truncation)
            if lengths is None:
                raise TruncationImpossible(self.places[index], query, room)
            kept[index] = lengths
        total = kept.sum(axis=1, dtype=np.int32) + np.int32(self.template.specials)
        return replace(self, kept=kept, lengths=total)

    def batch(self, indices: Iterable[int]) -> TokenBatch:
        """Join the chosen pairs into one step's input, in the given order."""
        chosen = list(indices)
        specials = [np.array(ids, dtype=np.int32) for ids in self.template.ids]
        parts = [part for i in chosen for part in self._parts(i, *specials)]
        offsets = np.zeros(len(chosen) + 1, dtype=np.int32)
        np.cumsum(self.lengths[chosen], out=offsets[1:])
        ids = np.concatenate(parts) if parts else np.zeros(0, dtype=np.int32)
        return TokenBatch(ids, self._types(chosen), offsets)

    def _key(self, index: int, mode: bytes) -> bytes:
        query, document = self.kept[index].tolist()
        whole = len(self.queries[index]), len(self.documents[index])
        digest = blake2b(b"%s %d %d %d " % (mode, query, *whole), digest_size=16)
        digest.update(cut_ids(self.queries[index], query, self.template.side).tobytes())
        digest.update(cut_ids(self.documents[index], document, self.template.side).tobytes())
        return digest.digest()

    def _parts(
        self, index: int, before: IntArray, between: IntArray, after: IntArray
    ) -> tuple[IntArray, ...]:
        kept_query, kept_document = self.kept[index]
        query = cut_ids(self.queries[index], kept_query, self.template.side)
        document = cut_ids(self.documents[index], kept_document, self.template.side)
        return before, query, between, document, after

    def _types(self, chosen: Sequence[int]) -> IntArray | None:
        if self.template.types is None:
            return None
        before, query, between, document, after = self.template.types
        values = np.array([*before, query, *between, document, *after], dtype=np.int32)
        repeats = np.ones((len(chosen), len(values)), dtype=np.int32)
        columns = [len(before), len(before) + 1 + len(between)]
        repeats[:, columns] = self.kept[chosen]
        return np.repeat(np.tile(values, len(chosen)), repeats.ravel())


def join(parts: Sequence[EncodedPairs]) -> EncodedPairs:
    """Concatenate slices of one call's pairs."""
    return replace(
        parts[0],
        queries=[query for part in parts for query in part.queries],
        documents=[document for part in parts for document in part.documents],
        kept=np.concatenate([part.kept for part in parts]),
        lengths=np.concatenate([part.lengths for part in parts]),
        places=[place for part in parts for place in part.places],
    )


def gather(picks: Sequence[tuple[EncodedPairs, int]]) -> TokenBatch:
    """Join pairs of several calls to one model into one step's input, in the given order."""
    pairs = replace(
        picks[0][0],
        queries=[pairs.queries[index] for pairs, index in picks],
        documents=[pairs.documents[index] for pairs, index in picks],
        kept=np.array([pairs.kept[index] for pairs, index in picks]),
        lengths=np.array([pairs.lengths[index] for pairs, index in picks]),
    )
    return pairs.batch(range(len(picks)))


class TruncationImpossible(ValueError):
    """A query fills the whole pair and the mode does not allow cutting it.

    ``index`` is the pair's in the caller's list; ``room`` what query and document share.
    """

    def __init__(self, index: int, query_tokens: int, room: int) -> None:
        self.index, self.query_tokens, self.room = index, query_tokens, room
        super().__init__(f"pair {index}: query of {query_tokens} tokens, room for {room}")


def encode_pairs(
    template: Template,
    queries: Sequence[IntArray],
    documents: Sequence[IntArray],
    max_length: int,
    truncation: Truncation,
    places: Sequence[int] | None = None,
) -> EncodedPairs:
    """Cut each pair to ``max_length``; :class:`TruncationImpossible` as in :func:`truncate`."""
    none = np.zeros((len(documents), 2), dtype=np.int32)
    numbered = range(len(documents)) if places is None else places
    pairs = EncodedPairs(template, queries, documents, none, none[:, 0], truncation, numbered)
    return pairs.shortened(max_length, range(len(documents)))


def truncate(query: int, document: int, room: int, mode: Truncation) -> tuple[int, int] | None:
    """Tokens kept of a query and a document that share ``room`` tokens.

    ``longest_first`` keeps the shorter text whole if it fits in half of the room, else halves the
    room; the odd token goes to the longer text. ``only_second`` cuts the document and keeps at
    least one of its tokens; None means that this is impossible.
    """
    excess = query + document - room
    if excess <= 0:
        return query, document
    if room == 0:
        return 0, 0
    if mode == "only_second":
        return (query, document - excess) if document > excess else None
    short, long = min(query, document), max(query, document)
    long = max(short, room - short)
    if short + long > room:
        short, long = room // 2, room // 2 + room % 2
    return (long, short) if query > document else (short, long)


def cut_ids(ids: IntArray, keep: int | None, side: str) -> IntArray:
    """The first ``keep`` tokens, or the last ones if tokens are removed from the left."""
    if keep is None or len(ids) <= keep:
        return ids
    return ids[len(ids) - keep :] if side == "left" else ids[:keep]

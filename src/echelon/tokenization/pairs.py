"""Joins a query and a document into one pair of token ids; splits long documents into chunks.

Pure: knows lengths and ids, not tokenizers or models. Truncation follows ``longest_first`` and
``only_second`` of Hugging Face ``tokenizers`` to the token. The best chunk's score counts; a
document that fits is one chunk, so its score does not change.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from hashlib import blake2b
from typing import TYPE_CHECKING

import numpy as np

from echelon.types import Chunking, Side, TokenBatch, Truncation

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from echelon.types import FloatArray, IntArray


OVERLAP_SHARE = 8
"""Neighbouring chunks share 1/8 of their tokens, one or two sentences at 512 tokens: an answer cut
by a border is complete in one of the two, for 14 % more work."""


@dataclass(frozen=True, slots=True)
class Template:
    """The special tokens around a pair: ``before query between document after``.

    ``types`` are segment ids of the five parts, None if the model has one segment only; ``side`` is
    the side from which tokens are removed; ``causal`` says that no token sees a later one, so that
    the model computes what comes before the document once for all documents of a query.
    """

    before: tuple[int, ...]
    between: tuple[int, ...]
    after: tuple[int, ...]
    types: tuple[tuple[int, ...], int, tuple[int, ...], int, tuple[int, ...]] | None
    side: Side = "right"
    causal: bool = False

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
    # int32 ids; of a long document only its first or last ones, more than any cut can keep
    documents: Sequence[IntArray]
    kept: IntArray  # int32 [pairs, 2], query and document tokens that each pair keeps
    lengths: IntArray  # int32 [pairs], tokens of each pair with special tokens
    truncation: Truncation  # the mode they were cut in
    places: Sequence[int]  # index of each pair in the caller's list, for messages

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def truncated_tokens(self) -> IntArray:
        """int32 [pairs], query and document tokens that each pair lost, of those that were read.

        A document that is longer than a window is not read beyond what its pair can need: there,
        this is the least that it lost.
        """
        full = [len(q) + len(d) for q, d in zip(self.queries, self.documents, strict=True)]
        lost: IntArray = np.array(full, dtype=np.int32) - self.kept.sum(axis=1, dtype=np.int32)
        return lost

    @property
    def costs(self) -> IntArray:
        """int32 [pairs], tokens that the model computes for each pair.

        Pairs of one query share the cost of what they have in common, if the model computes it
        once.
        """
        if not self.template.causal:
            return self.lengths
        query_of = [id(query) for query in self.queries]
        times = Counter(query_of)
        count = np.array([times[query] for query in query_of], dtype=np.int32)
        common = self.lengths - self.kept[:, 1] - np.int32(len(self.template.after))
        costs: IntArray = self.lengths - common + -(-common // count)
        return costs

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

    def only(self, indices: Sequence[int]) -> EncodedPairs:
        """The chosen pairs, in the given order."""
        return replace(
            self,
            queries=[self.queries[index] for index in indices],
            documents=[self.documents[index] for index in indices],
            kept=self.kept[indices],
            lengths=self.lengths[indices],
            places=[self.places[index] for index in indices],
        )

    def batch(self, indices: Iterable[int]) -> TokenBatch:
        """Join the chosen pairs into one step's input, in the given order."""
        chosen = list(indices)
        before, between, after = (np.array(ids, dtype=np.int32) for ids in self.template.ids)
        parts = []
        for index in chosen:
            query, document = self._kept_ids(index)
            parts += [before, query, between, document, after]
        offsets = np.zeros(len(chosen) + 1, dtype=np.int32)
        np.cumsum(self.lengths[chosen], out=offsets[1:])
        ids = np.concatenate(parts) if parts else np.zeros(0, dtype=np.int32)
        return TokenBatch(ids, self._types(chosen), offsets)

    def _key(self, index: int, mode: bytes) -> bytes:
        query, document = self._kept_ids(index)
        whole = len(self.queries[index]), len(self.documents[index])
        digest = blake2b(b"%s %d %d %d " % (mode, len(query), *whole), digest_size=16)
        digest.update(query.tobytes())
        digest.update(document.tobytes())
        return digest.digest()

    def _kept_ids(self, index: int) -> tuple[IntArray, IntArray]:
        texts, side = (self.queries[index], self.documents[index]), self.template.side
        query, document = (
            cut_ids(ids, keep, side) for ids, keep in zip(texts, self.kept[index], strict=True)
        )
        return query, document

    def _types(self, chosen: Sequence[int]) -> IntArray | None:
        if self.template.types is None:
            return None
        before, query, between, document, after = self.template.types
        values = np.array([*before, query, *between, document, *after], dtype=np.int32)
        repeats = np.ones((len(chosen), len(values)), dtype=np.int32)
        columns = [len(before), len(before) + 1 + len(between)]
        repeats[:, columns] = self.kept[chosen]
        return np.repeat(np.tile(values, len(chosen)), repeats.ravel())


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
    """Cut each pair to ``max_length``; raises as :meth:`EncodedPairs.shortened`."""
    every = range(len(documents))
    none = np.zeros((len(documents), 2), dtype=np.int32)
    places = every if places is None else places
    pairs = EncodedPairs(template, queries, documents, none, none[:, 0], truncation, places)
    return pairs.shortened(max_length, every)


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


@dataclass(frozen=True, slots=True)
class ChunkMap:
    """Maps chunks back to their documents."""

    starts: IntArray  # int32 [documents], index of each document's first chunk
    cut: IntArray  # int32 [documents], tokens of query and document that no chunk holds

    def best(self, logits: FloatArray) -> FloatArray:
        """float32 [chunks] → float32 [documents]: each document's highest logit."""
        best: FloatArray = np.maximum.reduceat(logits, self.starts)
        return best

    def truncated_tokens(self, lost: IntArray) -> IntArray:
        """Tokens cut from each document; ``lost`` are those cut from the chunks later."""
        total: IntArray = self.cut + np.add.reduceat(lost, self.starts)
        return total


def spans(length: int, window: int, max_chunks: int | None = None) -> list[tuple[int, int]]:
    """Begin and end of each chunk of ``window`` tokens in a document of ``length`` tokens.

    The last chunk is as long as the others and ends where the document ends, unless ``max_chunks``
    is reached before.
    """
    if length <= window:
        return [(0, length)]
    stride = max(1, window - window // OVERLAP_SHARE)
    count = -(-(length - window) // stride) + 1
    last = length - window
    starts = [min(number * stride, last) for number in range(min(count, max_chunks or count))]
    return [(start, start + window) for start in starts]


def chunk(pairs: EncodedPairs, max_length: int, how: Chunking) -> tuple[EncodedPairs, ChunkMap]:
    """Split the documents that do not fit beside their query into chunks.

    A query longer than half of the room is cut to half of it, as in ``longest_first``. Where the
    mode forbids that, it raises :class:`TruncationImpossible`. The places of the chunks are those
    of their documents.
    """
    room = max_length - pairs.template.specials
    queries: list[IntArray] = []
    chunks: list[IntArray] = []
    places: list[int] = []
    starts, cut = [], []
    for place, query, document in zip(pairs.places, pairs.queries, pairs.documents, strict=True):
        read = cut_ids(document, how.max_tokens, pairs.template.side)
        asked = query
        if len(query) + len(read) > room and len(query) > room // 2:
            if pairs.truncation == "only_second":
                raise TruncationImpossible(place, len(query), room)
            asked = cut_ids(query, max(room // 2, room - len(read)), pairs.template.side)
        found = spans(len(read), max(1, room - len(asked)), how.max_chunks)
        starts.append(len(chunks))
        cut.append(len(query) - len(asked) + len(document) - found[-1][1])
        chunks += [read[start:end] for start, end in found]
        queries += [asked] * len(found)
        places += [place] * len(found)
    split = encode_pairs(pairs.template, queries, chunks, max_length, pairs.truncation, places)
    return split, ChunkMap(np.array(starts, dtype=np.int32), np.array(cut, dtype=np.int32))


def cut_at(pairs: EncodedPairs, side: Side) -> tuple[EncodedPairs, ChunkMap]:
    """Cut pairs at ``side`` instead of the model's own; each text keeps as many tokens."""
    kept = pairs.kept.tolist()
    queries = [cut_ids(ids, keep, side) for ids, (keep, _) in zip(pairs.queries, kept, strict=True)]
    texts = [cut_ids(ids, keep, side) for ids, (_, keep) in zip(pairs.documents, kept, strict=True)]
    cut = replace(pairs, queries=queries, documents=texts)
    return cut, ChunkMap(np.arange(len(pairs), dtype=np.int32), pairs.truncated_tokens)

"""Split documents longer than a pair into overlapping chunks; the best chunk's score counts.

Pure: knows lengths and ids, not tokenizers or models. A document that fits is one chunk, so its
score does not change.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from echelon.tokenization.pairs import TruncationImpossible, cut_ids, encode_pairs

if TYPE_CHECKING:
    from echelon.tokenization.pairs import EncodedPairs
    from echelon.types import Chunking, FloatArray, IntArray, Side

OVERLAP_SHARE = 8
"""Neighbouring chunks share 1/8 of their tokens, one or two sentences at 512 tokens: an answer cut
by a border is complete in one of the two, for 14 % more work."""


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
    """Split the documents that do not fit beside their query.

    A query longer than half of the room is cut to half of it, as in ``longest_first``.

    Returns:
        The chunks as pairs, whose places are those of their documents; and the map back.

    Raises:
        TruncationImpossible: the query would have to be cut, and the mode forbids it.
    """
    room = max_length - pairs.template.specials
    queries: list[IntArray] = []
    chunks: list[IntArray] = []
    places: list[int] = []
    starts, cut = [], []
    texts = zip(pairs.places, pairs.queries, pairs.documents, strict=True)
    for place, query, document in texts:
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
    """Cut pairs at ``side`` instead of the model's own; each text keeps as many tokens.

    Returns:
        The cut pairs, and the number of tokens they lost.
    """
    kept = pairs.kept.tolist()
    queries = [cut_ids(ids, keep, side) for ids, (keep, _) in zip(pairs.queries, kept, strict=True)]
    texts = [cut_ids(ids, keep, side) for ids, (_, keep) in zip(pairs.documents, kept, strict=True)]
    cut = replace(pairs, queries=queries, documents=texts)
    return cut, ChunkMap(np.arange(len(pairs), dtype=np.int32), pairs.truncated_tokens)

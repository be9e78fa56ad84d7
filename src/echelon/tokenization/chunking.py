"""Documents longer than a pair, in overlapping chunks; the best chunk's score is the document's.

Pure: knows lengths and ids, not tokenizers or models. A document that fits is one chunk and is
scored as ever, so asking for chunks changes nothing where none are needed.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

import numpy as np

from echelon.errors import InvalidInput
from echelon.tokenization.pairs import TruncationImpossible, encode_pairs

if TYPE_CHECKING:
    from echelon.tokenization.pairs import EncodedPairs
    from echelon.types import FloatArray, IntArray

Side = Literal["left", "right"]
"""An end of a text, at which truncation cuts."""

OVERLAP_SHARE = 8
"""A chunk shares an eighth of its tokens with the one before: a sentence or two at 512 tokens, so
that an answer which a border cuts stands whole in one of the two, for 14 % more work."""


@dataclass(frozen=True, slots=True)
class Chunking:
    """How much of a document is read.

    Attributes:
        max_tokens: tokens read of a document; None reads all.
        max_chunks: chunks of a document that are scored; None scores as many as it takes.
    """

    max_tokens: int | None = None
    max_chunks: int | None = None

    def __post_init__(self) -> None:
        for field, value in (
            ("max_tokens_per_doc", self.max_tokens),
            ("max_chunks_per_doc", self.max_chunks),
        ):
            if value is not None and value < 1:
                raise InvalidInput(field, f"{value} is not positive", "Give 1 or more.")


@dataclass(frozen=True, slots=True)
class Whole:
    """From chunks back to documents.

    Attributes:
        starts: int32 [documents], where each document's first chunk stands.
        cut: int32 [documents], tokens of query and document that no chunk holds.
    """

    starts: IntArray
    cut: IntArray

    def best(self, logits: FloatArray) -> FloatArray:
        """float32 [documents] out of float32 [chunks]: each document's highest."""
        best: FloatArray = np.maximum.reduceat(logits, self.starts)
        return best

    def truncated_tokens(self, lost: IntArray) -> IntArray:
        """int32 [documents], with what the chunks themselves lost since, int32 [chunks]."""
        total: IntArray = self.cut + np.add.reduceat(lost, self.starts)
        return total


def spans(length: int, window: int, most: int | None = None) -> list[tuple[int, int]]:
    """Where the chunks of a document begin and end.

    The last chunk is as long as the others and ends where the document does, unless ``most``
    chunks end earlier.

    Args:
        length: tokens of the document.
        window: tokens of a chunk, at least 1.
        most: chunks at most.
    """
    if length <= window:
        return [(0, length)]
    stride = max(1, window - window // OVERLAP_SHARE)
    count = -(-(length - window) // stride) + 1
    last = length - window
    starts = [min(number * stride, last) for number in range(min(count, most or count))]
    return [(start, start + window) for start in starts]


def chunk(pairs: EncodedPairs, max_length: int, how: Chunking) -> tuple[EncodedPairs, Whole]:
    """Split the documents that do not fit beside their query.

    A query that takes more than half of the room is cut to half of it, as ``longest_first`` does.

    Returns:
        The chunks as pairs, whose places are those of their documents; and the way back.

    Raises:
        TruncationImpossible: the query would have to be cut, and the mode forbids it.
    """
    room = max_length - pairs.template.specials
    queries: list[IntArray] = []
    chunks: list[IntArray] = []
    places: list[int] = []
    starts, cut = [], []
    for index, (query, document) in enumerate(zip(pairs.queries, pairs.documents, strict=True)):
        place = pairs.places[index]
        read = _first(document, how.max_tokens, pairs.template.side)
        asked = query
        if len(query) + len(read) > room and len(query) > room // 2:
            if pairs.truncation == "only_second":
                raise TruncationImpossible(place, len(query), room)
            asked = _first(query, max(room // 2, room - len(read)), pairs.template.side)
        found = spans(len(read), max(1, room - len(asked)), how.max_chunks)
        starts.append(len(chunks))
        cut.append(len(query) - len(asked) + len(document) - found[-1][1])
        chunks += [read[start:end] for start, end in found]
        queries += [asked] * len(found)
        places += [place] * len(found)
    split = encode_pairs(pairs.template, queries, chunks, max_length, pairs.truncation, places)
    return split, Whole(np.array(starts, dtype=np.int32), np.array(cut, dtype=np.int32))


def cut_at(pairs: EncodedPairs, side: Side) -> tuple[EncodedPairs, Whole]:
    """Pairs that lose tokens lose them at ``side``, whatever the model's own is.

    How many each text keeps stays as it was.

    Returns:
        The pairs, already cut; and what they lost.
    """
    kept = pairs.kept.tolist()
    queries = [_first(ids, keep, side) for ids, (keep, _) in zip(pairs.queries, kept, strict=True)]
    texts = [_first(ids, keep, side) for ids, (_, keep) in zip(pairs.documents, kept, strict=True)]
    cut = replace(pairs, queries=queries, documents=texts)
    return cut, Whole(np.arange(len(pairs), dtype=np.int32), pairs.truncated_tokens)


def _first(ids: IntArray, keep: int | None, side: str) -> IntArray:
    """The tokens that truncation keeps."""
    if keep is None or len(ids) <= keep:
        return ids
    return ids[len(ids) - keep :] if side == "left" else ids[:keep]

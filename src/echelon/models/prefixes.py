"""Pairs that begin alike, so that a decoder computes their common beginning once. Pure.

A language model reads the query before the document, and its attention is causal: keys and values
of the first tokens are the same for all documents of a query. Here a step's pairs are grouped by
their beginnings, and its rows laid out; it knows token ids only, no model.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import groupby, pairwise
from typing import TYPE_CHECKING

import numpy as np

from echelon.models.base import with_filler
from echelon.types import TokenBatch

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from echelon.types import IntArray

MIN_SHARED = 16
"""Rows that a group must save: below that its own pass of attention costs as much."""


@dataclass(frozen=True, slots=True)
class PrefixGroup:
    """Pairs of a step whose first ``length`` tokens are the same; 0 if they share none."""

    length: int
    pairs: tuple[int, ...]  # indices into the step


@dataclass(frozen=True, slots=True)
class Prefix:
    """The common beginning of a group."""

    ids: IntArray  # int32 [tokens]
    known: int  # leading tokens whose keys and values are cached
    row: int  # the step's row of the first of the other tokens

    @property
    def rows(self) -> slice:
        """The step's rows of its tokens that are not cached."""
        return slice(self.row, self.row + len(self.ids) - self.known)


@dataclass(frozen=True, slots=True)
class Run:
    """Consecutive pairs with one prefix and as many tokens of their own."""

    prefix: int | None  # index of the prefix
    pair: int  # first pair, in the layout's order
    row: int  # first row
    count: int  # pairs
    length: int  # own tokens of each

    @property
    def pairs(self) -> slice:
        """Its pairs, in the layout's order."""
        return slice(self.pair, self.pair + self.count)

    @property
    def rows(self) -> slice:
        """The step's rows that it takes."""
        return slice(self.row, self.row + self.count * self.length)


@dataclass(frozen=True, slots=True)
class StepLayout:
    """The rows of a step: those of all prefixes, the pairs' own, and filler."""

    ids: IntArray  # int32 [rows]
    positions: IntArray  # int32 [rows], of each token in its pair
    prefixes: tuple[Prefix, ...]
    runs: tuple[Run, ...]  # the pairs by prefix and length, in the order of their rows
    order: IntArray  # int32 [pairs], the batch's index of each pair of the runs
    lasts: IntArray  # int32 [pairs], row of each pair's last token


def common_length(one: IntArray, other: IntArray) -> int:
    """How many first tokens are the same in both."""
    shorter = min(len(one), len(other))
    differs = one[:shorter] != other[:shorter]
    return int(differs.argmax()) if differs.any() else shorter


def without_padding(text: IntArray, padding_id: int | None) -> IntArray:
    """A pair without the padding tokens at its end, as transformers' classifiers read it.

    They take the last token that is no padding, or the first one; causal attention makes all after
    it useless.
    """
    if padding_id is None or text[-1] != padding_id:
        return text
    real = np.flatnonzero(text != padding_id)
    return text[: int(real[-1]) + 1 if len(real) else 1]


@dataclass(frozen=True, slots=True)
class _Block:
    """Neighbours in lexicographic order, and their best division into groups."""

    start: int  # place of the first
    end: int  # place after the last
    known: int  # most first tokens that are cached
    saved: int  # rows that the division saves
    groups: tuple[PrefixGroup, ...]

    def join(self, other: _Block, length: int, pairs: Iterable[int]) -> _Block:
        """This block and the next one, whose pairs all share ``length`` tokens."""
        whole = (other.end - self.start - 1) * length - MIN_SHARED
        known = max(self.known, other.known)
        whole += min(length, known)
        if whole >= self.saved + other.saved:
            return _Block(self.start, other.end, known, whole, (PrefixGroup(length, tuple(pairs)),))
        saved, groups = self.saved + other.saved, self.groups + other.groups
        return _Block(self.start, other.end, known, saved, groups)


def group_pairs(texts: Sequence[IntArray], known: Sequence[int]) -> list[PrefixGroup]:
    """Divide pairs into groups that begin alike so that few rows are computed.

    In lexicographic order pairs that begin alike are neighbours. Neighbours are joined, those with
    the longest common beginning first, where the whole saves more rows than its parts. The last
    token of a pair is never shared.

    Args:
        texts: token ids of each pair, at least one.
        known: first tokens of each pair whose keys and values are cached.
    """
    # Big-endian, so that bytes are ordered as the numbers are.
    order = sorted(range(len(texts)), key=lambda pair: texts[pair].astype(">i4").tobytes())
    # Each block stands at the places of its first and of its last pair.
    blocks = [
        _alone(place, pair, min(known[pair], len(texts[pair]) - 1))
        for place, pair in enumerate(order)
    ]
    shared = [
        min(common_length(texts[one], texts[other]), len(texts[one]) - 1, len(texts[other]) - 1)
        for one, other in pairwise(order)
    ]
    for place in sorted(range(len(shared)), key=lambda place: -shared[place]):
        if shared[place] <= MIN_SHARED:
            break
        left, right = blocks[place], blocks[place + 1]
        block = left.join(right, shared[place], order[left.start : right.end])
        blocks[block.start] = blocks[block.end - 1] = block
    groups: list[PrefixGroup] = []
    place = 0
    while place < len(order):
        groups += blocks[place].groups
        place = blocks[place].end
    return groups


def _alone(place: int, pair: int, known: int) -> _Block:
    saved = max(0, known - MIN_SHARED)
    group = PrefixGroup(known if saved else 0, (pair,))
    return _Block(place, place + 1, known, saved, (group,))


def lay_out(texts: Sequence[IntArray], known: Sequence[int]) -> StepLayout:
    """The rows of a step of pairs; arguments as of :func:`group_pairs`."""
    groups = group_pairs(texts, known)
    alone = PrefixGroup(0, tuple(pair for g in groups if not g.length for pair in g.pairs))
    groups = [_trimmed(g, known) for g in groups if g.length]
    prefixes: list[Prefix] = []
    parts, starts, row = [], [], 0  # ids of each sequence of rows, and position of its first
    for group in groups:
        have = _cached(group, known)
        prefixes.append(Prefix(texts[group.pairs[0]][: group.length], have, row))
        parts.append(prefixes[-1].ids[have:])
        starts.append(have)
        row += group.length - have
    runs: list[Run] = []
    order: list[int] = []
    for index, group in enumerate([*groups, alone]):
        by_length = sorted(group.pairs, key=lambda pair: len(texts[pair]))
        for length, members in groupby(by_length, key=lambda pair: len(texts[pair]) - group.length):
            pairs = list(members)
            prefix = index if group.length else None
            runs.append(Run(prefix, len(order), row, len(pairs), length))
            parts += [texts[pair][group.length :] for pair in pairs]
            starts += [group.length] * len(pairs)
            order += pairs
            row += len(pairs) * length
    lasts = np.cumsum([len(part) for part in parts], dtype=np.int32)[len(prefixes) :] - 1
    return StepLayout(
        *_filled(parts, starts), tuple(prefixes), tuple(runs), np.array(order, np.int32), lasts
    )


def _cached(group: PrefixGroup, known: Sequence[int]) -> int:
    """First tokens of a group's prefix that are cached, as far as that is worth a pass."""
    have = min(group.length, max(known[pair] for pair in group.pairs))
    return have if have > MIN_SHARED else 0


def _trimmed(group: PrefixGroup, known: Sequence[int]) -> PrefixGroup:
    """The group with what is cached of its prefix, if little more is shared."""
    have = _cached(group, known)
    return (
        PrefixGroup(have, group.pairs) if 0 < group.length - have < MIN_SHARED and have else group
    )


def _filled(parts: Sequence[IntArray], starts: Sequence[int]) -> tuple[IntArray, IntArray]:
    """Ids and positions of all rows, brought to a round number of rows."""
    ids = np.concatenate(parts).astype(np.int32)
    rows = with_filler(TokenBatch(ids, None, np.array([0, len(ids)], np.int32))).ids
    positions = np.zeros(len(rows), np.int32)
    positions[: len(ids)] = np.concatenate(
        [
            np.arange(start, start + len(part), dtype=np.int32)
            for part, start in zip(parts, starts, strict=True)
        ]
    )
    return rows, positions

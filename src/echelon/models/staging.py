"""A step as one block of integers, so that it goes to the device in one copy. Pure: no CUDA here.

A block holds, one after another: token ids, positions, segment ids where the model reads them, the
pairs' offsets, their first rows, and 0, 1, 2, … as offsets of one query a pair. A room says how
much of each. A captured graph needs rooms of few sizes: :func:`bucket_of` rounds up. Rows that are
left over belong to no pair, so attention never visits them; pairs that are left over are empty.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor

    from echelon.types import IntArray, TokenBatch

MOST_TOKENS = 2048
"""Largest bucket. Launching the kernels of 24 layers takes a host some 3 ms, which is what 2,000
tokens of that model keep a large card busy for: beyond that nothing waits for the host, and filler
would cost more than a graph saves."""

MOST_PAIRS = 256
LEAST_PAIRS = 16
LEAST_LONGEST = 128
"""A block of the attention kernels' queries: no shorter bound costs them less."""

FINE_TOKENS = 64
COARSE_TOKENS = 128
"""Steps between buckets, below and above 1,024 tokens: matrix units work through rows by 64 or 128
at a time, so most of the filler is paid for anyway."""

FINE_UP_TO = 1024
GROWTH = 4


@dataclass(frozen=True, slots=True)
class CaptureShape:
    """How much a step may hold.

    Attributes:
        tokens: rows.
        pairs: pairs.
        longest: tokens of the longest pair.
    """

    tokens: int
    pairs: int
    longest: int

    @classmethod
    def of(cls, batch: TokenBatch) -> CaptureShape:
        """Just enough for a batch."""
        return cls(len(batch.ids), len(batch), int(batch.lengths.max()))

    def sections(self, *, segments: bool) -> dict[str, slice]:
        """Where in the block each part is."""
        sizes = {
            "ids": self.tokens,
            "positions": self.tokens,
            "segments": self.tokens if segments else 0,
            "offsets": self.pairs + 1,
            "firsts": self.pairs,
            "singles": self.pairs + 1,
        }
        ends = np.cumsum(list(sizes.values())).tolist()
        return {
            name: slice(end - size, end)
            for (name, size), end in zip(sizes.items(), ends, strict=True)
        }

    def size(self, *, segments: bool) -> int:
        """Integers in the block."""
        return int(self.sections(segments=segments)["singles"].stop)


LARGEST = CaptureShape(MOST_TOKENS, MOST_PAIRS, MOST_TOKENS)
"""The largest bucket."""


@dataclass(frozen=True, slots=True)
class StepInputs:
    """A step on the device.

    Attributes:
        ids: int32 [tokens].
        positions: int32 [tokens].
        segments: int32 [tokens], or None where the model does not read them.
        offsets: int32 [pairs + 1], where each pair begins.
        firsts: int32 [pairs], each pair's first row.
        singles: int32 [pairs + 1], offsets of one row a pair.
        longest: at least the tokens of the longest pair.
    """

    ids: Tensor
    positions: Tensor
    segments: Tensor | None
    offsets: Tensor
    firsts: Tensor
    singles: Tensor
    longest: int


def bucket_of(room: CaptureShape) -> CaptureShape | None:
    """The bucket for a step, or None where it is too large for one."""
    if room.tokens > MOST_TOKENS or room.pairs > MOST_PAIRS:
        return None
    step = FINE_TOKENS if room.tokens <= FINE_UP_TO else COARSE_TOKENS
    return CaptureShape(
        -(-room.tokens // step) * step,
        _grown(LEAST_PAIRS, room.pairs),
        _grown(LEAST_LONGEST, room.longest),
    )


def _grown(least: int, wanted: int) -> int:
    """The first of ``least``, 4 · ``least``, 16 · ``least``, … that is enough."""
    while least < wanted:
        least *= GROWTH
    return least


def fill(
    block: IntArray, room: CaptureShape, batch: TokenBatch, positions: IntArray, *, segments: bool
) -> None:
    """Write a batch into a block.

    Filler rows hold id and position 0, which every model has. An empty pair begins where the last
    one ends; its first row is row 0, since one behind the last row need not exist.

    Args:
        block: int32 [room.size].
        room: what the block has room for, at least the batch.
        batch: ids, segment ids and offsets.
        positions: int32 [tokens].
        segments: whether the model reads segment ids; a batch without any means zeros.
    """
    tokens, pairs = len(batch.ids), len(batch)
    parts = {name: block[where] for name, where in room.sections(segments=segments).items()}
    block.fill(0)
    parts["ids"][:tokens] = batch.ids
    parts["positions"][:tokens] = positions
    if segments and batch.type_ids is not None:
        parts["segments"][:tokens] = batch.type_ids
    parts["offsets"][: pairs + 1] = batch.offsets
    parts["offsets"][pairs + 1 :] = tokens
    parts["firsts"][:pairs] = batch.offsets[:-1]
    parts["singles"][:] = np.arange(room.pairs + 1)


def read(block: Tensor, room: CaptureShape, *, segments: bool) -> StepInputs:
    """A block's parts as views."""
    parts = {
        name: block.narrow(0, where.start, where.stop - where.start)
        for name, where in room.sections(segments=segments).items()
    }
    return StepInputs(
        parts["ids"],
        parts["positions"],
        parts["segments"] if segments else None,
        parts["offsets"],
        parts["firsts"],
        parts["singles"],
        room.longest,
    )

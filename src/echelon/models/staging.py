"""A step as one block of integers, which goes to the device in one copy. Pure: no CUDA here.

A block holds token ids, positions, segment ids if the model reads them, the pairs' offsets, their
first rows, and 0, 1, 2, … as offsets of one query a pair; a :class:`CaptureShape` says how many of
each. CUDA graphs need few shapes: :func:`bucket_of` rounds up. Surplus rows belong to no pair, so
attention never reads them; surplus pairs are empty.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor

    from echelon.types import IntArray, TokenBatch

MAX_TOKENS = 2048
"""Largest bucket. To launch the kernels of 24 layers takes a host some 3 ms, in which a large card
computes some 2,000 tokens of that model: above that, filler would cost more than a graph saves."""

MAX_PAIRS = 256
MIN_PAIRS = 16
MIN_LONGEST = 128
"""A block of queries of the attention kernels: a shorter bound is not faster."""

FINE_TOKENS = 64
COARSE_TOKENS = 128
"""Steps between buckets, below and above 1,024 tokens: matrix units compute rows in blocks of 64 or
128, so most of the filler would be computed anyway."""

FINE_UP_TO = 1024
GROWTH = 4


@dataclass(frozen=True, slots=True)
class CaptureShape:
    """Capacity of a block."""

    tokens: int
    pairs: int
    longest: int  # tokens of the longest pair

    @classmethod
    def of(cls, batch: TokenBatch) -> CaptureShape:
        """The exact shape of a batch."""
        return cls(len(batch.ids), len(batch), int(batch.lengths.max()))

    def sections(self, *, segments: bool) -> dict[str, slice]:
        """Position of each part in the block."""
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


LARGEST = CaptureShape(MAX_TOKENS, MAX_PAIRS, MAX_TOKENS)


@dataclass(frozen=True, slots=True)
class StepInputs:
    """A step on the device."""

    ids: Tensor  # int32 [tokens]
    positions: Tensor  # int32 [tokens]
    segments: Tensor | None  # int32 [tokens], or None if the model does not read them
    offsets: Tensor  # int32 [pairs + 1], first row of each pair
    firsts: Tensor  # int32 [pairs], first row of each pair, for the last layer
    singles: Tensor  # int32 [pairs + 1], offsets of one row a pair
    longest: int  # upper bound of the longest pair's tokens


def bucket_of(shape: CaptureShape) -> CaptureShape | None:
    """The bucket for a step, or None if the step is too large."""
    if shape.tokens > MAX_TOKENS or shape.pairs > MAX_PAIRS:
        return None
    step = FINE_TOKENS if shape.tokens <= FINE_UP_TO else COARSE_TOKENS
    return CaptureShape(
        -(-shape.tokens // step) * step,
        _grown(MIN_PAIRS, shape.pairs),
        _grown(MIN_LONGEST, shape.longest),
    )


def _grown(size: int, needed: int) -> int:
    """The first of ``size``, 4 · ``size``, 16 · ``size``, … that is enough."""
    while size < needed:
        size *= GROWTH
    return size


def fill(
    block: IntArray, shape: CaptureShape, batch: TokenBatch, positions: IntArray, *, segments: bool
) -> None:
    """Write a batch into a block of int32, whose shape is at least the batch's.

    Surplus rows get id and position 0, which every model has. A surplus pair begins where the last
    pair ends; its first row is row 0, because a row behind the last one may not exist. ``segments``
    is whether the model reads segment ids; a batch without any means zeros.
    """
    tokens, pairs = len(batch.ids), len(batch)
    parts = {name: block[where] for name, where in shape.sections(segments=segments).items()}
    block.fill(0)
    parts["ids"][:tokens] = batch.ids
    parts["positions"][:tokens] = positions
    if segments and batch.type_ids is not None:
        parts["segments"][:tokens] = batch.type_ids
    parts["offsets"][: pairs + 1] = batch.offsets
    parts["offsets"][pairs + 1 :] = tokens
    parts["firsts"][:pairs] = batch.offsets[:-1]
    parts["singles"][:] = np.arange(shape.pairs + 1)


def read(block: Tensor, shape: CaptureShape, *, segments: bool) -> StepInputs:
    """A block's parts as views."""
    parts = {
        name: block.narrow(0, where.start, where.stop - where.start)
        for name, where in shape.sections(segments=segments).items()
    }
    return StepInputs(
        parts["ids"],
        parts["positions"],
        parts["segments"] if segments else None,
        parts["offsets"],
        parts["firsts"],
        parts["singles"],
        shape.longest,
    )

"""Steps on a card as blocks of integers, and the sizes that are captured as CUDA graphs. No torch.

A step goes to the device as one block of int32, in one copy: token ids, positions, segment ids if
the model reads them, the pairs' offsets, their first rows, and 0, 1, 2, … as offsets of one query a
pair. :class:`CaptureShape` says how many of each. Graphs need few shapes: :class:`Ladder` rounds
up. Surplus rows belong to no pair, so attention never reads them; surplus pairs are empty.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor

    from echelon.types import IntArray, TokenBatch

FINE_TOKENS = 64
"""Least distance between sizes: matrix units compute rows in blocks of 64 or 128, so that most of
the filler would be computed anyway."""

SIZES_AN_OCTAVE = 8
"""Sizes between one power of two and the next: filler is less than an eighth of a step."""

LEAST_PAIRS = 16
SHORT, USUAL = 128, 512
"""Bounds of the longest pair. One block of the attention kernels has 128 queries, and each pair
takes as many blocks as the bound needs, empty ones too: a bound that is too high costs time."""

FORMS = ((8, SHORT), (32, USUAL), (4, USUAL), (256, None))
"""Kinds of steps: tokens of a pair on average, at least, and the bound of the longest pair, None
for the model's own. Many short pairs; usual ones; very short and long ones mixed; long ones."""

MOST_TOKENS = 16_384
"""Largest size whatever the model: a graph keeps a step's memory for ever."""

LEAST_TOKENS = 256
"""Largest size at least: a query with one document is bound by the host on every card."""

LAUNCH_S = 11e-6
"""What a host takes to launch a kernel through torch: 277 launches take some 3 ms."""

USED_SHARE = 0.45
"""Share of a card's peak that a whole step reaches, norms and attention included."""

MATRIX_FLOPS = {7: 1.6e12, 8: 2.5e12, 9: 7.5e12, 10: 15e12, 12: 2.5e12}
FP32_FLOPS = {7: 0.2e12, 8: 0.25e12, 9: 0.5e12, 10: 0.5e12, 12: 0.7e12}
"""Products of half-width and of fp32 numbers that one multiprocessor computes in a second, by major
compute capability, from the makers' data sheets (T4, A100 and L4, H200, B200, RTX 5090)."""


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

    def holds(self, other: CaptureShape) -> bool:
        """Whether a step of another shape fits."""
        return (
            other.tokens <= self.tokens
            and other.pairs <= self.pairs
            and other.longest <= self.longest
        )

    @property
    def attention_blocks(self) -> int:
        """Blocks of queries that an attention kernel begins for each head."""
        return self.pairs * -(-self.longest // SHORT)

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


@dataclass(frozen=True, slots=True)
class Ladder:
    """The shapes that are captured for one model on one card."""

    most_tokens: int  # of a step
    longest: int  # tokens of the longest pair that the model reads

    def shapes(self) -> list[CaptureShape]:
        """All of them, the largest first: later ones then fit into its memory."""
        found: set[CaptureShape] = set()
        tokens = FINE_TOKENS
        while tokens <= self.most_tokens:
            found.update(self._forms(tokens))
            tokens = _rounded(tokens + 1)
        return sorted(found, key=lambda s: (s.tokens, s.attention_blocks), reverse=True)

    def find(self, exact: CaptureShape) -> CaptureShape | None:
        """The cheapest shape for a step; None if it is too large or of no usual form."""
        tokens = _rounded(exact.tokens)
        if tokens > self.most_tokens:
            return None
        fitting = [shape for shape in self._forms(tokens) if shape.holds(exact)]
        return min(fitting, key=lambda shape: shape.attention_blocks, default=None)

    def _forms(self, tokens: int) -> set[CaptureShape]:
        most = min(self.longest, tokens)
        return {
            CaptureShape(tokens, max(LEAST_PAIRS, tokens // average), min(most, bound or most))
            for average, bound in FORMS
            if bound or most > USUAL
        }


def _rounded(tokens: int) -> int:
    """The next size from ``tokens`` on."""
    step = max(FINE_TOKENS, (1 << (tokens - 1).bit_length()) // (2 * SIZES_AN_OCTAVE))
    return -(-tokens // step) * step


@dataclass(frozen=True, slots=True)
class Card:
    """What of a card says how fast it computes."""

    major: int  # compute capability
    processors: int  # multiprocessors

    def token_s(self, flops: float, *, half: bool) -> float:
        """Seconds that a token takes whose products are so many operations; an estimate."""
        table = MATRIX_FLOPS if half else FP32_FLOPS
        known = max(major for major in table if major <= max(self.major, min(table)))
        return flops / (self.processors * table[known] * USED_SHARE)


def host_bound_tokens(card: Card, flops: float, launches: int, *, half: bool) -> int:
    """Tokens that a card computes while the host launches one pass: below that a graph saves time.

    Args:
        card: the card.
        flops: operations of all products for one token.
        launches: kernels of a pass.
        half: whether the products are of half-width numbers.
    """
    tokens = int(launches * LAUNCH_S / card.token_s(flops, half=half))
    return min(MOST_TOKENS, max(LEAST_TOKENS, tokens))


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

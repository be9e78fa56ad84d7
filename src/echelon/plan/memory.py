"""The memory model: how much a step needs at its peak, from the lengths of its pairs alone. Pure.

``fixed + token · Σ n + square · Σ n²``, as :mod:`echelon.plan.cost` counts. It holds for the
process on CPU and for the card on CUDA.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from echelon.plan.pack import NO_BUDGET

if TYPE_CHECKING:
    from echelon.plan.cost import Work


@dataclass(frozen=True, slots=True)
class MemoryModel:
    """What a step needs; nothing is negative.

    Attributes:
        fixed_bytes: bytes without any step: weights, libraries.
        token_bytes: bytes a token.
        square_bytes: bytes a squared token of one pair; 0 where they are not told from tokens.
    """

    fixed_bytes: float
    token_bytes: float
    square_bytes: float = 0.0

    def peak_bytes(self, work: Work) -> float:
        """Bytes at the peak of one step."""
        steps = self.token_bytes * work.tokens + self.square_bytes * work.squares
        return self.fixed_bytes + steps

    def of_length(self, length: float) -> MemoryModel:
        """The same where all pairs have one length: their squares are tokens then."""
        return MemoryModel(self.fixed_bytes, self.token_bytes + self.square_bytes * length)

    def shifted(self, more_bytes: float) -> MemoryModel:
        """The same where so much more is held without any step; less where it is negative."""
        return replace(self, fixed_bytes=max(0.0, self.fixed_bytes + more_bytes))

    def bytes_of(self, tokens: int) -> float:
        """Bytes at the peak of a step of so many tokens, squares left out; see `of_length`."""
        return self.fixed_bytes + self.token_bytes * tokens

    def tokens_within(self, limit_bytes: float, length: int = 0) -> int:
        """Most tokens of a step of pairs of one length under a limit; 0 leaves squares out.

        Returns:
            0 where not even an empty step fits; NO_BUDGET where tokens cost nothing.
        """
        room, each = limit_bytes - self.fixed_bytes, self.token_bytes + self.square_bytes * length
        if room < 0:
            return 0
        return int(room / each) if room < each * NO_BUDGET else NO_BUDGET

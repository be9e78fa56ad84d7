"""How two measurements compare: their ratio, how sure it is, and what that means. Pure."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any, Literal

from echelon.tuning.choose import TIE

Judgement = Literal["tie", "beyond", "within", "unknown"]

ROUNDING = 1e-9
"""So that exactly TIE apart is a tie from either side."""


@dataclass(frozen=True, slots=True)
class Known:
    """A measured number above 0, and the ends of its interval; None where it has none."""

    value: float
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True, slots=True)
class Ratio:
    """B over A.

    Attributes:
        value: the ratio.
        low: lower end of its interval; None unless both numbers have one.
        high: upper end.
    """

    value: float
    low: float | None = None
    high: float | None = None

    @classmethod
    def of(cls, a: Known, b: Known) -> Ratio:
        """Divide.

        The interval takes, on the logarithmic scale, the distances of both numbers to their own
        ends as independent, so their squares add up (Zou and Donner, Construction of confidence
        limits about effect measures, Statistics in Medicine 27, 2008).
        """
        value = b.value / a.value
        if a.low is None or a.high is None or b.low is None or b.high is None:
            return cls(value)
        down = math.hypot(math.log(b.value / b.low), math.log(a.high / a.value))
        up = math.hypot(math.log(b.high / b.value), math.log(a.value / a.low))
        return cls(value, value * math.exp(-down), value * math.exp(up))

    @property
    def inverse(self) -> Ratio:
        """A over B; also the ratio of rates where this is that of times."""
        if self.low is None or self.high is None:
            return Ratio(1 / self.value)
        return Ratio(1 / self.value, 1 / self.high, 1 / self.low)

    @property
    def judgement(self) -> Judgement:
        """What it means.

        Returns:
            ``tie``: within TIE, as repeated sweeps of one machine are; ``beyond`` the spread of
            the runs, or ``within`` it; ``unknown`` without an interval.
        """
        if max(self.value, 1 / self.value) <= 1 + TIE + ROUNDING:
            return "tie"
        if self.low is None or self.high is None:
            return "unknown"
        return "within" if self.low <= 1 <= self.high else "beyond"

    def as_dict(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self) | {"judgement": self.judgement}

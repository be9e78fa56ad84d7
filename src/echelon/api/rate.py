"""How many documents a key may have scored in a time (pure).

A token bucket: it fills with the rate, holds at most the burst, and each request takes its
documents out. Documents are counted and not requests: they are what a reranker pays for. The time
is an argument; nothing here knows keys, HTTP or the time of day.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field

from echelon.errors import InvalidInput, RateLimited

_RATE = re.compile(r"(\d+(?:\.\d+)?)/(s|min|h)")
_SECONDS = {"s": 1, "min": 60, "h": 3600}

ROUNDING = 1e-6
"""Parts of a document that do not count: whoever comes when told must not fail by a last digit."""


@dataclass(frozen=True, slots=True)
class Limit:
    """A rate, and how much of it may come at once.

    Attributes:
        rate: documents a second.
        burst: documents that may come at once after a rest.
        words: the rate as it was written.
    """

    rate: float
    burst: float
    words: str = field(default="", compare=False)

    def __str__(self) -> str:
        return self.words or f"{self.rate:g}/s"


class Bucket:
    """What is left of a limit.

    A request is let in when the bucket holds its documents, or is full; a request larger than the
    burst then leaves a debt, which is paid before the next. So none is too large to ever come in,
    and over any time no more come in than burst, rate and the size of one request allow.

    Args:
        limit: the rate and the burst.
    """

    def __init__(self, limit: Limit) -> None:
        self.limit = limit
        self._left = limit.burst
        self._then = -math.inf

    def take(self, documents: int, now: float) -> None:
        """Let a request in.

        Raises:
            RateLimited: not yet; it says when there will be room.
        """
        self.ask(documents, now)
        self._left -= documents

    def ask(self, documents: int, now: float) -> None:
        """Whether a request would be let in; takes nothing.

        Raises:
            RateLimited: not yet.
        """
        self._fill(now)
        missing = min(documents, self.limit.burst) - self._left
        if missing > ROUNDING:
            raise RateLimited(
                f"The key's limit of {self.limit} documents is used up",
                missing / self.limit.rate,
            )

    def give_back(self, documents: int) -> None:
        """A request that was let in here was refused elsewhere: it costs nothing."""
        self._left = min(self.limit.burst, self._left + documents)

    def _fill(self, now: float) -> None:
        if now > self._then:
            new = (now - self._then) * self.limit.rate
            self._left = min(self.limit.burst, self._left + new)
            self._then = now


def limit_of(field: str, rate: str, burst: str | None = None) -> Limit:
    """A limit as it is written: ``50/s``, ``3000/min`` or ``100000/h``.

    Args:
        field: where it is written, for messages.
        rate: the rate.
        burst: documents at once; None is what comes in one second, and at least one.

    Raises:
        InvalidInput: it is no rate above zero, or the burst is less than one document.
    """
    found = _RATE.fullmatch(rate)
    if found is None or not float(found[1]) > 0:
        raise InvalidInput(field, f"{rate!r} is no rate", "Write 50/s or 900/min.")
    each_second = float(found[1]) / _SECONDS[found[2]]
    if burst is None:
        return Limit(each_second, max(1.0, each_second), rate)
    if not burst.isdecimal() or int(burst) < 1:
        raise InvalidInput(field, f"burst={burst!r} is no count", "Write 1 document or more.")
    return Limit(each_second, float(burst), rate)

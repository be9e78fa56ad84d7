"""Which replica gets a request. Pure and seeded."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np

from echelon.errors import InvalidInput

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

Routing = Literal["tokens", "requests", "random", "two"]
"""By fewest outstanding tokens, by fewest outstanding requests, at random, or the one with fewer
outstanding tokens of two at random (power of two choices)."""

ROUTINGS: tuple[Routing, ...] = get_args(Routing)

BLOCK = 4096
"""Random numbers drawn at a time."""

Loads = np.ndarray[Any, np.dtype[np.float64]]


class Router:
    """Routes requests.

    Args:
        routing: how.
        replicas: among how many.
        seed: of what is random.

    Attributes:
        loads: what is outstanding at each replica, in what the routing counts.
    """

    def __init__(self, routing: Routing, replicas: int, seed: int) -> None:
        choosers: dict[Routing, Callable[[], int]] = {
            "tokens": self._least,
            "requests": self._least,
            "random": self._any,
            "two": self._lesser,
        }
        if routing not in choosers:
            raise InvalidInput("routing", f"{routing!r} is unknown", f"One of {ROUTINGS}.")
        self.loads: Loads = np.zeros(replicas)
        self.choose = choosers[routing]
        self._by_requests = routing == "requests"
        self._drawn = _draws(replicas, seed)

    def add(self, replica: int, tokens: float, requests: int) -> None:
        """So much more, or less, is outstanding."""
        self.loads[replica] += requests if self._by_requests else tokens

    def _least(self) -> int:
        return int(self.loads.argmin())

    def _any(self) -> int:
        return next(self._drawn)

    def _lesser(self) -> int:
        one, other = next(self._drawn), next(self._drawn)
        return one if self.loads[one] <= self.loads[other] else other


def _draws(replicas: int, seed: int) -> Iterator[int]:
    random = np.random.default_rng(seed)
    while True:
        yield from random.integers(replicas, size=BLOCK).tolist()


def chances(seed: int) -> Iterator[float]:
    """Numbers from 0 to 1, for ever."""
    random = np.random.default_rng(seed)
    while True:
        yield from random.random(BLOCK).tolist()

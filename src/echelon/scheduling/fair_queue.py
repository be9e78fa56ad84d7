"""The fair order: which request would end first if the device were shared by all. Pure.

A server that splits itself evenly among its requests is fair but slow: all of them end late.
Serving them one after another in the order in which that server would end them is as fair, never
later, and most end far earlier (Friedman and Henderson, Fairness and efficiency in web server
protocols, SIGMETRICS 2003; with one packet a request it is weighted fair queueing, Demers, Keshav
and Shenker 1989).

The tag of a request is the virtual time at which the even server would have finished its tokens.
Virtual time is the service that each request would have received there; it advances by the tokens
that are really served, divided by the weight of all requests.
"""

from __future__ import annotations

import heapq
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from echelon.types import Priority

WEIGHTS: dict[Priority, int] = {"high": 16, "normal": 4, "low": 1}
"""Shares: a request of priority ``high`` counts as a quarter of its size beside ``normal``. Strict
priorities would starve the lower ones; with shares every request gets its turn."""


class FairOrder:
    """The virtual server that is shared evenly."""

    def __init__(self) -> None:
        self._time = 0.0
        self._weight = 0
        self._members: dict[int, tuple[float, int]] = {}
        self._ends: list[tuple[float, int]] = []

    @property
    def weight(self) -> int:
        """Sum of the weights of all requests."""
        return self._weight

    def join(self, member: int, tokens: float, weight: int) -> float:
        """Add a request.

        Returns:
            Its tag: requests with smaller tags go first. A tag never changes.
        """
        tag = self._time + tokens / weight
        self._members[member] = tag, weight
        self._weight += weight
        heapq.heappush(self._ends, (tag, member))
        return tag

    def leave(self, member: int) -> None:
        """Remove a cancelled request; others are removed by :meth:`serve`."""
        _, weight = self._members.pop(member, (0.0, 0))
        self._weight -= weight

    def serve(self, tokens: float) -> None:
        """Advance virtual time by served tokens; requests end on the way."""
        left = tokens
        while self._members:
            tag, member = self._ends[0]
            if member in self._members:
                needed = max(0.0, tag - self._time) * self._weight
                if needed > left:
                    self._time += left / self._weight
                    return
                left -= needed
                self._time = max(self._time, tag)
                self.leave(member)
            heapq.heappop(self._ends)

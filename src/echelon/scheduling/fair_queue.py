"""The fair order: who would be answered first if the device were shared among all requests.

Pure: counts tokens; must not know time, texts or devices. A server that splits itself evenly
among its requests is fair but slow: all of them end late. Serving them one after another *in the
order in which that server would end them* is as fair and never later, and most end far earlier
(Friedman and Henderson, Fairness and efficiency in web server protocols, SIGMETRICS 2003; with
one packet a request it is weighted fair queueing, Demers, Keshav and Shenker 1989).

So each request gets a tag: the virtual time at which the even server would have done its tokens.
Virtual time is the service that every request alive has received there; it advances with the
tokens that are really served, divided by the weight of all who share.
"""

from __future__ import annotations

import heapq
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from echelon.types import Priority

WEIGHTS: dict[Priority, int] = {"high": 16, "normal": 4, "low": 1}
"""Shares, not walls: a request of ``high`` counts as a quarter of its size beside ``normal``. A
wall would starve what is behind it; with shares every tag comes up in the end."""


class FairOrder:
    """The virtual server that is shared evenly."""

    def __init__(self) -> None:
        self._time = 0.0
        self._weight = 0
        self._members: dict[int, tuple[float, int]] = {}
        self._ends: list[tuple[float, int]] = []

    @property
    def weight(self) -> int:
        """Weight of all who share the virtual server."""
        return self._weight

    def join(self, member: int, tokens: float, weight: int) -> float:
        """Let a request in.

        Returns:
            Its tag: the smaller, the earlier its turn. A tag never changes, and whoever comes
            later cannot overtake by waiting.
        """
        tag = self._time + tokens / weight
        self._members[member] = tag, weight
        self._weight += weight
        heapq.heappush(self._ends, (tag, member))
        return tag

    def leave(self, member: int) -> None:
        """Take a request out that was cancelled; others leave by themselves."""
        _, weight = self._members.pop(member, (0.0, 0))
        self._weight -= weight

    def serve(self, tokens: float) -> None:
        """Tokens were served: virtual time goes on, and requests end on the way."""
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

"""Which requests inside should end next, and what has to be done until then.

Pure: looks at the batcher's records and changes nothing. Requests end in the fair order
(:mod:`echelon.plan.fair`), so the next to end is one whose pairs all run already, or the first in
that order; the large ones behind it do not matter. A step under way counts whole, as the batcher
does not know when it began, and deadlines are not looked at: both let requests end earlier only.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass
from typing import TYPE_CHECKING

from echelon.plan.queue import State, by_tag

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from echelon.plan.queue import Entry, Step, Unit

QUEUED = {State.WAITING, State.AGAIN}


@dataclass(frozen=True, slots=True)
class Soon:
    """What has to be done until a request has ended.

    Attributes:
        running_s: predicted seconds of the steps under way that it waits for.
        tokens: tokens that wait, of it and of those before it; 0 where all of it runs.
        squares: their squared tokens.
    """

    running_s: float
    tokens: int = 0
    squares: int = 0


def soonest(
    entries: Iterable[Entry],
    running: Sequence[tuple[Step, list[Unit]]],
    places: int,
    workers: int,
) -> list[Soon]:
    """The next ``places`` requests to end, or all where there are fewer, in the order of ending.

    Args:
        entries: requests inside.
        running: steps under way with their pairs, in the order in which they were formed.
        places: how many.
        workers: workers that run the steps.
    """
    ends, all_s = _ends(running, workers)
    # From the end: what is given away last waits longest.
    queued = {e.number: e for e in entries if any(map(_waits, reversed(e.units)))}
    soon = [Soon(seconds) for number, seconds in ends.items() if number not in queued]
    soon = heapq.nsmallest(places, soon, key=lambda end: end.running_s)
    tokens, squares = 0, 0
    seen: set[Unit] = set()
    for entry in heapq.nsmallest(places - len(soon), queued.values(), key=by_tag):
        units = {unit for unit in entry.units if _waits(unit)} - seen
        seen |= units
        tokens += sum(unit.length for unit in units)
        squares += sum(unit.length**2 for unit in units)
        soon.append(Soon(all_s, tokens, squares))
    return soon


def _ends(
    running: Sequence[tuple[Step, list[Unit]]], workers: int
) -> tuple[dict[int, float], float]:
    """When each request's last running pair is scored, and when a worker is free on average."""
    free = [0.0] * workers
    ends: dict[int, float] = {}
    for step, units in running:
        end = heapq.heappop(free) + step.predicted_s
        heapq.heappush(free, end)
        for unit in units:
            for entry, _ in unit.owners:
                ends[entry.number] = max(end, ends.get(entry.number, 0.0))
    return ends, sum(free) / workers


def _waits(unit: Unit) -> bool:
    return unit.state in QUEUED

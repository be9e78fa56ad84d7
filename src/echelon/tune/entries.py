"""Entries of a profile's sweep: which is meant, the fastest, and the knee. Pure.

An entry is a point as the profile holds it, see :class:`echelon.tuning.sweep.MeasuredPoint`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from echelon.scheduling.packing import NO_BUDGET
from echelon.tune.words import measured
from echelon.tuning.choose import ENOUGH, TIE

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from echelon.profile import Profile
    from echelon.tune.words import Entry


def find(
    profile: Profile, batch_size: int | None, token_budget: int | None, pairs: int | None = None
) -> Entry | None:
    """The measured entry of a size; of several, that with the most pairs."""
    wanted = (batch_size, token_budget)
    found = [
        e
        for e in profile.points
        if measured(e)
        and (e["batch_size"], e["token_budget"]) == wanted
        and pairs in {None, e["pairs"]}
    ]
    return max(found, key=lambda e: e["pairs"], default=None)


def chosen(profile: Profile) -> Entry | None:
    """The measured entry of the chosen setting, with the most pairs."""
    settings = profile.settings
    budget = None if settings.token_budget == NO_BUDGET else settings.token_budget
    return find(profile, settings.batch_size, budget)


def slowest(profile: Profile, against: Entry) -> Entry | None:
    """The slowest size for as many pairs; None where there is no slower one."""
    rivals = [e for e in profile.points if measured(e) and e["pairs"] == against["pairs"]]
    found = min(rivals, key=lambda e: e["pairs_per_s"], default=against)
    return found if found["pairs_per_s"] < against["pairs_per_s"] else None


def fastest(entries: Iterable[Entry]) -> Entry | None:
    """The fastest of some entries; of those within TIE of it, the smallest."""
    return _smallest(entries, 1 + TIE)


def knee(entries: Iterable[Entry]) -> Entry | None:
    """The smallest size that keeps ENOUGH of the best throughput: beyond, little is gained."""
    return _smallest(entries, 1 / ENOUGH)


def knees(entries: Sequence[Entry], unit: str) -> list[Entry]:
    """The knee of each number of pairs; ``unit`` names the size of the entries."""
    counts = sorted({e["pairs"] for e in entries})
    rows = [[e for e in entries if e["pairs"] == count and e[unit]] for count in counts]
    return [found for row in rows if (found := knee(row)) is not None]


def slower(entry: Entry, best: Entry) -> float:
    """By how much a call of as many pairs takes longer, relative to the best."""
    return float(entry["latency_s"]["median"] / best["latency_s"]["median"]) - 1


def _smallest(entries: Iterable[Entry], within: float) -> Entry | None:
    known = sorted((e for e in entries if measured(e)), key=_size)
    if not known:
        return None
    least = min(e["latency_s"]["median"] for e in known)
    return next(e for e in known if e["latency_s"]["median"] <= within * least)


def _size(entry: Entry) -> int:
    return int(entry["batch_size"] or entry["token_budget"] or 0)

"""Where the chosen settings stand among static batch sizes. Pure.

All had the same requests in the same rounds, so they are compared round by round, and what counts
is the median of the ratios: a machine that is slower for a while is slower for all of a round.
Each scenario has its own measure:

- ``api``: P99, among those that bear the load; goodput where the chosen settings do not bear it.
- ``concurrent``: goodput, requests a second that are answered within the goal; P99 where all bear
  the load, as then their goodput is the load's.
- ``offline``: documents a second.
- ``edge``: memory, among those whose median answer is nearly as soon as the soonest; the median
  answer where the chosen settings' is not.

To bear a load is to answer all but a hundredth of it within the goal.
"""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from echelon.simulation.service_level import ServiceLevel
from echelon.tuning.goal import HURRIED
from echelon.tuning.scenario import NEARLY

if TYPE_CHECKING:
    from collections.abc import Sequence

    from echelon.tuning.goal import ScenarioGoal
    from echelon.tuning.recommendation import LoadMetrics

WITHIN = 0.03
"""Relative difference to the best that is as good as being it."""

LOWER = frozenset({"p50_s", "p99_s", "memory_bytes"})
"""Measures of which less is better."""

Row = dict[str, Any]


@dataclass(slots=True)
class Rival:
    """Settings that were run.

    Attributes:
        pairs: static batch size; None are the chosen settings.
        rounds: what was measured, round by round.
        failed: why they could not be run to the end.
    """

    pairs: int | None
    rounds: list[LoadMetrics] = field(default_factory=list)
    failed: str | None = None


def standing(goal: ScenarioGoal, rivals: Sequence[Rival]) -> Row:
    """Where they stand: what the results keep as ``static``.

    Args:
        goal: the scenario, and what must hold.
        rivals: the chosen settings, which ran all rounds, then the static ones.

    Returns:
        ``rounds``, ``measure``, ``verdict`` (``best``; ``within``, up to WITHIN behind the best;
        or ``behind``), ``best`` (the static size; None for the chosen settings), ``behind``
        (relative; None where the chosen had nothing to compare) and ``settings``, a row each: its
        ``static`` size, ``rounds`` and their ``median`` (with ``goodput_per_s``), ``value``,
        ``low`` and ``high`` of the measure, whether it ``bears`` the load, how far it is ``ahead``
        of the chosen, and the ``reason`` why it was not compared.
    """
    rows = [_row(goal, rival) for rival in rivals]
    chosen = rows[0]
    name = _measure(goal, rows)
    for row in rows:
        row["reason"] = row["reason"] or _unfit(name, row, rows)
        row.update(_value(name, row))
        if row["reason"] is None and row is not chosen:
            row["ahead"] = _ahead(name, row, chosen)
    better = [row for row in rows[1:] if row["ahead"] is not None and row["ahead"] > 0]
    best = max(better, key=lambda row: row["ahead"], default=chosen)
    behind = 0.0 if best is chosen else best["ahead"]
    for row in rows:
        row["ahead"] = _finite(row["ahead"])
    return {
        "rounds": len(rivals[0].rounds),
        "measure": name,
        "verdict": "best" if best is chosen else "within" if behind <= WITHIN else "behind",
        "best": best["static"],
        "behind": _finite(behind),
        "settings": rows,
    }


def _row(goal: ScenarioGoal, rival: Rival) -> Row:
    """A rival before it is compared."""
    limit = goal.memory_limit_bytes
    rounds = [one.as_dict() | {"goodput_per_s": _goodput(goal, one)} for one in rival.rounds]
    names = () if not rounds or rival.failed else rounds[0]
    median = {name: _median([one[name] for one in rounds]) for name in names}
    asked, missed = (sum(one[name] for one in rounds) for name in ("requests", "missed"))
    memory = median.get("memory_bytes")
    reason = None
    if rival.failed is not None:
        reason = rival.failed
    elif rival.pairs is not None and limit and memory is not None and memory > limit:
        reason = "needs more memory than there may be"
    return {
        "static": rival.pairs,
        "rounds": rounds,
        "median": median or None,
        "bears": rival.failed is None and not ServiceLevel().missed(asked, 0, missed),
        "reason": reason,
        "ahead": None,
    }


def _goodput(goal: ScenarioGoal, one: LoadMetrics) -> float | None:
    return (one.requests - one.missed) / goal.verify_s if goal.scenario in HURRIED else None


def _measure(goal: ScenarioGoal, rows: Sequence[Row]) -> str:
    chosen, able = rows[0], [row for row in rows if row["reason"] is None]
    if goal.scenario == "offline":
        return "documents_per_s"
    if goal.scenario == "edge":
        known = all(row["median"]["memory_bytes"] is not None for row in able)
        return "memory_bytes" if known and _soon(chosen, rows) else "p50_s"
    bearing = chosen["bears"] if goal.scenario == "api" else all(row["bears"] for row in able)
    return "p99_s" if bearing else "goodput_per_s"


def _unfit(name: str, row: Row, rows: Sequence[Row]) -> str | None:
    """Why a rival is not compared by this measure."""
    if name == "memory_bytes" and not _soon(row, rows):
        return "answers too late"
    if name == "p99_s" and not row["bears"]:
        return "does not bear the load"
    return None


def _soon(row: Row, rows: Sequence[Row]) -> bool:
    """Whether the median answer is nearly as soon as the soonest."""
    soonest = min(one["median"]["p50_s"] for one in rows if one["reason"] is None)
    return bool(row["median"]["p50_s"] <= NEARLY * (1 + WITHIN) * soonest)


def _value(name: str, row: Row) -> Row:
    """The measure over the rounds."""
    if row["median"] is None:
        return {"value": None, "low": None, "high": None}
    found = [one[name] for one in row["rounds"] if one[name] is not None]
    return {
        "value": row["median"][name],
        "low": min(found, default=None),
        "high": max(found, default=None),
    }


def _ahead(name: str, row: Row, chosen: Row) -> float:
    """By how much a rival is better than the chosen settings; negative where it is worse."""
    pairs = zip(chosen["rounds"], row["rounds"], strict=True)
    return statistics.median(_ratio(name, ours[name], theirs[name]) for ours, theirs in pairs) - 1


def _ratio(name: str, ours: float | None, theirs: float | None) -> float:
    """How many times better they are."""
    if name in LOWER:
        ours, theirs = theirs, ours
        ours, theirs = (math.inf if one is None else one for one in (ours, theirs))
    ours, theirs = ours or 0.0, theirs or 0.0
    if ours == theirs:
        return 1.0
    return theirs / ours if ours else math.inf


def _median(values: Sequence[float | None]) -> float | None:
    """None where a round has none."""
    known = [one for one in values if one is not None]
    return statistics.median(known) if len(known) == len(values) else None


def _finite(amount: float | None) -> float | None:
    return amount if amount is not None and math.isfinite(amount) else None

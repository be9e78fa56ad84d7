"""Ranks the chosen settings among static batch sizes, in numbers and in words. Pure.

All settings answered the same requests in the same rounds. They are compared round by round, and
the median of the ratios counts, so a slow-down of the machine affects all settings of a round.
Each scenario has its own measure:

- ``api``: P99 among settings that hold the load; goodput where the chosen settings do not hold it.
- ``concurrent``: goodput, which is requests per second answered within the goal; P99 where all
  settings hold the load, since then their goodput is the same.
- ``offline``: documents per second.
- ``edge``: memory, among settings whose median latency is nearly the lowest; the median latency
  where that of the chosen settings is not.

Settings hold a load if the service level holds.
"""

from __future__ import annotations

import math
import statistics
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from echelon.messages.units import SPACE, UNKNOWN, percent
from echelon.reports.wording import step, value
from echelon.simulation.service_level import ServiceLevel
from echelon.tuning.goal import HURRIED
from echelon.tuning.scenario import NEARLY

if TYPE_CHECKING:
    from collections.abc import Sequence

    from echelon.tuning.goal import ScenarioGoal
    from echelon.tuning.recommendation import LoadMetrics

WITHIN = 0.03
"""Settings this close to the best, relative, count as equally good."""

LOWER = frozenset({"p50_s", "p99_s", "memory_bytes"})
"""Measures where a lower value is better."""

Row = dict[str, Any]


@dataclass(slots=True)
class MeasuredSettings:
    """Settings that were measured.

    Attributes:
        pairs: static batch size; None for the chosen settings.
        rounds: metrics of each round.
        failed: why they could not run all rounds.
    """

    pairs: int | None
    rounds: list[LoadMetrics] = field(default_factory=list)
    failed: str | None = None


def ranking(goal: ScenarioGoal, measured: Sequence[MeasuredSettings]) -> Row:
    """Rank the settings: the entry ``static`` of the results.

    Args:
        goal: the scenario, and what must hold.
        measured: the chosen settings, which ran all rounds, then the static ones.

    Returns:
        ``rounds``, ``measure``, ``verdict`` (``best``; ``within``, up to WITHIN behind the best;
        or ``behind``), ``best`` (the static size; None for the chosen settings), ``behind``
        (relative; None where the chosen had nothing to compare) and ``settings``, a row each: its
        ``static`` size, ``rounds`` and their ``median`` (with ``goodput_per_s``), ``value``,
        ``low`` and ``high`` of the measure, whether it ``bears`` the load, how far it is ``ahead``
        of the chosen, and the ``reason`` why it was not compared.
    """
    rows = [_row(goal, one) for one in measured]
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
        "rounds": len(measured[0].rounds),
        "measure": name,
        "verdict": "best" if best is chosen else "within" if behind <= WITHIN else "behind",
        "best": best["static"],
        "behind": _finite(behind),
        "settings": rows,
    }


def _row(goal: ScenarioGoal, settings: MeasuredSettings) -> Row:
    """The row of some settings before they are compared."""
    limit = goal.memory_limit_bytes
    rounds = [asdict(one) | {"goodput_per_s": _goodput(goal, one)} for one in settings.rounds]
    names = () if not rounds or settings.failed else rounds[0]
    median = {name: _median([one[name] for one in rounds]) for name in names}
    asked, missed = (sum(one[name] for one in rounds) for name in ("requests", "missed"))
    memory = median.get("memory_bytes")
    reason = None
    if settings.failed is not None:
        reason = settings.failed
    elif settings.pairs is not None and limit and memory is not None and memory > limit:
        reason = "needs more memory than the limit"
    return {
        "static": settings.pairs,
        "rounds": rounds,
        "median": median or None,
        "bears": settings.failed is None and not ServiceLevel().missed(asked, 0, missed),
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
        return "memory_bytes" if known and _is_quick(chosen, rows) else "p50_s"
    bearing = chosen["bears"] if goal.scenario == "api" else all(row["bears"] for row in able)
    return "p99_s" if bearing else "goodput_per_s"


def _unfit(name: str, row: Row, rows: Sequence[Row]) -> str | None:
    """Why settings are not compared by this measure; None where they are."""
    if name == "memory_bytes" and not _is_quick(row, rows):
        return "answers too late"
    if name == "p99_s" and not row["bears"]:
        return "does not bear the load"
    return None


def _is_quick(row: Row, rows: Sequence[Row]) -> bool:
    """Whether the median latency is nearly the lowest."""
    quickest = min(one["median"]["p50_s"] for one in rows if one["reason"] is None)
    return bool(row["median"]["p50_s"] <= NEARLY * (1 + WITHIN) * quickest)


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
    """Relative advantage over the chosen settings; negative where they are worse."""
    pairs = zip(chosen["rounds"], row["rounds"], strict=True)
    return statistics.median(_ratio(name, ours[name], theirs[name]) for ours, theirs in pairs) - 1


def _ratio(name: str, ours: float | None, theirs: float | None) -> float:
    """How many times better the others are."""
    if name in LOWER:
        ours, theirs = theirs, ours
        ours, theirs = (math.inf if one is None else one for one in (ours, theirs))
    ours, theirs = ours or 0.0, theirs or 0.0
    if ours == theirs:
        return 1.0
    return theirs / ours if ours else math.inf


def _median(values: Sequence[float | None]) -> float | None:
    """The median; None where a round has no value."""
    known = [one for one in values if one is not None]
    return statistics.median(known) if len(known) == len(values) else None


def _finite(amount: float | None) -> float | None:
    return amount if amount is not None and math.isfinite(amount) else None


# In words.

COLUMNS = {
    "api": ("p50_s", "p99_s", "goodput_per_s"),
    "concurrent": ("p50_s", "p99_s", "goodput_per_s"),
    "offline": ("documents_per_s", "memory_bytes"),
    "edge": ("p50_s", "p99_s", "memory_bytes"),
}
"""Metrics that are shown for each scenario."""

TITLES = {
    "p50_s": "P50",
    "p99_s": "P99",
    "goodput_per_s": "Goodput/s",
    "documents_per_s": "Documents/s",
    "memory_bytes": "Memory",
}

MEASURES = {
    "p50_s": "P50",
    "p99_s": "P99",
    "goodput_per_s": "goodput",
    "documents_per_s": "documents a second",
    "memory_bytes": "memory",
}


def in_words(scenario: Row) -> Row:
    """The texts for a profile's scenario with its ranking, ``static``.

    Returns:
        ``verdict``, ``good`` (whether it is best or nearly), ``head``, ``rows`` (``name``,
        ``cells``, ``chosen``, ``best``) and ``note``.
    """
    found = scenario["static"]
    columns, measure = COLUMNS[scenario["scenario"]], found["measure"]
    return {
        "verdict": _sentence(found),
        "good": found["verdict"] != "behind",
        "head": [*(TITLES[name] for name in columns), "Than the chosen"],
        "rows": [
            {
                "name": _name(row, scenario["chosen"]),
                "cells": [*(_cell(name, row, measure) for name in columns), _than(row)],
                "chosen": row["static"] is None,
                "best": row["static"] == found["best"],
            }
            for row in found["settings"]
        ],
        "note": _note(found["rounds"], MEASURES[measure]),
    }


def _note(rounds: int, measure: str) -> str:
    if rounds == 1:
        return (
            "One round, in which all had the same requests; more rounds would say how sure it is."
        )
    return (
        f"Medians of {rounds} rounds, in each of which all had the same requests; in brackets the "
        f"lowest and the highest {measure} of a round."
    )


def _sentence(found: Row) -> str:
    measure, best = MEASURES[found["measure"]], found["best"]
    if found["verdict"] == "best":
        return f"Best: no static batch size is better in {measure}."
    if found["behind"] is None:
        return f"Far behind static {best} in {measure}."
    behind = f"{percent(found['behind'], 1)} behind static {best} in {measure}."
    if found["verdict"] == "within":
        return f"Within {percent(WITHIN)} of the best: {behind}"
    return behind


def _name(row: Row, chosen: Row) -> str:
    if row["static"] is None:
        return f"Chosen: {step(chosen['batch_size'], chosen['token_budget'])}"
    return f"Static {row['static']}"


def _cell(name: str, row: Row, measure: str) -> str:
    if row["median"] is None:
        return UNKNOWN
    shown = value(name, row["median"][name])
    if name != measure or row["low"] is None:
        return shown
    return f"{shown} ({value(name, row['low'])}{SPACE}– {value(name, row['high'])})"


def _than(row: Row) -> str:
    if row["static"] is None:
        return ""
    if row["reason"] is not None:
        return str(row["reason"])
    if row["ahead"] is None:
        return "far better"
    share = percent(abs(row["ahead"]), 1)
    return f"{share} better" if row["ahead"] > 0 else f"{share} worse"

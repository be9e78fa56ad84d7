"""Where settings stand among static batch sizes, in words. Pure."""

from __future__ import annotations

from typing import Any

from echelon.messages.units import SPACE, UNKNOWN, percent
from echelon.reports.summary import value
from echelon.reports.wording import step
from static_standing import WITHIN

Entry = dict[str, Any]

COLUMNS = {
    "api": ("p50_s", "p99_s", "goodput_per_s"),
    "concurrent": ("p50_s", "p99_s", "goodput_per_s"),
    "offline": ("documents_per_s", "memory_bytes"),
    "edge": ("p50_s", "p99_s", "memory_bytes"),
}
"""Numbers of each scenario that are shown."""

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


def in_words(scenario: Entry) -> Entry:
    """What to show of a profile's scenario with its standing, ``static``.

    Returns:
        ``verdict``, ``good`` (whether it is best or nearly), ``head``, ``rows`` (``name``,
        ``cells``, ``chosen``, ``best``) and ``note``.
    """
    found = scenario["static"]
    columns, measure = COLUMNS[scenario["scenario"]], found["measure"]
    return {
        "verdict": _verdict(found),
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


def _verdict(found: Entry) -> str:
    measure, best = MEASURES[found["measure"]], found["best"]
    if found["verdict"] == "best":
        return f"Best: no static batch size is better in {measure}."
    if found["behind"] is None:
        return f"Far behind static {best} in {measure}."
    behind = f"{percent(found['behind'], 1)} behind static {best} in {measure}."
    if found["verdict"] == "within":
        return f"Within {percent(WITHIN)} of the best: {behind}"
    return behind


def _name(row: Entry, chosen: Entry) -> str:
    if row["static"] is None:
        return f"Chosen: {step(chosen['batch_size'], chosen['token_budget'])}"
    return f"Static {row['static']}"


def _cell(name: str, row: Entry, measure: str) -> str:
    if row["median"] is None:
        return UNKNOWN
    shown = value(name, row["median"][name])
    if name != measure or row["low"] is None:
        return shown
    return f"{shown} ({value(name, row['low'])}{SPACE}– {value(name, row['high'])})"


def _than(row: Entry) -> str:
    if row["static"] is None:
        return ""
    if row["reason"] is not None:
        return str(row["reason"])
    if row["ahead"] is None:
        return "far better"
    share = percent(abs(row["ahead"]), 1)
    return f"{share} better" if row["ahead"] > 0 else f"{share} worse"

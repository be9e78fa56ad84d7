"""Static batch sizes beside a scenario's settings, in words for report and terminal. Pure."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from echelon.tune.card import value
from echelon.tune.lang import mark, told, tr
from echelon.tune.solve import TIE
from echelon.tune.words import SPACE, UNKNOWN, percent, step

if TYPE_CHECKING:
    from echelon.tune.profile import Profile

Entry = dict[str, Any]

COLUMNS = {
    "api": ("p50_s", "p99_s", "goodput_per_s"),
    "concurrent": ("p50_s", "p99_s", "goodput_per_s"),
    "offline": ("documents_per_s", "memory_bytes"),
    "edge": ("p50_s", "p99_s", "memory_bytes"),
}
"""Numbers of each scenario that are shown."""

TITLES = {
    "p50_s": mark("P50"),
    "p99_s": mark("P99"),
    "goodput_per_s": mark("Goodput/s"),
    "documents_per_s": mark("Documents/s"),
    "memory_bytes": mark("Memory"),
}

MEASURES = {
    "p50_s": mark("P50"),
    "p99_s": mark("P99"),
    "goodput_per_s": mark("goodput"),
    "documents_per_s": mark("documents a second"),
    "memory_bytes": mark("memory"),
}


def beside_static(profile: Profile) -> Entry | None:
    """What to show; None where nothing was compared.

    Returns:
        ``verdict``, ``good`` (whether it is best or nearly), ``head``, ``rows`` (``name``,
        ``cells``, ``chosen``, ``best``) and ``note``.
    """
    scenario = profile.scenario
    found = None if scenario is None else scenario.get("static")
    if scenario is None or found is None:
        return None
    columns, measure = COLUMNS[scenario["scenario"]], found["measure"]
    return {
        "verdict": _verdict(found),
        "good": found["verdict"] != "behind",
        "head": [*(tr(TITLES[name]) for name in columns), tr("Than the chosen")],
        "rows": [
            {
                "name": _name(row, scenario["chosen"]),
                "cells": [*(_cell(name, row, measure) for name in columns), _than(row)],
                "chosen": row["static"] is None,
                "best": row["static"] == found["best"],
            }
            for row in found["settings"]
        ],
        "note": _note(found["rounds"], tr(MEASURES[measure])),
    }


def _note(rounds: int, measure: str) -> str:
    if rounds == 1:
        return tr(
            "One round, in which all had the same requests; more rounds would say how sure it is."
        )
    return tr(
        "Medians of {rounds} rounds, in each of which all had the same requests; in brackets the "
        "lowest and the highest {measure} of a round.",
        rounds=rounds,
        measure=measure,
    )


def _verdict(found: Entry) -> str:
    measure = tr(MEASURES[found["measure"]])
    if found["verdict"] == "best":
        return tr("Best: no static batch size is better in {measure}.", measure=measure)
    if found["behind"] is None:
        return tr("Far behind static {size} in {measure}.", size=found["best"], measure=measure)
    values = {"share": percent(found["behind"], 1), "size": found["best"], "measure": measure}
    if found["verdict"] == "within":
        return tr(
            "Within {tolerance} of the best: {share} behind static {size} in {measure}.",
            tolerance=percent(TIE),
            **values,
        )
    return tr("{share} behind static {size} in {measure}.", **values)


def _name(row: Entry, chosen: Entry) -> str:
    if row["static"] is None:
        return tr("Chosen: {step}", step=step(chosen["batch_size"], chosen["token_budget"]))
    return tr("Static {size}", size=row["static"])


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
        return told(str(row["reason"]))
    if row["ahead"] is None:
        return tr("far better")
    share = percent(abs(row["ahead"]), 1)
    return (
        tr("{share} better", share=share) if row["ahead"] > 0 else tr("{share} worse", share=share)
    )

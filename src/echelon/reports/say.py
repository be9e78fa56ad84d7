"""A comparison in words. Pure."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from echelon.reports.ratio import Ratio
from echelon.tune import words
from echelon.tune.solve import TIE
from echelon.tune.stats import CONFIDENCE

if TYPE_CHECKING:
    from collections.abc import Mapping

Row = dict[str, Any]

JUDGEMENTS = {
    "tie": "a tie",
    "beyond": "beyond the spread",
    "within": "within the spread",
    "unknown": "no interval",
}


def factor(ratio: Row | None, *, timed: bool = True) -> str:
    """A ratio with its interval and what it means.

    Args:
        ratio: of two numbers; None where there is none.
        timed: whether the numbers could have had an interval.
    """
    if ratio is None:
        return words.UNKNOWN
    if ratio["judgement"] == "unknown" and not timed:
        return times(ratio)
    return f"{times(ratio)} ({JUDGEMENTS[ratio['judgement']]})"


def times(ratio: Row) -> str:
    """A ratio with its interval where it has one."""
    shown = f"{words.number(ratio['value'])}×"
    if ratio["low"] is None:
        return shown
    return f"{shown}, {words.number(ratio['low'])}–{words.number(ratio['high'])}"


def verdict(found: Row) -> str:
    """Which is faster, by how much, and whether that is more than the spread."""
    if not found["comparable"]["times"]:
        why = " and ".join(found["comparable"]["obstacles"])
        return (
            f"Not to be compared in speed: {why}. Both are shown side by side, without ratios of "
            "times."
        )
    for rows, how in ((found["chosen"], "each with its chosen setting"), (found["best"], BEST)):
        shared = [row for row in rows if row["latency"]]
        if shared:
            return _faster(shared[-1], how)
    return (
        "Not to be compared in speed: no number of pairs was measured with both. Run echelon tune "
        "with the same --pairs on both."
    )


BEST = "each with its best batch"


def _faster(row: Row, how: str) -> str:
    """One sentence on the fastest way of each to rank as many pairs, one on its certainty."""
    a, b = (words.duration(row[side]["latency_s"]) for side in "ab")
    ratio, what = row["throughput"], f"{row['pairs']} pairs"
    if ratio["judgement"] == "tie":
        return (
            f"A tie: {what} take {a} on A and {b} on B, {how}; medians within "
            f"{words.percent(TIE)} are a tie."
        )
    first, quick, last, slow = ("B", b, "A", a) if ratio["value"] > 1 else ("A", a, "B", b)
    if ratio["value"] < 1:
        ratio = Ratio(ratio["value"], ratio["low"], ratio["high"]).inverse.as_dict()
    return (
        f"{first} is {words.number(ratio['value'])} times as fast as {last}: {what} take {quick} "
        f"on {first} and {slow} on {last}, {how}. {_certainty(ratio)}"
    )


def _certainty(ratio: Row) -> str:
    if ratio["judgement"] == "unknown":
        return "Too few runs to say whether that is more than the spread of the runs."
    low, high = words.number(ratio["low"]), words.number(ratio["high"])
    ends = f"({words.percent(CONFIDENCE)} interval {low} to {high})"
    if ratio["judgement"] == "beyond":
        return f"The difference is beyond the spread of the runs {ends}."
    return f"The difference is within the spread of the runs {ends}: it may be none."


def notes(found: Row) -> list[str]:
    """What to know before trusting it."""
    keys = {row["name"]: row for row in found["keys"]}
    told = []
    if found["comparable"]["model"]:
        if keys["model"]["differs"]:
            told.append("The models have other names and the same files: they are one model.")
        elif keys["revision"]["differs"]:
            told.append("The model has another revision on each side.")
    if keys["precision"]["differs"]:
        told.append(
            "The chosen precisions differ, so part of a difference in speed is theirs; the table "
            "of precisions compares like with like."
        )
    if len(set(found["memory"]["of"])) > 1:
        told.append("Memory of a process and of a GPU are not compared.")
    for name in "ab":
        told += _of_side(name.upper(), found[name])
    return told


def _of_side(name: str, side: Mapping[str, Any]) -> list[str]:
    told = [f"{name}: {warning}" for warning in side["warnings"]]
    learned = side["learned_token_budget"]
    if learned is not None:
        told.append(
            f"{name}: memory ran short after tuning, so its steps now hold at most "
            f"{learned:,} tokens; the times are from before."
        )
    return told

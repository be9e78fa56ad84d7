"""The ratio of two measurements with its interval, and a comparison in sentences."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal

from echelon.messages import N_, tr, translated, units
from echelon.reports import wording
from echelon.reports.statistics import CONFIDENCE, TIE

if TYPE_CHECKING:
    from collections.abc import Mapping

Judgement = Literal["tie", "beyond", "within", "unknown"]

ROUNDING = 1e-9
"""Makes values that differ by exactly TIE a tie in both directions."""


@dataclass(frozen=True, slots=True)
class KnownValue:
    """A measured number above 0, with the ends of its interval or None."""

    value: float
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True, slots=True)
class Ratio:
    """B divided by A, with the ends of its interval; None unless both numbers have one."""

    value: float
    low: float | None = None
    high: float | None = None

    @classmethod
    def of(cls, a: KnownValue, b: KnownValue) -> Ratio:
        """Divide b by a.

        The interval takes, on the logarithmic scale, the distances of both numbers to their own
        ends as independent, so their squares add up (Zou and Donner, Construction of confidence
        limits about effect measures, Statistics in Medicine 27, 2008).
        """
        value = b.value / a.value
        if a.low is None or a.high is None or b.low is None or b.high is None:
            return cls(value)
        down = math.hypot(math.log(b.value / b.low), math.log(a.high / a.value))
        up = math.hypot(math.log(b.high / b.value), math.log(a.value / a.low))
        return cls(value, value * math.exp(-down), value * math.exp(up))

    @property
    def inverse(self) -> Ratio:
        """A divided by B; the ratio of rates where this is the ratio of times."""
        if self.low is None or self.high is None:
            return Ratio(1 / self.value)
        return Ratio(1 / self.value, 1 / self.high, 1 / self.low)

    @property
    def judgement(self) -> Judgement:
        """``tie`` within TIE, else ``beyond`` or ``within`` the variation; or ``unknown``."""
        if max(self.value, 1 / self.value) <= 1 + TIE + ROUNDING:
            return "tie"
        if self.low is None or self.high is None:
            return "unknown"
        return "within" if self.low <= 1 <= self.high else "beyond"

    def as_dict(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self) | {"judgement": self.judgement}


SentenceRow = dict[str, Any]

JUDGEMENTS = {
    "tie": N_("a tie"),
    "beyond": N_("beyond the variation between runs"),
    "within": N_("within the variation between runs"),
    "unknown": N_("no interval"),
}


def factor(ratio: SentenceRow | None, *, timed: bool = True) -> str:
    """A ratio with its interval and judgement; ``timed`` if its numbers can have intervals."""
    if ratio is None:
        return units.UNKNOWN
    if ratio["judgement"] == "unknown" and not timed:
        return times(ratio)
    meaning = tr(JUDGEMENTS[ratio["judgement"]])
    return tr("{value} ({certainty})", value=times(ratio), certainty=meaning)


def times(ratio: SentenceRow) -> str:
    """A ratio with its interval, if it has one."""
    shown = f"{units.number(ratio['value'])}×"
    if ratio["low"] is None:
        return shown
    low, high = units.number(ratio["low"]), units.number(ratio["high"])
    return tr("{value}, {low}–{high}", value=shown, low=low, high=high)


def headline(found: SentenceRow) -> str:
    """Which profile is faster, by how much, and whether that exceeds the variation."""
    best = tr("each with its best batch size")
    if not found["comparable"]["times"]:
        why = tr(" and ").join(map(tr, found["comparable"]["obstacles"]))
        return tr(
            "Speed cannot be compared: {why}. Both profiles are shown side by side, without "
            "speed ratios.",
            why=why,
        )
    for rows, how in ((found["chosen"], tr("each with its chosen setting")), (found["best"], best)):
        shared = [row for row in rows if row["latency"]]
        if shared:
            return _faster(shared[-1], how)
    return tr(
        "Speed cannot be compared: no number of pairs was measured on both. Run echelon tune "
        "with the same --pairs on both."
    )


def _faster(row: SentenceRow, how: str) -> str:
    """One sentence on the fastest call of each, one on the certainty of the difference."""
    a, b = (units.duration(row[side]["latency_s"]) for side in "ab")
    ratio, what = row["throughput"], wording.pairs(row["pairs"])
    if ratio["judgement"] == "tie":
        return tr(
            "A tie: {pairs} take {a} on A and {b} on B, {how}; medians within {tie} are a tie.",
            pairs=what,
            a=a,
            b=b,
            how=how,
            tie=units.percent(TIE),
        )
    first, quick, last, slow = ("B", b, "A", a) if ratio["value"] > 1 else ("A", a, "B", b)
    if ratio["value"] < 1:
        ratio = Ratio(ratio["value"], ratio["low"], ratio["high"]).inverse.as_dict()
    faster = tr(
        "{first} is {times} times as fast as {last}: {pairs} take {quick} on {first} and {slow} "
        "on {last}, {how}.",
        first=first,
        last=last,
        times=units.number(ratio["value"]),
        pairs=what,
        quick=quick,
        slow=slow,
        how=how,
    )
    return f"{faster} {_certainty(ratio)}"


def _certainty(ratio: SentenceRow) -> str:
    if ratio["judgement"] == "unknown":
        return tr("There are too few runs to compare this with the variation between runs.")
    low, high = units.number(ratio["low"]), units.number(ratio["high"])
    ends = {"confidence": units.percent(CONFIDENCE), "low": low, "high": high}
    if ratio["judgement"] == "beyond":
        return tr(
            "The difference is larger than the variation between runs ({confidence} confidence "
            "interval {low} to {high}).",
            **ends,
        )
    return tr(
        "The difference is within the variation between runs ({confidence} confidence interval "
        "{low} to {high}), so there may be none.",
        **ends,
    )


def notes(found: SentenceRow) -> list[str]:
    """What to know before using the comparison."""
    keys = {row["name"]: row for row in found["keys"]}
    shown = []
    if found["comparable"]["model"]:
        if keys["model"]["differs"]:
            shown.append(tr("The model names differ, but the files are the same: it is one model."))
        elif keys["revision"]["differs"]:
            shown.append(tr("The two profiles have different revisions of the model."))
    if keys["precision"]["differs"]:
        shown.append(
            tr(
                "The chosen precisions differ, which explains part of a difference in speed; "
                "the table of precisions compares each precision with itself."
            )
        )
    if len(set(found["memory"]["of"])) > 1:
        shown.append(tr("The memory of a process is not compared with the memory of a GPU."))
    for name in "ab":
        shown += _profile_notes(name.upper(), found[name])
    return shown


def _profile_notes(name: str, profile: Mapping[str, Any]) -> list[str]:
    shown = [
        tr("{what}: {found}", what=name, found=translated(text)) for text in profile["warnings"]
    ]
    learned = profile["learned_token_budget"]
    if learned is not None:
        shown.append(
            tr(
                "{side}: memory ran out after tuning, so a step now has at most {tokens} "
                "tokens; the times shown were measured before.",
                side=name,
                tokens=f"{learned:,}",
            )
        )
    return shown

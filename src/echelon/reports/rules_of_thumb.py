"""Rules of thumb for batch sizes, each compared with what the profile measured.

The rules are those of common tutorials: 4 to 8 pairs a batch for a realtime API, 16 to 32 for
offline work, 1 to 4 on an edge device, adaptive batching under concurrency, larger is faster, half
precision loses no accuracy, watch P99 and memory.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from echelon.messages import listed, tr, units
from echelon.reports import wording
from echelon.reports.model_charts import limit_of
from echelon.reports.profile_view import chosen, fastest, slower
from echelon.reports.statistics import TIE
from echelon.reports.summary import SERVED, agreement

if TYPE_CHECKING:
    from collections.abc import Sequence

    from echelon.profile import Profile
    from echelon.reports.wording import Entry

State = Literal["holds", "costs", "unknown"]

FEW, MANY = 10, 50
"""Pairs per call: at most 10 for a realtime API, at least 50 for offline work."""

HALF = ("bf16", "fp16")


@dataclass(frozen=True, slots=True)
class Rule:
    """A rule, what was measured on this machine, and the result.

    Attributes:
        name: the same in all languages.
        rule: its text.
        found: the measurement as text.
        state: ``holds``, ``costs`` or ``unknown``.
        result: the state as text.
    """

    name: str
    rule: str
    found: str
    state: State
    result: str


def rules_of_thumb(profile: Profile) -> list[Rule]:
    """Each rule, compared with this machine."""
    rules = (_api, _offline, _edge, _concurrent, _larger, _half, _watch)
    return [rule(profile) for rule in rules]


# Batch sizes.


def _api(profile: Profile) -> Rule:
    rule = tr("Realtime API, 1–10 documents: batch size 4–8")
    return _sizes("api", rule, _few(profile), (4, 8), tr("Give --pairs 10 --batch-sizes 4,8."))


def _offline(profile: Profile) -> Rule:
    rule = tr("Offline, 50–200 documents: batch size 16–32")
    remedy = tr("Give --pairs 100 --batch-sizes 16,32.")
    return _sizes("offline", rule, _many(profile), (16, 32), remedy)


def _edge(profile: Profile) -> Rule:
    rule = tr("Edge device, 1–5 documents: batch size 1–4")
    remedy = tr("Give --pairs 10 --batch-sizes 1,4.")
    found = _sizes("edge", rule, _few(profile), (1, 4), remedy)
    if found.state == "unknown":
        return found
    memory = [_memory(entry) for entry in _within(_few(profile), (1, 4))]
    measured_text = f"{found.found} {tr('Peak memory: {sizes}.', sizes=listed(memory))}"
    return Rule(found.name, found.rule, measured_text, found.state, found.result)


def _sizes(
    name: str, rule: str, entries: Sequence[Entry], range_: tuple[int, int], remedy: str
) -> Rule:
    """A rule that names batch sizes: how much slower each is than the best of all sizes."""
    best, inside = fastest(entries), _within(entries, range_)
    if best is None or not inside:
        return _unknown(name, rule, remedy)
    found = tr(
        "{pairs}: {step} is best, {latency}, {rate}.",
        pairs=wording.pairs(best["pairs"]),
        step=wording.step_of(best),
        latency=units.duration(best["latency_s"]["median"]),
        rate=wording.rate(best["pairs_per_s"]),
    )
    each = listed(_cost(entry, best) for entry in inside)
    measured_text = f"{found} {tr('Sizes of the rule: {each}.', each=each)}"
    return Rule(name, rule, measured_text, *_judged(max(slower(entry, best) for entry in inside)))


def _judged(cost: float) -> tuple[State, str]:
    if cost <= TIE:
        return "holds", tr("holds")
    return "costs", tr("up to {share} slower here", share=units.percent(cost))


def _cost(entry: Entry, best: Entry) -> str:
    cost = slower(entry, best)
    step = wording.step_of(entry)
    if entry is best:
        return tr("{step} is best", step=step)
    if cost <= 0:
        return tr("{step} is not slower", step=step)
    return tr("{step} is {share} slower", step=step, share=units.percent(cost))


def _memory(entry: Entry) -> str:
    step, size = wording.step_of(entry), units.size(entry["peak_bytes"])
    return tr("{size} with {step}", step=step, size=size)


def _unknown(name: str, rule: str, remedy: str) -> Rule:
    return Rule(name, rule, remedy, "unknown", tr("not measured"))


def _few(profile: Profile) -> list[Entry]:
    """The entries with the most pairs per call, up to FEW."""
    return _of(profile, max((n for n in _counts(profile) if n <= FEW), default=0))


def _many(profile: Profile) -> list[Entry]:
    """The entries with the most pairs per call, if at least MANY."""
    return _of(profile, max((n for n in _counts(profile) if n >= MANY), default=0))


def _counts(profile: Profile) -> set[int]:
    return {entry["pairs"] for entry in profile.points if wording.measured(entry)}


def _of(profile: Profile, pairs: int) -> list[Entry]:
    return [e for e in profile.points if wording.measured(e) and e["pairs"] == pairs]


def _batches(entries: Sequence[Entry]) -> list[Entry]:
    found = [entry for entry in entries if entry["batch_size"]]
    return sorted(found, key=lambda entry: int(entry["batch_size"]))


def _within(entries: Sequence[Entry], range_: tuple[int, int]) -> list[Entry]:
    return [e for e in _batches(entries) if range_[0] <= e["batch_size"] <= range_[1]]


# Other rules.


def _concurrent(profile: Profile) -> Rule:
    rule = tr("High concurrency: adaptive batching")
    found = profile.scenario
    if found is None or found["scenario"] not in SERVED or found["measured"] is None:
        remedy = tr("A sweep measures without load. Run echelon tune --scenario concurrent.")
        return _unknown("concurrent", rule, remedy)
    measured = found["measured"]
    p99 = measured["p99_s"]
    measured_text = tr(
        "Under load, the server with adaptive batching answered {rate} requests/s with a P99 of "
        "{p99}.",
        rate=units.number(measured["requests_per_s"]),
        p99=units.UNKNOWN if p99 is None else units.duration(p99),
    )
    if found["held"]:
        return Rule("concurrent", rule, measured_text, "holds", tr("holds: the goal is met"))
    return Rule("concurrent", rule, measured_text, "costs", tr("does not hold: the goal is missed"))


def _larger(profile: Profile) -> Rule:
    rule = tr("Larger batches are faster")
    pairs = max(_counts(profile), default=0)
    batches = _batches(_of(profile, pairs))
    best = fastest(batches)
    if best is None or len(batches) == 1:
        return _unknown("larger", rule, tr("Give --batch-sizes 1,2,4,8,16,32."))
    largest = batches[-1]
    measured_text = tr(
        "{pairs}: {rate} with {step}, {best_rate} with the best, {best}.",
        pairs=wording.pairs(pairs),
        rate=wording.rate(largest["pairs_per_s"]),
        step=wording.step_of(largest),
        best_rate=wording.rate(best["pairs_per_s"]),
        best=wording.step_of(best),
    )
    if largest is best:
        measured_text = tr(
            "{pairs}: the largest size measured, {step}, is best, {rate}.",
            pairs=wording.pairs(pairs),
            step=wording.step_of(best),
            rate=wording.rate(best["pairs_per_s"]),
        )
        return Rule(
            "larger", rule, measured_text, "holds", tr("holds up to the largest size measured")
        )
    if slower(largest, best) <= TIE:
        result = tr(
            "holds only up to {step}; larger sizes are not faster", step=wording.step_of(best)
        )
        return Rule("larger", rule, measured_text, "costs", result)
    share = units.percent(slower(largest, best))
    result = tr("does not hold: the largest size is {share} slower", share=share)
    return Rule("larger", rule, measured_text, "costs", result)


def _half(profile: Profile) -> Rule:
    rule = tr("bf16 or fp16 loses no ranking accuracy")
    rows = [row for row in profile.precisions if row["precision"] in HALF]
    if not rows:
        return _unknown(
            "half", rule, tr("Give --precision auto: it compares all precisions with fp32.")
        )
    parts = [tr("{what}: {found}", what=row["precision"], found=agreement(row)) for row in rows]
    measured_text = " ".join(tr("{sentence}.", sentence=part) for part in parts)
    failed = [row["precision"] for row in rows if not row["passed"]]
    if failed:
        result = tr("does not hold for {precisions} here", precisions=listed(failed))
        return Rule("half", rule, measured_text, "costs", result)
    return Rule(
        "half", rule, measured_text, "holds", tr("holds within the limits on rank agreement")
    )


def _watch(profile: Profile) -> Rule:
    rule = tr("Watch P99 and memory")
    measured = (profile.scenario or {}).get("measured") or {}
    p50, p99 = measured.get("p50_s"), measured.get("p99_s")
    parts = _peak(profile)
    if p50 and p99:
        parts.append(
            tr(
                "Under load, P99 is {p99}, {times} times the median.",
                p99=units.duration(p99),
                times=units.number(p99 / p50),
            )
        )
        return Rule("watch", rule, " ".join(parts), "holds", tr("measured under load"))
    parts.append(
        tr("P99 is measured under load: run echelon tune --scenario api, or echelon stress.")
    )
    return Rule("watch", rule, " ".join(parts), "unknown", tr("P99 is not measured"))


def _peak(profile: Profile) -> list[str]:
    """The chosen size's memory and the limit; nothing where either is not known."""
    point, limit = chosen(profile), limit_of(profile)
    if point is None or point["peak_bytes"] is None or limit is None:
        return []
    return [
        tr(
            "A step of the chosen size needs {size}, {share} of {limit} ({whose}).",
            size=units.size(point["peak_bytes"]),
            share=units.percent(point["peak_bytes"] / limit[0], 1),
            limit=units.size(round(limit[0])),
            whose=limit[1],
        )
    ]

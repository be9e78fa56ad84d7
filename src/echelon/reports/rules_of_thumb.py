"""Rules of thumb for batch sizes, each compared with what the profile measured.

The rules are those of common tutorials: 4 to 8 pairs a batch for a realtime API, 16 to 32 for
offline work, 1 to 4 on an edge device, adaptive batching under concurrency, larger is faster, half
precision loses no accuracy, watch P99 and memory.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from echelon.messages import N_, listed, tr, units
from echelon.reports import wording
from echelon.reports.model_charts import limit_of
from echelon.reports.profile_view import chosen, compared, fastest, slower
from echelon.reports.statistics import MIN_RUNS

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from echelon.profile import Profile
    from echelon.reports.wording import Entry

State = Literal["holds", "costs", "unknown"]

Finding = tuple[str, State, str]
"""The measurement as text, the state, and the result as text."""

EDGE, FEW, MANY = 5, 10, 50
"""Pairs per call: at most 5 on an edge device and 10 for a realtime API, at least 50 offline."""

HALF = ("bf16", "fp16")


@dataclass(frozen=True, slots=True)
class Rule:
    """A rule, what was measured on this machine, and the result; ``name`` is not translated."""

    name: str
    rule: str
    found: str
    state: State
    result: str


def rules_of_thumb(profile: Profile) -> list[Rule]:
    """Each rule, compared with this machine."""
    return [Rule(name, tr(rule), *compare(profile)) for name, (rule, compare) in RULES.items()]


# Batch sizes.


def _api(profile: Profile) -> Finding:
    remedy = tr("Give --pairs 10 --batch-sizes 4,8.")
    return _sizes(profile, _largest_calls(profile, high=FEW), (4, 8), remedy)


def _offline(profile: Profile) -> Finding:
    remedy = tr("Give --pairs 100 --batch-sizes 16,32.")
    return _sizes(profile, _largest_calls(profile, low=MANY), (16, 32), remedy)


def _edge(profile: Profile) -> Finding:
    entries, remedy = _largest_calls(profile, high=EDGE), tr("Give --pairs 5 --batch-sizes 1,4.")
    found, state, result = _sizes(profile, entries, (1, 4), remedy)
    if _batches(entries, 1, 4):
        memory = listed(_memory(entry) for entry in _batches(entries, 1, 4))
        found = f"{found} {tr('Peak memory: {sizes}.', sizes=memory)}"
    return found, state, result


def _sizes(
    profile: Profile, entries: Sequence[Entry], range_: tuple[int, int], remedy: str
) -> Finding:
    """How much slower each batch size of a rule is than the best of all sizes.

    The rule holds where no size is surely slower than any other one, and none may be.
    """
    best, inside = fastest(entries), _batches(entries, *range_)
    if best is None or not inside:
        return _unknown(remedy)
    found = tr(
        "{pairs}: {step} is best, {latency}, {rate}.",
        pairs=wording.pairs(best["pairs"]),
        step=wording.step_of(best),
        latency=units.duration(best["latency_s"]["median"]),
        rate=wording.rate(best["pairs_per_s"]),
    )
    each = listed(_cost(entry, best) for entry in inside)
    found = f"{found} {tr('Sizes of the rule: {each}.', each=each)}"
    worse = [entry for entry in inside if compared(entry, best) == "worse"]
    if worse:
        cost = max(slower(entry, best) for entry in worse)
        return found, "costs", tr("up to {share} slower here", share=units.percent(cost))
    pairs = [(one, other) for one in inside for other in entries if one is not other]
    unsure = [pair for pair in pairs if compared(*pair) == "unknown"]
    if unsure:
        return found, "unknown", _not_known(profile, [e for pair in unsure for e in pair])
    return found, "holds", tr("holds")


def _not_known(profile: Profile, entries: Sequence[Entry]) -> str:
    """Why a comparison says nothing, and what it takes to know."""
    runs, longer = min(entry["samples"] for entry in entries), wording.longer(profile)
    if runs < MIN_RUNS:
        return tr("not known: n={runs}; run with {longer}", runs=runs, longer=longer)
    return tr("not known: the intervals overlap; run with {longer}", longer=longer)


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


def _unknown(remedy: str) -> Finding:
    return remedy, "unknown", tr("not measured")


def _largest_calls(profile: Profile, low: int = 0, high: float = math.inf) -> list[Entry]:
    """The measured entries with the most pairs per call between two limits."""
    known = [e for e in profile.points if wording.measured(e) and low <= e["pairs"] <= high]
    pairs = max((entry["pairs"] for entry in known), default=0)
    return [entry for entry in known if entry["pairs"] == pairs]


def _batches(entries: Sequence[Entry], low: int = 1, high: float = math.inf) -> list[Entry]:
    """The entries with a batch size between two limits, in its order."""
    found = [e for e in entries if e["batch_size"] and low <= e["batch_size"] <= high]
    return sorted(found, key=lambda entry: int(entry["batch_size"]))


# Other rules.


def _concurrent(profile: Profile) -> Finding:
    scenario = profile.scenario or {}
    measured = scenario.get("measured")
    if measured is None or scenario["scenario"] not in wording.SERVED:
        remedy = tr("A sweep measures without load. Run echelon tune --scenario concurrent.")
        return _unknown(remedy)
    found = tr(
        "Under load, the server with adaptive batching answered {rate} requests/s with a P99 of "
        "{p99}.",
        rate=units.number(measured["requests_per_s"]),
        p99=wording.value("p99_s", measured["p99_s"]),
    )
    if scenario["held"]:
        return found, "holds", tr("holds: the goal is met")
    return found, "costs", tr("does not hold: the goal is missed")


def _larger(profile: Profile) -> Finding:
    batches = _batches(_largest_calls(profile))
    best = fastest(batches)
    if best is None or len(batches) == 1:
        return _unknown(tr("Give --batch-sizes 1,2,4,8,16,32."))
    largest = batches[-1]
    values = {"pairs": wording.pairs(largest["pairs"]), "step": wording.step_of(largest)}
    values["rate"] = wording.rate(largest["pairs_per_s"])
    if largest is best:
        found = tr("{pairs}: the largest size measured, {step}, is best, {rate}.", **values)
        unsure = [e for e in batches if e is not best and compared(best, e) == "unknown"]
        if unsure:
            return found, "unknown", _not_known(profile, [*unsure, best])
        return found, "holds", tr("holds up to the largest size measured")
    values |= {"best": wording.step_of(best), "best_rate": wording.rate(best["pairs_per_s"])}
    found = tr("{pairs}: {rate} with {step}, {best_rate} with the best, {best}.", **values)
    if compared(largest, best) == "unknown":
        return found, "unknown", _not_known(profile, [largest, best])
    if compared(largest, best) != "worse":
        step = values["best"]
        result = tr("holds only up to {step}; larger sizes are not faster", step=step)
    else:
        share = units.percent(slower(largest, best))
        result = tr("does not hold: the largest size is {share} slower", share=share)
    return found, "costs", result


def _half(profile: Profile) -> Finding:
    rows = [row for row in profile.precisions if row["precision"] in HALF]
    if not rows:
        return _unknown(tr("Give --precision auto: it compares all precisions with fp32."))
    parts = [tr("{what}: {found}", what=r["precision"], found=wording.agreement(r)) for r in rows]
    found = " ".join(tr("{sentence}.", sentence=part) for part in parts)
    failed = [row["precision"] for row in rows if not row["passed"]]
    if failed:
        result = tr("does not hold for {precisions} here", precisions=listed(failed))
        return found, "costs", result
    return found, "holds", tr("holds within the limits on rank agreement")


def _watch(profile: Profile) -> Finding:
    measured = (profile.scenario or {}).get("measured") or {}
    p50, p99 = measured.get("p50_s"), measured.get("p99_s")
    parts = _peak(profile)
    if p50 and p99:
        shown = {"p99": units.duration(p99), "times": units.number(p99 / p50)}
        parts.append(tr("Under load, P99 is {p99}, {times} times the median.", **shown))
        return " ".join(parts), "holds", tr("measured under load")
    remedy = tr("P99 is measured under load: run echelon tune --scenario api, or echelon stress.")
    return " ".join([*parts, remedy]), "unknown", tr("P99 is not measured")


def _peak(profile: Profile) -> list[str]:
    """The chosen size's memory and the limit; nothing where either is not known."""
    point, limit = chosen(profile), limit_of(profile)
    if point is None or point["peak_bytes"] is None or limit is None:
        return []
    shown = {"size": units.size(point["peak_bytes"]), "limit": units.size(round(limit[0]))}
    shown |= {"share": units.percent(point["peak_bytes"] / limit[0], 1), "whose": limit[1]}
    return [tr("A step of the chosen size needs {size}, {share} of {limit} ({whose}).", **shown)]


RULES: dict[str, tuple[str, Callable[[Profile], Finding]]] = {
    "api": (N_("Realtime API, 1–10 documents: batch size 4–8"), _api),
    "offline": (N_("Offline, 50–200 documents: batch size 16–32"), _offline),
    "edge": (N_("Edge device, 1–5 documents: batch size 1–4"), _edge),
    "concurrent": (N_("High concurrency: adaptive batching"), _concurrent),
    "larger": (N_("Larger batches are faster"), _larger),
    "half": (N_("bf16 or fp16 loses no ranking accuracy"), _half),
    "watch": (N_("Watch P99 and memory"), _watch),
}
"""Each rule's name, text, and the function that compares it with a profile."""

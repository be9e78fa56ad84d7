"""Two profiles side by side as plain data, which docs/REPORT.md describes, and as sentences."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from echelon.messages import N_, tr, translated, units
from echelon.reports import wording
from echelon.reports.statistics import CONFIDENCE, TIE, KnownValue, Ratio
from echelon.scheduling.cost_model import work_of
from echelon.scheduling.fit import STORED_PADDING
from echelon.scheduling.packing import NO_BUDGET

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from echelon.reports.profile_view import ProfileView
    from echelon.scheduling.fit import CostFit, MemoryFit

Row = dict[str, Any]

SCHEMA = 1
"""Version of the JSON layout, see docs/REPORT.md."""

STEPS = ((1, 128), (8, 128), (32, 128), (8, 512))
"""Pairs, and tokens of each pair, of the steps whose predictions are compared."""

KEY = ("model", "revision", "device", "device_name", "precision")

MACHINE = ("cpu", "usable_cpus", "memory_bytes", "system", "python")
"""Compared parts of the machine's description; the device names the GPU."""


def compare(a: ProfileView, b: ProfileView) -> Row:
    """Compare two profiles; the result is plain data.

    A ratio is B divided by A. Times of different models or texts have no ratios: they would not
    show which machine is faster.
    """
    obstacles = [] if _same_model(a, b) else [N_("the models differ")]
    if not _same_texts(a, b):
        obstacles.append(N_("the scored texts differ"))
    times = not obstacles
    found = {
        "schema": SCHEMA,
        "kind": "comparison",
        "a": _about(a),
        "b": _about(b),
        "comparable": {"times": times, "model": _same_model(a, b), "obstacles": obstacles},
        "keys": _values(_key_values(a), _key_values(b)),
        "settings": _values(_setting_values(a), _setting_values(b)),
        "chosen": _numbers(a.chosen(), b.chosen(), times=times),
        "best": _numbers(a.best, b.best, times=times),
        "points": _numbers(a.points, b.points, times=times),
        "precisions": _precisions(a, b, times=times),
        "cost": _cost(a, b),
        "memory": _memory(a, b),
    }
    return found | {"verdict": headline(found), "notes": notes(found)}


# Compared values.


def _same_model(a: ProfileView, b: ProfileView) -> bool:
    """Whether the names or the files are the same."""
    one, other = a.profile.key, b.profile.key
    return one.model == other.model or one.revision == other.revision


def _same_texts(a: ProfileView, b: ProfileView) -> bool:
    """Whether calls of the same number of pairs have the same number of tokens.

    The names of the files decide only where no such call exists: they differ between machines.
    """
    one, other = a.tokens(), b.tokens()
    shared = one.keys() & other.keys()
    if shared:
        return all(one[pairs] == other[pairs] for pairs in shared)
    texts = [(p.data.get("name"), p.data.get("pairs")) for p in (a.profile, b.profile)]
    lengths = [view.profile.settings.max_length for view in (a, b)]
    return texts[0] == texts[1] and lengths[0] == lengths[1]


def _about(view: ProfileView) -> Row:
    profile = view.profile
    return {
        "file": view.file,
        "key": asdict(profile.key),
        "created": profile.created,
        "learned_token_budget": profile.learned_token_budget,
        "warnings": profile.warnings,
    }


def _values(a: Row, b: Row) -> list[Row]:
    rows = [{"name": name, "a": a.get(name), "b": b.get(name)} for name in {**a, **b}]
    return [row | {"differs": row["a"] != row["b"]} for row in rows]


def _key_values(view: ProfileView) -> Row:
    profile, key = view.profile, view.profile.key
    lengths = profile.data.get("tokens") or {}
    return {
        **{name: getattr(key, name) for name in KEY},
        **{f"versions.{name}": version for name, version in key.versions.items()},
        **{f"machine.{name}": profile.machine.get(name) for name in MACHINE},
        **{f"data.{name}": profile.data.get(name) for name in ("name", "pairs")},
        **{f"data.tokens.{name}": lengths.get(name) for name in ("mean", "max")},
    }


def _setting_values(view: ProfileView) -> Row:
    found = asdict(view.profile.settings)
    if found["token_budget"] == NO_BUDGET:
        found["token_budget"] = None
    return found | {"learned_token_budget": view.profile.learned_token_budget}


def _numbers(a: Mapping[Any, Row], b: Mapping[Any, Row], *, times: bool) -> list[Row]:
    places = sorted({**a, **b}, key=repr)
    return sorted((_number(a.get(p), b.get(p), times=times) for p in places), key=_order)


def _order(row: Row) -> tuple[int, bool, int, int]:
    """By pairs, batch sizes before token budgets."""
    number = row["a"] or row["b"]
    batch_size, budget = number["batch_size"] or 0, number["token_budget"] or 0
    return row["pairs"], not batch_size, batch_size, budget


def _number(a: Row | None, b: Row | None, *, times: bool) -> Row:
    pairs = (a or b or {}).get("pairs", 0)
    found: Row = {"pairs": pairs, "a": a, "b": b, "latency": None, "throughput": None}
    if times and a and b and a["latency_s"] and b["latency_s"]:
        # Two runs at two times: not even the machine's own pace is common to them.
        one, other = (
            KnownValue(n["latency_s"], n["low_s"], n["high_s"]).at_any_time for n in (a, b)
        )
        latency = Ratio.of(one, other)
        # A tie of medians whose certainty nobody knows is no tie.
        unsure = {"judgement": "unknown"} if latency.low is None else {}
        found["latency"] = latency.as_dict() | unsure
        found["throughput"] = latency.inverse.as_dict() | unsure
    return found


def _ratio(a: float | None, b: float | None) -> Row | None:
    """The ratio of two numbers without intervals; None unless both are above 0."""
    return Ratio.of(KnownValue(a), KnownValue(b)).as_dict() if a and b else None


def _precisions(a: ProfileView, b: ProfileView, *, times: bool) -> list[Row]:
    rows = []
    for name in {**a.precisions, **b.precisions}:
        one, other = a.precisions.get(name), b.precisions.get(name)
        speed = _ratio(one["tokens_per_s"], other["tokens_per_s"]) if one and other else None
        rows.append({"precision": name, "a": one, "b": other, "speed": speed if times else None})
    return rows


# Fitted models hold for texts of any length, so only the reranker must be the same.


def _cost(a: ProfileView, b: ProfileView) -> Row:
    def seconds(view: ProfileView, lengths: list[int]) -> float | None:
        fit = view.cost
        return None if fit is None else fit.coefficients.seconds(work_of(lengths, fit.padding))

    rows = _steps(a, b, "s", "time", seconds, ratios=_same_model(a, b))
    costs = {"a": _cost_values(a.cost), "b": _cost_values(b.cost)}
    return costs | {"steps": rows if a.cost or b.cost else []}


def _cost_values(fit: CostFit | None) -> Row | None:
    if fit is None:
        return None
    padding = {"paid": STORED_PADDING[fit.padding]}
    return asdict(fit.coefficients) | padding | _errors(fit) | {"spread": fit.spread}


def _memory(a: ProfileView, b: ProfileView) -> Row:
    """Memory of processes or of GPUs; one is not compared with the other."""

    def peak(view: ProfileView, lengths: list[int]) -> float | None:
        fit = view.memory
        return None if fit is None else fit.model.peak_bytes(work_of(lengths, "none"))

    same = _same_model(a, b) and a.kind == b.kind
    rows = _steps(a, b, "bytes", "size", peak, ratios=same)
    models = {"a": a.memory, "b": b.memory}
    found = {name: fit and asdict(fit.model) | _errors(fit) for name, fit in models.items()}
    return found | {"of": [a.kind, b.kind], "steps": rows if a.memory or b.memory else []}


def _errors(fit: CostFit | MemoryFit) -> Row:
    return {"error_median": fit.error.median, "error_p90": fit.error.p90}


def _steps(
    a: ProfileView,
    b: ProfileView,
    unit: str,
    quantity: str,
    predict: Callable[[ProfileView, list[int]], float | None],
    *,
    ratios: bool,
) -> list[Row]:
    """Both predictions for each of STEPS, and the ratio under the quantity's name."""
    rows = []
    for pairs, tokens in STEPS:
        one, other = (predict(view, [tokens] * pairs) for view in (a, b))
        ratio = _ratio(one, other) if ratios else None
        values = {f"a_{unit}": one, f"b_{unit}": other, quantity: ratio}
        rows.append({"pairs": pairs, "tokens": tokens} | values)
    return rows


# Sentences.


def headline(found: Row) -> str:
    """Which profile is faster, by how much, and whether that exceeds the variation."""
    if not found["comparable"]["times"]:
        why = tr(" and ").join(map(tr, found["comparable"]["obstacles"]))
        return tr(
            "Speed cannot be compared: {why}. Both profiles are shown side by side, without "
            "speed ratios.",
            why=why,
        )
    how = {
        "chosen": N_("each with its chosen setting"),
        "best": N_("each with its best batch size"),
    }
    for name, sentence in how.items():
        shared = [row for row in found[name] if row["latency"]]
        if shared:
            return _faster(shared[-1], tr(sentence))
    return tr(
        "Speed cannot be compared: no number of pairs was measured on both. Run echelon tune "
        "with the same --pairs on both."
    )


def _faster(row: Row, how: str) -> str:
    """One sentence on the fastest call of each, one on the certainty of the difference."""
    a, b = (units.duration(row[side]["latency_s"]) for side in "ab")
    ratio, values = row["throughput"], {"pairs": wording.pairs(row["pairs"]), "how": how}
    if ratio["judgement"] == "tie":
        values |= {"a": a, "b": b, "tie": units.percent(TIE)}
        return tr(
            "A tie: {pairs} take {a} on A and {b} on B, {how}; medians within {tie} are a tie.",
            **values,
        )
    if ratio["value"] > 1:
        values |= {"first": "B", "quick": b, "last": "A", "slow": a}
    else:
        values |= {"first": "A", "quick": a, "last": "B", "slow": b}
        turned = Ratio(ratio["value"], ratio["low"], ratio["high"]).inverse
        ratio = turned.as_dict() | {"judgement": ratio["judgement"]}
    faster = tr(
        "{first} is {times} times as fast as {last}: {pairs} take {quick} on {first} and {slow} "
        "on {last}, {how}.",
        times=units.number(ratio["value"]),
        **values,
    )
    return f"{faster} {_certainty(ratio)}"


def _certainty(ratio: Row) -> str:
    if ratio["judgement"] == "unknown":
        return tr(
            "There are too few runs to compare this with the variation between runs. Measure both "
            "again with a longer --time-limit."
        )
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


def notes(found: Row) -> list[str]:
    """What to know before using the comparison."""
    keys = {row["name"]: row for row in found["keys"]}
    shown = []
    if found["comparable"]["model"]:
        if keys["model"]["differs"]:
            shown.append(tr("The model names differ, but the files are the same: it is one model."))
        elif keys["revision"]["differs"]:
            shown.append(tr("The two profiles have different revisions of the model."))
    if keys["precision"]["differs"]:
        note = N_(
            "The chosen precisions differ, which explains part of a difference in speed; "
            "the table of precisions compares each precision with itself."
        )
        shown.append(tr(note))
    if len(set(found["memory"]["of"])) > 1:
        shown.append(tr("The memory of a process is not compared with the memory of a GPU."))
    for name, profile in (("A", found["a"]), ("B", found["b"])):
        warnings = map(translated, profile["warnings"])
        shown += [tr("{what}: {found}", what=name, found=text) for text in warnings]
        if profile["learned_token_budget"] is not None:
            note = tr(
                "{side}: memory ran out after tuning, so a step now has at most {tokens} "
                "tokens; the times shown were measured before.",
                side=name,
                tokens=f"{profile['learned_token_budget']:,}",
            )
            shown.append(note)
    return shown

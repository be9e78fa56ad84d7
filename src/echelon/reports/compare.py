"""Two profiles side by side as plain data; docs/REPORT.md describes it."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from echelon.messages import N_
from echelon.reports.ratio import KnownValue, Ratio, headline, notes
from echelon.scheduling.cost_model import work_of
from echelon.scheduling.fit import STORED_PADDING
from echelon.scheduling.packing import NO_BUDGET

if TYPE_CHECKING:
    from collections.abc import Mapping

    from echelon.reports.profile_view import Number, ProfileView
    from echelon.scheduling.fit import CostFit, MemoryFit

Row = dict[str, Any]

SCHEMA = 1
"""Version of the JSON layout, see docs/REPORT.md."""

STEPS = ((1, 128), (8, 128), (32, 128), (8, 512))
"""Pairs, and tokens of each pair, of the steps whose predictions are compared."""

MACHINE = ("cpu", "usable_cpus", "memory_bytes", "system", "python")
"""Compared parts of the machine's description; the device names the GPU."""

LENGTHS = ("mean", "max")


def compare(a: ProfileView, b: ProfileView) -> Row:
    """Compare two profiles.

    A ratio is B divided by A. Times of different models or texts have no ratios: they would not
    show which machine is faster.

    Returns:
        Plain data.
    """
    obstacles = _obstacles(a, b)
    times = not obstacles
    found = {
        "schema": SCHEMA,
        "kind": "comparison",
        "a": _about(a),
        "b": _about(b),
        "comparable": {"times": times, "model": _same_model(a, b), "obstacles": obstacles},
        "keys": _keys(a, b),
        "settings": _settings(a, b),
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
    return _texts(a) == _texts(b)


def _texts(view: ProfileView) -> tuple[Any, Any, Any]:
    data, settings = view.profile.data, view.profile.settings
    return data.get("name"), data.get("pairs"), settings.max_length


def _obstacles(a: ProfileView, b: ProfileView) -> list[str]:
    found = [] if _same_model(a, b) else [N_("the models differ")]
    if not _same_texts(a, b):
        found.append(N_("the scored texts differ"))
    return found


def _about(view: ProfileView) -> Row:
    profile = view.profile
    return {
        "file": view.file,
        "key": asdict(profile.key),
        "created": profile.created,
        "learned_token_budget": profile.learned_token_budget,
        "warnings": profile.warnings,
    }


def _keys(a: ProfileView, b: ProfileView) -> list[Row]:
    one, other = _key_values(a), _key_values(b)
    return [_values(name, one.get(name), other.get(name)) for name in {**one, **other}]


def _key_values(view: ProfileView) -> Row:
    profile, key = view.profile, view.profile.key
    found = {
        n: getattr(key, n) for n in ("model", "revision", "device", "device_name", "precision")
    }
    found |= {f"versions.{name}": version for name, version in key.versions.items()}
    found |= {f"machine.{name}": profile.machine.get(name) for name in MACHINE}
    found |= {f"data.{name}": profile.data.get(name) for name in ("name", "pairs")}
    lengths = profile.data.get("tokens") or {}
    return found | {f"data.tokens.{name}": lengths.get(name) for name in LENGTHS}


def _settings(a: ProfileView, b: ProfileView) -> list[Row]:
    one, other = _setting_values(a), _setting_values(b)
    return [_values(name, one[name], other[name]) for name in one]


def _setting_values(view: ProfileView) -> Row:
    found = asdict(view.profile.settings)
    if found["token_budget"] == NO_BUDGET:
        found["token_budget"] = None
    return found | {"learned_token_budget": view.profile.learned_token_budget}


def _values(name: str, a: Any, b: Any) -> Row:
    return {"name": name, "a": a, "b": b, "differs": a != b}


# Ratios.


def _ratio(a: KnownValue | None, b: KnownValue | None) -> Ratio | None:
    return None if a is None or b is None else Ratio.of(a, b)


def _plain(ratio: Ratio | None) -> Row | None:
    return None if ratio is None else ratio.as_dict()


def _known(value: float | None) -> KnownValue | None:
    return KnownValue(value) if value else None


def _plain_ratio(a: float | None, b: float | None) -> Row | None:
    """The ratio of two numbers without intervals; None unless both are above 0."""
    return _plain(_ratio(_known(a), _known(b)))


def _numbers(a: Mapping[Any, Number], b: Mapping[Any, Number], *, times: bool) -> list[Row]:
    places = sorted({**a, **b}, key=repr)
    return sorted((_number(a.get(p), b.get(p), times=times) for p in places), key=_order)


def _order(row: Row) -> tuple[int, bool, int, int]:
    """By pairs, batch sizes before token budgets."""
    number = row["a"] or row["b"]
    batch_size, budget = number["batch_size"] or 0, number["token_budget"] or 0
    return row["pairs"], not batch_size, batch_size, budget


def _number(a: Number | None, b: Number | None, *, times: bool) -> Row:
    latency = _ratio(a.latency, b.latency) if times and a and b else None
    either = a or b
    return {
        "pairs": either.pairs if either else 0,
        "a": None if a is None else a.as_dict(),
        "b": None if b is None else b.as_dict(),
        "latency": _plain(latency),
        "throughput": _plain(None if latency is None else latency.inverse),
    }


def _precisions(a: ProfileView, b: ProfileView, *, times: bool) -> list[Row]:
    rows = []
    for name in {**a.precisions, **b.precisions}:
        one, other = a.precisions.get(name), b.precisions.get(name)
        speed = _plain_ratio(one["tokens_per_s"], other["tokens_per_s"]) if one and other else None
        rows.append({"precision": name, "a": one, "b": other, "speed": speed if times else None})
    return rows


# Fitted models hold for texts of any length, so only the reranker must be the same.


def _cost(a: ProfileView, b: ProfileView) -> Row:
    costs = [_cost_values(view.cost) for view in (a, b)]
    rows = [_step(a, b, pairs, tokens) for pairs, tokens in STEPS]
    return {"a": costs[0], "b": costs[1], "steps": rows if a.cost or b.cost else []}


def _cost_values(fit: CostFit | None) -> Row | None:
    if fit is None:
        return None
    error = {"error_median": fit.error.median, "error_p90": fit.error.p90}
    worth = {"paid": STORED_PADDING[fit.padding]} | error | {"spread": fit.spread}
    return asdict(fit.coefficients) | worth


def _step(a: ProfileView, b: ProfileView, pairs: int, tokens: int) -> Row:
    one, other = (_seconds(view.cost, pairs, tokens) for view in (a, b))
    ratio = _plain_ratio(one, other) if _same_model(a, b) else None
    return {"pairs": pairs, "tokens": tokens, "a_s": one, "b_s": other, "time": ratio}


def _seconds(fit: CostFit | None, pairs: int, tokens: int) -> float | None:
    if fit is None:
        return None
    return float(fit.coefficients.seconds(work_of([tokens] * pairs, fit.padding)))


def _memory(a: ProfileView, b: ProfileView) -> Row:
    """Memory of processes or of GPUs; one is not compared with the other."""
    ratios = _same_model(a, b) and a.kind == b.kind
    rows = []
    for pairs, tokens in STEPS:
        one, other = (_peak(view.memory, pairs, tokens) for view in (a, b))
        ratio = _plain_ratio(one, other) if ratios else None
        step = {"pairs": pairs, "tokens": tokens}
        rows.append(step | {"a_bytes": one, "b_bytes": other, "size": ratio})
    found = {"a": _memory_values(a.memory), "b": _memory_values(b.memory)}
    return found | {"of": [a.kind, b.kind], "steps": rows if a.memory or b.memory else []}


def _memory_values(fit: MemoryFit | None) -> Row | None:
    if fit is None:
        return None
    error = {"error_median": fit.error.median, "error_p90": fit.error.p90}
    return asdict(fit.model) | error


def _peak(fit: MemoryFit | None, pairs: int, tokens: int) -> float | None:
    if fit is None:
        return None
    return float(fit.model.peak_bytes(work_of([tokens] * pairs, "none")))

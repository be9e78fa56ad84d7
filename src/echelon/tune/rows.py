"""The report's tables as rows of words. Pure."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from echelon.engine.precision_check import LEAST_OVERLAP, LEAST_TAU, MOST_NDCG_LOSS
from echelon.tune import words
from echelon.tune.entries import find
from echelon.tune.lang import listed, mark, told, tr
from echelon.tuning.choose import ENOUGH, TIE

if TYPE_CHECKING:
    from echelon.profile import Profile
    from echelon.tune.words import Entry

NO_POINT = mark("No point was measured. Raise --time-limit.")

SITUATIONS = {
    "api": (
        mark("Realtime API"),
        mark("1–10 documents"),
        mark("The shortest call of {pairs} pairs; of sizes within {tie}, the smallest."),
        NO_POINT,
    ),
    "offline": (
        mark("Offline reranking"),
        mark("50–200 documents"),
        mark("The most pairs a second, measured with {pairs}."),
        NO_POINT,
    ),
    "edge": (
        mark("Small edge machine"),
        mark("1–5 documents"),
        mark("The smallest step that keeps {enough} of the speed: it needs the least memory."),
        NO_POINT,
    ),
    "concurrent": (
        mark("High concurrency"),
        mark("requests of any size"),
        mark(
            "Requests differ in length: a limit in tokens bounds a step's time, one in pairs "
            "does not. The smallest that keeps {enough} of the speed."
        ),
        mark("No token budget was measured. Give --token-budgets."),
    ),
}
"""Per situation: its name, what it ranks, why its setting, and what to do without one."""


def situation(profile: Profile, name: str, profile_path: str) -> dict[str, str]:
    """Advice for one of the four situations; ``why`` names the remedy where there is none."""
    title, documents, why, remedy = SITUATIONS[name]
    row = {"title": tr(title), "documents": tr(documents)}
    advice = next((s for s in profile.situations if s["name"] == name), None)
    if advice is None:
        return row | {"setting": "", "why": tr(remedy)}
    point = find(profile, advice["batch_size"], advice["token_budget"], advice["pairs"])
    return row | {
        "setting": words.step_of(advice),
        "python": words.python(profile.key.model, profile_path, advice),
        "shell": words.shell(profile.key.model, profile_path, advice),
        "latency": words.duration(advice["latency_s"]),
        "of": listed([words.pairs(advice["pairs"]), *([words.spread(point)] if point else [])]),
        "rate": words.number(advice["pairs_per_s"]),
        "memory": words.size(advice["peak_bytes"]),
        "why": tr(why, pairs=advice["pairs"], tie=words.percent(TIE), enough=words.percent(ENOUGH)),
    }


def best_rows(profile: Profile) -> list[list[str]]:
    """The summary table; a number of pairs without a measured point keeps its row."""
    best = {entry["pairs"]: entry for entry in profile.best}
    counts = sorted({*best, *(e["pairs"] for e in profile.points if e["batch_size"])})
    return [_best_row(count, best.get(count)) for count in counts]


def _best_row(count: int, entry: Entry | None) -> list[str]:
    if entry is None:
        return [str(count), tr("not measured"), words.UNKNOWN, words.UNKNOWN]
    rate = words.number(entry["pairs_per_s"])
    return [str(count), str(entry["batch_size"]), words.latency(entry), rate]


def precision_rows(profile: Profile) -> list[dict[str, Any]]:
    """Speed and agreement of each precision."""
    fastest = max((row["tokens_per_s"] for row in profile.precisions), default=1.0)
    return [
        {
            "name": words.precision(row),
            "rate": words.number(row["tokens_per_s"]),
            "share": f"{100 * row['tokens_per_s'] / fastest:.0f}%",
            "tau": f"{row['tau']:.4f}",
            "overlap": words.percent(row["overlap"], 1),
            "delta": words.number(row["max_delta"]),
            "loss": words.UNKNOWN if row["ndcg_loss"] is None else _signed(row["ndcg_loss"]),
            "queries": row["queries"],
            "passed": row["passed"],
            "chosen": row["precision"] == profile.settings.precision,
        }
        for row in profile.precisions
    ]


def _signed(loss: float) -> str:
    return f"{loss:.4f}".replace("-", "−")


def agreement_needed() -> str:
    """What a precision must reach to serve."""
    return tr(
        "τ at least {tau}, top-10 overlap at least {overlap}, nDCG@10 loss at most {loss}",
        tau=LEAST_TAU,
        overlap=words.percent(LEAST_OVERLAP),
        loss=MOST_NDCG_LOSS,
    )


def warnings(profile: Profile) -> list[str]:
    """What to know before trusting the numbers."""
    found = [told(str(warning)) for warning in profile.warnings]
    learned = profile.learned_token_budget
    if learned is None:
        return found
    note = tr(
        "Memory ran short after tuning, so steps now hold at most {tokens} tokens. "
        "Free memory and run `echelon tune` again to get the measured speed back.",
        tokens=f"{learned:,}",
    )
    return [*found, note]


def point_row(entry: Entry) -> dict[str, Any]:
    """A measured size, or why there is no number."""
    row = {
        "pairs": entry["pairs"],
        "step": words.step_of(entry).removesuffix(" a step"),
        "status": words.missing(entry["status"]),
        "reason": told(str(entry["reason"])) if entry["reason"] else tr("no number"),
    }
    return row | {"numbers": _numbers(entry) if words.measured(entry) else []}


def _numbers(entry: Entry) -> list[str]:
    """The columns from the median on."""
    return [
        words.duration(entry["latency_s"]["median"]),
        words.interval(entry),
        words.percentile(entry, "p95"),
        words.percentile(entry, "p99"),
        str(entry["samples"]),
        words.number(entry["pairs_per_s"]),
        words.number(entry["tokens_per_s"]),
        words.percent(entry["padding_share"], 1),
        f"{entry['steps']:,}",
        words.size(entry["peak_bytes"]),
    ]

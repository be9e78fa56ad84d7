"""The tuning report: a profile as one HTML page that needs nothing else, not even a network."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

from echelon.plan.pack import NO_BUDGET
from echelon.tune import card, words
from echelon.tune.curve_plots import curve_chart
from echelon.tune.model_plots import model_charts
from echelon.tune.page import fill
from echelon.tune.plots import charts
from echelon.tune.profile import write_text
from echelon.tune.quality import LEAST_OVERLAP, LEAST_TAU, MOST_NDCG_LOSS
from echelon.tune.solve import ENOUGH, TIE
from echelon.tune.stats import CONFIDENCE

if TYPE_CHECKING:
    import os

    from echelon.tune.profile import Profile
    from echelon.tune.words import Entry

PROFILE_NAME = "echelon-profile.json"
"""Where `echelon tune` writes the profile unless told otherwise."""

SIZES = {"--pairs": "pairs", "--batch-sizes": "batch_size", "--token-budgets": "token_budget"}
"""Which entry of a point each option of `echelon tune` fills."""

NO_POINT = "No point was measured. Raise --time-limit."

SITUATIONS = {
    "api": (
        "Realtime API",
        "1–10 documents",
        "The shortest call of {pairs} pairs; of sizes within {tie}, the smallest.",
        NO_POINT,
    ),
    "offline": (
        "Offline reranking",
        "50–200 documents",
        "The most pairs a second, measured with {pairs}.",
        NO_POINT,
    ),
    "edge": (
        "Small edge machine",
        "1–5 documents",
        "The smallest step that keeps {enough} of the speed: it needs the least memory.",
        NO_POINT,
    ),
    "concurrent": (
        "High concurrency",
        "requests of any size",
        (
            "Requests differ in length: a limit in tokens bounds a step's time, one in pairs "
            "does not. The smallest that keeps {enough} of the speed."
        ),
        "No token budget was measured. Give --token-budgets.",
    ),
}
"""Per situation: its name, what it ranks, why its setting, and what to do without one."""


def write_report(
    profile: Profile,
    path: str | os.PathLike[str],
    *,
    profile_path: str | os.PathLike[str] = PROFILE_NAME,
) -> None:
    """Write the report whole or not at all.

    Args:
        profile: what tuning found.
        path: the HTML file.
        profile_path: where the profile itself was written; the examples name it.

    Raises:
        StorageError: the disk is full or the folder cannot be written.
    """
    write_text(Path(path), render(profile, profile_path=profile_path))


def render(profile: Profile, *, profile_path: str | os.PathLike[str] = PROFILE_NAME) -> str:
    """The report as HTML; arguments as in :func:`write_report`."""
    return fill("echelon.tune", "report.html.j2", _content(profile, str(profile_path)))


def _content(profile: Profile, profile_path: str) -> dict[str, Any]:
    """What the template shows, in words."""
    drawn = [*charts(profile), *model_charts(profile)]
    curve = curve_chart(profile)
    figures = [*drawn, *([] if curve is None else [curve])]
    return {
        "model": profile.key.model,
        "card": card.card(profile),
        "card_type": card.command(profile, profile_path),
        "verdict": _verdict(profile),
        "tiles": _tiles(profile),
        "situations": [_situation(profile, name, profile_path) for name in SITUATIONS],
        "best": _best_rows(profile),
        "charts": drawn,
        "curve": curve,
        "figures": {chart.name: chart.figure for chart in figures},
        "precisions": _precision_rows(profile),
        "needed": _agreement_needed(),
        "warnings": _warnings(profile),
        "gaps": not all(words.measured(entry) for entry in profile.points),
        "points": [_point_row(entry) for entry in profile.points],
        "facts": _facts(profile),
        "python": _snippet(profile, profile_path),
        "shell": words.shell(profile.key.model, profile_path),
        "repeat": _repeat(profile),
        "tie": words.percent(TIE),
        "confidence": words.percent(CONFIDENCE),
        "runs_for": words.RUNS_FOR,
        "memory_of": _memory_of(profile),
    }


# What was chosen.


def _chosen(profile: Profile) -> Entry | None:
    """The measured point of the chosen setting, with the most pairs."""
    settings = profile.settings
    budget = None if settings.token_budget == NO_BUDGET else settings.token_budget
    return _find(profile, settings.batch_size, budget)


def _find(
    profile: Profile, batch_size: int | None, token_budget: int | None, pairs: int | None = None
) -> Entry | None:
    wanted = (batch_size, token_budget)
    found = [
        e
        for e in profile.points
        if words.measured(e)
        and (e["batch_size"], e["token_budget"]) == wanted
        and pairs in {None, e["pairs"]}
    ]
    return max(found, key=lambda e: e["pairs"], default=None)


def _slowest(profile: Profile, chosen: Entry) -> Entry | None:
    """The slowest size for as many pairs; None where the choice had no rival."""
    rivals = [e for e in profile.points if words.measured(e) and e["pairs"] == chosen["pairs"]]
    slowest = min(rivals, key=lambda e: e["pairs_per_s"], default=chosen)
    return slowest if slowest["pairs_per_s"] < chosen["pairs_per_s"] else None


def _verdict(profile: Profile) -> str:
    chosen = _chosen(profile)
    precision = profile.settings.precision
    if chosen is None and profile.scenario is not None:
        return "The step was chosen by simulation for this use; the sweep below has other sizes."
    if chosen is None:
        return (
            "The chosen setting has no measured point, so nothing can be said about its speed. "
            "Run echelon tune again with a higher --time-limit."
        )
    found = (
        f"Use {words.step_of(chosen)} in {precision}. On {profile.key.device_name} it ranks "
        f"{chosen['pairs']} pairs in {words.duration(chosen['latency_s']['median'])} "
        f"({words.spread(chosen)}), {words.number(chosen['pairs_per_s'])} pairs/s"
    )
    slowest = _slowest(profile, chosen)
    if slowest is None:
        return f"{found}."
    return (
        f"{found}: {_times(chosen, slowest)} the slowest size measured ({words.step_of(slowest)})."
    )


def _times(chosen: Entry, slowest: Entry) -> str:
    return f"{chosen['pairs_per_s'] / slowest['pairs_per_s']:,.1f} times"


def _tiles(profile: Profile) -> list[tuple[str, str, str]]:
    """The verdict's figures: label, value, and what belongs to it."""
    chosen = _chosen(profile)
    if chosen is None:
        return []
    slowest = _slowest(profile, chosen)
    tiles = [
        (
            "Throughput",
            f"{words.number(chosen['pairs_per_s'])} pairs/s",
            f"{chosen['pairs']} pairs a call",
        ),
        (
            "Latency",
            words.duration(chosen["latency_s"]["median"]),
            f"median, {words.spread(chosen)}",
        ),
        ("Precision", profile.settings.precision, _precision_note(profile)),
        ("Peak memory", words.size(chosen["peak_bytes"]), _memory_of(profile)),
    ]
    if slowest is not None:
        rate = f"{words.number(slowest['pairs_per_s'])} pairs/s ({words.spread(slowest)})"
        tiles.insert(
            2, ("Against the slowest", _times(chosen, slowest), f"{rate}, {words.step_of(slowest)}")
        )
    return tiles


def _precision_note(profile: Profile) -> str:
    precision = profile.settings.precision
    rows = [row for row in profile.precisions if row["precision"] == precision]
    if not rows:
        return "not compared with others"
    return "the reference" if precision == "fp32" else f"τ {rows[0]['tau']:.4f} against fp32"


def _memory_of(profile: Profile) -> str:
    where = "the process" if profile.key.device == "cpu" else "the GPU"
    return f"{where}, model included"


# Tables.


def _situation(profile: Profile, name: str, profile_path: str) -> dict[str, str]:
    title, documents, why, remedy = SITUATIONS[name]
    row = {"title": title, "documents": documents}
    advice = next((s for s in profile.situations if s["name"] == name), None)
    if advice is None:
        return row | {"setting": "", "why": remedy}
    point = _find(profile, advice["batch_size"], advice["token_budget"], advice["pairs"])
    return row | {
        "setting": words.step_of(advice),
        "python": words.python(profile.key.model, profile_path, advice),
        "shell": words.shell(profile.key.model, profile_path, advice),
        "latency": words.duration(advice["latency_s"]),
        "of": f"{advice['pairs']} pairs" + (f", {words.spread(point)}" if point else ""),
        "rate": words.number(advice["pairs_per_s"]),
        "memory": words.size(advice["peak_bytes"]),
        "why": why.format(
            pairs=advice["pairs"], tie=words.percent(TIE), enough=words.percent(ENOUGH)
        ),
    }


def _best_rows(profile: Profile) -> list[list[str]]:
    """The summary table; a number of pairs without a measured point keeps its row."""
    best = {entry["pairs"]: entry for entry in profile.best}
    counts = sorted({*best, *(e["pairs"] for e in profile.points if e["batch_size"])})
    return [_best_row(count, best.get(count)) for count in counts]


def _best_row(count: int, entry: Entry | None) -> list[str]:
    if entry is None:
        return [str(count), "not measured", words.UNKNOWN, words.UNKNOWN]
    latency = f"{words.duration(entry['latency_s']['median'])} ({words.spread(entry)})"
    return [str(count), str(entry["batch_size"]), latency, words.number(entry["pairs_per_s"])]


def _precision_rows(profile: Profile) -> list[dict[str, Any]]:
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


def _agreement_needed() -> str:
    return (
        f"τ at least {LEAST_TAU}, top-10 overlap at least {words.percent(LEAST_OVERLAP)}, "
        f"nDCG@10 loss at most {MOST_NDCG_LOSS}"
    )


def _warnings(profile: Profile) -> list[str]:
    learned = profile.learned_token_budget
    if learned is None:
        return profile.warnings
    note = (
        f"Memory ran short after tuning, so steps now hold at most {learned:,} tokens. "
        "Free memory and run `echelon tune` again to get the measured speed back."
    )
    return [*profile.warnings, note]


def _point_row(entry: Entry) -> dict[str, Any]:
    row = {
        "pairs": entry["pairs"],
        "step": words.step_of(entry).removesuffix(" a step"),
        "status": words.MISSING.get(entry["status"], entry["status"]),
        "reason": entry["reason"] or "no number",
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


# Facts and commands.


def _facts(profile: Profile) -> dict[str, list[tuple[str, str]]]:
    key = profile.key
    return {
        "Machine": words.machine(profile.machine),
        "Data": words.data(profile.data),
        "Profile": [
            ("Model", key.model),
            ("Revision", key.revision),
            ("Device", f"{key.device}, {key.device_name}"),
            ("Precision", key.precision),
            ("Threads", str(profile.settings.threads or words.UNKNOWN)),
            ("Longest pair", _longest(profile)),
            ("Versions", ", ".join(f"{name} {v}" for name, v in key.versions.items())),
            ("Made", words.when(profile.created)),
        ],
    }


def _longest(profile: Profile) -> str:
    limit = profile.settings.max_length
    return "the model's limit" if limit is None else f"{limit:,} tokens"


def _snippet(profile: Profile, profile_path: str) -> str:
    return (
        "from echelon import Reranker\n\n"
        f"with {words.python(profile.key.model, profile_path)} as reranker:\n"
        '    ranking = reranker.rank("query", documents)'
    )


def _repeat(profile: Profile) -> str:
    """The command that measures the same sizes again, as far as the profile knows it."""
    parts = ["echelon", "tune", profile.key.model, "--device", profile.key.device]
    for option, name in SIZES.items() if profile.points else ():
        sizes = sorted({entry[name] for entry in profile.points if entry[name]})
        parts += [option, ",".join(map(str, sizes))]
    found, chosen = profile.scenario, profile.settings
    data = str(profile.data.get("name") or "built-in")
    asked = {
        "--data": None if data.startswith("built-in") else data,
        "--precision": None if profile.precisions else chosen.precision,
        "--max-length": chosen.max_length if found is None else found["asked"]["max_length"],
        "--threads": chosen.threads,
    }
    for option, value in asked.items():
        parts += [] if value is None else [option, str(value)]
    return shlex.join(parts)

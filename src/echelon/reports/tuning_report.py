"""The tuning report: a profile as one HTML page that needs no other file and no network."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

from echelon.engine.agreement import MAX_NDCG_LOSS, MIN_OVERLAP, MIN_TAU
from echelon.messages import N_, in_language, listed, tr, translated, units
from echelon.profile import write_text
from echelon.reports import fill, wording
from echelon.reports.model_charts import (
    agreement_charts,
    curve_chart,
    memory_charts,
    model_charts,
)
from echelon.reports.plots import charts
from echelon.reports.profile_view import chosen, find, rivals, slowest
from echelon.reports.rules_of_thumb import rules_of_thumb
from echelon.reports.statistics import CONFIDENCE, ENOUGH, TIE

if TYPE_CHECKING:
    import os

    from echelon.profile import Profile
    from echelon.reports.wording import Entry


def headline(profile: Profile) -> str:
    """One sentence with the chosen setting and its speed."""
    point = chosen(profile)
    if point is None:
        if profile.scenario is not None:
            return tr(
                "The step size was chosen by simulation for this scenario; the sweep below "
                "measured other sizes."
            )
        return tr(
            "The chosen setting was not measured, so its speed is not known. Run echelon tune "
            "again with a higher --time-limit."
        )
    found = {
        "step": wording.step_of(point),
        "precision": profile.settings.precision,
        "device": profile.key.device_name,
        "pairs": wording.pairs(point["pairs"]),
        "latency": wording.latency(point),
        "rate": wording.rate(point["pairs_per_s"]),
    }
    baseline = slowest(profile, point)
    if baseline is None:
        sentence = tr(
            "Use {step} in {precision}. {device} scores {pairs} in {latency}, {rate}.", **found
        )
    else:
        sentence = tr(
            "Use {step} in {precision}. {device} scores {pairs} in {latency}, {rate}: {times} as "
            "fast as with the slowest size measured ({slowest}).",
            **found,
            times=_times(point, baseline),
            slowest=wording.step_of(baseline),
        )
    return " ".join(filter(None, [sentence, wording.doubt(profile, rivals(profile, point))]))


def meaning(profile: Profile) -> str:
    """What the report means, in three plain sentences; empty where the setting was not measured."""
    point = chosen(profile)
    if point is None:
        return ""
    speed = tr(
        "This machine ranks {count} documents for a query in about {latency}.",
        count=point["pairs"],
        latency=units.duration(point["latency_s"]["median"]),
    )
    use = tr(
        "Give the profile to Echelon, as at the end of this page: it then uses these settings, and "
        "you choose no batch size."
    )
    baseline = slowest(profile, point)
    if baseline is not None:
        effect = tr(
            "The size of a step matters here: with the slowest one measured, the same call takes "
            "{times} as long.",
            times=_times(point, baseline),
        )
    elif rivals(profile, point):
        effect = tr("Whether another size is faster is not known yet: a longer run can tell.")
    else:
        effect = tr("No other size measured is faster.")
    return f"{speed} {use} {effect}"


def _times(point: Entry, baseline: Entry) -> str:
    return tr("{count} times", count=f"{point['pairs_per_s'] / baseline['pairs_per_s']:,.1f}")


def tiles(profile: Profile) -> list[tuple[str, str, str]]:
    """The headline's numbers: label, value and explanation."""
    point = chosen(profile)
    if point is None:
        return []
    called = tr("{pairs} per call", pairs=wording.pairs(point["pairs"]))
    median = tr("median, {certainty}", certainty=wording.spread(point))
    found = [
        (tr("Throughput"), wording.rate(point["pairs_per_s"]), called),
        (tr("Latency"), units.duration(point["latency_s"]["median"]), median),
        (tr("Precision"), profile.settings.precision, _precision_note(profile)),
        (tr("Peak memory"), units.size(point["peak_bytes"]), memory_of(profile)),
    ]
    baseline = slowest(profile, point)
    if baseline is not None:
        rate, spread = wording.rate(baseline["pairs_per_s"]), wording.spread(baseline)
        rate = tr("{value} ({certainty})", value=rate, certainty=spread)
        note = listed([rate, wording.step_of(baseline)])
        found.insert(2, (tr("Speed-up over the slowest"), _times(point, baseline), note))
    return found


def _precision_note(profile: Profile) -> str:
    precision = profile.settings.precision
    rows = [row for row in profile.precisions if row["precision"] == precision]
    if not rows:
        return tr("not compared with other precisions")
    if precision == "fp32":
        return tr("the reference")
    return tr("τ {tau} compared with fp32", tau=f"{rows[0]['tau']:.4f}")


def memory_of(profile: Profile) -> str:
    """Which memory was measured."""
    if profile.key.device != "cpu":
        return tr("GPU memory, including the model")
    if profile.memory is not None and profile.data.get("measuring"):
        return tr("memory of a new worker process with steps of this size, by the memory model")
    return tr(
        "memory of the tuning process, including what it still held from other precisions and sizes"
    )


NO_POINT = N_("No point was measured. Raise --time-limit.")

SCENARIOS = {
    "api": (
        N_("1–10 documents"),
        N_("The shortest time for {pairs} pairs; among sizes within {tie} of it, the smallest."),
        NO_POINT,
    ),
    "offline": (
        N_("50–200 documents"),
        N_("The most pairs per second, measured with {pairs} pairs."),
        NO_POINT,
    ),
    "edge": (
        N_("1–5 documents"),
        N_("The smallest step that reaches {enough} of the best speed: it needs the least memory."),
        N_("No call of 1 to 5 pairs was measured. Give --pairs 5."),
    ),
    "concurrent": (
        N_("requests of any size"),
        N_(
            "The smallest token budget that reaches {enough} of the best speed. Requests differ "
            "in length: a limit in tokens bounds the time of a step, a limit in pairs does not."
        ),
        N_("No token budget was measured. Give --token-budgets."),
    ),
}
"""Per scenario: size of requests, reason of its setting, and the remedy without one."""


def scenario_row(profile: Profile, name: str, profile_path: str) -> dict[str, str]:
    """Advice for a scenario; ``why`` is the remedy where there is none."""
    documents, why, remedy = SCENARIOS[name]
    row = {"title": tr(wording.TITLES[name]), "documents": tr(documents)}
    advice = next((s for s in profile.situations if s["name"] == name), None)
    if advice is None:
        return row | {"setting": "", "why": tr(remedy)}
    point = find(profile, advice["batch_size"], advice["token_budget"], advice["pairs"])
    certainty = tr("predicted") if advice.get("predicted") else ""
    if not certainty and point is not None:
        certainty = wording.spread(point)
    reason = tr(why, pairs=advice["pairs"], tie=units.percent(TIE), enough=units.percent(ENOUGH))
    doubt = wording.doubt(profile, rivals(profile, advice, any_unit=name == "offline"))
    return row | {
        "setting": wording.step_of(advice),
        "python": wording.python(profile.key.model, profile_path, advice),
        "shell": wording.shell(profile.key.model, profile_path, advice),
        "latency": units.duration(advice["latency_s"]),
        "of": listed(filter(None, [wording.pairs(advice["pairs"]), certainty])),
        "rate": units.number(advice["pairs_per_s"]),
        "memory": units.size(advice["peak_bytes"]),
        "why": " ".join(filter(None, [reason, doubt])),
    }


def best_rows(profile: Profile) -> list[list[str]]:
    """The best batch size for each number of pairs, measured or not."""
    best = {entry["pairs"]: entry for entry in profile.best}
    counts = sorted({*best, *(e["pairs"] for e in profile.points if e["batch_size"])})
    rows = []
    for count in counts:
        cells = [tr("not measured"), units.UNKNOWN, units.UNKNOWN]
        if count in best:
            entry = best[count]
            rate, sizes = units.number(entry["pairs_per_s"]), rivals(profile, entry)
            others = listed(str(rival["batch_size"]) for rival in sizes)
            best_one = tr("{size} (or {others})", size=entry["batch_size"], others=others)
            shown = best_one if sizes else str(entry["batch_size"])
            cells = [shown, wording.latency(entry), rate]
        rows.append([str(count), *cells])
    return rows


def precision_rows(profile: Profile) -> list[dict[str, Any]]:
    """Speed and agreement with fp32 of each precision."""
    fastest = max((row["tokens_per_s"] for row in profile.precisions), default=1.0)
    return [
        {
            "name": wording.precision(row),
            "rate": units.number(row["tokens_per_s"]),
            "share": f"{100 * row['tokens_per_s'] / fastest:.0f}%",
            "tau": f"{row['tau']:.4f}",
            "overlap": units.percent(row["overlap"], 1),
            "delta": units.number(row["max_delta"]),
            "loss": wording.loss(row["ndcg_loss"]),
            "queries": row["queries"],
            "passed": row["passed"],
            "verdict": wording.passed(row),
            "chosen": row["precision"] == profile.settings.precision,
        }
        for row in profile.precisions
    ]


def warnings(profile: Profile) -> list[str]:
    """The profile's warnings, and one if tuning's token budget no longer fits."""
    found = [translated(warning) for warning in profile.warnings]
    learned = profile.learned_token_budget
    if learned is not None:
        note = tr(
            "Memory ran out after tuning, so a step now has at most {tokens} tokens. To get the "
            "measured speed back, free memory and run `echelon tune` again.",
            tokens=f"{learned:,}",
        )
        found.append(note)
    return found


def point_row(entry: Entry) -> dict[str, Any]:
    """A row of the table of all numbers; ``reason`` says why there are none."""
    return {
        "pairs": entry["pairs"],
        "step": wording.step_of(entry).removesuffix(" per step"),
        "status": wording.missing(entry["status"]),
        "reason": _reason(entry),
        "numbers": _numbers(entry) if wording.measured(entry) else [],
    }


def _reason(entry: Entry) -> str:
    """Why there are no numbers, or what is predicted instead."""
    if entry.get("predicted_s") and not wording.measured(entry):
        return wording.prediction(entry)
    return translated(entry["reason"]) if entry["reason"] else tr("not measured")


def _numbers(entry: Entry) -> list[str]:
    return [
        units.duration(entry["latency_s"]["median"]),
        wording.interval(entry),
        wording.percentile(entry, "p95"),
        wording.percentile(entry, "p99"),
        str(entry["samples"]),
        units.number(entry["pairs_per_s"]),
        units.number(entry["tokens_per_s"]),
        units.percent(entry["padding_share"], 1),
        f"{entry['steps']:,}",
        units.size(entry["peak_bytes"]),
    ]


PROFILE_NAME = "echelon-profile.json"
"""The default file that `echelon tune` writes."""

SIZES = {"--pairs": "pairs", "--batch-sizes": "batch_size", "--token-budgets": "token_budget"}
"""Options of `echelon tune` and the entry of a point that each sets."""


def write_report(
    profile: Profile,
    path: str | os.PathLike[str],
    *,
    profile_path: str | os.PathLike[str] = PROFILE_NAME,
    lang: str | None = None,
) -> None:
    """Write the report, whole or not at all; its commands name the profile's file.

    Raises:
        InvalidInput: there is no such language.
        StorageError: the disk is full or the folder cannot be written.
    """
    write_text(Path(path), render(profile, profile_path=profile_path, lang=lang))


def render(
    profile: Profile,
    *,
    profile_path: str | os.PathLike[str] = PROFILE_NAME,
    lang: str | None = None,
) -> str:
    """The report as HTML; arguments as in :func:`write_report`."""
    with in_language(lang):
        content = _content(profile, str(profile_path))
        return fill("echelon.reports", "templates/report.html.j2", content)


def _content(profile: Profile, profile_path: str) -> dict[str, Any]:
    """The template's variables."""
    drawn = charts(profile) + memory_charts(profile)
    drawn += model_charts(profile) + agreement_charts(profile)
    needed = {"tau": MIN_TAU, "overlap": units.percent(MIN_OVERLAP), "loss": MAX_NDCG_LOSS}
    curve = curve_chart(profile)
    figures = [*drawn, curve] if curve else drawn
    return {
        "model": profile.key.model,
        "summary": wording.scenario_summary(profile),
        "command": wording.command(profile, profile_path),
        "headline": headline(profile),
        "meaning": meaning(profile),
        "tiles": tiles(profile),
        "scenarios": [scenario_row(profile, name, profile_path) for name in SCENARIOS],
        "rules": rules_of_thumb(profile),
        "best": best_rows(profile),
        "charts": drawn,
        "curve": curve,
        "figures": {chart.name: chart.figure for chart in figures},
        "precisions": precision_rows(profile),
        "needed": tr(
            "τ at least {tau}, top-10 overlap at least {overlap}, nDCG@10 loss at most {loss}",
            **needed,
        ),
        "warnings": warnings(profile),
        "gaps": not all(wording.measured(entry) for entry in profile.points),
        "points": [point_row(entry) for entry in profile.points],
        "details": _details(profile),
        "python": (
            "from echelon import Reranker\n\n"
            f"with {wording.python(profile.key.model, profile_path)} as reranker:\n"
            '    ranking = reranker.rank("query", documents)'
        ),
        "shell": wording.shell(profile.key.model, profile_path),
        "repeat": _repeat(profile),
        "tie": units.percent(TIE),
        "enough": units.percent(ENOUGH),
        "confidence": units.percent(CONFIDENCE),
        "runs_for": wording.RUNS_FOR,
        "memory_of": memory_of(profile),
    }


# Details and commands.


def _details(profile: Profile) -> dict[str, list[tuple[str, str]]]:
    key = profile.key
    return {
        tr("Machine"): wording.machine(profile.machine),
        tr("Data"): wording.data(profile.data),
        tr("Profile"): [
            (tr("Model"), key.model),
            (tr("Revision"), key.revision),
            (tr("Device"), listed([key.device, key.device_name])),
            (tr("Precision"), key.precision),
            (tr("Threads"), str(profile.settings.threads or units.UNKNOWN)),
            (tr("Maximum length of a pair"), wording.max_length(profile.settings.max_length)),
            (tr("Library versions"), listed(f"{name} {v}" for name, v in key.versions.items())),
            (tr("Created"), wording.when(profile.created)),
        ],
    }


def _repeat(profile: Profile) -> str:
    """The command that measures the same sizes again."""
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

"""The recommendation for a scenario as text, for the report and the terminal."""

from __future__ import annotations

import shlex
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from echelon.messages import N_, listed, tr, translated
from echelon.messages.units import UNKNOWN, duration, number, percent, size
from echelon.reports.wording import shell, tokens

if TYPE_CHECKING:
    from echelon.profile import Profile

Entry = dict[str, Any]

TITLES = {
    "api": N_("Realtime API"),
    "offline": N_("Offline reranking"),
    "edge": N_("Small edge device"),
    "concurrent": N_("High concurrency"),
}

METRICS = {
    "p50_s": N_("metric.p50_s"),
    "p95_s": N_("metric.p95_s"),
    "p99_s": N_("metric.p99_s"),
    "requests_per_s": N_("metric.requests_per_s"),
    "documents_per_s": N_("metric.documents_per_s"),
    "memory_bytes": N_("metric.memory_bytes"),
}
"""Message ids of the numbers that are predicted and measured, in the order of the table."""

SERVED = frozenset({"api", "concurrent"})
"""Scenarios whose settings are for `echelon serve`."""


def scenario_summary(profile: Profile) -> Entry | None:
    """The recommendation as text; None where the profile has no scenario.

    Returns:
        ``title``, ``asked``, ``state`` (``held``, ``missed`` or ``unvalidated``), ``headline``,
        ``settings`` (label and value), ``accuracy``, ``rows`` (metric, predicted, measured,
        deviation) and ``notes``.
    """
    found = profile.scenario
    if found is None:
        return None
    state = {True: "held", False: "missed", None: "unvalidated"}[found["held"]]
    return {
        "title": tr(TITLES[found["scenario"]]),
        "asked": _asked(found["asked"]),
        "state": state,
        "headline": _headline(found, state),
        "settings": _settings(found["chosen"]),
        "accuracy": agreement(found["accuracy"]),
        "rows": _rows(found["predicted"], found["measured"]),
        "notes": [translated(note) for note in found["notes"]],
    }


def command(profile: Profile, profile_path: str) -> str:
    """The command that uses the recommendation."""
    found = profile.scenario
    if found is None or found["scenario"] not in SERVED:
        return shell(profile.key.model, profile_path)
    workers = found["chosen"]["workers"]
    more = [] if workers == 1 else ["--device", "cuda", "--workers", str(workers)]
    parts = ["echelon", "serve", profile.key.model, "--profile", profile_path, *more]
    return shlex.join(parts)


def value(name: str, amount: float | None) -> str:
    """A metric with its unit."""
    if amount is None:
        return UNKNOWN
    if name.endswith("_bytes"):
        return size(round(amount))
    return number(amount) if name.endswith("_per_s") else duration(amount)


def deviation(predicted: float | None, measured: float | None) -> str:
    """How far a measurement is from its prediction, in per cent of the prediction."""
    if not predicted or measured is None:
        return UNKNOWN
    relative = measured / predicted - 1
    return f"{'−' if relative < 0 else '+'}{percent(abs(relative))}"


def _asked(asked: Entry) -> str:
    parts = []
    if asked["rate"] is not None:
        parts.append(tr("{rate} requests/s", rate=number(asked["rate"])))
    if asked["trace_requests"]:
        parts.append(tr("a trace of {count} requests", count=f"{asked['trace_requests']:,}"))
    if asked["slo_p99_s"] is not None:
        parts.append(tr("P99 within {goal}", goal=duration(asked["slo_p99_s"])))
    if asked["memory_limit_bytes"] is not None:
        parts.append(tr("at most {limit}", limit=size(round(asked["memory_limit_bytes"]))))
    documents = asked["documents"].replace("-", "–")
    parts.append(
        tr("1 document per request")
        if documents == "1"
        else tr("{documents} documents per request", documents=documents)
    )
    if asked["tokens"] is not None:
        parts.append(tr("{tokens} tokens per pair", tokens=asked["tokens"].replace("-", "–")))
    return listed(parts)


def _headline(found: Entry, state: str) -> str:
    seconds = number(found["asked"]["verify_s"])
    if state == "unvalidated":
        return tr("Predicted only; nothing was validated under load.")
    if found["scenario"] in SERVED:
        how = tr("measured with the real server under this load for {seconds} s", seconds=seconds)
    else:
        how = tr(
            "measured with the real reranker on such requests for about {seconds} s",
            seconds=seconds,
        )
    if state == "missed":
        return tr("The measurement misses the goal: {how}.", how=how)
    if found["asked"]["slo_p99_s"] is None and found["asked"]["memory_limit_bytes"] is None:
        return tr("No goal was given; {how}.", how=how)
    return tr("Validated: {how}.", how=how)


def _settings(chosen: Entry) -> list[tuple[str, str]]:
    threads, workers = chosen["threads"], chosen["workers"]
    rows = [
        (tr("Maximum tokens per step"), tokens(chosen["token_budget"])),
        (
            tr("Maximum pairs per step"),
            tr("limited by the token budget only")
            if chosen["batch_size"] is None
            else chosen["batch_size"],
        ),
        (tr("Precision"), chosen["precision"]),
        (tr("Maximum length of a pair"), max_length(chosen["max_length"])),
        (tr("Workers"), str(workers)),
    ]
    if threads is not None:
        rows.append((tr("Threads"), str(threads)))
    return rows


def max_length(count: int | None) -> str:
    """The maximum length of a pair."""
    return tr("the model's limit") if count is None else tokens(count)


def agreement(row: Entry | None) -> str:
    """How the ranking agrees with that of fp32."""
    if row is None:
        return tr("not compared with fp32")
    overlap = percent(row["overlap"], 1)
    parts = [f"τ {row['tau']:.4f}", tr("top-10 overlap {share}", share=overlap)]
    if row["ndcg_loss"] is not None:
        loss = f"{row['ndcg_loss']:.4f}".replace("-", "−")
        parts.append(tr("nDCG@10 loss {loss}", loss=loss))
    return listed(parts)


def _rows(predicted: Entry, measured: Entry | None) -> list[list[str]]:
    rows = []
    for name, label in METRICS.items():
        one, other = predicted[name], None if measured is None else measured[name]
        if one is not None or other is not None:
            rows.append([tr(label), value(name, one), value(name, other), deviation(one, other)])
    return rows


STYLES = {"held": "green", "missed": "bold red", "unvalidated": "yellow"}


def print_scenario(profile: Profile) -> None:
    """Print the settings, the predicted and measured metrics, and the notes."""
    shown = scenario_summary(profile)
    if shown is None:
        return
    console = Console()
    console.print(Text(f"\n{shown['title']}: {shown['asked']}", style="bold"))
    for label, value in (*shown["settings"], ("Ranking accuracy", shown["accuracy"])):
        console.print(Text(f"  {label:24} {value}"))
    table = Table(header_style="bold")
    table.add_column("")
    for column in ("Predicted", "Measured", "Difference"):
        table.add_column(column, justify="right")
    for row in shown["rows"]:
        table.add_row(*row)
    console.print(table)
    console.print(Text(shown["headline"], style=STYLES[shown["state"]]))
    for note in shown["notes"]:
        console.print(Text(f"Note: {note}", style="yellow"))

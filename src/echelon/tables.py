"""What the command line prints for people: tables and units."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from echelon.tune import words

if TYPE_CHECKING:
    from echelon.profile import Profile
    from echelon.types import Ranking

SITUATIONS = {
    "api": "realtime API",
    "offline": "offline reranking",
    "edge": "small edge machine",
    "concurrent": "high concurrency",
}


def print_ranking(ranking: Ranking) -> None:
    """Documents in order, best first."""
    if not ranking.results:
        Console().print("No documents, so nothing to rank.")
        return
    table = Table(box=None, header_style="bold")
    table.add_column("#", justify="right")
    table.add_column("score", justify="right")
    table.add_column("logit", justify="right")
    table.add_column("document", overflow="fold")
    for place, result in enumerate(ranking.results, 1):
        cut = f"  (cut by {result.truncated_tokens} tokens)" if result.truncated_tokens else ""
        # Text, not markup: a document may hold square brackets.
        document = Text(result.document + cut)
        table.add_row(str(place), f"{result.score:.4g}", f"{result.logit:+.3f}", document)
    Console().print(table)


def print_profile(profile: Profile) -> None:
    """The summary table and what to do."""
    console = Console()
    console.print(Text(f"\n{profile.key.model} on {profile.key.device_name}", style="bold"))
    if profile.precisions:
        console.print(_precision_table(profile))
    console.print(_best_table(profile))
    console.print(_situation_table(profile))
    chosen = profile.settings
    best = words.step(chosen.batch_size, chosen.token_budget)
    threads = f", threads {chosen.threads}" if chosen.threads else ""
    console.print(f"\nBest step: [bold]{best}[/bold], precision {chosen.precision}{threads}")
    for warning in profile.warnings:
        console.print(Text(f"Note: {warning}", style="yellow"))


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", header_style="bold")
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if index == 0 else "right")
    return table


def _precision_table(profile: Profile) -> Table:
    table = _table(
        "Precision against fp32", "Precision", "Tokens/s", "Kendall τ", "Top-10 overlap", "Passed"
    )
    for row in profile.precisions:
        table.add_row(
            words.precision(row),
            words.number(row["tokens_per_s"]),
            f"{row['tau']:.4f}",
            f"{row['overlap']:.3f}",
            "yes" if row["passed"] else "no",
        )
    return table


def _best_table(profile: Profile) -> Table:
    table = _table("Best batch", "Pairs", "Best batch", "Latency", "Pairs/s")
    for entry in profile.best:
        table.add_row(
            str(entry["pairs"]),
            str(entry["batch_size"]),
            f"{words.duration(entry['latency_s']['median'])} {words.spread(entry)}",
            words.number(entry["pairs_per_s"]),
        )
    return table


def _situation_table(profile: Profile) -> Table:
    table = _table("What to do", "Situation", "Documents", "Use", "Pairs/s", "Peak memory")
    for entry in profile.situations:
        table.add_row(
            SITUATIONS[entry["name"]],
            entry["documents"],
            words.step_of(entry),
            words.number(entry["pairs_per_s"]),
            words.size(entry["peak_bytes"]),
        )
    return table


def print_findings(findings: dict[str, Any]) -> None:
    """What ``echelon doctor`` found."""
    console = Console()
    for section in ("machine", "software", "will_use"):
        console.print(Text(section.replace("_", " ").capitalize(), style="bold"))
        for name, value in findings[section].items():
            console.print(Text(f"  {name.replace('_', ' '):18} {_plain(value)}"))
    console.print(Text("What would make it faster", style="bold"))
    for advice in findings["advice"] or ["Nothing found: run `echelon tune MODEL`."]:
        console.print(Text(f"  - {advice}"))


def _plain(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(_plain(item) for item in value) or "none"
    if isinstance(value, dict):
        return ", ".join(f"{name} {_plain(item)}" for name, item in value.items())
    if isinstance(value, int) and value > 2**24:
        return words.size(value)
    return "not installed" if value is None else str(value)

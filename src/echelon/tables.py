"""What the command line prints for people: tables and units."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from echelon.plan.pack import NO_BUDGET

if TYPE_CHECKING:
    from echelon.tune.profile import Profile
    from echelon.types import Ranking

SITUATIONS = {
    "api": "realtime API",
    "offline": "offline reranking",
    "edge": "small edge machine",
    "concurrent": "high concurrency",
}


def seconds(value: float) -> str:
    """A duration with three digits and a fitting unit."""
    return f"{value:.3g} s" if value >= 1 else f"{value * 1000:.3g} ms"


def gibibytes(value: int | None) -> str:
    """A size in GiB, or a dash where it is not known."""
    return "–" if value is None else f"{value / 2**30:.2f} GiB"


def step_size(entry: dict[str, Any]) -> str:
    """How a step is bounded, in words."""
    if entry["batch_size"]:
        return f"batch {entry['batch_size']}"
    return f"{entry['token_budget']} tokens a step"


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
    tokens = "no token limit" if chosen.token_budget == NO_BUDGET else f"{chosen.token_budget}"
    console.print(f"\nBest token budget: [bold]{tokens}[/bold], precision {chosen.precision}")
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
            row["precision"],
            f"{row['tokens_per_s']:,.0f}",
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
            seconds(entry["latency_s"]["median"]),
            f"{entry['pairs_per_s']:.1f}",
        )
    return table


def _situation_table(profile: Profile) -> Table:
    table = _table("What to do", "Situation", "Documents", "Use", "Pairs/s", "Peak memory")
    for entry in profile.situations:
        table.add_row(
            SITUATIONS[entry["name"]],
            entry["documents"],
            step_size(entry),
            f"{entry['pairs_per_s']:.1f}",
            gibibytes(entry["peak_bytes"]),
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
        return gibibytes(value)
    return "not installed" if value is None else str(value)

"""A test as one HTML page that needs nothing else, not even a network."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from echelon.profile import write_text
from echelon.reports import wording
from echelon.reports.html import fill
from echelon.stress.plots import charts
from echelon.stress.result import name_of
from echelon.stress.tables import probe_row, verdict

if TYPE_CHECKING:
    import os

    from echelon.stress.result import Result
    from echelon.stress.summary import Summary


def write_page(result: Result, path: str | os.PathLike[str]) -> None:
    """Write the page whole or not at all.

    Raises:
        StorageError: the disk is full or the folder cannot be written.
    """
    write_text(Path(path), render(result))


def render(result: Result) -> str:
    """The page as HTML."""
    return fill("echelon.stress", "page.html.j2", _content(result))


def _content(result: Result) -> dict[str, Any]:
    drawn = charts(result)
    summary = None if result.run is None else result.run.summary
    return {
        "url": result.plan.target.url,
        "verdict": verdict(result),
        "doubts": result.doubts,
        "notes": result.notes,
        "tiles": [] if summary is None else _tiles(summary),
        "charts": drawn,
        "figures": {chart.name: chart.figure for chart in drawn},
        "probes": [] if result.found is None else list(map(probe_row, _by_rate(result))),
        "latencies": [] if summary is None else _latencies(summary),
        "counts": [] if summary is None else list(summary.kinds.items()),
        "complaints": {} if summary is None else summary.complaints,
        "facts": _facts(result),
    }


def _by_rate(result: Result) -> list[Any]:
    probes = () if result.found is None else result.found.probes
    return sorted(probes, key=lambda probe: probe.rate)


def _tiles(summary: Summary) -> list[tuple[str, str, str]]:
    p99 = wording.UNKNOWN if summary.p99_s is None else wording.duration(summary.p99_s)
    promised = "" if summary.goal is None else f"goal {wording.duration(summary.goal.p99_s)}"
    tiles = [
        ("P99", p99, promised),
        (
            "Answered",
            f"{wording.number(summary.answered_per_s)}/s",
            f"{wording.number(summary.offered_per_s)}/s offered",
        ),
        ("Documents", f"{wording.number(summary.documents_per_s)}/s", ""),
        (
            "Failed",
            wording.percent(summary.failure_share, 2),
            f"{summary.failures:,} of {summary.requests:,}",
        ),
    ]
    if summary.goodput_per_s is not None:
        good = f"{wording.number(summary.goodput_per_s)}/s"
        tiles.insert(2, ("Goodput", good, "answered within the goal"))
    return tiles


def _latencies(summary: Summary) -> list[tuple[str, str]]:
    return [(name_of(p), wording.duration(s)) for p, s in summary.latency_s.items()]


def _facts(result: Result) -> list[tuple[str, str]]:
    told = result.as_dict()
    shown = {name: value for name, value in told["settings"].items() if value is not None}
    rows = [
        ("dialect", told["dialect"]),
        ("mode", told["mode"]),
        ("made", wording.when(told["created"])),
    ]
    rows += [(name.replace("_", " "), str(value)) for name, value in shown.items()]
    if result.run is not None:
        summary = result.run.summary
        rows.append(("sent late (P99)", wording.duration(summary.send_lag_s)))
        rows.append(("generator's CPU", wording.percent(summary.health.cpu_share)))
    return rows

"""The tuning report: a profile as one HTML page that needs nothing else, not even a network."""

from __future__ import annotations

import json
import math
import shlex
from dataclasses import asdict
from datetime import datetime
from html import escape
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from echelon.plan.pack import NO_BUDGET
from echelon.tune.plots import GIB, MISSING, charts, measured
from echelon.tune.profile import write_text
from echelon.tune.quality import LEAST_OVERLAP, LEAST_TAU, MOST_NDCG_LOSS
from echelon.tune.solve import ENOUGH, TIE
from echelon.tune.stats import CONFIDENCE

if TYPE_CHECKING:
    import os
    from collections.abc import Mapping, Sequence

    from echelon.tune.plots import Entry
    from echelon.tune.profile import Profile

PROFILE_NAME = "echelon-profile.json"
"""Where `echelon tune` writes the profile unless told otherwise."""

RUNS_FOR = {"p95": 20, "p99": 100}
"""Runs below which a percentile is little else than the slowest run: one run beyond it."""

UNKNOWN = "–"

SITUATIONS = {
    "api": (
        "Realtime API",
        "1–10",
        "The shortest call of {pairs} pairs; of sizes within {tie:.0%}, the smallest.",
        "No point was measured. Raise --time-limit.",
    ),
    "offline": (
        "Offline reranking",
        "50–200",
        "The most pairs a second, measured with {pairs}.",
        "No point was measured. Raise --time-limit.",
    ),
    "edge": (
        "Small edge machine",
        "1–5",
        "The smallest step that keeps {enough:.0%} of the speed: it needs the least memory.",
        "No point was measured. Raise --time-limit.",
    ),
    "concurrent": (
        "High concurrency",
        "varying",
        "Requests differ in length: a limit in tokens bounds a step's time, one in pairs does "
        "not. The smallest that keeps {enough:.0%} of the speed.",
        "No token budget was measured. Give --token-budgets.",
    ),
}
"""Per situation: its name, documents a request, why its setting, and what to do without one."""


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
    import jinja2

    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    template = environment.from_string(
        (files("echelon.tune") / "report.html.j2").read_text(encoding="utf-8")
    )
    page = template.render(_content(profile, str(profile_path)), plotly_js=_plotly_js())
    # A file name that is no UTF-8 reaches us with lone surrogates, which no file can hold.
    return page.encode("utf-8", "replace").decode("utf-8")


def _plotly_js() -> str:
    from plotly.offline import get_plotlyjs

    return str(get_plotlyjs())


def _content(profile: Profile, profile_path: str) -> dict[str, Any]:
    """What the template shows, in words."""
    drawn = charts(profile, lambda entry: escape(_hover(entry)))
    return {
        "model": profile.key.model,
        "verdict": _verdict(profile),
        "tiles": _tiles(profile),
        "situations": [_situation(profile, name, profile_path) for name in SITUATIONS],
        "best": _best_rows(profile),
        "charts": drawn,
        "figures": {chart.name: chart.figure for chart in drawn},
        "precisions": _precision_rows(profile),
        "bar": _precision_bar(),
        "warnings": _warnings(profile),
        "points": [_point_row(entry) for entry in profile.points],
        "facts": _facts(profile),
        "usage": _usage(profile, profile_path),
        "repeat": _repeat(profile),
        "tie": f"{TIE:.0%}",
        "confidence": f"{CONFIDENCE:.0%}",
        "runs_for": RUNS_FOR,
        "memory_of": _memory_of(profile),
    }


# Numbers for people.


def number(value: float) -> str:
    """Three significant digits, thousands set apart, never an exponent."""
    if not math.isfinite(value):
        return "not a number"
    if value == 0:
        return "0"
    rounded = float(f"{value:.2e}")
    places = max(0, 2 - math.floor(math.log10(abs(rounded))))
    return f"{rounded:,.{places}f}".replace("-", "−")


def duration(seconds: float) -> str:
    """Milliseconds below a second, else seconds."""
    if float(f"{seconds:.2e}") < 1:
        return f"{number(seconds * 1000)} ms"
    return f"{number(seconds)} s"


def size(count: int | None) -> str:
    """Bytes as GiB; a dash where they are not known."""
    return UNKNOWN if count is None else f"{number(count / GIB)} GiB"


def spread(entry: Entry) -> str:
    """How sure the median is: the farther end of its interval, or how few runs there are."""
    latency = entry["latency_s"]
    if latency["low"] is None or latency["high"] is None:
        return f"n={entry['samples']}"
    far = max(latency["high"] - latency["median"], latency["median"] - latency["low"])
    percent = math.ceil(1000 * far / latency["median"]) / 10  # up: never surer than measured
    return f"±{percent:.0f} %" if percent >= 10 else f"±{percent:.1f} %"

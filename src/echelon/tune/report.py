"""The tuning report: a profile as one HTML page that needs nothing else, not even a network."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

from echelon.profile import write_text
from echelon.tune import card, rows, words
from echelon.tune.agreement_plot import agreement_charts
from echelon.tune.card import longest
from echelon.tune.curve_plots import curve_chart
from echelon.tune.lang import listed, speaking, tr
from echelon.tune.memory_plot import memory_charts
from echelon.tune.model_plots import model_charts
from echelon.tune.page import fill
from echelon.tune.plots import charts
from echelon.tune.rules import rules
from echelon.tune.verdict import memory_of, tiles, verdict
from echelon.tuning.choose import ENOUGH, TIE
from echelon.tuning.sweep import CONFIDENCE

if TYPE_CHECKING:
    import os

    from echelon.profile import Profile

PROFILE_NAME = "echelon-profile.json"
"""Where `echelon tune` writes the profile unless told otherwise."""

SIZES = {"--pairs": "pairs", "--batch-sizes": "batch_size", "--token-budgets": "token_budget"}
"""Which entry of a point each option of `echelon tune` fills."""


def write_report(
    profile: Profile,
    path: str | os.PathLike[str],
    *,
    profile_path: str | os.PathLike[str] = PROFILE_NAME,
    lang: str = "en",
) -> None:
    """Write the report whole or not at all.

    Args:
        profile: what tuning found.
        path: the HTML file.
        profile_path: where the profile itself was written; the examples name it.
        lang: language of the page, ``en`` or ``zh``.

    Raises:
        InvalidInput: there is no such language.
        StorageError: the disk is full or the folder cannot be written.
    """
    write_text(Path(path), render(profile, profile_path=profile_path, lang=lang))


def render(
    profile: Profile, *, profile_path: str | os.PathLike[str] = PROFILE_NAME, lang: str = "en"
) -> str:
    """The report as HTML; arguments as in :func:`write_report`."""
    with speaking(lang):
        return fill("echelon.tuning", "report.html.j2", _content(profile, str(profile_path)))


def _content(profile: Profile, profile_path: str) -> dict[str, Any]:
    """What the template shows, in words."""
    drawn = [
        *charts(profile),
        *memory_charts(profile),
        *model_charts(profile),
        *agreement_charts(profile),
    ]
    curve = curve_chart(profile)
    figures = [*drawn, *([] if curve is None else [curve])]
    return {
        "model": profile.key.model,
        "card": card.card(profile),
        "card_type": card.command(profile, profile_path),
        "verdict": verdict(profile),
        "tiles": tiles(profile),
        "situations": [rows.situation(profile, name, profile_path) for name in rows.SITUATIONS],
        "rules": rules(profile),
        "best": rows.best_rows(profile),
        "charts": drawn,
        "curve": curve,
        "figures": {chart.name: chart.figure for chart in figures},
        "precisions": rows.precision_rows(profile),
        "needed": rows.agreement_needed(),
        "warnings": rows.warnings(profile),
        "gaps": not all(words.measured(entry) for entry in profile.points),
        "points": [rows.point_row(entry) for entry in profile.points],
        "facts": _facts(profile),
        "python": _snippet(profile, profile_path),
        "shell": words.shell(profile.key.model, profile_path),
        "repeat": _repeat(profile),
        "tie": words.percent(TIE),
        "enough": words.percent(ENOUGH),
        "confidence": words.percent(CONFIDENCE),
        "runs_for": words.RUNS_FOR,
        "memory_of": memory_of(profile),
    }


# Facts and commands.


def _facts(profile: Profile) -> dict[str, list[tuple[str, str]]]:
    key = profile.key
    return {
        tr("Machine"): words.machine(profile.machine),
        tr("Data"): words.data(profile.data),
        tr("Profile"): [
            (tr("Model"), key.model),
            (tr("Revision"), key.revision),
            (tr("Device"), listed([key.device, key.device_name])),
            (tr("Precision"), key.precision),
            (tr("Threads"), str(profile.settings.threads or words.UNKNOWN)),
            (tr("Longest pair"), longest(profile.settings.max_length)),
            (tr("Versions"), listed(f"{name} {v}" for name, v in key.versions.items())),
            (tr("Made"), words.when(profile.created)),
        ],
    }


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

"""Compares the settings chosen for the four scenarios with static batch sizes from 1 to 32.

Tunes once, then runs `echelon tune --scenario` for each scenario. The chosen settings and the
static sizes are then measured in turn with the same requests, in rounds whose order alternates.

    python benchmarks/scenarios.py                      # the demo model, about 25 minutes
    python benchmarks/scenarios.py --scenarios api      # one of them; the others' results are kept

Writes benchmarks/results/scenarios.json and scenarios.md. The goal: the chosen settings are the
best in each scenario's own measure, or within 3 % of it.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shlex
import subprocess
import sys
import tempfile
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from echelon.cli.tune import SCENARIO_FLAGS, scenario_goal
from echelon.errors import EchelonError
from echelon.models.device import cpu_name, usable_cpus
from echelon.options import Options
from echelon.profile import Profile, library_versions, write_json, write_text
from echelon.reports.wording import TITLES, scenario_summary, step
from echelon.tuning.scenario_model import open_for_scenario
from static_baselines import Comparison, rank_among_static
from static_ranking import in_words

if TYPE_CHECKING:
    from echelon.tuning.goal import ScenarioGoal

RESULTS = Path(__file__).parent / "results"

LOADS: dict[str, dict[str, Any]] = {
    "api": {"--slo-p99-ms": 500, "--rate": 15, "--documents": "1-10", "--tokens": "20-60"},
    "offline": {"--documents": "50-200"},
    "edge": {"--documents": "1-10"},
    "concurrent": {"--slo-p99-ms": 1000, "--rate": 12, "--documents": "10", "--tokens": "20-60"},
}
"""Flags of each scenario. By the demo model's fitted step times two cores hold 30 and 19 such
requests per second, and 19 and 11 with one pair per step: static 1 is too slow for
``concurrent``."""

SHARES = {"api": 1.0, "concurrent": 1.0, "offline": 0.5, "edge": 0.5}
"""Shares of the seconds of a run: without a queue, less time is needed."""

MISSED = 8
"""Exit code for a missed goal, which is also a result."""


def tune(arguments: argparse.Namespace, folder: Path) -> Path:
    """Tune once: all scenarios start from this profile."""
    profile = folder / "profile.json"
    options = {"--profile": profile, "--report": folder / "report.html"}
    _echelon(arguments, options | {"--time-limit": arguments.time_limit})
    return profile


def measure(name: str, arguments: argparse.Namespace, tuned: Path) -> dict[str, Any]:
    """Measure one scenario: the profile's entry, its ranking, and the command."""
    profile = tuned.with_name(f"{name}.json")
    profile.write_bytes(tuned.read_bytes())
    seconds = SHARES[name] * arguments.seconds
    asked = {
        "--scenario": name,
        **LOADS[name],
        "--verify-s": f"{seconds:g}",
    }
    files = {"--profile": profile, "--report": profile.with_suffix(".html")}
    load_before = os.getloadavg()
    _echelon(arguments, {"--refresh": None, **asked, **files})
    found = Profile.load(profile)
    if found.scenario is None or found.scenario["measured"] is None:
        raise SystemExit(
            f"{name}: nothing was validated. {found.scenario and found.scenario['notes']}"
        )
    try:
        static = compared(found, goal_of(asked), arguments, profile.with_name("static.json"))
    except EchelonError as error:
        raise SystemExit(f"{name}: nothing was compared. {error}") from error
    entry = {k: v for k, v in found.scenario.items() if k not in {"tried", "rounds"}}
    entry["static"] = static
    return {
        "command": _own_command(),
        "tune": _words(["echelon", "tune", arguments.model], asked),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "load_before": load_before,
        "precision": found.settings.precision,
        "entry": entry,
        "shown": in_words(entry),
        "asked": (scenario_summary(found) or {})["asked"],
    }


def goal_of(asked: dict[str, Any]) -> ScenarioGoal:
    """The goal that the flags of a scenario give."""
    values = {flags[0]: None for flags, _ in SCENARIO_FLAGS} | asked
    values["--verify-s"] = float(asked["--verify-s"])
    found = scenario_goal({flag[2:].replace("-", "_"): value for flag, value in values.items()})
    if found is None:
        raise ValueError("There is no --scenario.")
    return found


def compared(
    found: Profile, asked: ScenarioGoal, arguments: argparse.Namespace, file: Path
) -> dict[str, Any]:
    """Rank a scenario's settings among static batch sizes."""
    model = open_for_scenario(arguments.model, Options(), None, asked)
    return rank_among_static(Comparison.of(model, found, asked, file), arguments.rounds)


def _echelon(arguments: argparse.Namespace, options: dict[str, Any]) -> None:
    command = _words([sys.executable, "-m", "echelon", "tune", arguments.model], options)
    print(command, flush=True)
    ran = subprocess.run([*shlex.split(command), "--quiet"], check=False)
    if ran.returncode not in {0, MISSED}:
        raise SystemExit(ran.returncode)


def _words(begin: list[str], options: dict[str, Any]) -> str:
    words = [str(w) for pair in options.items() for w in pair if w is not None]
    return shlex.join([*begin, *words])


def _own_command() -> str:
    return shlex.join(["python", "benchmarks/scenarios.py", *sys.argv[1:]])


def page(content: dict[str, Any]) -> str:
    """The results as Markdown."""
    machine = content["machine"]
    lines = [
        "# The chosen settings beside static batch sizes",
        "",
        f"`{content['command']}`, {machine['cpu']}, {machine['cpus']} cores, {content['model']}.",
        "",
        "The goal: best, or within 3 % of the best, in each scenario's own measure.",
        "",
        "| scenario | chosen | own measure | verdict | met |",
        "|---|---|---|---|---|",
    ]
    for name, found in content["scenarios"].items():
        chosen, static = found["entry"]["chosen"], found["entry"]["static"]
        lines.append(
            f"| {TITLES[name]} | {step(chosen['batch_size'], chosen['token_budget'])}, "
            f"{found['precision']} | {static['measure']} | {found['shown']['verdict']} | "
            f"{'yes' if found['shown']['good'] else 'no'} |"
        )
    for name, found in content["scenarios"].items():
        shown = found["shown"]
        lines += ["", f"## {TITLES[name]}", "", f"{found['asked']}. {shown['verdict']}", ""]
        lines += [f"`{found['tune']}`, {found['date']}", ""]
        lines.append("| | " + " | ".join(shown["head"]) + " |")
        lines.append("|---" * (1 + len(shown["head"])) + "|")
        for row in shown["rows"]:
            label = f"**{row['name']}**" if row["chosen"] else row["name"]
            label += " (best)" if row["best"] else ""
            lines.append(f"| {label} | " + " | ".join(row["cells"]) + " |")
        lines += ["", shown["note"]]
    return "\n".join(lines).replace("\u00a0", " ") + "\n"


def merged(kept: dict[str, Any], content: dict[str, Any]) -> dict[str, Any]:
    """Replace old scenarios; the others are kept if machine and model are the same."""
    same = all(kept.get(key) == content[key] for key in ("machine", "model"))
    found = (kept["scenarios"] if same else {}) | content["scenarios"]
    return content | {"scenarios": {name: found[name] for name in LOADS if name in found}}


def main() -> None:
    """Parse the command line, tune, measure, write after each scenario."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="demo", help="hub id, folder or 'demo'")
    parser.add_argument("--scenarios", default=",".join(LOADS), help="some, with commas")
    parser.add_argument("--seconds", type=float, default=12.0, help="of a run; offline, edge half")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--time-limit", type=float, default=40.0, help="seconds of the sweep")
    parser.add_argument("--keep", type=Path, help="folder for profiles and reports [none]")
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    names = [name for name in arguments.scenarios.split(",") if name]
    if not names or not set(names) <= set(LOADS):
        parser.error(f"--scenarios: give some of {', '.join(LOADS)}")
    with tempfile.TemporaryDirectory() as home:
        folder = arguments.keep or Path(home)
        folder.mkdir(parents=True, exist_ok=True)
        tuned = tune(arguments, folder)
        for name in names:
            _write(arguments, name, measure(name, arguments, tuned))


def _write(arguments: argparse.Namespace, name: str, found: dict[str, Any]) -> None:
    file = arguments.out / "scenarios.json"
    content = {
        "command": _own_command(),
        "model": arguments.model,
        "machine": {"cpu": cpu_name(), "cpus": usable_cpus(), "system": platform.system()},
        "versions": library_versions(),
        "scenarios": {name: found},
    }
    content = merged(json.loads(file.read_text("utf-8")) if file.exists() else {}, content)
    arguments.out.mkdir(parents=True, exist_ok=True)
    write_json(file, content)
    write_text(arguments.out / "scenarios.md", page(content))
    print(f"{name}: {found['shown']['verdict']}", flush=True)


if __name__ == "__main__":
    main()
